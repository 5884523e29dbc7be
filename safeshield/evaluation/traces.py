"""Shielded episodes with every judgement of the shield, as a diagnosis needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.nn.mlp import layers, run
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import BatchPolicy, start_wave
from safeshield.rollouts.recorded import Episode
from safeshield.shield.critics import StateValue
from safeshield.shield.report import FilterReport
from safeshield.shield.sensors import SensorState
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch, copied
from safeshield.spaces.generic import Env, VectorEnv
from safeshield.spaces.shapes import Actions, Flags, Observations, Scalars
from safeshield.values.units import CONSTRAINT

Column = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Trace:
    """One shielded episode of L steps. Row t of an array (L, ...) belongs to the step from s[t].

    Values are in units of h. A value is infinite where the observation is not readable.
    """

    observations: Observations
    """(L + 1, obs) s[0] to s[L], as rows of `spaces.rows`."""
    proposed: Actions
    """(L, act) the actions that the policy proposed, as rows."""
    executed: Actions
    """(L, act) the actions that the shield executed, as rows."""
    intervened: Flags
    """(L,) whether the shield replaced the proposed action."""
    acceptable: Flags
    """(L,) whether the executed action passes every test of the shield."""
    supported: Flags
    """(L,) whether the executed action passes the support test; True without such a test."""
    proposed_value: Scalars
    """(L,) Q_h of the proposed action."""
    value: Scalars
    """(L,) Q_h of the executed action."""
    state_value: Scalars
    """(L + 1,) V_h of s[0] to s[L]."""
    readable: Flags
    """(L + 1,) whether the observations are readable and determine h."""
    used: Scalars
    """(L + 1,) h of the states in use: by the shield's source, or by its network's estimate."""
    reported: Scalars | None
    """(L + 1,) h that the environment reports, in units of the shield's h; None where it reports
    none, or in other units."""
    costs: Scalars | None
    """(L + 1,) costs that the environment reports, 0 at reset where none is reported there; None
    where it reports none. Where h is reported in other units, at least 1 in a violation."""

    def __len__(self) -> int:
        return len(self.value)

    @property
    def violating(self) -> Flags:
        """(L + 1,) whether h > 0 is reported of the states, or a cost above 0."""
        bad = np.zeros(len(self) + 1, np.bool_)
        if self.reported is not None:
            bad |= self.reported > 0
        if self.costs is not None:
            bad |= self.costs > 0
        return bad

    @property
    def h(self) -> Scalars:
        """(L + 1,) h that the environment reports, or else h in use."""
        return self.used if self.reported is None else self.reported

    @property
    def residuals(self) -> Scalars:
        """(L,) max(h(s[t+1]), V_h(s[t+1])) - Q_h(s[t], a[t]); NaN where a value is not known."""
        with np.errstate(invalid="ignore"):
            raw = np.maximum(self.h[1:], self.state_value[1:]) - self.value
        return np.where(np.isfinite(raw), raw, np.nan)


class _Recorder:
    """A proposing policy followed by the shield, which keeps every report."""

    batched = True

    def __init__(self, shield: Shield, proposals: BatchPolicy) -> None:
        self._shield = shield
        self._proposals = proposals
        self.waves: list[list[tuple[Column, Column, FilterReport]]] = []
        self._sensors: SensorState | None = None

    def start_wave(self, num_envs: int) -> None:
        self.waves.append([])
        self._sensors = self._shield.sensor_state(num_envs, quiet=True)
        start_wave(self._proposals, num_envs)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> Column:
        shield = self._shield
        proposed = np.asarray(self._proposals(copied(observations), rng))
        if not shield.model.action_codec.discrete:
            # The shield must judge the same float32 numbers that the environment gets.
            proposed = proposed.astype(np.float32)
        executed, report = shield.filter(observations, proposed, sensors=self._sensors)
        rows = [np.array(shield.action_rows(each)[0]) for each in (proposed, executed)]
        self.waves[-1].append((rows[0], rows[1], report))
        return executed


def shielded_traces(
    shield: Shield,
    env: Env | VectorEnv,
    policy: BatchPolicy,
    episodes: int,
    seed: int,
    num_envs: int | None = None,
) -> list[Trace]:
    """Run whole shielded episodes and return them with the judgements of the shield.

    Args:
        shield: The shield that filters the actions of `policy`.
        env: The environment, without a shield around it.
        policy: The policy that proposes actions.
        episodes: Number of episodes.
        seed: Seed of starts and noise.
        num_envs: Number of environments that step together.
    """
    recorder = _Recorder(shield, policy)
    runs = run_episodes(
        env,
        recorder,
        episodes,
        seed,
        num_envs=num_envs,
        observation_keys=shield.observation_keys,
    )
    columns = (
        ([(a[i], b[i], report.row(i)) for a, b, report in wave], i)
        for wave in recorder.waves
        for i in range(len(wave[0][0]))
    )
    # The last wave may have more environments than episodes that were still needed.
    return [
        _trace(shield, one, steps[: len(one)])
        for one, (steps, _) in zip(runs, columns, strict=False)
    ]


def _trace(
    shield: Shield, one: Episode, steps: Sequence[tuple[Column, Column, FilterReport]]
) -> Trace:
    rows = np.concatenate([one.observations, one.next_observations[-1:]])
    states = shield.states(rows)
    readable = shield.known(states, rows)
    reports = [report for _, _, report in steps]
    reported = costs = None
    if one.costs is not None:
        costs = np.concatenate([[one.initial_cost or 0.0], one.costs]).astype(np.float64)
    if one.constraints is not None and one.next_constraints is not None:
        reported = np.concatenate([one.constraints[:1], one.next_constraints]).astype(np.float64)
        source = shield.model.constraint
        names = () if source is None else source.names
        if source is not None and one.named and set(names) <= set(one.named):
            reported = source.largest(np.stack([one.named[name] for name in names], axis=1))
        elif one.named or len(names) > 1:
            # The units differ from those of h, so the report says only which states violate.
            violated = (reported > 0).astype(np.float64)
            reported, costs = None, violated if costs is None else np.maximum(costs, violated)
    if reported is None and costs is None:
        raise ValueError(
            "the environment reports neither info['constraint'] nor info['cost'], so violations "
            "cannot be seen: wrap it in safeshield.wrappers.ConstraintFromFunction or "
            "CostFromFunction"
        )
    return Trace(
        observations=rows,
        proposed=np.stack([proposed for proposed, _, _ in steps]),
        executed=np.stack([executed for _, executed, _ in steps]),
        intervened=np.array([report.intervened for report in reports], np.bool_),
        acceptable=np.array([report.acceptable for report in reports], np.bool_),
        supported=np.array([report.supported for report in reports], np.bool_),
        proposed_value=np.array([report.proposed_value for report in reports], np.float64),
        value=np.array([report.value for report in reports], np.float64),
        state_value=np.where(readable, states.value, np.inf).astype(np.float64),
        readable=readable,
        used=constraint_in_use(shield, states),
        reported=reported,
        costs=costs,
    )


def constraint_in_use(shield: Shield, states: StateValue) -> Scalars:
    """Return h (n,) of states: by the shield's source, and by its network where that knows none.

    Args:
        shield: The shield.
        states: Result of `Shield.states`.
    """
    model = shield.model
    raw = run(layers(model.networks[CONSTRAINT]), states.inputs)[0, :, 0]
    estimate = np.asarray(model.scale.offset + model.scale.spread * raw, np.float64)
    if states.constraint is None:
        return estimate
    return np.where(np.isfinite(states.constraint), states.constraint, estimate)
