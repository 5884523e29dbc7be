"""A log as safety critics learn from it, and the critics in its units."""

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

# The states nearest to V_h = 0 are sought among this many, and one in eight of them is kept.
_POOL, _KEPT = 65_536, 8_192


@dataclass(eq=False)
class SafetyLog:
    """A log as its safety critics draw from it."""

    critics: SafetyCritics
    log: LogTensors
    _kept: tuple[int, Tensor | None, SafetyWindow] | None = field(default=None, init=False)
    """The windows of the present stage: those of all stages would be as large as the log."""

    def batch(self, rows: Tensor, steps: int, extra: Tensor | None = None) -> SafetyBatch:
        """Return the transitions of rows (batch,), with targets that reach `steps` ahead.

        Args:
            rows: of the log.
            steps: length of the windows.
            extra: (N,) one more constraint of each transition, in units of h.
        """
        log = self.log
        # Computed anew: kept, they would be almost as large as the windows.
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
        """Return the safety critics' loss on rows (batch,) of the log.

        Args:
            state: holds the slow copies.
            rows: of the log.
            steps: length of the windows that V is fitted to; 1: V is fitted to Q_h.
            expectile: weight on targets below V.
            extra: (N,) one more constraint of each transition, in units of h.
        """
        batch = self.batch(rows, steps, extra)

        def loss(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
            value, metrics = self.critics.losses(
                networks, state.targets, batch, expectile=expectile, one_step=steps == 1
            )
            return value, metrics, {}

        return loss

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
    """Rebuild what `safety_header` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is not there, or damaged.
    """
    scale = SafetyScale.from_json(header["safety_scale"])
    # Older files do not say, and did not need it.
    kind = header.get("constraint_kind", "continuous")
    if kind not in ("continuous", "binary"):
        raise ValueError(f"constraint_kind must be 'continuous' or 'binary', got {kind!r:.20}")
    return SafetyCritics(
        *scaling.widths,
        hidden,
        scale,
        continuous=kind == "continuous",
    )
