r"""Which images stand in which batch: a function of seed, epoch and number, nothing to remember.

Training walks through a permutation of the data per epoch in chunks of `batch_size`. Micro-batch b
of rank r takes chunk b * world + r, so that one rank with two accumulated micro-batches and two
ranks with one each see the same images in a step, and a run that stops and goes on sees what it
would have seen. The last images of a permutation that do not fill a step on all ranks are left out
in that epoch (the next permutation leaves out others).

Evaluation gives rank r the images i with i mod world = r: each exactly once, none repeated to even
out the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import Sampler

from genfw.noise import mix
from genfw.train.data.images import DataError


class Chunk(NamedTuple):
    """What a batch is made from; given to the data set instead of a list of indices."""

    epoch: int
    rows: Tensor
    """int64 (b,)"""


def limit(trainer: L.Trainer | None, stage: str) -> tuple[str, int | float | None]:
    """What it was given as, and how many batches of this stage (train, val, test), or which share
    of them, a trainer is to see."""
    overfit = stage != "test" and getattr(trainer, "overfit_batches", 0)
    key = f"limit_{stage}_batches"
    return f"trainer.{'overfit_batches' if overfit else key}", getattr(trainer, key, None)


class TrainingBatches(Sampler[Chunk]):
    """Batches of one rank, of one epoch per iteration.

    Args:
        count: images in the split.
        batch_size: images per chunk (per rank and micro-batch).
        seed: of the permutations.
        rank, world: this process, of how many.
        accumulate: micro-batches per optimizer step; an epoch ends with a whole step.
        position: asked for (epoch, start) at each iteration; None: `set_epoch`, or counting.

    Raises:
        DataError: not enough images for one step.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        position: Callable[[], tuple[int, int]] | None = None,
    ):
        _check(batch_size, rank, world)
        if batch_size * world * accumulate > count:
            many = f" x {world} ranks" * (world > 1) + f" x {accumulate} accumulated" * (
                accumulate > 1
            )
            raise DataError(
                f"batch larger than the data: a step takes {batch_size}{many} images, "
                f"train has {count}: give a smaller data.batch_size"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.position = position
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Where the next iteration begins."""
        self.epoch, self.start = epoch, start

    def chunks(self, epoch: int, start: int = 0) -> Iterator[Chunk]:
        """The batches `start`, `start` + 1, ... of an epoch: a pure function."""
        generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
        order = torch.randperm(self.count, generator=generator)
        for batch in range(start, len(self)):
            chunk = batch * self.world + self.rank
            yield Chunk(epoch, order[chunk * self.batch_size :][: self.batch_size])

    def __iter__(self) -> Iterator[Chunk]:
        epoch, start = (self.epoch, self.start) if self.position is None else self.position()
        self.set_epoch(epoch + 1)
        return self.chunks(epoch, start)

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next iteration begins."""
        steps = self.count // (self.batch_size * self.world * self.accumulate)
        return steps * self.accumulate


class EvaluationBatches(Sampler[Chunk]):
    """Every image exactly once over all ranks, in order; the last batch may be smaller."""

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1):
        _check(batch_size, rank, world)
        self.rows, self.batch_size = torch.arange(count)[rank::world], batch_size

    def __iter__(self) -> Iterator[Chunk]:
        return (Chunk(0, rows) for rows in self.rows.split(self.batch_size) if len(rows))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)


def _check(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch size: expected at least 1, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 <= rank < world, got rank {rank} of {world}")
