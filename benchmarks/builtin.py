"""Make the ready-made shields that the package contains.

    python benchmarks/builtin.py                  # both, into safeshield/shield/builtin/
    python benchmarks/builtin.py pendulum --out FOLDER

Their networks are small, so that the files are. `Shield.builtin(name)` loads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from safeshield import Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.wrappers import ConstraintFromFunction

SMALL: dict[str, Any] = {
    "seed": 0, "critic_hidden": (64, 64), "behaviour_hidden": (32, 32), "fallback_hidden": (32, 32),
    "learning_rate": 2e-3,
}  # fmt: skip
FOLDER = Path(__file__).parents[1] / "safeshield" / "shield" / "builtin"


class HeldTorques:
    """Draw torques that are held for 8 steps on average; half of them are at full strength."""

    batched = True

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes with no torque."""
        self._held = np.zeros((num_envs, 1))

    def __call__(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the torques (n, 1) in N m."""
        fresh = rng.uniform(-2.0, 2.0, self._held.shape)
        fresh = np.where(rng.random(fresh.shape) < 0.5, 2.0 * np.sign(fresh), fresh)
        self._held = np.where(rng.random(fresh.shape) < 1 / 8, fresh, self._held)
        return self._held


def boat() -> Shield:
    """Return the shield of safeshield/Boat-v0, calibrated with random actions and the adversary."""
    env = gym.make("safeshield/Boat-v0")
    log = collect(env, Helmsmen(), episodes=300, seed=0)
    trainer = ShieldTrainer(ShieldConfig(**SMALL), device="cpu").fit(log, steps=6000)
    return trainer.calibrate(env, epsilon=0.05, confidence=0.95, seed=0)


def pendulum() -> Shield:
    """Return the shield of Pendulum-v1 that keeps it below 6 rad/s, calibrated in the same way."""
    env = ConstraintFromFunction(gym.make("Pendulum-v1"), "PendulumSpeed@1")
    log = collect(env, HeldTorques(), episodes=200, seed=0)
    # 1 - discount must lie well below (time step 0.05 s) / (half a second of braking).
    config = ShieldConfig(**SMALL, safety_discount=0.99)
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=4000)
    return trainer.calibrate(env, epsilon=0.05, confidence=0.95, seed=0)


def main() -> None:
    """Make the shields that are asked for."""
    makers = {"boat": boat, "pendulum": pendulum}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(makers), metavar="NAME")
    parser.add_argument("--out", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.names:
        shield = makers[name]()
        assert shield.record is not None
        path = chosen.out / f"{name}.safetensors"
        shield.save(path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB\n{shield.record.promise}", flush=True)


if __name__ == "__main__":
    main()
