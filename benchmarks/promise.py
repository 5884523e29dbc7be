"""Test whether the promise holds, by 300 calibrations and the true violation rates.

    python benchmarks/promise.py              # about 12 minutes; resumes; prints the table

A shield for the double integrator is trained too briefly on purpose, so that its true violation
rate crosses epsilon along the walk. Three thresholds are tested: one far on the safe side, one
whose true rate lies just ABOVE epsilon, and 0. Choosing the second breaks the promise, and a
correct test has the greatest difficulty in rejecting it. The true rates are measured on 20,000
episodes each. Then 300 calibrations, each with fresh episodes, choose a threshold. The share of
choices whose true rate exceeds epsilon must be at most 1 - confidence, up to binomial noise. Two
incorrect calibrators judge the same episodes: one sums the binomial tail to k - 1, and the other
counts steps as if they were episodes. Both must fail.
"""

from __future__ import annotations

import argparse
import functools
import math
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
from safeshield.calibration import episodes_needed, fixed_sequence_walk, upper_bound
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.calibration.walk import violations_allowed
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy

TASK = "safeshield/DoubleIntegrator-v0"
EPSILON, CONFIDENCE = 0.05, 0.9
# The smallest number of episodes. With it, the tails to k and to k - 1 differ most, so that 300
# repeats distinguish a correct calibrator from an incorrect one.
EPISODES = episodes_needed(EPSILON, CONFIDENCE)
REPEATS, CHUNK, TRUTH_EPISODES = 300, 25, 20_000
STRICT, SEARCH = 0.12, (0.054, 0.051, 0.048, 0.045, 0.042, 0.039)

Sample = tuple[int, int, int, int]  # Episodes, violating episodes, steps, violating steps.


def make_shield() -> Shield:
    """Train a shield too briefly, so that its true violation rate crosses epsilon."""
    path = RESULTS / "promise_shield.safetensors"
    if path.exists():
        return Shield.load(path)
    log = safeshield.collect(gym.make(TASK), HeldAccelerations(0.05), episodes=300, seed=77)
    config = SafeFQLConfig(
        seed=7,
        critic_hidden=(48, 48),
        flow_hidden=(16,),
        student_hidden=(16,),
        teacher="behaviour",
        distillation=0.1,
        safety_discount=0.9975,
        safety_backup_steps=(64, 16, 4, 1),
        phase_shares=(0.9, 0.05, 0.05),
    )
    shield = SafeFQL(config, device="cpu").fit(log, steps=6000).shield()
    RESULTS.mkdir(exist_ok=True)
    shield.save(path)
    return shield


def sample(shield: Shield, delta: float, episodes: int, seed: int) -> Sample:
    """Run new shielded episodes with random proposals, from starts with V_h <= -delta."""
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
    """Return the counts of episodes: the correct calibrator."""
    return sampled[0], sampled[1]


def one_too_few(sampled: Sample) -> tuple[int, int]:
    """Return counts that make the test sum the tail to k - 1: incorrect."""
    return sampled[0], max(sampled[1] - 1, 0)


def steps_for_episodes(sampled: Sample) -> tuple[int, int]:
    """Return the counts of steps as if these were independent episodes: incorrect."""
    return sampled[2], sampled[3]


VIEWS = {"honest": honest, "tail to k - 1": one_too_few, "steps counted": steps_for_episodes}


def chosen(
    draw: Callable[[float], Sample], deltas: list[float], view: Callable[[Sample], tuple[int, int]]
) -> float | None:
    """Return the threshold that a calibrator with this way of counting chooses."""
    try:
        delta, _ = fixed_sequence_walk(
            lambda delta, policy, episodes, most: view(draw(delta)),
            deltas,
            ["random"],
            epsilon=EPSILON,
            confidence=CONFIDENCE,
            episodes=view(draw(deltas[0]))[0],
        )
    except CalibrationError:
        return None
    return delta


def place(shield: Shield) -> list[float]:
    """Return the three thresholds: strict, with a true rate just above epsilon, and 0."""
    for i, delta in enumerate(SEARCH):
        count, violating, *_ = sample(shield, delta, TRUTH_EPISODES // 2, 8000 + i)
        error = math.sqrt(EPSILON * (1 - EPSILON) / count)
        if violating / count > EPSILON + 2 * error:
            return [STRICT, delta, 0.0]
    raise RuntimeError(f"the true rate exceeds {EPSILON} at none of {SEARCH}: search elsewhere")


def truth(shield: Shield) -> dict[str, Any]:
    """Choose the thresholds, and measure their true rates on separate episodes."""
    deltas = place(shield)
    runs = [sample(shield, d, TRUTH_EPISODES, 9000 + i) for i, d in enumerate(deltas)]
    return {"deltas": deltas, "rates": [run[1] / run[0] for run in runs]}


def repeats(shield: Shield, known: dict[str, Any], first: int) -> dict[str, int]:
    """Calibrate CHUNK times, each on new episodes, and count the broken promises."""
    deltas, rates = known["deltas"], dict(zip(known["deltas"], known["rates"], strict=True))
    broken = dict.fromkeys(VIEWS, 0)
    for repeat in range(first, first + CHUNK):

        @functools.cache
        def draw(delta: float, repeat: int = repeat) -> Sample:
            seed = 1_000_000 + 1000 * repeat + deltas.index(delta)
            return sample(shield, delta, EPISODES, seed)

        for name, view in VIEWS.items():
            delta = chosen(draw, deltas, view)
            broken[name] += delta is not None and rates[delta] > EPSILON
    return broken


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redo", action="store_true")
    redo = parser.parse_args().redo
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shield = make_shield()
    known = once("promise_truth", lambda: truth(shield), redo=redo)
    parts = [
        once(f"promise_{EPISODES}_{i}", lambda i=i: repeats(shield, known, i), redo=redo)
        for i in range(0, REPEATS, CHUNK)
    ]
    print(machine())
    for delta, rate in zip(known["deltas"], known["rates"], strict=True):
        print(f"delta {delta:7.4f}  true violation rate {rate:7.2%}")
    limit = int(binom.ppf(0.99, REPEATS, 1 - CONFIDENCE))
    most = violations_allowed(EPISODES, EPSILON, CONFIDENCE)
    print(
        f"epsilon {EPSILON}, confidence {CONFIDENCE}, {EPISODES} episodes a test, of which {most} "
        f"may violate (bound {upper_bound(EPISODES, most, CONFIDENCE):.4f}); promises broken in "
        f"{REPEATS} calibrations (at most {(1 - CONFIDENCE) * REPEATS:.0f} expected, {limit} with "
        "binomial noise at 99%):"
    )
    for name in VIEWS:
        count = sum(part[name] for part in parts)
        verdict = "holds" if count <= limit else "FAILS"
        print(f"  {name:15} {count:4} of {REPEATS}: {verdict}")


if __name__ == "__main__":
    main()
