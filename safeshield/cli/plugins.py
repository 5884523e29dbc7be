"""Algorithms of a user's own, from a Python file that is named on the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# What such a file registers must not take the names of this package's algorithms.
import safeshield.algorithms.registry  # noqa: F401


def load_plugin(file: Path) -> None:
    """Run a file, once; what it defines with `register` is then known to every command.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is no Python file.
    """
    if not file.is_file():
        raise FileNotFoundError("no such file")
    name = str(file.resolve())
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
