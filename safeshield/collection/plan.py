"""The plan of a collection: the arguments that must be the same for a run to be resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np

from safeshield.collection.learner import LearnerConfig
from safeshield.collection.multiplier import Multiplier
from safeshield.collection.state import STATE
from safeshield.files.atomic import written_whole
from safeshield.files.lock import LOCK
from safeshield.files.reading import read_whole, strict_json
from safeshield.files.schema import json_values, versions, whole
from safeshield.rollouts.copies import environment_name
from safeshield.spaces.generic import Env
from safeshield.spaces.rows import flat_actions
from safeshield.spaces.schema import space_to_json

PLAN = "plan.json"
_FORMAT = "safeshield-collection"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of a run that must be the same when it is resumed in its folder."""

    environment: str
    """Id of the environment, or the name of its class."""
    wrappers: tuple[str, ...]
    """Names of the wrappers around the environment, the outermost first."""
    spaces: dict[str, Any]
    """Observation and action space as JSON values."""
    limits: tuple[float | None, ...]
    """Limit of each learner on the mean cost of an episode; None for no limit."""
    seed: int
    """Seed of the run."""
    config: LearnerConfig
    """Settings of the learners."""

    @classmethod
    def of(
        cls,
        env: Env,
        limits: Sequence[float | None],
        seed: int,
        config: LearnerConfig,
    ) -> Self:
        """Return the plan of a run, after a check of its arguments.

        Args:
            env: Environment, whose name, wrappers and spaces the plan holds.
            limits: Cost limit of each learner; None for no limit.
            seed: Seed of the run.
            config: Settings of the learners.

        Raises:
            ValueError: There are no limits, a limit or the seed is out of range, or the action
                space is unbounded.
            TypeError: The seed is not a whole number.
        """
        if not limits:
            raise ValueError("limits must name at least one learner's cost limit, or None; got ()")
        seed = whole("seed", seed, least=0)
        action_codec = flat_actions(env.action_space)
        if not (np.isfinite(action_codec.low).all() and np.isfinite(action_codec.high).all()):
            raise ValueError(
                f"env's action_space must be bounded, because PPO needs bounds, got "
                f"{env.action_space}; give it the bounds of the actuators, in the environment or "
                "in a wrapper"
            )
        start, rate = config.multiplier_start, config.multiplier_rate
        checked = tuple(
            None if limit is None else Multiplier(float(limit), start, rate).limit
            for limit in limits
        )
        return cls(
            environment=environment_name(env),
            wrappers=_wrappers(env),
            spaces={
                "observation_space": space_to_json(env.observation_space),
                "action_space": space_to_json(env.action_space),
            },
            limits=checked,
            seed=seed,
            config=config,
        )

    def claim(self, folder: Path) -> None:
        """Begin a run in this folder, or check that its run has the same plan.

        The versions of the packages are added to the folder's list.

        Raises:
            ValueError: The folder belongs to another run.
        """
        path = folder / PLAN
        if not path.exists():
            self._begin(folder)
            return
        stored = _read(path)
        mine = json_values(self)
        differing = [
            f"{name} {stored['plan'].get(name)} there, {mine[name]} here"
            for name in mine
            if stored["plan"].get(name) != mine[name]
        ]
        if differing and not any(folder.glob(f"learner-*/{STATE}")):
            self._begin(folder)
        elif differing:
            raise ValueError(
                f"{folder} is of another run ({'; '.join(differing)}); use another folder, or the "
                "same arguments to resume that run"
            )
        elif versions() not in stored["versions"]:
            stored["versions"].append(versions())
            _write(path, stored)

    def _begin(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(self.limits)):
            learner_folder(folder, number).mkdir(exist_ok=True)
        content = {"format": _FORMAT, "plan": json_values(self), "versions": [versions()]}
        _write(folder / PLAN, content)


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError where `folder` exists and is neither empty nor the folder of a run."""
    if not folder.exists() or (folder / PLAN).exists():
        return
    if not folder.is_dir() or any(one.name != LOCK for one in folder.iterdir()):
        raise ValueError(
            f"{folder} must be a new or empty folder, or the folder of a run to resume, but it "
            "holds other files or is not a folder"
        )


def _wrappers(env: Env) -> tuple[str, ...]:
    names = []
    while isinstance(env, gym.Wrapper):
        names.append(type(env).__name__)
        env = env.env
    return tuple(names)


def learner_folder(folder: Path, number: int) -> Path:
    """Return the folder of the learner number `number` in the folder of a run."""
    return folder / f"learner-{number:02d}"


def _read(path: Path) -> dict[str, Any]:
    try:
        data = strict_json(read_whole(path), "it")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; begin in another folder") from error
    if data.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a plan of safeshield; use another folder")
    if not isinstance(data.get("plan"), dict) or not isinstance(data.get("versions"), list):
        raise ValueError(f"{path} is damaged: it holds no plan; begin in another folder")
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def versions_used(folder: Path) -> list[dict[str, str]]:
    """Return the versions of the packages with which the learners of a folder were run.

    There is one dict of versions by name for each combination that was used.
    """
    used: list[dict[str, str]] = _read(folder / PLAN)["versions"]
    return used
