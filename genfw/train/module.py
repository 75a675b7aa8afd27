"""The one LightningModule, for every model: minimises an `Objective`, reports an `Estimator`.

Random numbers are functions of where they are used, so that neither a resumed run nor another
number of ranks sees different ones: a training step draws from (seed, global step, chunk), with
chunk = micro-batch x world size + rank, and stratifies its times over all chunks of the step from
(seed, global step); evaluation draws from (seed, example index).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from genfw.elbo import bits_per_dim
from genfw.estimators.bound import Bound
from genfw.estimators.estimator import Estimator, undisturbed
from genfw.model import LatentModel
from genfw.noise import BatchNoise, Draws, Noise, mix
from genfw.objective import Elbo, Objective
from genfw.train.data.images import Batch, as_batch
from genfw.train.in_order import in_order
from genfw.train.metrics import NLL

Module = TypeVar("Module", bound=L.LightningModule)


class LatentModule(L.LightningModule):
    """Trains, validates and tests a `LatentModel`.

    `val/` and `test/` numbers are those of the averaged weights where there are some (`average`,
    see `genfw.train.ema`), in float32 without autocast or TF32, or better. They do not depend on
    the objective.

    Batches are `Batch`, or what a plain `DataLoader(TensorDataset(x, y))` yields: x, (x,) or
    (x, y), integers. An example of those is known in evaluation by its place in the loader's order,
    which is to be the same each time (shuffling is refused); in training noise is that of the step,
    and its index is only its place in the batch.

    Args:
        model: what is trained.
        objective: what is minimised, (b,) nats.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total optimizer steps) -> learning rate schedule, advanced each step;
            None: constant.
        estimator: the NLL that is reported on the test set; default: the bound.
        validation_estimator: a cheaper one for validation; default: the bound over 2 x 4 draws.
        seed: of every random draw (not of the initial weights, which come with `model`).
        label_dropout: the share of labels that a conditional model is not told in training.

    Attributes:
        arithmetic: what the last numbers were computed in, dtype and whether TF32 was allowed.
        reached: the optimizer step of the checkpoint that the weights were read from last; None
            where there was none.
        dims: C * H * W of the images that they are of.

    Raises:
        ValueError: label_dropout outside [0, 1); in evaluation, a loader that shuffles, or gives an
            image to two ranks.
        TypeError: in a step, batches of something else, or without labels for a model of p(x | y).
    """

    def __init__(
        self,
        model: LatentModel,
        objective: Objective,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        estimator: Estimator | None = None,
        validation_estimator: Estimator | None = None,
        seed: int = 0,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout: expected a share in [0, 1), got {label_dropout}")
        self.label_dropout = label_dropout
        self.model = model
        self.average: LatentModel | None = None
        self.objective = objective
        self.optimizer, self.scheduler = optimizer, scheduler
        self.estimator = Bound() if estimator is None else estimator
        self.validation_estimator = validation_estimator or Bound(sets=2, strata=4)
        self.seed = seed
        self.arithmetic: dict[str, Any] = {}
        self.reached: int | None = None
        self.dims = 0
        known = (*self.estimator.diagnostics, *self.validation_estimator.diagnostics)
        self.nll = NLL(diagnostics=known)
        self._of_step = MeanOfStep()

    @property
    def evaluated(self) -> LatentModel:
        """The weights that are reported: the average where there is one."""
        return self.model if self.average is None else self.average

    @contextmanager
    def evaluating(self) -> Iterator[LatentModel]:
        """`evaluated` in evaluation mode, as `undisturbed` has it, without TF32 or compiled code.

        Raises:
            ValueError: its weights are narrower than float32.
        """
        model = self.evaluated
        narrow = {str(p.dtype) for p in model.parameters() if p.dtype.itemsize < 4}
        if narrow:
            raise ValueError(
                f"the weights are {' and '.join(narrow)}, and numbers are reported in float32 or "
                "better: use trainer.precision=bf16-mixed, or 32-true to evaluate these"
            )
        eager = torch.compiler.set_stance("force_eager")
        with undisturbed(model), full_float32(), eager:
            yield model

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        if isinstance(batch, Batch):
            return batch
        trainer, labelled = self.trainer, self.model.classes is not None
        if not trainer.training:
            in_order(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
        seen = 0 if trainer.training else int(self.nll.count)
        return as_batch(
            batch,
            labelled,
            seen,
            trainer.global_rank,
            trainer.world_size,
            real=self.model.of_density,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = noise_of_step(self.trainer, self.seed, batch, batch_idx)
        self.objective.advance(self.trainer.global_step)
        labels = drop_labels(batch.label, self.model.classes, self.label_dropout, noise)
        nats = self.objective(self.model, batch.image, labels, noise=noise)
        if nats.shape != (len(batch.image),):
            raise ValueError(
                f"objective: expected one value per example, ({len(batch.image)},), "
                f"got {(*nats.shape,)}"
            )
        loss = nats.mean()
        if logs(self.trainer):
            value = self._of_step(loss, self.trainer, batch_idx)
            self.log("train/objective", value, prog_bar=True)
            bits = isinstance(self.objective, Elbo) and not self.model.of_density
            if bits:  # other objectives are weighted
                self.log("train/objective_bpd", bits_per_dim(value, batch.image[0].numel()))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.validation_estimator, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.estimator, "test")

    def on_validation_epoch_start(self) -> None:
        self.nll.reset()  # of one that was broken off

    def on_test_epoch_start(self) -> None:
        self.nll.reset()

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _evaluate(self, batch: Batch, estimator: Estimator, split: str) -> None:
        noise = Noise(mix(self.seed, split), batch.index)
        with self.evaluating() as model:
            self.arithmetic = arithmetic(model)
            estimate = estimator(model, batch.image, batch.label, noise=noise)
        self.dims = batch.image[0].numel()
        self.nll.update(estimate, self.dims)

    def _report(self, split: str) -> None:
        values = self.nll.compute()
        if self.model.of_density:
            del values["bpd"]
        if "nonfinite" in values:
            count, n = int(values["nonfinite"]), int(values["count"])
            warnings.warn(f"{split}: the NLL of {count} of {n} images is not finite", stacklevel=2)
        shown = "val/nll" if self.model.of_density else "val/bpd"
        for name, value in values.items():
            key = f"{split}/{name}"
            self.log(key, value.float(), prog_bar=key == shown)

    def configure_optimizers(self) -> Any:
        parameters = (*self.model.parameters(), *self.objective.parameters())
        return optimizers(self.trainer, parameters, self.optimizer, self.scheduler)

    def on_train_start(self) -> None:
        on_schedule(each.scheduler for each in self.trainer.lr_scheduler_configs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A file with averaged weights is evaluated by them, whoever loads it."""
        self.reached = checkpoint.get("global_step")
        if self.average is None and any(k.startswith("average.") for k in checkpoint["state_dict"]):
            self.average = copy.deepcopy(self.model).requires_grad_(False).eval()


class MeanOfStep:
    """The mean of a loss over the micro-batches of a step, on all ranks."""

    def __init__(self):
        self.losses: list[Tensor] = []

    def __call__(self, loss: Tensor, trainer: L.Trainer, batch_idx: int) -> Tensor:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        self.losses = [*([] if first else self.losses), loss.detach()]
        return trainer.strategy.reduce(torch.stack(self.losses).mean())


def noise_of_step(trainer: L.Trainer, seed: int, batch: Batch, batch_idx: int) -> BatchNoise:
    """The draws of one micro-batch of a training step; torch's global generators are set to its
    chunk's."""
    step, world = trainer.global_step, trainer.world_size
    accumulate = trainer.accumulate_grad_batches
    chunk = batch_idx % accumulate * world + trainer.global_rank
    reseed(mix(seed, step, chunk), batch.image.device)
    return BatchNoise(
        len(batch.image),
        batch.image.device,
        seed=mix(seed, "time", step),
        chunk=chunk,
        chunks=accumulate * world,
    )


def optimizers(
    trainer: L.Trainer,
    parameters: Iterable[Tensor],
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    scheduler: Callable[[Optimizer, int], LRScheduler] | None,
) -> Any:
    """What `configure_optimizers` returns, of those parameters that are trained.

    Raises:
        ValueError: there is a learning rate schedule, and the run has no end.
    """
    made = optimizer([p for p in parameters if p.requires_grad])
    if scheduler is None:
        return made
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ValueError(
            "a learning rate schedule needs to know its end: "
            "give trainer.max_steps or trainer.max_epochs"
        )
    schedule = scheduler(made, int(steps))
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def on_schedule(schedules: Iterable[LRScheduler]) -> None:
    """Sets learning rates to what schedules say of their step, here and now.

    A checkpoint holds the rate of its last step: at the end of a run the rate is 0. A run that is
    given more steps goes on at the rate of one that was planned that long.
    """
    for schedule in schedules:
        if isinstance(schedule, LambdaLR):
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            now = [base * factor(schedule.last_epoch) for base, factor in rates]
            for group, rate in zip(schedule.optimizer.param_groups, now, strict=True):
                group["lr"] = rate
            schedule._last_lr = now


def drop_labels(y: Tensor, classes: int | None, share: float, noise: Draws) -> Tensor:
    """Labels (b,), each of them `classes`, which stands for none, with probability `share`.

    Without classes there is nothing to drop, and no random number is drawn.
    """
    if classes is None or not share:
        return y
    u = noise.fold("label").uniform("label", torch.empty(len(y), device=y.device))
    return torch.where(u < share, classes, y)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products without shortened factors. NVIDIA's convolutions keep 10 bits of a mantissa
    (TF32) unless told otherwise.

    Torch has an older and a newer set of switches and refuses to read one that contradicts the
    other; both are set.
    """
    matmul, kept = torch.get_float32_matmul_precision(), _cudnn_precision()
    _switch("highest", ("ieee", "ieee"))
    try:
        yield
    finally:
        _switch(matmul, kept)


def _switch(matmul: str, cudnn: tuple[str, str]) -> None:
    torch.set_float32_matmul_precision(matmul)
    backend: Any = torch.backends.cudnn  # torch's stubs know the older switches only
    backend.allow_tf32 = cudnn == ("tf32", "tf32")
    backend.conv.fp32_precision, backend.rnn.fp32_precision = cudnn


def _cudnn_precision() -> tuple[str, str]:
    backend: Any = torch.backends.cudnn
    return backend.conv.fp32_precision, backend.rnn.fp32_precision


def arithmetic(model: LatentModel) -> dict[str, Any]:
    """What `model` computes in here and now."""
    tf32 = "tf32" in _cudnn_precision() or torch.get_float32_matmul_precision() != "highest"
    return {"dtype": str(model.dtype).removeprefix("torch."), "tf32": tf32}


def in_precision(module: Module, config: DictConfig) -> Module:
    """In float64 where its run trains so. Lightning would widen it after it has read a checkpoint,
    whose weights float32 would have rounded."""
    wide = str(OmegaConf.select(config, "trainer.precision")) in ("64", "64-true")
    return module.double() if wide else module


def logs(trainer: L.Trainer) -> bool:
    """Whether Lightning writes the numbers of this training step; it would take those of the
    others too and drop them, at the cost of a small network's forward pass."""
    every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return (trainer.global_step + 1) % every == 0


def reseed(seed: int, device: torch.device) -> None:
    """Sets torch's global generators of the CPU and of `device`.

    As `torch.manual_seed`, which in a process without an accelerator notes a stack trace for each
    kind there might be, at every call: 0.8 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int = 100) -> LRScheduler:
    r"""Linear from 0 over `warmup` steps, then half a cosine down to 0 at `steps`.

    A function of the step and of `steps` alone: a finished run that goes on with more steps jumps
    to the rate that a longer run would have there.

    Args:
        warmup: steps; at most a tenth of `steps`, so that short runs train too.

    References:
        SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov, Hutter, 2017 (without
            restarts),
        https://arxiv.org/abs/1608.03983
    """
    warmup = min(warmup, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
