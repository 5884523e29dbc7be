"""The state of a run, and the pure updates that move it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from safeshield.nn.mlp import Networks, Params
from safeshield.nn.optim import AdamState, adam, adam_init, polyak
from safeshield.training.schedule import critic_rates, learning_rate

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


class Network(Protocol):
    """The description of one network."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight, by name."""

    def init(self, generator: torch.Generator) -> Params:
        """Draw all weights."""


def initial_state(
    parts: Mapping[str, Network],
    generator: torch.Generator,
    *,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    slow: tuple[str, ...] = (),
    scales: Mapping[str, float] | None = None,
) -> TrainState:
    """Draw all weights, in the order of `parts`, on the generator's device.

    Args:
        parts: every network.
        generator: where the weights come from.
        groups: which networks are trained together, by the name of their moments; None: each is
            trained by itself, under its own name.
        slow: networks of which a slow copy goes along.
        scales: running statistics, and where they begin.
    """
    networks = {name: part.init(generator) for name, part in parts.items()}
    groups = {name: (name,) for name in parts} if groups is None else groups
    device = generator.device
    return TrainState(
        networks=networks,
        targets={name: networks[name] for name in slow},
        moments={
            group: adam_init({name: networks[name] for name in names})
            for group, names in groups.items()
        },
        scales={
            name: torch.full((), value, device=device) for name, value in (scales or {}).items()
        },
        boundary_rows=torch.zeros(0, dtype=torch.int64, device=device),
    )


class Draw(NamedTuple):
    """What one update uses: all its randomness, drawn outside."""

    rows: Tensor
    """(batch,) int64 indices of transitions."""
    noise: Tensor
    """(batch, act) standard normal; (batch, latent) where a policy has a latent space."""
    time: Tensor
    """(batch, 1) uniform in [0, 1]."""


Update = Callable[[TrainState, Draw], tuple[TrainState, Metrics]]
Loss = Callable[[Networks], tuple[Tensor, Metrics]]
"""From all networks to a () loss and metrics."""
CriticLoss = Callable[[Networks], tuple[Tensor, Metrics, dict[str, Tensor]]]
"""A loss that also returns the newest values of running statistics, () by name."""


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


def descend(
    state: TrainState,
    phase: str,
    names: tuple[str, ...],
    loss: Loss,
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


def falling(
    name: str,
    loss: Callable[[TrainState, Draw], Loss],
    base: float,
    total: int,
    names: tuple[str, ...] | None = None,
) -> Update:
    """Return the update that descends a loss at a rate that falls (`schedule.learning_rate`).

    Args:
        name: of the moments to use, and of the one network that is trained.
        loss: from a state and a draw to what is descended.
        base: learning rate at the start.
        total: updates in all.
        names: of several networks that are trained instead.
    """
    trained = (name,) if names is None else names

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        rate = learning_rate(base, state.moments[name].updates, total)
        return descend(state, name, trained, loss(state, draw), dict.fromkeys(trained, rate))

    return update


def critic_update(
    name: str,
    loss: Callable[[TrainState, Draw], CriticLoss],
    names: tuple[str, ...],
    values: tuple[str, ...],
    *,
    base: float,
    total: int,
    share: float,
) -> Update:
    """Return the update of critics: descend, then move the slow copies and the statistics.

    Args:
        name: of the moments to use.
        loss: from a state and a draw to what is descended.
        names: of the networks that are trained.
        values: which of them are state values; they stand still for the last fifth.
        base: learning rate at the start.
        total: updates in all.
        share: by which all slow copies, and the statistics, move towards their newest values.
    """

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        critic_loss = loss(state, draw)
        newest: dict[str, Tensor] = {}

        def plain(networks: Networks) -> tuple[Tensor, Metrics]:
            value, metrics, statistics = critic_loss(networks)
            newest.update(statistics)
            return value, metrics

        rates = critic_rates(base, state.moments[name].updates, total, names, values)
        moved, metrics = descend(state, name, names, plain, rates)
        scales = {key: torch.lerp(state.scales[key], new, share) for key, new in newest.items()}
        return (
            moved._replace(
                targets=polyak(moved.targets, moved.networks, share),
                scales={**state.scales, **scales},
            ),
            metrics,
        )

    return update


def summed(*losses: CriticLoss) -> CriticLoss:
    """Return the sum of several losses."""

    def total(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
        value, metrics, newest = losses[0](networks)
        for loss in losses[1:]:
            part, more, statistics = loss(networks)
            value = value + part
            metrics, newest = {**metrics, **more}, {**newest, **statistics}
        return value, metrics, newest

    return total
