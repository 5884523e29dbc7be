"""Rules that arguments of many functions share; each error names argument, rule and value."""

from __future__ import annotations

import operator


def whole(name: str, value: object, least: int) -> int:
    """Return a whole number of at least `least`; NumPy's integers are such numbers too.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`.

    >>> whole("steps", 3, least=1)
    3
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
