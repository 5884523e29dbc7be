"""Shields of two tasks whose critics are fitted to exact values, and faults planted in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.data import OfflineDataset, collect
from safeshield.envs import boat
from safeshield.envs import double_integrator as cart
from safeshield.evaluation.causes import (
    CHANGED,
    CONTRADICTION,
    LATE,
    MISREPLACED,
    THIN,
    UNREADABLE,
    UNSUPPORTED,
)
from safeshield.exact import boat_value
from safeshield.exact import double_integrator as exact_cart
from safeshield.nn.actor import FlowActor
from safeshield.nn.mlp import EnsembleMLP, like, tensors
from safeshield.nn.optim import adam, adam_init
from safeshield.rollouts.copies import environment_kwargs
from safeshield.rollouts.policies import BatchPolicy, batch_policy
from safeshield.shield import Shield
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import CalibrationRecord, PolicyResult, Rung
from safeshield.shield.replacement import Rejected
from safeshield.spaces.scaling import Scaling
from safeshield.training.schedule import learning_rate
from safeshield.values.constraint import find_constraint
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import BEHAVIOUR, FALLBACK, SafetyScale

Array = npt.NDArray[Any]
Value = Callable[[Array], Array]


def fitted(
    space: gym.spaces.Box,
    states: Array,
    actions: Array,
    h: Array,
    value: Array,
    q: Array,
    source: str | None,
    steps: int = 700,
) -> Shield:
    """Fit h^, e and the advantage to h (n,), `value` - h (n,) and `q` - `value` (n,)."""
    widths = states.shape[1], actions.shape[1]
    unit = float((q - value).std())
    scale = SafetyScale(float(h.mean()), float(h.std()), unit)
    critics = SafetyCritics(*widths, (48, 48), scale)
    box = gym.spaces.Box(-1.0, 1.0, (widths[1],))
    mean, spread = states.mean(0).astype("f4"), states.std(0).astype("f4")
    scaling = Scaling(mean, spread, box.low, box.high)
    seen = torch.tensor(scaling.observations(states))
    table = [
        torch.tensor(np.asarray(x, np.float32)) for x in (h, value - h, (q - value) / unit, actions)
    ]
    generator = torch.Generator().manual_seed(0)
    networks = critics.init(generator)
    moments = adam_init(networks)
    for _ in range(steps):
        rows = torch.randint(len(seen), (256,), generator=generator)
        leaves = like(networks, [t.detach().requires_grad_() for t in tensors(networks)])
        level, over, gain, tried = (x[rows] for x in table)
        excess = critics.excess(leaves, seen[rows])
        # The network's output counts only where it is positive.
        above = torch.where(over > 1e-6, excess - over, excess.clamp(min=0.0))
        loss = (critics.constraint(leaves, seen[rows]) - level).square().mean() / 0.05**2
        loss = loss + above.square().mean() / 0.05**2
        loss = loss + (critics.advantages(leaves, seen[rows], tried) - gain).square().mean()
        gradients = torch.autograd.grad(
            loss, tensors(leaves), allow_unused=True, materialize_grads=True
        )
        rate = learning_rate(5e-3, moments.updates, steps)
        networks, moments = adam(networks, list(gradients), moments, [rate] * len(gradients))
    fallback = EnsembleMLP(sum(widths), widths[1], (16,)).init(generator)
    arrays = {
        name: {key: tensor.detach().numpy() for key, tensor in params.items()}
        for name, params in {**networks, FALLBACK: fallback}.items()
    }
    known = None if source is None else find_constraint(source)
    return Shield(
        SafetyModel.of_networks(space, box, scaling, scale, arrays, constraint=known),
        trained_by="exact values",
    )


# -- two tasks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task with exact values, a reckless agent, and a delta that is large enough."""

    id: str
    kwargs: dict[str, Any]
    source: str
    low: Array
    high: Array
    width: int
    h: Value
    next_state: Callable[[Array, Array], Array]
    value: Callable[[], Value]
    agent: BatchPolicy
    delta: float
    other: dict[str, Any]
    """Keyword arguments of an environment with other dynamics."""
    weak: float
    """Factor on the actions that changes the dynamics without a keyword argument."""

    def env(self, **changed: object) -> gym.Env[Any, Any]:
        return gym.make(self.id, **{**self.kwargs, **changed})


@batch_policy
def _right(observations: Array, rng: np.random.Generator) -> Array:
    return np.ones((len(observations), 1), np.float32)


@batch_policy
def _straight(observations: Array, rng: np.random.Generator) -> Array:
    way = boat.GOAL - observations
    return way / np.linalg.norm(way, axis=1, keepdims=True) + 0.3 * rng.standard_normal(way.shape)


CART = Task(
    id="safeshield/DoubleIntegrator-v0",
    kwargs={},
    source="DoubleIntegrator@1",
    low=cart.STATE_LOW,
    high=cart.STATE_HIGH,
    width=1,
    h=cart.constraint,
    next_state=cart.next_state,
    value=lambda: lambda states: exact_cart.value(states, dt=cart.TIME_STEP),
    agent=_right,
    delta=0.1,
    other={"dt": 0.4},
    weak=0.5,
)
BOAT = Task(
    id="safeshield/Boat-v0",
    kwargs={"dt": 0.02, "max_episode_steps": 100},
    source="Boat@1",
    low=boat.STATE_LOW,
    high=boat.STATE_HIGH,
    width=2,
    h=boat.constraint,
    next_state=lambda states, actions: boat.next_state(states, actions, dt=0.02),
    value=boat_value,
    agent=_straight,
    delta=0.1,
    other={"current": 4.0},
    weak=-1.0,
)
TASKS = {"double integrator": CART, "boat": BOAT}


@cache
def sound(
    task: str,
    source: bool = True,
    optimism: float = 0.0,
    unlogged: float = 0.0,
) -> Shield:
    """A shield of a task at delta 0.

    Args:
        task: Name of the task.
        source: Whether the shield computes h; else a network estimates it.
        optimism: By how much values above h are too low.
        unlogged: By how many steps of h Q_h of an action whose last entry is -1 is too low.
    """
    given = TASKS[task]
    rng = np.random.default_rng(0)
    states = rng.uniform(given.low, given.high, (60_000, 2))
    exact = given.value()
    edge = states[np.abs(exact(states)) < 0.3]
    states = np.concatenate([states, edge])
    actions = rng.uniform(-1, 1, (len(states), given.width))

    def value(at: Array) -> Array:
        return np.maximum(given.h(at), exact(at) - optimism)

    q = value(given.next_state(states, actions))
    unit = float((q - value(states)).std())
    q = q - unlogged * unit * np.maximum(-actions[:, -1], 0.0)
    space = gym.spaces.Box(given.low.astype("f4"), given.high.astype("f4"))
    name = given.source if source else None
    return fitted(space, states, actions, given.h(states), value(states), q, name)


# -- faults ------------------------------------------------------------------------------------


class Reports(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """An environment that reports another constraint than its own."""

    def __init__(self, env: gym.Env[Any, Any], factor: float = 1.0, shift: float = 0.0) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, factor=factor, shift=shift)
        super().__init__(env)
        self.factor, self.shift = factor, shift

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        h = self.factor * info["constraint"] + self.shift
        return {**info, "constraint": h, "cost": float(h > 0)}

    def reset(self, **options: Any) -> tuple[Array, dict[str, Any]]:  # noqa: ANN401
        observation, info = self.env.reset(**options)
        return observation, self._told(info)

    def step(self, action: Array) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._told(info)


class Scaled(gym.ActionWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """An environment in which the last entry of an action has another effect."""

    def __init__(self, env: gym.Env[Any, Any], factor: float) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, factor=factor)
        super().__init__(env)
        self.factor = factor

    def action(self, action: Array) -> Array:
        return np.concatenate([action[:-1], self.factor * action[-1:]])


class BrokenSensor(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A sensor that breaks `after` steps into an episode."""

    def __init__(self, env: gym.Env[Any, Any], after: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, after=after)
        super().__init__(env)
        self.after, self.seen = after, 0

    def reset(self, **options: Any) -> tuple[Array, dict[str, Any]]:  # noqa: ANN401
        self.seen = 0
        return super().reset(**options)

    def observation(self, observation: Array) -> Array:
        self.seen += 1
        return np.full_like(observation, np.nan) if self.seen > self.after else observation


class Backwards:
    """A broken replacement: it executes the candidate of HIGHEST Q_h."""

    def choose(self, rejected: Rejected, /) -> tuple[Array, Array]:
        points = np.stack([rejected.low, rejected.wanted[0] * 0, rejected.high])
        each = np.broadcast_to(points, (len(rejected.wanted), *points.shape))
        values = rejected.values(each)
        worst = values.argmax(axis=1)
        at = np.arange(len(each))
        return each[at, worst], values[at, worst]


def with_behaviour(shield: Shield, centre: float) -> Shield:
    """Return a shield whose log shows actions near `centre` only, by a flow made by hand.

    v(s, x, t) = 2 (centre - x), with x = relu(x) - relu(-x).
    """
    model = shield.model
    width = model.action_codec.width
    seen = model.scaling.observation_features
    into = np.zeros((1, seen + width + 1, 2 * width), np.float32)
    out = np.zeros((1, 2 * width, width), np.float32)
    for i in range(width):
        into[0, seen + i, 2 * i : 2 * i + 2] = 1.0, -1.0
        out[0, 2 * i : 2 * i + 2, i] = -2.0, 2.0
    flow = {
        "0.weight": into,
        "0.bias": np.zeros((1, 1, 2 * width), np.float32),
        "1.weight": out,
        "1.bias": np.full((1, 1, width), 2.0 * centre, np.float32),
    }
    networks = {**model.networks, BEHAVIOUR: flow}
    actor = FlowActor(seen, width, (2 * width,))
    return replace(shield, model=replace(model, networks=networks, behaviour_actor=actor))


def with_record(shield: Shield, env: gym.Env[Any, Any]) -> Shield:
    """Return the shield with a record of a calibration in `env`."""
    record = CalibrationRecord(
        delta=shield.delta,
        epsilon=0.05,
        confidence=0.95,
        policies=(PolicyResult("policy", 59, 0, 0.05, 0.1),),
        environment=env.spec.id if env.spec else "",
        start_distribution="its own reset does",
        start_share=0.9,
        walk=(Rung(shield.delta, "policy", 59, 0, 0.05, True),),
        seed=0,
        date="2026-01-01T00:00:00+00:00",
        versions={},
        environment_kwargs=environment_kwargs(env),
    )
    return replace(shield, record=record)


@cache
def logged(task: str) -> OfflineDataset:
    """A log of random episodes of a task."""
    return collect(TASKS[task].env(), "random", episodes=100, seed=0)


@dataclass(frozen=True)
class Planted:
    """A shield with a fault, the environment in which it acts, and the cause to be named."""

    shield: Shield
    env: gym.Env[Any, Any]
    cause: str
    log: OfflineDataset | None = None


def _wrong_h(task: str) -> Planted:
    given = TASKS[task]
    env = Reports(given.env(), shift=0.2)
    return Planted(sound(task).with_delta(given.delta), env, CONTRADICTION)


def _wrong_estimate(task: str) -> Planted:
    given = TASKS[task]
    env = Reports(given.env(), shift=0.2)
    return Planted(sound(task, source=False).with_delta(given.delta), env, CONTRADICTION)


def _turned_sign(task: str) -> Planted:
    given = TASKS[task]
    return Planted(
        sound(task).with_delta(given.delta), Reports(given.env(), factor=-1.0), CONTRADICTION
    )


def _thin_delta(task: str) -> Planted:
    return Planted(sound(task), TASKS[task].env(), THIN)


def _broken_replacement(task: str) -> Planted:
    given = TASKS[task]
    shield = sound(task).with_delta(given.delta).with_replacement(Backwards())
    return Planted(shield, given.env(), MISREPLACED)


def _other_arguments(task: str) -> Planted:
    given = TASKS[task]
    shield = with_record(sound(task).with_delta(given.delta), given.env())
    return Planted(shield, given.env(**given.other), CHANGED)


def _hidden_change(task: str) -> Planted:
    given = TASKS[task]
    shield = sound(task).with_delta(given.delta)
    return Planted(shield, Scaled(given.env(), given.weak), CHANGED, logged(task))


def _no_recoveries(task: str) -> Planted:
    given = TASKS[task]
    shield = sound(task, unlogged=3.0).with_delta(given.delta)
    return Planted(with_behaviour(shield, 0.5), given.env(), UNSUPPORTED)


def _broken_sensor(task: str) -> Planted:
    given = TASKS[task]
    return Planted(
        sound(task, source=False).with_delta(given.delta), BrokenSensor(given.env(), 5), UNREADABLE
    )


def _optimistic_value(task: str) -> Planted:
    given = TASKS[task]
    return Planted(sound(task, optimism=0.4).with_delta(given.delta), given.env(), LATE)


FAULTS: dict[str, Callable[[str], Planted]] = {
    "wrong h": _wrong_h,
    "wrong h, estimated": _wrong_estimate,
    "turned sign": _turned_sign,
    "thin delta": _thin_delta,
    "broken replacement": _broken_replacement,
    "other arguments": _other_arguments,
    "changed dynamics": _hidden_change,
    "log without recoveries": _no_recoveries,
    "broken sensor": _broken_sensor,
    "optimistic value": _optimistic_value,
}
"""Functions that plant one fault each in the task of a name."""
