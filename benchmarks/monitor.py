"""Measure a watched promise: false alarms, delays, and a drift of the river.

    python benchmarks/monitor.py streams   # half a minute: 1,000 streams of 4,000 episodes
    python benchmarks/monitor.py drift     # minutes for each seed; resumes
    python benchmarks/monitor.py time      # a minute: what a monitor and its file cost

`streams` draws episodes that violate independently, with a promise of 0.01 at b = 0.05. The monitor
is compared with the lower limit of Clopper and Pearson, computed anew after each episode.

`drift` trains and calibrates a shield of the boat for each seed (epsilon 0.02, an agent that
steers straight to the goal with noise). The reference is 200 episodes at the log's current of 2.0
m/s. A deployment is 100 more of them, and then episodes at a current at which about 5 epsilon of
the episodes violate, which is found by bisection with other seeds. Each of eight deployments
notes after how many of the latter the covariates raised doubts, and after how many the evidence
revoked the promise.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from common import RESULTS, machine, once
from scipy.stats import binom

from safeshield import Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.calibration.eprocess import against, log_evidence
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import CURRENT, GOAL
from safeshield.evaluation.episodes import draw_episodes
from safeshield.monitoring import IN_DOUBT, REVOKED, PromiseMonitor
from safeshield.rollouts.recorded import Episode

Array = npt.NDArray[Any]
TASK = "safeshield/Boat-v0"
EPSILON, LEVEL = 0.01, 0.05
STREAMS, LENGTH = 1000, 4000
DRIFT_EPSILON, CONFIDENCE, FACTOR = 0.02, 0.95, 5
REFERENCE, BEFORE, AFTER, DEPLOYMENTS = 200, 100, 200, 8


class Straight:
    """Steers straight to the goal, with errors of a standard deviation of 0.3 in each entry."""

    batched = True

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        """Return the actions (n, 2)."""
        course = GOAL - observations
        course /= np.maximum(np.linalg.norm(course, axis=-1, keepdims=True), 1e-9)
        noisy = course + 0.3 * rng.standard_normal(course.shape)
        return np.asarray(np.clip(noisy, -1.0, 1.0), np.float32)


def streams() -> None:
    """Print how often and how soon the promise is revoked, by rate."""
    logs = against(EPSILON, np.array([0.0, 1.0]))
    count = np.arange(1, LENGTH + 1)
    limit = math.log(1.0 / LEVEL)
    print(f"{STREAMS} streams of {LENGTH} episodes, epsilon {EPSILON}, b {LEVEL}")
    print("rate / epsilon, revoked, median delay, 1.5 ln(1/b) / KL, Clopper-Pearson anew")
    for factor in (0.5, 1, 2, 5, 10):
        rate = factor * EPSILON
        rng = np.random.default_rng([int(10 * factor), 1])
        delays, wrong = [], 0
        for _ in range(STREAMS):
            hits = np.cumsum(rng.random(LENGTH) < rate)
            path = log_evidence(logs[:, :1] * (count - hits) + logs[:, 1:] * hits)
            found = np.flatnonzero(path >= limit)
            delays.append(found[0] + 1 if len(found) else np.inf)
            wrong += bool((binom.sf(hits - 1, count, EPSILON) < LEVEL).any())
        divergence = rate * math.log(factor) + (1 - rate) * math.log((1 - rate) / (1 - EPSILON))
        most = 1.5 * limit / divergence if factor > 1 else math.inf
        print(
            f"{factor:>5} {np.isfinite(delays).sum():>5} {np.median(delays):>7} {most:>8.0f} "
            f"{wrong:>5}"
        )


def shield_of(seed: int) -> Shield:
    """Return the calibrated shield of a seed; train and calibrate it first where there is none."""
    path = RESULTS / f"monitor_shield_{seed}.safetensors"
    if path.exists():
        return Shield.load(path)
    env = gym.make(TASK)
    log = collect(env, Helmsmen(), episodes=300, seed=seed)
    config = ShieldConfig(seed=seed, critic_hidden=(64, 64))
    shield = ShieldTrainer(config, device="cpu").fit(log, steps=6000)
    shield = shield.calibrate(
        env, policy=Straight(), epsilon=DRIFT_EPSILON, confidence=CONFIDENCE, seed=seed
    )
    RESULTS.mkdir(exist_ok=True)
    shield.save(path)
    return shield


def episodes(shield: Shield, current: float, count: int, *seed: int) -> list[Episode]:
    """Return shielded episodes at a current, from certified starts."""
    number = int(np.random.SeedSequence(seed).generate_state(1)[0]) // 2
    env = gym.make(TASK, current=current)
    return draw_episodes(env, Straight(), count, number, shield, shield)[0]


def drift(seed: int) -> dict[str, Any]:
    """Return the delays of the deployments of one seed, and the rate that was brought about."""
    shield = shield_of(seed)
    low, high = CURRENT, 8.0
    for step in range(7):
        current = (low + high) / 2
        runs = episodes(shield, current, 400, seed, 10 + step)
        rate = float(np.mean([run.violated for run in runs]))
        low, high = (current, high) if rate < FACTOR * DRIFT_EPSILON else (low, current)
    reference = episodes(shield, CURRENT, REFERENCE, seed, 20)
    doubts: list[int | None] = []
    revocations: list[int | None] = []
    reasons: list[str] = []
    violated = []
    for k in range(DEPLOYMENTS):
        after = episodes(shield, current, AFTER, seed, 40 + k)
        violated += [run.violated for run in after]
        found: dict[str, int] = {}

        def note(monitor: PromiseMonitor, found: dict[str, int] = found) -> None:
            found[monitor.state] = monitor.report().episodes - BEFORE
            reasons.append(monitor.reason)

        monitor = PromiseMonitor(shield, reference=reference, on_change=note)
        for i, run in enumerate(episodes(shield, CURRENT, BEFORE, seed, 60 + k) + after):
            monitor.episode(f"{k}-{i}", run)
        doubts.append(found.get(IN_DOUBT))
        revocations.append(found.get(REVOKED))
    return {
        "seed": seed, "delta": shield.delta, "current": current,
        "rate": float(np.mean(violated)), "doubts": doubts, "revocations": revocations,
        "reasons": reasons,
    }  # fmt: skip


def costs() -> None:
    """Print the time of one counted episode, by the number already counted, with a file."""
    shield = shield_of(0)
    with tempfile.TemporaryDirectory() as folder:
        for many in (0, 1_000, 10_000, 100_000):
            monitor = PromiseMonitor(shield)
            for k in range(many):
                monitor.episode(f"{k:07d}", False)
            started = time.perf_counter()
            for k in range(20):
                monitor.episode(f"in memory {k}", False)
            plain = (time.perf_counter() - started) / 20
            monitor._path = Path(folder) / f"{many}.json"
            monitor._write(monitor._path)
            started = time.perf_counter()
            for k in range(20):
                monitor.episode(f"with a file {k}", False)
            saved = (time.perf_counter() - started) / 20
            size = monitor._path.stat().st_size
            print(f"{many:>7} {1e6 * plain:>8.0f} us {1e3 * saved:>8.2f} ms {size:>10} bytes")


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["streams", "drift", "time"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine())
    if arguments.part == "streams":
        streams()
    elif arguments.part == "time":
        costs()
    else:
        for seed in arguments.seeds:
            row = once(f"monitor_drift_{seed}", lambda: drift(seed), redo=arguments.redo)  # noqa: B023
            print(*(f"{key} {row[key]}" for key in row if key != "reasons"), sep=", ")
            print(*sorted(set(row["reasons"])), sep="\n")


if __name__ == "__main__":
    main()
