"""`SafetyShield`: a Gymnasium wrapper that executes only what a shield accepts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.copies import environment_id, environment_kwargs
from safeshield.shield.adaptive import AdaptiveMargin, AdaptiveThreshold, as_adaptive
from safeshield.shield.critics import StateValue
from safeshield.shield.guard import as_penalty
from safeshield.shield.masks import agent_mask, with_own_mask
from safeshield.shield.nested import refuse_shielded, refuse_shielded_infos
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.generic import Env, Wrapper
from safeshield.spaces.rows import fitted, plain

_SIX_VALUES = (
    "the environment's step must return Gymnasium's 5 values (observation, reward, terminated, "
    "truncated, info); for Safety-Gymnasium's native ids, which return the cost as a sixth, make "
    "the '...Gymnasium-v0' id instead, or put safeshield.wrappers.CostFromStep around them"
)

_ONE_SHIELD = "put SafetyShield around the plain environment, once"


class _Seen(NamedTuple):
    """A state that the environment is known to be in, judged once.

    Attributes:
        rows: (1, obs) the observation.
        finite: whether it is readable.
        states: what the critics say of it.
        value: V_h; infinity where the observation is not readable.
        mask: (k,) which discrete actions may be taken next; None where actions are no integers.
    """

    rows: npt.NDArray[Any]
    finite: bool
    states: StateValue
    value: float
    mask: npt.NDArray[np.bool_] | None = None


class SafetyShield(Wrapper, RecordConstructorArgs):
    """Pass an action on where the shield accepts it, execute a replacement where it does not.

    Spaces, ends of episodes and infos are the environment's own, and so are rewards unless a
    penalty is asked for. At reset and every step these infos are added, plain Python and NumPy:

    ======================  ==========================================================
    shield/intervened       bool: the executed action is a replacement of the proposed one
    shield/value            float: Q_h of the executed action in the state it was taken in
                            (at reset: V_h of the state); infinity where not finite
    shield/threshold        float: what the value must not exceed: -delta (or less, where it
                            adapts)
    shield/certified        bool: the state just reached has V_h <= -delta, and the shield
                            is calibrated, in no other environment (see below)
    action_proposed         array: what the agent sent (at reset: NaN; where actions are discrete
                            an integer that is none of them)
    action_executed         array: what the dynamics saw (at reset likewise)
    action_mask             where actions are discrete, int8 array: which of them may be taken
                            next, see `Shield.action_mask` (`action_masks` tells it too)
    ======================  ==========================================================

    An action is read once and converted to the dtype of the environment's action space, as
    Gymnasium's own environments do. That array is judged, and where it is accepted, the dynamics
    see a copy of it, bit for bit. So where a float64 action for a Box of float32 is accepted,
    ``action_executed`` is the nearest float32 action and ``shield/intervened`` is False. An action
    that does not fit the dtype, such as 1.5 or NaN where actions are integers, is judged as it
    came. The environment gets an array; the action of a Discrete is a scalar of NumPy, or an int
    where the agent sent one.

    What an environment itself forbids, by its ``info["action_mask"]`` or its ``action_masks()``,
    stays forbidden in the same place, unless this and the shield's mask have nothing in common.

    The shield must see the observations it was trained on: put it inside (below) wrappers that
    change observations, such as NormalizeObservation, and give it actions in the units of its
    training: outside (above) RescaleAction where the log was made with rescaled actions.

    With an adaptive threshold (`shield.adaptive`), ``shield/threshold`` follows the errors met in
    deployment, from step to step and across episodes: `reset` keeps it, ``env.adaptive.forget()``
    does not. It is never looser than -delta: what this shield accepts, the one with the fixed
    threshold accepts too, and what it executes has Q_h <= -delta wherever that one finds such an
    action. ``shield/certified`` and the shield's record go on speaking of -delta, of a shield that
    kept to it, and of the dynamics it was calibrated in: the stricter one was not put to the test.

    Where the environment's spec has another id, or other keyword arguments, than the environment
    the shield was calibrated in, an `OtherEnvironmentWarning` says so and ``shield/certified`` is
    False from then on. An environment without a spec is not compared, nor are the arguments
    ``render_mode`` and ``max_episode_steps``.

    Args:
        env: an environment with the spaces that the shield was trained on.
        shield: a path to its file, a `Shield`, or an agent. With a path the environment's spec can
            rebuild the shielded environment, also after a round trip through JSON; a relative path
            stays relative, to the working directory of whoever rebuilds.
        intervention_penalty: subtracted from the reward of a step in which the shield intervened;
            with one, the info ``shield/penalty`` of a step says what was subtracted.
        adaptive: lets the threshold follow its errors; a dict of `AdaptiveThreshold`'s arguments
            will do. A rebuilt environment begins with the calibrated threshold.

    Raises:
        ValueError: the spaces differ, the file is damaged, the penalty is below 0, a setting in
            `adaptive` is out of range, or the environment is shielded already.
        TypeError: `shield` is none of the three, or `adaptive` is wrong.
    """

    def __init__(
        self,
        env: Env,
        shield: Shield | HasShield | str | os.PathLike[str],
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        *,
        intervention_penalty: float = 0.0,
    ) -> None:
        if isinstance(shield, os.PathLike):
            # A string is what survives the spec's JSON.
            shield = os.fspath(shield)
        refuse_shielded(env, _ONE_SHIELD)
        settings = as_adaptive(adaptive)
        RecordConstructorArgs.__init__(
            self,
            shield=shield,
            intervention_penalty=intervention_penalty,
            adaptive=None if settings is None else settings.to_json(),
            _disable_deepcopy=True,
        )
        gym.Wrapper.__init__(self, env)
        self.shield = as_shield(shield)
        self._certifies = self.shield.check_fits(
            env.observation_space, env.action_space, environment_id(env), environment_kwargs(env)
        )
        self.adaptive = None if settings is None else AdaptiveMargin(settings, self.shield.delta, 1)
        self.intervention_penalty = as_penalty(intervention_penalty)
        self._no_action = self.shield.model.action_codec.nothing
        self._dtype = np.dtype(env.action_space.dtype)
        self._scalar = isinstance(env.action_space, gym.spaces.Discrete)
        # None before the first reset, and where the environment may be in a state not yet judged.
        self._seen: _Seen | None = None
        self._called = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Reset the environment and judge where it starts."""
        self._seen, self._called = None, True
        observation, info = self.env.reset(seed=seed, options=options)
        if not isinstance(info, dict):
            raise _no_info("reset", info)
        refuse_shielded_infos(info, _ONE_SHIELD)
        seen = self._masked(self._judged(observation), info)
        self._seen = seen
        return observation, {
            **info,
            **_mask_info(seen),
            "shield/intervened": False,
            "shield/value": seen.value,
            "shield/threshold": self._threshold(),
            "shield/certified": self._certified(seen),
            "action_proposed": self._no_action.copy(),
            "action_executed": self._no_action.copy(),
        }

    def step(
        self, action: npt.ArrayLike
    ) -> tuple[npt.NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Execute `action`, or its replacement.

        Raises:
            gymnasium.error.ResetNeeded: called before the first reset, or after a step or reset
                that failed: the environment may have moved to a state that was never judged.
            ValueError: an action of another shape, or an environment that steps by 6-tuples.
        """
        seen = self._known("cannot step")
        proposed = plain(action)
        if proposed.shape != self._no_action.shape or proposed.dtype.kind not in "fiu":
            raise ValueError(
                f"action must be numbers of shape {self._no_action.shape}, got "
                f"{proposed.dtype} {proposed.shape}"
            )
        ran = fitted(proposed, self._dtype)
        row = ran.reshape(-1)
        # The environment's own: nobody's array is changed, and infos stay true, if it edits it.
        sent: Any = ran.copy()
        if self._scalar:
            sent = int(ran) if type(action) is int else ran[()]
        self.shield.warn_if_uncalibrated()
        threshold = self._threshold()
        accepted = self.shield.accepts(seen.states, row, threshold) if seen.finite else None
        report = None
        if accepted is not None:
            value, intervened = accepted, False
        else:
            executed, report = self.shield.filter_rows(seen.states, seen.rows, row[None], threshold)
            verdict = report.row(0)
            intervened, value = bool(verdict.intervened), float(verdict.value)
            if intervened:
                sent = self.shield.points(executed)[0]
                ran = np.array(sent)
        self._seen = None
        observation, reward, terminated, truncated, info = self._step_env(sent)
        penalised: dict[str, float] = {}
        if self.intervention_penalty:
            penalised = {"shield/penalty": self.intervention_penalty * intervened}
            reward = float(reward) - penalised["shield/penalty"]
        reached = self._judged(observation)
        if self.adaptive is not None:
            if report is None:
                self.adaptive.passed()
            else:
                self.adaptive.learn(report, np.array([reached.value]), np.ones(1, np.bool_))
        # After the margin has learned: the mask is that of the threshold now in force.
        reached = self._masked(reached, info)
        self._seen = reached
        return (
            observation,
            reward,
            terminated,
            truncated,
            {
                **info,
                **_mask_info(reached),
                **penalised,
                "shield/intervened": intervened,
                "shield/value": value,
                "shield/threshold": threshold,
                "shield/certified": self._certified(reached),
                "action_proposed": proposed,
                "action_executed": ran.copy(),
            },
        )

    def _certified(self, seen: _Seen) -> bool:
        """Whether a state is what the shield's record speaks of."""
        vouched = self._certifies and self.shield.record is not None
        return vouched and seen.value <= self.shield.threshold

    def _threshold(self) -> float:
        fixed = self.shield.threshold
        return fixed if self.adaptive is None else float(self.adaptive.threshold[0])

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which discrete actions may be taken next: what sb3-contrib's MaskablePPO asks.

        Raises:
            gymnasium.error.ResetNeeded: called before the first reset, or after a step or reset
                that failed.
            TypeError: actions are not discrete.
        """
        seen = self._known("there is no mask")
        mask = seen.mask
        if mask is None:
            mask = agent_mask(self.shield, seen.states, seen.rows, self._threshold())[0]
        try:
            own = self.env.get_wrapper_attr("action_masks")
        except AttributeError:
            return mask.copy()
        return with_own_mask(mask, own(), self.shield.model.action_codec)

    def _known(self, what: str) -> _Seen:
        if self._seen is not None:
            return self._seen
        if not self._called:
            raise gym.error.ResetNeeded(f"{what} before the first call of reset()")
        raise gym.error.ResetNeeded(
            f"{what} after a step or reset that failed: the state of the environment is not known; "
            "call reset() first"
        )

    def _masked(self, seen: _Seen, info: dict[str, Any]) -> _Seen:
        """Mask the actions to come, for the info of the state just reached."""
        played = self.shield.model.action_codec
        if not played.discrete:
            return seen
        mask = agent_mask(self.shield, seen.states, seen.rows, self._threshold())[0]
        if "action_mask" in info:
            mask = with_own_mask(mask, info["action_mask"], played)
        return seen._replace(mask=mask)

    def _step_env(
        self, action: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        try:
            result = self.env.step(action)
        except ValueError as error:
            # A wrapper in between stumbles first over a sixth value.
            if "too many values to unpack" in str(error):
                raise ValueError(_SIX_VALUES) from error
            raise
        if len(result) != 5:
            raise ValueError(_SIX_VALUES)
        if not isinstance(result[4], dict):
            raise _no_info("step", result[4])
        return result

    def _judged(self, observation: npt.NDArray[Any]) -> _Seen:
        """Judge a state once, for its info and for the action to come."""
        rows, single = self.shield.observation_rows(observation)
        if not single:
            raise ValueError(
                f"the environment returned {len(rows)} observations, its observation_space is "
                f"{self.shield.observation_space}"
            )
        # A copy: environments may write into what they returned.
        rows = np.array(rows)
        finite = bool(self.shield.readable(rows)[0])
        # Unreadable rows are judged with the log's mean in place of what cannot be read.
        states = self.shield.model.states(rows) if finite else self.shield.states(rows)
        return _Seen(rows, finite, states, float(states.value[0]) if finite else float("inf"))


def _mask_info(seen: _Seen) -> dict[str, Any]:
    return {} if seen.mask is None else {"action_mask": seen.mask.astype(np.int8)}


def _no_info(where: str, info: object) -> ValueError:
    return ValueError(
        f"the environment's {where} must return its infos as a dict, empty where there are none, "
        f"got {type(info).__name__}"
    )
