"""Arguments, checked where they enter."""

from __future__ import annotations

import math
from numbers import Integral
from typing import SupportsIndex


def at_least(least: int, name: str, value: SupportsIndex) -> int:
    """`value`, which counts something, as Python's int: numpy's are taken too.

    Raises:
        ValueError: it is no integer, or below `least`.

    Example:
        >>> import numpy as np
        >>> at_least(1, "dims", np.prod((3, 2)))
        6
        >>> at_least(2, "sets", 1)
        Traceback (most recent call last):
        ValueError: sets: expected an integer of at least 2, got 1
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return int(value)


def at_least_one(name: str, value: SupportsIndex) -> int:
    """The same, of what there must be one of."""
    return at_least(1, name, value)


def finite(name: str, value: float) -> float:
    """`value`, any number but nan and the infinite ones.

    Raises:
        ValueError: it is one of those.

    Example:
        >>> finite("shift", float("inf"))
        Traceback (most recent call last):
        ValueError: shift: expected a finite number, got inf
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value
