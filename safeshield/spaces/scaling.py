"""Conversion of raw observations and actions to the inputs of the networks, and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import finite_number
from safeshield.spaces.rows import SpaceCodec

# An observation entry counts as constant if its spread is below this share of its magnitude, since
# such a spread is rounding error.
_CONSTANT = 1e-6
_PART = 65_536
"""Number of rows that are converted to double precision together."""
# NumPy would convert a Python number to an array in every call.
_ONE, _TWO = np.ones((), np.float32), np.full((), 2.0, np.float32)


class LoggedRows(Protocol):
    """The attributes of a log, such as an `OfflineDataset`, from which a scaling is computed."""

    @property
    def observations(self) -> npt.NDArray[np.float32]:
        """Observations as rows, (N, obs)."""
        ...

    @property
    def flat_observations(self) -> SpaceCodec:
        """Converter of the observation space."""
        ...

    @property
    def flat_actions(self) -> SpaceCodec:
        """Converter of the action space."""
        ...


@dataclass(frozen=True)
class Scaling:
    """Conversion of rows of observations and actions (see `spaces.rows`) to network inputs.

    The continuous columns come first. Those of observations are normalised, and those of actions
    are mapped to [-1, 1]. Each discrete column then follows as one indicator per integer value.
    """

    observation_mean: npt.NDArray[np.float32]
    """(obs,) mean over the log; for a discrete column its lowest integer."""
    observation_spread: npt.NDArray[np.float32]
    """(obs,) standard deviation over the log; 1 for constant and for discrete columns."""
    action_low: npt.NDArray[np.float32]
    """(act,) lower corner of the action box, which is mapped to -1."""
    action_high: npt.NDArray[np.float32]
    """(act,) upper corner of the action box, which is mapped to +1."""
    observation_categories: tuple[int, ...] = ()
    """Number of integer values of each observation column, 0 for a continuous one; () where all
    columns are continuous."""
    action_categories: tuple[int, ...] = ()
    """The same numbers for the action columns."""

    @classmethod
    def of(cls, dataset: LoggedRows) -> Scaling:
        """Return the scaling of a log `dataset`, whose action box must be bounded."""
        return cls.of_rows(dataset.observations, dataset.flat_observations, dataset.flat_actions)

    @classmethod
    def of_rows(
        cls, rows: npt.NDArray[np.float32], observations: SpaceCodec, actions: SpaceCodec
    ) -> Scaling:
        """Return the scaling of observations and of an action space.

        Args:
            rows: (n, obs) observations, from which mean and spread are computed.
            observations: Converter of the observation space.
            actions: Converter of the action space, whose bounds are mapped to -1 and 1.

        Raises:
            ValueError: The action box is not bounded, or an entry has no width.
        """
        low, high = actions.low, actions.high
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(
                "action_space must be a bounded box with low < high in every entry, got "
                f"{actions.space}; wrap the environment in RescaleAction or narrow the box"
            )
        mean = _sums(rows) / len(rows)
        spread = np.sqrt(_sums(rows, mean) / len(rows))
        floor = _CONSTANT * np.maximum(np.abs(mean), 1.0)
        spread = np.where(spread > floor, spread, 1.0)
        counts = np.array(observations.categories, dtype=bool)
        return cls(
            np.where(counts, observations.low, mean).astype(np.float32),
            np.where(counts, 1.0, spread).astype(np.float32),
            low.astype(np.float32),
            high.astype(np.float32),
            observations.categories if counts.any() else (),
            actions.categories if any(actions.categories) else (),
        )

    @property
    def observation_features(self) -> int:
        """Number of network inputs for one observation."""
        return _features(len(self.observation_mean), self.observation_categories)

    @property
    def action_features(self) -> int:
        """Number of network inputs for one action."""
        return _features(len(self.action_low), self.action_categories)

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of network inputs for one observation and for one action."""
        return self.observation_features, self.action_features

    @cached_property
    def _action_range(self) -> npt.NDArray[np.float32]:
        return self.action_high - self.action_low

    def to_json(self) -> dict[str, list[float]]:
        """Return the arrays as lists, for a file's header; empty categories are left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else list(value)
            for name, value in fields.items()
            if len(value)
        }

    @classmethod
    def from_json(
        cls, data: dict[str, list[float]], observations: SpaceCodec, actions: SpaceCodec
    ) -> Scaling:
        """Return the scaling in a file's header, after a check of its widths and values.

        Args:
            data: The lists that `to_json` returned.
            observations: Converter of the observation space.
            actions: Converter of the action space.

        Raises:
            ValueError: A list is missing, has another length, is not finite or is out of order.
        """
        widths = dict.fromkeys(("observation_mean", "observation_spread"), observations.width)
        widths |= dict.fromkeys(("action_low", "action_high"), actions.width)
        arrays: dict[str, npt.NDArray[np.float32]] = {}
        for name, width in widths.items():
            values = data.get(name)
            if not isinstance(values, list) or len(values) != width:
                raise ValueError(f"scaling '{name}' must be a list of {width} numbers")
            numbers = [finite_number(value, f"scaling '{name}'") for value in values]
            arrays[name] = np.array(numbers, dtype=np.float32)
        categories: dict[str, tuple[int, ...]] = {}
        for name, flat in (("observation", observations), ("action", actions)):
            expected = flat.categories if any(flat.categories) else ()
            if data.get(f"{name}_categories", []) != list(expected):
                raise ValueError(f"scaling '{name}_categories' must be those of the space")
            categories[f"{name}_categories"] = expected
        scaling = cls(
            arrays["observation_mean"],
            arrays["observation_spread"],
            arrays["action_low"],
            arrays["action_high"],
            categories["observation_categories"],
            categories["action_categories"],
        )
        if (scaling.observation_spread <= 0).any():
            raise ValueError("scaling 'observation_spread' must be above 0")
        if (scaling.action_low >= scaling.action_high).any():
            raise ValueError("scaling 'action_low' must lie below 'action_high'")
        return scaling

    def observations(self, raw: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return the network inputs (..., features) of rows of observations `raw` (..., obs)."""
        scaled = raw - self.observation_mean
        scaled /= self.observation_spread
        scaled = np.asarray(scaled, np.float32)
        if not self.observation_categories:
            return scaled
        return _indicators(scaled, scaled, self.observation_categories)

    def actions(self, raw: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return the network inputs (..., features) of rows of actions `raw` (..., act).

        Continuous entries are mapped to [-1, 1].
        """
        scaled = raw - self.action_low
        scaled /= self._action_range
        scaled *= _TWO
        scaled -= _ONE
        scaled = np.asarray(scaled, np.float32)
        if not self.action_categories:
            return scaled
        return _indicators(scaled, raw - self.action_low, self.action_categories)

    def to_box(self, scaled: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return continuous actions `scaled` (..., act) in [-1, 1] as rows in the units of the box.

        Numbers outside [-1, 1] are clipped to the box.
        """
        unit = 0.5 * (scaled + 1.0)
        raw = self.action_low + unit * self._action_range
        return np.asarray(np.clip(raw, self.action_low, self.action_high), np.float32)


def _sums(
    rows: npt.NDArray[np.floating], mean: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Return the sum of each column of `rows` (n, width), or of its squared distances from `mean`.

    The rows are read in parts, so that no copy of a large log in double precision is made.
    """
    total = np.zeros(rows.shape[1])
    for start in range(0, len(rows), _PART):
        part = rows[start : start + _PART].astype(np.float64)
        total += (part if mean is None else np.square(part - mean)).sum(0)
    return total


def _features(width: int, categories: tuple[int, ...]) -> int:
    return sum(n or 1 for n in categories) if categories else width


def _indicators(
    scaled: npt.NDArray[np.float32], counted: npt.NDArray[np.floating], categories: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return the continuous columns of `scaled`, then the indicators of the discrete columns."""
    parts = [scaled[..., [i for i, n in enumerate(categories) if not n]]]
    for i, n in enumerate(categories):
        if n:
            parts.append((np.rint(counted[..., i, None]) == np.arange(n)).astype(np.float32))
    return np.concatenate(parts, axis=-1)
