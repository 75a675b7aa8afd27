r"""Denoisers: what stands between a network and the diffusion process.

A denoiser takes a latent and its time and says what the data and the noise were, as one
`Prediction`. It owns the schedule, since time means nothing without one. Guidance wraps a denoiser
and is a denoiser; samplers and bounds see nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from genfw.parameterization import Parameterization, Prediction, broadcast
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Labels, Time


class Denoiser(nn.Module, ABC):
    """E[x | z_t] and its equivalents, along a schedule."""

    schedule: NoiseSchedule

    @abstractmethod
    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        """What z (b, ...) at time t (scalar or (b,)) is made of."""


class NetworkDenoiser(Denoiser):
    """A network, read by a parameterization along a schedule.

    Args:
        network: (z (b, C, ...), level (b,), y) -> (b, parameterization.channels(C, K), ...).
            `level` is log SNR mapped to [0, 1] between the schedule's end points, 1 at the data
            side. The network never sees t, so the bound depends on the schedule through its end
            points alone.
        parameterization: what the output means.
        schedule: log SNR over time.
    """

    def __init__(
        self, network: nn.Module, parameterization: Parameterization, schedule: NoiseSchedule
    ):
        super().__init__()
        self.network, self.parameterization, self.schedule = network, parameterization, schedule

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        log_snr = self.schedule.log_snr(t).to(z.device).expand(len(z))
        lowest, highest = self.schedule.log_snr_min, self.schedule.log_snr_max
        level = (log_snr - lowest) / (highest - lowest)
        output = self.network(z, level.to(z.dtype), y).to(z.dtype)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return self.parameterization.solve(output, z, broadcast(alpha, z), broadcast(sigma, z))
