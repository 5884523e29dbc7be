"""Compare two checkouts of this repository on one machine, in their results and in their speed.

    python benchmarks/compare_checkouts.py BEFORE AFTER --out FOLDER
    python benchmarks/compare_checkouts.py BEFORE AFTER --out FOLDER --only equality --quick
    python benchmarks/compare_checkouts.py BEFORE AFTER --out FOLDER --only calibration \
        --shield FILE

Each checkout is copied into its own folder in the layout of an installation (from the table
`package-dir` of its pyproject.toml), and it runs in its own processes with one thread. The
learners, environments and stored files are those of `tests/golden` in this repository.

**equality** compares the weights of all learners after 300 updates; the actions and reports of
fixed shields, written by the checkout BEFORE, for 10,000 states in large and small batches and one
by one, for every kind of fallback and of replacement, Box and discrete; the actions of agents from
its files; all values that wrapped environments return over some episodes (single, vector,
`VecEnv`); and the record of a calibration. Arrays must agree in every bit.

**speed** runs the two checkouts alternately, A B B A, in many rounds. The time of a turn is the
best of some blocks, in CPU time of the process, which other work on the machine disturbs least. Two
processes of the same code may differ as long as they run, because their memory lies elsewhere, so
both are started anew every few rounds. Each row shows the median over the rounds of AFTER / BEFORE,
with a 95% interval of that median by bootstrap over pairs of processes and over the rounds within
each pair. A row whose interval lies entirely above the limit (1.03, or `--limit`) is flagged.

**import** times `from safeshield import Shield, SafetyShield`, reading a shield's file and one
filtered step in a fresh process, without the time to import numpy and gymnasium.

**calibration**, which runs only where it is asked for, calibrates the boat's shield in FILE for the
default proposers at epsilon 0.01 and confidence 0.99 (`--quick`: 0.05 and 0.95) with the seeds 0, 1
and 2, in fresh processes, A B A B (`--rounds`, by default 2). Both checkouts must read FILE.
Thresholds may differ. The table shows them, and the share of replaced random actions in the tests,
beside the CPU time and the wall time.

The results are written to results.json and results.md in FOLDER. The exit status is 0 where
everything is equal and no row is flagged.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from common import machine

Array = np.ndarray[Any, np.dtype[Any]]
SLOWER = 1.03
_RESAMPLES = 4000
_PAIR = 5
IMPORTED = ("torch", "stable_baselines3", "matplotlib", "h5py", "tensorboard", "scipy.stats",
            "pandas", "PIL", "pydantic")  # fmt: skip
FRESH = """
import sys, time
import numpy, gymnasium
class Still(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(numpy.float32([-3, -2]), numpy.float32([2, 2]))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    def reset(self, *, seed=None, options=None):
        return numpy.zeros(2, numpy.float32), {}
    def step(self, action):
        return numpy.zeros(2, numpy.float32), 0.0, False, False, {}
before = set(sys.modules)
cpu, wall = time.process_time(), time.perf_counter()
from safeshield import Shield, SafetyShield
env = SafetyShield(Still(), Shield.load(sys.argv[1]))
env.reset()
env.step(numpy.zeros(2, numpy.float32))
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
import json
print(json.dumps([cpu, wall, sorted(set(sys.modules) - before)]))
"""


CALIBRATE = """
import json, sys, time, warnings
import gymnasium
from safeshield import Shield
import safeshield.envs
warnings.simplefilter("ignore")
path, seed, epsilon, confidence = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])
shield, env = Shield.load(path), gymnasium.make("safeshield/Boat-v0")
cpu, wall = time.process_time(), time.perf_counter()
try:
    record = shield.calibrate(env, epsilon=epsilon, confidence=confidence, seed=seed).record
    told = [record.delta, record.policies[0].intervention_rate]
except ValueError as error:
    told = [str(error)[:60], None]
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall, *told]))
"""


@dataclass(frozen=True)
class Row:
    """One operation that was timed in both checkouts."""

    name: str
    before: float
    """Median time of BEFORE over the rounds, in seconds."""
    after: float
    ratio: float
    """Median over the rounds of after / before."""
    low: float
    """Lower end of the ratio's 95% interval: the 2.5% quantile of the bootstrap."""
    high: float
    """Upper end of the ratio's 95% interval: the 97.5% quantile of the bootstrap."""
    rounds: int
    limit: float = SLOWER
    """Ratio above which the row counts as slower."""

    @property
    def slower(self) -> bool:
        """Whether the interval lies entirely above the limit."""
        return self.low > self.limit


def row_of(name: str, before: Sequence[float], after: Sequence[float], pair: int = 1) -> Row:
    """Return a row from the paired times of both checkouts, (rounds,) each.

    Args:
        name: Name of the operation that was timed.
        before: Seconds of BEFORE in each round.
        after: Seconds of AFTER in each round.
        pair: Number of rounds that one pair of processes runs; divides the number of rounds.
    """
    a, b = np.asarray(before), np.asarray(after)
    ratios = (b / a).reshape(-1, pair)
    rng = np.random.default_rng(0)
    pairs = ratios[rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))]
    inside = rng.integers(0, pair, pairs.shape)
    medians = np.median(np.take_along_axis(pairs, inside, axis=2), axis=(1, 2))
    low, high = np.quantile(medians, [0.025, 0.975])
    numbers = (np.median(a), np.median(b), np.median(ratios), low, high)
    return Row(name, *(float(x) for x in numbers), rounds=ratios.size)


def lay_out(checkout: Path, target: Path) -> None:
    """Copy the packages of a checkout to the places that an installation would give them."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())
    setup = project.get("tool", {}).get("setuptools", {})
    ignored = shutil.ignore_patterns("__pycache__")
    folders = {"safeshield": "safeshield", **setup.get("package-dir", {})}
    # Outer packages come first, because "safeshield.wrappers" goes into the folder of "safeshield".
    for package, folder in sorted(folders.items()):
        source = checkout / folder
        if package and source.is_dir():
            place = target.joinpath(*package.split("."))
            shutil.copytree(source, place, ignore=ignored, dirs_exist_ok=True)
    name, version = project["project"]["name"], project["project"]["version"]
    told = target / f"{name}-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def environment(installed: Path) -> dict[str, str]:
    """Return the environment variables of a process with this installation and one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # By default glibc adapts its thresholds to what a process has allocated before.
    memory = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
    fixed = {"PYTHONPATH": str(installed), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **memory, **fixed}


class Worker:
    """A long-lived process that runs one checkout."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.name = installed.name
        script = Path(__file__).with_name("compare_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(installed),
        )  # fmt: skip
        where = Path(self.ask("where"))
        if not where.is_relative_to(installed):
            raise SystemExit(f"{self.name} imports safeshield from {where}, not from its own copy")

    def send(self, *request: object) -> None:
        """Send a request without waiting for its answer."""
        stream = cast(IO[str], self._process.stdin)
        stream.write(json.dumps(request) + "\n")
        stream.flush()

    def answer(self) -> Any:  # noqa: ANN401
        """Return the answer to the last request."""
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} has ended; its error stands above")
        return json.loads(line)

    def ask(self, *request: object) -> Any:  # noqa: ANN401
        """Send a request and return its answer."""
        self.send(*request)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        cast(IO[str], self._process.stdin).close()
        self._process.wait()


# -- the three parts ---------------------------------------------------------------------------


def difference(before: Array | None, after: Array | None) -> str | None:
    """Describe how two arrays differ; None where they are equal in every bit."""
    if before is None or after is None:
        return "only before" if after is None else "only after"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {before.shape} -> {after.dtype} {after.shape}"
    if before.tobytes() == after.tobytes():
        return None
    if before.dtype.kind not in "fiu":
        return f"{int(np.count_nonzero(before != after))} of {before.size} entries differ"
    one, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    off = ~((one == other) | (np.isnan(one) & np.isnan(other)))
    most = np.abs(one - other)[off].max(initial=0.0)
    return f"{int(np.count_nonzero(off))} of {before.size} entries differ, at most by {most:.3g}"


def equality(
    installed: Sequence[Path], shared: Path, quick: bool, states: int | None
) -> tuple[int, dict[str, str]]:
    """Return the number of compared arrays, and a description of each that differs."""
    workers = [Worker(place, shared) for place in installed]
    files = [shared / f"{worker.name}.pickle" for worker in workers]
    for worker, file in zip(workers, files, strict=True):
        worker.send("equality", str(file), quick, states)
    for worker in workers:
        print(f"{worker.name}: {', '.join(worker.answer())}", flush=True)
        worker.close()
    # The two worker processes have just written these files.
    before, after = (pickle.loads(file.read_bytes()) for file in files)
    count, unequal = 0, {}
    for case in sorted(before.keys() | after.keys()):
        one, other = before.get(case, {}), after.get(case, {})
        for name in sorted(one.keys() | other.keys()):
            count += 1
            told = difference(one.get(name), other.get(name))
            if told is not None:
                unequal[f"{case}: {name}"] = told
    return count, unequal


def speed(
    installed: Sequence[Path], shared: Path, rounds: int, quick: bool, pattern: str
) -> list[Row]:
    """Time all rows in whose names `pattern` is found, in both checkouts alternately."""
    times: dict[str, tuple[list[float], list[float]]] = {}
    start = time.perf_counter()
    for first in range(0, rounds, _PAIR):
        workers = [Worker(place, shared) for place in installed]
        names = [worker.ask("rows", quick) for worker in workers]
        if names[0] != names[1]:
            raise SystemExit(f"the two do not time the same rows: {names}")
        for turn in range(_PAIR + 1):
            for name in (name for name in names[0] if re.search(pattern, name)):
                for i in (0, 1) if turn % 2 else (1, 0):
                    seconds = workers[i].ask("time", name)
                    if turn:  # The first round is a warm-up.
                        times.setdefault(name, ([], []))[i].append(seconds)
        for worker in workers:
            worker.close()
        print(f"{first + _PAIR} rounds, {time.perf_counter() - start:.0f} s", flush=True)
    return [row_of(name, *pair, _PAIR) for name, pair in times.items()]


def fresh_import(
    installed: Sequence[Path], shield: Path, rounds: int
) -> tuple[list[Row], list[list[str]]]:
    """Time the import and the first step in fresh processes; return the modules that are loaded."""
    cpu: tuple[list[float], list[float]] = ([], [])
    wall: tuple[list[float], list[float]] = ([], [])
    loaded: list[list[str]] = [[], []]
    for turn in range(rounds + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            done = subprocess.run(
                [sys.executable, "-P", "-W", "ignore", "-c", FRESH, str(shield)],
                env=environment(installed[i]), capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
            used, took, modules = json.loads(done.stdout.splitlines()[-1])
            if turn:
                cpu[i].append(used)
                wall[i].append(took)
            loaded[i] = [name for name in IMPORTED if name in modules]
    what = "import and first step beyond numpy and gymnasium"
    return [row_of(f"{what}, own time", *cpu), row_of(f"{what}, wall", *wall)], loaded


def calibrations(
    installed: Sequence[Path], shield: Path, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Calibrate a shield with both checkouts alternately; return what each seed took and gave."""
    request = ("0.05", "0.95") if quick else ("0.01", "0.99")
    found: list[dict[str, Any]] = []
    for seed in (0, 1, 2):
        runs: tuple[list[Any], list[Any]] = ([], [])
        for i in (0, 1) * rounds:
            done = subprocess.run(
                [sys.executable, "-P", "-c", CALIBRATE, str(shield), str(seed), *request],
                env=environment(installed[i]), capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[i].append(json.loads(done.stdout.splitlines()[-1]))
        row: dict[str, Any] = {"seed": seed}
        for name, own in zip(("before", "after"), runs, strict=True):
            cpu, wall = np.mean([run[:2] for run in own], axis=0)
            delta, replaced = own[0][2:]
            row[name] = {"cpu": cpu, "wall": wall, "delta": delta, "replaced": replaced}
        row |= {key: row["before"][key] / row["after"][key] for key in ("cpu", "wall")}
        found.append(row)
    return found


def calibration_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the results of `calibrations` as a Markdown table."""
    lines = ["| seed | before: CPU s, wall s, delta, replaced | after | CPU | wall |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in found:
        cells = []
        for one in (row["before"], row["after"]):
            told = one["delta"]
            if one["replaced"] is not None:
                told = f"{told:.4g}, {one['replaced']:.1%}"
            cells.append(f"{one['cpu']:.1f}, {one['wall']:.1f}, {told}")
        cells += [f"{row[key]:.1f} x" for key in ("cpu", "wall")]
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- the report --------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with times in microseconds."""
    lines = ["| | before, us | after, us | after / before | 95% | |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.before * 1e6:.1f} | {row.after * 1e6:.1f} | {row.ratio:.3f} | "
            f"[{row.low:.3f}, {row.high:.3f}] | {'**slower**' if row.slower else ''} |"
        )
    return "\n".join(lines)


def summary(unequal: dict[str, str]) -> list[str]:
    """Return one line for each case with unequal arrays: their number, and the first one."""
    cases: dict[str, list[str]] = {}
    for name, told in unequal.items():
        case, _, array = name.rpartition(": ")
        cases.setdefault(case, []).append(f"{array}: {told}")
    return [f"- {case}: {len(told)} unequal; {told[0]}" for case, told in cases.items()]


def main() -> None:
    """Run the parts that the command line selects, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["equality", "speed", "import", "calibration"])
    parser.add_argument("--shield", type=Path, help="of calibration: file of the boat's shield")
    parser.add_argument(
        "--rounds",
        type=int,
        help="of speed (up to a multiple of 5) and import; by default 30, quick 5; of calibration "
        "by default 2",
    )
    parser.add_argument("--states", type=int, help="of equality; by default 10,000, quick 400")
    parser.add_argument(
        "--rows", default="", help="time only rows in whose names this regular expression is found"
    )
    parser.add_argument(
        "--limit", type=float, default=SLOWER, help="largest ratio of a row that is not flagged"
    )
    parser.add_argument("--quick", action="store_true", help="less of all, to see that it runs")
    args = parser.parse_args()
    if args.only == "calibration" and args.shield is None:
        parser.error("--only calibration needs --shield FILE")
    rounds = args.rounds or (5 if args.quick else 30)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [args.only] if args.only else ["equality", "speed", "import"]
    results: dict[str, Any] = {"machine": machine(), "quick": args.quick}
    told = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    report = [f"# {args.before} and {args.after}", "", told, ""]
    bad = False
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        installed = [folder / "before", folder / "after"]
        for checkout, place in zip((args.before, args.after), installed, strict=True):
            place.mkdir()
            lay_out(checkout.resolve(), place)
        shared = folder / "shared"
        shared.mkdir()
        if wanted != ["calibration"]:
            writer = Worker(installed[0], shared)
            writer.ask("write")
            writer.close()
        rows: list[Row] = []
        if "equality" in wanted:
            count, unequal = equality(installed, shared, args.quick, args.states)
            results["equality"] = {"arrays": count, "unequal": unequal}
            report += [f"Arrays compared: {count}; unequal: {len(unequal)}.", ""]
            report += summary(unequal)
            bad |= bool(unequal)
        if "speed" in wanted:
            rows += speed(installed, shared, rounds, args.quick, args.rows)
        if "import" in wanted:
            timed, loaded = fresh_import(installed, shared / "shield_SafeFQL.safetensors", rounds)
            rows += timed
            results["loaded"] = dict(zip(("before", "after"), loaded, strict=True))
            report += [f"Loaded {k}: {', '.join(v)}" for k, v in results["loaded"].items()]
        if "calibration" in wanted:
            found = calibrations(installed, args.shield.resolve(), args.rounds or 2, args.quick)
            results["calibration"] = found
            report.append(calibration_table(found))
        if rows:
            rows = [replace(row, limit=args.limit) for row in rows]
            flagged = [row.name for row in rows if row.slower]
            results["rows"] = [asdict(row) for row in rows]
            results["slower"] = flagged
            report += [
                "",
                table(rows),
                "",
                f"Rounds: {rows[0].rounds}. Slower: {', '.join(flagged) or 'none'}.",
            ]
            bad |= bool(flagged)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "results.md").write_text("\n".join(report) + "\n")
    print("\n".join(report))
    sys.exit(bad)


if __name__ == "__main__":
    main()
