"""Stage two: the induced policy, and the updates that fit the parametric policy to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.mlp import Params
from safeshield.online.config import SSQLConfig
from safeshield.online.losses import ACTOR, CLONE, Support, forward_loss, reverse_loss_choices
from safeshield.online.replay import support_of
from safeshield.online.safe_proposals import SafeBehaviour, SafeProposals
from safeshield.online.safe_sets import SafeRules
from safeshield.online.updates import SSQLModel, SSQLUpdates
from safeshield.proposals.sources import log_density
from safeshield.spaces.batches import Batch
from safeshield.training.state import Phase, TrainState
from safeshield.values.soft import induced_log_policy, soft_value

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class InducedPolicy:
    """The policy pi* = mu exp(Q / a) / Z, which chooses among mu's proposals in the safe set."""

    model: SSQLModel
    """Description of the agent's networks."""
    params: Params
    """Weights of the critics, which are never changed in place."""
    mu: SafeBehaviour
    """The behaviour, restricted to the safe set."""
    config: SSQLConfig
    """Settings."""
    device: torch.device
    """Device on which the critics run."""

    def act(
        self, observations: Batch, rng: np.random.Generator, *, deterministic: bool = False
    ) -> tuple[Array, Array]:
        """Return actions (n, act) in n states, and log pi*/mu of them (n,); see `weigh`.

        Args:
            observations: Batch of n observations.
            rng: Generator of the draws.
            deterministic: Whether to return the most likely action instead of a draw.
        """
        here = self.mu.propose(observations, self.config.predict_samples, rng)
        return self.weigh(observations, here, rng, deterministic=deterministic)

    @torch.no_grad()
    def weigh(
        self,
        observations: Batch,
        here: SafeProposals,
        rng: np.random.Generator,
        *,
        deterministic: bool = False,
    ) -> tuple[Array, Array]:
        """Return one of the proposed actions (n, act) in each state, and log pi*/mu of it (n,).

        Args:
            observations: n observations.
            here: mu's proposals in these states.
            rng: Generator of the draw.
            deterministic: Return the likeliest action instead of a draw.
        """
        support, q = self._values(observations, here)
        tensor = induced_log_policy(q, self.config.temperature, support.log_mu)
        log_pi = tensor.double().cpu().numpy()
        noisy = log_pi if deterministic else log_pi + rng.gumbel(size=log_pi.shape)
        best = noisy.argmax(axis=1)
        each = np.arange(len(best))
        nats: Array = log_pi[each, best] - support.log_mu.cpu().numpy()[each, best]
        if self.model.action_codec.discrete:
            return self.model.action_codec.choices[best], nats
        return here.candidates[each, best], nats

    @torch.no_grad()
    def value(self, observations: Batch, rng: np.random.Generator) -> Array:
        """Return V(s) (n,), in units of return.

        `observations` is a batch of n observations, and `rng` generates the draws of mu.
        """
        here = self.mu.propose(observations, self.config.predict_samples, rng)
        support, q = self._values(observations, here)
        value = soft_value(q, self.config.temperature, support.log_mu)
        return np.asarray(value.double().cpu().numpy())

    def _values(self, observations: Batch, here: SafeProposals) -> tuple[Support, Tensor]:
        """Return mu's proposals as tensors on the device, and their Q (n, c)."""
        model = self.model
        rows = model.observation_codec.flatten(observations, "observation")[0].astype(np.float32)
        support = support_of(
            rows, here.candidates, here.log_mu, model.scaling, model.action_codec, self.device
        )
        return support, model.critics.proposed(self.params, support)


def second_stage(updates: SSQLUpdates, mu: SafeBehaviour, *, cloned: bool) -> list[Phase]:
    """Return the phases of stage two, in order; none where `extraction_steps` is 0.

    One phase trains the actor. In a Box with the reverse direction, a phase before it trains a
    clone of mu. The actor starts from the clone, inside the support. Where mu has no density, the
    clone's density is used.

    Args:
        updates: The updates, with the replay of transitions.
        mu: The behaviour, restricted to the safe set.
        cloned: Whether the clone has been trained already.
    """
    model, config = updates.model, updates.config
    total, size = config.extraction_steps, config.batch_size
    if not total:
        return []
    # The reverse direction would call the rules, in Python, for every draw of every update. The
    # forward direction uses mu's own draws, which have been judged already.
    costly = isinstance(mu.safe_set, SafeRules) and not model.actor.choices
    known = _has_density(updates, mu)
    reverse = config.extraction == "reverse" or (
        config.extraction == "auto" and known and not costly
    )
    if not reverse or model.actor.choices:
        distance = reverse_loss_choices if reverse else forward_loss
        return [
            Phase("actor", total, updates.towards_induced(distance, total), size, capturable=False)
        ]
    first = 0 if cloned else max(1, total // 3)
    rest = max(1, total - first)

    def begin(state: TrainState, _: torch.Generator) -> TrainState:
        return state._replace(networks={**state.networks, ACTOR: state.networks[CLONE]})

    def log_mu(state: TrainState, rows: Array, actions: Array) -> Array:
        seen = model.observation_codec.batch(rows)
        likely = log_density(mu.behaviour, seen, actions)
        if likely is None:
            likely = model.policy(state.networks[CLONE]).log_prob(seen, actions)
        return mu.masked(seen, actions, likely)

    # The actor is set once, in the first step, because a resumed run must not set it again.
    actor = Phase(
        "actor",
        rest,
        updates.reverse_box(rest, log_mu),
        size,
        refresh=begin,
        refresh_every=rest,
        capturable=False,
    )
    clone = Phase("clone", first, updates.clone(first), size, capturable=False)
    return [clone, actor] if first else [actor]


def _has_density(updates: SSQLUpdates, mu: SafeBehaviour) -> bool:
    """Return whether mu returns a density for a possible action in a state of the replay."""
    codec = updates.model.action_codec
    middle = (0.5 * (codec.low + codec.high)).astype(np.float32)[None]
    tried = codec.choices if codec.discrete else middle
    some = updates.model.observation_codec.batch(updates.replay.column("observations")[:1])
    return log_density(mu.behaviour, some, tried[None]) is not None
