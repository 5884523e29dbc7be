"""The cells of the matrix: a method trained on a task with a seed, and its episodes.

    pip install -e ".[suites,ray]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/suites.py --data FOLDER     # the same command as benchmarks/matrix.py

The methods are this package's algorithms, PPO for reward alone, and shielded agents. A cell is
trained and then evaluated on 20 episodes by the field's protocol, twice from the same starts: as
the agent is deployed, with its noise, and deterministically. All tasks have the same configuration.
Labels are continuous where h can be computed from the observations of the log.

The shield is that of SafeFQL with the same seed, and its delta is the margin of the agent's gate.
No shield is calibrated here, so nothing is promised, and the columns are measurements only.
"""

from __future__ import annotations

import dataclasses
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield import OfflineDataset, SafeFQL, Shield
from safeshield.algorithms.registry import load_agent, offline_algorithm
from safeshield.evaluation import EPISODES, ReferenceReturns, play
from safeshield.rollouts.copies import one_per_process
from safeshield.rollouts.policies import as_batch_policy
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
"""Methods in the order in which they run, with their names in tables."""
ABLATIONS = {
    "flrp-gaussian": "FLRP, Gaussian prior",
    "flrp-cost": "FLRP, plain costs",
    "r2pac-plain": "R2PAC, no penalty",
    "r2pac-reward": "R2PAC, no V_c in unsafe states",
    "r2pac-awr": "R2PAC, weighted Gaussian actor",
    "r2pac-flow": "R2PAC, weighted flow",
    "r2pac-safety": "R2PAC, region by V_h",
    **{f"r2pac-alpha{level}": f"R2PAC, alpha {level}%" for level in (30, 50, 70)},
    **{f"r2pac-chunk{length}": f"R2PAC, chunks of {length}" for length in (1, 3, 7)},
    "flrp-jacobi": "FLRP, Jacobi",
    "flrp-interleaved": "FLRP, interleaved",
    "flrp-rho": "FLRP, rho 1",
    "safefql-one": "SafeFQL, one draw",
    "flrp-one": "FLRP, one draw",
    "safefql-teacher": "SafeFQL, best draw of the teacher",
}
"""Methods that run only when they are named, like any other registered algorithm."""
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "bc-safe": ("bc", {"episodes": "safe", "cost_limit": COST_LIMIT}),
    "flrp-gaussian": ("flrp", {"prior": "gaussian"}),
    # The gate compares with the safety values, which this ablation does without.
    "flrp-cost": ("flrp", {"feasibility": "cost", "candidates": 1}),
    "r2pac-plain": ("r2pac", {"penalise": False}),
    "r2pac-reward": ("r2pac", {"recover": False}),
    "r2pac-awr": ("r2pac", {"actor": "awr_gaussian"}),
    "r2pac-flow": ("r2pac", {"actor": "awr_flow"}),
    "r2pac-safety": ("r2pac", {"region": "safety"}),
    **{
        f"r2pac-alpha{level}": ("r2pac", {"quantile": level / 100, "cost_limit": None})
        for level in (30, 50, 70)
    },
    **{f"r2pac-chunk{length}": ("r2pac", {"chunk": length}) for length in (1, 3, 7)},
    "flrp-jacobi": ("flrp", {"order": "jacobi"}),
    "flrp-interleaved": ("flrp", {"order": "interleaved"}),
    "flrp-rho": ("flrp", {"trust_region": 1.0}),
}
"""Algorithm and changed settings of each method that does not use the defaults."""
ACTING: dict[str, tuple[str, Callable[[Any], object]]] = {
    "safefql-one": ("safefql", lambda agent: agent.with_candidates(1)),
    "flrp-one": ("flrp", lambda agent: agent.with_candidates(1)),
    "safefql-teacher": ("safefql", lambda agent: agent.acting_by("sample")),
}
"""Method whose agent is played, and the agent that acts in another way."""
NEEDS = {
    "ppo-shield": ("ppo", "safefql"),
    "bc-shield": ("bc", "safefql"),
    **{name: (behind,) for name, (behind, _) in ACTING.items()},
}
"""Methods whose agents a method uses."""
WAYS = {"deployed": False, "deterministic": True}
"""Ways to act, with the `deterministic` of ``predict``: with the agent's noise, and without it."""


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
    made: list[Callable[[], gym.Env]] = [make] * (4 if on_policy else 1)
    first = make()
    apart = one_per_process(first) and on_policy  # MetaDrive
    first.close()
    envs = VecNormalize(SubprocVecEnv(made) if apart else DummyVecEnv(made))
    settings: dict[str, Any] = {"n_steps": 512, "batch_size": 256} if on_policy else {}
    model = algorithm("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    model.learn(PPO_STEPS, callback)
    model.save(path.with_suffix(".zip"))
    seen: Any = envs.obs_rms
    # The .npz marks a complete training, so that it must not appear before it is whole.
    part = path.with_suffix(".part.npz")
    np.savez(part, mean=seen.mean, spread=np.sqrt(seen.var + envs.epsilon))
    part.replace(path.with_suffix(".npz"))
    envs.close()


def path_of(task: str, method: str, seed: int, folder: Path) -> Path:
    """Return the file of a cell's agent."""
    return folder / f"{task}_{method}_{seed}.safetensors"


def trained_as(method: str) -> str:
    """Return the method whose agent `method` plays."""
    return ACTING[method][0] if method in ACTING else method.removesuffix("-shield")


def updates_of(method: str, updates: int | None) -> int:
    """Return the number of updates of a method, or of steps of PPO; `updates` where it is given."""
    if method == "ppo":
        return PPO_STEPS
    return updates or UPDATES.get(CHANGES.get(method, (method,))[0], 12_000)


def trained(
    task: str,
    method: str,
    seed: int,
    data: Path,
    folder: Path = FOLDER,
    updates: int | None = None,
) -> object:
    """Return the agent of a cell, trained now or read from its file.

    A training that was interrupted continues from its checkpoint, except PPO's, which begins again.
    The processor seconds of a training that was not interrupted are stored beside the agent.
    """
    path, started = path_of(task, method, seed, folder), time.process_time()
    kept, checkpoint = path.with_suffix(".seconds"), path.with_suffix(".checkpoint")
    steps, resumed = updates_of(method, updates), checkpoint.exists()
    if method == "ppo":
        if not path.with_suffix(".npz").exists():
            learn(lambda: gym.make(find_task(task).env_id), seed, path)
            kept.write_text(str(round(time.process_time() - started, 1)))
        return Normalised(path)
    if not path.exists():
        log = read_log(data, task)
        name, changes = CHANGES.get(method, (method, {}))
        algorithm = offline_algorithm(name)
        config = algorithm.config_type(seed=seed, **changes)
        agent: Any = algorithm.kind(config, device="cpu")
        agent.fit(log, steps=steps, checkpoint=checkpoint)
        agent.save(path)
        checkpoint.unlink()
        if not resumed:
            kept.write_text(str(round(time.process_time() - started, 1)))
    found = load_agent(path)
    if found.updates not in (None, steps) or found.chosen is not None:
        raise ValueError(
            f"{path} must be an agent of {steps} updates, its last, got {found.updates} updates, "
            f"chosen {found.chosen}; pass the --updates of this folder, or another --folder"
        )
    return found


def read_log(data: Path, task: str) -> OfflineDataset:
    """Read a task's log, with continuous labels where h follows from its observations.

    AntVelocity's mean speed across is known only approximately, so that its computed labels are
    corrected by the logged costs more often than those of the other tasks (in 0.14% of the states
    of the log of benchmarks/logs.py, which are 7% of its violations).
    """
    return label(OfflineDataset.load(data / f"{task}.hdf5"), task, max_disagreement=0.1)


def shield_of(
    task: str, seed: int, data: Path, folder: Path = FOLDER, updates: int | None = None
) -> Shield:
    """Return the shield of SafeFQL's critics, with the margin of the gate as its delta."""
    agent = trained(task, "safefql", seed, data, folder, updates)
    assert isinstance(agent, SafeFQL)
    shield = agent.shield()
    return shield.with_delta(agent.config.margin_of(agent._fitted().critics.safety))


def cell(
    task: str,
    method: str,
    seed: int,
    data: Path,
    folder: Path = FOLDER,
    updates: int | None = None,
    episodes: int = EPISODES,
) -> dict[str, Any]:
    """Train, and run episodes from starts that no other seed has, in both ways to act."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    behind = trained_as(method)
    agent = trained(task, behind, seed, data, folder, updates)
    if method in ACTING:
        agent = ACTING[method][1](agent)
    seconds = path_of(task, behind, seed, folder).with_suffix(".seconds")
    shield = shield_of(task, seed, data, folder, updates) if method.endswith("-shield") else None
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    started = time.process_time()
    env = gym.make(find_task(task).env_id)
    played = {}
    for way, deterministic in WAYS.items():
        policy = as_batch_policy(agent, env.action_space, deterministic=deterministic)
        run = play(env, policy, 100 + seed, episodes=episodes, shield=shield, num_envs=1)
        played[way] = dataclasses.asdict(run)
    env.close()
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "updates": updates_of(behind, updates),
        "references": dataclasses.asdict(references),
        **played,
        "training_seconds": float(seconds.read_text()) if seconds.exists() else None,
        "playing_seconds": round(time.process_time() - started, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Run the matrix."""
    import matrix

    matrix.main()


if __name__ == "__main__":
    main()
