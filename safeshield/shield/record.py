"""The record of a calibration: its promise and its tests, as the shield's file keeps them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self

from safeshield.files.schema import json_values, record_from_json
from safeshield.rollouts.copies import ACTUATOR_FAULTS, SENSOR_FAULTS, Identity

VIOLATION: Final = "violation"
COST_ABOVE: Final = "cost above"
MEAN_COST: Final = "mean cost"


Wrappers = Sequence[tuple[str, dict[str, Any] | None]]
_LABELS_ONLY = (
    "ConstraintFromFunction", "ConstraintFromState", "CostFromFunction", "CostFromStep",
    "_FiveValues", "Monitor",
)  # fmt: skip
"""Wrappers that report labels or statistics and change nothing else."""
_FAULTS = (*SENSOR_FAULTS, *ACTUATOR_FAULTS)


@dataclass(frozen=True)
class PolicyResult:
    """The result of the test of one policy's proposals at the chosen threshold."""

    policy: str
    episodes: int
    """Number N of episodes; all of them started in states with V_h <= -delta."""
    violations: int
    """Number k of episodes with h > 0 (or cost > 0) in any state; for a promise about costs, of
    episodes with a cost above the limit, or with any cost where the mean is promised."""
    bound: float
    """Upper confidence bound on the violation rate of that policy under the shield, or on the mean
    cost."""
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
class EnvironmentWrapper:
    """One wrapper of an environment."""

    name: str
    """Name of its class."""
    arguments: dict[str, Any] | None
    """Its arguments as JSON values; None where it does not tell them."""


@dataclass(frozen=True)
class PilotPoint:
    """What a threshold did with one policy: in the pilot, or in a test that found none to pass."""

    delta: float
    """The threshold's distance from 0, in units of h."""
    policy: str
    episodes: int
    violations: int
    """Number of episodes that count against the promise, as in `PolicyResult`."""
    start_share: float
    """Share of the environment's own starts with V_h <= -delta."""
    intervention_rate: float
    """Share of the steps in which the shield replaced the action."""


RESERVED_SEEDS = 2**21
"""Number of the environment's seeds that an attempt reserves, from its `first_seed` on."""


@dataclass(frozen=True)
class Attempt:
    """One calibration that a shield remembers, whether it passed or not."""

    environment: str
    """Id of the environment, or its class."""
    policies: tuple[str, ...]
    level: float
    """Level at which the thresholds were tested: an upper bound on the probability that this
    attempt promises too much. It is 0 where the pilot found nothing to test."""
    passed: bool
    first_seed: int
    """First of the environment's seeds that the attempt reserved; -1 where it is not known."""

    def counts_for(self, environment: str, policies: Collection[str]) -> bool:
        """Whether it was an attempt in the same environment with one of the same policies."""
        return self.environment == environment and bool(set(policies) & set(self.policies))


@dataclass(frozen=True)
class CalibrationRecord:
    """One calibration: the promise, the proposers and starts it holds for, and the results."""

    delta: float
    """The chosen delta, in units of h. The shield's threshold is -delta."""
    epsilon: float
    """The promised violation rate per episode. For a mean cost it is `limit` / `cost_bound`."""
    confidence: float
    """Confidence that was asked for. A first attempt is tested at the level 1 - confidence; see
    `attempts` for later ones."""
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
    kind: Literal["violation", "cost above", "mean cost"] = VIOLATION
    """Kind of the promise: "violation", "cost above" or "mean cost"."""
    limit: float | None = None
    """Limit of an episode's summed cost, or of its mean, where the promise is about costs."""
    cost_bound: float | None = None
    """Declared bound of an episode's summed cost, where the mean cost is promised."""
    deterministic: bool | None = None
    """The `deterministic` that policies with a method ``predict`` were called with. None in
    records from before it was stored, where it was True."""
    horizon: int | None = None
    """Greatest number of steps of an episode; None where there is no limit or it is not known."""
    wrappers: tuple[EnvironmentWrapper, ...] | None = None
    """Wrappers of the environment, the innermost first; None where they are not known."""
    pilot: tuple[PilotPoint, ...] = ()
    """The pilot that proposed the thresholds; empty where they were given."""
    walks_planned: int = 1
    """Number m of walks that share the level: each test has the level of the attempt divided by m,
    and where a walk reaches no threshold, the next one begins. It is 2 where a pilot proposed the
    thresholds, and 1 where they were given and in older records."""
    attempts: tuple[Attempt, ...] = ()
    """The attempts on this shield that are known, the present one last. Attempts that were made
    elsewhere, for instance on another copy of the file, are not known."""

    _subject: ClassVar[str] = "shield"
    _tested: ClassVar[str] = "these policies"

    @property
    def faults(self) -> tuple[EnvironmentWrapper, ...]:
        """The wrappers that are faults of sensors and actuators (`rollouts.faults`)."""
        return tuple(one for one in self.wrappers or () if one.name in _FAULTS)

    @property
    def sees_the_state(self) -> bool:
        """Whether the observations were those of the states, without a fault of a sensor."""
        return not any(one.name in SENSOR_FAULTS for one in self.faults)

    @property
    def promise(self) -> str:
        """The promise in words; it covers only what was tested."""
        seen = "; ".join(
            f"'{result.policy}': {result.violations} of {result.episodes}"
            for result in self.policies
        )
        length = "" if self.horizon is None else f" of at most {self.horizon} steps"
        claim, counted = {
            VIOLATION: (
                f"violates the constraint with probability at most {self.epsilon:g}",
                "Violating episodes seen",
            ),
            COST_ABOVE: (
                f"has a summed cost above {self.limit or 0.0:g} with probability at most "
                f"{self.epsilon:g}",
                "Episodes above it seen",
            ),
            MEAN_COST: (
                f"has a mean summed cost of at most {self.limit or 0.0:g}, if no episode's can "
                f"exceed {self.cost_bound or 0.0:g}",
                "Episodes with a cost seen",
            ),
        }[self.kind]
        return (
            f"With confidence {self.confidence:g} over the draw of the calibration episodes: an "
            f"episode of {self.environment}{self._under()}{length} that starts as "
            f"{self.start_distribution}, in which {self._acting()} {claim}. {counted}: {seen}."
            f" Of the starts drawn, {self.start_share:.0%} had V_h <= -delta."
            f"{self._about_attempts()} For another policy, start distribution, horizon or "
            "environment nothing is promised."
        )

    def _proposing(self) -> str:
        """Return the names of the policies, and how they were called."""
        names = ", ".join(f"'{result.policy}'" for result in self.policies)
        acting = "" if self.deterministic is None else f" (deterministic={self.deterministic})"
        return names + acting

    def _under(self) -> str:
        """Return the faults in words, "" where there are none."""
        if not self.faults:
            return ""
        told = []
        for one in self.faults:
            given = ", ".join(f"{name}={value}" for name, value in (one.arguments or {}).items())
            told.append(f"{one.name}({given})")
        return f" with the faults {', '.join(told)},"

    def _acting(self) -> str:
        """Return who acts in the promised episodes, in words."""
        replaced = self.replacement and f", which replaces actions by {self.replacement},"
        return (
            f"actions are proposed by one of {self._proposing()} and executed through this "
            f"shield at delta {self.delta:.4g}{replaced or ','}"
        )

    def _about_attempts(self) -> str:
        """Return the sentences about earlier attempts, "" where none is known."""
        names = [result.policy for result in self.policies]
        levels = [one.level for one in self.attempts if one.counts_for(self.environment, names)]
        if len(levels) < 2:
            return ""
        return (
            f" This was attempt {len(levels)} on this {self._subject} with {self._tested} here, "
            f"tested at the level {levels[-1]:.3g}; with the earlier ones, the probability of a "
            f"wrong promise is at most {min(sum(levels), 1.0):.3g}. Attempts made elsewhere are "
            "not known."
        )

    def differences(self, env: Identity) -> list[str]:
        """Return in words how an environment differs from the one that was tested.

        What the record or the environment does not say is not compared, except that faults of
        sensors and actuators must be known to be the same. An environment without an id need not
        have a time limit. A shorter horizon is no difference, nor is an argument that is given its
        default value.
        """
        told = []
        if env.name and env.name != self.environment:
            told.append(f"its id is {env.name}, not {self.environment}")
        kwargs = self.environment_kwargs
        if env.name and kwargs is not None and not env.made_with(kwargs):
            told.append(f"its arguments are {env.kwargs}, not {kwargs}")
        if self.wrappers is not None:
            tested = [(one.name, one.arguments) for one in self.wrappers]
            if env.wrappers is None:
                if self.faults:
                    told.append(f"its wrappers are not known, and those of the record are {tested}")
            elif not _same_wrappers(env.wrappers, tested):
                hidden = any(x[0] in _FAULTS and x[1] is None for x in (*env.wrappers, *tested))
                told.append(
                    f"its wrappers are {env.wrappers}, not {tested}"
                    + (" (None: its arguments are not known)" if hidden else "")
                )
        longer = bool(env.name) if env.horizon is None else env.horizon > (self.horizon or 0)
        if self.horizon is not None and longer:
            told.append(
                f"its episodes last up to {env.horizon or 'any number of'} steps, not "
                f"{self.horizon}"
            )
        return told

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


@dataclass(frozen=True)
class ActorRecord(CalibrationRecord):
    """The calibration of an actor that acts alone, with no shield between it and the environment.

    The fields are those of `CalibrationRecord`. `delta` is the distance from 0 that the value of a
    certified start keeps, V_h <= -delta, and it plays no part in the choice of actions.
    `policies` has one entry, the actor, and its share of replaced actions is 0.
    """

    _subject: ClassVar[str] = "agent"
    _tested: ClassVar[str] = "this actor"

    def _acting(self) -> str:
        return f"{self._proposing()} acts alone, without a shield,"


def _same_wrappers(one: Wrappers, other: Wrappers) -> bool:
    """Return whether wrappers agree.

    Arguments that are not known are not compared, except those of faults.
    """
    one, other = ([x for x in each if x[0] not in _LABELS_ONLY] for each in (one, other))
    return len(one) == len(other) and all(
        name == same and (a == b if None not in (a, b) else name not in _FAULTS)
        for (name, a), (same, b) in zip(one, other, strict=True)
    )
