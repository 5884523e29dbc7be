"""Compare labels and expectiles for shields that learn from costs alone.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/cost_labels.py --data FOLDER --seeds 10     # logs, TASK.hdf5; resumes

A cell is one setting on one task with one seed. Its shield is learned by `ShieldTrainer` in 6,000
updates from the costs of the log. It is calibrated at epsilon 0.05 and confidence 0.95, once for an
agent that imitates the whole log and once for random actions, in an environment that reports costs
alone. Each agent then plays 100 fresh episodes behind the shield from certified starts. Where the
calibration finds no threshold, the table says "none" and shows the threshold with the lowest share
of violating episodes among those that the calibration tried.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from common import machine, run_cells
from field import CONFIDENCE, EPSILONS, make
from suites import trained

from safeshield import CalibrationError, OfflineDataset, ShieldConfig, ShieldTrainer
from safeshield.evaluation import evaluate

ARMS = {"M1-e90": (1.0, 0.9), "M25-e99": (25.0, 0.99), "M25-e90": (25.0, 0.9)}
"""Label of unsafe states, and expectile of V_h."""
TASKS = ("BallRun", "CarRun", "CarCircle", "PointCircle1")
AGENTS = ("bc", "random")
UPDATES, EPISODES, FRESH = 6_000, 100, 1_000_000


def cell(task: str, name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train a shield, calibrate it for each agent and play it."""
    magnitude, expectile = ARMS[name]
    config = ShieldConfig(seed=seed, label_magnitude=magnitude, safety_expectile=expectile)
    log = OfflineDataset.load(data / f"{task}.hdf5")
    shield = ShieldTrainer(config, device="cpu").fit(log, steps=UPDATES).shield()
    env = make(task, costs=True)
    played: dict[str, dict[str, Any]] = {}
    for which in AGENTS:
        agent = which if which == "random" else trained(task, which, seed, data, folder)
        alone = evaluate(env, agent, EPISODES, FRESH)
        told = played[which] = {"alone": alone.violating, "promise": None}
        try:
            fixed = shield.calibrate(
                env, epsilon=EPSILONS[0], confidence=CONFIDENCE, policy=agent, policy_name=which,
                deterministic=True, seed=seed,
            )  # fmt: skip
        except CalibrationError as error:
            told["message"] = str(error)
            if error.curve:
                best = min(error.curve, key=lambda p: (p.violations / p.episodes, -p.episodes))
                told |= {"delta": best.delta, "violating": best.violations,
                         "episodes": best.episodes, "replaced": best.intervention_rate}  # fmt: skip
            continue
        assert fixed.record is not None
        run = evaluate(env, agent, EPISODES, FRESH, shield=fixed, starts="certified")
        told |= {"promise": fixed.record.promise, "delta": fixed.delta, "episodes": EPISODES,
                 "violating": run.violating, "replaced": run.intervention_rate,
                 "certified": run.start_share}  # fmt: skip
    return {"task": task, "arm": name, "seed": seed, **played}


def shown(told: dict[str, Any]) -> str:
    """Return the columns of one agent."""
    if "delta" not in told:
        return f"{told['alone']} | no certified start"
    text = f"{told['violating']} of {told['episodes']}, {told['replaced']:.0%} replaced"
    return f"{told['alone']} | " + (text if told["promise"] else f"none; {text}")


def main() -> None:
    """Run the cells without a stored result, each in its own process, and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = run_cells(
        __file__, __doc__, "arms", tuple(ARMS), cell, "labels_{task}_{name}_{seed}", TASKS
    )
    print(machine())
    print("| task | M | expectile | seed | cloning alone, of 100 | behind the shield | "
          "random alone, of 100 | behind the shield |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        magnitude, expectile = ARMS[row["arm"]]
        print(f"| {row['task']} | {magnitude:g} | {expectile} | {row['seed']} | "
              f"{shown(row['bc'])} | {shown(row['random'])} |")  # fmt: skip


if __name__ == "__main__":
    main()
