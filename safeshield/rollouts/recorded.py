"""A recorded episode, and its construction from rows and infos of single steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import (
    CONSTRAINT,
    COST,
    EXECUTED,
    INTERVENED,
    Array,
    Infos,
    largest,
)

STEP_ARRAYS = (
    "observations", "actions", "rewards", "next_observations", "terminated", "truncated",
)  # fmt: skip
"""Names of the arrays of an episode that every environment gives, with one row for each step."""


@dataclass(frozen=True)
class Episode:
    """One episode of L steps. Row t is the step from s[t] to s[t+1].

    Attributes:
        observations: (L, obs) float32 s[t], as rows of `spaces.rows`.
        actions: (L, act) float32 rows. They are ``info["action_executed"]`` where a shield or
            wrapper reports it, and otherwise the clipped actions of the policy.
        rewards: (L,) float32 reward of each step.
        next_observations: (L, obs) float32 s[t+1], as rows. The last row is the final observation
            of the episode.
        terminated: (L,) bool. Only the last entry can be set.
        truncated: (L,) bool. Only the last entry can be set, and only where `terminated` is not.
        costs: (L,) float32 ``info["cost"]`` after each step, or None where it is not reported.
        initial_cost: ``info["cost"]`` at reset, or None.
        constraints: (L,) float32 ``info["constraint"]`` of s[t], or None. Of several constraints by
            name it is the largest number, whose sign alone has a meaning.
        next_constraints: (L,) float32 the same of s[t+1], or None.
        named: For each name in ``info["constraint"]`` (L + 1,) h_k of s[0] to s[L]; empty where one
            number is reported.
        info: For each of `info_keys` its values after each step, (L, ...).
    """

    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    next_observations: npt.NDArray[np.float32]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    costs: npt.NDArray[np.float32] | None
    initial_cost: float | None
    constraints: npt.NDArray[np.float32] | None
    next_constraints: npt.NDArray[np.float32] | None
    named: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    info: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(self.rewards.sum(dtype=np.float64))

    @property
    def total_cost(self) -> float:
        """Undiscounted sum of the costs after each step.

        Raises:
            ValueError: The environment reports no cost.
        """
        if self.costs is None:
            raise ValueError("the environment reports no info['cost'] at its steps")
        return float(self.costs.sum(dtype=np.float64))

    @property
    def cost_or_violations(self) -> float:
        """Sum of the costs, or the number of steps in violation where no cost is reported.

        Raises:
            ValueError: The environment reports neither costs nor constraints.
        """
        if self.costs is None and self.next_constraints is not None:
            return float(np.count_nonzero(self.next_constraints > 0))
        return self.total_cost

    @property
    def intervened(self) -> npt.NDArray[np.bool_] | None:
        """(L,) whether a shield replaced the action; None where no shield reports it."""
        replaced = self.info.get(INTERVENED)
        return None if replaced is None else np.asarray(replaced, np.bool_)

    @property
    def violated(self) -> bool:
        """Whether h > 0 in any state, or cost > 0 where no constraint is reported.

        Raises:
            ValueError: The environment reports neither.
        """
        if self.constraints is not None and self.next_constraints is not None:
            # The comparison is negated so that NaN counts as a violation.
            return not bool(self.constraints[0] <= 0 and (self.next_constraints <= 0).all())
        if self.costs is None:
            raise ValueError("the environment reports neither info['constraint'] nor info['cost']")
        return not bool((self.initial_cost or 0.0) <= 0 and (self.costs <= 0).all())


def intervention_rate(episodes: Sequence[Episode]) -> float | None:
    """Return the share of all steps of `episodes` in which a shield replaced the action.

    The result is None where no episode had a shield that reports it.
    """
    replaced = [one.intervened for one in episodes if one.intervened is not None]
    return float(np.concatenate(replaced).mean()) if replaced else None


def recorded_episode(
    rows: Mapping[str, Array],
    at_reset: Infos,
    after: Mapping[str, Sequence[Any] | Array],
    info_keys: Sequence[str] = (),
) -> Episode:
    """Return an episode of L steps, with the labels that its infos report.

    Args:
        rows: Arrays (L, ...) named as in `Episode`: observations, actions, rewards,
            next_observations, terminated and truncated.
        at_reset: Infos at reset by key, None where a key was not reported.
        after: L infos after the steps by key, None where a key was not reported; an array where
            every step reported it.
        info_keys: Keys of `after` to keep in `Episode.info`.

    Raises:
        ValueError: A key is reported at some steps only, or a label is not a valid number.
    """
    costs, reached = (_complete(after[key], key) for key in (COST, CONSTRAINT))
    if (reached is None) != (at_reset[CONSTRAINT] is None):
        raise ValueError(
            "info['constraint'] must be reported at reset and at every step (h of the state "
            f"just reached), but is missing at {'every step' if reached is None else 'reset'}; "
            "add it there, or leave it out and report info['cost']"
        )
    constraints = next_constraints = None
    named: dict[str, Array] = {}
    if reached is not None:
        if reached.dtype == object or isinstance(at_reset[CONSTRAINT], Mapping):
            named = _named([at_reset[CONSTRAINT], *reached])
            every = np.max(list(named.values()), axis=0)
        else:
            start = number_of(at_reset, CONSTRAINT)
            every = np.append(np.float32(start), _numbers(reached, CONSTRAINT))
        every = every.astype(np.float32)
        constraints, next_constraints = every[:-1], every[1:]
    info = {}
    for key in info_keys:
        values = _complete(after[key], key)
        if values is None:
            raise ValueError(f"info_keys must be reported at every step, but {key!r} is not")
        info[key] = values
    actions = np.array(rows["actions"], np.float32)
    for t, executed in enumerate(after[EXECUTED]):
        if executed is not None:
            actions[t] = np.ravel(executed)
    return Episode(
        observations=rows["observations"].astype(np.float32),
        actions=actions,
        rewards=rows["rewards"].astype(np.float32),
        next_observations=rows["next_observations"].astype(np.float32),
        terminated=rows["terminated"],
        truncated=rows["truncated"] & ~rows["terminated"],
        costs=None if costs is None else _numbers(costs, COST).astype(np.float32),
        initial_cost=number_of(at_reset, COST),
        constraints=constraints,
        next_constraints=next_constraints,
        named=named,
        info=info,
    )


def number_of(info: Infos, key: str) -> float | None:
    """Return the label that an info reports under `key`, or None where it reports none.

    Of several constraints by name it is the largest.

    Raises:
        ValueError: The label is not a single finite number, or it is a cost below 0.
    """
    value = info.get(key)
    if isinstance(value, Mapping) and key == CONSTRAINT:
        value = largest(value)
    return None if value is None else float(_numbers(np.asarray(value)[None], key)[0])


def _named(reports: Sequence[Any]) -> dict[str, Array]:
    """Return the reports (L + 1,) of several constraints, by name."""
    largest(reports[0])  # an error where there is no constraint, or no number
    names = set(reports[0]) if isinstance(reports[0], Mapping) else set()
    for t, report in enumerate(reports):
        if not isinstance(report, Mapping) or set(report) != names:
            told = sorted(report) if isinstance(report, Mapping) else "a number"
            raise ValueError(
                f"info[{CONSTRAINT!r}] must hold the same constraints in every state, but in state "
                f"{t} of an episode it is {told}, and at reset {sorted(names) or 'a number'}"
            )
    columns = {name: np.stack([report[name] for report in reports]) for name in sorted(names)}
    return {
        name: _numbers(column, CONSTRAINT, f"[{name!r}]").astype(np.float64)
        for name, column in columns.items()
    }


def _complete(values: Sequence[Any] | Array, key: str) -> Array | None:
    """Return the values of a key at every step, or None where no step reports the key."""
    if isinstance(values, np.ndarray):
        return values
    missing = [t for t, value in enumerate(values) if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(
            f"info[{key!r}] must be reported at every step, but it is missing at step "
            f"{missing[0]} of an episode"
        )
    return np.stack(values)


def _numbers(array: Array, key: str, name: str = "") -> Array:
    if array.size != len(array):
        raise ValueError(
            f"info[{key!r}]{name} must be one number, got shape {array.shape[1:]}; with several "
            "constraints report a mapping from the name of each to its number"
        )
    numbers = array.reshape(len(array))
    bad = ~np.isfinite(numbers.astype(np.float64))
    if key == COST:
        bad |= numbers < 0
    if bad.any():
        step = int(np.argmax(bad))
        rule = "finite and at least 0 (0 is safe)" if key == COST else "finite"
        raise ValueError(f"info[{key!r}]{name} must be {rule}, got {numbers[step]} at entry {step}")
    return numbers
