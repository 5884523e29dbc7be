"""The stages of the demonstration, from a log with reckless trips to a calibrated shield.

The demonstration logs trips of the boat, learns a shield from the log alone, calibrates it, and
evaluates four agents from the same certified starts, with the shield and without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.algorithms.shield_trainer import ShieldTrainer
from safeshield.calibration.calibrate import start_observations
from safeshield.calibration.proposers import Adversary
from safeshield.collection.learner import one_thread
from safeshield.data.collect import collect
from safeshield.data.dataset import OfflineDataset
from safeshield.demo.helmsmen import Helmsmen
from safeshield.demo.settings import ENVIRONMENT, DemoConfig
from safeshield.evaluation.episodes import (
    Evaluation,
    UnshieldedAdversary,
    draw_episodes,
    summarise,
)
from safeshield.evaluation.tables import format_table
from safeshield.exact.boat import boat_value
from safeshield.files.schema import versions
from safeshield.rollouts.recorded import Episode
from safeshield.rollouts.workers import threads_each
from safeshield.shield.shield import Shield

if TYPE_CHECKING:
    from safeshield.exact.boat import GridValue

AGENTS = ("straight to goal", "random", "adversary", "PPO")
PICTURED = ("PPO", "adversary")
LOG, SHIELD, TABLE = "boat.hdf5", "boat.safetensors", "table.json"
_PPO = "ppo.zip"
_STARTS = 2000
_PARTS = 4
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """The results of a demonstration, which prints `table` and `promise` at its end."""

    shield: Shield
    """The calibrated shield."""
    evaluations: list[Evaluation]
    """Results of each agent, with and without the shield."""
    seconds: dict[str, float]
    """Duration of each stage, seconds."""
    folder: Path
    """Folder with the files of the demonstration."""

    @property
    def table(self) -> str:
        """Table of the results of all agents, with and without the shield."""
        return format_table(self.evaluations)

    @property
    def promise(self) -> str:
        """The promise of the calibration record, or an empty string without one."""
        return "" if self.shield.record is None else self.shield.record.promise


@dataclass
class _Stages:
    """Reports each stage when it starts and ends, and records its duration."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, doing: str) -> Iterator[None]:
        self.say(f"{doing} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.say(f"    {self.seconds[name]:.1f} s")


def run_demo(
    folder: str | os.PathLike[str],
    config: DemoConfig | None = None,
    *,
    say: Say = print,
    progress_bar: bool = True,
) -> DemoResult:
    """Run every stage and write log, shield, table and pictures into `folder`.

    PPO is trained and episodes are run in other processes, so a script must call this function
    below ``if __name__ == "__main__":``.

    Args:
        folder: Folder to write to, which is created where it does not exist.
        config: Settings of the demonstration; None stands for the defaults.
        say: Function that receives the lines of progress.
        progress_bar: Whether a progress bar is shown during training.

    Returns:
        What was made and measured.

    Raises:
        CalibrationError: No threshold passes the test for the requested promise.
    """
    config = config or DemoConfig()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = _Stages(say)
    env = gym.make(ENVIRONMENT)
    with threads_each(), _pool(config) as pool:
        # Learning uses one core, so work that does not depend on it runs in parallel.
        ppo = pool.submit(_train_ppo, str(folder / _PPO), config.ppo_steps, config.seed)
        exact = pool.submit(boat_value, refine=config.grid_refinement)
        with stages("collect", f"Logging {config.trips} trips of reckless helmsmen"):
            log = collect(env, Helmsmen(), config.trips, config.seed)
            log.save(folder / LOG)
        say(f"    {len(log):,} steps; {log.violating_episodes.mean():.0%} of the trips hit a rock")
        with stages("train", f"Learning a shield from the log: {config.steps:,} updates"):
            shield = _train(log, config, progress_bar)
        wanted = f"at most {config.epsilon:g} violations an episode, confidence {config.confidence}"
        with stages("calibrate", f"Calibrating: {wanted}"):
            shield, starts = _calibrate(shield, env, config)
            shield.save(folder / SHIELD)
        with stages("wait for PPO", "Waiting for PPO, which trains beside it for reward alone"):
            ppo.result()
        count = config.evaluation_episodes
        with stages("evaluate", f"{len(AGENTS)} agents, with and without the shield, {count} each"):
            results = _evaluate(pool, folder, config)
        with stages("pictures", "Drawing"):
            trips = _trips(pool, folder, config)
            _draw(folder, shield, starts, exact, trips)
    result = DemoResult(shield, results, stages.seconds, folder)
    text = json.dumps(_report(result, config), indent=2, allow_nan=False)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    return result


def hardware() -> str:
    """Return the processor, the number of cores and the operating system as one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


# Networks this small gain nothing from a second thread, and PPO needs the other core.
@one_thread()
def _train(log: OfflineDataset, config: DemoConfig, progress_bar: bool) -> Shield:
    training = dataclasses.replace(config.training, seed=config.seed)
    trainer = ShieldTrainer(training, device="cpu")
    return trainer.fit(log, config.steps, progress_bar=progress_bar).shield()


def _calibrate(
    shield: Shield, env: gym.Env[Any, Any], config: DemoConfig
) -> tuple[Shield, npt.NDArray[np.float32]]:
    """Return the calibrated shield, and starts for its picture."""
    starts = start_observations(shield, env, _STARTS, config.seed)
    calibrated = shield.calibrate(
        env,
        epsilon=config.epsilon,
        confidence=config.confidence,
        seed=config.seed,
    )
    return calibrated, starts


def _policy(name: str, folder: Path, shield: Shield, shielded: bool) -> object:
    if name == "random":
        return "random"
    if name == "adversary":
        return Adversary(shield) if shielded else UnshieldedAdversary(shield)
    from stable_baselines3 import PPO

    from safeshield.demo.agents import straight

    return straight if name == "straight to goal" else PPO.load(folder / _PPO, device="cpu")


def _episodes(
    folder: Path, name: str, shielded: bool, episodes: int, seed: int
) -> tuple[list[Episode], float]:
    """Return episodes from certified starts and the share of starts that are certified.

    This function runs in a worker process.
    """
    shield = Shield.load(folder / SHIELD)
    runs, share = draw_episodes(
        gym.make(ENVIRONMENT),
        _policy(name, folder, shield, shielded),
        episodes,
        seed,
        shield=shield if shielded else None,
        judge=shield,
    )
    return runs, share or 0.0


def _evaluate(pool: ProcessPoolExecutor, folder: Path, config: DemoConfig) -> list[Evaluation]:
    order = [(name, shielded) for name in AGENTS for shielded in (False, True)]
    # The slowest jobs start first, so that the processes finish at about the same time.
    slowest_first = sorted(order, key=lambda job: (job[0] != "adversary", not job[1]))
    # These seeds give starts that the calibration has not seen. The episodes are split into parts,
    # so that all processes have work. The number of parts is fixed, so that the result does not
    # depend on the number of processes.
    seeds = [10 * config.seed + part + 1 for part in range(_PARTS)]
    counts = [len(part) for part in np.array_split(np.arange(config.evaluation_episodes), _PARTS)]
    jobs = {
        job: [
            pool.submit(_episodes, folder, *job, count, seed)
            for count, seed in zip(counts, seeds, strict=True)
        ]
        for job in slowest_first
    }
    results = []
    for job in order:
        parts = [part.result() for part in jobs[job]]
        results.append(
            summarise(
                [run for runs, _ in parts for run in runs],
                policy=job[0],
                environment=ENVIRONMENT,
                start_share=float(np.mean([share for _, share in parts])),
                seed=config.seed,
            )
        )
    return results


def _trips(
    pool: ProcessPoolExecutor, folder: Path, config: DemoConfig
) -> dict[tuple[str, bool], list[Episode]]:
    jobs = {
        (name, shielded): pool.submit(
            _episodes, folder, name, shielded, config.pictured_trips, 10 * config.seed + _PARTS + 1
        )
        for name in PICTURED
        for shielded in (False, True)
    }
    return {job: future.result()[0] for job, future in jobs.items()}


def _draw(
    folder: Path,
    shield: Shield,
    starts: npt.NDArray[np.float32],
    exact: Future[GridValue],
    trips: dict[tuple[str, bool], list[Episode]],
) -> None:
    from safeshield.demo import pictures
    from safeshield.reporting.calibration_picture import draw_calibration

    pictures.safe_set(folder / "safe-set.png", shield, exact.result())
    pictures.trips(folder / "trips.png", shield, exact.result(), trips)
    draw_calibration(folder / "calibration.png", shield, starts, unit="m")


@one_thread()
def _train_ppo(path: str, steps: int, seed: int) -> None:
    from safeshield.demo.agents import train_ppo

    train_ppo(path, steps, seed)


def _report(result: DemoResult, config: DemoConfig) -> dict[str, Any]:
    record = result.shield.record
    return {
        "promise": result.promise,
        "evaluations": [one.to_json() for one in result.evaluations],
        "record": None if record is None else record.to_json(),
        "seconds": {name: round(seconds, 2) for name, seconds in result.seconds.items()},
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "hardware": hardware(),
    }


def _pool(config: DemoConfig) -> ProcessPoolExecutor:
    workers = config.workers or min(os.cpu_count() or 1, 8)
    # Processes are spawned, because PyTorch's threads do not survive a fork.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
