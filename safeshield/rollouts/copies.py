"""Many copies of one environment, in all of Gymnasium's forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np

from safeshield.files.schema import json_arguments
from safeshield.rollouts.infos import LABELS
from safeshield.spaces.generic import BEFORE_1_0, Env, VectorEnv, Wrapper

_MAX_NATIVE_ENVS = 256
_MAX_COPIED_ENVS = 8
# Rebuilt from their arguments these would start with empty statistics, not with the trained ones.
_STATEFUL_WRAPPERS = ("NormalizeObservation", "NormalizeReward")
# Arguments that change no dynamics; the others are those of a vector environment by itself.
_NO_DYNAMICS = ("render_mode", "max_episode_steps")
_OF_VECTORS = ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers", "autoreset_mode")
_MANY_VALUES = "too many values to unpack"


def is_vector_env(env: object) -> bool:
    """Whether `env` is a vector environment, of either of Gymnasium 0.29's two kinds or of 1.x."""
    # unwrapped, because a single wrapper of 0.29 warns when it passes such a question on.
    inner = getattr(env, "unwrapped", env)
    return hasattr(inner, "num_envs") and hasattr(inner, "single_action_space")


def spaces_of(env: Env | VectorEnv) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """Return the spaces of one environment's observations and actions."""
    if is_vector_env(env):
        vector = cast(VectorEnv, env)
        return vector.single_observation_space, vector.single_action_space
    return env.observation_space, env.action_space


def environment_id(env: object) -> str:
    """Return the id that an environment, or what a vector environment holds, was made by.

    "" where there is none. Gymnasium's and Stable-Baselines3's vectors are read alike.
    """
    # The innermost one's: wrappers copy it with their own arguments, and some cannot be copied.
    inner = getattr(env, "unwrapped", env)
    spec = getattr(inner, "spec", None)
    if spec is not None:
        return str(spec.id)
    members = getattr(inner, "envs", None)
    return environment_id(members[0]) if members else ""


def environment_kwargs(env: object) -> dict[str, Any] | None:
    """Return the keyword arguments that an environment was made with, as JSON values.

    They are those of its spec, the registered ones included, without ``render_mode`` and
    ``max_episode_steps``, which leave its dynamics as they are. None where there is no spec to be
    seen. Where the members of a vector environment differ in an argument, the list of its values.
    """
    inner = getattr(env, "unwrapped", env)
    spec = getattr(inner, "spec", None)
    if spec is not None:
        ignored = (*_NO_DYNAMICS, *(_OF_VECTORS if is_vector_env(inner) else ()))
        return json_arguments({k: v for k, v in spec.kwargs.items() if k not in ignored})
    told = [environment_kwargs(one) for one in getattr(inner, "envs", None) or ()]
    known = [one for one in told if one is not None]
    if not known:
        return None
    first, *others = known
    if all(one == first for one in others):
        return first
    names = _distinct(name for one in known for name in one)
    return {name: _distinct(one.get(name) for one in known) for name in names}


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def environment_name(env: object) -> str:
    """Return the id of an environment, or its class where it has none."""
    return environment_id(env) or type(getattr(env, "unwrapped", env)).__name__


def check_env(env: object) -> None:
    """Raise TypeError unless `env` is an environment, single or vector."""
    if not (isinstance(env, gym.Env) or is_vector_env(env)):
        raise TypeError(
            f"env must be a Gymnasium environment or VectorEnv, got {type(env).__name__}; make "
            "one with gymnasium.make(id)"
        )


def vectorise(env: Env | VectorEnv, num_envs: int | None = None) -> VectorEnv:
    """Return a vector environment of copies of `env`; a VectorEnv is returned as it is.

    An `env` that `gymnasium.make` can rebuild is copied: through its own vector entry point where
    it has one and no wrapper was added, else in a `SyncVectorEnv`. Changes made by hand after
    `make` are not copied. One environment alone (`num_envs` = 1; no spec; a render mode; a wrapper
    that cannot be rebuilt, or that holds statistics; ``metadata["one_per_process"]``) is `env`
    itself, which closing the result leaves open.

    Args:
        env: what to copy.
        num_envs: how many; by default 256 with a vector entry point and 8 without one.

    Raises:
        ValueError: `num_envs` is below 1, differs from that of a VectorEnv, or is above 1 where
            `env` cannot be copied.
    """
    return copies(env, num_envs, most=None, freeze=False)


def copies(
    env: Env | VectorEnv, num_envs: int | None, *, most: int | None, freeze: bool
) -> VectorEnv:
    """Do what `vectorise` does, with at most `most` copies that stand still once they are over."""
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
    spec = spec_to_copy(single)
    native = spec is not None and spec.vector_entry_point and not spec.additional_wrappers
    default = 1 if spec is None else _MAX_NATIVE_ENVS if native else _MAX_COPIED_ENVS
    count = default if num_envs is None else num_envs
    count = count if most is None else min(count, most)
    if count == 1:
        return gym.vector.SyncVectorEnv([lambda: Member(single, owned=False, freeze=freeze)])
    if spec is None:
        own = "an AsyncVectorEnv" if one_per_process(single) else "a vector environment"
        raise ValueError(
            f"num_envs must be 1 for {single}, {why_alone(single)}; got {count}. Leave num_envs "
            f"out, or pass {own} of your own"
        )
    if native:
        return _make_native(spec, count)
    # disable_env_checker: what it would say of the copies it has said of the environment.
    return gym.vector.SyncVectorEnv(
        [
            lambda: Member(gym.make(spec, disable_env_checker=True), owned=True, freeze=freeze)
            for _ in range(count)
        ]
    )


def one_per_process(env: Env) -> bool:
    """Whether a process can hold only one environment of this kind, as its metadata say."""
    return bool((env.metadata or {}).get("one_per_process"))


def spec_to_copy(env: Env, *, elsewhere: bool = False) -> gym.envs.registration.EnvSpec | None:
    """Return what `gymnasium.make` rebuilds an environment from; None where it cannot.

    Args:
        env: what to rebuild.
        elsewhere: in a process of its own, where another one of its kind is not in its way.
    """
    spec, _ = _spec_or_reason(env)
    return None if one_per_process(env) and not elsewhere else spec


def why_alone(env: Env, *, elsewhere: bool = False) -> str:
    """Return why `spec_to_copy` is None, as a clause that begins with a relative pronoun."""
    if one_per_process(env) and not elsewhere:
        return "of which a process can hold one only"
    return _spec_or_reason(env)[1]


def _spec_or_reason(env: Env) -> tuple[gym.envs.registration.EnvSpec | None, str]:
    nothing = "which gymnasium.make cannot rebuild from its spec"
    try:
        spec = env.spec
    except Exception:
        # Gymnasium 0.29 deep-copies the arguments of wrappers here, and some cannot be copied.
        return None, nothing
    if not isinstance(spec, gym.envs.registration.EnvSpec):
        return None, nothing
    if env.render_mode is not None:
        return None, f"which is shown as render_mode={env.render_mode!r} says, and copies are not"
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None:
            return None, f"whose wrapper {wrapper.name} does not tell how it was made"
        if wrapper.name in _STATEFUL_WRAPPERS:
            return None, f"whose wrapper {wrapper.name} holds statistics that copies would lack"
    return spec, ""


def _make_native(spec: gym.envs.registration.EnvSpec, count: int) -> VectorEnv:
    if BEFORE_1_0:
        # 0.29 hands a custom vector environment its vector_kwargs alone.
        return gym.make_vec(
            spec, num_envs=count, vectorization_mode="custom", vector_kwargs=dict(spec.kwargs)
        )
    return gym.make_vec(spec, num_envs=count, vectorization_mode="vector_entry_point")


class Member(Wrapper):
    """One environment of a SyncVectorEnv.

    With `freeze` it stands still once an episode is `over`, until a reset with a seed: the steps
    that a batch of episodes throws away cost nothing. Costs are made floats, because Gymnasium
    gives the column of all environments the type of the first one's value, and 0.5 beside the
    integer 0 is lost.
    """

    def __init__(self, env: Env, *, owned: bool, freeze: bool) -> None:
        super().__init__(env)
        self._owned = owned
        self._freeze = freeze
        self._last: object = None
        self.over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; without a seed only where none is over."""
        if self.over and seed is None:
            return self._last, {}
        self.over = False
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, _float_labels(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Step, unless the episode is over."""
        if self.over:
            return self._last, 0.0, False, False, {}
        try:
            result = self.env.step(action)
        except ValueError as error:
            if _MANY_VALUES in str(error):
                raise _step_error("more than 5") from error
            raise
        check_step(result)
        observation, reward, terminated, truncated, info = result
        if self._freeze and (terminated or truncated):
            self.over, self._last = True, observation
        return observation, float(reward), terminated, truncated, _float_labels(info)

    def close(self) -> None:
        """Close the environment if it was made for this."""
        if self._owned:
            super().close()


def _float_labels(info: Mapping[str, Any]) -> dict[str, Any]:
    labels = {
        key: float(np.reshape(info[key], ()))
        for key in LABELS
        if info.get(key) is not None and np.size(info[key]) == 1
    }
    return {**info, **labels}


def check_step(result: Sequence[object]) -> None:
    """Raise ValueError unless a step returned Gymnasium's five values."""
    if len(result) != 5:
        raise _step_error(str(len(result)))


def check_reward(reward: float, step: int, episode: str) -> None:
    """Raise ValueError unless the reward of a step is a finite number."""
    if not np.isfinite(reward):
        raise ValueError(
            f"the reward of a step must be a finite number, got {float(reward)} at step {step} of "
            f"{episode}; mend the environment, or end its episodes before that happens"
        )


def _step_error(count: str) -> ValueError:
    return ValueError(
        "env.step must return (observation, reward, terminated, truncated, info), got "
        f"{count} values; for Safety-Gymnasium's native ids, which return the cost as a sixth, use "
        "the Gymnasium ones (gymnasium.make('SafetyPointGoal1Gymnasium-v0')) or "
        "safeshield.wrappers.CostFromStep, which puts the cost into info['cost']"
    )


def autoreset_mode(envs: VectorEnv) -> str:
    """One of "nextstep", "samestep" and "disabled"."""
    mode = (envs.metadata or {}).get("autoreset_mode")
    if mode is None:
        return "samestep" if BEFORE_1_0 else "nextstep"
    return str(getattr(mode, "value", mode)).replace("_", "").lower()
