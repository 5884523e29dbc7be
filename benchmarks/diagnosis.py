"""Plant ten faults in shields of two tasks, and count how often the diagnosis names them first.

    python benchmarks/diagnosis.py                    # 2 agents, seed 11
    python benchmarks/diagnosis.py --trained --seed 12   # shields that were learned, boat only

The shields' critics are fitted to the exact values of the double integrator and the boat
(`tests/faults.py`, which also plants the faults), so that nothing but the planted fault is wrong.
The reckless agent pushes to the right wall, or steers straight for the goal. "unknown change" is
the fault "changed dynamics" without the training log; the diagnosis cannot tell it from an
optimistic value then, and says so. "none" is a shield without a fault.

With --trained, shields of `ShieldTrainer` (3,000 updates on 300 trips of the helmsmen, small
networks) take their place, with both ways to replace an action and the faults that need no other
critics.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from faults import FAULTS, TASKS, BrokenSensor, Planted, Reports, Scaled, sound

from safeshield import ShieldConfig, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.evaluation.causes import CHANGED, CONTRADICTION, LATE, START, THIN, UNREADABLE
from safeshield.shield import NearestAcceptable


def variants(task: str) -> dict[str, Planted]:
    """Return the ten planted faults, and the two cases that do not count, by name."""
    planted = {name: plant(task) for name, plant in FAULTS.items()}
    unknown = replace(planted["changed dynamics"], cause=LATE, log=None)
    fine = Planted(sound(task).with_delta(0.15), TASKS[task].env(), START)
    return {**planted, "unknown change": unknown, "none": fine}


def trained_variants() -> dict[str, Planted]:
    """Return planted faults of learned shields of the boat, by name."""
    boat = TASKS["boat"]
    log = collect(boat.env(), Helmsmen(), episodes=300, seed=3)
    config = ShieldConfig(critic_hidden=(64, 64), behaviour_hidden=(32, 32))
    learned = ShieldTrainer(config, device="cpu").fit(log, steps=3000).shield()
    found = {}
    for way, shield in (
        ("committed fallback", learned),
        ("nearest candidate", learned.with_replacement(NearestAcceptable())),
    ):
        safe, estimated = shield.with_delta(0.1), shield.with_constraint(None).with_delta(0.1)
        larger, turned = Reports(boat.env(), shift=0.2), Reports(boat.env(), factor=-1.0)
        cases = {
            "thin delta": Planted(shield, boat.env(), THIN),
            "thin delta, estimated": Planted(estimated.with_delta(0.0), boat.env(), THIN),
            "wrong h": Planted(safe, larger, CONTRADICTION),
            "wrong h, estimated": Planted(estimated, larger, CONTRADICTION),
            "turned sign": Planted(safe, turned, CONTRADICTION),
            "turned sign, estimated": Planted(estimated, turned, CONTRADICTION),
            "changed dynamics": Planted(safe, Scaled(boat.env(), boat.weak), CHANGED),
            "broken sensor": Planted(safe, BrokenSensor(boat.env(), 5), UNREADABLE),
        }
        found |= {f"{name}, {way}": replace(one, log=log) for name, one in cases.items()}
        fine = Planted(shield.with_delta(0.15), boat.env(), START, log)
        found[f"none, {way}"] = fine
    return found


def main() -> None:
    """Run all faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--trained", action="store_true", help="use learned shields of the boat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The shields are not calibrated, and some environments are others than their records name.
    warnings.simplefilter("ignore")
    right = {}
    print("| task | planted | agent | named first | entries by cause |\n|---|---|---|---|---|")
    for task in ("boat",) if options.trained else TASKS:
        given = TASKS[task]
        cases = trained_variants() if options.trained else variants(task)
        for name, planted in cases.items():
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
                if name in FAULTS or (options.trained and not name.startswith("none")):
                    right.setdefault(agent, []).append(hit)
    for agent, hits in right.items():
        print(f"{agent}: the planted cause is named first in {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    main()
