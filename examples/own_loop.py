"""A shield in a loop of your own: from a log to filtered actions, on the double integrator.

    python examples/own_loop.py          # about a minute

A cart between two walls; the agent wants to go right, as fast as it can. The log comes from a
driver who accelerates and brakes at random; the shield is calibrated for the agent it will protect.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch

import safeshield
from safeshield import SafeFQL, SafeFQLConfig, collect

TASK = "safeshield/DoubleIntegrator-v0"


class RandomDriver:
    """Accelerations that are held for half a second on average; half of them are full."""

    batched = True  # called once for all environments

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes."""
        self._held = np.zeros((num_envs, 1))

    def __call__(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return accelerations (n, 1)."""
        fresh = rng.uniform(-1.0, 1.0, self._held.shape)
        fresh = np.where(rng.random(fresh.shape) < 0.5, np.sign(fresh), fresh)
        self._held = np.where(rng.random(fresh.shape) < 0.1, fresh, self._held)
        return self._held


def full_throttle(observation: np.ndarray) -> np.ndarray:
    """Go right, whatever happens: the agent."""
    return np.array([1.0], np.float32)


def main() -> None:
    """Log, learn, calibrate, drive."""
    torch.set_num_threads(1)  # small networks
    env = gym.make(TASK)
    log = collect(env, RandomDriver(), episodes=300, seed=0)
    print(log.summary())
    # 1 - discount lies well below (time step 0.05 s) / (2 s to brake).
    config = SafeFQLConfig(
        seed=0, critic_hidden=(64, 64, 64), safety_discount=0.9975, phase_shares=(0.9, 0.05, 0.05)
    )
    shield = SafeFQL(config, device="cpu").fit(log, steps=3000, progress_bar=True).shield()
    shield = shield.calibrate(env, policy=full_throttle, epsilon=0.02, confidence=0.95)
    assert shield.record is not None
    print(shield.record.promise)

    observation, _ = env.reset(seed=1, options={"state": np.array([-0.5, 0.0])})
    furthest, replaced = -1.0, 0
    for _ in range(200):
        action, report = shield.filter(observation, full_throttle(observation))
        observation, *_ = env.step(action)
        furthest = max(furthest, float(observation[0]))
        replaced += bool(report.intervened)
    print(f"wall at 1 m, the cart came to {furthest:.3f} m; {replaced} of 200 actions replaced")


if __name__ == "__main__":
    print(f"safeshield {safeshield.__version__}")
    main()
