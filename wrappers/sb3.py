"""`VecSafetyShield`: one shield for all environments of a Stable-Baselines3 `VecEnv`."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

from safeshield.rollouts.infos import PENALTY, TERMINAL_OBSERVATION, TIME_LIMIT
from safeshield.shield.adaptive import AdaptiveThreshold, as_adaptive
from safeshield.shield.masks import with_own_mask
from safeshield.shield.nested import refuse_past_shield
from safeshield.shield.protocols import Decision, Recorder, Watcher
from safeshield.shield.runtime import Mode, ShieldRuntime
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import stacked
from safeshield.spaces.rows import plain
from safeshield.spaces.shapes import Scalars
from safeshield.wrappers.safety_shield import SafetyShield

Infos = list[dict[str, Any]]
_MASKS = "action_masks"  # the method that sb3-contrib calls for masks


class VecSafetyShield(VecEnvWrapper):
    """Execute each environment's action where the shield accepts it, and else a replacement.

    This is `SafetyShield` for a `VecEnv`, with one pass through the critics for all environments.
    Actions, infos (one dict for each environment, also in `reset_infos`) and ends of episodes are
    the same as there.

    A `VecEnv` resets an environment in the step that ends its episode. That step's
    ``shield/safe_set`` and ``shield/binding`` refer to the state reached, ``terminal_observation``;
    they are False and empty where the `VecEnv` does not report that observation. The shield judges
    the next action in the new episode's first state, whose infos are in `reset_infos`.

    Where actions are discrete, infos contain ``action_mask`` for each environment's next action (at
    an episode's end, for the first action of the new episode). ``env_method("action_masks")``
    returns the same masks, so sb3-contrib's MaskablePPO can be trained on this environment.

    Actions are read once and converted to the dtype of the action space before they are judged, see
    `SafetyShield`. A batch with a number that does not fit that dtype is judged without conversion.

    The shield must get the observations it was trained on. So put `VecNormalize` and other wrappers
    that change observations around it, as in ``VecNormalize(VecSafetyShield(venv, shield))``.
    Random warm-up actions (``learning_starts``) are filtered like all others.

    The specs of environments in other processes (`SubprocVecEnv`) cannot be compared with that of
    the shield's calibration (see `SafetyShield`). With `worker_env`, each environment is compared
    in its own process.

    Args:
        venv: Environments with the spaces that the shield was trained on.
        shield: A path to a shield's file, a `Shield`, or an agent.
        intervention_penalty: Number of at least 0 that is subtracted from the reward of a step in
            which the shield intervened. If it is above 0, the info ``shield/penalty`` tells the
            number that was subtracted. Returns that a `Monitor` inside records do not include the
            penalty, and those of a `VecMonitor` outside do.
        adaptive: Settings by which each environment's threshold follows its own errors (see
            `SafetyShield`). An episode's last step does not change the threshold where the `VecEnv`
            does not report ``terminal_observation``.
        monitor: A `PromiseMonitor` of the shield, which counts the episodes of all environments in
            the order in which they began, see `SafetyShield`.
        log: A `ShieldLog`, which records the steps of all environments, see `SafetyShield`.
        mode: "shield" or "shadow", see `SafetyShield`.

    Raises:
        ValueError: The spaces differ, the file is damaged, the penalty is not a number of at least
            0, a setting in `adaptive` is out of range, `monitor` watches another shield, `log`
            records another one, `venv` normalises observations or is shielded already, or the mode
            is unknown or does not go with the other arguments.
        TypeError: `venv` is not a `VecEnv`, `shield` is none of the three, or `adaptive` is of a
            wrong type.

    >>> import gymnasium, safeshield
    >>> from safeshield import SafeFQL, SafeFQLConfig, collect
    >>> from stable_baselines3.common.vec_env import DummyVecEnv
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> boats = DummyVecEnv([lambda: gymnasium.make("safeshield/Boat-v0")] * 3)
    >>> envs = VecSafetyShield(boats, agent.shield().with_delta(0.05))
    >>> observations = envs.reset()
    >>> _, rewards, _, infos = envs.step(np.zeros((3, 2), np.float32))
    >>> len(infos), infos[0]["shield/threshold"], infos[0]["action_executed"].shape
    (3, -0.05, (2,))
    """

    def __init__(
        self,
        venv: VecEnv,
        shield: Shield | HasShield | str | os.PathLike[str],
        intervention_penalty: float = 0.0,
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        monitor: Watcher | None = None,
        *,
        log: Recorder | None = None,
        mode: Mode = "shield",
    ) -> None:
        _check_inner(venv)
        super().__init__(venv)
        self.runtime = ShieldRuntime.around(
            venv,
            shield,
            venv.observation_space,
            venv.action_space,
            venv.num_envs,
            adaptive=adaptive,
            intervention_penalty=intervention_penalty,
            monitor=monitor,
            log=log,
            mode=mode,
        )
        self.shield, self.adaptive = self.runtime.shield, self.runtime.adaptive
        self.intervention_penalty = self.runtime.intervention_penalty
        self._codec = self.shield.model.action_codec
        self._decision: Decision | None = None
        self._own_masks = self._codec.discrete and _has_masks(venv)

    def reset(self) -> VecEnvObs:
        """Reset all environments and evaluate the states in which they start.

        The result is the batch of observations. `reset_infos` holds the infos.
        """
        self._decision = None
        seeds = list(getattr(self.venv.unwrapped, "_seeds", ())) or None
        with self.runtime.transition:
            observations = self.venv.reset()
            inner = self._inner_reset_infos()
            self.runtime.observe(observations, inner, starts=True)
            self.reset_infos = _added(inner, self.runtime.start_infos(seeds=seeds), start=True)
        return observations

    def step_async(self, actions: npt.ArrayLike) -> None:
        """Filter the actions (num_envs, ...) and start the step of the environments.

        Raises:
            RuntimeError: The method is called before `reset`, or while a step is under way.
            ValueError: The actions have a wrong shape.
        """
        if not self.runtime.ready:
            raise RuntimeError(
                "cannot step before reset(), after a step that failed, or before step_wait()"
            )
        proposed = plain(actions)
        # Booleans are actions of a MultiBinary.
        decision = self.runtime.filter(
            proposed.astype(np.int8) if proposed.dtype == np.bool_ else proposed
        )
        with self.runtime.transition:
            self.venv.step_async(decision.executed.copy())
        self._decision = decision

    def step_wait(self) -> VecEnvStepReturn:
        """Return observations, rewards, ends and infos of the step under way.

        Raises:
            RuntimeError: No step is under way.
        """
        decision, self._decision = self._decision, None
        if decision is None:
            # Some environments would execute their last action again, which was not judged in the
            # present state.
            raise RuntimeError("no step is under way: call step_async() first")
        runtime = self.runtime
        with runtime.transition:
            observations, rewards, dones, infos = self._step_inner()
            ends = np.flatnonzero(dones)
            inner = self._inner_reset_infos() if len(ends) else infos
            present = [inner[i] if done else infos[i] for i, done in enumerate(dones)]
            runtime.observe(observations, present, begun=np.asarray(dones, np.bool_))
            reached, binding = runtime.values.copy(), copy(runtime.binding)
            if len(ends):
                reached[ends], last = self._last_values([infos[i] for i in ends])
                if binding is not None:
                    binding[ends] = last
            over = np.asarray(dones, np.bool_)
            last_infos = [infos[i] for i in ends]
            cut = np.zeros_like(over)
            cut[ends] = [bool(info.get(TIME_LIMIT)) for info in last_infos]
            final = [info.get(TERMINAL_OBSERVATION) for info in last_infos]
            known = stacked(final) if final and all(one is not None for one in final) else None
            runtime.count(
                decision, reached, rewards, over & ~cut, cut, last=known, last_infos=last_infos
            )
            runtime.update(reached, starts=over)
            penalty = runtime.penalties(decision.intervened)
            if penalty:
                rewards = rewards - penalty[PENALTY].astype(np.result_type(rewards, np.float32))
            news = {**runtime.step_infos(decision, reached, binding), **penalty}
            if len(ends):
                starts = _added(present, runtime.start_infos(dones), start=True)
                for i in ends:
                    self.reset_infos[i] = starts[i]
            return observations, rewards, dones, _added(infos, news)

    def close(self) -> None:
        """Close the environments and the log.

        A monitor and a log take episodes under way as cut.
        """
        self.runtime.close()
        super().close()

    def _step_inner(self) -> VecEnvStepReturn:
        try:
            return self.venv.step_wait()
        except ValueError as error:
            if "too many values to unpack" not in str(error):
                raise
            raise ValueError(
                "each environment's step must return Gymnasium's 5 values; for Safety-Gymnasium's "
                "native ids, which return the cost as a sixth, make the '...Gymnasium-v0' id, or "
                "put safeshield.wrappers.CostFromStep around each environment"
            ) from error

    def has_attr(self, attr_name: str) -> bool:
        """Return whether the environments have the attribute `attr_name`.

        Where actions are discrete, they always have ``action_masks``.
        """
        ours = attr_name == _MASKS and self._codec.discrete
        return ours or super().has_attr(attr_name)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,  # noqa: ANN401
        indices: VecEnvIndices = None,
        **method_kwargs: Any,  # noqa: ANN401
    ) -> list[Any]:
        """Call a method of the environments and return their results, one for each.

        Where actions are discrete, ``action_masks`` returns the shield's masks.

        Args:
            method_name: Name of the method.
            method_args: Arguments of the method.
            indices: Environments to ask; None for all.
            method_kwargs: Keyword arguments of the method.

        Raises:
            RuntimeError: Masks are asked for before `reset`, or while a step is under way.
            ValueError: The method is ``reset`` or ``step``, which would bypass the shield.
        """
        refuse_past_shield(
            method_name, "call reset() or step() of the VecEnv, after seed() or set_options()"
        )
        if method_name != _MASKS or not self._codec.discrete:
            return super().env_method(method_name, *method_args, indices=indices, **method_kwargs)
        if not self.runtime.ready:
            raise RuntimeError("there are no masks before reset(), or while a step is under way")
        now = self.runtime.masks
        masks = {i: now[i] for i in self._get_indices(indices)}
        if self._own_masks:
            for i, own in zip(masks, self.venv.env_method(_MASKS, indices=indices), strict=True):
                masks[i] = with_own_mask(masks[i], own, self._codec)
        return list(masks.values())

    def set_attr(
        self,
        attr_name: str,
        value: Any,  # noqa: ANN401
        indices: VecEnvIndices = None,
    ) -> None:
        """Set an attribute of the environments.

        Args:
            attr_name: Name of the attribute.
            value: Its new value.
            indices: Environments in which it is set; None for all.

        Raises:
            ValueError: The attribute is ``reset`` or ``step``, which would bypass the shield.
        """
        refuse_past_shield(attr_name, "wrap the environments before they are put into the VecEnv")
        super().set_attr(attr_name, value, indices)

    def _last_values(
        self, infos: Sequence[Mapping[str, Any]]
    ) -> tuple[Scalars, npt.NDArray[np.object_]]:
        """Return V_h (len(infos),) of ended episodes' last states, and their largest constraints.

        Where a state is not reported, the results are infinity and an empty name.
        """
        values = np.full(len(infos), np.inf, np.float32)
        names = np.full(len(infos), "", object)
        told = [info for info in infos if info.get(TERMINAL_OBSERVATION) is not None]
        if told:
            where = [info.get(TERMINAL_OBSERVATION) is not None for info in infos]
            last = stacked([info[TERMINAL_OBSERVATION] for info in told])
            values[where], names[where] = self.runtime.evaluate(last, told)
        return values, names

    def _inner_reset_infos(self) -> Infos:
        # The wrappers of Stable-Baselines3 do not pass `reset_infos` on; their own stay empty.
        pairs = zip(self.venv.unwrapped.reset_infos, self.venv.reset_infos, strict=True)
        return [{**below, **above} for below, above in pairs]


def _added(
    infos: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], start: bool = False
) -> Infos:
    """Return infos to which the rows of columns (n, ...) have been added.

    Values of keys that begin with "shield/" are plain Python, and others are copies of the rows. At
    a start the action of a Discrete is an array without dimensions, as in a `SafetyShield`.
    """
    all_told = [dict(info) for info in infos]
    for key, rows in columns.items():
        if key.startswith("shield/"):
            values = rows.tolist()
        else:
            values = [np.array(row) if start else row.copy() for row in rows]
        for told, value in zip(all_told, values, strict=True):
            told[key] = value
    return all_told


def worker_env(
    make_env: Callable[[], gym.Env[Any, Any]],
    shield: Shield | HasShield | str | os.PathLike[str],
    adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
) -> Callable[[], SafetyShield]:
    """Return a function that makes a shielded environment, for `SubprocVecEnv`.

    It works with every start method of processes. In a worker process, each environment has its own
    shield. Where `shield` is a path, the worker reads the file; where it is a `Shield`, the worker
    gets a copy. The worker's matrix products run on one thread (NumPy's own OpenBLAS, and PyTorch),
    because many workers with many threads each slow each other down. The number of threads in the
    main process is not changed.

    Args:
        make_env: Function that makes one environment, without the shield.
        shield: A path to a shield's file (recommended), a `Shield`, or an agent.
        adaptive: Settings by which the threshold follows its errors (see `SafetyShield`).

    Raises:
        FileNotFoundError: `shield` is a path to a file that does not exist.
        TypeError: `shield` is none of the three, or `adaptive` is of a wrong type.
        ValueError: A setting in `adaptive` is out of range.

    >>> from safeshield.wrappers.sb3 import worker_env
    >>> from stable_baselines3.common.vec_env import SubprocVecEnv
    >>> boat = lambda: gym.make("safeshield/Boat-v0")
    >>> envs = SubprocVecEnv([worker_env(boat, "boat.safetensors")] * 8)  # doctest: +SKIP
    """
    adaptive = as_adaptive(adaptive)
    if isinstance(shield, str | os.PathLike):
        # An error in a worker would reach the parent only as a broken pipe without a reason.
        if not Path(shield).is_file():
            raise FileNotFoundError(f"there is no shield's file at {os.fspath(shield)!r}")
        return partial(_make_in_worker, make_env, os.path.abspath(shield), adaptive)
    return partial(_make_in_worker, make_env, as_shield(shield), adaptive)


def _make_in_worker(
    make_env: Callable[[], gym.Env[Any, Any]],
    shield: Shield | str,
    adaptive: AdaptiveThreshold | None,
) -> SafetyShield:
    if multiprocessing.parent_process() is not None:
        _one_thread()
    return SafetyShield(make_env(), shield, adaptive=adaptive)


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    # NumPy is loaded already, so OMP_NUM_THREADS would have no effect.
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for library in folder.glob("*openblas*"):
            for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
                function = getattr(ctypes.CDLL(str(library)), name, None)
                if function is not None:
                    function(1)


def _check_inner(venv: VecEnv) -> None:
    if not isinstance(venv, VecEnv):
        raise TypeError(
            f"venv must be a VecEnv of Stable-Baselines3, got {type(venv).__name__}; for one "
            "Gymnasium environment use SafetyShield"
        )
    layer = venv
    while isinstance(layer, VecEnvWrapper):
        if isinstance(layer, VecNormalize) and layer.norm_obs:
            raise ValueError(
                "venv normalises observations, and the shield was trained on raw ones: put "
                "VecSafetyShield inside, VecNormalize(VecSafetyShield(venv, shield))"
            )
        if isinstance(layer, VecSafetyShield):
            raise ValueError("venv is shielded already: its infos can tell of one shield only")
        layer = layer.venv
    try:
        shielded = any(venv.env_is_wrapped(SafetyShield))
    except (AttributeError, NotImplementedError):
        # Some environments do not implement this method.
        return
    if shielded:
        raise ValueError(
            "the environments in venv are shielded already by SafetyShield, and infos can tell of "
            "one shield only: use one of the two"
        )


def _has_masks(venv: VecEnv) -> bool:
    try:
        return venv.has_attr(_MASKS)
    except NotImplementedError:
        return False
