r"""The interface: log SNR as a function of time, and everything that follows from it.

A schedule states its log SNR as the paper writes it:

    class Cosine(NoiseSchedule, name="cosine"):
        def log_snr(self, t):
            return -2 * (math.pi / 2 * t).tan().log()

The base class re-maps time, t -> u_0 + (u_1 - u_0) t, so that the end points hold exactly: it
keeps the piece of the stated curve that lies between them. Arithmetic is in float64, whatever the
network's precision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genfw.amplitudes import amplitudes
from genfw.registry import Registered
from genfw.types import Time


class NoiseSchedule(Registered, nn.Module, ABC, group="schedule"):
    """log SNR over time, and everything that follows from it.

    Args:
        log_snr_max: log SNR at t = 0.
        log_snr_min: log SNR at t = 1.

    Raises:
        ValueError: end points not finite or not falling, or outside the reach of the stated curve.
        TypeError: the curve reads what is not there yet.

    A subclass states `log_snr` before end points are fixed (on u > 0), and may state
    `curve_slope(u)` (minus its derivative) and `curve_inverse(log_snr)` in closed form; without
    them autograd and bisection serve, whatever a parent of another curve has. Within, that curve is
    `super().log_snr(u)`. Numbers of its own it sets before `super().__init__`, which looks for the
    end points on the curve.

    A curve that is learned has its end points by construction, whatever its parameters, and
    overrides `piece`: nobody looks at it before its parameters are there, which torch takes only
    after `super().__init__`. `still` gives the shape of any curve its gradient.
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
        self._ends = float(log_snr_max), float(log_snr_min)
        try:
            self._start, self._stop = self.piece()
        except AttributeError as error:
            raise TypeError(
                f"{error}: set it before super().__init__(log_snr_max, log_snr_min), which looks "
                "for the end points on the curve; parameters and modules, which torch takes only "
                "afterwards, belong to a curve that has its end points by construction and says so "
                "in `piece`"
            ) from error

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "log_snr" in vars(cls):
            # What the subclass states is the curve; what users call has exact ends.
            cls.curve = vars(cls)["log_snr"]
            cls.log_snr = _exact(cls.curve)
            for closed in ("curve_slope", "curve_inverse"):
                if closed not in vars(cls):  # a parent's would be that of another curve
                    setattr(cls, closed, vars(NoiseSchedule)[closed])

    @property
    def learns(self) -> bool:
        """Whether any parameter of it is trained."""
        return any(p.requires_grad for p in self.parameters())

    @property
    def ends(self) -> tuple[float, float]:
        """log SNR at t = 0 and at t = 1 as numbers, which carry no gradient."""
        most, least = (
            torch.as_tensor(end, dtype=torch.float64).item()
            for end in (self.log_snr_max, self.log_snr_min)
        )
        return most, least

    @property
    def log_snr_max(self) -> float | Tensor:
        """log SNR at t = 0; a tensor with a gradient where it is learned."""
        return self._ends[0]

    @property
    def log_snr_min(self) -> float | Tensor:
        """log SNR at t = 1; a tensor with a gradient where it is learned."""
        return self._ends[1]

    @abstractmethod
    def log_snr(self, t: Time) -> Tensor:
        """log SNR at time t in [0, 1], float64: exactly log_snr_max at 0 and log_snr_min at 1."""

    def alpha(self, t: Time) -> Tensor:
        """Signal amplitude, sqrt(sigmoid(log SNR))."""
        alpha, _ = amplitudes(self.log_snr(t))
        return alpha

    def sigma(self, t: Time) -> Tensor:
        """Noise amplitude, sqrt(sigmoid(-log SNR))."""
        _, sigma = amplitudes(self.log_snr(t))
        return sigma

    def snr(self, t: Time) -> Tensor:
        """Signal-to-noise ratio, alpha^2 / sigma^2."""
        return self.log_snr(t).exp()

    def slope(self, t: Time) -> Tensor:
        """-d log SNR / dt, positive."""
        span = self._stop - self._start
        return span * self.curve_slope(self._start + span * _double(t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which log SNR takes this value; clamped to [0, 1]."""
        log_snr = _double(log_snr)
        above, below = log_snr > self.log_snr_max, log_snr < self.log_snr_min
        within = torch.where(below, self.log_snr_min, log_snr)  # no curve need go on beyond
        u = self.curve_inverse(torch.where(above, self.log_snr_max, within))
        t = ((u - self._start) / (self._stop - self._start)).clamp(0, 1)
        return torch.where(above, 0.0, torch.where(below, 1.0, t))

    def curve(self, u: Tensor) -> Tensor:
        """The log SNR that the subclass stated, before end points are fixed."""
        raise TypeError(f"{type(self).__name__} states no log_snr")

    def curve_slope(self, u: Tensor) -> Tensor:
        """-d curve / du, by autograd (under inference mode too, as in Lightning's validation)."""
        with torch.inference_mode(False), torch.enable_grad():
            wanted = u.requires_grad or self.learns
            u = u if u.requires_grad else u.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.curve(u).sum(), u, create_graph=wanted)
        return -slope if wanted and torch.is_grad_enabled() else -slope.detach()

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
            # A curve that is finite at u = 0 falls a little before the first u looked at.
            missed = self.curve(low) < log_snr - 1e-4
            if bool(missed.any() or (self.curve(high) > log_snr).any()):
                at_low, at_high = self.curve(low).max().item(), self.curve(high).min().item()
                raise ValueError(
                    f"{type(self).__name__} reaches log SNR {at_low:.4g} to {at_high:.4g}, asked "
                    f"for {log_snr.max().item():.4g} to {log_snr.min().item():.4g}: "
                    "choose end points within its reach"
                )
            return bisect(self.curve, log_snr, low, high, steps=100)

    def still(self, t: Time) -> Tensor:
        """t, float64; where the shape is learned with a gradient by which the times move with it,
        so that log SNR there depends on the end points alone."""
        t = _double(t).detach()
        if not (self.learns and torch.is_grad_enabled()):
            return t
        span = self.log_snr_max - self.log_snr_min
        n = (self.log_snr_max - self.log_snr(t)) / span
        return t - (n - n.detach()) * (span / self.slope(t)).detach()

    def piece(self) -> tuple[float, float]:
        """u_0 and u_1, where on the stated curve the end points lie; `return 0.0, 1.0` of a curve
        that has them by construction.

        Raises:
            ValueError: float64 cannot say where.
        """
        ends = torch.tensor(self._ends, dtype=torch.float64, device="cpu")
        u = self.curve_inverse(ends)
        if not torch.allclose(self.curve(u), ends, rtol=0, atol=1e-3):
            raise ValueError(
                f"{type(self).__name__} reaches log SNR {ends[0]:g} or {ends[1]:g} nearer to u = 0 "
                "or u = 1 than float64 resolves: "
                "choose log_snr_max and log_snr_min nearer to each other"
            )
        start, stop = u.tolist()
        return start, stop

    def extra_repr(self) -> str:
        return f"log_snr: {self.log_snr_max:g} -> {self.log_snr_min:g}"


def _exact(curve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """log SNR with exact ends, of the curve that a class states."""

    def log_snr(self: NoiseSchedule, t: Time) -> Tensor:
        """log SNR at time t in [0, 1], float64: exactly log_snr_max at 0 and log_snr_min at 1."""
        if type(self).log_snr is not log_snr:  # `super().log_snr`, where another curve is stated
            return curve(self, t)
        t = _double(t).clamp(0, 1)
        inside = self.curve(self._start + (self._stop - self._start) * t)
        still = inside - inside.detach()  # 0, with the derivative that the curve has there
        inside = torch.where(t <= 0, still + _fixed(self.log_snr_max), inside)
        return torch.where(t >= 1, still + _fixed(self.log_snr_min), inside)

    return log_snr


def bisect(
    curve: Callable[[Tensor], Tensor], value: Tensor, low: Tensor, high: Tensor, steps: int
) -> Tensor:
    """Where a falling curve takes these values, between low and high."""
    for _ in range(steps):
        middle = (low + high) / 2
        above = curve(middle) > value
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _fixed(end: Tensor | float) -> Tensor | float:
    return end.detach() if isinstance(end, Tensor) else end


def _double(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
