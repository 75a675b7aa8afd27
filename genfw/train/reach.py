r"""Which log SNR the curve of a schedule comes to, known before torch is imported.

Just below u = 1 a float64 stands every 1e-16: of a curve that falls without end there, only so much
is seen. A schedule's constructor looks for its end points on its curve and refuses one that it does
not find again, :math:`\lambda(u(\lambda)) \ne \lambda`, u being rounded. Here are the same formulas
as in `genfw.schedule.fixed`, for one number, so that a command line is answered and no run begun.
`LogLinear` and `Learned` have their ends by construction.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def comes_to(log_snr: float, target: str, **numbers: float) -> bool:
    """Whether the curve of this class, with these numbers of its own, comes to this log SNR; True
    of a class that is not on this page."""
    if target not in AGAIN:
        return True
    try:
        return abs(AGAIN[target](log_snr, **numbers) - log_snr) <= 1e-3
    except (ArithmeticError, ValueError):  # more than a float64 holds, or u = 0 or 1 itself
        return False


def linear(log_snr: float, beta_min: float = 0.1, beta_max: float = 20.0) -> float:
    area, half = max(-log_snr, 0) + math.log1p(math.exp(-abs(log_snr))), (beta_max - beta_min) / 2
    u = 2 * area / (beta_min + math.sqrt(beta_min**2 + 4 * half * area))
    area = beta_min * u + half * u**2
    return -area - math.log(-math.expm1(-area))


def cosine(log_snr: float, shift: float = 0.0) -> float:
    u = 2 / math.pi * math.atan(math.exp((shift - log_snr) / 2))
    return -2 * math.log(math.tan(math.pi / 2 * u)) + shift


def sigmoid(log_snr: float, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> float:
    w = (end - start) / (2 * tau)
    offset = _log_cosh(start / tau / 2) - _log_cosh(end / tau / 2)
    ratio = log_snr - offset  # log1p(2 sinh w / (e^ratio + e^-w)), without overflow
    u = _log_add(w + math.log(-math.expm1(-2 * w)) - _log_add(ratio, -w), 0.0) / (2 * w)
    return _log_sinh(w * (1 - u)) - _log_sinh(w * u) + offset


def log_normal(log_snr: float, p_mean: float = -1.2, p_std: float = 1.2) -> float:
    u = math.erfc((log_snr / 2 + p_mean) / p_std / math.sqrt(2)) / 2
    return -2 * (p_mean + p_std * NormalDist().inv_cdf(u))


def laplace(log_snr: float, mean: float = 0.0, scale: float = 0.5) -> float:
    x = (log_snr - mean) / scale
    share = math.exp(-abs(x)) / 2
    u = share if x > 0 else 1 - share
    return mean + scale * (-math.log(2 * u) if u < 0.5 else math.log(2 * (1 - u)))


AGAIN = {
    "genfw.Linear": linear,
    "genfw.Cosine": cosine,
    "genfw.Sigmoid": sigmoid,
    "genfw.LogNormal": log_normal,
    "genfw.Laplace": laplace,
}
"""lambda(u(lambda)) of each curve."""


def _log_add(x: float, y: float) -> float:
    return max(x, y) + math.log1p(math.exp(-abs(x - y)))


def _log_sinh(x: float) -> float:
    return x + math.log(-math.expm1(-2 * x)) - math.log(2)


def _log_cosh(x: float) -> float:
    return _log_add(x, -x) - math.log(2)
