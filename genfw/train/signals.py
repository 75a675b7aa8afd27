"""Signals that ask a run to stop, and how ranks agree on it.

SIGTERM, SIGUSR1 (a scheduler takes the machine back), SIGHUP (the terminal closes; ignored under
nohup) and SIGINT (Ctrl-C) set a flag and no more.
The flags of all ranks are compared where every rank comes by: after each step, and after each batch
of evaluation. So it does not matter which ranks got the signal, or when. A second Ctrl-C does not
wait. A run of one process does not either, while it has nothing to save: before its first step, in
validation and after its last.

Lightning's own handlers call a collective operation from within the signal, in which ranks that are
elsewhere at that moment hang; they are replaced whenever a loop begins.

Where ranks do different things, or wait for one that draws pictures, the flags are compared about
once a second, between two calls of a network (`heard`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook

from genfw.train.errors import Stopped, resume_line

EXIT_CODES = {
    signal.SIGTERM: 143,
    signal.SIGUSR1: 143,
    signal.SIGHUP: 143,
    signal.SIGINT: 130,
}
"""128 + the number of SIGTERM or SIGINT. SIGUSR1 announces a SIGTERM; SIGHUP, of a terminal that
closes, is one."""

PAUSE = 1.0
"""Seconds between two comparisons where ranks do different things."""


class Interruption(BaseException):
    """A signal cut short what had nothing to save. No `except Exception` keeps it."""


class Signals(L.Callback):
    """Use as a context, around everything that a signal should not cut short.

    Raises:
        Interruption: out of anything that runs, at a signal to a run of one process while `idle`.
    """

    def __init__(self) -> None:
        self.received = 0
        """The exit code that was asked for; 0: none."""
        self.idle = True
        """Whether everything that is worth saving is saved."""
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._polls = 0

    def __enter__(self) -> Signals:
        """What is ignored (Ctrl-C by a job in the background) stays ignored."""
        found = {number: signal.getsignal(number) for number in EXIT_CODES}
        self._before = {k: v for k, v in found.items() if v is not signal.SIG_IGN}
        self._install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The exit code that any rank was asked for, the same on all of them; 0: go on.

        All ranks must call it equally often.
        """
        return self._most(self.received)[0]

    @contextmanager
    def heard(self, trainer: L.Trainer) -> Iterator[None]:
        """Ranks do different things within, some of them nothing, and a signal to any ends all.

        All ranks enter; who leaves waits for the others. Within there must be no collective
        operation, and nothing that one rank waits for another with.

        Raises:
            Stopped: on all ranks, out of a forward pass of any network, or on leaving.
        """
        asked = time.monotonic()

        def ask(*_: Any) -> None:
            nonlocal asked
            if time.monotonic() - asked >= PAUSE:
                stop(self._most(self.received, busy=1)[0], trainer)
                asked = time.monotonic()

        hook = register_module_forward_pre_hook(ask)
        try:
            yield
        finally:
            hook.remove()
        busy = 1
        while busy:
            code, busy = self._most(self.received, busy=0)
            stop(code, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What came while data and model were built is obeyed before the first step."""
        self._install()
        self.idle = False
        stop(self.agreed(), trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer.num_test_batches)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._poll(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._poll(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._catch_up(trainer)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._catch_up(trainer)

    def _most(self, code: int, busy: int = 0) -> tuple[int, int]:
        """The maximum over ranks of `code` and of `busy`."""
        if not (dist.is_available() and dist.is_initialized()):
            return code, busy
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # does not wait for a GPU
        both = torch.tensor([code, busy])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        code, busy = both.tolist()
        return code, busy

    def _begin(self, batches: Any) -> None:
        """Ranks may have one batch more or less; all of them ask as often as the busiest."""
        self._install()
        most = torch.tensor(float(sum(batches) if isinstance(batches, list) else batches))
        self.agreed()  # makes the group
        if self._group is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        self._polls = int(most)

    def _poll(self, trainer: L.Trainer) -> None:
        self._polls -= 1
        stop(self.agreed(), trainer)

    def _catch_up(self, trainer: L.Trainer) -> None:
        while self._polls > 0:
            self._poll(trainer)

    def _install(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data ends with its run
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        first = not self.received
        self.received = EXIT_CODES[signal.Signals(number)]
        if first and self.idle and _alone():
            raise Interruption


def _alone() -> bool:
    """Whether no other rank would be left waiting."""
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1
    return int(ranks) == 1 and not (dist.is_available() and dist.is_initialized())


def heard(trainer: L.Trainer) -> AbstractContextManager[None]:
    """`Signals.heard`, of this trainer; nothing where it has none."""
    known = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = [each for each in known if isinstance(each, Signals)]
    return found[0].heard(trainer) if found else nullcontext()


def stop(exit_code: int, trainer: L.Trainer) -> None:
    """Nothing, at 0.

    Raises:
        Stopped: on all ranks.
    """
    if exit_code:
        again = resume_line(trainer.default_root_dir)
        raise Stopped(f"interrupted at step {trainer.global_step}; to go on: {again}", exit_code)
