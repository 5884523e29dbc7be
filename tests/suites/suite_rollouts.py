"""Rollouts of the benchmark tasks by policies that do break their rules."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

import safeshield.suites  # noqa: F401 - registers them
from safeshield.data import OfflineDataset
from safeshield.suites.constraints import with_constraint

Array = np.ndarray
Env = gym.Env[Any, Any]


@dataclass(frozen=True)
class Rollout:
    """A log with binary labels, and what the environment reported live."""

    log: OfflineDataset
    live: Array
    """(N,) info["constraint"] after each step."""
    starts: Array
    """(E,) info["constraint"] at each reset."""
    obvious: Array
    """(N,) the same as `live`, by `obvious_constraint`; for Safety-Gymnasium's Point and Car."""
    kinds: set[type]
    """Of info["constraint"]."""


@functools.cache
def rollout(env_id: str, steps: int = 400) -> Rollout:
    """Run a vigorous policy for so many steps; episodes end where they do, or after a hundred."""
    env = with_constraint(gym.make(env_id, disable_env_checker=True))
    rng = np.random.default_rng(3)
    rows: dict[str, list[Any]] = {key: [] for key in _KEYS}
    starts, obvious, kinds = [], [], set()
    observation, info = _start(env, rng, seed=7)
    starts.append(info["constraint"])
    held = env.action_space.sample()
    for step in range(steps):
        if step % 10 == 0:
            held = rng.uniform(env.action_space.low, env.action_space.high)
        action = _action(env, held).astype(env.action_space.dtype)
        after, reward, terminated, truncated, info = env.step(action)
        kinds.add(type(info["constraint"]))
        truncated |= step % 100 == 99
        truncated &= not terminated
        values = (observation, action, reward, after, terminated, truncated, info["cost"])
        for key, value in zip(_KEYS, (*values, info["constraint"]), strict=True):
            rows[key].append(np.copy(value))
        if env_id.startswith(("SafetyPoint", "SafetyCar")) and "Gymnasium" in env_id:
            obvious.append(obvious_constraint(env.unwrapped))
        observation = after
        if (terminated or truncated) and step < steps - 1:
            observation, info = _start(env, rng)
            starts.append(info["constraint"])
    env.close()
    rows["truncated"][-1] = not rows["terminated"][-1]  # whatever the number of steps
    arrays: dict[str, Any] = {key: np.array(values) for key, values in rows.items()}
    live = arrays.pop("live")
    return Rollout(
        OfflineDataset.from_arrays(
            **arrays, observation_space=env.observation_space, action_space=env.action_space
        ),
        live,
        np.array(starts),
        np.array(obvious),
        kinds,
    )


def obvious_constraint(inner: Any) -> float:  # noqa: ANN401 - of a package without types
    """What `with_constraint` reports of a navigation task, thing by thing."""
    task, h = inner.task, -np.inf
    agent, model, data = task.agent, task.model, task.data
    parts = set(agent.body_info.geom_names)
    x, y, _ = agent.pos
    reach = max(
        np.hypot(data.geom(name).xpos[0] - x, data.geom(name).xpos[1] - y)
        + model.geom(name).rbound[0]
        for name in parts
    )
    for item in task._obstacles:
        if not getattr(item, "is_constrained", False):
            continue
        if item.name == "sigwalls":
            h = max(h, abs(x) - item.locate_factor)
            h = max(h, abs(y) - item.locate_factor) if item.num == 4 else h
            continue
        distances = [np.hypot(place[0] - x, place[1] - y) for place in item.pos]
        if item.name == "hazards":
            h = max(h, *(item.size - distance for distance in distances))
            continue
        touched = False
        for contact in data.contact[: data.ncon]:
            pair = {model.geom(contact.geom1).name, model.geom(contact.geom2).name}
            touched |= bool(pair & parts) and any(
                name.startswith(item.name.removesuffix("s")) for name in pair
            )
        if item.name == "vases":
            speeds = [_speed(model, data, f"vase{i}") for i in range(item.num)]
            touched |= max(speeds) >= item.velocity_threshold
        if item.name == "buttons":
            # A goal that was just reached has changed both the wrong ones and their rest.
            touched = inner.cost.get("cost_buttons", 0.0) > 0
            wrong = [d for i, d in enumerate(distances) if i != item.goal_button]
            distances = [3.0] if item.timer else wrong
        overlap = item.size + reach - min(distances)
        h = max(h, max(overlap, 0.05) if touched else min(overlap, -0.001))
    return float(h)


def _speed(model: Any, data: Any, body: str) -> float:  # noqa: ANN401
    import mujoco

    jacobian = np.zeros((3, model.nv))
    mujoco.mj_jacBody(model, data, jacobian, None, model.body(body).id)
    return float(np.linalg.norm(jacobian @ data.qvel))


_KEYS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminated",
    "truncated",
    "costs",
    "live",
)


def _start(
    env: Env, rng: np.random.Generator, seed: int | None = None
) -> tuple[Array, dict[str, Any]]:
    """Reset, near to what no simple policy reaches by itself."""
    observation, info = env.reset(seed=seed)
    inner: Any = env.unwrapped
    name = str(env.spec.id)  # type: ignore[union-attr]
    if hasattr(inner, "_velocity_threshold"):
        velocity = inner.data.qvel.copy()
        velocity[0] += inner._velocity_threshold * rng.uniform(0.2, 1.8)
        inner.set_state(inner.data.qpos.copy(), velocity)
        return _told(env, inner._get_obs(), info)
    if name in ("SafetyAntCircle-v0", "SafetyCarCircle-v0"):
        inner.agent.set_position([5.8, 0.0, inner.agent.init_xyz[2]])
        return _told(env, inner.get_observation(), info)
    return observation, info


def _told(env: Env, observation: Array, info: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
    layer: Any = env
    while not hasattr(layer, "_constraint"):
        layer = layer.env
    info = {key: value for key, value in info.items() if key != "constraint"}
    return observation, {**info, "constraint": layer._constraint(env.unwrapped, observation, info)}


def _action(env: Env, held: Array) -> Array:
    inner: Any = env.unwrapped
    name = type(inner.task.agent).__name__ if hasattr(inner, "task") else ""
    if name not in ("Point", "Car") or not hasattr(inner.task, "world_info"):
        return held
    agent, task = inner.task.agent, inner.task
    rules = [item for item in task._obstacles if getattr(item, "is_constrained", False)]
    places = [place[:2] for item in rules if item.name != "sigwalls" for place in item.pos]
    if not places:
        # Outwards, from wherever it stands.
        offset = np.sign(agent.pos[:2]) + 1e-3
    else:
        offsets = np.array(places) - agent.pos[:2]
        offset = offsets[np.argmin(np.square(offsets).sum(axis=1))]
    x, y, _ = np.array([*offset, 0.0]) @ agent.mat
    if name == "Point":
        angle = np.arctan2(y, x)
        return np.clip([float(abs(angle) < 0.5), 2.0 * angle] + 0.2 * held, -1.0, 1.0)
    # The car's front points along -y; the left wheel drives it round to the left.
    turn = np.clip(np.arctan2(x, -y), -1.0, 1.0)
    return np.clip([0.6 + turn, 0.6 - turn] + 0.3 * held, -1.0, 1.0)
