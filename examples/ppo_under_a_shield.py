"""Train PPO under a shield, and count the rocks that it hits while it learns.

    python examples/ppo_under_a_shield.py          # under a minute

A shield is learned from a log of the boat. PPO then learns from scratch, for the reward alone, in
eight shielded boats. An on-policy learner must store the action that it PROPOSED, because its
probability ratio is defined for that action; to the learner the shield is part of the dynamics.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

import safeshield
from safeshield import SafetyShield, ShieldConfig, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.policies import ShieldCallback
from safeshield.wrappers import CertifiedStarts

STEPS = 5_000


def boat() -> gym.Env[Any, Any]:
    """Return the boat environment with a time step of 0.02 s and trips of 100 steps."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)


def learn(shield: safeshield.Shield | None) -> ShieldCallback:
    """Train PPO with the shield or without; return the counts of the WHOLE training."""

    def make() -> gym.Env[Any, Any]:
        return boat() if shield is None else CertifiedStarts(SafetyShield(boat(), shield))

    counts = ShieldCallback(require_shield=shield is not None)
    model = PPO(
        "MlpPolicy", DummyVecEnv([make] * 8), n_steps=128, batch_size=256, seed=0, device="cpu"
    )
    model.learn(STEPS, callback=counts)
    return counts


def main() -> None:
    """Make the shield, and train PPO with it and without it."""
    torch.set_num_threads(1)
    log = collect(boat(), Helmsmen(), episodes=400, seed=0)
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=0, critic_hidden=(64, 64), behaviour_hidden=(64, 64), fallback_hidden=(64, 64),
        learning_rate=2e-3, phase_shares=(0.6, 0.1, 0.3),
    )  # fmt: skip
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000, progress_bar=True)
    shield = trainer.calibrate(boat(), epsilon=0.05, confidence=0.95, deltas=(0.4, 0.2))
    assert shield.record is not None
    print(shield.record.promise)
    for name, counts in (("no shield", learn(None)), ("shield", learn(shield))):
        print(
            f"PPO, {name:9}: {counts.violating_episodes} of {counts.episodes} trips of its "
            f"training hit a rock; {counts.interventions} of {counts.steps} actions replaced"
        )


if __name__ == "__main__":
    main()
