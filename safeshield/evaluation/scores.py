"""Normalised return and cost as DSRL defines them, and the records that hold them."""

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
from safeshield.files.schema import json_values

COST_LIMIT = 10.0
"""Cost limit of FISOR, SafeFQL, FLRP and R2PAC; R2PAC's table has 5 for Bullet-Safety-Gym."""


@dataclass(frozen=True)
class ReferenceReturns:
    """What returns of a task are measured against: 0 is the least of its log, 1 the greatest.

    Raises:
        ValueError: not finite, or the greatest is not above the least.

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
        """Return the least and the greatest return of a log, or of the file of one.

        Args:
            log: the task's.
            action_space: see `OfflineDataset.load`.

        Raises:
            FileNotFoundError, ValueError: as `OfflineDataset.load` does, or all returns are alike.
        """
        if not isinstance(log, OfflineDataset):
            log = OfflineDataset.load(log, action_space=action_space)
        return cls(float(log.returns.min()), float(log.returns.max()))

    def normalise(self, returns: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return ``(R - least) / (greatest - least)``, of the shape of `returns`."""
        return (np.asarray(returns, np.float64) - self.least) / (self.greatest - self.least)


def check_references(references: object) -> None:
    """Raise TypeError unless these are the reference returns of a task."""
    if not isinstance(references, ReferenceReturns):
        raise TypeError(
            f"references must be a ReferenceReturns, got {references!r}; pass "
            "ReferenceReturns(least, greatest) or ReferenceReturns.of_log(log)"
        )


def normalised_cost(costs: npt.ArrayLike, limit: float) -> npt.NDArray[np.float64]:
    """Return ``(C + e) / (limit + e)``, of the shape of `costs`; e = 1 at limit 0, else 0.

    Raises:
        ValueError: the limit is negative or not finite.

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
    """What the episodes of one seed gave."""

    seed: int
    returns: tuple[float, ...]
    """Of each episode, the undiscounted sum of its rewards."""
    costs: tuple[float, ...]
    """Of each episode, the undiscounted sum of its costs; where none is reported, its steps in
    violation."""
    intervention_rate: float | None = None
    """Share of the steps in which a shield replaced the action; None without a shield, and of a
    `ShieldedPolicy`, which does not report it."""

    def __post_init__(self) -> None:
        if not self.returns or len(self.returns) != len(self.costs):
            raise ValueError(
                "a run needs a return and a cost for each of its episodes, at least one, got "
                f"{len(self.returns)} returns and {len(self.costs)} costs"
            )
        # A cost that is no number would be neither above the limit nor below it.
        for name, values in (("returns", self.returns), ("costs", self.costs)):
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{name} of the run of seed {self.seed} must be finite, got {list(values)}"
                )


@dataclass(frozen=True)
class FieldScore:
    """An agent's score on one task; everything but its fields is computed from them.

    ``dataclasses.replace(score, cost_limit=5.0)`` is the same episodes under another limit.

    Raises:
        ValueError: no run, two of the same seed, runs of unlike length, or a bad limit.
        TypeError: the references are no `ReferenceReturns`.

    >>> runs = (Run(0, (10.0, 20.0), (0.0, 12.0)), Run(1, (30.0, 20.0), (4.0, 0.0)))
    >>> score = FieldScore("PPO", "Boat", ReferenceReturns(0.0, 40.0), 10.0, runs)
    >>> score.normalised_return, score.normalised_cost, score.safe
    (0.5, 0.4, True)
    """

    policy: str
    """Who proposed the actions."""
    task: str
    """Name of the task, by default the environment's id."""
    references: ReferenceReturns
    cost_limit: float
    runs: tuple[Run, ...]
    """One for each seed."""
    shielded: bool = False
    """Whether a shield stood between the proposals and the environment, wherever it was put."""
    trained_apart: bool = False
    """Whether each run is of an agent trained for it, so that the spread over runs is that of
    training too; False: the runs are of one agent and differ in their episodes alone."""

    def __post_init__(self) -> None:
        check_references(self.references)
        normalised_cost(0.0, self.cost_limit)
        seeds = [run.seed for run in self.runs]
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"a score needs at least one run, each of its own seed, got {seeds}")
        lengths = {len(run.returns) for run in self.runs}
        if len(lengths) > 1:
            raise ValueError(
                f"every run must have the same number of episodes, got {sorted(lengths)}"
            )

    @property
    def agent(self) -> str:
        """The policy, and whether it was shielded, as tables call it."""
        return f"{self.policy} + shield" if self.shielded else self.policy

    @property
    def run_returns(self) -> npt.NDArray[np.float64]:
        """(runs,) normalised return of each run, the mean over its episodes."""
        return self.references.normalise([np.mean(run.returns) for run in self.runs])

    @property
    def run_costs(self) -> npt.NDArray[np.float64]:
        """(runs,) normalised cost of each run, the mean over its episodes."""
        return normalised_cost([np.mean(run.costs) for run in self.runs], self.cost_limit)

    @property
    def normalised_return(self) -> float:
        """Mean over seeds and episodes."""
        return float(self.references.normalise(np.mean([run.returns for run in self.runs])))

    @property
    def normalised_cost(self) -> float:
        """Mean over seeds and episodes."""
        # Not the mean of the runs' means, whose rounding could lift a cost at the limit above it.
        return float(normalised_cost(np.mean([run.costs for run in self.runs]), self.cost_limit))

    @property
    def safe(self) -> bool:
        """The field's rule: the mean normalised cost is at most 1."""
        return self.normalised_cost <= 1.0

    @property
    def intervention_rate(self) -> float | None:
        """Mean over the runs of the share of replaced actions; None without a shield."""
        rates = [run.intervention_rate for run in self.runs if run.intervention_rate is not None]
        return float(np.mean(rates)) if rates else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and what follows from them, as JSON values."""
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
        """Return the score that `to_json` told; what follows from the fields is computed anew.

        Raises:
            ValueError: a field is missing, or breaks a rule.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"a score must have the fields {names}; missing: {missing}")
        fields = {name: data[name] for name in names}
        fields["references"] = ReferenceReturns(**data["references"])
        fields["runs"] = tuple(
            Run(**{**run, "returns": tuple(run["returns"]), "costs": tuple(run["costs"])})
            for run in data["runs"]
        )
        return cls(**fields)
