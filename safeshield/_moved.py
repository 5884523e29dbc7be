"""Serve the old import paths of modules that have moved, with a DeprecationWarning."""

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
    "safeshield.algorithms.r2pac_updates": ("safeshield.algorithms.r2pac.losses",),
    "safeshield.algorithms.safefql_updates": ("safeshield.algorithms.safefql",),
    "safeshield.algorithms.tensors": ("safeshield.training.log",),
    "safeshield.algorithms.training": (
        "safeshield.training.loop",
        "safeshield.training.schedule",
        "safeshield.training.state",
        "safeshield.training.checkpoint",
    ),
    "safeshield.batch_policy": ("safeshield.rollouts.policies",),
    "safeshield.calibration.policies": ("safeshield.calibration.proposers",),
    "safeshield.calibration.rollouts": ("safeshield.calibration.calibrate",),
    "safeshield.protocol": ("safeshield.evaluation",),
    "safeshield.rollout": ("safeshield.rollouts.episodes",),
    "safeshield.scaling": ("safeshield.spaces.scaling", "safeshield.values.units"),
    "safeshield.shield.model": ("safeshield.shield.critics",),
    "safeshield.types": ("safeshield.spaces.shapes",),
}
"""Old module path -> the modules that now define its names."""


class MovedModules(MetaPathFinder, Loader):
    """Import hook that serves an old module path by looking names up in the new modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for the module `fullname` if it has moved, and None for any other module.

        `path` and `target` are not used.
        """
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Make the names of the new modules available in the old module, with a warning."""
        old, homes = module.__name__, MOVED[module.__name__]
        warnings.warn(
            f"{old} has moved to {' and '.join(homes)}; the old path will be removed",
            DeprecationWarning,
            stacklevel=2,
        )
        modules = [importlib.import_module(home) for home in homes]

        def lookup(name: str) -> object:
            for one in modules:
                if hasattr(one, name):
                    return getattr(one, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = lookup


def install() -> None:
    """Install the import hook for the old paths; a second call changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
