"""What is minimised: the interface, and the bound itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from genfw.model import LatentModel
from genfw.noise import Draws
from genfw.registry import Registered
from genfw.types import Image, Labels, Nats


class Objective(Registered, nn.Module, ABC, group="objective"):
    """A loss per example.

    Attributes:
        step: optimizer steps taken so far; None until `advance` tells.
    """

    step: int | None = None

    def check(self, model: LatentModel) -> None:
        """Says, before anything is computed, whether this model can be trained so.

        Raises:
            TypeError, ValueError: it cannot, in one sentence with what can be.
        """

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

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        return -model.elbo(x, y, noise=noise).total
