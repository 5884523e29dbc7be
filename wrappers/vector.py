"""`VectorSafetyShield`: a vector environment that executes only what a shield accepts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.copies import environment_id, environment_kwargs
from safeshield.rollouts.infos import column_of
from safeshield.shield.adaptive import AdaptiveMargin, AdaptiveThreshold
from safeshield.shield.guard import Guard, as_penalty
from safeshield.shield.masks import with_own_mask
from safeshield.shield.nested import (
    refuse_past_shield,
    refuse_shielded,
    refuse_shielded_infos,
)
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import copied
from safeshield.spaces.generic import BEFORE_1_0, VectorEnv, VectorWrapper
from safeshield.spaces.rows import fitted, plain
from safeshield.spaces.shapes import Flags, Scalars

_NEXT_STEP, _SAME_STEP, _DISABLED = _MODES = ("NextStep", "SameStep", "Disabled")
_FINAL = ("final_obs", "final_observation")  # from Gymnasium 1.0; before

_ONE_SHIELD = "put VectorSafetyShield around plain environments, once"

_Batch = Any  # what n environments return at once: an array (n, ...), or a dict of such
_Infos = dict[str, Any]


class VectorSafetyShield(VectorWrapper):
    """`SafetyShield` for a vector environment: one forward pass for all of its environments.

    Spaces, observations, ends of episodes and infos are the environment's own, and so are rewards
    unless a penalty is asked for. At reset and every step these infos are added, arrays with one
    row for each of n environments, each with its mask ``"_" + key``:

    ======================  ==========================================================
    shield/intervened       (n,) bool: the executed action is a replacement of the proposed one
    shield/value            (n,) float: Q_h of the executed action in the state it was taken
                            in (at reset: V_h of the state); infinity where not finite
    shield/threshold        (n,) float: what the value must not exceed: -delta (or less, where
                            it adapts)
    shield/certified        (n,) bool: the state just reached has V_h <= -delta, and the
                            shield is calibrated, in no other environment (see
                            `SafetyShield`)
    action_proposed         (n, ...): what the agent sent
    action_executed         (n, ...): what the dynamics saw
    action_mask             where actions are discrete, (n, k) int8: which of them may be
                            taken next, see `Shield.action_mask`
    ======================  ==========================================================

    Actions are read once and converted to the dtype of the action space before they are judged,
    see `SafetyShield`; a batch of which one number does not fit that dtype is judged as it came.

    Where no action was taken, at a reset, both actions are NaN (below every action where actions
    are whole numbers: -1 as a rule). What happens around the end of an episode follows
    ``metadata["autoreset_mode"]``:

    - NEXT_STEP: the step after the end ignores its action and resets, so these rows read as at a
      reset: no intervention, V_h of the new state, no action.
    - SAME_STEP, and all of Gymnasium 0.29: in a row whose episode ended observation and infos are
      already those of the new episode's reset. What is said above of the step that was taken,
      ``shield/certified`` and ``action_mask`` of the last observation, ``infos["final_obs"]``
      (0.29: ``"final_observation"``), is in ``infos["final_info"]``, beside what the environment
      says of that step: as in a `SyncVectorEnv` of environments in a `SafetyShield` each.
    - DISABLED: ``reset(options={"reset_mask": mask})`` restarts the rows in the mask, and only
      these have infos; the others keep what was known of them.

    Environments in other processes have no spec that could be compared, unless
    ``gymnasium.make_vec`` made them.

    Args:
        env: a vector environment whose single spaces are those the shield was trained on.
        shield: a path to its file, a `Shield`, or an agent.
        intervention_penalty: subtracted from the reward of a step in which the shield stepped in;
            with one, ``shield/penalty`` (n,) of a step says what was subtracted.
        adaptive: lets each environment's threshold follow its own errors (see `SafetyShield`).

    Raises:
        ValueError: the spaces differ, the file is damaged, the penalty is negative or not finite,
            a setting in `adaptive` is out of range, or the environment is shielded already or
            does not say how it resets itself.
        TypeError: `env` is no vector environment, `shield` none of the three, or `adaptive` wrong.

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
    ) -> None:
        if not isinstance(env, gym.vector.VectorEnv):
            raise TypeError(
                f"env must be a gymnasium.vector.VectorEnv, got {type(env).__name__}; "
                "SafetyShield is for one environment"
            )
        refuse_shielded(env, _ONE_SHIELD)
        super().__init__(env)
        if BEFORE_1_0:
            # Its wrappers pass these on with a warning, or not at all.
            for name in (
                "num_envs", "observation_space", "action_space", "single_observation_space",
                "single_action_space", "metadata", "render_mode", "spec",
            ):  # fmt: skip
                setattr(self, name, getattr(env, name))
        self.shield = as_shield(shield)
        certifies = self.shield.check_fits(
            env.single_observation_space,
            env.single_action_space,
            environment_id(env),
            environment_kwargs(env),
        )
        self.intervention_penalty = as_penalty(intervention_penalty)
        self._mode = _autoreset_mode(env)
        self._no_action = self.shield.model.action_codec.nothing
        self._dtype = np.dtype(env.single_action_space.dtype)
        self._guard = Guard(self.shield, adaptive, certifies=certifies)
        self._over = np.zeros(env.num_envs, np.bool_)
        self._values = np.full(env.num_envs, np.inf)
        # The states that the guard has judged; None before the first reset, and after a step or
        # reset that failed: the environments may be in others.
        self._seen: _Batch | None = None
        self._pending: npt.ArrayLike | None = None

    def __del__(self) -> None:
        """Leave the environment open; Gymnasium 0.29 would close it with any of its wrappers."""

    @property
    def adaptive(self) -> AdaptiveMargin | None:
        """The margins of the environments; None where the threshold is fixed, or before a reset."""
        return self._guard.adaptive

    @property
    def state_values(self) -> Scalars:
        """V_h (n,) of the states that the next actions will be judged in.

        Raises:
            gymnasium.error.ResetNeeded: called before the first reset.
        """
        self._need_reset()
        return self._values.copy()

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[_Batch, _Infos]:
        """Reset all environments, or those in ``options["reset_mask"]``, and judge their starts.

        Raises:
            gymnasium.error.ResetNeeded: a mask that leaves out environments never reset.
            ValueError: the mask is not n booleans, or rows outside it changed.
        """
        mask = self._reset_mask(options)
        seen, self._seen = self._seen, None
        # A copy, because Gymnasium takes the mask out of the options that it is given.
        options = None if options is None else dict(options)
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        refuse_shielded_infos(infos, _ONE_SHIELD)
        if seen is not None and not mask.all():
            changed = ~mask & ~_same_rows(seen, observations, len(mask))
            if changed.any():
                raise _mixed_up("reset() changed what options['reset_mask'] leaves out", changed)
        seen = self._judged(observations)
        self._over = self._over & ~mask
        infos = _with_news(infos, {**self._start_news(), **self._mask_news(infos)}, mask)
        self._seen = seen
        return observations, infos

    def step(self, actions: npt.ArrayLike) -> tuple[_Batch, npt.NDArray[Any], Flags, Flags, _Infos]:
        """Execute `actions` (n, ...), or their replacements.

        Raises:
            gymnasium.error.ResetNeeded: called before the first reset; after a step or reset that
                failed; in mode DISABLED with an episode that is over.
            ValueError: not one action of the right shape for each environment; or the environment
                does not reset itself as its metadata says.
        """
        self._need_reset()
        proposed = self._checked_actions(actions)
        judged = fitted(proposed, self._dtype)
        ignored = self._ignored()
        threshold = self._threshold()
        # Actions that will be ignored are judged too: if the environment used them after all,
        # they would be safe.
        executed, report = self._guard.act(judged)
        sent = np.asarray(executed)
        intervened = np.asarray(report.intervened & ~ignored)
        news = {
            "shield/intervened": intervened,
            "shield/threshold": threshold,
            "action_proposed": self._without(proposed, ignored),
            "action_executed": self._without(sent, ignored),
        }
        self._seen = None
        observations, rewards, terminated, truncated, infos = self.env.step(sent)
        over = np.asarray(terminated, np.bool_) | np.asarray(truncated, np.bool_)
        if (over & ignored).any():
            raise _mixed_up(f"metadata says {_NEXT_STEP}, but no new episode began", over & ignored)
        last = self._last_observations(infos, over)
        seen = self._judged(observations)
        self._over = over & (self._mode != _SAME_STEP)
        reached = self._values.copy()
        if last is not None:
            reached[over] = self.shield.value(last)
        self._guard.learn(reached, ~ignored)
        news["shield/value"] = np.where(ignored, self._values, report.value)
        news["shield/certified"] = self._guard.certified(reached)
        if self.intervention_penalty:
            rewards = np.where(intervened, rewards - self.intervention_penalty, rewards)
        took = ~ignored
        if last is not None:
            final = {
                **news,
                **self._penalty_news(intervened),
                **self._final_masks(last, infos, over),
            }
            infos = _with_final_news(infos, final, over)
            for key, start in self._start_news().items():
                news[key] = _merged(over, start, news[key])
            took = ~over
        masks = self._mask_news(infos)
        infos = _with_news(infos, self._penalty_news(intervened & took), took)
        infos = _with_news(infos, {**news, **masks}, np.ones(len(over), np.bool_))
        self._seen = seen
        return observations, rewards, terminated, truncated, infos

    # The outer vector wrappers of Gymnasium 0.29 go through these four, past step and reset.

    def reset_async(self, **_: object) -> None:
        """Do nothing: `reset_wait` takes the same arguments."""

    def reset_wait(
        self,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[_Batch, _Infos]:
        """Reset, as `reset` does."""
        return self.reset(seed=seed, options=options)

    def step_async(self, actions: npt.ArrayLike) -> None:
        """Keep the actions for `step_wait`."""
        self._pending = actions

    def step_wait(self) -> tuple[_Batch, npt.NDArray[Any], Flags, Flags, _Infos]:
        """Step, as `step` does, with the actions given to `step_async`."""
        if self._pending is None:
            raise gym.error.NoAsyncCallError(
                "call step_async(actions) before step_wait()", "step_wait"
            )
        actions, self._pending = self._pending, None
        return self.step(actions)

    # Gymnasium's own vectors have these two, and its wrappers since 1.0 do not.

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Call a method of each environment, or get an attribute, but neither reset nor step.

        Raises:
            ValueError: it would go past the shield.
        """
        refuse_past_shield(name, "call reset() or step() of VectorSafetyShield")
        results: tuple[Any, ...] = self.env.call(name, *args, **kwargs)  # type: ignore[attr-defined]
        return results

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401
        """Set an attribute of each environment, but neither reset nor step.

        Raises:
            ValueError: it would go past the shield.
        """
        refuse_past_shield(name, "wrap the environments before they are put into the vector")
        self.env.set_attr(name, values)  # type: ignore[attr-defined]

    # -- parts of a step --------------------------------------------------------------------

    def _need_reset(self) -> None:
        if self._seen is None:
            raise gym.error.ResetNeeded("reset() all environments first, or after an error")

    def _judged(self, observations: _Batch) -> _Batch:
        """Judge the states just reached; returns a copy of the observations."""
        # A copy: environments may write the next observations into the same array.
        seen = copied(observations)
        values = np.asarray(self._guard.see(seen), np.float64)
        if values.shape != self._over.shape:
            raise ValueError(
                f"the environment returned {len(values)} observations, its num_envs is "
                f"{len(self._over)}"
            )
        self._values = values
        return seen

    def _start_news(self) -> _Infos:
        """Tell of the states last seen as a reset does: nothing was proposed and nothing ran."""
        nothing = np.broadcast_to(self._no_action, (len(self._over), *self._no_action.shape))
        return {
            "shield/intervened": np.zeros(len(self._over), np.bool_),
            "shield/value": self._values,
            "shield/threshold": self._threshold(),
            "shield/certified": self._guard.certified(self._values),
            "action_proposed": nothing,
            "action_executed": nothing,
        }

    def _penalty_news(self, intervened: Flags) -> _Infos:
        if not self.intervention_penalty:
            return {}
        return {"shield/penalty": self.intervention_penalty * intervened}

    def _final_masks(self, last: _Batch, infos: _Infos, over: Flags) -> _Infos:
        """Mask actions in the states that ended episodes, for their infos: (n, k)."""
        played = self.shield.model.action_codec
        if not played.discrete:
            return {}
        threshold = self._threshold()[over]
        masks = np.zeros((len(over), sum(played.categories)), np.bool_)
        masks[over] = self.shield.action_mask(last, threshold)
        final = infos.get("final_info")
        own = None if final is None else column_of(final, "action_mask", len(over))
        for i in _places(over & own.present) if own is not None else ():
            masks[i] = with_own_mask(masks[i], own.values[i], played)  # type: ignore[union-attr]
        return {"action_mask": masks.astype(np.int8)}

    def _mask_news(self, infos: _Infos) -> _Infos:
        """Mask the actions to come, for the infos of the states just reached."""
        played = self.shield.model.action_codec
        if not played.discrete:
            return {}
        masks = self._guard.masks()
        if "action_mask" in infos:
            for i in _places(_given(infos, "action_mask", len(masks))):
                masks[i] = with_own_mask(masks[i], infos["action_mask"][i], played)
        return {"action_mask": masks.astype(np.int8)}

    def _threshold(self) -> Scalars:
        return np.broadcast_to(np.asarray(self._guard.threshold, np.float64), self._over.shape)

    def _ignored(self) -> Flags:
        """Where the environment will reset itself instead of taking an action."""
        if self._mode == _DISABLED and self._over.any():
            raise gym.error.ResetNeeded(
                f"the episodes of environments {_places(self._over)} are over; "
                'reset(options={"reset_mask": mask}) them before the next step'
            )
        return self._over

    def _checked_actions(self, actions: npt.ArrayLike) -> npt.NDArray[Any]:
        shape = (len(self._over), *self._no_action.shape)
        array = plain(actions)
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise ValueError(
                f"actions must be numbers of shape {shape}, a row for each environment, got "
                f"{array.dtype} {array.shape}"
            )
        return array

    def _without(self, actions: npt.NDArray[Any], ignored: Flags) -> npt.NDArray[Any]:
        """Return a copy of the actions with none in the rows that were ignored."""
        if not ignored.any():
            return np.array(actions)
        rows = actions.astype(np.result_type(actions, self._no_action))
        rows[ignored] = self._no_action
        return rows

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

    def _last_observations(self, infos: _Infos, over: Flags) -> _Batch | None:
        """Return the observations that ended episodes in this step, where others replaced them."""
        name = next((name for name in _FINAL if name in infos), None)
        given = np.zeros_like(over) if name is None else _given(infos, name, len(over))
        if self._mode != _SAME_STEP:
            if given.any():
                raise _mixed_up(
                    f"metadata says {self._mode}, but infos['{name}'] is of {_SAME_STEP}", given
                )
            return None
        if (over & ~given).any():
            raise _mixed_up(
                f"in the mode {_SAME_STEP} an episode ended, but infos['{_FINAL[BEFORE_1_0]}'] "
                "does not hold its last observation",
                over & ~given,
            )
        return _rows(infos[name], over) if name is not None and over.any() else None


def _autoreset_mode(env: VectorEnv) -> str:
    if BEFORE_1_0:
        return _SAME_STEP
    mode = (env.metadata or {}).get("autoreset_mode")
    if mode is None and not hasattr(gym.vector, "AutoresetMode"):
        return _NEXT_STEP  # Gymnasium 1.0 knows no other
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


def _with_news(infos: Mapping[str, Any], news: _Infos, mask: Flags) -> _Infos:
    masks = {f"_{key}": mask.copy() for key in news}
    return {**infos, **{key: np.array(rows) for key, rows in news.items()}, **masks}


def _with_final_news(infos: _Infos, news: _Infos, over: Flags) -> _Infos:
    final = infos.get("final_info")
    if isinstance(final, np.ndarray):
        # Gymnasium 0.29: a dictionary for each environment whose episode ended.
        final = final.copy()
        for i in _places(over):
            final[i] = {**(final[i] or {}), **{key: _plain(rows[i]) for key, rows in news.items()}}
    else:
        final = _with_news(final or {}, news, over)
    return {**infos, "final_info": final, "_final_info": over.copy()}


def _merged(where: Flags, one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of one array in the mask, else of the other."""
    if not where.any():
        return other
    rows = other.astype(np.result_type(other, one))
    rows[where] = one[where]
    return rows


def _plain(value: Any) -> Any:  # noqa: ANN401
    return np.array(value) if np.ndim(value) else value.item()


def _given(infos: _Infos, name: str, count: int) -> Flags:
    """Where a key has a value: its mask, and for objects not None."""
    given = np.array(infos.get(f"_{name}", np.ones(count)), np.bool_)
    if isinstance(infos[name], np.ndarray) and infos[name].dtype == object:
        given &= np.array([one is not None for one in infos[name]])
    return given


# -- batches of observations ----------------------------------------------------------------


def _rows(batch: _Batch, mask: Flags) -> _Batch:
    """Return the rows in the mask as a batch, also of an array of single observations."""
    if isinstance(batch, Mapping):
        return {key: _rows(part, mask) for key, part in batch.items()}
    rows = np.asarray(batch)[mask]
    return _stacked(list(rows)) if rows.dtype == object else rows


def _stacked(observations: Sequence[Any]) -> _Batch:
    if isinstance(observations[0], Mapping):
        return {key: _stacked([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def _same_rows(one: _Batch, other: _Batch, count: int) -> Flags:
    if isinstance(one, Mapping):
        same: Flags = np.all([_same_rows(one[key], other[key], count) for key in one], axis=0)
        return same
    first, second = np.asarray(one), np.asarray(other)
    both_nan = (first != first) & (second != second)
    return np.asarray(((first == second) | both_nan).reshape(count, -1).all(axis=1))
