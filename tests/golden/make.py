"""Write the stored figures and files that `tests/test_golden.py` compares with.

    python tests/golden/make.py            # all of them
    python tests/golden/make.py imports    # one part: log, weights, agents, shields, checkpoints,
                                           # specs, record, ten_lines, imports, formats

The files freeze behavior: a later version must load them and act the same. Run this script again
only where a change of behavior is intended, and say why in the commit that holds the new files.

It uses only import paths that the documentation names, so that it runs on any version. What it
writes into `tests/golden/`:

==================  ==============================================================================
log.npz             the log that all learners learn from: whole trips of the boat
weights.json        a fingerprint of each learner's weights after 30 updates (`fingerprint`)
agent_*             an agent of each algorithm, and in agents.json what it does in given states
shield_*            a shield of each kind of fallback and of each way to replace actions, and in
                    shields.json what it executes and reports for given states and actions
checkpoint_*        a run that was stopped after half of its updates, and in checkpoints.json the
                    fingerprint of the weights with which it ends
specs.json          environments in their wrappers as JSON, and their first steps
record.json         a calibration's record
ten_lines.json      the promise and the first infos of the README's ten lines, at a tiny size
imports.json        every name that the documentation, the examples and the benchmarks import
formats/            a file of each other format and kind, and in answers.json what they hold
==================  ==============================================================================

States in which a change of the observation by 1e-5 changes what is executed are left out:
processors differ by about that much, and a choice between two actions can turn on it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from safetensors.numpy import load_file

from safeshield import (
    CalibrationRecord,
    FlightLog,
    OfflineDataset,
    PromiseMonitor,
    SafeFQL,
    SafeFQLConfig,
    SafeSupportQLearning,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldLog,
    ShieldTrainer,
    SSQLConfig,
    collect,
    register_backup,
)
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.fisor import FISOR, FISORConfig
from safeshield.algorithms.flrp import FLRP, FLRPConfig
from safeshield.algorithms.r2pac import R2PAC, R2PACConfig
from safeshield.algorithms.registry import load_agent
from safeshield.demo.helmsmen import Helmsmen
from safeshield.online import SafeRules, Tabular
from safeshield.shield import (
    BackupController,
    CommittedFallback,
    FallbackPolicy,
    ProjectedGradient,
)
from safeshield.wrappers import CertifiedStarts, CostFromStep, ShieldOverlay

GOLDEN = Path(__file__).parent
REPOSITORY = GOLDEN.parents[1]
UPDATES = 30
SIX_VALUES = "GoldenSixValues-v0"
Array = np.ndarray[Any, np.dtype[Any]]
Json = Any


# -- logs and environments ---------------------------------------------------------------------


def boat(**arguments: Any) -> gym.Env[Any, Any]:  # noqa: ANN401
    """Return the boat with long time steps: 100 of them make a trip."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100, **arguments)


def collected_log() -> OfflineDataset:
    """Return the trips that log.npz holds."""
    return collect(boat(), Helmsmen(), episodes=10, seed=5)


class Corridor(gym.Env[Any, Any]):
    """Seven cells in a row; a step leads left, nowhere or right; both ends are violations."""

    observation_space = gym.spaces.Discrete(7)
    action_space = gym.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Start in the middle three cells."""
        super().reset(seed=seed)
        self._cell, self._count = int(self.np_random.integers(2, 5)), 0
        return self._cell, {"constraint": self._constraint()}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Move; the reward is the cell's number."""
        self._cell = min(max(self._cell + int(action) - 1, 0), 6)
        self._count += 1
        info = {"constraint": self._constraint()}
        return self._cell, float(self._cell), False, self._count == 20, info

    def _constraint(self) -> float:
        return float(abs(self._cell - 3) - 2.5)


class Gearbox(gym.Env[Any, Any]):
    """A Dict observation and MultiDiscrete actions: a speed that gear and throttle change."""

    observation_space = gym.spaces.Dict(
        {"gear": gym.spaces.Discrete(3), "speed": gym.spaces.Box(-8.0, 8.0, (1,))}
    )
    action_space = gym.spaces.MultiDiscrete([3, 2])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start at a low speed in the lowest gear."""
        super().reset(seed=seed)
        self._gear, self._count = 0, 0
        self._speed = float(self.np_random.integers(-8, 9)) / 4
        return self._observation(), {"constraint": abs(self._speed) - 3.0}

    def step(
        self,
        action: Any,  # noqa: ANN401
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the gear; accelerate by it, or brake."""
        self._gear, throttle = int(action[0]), int(action[1])
        change = 0.25 * (self._gear + 1) if throttle else -0.25 * (self._gear + 1)
        self._speed = min(max(self._speed + change, -8.0), 8.0)
        self._count += 1
        info = {"constraint": abs(self._speed) - 3.0}
        return self._observation(), self._speed, False, self._count == 20, info

    def _observation(self) -> dict[str, Any]:
        return {"gear": self._gear, "speed": np.array([self._speed], np.float32)}


class SixValues(gym.Env[Any, Any]):
    """An environment whose step returns the cost as one more value, as Safety-Gymnasium's do."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start at 0."""
        super().reset(seed=seed)
        self._place = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        """Move; beyond 1 every step costs 1."""
        self._place += float(action[0])
        observation = np.array([self._place], np.float32)
        return observation, self._place, float(self._place > 1), False, False, {}


def register_six_values() -> None:
    """Make `SixValues` known to Gymnasium, once."""
    if SIX_VALUES not in gym.registry:
        gym.register(
            SIX_VALUES, "golden.make:SixValues", max_episode_steps=50, disable_env_checker=True
        )


class Drivers:
    """Who drives the carts of a log: some brake, some do not; a batch policy."""

    batched = True

    def start_wave(self, num_envs: int) -> None:
        """Let new drivers in."""
        self._gains: Array | None = None

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        """Return accelerations (n, 1): linear in position and speed, and some noise."""
        count = len(observations)
        if self._gains is None or len(self._gains) != count:
            self._gains = rng.uniform((-4.0, -4.0), (1.0, 1.0), (count, 2))
        wanted = (self._gains * observations).sum(axis=1) + rng.normal(0.0, 0.5, count)
        return np.clip(wanted, -1.0, 1.0)[:, None]


# -- learners ----------------------------------------------------------------------------------


def settings(hidden: tuple[int, ...], kind: str) -> dict[str, Any]:
    """Return settings of networks of these widths, for one kind of learner."""
    common: dict[str, Any] = {"seed": 3, "batch_size": 64, "learning_rate": 3e-3}
    if kind == "bc":
        return {**common, "hidden": hidden}
    if kind == "ssql":
        more = {"actor_hidden": hidden, "samples": 4, "extraction_steps": 10, "components": 2}
        return {**common, "critic_hidden": hidden, **more}
    # The figures were frozen when 0.99 and, for SafeFQL, a margin of 0.058 were the defaults.
    common |= {"critic_hidden": hidden, "polyak": 0.05, "safety_expectile": 0.99}
    if kind == "shield":
        return {**common, "behaviour_hidden": hidden, "fallback_hidden": hidden}
    common |= {"flow_hidden": hidden}
    return {**common, "student_hidden": hidden, "margin": 0.058} if kind == "student" else common


TINY = (16,)


def offline(hidden: tuple[int, ...] = TINY) -> dict[str, Callable[[], Any]]:
    """Return learners from the log of the boat: those of `fit(log, steps=..., checkpoint=...)`."""
    student, nets = settings(hidden, "student"), settings(hidden, "flow")
    return {
        "safefql": lambda: SafeFQL(SafeFQLConfig(**student, last_resort="lowest"), device="cpu"),
        "safefql_joint": lambda: SafeFQL(
            SafeFQLConfig(
                **student, phases="joint", teacher="behaviour", candidates=1, last_resort="lowest"
            ),
            device="cpu",
        ),
        "flrp": lambda: FLRP(FLRPConfig(**nets, transforms=2), device="cpu"),
        "flrp_cost": lambda: FLRP(
            FLRPConfig(**nets, transforms=2, feasibility="cost", prior="gaussian"), device="cpu"
        ),
        "r2pac": lambda: R2PAC(R2PACConfig(**student, chunk=3, candidates=4), device="cpu"),
        "r2pac_gaussian": lambda: R2PAC(
            R2PACConfig(**student, chunk=2, actor="awr_gaussian", region="safety"), device="cpu"
        ),
        "fisor": lambda: FISOR(FISORConfig(**nets), device="cpu"),
        "bc": lambda: BehaviourCloning(
            BehaviourCloningConfig(**settings(hidden, "bc"), episodes="all"), device="cpu"
        ),
        "shield_trainer": lambda: ShieldTrainer(
            ShieldConfig(**settings(hidden, "shield")), device="cpu"
        ),
        "ssql": lambda: SafeSupportQLearning(
            config=SSQLConfig(**settings(hidden, "ssql")), device="cpu"
        ),
    }


OFFLINE = offline()


def save_weights(learner: Any, path: Path) -> None:  # noqa: ANN401
    """Write what was learned to a file; of a `ShieldTrainer` it is the shield."""
    if isinstance(learner, ShieldTrainer):
        learner.shield().save(path)
    else:
        learner.save(path)


def corridor_log() -> OfflineDataset:
    """Return random walks in the corridor."""
    return collect(Corridor(), "random", episodes=20, seed=0)


def gearbox_log() -> OfflineDataset:
    """Return random rides."""
    return collect(Gearbox(), "random", episodes=20, seed=0)


def _discrete(log: OfflineDataset, steps: int, hidden: tuple[int, ...] = TINY) -> ShieldTrainer:
    config = ShieldConfig(**settings(hidden, "shield"))
    return ShieldTrainer(config, device="cpu").fit(log, steps=steps)


def _supported(log: OfflineDataset, steps: int, hidden: tuple[int, ...] = TINY) -> ShieldTrainer:
    support = {"support_alpha": 0.4, "support_share": 0.2, "support_held_out": 0.3}
    config = ShieldConfig(**settings(hidden, "shield"), **support, support_weight=0.5)
    return ShieldTrainer(config, device="cpu").fit(log, steps=steps)


def _online(steps: int, hidden: tuple[int, ...]) -> SafeSupportQLearning:
    # Left and right are equally likely in the middle; beside the ends only what leads away is.
    inside = [[0.5, 0.0, 0.5]] * 3
    table = [[0, 0, 1], [0, 0, 1], *inside, [1, 0, 0], [1, 0, 0]]
    behaviour = Tabular(table, Corridor.observation_space, Corridor.action_space)
    config = SSQLConfig(**{**settings(hidden, "ssql"), "critic_hidden": None}, learning_starts=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = SafeSupportQLearning(Corridor(), behaviour, config, device="cpu")
        return agent.learn(40 + steps)


def _masked(log: OfflineDataset, steps: int, hidden: tuple[int, ...]) -> SafeSupportQLearning:
    """Learn from a log, inside rules that keep off the corridor's ends."""
    rules = SafeRules(lambda cell, move: 1 <= cell + move - 1 <= 5, Corridor.action_space)
    config = SSQLConfig(**settings(hidden, "ssql"))
    return SafeSupportQLearning(config=config, device="cpu").fit(log, rules, steps=steps)


def trained(
    log: OfflineDataset, steps: int = UPDATES, hidden: tuple[int, ...] = TINY
) -> dict[str, Callable[[], Any]]:
    """Return what makes each learner whose weights weights.json holds, after `steps` updates."""
    boats = {
        name: lambda make=make: make().fit(log, steps=steps)
        for name, make in offline(hidden).items()
    }
    return {
        **boats,
        "shield_trainer_discrete": lambda: _discrete(corridor_log(), steps, hidden),
        "shield_trainer_dict": lambda: _discrete(gearbox_log(), steps, hidden),
        "shield_trainer_support": lambda: _supported(log, steps, hidden),
        "ssql_masked": lambda: _masked(corridor_log(), steps, hidden),
        "ssql_online": lambda: _online(steps, hidden),
    }


# -- fingerprints ------------------------------------------------------------------------------


def fingerprint(path: Path) -> dict[str, list[float]]:
    """Return six numbers for each tensor of a file.

    They are the sum, the sum of squares, and four projections onto fixed directions: a change of
    any entry changes them.
    """
    found = {}
    for name, array in sorted(load_file(path).items()):
        if name.startswith("episodes/"):
            continue  # Hashes of episodes are no weights, and stored files do not hold them.
        flat = np.asarray(array, np.float64).ravel()
        directions = np.cos(np.outer(np.sqrt([2.0, 3.0, 5.0, 7.0]), np.arange(1, len(flat) + 1)))
        numbers = [flat.sum(), np.square(flat).sum(), *(directions @ flat)]
        found[f"{name} {list(array.shape)}"] = [float(f"{number:.9g}") for number in numbers]
    return found


def check_fingerprint(found: dict[str, list[float]], stored: dict[str, list[float]]) -> None:
    """Raise AssertionError unless two fingerprints agree to 1e-4 of the tensors' sizes."""
    assert sorted(found) == sorted(stored)
    for name, numbers in stored.items():
        size = np.sqrt(numbers[1])
        allowed = 1e-4 * np.array([size, 2 * numbers[1], size, size, size, size]) + 1e-6
        off = np.abs(np.subtract(found[name], numbers))
        assert (off <= allowed).all(), f"{name}: {found[name]}, stored {numbers}"


def weights_of(learner: Any) -> dict[str, list[float]]:  # noqa: ANN401
    """Return the fingerprint of what a learner would write to its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        save_weights(learner, path)
        return fingerprint(path)


# -- what is done in given states --------------------------------------------------------------


def plain(value: Any) -> Json:  # noqa: ANN401
    """Return arrays, numbers and tuples as what JSON holds; floats with seven digits."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value


def close(found: Any, stored: Any, where: str = "", share: float = 1e-3) -> None:  # noqa: ANN401
    """Raise AssertionError unless values agree; numbers to a share of their size (and 1e-3 of 1).

    Entries of a dict that are not among the stored ones may be new.
    """
    if isinstance(stored, dict):
        for key, entry in stored.items():
            assert key in found, f"{where}: {key!r} is missing"
            close(found[key], entry, f"{where}/{key}", share)
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for i, (one, other) in enumerate(zip(found, stored, strict=True)):
            close(one, other, f"{where}/{i}", share)
    elif isinstance(stored, float):
        wanted = np.float64(stored)
        assert isinstance(found, int | float), f"{where}: {found!r}, stored {stored!r}"
        same = np.isclose(found, wanted, rtol=share, atol=share, equal_nan=True)
        assert same, f"{where}: {found!r}, stored {stored!r}"
    else:
        assert found == stored, f"{where}: {found!r}, stored {stored!r}"


Answer = Callable[[Array], dict[str, Any]]


def robust(answer: Answer, states: Array) -> Array:
    """Return which rows of states (n, obs) keep their answers when they move by 1e-5."""
    kept = np.ones(len(states), bool)
    first = answer(states)
    for shift in (1e-5, -1e-5):
        for name, values in answer(states + np.float32(shift)).items():
            one, other = (np.asarray(x, np.float64) for x in (first[name], values))
            same = np.isclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)
            kept &= same.reshape(len(states), -1).all(axis=1)
    return kept


def agent_answers(path: Path, states: Array) -> dict[str, Any]:
    """Return what an agent from a file does in states (n, obs)."""
    answers: dict[str, Any] = {
        "deterministic": load_agent(path).predict(states, deterministic=True)[0],
        "random": load_agent(path).predict(states)[0],
    }
    agent = load_agent(path)
    if isinstance(agent, R2PAC):
        answers["plan"] = agent.plan(states, deterministic=True)
        answers["student"] = agent.acting_by("student").predict(states, deterministic=True)[0]
    if isinstance(agent, FLRP):
        once = agent.with_refine_steps(1)
        answers["refined_once"] = once.predict(states, deterministic=True)[0]
    if hasattr(agent, "shield"):
        answers["value"] = agent.shield().value(states)
    return answers


def shield_answers(shield: Shield, states: Any, actions: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a shield says of, and does with, n actions in n states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executed, report = shield.filter(states, actions)
    answers: dict[str, Any] = {
        "executed": executed,
        **report._asdict(),
        "state": shield.value(states),
        "action": shield.value(states, actions),
        "certified": shield.certified(states),
    }
    if not isinstance(shield.action_space, gym.spaces.Box):
        answers["mask"] = shield.action_mask(states)
    return answers


def boat_points(count: int = 48) -> tuple[Array, Array]:
    """Return states (n, 2) of the boat and proposals (n, 2), some outside the box."""
    rng = np.random.default_rng(11)
    states = rng.uniform((-3.0, -2.0), (2.0, 2.0), (count, 2))
    actions = rng.uniform(-1.2, 1.2, (count, 2))
    return states.round(4).astype(np.float32), actions.round(4).astype(np.float32)


def discrete_points(kind: str) -> tuple[Any, Array]:
    """Return states and actions of the corridor, or of the gearbox."""
    if kind == "corridor":
        cells = np.repeat(np.arange(7), 3)
        return cells, np.tile(np.arange(3), 7)
    gears, speeds = np.meshgrid(np.arange(3), np.arange(-4.0, 4.5, 1.0))
    states = {"gear": gears.ravel(), "speed": speeds.reshape(-1, 1).astype(np.float32)}
    count = gears.size
    return states, np.stack([np.arange(count) % 3, np.arange(count) % 2], axis=1)


def points_from(stored: Json) -> Any:  # noqa: ANN401
    """Return states or actions that JSON holds as arrays."""
    if isinstance(stored, dict):
        return {key: points_from(value) for key, value in stored.items()}
    array = np.array(stored)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


# -- environments ------------------------------------------------------------------------------


def first_steps(env: gym.Env[Any, Any], count: int = 12) -> list[Json]:
    """Return a reset and some steps of an environment, with their infos."""
    rng = np.random.default_rng(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observation, info = env.reset(seed=4)
        seen = [{"observation": observation, "info": info}]
        for _ in range(count):
            action = rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
            observation, reward, terminated, truncated, info = env.step(action)
            seen.append(
                {
                    "observation": observation, "reward": float(reward), "info": info,
                    "terminated": bool(terminated), "truncated": bool(truncated),
                }
            )  # fmt: skip
    env.close()
    return plain(seen)


def wrapped() -> dict[str, gym.Env[Any, Any]]:
    """Return the environments of specs.json; shields' paths are those of this folder."""
    register_six_values()
    certified = "shield_calibrated.safetensors"
    return {
        "shielded": SafetyShield(boat(), "shield_nearest.safetensors", intervention_penalty=0.5),
        "adaptive": SafetyShield(boat(), "shield_student.safetensors", {"target": 0.1}),
        "certified_starts": CertifiedStarts(
            SafetyShield(gym.make("safeshield/DoubleIntegrator-v0"), certified), most=200
        ),
        "overlay": ShieldOverlay(
            SafetyShield(boat(render_mode="rgb_array"), "shield_nearest.safetensors")
        ),
        "cost_from_step": CostFromStep(gym.make(SIX_VALUES)),
    }


def from_spec(text: str) -> gym.Env[Any, Any]:
    """Return the environment of a spec's JSON, also where Gymnasium's spec has other fields."""
    register_six_values()
    fields = json.loads(text)
    known = EnvSpec.__dataclass_fields__
    return gym.make(EnvSpec.from_json(json.dumps({k: v for k, v in fields.items() if k in known})))


def record_of(shield: Shield) -> Json:
    """Return the record of a small calibration, as JSON, without its date and its versions."""
    done = shield.calibrate(
        gym.make("safeshield/DoubleIntegrator-v0"),
        epsilon=0.4, confidence=0.9, episodes=40, seed=1, num_envs=16,
    )  # fmt: skip
    assert done.record is not None
    promise = _promise(done.record)
    data = plain({**done.record.to_json(), "promise": promise})
    return {key: value for key, value in data.items() if key not in ("date", "versions")}


def ten_lines() -> Json:
    """Run the README's first block with few updates and a loose promise; the infos of five steps.

    The log is log.npz, and the environment's random actions are seeded.
    """
    text = (REPOSITORY / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    for old, new in {
        '"boat.hdf5"': "LOG",
        "steps=20_000, progress_bar=True": "steps=300",
        "epsilon=0.01, confidence=0.99": "epsilon=0.95, confidence=0.9, episodes=12, deltas=[0.02]",
        "ShieldConfig(seed=0)": "ShieldConfig(seed=0, critic_hidden=(32,), behaviour_hidden=(16,), "
        "fallback_hidden=(16,))",
        "obs, info = env.reset(seed=0)\n": "obs, info = env.reset(seed=0)\nstart = info\n"
        "env.action_space.seed(0)\n",
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names: dict[str, Any] = {"LOG": GOLDEN / "log.npz"}
    infos = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        exec(code, names)
        infos = [names["start"], names["info"]]
        for _ in range(4):
            infos.append(names["env"].step(names["env"].action_space.sample())[4])
    record = names["shield"].record
    return plain({"promise": _promise(record), "delta": record.delta, "infos": infos})


def _promise(record: CalibrationRecord) -> str:
    # In the promise delta has four digits, of which the last may differ.
    return record.promise.replace(f"delta {record.delta:.4g},", "delta DELTA,")


# -- interrupted runs --------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a run right before it would overwrite its checkpoint."""


@dataclass
class _Watch:
    path: str = ""
    left: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path and event == "os.rename" and os.fspath(arguments[1]) == self.path:
            self.left -= 1
            if self.left < 0:
                raise _Stop


_WATCH = _Watch()


@contextlib.contextmanager
def stopped_after(path: Path, checkpoints: int) -> Iterator[None]:
    """Run a block until it has written so many checkpoints to a file, and wants to write more.

    Not every learner can be told to stop in mid-training; Python tells of every file that is
    replaced, and may forbid it.
    """
    _WATCH.path, _WATCH.left = str(path), checkpoints
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        _WATCH.path = ""


# -- imports -----------------------------------------------------------------------------------


def imported_names() -> list[list[str]]:
    """Return [module, name] of all that documentation, examples and benchmarks import; sorted.

    A name of "" stands for the module itself. Dotted names in the documentation's text count where
    they can be imported.
    """
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    texts = []
    found: set[tuple[str, str]] = set()
    for page in pages:
        text = page.read_text()
        texts += re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        for dotted in re.findall(r"\bsafeshield(?:\.[A-Za-z_]\w*)+", text):
            module, _, name = dotted.rpartition(".")
            with contextlib.suppress(ImportError):
                if hasattr(importlib.import_module(module), name):
                    found.add((module, name))
    for folder in ("examples", "benchmarks"):
        texts += [path.read_text() for path in sorted((REPOSITORY / folder).glob("*.py"))]
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {(name.name, "") for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {(node.module, name.name) for name in node.names}
    return sorted(list(pair) for pair in found if pair[0].split(".")[0] == "safeshield")


# -- formats -----------------------------------------------------------------------------------

FORMATS = GOLDEN / "formats"
VERSION_2 = ("calibrated", "dict", "discrete", "nearest", "plan", "support_inside")
"""Shields that are stored in version 2 of their format as well."""
BACKUP = "golden-steer@1"


@register_backup(BACKUP)
def steer(observations: Array) -> Array:
    """Return a boat's actions: away from the middle of the river."""
    return np.clip(observations, -1.0, 1.0)


def format_answers() -> Json:
    """Return what the files in `formats` hold, and what the shields among them do."""
    log, flight = OfflineDataset.load(FORMATS / "log.hdf5"), FlightLog.load(FORMATS / "flight")
    shield = Shield.load(GOLDEN / "shield_calibrated.safetensors")
    monitor = PromiseMonitor(shield, FORMATS / "promise.json")
    states, actions = boat_points(8)
    columns = ("executed", "value", "threshold", "verdict", "certified", "h", "reward")
    return plain(
        {
            "log": {
                "returns": [float(log.rewards.sum())], "observations": log.observations[:3],
                "source": log.constraint_source, "episodes": log.num_episodes,
            },
            "flight": {name: flight.columns[name][:12] for name in columns},
            "promise": monitor.report().to_json(),
            **{
                name: shield_answers(Shield.load(FORMATS / f"{name}.safetensors"), states, actions)
                for name in ("shield_backup", "shield_committed")
            },
        }
    )  # fmt: skip


# -- writing -----------------------------------------------------------------------------------


def _write(name: str, data: Json) -> None:
    text = json.dumps(data, indent=None, separators=(",", ":"), sort_keys=True)
    # One entry of the outermost level a line: differences stay readable.
    if isinstance(data, dict):
        lines = [
            f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'), sort_keys=True)}"
            for key, value in sorted(data.items())
        ]
        text = "{\n" + ",\n".join(lines) + "\n}"
    (GOLDEN / name).write_text(text + "\n")


def read(name: str) -> Json:
    """Return one of the JSON files."""
    return json.loads((GOLDEN / name).read_text())


def golden_log() -> OfflineDataset:
    """Return the stored log."""
    return OfflineDataset.load(GOLDEN / "log.npz")


def write_log() -> None:
    """Write log.npz."""
    collected_log().save(GOLDEN / "log.npz")


def write_weights() -> None:
    """Write weights.json."""
    _write("weights.json", {n: weights_of(make()) for n, make in trained(golden_log()).items()})


def _long_log() -> OfflineDataset:
    return collect(boat(), Helmsmen(), episodes=80, seed=6)


def write_agents() -> None:
    """Write an agent of each algorithm, and agents.json."""
    log, (states, _), answers = _long_log(), boat_points(), {}
    for name, make in OFFLINE.items():
        if name == "shield_trainer":
            continue
        path = GOLDEN / f"agent_{name}.safetensors"
        make().fit(log, steps=400).save(path)

        def answer(rows: Array, path: Path = path) -> dict[str, Any]:
            return agent_answers(path, rows)

        kept = np.flatnonzero(robust(answer, states))[:16]
        # Noise is drawn for the batch as a whole: it must be the very rows that are kept.
        answers[path.name] = plain({"states": states[kept], **answer(states[kept])})
    _write("agents.json", answers)


def shields() -> dict[str, Shield]:
    """Return the shields of the boat whose files are stored, by the file's name."""
    log, held_out = _long_log(), collect(boat(), Helmsmen(), episodes=12, seed=7)
    trainer = OFFLINE["shield_trainer"]().fit(log, steps=1200).shield()
    trainer = trainer.with_delta(0.05)
    student = OFFLINE["safefql"]().fit(log, steps=1200).shield().with_delta(0.05)
    latent = OFFLINE["flrp"]().fit(log, steps=1200).shield().with_delta(0.05)
    planner = OFFLINE["r2pac"]().fit(log, steps=1200)
    loose = {"alpha": 0.3, "share": 0.1}
    return {
        "nearest": trainer,
        "fallback_policy": trainer.with_replacement(FallbackPolicy()),
        "projected_gradient": trainer.with_replacement(ProjectedGradient(steps=5, step_size=0.5)),
        "support_noise": trainer.with_support(held_out, **loose),
        "support_ensemble": trainer.with_support(held_out, **loose, score="ensemble"),
        "student": student,
        "latent": latent,
        "latent_density": latent.with_support(held_out, **loose, score="density"),
        "plan": planner.shield(plans=4).with_delta(0.05),
        "plan_gradient": planner.shield(plans=4).with_delta(0.05).with_replacement(
            ProjectedGradient()
        ),
        "plan_alone": planner.shield(plans=0).with_delta(0.05),
        "support_inside": _supported(log, 1200).shield().with_delta(0.05),
    }  # fmt: skip


def write_shields() -> None:
    """Write a shield of each kind, and shields.json."""
    answers = {}
    states, actions = boat_points()
    broken = np.array([[np.nan, 0.0], [-1.0, 0.5], [np.inf, 1.0]], np.float32)
    nothing = np.array([[0.5, 0.5], [np.nan, 0.0], [0.1, -0.1]], np.float32)
    for name, shield in shields().items():
        path = GOLDEN / f"shield_{name}.safetensors"
        shield.save(path)
        loaded = Shield.load(path)

        def answer(rows: Array, shield: Shield = loaded) -> dict[str, Any]:
            return shield_answers(shield, rows, actions)

        kept = np.flatnonzero(robust(answer, states))[:24]
        rows, given = (
            np.concatenate([states[kept], broken]),
            np.concatenate([actions[kept], nothing]),
        )
        answers[path.name] = plain(
            {"states": rows, "actions": given, **shield_answers(loaded, rows, given)}
        )
    corridor, gearbox = corridor_log(), gearbox_log()
    probable = _discrete(corridor, 600).shield()
    for name, kind, shield in (
        ("discrete", "corridor", probable),
        ("discrete_support", "corridor", probable.with_support(corridor, alpha=0.3, share=0.1)),
        ("dict", "gearbox", _discrete(gearbox, 600).shield().with_replacement(FallbackPolicy())),
    ):
        path = GOLDEN / f"shield_{name}.safetensors"
        shield.save(path)
        rows, given = discrete_points(kind)
        told = shield_answers(Shield.load(path), rows, given)
        answers[path.name] = plain({"states": rows, "actions": given, **told})
    cart = gym.make("safeshield/DoubleIntegrator-v0")
    log = collect(cart, Drivers(), episodes=200, seed=0)
    config = ShieldConfig(**{**settings(TINY, "shield"), "critic_hidden": (24, 24)})
    shield = ShieldTrainer(config, device="cpu").fit(log, steps=2500)
    shield = shield.calibrate(cart, epsilon=0.4, confidence=0.9, episodes=40, seed=1, num_envs=16)
    path = GOLDEN / "shield_calibrated.safetensors"
    shield.save(path)
    rng = np.random.default_rng(12)
    rows = rng.uniform((-1.0, -2.0), (1.0, 2.0), (32, 2)).round(4).astype(np.float32)
    given = rng.uniform(-1.0, 1.0, (32, 1)).round(4).astype(np.float32)

    def answer_cart(states: Array) -> dict[str, Any]:
        return shield_answers(Shield.load(path), states, given)

    kept = np.flatnonzero(robust(answer_cart, rows))
    told = shield_answers(Shield.load(path), rows[kept], given[kept])
    answers[path.name] = plain({"states": rows[kept], "actions": given[kept], **told})
    _write("shields.json", answers)


def write_checkpoints() -> None:
    """Write runs that were stopped in mid-training, and with which weights they end."""
    sys.addaudithook(_WATCH)
    log, ends = golden_log(), {}
    for name in ("safefql", "flrp", "r2pac", "fisor", "bc", "shield_trainer", "ssql"):
        path = GOLDEN / f"checkpoint_{name}.safetensors"
        path.unlink(missing_ok=True)
        with stopped_after(path, 3):
            OFFLINE[name]().fit(log, steps=UPDATES, checkpoint=path, checkpoint_every=7)
            raise SystemExit(f"{name} was not stopped")
        ends[path.name] = weights_of(OFFLINE[name]().fit(log, steps=UPDATES))
    _write("checkpoints.json", ends)


def write_specs() -> None:
    """Write specs.json."""
    with contextlib.chdir(GOLDEN), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        specs = {}
        for name, env in wrapped().items():
            assert env.spec is not None
            text = env.spec.to_json()
            specs[name] = {"spec": text, "steps": first_steps(from_spec(text))}
    _write("specs.json", specs)


def write_record() -> None:
    """Write record.json."""
    _write("record.json", record_of(Shield.load(GOLDEN / "shield_calibrated.safetensors")))


def write_ten_lines() -> None:
    """Write ten_lines.json."""
    _write("ten_lines.json", ten_lines())


def write_imports() -> None:
    """Write imports.json."""
    names: dict[str, list[str]] = {}
    for module, name in imported_names():
        names.setdefault(module, []).extend([name] if name else [])
    _write("imports.json", names)


def write_formats() -> None:
    """Write the files in `formats`, and answers.json. Files that are there are never replaced."""
    FORMATS.mkdir(exist_ok=True)
    plant = gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=200)
    calibrated = Shield.load(GOLDEN / "shield_calibrated.safetensors")
    nearest = Shield.load(GOLDEN / "shield_nearest.safetensors")
    if not (FORMATS / "log.hdf5").exists():
        collect(plant, "random", episodes=2, seed=0).save(FORMATS / "log.hdf5")
    if not (FORMATS / "flight").exists():
        monitor = PromiseMonitor(calibrated, FORMATS / "promise.json")
        with ShieldLog(FORMATS / "flight") as recorder:
            env = SafetyShield(plant, calibrated, monitor=monitor, log=recorder)
            env.action_space.seed(0)
            for seed in range(4):
                env.reset(seed=seed)
                while not any(env.step(env.action_space.sample())[2:4]):
                    pass
    shields = {f"shield_{name}": Shield.load(GOLDEN / f"shield_{name}.safetensors")
               for name in VERSION_2}  # fmt: skip
    shields["shield_committed"] = nearest.with_replacement(CommittedFallback())
    shields["shield_backup"] = nearest.with_replacement(BackupController(BACKUP))
    for name, shield in shields.items():
        if not (FORMATS / f"{name}.safetensors").exists():
            shield.save(FORMATS / f"{name}.safetensors")
    _write("formats/answers.json", format_answers())


PARTS: dict[str, Callable[[], None]] = {
    "log": write_log,
    "weights": write_weights,
    "agents": write_agents,
    "shields": write_shields,
    "checkpoints": write_checkpoints,
    "specs": write_specs,
    "record": write_record,
    "ten_lines": write_ten_lines,
    "imports": write_imports,
    "formats": write_formats,
}


def main(wanted: Sequence[str]) -> None:
    """Write the parts that are asked for; all by default."""
    torch.set_num_threads(1)
    for name in wanted or PARTS:
        with contextlib.redirect_stdout(io.StringIO()):
            PARTS[name]()
        print(name, "written", flush=True)
    files = [path for path in GOLDEN.iterdir() if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1024:.0f} KiB in all")


if __name__ == "__main__":
    sys.path.insert(0, str(GOLDEN.parent))  # Gymnasium finds `golden.make:SixValues`
    main(sys.argv[1:])
