"""Locks on a folder or a file, which the operating system releases when the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
"""Name of the lock file. The file stays in the folder; its presence does not mean a lock."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)
_RUN = (
    "is being used by another run: wait until that run has ended, or use another folder (on the "
    "command line --parts, for a sweep --out)"
)


@contextlib.contextmanager
def locked(folder: Path, why: str = _RUN, *, timeout: float = 0.0) -> Iterator[None]:
    """Lock a folder against other processes and other calls while this context is open.

    The folder is made if necessary. The context may be left by another thread than the one that
    entered it.

    The operating system releases the lock when the process ends, even if it is killed.
    Without file-system locking this has no effect.

    Args:
        folder: The folder.
        why: What is said of a folder that is locked, after its name in the error.
        timeout: Time to wait for the lock, in seconds.

    Raises:
        ValueError: Another run has locked the folder.
        OSError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"cannot make the folder {folder}: {error.strerror}; choose another name, or a folder "
            "in which you may write"
        ) from error
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / LOCK, timeout=timeout, thread_local=False))
        except Timeout as error:
            raise ValueError(f"{folder} {why}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def is_locked(folder: Path) -> bool:
    """Return whether another process, or another call, has locked a folder.

    The result is False where this cannot be found out, as in a folder that may not be written.
    """
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the file `path` for a run that will write it, while this context is open.

    The lock is a file ``.NAME.lock`` beside it, which says who has it. Whoever holds the lock
    removes this file in the end; one that a killed process has left means no lock. Without
    file-system locking this has no effect.

    Raises:
        ValueError: Another run has the file; the message names its process, machine and start.
        OSError: The lock cannot be made in that folder.
    """
    path = Path(os.path.realpath(path))
    mark = path.with_name(f".{path.name}.lock")
    if sys.platform == "win32":
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(FileLock(mark, timeout=0, thread_local=False))
            except Timeout as error:
                raise _taken(path, "") from error
            yield
        return
    while True:
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise _taken(path, who) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if _is_at(descriptor, mark):
            break
        os.close(descriptor)  # The run that had it removed this file just before.
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, who.encode())
        yield
    finally:
        if _is_at(descriptor, mark):
            mark.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, mark: Path) -> bool:
    """Return whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(mark))
    except FileNotFoundError:
        return False


def _taken(path: Path, who: str) -> ValueError:
    return ValueError(
        f"{path} is being written by another run ({who or 'which does not say who it is'}): wait "
        "until that run has ended, or give another file"
    )
