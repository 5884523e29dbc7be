"""A lock on a folder that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"
"""Name of the file that is locked; the file stays, and means nothing by itself."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, against other processes and other calls.

    The operating system releases the lock when its process ends, also where that is killed.
    Without file-system locking this has no effect.

    Raises:
        ValueError: another run holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout as error:
            raise ValueError(
                f"{folder} is being used by another run, which goes on from it too: wait until "
                "that has ended, or use another folder (on the command line --parts)"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
