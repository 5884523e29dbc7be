"""Loading of a user's own algorithms from a Python file named on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

# Registers this package's algorithms first, so that a plugin cannot take their names.
import safeshield.algorithms.registry  # noqa: F401


def load_plugin(file: Path) -> None:
    """Import a Python file. As with ``python FILE``, it can import modules from its own folder.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Another module has the same name.
    """
    if not file.is_file():
        raise FileNotFoundError("no such file")
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(file.stem)
        if module.__file__ is None or not file.samefile(module.__file__):
            raise ImportError(f"another module is called '{file.stem}'; give the file another name")
    except BaseException:
        # A file such as random.py would stand before Python's own module in every child process.
        sys.path.remove(folder)
        raise
