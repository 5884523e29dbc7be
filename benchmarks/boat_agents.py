"""Calibrate the boat's shield, and test it with agents that know the exact dynamics.

    python benchmarks/boat_agents.py          # seeds 0, 1, 2; resumes; prints the table

Each seed has 600 logged trips of the helmsmen, a shield of `ShieldTrainer` with its defaults
(20,000 updates), and a calibration for the default proposers at epsilon 0.01 and confidence 0.99.
These agents play behind the shield from certified starts that are uniform in the box:

    straight, random, adversary
                  1,000 episodes each; the first two and the calibration's adversary
    ridge         2,000 episodes; knows the dynamics and the shield, and asks the shield what it
                  would execute for each of 24 courses. It takes the course that leads nearest to
                  the line upstream of the next rock's centre, where left and right are equally good
    worst         2,000 episodes; the agent that dynamic programming finds (`values_play`)

The promise covers the policies that were calibrated (random and adversary). The other figures are
measurements. Further columns compare the certified set with the exact safe set, and the share
of replaced actions of "straight" with that at the most permissive threshold of a finer grid (8
steps from 0 to the chosen delta) behind which at most 1% of 1,000 episodes of each of the
first three agents violate.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS, machine, once
from values_play import DIRECTIONS, StateWorld, all_courses, boat_points, worst_agents

import safeshield
from safeshield import Shield, ShieldConfig, ShieldTrainer
from safeshield.calibration.proposers import Adversary
from safeshield.demo.agents import straight
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import ROCK_CENTRES, BoatTask, constraint
from safeshield.evaluation import Evaluation, evaluate
from safeshield.exact import boat_value

BOAT = "safeshield/Boat-v0"
UPDATES, TRIPS = 20_000, 600
EPSILON, CONFIDENCE = 0.01, 0.99
EPISODES, LONG = 1_000, 2_000
FINE = 8


def calibrated(seed: int, folder: Path) -> Shield:
    """Train and calibrate the shield of a seed, or read it from its file if there is one."""
    path = folder / f"boat_agents_{seed}.safetensors"
    if not path.exists():
        env = gym.make(BOAT)
        log = safeshield.collect(env, Helmsmen(), episodes=TRIPS, seed=seed)
        trainer = ShieldTrainer(ShieldConfig(seed=seed), device="cpu").fit(log, steps=UPDATES)
        shield = trainer.calibrate(env, epsilon=EPSILON, confidence=CONFIDENCE, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        shield.save(path)
    return Shield.load(path)


def ridge(shield: Shield, episodes: int, seed: int) -> int:
    """Return how many episodes of the ridge agent violate behind the shield."""
    task = BoatTask()
    world = StateWorld(task)
    world.start(lambda rows: shield.row_values(rows) <= shield.threshold, episodes, seed)
    courses = all_courses().astype(np.float32)
    states = world.states
    violated = np.zeros(len(states), bool)
    for _ in range(world.horizon):
        going = np.flatnonzero(~violated & (states[:, 0] <= ROCK_CENTRES[:, 0].max()))
        if not len(going):
            break
        rows = np.repeat(states[going].astype(np.float32), DIRECTIONS, axis=0)
        executed, _ = shield.filter(rows, np.tile(courses, (len(going), 1)))
        reached = task.next_state(rows.astype(np.float64), executed.astype(np.float64))
        reached = reached.reshape(len(going), DIRECTIONS, 2)
        # The next rock is the nearest whose centre lies downstream.
        ahead = ROCK_CENTRES[None, :, 0] - states[going][:, :1]
        rock = np.where(ahead >= 0.0, ahead, np.inf).argmin(axis=1)
        aside = np.abs(reached[..., 1] - ROCK_CENTRES[rock, 1][:, None])
        states[going] = reached[np.arange(len(going)), aside.argmin(axis=1)]
        violated[going] = constraint(states[going]) > 0
    return int(violated.sum())


def play(shield: Shield, seed: int) -> dict[str, Evaluation]:
    """Return the results of the three agents that do not know the dynamics."""
    agents = {"straight": straight, "random": "random", "adversary": Adversary(shield)}
    return {
        name: evaluate(
            gym.make(BOAT), agent, EPISODES, 1_000_000 + seed, shield=shield, starts="certified"
        )
        for name, agent in agents.items()
    }


def replaced(result: Evaluation) -> float:
    """Return the share of replaced actions of a shielded agent."""
    assert result.intervention_rate is not None
    return result.intervention_rate


def permissive(shield: Shield, seed: int, share: float) -> tuple[float, float]:
    """Return the most permissive threshold of the fine grid, and the share replaced there.

    `share` is that of `straight` at the shield's own threshold.
    """
    for delta in np.linspace(0.0, shield.delta, FINE, endpoint=False):
        played = play(shield.with_delta(float(delta)), seed)
        if max(one.violating for one in played.values()) <= EPSILON * EPISODES:
            return float(delta), replaced(played["straight"])
    return shield.delta, share


def cell(seed: int, folder: Path, fine: bool) -> dict[str, Any]:
    """Calibrate a shield and let every agent play behind it."""
    shield = calibrated(seed, folder)
    points, truth = boat_points(boat_value())
    certified = shield.row_values(points.astype(np.float32)) <= shield.threshold
    played = play(shield, seed)
    row: dict[str, Any] = {"seed": seed, "delta": shield.delta}
    row["certified"] = float(certified[truth <= 0].mean())
    row["unsafe_certified"] = int((certified & (truth > 0)).sum())
    row["violating"] = {name: one.violating for name, one in played.items()}
    row["ridge"] = ridge(shield, LONG, seed)
    # `values_play` calls the rule of `CommittedFallback` "escape".
    worst = worst_agents(shield, "escape", (shield.delta,), LONG, seed)
    row["worst"] = next(iter(worst["violating"].values()))
    row["replaced"] = replaced(played["straight"])
    if fine:
        row["fine_delta"], row["fine_replaced"] = permissive(shield, seed, row["replaced"])
    return row


def main() -> None:
    """Run the seeds without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=RESULTS / "boat_agents")
    parser.add_argument("--no-fine", action="store_true", help="leave out the finer grid")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    print("| seed | delta | exact safe set certified | unsafe points certified | straight, random, "
          "adversary | ridge | worst | replaced | finest delta, replaced |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        row = once(
            f"seed_{seed}",
            lambda s=seed: cell(s, arguments.folder, not arguments.no_fine),
            folder=arguments.folder,
        )
        counts = ", ".join(str(count) for count in row["violating"].values())
        fine = "-"
        if "fine_delta" in row:
            fine = f"{row['fine_delta']:.3g}, {row['fine_replaced']:.1%}"
        print(f"| {seed} | {row['delta']:.3g} | {row['certified']:.1%} | "
              f"{row['unsafe_certified']} | {counts} of {EPISODES} | "
              f"{row['ridge']} of {LONG} | {row['worst']} of {LONG} | "
              f"{row['replaced']:.1%} | {fine} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
