"""What a blind search finds behind the boat's shield, today and before committed replacements.

    python benchmarks/falsify.py today.safetensors --seeds 0 1 2
    python benchmarks/falsify.py before_{seed}.safetensors --seeds 0 1 2 --checkout BEFORE

Each cell is `falsify` with a budget of episodes, and 2,000 fresh episodes for the worst agent. A
shield that was trained and calibrated by the code of an earlier checkout is read by today's code,
which executes the same actions. To show that, BEFORE names a folder with the installed package of
that checkout; 20,000 decisions are then made by it as well, in a process of its own, and compared.
To make the demonstration's shield of an earlier commit, such as da1f7f7, install that commit and
run its command `safeshield demo`.

The table has processor time, because the time by the clock depends on what else runs. Cells are
stored and not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS, machine, once

from safeshield import Shield
from safeshield.envs.boat import STATE_HIGH, STATE_LOW
from safeshield.evaluation.falsification import falsify

BOAT = "safeshield/Boat-v0"
DECISIONS = 20_000
_THERE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import numpy as np
import safeshield
from safeshield.shield import Shield
assert safeshield.__file__.startswith(sys.argv[1]), safeshield.__file__
given = np.load(sys.argv[3])
executed, report = Shield.load(sys.argv[2]).filter(given["rows"], given["actions"])
np.savez(sys.argv[4], executed=executed, intervened=report.intervened)
"""


def agreement(path: Path, checkout: Path) -> dict[str, Any]:
    """Return how many decisions of the earlier code differ from today's."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(STATE_LOW, STATE_HIGH, (DECISIONS, 2)).astype(np.float32)
    actions = rng.uniform(-1.0, 1.0, (DECISIONS, 2)).astype(np.float32)
    executed, report = Shield.load(path).filter(rows, actions)
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.npz"), Path(folder, "made.npz")
        np.savez(given, rows=rows, actions=actions)
        command = [sys.executable, "-c", _THERE, str(checkout), str(path), str(given), str(made)]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with np.load(made) as before:
            differs = np.abs(before["executed"] - executed).max(axis=1) > 1e-4
    return {
        "decisions": DECISIONS,
        "replaced": int(report.intervened.sum()),
        "nothing_acceptable": int((~report.acceptable).sum()),
        "differ": int(differs.sum()),
    }


def cell(path: Path, seed: int, rollouts: int, folder: Path, cma: bool) -> dict[str, Any]:
    """Search behind a shield, and store the worst agent beside the figures."""
    shield = Shield.load(path)
    found = falsify(shield, gym.make(BOAT), minutes=None, rollouts=rollouts, seed=seed, cma=cma)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / f"{path.stem}_{seed}_worst.json")
    return found.to_json()


def main() -> None:
    """Run the cells without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shield", help="file of the shield; {seed} stands for the seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=8_000)
    parser.add_argument("--checkout", type=Path, help="installed package of the earlier checkout")
    parser.add_argument("--no-cma", action="store_true", help="search with the battery alone")
    parser.add_argument("--folder", type=Path, default=RESULTS / "falsify")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    columns = (
        "shield", "seed", "delta", "family of the worst", "violating", "99% bounds",
        "in the search", "minutes of processor time", "decisions that differ",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for seed in arguments.seeds:
        path = Path(arguments.shield.replace("{seed}", str(seed)))
        own = f"{path.stem}_{seed}_{arguments.rollouts}{'_battery' * arguments.no_cma}"
        row = once(
            own,
            lambda path=path, seed=seed: cell(
                path, seed, arguments.rollouts, arguments.folder, not arguments.no_cma
            ),
            folder=arguments.folder,
        )
        differ = "-"
        if arguments.checkout is not None:
            same = once(
                f"{path.stem}_agreement",
                lambda path=path: agreement(path, arguments.checkout.resolve()),
                folder=arguments.folder,
            )
            differ = f"{same['differ']} of {same['decisions']}"
        print(f"| {path.stem} | {seed} | {row['delta']:.3g} | {row['probe']['family']} | "
              f"{row['violating']} of {row['episodes']} | {row['lower']:.2%} to {row['upper']:.2%} "
              f"| {row['searched']} episodes | {row['cpu_minutes']:.1f} | {differ} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
