"""Units: how raw observations, actions and constraints become what the networks see, and back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import OfflineDataset

# Below this share of its own size the spread of an observation entry is rounding, not information.
_CONSTANT = 1e-6
_LARGEST = float(np.finfo(np.float32).max)
CONSTRAINT, EXCESS, ADVANTAGE = "constraint", "excess", "advantage"
SAFETY_NETWORKS = (CONSTRAINT, EXCESS, ADVANTAGE)
"""Names of the safety critics' networks, in memory and in files; see `values.safety`."""


def finite_number(value: object, what: str) -> float:
    """Return a number read from a file's header as a float that float32 can hold, too.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{what} must be finite numbers below {_LARGEST:.1e}")
    return float(value)


@dataclass(frozen=True)
class Scaling:
    """How raw observations and actions become what the networks see."""

    observation_mean: npt.NDArray[np.float32]
    """(obs,) mean over the log."""
    observation_spread: npt.NDArray[np.float32]
    """(obs,) standard deviation over the log; 1 for entries that never change."""
    action_low: npt.NDArray[np.float32]
    """(act,) lower corner of the action box, which becomes -1."""
    action_high: npt.NDArray[np.float32]
    """(act,) upper corner, which becomes +1."""

    @classmethod
    def of(cls, dataset: OfflineDataset) -> Scaling:
        """Read the scaling off a log; the action box must be bounded."""
        low, high = dataset.action_space.low, dataset.action_space.high
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(
                "action_space must be a bounded box with low < high in every entry, got "
                f"{dataset.action_space}; wrap the environment in RescaleAction or narrow the box"
            )
        mean = dataset.observations.mean(0, dtype=np.float64)
        spread = dataset.observations.std(0, dtype=np.float64)
        floor = _CONSTANT * np.maximum(np.abs(mean), 1.0)
        spread = np.where(spread > floor, spread, 1.0)
        return cls(
            mean.astype(np.float32),
            spread.astype(np.float32),
            low.astype(np.float32),
            high.astype(np.float32),
        )

    def to_json(self) -> dict[str, list[float]]:
        """Return the four arrays as lists, for a file's header."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name).tolist() for field in fields}

    @classmethod
    def from_json(cls, data: dict[str, list[float]], observation: int, action: int) -> Scaling:
        """Rebuild a scaling, checking widths and values.

        Raises:
            ValueError: a list is missing, of another length, not finite or out of order.
        """
        widths = dict.fromkeys(("observation_mean", "observation_spread"), observation)
        widths |= dict.fromkeys(("action_low", "action_high"), action)
        arrays = {}
        for name, width in widths.items():
            values = data.get(name)
            if not isinstance(values, list) or len(values) != width:
                raise ValueError(f"scaling '{name}' must be a list of {width} numbers")
            numbers = [finite_number(value, f"scaling '{name}'") for value in values]
            arrays[name] = np.array(numbers, dtype=np.float32)
        scaling = cls(**arrays)
        if (scaling.observation_spread <= 0).any():
            raise ValueError("scaling 'observation_spread' must be above 0")
        if (scaling.action_low >= scaling.action_high).any():
            raise ValueError("scaling 'action_low' must lie below 'action_high'")
        return scaling

    def observations(self, raw: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Normalise observations (..., obs)."""
        return np.asarray((raw - self.observation_mean) / self.observation_spread, np.float32)

    def actions(self, raw: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Map actions (..., act) from the box to [-1, 1]."""
        unit = (raw - self.action_low) / (self.action_high - self.action_low)
        return np.asarray(2.0 * unit - 1.0, np.float32)

    def to_box(self, scaled: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Map actions (..., act) from [-1, 1] to the box, never outside it."""
        unit = 0.5 * (scaled + 1.0)
        raw = self.action_low + unit * (self.action_high - self.action_low)
        return np.asarray(np.clip(raw, self.action_low, self.action_high), np.float32)


@dataclass(frozen=True)
class SafetyScale:
    """Units of the networks' outputs, read off the log; in units of h."""

    offset: float
    """Mean of h."""
    spread: float
    """Standard deviation of h."""
    step: float
    """Root mean square of h(s') - h(s), one step's worth of h: sigma."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.offset, self.spread, self.step)):
            raise ValueError(f"the units of h must be finite, got {self}")
        if self.spread <= 0 or self.step <= 0:
            raise ValueError(f"spread and step of h must be above 0, got {self}")

    @classmethod
    def from_json(cls, data: object) -> SafetyScale:
        """Rebuild from a file's header.

        Raises:
            ValueError: a number is missing, unknown, or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(
                f"the units of h must be the numbers {sorted(names)}, got {data!r:.80}"
            )
        return cls(**{name: finite_number(value, name) for name, value in data.items()})

    @property
    def excess(self) -> float:
        """Unit of V - h^, which is small beside the spread of h itself."""
        return 0.2 * self.spread
