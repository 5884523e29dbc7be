"""Count the falls of MaskablePPO while it learns CliffWalking, with a shield and without one.

    python benchmarks/cliff.py            # 3 seeds, 20,480 steps each; resumes

Log, shield and environment are those of examples/cliff_walking_maskable_ppo.py: a fall ends the
episode. There are three ways to learn, with the same settings and seeds. "masked" uses the shield's
action masks. "replaced" uses no masks, and the shield replaces the actions that it does not accept.
"unshielded" has no shield.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, once
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy

import safeshield
from safeshield import SafetyShield, Shield, ShieldConfig, ShieldTrainer
from safeshield.policies import ShieldCallback

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cliff_walking_maskable_ppo import CLIFF, DOWN, RIGHT, START, make

WAYS = ("masked", "replaced", "unshielded")


def shield_of(seed: int) -> tuple[Shield, dict[str, Any]]:
    """Return the calibrated shield of a seed, and the number of moves that it misjudges."""
    path = RESULTS / f"cliff_{seed}.safetensors"

    def compute() -> dict[str, Any]:
        log = safeshield.collect(make(anywhere=True), "random", episodes=500, seed=1000 + seed)
        config = ShieldConfig(
            seed=seed,
            critic_hidden=(64, 64),
            learning_rate=3e-3,
            polyak=0.02,
            safety_backup_steps=(4, 2, 1, 1),
        )
        trainer = ShieldTrainer(config, device="cpu").fit(log, steps=2000)
        shield = trainer.calibrate(make(), epsilon=0.01, deltas=[0.0], num_envs=64, seed=seed)
        RESULTS.mkdir(parents=True, exist_ok=True)
        shield.save(path)
        allowed = shield.action_mask(np.arange(START + 1))
        deadly = np.zeros_like(allowed)
        deadly[CLIFF - 12, DOWN] = deadly[START, RIGHT] = True
        return {
            "falls in the log": int((log.costs > 0).sum()),
            "deadly moves": int(deadly.sum()),
            "deadly moves allowed": int((allowed & deadly).sum()),
            "harmless moves forbidden": int((~allowed & ~deadly).sum()),
        }

    facts = once(f"cliff_shield_{seed}", compute, redo=not path.exists())
    return Shield.load(path), facts


def learn(seed: int, way: str, steps: int) -> dict[str, Any]:
    """Train MaskablePPO in one of the three ways, and count its falls."""
    shield, _ = shield_of(seed)
    masked, shielded = way == "masked", way != "unshielded"
    env = SafetyShield(make(), shield) if shielded else make()
    model = MaskablePPO(
        "MlpPolicy",
        env,
        n_steps=512,
        batch_size=128,
        n_epochs=8,
        learning_rate=2e-3,
        gamma=0.98,
        ent_coef=0.01,
        policy_kwargs={"net_arch": [32]},
        seed=seed,
        device="cpu",
    )
    counter = ShieldCallback(require_shield=shielded)
    model.learn(steps, counter, use_masking=masked)
    # The policy is evaluated as it was trained, with the shield where it had one.
    returned, _ = evaluate_policy(model, env, n_eval_episodes=1, use_masking=masked, warn=False)
    return {
        "falls": counter.violating_episodes,
        "episodes": counter.episodes,
        "replaced": counter.interventions,
        "return": float(returned),
    }


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_480)
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for seed in arguments.seeds:
        _, facts = shield_of(seed)
        names = [name for name in facts if "moves" in name or "falls" in name]
        print(f"shield of seed {seed}:", ", ".join(f"{facts[name]} {name}" for name in names))
    columns = ("falls", "episodes", "replaced", "return")
    print(f"{'MaskablePPO':12} {'seed':>4}", *(f"{name:>9}" for name in columns))
    for way in WAYS:
        for seed in arguments.seeds:
            row = once(
                f"cliff_{way}_{arguments.steps}_{seed}",
                lambda seed=seed, way=way: learn(seed, way, arguments.steps),
                redo=arguments.redo,
            )
            numbers = (f"{row[name]:>9.0f}" for name in columns)
            print(f"{way:12} {seed:>4}", *numbers, flush=True)


if __name__ == "__main__":
    main()
