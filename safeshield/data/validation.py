"""Validation of logs, with errors that name the broken rule, its index and a repair."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]

VECTOR_FIELDS = ("observations", "actions", "next_observations")
FLAG_FIELDS = ("terminated", "truncated")
SCALAR_FIELDS = ("rewards", "costs", "constraints", "next_constraints")

_ACTION_TOLERANCE = 1e-6
_BLOCK = 1 << 18
_SMALL_BLOCK = 1 << 13  # np.isclose makes several arrays of the size of a block.
_FEWEST_SHIFTED = 10
_SHIFTS = (0, -1, 2)
"""Rows t + k whose observation a log may hold by mistake in place of that of row t + 1."""


def as_field(name: str, value: npt.ArrayLike) -> Array:
    """Return `value` as the read-only float32 or bool array of field `name`.

    A writeable array is copied, so that a log cannot be changed from outside. A read-only array of
    the right dtype is used without a copy.

    Raises:
        TypeError: The array does not hold numbers.
        ValueError: A flag is neither 0 nor 1.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}")
    if name in FLAG_FIELDS:
        if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} must hold booleans (or 0 and 1 alone)")
        dtype: type[np.generic] = np.bool_
    else:
        dtype = np.float32
    if array.dtype != dtype or array.flags.writeable:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
    array.flags.writeable = False
    return array


def check_log(
    fields: Mapping[str, Array],
    observations: SpaceCodec,
    actions: SpaceCodec,
    constraint_kind: str,
) -> None:
    """Raise ValueError for the first rule that the fields of an `OfflineDataset` break.

    Args:
        fields: Arrays of the log by name.
        observations: Converter of the observation space.
        actions: Converter of the action space.
        constraint_kind: Kind of the labels, "continuous" or "binary".
    """
    if constraint_kind not in ("continuous", "binary"):
        raise ValueError(
            f"constraint_kind must be 'continuous' or 'binary', got {constraint_kind!r}"
        )
    widths = {
        "observations": observations.width,
        "next_observations": observations.width,
        "actions": actions.width,
    }
    _check_shapes(fields, widths)
    starts = starts_of(fields["terminated"], fields["truncated"])
    _check_flags(fields, starts)
    for name, array in fields.items():
        row = _first_bad_row(array, np.isfinite)
        if row is not None:
            where = _place(row, name, array, starts)
            raise ValueError(
                f"{name} must be finite in float32, but {where}; drop that episode, or clean it"
            )
    _check_actions(fields["actions"], actions, starts)
    for name in ("observations", "next_observations"):
        _check_counts(name, fields[name], observations, starts)
    _check_labels(fields, constraint_kind, starts)


def cost_contradictions(h: Array, costs: Array, what: str) -> tuple[int, str]:
    """Return in how many states the sign of h contradicts the cost, and a clause that says so.

    Args:
        h: (N,) h of the states that the steps reached; a violation has h > 0.
        costs: (N,) costs of the same states; a violation has a cost above 0.
        what: Name of h in the clause.

    Returns:
        The number of contradictions and the clause, which is "" where there are none.
    """
    differs = (h > 0) != (costs > 0)
    if not differs.any():
        return 0, ""
    count, at = int(differs.sum()), int(differs.argmax())
    return count, (
        f"{what} contradicts the logged cost in {count} of {len(h)} reached states; the first is "
        f"row {at}, where h = {h[at]:.4g} and the cost is {costs[at]:g}"
    )


def check_costs(h: Array, costs: Array) -> None:
    """Compare h of the states reached (N,) with their costs (N,).

    Where up to half of them contradict each other, a warning is issued: h may be stricter than the
    cost, or speak of another quantity.

    Raises:
        ValueError: More than half contradict each other, as where a sign is turned.
    """
    count, clause = cost_contradictions(h, costs, "next_constraints")
    if 2 * count > len(h):
        raise ValueError(
            f"{clause}. Check the sign (h > 0 is a violation) and that both speak of the state "
            "that the step reached; if the cost is of another quantity, leave costs out"
        )
    if count:
        warnings.warn(
            f"{clause}. Check that both speak of the state that the step reached, unless h is "
            "meant to differ from the cost",
            stacklevel=3,
        )


def check_successors(
    observations: Array, next_observations: Array, terminated: Array, truncated: Array
) -> None:
    """Check that ``next_observations[t]`` is ``observations[t+1]`` inside episodes.

    Where they differ by more than rounding, a warning gives the number of such rows and the first.

    Args:
        observations: (N, obs) s[t].
        next_observations: (N, obs) s[t+1].
        terminated: (N,) whether an episode terminated.
        truncated: (N,) whether an episode was truncated.

    Raises:
        ValueError: Most rows differ, and all hold the observation of another row instead, such as
            ``observations[t]``.
    """
    ends = terminated | truncated
    differs = ~ends[:-1] & ~_rows_agree(next_observations[:-1], observations[1:])
    count, inside = int(differs.sum()), int((~ends[:-1]).sum())
    if not count:
        return
    starts = starts_of(terminated, truncated)
    at = int(differs.argmax())
    most = _largest_difference(next_observations[:-1], observations[1:], differs)
    clause = (
        f"next_observations[t] differs from observations[t+1] in {count} of {inside} rows inside "
        f"episodes, by up to {most:.3g}; the first is row {at} (episode {_episode(at, starts)})"
    )
    episodes = np.cumsum(ends, dtype=np.int32)
    episodes -= ends
    for shift in _SHIFTS if 2 * count > inside else ():
        first, last = max(0, -shift), len(ends) - max(0, shift)
        here, there = slice(first, last), slice(first + shift, last + shift)
        comparable: Array = episodes[here] == episodes[there]
        same = comparable & _rows_agree(next_observations[here], observations[there])
        # Few rows may agree by chance.
        if same.sum() == comparable.sum() >= _FEWEST_SHIFTED:
            found = f"observations[t{shift:+d}]" if shift else "observations[t]"
            raise ValueError(
                f"{clause}. It is {found} in all rows that have one: shift it, so that row t holds "
                "the observation after step t"
            )
    warnings.warn(
        f"{clause}. The rows of an episode must be its consecutive steps: where rows were left out "
        "or shuffled, set truncated before each gap, because labels that are computed from costs "
        "are wrong there. Where an observation is measured twice with noise, nothing is wrong",
        stacklevel=3,
    )


def starts_of(terminated: Array, truncated: Array) -> npt.NDArray[np.int64]:
    """Return the index of the first step of every episode, (E,) int64.

    These are step 0 and every step that follows the end of an episode. `terminated` and `truncated`
    (N,) mark the ends.
    """
    ends = np.flatnonzero(terminated | truncated)
    starts = np.concatenate([[0], ends + 1]).astype(np.int64)
    return starts[starts < len(terminated)]


def _check_shapes(fields: Mapping[str, Array], widths: Mapping[str, int]) -> None:
    shapes = {name: array.shape for name, array in fields.items()}
    steps = next(iter(shapes.values()), ())[:1]
    for name, shape in shapes.items():
        ndim = 2 if name in VECTOR_FIELDS else 1
        if len(shape) != ndim:
            wanted = "(N, width)" if ndim == 2 else "(N,)"
            raise ValueError(f"{name} must have shape {wanted}, got {shape}; reshape it")
        if shape[:1] != steps:
            raise ValueError(
                f"every key must have the same first axis N, got {name} {shape} beside {shapes}; "
                "cut them to whole episodes of the same steps"
            )
        if ndim == 2 and shape[1] != widths[name]:
            which = "action_space" if name == "actions" else "observation_space"
            raise ValueError(
                f"{name} must be as wide as {which} ({widths[name]}), got width {shape[1]}; "
                f"pass the {which} of the environment that was logged"
            )
    if steps == (0,):
        raise ValueError("a log must have at least 1 transition, got 0")


def _check_flags(fields: Mapping[str, Array], starts: Array) -> None:
    terminated, truncated = fields["terminated"], fields["truncated"]
    both = terminated & truncated
    if both.any():
        index = int(np.argmax(both))
        raise ValueError(
            f"terminated and truncated exclude each other, but both are set at index {index} "
            f"(episode {_episode(index, starts)}); keep terminated: truncated &= ~terminated"
        )
    if not (terminated[-1] or truncated[-1]):
        raise ValueError(
            f"the last step must end an episode, but index {len(terminated) - 1} (episode "
            f"{len(starts) - 1}) has terminated and truncated false; drop that part of an "
            "episode, or set truncated there"
        )


def _check_actions(actions: Array, flat: SpaceCodec, starts: Array) -> None:
    low, high = flat.low, flat.high
    bounds = np.stack([low, high])
    scale = np.max(np.abs(np.where(np.isfinite(bounds), bounds, 0.0)), axis=0)
    slack = _ACTION_TOLERANCE * scale
    least, most = low - slack, high + slack
    row = _first_bad_row(actions, lambda rows: (rows >= least) & (rows <= most))
    if row is not None:
        where = _place(row, "actions", actions, starts)
        raise ValueError(
            f"actions must lie inside action_space {flat.space}, but {where}; pass action_space= "
            "of the environment, or clip the actions to what was executed"
        )
    _check_counts("actions", actions, flat, starts)


def _check_counts(name: str, rows: Array, flat: SpaceCodec, starts: Array) -> None:
    counted = [i for i, n in enumerate(flat.categories) if n]
    if not counted:
        return
    low, high = flat.low[counted], flat.high[counted]

    def are_points(block: Array) -> Array:
        columns = block[:, counted]
        return np.asarray((columns >= low) & (columns <= high) & (np.floor(columns) == columns))

    row = _first_bad_row(rows, are_points)
    if row is not None:
        where = _place(row, name, rows, starts)
        raise ValueError(f"{name} must be integers of {flat.space}, but {where}")


def _check_labels(fields: Mapping[str, Array], kind: str, starts: Array) -> None:
    now, after = fields["constraints"], fields["next_constraints"]
    inside = ~(fields["terminated"] | fields["truncated"])[:-1]
    broken = inside & (after[:-1] != now[1:])
    if broken.any():
        index = int(np.argmax(broken))
        raise ValueError(
            "next_constraints[t] must equal constraints[t+1] inside an episode, but at index "
            f"{index} (episode {_episode(index, starts)}) they are {after[index]} and "
            f"{now[index + 1]}; label each state once and shift"
        )
    if kind == "binary":
        unsafe = max(float(now.max()), float(after.max()), 0.0)
        for name, array in (("constraints", now), ("next_constraints", after)):
            wrong = (array != -1.0) & ((array != unsafe) | (array <= 0.0))
            if wrong.any():
                where = _place(int(np.argmax(wrong)), name, array, starts)
                raise ValueError(
                    "binary labels must be -1 or one value above 0 "
                    f"(here {unsafe}), but {where}; use constraint_kind='continuous' for others"
                )


def _first_bad_row(array: Array, good: Callable[[Array], Array]) -> int | None:
    """Return the index of the first row with an entry that is not good, or None.

    The array is checked in blocks, so that no mask of its full size is allocated.
    """
    size = max(1, _BLOCK // max(1, array[0].size))
    for start in range(0, len(array), size):
        fine = good(array[start : start + size])
        if not fine.all():
            return start + int(np.argmin(fine.reshape(len(fine), -1).all(axis=1)))
    return None


def _rows_agree(one: Array, other: Array) -> Array:
    """Return whether the rows of two arrays (n, width) agree up to rounding, (n,)."""
    agree = np.empty(len(one), np.bool_)
    size = max(1, _SMALL_BLOCK // max(1, one.shape[1]))
    for start in range(0, len(one), size):
        here, there = one[start : start + size], other[start : start + size]
        same = (here == there).all(axis=1)
        rows = np.flatnonzero(~same)
        if len(rows):
            same[rows] = np.isclose(here[rows], there[rows], 1e-5, 1e-5).all(axis=1)
        agree[start : start + size] = same
    return agree


def _largest_difference(one: Array, other: Array, rows: Array) -> float:
    """Return the largest difference between two arrays (n, width) in the marked rows (n,)."""
    size = max(1, _SMALL_BLOCK // max(1, one.shape[1]))
    starts = range(0, len(one), size)
    blocks = (slice(start, start + size) for start in starts)
    return max(
        float(np.abs(one[block][rows[block]] - other[block][rows[block]]).max(initial=0.0))
        for block in blocks
    )


def _episode(index: int, starts: Array) -> int:
    return int(np.searchsorted(starts, index, side="right")) - 1


def _place(index: int, name: str, array: Array, starts: Array) -> str:
    value = np.array2string(array[index], threshold=12, precision=6)
    return f"{name}[{index}] (episode {_episode(index, starts)}) is {value}"
