"""Code that the benchmarks share: stored results, the machine, helpers for the two tasks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
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


def cells_parser(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """Return the options of a benchmark of cells (task, agent, seed), each in its own process.

    Args:
        description: The help of the command.
        folder: Folder of models and results by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=folder, help="where models and results lie")
    parser.add_argument("--here", action="store_true", help="run in this process")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    return parser


def cell_result(
    stored: str,
    compute: Callable[[], dict[str, Any]],
    arguments: argparse.Namespace,
    command: list[str],
) -> dict[str, Any] | None:
    """Return the result of a cell, computed first where there is none; None where it failed.

    Args:
        stored: Name of the result.
        compute: Function that computes it.
        arguments: Options of `cells_parser`.
        command: The command that computes this cell alone, without its folders. It runs in a
            process of its own, unless `arguments` say otherwise.
    """
    path = arguments.folder / f"{stored}.json"
    if not (arguments.table or path.exists()):
        if arguments.here:
            once(stored, compute, folder=arguments.folder)
        else:
            places = ["--data", str(arguments.data), "--folder", str(arguments.folder), "--here"]
            apart([sys.executable, *command, *places], stored)
    return json.loads(path.read_text()) if path.exists() else None


def rank_correlation(learned: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean Spearman correlation over the rows (states) whose exact values differ."""
    from scipy.stats import spearmanr

    rows = [
        float(spearmanr(a, b).statistic)
        for a, b in zip(learned, exact, strict=True)
        if np.ptp(b) > 1e-7 and np.ptp(a) > 0
    ]
    return float(np.mean(rows))
