"""Conversion of a log to normalised tensors, and statistics of the log that training uses."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset, contents_of
from safeshield.files.schema import json_values
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import SafetyScale, step_rms

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
POOL = 65_536
"""Number of rows of a log that are evaluated together."""


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows of a log that are normalised when they are read, so that no copy of the log is made.

    Attributes:
        raw: (N, width) rows of the log that are not normalised.
        scale: Function from rows (n, width) to the network inputs (n, features).
    """

    raw: npt.NDArray[np.float32]
    scale: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Return the network inputs (n, features) of the rows with these indices."""
        chosen = rows if isinstance(rows, slice) else rows.numpy()
        return torch.from_numpy(self.scale(self.raw[chosen]))

    def __len__(self) -> int:
        return len(self.raw)


@dataclass(frozen=True)
class LogTensors:
    """The N transitions of a log as tensors on one device, from which training draws batches."""

    observations: Tensor | ScaledRows
    """(N, obs) normalised."""
    actions: Tensor
    """(N, act) in [-1, 1]."""
    rewards: Tensor
    """(N,) rewards of the steps."""
    next_observations: Tensor | ScaledRows
    """(N, obs) normalised."""
    constraints: Tensor
    """(N,) h of the states before the steps."""
    next_constraints: Tensor
    """(N,) h of the states after the steps."""
    terminated: Tensor
    """(N,) bool."""
    episode_last: Tensor
    """(N,) int64 index of the last transition of each transition's episode."""
    episodes: npt.NDArray[np.uint64] | None = None
    """(E,) hashes of the episodes, `OfflineDataset.episode_hashes`; None where they are not known.
    """

    @classmethod
    def of(
        cls,
        dataset: OfflineDataset,
        scaling: Scaling,
        device: torch.device,
        *,
        normalised: bool = False,
    ) -> LogTensors:
        """Return the log `dataset` as tensors on `device`, in the units of `scaling`.

        On the CPU the observations stay in the memory of `dataset`, unless `normalised` asks for
        copies of them that are normalised. Another device always holds such copies.
        """
        in_place = device.type == "cpu" and not normalised
        starts = dataset.episode_starts
        lengths = dataset.episode_lengths
        last = np.repeat(starts + lengths - 1, lengths)

        def move(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.tensor(array, device=device)

        def rows(raw: npt.NDArray[np.float32]) -> Tensor | ScaledRows:
            scale = scaling.observations
            return ScaledRows(raw, scale) if in_place else move(scale(raw))

        return cls(
            rows(dataset.observations),
            move(scaling.actions(dataset.actions)),
            move(dataset.rewards),
            rows(dataset.next_observations),
            move(dataset.constraints),
            move(dataset.next_constraints),
            move(dataset.terminated),
            move(last.astype(np.int64)),
            dataset.episode_hashes,
        )

    def __len__(self) -> int:
        return len(self.rewards)


def some_rows(kept: Tensor, generator: torch.Generator) -> Tensor:
    """Draw at most 65,536 rows, with replacement, from those that `kept` (N,) bool marks."""
    rows = torch.nonzero(kept).flatten()
    size = min(POOL, len(rows))
    if not size:
        return rows
    return rows[torch.randint(len(rows), (size,), generator=generator, device=generator.device)]


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a training run: algorithm, settings, log and number of updates.

    A checkpoint of another run is rejected with the differences.
    """

    algorithm: str
    """Name of the algorithm."""
    config: dict[str, Any]
    """Settings as JSON values."""
    log: str
    """Number of rows of the log, and the beginning of its digest."""
    steps: int
    """Total number of updates."""
    contents: str = "in memory"
    """Whether the log was read from a file with a digest of its contents, as in its card. It does
    not tell runs apart."""
    later: Mapping[str, Any] = field(default_factory=dict)
    """Settings that older checkpoints lack, with the values with which those runs were made."""
    without_effect: frozenset[str] = frozenset()
    """Settings that do not change this run, and are therefore not compared."""

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON values, for a checkpoint."""
        values = json_values(self)
        del values["later"], values["without_effect"]
        return values

    def difference(self, data: object) -> str | None:
        """Return how the run of a checkpoint differs from this one; None if they are the same.

        `data` is the identity that the checkpoint stores.

        Each difference is written as "name checkpoint's value -> this run's value". The text is
        empty where the checkpoint does not identify its run in this form. The order of the settings
        does not matter. Older checkpoints also hold a digest of all parts, which is not read.
        """
        mine = self.to_json()
        del mine["contents"]
        if not isinstance(data, dict) or not set(mine) <= set(data):
            return ""
        theirs = data["config"]
        if not isinstance(theirs, dict):
            return ""
        pairs = {name: (data[name], mine[name]) for name in ("algorithm", "log", "steps")}
        for name in sorted({*theirs, *self.config} - self.without_effect):
            pairs[name] = (
                theirs.get(name, self.later.get(name, "no such setting")),
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
    later: Mapping[str, Any] | None = None,
) -> RunIdentity:
    """Return the identity of a training run, by which a checkpoint is recognised.

    Args:
        algorithm: Name of the algorithm.
        config: Settings, a dataclass. Its `TrainingConfig.only_acting` are not compared.
        dataset: Log that is learned from.
        steps: Total number of updates.
        later: Settings that older checkpoints lack; see `RunIdentity`.
    """
    digest = hashlib.sha256(repr((dataset.observation_space, dataset.action_space)).encode())
    for name in _LEARNED_FROM:
        digest.update(np.ascontiguousarray(getattr(dataset, name)).data)
    log = f"of {len(dataset)} rows, {digest.hexdigest()[:12]}"
    without_effect: frozenset[str] = getattr(config, "only_acting", frozenset())
    if dataset.constraint_kind != "binary":
        without_effect |= {"label_magnitude"}
    return RunIdentity(
        algorithm,
        json_values(config),
        log,
        steps,
        contents_of(dataset),
        later or {},
        without_effect,
    )


def check_boundary(dataset: OfflineDataset) -> None:
    """Check that a boundary between safe and unsafe can be learned from a log.

    Raises:
        TypeError: `dataset` is not a log.
        ValueError: No logged state violates the constraint, or all of them do.

    Warns:
        UserWarning: More than half of the transitions violate.
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
            "'constraints' and 'costs' hold the right values"
        )
    if unsafe.all():
        raise ValueError(
            f"dataset has nothing but violations (h > 0 in all {len(dataset)} transitions): "
            "nothing can be learned about where safety begins. Check the constraint's sign "
            "(h <= 0 is safe), or log some careful episodes"
        )
    if unsafe.mean() > 0.5:
        warnings.warn(
            f"h > 0, a violation, in {unsafe.mean():.0%} of the {len(dataset)} transitions: is the "
            "sign of the constraint turned? h <= 0 is safe. If it is right, log more careful "
            "episodes as well",
            stacklevel=2,
        )


BEFORE_LABEL_MAGNITUDE: dict[str, Any] = {"label_magnitude": 25.0}
"""The setting `label_magnitude` of agents whose files do not name it; their logs held it."""


def labelled(dataset: OfflineDataset, magnitude: float) -> OfflineDataset:
    """Return a log to learn from: unsafe states have the label `magnitude` where labels are binary.

    Args:
        dataset: The log, which must pass `check_boundary`.
        magnitude: The setting `label_magnitude`.

    Raises:
        TypeError: The actions are a Box of integers.
    """
    check_boundary(dataset)
    if isinstance(dataset.action_space, gym.spaces.Box) and dataset.action_space.dtype.kind in "iu":
        raise TypeError(
            f"actions must be a Box of floating-point numbers or discrete, got a Box of "
            f"{dataset.action_space.dtype}: a shield would judge numbers between the integers, and "
            "the environment would execute them without their fraction; make them MultiDiscrete"
        )
    binary = dataset.constraint_kind == "binary"
    return dataset.with_label_magnitude(magnitude) if binary else dataset


def safety_scale(dataset: OfflineDataset) -> SafetyScale:
    """Return the units of the safety critics, computed from the log `dataset`."""
    h = dataset.constraints.astype(np.float64)
    rms = step_rms(h, dataset.next_constraints.astype(np.float64))
    return SafetyScale(float(h.mean()), float(h.std()) or 1.0, rms or float(h.std()) or 1.0)


def returns_to_go(
    rewards: npt.NDArray[np.floating],
    ends: npt.NDArray[np.bool_],
    terminated: npt.NDArray[np.bool_],
    discount: float,
    columns: int = 1,
) -> npt.NDArray[np.float64]:
    """Return the discounted sum of rewards from each step on, (N,).

    A truncated episode is assumed to continue with the mean reward for ever. This is a rough
    estimate, but only the order of magnitude of the returns is used.

    Args:
        rewards: (N,) rewards, which alternate between `columns` environments.
        ends: (N,) whether an episode ended at the step.
        terminated: (N,) whether that episode terminated, rather than being truncated.
        discount: Discount factor g.
        columns: Number of environments.

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
    """Return the mean and the standard deviation of returns (N,), which are their critics' units.

    >>> scale_of_returns(np.full(4, 2.0))
    (2.0, 1e-06)
    """
    spread = float(returns.std())
    return float(returns.mean()), spread if math.isfinite(spread) and spread > 1e-6 else 1e-6


def logged_returns(
    dataset: OfflineDataset, discount: float, rewards: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Return the discounted return of the rest of the episode after each step of a log, (N,).

    Args:
        dataset: The log.
        discount: Discount factor g.
        rewards: (N,) numbers that take the place of the log's rewards; None for its rewards.
    """
    if rewards is None:
        rewards = dataset.rewards.astype(np.float64)
    ends = dataset.terminated | dataset.truncated
    return returns_to_go(rewards, ends, dataset.terminated, discount)
