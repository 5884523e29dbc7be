"""Run the part of `compare_checkouts.py` that runs inside each of the two checkouts.

`compare_checkouts.py` starts this script; it is not meant to be started by hand. A worker is one
process with one thread and one checkout. It reads requests from its standard input, one JSON array
on each line, and it answers in the same form. It uses only import paths that documentation,
examples or benchmarks name, and the learners, environments and files of `tests/golden`.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests"))

from golden import make  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: E402

import safeshield  # noqa: E402
from safeshield import (  # noqa: E402
    OfflineDataset,
    SafeFQL,
    SafeSupportQLearning,
    SafetyShield,
    Shield,
    ShieldTrainer,
    SSQLConfig,
)
from safeshield.algorithms.behaviour_cloning import BehaviourCloning  # noqa: E402
from safeshield.algorithms.fisor import FISOR  # noqa: E402
from safeshield.algorithms.flrp import FLRP  # noqa: E402
from safeshield.algorithms.r2pac import R2PAC  # noqa: E402
from safeshield.algorithms.registry import load_agent  # noqa: E402
from safeshield.envs.boat import BoatVectorEnv  # noqa: E402
from safeshield.shield import FallbackPolicy, OwnSamples, ProjectedGradient  # noqa: E402
from safeshield.wrappers import VecSafetyShield, VectorSafetyShield  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
STATES, UPDATES = 10_000, 300
BLOCKS, BLOCK_SECONDS = 5, 0.015
LEARNERS: dict[str, Callable[[], Any]] = {
    "SafeFQL": lambda: SafeFQL(device="cpu"),
    "FLRP": lambda: FLRP(device="cpu"),
    "R2PAC": lambda: R2PAC(device="cpu"),
    "FISOR": lambda: FISOR(device="cpu"),
    "BehaviourCloning": lambda: BehaviourCloning(device="cpu"),
    "ShieldTrainer": lambda: ShieldTrainer(device="cpu"),
    "SafeSupportQLearning": lambda: SafeSupportQLearning(
        config=SSQLConfig(extraction_steps=30), device="cpu"
    ),
}
"""Learners of the default size, for timing updates and for making shields and agents."""
MAKERS = ("SafeFQL", "FLRP", "R2PAC", "ShieldTrainer")
"""The learners that make a shield."""


class Constant(gym.Env[Any, Any]):
    """An environment that does nothing, so that only the time of its wrapper is measured."""

    observation_space = gym.spaces.Box(
        np.array([-3.0, -2.0], np.float32), np.array([2.0, 2.0], np.float32)
    )
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, state: Array) -> None:
        self._state = np.asarray(state, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Return the state."""
        return self._state, {}

    def step(self, action: object) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Return the state."""
        return self._state, 0.0, False, False, {}


class Draws:
    """A batch policy for `OwnSamples` that draws uniformly in the action box of the boat."""

    batched = True

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        """Return the actions (n, 2)."""
        return rng.uniform(-1.0, 1.0, (len(observations), 2))


def points(shield: Shield, count: int) -> tuple[Any, Array]:
    """Return states and proposals for a shield; 2% are unreadable or outside the action box."""
    rng = np.random.default_rng(17)
    if isinstance(shield.observation_space, gym.spaces.Discrete):
        return rng.integers(0, 7, count), rng.integers(0, 3, count)
    if isinstance(shield.observation_space, gym.spaces.Dict):
        speeds = rng.uniform(-5.0, 5.0, (count, 1)).astype(np.float32)
        return (
            {"gear": rng.integers(0, 3, count), "speed": speeds},
            np.stack([rng.integers(0, 3, count), rng.integers(0, 2, count)], axis=1),
        )
    width = shield.action_space.shape[0]
    states = rng.uniform((-3.0, -2.0), (2.0, 2.0), (count, 2)).astype(np.float32)
    actions = rng.uniform(-1.1, 1.1, (count, width)).astype(np.float32)
    states[rng.random(count) < 0.01, 0] = np.nan
    actions[rng.random(count) < 0.01, 0] = np.nan
    return states, actions


def rows(states: Any, part: slice | int) -> Any:  # noqa: ANN401
    """Return some rows of the states, which may be a dict of arrays."""
    return {k: v[part] for k, v in states.items()} if isinstance(states, dict) else states[part]


def flat(value: Any, path: str = "") -> Iterable[tuple[str, Array]]:  # noqa: ANN401
    """Yield every array of a nested value, such as infos, with its path."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from flat(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype.kind == "O"
    ):
        for i, entry in enumerate(value):
            yield from flat(entry, f"{path}/{i}")
    else:
        yield path, np.array("None" if value is None else value)


def joined(parts: list[tuple[Any, Any]]) -> Arrays:
    """Join the executed actions and the reports of several calls into one array each."""
    executed = np.concatenate([np.atleast_1d(part[0]) for part in parts])
    found = {"executed": executed}
    for name in parts[0][1]._fields:
        found[name] = np.concatenate([np.atleast_1d(getattr(part[1], name)) for part in parts])
    return found


# -- what must be equal ------------------------------------------------------------------------


class Files:
    """The shields, agents and log that the checkout BEFORE has written into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self) -> None:
        """Train every learner of the default size briefly; write shields, agents and the log."""
        log = make.collect(make.boat(), make.Helmsmen(), episodes=60, seed=6)
        log.save(self.folder / "log.npz")
        states = points(Shield.load(make.GOLDEN / "shield_nearest.safetensors"), 400)
        known = np.isfinite(states[0]).all(axis=1) & np.isfinite(states[1]).all(axis=1)
        for name, new in LEARNERS.items():
            learner = new().fit(log, steps=60)
            make.save_weights(learner, self.folder / f"agent_{name}.safetensors")
            if name in MAKERS:
                shield = learner.shield()
                values = shield.value(states[0][known], states[1][known].clip(-1, 1))
                # With this delta about half of the proposals are accepted.
                shield = shield.with_delta(max(0.0, -float(np.median(values))))
                shield.save(self.folder / f"shield_{name}.safetensors")

    @cached_property
    def log(self) -> OfflineDataset:
        """The log from which the learners are trained."""
        return OfflineDataset.load(self.folder / "log.npz")

    def shields(self) -> dict[str, Shield]:
        """Return the shields of this folder and of `tests/golden`, with further replacements."""
        paths = [*make.GOLDEN.glob("shield_*"), *self.folder.glob("shield_*")]
        found = {path.stem.removeprefix("shield_"): Shield.load(path) for path in sorted(paths)}
        strategies = {
            "fallback": FallbackPolicy(), "gradient": ProjectedGradient(),
            "samples": OwnSamples(Draws(), count=8, seed=5),
        }  # fmt: skip
        more = {
            f"{name}+{how}": found[name].with_replacement(strategy)
            for name in ("ShieldTrainer", "FLRP", "plan")
            for how, strategy in strategies.items()
        }
        more["discrete+fallback"] = found["discrete"].with_replacement(FallbackPolicy())
        return found | more

    def agents(self) -> dict[str, Path]:
        """Return the files of the agents, including those of `tests/golden`."""
        paths = [*make.GOLDEN.glob("agent_*"), *self.folder.glob("agent_*")]
        found = {path.stem.removeprefix("agent_"): path for path in sorted(paths)}
        return {name: path for name, path in found.items() if name != "ShieldTrainer"}


def weights(updates: int) -> Iterable[tuple[str, Arrays]]:
    """Yield the weights of each learner after some updates, for tiny and for medium networks."""
    log = make.golden_log()
    for hidden in ((16,), (48, 40)):
        for name, new in make.trained(log, updates, hidden).items():
            path = Path(f"weights-{os.getpid()}.safetensors")
            make.save_weights(new(), path)
            yield f"weights {name} {hidden}", dict(make.load_file(path))
            path.unlink()


def decisions(files: Files, count: int) -> Iterable[tuple[str, Arrays]]:
    """Yield the actions and reports of each shield for the same states, in several batch sizes."""
    for name, shield in files.shields().items():
        states, actions = points(shield, count)
        # Larger batches take gigabytes of memory in shields that evaluate plans.
        for size in (256, 7, 1):
            # A strategy that draws random samples starts again from its seed.
            if isinstance(shield.replacement, OwnSamples):
                shield = shield.with_replacement(OwnSamples(Draws(), count=8, seed=5))
            starts = range(0, count, size)
            if size == 1:
                parts = [shield.filter(rows(states, i), actions[i]) for i in starts]
                parts = [(np.asarray(part[0])[None], part[1]) for part in parts]
            else:
                cuts = [slice(i, i + size) for i in starts]
                parts = [shield.filter(rows(states, cut), actions[cut]) for cut in cuts]
            yield f"shield {name}, {size} at a time", joined(parts)
        values: Arrays = {
            "state": np.asarray(shield.value(states)),
            "action": np.asarray(shield.value(states, actions)),
            "certified": np.asarray(shield.certified(states)),
        }
        if not isinstance(shield.action_space, gym.spaces.Box):
            values["mask"] = shield.action_mask(states)
        yield f"shield {name}, values", values


def predictions(files: Files, count: int) -> Iterable[tuple[str, Arrays]]:
    """Yield the actions of each agent, in a batch and one by one, with noise and without."""
    states = points(Shield.load(make.GOLDEN / "shield_nearest.safetensors"), count)[0]
    states = states[np.isfinite(states).all(axis=1)]
    for name, path in files.agents().items():
        found: Arrays = {}
        for sure in (True, False):
            agent = load_agent(path)
            found[f"batch {sure}"] = np.asarray(agent.predict(states, deterministic=sure)[0])
            agent = load_agent(path)
            each = [agent.predict(state, deterministic=sure)[0] for state in states[:200]]
            found[f"one by one {sure}"] = np.array(each)
        memory = None
        for step in range(4):
            action, memory = agent.predict(states[:50], memory)
            found[f"in turn {step}"] = np.asarray(action)
        yield f"agent {name}", found


def episodes(files: Files, steps: int) -> Iterable[tuple[str, Arrays]]:
    """Yield all values that wrapped environments return in some steps: single, vector, VecEnv."""
    shields = files.shields()
    adaptive = {"target": 0.1, "window": 20}
    cases: dict[str, Callable[[], Any]] = {}
    for name in ("nearest", "student", "latent", "plan", "support_noise", "ShieldTrainer"):
        shield = shields[name]
        cases[f"single {name}"] = lambda shield=shield: SafetyShield(make.boat(), shield)
        cases[f"vector {name}"] = lambda shield=shield: VectorSafetyShield(
            gym.vector.SyncVectorEnv([make.boat] * 3), shield
        )
        cases[f"native vector {name}"] = lambda shield=shield: VectorSafetyShield(
            BoatVectorEnv(5, max_episode_steps=50, dt=0.02), shield
        )
        cases[f"VecEnv {name}"] = lambda shield=shield: VecSafetyShield(
            DummyVecEnv([make.boat] * 3), shield
        )
    for name, new in {"discrete": make.Corridor, "dict": make.Gearbox}.items():
        shield = shields[name]
        cases[f"single {name}"] = lambda new=new, shield=shield: SafetyShield(new(), shield)
        cases[f"vector {name}"] = lambda new=new, shield=shield: VectorSafetyShield(
            gym.vector.SyncVectorEnv([new] * 3), shield
        )
        cases[f"VecEnv {name}"] = lambda new=new, shield=shield: VecSafetyShield(
            DummyVecEnv([new] * 3), shield
        )
    shield = shields["student"]
    cases["single adaptive, penalty"] = lambda: SafetyShield(
        make.boat(), shield, adaptive, intervention_penalty=0.5
    )
    cases["vector adaptive, penalty"] = lambda: VectorSafetyShield(
        gym.vector.SyncVectorEnv([make.boat] * 3), shield, adaptive=adaptive,
        intervention_penalty=0.5,
    )  # fmt: skip
    cases["VecEnv adaptive, penalty"] = lambda: VecSafetyShield(
        DummyVecEnv([make.boat] * 3), shield, 0.5, adaptive
    )
    cases["single calibrated"] = lambda: SafetyShield(
        gym.make("safeshield/DoubleIntegrator-v0"), shields["calibrated"]
    )
    for name, new in cases.items():
        env = new()
        single = isinstance(env, gym.Env)
        venv = hasattr(env, "reset_infos")
        space = env.action_space
        space.seed(3)
        found: Arrays = {}
        if venv:
            env.seed(8)
            found |= flat(env.reset(), "reset")
            found |= flat(env.reset_infos, "reset infos")
        else:
            found |= flat(env.reset(seed=8), "reset")
        for step in range(steps):
            action = (
                np.array([space.sample() for _ in range(env.num_envs)]) if venv else space.sample()
            )
            result = env.step(action)
            found |= flat(result, str(step))
            if venv:
                found |= flat(env.reset_infos, f"{step} reset infos")
            elif single and (result[2] or result[3]):
                found |= flat(env.reset(), f"{step} reset")
        env.close()
        yield f"wrapper {name}", found


def calibration() -> Iterable[tuple[str, Arrays]]:
    """Yield the record of a calibration."""
    shield = Shield.load(make.GOLDEN / "shield_calibrated.safetensors")
    yield "calibration", dict(flat(make.record_of(shield)))


def equality(files: Files, target: Path, quick: bool, count: int | None) -> list[str]:
    """Write all arrays that must be equal to a file, and return the time that each part took."""
    count = count or (400 if quick else STATES)
    parts = {
        "weights": lambda: weights(40 if quick else UPDATES),
        "decisions": lambda: decisions(files, count),
        "predictions": lambda: predictions(files, min(count, 2000)),
        "wrappers": lambda: episodes(files, 60 if quick else 260),
        "calibration": calibration,
    }
    found: dict[str, Arrays] = {}
    told = []
    for name, part in parts.items():
        start = time.perf_counter()
        found.update(part())
        told.append(f"{name} {time.perf_counter() - start:.0f} s")
        print(told[-1], file=sys.stderr, flush=True)
    target.write_bytes(pickle.dumps(found))
    return told


# -- what is timed -----------------------------------------------------------------------------


def _shield_rows(files: Files) -> dict[str, Callable[[], object]]:
    shields = files.shields()
    timed: dict[str, Callable[[], object]] = {}
    names = (
        "ShieldTrainer", "ShieldTrainer+fallback", "ShieldTrainer+gradient",
        "ShieldTrainer+samples", "SafeFQL", "FLRP", "R2PAC", "support_noise", "discrete", "dict",
    )  # fmt: skip
    for name in names:
        shield = shields[name]
        states, actions = points(shield, 4096)
        states = _readable(states)
        actions = np.nan_to_num(actions)
        if actions.dtype.kind == "f":
            actions = actions.clip(-1, 1)
        refused = np.asarray(shield.filter(states, actions)[1].intervened)
        for how, at in (("accepted", ~refused), ("replaced", refused)):
            i = int(np.flatnonzero(at)[0])
            timed[f"Shield.filter, one {how}: {name}"] = _call(
                shield.filter, rows(states, i), actions[i]
            )
        for size in (64, 4096) if name == "ShieldTrainer" else (64,):
            batch = slice(0, size)
            timed[f"Shield.filter, {size}: {name}"] = _call(
                shield.filter, rows(states, batch), actions[batch]
            )
        if not isinstance(shield.action_space, gym.spaces.Box):
            timed[f"action_mask, one: {name}"] = _call(shield.action_mask, rows(states, 0))
            timed[f"action_mask, 64: {name}"] = _call(
                shield.action_mask, rows(states, slice(0, 64))
            )
    return timed


def _readable(states: Any) -> Any:  # noqa: ANN401
    return states if isinstance(states, dict) else np.nan_to_num(states)


def _call(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:  # noqa: ANN401
    return lambda: function(*arguments)


def _wrapper_rows(files: Files) -> dict[str, Any]:
    """Return calls, or pairs of a call and a call whose time is subtracted from it."""
    shield = files.shields()["ShieldTrainer"]
    states, actions = points(shield, 400)
    states, actions = np.nan_to_num(states), np.nan_to_num(actions).clip(-1, 1)
    refused = np.asarray(shield.filter(states, actions)[1].intervened)
    timed: dict[str, Any] = {}
    for how, at in (("accepted", ~refused), ("replaced", refused)):
        i = int(np.flatnonzero(at)[0])
        bare, env = Constant(states[i]), SafetyShield(Constant(states[i]), shield)
        env.reset()
        timed[f"SafetyShield.step beyond the environment's, {how}"] = (
            _call(env.step, actions[i]),
            _call(bare.step, actions[i]),
        )
    vector = VectorSafetyShield(BoatVectorEnv(64, max_episode_steps=None, current=0.0), shield)
    vector.reset(seed=0)
    timed["VectorSafetyShield.step, 64 boats"] = _call(vector.step, actions[:64])
    venv = VecSafetyShield(DummyVecEnv([lambda: Constant(states[0])] * 8), shield)
    venv.reset()
    timed["VecSafetyShield.step, 8"] = _call(venv.step, actions[:8])
    return timed


def _agent_rows(files: Files) -> dict[str, Callable[[], object]]:
    states = np.nan_to_num(points(files.shields()["ShieldTrainer"], 256)[0])
    timed: dict[str, Callable[[], object]] = {}
    for name in LEARNERS:
        if name == "ShieldTrainer":
            continue  # ShieldTrainer has no actor of its own.
        agent = load_agent(files.folder / f"agent_{name}.safetensors")
        timed[f"predict, one: {name}"] = _call(agent.predict, states[0])
        timed[f"predict, 256: {name}"] = _call(agent.predict, states)
    return timed


class Timing:
    """The timed rows, which are made when the first one is requested."""

    def __init__(self, files: Files, quick: bool) -> None:
        self.files = files
        self.updates = 12 if quick else 24
        self.blocks = 3 if quick else BLOCKS
        self.counts: dict[str, tuple[int, int]] = {}

    @cached_property
    def rows(self) -> dict[str, Any]:
        """All rows except those of training."""
        return {
            **_wrapper_rows(self.files), **_shield_rows(self.files), **_agent_rows(self.files),
        }  # fmt: skip

    def names(self) -> list[str]:
        """Return the names of all rows."""
        return [*self.rows, *(f"one update: {name}" for name in LEARNERS)]

    def seconds(self, name: str) -> float:
        """Return the seconds of one call: the best of some blocks, in CPU time of this process."""
        if name.startswith("one update: "):
            learner = LEARNERS[name.removeprefix("one update: ")]()
            log = self.files.log
            start = time.process_time()
            learner.fit(log, steps=self.updates)
            return (time.process_time() - start) / self.updates
        call = self.rows[name]
        call, less = call if isinstance(call, tuple) else (call, None)
        if name not in self.counts:
            call()
            once = min(_seconds(call, 1) for _ in range(3))
            count = max(1, round(BLOCK_SECONDS / max(once, 1e-9)))
            # A call that takes longer than a block needs few repeats.
            self.counts[name] = count, 2 if once > BLOCK_SECONDS else self.blocks
        count, blocks = self.counts[name]
        best = min(_seconds(call, count) for _ in range(blocks))
        if less is not None:
            best -= min(_seconds(less, count) for _ in range(blocks))
        return best


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


# -- the process -------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Answer requests until the standard input ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of libraries must not be read as an answer.
    os.chdir(folder)
    files = Files(folder)
    timing: Timing | None = None
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer: Any = None
        if what == "where":
            answer = str(Path(safeshield.__file__).parent)
        elif what == "write":
            files.write()
        elif what == "equality":
            target, quick, count = arguments
            answer = equality(files, Path(target), quick, count)
        elif what == "rows":
            timing = Timing(files, arguments[0])
            answer = timing.names()
        elif what == "time" and timing is not None:
            answer = timing.seconds(arguments[0])
        else:
            raise SystemExit(f"unknown request {what!r}")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
