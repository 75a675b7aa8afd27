r"""Schedules of one formula, from the simplest to the densities over log SNR.

| name      | log SNR before the end points are fixed                                |
|-----------|------------------------------------------------------------------------|
| loglinear | linear in t                                                            |
| linear    | beta linear in t: -log expm1(beta_min t + (beta_max - beta_min) t^2/2) |
| cosine    | -2 log tan(pi t / 2) + shift                                           |
| sigmoid   | of alpha^2, a piece of a sigmoid                                       |
| edm       | -2 (p_mean + p_std Phi^-1(t)): a normal density over log SNR           |
| laplace   | a Laplace density over log SNR                                         |

`linear` (beta linear in t) and `loglinear` (log SNR linear in t) are two different schedules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfw.check import finite, positive
from genfw.schedule.schedule import NoiseSchedule
from genfw.types import Time


class LogLinear(NoiseSchedule, name="loglinear"):
    """log SNR linear in t.

    References:
        Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021,
        https://arxiv.org/abs/2107.00630 (there "fixed linear").
    """

    def log_snr(self, t: Time) -> Tensor:
        return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t

    def curve_slope(self, u: Tensor) -> Tensor:
        return torch.ones_like(u) * (self.log_snr_max - self.log_snr_min)

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        return (self.log_snr_max - log_snr) / (self.log_snr_max - self.log_snr_min)


class Linear(NoiseSchedule, name="linear"):
    r"""beta linear in t: the variance-preserving diffusion of DDPM.

    .. math:: \lambda(t) = -\log \mathrm{expm1}(\beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2)

    References:
        Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020,
        https://arxiv.org/abs/2006.11239; Score-Based Generative Modeling through SDEs, Song et
        al., 2021, https://arxiv.org/abs/2011.13456.
    """

    def __init__(
        self, log_snr_max: float, log_snr_min: float, beta_min: float = 0.1, beta_max: float = 20.0
    ):
        self.beta_min = positive("beta_min", beta_min)
        self.beta_max = finite("beta_max", beta_max)
        if not beta_min < beta_max:
            raise ValueError(f"expected beta_min < beta_max, got {beta_min} and {beta_max}")
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        return -_log_expm1(self._integral(t))

    def _integral(self, u: Tensor) -> Tensor:
        """The integral of beta from 0 to u."""
        return self.beta_min * u + (self.beta_max - self.beta_min) * u.square() / 2

    def curve_slope(self, u: Tensor) -> Tensor:
        beta = self.beta_min + (self.beta_max - self.beta_min) * u
        return beta / -torch.expm1(-self._integral(u))

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        area = torch.nn.functional.softplus(-log_snr)  # expm1(area) = e^-lambda
        half, start = (self.beta_max - self.beta_min) / 2, self.beta_min
        return 2 * area / (start + (start**2 + 4 * half * area).sqrt())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta: {self.beta_min:g} -> {self.beta_max:g}"


class Cosine(NoiseSchedule, name="cosine"):
    r"""alpha a cosine of t.

    .. math:: \lambda(t) = -2 \log\tan(\pi t / 2) + \text{shift}

    Args:
        shift: added to log SNR before the end points are fixed; 2 log(reference / resolution)
            keeps the noise of large images in step with that of small ones.

    References:
        Improved Denoising Diffusion Probabilistic Models, Nichol, Dhariwal, 2021,
        https://arxiv.org/abs/2102.09672; simple diffusion, Hoogeboom, Heek, Salimans, 2023,
        https://arxiv.org/abs/2301.11093 (the shift).
    """

    def __init__(self, log_snr_max: float, log_snr_min: float, shift: float = 0.0):
        self.shift = finite("shift", shift)
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        return -2 * (math.pi / 2 * t).tan().log() + self.shift

    def curve_slope(self, u: Tensor) -> Tensor:
        return 2 * math.pi / (math.pi * u).sin()

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.exp((self.shift - log_snr) / 2).atan()

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", shift={self.shift:g}" if self.shift else "")


class Sigmoid(NoiseSchedule, name="sigmoid"):
    r"""alpha^2 a piece of a sigmoid, stretched to run from 1 to 0.

    .. math:: \alpha^2 = \frac{s(b) - s(a + (b - a)\, t)}{s(b) - s(a)}, \quad
        s = \mathrm{sigmoid}, \; a = \text{start} / \tau, \; b = \text{end} / \tau

    By :math:`s(y) - s(x) = \sinh\frac{y - x}{2} / (2 \cosh\frac x2 \cosh\frac y2)`, with
    :math:`w = (b - a) / 2`, without a difference of nearly equal numbers:

    .. math:: \lambda(t) = \log\frac{\sinh w (1 - t)}{\sinh w t}
        + \log\frac{\cosh(a / 2)}{\cosh(b / 2)}

    Args:
        start, end: the piece; start < end.
        tau: its temperature: small is steep.

    References:
        Scalable Adaptive Computation for Iterative Generation, Jabri, Fleet, Chen, 2022,
        https://arxiv.org/abs/2212.11972.
    """

    def __init__(
        self,
        log_snr_max: float,
        log_snr_min: float,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
    ):
        self.start, self.end = finite("start", start), finite("end", end)
        self.tau = positive("tau", tau)
        if not start < end:
            raise ValueError(f"expected start < end, got {start} and {end}")
        self._width = (end - start) / (2 * tau)
        self._offset = _log_cosh(start / tau / 2) - _log_cosh(end / tau / 2)
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        w = self._width
        return _log_sinh(w * (1 - t)) - _log_sinh(w * t) + self._offset

    def curve_slope(self, u: Tensor) -> Tensor:
        w = self._width
        return w * (1 / (w * u).tanh() + 1 / (w * (1 - u)).tanh())

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        w, zero = self._width, torch.zeros_like(log_snr)  # log1p(2 sinh w / (ratio + e^-w)) / 2 w
        rest = torch.logaddexp(log_snr - self._offset, zero - w)
        return torch.logaddexp(w + math.log(-math.expm1(-2 * w)) - rest, zero) / (2 * w)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.start:g} -> {self.end:g}, tau={self.tau:g}"


class LogNormal(NoiseSchedule, name="edm"):
    r"""The log of the noise level sigma / alpha normally distributed, as EDM trains.

    .. math:: \log\frac{\sigma}{\alpha} \sim \mathcal{N}(P_{mean}, P_{std}^2), \quad
        \lambda(t) = -2\, (P_{mean} + P_{std}\, \Phi^{-1}(t))

    A normal density over log SNR with mean -2 P_mean and deviation 2 P_std. It visits its tails
    rarely and weighs them heavily: as an estimator of the bound it has a large variance.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras, Aittala, Aila,
        Laine, 2022, https://arxiv.org/abs/2206.00364.
    """

    def __init__(
        self, log_snr_max: float, log_snr_min: float, p_mean: float = -1.2, p_std: float = 1.2
    ):
        self.p_mean, self.p_std = finite("p_mean", p_mean), positive("p_std", p_std)
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        return -2 * (self.p_mean + self.p_std * torch.special.ndtri(t))

    def curve_slope(self, u: Tensor) -> Tensor:
        x = torch.special.ndtri(u)
        return 2 * self.p_std * math.sqrt(2 * math.pi) * (x.square() / 2).exp()

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        x = (log_snr / 2 + self.p_mean) / self.p_std
        return torch.special.erfc(x / math.sqrt(2)) / 2  # ndtr(-x), which torch rounds to 1e-16

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, log noise ~ N({self.p_mean:g}, {self.p_std:g}^2)"


class Laplace(NoiseSchedule, name="laplace"):
    r"""A Laplace density over log SNR.

    .. math:: \lambda(t) = \mu - b\, \mathrm{sgn}(\tfrac12 - t) \log(1 - 2 |t - \tfrac12|)

    It is peaked at mu, for objectives that weigh t evenly; with the bound's weights its variance is
    large, as its tails are rarely visited.

    Args:
        mean: mu.
        scale: b.

    References:
        Improved Noise Schedule for Diffusion Training, Hang, Gu, Geng, Guo, 2024,
        https://arxiv.org/abs/2407.03297.
    """

    def __init__(
        self, log_snr_max: float, log_snr_min: float, mean: float = 0.0, scale: float = 0.5
    ):
        self.mean, self.scale = finite("mean", mean), positive("scale", scale)
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        tail = torch.where(t < 0.5, -(2 * t).log(), (2 * (1 - t)).log())
        return self.mean + self.scale * tail

    def curve_slope(self, u: Tensor) -> Tensor:
        return self.scale / torch.minimum(u, 1 - u)

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        x = (log_snr - self.mean) / self.scale
        share = (-x.abs()).exp() / 2
        return torch.where(x > 0, share, 1 - share)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density Laplace({self.mean:g}, {self.scale:g})"


def _log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x > 0, without overflow."""
    return x + torch.log(-torch.expm1(-x))


def _log_sinh(x: Tensor) -> Tensor:
    return _log_expm1(2 * x) - x - math.log(2)


def _log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)
