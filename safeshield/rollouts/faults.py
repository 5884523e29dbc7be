"""Faults of sensors and actuators, as Gymnasium wrappers.

A shield that is calibrated in an environment with these wrappers is tested under the faults, and
its record lists them. ``safeshield stress`` plays a matrix of them.

``info["constraint"]`` and ``info["cost"]`` are those of the environment inside, so a violation is a
violation of the plant, whatever the sensor shows. `ConstraintFromFunction` and `CostFromFunction`
therefore belong inside a fault of a sensor, and refuse to stand around one.

A shield belongs around the faults. A fault around a shield changes what the agent sees and sends,
but not what the shield sees and executes, and its resets warn of that.

Each wrapper draws from a generator of its own, which ``reset(seed=)`` seeds. The random numbers of
the environment inside are not touched, so the same seed gives the same start with and without the
fault. Observations keep the dtype and the bounds of their space. The arguments are recorded, so
that ``gymnasium.make(env.spec)`` rebuilds the wrappers.

Gymnasium has wrappers for two related faults. `StickyAction` repeats the last action at random,
which is a lost command. `DelayObservation` returns zeros until the first delayed observation
arrives. Zeros may be no observation of the plant, so `DelayedSensor` returns the first observation
until then.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from safeshield.files.settings import Count, NonNegativeInt, Positive, Rate, Share, check
from safeshield.rollouts.infos import CONSTRAINT, COST, INTERVENED, LABELS, violates
from safeshield.spaces.generic import Env, Wrapper

Info = dict[str, Any]
Array = npt.NDArray[Any]
PerEntry = float | Sequence[float]
"""One number for all entries of an observation, or one for each."""


class _Fault(Wrapper, RecordConstructorArgs):
    """A wrapper that calls `_begin` at each reset, and has a generator that the reset seeds."""

    def __init__(self, env: Env, **arguments: Any) -> None:  # noqa: ANN401
        RecordConstructorArgs.__init__(self, **arguments)
        gym.Wrapper.__init__(self, env)
        self._rng = np.random.default_rng()
        self._warned = False
        # Two faults around each other must not draw the same numbers.
        self._depth, layer = 0, env
        while isinstance(layer, gym.Wrapper):
            self._depth += isinstance(layer, _Fault)
            layer = layer.env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and the fault. `seed` seeds both, `options` are passed on."""
        observation, info = self.env.reset(seed=seed, options=options)
        if not self._warned and INTERVENED in info:
            self._warned = True
            name = type(self).__name__
            warnings.warn(
                f"{name} stands around a shield, which therefore works without this fault: only "
                f"the agent has it. To test the shield put it around: SafetyShield({name}(env, "
                "...), shield)",
                stacklevel=2,
            )
        if seed is not None:
            self._rng = np.random.default_rng(np.random.SeedSequence([seed, self._depth]))
        return self._begin(observation), info

    def _begin(self, observation: Any) -> Any:  # noqa: ANN401
        return observation


class _SensorFault(_Fault):
    """A wrapper that shows another observation. `_sense` takes and returns arrays of float64."""

    def __init__(self, env: Env, **arguments: Any) -> None:  # noqa: ANN401
        super().__init__(env, **arguments)
        self._box = _box(env.observation_space, "observation_space", self)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:  # noqa: ANN401
        """Take a step by `action` and return what the environment returns, as the sensor shows it.

        Only the observation differs.
        """
        observation, *rest = self.env.step(action)
        return (self._shown(self._sense(self._read(observation))), *rest)  # type: ignore[return-value]

    def _begin(self, observation: Any) -> Any:  # noqa: ANN401
        return self._shown(self._sense_first(self._read(observation)))

    def _read(self, observation: Any) -> Array:  # noqa: ANN401
        reading = np.array(observation, np.float64)
        if reading.shape != self._box.shape:
            raise ValueError(
                f"{type(self).__name__} needs observations of the shape {self._box.shape} of the "
                f"observation_space, but the environment inside returned one of {reading.shape}"
            )
        return reading

    def _sense_first(self, observation: Array) -> Array:
        return self._sense(observation)

    def _sense(self, observation: Array) -> Array:
        raise NotImplementedError

    def _shown(self, reading: Array) -> Array:
        box = self._box
        inside = np.clip(reading, box.low, box.high)  # NaN stays.
        return (np.rint(inside) if box.dtype.kind in "iu" else inside).astype(box.dtype)

    def _each(self, name: str, value: PerEntry) -> Array:
        given = np.asarray(value, np.float64)
        if given.ndim and given.shape != self._box.shape:
            raise ValueError(
                f"{name} must be one number or one for each entry of the observation, shape "
                f"{self._box.shape}, got shape {given.shape}"
            )
        if not np.isfinite(given).all():
            raise ValueError(f"{name} must be finite, got {value}")
        return given


class NoisySensor(_SensorFault):
    """Show ``o + bias + std * N(0, 1)``, with a new draw for each entry and step.

    Args:
        env: An environment with observations in a Box.
        std: Standard deviation of the noise, at least 0, in units of the observation: one number,
            or one for each entry.
        bias: Offset in the same units.

    >>> env = NoisySensor(gym.make("Pendulum-v1"), std=0.1)
    >>> shown, _ = env.reset(seed=0)
    >>> true, _ = gym.make("Pendulum-v1").reset(seed=0)
    >>> bool(0 < abs(shown - true).max() < 0.5), env.observation_space.contains(shown)
    (True, True)
    """

    def __init__(self, env: Env, std: PerEntry = 0.0, bias: PerEntry = 0.0) -> None:
        super().__init__(env, std=_listed(std), bias=_listed(bias))
        self._std, self._bias = self._each("std", std), self._each("bias", bias)
        if (self._std < 0).any():
            raise ValueError(f"std must be at least 0, got {std}")

    def _sense(self, observation: Array) -> Array:
        return observation + self._bias + self._std * self._rng.standard_normal(observation.shape)


class QuantisedSensor(_SensorFault):
    """Show ``round(o / step) * step``.

    Args:
        env: An environment with observations in a Box.
        step: Distance of two readings, above 0, in units of the observation: one number, or one
            for each entry.
    """

    def __init__(self, env: Env, step: PerEntry) -> None:
        super().__init__(env, step=_listed(step))
        self._distance = self._each("step", step)
        if (self._distance <= 0).any():
            raise ValueError(f"step must be above 0, got {step}")

    def _sense(self, observation: Array) -> Array:
        return np.asarray(np.rint(observation / self._distance) * self._distance)


class DroppingSensor(_SensorFault):
    """Lose each observation with a probability, and show the last one or NaN in its place.

    The first observation of an episode is never lost. NaN is no member of an observation space: it
    is what a driver returns that has read nothing.

    Args:
        env: An environment with observations in a Box; of floats, for NaN.
        probability: Probability that an observation is lost.
        fill: "hold" shows the observation that was shown last, "nan" shows NaN in every entry.
    """

    def __init__(self, env: Env, probability: float, fill: Literal["hold", "nan"] = "hold") -> None:
        super().__init__(env, probability=probability, fill=fill)
        self._probability = check("probability", Share, probability)
        check("fill", Literal["hold", "nan"], fill)
        if fill == "nan" and self._box.dtype.kind != "f":
            raise ValueError(
                f"fill must be 'hold' where observations are {self._box.dtype}, which has no NaN, "
                "got 'nan'"
            )
        self._held: Array | None = None if fill == "hold" else np.full(self._box.shape, np.nan)
        self._hold = fill == "hold"

    def _sense_first(self, observation: Array) -> Array:
        return self._kept(observation)

    def _sense(self, observation: Array) -> Array:
        lost = self._rng.random() < self._probability
        return self._held if lost and self._held is not None else self._kept(observation)

    def _kept(self, observation: Array) -> Array:
        if self._hold:
            self._held = observation
        return observation


class StuckSensor(_SensorFault):
    """Freeze entries of the observation from a random step to the end of the episode.

    Args:
        env: An environment with observations in a Box.
        probability: Probability of each step, the first one included, to be the one from which the
            reading does not change.
        entries: Indices of the entries that stick, in a flattened observation; None for all.
    """

    def __init__(self, env: Env, probability: float, entries: Sequence[int] | None = None) -> None:
        chosen = None if entries is None else [int(one) for one in entries]
        super().__init__(env, probability=probability, entries=chosen)
        self._probability = check("probability", Share, probability)
        self._which = np.ones(self._box.shape, np.bool_)
        if chosen is not None:
            count = self._which.size
            if not chosen or not all(0 <= one < count for one in chosen):
                raise ValueError(f"entries must be indices from 0 to {count - 1}, got {entries}")
            self._which.flat[:] = np.isin(np.arange(count), chosen)
        self._stuck: Array | None = None

    def _sense_first(self, observation: Array) -> Array:
        self._stuck = None
        return self._sense(observation)

    def _sense(self, observation: Array) -> Array:
        if self._stuck is None and self._rng.random() < self._probability:
            self._stuck = observation
        return observation if self._stuck is None else np.where(
            self._which, self._stuck, observation
        )  # fmt: skip


class DelayedSensor(_SensorFault):
    """Show the observation of some steps ago, and the first one until there is one.

    Args:
        env: An environment with observations in a Box.
        steps: Number k of steps. 0 changes nothing.
    """

    def __init__(self, env: Env, steps: int) -> None:
        super().__init__(env, steps=steps)
        self._line: deque[Array] = deque(maxlen=check("steps", NonNegativeInt, steps) + 1)

    def _sense_first(self, observation: Array) -> Array:
        self._line.clear()
        return self._sense(observation)

    def _sense(self, observation: Array) -> Array:
        self._line.append(observation)
        return self._line[0]


class DelayedActuator(_Fault):
    """Execute the action of some steps ago.

    Args:
        env: The environment.
        steps: Number k of steps. 0 changes nothing.
        first: Action that is executed until the first delayed one arrives; None for zeros, clipped
            into the Box of the actions.
    """

    def __init__(self, env: Env, steps: int, first: PerEntry | int | None = None) -> None:
        super().__init__(env, steps=steps, first=None if first is None else _listed(first))
        self._steps = check("steps", NonNegativeInt, steps)
        space = env.action_space
        self._first: Any = _rest(_box(space, "action_space", self)) if first is None else first
        if first is not None and isinstance(space, gym.spaces.Box):
            self._first = np.asarray(first, space.dtype)
        if not space.contains(self._first):
            raise ValueError(f"first must be an action of {space}, got {first}")
        self._line: deque[Any] = deque()

    def _begin(self, observation: Any) -> Any:  # noqa: ANN401
        self._line = deque([self._first] * self._steps)
        return observation

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:  # noqa: ANN401
        """Execute the delayed action, and keep `action` for later. The result is the environment's.

        The result is that of the environment.
        """
        self._line.append(np.array(action) if isinstance(action, np.ndarray) else action)
        sent = self._line.popleft()
        return self.env.step(sent.copy() if isinstance(sent, np.ndarray) else sent)


class LimitedActuator(_Fault):
    """Execute an action that is saturated, and that changes slowly.

    With the middle m and the half width w of the action space, the executed action is ::

        b[t] = clip(a[t], m - share * w, m + share * w)
        u[t] = clip(b[t], u[t-1] - rate * w, u[t-1] + rate * w)

    and ``u[-1]`` is 0, clipped into the space.

    Args:
        env: An environment with actions in a bounded Box.
        share: Share of the half width that the actuator reaches.
        rate: Largest change in a step, in half widths; None for no limit.
    """

    def __init__(self, env: Env, share: float = 1.0, rate: float | None = None) -> None:
        super().__init__(env, share=share, rate=rate)
        box = _box(env.action_space, "action_space", self)
        if not box.is_bounded():
            raise ValueError(f"action_space must be bounded, got {box}")
        low, high = box.low.astype(np.float64), box.high.astype(np.float64)
        reach = check("share", Rate, share) * (high - low) / 2
        self._low, self._high = (low + high) / 2 - reach, (low + high) / 2 + reach
        self._change = np.inf if rate is None else check("rate", Positive, rate) * (high - low) / 2
        self._dtype, self._resting = box.dtype, _rest(box)
        self._last = self._resting.astype(np.float64)

    def _begin(self, observation: Any) -> Any:  # noqa: ANN401
        self._last = self._resting.astype(np.float64)
        return observation

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:  # noqa: ANN401
        """Execute `action` as far as the actuator reaches. The result is the environment's."""
        reached = np.clip(np.asarray(action, np.float64), self._low, self._high)
        self._last = np.clip(reached, self._last - self._change, self._last + self._change)
        return self.env.step(self._last.astype(self._dtype))


class ControlPeriod(_Fault):
    """Hold each action for several steps of the environment: the controller runs too slowly.

    The reward and the cost are summed over these steps. The constraint is the largest of the states
    passed, so that no violation between two actions is missed. A limit of steps inside counts the
    steps of the environment.

    Args:
        env: The environment.
        steps: Number k of steps of the environment for each action. 1 changes nothing.
    """

    def __init__(self, env: Env, steps: int) -> None:
        super().__init__(env, steps=steps)
        self._steps = check("steps", Count, steps)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:  # noqa: ANN401
        """Take the steps by `action`, and return the last observation."""
        total, worst, costs = 0.0, None, []
        for _ in range(self._steps):
            observation, reward, terminated, truncated, info = self.env.step(
                action.copy() if isinstance(action, np.ndarray) else action
            )
            if not isinstance(info, Mapping):
                raise ValueError(
                    "the step of the environment inside ControlPeriod must return its infos as a "
                    f"dict, empty where there are none, got {type(info).__name__}"
                )
            violates({key: info[key] for key in LABELS if info.get(key) is not None})  # Checks.
            total += float(reward)
            worst = _larger(worst, info.get(CONSTRAINT))
            costs += [float(info[COST])] if COST in info else []
            if terminated or truncated:
                break
        told = ({} if worst is None else {CONSTRAINT: worst}) | (
            {COST: sum(costs)} if costs else {}
        )
        return observation, total, terminated, truncated, {**info, **told}


def _larger(one: Any, other: Any) -> Any:  # noqa: ANN401
    """Return the larger of two reports of the constraint, by name where they are mappings."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {name: _larger(one.get(name), other.get(name)) for name in {**one, **other}}
    return max(float(one), float(other))


def _box(space: gym.Space[Any], what: str, fault: Wrapper) -> gym.spaces.Box:
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(
            f"{what} must be a Box for {type(fault).__name__}, got {space}"
            + ("; put FlattenObservation inside" if what == "observation_space" else "")
        )
    return space


def _rest(box: gym.spaces.Box) -> Array:
    return np.clip(np.zeros(box.shape), box.low, box.high).astype(box.dtype)


def _listed(value: Any) -> Any:  # noqa: ANN401
    """Return numbers as JSON values, so that a spec can hold them."""
    return np.asarray(value).tolist()
