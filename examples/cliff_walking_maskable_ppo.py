"""A learner that never falls: MaskablePPO on Gymnasium's CliffWalking, with a shield and without.

    pip install sb3-contrib
    python examples/cliff_walking_maskable_ppo.py          # about a minute

4 x 12 cells, a cliff along the bottom row. The shield learns from a log of falls; the learner
behind it is told at each step which moves it may choose from, and never falls, from the first on.
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
START, CLIFF = 36, np.arange(37, 47)  # cells are numbered row by row from the top
RIGHT, DOWN = 1, 2


class FallingEnds(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Falling costs 1 and ends the episode in the cell the walker fell into.

    Gymnasium puts the walker back to the start and never shows the cliff, and a shield can only
    learn from states that are reached. With `anywhere`, for logs, it starts in any other cell.
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
    """Return an environment of episodes of 100 steps at most."""
    return FallingEnds(gym.make(TASK, max_episode_steps=100), anywhere)


def main() -> None:
    """Log, learn a shield, calibrate it, and let MaskablePPO train behind it."""
    torch.set_num_threads(1)  # small networks
    log = collect(make(anywhere=True), "random", episodes=500, seed=0)
    config = ShieldConfig(  # a grid is soon learned
        critic_hidden=(64, 64), learning_rate=3e-3, polyak=0.02, safety_backup_steps=(4, 2, 1, 1)
    )
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000)
    # Values are near -1 or near 25, with nothing in between: one threshold is worth a test.
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
