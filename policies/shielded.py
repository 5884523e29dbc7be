"""`ShieldedPolicy`, an agent whose actions are filtered by a shield."""

from __future__ import annotations

import os
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.policies import BatchPolicy, Memory, as_batch_policy, start_wave
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_of_one, copied, finite
from safeshield.spaces.schema import check_same_space


class Predictor(Protocol):
    """Anything with Stable-Baselines3's ``predict``."""

    def predict(
        self,
        observation: Any,  # noqa: ANN401
        state: Memory = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], Memory]:
        """Return actions and the recurrent state.

        Args:
            observation: One observation or a batch.
            state: Recurrent state before the step; None at the start.
            episode_start: Whether each environment begins an episode.
            deterministic: Whether to use the deterministic mode.
        """
        ...


class ShieldedPolicy:
    """Filter the actions of an agent's ``predict`` by a shield, for a loop of your own.

    For a Gymnasium environment use `SafetyShield` around the environment instead: it also covers
    warm-up actions and reports the executed action in `info`.

    The agent gets a copy of each observation, so that it cannot change what the shield judges.

    Where the shield checks its sensors (`Shield.with_sensors`), pass ``episode_start`` to
    `predict`: a new episode otherwise looks like a jump.

    Args:
        model: An agent of Stable-Baselines3, a `SafeFQL`, or anything with the same ``predict``;
            or another policy that `rollouts.policies.as_batch_policy` takes, such as a
            function of one observation. A policy with a memory of its own (`start_wave`) is
            reset whenever the number of observations changes, or ``episode_start`` is True for
            all of them.
        shield: A `Shield`, a path to its file, or an agent that has one; the spaces must be the
            agent's.
        seed: Seed of the noise for batch policies; ``predict`` draws from the agent's generator.

    Raises:
        TypeError: `model` is not a policy, or `shield` is none of these.
        ValueError: The agent's spaces, where it has any, are not the shield's, or `model` is
            shielded already.

    >>> import gymnasium, safeshield
    >>> import numpy as np
    >>> from safeshield import SafeFQL, SafeFQLConfig, ShieldedPolicy, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> policy = ShieldedPolicy(agent, agent.shield().with_delta(0.05))
    >>> action, _ = policy.predict(np.array([1.5, 0.0], np.float32))  # downstream of the rocks
    >>> bool(policy.report.acceptable), action.shape
    (True, (2,))
    """

    def __init__(
        self,
        model: Predictor | object,
        shield: Shield | HasShield | str | os.PathLike[str],
        seed: int | None = None,
    ) -> None:
        if isinstance(model, ShieldedPolicy):
            raise ValueError(
                "model is shielded already, and its report can describe one shield only: pass the "
                "agent inside it, model.model"
            )
        self.model = model
        self.shield = as_shield(shield)
        self._predict = getattr(model, "predict", None)
        self._acting: BatchPolicy | None = None
        if not callable(self._predict):
            self._acting = as_batch_policy(model, self.shield.action_space)
        self._check_spaces()
        self._rng = np.random.default_rng(seed)
        self._count = self._watched = 0
        self._sensors = self.shield.sensor_state()
        self.report: Any = None
        """The `FilterReport` of the last prediction; None where the prediction failed."""

    def predict(
        self,
        observation: Batch,
        state: Memory = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], Memory]:
        """Return the actions to execute, and the agent's recurrent state.

        The actions are the agent's where the shield accepts them, and else their replacements.

        Args:
            observation: One observation or a batch.
            state: The agent's recurrent state before the step; None at the start.
            episode_start: Whether each environment begins an episode.
            deterministic: Whether the agent uses its deterministic mode.
        """
        self.report = None
        # Agents may refuse NaN and infinity, so zeros replace them; the shield then ignores the
        # agent's action. The agent gets a copy, because it may normalise the observation in place.
        seen = copied(finite(observation))
        if self._acting is not None:
            proposed = self._proposed(self._acting, seen, episode_start)
        else:
            proposed, state = self._predict(  # type: ignore[misc]
                seen, state=state, episode_start=episode_start, deterministic=deterministic
            )
        self._watch(seen, episode_start)
        executed, self.report = self.shield.filter(observation, proposed, sensors=self._sensors)
        return executed, state

    def _watch(self, seen: Batch, starts: npt.NDArray[np.bool_] | None) -> None:
        """Begin the checks of the shield's `sensors` where episodes begin."""
        if self._sensors is None:
            return
        count = len(self.shield.observation_rows(seen)[0])
        if count != self._watched:
            self._watched, self._sensors = count, self.shield.sensor_state(count)
        elif starts is not None:
            self._sensors.begin(np.asarray(starts, np.bool_))

    def _proposed(
        self, acting: BatchPolicy, seen: Batch, starts: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[Any]:
        rows, single = self.shield.observation_rows(seen)
        begun = starts is not None and bool(np.all(starts))
        if begun or len(rows) != self._count:
            start_wave(acting, len(rows))
        self._count = len(rows)
        actions = np.asarray(acting(batch_of_one(seen) if single else seen, self._rng))
        return actions[0] if single else actions

    def _check_spaces(self) -> None:
        for what, ours in (
            ("observation_space", self.shield.observation_space),
            ("action_space", self.shield.action_space),
        ):
            theirs = getattr(self.model, what, None)
            if not isinstance(theirs, gym.Space):
                continue
            observed = what == "observation_space"
            check_same_space(
                _shared(ours, theirs) if observed else ours,
                theirs,
                f"the model's {what}",
                unbounded_matches_any=observed,
                repair="the shield judges the observations that the model gets and the actions that"
                " it returns: use a model and a shield of the same environment, with the same "
                "wrappers",
            )


def _shared(ours: gym.Space[Any], theirs: gym.Space[Any]) -> gym.Space[Any]:
    """Return the part of the shield's observation space that the model's space also has."""
    if isinstance(ours, gym.spaces.Dict) and isinstance(theirs, gym.spaces.Dict):
        # A model may use other entries than the shield; each selects its own.
        parts = {key: _shared(ours[key], theirs[key]) for key in ours if key in theirs.spaces}
        return gym.spaces.Dict(parts)
    if isinstance(ours, gym.spaces.Box) and ours.dtype == np.uint8 and len(ours.shape) == 3:
        # Models of Stable-Baselines3 have images with channels first; `predict` takes them last.
        turned = gym.spaces.Box(ours.low.transpose(2, 0, 1), ours.high.transpose(2, 0, 1))
        if theirs.shape == turned.shape:
            return turned
    return ours
