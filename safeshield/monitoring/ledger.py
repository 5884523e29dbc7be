"""The episodes that a monitor has counted, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.files.atomic import written_whole
from safeshield.files.reading import read_whole

RUNNING, ENDED, CUT = STATUSES = ("running", "ended", "cut")
_FORMAT, _VERSION = "safeshield-promise", 1


@dataclass
class Entry:
    """One episode that began certified."""

    started: float
    """Time of its beginning, in seconds since 1970."""
    status: str = RUNNING
    """"running", "ended" (terminated or truncated) or "cut"."""
    score: float | None = None
    """Score that it has reached; None while no label was reported."""
    covariates: dict[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> tuple[int, float]:
        """Of two copies of an episode, the one with the greater progress is the later one."""
        return (RUNNING, CUT, ENDED).index(self.status), self.score or 0.0


def joined(known: Entry, other: Entry) -> Entry:
    """Return the later one of two copies of an episode. A score that was reached is kept."""
    scores = [one.score for one in (known, other) if one.score is not None]
    later = max(known, other, key=lambda one: one.progress)
    return replace(later, score=max(scores, default=None))


def finite(name: str, value: object) -> float:
    """Return `value` as a float, checked to be a finite number; `name` is for the error."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):  # A whole number can be beyond every float.
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
    return number


def checked_costs(costs: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return costs (n,), with infinity for those that are negative or NaN.

    >>> checked_costs(np.array([0.5, -1.0, np.nan]))
    array([0.5, inf, inf])
    """
    return np.where(costs >= 0.0, costs, np.inf)


def uniform(name: str) -> float:
    """Return a number in (0, 1) that follows from a text, the same in every process.

    >>> 0.0 < uniform("a") < 1.0
    True
    """
    digest = hashlib.sha256(name.encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2.0**48


def row_text(name: str, entry: Entry, covariates: Iterable[str]) -> str:
    """Return an episode as JSON: name, start, status, score, and its value of each covariate."""
    values = map(entry.covariates.get, covariates)
    return json.dumps([name, entry.started, entry.status, entry.score, *values], allow_nan=False)


def write_ledger(path: Path, settings: Mapping[str, Any], rows: Iterable[str]) -> None:
    """Write the settings of a monitor and its episodes as JSON, atomically.

    Args:
        path: The file.
        settings: JSON values by name.
        rows: Each episode as `row_text` returns it, so that a monitor converts each once.

    Raises:
        OSError: The file cannot be written.
    """
    head = json.dumps({"format": _FORMAT, "version": _VERSION, **settings}, allow_nan=False)
    body = ",\n".join(rows)
    with written_whole(path) as part:
        part.write_text(f'{head[:-1]}, "episodes": [\n{body}\n]}}\n', "utf-8")


def read_ledger(
    path: Path, kinds: Mapping[str, Callable[[object], bool]]
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return the settings and the episodes that `write_ledger` wrote, after a check of each.

    Args:
        path: The file.
        kinds: For each setting whether a value is one of it; "reference" is checked here.

    Raises:
        ValueError: The file is damaged, larger than the limit of `files.reading`, or no such file.
        OSError: It cannot be read.
    """
    raw = read_whole(path)
    try:
        data = json.loads(raw)
        if data["format"] != _FORMAT or data["version"] != _VERSION:
            raise ValueError(f"its format is {data['format']!r:.40} {data['version']!r:.10}")
        if set(data) != {"format", "version", "reference", "episodes", *kinds}:
            raise ValueError(f"its fields are {sorted(data)!r:.200}")
        for name, right in kinds.items():
            if not right(data[name]):
                raise ValueError(f"{name} is {data[name]!r:.60}")
        reference = data["reference"]
        if reference is not None:
            data["reference"] = {
                name: [finite(f"reference[{name!r}]", one) for one in each]
                for name, each in reference.items()
            }
        rows = data.pop("episodes")
        entries = {row[0]: _entry(row, list(reference or ())) for row in rows}
        if len(entries) != len(rows) or not all(isinstance(name, str) for name in entries):
            raise ValueError("its episodes do not have names of their own")
    except (
        AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is not a file that a PromiseMonitor wrote, or it is damaged: {error}; restore "
            "it, or remove it to begin anew without the episodes that it held"
        ) from error
    return data, entries


def _entry(row: list[Any], names: list[str]) -> Entry:
    name, started, status, score, *values = row
    if status not in STATUSES or len(values) != len(names):
        raise ValueError(f"episode {name!r:.60} has the status {status!r:.20} or a wrong length")
    if score is not None and finite("score", score) < 0.0:
        raise ValueError(f"episode {name!r:.60} has the score {score}")
    pairs = zip(names, values, strict=True)
    known = {key: finite(key, value) for key, value in pairs if value is not None}
    return Entry(finite("started", started), status, score, known)


def stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when another process replaces a file; None where there is no file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
