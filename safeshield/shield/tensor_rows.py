"""The points of a space as rows of PyTorch tensors, as `spaces.rows` has them for arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.shield.replacement import float32_range
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling

TensorBatch = Tensor | Mapping[str, Any]
"""n points: a tensor (n, *shape), or a dict of such tensors for a Dict space."""


class TensorRange:
    """Ranges of the entries of rows (n, width), compared exactly in the dtype of the rows."""

    def __init__(
        self,
        low: npt.NDArray[np.float64],
        high: npt.NDArray[np.float64],
        counts: npt.NDArray[np.bool_] | None,
        device: torch.device,
    ) -> None:
        self._exact = [torch.tensor(end, device=device) for end in (low, high)]
        self._single = [torch.tensor(end, device=device) for end in float32_range(low, high)]
        self._free = None if counts is None else torch.tensor(~counts, device=device)

    def entries(self, rows: Tensor) -> Tensor:
        """Return which entries (n, width) lie in their range; NaN never does."""
        low, high = self._single if rows.dtype == torch.float32 else self._exact
        inside = (rows >= low) & (rows <= high)
        return inside if self._free is None else inside & (self._free | (rows.floor() == rows))


class TensorColumns:
    """The points of a space as rows of tensors, and the inputs of the networks for them."""

    def __init__(self, codec: SpaceCodec, what: str, device: torch.device) -> None:
        self._what, self._device, self._space = what, device, codec.space
        self._leaves = [
            (path, space, tuple(space.shape or ()), SpaceCodec(space).width)
            for path, space in tensor_leaves(codec.space)
        ]
        counts = np.array(codec.categories, dtype=bool)
        self.range = TensorRange(codec.low, codec.high, counts if counts.any() else None, device)
        free = [i for i, n in enumerate(codec.categories) if not n]
        self._free = torch.tensor(free, dtype=torch.int64, device=device)
        self._counted = [
            (i, torch.arange(n, device=device)) for i, n in enumerate(codec.categories) if n
        ]

    def rows(self, points: TensorBatch) -> Tensor:
        """Return n points as rows (n, width) of float32, or of float64 where a part has that.

        Raises:
            ValueError: The points have another shape, are no tensors, are on another device, or
                lack an entry of a Dict.
        """
        parts = []
        for path, space, shape, width in self._leaves:
            part: Any = points
            for key in path:
                if not isinstance(part, Mapping) or key not in part:
                    raise ValueError(
                        f"{self._what} must be a dict of tensors with the entry "
                        f"{'/'.join(path)!r}, got {_described(points)}; the space is {self._space}"
                    )
                part = part[key]
            check_tensor(part, "/".join((self._what, *path)), self._device)
            if part.shape[1:] != shape or not part.dim():
                raise ValueError(
                    f"{self._what} must be n points of shape {('n', *shape)}, got "
                    f"{tuple(part.shape)}; the space is {space}. Add the first axis to a single one"
                )
            exact = part.dtype == torch.float64
            part = part.to(torch.float64 if exact else torch.float32)
            parts.append(part.reshape(len(part), width))
        if len({len(part) for part in parts}) > 1:
            raise ValueError(f"the entries of {self._what} must all be of n points")
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def batch(self, rows: Tensor) -> Any:  # noqa: ANN401
        """Return rows (n, width) as n points in the form that `rows` takes; integers are int64."""
        points: Any = {}
        start = 0
        for path, space, shape, width in self._leaves:
            part = rows[:, start : start + width].reshape(len(rows), *shape)
            start += width
            if not isinstance(space, gym.spaces.Box):
                part = part.round().to(torch.int64)
            if not path:
                return part
            inner = points
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = part
        return points

    def features(self, scaled: Tensor, counted: Tensor) -> Tensor:
        """Return the inputs (..., inputs) of the networks, as `Scaling` orders them.

        `scaled` (..., width) holds continuous columns, and `counted` (..., width) the integers of
        discrete ones, from 0.
        """
        scaled = scaled.to(torch.float32)
        if not self._counted:
            return scaled
        parts = [scaled.index_select(-1, self._free)]
        for i, places in self._counted:
            parts.append((counted[..., i, None].round() == places).to(torch.float32))
        return torch.cat(parts, -1)


class TensorScaling:
    """The units of observations and actions on tensors, as `spaces.scaling.Scaling` on arrays."""

    def __init__(
        self, scaling: Scaling, observations: SpaceCodec, actions: SpaceCodec, device: torch.device
    ) -> None:
        numbers = [
            torch.tensor(np.asarray(one, np.float32), device=device)
            for one in (
                scaling.observation_mean,
                scaling.observation_spread,
                scaling.action_low,
                scaling.action_high,
            )
        ]
        self.mean, self._spread, self.low, self._high = numbers
        self._width = self._high - self.low
        self.observations = TensorColumns(observations, "observation", device)
        self.actions = TensorColumns(actions, "action", device)

    def inputs(self, rows: Tensor) -> Tensor:
        """Return the inputs (n, features) of the networks for observations, rows (n, obs)."""
        scaled = (rows - self.mean) / self._spread
        return self.observations.features(scaled, scaled)

    def to_box(self, scaled: Tensor) -> Tensor:
        """Return actions (..., act) in [-1, 1] as rows of the box."""
        raw = self.low + 0.5 * (scaled + 1.0) * self._width
        return raw.clip(self.low, self._high)

    def unit(self, actions: Tensor) -> Tensor:
        """Return actions (..., act) in half widths of the box, from its centre."""
        return 2.0 * ((actions - self.low) / self._width) - 1.0

    def action_features(self, actions: Tensor) -> Tensor:
        """Return the inputs (..., features) of the networks for actions, rows (..., act)."""
        return self.actions.features(self.unit(actions), actions - self.low)


def tensor_leaves(
    space: gym.Space[Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], gym.Space[Any]]]:
    """Yield the parts of a space that are no Dicts, with the keys that lead to each."""
    if isinstance(space, gym.spaces.Dict):
        for key, part in space.spaces.items():
            yield from tensor_leaves(part, (*path, key))
    else:
        yield path, space


def _described(points: object) -> str:
    return f"the entries {sorted(points)}" if isinstance(points, Mapping) else type(points).__name__


def check_tensor(given: object, what: str, device: torch.device) -> None:
    """Check that an argument `what` of `TorchShield` is a tensor on the shield's device.

    Raises:
        ValueError: It is no tensor, or on another device.
    """
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} must be a tensor, got {type(given).__name__}; use shield.filter")
    if given.device != device:
        raise ValueError(
            f"{what} must be on the shield's device {device}, got {given.device}; pass "
            "to_torch(device) the device of the environments"
        )
