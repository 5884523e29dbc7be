"""What the runtime of a shield asks of a memory, of a monitor and of a flight recorder.

`ShieldRuntime` calls these protocols. `AdaptiveMargin` is a memory, `monitoring.PromiseMonitor` a
monitor, and `monitoring.ShieldLog` a recorder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from safeshield.rollouts.copies import Identity
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import Shield
from safeshield.spaces.shapes import Flags, Scalars

Array = npt.NDArray[Any]
PerEnv = Any
"""One value for each environment: an array (n, ...), or a plain Python value for a single one."""


class ShieldMemory(Protocol):
    """The state that a shield keeps for each of n environments from one step to the next."""

    def reset(self, mask: Flags, /) -> None:
        """Forget the environments in `mask` (n,), whose episodes begin or whose step has failed."""
        ...

    def limit(self, values: Scalars, threshold: Scalars, /) -> Scalars:
        """Return the numbers (n,) that Q_h must not exceed in the next step.

        The call must not change the memory.

        Args:
            values: (n,) V_h of the states, infinity where they are not readable.
            threshold: (n,) the present threshold. A returned limit above it has no effect.
        """
        ...

    def learn(self, report: FilterReport, reached: Scalars, counted: Flags, /) -> None:
        """Update the memory with one step.

        `report`, `reached` and `counted` are those of `AdaptiveMargin.learn`.
        """
        ...


class WatchedStep(NamedTuple):
    """One step of n environments, for an `EpisodeWatch`. All entries are (n,)."""

    counted: Flags
    """Whether an action was executed at all."""
    ended: Flags
    """Whether the step ended the episode, terminated or truncated."""
    constraint: Scalars
    """Constraint h of the next state as the environment reports it: NaN if it reports nothing, and
    infinity if the reported value is not a number."""
    cost: Scalars
    """Cost of the next state as the environment reports it; NaN and infinity as in
    `constraint`."""
    intervened: Flags
    """Whether the shield replaced the action."""
    supported: Flags
    """Whether the executed action looks like the log's; True without a support test."""
    residual: Scalars
    """V_h(s') - Q_h(s, a), in units of h; not finite where a value is not known."""


class EpisodeWatch(Protocol):
    """Follows the episodes of n environments, and judges the promise of the shield's record."""

    @property
    def state(self) -> str:
        """What the episodes say of the promise, in words."""
        ...

    @property
    def evidence(self) -> float:
        """The evidence E_t against the promise."""
        ...

    @property
    def revoked(self) -> bool:
        """Whether no further episode may be certified."""
        ...

    def begin(
        self, starts: Flags, certified: Flags, values: Scalars, constraint: Scalars, /
    ) -> None:
        """Begin new episodes; an episode that was under way there has been cut.

        Args:
            starts: (n,) whether an episode begins.
            certified: (n,) whether it begins certified.
            values: (n,) V_h of the states.
            constraint: (n,) constraint h of the states as the environment reports it: NaN if it
                reports nothing, and infinity if the reported value is not a number.
        """
        ...

    def step(self, step: WatchedStep, /) -> None:
        """Count one step, and judge the promise."""
        ...

    def fail(self) -> None:
        """Count a step that was executed and whose result is not known, before `cut`."""
        ...

    def cut(self) -> None:
        """Take all episodes that are under way as cut."""
        ...


class Watcher(Protocol):
    """A monitor of a shield's promise: `monitoring.PromiseMonitor`."""

    def attach(self, shield: Shield, count: int, /) -> EpisodeWatch:
        """Return what follows the episodes of `count` environments behind `shield`."""
        ...


class States(NamedTuple):
    """States of n environments, for a `StepRecorder`."""

    rows: Array
    """(n, obs) the observations, as rows; NaN where an observation is not known."""
    values: list[float]
    """V_h of the states, infinity where they are not readable."""
    constraint: list[float]
    """h that the environments report of the states, NaN where they report none."""
    cost: list[float]
    """Costs of the states, NaN where none are reported."""


class StepRecorder(Protocol):
    """Records the steps of n environments."""

    def begin(
        self, starts: Flags, certified: Flags, states: States, seeds: Sequence[int | None], /
    ) -> None:
        """Begin new episodes; an episode that was under way there has been cut.

        Args:
            starts: (n,) whether an episode begins.
            certified: (n,) whether it begins certified.
            states: The states of all environments.
            seeds: The seeds of the resets, None where no seed was passed.
        """
        ...

    def step(
        self,
        decision: Decision,
        verdicts: list[int],
        counted: list[bool],
        reward: list[float],
        terminated: list[bool],
        truncated: list[bool],
        reached: States,
        present: States,
        /,
    ) -> None:
        """Record one step; each list holds an item for each of n environments.

        Args:
            decision: The decision, as `ShieldRuntime.filter` returned it.
            verdicts: What the shield did, as indices into `report.VERDICTS`.
            counted: Whether an action was executed at all.
            reward: Reward as the environment returned it, NaN where it is no number.
            terminated: Whether the episode terminated.
            truncated: Whether it was truncated.
            reached: The states reached; of an episode that ended, its last state.
            present: The states in which the next actions are taken.
        """
        ...

    def fail(self, decision: Decision, verdicts: list[int], /) -> None:
        """Record a step that raised an error, of which no outcome is known.

        `decision` and `verdicts` are those of `step`. The environments may have executed the
        actions, or some of them.
        """
        ...

    def cut(self) -> None:
        """Take all episodes that are under way as cut."""
        ...

    def close(self) -> None:
        """End the recording, because the environments are closed."""
        ...


class Recorder(Protocol):
    """A flight recorder: `monitoring.ShieldLog`."""

    def attach(
        self,
        shield: Shield,
        count: int,
        identity: Mapping[str, Any],
        environment: Identity | None,
        /,
    ) -> StepRecorder:
        """Return what records the steps of `count` environments behind `shield`.

        Args:
            shield: The shield.
            count: The number n of environments.
            identity: `ShieldRuntime.identity`.
            environment: What is known of the environment; None: nothing.
        """
        ...


class Decision(NamedTuple):
    """The decision on the actions of all environments in one step."""

    proposed: Array
    """(n, *shape) the proposed actions; (*shape) for a single environment."""
    executed: Array
    """The actions to execute, of the same shape; the array shares no memory with `proposed`."""
    intervened: PerEnv
    """Whether the executed action replaces the proposed one."""
    value: PerEnv
    """Q_h of the executed action."""
    threshold: PerEnv
    """The number that Q_h must not exceed."""
    shadowed: tuple[PerEnv, PerEnv] | None = None
    """In shadow mode, whether the shield would have intervened, and the action that it would have
    executed; None in the mode that executes it."""
