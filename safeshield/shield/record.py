"""What a calibration promises, in a form that is kept in the shield's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from safeshield.files.schema import json_values, record_from_json


@dataclass(frozen=True)
class PolicyResult:
    """What was seen at the chosen threshold with one policy proposing the actions."""

    policy: str
    episodes: int
    """N, episodes, all started at states with V_h <= -delta."""
    violations: int
    """k, episodes with h > 0 (or cost > 0) at any state."""
    bound: float
    """Upper confidence bound on the violation rate of that policy under the shield."""
    intervention_rate: float
    """Share of the steps in which the shield replaced the action."""


@dataclass(frozen=True)
class Rung:
    """The test of one threshold against one policy."""

    delta: float
    policy: str
    episodes: int
    """N, tested; fewer than asked for where the test stopped early, having failed."""
    violations: int
    """k."""
    bound: float
    """Upper confidence bound on the violation rate."""
    passed: bool


@dataclass(frozen=True)
class CalibrationRecord:
    """One calibration: what is promised, for whom, from where, and what was observed."""

    delta: float
    """The threshold, in units of h."""
    epsilon: float
    """The promised violation rate per episode."""
    confidence: float
    """Probability, over the draw of the calibration episodes, that the promise is true."""
    policies: tuple[PolicyResult, ...]
    """Who proposed the actions."""
    environment: str
    """Id of the environment, or its class."""
    start_distribution: str
    """Where episodes start, in words."""
    start_share: float
    """Share of the environment's own starts that were accepted at delta."""
    walk: tuple[Rung, ...]
    """Every test of the walk, in order."""
    seed: int
    date: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    """Of the packages that were used."""
    replacement: str = ""
    """How the shield replaced actions, where not by default; see `shield.replacement.describe`."""
    environment_kwargs: dict[str, Any] | None = None
    """Keyword arguments the environment was made with, JSON values; None where not known."""

    @property
    def promise(self) -> str:
        """The promise in words, no wider than what was tested."""
        names = ", ".join(f"'{result.policy}'" for result in self.policies)
        seen = "; ".join(
            f"'{result.policy}': {result.violations} of {result.episodes}"
            for result in self.policies
        )
        replaced = self.replacement and f", which replaces actions by {self.replacement},"
        return (
            f"With confidence {self.confidence:g} over the draw of the calibration episodes: an "
            f"episode of {self.environment} that starts as {self.start_distribution}, in which "
            f"actions are proposed by one of {names} and executed through this shield at delta "
            f"{self.delta:.4g}{replaced or ','} violates the constraint with probability at most "
            f"{self.epsilon:g}. Violating episodes seen: {seen}. For another policy, start "
            "distribution or environment nothing is promised."
        )

    def speaks_of(self, environment: str, kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether an environment is the one that was tested, as far as can be told.

        Args:
            environment: its id; "" where it is not known, and then nothing is compared.
            kwargs: `rollouts.copies.environment_kwargs`; where they, or those of the test, are not
                known, ids alone are compared.
        """
        if not environment:
            return True
        if environment != self.environment:
            return False
        known = kwargs is not None and self.environment_kwargs is not None
        return not known or kwargs == self.environment_kwargs

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return json_values(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Rebuild a record from what `to_json` wrote, checking every field.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        return record_from_json(cls, data, "record")
