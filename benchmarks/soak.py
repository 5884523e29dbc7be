"""A soak: shielded vector environments for a long time, while processes are killed and starved.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes 30
    OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes 0.3    # what CI runs

Two steady processes step shielded environments all the time. Both have a flight recorder, and one
has a promise monitor as well. Their memory and their file descriptors are measured. Beside them,
one further process after the other is disturbed: it is killed by signal 9, paused, or interrupted
inside a step, its worker processes are killed, or its disk or its memory is full.

Each plant writes down what it was sent, and what it had shown before, outside of what is tested.
The agent's action is a function of the observation, so that all the rest follows: the action that
ran must be the one that `Shield.filter` chooses, asked by hand about the state that was shown. The
process exits with status 1 where a count that must be 0 is not, or where memory or descriptors
grow. It needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from campaign import forked, shield

from safeshield.envs.double_integrator import constraint, next_state
from safeshield.monitoring import FlightLog, PromiseMonitor, ShieldLog
from safeshield.wrappers import VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield

Array = npt.NDArray[Any]
Tell = Callable[[str], None]
N = 3
ROW = np.dtype([("seen", "<f4", 2), ("action", "<f4"), ("plain", "?")])
"""What a plant writes down: the observation it had shown, what it was sent, and whether that was a
plain array of the space's dtype."""
BLOCK_STEPS = 64
NAN_RATE, RAISE_RATE = 0.003, 0.001
EPISODE_STEPS = 100
LIFE = 4.0
"""Mean life of a process that is disturbed, seconds."""
BYTES_PER_EPISODE = 1000.0
"""A monitor keeps every episode, for the evidence of a fleet; this is the most it may take."""
PAUSE = 0.001
"""Pause of a steady process after each step, seconds."""


class Plant(gym.Env[Any, Any]):
    """A cart that writes down what it was sent, and sometimes fails or shows NaN."""

    def __init__(self, record: Path, seed: int, raises: float = 0.0) -> None:
        judge = shield()
        self.observation_space, self.action_space = judge.observation_space, judge.action_space
        self.file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.rng = np.random.default_rng(seed)
        self.raises = raises
        self.state, self.shown, self.steps = np.zeros(2), np.zeros(2, np.float32), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        """Begin an episode at a random place."""
        self.state = self.rng.uniform((-0.9, -1.0), (0.9, 1.0))
        self.steps = 0
        return self._show()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        """Write the action down, then move, or fail."""
        plain = type(action) is np.ndarray and action.dtype == np.float32 and action.shape == (1,)
        row = np.zeros((), ROW)
        row["seen"], row["action"], row["plain"] = self.shown, np.ravel(action)[0], plain
        os.write(self.file, row.tobytes())
        if self.rng.random() < self.raises:
            raise RuntimeError("the plant has failed")
        self.state = next_state(self.state, np.asarray(action, np.float64))
        self.steps += 1
        observation, info = self._show()
        return observation, 0.0, bool(info["cost"]), self.steps >= EPISODE_STEPS, info

    def _show(self) -> tuple[Array, dict[str, Any]]:
        self.shown = self.state.astype(np.float32)
        if self.rng.random() < NAN_RATE:
            self.shown = np.full(2, np.nan, np.float32)
        h = float(constraint(self.state))
        return self.shown.copy(), {"constraint": h, "cost": float(h > 0)}

    def close(self) -> None:
        """Close the record."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def proposal(seen: Array) -> Array:
    """Return what the agent proposes in states (n, 2), as (n, 1): a function that jumps about."""
    at = seen.astype(np.float64)
    return (1.4 * np.sin(1e4 * (at[:, :1] + 3.0 * at[:, 1:]))).astype(np.float32)


def unchecked(rows: Array) -> int:
    """Return how many of a plant's rows hold another action than the shield chooses in the state.

    The last digits of values depend on the number of states that are judged together, and on the
    number of those that are replaced together, and so may a choice between two candidates. An
    action counts as chosen if it is chosen in a batch of one of the sizes that ran, in any place
    beside itself or a state whose proposal is accepted.
    """
    judge, wrong = shield(), 0
    chosen, kept = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.bool_)
    for first in range(0, len(rows), 4096):
        part = slice(first, first + 4096)
        actions, report = judge.filter(rows["seen"][part], proposal(rows["seen"][part]))
        chosen[part], kept[part] = actions[:, 0], ~report.intervened
    beside = rows["seen"][kept][:1]
    for at in np.flatnonzero(~rows["plain"] | (chosen != rows["action"])):
        states, told = np.stack([rows["seen"][at], *beside]), []
        sizes = (itertools.product(range(len(states)), repeat=size) for size in range(1, N + 1))
        for places in itertools.chain.from_iterable(sizes):
            batch = states[list(places)]
            told += list(judge.filter(batch, proposal(batch))[0][np.equal(places, 0), 0])
        wrong += not (rows["plain"][at] and rows["action"][at] in told)
    return wrong


def rows_of(record: Path) -> Array:
    """Return what a plant has written down."""
    return np.fromfile(record, ROW) if record.exists() else np.zeros(0, ROW)


# -- one shielded environment ----------------------------------------------------------------------


@dataclass
class Run:
    """Settings of one process: its files, and the environments that it makes."""

    folder: Path
    """Folder of its records, its flight and its monitor."""
    number: int
    kind: str
    flight: Path
    tell: Tell

    def env(self, *, workers: bool = False, raises: float = 0.0, monitor: bool = True) -> Any:  # noqa: ANN401
        """Return a shielded environment around N plants, in worker processes or in this one."""
        makers = [partial(Plant, self.record(i), 1000 * self.number + i, raises) for i in range(N)]
        sizes = {"max_bytes": 1 << 20, "total_bytes": 1 << 24}
        log = ShieldLog(self.flight, block_steps=BLOCK_STEPS, flush_seconds=0.1, **sizes)
        watch = PromiseMonitor(shield(), self.folder / f"{self.kind}.json") if monitor else None
        if self.number % 3 == 0 and not workers:
            from stable_baselines3.common.vec_env import DummyVecEnv

            return VecSafetyShield(DummyVecEnv(makers), shield(), monitor=watch, log=log)
        make = gym.vector.AsyncVectorEnv if workers else gym.vector.SyncVectorEnv
        return VectorSafetyShield(make(makers), shield(), monitor=watch, log=log)

    def record(self, i: int) -> Path:
        """Return the file of plant i."""
        return self.folder / f"{self.kind}-{self.number:05d}-{i}.bin"


def first(result: Any) -> Array:  # noqa: ANN401
    """Return the observations of a reset."""
    return result[0] if isinstance(result, tuple) else result


def fly(env: Any, until: float, each: Callable[[int], None] = lambda step: None) -> int:  # noqa: ANN401
    """Step until a time, begin anew after an error, and return the number of failures.

    After each failure an action is tried without a reset, which no plant may receive.
    """
    seen: Array | None = None
    failures = step = 0
    while time.monotonic() < until:
        try:
            if seen is None:
                seen = first(env.reset())
            step += 1
            seen = np.array(env.step(proposal(seen))[0])
            each(step)
        except (Exception, KeyboardInterrupt):
            failures += 1
            before = seen
            seen = None
            if before is not None and not env.runtime.ready:
                with contextlib.suppress(gym.error.ResetNeeded, RuntimeError, MemoryError):
                    env.step(np.zeros((N, 1), np.float32))
    return failures


def steady(run: Run, monitor: bool) -> None:
    """Step until the process is asked to end; tell memory and descriptors every half second."""
    stopped: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
    env = run.env(workers=monitor, monitor=monitor)
    told = [time.monotonic()]
    gc.freeze()  # What was imported is not looked through again and again.

    def each(step: int) -> None:
        time.sleep(PAUSE)
        if time.monotonic() - told[0] > 0.5:
            gc.collect()
            told[0] = time.monotonic()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            count = len(env.runtime._watch._monitor._entries) if monitor else 0
            descriptors = len(os.listdir("/proc/self/fd"))
            run.tell(f"at {told[0]} {pages * 4096} {descriptors} {count}")
        if stopped:
            raise SystemExit

    with contextlib.suppress(SystemExit):
        fly(env, math.inf, each)
    lost = env.runtime._recorder._log.lost
    env.close()
    run.tell(f"closed {lost}")


# -- bad treatment ---------------------------------------------------------------------------------


def killed(run: Run) -> None:
    """Fly, and tell how many rows have been flushed; somebody kills the process."""
    env = run.env()

    def each(step: int) -> None:
        if step % 200 == 0:
            log = env.runtime._recorder._log
            log.flush()
            run.tell(f"flushed {log._first}")

    fly(env, math.inf, each)


def interrupted(run: Run) -> None:
    """Fly, and raise KeyboardInterrupt by a timer wherever `fly` is."""
    env = run.env(raises=RAISE_RATE)
    rng = np.random.default_rng(run.number)

    def stop(_: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(0.001, 0.02)))
        # Only `fly` catches KeyboardInterrupt. Raised anywhere else, it would end this process.
        while frame is not None:
            if frame.f_code is fly.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    until = time.monotonic() + LIFE
    failures = 0
    while time.monotonic() < until:
        with contextlib.suppress(KeyboardInterrupt):
            failures += fly(env, until)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    env.close()
    run.tell(f"closed {env.runtime._recorder._log.lost}")


def workers_killed(run: Run) -> None:
    """Fly with plants in processes of their own, one of which is killed again and again."""
    # The processes that are left complain of their broken pipes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    until = time.monotonic() + LIFE
    rng = np.random.default_rng(run.number)
    while time.monotonic() < until:
        env = run.env(workers=True)
        inner = env.env
        at = int(rng.integers(20, 400))
        seen = first(env.reset())
        with contextlib.suppress(Exception):
            for step in range(10**9):
                seen = np.array(env.step(proposal(seen))[0])
                if step == at:
                    os.kill(inner.processes[int(rng.integers(N))].pid, signal.SIGKILL)
        with contextlib.suppress(gym.error.ResetNeeded):
            env.step(np.zeros((N, 1), np.float32))
            run.tell("unasked")
        env.runtime.close()
        with contextlib.suppress(Exception):
            inner.close(terminate=True)
    run.tell("closed 0")


def full_disk(run: Run) -> None:
    """Fly with plants in other processes, while this one may write no large files."""
    env = run.env(workers=True)
    first(env.reset())
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    if fly(env, time.monotonic() + LIFE):
        raise RuntimeError("a step failed because the disk is full")
    env.close()
    run.tell(f"closed {env.runtime._recorder._log.lost}")


def little_memory(run: Run) -> None:
    """Fly while nearly all of the memory that the process may have is taken."""
    env = run.env(raises=RAISE_RATE)
    fly(env, time.monotonic() + 0.3)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 22), resource.RLIM_INFINITY))
    hoard: list[bytearray] = []
    rng = np.random.default_rng(run.number)

    def each(step: int) -> None:
        # The memory is taken bit by bit, and given back from time to time.
        if rng.random() < 0.01:
            hoard.clear()
        hoard.append(bytearray(1 << int(rng.integers(10, 18))))

    fly(env, time.monotonic() + LIFE, each)
    hoard.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    env.close()
    run.tell(f"closed {env.runtime._recorder._log.lost}")


TREATMENTS: dict[str, Callable[[Run], None]] = {
    "kill -9": killed,
    "interrupts": interrupted,
    "workers killed": workers_killed,
    "full disk": full_disk,
    "little memory": little_memory,
}


# -- the supervisor --------------------------------------------------------------------------------


@dataclass
class Process:
    """A forked process, and what it has told."""

    run: Run
    child: int
    reading: int
    lines: list[str] = field(default_factory=list)
    rest: bytes = b""
    gone: bool = False
    status: int = 0

    @classmethod
    def of(cls, work: Callable[[Run], None], folder: Path, number: int, kind: str) -> Process:
        """Start a process."""
        shared = kind == "kill -9"
        flight = folder / (f"{kind}.flights" if shared else f"{kind}-{number:05d}.flights")
        run = Run(folder, number, kind, flight, lambda line: None)

        def begin(tell: Tell) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warnings.simplefilter("ignore")
            run.tell = tell
            work(run)

        child, reading = forked(begin)
        os.set_blocking(reading, False)
        return cls(run, child, reading)

    def read(self) -> bool:
        """Read what was told, and return whether the process is still there."""
        if self.gone:
            return False
        # Asked before the pipe is read, so that nothing that was told before the end is missed.
        found, self.status = os.waitpid(self.child, os.WNOHANG)
        self.gone = found != 0
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.reading, 1 << 16):
                *lines, self.rest = (self.rest + part).split(b"\n")
                self.lines += [line.decode() for line in lines]
        if self.gone:
            os.close(self.reading)
        return not self.gone

    def end(self, number: int, patience: float = 60.0) -> None:
        """Send a signal to a process that is still there, and wait until it has ended."""
        if self.read():
            os.kill(self.child, number)
        until = time.monotonic() + patience
        while self.read():
            if time.monotonic() > until:
                os.kill(self.child, signal.SIGKILL)
            time.sleep(0.02)

    def told(self, word: str) -> list[str]:
        """Return what stands behind a word in the lines that begin with it."""
        return [line.partition(" ")[2] for line in self.lines if line.split(" ")[0] == word]


def treated(kind: str, folder: Path, number: int, rng: np.random.Generator) -> Process:
    """Run one process through its treatment."""
    process = Process.of(TREATMENTS[kind], folder, number, kind)
    until = time.monotonic() + (float(rng.exponential(LIFE)) + 0.3 if kind == "kill -9" else 60.0)
    while process.read() and time.monotonic() < until:
        time.sleep(0.02)
        if rng.random() < 0.005:
            # Paused for a moment; what is late may not be wrong.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.child, signal.SIGSTOP)
                time.sleep(float(rng.uniform(0.05, 0.3)))
                os.kill(process.child, signal.SIGCONT)
    process.end(signal.SIGKILL)
    return process


def audited(process: Process, counts: Counter[str]) -> None:
    """Add what a process has done wrong to the counts."""
    run, kind = process.run, process.run.kind
    records = [rows_of(run.record(i)) for i in range(N)]
    for i in range(N):
        run.record(i).unlink(missing_ok=True)
    closed, errors = process.told("closed"), process.told("error:")
    for line in errors:
        print(f"  {kind}: {line}", file=sys.stderr)
    counts["runs"] += 1
    counts["steps"] += sum(map(len, records))
    counts["unchecked"] += sum(map(unchecked, records)) + len(process.told("unasked"))
    # Without memory, NumPy's BLAS library may end a process by a signal, which is no other end than
    # that of a process that was killed.
    ended = kind == "kill -9" or (kind == "little memory" and _crashed(process.status))
    counts["died"] += len(errors) + (not ended and not closed and not errors)
    try:
        flight = FlightLog.load(run.flight)
        if (run.folder / f"{kind}.json").exists():
            PromiseMonitor(shield(), run.folder / f"{kind}.json")
    except FileNotFoundError:
        counts["lost"] += sum(map(len, records)) if closed == ["0"] else 0
        return
    except ValueError as error:
        print(f"  {kind}: {error}", file=sys.stderr)
        counts["unreadable"] += 1
        return
    flown = np.zeros(len(flight), ROW)
    flown["seen"], flown["action"] = flight.columns["observation"], flight.columns["executed"][:, 0]
    flown["plain"] = True
    counts["wrong rows"] += unchecked(flown[-20_000:])
    if ended:
        # What was flushed is there. What the recorder had not written yet may be missing.
        flushed = max(map(int, process.told("flushed")), default=0)
        counts["lost"] += max(0, flushed - len(flight.rows) - flight.removed) + flight.lost
        return
    told = int(closed[0]) if closed else 0
    if kind != "interrupts":
        # An interrupt inside the recorder may cost rows, which the flight tells.
        counts["lost"] += max(0, flight.lost - told)
    if kind in EXACT and told == 0:
        for i, record in enumerate(records):
            rows = flown[flight.columns["env"] == i]
            whole = len(rows) == len(record) or (flight.removed and 0 < len(rows) < len(record))
            counts["lost"] += not (whole and _equal(rows, record[len(record) - len(rows) :]))
    # A full disk may have no room for the mark that a flight was closed; `close` told of the rows.
    unmarked = not flight.closed and not (kind == "full disk" and told > 0)
    counts["lost"] += flight.torn + unmarked
    counts["left over"] += len(list(run.folder.glob(f".{kind}*.part")))


def _crashed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGABRT)


EXACT = ("steady", "steady, monitored", "full disk")
"""Runs in which no step fails, so that the flight must hold what the plants were sent."""


def _equal(one: Array, other: Array) -> bool:
    same = np.array_equal(one["action"], other["action"])
    return same and np.array_equal(one["seen"], other["seen"], equal_nan=True)


def slope(times: Array, values: Array) -> tuple[float, float]:
    """Return the slope of values over time and its standard error.

    Neighbouring values are not independent, so the means of ten stretches are taken.
    """
    t = np.array([part.mean() for part in np.array_split(times, 10)])
    v = np.array([part.mean() for part in np.array_split(values, 10)])
    away = t - t.mean()
    rise = float((away * v).sum() / (away**2).sum())
    rest = v - v.mean() - rise * away
    return rise, float(np.sqrt((rest**2).sum() / 8 / (away**2).sum()))


def grown(process: Process) -> tuple[str, bool]:
    """Return a row of the table of growth, and whether growth is within its noise.

    The first fifth of the time is left out. What a monitor takes for each episode is no noise; it
    is compared with `BYTES_PER_EPISODE`.
    """
    table = np.array([list(map(float, line.split())) for line in process.told("at")])
    table = table[len(table) // 5 :]
    if len(table) < 20:
        return f"| {process.run.kind} | too few readings |  |  |", True
    times, memory, descriptors, episodes = table.T
    rise, error = slope(times, memory)
    rate, _ = slope(times, episodes)
    most = slope(times, descriptors)
    each = f", {rise / rate:.0f} bytes per episode" if rate > 0 else ""
    fine = rise <= 3.0 * error + rate * BYTES_PER_EPISODE + 100.0
    fine = fine and most[0] <= 3.0 * most[1] + 1e-3
    hour = 3600 / 1e6
    told = f"{rise * hour:+.2f} +- {error * hour:.2f} MB/h{each}"
    count = f"{descriptors[0]:.0f} to {descriptors[-1]:.0f}"
    return f"| {process.run.kind} | {memory[-1] / 1e6:.0f} MB | {told} | {count} |", fine


ZERO = ("unchecked", "lost", "wrong rows", "unreadable", "died", "left over")
"""What must be 0."""


def soak(
    minutes: float, folder: Path, seed: int, kinds: list[str], say: Callable[[str], None]
) -> bool:
    """Run all processes for some time and tell two tables; return whether all is well."""
    rng = np.random.default_rng(seed)
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    calm = [
        Process.of(partial(steady, monitor=False), folder, 0, "steady"),
        Process.of(partial(steady, monitor=True), folder, 0, "steady, monitored"),
    ]
    until = time.monotonic() + 60.0 * minutes
    number = 0

    def treat(kind: str, number: int) -> None:
        audited(treated(kind, folder, number, rng), found[kind])
        if kind != "kill -9":
            for path in folder.glob(f"{kind}-*.flights/*"):
                path.unlink()

    try:
        while time.monotonic() < until or number < len(kinds):
            number += 1
            treat(kinds[(number - 1) % len(kinds)], number)
            for one in calm:
                if not one.read():
                    raise RuntimeError(f"a steady process has ended: {one.lines[-3:]}")
    finally:
        for one in calm:
            one.end(signal.SIGUSR1)
    for one in calm:
        audited(one, found.setdefault(one.run.kind, Counter()))
    say(f"| process | runs | steps | {' | '.join(ZERO)} |\n|---{'|---' * (2 + len(ZERO))}|")
    for kind, counts in found.items():
        numbers = " | ".join(str(counts[name]) for name in ZERO)
        say(f"| {kind} | {counts['runs']} | {counts['steps']:,} | {numbers} |")
    say("\n| process | memory | growth | descriptors |\n|---|---|---|---|")
    rows = [grown(one) for one in calm]
    for text, _ in rows:
        say(text)
    wrong = any(counts[name] for counts in found.values() for name in ZERO)
    return not wrong and all(fine for _, fine in rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=TREATMENTS, default=list(TREATMENTS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        well = soak(
            given.minutes, Path(folder), given.seed, given.kinds, partial(print, flush=True)
        )
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
