"""Plant ten faults in shields of two tasks, and count how often the diagnosis names them first.

    python benchmarks/diagnosis.py                    # 2 agents, seed 11
    python benchmarks/diagnosis.py --episodes 40 --seed 12

The shields' critics are fitted to the exact values of the double integrator and the boat
(`tests/faults.py`, which also plants the faults), so that nothing but the planted fault is wrong.
The reckless agent pushes to the right wall, or steers straight for the goal. "unknown change" is
the fault "changed dynamics" without the training log; the diagnosis cannot tell it from an
optimistic value then, and says so. "none" is a shield without a fault.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from faults import FAULTS, TASKS, Planted, sound

from safeshield.evaluation.causes import LATE, START


def variants(task: str) -> dict[str, Planted]:
    """Return the ten planted faults, and the two cases that do not count, by name."""
    planted = {name: plant(task) for name, plant in FAULTS.items()}
    unknown = replace(planted["changed dynamics"], cause=LATE, log=None)
    fine = Planted(sound(task).with_delta(0.15), TASKS[task].env(), START)
    return {**planted, "unknown change": unknown, "none": fine}


def main() -> None:
    """Run all faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The shields are not calibrated, and some environments are others than their records name.
    warnings.simplefilter("ignore")
    right = {}
    print("| task | planted | agent | named first | entries by cause |\n|---|---|---|---|---|")
    for task, given in TASKS.items():
        for name, planted in variants(task).items():
            for agent, policy in (("reckless", given.agent), ("random", "random")):
                found = planted.shield.diagnose(
                    planted.env,
                    policy,
                    episodes=options.episodes,
                    seed=options.seed,
                    log=planted.log,
                )
                hit = found.cause == planted.cause
                counts = ", ".join(f"{cause} {count}" for cause, count in found.counts.items())
                says = "yes" if hit else f"**no**, {planted.cause} expected"
                print(f"| {task} | {name} | {agent} | {says} | {counts} |", flush=True)
                if name in FAULTS:
                    right.setdefault(agent, []).append(hit)
    for agent, hits in right.items():
        print(f"{agent}: the planted cause is named first in {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    main()
