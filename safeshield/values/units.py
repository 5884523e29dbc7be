"""Units of the constraint h, the formulas of V_h and Q_h in these units, and network names.

`values.safety` describes the networks and their training targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import finite_number
from safeshield.nn.actor import BEHAVIOUR as BEHAVIOUR
from safeshield.nn.actor import FALLBACK as FALLBACK
from safeshield.nn.arrays import C, relu
from safeshield.nn.plan_actor import PLAN as PLAN

CONSTRAINT, EXCESS, ADVANTAGE = "constraint", "excess", "advantage"


SAFETY_NETWORKS = (CONSTRAINT, EXCESS, ADVANTAGE)
"""Names of the safety critics' networks, in memory and in files, as in `values.safety`."""


@dataclass(frozen=True)
class SafetyScale:
    """Offset and units of the networks' outputs, computed from a log, in units of h."""

    offset: float
    """Mean of h over the log."""
    spread: float
    """Standard deviation of h over the log."""
    step_rms: float
    """Root mean square of h(s') - h(s) over the log, the unit sigma of the advantages."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.offset, self.spread, self.step_rms)):
            raise ValueError(f"the units of h must be finite, got {self}")
        if self.spread <= 0 or self.step_rms <= 0:
            raise ValueError(f"spread and step of h must be above 0, got {self}")

    def to_json(self) -> dict[str, float]:
        """Return the numbers for a file's header, where `step_rms` is called "step"."""
        return {"offset": self.offset, "spread": self.spread, "step": self.step_rms}

    @classmethod
    def from_json(cls, data: object) -> SafetyScale:
        """Return the units that `to_json` wrote to a file's header as `data`, after a check.

        Raises:
            ValueError: A number is missing, unknown or out of range.
        """
        names = ("offset", "spread", "step")
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(
                f"the units of h must be the numbers {sorted(names)}, got {data!r:.80}"
            )
        return cls(*(finite_number(data[name], name) for name in names))

    @property
    def rounding(self) -> float:
        """Difference that rounding may make between values of the same state, in units of h.

        The last digits of a value depend on the batch in which it is computed.
        """
        return 1e-6 * (abs(self.offset) + self.spread)

    @property
    def agreement(self) -> float:
        """Largest difference between two measurements of the same h, in units of h.

        The lidar of a tilted car, from which its source reads a distance, is off by about half of
        that.
        """
        return 0.02 * self.spread

    @property
    def excess(self) -> float:
        """Unit of V - h^, which is small compared with the standard deviation of h."""
        return 0.2 * self.spread


def step_rms(now: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> float:
    """Return the root mean square of h(s') - h(s) over N steps, in units of h.

    `now` (N,) is h of the states s, and `after` (N,) of the states s'.
    """
    return math.sqrt(float(np.mean((after - now) ** 2)))


def state_value(scale: SafetyScale, constraint: C, excess: C) -> C:
    """Return V_h(s) = h^(s) + max(e(s), 0), in units of h, from the outputs of two networks.

    `constraint` and `excess` are these outputs, and `scale` converts them to units of h.
    """
    return scale.offset + scale.spread * constraint + relu(scale.excess * excess)


def known_value(scale: SafetyScale, h: C, excess: C) -> C:
    """Return V_h(s) = h(s) + max(e(s), 0), in units of h, where h(s) is known exactly.

    `h` is known in units of h, `excess` is the output of the network of e, and `scale` converts it
    to units of h.
    """
    return h + relu(scale.excess * excess)


def constraint_of(scale: SafetyScale, value: C, excess: C) -> C:
    """Return h(s) = V_h(s) - max(e(s), 0), in units of h: the inverse of `known_value`.

    `value` is V_h in units of h, `excess` is the output of the network of e, and `scale` converts
    it to units of h. Where V_h was computed from a network's estimate of h, the result is that
    estimate.
    """
    return value - relu(scale.excess * excess)


def action_value(scale: SafetyScale, value: C, advantage: C) -> C:
    """Return Q_h(s, a) = V_h(s) + sigma A(s, a), in units of h, where A is max_i A_i.

    `value` is V_h in units of h, `advantage` is A, and `scale` holds sigma.
    """
    return value + scale.step_rms * advantage
