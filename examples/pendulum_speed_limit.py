"""Make a shield for an environment of your own: Pendulum with a speed limit.

    python examples/pendulum_speed_limit.py          # under a minute

Gymnasium's pendulum has no safety constraint. Here it must not turn faster than 6 rad/s. Swinging
freely from the top it reaches 7.7 rad/s, and its motor is too weak to stop a fast fall, so a policy
that keeps the limit must brake early. The agent does the opposite: it always pushes in the
direction of motion.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from safeshield import SafetyShield, ShieldConfig, ShieldTrainer, collect
from safeshield.evaluation import evaluate, format_table
from safeshield.wrappers import ConstraintFromFunction

LIMIT = 6.0  # rad/s


def too_fast(observation: np.ndarray) -> float:
    """Return h(s) in rad/s of an observation (cos, sin, angular velocity); above 0 violates."""
    return abs(float(observation[2])) - LIMIT


def make() -> gym.Env[Any, Any]:
    """Return the pendulum with episodes of 100 steps, which reports info["constraint"]."""
    return ConstraintFromFunction(gym.make("Pendulum-v1", max_episode_steps=100), too_fast)


class HeldTorques:
    """Draw random torques that are held for 8 steps on average, to collect the log."""

    batched = True

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes with no torque."""
        self._held = np.zeros((num_envs, 1))

    def __call__(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the torques (n, 1) in N m."""
        fresh = rng.uniform(-2.0, 2.0, self._held.shape)
        self._held = np.where(rng.random(fresh.shape) < 1 / 8, fresh, self._held)
        return self._held


def pusher(observation: np.ndarray) -> np.ndarray:
    """Return the agent's action: full torque in the direction of motion."""
    return np.array([2.0 if observation[2] >= 0 else -2.0], np.float32)


def main() -> None:
    """Collect a log, learn and calibrate a shield, and compare the agent with and without it."""
    torch.set_num_threads(1)  # The networks are small.
    log = collect(make(), HeldTorques(), episodes=300, seed=0)
    print(log.summary())
    # 1 - discount must lie well below (time step 0.05 s) / (half a second of braking).
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=0, critic_hidden=(64, 64), behaviour_hidden=(64, 64), fallback_hidden=(64, 64),
        safety_discount=0.99, learning_rate=2e-3, phase_shares=(0.6, 0.1, 0.3),
    )  # fmt: skip
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000, progress_bar=True)
    shield = trainer.calibrate(make(), policy=pusher, epsilon=0.05, confidence=0.95)
    assert shield.record is not None
    print(shield.record.promise)
    shield.save("pendulum.safetensors")

    runs = {"certified_by": shield, "starts": "certified", "name": "pusher"}
    alone = evaluate(make(), pusher, 100, seed=1, **runs)
    guarded = evaluate(make(), pusher, 100, seed=1, shield=shield, **runs)
    print(format_table([alone, guarded]))

    env = SafetyShield(make(), "pendulum.safetensors")  # Filters any agent.
    observation, _ = env.reset(seed=2)
    fastest = 0.0
    for _ in range(100):
        observation, _, _, _, _ = env.step(pusher(observation))
        fastest = max(fastest, abs(float(observation[2])))
    print(f"fastest turn behind the shield {fastest:.2f} rad/s, limit {LIMIT}")


if __name__ == "__main__":
    main()
