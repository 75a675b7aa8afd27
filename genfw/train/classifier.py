r"""The classifier behind `guidance=classifier`: trained on noisy images, opened from its folder.

.. math:: \min E_{x, y} E_{t, \epsilon} \left[-\log p(y \mid z_t, \lambda_t)\right], \qquad
    z_t = \alpha_t x + \sigma_t \epsilon

Its cross-entropy is the NLL of the label, in nats. Accuracy is reported by noise level: at the
noise end it cannot be better than the commonest class, and need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from genfw.diffusion.guidance import NEAR, ClassifierGuidance, Guidance
from genfw.diffusion.process import marginal
from genfw.diffusion.times import TimeSampler
from genfw.likelihood import BinsLikelihood
from genfw.noise import Noise, mix
from genfw.schedule import NoiseSchedule
from genfw.train.checkpoint import read
from genfw.train.config import build
from genfw.train.data.images import Batch
from genfw.train.errors import ConfigError, GenfwError, one_line
from genfw.train.module import (
    MeanOfStep,
    in_precision,
    logs,
    noise_of_step,
    on_schedule,
    optimizers,
)
from genfw.train.runs import other


class ClassifierModule(L.LightningModule):
    """Trains a classifier of z_t, and says how good it is at each noise level.

    Logged: `val/nll` in nats and `val/accuracy`, means over the levels, and one
    `val/accuracy_at_<log SNR>` each; the same under `test/`.

    Args:
        classifier: (z (b, C, H, W), log SNR (b,)) -> logits (b, classes).
        schedule: log SNR over time; it is not trained.
        times: which noise levels training looks at.
        bins: K of the images, integers 0..K-1.
        optimizer, scheduler: as in `genfw.train.module`.
        levels: noise levels of validation, in the middles of so many even intervals of log SNR.
        seed: of every random draw (not of the initial weights).

    Raises:
        ConfigError: levels below 1.
    """

    def __init__(
        self,
        classifier: nn.Module,
        schedule: NoiseSchedule,
        times: TimeSampler,
        bins: int,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        levels: int = 9,
        seed: int = 0,
    ):
        super().__init__()
        if levels < 1:
            raise ConfigError(f"levels: expected at least 1, got {levels}")
        self.classifier, self.times = classifier, times
        self.schedule = schedule.requires_grad_(False)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.likelihood = BinsLikelihood(bins)  # which places integers as every other does
        self.levels, self.seed = levels, seed
        self.means = Means(2 + levels)
        self._of_step = MeanOfStep()

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        return self.classifier(z, log_snr)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = noise_of_step(self.trainer, self.seed, batch, batch_idx)
        data = self.likelihood.normalize(batch.image)
        t, _ = self.times(self.times.draw(noise, data), self.schedule)
        z = marginal(data, t, self.schedule).sample(noise.fold("z"))
        loss = F.cross_entropy(self.classifier(z, self._log_snr(t)), batch.label)
        if logs(self.trainer):
            self.log("train/objective", self._of_step(loss, self.trainer, batch_idx), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self.means.reset()

    def on_test_epoch_start(self) -> None:
        self.means.reset()

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def configure_optimizers(self) -> Any:
        parameters = self.classifier.parameters()
        return optimizers(self.trainer, parameters, self.optimizer, self.scheduler)

    def on_train_start(self) -> None:
        on_schedule(each.scheduler for each in self.trainer.lr_scheduler_configs)

    @property
    def looked_at(self) -> list[float]:
        """The log SNR of every level of validation."""
        most = self.schedule.log_snr_max
        span = most - self.schedule.log_snr_min
        return [float(most - span * ((i + 0.5) / self.levels)) for i in range(self.levels)]

    def by_level(self, batch: Batch, noise: Noise) -> dict[float, tuple[Tensor, Tensor]]:
        """{log SNR: (NLL of the label in nats, whether it is recognised), (b,) each}."""
        data = self.likelihood.normalize(batch.image)
        found = {}
        for i, at in enumerate(self.looked_at):
            log_snr = torch.full((len(data),), at, dtype=torch.float64, device=data.device)
            t = self.schedule.inverse(log_snr)
            z = marginal(data, t, self.schedule).sample(noise.fold(f"level{i}"))
            logits = self.classifier(z, self._log_snr(t))
            nll = F.cross_entropy(logits, batch.label, reduction="none")
            found[at] = nll.double(), (logits.argmax(1) == batch.label).double()
        return found

    def _log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t).float()

    def _evaluate(self, batch: Batch, split: str) -> None:
        found = self.by_level(batch, Noise(mix(self.seed, split), batch.index))
        nll, right = (torch.stack(each) for each in zip(*found.values()))
        self.means.update(torch.cat([nll.mean(0)[None], right.mean(0)[None], right]))

    def _report(self, split: str) -> None:
        names = ["nll", "accuracy", *(f"accuracy_at_{at:+.1f}" for at in self.looked_at)]
        for name, value in zip(names, self.means.compute(), strict=True):
            self.log(f"{split}/{name}", value.float(), prog_bar=name == "accuracy")


class Means(Metric):
    """Of so many numbers that every image has, (numbers, b), the means over images of all ranks:
    float64 sums and a count, reduced by summing. Lightning's own mean rounds a rank's count of
    images to an integer."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, numbers: int):
        super().__init__()
        self.add_state("total", torch.zeros(numbers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows: Tensor) -> None:
        self.total += rows.double().sum(1)
        self.count += rows.shape[1]

    def compute(self) -> Tensor:
        return self.total / self.count


def assemble(config: DictConfig) -> ClassifierModule:
    """The module of a composed configuration, with new weights."""
    torch.manual_seed(config.seed)
    module = ClassifierModule(
        build(config.classifier),
        build(config.schedule),
        build(config.times),
        config.data.bins,
        build(config.optimizer),
        build(config.scheduler),
        levels=config.levels,
        seed=config.seed,
    )
    return in_precision(module, config)


def fitting(config: DictConfig, place: str, key: str = "guidance.classifier") -> ClassifierModule:
    """The classifier of a run folder, or of a checkpoint in one, for a model of these data, with
    the schedule that it was trained along.

    Nothing but genfw's own classes and what `config.trusted` names is imported, and of the
    checkpoint nothing but weights is read.

    Args:
        config: of the model.
        place: the folder of a `python -m genfw.classifier`.
        key: what `place` was given as, for messages.

    Raises:
        ConfigError: there is none, or one of other images, values or classes.
        GenfwError: its weights cannot be read.
    """
    theirs, checkpoint = other(place, key, config)
    if "classifier" not in theirs:
        raise ConfigError(
            f"{key}={place}: expected the run of a classifier, and this is one of "
            f"{(theirs.get('model') or {}).get('_target_', 'something else')}: train one with "
            "python -m genfw.classifier"
        )
    same_data(theirs, config, f"{key}={place}: a classifier")
    module = assemble(theirs)
    weights = read(checkpoint)
    try:
        module.load_state_dict(weights["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise GenfwError(f"{checkpoint} does not fit its config.yaml: {one_line(error)}") from error
    return module.requires_grad_(False).eval()


def same_data(theirs: DictConfig, config: DictConfig, what: str) -> None:
    """Refuses what was trained on other data than the model of `config`.

    Raises:
        ConfigError: images of another shape, number of values or of classes.
    """
    for fact in ("shape", "bins", "classes"):
        its, mine = theirs.data[fact], config.data[fact]
        if its != mine:
            raise ConfigError(
                f"{what} of images with data.{fact}={its}, and this model's have data.{fact}={mine}"
            )


def knows_the_noise(config: DictConfig, guided: Guidance) -> None:
    """Refuses a classifier that would be asked about noisier images than it was trained on.

    Args:
        config: of the model.
        guided: its denoiser with the weights it samples with, and their schedule.

    Raises:
        ConfigError: the classifier's schedule ends before guidance does.
    """
    if not isinstance(guided, ClassifierGuidance):
        return  # another is asked about clean images
    place, lowest = config.guidance.classifier, guided.reach[0]
    known = [m for m in guided.classifier.modules() if isinstance(m, ClassifierModule)]
    its = max((m.schedule.log_snr_min for m in known), default=-math.inf)
    if its > lowest + NEAR:
        raise ConfigError(
            f"guidance.classifier={place}: a classifier that knows log SNR down to {its:g}, and "
            f"guidance begins at {lowest:.4g}: train one with schedule.log_snr_min={lowest:.4g}, "
            f"or guide above with guidance.interval=[{its:g},100]"
        )
