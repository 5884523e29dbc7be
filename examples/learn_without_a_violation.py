"""Learn online behind a calibrated shield, and count violations in training.

    python examples/learn_without_a_violation.py          # under a minute

The task is the pendulum with a speed limit of 6 rad/s. Its shield is one of the ready-made ones; it
was learned from a log of random torques, as in pendulum_speed_limit.py. The behaviour policy draws
uniform torques and executes only those that the shield accepts. Safe-Support Q-learning collects
its data with this behaviour and learns to swing up inside its support. For comparison, SAC learns
the same task without a shield.
"""

from __future__ import annotations

import numpy as np
import torch
from pendulum_speed_limit import make
from stable_baselines3 import SAC

from safeshield import (
    SafeSupportPolicy,
    SafeSupportQLearning,
    SafetyShield,
    Shield,
    SSQLConfig,
)
from safeshield.policies import ShieldCallback
from safeshield.rollouts.episodes import run_episodes
from safeshield.wrappers import CertifiedStarts

STEPS = 2000


def main() -> None:
    """Learn online behind the shield, and without a shield for comparison."""
    torch.set_num_threads(1)  # The networks are small.
    shield = Shield.builtin("pendulum")
    assert shield.record is not None
    print(shield.record.promise)

    behaviour = SafeSupportPolicy(shield, "uniform", seed=0)
    env = CertifiedStarts(SafetyShield(make(), shield))
    settings = SSQLConfig(
        temperature=0.5, discount=0.98, critic_hidden=(64, 64), actor_hidden=(64, 64),
        batch_size=128, refresh_every=500, extraction_steps=200,
    )  # fmt: skip
    agent = SafeSupportQLearning(env, behaviour, settings, device="cpu")
    agent.learn(STEPS, progress_bar=True)
    tally = agent.tally

    sac = SAC("MlpPolicy", make(), policy_kwargs={"net_arch": [64, 64]}, seed=0, device="cpu")
    counts = ShieldCallback(require_shield=False)
    sac.learn(STEPS // 4, callback=counts)

    def returns(policy: object) -> float:
        runs = run_episodes(env, policy, 10, seed=1)
        return float(np.mean([run.total_return for run in runs]))

    print(f"the behaviour's return: {returns(behaviour):.0f}")
    print(f"SSQL: {tally.unsafe_episodes} of {tally.episodes} episodes of its training violate; "
          f"return {returns(agent):.0f}")  # fmt: skip
    print(f"SAC, no shield: {counts.violating_episodes} of {counts.episodes} in a quarter as long")


if __name__ == "__main__":
    main()
