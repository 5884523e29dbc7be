"""Put a shield in front of a model that has already been trained, without changing the model.

    python examples/filter_trained_model.py          # under a minute

PPO is trained for the reward alone and hits rocks. `ShieldedPolicy` has the `predict` method of
a model, so Stable-Baselines3's own `evaluate_policy` accepts it. The shield is calibrated with
this agent (`policy=model`), so its promise is about this agent.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from safeshield import ShieldConfig, ShieldedPolicy, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.evaluation import evaluate, format_table


def boat() -> gym.Env[Any, Any]:
    """Return the boat environment with a time step of 0.02 s and trips of 100 steps."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)


def main() -> None:
    """Train an agent for reward alone, make a shield for it, and compare both."""
    torch.set_num_threads(1)
    model = PPO("MlpPolicy", boat(), n_steps=1000, batch_size=250, seed=0, device="cpu")
    model.learn(5_000)
    model.save("ppo.zip")

    log = collect(boat(), Helmsmen(), episodes=400, seed=2)
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=2, critic_hidden=(64, 64), behaviour_hidden=(64, 64), fallback_hidden=(64, 64),
        learning_rate=2e-3, phase_shares=(0.6, 0.1, 0.3),
    )  # fmt: skip
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000, progress_bar=True)
    shield = trainer.calibrate(
        boat(), policy=model, epsilon=0.05, confidence=0.95, deltas=(0.4, 0.2)
    )
    assert shield.record is not None
    print(shield.record.promise)

    runs: dict[str, Any] = {"certified_by": shield, "starts": "certified", "name": "PPO"}
    alone = evaluate(boat(), model, 200, seed=3, **runs)
    guarded = evaluate(boat(), model, 200, seed=3, shield=shield, **runs)
    print(format_table([alone, guarded]))

    policy = ShieldedPolicy(PPO.load("ppo.zip", device="cpu"), shield)
    mean, spread = evaluate_policy(policy, Monitor(boat()), n_eval_episodes=10)  # type: ignore[arg-type]
    print(f"evaluate_policy, shield in front: return {mean:.1f} +- {spread:.1f}")


if __name__ == "__main__":
    main()
