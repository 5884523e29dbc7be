"""`ShieldedPolicy`: an agent whose actions have already passed the shield."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from safeshield.flat import Batch, copied, finite
from safeshield.shield.shield import HasShield, Shield, as_shield

_State = tuple[npt.NDArray[Any], ...] | None


class Predictor(Protocol):
    """Anything with Stable-Baselines3's ``predict``."""

    def predict(
        self,
        observation: Any,  # noqa: ANN401
        state: _State = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], _State]:
        """Return actions and the recurrent state."""
        ...


class ShieldedPolicy:
    """Put a shield behind an agent's ``predict``, for a loop of your own.

    Where the agent meets a Gymnasium environment, `SafetyShield` around the environment is the
    better place: it also covers warm-up actions and tells in `info` what was executed.

    Args:
        model: an agent of Stable-Baselines3, a `SafeFQL`, or anything with the same ``predict``.
        shield: the filter, a path to its file, or an agent that has one; the spaces must be the
            agent's.

    Raises:
        TypeError: `model` has no predict, or `shield` is none of these.

    >>> import gymnasium, safeshield
    >>> from safeshield import SafeFQL, SafeFQLConfig, ShieldedPolicy, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> policy = ShieldedPolicy(agent, agent.shield().with_delta(0.05))
    >>> action, _ = policy.predict(log.observations[0])
    >>> bool(policy.report.acceptable), action.shape
    (True, (2,))
    """

    def __init__(
        self, model: Predictor, shield: Shield | HasShield | str | os.PathLike[str]
    ) -> None:
        if not callable(getattr(model, "predict", None)):
            raise TypeError(f"model must have a predict method, got {type(model).__name__}")
        self.model = model
        self.shield = as_shield(shield)
        self.report: Any = None
        """The verdict on the last prediction, a `FilterReport`."""

    def predict(
        self,
        observation: Batch,
        state: _State = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], _State]:
        """Return the actions to execute, and the agent's recurrent state."""
        # Agents may refuse what is not a number; the shield does not act on their answer then. And
        # a copy: the shield must judge what was there before an agent normalised it in place.
        seen = copied(finite(observation))
        proposed, state = self.model.predict(
            seen, state=state, episode_start=episode_start, deterministic=deterministic
        )
        executed, self.report = self.shield.filter(observation, proposed)
        return executed, state
