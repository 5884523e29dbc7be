"""`EpisodeTracker`: follows the episodes of n environments that step together, for a monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from safeshield.calibration.promises import Violation
from safeshield.monitoring.covariates import (
    REPLACED,
    RESIDUAL,
    START,
    TYPICAL,
    UNSEEN,
    root_mean,
)
from safeshield.monitoring.ledger import CUT, ENDED, checked_costs
from safeshield.shield.protocols import WatchedStep
from safeshield.spaces.shapes import Flags, Scalars

if TYPE_CHECKING:
    from safeshield.monitoring.promise import PromiseMonitor


class EpisodeTracker:
    """Reports certified episodes of `count` environments to a monitor (`protocols.EpisodeWatch`).

    An episode is entered at its first step. A reset that is followed by another reset is none.
    """

    def __init__(self, monitor: PromiseMonitor, count: int) -> None:
        self._monitor = monitor
        # Names of the episodes under way. An interrupt can come anywhere, so this list alone says
        # which are under way.
        self._names: list[str | None] = [None] * count
        self._waiting = np.zeros(count, np.bool_)
        self._labelled = np.zeros(count, np.bool_)
        self._violated = np.zeros(count, np.bool_)
        self._cost = np.zeros(count)
        self._start = np.zeros(count)
        self._steps = np.zeros(count)
        self._replaced = np.zeros(count)
        self._unseen = np.zeros(count)
        self._residual = np.zeros(count)
        self._squares = np.zeros(count)
        self._known = np.zeros(count)

    @property
    def state(self) -> str:
        """The state of the promise."""
        return self._monitor.state

    @property
    def evidence(self) -> float:
        """The evidence E_t against it."""
        return self._monitor.evidence

    @property
    def revoked(self) -> bool:
        """Whether it is revoked."""
        return self._monitor.revoked

    def begin(
        self, starts: Flags, certified: Flags, values: Scalars, constraint: Scalars, /
    ) -> None:
        """Begin new episodes, as `protocols.EpisodeWatch.begin`."""
        self._cut(starts)
        self._waiting = np.where(starts, certified, self._waiting)
        self._start = np.where(starts, values, self._start)
        for sums in (
            self._cost, self._steps, self._replaced, self._unseen, self._residual, self._squares,
            self._known,
        ):  # fmt: skip
            sums[starts] = 0.0
        self._labelled[starts] = False
        # As in `Episode.violated`: a start in the violation is one. Where a sensor is faulty, such
        # a start can be certified.
        self._violated = np.where(starts, constraint > 0.0, self._violated)

    def fail(self) -> None:
        """Count a step whose result is not known, as `protocols.EpisodeWatch.fail`."""
        for i in _places(self._waiting):
            self._waiting[i] = False
            self._names[i] = self._monitor.open()
            self._reach(i)

    def cut(self) -> None:
        """Take all episodes under way as cut."""
        self._cut(np.ones(len(self._names), np.bool_))
        self._waiting[:] = False

    def step(self, step: WatchedStep, /) -> None:
        """Count one step, as `protocols.EpisodeWatch.step`."""
        active = step.counted & (self._waiting | self._running())
        if not active.any():
            return
        monitor = self._monitor
        opening = active & self._waiting
        for i in _places(opening):
            self._names[i] = monitor.open()
        self._waiting &= ~opening
        self._steps += active
        self._replaced += active & step.intervened
        self._unseen += active & ~step.supported
        known = active & np.isfinite(step.residual)
        residual = np.where(known, step.residual, 0.0)
        self._residual = np.maximum(self._residual, residual)
        self._squares += residual**2
        self._known += known
        fresh = self._read_labels(active, step)
        for i in _places(fresh):
            self._reach(i)
        ending = active & step.ended
        for i in _places(ending):
            monitor.close(self._name(i), ENDED, self._covariates(i))
            self._names[i] = None
        monitor.judge()

    def _read_labels(self, active: Flags, step: WatchedStep) -> Flags:
        """Add the labels of a step and return where the score may have changed, (n,)."""
        no_h, no_cost = np.isnan(step.constraint), np.isnan(step.cost)
        told = active & ~no_cost
        cost = checked_costs(step.cost)
        with np.errstate(over="ignore"):
            self._cost += np.where(told, cost, 0.0)
        if isinstance(self._monitor.promise, Violation):
            told = active & ~(no_h & no_cost)
            # As in `Episode.violated`: the cost counts where no constraint is reported.
            bad = told & np.where(no_h, cost > 0.0, step.constraint > 0.0)
            self._violated |= bad
            told |= active & self._violated  # A start can be in the violation.
        else:
            bad = told & (cost > 0.0)
        fresh = told & (bad | ~self._labelled)
        self._labelled |= told
        return np.asarray(fresh)

    def _reach(self, i: int) -> None:
        score = self._monitor.promise.score_of(bool(self._violated[i]), float(self._cost[i]))
        self._monitor.reach(self._name(i), score)

    def _covariates(self, i: int) -> dict[str, float]:
        found = {
            START: float(self._start[i]),
            REPLACED: float(self._replaced[i] / self._steps[i]),
            RESIDUAL: float(self._residual[i]),
            TYPICAL: root_mean(float(self._squares[i]), float(self._known[i])),
        }
        if self._monitor.shield.support is not None:
            found[UNSEEN] = float(self._unseen[i] / self._steps[i])
        return found

    def _name(self, i: int) -> str:
        name = self._names[i]
        assert name is not None
        return name

    def _cut(self, where: Flags) -> None:
        cut = where & self._running()
        if not cut.any():
            return
        for i in _places(cut):
            self._monitor.close(self._name(i), CUT, {})
            self._names[i] = None
        self._monitor.judge()

    def _running(self) -> Flags:
        return np.array([name is not None for name in self._names])


def _places(flags: Flags) -> list[int]:
    places: list[int] = np.flatnonzero(flags).tolist()
    return places
