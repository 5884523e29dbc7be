"""`SafetyShield`: a Gymnasium wrapper that executes only what a shield accepts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from safeshield.shield.model import StateValue
from safeshield.shield.shield import Shield
from safeshield.spaces import check_same_space

if TYPE_CHECKING:
    _Wrapper = gym.Wrapper[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
    _Env = gym.Env[npt.NDArray[Any], npt.NDArray[Any]]
else:
    _Wrapper = gym.Wrapper
    _Env = gym.Env


@runtime_checkable
class HasShield(Protocol):
    """An agent that can make a shield, such as `SafeFQL`."""

    def shield(self) -> Shield:
        """Return its shield."""
        ...


def as_shield(shield: Shield | HasShield | str | os.PathLike[str]) -> Shield:
    """Return a shield from a shield, a path to its file, or an agent.

    Raises:
        TypeError: anything else.
        ValueError: the file is damaged or of another kind.
    """
    if isinstance(shield, Shield):
        return shield
    if isinstance(shield, str | os.PathLike):
        return Shield.load(shield)
    if isinstance(shield, HasShield):
        return shield.shield()
    raise TypeError(
        "shield must be a Shield, a path to a shield's file, or an agent with a shield() method, "
        f"got {type(shield).__name__}"
    )


class SafetyShield(_Wrapper, RecordConstructorArgs):
    """Pass an action on where the shield accepts it, execute a replacement where it does not.

    Spaces, rewards, ends of episodes and infos are the environment's own. At reset and every step
    these infos are added, plain Python and NumPy:

    ======================  ==========================================================
    shield/intervened       bool: the executed action is not the proposed one
    shield/value            float: Q_h of the executed action in the state it was taken in
                            (at reset: V_h of the state); infinity where not finite
    shield/threshold        float: -delta, which the value must not exceed
    shield/certified        bool: the state just reached has V_h <= -delta, and the shield
                            is calibrated
    action_proposed         array: what the agent sent (at reset: NaN)
    action_executed         array: what the dynamics saw (at reset: NaN)
    ======================  ==========================================================

    The shield must see the observations it was trained on: put it inside (below) wrappers that
    change observations, such as NormalizeObservation, and give it actions in the units of its
    training: outside (above) RescaleAction where the log was made with rescaled actions.

    Args:
        env: an environment with the spaces that the shield was trained on.
        shield: a path to its file, a `Shield`, or an agent. With a path the environment's spec can
            rebuild the shielded environment, also after a round trip through JSON.

    Raises:
        ValueError: the spaces differ, or the file is damaged.
        TypeError: `shield` is none of the three.
    """

    def __init__(self, env: _Env, shield: Shield | HasShield | str | os.PathLike[str]) -> None:
        if isinstance(shield, os.PathLike):
            # A string is what survives the spec's JSON.
            shield = os.fspath(shield)
        RecordConstructorArgs.__init__(self, shield=shield, _disable_deepcopy=True)
        gym.Wrapper.__init__(self, env)
        self.shield = as_shield(shield)
        check_same_space(
            self.shield.observation_space,
            env.observation_space,
            "observation_space",
            unbounded_matches_any=True,
        )
        check_same_space(self.shield.action_space, env.action_space, "action_space")
        self._no_action = np.full(self.shield.action_space.shape, np.nan, np.float32)
        self._rows: npt.NDArray[Any] | None = None
        self._states: StateValue | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Reset the environment and judge where it starts."""
        observation, info = self.env.reset(seed=seed, options=options)
        value = self._see(observation)
        return observation, {
            **info,
            "shield/intervened": False,
            "shield/value": value,
            "shield/threshold": self.shield.threshold,
            "shield/certified": self.shield.record is not None and value <= self.shield.threshold,
            "action_proposed": self._no_action.copy(),
            "action_executed": self._no_action.copy(),
        }

    def step(
        self, action: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Execute `action`, or its replacement.

        Raises:
            gymnasium.error.ResetNeeded: called before the first reset.
            ValueError: an action of another shape, or an environment that steps by 6-tuples.
        """
        if self._states is None or self._rows is None:
            raise gym.error.ResetNeeded("cannot step before the first call of reset()")
        proposed = np.asarray(action)
        if proposed.shape != self._no_action.shape:
            raise ValueError(
                f"action must have shape {self._no_action.shape}, got {proposed.shape}"
            )
        executed, report = self.shield.judge(self._states, self._rows, proposed[None])
        intervened = bool(report.intervened[0])
        # The very array the agent sent, where it passes.
        sent = executed[0] if intervened else action
        result = self.env.step(sent)
        if len(result) != 5:
            raise ValueError(
                f"the environment's step returned {len(result)} values instead of Gymnasium's 5; "
                "for Safety-Gymnasium's native 6 make its '...Gymnasium-v0' id instead"
            )
        observation, reward, terminated, truncated, info = result
        reached = self._see(observation)
        threshold = self.shield.threshold
        return (
            observation,
            reward,
            terminated,
            truncated,
            {
                **info,
                "shield/intervened": intervened,
                "shield/value": float(report.value[0]),
                "shield/threshold": threshold,
                "shield/certified": self.shield.record is not None and reached <= threshold,
                "action_proposed": proposed.copy(),
                "action_executed": np.array(sent),
            },
        )

    def _see(self, observation: npt.NDArray[Any]) -> float:
        """Judge a state once, for its info and for the action to come; returns V_h."""
        self._rows = np.array(observation)[None]
        self._states = self.shield.states(self._rows)
        if not np.isfinite(self._rows).all():
            return float("inf")
        return float(self._states.value[0])
