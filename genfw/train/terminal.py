"""A process and the terminal, or pipe, that it was started from: it may close, and the run goes on.

Also what a signal does before there is a run (`genfw.train.signals`): nothing is there to be saved.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType


class Lasting(io.TextIOWrapper):
    """Text to a place that may go away (`| head`, a terminal that closes): then it goes nowhere."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            self._gone()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._gone()

    def _gone(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def detach() -> None:
    """First thing in a process: what is said lasts, and a signal ends it with 143."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            settings = {
                "encoding": stream.encoding,
                "errors": stream.errors,
                "line_buffering": stream.line_buffering or name == "stderr",
            }
            setattr(sys, name, Lasting(stream.detach(), **settings))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"interrupted: there was nothing to save\n")
    finally:
        os._exit(143)
