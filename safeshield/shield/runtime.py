"""The shielded step: observe the states, filter the actions, update thresholds, fill infos.

The wrappers of a single environment, of a vector environment and of Stable-Baselines3's `VecEnv`
translate between their interface and a `ShieldRuntime`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, get_args

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.copies import Identity
from safeshield.rollouts.infos import (
    ACTION_MASK,
    BINDING,
    CERTIFIED,
    CONSTRAINT,
    COST,
    EVIDENCE,
    EXECUTED,
    INTERVENED,
    PENALTY,
    PROMISE,
    PROPOSED,
    SAFE_SET,
    SENSOR,
    SHIELDED,
    SIGNATURE,
    STAMP,
    THRESHOLD,
    VALUE,
    WOULD_INTERVENE,
    Infos,
)
from safeshield.shield.adaptive import AdaptiveMargin, AdaptiveThreshold, as_adaptive
from safeshield.shield.critics import StateValue
from safeshield.shield.masks import Mask, check_discrete, with_own_mask
from safeshield.shield.protocols import (
    Decision,
    PerEnv,
    Recorder,
    ShieldMemory,
    States,
    WatchedStep,
    Watcher,
)
from safeshield.shield.report import ACCEPTED, FilterReport, verdicts
from safeshield.shield.reported import (
    InfoDicts,
    Reports,
    as_number,
    broken_reports,
    listed,
    under_names,
    watched_labels,
)
from safeshield.shield.sensors import SensorState
from safeshield.shield.shield import (
    HasShield,
    NoReportWarning,
    OtherEnvironmentWarning,
    Shield,
    as_shield,
)
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import fitted, plain
from safeshield.spaces.shapes import Flags, Scalars
from safeshield.values.constraint import SeveralConstraints

Array = npt.NDArray[Any]
Mode = Literal["shield", "shadow"]
"""Whether the shield's decisions are executed, or only reported."""


class ShieldRuntime:
    """Applies a shield to environments that step together.

    One step consists of these calls: `filter` the proposed actions, pass the decision's actions to
    the environments, `observe` the states reached, `update` thresholds that adapt, and read
    `step_infos`. A reset is `observe` and `start_infos`. Code that moves the environments must run
    inside ``with runtime.transition:``, so that no action is judged in a state that the
    environments have left.

    Args:
        shield: The shield that filters the actions.
        num_envs: Number of environments; observations and actions have a leading axis of that
            length. None means a single environment, whose observations and actions have no such
            axis, and whose decisions and infos are plain Python.
        dtype: Dtype of the environments' action space; by default that of the shield's.
        adaptive: Settings by which each environment's threshold follows its errors
            (`AdaptiveThreshold`, or a dict of its arguments); None for a fixed threshold.
        intervention_penalty: Number that is subtracted from the reward at an intervention.
        certifies: Whether the shield's record may apply to these environments, as returned by
            `Shield.check_fits`. Where it is False, no state is certified.
        mode: "shield" executes what the shield decides. "shadow" executes the proposed actions
            unchanged, and reports what the shield would have done; nothing is certified, and
            nothing adapts.
        memory: Can make thresholds stricter depending on earlier steps. The runtime resets the
            memory of each environment whose episode begins, and of all environments after a
            failure. None means that each decision depends only on the present state.
        monitor: Watches the promise of the shield's record. The runtime reports the episodes to it
            by `count`, and certifies none once the promise is revoked. None: no one watches.
        log: Records every step that `count` reports. None: nothing is recorded.
        environment: What is known of the environment, for `log`.

    Attributes:
        adaptive: The margins of the environments; None where the threshold is fixed.
        values: V_h of the states last observed, infinity where they are not readable.
        binding: Names of the largest constraints in these states, see `rollouts.infos.BINDING`;
            None for a shield of one constraint.
        rows: (n, obs) the last observations, as rows of `spaces.rows`.
        infos: The infos that came with the last observations.
        keys: The keys of infos that the runtime reads; None where it may read any key.
        last_keys: The keys that it reads of an episode's last infos.

    Raises:
        TypeError: `adaptive`, `monitor` or `log` is of a wrong type.
        ValueError: A setting in `adaptive` is out of range, the penalty is negative or not finite,
            `monitor` watches another shield, or `log` records another one.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import SafeFQL, SafeFQLConfig, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> runtime = ShieldRuntime(agent.shield().with_delta(0.05), 3)
    >>> runtime.observe(log.observations[:3], [{}] * 3).shape
    (3,)
    >>> decision = runtime.filter(log.actions[:3])
    >>> decision.executed.shape, decision.intervened.shape
    ((3, 2), (3,))
    """

    def __init__(
        self,
        shield: Shield,
        num_envs: int | None = None,
        *,
        dtype: np.dtype[Any] | None = None,
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        intervention_penalty: float = 0.0,
        certifies: bool = True,
        memory: ShieldMemory | None = None,
        monitor: Watcher | None = None,
        log: Recorder | None = None,
        environment: Identity | None = None,
        mode: Mode = "shield",
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {list(get_args(Mode))}, got {mode!r:.40}")
        self.shadow = mode == "shadow"
        extras = adaptive, memory, monitor
        if self.shadow and (intervention_penalty or any(one is not None for one in extras)):
            raise ValueError(
                "mode='shadow' changes and promises nothing, so it has no adaptive threshold, no "
                f"penalty, no memory and no monitor, got adaptive={adaptive}, "
                f"intervention_penalty={intervention_penalty}, monitor={monitor}: leave them out, "
                "or use mode='shield'"
            )
        if not 0.0 <= intervention_penalty < np.inf:
            raise ValueError(
                "intervention_penalty must be finite and at least 0 (it is subtracted from the "
                f"reward), got {intervention_penalty}"
            )
        if monitor is not None and not hasattr(monitor, "attach"):
            raise TypeError(
                "monitor must be a PromiseMonitor of the shield, or None, got "
                f"{type(monitor).__name__}"
            )
        if log is not None and not hasattr(log, "attach"):
            raise TypeError(f"log must be a ShieldLog('folder'), or None, got {type(log).__name__}")
        self.shield = shield
        self.num_envs = num_envs
        self.intervention_penalty = float(intervention_penalty)
        self._count = 1 if num_envs is None else num_envs
        settings = as_adaptive(adaptive)
        self.adaptive = (
            None
            if settings is None
            else AdaptiveMargin(settings, shield.delta, self._count, shield.model.scale.rounding)
        )
        codec = shield.model.action_codec
        self._codec = codec
        self._discrete = codec.discrete
        self._dtype = np.dtype(shield.action_space.dtype if dtype is None else dtype)
        self._nothing = codec.nothing
        if num_envs is not None:
            self._nothing = np.broadcast_to(codec.nothing, (num_envs, *codec.nothing.shape))
        self._shape = self._nothing.shape
        self._calibrated = shield.threshold
        self._vouched = certifies and shield.record is not None and not self.shadow
        self._near = shield.model.scale.agreement
        # Observations of a record with faults of sensors say nothing about the true h.
        self._sees = shield.record is None or shield.record.sees_the_state
        self._sensors = shield.sensor_state(self._count)
        self._aged = self._sensors is not None and shield.sensors.age is not None  # type: ignore[union-attr]
        # Whether the present episodes began in certified states that nothing has contradicted.
        self._covered = np.zeros(self._count, np.bool_)
        self._contradicted = np.zeros(self._count, np.bool_)
        self._withdrawn = np.zeros(self._count, np.bool_)
        # Whether something that is no number was reported of the present states.
        self._sound = np.zeros(self._count, np.bool_)
        self._broken = self._sound
        self._told_broken = False
        # Whether one of the two arrays above has a True.
        self._doubted = False
        self._warned = False
        # Whether the present states came without a report, until a warning has said so.
        self._silent: PerEnv = False
        self._told_silent = False
        self._memory = memory
        self._watch = None if monitor is None else monitor.attach(shield, self._count)
        self._recorder = (
            None if log is None else log.attach(shield, self._count, self.identity, environment)
        )
        self._reports: Reports | None = None
        # Constraint and cost that were reported of the present states, as `watched_labels`.
        self._labels: tuple[PerEnv, PerEnv] = np.nan, np.nan
        source = shield.model.constraint
        self._reported = source is not None and not source.available
        self._own = () if source is None else source.names
        # The last name is that of an observation that is not readable.
        self._names: Array | None = None
        if isinstance(source, SeveralConstraints):
            self._names = np.array([*source.names, ""])
        self.keys = (
            *((ACTION_MASK,) if codec.discrete else ()),
            *((CONSTRAINT,) if self._reported else ()),
            *((STAMP,) if self._aged else ()),
        )
        self._reporting = self._watch is not None or self._recorder is not None
        self.last_keys = (*self.keys, CONSTRAINT, COST) if self._reporting else self.keys
        self.transition = Transition(self)
        self.values: PerEnv = None
        self.binding: PerEnv = None
        self.rows: Array = np.empty((0, shield.model.observation_codec.width))
        # This is None while the environments may be in a state that was not observed.
        self._states: StateValue | None = None
        self.infos: InfoDicts = [{}] * self._count
        self._masks: Mask | None = None
        self._report: FilterReport | None = None
        self._decided = False
        # The decision whose outcome is not known yet.
        self._pending: Decision | None = None

    @classmethod
    def around(
        cls,
        env: object,
        shield: Shield | HasShield | str | PathLike[str],
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        num_envs: int | None = None,
        *,
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        intervention_penalty: float = 0.0,
        monitor: Watcher | None = None,
        log: Recorder | None = None,
        mode: Mode = "shield",
    ) -> Self:
        """Return a runtime for an environment of any kind, after a check that the shield fits it.

        Args:
            env: The environment; its id and the arguments with which it was made are read.
            shield: A shield, a path to its file, or an agent.
            observation_space: Observation space of one environment.
            action_space: Action space of one environment.
            num_envs: See the class.
            adaptive: See the class.
            intervention_penalty: See the class.
            monitor: See the class.
            log: See the class.
            mode: See the class.

        Raises:
            TypeError: `shield` is none of the three, or `adaptive` is of a wrong type.
            ValueError: The spaces differ, the file is damaged, the penalty or a setting in
                `adaptive` is out of range, `monitor` watches another shield, or `log` records
                another one.
        """
        shield = as_shield(shield)
        identity = Identity.of(env)
        certifies = shield.check_fits(observation_space, action_space, identity)
        return cls(
            shield,
            num_envs,
            dtype=action_space.dtype,
            adaptive=adaptive,
            intervention_penalty=intervention_penalty,
            certifies=certifies,
            monitor=monitor,
            log=log,
            environment=identity,
            mode=mode,
        )

    # -- the present state of the environments --------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """The shield and the mode behind which episodes are recorded, as JSON values.

        "adaptive" is there, and true, where the threshold depends on earlier steps.
        """
        mode: Mode = "shadow" if self.shadow else "shield"
        told = {"digest": self.shield.digest, "delta": self.shield.delta, "mode": mode}
        adapts = self.adaptive is not None or self._memory is not None
        return {**told, "adaptive": True} if adapts else told

    @property
    def ready(self) -> bool:
        """Whether the environments are still in the states last observed, so that they may step."""
        return self._states is not None

    @property
    def threshold(self) -> PerEnv:
        """The number that Q_h must not exceed now: -delta, or at most that (n,) where it adapts."""
        limit = self._calibrated if self.adaptive is None else self.adaptive.threshold
        if self._memory is not None and self._states is not None:
            given = np.broadcast_to(np.asarray(limit, np.float64), (self._count,))
            held = self._memory.limit(np.broadcast_to(self.values, given.shape), given)
            limit = np.minimum(given, held)
        if self.num_envs is None and isinstance(limit, np.ndarray):
            return float(limit[0])
        return limit

    def in_safe_set(self, values: PerEnv) -> PerEnv:
        """Return whether states with these `values` of V_h have V_h <= -delta.

        The shield's delta decides, also where the present threshold is stricter.
        """
        return values <= self._calibrated

    @property
    def masks(self) -> Mask:
        """Which discrete actions may be taken in the states last observed (n, k), as a copy.

        This is `Shield.action_mask` at the present threshold, without the actions that the
        environments' ``info["action_mask"]`` forbids. Where that would leave no action, the
        shield's mask alone applies.

        Raises:
            RuntimeError: The states are not known.
            TypeError: Actions are not discrete.
        """
        if self._masks is None:
            states, rows = self._known()
            if self.shadow:
                masks = self._every_action(self._count)
            else:
                masks = self.shield.mask_rows(states, rows, self.threshold)
            self._masks = self._joined(masks, self.infos)
        return self._masks.copy()

    # -- the step -------------------------------------------------------------------------------

    def observe(
        self,
        observations: Batch,
        infos: InfoDicts,
        starts: Flags | bool = False,
        reports: Infos | None = None,
        begun: Flags | bool = False,
    ) -> PerEnv:
        """Evaluate the present states of the environments.

        Args:
            observations: The observations of all environments.
            infos: The infos that came with the observations, at least the keys in `keys`.
            starts: (n,) whether a reset has begun an episode, or one value for all. Episodes that a
                step has begun are passed to `update` instead.
            reports: The infos as columns, where `infos` holds only the keys in `keys`.
            begun: (n,) whether a step has begun an episode, or one value for all.

        Returns:
            V_h of the states, infinity where they are not readable.

        Raises:
            ValueError: The observations have a wrong shape or number. The states observed before
                are then forgotten too, because the environments have left them.
        """
        self._states = self._masks = None
        rows, single = self.shield.observation_rows(observations)
        if self.num_envs is None and not single:
            raise ValueError(
                f"the environment returned {len(rows)} observations, its observation_space is "
                f"{self.shield.observation_space}"
            )
        if len(rows) != self._count:
            raise ValueError(
                f"the environment returned {len(rows)} observations, its num_envs is {self._count}"
            )
        # A copy: environments may write into what they returned.
        rows = np.array(rows)
        if self._sensors is not None:
            rows = self._checked(self._sensors, rows, infos, starts, begun)
        readable = self.shield.readable(rows)
        known = readable[0] if self.num_envs is None else readable.all()
        h = self._reported_h(infos)
        states = (self.shield.model if known else self.shield).states(rows, h)
        if self._names is not None:
            binding = self._binding(states, readable)
            self.binding = str(binding[0]) if self.num_envs is None else binding
        if states.known is not None:
            readable = readable & states.known
        self.infos = infos
        if self.num_envs is None:
            self.values = float(states.value[0]) if readable[0] else np.inf
        else:
            self.values = np.where(readable, states.value, np.float64(np.inf))
        if self._memory is not None:
            self._memory.reset(np.full(self._count, starts))
        self.rows, self._readable, self._states = rows, readable, states
        if self._vouched or self._reporting:
            given = infos if reports is None else reports
            self._reports = Reports.of(given, self.num_envs, self._own)
            if self._vouched:
                self._compare(states, self._reports, given)
            if self._watch is not None:
                self._labels = watched_labels(given, self._reports)
        return self.values

    def _checked(
        self,
        sensors: SensorState,
        rows: Array,
        infos: InfoDicts,
        starts: Flags | bool,
        begun: Flags | bool,
    ) -> Array:
        """Return observations (n, obs), with NaN where the shield falls back on a sensor's fault.

        The arguments `infos`, `starts` and `begun` are those of `observe`.
        """
        still = None
        if starts is not False or begun is not False:
            fresh = np.full(self._count, np.logical_or(starts, begun))
            sensors.begin(fresh)
            if np.any(starts) and not fresh.all():
                # A reset of some environments leaves the others in the states observed before.
                still = ~fresh
        stamps = None
        if self._aged:
            told = [info.get(STAMP) for info in infos]
            if any(one is not None for one in told):
                stamps = np.array([as_number(one) for one in told])
        return sensors.read(rows, stamps, still)

    def evaluate(self, observations: Batch, infos: InfoDicts) -> tuple[Scalars, Array | None]:
        """Return V_h (k,) of the last states of k episodes, which the environments have left.

        The second result is (k,) `binding` of these states.

        Args:
            observations: The k last observations.
            infos: The infos that came with these observations.
        """
        h = self._reported_h(infos)
        if self._names is None:
            return np.asarray(self.shield.value(observations, constraint=h)), None
        rows, _ = self.shield.observation_rows(observations)
        states = self.shield.states(rows, h)
        binding = self._binding(states, self.shield.readable(rows))
        return self.shield.state_values(states, rows), binding

    def filter(self, actions: npt.ArrayLike) -> Decision:
        """Decide which actions the environments execute in the states observed.

        The actions are read once and converted to the dtype of the action space before they are
        judged. An accepted action is executed exactly as it was judged. A rejected one is replaced
        by the shield. What is executed always has the dtype of the action space.

        Args:
            actions: (n, *shape) the proposed actions, or one action (*shape) for a single
                environment.

        Returns:
            The decision. Its executed actions share no memory with `actions`.

        Raises:
            RuntimeError: The states are not known.
            ValueError: `actions` is not one action of the right shape for each environment.
        """
        states, rows = self._known()
        proposed = plain(actions)
        if proposed.shape != self._shape or proposed.dtype.kind not in "fiu":
            what = "action" if self.num_envs is None else "actions"
            each = "" if self.num_envs is None else ", a row for each environment"
            raise ValueError(
                f"{what} must be numbers of shape {self._shape}{each}, got "
                f"{proposed.dtype} {proposed.shape}"
            )
        judged = fitted(proposed, self._dtype)
        threshold = self.threshold
        self._decided, self._report = True, None
        if self.num_envs is None and self._memory is None and self._readable[0]:
            # Most steps of a single environment end here.
            self.shield.warn_if_uncalibrated()
            accepted = self.shield.accepts(states, judged.reshape(-1), threshold)
            if accepted is not None:
                executed = judged.copy()
                decision = Decision(proposed, executed, False, accepted, threshold)
                if self._sensors is not None:
                    self._sensors.acted((proposed if self.shadow else executed).reshape(1, -1))
                if self.shadow:
                    decision = self._shadowed(decision, accepted)
                self._pending = decision
                return decision
        flat = judged.reshape(self._count, -1)
        executed, report = self.shield.filter_rows(states, rows, flat, threshold)
        self._report = report
        if self._sensors is not None:
            self._sensors.acted(flat if self.shadow else executed)
        if report.intervened.any():
            judged = self.shield.points(executed).reshape(judged.shape)
        # Whole numbers that were judged beside others keep their values in the space's dtype.
        executed = judged.astype(self._dtype)
        if self.num_envs is None:
            one = report.row(0)
            value: PerEnv = float(one.value)
            decision = Decision(proposed, executed, bool(one.intervened), value, threshold)
            own: PerEnv = float(one.proposed_value)
        else:
            value, own = (np.asarray(x, np.float64) for x in (report.value, report.proposed_value))
            decision = Decision(proposed, executed, report.intervened, value, self._each(threshold))
        if self.shadow:
            decision = self._shadowed(decision, own)
        self._pending = decision
        return decision

    def _shadowed(self, decision: Decision, value: PerEnv) -> Decision:
        """Return the decision of shadow mode, which executes what was proposed.

        Args:
            decision: What the shield decides.
            value: Q_h of the proposed actions.
        """
        return decision._replace(
            executed=decision.proposed.copy(),
            intervened=np.zeros_like(decision.intervened) if self.num_envs is not None else False,
            value=value,
            shadowed=(decision.intervened, decision.executed),
        )

    def count(
        self,
        decision: Decision,
        reached: PerEnv,
        reward: PerEnv,
        terminated: PerEnv,
        truncated: PerEnv,
        counted: Flags | bool = True,
        last: Batch | None = None,
        last_infos: InfoDicts = (),
    ) -> None:
        """Report the step of the last decision to the monitor and the log, where there are any.

        The call comes after `observe` and before `update`.

        Args:
            decision: The decision.
            reached: V_h of the states reached, see `update`.
            reward: (n,) rewards as the environments return them, or that of a single one.
            terminated: (n,) whether the step terminated the episode, or one value for all.
            truncated: (n,) whether the step truncated the episode, or one value for all.
            counted: (n,) whether an action was executed at all, or one value for all.
            last: The last observations of the k episodes that ended, where the states observed last
                already begin the next episodes; None also where these are not known.
            last_infos: The infos of these k states; empty where `last` does not apply.
        """
        self._pending = None
        if self._reports is None or not self._reporting:
            return
        told = Reports.of(last_infos, len(last_infos)) if last_infos else None
        if self._recorder is not None:
            self._record(decision, reached, reward, terminated, truncated, counted, last, told)
        if self._watch is None:
            return
        ended = np.full(self._count, np.logical_or(terminated, truncated))
        h, cost = map(self._each, self._labels)
        if told is not None:
            h[ended], cost[ended] = watched_labels(last_infos, told)
        supported = True if self._report is None else self._report.supported
        with np.errstate(invalid="ignore"):
            residual = self._each(reached) - self._each(decision.value)
        self._watch.step(
            WatchedStep(
                np.full(self._count, counted),
                ended,
                h,
                cost,
                np.full(self._count, decision.intervened),
                np.full(self._count, supported),
                residual,
            )
        )
        self._withdraw_revoked()

    def _record(
        self,
        decision: Decision,
        reached: PerEnv,
        reward: PerEnv,
        terminated: PerEnv,
        truncated: PerEnv,
        counted: Flags | bool,
        last: Batch | None,
        told: Reports | None,
    ) -> None:
        """Report a step to the log.

        The arguments are those of `count`; `told` are the reports in `last_infos`, None where it is
        empty.
        """
        assert self._recorder is not None
        present = self._present()
        arrived = present
        found = self._verdicts()
        if self.num_envs is None:
            self._recorder.step(
                decision, found, [bool(counted)], [as_number(reward)], [terminated], [truncated],
                arrived, present,
            )  # fmt: skip
            return
        if told is not None:
            ended = np.full(self._count, np.logical_or(terminated, truncated))
            rows = self.rows.astype(np.result_type(self.rows, np.float32))
            rows[ended] = np.nan if last is None else self.shield.observation_rows(last)[0]
            h, cost = np.array(present.constraint), np.array(present.cost)
            h[ended], cost[ended] = told.constraint, told.cost
            arrived = States(rows, self._listed(reached), h.tolist(), cost.tolist())
        acted, rewards = self._listed(counted), self._listed(reward)
        ended_by = self._listed(terminated), self._listed(truncated)
        self._recorder.step(decision, found, acted, rewards, *ended_by, arrived, present)

    def _verdicts(self) -> list[int]:
        """Return what the shield did in the last decision, as indices into `report.VERDICTS`."""
        report = self._report
        return [ACCEPTED] * self._count if report is None else verdicts(report, self.shadow)

    def _present(self) -> States:
        """Return the states last observed, for the log."""
        assert self._reports is not None
        h, cost = self._reports.constraint, self._reports.cost
        if self.num_envs is None:
            return States(self.rows, [self.values], [h], [cost])
        return States(self.rows, self._listed(self.values), self._listed(h), self._listed(cost))

    def _listed(self, value: PerEnv) -> list[Any]:
        """Return the value of each environment of several, as plain Python."""
        listed: list[Any] = np.full(self._count, value).tolist()
        return listed

    def cut(self) -> None:
        """Report to the monitor and the log, if there are any, that episodes will not end."""
        for follows in (self._watch, self._recorder):
            if follows is not None:
                follows.cut()

    def close(self) -> None:
        """Report that the environments are closed; a log is then closed as well."""
        self.cut()
        if self._recorder is not None:
            self._recorder.close()

    def _withdraw_revoked(self) -> None:
        """Certify nothing any more, once the promise is revoked."""
        if self._watch is not None and self._watch.revoked:
            self._vouched = False
            self._covered[:] = False

    def update(
        self,
        reached: Scalars | None = None,
        counted: Flags | bool = True,
        starts: Flags | bool = False,
    ) -> None:
        """Update adaptive thresholds and the memory with the result of the last decision.

        Args:
            reached: (n,) V_h of the states reached; where an episode ended, of its last state;
                infinite where it is not known. None: V_h of the states last observed.
            counted: (n,) whether an action was executed at all, or one value for all.
            starts: (n,) whether the state last observed begins an episode, or one value for all.
        """
        # The states observed last may already begin the next episodes, whose reports do not concern
        # those that ended. A promise leaves a few episodes that violate; these are certified no
        # more.
        if self._doubted:
            self._covered &= ~self._withdrawn | np.full(self._count, starts)
        if self._silent is not False:
            self._warn_if_silent(counted, starts)
        report, decided = self._report, self._decided
        self._report, self._decided, self._masks = None, False, None
        adaptive, memory = self.adaptive, self._memory
        if not decided or (adaptive is None and memory is None):
            return
        if report is None:
            if adaptive is not None:
                adaptive.passed()
            return
        reached = self._each(self.values if reached is None else reached)
        counted = np.full(self._count, counted)
        if adaptive is not None:
            adaptive.learn(report, reached, counted)
        if memory is not None:
            memory.learn(report, reached, counted)
            memory.reset(np.full(self._count, starts))

    # -- infos ----------------------------------------------------------------------------------

    def start_infos(
        self, starts: Flags | bool = True, seeds: int | Sequence[int | None] | None = None
    ) -> dict[str, PerEnv]:
        """Return the entries of infos for a reset, whose states are those last observed.

        No action was proposed or executed, so both are NaN; where actions are whole numbers, both
        are one less than the lowest action. The call decides whether the new episodes are
        certified, so it must follow the `step_infos` of the episodes that ended.

        Args:
            starts: (n,) whether the state last observed begins an episode, or one value for all.
            seeds: Seed of the reset, for the log: one for each environment, or that of the first,
                whose successors the others have.
        """
        if self.num_envs is None:
            intervened: PerEnv = False
        else:
            intervened = np.zeros(self._count, np.bool_)
        nothing, self._pending = self._nothing, None
        begins = np.full(self._count, starts)
        self._withdraw_revoked()
        certain = ~self._contradicted & ~self._broken
        safe = self._vouched & certain & self.in_safe_set(self._each(self.values))
        self._covered = np.where(begins, safe, self._covered)
        if self._watch is not None:
            told = self._each(self._labels[0])
            self._watch.begin(begins, self._covered, self._each(self.values), told)
        if self._recorder is not None:
            drawn: Sequence[int | None] = [None] * self._count
            if isinstance(seeds, int | np.integer):
                drawn = [int(seeds) + i for i in range(self._count)]
            elif seeds is not None:
                drawn = list(seeds)
            self._recorder.begin(begins, self._covered, self._present(), drawn)
        shadowed = (intervened, nothing.copy()) if self.shadow else None
        start = Decision(
            nothing.copy(), nothing.copy(), intervened, self.values, self._told(), shadowed
        )
        return self.step_infos(start, self.values)

    def step_infos(
        self, decision: Decision, reached: PerEnv, binding: PerEnv = None
    ) -> dict[str, PerEnv]:
        """Return the entries of infos for a step.

        Args:
            decision: The decision on the step's actions.
            reached: V_h of the states reached, see `update`.
            binding: `binding` of the states reached; None for that of the states last observed.
        """
        infos = {
            INTERVENED: decision.intervened,
            VALUE: decision.value,
            THRESHOLD: decision.threshold,
            CERTIFIED: bool(self._covered[0]) if self.num_envs is None else self._covered.copy(),
            SAFE_SET: self.in_safe_set(reached),
            PROPOSED: decision.proposed,
            EXECUTED: decision.executed,
        }
        if decision.shadowed is not None:
            infos[WOULD_INTERVENE], infos[SHIELDED] = decision.shadowed
        if self._names is not None:
            infos[BINDING] = self.binding if binding is None else binding
        if self._sensors is not None:
            sensors = self._sensors
            infos[SENSOR] = sensors.first if self.num_envs is None else sensors.found
        if self._watch is not None:
            told = {
                PROMISE: self._watch.state,
                EVIDENCE: self._watch.evidence,
                SIGNATURE: self.shield.signature,
            }
            if self.num_envs is not None:
                told = {key: np.full(self._count, value) for key, value in told.items()}
            infos |= told
        if self._discrete:
            masks = self.masks.astype(np.int8)
            infos[ACTION_MASK] = masks[0] if self.num_envs is None else masks
        return infos

    def penalties(self, intervened: PerEnv) -> dict[str, PerEnv]:
        """Return the entry of infos for the penalty, ``{}`` where there is no penalty.

        The penalty of a step is `intervention_penalty` where `intervened` is True, and else 0.
        """
        return (
            {PENALTY: self.intervention_penalty * intervened} if self.intervention_penalty else {}
        )

    def last_masks(self, observations: Batch, infos: InfoDicts, ended: Flags) -> dict[str, Array]:
        """Return the entry of infos for the masks (n, m) int8 of states that ended episodes.

        The entry is missing where actions are not discrete. Rows of other environments are zeros.

        Args:
            observations: The last observations of k episodes.
            infos: The infos that came with these observations.
            ended: (n,) whether an environment's episode ended; k of them are True.
        """
        if not self._discrete:
            return {}
        if self.shadow:
            masks = self._every_action(int(ended.sum()))
        else:
            masks = self.shield.action_mask(observations, self._each(self.threshold)[ended])
        told = np.zeros((self._count, masks.shape[1]), np.int8)
        told[ended] = self._joined(masks, infos)
        return {ACTION_MASK: told}

    # -- the environments' reports ---------------------------------------------------------------

    def _reported_h(self, infos: InfoDicts) -> Scalars | None:
        """Return h (n,) that the infos report; None where the shield does not need the report.

        Raises:
            ValueError: An info lacks the report, or the reports are whole numbers, as in a column
                into which a vector environment has rounded them.
        """
        if not self._reported:
            return None
        source = self.shield.model.constraint
        assert source is not None
        names = source.names
        read = [under_names(info.get(CONSTRAINT), names) for info in infos]
        missing = sorted(
            {n for told in read for n, h in zip(names, told, strict=True) if h is None}
        )
        if missing:
            what = "info['constraint']"
            if len(names) > 1:
                what += f", a mapping that holds {missing},"
            unknown = [part.name for part in source.parts if not part.available]
            raise ValueError(
                f"the shield needs the constraint '{source.name}' of each state, but the "
                f"environment does not report {what} for it: report it at reset and at every step, "
                f"or register the function of the observation as "
                f"{' and '.join(map(repr, unknown))}"
            )
        if self.num_envs is not None and any(isinstance(h, np.integer) for h in chain(*read)):
            raise ValueError(
                "info['constraint'] must be a float in every environment, got a column of whole "
                "numbers, into which the vector environment has rounded the reports: return "
                "float(h)"
            )
        each = np.array([[as_number(h) for h in told] for told in read])
        return each if len(names) > 1 else each[:, 0]

    def _binding(self, states: StateValue, readable: Flags) -> Array:
        """Return the names (n,) of the largest of several constraints of states; see `binding`."""
        source = self.shield.model.constraint
        assert isinstance(source, SeveralConstraints)
        assert self._names is not None
        assert states.each is not None
        return np.asarray(self._names[np.where(readable, source.binding(states.each), -1)])

    def _compare(self, states: StateValue, reports: Reports, infos: InfoDicts | Infos) -> None:
        """Withdraw the promise after a violation, and where reports contradict the shield's h.

        A source of h that the report or the cost contradicts shows that the environment is
        not the one of the record. The promise is then withdrawn for good. A state that violates
        although V_h <= -delta by the network's estimate of h withdraws it for the episode, and so
        does an observation that is not readable. Where the record was made under faults of sensors,
        these count for nothing, and only a violation withdraws the promise. A report that is no
        number may hide a violation, and withdraws the promise for the episode. `infos` are those
        from which `reports` were read.
        """
        broken = broken_reports(infos, reports)
        self._broken = np.zeros(self._count, np.bool_) if broken else self._sound
        for at, key, value in broken:
            self._broken[at] = True
            self._warn_if_broken(key, value)
        if not (self._told_silent or broken):
            told, cost = reports.constraint, reports.cost
            self._silent = (told != told) & (cost != cost)  # Only NaN differs from itself.
        source = self.shield.model.constraint
        h: PerEnv = states.constraint
        values: PerEnv = states.value
        each: PerEnv = h if states.each is None else states.each
        if self.num_envs is None:
            h, values = None if h is None else float(h[0]), float(values[0])
            each = h if states.each is None else each[0]
        violated = (reports.constraint > 0) | (reports.cost > 0)
        if not self._sees:
            bad = np.zeros(self._count, np.bool_)
        elif source is None or h is None or each is None:
            bad = self.in_safe_set(values) & violated
        else:
            bad = source.contradicts(each, reports.named, reports.constraint, self._near)
            bad = bad | ((reports.cost > 0) & (h <= -self._near))
        doubted = bad | violated
        if broken:
            doubted = doubted | (self._broken if self.num_envs is not None else True)
        unknown = self._sees and self.values == np.inf
        if unknown is not False:
            # What stands in for an unreadable observation cannot be compared.
            bad, doubted = bad & np.logical_not(unknown), doubted | unknown
        if not (self._doubted or np.any(doubted)):
            return
        self._contradicted[:] = bad
        self._withdrawn[:] = doubted
        self._doubted = bool(self._withdrawn.any())
        if not self._contradicted.any():
            return
        if h is not None:
            self._vouched = False
            self._covered[:] = False
        if self._warned:
            return
        self._warned = True
        at = int(self._contradicted.argmax())
        worst, cost = (float(np.ravel(x)[at]) for x in reports[:2])
        says = [] if np.isnan(worst) else [f"the constraint {reports.text(at, self._own)}"]
        says += [] if np.isnan(cost) else [f"the cost {cost:.4g}"]
        reported = " and ".join(says)
        if h is None or states.constraint is None:
            in_use = f"{states.value[at]:.4g}"
        else:
            each = states.constraint[:, None] if states.each is None else states.each
            in_use = listed(float(states.constraint[at]), each[at], self._own)
        if h is None:
            then = (
                f"V_h is {in_use}: the network's estimate of h is wrong there, and the "
                "episode is not certified any more"
            )
        else:
            then = (
                f"h by the shield's source '{self.shield.constraint}' is {in_use}: the "
                "shield's record does not cover this environment; calibrate the shield in the "
                "environment that it will protect"
            )
        warnings.warn(
            f"the environment reports {reported} of a state where {then}",
            OtherEnvironmentWarning,
            stacklevel=4,
        )

    def _warn_if_broken(self, key: str, value: object) -> None:
        """Warn once of a report that is no number."""
        if not self._told_broken:
            self._told_broken = True
            warnings.warn(
                f"info[{key!r}] must be one number, got {value!r:.60}, which may hide a violation: "
                "the episode is not certified any more; report float(h), or None where it is not "
                "known",
                NoReportWarning,
                stacklevel=5,
            )

    def _warn_if_silent(self, counted: Flags | bool, starts: Flags | bool) -> None:
        """Warn once where an environment reports nothing of a state that an action has reached.

        Infos of a reset need not report a cost. `counted` and `starts` are those of `update`.
        """
        if not np.any(np.full(self._count, counted) & ~np.full(self._count, starts) & self._silent):
            return
        self._told_silent, self._silent = True, False
        warnings.warn(
            "an environment reports neither info['constraint'] nor info['cost'], one of which was "
            "reported in the calibration: 'shield/certified' still says whether the episode began "
            "in a certified state, but neither a violation nor a contradiction can be noticed. "
            "Report one of them at every step, or ignore safeshield.shield.NoReportWarning where "
            "neither can be measured",
            NoReportWarning,
            stacklevel=4,
        )

    # -- parts ----------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._states = self._masks = None

    def _fail(self) -> None:
        """Forget the states and reset the memory, because the present states are not known."""
        self._forget()
        self._covered[:] = False
        if self._memory is not None:
            self._memory.reset(np.ones(self._count, np.bool_))
        if self._pending is not None:
            if self._recorder is not None:
                self._recorder.fail(self._pending, self._verdicts())
            if self._watch is not None:
                self._watch.fail()
        self._pending = None
        self.cut()

    def _known(self) -> tuple[StateValue, Array]:
        if self._states is None:
            raise RuntimeError("observe() the states first: call reset()")
        return self._states, self.rows

    def _each(self, value: PerEnv) -> Scalars:
        return np.full(self._count, value, np.float64)

    def _told(self) -> PerEnv:
        return self.threshold if self.num_envs is None else self._each(self.threshold)

    def _every_action(self, count: int) -> Mask:
        """Return the masks (count, k) of shadow mode, in which a shield forbids no action."""
        check_discrete(self._codec)
        return np.ones((count, sum(self._codec.categories)), np.bool_)

    def _joined(self, masks: Mask, infos: InfoDicts) -> Mask:
        """Return the masks without the actions that the environments' own masks forbid."""
        for i, info in enumerate(infos):
            if ACTION_MASK in info:
                masks[i] = with_own_mask(masks[i], info[ACTION_MASK], self._codec)
        return masks


class Transition:
    """A context manager for a step or a reset, in which the environments move.

    The observed states of `runtime` are forgotten on entry. After an error inside they stay
    forgotten.
    """

    def __init__(self, runtime: ShieldRuntime) -> None:
        self._runtime = runtime

    def __enter__(self) -> None:
        self._runtime._forget()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._runtime._fail()
