"""Training curves: `Evaluate` plays an agent in an environment while it is trained."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safeshield.evaluation.episodes import evaluate
from safeshield.evaluation.scores import COST_LIMIT, normalised_cost
from safeshield.files.atomic import check_writable, written_whole
from safeshield.files.schema import json_values, record_from_json, whole
from safeshield.rollouts.copies import check_env
from safeshield.spaces.generic import Env, VectorEnv
from safeshield.training.callbacks import TrainingCallback, TrainingStep

CHOSEN = "with a simulator"
"""Entry `chosen` in the file of an agent that was chosen by its episodes."""


@dataclass(frozen=True)
class CurvePoint:
    """Results of the episodes of one agent during its training."""

    step: int
    """Number of updates made."""
    phase: str
    """Name of the phase of training."""
    episodes: int
    """N, the number of episodes of all seeds together."""
    mean_return: float
    """Mean over the episodes of the undiscounted sum of rewards."""
    mean_cost: float
    """Mean over the episodes of the summed costs, as in `Evaluation`."""
    violating: int
    """Number of episodes with h > 0 (or cost > 0) in any state."""

    @property
    def violation_rate(self) -> float:
        """Share of the episodes that violate."""
        return self.violating / self.episodes

    def rank(self, cost_limit: float) -> tuple[bool, float]:
        """Return a key by which points are compared: the greater one is the better agent.

        Of the agents whose mean cost is at most `cost_limit`, that of the highest return is best;
        where there is none, that of the lowest cost.
        """
        within = bool(normalised_cost(self.mean_cost, cost_limit) <= 1.0)
        return within, self.mean_return if within else -self.mean_cost


class Evaluate(TrainingCallback):
    """Play episodes at intervals of training, for the training curves that papers show.

    The agent plays as it is deployed: its ``predict`` draws new noise in every step, unless
    `deterministic` is set. Playing does not change the training. An evaluation takes place after
    every `every`-th update and at the end of training. Where ``fit`` has a `log_dir`, the results
    are also written to TensorBoard as play/return, play/cost and play/violation_rate.

    Args:
        env: A Gymnasium environment or a VectorEnv that reports ``info["cost"]`` or
            ``info["constraint"]``; see `evaluate`.
        every: Number of updates between two evaluations.
        episodes: Number of episodes for each seed.
        seeds: Seeds of starts and noise. They are the same in every evaluation.
        path: File of the results, .csv or .jsonl (one JSON object a line), written anew after every
            evaluation. A training that resumes from a checkpoint reads it; None writes no file.
        best: File of the best agent so far, .safetensors: the agent of the highest mean return
            among those whose mean cost is at most `cost_limit`, or of the lowest cost where there
            is none. The header of the file says that it was chosen with a simulator (`chosen`).
            None writes no file.
        cost_limit: Limit on the mean cost of an episode, for `best`.
        deterministic: The `deterministic` with which the agent's ``predict`` is called.
        num_envs: Number of environments that step together.

    Raises:
        TypeError: A number is not a whole number.
        ValueError: A number is out of range, a seed occurs twice, or a suffix is unknown.
        OSError: A file cannot be written; see `files.atomic.check_writable`.

    Attributes:
        points: Results in the order of the updates, each a `CurvePoint`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import ShieldTrainer, collect
    >>> env = gymnasium.make("safeshield/Boat-v0")
    >>> curve = Evaluate(env, every=20, episodes=2)
    >>> trainer = ShieldTrainer().fit(collect(env, "random", 20, seed=0), 30, callbacks=[curve])
    >>> [(point.step, point.episodes) for point in curve.points]
    [(20, 2), (30, 2)]
    """

    def __init__(
        self,
        env: Env | VectorEnv,
        every: int = 10_000,
        episodes: int = 20,
        seeds: Sequence[int] = (0,),
        *,
        path: str | os.PathLike[str] | None = None,
        best: str | os.PathLike[str] | None = None,
        cost_limit: float = COST_LIMIT,
        deterministic: bool = False,
        num_envs: int | None = None,
    ) -> None:
        check_env(env)
        normalised_cost(0.0, cost_limit)
        self.every = whole("every", every, least=1)
        self.points: list[CurvePoint] = []
        self._env, self._episodes = env, whole("episodes", episodes, least=1)
        self._seeds = [whole("each of seeds", seed, least=0) for seed in seeds]
        if not self._seeds or len(set(self._seeds)) != len(self._seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
        self._path = _checked(path, "path", (".csv", ".jsonl"))
        self._best = _checked(best, "best", (".safetensors",))
        self._limit, self._deterministic = cost_limit, deterministic
        self._num_envs = num_envs

    def on_start(self, step: TrainingStep) -> None:
        """Forget the results of another training, and those after the checkpoint.

        Raises:
            ValueError: The training resumes, `best` is given, and the earlier results are lost; or
                the file of the results is damaged.
        """
        if not self.points and self._path is not None and step.step and self._path.exists():
            self.points = read_curve(self._path)
        self.points = [point for point in self.points if point.step <= step.step]
        if self._best is not None and not self.points and step.step >= self.every:
            raise ValueError(
                f"the training resumes at update {step.step} and the results of its earlier "
                "evaluations are not known, so the best agent cannot be chosen: pass the path of "
                "their file, or leave out best"
            )

    def on_step(self, step: TrainingStep) -> None:
        """Play the present agent, and store and write the results."""
        agent, point = step.agent, self._play(step)
        ranks = [one.rank(self._limit) for one in self.points]
        self.points.append(point)
        if self._best is not None and point.rank(self._limit) > max(
            ranks, default=(False, -np.inf)
        ):
            agent.chosen = CHOSEN
            agent.save(self._best)
        if self._path is not None:
            write_curve(self._path, self.points)
        values = {
            "return": point.mean_return,
            "cost": point.mean_cost,
            "violation_rate": point.violation_rate,
        }
        step.log({f"play/{name}": value for name, value in values.items()})

    def on_end(self, step: TrainingStep) -> None:
        """Play the last agent, unless it has been played."""
        if not self.points or self.points[-1].step < step.step:
            self.on_step(step)

    def _play(self, step: TrainingStep) -> CurvePoint:
        results = [
            evaluate(
                self._env,
                step.agent,
                self._episodes,
                seed,
                num_envs=self._num_envs,
                deterministic=self._deterministic,
            )
            for seed in self._seeds
        ]
        return CurvePoint(
            step=step.step,
            phase=step.phase,
            episodes=sum(one.episodes for one in results),
            mean_return=float(np.mean([one.mean_return for one in results])),
            mean_cost=float(np.mean([one.mean_cost for one in results])),
            violating=sum(one.violating for one in results),
        )


def write_curve(path: str | os.PathLike[str], points: Iterable[CurvePoint]) -> None:
    """Write points to the file `path`, .csv or .jsonl, in place of what it held.

    Raises:
        ValueError: The suffix is unknown.
        OSError: The file cannot be written; see `files.atomic.check_writable`.
    """
    path = _suffixed(Path(path), "path", (".csv", ".jsonl"))
    rows = [json_values(point) for point in points]
    with written_whole(path) as part, part.open("w", newline="") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
            return
        names = [field.name for field in dataclasses.fields(CurvePoint)]
        table = csv.DictWriter(stream, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_curve(path: str | os.PathLike[str]) -> list[CurvePoint]:
    """Return the points in a file that `write_curve` or `Evaluate` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is unknown, or the file is damaged.
    """
    path = _suffixed(Path(path), "path", (".csv", ".jsonl"))
    try:
        with path.open(newline="") as stream:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in stream]
            else:
                # All columns but the phase are JSON numbers.
                rows = [
                    {key: text if key == "phase" else json.loads(text) for key, text in row.items()}
                    for row in csv.DictReader(stream, strict=True)
                ]
        return [record_from_json(CurvePoint, row, "point of a training curve") for row in rows]
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a training curve: {error}") from error


def _checked(
    path: str | os.PathLike[str] | None, name: str, suffixes: tuple[str, ...]
) -> Path | None:
    if path is None:
        return None
    check_writable(_suffixed(Path(path), name, suffixes))
    return Path(path)


def _suffixed(path: Path, name: str, suffixes: tuple[str, ...]) -> Path:
    if path.suffix not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got {path}")
    return path
