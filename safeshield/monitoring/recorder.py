"""`ShieldLog`: a flight recorder, which writes the steps of a shielded environment to files.

The thread that steps the environment writes each row into a block of memory that was allocated
before. A full block goes to a thread that appends it to a file (`flight_file`). The step never
waits for the disk: where all blocks are full, or the disk is, rows are lost, and they are counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing.util
import os
import queue
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.files.atomic import check_writable
from safeshield.files.lock import locked
from safeshield.files.schema import whole
from safeshield.monitoring.flight_file import (
    FORMAT,
    HEAD,
    VERSION,
    Contents,
    FlightFiles,
    dtype_to_json,
    flight_files,
    read_newest,
    row_dtype,
    row_struct,
)
from safeshield.rollouts.copies import Identity
from safeshield.shield.protocols import Decision, States
from safeshield.shield.report import ACCEPTED, VERDICTS
from safeshield.shield.shield import Shield
from safeshield.spaces.schema import space_to_json
from safeshield.spaces.shapes import Flags

_LOGGER = logging.getLogger(__name__)
Kept = Literal["all", "interventions"]
END, CUT = len(VERDICTS), len(VERDICTS) + 1
ROWS = (*VERDICTS, "end", "cut")
"""What a row may be: a step with one of these verdicts, or the last state of an episode that ended,
or of one that was cut by a reset or by `close`."""

_BLOCKS = 16
"""Least number of blocks that are full or being filled; the disk may be late by all but one."""
_READY = 4096
"""Least number of rows in all of them."""
_BLOCK_BYTES = 1 << 22
"""Bound on the size of a block, unless so few rows are fewer than two of each environment."""
_PATIENCE = 1.0
"""Time that a recorder waits for a folder in which another one is just closed, seconds."""
_CLOSING = 60.0
"""Time that `close` waits for the disk, seconds."""


class FlightWarning(UserWarning):
    """A flight recorder has lost steps, or has removed old files."""


class _Block:
    """Memory for the frame of some rows, with views of its parts."""

    def __init__(self, capacity: int, dtype: np.dtype[Any]) -> None:
        self.memory = memoryview(bytearray(HEAD + capacity * dtype.itemsize))
        self.capacity, self.size = capacity, dtype.itemsize
        self.observation = np.frombuffer(self.memory, dtype, offset=HEAD)["observation"]
        self.count = 0
        self.first = 0
        """Index of the first row among all rows."""
        self.since = 0.0
        """Time of the first row."""

    def put(self, place: int | slice, observations: npt.NDArray[Any]) -> None:
        """Write observations (k, obs) into k rows; `place` is an index where k is 1."""
        if observations.dtype == self.observation.dtype:
            self.observation[place] = observations
        else:
            with np.errstate(over="ignore"):
                self.observation[place] = observations


class ShieldLog:
    """A flight recorder: writes every step of a shielded environment to files in a folder.

    Pass it to `SafetyShield`, `VectorSafetyShield` or `VecSafetyShield` as ``log=``. `FlightLog`
    reads the folder, and ``safeshield inspect`` describes it.

    A row says what the shield did in one state: the time, the seed of the episode's reset, the
    observation, the proposed and the executed action, value, threshold and verdict, h and cost of
    the state as the environment reports them, and the reward and the end flags of the step. The
    last state of an episode has a row of its own. A folder belongs to one shield at one delta in
    one mode; a recorder that finds a folder of the same continues it.

    A block of rows is written when it is full, or when its first row is older than `flush_seconds`
    at the next step. After a kill the last `block_steps` steps at most are missing, unless the disk
    is late, or on a busy machine the thread that writes. A power failure can also lose what the
    operating system has not yet written.

    A step in which the environment raised an error has a row with the executed action and no
    outcome, and the last state of the episode then holds NaN.

    The wrapper closes the log when it is closed itself, and the log closes itself when the process
    ends. In a process that was forked while the log records, it is closed: the steps of the copy
    are not recorded there, and a `FlightWarning` says so.

    The environment goes on where the disk is full or too slow. A `FlightWarning` says so once, and
    `close` says how many rows were lost.

    Args:
        path: The folder, which is made if necessary. One process at a time can record in it.
        steps: "all", or "interventions": then the rows of accepted actions are left out, except in
            states that violate. The last states of episodes are always kept. Only "all" can be
            converted to an `OfflineDataset`.
        max_bytes: Size at which a file ends and the next one begins, in bytes.
        total_bytes: Bound on the size of all files, in bytes, at least twice `max_bytes`. The
            oldest files are removed, and a `FlightWarning` says so once.
        block_steps: Number of steps, each of all environments, that a kill may lose, at least
            eight: four blocks, of which one is filled while others are written. A block has 4 MiB
            at most, unless two steps need more. There are 16, or more where they are small.
        flush_seconds: Age at which a block is written that is not full, in seconds.
        agent: Name of the agent that proposes the actions, where it is known. A log that is made of
            the flight then names it, and a folder of another agent is refused.

    Attributes:
        path: The folder.
        steps: As above.
        lost: Number of rows of this recorder that were lost.

    Raises:
        ValueError: An argument is out of range, or another recorder is writing to the folder.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        steps: Kept = "all",
        *,
        max_bytes: int = 1 << 26,
        total_bytes: int = 1 << 32,
        block_steps: int = 1024,
        flush_seconds: float = 1.0,
        agent: str | None = None,
    ) -> None:
        if steps not in get_args(Kept):
            raise ValueError(f"steps must be one of {list(get_args(Kept))}, got {steps!r:.40}")
        # Absolute, because the process may change its working directory.
        self.path, self.steps = Path(path).absolute(), steps
        self._max_bytes = whole("max_bytes", max_bytes, least=1 << 12)
        self._total_bytes = whole("total_bytes", total_bytes, least=2 * self._max_bytes)
        self._block_steps = whole("block_steps", block_steps, least=1)
        if not 0.0 <= flush_seconds < float("inf"):
            raise ValueError(
                f"flush_seconds must be finite and at least 0, got {flush_seconds!r:.40}"
            )
        if not isinstance(agent, str | None) or agent == "":
            raise ValueError(
                f"agent must be the name of the agent, or None where it is not known, got "
                f"{agent!r:.60}"
            )
        self._flush_seconds, self._agent = float(flush_seconds), agent or ""
        self.lost = 0
        self._rows = 0
        self._first = 0
        self._episode = self._since = 0
        self._header: dict[str, Any] = {}
        self._process = os.getpid()
        self._closed = False
        self._told: set[str] = set()
        self._notes: deque[tuple[str, str]] = deque()
        self._guard = threading.RLock()
        self._block: _Block | None = None
        # The block that was written last is filled next, because its memory is in the caches.
        self._free: deque[_Block] = deque()
        self._full: queue.SimpleQueue[_Block | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._track: FlightTrack | None = None
        self._at_exit: multiprocessing.util.Finalize | None = None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"path must be a folder, got the file {self.path}: name a folder")
        # The folder is held from `attach` on, so a log that records nothing holds none.
        self._held = contextlib.ExitStack()
        with self._locked():
            check_writable(self.path / "000000.flight")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ShieldLog({str(self.path)!r}, steps={self.steps!r})"

    def attach(
        self,
        shield: Shield,
        count: int,
        identity: Mapping[str, Any],
        environment: Identity | None,
        /,
    ) -> FlightTrack:
        """Return what records the steps of `count` environments; the wrappers call this.

        The arguments are those of `protocols.Recorder.attach`.

        Raises:
            ValueError: The log is closed or records other environments already, another recorder
                is writing to the folder, or the folder holds the flight of another shield, delta,
                mode or environment, or with other `steps`.
        """
        if self._closed:
            raise ValueError(f"log is closed: make another ShieldLog({str(self.path)!r})")
        if self._track is not None:
            raise ValueError(
                f"log records other environments already: give each wrapper its own ShieldLog, in "
                f"a folder of its own, got {self.path}"
            )
        with contextlib.ExitStack() as held:
            held.enter_context(self._locked())
            self._process = os.getpid()
            track = self._attached(shield, count, identity, environment)
            self._held = held.pop_all()
        # Unlike those of `atexit`, this also runs at the end of a forked worker process.
        self._at_exit = multiprocessing.util.Finalize(None, self.close, exitpriority=0)
        _RECORDING.add(self)
        return track

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that holds the folder."""
        busy = (
            "is being recorded to by another ShieldLog, of this process or of another: close it, "
            "or give each recorder its own folder"
        )
        return locked(self.path, busy, timeout=_PATIENCE)

    def _attached(
        self, shield: Shield, count: int, identity: Mapping[str, Any], environment: Identity | None
    ) -> FlightTrack:
        model = shield.model
        dtype = row_dtype(
            model.observation_codec.width,
            model.action_codec.width,
            _needs_float64(shield.observation_space),
        )
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "steps": self.steps,
            "shield": dict(identity),
            "agent": self._agent,
            "environment": environment.name if environment is not None else "",
            "environment_kwargs": environment.kwargs if environment is not None else None,
            "observation_space": space_to_json(shield.observation_space),
            "action_space": space_to_json(shield.action_space),
            "constraint_source": shield.constraint,
            "rows": list(ROWS),
            "dtype": dtype_to_json(dtype),
        }
        found = read_newest(flight_files(self.path))
        if found is not None:
            self._continue(found)
        capacity = self._capacity(count, dtype.itemsize)
        for _ in range(max(_BLOCKS, _READY // capacity)):
            self._free.append(_Block(capacity, dtype))
        writer = FlightFiles(
            self.path, self._head, self._max_bytes, self._total_bytes, self._removed, self._gone
        )
        self._thread = threading.Thread(
            target=self._write, args=(writer,), name=f"ShieldLog {self.path}", daemon=True
        )
        self._thread.start()
        self._track = FlightTrack(self, count, model.action_codec.width)
        return self._track

    def _capacity(self, count: int, size: int) -> int:
        """Return the number of rows of a block, of `size` bytes each, for `count` environments.

        Raises:
            ValueError: A file cannot hold two rows of each environment.
        """
        around = len(json.dumps(self._head())) + 4 * HEAD + 64
        fits = (self._max_bytes - around) // size
        if fits < 2 * count:
            raise ValueError(
                f"max_bytes must be at least {around + 2 * count * size}, for two steps of "
                f"{count} environments, got {self._max_bytes}"
            )
        # One block is filled while another is written, and the thread that writes may be late.
        capacity = min(self._block_steps * count // 4, _BLOCK_BYTES // size, fits)
        return max(capacity, 2 * count)

    def flush(self) -> None:
        """Write all rows so far, and wait until they are written."""
        if self._thread is None or self._closed or os.getpid() != self._process:
            return
        written = threading.Event()
        with self._guard:
            self.hand_over()
            self._full.put(written)
        written.wait(_CLOSING)
        self.tell()

    def close(self) -> None:
        """Write all rows, and release the folder. The environment may go on without the log."""
        if self._closed or os.getpid() != self._process:
            return
        if self._track is not None:
            self._track.cut()
        with self._guard:
            self._closed = True
            self.hand_over()
            self._full.put(None)
        if self._at_exit is not None:
            self._at_exit.cancel()
        late = False
        if self._thread is not None:
            self._thread.join(_CLOSING)
            late = self._thread.is_alive()
        self.tell()
        self._held.close()
        if self.lost or late:
            more = f"; the disk has not answered for {_CLOSING:g} seconds" if late else ""
            warnings.warn(
                f"{self.lost} of {self._rows} rows of the flight in {self.path} were lost{more}",
                FlightWarning,
                stacklevel=2,
            )

    # -- for the thread that steps ----------------------------------------------------------------

    def open_episode(self) -> int:
        """Return the number of a new episode."""
        self._episode += 1
        return self._episode - 1

    # A KeyboardInterrupt can be raised at any line of these methods. A row is counted only after it
    # has been written, and the recorder drops its reference to a block before it queues the block.
    # So an interrupt can lose rows, but it cannot record wrong ones.

    def room(self, count: int, now: float) -> tuple[_Block, int] | None:
        """Return a block and the index of the first of `count` new rows in it; None: none is free.

        Once they are written, `took` counts them.

        Args:
            count: The number of rows, at most half a block.
            now: The time, in seconds since 1970.
        """
        block = self._block
        if block is not None and (
            block.count + count > block.capacity or now - block.since > self._flush_seconds
        ):
            self.hand_over()
            block = None
        self._rows += count
        if block is None:
            try:
                block = self._block = self._free.pop()
            except IndexError:
                self.lost += count
                self._first += count
                self._note("lost", "the disk is too slow")
                return None
            block.count, block.first, block.since = 0, self._first, now
        return block, block.count

    def took(self, block: _Block, count: int) -> None:
        """Count rows that were written into a block."""
        block.count += count
        self._first += count

    def hand_over(self) -> None:
        """Have the rows so far written, without waiting."""
        with self._guard:
            block, self._block = self._block, None
            if block is not None:
                (self._full.put if block.count else self._free.append)(block)

    def tell(self) -> None:
        """Issue the warnings that are due."""
        while self._notes:
            kind, why = self._notes.popleft()
            if kind in self._told:
                continue
            self._told.add(kind)
            text = {
                "lost": f"the flight recorder in {self.path} is losing steps: {why}. The "
                "environment goes on; close() says how many were lost",
                "removed": f"the flight recorder in {self.path} has removed its oldest files, "
                f"which held {why}, because all files must not exceed {self._total_bytes} bytes; "
                "it goes on to do so",
                "closed": f"the flight recorder in {self.path} is closed; the steps since then are "
                "not recorded",
                "forked": f"the flight recorder in {self.path} belongs to the process that was "
                "forked; the steps of this copy are not recorded: make a ShieldLog of its own here",
                "gone": f"a file of the flight recorder in {self.path} was removed while it was "
                "being written; the steps in it are lost, and a new file begins",
            }[kind]
            # Not even a filter that makes warnings errors may stop a step.
            try:
                warnings.warn(text, FlightWarning, stacklevel=2)
            except FlightWarning:
                _LOGGER.warning(text)

    def missed(self) -> None:
        """Note that a step came after `close`, or in a copy of the process."""
        self._note("closed" if os.getpid() == self._process else "forked", "")
        self.tell()

    def _note(self, kind: str, why: str) -> None:
        if kind not in self._told:
            self._notes.append((kind, why))

    def _continue(self, found: Contents) -> None:
        """Go on behind the rows of a folder, after a check that it is of the same shield."""
        for name in (
            "shield", "steps", "dtype", "observation_space", "action_space", "environment",
            "environment_kwargs", "agent",
        ):  # fmt: skip
            # Files of earlier releases name no agent.
            there = found.header.get(name, "")
            if there != self._header[name]:
                theirs, own = (
                    "none" if one == "" else f"{one!s:.120}" for one in (there, self._header[name])
                )
                raise ValueError(
                    f"{self.path} holds a flight whose {name.replace('_', ' ')} is {theirs}, and "
                    f"this one is {own}: record to another folder"
                    + (", or pass the agent= of that flight" if name == "agent" else "")
                )
        self._first = found.following
        past = int(found.rows["episode"].max(initial=-1)) + 1
        told = found.header.get("next_episode")
        self._episode = self._since = max(past, told if type(told) is int else 0)

    # -- for the thread that writes ---------------------------------------------------------------

    def _head(self) -> dict[str, Any]:
        return {**self._header, "since_episode": self._since, "next_episode": self._episode}

    def _removed(self, size: int) -> None:
        self._note("removed", f"{size} bytes")

    def _gone(self) -> None:
        self._note("gone", "")

    def _write(self, files: FlightFiles) -> None:
        while (block := self._full.get()) is not None:
            if isinstance(block, threading.Event):
                block.set()
                continue
            rows = block.count
            try:
                files.append(rows, block.first, block.memory[: HEAD + rows * block.size])
            except OSError as error:
                self.lost += rows
                self._note("lost", f"{error.strerror or error}")
            block.count = 0
            self._free.append(block)
        try:
            files.close(self._first)
        except OSError as error:
            self._note("lost", f"{error.strerror or error}")


class FlightTrack:
    """Follows the episodes of `count` environments for a recorder (`protocols.StepRecorder`)."""

    def __init__(self, log: ShieldLog, count: int, action: int) -> None:
        self._log = log
        self._pack = row_struct(action).pack_into
        self._every = log.steps == "all"
        self._alone = self._every and count == 1
        self._all = list(range(count))
        self._states: States | None = None
        self._episodes = [-1] * count
        self._seeds = [-1] * count
        self._steps = [0] * count
        self._running = [False] * count
        self._certified = [False] * count
        self._nan, self._no = [float("nan")] * count, [False] * count
        self._ends, self._cuts = [END] * count, [CUT] * count
        self._no_action = [[float("nan")] * action] * count

    def begin(
        self, starts: Flags, certified: Flags, states: States, seeds: Sequence[int | None], /
    ) -> None:
        """Begin new episodes, as `protocols.StepRecorder.begin`."""
        begun = np.flatnonzero(starts).tolist()
        self._cut(begun)
        for i in begun:
            seed = -1 if seeds[i] is None else int(seeds[i])  # type: ignore[arg-type]
            self._episodes[i], self._steps[i] = self._log.open_episode(), 0
            self._seeds[i] = seed if 0 <= seed < 2**63 else -1
            self._certified[i], self._running[i] = bool(certified[i]), True
        self._states = states

    def step(
        self,
        decision: Decision,
        verdicts: list[int],
        counted: list[bool],
        reward: list[float],
        terminated: list[bool],
        truncated: list[bool],
        reached: States,
        present: States,
        /,
    ) -> None:
        """Record one step, as `protocols.StepRecorder.step`."""
        log, states, now = self._log, self._states, time.time()
        self._states = present
        if log._closed:
            log.missed()
            return
        if states is None:
            return
        if self._alone and counted[0] and self._running[0]:
            # Steps of a single environment take this shorter way.
            with log._guard:
                found = log.room(1, now)
                if found is not None:
                    block, at = found
                    seen, _, (h,), (cost,) = states
                    proposed, executed, _, value, limit, _ = decision
                    self._pack(
                        block.memory, HEAD + at * block.size, now, self._seeds[0],
                        self._episodes[0], self._steps[0], 0, verdicts[0], self._certified[0],
                        terminated[0], truncated[0], value, limit, h, cost, reward[0],
                        *proposed.ravel().tolist(), *executed.ravel().tolist(),
                    )  # fmt: skip
                    block.put(at, seen)
                    log.took(block, 1)
                self._steps[0] += 1
                if terminated[0] or truncated[0]:
                    limits = [decision.threshold]
                    self._last([0], reached, now, self._ends, limits, terminated, truncated)
            if log._notes:
                log.tell()
            return
        running, steps = self._running, self._steps
        taken = [i for i in self._all if counted[i] and running[i]]
        rows = taken
        if not self._every:
            unsafe = [h > 0 or cost > 0 for h, cost in zip(*states[2:], strict=True)]
            rows = [i for i in taken if verdicts[i] != ACCEPTED or unsafe[i]]
        flags = terminated, truncated
        with log._guard:
            if rows:
                proposed, executed, _, value, limit, _ = decision
                count = len(self._all)
                actions = [one.reshape(count, -1).tolist() for one in (proposed, executed)]
                numbers = _listed(value), _listed(limit), reward
                self._put(rows, states, now, verdicts, *numbers, *flags, *actions)
            ended = []
            for i in taken:
                steps[i] += 1
                if terminated[i] or truncated[i]:
                    ended.append(i)
            if ended:
                self._last(ended, reached, now, self._ends, _listed(decision.threshold), *flags)
        if log._notes:
            log.tell()

    def fail(self, decision: Decision, verdicts: list[int], /) -> None:
        """Record a step that raised an error, as `protocols.StepRecorder.fail`."""
        log, states = self._log, self._states
        if log._closed or states is None:
            return
        under_way = [i for i in self._all if self._running[i]]
        if not under_way:
            return
        proposed, executed, _, value, limit, _ = decision
        count = len(self._all)
        actions = [one.reshape(count, -1).tolist() for one in (proposed, executed)]
        with log._guard:
            self._put(
                under_way, states, time.time(), verdicts, _listed(value), _listed(limit), self._nan,
                self._no, self._no, *actions,
            )  # fmt: skip
            for i in under_way:
                self._steps[i] += 1
        # Nothing is known of the states that the environments are in now.
        unknown = np.full(states.rows.shape, np.nan)
        self._states = States(unknown, self._nan, self._nan, self._nan)

    def cut(self) -> None:
        """Take all episodes that are under way as cut, and have all rows written."""
        self._cut(self._all)
        self._log.hand_over()

    def close(self) -> None:
        """Close the log, because the environments are closed."""
        self._log.close()

    def _cut(self, which: list[int]) -> None:
        cut = [i for i in which if self._running[i] and self._steps[i]]
        if cut and self._states is not None and not self._log._closed:
            with self._log._guard:
                self._last(
                    cut, self._states, time.time(), self._cuts, self._nan, self._no, self._no
                )
        for i in which:
            self._running[i] = False

    def _last(
        self,
        which: list[int],
        states: States,
        now: float,
        kinds: list[int],
        limits: list[float],
        terminated: list[bool],
        truncated: list[bool],
    ) -> None:
        """Write the last states of episodes, in which no action was taken."""
        numbers, nothing = (states.values, limits, self._nan), self._no_action
        self._put(which, states, now, kinds, *numbers, terminated, truncated, nothing, nothing)
        for i in which:
            self._running[i] = False

    def _put(
        self,
        which: list[int],
        states: States,
        now: float,
        kinds: list[int],
        values: list[float],
        limits: list[float],
        rewards: list[float],
        terminated: list[bool],
        truncated: list[bool],
        proposed: list[list[float]],
        executed: list[list[float]],
    ) -> None:
        """Write one row for each environment in `which`.

        The lists hold an item for each environment, named as in `flight_file.SCALARS`; `kinds` are
        indices into `ROWS`.
        """
        count = len(which)
        found = self._log.room(count, now)
        if found is None:
            return
        block, first = found
        offset, size, memory, pack = HEAD + first * block.size, block.size, block.memory, self._pack
        seeds, episodes, steps, certified = (
            self._seeds, self._episodes, self._steps, self._certified,
        )  # fmt: skip
        rows, _, h, cost = states
        for i in which:
            pack(
                memory, offset, now, seeds[i], episodes[i], steps[i], i, kinds[i], certified[i],
                terminated[i], truncated[i], values[i], limits[i], h[i], cost[i], rewards[i],
                *proposed[i], *executed[i],
            )  # fmt: skip
            offset += size
        place = first if count == 1 else slice(first, first + count)
        block.put(place, rows if count == len(self._all) else rows[which])
        self._log.took(block, count)


_RECORDING: weakref.WeakSet[ShieldLog] = weakref.WeakSet()
"""The logs that record in this process."""


def _close_copies() -> None:
    """Close the logs in a process that was just forked, where no thread writes them."""
    for log in _RECORDING:
        log._closed = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)


def _listed(value: Any) -> list[float]:  # noqa: ANN401 - a number or an array
    """Return one number for each environment."""
    if isinstance(value, np.ndarray) and value.ndim:
        listed: list[float] = value.tolist()
        return listed
    return [value]


def _needs_float64(space: gym.Space[Any]) -> bool:
    """Return whether observations of a space can lose precision when stored as float32."""
    if isinstance(space, gym.spaces.Dict):
        return any(map(_needs_float64, space.spaces.values()))
    return isinstance(space, gym.spaces.Box) and not np.can_cast(space.dtype, np.float32)
