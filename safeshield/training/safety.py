"""Batches of a log for the safety critics, and the description of these critics in its units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.mlp import Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.log import LogTensors, safety_scale
from safeshield.training.state import CriticLoss, Metrics, TrainState
from safeshield.values.backup import SafetyWindow, rows_of, safety_windows, window_ends
from safeshield.values.safety import SafetyBatch, SafetyCritics
from safeshield.values.units import SafetyScale

# The search for the states nearest to V_h = 0 examines at most _POOL states and keeps an eighth of
# them.
_POOL, _KEPT = 65_536, 8_192


@dataclass(eq=False)
class SafetyLog:
    """Batches and losses of the safety critics on one log."""

    critics: SafetyCritics
    log: LogTensors
    _kept: tuple[int, Tensor | None, SafetyWindow] | None = field(default=None, init=False)
    """Windows of the current stage. Those of all stages together would be as large as the log."""

    def batch(self, rows: Tensor, steps: int, extra: Tensor | None = None) -> SafetyBatch:
        """Return the transitions of these rows, with targets that cover `steps` steps.

        Args:
            rows: (batch,) rows of the log.
            steps: Length of the windows, in steps.
            extra: (N,) further constraint of each transition, in units of h.
        """
        log = self.log
        # The ends are computed for each batch, because all of them would be almost as large as the
        # windows.
        end = window_ends(log.episode_last, rows, steps)
        return SafetyBatch(
            observations=log.observations[rows],
            actions=log.actions[rows],
            next_observations=log.next_observations[rows],
            constraints=log.constraints[rows],
            next_constraints=log.next_constraints[rows],
            terminated=log.terminated[rows],
            window=rows_of(self._windows(steps, extra), rows),
            window_observations=log.next_observations[end],
            window_constraints=log.next_constraints[end],
            extra=None if extra is None else extra[rows],
        )

    def _windows(self, steps: int, extra: Tensor | None) -> SafetyWindow:
        if self._kept is None or self._kept[0] != steps or self._kept[1] is not extra:
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
            self._kept = (steps, extra, windows)
        return self._kept[2]

    def loss(
        self,
        state: TrainState,
        rows: Tensor,
        steps: int,
        expectile: float,
        extra: Tensor | None = None,
    ) -> CriticLoss:
        """Return the loss of the safety critics on a batch.

        Args:
            state: Training state with the slow copies.
            rows: (batch,) rows of the log.
            steps: Length of the windows to which V is fitted, in steps; with 1, V is fitted to Q_h.
            expectile: Weight on targets below V.
            extra: (N,) further constraint of each transition, in units of h.
        """
        batch = self.batch(rows, steps, extra)

        def loss(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
            value, metrics = self.critics.losses(
                networks, state.targets, batch, expectile=expectile, one_step=steps == 1
            )
            return value, metrics, {}

        return loss

    def refresh(self, state: TrainState, generator: torch.Generator) -> TrainState:
        """Return `state` with the rows of the transitions nearest to V_h = 0.

        They are an eighth of a random pool of the log, which `generator` draws.

        Drawing these states more often does not change the values at convergence, because the
        expectile over actions is taken separately in each state. It makes the networks more
        accurate near the boundary, where the sign of V_h is decided.
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
    """Return the description of safety critics in the units of a log.

    Args:
        dataset: Log.
        scaling: Scaling of its observations and actions.
        hidden: Widths of the hidden layers.
        discount: Discount factor of the safety backup, per step. None means 0.997 for continuous
            labels and 0.99 for binary ones, where the discount sets how many steps ahead a
            violation has an effect.
    """
    continuous = dataset.constraint_kind == "continuous"
    if discount is None:
        discount = 0.997 if continuous else 0.99
    return SafetyCritics(
        *scaling.widths,
        hidden,
        safety_scale(dataset),
        continuous=continuous,
        discount=discount,
    )


def safety_header(critics: SafetyCritics) -> dict[str, Any]:
    """Return the units of safety critics as JSON, for a file's header."""
    return {
        "safety_scale": critics.scale.to_json(),
        "constraint_kind": "continuous" if critics.continuous else "binary",
    }


def restored_safety(
    header: dict[str, Any], scaling: Scaling, hidden: tuple[int, ...]
) -> SafetyCritics:
    """Return the safety critics whose units `safety_header` wrote to a file's header.

    Args:
        header: Entries of the file's header.
        scaling: Scaling of observations and actions.
        hidden: Widths of the hidden layers.

    Raises:
        KeyError, TypeError, ValueError: An entry of the header is missing or damaged.
    """
    scale = SafetyScale.from_json(header["safety_scale"])
    # Older files lack this entry, because their agents did not need it.
    kind = header.get("constraint_kind", "continuous")
    if kind not in ("continuous", "binary"):
        raise ValueError(f"constraint_kind must be 'continuous' or 'binary', got {kind!r:.20}")
    return SafetyCritics(
        *scaling.widths,
        hidden,
        scale,
        continuous=kind == "continuous",
    )
