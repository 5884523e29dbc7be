"""Units of the constraint h, and the names of the networks that a shield is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safeshield.files.schema import finite_number

CONSTRAINT, EXCESS, ADVANTAGE = "constraint", "excess", "advantage"


SAFETY_NETWORKS = (CONSTRAINT, EXCESS, ADVANTAGE)
"""Names of the safety critics' networks, in memory and in files; see `values.safety`."""


FALLBACK, BEHAVIOUR, PLAN = "student", "behaviour", "plan_advantage"
"""Names of a shield's fallback actor, of the network that imitates the log, and of the critic of
whole plans."""


@dataclass(frozen=True)
class SafetyScale:
    """Units of the networks' outputs, read off the log; in units of h."""

    offset: float
    """Mean of h."""
    spread: float
    """Standard deviation of h."""
    step_rms: float
    """Root mean square of h(s') - h(s), one step's worth of h: sigma."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.offset, self.spread, self.step_rms)):
            raise ValueError(f"the units of h must be finite, got {self}")
        if self.spread <= 0 or self.step_rms <= 0:
            raise ValueError(f"spread and step of h must be above 0, got {self}")

    def to_json(self) -> dict[str, float]:
        """Return the units for a file's header, where `step_rms` is called "step"."""
        return {"offset": self.offset, "spread": self.spread, "step": self.step_rms}

    @classmethod
    def from_json(cls, data: object) -> SafetyScale:
        """Rebuild from a file's header.

        Raises:
            ValueError: a number is missing, unknown, or out of range.
        """
        names = ("offset", "spread", "step")
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(
                f"the units of h must be the numbers {sorted(names)}, got {data!r:.80}"
            )
        return cls(*(finite_number(data[name], name) for name in names))

    @property
    def excess(self) -> float:
        """Unit of V - h^, which is small beside the spread of h itself."""
        return 0.2 * self.spread
