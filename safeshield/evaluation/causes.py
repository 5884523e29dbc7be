"""The cause of each violation in shielded episodes.

An entry is a step from a state without a violation to one with h > 0 (or a cost above 0). A start
with h > 0 counts as an entry as well. Each entry gets exactly one cause, the first one in the
order of `CAUSES` that applies. Facts about the whole run (contradicting reports, another
environment, changed dynamics) are established first, in `Facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from safeshield.evaluation.traces import Trace
from safeshield.rollouts.copies import Identity
from safeshield.shield.backup import BackupController
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.replacement import CommittedFallback
from safeshield.shield.shield import Shield
from safeshield.spaces.shapes import Actions, Flags, Observations, Scalars
from safeshield.support import support_score

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset

CONTRADICTION = "contradicting sources"
UNREADABLE = "unreadable observation"
MISREPLACED = "misreplaced"
START = "uncertified start"
UNSUPPORTED = "outside the support"
CHANGED = "changed environment"
THIN = "thin delta"
BLIND = "blind"
LATE = "late"
CAUSES = (
    CONTRADICTION, UNREADABLE, MISREPLACED, START, UNSUPPORTED, CHANGED, THIN, BLIND, LATE,
)  # fmt: skip
"""The causes, in the order in which they are examined."""

SAME_H = 1e-3
"""Largest difference of two values of the same h, in standard deviations of h over the log."""
FAR = 6.0
"""Distance from the log's mean, in standard deviations, from which a state is unlike the log's."""
WINDOW = 32
"""Number of steps before an entry that are examined."""
FEW = 5.0
"""Largest error of Q_h, in steps of h, that a larger delta is expected to cover."""
_SEARCH = CandidateSet(fallback=8, around=24, box=256)
_SEARCHED = 16
_DRAWS = 64
_RARE = 1e-3
_SHIFT = 1.0
_RATIO, _LEAST_CHANGE, _LEAST_STEPS = 3.0, 0.05, 50
_NEIGHBOURS, _FLOOR = 8, 0.02
_MOST_ROWS, _MOST_QUERIES = 20_000, 4_000


@dataclass(frozen=True)
class Violation:
    """One entry into a violation, or a start in one."""

    episode: int
    """Number of the episode, from 0."""
    step: int
    """Index t of the violating state s[t]; 0 for a start."""
    cause: str
    """One of `CAUSES`."""
    last_safe: int | None
    """Last step before the entry at which V_h <= -delta; None where there was none."""
    last_accepted: int | None
    """Last step before the entry whose executed action was acceptable; None where there was
    none."""
    accepted_value: float | None
    """Q_h of that action, in units of h."""
    error: float | None
    """Highest h of the violation minus `accepted_value`: by how much Q_h was too low."""

    @property
    def steps_before(self) -> int | None:
        """Number of steps from the last acceptable action to the entry."""
        return None if self.last_accepted is None else self.step - self.last_accepted


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts about a whole run, which decide the cause of many entries."""

    contradicts: list[Flags]
    """For each episode (L + 1,) whether a report contradicts the h in use in a state."""
    contradiction: str
    """What contradicts what, in words; "" where nothing does."""
    turned: bool
    """Whether the report is the h in use with the opposite sign."""
    declared: str
    """How the environment differs from that of the record, in words; "" where no difference is
    known."""
    shifted: str
    """How the dynamics differ from those of the log or the critics, in words; "" where they do
    not."""
    compared: bool = False
    """Whether the dynamics were compared with those of a log."""

    @classmethod
    def of(
        cls, shield: Shield, env: object, traces: Sequence[Trace], log: OfflineDataset | None
    ) -> Facts:
        """Return the facts about shielded episodes of an environment.

        Args:
            shield: The shield that acted.
            env: The environment.
            traces: The episodes.
            log: Log of the task, whose transitions are compared with the played ones; None for no
                comparison.
        """
        contradicts, text, turned = _contradictions(shield, traces)
        # Where the reports contradict the h in use, V_h says nothing about the dynamics.
        shifted = "" if text else _shift(shield, traces, log)
        return cls(contradicts, text, turned, _declared(shield, env), shifted, log is not None)


def entries(trace: Trace) -> list[int]:
    """Return the indices t of the states s[t] at which violations begin."""
    bad = trace.violating
    begins = bad & ~np.concatenate([[False], bad[:-1]])
    return [int(t) for t in np.flatnonzero(begins)]


def violations(shield: Shield, traces: Sequence[Trace], facts: Facts) -> list[Violation]:
    """Return all entries of some episodes with their causes.

    Args:
        shield: The shield that acted.
        traces: The episodes.
        facts: Facts about these episodes.
    """
    return [
        _violation(shield, trace, number, t, facts)
        for number, trace in enumerate(traces)
        for t in entries(trace)
    ]


def _violation(shield: Shield, trace: Trace, number: int, t: int, facts: Facts) -> Violation:
    safe = np.flatnonzero(trace.state_value[:t] <= shield.threshold)
    accepted = np.flatnonzero(trace.acceptable[:t])
    last = int(accepted[-1]) if len(accepted) else None
    value = None if last is None else float(trace.value[last])
    later = np.flatnonzero(trace.acceptable[t:])
    end = t + int(later[0]) if len(later) else len(trace)
    peak = max(float(trace.h[t : end + 1].max()), 0.0)
    error = None if value is None else peak - value
    return Violation(
        episode=number,
        step=t,
        cause=_cause(shield, trace, number, t, last, error, facts),
        last_safe=int(safe[-1]) if len(safe) else None,
        last_accepted=last,
        accepted_value=value,
        error=error,
    )


def _cause(
    shield: Shield,
    trace: Trace,
    number: int,
    t: int,
    last: int | None,
    error: float | None,
    facts: Facts,
) -> str:
    rejected = np.arange(0 if last is None else last + 1, t)
    window = np.arange(max(0, t - WINDOW), t)
    if facts.contradicts[number][max(0, t - 1) : t + 1].any():
        return CONTRADICTION
    if not trace.readable[min([*rejected[:1], t]) : t + 1].all():
        return UNREADABLE
    if len(rejected) and _misreplaced(shield, trace, rejected):
        return MISREPLACED
    if t == 0 or (last is None and trace.state_value[0] > shield.threshold):
        return START
    if facts.declared or (facts.shifted and facts.compared):
        # With a log, the dynamics were compared in states and actions that the log shows.
        return CHANGED
    if _unsupported(shield, trace, window, t):
        return UNSUPPORTED
    if facts.shifted:
        return CHANGED
    if error is not None and error <= FEW * shield.model.scale.step_rms:
        return THIN
    return BLIND if last == t - 1 else LATE


# -- replacement and support ---------------------------------------------------------------------


def _misreplaced(shield: Shield, trace: Trace, steps: npt.NDArray[np.int64]) -> bool:
    """Whether a broad search finds a better action than ran where what ran was not acceptable."""
    if len(steps) > _SEARCHED:
        steps = np.concatenate([steps[: _SEARCHED // 2], steps[-_SEARCHED // 2 :]])
    rows = trace.observations[steps]
    states = shield.states(rows)
    model = shield.model
    wanted = np.clip(trace.proposed[steps], model.action_codec.low, model.action_codec.high)
    wanted = np.where(np.isfinite(wanted), wanted, model.action_codec.low).astype(np.float32)
    found = _SEARCH.actions(model, states, wanted)
    candidates = np.concatenate([wanted[:, None], found], axis=1)
    if model.action_codec.discrete:
        candidates = found
    elif shield.support is not None:
        drawn = shield.support.proposals(model, states)
        candidates = np.concatenate([candidates, drawn], axis=1)
    good, values = shield.acceptable(states, rows, candidates)
    gap = trace.value[steps] - values.min(axis=1)
    # An alternative that is better by a rounding error is no fault of the replacement. A committed
    # fallback may run without being acceptable; it is at fault only where it is clearly worse.
    committed = isinstance(shield.replacement, CommittedFallback | BackupController)
    least = (1.0 if committed else 0.1) * model.scale.step_rms
    better = good.any(axis=1) & (gap > least)
    if shield.support is None:
        better |= gap > model.scale.step_rms
    return bool(better[0] or better.mean() > 0.5)


def _unsupported(shield: Shield, trace: Trace, steps: npt.NDArray[np.int64], t: int) -> bool:
    """Whether a state or an executed action in `steps` before s[t] is unlike the log's."""
    if _distance(shield, trace.observations[[*steps, t]]).max() > FAR:
        return True
    if shield.support is not None and not trace.supported[t - 1]:
        return True
    unlike = unlike_log(shield, trace.observations[steps], trace.executed[steps])
    if not unlike.any():
        return False
    # An unusual action is to blame only where its Q_h was too low.
    wrong = np.nan_to_num(trace.residuals[steps[unlike]])
    return bool(wrong.sum() > shield.model.scale.step_rms)


def unlike_log(shield: Shield, rows: Observations, actions: Actions) -> Flags:
    """Return whether actions (n, act) in n states are unlike those of the log's behaviour, (n,).

    The support test decides where the shield has one. Otherwise a continuous action is unlike the
    log's where its score is below those of 64 draws of the imitated behaviour in the same state,
    and a discrete one where its probability is below 0.001. Without a model of the behaviour no
    action is.

    Args:
        shield: The shield.
        rows: (n, obs) observations.
        actions: (n, act) executed actions, as rows.
    """
    model, states = shield.model, shield.states(rows)
    if shield.support is not None:
        return ~shield.support.accepts(model, states, actions)
    if not model.knows_behaviour:
        return np.zeros(len(rows), np.bool_)
    score = support_score(None, model)
    own = np.asarray(score(model, states, actions))
    if model.action_codec.discrete:
        return np.asarray(own < np.log(_RARE))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(rows), _DRAWS, model.behaviour_noise_features))
    draws = model.behaviour(states, noise.astype(np.float32))
    many = states.take(np.repeat(np.arange(len(rows)), _DRAWS))
    shown = np.asarray(score(model, many, draws.reshape(len(rows) * _DRAWS, -1)))
    return np.asarray(own < shown.reshape(len(rows), _DRAWS).min(axis=1))


def _distance(shield: Shield, rows: Observations) -> Scalars:
    """Return the largest distance (n,) of an entry from the log's mean, in standard deviations."""
    scaling = shield.model.scaling
    far = np.abs(rows - scaling.observation_mean) / scaling.observation_spread
    counts = np.array(shield.model.observation_codec.categories, dtype=bool)
    far = np.where(counts[None] if counts.size else False, 0.0, far)
    return np.asarray(np.where(np.isfinite(far), far, 0.0).max(axis=1), np.float64)


# -- facts about the whole run -------------------------------------------------------------------


def _contradictions(shield: Shield, traces: Sequence[Trace]) -> tuple[list[Flags], str, bool]:
    """Return where reports contradict the h in use, a text, and whether the sign is turned."""
    exact = shield.model.constraint is not None
    spread = shield.model.scale.spread
    nothing = [np.zeros(len(trace) + 1, np.bool_) for trace in traces]
    readable = np.concatenate([trace.readable for trace in traces])
    if not readable.any():
        return nothing, "", False
    used = np.concatenate([trace.used for trace in traces])[readable]
    value = np.concatenate([trace.state_value for trace in traces])[readable]
    told = _joined([trace.reported for trace in traces], readable)
    cost = _joined([trace.costs for trace in traces], readable)
    turned = False
    if told is not None:
        with np.errstate(invalid="ignore", divide="ignore"):
            # NaN where a report never changes, and the comparison is then False.
            turned = bool(np.corrcoef(told, used)[0, 1] < -0.5)
    elif cost is not None and (cost > 0).any() and (cost <= 0).any():
        # Costs of at least 90% of the states have the sign that -h would give them.
        signs = np.mean(used[cost > 0] <= 0), np.mean(used[cost <= 0] > 0)
        turned = bool(min(signs) >= 0.9)
    most = SAME_H * spread
    if not exact:
        # V_h is never below h. A network's estimate has errors, so only a large error in most of
        # the violating states is a contradiction.
        most = 0.1 * spread
        # A cost says only that h is above 0.
        above = np.zeros(len(used)) if cost is None else np.where(cost > 0, 0.0, -np.inf)
        level = above if told is None else told
        gap = (level - value)[level > 0 if told is not None else level == 0]
        if not len(gap) or float(np.median(gap)) <= most:
            return nothing, "", False
    flags = []
    for trace in traces:
        flag = np.zeros(len(trace) + 1, np.bool_)
        known = trace.used if exact else trace.state_value
        if trace.reported is not None:
            apart = trace.reported - known
            flag |= (np.abs(apart) if exact else apart) > most
        if trace.costs is not None:
            flag |= (trace.costs > 0) & (known <= -most)
        if not exact:
            # Far from the log an estimate is an extrapolation.
            flag &= _distance(shield, trace.observations) <= FAR
        flags.append(flag & trace.readable)
    where = np.concatenate(flags)
    if not where.any():
        return nothing, "", False
    share = float(where.mean())
    number, t = next((i, int(np.argmax(flag))) for i, flag in enumerate(flags) if flag.any())
    one = traces[number]
    source = f"the source '{shield.constraint}'"
    name = source if exact else "V_h, which is never below h"
    says = []
    if one.reported is not None:
        says.append(f"h = {one.reported[t]:.4g}")
    if one.costs is not None:
        says.append(f"cost {one.costs[t]:.4g}")
    text = (
        f"in {share:.1%} of the states the environment's report contradicts {name}; first in "
        f"episode {number}, state {t}: the environment reports {' and '.join(says)}, and "
        f"{'the source says h' if exact else 'the shield says V_h'} = "
        f"{(one.used if exact else one.state_value)[t]:.4g}"
    )
    return flags, text, turned


def _joined(columns: Sequence[Scalars | None], readable: Flags) -> Scalars | None:
    """Return the readable entries of all episodes' columns; None where one of them is None."""
    present = [column for column in columns if column is not None]
    return np.concatenate(present)[readable] if len(present) == len(columns) else None


def _declared(shield: Shield, env: object) -> str:
    differs = [] if shield.record is None else shield.record.differences(Identity.of(env))
    return f"the environment is not that of the record: {'; '.join(differs)}" if differs else ""


def _shift(shield: Shield, traces: Sequence[Trace], log: OfflineDataset | None) -> str:
    """Return how the dynamics differ from those of the log or of the critics; "" if they agree."""
    if log is not None:
        return _shift_from_log(shield, traces, log)
    step = shield.model.scale.step_rms
    means = []
    for trace in traces:
        for t in entries(trace):
            window = np.arange(max(0, t - WINDOW), t)
            window = window[_distance(shield, trace.observations[window]) <= FAR]
            if len(window) and np.isfinite(trace.residuals[window]).any():
                means.append(float(np.nanmean(trace.residuals[window])) / step)
    if not means or float(np.median(means)) <= _SHIFT:
        return ""
    return (
        f"in the {WINDOW} steps before an entry the value rises by {np.median(means):.2g} steps of "
        "h more at each step than Q_h says (median of the entries)"
    )


def _shift_from_log(shield: Shield, traces: Sequence[Trace], log: OfflineDataset) -> str:
    """Compare how states change with how they changed in the log after like states and actions."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(log))
    known, held = order[:_MOST_ROWS], order[_MOST_ROWS:][:_MOST_QUERIES]
    if not len(held):
        known, held = order[: -len(order) // 4], order[-len(order) // 4 :]
    states = np.concatenate([trace.observations[:-1] for trace in traces])
    moves = np.concatenate([np.diff(trace.observations, axis=0) for trace in traces])
    actions = np.concatenate([trace.executed for trace in traces])
    readable = np.concatenate([trace.readable[:-1] & trace.readable[1:] for trace in traces])
    played = np.flatnonzero(readable)
    played = rng.permutation(played)[:_MOST_QUERIES]
    changes = log.next_observations - log.observations
    unit = np.sqrt(np.square(changes).mean(axis=0, dtype=np.float64))
    unit = np.where(unit > 0, unit, 1.0)
    scaling = shield.model.scaling

    def features(rows: npt.NDArray[Any], taken: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        inputs = [scaling.observations(rows), scaling.actions(taken)]
        return np.concatenate(inputs, axis=1).astype(np.float64)

    tree = cKDTree(features(log.observations[known], log.actions[known]))

    def surprise(
        rows: npt.NDArray[Any], taken: npt.NDArray[Any], change: npt.NDArray[Any]
    ) -> tuple[Scalars, Scalars, Scalars]:
        """Return distance, error and error in standard deviations of the neighbours' changes."""
        far, which = tree.query(features(rows, taken), k=_NEIGHBOURS)
        near = changes[known][which] / unit
        error = np.abs(change / unit - near.mean(axis=1))
        relative = error / (near.std(axis=1) + _FLOOR)
        return far[:, -1], error.max(axis=1), relative.max(axis=1)

    near, _, before = surprise(log.observations[held], log.actions[held], changes[held])
    limit = float(np.quantile(near, 0.9))
    apart, error, now = surprise(states[played], actions[played], moves[played])
    like = apart <= limit
    if np.count_nonzero(like) < _LEAST_STEPS:
        return ""
    usual, seen = float(np.median(before[near <= limit])), float(np.median(now[like]))
    if float(np.median(error[like])) <= _LEAST_CHANGE or seen <= _RATIO * usual:
        return ""
    return (
        "after states and actions like the log's the state changes differently than it did in the "
        f"log: by {seen:.2g} standard deviations of the changes after the {_NEIGHBOURS} most "
        f"similar logged steps (median of {np.count_nonzero(like)} steps), where the log's own "
        f"transitions differ by {usual:.2g}"
    )
