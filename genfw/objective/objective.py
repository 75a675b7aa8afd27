"""What is minimised: the interface, and the bound itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from genfw.model import LatentModel
from genfw.noise import Draws
from genfw.registry import Registered
from genfw.schedule import NoiseSchedule
from genfw.types import Image, Labels, Nats


class Objective(Registered, nn.Module, ABC, group="objective"):
    """A loss per example.

    Attributes:
        step: optimizer steps taken so far; None until `advance` tells.
        bound: True where its mean is no less than -log p(x), and near it where the encoder is the
            true posterior. Only such a one trains a learned schedule.
        surrogate: True where its gradient is not the derivative of its value at the draws, but one
            of the same mean.
        batchwise: True where an example's number depends on the others of its batch.

    The laws in `genfw.testing` hold the last three to their word.
    """

    step: int | None = None
    bound: bool = False
    surrogate: bool = False
    batchwise: bool = False

    def check(self, model: LatentModel) -> None:
        """Says, before anything is computed, whether this model can be trained so: with a learned
        schedule only by a `bound`, which a run asks beside a subclass's own check.

        Raises:
            TypeError, ValueError: it cannot, in one sentence with what can be.
        """
        if not self.bound:
            fixed_schedule(self, model)

    @property
    def title(self) -> str:
        """What messages call it: as it is chosen, or its class where that has no name."""
        name = self.called()
        return f"objective={name}" if name in self.registry else name

    @abstractmethod
    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        """(b,) to be minimised in the mean. x: (b, *shape) integers."""

    def advance(self, step: int) -> None:
        """Told before each training step how many optimizer steps came before it."""
        self.step = step


class Elbo(Objective, name="elbo"):
    """The negative bound itself; of a diffusion model, w = 1 in the measure d lambda."""

    bound = True

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        return -model.elbo(x, y, noise=noise).total


def told_the_step(objective: Objective) -> None:
    """Refuses to guess.

    Raises:
        ValueError: `advance` has told no step.
    """
    if objective.step is None:
        raise ValueError(
            f"{objective.title} depends on the training step and was not told it: "
            "call objective.advance(step) before each optimizer step"
        )


def fixed_schedule(objective: Objective, model: LatentModel) -> None:
    """Refuses to train a learned schedule by what is not the bound.

    Raises:
        ValueError: the model's schedule learns.
    """
    learned = any(each.learns for each in model.modules() if isinstance(each, NoiseSchedule))
    if learned and torch.is_grad_enabled():
        raise ValueError(
            f"{objective.title} says nothing of a learned schedule, which follows the "
            "bound: use objective=elbo, or a fixed schedule"
        )
