"""Atomic writing of files: after a failure the old file, if there was one, is unchanged.

A file is written under the name ``.NAME.ID.part`` beside it and then renamed. A process that is
killed leaves such a file behind. Each writer locks its own, and the operating system releases the
lock with the process, so the next writer of the same file can tell that it is left over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LEAST_FREE = 16 << 20
"""Free bytes of a disk below which no work is begun whose result it is to take."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


def check_writable(path: Path, expected: int = 0) -> None:
    """Check that the file `path` can be written, so that work whose result it takes is not lost.

    A temporary file is made beside it and removed again, and the free space of the disk is read.

    Args:
        path: The file.
        expected: Size of what will be written, in bytes, as far as it is known. The old file stays
            until the new one is complete, so both need room at once.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: The folder of `path` does not exist.
        OSError: No file with such a name can be made in that folder, there is a device, or the disk
            has too little free space.
    """
    _check_place(path)
    free = _free(path)
    if free < max(expected, LEAST_FREE):
        raise OSError(
            errno.ENOSPC,
            f"cannot write {path}: it needs about {_size(max(expected, LEAST_FREE))} and the disk "
            f"has {_size(free)} free; free some space, or choose a folder on another disk",
        )


def _check_place(path: Path) -> None:
    """Check that a file of this name can be made; see `check_writable`."""
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long.
        raise IsADirectoryError(
            f"cannot write '{path}': it is a folder (an empty path is the current one); give the "
            "name of a file"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(
            f"cannot write {path}: it is a device or another special file, which a file would "
            "replace; give the name of a file"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: make the folder {path.parent} first")
    part = _beside(path)
    try:
        part.touch()
        part.unlink(missing_ok=True)  # Another writer may have taken it for left over.
    except OSError as error:
        raise type(error)(
            f"cannot write {path}: {error.strerror}; choose another name, or a folder in which you "
            "may write"
        ) from error


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:  # A file system that does not tell.
        return sys.maxsize


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` if the block raises no error.

    Where `path` is a symbolic link, the file to which it points is replaced. The new file has the
    permissions of the old one. Temporary files that killed writers of `path` have left are removed.

    Raises:
        OSError: `path` cannot be written, see `check_writable`; or the disk is full.
    """
    if os.path.islink(path):
        path = Path(os.path.realpath(path))
    # No least of free space here: what has been worked for is written wherever it fits.
    _check_place(path)
    _remove_left(path)
    part = _beside(path)
    try:
        with _held(part):
            yield part
            if os.path.exists(path):
                part.chmod(path.stat().st_mode)
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            part.replace(path)
    except Exception as error:
        if not _is_full(error):
            raise
        part.unlink(missing_ok=True)
        kept = f"; the old {path.name} is unchanged" if os.path.exists(path) else ""
        raise OSError(
            errno.ENOSPC,
            f"cannot write {path}: the disk is full, or a quota or limit is reached "
            f"({_size(_free(path))} free){kept}; free some "
            "space, or choose a folder on another disk",
        ) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(part: Path) -> Iterator[None]:
    """Make a temporary file, and hold a lock on it while the context is open."""
    if sys.platform == "win32":
        yield
        return
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # Without file-system locking nothing is removed.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # Another writer took it for left over before it was locked.
    try:
        yield
    finally:
        os.close(descriptor)


def _remove_left(path: Path) -> None:
    """Remove the temporary files of writers of `path` that are dead."""
    if sys.platform == "win32":
        return
    named = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.part")
    try:
        left = [one for one in path.parent.iterdir() if named.fullmatch(one.name)]
    except OSError:  # A folder that may be written and not read.
        return
    for part in left:
        with contextlib.suppress(OSError), part.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it followed from, says that a disk is full.

    The HDF5 library passes the reason on in words only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
