"""Shapes as types: the array aliases that every module shares.

``*batch`` stands for any number of leading axes, none included; ``obs`` and ``act`` for the
widths of one flat observation and one action. The test suite checks them at run time.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Num

Observations: TypeAlias = Num[np.ndarray, "*batch obs"]
Actions: TypeAlias = Num[np.ndarray, "*batch act"]
Rows: TypeAlias = Num[np.ndarray, "n width"]
"""n points of a space, in its own units: see `spaces.rows`."""
Scalars: TypeAlias = Float[np.ndarray, "*batch"]
Flags: TypeAlias = Bool[np.ndarray, "*batch"]
Noise: TypeAlias = Num[np.ndarray, "*batch z"]
"""What a random actor draws its actions with; z is the width of an action, or of a latent space."""
Candidates: TypeAlias = Num[np.ndarray, "states each act"]
"""Several actions for each of several states."""
Judged: TypeAlias = Float[np.ndarray, "states each"]
"""A value for each of them."""
