r"""At which times a sampler stops on its way from t = 1 to t = 0.

Between the ends, stop i of N lies where

| name    | is even in                                  |
|---------|---------------------------------------------|
| uniform | t: the schedule decides                     |
| angle   | arctan(sigma / alpha), whatever the schedule |
| log_snr | log SNR, whatever the schedule              |
| karras  | (sigma / alpha)^(1/rho), whatever the schedule |

Grids are float64, begin at exactly 1, end at exactly 0 and fall strictly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from genfw.check import positive
from genfw.registry import Registered
from genfw.schedule import NoiseSchedule


class TimeGrid(Registered, nn.Module, ABC, group="grid"):
    """Where to stop."""

    @abstractmethod
    def between(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Times of the stops that lie the shares u in (0, 1) of the way, falling with u."""

    @torch.no_grad()
    def forward(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        """(steps + 1,) float64, from 1 down to 0, on the schedule's device."""
        device = torch.as_tensor(schedule.log_snr_max).device
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)
        times = 1 - u
        times[1:-1] = self.between(u[1:-1], schedule)
        return times


class UniformGrid(TimeGrid, name="uniform"):
    """Even in t, as the hierarchy of T steps is read."""

    def between(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return 1 - u


class LogSNRGrid(TimeGrid, name="log_snr"):
    """Even in log SNR: what the exponential integrators (DDIM, DPM-Solver, UniPC) step in.

    References:
        DPM-Solver, Lu, Zhou, Bao, Chen, Li, Zhu, 2022, https://arxiv.org/abs/2206.00927.
    """

    def between(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        highest, lowest = schedule.ends
        return schedule.inverse(lowest + (highest - lowest) * u)


class AngleGrid(TimeGrid, name="angle"):
    r"""Even in the angle :math:`\phi = \arctan(\sigma / \alpha) = \arctan e^{-\lambda / 2}`, as the
    uniform grid of the cosine schedule is.

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models, Salimans, Ho, 2022,
        https://arxiv.org/abs/2202.00512.
    """

    def between(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        ends = torch.tensor(schedule.ends, dtype=torch.float64)
        low, high = (-ends / 2).exp().atan().tolist()
        return schedule.inverse(-2 * ((1 - u) * high + u * low).tan().log())


class KarrasGrid(TimeGrid, name="karras"):
    r"""Even in a root of the noise level :math:`n = \sigma / \alpha = e^{-\lambda / 2}`.

    .. math:: n_i^{1/\rho} = (1 - \tfrac iN)\, n_{max}^{1/\rho} + \tfrac iN\, n_{min}^{1/\rho}

    Args:
        rho: 1 is even in the noise level itself; the larger, the nearer to `log_snr`.

    Raises:
        ValueError: rho not positive.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras, Aittala, Aila,
        Laine, 2022, https://arxiv.org/abs/2206.00364.
    """

    def __init__(self, rho: float = 7.0):
        super().__init__()
        self.rho = positive("rho", rho)

    def between(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        # log n^(1/rho): the power itself may be beyond any number
        low, high = (-end / (2 * self.rho) for end in schedule.ends)
        root = torch.logaddexp((-u).log1p() + high, u.log() + low)
        return schedule.inverse(-2 * self.rho * root)

    def extra_repr(self) -> str:
        return f"rho={self.rho:g}"
