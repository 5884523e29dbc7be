"""A lock on a folder that the operating system releases when the process ends."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

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
    """
    folder.mkdir(parents=True, exist_ok=True)
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
