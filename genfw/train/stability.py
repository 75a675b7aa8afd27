r"""What stops a bad step before it reaches the weights.

Two things can be wrong with a step: the loss or a gradient is not finite, or the gradient is far
longer than it used to be,

.. math:: \|g_n\| > f \cdot Q_q(\|g\| \text{ of the last } w \text{ steps taken}).

Such a step is skipped by taking the gradients away (`grad = None`): torch's optimizers then leave a
parameter alone, weight decay and momentum included, which zeros would not do. The step is still
counted: the learning rate, the average of the weights and `global_step` go on.

References:
    Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images, Child, 2020,
        https://arxiv.org/abs/2011.10650 (skips above a fixed norm).
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from genfw.check import at_least, positive, share
from genfw.train.errors import Stopped
from genfw.train.module import logs
from genfw.train.sharding import whole

Policy = Literal["stop", "skip"]


class Stability(L.Callback):
    """Stops at, or skips, steps whose loss or gradient is not finite; skips outliers of the
    gradient norm.

    All ranks decide together. Logged: `train/grad_norm`, before clipping, and `train/skip_rate`,
    the share of all steps so far that were skipped. The decision costs one wait for the device per
    step. Under float16 with a loss scaler, infinite gradients of a finite loss are the scaler's
    business, which skips them itself.

    Args:
        nan_policy: at a loss or gradient that is not finite: `stop` the run, before its weights
            change, or `skip` the step.
        factor: f above; None: no norm is too large.
        quantile: q in [0, 1].
        window: w; nothing is skipped before there were as many steps.
        max_consecutive: this many steps in a row that are not finite stop the run. As many that are
            merely long are skipped; the next one is taken, and the norms before it are forgotten:
            they were those of a plateau that is left.

    Raises:
        ValueError: an argument out of its range.
        Stopped: in training, at a step that is not finite: it names the step and the images.
    """

    def __init__(
        self,
        nan_policy: Policy = "stop",
        factor: float | None = 10.0,
        quantile: float = 0.9,
        window: int = 200,
        max_consecutive: int = 5,
    ):
        if nan_policy not in ("stop", "skip"):
            raise ValueError(f"nan_policy: expected stop or skip, got {nan_policy!r}")
        self.nan_policy = nan_policy
        self.max_consecutive = at_least(0, "max_consecutive", max_consecutive)
        self.outliers = Outliers(factor, quantile, window, max_consecutive)
        self.steps, self.skipped, self.nonfinite = 0, 0, 0
        self.losses: list[Tensor] = []
        self.images: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.images.append(batch.index)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """After all gradients of the step, unscaled, and before clipping."""
        losses, images, self.losses, self.images = self.losses, self.images, [], []
        norm = gradient_norm(optimizer).to(losses[0].device)
        loss = torch.stack([each.float() for each in losses]).sum()
        precision = trainer.precision_plugin
        scaled = isinstance(precision, MixedPrecision) and precision.scaler is not None
        watched = loss if scaled else loss + norm.to(loss)
        bad, length = decide(~watched.isfinite(), norm)
        self.steps += 1
        if bad:
            self.nonfinite += 1
            if self.nan_policy == "stop" or self.nonfinite >= self.max_consecutive:
                told = self._report(trainer.global_step, loss, norm, images)
                raise Stopped(from_the_cause(told, bool(loss.isfinite())))
            skip = True
        else:
            self.nonfinite = 0
            skip = self.outliers(length)
        if skip:
            self.skipped += 1
            take_away(optimizer)
        if logs(trainer):
            if not bad:
                pl_module.log("train/grad_norm", length)
            pl_module.log("train/skip_rate", self.skipped / self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "norms": list(self.outliers.norms),
            "skipped_in_a_row": self.outliers.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.skipped = state_dict["steps"], state_dict["skipped"]
        self.nonfinite = state_dict["nonfinite"]
        self.outliers.norms.clear()
        self.outliers.norms.extend(state_dict["norms"])
        self.outliers.skipped = state_dict["skipped_in_a_row"]

    def _report(self, step: int, loss: Tensor, norm: Tensor, images: list[Tensor]) -> str:
        times = f"{self.nonfinite} steps in a row, " if self.nonfinite > 1 else ""
        at = f"{times}step {step}"
        if (loss + norm).isfinite():
            return f"{at}: the loss or the gradient is not finite on another rank"
        what = "gradient norm" if loss.isfinite() else "loss"
        value = float(norm if loss.isfinite() else loss)
        rows = torch.cat(images).tolist()
        shown = ", ".join(str(row) for row in rows[:20]) + ", ..." * (len(rows) > 20)
        before = ", ".join(f"{norm:.3g}" for norm in [*self.outliers.norms][-5:])
        told = f" (gradient norms before it: {before})" if before else ""
        return (
            f"{at}: the {what} is {value} for training images {shown}{told}; the weights are those"
            " before this step: try a smaller optimizer.lr, or callbacks.stability.nan_policy=skip"
        )


class Outliers:
    """Which gradient norms are too large, by those of the steps taken before.

    Args: as of `Stability`.

    Example:
        >>> outlier = Outliers(factor=2.0, quantile=0.5, window=3, max_consecutive=1)
        >>> [outlier(norm) for norm in (1.0, 9.0, 1.0, 3.0, 3.0, 1.5)]
        [False, False, False, True, False, False]
    """

    def __init__(self, factor: float | None, quantile: float, window: int, max_consecutive: int):
        self.factor = None if factor is None else positive("factor", factor)
        self.quantile, self.max_consecutive = share("quantile", quantile), max_consecutive
        self.norms: deque[float] = deque(maxlen=at_least(1, "window", window))
        self.skipped = 0

    def __call__(self, norm: float) -> bool:
        """Whether to skip the step of this norm; a step that is taken is remembered."""
        if not self._too_long(norm):
            self.skipped = 0
        elif self.skipped < self.max_consecutive:
            self.skipped += 1
            return True
        else:  # no outliers, a new level
            self.skipped = 0
            self.norms.clear()
        self.norms.append(norm)
        return False

    def _too_long(self, norm: float) -> bool:
        if self.factor is None or len(self.norms) < (self.norms.maxlen or 0):
            return False
        usual = torch.tensor(self.norms, dtype=torch.float64).quantile(self.quantile)
        return norm > self.factor * float(usual)


def decide(bad: Tensor, norm: Tensor) -> tuple[bool, float]:
    """The same answer on all ranks: whether the step is bad on any, and the largest norm.

    Args:
        bad: a boolean.
        norm: a scalar; what it is where the step is bad does not matter.
    """
    known = torch.where(norm.isfinite(), norm, torch.zeros_like(norm)).double()
    both = torch.stack([bad.to(known), known])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
    worst, length = both.tolist()
    return worst > 0, length


def from_the_cause(told: str, finite: bool) -> str:
    """What the first rank says whose own loss is not finite; gradients are those of all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return told
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (finite, dist.get_rank(), told))
    _, rank, told = min(every)
    return f"rank {rank}, {told}"


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """The 2-norm of all gradients together, a scalar."""
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [gradient for gradient in held if gradient is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())


def take_away(optimizer: Optimizer) -> None:
    """No gradients, so that the coming step changes neither a weight nor the optimizer's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
