"""The policies that propose actions while a shield is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import INTERVENED
from safeshield.rollouts.policies import BatchPolicy, as_batch_policy, default_name, start_wave
from safeshield.rollouts.recorded import Episode
from safeshield.spaces.batches import Batch, copied
from safeshield.spaces.shapes import Flags

if TYPE_CHECKING:
    from safeshield.shield.sensors import SensorState
from safeshield.shield.shield import Shield

RANDOM, ADVERSARY = "random", "adversary"


def spread_actions(shield: Shield, count: int) -> npt.NDArray[np.float32]:
    """Return actions spread over the bounds of the action space, as rows (count, act).

    The actions are placed in units in which each entry lies in [-1, 1], and then scaled to the
    bounds. With one entry they are evenly spaced, with two they lie evenly on the unit circle, and
    with more they are uniform draws, the same in every call.

    Args:
        shield: The shield whose actions are spread.
        count: Number of actions. It is not used for discrete actions, of which all are returned.
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
    """A policy that proposes the most dangerous action that the shield accepts.

    In each state it considers 17 actions: the fallback's, and 16 points spread over the box.
    Of these it proposes the one with the highest Q_h that the shield still accepts (Q_h at most
    -delta, and supported where the shield has a support test). Where the shield accepts none, it
    proposes the action with the highest Q_h. It therefore stays near the edge of the accepted set
    and visits states where errors of the learned value matter. It is the strongest adversary that
    looks one step ahead with the shield's own critics. An agent that knows the true dynamics may
    cause more violations.

    Args:
        shield: The shield whose critics and acceptance test the adversary uses.
        choices: Number of actions to consider beside the fallback's.
    """

    batched = True

    def __init__(self, shield: Shield, choices: int = 16) -> None:
        self._shield = shield
        self._points = spread_actions(shield, choices)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Return the proposed actions for n observations, as points of the action space.

        Args:
            observations: Batch of n observations.
            rng: Not used, because the proposals are not random.
        """
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
    """A proposing policy followed by the shield, as one batch policy.

    The object records the steps in which the shield replaced the action; `interventions` returns
    them by episode.

    Args:
        shield: The shield; None where the proposals are executed unchanged.
        proposals: The policy that proposes the actions.
    """

    batched = True
    finite: bool
    """Whether any proposal so far was a finite action."""

    def __init__(self, shield: Shield | None, proposals: BatchPolicy) -> None:
        self.finite = False
        self._shield = shield
        self._proposals = proposals
        self._batches: list[list[Flags]] = []
        self._sensors: SensorState | None = None

    def start_wave(self, num_envs: int) -> None:
        """Begin a new batch of episodes in `num_envs` environments.

        The recurrent state of the proposing policy is reset.
        """
        self._batches.append([])
        self._sensors = (
            None if self._shield is None else self._shield.sensor_state(num_envs, quiet=True)
        )
        start_wave(self._proposals, num_envs)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Return the executed actions for n observations, as points of the action space.

        Args:
            observations: Batch of n observations.
            rng: Generator of the proposing policy's random numbers.
        """
        # The policy gets a copy, because it may write into the observations that the shield judges.
        proposed = np.asarray(self._proposals(copied(observations), rng))
        self.finite = self.finite or bool(np.isfinite(proposed).any())
        if self._shield is None:
            self._record(np.zeros(len(proposed), np.bool_))
            return proposed
        if not self._shield.model.action_codec.discrete:
            # The shield must judge the same float32 numbers that the environment gets.
            proposed = proposed.astype(np.float32)
        executed, report = self._shield.filter(observations, proposed, sensors=self._sensors)
        self._record(np.asarray(report.intervened))
        return executed

    def _record(self, intervened: Flags) -> None:
        if not self._batches:
            self._batches.append([])
        self._batches[-1].append(intervened)

    def interventions(self) -> list[Flags]:
        """Return whether the shield replaced the action of each step, and clear the record.

        The result has one array for each environment of each batch. The order is that of the
        episodes that `run_episodes` returned. An episode may be shorter than its array.
        """
        batches, self._batches = self._batches, []
        return [column for batch in batches for column in np.stack(batch, axis=1)]

    def with_interventions(self, runs: Sequence[Episode]) -> list[Episode]:
        """Return episodes with the recorded interventions added to their infos.

        The record is cleared. See `Episode.intervened`.

        Args:
            runs: The episodes that the latest `run_episodes` returned, in their order.

        Raises:
            ValueError: No proposal so far was finite.
        """
        if runs and not self.finite:
            raise ValueError(
                f"the policy proposed no finite action in {len(runs)} episodes, so that the shield "
                "replaced all of them: check what the policy returns"
            )
        # The last batch may have more environments than episodes that were still needed.
        pairs = zip(runs, self.interventions(), strict=False)
        return [replace(run, info={**run.info, INTERVENED: at[: len(run)]}) for run, at in pairs]


def policy_names(policy: object = None, name: str | None = None) -> list[str]:
    """Return the names of the policies of `battery`, with the same arguments."""
    if policy is None:
        return [RANDOM, ADVERSARY]
    return [name or default_name(policy)]


def battery(
    shield: Shield,
    policy: object = None,
    name: str | None = None,
    *,
    deterministic: bool = False,
) -> dict[str, BatchPolicy]:
    """Return the policies whose proposals a calibration tests, by name.

    Args:
        shield: The shield that is calibrated.
        policy: The policy of the user, in any form that `as_batch_policy` takes. It is then the
            only one. With None there are two: random proposals, and the `Adversary` of `shield`.
        name: Name of `policy` in the result; by default that of `rollouts.policies.default_name`.
        deterministic: The `deterministic` with which a policy's ``predict`` is called.
    """
    names = policy_names(policy, name)
    if policy is not None:
        acting = as_batch_policy(policy, shield.action_space, deterministic=deterministic)
        return dict.fromkeys(names, acting)
    return dict(
        zip(names, [as_batch_policy("random", shield.action_space), Adversary(shield)], strict=True)
    )
