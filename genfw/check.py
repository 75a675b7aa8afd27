"""Arguments, checked where they enter."""

from __future__ import annotations


def at_least(least: int, name: str, value: int) -> int:
    """`value`, which counts something.

    Raises:
        ValueError: it is no integer, or below `least`.

    Example:
        >>> at_least(2, "sets", 1)
        Traceback (most recent call last):
        ValueError: sets: expected an integer of at least 2, got 1
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def at_least_one(name: str, value: int) -> int:
    """The same, of what there must be one of."""
    return at_least(1, name, value)
