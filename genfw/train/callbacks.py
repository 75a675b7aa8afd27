"""What is drawn of a model while it trains, and how far its samples are from the data.

Compile, Progress and StartAtMean have pages of their own; configurations and run folders name
them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from PIL import Image as PIL
from torch import Tensor

from genfw.check import at_least
from genfw.models.vdm import VDM
from genfw.noise import Noise, mix
from genfw.train.compile import Compile
from genfw.train.data.module import ImageData
from genfw.train.errors import GenfwError, Stopped
from genfw.train.frechet import FrechetDistance, to_bytes
from genfw.train.latents import latents_of
from genfw.train.loggers import show
from genfw.train.module import LatentModule
from genfw.train.occasions import Every, skipped
from genfw.train.pictures import (
    denoising_strip,
    draw_samples,
    grid,
    reconstructions,
    save,
    steered,
)
from genfw.train.progress import Progress, watched
from genfw.train.signals import heard
from genfw.train.start_at_mean import StartAtMean

__all__ = ["Compile", "Frechet", "Pictures", "Progress", "StartAtMean"]


class Pictures(L.Callback):
    """Grids of samples, and denoising strips of diffusion models or reconstructions by learned
    hierarchies, a row for each level.

    They go to the run folder and to W&B: `samples/<step>.png` and so on during training; always the
    same random numbers, so that pictures of one run, and of two, can be laid beside each other.

    Args:
        bins: K of the data.
        every: validations between pictures; 0: only at the end.
        samples: images in a grid of samples.
        examples: images in a strip, or in a row of reconstructions.
        levels: noise levels of a strip.

    Raises:
        ValueError: no samples or examples, or fewer than two levels.
    """

    def __init__(
        self, bins: int, every: int = 5, samples: int = 64, examples: int = 6, levels: int = 8
    ):
        self.bins, self.turns = bins, Every(every)
        self.samples, self.examples = (
            at_least(1, "samples", samples),
            at_least(1, "examples", examples),
        )
        self.levels = at_least(2, "levels", levels)
        self.images: Tensor | None = None
        self.labels: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self.images = batch.image[: 2 * self.examples]
            self.labels = batch.label[: 2 * self.examples]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.turns.due(trainer):
            assert isinstance(pl_module, LatentModule)
            for kind, picture in self.draw(trainer, pl_module, self.images).items():
                path = Path(trainer.default_root_dir) / kind / f"{trainer.global_step:06d}.png"
                save(picture, path)
                show(trainer, f"val/{kind}", path)

    def state_dict(self) -> dict[str, Any]:
        return self.turns.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.turns.load_state_dict(state_dict)

    def draw(
        self, trainer: L.Trainer, module: LatentModule, images: Tensor | None
    ) -> dict[str, PIL.Image]:
        """By kind: samples, and denoising or reconstructions (of `images`), by `evaluated`.

        The first rank draws, the others wait for it and have nothing. What cannot be drawn is said,
        and the run goes on without pictures.

        Raises:
            Stopped: a signal came, on any rank.
        """
        pictures: dict[str, PIL.Image] = {}
        with heard(trainer), skipped("pictures"):
            if trainer.is_global_zero:
                pictures = self._draw(module, images)
        return pictures

    def _draw(self, module: LatentModule, images: Tensor | None) -> dict[str, PIL.Image]:
        seed = mix(module.seed, "sample")
        with module.evaluating() as model:
            drawn = draw_samples(model, range(self.samples), seed)
            columns = max(1, round(self.samples**0.5))
            pictures = {"samples": grid(to_bytes(drawn, self.bins), columns)}
            if isinstance(model, VDM):
                strip = denoising_strip(model, self.examples, seed, self.bins, self.levels)
                pictures["denoising"] = strip
            latents = latents_of(model)
            if latents is not None and images is not None:
                noise = Noise(seed, torch.arange(len(images), device=module.device))
                pictures["reconstructions"] = reconstructions(
                    latents, images, noise, self.bins, self.labels
                )
        return pictures


class Frechet(L.Callback):
    """How far samples are from the training images: a Frechet distance in named features.

    Logged as `val/<key>` and `test/<key>`, each with `<key>_samples`, the number of images
    generated: distances of different numbers do not compare. A conditional model is asked for its
    classes in turn; where samples are guided the key says so, as in
    `fd_digits_classifier_free_scale_3`. Whatever goes wrong with it is said
    once, and the run goes on without it.

    Args:
        extractor: name of the features, or auto: those that were made for these data.
        shape: of an image.
        bins: K of the data.
        weights: a file with the extractor's weights, where it needs one.
        samples: images at the test.
        validation_samples: images in validation, fewer.
        every: validations between distances; 0: only at the test.
        chunk: images sampled at a time.

    Raises:
        ValueError: fewer than two samples, which have no covariance, or a chunk of none.
    """

    def __init__(
        self,
        extractor: str,
        shape: Sequence[int],
        bins: int,
        weights: str | None = None,
        samples: int = 1000,
        validation_samples: int = 250,
        every: int = 5,
        chunk: int = 250,
    ):
        self.samples = at_least(2, "samples", samples)
        self.validation_samples = at_least(2, "validation_samples", validation_samples)
        self.turns, self.chunk = Every(every), at_least(1, "chunk", chunk)
        self.distance = FrechetDistance.open(extractor, tuple(shape), bins, weights)
        self.referred = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.turns.due(trainer):
            self._measure(trainer, pl_module, "val", self.validation_samples)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module, "test", self.samples)

    def state_dict(self) -> dict[str, Any]:
        return self.turns.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.turns.load_state_dict(state_dict)

    def _measure(
        self, trainer: L.Trainer, module: L.LightningModule, split: str, samples: int
    ) -> None:
        if self.distance is None:
            return
        assert isinstance(module, LatentModule)
        value = None
        with skipped(self.distance.key):
            value = self._compute(self.distance, trainer, module, samples)
        if value is None:
            self.distance = None
            return
        key = f"{split}/{self.distance.key}{steered(module.model)}"
        module.log(key, value)
        module.log(f"{key}_samples", float(samples))

    def _compute(
        self, distance: FrechetDistance, trainer: L.Trainer, module: LatentModule, samples: int
    ) -> float:
        """Each rank draws every so-many-th sample. What one of them cannot do, none waits for."""
        failed: Exception | None = None
        mine = range(trainer.global_rank, samples, trainer.world_size)
        distance.reset()
        with heard(trainer), module.evaluating() as model:
            try:
                self._refer(distance, trainer, module)
                chunks = math.ceil(len(mine) / self.chunk)
                with watched(model, chunks, trainer.testing and trainer.is_global_zero):
                    for start in range(0, len(mine), self.chunk):
                        seed, part = mix(module.seed, "sample"), mine[start : start + self.chunk]
                        distance.update(draw_samples(model, part, seed, self.chunk))
            except Stopped:
                raise
            except Exception as error:
                failed = error
        if not trainer.strategy.reduce_boolean_decision(failed is None, all=True):
            raise failed or GenfwError("another rank failed")
        return distance.compute()

    def _refer(self, distance: FrechetDistance, trainer: L.Trainer, module: LatentModule) -> None:
        if not self.referred:
            data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            assert isinstance(data, ImageData)
            train = data.split("train")
            distance.to(module.device).reference(train.images, "train", train.hash)
            self.referred = True
