"""Type aliases for arrays with their shapes, shared by all modules.

``*batch`` stands for any number of leading axes, possibly none. ``obs`` and ``act`` are the widths
of one flat observation and one action. CI checks these shapes at run time in some of the tests.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Num

Observations: TypeAlias = Num[np.ndarray, "*batch obs"]
Actions: TypeAlias = Num[np.ndarray, "*batch act"]
Rows: TypeAlias = Num[np.ndarray, "n width"]
"""n points of a space in its own units, as described in `spaces.rows`."""
Points: TypeAlias = Num[np.ndarray, "*batch width"]
"""Points of a space in its own units, with any number of leading axes."""
Scalars: TypeAlias = Float[np.ndarray, "*batch"]
Flags: TypeAlias = Bool[np.ndarray, "*batch"]
Noise: TypeAlias = Num[np.ndarray, "*batch z"]
"""Noise from which a random actor computes actions; z is the width of an action or of a latent."""
Candidates: TypeAlias = Num[np.ndarray, "states each act"]
"""Several actions for each of several states."""
Judged: TypeAlias = Float[np.ndarray, "states each"]
"""One value for each of several candidates for each of several states."""
