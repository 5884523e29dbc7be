"""The safety critics and the fallback as a shield uses them: NumPy in and out, raw units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.flow_forward import to_actions
from safeshield.nn.forward import (
    Weights,
    forward,
    forward_layers,
    largest_and_gradient,
    layers,
)
from safeshield.nn.latent_forward import LatentForward, LatentSpec
from safeshield.nn.plan_forward import PlanForward, PlanSpec
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.shapes import Actions, Candidates, Noise, Observations, Scalars
from safeshield.values.units import (
    ADVANTAGE,
    BEHAVIOUR,
    CONSTRAINT,
    EXCESS,
    FALLBACK,
    PLAN,
    SafetyScale,
)

_Float = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StateValue:
    """What the critics say of n states, kept so that actions can be judged without repeating it."""

    inputs: _Float
    """(n, obs) normalised observations."""
    value: _Float
    """(n,) V_h, units of h."""

    def take(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> StateValue:
        """Return what is said of some of the states."""
        return StateValue(self.inputs[index], self.value[index])


@dataclass(frozen=True, eq=False)
class SafetyModel:
    """V_h, Q_h and the fallback actor of one task; formulas in `values.safety`.

    Observations and actions are rows of `spaces.rows` throughout.

    Attributes:
        observation_space: what `spaces.rows.flat_observations` takes.
        action_space: what `spaces.rows.flat_actions` takes.
        scaling: units of observations and actions.
        scale: units of h.
        networks: weights by network: "constraint", "excess", "advantage", and for a Box of actions
            "student". Where actions are discrete, all are weighed, and none has to be proposed.
            Where the log's behaviour was learned too: "behaviour".
        flow_steps: Euler steps of a behaviour that is a flow.
        latent: where the fallback is FLRP's policy: its widths. Its networks ("prior",
            "posterior", "decoder" and the experts) then take the place of "student" and
            "behaviour".
        plan: where the fallback plans several steps ("student" draws whole chunks of actions): how
            many, and how an action is judged by them. Then Q_h(s, a) is the lowest value, over
            plans that begin with a, of "plan_advantage" (`nn.plan_forward`).
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    scaling: Scaling
    scale: SafetyScale
    networks: Mapping[str, Weights]
    flow_steps: int = 10
    latent: LatentSpec | None = None
    plan: PlanSpec | None = None

    @cached_property
    def observation_codec(self) -> SpaceCodec:
        """How observations become rows."""
        return flat_observations(self.observation_space)

    @cached_property
    def action_codec(self) -> SpaceCodec:
        """How actions become rows."""
        return flat_actions(self.action_space)

    def __deepcopy__(self, memo: dict[int, object]) -> SafetyModel:
        # Nothing in it ever changes, and Gymnasium copies the specs of wrapped environments a lot.
        return self

    @cached_property
    def _state_layers(self) -> list[tuple[_Float, _Float]]:
        # h^ and the excess have the same shape: one stack, one pass.
        pairs = zip(layers(self.networks[CONSTRAINT]), layers(self.networks[EXCESS]), strict=True)
        return [(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])) for a, b in pairs]

    @cached_property
    def _advantage_layers(self) -> list[tuple[_Float, _Float]]:
        return layers(self.networks[ADVANTAGE])

    @cached_property
    def behaviour_layers(self) -> list[tuple[_Float, _Float]]:
        """Weights and biases of the network that imitates the log."""
        return layers(self.networks[BEHAVIOUR])

    @cached_property
    def latent_policy(self) -> LatentForward | None:
        """FLRP's policy with its weights, where the fallback is one."""
        return None if self.latent is None else LatentForward(self.latent, self.networks)

    @cached_property
    def _planner(self) -> PlanForward | None:
        if self.plan is None:
            return None
        planner, judge = layers(self.networks[FALLBACK]), layers(self.networks[PLAN])
        return PlanForward(self.plan, planner, judge, self.scaling.action_features)

    @property
    def noise_features(self) -> int:
        """Width of the noise that `fallback` takes."""
        if self.plan is not None:
            return self.plan.horizon * self.action_codec.width
        return self.behaviour_noise_features

    @property
    def behaviour_noise_features(self) -> int:
        """Width of the noise that `behaviour` takes."""
        return self.action_codec.width if self.latent is None else self.latent.latent

    @property
    def knows_behaviour(self) -> bool:
        """Whether it has learned what the log does."""
        return self.latent is not None or BEHAVIOUR in self.networks

    def behaviour(self, states: StateValue, noise: Noise) -> Candidates:
        """Return what the log's behaviour does for noise (n, c, z): (n, c, act), in the box.

        Needs a Box of actions, and `knows_behaviour`.
        """
        each = noise.shape[1]
        inputs, noise = _rows(states, noise)
        if self.latent_policy is not None:
            scaled = self.latent_policy.act(inputs, noise, refined=False)
        else:
            scaled = to_actions(self.behaviour_layers, inputs, noise, self.flow_steps)
        return self.scaling.to_box(scaled).reshape(
            len(states.inputs), each, self.action_codec.width
        )

    def states(self, observations: Observations) -> StateValue:
        """Judge finite observations (n, obs)."""
        return self.evaluate_features(self.scaling.observations(observations))

    def evaluate_features(self, inputs: _Float) -> StateValue:
        """Judge what `spaces.scaling` made of observations, (n, features)."""
        out = forward_layers(self._state_layers, inputs)
        constraint = out[0, :, 0] * np.float32(self.scale.spread) + np.float32(self.scale.offset)
        excess = np.maximum(out[1, :, 0], 0.0) * np.float32(self.scale.excess)
        return StateValue(inputs, constraint + excess)

    def action_values(self, states: StateValue, actions: Actions) -> Scalars:
        """Return Q_h of one action (n, act) in each of n states: (n,)."""
        out: _Float = self.scaled_values(states, self.scaling.actions(actions)[:, None])[:, 0]
        return out

    def action_spread(self, states: StateValue, actions: Actions) -> Scalars:
        """Return the standard deviation (n,) of Q_h among the members, units of h.

        Of the action by itself, also where plans judge it.
        """
        inputs = np.concatenate([states.inputs, self.scaling.actions(actions)], axis=-1)
        members = forward_layers(self._advantage_layers, inputs)[..., 0]
        out: _Float = members.std(axis=0) * np.float32(self.scale.step_rms)
        return out

    def action_value(self, states: StateValue, action: Actions) -> float:
        """Return Q_h of one finite action (act,) in one state: `action_values` with less around it.

        Most steps of a shielded agent need this number and nothing else.
        """
        width = states.inputs.shape[1]
        features = self.scaling.actions(action)
        if self._looks_ahead is not None:
            return float(self.scaled_values(states, features[None, None])[0, 0])
        inputs = np.empty((1, width + features.shape[0]), np.float32)
        inputs[:, :width] = states.inputs
        inputs[0, width:] = features
        worst = float(forward_layers(self._advantage_layers, inputs).max())
        return float(states.value[0]) + worst * self.scale.step_rms

    def candidate_values(self, states: StateValue, candidates: Candidates) -> Scalars:
        """Return Q_h of c actions (n, c, act) in each of n states: (n, c), in one pass."""
        count, each, width = candidates.shape
        actions = self.scaling.actions(candidates.reshape(count * each, width))
        return self.scaled_values(states, actions.reshape(count, each, actions.shape[-1]))

    def scaled_values(self, states: StateValue, candidates: Candidates) -> Scalars:
        """Return Q_h (n, c) of actions (n, c, features) as the networks see them."""
        count, each, width = candidates.shape
        if self._looks_ahead is not None:
            worst = self._looks_ahead.worst(states.inputs, candidates)
        else:
            seen = np.repeat(states.inputs, each, axis=0)
            inputs = np.concatenate([seen, candidates.reshape(count * each, width)], axis=-1)
            worst = forward_layers(self._advantage_layers, inputs)[..., 0].max(axis=0)
            worst = worst.reshape(count, each)
        out: _Float = states.value[:, None] + worst * np.float32(self.scale.step_rms)
        return out

    def action_gradients(
        self, states: StateValue, actions: Actions
    ) -> tuple[Scalars, npt.NDArray[np.float32]]:
        """Return Q_h of one action (n, act) of a Box in each of n states, and its gradient.

        That is (n,), and (n, act) in units of h for each half width of the box: dQ_h/du with u the
        action scaled to [-1, 1].
        """
        features, step = self.scaling.actions(actions), np.float32(self.scale.step_rms)
        if self._looks_ahead is not None:
            worst, gradient = self._looks_ahead.worst_and_gradient(states.inputs, features)
        else:
            inputs = np.concatenate([states.inputs, features], axis=-1)
            worst, gradient = largest_and_gradient(self._advantage_layers, inputs)
            gradient = gradient[:, states.inputs.shape[1] :]
        return states.value + worst * step, gradient * step

    @property
    def _looks_ahead(self) -> PlanForward | None:
        """The plans by which actions are judged; None: each is judged by itself."""
        return self._planner if self.plan is not None and self.plan.plans else None

    def fallback_alone(self, states: StateValue) -> Actions:
        """Return the fallback's actions (n, act) without noise, in the box."""
        return self.fallback(states, np.zeros((1, self.noise_features), np.float32))[:, 0]

    def fallback(self, states: StateValue, noise: Noise) -> Candidates:
        """Return the fallback actor's actions for noise (c, z): (n, c, act), in the box.

        Where actions are discrete: the one of lowest Q_h, c times.
        """
        if self.action_codec.discrete:
            every = np.broadcast_to(
                self.action_codec.choices, (len(states.inputs), *self.action_codec.choices.shape)
            )
            lowest = self.candidate_values(states, every).argmin(axis=1)
            return np.repeat(self.action_codec.choices[lowest][:, None, :], len(noise), axis=1)
        each = len(noise)
        inputs, noise = _rows(states, np.broadcast_to(noise, (len(states.inputs), *noise.shape)))
        if self.latent_policy is not None:
            raw = self.latent_policy.act(inputs, noise)
        elif self._planner is not None:
            raw = self._planner.draw(inputs, noise)[:, : self.action_codec.width]
        else:
            raw = forward(self.networks[FALLBACK], np.concatenate([inputs, noise], axis=-1))[0]
        scaled = np.clip(np.nan_to_num(raw), -1.0, 1.0)
        return self.scaling.to_box(scaled).reshape(
            len(states.inputs), each, self.action_codec.width
        )


def _rows(states: StateValue, noise: Noise) -> tuple[_Float, _Float]:
    """Return features and noise (n, c, z) of n states with c draws each, (n * c, ...)."""
    count, each, width = noise.shape
    inputs = np.repeat(states.inputs, each, axis=0)
    return inputs, noise.reshape(count * each, width).astype(np.float32)
