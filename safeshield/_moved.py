"""Modules that have moved: the old import path loads the new module, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    "safeshield.algorithms.registry": "safeshield.training.registry",
    "safeshield.algorithms.safefql_updates": "safeshield.algorithms.safefql",
    "safeshield.algorithms.tensors": "safeshield.training.log",
    "safeshield.algorithms.training": "safeshield.training.loop",
    "safeshield.batch_policy": "safeshield.rollouts.policies",
    "safeshield.calibration.policies": "safeshield.calibration.proposers",
    "safeshield.calibration.rollouts": "safeshield.calibration.calibrate",
    "safeshield.protocol": "safeshield.evaluation",
    "safeshield.rollout": "safeshield.rollouts.episodes",
    "safeshield.scaling": "safeshield.spaces.scaling",
    "safeshield.shield.model": "safeshield.shield.critics",
    "safeshield.types": "safeshield.spaces.shapes",
}
"""Old module -> new module."""


class MovedModules(MetaPathFinder, Loader):
    """Loads the new module under the old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module that has moved, None for any other."""
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module in the place of the old one."""
        old = module.__name__
        warnings.warn(
            f"{old} has moved to {MOVED[old]}; the old path will be removed",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Let old import paths load the new modules."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
