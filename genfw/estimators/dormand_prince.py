r"""Ordinary differential equations, one per row of a batch, each solved as if it were alone.

.. math:: \frac{du}{ds} = f(s, u), \qquad s \in [0, 1]

Dormand-Prince 5(4): six new slopes a step, the last of them the first of the next step. The
solution of fifth order goes on; its distance from the embedded one of fourth order is what the step
is believed to be off. How large an error is, the problem says (`Size`).

References:
    A Family of Embedded Runge-Kutta Formulae, Dormand, Prince, 1980,
    https://doi.org/10.1016/0771-050X(80)90013-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Slope: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f: s (n,), u (n, m) and the rows (n,) of the batch they belong to, to du/ds (n, m)."""

Size: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What an error of u (n, m) at s (n,) is worth, (n,)."""

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
FIFTH_MINUS_FOURTH = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)

FIRST = 1 / 50  # the first step
SHARE = 1e-3  # steps shorter than this may be off as much as one of this length
SHORTEST = 1e-5  # a step that fails at this length is not tried at a shorter one
LENGTHS = 2.0 ** (torch.arange(-160, 1, dtype=torch.float64) / 8)
"""Those that a step may have: chosen freely, it would follow the last digit of f, which a row's
mates in a batch decide, and a digit's difference can grow tenfold from step to step."""


@dataclass(frozen=True)
class Solution:
    """u at s = 1, (n, m); its believed error, (n,), summed over steps; and how often f was asked,
    (n,)."""

    u: Tensor
    error: Tensor
    calls: Tensor


def fixed(f: Slope, u: Tensor, size: Size, steps: int) -> Solution:
    """`steps` equal steps."""
    rows = torch.arange(len(u), device=u.device)
    slope, error = f(torch.zeros_like(u[:, 0]), u, rows), torch.zeros_like(u[:, 0])
    for i in range(steps):
        s = torch.full_like(error, i / steps)
        u, slope, off = _step(f, s, u, slope, torch.full_like(s, 1 / steps), rows)
        error = error + size(off, s + 1 / steps)
    return Solution(u, error, torch.full_like(error, 1 + 6 * steps))


def adaptive(f: Slope, u: Tensor, size: Size, tolerance: float) -> Solution:
    """Steps of each row's own length, h of [0, 1], each off by h x `tolerance` at most, so that
    their errors add up to the tolerance.

    A step shorter than 1/1000 may be off as much as one of 1/1000: rounding errors of f do not
    shrink with the step. Where a step of 1e-5 is still too long (or f is not finite), the row is
    given up: its u is nan. A row that has arrived is not asked for again.
    """
    end, error, calls = u.clone(), torch.zeros_like(u[:, 0]), torch.ones_like(u[:, 0])
    rows, s = torch.arange(len(u), device=u.device), torch.zeros_like(error)
    slope, h = f(s, u, rows), torch.full_like(s, FIRST)
    lengths = LENGTHS.to(s)
    while len(rows):
        ahead, next_slope, off = _step(f, s, u, slope, h, rows)
        found = size(off, s + h)
        excess = (found / (tolerance * h.clamp_min(SHARE))).nan_to_num(torch.inf)
        good = excess <= 1
        lost = ~good & (h < SHORTEST)
        s, u = torch.where(good, s + h, s), torch.where(good[:, None], ahead, u)
        slope = torch.where(good[:, None], next_slope, slope)
        error[rows] += torch.where(good, found, 0.0)
        calls[rows] += 6
        end[rows] = torch.where(lost[:, None], torch.nan, u)
        wanted = h * (0.9 * excess.pow(-1 / 4)).clamp(0.2, 5)
        longest = lengths[torch.searchsorted(lengths, wanted, right=True).sub(1).clamp_min(0)]
        h = torch.minimum(longest, 1 - s)
        on = (s < 1) & ~lost
        rows, s, u, slope, h = rows[on], s[on], u[on], slope[on], h[on]
    return Solution(end, error, calls)


def _step(
    f: Slope, s: Tensor, u: Tensor, slope: Tensor, h: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u at s + h, its slope there, and what the step is believed to be off."""
    slopes, ahead = [slope], u
    for node, weights in zip(NODES, WEIGHTS, strict=True):
        ahead = u + h[:, None] * _sum(weights, slopes)
        slopes.append(f(s + node * h, ahead, rows))
    return ahead, slopes[-1], h[:, None] * _sum(FIFTH_MINUS_FOURTH, slopes)


def _sum(weights: Iterable[float], slopes: list[Tensor]) -> Tensor:
    return torch.stack([w * k for w, k in zip(weights, slopes, strict=True) if w]).sum(0)
