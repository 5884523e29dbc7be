"""The vector environment of a `StateTask`, in which one NumPy call steps all environments.

Its results equal those of `gymnasium.vector.SyncVectorEnv` over single environments bit for bit at
every step (observations, rewards, flags, infos, seeds). This holds in every autoreset mode of the
installed Gymnasium:

- ``"NextStep"`` (the default from 1.0): the step after an episode's end ignores the action, resets
  the environment and returns reward 0.
- ``"SameStep"`` (the only mode of 0.29): the step that ends an episode returns the first
  observation of the next one. The last observation and its info are in ``infos["final_obs"]`` and
  ``infos["final_info"]`` (in 0.29 ``"final_observation"``, and an array of dictionaries).
- ``"Disabled"``: the caller resets environments with ``options={"reset_mask": mask}``.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector.utils import batch_space

from safeshield.envs.single import TRAIL_LENGTH, StateEnv
from safeshield.envs.task import Array, Frame, StateTask, checked_render_mode
from safeshield.spaces.generic import BEFORE_1_0, VectorEnv

Mask = npt.NDArray[np.bool_]
Step = tuple[npt.NDArray[np.float32], Array, Mask, Mask, dict[str, Any]]

_GYMNASIUM_MODES = getattr(gym.vector, "AutoresetMode", None)


def autoreset_modes() -> tuple[str, ...]:
    """Return the autoreset modes of the installed Gymnasium, its default first."""
    if BEFORE_1_0:
        return ("SameStep",)
    if _GYMNASIUM_MODES is None:
        return ("NextStep",)
    return ("NextStep", "SameStep", "Disabled")


class StateVectorEnv(VectorEnv):
    """A batch of environments that share one task; the module describes the autoreset modes.

    ``reset(seed=s)`` gives environment i the seed s + i, and a list gives each environment its own
    seed. ``options={"state": states}`` sets the start states: states (num_envs, n), or one state
    (n,) for all.

    Args:
        task: Dynamics, constraint, reward and starts.
        num_envs: Number of environments.
        max_episode_steps: Number of steps after which an episode is truncated; None for no limit.
        autoreset_mode: "NextStep", "SameStep" or "Disabled"; by default Gymnasium's default.
        render_mode: "rgb_array" for pictures, or None.
    """

    def __init__(
        self,
        task: StateTask,
        num_envs: int,
        *,
        max_episode_steps: int | None,
        autoreset_mode: Any = None,  # noqa: ANN401 (an enum that Gymnasium 0.29 does not have)
        render_mode: str | None = None,
    ) -> None:
        self.task = task
        self.constraint_source = task.constraint_source
        self.num_envs = _at_least_one("num_envs", num_envs)
        self.max_episode_steps = (
            None
            if max_episode_steps is None
            else _at_least_one("max_episode_steps", max_episode_steps)
        )
        self.render_mode = checked_render_mode(render_mode)
        self.autoreset_mode = _checked_mode(autoreset_mode)
        self.metadata = dict(StateEnv.metadata, render_fps=task.render_fps)
        if _GYMNASIUM_MODES is not None:
            self.metadata["autoreset_mode"] = _GYMNASIUM_MODES(self.autoreset_mode)
        self.single_observation_space = task.observation_space()
        self.single_action_space = task.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # Gymnasium 0.29 sets these three attributes in VectorEnv.__init__, which is not called
        # because later versions dropped its arguments.
        self.closed, self.is_vector_env, self.viewer = False, True, None

        self._state: Array | None = None
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int] = [-1] * num_envs
        self._trails: list[deque[Array]] = [deque(maxlen=TRAIL_LENGTH) for _ in range(num_envs)]
        self._pending: npt.NDArray[Any] | None = None

    @property
    def state(self) -> Array:
        """Copy of the states (num_envs, n), float64."""
        return self._current().copy()

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Random generators, one for each environment."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """Seeds of the random generators, one for each environment."""
        self.np_random  # noqa: B018 (creates the generators that no reset has created)
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start new episodes, in all environments or in some of them.

        Args:
            seed: A whole number s, by which environment i gets the seed s + i, or one seed for each
                environment. None leaves the random generators as they are.
            options: ``options["reset_mask"]`` (num_envs,) says which environments start an episode,
                by default all. ``options["state"]`` holds the start states (num_envs, n), or one
                state (n,) for all. Without it the start states are random.

        Returns:
            The observations (num_envs, n) of the present states of all environments, float32, and
            the infos, whose entries are valid for the environments that started an episode.

        Raises:
            ValueError: Seeds, mask or states have another length than num_envs, or a state lies
                outside the task's bounds.
        """
        options = {} if options is None else options
        mask = self._checked_mask(options.get("reset_mask"))
        seeds = self._checked_seeds(seed)
        states = self._checked_states(options.get("state"), mask)
        for i in np.flatnonzero(mask).tolist():
            if (own_seed := seeds[i]) is not None:
                self._generators[i], self._seeds[i] = seeding.np_random(own_seed)
        self._restart(mask, states)
        return self._current().astype(np.float32), self._infos(mask)

    def step(self, actions: npt.NDArray[Any]) -> Step:
        """Step every environment with its row of `actions` (num_envs, m).

        Returns:
            The observations (num_envs, n), rewards (num_envs,), flags `terminated` (always False)
            and `truncated` (num_envs,) each, and infos. The module describes what they hold where
            an episode has ended.

        Raises:
            ValueError: The actions have another shape or are not finite where they are used.
            ResetNeeded: No reset has been made yet, or an episode is over in mode "Disabled".
        """
        state = self._current()
        if self.autoreset_mode == "Disabled" and self._over.any():
            raise ResetNeeded(
                f"the episodes of environments {np.flatnonzero(self._over).tolist()} are over; "
                'reset(options={"reset_mask": mask}) them before the next step'
            )
        restarting = self._over
        moving = ~restarting
        checked = self._checked_actions(actions, moving)
        rewards = np.where(moving, self.task.reward(state), 0.0)
        self._state = self.task.next_state(state, checked)
        self._elapsed += 1
        if restarting.any():
            self._restart(restarting)
        self._remember(moving)
        everywhere = np.ones(self.num_envs, dtype=np.bool_)
        infos = self._infos(everywhere)
        over = np.zeros_like(everywhere)
        if self.max_episode_steps is not None:
            over = moving & (self._elapsed >= self.max_episode_steps)
        self._over = over
        if self.autoreset_mode == "SameStep" and over.any():
            final = self._final(over)
            self._restart(over)
            infos = self._infos(everywhere) | final
        terminated = np.zeros_like(everywhere)
        return self._current().astype(np.float32), rewards, terminated, over.copy(), infos

    def render(self) -> tuple[Frame, ...] | None:
        """Return one picture for each environment, or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() does nothing without render_mode="rgb_array"')
            return None
        self._current()
        return tuple(self.task.picture(trail) for trail in self._trails)

    # Gymnasium 0.29's vector wrappers call the next four methods.
    def reset_async(self, seed: Any = None, options: dict[str, Any] | None = None) -> None:  # noqa: ANN401
        """Do nothing, because `reset_wait` receives the same `seed` and `options`."""

    def reset_wait(
        self,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Call `reset` with these `seed` and `options`, and return its result."""
        return self.reset(seed=seed, options=options)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Store the `actions` (num_envs, m) for `step_wait`."""
        self._pending = actions

    def step_wait(self, **_: object) -> Step:
        """Call `step` with the actions that `step_async` received, and return its result."""
        if self._pending is None:
            raise ResetNeeded("call step_async(actions) before step_wait()")
        actions, self._pending = self._pending, None
        return self.step(actions)

    def _restart(self, mask: Mask, states: Array | None = None) -> None:
        if self._state is None:
            self._state = np.zeros((self.num_envs, self.task.state_low.size))
        for i in np.flatnonzero(mask).tolist():
            placed = None if states is None else states[i]
            self._state[i] = self.task.draw_start(self._generator(i)) if placed is None else placed
            self._trails[i].clear()
        self._elapsed[mask] = 0
        self._over = self._over & ~mask
        self._remember(mask)

    def _remember(self, mask: Mask) -> None:
        if self.render_mode is not None:
            for i in np.flatnonzero(mask).tolist():
                self._trails[i].append(self._current()[i].copy())

    def _infos(self, mask: Mask) -> dict[str, Any]:
        constraint = np.where(mask, self.task.constraint(self._current()), 0.0)
        return {
            "cost": (constraint > 0.0).astype(np.float64),
            "_cost": mask.copy(),
            "constraint": constraint,
            "_constraint": mask.copy(),
        }

    def _final(self, over: Mask) -> dict[str, Any]:
        """Return the entries of infos for the last states of episodes in mode "SameStep"."""
        observations = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(over).tolist():
            observations[i] = self._current()[i].astype(np.float32)
        infos: Any = self._infos(over)
        name = "final_obs"
        if BEFORE_1_0:
            name = "final_observation"
            columns, infos = infos, np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(over).tolist():
                infos[i] = {key: float(columns[key][i]) for key in ("cost", "constraint")}
        return {
            name: observations,
            f"_{name}": over.copy(),
            "final_info": infos,
            "_final_info": over.copy(),
        }

    def _generator(self, i: int) -> np.random.Generator:
        generator = self._generators[i]
        if generator is None:
            generator, self._seeds[i] = seeding.np_random()
            self._generators[i] = generator
        return generator

    def _current(self) -> Array:
        if self._state is None:
            raise ResetNeeded("call reset() before step(), render() or reading the state")
        return self._state

    def _checked_actions(self, actions: object, moving: Mask) -> Array:
        array = np.asarray(actions, dtype=np.float64)
        shape = (self.num_envs, self.task.action_size)
        if array.shape == shape and not moving.all():
            array = np.where(moving[:, None], array, 0.0)
        return self.task.checked_action(array, shape)

    def _checked_states(self, states: object, mask: Mask) -> Array | None:
        if states is None:
            return None
        shape = (self.num_envs, self.task.state_low.size)
        array = np.array(states, dtype=np.float64)
        if array.shape not in (shape, shape[1:]):
            raise ValueError(
                f"options['state'] must have shape {shape} or {shape[1:]}, got {array.shape}"
            )
        array = np.broadcast_to(array, shape)
        self.task.checked_state(array[mask])
        return array

    def _checked_seeds(self, seed: object) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + i for i in range(self.num_envs)]
        seeds = [None if one is None else operator.index(one) for one in seed]  # type: ignore[attr-defined]
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"seed must be a whole number or {self.num_envs} of them, got {len(seeds)}"
            )
        return seeds

    def _checked_mask(self, mask: object) -> Mask:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (self.num_envs,) or not array.any():
            raise ValueError(
                f"options['reset_mask'] must be {self.num_envs} booleans, one of them True, "
                f"got {mask!r}"
            )
        if self._state is None and not array.all():
            raise ResetNeeded("the first reset must be of all environments, without a reset_mask")
        return array


def _at_least_one(name: str, value: int) -> int:
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return number


def _checked_mode(mode: Any) -> str:  # noqa: ANN401 (an enum that Gymnasium 0.29 does not have)
    known = autoreset_modes()
    if mode is None:
        return known[0]
    name = str(getattr(mode, "value", mode))
    if name not in known:
        raise ValueError(
            f"autoreset_mode must be one of {list(known)} with gymnasium {gym.__version__}, "
            f"got {mode!r}"
        )
    return name
