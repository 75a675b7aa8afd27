"""What a data set is here: three splits of byte images with labels, and a source that reads them.

Images are integers 0..K-1 in uint8 arrays (n, C, H, W), in memory or mapped from a file; no image
file is opened after a source has been read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfw.registry import Registered
from genfw.train.errors import GenfwError


class DataError(GenfwError, ValueError):
    """The data are not what they were said to be; the message is for the person who gave them."""

    exit_code = 2


class Batch(NamedTuple):
    """What training and evaluation receive."""

    image: Tensor
    """uint8 (b, C, H, W), integers 0..K-1."""
    label: Tensor
    """int64 (b,), 0..classes-1."""
    index: Tensor  # type: ignore[override]  # hides tuple.index, which nobody asks a batch for
    """int64 (b,), position in the split."""


def as_batch(
    given: Any,
    labelled: bool = False,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    real: bool = False,
) -> Batch:
    """What a loader yields, as a `Batch`: x, (x,) or (x, y) of integers as well.

    Indices are then places in the order that all ranks read, of which `rank` has every `world`-th.

    Args:
        given: images (b, C, H, W), alone or with labels (b,).
        labelled: whether labels are needed; without, all are 0.
        first: how many images of this pass over the data this rank has had before.
        real: whether the model has a density of real numbers, x (b, ...) of any shape.

    Raises:
        TypeError: something else came.
    """
    if isinstance(given, Batch):
        return given
    parts = list(given) if isinstance(given, list | tuple) else [given]
    fits = 1 + labelled <= len(parts) <= 2 and all(isinstance(each, Tensor) for each in parts)
    if fits and real:
        fits = parts[0].dtype.is_floating_point and parts[0].ndim > 1
    elif fits:
        fits = parts[0].ndim == 4 and not parts[0].dtype.is_floating_point
    if not fits or any(each.dtype.is_floating_point for each in parts[1:]):
        said = ", ".join(
            f"{each.dtype} {(*each.shape,)}" if isinstance(each, Tensor) else type(each).__name__
            for each in parts
        )
        images = "real numbers, x (b, ...)" if real else "integers, images (b, C, H, W)"
        raise TypeError(
            f"expected batches {'' if labelled else 'x, (x,) or '}(x, y) of {images} "
            "and labels (b,), or genfw.train.data.Batch; "
            f"got {type(given).__name__} of {said}"
        )
    x = parts[0]
    place = torch.arange(first, first + len(x), device=x.device) * world + rank
    y = parts[1].long() if len(parts) == 2 else torch.zeros_like(place)
    return Batch(x, y, place)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels: uint8 (n, C, H, W) and int64 (n,); and how many of its files were left
    out, for they could not be used."""

    images: np.ndarray
    labels: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int | None, stop: int | None) -> Split:
        """The images start..stop-1, as views."""
        return Split(self.images[start:stop], self.labels[start:stop])

    @cached_property
    def hash(self) -> str:
        """sha256 of shapes, types and contents, in order."""
        digest = hashlib.sha256()
        for array in (self.images, self.labels):
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Splits(NamedTuple):
    """What is learned from, what is chosen by, and what is reported."""

    train: Split
    validation: Split
    test: Split


class Source(Registered, ABC, group="data"):
    """Where images come from. It decides what is in which split, and knows no batches."""

    @abstractmethod
    def read(self, shape: tuple[int, int, int], path: Path | None) -> Splits:
        """All three splits.

        Args:
            shape: (C, H, W), what every image is expected to be.
            path: where the files are, for sources that read files; None: where the source finds
                them by itself.

        Raises:
            DataError: files that are missing, unreadable, or not of this shape.
        """

    def classes(self, path: Path | None) -> list[str] | None:
        """The classes' names, in the order of their labels, asked for when `read` has been; None:
        the source knows labels alone."""
        return None


def some(names: Sequence[str]) -> str:
    """The first five, in a message."""
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def check(splits: Splits, shape: Sequence[int], bins: int, classes: int, name: str) -> None:
    """Compares data with what was said of them.

    Raises:
        DataError: a split that is empty, of another shape or type, with pixels outside 0..bins-1,
            with a label missing or outside 0..classes-1. The message names split, expectation and
            finding.
    """
    for part, (images, labels) in zip(Splits._fields, ((s.images, s.labels) for s in splits)):
        where = f"{name}, {part} split"
        if len(images) == 0:
            raise DataError(f"{where}: no images")
        if images.dtype != np.uint8:
            raise DataError(
                f"{where}: expected integers 0..{bins - 1} as uint8, got {images.dtype}"
                + (": images are not to be scaled" if images.dtype.kind == "f" else "")
            )
        if images.shape[1:] != tuple(shape):
            raise DataError(
                f"{where}: data.shape says (channels, height, width) = {tuple(shape)}, "
                f"the images are {images.shape[1:]}"
            )
        if labels.shape != (len(images),):
            raise DataError(f"{where}: {len(images)} images, but labels of shape {labels.shape}")
        if labels.dtype.kind not in "iu":
            raise DataError(f"{where}: expected integer labels, got {labels.dtype}")
        if (top := int(images.max())) >= bins:
            raise DataError(
                f"{where}: expected pixels 0..{bins - 1} (K = {bins} values), found {top}: "
                f"give at least {top + 1} values (data.raw_bins)"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            found = low if low < 0 else high
            raise DataError(
                f"{where}: expected labels 0..{classes - 1} (data.classes={classes}), found {found}"
            )
