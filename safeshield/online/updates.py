"""The updates of Safe-Support Q-learning, closed over what has been experienced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.mixture import MixtureActor
from safeshield.nn.mlp import EnsembleMLP, Networks, Params
from safeshield.nn.optim import polyak
from safeshield.online.losses import (
    ACTOR,
    CLONE,
    CRITIC,
    SoftCritics,
    Transitions,
    actor_draws,
    clone_loss,
    critic_loss,
    forward_loss,
    reverse_loss_box,
    reverse_loss_choices,
)
from safeshield.online.replay import Replay
from safeshield.proposals.cloned import ClonedBehaviour
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.training.schedule import learning_rate
from safeshield.training.state import Draw, Metrics, TrainState, Update, descend, initial_state

Array = npt.NDArray[Any]
DRAWS = 4
"""Of each component of the actor, in an update of the reverse extraction; even."""
Loss = tuple[Tensor, Metrics]
ActorLoss = Callable[..., tuple[Tensor, Metrics]]
"""`forward_loss`, or `reverse_loss_choices`: alike in what they take."""
LogMu = Callable[[TrainState, Array, Array], Array]
"""From a state, rows of observations (n, obs) and actions (n, c, act) to log mu (n, c)."""


@dataclass(frozen=True)
class SSQLModel:
    """What experience and a configuration fix besides the weights: spaces, widths, units."""

    observation_codec: SpaceCodec
    action_codec: SpaceCodec
    scaling: Scaling
    critics: SoftCritics
    actor: MixtureActor

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation."""
        return self.observation_codec.space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one action."""
        return self.action_codec.space

    def parts(self) -> dict[str, EnsembleMLP]:
        """Describe every network; the clone has the actor's architecture."""
        actor = self.actor.network
        return {CRITIC: self.critics.network, ACTOR: actor, CLONE: actor}

    def policy(self, params: Params) -> ClonedBehaviour:
        """Return the actor with its weights as a policy."""
        return ClonedBehaviour(
            self.observation_codec, self.action_codec, self.scaling, self.actor, params
        )

    @property
    def noise_features(self) -> int:
        """Width of the noise that an update draws for each transition."""
        return self.actor.components * DRAWS * self.action_codec.width

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""
        state = initial_state(self.parts(), generator)
        # The actor begins as the clone: inside what it is about to be weighed by.
        networks = {**state.networks, ACTOR: state.networks[CLONE]}
        return state._replace(networks=networks, targets={CRITIC: networks[CRITIC]})


@dataclass(frozen=True, eq=False)
class SSQLUpdates:
    """All updates of one run; each maps (state, draw) to (state, metrics)."""

    model: SSQLModel
    replay: Replay
    temperature: float
    discount: float
    rate: float
    """Adam's rate, at the start where it falls."""
    polyak: float

    def critics(self, total: int | None) -> Update:
        """Stage one. `total` updates over which the rate falls; None: it stays."""

        def loss(state: TrainState, networks: Networks, batch: Transitions) -> Loss:
            return critic_loss(
                self.model.critics,
                networks,
                state.targets,
                batch,
                temperature=self.temperature,
                discount=self.discount,
            )

        descent = self._descent(CRITIC, loss, total)

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            state, metrics = descent(state, draw)
            targets = polyak(state.targets, state.networks, self.polyak)
            return state._replace(targets=targets), metrics

        return update

    def clone(self, total: int) -> Update:
        """Stage two, first: imitate what mu proposes."""

        def loss(_: TrainState, networks: Networks, batch: Transitions) -> Loss:
            return clone_loss(self.model.actor, networks[CLONE], batch.here)

        return self._descent(CLONE, loss, total)

    def forward(self, total: int) -> Update:
        """Stage two: the actor by the weighted likelihood of mu's draws."""
        return self._towards_induced(forward_loss, total)

    def reverse_choices(self, total: int) -> Update:
        """Stage two: the actor by KL(pi || pi*), summed over all choices."""
        return self._towards_induced(reverse_loss_choices, total)

    def _towards_induced(self, distance: ActorLoss, total: int) -> Update:
        """Return the update that brings the actor nearer to pi* on what mu proposes."""

        def loss(state: TrainState, networks: Networks, batch: Transitions) -> Loss:
            return distance(
                self.model.actor,
                networks[ACTOR],
                self.model.critics,
                state.targets,
                batch.here,
                temperature=self.temperature,
            )

        return self._descent(ACTOR, loss, total)

    def reverse_box(self, total: int, log_mu: LogMu) -> Update:
        """Stage two: the actor by its own draws, which mu's density judges."""
        model = self.model
        act = model.action_codec.width

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            seen = self._batch(draw).here.observations
            uniform = torch.special.ndtr(draw.noise).reshape(len(seen), -1, act)
            with torch.no_grad():
                actions = actor_draws(model.actor, state.networks[ACTOR], seen, uniform)
            raw = self.replay.column("observations")[draw.rows.cpu().numpy()]
            judged = log_mu(state, raw, model.scaling.to_box(actions.cpu().numpy()))
            likely = torch.tensor(judged, dtype=seen.dtype, device=seen.device)

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                return reverse_loss_box(
                    model.actor,
                    networks[ACTOR],
                    model.critics,
                    state.targets,
                    seen,
                    uniform,
                    likely,
                    temperature=self.temperature,
                )

            return descend(state, ACTOR, (ACTOR,), loss, self._rates(state, ACTOR, total))

        return update

    def _descent(
        self,
        name: str,
        loss: Callable[[TrainState, Networks, Transitions], Loss],
        total: int | None,
    ) -> Update:
        """Return one step of Adam on a loss for one network."""

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            batch, rates = self._batch(draw), self._rates(state, name, total)
            return descend(state, name, (name,), lambda new: loss(state, new, batch), rates)

        return update

    def _batch(self, draw: Draw) -> Transitions:
        rows = draw.rows.cpu().numpy()
        return self.replay.transitions(rows, self.model.scaling, draw.rows.device)

    def _rates(self, state: TrainState, name: str, total: int | None) -> Mapping[str, Tensor]:
        count = state.moments[name].updates
        if total is None:
            return {name: torch.full_like(count, self.rate)}
        return {name: learning_rate(self.rate, count, total)}
