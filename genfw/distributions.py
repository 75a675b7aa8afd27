r"""The distributions the bound is made of: diagonal normals for latents, free masses on integers
for data (those that are cut out of a density: discretized.py).

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


def precision() -> torch.dtype:
    """What is computed in where nobody says otherwise: torch's default dtype, float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, as is needed of what is summed over thousands of dimensions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shaped(value: Tensor, like: Tensor) -> Tensor:
    """`value` (b, *dims), which is asked of a distribution over `like`'s dims; one of the two may
    be of one row, which then stands for all.

    Raises:
        ValueError: it has others. Shapes that differ could broadcast, and count a value several
            times.
    """
    if value.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"x: expected examples of shape {tuple(like.shape[1:])}, which the distribution is "
            f"over, got {tuple(value.shape[1:])}: give both the same axes"
        )
    if len(value) != len(like) and 1 not in (len(value), len(like)):
        raise ValueError(
            f"x: expected {len(like)} examples, as the distribution has, or one, got {len(value)}"
        )
    return value


def in_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All with as many rows as the others, those of one row repeated (no copy)."""
    n = next((len(each) for each in tensors if len(each) != 1), 1)
    return tuple(each.expand(n, *each.shape[1:]) for each in tensors)


def unrepeated(x: Tensor) -> Tensor:
    """x, or its first row where all are that one in memory (`expand`): broadcastable to x, and no
    work is done twice."""
    return x[:1] if len(x) > 1 and x.stride(0) == 0 else x


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

    A density: its values are not comparable with masses. A subclass may draw and weigh by itself:
    where its `log_prob` is its own, so is its divergence, in closed form if it has a `kl` too.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self._mean, self._std = mean, std

    @property
    def plain(self) -> bool:
        """Whether its density is that of a normal."""
        return type(self).log_prob is Normal.log_prob

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def std(self) -> Tensor:
        """Its standard deviation, (b, ...)."""
        return self._std.expand_as(self._mean)

    def log_prob(self, value: Tensor) -> Nats:
        mean, std = wide(self._mean), wide(self._std)
        error = (shaped(value, mean) - mean) / std
        log_scale = unrepeated(std.expand_as(mean)).log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * per_example(error.square()) - per_example(log_scale)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """Reparameterized: mean + std * eps, differentiable in both."""
        return self.mean + self.std * draws(noise, self.mean).normal(purpose, self.mean)

    def kl(self, other: Normal) -> Nats:
        r"""KL(self || other) in closed form, (b,) nats; in float64: near equals leave little.

        Raises:
            TypeError: one of the two has a density of its own.
        """
        _normals(self, other)
        ratio = self.std.double() / other.std
        shift = (self.mean.double() - other.mean) / other.std
        kl = per_example(0.5 * (ratio.square() + shift.square() - 1) - ratio.log())
        return kl.to(torch.promote_types(wide(self.mean).dtype, other.mean.dtype))

    def kl_by_dimension(self, other: Normal) -> Tensor:
        """KL(self || other) of each of its D dimensions, (b, D) nats, which add up to `kl`.

        Raises:
            TypeError: one of the two has a density of its own.
        """
        _normals(self, other)
        kl = self.by_dimension().kl(other.by_dimension())
        return kl.view_as(self.mean).flatten(1)

    def by_dimension(self) -> Normal:
        """Its D dimensions, of which each example's stand side by side, as b D normals over one."""
        return Normal(self.mean.reshape(-1, 1), self.std.reshape(-1, 1))


def divergence_by_dimension(q: Normal, p: Distribution) -> Tensor:
    """KL(q || p) of each of D dimensions, (b, D) nats; nan where p is no Normal, or one of the two
    has a density of its own: dimensions may then depend on each other."""
    if isinstance(p, Normal) and p.plain and q.plain:
        return q.kl_by_dimension(p)
    return torch.full_like(q.mean.flatten(1), torch.nan)


def _normals(*given: Normal) -> None:
    """Refuses those whose density is their own."""
    for each in given:
        if not each.plain:
            raise TypeError(
                f"a {type(each).__name__} has a density of its own, and divergences in closed form "
                "are those of normals"
            )


def divergence(q: Normal, p: Distribution, z: Tensor) -> Nats:
    """KL(q || p), (b,) nats: in closed form where it is known, of two normals or by q's own `kl` to
    one; otherwise log q(z) - log p(z) at z from q, unbiased, which may be negative. Of normals in
    float64: near equals leave little."""
    stated = q.plain or type(q).kl is not Normal.kl
    if stated and isinstance(p, Normal) and p.plain:
        return q.kl(p)
    exact = Normal(q.mean.double(), q.std.double()) if q.plain else q
    return (exact.log_prob(z) - p.log_prob(z)).to(wide(q.mean).dtype)


def scale_of(log_scale: Tensor) -> Tensor:
    """A network's log scale, or log standard deviation, as a positive number: kept in [-9, 3],
    beyond which a diverging network turns into infinities."""
    return log_scale.clamp(-9, 3).exp()


def normal_head(h: Tensor) -> Normal:
    """A network's output (b, 2 C, ...) as a normal over (b, C, ...): means, then log standard
    deviations (`scale_of`)."""
    mean, log_std = h.chunk(2, dim=1)
    return Normal(mean, scale_of(log_std))


class Categorical(Distribution):
    """K-valued dimensions, each with its own logits.

    Args:
        logits: (b, K, *dims), the values along axis 1.
    """

    def __init__(self, logits: Tensor):
        self.log_probs = wide(logits).log_softmax(1)

    def log_prob(self, value: Tensor) -> Nats:
        value = shaped(value, self.log_probs[:, 0]).long().unsqueeze(1)
        value, log_probs = in_rows(value, self.log_probs)
        return per_example(log_probs.gather(1, value))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """Integers (b, *dims), by inverting the cumulative masses."""
        masses = self.log_probs.exp()
        return inverse_cdf(masses, draws(noise, masses).uniform(purpose, masses[:, 0]))

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, *dims)."""
        k = torch.arange(self.log_probs.shape[1], device=self.log_probs.device)
        k = k.to(self.log_probs).view(-1, *[1] * (self.log_probs.ndim - 2))
        return (self.log_probs.exp() * k).sum(1)  # no product of matrices: autocast rounds those


def inverse_cdf(masses: Tensor, u: Tensor) -> Tensor:
    """The integers at quantiles u (b, *dims) of masses (b, K, *dims) that need not sum to one."""
    cdf = masses.cumsum(1)
    return (u.unsqueeze(1) * cdf[:, -1:] >= cdf[:, :-1]).sum(1)


class Bernoulli(Distribution):
    """Two-valued dimensions. Args: logits (b, *dims) of the value 1."""

    def __init__(self, logits: Tensor):
        self.logits = wide(logits)

    def log_prob(self, value: Tensor) -> Nats:
        value = shaped(value, self.logits)
        value = unrepeated(value) if len(value) == len(self.logits) else value
        sign = 2 * value.to(self.logits) - 1
        return per_example(F.logsigmoid(sign * self.logits))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        return (draws(noise, self.logits).uniform(purpose, self.logits) < self.mean).long()

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()
