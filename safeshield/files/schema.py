"""Rules that values from users and from files must keep, and records as JSON values."""

from __future__ import annotations

import dataclasses
import operator
import platform
from importlib.metadata import version
from typing import Any

import numpy as np


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


def json_values(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the fields of a dataclass as JSON values: whatever has an order becomes a list.

    ``json.dump(score.to_json(), file, indent=2)`` then writes what ``json.load`` gives back.

    >>> @dataclasses.dataclass
    ... class Pair:
    ...     ends: tuple[float, float]
    >>> json_values(Pair((0.0, 1.0)))
    {'ends': [0.0, 1.0]}
    """
    values: dict[str, Any] = _as_lists(dataclasses.asdict(record))
    return values


def _as_lists(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _as_lists(one) for key, one in value.items()}
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that every result rests on."""
    names = ("safeshield", "torch", "numpy", "gymnasium", "stable-baselines3")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


_LARGEST = float(np.finfo(np.float32).max)


def finite_number(value: object, what: str) -> float:
    """Return a number read from a file's header as a float that float32 can hold, too.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{what} must be finite numbers below {_LARGEST:.1e}")
    return float(value)
