"""Train SAC under a shield with a replay buffer that stores the executed actions.

    python examples/sac_executed_actions.py          # under a minute

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
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=1, critic_hidden=(64, 64), behaviour_hidden=(64, 64), fallback_hidden=(64, 64),
        learning_rate=2e-3, phase_shares=(0.6, 0.1, 0.3),
    )  # fmt: skip
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000, progress_bar=True)
    shield = trainer.calibrate(boat(), epsilon=0.05, confidence=0.95, deltas=(0.4, 0.2))
    counts = ShieldCallback()
    model = SAC(
        "MlpPolicy",
        CertifiedStarts(SafetyShield(boat(), shield)),
        replay_buffer_class=ShieldedReplayBuffer,
        replay_buffer_kwargs={"store": "executed"},
        learning_starts=400,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    model.learn(1200, callback=counts)
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
