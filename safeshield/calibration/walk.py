"""The fixed-sequence walk, which chooses a threshold without a union bound.

Thresholds are tested in a fixed order, usually from the strictest to the most permissive, each at
the full level b, and the walk stops at the first that fails. A threshold is chosen only if it and
all before it passed. If a bad threshold is chosen, the FIRST bad one in the sequence has passed its
own test, which happens with probability at most b. The sequence must not depend on the episodes
that test it.

Several walks in turn share the level: each of m walks is tested at the level b / m, on episodes of
its own, and the first one that reaches a threshold ends them. Each walk chooses a bad threshold
with probability at most b / m, so the probability that any does is at most b. The thresholds of a
walk may therefore depend on all that was seen in earlier ones.

Where the promise covers several policies, a threshold passes only if it passes for each of them,
again at the full level. A threshold that is bad for any of the policies passes all of its tests
with probability at most b.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self

from safeshield.calibration.binomial import episodes_needed, upper_bound, violations_allowed
from safeshield.shield.record import Attempt, PilotPoint, Rung


class CalibrationError(ValueError):
    """Raised where no threshold meets the request. The message says what was reached.

    Args:
        message: What was reached, and what would help.
        curve: What was seen at each threshold and policy that was played.
        attempt: The attempt that ended in this error; None where no test was made.
    """

    def __init__(
        self, message: str, curve: Sequence[PilotPoint] = (), attempt: Attempt | None = None
    ) -> None:
        super().__init__(message)
        self.curve = tuple(curve)
        self.attempt = attempt

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        """Keep the attributes where the error comes from another process."""
        return type(self), (*self.args, self.curve, self.attempt)


Trial = Callable[[float, str, int, int], tuple[int, int]]
"""A function (delta, policy, episodes, most) -> (number of episodes run, violations).

It runs `episodes` fresh episodes of the named policy, with a shield of this delta. It may stop
early once more than `most` of them violate.
"""


def walk_rungs(
    test: Callable[[float, str], Rung], deltas: Sequence[float], policies: Sequence[str]
) -> tuple[float | None, list[Rung]]:
    """Test thresholds in the given order, and stop at the first test that fails.

    Args:
        test: Function that tests one threshold with one policy at the full level.
        deltas: The thresholds, in the order of the tests.
        policies: Names of the policies. At each threshold they are tested in this order.

    Returns:
        The last delta at which every policy passed, None if there is none, and the results of all
        tests that were run, in order. The last result is the failed one where a test failed.
    """
    rungs: list[Rung] = []
    reached: float | None = None
    for delta in deltas:
        for policy in policies:
            rungs.append(test(delta, policy))
            if not rungs[-1].passed:
                return reached, rungs
        reached = delta
    return reached, rungs


def walks_in_turn(
    test: Callable[[int, float, str], Rung],
    walks: Iterable[Sequence[float]],
    policies: Sequence[str],
) -> tuple[float | None, list[Rung]]:
    """Walk lists of thresholds in turn, until one of the walks reaches a threshold.

    Args:
        test: Function that tests one threshold with one policy, at the walk's share of the level
            and on episodes that no other walk uses. It gets the number of the walk, from 0.
        walks: The thresholds of each walk, in the order of the tests. The next ones are asked for
            when a walk has reached none, and may depend on its results.
        policies: Names of the policies. At each threshold they are tested in this order.

    Returns:
        The delta that was reached, None if there is none, and the results of all tests that were
        run, in order.
    """
    rungs: list[Rung] = []
    for number, deltas in enumerate(walks):
        reached, tested = walk_rungs(partial(test, number), deltas, policies)
        rungs += tested
        if reached is not None:
            return reached, rungs
    return None, rungs


def check_deltas(deltas: Sequence[float]) -> None:
    """Raise ValueError unless thresholds fall strictly and are at least 0."""
    if not deltas or any(not a > b for a, b in itertools.pairwise(deltas)):
        raise ValueError(f"deltas must be strictly decreasing and not empty, got {list(deltas)}")
    if not deltas[-1] >= 0:
        raise ValueError(f"deltas must be at least 0, got {deltas[-1]}")


def fixed_sequence_walk(
    trial: Trial,
    deltas: Sequence[float],
    policies: Sequence[str],
    *,
    epsilon: float,
    confidence: float,
    episodes: int,
) -> tuple[float, list[Rung]]:
    """Test thresholds from strict to permissive with a fixed number of episodes for each test.

    Args:
        trial: Function that runs fresh episodes of a policy with the shield on. The episodes start
            in states with V_h <= -delta.
        deltas: Strictly decreasing thresholds, all at least 0, in units of h.
        policies: Names of the policies. At each threshold they are tested in this order.
        epsilon: Violation rate per episode to promise.
        confidence: Confidence of the promise, over the draw of the episodes.
        episodes: Number N of episodes of each test.

    Returns:
        The last delta at which every policy passed, and the results of all tests that were run, in
        order. The last result is the failed one where a test failed.

    Raises:
        ValueError: An argument is wrong, or there are too few episodes to show epsilon even without
            a violation.
        CalibrationError: The strictest threshold fails.
    """
    check_deltas(deltas)
    most = violations_allowed(episodes, epsilon, confidence)
    if most < 0:
        raise ValueError(
            f"{episodes} episodes cannot show a violation rate of at most {epsilon:g} with "
            f"confidence {confidence:g}, even without a single violation: at least "
            f"{episodes_needed(epsilon, confidence)} are needed"
        )

    def test(delta: float, policy: str) -> Rung:
        count, violations = trial(delta, policy, episodes, most)
        bound = upper_bound(count, violations, confidence)
        return Rung(
            delta, policy, count, violations, bound, violations <= most and count == episodes
        )

    reached, rungs = walk_rungs(test, deltas, policies)
    if reached is None:
        worst = rungs[-1]
        raise CalibrationError(
            f"no threshold meets epsilon {epsilon:g} with confidence {confidence:g}: at the "
            f"strictest, delta {worst.delta:.4g}, policy '{worst.policy}' violated in "
            f"{worst.violations} of {worst.episodes} episodes (at most {most} of {episodes} are "
            f"allowed), which bounds the rate by {worst.bound:.3g} only"
        )
    return reached, rungs
