"""A shield at work: what it has seen of n environments, and what it lets them do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.shield.adaptive import AdaptiveMargin, AdaptiveThreshold, as_adaptive
from safeshield.shield.critics import StateValue
from safeshield.shield.masks import agent_mask
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import plain
from safeshield.spaces.shapes import Flags, Scalars


def as_penalty(intervention_penalty: float) -> float:
    """Return what an intervention costs an agent, a number of at least 0.

    Raises:
        ValueError: it is anything else.
    """
    if not 0.0 <= intervention_penalty < np.inf:
        raise ValueError(
            "intervention_penalty must be finite and at least 0 (it is subtracted from the "
            f"reward), got {intervention_penalty}"
        )
    return float(intervention_penalty)


class Guard:
    """The two halves of a shielded step, for n environments that act together.

    `see` judges the states just reached, once, for their infos and for the actions to come; `act`
    decides on those actions. Wrappers of all kinds stand on these two.

    With an adaptive threshold there is a third, `learn`: what the step led to.

    Args:
        shield: the filter.
        adaptive: lets each environment's threshold follow its errors (`AdaptiveThreshold`, or a
            dict of its arguments).
        certifies: whether the shield's record may speak of these environments: what
            `Shield.check_fits` returned for them. Where it is False, no state is certified.

    Raises:
        TypeError, ValueError: `adaptive` is wrong.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import SafeFQL, SafeFQLConfig, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> guard = Guard(agent.shield().with_delta(0.05))
    >>> guard.see(log.observations[:3]).shape
    (3,)
    >>> executed, report = guard.act(log.actions[:3])
    >>> executed.shape, report.intervened.shape
    ((3, 2), (3,))
    """

    def __init__(
        self,
        shield: Shield,
        adaptive: AdaptiveThreshold | Mapping[str, Any] | None = None,
        *,
        certifies: bool = True,
    ) -> None:
        self.shield = shield
        self._certifies = certifies
        self.adaptive: AdaptiveMargin | None = None
        self._settings = as_adaptive(adaptive)
        self._rows: npt.NDArray[Any] | None = None
        self._states: StateValue | None = None
        self._report: FilterReport | None = None

    @property
    def threshold(self) -> float | Scalars:
        """What Q_h must not exceed now: -delta; where it adapts, (n,) and nowhere above that."""
        return self.shield.threshold if self.adaptive is None else self.adaptive.threshold

    def see(self, observations: Batch) -> Scalars:
        """Judge the states that n environments are in: V_h (n,), infinity where not readable.

        Where this raises, the states seen before are forgotten too: the environments have left
        them.

        Raises:
            ValueError: observations of another shape, or of another number of environments than
                there are margins for.
        """
        self._rows = self._states = None
        rows, _ = self.shield.observation_rows(observations)
        states = self.shield.states(rows)
        if self._settings is not None:
            if self.adaptive is None:
                self.adaptive = AdaptiveMargin(self._settings, self.shield.delta, len(rows))
            elif len(rows) != len(self.adaptive.threshold):
                raise ValueError(
                    f"got {len(rows)} observations, and margins of "
                    f"{len(self.adaptive.threshold)} environments: make a guard for each group"
                )
        values = np.where(self.shield.readable(rows), states.value, np.float32(np.inf))
        self._rows, self._states = rows, states
        return values

    def certified(self, values: Scalars) -> Flags:
        """Whether states of these values (n,) are what the shield's record speaks of.

        The record's delta counts, also where the threshold in force is stricter.
        """
        vouched = self._certifies and self.shield.record is not None
        return (values <= self.shield.threshold) & vouched

    def masks(self) -> Flags:
        """Return `Shield.action_mask` (n, k) of the states last seen, at the present threshold.

        Raises:
            RuntimeError: nothing has been seen yet.
            TypeError: actions are not discrete.
        """
        if self._rows is None or self._states is None:
            raise RuntimeError("see() the states first: call reset()")
        return agent_mask(self.shield, self._states, self._rows, self.threshold)

    def act(self, actions: Batch) -> tuple[Batch, FilterReport]:
        """Return what to execute in the states last seen, and the verdicts.

        The actions are read once, and what is returned shares nothing with them.

        Raises:
            RuntimeError: nothing has been seen yet.
            ValueError: not one action of the right shape for each state.
        """
        if self._rows is None or self._states is None:
            raise RuntimeError("see() the states first: call reset()")
        actions = plain(actions)
        rows, _ = self.shield.action_rows(actions)
        if len(rows) != len(self._rows):
            raise ValueError(f"got {len(rows)} actions for {len(self._rows)} environments")
        executed, report = self.shield.filter_rows(self._states, self._rows, rows, self.threshold)
        self._report = report
        return (self.shield.points(executed) if report.intervened.any() else actions), report

    def learn(self, reached: Scalars, counted: Flags) -> None:
        """Take in what the last `act` led to; without an adaptive threshold, nothing.

        Args:
            reached: (n,) V_h of the states reached, where an episode ended of its last state;
                not finite where that is not known.
            counted: (n,) where an action was executed at all.
        """
        report, self._report = self._report, None
        if self.adaptive is not None and report is not None:
            self.adaptive.learn(report, reached, counted)
