"""How many episodes each kind of promise needs, before any are collected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safeshield.calibration.betting import betting_test
from safeshield.calibration.binomial import check_probability, episodes_needed
from safeshield.calibration.promises import MeanCost
from safeshield.calibration.sequential import sequential_plan
from safeshield.files.schema import json_values, whole

_FORGIVEN = 4


@dataclass(frozen=True)
class Need:
    """The episodes that one kind of promise needs."""

    kind: str
    """Name of the method, such as "detection", "shadow", "rollouts" or "mean cost"."""
    counted: str
    """Which episodes count."""
    against: str
    """Which of them count against the promise."""
    looks: tuple[tuple[int, int], ...]
    """Pairs of a number of episodes and of how many of these may count against the promise."""
    note: str
    """What else to know before collecting."""

    @property
    def least(self) -> int:
        """Smallest number of episodes with which the promise can be shown."""
        return self.looks[0][0]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json_values(self)


def episodes_plan(
    epsilon: float,
    confidence: float,
    *,
    alpha: float = 0.1,
    lead: int = 1,
    limit: float | None = None,
    bound: float | None = None,
) -> tuple[Need, ...]:
    """Return how many episodes each kind of promise needs.

    Args:
        epsilon: Rate of violating episodes to promise.
        confidence: 1 - b of every promise.
        alpha: Share of violating episodes that the alarm may miss, and of episodes whose residual
            may be larger than the quantile.
        lead: Number of steps before the entry at which the alarm must have been raised.
        limit: Limit of the mean cost of an episode; None leaves out this promise.
        bound: Largest cost that an episode can have, see `MeanCost`.

    Raises:
        ValueError: A number is out of range, or only one of `limit` and `bound` is given.

    >>> {need.kind: need.least for need in episodes_plan(0.05, 0.95)}
    {'detection': 29, 'residuals': 29, 'shadow': 59, 'spliced': 59, 'trial': 59, 'rollouts': 65}
    """
    for name, value in (("epsilon", epsilon), ("confidence", confidence), ("alpha", alpha)):
        check_probability(name, value)
    lead = whole("lead", lead, least=1)
    if (limit is None) != (bound is None):
        raise ValueError(
            f"limit and bound belong together, got limit={limit} and bound={bound}: pass both or "
            "neither"
        )
    ranked, rates = (
        tuple((episodes_needed(share, confidence, k), k) for k in range(_FORGIVEN))
        for share in (alpha, epsilon)
    )
    plan = sequential_plan(epsilon, confidence)
    half = 1.0 - (1.0 - confidence) / 2.0
    shared = sequential_plan(epsilon, half)
    needs = [
        Need(
            "detection",
            "held-out violating episodes that start in a safe state",
            f"no alarm {lead} or more steps before the entry",
            ranked,
            "An entry earlier than that many steps after the start counts as missed.",
        ),
        Need("residuals", "held-out whole episodes", "a larger residual", ranked, ""),
        Need(
            "shadow",
            "whole episodes of the agent WITHOUT the shield, that start with V_h <= -delta",
            "a violation, or a step in which the shield would have stepped in",
            rates,
            "The bound cannot be below the agent's own rate.",
        ),
        Need(
            "spliced",
            "whole episodes of the agent WITHOUT the shield, that start with V_h <= -delta",
            "a violation, before the first intervention or in its continuation by the simulator",
            rates,
            "Needs a simulator that restores the full state, and holds as far as it is right.",
        ),
        Need(
            "trial",
            "whole episodes of the agent with the shield ON, that start with V_h <= -delta",
            "a violation",
            rates,
            "Delta must be fixed before.",
        ),
        Need(
            "rollouts",
            "episodes in a simulator or a testbed, for each threshold and policy that is tested",
            "a violation",
            plan.looks,
            f"Passes with probability {_chance(plan.power(epsilon / 5))} where the true rate is "
            f"{epsilon / 5:g}, and {_chance(plan.power(epsilon / 10))} where it is "
            f"{epsilon / 10:g}. "
            f"A threshold that the pilot proposes is tested at half of the level, which takes "
            f"{shared.looks[0][0]} to {shared.most} episodes; the pilot plays others.",
        ),
    ]
    if limit is not None and bound is not None:
        share = MeanCost(limit, bound).share
        least, halved = (betting_test(share, level).least for level in (confidence, half))
        needs.append(
            Need(
                "mean cost",
                "episodes in a simulator or a testbed, for each threshold and policy",
                "any cost",
                ((least, 0),),
                "Costs above 0 take more episodes; the test looks after each one. A threshold that "
                f"the pilot proposes is tested at half of the level, which takes at least {halved} "
                "episodes; the pilot plays others.",
            )
        )
    return tuple(needs)


def _chance(probability: float) -> str:
    """Return a probability in words that does not round it up to 1."""
    return "more than 0.99" if probability > 0.99 else f"{probability:.2g}"
