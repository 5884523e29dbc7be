"""SAC learns under a shield, and its replay buffer keeps the actions that were executed.

    python examples/sac_executed_actions.py          # under two minutes

An off-policy learner may learn from what really ran: `ShieldedReplayBuffer(store="executed")`
reads it from the infos. Its random warm-up (`learning_starts`) is covered, because the shield is
in the environment.
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
    """Return a river whose helmsman acts every 0.02 s: 100 steps a trip."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)


def main() -> None:
    """Make the shield, learn under it, look at what was stored."""
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
