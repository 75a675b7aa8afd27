r"""Objectives of diffusion models:

.. math:: \tfrac12 \int w(\lambda) \|\epsilon - \hat\epsilon\|^2 d\lambda,

estimated at one random time per example; each docstring states its w and its measure.
"""

from __future__ import annotations

from genfw.diffusion.denoising import Denoises, Denoising
from genfw.model import LatentModel
from genfw.noise import Draws
from genfw.objective.objective import Objective
from genfw.types import Image, Labels, Nats


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
        return (0.5 * draw.dt * draw.eps_error).to(draw.eps_error.dtype)


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
