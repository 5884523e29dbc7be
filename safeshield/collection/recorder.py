"""Wrappers between an environment and a learner: they record episodes and put a price on cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from safeshield.rollouts.copies import check_reward
from safeshield.rollouts.infos import (
    CONSTRAINT,
    COST,
    EXECUTED,
    LABELS,
    TERMINAL_OBSERVATION,
    TIME_LIMIT,
    Array,
    Infos,
)
from safeshield.rollouts.policies import executable_actions
from safeshield.rollouts.recorded import Episode, number_of, recorded_episode
from safeshield.spaces.batches import copied
from safeshield.spaces.rows import SpaceCodec


class EpisodeRecorder(VecEnvWrapper):
    """Records every whole episode of a VecEnv.

    Recorded observations are raw. Recorded actions are those that were executed: the clipped
    actions, or ``info["action_executed"]`` where it is reported. The last observation is the final
    one of the episode, not the first one of the next episode.

    Args:
        venv: A VecEnv whose infos hold ``"cost"`` or ``"constraint"``.
        observation_codec: Codec that converts observations to rows.
        action_codec: Codec that converts actions to rows.
    """

    def __init__(
        self, venv: VecEnv, observation_codec: SpaceCodec, action_codec: SpaceCodec
    ) -> None:
        super().__init__(venv)
        self._observation_codec, self._action_codec = observation_codec, action_codec
        self._episodes: list[Episode] = []
        self.costs = np.zeros(venv.num_envs)
        """(n,) costs of the last step; 1 in a violation where only the constraint is reported."""
        self.current: Any = None
        """Copy of the current observations, from which the next actions are chosen."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) number of steps so far of the running episodes."""
        return np.array([len(one.rewards) for one in self._running], np.int64)

    def take(self) -> list[Episode]:
        """Return the episodes that ended since the last call, and remove them from the record."""
        taken, self._episodes = self._episodes, []
        return taken

    def reset(self) -> VecEnvObs:
        """Start new episodes and return the first observations. Running episodes are discarded."""
        observations = self.venv.reset()
        self.current = copied(observations)
        rows = self._observation_codec.flatten(observations, "observation")[0]
        self._running = [
            _Running(row, info) for row, info in zip(rows, self.venv.reset_infos, strict=True)
        ]
        return observations

    def step_async(self, actions: Array) -> None:
        """Send the actions to the environments, and store them as they are executed."""
        self._actions = executable_actions(actions, self.action_space, self.num_envs)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step, record it and return what the environments returned."""
        observations, rewards, dones, infos = self.venv.step_wait()
        self.current = copied(observations)
        after = np.array(self._observation_codec.flatten(observations, "observation")[0])
        actions = self._action_codec.flatten(self._actions)[0]
        for i, (done, info) in enumerate(zip(dones, infos, strict=True)):
            reached = after[i]
            if done:
                last = info[TERMINAL_OBSERVATION]
                reached = self._observation_codec.flatten(last, "observation")[0][0]
            # The check comes before the learner, because a NaN reward would make its weights NaN.
            where = f"an episode of environment {i}"
            check_reward(float(rewards[i]), len(self._running[i].rewards), where)
            self.costs[i] = _cost(info)
            self._running[i].add(actions[i], float(rewards[i]), reached, info)
            if done:
                cut = bool(info.get(TIME_LIMIT, False))
                self._episodes.append(self._running[i].episode(truncated=cut))
                self._running[i] = _Running(after[i], self.venv.reset_infos[i])
        return observations, rewards, dones, infos


class PricedReward(VecEnvWrapper):
    """Replaces the reward r by ``(r - l c) / (1 + l)``; see `multiplier.Multiplier`.

    Args:
        recorder: The recorder that provides the costs c.
        price: l, at least 0. The attribute may be changed at any time.
    """

    def __init__(self, recorder: EpisodeRecorder, price: float) -> None:
        super().__init__(recorder)
        self._recorder, self.price = recorder, price

    def reset(self) -> VecEnvObs:
        """Reset the wrapped environments and return the first observations."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step and return it with the new rewards."""
        observations, rewards, dones, infos = self.venv.step_wait()
        priced = (rewards - self.price * self._recorder.costs) / (1.0 + self.price)
        return observations, priced.astype(np.float32), dones, infos


class _Running:
    """The record of an episode that has not ended."""

    def __init__(self, start: Array, info: Infos) -> None:
        self.states = [np.array(start)]
        self.actions: list[Array] = []
        self.rewards: list[float] = []
        self.at_reset = _labels(info)
        self.after: dict[str, list[Any]] = {key: [] for key in (*LABELS, EXECUTED)}

    def add(self, action: Array, reward: float, reached: Array, info: Infos) -> None:
        self.actions.append(np.array(action))
        self.rewards.append(reward)
        self.states.append(np.array(reached))
        executed = info.get(EXECUTED)
        self.after[EXECUTED].append(None if executed is None else np.array(executed))
        for key, label in _labels(info).items():
            self.after[key].append(label)

    def episode(self, *, truncated: bool) -> Episode:
        flags = np.zeros((2, len(self.rewards)), np.bool_)
        flags[int(truncated), -1] = True
        rows = {
            "observations": np.stack(self.states[:-1]),
            "actions": np.stack(self.actions),
            "rewards": np.array(self.rewards),
            "next_observations": np.stack(self.states[1:]),
            "terminated": flags[0],
            "truncated": flags[1],
        }
        return recorded_episode(rows, self.at_reset, self.after)


def _labels(info: Infos) -> dict[str, float | None]:
    if isinstance(info.get(CONSTRAINT), Mapping):
        # The units of several constraints come from the steps of a whole log, and the segments of
        # this one are labelled one by one. The cost says which states violate.
        return {COST: _cost(info), CONSTRAINT: None}
    return {key: number_of(info, key) for key in LABELS}


def _cost(info: Infos) -> float:
    cost, constraint = number_of(info, COST), number_of(info, CONSTRAINT)
    if cost is not None:
        return cost
    if constraint is None:
        raise ValueError(
            "the environment must report info['cost'] at every step, or info['constraint'] (h, "
            "positive is a violation) at reset and every step; add safeshield.wrappers."
            "CostFromFunction or ConstraintFromFunction"
        )
    return float(constraint > 0.0)
