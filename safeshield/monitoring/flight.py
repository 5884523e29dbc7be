"""`FlightLog`: what a flight recorder has written, as arrays, and as a log for training."""

from __future__ import annotations

import datetime
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import OfflineDataset
from safeshield.files.atomic import written_whole
from safeshield.files.lock import is_locked
from safeshield.files.schema import finite_number
from safeshield.monitoring.flight_file import SUFFIX, flight_files, read_files
from safeshield.monitoring.recorder import END, ROWS, FlightWarning, Kept
from safeshield.shield.log_record import ABORTED, STEPLESS
from safeshield.shield.report import ACCEPTED
from safeshield.spaces.rows import flat_actions
from safeshield.spaces.schema import space_from_json
from safeshield.values.constraint import as_constraint

Array = npt.NDArray[Any]
_BLOCK = 4096
_FIELDS = {
    "steps", "shield", "environment", "environment_kwargs", "observation_space", "action_space",
    "constraint_source", "since_episode",
}  # fmt: skip
"""Fields of a header that are read here."""
_ATTEMPTS = 20
"""Attempts to read the files while a recorder removes the oldest ones."""


@dataclass(frozen=True, eq=False, repr=False)
class FlightLog:
    """The flight in the folder of a `ShieldLog`, as arrays.

    The columns are, for each recorded step:

    ===========  ============================================================================
    time         time of the step, seconds since 1970
    seed         seed of the episode's reset, -1 where none was passed
    env          index of the environment
    episode      number of the episode, counted over all environments and restarts
    step         number of the step in its episode, from 0
    observation  (n, obs) the flattened observation in which the action was taken
    proposed     (n, act) the action that the agent sent
    executed     (n, act) the action that the environment executed
    value        Q_h of the executed action, as ``info["shield/value"]``
    threshold    the number that it must not exceed, as ``info["shield/threshold"]``
    verdict      "accepted", "replaced" (by an acceptable action), "fallback" (no acceptable
                 action was found), "unreadable" (the observation was), or "shadow" (the shield
                 would have replaced the action, in shadow mode)
    certified    whether the episode began certified: ``info["shield/certified"]`` at its reset
    h            ``info["constraint"]`` of this state, NaN where none is reported; of several
                 constraints by name, the largest number
    cost         ``info["cost"]`` of this state, NaN where none is reported
    reward       reward of the step, as the environment returned it
    terminated   whether the step terminated the episode
    truncated    whether the step truncated the episode
    ===========  ============================================================================

    Attributes:
        rows: All rows as a structured array, in the order in which they were recorded; `columns`
            and `ends` are made of it.
        steps: "all" or "interventions", as in `ShieldLog`.
        shield: The shield and the mode, as in the provenance of `collect`: "digest", "delta",
            "mode", and "adaptive" where the threshold adapted.
        agent: Name of the agent, "" where the recorder was told none.
        environment: Id of the environment, "" where it is not known.
        environment_kwargs: Keyword arguments with which it was made, as JSON values; None where
            they are not known.
        observation_space: Space of the observations.
        action_space: Space of the actions.
        constraint_source: Name of the function that gives the shield's h; None where there is none.
        lost: Number of rows between others, or before all others, that are missing: the disk was
            full or too slow, or their block is damaged. What a killed recorder had not yet written
            is not counted.
        removed: Number of rows in the oldest files, which were removed.
        torn: Number of damaged stretches that were skipped, such as a block that was being written
            when the recorder was killed.
        growing: Number of the first episode of the recorder that is writing to the folder; None
            where none is. Only such episodes can become longer.
        closed: Whether the recorder was closed after the last row. False where it still writes or
            was killed, and where the end of its files is missing.
        files: Number of files.
        bytes: Size of all files.
    """

    rows: Array
    steps: str
    shield: Mapping[str, Any]
    agent: str
    environment: str
    environment_kwargs: Mapping[str, Any] | None
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    constraint_source: str | None
    lost: int
    removed: int
    torn: int
    growing: int | None
    closed: bool
    files: int
    bytes: int

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FlightLog:
        """Return the flight in a recorder's folder, also while it is being written.

        Args:
            path: The folder.

        Raises:
            FileNotFoundError: There is no such folder, or it holds no flight.
            ValueError: The files are damaged, of another kind, or of a newer release.
        """
        folder = Path(path)
        writing = is_locked(folder)
        for attempt in range(_ATTEMPTS):
            files = flight_files(folder)
            if not files:
                raise FileNotFoundError(
                    f"{folder} holds no flight, which is a folder with files such as "
                    f"000001{SUFFIX}: pass the path of a ShieldLog that has recorded a step"
                )
            try:
                found = read_files(files)
                size = sum(one.stat().st_size for one in files)
                break
            except FileNotFoundError:
                # A recorder that is still writing has removed its oldest file since the listing.
                if attempt == _ATTEMPTS - 1:
                    raise
        header = found.header
        missing = sorted(_FIELDS - set(header))
        if missing:
            raise ValueError(f"{folder} holds a flight whose header lacks {missing}")
        _check(header, folder)
        if len(found.rows) and found.rows["verdict"].max() >= len(ROWS):
            raise ValueError(f"{folder} holds rows of a kind that this release does not know")
        return cls(
            rows=found.rows,
            steps=header["steps"],
            shield=header["shield"],
            agent=header.get("agent", ""),
            environment=header["environment"],
            environment_kwargs=header["environment_kwargs"],
            observation_space=space_from_json(header["observation_space"]),
            action_space=space_from_json(header["action_space"]),
            constraint_source=header["constraint_source"],
            lost=found.lost,
            removed=found.removed,
            torn=found.torn,
            growing=header["since_episode"] if writing and not found.closed else None,
            closed=found.closed,
            files=len(files),
            bytes=size,
        )

    def __len__(self) -> int:
        return len(self.columns["time"])

    def __repr__(self) -> str:
        return (
            f"FlightLog({len(self)} steps, {self.num_episodes} episodes, "
            f"shield {self.shield['digest']}, mode {self.shield['mode']!r})"
        )

    @cached_property
    def columns(self) -> dict[str, Array]:
        """The columns above, each an array (n, ...), in the order of recording."""
        return _columns(self.rows[self.rows["verdict"] < END])

    @cached_property
    def ends(self) -> dict[str, Array]:
        """The same columns for the last state of each episode that has ended or was cut.

        The verdict is "end", or "cut" by a reset or a close. The step is the length of the episode,
        the value is V_h, and actions and reward are NaN.
        """
        return _columns(self.rows[self.rows["verdict"] >= END])

    @property
    def missing(self) -> str:
        """Which rows are missing by damage or loss, in words; "" where none is known to be."""
        parts = [f"{self.lost} rows"] if self.lost else []
        if self.torn:
            places = f"{self.torn} damaged place{'s' * (self.torn > 1)}"
            parts.append(f"an unknown number of rows in {places}")
        if not self.closed and self.growing is None:
            parts.append("an unknown number of rows at the end, because the log was not closed")
        if not parts:
            return ""
        sure = "are" if self.lost or self.torn else "may be"
        return f"rows {sure} missing ({'; '.join(parts)}): all numbers are those of what is left"

    @property
    def num_episodes(self) -> int:
        """Number of episodes of which a row is there."""
        return len(np.unique(self.rows["episode"]))

    def card(self) -> dict[str, Any]:
        """Return what the flight shows, as JSON values; ``safeshield inspect`` prints it.

        "replaced" counts the steps in which the shield intervened, or in shadow mode would have,
        and "replaced_share" is their share of the steps. "violating" counts the episodes in which a
        state has h > 0 or a cost above 0, and "certified" those that began certified. "missing" is
        the sentence of `missing`.
        """
        rows = self.rows
        numbers, at = np.unique(rows["episode"], return_inverse=True)
        # A row of step t follows t steps, and one more where an action was taken.
        taken = rows["verdict"] < END
        lengths = np.zeros(len(numbers), np.int64)
        np.maximum.at(lengths, at, rows["step"] + taken)
        bad, certified, over = (np.zeros(len(numbers), np.bool_) for _ in range(3))
        np.logical_or.at(bad, at, (rows["h"] > 0) | (rows["cost"] > 0))
        np.logical_or.at(certified, at, rows["certified"])
        np.logical_or.at(over, at, ~taken)
        steps = len(self) if self.steps == "all" else int(lengths.sum())
        verdicts = {
            name: int((rows["verdict"] == kind).sum()) for kind, name in enumerate(ROWS[:END])
        }
        replaced = sum(verdicts.values()) - verdicts[ROWS[ACCEPTED]]
        times = rows["time"]
        span = (times.min(), times.max()) if len(rows) else ()
        return {
            "shield": self.shield["digest"],
            **{name: value for name, value in self.shield.items() if name != "digest"},
            "agent": self.agent or None,
            "environment": self.environment or None,
            "environment_kwargs": self.environment_kwargs,
            "recorded": self.steps,
            "times": [
                datetime.datetime.fromtimestamp(one, datetime.UTC).isoformat(timespec="seconds")
                for one in span
            ],
            "steps": steps,
            "episodes": len(numbers),
            "unfinished": int((~over).sum()),
            "replaced": replaced,
            "replaced_share": replaced / steps if steps else 0.0,
            "verdicts": {
                name: count
                for name, count in verdicts.items()
                if self.steps == "all" or name != ROWS[ACCEPTED]
            },
            "violating": int(bad.sum()),
            "certified": int(certified.sum()),
            "certified_violating": int((bad & certified).sum()),
            "lost": self.lost,
            "removed": self.removed,
            "torn": self.torn,
            "closed": self.closed,
            "missing": self.missing,
            "files": self.files,
            "bytes": self.bytes,
        }

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write all rows, the last states of episodes included, as JSON, one object in each line.

        Numbers that are not finite become null, because strict JSON has none.

        Raises:
            OSError: The file cannot be written; see `files.atomic.check_writable`.
        """
        with written_whole(Path(path)) as part, part.open("w", encoding="utf-8") as stream:
            for first in range(0, len(self.rows), _BLOCK):
                columns = _columns(self.rows[first : first + _BLOCK])
                lists = [_json_list(column) for column in columns.values()]
                for row in zip(*lists, strict=True):
                    line = dict(zip(columns, row, strict=True))
                    stream.write(json.dumps(line, allow_nan=False) + "\n")

    def to_dataset(self, like: OfflineDataset | None = None) -> OfflineDataset:
        """Return the recorded episodes as a log for training, marked as recorded behind the shield.

        An episode of which only the beginning is there is cut off as truncated; one whose beginning
        is missing is left out. So is one that is still being recorded, with all that began after
        it, because short episodes end first. Behind a state that is not finite an episode is cut
        off as well; the provenance says how many episodes have no step before it. A warning says
        how many steps this concerns. Executed actions outside the action space, which a shadowed
        agent may send, are clipped to it.

        What is trained on the log refuses these episodes in `calibrate_from_log`, and has no record
        until it is calibrated anew.

        Args:
            like: A log to which this one will be joined by `OfflineDataset.concat`; the states are
                labelled as there. None: by the shield's source of h, where it is registered;
                otherwise by the recorded h, or where it is not reported at every step, by the
                costs.

        Raises:
            ValueError: Only interventions were recorded, no step can be used, the environment
                reported neither h nor a cost at every step, or not what `like` needs.
            LookupError: A constraint that `like` names is not registered.
        """
        if self.steps != "all":
            raise ValueError(
                f"the flight must hold all steps, but only its {self.steps} were recorded, which "
                "are no whole episodes: record with ShieldLog(path, steps='all')"
            )
        if like is not None:
            for name in ("observation_space", "action_space"):
                own, other = getattr(self, name), getattr(like, name)
                if own.shape != other.shape:
                    raise ValueError(
                        f"the {name.replace('_', ' ')} of the flight is {own!s:.120}, and that of "
                        f"the log to join {other!s:.120}: they are not of the same plant"
                    )
        rows = np.sort(self.rows, order=["episode", "step"])
        kept, stepless = _usable(rows, self.growing)
        count = len(self)
        if not len(kept):
            raise ValueError(
                f"none of the {count} recorded steps belongs to an episode whose beginning is "
                "there and which is no longer being recorded: close the ShieldLog first"
            )
        if len(kept) < count:
            warnings.warn(
                f"{count - len(kept)} of {count} recorded steps are not in the log: their episode "
                "is still being recorded or began after such a one, its beginning is missing, or "
                "they follow a gap or lead to a state that is not finite"
                + (
                    f"; {stepless} episodes have no other steps, and calibrate_from_log counts "
                    "them against its statements"
                    if stepless
                    else ""
                ),
                FlightWarning,
                stacklevel=2,
            )
        codec = flat_actions(self.action_space)
        now, after = rows[kept], rows[kept + 1]
        last = np.append(now["episode"][1:] != now["episode"][:-1], True)
        fields: dict[str, Any] = {
            "observations": now["observation"],
            "actions": np.clip(now["executed"], codec.low, codec.high),
            "rewards": now["reward"],
            "next_observations": after["observation"],
            "terminated": now["terminated"],
            "truncated": last & ~now["terminated"],
        }
        fields |= {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
        }
        provenance = {
            **({"collected_by": self.agent} if self.agent else {}),
            **({"environment": self.environment} if self.environment else {}),
            "behind_shield": dict(self.shield),
            "flight": {
                "lost": self.lost,
                "removed": self.removed,
                "since": float(rows["time"].min()),
                STEPLESS: stepless,
                ABORTED: int((~(now["terminated"] | now["truncated"])[last]).sum()),
            },
        }
        return _labelled(fields, now, after, self.constraint_source, like, provenance)


def _check(header: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError unless the fields of a header have their types."""
    shield = header["shield"]
    told = shield if isinstance(shield, dict) else {}
    texts = told.get("digest"), told.get("mode"), header["environment"], header.get("agent", "")
    kwargs, source = header["environment_kwargs"], header["constraint_source"]
    delta = finite_number(told.get("delta"), f"{folder} holds a flight whose delta")
    right = (
        all(isinstance(one, str) for one in texts)
        and isinstance(kwargs, dict | None)
        and isinstance(source, str | None)
        and header["steps"] in get_args(Kept)
        and type(header["since_episode"]) is int
    )
    if not right or delta < 0.0:
        raise ValueError(f"{folder} holds a flight whose header is damaged: {header!r:.300}")


def _columns(rows: Array) -> dict[str, Array]:
    names = [name for name in rows.dtype.names or () if name != "verdict"]
    return {**{name: rows[name] for name in names}, "verdict": np.array(ROWS)[rows["verdict"]]}


def _json_list(column: Array) -> list[Any]:
    if column.dtype.kind != "f" or np.isfinite(column).all():
        whole: list[Any] = column.tolist()
        return whole
    some = column.astype(object)
    some[~np.isfinite(column)] = None
    listed: list[Any] = some.tolist()
    return listed


def _usable(rows: Array, growing: int | None) -> tuple[npt.NDArray[np.int64], int]:
    """Return the indices of the steps that a log may hold, and how many episodes have none.

    These episodes began in a state that can be read, and their first action was sent, but the state
    behind it is missing or not finite.

    Args:
        rows: Rows in the order of their episodes and steps.
        growing: Number of the first episode that may still become longer; None: none.
    """
    if not len(rows):
        return np.empty(0, np.int64), 0
    episode = rows["episode"]
    follows = np.zeros(len(rows), np.bool_)
    follows[:-1] = (episode[1:] == episode[:-1]) & (rows["step"][1:] == rows["step"][:-1] + 1)
    with np.errstate(over="ignore"):
        finite = np.asarray(np.isfinite(rows["observation"].astype(np.float32)).all(axis=1))
        told = np.isfinite(rows["reward"].astype(np.float32))
    acts = rows["verdict"] < END
    good = acts & follows & finite & np.append(finite[1:], False) & told
    good &= np.isfinite(rows["executed"]).all(axis=1)
    starts = np.flatnonzero(np.append(True, episode[1:] != episode[:-1]))
    lengths = np.diff(starts, append=len(rows))
    broken = np.cumsum(~good)
    before: npt.NDArray[np.int64] = np.repeat(broken[starts] - ~good[starts], lengths)
    good &= broken == before
    whole = rows["step"][starts] == 0
    if growing is not None:
        # Short episodes end first. So episodes count in the order of their beginnings, up to the
        # first one that has not ended.
        over = rows["verdict"][starts + lengths - 1] >= END
        running = episode[starts][~over & (episode[starts] >= growing)]
        whole &= episode[starts] < running.min(initial=np.iinfo(np.int64).max)
    stepless = whole & ~good[starts] & acts[starts] & finite[starts]
    return np.flatnonzero(good & np.repeat(whole, lengths)), int(stepless.sum())


def _labelled(
    fields: dict[str, Any],
    now: Array,
    after: Array,
    own: str | None,
    like: OfflineDataset | None,
    provenance: dict[str, Any],
) -> OfflineDataset:
    """Return a log with labels; `own` is the shield's source of h, and the rows are `now`, `after`.

    See `FlightLog.to_dataset`.
    """
    h, reached, costs = now["h"], after["h"], after["cost"]
    told_h, told_costs = np.isfinite(h) & np.isfinite(reached), np.isfinite(costs) & (costs >= 0)
    has_h, has_costs = bool(told_h.all()), bool(told_costs.all())
    if not (has_h or has_costs):
        lacking = ~(told_h if told_h.sum() > told_costs.sum() else told_costs)
        told = "neither"
        if not lacking.all():
            first = now[int(lacking.argmax())]
            told = (
                f"neither at every step: {lacking.sum()} of {len(now)} steps have no such label, "
                f"the first of them step {first['step']} of episode {first['episode']}"
            )
        raise ValueError(
            "the environment must report info['constraint'] at reset and at every step, or "
            f"info['cost'] at every step, but the flight holds {told}: wrap it in "
            "ConstraintFromFunction or CostFromFunction"
        )
    name = own if like is None else like.constraint_source
    source = None if name is None else as_constraint(name)
    if source is not None and like is None and not source.available:
        source = None
    if not has_costs:
        costs = (reached > 0).astype(np.float32)
    # Binary labels, also as a basis for those that the source of h computes.
    binary = source is not None or not has_h
    if like is not None and source is None:
        binary = like.constraint_kind == "binary"
        if not binary and not has_h:
            raise ValueError(
                "the log to join has continuous labels without a named source, but the flight "
                "does not hold info['constraint'] of every state: report it at reset and at every "
                "step"
            )
    labels: dict[str, Any] = {"constraints": h, "next_constraints": reached}
    if binary:
        first = np.append(True, now["episode"][1:] != now["episode"][:-1])
        start = now[first]
        unsafe_start = (start["cost"] > 0) | (start["h"] > 0)
        labels = {"initial_costs": unsafe_start.astype(np.float32)}
    log = OfflineDataset.from_arrays(**fields, **labels, costs=costs, provenance=provenance)
    return log if source is None else log.with_constraint(source)
