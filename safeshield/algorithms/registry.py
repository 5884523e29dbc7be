"""Import of this module registers the algorithms of this package and of other installed packages.

Another package offers its algorithms by an entry point in the group "safeshield.algorithms". The
entry point names the module that registers them.
"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

from safeshield.algorithms import (  # noqa: F401 - each registers itself
    behaviour_cloning,
    fisor,
    flrp,
    r2pac,
    safefql,
    shield_trainer,
)
from safeshield.online import ssql  # noqa: F401
from safeshield.training.registry import ALGORITHMS, load_agent, offline_algorithm, register

__all__ = ["ALGORITHMS", "load_agent", "offline_algorithm", "register"]

GROUP = "safeshield.algorithms"

for point in entry_points(group=GROUP):
    try:
        point.load()
    except Exception as error:
        warnings.warn(
            f"the algorithms of the entry point '{point.name}' ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}; repair or remove the package that declares it",
            stacklevel=2,
        )
