"""The networks of Safe-Support Q-learning and their updates on a replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import gymnasium as gym
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.mixture import MixtureActor
from safeshield.nn.mlp import Networks, Params
from safeshield.nn.optim import polyak
from safeshield.online.config import SSQLConfig
from safeshield.online.losses import (
    ACTOR,
    CLONE,
    CRITIC,
    SoftCritics,
    Transitions,
    actor_draws,
    clone_loss,
    critic_loss,
    log_induced,
    reverse_loss_box,
)
from safeshield.online.replay import Replay
from safeshield.proposals.cloned import ClonedBehaviour
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.training.architecture import Architecture, Interface
from safeshield.training.log import scale_of_returns
from safeshield.training.schedule import learning_rate
from safeshield.training.state import (
    Draw,
    Loss,
    Metrics,
    TrainState,
    Update,
    descend,
    falling,
    initial_state,
)

Array = npt.NDArray[Any]
DRAWS = 4
"""Draws of each component of the actor in an update of the reverse extraction; an even number."""
ActorLoss = Callable[..., tuple[Tensor, Metrics]]
"""`forward_loss` or `reverse_loss_choices`, which take the same arguments."""
LogMu = Callable[[TrainState, Array, Array], Array]
"""Function of a state, observations (n, obs) and actions (n, c, act) that returns log mu (n, c)."""


def units_of_returns(returns: Array, config: SSQLConfig) -> tuple[float, float]:
    """Return the offset and the spread of returns (N,), which are the units of the critics.

    Returns that differ by less than the temperature do not show the scale of the task: a warm-up
    may have seen no reward at all. The spread is then 100 temperatures, because a useful
    temperature is about a hundredth of the difference between good and bad returns.

    >>> import numpy as np
    >>> units_of_returns(np.zeros(4), SSQLConfig(temperature=0.01))
    (0.0, 1.0)
    """
    offset, spread = scale_of_returns(returns)
    return offset, spread if spread >= config.temperature else 100.0 * config.temperature


@dataclass(frozen=True)
class SSQLModel(Architecture):
    """Spaces, units and networks of an agent, without the weights."""

    critics: SoftCritics
    """Networks of Q."""
    actor: MixtureActor
    """Network of the parametric policy; the behaviour's clone has the same architecture."""

    @classmethod
    def of(
        cls,
        config: SSQLConfig,
        interface: Interface,
        units: tuple[float, float],
    ) -> Self:
        """Return the description of an agent's networks.

        Args:
            config: Settings.
            interface: Spaces and scaling.
            units: Offset and spread of the returns.
        """
        observation_space, action_space, scaling = interface[:3]
        codec = flat_actions(action_space)
        choices = len(codec.choices) if codec.discrete else 0
        hidden = config.critic_hidden
        if hidden is None:
            table = isinstance(observation_space, gym.spaces.Discrete) and codec.discrete
            hidden = () if table else (128, 128)
        inputs = scaling.observation_features
        actor = MixtureActor(inputs, choices, codec.width, config.actor_hidden, config.components)
        critics = SoftCritics(inputs, choices, codec.width, hidden, *units, config.twins)
        networks = {CRITIC: critics.network, ACTOR: actor.network, CLONE: actor.network}
        return cls(*interface, networks, critics, actor)

    @cached_property
    def observation_codec(self) -> SpaceCodec:
        """Converts observations to rows."""
        return flat_observations(self.observation_space)

    @cached_property
    def action_codec(self) -> SpaceCodec:
        """Converts actions to rows."""
        return flat_actions(self.action_space)

    @property
    def noise_features(self) -> int:
        """Width of the noise that an update draws for each transition."""
        return self.actor.components * DRAWS * self.action_codec.width

    def header(self) -> dict[str, Any]:
        """Return the units of the values, as JSON."""
        return {"value": {"offset": self.critics.offset, "spread": self.critics.spread}}

    def policy(self, params: Params) -> ClonedBehaviour:
        """Return the actor with weights `params` as a policy."""
        return ClonedBehaviour(
            self.observation_codec, self.action_codec, self.scaling, self.actor, params
        )

    def initial(self, generator: torch.Generator, clone: Params | None = None) -> TrainState:
        """Return the state before the first update, with weights that `generator` draws.

        `clone`, where it is given, is used as the clone's weights.
        """
        state = initial_state(self.parts(), generator, slow=(CRITIC,))
        # The actor begins with the clone's weights, which imitate the behaviour.
        clone = state.networks[CLONE] if clone is None else clone
        return state._replace(networks={**state.networks, CLONE: clone, ACTOR: clone})


@dataclass(frozen=True, eq=False)
class SSQLUpdates:
    """All updates of one run. Each update maps (state, draw) to (state, metrics)."""

    model: SSQLModel
    """Description of the agent's networks."""
    replay: Replay
    """Transitions from which batches are drawn."""
    config: SSQLConfig
    """Settings."""

    def draw(self, generator: torch.Generator, noise_features: int = 0) -> Draw:
        """Return a random batch of transitions, with `noise_features` normal numbers for each.

        `generator` draws both.
        """
        size, device = self.config.batch_size, generator.device
        rows = torch.randint(len(self.replay), (size,), generator=generator, device=device)
        noise = torch.randn((size, noise_features), generator=generator, device=device)
        return Draw(rows, noise, torch.zeros(0, device=device))

    def critics(self, total: int | None) -> Update:
        """Return the update of stage one; its rate falls over `total` updates, or is constant."""
        base = self.config.learning_rate

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            batch, count = self._batch(draw), state.moments[CRITIC].updates
            rate = (
                torch.full_like(count, base) if total is None else learning_rate(base, count, total)
            )

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                return critic_loss(
                    self.model.critics,
                    networks,
                    state.targets,
                    batch,
                    temperature=self.config.temperature,
                    discount=self.config.discount,
                )

            moved, metrics = descend(state, CRITIC, (CRITIC,), loss, {CRITIC: rate})
            targets = polyak(moved.targets, moved.networks, self.config.polyak)
            return moved._replace(targets=targets), metrics

        return update

    def clone(self, total: int) -> Update:
        """Return the update of stage two that trains the clone on mu's proposals.

        Its learning rate falls over `total` updates.
        """

        def loss(_: TrainState, draw: Draw) -> Loss:
            here = self._batch(draw).here
            return lambda networks: clone_loss(self.model.actor, networks[CLONE], here)

        return falling(CLONE, loss, self.config.learning_rate, total)

    def towards_induced(self, distance: ActorLoss, total: int) -> Update:
        """Return the update of stage two that fits the actor to pi* on mu's proposals.

        `distance` is the loss, and the learning rate falls over `total` updates.
        """

        def loss(state: TrainState, draw: Draw) -> Loss:
            here, model = self._batch(draw).here, self.model
            target = log_induced(model.critics, state.targets, here, self.config.temperature)
            return lambda networks: distance(model.actor, networks[ACTOR], here, target)

        return falling(ACTOR, loss, self.config.learning_rate, total)

    def reverse_box(self, total: int, log_mu: LogMu) -> Update:
        """Return the update of stage two that fits the actor by its own draws and mu's density.

        The learning rate falls over `total` updates, and `log_mu` computes the density.
        """
        model = self.model

        def loss(state: TrainState, draw: Draw) -> Loss:
            seen = self._batch(draw).here.observations
            uniform = torch.special.ndtr(draw.noise).reshape(
                len(seen), -1, model.action_codec.width
            )
            with torch.no_grad():
                actions = actor_draws(model.actor, state.networks[ACTOR], seen, uniform)
            raw = self.replay.column("observations")[draw.rows.cpu().numpy()]
            judged = log_mu(state, raw, model.scaling.to_box(actions.cpu().numpy()))
            likely = torch.tensor(judged, dtype=seen.dtype, device=seen.device)

            def scaled_q(actions: Tensor) -> Tensor:
                q = model.critics.one(state.targets[CRITIC], seen, actions)
                return q / self.config.temperature

            return lambda networks: reverse_loss_box(
                model.actor, networks[ACTOR], scaled_q, seen, uniform, likely
            )

        return falling(ACTOR, loss, self.config.learning_rate, total)

    def _batch(self, draw: Draw) -> Transitions:
        rows = draw.rows.cpu().numpy()
        return self.replay.transitions(rows, self.model.scaling, draw.rows.device)
