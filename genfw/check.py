"""Arguments, checked where they enter."""

from __future__ import annotations


def at_least_one(name: str, value: int) -> int:
    """`value`, which counts something.

    Raises:
        ValueError: it is no integer, or below 1.

    Example:
        >>> at_least_one("k", 0)
        Traceback (most recent call last):
        ValueError: k: expected an integer of at least 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value
