"""The laws of genfw's interfaces, for any class that implements one, also somebody else's:

    import pytest
    from genfw.testing import SCHEDULE_LAWS

    @pytest.mark.parametrize("law", SCHEDULE_LAWS)
    def test_power_is_a_schedule(law):
        law(Power, power=3.0)

or `check(Power, power=3.0)` for all of them at once. A law takes a class (or any function that
builds an object) and arguments for it, and raises an AssertionError that says what does not hold.
Laws of random quantities allow five standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.sampler import Sampler
from genfw.estimators.estimator import Estimator
from genfw.likelihood import Likelihood
from genfw.model import LatentModel
from genfw.models.posterior import Posterior
from genfw.parameterization import Parameterization
from genfw.schedule import NoiseSchedule
from genfw.testing.estimator import ESTIMATOR_LAWS as ESTIMATOR_LAWS
from genfw.testing.grid import GRID_LAWS as GRID_LAWS
from genfw.testing.likelihood import LIKELIHOOD_LAWS as LIKELIHOOD_LAWS
from genfw.testing.model import MODEL_LAWS as MODEL_LAWS
from genfw.testing.parameterization import PARAMETERIZATION_LAWS as PARAMETERIZATION_LAWS
from genfw.testing.posterior import POSTERIOR_LAWS as POSTERIOR_LAWS
from genfw.testing.sampler import SAMPLER_LAWS as SAMPLER_LAWS
from genfw.testing.schedule import SCHEDULE_LAWS as SCHEDULE_LAWS

LAWS: dict[type, tuple[Callable[..., None], ...]] = {
    NoiseSchedule: SCHEDULE_LAWS,
    Parameterization: PARAMETERIZATION_LAWS,
    Likelihood: LIKELIHOOD_LAWS,
    LatentModel: MODEL_LAWS,
    TimeGrid: GRID_LAWS,
    Sampler: SAMPLER_LAWS,
    Posterior: POSTERIOR_LAWS,
    Estimator: ESTIMATOR_LAWS,
}


CHOSEN = {NoiseSchedule: ("log_snr_max", "log_snr_min")}
"""What the laws give a class by themselves."""

NEEDED = {LatentModel: ("shape", "bins")}
"""What they must be told."""


def check(cls: Callable[..., Any], **arguments: Any) -> None:
    """Puts a class through all laws of its interface.

    Args:
        cls: a class; what a function builds goes through the laws one by one, `law(make, ...)`.
        arguments: for the constructor, but for what the laws choose: the end points of a schedule.

    Raises:
        AssertionError: the first law that does not hold.
        TypeError: no class, or one of no interface that has laws here; an argument too many or too
            few.
    """
    if not isinstance(cls, type):
        raise TypeError(
            f"check: expected a class, got {cls!r}: put what a function builds through the laws "
            "one by one, `for law in MODEL_LAWS: law(make, shape=(1, 2, 2), bins=3)`"
        )
    for interface, laws in LAWS.items():
        if issubclass(cls, interface):
            for name in CHOSEN.get(interface, ()):
                if name in arguments:
                    raise TypeError(f"check({cls.__name__}): the laws choose {name}; leave it out")
            for name in NEEDED.get(interface, ()):
                if name not in arguments:
                    raise TypeError(f"check({cls.__name__}): give {name}=, the smaller the better")
            for law in laws:
                law(cls, **arguments)
            return
    known = ", ".join(interface.__name__ for interface in LAWS)
    raise TypeError(f"{cls.__name__}: expected a subclass of one of {known}")
