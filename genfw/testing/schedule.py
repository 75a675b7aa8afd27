"""Laws of noise schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genfw.schedule import NoiseSchedule

ENDS = ((13.3, -10.0), (7.9, -5.0), (14.0, -14.0), (2.0, 1.0))
"""log SNR at both ends, as a researcher and as nobody would choose them."""

Make = Callable[..., NoiseSchedule]


def exact_ends(make: Make, **arguments: Any) -> None:
    """log SNR is float64, exactly what was asked for at both ends, and reaches them without a
    jump."""
    for high, low in ENDS:
        schedule = make(high, low, **arguments)
        log_snr = schedule.log_snr(torch.tensor([0.0, 1.0])).detach()
        assert log_snr.dtype == torch.float64, f"log SNR is {log_snr.dtype}, not float64"
        assert log_snr.tolist() == [high, low], f"ends {log_snr.tolist()}, asked for {[high, low]}"
        assert schedule.ends == (high, low), f"ends {schedule.ends}, asked for {(high, low)}"
        within = torch.tensor([high - 1e-2, low + 1e-2], dtype=torch.float64)
        near = schedule.log_snr(schedule.inverse(within))
        assert torch.allclose(near, within, rtol=0, atol=1e-3), f"a jump at an end: {near.tolist()}"


def falls_strictly(make: Make, **arguments: Any) -> None:
    """More time, less signal."""
    for ends in ENDS:
        log_snr = make(*ends, **arguments).log_snr(torch.linspace(0, 1, 1001))
        assert log_snr.isfinite().all(), "log SNR is not finite"
        assert (log_snr.diff() < 0).all(), "log SNR does not fall everywhere"


def variance_preserving(make: Make, **arguments: Any) -> None:
    """alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = SNR = exp(log SNR)."""
    for ends in ENDS:
        schedule, t = make(*ends, **arguments), torch.linspace(0, 1, 101)
        alpha, sigma, snr = schedule.alpha(t), schedule.sigma(t), schedule.snr(t)
        one = torch.ones_like(alpha)
        assert torch.allclose(alpha**2 + sigma**2, one, rtol=0, atol=1e-14), "variance is not 1"
        assert torch.allclose(alpha**2 / sigma**2, snr, rtol=1e-10), "SNR is not alpha^2 / sigma^2"
        assert torch.allclose(snr.log(), schedule.log_snr(t), atol=1e-10), "SNR is not exp(log SNR)"


def slope_is_minus_the_derivative(make: Make, **arguments: Any) -> None:
    """`slope` = -d log SNR / dt, also at both ends, and positive between them."""
    for ends in ENDS:
        schedule = make(*ends, **arguments)
        within = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
        t = torch.cat([torch.zeros(1), within, torch.ones(1)]).requires_grad_()
        (derivative,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
        slope = schedule.slope(t)
        assert (slope[1:-1] > 0).all(), "slope is not positive"
        assert torch.allclose(slope, -derivative, rtol=1e-8), "slope is not -d log SNR / dt"


def inverse_undoes_log_snr(make: Make, **arguments: Any) -> None:
    """`inverse(log_snr(t))` = t, and times outside are clamped."""
    for high, low in ENDS:
        schedule, t = make(high, low, **arguments), torch.linspace(0, 1, 101, dtype=torch.float64)
        again = schedule.inverse(schedule.log_snr(t))
        assert torch.allclose(again, t, rtol=0, atol=1e-9), "inverse(log_snr(t)) is not t"
        beyond = schedule.inverse(torch.tensor([high + 1, low - 1], dtype=torch.float64))
        assert beyond.tolist() == [0, 1], "inverse does not clamp beyond the ends"


SCHEDULE_LAWS = (
    exact_ends,
    falls_strictly,
    variance_preserving,
    slope_is_minus_the_derivative,
    inverse_undoes_log_snr,
)
