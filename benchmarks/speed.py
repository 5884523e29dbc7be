"""Measure the time of a shielded step and the speed of training, relative to a reference.

    python benchmarks/speed.py filter       # SafetyShield.step minus the environment's own step
    python benchmarks/speed.py latency      # percentiles over --steps steps, default 10^6
    python benchmarks/speed.py vector       # VectorSafetyShield, per environment, 1 to 4,096
    python benchmarks/speed.py tensors      # the shield on tensors beside it, 4,096 envs
    python benchmarks/speed.py train        # updates of SafeFQL, one and two threads
    python benchmarks/speed.py jax          # ... beside FQL in JAX (pip install jax optax)
    python benchmarks/speed.py many         # fit_many: four seeds in turn, batched, in 2 processes

The figures are medians of several runs. The reference is measured in the same run. For the filter
it is one NumPy forward pass of a (256, 256) network; for training it is the product
of a batch and a hidden layer. `filter` and `vector` report the CPU time of the process, which other
processes on the machine disturb least. `latency` reports wall time as well, which needs a machine
without other work. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import machine
from gymnasium.vector.utils import batch_space
from torch.utils.flop_counter import FlopCounterMode

import safeshield
from safeshield import (
    OfflineDataset,
    SafeFQL,
    SafeFQLConfig,
    SafetyShield,
    Shield,
    ShieldConfig,
    fit_many,
)
from safeshield.algorithms.safefql import SafeFQLRun
from safeshield.envs.boat import BoatVectorEnv
from safeshield.training.log import LogTensors
from safeshield.training.loop import Draw, keep_freed_memory
from safeshield.wrappers import VectorSafetyShield

REPEATS = 15
MANY_REPEATS = 3


def microseconds(
    function: Callable[[], object],
    count: int,
    clock: Callable[[], float] = time.process_time,
    repeats: int = REPEATS,
) -> float:
    """Return the median over repeats of the mean time of a call, after a warm-up."""
    times = []
    for repeat in range(repeats + 1):
        start = clock()
        for _ in range(count):
            function()
        if repeat:
            times.append((clock() - start) / count * 1e6)
    return float(np.median(times))


def network(batch: int) -> Callable[[], np.ndarray]:
    """Return one NumPy forward pass of a (256, 256) network for a batch, the reference."""
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(s).astype(np.float32) for s in ((4, 256), (256, 256), (256, 1))]
    x = rng.standard_normal((batch, 4)).astype(np.float32)
    return lambda: np.maximum(np.maximum(x @ w[0], 0.0) @ w[1], 0.0) @ w[2]


def boat_shield(updates: int) -> Shield:
    """Return a shield of the boat, with critics 2 x (256, 256), after some updates."""
    log = safeshield.collect(gym.make("safeshield/Boat-v0"), "random", episodes=100, seed=0)
    agent = SafeFQL(SafeFQLConfig(critic_hidden=(256, 256))).fit(log, steps=updates)
    return agent.shield().with_delta(0.05)


class Still(gym.Env):
    """An environment that returns the same state in every step, which takes almost no time."""

    observation_space = gym.spaces.Box(np.float32([-3, -2]), np.float32([2, 2]))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))
    where = np.array([-2.0, 0.0], np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the state in which the environment stays."""
        return self.where, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Return the same state."""
        return self.where, 0.0, False, False, {}


class StillVector(gym.vector.VectorEnv):
    """A vector environment that stays in given states."""

    def __init__(self, observations: np.ndarray) -> None:
        self.num_envs, self._observations = len(observations), observations
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        self.single_observation_space = Still.observation_space
        self.single_action_space = Still.action_space
        self.observation_space = batch_space(Still.observation_space, self.num_envs)
        self.action_space = batch_space(Still.action_space, self.num_envs)

    def reset(
        self, *, seed: object = None, options: object = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the states."""
        return self._observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the same states."""
        none = np.zeros(self.num_envs, bool)
        return self._observations, np.zeros(self.num_envs), none, none, {}


def filter_step() -> None:
    """Time the step of a shielded environment whose action is accepted, and that of the bare one.

    The boat is at rest in still water, so that the episode never ends and every state is safe.
    """
    warnings.simplefilter("ignore")
    shield = boat_shield(3)
    action = np.zeros(2, np.float32)
    start = {"state": np.array([-2.0, 0.0])}
    makers: dict[str, Callable[[], gym.Env]] = {
        "boat": lambda: gym.make("safeshield/Boat-v0", current=0.0).unwrapped,
        "an environment that does nothing": Still,
    }
    timed: dict[str, Callable[[], object]] = {"reference": network(1)}
    for name, make in makers.items():
        bare = make()
        bare.reset(seed=0, options=start)
        timed[name] = functools.partial(bare.step, action)
        for source, filtering in (
            ("h by its source", shield),
            ("h estimated", shield.with_constraint(None)),
        ):
            wrapped = SafetyShield(make(), filtering)
            wrapped.reset(seed=0, options=start)
            if wrapped.step(action)[4]["shield/intervened"]:
                raise SystemExit("the test state is not accepted: this would time the wrong path")
            timed[f"{name}, {source}"] = functools.partial(wrapped.step, action)
    rows = [{name: microseconds(call, 50) for name, call in timed.items()} for _ in range(5)]
    times = {name: float(np.median([row[name] for row in rows])) for name in timed}
    reference = times.pop("reference")
    print(f"one NumPy network: {reference:.1f} us")
    for name, each in times.items():
        if name in makers:
            print(f"{name}: its own step {each:.1f} us")
        else:
            extra = each - times[name.rpartition(", ")[0]]
            print(f"{name}: the shield adds {extra:.1f} us = {extra / reference:.1f} networks")


def latency(steps: int) -> None:
    """Time every step of a shielded boat under random actions; print percentiles."""
    warnings.simplefilter("ignore")
    env = SafetyShield(gym.make("safeshield/Boat-v0"), boat_shield(1000))
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    wall, cpu = np.empty((2, steps), np.int64)
    replaced = np.empty(steps, np.bool_)
    for i in range(steps):
        if i % 10_000 == 0:
            actions = rng.uniform(-1, 1, (10_000, 2)).astype(np.float32)
        before, used = time.perf_counter_ns(), time.thread_time_ns()
        _, _, terminated, truncated, info = env.step(actions[i % 10_000])
        cpu[i], wall[i] = time.thread_time_ns() - used, time.perf_counter_ns() - before
        replaced[i] = info["shield/intervened"]
        if terminated or truncated:
            env.reset()
    for name, which in (
        ("all", np.ones(steps, np.bool_)),
        ("accepted", ~replaced),
        ("replaced", replaced),
    ):
        if not which.any():
            continue
        for clock, times in (("wall", wall[which]), ("CPU", cpu[which])):
            middle, high, most = np.quantile(times, [0.5, 0.999, 1.0]) / 1e3
            print(
                f"{name:8} {len(times):8} steps, {clock:4} time: median {middle:.0f} us, 99.9% "
                f"{high:.0f} us ({high / middle:.1f} x), maximum {most:.0f} us"
            )


def vector_step() -> None:
    """Time VectorSafetyShield per environment, for states in which all actions fare alike.

    The kinds are: all accepted; all rejected, with an acceptable candidate; all rejected, and no
    candidate is acceptable. States and actions are drawn until enough are of each kind.
    """
    warnings.simplefilter("ignore")
    # Every replacement is the nearest acceptable action, the default of SafeFQL's shield.
    shield = boat_shield(1000)
    rng = np.random.default_rng(0)
    states = rng.uniform([-3, -2], [2, 2], (20_000, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (len(states), 2)).astype(np.float32)
    print("microseconds an environment; in brackets, (256, 256) NumPy networks on the same batch")
    for source, filtering in (
        ("h by its source", shield),
        ("h estimated", shield.with_constraint(None)),
    ):
        _, report = filtering.filter(states, actions)
        kinds = {
            "accepted": ~report.intervened,
            "replaced": report.intervened & report.acceptable,
            "nothing acceptable": report.intervened & ~report.acceptable,
        }
        for count in (1, 16, 256, 4096):
            reference = microseconds(network(count), max(1, 2000 // count)) / count
            cells = []
            for kind, which in kinds.items():
                places = np.resize(np.flatnonzero(which), count)
                wrapped = VectorSafetyShield(StillVector(states[places]), filtering)
                wrapped.reset()
                told = wrapped.step(actions[places])[4]["shield/intervened"]
                if (told != (kind != "accepted")).any():
                    raise SystemExit("not all actions go the way that is timed")
                call = functools.partial(wrapped.step, actions[places])
                repeats = 3 if count > 1000 else REPEATS
                each = microseconds(call, max(1, 200 // count), repeats=repeats) / count
                cells.append(f"{kind} {each:.1f} ({each / reference:.1f})")
            print(f"{source}, {count:5} environments: {', '.join(cells)}", flush=True)


def seconds(function: Callable[[], object], count: int) -> float:
    """Return the mean time of a call."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def tensor_step() -> None:
    """Time `TorchShield.filter` and `VectorSafetyShield.step` for 4,096 environments, in turn."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    log = safeshield.collect(gym.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    trained = SafeFQL(SafeFQLConfig(critic_hidden=(256, 256))).fit(log, steps=3).shield()
    count = 4096
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
    w = [rng.standard_normal(s).astype(np.float32) for s in ((4, 256), (256, 256), (256, 1))]
    x = rng.standard_normal((count, 4)).astype(np.float32)

    def net() -> np.ndarray:
        return np.maximum(np.maximum(x @ w[0], 0.0) @ w[1], 0.0) @ w[2]

    guessed = trained.with_constraint(None)
    # No learned value lies beyond this threshold, so it accepts every action.
    moved = replace(guessed.model.scale, offset=guessed.model.scale.offset - 100.0)
    guessed = replace(guessed, model=replace(guessed.model, scale=moved))
    known = trained.with_constraint(lambda seen: np.full(len(seen), -100.0))
    print(f"{count} envs, all accepted, one thread: microseconds an env, medians of {REPEATS}")
    for name, shield in (("h by a network", guessed), ("h by a function", known)):
        bare = BoatVectorEnv(count, max_episode_steps=None, current=0.0)
        vector = VectorSafetyShield(
            BoatVectorEnv(count, max_episode_steps=None, current=0.0), shield
        )
        bare.reset(seed=0)
        seen = torch.tensor(vector.reset(seed=0)[0])
        wanted = torch.tensor(actions)
        function = None if shield is guessed else (lambda seen: seen.new_full((count,), -100.0))
        free = shield.to_torch(constraint_fn=function)
        captured = shield.to_torch(constraint_fn=function, budget=64)
        if free.filter(seen, wanted)[1].intervened.any():
            raise SystemExit("not all actions are accepted: this would time the wrong path")
        runs = {
            "bare": functools.partial(bare.step, actions),
            "arrays": functools.partial(vector.step, actions),
            "tensors": functools.partial(free.filter, seen, wanted),
            "budget 64": functools.partial(captured.filter, seen, wanted),
            "net": net,
        }
        times: dict[str, list[float]] = {key: [] for key in runs}
        for repeat in range(REPEATS + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat:
                    times[key].append((time.perf_counter() - start) / count * 1e6)
        table = {key: np.array(value) for key, value in times.items()}
        table["arrays"] -= table["bare"]
        print(
            f"{name:15}: "
            + ", ".join(
                f"{key} {np.median(table[key]):.2f} ({np.median(table[key] / table['net']):.1f} "
                f"nets, {np.median(table[key] / table['arrays']):.2f} of arrays)"
                for key in ("arrays", "tensors", "budget 64")
            ),
            flush=True,
        )


def train_updates() -> None:
    """Time the updates of each phase of SafeFQL on random data: 17 observations, 6 actions.

    The unit is the product of a batch and a hidden layer. The number of products that an update
    needs is its number of floating-point operations, divided by that of one product. The share of
    the limit is the time of these products divided by the time of the update.
    """
    keep_freed_memory()  # as `fit` does
    for widths, size in (((256,) * 2, 256), ((512,) * 4, 1024)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _train_phases(widths, size)


def random_log(count: int = 20_000) -> OfflineDataset:
    """Return a log of `count` random steps: 17 observations, 6 actions, episodes of 500 steps."""
    rng = np.random.default_rng(0)
    length = 500
    observations = rng.standard_normal((count + 1, 17)).astype(np.float32)
    constraints = observations[:, 0]
    ends = np.arange(1, count + 1) % length == 0
    before = constraints[:-1].copy()
    return OfflineDataset.from_arrays(
        observations=observations[:-1],
        actions=rng.uniform(-1, 1, (count, 6)),
        rewards=rng.standard_normal(count),
        next_observations=observations[1:],
        terminated=np.zeros(count, bool),
        truncated=ends,
        costs=(constraints[1:] > 0).astype(np.float32),
        constraints=before,
        next_constraints=constraints[1:],
        observation_space=gym.spaces.Box(-np.inf, np.inf, (17,)),
        action_space=gym.spaces.Box(-1.0, 1.0, (6,)),
    )


def _train_phases(nets: tuple[int, ...], size: int) -> None:
    log = random_log()
    config = SafeFQLConfig(
        critic_hidden=nets, flow_hidden=nets, student_hidden=nets, batch_size=size
    )
    model = SafeFQL(config, device="cpu")._describe(log)
    tensors = LogTensors.of(log, model.scaling, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    run = SafeFQLRun(model, tensors, config, 1000)
    state = run.initial(generator)
    phases = {phase.name: phase for phase in run.phases()}
    width = nets[0]
    a, b, out = torch.randn(size, width), torch.randn(width, width), torch.empty(size, width)
    each = 2 * size * width**2
    calls = max(1, 10**10 // each)
    print(f"networks {nets}, batch {size}, {torch.get_num_threads()} threads")
    for name, phase in phases.items():
        draw = Draw(
            torch.randint(len(log), (size,), generator=generator),
            torch.randn(size, 6, generator=generator),
            torch.rand(size, 1, generator=generator),
        )
        with FlopCounterMode(display=False) as counter:
            phase.update(state, draw)
        needed = counter.get_total_flops() / each
        ratios, times = [], []
        for _ in range(REPEATS):
            product = seconds(lambda: torch.mm(a, b, out=out), calls)
            times.append(seconds(lambda phase=phase, draw=draw: phase.update(state, draw), 3))
            ratios.append(times[-1] / product)
        taken = float(np.median(ratios))
        print(
            f"{name:12} {1 / np.median(times):6.1f} updates/s, needs {needed:5.1f} products, takes "
            f"{taken:6.1f}: {taken / needed:.2f} times, {needed / taken:.0%} of the limit",
            flush=True,
        )


def jax_updates() -> None:
    """Time an update of FQL in JAX beside the phases of SafeFQL, 256 x 256 networks, batch 256.

    JAX uses all cores that the process may use, so run it under ``taskset -c 0`` for one thread.
    """
    from jax_reference import products_of, update_of

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    hidden, size = (256, 256), 256
    update, needed = update_of(hidden, size, 17, 6), products_of(hidden, 17, 6)
    a, b, out = torch.randn(size, 256), torch.randn(256, 256), torch.empty(size, 256)
    for _ in range(2):
        ratios, times = [], []
        for _ in range(REPEATS):
            product = seconds(lambda: torch.mm(a, b, out=out), 300)
            times.append(seconds(update, 20))
            ratios.append(times[-1] / product)
        taken = float(np.median(ratios))
        print(
            f"FQL in JAX   {1 / np.median(times):6.1f} updates/s, needs {needed:5.1f} products, "
            f"takes {taken:6.1f}: {taken / needed:.2f} times, {needed / taken:.0%} of the limit, "
            f"{threads} threads",
            flush=True,
        )
        _train_phases(hidden, size)


def many_seeds(updates: int) -> None:
    """Time `fit_many` for four seeds: in turn, batched and in two processes, alternately.

    The CPU time of all threads and processes tells the work, which other processes on the machine
    disturb least. The wall time needs a machine without other work.
    """
    log, seeds = random_log(), range(4)
    forms = {"in turn": 0, "batched": None, "2 processes": 2}
    fit_many([ShieldConfig(seed=seed) for seed in (0, 1)], log, 3)
    for kind, nets in itertools.product((ShieldConfig, SafeFQLConfig), ((32,) * 2, (256,) * 2)):
        hidden = {one.name: nets for one in fields(kind) if one.name.endswith("_hidden")}
        configs = [kind(seed=seed, **hidden) for seed in seeds]
        ratios: dict[str, list[np.ndarray]] = {form: [] for form in forms}
        for _ in range(MANY_REPEATS):
            taken = {}
            for form, workers in forms.items():
                start = np.array([sum(os.times()[:4]), time.perf_counter()])
                fit_many(configs, log, updates, workers=workers)
                taken[form] = np.array([sum(os.times()[:4]), time.perf_counter()]) - start
            for form in forms:
                ratios[form].append(np.append(taken[form] / taken["in turn"], taken[form]))
        print(f"{kind.__name__}, networks {nets}, {torch.get_num_threads()} threads")
        for form, rows in ratios.items():
            cpu, wall, seconds, passed = np.median(rows, axis=0)
            print(
                f"    {form:12} CPU {seconds:6.1f} s ({cpu:.2f} of in turn), "
                f"wall {passed:6.1f} s ({wall:.2f})",
                flush=True,
            )


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    whats = ["filter", "latency", "vector", "tensors", "train", "jax", "many"]
    parser.add_argument("what", choices=whats)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of latency")
    parser.add_argument("--updates", type=int, default=400, help="of each agent of many")
    arguments = parser.parse_args()
    print(machine())
    measured = {
        "filter": filter_step,
        "latency": functools.partial(latency, arguments.steps),
        "vector": vector_step,
        "tensors": tensor_step,
        "train": train_updates,
        "jax": jax_updates,
        "many": functools.partial(many_seeds, arguments.updates),
    }
    measured[arguments.what]()


if __name__ == "__main__":
    main()
