"""Measure the time of a shielded step and the speed of training, relative to a reference.

    python benchmarks/speed.py filter       # SafetyShield.step minus the env's own step
    python benchmarks/speed.py vector       # VectorSafetyShield, per env, 1 to 4,096 envs
    python benchmarks/speed.py tensors      # the shield on tensors beside it, 4,096 envs
    python benchmarks/speed.py train        # updates of SafeFQL, one and two threads

The figures are medians of several runs. The reference is measured in the same run. For the filter
it is one NumPy forward pass of a (256, 256) network; for training it is the product
of a batch and a hidden layer.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch
from common import machine
from torch.utils.flop_counter import FlopCounterMode

import safeshield
from safeshield import OfflineDataset, SafeFQL, SafeFQLConfig, SafetyShield
from safeshield.algorithms.safefql import SafeFQLRun
from safeshield.envs.boat import BoatVectorEnv
from safeshield.training.log import LogTensors
from safeshield.training.loop import Draw
from safeshield.wrappers import VectorSafetyShield

REPEATS = 15


def microseconds(function: Callable[[], object], count: int) -> float:
    """Return the median over repeats of the mean time of a call, after a warm-up."""
    times = []
    for repeat in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(count):
            function()
        if repeat:
            times.append((time.perf_counter() - start) / count * 1e6)
    return float(np.median(times))


def seconds(function: Callable[[], object], count: int) -> float:
    """Return the mean time of a call."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def filter_step() -> None:
    """Time the step of a shielded boat whose action is accepted, and that of the bare boat."""
    warnings.simplefilter("ignore")
    log = safeshield.collect(gym.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    shield = SafeFQL(SafeFQLConfig(critic_hidden=(256, 256))).fit(log, steps=3).shield()
    # The boat is at rest in still water, so the episode never ends and every state is safe.
    bare = gym.make("safeshield/Boat-v0", current=0.0).unwrapped
    wrapped = SafetyShield(gym.make("safeshield/Boat-v0", current=0.0).unwrapped, shield)
    action = np.zeros(2, np.float32)
    start = {"state": np.array([-2.0, 0.0])}
    bare.reset(seed=0, options=start)
    wrapped.reset(seed=0, options=start)
    if wrapped.step(action)[4]["shield/intervened"]:
        raise SystemExit("the test state is not accepted: this would time the wrong path")
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(s).astype(np.float32) for s in ((4, 256), (256, 256), (256, 1))]
    x = rng.standard_normal((1, 4)).astype(np.float32)

    def reference() -> np.ndarray:
        return np.maximum(np.maximum(x @ w[0], 0.0) @ w[1], 0.0) @ w[2]

    rows = [
        (
            microseconds(lambda: bare.step(action), 200),
            microseconds(lambda: wrapped.step(action), 200),
            microseconds(reference, 200),
        )
        for _ in range(5)
    ]
    bare_us, wrapped_us, reference_us = np.median(np.array(rows), axis=0)
    extra = wrapped_us - bare_us
    print(
        f"env step {bare_us:.1f} us, shielded step {wrapped_us:.1f} us: the shield adds "
        f"{extra:.1f} us = {extra / reference_us:.1f} forwards of one NumPy network "
        f"({reference_us:.1f} us)"
    )


def vector_step() -> None:
    """Time VectorSafetyShield per environment with all actions accepted and all rejected."""
    warnings.simplefilter("ignore")
    log = safeshield.collect(gym.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    shield = SafeFQL(SafeFQLConfig(critic_hidden=(256, 256))).fit(log, steps=3).shield()
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(s).astype(np.float32) for s in ((4, 256), (256, 256), (256, 1))]
    # No learned value lies beyond these thresholds, so they accept or reject every action.
    accepts, rejects = (-100.0, 100.0)
    print("microseconds an env beyond its own step; one (256, 256) NumPy net beside it")
    for count in (1, 16, 256, 4096):
        x = rng.standard_normal((count, 4)).astype(np.float32)
        actions = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
        bare = BoatVectorEnv(count, max_episode_steps=None, current=0.0)
        cells = []
        for shift in (accepts, rejects):
            moved = replace(shield.model.scale, offset=shield.model.scale.offset + shift)
            shifted = replace(shield, model=replace(shield.model, scale=moved))
            wrapped = VectorSafetyShield(
                BoatVectorEnv(count, max_episode_steps=None, current=0.0), shifted
            )
            bare.reset(seed=0)
            wrapped.reset(seed=0)
            _, _, _, _, infos = wrapped.step(actions)
            if (infos["shield/intervened"] != (shift == rejects)).any():
                raise SystemExit("not all actions go the way that is timed")
            calls = max(1, (2000 if shift == accepts else 100) // count)
            with_shield = microseconds(functools.partial(wrapped.step, actions), calls)
            without = microseconds(functools.partial(bare.step, actions), calls)
            cells.append((with_shield - without) / count)

        def reference(x: np.ndarray = x) -> np.ndarray:
            return np.maximum(np.maximum(x @ w[0], 0.0) @ w[1], 0.0) @ w[2]

        net = microseconds(reference, max(1, 2000 // count)) / count
        print(
            f"{count:5} envs: accepted {cells[0]:8.2f} ({cells[0] / net:5.1f} nets), rejected "
            f"{cells[1]:9.2f} ({cells[1] / net:6.1f} nets); net {net:6.2f}",
            flush=True,
        )


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
    for widths, size in (((256,) * 2, 256), ((512,) * 4, 1024)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _train_phases(widths, size)


def _train_phases(nets: tuple[int, ...], size: int) -> None:
    rng = np.random.default_rng(0)
    count, length = 20_000, 500
    observations = rng.standard_normal((count + 1, 17)).astype(np.float32)
    constraints = observations[:, 0]
    ends = np.arange(1, count + 1) % length == 0
    before = constraints[:-1].copy()
    log = OfflineDataset.from_arrays(
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
            torch.randint(count, (size,), generator=generator),
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


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["filter", "vector", "tensors", "train"])
    what = parser.parse_args().what
    print(machine())
    measured = {
        "filter": filter_step,
        "vector": vector_step,
        "tensors": tensor_step,
        "train": train_updates,
    }
    measured[what]()


if __name__ == "__main__":
    main()
