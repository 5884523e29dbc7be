"""`VectorSafetyShield`: a vector environment that executes only what a shield accepts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import (
    FINAL_INFO,
    FINAL_OBSERVATIONS,
    final_observations_key,
    info_rows,
    reported,
)
from safeshield.shield.adaptive import AdaptiveThreshold
from safeshield.shield.nested import (
    refuse_past_shield,
    refuse_shielded,
    refuse_shielded_infos,
)
from safeshield.shield.protocols import Recorder, Watcher
from safeshield.shield.runtime import Mode, ShieldRuntime
from safeshield.shield.shield import HasShield, Shield
from safeshield.spaces.batches import Batch, stacked
from safeshield.spaces.generic import BEFORE_1_0, VectorEnv, VectorWrapper
from safeshield.spaces.shapes import Flags, Scalars

_NEXT_STEP, _SAME_STEP, _DISABLED = _MODES = ("NextStep", "SameStep", "Disabled")

_ONE_SHIELD = "put VectorSafetyShield around plain environments, once"

_Infos = dict[str, Any]


class VectorSafetyShield(VectorWrapper):
    """`SafetyShield` for a vector environment, with one forward pass for all of its environments.

    Spaces, observations, ends of episodes and infos are those of the environment. Rewards are too,
    unless a penalty is set. These infos are added at reset and at every step. They are arrays with
    one row for each of n environments, and each has a mask ``"_" + key``:

    ======================  ==========================================================
    shield/intervened       (n,) bool: whether the executed action is a replacement
    shield/value            (n,) float: Q_h of the executed action in the state in which it was
                            taken (at reset: V_h of the state); infinity where not finite
    shield/threshold        (n,) float: the number that the value must not exceed: -delta (or
                            less, where the threshold adapts)
    shield/certified        (n,) bool: whether the promise of the shield's record covers the
                            episode, see `SafetyShield`
    shield/safe_set         (n,) bool: whether the state just reached has V_h <= -delta
    shield/binding          (n,) str, where the shield has several constraints: the name of the
                            largest in the state just reached, see `SafetyShield`
    action_proposed         (n, ...): the actions that the agent sent
    action_executed         (n, ...): the actions that the dynamics saw
    action_mask             (n, k) int8, where actions are discrete: which of them may be
                            taken next, see `Shield.action_mask`
    ======================  ==========================================================

    Actions are read once and converted to the dtype of the action space before they are judged, see
    `SafetyShield`.

    Where no action was taken, as at a reset, both actions are NaN. Where actions are whole numbers,
    both are less than every action, usually -1. Around the end of an episode, infos depend on
    ``metadata["autoreset_mode"]``:

    - NEXT_STEP: the step after the end of an episode ignores its action and resets. The
      environment's row is therefore as at a reset: no intervention, V_h of the new state, no
      action.
    - SAME_STEP, and always in Gymnasium 0.29: where an episode ended, the environment's row of
      observations and infos is already that of the new episode's reset. The infos above about the
      step that was taken are in ``infos["final_info"]``, with the environment's own infos about
      that step. There, ``shield/safe_set``, ``shield/binding`` and ``action_mask`` refer to the
      last observation, ``infos["final_obs"]`` (0.29: ``"final_observation"``). A `SyncVectorEnv` of
      environments that are each in a `SafetyShield` returns the same.
    - DISABLED: ``reset(options={"reset_mask": mask})`` restarts the environments in the mask. Only
      these have infos. For the others, the values and infos observed last still apply.

    Environments in other processes tell their id, their wrappers and their time limit, and no
    arguments, unless ``gymnasium.make_vec`` made them. A warning then says that these cannot be
    compared with those of the record, and a fault (`wrappers.faults`) is not certified.

    Args:
        env: A vector environment whose single spaces are those the shield was trained on.
        shield: A path to a shield's file, a `Shield`, or an agent.
        intervention_penalty: Number that is subtracted from the reward of a step in which the
            shield intervened. If it is above 0, ``shield/penalty`` (n,) tells the numbers that were
            subtracted.
        adaptive: Settings by which each environment's threshold follows its own errors (see
            `SafetyShield`).
        monitor: A `PromiseMonitor` of the shield, which counts the episodes of all environments in
            the order in which they began, see `SafetyShield`.
        log: A `ShieldLog`, which records the steps of all environments, see `SafetyShield`.
        mode: "shield" or "shadow", see `SafetyShield`.

    Raises:
        ValueError: The spaces differ, the file is damaged, the penalty is negative or not finite,
            a setting in `adaptive` is out of range, `monitor` watches another shield, `log` records
            another one, the environment is shielded already or does not say how it resets itself,
            or the mode is unknown or does not go with the other arguments.
        TypeError: `env` is not a vector environment, `shield` is none of the three, or `adaptive`
            is of a wrong type.

    >>> import gymnasium
    >>> from safeshield import SafeFQL, SafeFQLConfig, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> boats = [lambda: gymnasium.make("safeshield/Boat-v0")] * 3
    >>> env = VectorSafetyShield(gymnasium.vector.SyncVectorEnv(boats), agent)
    >>> observations, infos = env.reset(seed=0)
    >>> observations, rewards, _, _, infos = env.step(env.action_space.sample())
    >>> infos["action_executed"].shape, infos["_shield/intervened"].tolist()
    ((3, 2), [True, True, True])
    """

    def __init__(
        self,
        env: VectorEnv,
        shield: Shield | HasShield | str | os.PathLike[str],
        *,
        intervention_penalty: float = 0.0,
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        monitor: Watcher | None = None,
        log: Recorder | None = None,
        mode: Mode = "shield",
    ) -> None:
        if not isinstance(env, gym.vector.VectorEnv):
            raise TypeError(
                f"env must be a gymnasium.vector.VectorEnv, got {type(env).__name__}; "
                "SafetyShield is for one environment"
            )
        refuse_shielded(env, _ONE_SHIELD)
        super().__init__(env)
        if BEFORE_1_0:
            # The vector wrappers of Gymnasium 0.29 pass these on with a warning, or not at all.
            for name in (
                "num_envs", "observation_space", "action_space", "single_observation_space",
                "single_action_space", "metadata", "render_mode", "spec",
            ):  # fmt: skip
                setattr(self, name, getattr(env, name))
        self.runtime = ShieldRuntime.around(
            env,
            shield,
            env.single_observation_space,
            env.single_action_space,
            env.num_envs,
            adaptive=adaptive,
            intervention_penalty=intervention_penalty,
            monitor=monitor,
            log=log,
            mode=mode,
        )
        self.shield, self.adaptive = self.runtime.shield, self.runtime.adaptive
        self.intervention_penalty = self.runtime.intervention_penalty
        self._mode = _autoreset_mode(env)
        self._over = np.zeros(env.num_envs, np.bool_)
        self._pending: npt.ArrayLike | None = None

    def __del__(self) -> None:
        """Leave the environment open, which Gymnasium 0.29 would close with any wrapper of it."""

    @property
    def state_values(self) -> Scalars:
        """V_h (n,) of the states in which the next actions will be judged.

        Raises:
            gymnasium.error.ResetNeeded: The environments have not been reset, or a step or reset
                has failed.
        """
        self._need_reset()
        values: Scalars = self.runtime.values
        return values.copy()

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Batch, _Infos]:
        """Reset all environments, or those in ``options["reset_mask"]``, and evaluate the states.

        `seed` and `options` are passed to the environments. The result is the batch of
        observations, and the infos with the shield's entries.

        Raises:
            gymnasium.error.ResetNeeded: The mask leaves out environments whose states are not
                known, because they were never reset or a step or reset has failed.
            ValueError: The mask is not n booleans with one of them True, or observations of
                environments outside the mask changed.
        """
        mask = self._reset_mask(options)
        runtime, rows, known = self.runtime, self.runtime.rows, self.runtime.infos
        # A copy is passed on, because Gymnasium removes the mask from the options that it gets.
        options = None if options is None else dict(options)
        with runtime.transition:
            observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
            refuse_shielded_infos(infos, _ONE_SHIELD)

            news = info_rows(infos, len(mask), runtime.keys)
            told = [news[i] if mask[i] else known[i] for i in range(len(mask))]
            runtime.observe(observations, told, starts=mask, reports=infos)
            if not mask.all():
                changed = ~mask & ~_same_rows(rows, runtime.rows)
                if changed.any():
                    raise _mixed_up(
                        "reset() changed what options['reset_mask'] leaves out", changed
                    )
            self._over = self._over & ~mask
            return observations, _with_columns(infos, runtime.start_infos(mask, seed), mask)

    def step(self, actions: npt.ArrayLike) -> tuple[Batch, npt.NDArray[Any], Flags, Flags, _Infos]:
        """Execute `actions` (n, ...), or their replacements, one in each environment.

        The result is that of the environments: observations, rewards, terminated, truncated, and
        infos with the shield's entries.

        Raises:
            gymnasium.error.ResetNeeded: `step` is called before the first reset, after a step or
                reset that failed, or in mode DISABLED while an episode is over.
            ValueError: `actions` is not one action of the right shape for each environment, or the
                environment does not reset itself as its metadata says.
        """
        self._need_reset()
        runtime = self.runtime
        ignored = self._ignored()
        # Actions that will be ignored are filtered too, so that the environment gets the filtered
        # actions if it uses them after all.
        decision = runtime.filter(actions)
        intervened = decision.intervened & ~ignored
        with runtime.transition:
            result = self.env.step(decision.executed.copy())
            observations, rewards, terminated, truncated, infos = result
            over = np.asarray(terminated, np.bool_) | np.asarray(truncated, np.bool_)
            if (over & ignored).any():
                raise _mixed_up(
                    f"metadata says {_NEXT_STEP}, but no new episode began", over & ignored
                )
            last = self._last_observations(infos, over)
            last_infos: list[dict[str, Any]] = []
            # `starts` tells where the state reached begins an episode: where the episode ended in
            # mode SAME_STEP, and where the action was ignored in mode NEXT_STEP.
            starts = over if self._mode == _SAME_STEP else ignored
            present = info_rows(infos, len(over), runtime.keys)
            runtime.observe(observations, present, reports=infos, begun=starts)
            self._over = over & (self._mode != _SAME_STEP)
            reached, binding = runtime.values.copy(), copy(runtime.binding)
            if last is not None:
                final = info_rows(infos.get(FINAL_INFO, {}), len(over), runtime.last_keys)
                last_infos = [final[i] for i in _places(over)]
                reached[over], names = runtime.evaluate(last, last_infos)
                if binding is not None:
                    binding[over] = names
            runtime.count(
                decision, reached, rewards, terminated, truncated, ~ignored, last, last_infos
            )
            runtime.update(reached, ~ignored, starts)
            news = runtime.step_infos(decision, reached, binding)
            penalty = runtime.penalties(intervened)
            if penalty:
                rewards = np.where(intervened, rewards - self.intervention_penalty, rewards)
            if last is not None:
                ended = {**news, **penalty, **runtime.last_masks(last, last_infos, over)}
                infos = _with_final_columns(infos, ended, over)
            if starts.any():
                start = runtime.start_infos(starts)
                news = {key: _merged(starts, start[key], rows) for key, rows in news.items()}
                penalty = {key: rows * ~starts for key, rows in penalty.items()}
            infos = _with_columns(infos, penalty, ~starts)
            infos = _with_columns(infos, news, np.ones(len(over), np.bool_))
            return observations, rewards, terminated, truncated, infos

    def close(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Close the environments and the log.

        A monitor and a log take episodes under way as cut.

        `kwargs` are arguments of the environments' own `close`.
        """
        self.runtime.close()
        super().close(**kwargs)

    # The vector wrappers of Gymnasium 0.29 call these four methods instead of step and reset.

    def reset_async(self, **_: object) -> None:
        """Do nothing; `reset_wait` takes the same arguments and resets."""

    def reset_wait(
        self,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Batch, _Infos]:
        """Reset with these `seed` and `options`, and return the result of `reset`."""
        return self.reset(seed=seed, options=options)

    def step_async(self, actions: npt.ArrayLike) -> None:
        """Keep the actions for `step_wait`."""
        self._pending = actions

    def step_wait(self) -> tuple[Batch, npt.NDArray[Any], Flags, Flags, _Infos]:
        """Step with the actions given to `step_async`, and return the result of `step`."""
        if self._pending is None:
            raise gym.error.NoAsyncCallError(
                "call step_async(actions) before step_wait()", "step_wait"
            )
        actions, self._pending = self._pending, None
        return self.step(actions)

    # Gymnasium's vector environments have these two methods; its wrappers since 1.0 do not.

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Call a method of each environment, or get an attribute, except ``reset`` and ``step``.

        The result has one entry for each environment.

        Args:
            name: Name of the method or attribute.
            args: Arguments of the method.
            kwargs: Keyword arguments of the method.

        Raises:
            ValueError: `name` is ``reset`` or ``step``, which would bypass the shield.
        """
        refuse_past_shield(name, "call reset() or step() of VectorSafetyShield")
        results: tuple[Any, ...] = self.env.call(name, *args, **kwargs)  # type: ignore[attr-defined]
        return results

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401
        """Set the attribute `name` of each environment to one of `values`, or to a value for all.

        The names ``reset`` and ``step`` are refused.

        Raises:
            ValueError: `name` is ``reset`` or ``step``, which would bypass the shield.
        """
        refuse_past_shield(name, "wrap the environments before they are put into the vector")
        self.env.set_attr(name, values)  # type: ignore[attr-defined]

    # -- parts of a step --------------------------------------------------------------------

    def _need_reset(self) -> None:
        if not self.runtime.ready:
            raise gym.error.ResetNeeded("reset() all environments first, or after an error")

    def _ignored(self) -> Flags:
        """Return (n,) which environments will reset themselves instead of taking an action."""
        if self._mode == _DISABLED and self._over.any():
            raise gym.error.ResetNeeded(
                f"the episodes of environments {_places(self._over)} are over; "
                'reset(options={"reset_mask": mask}) them before the next step'
            )
        return self._over

    def _reset_mask(self, options: Mapping[str, Any] | None) -> Flags:
        mask = (options or {}).get("reset_mask")
        if mask is None:
            return np.ones(len(self._over), np.bool_)
        array = np.array(mask)
        if array.dtype != np.bool_ or array.shape != self._over.shape or not array.any():
            raise ValueError(
                f"options['reset_mask'] must be {len(self._over)} booleans, one of them True, "
                f"got {mask!r}"
            )
        if not array.all():
            self._need_reset()
        return array

    def _last_observations(self, infos: _Infos, over: Flags) -> Batch | None:
        """Return the last observations of episodes that ended in this step, in mode SAME_STEP.

        Return None in the other modes, which do not replace them, and where no episode ended.
        """
        name = final_observations_key(infos)
        given = np.zeros_like(over) if name is None else reported(infos, name, len(over))
        if self._mode != _SAME_STEP:
            if given.any():
                raise _mixed_up(
                    f"metadata says {self._mode}, but infos['{name}'] is of {_SAME_STEP}", given
                )
            return None
        missing = over & ~given
        if missing.any():
            key = FINAL_OBSERVATIONS[BEFORE_1_0]
            raise _mixed_up(
                f"in the mode {_SAME_STEP} an episode ended, but infos['{key}'] does not hold its "
                "last observation",
                missing,
            )
        return _rows(infos[name], over) if name is not None and over.any() else None


def _autoreset_mode(env: VectorEnv) -> str:
    if BEFORE_1_0:
        return _SAME_STEP
    mode = (env.metadata or {}).get("autoreset_mode")
    if mode is None and not hasattr(gym.vector, "AutoresetMode"):
        return _NEXT_STEP  # Gymnasium 1.0 has no other mode
    name = str(getattr(mode, "value", mode))
    if name not in _MODES:
        raise ValueError(
            f"env.metadata['autoreset_mode'] must be one of {list(gym.vector.AutoresetMode)}, got "
            f"{mode!r}: without it nobody can tell which actions are ignored and which "
            "observations begin an episode; set it to what the environment does"
        )
    return name


def _mixed_up(why: str, where: Flags) -> ValueError:
    return ValueError(f"autoreset modes mixed up: {why} (environments {_places(where)})")


def _places(flags: Flags) -> list[int]:
    places: list[int] = np.flatnonzero(flags).tolist()
    return places


# -- infos ----------------------------------------------------------------------------------


def _with_columns(infos: Mapping[str, Any], columns: _Infos, mask: Flags) -> _Infos:
    masks = {f"_{key}": mask.copy() for key in columns}
    return {**infos, **{key: np.array(rows) for key, rows in columns.items()}, **masks}


def _with_final_columns(infos: _Infos, columns: _Infos, over: Flags) -> _Infos:
    final = infos.get(FINAL_INFO)
    if isinstance(final, np.ndarray):
        # Gymnasium 0.29 has a dictionary for each environment whose episode ended.
        final = final.copy()
        for i in _places(over):
            told = {key: _plain(rows[i]) for key, rows in columns.items()}
            final[i] = {**(final[i] or {}), **told}
    else:
        final = _with_columns(final or {}, columns, over)
    return {**infos, FINAL_INFO: final, f"_{FINAL_INFO}": over.copy()}


def _merged(where: Flags, one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of `one` where the mask `where` is True, and else those of `other`."""
    rows = other.astype(np.result_type(other, one))
    rows[where] = one[where]
    return rows


def _plain(value: Any) -> Any:  # noqa: ANN401
    return np.array(value) if np.ndim(value) else value.item()


# -- batches of observations ----------------------------------------------------------------


def _rows(batch: Batch, mask: Flags) -> Batch:
    """Return the rows in the mask as a batch; `batch` may also be an array of observations."""
    if isinstance(batch, Mapping):
        return {key: _rows(part, mask) for key, part in batch.items()}
    rows = np.asarray(batch)[mask]
    return stacked(list(rows)) if rows.dtype == object else rows


def _same_rows(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Flags:
    both_nan = (one != one) & (other != other)
    return np.asarray(((one == other) | both_nan).all(axis=1))
