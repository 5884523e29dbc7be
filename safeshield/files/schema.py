"""Checks of numbers in files, and conversion of records to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin

import numpy as np

from safeshield.files.settings import check, rules_of

_MOST_NUMBERS = 64
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LARGEST = float(np.finfo(np.float32).max)
R = TypeVar("R")


def whole(name: str, value: object, least: int) -> int:
    """Return `value` as an int, checked to be at least `least`. NumPy integers are accepted.

    `name` is the argument's name in error messages.

    Raises:
        KindError: The value is no whole number. A KindError is a TypeError and a ValueError.
        ValueError: The number is below `least`.

    >>> whole("steps", 3, least=1)
    3
    """
    number: int = check(name, int, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def finite_number(value: object, what: str) -> float:
    """Return a number from a file's header as a float, checked to be in the range of float32.

    `what` names the number in error messages.

    Raises:
        ValueError: The value is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{what} must be a finite number below {_LARGEST:.1e}, got {value!r:.60}")
    return float(value)


def json_values(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the fields of the dataclass `record` as JSON values. Tuples and lists become lists.

    ``json.load`` returns the same values that ``json.dump`` wrote.

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


def json_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments as JSON values that are the same in every process.

    A value that JSON cannot represent becomes a text. A class or function becomes its qualified
    name. A number that is not finite, or any other object, becomes its ``repr`` without memory
    addresses. A NumPy array of more than 64 entries becomes its shape, its type and a hash of its
    contents.

    >>> json_arguments({"gravity": 9.8, "wind": (0.5, float("inf")), "kind": float})
    {'gravity': 9.8, 'wind': [0.5, 'inf'], 'kind': 'builtins.float'}
    """
    return {str(name): _json_value(value) for name, value in arguments.items()}


def _json_value(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, np.ndarray) and value.size > _MOST_NUMBERS and not value.dtype.hasobject:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array {value.shape} {value.dtype} sha256 {digest[:16]}"
    if isinstance(value, np.ndarray | np.generic):
        return _json_value(value.tolist())
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return json_arguments(value)
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_json_value, value), key=repr)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))


def record_from_json(kind: type[R], data: object, what: str) -> R:
    """Return the dataclass whose JSON values `json_values` returned, after a check of every field.

    Fields with a default may be missing, because older files were written without them.

    Args:
        kind: Class of the result.
        data: The JSON values.
        what: Beginning of error messages, which names the source of the values.

    Raises:
        ValueError: A field is missing, unknown, of another type or out of range.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Pair:
    ...     ends: tuple[float, float]
    >>> record_from_json(Pair, {"ends": [0.0, 1.0]}, "header")
    Pair(ends=(0.0, 1.0))
    >>> record_from_json(Pair, {"end": 0.0}, "header")
    Traceback (most recent call last):
    ...
    ValueError: header: Pair must have the fields ['ends'], got ['end']
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what}: {kind.__name__} must be an object, got {type(data).__name__}")
    hints, fields = rules_of(cast("Any", kind)), dataclasses.fields(cast("Any", kind))
    needed = {one.name for one in fields if one.default is dataclasses.MISSING}
    if not needed <= set(data) <= set(hints):
        raise ValueError(
            f"{what}: {kind.__name__} must have the fields {sorted(hints)}, got {sorted(data)}"
        )
    return kind(**{name: _from_json(hints[name], data[name], what, name) for name in data})


def _from_json(hint: Any, value: object, what: str, name: str) -> Any:  # noqa: ANN401
    if hint is float:
        return finite_number(value, f"{what}: '{name}'")
    if dataclasses.is_dataclass(hint):
        return record_from_json(cast("type[Any]", hint), value, what)
    if value is None and NoneType in get_args(hint):
        return None
    hint = next((one for one in get_args(hint) if get_origin(one) is tuple), hint)
    item = (get_args(hint) or (None,))[0]
    if get_origin(hint) is tuple and dataclasses.is_dataclass(item):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{what}: '{name}' must be a list, got {type(value).__name__}")
        return tuple(record_from_json(cast("type[Any]", item), one, what) for one in value)
    return check(f"{what}: '{name}'", hint, value)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect every result."""
    names = ("safeshield", "torch", "numpy", "gymnasium", "stable-baselines3")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
