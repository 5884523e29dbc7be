"""Code that the benchmarks share: stored results, the machine, helpers for the two tasks."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describe the hardware and the versions, which are stored with every figure."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        model = names[0] if names else model
    packages = ("safeshield", "torch", "numpy", "gymnasium", "stable-baselines3")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def once(
    name: str,
    compute: Callable[[], dict[str, Any]],
    *,
    redo: bool = False,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Return the result stored under this name; compute and store it first where there is none."""
    path = folder / f"{name}.json"
    if path.exists() and not redo:
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    started = time.perf_counter()
    result = {**compute(), "seconds": round(time.perf_counter() - started, 1), **machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
    return result


def apart(command: list[str], name: str) -> None:
    """Run a command with one thread, and say so if the cell of this name fails."""
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(f"{name} failed; going on", flush=True)


def run_cells(
    script: str,
    description: str | None,
    option: str,
    names: Sequence[str],
    cell: Callable[[str, str, int, Path, Path], dict[str, Any]],
    stored: str,
    tasks: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Read the command line, run the cells without a stored result, and return all results.

    A cell is a task, a name (of an agent, for example) and a seed. It runs in its own process.

    Args:
        script: File of the benchmark, which runs again for each cell.
        description: Help of the command.
        option: Name of the option that selects names, such as "agents".
        names: All names.
        cell: Function (task, name, seed, data, folder) that computes a result.
        stored: Name of a result, with the fields task, name and seed.
        tasks: Tasks by default; empty for every log in the folder.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", help=f"default: {' '.join(tasks) or 'every log'}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(f"--{option}", nargs="+", default=list(names), choices=list(names))
    place = RESULTS / "field"
    parser.add_argument("--folder", type=Path, default=place, help="where models and results lie")
    parser.add_argument("--here", action="store_true", help="run in this process")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    arguments = parser.parse_args()
    data, folder = arguments.data, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    wanted = arguments.tasks or tasks or sorted(path.stem for path in data.glob("*.hdf5"))
    rows = []
    for seed, name, task in itertools.product(arguments.seeds, getattr(arguments, option), wanted):
        key = stored.format(task=task, name=name, seed=seed)
        path = folder / f"{key}.json"
        if arguments.here and not arguments.table:
            once(key, partial(cell, task, name, seed, data, folder), folder=folder)
        elif not (arguments.table or path.exists()):
            command = [sys.executable, script, "--tasks", task, f"--{option}", name]
            command += ["--seeds", str(seed), "--data", str(data), "--folder", str(folder)]
            apart([*command, "--here"], key)
        if path.exists():
            rows.append(json.loads(path.read_text()))
    return rows


def rank_correlation(learned: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean Spearman correlation over the rows (states) whose exact values differ."""
    from scipy.stats import spearmanr

    rows = [
        float(spearmanr(a, b).statistic)
        for a, b in zip(learned, exact, strict=True)
        if np.ptp(b) > 1e-7 and np.ptp(a) > 0
    ]
    return float(np.mean(rows))
