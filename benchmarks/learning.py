"""Count the violations of SAC and PPO in training on the boat, with a shield and without one.

    python benchmarks/learning.py            # 3 seeds; an hour and a half on one core; resumes

The shield is that of `boat.py`'s agent of the same seed, calibrated for its battery (random
proposals, adversary) at epsilon 0.01, confidence 0.99. Both learners train for 50,000 steps from
certified starts, warm-up included; without a shield they start from the same distribution of
states. Then the learned policy acts deterministically, with its shield or without, from 500 uniform
starts in the exact safe set (margin 0.02 m), where the safe optimum returns -438 on average. All
learners have Stable-Baselines3's default settings, except for networks of 64 x 64 and, for PPO, 8
boats side by side and rollouts of 128 steps.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from boat import BOAT, MARGIN, STARTS
from common import RESULTS, machine, once
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from safeshield import SafeFQL, SafetyShield, Shield
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.envs.boat import STATE_HIGH, STATE_LOW
from safeshield.exact import boat_value
from safeshield.policies import ShieldCallback
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy
from safeshield.wrappers import CertifiedStarts

STEPS = 50_000


class StartsOf(gym.Wrapper):
    """Start episodes where a shield certifies the state, without filtering actions."""

    def __init__(self, env: gym.Env, shield: Shield) -> None:
        super().__init__(env)
        self._shield = shield

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset until the start is certified."""
        while True:
            observation, info = self.env.reset(seed=seed, options=options)
            seed = None
            if self._shield.certified(observation):
                return observation, info


def learner(name: str, shield: Shield, shielded: bool, seed: int) -> BaseAlgorithm:
    """Return an untrained learner."""

    def make() -> gym.Env:
        if shielded:
            return CertifiedStarts(SafetyShield(gym.make(BOAT), shield))
        return StartsOf(gym.make(BOAT), shield)

    nets = {"net_arch": [64, 64]}
    if name == "SAC":
        return SAC("MlpPolicy", make(), policy_kwargs=nets, seed=seed, device="cpu")
    envs = DummyVecEnv([make] * 8)
    return PPO("MlpPolicy", envs, n_steps=128, policy_kwargs=nets, seed=seed, device="cpu")


def final(model: BaseAlgorithm, shield: Shield | None, seed: int) -> dict[str, float]:
    """Run the learned policy from uniform starts in the exact safe set."""
    exact = boat_value()
    rng = np.random.default_rng(30_000 + seed)
    starts = rng.uniform(STATE_LOW, STATE_HIGH, (4 * STARTS, 2))
    starts = starts[exact(starts) < -MARGIN][:STARTS]
    env = gym.make(BOAT)
    policy = as_batch_policy(model, env.action_space)
    if shield is not None:
        policy = ShieldedProposals(shield, policy)
    options = {"state": starts}
    runs = run_episodes(env, policy, STARTS, seed, reset_options=options, num_envs=STARTS)
    return {
        "final_return": float(np.mean([run.total_return for run in runs])),
        "final_violating": sum(run.violated for run in runs),
    }


def run(name: str, shielded: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train one learner, and count its violations and interventions."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = RESULTS / f"boat_40000_{seed}.safetensors"
    if not path.exists():
        raise SystemExit(f"run benchmarks/boat.py first: {path} is missing")
    calibrated = RESULTS / f"boat_40000_{seed}_shield.safetensors"
    if not calibrated.exists():
        shield = SafeFQL.load(path, device="cpu").shield()
        shield.calibrate(gym.make(BOAT), epsilon=0.01, confidence=0.99, seed=seed).save(calibrated)
    shield = Shield.load(calibrated)
    counts = ShieldCallback(require_shield=shielded)
    model = learner(name, shield, shielded, seed)
    model.learn(steps, callback=counts)
    return {
        "learner": name,
        "shielded": shielded,
        "seed": seed,
        "episodes": counts.episodes,
        "violating": counts.violating_episodes,
        "replaced": counts.interventions / counts.steps,
        "delta": shield.delta,
        **final(model, shield if shielded else None, seed),
    }


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learners", nargs="+", default=["PPO", "SAC"])
    arguments = parser.parse_args()
    print(machine())
    print("learner  shield  seed  violating in training  replaced  final return  final violating")
    for name in arguments.learners:
        for shielded in (False, True):
            for seed in arguments.seeds:
                row = once(
                    f"learning_{name}_{shielded}_{seed}_{arguments.steps}",
                    lambda n=name, s=shielded, i=seed: run(n, s, i, arguments.steps),
                )
                print(
                    f"{name:7}  {'yes' if shielded else 'no':6}  {seed:4}  "
                    f"{row['violating']:9} of {row['episodes']:8}  {row['replaced']:8.1%}  "
                    f"{row['final_return']:12.1f}  {row['final_violating']:8} of {STARTS}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
