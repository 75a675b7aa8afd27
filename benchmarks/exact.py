"""Gaussian data in 3 dimensions and their exact denoiser: what benchmarks measure without a run."""

from __future__ import annotations

import torch
from torch import Tensor

from genfw import Denoiser, NoiseSchedule, Prediction
from genfw.parameterization import broadcast

MEAN, STD = torch.tensor([0.4, -0.9, 0.1]).double(), torch.tensor([0.5, 0.2, 1.1]).double()


class Exact(Denoiser):
    """x_hat = (alpha s^2 z + sigma^2 m) / (alpha^2 s^2 + sigma^2)."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, z: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        alpha, sigma = (broadcast(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
        x = (alpha * STD**2 * z + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(x, (z - alpha * x) / sigma, alpha, sigma)
