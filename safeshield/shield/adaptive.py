"""A threshold that follows the errors it meets: adaptive conformal inference on delta.

Calibration fixes delta for the dynamics it was made in. When these drift, the values that the
shield predicts are wrong by a little more at each step, and over a stretch of steps the little
adds up. In a step t in which the shield stepped in, with Q_h and V_h in units of h,

    e_t = V_h(s[t+1]) - p_t,    p_t = Q_h(s[t], a[t])                  where that was acceptable
                                p_t = min(Q_h(s[t], a[t]), V_h(s[t]))  where nothing was

is how far the value rose above what was promised: an accepted action promises its Q_h, and where
no candidate is acceptable V_h itself promises that it need not rise. A margin q_t says "e_t will be
at most q_t". It is a conformal quantile of recent errors, at a level that moves with its own
mistakes (Gibbs and Candes, arXiv 2106.00170, eq. 2; on a learned Hamilton-Jacobi filter: ACoFi,
arXiv 2604.18482):

    err_t     = 1 if e_t > q_t else 0                         (a wrong range)
    alpha_t+1 = alpha_t + rate (target - err_t),              alpha_1 = target
    q_t       = the ceil((m + 1)(1 - alpha_t))-th smallest of the last m <= window errors,
                infinite where that is more than m, minus infinity where it is less than 1

and the threshold in force is

    -(delta + horizon * max(q_t - baseline, 0)),              q_t at most the largest error kept:

never looser than -delta. Errors of q in each of `horizon` steps carry the value horizon * q
upwards; `baseline` is the part of q that delta covers already.

How long errors add up is by default what the shield has met: `horizon` is the longest stretch so
far of steps in a row in states with V_h <= 0 in which nothing was acceptable at the CALIBRATED
threshold, at least 1 and at most 100. A number fixed beforehand can lock the agent out in a world
that never changed, above all where labels are binary: values there lie hardly anywhere below the
label -1 of safe states, a step's error of the critics is a few hundredths, and a hundred times that
is a threshold which no action ever meets; the shield then executes what its critics overrate most,
whose errors keep the threshold where it is. Where that happens all the same, it warns.

**What is promised.** For ANY sequence of errors, random or adversarial, after T counted steps

    abs(mean of err - target) <= (max(target, 1 - target) + rate) / (T rate),

because alpha never leaves [-rate, 1 + rate]. It speaks of wrong ranges among the steps in which
the shield stepped in, on average over the long run, and of nothing else.

**What is not.** It is no bound on violations. Wrong ranges may come together, in the one
encounter where they matter; between two encounters the dynamics may change by more than was seen;
an infinite range, which is always right, does not make the threshold infinite. What connects the
two is this much: from a step with Q_h <= threshold on, V_h stays at or below 0 for `horizon` steps,
or until an action is acceptable again, if no error among them exceeds the (finite) margin that
set that threshold, and ``baseline <= delta / horizon`` (the default). A soft promise.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.shield.report import FilterReport
from safeshield.spaces.shapes import Flags, Scalars

_Array = npt.NDArray[np.float64]
MOST_HELD = 100
"""Longest horizon that is found by itself, in steps."""
_STARVED = 100  # steps in a row before it warns


class NothingAcceptableWarning(UserWarning):
    """An adaptive threshold refuses every action where the calibrated one would accept some."""


@dataclass(frozen=True)
class AdaptiveThreshold:
    """How a threshold follows the errors it meets; formulas and what they promise: the module.

    Args:
        target: share of wrong ranges in the long run, in (0, 1).
        rate: what one wrong range takes off alpha, positive. Larger follows faster and swings
            more.
        window: how many recent errors are kept, at least 1. Below 1 / target the margin is
            infinite most of the time, and the threshold follows the largest error kept.
        horizon: for how many steps errors may add up, at least 1: as many as the shield has to
            hold out until the danger is passed. None: the longest stretch without an acceptable
            action that it has met, at most 100 (see the module).
        baseline: what part of the margin delta covers, per step, in units of h; by default
            delta / horizon. The margin observed where the shield was calibrated
            (`AdaptiveMargin.margin`) lets the threshold start to move as soon as errors grow.

    Raises:
        TypeError: a count is no whole number.
        ValueError: an argument is out of its range.

    >>> AdaptiveThreshold(target=0.1, rate=0.02).long_run_bound(1000)
    0.046
    """

    target: float = 0.05
    rate: float = 0.01
    window: int = 200
    horizon: int | None = None
    baseline: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "horizon"):
            count = getattr(self, name)
            if count is None and name == "horizon":
                continue
            if isinstance(count, bool) or not isinstance(count, int | np.integer):
                raise TypeError(f"{name} must be a whole number of steps, got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be at least 1 step, got {count}")
            object.__setattr__(self, name, int(count))
        for name in ("target", "rate", "baseline"):
            number = getattr(self, name)
            if number is None and name == "baseline":
                continue
            if isinstance(number, bool) or not isinstance(number, int | float | np.floating):
                raise TypeError(f"{name} must be a number, got {number!r}")
            object.__setattr__(self, name, float(number))
        if not 0.0 < self.target < 1.0:
            raise ValueError(
                f"target must lie in (0, 1), got {self.target}: it is the share of wrong ranges"
            )
        if not 0.0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {self.rate}")
        if self.baseline is not None and not 0.0 <= self.baseline < math.inf:
            raise ValueError(
                f"baseline must be finite and at least 0, in units of h a step, got {self.baseline}"
            )

    def long_run_bound(self, steps: int) -> float:
        """Return how far the share of wrong ranges can be from the target after counted steps."""
        return (max(self.target, 1.0 - self.target) + self.rate) / (steps * self.rate)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as plain data, from which `as_adaptive` makes an equal one."""
        return dataclasses.asdict(self)


def as_adaptive(
    adaptive: AdaptiveThreshold | Mapping[str, Any] | None,
) -> AdaptiveThreshold | None:
    """Return the settings from settings, or from a mapping of `AdaptiveThreshold`'s arguments.

    Raises:
        TypeError: anything else, or an argument that there is not.
        ValueError: an argument is out of its range.
    """
    if adaptive is None or isinstance(adaptive, AdaptiveThreshold):
        return adaptive
    if isinstance(adaptive, Mapping):
        names = [field.name for field in dataclasses.fields(AdaptiveThreshold)]
        unknown = sorted(str(name) for name in adaptive if name not in names)
        if unknown:
            raise TypeError(f"adaptive takes {names}, got {unknown} too")
        return AdaptiveThreshold(**adaptive)
    raise TypeError(
        "adaptive must be an AdaptiveThreshold, a dict of its arguments, or None, got "
        f"{type(adaptive).__name__}"
    )


class AdaptiveMargin:
    """The margins of n environments, each with its own errors.

    Args:
        settings: how to follow.
        delta: the calibrated threshold, units of h.
        count: n.

    >>> margin = AdaptiveMargin(AdaptiveThreshold(window=40, horizon=10), delta=0.05, count=1)
    >>> for _ in range(40):  # the value rises by 1 cm a step: 10 cm in 10 steps
    ...     margin.observe(np.array([0.01]), np.array([True]))
    >>> margin.threshold
    array([-0.1])
    """

    def __init__(self, settings: AdaptiveThreshold, delta: float, count: int) -> None:
        self.settings = settings
        self.delta = float(delta)
        self._alpha = np.empty(count)
        self._margin = np.empty(count)
        self._threshold = np.empty(count)
        self._observed = np.empty(count, np.int64)
        self._wrong = np.empty(count, np.int64)
        self._errors = np.empty((count, settings.window))
        self._horizon = np.empty(count, np.int64)
        self._held = np.empty(count, np.int64)
        self._reached = np.empty(count)
        self._starved = np.empty(count, np.int64)
        self._warned = False
        self.forget()

    @property
    def alpha(self) -> _Array:
        """(n,) the level in force; between -rate and 1 + rate."""
        return self._alpha.copy()

    @property
    def margin(self) -> _Array:
        """(n,) q_t, units of h a step; infinite before there are enough errors."""
        return self._margin.copy()

    @property
    def threshold(self) -> _Array:
        """(n,) what Q_h must not exceed in the next step; finite, at most -delta."""
        return self._threshold.copy()

    @property
    def horizon(self) -> npt.NDArray[np.int64]:
        """(n,) for how many steps errors may add up."""
        return self._horizon.copy()

    @property
    def baseline(self) -> _Array:
        """(n,) what part of a margin delta covers, units of h a step."""
        given = self.settings.baseline
        return self.delta / self._horizon if given is None else np.full(len(self._horizon), given)

    @property
    def observed(self) -> npt.NDArray[np.int64]:
        """(n,) T, the steps counted."""
        return self._observed.copy()

    @property
    def wrong(self) -> npt.NDArray[np.int64]:
        """(n,) how many of their ranges were wrong."""
        return self._wrong.copy()

    def forget(self, mask: Flags | None = None) -> None:
        """Begin anew with the calibrated threshold, everywhere or where `mask` (n,) says so."""
        where = slice(None) if mask is None else np.asarray(mask, np.bool_)
        self._alpha[where] = self.settings.target
        self._margin[where] = np.inf
        self._threshold[where] = 0.0 - self.delta
        self._observed[where] = 0
        self._wrong[where] = 0
        self._errors[where] = np.nan
        self._horizon[where] = self.settings.horizon or 1
        self._held[where] = 0
        self._reached[where] = np.nan
        self._starved[where] = 0

    def learn(self, report: FilterReport, reached: Scalars, counted: Flags) -> None:
        """Take in one step: its verdicts (n,) and V_h (n,) of the states that it led to.

        Steps in which the shield did not step in, and those whose value before or after is not
        finite (a reading was broken, or nobody knows where the step led) teach nothing.

        Args:
            report: of the actions executed.
            reached: also where the step ended an episode, of its last state.
            counted: (n,) where an action was executed at all.
        """
        stepped_in = np.asarray(report.intervened) & counted
        self._hold_out(report, reached, stepped_in, counted)
        if not stepped_in.any():
            return
        with np.errstate(invalid="ignore"):
            errors = np.asarray(reached, np.float64) - promised(report)
        self.observe(errors, stepped_in & np.isfinite(errors))

    def passed(self) -> None:
        """Take in a step in which every action was accepted: whatever lasted is over."""
        self._held[:] = 0
        self._starved[:] = 0

    def _hold_out(
        self, report: FilterReport, reached: Scalars, stepped_in: Flags, counted: Flags
    ) -> None:
        """Count the steps in a row without an acceptable action, by either threshold's fault."""
        value = np.asarray(report.value, np.float64)
        before = np.asarray(report.state_value, np.float64)
        nothing = stepped_in & ~np.asarray(report.acceptable) & np.isfinite(value)
        calibrated = (value > -self.delta) | ~np.asarray(report.supported)
        held = nothing & calibrated & (before <= 0.0)
        # After a reset the state is not the one that the stretch led to.
        goes_on = (self._held > 0) & (before == self._reached)
        self._held = np.where(held, np.where(goes_on, self._held, 0) + 1, 0)
        self._reached = np.where(held, np.asarray(reached, np.float64), np.nan)
        if self.settings.horizon is None:
            self._horizon = np.maximum(self._horizon, np.minimum(self._held, MOST_HELD))
        refused = np.where(nothing & ~calibrated, self._starved + 1, 0)
        self._starved = np.where(counted, refused, self._starved)
        worst = int(self._starved.argmax())
        if self._starved[worst] >= _STARVED and not self._warned:
            self._warned = True
            warnings.warn(
                f"for {_STARVED} steps the adaptive threshold, {self._threshold[worst]:.4g}, has "
                f"refused every action, where the calibrated one, {0.0 - self.delta:.4g}, would "
                f"have accepted some: errors of {self._margin[worst]:.3g} a step for "
                f"{self._horizon[worst]} steps ask for values that the critics may have nowhere. "
                "Lower horizon, raise baseline (the margin met where nothing had changed), or "
                "calibrate again in the world as it is now",
                NothingAcceptableWarning,
                stacklevel=4,
            )

    def observe(self, errors: Scalars, counted: Flags) -> None:
        """Move the margins of the environments in `counted` (n,) by their errors (n,), finite."""
        rows = np.flatnonzero(counted)
        if not len(rows):
            return
        settings, seen = self.settings, np.asarray(errors, np.float64)[rows]
        wrong = seen > self._margin[rows]
        self._alpha[rows] += settings.rate * (settings.target - wrong)
        self._errors[rows, self._observed[rows] % settings.window] = seen
        self._observed[rows] += 1
        self._wrong[rows] += wrong
        # Those not filled yet are NaN, which is sorted to the end.
        ordered = np.sort(self._errors[rows], axis=1)
        kept = np.minimum(self._observed[rows], settings.window)
        rank = np.ceil((kept + 1) * (1.0 - self._alpha[rows]))
        place = np.clip(rank, 1, kept).astype(np.int64) - 1
        each = np.arange(len(rows))
        margin = np.where(rank > kept, np.inf, ordered[each, place])
        self._margin[rows] = np.where(rank < 1, -np.inf, margin)
        used = np.minimum(self._margin[rows], ordered[each, kept - 1])
        excess = np.maximum(used - self.baseline[rows], 0.0)
        self._threshold[rows] = 0.0 - (self.delta + self._horizon[rows] * excess)


def promised(report: FilterReport) -> _Array:
    """Return what the values (n,) after a step should not exceed; p_t of the module."""
    value = np.asarray(report.value, np.float64)
    held = np.minimum(value, np.asarray(report.state_value, np.float64))
    return np.where(np.asarray(report.acceptable), value, held)
