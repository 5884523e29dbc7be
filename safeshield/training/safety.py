"""Batches of a log for the safety critics, and the description of these critics in its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number
from safeshield.nn.mlp import Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import SafetyConfig
from safeshield.training.escape import Escape
from safeshield.training.log import POOL, LogTensors, safety_scale
from safeshield.training.schedule import stages
from safeshield.training.state import CriticLoss, Metrics, Phase, TrainState, Update
from safeshield.values.backup import SafetyWindow, rows_of, safety_windows, window_ends
from safeshield.values.safety import SafetyBatch, SafetyCritics
from safeshield.values.units import SafetyScale


@dataclass(eq=False)
class SafetyLog:
    """Batches, losses and phases of the safety critics on one log."""

    critics: SafetyCritics
    log: LogTensors
    config: SafetyConfig
    discrete: bool = False
    """Whether the actions are discrete, on which the default expectile depends."""
    escape: Escape | None = None
    """Actions of the backup controller whose value V_h is; None: the log's best actions."""
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
        end = window_ends(self._last, rows, steps)
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
            escape=None if self.escape is None else self.escape.batch(rows),
        )

    @property
    def _last(self) -> Tensor:
        """(N,) index of the transition at which the windows from each transition end at last."""
        return self.log.episode_last if self.escape is None else self.escape.last

    def _windows(self, steps: int, extra: Tensor | None) -> SafetyWindow:
        if self._kept is None or self._kept[0] != steps or self._kept[1] is not extra:
            log = self.log
            windows = safety_windows(
                log.constraints,
                log.next_constraints,
                log.terminated,
                self._last,
                self.critics.discount,
                steps,
                extra,
            )
            self._kept = (steps, extra, windows)
        return self._kept[2]

    def loss(
        self, state: TrainState, rows: Tensor, steps: int, extra: Tensor | None = None
    ) -> CriticLoss:
        """Return the loss of the safety critics on a batch.

        Args:
            state: Training state with the slow copies.
            rows: (batch,) rows of the log.
            steps: Length of the windows to which V is fitted, in steps; with 1, V is fitted to Q_h.
            extra: (N,) further constraint of each transition, in units of h.
        """
        batch, expectile = self.batch(rows, steps, extra), self.config.safety_expectile
        if expectile is None and self.escape is not None:
            expectile = 0.1
        elif expectile is None:
            expectile = 0.99 if self.discrete else 0.9

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
        size = min(POOL, len(self.log))
        rows = torch.randint(len(self.log), (size,), generator=generator, device=generator.device)
        with torch.no_grad():
            value = self.critics.value(state.targets, self.log.observations[rows])
        kept = max(1, size // 8)
        nearest = value.abs().topk(kept, largest=False).indices
        return state._replace(boundary_rows=rows[nearest])

    def phase(self, name: str, steps: int, update: Update, refresh_every: int = 250) -> Phase:
        """Return a phase whose batches hold more transitions near the learned boundary V_h = 0.

        Args:
            name: Name of the phase.
            steps: Number of updates.
            update: Update that the phase repeats.
            refresh_every: Number of updates after which the boundary is found again.
        """
        size, near = self.config.batch_size, self.config.near_share
        return Phase(name, steps, update, size, near, self.refresh, refresh_every)

    def phases(
        self, name: str, total: int, update: Callable[..., Update], *windows: tuple[int, ...]
    ) -> list[Phase]:
        """Return the phases of the critics. The windows of their targets get shorter in stages.

        Args:
            name: Name of the phases, to which their numbers are added.
            total: Total number of updates.
            update: Function from the current length of the safety windows, and the current entry of
                each of `windows`, to the update.
            windows: Further lists of lengths, in steps.
        """
        lengths = stages(total, self.config.safety_backup_steps, *windows)
        return [
            self.phase(f"{name} {i + 1}", count, update(*current))
            for i, (count, *current) in enumerate(lengths)
        ]


def safety_units(dataset: OfflineDataset) -> dict[str, Any]:
    """Return the units of safety critics for a log, in the form of `safety_header`."""
    scale = safety_scale(dataset).to_json()
    return {"safety_scale": scale, "constraint_kind": dataset.constraint_kind}


def safety_header(critics: SafetyCritics) -> dict[str, Any]:
    """Return the units of safety critics as JSON, for a file's header."""
    return {
        **({} if critics.margin is None else {"margin": critics.margin}),
        "safety_scale": critics.scale.to_json(),
        "constraint_kind": "continuous" if critics.continuous else "binary",
    }


def restored_safety(
    header: dict[str, Any], scaling: Scaling, config: SafetyConfig
) -> SafetyCritics:
    """Return the safety critics whose units are in a file's header, or come from `safety_units`.

    Args:
        header: Entries of the file's header.
        scaling: Scaling of observations and actions.
        config: Settings of the critics.

    Raises:
        KeyError, TypeError, ValueError: An entry of the header is missing or damaged.
    """
    scale = SafetyScale.from_json(header["safety_scale"])
    # Older files lack this entry, because their agents did not need it.
    kind = header.get("constraint_kind", "continuous")
    if kind not in ("continuous", "binary"):
        raise ValueError(f"constraint_kind must be 'continuous' or 'binary', got {kind!r:.20}")
    discount = config.safety_discount
    if discount is None:
        discount = 0.997 if kind == "continuous" else 0.99
    return SafetyCritics(
        *scaling.widths,
        config.critic_hidden,
        scale,
        continuous=kind == "continuous",
        discount=discount,
        margin=finite_number(header["margin"], "margin") if "margin" in header else None,
    )
