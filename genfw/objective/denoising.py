r"""Objectives of diffusion models:

.. math:: \tfrac12 \int w(\lambda) \|\epsilon - \hat\epsilon\|^2 d\lambda,

estimated at one random time per example; w = 1 is the bound's own term. Two families, by the
measure in which a paper states its weight:

    per d lambda   w itself: the same loss, in the mean, for every schedule between the same ends
    per dt         w = weight / (-d lambda / dt): the schedule is half of the objective

| name    | weight on the eps error                      | per      |
|---------|----------------------------------------------|----------|
| simple  | 1                                            | dt       |
| min_snr | min(SNR, gamma) / SNR                        | dt       |
| p2      | (k + SNR)^-gamma                             | dt       |
| sigmoid | sigmoid(b - lambda)                          | d lambda |
| edm     | N(lambda; mean, std^2) (e^-lambda + s_d^2)   | d lambda |

They train no decoder p(x | z_0).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genfw.check import finite, not_negative, positive
from genfw.diffusion.denoising import Denoises, Denoising
from genfw.model import LatentModel
from genfw.noise import Draws
from genfw.objective.objective import Objective, fixed_schedule
from genfw.types import Image, Labels, Nats


class DenoisingObjective(Objective, ABC):
    """A weighted eps error."""

    @abstractmethod
    def weight(self, log_snr: Tensor) -> Tensor:
        """(b,) at these noise levels, (b,) float64."""

    @abstractmethod
    def measure(self, draw: Denoising) -> Tensor:
        """(b,) what the weight is stated per."""

    def check(self, model: LatentModel) -> None:
        self._denoising(model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        """Half the weighted error, (b,).

        Raises:
            TypeError: a model that does not denoise.
            ValueError: a schedule that learns: its gradient would have no meaning.
        """
        draw = self._denoising(model).denoising(x, y, noise=noise)
        weight = 0.5 * self.weight(draw.log_snr) * self.measure(draw)
        return (weight * draw.eps_error).to(draw.eps_error.dtype)

    def _denoising(self, model: LatentModel) -> Denoises:
        if not isinstance(model, Denoises):
            raise TypeError(
                f"{self.title} weighs a denoising error and "
                f"{type(model).__name__} has none: "
                "use objective=elbo, or a diffusion model"
            )
        fixed_schedule(self, model)
        return model


class PerLogSNR(DenoisingObjective):
    r"""w, as it stands in the integral over log SNR."""

    def measure(self, draw: Denoising) -> Tensor:
        return draw.measure


class PerTime(DenoisingObjective):
    r"""A weight of the mean over uniform t, whatever density t was drawn from."""

    def measure(self, draw: Denoising) -> Tensor:
        return draw.dt


class Simple(PerTime, name="simple"):
    r"""The unweighted eps error, :math:`\tfrac12 E_t \|\epsilon - \hat\epsilon\|^2`.

    1 per dt: :math:`w = 1 / (-d\lambda/dt)`.

    References:
        Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020,
        https://arxiv.org/abs/2006.11239.
    """

    def weight(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


class MinSnr(PerTime, name="min_snr"):
    r"""The x error weighted by SNR, but never by more than gamma.

    :math:`\min(\mathrm{SNR}, \gamma) / \mathrm{SNR}` per dt on the eps error, so that
    :math:`w = \min(\mathrm{SNR}, \gamma) / (\mathrm{SNR} \cdot (-d\lambda/dt))`.

    Raises:
        ValueError: gamma not positive.

    References:
        Efficient Diffusion Training via Min-SNR Weighting Strategy, Hang et al., 2023,
        https://arxiv.org/abs/2303.09556.
    """

    def __init__(self, gamma: float = 5.0):
        super().__init__()
        self.gamma = positive("gamma", gamma)

    def weight(self, log_snr: Tensor) -> Tensor:
        return (math.log(self.gamma) - log_snr).exp().clamp_max(1)

    def extra_repr(self) -> str:
        return f"min(SNR, {self.gamma:g}) / SNR per dt"


class P2(PerTime, name="p2"):
    r"""Less weight where little noise is left, and only details with it.

    :math:`(k + \mathrm{SNR})^{-\gamma}` per dt on the eps error, so that
    :math:`w = (k + \mathrm{SNR})^{-\gamma} / (-d\lambda/dt)`.

    Args:
        gamma: 0 is `simple`.
        k: what bounds the weight of pure noise, k^-gamma.

    Raises:
        ValueError: k not positive, or gamma negative.

    References:
        Perception Prioritized Training of Diffusion Models, Choi et al., 2022,
        https://arxiv.org/abs/2204.00227.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0):
        super().__init__()
        self.gamma, self.k = not_negative("gamma", gamma), positive("k", k)

    def weight(self, log_snr: Tensor) -> Tensor:
        return (self.k + log_snr.exp()) ** -self.gamma

    def extra_repr(self) -> str:
        return f"({self.k:g} + SNR)^-{self.gamma:g} per dt"


class SigmoidWeighted(PerLogSNR, name="sigmoid"):
    r""":math:`w(\lambda) = \mathrm{sigmoid}(b - \lambda)` per d lambda: the bound of noisy data.

    It falls with log SNR, so it is a mixture of bounds on the likelihood of z_t instead of x; b = 0
    is :math:`\sigma^2`.

    Args:
        bias: b, the log SNR at which half the weight is left.

    References:
        Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation, Kingma, Gao,
        2023, https://arxiv.org/abs/2303.00848.
    """

    def __init__(self, bias: float = 0.0):
        super().__init__()
        self.bias = finite("bias", bias)

    def weight(self, log_snr: Tensor) -> Tensor:
        return (self.bias - log_snr).sigmoid()

    def extra_repr(self) -> str:
        return f"w = sigmoid({self.bias:g} - log SNR)"


class EdmWeighted(PerLogSNR, name="edm"):
    r"""The objective of EDM, its weighting times its density of noise levels:

    .. math:: w(\lambda) = \mathcal{N}(\lambda; 2.4, 2.4^2) \, (e^{-\lambda} + s_d^2) \quad
        \text{per } d\lambda,

    since Karras et al. draw :math:`\ln\sigma \sim \mathcal{N}(-1.2, 1.2^2)`, with
    :math:`\lambda = -2 \ln\sigma`, and weigh :math:`\|x - \hat x\|^2 = \sigma^2 \|\epsilon -
    \hat\epsilon\|^2` by :math:`(\sigma^2 + s_d^2) / (\sigma s_d)^2`. Their loss is :math:`2 /
    s_d^2` times this one.

    Args:
        mean, std: of log SNR.
        data_std: s_d.

    Raises:
        ValueError: std or data_std not positive.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras, Aittala, Aila,
        Laine, 2022, https://arxiv.org/abs/2206.00364; as w: Understanding Diffusion Objectives as
        the ELBO with Simple Data Augmentation, Kingma, Gao, 2023,
        https://arxiv.org/abs/2303.00848.
    """

    def __init__(self, mean: float = 2.4, std: float = 2.4, data_std: float = 0.5):
        super().__init__()
        self.mean, self.std = finite("mean", mean), positive("std", std)
        self.data_std = positive("data_std", data_std)

    def weight(self, log_snr: Tensor) -> Tensor:
        error = (log_snr - self.mean) / self.std
        density = (-0.5 * error.square()).exp() / (self.std * math.sqrt(2 * math.pi))
        return density * ((-log_snr).exp() + self.data_std**2)

    def extra_repr(self) -> str:
        return f"w = N(log SNR; {self.mean:g}, {self.std:g}^2) (1 / SNR + {self.data_std:g}^2)"
