"""Your own environment, from zero to shield: Pendulum with a speed limit.

    python examples/pendulum_speed_limit.py          # about a minute

Gymnasium's pendulum has no notion of safety. Here it must not turn faster than 6 rad/s; swinging
freely from the top it reaches 7.7, and its motor is too weak to stop a fall once it is fast, so
whoever wants to keep the limit must brake early. The agent does the opposite: it always pushes in
the direction of motion.
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
    """h(s) in rad/s, positive is a violation; observation = (cos, sin, angular velocity)."""
    return abs(float(observation[2])) - LIMIT


def make() -> gym.Env[Any, Any]:
    """Return the pendulum, which now reports info["constraint"]."""
    return ConstraintFromFunction(gym.make("Pendulum-v1"), too_fast)


class HeldTorques:
    """The log's driver: a random torque, held for 8 steps on average."""

    batched = True

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes."""
        self._held = np.zeros((num_envs, 1))

    def __call__(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return torques (n, 1)."""
        fresh = rng.uniform(-2.0, 2.0, self._held.shape)
        self._held = np.where(rng.random(fresh.shape) < 1 / 8, fresh, self._held)
        return self._held


def pusher(observation: np.ndarray) -> np.ndarray:
    """Push in the direction of motion: the agent."""
    return np.array([2.0 if observation[2] >= 0 else -2.0], np.float32)


def main() -> None:
    """Log, learn, calibrate, compare."""
    torch.set_num_threads(1)  # small networks
    log = collect(make(), HeldTorques(), episodes=300, seed=0)
    print(log.summary())
    # 1 - discount lies well below (time step 0.05 s) / (half a second of braking).
    config = ShieldConfig(seed=0, critic_hidden=(64, 64), safety_discount=0.99)
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=4000, progress_bar=True)
    shield = trainer.calibrate(make(), policy=pusher, epsilon=0.05, confidence=0.95)
    assert shield.record is not None
    print(shield.record.promise)
    shield.save("pendulum.safetensors")

    runs = {"certified_by": shield, "starts": "certified", "name": "pusher"}
    alone = evaluate(make(), pusher, 100, seed=1, **runs)
    guarded = evaluate(make(), pusher, 100, seed=1, shield=shield, **runs)
    print(format_table([alone, guarded]))

    env = SafetyShield(make(), "pendulum.safetensors")  # and so any agent meets it
    observation, _ = env.reset(seed=2)
    fastest = 0.0
    for _ in range(200):
        observation, _, _, _, _ = env.step(pusher(observation))
        fastest = max(fastest, abs(float(observation[2])))
    print(f"fastest turn behind the shield {fastest:.2f} rad/s, limit {LIMIT}")


if __name__ == "__main__":
    main()
