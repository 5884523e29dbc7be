"""Test what SafeFQL's actor promises without a filter, on the boat: one draw, and one draw +CP.

    python benchmarks/actor_alone.py                    # seeds 0, 1, 2; resumes; prints the table

Each seed has 600 logged trips and 20,000 updates, with the settings of `boat.py`: one draw of the
student is executed at every step. Three actors have the same critics: "own", whose gate is the
default margin; "paper", trained anew with the gate at 0; and "cp", trained anew with the gate at
the delta of the record of "paper" (`SafeFQL.recalibrated`, "+CP"). Each is calibrated alone at
epsilon 0.01 and confidence 0.99 (`SafeFQL.calibrate`; at 0.05 and 0.95 where this finds no
threshold). "violating" counts 1,000 fresh episodes from certified starts. "safe_violating" counts
500 uniform starts of the exact safe set, as `boat.py` does; there the weights of "own" also play
with 16 candidates at several margins, and by the teacher's draws (`SafeFQL.acting_by`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from boat import BOAT, agent_policy, alone
from common import RESULTS, machine, once

import safeshield
from safeshield import CalibrationError, SafeFQL, SafeFQLConfig
from safeshield.demo.helmsmen import Helmsmen
from safeshield.evaluation.episodes import evaluate
from safeshield.exact import boat_value

REQUESTS = ((0.01, 0.99), (0.05, 0.95))
FRESH, TIMES = 1000, (1, 2, 4, 8)


def promised(agent: SafeFQL, seed: int) -> dict[str, Any]:
    """Calibrate an actor alone, and play fresh episodes from the starts that it certifies."""
    told: dict[str, Any] = {"agent": agent, "delta": None}
    for epsilon, confidence in REQUESTS:
        try:
            certified = agent.calibrate(
                gym.make(BOAT), epsilon=epsilon, confidence=confidence, seed=seed
            )
        except CalibrationError as error:
            told["message"] = str(error)
            continue
        record = certified.record
        assert record is not None
        fresh = evaluate(
            gym.make(BOAT),
            agent,
            FRESH,
            70_000 + seed,
            starts="certified",
            certified_by=agent.shield().with_delta(record.delta),
            deterministic=False,
        )
        told |= {
            "agent": certified,
            "delta": record.delta,
            "epsilon": epsilon,
            "start_share": record.start_share,
            "violating": fresh.violating,
            "promise": record.promise,
        }
        break
    return told


def run(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train, calibrate, train the student anew at delta, and play."""
    torch.set_num_threads(1)
    log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
    path = folder / f"actor_alone_{steps}_{seed}.safetensors"
    if path.exists():
        agent = SafeFQL.load(path, device="cpu")
    else:
        config = SafeFQLConfig(
            seed=seed, discount=0.997, teacher="behaviour", distillation=0.1, candidates=1
        )
        agent = SafeFQL(config, device="cpu").fit(log, steps=steps)
        folder.mkdir(parents=True, exist_ok=True)
        agent.save(path)
    exact = boat_value()
    safety = agent._fitted().critics.safety
    row: dict[str, Any] = {"seed": seed, "steps": steps}

    def played(name: str, one: SafeFQL) -> dict[str, float]:
        found = alone("safe", agent_policy(one._changed()), exact, seed)
        return {f"{name}_{key}": value for key, value in found.items()}

    def tell(name: str, one: SafeFQL) -> SafeFQL:
        """Add the promise and the play of an actor, and return it with its record."""
        told = promised(one, seed)
        certified: SafeFQL = told.pop("agent")
        row[f"{name}_gate"] = one.gate
        row.update({f"{name}_{key}": value for key, value in told.items()})
        row.update(played(name, one))
        return certified

    tell("own", agent)
    paper = tell("paper", agent.recalibrated(log, steps // 2, delta=0.0))
    if paper.record is not None:
        tell("cp", paper.recalibrated(log, steps // 2))
    many = agent.acting_by("student", candidates=16)
    for times in TIMES:
        margin = times * row["own_gate"] / safety.scale.spread
        row |= played(f"sixteen_x{times}", many.with_margin(margin))
    row |= played("teacher_of_sixteen", agent.acting_by("sample", candidates=16))
    return row


def main() -> None:
    """Run the seeds without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    print(machine())
    rows = [
        once(
            f"actor_alone_{arguments.steps}_{seed}",
            lambda seed=seed: run(seed, arguments.steps, arguments.folder),
            folder=arguments.folder,
        )
        for seed in arguments.seeds
    ]
    for name in {key: None for row in rows for key in row}:
        values = [row.get(name) for row in rows]
        if all(value is None or isinstance(value, int | float) for value in values):
            print(f"{name:30}", *("-" if one is None else f"{one:>10.4g}" for one in values))


if __name__ == "__main__":
    main()
