"""Running whole episodes of a policy in many copies of an environment at once.

Episodes run in waves: every copy is reset, and steps until each has finished its first episode;
what a copy does after that is thrown away. Long and short episodes are thus drawn alike, whereas
taking the first k episodes to end would favour short ones. The end of an episode is read
alike in all of Gymnasium's autoreset modes, those of 0.29 included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.spaces import flat_box

Array = npt.NDArray[Any]
Env = gym.Env[Any, Any]

if TYPE_CHECKING:
    VectorEnv = gym.vector.VectorEnv[Any, Any, Any]
    _Wrapper = gym.Wrapper[Any, Any, Any, Any]
else:
    VectorEnv = gym.vector.VectorEnv
    _Wrapper = gym.Wrapper

_BEFORE_1_0 = int(gym.__version__.split(".")[0]) < 1
_MAX_NATIVE_ENVS = 256
_MAX_COPIED_ENVS = 8
# Rebuilt from their arguments these would start with empty statistics, not with the trained ones.
_STATEFUL_WRAPPERS = ("NormalizeObservation", "NormalizeReward")
_MANY_VALUES = "too many values to unpack"


class BatchPolicy(Protocol):
    """A policy that acts for n environments at once.

    A method ``start_wave(num_envs)``, where there is one, is called before each wave of episodes:
    the place to forget a recurrent state. `batch_policy` marks a function as one of these.
    """

    batched: bool
    """True: tells a batch policy from a function of one observation."""

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        """Map observations (n, obs) to actions (n, act), drawing noise from `rng` alone."""
        ...


def batch_policy(function: Callable[[Array, np.random.Generator], npt.ArrayLike]) -> BatchPolicy:
    """Mark ``function(observations, rng) -> actions`` as a batch policy; a decorator.

    >>> @batch_policy
    ... def still(observations, rng):
    ...     return np.zeros((len(observations), 2))
    >>> still.batched
    True
    """

    @functools.wraps(function)
    def policy(observations: Array, rng: np.random.Generator, /) -> Array:
        return np.asarray(function(observations, rng))

    marked = cast(BatchPolicy, policy)
    marked.batched = True
    return marked


def as_batch_policy(
    policy: object, action_space: gym.spaces.Box, *, deterministic: bool = True
) -> BatchPolicy:
    """Make a batch policy of what users have.

    In this order, `policy` may be:

    - ``"random"``: uniform in the action box;
    - an object with ``act_batch(observations, rng) -> actions``;
    - a callable with ``batched = True`` (see `batch_policy`): used as it is;
    - an object with Stable-Baselines3's ``predict``: called with the whole batch, recurrent state
      and `deterministic` passed through. Where it draws noise, it is from torch's own generator;
    - any other callable: ``policy(observation) -> action``, one observation at a time.

    Raises:
        ValueError: an unknown name, or "random" with an unbounded box.
        TypeError: none of the above.

    >>> box = gym.spaces.Box(-1.0, 1.0, (1,))
    >>> policy = as_batch_policy(lambda observation: -observation[:1], box)
    >>> policy(np.array([[0.5, 0.0], [0.25, 0.0]]), np.random.default_rng(0)).tolist()
    [[-0.5], [-0.25]]
    """
    if isinstance(policy, str):
        if policy != "random":
            raise ValueError(f"the only policy with a name is 'random', got {policy!r}")
        return _random_policy(action_space)
    act_batch = getattr(policy, "act_batch", None)
    if callable(act_batch):
        return batch_policy(lambda observations, rng: act_batch(observations, rng))
    if callable(policy) and getattr(policy, "batched", False):
        return cast(BatchPolicy, policy)
    if callable(getattr(policy, "predict", None)):
        return _PredictPolicy(policy, deterministic)
    if callable(policy):
        return batch_policy(
            lambda observations, _: np.stack([np.asarray(policy(one)) for one in observations])
        )
    raise TypeError(
        "policy must be 'random', have act_batch or predict, or be a function of one observation; "
        f"got {type(policy).__name__}"
    )


def executable_actions(actions: npt.ArrayLike, space: gym.spaces.Box, count: int) -> Array:
    """Return actions (count, act) as float32 inside the box, clipped as Stable-Baselines3 does.

    Raises:
        ValueError: another shape, or NaN.

    >>> executable_actions([[2.0], [-0.5]], gym.spaces.Box(-1.0, 1.0, (1,)), 2).tolist()
    [[1.0], [-0.5]]
    """
    array = np.asarray(actions, dtype=np.float32)
    if array.shape != (count, *space.shape):
        raise ValueError(
            f"the policy must return actions of shape {(count, *space.shape)}, got {array.shape}; "
            "a policy that takes a whole batch needs batched = True (see batch_policy)"
        )
    if np.isnan(array).any():
        row = int(np.argmax(np.isnan(array).any(axis=1)))
        raise ValueError(f"the policy returned NaN for environment {row}: {array[row]}")
    return np.clip(array, space.low.astype(np.float32), space.high.astype(np.float32))


@dataclass(frozen=True)
class Episode:
    """One episode of L steps; row t is the step from s[t] to s[t+1].

    Attributes:
        observations: (L, obs) float32.
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
    """(n, obs) what the policy saw."""
    actions: npt.NDArray[np.float32]
    """(n, act) what the environments were given."""
    rewards: Array
    """(n,)."""
    next_observations: Array
    """(n, obs) where the step led to, also where the environment has reset itself since."""
    terminated: npt.NDArray[np.bool_]
    """(n,) as reported."""
    truncated: npt.NDArray[np.bool_]
    """(n,) as reported."""
    infos: Mapping[str, Any]
    """As the vector environment returned them."""


def is_vector_env(env: object) -> bool:
    """Whether `env` is a vector environment, of either of Gymnasium 0.29's two kinds or of 1.x."""
    # unwrapped, because a single wrapper of 0.29 warns when it passes such a question on.
    inner = getattr(env, "unwrapped", env)
    return hasattr(inner, "num_envs") and hasattr(inner, "single_action_space")


def vectorise(env: Env | VectorEnv, num_envs: int | None = None) -> VectorEnv:
    """Return a vector environment of copies of `env`; a VectorEnv is returned as it is.

    An `env` that `gymnasium.make` can rebuild is copied: through its own vector entry point where
    it has one and no wrapper was added, else in a `SyncVectorEnv`. Changes made by hand after
    `make` are not copied. One environment alone (`num_envs` = 1; no spec; a render mode; a wrapper
    that cannot be rebuilt, or that holds statistics) is `env` itself, which closing the result
    leaves open.

    Args:
        env: what to copy.
        num_envs: how many; by default 256 with a vector entry point and 8 without one.

    Raises:
        ValueError: `num_envs` is below 1, differs from that of a VectorEnv, or is above 1 where
            `env` cannot be copied.
    """
    return _vectorise(env, num_envs, most=None, freeze=False)


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

    Raises:
        ValueError: a wrong argument; the environment steps by 6-tuples, reports a key at some
            steps only or never ends; the policy returns NaN or a wrong shape.
        TypeError: a space is not a Box of shape (width,).
    """
    if episodes < 1 or seed < 0:
        raise ValueError(
            f"episodes must be at least 1 and seed at least 0, got {episodes} and {seed}"
        )
    envs = _vectorise(env, num_envs, most=episodes, freeze=True)
    try:
        flat_box(envs.single_observation_space, "observation_space")
        action_space = flat_box(envs.single_action_space, "action_space")
        seeds, noise = np.random.SeedSequence(seed).spawn(2)
        base = int(np.random.default_rng(seeds).integers(2**31 - 2**24))
        rng = np.random.default_rng(noise)
        acting = as_batch_policy(policy, action_space)
        runner = _Runner(envs, acting, rng, on_step, reset_options, tuple(info_keys), step_limit)
        done: list[Episode] = []
        while len(done) < episodes:
            wanted = min(envs.num_envs, episodes - len(done))
            done += runner.wave(base + len(done), wanted)
        return done
    finally:
        if envs is not env:
            envs.close()


def _random_policy(space: gym.spaces.Box) -> BatchPolicy:
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(f"the policy 'random' needs a bounded action space, got {space}")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return batch_policy(
        lambda observations, rng: rng.uniform(low, high, (len(observations), *space.shape))
    )


class _PredictPolicy:
    batched = True

    def __init__(self, model: Any, deterministic: bool) -> None:  # noqa: ANN401
        self._model = model
        self._deterministic = deterministic
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        self._state: Any = None
        self._starts = np.ones(num_envs, dtype=np.bool_)

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        if len(self._starts) != len(observations):
            self.start_wave(len(observations))
        actions, self._state = self._model.predict(
            observations,
            state=self._state,
            episode_start=self._starts,
            deterministic=self._deterministic,
        )
        self._starts = np.zeros(len(observations), dtype=np.bool_)
        return np.asarray(actions)


def _vectorise(
    env: Env | VectorEnv, num_envs: int | None, *, most: int | None, freeze: bool
) -> VectorEnv:
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if is_vector_env(env):
        vector = cast(VectorEnv, env)
        if num_envs not in (None, vector.num_envs):
            raise ValueError(
                f"num_envs must be left out or {vector.num_envs}, as in env; got {num_envs}"
            )
        return vector
    single = cast(Env, env)
    spec = _spec_to_copy(single)
    native = spec is not None and spec.vector_entry_point and not spec.additional_wrappers
    default = 1 if spec is None else _MAX_NATIVE_ENVS if native else _MAX_COPIED_ENVS
    count = default if num_envs is None else num_envs
    count = count if most is None else min(count, most)
    if count == 1:
        return gym.vector.SyncVectorEnv([lambda: _Member(single, owned=False, freeze=freeze)])
    if spec is None:
        raise ValueError(
            f"num_envs must be 1 for {single}, which gymnasium.make cannot rebuild from its spec; "
            "pass a gymnasium.vector.SyncVectorEnv of your own"
        )
    if native:
        return _make_native(spec, count)
    # disable_env_checker: what it would say of the copies it has said of the environment.
    return gym.vector.SyncVectorEnv(
        [
            lambda: _Member(gym.make(spec, disable_env_checker=True), owned=True, freeze=freeze)
            for _ in range(count)
        ]
    )


def _spec_to_copy(env: Env) -> gym.envs.registration.EnvSpec | None:
    try:
        spec = env.spec
    except Exception:
        # Gymnasium 0.29 deep-copies the arguments of wrappers here, and some cannot be copied.
        return None
    if not isinstance(spec, gym.envs.registration.EnvSpec) or env.render_mode is not None:
        return None
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None or wrapper.name in _STATEFUL_WRAPPERS:
            return None
    return spec


def _make_native(spec: gym.envs.registration.EnvSpec, count: int) -> VectorEnv:
    if _BEFORE_1_0:
        # 0.29 hands a custom vector environment its vector_kwargs alone.
        return gym.make_vec(
            spec, num_envs=count, vectorization_mode="custom", vector_kwargs=dict(spec.kwargs)
        )
    return gym.make_vec(spec, num_envs=count, vectorization_mode="vector_entry_point")


class _Member(_Wrapper):
    """One environment of a SyncVectorEnv.

    With `freeze` it stands still once an episode is over, until a reset with a seed: the steps
    that a wave throws away cost nothing. Costs are made floats, because Gymnasium gives the column
    of all environments the type of the first one's value, and 0.5 beside the integer 0 is lost.
    """

    def __init__(self, env: Env, *, owned: bool, freeze: bool) -> None:
        super().__init__(env)
        self._owned = owned
        self._freeze = freeze
        self._last: object = None
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if self._over and seed is None:
            return self._last, {}
        self._over = False
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, _float_labels(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        if self._over:
            return self._last, 0.0, False, False, {}
        try:
            result = self.env.step(action)
        except ValueError as error:
            if _MANY_VALUES in str(error):
                raise _step_error("more than 5") from error
            raise
        _check_step(result)
        observation, reward, terminated, truncated, info = result
        if self._freeze and (terminated or truncated):
            self._over, self._last = True, observation
        return observation, float(reward), terminated, truncated, _float_labels(info)

    def close(self) -> None:
        if self._owned:
            super().close()


def _float_labels(info: Mapping[str, Any]) -> dict[str, Any]:
    labels = {
        key: float(np.reshape(info[key], ()))
        for key in ("cost", "constraint")
        if info.get(key) is not None and np.size(info[key]) == 1
    }
    return {**info, **labels}


def _check_step(result: Sequence[object]) -> None:
    if len(result) != 5:
        raise _step_error(str(len(result)))


def _step_error(count: str) -> ValueError:
    return ValueError(
        "env.step must return (observation, reward, terminated, truncated, info), got "
        f"{count} values; for Safety-Gymnasium's native ids, which return the cost as a sixth, use "
        "the Gymnasium ones (gymnasium.make('SafetyPointGoal1Gymnasium-v0')) or a wrapper that "
        "puts the cost into info['cost']"
    )


def _autoreset_mode(envs: VectorEnv) -> str:
    """One of "nextstep", "samestep" and "disabled"."""
    mode = (envs.metadata or {}).get("autoreset_mode")
    if mode is None:
        return "samestep" if _BEFORE_1_0 else "nextstep"
    return str(getattr(mode, "value", mode)).replace("_", "").lower()


@dataclass
class _Column:
    """One key of the infos of all environments: values (n, ...) and where there is one (n,)."""

    values: Array
    present: npt.NDArray[np.bool_]


def _column(infos: Mapping[str, Any] | Array, key: str, count: int) -> _Column | None:
    if isinstance(infos, np.ndarray):
        # Gymnasium 0.29's final_info: an array of dictionaries and None.
        rows = [None if one is None else one.get(key) for one in infos]
        return _column_of_rows(rows)
    if key not in infos:
        return None
    values = np.asarray(infos[key])
    present = np.array(infos.get(f"_{key}", np.ones(count)), dtype=np.bool_)
    if values.dtype != object:
        return _Column(values.copy(), present)
    return _column_of_rows([values[i] if present[i] else None for i in range(count)])


def _column_of_rows(rows: Sequence[object]) -> _Column | None:
    present = np.array([row is not None for row in rows])
    if not present.any():
        return None
    first = np.asarray(next(row for row in rows if row is not None))
    values = np.zeros((len(rows), *first.shape), np.result_type(first.dtype, np.float32))
    for i, row in enumerate(rows):
        if row is not None:
            values[i] = row
    return _Column(values, present)


def _step_column(
    infos: Mapping[str, Any], key: str, replaced: npt.NDArray[np.bool_]
) -> _Column | None:
    """A key as it was after the step: from final_info where the environment has reset itself."""
    count = len(replaced)
    column = _column(infos, key, count)
    if not replaced.any():
        return column
    final = _column(infos.get("final_info", {}), key, count)
    if column is None:
        column = final
    if column is None:
        return None
    column.present[replaced] = False if final is None else final.present[replaced]
    if final is not None:
        column.values[replaced] = final.values[replaced]
    return column


class _Runner:
    """What stays the same from wave to wave."""

    def __init__(
        self,
        envs: VectorEnv,
        policy: BatchPolicy,
        rng: np.random.Generator,
        on_step: Callable[[VectorStep], None] | None,
        reset_options: Mapping[str, Any] | None,
        info_keys: tuple[str, ...],
        step_limit: int,
    ) -> None:
        self._envs = envs
        self._space = flat_box(envs.single_action_space, "action_space")
        self._mode = _autoreset_mode(envs)
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
            observations = np.array(observations)
            actions = executable_actions(self._policy(observations, self._rng), self._space, count)
            result = envs.step(self._in_dtype(actions))
            _check_step(result)
            returned, rewards, terminated, truncated, infos = result
            ended = np.asarray(terminated) | np.asarray(truncated)
            reached, replaced = self._reached(returned, ended, infos)
            step = VectorStep(
                self._waves, index, active, observations, actions, np.array(rewards), reached,
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

    def _in_dtype(self, actions: npt.NDArray[np.float32]) -> Array:
        # A float32 beside a float64 bound may lie a rounding error outside it.
        dtype = self._space.dtype
        return np.clip(actions.astype(dtype), self._space.low, self._space.high)

    def _reached(
        self, returned: Array, ended: npt.NDArray[np.bool_], infos: Mapping[str, Any]
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Observations after the step, and where `returned` is already of the next episode."""
        reached = np.array(returned)
        key = next((key for key in ("final_obs", "final_observation") if key in infos), None)
        if key is None:
            if self._mode == "samestep" and ended.any():
                raise ValueError(
                    "a vector environment that resets in the same step must put the last "
                    "observation into infos['final_obs'] (gymnasium 0.29: 'final_observation')"
                )
            return reached, np.zeros_like(ended)
        replaced = np.array(infos.get(f"_{key}", ended), dtype=np.bool_)
        for i in np.flatnonzero(replaced):
            reached[i] = infos[key][i]
        return reached, replaced


class _WaveRecord:
    """The steps of one wave, each of all environments, to be cut into episodes."""

    def __init__(
        self, reset_infos: Mapping[str, Any], count: int, info_keys: tuple[str, ...]
    ) -> None:
        self._count = count
        self._info_keys = info_keys
        keys = ("cost", "constraint", "action_executed", *info_keys)
        self._reset = {key: _column(reset_infos, key, count) for key in keys}
        self._columns: dict[str, list[_Column | None]] = {key: [] for key in keys}
        self._steps: list[VectorStep] = []
        self._lengths = np.zeros(count, dtype=np.int64)

    def add(self, step: VectorStep, replaced: npt.NDArray[np.bool_]) -> None:
        for key, column in self._columns.items():
            column.append(_step_column(step.infos, key, replaced))
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
        for t, executed in enumerate(self._values("action_executed", i)):
            if executed is not None:
                floats["actions"][t] = executed
        terminated = np.array([bool(step.terminated[i]) for step in steps])
        truncated = np.array([bool(step.truncated[i]) for step in steps])
        costs = self._complete("cost", i)
        after = self._complete("constraint", i)
        first = self._at_reset("constraint", i)
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
            initial_cost=self._at_reset("cost", i),
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
    if key == "cost":
        bad |= numbers < 0
    if bad.any():
        step = int(np.argmax(bad))
        rule = "finite and at least 0 (0 is safe)" if key == "cost" else "finite"
        raise ValueError(f"info[{key!r}] must be {rule}, got {numbers[step]} at entry {step}")
    return numbers
