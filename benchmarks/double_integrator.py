"""Compare learned with exact values on the double integrator, at three time steps.

    python benchmarks/double_integrator.py            # 3 seeds, dt = 0.05, 0.02, 0.005; resumes

The script prints the mean of abs(V_h - exact) over the box, as a share of the distance between the
walls. It also prints the rank correlation over 16 accelerations between Q_h and its exact value, in
states with abs(V) < 0.1 m.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import machine, once, rank_correlation

import safeshield
from safeshield import OfflineDataset, SafeFQL, SafeFQLConfig
from safeshield.exact.double_integrator import action_value, value
from safeshield.spaces.shapes import Actions, Observations

TIME_STEPS = (0.05, 0.02, 0.005)
WALLS = 2.0  # Distance between the walls, in metres.
HORIZON = 20.0  # In seconds; the discount is exp(-dt / HORIZON).


class HeldAccelerations:
    """Random accelerations, held for 0.5 s on average; every other one is at full strength."""

    batched = True

    def __init__(self, dt: float) -> None:
        self._turn = dt / 0.5
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        """Discard the accelerations of the previous episodes."""
        self._held = np.zeros((0, 1))

    def __call__(self, observations: Observations, rng: np.random.Generator, /) -> Actions:
        """Return the accelerations (n, 1) in m/s^2."""
        count = len(observations)
        fresh = rng.uniform(-1.0, 1.0, (count, 1))
        fresh = np.where(rng.random((count, 1)) < 0.5, np.sign(fresh), fresh)
        if len(self._held) != count:
            self._held = fresh
        self._held = np.where(rng.random((count, 1)) < self._turn, fresh, self._held)
        return self._held


def config(dt: float, seed: int) -> SafeFQLConfig:
    """Return the settings for a time step; windows and discount are constant in seconds."""
    steps = [max(1, round(seconds / dt)) for seconds in (3.2, 0.8, 0.2, 0.05)]
    return SafeFQLConfig(
        seed=seed,
        safety_discount=float(np.exp(-dt / HORIZON)),
        safety_backup_steps=tuple(steps),
        phase_shares=(0.96, 0.02, 0.02),
    )


def log(dt: float, seed: int) -> OfflineDataset:
    """Collect 120,000 steps, from starts anywhere in the box."""
    env = gym.make("safeshield/DoubleIntegrator-v0", dt=dt)
    return safeshield.collect(env, HeldAccelerations(dt), episodes=600, seed=1000 + seed)


def run(dt: float, seed: int, steps: int) -> dict[str, Any]:
    """Train the critics, and compare them with the exact values."""
    torch.set_num_threads(1)
    shield = SafeFQL(config(dt, seed)).fit(log(dt, seed), steps=steps).shield()
    box = shield.observation_space
    grid = np.stack(
        np.meshgrid(
            np.linspace(-1.0, 1.0, 81), np.linspace(box.low[1], box.high[1], 81), indexing="ij"
        ),
        axis=-1,
    ).reshape(-1, 2)
    exact = value(grid, dt=dt)
    learned = np.asarray(shield.value(grid))
    rng = np.random.default_rng(0)
    near = rng.permutation(np.flatnonzero(np.abs(exact) < 0.1))[:400]
    actions = np.linspace(-1.0, 1.0, 16)[:, None]
    states = np.repeat(grid[near], 16, axis=0)
    tiled = np.tile(actions, (len(near), 1))
    q = np.asarray(shield.value(states, tiled)).reshape(-1, 16)
    q_exact = action_value(states, tiled, dt=dt).reshape(-1, 16)
    unsafe, truth = learned > 0, exact > 0
    return {
        "dt": dt,
        "seed": seed,
        "steps": steps,
        "mean_error_of_width": float(np.abs(learned - exact).mean() / WALLS),
        "order": rank_correlation(q, q_exact),
        "intersection_over_union": float((unsafe & truth).sum() / (unsafe | truth).sum()),
    }


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--dt", type=float, nargs="+", default=list(TIME_STEPS))
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    print(machine())
    print(f"{'dt':>6} {'seed':>4} {'error/width':>12} {'order':>7} {'IoU':>6}")
    for dt in arguments.dt:
        for seed in arguments.seeds:
            name = f"double_integrator_{dt}_{arguments.steps}_{seed}"
            row = once(name, lambda dt=dt, s=seed: run(dt, s, arguments.steps), redo=arguments.redo)
            print(
                f"{dt:>6} {seed:>4} {row['mean_error_of_width']:>12.2%} {row['order']:>7.3f} "
                f"{row['intersection_over_union']:>6.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
