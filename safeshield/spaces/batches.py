"""Batches of points in the form that Gymnasium's vector environments use.

A batch is an array, or a dict of arrays for a Dict space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.shapes import Flags

Array = npt.NDArray[Any]


Batch = Any
"""n points of a space: an array whose first axis has length n, or a (nested) dict of these."""


def batch_length(points: Batch) -> int:
    """Return the number of points in a batch."""
    while isinstance(points, Mapping):
        points = next(iter(points.values()))
    return len(points)


def stacked(points: Sequence[Any]) -> Batch:
    """Return single points as a batch."""
    if isinstance(points[0], Mapping):
        return {key: stacked([point[key] for point in points]) for key in points[0]}
    return np.stack([np.asarray(point) for point in points])


def batch_of_one(point: Batch) -> Batch:
    """Return a single point as a batch."""
    if isinstance(point, Mapping):
        return {key: batch_of_one(part) for key, part in point.items()}
    return np.asarray(point)[None]


def take(points: Batch, index: int | Array | slice) -> Batch:
    """Return the points of a batch at these indices, or the single point at an integer index."""
    if isinstance(points, Mapping):
        return {key: take(part, index) for key, part in points.items()}
    return np.asarray(points)[index]


def repeated(points: Batch, times: int) -> Batch:
    """Return a batch in which each of the n `points` is repeated `times` times in a row."""
    return take(points, np.repeat(np.arange(batch_length(points)), times))


def copied(points: Batch) -> Batch:
    """Return a copy of `points`, one point or a batch, that shares no array with the original.

    The copy is needed because environments may overwrite arrays that they have returned, and
    policies may overwrite their inputs.
    """
    if isinstance(points, Mapping):
        return {key: copied(part) for key, part in points.items()}
    # The scalar of a Discrete space is immutable and is returned as it is.
    return points if isinstance(points, int | float | np.generic) else np.array(points)


def finite(points: Batch) -> Batch:
    """Return `points` with every NaN and infinity replaced by zero."""
    if isinstance(points, Mapping):
        return {key: finite(part) for key, part in points.items()}
    array = np.asarray(points)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return points
    return np.where(np.isfinite(array), array, 0.0).astype(array.dtype)


def readable(points: Batch) -> Flags:
    """Return a mask (n,) of the points of a batch whose numbers are all finite."""
    if isinstance(points, Mapping):
        good: Flags = np.logical_and.reduce([readable(part) for part in points.values()])
        return good
    array = np.asarray(points)
    if array.dtype.kind != "f":
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))
