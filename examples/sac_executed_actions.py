"""Train SAC under a shield with a replay buffer that stores the executed actions.

    python examples/sac_executed_actions.py          # under two minutes

An off-policy learner may learn from the actions that were executed:
`ShieldedReplayBuffer(store="executed")` reads them from the infos. The shield also filters the
random actions of the warm-up (`learning_starts`), because it is part of the environment.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC

from safeshield import SafetyShield, ShieldConfig, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.policies import ShieldCallback, ShieldedReplayBuffer
from safeshield.wrappers import CertifiedStarts


def boat() -> gym.Env[Any, Any]:
    """Return the boat environment with a time step of 0.02 s and trips of 100 steps."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)


def main() -> None:
    """Make the shield, train SAC under it, and examine the stored actions."""
    torch.set_num_threads(1)
    log = collect(boat(), Helmsmen(), episodes=400, seed=1)
    config = ShieldConfig(seed=1, critic_hidden=(64, 64, 64), safety_discount=0.99)
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=4000, progress_bar=True)
    shield = trainer.calibrate(boat(), epsilon=0.02, confidence=0.95)
    counts = ShieldCallback()
    model = SAC(
        "MlpPolicy",
        CertifiedStarts(SafetyShield(boat(), shield)),
        replay_buffer_class=ShieldedReplayBuffer,
        replay_buffer_kwargs={"store": "executed"},
        learning_starts=1000,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    model.learn(3000, callback=counts)
    print(
        f"SAC: {counts.violating_episodes} of {counts.episodes} trips of its training hit a rock; "
        f"{counts.interventions} of {counts.steps} actions replaced"
    )
    buffer = model.replay_buffer
    assert buffer is not None
    stored, states = buffer.actions[: buffer.pos, 0], buffer.observations[: buffer.pos, 0]
    values = np.asarray(shield.value(states, stored))
    share = float(np.mean(values <= shield.threshold))
    print(f"stored actions that the shield accepts: {share:.1%}")


if __name__ == "__main__":
    main()
