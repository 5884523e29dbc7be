"""Continuous labels for logs of the benchmark tasks, computed from the logged numbers.

`label` adds to a log in DSRL's format the constraint h that `with_constraint` reports in the
environment, wherever the observations determine it. It checks every state against the logged costs.
No benchmark package is needed, because `suites.logged` holds their limits in tables.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from safeshield.data import OfflineDataset
from safeshield.suites.constraints import with_constraint
from safeshield.suites.logged import LOG_LABELS, SOURCES, Floats, LogLabel
from safeshield.suites.metadrive import METADRIVE_FORK_WIDTH, METADRIVE_TASKS

__all__ = ["Agreement", "LogLabel", "agreement", "label", "log_label", "with_constraint"]

MAX_DISAGREEMENT = 0.05
"""Largest number of disagreements with the logged costs that `label` corrects, per violation."""
MENDED = 0.001
"""Absolute value of h, in its units, where its sign is corrected to that of the logged cost."""


class Named(Protocol):
    """A task of `safeshield.suites.tasks`."""

    @property
    def name(self) -> str:
        """DSRL's name of the task, such as ``PointGoal1``."""


@dataclass(frozen=True)
class Agreement:
    """Counts of the states of a log in which computed labels and logged costs agree or not.

    They agree where the label is positive exactly where the cost is.
    """

    states: int
    """Number of states, which is the number of steps of the log."""
    violations: int
    """Number of states with a cost above 0."""
    missed: int
    """Number of violations with h at most 0."""
    invented: int
    """Number of states with cost 0 and h above 0."""
    unseen: int
    """Number of states whose observation does not determine h; they are neither missed nor
    invented."""

    @property
    def disagreements(self) -> int:
        """Number of states in which the sign of h contradicts the cost."""
        return self.missed + self.invented

    @property
    def share(self) -> float:
        """Disagreements divided by violations, or by 1 where there are no violations."""
        return self.disagreements / max(self.violations, 1)

    def __str__(self) -> str:
        agreed = self.states - self.disagreements - self.unseen
        return (
            f"{agreed} of {self.states} states agree with the logged cost; of {self.violations} "
            f"violations {self.missed} are missed, {self.invented} invented, {self.unseen} unseen"
        )


def label(
    dataset: OfflineDataset, task: str | Named, *, max_disagreement: float = MAX_DISAGREEMENT
) -> OfflineDataset:
    """Return a log of a benchmark task with continuous labels h, where the log determines h.

    h of the state that a step reached is computed from ``next_observations``, in the units of
    `with_constraint`. In a velocity task, whose cost is of the mean speed over the step, it is
    computed from the reward that this speed gave. h of an episode's first state is computed from
    ``observations``. The distance to an object that must not be touched is that of the lidar. The
    object counts as touched where the log has a cost and the bounding circles meet.

    In every reached state h has the sign of the logged cost. Where the computed sign differs
    (because of rounding, a car's tilt or a vase that slides on), h is set to 0.001 with the sign of
    the cost. The same is done where the centre is beyond the 6 m range of the Circle tasks' lidar.

    Where the observation alone determines h, and the sign of h agrees with every logged cost, the
    log names the function (`values.constraint`), and whatever is trained on it computes h with it.

    The labels of two kinds of logs do not change. A log that already has continuous labels keeps
    what the environment reported. A log of the Humanoid does not determine its speed and keeps its
    binary labels.

    Args:
        dataset: Log with raw observations, actions and rewards, as in DSRL's logs.
        task: A task of `safeshield.suites.tasks`, its name or an id: ``"PointGoal1"``,
            ``"SafetyPointGoal1Gymnasium-v0"``, ``"OfflinePointGoal1-v0"``, ``"easysparse"``.
        max_disagreement: Largest number of disagreements that are corrected, per violation. A
            larger number cannot be explained by rounding.

    Raises:
        ValueError: The task is unknown, the observations have another width, or more states
            disagree than `max_disagreement` allows (`agreement` returns the counts).
        TypeError: The task is none of the kinds above.
    """
    found = log_label(task)
    if found is None:
        return dataset
    _check_width(dataset, found, _dsrl_name(task))
    if dataset.constraint_kind == "continuous":
        return _named(dataset, found, SOURCES.get(_dsrl_name(task)))
    if not 0.0 <= max_disagreement <= 1.0:
        raise ValueError(f"max_disagreement must lie in [0, 1], got {max_disagreement}")
    now, after = _constraints(dataset, found)
    counts = _agreement(dataset, after)
    if counts.share > max_disagreement:
        raise ValueError(
            f"labels of {_dsrl_name(task)} must agree with the logged costs, but {counts}, more "
            f"than max_disagreement {max_disagreement} per violation; is this a log of that task "
            "and version, with raw observations and rewards? Binary labels need no such check"
        )
    reached = _with_the_sign_of_the_cost(after, dataset.costs > 0)
    left = np.roll(reached, 1)
    starts = dataset.episode_starts
    # The first state of an episode has no logged cost, so its sign is not corrected.
    left[starts] = np.nan_to_num(now[starts], nan=-MENDED)
    exact = counts.disagreements == counts.unseen == 0
    return dataclasses.replace(
        dataset,
        constraints=left,
        next_constraints=reached,
        constraint_kind="continuous",
        constraint_source=SOURCES.get(_dsrl_name(task)) if exact else None,
    )


def _named(dataset: OfflineDataset, found: LogLabel, source: str | None) -> OfflineDataset:
    """Return a log with continuous labels, which names their source where it gives them."""
    if source is None or dataset.constraint_source is not None:
        return dataset
    now, after = _constraints(dataset, found)
    near = 1e-3 * float(dataset.constraints.std())
    same = (
        np.allclose(now, dataset.constraints, rtol=0.0, atol=near)
        and np.allclose(after, dataset.next_constraints, rtol=0.0, atol=near)
        and bool(((after > 0) == (dataset.costs > 0)).all())
    )
    return dataclasses.replace(dataset, constraint_source=source) if same else dataset


def agreement(dataset: OfflineDataset, task: str | Named) -> Agreement | None:
    """Count the states in which labels computed from the log `dataset` agree with its costs.

    Returns:
        The counts, or None for a task whose labels stay binary.

    Raises:
        ValueError: The task is unknown, or the observations have another width.
    """
    found = log_label(task)
    if found is None:
        return None
    _check_width(dataset, found, _dsrl_name(task))
    return _agreement(dataset, _constraints(dataset, found)[1])


def log_label(task: str | Named) -> LogLabel | None:
    """Return how h is computed from a log of this task, or None where its labels stay binary.

    Raises:
        ValueError: The task is unknown; the message lists the known tasks.

    >>> log_label("SafetyPointGoal1Gymnasium-v0").width, log_label("HumanoidVelocity") is None
    (60, True)
    """
    name = _dsrl_name(task)
    if name not in LOG_LABELS:
        raise ValueError(
            f"task must be one of {', '.join(sorted(LOG_LABELS))}, or an id of one, got {name!r}"
        )
    return LOG_LABELS[name]


def same_task(one: str, other: str) -> bool:
    """Return whether the ids `one` and `other` name the same task.

    DSRL's id, the native id and the id with five values of a task name the same task.

    >>> same_task("safeshield.suites:SafetyPointGoal1Gymnasium-v0", "SafetyPointGoal1-v0")
    True
    >>> same_task("SafetyHopperVelocity-v0", "SafetyHopperVelocity-v1")
    False
    """
    name = _dsrl_name(one)
    bare = one.rpartition(":")[2] == other.rpartition(":")[2]
    return bare or (name in LOG_LABELS and name == _dsrl_name(other))


def _dsrl_name(task: str | Named) -> str:
    text = task if isinstance(task, str) else getattr(task, "name", None)
    if not isinstance(text, str):
        raise TypeError(
            f"task must be a task of safeshield.suites.tasks, its name or an id, got {task!r}"
        )
    bare = text.rpartition(":")[2]
    match = re.fullmatch(
        r"(?:Safety|Offline)?(?:Metadrive-)?(\w+?)(?:Gymnasium)?(?:-v(\d+))?", bare
    )
    if match is None:
        return bare
    name, version = match.groups()
    return f"{name}-v0" if name.endswith("Velocity") and version == "0" else name


def _check_width(dataset: OfflineDataset, found: LogLabel, name: str) -> None:
    width = dataset.observations.shape[1]
    if width == found.width:
        return
    repair = "pass the task that was logged"
    if name in METADRIVE_TASKS and width == METADRIVE_FORK_WIDTH:
        repair = (
            "these are of the fork of MetaDrive (2022) with which DSRL's own logs were made: an "
            "agent trained on them cannot run on today's simulator. Collect a log on that "
            "(safeshield collect)"
        )
    raise ValueError(
        f"observations of {name} must have {found.width} numbers, got {width}; {repair}"
    )


def _constraints(dataset: OfflineDataset, found: LogLabel) -> tuple[Floats, Floats]:
    now = found.of_state(dataset.observations.astype(np.float64))
    if found.of_step is not None:
        return now, found.of_step(dataset)
    return now, found.of_state(dataset.next_observations.astype(np.float64))


def _with_the_sign_of_the_cost(
    values: Floats, violated: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    overruled = np.isnan(values) | ((values > 0) != violated)
    return np.where(overruled, np.where(violated, MENDED, -MENDED), values).astype(np.float32)


def _agreement(dataset: OfflineDataset, after: Floats) -> Agreement:
    violated, unseen = dataset.costs > 0, np.isnan(after)
    return Agreement(
        states=len(dataset),
        violations=int(violated.sum()),
        missed=int((violated & (after <= 0)).sum()),
        invented=int((~violated & (after > 0)).sum()),
        unseen=int(unseen.sum()),
    )
