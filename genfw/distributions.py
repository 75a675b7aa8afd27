r"""The distributions the bound is made of: diagonal normals for latents, masses on integers for
data.

Each is over one batch: the first axis counts examples, `log_prob` sums over all others and returns
nats, (b,). A mass on integers satisfies sum_k p(k) = 1 over its K values; a test adds them up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from genfw.noise import Draws, draws
from genfw.types import Nats


def per_example(x: Tensor) -> Nats:
    """Sum over every axis but the first: (b, ...) to (b,)."""
    return x.flatten(1).sum(1)


class Distribution(ABC):
    """A distribution for each example of a batch."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Its expectation, (b, ...)."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Nats:
        """log p(value), summed over dimensions: (b,) nats."""

    @abstractmethod
    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """One value per example. `noise` keys the draw by example; None is torch's global
        generator."""


class Normal(Distribution):
    r"""Independent normals, :math:`\mathcal{N}(\text{mean}, \text{std}^2)`.

    Args:
        mean: (b, ...).
        std: positive, broadcastable to `mean`.

    A density: its values are not comparable with masses.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self._mean, self.std = mean, std.expand_as(mean)

    @property
    def mean(self) -> Tensor:
        return self._mean

    def log_prob(self, value: Tensor) -> Nats:
        error = (value - self.mean) / self.std
        return per_example(-0.5 * (error.square() + math.log(2 * math.pi)) - self.std.log())

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """Reparameterized: mean + std * eps, differentiable in both."""
        return self.mean + self.std * draws(noise, self.mean).normal(purpose, self.mean)

    def kl(self, other: Normal) -> Nats:
        r"""KL(self || other) in closed form, (b,) nats."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return per_example(0.5 * (ratio.square() + shift.square() - 1) - ratio.log())


def normal_head(h: Tensor) -> Normal:
    """A network's output (b, 2 C, ...) as a normal over (b, C, ...): means, then log standard
    deviations.

    Log standard deviations are kept in [-9, 3]: beyond, a diverging network turns into infinities.
    """
    mean, log_std = h.chunk(2, dim=1)
    return Normal(mean, log_std.clamp(-9, 3).exp())


class Categorical(Distribution):
    """K-valued dimensions, each with its own logits.

    Args:
        logits: (b, K, *dims), the values along axis 1.
    """

    def __init__(self, logits: Tensor):
        self.log_probs = logits.log_softmax(1)

    def log_prob(self, value: Tensor) -> Nats:
        return per_example(self.log_probs.gather(1, value.long().unsqueeze(1)))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """Integers (b, *dims), by inverting the cumulative masses."""
        cdf = self.log_probs.exp().cumsum(1)
        u = draws(noise, cdf).uniform(purpose, cdf[:, 0])
        return (u.unsqueeze(1) * cdf[:, -1:] >= cdf[:, :-1]).sum(1)

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, *dims)."""
        k = torch.arange(self.log_probs.shape[1], device=self.log_probs.device)
        return torch.einsum("bk...,k->b...", self.log_probs.exp(), k.to(self.log_probs))


class Bernoulli(Distribution):
    """Two-valued dimensions. Args: logits (b, *dims) of the value 1."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def log_prob(self, value: Tensor) -> Nats:
        sign = 2 * value.to(self.logits) - 1
        return per_example(F.logsigmoid(sign * self.logits))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        return (draws(noise, self.logits).uniform(purpose, self.logits) < self.mean).long()

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()


class BinSoftmax(Distribution):
    r"""Softmax over K bin centres v_k by their distance from a point.

    .. math:: p(k) \propto \exp(-\tfrac12 (\text{where} - v_k)^2 / \text{width}^2), \quad v_k = (2k
    + 1)/K - 1

    Summed over a window of bins around `where` that holds all but 1e-20 of the mass, so that no
    (b, D, K) tensor is built where a few bins suffice.

    Args:
        where: (b, ...) on the scale of normalized data.
        width: positive, broadcastable to `where`.
        bins: K.
    """

    reach = 10.0  # standard deviations: exp(-10^2 / 2) = 2e-22

    def __init__(self, where: Tensor, width: Tensor, bins: int):
        self.where, self.width, self.bins = where, width, bins

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, ...)."""
        k, log_mass = self._window()
        return (k * log_mass.softmax(-1)).sum(-1)

    def log_prob(self, value: Tensor) -> Nats:
        _, log_mass = self._window()
        return per_example(self._energy(value.to(self.where)) - log_mass.logsumexp(-1))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        k, log_mass = self._window()
        choice = Categorical(log_mass.movedim(-1, 1)).sample(noise, purpose)
        return k.gather(-1, choice.unsqueeze(-1)).squeeze(-1).long()

    def _window(self) -> tuple[Tensor, Tensor]:
        """The bins near `where`, (b, ..., W), and their unnormalized log masses; no (b, D, K)
        tensor."""
        half = int(self.reach * float(self.width.max()) * self.bins / 2) + 1
        if 2 * half + 1 >= self.bins:
            k = torch.arange(self.bins, device=self.where.device, dtype=self.where.dtype)
            k = k.expand(*self.where.shape, -1)
        else:
            nearest = ((self.where + 1) * self.bins / 2 - 0.5).round()
            nearest = nearest.clamp(half, self.bins - 1 - half)
            step = torch.arange(-half, half + 1, device=nearest.device, dtype=nearest.dtype)
            k = nearest.unsqueeze(-1) + step
        return k, self._energy(k)

    def _energy(self, k: Tensor) -> Tensor:
        """-(where - v_k)^2 / (2 width^2) for k of shape (b, ...) or (b, ..., W)."""
        where, width = self.where, self.width.expand_as(self.where)
        if k.ndim > where.ndim:
            where, width = where.unsqueeze(-1), width.unsqueeze(-1)
        return -0.5 * ((where - (2 * k + 1) / self.bins + 1) / width).square()


class DiscretizedNormal(Distribution):
    r"""The mass a normal puts on each of K bins; the end bins reach to infinity.

    .. math:: p(k) = \Phi\left(\frac{r_k - \mu}{s}\right) - \Phi\left(\frac{l_k - \mu}{s}\right),
        \quad l_k = 2k/K - 1, \; r_k = l_k + 2/K, \; l_0 = -\infty, \; r_{K-1} = \infty

    Args:
        where: (b, ...) mu, on the scale of normalized data, (-1, 1).
        width: s, positive, broadcastable to `where`.
        bins: K.

    The difference is taken in whichever tail is the smaller, in log space and float64, so that a
    value many standard deviations away, or a bin much narrower than one, still has its exact log
    mass and a gradient.

    References:
        Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020,
        https://arxiv.org/abs/2006.11239.
    """

    def __init__(self, where: Tensor, width: Tensor, bins: int):
        self.where, self.width, self.bins = where, width.expand_as(where), bins

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, ...): the sum over k of P(x >= k)."""
        edges = 2 * torch.arange(1, self.bins, device=self.where.device) / self.bins - 1
        gap = (self.where.unsqueeze(-1) - edges.to(self.where)) / self.width.unsqueeze(-1)
        return torch.special.ndtr(gap).sum(-1)

    def log_prob(self, value: Tensor) -> Nats:
        k, where, width = value.double(), self.where.double(), self.width.double()
        left = (2 * k / self.bins - 1 - where) / width
        right = (2 * (k + 1) / self.bins - 1 - where) / width
        left = torch.where(k == 0, -torch.inf, left)
        right = torch.where(k == self.bins - 1, torch.inf, right)
        return per_example(_log_normal_mass(left, right)).to(self.where.dtype)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        z = self.where + self.width * draws(noise, self.where).normal(purpose, self.where)
        return ((z + 1) * self.bins / 2).floor().clamp(0, self.bins - 1).long()


def _log_normal_mass(left: Tensor, right: Tensor) -> Tensor:
    """log(Phi(right) - Phi(left)) for left < right, ends may be infinite; accurate in both
    tails."""
    flip = left + right > 0  # work in the lower tail, where log_ndtr is exact
    low, high = torch.where(flip, -right, left), torch.where(flip, -left, right)
    log_high = torch.special.log_ndtr(high)
    bounded = low.isfinite()
    # The difference of two log cdfs; the inner `where` keeps inf out of the gradient.
    gap = torch.special.log_ndtr(torch.where(bounded, low, high - 1.0)) - log_high
    return log_high + torch.where(bounded, _log1mexp(gap), 0.0)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    small = x > -math.log(2)
    inner = torch.where(small, x, -1.0)
    outer = torch.where(small, -1.0, x)
    return torch.where(small, (-torch.expm1(inner)).log(), torch.log1p(-outer.exp()))
