"""A lock on a folder that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = "lock"
"""Name of the file that is locked; the file stays, and means nothing by itself."""
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, against other processes and other calls.

    The operating system gives it free when the file is closed: also where the process is killed.
    A file system that knows no locks holds nobody off.

    Raises:
        ValueError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:
        try:
            _take(file)
        except OSError as error:
            if error.errno in _TAKEN:
                raise ValueError(
                    f"{folder} is being used by another run, which goes on from it too: wait until "
                    "that has ended, or use another folder (on the command line --parts)"
                ) from error
        yield
