"""The interface: a `step`, and the loop that all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genfw.check import at_least_one
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.grid import TimeGrid, UniformGrid
from genfw.noise import Draws, draws
from genfw.parameterization import Prediction
from genfw.registry import Registered
from genfw.schedule import NoiseSchedule
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
        grid: at which times; default even in t.

    To show progress, iterate over `path`; where somebody else does, as in `VDM.sample`, a forward
    hook on the denoiser sees every one of `evaluations` calls.
    """

    calls: int = 1
    """How often a step asks the denoiser."""

    remembers: int = 4
    """How many predictions of the steps before a step is given: enough for order 5."""

    def __init__(self, steps: int, grid: TimeGrid | None = None):
        super().__init__()
        self.steps = at_least_one("steps", steps)
        self.grid = UniformGrid() if grid is None else grid

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
        """From time t down to time s.

        Args:
            denoiser: z, t and y to a prediction; its schedule says what t and s mean.
            z: (b, ...), the latent at t.
            t, s: scalars, float64, s < t.
            y: labels (b,), or None.
            noise: this step's own: no other step draws the same.
            past: the predictions that the steps before returned, the oldest first: the latest
                `remembers` of them, fewer in the beginning.

        Returns:
            The latent at s, (b, ...), and the prediction that is remembered: in most samplers the
            one made at t.
        """

    @property
    def evaluations(self) -> int:
        """How often the denoiser is asked in all."""
        return self.steps * self.calls

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """The grid, (steps + 1,) float64, from 1 down to 0."""
        return self.grid(self.steps, schedule)

    def path(
        self, denoiser: Denoiser, z: Data, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Iterator[Step]:
        """Every step of the way, from z at t = 1 (b, ...) to z_0."""
        noise = draws(noise, z)
        past: deque[Prediction] = deque(maxlen=self.remembers)
        times = self.times(denoiser.schedule).to(z.device)
        for i, (t, s) in enumerate(pairwise(times)):
            here = noise.fold(f"z{self.steps - i}")
            z, prediction = self.step(denoiser, z, t, s, y, noise=here, past=tuple(past))
            past.append(prediction)
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
