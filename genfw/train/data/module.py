"""The data as Lightning wants them: three loaders that yield `Batch`, by indexing alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from genfw.check import at_least
from genfw.noise import mix
from genfw.train.batches import Chunk, EvaluationBatches, TrainingBatches, limit
from genfw.train.data.augment import Augmentation, Binarize, Flip
from genfw.train.data.images import Batch, DataError, Source, Split, Splits, check, some
from genfw.train.errors import ConfigError

SplitName = Literal["train", "validation", "test"]


class ImageData(L.LightningDataModule):
    """A source, the facts about it, and how it is cut into batches.

    Needs `Trainer(use_distributed_sampler=False)`: the batches know ranks already.

    Shape, bins and classes are facts that everything else is built from; they are compared with the
    data before the first step.

    Args:
        source: reads the splits.
        shape: (C, H, W).
        bins: K, what models see: values 0..K-1. 2 where images are binarized, else equal to
            `raw_bins`.
        classes: labels are 0..classes-1.
        raw_bins: values of the source are 0..raw_bins-1; None: equal to `bins`.
        path: where the source's files are; None: where it finds them by itself.
        name: for messages.
        batch_size: images per rank and micro-batch in training.
        eval_batch_size: images per rank and batch in validation and test.
        binarize: `none`; `dynamic`: training images are drawn anew each epoch; `static`: one draw
            for good. Validation and test always see one draw for good.
        flip: training images are mirrored left for right with probability 1/2.
        seed: of order, flips and dynamic draws.
        evaluation_seed: of the draws for good. Not the run's seed: runs with other seeds are tested
            on the same images.
        num_workers: processes that prepare batches; indexing an array needs none.

    Raises:
        DataError: see `check`; facts that contradict each other; a batch larger than the data; a
            rank without an image to evaluate.
        ValueError: unknown `binarize`, a size out of range.
    """

    def __init__(
        self,
        source: Source,
        shape: Sequence[int],
        bins: int,
        classes: int,
        *,
        raw_bins: int | None = None,
        path: str | Path | None = None,
        name: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 500,
        binarize: Literal["none", "dynamic", "static"] = "none",
        flip: bool = False,
        seed: int = 0,
        evaluation_seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__()
        if binarize not in ("none", "dynamic", "static"):
            raise ValueError(f"binarize: expected none, dynamic or static, got {binarize!r}")
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
            raise DataError(
                f"data.shape: expected (channels 1 or 3, height, width), got {tuple(shape)}"
            )
        raw_bins = bins if raw_bins is None else raw_bins
        if bins != (expected := raw_bins if binarize == "none" else 2):
            raise DataError(
                f"data.bins: expected {expected} with data.raw_bins={raw_bins} and "
                f"data.binarize={binarize}, got {bins}"
            )
        if not 2 <= raw_bins <= 256:
            raise DataError(
                f"data.raw_bins: expected 2 to 256 values, as bytes hold, got {raw_bins}"
            )
        self.source, self.name = source, name
        self.path = None if path is None else Path(path).expanduser()
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.bins, self.raw_bins, self.classes = bins, raw_bins, at_least(1, "classes", classes)
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.eval_batch_size = at_least(1, "eval_batch_size", eval_batch_size)
        self.binarize, self.flip = binarize, flip
        self.seed, self.evaluation_seed = seed, evaluation_seed
        self.num_workers = at_least(0, "num_workers", num_workers)
        self._seen: dict[SplitName, Split] = {}

    @cached_property
    def raw(self) -> Splits:
        """The splits as the source has them, read and checked at first use."""
        splits = self.source.read(self.shape, self.path)
        self._as_many_classes(self.source.classes(self.path))
        check(splits, self.shape, self.raw_bins, self.classes, str(self.name))
        return splits

    def _as_many_classes(self, names: Sequence[str] | None) -> None:
        """The classes that the source names are all there are.

        Raises:
            DataError: `classes` is not their number.
        """
        if names is not None and len(names) != self.classes:
            raise DataError(
                f"{self.name}: data.classes={self.classes}, and there are {len(names)}: "
                f"{some(names)}. Give data.classes={len(names)}"
            )

    def split(self, name: SplitName) -> Split:
        """A split as evaluation sees it: if binarized, then by one draw for good."""
        if self.binarize == "none":
            return getattr(self.raw, name)
        if name not in self._seen:
            coin = Binarize(self.raw_bins, mix(self.evaluation_seed, name))
            self._seen[name] = coin.fixed(getattr(self.raw, name))
        return self._seen[name]

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks; all ranks may, one of them decodes (see `cache`)."""
        _ = self.raw

    def check(self, trainer: L.Trainer) -> None:
        """Reads the data, before a run has begun anything.

        Raises:
            DataError: as `setup`, or there are not enough images for a step of this trainer, or for
                each rank to evaluate one; or it is to see a fraction of the batches that is none.
            ConfigError: an epoch would end within a step, or before a validation in it.
        """
        self.trainer = trainer
        self.setup()
        _epochs_end_well(trainer, len(self.train_dataloader()))
        self._to_evaluate("validation")
        self._to_evaluate("test")

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world = self._rank_and_world()
        trainer = self.trainer
        batches = TrainingBatches(
            len(self.raw.train),
            self.batch_size,
            self.seed,
            rank=rank,
            world=world,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            position=None if trainer is None else lambda: _position(trainer),
        )
        augmentations: list[Augmentation] = []
        if self.flip:
            augmentations.append(Flip(mix(self.seed, "flip")))
        if self.binarize == "dynamic":
            augmentations.append(Binarize(self.raw_bins, mix(self.seed, "binarize")))
        split = self.raw.train if self.binarize == "dynamic" else self.split("train")
        device = torch.device("cpu")
        if trainer is not None and self.num_workers == 0:  # workers know no accelerator
            device = trainer.strategy.root_device
        self._one_of("train", len(batches))
        return self._loader(_Images(split, augmentations, device), batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("test")

    def _evaluation(self, name: SplitName) -> DataLoader[Batch]:
        batches = self._to_evaluate(name)
        return self._loader(_Images(self.split(name)), batches)

    def _to_evaluate(self, name: SplitName) -> EvaluationBatches:
        """The batches of this rank. Lightning leaves out the evaluation of a rank without an image,
        and others would wait.

        Raises:
            DataError: a split has fewer images than there are ranks, or the trainer wants less than
                one of its batches.
        """
        count, (rank, world) = len(getattr(self.raw, name)), self._rank_and_world()
        if count < world:
            raise DataError(
                f"{self.name}: {name} has {count} image{'s' * (count > 1)}, and here are {world} "
                "ranks: give fewer trainer.devices"
            )
        batches = EvaluationBatches(count, self.eval_batch_size, rank=rank, world=world)
        self._one_of("val" if name == "validation" else name, len(batches))
        return batches

    def _one_of(self, stage: str, n: int) -> None:
        """Of n batches the trainer wants one at least.

        Raises:
            DataError: a fraction that is less.
        """
        key, most = limit(self.trainer, stage)
        if isinstance(most, float) and 0 < most * n < 1:
            raise DataError(
                f"{key}={most}: of {n} batch{'es' * (n > 1)} this is less than one: "
                "expected a number of batches, or a larger fraction"
            )

    def _loader(self, images: _Images, batches: Iterable[Chunk]) -> DataLoader[Batch]:
        return DataLoader(
            images,
            batch_sampler=batches,  # type: ignore[arg-type]  # chunks instead of lists: see _Images
            collate_fn=_identity,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_apart if self.num_workers else None,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )


def _epochs_end_well(trainer: L.Trainer, batches: int) -> None:
    """Of so many micro-batches of a rank.

    Raises:
        ConfigError: the trainer's limit leaves a step half done; or validations are counted within
            an epoch, which is shorter.
    """
    (key, most), accumulate = limit(trainer, "train"), trainer.accumulate_grad_batches
    seen = min(most, batches) if isinstance(most, int) else int((most or 0) * batches)
    if seen % accumulate and not getattr(trainer, "fast_dev_run", False):
        raise ConfigError(
            f"{key}={most}: an epoch of {seen} micro-batches would end "
            f"within a step, which takes {accumulate}: expected a multiple of "
            "trainer.accumulate_grad_batches"
        )
    every = getattr(trainer, "check_val_every_n_epoch", None)
    interval = getattr(trainer, "val_check_interval", None)
    if every is not None and isinstance(interval, int) and interval > seen:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch={every} counts val_check_interval within an epoch, "
            f"which has {seen} batches, and it is {interval}: set trainer.val_check_interval=1.0 "
            "to validate at its end"
        )


class _Images(Dataset[Batch]):
    """A split that is asked for whole batches (`__getitems__`): nothing is ever collated. They are
    augmented where they will be used: a GPU throws a thousand coins while a CPU throws one."""

    def __init__(
        self,
        split: Split,
        augmentations: Sequence[Augmentation] = (),
        device: torch.device | None = None,
    ):
        self.split, self.augmentations, self.device = split, augmentations, device

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, chunk: Chunk) -> Batch:
        rows = chunk.rows.numpy()
        image, label = (torch.from_numpy(a[rows]) for a in (self.split.images, self.split.labels))
        batch = Batch(*(each.to(self.device) for each in (image, label, chunk.rows)))
        for augmentation in self.augmentations:
            batch = batch._replace(image=augmentation(batch.image, batch.index, chunk.epoch))
        return batch


def _apart(worker: int) -> None:
    """A signal to the process group of a run is not for those that make its batches: a step could
    not be finished without them. They end with the run, be it killed: torch's own watch is on the
    process that forked them, which from Python 3.14 on is a server that outlives the run."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(run: Any) -> None:
    run.join()
    os._exit(1)


def _identity(batch: Any) -> Any:
    return batch


def _position(trainer: L.Trainer) -> tuple[int, int]:
    """(epoch, batch) that the trainer is about to begin, also after a checkpoint in mid-epoch.

    Of a checkpoint written after the last batch of an epoch, the trainer counts that epoch as done
    only after it has asked for data; hence not its `current_epoch`.
    """
    epochs, batches = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop.batch_progress
    done: int = epochs.current.processed  # pyright: ignore[reportAttributeAccessIssue]
    if not batches.is_last_batch:
        return done, batches.current.ready
    return (done + 1 if epochs.current.ready > done else done), 0
