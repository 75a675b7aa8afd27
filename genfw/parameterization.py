r"""Parameterizations: what the network's output means.

A latent is :math:`z = \alpha x + \sigma \epsilon`. A network may predict any combination of x and
eps; given z they all say the same. A linear parameterization is a change of coordinates,

.. math:: \text{target} = a x + b \epsilon, \qquad \Delta = \alpha b - \sigma a, \qquad
    \hat x = (b z - \sigma\, \text{target}) / \Delta, \quad
    \hat\epsilon = (\alpha\, \text{target} - a z) / \Delta,

so a new one is one line:

    class Velocity(LinearParameterization, name="velocity"):
        def coefficients(self, alpha, sigma):
            return 1.0, -1.0

| name  | (a, b)                            | source                        |
|-------|-----------------------------------|-------------------------------|
| x0    | (1, 0)                            | Luo (94)                      |
| eps   | (0, 1)                            | Luo (115), (130)              |
| score | (0, -1 / sigma)                   | Luo (133)                     |
| v     | (-sigma, alpha)                   | Salimans & Ho                 |
| flow  | (-1, 1)                           | Lipman et al.; Liu, Gong, Liu |
| edm   | (sigma / (s_d r), -alpha s_d / r) | Karras et al.                 |

For edm, r^2 = sigma^2 + alpha^2 s_d^2, and the network sees z / r.

A discrete one takes the network's output for a prior over the K values v_k of every dimension, and
the noise for the likelihood:

.. math:: \hat x = \sum_k v_k\, p(k \mid z), \quad p(k \mid z) \propto p_\theta(k)
    \exp(-\tfrac12 \mathrm{SNR}\, (z / \alpha - v_k)^2), \quad
    \hat\epsilon = (z - \alpha \hat x) / \sigma

| name             | p_theta                                 | channels |
|------------------|-----------------------------------------|----------|
| categorical      | softmax of K logits                     | K C      |
| logistic_mixture | a mixture of M discretized logistics    | 3 M C    |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from genfw.amplitudes import broadcast
from genfw.bayes import DiscretePosterior
from genfw.check import at_least, at_least_one, positive
from genfw.discretized import log_logistic_masses
from genfw.distributions import scale_of
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

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        """What the network sees is input_scale * z."""
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


class Flow(LinearParameterization, name="flow"):
    """The velocity eps - x of the straight path from data to noise.

    References:
        Flow Matching for Generative Modeling, Lipman, Chen, Ben-Hamu, Nickel, Le, 2022,
        https://arxiv.org/abs/2210.02747; Flow Straight and Fast, Liu, Gong, Liu, 2022,
        https://arxiv.org/abs/2209.03003.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -1.0, 1.0


class Edm(LinearParameterization, name="edm"):
    r"""EDM's preconditioning: input and target have unit variance if the data have variance
    data_std^2.

    .. math:: a = \sigma / (s_d r), \quad b = -\alpha s_d / r, \quad r^2 = \sigma^2 + \alpha^2
        s_d^2, \quad \text{network input } z / r

    data_std = 1 is -v. Networks with Fourier features must be told (`data_std`), or they take z / r
    for z.

    Args:
        data_std: s_d; Karras et al. have 0.5 for images on (-1, 1).

    Raises:
        ValueError: data_std is not positive.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras, Aittala, Aila,
        Laine, 2022, https://arxiv.org/abs/2206.00364.
    """

    def __init__(self, data_std: float = 0.5):
        super().__init__()
        self.data_std = positive("data_std", data_std)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        inverse_r = self.input_scale(alpha, sigma)
        return sigma / self.data_std * inverse_r, -alpha * self.data_std * inverse_r

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        return (sigma.square() + (self.data_std * alpha).square()).rsqrt()

    def extra_repr(self) -> str:
        return f"data_std={self.data_std:g}"


class DiscreteParameterization(Parameterization):
    """The output is a prior over the values of every dimension; see the page above.

    Args:
        bins: K, the number of values of the data.
        outputs: how many numbers per dimension the network gives. Its output (b, outputs * C, ...)
            is read as (b, outputs, C, ...), as likelihoods do.

    Raises:
        ValueError: fewer than 2 bins.
    """

    def __init__(self, bins: int, outputs: int):
        super().__init__()
        self.bins, self.outputs = at_least(2, "bins", bins), outputs

    @abstractmethod
    def log_prior(self, numbers: Tensor) -> Tensor:
        """(b, outputs, n) at n positions to log p(k), (b, K, n), up to a constant at each."""

    def channels(self, data_channels: int, bins: int | None) -> int:
        """`outputs` per channel of the data.

        Raises:
            ValueError: the data have another number of values.
        """
        if bins != self.bins:
            raise ValueError(
                f"{type(self).__name__} has bins={self.bins}, the data have {bins}: give it the "
                "number of values of the data"
            )
        return self.outputs * data_channels

    def posterior(self, output: Tensor, z: Data, alpha: Tensor, sigma: Tensor) -> DiscretePosterior:
        """p(x | z).

        Raises:
            ValueError: the output has another shape than (b, outputs * C, ...).
        """
        expected = (len(z), self.outputs * z.shape[1], *z.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"{type(self).__name__} with bins={self.bins} reads {self.outputs} numbers per "
                f"dimension of z {tuple(z.shape)}, an output of {expected}, got "
                f"{tuple(output.shape)}: give the network out_channels={expected[1]}"
            )
        numbers = output.unflatten(1, (self.outputs, -1))
        alpha, sigma = broadcast(alpha, z), broadcast(sigma, z)
        return DiscretePosterior(numbers, z, alpha, sigma, self.bins, self.log_prior, self.size)

    def solve(self, output: Tensor, z: Data, alpha: Tensor, sigma: Tensor) -> Prediction:
        """The posterior mean, and the noise that is left.

        Raises:
            ValueError: the output has another shape than (b, outputs * C, ...).
        """
        alpha, sigma = broadcast(alpha, z), broadcast(sigma, z)
        x = self.posterior(output, z, alpha, sigma).x
        return Prediction(x, (z - alpha * x) / sigma, alpha, sigma)

    @property
    def size(self) -> int:
        """How many numbers per dimension `log_prior` computes with."""
        return self.bins

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


class CategoricalParameterization(DiscreteParameterization, name="categorical"):
    """K logits per dimension.

    A network that gives zeros is Bayes under the uniform prior; one that gives the log marginals of
    independent dimensions is exact. For K values the network needs K C channels.
    """

    def __init__(self, bins: int):
        super().__init__(bins, outputs=bins)

    def log_prior(self, numbers: Tensor) -> Tensor:
        return numbers


class LogisticMixtureParameterization(DiscreteParameterization, name="logistic_mixture"):
    """A mixture of M discretized logistics per dimension: 3 M numbers instead of K logits.

    They are read as (b, 3, M, C, ...): logits of the weights, means, log scales. A network that
    gives zeros spreads the means evenly over (-1, 1), each scale half the distance between two;
    log scales are kept in [-9, 3].

    Bayes' rule needs all K masses of a dimension even so. They are made piece by piece from the
    mixture, so memory is less than with logits, but computing is M times as much.

    Args:
        bins: K.
        components: M; 10 as in PixelCNN++'s code.

    Raises:
        ValueError: fewer than 1 component, or than 2 bins, or no integer.

    References:
        PixelCNN++, Salimans, Karpathy, Chen, Kingma, 2017, https://arxiv.org/abs/1701.05517.
    """

    def __init__(self, bins: int, components: int = 10):
        super().__init__(bins, outputs=3 * at_least_one("components", components))
        self.components = components

    def log_prior(self, numbers: Tensor) -> Tensor:
        logits, shift, log_ratio = numbers.unflatten(1, (3, self.components)).unsqueeze(3).unbind(1)
        m = torch.arange(self.components, dtype=numbers.dtype, device=numbers.device)
        where = shift + ((2 * m + 1) / self.components - 1)[:, None, None]
        width = scale_of(log_ratio - math.log(self.components))
        log_mass = log_logistic_masses(where, width, self.bins)
        return (logits.log_softmax(1) + log_mass).logsumexp(1)

    @property
    def size(self) -> int:
        return self.bins * self.components

    def extra_repr(self) -> str:
        return f"bins={self.bins}, components={self.components}"
