"""The file of ``safeshield sweep``: what is trained and what is reported.

`Plan` is the file; `Job` is one of the trainings that it asks for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

from safeshield.cli.settings import known_settings, preset_settings, read_settings, text_of
from safeshield.data.card import file_digest
from safeshield.files.settings import (
    NonNegative,
    PositiveInt,
    Rule,
    Settings,
    fields_of,
)

if TYPE_CHECKING:
    from safeshield.training.registry import Algorithm

SCORES = ("normalised_return", "normalised_cost", "violation_rate")
"""Figures of the evaluation that are reported where the file names no others."""
EVALUATED = (*SCORES, "mean_return", "mean_cost", "intervention_rate")
"""All figures of an evaluation. The last one needs a shield, and so an entry `policy`."""


def _different(items: tuple[Any, ...]) -> bool:
    return len(set(items)) == len(items)


def _each_once(items: tuple[Any, ...]) -> bool:
    return len(items) > 0 and _different(items)


_Logs = Annotated[
    tuple[str, ...],
    Rule("be a list of at least one log file, each once", _each_once, tells_kind=True),
]
_Seeds = Annotated[
    tuple[int, ...],
    Rule(
        "be a list of at least one whole number of at least 0, each once",
        lambda seeds: _each_once(seeds) and min(seeds) >= 0,
        tells_kind=True,
    ),
]
_Names = Annotated[
    tuple[str, ...],
    Rule("be a list of names of figures, each once", _different, tells_kind=True),
]


@dataclass(frozen=True)
class Range(Settings):
    """A range that a search draws a setting from."""

    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Whether the logarithm is drawn evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low:g}")


class Job(NamedTuple):
    """One training and its evaluation."""

    point: dict[str, Any]
    """The varied settings, by name."""
    seed: int
    log: str
    """Log as the file of the sweep names it."""
    config: Any
    """All settings of the algorithm."""
    folder: Path
    """Folder of what the training writes."""

    def __str__(self) -> str:
        names = [f"{name}={short(value)}" for name, value in self.point.items()]
        return ", ".join([*names, f"seed={self.seed}", Path(self.log).name])


def short(value: object) -> str:
    """Return the value of a setting as text for a table, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else text_of(value)


@dataclass(frozen=True)
class Plan(Settings):
    """Settings of a sweep, which its file holds."""

    algorithm: str = "safefql"
    """Algorithm, as ``safeshield train --algorithm`` takes it."""
    preset: str | None = None
    """Named settings of the algorithm to start from."""
    steps: PositiveInt = 100_000
    """Updates of each training."""
    logs: _Logs = ()
    """Files of the logs. A relative path starts at the folder of the sweep's file."""
    seeds: _Seeds = (0,)
    """Seeds. Each setting is trained on each log with each seed."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the algorithm that are the same in all trainings."""
    vary: dict[str, Any] = field(default_factory=dict)
    """Settings that vary, by name: a list of values, or a range {low, high, log}."""
    trials: PositiveInt | None = None
    """Number of settings that a search tries. None trains all combinations of the lists."""
    env: str | None = None
    """Environment in which each agent is evaluated by the field's protocol: id or module:id."""
    policy: str | None = None
    """Policy that proposes actions to the shield of each agent: random, adversary or a file. None
    lets the agent act without a shield."""
    episodes: PositiveInt = 20
    """Episodes of each evaluation."""
    cost_limit: NonNegative = 10.0
    """Limit on the summed cost of an episode."""
    report: _Names = ()
    """Figures of the printed table and of the picture: figures of the evaluation, or metrics of the
    training, by their names in TensorBoard, which must have a slash where env is given. By default
    they are the return, cost and violation rate of the evaluation. Without one the picture shows
    all metrics of the training."""
    gpus: NonNegative = 0.0
    """GPUs that a training takes, such as 0.25 where four share one. 0 trains on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = {"policy": self.policy, "trials": self.trials}
        for name, value in needs.items():
            if value is not None and self.env is None:
                why = "a search compares returns and costs" if name == "trials" else "it acts there"
                raise ValueError(f"{name} {value} needs an environment ({why}): add env")
        self._check_report()
        if self.policy is not None and not hasattr(self.kind.kind, "shield"):
            raise ValueError(
                f"policy {self.policy} needs an algorithm that learns a shield, got "
                f"{self.algorithm}: leave out policy, so that the agent acts itself"
            )
        ranges = [name for name, values in self.vary.items() if isinstance(values, dict)]
        if ranges and self.trials is None:
            raise ValueError(
                f"vary.{ranges[0]} is a range, which needs a search: add trials, the number of "
                "settings to try, or give a list of values"
            )
        if self.trials is not None and not self.vary:
            raise ValueError(f"trials {self.trials} needs settings to try: add the table vary")
        for name, values in self.vary.items():
            self._check_values(name, values)
        for table, names in (("settings", self.settings), ("vary", self.vary)):
            if "seed" in names:
                raise ValueError(f"{table}.seed: list the seeds as seeds, got {names['seed']}")
        twice = sorted(set(self.settings) & set(self.vary))
        if twice:
            raise ValueError(f"{twice[0]} is in settings and in vary: leave it in one of them")
        for name in self.vary:
            told = [digest(dataclasses.asdict(self.config(one, 0))) for one in self._edges(name)]
            if not _different(tuple(told)):
                raise ValueError(f"vary.{name} must list each value once, got {self.vary[name]}")
        for point in self.grid() if self.trials is None else ():
            self.config(point, 0)

    def _check_report(self) -> None:
        """Check the reported figures as far as they are known before a training."""
        known = EVALUATED if self.policy is not None else EVALUATED[:-1]
        for name in self.report:
            if self.env is None and name in EVALUATED:
                raise ValueError(f"report {name} needs an environment, where it is found: add env")
            if self.env is not None and name == "intervention_rate" and self.policy is None:
                raise ValueError(f"report {name} needs a shielded policy: add policy")
            # The names of metrics have a slash. Which there are is known after a training.
            if self.env is not None and "/" not in name and name not in known:
                raise ValueError(
                    f"report must name figures of the evaluation, {', '.join(known)}, or metrics "
                    f"of the training, whose names have a slash, got '{name}'"
                )

    def _check_values(self, name: str, values: object) -> None:
        if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            try:
                Range(**values)
            except ValueError as error:
                raise ValueError(f"vary.{name}: {error}") from error
        elif not isinstance(values, list | tuple) or not values:
            raise ValueError(
                f"vary.{name} must be a list of at least one value, or a range "
                f"{{low = ..., high = ..., log = true}}, got {values}"
            )

    @property
    def kind(self) -> Algorithm:
        """The algorithm."""
        from safeshield.algorithms.registry import offline_algorithm

        return offline_algorithm(self.algorithm, "algorithm")

    def config(self, point: dict[str, Any], seed: int) -> Any:  # noqa: ANN401
        """Return the configuration of the algorithm at a point of the sweep.

        Args:
            point: The varied settings, by name.
            seed: Seed of the training.

        Raises:
            ValueError: A setting is unknown or breaks its rule.
        """
        kind = self.kind.config_type
        fixed = known_settings("settings", self.settings, kind, without=("seed",))
        varied = known_settings("vary", point, kind, without=("seed",))
        preset = preset_settings("preset", self.preset, self.kind)
        return kind(**{**preset, **fixed, **varied, "seed": seed})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield all combinations of the listed values."""
        for values in itertools.product(*self.vary.values()):
            yield dict(zip(self.vary, values, strict=True))

    def _edges(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield points with each value of a varied setting, the ends of a range, others alike."""
        tried = {
            other: [values["low"], values["high"]] if isinstance(values, dict) else values
            for other, values in self.vary.items()
        }
        for value in tried[name]:
            yield {other: values[0] for other, values in tried.items()} | {name: value}

    def whole(self, name: str) -> bool:
        """Whether a varied setting is a whole number."""
        kinds = {field.name: field.kind for field in fields_of(self.kind.config_type)}
        return int in (kinds[name], *get_args(kinds[name]))

    def jobs(self, point: dict[str, Any], folder: Path, contents: Mapping[str, str]) -> list[Job]:
        """Return the trainings at a point of the sweep, one for each log and seed.

        A training keeps its folder as long as the algorithm, the steps, the content of the log and
        all settings are the same, so that it is not repeated when the sweep grows.

        Args:
            point: The varied settings, by name.
            folder: Folder of the sweep.
            contents: Digest of each log, as `log_contents` returns them.
        """
        jobs = []
        for log, seed in itertools.product(self.logs, self.seeds):
            config = self.config(point, seed)
            place = Job(point, seed, log, config, folder)
            identity = [self.algorithm, self.steps, contents[log], dataclasses.asdict(config)]
            label = re.sub(r"[^\w.=,-]", "", str(place))[:100]
            jobs.append(place._replace(folder=folder / "runs" / f"{label}-{digest(identity)}"))
        return jobs

    @property
    def evaluation(self) -> dict[str, Any]:
        """Entries of the file on which the figures of a trained agent depend, as JSON values."""
        names = ("env", "policy", "episodes", "cost_limit") if self.env is not None else ()
        return {name: getattr(self, name) for name in names}


def digest(value: object) -> str:
    """Return eight hexadecimal digits of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def read_plan(path: Path) -> Plan:
    """Return the sweep in a TOML or YAML file.

    Raises:
        FileNotFoundError: The file or a log does not exist.
        ValueError: An entry is unknown, breaks its rule or would have no effect; the message names
            the file.
    """
    try:
        entries = read_settings(path, Plan)
        for name in ("episodes", "cost_limit"):
            if name in entries and entries.get("env") is None:
                raise ValueError(
                    f"{name} {entries[name]} needs an environment (agents are evaluated there): "
                    f"add env, or leave out {name}"
                )
        plan = Plan(**entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace(f"{path}: {path}", str(path))) from error
    missing = [log for log in plan.logs if not (path.parent / log).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: logs: no such file: {missing[0]}; a relative path starts at {path.parent}"
        )
    return plan


def log_contents(path: Path, plan: Plan) -> dict[str, str]:
    """Return the SHA-256 digest of each log's file, by the name that the sweep's file gives it.

    Args:
        path: File of the sweep.
        plan: The sweep.

    Raises:
        ValueError: Two of the logs hold the same; the message names the file.
    """
    names: dict[str, str] = {}
    for log in plan.logs:
        content = file_digest(path.parent / log)
        if content in names:
            raise ValueError(
                f"{path}: logs must be a list of at least one log file, each once, but "
                f"{names[content]} and {log} hold the same: leave one of them out"
            )
        names[content] = log
    return {log: content for content, log in names.items()}
