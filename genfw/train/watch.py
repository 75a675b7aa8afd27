"""How fast a run goes, what it waits for, and what it holds in memory.

Logged at `trainer.log_every_n_steps`, in the same row as the objective:

train/images_per_second   of all ranks, since the row before; validation is left out
train/wait_share          of that time, between the end of a step and the start of the next: data
train/lr                  of the first parameter group
memory/peak_rss_gib       the most that this process has held so far
memory/peak_gpu_gib       the most that torch has held on the device, where there is one

`train/grad_norm` and `train/skip_rate` come from `Stability`, `train/ema_decay` from `EMA`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch.optim import Optimizer

from genfw.train.module import logs

GIB = 2**30


class Watch(L.Callback):
    """The numbers of this page. Two readings of a clock per step, and no wait for the device.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.images = 0
        self.waited = 0.0
        self.since: float | None = None  # the row before, later by the time of validations since
        self.paused = self.ended = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images, self.waited = 0, 0.0
        self.since = self.ended = self.clock()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waited += self.clock() - self.ended
        self.images += len(batch.image) * trainer.world_size

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if not logs(trainer) or self.since is None:
            return
        now = self.clock()
        seconds = max(now - self.since, 1e-9)
        pl_module.log("train/images_per_second", self.images / seconds)
        pl_module.log("train/wait_share", self.waited / seconds)
        pl_module.log("train/lr", optimizer.param_groups[0]["lr"])
        pl_module.log("memory/peak_rss_gib", peak_rss() / GIB)
        if pl_module.device.type == "cuda":
            pl_module.log("memory/peak_gpu_gib", torch.cuda.max_memory_allocated() / GIB)
        self.images, self.waited, self.since = 0, 0.0, now

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.ended = self.clock()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.since is not None:
            lasted = self.clock() - self.paused
            self.since, self.ended = self.since + lasted, self.ended + lasted


def peak_rss() -> int:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
