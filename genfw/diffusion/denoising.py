r"""What a denoiser got wrong at one random time per example: the raw material of the bound and of
every objective.

The bound weighs the error by minus half the slope of log SNR,

.. math:: \tfrac12 E_t[-\lambda'(t) \|\epsilon - \hat\epsilon\|^2]
    = \tfrac12 \int \|\epsilon - \hat\epsilon\|^2 d\lambda;

other objectives put another weight there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from genfw.noise import Draws
from genfw.types import Image, Labels, Nats


@dataclass(frozen=True)
class Denoising:
    """One random time per example.

    Attributes:
        t: (b,) times, stratified.
        log_snr: (b,) float64.
        eps_error: (b,) ||eps - eps_hat||^2, summed over dimensions.
        measure: (b,) what turns a mean over draws into an integral over log SNR: -d log SNR / du
            for the uniform number u that t was made of; T expm1(log SNR_s - log SNR_t) in T steps.
        dt: (b,) what turns it into an integral over t: dt / du; 1 where t is uniform.
    """

    t: Tensor
    log_snr: Tensor
    eps_error: Nats
    measure: Tensor
    dt: Tensor

    @property
    def cost(self) -> Nats:
        """(b,) nats: an unbiased draw of the denoising terms of the bound."""
        return (0.5 * self.measure * self.eps_error).to(self.eps_error.dtype)


@runtime_checkable
class Denoises(Protocol):
    """A model that learns by denoising."""

    def denoising(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Denoising: ...
