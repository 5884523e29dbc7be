"""The safety critics and the actors as a shield uses them: NumPy arrays in raw units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.actor import Actor, Classifier, FlowActor, OneStepActor, Widths
from safeshield.nn.arrays import Deployed, Float, Weights
from safeshield.nn.mlp import OneRow, hidden_widths, largest_and_gradient, layers, run
from safeshield.nn.plan_actor import ActionCritic
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.shapes import Actions, Candidates, Flags, Noise, Observations, Scalars
from safeshield.values.constraint import ConstraintSource, SeveralConstraints
from safeshield.values.units import (
    ADVANTAGE,
    BEHAVIOUR,
    CONSTRAINT,
    EXCESS,
    FALLBACK,
    SafetyScale,
    action_value,
    constraint_of,
    known_value,
    state_value,
)

_ALL = slice(None)


class StateValue(NamedTuple):
    """The critics' results for n states, kept so that each state is evaluated only once."""

    inputs: Float
    """(n, obs) normalised observations."""
    value: Float
    """(n,) V_h of the states, in units of h."""
    constraint: Scalars | None = None
    """(n,) h of the states by the constraint's source, in units of h; None where a network
    estimates it. Where h is not finite, the observation does not determine it: `value` uses the
    network's estimate there, and no action is acceptable."""
    each: Scalars | None = None
    """(n, k) the constraints of which h is the largest, each in its own units, in the order of the
    source's names; None where there is only one."""
    hidden: Float | None = None
    """(members * width,) the observation's part of the first layer of the network "advantage",
    where there is one state and the model has no judge; else None."""

    @property
    def known(self) -> Flags | None:
        """(n,) whether the source determines h; None where a network estimates it."""
        return None if self.constraint is None else np.isfinite(self.constraint)

    def take(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> StateValue:
        """Return the results for some of the states: indices, a mask or a slice `index`."""
        h = None if self.constraint is None else self.constraint[index]
        each = None if self.each is None else self.each[index]
        return StateValue(self.inputs[index], self.value[index], h, each)


class _OneState(NamedTuple):
    """The safety critics, arranged for one state and one action at a time (see `OneRow`)."""

    bias: Float
    """(units,) biases of the first layers of the networks of the state and of "advantage"."""
    state: OneRow
    """The networks "constraint" and "excess", or "excess" alone where h has a source. The units of
    "advantage" follow theirs in the first layer, so that one product serves both."""
    advantage: OneRow
    """The network "advantage", with the action as input."""


@dataclass(frozen=True, eq=False)
class SafetyModel:
    """V_h, Q_h and the actors of one task; `values.units` has the formulas.

    Observations and actions are rows of `spaces.rows` in all methods.

    Attributes:
        observation_space: A space that `spaces.rows.flat_observations` takes.
        action_space: A space that `spaces.rows.flat_actions` takes.
        scaling: Units of observations and actions.
        constraint: Source of h(s), a function of the observation; None where the network
            "constraint" estimates it.
        scale: Units of h.
        networks: Weights by the network's name: "constraint", "excess", "advantage", and the
            networks that the actors and `judge` name.
        fallback_actor: The actor that proposes replacements. None where actions are discrete,
            because then all actions are candidates.
        behaviour_actor: The actor that imitates the log; None where none was learned.
        judge: A critic, such as one of plans, that says in place of "advantage" how much worse
            than the best an action is; None where "advantage" says so.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    scaling: Scaling
    constraint: ConstraintSource | None
    scale: SafetyScale
    networks: Mapping[str, Weights]
    fallback_actor: Actor | None
    behaviour_actor: Actor | Classifier | None = None
    judge: ActionCritic | None = None

    def __post_init__(self) -> None:
        kept = {
            name: weights if isinstance(weights, Deployed) else Deployed(weights)
            for name, weights in self.networks.items()
        }
        object.__setattr__(self, "networks", kept)

    @classmethod
    def of_networks(
        cls,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        scaling: Scaling,
        scale: SafetyScale,
        networks: Mapping[str, Weights],
        flow_steps: int = 10,
        constraint: ConstraintSource | None = None,
    ) -> SafetyModel:
        """Return a model with the usual actors, where `networks` holds their weights.

        "student" is a `OneStepActor`. "behaviour" is a `FlowActor` of `flow_steps` steps, or a
        `Classifier` where actions are discrete.

        Args:
            observation_space: Space of one observation.
            action_space: Space of one action.
            scaling: Units of observations and actions.
            scale: Units of h.
            networks: Weights by the network's name.
            flow_steps: Number of Euler steps of the behaviour's flow.
            constraint: Source of h of a state; None where the network "constraint" estimates it.
        """
        widths = widths_of(scaling, flat_actions(action_space))
        fallback, behaviour = None, None
        if FALLBACK in networks:
            hidden = hidden_widths(networks[FALLBACK])
            fallback = OneStepActor(widths.observation, widths.action, hidden)
        if BEHAVIOUR in networks:
            hidden = hidden_widths(networks[BEHAVIOUR])
            behaviour = (
                Classifier(widths.observation, widths.choices, hidden)
                if widths.choices
                else FlowActor(widths.observation, widths.action, hidden, flow_steps)
            )
        spaces = observation_space, action_space
        return cls(*spaces, scaling, constraint, scale, networks, fallback, behaviour)

    @cached_property
    def observation_codec(self) -> SpaceCodec:
        """How observations become rows."""
        return flat_observations(self.observation_space)

    @cached_property
    def action_codec(self) -> SpaceCodec:
        """How actions become rows."""
        return flat_actions(self.action_space)

    def __getstate__(self) -> dict[str, object]:
        # Arranged weights are not pickled; they are computed again after unpickling.
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __deepcopy__(self, memo: dict[int, object]) -> SafetyModel:
        # A model never changes, and Gymnasium often copies the specs of wrapped environments.
        return self

    # -- the critics -----------------------------------------------------------------------------

    @cached_property
    def _state_layers(self) -> list[tuple[Float, Float]]:
        # The networks "constraint" and "excess" have the same shape, so one pass evaluates both.
        pairs = zip(layers(self.networks[CONSTRAINT]), layers(self.networks[EXCESS]), strict=True)
        return [(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])) for a, b in pairs]

    @cached_property
    def _excess_layers(self) -> list[tuple[Float, Float]]:
        return layers(self.networks[EXCESS])

    @cached_property
    def _advantage_layers(self) -> list[tuple[Float, Float]]:
        return layers(self.networks[ADVANTAGE])

    @cached_property
    def _one_state(self) -> _OneState:
        state = self._state_layers if self.constraint is None else self._excess_layers
        advantage = self._advantage_layers
        width = self.scaling.observation_features
        (weight, bias), (seen, own_bias) = advantage[0], state[0]
        return _OneState(
            np.concatenate([b.reshape(-1) for b in (own_bias, bias)]),
            OneRow(np.concatenate([*seen, *weight[:, :width]], axis=1), state[1:]),
            OneRow(np.concatenate(list(weight[:, width:]), axis=1), advantage[1:]),
        )

    def states(
        self,
        observations: Observations,
        constraint: Scalars | None = None,
        readable: Flags | None = None,
    ) -> StateValue:
        """Return V_h of finite observations (n, obs), with the features that actions need.

        Args:
            observations: (n, obs) finite observations, as rows of `spaces.rows`.
            constraint: (n,) h of the states, or (n, k) where h is the largest of k constraints, for
                a source that is not registered in this process; None where the source computes it.
            readable: (n,) whether an observation was readable; None where all were. No source
                determines h of another one.

        Raises:
            LookupError: The source is not registered in this process, and `constraint` is None.
        """
        inputs = self.scaling.observations(observations)
        alone = len(inputs) == 1 and self.judge is None
        if self.constraint is None:
            return self._evaluate_one(inputs, None) if alone else self.evaluate_features(inputs)
        source, h, each = self.constraint, constraint, None
        if isinstance(source, SeveralConstraints):
            each = source.each(self.observation_codec.batch(observations)) if h is None else h
            h = source.largest(each)
        elif h is None:
            h = source(self.observation_codec.batch(observations))
        small = h.astype(np.float32)
        if readable is not None:
            small = np.where(readable, small, np.float32(np.nan))
        if alone and math.isfinite(small[0]):
            return self._evaluate_one(inputs, small, each)
        raw = run(self._excess_layers, inputs)[0, :, 0]
        value = known_value(self.scale, small, raw)
        known = np.isfinite(small)
        if known.all():
            return StateValue(inputs, value, small, each)
        estimated = self.evaluate_features(inputs).value
        return StateValue(inputs, np.where(known, value, estimated), small, each)

    def unjudged(self, observations: Observations) -> StateValue:
        """Return observations (n, obs) as features, with value 0; this needs no critics."""
        inputs = self.scaling.observations(observations)
        return StateValue(inputs, np.zeros(len(inputs), np.float32))

    def evaluate_features(self, inputs: Float) -> StateValue:
        """Return V_h (n,) of normalised observations, together with these.

        `inputs` (n, features) are observations as `spaces.scaling` makes them. The network
        "constraint" estimates h, because a source of h needs the observations themselves.
        """
        out = run(self._state_layers, inputs)
        return StateValue(inputs, state_value(self.scale, out[0, :, 0], out[1, :, 0]))

    def _evaluate_one(
        self, inputs: Float, h: Float | None, each: Scalars | None = None
    ) -> StateValue:
        """Return the results for one state, whose h (1,) is known and finite, or None.

        `each` (1, k) are the constraints of which h is the largest, where there are several.
        """
        one, scale = self._one_state, self.scale
        (*estimate, excess), hidden = one.state(inputs[0], one.bias)
        if h is None:
            value = state_value(scale, estimate[0], excess)
        else:
            value = known_value(scale, float(h[0]), excess)
        return StateValue(inputs, np.array((value,), np.float32), h, each, hidden)

    def violating(self, states: StateValue) -> Flags:
        """Return whether n states violate the constraint themselves, h(s) > 0, as (n,).

        Where the observation does not determine h, the network's estimate of h is used. `states` is
        the result of the method `states` for n observations.
        """
        excess = run(self._excess_layers, states.inputs)[0, :, 0]
        return np.asarray(constraint_of(self.scale, states.value, excess) > 0)

    def action_values(self, states: StateValue, actions: Actions) -> Scalars:
        """Return Q_h (n,) of one action in each of n states.

        Args:
            states: Result of `states` for the n observations.
            actions: (n, act) actions, as rows.
        """
        out: Float = self.scaled_values(states, self.scaling.actions(actions)[:, None])[:, 0]
        return out

    def action_spread(self, states: StateValue, actions: Actions) -> Scalars:
        """Return the standard deviation (n,) of Q_h among the critic's members, in units of h.

        It comes from the network "advantage", also where the model has a `judge`.

        `states` and `actions` are those of `action_values`.
        """
        inputs = np.concatenate([states.inputs, self.scaling.actions(actions)], axis=-1)
        members = run(self._advantage_layers, inputs)[..., 0]
        out: Float = members.std(axis=0) * np.float32(self.scale.step_rms)
        return out

    def action_value(self, states: StateValue, action: Actions) -> float:
        """Return Q_h of one finite action in one state, faster than `action_values`.

        Most steps of a shielded agent need only this number. `states` is the result for one
        observation, and `action` (act,) is one row.
        """
        features = self.scaling.actions(action)
        if states.hidden is None:
            return float(self.scaled_values(states, features[None, None])[0, 0])
        members, _ = self._one_state.advantage(features, states.hidden)
        # `max` may miss a NaN, the sum does not.
        worst = max(members) if sum(members) < math.inf else math.nan
        return action_value(self.scale, float(states.value[0]), worst)

    def candidate_values(self, states: StateValue, candidates: Candidates) -> Scalars:
        """Return Q_h (n, c) of c actions in each of n states, in one pass.

        Args:
            states: Result of `states` for the n observations.
            candidates: (n, c, act) actions, as rows.
        """
        count, each, width = candidates.shape
        actions = self.scaling.actions(candidates.reshape(count * each, width))
        return self.scaled_values(states, actions.reshape(count, each, actions.shape[-1]))

    def scaled_values(
        self, states: StateValue, candidates: Candidates, members: slice = _ALL
    ) -> Scalars:
        """Return Q_h (n, c) of actions that are normalised already.

        Args:
            states: Result of `states` for the n observations.
            candidates: (n, c, features) candidates as inputs of the networks.
            members: The members of the network "advantage" whose largest output is taken. The
                result of some members is a lower bound of Q_h. A `judge` has no such members.

        Raises:
            ValueError: `members` are some of a model with a `judge`.
        """
        if self.judge is not None:
            if members != _ALL:
                raise ValueError(f"members must be {_ALL} in a model with a judge, got {members}")
            worst = self.judge.worst(self.networks, states.inputs, candidates)
        else:
            count, each, width = candidates.shape
            stack = [(w[members], b[members]) for w, b in self._advantage_layers]
            seen = np.repeat(states.inputs, each, axis=0)
            inputs = np.concatenate([seen, candidates.reshape(count * each, width)], axis=-1)
            worst = run(stack, inputs)[..., 0].max(axis=0).reshape(count, each)
        return action_value(self.scale, states.value[:, None], worst)

    @property
    def members(self) -> int:
        """Number of members of the critic of actions; 1 for a `judge`, which has no parts."""
        return 1 if self.judge is not None else len(self._advantage_layers[0][0])

    def action_gradients(self, states: StateValue, actions: Actions) -> tuple[Scalars, Float]:
        """Return Q_h (n,) of one action of a Box in each of n states, and its gradient.

        The gradient (n, act) is dQ_h/du, where u is the action scaled to [-1, 1]. Its unit is that
        of h per half width of the box. `states` and `actions` (n, act) are those of
        `action_values`.
        """
        features = self.scaling.actions(actions)
        if self.judge is not None:
            worst, slope = self.judge.worst_and_gradient(self.networks, states.inputs, features)
        else:
            inputs = np.concatenate([states.inputs, features], axis=-1)
            worst, slope = largest_and_gradient(self._advantage_layers, inputs)
            slope = slope[:, states.inputs.shape[1] :]
        step = np.float32(self.scale.step_rms)
        return action_value(self.scale, states.value, worst), slope * step

    # -- the actors ------------------------------------------------------------------------------

    @property
    def noise_features(self) -> int:
        """Width of the noise that `fallback` takes."""
        actor = self.fallback_actor
        return self.action_codec.width if actor is None else actor.noise_features

    @property
    def behaviour_noise_features(self) -> int:
        """Width of the noise that `behaviour` takes."""
        return self._behaviour.noise_features

    @property
    def knows_behaviour(self) -> bool:
        """Whether the model has an actor that imitates the log."""
        return self.behaviour_actor is not None

    @property
    def _behaviour(self) -> Actor:
        actor = self.behaviour_actor
        if actor is None or isinstance(actor, Classifier):
            raise ValueError("the model has no actor that imitates a log of a Box of actions")
        return actor

    def behaviour(self, states: StateValue, noise: Noise) -> Candidates:
        """Return the imitated behaviour's actions (n, c, act), in the box, for noise (n, c, z).

        This needs a Box of actions, and `knows_behaviour`. `states` is the result for n
        observations.
        """
        scaled = self._behaviour.act(self.networks, *_rows(states, noise))
        return self._in_box(scaled, len(states.inputs))

    def fallback_alone(self, states: StateValue) -> Actions:
        """Return the fallback's actions (n, act) without noise, in the box.

        `states` is the result for n observations.
        """
        return self.fallback(states, np.zeros((1, self.noise_features), np.float32))[:, 0]

    def fallback(self, states: StateValue, noise: Noise) -> Candidates:
        """Return the fallback actor's actions (n, c, act), in the box, for noise (c, z).

        Where actions are discrete, this is the action of lowest Q_h, c times. `states` is the
        result for n observations.
        """
        count = len(states.inputs)
        if self.fallback_actor is None:
            choices = self.action_codec.choices
            every = np.broadcast_to(choices, (count, *choices.shape))
            lowest = self.candidate_values(states, every).argmin(axis=1)
            return np.repeat(choices[lowest][:, None, :], len(noise), axis=1)
        inputs, rows = _rows(states, np.broadcast_to(noise, (count, *noise.shape)))
        scaled = self.fallback_actor.act(self.networks, inputs, rows)
        return self._in_box(np.nan_to_num(scaled), count)

    def _in_box(self, scaled: Float, count: int) -> Candidates:
        return self.scaling.to_box(scaled).reshape(count, -1, self.action_codec.width)


def _rows(states: StateValue, noise: Noise) -> tuple[Float, Float]:
    """Return features and noise (n * c, ...) of n states, from noise (n, c, z) of c draws each."""
    _, each, width = noise.shape
    return np.repeat(states.inputs, each, axis=0), noise.reshape(-1, width).astype(np.float32)


def widths_of(scaling: Scaling, action_codec: SpaceCodec) -> Widths:
    """Return the widths of the networks' inputs and outputs that the spaces determine.

    `scaling` gives the inputs, and `action_codec` the number of choices of a discrete action space.
    """
    choices = math.prod(action_codec.categories) if action_codec.discrete else 0
    return Widths(scaling.observation_features, scaling.action_features, choices)
