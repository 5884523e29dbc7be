"""Turn logs into transitions with a behaviour's proposals, and clone the behaviour of a log."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.mlp import Params
from safeshield.online.collector import OutsideSafeSetWarning
from safeshield.online.config import SSQLConfig
from safeshield.online.losses import CLONE
from safeshield.online.replay import Replay, Step
from safeshield.online.safe_proposals import MaskedUniform, SafeBehaviour, SafeProposals
from safeshield.online.safe_sets import LoggedRules, SafeRules
from safeshield.online.updates import SSQLModel, SSQLUpdates

Array = npt.NDArray[Any]
_CHUNK = 4096


def replay_of_log(
    dataset: OfflineDataset, mu: SafeBehaviour, samples: int, rng: np.random.Generator
) -> Replay:
    """Return the transitions of a log, with the behaviour's proposals in both of their states.

    Where rules admit no action in a state, the transitions from it, and those into it that do not
    terminate, are left out, with a warning.

    Args:
        dataset: The log.
        mu: The behaviour, restricted to the safe set.
        samples: Number of draws of mu in each state.
        rng: Generator of the draws.

    Raises:
        ValueError: No transition is left.
    """
    seen, rules = dataset.flat_observations, isinstance(mu.safe_set, SafeRules)
    if isinstance(mu.safe_set, SafeRules):
        mu = replace(mu, safe_set=LoggedRules(mu.safe_set))
    if isinstance(mu.behaviour, MaskedUniform):
        mu = replace(mu, behaviour=mu.behaviour.of_a_log())

    def proposals(rows: Array) -> SafeProposals:
        parts = [
            mu.propose(seen.batch(rows[i : i + _CHUNK]), samples, rng)
            for i in range(0, len(rows), _CHUNK)
        ]
        return SafeProposals(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    here = proposals(dataset.observations)
    # The state after a step is the state before the next one. Where an episode was cut off, the
    # behaviour is asked for proposals in its last state. Those in a terminal state are never read.
    after = here.take(np.minimum(np.arange(len(dataset)) + 1, len(dataset) - 1))
    cut = np.flatnonzero(dataset.truncated & ~dataset.terminated)
    if len(cut):
        after = after.replaced(cut, proposals(dataset.next_observations[cut]))
    if here.mass_outside.any():
        warnings.warn(
            f"{here.mass_outside.mean():.1%} of the behaviour's proposals in the log's states lie "
            "outside the safe set: they are never learned from",
            OutsideSafeSetWarning,
            stacklevel=3,
        )
    kept = np.ones(len(dataset), dtype=np.bool_)
    if rules:
        kept = ~here.no_safe_action & (dataset.terminated | ~after.no_safe_action)
    if not kept.all():
        if not kept.any():
            raise ValueError("the rules admit no action in any state of the log")
        warnings.warn(
            f"{(~kept).sum()} of the log's {len(kept)} transitions begin or end in states where "
            "the rules admit no action, and are left out",
            OutsideSafeSetWarning,
            stacklevel=3,
        )
    return _filled(dataset, here, after, kept)


def clone_of_log(
    dataset: OfflineDataset, model: SSQLModel, config: SSQLConfig, device: torch.device
) -> Params:
    """Return the weights of a clone of the log's behaviour, by maximum likelihood of its actions.

    Args:
        dataset: The log.
        model: Description of the agent's networks, of which one is the clone.
        config: Settings.
        device: Device on which the clone is trained.

    Raises:
        FloatingPointError: The cross-entropy became NaN or infinite.
    """
    codec, count = dataset.flat_actions, len(dataset)
    candidates, log_mu = dataset.actions[:, None], np.zeros((count, 0), np.float32)
    if codec.discrete:
        taken = codec.choice_index(candidates)
        log_mu = np.full((count, len(codec.choices)), -np.inf, np.float32)
        np.put_along_axis(log_mu, taken, 0.0, axis=1)
        candidates = candidates[:, :0]
    no = np.zeros(count, np.bool_)
    own = SafeProposals(candidates, log_mu, dataset.actions, no, np.zeros(count), no)
    replay = _filled(dataset, own, own, ~no)
    total = max(config.extraction_steps, 1)
    updates = SSQLUpdates(model, replay, config)
    update = updates.clone(total)
    generator = torch.Generator(device).manual_seed(config.seed)
    state = model.initial(generator)
    for _ in range(total):
        state, metrics = update(state, updates.draw(generator))
    if not torch.isfinite(metrics["clone/cross_entropy"]):
        raise FloatingPointError("cloning the log diverged: lower learning_rate")
    return state.networks[CLONE]


def _filled(
    dataset: OfflineDataset, here: SafeProposals, after: SafeProposals, kept: Array
) -> Replay:
    step = Step(
        dataset.observations, here.candidates, here.log_mu, dataset.actions, dataset.rewards,
        dataset.next_observations, after.candidates, after.log_mu, dataset.terminated,
    )  # fmt: skip
    replay = Replay(int(kept.sum()), dataset.flat_actions)
    replay.add(step if kept.all() else step.take(np.flatnonzero(kept)))
    return replay
