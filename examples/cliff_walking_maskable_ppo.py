"""Train MaskablePPO on Gymnasium's CliffWalking, with a shield and without one.

    pip install sb3-contrib
    python examples/cliff_walking_maskable_ppo.py          # about a minute

The grid has 4 x 12 cells, and a cliff runs along the bottom row. The shield is learned from a log
that contains falls. At every step of the training, the first one included, it gives the learner a
mask of the moves that it accepts, and the learner does not fall.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy

from safeshield import SafetyShield, ShieldConfig, ShieldTrainer, collect
from safeshield.policies import ShieldCallback

TASK = "CliffWalking-v1" if "CliffWalking-v1" in gym.registry else "CliffWalking-v0"
START, CLIFF = 36, np.arange(37, 47)  # Cells are numbered by rows from the top.
RIGHT, DOWN = 1, 2


class FallingEnds(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Make a fall cost 1 and end the episode in the cell that the walker fell into.

    Gymnasium puts the walker back to the start, so no observation shows the cliff; a shield can
    learn only from states that are reached. With `anywhere`, which is meant for logs, an episode
    starts in a random cell of the upper three rows, or in the usual start cell.
    """

    def __init__(self, env: gym.Env, anywhere: bool = False) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, anywhere=anywhere)
        gym.Wrapper.__init__(self, env)
        self.anywhere = anywhere

    def reset(self, **kwargs: Any) -> tuple[int, dict[str, Any]]:  # noqa: ANN401, D102
        cell, info = self.env.reset(**kwargs)
        if self.anywhere:
            cell = self.unwrapped.s = int(self.unwrapped.np_random.integers(START + 1))
        return cell, info

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:  # noqa: D102
        before = int(self.unwrapped.s)
        cell, reward, terminated, truncated, info = self.env.step(action)
        fell = reward == -100
        if fell:
            cell = START + 1 if before == START else before + 12
        return cell, float(reward), terminated or fell, truncated, {**info, "cost": float(fell)}


def make(anywhere: bool = False) -> gym.Env:
    """Return the environment, whose episodes take at most 100 steps."""
    return FallingEnds(gym.make(TASK, max_episode_steps=100), anywhere)


def main() -> None:
    """Collect a log, learn and calibrate a shield, and train MaskablePPO with and without it."""
    torch.set_num_threads(1)  # The networks are small.
    log = collect(make(anywhere=True), "random", episodes=500, seed=0)
    config = ShieldConfig(  # A small grid needs few updates.
        critic_hidden=(64, 64), learning_rate=3e-3, polyak=0.02, safety_backup_steps=(4, 2, 1, 1)
    )
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000)
    # All values lie near -1 or near 25, so one threshold separates them and needs a test.
    shield = trainer.calibrate(make(), epsilon=0.01, deltas=[0.0], num_envs=64)
    print(shield.record.promise)

    allowed = shield.action_mask(np.arange(START + 1))  # (37 cells, 4 moves)
    deadly = np.zeros_like(allowed)
    deadly[CLIFF - 12, DOWN] = deadly[START, RIGHT] = True
    print(f"{np.sum(allowed == deadly)} of {allowed.size} moves misjudged, {deadly.sum()} deadly")

    print(f"{'MaskablePPO':12} {'falls in training':>18} {'return afterwards (best: -13)':>30}")
    for name, env in (("shielded", SafetyShield(make(), shield)), ("unshielded", make())):
        masked = name == "shielded"
        model = MaskablePPO(
            "MlpPolicy", env, n_steps=512, batch_size=128, n_epochs=8, learning_rate=2e-3,
            gamma=0.98, ent_coef=0.01, policy_kwargs={"net_arch": [32]}, seed=0, device="cpu",
        )  # fmt: skip
        model.learn(10_240, counter := ShieldCallback(require_shield=masked), use_masking=masked)
        final, _ = evaluate_policy(model, env, n_eval_episodes=1, use_masking=masked, warn=False)
        print(f"{name:12} {counter.violating_episodes:>18} {final:>30.0f}")


if __name__ == "__main__":
    main()
