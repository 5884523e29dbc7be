"""A threshold that follows the critics' observed errors: adaptive conformal inference on delta.

Calibration fixes delta for the dynamics in which it was done. When the dynamics drift, the values
that the shield predicts have larger errors at each step, and these errors add up over several
steps. For a step t in which the shield replaced the action, the prediction p_t and its error e_t,
both in units of h, are

    e_t = V_h(s[t+1]) - p_t,    p_t = Q_h(s[t], a[t])                  where that was acceptable
                                p_t = min(Q_h(s[t], a[t]), V_h(s[t]))  where nothing was

An acceptable action predicts that the next V_h is at most its Q_h. Where no candidate is
acceptable, the present V_h also predicts that the value need not rise. The margin q_t predicts that
e_t is at most q_t. It is a conformal quantile of recent errors, whose level changes with the
margin's own mistakes (Gibbs and Candes, arXiv 2106.00170, eq. 2; ACoFi, arXiv 2604.18482, applies
the method to a learned Hamilton-Jacobi filter):

    err_t     = 1 if e_t > q_t else 0                         (1: a wrong range)
    alpha_t+1 = alpha_t + rate (target - err_t),              alpha_1 = target
    q_t       = the ceil((m + 1)(1 - alpha_t))-th smallest of the last m <= window errors,
                infinite where that is more than m, minus infinity where it is less than 1

and the threshold in force is

    -(delta + horizon * max(q_t - baseline, 0)),              q_t at most the largest error kept.

It is never looser than -delta. An error of q in each of `horizon` steps raises the value by
horizon * q; `baseline` is the part of q that delta covers already.

By default, `horizon` is found from what the shield has observed. It is the length of the longest
run of consecutive steps so far in which V_h <= 0 and nothing was acceptable at the CALIBRATED
threshold, at least 1 and at most 100. A horizon fixed beforehand can make the shield refuse every
action although the dynamics never changed, above all where labels are binary. There, few values lie
below -1, the label of safe states. The critics' error in one step is a few hundredths, and a
hundred times that gives a threshold that no action meets. The shield then executes the action that
the critics overrate most, and the errors of such actions keep the threshold strict. The shield
issues a warning where this happens.

**What is promised.** For ANY sequence of errors, random or adversarial, after T counted steps

    abs(mean of err - target) <= (max(target, 1 - target) + rate) / (T rate),

because alpha never leaves [-rate, 1 + rate]. This bound concerns only the long-run share of wrong
ranges among the steps in which the shield replaced the action.

**What is not promised.** The bound is no bound on violations. Wrong ranges may all occur in the few
steps in which they matter. Between two dangers, the dynamics may change by more than was observed.
An infinite range, which is always right, does not make the threshold infinite. Only the following
connects the margin with violations: after a step with Q_h <= threshold, V_h stays at or below 0 for
`horizon` steps, or until an action is acceptable again, if none of the errors in these steps
exceeds the (finite) margin that set that threshold, and ``baseline <= delta / horizon`` (the
default).
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
"""Longest horizon that is found from observed steps, in steps."""
_STARVED = 100  # consecutive steps without an acceptable action before the warning


class NothingAcceptableWarning(UserWarning):
    """An adaptive threshold refuses every action where the calibrated one would accept some."""


@dataclass(frozen=True)
class AdaptiveThreshold:
    """Settings of a threshold that follows observed errors.

    The module's docstring gives the formulas and what they promise. The margin is the quantile of
    recent errors at the level 1 - alpha. A step whose error exceeds the margin counts as a wrong
    range. The number alpha falls after a wrong range and rises after any other counted step.

    Args:
        target: Long-run share of wrong ranges, in (0, 1).
        rate: Step size of alpha, positive. Each wrong range lowers alpha by rate * (1 - target). A
            larger rate makes the threshold follow faster and vary more.
        window: Number of recent errors that are kept, at least 1. Below 1 / target the margin is
            infinite most of the time, and the threshold follows the largest error kept.
        horizon: Number of steps over which errors may add up, at least 1. It should be the number
            of steps for which the shield has no acceptable action until a danger has passed. None:
            the longest such run observed so far, at most 100 (see the module).
        baseline: Part of the margin that delta covers, per step, in units of h; by default delta /
            horizon. Set it to the margin that was observed in the environment of the calibration
            (`AdaptiveMargin.margin`) to make the threshold stricter as soon as the errors exceed
            those of the calibration.

    Raises:
        TypeError: A count is not a whole number, or another argument is not a number.
        ValueError: An argument is out of its range.

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
        """Return how far the share of wrong ranges can be from `target`.

        Args:
            steps: Number T of counted steps, such as `AdaptiveMargin.observed`.
        """
        return (max(self.target, 1.0 - self.target) + self.rate) / (steps * self.rate)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as plain data, which `as_adaptive` turns into equal settings."""
        return dataclasses.asdict(self)


def as_adaptive(
    adaptive: AdaptiveThreshold | Mapping[str, Any] | None,
) -> AdaptiveThreshold | None:
    """Return settings of a threshold that follows errors, made of what a user passed.

    `adaptive` may be an `AdaptiveThreshold`, which is returned as it is, a mapping of its
    arguments, or None, which stays None.

    Raises:
        TypeError: `adaptive` is of another type, or names an unknown argument.
        ValueError: An argument is out of its range.
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
    """The adaptive margins of n environments, each computed from its own errors.

    Args:
        settings: How the thresholds follow the errors.
        delta: The calibrated delta, in units of h.
        count: Number n of environments.
        rounding: Difference of two errors that counts as none, in units of h. The last digits of a
            value depend on the batch in which it is computed.

    >>> margin = AdaptiveMargin(AdaptiveThreshold(window=40, horizon=10), delta=0.05, count=1)
    >>> for _ in range(40):  # the value rises by 1 cm a step: 10 cm in 10 steps
    ...     margin.observe(np.array([0.01]), np.array([True]))
    >>> margin.threshold
    array([-0.1])
    """

    def __init__(
        self, settings: AdaptiveThreshold, delta: float, count: int, rounding: float = 0.0
    ) -> None:
        self.settings = settings
        self.delta = float(delta)
        self._rounding = float(rounding)
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
        """(n,) the present alpha_t, in [-rate, 1 + rate]; the margin has the level 1 - alpha_t."""
        return self._alpha.copy()

    @property
    def margin(self) -> _Array:
        """(n,) the margin q_t, in units of h per step; infinite before there are enough errors."""
        return self._margin.copy()

    @property
    def threshold(self) -> _Array:
        """(n,) the number that Q_h must not exceed in the next step; finite, at most -delta."""
        return self._threshold.copy()

    @property
    def horizon(self) -> npt.NDArray[np.int64]:
        """(n,) number of steps over which errors may add up."""
        return self._horizon.copy()

    @property
    def baseline(self) -> _Array:
        """(n,) part of the margin that delta covers, in units of h per step."""
        given = self.settings.baseline
        return self.delta / self._horizon if given is None else np.full(len(self._horizon), given)

    @property
    def observed(self) -> npt.NDArray[np.int64]:
        """(n,) number T of counted steps, those whose error was used."""
        return self._observed.copy()

    @property
    def wrong(self) -> npt.NDArray[np.int64]:
        """(n,) number of counted steps whose error exceeded the margin (wrong ranges)."""
        return self._wrong.copy()

    def forget(self, mask: Flags | None = None) -> None:
        """Restore the calibrated threshold, for all environments or those in `mask` (n,)."""
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
        """Update the margins with one step of all environments.

        A step does not change an environment's margin where the shield did not replace the action,
        or where the value before or after the step is not finite, because a reading was broken or
        the state reached is not known. `horizon`, where it is found from observed steps, is updated
        too.

        Args:
            report: The shield's report on the step, with arrays (n,): whether it replaced each
                action, and V_h and Q_h before the step, by which the error is computed.
            reached: (n,) V_h of the states reached, infinite where it is not known. Where the step
                ended an episode, that is the episode's last state.
            counted: (n,) whether an action was executed at all. It was not where a vector
                environment used the step to reset an environment.
        """
        stepped_in = np.asarray(report.intervened) & counted
        self._hold_out(report, reached, stepped_in, counted)
        if not stepped_in.any():
            return
        with np.errstate(invalid="ignore"):
            errors = np.asarray(reached, np.float64) - promised(report)
        self.observe(errors, stepped_in & np.isfinite(errors))

    def passed(self) -> None:
        """Record a step in which every action was accepted; all runs of refused steps end."""
        self._held[:] = 0
        self._starved[:] = 0

    def _hold_out(
        self, report: FilterReport, reached: Scalars, stepped_in: Flags, counted: Flags
    ) -> None:
        """Count consecutive steps without an acceptable action, and warn after too many of them.

        Steps that the calibrated threshold refuses and those that only the adaptive threshold
        refuses are counted apart.
        """
        value = np.asarray(report.value, np.float64)
        before = np.asarray(report.state_value, np.float64)
        nothing = stepped_in & ~np.asarray(report.acceptable) & np.isfinite(value)
        calibrated = (value > -self.delta) | ~np.asarray(report.supported)
        held = nothing & calibrated & (before <= 0.0)
        # After a reset the state is not the one that the last counted step led to.
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
        """Update the margins by the errors of one step.

        Args:
            errors: (n,) e_t of the module, in units of h; finite where `counted` is True.
            counted: (n,) the environments whose error is used. The others do not change.
        """
        rows = np.flatnonzero(counted)
        if not len(rows):
            return
        settings, seen = self.settings, np.asarray(errors, np.float64)[rows]
        wrong = seen > self._margin[rows] + self._rounding
        self._alpha[rows] += settings.rate * (settings.target - wrong)
        self._errors[rows, self._observed[rows] % settings.window] = seen
        self._observed[rows] += 1
        self._wrong[rows] += wrong
        # Entries that are not filled yet are NaN, which np.sort places at the end.
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
    """Return p_t (n,) of the module: the numbers that V_h after the step should not exceed.

    `report` is the shield's report on the step's n actions.
    """
    value = np.asarray(report.value, np.float64)
    held = np.minimum(value, np.asarray(report.state_value, np.float64))
    return np.where(np.asarray(report.acceptable), value, held)
