r"""Which noise levels a random draw of the bound looks at.

.. math:: \tfrac12 \int \|\epsilon - \hat\epsilon\|^2 d\lambda
    = \tfrac12 E_u\left[-\frac{d\lambda}{du} \|\epsilon - \hat\epsilon\|^2\right],
    \quad u \sim U(0, 1)

for any falling map u -> lambda. The mean is the same for all; the variance is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from genfw.schedule import NoiseSchedule


class TimeSampler(nn.Module, ABC):
    """A map from u, uniform in [0, 1), to time."""

    @abstractmethod
    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """u (b,) to (t, -d log SNR / du), (b,) float64 each."""


class UniformTime(TimeSampler):
    """t = u: the schedule decides which noise levels are seen. For training."""

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        return u, schedule.slope(u)


class UniformLogSNR(TimeSampler):
    """log SNR uniform between the end points, whatever the schedule. For evaluation."""

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        span = schedule.log_snr_max - schedule.log_snr_min
        return schedule.inverse(schedule.log_snr_max - span * u), span + 0 * u
