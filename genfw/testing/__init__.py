"""The laws of genfw's interfaces, for any class that implements one, also somebody else's:

    import pytest
    from genfw.testing import SCHEDULE_LAWS

    @pytest.mark.parametrize("law", SCHEDULE_LAWS)
    def test_power_is_a_schedule(law):
        law(Power, power=3.0)

or `check(Power, power=3.0)` for all of them at once, `check(make, LatentModel, shape=(1, 2, 2),
bins=3)` for what a function builds. A law takes a class (or any such function) and arguments for
it, and raises an AssertionError that says what does not hold.
Laws of random quantities allow five standard errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.sampler import Sampler
from genfw.diffusion.times import TimeSampler
from genfw.estimators.estimator import Estimator
from genfw.likelihood import Likelihood
from genfw.model import LatentModel
from genfw.models.posterior import Posterior
from genfw.objective.objective import Objective
from genfw.parameterization import Parameterization
from genfw.schedule import NoiseSchedule
from genfw.testing.estimator import ESTIMATOR_LAWS as ESTIMATOR_LAWS
from genfw.testing.grid import GRID_LAWS as GRID_LAWS
from genfw.testing.likelihood import LIKELIHOOD_LAWS as LIKELIHOOD_LAWS
from genfw.testing.model import MODEL_LAWS as MODEL_LAWS
from genfw.testing.objective import OBJECTIVE_LAWS as OBJECTIVE_LAWS
from genfw.testing.parameterization import PARAMETERIZATION_LAWS as PARAMETERIZATION_LAWS
from genfw.testing.posterior import POSTERIOR_LAWS as POSTERIOR_LAWS
from genfw.testing.sampler import SAMPLER_LAWS as SAMPLER_LAWS
from genfw.testing.schedule import SCHEDULE_LAWS as SCHEDULE_LAWS
from genfw.testing.times import TIME_LAWS as TIME_LAWS

LAWS: dict[type, tuple[Callable[..., None], ...]] = {
    NoiseSchedule: SCHEDULE_LAWS,
    Parameterization: PARAMETERIZATION_LAWS,
    Likelihood: LIKELIHOOD_LAWS,
    LatentModel: MODEL_LAWS,
    TimeGrid: GRID_LAWS,
    Sampler: SAMPLER_LAWS,
    Posterior: POSTERIOR_LAWS,
    Objective: OBJECTIVE_LAWS,
    Estimator: ESTIMATOR_LAWS,
    TimeSampler: TIME_LAWS,
}


CHOSEN = {NoiseSchedule: ("log_snr_max", "log_snr_min"), Sampler: ("steps", "grid")}
"""What the laws give a class by themselves: a schedule its ends by position, all else by name."""

NEEDED = {LatentModel: ("shape", "bins")}
"""What they must be told."""


def check(make: Callable[..., Any], interface: type | None = None, /, **arguments: Any) -> None:
    """Puts a class, or what a function builds, through all laws of its interface.

    Args:
        make: a class, or a function of the same arguments.
        interface: whose laws; of a class that subclasses it, found by itself.
        arguments: for the constructor, but for what the laws choose: the end points of a schedule,
            `steps` and `grid` of a sampler.
            A model is built from `shape` and `bins`: one that takes networks needs a function,
            `check(make, LatentModel, shape=(1, 2, 2), bins=3)`. Likelihoods and discrete
            parameterizations are asked about data of as many values as they say, `bins`.

    Raises:
        AssertionError: the first law that does not hold.
        TypeError: one of no interface that has laws here; a function without its interface; an
            argument too many or too few.
    """
    interface = _interface(make) if interface is None else interface
    if interface not in LAWS:
        raise TypeError(f"{_named(interface)}: expected one of {_known()}")
    for name in CHOSEN.get(interface, ()):
        if name in arguments:
            raise TypeError(f"check({_named(make)}): the laws choose {name}; leave it out")
    for name in NEEDED.get(interface, ()):
        if name not in arguments:
            raise TypeError(f"check({_named(make)}): give {name}=, the smaller the better")
    _can_be_built(make, interface, arguments)
    for law in LAWS[interface]:
        law(make, **arguments)


def _interface(make: Callable[..., Any]) -> type:
    """The one that a class implements."""
    if not isinstance(make, type):
        raise TypeError(
            f"check: expected a class, got {make!r}: say what a function builds, "
            "`check(make, LatentModel, shape=(1, 2, 2), bins=3)`"
        )
    for interface in LAWS:
        if issubclass(make, interface):
            return interface
    raise TypeError(f"{make.__name__}: expected a subclass of one of {_known()}")


def _can_be_built(make: Callable[..., Any], interface: type, arguments: Mapping[str, Any]) -> None:
    """As the laws will build it."""
    chosen = CHOSEN.get(interface, ())
    by_position, by_name = (chosen, ()) if interface is NoiseSchedule else ((), chosen)
    try:
        inspect.signature(make).bind(*by_position, **dict.fromkeys(by_name), **arguments)
    except TypeError as error:
        said = ", ".join((*chosen, *arguments)) or "nothing"
        given = "".join(f", {name}={value!r}" for name, value in arguments.items())
        raise TypeError(
            f"check({_named(make)}): {_named(make)} cannot be built from {said} ({error}): give a "
            f"function that builds one, check(make, {interface.__name__}{given})"
        ) from None


def _named(make: Any) -> str:
    return getattr(make, "__name__", repr(make))


def _known() -> str:
    return ", ".join(interface.__name__ for interface in LAWS)
