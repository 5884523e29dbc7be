"""Use a shield in your own control loop, from a log to filtered actions.

    python examples/own_loop.py          # about a minute

The plant is the double integrator: a cart between two walls. The agent always accelerates to the
right. The log comes from a driver that accelerates and brakes at random. The shield is calibrated
with the agent that it will filter.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch

import safeshield
from safeshield import SafeFQL, SafeFQLConfig, collect

TASK = "safeshield/DoubleIntegrator-v0"


class RandomDriver:
    """Draw accelerations that are held for 0.5 s on average; half of them are at full strength."""

    batched = True  # One call acts for all environments.

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes with no acceleration."""
        self._held = np.zeros((num_envs, 1))

    def __call__(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the accelerations (n, 1) in m/s^2."""
        fresh = rng.uniform(-1.0, 1.0, self._held.shape)
        fresh = np.where(rng.random(fresh.shape) < 0.5, np.sign(fresh), fresh)
        self._held = np.where(rng.random(fresh.shape) < 0.1, fresh, self._held)
        return self._held


def full_throttle(observation: np.ndarray) -> np.ndarray:
    """Return the agent's action: full acceleration to the right in every state."""
    return np.array([1.0], np.float32)


def main() -> None:
    """Collect a log, learn and calibrate a shield, and filter an agent in a loop."""
    torch.set_num_threads(1)  # The networks are small.
    env = gym.make(TASK)
    log = collect(env, RandomDriver(), episodes=300, seed=0)
    print(log.summary())
    # 1 - discount must lie well below (time step 0.05 s) / (2 s to brake).
    config = SafeFQLConfig(
        seed=0, critic_hidden=(64, 64, 64), safety_discount=0.9975, phase_shares=(0.9, 0.05, 0.05)
    )
    shield = SafeFQL(config, device="cpu").fit(log, steps=2000, progress_bar=True).shield()
    shield = shield.calibrate(env, policy=full_throttle, epsilon=0.05, confidence=0.95)
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
