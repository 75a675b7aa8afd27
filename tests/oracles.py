"""Data whose answer is known exactly."""

import math

import torch

from genfw import Denoiser, Distribution
from genfw.noise import draws
from genfw.testing.oracles import FiniteDenoiser as FiniteDenoiser
from genfw.testing.oracles import GaussianDenoiser as GaussianDenoiser
from genfw.testing.oracles import LinearGaussianChain as LinearGaussianChain
from genfw.testing.oracles import gaussian_log_prob as gaussian_log_prob


class Mixture(Distribution):
    """An even mixture of K normals, for each of n examples. means (K, *dims), std (K,)."""

    def __init__(self, means, std, n):
        self.means, self.std, self.n = means, std, n

    @property
    def mean(self):
        return self.means.mean(0).expand(self.n, *self.means.shape[1:])

    def log_prob(self, value):
        parts = [gaussian_log_prob(value, m, s) for m, s in zip(self.means, self.std, strict=True)]
        return torch.stack(parts, 1).logsumexp(1) - math.log(len(self.std))

    def sample(self, noise=None, purpose="sample"):
        noise = draws(noise, self.mean)
        u = noise.uniform("component", self.mean.flatten(1)[:, 0])
        k = (u * len(self.std)).long()
        std = self.std[k].view(-1, *[1] * (self.means.ndim - 1))
        return self.means[k] + std * noise.normal(purpose, self.mean)


class LinearDenoiser(Denoiser):
    """A denoiser through a parameterization, whose network knows the exact answer for Gaussian
    data."""

    def __init__(self, schedule, parameterization, mean, std):
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization
        self.exact = GaussianDenoiser(schedule, mean, std)

    def forward(self, z, t, y=None):
        truth = self.exact(z, t, y)
        target = self.parameterization.target(truth.x, truth.eps, truth.alpha, truth.sigma)
        output = target / self.parameterization.scale(truth.alpha, truth.sigma)
        return self.parameterization.solve(output, z, truth.alpha, truth.sigma)
