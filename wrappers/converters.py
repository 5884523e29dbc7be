"""Labels for environments that report none: costs from a sixth value, constraints from functions.

Shields learn and are calibrated from ``info["constraint"]`` (h, positive is a violation) or
``info["cost"]`` (0 is safe) of the state just REACHED. These wrappers put them there.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.infos import CONSTRAINT, COST
from safeshield.spaces.generic import Env, Wrapper

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

Info = dict[str, Any]
ConstraintFunction = Callable[[Any], SupportsFloat]
"""(observation) -> h, positive is a violation."""
CostFunction = Callable[[Any, Any, Any, Info], SupportsFloat]
"""(observation, action, next_observation, info) -> cost of the step, 0 is safe."""

# What gym.make puts around an environment of its own accord, and what cannot take six values.
_MADE_BY_GYMNASIUM = (
    gym.wrappers.TimeLimit,
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
    gym.wrappers.RenderCollection,
    gym.wrappers.HumanRendering,
)
_NATIVE_ORDER = "(observation, reward, cost, terminated, truncated, info)"


class CostFromStep(Wrapper, RecordConstructorArgs):
    """Turn steps of six values, Safety-Gymnasium's native order, into Gymnasium's five.

    ``(observation, reward, cost, terminated, truncated, info)`` becomes ``(observation, reward,
    terminated, truncated, {**info, "cost": cost})``. Nothing else changes.

    Gymnasium's own wrappers refuse six values. The conversion therefore happens inside those that
    ``gym.make`` adds, so that ``CostFromStep(gym.make(id))`` and ``gym.make(env.spec)`` work. Any
    other wrapper that unpacks a step belongs around this one. The environment that is passed in is
    not changed.

    Raises (in `step`):
        ValueError: the environment returns five values already, or six in another order, or a
            cost that is not one finite number of at least 0.

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
        """Take a step."""
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
    outer = copy.copy(env)  # the caller may go on using the original
    outer.env = _converted(env.env)  # type: ignore[attr-defined]
    return outer


class _FiveValues(Wrapper):
    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        # `CostFromStep` stands for the both of them.
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
    """Report a constraint h of each state that is reached, from a function of the observation.

    ``info["constraint"]`` is ``constraint_fn(observation)`` at reset and at every step, of the
    observation just returned, hence also of the one that ends an episode. ``info["cost"]`` is 1.0
    where it is positive and 0.0 elsewhere, unless the environment reports a cost of its own.

    In a vector environment it goes around each copy:
    ``SyncVectorEnv([lambda: ConstraintFromFunction(gym.make(id), constraint_fn)] * n)``.

    Args:
        env: an environment that does not report ``info["constraint"]``.
        constraint_fn: h, one finite number in units of your choice, positive is a violation; of
            several constraints, return the largest.
        terminate_on_violation: end the episode (``terminated``) at the step that reaches h > 0. A
            violation at reset ends nothing.

    Raises:
        TypeError: `constraint_fn` cannot be called like that.
        ValueError: (in `reset`, `step`) it returns anything but one finite number, or the
            environment reports a constraint itself.

    >>> pendulum = gym.make("Pendulum-v1")
    >>> env = ConstraintFromFunction(pendulum, lambda obs: abs(obs[2]) - 6.0)  # rad/s
    >>> observation, info = env.reset(seed=0)
    >>> round(info["constraint"], 3), info["cost"]
    (-5.54, 0.0)
    """

    def __init__(
        self,
        env: Env,
        constraint_fn: ConstraintFunction,
        terminate_on_violation: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            constraint_fn=constraint_fn,
            terminate_on_violation=terminate_on_violation,
            _disable_deepcopy=True,
        )
        gym.Wrapper.__init__(self, env)
        _check_callable(constraint_fn, "constraint_fn(observation)")
        self.constraint_fn = constraint_fn
        self.terminate_on_violation = terminate_on_violation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and report the constraint where it starts."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._labelled(observation, info)

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step and report the constraint of the state it reaches."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = self._labelled(observation, info)
        if self.terminate_on_violation and info[CONSTRAINT] > 0:
            terminated = True
        return observation, reward, terminated, truncated, info

    def _labelled(self, observation: object, info: Info) -> Info:
        if CONSTRAINT in info:
            raise _reported_already(CONSTRAINT, "ConstraintFromFunction")
        value = self.constraint_fn(observation)
        constraint = _number(
            value, "constraint_fn(observation)", "; of several, return the largest"
        )
        return {COST: float(constraint > 0), **info, CONSTRAINT: constraint}


class CostFromFunction(Wrapper, RecordConstructorArgs):
    """Report a cost of each step, from a function of the transition.

    ``info["cost"]`` is ``cost_fn(observation, action, next_observation, info)`` at every step and
    0.0 at reset; it belongs to the state reached. Where a continuous measure of safety can be
    computed, `ConstraintFromFunction` teaches more.

    The action is what this wrapper is given. A shield that replaces actions belongs around this
    one: the cost then is that of the action that ran.

    Args:
        env: an environment that does not report ``info["cost"]``.
        cost_fn: one finite number of at least 0; 0 is safe. `observation` is a copy, `info` what
            the environment reports.

    Raises:
        TypeError: `cost_fn` cannot be called like that.
        ValueError: (in `step`) it returns anything else, or the environment reports a cost itself.
        gymnasium.error.ResetNeeded: stepped before the first reset.

    >>> too_strong = lambda obs, action, next_obs, info: float(abs(action[0]) > 1.5)
    >>> env = CostFromFunction(gym.make("Pendulum-v1"), too_strong)
    >>> observation, info = env.reset(seed=0)
    >>> info["cost"], env.step(np.array([1.8], np.float32))[4]["cost"]
    (0.0, 1.0)
    """

    def __init__(self, env: Env, cost_fn: CostFunction) -> None:
        RecordConstructorArgs.__init__(self, cost_fn=cost_fn, _disable_deepcopy=True)
        gym.Wrapper.__init__(self, env)
        _check_callable(cost_fn, "cost_fn(observation, action, next_observation, info)")
        self.cost_fn = cost_fn
        self._observation: Any = None
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment; nothing has been paid yet."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._check_free(info)
        self._observation, self._running = copy.deepcopy(observation), True
        return observation, {**info, COST: 0.0}

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step and report its cost."""
        if not self._running:
            raise gym.error.ResetNeeded("cannot step before the first call of reset()")
        given = copy.deepcopy(action)  # the environment may write into its own
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._check_free(info)
        value = self.cost_fn(self._observation, given, observation, info)
        cost = _cost(value, "cost_fn(observation, action, next_observation, info)")
        # A copy: some environments write the next observation into the same array.
        self._observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, {**info, COST: cost}

    def _check_free(self, info: Info) -> None:
        if COST in info:
            raise _reported_already(COST, "CostFromFunction")


def _check_callable(function: object, call: str) -> None:
    name, _, arguments = call.partition("(")
    if not callable(function):
        raise TypeError(f"{name} must be a function, called as {call}, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some functions written in C do not say
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
