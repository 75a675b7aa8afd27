r"""What a denoiser got wrong at one random time per example: the raw material of the bound and of
every objective.

The bound weighs the error by minus half the slope of log SNR,

.. math:: \tfrac12 E_t[-\lambda'(t) \|\epsilon - \hat\epsilon\|^2]
    = \tfrac12 \int \|\epsilon - \hat\epsilon\|^2 d\lambda;

other objectives put another weight there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from genfw.noise import Draws
from genfw.schedule import NoiseSchedule
from genfw.types import Image, Labels, Nats


@dataclass(frozen=True)
class Denoising:
    """One random time per example.

    Attributes:
        t: (b,) times, stratified.
        log_snr: (b,) float64.
        eps_error: (b,) ||eps - eps_hat||^2, summed over dimensions.
        measure: (b,) what turns a mean over draws into an integral over log SNR: -d log SNR / du
            for the uniform number u that t was made of; expm1(log SNR_s - log SNR_t) / p for a step
            that is drawn with probability p.
        dt: (b,) what turns it into an integral over t: dt / du, or 1 / (T p); 1 where t is uniform.
    """

    t: Tensor
    log_snr: Tensor
    eps_error: Nats
    measure: Tensor
    dt: Tensor

    def __post_init__(self) -> None:
        for hook in _hooks.values():
            hook(self)

    @property
    def cost(self) -> Nats:
        """(b,) nats: an unbiased draw of the denoising terms of the bound."""
        return (0.5 * self.measure * self.eps_error).to(self.eps_error.dtype)


def lowering_variance(measure: Tensor, error: Nats, schedule: NoiseSchedule) -> Tensor:
    r"""The measure of continuous time, with the gradients that a learned schedule asks for.

    With it the mean cost l = 1/2 measure error has in the end points of the schedule its own
    gradient, that of the bound, and in the schedule's shape that of the logarithm of its mean
    square over the batch,

    .. math:: \nabla \log E[l^2] = E[l^2\, \nabla \log g] / E[l^2], \quad
        \text{measure} = (\lambda_{max} - \lambda_{min})\, g,

    log SNR held still (see `genfw.schedule.learned`). It is no longer than the longest gradient of
    log g, however large the costs are; in small batches less of it is left, of one example only
    noise. Of a fixed schedule nothing changes.
    """
    span = schedule.log_snr_max - schedule.log_snr_min
    g = measure / span
    cost = (0.5 * measure * error).detach()
    share = cost / cost.square().mean().clamp_min(torch.finfo(cost.dtype).tiny)
    return span * (g.detach() + share * (g - g.detach()))


@runtime_checkable
class Denoises(Protocol):
    """A model that learns by denoising."""

    def denoising(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Denoising: ...


def register_denoising_hook(hook: Callable[[Denoising], None]) -> RemovableHandle:
    """Shows `hook` every `Denoising` that is drawn from now on, by whatever model and for whatever
    purpose, until `handle.remove()`; as torch's global module hooks."""
    handle = RemovableHandle(_hooks)
    _hooks[handle.id] = hook
    return handle


_hooks: OrderedDict[int, Callable[[Denoising], None]] = OrderedDict()
