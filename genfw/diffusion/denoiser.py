r"""Denoisers: what stands between a network and the diffusion process.

A denoiser takes a latent and its time and says what the data and the noise were, as one
`Prediction`. It owns the schedule, since time means nothing without one. Guidance wraps a denoiser
and is a denoiser; samplers and bounds see nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from genfw.bayes import DiscretePosterior
from genfw.model import as_read
from genfw.parameterization import DiscreteParameterization, Parameterization, Prediction, broadcast
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Labels, Time


class Denoiser(nn.Module, ABC):
    """E[x | z_t] and its equivalents, along a schedule."""

    schedule: NoiseSchedule

    @abstractmethod
    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        """What z (b, ...) at time t (scalar or (b,)) is made of."""

    def posterior(self, z: Data, t: Time, y: Labels | None = None) -> DiscretePosterior:
        """p(x | z) over the K values of every dimension, where the denoiser states one.

        Raises:
            TypeError: it does not.
        """
        raise TypeError(
            f"{type(self).__name__} says where x lies, not how likely each value is: use "
            "likelihood bins or discretized_gaussian, or param categorical"
        )


class Unlabelled(Denoiser):
    """Another, told no labels: what a model that has no classes is, also in guidance, to which
    labels may mean something."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        return self.denoiser(z, t, None)


class NetworkDenoiser(Denoiser):
    """A network, read by a parameterization along a schedule.

    Args:
        network: (z (b, C, ...), level (b,), y) -> (b, parameterization.channels(C, K), ...). It
            is given z times the parameterization's `input_scale`.
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
        return self.parameterization.solve(*self._read(z, t, y))

    def posterior(self, z: Data, t: Time, y: Labels | None = None) -> DiscretePosterior:
        """p(x | z) as the network's prior and the noise give it.

        Raises:
            TypeError: the parameterization states no masses.
        """
        if not isinstance(self.parameterization, DiscreteParameterization):
            return super().posterior(z, t, y)
        return self.parameterization.posterior(*self._read(z, t, y))

    def _read(self, z: Data, t: Time, y: Labels | None) -> tuple[Tensor, Data, Tensor, Tensor]:
        """The network's output, z, alpha and sigma."""
        log_snr = self.schedule.log_snr(t).to(z.device).expand(len(z))
        lowest, highest = self.schedule.log_snr_min, self.schedule.log_snr_max
        level = (log_snr - lowest) / (highest - lowest)
        alpha = broadcast(log_snr.sigmoid().sqrt(), z)
        sigma = broadcast((-log_snr).sigmoid().sqrt(), z)
        scaled = as_read(self.network, self.parameterization.input_scale(alpha, sigma) * z)
        level = level.to(torch.promote_types(scaled.dtype, torch.float32))
        return self.network(scaled, level, y).to(z.dtype), z, alpha, sigma
