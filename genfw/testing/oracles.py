r"""Data whose denoiser, score and density at every noise level are known exactly, and a hierarchy
whose evidence is.

With z = alpha x + sigma eps, log p_t(z) is that of the data's law convolved with the noise.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.diffusion.denoiser import Denoiser
from genfw.distributions import Distribution, Normal
from genfw.elbo import ELBO
from genfw.likelihood import GaussianLikelihood
from genfw.model import MarkovianHierarchy
from genfw.noise import Draws
from genfw.parameterization import Prediction
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Image, Labels, Nats, Time


class Oracle(Denoiser):
    """E[x | z_t], exactly, along any schedule."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def expected(self, z: Data, alpha: Tensor, sigma: Tensor, y: Labels | None) -> Data:
        """E[x | z], (b, ...)."""

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        alpha, sigma = self.amplitudes(z, t)
        x = self.expected(z, alpha, sigma, y)
        return Prediction(x, (z - alpha * x) / sigma, alpha, sigma)

    def amplitudes(self, z: Data, t: Time) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (b, 1, ...)."""
        log_snr = self.schedule.log_snr(t).to(z.device).expand(len(z))
        return broadcast(log_snr.sigmoid().sqrt(), z), broadcast((-log_snr).sigmoid().sqrt(), z)


class GaussianDenoiser(Oracle):
    """Of data N(mean + y, std^2), dimensions independent; without labels y is 0.

    x_hat = (alpha s^2 z + sigma^2 m) / (alpha^2 s^2 + sigma^2).
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor | float, std: Tensor | float):
        super().__init__(schedule)
        self.mean, self.std = mean, std

    def expected(self, z: Data, alpha: Tensor, sigma: Tensor, y: Labels | None) -> Data:
        mean = self.mean if y is None else self.mean + broadcast(y, z)
        var = self.std**2
        return (alpha * var * z + sigma**2 * mean) / (alpha**2 * var + sigma**2)

    def log_density(self, z: Data, t: Time) -> Nats:
        """log p_t(z) without labels, (b,)."""
        alpha, sigma = self.amplitudes(z, t)
        var = alpha**2 * self.std**2 + sigma**2
        terms = (z - alpha * self.mean) ** 2 / var + (2 * math.pi * var).log()
        return -0.5 * terms.flatten(1).sum(1)


class MixtureDenoiser(Oracle):
    """Of an even mixture of N(mean_k, std^2 I), means (k, ...)."""

    def __init__(self, schedule: NoiseSchedule, means: Tensor, std: float):
        super().__init__(schedule)
        self.means, self.std = means, std

    def expected(self, z: Data, alpha: Tensor, sigma: Tensor, y: Labels | None) -> Data:
        var = self.std**2
        share = self._log_parts(z, alpha, sigma).softmax(1)
        mean = torch.einsum("bk,k...->b...", share, self.means.to(z))
        return (alpha * var * z + sigma**2 * mean) / (alpha**2 * var + sigma**2)

    def log_density(self, z: Data, t: Time) -> Nats:
        """log p_t(z), (b,)."""
        alpha, sigma = self.amplitudes(z, t)
        var = (alpha**2 * self.std**2 + sigma**2).flatten()
        constant = -0.5 * z[0].numel() * (2 * math.pi * var).log()
        return constant + self._log_parts(z, alpha, sigma).logsumexp(1) - math.log(len(self.means))

    def _log_parts(self, z: Data, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log N(z; alpha mean_k, var) without its constant, (b, k)."""
        var = (alpha**2 * self.std**2 + sigma**2).view(-1, 1)
        gap = z.unsqueeze(1) - alpha.unsqueeze(1) * self.means.to(z)
        return -0.5 * (gap**2).flatten(2).sum(2) / var


class FiniteDenoiser(MixtureDenoiser):
    """Of a finite data set (n, ...): a softmax-weighted mean of its points."""

    def __init__(self, schedule: NoiseSchedule, points: Tensor):
        super().__init__(schedule, points, 0.0)


def gaussian_log_prob(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Nats:
    """log N(x; mean, std^2), summed over dimensions, (b,)."""
    error = (x - mean) / std
    terms = -0.5 * error**2 - torch.as_tensor(std).log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


class LinearGaussianChain(MarkovianHierarchy):
    """p(z_T) = N(0, 1), p(z_{t-1} | z_t, y) = N(a z_t + y, s^2) in every dimension: the evidence is
    known exactly. Without labels y is 0.

    `bias` and `stretch` bend the encoder away from the true posterior; with the defaults it is
    exact.
    """

    dims: int = 2

    def __init__(
        self,
        levels: int,
        dims: int = 2,
        a: float = 0.8,
        s: float = 0.7,
        bias: float = 0.0,
        stretch: float = 1.0,
    ):
        super().__init__()
        self.levels, self.dims, self.a, self.s = levels, dims, a, s
        self.bias, self.stretch = bias, stretch
        self.likelihood = GaussianLikelihood()
        self.var = [1.0]  # of z_T, then down to x
        for _ in range(levels):
            self.var.append(a**2 * self.var[-1] + s**2)
        self.var.reverse()

    def prior(self, n: int) -> Distribution:
        return Normal(torch.zeros(n, self.dims), torch.ones(()))

    def mean(self, t: int, y: Labels | None) -> Tensor | float:
        """E[z_t | y], (b, 1)."""
        told = sum(self.a**i for i in range(self.levels - t))
        return 0.0 if y is None else told * y.double()[:, None]

    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        gain = self.a * self.var[t] / self.var[t - 1]
        std = (self.var[t] - gain**2 * self.var[t - 1]) ** 0.5
        mean = self.mean(t, y) + gain * (z - self.mean(t - 1, y))
        return Normal(mean + self.bias, torch.as_tensor(std * self.stretch))

    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        told = 0.0 if y is None else y.double()[:, None]
        return Normal(self.a * z + told, torch.as_tensor(self.s))

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        return self.ancestral_elbo(x, y, noise=noise)

    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        return self.ancestral_sample(n, y, noise=noise)

    def log_prob(self, x: Image, y: Labels | None = None) -> Nats:
        """log p(x | y), (b,)."""
        return gaussian_log_prob(x, self.mean(0, y), self.var[0] ** 0.5)
