"""The shielded step, written once: observe the states, filter the actions, update, tell in infos.

The wrappers of a single environment, of a vector environment and of Stable-Baselines3's `VecEnv`
translate between their interface and a `ShieldRuntime`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.copies import environment_id, environment_kwargs
from safeshield.rollouts.infos import (
    ACTION_MASK,
    CERTIFIED,
    EXECUTED,
    INTERVENED,
    PENALTY,
    PROPOSED,
    THRESHOLD,
    VALUE,
)
from safeshield.shield.adaptive import AdaptiveMargin, AdaptiveThreshold, as_adaptive
from safeshield.shield.critics import StateValue
from safeshield.shield.masks import Mask, with_own_mask
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_of_one
from safeshield.spaces.rows import fitted, plain
from safeshield.spaces.shapes import Flags, Scalars

Array = npt.NDArray[Any]
PerEnv = Any
"""One value for each environment: an array (n, ...); of one environment alone, plain Python."""
InfoDicts = Sequence[Mapping[str, Any]]
"""The infos of n environments, a mapping for each."""


class ConstraintSource(Protocol):
    """Tells the constraint h of the states that n environments are in."""

    def __call__(self, observations: Batch, infos: InfoDicts, /) -> Scalars:
        """Return h (n,) in units of h, positive is a violation; every number must be finite.

        Args:
            observations: n of them, as a vector environment batches them.
            infos: what the environments reported with these observations.
        """
        ...


class ShieldMemory(Protocol):
    """What a shield remembers of each of n environments from one step to the next."""

    def reset(self, mask: Flags, /) -> None:
        """Forget the environments in `mask` (n,): an episode begins, or a step has failed."""
        ...

    def limit(self, values: Scalars, threshold: Scalars, /) -> Scalars:
        """Return what Q_h must not exceed in the next step (n,); it must change nothing.

        Args:
            values: (n,) V_h of the states, infinity where they are not readable.
            threshold: (n,) the threshold in force; a limit above it has no effect.
        """
        ...

    def learn(self, report: FilterReport, reached: Scalars, counted: Flags, /) -> None:
        """Take in one step; the arguments are those of `AdaptiveMargin.learn`."""
        ...


class Decision(NamedTuple):
    """What was decided on the actions of all environments, until infos tell of it."""

    proposed: Array
    """(n, *shape) what the agent sent; of one environment alone (*shape)."""
    executed: Array
    """What the environments are to execute, likewise; it shares nothing with `proposed`."""
    intervened: PerEnv
    """Whether the executed action replaces the proposed one."""
    value: PerEnv
    """Q_h of the executed action."""
    threshold: PerEnv
    """What Q_h was not to exceed."""


class ShieldRuntime:
    """A shield at work on environments that step together.

    One step is: `filter` the actions proposed; hand the decision's actions to the environments;
    `observe` the states reached; `update` what adapts; read `step_infos`. A reset is `observe` and
    `start_infos`. What moves the environments happens inside ``with runtime.transition:``, so that
    no action is ever judged in a state that the environments have left.

    Args:
        shield: the filter.
        num_envs: how many environments, whose observations and actions have a leading axis of
            that length. None: one environment, whose observations and actions have none, and for
            which decisions and infos are plain Python.
        dtype: of the environments' action space; by default that of the shield's.
        adaptive: lets each environment's threshold follow its errors (`AdaptiveThreshold`, or a
            dict of its arguments).
        intervention_penalty: what an intervention takes off the reward.
        certifies: whether the shield's record may speak of these environments: what
            `Shield.check_fits` returned for them. Where it is False, no state is certified.
        constraint: tells h of the present states. By definition V_h(s) >= h(s), so the value of a
            state, and with it Q_h of every action in it, is raised where the critics' estimate
            lies below h(s). None: the critics alone.
        memory: may make thresholds stricter by what happened in earlier steps. The runtime resets
            it for every environment whose episode begins, and for all after a failure. None: each
            step is decided by its state alone.

    Attributes:
        adaptive: the margins of the environments; None where the threshold is fixed.
        values: V_h of the states last observed, infinity where they are not readable.
        rows: their observations (n, obs), as rows of `spaces.rows`.
        infos: what was reported with them.
        keys: the keys of infos that are read; None: any of them may be.

    Raises:
        TypeError, ValueError: `adaptive` is wrong, or the penalty is not a number of at least 0.

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
        constraint: ConstraintSource | None = None,
        memory: ShieldMemory | None = None,
    ) -> None:
        if not 0.0 <= intervention_penalty < np.inf:
            raise ValueError(
                "intervention_penalty must be finite and at least 0 (it is subtracted from the "
                f"reward), got {intervention_penalty}"
            )
        self.shield = shield
        self.num_envs = num_envs
        self.intervention_penalty = float(intervention_penalty)
        self._count = 1 if num_envs is None else num_envs
        settings = as_adaptive(adaptive)
        self.adaptive = (
            None if settings is None else AdaptiveMargin(settings, shield.delta, self._count)
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
        self._vouched = certifies and shield.record is not None
        self._constraint = constraint
        self._memory = memory
        self.keys = None if constraint is not None else (ACTION_MASK,) if codec.discrete else ()
        self.transition = Transition(self)
        self.values: PerEnv = None
        self.rows: Array = np.empty((0, shield.model.observation_codec.width))
        # None where the environments may be in a state that was not observed.
        self._states: StateValue | None = None
        self.infos: InfoDicts = [{}] * self._count
        self._masks: Mask | None = None
        self._report: FilterReport | None = None
        self._decided = False

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
    ) -> Self:
        """Return a runtime for an environment of any kind, and check that the shield fits it.

        Args:
            env: the environment, for its id and the arguments it was made with.
            shield: a shield, a path to its file, or an agent.
            observation_space: of one environment.
            action_space: of one environment.
            num_envs: see the class.
            adaptive: see the class.
            intervention_penalty: see the class.

        Raises:
            TypeError: `shield` is none of the three, or `adaptive` is wrong.
            ValueError: the spaces differ, the file is damaged, or the penalty is out of range.
        """
        shield = as_shield(shield)
        certifies = shield.check_fits(
            observation_space, action_space, environment_id(env), environment_kwargs(env)
        )
        return cls(
            shield,
            num_envs,
            dtype=action_space.dtype,
            adaptive=adaptive,
            intervention_penalty=intervention_penalty,
            certifies=certifies,
        )

    # -- what is known of the environments ------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the environments are in the states last observed, so that they may step."""
        return self._states is not None

    @property
    def threshold(self) -> PerEnv:
        """What Q_h must not exceed now: -delta; (n,) where it adapts, and nowhere above that."""
        limit = self._calibrated if self.adaptive is None else self.adaptive.threshold
        if self._memory is not None and self._states is not None:
            given = np.broadcast_to(np.asarray(limit, np.float64), (self._count,))
            held = self._memory.limit(np.broadcast_to(self.values, given.shape), given)
            limit = np.minimum(given, held)
        if self.num_envs is None and isinstance(limit, np.ndarray):
            return float(limit[0])
        return limit

    def certified(self, values: PerEnv) -> PerEnv:
        """Whether states of these values are what the shield's record speaks of.

        The record's delta counts, also where the threshold in force is stricter.
        """
        return (values <= self._calibrated) & self._vouched

    @property
    def masks(self) -> Mask:
        """Which discrete actions may be taken in the states last observed (n, k), a copy.

        It is `Shield.action_mask` at the present threshold, without what ``info["action_mask"]``
        of the environments forbids, unless that leaves nothing.

        Raises:
            RuntimeError: the states are not known.
            TypeError: actions are not discrete.
        """
        if self._masks is None:
            states, rows = self._known()
            masks = self.shield.mask_rows(states, rows, self.threshold)
            self._masks = self._joined(masks, self.infos)
        return self._masks.copy()

    # -- the step -------------------------------------------------------------------------------

    def observe(
        self, observations: Batch, infos: InfoDicts, starts: Flags | bool = False
    ) -> PerEnv:
        """Judge the states that the environments are in.

        Args:
            observations: of all environments.
            infos: what was reported with them, at least what `keys` names.
            starts: (n,) where a reset has begun an episode, or one answer for all. Where a step
                has begun one, tell `update`.

        Returns:
            V_h of the states, infinity where they are not readable.

        Raises:
            ValueError: observations of another shape or number. The states observed before are
                then forgotten too: the environments have left them.
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
        readable = self.shield.readable(rows)
        known = readable[0] if self.num_envs is None else readable.all()
        states = self.shield.model.states(rows) if known else self.shield.states(rows)
        self.infos = infos
        if self._constraint is not None:
            batch = batch_of_one(observations) if single else observations
            h = _constraint_of(self._constraint, batch, self.infos)
            raised = np.maximum(states.value, h.astype(states.value.dtype))
            states = StateValue(states.inputs, raised)
        if self.num_envs is None:
            self.values = float(states.value[0]) if readable[0] else np.inf
        else:
            self.values = np.where(readable, states.value, np.float64(np.inf))
        if self._memory is not None:
            self._memory.reset(np.full(self._count, starts))
        self.rows, self._readable, self._states = rows, readable, states
        return self.values

    def evaluate(self, observations: Batch, infos: InfoDicts) -> Scalars:
        """Return V_h (k,) of k states that are left already: the last ones of their episodes.

        Args:
            observations: k of them.
            infos: see `observe`.
        """
        values: Scalars = np.asarray(self.shield.value(observations))
        if self._constraint is not None:
            h = _constraint_of(self._constraint, observations, infos)
            values = np.maximum(values, h)
        return values

    def filter(self, actions: npt.ArrayLike) -> Decision:
        """Decide what the environments are to execute in the states observed.

        The actions are read once and converted to the dtype of the action space; a batch of which
        one number does not fit that dtype is judged as it came. What was judged is what is
        executed, and it shares nothing with what was given.

        Raises:
            RuntimeError: the states are not known.
            ValueError: not one action of the right shape for each environment.
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
            # Most steps of a single environment need no more than this.
            self.shield.warn_if_uncalibrated()
            accepted = self.shield.accepts(states, judged.reshape(-1), threshold)
            if accepted is not None:
                return Decision(proposed, judged.copy(), False, accepted, threshold)
        flat = judged.reshape(self._count, -1)
        executed, report = self.shield.filter_rows(states, rows, flat, threshold)
        self._report = report
        if report.intervened.any():
            judged = self.shield.points(executed).reshape(judged.shape)
        executed = judged.copy()
        if self.num_envs is None:
            one = report.row(0)
            return Decision(proposed, executed, bool(one.intervened), float(one.value), threshold)
        value = np.asarray(report.value, np.float64)
        return Decision(proposed, executed, report.intervened, value, self._each(threshold))

    def update(
        self,
        reached: Scalars | None = None,
        counted: Flags | bool = True,
        starts: Flags | bool = False,
    ) -> None:
        """Take in what the last decision led to: for thresholds that adapt, and the memory.

        Args:
            reached: (n,) V_h of the states reached, where an episode ended of its last state;
                infinite where that is not known. None: the states last observed.
            counted: (n,) where an action was executed at all, or one answer for all.
            starts: (n,) where the states last observed begin an episode, or one answer for all.
        """
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

    # -- what infos tell ------------------------------------------------------------------------

    def start_infos(self) -> dict[str, PerEnv]:
        """Return what infos tell of the states last observed as those in which episodes begin.

        No action was proposed or executed: both are NaN, or where actions are whole numbers one
        below every action.
        """
        if self.num_envs is None:
            intervened: PerEnv = False
        else:
            intervened = np.zeros(self._count, np.bool_)
        nothing = self._nothing
        start = Decision(nothing.copy(), nothing.copy(), intervened, self.values, self._told())
        return self.step_infos(start, self.values)

    def step_infos(self, decision: Decision, reached: PerEnv) -> dict[str, PerEnv]:
        """Return what infos tell of a step; this is the one place that fills the shield's keys.

        Args:
            decision: what was decided.
            reached: V_h of the states reached, see `update`.
        """
        infos = {
            INTERVENED: decision.intervened,
            VALUE: decision.value,
            THRESHOLD: decision.threshold,
            CERTIFIED: self.certified(reached),
            PROPOSED: decision.proposed,
            EXECUTED: decision.executed,
        }
        if self._discrete:
            masks = self.masks.astype(np.int8)
            infos[ACTION_MASK] = masks[0] if self.num_envs is None else masks
        return infos

    def penalties(self, intervened: PerEnv) -> dict[str, PerEnv]:
        """Return what infos tell of the penalty, ``{}`` where none was asked for."""
        return (
            {PENALTY: self.intervention_penalty * intervened} if self.intervention_penalty else {}
        )

    def last_masks(self, observations: Batch, infos: InfoDicts, ended: Flags) -> dict[str, Array]:
        """Return the masks that infos tell of the states that ended episodes, (n, k) int8.

        Args:
            observations: the k last ones.
            infos: see `observe`.
            ended: (n,) which environments they are of, k of them; the other rows are zeros.
        """
        if not self._discrete:
            return {}
        masks = self.shield.action_mask(observations, self._each(self.threshold)[ended])
        told = np.zeros((self._count, masks.shape[1]), np.int8)
        told[ended] = self._joined(masks, infos)
        return {ACTION_MASK: told}

    # -- parts ----------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._states = self._masks = None

    def _fail(self) -> None:
        """Forget everything that the next reset does not bring back: nobody knows the states."""
        self._forget()
        if self._memory is not None:
            self._memory.reset(np.ones(self._count, np.bool_))

    def _known(self) -> tuple[StateValue, Array]:
        if self._states is None:
            raise RuntimeError("observe() the states first: call reset()")
        return self._states, self.rows

    def _each(self, value: PerEnv) -> Scalars:
        return np.full(self._count, value, np.float64)

    def _told(self) -> PerEnv:
        return self.threshold if self.num_envs is None else self._each(self.threshold)

    def _joined(self, masks: Mask, infos: InfoDicts) -> Mask:
        """Return the masks without what the environments' own ones forbid."""
        for i, info in enumerate(infos):
            if ACTION_MASK in info:
                masks[i] = with_own_mask(masks[i], info[ACTION_MASK], self._codec)
        return masks


class Transition:
    """``with runtime.transition:`` a step or a reset, in which the environments move.

    The states observed are forgotten on entry, and known again only where nothing failed.
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


def _constraint_of(source: ConstraintSource, observations: Batch, infos: InfoDicts) -> Scalars:
    told = np.asarray(source(observations, infos), np.float64)
    if told.shape != (len(infos),) or not np.isfinite(told).all():
        raise ValueError(
            f"the constraint source must return {len(infos)} finite numbers, one for each "
            f"environment, got {told!r:.80}"
        )
    return told
