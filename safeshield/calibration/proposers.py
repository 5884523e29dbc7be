"""Who proposes the actions while a shield is being calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import INTERVENED
from safeshield.rollouts.policies import BatchPolicy, as_batch_policy, start_wave
from safeshield.rollouts.recorded import Episode
from safeshield.spaces.batches import Batch, copied
from safeshield.spaces.shapes import Flags

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

RANDOM, ADVERSARY, CUSTOM = "random", "adversary", "policy"


def spread_actions(shield: Shield, count: int) -> npt.NDArray[np.float32]:
    """Return `count` actions (count, act) spread over the box: evenly in one or two dimensions.

    Where actions are discrete: all of them.
    """
    if shield.model.action_codec.discrete:
        return shield.model.action_codec.choices
    width = shield.model.action_codec.width
    points = np.random.default_rng(0).uniform(-1.0, 1.0, (count, width))
    if width == 1:
        points = np.linspace(-1.0, 1.0, count)[:, None]
    elif width == 2:
        angle = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
        points = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return shield.model.scaling.to_box(points)


class Adversary:
    """The worst agent that the shield lets live.

    In each state it proposes, of 17 actions (the fallback's, and points spread over the box),
    the one with the highest Q_h that the shield still accepts (at most -delta, and supported where
    the shield asks for that); where there is none, the one with the highest Q_h. So it drives along
    the edge of the accepted set wherever it can reach it, and finds the places where the learned
    value is wrong. It is the strongest of the agents that look one step ahead with the shield's own
    critics; an agent that knows the true dynamics may be worse.

    Args:
        shield: whose acceptance it exploits.
        choices: how many actions it weighs.
    """

    batched = True

    def __init__(self, shield: Shield, choices: int = 16) -> None:
        self._shield = shield
        self._points = spread_actions(shield, choices)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Propose actions for n observations."""
        model = self._shield.model
        states = self._shield.states(self._shield.observation_rows(observations)[0])
        points = np.broadcast_to(self._points, (len(states.value), *self._points.shape))
        own = model.fallback_alone(states)[:, None]
        candidates = np.concatenate([own, points], axis=1)
        values = model.candidate_values(states, candidates)
        good = values <= self._shield.threshold
        masked = np.where(good, values, -np.inf)
        best = np.where(good.any(axis=1), masked.argmax(axis=1), values.argmax(axis=1))
        if self._shield.support is not None:
            order = np.argsort(-masked, axis=1)
            found = self._shield.support.first(model, states, candidates, order, good)
            best = np.where(found >= 0, found, best)
        return self._shield.points(candidates[np.arange(len(best)), best])


class ShieldedProposals:
    """A proposing policy with the shield behind it, as one batch policy.

    Remembers where the shield stepped in; `interventions` tells it episode by episode.
    """

    batched = True

    def __init__(self, shield: Shield, proposals: BatchPolicy) -> None:
        self._shield = shield
        self._proposals = proposals
        self._batches: list[list[Flags]] = []

    def start_wave(self, num_envs: int) -> None:
        """Begin a new batch of episodes: recurrent state of the proposing policy is forgotten."""
        self._batches.append([])
        start_wave(self._proposals, num_envs)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Return the executed actions."""
        # A copy: what is judged is what was there before a policy wrote into it.
        proposed = np.asarray(self._proposals(copied(observations), rng))
        if not self._shield.model.action_codec.discrete:
            # Rounded first: what is judged is what the environment gets.
            proposed = proposed.astype(np.float32)
        executed, report = self._shield.filter(observations, proposed)
        if not self._batches:
            self._batches.append([])
        self._batches[-1].append(np.asarray(report.intervened))
        return executed

    def interventions(self) -> list[Flags]:
        """Whether each step was interfered with, for each environment of each batch in order.

        These are the episodes that `run_episodes` returned, in its order; one may be
        shorter than its batch. What has been told is forgotten.
        """
        batches, self._batches = self._batches, []
        return [column for batch in batches for column in np.stack(batch, axis=1)]

    def with_interventions(self, runs: Sequence[Episode]) -> list[Episode]:
        """Return the episodes that `run_episodes` has just returned; their infos say where.

        See `Episode.intervened`.
        """
        # The last batch may hold more environments than there are episodes left.
        pairs = zip(runs, self.interventions(), strict=False)
        return [replace(run, info={**run.info, INTERVENED: at[: len(run)]}) for run, at in pairs]


def battery(
    shield: Shield, policy: object = None, name: str | None = None
) -> dict[str, BatchPolicy]:
    """Return who proposes, by name: `policy`, or by default random proposals and the adversary."""
    if policy is not None:
        name = name or (policy if isinstance(policy, str) else CUSTOM)
        return {name: as_batch_policy(policy, shield.action_space)}
    return {
        RANDOM: as_batch_policy("random", shield.action_space),
        ADVERSARY: Adversary(shield),
    }
