"""Wrappers that add safety labels: costs from a sixth value, costs or constraints from functions.

Shields learn and are calibrated from ``info["constraint"]`` (h, positive is a violation) or
``info["cost"]`` (0 is safe) of the state just REACHED. These wrappers add them to the infos of
environments that do not report them.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.copies import sensor_fault
from safeshield.rollouts.infos import CONSTRAINT, COST, violates
from safeshield.spaces.batches import batch_of_one
from safeshield.spaces.generic import Env, Wrapper
from safeshield.values.constraint import ConstraintSource, SeveralConstraints, find_constraint

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

Info = dict[str, Any]
ConstraintFunction = Callable[[Any], SupportsFloat]
"""Function (observation) -> h; a positive number is a violation."""
CostFunction = Callable[[Any, Any, Any, Info], SupportsFloat]
"""Function (observation, action, next_observation, info) -> cost of the step; 0 is safe."""

# Wrappers that gym.make adds to an environment. They do not accept steps of six values.
_MADE_BY_GYMNASIUM = (
    gym.wrappers.TimeLimit,
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
    gym.wrappers.RenderCollection,
    gym.wrappers.HumanRendering,
)
_NATIVE_ORDER = "(observation, reward, cost, terminated, truncated, info)"


class CostFromStep(Wrapper, RecordConstructorArgs):
    """Convert steps of six values, as Safety-Gymnasium returns them, to Gymnasium's five.

    ``(observation, reward, cost, terminated, truncated, info)`` becomes ``(observation, reward,
    terminated, truncated, {**info, "cost": cost})``. Nothing else changes.

    Gymnasium's own wrappers do not accept six values. The conversion therefore happens inside those
    that ``gym.make`` adds, so that ``CostFromStep(gym.make(id))`` and ``gym.make(env.spec)`` work.
    Put any other wrapper that unpacks a step around this one. The environment that is passed in is
    not changed.

    Raises (in `step`):
        ValueError: The environment returns five values already, or six values in another order, or
            a cost that is not one finite number of at least 0.

    >>> class Native(gym.Env):
    ...     observation_space = action_space = gym.spaces.Box(-1.0, 1.0)
    ...     def reset(self, *, seed=None, options=None):
    ...         return np.zeros(1, np.float32), {}
    ...     def step(self, action):
    ...         return np.zeros(1, np.float32), 0.0, 1.0, False, False, {}
    >>> env = CostFromStep(Native())
    >>> _ = env.reset()
    >>> env.step(np.zeros(1))[1:]
    (0.0, False, False, {'cost': 1.0})
    """

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, _converted(env))

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step by `action` and return what the environment returns."""
        try:
            return self.env.step(action)
        except ValueError as error:
            if "too many values to unpack" in str(error):
                raise ValueError(
                    "a wrapper inside CostFromStep cannot take a step of six values; put "
                    f"CostFromStep directly around the environment: {self.env}"
                ) from error
            raise


def _converted(env: Env) -> Env:
    if type(env) not in _MADE_BY_GYMNASIUM:
        return _FiveValues(env)
    outer = copy.copy(env)  # the caller may still use the original
    outer.env = _converted(env.env)  # type: ignore[attr-defined]
    return outer


class _FiveValues(Wrapper):
    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        # The spec lists `CostFromStep` alone, which creates this inner wrapper too.
        return self.env.spec

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        result: tuple[Any, ...] = self.env.step(action)
        if len(result) == 5:
            raise ValueError(
                "the environment's step returns Gymnasium's five values already: leave CostFromStep"
                " out (the cost is read from info['cost']; see CostFromFunction where none is)"
            )
        if len(result) != 6 or not isinstance(result[5], Mapping):
            kinds = ", ".join(type(value).__name__ for value in result)
            raise ValueError(
                f"the environment's step must return {_NATIVE_ORDER}, got ({kinds}); return the "
                "values in this order"
            )
        observation, reward, cost, terminated, truncated, info = result
        label = {COST: _cost(cost, "the cost that the environment's step returns")}
        return observation, reward, terminated, truncated, {**info, **label}


class ConstraintFromFunction(Wrapper, RecordConstructorArgs):
    """Report the constraint h of each state that is reached, by a function of the observation.

    At reset and at every step, ``info["constraint"]`` is ``constraint_fn(observation)`` of the
    observation just returned, hence also of the one that ends an episode. ``info["cost"]`` is 1.0
    where the constraint is positive and 0.0 elsewhere, unless the environment reports a cost.

    In a vector environment, wrap each environment:
    ``SyncVectorEnv([lambda: ConstraintFromFunction(gym.make(id), constraint_fn)] * n)``.

    Several constraints are reported by name, each in its own units:
    ``info["constraint"]`` is then a mapping from each name to its h_k.

    Args:
        env: An environment that does not report ``info["constraint"]``.
        constraint_fn: Function that returns h, one finite number in units of your choice; a
            positive number is a violation. It may also be the name of a function of batches that
            `register_constraint` has registered. A log that `collect` makes then names it, and
            shields compute h with it. For several constraints, a mapping from each name to its
            function, or a list of registered names.
        terminate_on_violation: Whether the step that reaches h > 0 ends the episode
            (``terminated``). A violation at reset does not end the episode.

    Raises:
        TypeError: `constraint_fn` is not a function of one observation.
        ValueError: A name is not registered, or there is no constraint; `env` has a fault of a
            sensor (`wrappers.faults`), which belongs around this wrapper; (in `reset` and `step`)
            `constraint_fn` does not return one finite number, or the environment already reports
            ``info["constraint"]``.

    >>> pendulum = gym.make("Pendulum-v1")
    >>> env = ConstraintFromFunction(pendulum, lambda obs: abs(obs[2]) - 6.0)  # rad/s
    >>> observation, info = env.reset(seed=0)
    >>> round(info["constraint"], 3), info["cost"]
    (-5.54, 0.0)
    >>> limits = {"speed@1": lambda obs: abs(obs[2]) - 6.0, "upright@1": lambda obs: 0.5 - obs[0]}
    >>> _, info = ConstraintFromFunction(pendulum, limits).reset(seed=0)
    >>> {name: round(h, 2) for name, h in info["constraint"].items()}, info["cost"]
    ({'speed@1': -5.54, 'upright@1': -0.15}, 0.0)
    """

    def __init__(
        self,
        env: Env,
        constraint_fn: ConstraintFunction
        | str
        | Sequence[str]
        | Mapping[str, ConstraintFunction | str],
        terminate_on_violation: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            constraint_fn=constraint_fn,
            terminate_on_violation=terminate_on_violation,
            _disable_deepcopy=True,
        )
        gym.Wrapper.__init__(self, _true(env, "ConstraintFromFunction"))
        self.constraint_source: str | None = None
        given: Mapping[str, ConstraintFunction | str] | None = None
        if isinstance(constraint_fn, Mapping):
            given = constraint_fn
        elif isinstance(constraint_fn, list | tuple):
            given = {name: name for name in constraint_fn}
        elif isinstance(constraint_fn, str):
            source = find_constraint(constraint_fn)
            if isinstance(source, SeveralConstraints):
                given = {name: name for name in source.names}
            else:
                self.constraint_source = source.name
        if given is not None and not given:
            raise ValueError("constraint_fn must hold one constraint or more, got none")
        self.constraint_fn: ConstraintFunction | dict[str, ConstraintFunction]
        if given is None:
            self.constraint_fn = _of_one(constraint_fn, "constraint_fn")  # type: ignore[arg-type]
        else:
            self.constraint_fn = {
                name: _of_one(one, f"constraint_fn[{name!r}]") for name, one in given.items()
            }
        self.terminate_on_violation = terminate_on_violation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and report the constraint of the state in which it starts.

        `seed` and `options` are passed to the environment. The result is its observation, and its
        info with the constraint.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._labelled(observation, info)

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step by `action` and report the constraint of the state that it reaches.

        The result is that of the environment, with the constraint in the info.
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = self._labelled(observation, info)
        if self.terminate_on_violation and violates({CONSTRAINT: info[CONSTRAINT]}):
            terminated = True
        return observation, reward, terminated, truncated, info

    def _labelled(self, observation: object, info: Info) -> Info:
        if CONSTRAINT in info:
            raise _reported_already(CONSTRAINT, "ConstraintFromFunction")
        report: float | dict[str, float]
        if isinstance(self.constraint_fn, dict):
            report = {
                name: _number(function(observation), f"constraint_fn[{name!r}](observation)")
                for name, function in self.constraint_fn.items()
            }
        else:
            report = _number(
                self.constraint_fn(observation),
                "constraint_fn(observation)",
                "; name each of several: constraint_fn={'speed@1': function, ...}",
            )
        return {COST: float(bool(violates({CONSTRAINT: report}))), **info, CONSTRAINT: report}


def _of_one(function: ConstraintFunction | str, where: str) -> ConstraintFunction:
    """Return a function of one observation, from a function or a registered name."""
    if not isinstance(function, str):
        _check_callable(function, f"{where}(observation)")
        return function
    source = find_constraint(function)
    if not source.available:
        raise ValueError(
            f"{where}={function!r} is not registered in this process; decorate the function with "
            f"register_constraint({function!r}), or pass a function"
        )
    return _OfOne(source)


class _OfOne:
    """The constraint of a single observation, by a source that takes batches."""

    def __init__(self, source: ConstraintSource) -> None:
        self._source = source

    def __call__(self, observation: Any) -> float:  # noqa: ANN401
        return float(self._source(batch_of_one(observation))[0])


class CostFromFunction(Wrapper, RecordConstructorArgs):
    """Report a cost of each step, by a function of the transition.

    ``info["cost"]`` is ``cost_fn(observation, action, next_observation, info)`` at every step and
    0.0 at reset. The cost belongs to the state reached. Where a continuous measure of safety can be
    computed, `ConstraintFromFunction` gives the critics more information.

    The action is the one that this wrapper gets. Put a shield that replaces actions around this
    wrapper, so that the cost is that of the executed action.

    Args:
        env: An environment that does not report ``info["cost"]``.
        cost_fn: Function that returns the cost, one finite number of at least 0; 0 is safe. Its
            `observation` is a copy, and its `info` is the environment's.

    Raises:
        TypeError: `cost_fn` is not a function of these four arguments.
        ValueError: `env` has a fault of a sensor, see `ConstraintFromFunction`; (in `step`)
            `cost_fn` does not return one finite number of at least 0; (also in `reset`) the
            environment already reports ``info["cost"]``.
        gymnasium.error.ResetNeeded: `step` is called before the first reset.

    >>> too_strong = lambda obs, action, next_obs, info: float(abs(action[0]) > 1.5)
    >>> env = CostFromFunction(gym.make("Pendulum-v1"), too_strong)
    >>> observation, info = env.reset(seed=0)
    >>> info["cost"], env.step(np.array([1.8], np.float32))[4]["cost"]
    (0.0, 1.0)
    """

    def __init__(self, env: Env, cost_fn: CostFunction) -> None:
        RecordConstructorArgs.__init__(self, cost_fn=cost_fn, _disable_deepcopy=True)
        gym.Wrapper.__init__(self, _true(env, "CostFromFunction"))
        _check_callable(cost_fn, "cost_fn(observation, action, next_observation, info)")
        self.cost_fn = cost_fn
        self._observation: Any = None
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and report the cost 0.0.

        `seed` and `options` are passed to the environment. The result is its observation, and its
        info with the cost.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._check_free(info)
        self._observation, self._running = copy.deepcopy(observation), True
        return observation, {**info, COST: 0.0}

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step by `action` and report its cost.

        The result is that of the environment, with the cost in the info.
        """
        if not self._running:
            raise gym.error.ResetNeeded("cannot step before the first call of reset()")
        given = copy.deepcopy(action)  # the environment may write into the array that it gets
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._check_free(info)
        value = self.cost_fn(self._observation, given, observation, info)
        cost = _cost(value, "cost_fn(observation, action, next_observation, info)")
        # This is a copy because some environments write the next observation into the same array.
        self._observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, {**info, COST: cost}

    def _check_free(self, info: Info) -> None:
        if COST in info:
            raise _reported_already(COST, "CostFromFunction")


def _true(env: Env, wrapper: str) -> Env:
    """Return `env`, whose observations are true: no sensor's fault lies inside."""
    fault = sensor_fault(env)
    if fault is not None:
        name = type(fault).__name__
        raise ValueError(
            f"{wrapper} would compute the label from the faulty observations of {name}: put the "
            f"fault outside, {name}({wrapper}(env, ...), ...)"
        )
    return env


def _check_callable(function: object, call: str) -> None:
    name, _, arguments = call.partition("(")
    if not callable(function):
        raise TypeError(f"{name} must be a function, called as {call}, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some functions written in C have no signature
    try:
        signature.bind(*arguments.split(","))
    except TypeError as error:
        raise TypeError(f"{name} is called as {call}, got a function of {signature}") from error


def _reported_already(key: str, wrapper: str) -> ValueError:
    return ValueError(
        f"the environment reports info[{key!r}] itself, and two would contradict each other: leave "
        f"{wrapper} out, or remove the environment's own {key} by a wrapper inside it"
    )


def _number(value: object, name: str, repair: str = "") -> float:
    """Return one finite number as a float."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "bfiu":
        raise ValueError(f"{name} must be one number, got {value!r}{repair}")
    number = float(array.reshape(()))
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _cost(value: object, name: str) -> float:
    cost = _number(value, name)
    if cost < 0:
        raise ValueError(f"{name} must be at least 0 (0 is safe), got {cost}")
    return cost
