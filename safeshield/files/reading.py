"""Reading of files from strangers: one descriptor, limits before allocation, strict JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """A limit on what a file may claim, which an environment variable of its name can raise.

    >>> Limit("SAFESHIELD_MAX_PARTS", 3, "parts").check(3, "a file")
    >>> Limit("SAFESHIELD_MAX_PARTS", 3, "parts").check(4, "a file")
    Traceback (most recent call last):
    ...
    ValueError: a file has 4 parts, more than the limit of 3; if you trust where it comes from, \
set the environment variable SAFESHIELD_MAX_PARTS to a larger number
    """

    variable: str
    """Name of the environment variable that holds another limit."""
    default: int
    """The limit where the variable is not set."""
    what: str
    """What is counted, for error messages."""

    @property
    def value(self) -> int:
        """The limit that applies now.

        Raises:
            ValueError: The environment variable does not hold a whole number of at least 0.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not text.isdecimal():
            raise ValueError(
                f"the environment variable {self.variable} must be a whole number, got {text!r:.40}"
            )
        return int(text)

    def check(self, count: int, subject: str) -> None:
        """Raise ValueError where `subject` has more than the limit."""
        if count > (most := self.value):
            raise ValueError(f"{subject} has {self.text(count, most)}")

    def text(self, count: int, most: int) -> str:
        """Return the end of an error message: the count, the limit and how to raise it."""
        told = f"{count}" if count < 2**64 else "more than 2**64"
        return (
            f"{told} {self.what}, more than the limit of {most}; if you trust where it comes from, "
            f"set the environment variable {self.variable} to a larger number"
        )


LOG_BYTES = Limit("SAFESHIELD_MAX_LOG_BYTES", 128 * MIB, "bytes of arrays in memory")
"""Bytes that the arrays of a log may take in memory, whatever the size of its file."""
LOG_EXPANSION = 64
"""A log whose arrays take at most this many times the size of its file is read, even if they take
more than `LOG_BYTES`."""
LOG_MEMBERS = Limit("SAFESHIELD_MAX_LOG_MEMBERS", 1000, "members")
"""Largest number of arrays and groups in the file of a log."""
LOG_HEADER = Limit("SAFESHIELD_MAX_LOG_HEADER", 32 * MIB, "bytes of header")
"""Bytes of the header of a log, unpacked."""
MODEL_HEADER = Limit("SAFESHIELD_MAX_MODEL_HEADER", 4 * MIB, "bytes of header")
"""Bytes of the header of an agent, a shield or a checkpoint."""
MODEL_NUMBERS = Limit("SAFESHIELD_MAX_MODEL_NUMBERS", 1 << 29, "numbers in its tensors")
"""Numbers in all tensors of an agent, a shield or a checkpoint."""
JSON_PARTS = Limit("SAFESHIELD_MAX_JSON_PARTS", 1 << 17, "lists and objects in its header")
"""Lists and objects in a header."""
SPACE_NUMBERS = Limit("SAFESHIELD_MAX_SPACE_NUMBERS", 1 << 20, "numbers")
"""Numbers in one point of a whole space."""
SPACE_MEMBERS = Limit("SAFESHIELD_MAX_SPACE_MEMBERS", 4096, "members")
"""Members of a whole Dict space, those of its Dict members included."""
SPACE_DEPTH = Limit("SAFESHIELD_MAX_SPACE_DEPTH", 8, "levels of Dict spaces in each other")
"""Levels of Dict spaces in each other."""
FLIGHT_BYTES = Limit("SAFESHIELD_MAX_FLIGHT_BYTES", 4 << 30, "bytes")
"""Bytes of one file of a flight recorder."""
TEXT_BYTES = Limit("SAFESHIELD_MAX_TEXT_BYTES", 64 * MIB, "bytes")
"""Bytes of a file of settings or of a small record, which is read as a whole."""


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a regular file, opened once for reading.

    Everything that is known of the file is then read from this descriptor, so that it belongs to
    one file even where another process replaces the file meanwhile. The stream has no buffer.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        OSError: It is a pipe, a socket or a device, or it cannot be read.
    """
    # Opening a pipe without O_NONBLOCK waits for a writer. Only POSIX has the flag, and pipes here.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {os.fspath(path)}") from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # A socket.
            raise _irregular(path) from error
        if os.path.isdir(path):  # Windows does not open folders.
            raise _folder(path) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    raise _folder(path) if stat.S_ISDIR(mode) else _irregular(path)


def size_of(stream: BinaryIO) -> int:
    """Return the number of bytes of an opened file."""
    return os.fstat(stream.fileno()).st_size


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """Return the next `count` bytes of a stream, fewer where it ends before."""
    parts = []
    while count > 0 and (part := stream.read(min(count, 1 << 30))):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_whole(path: str | os.PathLike[str], limit: Limit = TEXT_BYTES) -> bytes:
    """Return the contents of a regular file, whose size must not exceed a limit.

    Raises:
        OSError: See `opened`.
        ValueError: The file is larger.
    """
    with opened(path) as stream:
        size = size_of(stream)
        limit.check(size, str(path))
        return read_exactly(stream, size)


def strict_json(raw: bytes, subject: str) -> dict[str, Any]:
    """Return a JSON object, without the extensions that Python's parser accepts.

    Lists and objects are counted before they are made. NaN, infinities and keys that occur twice
    are refused.

    Args:
        raw: The text in UTF-8.
        subject: Beginning of error messages, such as "log.npz: its header".

    Raises:
        ValueError: It is no such object, or has more parts than `JSON_PARTS`.
    """
    JSON_PARTS.check(raw.count(b"[") + raw.count(b"{"), subject)
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{subject} is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{subject} must be a JSON object, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _folder(path: str | os.PathLike[str]) -> IsADirectoryError:
    return IsADirectoryError(f"{os.fspath(path)} is a folder; give a file in it")


def _irregular(path: str | os.PathLike[str]) -> OSError:
    return OSError(
        f"{Path(path)} is a pipe, a socket or a device, which is not read; give a regular file"
    )
