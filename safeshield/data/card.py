"""What stands on a log's card: sizes, spreads, how much of it is safe, and which file it is."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import ConstraintKind, OfflineDataset
from safeshield.files.schema import json_values

DEFAULT_LIMITS = (0.0, 5.0, 10.0)
"""Cost limits of an episode: none at all, and those of the papers on DSRL's tasks."""
# The name of a class stands where an environment had no id.
_VERSIONED = re.compile(r"-v\d+$")
# DSRL names a file after its environment, the greatest cost and the number of episodes.
_DSRL_NAME = re.compile(r"(?P<env>Safe\w*-v\d+)-\d+-\d+")


@dataclass(frozen=True)
class Spread:
    """Least, quartiles and greatest of a number that each episode has, and its mean."""

    least: float
    lower: float
    """A quarter of the episodes lies at it or below (interpolated between two)."""
    median: float
    upper: float
    greatest: float
    mean: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Spread:
        """Read the spread off one number an episode.

        >>> Spread.of([0, 1, 2, 3, 4])
        Spread(least=0.0, lower=1.0, median=2.0, upper=3.0, greatest=4.0, mean=2.0)
        """
        numbers = np.asarray(values, np.float64)
        least, lower, median, upper, greatest = map(
            float, np.quantile(numbers, [0.0, 0.25, 0.5, 0.75, 1.0])
        )
        return cls(least, lower, median, upper, greatest, float(numbers.mean()))

    def __str__(self) -> str:
        return (
            f"{self.least:.6g} .. {self.greatest:.6g}, quartiles {self.lower:.6g}, "
            f"{self.median:.6g}, {self.upper:.6g}, mean {self.mean:.6g}"
        )


@dataclass(frozen=True)
class SafeEpisodes:
    """The episodes whose cost is at most a limit."""

    limit: float
    episodes: int
    share: float
    """Of all episodes."""
    best_return: float | None
    """Greatest return among them; None where there are none."""


@dataclass(frozen=True)
class DatasetCard:
    """A log in numbers; `card_of` makes one, ``safeshield inspect`` shows it."""

    file: str | None
    """Name of the file without its folder; None for a log in memory, as the next two."""
    bytes: int | None
    sha256: str | None
    env_id: str | None
    """Gymnasium id, where it was given, or provenance or DSRL's file name tells it."""
    episodes: int
    transitions: int
    observation_width: int
    """Numbers in an observation."""
    action_width: int
    observation_space: str
    action_space: str
    constraint_kind: ConstraintKind
    constraint_range: tuple[float, float]
    """Least and greatest h."""
    violating_episodes: int
    """Episodes with h > 0 at some state, the first included."""
    lengths: Spread
    """Steps."""
    returns: Spread
    """Undiscounted sum of an episode's rewards."""
    costs: Spread
    """Undiscounted sum of an episode's costs."""
    terminated_share: float
    """Share of episodes that ended by termination; the others were cut."""
    safe: tuple[SafeEpisodes, ...]
    """One entry for each cost limit, ascending."""

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON values."""
        return json_values(self)

    def __str__(self) -> str:
        low, high = self.constraint_range
        rows = [
            ("transitions", f"{self.transitions} in {self.episodes} episodes"),
            ("lengths", f"{self.lengths} steps; {self.terminated_share:.0%} end by termination"),
            ("returns", str(self.returns)),
            ("costs", str(self.costs)),
            *((f"cost <= {one.limit:g}", self._safe_text(one)) for one in self.safe),
            (
                "constraints",
                f"{self.constraint_kind}, {low:.6g} .. {high:.6g}, above 0 in "
                f"{self.violating_episodes} violating episodes",
            ),
            ("observations", f"{self.observation_width} wide, {self.observation_space}"),
            ("actions", f"{self.action_width} wide, {self.action_space}"),
        ]
        if self.env_id is not None:
            rows.insert(0, ("environment", self.env_id))
        if self.file is not None:
            rows.insert(0, ("log", f"{self.file}, {self.bytes} bytes"))
            rows.append(("sha256", str(self.sha256)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    @staticmethod
    def _safe_text(safe: SafeEpisodes) -> str:
        best = "" if safe.best_return is None else f", best return {safe.best_return:.6g}"
        return f"{safe.share:.1%} of episodes ({safe.episodes}){best}"


def card_of(
    source: OfflineDataset | str | os.PathLike[str],
    *,
    limits: Sequence[float] = DEFAULT_LIMITS,
    env_id: str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> DatasetCard:
    """Return the card of a log.

    Args:
        source: a log, or the file of one, which is then loaded.
        limits: costs of an episode up to which it counts as safe, each at least 0.
        env_id: of the environment that was logged; by default what `logged_environment` says.
        file: the file that a log given as `source` was read from: its name, size and digest go
            into the card.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole log, or a limit is negative or no number.

    >>> log = OfflineDataset.from_arrays(
    ...     observations=[[0.0], [1.0], [0.0]], actions=[[0.5], [0.5], [0.0]],
    ...     rewards=[1.0, 1.0, 0.5], next_observations=[[1.0], [2.0], [0.0]],
    ...     terminated=[False, True, False], truncated=[False, False, True], costs=[0, 1, 0],
    ... )
    >>> card = card_of(log, limits=[0])
    >>> card.safe
    (SafeEpisodes(limit=0.0, episodes=1, share=0.5, best_return=0.5),)
    """
    for limit in limits:
        if not (np.isfinite(limit) and limit >= 0.0):
            raise ValueError(f"limits must be finite costs of at least 0, got {limit}")
    if isinstance(source, OfflineDataset):
        log = source
    else:
        log, file = OfflineDataset.load(source), source
    path = None if file is None else Path(file)
    if env_id is None:
        env_id = logged_environment(log, path)
    last = log.episode_starts + log.episode_lengths - 1
    return DatasetCard(
        file=None if path is None else path.name,
        bytes=None if path is None else path.stat().st_size,
        sha256=None if path is None else file_digest(path),
        env_id=env_id,
        episodes=log.num_episodes,
        transitions=len(log),
        observation_width=log.observations.shape[1],
        action_width=log.actions.shape[1],
        observation_space=str(log.observation_space),
        action_space=str(log.action_space),
        constraint_kind=log.constraint_kind,
        constraint_range=(
            float(min(log.constraints.min(), log.next_constraints.min())),
            float(max(log.constraints.max(), log.next_constraints.max())),
        ),
        violating_episodes=int(log.violating_episodes.sum()),
        lengths=Spread.of(log.episode_lengths),
        returns=Spread.of(log.returns),
        costs=Spread.of(log.episode_costs),
        terminated_share=float(log.terminated[last].mean()),
        safe=tuple(_safe_episodes(log, float(limit)) for limit in sorted(set(limits))),
    )


def logged_environment(
    log: OfflineDataset, file: str | os.PathLike[str] | None = None
) -> str | None:
    """Return the id of the environment that was logged; None where nothing tells it.

    Args:
        log: its provenance tells it, where there is one.
        file: that it was read from: DSRL's names begin with the id.
    """
    named = (log.provenance or {}).get("environment")
    if isinstance(named, str) and _VERSIONED.search(named):
        return named
    match = None if file is None else _DSRL_NAME.fullmatch(Path(file).stem)
    return match["env"] if match else None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _safe_episodes(log: OfflineDataset, limit: float) -> SafeEpisodes:
    safe = log.episode_costs <= limit
    return SafeEpisodes(
        limit,
        int(safe.sum()),
        float(safe.mean()),
        float(log.returns[safe].max()) if safe.any() else None,
    )
