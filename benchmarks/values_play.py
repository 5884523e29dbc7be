"""Deployment rules, reckless agents and the judges of `values.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from suites import Normalised, learn
from values_train import BOAT, CART

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield import OfflineDataset, Shield
from safeshield.demo.helmsmen import RECKLESS, Helmsmen
from safeshield.envs.boat import ROCK_CENTRES, STATE_HIGH, STATE_LOW, BoatTask, constraint
from safeshield.envs.boat import next_state as sail
from safeshield.envs.double_integrator import DoubleIntegratorTask
from safeshield.envs.task import StateTask
from safeshield.exact.double_integrator import value as cart_value
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.protocols import ShieldMemory
from safeshield.shield.replacement import (
    FallbackPolicy,
    NearestAcceptable,
    Rejected,
    nearest_acceptable,
)
from safeshield.shield.report import FilterReport
from safeshield.shield.runtime import ShieldRuntime
from safeshield.suites.logged import SOURCES
from safeshield.suites.tasks import COST_LIMIT, find_task

NEAR = 6.0
"""Steps count as near the boundary where abs(V_h) is below this many margins."""
WINDOWS = (1, 8, 32, 128)
"""Lengths of the running sums, in steps."""
WORST_RULES = ("nearest", "escape", "nearest-escape")
"""Rules against which the worst agent is computed."""
DIRECTIONS = 24
"""Number of courses among which the worst agent of the boat chooses."""
CELL = 0.025
"""Width of a cell of the worst agent's grid, in metres."""
UPSTREAM = -2.4
"""Least x of that grid, in metres; the boat drifts downstream to it."""
PATIENCE = 0.99
"""Discount, per step, of the worst agent's value."""


# -- the exact constraint ------------------------------------------------------------------------


def exact(shield: Shield, task: str) -> Shield:
    """Return a shield that computes h of an observation with the task's named source."""
    name = {BOAT: "Boat@1", CART: "DoubleIntegrator@1"}.get(task) or SOURCES[task]
    return shield.with_constraint(name)


def margin_of(shield: Shield) -> float:
    """Return the margin of the agents' gate in units of h, as `ValueConfig.margin_of` does."""
    scale = shield.model.scale
    return max(0.058 * scale.spread, scale.step_rms)


# -- deployment rules ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Safest:
    """Execute the safest draw of the behaviour, or a default candidate where that is unacceptable.

    What is acceptable depends on `delta` alone, also while a memory rejects every proposal.
    """

    delta: float
    count: int = 16

    def choose(self, rejected: Rejected, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions and their Q_h."""
        model = rejected.model
        width = model.behaviour_noise_features
        noise = np.random.default_rng(0).standard_normal((self.count, width))
        shape = (len(rejected.rows), *noise.shape)
        drawn, _ = rejected.inside(model.behaviour(rejected.states, np.broadcast_to(noise, shape)))
        values = rejected.values(drawn)
        best = values.argmin(axis=1)
        each = np.arange(len(best))
        actions, lowest = drawn[each, best], values[each, best]
        limit = np.full(len(best), -self.delta)
        missing = np.flatnonzero(~(lowest <= limit))
        if len(missing):
            part = dataclasses.replace(rejected.take(missing), limit=limit[missing])
            others, other_values = NearestAcceptable().choose(part)
            lower = other_values < lowest[missing]
            actions[missing[lower]] = others[lower]
            lowest[missing[lower]] = other_values[lower]
        return actions, lowest


@dataclass(frozen=True)
class Escape:
    """Execute the fallback actor's action for z = 0, acceptable or not.

    The other strategies compare candidates anew in every state, and the best of them may change
    from step to step. The fallback is a continuous function of the state.
    """

    def choose(self, rejected: Rejected, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions and their Q_h."""
        own, _ = rejected.inside(rejected.model.fallback_alone(rejected.states)[:, None])
        return own[:, 0], rejected.values(own)[:, 0]


@dataclass(frozen=True)
class NearestElseEscape:
    """Execute the nearest acceptable candidate, or the fallback where none is acceptable."""

    def choose(self, rejected: Rejected, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions and their Q_h."""
        actions, values = NearestAcceptable().choose(rejected)
        own, own_values = Escape().choose(rejected)
        lost = ~(values <= rejected.limit)
        return np.where(lost[:, None], own, actions), np.where(lost, own_values, values)


class Hold:
    """Reject every proposal after an intervention, until V_h <= -2 delta."""

    def __init__(self, count: int, delta: float) -> None:
        self._held, self._release = np.zeros(count, bool), -2.0 * delta

    def reset(self, mask: np.ndarray, /) -> None:
        """See `ShieldMemory`."""
        self._held = self._held & ~mask

    def limit(self, values: np.ndarray, threshold: np.ndarray, /) -> np.ndarray:
        """See `ShieldMemory`."""
        return np.where(self._held, -np.inf, threshold)

    def learn(self, report: FilterReport, reached: np.ndarray, counted: np.ndarray, /) -> None:
        """See `ShieldMemory`."""
        self._held = (self._held | report.intervened) & (reached > self._release)


class Kappa:
    """Accept only where Q_h <= V_h + kappa (-delta - V_h), so that the shield brakes early."""

    def __init__(self, kappa: float = 0.2) -> None:
        self._kappa = kappa

    def reset(self, mask: np.ndarray, /) -> None:
        """See `ShieldMemory`."""

    def limit(self, values: np.ndarray, threshold: np.ndarray, /) -> np.ndarray:
        """See `ShieldMemory`."""
        known = np.where(np.isfinite(values), values, threshold)
        return np.minimum(threshold, known + self._kappa * (threshold - known))

    def learn(self, report: FilterReport, reached: np.ndarray, counted: np.ndarray, /) -> None:
        """See `ShieldMemory`."""


Rule = Callable[[Shield, float, int], tuple[Shield, ShieldMemory | None]]
"""Function (shield, delta, environments) -> the shield that acts, and its memory."""
RULES: dict[str, Rule] = {
    "nearest": lambda shield, delta, n: (shield.with_delta(delta), None),
    "escape": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(Escape()),
        None,
    ),
    "nearest-escape": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(NearestElseEscape()),
        None,
    ),
    "fallback": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(FallbackPolicy()),
        None,
    ),
    "safest": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(Safest(delta)),
        None,
    ),
    "hold": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(Safest(delta)),
        Hold(n, delta),
    ),
    "escape-hold": lambda shield, delta, n: (
        shield.with_delta(delta).with_replacement(Escape()),
        Hold(n, delta),
    ),
    "kappa": lambda shield, delta, n: (shield.with_delta(delta), Kappa()),
}


# -- reckless agents and worlds ------------------------------------------------------------------


class RecklessHelmsmen(Helmsmen):
    """The demo's reckless helmsmen alone, who steer at a rock."""

    def _board(self, count: int, rng: np.random.Generator) -> None:
        super()._board(count, rng)
        self._kind = np.full(count, RECKLESS)


def pusher(observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the acceleration towards the nearer wall."""
    return np.where(observations[:, :1] < 0.0, -1.0, 1.0)


class World(Protocol):
    """Copies of an environment that step together, each for one episode."""

    horizon: int

    def start(
        self, certified: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
    ) -> tuple[np.ndarray, float]:
        """Return certified first observations (n, obs), and the share of starts certified."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return observations, rewards, costs and whether the episode ended (n, ...)."""
        ...


class StateWorld:
    """The world of a `StateTask`, whose observation is the state."""

    def __init__(self, task: StateTask) -> None:
        self._task, self.horizon = task, task.max_episode_steps

    def start(
        self, certified: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
    ) -> tuple[np.ndarray, float]:
        """See `World`."""
        rng = np.random.default_rng(seed)
        states = np.stack([self._task.draw_start(rng) for _ in range(20 * episodes)])
        good = certified(states.astype(np.float32))
        self.states = states[good][:episodes]
        return self.states.astype(np.float32), float(good.mean())

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `World`."""
        rewards = self._task.reward(self.states)
        self.states = self._task.next_state(self.states, actions.astype(np.float64))
        costs = (self._task.constraint(self.states) > 0).astype(float)
        return self.states.astype(np.float32), rewards, costs, np.zeros(len(costs), bool)


class SuiteWorld:
    """The world of a benchmark task, one environment after another."""

    def __init__(self, task: str) -> None:
        self._task, self._envs = find_task(task), []
        self.horizon = self._task.horizon

    def start(
        self, certified: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
    ) -> tuple[np.ndarray, float]:
        """See `World`; at most 20 starts are drawn for each episode."""
        rng, drawn, rows = np.random.default_rng(seed), 0, []
        while len(rows) < episodes and drawn < 20 * episodes:
            if len(self._envs) == len(rows):
                self._envs.append(gym.make(self._task.env_id))
            first, _ = self._envs[len(rows)].reset(seed=int(rng.integers(2**31 - 1)))
            drawn += 1
            if certified(np.asarray(first)[None])[0]:
                rows.append(np.asarray(first))
        self._over = np.zeros(len(rows), bool)
        self._last = np.array(rows)
        return self._last.copy(), len(rows) / drawn

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `World`."""
        rewards, costs = np.zeros(len(actions)), np.zeros(len(actions))
        for i in np.flatnonzero(~self._over):
            seen, reward, terminated, truncated, info = self._envs[i].step(actions[i])
            self._last[i], rewards[i], costs[i] = seen, reward, info["cost"]
            self._over[i] = terminated or truncated
        return self._last.copy(), rewards, costs, self._over.copy()


Agent = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def world_and_agent(task: str, seed: int, folder: Path) -> tuple[World, Agent]:
    """Return a task's world and its reckless agent, trained now or read from its file."""
    if task == BOAT:
        return StateWorld(BoatTask()), RecklessHelmsmen()
    if task == CART:
        return StateWorld(DoubleIntegratorTask()), pusher
    path = folder / f"{task}_ppo_{seed}.safetensors"
    if not path.with_suffix(".npz").exists():
        learn(task, seed, path)
    agent = Normalised(path)
    return SuiteWorld(task), lambda observations, rng: agent.predict(observations)[0]


# -- the judges ----------------------------------------------------------------------------------


def play(
    shield: Shield,
    rule: str,
    delta: float,
    world: World,
    agent: Agent,
    episodes: int,
    seed: int,
) -> dict[str, float]:
    """Run a reckless agent behind the shield, from certified starts, and return the measures."""
    margin, sigma = margin_of(shield), shield.model.scale.step_rms
    rng = np.random.default_rng(seed)

    def certified(rows: np.ndarray) -> np.ndarray:
        return shield.row_values(rows) <= -delta

    observations, share = world.start(certified, episodes, seed)
    count = len(observations)
    if not count:
        return {"episodes": 0, "certified_starts": share}
    acting, memory = RULES[rule](shield, delta, count)
    runtime = ShieldRuntime(acting, count, memory=memory)
    infos: list[dict[str, Any]] = [{}] * count
    runtime.observe(observations, infos, True)
    steps: list[tuple[np.ndarray, ...]] = []
    alive = np.ones(count, bool)
    for _ in range(world.horizon):
        here = np.asarray(runtime.values)
        decision = runtime.filter(np.asarray(agent(observations, rng), np.float32))
        with runtime.transition:
            observations, rewards, costs, over = world.step(decision.executed)
        runtime.observe(observations, infos)
        runtime.update()
        after = np.asarray(runtime.values)
        part = (here, decision.value, decision.intervened, after, rewards, costs, alive)
        steps.append(tuple(np.asarray(one).copy() for one in part))
        alive = alive & ~over
        if not alive.any():
            break
    here, value, replaced, after, rewards, costs, alive = map(np.array, zip(*steps, strict=True))
    rewards, costs = rewards * alive, costs * alive
    violated = costs > 0
    before = np.concatenate([np.zeros((1, count), bool), violated[:-1]])
    entered, lost = violated & ~before, (value > -delta) & alive
    handed = ~lost[:-1] & lost[1:]
    near = alive & (np.abs(here) < NEAR * margin) & np.isfinite(after)
    jumps = np.where(near, after - value, 0.0) / sigma
    total = np.concatenate([np.zeros((1, count)), np.cumsum(jumps, axis=0)])
    sums = {
        f"sum_{n}": float(np.quantile((total[m:] - total[:-m]).max(axis=0), 0.95))
        for n, m in ((n, min(n, len(jumps))) for n in WINDOWS)
    }
    return {
        "episodes": count,
        "certified_starts": share,
        "violating": int(violated.any(axis=0).sum()),
        "cost": float(costs.sum(axis=0).mean()) / COST_LIMIT,
        "return": float(rewards.sum(axis=0).mean()),
        "replaced": float(replaced[alive].mean()),
        "lost": float(lost[alive].mean()),
        "handovers": 1000.0 * float(handed.sum() / alive.sum()),
        "blind": int((entered & ~replaced & ~lost).sum()),
        "misreplaced": int((entered & replaced & ~lost).sum()),
        "late": int((entered & lost).sum()),
        **sums,
    }


def on_the_log(shield: Shield, log: OfflineDataset) -> dict[str, float]:
    """Compare V_h of the log's states with the greatest h of the rest of their episodes."""
    values = np.concatenate(
        [shield.row_values(part) for part in np.array_split(log.observations, 64)]
    )
    worst = np.maximum(log.constraints, log.next_constraints).astype(np.float64)
    starts = log.episode_starts
    for first, length in zip(starts, log.episode_lengths, strict=True):
        part = slice(first, first + length)
        worst[part] = np.maximum.accumulate(worst[part][::-1])[::-1]
    sigma = shield.model.scale.step_rms
    near = np.abs(values) < NEAR * margin_of(shield)
    return {
        "pessimism": float((values > worst + 0.1 * sigma).mean()),
        "pessimism_near": float((values > worst + 0.1 * sigma)[near].mean()),
        "called_unsafe": float((values > 0).mean()),
        "violates_later": float((worst > 0).mean()),
        "margin": margin_of(shield),
        "step_rms": sigma,
    }


def sets(shield: Shield, points: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare the learned safe set with the exact one (V <= 0) on points (n, obs)."""
    learned = shield.row_values(points.astype(np.float32))
    unsafe, bad = learned > 0, truth > 0
    needed = max(0.0, float(-learned[bad].min()))
    # The least float32 above it certifies none of them.
    delta = float(np.nextafter(np.float32(needed), np.float32(np.inf))) if needed else 0.0
    return {
        "needed_delta": delta,
        "certified_share": float((learned[~bad] <= -delta).mean()),
        "intersection_over_union": float((unsafe & bad).sum() / (unsafe | bad).sum()),
    }


def boat_points(truth: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a grid over the boat's box, and the exact value there."""
    xs, ys = np.linspace(STATE_LOW[0], STATE_HIGH[0], 251), np.linspace(-2.0, 2.0, 201)
    points = np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, truth(points)


def cart_points() -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a grid over the starts of the cart, and the exact value there."""
    task = DoubleIntegratorTask()
    speeds = np.linspace(task.state_low[1], task.state_high[1], 161)
    grid = np.meshgrid(np.linspace(-1.0, 1.0, 161), speeds, indexing="ij")
    points = np.stack(grid, axis=-1).reshape(-1, 2)
    return points, cart_value(points, dt=task.dt)


# -- the worst agent of the boat -----------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A grid of boat positions, with bilinear weights that leave out the rocks."""

    xs: np.ndarray
    ys: np.ndarray

    @property
    def points(self) -> np.ndarray:
        """(nx * ny, 2) the positions."""
        return np.stack(np.meshgrid(self.xs, self.ys, indexing="ij"), -1).reshape(-1, 2)

    def corners(self, states: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return indices and weights (n, 4) of the grid points around states (n, 2).

        Points that are not usable have the weight 0, and the others share it.
        """
        at = (states - [self.xs[0], self.ys[0]]) / CELL
        low = np.clip(np.floor(at).astype(np.int64), 0, [len(self.xs) - 2, len(self.ys) - 2])
        x, y = np.clip(at - low, 0.0, 1.0).T
        first = low[:, 0] * len(self.ys) + low[:, 1]
        index = first[:, None] + np.array([0, 1, len(self.ys), len(self.ys) + 1])
        weights = np.stack([(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y], -1)
        weights = weights * usable[index]
        total = weights.sum(axis=1, keepdims=True)
        return index, weights / np.where(total > 0.0, total, 1.0)


def replacements(
    shield: Shield, rule: str, points: np.ndarray, courses: np.ndarray, deltas: tuple[float, ...]
) -> np.ndarray:
    """Return what a rule of `WORST_RULES` executes of m courses in n states: (deltas, n, m, 2).

    The result is that of `Shield.filter` for each delta. Candidates that do not depend on the
    proposed action are judged once for each state.
    """
    model, width = shield.model, len(courses)
    whole = CandidateSet()
    kept = np.empty((len(deltas), len(points), width, 2), np.float32)
    for part in np.array_split(np.arange(len(points)), max(1, len(points) // 1000)):
        states = model.states(points[part].astype(np.float32))
        nothing = np.zeros((len(part), 2), np.float32)
        common = dataclasses.replace(whole, around=0).actions(model, states, nothing)
        common_values = model.candidate_values(states, common)
        wanted = np.broadcast_to(courses.astype(np.float32), (len(part), width, 2))
        values = model.candidate_values(states, wanted)
        kept[:, part] = wanted
        row, column = np.nonzero(values > -max(deltas))
        if not len(row):
            continue
        asked = wanted[row, column]
        own = np.clip(model.fallback_alone(states), -1.0, 1.0)[row]
        if rule == "escape":
            for k, delta in enumerate(deltas):
                rejected = values[row, column] > -delta
                kept[k, part[row[rejected]], column[rejected]] = own[rejected]
            continue
        near = dataclasses.replace(whole, fallback=1, box=0)
        around = near.actions(model, states.take(row), asked)[:, 1:]
        around_values = model.candidate_values(states.take(row), around)
        options = np.concatenate([asked[:, None], common[row], around], axis=1)
        judged = np.concatenate(
            [values[row, column, None], common_values[row], around_values], axis=1
        )
        scaled = model.scaling.actions(options)
        for k, delta in enumerate(deltas):
            best = nearest_acceptable(scaled, judged, np.full(len(row), -delta))
            rejected = values[row, column] > -delta
            each = np.arange(len(row))
            picked = options[each, best]
            if rule == "nearest-escape":
                lost = judged[each, best] > -delta
                picked = np.where(lost[:, None], own, picked)
            kept[k, part[row[rejected]], column[rejected]] = picked[rejected]
    return kept


def all_courses() -> np.ndarray:
    """Return the courses (DIRECTIONS, 2) among which an agent chooses, as unit vectors."""
    angles = np.arange(DIRECTIONS) * (2.0 * np.pi / DIRECTIONS)
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def worst_agents(
    shield: Shield, rule: str, deltas: tuple[float, ...], episodes: int, seed: int
) -> dict[str, Any]:
    """Find the boat's worst agent by dynamic programming for each delta, and let it play.

    The agent knows the exact dynamics and the shield, which is inside every transition. Its value
    is 1 in a rock and otherwise PATIENCE times the greatest value that a course leads to. It is
    computed on a grid upstream of the last rock. The agent takes the course of the greatest
    interpolated value, from certified starts that are uniform in the box. The rule
    is one of `WORST_RULES`, which have no memory.
    """
    end = ROCK_CENTRES[:, 0].max() + 0.6
    grid = Grid(np.arange(UPSTREAM, end + CELL, CELL), np.arange(-2.0, 2.0 + CELL / 2, CELL))
    points = grid.points
    free = constraint(points) <= 0
    courses = all_courses()
    executed = replacements(shield, rule, points[free], courses, deltas)
    found = {}
    for k, delta in enumerate(deltas):
        moved = sail(points[free][:, None], executed[k])
        table = _table(grid, free, moved)
        acting, _ = RULES[rule](shield, delta, 1)
        found[f"{delta:g}"] = _voyages(acting, grid, table, courses, episodes, seed)
    return {"episodes": episodes, "violating": found}


def _table(grid: Grid, free: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return the value (points, courses) of the courses that lead to `moved` (free, courses, 2)."""
    count, width, _ = moved.shape
    flat = moved.reshape(-1, 2)
    index, share = grid.corners(flat, free)
    # Beyond the grid there is no rock to come.
    share = (share * (flat[:, :1] <= grid.xs[-1])).astype(np.float32)
    index = index.astype(np.int32)
    hit = (constraint(flat) > 0).reshape(count, width)
    value, table = np.zeros(len(free), np.float32), np.zeros((len(free), width), np.float32)
    for _ in range(1000):
        gained = np.einsum("nk,nk->n", value[index], share).reshape(count, width)
        table[free] = np.where(hit, 1.0, PATIENCE * gained)
        newest = table.max(axis=1)
        change = np.abs(newest - value).max()
        value = newest
        if change < 1e-5:
            break
    return table


def _voyages(
    shield: Shield, grid: Grid, table: np.ndarray, courses: np.ndarray, episodes: int, seed: int
) -> int:
    """Return how many episodes of the agent that follows a table violate, behind a shield."""
    world = StateWorld(BoatTask())
    world.start(lambda rows: shield.row_values(rows) <= shield.threshold, episodes, seed)
    states, free = world.states.copy(), constraint(grid.points) <= 0
    violated = np.zeros(len(states), bool)
    for _ in range(world.horizon):
        going = np.flatnonzero(~violated & (states[:, 0] <= grid.xs[-1]))
        if not len(going):
            break
        into, share = grid.corners(states[going], free)
        gained = np.einsum("nkc,nk->nc", table[into], share)
        rows = states[going].astype(np.float32)
        chosen = courses[gained.argmax(axis=1)].astype(np.float32)
        actions, _ = shield.filter(rows, chosen)
        states[going] = sail(states[going], actions)
        violated[going] = constraint(states[going]) > 0
    return int(violated.sum())
