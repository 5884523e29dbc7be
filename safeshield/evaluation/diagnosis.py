"""Why a shield failed: shielded episodes, the cause of every violation, and what to do.

`Shield.diagnose` and the command ``safeshield diagnose`` call `diagnose`. `evaluation.causes` has
the rules that assign the causes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from safeshield.evaluation.causes import (
    BLIND,
    CAUSES,
    CHANGED,
    CONTRADICTION,
    FEW,
    LATE,
    MISREPLACED,
    START,
    THIN,
    UNREADABLE,
    UNSUPPORTED,
    Facts,
    Violation,
    violations,
)
from safeshield.evaluation.traces import Trace, shielded_traces
from safeshield.files.schema import json_values
from safeshield.rollouts.copies import check_env, environment_name, spaces_of
from safeshield.rollouts.policies import as_batch_policy, default_name
from safeshield.shield.nested import refuse_shielded
from safeshield.shield.replacement import describe
from safeshield.shield.shield import Shield, UncalibratedShieldWarning
from safeshield.spaces.generic import Env, VectorEnv

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset

_NEAR = 18.0
SUMS = (1, 8, 32, 128)
"""Numbers of steps over which the residuals are summed."""


@dataclass(frozen=True)
class RunningSum:
    """Greatest sum of V_h(s[t+1]) - Q_h(s[t], a[t]) over successive steps of an episode.

    The unit is the typical change of h in one step. Only steps near the boundary count, from states
    with abs(V_h) below 18 of these units. Where Q_h is right, the sums are near 0 or below. Where
    they grow with the number of steps, the value of a state rises again and again by more than Q_h
    said.
    """

    steps: int
    """Number of successive steps; shorter episodes count as a whole."""
    median: float
    """Median over the episodes."""
    high: float
    """95% quantile over the episodes."""


@dataclass(frozen=True)
class Diagnosis:
    """What happened in shielded episodes, and the cause of every violation."""

    environment: str
    """Id of the environment, or the name of its class."""
    policy: str
    """Name of the policy that proposed the actions."""
    deterministic: bool
    """The `deterministic` with which the policy's ``predict`` was called."""
    seed: int
    """Seed of the starts and of the noise."""
    delta: float
    """Delta of the shield, in units of h."""
    replacement: str
    """How the shield replaces actions, "" for the default; see `shield.replacement.describe`."""
    one_step: float
    """Typical change of h in one step over the log (root mean square), in units of h."""
    episodes: int
    """Number of episodes, from all starts of the environment."""
    steps: int
    """Number of steps in all."""
    start_share: float
    """Share of the starts with V_h <= -delta."""
    violating_episodes: int
    """Number of episodes with h > 0 (or a cost above 0) in any state."""
    counts: dict[str, int]
    """Number of entries by cause, the most frequent cause first. Starts that are not certified
    come last, because they are no fault of the shield."""
    entries: tuple[Violation, ...]
    """All entries into violations."""
    replaced: float
    """Share of the steps in which the shield replaced the action."""
    without_acceptable: float
    """Share of the steps in which the shield found no acceptable action."""
    handovers: float
    """Number of steps, per 1,000 steps, whose action was acceptable and after which the shield
    found no acceptable one."""
    running_sums: tuple[RunningSum, ...]
    """Greatest sums of the residuals over several numbers of steps."""
    needed_delta: float | None
    """Smallest delta that would have rejected the last accepted action of every entry with the
    cause "thin delta", and that covers the error of Q_h there; None without such entries. It is a
    lower bound on the delta that is needed, because a rejected action changes what follows."""
    turned: bool
    """Whether the environment reports h with the opposite sign of the h in use."""
    estimated: bool
    """Whether a network estimates h."""
    declared: bool
    """Whether the environment's id, arguments, wrappers or horizon differ from the record's."""
    compared: bool
    """Whether the transitions were compared with those of a log."""
    findings: tuple[str, ...]
    """Facts about the whole run in words: contradicting reports, another environment, changed
    dynamics."""
    worst: Trace = field(compare=False, repr=False)
    """The worst episode: of those that violate, the one of highest h (or highest summed cost),
    preferably from a start with V_h <= -delta; where none violates, the one of highest V_h."""
    worst_episode: int
    """Number of that episode."""

    @property
    def cause(self) -> str | None:
        """The most likely cause: that of most entries; None without a violation."""
        return next(iter(self.counts), None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with h, V_h and Q_h along the worst episode."""
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "worst"}
        kept["entries"] = [json_values(one) for one in self.entries]
        kept["running_sums"] = [json_values(one) for one in self.running_sums]
        worst = self.worst
        traced = {
            "h": worst.h, "state_value": worst.state_value, "proposed_value": worst.proposed_value,
            "value": worst.value, "acceptable": worst.acceptable, "intervened": worst.intervened,
        }  # fmt: skip
        trace = {name: [_json(x) for x in column.tolist()] for name, column in traced.items()}
        return {**kept, "findings": list(self.findings), "cause": self.cause, "worst": trace}

    def summary(self) -> str:
        """Return in words what happened, the most likely cause first, and what to do."""
        lines = [
            f"{self.episodes} shielded episodes of {self.environment} with the policy "
            f"'{self.policy}' at delta {self.delta:.4g}: {self.violating_episodes} violate. "
            f"{self.replaced:.1%} of the {self.steps} steps were replaced; in "
            f"{self.without_acceptable:.1%} no acceptable action was found. {self.start_share:.1%} "
            "of the starts have V_h <= -delta.",
        ]
        if self.cause is None:
            lines.append("No state was a violation, so there is no cause to name.")
        for number, (cause, count) in enumerate(self.counts.items()):
            head = "Most likely cause" if number == 0 else "Also"
            lines.append(
                f"{head}: {cause} ({count} of {len(self.entries)} entries into a violation). "
                f"{self._explanation(cause)}\n  What to do: {self._advice(cause)}"
            )
        lines += [f"Seen in the whole run: {one}." for one in self.findings]
        sums = ", ".join(f"{one.high:.3g} over {one.steps}" for one in self.running_sums)
        lines.append(
            f"{self.handovers:.3g} of 1,000 steps led from an acceptable action to a state without "
            f"one. The value rose by more than Q_h said by up to (95% quantile over the episodes, "
            f"in typical changes of h of one step, {self.one_step:.3g}): {sums} steps."
        )
        return "\n".join(lines)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw h, V_h, Q_h of proposed and executed actions and the threshold in one picture.

        It shows the worst episode. Where that violates, it shows the steps around the first entry.

        Args:
            path: File to write: .png, .svg, .pdf or another format of matplotlib.
        """
        from safeshield.evaluation.diagnosis_picture import draw_trace

        marks = [one for one in self.entries if one.episode == self.worst_episode]
        draw_trace(path, self.worst, self.delta, marks, f"{self.environment}, '{self.policy}'")

    # -- words ----------------------------------------------------------------------------------

    def _of(self, cause: str) -> list[Violation]:
        return [one for one in self.entries if one.cause == cause]

    def _explanation(self, cause: str) -> str:
        some = self._of(cause)
        if cause == CONTRADICTION:
            if self.turned:
                return (
                    "The environment reports h with the opposite sign of the h that the shield "
                    "uses. h <= 0 is safe: is the sign turned?"
                )
            return (
                "The environment's constraint or cost contradicts the h that the shield uses, so "
                "the shield protects another constraint."
            )
        if cause == START:
            return (
                "The episode began in a violation, or in a state with V_h > -delta, and no "
                "acceptable action was found before the entry. The shield promises nothing there."
            )
        if cause == LATE:
            return _late(some)
        accepted = [one.accepted_value for one in some if one.accepted_value is not None]
        level = f"{np.median(accepted):.3g}" if accepted else "not known"
        return {
            UNREADABLE: (
                "The observation was NaN, infinite, or otherwise not readable, so the shield acted "
                "without knowing the state."
            ),
            MISREPLACED: (
                "The shield ran an action that was not acceptable, or was worse than necessary, "
                "although a broad search finds a better one. The replacement is at fault, and not "
                "the value."
            ),
            UNSUPPORTED: (
                "The state, or the action that ran, is unlike those of the log, so its value is an "
                "extrapolation."
            ),
            CHANGED: (
                "The environment is another one than that of the calibration, or its dynamics "
                "differ from those that the shield learned."
            ),
            THIN: (
                f"Q_h of the last acceptable action was {level} (median) and was too low by at "
                f"most {FEW:g} steps' change of h. A delta of {self.delta:.4g} does not cover "
                "errors of this size."
            ),
            BLIND: (
                "The shield accepted every action until h > 0. Q_h of the last one was "
                f"{level} (median). The shield does not see this violation coming."
            ),
        }[cause]

    def _advice(self, cause: str) -> str:
        if cause == BLIND and self.estimated:
            return (
                "Compute h from the observation if it determines h: label the log with "
                "OfflineDataset.with_constraint(function) and train again. If it does not, add "
                "what is missing to the observation, or log more episodes near such violations."
            )
        if cause == CHANGED and not self.compared and not self.declared:
            return f"{_ADVICE[CHANGED]} {_COMPARE}"
        if cause == LATE and not self.compared:
            return f"{_ADVICE[LATE]} {_COMPARE}"
        if cause == THIN and self.needed_delta is not None:
            return (
                "Let shield.calibrate(env, policy=...) choose and test delta; pass deltas= if its "
                f"thresholds are too far apart. At delta {self.needed_delta:.3g} the last accepted "
                "action of all these entries would have been rejected. This is a lower bound: an "
                "agent that is turned back there may violate elsewhere."
                f"{'' if self.compared else ' ' + _COMPARE}"
            )
        if cause == CONTRADICTION and self.turned:
            return (
                "Find out which of the two is wrong. Where the environment is, negate the "
                "function of ConstraintFromFunction or the number in info['constraint']. Where "
                "the shield is, label the log with the negated function by "
                "OfflineDataset.with_constraint, and train again."
            )
        if cause == MISREPLACED and self.replacement.startswith("CommittedFallback"):
            return _COMMITTED
        if cause == MISREPLACED and self.replacement.startswith("BackupController"):
            return _BACKUP
        return _ADVICE[cause]


_COMPARE = (
    "To tell changed dynamics from a value that was too optimistic from the beginning, pass the "
    "training log: diagnose(..., log=log), or --log on the command line."
)
_COMMITTED = (
    "This shield always runs its fallback (CommittedFallback), also where that is not acceptable. "
    "If the fallback is at fault, train longer; compare with shield.with_replacement("
    "FallbackPolicy()), which takes the nearest acceptable candidate there, or with "
    "NearestAcceptable(), and calibrate again."
)
_BACKUP = (
    "This shield always runs its backup controller, also where that is not acceptable. Let the "
    "controller run alone from such states: if it violates, improve it, register it under a new "
    "version and train again; if it does not, log it in such states (HandOver) and train again. Or "
    "compare with shield.with_replacement(NearestAcceptable()), and calibrate again."
)
_ADVICE = {
    CONTRADICTION: (
        "Make both the same quantity: label the log with the function by which the environment "
        "computes h (OfflineDataset.with_constraint) and train again; or, where the shield's h is "
        "the right one, report it in info['constraint'] (ConstraintFromFunction)."
    ),
    UNREADABLE: (
        "Repair the sensor, or filter its readings in a wrapper inside the shield. "
        "shield.readable(rows) says which observations the shield can read."
    ),
    MISREPLACED: (
        "Use shield.with_replacement(NearestAcceptable(CandidateSet(box=256))), which searches "
        "more widely, or ProjectedGradient() where actions have many entries; then calibrate "
        "again."
    ),
    START: (
        "Begin in certified states: CertifiedStarts(SafetyShield(env, shield)), or evaluate(..., "
        "starts='certified'). A delta that is too large also leaves few certified starts."
    ),
    UNSUPPORTED: (
        "Log episodes that reach these states and recover from them (collect with a broader "
        "policy), and train again. shield.with_support(held_out) refuses actions that the log does "
        "not show."
    ),
    CHANGED: (
        "Calibrate in this environment: shield.calibrate(env, policy=...). Where no threshold "
        "passes, collect a log here and train again. Where the dynamics change slowly, "
        "SafetyShield(env, shield, adaptive=AdaptiveThreshold()) follows."
    ),
    THIN: "Let shield.calibrate(env, policy=...) choose and test a larger delta.",
    BLIND: (
        "The shield's h is exact, so the value is wrong: train longer, or log more episodes near "
        "such violations; and check that the observation shows everything on which the next "
        "states depend, such as speeds."
    ),
    LATE: (
        "Test larger deltas with shield.calibrate(env, policy=..., deltas=[...]). If none passes, "
        "train a more cautious value (a lower safety_expectile in the settings; the default is "
        "0.9, with discrete actions 0.99), and log episodes that recover from such states."
    ),
}


def _late(some: Sequence[Violation]) -> str:
    before = [one.steps_before for one in some if one.steps_before is not None]
    accepted = [one.accepted_value for one in some if one.accepted_value is not None]
    if not before:
        return (
            "V_h <= -delta held at the start, but no acceptable action was found there: the value "
            "promised an escape that the shield did not find."
        )
    safe = [one.step - one.last_safe for one in some if one.last_safe is not None]
    words = (
        f"Nothing acceptable was left. The last acceptable action ran {np.median(before):g} steps "
        f"before the entry (median), with Q_h = {np.median(accepted):.3g}"
    )
    if safe:
        words += f"; V_h <= -delta held last {np.median(safe):g} steps before the entry"
    return f"{words}. The value promised an escape that was not there."


def diagnose(
    shield: Shield,
    env: Env | VectorEnv,
    policy: object = "random",
    *,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int | None = None,
    deterministic: bool = False,
    policy_name: str | None = None,
    log: OfflineDataset | None = None,
) -> Diagnosis:
    """Run shielded episodes and find the cause of every violation.

    Episodes begin in all starts of the environment, also in those that are not certified.

    Args:
        shield: The shield.
        env: The environment, without a shield around it. It must report ``info["constraint"]`` or
            ``info["cost"]``.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes.
        episodes: Number of whole episodes.
        seed: Seed of starts and noise.
        num_envs: Number of environments that step together.
        deterministic: The `deterministic` with which a policy's ``predict`` is called. Choose what
            will be deployed.
        policy_name: Name of the policy in the summary.
        log: The log from which the shield was trained. The played transitions are then compared
            with its own, which tells changed dynamics from a value that was always too low.

    Raises:
        ValueError: An argument is out of range, the spaces differ, the environment is shielded, or
            it reports neither a constraint nor a cost.
        TypeError: `env` is not an environment.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import ShieldConfig, ShieldTrainer, collect
    >>> env = gymnasium.make("safeshield/Boat-v0")
    >>> log = collect(env, "random", episodes=20, seed=0)
    >>> trainer = ShieldTrainer(ShieldConfig(critic_hidden=(16,), behaviour_hidden=(16,)))
    >>> found = trainer.fit(log, steps=30).shield().diagnose(env, "random", episodes=3)
    >>> found.episodes, sum(found.counts.values()) == len(found.entries)
    (3, True)
    """
    check_env(env)
    refuse_shielded(env, "pass the plain environment")
    shield.check_fits(*spaces_of(env))
    if log is not None and log.flat_observations.width != shield.model.observation_codec.width:
        raise ValueError(
            f"log must have observations of width {shield.model.observation_codec.width}, as the "
            f"shield has, got {log.flat_observations.width}"
        )
    acting = as_batch_policy(policy, spaces_of(env)[1], deterministic=deterministic)
    with warnings.catch_warnings():
        # The question is why the shield fails, whether it is calibrated or not.
        warnings.simplefilter("ignore", UncalibratedShieldWarning)
        traces = shielded_traces(shield, env, acting, episodes, seed, num_envs)
        facts = Facts.of(shield, env, traces, log)
        found = violations(shield, traces, facts)
    counts = {
        cause: count for cause in CAUSES if (count := sum(one.cause == cause for one in found))
    }
    ranked = sorted(counts.items(), key=lambda item: (item[0] == START, -item[1]))
    acceptable = np.concatenate([trace.acceptable for trace in traces])
    lost = sum(
        int(np.count_nonzero(trace.acceptable[:-1] & ~trace.acceptable[1:])) for trace in traces
    )
    thin = [one for one in found if one.cause == THIN]
    worst = _worst(traces, shield.threshold)
    return Diagnosis(
        environment=environment_name(env),
        policy=policy_name or default_name(policy),
        deterministic=deterministic,
        seed=seed,
        delta=shield.delta,
        replacement=describe(shield.replacement),
        one_step=shield.model.scale.step_rms,
        episodes=episodes,
        steps=len(acceptable),
        start_share=float(np.mean([t.state_value[0] <= shield.threshold for t in traces])),
        violating_episodes=sum(bool(trace.violating.any()) for trace in traces),
        counts=dict(ranked),
        entries=tuple(found),
        replaced=float(np.concatenate([trace.intervened for trace in traces]).mean()),
        without_acceptable=float(1.0 - acceptable.mean()),
        handovers=1000.0 * lost / len(acceptable),
        running_sums=_running_sums(traces, shield.model.scale.step_rms),
        needed_delta=_needed_delta(thin),
        turned=facts.turned,
        estimated=shield.model.constraint is None,
        declared=bool(facts.declared),
        compared=log is not None,
        findings=tuple(one for one in (facts.contradiction, facts.declared, facts.shifted) if one),
        worst=traces[worst],
        worst_episode=worst,
    )


def _needed_delta(thin: Sequence[Violation]) -> float | None:
    """Return the delta that rejects the last accepted actions and covers the errors of Q_h."""
    if not thin:
        return None
    known = [(one.accepted_value or 0.0, one.error or 0.0) for one in thin]
    needed = max(max(-value, error) for value, error in known)
    return float(np.nextafter(np.float32(needed), np.float32(np.inf)))


def _running_sums(traces: Sequence[Trace], unit: float) -> tuple[RunningSum, ...]:
    sums = []
    for steps in SUMS:
        highest = []
        for trace in traces:
            near = np.abs(trace.state_value[:-1]) < _NEAR * unit
            counted = np.where(near, np.nan_to_num(trace.residuals) / unit, 0.0)
            total = np.concatenate([[0.0], np.cumsum(counted)])
            width = min(steps, len(trace))
            highest.append(float((total[width:] - total[:-width]).max()))
        sums.append(RunningSum(steps, float(np.median(highest)), float(np.quantile(highest, 0.95))))
    return tuple(sums)


def _worst(traces: Sequence[Trace], threshold: float) -> int:
    """Return the index of the worst episode."""

    def badness(trace: Trace) -> tuple[bool, bool, float]:
        bad = bool(trace.violating.any())
        begun = bool(trace.state_value[0] <= threshold)
        if bad and trace.reported is None and trace.costs is not None:
            return bad, begun, float(trace.costs.sum())
        values = trace.h if bad else trace.state_value
        known = values[np.isfinite(values)]
        return bad, begun, float(known.max()) if len(known) else -np.inf

    return max(range(len(traces)), key=lambda i: badness(traces[i]))


def _json(value: Any) -> Any:  # noqa: ANN401 - a number or a flag
    """Return a number for JSON, which has no infinity."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
