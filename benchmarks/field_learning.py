"""Train PPO and SAC behind a calibrated shield on the field's tasks, and count the violations.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/field_learning.py --data FOLDER     # logs, TASK.hdf5; resumes
    python benchmarks/field_learning.py --data FOLDER --table

The shield is that of `field.py` with the same seed. It is calibrated for the default proposers at
epsilon 0.05 and confidence 0.95, where this finds no threshold at 0.1, because a learner has no
policy yet for which a shield could be calibrated. Each learner then takes 100,000 steps from
certified starts. Where the shield has no promise, the learner starts anywhere, behind the threshold
with the lowest rate of violations in the curve.

Afterwards the learned policy (mean actions) plays 20 fresh episodes behind the same shield. So does
the PPO of `field.py`, which learned without a shield.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from common import machine, run_cells
from field import calibrated, make, shield_of
from stable_baselines3 import PPO, SAC
from suites import Normalised, learn, trained

from safeshield import SafetyShield, Shield
from safeshield.evaluation import EPISODES, ReferenceReturns, evaluate
from safeshield.policies import ShieldCallback
from safeshield.wrappers import CertifiedStarts

TASKS = ("BallRun", "DroneCircle", "PointGoal1")
LEARNERS: dict[str, type[PPO] | type[SAC]] = {"ppo": PPO, "sac": SAC}


def calibrated_shield(task: str, seed: int, data: Path, folder: Path) -> Shield:
    """Return the shield of a task, calibrated for the default proposers, or read from its file.

    The shield has no record if calibration finds no threshold.
    """
    path = folder / f"{task}_battery_{seed}.safetensors"
    if not path.exists():
        shield, _ = calibrated(shield_of(task, seed, data, folder), make(task), seed)
        shield.save(path)
    return Shield.load(path)


def cell(task: str, name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train one learner behind the shield, and let it play."""
    shield = calibrated_shield(task, seed, data, folder)
    promised = shield.record is not None

    def shielded() -> gym.Env:
        env = SafetyShield(make(task), shield)
        return CertifiedStarts(env) if promised else env

    counts = ShieldCallback()
    path = folder / f"{task}_learned_{name}_{seed}"
    learn(shielded, seed, path, LEARNERS[name], counts)
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    row = {
        "task": task,
        "learner": name,
        "seed": seed,
        "epsilon": None if shield.record is None else shield.record.epsilon,
        "delta": shield.delta,
        "episodes": counts.episodes,
        "violating": counts.violating_episodes,
        "replaced": counts.interventions / counts.steps,
    }
    frozen = trained(task, "ppo", seed, data, folder)
    for key, agent in (("learned", Normalised(path, LEARNERS[name])), ("frozen", frozen)):
        played = evaluate(make(task), agent, EPISODES, 2_000_000 + seed, shield=shield)
        row[key] = float(references.normalise(played.mean_return))
        row[f"{key}_violating"] = played.violating
    return row


def line(row: dict[str, Any]) -> str:
    """Return a cell as a row of a Markdown table."""
    promise = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
    return (
        f"| {row['task']} | {row['learner'].upper()} | {row['seed']} | {promise} | "
        f"{row['delta']:.3g} | {row['violating']} of {row['episodes']} | {row['replaced']:.0%} | "
        f"{row['learned']:.2f}, {row['learned_violating']} of {EPISODES} | "
        f"{row['frozen']:.2f}, {row['frozen_violating']} of {EPISODES} |"
    )


def main() -> None:
    """Run the cells without a stored result, each in its own process, and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = run_cells(
        __file__, __doc__, "learners", list(LEARNERS), cell, "{task}_learned_{name}_{seed}", TASKS
    )
    print(machine())
    print("| task | learner | seed | epsilon | delta | violating in training | replaced | learned, "
          "shielded | the PPO without a shield, shielded |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
