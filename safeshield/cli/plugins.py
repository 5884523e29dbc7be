"""Algorithms of a user's own, from a Python file that is named on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

# What such a file registers must not take the names of this package's algorithms.
import safeshield.algorithms.registry  # noqa: F401


def load_plugin(file: Path) -> None:
    """Import a file, beside which it finds its own imports, as ``python FILE`` does.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: another module has its name.
    """
    if not file.is_file():
        raise FileNotFoundError("no such file")
    sys.path.insert(0, str(file.resolve().parent))
    module = importlib.import_module(file.stem)
    if module.__file__ is None or not file.samefile(module.__file__):
        raise ImportError(f"another module is called '{file.stem}'; give the file another name")
