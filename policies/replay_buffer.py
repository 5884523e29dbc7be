"""Replay buffers that store the agent's proposed action, the shield's executed one, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from safeshield.rollouts.infos import EXECUTED, INTERVENED, PENALTY, PROPOSED

STORES = ("proposed", "executed", "both")
"""The values of `store`; see `ShieldedReplayBuffer`."""

_Array = npt.NDArray[Any]
_KEYS = (INTERVENED, PROPOSED, EXECUTED)


class _ShieldedRows(ReplayBuffer):
    """Common base of the two buffers; `ShieldedReplayBuffer` describes their contents."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *args: Any,  # noqa: ANN401 - the base's own
        store: str = "proposed",
        shield_space: gym.Space[Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 - the base's own
    ) -> None:
        if store not in STORES:
            raise ValueError(f"store must be one of {list(STORES)}, got {store!r}")
        if isinstance(observation_space, gym.spaces.Dict) and not isinstance(
            self, DictReplayBuffer
        ):
            raise TypeError(
                f"{type(self).__name__} does not support dict observations: use "
                "ShieldedDictReplayBuffer"
            )
        self._check_shield_space(action_space, shield_space)
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)
        self.store = store
        self.shield_space = action_space if shield_space is None else shield_space
        if store == "both":
            self.proposed_actions = np.zeros_like(self.actions)
            self.penalties = np.zeros_like(self.rewards)

    @staticmethod
    def _check_shield_space(action_space: gym.Space[Any], shield_space: object) -> None:
        if shield_space is None:
            return
        boxes = isinstance(shield_space, gym.spaces.Box) and isinstance(
            action_space, gym.spaces.Box
        )
        if not boxes or shield_space.shape != action_space.shape:  # type: ignore[attr-defined]
            raise ValueError(
                "shield_space must be a Box with the shape of the agent's action_space "
                f"{action_space}, got {shield_space}"
            )

    def add(
        self,
        obs: Any,  # noqa: ANN401
        next_obs: Any,  # noqa: ANN401
        action: _Array,
        reward: _Array,
        done: _Array,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one transition of each environment, with actions (n_envs, act) in the policy's scale.

        Raises:
            ValueError: Executed actions are stored and the infos do not contain them, or contain
                them in other units.
        """
        if self.store == "proposed":
            super().add(obs, next_obs, action, reward, done, infos)
            return
        proposed = np.array(action).reshape(self.n_envs, self.action_dim)
        executed, penalties = self._executed(proposed, infos)
        row = self.pos
        super().add(obs, next_obs, executed, reward + penalties, done, infos)
        if self.store == "both":
            self.proposed_actions[row] = proposed
            self.penalties[row] = penalties

    def _executed(
        self, proposed: _Array, infos: Sequence[Mapping[str, Any]]
    ) -> tuple[_Array, npt.NDArray[np.float32]]:
        """Return the scaled actions that ran (n_envs, act) and the penalties for replacing them."""
        for info in infos:
            missing = [key for key in _KEYS if key not in info]
            if missing:
                raise ValueError(
                    f"store={self.store!r} needs {missing} in every info: put SafetyShield around "
                    "each environment or VecSafetyShield around the vector environment"
                )
        if not self._same_actions(proposed, [info[PROPOSED] for info in infos]):
            raise ValueError(
                "the actions that the shield saw are not those of the agent, so the executed "
                "actions cannot be stored in the agent's units: with RescaleAction around the "
                "shield pass replay_buffer_kwargs=dict(shield_space=shield.action_space); put any "
                "other wrapper that changes actions inside the shield, and make the log with it"
            )
        intervened = np.array([bool(info[INTERVENED]) for info in infos])
        ran = self._scaled([info[EXECUTED] for info in infos])
        # Rows without an intervention are kept, because scaling there and back would round them.
        executed = np.where(intervened[:, None], ran, proposed)
        penalties = [float(info.get(PENALTY, 0.0)) for info in infos]
        return executed, np.where(intervened, penalties, 0.0).astype(np.float32)

    def _scaled(self, actions: Sequence[Any]) -> _Array:
        """Scale actions of the shield's box to [-1, 1], as `BasePolicy.scale_action`: (n, act)."""
        batch = np.stack([np.asarray(action) for action in actions])
        if isinstance(self.shield_space, gym.spaces.Box):
            low, high = self.shield_space.low, self.shield_space.high
            batch = 2.0 * ((batch - low) / (high - low)) - 1.0
        return batch.reshape(self.n_envs, self.action_dim)

    def _same_actions(self, stored: _Array, proposed: Sequence[Any]) -> bool:
        """Return whether the actions are equal up to the rounding of scaling there and back."""
        if any(np.shape(action) != self.action_space.shape for action in proposed):
            return False
        tolerance = np.zeros(self.action_dim)
        for space in {id(box): box for box in (self.action_space, self.shield_space)}.values():
            if isinstance(space, gym.spaces.Box):
                low, high = space.low.ravel(), space.high.ravel()
                tolerance += 1e-4 + 1e-6 * np.maximum(np.abs(low), np.abs(high)) / (high - low)
        return np.allclose(self._scaled(proposed), stored, rtol=0.0, atol=tolerance, equal_nan=True)

    def _get_samples(self, batch_inds: _Array, env: VecNormalize | None = None) -> Any:  # noqa: ANN401
        if self.store != "both":
            return super()._get_samples(batch_inds, env)
        # The base class draws the environment of each row. Repeating the draw reproduces it.
        before = np.random.get_state()  # noqa: NPY002
        samples = super()._get_samples(batch_inds, env)
        np.random.set_state(before)  # noqa: NPY002
        count = len(batch_inds)
        at = batch_inds, np.random.randint(0, self.n_envs, size=count)  # noqa: NPY002
        coin = np.random.randint(0, 2, size=count).astype(bool)  # noqa: NPY002
        actions = np.where(coin[:, None], self.proposed_actions[at], self.actions[at])
        # The cast keeps rewards in float32 after the subtraction of a penalty.
        rewards = (self.rewards[at] - coin * self.penalties[at]).astype(np.float32).reshape(-1, 1)
        return samples._replace(
            actions=self.to_torch(actions),
            rewards=self.to_torch(self._normalize_reward(rewards, env)),
        )


class ShieldedReplayBuffer(_ShieldedRows):
    """A replay buffer for off-policy learning under a shield.

    Pass it as ``SAC(..., replay_buffer_class=ShieldedReplayBuffer,
    replay_buffer_kwargs=dict(store="executed"))``. In state s the agent proposed a, the shield
    executed e, and the step gave reward r and state s'. `store` says what to learn from:

    ``"proposed"`` (default)
        (s, a, r, s'): the shield is part of the environment. The plain buffer stores the same.
    ``"executed"``
        (s, e, r, s'): the transition of the dynamics, which is also valid without the shield. The
        critic learns nothing about rejected actions, so the policy may go on proposing them.
    ``"both"``
        Both of these. Under a shield that accepts e both are valid, and together they teach the
        critic that a is worth as much as e. A transition is kept once, with its two actions. Each
        time it is sampled, one of them is chosen with probability 1/2. Replaced actions therefore
        get no more weight than others, and the size and order of the buffer do not change. Where
        the shield did not intervene the two are the same. `actions` holds e, `proposed_actions` a.

    Scaled actions are stored: boxes are rescaled to [-1, 1] as the policy does, and integers are
    unchanged. With `RescaleAction` around the shield, the shield's actions have another box than
    the agent's. Pass this box, ``dict(store="executed", shield_space=shield.action_space)``, so
    that both are scaled to [-1, 1]. Put any other wrapper that changes actions inside the shield.

    A penalty on intervention (``shield/penalty`` in the infos) belongs to the proposed action. Rows
    with the executed action get the reward without it, so it has no effect with ``"executed"``.

    On-policy algorithms (PPO, A2C) do not have this choice. Their ratios need the probability of
    the action that the agent drew, so their buffers must keep the proposed action.

    Raises:
        TypeError: Observations are dicts, for which there is `ShieldedDictReplayBuffer`.
        ValueError: `store` is not one of the three, or `shield_space` is not a box of the agent's
            shape. `add` raises it where the infos lack the shield's keys, or hold other proposed
            actions than the agent's.

    >>> box = gym.spaces.Box(0.0, 10.0, (1,))
    >>> buffer = ShieldedReplayBuffer(4, box, box, store="executed")
    >>> info = {"shield/intervened": True, "action_proposed": np.array([10.0], np.float32)}
    >>> info["action_executed"] = np.array([2.5], np.float32)
    >>> zero = np.zeros((1, 1))
    >>> buffer.add(zero, zero, np.array([[1.0]]), np.zeros(1), np.zeros(1), [info])
    >>> buffer.actions[0].tolist()
    [[-0.5]]
    """


class ShieldedDictReplayBuffer(_ShieldedRows, DictReplayBuffer):
    """`ShieldedReplayBuffer` for observations that are dicts (``MultiInputPolicy``)."""
