"""Binary constraint labels from costs, and the effect of their magnitude."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def binary_labels(
    costs: npt.ArrayLike,
    episode_starts: npt.ArrayLike,
    initial_costs: npt.ArrayLike | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Label the states of logged steps by their costs: +1 where cost > 0, else -1.

    A cost is reported after the step, so it labels the state that the step reached::

        next_constraints[t] = label(costs[t])                       h(s[t+1])
        constraints[t]      = label(costs[t-1])  inside an episode  h(s[t])
                            = label(initial_costs[e])  at the first step of episode e

    DSRL's logs do not say whether an episode starts in a violation. Without `initial_costs` the
    first state of every episode is therefore labelled as safe (-1).

    Args:
        costs: (N,) cost reported after each step.
        episode_starts: (E,) index of the first step of each episode, ascending, beginning with 0.
        initial_costs: (E,) cost of the first state of each episode.

    Returns:
        ``(constraints, next_constraints)``, each (N,) float32.

    Raises:
        ValueError: A shape is wrong, `episode_starts` does not ascend from 0 or exceeds N, or a
            cost is negative.

    >>> now, after = binary_labels([0, 1, 0], [0, 2])
    >>> now.tolist(), after.tolist()
    ([-1.0, -1.0, -1.0], [-1.0, 1.0, -1.0])
    """
    cost_array = np.asarray(costs)
    starts = np.asarray(episode_starts, dtype=np.int64)
    if cost_array.ndim != 1 or len(cost_array) == 0:
        raise ValueError(f"costs must have shape (N,) with N >= 1, got {cost_array.shape}")
    if (
        starts.ndim != 1
        or len(starts) == 0
        or starts[0] != 0
        or starts[-1] >= len(cost_array)
        or (np.diff(starts) <= 0).any()
    ):
        raise ValueError(
            f"episode_starts must ascend from 0 and stay below N = {len(cost_array)}, got {starts}"
        )
    first = np.zeros(len(starts)) if initial_costs is None else np.asarray(initial_costs)
    if first.shape != starts.shape:
        raise ValueError(
            f"initial_costs must have one entry for each of the {len(starts)} episodes, "
            f"got shape {first.shape}"
        )
    if (cost_array < 0).any():
        row = int(np.argmax(cost_array < 0))
        raise ValueError(
            f"costs must be at least 0 (0 is safe), got {cost_array[row]} at index {row}; "
            "check the sign"
        )
    after = np.where(cost_array > 0, np.float32(1.0), np.float32(-1.0))
    now = np.roll(after, 1)
    now[starts] = np.where(first > 0, 1.0, -1.0)
    return now, after


def label_reach(magnitude: float, discount: float) -> float:
    """Return how many steps before an unavoidable violation V_h becomes positive.

    Unsafe states have the label M = `magnitude` and safe states have -1. With the discounted max
    backup of `safeshield.values` and the discount g, the value k steps before an unavoidable
    violation is ``(1 + M) g^k - 1``. It is above 0 for ``k < ln(1 + M) / -ln g``, which is the
    number returned: 69 steps for M = 1 and g = 0.99 (the defaults), 324 for M = 25 (FISOR and
    SafeFQL on DSRL). With a larger number V_h recognises danger earlier and more of the state space
    counts as unsafe.

    Raises:
        ValueError: `magnitude` is not above 0, or `discount` is not inside (0, 1).

    >>> round(label_reach(25.0, 0.99)), round(label_reach(1.0, 0.99))
    (324, 69)
    """
    check_magnitude(magnitude)
    if not 0.0 < discount < 1.0:
        raise ValueError(f"discount must lie inside (0, 1), got {discount}")
    return math.log1p(magnitude) / -math.log(discount)


def check_magnitude(magnitude: float) -> None:
    """Raise a ValueError if the label of an unsafe state is not above 0, or not finite."""
    if not (math.isfinite(magnitude) and magnitude > 0.0):
        raise ValueError(
            f"magnitude (the label of an unsafe state) must be finite and above 0, got {magnitude}"
        )
