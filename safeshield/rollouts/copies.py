"""Vector environments made of copies of one environment, for all supported Gymnasium versions."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

from safeshield.files.schema import json_arguments
from safeshield.rollouts.infos import LABELS
from safeshield.spaces.generic import BEFORE_1_0, Env, VectorEnv, VectorWrapper, Wrapper

_MAX_NATIVE_ENVS = 256
_MAX_COPIED_ENVS = 8
# A wrapper of these kinds that is rebuilt from its arguments has lost its statistics.
_STATEFUL_WRAPPERS = ("NormalizeObservation", "NormalizeReward")
Wrappers = list[tuple[str, dict[str, Any] | None]]
"""Wrappers, the innermost first: the name of each one's class, and its arguments as JSON values,
None where they are not known."""
SENSOR_FAULTS = (
    "NoisySensor", "QuantisedSensor", "DroppingSensor", "StuckSensor", "DelayedSensor",
    "ControlPeriod",
)  # fmt: skip
"""Wrappers of `faults` after which an observation does not show the state, or not every
state, that the labels describe."""
ACTUATOR_FAULTS = ("DelayedActuator", "LimitedActuator")
"""Wrappers of `faults` that execute another action."""
# Arguments that do not change the dynamics.
_NO_DYNAMICS = ("render_mode", "max_episode_steps")
# RL Zoo puts a class of its own in the place of Gymnasium's.
_TIME_LIMITS = ("TimeLimit", "PatchedTimeLimit")
# Wrappers that gymnasium.make adds by itself, and those that do not change what an agent meets.
_NO_WRAPPERS = (
    *_TIME_LIMITS, "OrderEnforcing", "PassiveEnvChecker", "AutoResetWrapper", "Autoreset",
    "HumanRendering", "RenderCollection", "RecordVideo", "RecordEpisodeStatistics",
    "VecMonitor", "VecCheckNan", "VecVideoRecorder",
)  # fmt: skip
# An environment as text, "<Wrapper<Env<id>>>" or "<Wrapper<Env instance>>".
_AS_TEXT = re.compile(r"((?:<\w+)+)(?:<([^<>]+)>| instance)(>+)")
# What Python itself and annotations put into the namespace of a class.
_NO_OVERRIDES = {
    "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__dict__",
    "__doc__", "__firstlineno__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
    "__static_attributes__", "__type_params__", "__weakref__",
}  # fmt: skip
# Arguments of vector environments only.
_OF_VECTORS = ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers", "autoreset_mode")
_COMPARED_STEPS, _COMPARED_SEED = 20, 0
_MANY_VALUES = "too many values to unpack"


def is_vector_env(env: object) -> bool:
    """Return whether `env` is a vector environment of Gymnasium 1.x or of either kind in 0.29."""
    # The unwrapped environment is asked, because wrappers of 0.29 warn when they forward hasattr.
    inner = getattr(env, "unwrapped", env)
    return hasattr(inner, "num_envs") and hasattr(inner, "single_action_space")


def refuse_vector_env(env: Env | VectorEnv, workers: int, ray: str | None = None) -> None:
    """Raise ValueError where `env`, which other processes are to step, is a VectorEnv.

    `workers` is the number of these processes, and `ray` the address of the Ray cluster.
    """
    if is_vector_env(env):
        name, asked = ("workers", workers) if ray is None else ("ray", repr(ray))
        raise ValueError(
            f"{name}={asked} needs one Gymnasium environment to copy, got a VectorEnv; leave "
            f"{name} out, or pass gymnasium.make(id)"
        )


def spaces_of(env: Env | VectorEnv) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """Return the observation space and the action space of a single environment of `env`."""
    if is_vector_env(env):
        vector = cast(VectorEnv, env)
        return vector.single_observation_space, vector.single_action_space
    return env.observation_space, env.action_space


def environment_id(env: object) -> str:
    """Return the id with which the environment `env` was made, or "" where there is none.

    For a vector environment of Gymnasium or Stable-Baselines3 it is the id of its members, also
    where these are in other processes.
    """
    # The spec of the innermost environment is read. Wrappers deep-copy the spec with their own
    # arguments, and some arguments cannot be copied.
    inner = getattr(env, "unwrapped", env)
    spec = getattr(inner, "spec", None)
    if spec is not None:
        return str(spec.id)
    members = getattr(inner, "envs", None)
    if members:
        return environment_id(members[0])
    ids = {one.name for one in _told_by_workers(inner) or ()}
    return ids.pop() if len(ids) == 1 else ", ".join(sorted(ids))


def constraint_source(env: object) -> str | None:
    """Return the name of the function of the observation that gives the constraint of `env`.

    The name is the attribute `constraint_source` of the environment or of one of its wrappers, the
    outermost first. The result is None where there is none, or where the members of a vector
    environment differ.
    """
    layer: Any = env
    while layer is not None:
        name = vars(layer).get("constraint_source") or getattr(
            type(layer), "constraint_source", None
        )
        if isinstance(name, str):
            return name
        members = vars(layer).get("envs")
        if members:
            names = {constraint_source(member) for member in members}
            return names.pop() if len(names) == 1 else None
        layer = vars(layer).get("env")
    return None


def behind_shield(env: object) -> dict[str, Any] | None:
    """Return which shield `env` executes its actions through, and in which mode, as JSON values.

    The result is None where no layer has a shield's runtime. Of several members of a vector
    environment the first one tells.
    """
    layer: Any = env
    while layer is not None:
        fields = getattr(layer, "__dict__", {})
        identity = getattr(fields.get("runtime"), "identity", None)
        if isinstance(identity, dict):
            return identity
        members = fields.get("envs")
        layer = members[0] if members else fields.get("env", fields.get("venv"))
    return None


def environment_kwargs(env: object) -> dict[str, Any] | None:
    """Return the keyword arguments with which the environment `env` was made, as JSON values.

    They are the arguments in its spec, including those of its registration, without ``render_mode``
    and ``max_episode_steps``, which do not change the dynamics. The result is None where there is
    no spec. Where the members of a vector environment have different values of an argument, the
    result holds the list of these values under the argument's name.
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


def _default_arguments(env: object) -> dict[str, Any]:
    """Return the defaults of the arguments with which an environment is made, as JSON values.

    They are those of its registered entry point, or of its class where it has no spec.
    """
    inner = getattr(env, "unwrapped", env)
    members = getattr(inner, "envs", None)
    if members:
        return _default_arguments(members[0])
    entry = getattr(getattr(inner, "spec", None), "entry_point", None) or type(inner)
    try:
        made_by = load_env_creator(entry) if isinstance(entry, str) else entry
        parameters = inspect.signature(made_by).parameters.values()
    except (TypeError, ValueError, ImportError, AttributeError):
        return {}  # Nothing is known of a function in C, or of one that cannot be imported here.
    return json_arguments(
        {one.name: one.default for one in parameters if one.default is not one.empty}
    )


def environment_wrappers(env: object) -> Wrappers | None:
    """Return the wrappers of an environment, the innermost first: (name of the class, arguments).

    The arguments are JSON values, and None where a wrapper does not record them. Left out are the
    wrappers that `gymnasium.make` adds, those that only render, and those whose class overrides
    nothing. The wrappers of the members of a vector environment come before its own. Where the
    members differ, they are listed one after the other, and a member without wrappers as "none".

    Members in other processes tell only the names of their wrappers. The arguments are read from
    the spec of `gymnasium.make_vec`. The result is None where the processes do not answer.
    """
    found: Wrappers = []
    layer: Any = env
    while layer is not None:
        fields = vars(layer)
        inner = fields.get("env", fields.get("venv"))
        name = type(layer).__name__
        if inner is not None and name not in _NO_WRAPPERS and not _passes_through(layer):
            # Gymnasium's RecordConstructorArgs keeps the arguments under this name.
            saved = fields.get("_saved_kwargs")
            found.append((name, None if saved is None else json_arguments(saved)))
        members = fields.get("envs")
        if members:
            return _joined(map(environment_wrappers, members), found)
        if _in_workers(layer):
            told = _told_by_workers(layer)
            return None if told is None else _joined((one.wrappers for one in told), found)
        layer = inner
    return found[::-1]


def _joined(members: Iterable[Wrappers | None], own: Wrappers) -> Wrappers | None:
    """Return the wrappers of members, and after them those around all, given the outermost first.

    The result is None where those of a member are not known.
    """
    each = _distinct(members)
    if None in each:
        return None
    if len(each) > 1:
        each = [one or [("none", None)] for one in each]
    return [*(one for wrappers in each for one in wrappers), *reversed(own)]


def sensor_fault(env: object) -> Any:  # noqa: ANN401
    """Return the outermost layer of `env` that is one of `SENSOR_FAULTS`, or None.

    Of several members of a vector environment the first one tells.
    """
    layer: Any = env
    while layer is not None and type(layer).__name__ not in SENSOR_FAULTS:
        fields = getattr(layer, "__dict__", {})
        members = fields.get("envs")
        layer = members[0] if members else fields.get("env", fields.get("venv"))
    return layer


def _passes_through(wrapper: object) -> bool:
    """Return whether a wrapper overrides nothing of Gymnasium's base class of wrappers."""
    names = set(vars(wrapper)) & {"step", "reset"}
    for kind in type(wrapper).__mro__:
        if kind in (Wrapper, VectorWrapper):
            return names <= _NO_OVERRIDES
        names |= set(vars(kind))
    return False


def environment_horizon(env: object) -> int | None:
    """Return the greatest number of steps of an episode; None where it is not known or unlimited.

    It is the smallest limit of the `TimeLimit` wrappers, and for a vector environment that of its
    spec or of its members. Limits of which the environment says nothing are not known.
    """
    limits: list[int | None] = []
    layer: Any = env
    while layer is not None:
        fields = vars(layer)
        if type(layer).__name__ in _TIME_LIMITS:
            limits.append(fields.get("_max_episode_steps"))
        members = fields.get("envs")
        if members:
            inside = [environment_horizon(member) for member in members]
            limits.append(None if None in inside else max(one for one in inside if one))
        elif is_vector_env(layer) and "env" not in fields:
            limits.append(getattr(fields.get("spec"), "max_episode_steps", None))
        if _in_workers(layer):
            told = [one.horizon for one in _told_by_workers(layer) or ()]
            limits.append(None if None in told else max((one for one in told if one), default=None))
        layer = fields.get("env", fields.get("venv"))
    return min((int(one) for one in limits if one is not None and one > 0), default=None)


class _Told(NamedTuple):
    """What a worker process tells of its environment."""

    name: str
    """Id; "" where it has none."""
    wrappers: Wrappers
    """As `environment_wrappers` returns them."""
    horizon: int | None
    """Its time limit; None where it has none."""


def _in_workers(layer: object) -> bool:
    """Return whether this vector environment has its members in other processes.

    It is an `AsyncVectorEnv`, or a vector environment of Stable-Baselines3 that has no members.
    """
    if isinstance(layer, gym.vector.AsyncVectorEnv):
        return True
    return hasattr(type(layer), "env_method") and not {"envs", "venv", "env"} & set(vars(layer))


def _told_by_workers(layer: object) -> list[_Told] | None:
    """Return what the worker processes of a vector environment tell of their environments.

    The result is None where they do not answer, or not as Gymnasium does, and where there are none.
    """
    if not _in_workers(layer) or vars(layer).get("worker") is not None:
        return None
    # A question that fails, or an answer that cannot be pickled, would end a worker, so that they
    # are asked only for what every environment can tell: its text and its time limit.
    ask: Any = getattr(layer, "call", None) or getattr(layer, "env_method", None)
    try:
        read = [_AS_TEXT.fullmatch(text) for text in ask("__str__")]
        told = [one for one in read if one is not None and one[1].count("<") == len(one[3])]
        if len(told) < len(read):
            return None
        chains = [one[1].split("<")[1:-1] for one in told]
        limits = [None] * len(chains)
        if all(set(chain) & set(_TIME_LIMITS) for chain in chains):
            limits = ask("get_wrapper_attr", "_max_episode_steps")
    except Exception:
        return None  # A step is under way, or the environments are closed.
    known = _wrappers_in_spec(layer)
    return [
        _Told(
            one[2] or "",
            [(name, known.get(name)) for name in reversed(chain) if name not in _NO_WRAPPERS],
            limit,
        )
        for one, chain, limit in zip(told, chains, limits, strict=True)
    ]


def _wrappers_in_spec(env: object) -> dict[str, dict[str, Any]]:
    """Return the arguments of the wrappers that `gymnasium.make_vec` was asked for, by name.

    Left out are functions, and names that occur more than once.
    """
    spec = getattr(env, "spec", None)
    if spec is None:
        return {}
    found = [(one.name, one.kwargs) for one in spec.additional_wrappers]
    for given in spec.kwargs.get("wrappers", ()):
        made = given if isinstance(given, functools.partial) else functools.partial(given)
        if not (isinstance(made.func, type) and issubclass(made.func, gym.Wrapper)):
            continue
        bound = inspect.signature(made.func).bind(None, *made.args, **made.keywords)
        bound.apply_defaults()
        _, *rest = bound.arguments
        found.append((made.func.__name__, {name: bound.arguments[name] for name in rest}))
    names = [name for name, _ in found]
    return {
        name: json_arguments(kwargs)
        for name, kwargs in found
        if kwargs is not None and names.count(name) == 1
    }


class Identity(NamedTuple):
    """What is known of an environment, to compare it with that of a calibration."""

    name: str
    """Id; "" where it is not known."""
    kwargs: dict[str, Any] | None
    """Keyword arguments with which it was made, as JSON values; None where they are not known."""
    wrappers: Wrappers | None
    """Result of `environment_wrappers`."""
    horizon: int | None
    """Greatest number of steps of an episode; None where there is no limit or it is not known."""
    defaults: dict[str, Any]
    """Values, as JSON values, that the environment's class gives to arguments that are left out."""
    in_workers: bool = False
    """Whether other processes step it, which do not tell everything."""

    @property
    def untold(self) -> list[str]:
        """What the processes that step it do not tell, in words."""
        pairs = ("arguments", self.kwargs), ("wrappers", self.wrappers)
        return [what for what, told in pairs if self.in_workers and told is None]

    @classmethod
    def of(cls, env: object) -> Self:
        """Return what is known of an environment or a vector environment."""
        told = environment_id(env), environment_kwargs(env), environment_wrappers(env)
        apart = _in_workers(getattr(env, "unwrapped", env))
        return cls(*told, environment_horizon(env), _default_arguments(env), apart)

    def made_with(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the environment was made with the arguments `kwargs`, JSON values.

        An argument that is left out has its default value. The result is True where the arguments
        of the environment are not known.
        """
        if self.kwargs is None:
            return True
        return {**self.defaults, **self.kwargs} == {**self.defaults, **kwargs}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Return each different value once, in order; values need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def environment_name(env: object) -> str:
    """Return the id of the environment `env`, or the name of its class where it has no id."""
    return environment_id(env) or type(getattr(env, "unwrapped", env)).__name__


def check_env(env: object) -> None:
    """Raise TypeError unless `env` is a single or a vector environment."""
    if not (isinstance(env, gym.Env) or is_vector_env(env)):
        raise TypeError(
            f"env must be a Gymnasium environment or VectorEnv, got {type(env).__name__}; make "
            "one with gymnasium.make(id)"
        )


def vectorise(env: Env | VectorEnv, num_envs: int | None = None) -> VectorEnv:
    """Return a vector environment of copies of `env`. A VectorEnv is returned unchanged.

    An `env` that `gymnasium.make` can rebuild is copied. The copies use its vector entry point
    where it has one and no wrapper was added, and a `SyncVectorEnv` otherwise. A copy must behave
    as `env` does for 20 steps from the same seed (see `difference`), so `env` is reset. Where it
    does not, for example because an attribute of `env` was changed after `make`, `env` itself is
    the only member, and a warning says so.

    `env` itself is the only member, and stays open when the result is closed, where `num_envs` is 1
    or `env` cannot be copied. It cannot be copied where it has no spec, has a render mode, has a
    wrapper that cannot be rebuilt or that holds statistics, or where
    ``metadata["one_per_process"]`` is set.

    Args:
        env: The environment to copy.
        num_envs: Number of copies; by default 256 with a vector entry point and 8 without one.

    Raises:
        ValueError: `num_envs` is below 1, differs from that of a VectorEnv, or is above 1 where
            `env` cannot be copied or a copy behaves otherwise.
    """
    return copies(env, num_envs, most=None, freeze=False)


def copies(
    env: Env | VectorEnv, num_envs: int | None, *, most: int | None, freeze: bool
) -> VectorEnv:
    """Return a vector environment as `vectorise` does, with at most `most` copies.

    Args:
        env: Environment to copy, or a vector environment, which is returned as it is.
        num_envs: Number of copies; None for a default.
        most: Largest number of copies; None for no limit.
        freeze: Whether copies made in a `SyncVectorEnv` do not step once their episode has ended
            (see `Member`).
    """
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
    count = most_together(spec) if num_envs is None else num_envs
    count = count if most is None else min(count, most)
    if count > 1 and spec is not None and (differs := difference(single, spec)):
        if num_envs is not None:
            raise ValueError(f"num_envs must be 1 for {single}, {differs}; got {num_envs}")
        warnings.warn(
            f"episodes run in {single} itself, one after the other, {differs}. The record of a "
            "calibration names the id, the arguments and the wrappers: make the environment by "
            "these, not by attributes that are set afterwards",
            UnequalCopiesWarning,
            stacklevel=3,
        )
        count = 1
    if count == 1:
        return gym.vector.SyncVectorEnv([lambda: Member(single, owned=False, freeze=freeze)])
    if spec is None:
        own = "an AsyncVectorEnv" if one_per_process(single) else "a vector environment"
        raise ValueError(
            f"num_envs must be 1 for {single}, {why_alone(single)}; got {count}. Leave num_envs "
            f"out, or pass {own} of your own"
        )
    if _is_native(spec):
        return _make_native(spec, count)
    # The checker is disabled because it has already checked the environment that is copied.
    return gym.vector.SyncVectorEnv(
        [
            lambda: Member(gym.make(spec, disable_env_checker=True), owned=True, freeze=freeze)
            for _ in range(count)
        ]
    )


class UnequalCopiesWarning(UserWarning):
    """A copy behaves differently from the environment, so no copy is used."""


def difference(env: Env, spec: gym.envs.registration.EnvSpec) -> str:
    """Return how a copy made from `spec` differs from `env`, as a clause; "" where it does not.

    Both are reset with the same seed and take the same random actions, for 20 steps or until an
    episode ends. Observations, rewards, ends and the reported constraint and cost are compared,
    with a tolerance of 1e-5.

    Args:
        env: The environment, which is reset.
        spec: The spec from which `gymnasium.make` makes the copy.
    """
    # The checker is disabled because it has already checked the environment that is copied.
    copy = gym.make(spec, disable_env_checker=True)
    try:
        copy.action_space.seed(_COMPARED_SEED)
        told: list[tuple[Any, ...]] = [one.reset(seed=_COMPARED_SEED) for one in (env, copy)]
        for step in range(_COMPARED_STEPS + 1):
            here, there = [
                (*one[:-1], *(_float_labels(one[-1]).get(key) for key in LABELS)) for one in told
            ]
            if not _alike(here, there):
                return (
                    f"because a copy made from its spec returns something else {step} steps after "
                    "a reset with the same seed: it was changed after gymnasium.make, or its seed "
                    "does not determine it"
                )
            if step and any(here[2:4]):
                break
            action = copy.action_space.sample()
            told = [one.step(action) for one in (env, copy)]
    finally:
        copy.close()
    return ""


def _alike(here: object, there: object) -> bool:
    """Return whether two observations or results of a step differ by rounding only."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        return here.keys() == there.keys() and all(_alike(here[k], there[k]) for k in here)
    if isinstance(here, tuple | list) and isinstance(there, tuple | list):
        return len(here) == len(there) and all(map(_alike, here, there))
    one, other = np.asarray(here), np.asarray(there)
    if one.dtype.kind not in "biufc" or other.dtype.kind not in "biufc":
        return bool(np.all(one == other))
    return one.shape == other.shape and np.allclose(one, other, 1e-5, 1e-5, equal_nan=True)


def most_together(spec: gym.envs.registration.EnvSpec | None) -> int:
    """Return how many environments of a spec step together by default; 1 without a spec."""
    if spec is None:
        return 1
    return _MAX_NATIVE_ENVS if _is_native(spec) else _MAX_COPIED_ENVS


def _is_native(spec: gym.envs.registration.EnvSpec) -> bool:
    return bool(spec.vector_entry_point and not spec.additional_wrappers)


def runs_natively(env: Env | VectorEnv) -> bool:
    """Return whether copies of `env` use its vector entry point, and behave as `env` does."""
    spec = None if is_vector_env(env) else spec_to_copy(cast(Env, env))
    return spec is not None and _is_native(spec) and not difference(cast(Env, env), spec)


def one_per_process(env: Env) -> bool:
    """Return whether the metadata say that a process can hold only one environment like `env`."""
    return bool((env.metadata or {}).get("one_per_process"))


def spec_to_copy(env: Env, *, elsewhere: bool = False) -> gym.envs.registration.EnvSpec | None:
    """Return the spec from which `gymnasium.make` can rebuild an environment; None if it cannot.

    Args:
        env: The environment to rebuild.
        elsewhere: Whether the copy gets a process of its own, so that ``"one_per_process"`` does
            not matter.
    """
    spec, _ = _spec_or_reason(env)
    return None if one_per_process(env) and not elsewhere else spec


def why_alone(env: Env, *, elsewhere: bool = False) -> str:
    """Return why `spec_to_copy` returns None for `env`, as a relative clause for an error message.

    `elsewhere` is that of `spec_to_copy`.
    """
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
        return None, f"which has render_mode={env.render_mode!r}, and copies are not rendered"
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None:
            return None, f"whose wrapper {wrapper.name} does not tell how it was made"
        if wrapper.name in _STATEFUL_WRAPPERS:
            return None, f"whose wrapper {wrapper.name} holds statistics that copies would lack"
    return spec, ""


def _make_native(spec: gym.envs.registration.EnvSpec, count: int) -> VectorEnv:
    if BEFORE_1_0:
        # Gymnasium 0.29 passes only vector_kwargs to a custom vector environment.
        return gym.make_vec(
            spec, num_envs=count, vectorization_mode="custom", vector_kwargs=dict(spec.kwargs)
        )
    return gym.make_vec(spec, num_envs=count, vectorization_mode="vector_entry_point")


class Member(Wrapper):
    """One environment of a SyncVectorEnv.

    With `freeze` the environment does not step once its episode is `over`, until a reset with a
    seed. The steps that a batch of episodes would discard therefore take no time. Costs and
    constraints are converted to float, because Gymnasium gives the column of all environments the
    type of the first value, and a cost of 0.5 would become 0 in a column of integers.

    Args:
        env: The environment.
        owned: Whether `close` closes it.
        freeze: Whether it stops stepping at the end of an episode.
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
        """Start an episode and return its first observation and info.

        A reset without `seed` has no effect where the episode is `over`; the last observation is
        then returned. `options` are passed to the environment.
        """
        if self.over and seed is None:
            return self._last, {}
        self.over = False
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, _float_labels(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Step the environment by `action` and return what it returns.

        Where the episode is `over`, the environment does not step, and the result is the last
        observation, the reward 0, two False flags and no info.
        """
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
        """Close the environment if this member owns it."""
        if self._owned:
            super().close()


def _float_labels(info: Mapping[str, Any]) -> dict[str, Any]:
    return {**info, **{key: _as_float(info[key]) for key in LABELS if info.get(key) is not None}}


def _as_float(label: Any) -> Any:  # noqa: ANN401
    if isinstance(label, Mapping):
        return {name: _as_float(part) for name, part in label.items()}
    if type(label) is float:  # The usual case, which is met at every step.
        return label
    return float(np.reshape(label, ())) if np.size(label) == 1 else label


def check_step(result: Sequence[object]) -> None:
    """Raise ValueError unless `result` of a step has the five values that Gymnasium defines."""
    if len(result) != 5:
        raise _step_error(str(len(result)))


def check_reward(reward: float, step: int, episode: str) -> None:
    """Raise ValueError unless the reward of a step is a finite number.

    `step` and `episode` name the step in the error message.
    """
    if not np.isfinite(reward):
        raise ValueError(
            f"the reward of a step must be a finite number, got {float(reward)} at step {step} of "
            f"{episode}; repair the environment, or end its episodes before that happens"
        )


def _step_error(count: str) -> ValueError:
    return ValueError(
        "env.step must return (observation, reward, terminated, truncated, info), got "
        f"{count} values; for Safety-Gymnasium's native ids, which return the cost as a sixth, use "
        "the Gymnasium ones (gymnasium.make('SafetyPointGoal1Gymnasium-v0')) or "
        "safeshield.wrappers.CostFromStep, which puts the cost into info['cost']"
    )


def autoreset_mode(envs: VectorEnv) -> str:
    """Return the autoreset mode of the vector environment `envs`.

    It is "nextstep", "samestep" or "disabled".
    """
    mode = (envs.metadata or {}).get("autoreset_mode")
    if mode is None:
        return "samestep" if BEFORE_1_0 else "nextstep"
    return str(getattr(mode, "value", mode)).replace("_", "").lower()
