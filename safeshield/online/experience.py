"""Logs as experience: transitions with what a behaviour offers there, and a log's own clone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.mlp import Params
from safeshield.online.collector import OutsideSafeSetWarning
from safeshield.online.config import SSQLConfig
from safeshield.online.losses import CLONE
from safeshield.online.offers import Offer, offer
from safeshield.online.replay import Replay, Step
from safeshield.online.safe_sets import LoggedRules, MaskedUniform, SafeRules, SafeSet
from safeshield.online.updates import SSQLModel, SSQLUpdates
from safeshield.proposals.choices import choice_index
from safeshield.proposals.cloned import ClonedBehaviour
from safeshield.proposals.sources import Behaviour
from safeshield.spaces.rows import SpaceCodec
from safeshield.training.state import Draw

Array = npt.NDArray[Any]
_CHUNK = 4096


def replay_of_log(
    dataset: OfflineDataset,
    behaviour: Behaviour,
    safe_set: SafeSet | None,
    samples: int,
    rng: np.random.Generator,
) -> Replay:
    """Return the transitions of a log, with the behaviour's offers in both of their states.

    Rules admit nothing in a state that is lost: transitions from there, and into there unless they
    terminate, are left out, with a warning.

    Raises:
        ValueError: none are left.
    """
    seen, played = dataset.flat_observations, dataset.flat_actions
    asked = LoggedRules(safe_set) if isinstance(safe_set, SafeRules) else safe_set
    if isinstance(behaviour, MaskedUniform):
        behaviour = behaviour.of_a_log()

    def offers(rows: Array) -> Offer:
        parts = [
            offer(behaviour, asked, played, seen.batch(rows[i : i + _CHUNK]), samples, rng)
            for i in range(0, len(rows), _CHUNK)
        ]
        return Offer(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    here = offers(dataset.observations)
    # The state after a step is where the next one starts; an episode's last is asked about where it
    # was cut off. Nothing is asked about a terminal state, and what stands there is never read.
    following = np.minimum(np.arange(len(dataset)) + 1, len(dataset) - 1)
    after = Offer(*(np.array(part[following]) for part in here))
    cut = np.flatnonzero(dataset.truncated & ~dataset.terminated)
    if len(cut):
        for part, last in zip(after, offers(dataset.next_observations[cut]), strict=True):
            part[cut] = last
    if here.mass_outside.any():
        warnings.warn(
            f"{here.mass_outside.mean():.1%} of what the behaviour offers in the log's states lies "
            "outside the safe set: it is never learned from",
            OutsideSafeSetWarning,
            stacklevel=3,
        )
    kept = np.ones(len(dataset), dtype=np.bool_)
    if asked is not safe_set:
        kept = ~here.lost & (dataset.terminated | ~after.lost)
    if not kept.all():
        if not kept.any():
            raise ValueError("the rules admit no action in any state of the log")
        warnings.warn(
            f"{(~kept).sum()} of the log's {len(kept)} transitions begin or end where the rules "
            "admit nothing, and are left out",
            OutsideSafeSetWarning,
            stacklevel=3,
        )
    return _filled(dataset, played, here, after, kept)


def clone_of_log(
    dataset: OfflineDataset, model: SSQLModel, config: SSQLConfig, device: torch.device
) -> tuple[ClonedBehaviour, Params]:
    """Return the log's own behaviour, by maximum likelihood of its actions; and the weights."""
    played, count = dataset.flat_actions, len(dataset)
    if played.discrete:
        candidates = np.zeros((count, 0, played.width), np.float32)
        log_mu = np.full((count, len(played.choices)), -np.inf, np.float32)
        taken = choice_index(played, dataset.actions[:, None])[:, 0]
        log_mu[np.arange(count), taken] = 0.0
    else:
        candidates, log_mu = dataset.actions[:, None], np.zeros((count, 0), np.float32)
    no = np.zeros(count, np.bool_)
    own = Offer(candidates, log_mu, dataset.actions, no, np.zeros(count), no)
    replay = _filled(dataset, played, own, own, np.ones(count, dtype=np.bool_))
    total = max(config.extraction_steps, 1)
    updates = SSQLUpdates(
        model, replay, config.temperature, config.discount, config.learning_rate, config.polyak
    ).clone(total)
    generator = torch.Generator(device).manual_seed(config.seed)
    state = model.initial(generator)
    empty = torch.zeros(0, device=device)
    for _ in range(total):
        rows = torch.randint(count, (config.batch_size,), generator=generator, device=device)
        state, metrics = updates(state, Draw(rows, empty, empty))
    if not torch.isfinite(metrics["clone/cross_entropy"]):
        raise FloatingPointError("cloning the log diverged: lower learning_rate")
    params = state.networks[CLONE]
    seen = dataset.flat_observations
    return ClonedBehaviour(seen, played, model.scaling, model.actor, params), params


def _filled(
    dataset: OfflineDataset, played: SpaceCodec, here: Offer, after: Offer, kept: Array
) -> Replay:
    step = Step(
        dataset.observations,
        here,
        dataset.actions,
        dataset.rewards,
        dataset.next_observations,
        after,
        dataset.terminated,
    )
    replay = Replay(int(kept.sum()), played)
    replay.add(step if kept.all() else step.take(np.flatnonzero(kept)))
    return replay
