"""Laws of samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfw.diffusion.grid import LogSNRGrid, TimeGrid
from genfw.diffusion.sampler import Sampler
from genfw.noise import Noise
from genfw.schedule import Cosine, NoiseSchedule
from genfw.testing.oracles import FiniteDenoiser, GaussianDenoiser

Make = Callable[..., Sampler]
"""Builds a sampler from `steps`, `grid` and arguments of its own."""


def asks_as_often_as_it_says(make: Make, **arguments: Any) -> None:
    """`evaluations` calls of the denoiser; `path` has a step for each interval of the grid."""
    sampler, denoiser = make(steps=5, **arguments), _gaussian()
    asked: list[int] = []
    with denoiser.register_forward_hook(lambda *_: asked.append(1)):
        path = list(sampler.path(denoiser, _start(2), noise=_noise(2)))
    assert len(asked) == sampler.evaluations, (
        f"the denoiser is asked {len(asked)} times, evaluations says {sampler.evaluations}"
    )
    stops = torch.stack([step.s for step in path])
    assert torch.equal(stops, sampler.times(denoiser.schedule)[1:]), "the path leaves its grid"


def leans_on_no_more_of_the_past_than_it_remembers(make: Make, **arguments: Any) -> None:
    """A step that is given more predictions than `remembers` is the same as from the latest."""
    remembers, denoiser = make(steps=1, **arguments).remembers, _gaussian()
    sampler = make(steps=remembers + 4, **arguments)
    path = list(sampler.path(denoiser, _start(2), noise=_noise(2)))[: remembers + 2]
    t, s = sampler.times(denoiser.schedule)[remembers + 2 : remembers + 4]
    past = tuple(step.prediction for step in path)
    whole, part = (
        sampler.step(denoiser, path[-1].z, t, s, None, noise=_noise(2), past=given)[0]
        for given in (past, past[2:])
    )
    assert torch.equal(whole, part), f"leans on more of the past than remembers={remembers}"


def a_sample_keeps_its_number(make: Make, **arguments: Any) -> None:
    """With keyed noise and labels, whatever its batch, its place in it and what was drawn before:
    samplers hold no state."""
    sampler, denoiser = make(steps=6, **arguments), _gaussian()
    z, y = _start(8), torch.arange(8) % 3
    whole, again = (sampler(denoiser, z, y, noise=_noise(8)) for _ in range(2))
    assert torch.equal(again, whole), "a sample depends on the run before"
    some = torch.tensor([5, 0, 3])
    part = sampler(denoiser, z[some], y[some], noise=Noise(0, some))
    close = torch.allclose(part, whole[some], rtol=1e-9, atol=1e-9)
    assert close, "a sample depends on its batch"


def every_schedule_grid_and_precision_will_do(make: Make, **arguments: Any) -> None:
    """Samples are finite, of z's shape and dtype, and float32 is near float64."""
    for schedule in (cls(13.0, -10.0) for cls in NoiseSchedule.registry.values()):
        for grid in (cls() for cls in TimeGrid.registry.values()):
            drawn = []
            for dtype in (torch.float64, torch.float32):
                z = _start(3).to(dtype)
                denoiser = GaussianDenoiser(schedule, 0.3, 0.4)
                drawn.append(make(steps=3, grid=grid, **arguments)(denoiser, z, noise=_noise(3)))
                said = f"under {schedule} on {grid} in {dtype}"
                assert drawn[-1].dtype == dtype, f"samples are {drawn[-1].dtype} {said}"
                assert drawn[-1].shape == z.shape, f"another shape {said}"
                assert drawn[-1].isfinite().all(), f"samples are not finite {said}"
            exact, found = drawn
            near = (found - exact).abs().max() < 1e-3 * (1 + exact.abs().max())
            assert near, f"float32 is far from float64 under {schedule} on {grid}"


def lands_on_the_data(make: Make, **arguments: Any) -> None:
    """With the ideal denoiser of a finite data set samples are its points, and every point
    occurs."""
    schedule = Cosine(12.0, -12.0)
    points = torch.randn(5, *SHAPE, generator=_made(1), dtype=torch.float64)
    sampler = make(steps=100, grid=LogSNRGrid(), **arguments)
    z = sampler(FiniteDenoiser(schedule, points), _start(64), noise=_noise(64))
    away = (z[:, None] / schedule.alpha(torch.zeros(())) - points).flatten(2).norm(dim=2)
    assert away.min(1).values.max() < 0.05, "samples are no training points"
    assert len(away.argmin(1).unique()) == len(points), "some training points never occur"


def has_the_mean_and_variance_of_the_data(make: Make, **arguments: Any) -> None:
    """With the exact denoiser of Gaussian data, to five standard errors, per label."""
    n, steps = 3000, 200
    sampler, denoiser = make(steps=steps, grid=LogSNRGrid(), **arguments), _gaussian()
    y = torch.arange(n) % 2
    z = sampler(denoiser, _start(n), y, noise=_noise(n)) / denoiser.schedule.alpha(torch.zeros(()))
    for label in (0, 1):
        x = z[y == label]
        error = STD / x.numel() ** 0.5
        mean, std = float(x.mean()), float(x.std())
        said = f"{mean:.4f} +- {error:.4f}, data {MEAN + label:.4f}"
        assert abs(mean - MEAN - label) < 5 * error, f"mean of the samples {said}"
        said = f"{std:.4f} +- {error / 2**0.5:.4f}, data {STD:.4f}"
        assert abs(std - STD) < 5 * error / 2**0.5, f"deviation of the samples {said}"


SAMPLER_LAWS = (
    asks_as_often_as_it_says,
    a_sample_keeps_its_number,
    leans_on_no_more_of_the_past_than_it_remembers,
    every_schedule_grid_and_precision_will_do,
    lands_on_the_data,
    has_the_mean_and_variance_of_the_data,
)

SHAPE, MEAN, STD = (2, 2), 0.3, 0.4


def _gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(Cosine(9.0, -9.0), MEAN, STD)


def _start(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=_made(0), dtype=torch.float64)


def _noise(n: int) -> Noise:
    return Noise(0, torch.arange(n))


def _made(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
