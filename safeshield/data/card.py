"""A summary card of a log: sizes, spreads, the share of safe episodes and the file."""

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

from safeshield.data.dataset import ConstraintKind, OfflineDataset, contents_of
from safeshield.files.reading import opened
from safeshield.files.schema import json_values

CONTENTS_TEXTS = {
    "verified": "verified: they have the SHA-256 digest that the file names",
    "unverified": "unverified: the file names no digest of its contents",
    "in memory": "in memory",
}
DEFAULT_LIMITS = (0.0, 5.0, 10.0)
"""Cost limits of an episode: 0, and the limits that papers on DSRL's tasks use."""
# An id ends in a version. Where an environment has no id, provenance holds the name of its class.
_VERSIONED = re.compile(r"-v\d+$")
# DSRL's file names consist of the environment, the greatest cost and the number of episodes.
_DSRL_NAME = re.compile(r"(?P<env>Safe\w*-v\d+)-\d+-\d+")


@dataclass(frozen=True)
class Spread:
    """Minimum, quartiles, maximum and mean over episodes of one quantity."""

    least: float
    """Minimum."""
    lower: float
    """Lower quartile, interpolated between two episodes."""
    median: float
    """Median, interpolated likewise."""
    upper: float
    """Upper quartile, interpolated likewise."""
    greatest: float
    """Maximum."""
    mean: float
    """Mean over the episodes."""

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Spread:
        """Return the spread of values (E,), one for each episode.

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
    """Counts of the episodes whose cost is at most a limit."""

    limit: float
    """Limit on the summed cost of an episode."""
    episodes: int
    """Number of episodes within the limit."""
    share: float
    """Share of all episodes that are within the limit."""
    best_return: float | None
    """Greatest return of an episode within the limit; None where there is no such episode."""


@dataclass(frozen=True)
class DatasetCard:
    """The numbers that describe a log. `card_of` makes a card, ``safeshield inspect`` prints it."""

    file: str | None
    """Name of the file without its folder; None for a log in memory."""
    bytes: int | None
    """Size of the file in bytes; None for a log in memory."""
    sha256: str | None
    """SHA-256 digest of the file in hexadecimal; None for a log in memory."""
    contents: str
    """"verified" where the file names the digest of its contents, "unverified" where it names none,
    as files of others; "in memory" for a log that no file held."""
    env_id: str | None
    """Gymnasium id of the logged environment, from the argument, the provenance or DSRL's file
    name; None where it is unknown."""
    episodes: int
    """Number of episodes."""
    transitions: int
    """Number of transitions."""
    observation_width: int
    """Number of columns of an observation row."""
    action_width: int
    """Number of columns of an action row."""
    observation_space: str
    """Observation space as text."""
    action_space: str
    """Action space as text."""
    constraint_kind: ConstraintKind
    """"continuous" or "binary"."""
    constraint_source: str | None
    """Name of the function that gives h, with the units of several constraints; None where it is
    not known."""
    constraint_range: tuple[float, float]
    """Least and greatest h, in units of h."""
    violating_episodes: int
    """Number of episodes with h > 0 in some state, the first state included."""
    lengths: Spread
    """Number of steps of the episodes."""
    returns: Spread
    """Undiscounted sum of the rewards of the episodes."""
    costs: Spread
    """Undiscounted sum of the costs of the episodes."""
    terminated_share: float
    """Share of the episodes that ended by termination. The others were truncated."""
    safe: tuple[SafeEpisodes, ...]
    """One entry for each cost limit, in ascending order."""

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
        if self.constraint_source is not None:
            rows.insert(-2, ("h by", self.constraint_source))
        if self.env_id is not None:
            rows.insert(0, ("environment", self.env_id))
        if self.file is not None:
            rows.insert(0, ("log", f"{self.file}, {self.bytes} bytes"))
            rows.append(("sha256", str(self.sha256)))
            rows.append(("contents", CONTENTS_TEXTS[self.contents]))
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
        source: A log, or the path of a log's file, which is then loaded.
        limits: Cost limits, each at least 0. An episode counts as safe where its cost is at most
            the limit.
        env_id: Id of the logged environment; by default the result of `logged_environment`.
        file: Path of the file from which `source` was read, where `source` is a log. Its name, size
            and digest go into the card.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a valid log, or a limit is negative or not finite.

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
        contents=contents_of(log),
        env_id=env_id,
        episodes=log.num_episodes,
        transitions=len(log),
        observation_width=log.observations.shape[1],
        action_width=log.actions.shape[1],
        observation_space=str(log.observation_space),
        action_space=str(log.action_space),
        constraint_kind=log.constraint_kind,
        constraint_source=log.constraint_source,
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
    """Return the id of the environment that was logged; None where it is unknown.

    Args:
        log: The log. Its provenance may name the environment.
        file: Path of the log's file. DSRL's file names begin with the id.
    """
    named = (log.provenance or {}).get("environment")
    if isinstance(named, str) and _VERSIONED.search(named):
        return named
    match = None if file is None else _DSRL_NAME.fullmatch(Path(file).stem)
    return match["env"] if match else None


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of the file `path` in hexadecimal. The file is read in blocks."""
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _safe_episodes(log: OfflineDataset, limit: float) -> SafeEpisodes:
    safe = log.episode_costs <= limit
    return SafeEpisodes(
        limit,
        int(safe.sum()),
        float(safe.mean()),
        float(log.returns[safe].max()) if safe.any() else None,
    )
