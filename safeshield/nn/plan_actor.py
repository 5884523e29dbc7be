"""Plans: chunks of h actions that a one-step actor draws and a critic judges as a whole.

    A(s, a) = min over k of A(s, (a, tail_k)),    tail_k: the actions of plan k after its first

The noise from which the plans are drawn is fixed, so the value is a function of state and action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, Protocol

import numpy as np

from safeshield.nn.actor import (
    FALLBACK,
    MAX_STEPS,
    Described,
    check_count,
    check_hidden,
    of_noise,
    register_actor,
)
from safeshield.nn.arrays import (
    A,
    Float,
    NetworksOf,
    Weights,
    concat,
    in_each,
    largest,
    nan_to_zero,
    places,
)
from safeshield.nn.mlp import EnsembleMLP, largest_and_gradient, layers, run

PLAN = "plan_advantage"
"""Name of the critic of whole plans."""
_SEED = 20_261_127


class ActionCritic(Described, Protocol):
    """A critic of A(s, a), the amount by which an action is worse than the best.

    The unit is the change of h in one step; see `values.safety`.
    """

    def worst(self, networks: Mapping[str, Weights], inputs: Float, actions: Float) -> Float:
        """Return max_i A_i(s, a) of c actions in each of n states, (n, c).

        `networks` are the weights, `inputs` (n, obs) are normalised observations, and `actions` (n,
        c, act) lie in [-1, 1].
        """
        ...

    def worst_and_gradient(
        self, networks: Mapping[str, Weights], inputs: Float, actions: Float
    ) -> tuple[Float, Float]:
        """Return max_i A_i(s, a) of one action per state, (n,), and its gradient in it, (n, act).

        `networks` are the weights, `inputs` (n, obs) are normalised observations, and `actions` (n,
        act) lie in [-1, 1].
        """
        ...


@register_actor
@dataclass(frozen=True)
class PlanActor:
    """One perceptron that maps (s, z) to a plan, whose first action is executed.

    It is the student of R2PAC.
    """

    kind: ClassVar[str] = "plan"
    observation: int
    """Number of features of an observation."""
    action: int
    """Number of entries of an action."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    horizon: int
    """h, the number of actions in a plan."""

    @cached_property
    def network(self) -> EnsembleMLP:
        """Description of the network."""
        chunk = self.noise_features
        return EnsembleMLP(self.observation + chunk, chunk, self.hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the actor's network by name (see `nn.actor.Described`)."""
        return {FALLBACK: self.network}

    def check(self) -> None:
        """See `nn.actor.Described`."""
        check_hidden(FALLBACK, self.hidden)
        check_count("horizon", self.horizon, 1, MAX_STEPS)

    @property
    def noise_features(self) -> int:
        """Width of the noise and of a plan, h * act."""
        return self.horizon * self.action

    def draw(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        """Return plans (n, h * act) in [-1, 1] for noise (n, h * act) in n states.

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        raw = of_noise(self.network, networks[FALLBACK], observations, noise)
        return nan_to_zero(raw).clip(-1.0, 1.0)

    def act(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        """Return the first actions (n, act) of the plans for noise (n, h * act).

        See `nn.actor.Actor`. `networks` are the weights, and `observations` (n, obs) are
        normalised.
        """
        out: A = self.draw(networks, observations, noise)[:, : self.action]
        return out


@register_actor
@dataclass(frozen=True)
class BestPlan:
    """An action critic that judges an action by the least dangerous plan that begins with it."""

    kind: ClassVar[str] = "best_plan"
    planner: PlanActor
    """Actor that draws the plans."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers of A(s, plan)."""
    members: int = 2
    """Number of members of the critic A(s, plan)."""
    plans: int = 8
    """Number of plans that are judged for each action."""

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the planner's network and the critic of plans by name (`nn.actor.Described`)."""
        inputs = self.planner.observation + self.planner.noise_features
        judge = EnsembleMLP(inputs, 1, self.hidden, self.members)
        return {**self.planner.parts(), PLAN: judge}

    def check(self) -> None:
        """See `nn.actor.Described`."""
        check_hidden(PLAN, self.hidden)
        check_count("members", self.members, 1, 64)
        check_count("plans", self.plans, 1, MAX_STEPS)

    def worst(self, networks: NetworksOf[A], inputs: A, actions: A) -> A:
        """Return the value of each action's least dangerous plan, (n, c) (see `ActionCritic`).

        `networks` are the weights, `inputs` (n, obs) are normalised observations, and `actions` (n,
        c, act) lie in [-1, 1].
        """
        rows = self._chunks(networks, inputs, actions)
        judged = largest(self._judged(networks, rows))
        least: A = judged.min(axis=-1) if isinstance(judged, np.ndarray) else judged.amin(-1)
        return least

    def worst_and_gradient(self, networks: NetworksOf[A], inputs: A, actions: A) -> tuple[A, A]:
        """Return the value of each action's least dangerous plan, (n,), and its gradient, (n, act).

        `networks` are the weights, `inputs` (n, obs) are normalised observations, and `actions` (n,
        act) lie in [-1, 1].
        """
        rows = self._chunks(networks, inputs, actions[:, None])
        best = largest(self._judged(networks, rows))[:, 0].argmin(-1)
        chosen = rows[places(rows, len(rows)), 0, best]
        value, slope = largest_and_gradient(layers(networks[PLAN]), chosen)
        width = inputs.shape[1]
        return value, slope[:, width : width + self.planner.action]

    def _chunks(self, networks: NetworksOf[A], inputs: A, actions: A) -> A:
        """Return (n, c, plans, obs + h * act): every action at the head of every plan."""
        count, width = inputs.shape
        noise = _noise(self.plans, self.planner.noise_features)
        if not isinstance(inputs, np.ndarray):
            table = inputs.new_tensor(noise)
            seen = inputs[:, None].expand(-1, self.plans, -1)
            draws = in_each(inputs, table).flatten(0, 1)
            plans = self.planner.draw(networks, seen.reshape(-1, width), draws)
            plans = plans.reshape(-1, 1, *noise.shape)
            shape = -1, actions.shape[1], self.plans
            parts = seen[:, None], actions[:, :, None], plans[..., self.planner.action :]
            joined: A = concat([part.expand(*shape, part.shape[-1]) for part in parts])
            return joined
        repeated = np.repeat(inputs, self.plans, axis=0)
        drawn = self.planner.draw(networks, repeated, np.tile(noise, (count, 1)))
        rows = np.empty((count, actions.shape[1], self.plans, width + noise.shape[1]), np.float32)
        rows[..., :width] = inputs[:, None, None]
        rows[..., width:] = drawn.reshape(count, 1, *noise.shape)
        rows[..., width : width + self.planner.action] = actions[:, :, None]
        return rows

    def _judged(self, networks: NetworksOf[A], rows: A) -> A:
        shape = rows.shape[:-1]
        out = run(layers(networks[PLAN]), rows.reshape(-1, rows.shape[-1]))[..., 0]
        return out.reshape(len(out), *shape)


@cache
def _noise(plans: int, width: int) -> Float:
    noise = np.random.default_rng(_SEED).standard_normal((plans, width)).astype(np.float32)
    noise[:1] = 0.0
    noise.flags.writeable = False
    return noise
