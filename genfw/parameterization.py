r"""Parameterizations: what the network's output means.

A latent is :math:`z = \alpha x + \sigma \epsilon`. A network may predict any combination of x and
eps; given z they all say the same. A linear parameterization is a change of coordinates,

.. math:: \text{target} = a x + b \epsilon, \qquad \Delta = \alpha b - \sigma a, \qquad
    \hat x = (b z - \sigma\, \text{target}) / \Delta, \quad
    \hat\epsilon = (\alpha\, \text{target} - a z) / \Delta,

so a new one is one line:

    class Flow(LinearParameterization, name="flow"):
        def coefficients(self, alpha, sigma):
            return -1.0, 1.0

| name  | (a, b)          | Luo            |
|-------|-----------------|----------------|
| x0    | (1, 0)          | (94)           |
| eps   | (0, 1)          | (115), (130)   |
| score | (0, -1 / sigma) | (133)          |
| v     | (-sigma, alpha) | Salimans & Ho  |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from genfw.registry import Registered
from genfw.types import Data

Coefficient: TypeAlias = "Tensor | float"


@dataclass(frozen=True)
class Prediction:
    r"""What a denoiser says of z = alpha x + sigma eps, in all coordinates at once.

    Attributes:
        x: (b, ...) the expected data, E[x | z].
        eps: (b, ...) the expected noise; z = alpha x + sigma eps holds.
        alpha, sigma: amplitudes, broadcastable to x.
    """

    x: Data
    eps: Data
    alpha: Tensor
    sigma: Tensor

    @property
    def score(self) -> Data:
        r"""The gradient of log p_t at z, :math:`-\hat\epsilon / \sigma`: Tweedie, Luo (133)."""
        return -self.eps / self.sigma

    @property
    def v(self) -> Data:
        r"""The velocity :math:`\alpha \hat\epsilon - \sigma \hat x` (Salimans & Ho 2022)."""
        return self.alpha * self.eps - self.sigma * self.x


class Parameterization(Registered, nn.Module, ABC, group="param"):
    """From a network's output to a `Prediction`."""

    @abstractmethod
    def solve(self, output: Tensor, z: Data, alpha: Tensor, sigma: Tensor) -> Prediction:
        """Reads the network's output (b, channels, ...) at the latent z (b, C, ...).

        alpha and sigma are (b,), scalars, or already broadcastable to z.
        """

    def channels(self, data_channels: int, bins: int | None) -> int:
        """How many output channels the network needs."""
        return data_channels

    def scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        """target = scale * network output; chosen so that the output is O(1) at every noise
        level."""
        return 1.0


class LinearParameterization(Parameterization):
    """target = a x + b eps, see the page above."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        """(a, b) at these amplitudes."""

    def target(self, x: Data, eps: Data, alpha: Tensor, sigma: Tensor) -> Data:
        """What a perfect network, times `scale`, would output."""
        a, b = self.coefficients(broadcast(alpha, x), broadcast(sigma, x))
        return a * x + b * eps

    def solve(self, output: Tensor, z: Data, alpha: Tensor, sigma: Tensor) -> Prediction:
        """The 2x2 solve: x and eps from the target and z.

        Raises:
            ValueError: the output has another shape than z.
        """
        if output.shape != z.shape:
            raise ValueError(
                f"{type(self).__name__} reads an output of the latent's shape {tuple(z.shape)}, "
                f"got {tuple(output.shape)}"
            )
        alpha, sigma = broadcast(alpha, z), broadcast(sigma, z)
        a, b = self.coefficients(alpha, sigma)
        target = self.scale(alpha, sigma) * output
        delta = alpha * b - sigma * a
        x = (b * z - sigma * target) / delta
        eps = (alpha * target - a * z) / delta
        return Prediction(x, eps, alpha, sigma)


def broadcast(amplitude: Tensor | float, like: Tensor) -> Tensor:
    """(b,) or a scalar, made broadcastable to (b, ...)."""
    amplitude = torch.as_tensor(amplitude, device=like.device)
    if amplitude.ndim == 1:
        amplitude = amplitude.reshape(-1, *[1] * (like.ndim - 1))
    return amplitude.to(like.dtype)


class Eps(LinearParameterization, name="eps"):
    """The noise. Luo (115), (130)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, 1.0


class X0(LinearParameterization, name="x0"):
    """The data. Luo (94)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0


class Score(LinearParameterization, name="score"):
    """The score -eps / sigma. Luo (133).

    Args:
        raw: False, the network's output is divided by sigma (then it is -eps, of order one at
            every level); True, the network must output the score itself, which trains worse near t
            = 0.
    """

    def __init__(self, raw: bool = False):
        super().__init__()
        self.raw = raw

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, -1.0 / sigma

    def scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        return 1.0 if self.raw else 1.0 / sigma

    def extra_repr(self) -> str:
        return f"raw={self.raw}"


class V(LinearParameterization, name="v"):
    """The velocity alpha eps - sigma x.

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models, Salimans, Ho, 2022,
        https://arxiv.org/abs/2202.00512.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -sigma, alpha
