"""Measure memory and time to read a DSRL file, and compare with dsrl's own `get_dataset`.

    python benchmarks/loading.py                    # makes files of 1,000,000 transitions
    python benchmarks/loading.py --file LOG.hdf5    # reads one of yours
    python benchmarks/loading.py --fit --steps 3000000    # memory of loading and training

The script needs dsrl (``pip install --no-deps dsrl==0.1.0``); it does not contact its data server.
Every load runs in its own process, and the two readers alternate. The figures are medians over the
runs of the seconds and of the memory that a load adds to the peak of the process. From the second
run on, the files are in the cache of the system. The first run, which may wait for the disk, is not
counted.

With --fit each agent loads the log and makes 300 updates, with the networks of its defaults. The
figure is the memory that this adds to the peak of the process, divided by the bytes that the arrays
of the file have in single precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WIDTHS = (60, 2)
"""Sizes of an observation and of an action in a generated file, as in PointGoal1."""
LENGTH = 1000
FITTED = ("shield", "safefql")


def main() -> None:
    """Measure both readers on one file, or on generated ones with gzip, as DSRL's, and without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="an HDF5 file with DSRL's keys")
    parser.add_argument("--steps", type=int, default=1_000_000, help="transitions of made files")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each reader")
    parser.add_argument("--fit", action="store_true", help="measure the memory of training")
    parser.add_argument("--child", choices=["safeshield", "dsrl", *FITTED], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.file)))
        return
    if arguments.steps < LENGTH or arguments.runs < 1:
        parser.error(f"--steps must be at least {LENGTH} and --runs at least 1")
    from common import machine

    packages = ("h5py",) if arguments.fit else ("h5py", "dsrl")
    print({**machine(), **{name: version(name) for name in packages}})
    if not arguments.fit:
        print(f"medians of {arguments.runs} runs; memory: what a load adds at its peak")
    if arguments.file is not None:
        compare(arguments.file.name, arguments.file, arguments.runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.fit:
            file = Path(folder) / "log.hdf5"
            make(file, arguments.steps, "f4", None)
            for name in FITTED:
                row = child(name, file)
                print(f"{name}: {row['added'] / row['arrays']:.2f} times {row['arrays'] / 1e6:.0f} "
                      f"MB, {row['seconds']:.0f} s", flush=True)  # fmt: skip
            return
        for name, dtype, compression in (
            ("float32, gzip", "f4", "gzip"),
            ("float32, plain", "f4", None),
            ("float64, plain", "f8", None),
        ):
            file = Path(folder) / "log.hdf5"
            make(file, arguments.steps, dtype, compression)
            compare(name, file, arguments.runs)
            file.unlink()


def make(path: Path, steps: int, dtype: str, compression: str | None) -> None:
    """Write episodes of a random walk, which is as smooth and compressible as logged states."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(0)
    episodes = steps // LENGTH
    states = rng.standard_normal((episodes, LENGTH + 1, WIDTHS[0]), np.float32)
    states *= 0.02
    np.cumsum(states, axis=1, out=states)
    ends = np.zeros((episodes, LENGTH), bool)
    ends[:, -1] = True
    with h5py.File(path, "w") as file:
        for key, values in (
            ("observations", states[:, :-1]),
            ("next_observations", states[:, 1:]),
            ("actions", rng.uniform(-1, 1, (episodes, LENGTH, WIDTHS[1]))),
            ("rewards", rng.standard_normal((episodes, LENGTH))),
            ("costs", states[:, 1:, 0] > 0.5),
            ("terminals", np.zeros_like(ends)),
            ("timeouts", ends),
        ):
            rows = values.reshape(episodes * LENGTH, *values.shape[2:]).astype(dtype)
            file.create_dataset(key, data=rows, compression=compression)


def child(reader: str, file: Path) -> dict[str, float]:
    """Measure a reader, or an agent that trains, in a process of its own."""
    command = [sys.executable, __file__, "--child", reader, "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def compare(name: str, file: Path, runs: int) -> None:
    """Print the medians of both readers, and their ratio."""
    results: dict[str, list[dict[str, float]]] = {"safeshield": [], "dsrl": []}
    for run in range(runs + 1):
        for reader, kept in results.items():
            row = child(reader, file)
            if run:
                kept.append(row)
    median = {
        reader: {key: statistics.median(run[key] for run in kept) for key in kept[0]}
        for reader, kept in results.items()
    }
    ours, theirs = median["safeshield"], median["dsrl"]
    print(f"{name}: {file.stat().st_size / 1e6:.0f} MB, arrays {ours['arrays'] / 1e6:.0f} MB")
    for reader, one in median.items():
        print(f"  {reader:<10} {one['seconds']:6.2f} s  {one['added'] / 1e6:7.0f} MB")
    ratios = [ours[key] / theirs[key] for key in ("seconds", "added")]
    print(f"  ratio      {ratios[0]:6.2f}    {ratios[1]:7.2f}", flush=True)


def measure(reader: str, file: Path) -> dict[str, float]:
    """Load once; return the seconds, the bytes added to peak memory and those of the arrays."""
    if reader in FITTED:
        run = _fitted(reader, file)
    else:
        run = _safeshield(file) if reader == "safeshield" else _dsrl(file)
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak, which was that of imports.
    before = _memory("VmRSS")
    started = time.perf_counter()
    arrays = run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "added": _memory("VmHWM") - before, "arrays": arrays}


def _safeshield(file: Path) -> Any:  # noqa: ANN401
    import numpy as np

    from safeshield.data.dataset import OfflineDataset

    def run() -> int:
        log = OfflineDataset.load(file)
        return sum(value.nbytes for value in vars(log).values() if isinstance(value, np.ndarray))

    return run


def _fitted(name: str, file: Path) -> Any:  # noqa: ANN401
    import h5py

    from safeshield.algorithms.registry import offline_algorithm
    from safeshield.data.dataset import OfflineDataset

    def run() -> int:
        agent = offline_algorithm(name).kind(device="cpu")
        agent.fit(OfflineDataset.load(file), steps=300)
        with h5py.File(file) as arrays:
            return sum(4 * array.size for array in arrays.values())

    return run


def _dsrl(file: Path) -> Any:  # noqa: ANN401
    import os

    os.environ["DSRL_SUPPRESS_IMPORT_ERROR"] = "1"
    import gymnasium as gym
    import h5py
    from dsrl.offline_env import OfflineEnv

    class Env(OfflineEnv):
        def __init__(self) -> None:
            super().__init__()
            with h5py.File(file) as log:
                shapes = [log[key].shape[1:] for key in ("observations", "actions")]
            self.observation_space = gym.spaces.Box(-1, 1, shapes[0])
            self.action_space = gym.spaces.Box(-1, 1, shapes[1])

    env = Env()

    def run() -> int:
        return sum(value.nbytes for value in env.get_dataset(str(file)).values())

    return run


def _memory(line: str) -> int:
    """Return the bytes on a line of this process's status: VmRSS is now, VmHWM is the peak."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise SystemExit("the peak of memory is read from Linux's /proc")


if __name__ == "__main__":
    main()
