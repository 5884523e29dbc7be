"""Compare the algorithms, PPO for reward alone and shielded agents on the field's tasks.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/suites.py --data FOLDER     # logs in DSRL's format, TASK.hdf5; resumes
    python benchmarks/suites.py --data FOLDER --table

A cell is one method on one task with one seed. The method is trained and then evaluated on 20
episodes by the field's protocol (returns normalised by the lowest and the highest of the log, cost
limit 10). Each cell runs in its own process, which reports its CPU time and peak memory, and its
result is stored under `results/`. All tasks have the same configuration. Labels are continuous
where h can be computed from the observations of the log.

The shield is that of SafeFQL with the same seed, and its delta is the margin of the agent's gate.
No shield is calibrated here, so nothing is promised, and the columns are measurements only.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS, apart, machine, once
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield import OfflineDataset, SafeFQL, Shield
from safeshield.algorithms.registry import ALGORITHMS, load_agent, offline_algorithm
from safeshield.evaluation import EPISODES, FieldScore, ReferenceReturns, Run, format_scores, play
from safeshield.suites.labels import label
from safeshield.suites.tasks import COST_LIMIT, find_task

FOLDER = RESULTS / "suites"
UPDATES = {"bc": 6_000}
"""Updates of an algorithm; every other one has 12,000."""
PPO_STEPS = 100_000
NAMES = {
    "bc": "BC",
    "bc-safe": "BC, safe episodes",
    "fisor": "FISOR-style",
    "safefql": "SafeFQL",
    "flrp": "FLRP",
    "r2pac": "R2PAC",
    "ppo": "PPO, reward alone",
    "ppo-shield": "PPO, reward alone",
    "bc-shield": "BC",
}
"""Methods in the order in which they run; a shielded method needs results of earlier ones."""
ABLATIONS = {
    "flrp-gaussian": "FLRP, Gaussian prior",
    "flrp-cost": "FLRP, plain costs",
    "r2pac-plain": "R2PAC, no penalty",
    "r2pac-reward": "R2PAC, no V_c in unsafe states",
    "r2pac-awr": "R2PAC, weighted Gaussian actor",
}
"""Methods that run only when they are named, like any other registered algorithm."""
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "bc-safe": ("bc", {"episodes": "safe", "cost_limit": COST_LIMIT}),
    "flrp-gaussian": ("flrp", {"prior": "gaussian"}),
    "flrp-cost": ("flrp", {"feasibility": "cost"}),
    "r2pac-plain": ("r2pac", {"penalise": False}),
    "r2pac-reward": ("r2pac", {"recover": False}),
    "r2pac-awr": ("r2pac", {"actor": "awr_gaussian"}),
}
"""Algorithm and changed settings of each method that does not use the defaults."""


class Normalised:
    """A model of Stable-Baselines3 that normalises observations as in its training."""

    def __init__(self, path: Path, algorithm: type[PPO] | type[SAC] = PPO) -> None:
        self._model = algorithm.load(path.with_suffix(".zip"), device="cpu")
        statistics = np.load(path.with_suffix(".npz"))
        self._mean, self._spread = statistics["mean"], statistics["spread"]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,  # noqa: ANN401
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Return the mean action, with the signature of Stable-Baselines3."""
        scaled = np.clip((observation - self._mean) / self._spread, -10.0, 10.0)
        return self._model.predict(scaled, state, episode_start, deterministic)


def learn(
    make: Callable[[], gym.Env],
    seed: int,
    path: Path,
    algorithm: type[PPO] | type[SAC] = PPO,
    callback: BaseCallback | None = None,
) -> None:
    """Train PPO or SAC for reward alone, 100,000 steps; normalised for the learner only.

    PPO has 64 x 64 networks and 4 environments, SAC the defaults and a single environment. The
    model is saved as `path` with the ending .zip, the statistics of the observations with .npz.
    """
    on_policy = algorithm is PPO
    made = [make] * (4 if on_policy else 1)
    envs = VecNormalize(DummyVecEnv(made))  # type: ignore[arg-type]
    settings: dict[str, Any] = {"n_steps": 512, "batch_size": 256} if on_policy else {}
    model = algorithm("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    model.learn(PPO_STEPS, callback)
    model.save(path.with_suffix(".zip"))
    seen: Any = envs.obs_rms
    np.savez(path.with_suffix(".npz"), mean=seen.mean, spread=np.sqrt(seen.var + envs.epsilon))


def trained(task: str, method: str, seed: int, data: Path, folder: Path = FOLDER) -> object:
    """Return the agent of a cell, trained now or read from its file."""
    path = folder / f"{task}_{method}_{seed}.safetensors"
    if method == "ppo":
        if not path.with_suffix(".npz").exists():
            learn(lambda: gym.make(find_task(task).env_id), seed, path)
        return Normalised(path)
    if not path.exists():
        log = read_log(data, task)
        name, changes = CHANGES.get(method, (method, {}))
        algorithm = offline_algorithm(name)
        config = algorithm.config_type(seed=seed, **changes)
        agent: Any = algorithm.kind(config, device="cpu")
        steps = UPDATES.get(name, 12_000)
        agent.fit(log, steps=steps, checkpoint=path.with_suffix(".checkpoint"))
        agent.save(path)
        path.with_suffix(".checkpoint").unlink()
    return load_agent(path)


def read_log(data: Path, task: str) -> OfflineDataset:
    """Read a task's log, with continuous labels where h follows from its observations.

    AntVelocity's mean speed across is known only approximately, so that its computed labels are
    corrected by the logged costs more often than those of the other tasks (in 0.14% of the states
    of the log of benchmarks/logs.py, which are 7% of its violations).
    """
    return label(OfflineDataset.load(data / f"{task}.hdf5"), task, max_disagreement=0.1)


def shield_of(task: str, seed: int, data: Path) -> Shield:
    """Return the shield of SafeFQL's critics, with the margin of the gate as its delta."""
    agent = trained(task, "safefql", seed, data)
    assert isinstance(agent, SafeFQL)
    shield = agent.shield()
    return shield.with_delta(agent.config.margin_of(agent._fitted().critics.safety))


def cell(task: str, method: str, seed: int, data: Path) -> dict[str, Any]:
    """Train, and run 20 episodes from starts that no other seed has."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    behind = method.removesuffix("-shield")
    started = time.process_time()
    agent = trained(task, behind, seed, data)
    seconds = FOLDER / f"{task}_{behind}_{seed}.seconds"
    if not seconds.exists():
        seconds.write_text(str(round(time.process_time() - started, 1)))
    shield = shield_of(task, seed, data) if method.endswith("-shield") else None
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    started = time.process_time()
    env = gym.make(find_task(task).env_id)
    run = play(env, agent, 100 + seed, episodes=EPISODES, shield=shield, num_envs=1)
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "references": dataclasses.asdict(references),
        "run": dataclasses.asdict(run),
        "training_seconds": float(seconds.read_text()),
        "playing_seconds": round(time.process_time() - started, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def kept(task: str, method: str, seed: int, compute: Callable[[], dict[str, Any]]) -> Any:  # noqa: ANN401
    """Return the stored result of a cell; compute and store it first where there is none."""
    return once(f"suites/{task}_{method}_{seed}", compute)


def run_apart(tasks: list[str], seeds: list[int], methods: list[str], data: Path) -> None:
    """Run the cells without a stored result, each in its own process."""
    for seed in seeds:
        for method in methods:
            for task in tasks:
                if (RESULTS / f"suites/{task}_{method}_{seed}.json").exists():
                    continue
                command = [sys.executable, __file__, "--data", str(data)]
                command += ["--tasks", task, "--seeds", str(seed), "--methods", method, "--here"]
                apart(command, f"{task} {method} {seed}")


def scores(tasks: list[str], seeds: list[int], methods: list[str]) -> Iterator[FieldScore]:
    """Read the cells of which all seeds have results."""
    for task in tasks:
        for method in methods:
            paths = [RESULTS / f"suites/{task}_{method}_{seed}.json" for seed in seeds]
            if not all(path.exists() for path in paths):
                continue
            rows = [kept(task, method, seed, lambda: {}) for seed in seeds]
            runs = [
                Run(
                    **{
                        **row["run"],
                        "returns": tuple(row["run"]["returns"]),
                        "costs": tuple(row["run"]["costs"]),
                    }
                )
                for row in rows
            ]
            yield FieldScore(
                policy={**NAMES, **ABLATIONS}.get(method, method),
                task=task,
                references=ReferenceReturns(**rows[0]["references"]),
                cost_limit=COST_LIMIT,
                runs=tuple(runs),
                shielded=method.endswith("-shield"),
                trained_apart=True,
            )


def costs(tasks: list[str], seeds: list[int], methods: list[str]) -> str:
    """Return the cost of each method: CPU seconds of training, memory, milliseconds a step."""
    lines = ["method                training, s    peak memory, MB"]
    for method in methods:
        rows = [
            kept(task, method, seed, lambda: {})
            for task in tasks
            for seed in seeds
            if (RESULTS / f"suites/{task}_{method}_{seed}.json").exists()
        ]
        if rows:
            seconds = np.median([row["training_seconds"] for row in rows])
            memory = max(row["peak_memory_mb"] for row in rows)
            lines.append(f"{method:20}  {seconds:10.0f}  {memory:17d}")
    return "\n".join(lines)


def main() -> None:
    """Run the cells without a stored result, and print the table."""
    # In a dict each name occurs once, although most algorithms also have a name in NAMES.
    known = {**NAMES, **ABLATIONS, **{one.name: "" for one in ALGORITHMS.values() if one.offline}}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", help="default: every log in the folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=known)
    parser.add_argument("--here", action="store_true", help="one cell, in this process")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    arguments = parser.parse_args()
    tasks = arguments.tasks or sorted(path.stem for path in arguments.data.glob("*.hdf5"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        for task in tasks:
            for method in arguments.methods:
                for seed in arguments.seeds:
                    row = kept(
                        task,
                        method,
                        seed,
                        lambda t=task, m=method, s=seed: cell(t, m, s, arguments.data),
                    )
                    mean = {key: np.mean(row["run"][key]) for key in ("returns", "costs")}
                    print(task, method, seed, mean, f"{row['training_seconds']} s", flush=True)
        return
    if not arguments.table:
        run_apart(tasks, arguments.seeds, arguments.methods, arguments.data)
    print(machine())
    print(format_scores(list(scores(tasks, arguments.seeds, arguments.methods))))
    print(costs(tasks, arguments.seeds, arguments.methods))


if __name__ == "__main__":
    main()
