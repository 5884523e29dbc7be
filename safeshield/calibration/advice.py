"""What to say where no threshold passes: what was reached, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import episodes_needed, upper_bound
from safeshield.calibration.promises import Promise
from safeshield.calibration.sequential import fixed_plan
from safeshield.calibration.trials import MOST_RESETS_PER_EPISODE
from safeshield.shield.record import MEAN_COST, VIOLATION, PilotPoint, Rung

_MOST_EPISODES, _LIKELY = 10_000, 0.9
_DID = {
    VIOLATION: "violated",
    "cost above": "exceeded the limit",
    MEAN_COST: "had a cost",
}


def nothing_passes(
    promise: Promise,
    confidence: float,
    failed: Rung,
    curve: Sequence[PilotPoint],
    values: npt.NDArray[np.float64],
    asked: Sequence[float] | None,
    policy: object,
    level: float,
    alone: bool = False,
) -> str:
    """Return the message of an error where the first test failed.

    Args:
        promise: The promise that was asked for.
        confidence: Its confidence.
        failed: The test that failed.
        curve: Everything that was played.
        values: (n,) V_h of starts.
        asked: The thresholds that the user passed; None where a pilot proposed them.
        policy: The user's policy; None for the battery.
        level: Significance level of the failed test. The next attempt on the same shield is tested
            at half this level.
        alone: Whether the policy acted without the shield.
    """
    wanted = (
        f"the mean cost {promise.limit:g}"
        if promise.kind == MEAN_COST
        else f"epsilon {promise.share:g}"
    )
    did = _DID[promise.kind]
    point, rate, low, high = _best(curve)
    parts = [
        f"no threshold meets {wanted} with confidence {confidence:g}: in the last test, at "
        f"delta {failed.delta:.4g}, policy '{failed.policy}' {did} in {failed.violations} of "
        f"{failed.episodes} episodes.",
        _about_deltas(values, max(one.delta for one in curve), asked),
    ]
    if promise.kind != MEAN_COST:
        parts.append(
            f"The safest threshold seen is delta {point.delta:.4g}, at a rate of about {rate:.2g} "
            f"(95% interval {low:.2g} to {high:.2g}): ask for an epsilon above that interval"
            f"{_about_episodes(point.delta, rate, promise.share, 1.0 - level / 2.0)}"
        )
    else:
        parts.append("Ask for a larger limit")
    yours = ", calibrate with policy= the agent that will be deployed" if policy is None else ""
    last = "shield.diagnose names the cause of each violation"
    if alone:
        last = (
            "Behind its shield the agent may keep the promise: "
            "agent.shield().calibrate(env, policy=agent)"
        )
    parts[-1] += (
        f"{yours}, or improve the critics: more of the log, more updates, or a log that reports "
        f"h where it has binary costs alone. {last}"
    )
    return " ".join(parts)


def _about_deltas(
    values: npt.NDArray[np.float64], strictest: float, asked: Sequence[float] | None
) -> str:
    """Return whether larger deltas than the strictest one that was played are possible."""
    lowest = float(values.min())
    largest = float(np.quantile(-values, 1.0 - 1.0 / MOST_RESETS_PER_EPISODE))
    if largest > 1.05 * strictest:
        if asked is None:
            return (
                f"Stricter thresholds, up to {largest:.4g}, would certify less than half of the "
                "starts; pass deltas to test them."
            )
        return f"Pass larger deltas, up to {largest:.4g}, or leave deltas out, for a pilot."
    return (
        f"Larger deltas do not help: the values of the starts end at {lowest:.4g}, so hardly any "
        "start would be certified."
    )


def _best(curve: Sequence[PilotPoint]) -> tuple[PilotPoint, float, float, float]:
    """Return the point of the safest threshold, its rate and the 95% interval of the rate.

    The safest threshold is the one whose worst policy has the lowest upper limit of the rate. No
    violation in a few episodes gives a higher limit than a small rate in many episodes.
    """
    worst: dict[float, PilotPoint] = {}
    for point in curve:
        known = worst.get(point.delta)
        if known is None or _high(point) > _high(known):
            worst[point.delta] = point
    best = min(worst.values(), key=_high)
    harmless = best.episodes - best.violations
    low = 1.0 - upper_bound(best.episodes, harmless, 0.975)
    return best, best.violations / max(best.episodes, 1), low, _high(best)


def _high(point: PilotPoint) -> float:
    return upper_bound(point.episodes, point.violations, 0.975) if point.episodes else 1.0


def _about_episodes(delta: float, rate: float, epsilon: float, confidence: float) -> str:
    """Return advice on the number of episodes of a test that this rate usually passes, or ""."""
    least = episodes_needed(epsilon, confidence)
    if rate < epsilon and least < _MOST_EPISODES:
        for episodes in np.geomspace(least, _MOST_EPISODES, 60).astype(int).tolist():
            if fixed_plan(episodes, epsilon, confidence).power(rate) >= _LIKELY:
                return (
                    f", or pass deltas=[{delta:.4g}] and episodes={episodes}, a test that this "
                    f"rate passes with probability {_LIKELY:g}"
                )
    return ""
