r"""p(x | z): from a model's last numbers to a distribution over data.

Data are integers 0..K-1. `normalize` is the only map from them to real numbers: the bin centres
:math:`2(x + 1/2)/K - 1`, inside (-1, 1), bin width 2/K. Every likelihood but `gaussian` is a
probability *mass*, so that log-likelihoods of different models compare; `gaussian` is a density,
for data that are real numbers.

What a likelihood is given, h, is one of three things:

* the output of a network, (b, outputs * C, ...): `outputs` numbers per data dimension, read as (b,
  outputs, C, ...);
* the pair (z_0 / alpha_0, sigma_0 / alpha_0) of a diffusion model: where the first latent says the
  data lie, and how sure it is. `bins`, `discretized_gaussian` and `gaussian` take it;
* the posterior over the K values that a diffusion model's own network states at z_0, for
  likelihoods that take no pair. `categorical` takes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from genfw.bayes import DiscretePosterior, centres
from genfw.check import at_least, at_least_one
from genfw.discretized import BinSoftmax, DiscretizedLogistic, DiscretizedNormal, LogisticMixture
from genfw.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Normal,
    normal_head,
    precision,
    scale_of,
)
from genfw.registry import Registered
from genfw.types import Data, Image
from genfw.values import check_integers, readable

Head: TypeAlias = "Data | tuple[Tensor, Tensor] | DiscretePosterior"


class Likelihood(Registered, nn.Module, ABC, group="likelihood"):
    """A family p(x | h).

    Attributes:
        bins: K, the number of values of a data dimension; None for a density.
        outputs: how many numbers per data dimension a network must give; 1 where none is read.
        density: True where `log_prob` is a density, not a mass. A density is never quoted as
            bits/dim of images.
        takes_pair: True where h may be a diffusion model's pair.
    """

    density: ClassVar[bool] = False
    takes_pair: ClassVar[bool] = False
    bins: int | None
    outputs: int

    @abstractmethod
    def forward(self, h: Head) -> Distribution:
        """The distribution of x given h: log_prob is (b,) nats, the mean of masses the expected
        integer in every dimension."""

    def normalize(self, x: Image) -> Data:
        """Bin centres 2 (x + 1/2) / K - 1 in torch's default dtype, or float32 where that is less.

        Raises:
            TypeError: x is not integer.
            ValueError: a value outside 0..K-1 (not looked for while a GPU trains, see `readable`).
        """
        assert self.bins is not None
        check_integers(x, self.bins)
        return (2 * x.to(precision()) + 1) / self.bins - 1

    def centres(self) -> Tensor:
        """The K normalized values, (K,) float64."""
        assert self.bins is not None
        return centres(self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


class CategoricalLikelihood(Likelihood, name="categorical"):
    r"""The K masses of every dimension as the network states them: the most general mass.

    From a network, K logits per dimension; or the posterior of a diffusion model whose network
    states a prior over the values (param=categorical),

    .. math:: p(x = k \mid z_0) \propto p_\theta(k) \exp(-\tfrac12 ((z_0 - \alpha_0 v_k) /
        \sigma_0)^2)

    Raises:
        ValueError: a posterior over another number of values.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = self.outputs = at_least(2, "bins", bins)

    def forward(self, h: Head) -> Categorical | DiscretePosterior:
        if not isinstance(h, DiscretePosterior):
            return Categorical(_split(h, self.outputs, "categorical"))
        if h.bins != self.bins:
            raise ValueError(
                f"likelihood categorical has bins={self.bins}, the parameterization "
                f"bins={h.bins}: give both the number of values of the data"
            )
        return h


class BernoulliLikelihood(Likelihood, name="bernoulli"):
    """One logit per binary dimension. From a network only.

    Raises:
        ValueError: bins other than 2.
    """

    def __init__(self, bins: int = 2):
        super().__init__()
        if bins != 2:
            raise ValueError(
                f"bernoulli has 2 values, the data have bins={bins}: "
                "use likelihood=categorical, or binarize the data (data.binarize=dynamic)"
            )
        self.bins, self.outputs = 2, 1

    def forward(self, h: Head) -> Bernoulli:
        return Bernoulli(_split(h, 1, "bernoulli").squeeze(1))


class BinsLikelihood(Likelihood, name="bins"):
    r"""Softmax over the K bin centres v_k, from the pair of a diffusion model.

    .. math:: p(x = k \mid z_0) \propto \exp(-\tfrac12 (z_0/\alpha_0 - v_k)^2
        / (\sigma_0/\alpha_0)^2)

    Exact Bayes for z_0 under a uniform prior over values.

    References:
        Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021,
        https://arxiv.org/abs/2107.00630.
    """

    takes_pair = True

    def __init__(self, bins: int):
        super().__init__()
        self.bins, self.outputs = at_least(2, "bins", bins), 1

    def forward(self, h: Head) -> BinSoftmax:
        where, width = _pair(h, "bins")
        assert self.bins is not None
        return BinSoftmax(where, width, self.bins)


class DiscretizedGaussianLikelihood(Likelihood, name="discretized_gaussian"):
    r"""The mass of a normal between the edges of a bin; the end bins reach to infinity
    (`DiscretizedNormal`).

    From a diffusion model's pair (mean, std), or from a network: (mean, log std), the log std kept
    in [-9, 3].
    """

    takes_pair = True

    def __init__(self, bins: int):
        super().__init__()
        self.bins, self.outputs = at_least(2, "bins", bins), 2

    def forward(self, h: Head) -> DiscretizedNormal:
        assert self.bins is not None
        return DiscretizedNormal(*_location_scale(h, "discretized_gaussian"), self.bins)


class DiscretizedLogisticLikelihood(Likelihood, name="discretized_logistic"):
    r"""The mass of a logistic between the edges of a bin; the end bins reach to infinity
    (`DiscretizedLogistic`).

    From a network only: (mean, log scale), the log scale kept in [-9, 3]. The noise of a diffusion
    model is normal, not logistic.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins, self.outputs = at_least(2, "bins", bins), 2

    def forward(self, h: Head) -> DiscretizedLogistic:
        assert self.bins is not None
        where, log_width = _split(h, 2, "discretized_logistic").unbind(1)
        return DiscretizedLogistic(where, scale_of(log_width), self.bins)


class LogisticMixtureLikelihood(Likelihood, name="logistic_mixture"):
    r"""A mixture of discretized logistics per pixel, joint over its channels, with PixelCNN++'s
    coupling of the colours where there are three (`LogisticMixture`).

    From a network only. Its outputs are read as (b, 4, components, C, ...), the four being:

    * logits of the weights, which all channels of a pixel share: the mean over C is taken;
    * means;
    * log scales, kept in [-9, 3];
    * coefficients, through tanh: of R in G, of R in B, of G in B, in this order over the channels.
      Unread unless C = 3.

    PixelCNN++ packs the same into 10 components numbers per pixel of three colours; 4 components
    per channel hold for any C.

    Axis 1 of the data is the channels: data without other axes, (b, D), are one pixel of D
    channels.

    Args:
        bins: K.
        components: logistics per pixel; 10 as in PixelCNN++'s code.

    Raises:
        ValueError: fewer than 1 component.

    References:
        PixelCNN++, Salimans, Karpathy, Chen, Kingma, 2017, https://arxiv.org/abs/1701.05517.
    """

    def __init__(self, bins: int, components: int = 10):
        super().__init__()
        self.bins, self.components = (
            at_least(2, "bins", bins),
            at_least_one("components", components),
        )
        self.outputs = 4 * self.components

    def forward(self, h: Head) -> LogisticMixture:
        assert self.bins is not None
        numbers = _split(h, self.outputs, "logistic_mixture").unflatten(1, (4, self.components))
        logits, where, log_width, coefficients = numbers.unbind(1)
        coupling = coefficients.tanh() if where.shape[2] == 3 else None
        width = scale_of(log_width)
        return LogisticMixture(logits.mean(2), where, width, self.bins, coupling)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, components={self.components}"


class GaussianLikelihood(Likelihood, name="gaussian"):
    """A normal DENSITY, for real-valued data, which it leaves as they are (`normalize` is the
    identity).

    From a diffusion model's pair (mean, std), or from a network: (mean, log std), the log std kept
    in [-9, 3].
    """

    density, takes_pair = True, True

    def __init__(self):
        super().__init__()
        self.bins, self.outputs = None, 2

    def normalize(self, x: Image) -> Data:
        """The identity on real numbers.

        Raises:
            TypeError: x is integer: a density of integers has no meaning.
            ValueError: NaN or infinity (not looked for while a GPU trains, see `readable`).
        """
        if not x.is_floating_point():
            raise TypeError(
                f"gaussian is a density over real numbers, got {x.dtype}: "
                "for integer images use discretized_gaussian, bins or categorical"
            )
        if readable(x) and not x.isfinite().all():
            row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"data: expected finite numbers, got {int((~x.isfinite()).sum())} NaN or infinite, "
                f"the first in example {row} of the batch: leave such examples out"
            )
        return x

    def forward(self, h: Head) -> Normal:
        return Normal(*_location_scale(h, "gaussian"))


def _split(h: Head, outputs: int, name: str) -> Tensor:
    """Network output (b, outputs * C, ...) as (b, outputs, C, ...)."""
    if not isinstance(h, Tensor):
        raise _other(h, f"likelihood {name} reads a network's output")
    if h.shape[1] % outputs:
        raise ValueError(
            f"likelihood {name} needs {outputs} channels per data channel, got {h.shape[1]} in all"
        )
    return h.unflatten(1, (outputs, -1))


def _pair(h: Head, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(h, tuple):
        raise _other(h, f"likelihood {name} reads the pair (z_0/alpha_0, sigma_0/alpha_0)")
    return h


def _other(h: Head, expected: str) -> TypeError:
    """The error that says what came instead, and which likelihoods take it."""
    if isinstance(h, DiscretePosterior):
        came, takers = "a diffusion model's posterior over the K values", "categorical"
    elif isinstance(h, tuple):
        came = "a diffusion model's pair (z_0/alpha_0, sigma_0/alpha_0)"
        takers = "bins or discretized_gaussian"
    else:
        came, takers = "a network's output", "categorical or discretized_gaussian"
    return TypeError(f"{expected}, got {came}: use {takers} there")


def _location_scale(h: Head, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(h, tuple):
        return h
    normal = normal_head(_split(h, 2, name).flatten(1, 2))
    return normal.mean, normal.std
