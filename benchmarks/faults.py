"""Play faults of sensors and actuators behind shields of the boat, the pendulum and field tasks.

    python benchmarks/faults.py --train         # the logs and the shields; minutes
    python benchmarks/faults.py                 # the rest; resumes; prints tables
    python benchmarks/faults.py --picture .     # draws them to stress-boat.png, stress-pendulum.png
    python benchmarks/faults.py --data FOLDER --tasks BallRun HopperVelocity    # the field's tasks

Each of 3 seeds has a log and a small shield of its own (critics of 2 x 48; 3,000 updates), which is
calibrated without faults for a reckless agent at epsilon 0.05 and confidence 0.95. On the boat the
agent steers straight for the goal, on the pendulum it pushes in the direction of the motion, where
h = |speed| - 7 rad/s. A task of the field has the log FOLDER/TASK.hdf5, a shield of
`ShieldTrainer` with its defaults (20,000 updates), and as its agent behaviour cloning of the whole
log with its noise. The agents read NaN as 0. Then:

- `stress` plays its matrix with this agent, with and without the shield;
- the shield is calibrated again under each of some faults, and plays fresh episodes under it;
- false alarms of the checks for frozen observations and jumps, whose limits come from the log, are
  counted in fresh episodes of the log's policy, and of the agent behind the shield. On a task of
  the field, 60% of the log's episodes set the limits, and the others are the fresh ones.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from common import RESULTS, once

import safeshield.envs  # noqa: F401 - registers the boat
from safeshield import OfflineDataset, Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.calibration.binomial import upper_bound
from safeshield.calibration.walk import CalibrationError
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import GOAL
from safeshield.evaluation import FAULT_KINDS, StressCell, StressTest, evaluate, stress
from safeshield.evaluation.episodes import Evaluation
from safeshield.rollouts.policies import BatchPolicy, as_batch_policy, batch_policy
from safeshield.shield.sensors import SensorCheck, SensorState
from safeshield.values.constraint import register_constraint
from safeshield.wrappers import ConstraintFromFunction
from safeshield.wrappers.faults import (
    ControlPeriod,
    DelayedActuator,
    DelayedSensor,
    DroppingSensor,
    LimitedActuator,
    NoisySensor,
)

FOLDER = RESULTS / "faults"
SEEDS = (0, 1, 2)
OWN = ("boat", "pendulum")
SMALL: dict[str, Any] = {"critic_hidden": (48, 48), "behaviour_hidden": (48, 48)}
PROMISE: dict[str, Any] = {"epsilon": 0.05, "confidence": 0.95}
LEVEL = 0.05


@register_constraint("pendulum speed@1")
def speed(observations: np.ndarray) -> np.ndarray:
    """Return how much faster than 7 rad/s the pendulum turns."""
    return np.asarray(np.abs(observations[:, 2]) - 7.0)


@dataclass(frozen=True)
class Plant:
    """A task with one seed, and the folder of the logs of the field's tasks."""

    task: str
    seed: int
    data: Path | None = None

    def path(self, what: str) -> Path:
        """Return the path of a file of this plant, where `what` is the end of its name."""
        return FOLDER / f"{self.task}-{self.seed}{what}"

    @property
    def wide(self) -> dict[str, Any]:
        """Return how many environments step together."""
        return {} if self.task == "boat" else {"num_envs": 50 if self.task in OWN else 20}

    def environment(self) -> gym.Env[Any, Any]:
        """Return the environment without faults."""
        if self.task == "boat":
            return gym.make("safeshield/Boat-v0")
        if self.task == "pendulum":
            return ConstraintFromFunction(gym.make("Pendulum-v1"), "pendulum speed@1")
        from field import make

        return make(self.task)

    def log(self) -> OfflineDataset:
        """Return the log, collected now where a task of this package has none."""
        if self.task not in OWN:
            from suites import read_log

            assert self.data is not None
            return read_log(self.data, self.task)
        if not self.path(".hdf5").exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            count = {"boat": 420, "pendulum": 200}[self.task]
            policy = logging(self.task)
            log = collect(self.environment(), policy, episodes=count, seed=self.seed, **self.wide)
            log.save(self.path(".hdf5"))
        return OfflineDataset.load(self.path(".hdf5"))

    def shield(self) -> Shield:
        """Return the shield without a calibration, trained now where there is none."""
        if self.task not in OWN:
            from field import shield_of

            assert self.data is not None
            FOLDER.mkdir(parents=True, exist_ok=True)
            return shield_of(self.task, self.seed, self.data, FOLDER)
        if not self.path(".safetensors").exists():
            config = ShieldConfig(seed=self.seed, **SMALL)
            trained = ShieldTrainer(config).fit(self.log(), steps=3000)
            trained.shield().save(self.path(".safetensors"))
        return Shield.load(self.path(".safetensors"))

    def agent(self) -> object:
        """Return the agent that the shield is to keep safe."""
        if self.task in OWN:
            return reckless(self.task)
        from suites import trained

        assert self.data is not None
        cloned = trained(self.task, "bc", self.seed, self.data, FOLDER)
        noisy = as_batch_policy(cloned, self.environment().action_space, deterministic=False)

        @batch_policy
        def acts(seen: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401
            return noisy(np.nan_to_num(np.asarray(seen)), rng)

        return acts

    def calibrated(self) -> Shield:
        """Return the shield after its calibration without faults, which is stored."""
        path = self.path("-calibrated.safetensors")
        if not path.exists():
            self.shield().calibrate(
                self.environment(), policy=self.agent(), policy_name="reckless", seed=self.seed,
                **self.wide, **PROMISE,
            ).save(path)  # fmt: skip
        return Shield.load(path)

    def together(self, episodes: int) -> int:
        """Return how many environments play so many episodes, in one wave where that is cheap."""
        wave = math.ceil(1.1 * episodes)
        return wave if self.task in OWN else min(wave, 20)


class Held:
    """Random torques, held for 8 steps on average; 4 of 10 episodes push with the motion."""

    batched = True
    held: np.ndarray | None = None

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes."""
        self.held = None

    def __call__(self, seen: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401
        """Return the torques (n, 1)."""
        count = len(seen)
        if self.held is None or len(self.held) != count:
            self.held = rng.uniform(-2, 2, (count, 1))
            self.pushing = rng.random((count, 1)) < 0.4
        fresh = rng.uniform(-2, 2, (count, 1))
        self.held = np.where(rng.random((count, 1)) < 1 / 8, fresh, self.held)
        pushed = 2 * np.sign(seen[:, 2:3]) * (rng.random((count, 1)) < 0.8)
        return np.where(self.pushing, pushed, self.held).astype(np.float32)


def logging(task: str) -> BatchPolicy:
    """Return the policy that makes the log."""
    return Helmsmen() if task == "boat" else Held()


def reckless(task: str) -> BatchPolicy:
    """Return the agent that the shield is to keep safe."""
    if task == "boat":

        @batch_policy
        def straight(seen: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401
            course = GOAL - np.nan_to_num(np.asarray(seen))
            return course / np.maximum(np.linalg.norm(course, axis=-1, keepdims=True), 1e-9)

        return straight

    @batch_policy
    def push(seen: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401
        return (2 * np.sign(np.nan_to_num(np.asarray(seen))[:, 2:3])).astype(np.float32)

    return push


def faults(shield: Shield) -> dict[str, Any]:
    """Return the faults under which the shield is calibrated, as functions of an environment."""
    spread = shield.model.scaling.observation_spread.astype(np.float64)
    noise = (0.1 * spread).tolist()
    return {
        "noise 0.1 sd": lambda env: NoisySensor(env, noise),
        "NaN in 0.1 of the steps": lambda env: DroppingSensor(env, 0.1, "nan"),
        "observation 2 steps late": lambda env: DelayedSensor(env, 2),
        "action 2 steps late": lambda env: DelayedActuator(env, 2),
        "actuator at half": lambda env: LimitedActuator(env, 0.5),
        "half the control rate": lambda env: ControlPeriod(env, 2),
    }


def matrix(plant: Plant, kind: str, episodes: int) -> dict[str, Any]:
    """Play one kind of fault of `stress`."""
    found = stress(
        plant.calibrated(), plant.environment(), plant.agent(), kinds=[kind], episodes=episodes,
        seed=plant.seed, num_envs=plant.together(episodes), policy_name="reckless",
    )  # fmt: skip
    return found.to_json()


def promised(plant: Plant, name: str, episodes: int) -> dict[str, Any]:
    """Calibrate under one fault, and play fresh episodes under it."""
    raw, agent = plant.shield(), plant.agent()
    env = faults(raw)[name](plant.environment())
    fresh = partial(
        evaluate, env, agent, episodes, plant.seed + 100, starts="certified",
        num_envs=plant.together(episodes), name="reckless",
    )  # fmt: skip
    result: dict[str, Any] = {"before": fresh(shield=plant.calibrated()).to_json()}
    try:
        under = raw.calibrate(
            env, policy=agent, policy_name="reckless", seed=plant.seed,
            **{"num_envs": 50, **plant.wide}, **PROMISE,
        )  # fmt: skip
    except CalibrationError as error:
        return {**result, "refused": str(error)}
    assert under.record is not None
    return {**result, "delta": under.delta, "fresh": fresh(shield=under).to_json()}


def alarms(plant: Plant, episodes: int) -> dict[str, Any]:
    """Count healthy episodes with an alarm, of the log's policy and of the shielded agent."""
    log, env = plant.log(), plant.environment()
    own = plant.task in OWN
    first, rest = (log, None) if own else log.split(0.6, plant.seed)
    check = SensorCheck.from_log(first, LEVEL)
    told: dict[str, Any] = {"level": LEVEL, "measured": check.episodes}
    draw = partial(collect, env, episodes=episodes, seed=plant.seed + 500, **plant.wide)
    acting = as_batch_policy(plant.agent(), env.action_space)
    healthy = {
        "log's policy": draw(logging(plant.task)) if rest is None else rest,
        "shielded agent": draw(_Shielded(plant.calibrated(), acting)),
    }
    for name, fresh in healthy.items():
        found = _alarms(check, fresh)
        told[name] = f"{int(found.sum())} of {len(found)}"
    return told


class _Shielded:
    """An agent behind a shield, as a policy for `collect`."""

    batched = True

    def __init__(self, shield: Shield, agent: BatchPolicy) -> None:
        self._shield, self._agent = shield, agent

    def __call__(self, seen: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401
        return self._shield.filter(seen, self._agent(seen, rng).astype(np.float32))[0]


def _alarms(check: SensorCheck, log: OfflineDataset) -> np.ndarray:
    """Return whether each episode of a log has an alarm."""
    starts, lengths = log.episode_starts, log.episode_lengths
    state = SensorState(check, len(starts), log.observations.shape[1], quiet=True)
    state.read(log.observations[starts])
    found = np.zeros(len(starts), np.bool_)
    for step in range(int(lengths.max())):
        at = starts + np.minimum(step, lengths - 1)
        state.acted(log.actions[at])
        state.read(log.next_observations[at])
        found |= (state.found != "") & (step < lengths)
    return found


def pooled(results: list[list[dict[str, Any]]]) -> StressTest:
    """Return the matrices of several seeds (a list of kinds for each) as one.

    The episodes of all seeds are put together.
    """
    cells = []
    left_out = {
        name: why for kind in results for one in kind for name, why in one["left_out"].items()
    }
    for kind in zip(*results, strict=True):
        for same in zip(*(one["cells"] for one in kind), strict=True):
            if same[0]["fault"] == "none" and cells:
                continue
            shielded = _joined([one["shielded"] for one in same])
            bare = [one["alone"] for one in same]
            alone = None if None in bare else _joined(bare)
            named = same[0]["fault"], same[0]["strength"], same[0]["unit"]
            cells.append(StressCell(*named, shielded, alone))
    return StressTest(tuple(cells), left_out)


def _joined(parts: list[dict[str, Any]]) -> Evaluation:
    from safeshield.evaluation.intervals import binomial_interval

    total, bad = (sum(one[key] for one in parts) for key in ("episodes", "violating"))
    first = {key: value for key, value in parts[0].items() if key != "violation_rate"}
    means = {
        key: None if first[key] is None else float(np.mean([one[key] for one in parts]))
        for key in ("mean_return", "intervention_rate", "start_share")
    }
    joined = {
        "episodes": total,
        "violating": bad,
        "violation_interval": binomial_interval(bad, total),
    }
    return Evaluation(**{**first, **joined, **means})


def _rate(one: dict[str, Any]) -> str:
    return f"{one['violating']} of {one['episodes']}"


def _upper(one: dict[str, Any]) -> str:
    """Return the 95% upper limit of a rate of violation, in percent."""
    return f"{upper_bound(one['episodes'], one['violating'], 0.95):.1%}"


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="make logs and shields; then stop")
    parser.add_argument("--tasks", nargs="+", default=list(OWN), help="with --data also DSRL's")
    parser.add_argument("--data", type=Path, help="folder of TASK.hdf5")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    names = [one.name for one in FAULT_KINDS]
    parser.add_argument("--kinds", nargs="+", default=names, choices=names, help="of the matrix")
    parser.add_argument("--episodes", type=int, default=12, help="of each cell and seed")
    parser.add_argument("--fresh", type=int, default=100, help="episodes under a promise, a seed")
    parser.add_argument("--only", choices=("matrix", "promise", "alarms"), help="one part alone")
    parser.add_argument("--picture", type=Path, help="folder for the pictures of the matrices")
    given = parser.parse_args()
    if given.data is None and not set(given.tasks) <= set(OWN):
        parser.error(f"{' '.join(given.tasks)}: tasks other than {' and '.join(OWN)} need --data")
    warnings.simplefilter("ignore")
    plants = {task: [Plant(task, seed, given.data) for seed in given.seeds] for task in given.tasks}
    for seeds in plants.values():
        for plant in seeds:
            plant.shield()
    if given.train:
        return
    for seeds in plants.values():
        parts = {"matrix": _matrix, "promise": _promise, "alarms": _false_alarms}
        for name, tell in parts.items():
            if given.only in (None, name):
                tell(seeds, given)


def _matrix(plants: list[Plant], given: argparse.Namespace) -> None:
    task = plants[0].task
    results = [
        [
            once(
                f"{task}-{plant.seed}-{kind.replace(' ', '-')}",
                partial(matrix, plant, kind, given.episodes),
                folder=FOLDER,
            )
            for kind in given.kinds
        ]
        for plant in plants
    ]
    found = pooled(results)
    print(f"\n{task}\n\n{found.table('markdown')}")
    for fault, why in found.left_out.items():
        print(f"left out: {fault}: {why}")
    print(flush=True)
    if given.picture is not None:
        found.picture(given.picture / f"stress-{task}.png")


def _promise(plants: list[Plant], given: argparse.Namespace) -> None:
    print("\n| task | fault | before | delta | after | upper limits | replaced |")
    print(7 * "|---" + "|")
    task = plants[0].task
    for at, name in enumerate(faults(plants[0].shield())):
        rows = [
            once(
                f"{task}-{plant.seed}-promise-{at}",
                partial(promised, plant, name, given.fresh),
                folder=FOLDER,
            )
            for plant in plants
        ]
        fresh = [one.get("fresh") for one in rows]
        cells = (
            task,
            name,
            ", ".join(_rate(one["before"]) for one in rows),
            ", ".join(f"{one['delta']:.3g}" if "delta" in one else "refused" for one in rows),
            ", ".join("-" if one is None else _rate(one) for one in fresh),
            ", ".join("-" if one is None else _upper(one) for one in fresh),
            ", ".join("-" if one is None else f"{one['intervention_rate']:.1%}" for one in fresh),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _false_alarms(plants: list[Plant], given: argparse.Namespace) -> None:
    for plant in plants:
        name = f"{plant.task}-{plant.seed}"
        told = once(f"{name}-alarms", partial(alarms, plant, given.fresh), folder=FOLDER)
        counts = {key: told[key] for key in ("log's policy", "shielded agent")}
        print(f"{name}: episodes with an alarm at level {LEVEL}: {counts}")


if __name__ == "__main__":
    main()
