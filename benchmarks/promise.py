"""Does the promise hold? 300 calibrations with fresh episodes, against the true violation rates.

    python benchmarks/promise.py              # resumes; prints the table

A shield for the double integrator is trained too briefly on purpose, so that its true violation
rate crosses epsilon somewhere along the walk. The true rate at each threshold is measured once on
20,000 episodes. Then 300 calibrations, each with fresh episodes, choose a threshold; the share
whose true rate exceeds epsilon must be at most 1 - confidence, up to binomial noise. Two broken
calibrators judge the same episodes: one sums the binomial tail to k - 1, one counts steps as if
they were episodes. Both must fail.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS, machine, once
from double_integrator import HeldAccelerations
from scipy.stats import binom

import safeshield
from safeshield import CalibrationError, SafeFQL, SafeFQLConfig, Shield
from safeshield.calibration import fixed_sequence_walk, upper_bound
from safeshield.calibration.policies import ShieldedProposals
from safeshield.calibration.rollouts import start_observations
from safeshield.calibration.walk import violations_allowed
from safeshield.rollout import as_batch_policy, run_episodes

TASK = "safeshield/DoubleIntegrator-v0"
EPSILON, CONFIDENCE, EPISODES = 0.05, 0.9, 120
REPEATS, TRUTH_EPISODES, LEVELS = 300, 20_000, 8

Sample = tuple[int, int, int, int]  # episodes, violating ones, steps, violating steps


def make_shield() -> Shield:
    """Train a shield that is not quite good enough."""
    path = RESULTS / "promise_shield.safetensors"
    if path.exists():
        return Shield.load(path)
    log = safeshield.collect(gym.make(TASK), HeldAccelerations(0.05), episodes=300, seed=77)
    config = SafeFQLConfig(
        seed=7,
        critic_hidden=(48, 48),
        flow_hidden=(16,),
        student_hidden=(16,),
        safety_discount=0.9975,
        safety_backup_steps=(64, 16, 4, 1),
        phase_shares=(0.9, 0.05, 0.05),
    )
    shield = SafeFQL(config, device="cpu").fit(log, steps=6000).shield()
    RESULTS.mkdir(exist_ok=True)
    shield.save(path)
    return shield


def sample(shield: Shield, delta: float, episodes: int, seed: int) -> Sample:
    """Run fresh shielded episodes from accepted starts, random proposals."""
    shield = shield.with_delta(delta)
    acting = ShieldedProposals(shield, as_batch_policy("random", shield.action_space))
    counted = violating = steps = unsafe = 0
    rng = np.random.default_rng(seed)
    while counted < episodes:
        batch = min(1024, max(64, 2 * (episodes - counted)))
        draw = int(rng.integers(2**31 - 1))
        for run in run_episodes(gym.make(TASK), acting, batch, draw, num_envs=batch):
            if counted < episodes and shield.value(run.observations[0]) <= -delta:
                counted += 1
                violating += run.violated
                steps += len(run)
                unsafe += int((run.next_constraints > 0).sum())
    return counted, violating, steps, unsafe


def honest(sampled: Sample) -> tuple[int, int]:
    """Count episodes."""
    return sampled[0], sampled[1]


def one_too_few(sampled: Sample) -> tuple[int, int]:
    """Sum the tail to k - 1: broken."""
    return sampled[0], max(sampled[1] - 1, 0)


def steps_for_episodes(sampled: Sample) -> tuple[int, int]:
    """Count steps as if they were independent episodes: broken."""
    return sampled[2], sampled[3]


def chosen(
    samples: list[Sample], deltas: list[float], view: Callable[[Sample], tuple[int, int]]
) -> float | None:
    """Return the threshold that a calibrator with this view of the episodes chooses."""
    counts = {delta: view(s) for delta, s in zip(deltas, samples, strict=True)}
    try:
        delta, _ = fixed_sequence_walk(
            lambda delta, policy, episodes, most: counts[delta],
            deltas,
            ["random"],
            epsilon=EPSILON,
            confidence=CONFIDENCE,
            episodes=counts[deltas[0]][0],
        )
    except CalibrationError:
        return None
    return delta


def run() -> dict[str, Any]:
    """Measure the true rates, repeat the calibrations, count broken promises."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shield = make_shield()
    values = np.asarray(shield.value(start_observations(gym.make(TASK), 4000, seed=3)))
    inside = -values[values <= 0]
    deltas = [float(x) for x in np.quantile(inside, np.linspace(0.5, 0.0, LEVELS))]
    deltas[-1] = 0.0
    truth = [sample(shield, d, TRUTH_EPISODES, 9000 + i)[:2] for i, d in enumerate(deltas)]
    rates = {d: k / n for d, (n, k) in zip(deltas, truth, strict=True)}
    views = {"honest": honest, "tail to k - 1": one_too_few, "steps counted": steps_for_episodes}
    broken = dict.fromkeys(views, 0)
    for repeat in range(REPEATS):
        samples = [
            sample(shield, d, EPISODES, 100_000 + 1000 * repeat + i) for i, d in enumerate(deltas)
        ]
        for name, view in views.items():
            delta = chosen(samples, deltas, view)
            broken[name] += delta is not None and rates[delta] > EPSILON
    return {
        "deltas": deltas,
        "true_rates": list(rates.values()),
        "broken": broken,
        "repeats": REPEATS,
        "most_expected": int(binom.ppf(0.99, REPEATS, 1 - CONFIDENCE)),
        "allowed": violations_allowed(EPISODES, EPSILON, CONFIDENCE),
        "bound_at_allowed": upper_bound(
            EPISODES, violations_allowed(EPISODES, EPSILON, CONFIDENCE), CONFIDENCE
        ),
    }


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redo", action="store_true")
    result = once("promise", run, redo=parser.parse_args().redo)
    print(machine())
    for delta, rate in zip(result["deltas"], result["true_rates"], strict=True):
        print(f"delta {delta:7.4f}  true violation rate {rate:7.2%}")
    limit, repeats = result["most_expected"], result["repeats"]
    print(
        f"epsilon {EPSILON}, confidence {CONFIDENCE}, {EPISODES} episodes a test; promises broken "
        f"in {repeats} calibrations (at most {(1 - CONFIDENCE) * repeats:.0f} expected, {limit} "
        "with binomial noise at 99%):"
    )
    for name, count in result["broken"].items():
        verdict = "holds" if count <= limit else "FAILS"
        print(f"  {name:15} {count:4} of {repeats}: {verdict}")


if __name__ == "__main__":
    main()
