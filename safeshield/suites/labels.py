"""Continuous labels of logs of the field's tasks, computed from what was logged.

`label` gives a log in DSRL's format the constraint h that `with_constraint` reports live, wherever
its observations tell it, and checks every state against the logged costs. It needs none of the
benchmark packages: their limits stand in the tables below.
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
from safeshield.suites.logged import LOG_LABELS, Floats, LogLabel
from safeshield.suites.metadrive import METADRIVE_FORK_WIDTH, METADRIVE_TASKS

__all__ = ["Agreement", "LogLabel", "agreement", "label", "log_label", "with_constraint"]

MAX_DISAGREEMENT = 0.05
"""Disagreements with the logged costs that `label` mends, per violation in the log."""
MENDED = 0.001
"""Size of h, in its units, where the logged cost overrules its sign."""


class Named(Protocol):
    """A task of `safeshield.suites.tasks`."""

    @property
    def name(self) -> str:
        """DSRL's name of it, such as ``PointGoal1``."""


@dataclass(frozen=True)
class Agreement:
    """How labels computed from a log agree with its costs, over the states that were reached."""

    states: int
    """Number of states: the steps of the log."""
    violations: int
    """With a cost above 0."""
    missed: int
    """Of those, with h at most 0."""
    invented: int
    """With cost 0 and h above 0."""
    unseen: int
    """Whose observation does not tell h; they are counted nowhere else."""

    @property
    def disagreements(self) -> int:
        """States where the sign of h is not that of the cost."""
        return self.missed + self.invented

    @property
    def share(self) -> float:
        """Disagreements per violation (per one, where there is none)."""
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
    """Label a log of one of the field's tasks continuously, where what was logged tells h.

    h of the state a step reached comes from ``next_observations`` (units as in `with_constraint`);
    for a velocity task, whose cost is of the mean speed over the step, from the reward that this
    speed earned; h of an episode's first state from ``observations``. What must not be touched is
    as far as the lidar says, and touched where the log has a cost and bounding circles meet.

    At every state reached h has the sign of the logged cost: where it has not by itself (rounding,
    a car's tilt, a vase that slides on), it becomes 0.001 on the cost's side, and so where nothing
    is in sight of the Circle tasks' lidar, 6 m.

    Returned as it is: a log with continuous labels already, which the environment reported itself,
    and one of the Humanoid, whose speed is not told: it keeps its binary labels.

    Args:
        dataset: raw observations, actions and rewards, as DSRL's logs hold them.
        task: a task of `safeshield.suites.tasks`, or an id: ``"PointGoal1"``,
            ``"SafetyPointGoal1Gymnasium-v0"``, ``"OfflinePointGoal1-v0"``, ``"easysparse"``.
        max_disagreement: disagreements mended, per violation. More than that is no rounding.

    Raises:
        ValueError: the task is unknown; the observations have another width; more states than
            `max_disagreement` allows disagree (see `agreement` for the counts).
        TypeError: the task is none of these.
    """
    found = log_label(task)
    if found is None:
        return dataset
    _check_width(dataset, found, _dsrl_name(task))
    if dataset.constraint_kind == "continuous":
        return dataset
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
    # Nothing was charged for a start.
    left[starts] = np.nan_to_num(now[starts], nan=-MENDED)
    return dataclasses.replace(
        dataset, constraints=left, next_constraints=reached, constraint_kind="continuous"
    )


def agreement(dataset: OfflineDataset, task: str | Named) -> Agreement | None:
    """Count where labels computed from a log agree with its costs; None where they stay binary.

    Raises:
        ValueError: the task is unknown, or the observations have another width.
    """
    found = log_label(task)
    if found is None:
        return None
    _check_width(dataset, found, _dsrl_name(task))
    return _agreement(dataset, _constraints(dataset, found)[1])


def log_label(task: str | Named) -> LogLabel | None:
    """Return how a log of this task is labelled; None: by its costs alone, binary.

    Raises:
        ValueError: the task is unknown; the message lists those that are known.

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
    """Whether two ids are of one environment: DSRL's, native and five-valued ones are.

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
