"""The record of a calibration: its promise and its tests, as the shield's file keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from safeshield.files.schema import json_values, record_from_json


@dataclass(frozen=True)
class PolicyResult:
    """The result of the test of one policy's proposals at the chosen threshold."""

    policy: str
    episodes: int
    """Number N of episodes; all of them started in states with V_h <= -delta."""
    violations: int
    """Number k of episodes with h > 0 (or cost > 0) in any state."""
    bound: float
    """Upper confidence bound on the violation rate of that policy under the shield."""
    intervention_rate: float
    """Share of the steps in which the shield replaced the action."""


@dataclass(frozen=True)
class Rung:
    """The test of one threshold against one policy."""

    delta: float
    """The tested threshold, as its delta, in units of h."""
    policy: str
    """Name of the policy that proposed the actions."""
    episodes: int
    """Number N of tested episodes. It is smaller than asked for where the test failed early."""
    violations: int
    """Number k of violating episodes."""
    bound: float
    """Upper confidence bound on the violation rate."""
    passed: bool
    """Whether the test passed."""


@dataclass(frozen=True)
class CalibrationRecord:
    """One calibration: the promise, the proposers and starts it holds for, and the results."""

    delta: float
    """The chosen delta, in units of h. The shield's threshold is -delta."""
    epsilon: float
    """The promised violation rate per episode."""
    confidence: float
    """Probability, over the draw of the calibration episodes, that the promise is true."""
    policies: tuple[PolicyResult, ...]
    """The results for each policy that proposed the actions."""
    environment: str
    """Id of the environment, or its class."""
    start_distribution: str
    """Description in words of the states in which episodes start."""
    start_share: float
    """Share of the environment's own starts that were accepted at delta."""
    walk: tuple[Rung, ...]
    """All tests, in the order in which they were run."""
    seed: int
    """Seed of the calibration."""
    date: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    """Versions of the packages that were used, by name."""
    replacement: str = ""
    """How the shield replaced actions, "" for the default; see `shield.replacement.describe`."""
    environment_kwargs: dict[str, Any] | None = None
    """Keyword arguments with which the environment was made, as JSON values; None where they are
    not known."""

    @property
    def promise(self) -> str:
        """The promise in words; it covers only what was tested."""
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
        """Return whether nothing known distinguishes an environment from the one that was tested.

        Args:
            environment: The environment's id; "" where it is not known. Nothing is compared then.
            kwargs: The result of `rollouts.copies.environment_kwargs`, None where it is not known.
                Where it, or that of the tested environment, is not known, only ids are compared.
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
        """Return the record that `to_json` wrote as `data`, after a check of every field.

        Raises:
            ValueError: A field is missing, unknown or of a wrong type.
        """
        return record_from_json(cls, data, "record")
