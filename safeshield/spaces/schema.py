"""Conversion of Gymnasium spaces to strict JSON and back, and the check that two spaces agree.

File headers are read with `space_from_json`, which checks every field. A header therefore cannot
cause an import of code, or an allocation of more elements than the limits on a whole space
(`files.reading`) allow.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.files.reading import SPACE_DEPTH, SPACE_MEMBERS, SPACE_NUMBERS

_MAX_DIMENSIONS = 32
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}
_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
}

JsonSpace = dict[str, Any]


def space_to_json(space: gym.Space[Any]) -> JsonSpace:
    """Return a space as plain JSON values: Box, Discrete, MultiDiscrete, MultiBinary or Dict.

    A bound that is the same in every dimension becomes one number, and any other bound a flat list
    in C order. Infinite bounds become ``"inf"`` and ``"-inf"``, because strict JSON has no
    infinities. `space_from_json` restores shape, dtype and every bound exactly.

    Raises:
        TypeError: The space is of another kind.

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
    if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)))
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": start.tolist()}
    if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
        return {"type": "MultiBinary", "n": int(space.shape[0])}
    if isinstance(space, gym.spaces.Dict):
        # A list of pairs keeps the order of the entries, which is the order of the columns.
        return {
            "type": "Dict",
            "spaces": [[key, space_to_json(part)] for key, part in space.spaces.items()],
        }
    raise TypeError(
        f"space must be a Box of numbers, Discrete, MultiDiscrete, MultiBinary or a Dict of these, "
        f"got {space!r}; flatten it first (gymnasium.wrappers.FlattenObservation)"
    )


def space_from_json(data: JsonSpace) -> gym.Space[Any]:
    """Return the space that `space_to_json` described as `data`, after a check of every field.

    Raises:
        ValueError: A field is missing, unknown, of a wrong type or out of range, or the whole space
            has more numbers, members or levels than the limits of `files.reading`.

    >>> space_from_json({"type": "Discrete", "n": 4, "start": 0})
    Discrete(4)
    >>> space_from_json({"type": "os.system"})
    Traceback (most recent call last):
    ...
    ValueError: space type must be one of Box, Dict, Discrete, MultiBinary, MultiDiscrete, got \
'os.system'
    """
    return _from_json(data, _Room())


class _Room:
    """What is left of the limits on a whole space, before any of its members is made."""

    def __init__(self) -> None:
        self.numbers = self.members = self.depth = 0

    def take(self, numbers: int) -> None:
        """Count the numbers of one member."""
        self.numbers += numbers
        SPACE_NUMBERS.check(self.numbers, "a space")

    def enter(self, members: int) -> None:
        """Count the members of a Dict, and its level."""
        self.members += members
        self.depth += 1
        SPACE_MEMBERS.check(self.members, "a space")
        SPACE_DEPTH.check(self.depth, "a space")


def _from_json(data: object, room: _Room) -> gym.Space[Any]:
    if not isinstance(data, dict):
        raise ValueError(f"a space must be a JSON object, got {type(data).__name__}")
    kind = data.get("type")
    if kind == "Box":
        _check_fields(data, {"type", "shape", "dtype", "low", "high"})
        return _box_from_json(data, room)
    if kind == "Discrete":
        _check_fields(data, {"type", "n", "start"})
        room.take(1)
        size = _integer(data["n"], "n", 1, 2**31 - 1)
        return gym.spaces.Discrete(size, start=_integer(data["start"], "start", -(2**31), 2**31))
    if kind == "MultiDiscrete":
        _check_fields(data, {"type", "nvec", "start"})
        counts = _integers(data["nvec"], "nvec", 1, 2**31 - 1, room)
        starts = _integers(data["start"], "start", -(2**31), 2**31, room)
        if len(counts) != len(starts):
            raise ValueError("MultiDiscrete needs as many starts as counts")
        if any(starts):
            return gym.spaces.MultiDiscrete(counts, start=starts)
        return gym.spaces.MultiDiscrete(counts)
    if kind == "MultiBinary":
        _check_fields(data, {"type", "n"})
        size = _integer(data["n"], "n", 1, 2**31 - 1)
        room.take(size)
        return gym.spaces.MultiBinary(size)
    if kind == "Dict":
        _check_fields(data, {"type", "spaces"})
        return _dict_from_json(data["spaces"], room)
    raise ValueError(
        "space type must be one of Box, Dict, Discrete, MultiBinary, MultiDiscrete, got "
        f"{_short(kind)}"
    )


def _dict_from_json(pairs: object, room: _Room) -> gym.spaces.Dict:
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f"a Dict space must have a list of entries, got {_short(pairs)}")
    room.enter(len(pairs))
    spaces: list[tuple[str, gym.Space[Any]]] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"an entry of a Dict space must be [name, space], got {_short(pair)}")
        spaces.append((pair[0], _from_json(pair[1], room)))
    room.depth -= 1
    if len({name for name, _ in spaces}) != len(spaces):
        raise ValueError("a Dict space must not have two entries of one name")
    # An OrderedDict, because Gymnasium sorts the entries of a plain dict.
    return gym.spaces.Dict(OrderedDict(spaces))


def check_same_space(
    expected: gym.Space[Any],
    actual: gym.Space[Any],
    what: str,
    *,
    unbounded_matches_any: bool = False,
    repair: str = "use the environment, with the same wrappers, that the log came from",
) -> None:
    """Raise unless the two spaces hold the same points, up to 1e-5 relative error in the bounds.

    The dtype of a Box is not compared: float32 and float64 boxes with the same bounds agree. A
    Dict agrees with one that has further entries.

    Args:
        expected: Space that a model or a log was made for.
        actual: Space that it is being used with.
        what: Name of the pair in the error message, for example ``"action_space"``.
        unbounded_matches_any: Whether an infinite bound in `expected` agrees with any bound. This
            is meant for observation spaces inferred from a log that stores none.
        repair: Advice at the end of the error message.

    Raises:
        ValueError: The spaces differ; the message shows both.

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
            f"{what} mismatch ({difference}): expected {expected!r}, got {actual!r}; {repair}"
        )


def part_of(space: gym.Space[Any], keys: Sequence[str] | None) -> gym.Space[Any]:
    """Return the chosen entries of a Dict space as a Dict space.

    Args:
        space: The space.
        keys: Names of the entries; None returns the space unchanged.

    Raises:
        ValueError: The space is not a Dict, or `keys` is empty or holds an unknown name.

    >>> part_of(gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Discrete(3)), ["b"])
    Dict('b': Discrete(3))
    """
    if keys is None:
        return space
    if not isinstance(space, gym.spaces.Dict) or not keys or not set(keys) <= set(space.spaces):
        known = list(space.spaces) if isinstance(space, gym.spaces.Dict) else "no Dict space"
        raise ValueError(f"observation_keys must be some of {known}, got {list(keys)}")
    return gym.spaces.Dict(OrderedDict((key, space.spaces[key]) for key in keys))


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
    if isinstance(expected, gym.spaces.Dict) and isinstance(actual, gym.spaces.Dict):
        # A model may use only some of the entries.
        for key, part in expected.spaces.items():
            if key not in actual.spaces:
                return f"entry {key!r} is missing"
            difference = _difference(part, actual.spaces[key], unbounded_matches_any)
            if difference is not None:
                return f"entry {key!r}: {difference}"
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


def _box_from_json(data: JsonSpace, room: _Room) -> gym.spaces.Box:
    dtype = _DTYPES.get(data["dtype"]) if isinstance(data["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"Box dtype must be one of {sorted(_DTYPES)}, got {_short(data['dtype'])}")
    sizes = data["shape"]
    if not isinstance(sizes, list) or len(sizes) > _MAX_DIMENSIONS:
        raise ValueError(
            f"Box shape must be a list of at most {_MAX_DIMENSIONS} integers, got {_short(sizes)}"
        )
    shape = tuple(_integer(size, "shape", 1, 2**62) for size in sizes)
    room.take(math.prod(shape))
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


def _integers(values: object, name: str, low: int, high: int, room: _Room) -> list[int]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of at least 1 integer")
    room.take(len(values))
    return [_integer(value, name, low, high) for value in values]


def _check_fields(data: JsonSpace, fields: set[str]) -> None:
    if set(data) != fields:
        raise ValueError(
            f"a {data['type']} space must have exactly the fields {sorted(fields)}, "
            f"got {_short(sorted(map(str, data)))}"
        )


def _short(value: object) -> str:
    # int.__repr__ raises an error for integers of more than 4300 digits.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "an integer beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
