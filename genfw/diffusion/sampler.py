r"""Samplers: from noise at t = 1 down to the first latent z_0.

A sampler is a `step` from time t to s < t; the loop over a grid of times is shared and keeps what
multi-step samplers need (`past`), so samplers hold no state. They see a `Denoiser` and nothing
else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.process import posterior
from genfw.noise import Draws, draws
from genfw.parameterization import Prediction
from genfw.registry import Registered
from genfw.types import Data, Labels


class Step(NamedTuple):
    """Where a sampler stands after a step: at time s, with latent z, having predicted `prediction`
    on the way."""

    s: Tensor
    z: Data
    prediction: Prediction


class Sampler(Registered, nn.Module, ABC, group="sampler"):
    """A way down the chain.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.steps = steps

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        """From z at time t to time s < t. `past` holds the predictions of the steps before, the
        latest last."""

    def times(self) -> Tensor:
        """The grid, (steps + 1,) float64, from 1 down to 0: uniform in t."""
        return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)

    def path(
        self, denoiser: Denoiser, z: Data, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Iterator[Step]:
        """Every step of the way, from z at t = 1 (b, ...) to z_0."""
        noise = draws(noise, z)
        past: tuple[Prediction, ...] = ()
        times = self.times().to(z.device)
        for i, (t, s) in enumerate(pairwise(times)):
            here = noise.fold(f"z{self.steps - i}")
            z, prediction = self.step(denoiser, z, t, s, y, noise=here, past=past)
            past = (*past[-3:], prediction)
            yield Step(s, z, prediction)

    @torch.no_grad()
    def forward(
        self, denoiser: Denoiser, z: Data, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Data:
        """z at t = 1 (b, ...) to z_0 (b, ...)."""
        for step in self.path(denoiser, z, y, noise=noise):
            z = step.z
        return z

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class Ancestral(Sampler, name="ancestral"):
    """The model's own chain: z_s from p(z_s | z_t) = q(z_s | z_t, x = x_hat). Luo (94)."""

    def __init__(self, steps: int = 256):
        super().__init__(steps)

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        prediction = denoiser(z, t, y)
        return posterior(z, prediction.x, s, t, denoiser.schedule).sample(noise), prediction
