"""What every trainer of safety critics does alike: batches, stages, rates, and the behaviour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.flow import flow_matching_loss
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.log import LogTensors, safety_scale
from safeshield.training.state import (
    Draw,
    Metrics,
    TrainState,
    Update,
    descend,
    learning_rate,
)
from safeshield.values.backup import rows_of, safety_windows
from safeshield.values.safety import SafetyBatch, SafetyCritics

VALUES_END = 0.8
"""Share of the critics' updates after which V stands still while the advantages catch up."""
# The states nearest to V_h = 0 are sought among this many, and one in eight of them is kept.
_POOL, _KEPT = 65_536, 8_192


@dataclass(frozen=True, eq=False)
class SafetyLog:
    """A log as its safety critics draw from it."""

    critics: SafetyCritics
    log: LogTensors

    def batches(self, steps: int, extra: Tensor | None = None) -> Callable[[Tensor], SafetyBatch]:
        """Return what makes a batch of rows (batch,), with targets that reach `steps` ahead.

        Args:
            steps: length of the windows.
            extra: (N,) one more constraint of each transition, in units of h.
        """
        log = self.log
        windows = safety_windows(
            log.constraints,
            log.next_constraints,
            log.terminated,
            log.episode_last,
            self.critics.discount,
            steps,
            extra,
        )

        def batch(rows: Tensor) -> SafetyBatch:
            window = rows_of(windows, rows)
            return SafetyBatch(
                observations=log.observations[rows],
                actions=log.actions[rows],
                next_observations=log.next_observations[rows],
                constraints=log.constraints[rows],
                next_constraints=log.next_constraints[rows],
                terminated=log.terminated[rows],
                window=window,
                window_observations=log.next_observations[window.last],
                window_constraints=log.next_constraints[window.last],
                extra=None if extra is None else extra[rows],
            )

        return batch

    def refresh(self, state: TrainState, generator: torch.Generator) -> TrainState:
        """Find the transitions that start nearest to V_h = 0.

        Which states are drawn more often changes no fixed point: the expectile over actions is
        taken in each state by itself. It puts the networks' accuracy where it decides something.
        """
        size = min(_POOL, len(self.log))
        rows = torch.randint(len(self.log), (size,), generator=generator, device=generator.device)
        with torch.no_grad():
            value = self.critics.value(state.targets, self.log.observations[rows])
        kept = max(1, size * _KEPT // _POOL)
        nearest = value.abs().topk(kept, largest=False).indices
        return state._replace(boundary_rows=rows[nearest])


def safety_critics(
    dataset: OfflineDataset, scaling: Scaling, hidden: tuple[int, ...], discount: float | None
) -> SafetyCritics:
    """Describe safety critics in the units of a log.

    Args:
        dataset: the log.
        scaling: of its observations and actions.
        hidden: widths of the hidden layers.
        discount: of the safety backup, per step; None: 0.997 where labels are continuous, 0.99
            where they are binary, because there it sets how far ahead a violation is felt.
    """
    continuous = dataset.constraint_kind == "continuous"
    if discount is None:
        discount = 0.997 if continuous else 0.99
    return SafetyCritics(
        scaling.observation_features,
        scaling.action_features,
        hidden,
        safety_scale(dataset),
        continuous=continuous,
        discount=discount,
    )


def stages(steps: int, *windows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Cut `steps` updates wherever one of the lists moves on: (updates, an entry of each).

    >>> stages(8, (4, 1), (3, 2, 2, 1))
    [(2, 4, 3), (2, 4, 2), (2, 1, 2), (2, 1, 1)]
    """
    # Rounded up, so that the first step of part i counts as part i below.
    edges = sorted(
        {math.ceil(i * steps / len(window)) for window in windows for i in range(len(window) + 1)}
    )
    return [
        (stop - start, *(window[start * len(window) // steps] for window in windows))
        for start, stop in itertools.pairwise(edges)
    ]


def critic_rates(
    base: float, count: Tensor, total: int, names: tuple[str, ...], values: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return each network's learning rate: those of `values` stand still for the last fifth.

    Args:
        base: the rate at the start.
        count: () updates made.
        total: updates in all.
        names: of the networks.
        values: which of them are state values.
    """
    early = learning_rate(base, count, total, VALUES_END)
    still = torch.where(count < VALUES_END * total, early, torch.zeros_like(early))
    late = learning_rate(base, count, total)
    return {name: still if name in values else late for name in names}


def flow_update(
    name: str,
    network: EnsembleMLP,
    log: LogTensors,
    base: float,
    total: int,
    weigh: Callable[[TrainState, Tensor], Tensor] | None = None,
) -> Update:
    """Return the update that fits the log's behaviour by flow matching (`nn.flow`).

    Args:
        name: of the network in a training state.
        network: the velocity field.
        log: what to imitate.
        base: learning rate at the start.
        total: updates in all.
        weigh: from (state, rows) to how much these logged actions count, (batch,); all alike by
            default.
    """

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        observations, actions = log.observations[draw.rows], log.actions[draw.rows]
        weights = None if weigh is None else weigh(state, draw.rows)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            value = flow_matching_loss(
                network, networks[name], observations, actions, draw.noise, draw.time, weights
            )
            metrics = {f"{name}/flow_matching_loss": value.detach()}
            if weights is not None:
                metrics[f"{name}/mean_weight"] = weights.mean()
            return value, metrics

        rate = learning_rate(base, state.moments[name].updates, total)
        return descend(state, name, (name,), loss, {name: rate})

    return update
