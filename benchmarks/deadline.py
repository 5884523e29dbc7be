"""Would a deadline within the process help? A worker thread judges, the caller waits so long.

    python benchmarks/deadline.py                    # prints two tables; about 20 s of CPU time

For each step the caller computes the fallback's action, hands observation and proposal to a worker
thread, and waits for the verdict until the deadline. Where there is none, it takes the fallback's
action. "direct" calls `Shield.filter` in the caller, as the wrappers do. Both take turns in blocks
of 100 steps. The first table has the time from proposal to action, and the share of steps in which
an action was there later than the deadline and 0.2 ms. The second table has the longest time to an
action where judging itself is slow: it sleeps, multiplies matrices in NumPy, computes in Python, or
sorts a list, which is one call in C that keeps the interpreter's lock.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from common import machine

import safeshield.envs  # noqa: F401
from safeshield import Shield, ShieldConfig, ShieldTrainer, collect

SPARE = 2e-4


def trained() -> Shield:
    """Return a shield of the boat that is trained shortly; its speed is that of any other."""
    log = collect(gym.make("safeshield/Boat-v0"), "random", episodes=40, seed=0)
    return ShieldTrainer(ShieldConfig(), device="cpu").fit(log, steps=20).shield()


def in_time(
    pool: concurrent.futures.Executor,
    judge: Callable[[], Any],
    fallback: Callable[[], Any],
    deadline: float,
) -> tuple[float, bool]:
    """Return the time to an action, seconds, and whether it is the fallback's."""
    started = time.perf_counter()
    fallback()
    verdict = pool.submit(judge)
    late = False
    try:
        verdict.result(max(deadline - (time.perf_counter() - started), 0.0))
    except concurrent.futures.TimeoutError:
        late = True
    took = time.perf_counter() - started
    # The late verdict is waited for here, so that steps do not disturb each other.
    concurrent.futures.wait([verdict])
    return took, late


def quantiles(times: list[float]) -> str:
    """Return median and high quantiles in microseconds, as cells of a table."""
    return " | ".join(f"{1e6 * q:,.0f}" for q in np.quantile(times, (0.5, 0.99, 0.999, 1.0)))


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each row")
    parser.add_argument("--slow", type=int, default=20, help="steps of a row of table two")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shield = trained()
    rng = np.random.default_rng(0)
    rows = rng.uniform([-3, -2], [2, 2], (4096, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (4096, 2)).astype(np.float32)
    _, report = shield.filter(rows, actions)
    kinds = {"accepted": ~report.intervened, "replaced": report.intervened}
    print(machine())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        print("| step | deadline | median, us | 99% | 99.9% | longest | fallback ran | later than "
              "the deadline + 0.2 ms |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for kind, chosen in kinds.items():
            at = np.flatnonzero(chosen)
            if not len(at):
                continue
            for deadline in (0.001, 0.005):
                direct: list[float] = []
                threaded: list[tuple[float, bool]] = []
                for step in range(arguments.steps):
                    i = int(at[step % len(at)])

                    def judge(i: int = i) -> Any:  # noqa: ANN401
                        return shield.filter(rows[i], actions[i])

                    def fallback(i: int = i) -> Any:  # noqa: ANN401
                        return shield.model.fallback_alone(shield.states(rows[i : i + 1]))

                    if step // 100 % 2:
                        started = time.perf_counter()
                        judge()
                        direct.append(time.perf_counter() - started)
                    else:
                        threaded.append(in_time(pool, judge, fallback, deadline))
                own = [took for took, _ in threaded]
                for name, times, ran in (
                    ("direct", direct, "-"),
                    ("thread", own, f"{np.mean([late for _, late in threaded]):.3%}"),
                ):
                    over = np.mean(np.array(times) > deadline + SPARE)
                    print(f"| {kind}, {name} | {1e3 * deadline:g} ms | {quantiles(times)} | {ran} "
                          f"| {over:.3%} |", flush=True)  # fmt: skip
        print("\n| judging takes about 0.2 s, as it | deadline | longest time to an action, ms "
              "|\n|---|---|---|")  # fmt: skip
        square = rng.standard_normal((1200, 1200))
        numbers = rng.random(1_500_000).tolist()
        slow: dict[str, Callable[[], Any]] = {
            "sleeps": lambda: time.sleep(0.2),
            "multiplies matrices in NumPy": lambda: [square @ square for _ in range(4)],
            "computes in Python": lambda: sum(k * k for k in range(3_000_000)),
            "sorts a list in C": lambda: sorted(numbers),
        }
        for name, work in slow.items():
            times = [in_time(pool, work, lambda: None, 0.005)[0] for _ in range(arguments.slow)]
            print(f"| {name} | 5 ms | {1e3 * max(times):.1f} (median "
                  f"{1e3 * np.median(times):.1f}) |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
