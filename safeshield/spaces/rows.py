"""Conversion of points of Gymnasium spaces to rows of numbers and back.

All internal computations use rows. A row holds the numbers of one observation or action in the
space's own units: the entries of a Box in C order, the integers of a Discrete, MultiDiscrete or
MultiBinary unchanged, and the parts of a Dict one after the other. `spaces.scaling` converts rows
to the inputs of the networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.spaces.batches import Batch
from safeshield.spaces.shapes import Flags, Points, Rows

Array = npt.NDArray[Any]

MAX_CHOICES = 1024
"""Largest number of combinations of a discrete action space; all are evaluated at once."""

_PARTS = "Box (any shape), Discrete, MultiDiscrete, MultiBinary"
OBSERVATIONS = f"{_PARTS} and Dict of these"
ACTIONS = f"bounded {_PARTS} with at most {MAX_CHOICES} combinations"


@dataclass(frozen=True, eq=False)
class SpaceCodec:
    """Converter between the points of one space and rows of numbers.

    `space` is the space. A Dict space names the entries that are used. The points may have further
    entries, which are ignored.

    >>> space = gym.spaces.Dict({"at": gym.spaces.Discrete(5), "v": gym.spaces.Box(0, 1)})
    >>> flat = SpaceCodec(space)
    >>> flat.width, flat.categories
    (2, (5, 0))
    >>> rows, single = flat.flatten({"at": 3, "v": [0.5], "unused": None})
    >>> rows.tolist(), single
    ([[3.0, 0.5]], True)
    """

    space: gym.Space[Any]

    @cached_property
    def width(self) -> int:
        """Number of columns of a row."""
        return len(self.low)

    @cached_property
    def categories(self) -> tuple[int, ...]:
        """Number of integer values of each column, counted from `low`; 0 for a continuous one."""
        return tuple(n for part in _leaves(self.space) for n in _columns(part)[2])

    @cached_property
    def low(self) -> npt.NDArray[np.float64]:
        """(width,) lower bounds of the columns, in the space's units."""
        return np.concatenate([_columns(part)[0] for part in _leaves(self.space)])

    @cached_property
    def high(self) -> npt.NDArray[np.float64]:
        """(width,) upper bounds of the columns, in the space's units."""
        return np.concatenate([_columns(part)[1] for part in _leaves(self.space)])

    @cached_property
    def discrete(self) -> bool:
        """Whether every column is an integer with finitely many values."""
        return all(self.categories)

    def flatten(self, points: Batch, what: str = "point") -> tuple[Rows, bool]:
        """Return one point, or a batch of n points, as rows.

        Args:
            points: One point or a batch.
            what: Name of the argument in error messages.

        Returns:
            The rows (n, width), and whether `points` was a single point.

        Raises:
            ValueError: The points have another shape, are not numbers, or lack an entry of a Dict.
        """
        if not self._nested:
            return _rows_of(points, self.space, what)
        parts = [_rows_of(part, space, what) for part, space in _pairs(points, self.space, what)]
        singles = {single for _, single in parts}
        lengths = {len(rows) for rows, _ in parts}
        if len(singles) > 1 or len(lengths) > 1:
            raise ValueError(f"the entries of one {what} must be of one point or of n alike")
        return np.concatenate([rows for rows, _ in parts], axis=1), singles.pop()

    def unflatten(self, rows: Rows) -> Array:
        """Return `rows` (n, width) as a batch of n points of a space without Dicts."""
        shape = self.space.shape
        if shape is None:
            raise TypeError(f"no batch of points can be made for {self.space}")
        out = rows.reshape(len(rows), *shape)
        return np.rint(out).astype(self.space.dtype) if self.discrete else out

    def batch(self, rows: Rows) -> Batch:
        """Return rows (n, width) as a batch of points of any space, Dict spaces included.

        The columns of a row share one dtype. In the batch each entry of a Dict has the dtype of
        its own space again.

        >>> space = gym.spaces.Dict({"at": gym.spaces.Discrete(5), "v": gym.spaces.Box(0, 1)})
        >>> SpaceCodec(space).batch(np.array([[3, 0.5], [0, 0.25]]))["at"]
        array([3, 0])
        """
        if not isinstance(self.space, gym.spaces.Dict):
            return self.unflatten(rows)
        batch: dict[str, Batch] = {}
        start = 0
        for key, space in self.space.spaces.items():
            part = SpaceCodec(space)
            batch[key] = part.batch(rows[:, start : start + part.width])
            if isinstance(space, gym.spaces.Box):
                batch[key] = batch[key].astype(space.dtype)
            start += part.width
        return batch

    def contains(self, rows: Points) -> Flags:
        """Return a mask (...) of the rows (..., width) that lie in the space.

        A row lies in the space if it is within the bounds and its discrete columns are integers.
        A row with a NaN does not.
        """
        inside = (rows >= self.low) & (rows <= self.high)
        counts = np.array(self.categories, dtype=bool)
        if counts.any():
            inside &= ~counts | (np.floor(rows) == rows)
        return np.asarray(inside.all(axis=-1))

    @cached_property
    def _nested(self) -> bool:
        return isinstance(self.space, gym.spaces.Dict)

    @property
    def nothing(self) -> Array:
        """Placeholder for "no action yet": NaN in a Box, an integer below the range elsewhere."""
        shape = self.space.shape or ()
        if self.discrete:
            return np.full(shape, int(self.low.min()) - 1, np.int64)
        return np.full(shape, np.nan, np.float32)

    @cached_property
    def choices(self) -> npt.NDArray[np.float32]:
        """(c, width) all c points of a discrete space."""
        ranges = [np.arange(n) + low for n, low in zip(self.categories, self.low, strict=True)]
        grid = np.meshgrid(*ranges, indexing="ij")
        return np.stack([axis.ravel() for axis in grid], axis=-1).astype(np.float32)

    def choice_index(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the indices (...) into `choices` of discrete points, rows (..., width)."""
        digits = np.moveaxis(np.rint(rows - self.low).astype(np.int64), -1, 0)
        # In `choices` the last column varies fastest.
        index: npt.NDArray[np.int64] = np.ravel_multi_index(tuple(digits), self.categories)
        return index


def flat_observations(space: gym.Space[Any], what: str = "observation_space") -> SpaceCodec:
    """Return the converter of an observation space, after a check that the space is supported.

    Args:
        space: Space of one observation.
        what: Name of the argument in error messages.

    Raises:
        TypeError: The space is of an unsupported kind or empty; the message lists the supported
            kinds.
    """
    flat = SpaceCodec(space)
    try:
        empty = flat.width == 0
    except TypeError as error:
        raise TypeError(f"{what} must be {OBSERVATIONS}, got {space!r}; {error}") from None
    if empty:
        raise TypeError(f"{what} must not be empty, got {space!r}")
    return flat


def flat_actions(space: gym.Space[Any], what: str = "action_space") -> SpaceCodec:
    """Return the converter of an action space, after a check that the space is supported.

    Args:
        space: Space of one action.
        what: Name of the argument in error messages.

    Raises:
        TypeError: The space is of an unsupported kind or has too many combinations; the message
            lists the supported kinds.

    >>> flat_actions(gym.spaces.Tuple([gym.spaces.Discrete(2)]))
    Traceback (most recent call last):
    ...
    TypeError: action_space must be bounded Box (any shape), Discrete, MultiDiscrete, MultiBinary \
with at most 1024 combinations, got Tuple(Discrete(2))
    """
    flat = SpaceCodec(space)
    supported = isinstance(space, _LEAVES) and flat.width > 0
    if supported and flat.discrete:
        supported = math.prod(flat.categories) <= MAX_CHOICES
    if not supported:
        raise TypeError(f"{what} must be {ACTIONS}, got {space!r}")
    return flat


def plain(points: Any) -> Array:  # noqa: ANN401
    """Return `points`, one point or a batch of a space without Dicts, as a plain `numpy.ndarray`.

    The object is read once, by `numpy.asarray`, and the result shares no memory with it. An object
    that changes afterwards therefore cannot alter the action that has been checked. The data of a
    masked array are taken without the mask.
    """
    # np.array alone is not enough: an object with `__array__` may return an array that it keeps.
    return np.array(np.asarray(points))


def fitted(points: Array, dtype: np.dtype[Any]) -> Array:
    """Return numbers converted to a space's dtype, or unchanged where they do not fit in integers.

    In a float dtype a number is rounded to the nearest finite one. In an integer dtype only whole
    numbers in the dtype's range fit, so that no number wraps around; where one does not fit, all
    are returned unchanged, and the one is no action.

    Args:
        points: Array of any shape; an array that does not hold numbers is returned unchanged.
        dtype: Dtype of the space.

    >>> fitted(np.array([0.1, 2.0]), np.dtype(np.float32))
    array([0.1, 2. ], dtype=float32)
    >>> fitted(np.array([1e300, -np.inf]), np.dtype(np.float32))
    array([3.4028235e+38,          -inf], dtype=float32)
    >>> fitted(np.array([1.0, 255.0]), np.dtype(np.uint8))
    array([  1, 255], dtype=uint8)
    >>> fitted(np.array([1.0, 300.0]), np.dtype(np.uint8))
    array([  1., 300.])
    """
    if points.dtype == dtype or points.dtype.kind not in "fiub" or not points.size:
        return points
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            converted = points.astype(dtype)
        beyond = np.isinf(converted)
        if beyond.any():
            beyond &= np.isfinite(points)
            most = np.finfo(dtype).max
            converted = np.where(beyond, np.copysign(most, points), converted).astype(dtype)
        return converted
    if not (np.isfinite(points).all() and (np.floor(points) == points).all()):
        return points
    # Compare as Python integers: as floats, 2.0**63 would equal the largest int64.
    limits = np.iinfo(dtype)
    fits = limits.min <= int(points.min()) and int(points.max()) <= limits.max
    return points.astype(dtype) if fits else points


_LEAVES = (
    gym.spaces.Box,
    gym.spaces.Discrete,
    gym.spaces.MultiDiscrete,
    gym.spaces.MultiBinary,
)


def _leaves(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    if isinstance(space, gym.spaces.Dict):
        return [leaf for part in space.spaces.values() for leaf in _leaves(part)]
    if not isinstance(space, _LEAVES):
        raise TypeError(f"{type(space).__name__} is not supported")
    return [space]


def _pairs(points: Batch, space: gym.Space[Any], what: str) -> list[tuple[Any, gym.Space[Any]]]:
    if not isinstance(space, gym.spaces.Dict):
        return [(points, space)]
    if not isinstance(points, Mapping) or not set(space.spaces) <= set(points):
        got = sorted(points) if isinstance(points, Mapping) else type(points).__name__
        raise ValueError(f"{what} must be a dict with the entries {list(space.spaces)}, got {got}")
    return [pair for key, part in space.spaces.items() for pair in _pairs(points[key], part, what)]


def _columns(
    space: gym.Space[Any],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Sequence[int]]:
    """Return the low and high bounds and the categories of the columns of a non-Dict space."""
    if isinstance(space, gym.spaces.Box):
        low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
        return low, high, [0] * len(low)
    if isinstance(space, gym.spaces.Discrete):
        counts, starts = np.array([int(space.n)]), np.array([int(space.start)])
    elif isinstance(space, gym.spaces.MultiDiscrete):
        counts = np.asarray(space.nvec).ravel()
        starts = np.asarray(getattr(space, "start", np.zeros_like(counts))).ravel()
    elif isinstance(space, gym.spaces.MultiBinary):
        counts = np.full(math.prod(space.shape), 2)
        starts = np.zeros_like(counts)
    else:
        raise TypeError(f"{type(space).__name__} is not supported")
    return (
        starts.astype(np.float64),
        (starts + counts - 1).astype(np.float64),
        [int(n) for n in counts],
    )


def _rows_of(points: Any, space: gym.Space[Any], what: str) -> tuple[Rows, bool]:  # noqa: ANN401
    array = np.asarray(points)
    shape = space.shape or ()
    single = array.shape == shape
    if single and array.dtype.kind in "fiu":
        return array.reshape(1, array.size), True
    if array.dtype.kind not in "fiub" or (
        (array.shape[1:] != shape or not array.ndim) and not single
    ):
        raise ValueError(
            f"{what} must be numbers of shape {shape}, or (n, ...) for n of them, got "
            f"{array.dtype} {array.shape}; the space is {space}"
        )
    if array.dtype.kind == "b":
        array = array.astype(np.int8)
    # The width is given explicitly, because -1 cannot be resolved for an empty batch.
    return array.reshape(1 if single else len(array), math.prod(shape)), single
