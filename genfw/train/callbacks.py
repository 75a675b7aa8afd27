"""What is shown while a model trains: progress, pictures, and how far samples are from the data."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image as PIL
from rich import progress as rich
from rich.console import Console
from torch import Tensor

from genfw.check import at_least
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.guidance import Guidance
from genfw.likelihood import BernoulliLikelihood
from genfw.model import LatentModel
from genfw.models.mhvae import MHVAE
from genfw.models.vdm import VDM
from genfw.nets.mlp import MLPDecoder
from genfw.noise import Noise, mix
from genfw.train.data.module import ImageData
from genfw.train.errors import GenfwError, Stopped, one_line
from genfw.train.frechet import FrechetDistance, to_bytes
from genfw.train.latents import latents_of
from genfw.train.loggers import Wandb
from genfw.train.module import LatentModule
from genfw.train.pictures import (
    denoising_strip,
    draw_samples,
    grid,
    reconstructions,
    save,
)
from genfw.train.signals import heard


class Progress(ProgressBar):
    """One bar over the optimizer steps of the whole run; off a terminal, lines.

    It shows the objective (nats) and the bits/dim of the last validation.

    Args:
        every: steps between lines where there is no terminal.

    Raises:
        ValueError: every below 1.
    """

    def __init__(self, every: int = 100):
        super().__init__()
        self.every = at_least(1, "every", every)
        self.enabled = True
        self.bar: rich.Progress | None = None
        self.total: int | None = None
        self.started, self.first, self.said = 0.0, 0, 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self.total = int(steps) if math.isfinite(steps) else None
        self.started, self.first = time.monotonic(), trainer.global_step
        if self.enabled and sys.stdout.isatty():
            self.bar = rich.Progress(
                rich.TextColumn("training"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.description}"),
            )
            self.bar.add_task("", total=self.total, completed=self.first)
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if self.bar is not None:
            shown = "  ".join(f"{name} {value}" for name, value in _shown(trainer).items())
            self.bar.update(self.bar.task_ids[0], completed=step, description=shown)
        elif self.enabled and step >= self.said + self.every:
            self.said = step
            print(self._line(trainer), flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, trainer: L.Trainer) -> str:
        step, seconds = trainer.global_step, time.monotonic() - self.started
        parts = [f"step {step}" + (f"/{self.total}" if self.total else "")]
        parts += [f"{name} {value}" for name, value in _shown(trainer).items()]
        parts.append(f"{seconds:.0f} s")
        if self.total:
            left = seconds * (self.total - step) / max(1, step - self.first)
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)


class StartAtMean(L.Callback):
    r"""Before training, sets the bias of a Bernoulli decoder to the logit of the mean training
    image: :math:`\log m_i - \log(1 - m_i)`, m between 0.001 and 0.999.

    A decoder that begins at grey first spends hundreds of steps on a plateau, where it knows the
    mean image and nothing of z.

    Raises:
        GenfwError: in training, a model without a Bernoulli likelihood and an `MLPDecoder`.

    References:
        Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015 (their code),
        https://arxiv.org/abs/1509.00519
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the weights of a checkpoint are read, which win."""
        if stage != "fit":
            return
        data = trainer.datamodule  # pyright: ignore
        images = data.raw.train.images
        mean = torch.from_numpy(images.mean(0, dtype="float64") / (data.raw_bins - 1))
        for model in filter(None, (pl_module.model, pl_module.average)):
            _bernoulli_decoder(model).start_at(mean.clamp(0.001, 0.999).logit())


def _bernoulli_decoder(model: Any) -> MLPDecoder:
    decoder = model.decoders[0] if isinstance(model, MHVAE) else None
    if isinstance(decoder, MLPDecoder) and isinstance(model.likelihood, BernoulliLikelihood):
        return decoder
    raise GenfwError(
        "StartAtMean: expected a VAE or MHVAE with likelihood=bernoulli and MLPDecoder as its "
        f"first decoder, got {type(model).__name__}: remove the callback"
    )


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
        self.bins, self.every = bins, at_least(0, "every", every)
        self.samples, self.examples = (
            at_least(1, "samples", samples),
            at_least(1, "examples", examples),
        )
        self.levels = at_least(2, "levels", levels)
        self.validations = 0
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
        if not _fitting(trainer):
            return
        self.validations += 1
        if self.every and self.validations % self.every == 0:
            assert isinstance(pl_module, LatentModule)
            for kind, picture in self.draw(trainer, pl_module, self.images).items():
                path = Path(trainer.default_root_dir) / kind / f"{trainer.global_step:06d}.png"
                save(picture, path)
                show(trainer, f"val/{kind}", path)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def draw(
        self, trainer: L.Trainer, module: LatentModule, images: Tensor | None
    ) -> dict[str, PIL.Image]:
        """By kind: samples, and denoising or reconstructions (of `images`), by `evaluated`.

        The first rank draws, the others wait for it and have nothing. What cannot be drawn is said,
        and the run goes on without pictures.

        Raises:
            Stopped: a signal came, on any rank.
        """
        with heard(trainer):
            try:
                return self._draw(module, images) if trainer.is_global_zero else {}
            except Stopped:
                raise
            except Exception as error:
                print(f"pictures skipped: {one_line(error)}", flush=True)
                return {}

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
        self.every, self.chunk = at_least(0, "every", every), at_least(1, "chunk", chunk)
        self.validations = 0
        self.distance = FrechetDistance.open(extractor, tuple(shape), bins, weights)
        self.referred = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _fitting(trainer):
            return
        self.validations += 1
        if self.every and self.validations % self.every == 0:
            self._measure(trainer, pl_module, "val", self.validation_samples)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module, "test", self.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def _measure(
        self, trainer: L.Trainer, module: L.LightningModule, split: str, samples: int
    ) -> None:
        if self.distance is None:
            return
        assert isinstance(module, LatentModule)
        try:
            value = self._compute(self.distance, trainer, module, samples)
        except Stopped:
            raise
        except Exception as error:
            print(f"{self.distance.key} skipped: {one_line(error)}", flush=True)
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


def steered(model: LatentModel) -> str:
    """What guides samples, as the end of a name; nothing where nothing does.

    Example:
        >>> slug("classifier_free(scale=1.5, interval=[-3, 4])")
        '_classifier_free_scale_1.5_interval_-3_4'
    """
    return slug(model.guided().title) if isinstance(model, VDM) else ""


@contextmanager
def watched(model: LatentModel, batches: int, wanted: bool = True) -> Iterator[None]:
    """A bar while a diffusion model draws so many batches of samples, where there is a terminal and
    it is wanted (that of training may still stand there).

    It counts calls of the guided denoiser, of which `Sampler.evaluations` make a batch.
    """
    if not (wanted and isinstance(model, VDM) and sys.stderr.isatty()):
        yield
        return
    guide = model.guidance
    with rich.Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=batches * model.sampler.evaluations)

        def counted(denoiser: Denoiser) -> Guidance:
            guided = guide(denoiser)
            guided.register_forward_hook(lambda *_: bar.advance(task))
            return guided

        model.guidance = counted
        try:
            yield
        finally:
            model.guidance = guide


def slug(title: str) -> str:
    """For names of files and metrics."""
    words = re.sub(r"[^\w.+-]+", "_", title).strip("_")
    return f"_{words}" if words else ""


def _fitting(trainer: L.Trainer) -> bool:
    """Whether this validation is one of a training run."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def show(trainer: L.Trainer, key: str, path: Path) -> None:
    """A picture to W&B, where there is one."""
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            logger.log_picture(key, path, trainer.global_step)


def _shown(trainer: L.Trainer) -> dict[str, str]:
    named = {
        "train/objective": "objective",
        "val/bpd": "val bits/dim",
        "val/accuracy": "val accuracy",
    }
    values = trainer.callback_metrics
    return {name: f"{float(values[key]):.3f}" for key, name in named.items() if key in values}
