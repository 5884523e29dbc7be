"""Compare a shield for a backup controller with the default shield of `ShieldTrainer`.

    python benchmarks/backup.py            # 3 tasks, 2 logs, 3 shields, 3 seeds; resumes
    python benchmarks/backup.py --fixed    # violations at fixed deltas instead
    python benchmarks/backup.py --table

The tasks are the double integrator (controller: brake), the boat (controller: steer away from the
nearer rock) and a drone that moves sideways by tilting (controller: level out and stop), whose
acceleration follows the action by two integrations more. The logs have 400 episodes of a careless
policy: alone ("without"), or with a hand-over to the controller at a random step ("with"). On the
double integrator the log "without" brakes at half strength only, so that it never shows what the
controller does. The shields are

    default     `ShieldTrainer` with its defaults: the value of the log's best actions, and the
                fallback that is learned
    executed    the same shield, which executes the controller in place of its fallback
    backup      `ShieldConfig(backup=...)`: the value of the controller, which is executed

Each is calibrated with the default proposers at epsilon 0.05 and confidence 0.95. A reckless agent
(speeds up in the direction of motion, or heads for the boat's goal), random actions and the
adversary then play 300 episodes each behind it, from certified starts. "exact set" is the share of
the exact safe set that is certified (for the drone: of the states from which its controller stays
safe, by simulation) and "unsafe" the number of points certified outside it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, once
from double_integrator import HeldAccelerations
from values_play import boat_points, cart_points

from safeshield import (
    CalibrationError,
    OfflineDataset,
    Shield,
    ShieldConfig,
    ShieldTrainer,
    collect,
)
from safeshield.calibration.proposers import Adversary
from safeshield.demo.agents import straight
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import ROCK_CENTRES, ROCK_RADII, BoatVectorEnv
from safeshield.envs.double_integrator import DoubleIntegratorVectorEnv
from safeshield.envs.task import Array, Frame, StateTask
from safeshield.envs.vector import StateVectorEnv
from safeshield.evaluation import evaluate
from safeshield.exact import boat_value
from safeshield.rollouts.policies import BatchPolicy, HandOver, batch_policy
from safeshield.shield.backup import register_backup
from safeshield.training.escape import UnseenBackupWarning
from safeshield.values.constraint import register_constraint

UPDATES, EPISODES, PLAYED, COPIES = 10_000, 400, 300, 100
EPSILON, CONFIDENCE = 0.05, 0.95
LOGS, SHIELDS = ("with", "without"), ("default", "executed", "backup")
AGENTS = ("reckless", "random", "adversary")
DELTAS = (0.0, 0.03, 0.1)  # In metres.


class DroneTask(StateTask):
    """A drone between two walls; state (x, v, tilt, rate), action the angular acceleration.

    x' = v, v' = 9.81 sin(tilt), tilt' = rate, rate' = 12 u, in steps of 0.04 s. h = abs(x) - 1, in
    metres. The reward is the speed.
    """

    dt = 0.04
    state_low = np.array([-1.5, -3.0, -0.8, -6.0])
    state_high = -state_low
    start_high = np.array([0.8, 1.5, 0.3, 1.0])
    action_size = 1
    max_episode_steps = 200
    render_fps = 25
    constraint_source = "benchmark-drone@1"

    def next_state(self, state: Array, action: Array) -> Array:
        """Return the states (..., 4) after one step, by the semi-implicit Euler method."""
        x, v, tilt, rate = np.moveaxis(np.asarray(state, np.float64), -1, 0)
        rate = rate + 12.0 * self.dt * np.clip(action[..., 0], -1.0, 1.0)
        tilt = tilt + self.dt * rate
        v = v + self.dt * 9.81 * np.sin(tilt)
        x = x + self.dt * v
        reached: Array = np.clip(np.stack([x, v, tilt, rate], -1), self.state_low, self.state_high)
        return reached

    def constraint(self, state: Array) -> Array:
        """Return h (...) in metres."""
        return np.asarray(np.abs(np.asarray(state, np.float64)[..., 0]) - 1.0)

    def reward(self, state: Array) -> Array:
        """Return the speed (...)."""
        return np.array(np.asarray(state, np.float64)[..., 1])

    def draw_start(self, generator: np.random.Generator) -> Array:
        """Return a start (4,), uniform in a box."""
        return generator.uniform(-self.start_high, self.start_high)

    def picture(self, trail: Sequence[Array]) -> Frame:
        """Return an empty picture."""
        return np.zeros((8, 8, 3), np.uint8)


@register_constraint("benchmark-drone@1")
def _walls(observations: np.ndarray) -> np.ndarray:
    return np.abs(observations[:, 0].astype(np.float64)) - 1.0


@register_backup("benchmark-brake@1")
def brake(observations: np.ndarray) -> np.ndarray:
    """Brake the cart as hard as possible, and stand still."""
    return -np.clip(observations[:, 1:] / 0.05, -1.0, 1.0)


@register_backup("benchmark-aside@1")
def aside(observations: np.ndarray) -> np.ndarray:
    """Steer the boat away from the rock whose edge is nearer."""
    offsets = observations[:, None] - ROCK_CENTRES
    distances = np.linalg.norm(offsets, axis=-1)
    nearer = (distances - ROCK_RADII).argmin(axis=1)
    each = np.arange(len(nearer))
    return np.asarray(offsets[each, nearer] / np.maximum(distances[each, nearer], 1e-9)[:, None])


def tilt_to(observations: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the drone's actions (n, 1) towards a tilt (n,)."""
    _, _, tilt, rate = observations.T
    return np.clip(4.0 * (wanted - tilt) - 0.9 * rate, -1.0, 1.0)[:, None]


@register_backup("benchmark-hover@1")
def hover(observations: np.ndarray) -> np.ndarray:
    """Tilt the drone against its speed, and level out."""
    return tilt_to(observations, np.clip(-0.45 * observations[:, 1], -0.5, 0.5))


class SoftBrake(HeldAccelerations):
    """The careless accelerations, at half strength where they brake."""

    def __call__(self, observations: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Return the accelerations (n, 1)."""
        held = super().__call__(observations, rng)
        return np.where(held * observations[:, 1:] < 0, 0.5 * held, held)


class HeldTilts(HeldAccelerations):
    """A careless pilot of the drone: random tilts that are held, and a pull to the middle."""

    def __call__(self, observations: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Return the actions (n, 1)."""
        tilts = 0.4 * super().__call__(observations, rng)[:, 0]
        tilts = tilts - 0.3 * observations[:, 0] - 0.25 * observations[:, 1]
        noise = rng.normal(0.0, 0.5, (len(observations), 1))
        return np.clip(tilt_to(observations, tilts) + noise, -1.0, 1.0)


@dataclass(frozen=True)
class Plant:
    """A task with its controller, its log's policies and its points of known value."""

    envs: Callable[[], Any]
    backup: str
    controller: Callable[[np.ndarray], np.ndarray]
    careless: Callable[[], Any]
    unseen: Callable[[], Any]
    reckless: BatchPolicy
    points: Callable[[], tuple[np.ndarray, np.ndarray]]


def drone_points() -> tuple[np.ndarray, np.ndarray]:
    """Return 20,000 starts of the drone, and the greatest h behind its controller."""
    task = DroneTask()
    points = np.random.default_rng(0).uniform(-task.start_high, task.start_high, (20_000, 4))
    states, worst = points, task.constraint(points)
    for _ in range(400):
        states = task.next_state(states, hover(states))
        worst = np.maximum(worst, task.constraint(states))
    return points, worst


PLANTS = {
    "cart": Plant(
        lambda: DoubleIntegratorVectorEnv(COPIES),
        "benchmark-brake@1",
        brake,
        lambda: HeldAccelerations(0.05),
        lambda: SoftBrake(0.05),
        batch_policy(lambda observations, _: np.sign(observations[:, 1:])),
        cart_points,
    ),
    "boat": Plant(
        lambda: BoatVectorEnv(COPIES),
        "benchmark-aside@1",
        aside,
        Helmsmen,
        Helmsmen,
        straight,
        lambda: boat_points(boat_value()),
    ),
    "drone": Plant(
        lambda: StateVectorEnv(DroneTask(), COPIES, max_episode_steps=200),
        "benchmark-hover@1",
        hover,
        lambda: HeldTilts(0.04),
        lambda: HeldTilts(0.04),
        batch_policy(lambda obs, _: tilt_to(obs, 0.5 * np.sign(obs[:, 1]))),
        drone_points,
    ),
}


def log_of(task: str, which: str, seed: int) -> OfflineDataset:
    """Collect a log of a task."""
    plant = PLANTS[task]
    envs = plant.envs()
    policy = plant.unseen()
    if which == "with":
        steps = 0.3 * (400 if task == "boat" else 200)
        policy = HandOver(plant.careless(), plant.controller, envs.single_action_space, steps)
    return collect(envs, policy, EPISODES, seed)


def trained(task: str, which: str, shield: str, seed: int, folder: Path) -> Shield:
    """Train the shield of a cell, or read it from its file if there is one."""
    backup = PLANTS[task].backup if shield == "backup" else None
    path = folder / f"backup_{task}_{which}_{'default' if backup is None else shield}_{seed}.st"
    if not path.exists():
        config = ShieldConfig(seed=seed, backup=backup, critic_hidden=(64, 64))
        trainer = ShieldTrainer(config, device="cpu")
        folder.mkdir(parents=True, exist_ok=True)
        trainer.fit(log_of(task, which, seed), steps=UPDATES).shield().save(path)
    found = Shield.load(path)
    return found.with_backup(PLANTS[task].backup) if shield == "executed" else found


def played(task: str, shield: Shield, seed: int) -> dict[str, list[Any]]:
    """Return violating episodes, share replaced and mean return of each agent."""
    plant = PLANTS[task]
    told = {}
    for name in AGENTS:
        agent = {"reckless": plant.reckless, "random": "random", "adversary": Adversary(shield)}
        result = evaluate(
            plant.envs(), agent[name], PLAYED, seed, shield=shield, starts="certified"
        )
        told[name] = [result.violating, result.intervention_rate, result.mean_return]
    return told


def fixed(task: str, which: str, shield: str, seed: int, folder: Path) -> dict[str, Any]:
    """Let the agents play behind one shield at deltas that are not calibrated."""
    found = trained(task, which, shield, seed, folder)
    row: dict[str, Any] = {"task": task, "log": which, "shield": shield, "seed": seed}
    row["agents"] = {str(d): played(task, found.with_delta(d), 2_000_000 + seed) for d in DELTAS}
    return row


def fixed_table(rows: list[dict[str, Any]]) -> None:
    """Print the violating episodes at fixed deltas, one line for each shield."""
    for row in rows:
        told = [
            f"delta {delta}: " + ", ".join(str(agents[name][0]) for name in AGENTS)
            for delta, agents in row["agents"].items()
        ]
        name = f"{row['task']} | {row['log']} | {row['shield']} | seed {row['seed']}"
        print(f"| {name} | {' | '.join(told)} |")


def cell(task: str, which: str, shield: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train, calibrate and test one shield."""
    plant = PLANTS[task]
    found = trained(task, which, shield, seed, folder)
    row: dict[str, Any] = {"task": task, "log": which, "shield": shield, "seed": seed}
    points, truth = plant.points()
    values = found.row_values(points.astype(np.float32))
    row["value_error"] = float(np.abs(values - truth).mean())
    row["unsafe_at_0"] = float(((values <= 0) & (truth > 0)).sum() / (truth > 0).sum())
    try:
        found = found.calibrate(plant.envs(), epsilon=EPSILON, confidence=CONFIDENCE, seed=seed)
    except CalibrationError as error:
        return {**row, "delta": None, "error": str(error)[:300]}
    certified = values <= found.threshold
    row["delta"] = found.delta
    row["certified"] = float(certified[truth <= 0].mean())
    row["unsafe_certified"] = int((certified & (truth > 0)).sum())
    row["agents"] = played(task, found, 1_000_000 + seed)
    return row


def table(rows: list[dict[str, Any]]) -> None:
    """Print the means and counts over the seeds."""
    print(
        "| task | log | shield | delta | exact set | unsafe points certified | violating of "
        f"{PLAYED}: {', '.join(AGENTS)} | replaced | return of reckless |"
    )
    for task in PLANTS:
        for which in LOGS:
            for shield in SHIELDS:
                cells = [
                    row
                    for row in rows
                    if (row["task"], row["log"], row["shield"]) == (task, which, shield)
                ]
                good = [row for row in cells if row["delta"] is not None]
                if not cells:
                    continue
                told = [f"{task} | {which} | {shield}"]
                told.append(
                    ", ".join("none" if r["delta"] is None else f"{r['delta']:.3f}" for r in cells)
                )
                told.append(", ".join(f"{row['certified']:.1%}" for row in good))
                told.append(", ".join(str(row["unsafe_certified"]) for row in good))
                for k, form in ((0, "{:d}"), (1, "{:.1%}")):
                    told.append(
                        "; ".join(
                            ", ".join(form.format(row["agents"][name][k]) for row in good)
                            for name in AGENTS
                        )
                    )
                told.append(", ".join(f"{row['agents']['reckless'][2]:.1f}" for row in good))
                print("| " + " | ".join(told) + " |")


def main() -> None:
    """Run the cells without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(PLANTS), choices=list(PLANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shields", nargs="+", default=list(SHIELDS), choices=list(SHIELDS))
    parser.add_argument("--folder", type=Path, default=RESULTS / "backup")
    parser.add_argument("--fixed", action="store_true", help="play at fixed deltas")
    parser.add_argument("--logs", nargs="+", default=list(LOGS), choices=list(LOGS))
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", UnseenBackupWarning)
    rows = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for which in arguments.logs:
                for shield in arguments.shields:
                    name = f"backup_{task}_{which}_{shield}_{seed}" + "_fixed" * arguments.fixed
                    path = arguments.folder / f"{name}.json"
                    if arguments.table and not path.exists():
                        continue
                    work = fixed if arguments.fixed else cell
                    compute = partial(work, task, which, shield, seed, arguments.folder)
                    rows.append(once(name, compute, folder=arguments.folder))
                    if not arguments.table:
                        print(json.dumps(rows[-1]), flush=True)
    print(machine())
    (fixed_table if arguments.fixed else table)(rows)


if __name__ == "__main__":
    main()
