"""What a calibration promises, in a form that is kept in the shield's file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from safeshield.files.schema import finite_number, json_values


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

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return json_values(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Rebuild a record, checking every field's type.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        fields = _fields(cls, data)
        policies, walk = _list(fields["policies"]), _list(fields["walk"])
        fields["policies"] = tuple(PolicyResult(**_fields(PolicyResult, x)) for x in policies)
        fields["walk"] = tuple(Rung(**_fields(Rung, x)) for x in walk)
        versions = fields["versions"]
        if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
            raise ValueError("record: 'versions' must be an object of strings")
        return cls(**fields)


_KINDS: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
}


def _fields(kind: type, data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"record: {kind.__name__} must be an object, got {type(data).__name__}")
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    # Fields with a default are younger than files that lack them.
    optional = {
        field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
    }
    if not set(fields) - optional <= set(data) <= set(fields):
        raise ValueError(
            f"record: {kind.__name__} must have the fields {sorted(fields)}, got {sorted(data)}"
        )
    for name, value in data.items():
        type_name = fields[name]
        allowed = _KINDS.get(type_name)
        wrong_bool = isinstance(value, bool) and type_name != "bool"
        if allowed is not None and (wrong_bool or not isinstance(value, allowed)):
            raise ValueError(f"record: '{name}' must be {type_name}, got {value!r:.60}")
        if type_name == "float":
            finite_number(value, f"record: '{name}'")
    return dict(data)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"record: expected a list, got {type(value).__name__}")
    return list(value)
