r"""The exponential moving average of a model's weights.

.. math:: \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n)\, \theta_n, \qquad
    d_n = \min\left(d, \frac{1 + n}{10 + n}\right), \quad n = 1, 2, \ldots \text{ optimizer steps}

The average is a second model, `module.average`, beside the trained one, `module.model`. Weights are
never swapped: an interrupted validation cannot mix them up, every checkpoint holds both under their
own names, and whoever loads one evaluates the same weights as the run that wrote it.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from genfw.train.module import LatentModule
from genfw.train.sharding import local


class EMA(L.Callback):
    """Keeps `module.average`, updated once per optimizer step, not per micro-batch.

    Args:
        decay: d in [0, 1): the average remembers about 1/(1 - d) steps, and fewer in the beginning.

    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.seen = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = _latent(pl_module)
        if module.average is None and stage == "fit":
            module.average = copy.deepcopy(module.model).requires_grad_(False).eval()

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.seen:
            return  # within an accumulation window
        self.seen = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        module = _latent(pl_module)
        assert module.average is not None  # by setup
        lerp_(module.average, module.model, 1 - decay)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore
            module.log("train/ema_decay", decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.seen = state_dict["updates"], state_dict["seen"]


def lerp_(average: nn.Module, model: nn.Module, weight: float) -> None:
    """average <- (1 - weight) average + weight model, in place; buffers, no weights, are copied."""
    kept, current = ([local(p) for p in each.parameters()] for each in (average, model))
    torch._foreach_lerp_(kept, current, weight)  # pyright: ignore
    for mine, current in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(current)


def _latent(module: L.LightningModule) -> LatentModule:
    if not isinstance(module, LatentModule):
        raise TypeError(f"EMA averages a LatentModule's model, got a {type(module).__name__}")
    return module
