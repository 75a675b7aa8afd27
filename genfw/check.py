"""Arguments, checked where they enter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import SupportsFloat, SupportsIndex


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
        ValueError: it is one of those, or no number.

    Example:
        >>> finite("shift", float("inf"))
        Traceback (most recent call last):
        ValueError: shift: expected a finite number, got inf
    """
    if not _is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """`value`, a finite number above 0.

    Raises:
        ValueError: it is not.

    Example:
        >>> positive("rho", 0.0)
        Traceback (most recent call last):
        ValueError: rho: expected a finite positive number, got 0.0
    """
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite positive number, got {value!r}")
    return value


def not_negative(name: str, value: float) -> float:
    """`value`, a finite number of at least 0.

    Raises:
        ValueError: it is not.

    Example:
        >>> not_negative("beta", float("inf"))
        Traceback (most recent call last):
        ValueError: beta: expected a finite number of at least 0, got inf
    """
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return value


def share(name: str, value: float) -> float:
    """`value`, a number in [0, 1].

    Raises:
        ValueError: it is not.

    Example:
        >>> share("eta", 1.1)
        Traceback (most recent call last):
        ValueError: eta: expected a number from 0 to 1, got 1.1
    """
    if not (_is_finite(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return value


def share_below_one(name: str, value: float) -> float:
    """`value`, a number in [0, 1).

    Raises:
        ValueError: it is not.

    Example:
        >>> share_below_one("decay", 1.0)
        Traceback (most recent call last):
        ValueError: decay: expected a number in [0, 1), got 1.0
    """
    if not (_is_finite(value) and 0 <= value < 1):
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return value


def _is_finite(value: float) -> bool:
    return isinstance(value, SupportsFloat) and math.isfinite(value)


def example_shape(
    shape: int | Sequence[int], rank: int | None = None, name: str = "shape"
) -> tuple[int, ...]:
    """`shape` as a tuple of positive integers; a number is a vector of that size.

    Raises:
        ValueError: it is empty or not of positive integers, or has another rank than asked for.

    Example:
        >>> example_shape(16), example_shape([1, 8, 8])
        ((16,), (1, 8, 8))
        >>> example_shape((3, 0), name="latents")
        Traceback (most recent call last):
        ValueError: latents: expected positive sizes (D,) or (C, *dims), got (3, 0)
    """
    found = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    sizes = all(isinstance(size, Integral) and size >= 1 for size in found)
    if not found or not sizes or (rank is not None and len(found) != rank):
        wanted = "(C, H, W)" if rank == 3 else "(D,) or (C, *dims)"
        raise ValueError(f"{name}: expected positive sizes {wanted}, got {shape!r}")
    return tuple(int(size) for size in found)
