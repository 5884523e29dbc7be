"""Measure a flight recorder: what it costs a step, what a kill loses, and its format.

    python benchmarks/flight.py cost     # a minute: time of a step with and without a recorder
    python benchmarks/flight.py kill     # a minute: 50 processes, killed at random
    python benchmarks/flight.py format   # seconds: the same rows as blocks and as JSON lines

`cost` steps a plant of 60 observations and 6 actions, which takes no time itself, in a loop
without pauses: the thread that writes shares the interpreter's lock with the loop. Rounds with and
without the recorder alternate (A B A B). CPU times of the thread that steps, and of all threads
together, are disturbed little by other processes; wall times are. `kill` records in a child
process that counts its steps in shared memory, and ends it by SIGKILL. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from common import machine

from safeshield import (
    FlightLog,
    OfflineDataset,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldLog,
    ShieldTrainer,
)

Array = npt.NDArray[Any]
OBSERVATIONS, ACTIONS = 60, 6
ROUNDS, STEPS = 10, 4000
KILLS, BLOCK = 50, 1024


class Plant(gym.Env[Array, Array]):
    """A plant that goes through given states in episodes of 1,000 steps, and takes no time."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,))
    action_space = gym.spaces.Box(-1.0, 1.0, (ACTIONS,))

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._states = 0.1 * rng.standard_normal((1001, OBSERVATIONS)).astype(np.float32)
        self._infos = [{"constraint": float(h) - 2.0, "cost": 0.0} for h in self._states[:, 0]]
        self._at = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Return the first state."""
        self._at = 0
        return self._states[0], self._infos[0]

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Return the next state."""
        self._at += 1
        return self._states[self._at], 1.0, False, self._at == 1000, self._infos[self._at]


def make_shield() -> Shield:
    """Return a shield for the plant, with critics 2 x (64, 64) and an exact h; it accepts."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2001, OBSERVATIONS)).astype(np.float32)
    h = states[:, 0] - 2.0
    log = OfflineDataset.from_arrays(
        observations=states[:-1],
        actions=rng.uniform(-1, 1, (2000, ACTIONS)),
        rewards=np.zeros(2000),
        next_observations=states[1:],
        terminated=np.zeros(2000, bool),
        truncated=np.arange(1, 2001) % 500 == 0,
        constraints=h[:-1],
        next_constraints=h[1:],
        observation_space=Plant.observation_space,
        action_space=Plant.action_space,
    )
    config = ShieldConfig(critic_hidden=(64, 64))
    return ShieldTrainer(config, device="cpu").fit(log, steps=100).shield()


def play(env: gym.Env[Array, Array], steps: int, after: Callable[[], None]) -> None:
    """Make steps, and call `after` after each."""
    action = np.zeros(ACTIONS, np.float32)
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(action)
        after()
        if terminated or truncated:
            env.reset()


def cost(folder: Path) -> None:
    """Print the time of a step with and without a recorder."""
    shield = make_shield()
    log = ShieldLog(folder / "cost")
    some = ShieldLog(folder / "some", "interventions")
    envs = {
        "without": SafetyShield(Plant(), shield),
        "all": SafetyShield(Plant(), shield, log=log),
        "interventions": SafetyShield(Plant(), shield, log=some),
    }
    names = list(envs)
    threads: dict[str, list[Array]] = {name: [] for name in names}
    walls: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(ROUNDS + 1):
        for name, env in envs.items():
            env.reset(seed=0)
            times = [time.thread_time_ns()]
            begin, spent = time.perf_counter_ns(), time.process_time_ns()
            play(env, STEPS, lambda times=times: times.append(time.thread_time_ns()))  # type: ignore[misc]
            wall, cpu = time.perf_counter_ns() - begin, time.process_time_ns() - spent
            if repeat:
                threads[name].append(np.diff(times) / 1e3)
                walls[name].append(wall / STEPS / 1e3)
                cpus[name].append(cpu / STEPS / 1e3)
    calls: list[int] = []
    count = envs["all"].runtime.count

    def timed(*arguments: Any) -> None:  # noqa: ANN401
        begin = time.perf_counter_ns()
        count(*arguments)
        calls.append(time.perf_counter_ns() - begin)

    envs["all"].runtime.count = timed  # type: ignore[method-assign]
    play(envs["all"], ROUNDS * STEPS, lambda: None)
    log.close()
    some.close()
    lost, size = log.lost, FlightLog.load(log.path)
    print(f"{ROUNDS} rounds of {STEPS} steps each, microseconds a step; medians of the rounds")
    print("recorder | CPU of the thread: median, 99th percentile, mean | CPU of all threads | wall")
    figures = {}
    for name in names:
        each = threads[name]
        figures[name] = np.array(
            [
                [np.median(one) for one in each],
                [np.quantile(one, 0.99) for one in each],
                [np.mean(one) for one in each],
                cpus[name],
                walls[name],
            ]
        )
        print(f"{name}: " + ", ".join(f"{x:.1f}" for x in np.median(figures[name], axis=1)))
    for name in names[1:]:
        more = np.median(figures[name] - figures["without"], axis=1)
        print(f"{name} minus without: " + ", ".join(f"{x:+.1f}" for x in more))
    each = np.array(calls) / 1e3
    parts = ", ".join(f"{x:.1f}" for x in np.quantile(each, [0.5, 0.9, 0.99, 0.999]))
    print(f"wall time inside the recorder's call, 50%, 90%, 99%, 99.9%: {parts}")
    print(f"lost {lost} rows; {size.bytes / len(size.rows):.0f} bytes a row")
    assert size.card()["replaced"] == 0


def _record(shield: Shield, path: str, counted: Any) -> None:  # noqa: ANN401 - a shared value
    warnings.simplefilter("ignore")
    log = ShieldLog(path, block_steps=BLOCK, max_bytes=1 << 20)
    env = SafetyShield(Plant(), shield, log=log)
    env.reset(seed=0)

    def after() -> None:
        counted.value += 1

    play(env, 10**9, after)


def kill(folder: Path) -> None:
    """Print how many steps a kill loses."""
    shield = make_shield()
    rng = np.random.default_rng(0)
    fork = multiprocessing.get_context("fork")
    lost, torn, steps = [], 0, []
    for i in range(KILLS):
        path = folder / f"kill{i}"
        counted = fork.Value("q", 0, lock=False)
        child = fork.Process(target=_record, args=(shield, str(path), counted))
        child.start()
        while not counted.value:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 1.0))
        child.kill()
        child.join()
        done = int(counted.value)
        try:
            flight = FlightLog.load(path)
        except FileNotFoundError:  # Nothing had been written yet.
            lost.append(done)
            steps.append(done)
            continue
        order = np.sort(flight.rows, order=["episode", "step"])
        same = order["episode"][1:] == order["episode"][:-1]
        assert (np.diff(order["step"])[same] == 1).all(), "a gap"
        assert flight.lost == 0, flight.lost
        # A step may be recorded and not yet counted.
        lost.append(max(done - len(flight), 0))
        steps.append(done)
        torn += flight.torn
        shutil.rmtree(path)
    print(f"{KILLS} kills after {min(steps)} to {max(steps)} steps, block_steps {BLOCK}")
    print(
        f"lost steps: median {np.median(lost):.0f}, most {max(lost)}; more than {BLOCK} in "
        f"{sum(one > BLOCK for one in lost)}; torn blocks {torn}; all readable"
    )


def form(folder: Path) -> None:
    """Print what a row costs as a block and as a line of JSON."""
    shield = make_shield()
    with ShieldLog(folder / "form", block_steps=BLOCK) as log:
        env = SafetyShield(Plant(), shield, log=log)
        env.reset(seed=0)
        play(env, 5000, lambda: None)
    flight = FlightLog.load(folder / "form")
    line, block = [], []
    raw = flight.rows[:128].tobytes()
    import zlib

    for _ in range(7):
        begin = time.process_time_ns()
        flight.to_jsonl(folder / "lines.jsonl")
        line.append((time.process_time_ns() - begin) / len(flight.rows) / 1e3)
        begin = time.process_time_ns()
        with (folder / "blocks").open("wb", buffering=0) as stream:
            for _ in range(100):
                zlib.crc32(raw)
                stream.write(raw)
        block.append((time.process_time_ns() - begin) / 12800 / 1e3)
    size = (folder / "lines.jsonl").stat().st_size
    print("CPU microseconds and bytes of a row, on the thread that writes")
    print(f"blocks: {np.median(block):.2f}, {flight.bytes / len(flight.rows):.0f}")
    print(f"JSON lines: {np.median(line):.1f}, {size / len(flight.rows):.0f}")


def main() -> None:
    """Run one of the three."""
    commands = {"cost": cost, "kill": kill, "format": form}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=commands)
    warnings.simplefilter("ignore")
    command = parser.parse_args().command
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        commands[command](Path(folder))


if __name__ == "__main__":
    main()
