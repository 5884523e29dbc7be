"""`SafetyShield`: a Gymnasium wrapper that executes only what a shield accepts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.copies import is_vector_env
from safeshield.rollouts.infos import PENALTY
from safeshield.shield.adaptive import AdaptiveThreshold, as_adaptive
from safeshield.shield.masks import with_own_mask
from safeshield.shield.nested import refuse_shielded, refuse_shielded_infos
from safeshield.shield.protocols import Recorder, Watcher
from safeshield.shield.runtime import Mode, ShieldRuntime
from safeshield.shield.shield import HasShield, Shield
from safeshield.spaces.generic import Env, Wrapper

_SIX_VALUES = (
    "the environment's step must return Gymnasium's 5 values (observation, reward, terminated, "
    "truncated, info); for Safety-Gymnasium's native ids, which return the cost as a sixth, make "
    "the '...Gymnasium-v0' id instead, or put safeshield.wrappers.CostFromStep around them"
)

Info = dict[str, Any]

_ONE_SHIELD = "put SafetyShield around the plain environment, once"


class SafetyShield(Wrapper, RecordConstructorArgs):
    """Execute an action where the shield accepts it, and a replacement where it does not.

    Spaces, ends of episodes and infos are those of the environment. Rewards are too, unless a
    penalty is set. These infos are added at reset and at every step, as plain Python and NumPy:

    ======================  ==========================================================
    shield/intervened       bool: whether the executed action is a replacement
    shield/value            float: Q_h of the executed action in the state in which it was
                            taken (at reset: V_h of the state); infinity where not finite
    shield/threshold        float: the number that the value must not exceed: -delta (or
                            less, where the threshold adapts)
    shield/certified        bool: whether the promise of the shield's record covers the episode:
                            it began in a state with V_h <= -delta, in the environment of the
                            record (see below)
    shield/safe_set         bool: whether the state just reached has V_h <= -delta
    shield/binding          str, where the shield has several constraints: the name of the largest
                            in the state just reached, each in units of its own steps; empty where
                            the observation is not readable
    shield/sensor           str, where the shield checks its sensors (`Shield.with_sensors`): what
                            it found of the observation just reached: "frozen", "jump", "stale",
                            or "" for nothing
    action_proposed         array: the action that the agent sent (at reset: NaN; where actions
                            are discrete, an integer that is not an action)
    action_executed         array: the action that the dynamics saw (at reset: likewise)
    action_mask             int8 array, where actions are discrete: which of them may be taken
                            next, see `Shield.action_mask` (`action_masks` returns it too)
    ======================  ==========================================================

    An action is read once and converted to the dtype of the environment's action space, as
    Gymnasium's own environments do. The converted array is judged. Where it is accepted, the
    dynamics see a copy of it, bit for bit. So where a float64 action for a Box of float32 is
    accepted, ``action_executed`` is the nearest float32 action and ``shield/intervened`` is False.
    An action that does not fit the dtype, such as 1.5 or NaN where actions are integers, is never
    accepted. The environment gets an array. For a Discrete it gets a NumPy scalar, or an
    int where the agent sent one.

    Actions that the environment itself forbids, by its ``info["action_mask"]`` or its
    ``action_masks()``, stay forbidden in the shield's mask, unless no action is in both masks.

    The shield must get the observations it was trained on, so put it inside (below) wrappers that
    change observations, such as NormalizeObservation. It must also get actions in the units of its
    training, so put it outside (above) RescaleAction where the log has rescaled actions.

    With an adaptive threshold (`shield.adaptive`), ``shield/threshold`` follows the errors that
    occur, from step to step and across episodes. `reset` keeps the threshold;
    ``env.adaptive.forget()`` restores the calibrated one. The adaptive threshold is never looser
    than -delta. So the shield with the fixed threshold accepts every action that this one accepts,
    and where it finds an action with Q_h <= -delta, the action that this one executes fulfils that
    too. ``shield/certified`` and the shield's record still refer to -delta, to a shield with that
    fixed threshold, and to the dynamics of the calibration, because no stricter threshold was
    tested.

    An episode is certified only in the environment of the record. Where the environment has another
    id, other keyword arguments, other wrappers inside this one, or longer episodes, an
    `OtherEnvironmentWarning` is issued and ``shield/certified`` is False in all steps. Of an
    environment without a spec only its wrappers and its time limit are compared. The argument
    ``render_mode`` and wrappers that only report or render are not compared. Where the shield has a
    source of h (`Shield.constraint`) and the environment reports another h, or a cost although h is
    negative, the warning is issued once with both values, and no later state is certified. Several
    constraints are compared one by one, each in units of its own steps, where the environment
    reports them by name. A plain number, whose units are not known, contradicts them only where
    its sign does. Where a network
    estimates h, a violation in a state with V_h <= -delta ends the promise for that episode.

    An observation that is not readable, or on which the shield falls back by a check of its
    sensors, ends the promise for its episode. Where the shield was calibrated under faults of
    sensors (`wrappers.faults`), only a violation does, and the h of a faulty observation is not
    compared with the environment's report. For a shield that limits the age of observations, the
    environment reports in ``info["stamp"]`` the `time.monotonic()` of the measurement.

    Where the source of h is not registered in this process, the environment must report h in
    ``info["constraint"]`` at reset and at every step; of several constraints, a mapping from each
    name to its number.

    Args:
        env: An environment with the spaces that the shield was trained on.
        shield: A path to a shield's file, a `Shield`, or an agent. With a path the environment's
            spec can rebuild the shielded environment, also after a round trip through JSON. A
            relative path stays relative to the working directory of the process that rebuilds it.
            The text ``"builtin:NAME"`` stands for a ready-made shield (`Shield.builtin`).
        intervention_penalty: Number that is subtracted from the reward of a step in which the
            shield intervened. If it is above 0, the info ``shield/penalty`` of a step tells the
            number that was subtracted.
        adaptive: Settings by which the threshold follows its errors, as an `AdaptiveThreshold` or a
            dict of its arguments; None for a fixed threshold. A rebuilt environment begins with the
            calibrated threshold.
        monitor: A `PromiseMonitor` of the shield, which counts the episodes; None for none. With a
            monitor there are three more infos, at reset and at every step: ``shield/promise`` says
            what the episodes say of the promise, ``shield/promise_evidence`` is the evidence
            against it, and ``shield/promise_signature`` says whether the shield's file is signed
            (`Shield.signature`). Once the promise is revoked, ``shield/certified`` is False. The
            monitor is no part of the spec: a rebuilt environment has none.
        log: A `ShieldLog`, which records the steps; None for none. It is no part of the spec
            either.
        mode: "shield", or "shadow": the environment then executes what the agent sends, and the
            infos ``shield/would_intervene`` (bool) and ``action_shielded`` (array) tell what the
            shield would have done. ``shield/intervened`` and ``shield/certified`` are False,
            ``shield/value`` is Q_h of the agent's action, and no mask forbids an action.

    Raises:
        ValueError: The spaces differ, the file is damaged, the penalty is below 0, a setting in
            `adaptive` is out of range, `monitor` watches another shield, `log` records another one,
            the environment is shielded already, or the mode is unknown or does not go with the
            other arguments.
        TypeError: `shield` is none of the three, or `adaptive` is of a wrong type.
    """

    def __init__(
        self,
        env: Env,
        shield: Shield | HasShield | str | os.PathLike[str],
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        *,
        intervention_penalty: float = 0.0,
        monitor: Watcher | None = None,
        log: Recorder | None = None,
        mode: Mode = "shield",
    ) -> None:
        if isinstance(shield, os.PathLike):
            # The spec is written as JSON, which can hold a string but no path object.
            shield = os.fspath(shield)
        if is_vector_env(env):
            raise TypeError(
                "env must be a single environment, got a vector environment: use "
                "safeshield.wrappers.VectorSafetyShield, or VecSafetyShield for one of "
                "Stable-Baselines3"
            )
        refuse_shielded(env, _ONE_SHIELD)
        settings = as_adaptive(adaptive)
        RecordConstructorArgs.__init__(
            self,
            shield=shield,
            intervention_penalty=intervention_penalty,
            adaptive=None if settings is None else settings.to_json(),
            _disable_deepcopy=True,
            **({} if mode == "shield" else {"mode": mode}),
        )
        gym.Wrapper.__init__(self, env)
        self.runtime = ShieldRuntime.around(
            env,
            shield,
            env.observation_space,
            env.action_space,
            adaptive=settings,
            intervention_penalty=intervention_penalty,
            monitor=monitor,
            log=log,
            mode=mode,
        )
        self.shield, self.adaptive = self.runtime.shield, self.runtime.adaptive
        self.intervention_penalty = self.runtime.intervention_penalty
        self._scalar = isinstance(env.action_space, gym.spaces.Discrete)
        self._called = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and evaluate the state in which it starts.

        `seed` and `options` are passed to the environment. The result is its observation, and its
        info with the shield's entries.
        """
        self._called = True
        with self.runtime.transition:
            observation, info = self.env.reset(seed=seed, options=options)
            if not isinstance(info, dict):
                raise _no_info("reset", info)
            refuse_shielded_infos(info, _ONE_SHIELD)
            self.runtime.observe(observation, (info,), starts=True)
            return observation, {**info, **self.runtime.start_infos(seeds=seed)}

    def step(self, action: npt.ArrayLike) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Execute `action`, or its replacement.

        Raises:
            gymnasium.error.ResetNeeded: `step` is called before the first reset, or after a step or
                reset that failed. The environment may then be in a state that was not observed.
            ValueError: The action has a wrong shape, or the environment's step returns six values.
        """
        runtime = self.runtime
        if not runtime.ready:
            raise self._reset_needed("cannot step")
        decision = runtime.filter(action)
        # The environment gets its own copy, so that infos stay correct if it changes its action.
        sent: Any = decision.executed.copy()
        if self._scalar:
            sent = sent[()] if decision.intervened or type(action) is not int else int(sent)
        with runtime.transition:
            observation, reward, terminated, truncated, info = self._step_env(sent)
            reached = runtime.observe(observation, (info,))
            runtime.count(decision, reached, reward, bool(terminated), bool(truncated))
            runtime.update()
            penalty = runtime.penalties(decision.intervened)
            if penalty:
                reward = float(reward) - penalty[PENALTY]
            info = {**info, **penalty, **runtime.step_infos(decision, reached)}
            return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Close the environment and the log.

        A monitor and a log take an episode under way as cut.
        """
        self.runtime.close()
        super().close()

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which discrete actions may be taken next; sb3-contrib's MaskablePPO calls this.

        Raises:
            gymnasium.error.ResetNeeded: The method is called before the first reset, or after a
                step or reset that failed.
            TypeError: Actions are not discrete.
        """
        if not self.runtime.ready:
            raise self._reset_needed("there is no mask")
        mask: npt.NDArray[np.bool_] = self.runtime.masks[0]
        try:
            own = self.env.get_wrapper_attr("action_masks")
        except AttributeError:
            return mask
        return with_own_mask(mask, own(), self.shield.model.action_codec)

    def _reset_needed(self, what: str) -> gym.error.ResetNeeded:
        if not self._called:
            return gym.error.ResetNeeded(f"{what} before the first call of reset()")
        return gym.error.ResetNeeded(
            f"{what} after a step or reset that failed: the state of the environment is not known; "
            "call reset() first"
        )

    def _step_env(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        try:
            result = self.env.step(action)
        except ValueError as error:
            # A wrapper inside may raise this error when it unpacks a sixth value.
            if "too many values to unpack" in str(error):
                raise ValueError(_SIX_VALUES) from error
            raise
        if len(result) != 5:
            raise ValueError(_SIX_VALUES)
        if not isinstance(result[4], dict):
            raise _no_info("step", result[4])
        return result


def make_shielded(
    env_id: str,
    shield: str | os.PathLike[str] | Shield | HasShield,
    *,
    render_mode: str | None = None,
    adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
    intervention_penalty: float = 0.0,
    mode: Mode = "shield",
    **kwargs: Any,  # noqa: ANN401 - arguments of any environment
) -> Env:
    """Return an environment with a shield around it, for programs that take an id and arguments.

    It is the entry point of the ids ``safeshield/Shielded-v0`` and ``Shielded-v0``.

    Args:
        env_id: Id of the environment, or ``module:id``.
        shield: See `SafetyShield`, as the following ones.
        render_mode: See `gymnasium.make`.
        adaptive: See `SafetyShield`.
        intervention_penalty: See `SafetyShield`.
        mode: See `SafetyShield`.
        kwargs: Further arguments of ``gymnasium.make(env_id)``.

    Raises:
        ValueError: As `SafetyShield`.
        gymnasium.error.Error: As `gymnasium.make`.

    >>> import gymnasium
    >>> env = gymnasium.make(
    ...     "safeshield:Shielded-v0", env_id="safeshield/Boat-v0", shield="builtin:boat"
    ... )
    >>> env.reset(seed=0)[1]["shield/certified"]
    True
    """
    shown: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    return SafetyShield(
        gym.make(env_id, **shown, **kwargs),
        shield,
        adaptive,
        intervention_penalty=intervention_penalty,
        mode=mode,
    )


def _no_info(where: str, info: object) -> ValueError:
    return ValueError(
        f"the environment's {where} must return its infos as a dict, empty where there are none, "
        f"got {type(info).__name__}"
    )
