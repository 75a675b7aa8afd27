"""Laws of time samplers: whatever the density of the draws, the integral is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from genfw.diffusion.denoising import Denoising
from genfw.diffusion.times import TimeSampler
from genfw.noise import Noise
from genfw.schedule import NoiseSchedule

Make = Callable[..., TimeSampler]
ENDS, CELLS = ((13.3, -10.0), (2.0, 1.0)), 4000


@torch.no_grad()
def integrals_over_log_snr_are_unbiased(make: Make, **arguments: Any) -> None:
    """E_u[-dlambda/du f(lambda)] is the integral of f from end to end, under every schedule, before
    training and when costs were seen; times are float64 in [0, 1]."""
    halves = _crowded(torch.linspace(0, 1, 2 * CELLS + 1, dtype=torch.float64))
    u, width = halves[1::2], halves[::2].diff()
    for times, schedule in _seen(make, arguments):
        t, measure = times(u, schedule)
        said = f"under {schedule}"
        assert t.dtype == measure.dtype == torch.float64, f"times are {t.dtype}, not float64"
        assert t.shape == measure.shape == u.shape, f"not one time per number {said}"
        assert t.min() >= 0 and t.max() <= 1, f"times outside [0, 1] {said}"
        low, high = schedule.log_snr_min, schedule.log_snr_max
        place = (schedule.log_snr(t) - low) / (high - low)
        for power in (0, 1, 3):
            mean = float((width * measure * place**power).sum() / (high - low))
            off = abs(mean * (power + 1) - 1)
            assert off < 2e-3, f"the integral of place^{power} is {off:.2%} off {said}"


@torch.no_grad()
def every_step_counts_once(make: Make, **arguments: Any) -> None:
    """Of T steps s -> t, measure makes up for how often each is drawn to expm1(what log SNR falls),
    and dt to 1 / T; times are ends of steps, float64."""
    halves, steps = _crowded(torch.linspace(0, 1, 2 * CELLS + 1, dtype=torch.float64)), 3
    u, width = halves[1::2], halves[::2].diff()
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    for times, schedule in _seen(make, arguments):
        t, measure, dt = times.in_steps(u, steps, schedule)
        assert torch.isin(t, ends[1:]).all(), f"times that end no step under {schedule}"
        gained = (-schedule.log_snr(ends).diff()).expm1()
        for k, end in enumerate(ends[1:]):
            here = width * (t == end)
            for name, value, whole in (("measure", measure, gained[k]), ("dt", dt, 1 / steps)):
                share = float((here * value).sum() / whole)
                assert abs(share - 1) < 0.05, (
                    f"step {k + 1} of {steps} counts {share:.3f} times by {name} under {schedule}"
                )


def draws_are_uniform_and_an_examples_own(make: Make, **arguments: Any) -> None:
    """u in [0, 1], (b,) float64, whatever the batch; its mean and square to five standard
    errors."""
    times, x = make(**arguments), torch.zeros(4000, 2)
    u = times.draw(Noise(0, torch.arange(len(x))), x)
    assert u.shape == (len(x),), f"u is {tuple(u.shape)} for {len(x)} examples"
    assert u.dtype == torch.float64, f"u is {u.dtype}, not float64"
    assert u.min() >= 0 and u.max() <= 1, "u is outside [0, 1]"
    for power in (1, 2):
        away = float((u**power).mean() - 1 / (power + 1))
        assert abs(away) < 5 * float((u**power).std()) / len(u) ** 0.5, "u is not uniform"
    some = torch.tensor([7, 2])
    assert torch.equal(times.draw(Noise(0, some), x[some]), u[some]), "u depends on the batch"


TIME_LAWS = (
    integrals_over_log_snr_are_unbiased,
    every_step_counts_once,
    draws_are_uniform_and_an_examples_own,
)


def after_training(times: TimeSampler, schedule: NoiseSchedule) -> TimeSampler:
    """The same, having seen costs that rise with noise."""
    u = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    t, measure = times.train()(u, schedule)
    times.observe(Denoising(t, schedule.log_snr(t), 0.1 + 3 * u**2, measure, u), schedule)
    return times.eval()


def _seen(make: Make, arguments: dict[str, Any]) -> Iterator[tuple[TimeSampler, NoiseSchedule]]:
    """Under every registered schedule that is built from its end points, new and trained."""
    for schedule in (cls(*ends) for cls in NoiseSchedule.registry.values() for ends in ENDS):
        times = make(**arguments)
        yield times.eval(), schedule
        yield after_training(times, schedule), schedule


def _crowded(s: Tensor) -> Tensor:
    """[0, 1] to itself, slow at both ends, where log SNR may be steep."""
    return s**8 / (s**8 + (1 - s) ** 8)
