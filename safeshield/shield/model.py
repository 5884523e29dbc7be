"""The safety critics and the fallback as a shield uses them: NumPy in and out, raw units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import Weights, forward, forward_layers, layers
from safeshield.scaling import ADVANTAGE, CONSTRAINT, EXCESS, SafetyScale, Scaling
from safeshield.types import Actions, Observations, Scalars

FALLBACK = "student"
"""Name of the fallback actor's network."""

_Float = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StateValue:
    """What the critics say of n states, kept so that actions can be judged without repeating it."""

    inputs: _Float
    """(n, obs) normalised observations."""
    raw: _Float
    """(n,) V before the floor, units of h."""
    floor: _Float
    """(n,) h^, the constraint as learned."""

    @property
    def value(self) -> _Float:
        """V_h, (n,)."""
        out: _Float = np.maximum(self.raw, self.floor)
        return out


@dataclass(frozen=True, eq=False)
class SafetyModel:
    """V_h, Q_h and the fallback actor of one task; formulas in `values.safety`.

    Attributes:
        observation_space: Box of shape (obs,).
        action_space: bounded Box of shape (act,).
        scaling: units of observations and actions.
        scale: units of h.
        networks: weights by network: "constraint", "excess", "advantage" and "student".
    """

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    scaling: Scaling
    scale: SafetyScale
    networks: Mapping[str, Weights]

    @cached_property
    def _state_layers(self) -> list[tuple[_Float, _Float]]:
        # h^ and the excess have the same shape: one stack, one pass.
        pairs = zip(layers(self.networks[CONSTRAINT]), layers(self.networks[EXCESS]), strict=True)
        return [
            (np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])) for a, b in pairs
        ]

    @cached_property
    def _advantage_layers(self) -> list[tuple[_Float, _Float]]:
        return layers(self.networks[ADVANTAGE])

    def states(self, observations: Observations) -> StateValue:
        """Judge finite observations (n, obs)."""
        inputs = self.scaling.observations(observations)
        out = forward_layers(self._state_layers, inputs)
        floor = out[0, :, 0] * np.float32(self.scale.spread) + np.float32(self.scale.offset)
        raw = floor + out[1, :, 0] * np.float32(self.scale.excess)
        return StateValue(inputs, raw, floor)

    def action_values(self, states: StateValue, actions: Actions) -> Scalars:
        """Return Q_h of one action (n, act) in each of n states: (n,)."""
        inputs = np.concatenate([states.inputs, self.scaling.actions(actions)], axis=-1)
        worst = forward_layers(self._advantage_layers, inputs)[..., 0].max(axis=0)
        value = states.raw + worst * np.float32(self.scale.step)
        out: _Float = np.maximum(value, states.floor)
        return out

    def candidate_values(self, states: StateValue, candidates: Actions) -> Scalars:
        """Return Q_h of c actions (n, c, act) in each of n states: (n, c), in one pass."""
        count, each, width = candidates.shape
        actions = self.scaling.actions(candidates.reshape(count * each, width))
        inputs = np.concatenate([np.repeat(states.inputs, each, axis=0), actions], axis=-1)
        worst = forward_layers(self._advantage_layers, inputs)[..., 0].max(axis=0)
        value = states.raw[:, None] + worst.reshape(count, each) * np.float32(self.scale.step)
        out: _Float = np.maximum(value, states.floor[:, None])
        return out

    def fallback(self, states: StateValue, noise: Actions) -> Actions:
        """Return the fallback actor's actions for noise (c, act): (n, c, act), in the box."""
        count, each = len(states.inputs), len(noise)
        inputs = np.concatenate(
            [np.repeat(states.inputs, each, axis=0), np.tile(noise, (count, 1))], axis=-1
        ).astype(np.float32)
        scaled = np.clip(forward(self.networks[FALLBACK], inputs)[0], -1.0, 1.0)
        return self.scaling.to_box(scaled).reshape(count, each, -1)
