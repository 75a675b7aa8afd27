r"""Noise schedules: log SNR as a function of time.

Time t runs from 0 (data) to 1 (noise); :math:`\lambda(t) = \log \mathrm{SNR}(t)` falls strictly
from `log_snr_max` to `log_snr_min`, both finite and exact. Latents are variance preserving:

.. math:: z_t = \alpha_t x + \sigma_t \epsilon, \quad \alpha_t^2 = \mathrm{sigmoid}(\lambda),
    \quad \sigma_t^2 = \mathrm{sigmoid}(-\lambda)

Luo's :math:`\bar\alpha_t` is :math:`\alpha_t^2` here. To add a schedule, state its log SNR as the
paper writes it:

    class Cosine(NoiseSchedule, name="cosine"):
        def log_snr(self, t):
            return -2 * (math.pi / 2 * t).tan().log()

The base class re-maps time, t -> u_0 + (u_1 - u_0) t, so that the end points hold exactly: it
keeps the piece of the stated curve that lies between them. `linear` (beta linear in t) and
`loglinear` (log SNR linear in t) are two different schedules. Arithmetic is in float64, whatever
the network's precision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from genfw.registry import Registered
from genfw.types import Time


class NoiseSchedule(Registered, nn.Module, ABC, group="schedule"):
    """log SNR over time, and everything that follows from it.

    Args:
        log_snr_max: log SNR at t = 0.
        log_snr_min: log SNR at t = 1.

    Raises:
        ValueError: end points not finite or not falling, or outside the reach of the stated curve.

    A subclass states `log_snr` before end points are fixed (on u > 0), and may state
    `curve_slope(u)` (minus its derivative) and `curve_inverse(log_snr)` in closed form; without
    them autograd and bisection serve.
    """

    def __init__(self, log_snr_max: float, log_snr_min: float):
        super().__init__()
        if not (math.isfinite(log_snr_max) and math.isfinite(log_snr_min)):
            raise ValueError(
                f"end points must be finite, got {log_snr_max}..{log_snr_min}: "
                "an infinite log SNR divides by zero at its end"
            )
        if log_snr_max <= log_snr_min:
            raise ValueError(
                f"log_snr_max must exceed log_snr_min, got {log_snr_max}..{log_snr_min}"
            )
        self.log_snr_max, self.log_snr_min = float(log_snr_max), float(log_snr_min)
        ends = torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64)
        self._start, self._stop = self.curve_inverse(ends).tolist()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "log_snr" in vars(
            cls
        ):  # what the subclass states is the curve; what users call has exact ends
            cls.curve, cls.log_snr = vars(cls)["log_snr"], _exact_log_snr

    @abstractmethod
    def log_snr(self, t: Time) -> Tensor:
        """log SNR at time t in [0, 1], float64: exactly log_snr_max at 0 and log_snr_min at 1."""

    def alpha(self, t: Time) -> Tensor:
        """Signal amplitude, sqrt(sigmoid(log SNR))."""
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Time) -> Tensor:
        """Noise amplitude, sqrt(sigmoid(-log SNR))."""
        return (-self.log_snr(t)).sigmoid().sqrt()

    def snr(self, t: Time) -> Tensor:
        """Signal-to-noise ratio, alpha^2 / sigma^2."""
        return self.log_snr(t).exp()

    def slope(self, t: Time) -> Tensor:
        """-d log SNR / dt, positive."""
        span = self._stop - self._start
        return span * self.curve_slope(self._start + span * _double(t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which log SNR takes this value; clamped to [0, 1]."""
        u = self.curve_inverse(_double(log_snr))
        return ((u - self._start) / (self._stop - self._start)).clamp(0, 1)

    def curve(self, u: Tensor) -> Tensor:
        """The log SNR that the subclass stated, before end points are fixed."""
        raise TypeError(f"{type(self).__name__} states no log_snr")

    def curve_slope(self, u: Tensor) -> Tensor:
        """-d curve / du, by autograd (under inference mode too, as in Lightning's validation)."""
        with torch.inference_mode(False), torch.enable_grad():
            u = u if u.requires_grad else u.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.curve(u).sum(), u, create_graph=True)
        return -slope if torch.is_grad_enabled() else -slope.detach()

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        """The u at which the curve takes this value, by bisection on (0, 1000].

        Raises:
            ValueError: the curve never gets there.
        """
        low = torch.full_like(log_snr, 1e-12)
        high = torch.full_like(log_snr, 1.0)
        with torch.no_grad():
            for _ in range(10):  # a curve may be asked for less signal than it has at u = 1
                short = ~(self.curve(high) <= log_snr)
                high = torch.where(short, 2 * high, high)
            if bool((self.curve(low) < log_snr).any() or (self.curve(high) > log_snr).any()):
                at_low, at_high = self.curve(low).max().item(), self.curve(high).min().item()
                raise ValueError(
                    f"{type(self).__name__} reaches log SNR {at_low:.4g} to {at_high:.4g}, asked "
                    f"for {log_snr.max().item():.4g} to {log_snr.min().item():.4g}: "
                    "choose end points within its reach"
                )
            for _ in range(100):
                middle = (low + high) / 2
                above = self.curve(middle) > log_snr
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def extra_repr(self) -> str:
        return f"log_snr: {self.log_snr_max:g} -> {self.log_snr_min:g}"


def _exact_log_snr(self: NoiseSchedule, t: Time) -> Tensor:
    """log SNR at time t in [0, 1], float64: exactly log_snr_max at 0 and log_snr_min at 1."""
    t = _double(t)
    inside = self.curve(self._start + (self._stop - self._start) * t)
    inside = torch.where(t <= 0, self.log_snr_max, inside)
    return torch.where(t >= 1, self.log_snr_min, inside)


def _double(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t).double()


class LogLinear(NoiseSchedule, name="loglinear"):
    """log SNR linear in t.

    References:
        Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021,
        https://arxiv.org/abs/2107.00630 (there "fixed linear").
    """

    def log_snr(self, t: Time) -> Tensor:
        return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t

    def curve_slope(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.log_snr_max - self.log_snr_min)

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
        if not 0 < beta_min < beta_max:
            raise ValueError(f"expected 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max
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
        self.shift = shift
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t: Time) -> Tensor:
        return -2 * (math.pi / 2 * t).tan().log() + self.shift

    def curve_slope(self, u: Tensor) -> Tensor:
        return 2 * math.pi / (math.pi * u).sin()

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.exp((self.shift - log_snr) / 2).atan()

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", shift={self.shift:g}" if self.shift else "")


def _log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x > 0, without overflow."""
    return x + torch.log(-torch.expm1(-x))
