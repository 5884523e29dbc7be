"""Stage two: which updates fit the parametric policy to the induced one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safeshield.online.config import SSQLConfig
from safeshield.online.losses import ACTOR, CLONE
from safeshield.online.safe_sets import SafeRules, SafeSet
from safeshield.online.updates import SSQLUpdates
from safeshield.proposals.cloned import ClonedBehaviour
from safeshield.proposals.sources import Behaviour, log_density
from safeshield.training.state import Phase, TrainState

Array = npt.NDArray[Any]


def second_stage(
    updates: SSQLUpdates,
    behaviour: Behaviour,
    safe_set: SafeSet | None,
    config: SSQLConfig,
    *,
    cloned: bool,
) -> list[Phase]:
    """Return the phases, in order; none where `extraction_steps` is 0.

    Discrete actions: one, of either direction. A Box: forward is one; reverse begins with a clone
    of mu, from which the actor sets out, inside the support, and whose density takes the place of
    mu's where mu has none.

    Args:
        updates: closed over what was experienced.
        behaviour: mu.
        safe_set: what cuts it down.
        config: settings.
        cloned: the clone is there already.
    """
    model, total, size = updates.model, config.extraction_steps, config.batch_size
    if not total:
        return []
    known = _has_density(updates, behaviour)
    # Rules would be asked about every draw of every update, in Python; mu's own draws are judged.
    costly = isinstance(safe_set, SafeRules) and not model.actor.choices
    reverse = config.extraction == "reverse" or (
        config.extraction == "auto" and known and not costly
    )
    if not reverse:
        return [Phase("actor", total, updates.forward(total), size)]
    if model.actor.choices:
        return [Phase("actor", total, updates.reverse_choices(total), size)]
    first = 0 if cloned else max(1, total // 3)
    rest = max(1, total - first)

    def begin(state: TrainState, _: torch.Generator) -> TrainState:
        return state._replace(networks={**state.networks, ACTOR: state.networks[CLONE]})

    def log_mu(state: TrainState, rows: Array, actions: Array) -> Array:
        seen = model.observation_codec.batch(rows)
        likely = log_density(behaviour, seen, actions)
        if likely is None:
            params = state.networks[CLONE]
            clone = ClonedBehaviour(
                model.observation_codec, model.action_codec, model.scaling, model.actor, params
            )
            likely = clone.log_prob(seen, actions)
        if safe_set is None:
            return likely
        return np.where(safe_set.admits(seen, actions), likely, -np.inf)

    # Begun once, in its first step: a run that goes on from a checkpoint must not begin again.
    actor = Phase(
        "actor", rest, updates.reverse_box(rest, log_mu), size, refresh=begin, refresh_every=rest
    )
    return [Phase("clone", first, updates.clone(first), size), actor] if first else [actor]


def _has_density(updates: SSQLUpdates, behaviour: Behaviour) -> bool:
    """Whether mu tells one: asked about an action that may be done, in a state that was met."""
    model = updates.model
    middle = (0.5 * (model.action_codec.low + model.action_codec.high)).astype(np.float32)[None]
    tried = model.action_codec.choices if model.action_codec.discrete else middle
    some = model.observation_codec.batch(updates.replay.column("observations")[:1])
    return log_density(behaviour, some, tried[None]) is not None
