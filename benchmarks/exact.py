"""Gaussian data in 3 dimensions and their exact denoiser: what benchmarks measure without a run."""

from __future__ import annotations

import torch

from genfw import NoiseSchedule
from genfw.testing.oracles import GaussianDenoiser

MEAN, STD = torch.tensor([0.4, -0.9, 0.1]).double(), torch.tensor([0.5, 0.2, 1.1]).double()


def exact(schedule: NoiseSchedule) -> GaussianDenoiser:
    return GaussianDenoiser(schedule, MEAN, STD)
