"""Training curves: `Evaluate` plays an agent in an environment while it is trained."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safeshield.evaluation.episodes import evaluate
from safeshield.evaluation.scores import COST_LIMIT, normalised_cost
from safeshield.files.atomic import check_writable, written_whole
from safeshield.files.reading import read_whole
from safeshield.files.schema import json_values, record_from_json, whole
from safeshield.files.settings import check
from safeshield.files.tensors import read_tensors
from safeshield.rollouts.copies import check_env, spaces_of
from safeshield.spaces.generic import Env, VectorEnv
from safeshield.spaces.schema import check_same_space
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
    seeds: tuple[int, ...]
    """Seeds of starts and noise. Each has the same number of episodes."""
    deterministic: bool
    """Value of the argument `deterministic` of the agent's ``predict``."""

    @property
    def violation_rate(self) -> float:
        """Share of the episodes that violate."""
        return self.violating / self.episodes

    def rank(self, cost_limit: float) -> tuple[bool, float, float]:
        """Return a key by which points are compared: the greater one is the better agent.

        Of the agents whose mean cost is at most `cost_limit`, that of the highest return is best;
        where there is none, that of the lowest cost. Of equal returns the lower cost is better, and
        of equal costs the higher return.
        """
        within = bool(normalised_cost(self.mean_cost, cost_limit) <= 1.0)
        first, second = self.mean_return, -self.mean_cost
        return (True, first, second) if within else (False, second, first)


class Evaluate(TrainingCallback):
    """Play episodes at intervals of training, for the training curves that papers show.

    The agent plays as it is deployed: its ``predict`` draws new noise in every step, unless
    `deterministic` is set. Playing does not change the training. An evaluation takes place after
    every `every`-th update and at the end of training. Where ``fit`` has a `log_dir`, the results
    are also written to TensorBoard as play/return, play/cost and play/violation_rate.

    Args:
        env: A Gymnasium environment or a VectorEnv that reports ``info["cost"]`` or
            ``info["constraint"]``; see `evaluate`. It is played as it is: inside a wrapper that
            corrects actions, the results are those of agent and wrapper together.
        every: Number of updates between two evaluations.
        episodes: Number of episodes for each seed.
        seeds: Seeds of starts and noise. They are the same in every evaluation.
        path: File of the results, .csv or .jsonl (one JSON object a line), written anew after every
            evaluation. A training that resumes from a checkpoint reads it, and any other training
            replaces the curve that it holds; None writes no file.
        best: File of the best agent so far, .safetensors: the agent of the highest mean return
            among those whose mean cost is at most `cost_limit`, or of the lowest cost where there
            is none. The header of the file says that it was chosen with a simulator (`chosen`).
            An agent of the same algorithm that the file holds is replaced. None writes no file.
        cost_limit: Limit on the mean cost of an episode, for `best` alone; None means 10.
        deterministic: Value of the argument `deterministic` of the agent's ``predict``.
        num_envs: Number of environments that step together.

    Raises:
        TypeError: A number is not a whole number, or `deterministic` is not True or False.
        ValueError: A number is out of range, a seed occurs twice, a suffix is unknown, or
            `cost_limit` is given without `best`.
        OSError: A file cannot be written; see `files.atomic.check_writable`.

    Attributes:
        points: A `CurvePoint` for each evaluation so far, in the order in which they were made.

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
        cost_limit: float | None = None,
        deterministic: bool = False,
        num_envs: int | None = None,
    ) -> None:
        check_env(env)
        if cost_limit is not None and best is None:
            raise ValueError(
                f"cost_limit={cost_limit!r} needs best, because only the choice of the best agent "
                "uses it; pass best, or leave out cost_limit"
            )
        self._limit = COST_LIMIT if cost_limit is None else cost_limit
        normalised_cost(0.0, self._limit)
        self.every = whole("every", every, least=1)
        self.points: list[CurvePoint] = []
        self._env, self._episodes = env, whole("episodes", episodes, least=1)
        given = list(seeds) if isinstance(seeds, range) else seeds
        self._seeds: tuple[int, ...] = check("seeds", tuple[int, ...], given)
        for seed in self._seeds:
            whole("each of seeds", seed, least=0)
        if not self._seeds or len(set(self._seeds)) != len(self._seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
        self._path = _checked(path, "path", (".csv", ".jsonl"))
        self._best = _checked(best, "best", (".safetensors",))
        self._deterministic: bool = check("deterministic", bool, deterministic)
        self._num_envs = num_envs

    def writes(self) -> Mapping[str, Path]:
        """Return the files of the results and of the best agent, where they are written."""
        files = {"path": self._path, "best": self._best}
        return {name: path for name, path in files.items() if path is not None}

    def on_start(self, step: TrainingStep) -> None:
        """Check environment and files; forget other trainings and what follows the checkpoint.

        Raises:
            ValueError: The spaces of the environment are not those of the agent; a file holds
                something else than results or an agent of this algorithm; or the training resumes
                and the earlier results are lost, although `best` is given, or were found with
                other seeds, episodes or `deterministic`.
        """
        for name, known, own in zip(
            ("observation_space", "action_space"),
            (step.agent.observation_space, step.agent.action_space),
            spaces_of(self._env),
            strict=True,
        ):
            check_same_space(
                known, own, f"{name} of the env of Evaluate",
                unbounded_matches_any=name == "observation_space",
            )  # fmt: skip
        if self._best is not None and self._best.exists():
            _check_agent(self._best, step.agent.file_format)
        stored = read_curve(self._path) if self._path is not None and self._path.exists() else []
        if not self.points and step.step:
            self.points = stored
        self.points = [point for point in self.points if point.step <= step.step]
        for point in self.points:
            self._check_settings(point)
        if self._best is not None and not self.points and step.step >= self.every:
            raise ValueError(
                f"the training resumes at update {step.step} and the results of its earlier "
                "evaluations are not known, so the best agent cannot be chosen: pass the path of "
                "their file, or leave out best"
            )

    def _check_settings(self, point: CurvePoint) -> None:
        own = {
            "seeds": self._seeds,
            "episodes": self._episodes * len(self._seeds),
            "deterministic": self._deterministic,
        }
        for name, value in own.items():
            stored = getattr(point, name)
            if stored != value:
                of = f"{name} of all seeds together" if name == "episodes" else name
                raise ValueError(
                    f"{of} of Evaluate must be {stored!r}, as in the earlier results in "
                    f"{self._path}, because the training resumes and one file holds results of "
                    f"one kind, got {value!r}; use the same {name}, or another path"
                )

    def on_step(self, step: TrainingStep) -> None:
        """Play the present agent, and store and write the results."""
        agent, point = step.agent, self._play(step)
        ranks = [one.rank(self._limit) for one in self.points]
        self.points.append(point)
        if self._best is not None and point.rank(self._limit) > max(
            ranks, default=(False, -np.inf, -np.inf)
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
            seeds=self._seeds,
            deterministic=self._deterministic,
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
        # All columns but the phase are JSON.
        table.writerows(
            {key: value if key == "phase" else json.dumps(value) for key, value in row.items()}
            for row in rows
        )


def read_curve(path: str | os.PathLike[str]) -> list[CurvePoint]:
    """Return the points in a file that `write_curve` or `Evaluate` wrote.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The suffix is unknown, or the file is damaged.
    """
    path = _suffixed(Path(path), "path", (".csv", ".jsonl"))
    try:
        with io.StringIO(read_whole(path).decode(), newline="") as stream:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in stream]
            else:
                table = csv.DictReader(stream, strict=True)
                names = [field.name for field in dataclasses.fields(CurvePoint)]
                if table.fieldnames is not None and set(table.fieldnames) != set(names):
                    raise ValueError(f"the columns must be {names}, got {list(table.fieldnames)}")
                rows = [
                    {key: text if key == "phase" else json.loads(text) for key, text in row.items()}
                    for row in table
                ]
        return [record_from_json(CurvePoint, row, "point of a training curve") for row in rows]
    except (RecursionError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a training curve: {error}; remove the file, or give another path"
        ) from error


def _check_agent(path: Path, file_format: str) -> None:
    """Check that the file `path` holds an agent of this format, which may then be replaced."""
    try:
        read_tensors(path, file_format)
    except ValueError as error:
        raise ValueError(
            f"best of Evaluate would replace {path}, which holds no agent of this algorithm: "
            f"{error}; remove the file, or give another name"
        ) from error


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
