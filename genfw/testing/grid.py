"""Laws of step grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genfw.diffusion.grid import TimeGrid
from genfw.schedule import NoiseSchedule

Make = Callable[..., TimeGrid]
ENDS, STEPS = ((13.3, -10.0), (14.0, -14.0), (2.0, 1.0)), (1, 2, 7, 1000)


def falls_from_one_to_zero(make: Make, **arguments: Any) -> None:
    """(steps + 1,) float64 times, the ends exact, under every schedule; so does log SNR rise."""
    for schedule in _schedules():
        for steps in STEPS:
            times = make(**arguments)(steps, schedule)
            said = f"{steps} steps of {schedule}"
            assert times.shape == (steps + 1,), f"{tuple(times.shape)} times for {said}"
            assert times.dtype == torch.float64, f"times are {times.dtype}, not float64"
            assert times[0] == 1 and times[-1] == 0, f"{said} do not go from 1 to 0"
            assert not times.requires_grad, "times carry a gradient"
            assert (times.diff() < 0).all(), f"times do not fall: {said}"
            assert (schedule.log_snr(times).diff() > 0).all(), f"log SNR does not rise: {said}"


GRID_LAWS = (falls_from_one_to_zero,)


def _schedules() -> list[NoiseSchedule]:
    """Every registered schedule that is built from its end points, at several of them."""
    return [cls(*ends) for cls in NoiseSchedule.registry.values() for ends in ENDS]
