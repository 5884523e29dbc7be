"""Normalised return and cost as DSRL defines them, and the records that store them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import json_values, record_from_json

COST_LIMIT = 10.0
"""Cost limit of FISOR, SafeFQL, FLRP and R2PAC. R2PAC's table uses 5 for Bullet-Safety-Gym."""


@dataclass(frozen=True)
class ReferenceReturns:
    """The least and the greatest return of a task's log, by which returns are normalised.

    A normalised return of 0 is the least return of the log, and 1 is the greatest.

    Raises:
        ValueError: A return is not finite, or the greatest is not above the least.

    >>> ReferenceReturns(-50.0, 150.0).normalise([-50.0, 50.0, 250.0]).tolist()
    [0.0, 0.5, 1.5]
    """

    least: float
    greatest: float

    def __post_init__(self) -> None:
        finite = math.isfinite(self.least) and math.isfinite(self.greatest)
        if not (finite and self.greatest > self.least):
            raise ValueError(
                "the reference returns must be finite, the greatest above the least, got "
                f"{self.least} and {self.greatest}; take them from a log with returns that differ"
            )

    @classmethod
    def of_log(
        cls,
        log: OfflineDataset | str | os.PathLike[str],
        *,
        action_space: gym.Space[Any] | None = None,
    ) -> Self:
        """Return the least and the greatest return of a log.

        Args:
            log: The log of the task, or the path of its file.
            action_space: See `OfflineDataset.load`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: `OfflineDataset.load` refuses the file, or all returns are equal.
        """
        if not isinstance(log, OfflineDataset):
            log = OfflineDataset.load(log, action_space=action_space)
        return cls(float(log.returns.min()), float(log.returns.max()))

    def normalise(self, returns: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return ``(R - least) / (greatest - least)``, in the shape of `returns`."""
        return (np.asarray(returns, np.float64) - self.least) / (self.greatest - self.least)


def check_references(references: object) -> None:
    """Raise TypeError unless `references` is a `ReferenceReturns`."""
    if not isinstance(references, ReferenceReturns):
        raise TypeError(
            f"references must be a ReferenceReturns, got {references!r}; pass "
            "ReferenceReturns(least, greatest) or ReferenceReturns.of_log(log)"
        )


def normalised_cost(costs: npt.ArrayLike, limit: float) -> npt.NDArray[np.float64]:
    """Return ``(C + e) / (limit + e)``, in the shape of `costs`; e is 1 for limit 0 and else 0.

    Raises:
        ValueError: The limit is negative or not finite.

    >>> normalised_cost([0.0, 5.0, 10.0], 10.0).tolist(), normalised_cost([0.0, 5.0], 0.0).tolist()
    ([0.0, 0.5, 1.0], [1.0, 6.0])
    """
    if not (math.isfinite(limit) and limit >= 0.0):
        raise ValueError(
            f"cost_limit must be finite and at least 0, got {limit}; the papers' is {COST_LIMIT:g}"
        )
    shift = 1.0 if limit == 0.0 else 0.0
    return (np.asarray(costs, np.float64) + shift) / (limit + shift)


@dataclass(frozen=True)
class Run:
    """Returns and costs of the episodes of one seed."""

    seed: int
    returns: tuple[float, ...]
    """Undiscounted sum of the rewards of each episode."""
    costs: tuple[float, ...]
    """Undiscounted sum of the costs of each episode, or its number of steps in violation where the
    environment reports no cost."""
    intervention_rate: float | None = None
    """Share of the steps in which a shield replaced the action. None without a shield, and for a
    `ShieldedPolicy`, which does not report it."""

    def __post_init__(self) -> None:
        if not self.returns or len(self.returns) != len(self.costs):
            raise ValueError(
                "a run needs a return and a cost for each of its episodes, at least one, got "
                f"{len(self.returns)} returns and {len(self.costs)} costs"
            )
        # A NaN cost would be neither above nor below the limit.
        for name, values in (("returns", self.returns), ("costs", self.costs)):
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{name} of the run of seed {self.seed} must be finite, got {list(values)}"
                )


@dataclass(frozen=True)
class FieldScore:
    """The score of an agent on one task. The properties are computed from the fields.

    ``dataclasses.replace(score, cost_limit=5.0)`` scores the same episodes under another limit.

    Raises:
        ValueError: There is no run, two runs have the same seed, the runs have different numbers of
            episodes, or the limit is out of range.
        TypeError: `references` is not a `ReferenceReturns`.

    >>> runs = (Run(0, (10.0, 20.0), (0.0, 12.0)), Run(1, (30.0, 20.0), (4.0, 0.0)))
    >>> score = FieldScore("PPO", "Boat", ReferenceReturns(0.0, 40.0), 10.0, runs)
    >>> score.normalised_return, score.normalised_cost, score.safe
    (0.5, 0.4, True)
    """

    policy: str
    """Name of the policy that proposed the actions."""
    task: str
    """Name of the task, by default the environment's id."""
    references: ReferenceReturns
    """Least and greatest return of the task's log."""
    cost_limit: float
    """Limit on the summed cost of an episode."""
    runs: tuple[Run, ...]
    """One run for each seed."""
    shielded: bool = False
    """Whether a shield filtered the proposals, either in the policy or around the environment."""
    trained_apart: bool = False
    """Whether a separate agent was trained for each run, so that the spread over runs includes that
    of training. If False, all runs are of one agent and differ only in their episodes."""

    def __post_init__(self) -> None:
        check_references(self.references)
        normalised_cost(0.0, self.cost_limit)
        seeds = [run.seed for run in self.runs]
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(
                f"a score needs at least one run, each with a different seed, got seeds {seeds}"
            )
        lengths = {len(run.returns) for run in self.runs}
        if len(lengths) > 1:
            raise ValueError(
                f"every run must have the same number of episodes, got {sorted(lengths)}"
            )

    @property
    def agent(self) -> str:
        """Name of the agent in tables: the policy, followed by "+ shield" where it was shielded."""
        return f"{self.policy} + shield" if self.shielded else self.policy

    @property
    def run_returns(self) -> npt.NDArray[np.float64]:
        """(runs,) mean normalised return over the episodes of each run."""
        return self.references.normalise([np.mean(run.returns) for run in self.runs])

    @property
    def run_costs(self) -> npt.NDArray[np.float64]:
        """(runs,) mean normalised cost over the episodes of each run."""
        return normalised_cost([np.mean(run.costs) for run in self.runs], self.cost_limit)

    @property
    def normalised_return(self) -> float:
        """Mean normalised return over seeds and episodes."""
        return float(self.references.normalise(np.mean([run.returns for run in self.runs])))

    @property
    def normalised_cost(self) -> float:
        """Mean normalised cost over seeds and episodes."""
        # The mean is over all episodes at once. The rounding of a mean of the runs' means could
        # lift a cost that is exactly at the limit above it.
        return float(normalised_cost(np.mean([run.costs for run in self.runs]), self.cost_limit))

    @property
    def safe(self) -> bool:
        """Whether the mean normalised cost is at most 1, the rule of the literature."""
        return self.normalised_cost <= 1.0

    @property
    def intervention_rate(self) -> float | None:
        """Mean over the runs of the share of replaced actions; None where no run reports it."""
        rates = [run.intervention_rate for run in self.runs if run.intervention_rate is not None]
        return float(np.mean(rates)) if rates else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the values computed from them as JSON values."""
        return {
            **json_values(self),
            "normalised_return": self.normalised_return,
            "normalised_cost": self.normalised_cost,
            "run_returns": self.run_returns.tolist(),
            "run_costs": self.run_costs.tolist(),
            "safe": self.safe,
            "intervention_rate": self.intervention_rate,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the score that `to_json` wrote. Only the fields are read; the rest is recomputed.

        Args:
            data: JSON values that `to_json` returned.

        Raises:
            ValueError: A field of the score, of a run or of the reference returns is missing, has
                another type, or breaks a rule.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"a score must have the fields {names}; missing: {missing}")
        return record_from_json(cls, {name: data[name] for name in names}, "score")
