"""The state of a training run, and pure functions that update it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from safeshield.nn import actor
from safeshield.nn.mlp import Networks, Params
from safeshield.nn.optim import AdamState, adam, adam_init, polyak
from safeshield.training.config import SafetyConfig
from safeshield.training.schedule import critic_rates, learning_rate

Metrics = dict[str, Tensor]


class TrainState(NamedTuple):
    """All data that an update reads and writes.

    Where several members are trained together (`training.many`), each tensor has a leading member
    axis, except `AdamState.updates`, which all members share.
    """

    networks: Networks
    """Weights of the trained networks, by name."""
    targets: Networks
    """Weights of the slow copies of some networks, by name."""
    moments: dict[str, AdamState]
    """Adam moments by the name of the group of networks that is trained together."""
    scales: dict[str, Tensor]
    """Statistics by name: running ones of shape (), and numbers computed from the log, (N,)."""
    boundary_rows: Tensor
    """(M,) int64 indices of the transitions nearest to V_h = 0, which are drawn more often."""


class Network(actor.Network, Protocol):
    """Description of one network that can be trained."""

    def init(self, generator: torch.Generator) -> Params:
        """Return weights by name that `generator` draws, on the device of `generator`."""


def initial_state(
    parts: Mapping[str, Network],
    generator: torch.Generator,
    *,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    slow: tuple[str, ...] = (),
    scales: Mapping[str, float] | None = None,
) -> TrainState:
    """Return the state before the first update.

    The weights are drawn in the order of `parts`, on the generator's device.

    Args:
        parts: All networks by name.
        generator: Source of the random weights.
        groups: Names of the networks that are trained together, by the name of their moments. None
            means that each network is trained separately, under its own name.
        slow: Names of the networks that have slow copies.
        scales: Initial values of the running statistics, by name.
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
    """All random numbers of one update, which are drawn outside of it.

    Where several members are trained together, each tensor has a leading member axis.
    """

    rows: Tensor
    """(batch,) int64 indices of the transitions of the batch."""
    noise: Tensor
    """(batch, features) standard normal. The algorithm sets the number of features, for example
    that of the action or of a latent space."""
    time: Tensor
    """(batch, 1) uniform in [0, 1]."""


Update = Callable[[TrainState, Draw], tuple[TrainState, Metrics]]
Loss = Callable[[Networks], tuple[Tensor, Metrics]]
"""Function from the weights of all networks to a () loss and metrics."""
CriticLoss = Callable[[Networks], tuple[Tensor, Metrics, dict[str, Tensor]]]
"""A loss function that also returns the newest values () of running statistics, by name."""
LossT = TypeVar("LossT", Loss, CriticLoss)


@dataclass(frozen=True)
class Phase:
    """A part of training that repeats one update."""

    name: str
    """Name of the phase."""
    steps: int
    """Number of updates."""
    update: Update
    """Update that is repeated."""
    batch_size: int
    """Number of transitions of a batch."""
    near_share: float = 0.0
    """Share of each batch that is drawn from `TrainState.boundary_rows`."""
    refresh: Callable[[TrainState, torch.Generator], TrainState] | None = None
    """Function that evaluates the log with the current networks, called every `refresh_every`
    updates."""
    refresh_every: int = 250
    """Number of updates between two calls of `refresh`."""
    report: Callable[[TrainState, Draw], Metrics] | None = None
    """Function that returns further metrics. It is called only when metrics are written."""
    capturable: bool = True
    """Whether the update always makes the same operations on tensors of the device, so that on a
    GPU a graph can repeat them (`training.captured`). False for an update that reads numbers from
    the device, or arrays that are not on it."""


def together(*updates: Update) -> Update:
    """Return an update that runs several updates in order, with the same random numbers."""

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        for part in updates:
            state, more = part(state, draw)
            metrics |= more
        return state, metrics

    return update


def of_batch(loss: Callable[[TrainState, Draw], LossT], state: TrainState, draw: Draw) -> LossT:
    """Return the loss function of the weights on one batch.

    Where `state` and `draw` have a member axis, each member has its own batch. The loss is then the
    sum over the members, whose gradient in the weights of a member is that of its own loss, and
    metrics and statistics have a member axis.

    Args:
        loss: Function from a state and random numbers, both of one member, to the loss function.
        state: State, whose moments the loss does not read.
        draw: Random numbers.
    """
    if draw.rows.dim() == 1:
        return loss(state, draw)

    def total(networks: Networks) -> tuple[Any, ...]:
        def one(state: TrainState, draw: Draw, networks: Networks) -> tuple[Any, ...]:
            return loss(state, draw)(networks)

        value, *others = torch.vmap(one)(state._replace(moments={}), draw, networks)
        return value.sum(), *others

    return cast("LossT", total)


def descend(
    state: TrainState,
    phase: str,
    names: tuple[str, ...],
    loss: Loss,
    rates: Mapping[str, Tensor],
) -> tuple[TrainState, Metrics]:
    """Make one Adam step on `loss` for the networks `names`, and return the new state and metrics.

    Args:
        state: State before the step, which is not changed.
        phase: Name of the Adam moments.
        names: Names of the networks to update; all others are constant.
        loss: Function from all networks to a () loss and metrics.
        rates: Learning rate of each of these networks, by name.
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
    """Return the update that minimises a loss at a falling learning rate.

    The rate is that of `schedule.learning_rate`.

    Args:
        name: Name of the Adam moments and, unless `names` is given, of the trained network.
        loss: Function from a state and random numbers to the loss function.
        base: Learning rate at the start.
        total: Total number of updates.
        names: Names of the trained networks, where there are several.
    """
    trained = (name,) if names is None else names

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        rate = learning_rate(base, state.moments[name].updates, total)
        steps = dict.fromkeys(trained, rate)
        return descend(state, name, trained, of_batch(loss, state, draw), steps)

    return update


def critic_update(
    name: str,
    loss: Callable[[TrainState, Draw], CriticLoss],
    names: tuple[str, ...],
    values: tuple[str, ...],
    config: SafetyConfig,
    total: int,
) -> Update:
    """Return the update of critics, which also moves their slow copies and the statistics.

    Args:
        name: Name of the Adam moments.
        loss: Function from a state and random numbers to the loss function.
        names: Names of the trained networks.
        values: Names of the state values among them, which are fixed in the last fifth of updates.
        config: Settings, of which the learning rate and `polyak` are used.
        total: Total number of updates.
    """
    share = config.polyak

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        critic_loss = of_batch(loss, state, draw)
        newest: dict[str, Tensor] = {}

        def plain(networks: Networks) -> tuple[Tensor, Metrics]:
            value, metrics, statistics = critic_loss(networks)
            newest.update(statistics)
            return value, metrics

        rates = critic_rates(
            config.learning_rate, state.moments[name].updates, total, names, values
        )
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
    """Return the sum of several losses, with the metrics and statistics of all."""

    def total(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
        value, metrics, newest = losses[0](networks)
        for loss in losses[1:]:
            part, more, statistics = loss(networks)
            value = value + part
            metrics, newest = {**metrics, **more}, {**newest, **statistics}
        return value, metrics, newest

    return total
