"""A log as tensors on a device: normalised, and with the numbers that training reads off it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import json_values
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import SafetyScale

_LEARNED_FROM = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "constraints",
    "next_constraints",
    "terminated",
    "truncated",
)


@dataclass(frozen=True)
class LogTensors:
    """The N transitions of a log on one device, as training draws from them."""

    observations: Tensor
    """(N, obs) normalised."""
    actions: Tensor
    """(N, act) in [-1, 1]."""
    rewards: Tensor
    next_observations: Tensor
    """(N, obs) normalised."""
    constraints: Tensor
    next_constraints: Tensor
    terminated: Tensor
    """(N,) bool."""
    episode_last: Tensor
    """(N,) int64: the last transition of each transition's episode."""

    @classmethod
    def of(cls, dataset: OfflineDataset, scaling: Scaling, device: torch.device) -> LogTensors:
        """Copy a log to a device."""
        starts = dataset.episode_starts
        lengths = dataset.episode_lengths
        last = np.repeat(starts + lengths - 1, lengths)

        def move(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.tensor(array, device=device)

        return cls(
            move(scaling.observations(dataset.observations)),
            move(scaling.actions(dataset.actions)),
            move(dataset.rewards),
            move(scaling.observations(dataset.next_observations)),
            move(dataset.constraints),
            move(dataset.next_constraints),
            move(dataset.terminated),
            move(last.astype(np.int64)),
        )

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is: a checkpoint of another one is refused, and can say what differs."""

    algorithm: str
    config: dict[str, Any]
    """As JSON values."""
    log: str
    """Its size, and the beginning of its digest."""
    steps: int
    fingerprint: str
    """Digest of all of it."""

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return json_values(self)

    def difference(self, data: object) -> str | None:
        """Say how a run that a checkpoint tells of differs from this one; None: it does not tell.

        The values are called "checkpoint's -> this run's".
        """
        mine = self.to_json()
        if not isinstance(data, dict) or set(data) != set(mine):
            return None
        pairs = {name: (data[name], mine[name]) for name in ("algorithm", "log", "steps")}
        theirs = data["config"]
        if not isinstance(theirs, dict):
            return None
        for name in sorted({*theirs, *self.config}):
            pairs[name] = (
                theirs.get(name, "no such setting"),
                mine["config"].get(name, "no such setting"),
            )
        different = [
            f"{name} {old!r:.80} -> {new!r:.80}" for name, (old, new) in pairs.items() if old != new
        ]
        return "; ".join(different) or None


def run_identity(
    algorithm: str,
    config: Any,  # noqa: ANN401 - any dataclass
    dataset: OfflineDataset,
    steps: int,
) -> RunIdentity:
    """Return the identity of a run of `steps` updates on a log."""
    digest = hashlib.sha256(repr((dataset.observation_space, dataset.action_space)).encode())
    for name in _LEARNED_FROM:
        digest.update(np.ascontiguousarray(getattr(dataset, name)).data)
    log, values = digest.hexdigest(), json_values(config)
    whole = hashlib.sha256(json.dumps([algorithm, values, log, steps]).encode()).hexdigest()
    return RunIdentity(algorithm, values, f"of {len(dataset)} rows, {log[:12]}", steps, whole)


def check_boundary(dataset: OfflineDataset) -> None:
    """Refuse a log from which no boundary between safe and unsafe can be learned.

    Raises:
        TypeError: it is no log.
        ValueError: no logged state violates the constraint, or every one does.
    """
    if not isinstance(dataset, OfflineDataset):
        raise TypeError(
            f"dataset must be an OfflineDataset, got {type(dataset).__name__}: make one with "
            "collect(env, ...), OfflineDataset.load(path) or OfflineDataset.from_arrays(...)"
        )
    unsafe = (dataset.next_constraints > 0) | (dataset.constraints > 0)
    if not unsafe.any():
        raise ValueError(
            f"dataset has no violation (h > 0) in any of its {len(dataset)} transitions: nothing "
            "can be learned about where safety ends. Log some careless episodes, or check that "
            "'constraints' and 'costs' are what you meant"
        )
    if unsafe.all():
        raise ValueError(
            f"dataset has nothing but violations (h > 0 in all {len(dataset)} transitions): "
            "nothing can be learned about where safety begins. Check the constraint's sign "
            "(h <= 0 is safe), or log some careful episodes"
        )


def safety_scale(dataset: OfflineDataset) -> SafetyScale:
    """Read the units of the safety critics off a log."""
    h = dataset.constraints.astype(np.float64)
    step = dataset.next_constraints.astype(np.float64) - h
    rms = math.sqrt(float(np.mean(step**2)))
    return SafetyScale(float(h.mean()), float(h.std()) or 1.0, rms or float(h.std()) or 1.0)


def returns_to_go(
    rewards: npt.NDArray[np.floating],
    ends: npt.NDArray[np.bool_],
    terminated: npt.NDArray[np.bool_],
    discount: float,
    columns: int = 1,
) -> npt.NDArray[np.float64]:
    """Return the discounted sum of rewards from each step on, (N,).

    An episode that was cut off is continued with the mean reward for ever: that is rough, but only
    the size of the returns matters.

    Args:
        rewards: (N,), of `columns` environments in turn.
        ends: (N,) where an episode ended.
        terminated: (N,) where it ended for good.
        discount: g.
        columns: number of environments.

    >>> returns_to_go(np.ones(4), np.zeros(4, bool), np.zeros(4, bool), 0.5).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    rest = float(rewards.mean()) / max(1.0 - discount, 1e-6)
    returns = np.empty(len(rewards))
    for column in range(columns):
        steps = slice(column, None, columns)
        paid: list[float] = rewards[steps].astype(np.float64).tolist()
        cut, gone = ends[steps].tolist(), terminated[steps].tolist()
        value = rest
        for t in range(len(paid) - 1, -1, -1):
            if cut[t]:
                value = 0.0 if gone[t] else rest
            value = paid[t] + discount * value
            paid[t] = value
        returns[steps] = paid
    return returns


def scale_of_returns(returns: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and the standard deviation of returns (N,): the units of their critics.

    >>> scale_of_returns(np.full(4, 2.0))
    (2.0, 1e-06)
    """
    spread = float(returns.std())
    return float(returns.mean()), spread if math.isfinite(spread) and spread > 1e-6 else 1e-6


def logged_returns(
    dataset: OfflineDataset, discount: float, rewards: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Return `returns_to_go` of a log, (N,). `rewards` (N,) take the place of the log's own."""
    if rewards is None:
        rewards = dataset.rewards.astype(np.float64)
    ends = dataset.terminated | dataset.truncated
    return returns_to_go(rewards, ends, dataset.terminated, discount)
