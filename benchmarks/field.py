"""Calibrate shields on the field's tasks, and test each promise on fresh episodes.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/field.py --data FOLDER     # logs in DSRL's format, TASK.hdf5; resumes
    python benchmarks/field.py --data FOLDER --table

A cell is one agent on one task with one seed. Its shield is `ShieldTrainer` with its defaults,
trained on the log for 20,000 updates, and with the constraint that the observation tells, where
there is one. The agents are PPO for reward alone (100,000 steps in the environment), behaviour
cloning of the whole log, and random actions. "bc-costs" is the cloning agent behind a shield that
knows costs alone, in the log and in the environment. The shield is calibrated for the agent as it
is deployed (mean actions) at epsilon 0.05 and confidence 0.95; where this finds no threshold, once
more at epsilon 0.1. Then two sets of fresh episodes are played with seeds that no calibration uses:

    certified     300 episodes from certified starts; their violating episodes are compared with
                  epsilon
    all starts    20 episodes by the field's protocol: mean normalised return, and mean cost
                  divided by the limit 10

A cell where both calibrations find no threshold stores the curve and the message of the last error
instead. Its agent then plays behind the threshold with the lowest rate of violations in that curve,
without a promise, and `Shield.diagnose` counts the causes of the violations in 40 episodes. All
tasks have the same settings. They were chosen on seed 10.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import machine, run_cells
from suites import read_log, trained

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield import CalibrationError, OfflineDataset, Shield
from safeshield.algorithms.shield_trainer import ShieldConfig, ShieldTrainer
from safeshield.evaluation import EPISODES, ReferenceReturns, evaluate
from safeshield.suites.labels import with_constraint
from safeshield.suites.tasks import COST_LIMIT, find_task

EPSILONS, CONFIDENCE = (0.05, 0.1), 0.95
CERTIFIED, DIAGNOSED = 300, 40
UPDATES = 20_000
MOST_THAT_AGREE = {0.05: 21, 0.1: 39}
"""Largest number of 300 episodes that may violate before the one-sided 95% lower limit of the rate
exceeds epsilon."""
AGENTS = ("ppo", "bc", "random", "bc-costs")
COSTS = "-costs"


def make(task: str, costs: bool = False) -> gym.Env:
    """Return a task's environment, which reports the constraint where the suite knows one.

    With `costs` it reports costs alone.
    """
    env = gym.make(find_task(task).env_id)
    return env if costs else with_constraint(env)


def shield_of(task: str, seed: int, data: Path, folder: Path, costs: bool = False) -> Shield:
    """Return the shield of a task, trained now or read from its file.

    With `costs` it is trained on the costs of the log alone.
    """
    path = folder / f"{task}_shield{COSTS if costs else ''}_{seed}.safetensors"
    if not path.exists():
        trainer = ShieldTrainer(ShieldConfig(seed=seed), device="cpu")
        checkpoint = path.with_suffix(".checkpoint")
        log = OfflineDataset.load(data / f"{task}.hdf5") if costs else read_log(data, task)
        trainer.fit(log, steps=UPDATES, checkpoint=checkpoint)
        trainer.shield().save(path)
        checkpoint.unlink()
    return Shield.load(path)


def calibrated(
    shield: Shield,
    env: gym.Env,
    seed: int,
    agent: object = None,
    name: str | None = None,
) -> tuple[Shield, dict[str, Any]]:
    """Return the shield that is to be played, and what its calibration says.

    The shield is calibrated for an agent, or without one for the default proposers.
    """
    curve: list[Any] = []
    for epsilon in EPSILONS:
        try:
            shield = shield.calibrate(
                env,
                epsilon=epsilon,
                confidence=CONFIDENCE,
                policy=agent,
                policy_name=name,
                deterministic=True,
                seed=seed,
            )
        except CalibrationError as error:
            curve, message = list(error.curve), str(error)
            continue
        assert shield.record is not None
        told = {"promise": shield.record.promise, "epsilon": epsilon, "delta": shield.delta}
        return shield, told
    best = min(curve, key=lambda point: (point.violations / point.episodes, -point.delta))
    points = [dataclasses.asdict(point) for point in curve]
    told = {"promise": None, "delta": best.delta, "message": message, "curve": points}
    return shield.with_delta(best.delta), told


def cell(task: str, name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train, calibrate and play one cell."""
    costs, kind = name.endswith(COSTS), name.removesuffix(COSTS)
    shield = shield_of(task, seed, data, folder, costs)
    agent = kind if kind == "random" else trained(task, kind, seed, data, folder)
    started = time.process_time()
    shield, told = calibrated(shield, make(task, costs), seed, agent, name)
    seconds = time.process_time() - started
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    env, fresh = make(task, costs), 1_000_000 + seed
    row = {"task": task, "agent": name, "seed": seed, **told, "calibration_seconds": seconds}
    row["constraint"] = shield.constraint
    if told["promise"] is not None:
        certified = evaluate(env, agent, CERTIFIED, fresh, shield=shield, starts="certified")
        row["violating"] = certified.violating
        row["start_share"] = certified.start_share
    else:
        diagnosis = shield.diagnose(
            env, agent, episodes=DIAGNOSED, seed=fresh + 2, deterministic=True
        )
        row["causes"] = diagnosis.counts
    for key, used in (("shielded", shield), ("unshielded", None)):
        result = evaluate(env, agent, EPISODES, fresh + 1, shield=used)
        row[key] = {
            "return": float(references.normalise(result.mean_return)),
            "cost": result.mean_cost / COST_LIMIT,
            "violating": result.violating,
            "replaced": result.intervention_rate,
        }
    return row


def epsilon_of(row: dict[str, Any]) -> float:
    """Return the epsilon of a cell's promise."""
    return float(row.get("epsilon", EPSILONS[0]))


def line(row: dict[str, Any]) -> str:
    """Return a cell as a row of a Markdown table."""
    inside, outside = row["shielded"], row["unshielded"]
    if row["promise"] is None:
        promise = "none | - | - | -"
    else:
        promise = (
            f"{epsilon_of(row)} | {row['delta']:.3g} | {row['violating']} | "
            f"{row['start_share']:.0%}"
        )
    return (
        f"| {row['task']} | {row['agent']} | {row['seed']} | {promise} | "
        f"{inside['replaced']:.0%} | {inside['return']:.2f} / {inside['cost']:.2f} | "
        f"{outside['return']:.2f} / {outside['cost']:.2f} |"
    )


def main() -> None:
    """Run the cells without a stored result, each in its own process, and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = run_cells(__file__, __doc__, "agents", AGENTS, cell, "{task}_{name}_{seed}")
    print(machine())
    print("| task | agent | seed | epsilon | delta | violating of 300 | certified starts | "
          "replaced | return / cost | without the shield |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(line(row))
    for row in rows:
        if "causes" in row:
            print(f"{row['task']}, {row['agent']}, seed {row['seed']}: {row['causes']}")
    promised = [row for row in rows if row["promise"] is not None]
    wrong = sum(row["violating"] > MOST_THAT_AGREE[epsilon_of(row)] for row in promised)
    if promised:
        pooled = np.mean([row["violating"] for row in promised]) / CERTIFIED
        print(f"{len(promised)} promises of {len(rows)} cells; {wrong} contradicted; "
              f"pooled rate {pooled:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
