"""The fixed-sequence walk: which threshold may be chosen without a union bound.

Candidates are tested from the strictest to the most permissive, each at the full level b, and the
walk stops at the first that fails. A threshold is chosen only if it and all stricter ones
passed, so choosing a bad one means that the FIRST bad one in the sequence passed its own
test, which happens with probability at most b. The sequence must not depend on the episodes
that test it.

Where several policies are to be covered, a threshold passes only if it passes for each of
them, again at the full level: that all of them were accepted wrongly is no likelier than one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from safeshield.calibration.binomial import episodes_needed, upper_bound, violations_allowed
from safeshield.shield.record import Rung


class CalibrationError(ValueError):
    """No threshold meets the request; the message says what was reached."""


Trial = Callable[[float, str, int, int], tuple[int, int]]
"""(delta, policy, episodes, most) -> (episodes run, violations); may stop at violations > most."""


def fixed_sequence_walk(
    trial: Trial,
    deltas: Sequence[float],
    policies: Sequence[str],
    *,
    epsilon: float,
    confidence: float,
    episodes: int,
) -> tuple[float, list[Rung]]:
    """Return the most permissive threshold that the walk reaches, and all tests made.

    Args:
        trial: runs fresh episodes that start accepted at delta, under a policy with the shield on.
        deltas: strictly decreasing, all at least 0.
        policies: names, each tested at every threshold.
        epsilon: the violation rate to promise.
        confidence: of the promise, over the draw of the episodes.
        episodes: N for each test.

    Raises:
        ValueError: a wrong argument; too few episodes to prove epsilon even without a violation.
        CalibrationError: the strictest threshold fails.
    """
    if not deltas or any(not a > b for a, b in itertools.pairwise(deltas)):
        raise ValueError(f"deltas must be strictly decreasing and not empty, got {list(deltas)}")
    if not deltas[-1] >= 0:
        raise ValueError(f"deltas must be at least 0, got {deltas[-1]}")
    most = violations_allowed(episodes, epsilon, confidence)
    if most < 0:
        raise ValueError(
            f"{episodes} episodes cannot show a violation rate of at most {epsilon:g} with "
            f"confidence {confidence:g}, even without a single violation: at least "
            f"{episodes_needed(epsilon, confidence)} are needed"
        )
    rungs: list[Rung] = []
    reached: float | None = None
    for delta in deltas:
        passed = True
        for policy in policies:
            count, violations = trial(delta, policy, episodes, most)
            bound = upper_bound(count, violations, confidence)
            passed = violations <= most and count == episodes
            rungs.append(Rung(delta, policy, count, violations, bound, passed))
            if not passed:
                break
        if not passed:
            break
        reached = delta
    if reached is None:
        worst = rungs[-1]
        raise CalibrationError(
            f"no threshold meets epsilon {epsilon:g} with confidence {confidence:g}: at the "
            f"strictest, delta {worst.delta:.4g}, policy '{worst.policy}' violated in "
            f"{worst.violations} of {worst.episodes} episodes (at most {most} of {episodes} are "
            f"allowed), which bounds the rate by {worst.bound:.3g} only. Train longer or on more "
            "of the log, ask for a larger epsilon, or pass larger deltas"
        )
    return reached, rungs
