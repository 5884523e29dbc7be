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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes and other calls while this context is open.

    The folder is made if necessary.

    The operating system releases the lock when the process ends, even if it is killed.
    Without file-system locking this has no effect.

    Raises:
        ValueError: Another run has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout as error:
            raise ValueError(
                f"{folder} is being used by another run: wait until that run has ended, or use "
                "another folder (on the command line --parts, for a sweep --out)"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
