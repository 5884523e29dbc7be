r"""The files of a flight recorder: numbered files in a folder, each a header and blocks of rows.

A file is a sequence of frames, each of which has a head and a payload:

    head = magic (4 bytes), number of rows, index of the first row, bytes of the payload, CRC-32

Numbers are little-endian. The first frame has no rows, and its payload is the header as JSON, with
the NumPy dtype of a row. The payload of every other frame is the bytes of its rows. A frame without
rows and without payload says that the recorder was closed.

Rows are counted over all files of a folder, and rows that could not be written are counted as well.
So a gap between two frames is the number of rows that were lost between them. A process that is
killed can leave a torn frame at the end of a file, whose checksum is wrong; it is skipped.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeshield.files.reading import FLIGHT_BYTES, read_whole, strict_json

SUFFIX = ".flight"
FORMAT, VERSION = "safeshield-flight", 1
_MAGIC = b"\xf5SFL"
_HEAD = struct.Struct("<4sIQII")
HEAD = _HEAD.size
"""Bytes of the head of a frame."""

SCALARS = (
    ("time", "<f8"), ("seed", "<i8"), ("episode", "<i8"), ("step", "<i8"), ("env", "<i4"),
    ("verdict", "u1"), ("certified", "?"), ("terminated", "?"), ("truncated", "?"),
    ("value", "<f8"), ("threshold", "<f8"), ("h", "<f8"), ("cost", "<f8"), ("reward", "<f8"),
)  # fmt: skip
"""Names and dtypes of the fields of a row that are single numbers."""

Array = npt.NDArray[Any]


def row_struct(action: int) -> struct.Struct:
    """Return the `struct` of the fields of a row up to the observation.

    It takes a quarter of the time that NumPy takes to write them.

    Args:
        action: Number of entries of an action's row.
    """
    return struct.Struct(f"<dqqqiB???ddddd{2 * action}d")


def row_dtype(observation: int, action: int, exact: bool) -> np.dtype[Any]:
    """Return the dtype of one row.

    Args:
        observation: Number of entries of an observation's row.
        action: Number of entries of an action's row.
        exact: Whether observations need float64.
    """
    wide = [("proposed", "<f8", (action,)), ("executed", "<f8", (action,))]
    return np.dtype([*SCALARS, *wide, ("observation", "<f8" if exact else "<f4", (observation,))])


def dtype_to_json(dtype: np.dtype[Any]) -> list[Any]:
    """Return the dtype of a row as JSON values, for a header."""
    return [[name, dtype[name].base.str, list(dtype[name].shape)] for name in dtype.names or ()]


def _head(rows: int, first: int, payload: bytes | memoryview) -> bytes:
    """Return the head of the frame of a payload."""
    start = _HEAD.pack(_MAGIC, rows, first, len(payload), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(payload, zlib.crc32(start)))


def flight_files(folder: Path) -> list[Path]:
    """Return the files of a recorder's folder, the oldest first; none where it is no folder."""
    found = folder.glob(f"*{SUFFIX}") if folder.is_dir() else ()
    return sorted((one for one in found if one.stem.isdecimal()), key=lambda one: int(one.stem))


class FlightFiles:
    """Appends frames to the newest file of a folder, and removes the oldest ones.

    Args:
        folder: The folder.
        header: Returns the header of a file that begins now, as JSON values.
        max_bytes: Size at which a file ends, in bytes.
        total_bytes: Bound on the size of all files, in bytes.
        on_removal: Called with the number of bytes that were removed.
        on_loss: Called where the file that is being written was removed by somebody else.
    """

    def __init__(
        self,
        folder: Path,
        header: Callable[[], Mapping[str, Any]],
        max_bytes: int,
        total_bytes: int,
        on_removal: Callable[[int], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._folder, self._header = folder, header
        self._max_bytes, self._total_bytes, self._on_removal = max_bytes, total_bytes, on_removal
        self._on_loss = on_loss
        self._stream: io.FileIO | None = None
        self._size = 0

    def append(self, rows: int, first: int, frame: memoryview) -> None:
        """Write one frame.

        Args:
            rows: Number of rows.
            first: Index of the first one.
            frame: Room for the head, and behind it the rows.

        Raises:
            OSError: It could not be written; the file then ends before it.
        """
        if self._stream is not None and not os.fstat(self._stream.fileno()).st_nlink:
            self._stream.close()
            self._stream = None
            self._on_loss()
        # There is room for the frame that closes the file.
        if self._stream is None or self._size + len(frame) + HEAD > self._max_bytes:
            self._next(first)
        self._write(rows, first, frame)

    def close(self, first: int) -> None:
        """Write the frame that says that the recorder was closed after `first` rows, and close.

        Raises:
            OSError: It could not be written.
        """
        if self._stream is None:
            return
        try:
            self._write(0, first, memoryview(bytearray(HEAD)))
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
            self._stream = None

    def _next(self, first: int) -> None:
        """Begin a new file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        files = flight_files(self._folder)
        sizes = [one.stat().st_size for one in files]
        old = 0
        while sum(sizes[old:]) + self._max_bytes > self._total_bytes and old < len(files):
            files[old].unlink()
            old += 1
        if old:
            self._on_removal(sum(sizes[:old]))
        number = int(files[-1].stem) + 1 if files else 1
        path = self._folder / f"{number:06d}{SUFFIX}"
        self._stream = io.FileIO(path, "xb")
        self._size = 0
        text = json.dumps({**self._header(), "first": first}, allow_nan=False)
        try:
            self._write(0, first, memoryview(bytearray(HEAD) + text.encode()))
        except OSError:
            # A file without a header cannot be read.
            self._stream.close()
            self._stream = None
            path.unlink(missing_ok=True)
            raise

    def _write(self, rows: int, first: int, frame: memoryview) -> None:
        assert self._stream is not None
        frame[:HEAD] = _head(rows, first, frame[HEAD:])
        left = frame
        try:
            while left:
                left = left[self._stream.write(left) or 0 :]
        except OSError:
            # A full disk may have taken a part of the frame.
            self._stream.truncate(self._size)
            self._stream.seek(self._size)
            raise
        self._size += len(frame)


class Frame(NamedTuple):
    """One frame of a file."""

    rows: int
    """Number of rows."""
    first: int
    """Index of the first row."""
    payload: memoryview
    """The rows, or the header."""


def read_frames(raw: bytes) -> tuple[list[Frame], int]:
    """Return the frames of a file, and the number of damaged stretches that were skipped."""
    frames: list[Frame] = []
    view, at, damaged, inside = memoryview(raw), 0, 0, False
    while at < len(raw):
        found = _frame_at(view, at)
        if found is not None:
            frames.append(found)
            at += HEAD + len(found.payload)
            inside = False
            continue
        damaged += not inside
        inside = True
        following = raw.find(_MAGIC, at + 1)
        at = len(raw) if following < 0 else following
    return frames, damaged


def _frame_at(view: memoryview, at: int) -> Frame | None:
    """Return the frame that begins at a byte; None where none does, or where it is damaged."""
    if len(view) - at < HEAD:
        return None
    magic, rows, first, size, _ = _HEAD.unpack_from(view, at)
    payload = view[at + HEAD : at + HEAD + size]
    if magic != _MAGIC or len(payload) != size:
        return None
    right = _head(rows, first, payload) == view[at : at + HEAD]
    return Frame(rows, first, payload) if right else None


@dataclass(frozen=True)
class Contents:
    """What the files of a folder hold."""

    header: dict[str, Any]
    """The header of the newest file."""
    rows: Array
    """All rows, in the order in which they were written; a structured array."""
    lost: int
    """Number of rows between others, or before all others, that were lost."""
    removed: int
    """Number of rows in the oldest files, which were removed."""
    torn: int
    """Number of damaged stretches that were skipped."""
    closed: bool
    """Whether the recorder was closed after the last row."""
    following: int
    """Index of the next row."""


def read_newest(paths: list[Path]) -> Contents | None:
    """Return what the newest file with a header holds; None where no file has one.

    A recorder that is killed can leave a file without.
    """
    for path in reversed(paths):
        frames, _ = read_frames(read_whole(path, FLIGHT_BYTES))
        if frames and _is_header(frames[0]):
            return read_files([path])
    return None


def read_files(paths: list[Path]) -> Contents:
    """Return what the files of one folder hold, the oldest first.

    Raises:
        ValueError: No file is readable, or one is of another format or release.
        OSError: A file cannot be read.
    """
    read = [read_frames(read_whole(path, FLIGHT_BYTES)) for path in paths]
    headers: list[dict[str, Any]] = []
    for path, (frames, _) in zip(paths, read, strict=True):
        if frames and _is_header(frames[0]):
            headers.append(_header(path, frames[0]))
    if not headers:
        where = ", ".join(str(path) for path in paths) or "the folder"
        raise ValueError(f"{where} holds no flight that can be read: no header is whole")
    header = headers[-1]
    dtype = _dtype_of(header.get("dtype"), paths[0].parent)
    parts: list[Array] = []
    # The first file is there where none was removed; what is missing before it was never written.
    lost, closed, removed = 0, False, 0
    following = 0 if paths[0].stem.isdecimal() and int(paths[0].stem) == 1 else -1
    for frame in (one for frames, _ in read for one in frames):
        if following < 0:
            removed = following = frame.first
        lost += max(frame.first - following, 0)
        following = max(following, frame.first + frame.rows)
        closed = not frame.payload
        if frame.rows:
            if len(frame.payload) != frame.rows * dtype.itemsize:
                raise ValueError(
                    f"the flight in {paths[0].parent} holds blocks of another layout than its "
                    "headers say: its files are of several recorders; separate them"
                )
            parts.append(np.frombuffer(frame.payload, dtype))
    rows = np.concatenate(parts) if parts else np.empty(0, dtype)
    torn = sum(damaged for _, damaged in read)
    return Contents(header, rows, lost, removed, torn, closed, following)


def _dtype_of(told: object, folder: Path) -> np.dtype[Any]:
    """Return the dtype of the rows, which a header tells as `dtype_to_json` does."""
    try:
        rows: Any = told
        (_, kind, (observation,)), (_, _, (action,)) = rows[-1], rows[-2]
        dtype = row_dtype(observation, action, kind == "<f8")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _no_dtype(told, folder) from error
    if dtype_to_json(dtype) != told:
        raise _no_dtype(told, folder)
    return dtype


def _no_dtype(told: object, folder: Path) -> ValueError:
    return ValueError(f"{folder} holds a flight whose header has no readable dtype: {told!r:.200}")


def _is_header(frame: Frame) -> bool:
    return not frame.rows and len(frame.payload) > 0


def _header(path: Path, frame: Frame) -> dict[str, Any]:
    try:
        header = strict_json(bytes(frame.payload), "its header")
        known = (header["format"], header["version"]) == (FORMAT, VERSION)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of a flight recorder: {error}") from error
    if not known:
        raise ValueError(
            f"{path} is a {header['format']!r:.40} of version {header['version']!r:.10}, and this "
            f"release reads {FORMAT!r} of version {VERSION}; install a newer release"
        )
    return dict(header)
