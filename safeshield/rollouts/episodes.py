"""Running whole episodes of a policy in many copies of an environment at once.

Episodes run in waves: every copy is reset, and steps until each has finished its first episode;
what a copy does after that is thrown away. Long and short episodes are thus drawn alike, whereas
taking the first k episodes to end would favour short ones. The end of an episode is read
alike in all of Gymnasium's autoreset modes, those of 0.29 included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.copies import (
    Env,
    VectorEnv,
    autoreset_mode,
    check_reward,
    check_step,
    copies,
)
from safeshield.rollouts.infos import (
    CONSTRAINT,
    COST,
    EXECUTED,
    INTERVENED,
    Column,
    column_of,
    final_observations_key,
    step_column,
)
from safeshield.rollouts.policies import BatchPolicy, as_batch_policy, executable_actions
from safeshield.spaces.batches import Batch, copied, take
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.schema import part_of

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Episode:
    """One episode of L steps; row t is the step from s[t] to s[t+1].

    Attributes:
        observations: (L, obs) float32, rows of `spaces.rows`, as the next three are.
        actions: (L, act) float32: ``info["action_executed"]`` where a shield or wrapper reports
            it, else what the policy proposed, clipped.
        rewards: (L,) float32.
        next_observations: (L, obs) float32; the last is where the episode ended.
        terminated: (L,) bool, only the last can be set.
        truncated: (L,) bool, likewise; false where terminated is set too.
        costs: (L,) float32 ``info["cost"]`` after each step, or None.
        initial_cost: ``info["cost"]`` at reset, or None.
        constraints: (L,) float32 ``info["constraint"]`` of s[t], or None.
        next_constraints: (L,) float32 of s[t+1], or None.
        info: for each of `info_keys` its values after each step, (L, ...).
    """

    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    next_observations: npt.NDArray[np.float32]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    costs: npt.NDArray[np.float32] | None
    initial_cost: float | None
    constraints: npt.NDArray[np.float32] | None
    next_constraints: npt.NDArray[np.float32] | None
    info: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(self.rewards.sum(dtype=np.float64))

    @property
    def total_cost(self) -> float:
        """Undiscounted sum of the costs after each step.

        Raises:
            ValueError: the environment reports no cost.
        """
        if self.costs is None:
            raise ValueError("the environment reports no info['cost'] at its steps")
        return float(self.costs.sum(dtype=np.float64))

    @property
    def cost_or_violations(self) -> float:
        """Summed costs; where none is reported, the number of steps in violation.

        Raises:
            ValueError: the environment reports neither costs nor constraints.
        """
        if self.costs is None and self.next_constraints is not None:
            return float(np.count_nonzero(self.next_constraints > 0))
        return self.total_cost

    @property
    def intervened(self) -> npt.NDArray[np.bool_] | None:
        """(L,) whether a shield replaced the step's action; None where no shield says so."""
        replaced = self.info.get(INTERVENED)
        return None if replaced is None else np.asarray(replaced, np.bool_)

    @property
    def violated(self) -> bool:
        """Whether h > 0, or cost > 0 where no constraint is reported, at any state.

        Raises:
            ValueError: the environment reports neither.
        """
        if self.constraints is not None and self.next_constraints is not None:
            # Not "any above 0": a label that is not a number must not count as safe.
            return not bool(self.constraints[0] <= 0 and (self.next_constraints <= 0).all())
        if self.costs is None:
            raise ValueError("the environment reports neither info['constraint'] nor info['cost']")
        return not bool((self.initial_cost or 0.0) <= 0 and (self.costs <= 0).all())


def intervention_rate(episodes: Sequence[Episode]) -> float | None:
    """Return the share of all steps in which a shield replaced the action; None without one."""
    replaced = [one.intervened for one in episodes if one.intervened is not None]
    return float(np.concatenate(replaced).mean()) if replaced else None


@dataclass(frozen=True)
class VectorStep:
    """One step of all n environments of a wave, as `run_episodes` hands it to `on_step`."""

    wave: int
    """Number of the wave, from 0."""
    index: int
    """Number of the step in the wave, from 0."""
    active: npt.NDArray[np.bool_]
    """(n,) whether the step is recorded; the others are over, or more than was asked for."""
    observations: Array
    """(n, obs) what the policy saw, as rows of `spaces.rows`."""
    actions: Array
    """(n, act) what the environments were given, as rows."""
    rewards: Array
    """(n,)."""
    next_observations: Array
    """(n, obs) rows: where the step led to, also where the environment has reset itself since."""
    terminated: npt.NDArray[np.bool_]
    """(n,) as reported."""
    truncated: npt.NDArray[np.bool_]
    """(n,) as reported."""
    infos: Mapping[str, Any]
    """As the vector environment returned them."""


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
) -> list[Episode]:
    """Run exactly this many whole episodes and return them in order.

    Episode e is reset with the seed ``base + e``, base drawn from `seed`: for a policy that draws
    no noise the data does not depend on `num_envs`. The same seed gives the same data.

    Args:
        env: a Gymnasium environment (`vectorise` says when copies of it run) or a VectorEnv.
        policy: anything that `as_batch_policy` takes.
        episodes: how many, at least 1.
        seed: at least 0.
        on_step: called after every step.
        reset_options: the `options` of every reset.
        num_envs: how many environments step together; by default up to 256 or 8 (see `vectorise`).
        info_keys: infos to record at every step, such as ``("shield/intervened",)``.
        step_limit: longest episode, in steps, before giving up.
        observation_keys: entries of a Dict observation to record; all by default.

    Raises:
        ValueError: a wrong argument; the environment steps by 6-tuples, returns a reward that is
            not finite, reports a key at some steps only or never ends; the policy returns NaN or a
            wrong shape.
        TypeError: a space that `spaces.rows` does not support.
    """
    if episodes < 1 or seed < 0:
        raise ValueError(
            f"episodes must be at least 1 and seed at least 0, got {episodes} and {seed}"
        )
    envs = copies(env, num_envs, most=episodes, freeze=True)
    try:
        seen = flat_observations(part_of(envs.single_observation_space, observation_keys))
        played = flat_actions(envs.single_action_space)
        seeds, noise = np.random.SeedSequence(seed).spawn(2)
        base = int(np.random.default_rng(seeds).integers(2**31 - 2**24))
        rng = np.random.default_rng(noise)
        acting = as_batch_policy(policy, played.space)
        runner = _Runner(
            envs, seen, played, acting, rng, on_step, reset_options, tuple(info_keys), step_limit
        )
        done: list[Episode] = []
        while len(done) < episodes:
            wanted = min(envs.num_envs, episodes - len(done))
            done += runner.wave(base + len(done), wanted)
        return done
    finally:
        if envs is not env:
            envs.close()


class _Runner:
    """What stays the same from wave to wave."""

    def __init__(
        self,
        envs: VectorEnv,
        seen: SpaceCodec,
        played: SpaceCodec,
        policy: BatchPolicy,
        rng: np.random.Generator,
        on_step: Callable[[VectorStep], None] | None,
        reset_options: Mapping[str, Any] | None,
        info_keys: tuple[str, ...],
        step_limit: int,
    ) -> None:
        self._envs = envs
        self._seen = seen
        self._played = played
        self._mode = autoreset_mode(envs)
        self._policy = policy
        self._rng = rng
        self._on_step = on_step
        self._options = None if reset_options is None else dict(reset_options)
        self._info_keys = info_keys
        self._step_limit = step_limit
        self._waves = 0

    def wave(self, seed: int, wanted: int) -> list[Episode]:
        """One episode of each of the first `wanted` environments."""
        envs, count = self._envs, self._envs.num_envs
        start_wave = getattr(self._policy, "start_wave", None)
        if callable(start_wave):
            start_wave(count)
        options = None if self._options is None else dict(self._options)
        observations, infos = envs.reset(seed=seed, options=options)
        record = _WaveRecord(infos, count, self._info_keys)
        active = np.arange(count) < wanted
        index = 0
        while active.any():
            if index == self._step_limit:
                raise ValueError(
                    f"an episode has not ended after step_limit = {index} steps; wrap the "
                    "environment in gymnasium.wrappers.TimeLimit, or raise step_limit"
                )
            observations = copied(observations)
            # Copies go to the policy and to the environments, which may write into them: what is
            # logged is what was there before.
            proposed = self._policy(copied(observations), self._rng)
            actions = executable_actions(proposed, self._played.space, count)
            result = envs.step(self._in_dtype(np.array(actions)))
            check_step(result)
            returned, rewards, terminated, truncated, infos = result
            for i in np.flatnonzero(active & ~np.isfinite(np.asarray(rewards, np.float64))):
                check_reward(rewards[i], index, f"the episode that was reset with seed {seed + i}")
            ended = np.asarray(terminated) | np.asarray(truncated)
            reached, replaced = self._reached(returned, ended, infos)
            step = VectorStep(
                self._waves, index, active, self._seen.flatten(observations)[0],
                self._played.flatten(actions)[0], np.array(rewards), reached,
                np.array(terminated), np.array(truncated), infos,
            )  # fmt: skip
            record.add(step, replaced)
            if self._on_step is not None:
                self._on_step(step)
            active = active & ~ended
            index += 1
            observations = returned
            if self._mode == "disabled" and ended.any() and active.any():
                observations, _ = envs.reset(options={**(options or {}), "reset_mask": ended})
        self._waves += 1
        return [record.episode(i) for i in range(wanted)]

    def _in_dtype(self, actions: Array) -> Array:
        space = self._played.space
        if not isinstance(space, gym.spaces.Box):
            return actions
        # A float32 beside a float64 bound may lie a rounding error outside it.
        inside: Array = np.clip(actions.astype(space.dtype), space.low, space.high)
        return inside

    def _reached(
        self, returned: Batch, ended: npt.NDArray[np.bool_], infos: Mapping[str, Any]
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Rows after the step, and where `returned` is already of the next episode."""
        reached = np.array(self._seen.flatten(returned, "observation")[0])
        key = final_observations_key(infos)
        if key is None:
            if self._mode == "samestep" and ended.any():
                raise ValueError(
                    "a vector environment that resets in the same step must put the last "
                    "observation into infos['final_obs'] (gymnasium 0.29: 'final_observation')"
                )
            return reached, np.zeros_like(ended)
        replaced = np.array(infos.get(f"_{key}", ended), dtype=np.bool_)
        for i in np.flatnonzero(replaced):
            reached[i] = self._seen.flatten(take(infos[key], int(i)), "observation")[0][0]
        return reached, replaced


class _WaveRecord:
    """The steps of one wave, each of all environments, to be cut into episodes."""

    def __init__(
        self, reset_infos: Mapping[str, Any], count: int, info_keys: tuple[str, ...]
    ) -> None:
        self._count = count
        self._info_keys = info_keys
        keys = (COST, CONSTRAINT, EXECUTED, *info_keys)
        self._reset = {key: column_of(reset_infos, key, count) for key in keys}
        self._columns: dict[str, list[Column | None]] = {key: [] for key in keys}
        self._steps: list[VectorStep] = []
        self._lengths = np.zeros(count, dtype=np.int64)

    def add(self, step: VectorStep, replaced: npt.NDArray[np.bool_]) -> None:
        for key, column in self._columns.items():
            column.append(step_column(step.infos, key, replaced))
        self._steps.append(step)
        self._lengths += step.active

    def episode(self, i: int) -> Episode:
        """The episode of environment i."""
        steps = self._steps[: self._lengths[i]]
        rows = {
            name: np.stack([getattr(step, name)[i] for step in steps])
            for name in ("observations", "actions", "rewards", "next_observations")
        }
        floats = {name: array.astype(np.float32) for name, array in rows.items()}
        for t, executed in enumerate(self._values(EXECUTED, i)):
            if executed is not None:
                floats["actions"][t] = np.ravel(executed)
        terminated = np.array([bool(step.terminated[i]) for step in steps])
        truncated = np.array([bool(step.truncated[i]) for step in steps])
        costs = self._complete(COST, i)
        after = self._complete(CONSTRAINT, i)
        first = self._at_reset(CONSTRAINT, i)
        if (after is None) != (first is None):
            raise ValueError(
                "info['constraint'] must be reported at reset and at every step (h of the state "
                f"just reached), but is missing at {'every step' if after is None else 'reset'}; "
                "add it there, or leave it out and report info['cost']"
            )
        now = None
        if after is not None and first is not None:
            now = np.concatenate([[first], after[:-1]]).astype(np.float32)
        info = {}
        for key in self._info_keys:
            values = self._complete(key, i, scalar=False)
            if values is None:
                raise ValueError(f"info_keys must be reported at every step, but {key!r} is not")
            info[key] = values
        return Episode(
            **floats,
            terminated=terminated,
            truncated=truncated & ~terminated,
            costs=None if costs is None else costs.astype(np.float32),
            initial_cost=self._at_reset(COST, i),
            constraints=now,
            next_constraints=None if after is None else after.astype(np.float32),
            info=info,
        )

    def _values(self, key: str, i: int) -> list[Any]:
        columns = self._columns[key][: self._lengths[i]]
        return [
            column.values[i] if column is not None and column.present[i] else None
            for column in columns
        ]

    def _complete(self, key: str, i: int, *, scalar: bool = True) -> Array | None:
        """The key at every step of environment i, or None where it is at none."""
        values = self._values(key, i)
        missing = [t for t, value in enumerate(values) if value is None]
        if len(missing) == len(values):
            return None
        if missing:
            raise ValueError(
                f"info[{key!r}] must be reported at every step, but it is missing at step "
                f"{missing[0]} of an episode"
            )
        array = np.stack(values)
        return _one_number_each(array, key) if scalar else array

    def _at_reset(self, key: str, i: int) -> float | None:
        column = self._reset[key]
        if column is None or not column.present[i]:
            return None
        return float(_one_number_each(column.values[i : i + 1], key)[0])


def _one_number_each(array: Array, key: str) -> Array:
    if array.size != len(array):
        raise ValueError(
            f"info[{key!r}] must be one number, got shape {array.shape[1:]}; with several "
            "constraints report the largest"
        )
    numbers = array.reshape(len(array))
    bad = ~np.isfinite(numbers.astype(np.float64))
    if key == COST:
        bad |= numbers < 0
    if bad.any():
        step = int(np.argmax(bad))
        rule = "finite and at least 0 (0 is safe)" if key == COST else "finite"
        raise ValueError(f"info[{key!r}] must be {rule}, got {numbers[step]} at entry {step}")
    return numbers
