"""Make logs of the field's tasks with `safeshield collect`, for the other benchmarks.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/logs.py --data FOLDER                   # writes FOLDER/TASK.hdf5
    python benchmarks/logs.py --data FOLDER --tasks CarGoal1  # any of DSRL's tasks

Each log holds episodes of PPO under four limits on an episode's cost (none, 25, 5 and 0), from its
first step to its last. The episodes are thinned on a grid of cost and return, so that safe and
unsafe ones both remain. An interrupted collection continues where it stopped. A log that is
complete is not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import apart

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield.suites.tasks import find_task

LIMITS = "none,25,5,0"
TASKS = {
    "CarGoal1": (200, 150_000),
    "PointButton1": (200, 150_000),
    "AntVelocity": (300, 150_000),
    "DroneCircle": (500, 150_000),
    "easysparse": (400, 60_000),
}
"""Most episodes that a log keeps, and number of steps of each of the four learners."""
OTHER = (300, 150_000)
"""The same for DSRL's other tasks, which are made only where they are named."""


def main() -> None:
    """Make the logs that do not exist yet, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder for TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--seed", type=int, default=10)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        path = arguments.data / f"{task}.hdf5"
        if path.exists():
            continue
        episodes, steps = TASKS.get(task, OTHER)
        command = [sys.executable, "-m", "safeshield.cli", "collect", find_task(task).env_id]
        command += [str(path), "--limits", LIMITS, "--seed", str(arguments.seed)]
        command += ["--episodes", str(episodes), "--steps", str(steps)]
        apart(command, path.name)


if __name__ == "__main__":
    main()
