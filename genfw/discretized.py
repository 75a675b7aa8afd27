r"""Masses on the integers 0..K-1 that come from a density on the real line.

The bins of normalized data lie side by side on (-1, 1): bin k reaches from :math:`l_k = 2k/K - 1`
to :math:`r_k = l_k + 2/K`, and its centre is :math:`v_k = (2k + 1)/K - 1`. A discretized density
puts on k what it has between the edges; bin 0 reaches down to minus infinity and bin K - 1 up to
infinity, and no other bin does, so that the K masses sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genfw.distributions import Categorical, Distribution, per_example, shaped, wide
from genfw.noise import Draws, draws
from genfw.types import Nats


class BinSoftmax(Distribution):
    r"""Softmax over K bin centres v_k by their distance from a point.

    .. math:: p(k) \propto \exp(-\tfrac12 (\text{where} - v_k)^2 / \text{width}^2), \quad v_k = (2k
    + 1)/K - 1

    Summed over a window of bins around `where` that holds all but 1e-20 of the mass, so that no
    (b, D, K) tensor is built where a few bins suffice. Energies are relative to that of the nearest
    bin n, so that no large squares cancel: with d = where - v_n and j = k - n,

    .. math:: \log p(k) - \log p(n) = \frac{2 j}{K} \left(d - \frac{j}{K}\right) / \text{width}^2

    Args:
        where: (b, ...) on the scale of normalized data.
        width: positive, broadcastable to `where`.
        bins: K.
    """

    reach = 10.0  # standard deviations: exp(-10^2 / 2) = 2e-22

    def __init__(self, where: Tensor, width: Tensor, bins: int):
        where, width = wide(where), wide(width)
        self.where, self.width, self.bins = where, width, bins
        self.nearest = ((where.detach() + 1) * bins / 2 - 0.5).round().clamp(0, bins - 1)
        centre = (2 * self.nearest.double() + 1) / bins - 1
        self.away = (where.double() - centre).to(where.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, ...)."""
        k, log_mass = self._window()
        return (k * log_mass.softmax(-1)).sum(-1)

    def log_prob(self, value: Tensor) -> Nats:
        _, log_mass = self._window()
        k = shaped(value, self.where).to(self.where)
        return per_example(self._log_ratio(k) - log_mass.logsumexp(-1))

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        k, log_mass = self._window()
        choice = Categorical(log_mass.movedim(-1, 1)).sample(noise, purpose)
        return k.gather(-1, choice.unsqueeze(-1)).squeeze(-1).long()

    def _window(self) -> tuple[Tensor, Tensor]:
        """The bins near `where`, (b, ..., W), and their unnormalized log masses; no (b, D, K)
        tensor."""
        half = int(self.reach * float(self.width.detach().max()) * self.bins / 2) + 1
        size = min(2 * half + 1, self.bins)
        first = (self.nearest - half).clamp(0, self.bins - size)
        step = torch.arange(size, device=first.device, dtype=first.dtype)
        k = first.unsqueeze(-1) + step
        return k, self._log_ratio(k)

    def _log_ratio(self, k: Tensor) -> Tensor:
        """log p(k) - log p(n) for k of shape (b, ...) or (b, ..., W)."""
        nearest, away, width = self.nearest, self.away, self.width.expand_as(self.where)
        if k.ndim > nearest.ndim:
            nearest, away, width = (each.unsqueeze(-1) for each in (nearest, away, width))
        step = (k - nearest) / self.bins
        return 2 * (step / width) * ((away - step) / width)


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
        where, width = wide(where), wide(width)
        self.where, self.width, self.bins = where, width.expand_as(where), bins

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, ...)."""
        return _mean(torch.special.ndtr, self.where, self.width, self.bins)

    def log_prob(self, value: Tensor) -> Nats:
        k = shaped(value, self.where).double()
        where, width = self.where.double(), self.width.double()
        left = (2 * k / self.bins - 1 - where) / width
        right = (2 * (k + 1) / self.bins - 1 - where) / width
        left = torch.where(k == 0, -torch.inf, left)
        right = torch.where(k == self.bins - 1, torch.inf, right)
        return per_example(_log_normal_mass(left, right)).to(self.where.dtype)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        z = self.where + self.width * draws(noise, self.where).normal(purpose, self.where)
        return ((z + 1) * self.bins / 2).floor().clamp(0, self.bins - 1).long()


class DiscretizedLogistic(Distribution):
    r"""The mass a logistic puts on each of K bins; the end bins reach to infinity.

    .. math:: p(k) = \mathrm{sig}\left(\frac{r_k - \mu}{s}\right)
        - \mathrm{sig}\left(\frac{l_k - \mu}{s}\right), \quad l_0 = -\infty, \; r_{K-1} = \infty

    Args:
        where: (b, ...) mu, on the scale of normalized data, (-1, 1).
        width: s, positive, broadcastable to `where`; the standard deviation is 1.81 s.
        bins: K.

    The log mass is a sum of three terms without cancellation (`log_logistic_mass`).
    """

    def __init__(self, where: Tensor, width: Tensor, bins: int):
        where, width = wide(where), wide(width)
        self.where, self.width, self.bins = where, width.expand_as(where), bins

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, ...)."""
        return _mean(torch.sigmoid, self.where, self.width, self.bins)

    def log_prob(self, value: Tensor) -> Nats:
        log_mass = log_logistic_mass(shaped(value, self.where), self.where, self.width, self.bins)
        return per_example(log_mass).to(self.where.dtype)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        u = draws(noise, self.where).uniform(purpose, self.where.double())
        return _logistic_quantile(u, self.where, self.width, self.bins).long()


class LogisticMixture(Distribution):
    r"""A mixture of M discretized logistics per pixel, over the colours of the pixel jointly.

    .. math:: p(x) = \sum_m \pi_m \prod_c p_m(x_c \mid x_{<c})

    The component m is one for all C channels of a pixel. With `coupling` (a, b, c), each in (-1, 1)
    and C = 3, the means of its logistics follow the colours before, r and g being bin centres:

    .. math:: \mu_R, \quad \mu_G + a\, r, \quad \mu_B + b\, r + c\, g

    Args:
        logits: (b, M, *pixels) of the weights pi.
        where: (b, M, C, *pixels) means, on the scale of normalized data, (-1, 1).
        width: scales, positive, broadcastable to `where`.
        bins: K.
        coupling: (b, M, 3, *pixels), or None: the channels of a component are independent.

    Raises:
        ValueError: a coupling of other than 3 channels.

    References:
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other
        Modifications, Salimans, Karpathy, Chen, Kingma, 2017, https://arxiv.org/abs/1701.05517.
    """

    def __init__(
        self, logits: Tensor, where: Tensor, width: Tensor, bins: int, coupling: Tensor | None
    ):
        if coupling is not None and where.shape[2] != 3:
            raise ValueError(f"coupling: is for 3 channels (R, G, B), got {where.shape[2]}")
        self.logits, self.where, self.width = (
            wide(logits),
            wide(where),
            wide(width.expand_as(where)),
        )
        self.bins, self.coupling = bins, coupling

    @property
    def mean(self) -> Tensor:
        """Expected integer, (b, C, *pixels).

        Exact without coupling. With it, G and B of a component are taken where R and G have their
        expectations, as exact sums would need K^3 terms: approximate, as rounding to bins and
        clipping at the ends are ignored.
        """
        each = self._in_order(lambda where: _mean(torch.sigmoid, where, self.width, self.bins))
        return (self.logits.softmax(1).unsqueeze(2) * each).sum(1)

    def log_prob(self, value: Tensor) -> Nats:
        k = shaped(value, self.where[:, 0]).double().unsqueeze(1)
        log_mass = log_logistic_mass(k, self._given(k), self.width, self.bins).sum(2)
        log_joint = self.logits.double().log_softmax(1) + log_mass
        return per_example(log_joint.logsumexp(1, keepdim=True)).to(self.where.dtype)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        """A component for each pixel, then its colours in order: R, G given R, B given both."""
        choice = Categorical(self.logits).sample(noise, f"{purpose}/component")
        one = self._component(choice)
        u = draws(noise, one.where).uniform(purpose, one.where.double())
        k = one._in_order(lambda where: _logistic_quantile(u, where, one.width, self.bins))
        return k.squeeze(1).long()

    def _given(self, k: Tensor) -> Tensor:
        """The means of every channel where the colours are k (b, 1 or M, C, *pixels)."""
        if self.coupling is None:
            return self.where
        r, g, _ = ((2 * k + 1) / self.bins - 1).unbind(2)
        red, green, blue = self.where.unbind(2)
        a, b, c = self.coupling.unbind(2)
        means = torch.broadcast_tensors(red, green + a * r, blue + b * r + c * g)
        return torch.stack(means, dim=2)

    def _in_order(self, colour: Callable[[Tensor], Tensor]) -> Tensor:
        """`colour(means)` of every channel, each with the means that the colours before it give:
        the second pass has G right, the third B."""
        k = colour(self.where)
        for _ in range(0 if self.coupling is None else 2):
            k = colour(self._given(k))
        return k

    def _component(self, choice: Tensor) -> LogisticMixture:
        """The mixture of one component, that of number `choice` (b, *pixels) in each pixel."""
        index = choice.unsqueeze(1)

        def pick(x: Tensor) -> Tensor:
            return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2], *choice.shape[1:]))

        coupling = None if self.coupling is None else pick(self.coupling)
        logits = self.logits.gather(1, index)
        return LogisticMixture(logits, pick(self.where), pick(self.width), self.bins, coupling)


def _log_normal_mass(left: Tensor, right: Tensor) -> Tensor:
    """log(Phi(right) - Phi(left)) for left < right, ends may be infinite; accurate in both
    tails."""
    flip = left + right > 0  # work in the lower tail, where the log cdf is exact
    low, high = torch.where(flip, -right, left), torch.where(flip, -left, right)
    log_high = _log_normal_cdf(high)
    bounded = low.isfinite()
    # The difference of two log cdfs; the inner `where` keeps inf out of the gradient.
    gap = _log_normal_cdf(torch.where(bounded, low, high - 1.0)) - log_high
    return log_high + torch.where(bounded, _log1mexp(gap), 0.0)


def _log_normal_cdf(x: Tensor) -> Tensor:
    r"""log Phi(x), with its gradient in the far tail too, where that of `torch.special.log_ndtr` is
    wrong by 1 % at 1e7 deviations and by many orders at 1e9:
    :math:`\Phi(x) = \tfrac12 e^{-x^2/2} \, \mathrm{erfcx}(-x / \sqrt 2)`."""
    far = x < -5
    tail, rest = torch.where(far, x, -5.0), torch.where(far, -5.0, x)
    scaled = torch.special.erfcx(tail / -math.sqrt(2)).log() - math.log(2)
    return torch.where(far, scaled - tail.square() / 2, torch.special.log_ndtr(rest))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    small = x > -math.log(2)
    inner = torch.where(small, x, -1.0)
    outer = torch.where(small, -1.0, x)
    return torch.where(small, (-torch.expm1(inner)).log(), torch.log1p(-outer.exp()))


def log_logistic_mass(k: Tensor, where: Tensor, width: Tensor, bins: int) -> Tensor:
    r"""log p(k) of a discretized logistic, elementwise, float64; exact in both tails and for any
    width.

    .. math:: \mathrm{sig}(r) - \mathrm{sig}(l) = \mathrm{sig}(r)\, \mathrm{sig}(-l)\,
        (1 - e^{l - r}), \quad r - l = 2 / (K s)

    The first bin keeps sig(r) alone, the last sig(-l) alone: which bin it is, is asked of the
    integer k, never of a rounded real number.
    """
    k, where, width = k.double(), where.double(), width.double()
    below = F.logsigmoid((2 * (k + 1) / bins - 1 - where) / width)
    above = F.logsigmoid((where + 1 - 2 * k / bins) / width)
    between = _log1mexp(-2 / (bins * width))
    first, last = k == 0, k == bins - 1
    inner = torch.where(first | last, 0.0, between)
    return torch.where(last, 0.0, below) + torch.where(first, 0.0, above) + inner


def log_logistic_masses(where: Tensor, width: Tensor, bins: int) -> Tensor:
    """`log_logistic_mass` of every k at once, (..., 1, n) to (..., K, n), in the precision of
    `where`: two bins share the edge between them, so that K - 1 edges are all that is computed."""
    edge = (2 * torch.arange(1, bins, device=where.device)[:, None] - bins).to(where) / bins
    away = (edge - where) / width
    below, above = F.logsigmoid(away), F.logsigmoid(-away)
    between = _log1mexp(-2 / (bins * width))
    inner = below[..., 1:, :] + above[..., :-1, :] + between
    return torch.cat([below[..., :1, :], inner, above[..., -1:, :]], dim=-2)


def _mean(cdf: Callable[[Tensor], Tensor], where: Tensor, width: Tensor, bins: int) -> Tensor:
    """Expected integer of a discretized symmetric density: the sum over k of P(x >= k). One edge at
    a time: no tensor has an axis of K."""
    mean = torch.zeros_like(where)
    for k in range(1, bins):
        mean = mean + cdf((where + 1 - 2 * k / bins) / width)
    return mean


def _logistic_quantile(u: Tensor, where: Tensor, width: Tensor, bins: int) -> Tensor:
    """The integer whose bin holds the u-quantile of a logistic, 0 < u < 1; of u's dtype."""
    z = where + width * u.logit()
    return ((z + 1) * bins / 2).floor().clamp(0, bins - 1)
