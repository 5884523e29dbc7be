"""Running whole episodes of a policy in many copies of an environment at once.

Episodes run in batches. Every copy is reset, and all copies step until each has finished its first
episode. Steps of a copy after that are discarded. Long and short episodes are therefore drawn with
the same probability, whereas taking the first k episodes that end would favour short ones. All
autoreset modes of Gymnasium are supported, including those of 0.29.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.files.schema import whole
from safeshield.rollouts.copies import (
    autoreset_mode,
    check_reward,
    check_step,
    copies,
)
from safeshield.rollouts.infos import (
    CONSTRAINT,
    COST,
    EXECUTED,
    Array,
    Infos,
    column_of,
    final_observations_key,
    step_column,
)
from safeshield.rollouts.policies import (
    BatchPolicy,
    as_batch_policy,
    executable_actions,
    start_wave,
)
from safeshield.rollouts.recorded import STEP_ARRAYS, Episode, recorded_episode
from safeshield.spaces.batches import Batch, copied, take
from safeshield.spaces.generic import Env, VectorEnv
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.schema import part_of

_LONG = 10_000
"""Steps after which an episode that has not ended is told."""
SEEDS = 2**31 - 2**24
"""Number of seeds from which the first one of a run is drawn; some are left for its episodes."""


@dataclass(frozen=True)
class VectorStep:
    """One step of all n environments, as `run_episodes` hands it to `on_step`."""

    wave: int
    """Number of the batch of episodes, counted from 0."""
    index: int
    """Number of the step in the batch, counted from 0."""
    active: npt.NDArray[np.bool_]
    """(n,) whether the step is recorded. The other environments have finished their episode, or
    are not needed."""
    observations: Array
    """(n, obs) observations that the policy saw, as rows of `spaces.rows`."""
    actions: Array
    """(n, act) actions that the environments were given, as rows."""
    rewards: Array
    """(n,) rewards of the step."""
    next_observations: Array
    """(n, obs) observations that the step reached, as rows. At the end of an episode they are the
    final observations, even where the environment has already reset itself."""
    terminated: npt.NDArray[np.bool_]
    """(n,) flags as the environments reported them."""
    truncated: npt.NDArray[np.bool_]
    """(n,) flags as the environments reported them."""
    infos: Mapping[str, Any]
    """Infos as the vector environment returned them."""


def run_episodes(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    *,
    on_step: Callable[[VectorStep], None] | None = None,
    reset_options: Mapping[str, Any] | None = None,
    num_envs: int | None = None,
    info_keys: Sequence[str] = (),
    step_limit: int = 100_000,
    observation_keys: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Episode]:
    """Run exactly `episodes` whole episodes and return them in order.

    Episode e is reset with the seed ``base + e``, where base is drawn from `seed`, or with
    ``seeds[e]``. For a policy that draws no noise, the data therefore do not depend on `num_envs`.
    The same seeds give the same data.

    Args:
        env: A Gymnasium environment (see `vectorise` for when copies of it run) or a VectorEnv.
        policy: A policy in any form that `as_batch_policy` takes.
        episodes: Number of episodes, at least 1.
        seed: Seed of starts and noise, at least 0.
        on_step: Function that is called after every step.
        reset_options: The `options` of every reset.
        num_envs: Number of environments that step together; by default up to 256 or 8 (see
            `vectorise`).
        info_keys: Infos to record at every step, such as ``("shield/intervened",)``.
        step_limit: Greatest length of an episode in steps. A longer episode is an error, and one of
            more than 10,000 steps is told by a warning.
        observation_keys: Entries of a Dict observation to record; all by default.
        seeds: Seeds of the resets, one for each episode; by default they follow from `seed`.

    Raises:
        ValueError: An argument is wrong; the environment returns six values from a step, returns a
            reward that is not finite, reports a key at some steps only or does not end; or the
            policy returns NaN or a wrong shape.
        TypeError: `spaces.rows` does not support a space.
    """
    episodes, seed = whole("episodes", episodes, least=1), whole("seed", seed, least=0)
    envs = copies(env, num_envs, most=episodes, freeze=True)
    try:
        observation_codec = flat_observations(
            part_of(envs.single_observation_space, observation_keys)
        )
        action_codec = flat_actions(envs.single_action_space)
        starts, noise = np.random.SeedSequence(seed).spawn(2)
        base = int(np.random.default_rng(starts).integers(SEEDS))
        rng = np.random.default_rng(noise)
        acting = as_batch_policy(policy, action_codec.space)
        runner = _Runner(
            envs,
            observation_codec,
            action_codec,
            acting,
            rng,
            on_step,
            None if reset_options is None else dict(reset_options),
            tuple(info_keys),
            step_limit,
        )
        done: list[Episode] = []
        while len(done) < episodes:
            wanted = min(envs.num_envs, episodes - len(done))
            if seeds is None:
                done += runner.episode_batch(base + len(done), wanted)
            else:
                done += runner.episode_batch(seeds[len(done) : len(done) + wanted], wanted)
        return done
    finally:
        if envs is not env:
            envs.close()


@dataclass
class _Runner:
    """Runs batches of episodes; its fields are the same for all batches."""

    envs: VectorEnv
    observation_codec: SpaceCodec
    action_codec: SpaceCodec
    policy: BatchPolicy
    rng: np.random.Generator
    on_step: Callable[[VectorStep], None] | None
    options: dict[str, Any] | None
    info_keys: tuple[str, ...]
    step_limit: int
    batches: int = 0
    mode: str = field(init=False)

    def __post_init__(self) -> None:
        self.mode = autoreset_mode(self.envs)

    def episode_batch(self, seed: int | Sequence[int], wanted: int) -> list[Episode]:
        """Run a batch and return one episode of each of the first `wanted` environments."""
        envs, count = self.envs, self.envs.num_envs
        start_wave(self.policy, count)
        options = None if self.options is None else dict(self.options)
        if isinstance(seed, int):
            own = list(range(seed, seed + count))
            observations, infos = envs.reset(seed=seed, options=options)
        else:
            # Environments beyond the wanted ones start as the last of these does.
            own = [int(seed[min(i, wanted - 1)]) for i in range(count)]
            # Gymnasium 0.29 annotates one number only, and takes a list as well.
            own_seeds: Any = own
            observations, infos = envs.reset(seed=own_seeds, options=options)
        record = _BatchRecord(infos, count, self.info_keys)
        active = np.arange(count) < wanted
        index = 0
        while active.any():
            if index == _LONG < self.step_limit:
                warnings.warn(
                    f"an episode has not ended after {index} steps; the run ends with an error "
                    f"after step_limit = {self.step_limit} steps. If the environment has no ends, "
                    "wrap it in gymnasium.wrappers.TimeLimit",
                    stacklevel=4,
                )
            if index == self.step_limit:
                raise ValueError(
                    f"an episode has not ended after step_limit = {index} steps; wrap the "
                    "environment in gymnasium.wrappers.TimeLimit, or raise step_limit"
                )
            observations = copied(observations)
            # The policy and the environments get copies, because they may write into their arrays
            # and the log must hold the original values.
            proposed = self.policy(copied(observations), self.rng)
            try:
                actions = executable_actions(proposed, self.action_codec.space, count)
            except ValueError as error:
                self._check_observations(observations, own, error)
                raise
            # What is logged is what is executed, whole numbers where these are the actions.
            actions = self._in_dtype(actions)
            result = envs.step(np.array(actions))
            check_step(result)
            returned, rewards, terminated, truncated, infos = result
            for i in np.flatnonzero(active & ~np.isfinite(np.asarray(rewards, np.float64))):
                check_reward(rewards[i], index, f"the episode that was reset with seed {own[i]}")
            ended = np.asarray(terminated) | np.asarray(truncated)
            reached, replaced = self._reached(returned, ended, infos)
            step = VectorStep(
                self.batches, index, active, self.observation_codec.flatten(observations)[0],
                self.action_codec.flatten(actions)[0], np.array(rewards), reached,
                np.array(terminated), np.array(truncated), infos,
            )  # fmt: skip
            record.add(step, replaced)
            if self.on_step is not None:
                self.on_step(step)
            active = active & ~ended
            index += 1
            observations = returned
            if self.mode == "disabled" and ended.any() and active.any():
                observations, _ = envs.reset(options={**(options or {}), "reset_mask": ended})
        self.batches += 1
        return [record.episode(i) for i in range(wanted)]

    def _check_observations(self, observations: Batch, seeds: list[int], error: Exception) -> None:
        """Raise ValueError where a policy failed because the environment returned NaN."""
        rows = self.observation_codec.flatten(observations)[0]
        bad = np.flatnonzero(np.isnan(rows).any(axis=1))
        if len(bad):
            raise ValueError(
                "the environment returned NaN in an observation of the episode that was reset "
                f"with seed {seeds[bad[0]]}: {rows[bad[0]]}; given this, {error}"
            ) from error

    def _in_dtype(self, actions: Array) -> Array:
        space = self.action_codec.space
        if not isinstance(space, gym.spaces.Box):
            return actions
        # A float32 action at a float64 bound may lie outside the bound by a rounding error.
        inside: Array = np.clip(actions.astype(space.dtype), space.low, space.high)
        return inside

    def _reached(
        self, returned: Batch, ended: npt.NDArray[np.bool_], infos: Mapping[str, Any]
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the rows that the step reached, and where `returned` is of the next episode."""
        reached = np.array(self.observation_codec.flatten(returned, "observation")[0])
        key = final_observations_key(infos)
        if key is None:
            if self.mode == "samestep" and ended.any():
                raise ValueError(
                    "a vector environment that resets in the same step must put the last "
                    "observation into infos['final_obs'] (gymnasium 0.29: 'final_observation')"
                )
            return reached, np.zeros_like(ended)
        replaced = np.array(infos.get(f"_{key}", ended), dtype=np.bool_)
        for i in np.flatnonzero(replaced):
            last = take(infos[key], int(i))
            reached[i] = self.observation_codec.flatten(last, "observation")[0][0]
        return reached, replaced


class _BatchRecord:
    """The recorded steps of one batch, from which the episodes of its environments are made."""

    def __init__(self, reset_infos: Infos, count: int, info_keys: tuple[str, ...]) -> None:
        self._info_keys = info_keys
        keys = (COST, CONSTRAINT, EXECUTED, *info_keys)
        self._reset = {key: column_of(reset_infos, key, count) for key in keys}
        self._columns: dict[str, list[Sequence[Any] | Array]] = {key: [] for key in keys}
        self._steps: list[VectorStep] = []
        # Made once for all environments, because the entries of many are slow to take one by one.
        self._stacked: dict[str, Array] = {}
        self._tables: dict[str, Array | None] = {}
        self._lengths = np.zeros(count, dtype=np.int64)

    def add(self, step: VectorStep, replaced: npt.NDArray[np.bool_]) -> None:
        for key, column in self._columns.items():
            column.append(step_column(step.infos, key, replaced))
        self._steps.append(step)
        self._lengths += step.active

    def episode(self, i: int) -> Episode:
        """Return the episode of environment i."""
        length = int(self._lengths[i])
        return recorded_episode(
            {name: np.array(rows[:length, i]) for name, rows in self._rows().items()},
            {key: column[i] for key, column in self._reset.items()},
            {key: self._infos(key, length, i) for key in self._columns},
            self._info_keys,
        )

    def _rows(self) -> dict[str, Array]:
        """Return the arrays (steps, n, ...) of all environments, by the names in an `Episode`."""
        if not self._stacked:
            self._stacked = {
                name: np.stack([getattr(step, name) for step in self._steps])
                for name in STEP_ARRAYS
            }
        return self._stacked

    def _infos(self, key: str, length: int, i: int) -> Array | list[Any]:
        """Return a key's values after the steps of environment i, None where not reported."""
        if key not in self._tables:
            self._tables[key] = _table(self._columns[key])
        table = self._tables[key]
        if table is not None:
            return np.array(table[:length, i])
        return [column[i] for column in self._columns[key][:length]]


def _table(columns: Sequence[Sequence[Any] | Array]) -> Array | None:
    """Return the columns of all steps as one array (steps, n, ...), None where that is no array."""
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    kinds = {(array.dtype, array.shape) for array in arrays}
    return np.stack(arrays) if len(arrays) == len(columns) and len(kinds) == 1 else None
