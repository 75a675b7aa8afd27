"""Signals that ask a run to stop, and how ranks agree on it.

SIGTERM, SIGUSR1 (a scheduler takes the machine back), SIGHUP (the terminal closes; ignored under
nohup) and SIGINT (Ctrl-C) set a flag and no more.
The flags of all ranks are compared where every rank comes by: after each step, and after each batch
of evaluation. So it does not matter which ranks got the signal, or when. A second Ctrl-C does not
wait. A run of one process does not either, while it has nothing to save: before its first step, in
validation and after its last.

Lightning's own handlers call a collective operation from within the signal, in which ranks that are
elsewhere at that moment hang; they are replaced whenever a loop begins.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist

from genfw.train.errors import Stopped

EXIT_CODES = {
    signal.SIGTERM: 143,
    signal.SIGUSR1: 143,
    signal.SIGHUP: 143,
    signal.SIGINT: 130,
}
"""128 + the number of SIGTERM or SIGINT. SIGUSR1 announces a SIGTERM; SIGHUP, of a terminal that
closes, is one."""


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
        if not (dist.is_available() and dist.is_initialized()):
            return self.received
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # does not wait for a GPU
        asked = torch.tensor(self.received)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)

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


def obey(trainer: L.Trainer) -> None:
    """Stops where a signal asks for it, between parts of what takes long; as often on each rank.

    Raises:
        Stopped: on all ranks.
    """
    for each in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(each, Signals):
            stop(each.agreed(), trainer)


def stop(exit_code: int, trainer: L.Trainer) -> None:
    """Nothing, at 0.

    Raises:
        Stopped: on all ranks.
    """
    if exit_code:
        folder, step = trainer.default_root_dir, trainer.global_step
        raise Stopped(
            f"interrupted at step {step}; to go on: python -m genfw resume={folder}", exit_code
        )
