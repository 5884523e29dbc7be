"""Batches of points, as Gymnasium's vector environments make them: arrays, or dicts of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.shapes import Flags

Array = npt.NDArray[Any]


Batch = Any
"""n points as Gymnasium's vector environments batch them: an array, or a dict of such."""


def batch_length(points: Batch) -> int:
    """Return n of a batch of n points."""
    while isinstance(points, Mapping):
        points = next(iter(points.values()))
    return len(points)


def batch_of_one(point: Batch) -> Batch:
    """Return a single point as a batch."""
    if isinstance(point, Mapping):
        return {key: batch_of_one(part) for key, part in point.items()}
    return np.asarray(point)[None]


def take(points: Batch, index: int | Array | slice) -> Batch:
    """Return some points of a batch, or one."""
    if isinstance(points, Mapping):
        return {key: take(part, index) for key, part in points.items()}
    return np.asarray(points)[index]


def repeated(points: Batch, times: int) -> Batch:
    """Return copies of each point of a batch, `times` times, one after the other."""
    return take(points, np.repeat(np.arange(batch_length(points)), times))


def copied(points: Batch) -> Batch:
    """Return a copy of points, one or a batch, that shares no array with them.

    Environments write into what they returned, and policies into what they were given.
    """
    if isinstance(points, Mapping):
        return {key: copied(part) for key, part in points.items()}
    # The integer of a Discrete stays what it is.
    return points if isinstance(points, int | float | np.generic) else np.array(points)


def finite(points: Batch) -> Batch:
    """Return points with zeros in place of what is no finite number."""
    if isinstance(points, Mapping):
        return {key: finite(part) for key, part in points.items()}
    array = np.asarray(points)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return points
    return np.where(np.isfinite(array), array, 0.0).astype(array.dtype)


def readable(points: Batch) -> Flags:
    """Return which points (n,) of a batch hold nothing but finite numbers."""
    if isinstance(points, Mapping):
        good: Flags = np.logical_and.reduce([readable(part) for part in points.values()])
        return good
    array = np.asarray(points)
    if array.dtype.kind != "f":
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))
