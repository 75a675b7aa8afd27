"""Data whose answer is known exactly."""

import math

import torch

from genfw import Denoiser, Distribution, GaussianLikelihood, MarkovianHierarchy, Normal
from genfw.noise import draws
from genfw.testing.oracles import FiniteDenoiser as FiniteDenoiser
from genfw.testing.oracles import GaussianDenoiser as GaussianDenoiser


def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2), summed over dimensions, (b,)."""
    error = (x - mean) / std
    terms = -0.5 * error**2 - torch.as_tensor(std).log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


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


class LinearGaussianChain(MarkovianHierarchy):
    """p(z_T) = N(0, 1), p(z_{t-1} | z_t, y) = N(a z_t + y, s^2) in every dimension: the evidence is
    known exactly. Without labels y is 0.

    `bias` and `stretch` bend the encoder away from the true posterior; with the defaults it is
    exact.
    """

    def __init__(self, levels, dims=2, a=0.8, s=0.7, bias=0.0, stretch=1.0):
        super().__init__()
        self.levels, self.dims, self.a, self.s = levels, dims, a, s
        self.bias, self.stretch = bias, stretch
        self.likelihood = GaussianLikelihood()
        self.var = [1.0]  # of z_T, then down to x
        for _ in range(levels):
            self.var.append(a**2 * self.var[-1] + s**2)
        self.var.reverse()

    def prior(self, n):
        return Normal(torch.zeros(n, self.dims), torch.ones(()))

    def mean(self, t, y):
        """E[z_t | y], (b, 1)."""
        told = sum(self.a**i for i in range(self.levels - t))
        return 0.0 if y is None else told * y.double()[:, None]

    def encode(self, z, t, y=None):
        gain = self.a * self.var[t] / self.var[t - 1]
        std = (self.var[t] - gain**2 * self.var[t - 1]) ** 0.5
        mean = self.mean(t, y) + gain * (z - self.mean(t - 1, y))
        return Normal(mean + self.bias, torch.as_tensor(std * self.stretch))

    def decode(self, z, t, y=None):
        told = 0.0 if y is None else y.double()[:, None]
        return Normal(self.a * z + told, torch.as_tensor(self.s))

    def elbo(self, x, y=None, *, noise=None):
        return self.ancestral_elbo(x, y, noise=noise)

    def sample(self, n, y=None, *, noise=None):
        return self.ancestral_sample(n, y, noise=noise)

    def log_prob(self, x, y=None):
        return gaussian_log_prob(x, self.mean(0, y), self.var[0] ** 0.5)
