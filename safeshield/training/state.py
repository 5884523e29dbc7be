"""The state of a run, and the pure updates that move it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeshield.nn.mlp import Networks
from safeshield.nn.optim import AdamState, adam

Metrics = dict[str, Tensor]


class TrainState(NamedTuple):
    """Everything that an update reads and writes."""

    networks: Networks
    """What is trained."""
    targets: Networks
    """Slow copies of some of them."""
    moments: dict[str, AdamState]
    """Adam's moments, by phase."""
    scales: dict[str, Tensor]
    """Statistics that go along: running ones, () each; what was read off the log, (N,)."""
    boundary_rows: Tensor
    """(M,) int64: the transitions nearest to the learned boundary, drawn more often."""


class Draw(NamedTuple):
    """What one update uses: all its randomness, drawn outside."""

    rows: Tensor
    """(batch,) int64 indices of transitions."""
    noise: Tensor
    """(batch, act) standard normal; (batch, latent) where a policy has a latent space."""
    time: Tensor
    """(batch, 1) uniform in [0, 1]."""


Update = Callable[[TrainState, Draw], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one update."""

    name: str
    steps: int
    update: Update
    batch_size: int
    near_share: float = 0.0
    """Share of each batch that is drawn from `TrainState.boundary_rows`."""
    refresh: Callable[[TrainState, torch.Generator], TrainState] | None = None
    """Called every `refresh_every` steps: re-reads the log with the current networks."""
    refresh_every: int = 250
    report: Callable[[TrainState, Draw], Metrics] | None = None
    """What to log besides, asked only when numbers are written down."""


def together(*updates: Update) -> Update:
    """Return one update that makes several in order, from the same draw."""

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        for part in updates:
            state, more = part(state, draw)
            metrics |= more
        return state, metrics

    return update


def learning_rate(base: float, count: Tensor, steps: int, end: float = 1.0) -> Tensor:
    """Constant until half of ``end * steps``, then linearly down to a fiftieth at that point.

    Args:
        base: the rate at the start.
        count: () updates made.
        steps: updates in all.
        end: share of them after which the rate stays at its lowest.
    """
    progress = count / (steps * end)
    return base * torch.clamp(2.0 - 2.0 * progress, 0.02, 1.0)


def descend(
    state: TrainState,
    phase: str,
    names: tuple[str, ...],
    loss: Callable[[Networks], tuple[Tensor, Metrics]],
    rates: Mapping[str, Tensor],
) -> tuple[TrainState, Metrics]:
    """One Adam step on `loss` for the networks called `names`; everything else is held fixed.

    Args:
        state: what is known so far; not changed.
        phase: whose moments to use.
        names: networks to update.
        loss: from all networks to a () loss and metrics.
        rates: learning rate of each of them.
    """
    leaves = {
        name: {key: tensor.detach().requires_grad_() for key, tensor in params.items()}
        for name, params in state.networks.items()
        if name in names
    }
    value, metrics = loss({**state.networks, **leaves})
    flat = [tensor for params in leaves.values() for tensor in params.values()]
    gradients = list(torch.autograd.grad(value, flat))
    with torch.no_grad():
        plain = {name: state.networks[name] for name in leaves}
        steps = [rates[name] for name, params in plain.items() for _ in params]
        updated, moments = adam(plain, gradients, state.moments[phase], steps)
    return (
        state._replace(
            networks={**state.networks, **updated}, moments={**state.moments, phase: moments}
        ),
        metrics,
    )
