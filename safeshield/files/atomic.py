"""Atomic writing of files: after a failure the old file, if there was one, is unchanged."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: Path) -> None:
    """Check that the file `path` can be written, so that work whose result it takes is not lost.

    A temporary file is made beside it and removed again.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: The folder of `path` does not exist.
        OSError: No file with such a name can be made in that folder, or there is a device.
    """
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
        part.unlink()
    except OSError as error:
        raise type(error)(
            f"cannot write {path}: {error.strerror}; choose another name, or a folder in which you "
            "may write"
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` if the block raises no error.

    Where `path` is a symbolic link, the file to which it points is replaced. The new file has the
    permissions of the old one.

    Raises:
        OSError: `path` cannot be written; see `check_writable`.
    """
    if os.path.islink(path):
        path = Path(os.path.realpath(path))
    check_writable(path)
    part = _beside(path)
    try:
        yield part
        if os.path.exists(path):
            part.chmod(path.stat().st_mode)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
