"""Loaders that may be evaluated: those of anybody, in a notebook."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SHUFFLE = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def in_order(loaders: Any) -> None:
    """Loaders, or a loader, that give every example once, in the same order each time.

    Raises:
        ValueError: one of them shuffles, leaves out its last batch, or gives ranks examples that
            others have.
    """
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    for loader in combined.flattened:
        batches = getattr(loader, "batch_sampler", None)
        for sampler in {getattr(loader, "sampler", None), getattr(batches, "sampler", None)}:
            _keeps_its_order(sampler)
        if getattr(batches, "drop_last", False):
            _is_whole(batches)


def _keeps_its_order(sampler: Any) -> None:
    shared = isinstance(sampler, DistributedSampler)
    if isinstance(sampler, SHUFFLE) or (shared and sampler.shuffle):
        raise ValueError(
            "expected a loader that keeps its order, for an example's noise is that of its "
            "place in it, and this one would give another number each time: use shuffle=False"
        )
    if shared:
        n = len(sampler.dataset)  # pyright: ignore[reportArgumentType]
        if sampler.total_size != n:
            raise ValueError(
                f"expected every example once, and of {n} this sampler gives "
                f"{sampler.total_size} to {sampler.num_replicas} ranks alike: evaluate on one "
                "device, or use genfw.train.data.ImageData, which shares them out unevenly"
            )


def _is_whole(batches: Any) -> None:
    n, size = len(batches.sampler), batches.batch_size
    if n % size:
        raise ValueError(
            f"expected every example once, and of {n} the last batch, of {n % size}, is left out: "
            "use drop_last=False"
        )
