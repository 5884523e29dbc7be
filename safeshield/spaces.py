"""Gymnasium spaces as strict JSON, and the check that two spaces agree.

Headers of files are read with `space_from_json`: every field is checked, and nothing in a header
can name code to import or a size to allocate beyond `MAX_ELEMENTS`.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

MAX_ELEMENTS = 10_000_000
"""Most elements a Box read from a file may have."""

_MAX_DIMENSIONS = 32
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}
_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
}

JsonSpace = dict[str, Any]


def space_to_json(space: gym.Space[Any]) -> JsonSpace:
    """Describe a Box or Discrete space by plain JSON values.

    A bound that is the same in every dimension becomes one number, others a flat list in C order;
    infinite bounds become ``"inf"`` and ``"-inf"``, for strict JSON has no infinities. The round
    trip through `space_from_json` is exact in shape, dtype and every bound.

    Raises:
        TypeError: the space is neither a Box of numbers nor a Discrete.

    >>> space_to_json(gym.spaces.Box(-1.0, np.inf, (2,), np.float32))
    {'type': 'Box', 'shape': [2], 'dtype': 'float32', 'low': -1.0, 'high': 'inf'}
    >>> space_to_json(gym.spaces.Discrete(4))
    {'type': 'Discrete', 'n': 4, 'start': 0}
    """
    if isinstance(space, gym.spaces.Box) and space.dtype.name in _DTYPES:
        return {
            "type": "Box",
            "shape": [int(size) for size in space.shape],
            "dtype": space.dtype.name,
            "low": _bounds_to_json(space.low),
            "high": _bounds_to_json(space.high),
        }
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    raise TypeError(
        f"space must be a Box of numbers or a Discrete, got {space!r}; "
        "flatten it first (gymnasium.wrappers.FlattenObservation)"
    )


def space_from_json(data: JsonSpace) -> gym.Space[Any]:
    """Build the space that `space_to_json` described, trusting nothing.

    Raises:
        ValueError: a field is missing, unknown, of a wrong type or out of range, or the space has
            more than `MAX_ELEMENTS` elements.

    >>> space_from_json({"type": "Discrete", "n": 4, "start": 0})
    Discrete(4)
    >>> space_from_json({"type": "os.system"})
    Traceback (most recent call last):
    ...
    ValueError: space type must be 'Box' or 'Discrete', got 'os.system'
    """
    if not isinstance(data, dict):
        raise ValueError(f"a space must be a JSON object, got {type(data).__name__}")
    kind = data.get("type")
    if kind == "Box":
        _check_fields(data, {"type", "shape", "dtype", "low", "high"})
        return _box_from_json(data)
    if kind == "Discrete":
        _check_fields(data, {"type", "n", "start"})
        size = _integer(data["n"], "n", 1, 2**31 - 1)
        return gym.spaces.Discrete(size, start=_integer(data["start"], "start", -(2**31), 2**31))
    raise ValueError(f"space type must be 'Box' or 'Discrete', got {_short(kind)}")


def check_same_space(
    expected: gym.Space[Any],
    actual: gym.Space[Any],
    what: str,
    *,
    unbounded_matches_any: bool = False,
) -> None:
    """Raise unless the two spaces hold the same points, up to 1e-5 relative error in the bounds.

    The dtype of a Box is not compared: float32 and float64 boxes with the same bounds agree.

    Args:
        expected: what a model or a log was made for.
        actual: what it is being used with.
        what: names the pair in the error, for example ``"action_space"``.
        unbounded_matches_any: an infinite bound in `expected` states nothing and agrees with any.
            Meant for observation spaces inferred from a log that stores none.

    Raises:
        ValueError: they differ; the message shows both.

    >>> box = gym.spaces.Box(-1.0, 1.0, (2,))
    >>> check_same_space(box, gym.spaces.Box(-1.0, 1.0, (2,), np.float64), "action_space")
    >>> check_same_space(box, gym.spaces.Box(-2.0, 2.0, (2,)), "action_space")
    Traceback (most recent call last):
    ...
    ValueError: action_space mismatch (bounds): expected Box(-1.0, 1.0, (2,), float32), got \
Box(-2.0, 2.0, (2,), float32); use the environment, with the same wrappers, that the log came from
    """
    difference = _difference(expected, actual, unbounded_matches_any)
    if difference is not None:
        raise ValueError(
            f"{what} mismatch ({difference}): expected {expected!r}, got {actual!r}; use the "
            "environment, with the same wrappers, that the log came from"
        )


def flat_box(space: object, what: str) -> gym.spaces.Box:
    """Return `space`, a Box with one axis: all that a log or a flat network can take.

    Raises:
        TypeError: it is anything else; the message names it as `what`.

    >>> flat_box(gym.spaces.Discrete(2), "action_space")
    Traceback (most recent call last):
    ...
    TypeError: action_space must be a Box of shape (width,), got Discrete(2); flatten observations \
with gymnasium.wrappers.FlattenObservation, and use continuous actions
    """
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise TypeError(
            f"{what} must be a Box of shape (width,), got {space!r}; flatten observations with "
            "gymnasium.wrappers.FlattenObservation, and use continuous actions"
        )
    return space


def _difference(
    expected: gym.Space[Any], actual: gym.Space[Any], unbounded_matches_any: bool
) -> str | None:
    if isinstance(expected, gym.spaces.Box) and isinstance(actual, gym.spaces.Box):
        if expected.shape != actual.shape:
            return "shape"
        for one, other in ((expected.low, actual.low), (expected.high, actual.high)):
            same = np.isclose(one.astype(np.float64), other.astype(np.float64), rtol=1e-5)
            if unbounded_matches_any:
                same |= np.isinf(one)
            if not same.all():
                return "bounds"
        return None
    if isinstance(expected, gym.spaces.Discrete) and isinstance(actual, gym.spaces.Discrete):
        same_points = (expected.n, expected.start) == (actual.n, actual.start)
        return None if same_points else "values"
    if type(expected) is not type(actual):
        return "type"
    return None if expected == actual else "values"


def _bounds_to_json(bounds: npt.NDArray[Any]) -> object:
    values = [_number_to_json(value) for value in bounds.ravel().tolist()]
    return values[0] if values and all(value == values[0] for value in values) else values


def _number_to_json(value: float) -> float | str:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _box_from_json(data: JsonSpace) -> gym.spaces.Box:
    dtype = _DTYPES.get(data["dtype"]) if isinstance(data["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"Box dtype must be one of {sorted(_DTYPES)}, got {_short(data['dtype'])}")
    sizes = data["shape"]
    if not isinstance(sizes, list) or len(sizes) > _MAX_DIMENSIONS:
        raise ValueError(
            f"Box shape must be a list of at most {_MAX_DIMENSIONS} integers, got {_short(sizes)}"
        )
    shape = tuple(_integer(size, "shape", 1, MAX_ELEMENTS) for size in sizes)
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(
            f"Box shape must have at most {MAX_ELEMENTS} elements, got {math.prod(shape)}"
        )
    low = _bounds_from_json(data["low"], "low", shape, dtype)
    high = _bounds_from_json(data["high"], "high", shape, dtype)
    if (low > high).any() or (low == np.inf).any() or (high == -np.inf).any():
        raise ValueError("Box needs low <= high, low below inf and high above -inf everywhere")
    return gym.spaces.Box(low, high, shape, dtype.type)


def _bounds_from_json(
    data: object, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    if not isinstance(data, list):
        return np.full(shape, _bound(data, name, dtype), dtype)
    if len(data) != math.prod(shape):
        raise ValueError(
            f"Box {name} must be one number or {math.prod(shape)} of them, got {len(data)}"
        )
    return np.array([_bound(value, name, dtype) for value in data], dtype).reshape(shape)


def _bound(value: object, name: str, dtype: np.dtype[Any]) -> float:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return _integer(value, name, int(limits.min), int(limits.max))
    if isinstance(value, str) and value in _INFINITIES:
        return _INFINITIES[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Box {name} must hold numbers, 'inf' or '-inf', got {_short(value)}")
    if not abs(value) <= float(np.finfo(dtype).max):
        raise ValueError(f"Box {name} must fit in {dtype.name}, got {_short(value)}")
    return float(value)


def _integer(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {_short(value)}")
    return value


def _check_fields(data: JsonSpace, fields: set[str]) -> None:
    if set(data) != fields:
        raise ValueError(
            f"a {data['type']} space must have exactly the fields {sorted(fields)}, "
            f"got {_short(sorted(map(str, data)))}"
        )


def _short(value: object) -> str:
    # int.__repr__ refuses integers of more than 4300 digits.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "an integer beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
