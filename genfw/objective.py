r"""Objectives: what is minimised. Never what is reported.

The bound (`ELBO`) is a statement about log p(x); an objective may weigh, clip or bend it in any
way that trains well. Reported numbers come from `genfw.estimators`, which do not know objectives.

A diffusion objective is :math:`\tfrac12 \int w(\lambda) \|\epsilon - \hat\epsilon\|^2 d\lambda`,
estimated at one random time per example; each docstring states its w and its measure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from genfw.diffusion.denoising import Denoises, Denoising
from genfw.model import LatentModel
from genfw.noise import Draws
from genfw.registry import Registered
from genfw.types import Image, Labels, Nats


class Objective(Registered, nn.Module, ABC, group="objective"):
    """A loss per example."""

    @abstractmethod
    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        """(b,) to be minimised in the mean. x: (b, *shape) integers."""


class Elbo(Objective, name="elbo"):
    """The negative bound itself, w = 1 in the measure d lambda."""

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        return -model.elbo(x, y, noise=noise).total


class Simple(Objective, name="simple"):
    r"""The unweighted eps error, :math:`\tfrac12 E_t \|\epsilon - \hat\epsilon\|^2`, times drawn
    through the schedule.

    A weight per dt: it implies :math:`w = 1 / (-d\lambda/dt)` and so depends on the schedule's
    shape. No decoder is trained by it.

    References:
        Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020,
        https://arxiv.org/abs/2006.11239.
    """

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        draw = _denoising(self, model, x, y, noise)
        return (0.5 * draw.measure / draw.slope * draw.eps_error).to(draw.eps_error.dtype)


def _denoising(
    objective: Objective, model: LatentModel, x: Image, y: Labels | None, noise: Draws | None
) -> Denoising:
    if not isinstance(model, Denoises):
        raise TypeError(
            f"objective={objective.name} weighs a denoising error and "
            f"{type(model).__name__} has none: "
            "use objective=elbo, or a diffusion model"
        )
    return model.denoising(x, y, noise=noise)
