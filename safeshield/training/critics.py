"""Joint training of safety and reward critics, the first phase of several algorithms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from safeshield.calibration.margin import conformal_margin, missed_levels
from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number
from safeshield.files.tensors import content_digest
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import check_same_space
from safeshield.support.record import episodes_needed
from safeshield.training.agent import OfflineAgent, check_continuous
from safeshield.training.architecture import CRITICS, Architecture, Interface
from safeshield.training.checkpoint import flatten
from safeshield.training.config import LEAST_MARGIN, CriticConfig, ValueConfig
from safeshield.training.imitation import imitation_weights
from safeshield.training.log import (
    BEFORE_LABEL_MAGNITUDE,
    POOL,
    LogTensors,
    labelled,
    logged_returns,
    scale_of_returns,
)
from safeshield.training.loop import FitOptions
from safeshield.training.safety import SafetyLog, restored_safety, safety_header, safety_units
from safeshield.training.state import (
    CriticLoss,
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    critic_update,
    summed,
    together,
)
from safeshield.values.backup import RewardWindow, reward_windows, rows_of, window_ends
from safeshield.values.reward import VALUE as REWARD_VALUE
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics
from safeshield.values.units import action_value

MARGIN = "margin"
"""Name of the measured margin among the statistics of a training state."""
_VALUES = (*VALUE_NETWORKS, REWARD_VALUE)
_ALPHA = 0.1
"""Bound on the probability that a new episode misses the measured margin."""
ConfigT = TypeVar("ConfigT", bound=ValueConfig)
ModelT = TypeVar("ModelT", bound="CriticArchitecture")


@dataclass(frozen=True)
class Critics:
    """Descriptions of the safety and the reward critics, in the units of one log."""

    safety: SafetyCritics
    """Description of the safety critics."""
    reward: RewardCritics
    """Description of the reward critics."""

    @classmethod
    def restore(cls, header: dict[str, Any], scaling: Scaling, config: ValueConfig) -> Critics:
        """Return the critics whose units are in a file's header, or come from a log.

        Args:
            header: Entries of the file's header.
            scaling: Scaling of observations and actions.
            config: Settings of the critics.

        Raises:
            KeyError, TypeError, ValueError: An entry of the header is missing or damaged.
        """
        safety = restored_safety(header, scaling, config)
        mean, spread = (float(x) for x in header["reward_scale"])
        return cls(safety, RewardCritics(*scaling.widths, config.critic_hidden, mean, spread))

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return all networks by name."""
        return {**self.safety.parts(), **self.reward.parts()}


@dataclass(frozen=True)
class CriticArchitecture(Architecture):
    """Safety and reward critics that are trained together, and the networks of an actor."""

    critics: Critics

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """Return the safety and the reward critics by name (see `Architecture`)."""
        return self.critics.parts()

    def scales(self) -> dict[str, float]:
        """Return the initial unit of the reward advantages (see `Architecture`)."""
        return {"reward": self.critics.reward.spread}

    def header(self) -> dict[str, Any]:
        """Return the units of the critics, as JSON values (see `Architecture`)."""
        reward = self.critics.reward
        scale = [reward.offset, reward.spread]
        return {**safety_header(self.critics.safety), "reward_scale": scale}


class CriticAgent(OfflineAgent[ConfigT, ModelT]):
    """Base class of agents that learn safety and reward critics first, then an actor from them.

    An algorithm returns the networks of its actor from `_parts` and trains them in its `Run`. An
    algorithm with another `model_type`, whose architecture has more fields, overrides
    `_architecture`.
    """

    model_type: ClassVar[type[Any]] = CriticArchitecture
    _before: ClassVar[dict[str, Any]] = BEFORE_LABEL_MAGNITUDE

    @property
    def measured_margin(self) -> float | None:
        """The margin that was measured on the log, in units of h; None with a given `margin`.

        The margin in use is never below that of the default number (`ValueConfig.margin`).

        Raises:
            RuntimeError: The agent has not been trained.
        """
        return self._fitted().critics.safety.margin

    def _architecture(self, interface: Interface, critics: Critics) -> ModelT:
        """Return the whole architecture with these critics."""
        model: ModelT = self.model_type(*interface, self._parts(interface.scaling), critics)
        return model

    def _fit_actor(
        self,
        dataset: OfflineDataset,
        steps: int,
        critics: CriticAgent[Any, Any],
        share: float,
        **options: Any,  # noqa: ANN401 - the other arguments of OfflineAgent.fit
    ) -> Self:
        """Train all phases but the critics' on a log, with the critics of a trained agent.

        The critics, their units and the scaling are taken from `critics` and do not change. The
        phases are those of a `fit` with ``steps / (1 - share)`` updates.

        Args:
            dataset: Log of whole episodes, with the spaces of `critics`.
            steps: Number of updates of these phases together.
            critics: The trained agent.
            share: Share of the updates that `fit` gives to the critics.
            options: The other arguments of `OfflineAgent.fit`.

        Raises:
            TypeError, ValueError: As in `fit`, or the log has other spaces than `critics`.
        """
        chosen = FitOptions(steps, max(self._fewest_steps - 1, 1), **options)
        taught, dataset = critics._fitted(), self._check_log(dataset)
        repair = "use the log that the agent learned from, or one of the same environment"
        for name in ("observation_space", "action_space"):
            own, other = getattr(taught, name), getattr(dataset, name)
            check_same_space(own, other, f"{name} of the log", repair=repair)
        model = self._architecture(taught.interface, taught.critics)
        log = LogTensors.of(dataset, model.scaling, self.device)
        kept = {name: critics._networks[name] for name in model.slow()}
        total = max(round(chosen.steps / (1.0 - share)), self._fewest_steps)
        run = self._run(model, log, total)
        phases = [one for one in run.phases() if not one.name.startswith(CRITICS)]

        def initial(generator: torch.Generator) -> TrainState:
            state = run.initial(generator)
            return state._replace(networks={**state.networks, **kept}, targets=kept)

        weights = {name: array.cpu().numpy() for name, array in flatten(kept).items()}
        name = f"{type(self).__name__} on the critics {content_digest({}, weights)[:12]}"
        return self._learn(model, log, phases, initial, dataset, chosen, name)

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        return labelled(dataset, self.config.label_magnitude)

    def _units(self, dataset: OfflineDataset, scaling: Scaling) -> dict[str, Any]:
        scale = scale_of_returns(logged_returns(dataset, self.config.discount))
        return {**safety_units(dataset), "reward_scale": list(scale)}

    def _build(self, interface: Interface, units: dict[str, Any]) -> ModelT:
        check_continuous(interface.action_space, type(self).__name__)
        return self._architecture(interface, Critics.restore(units, interface.scaling, self.config))

    def _settle(self, model: ModelT, log: LogTensors, state: TrainState) -> ModelT:
        if MARGIN not in state.scales:
            return model
        critics = model.critics
        safety = replace(critics.safety, margin=float(state.scales[MARGIN]))
        return replace(model, critics=replace(critics, safety=safety))

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        for number in header["reward_scale"]:
            finite_number(number, "reward_scale")
        return super()._restore(interface, header)


def _with_margin(state: TrainState, margin: float) -> TrainState:
    """Return a training state with this measured margin."""
    number = torch.tensor(margin, device=state.boundary_rows.device)
    return state._replace(scales={**state.scales, MARGIN: number})


def measured_margin(safety: SafetyCritics, networks: Networks, log: LogTensors) -> float:
    """Return the margin of `calibration.margin` for safety critics and the episodes of a log.

    The states of the log have their labels as h.

    It is 0, with a warning, where the log has too few episodes.

    Args:
        safety: Description of the safety critics.
        networks: Their weights.
        log: The log.
    """
    last = np.unique(log.episode_last.cpu().numpy())
    if len(last) < (needed := episodes_needed(_ALPHA)):
        warnings.warn(
            f"margin={LEAST_MARGIN} is used in place of 'auto': the log has {len(last)} episodes, "
            f"and a measured margin needs {needed}",
            stacklevel=2,
        )
        return 0.0
    values, after, action_values = [], [], []
    with torch.no_grad():
        for first in range(0, len(log), POOL):
            part = slice(first, first + POOL)
            seen, actions = log.observations[part], log.actions[part]
            here = safety.log_value(networks, seen, log.constraints[part])
            worst = safety.advantages(networks, seen, actions).amax(0)
            there = log.next_observations[part]
            after.append(safety.log_value(networks, there, log.next_constraints[part]))
            values.append(here)
            action_values.append(action_value(safety.scale, here, worst))
    columns = [
        torch.cat(parts).cpu().numpy().astype(np.float64)
        for parts in (values, after, action_values)
    ]
    starts = np.append(0, last[:-1] + 1)
    return conformal_margin(missed_levels(columns[0], columns[1], columns[2], starts), _ALPHA)


@dataclass(eq=False)
class RewardLog:
    """Batches and losses of the reward critics on one log."""

    critics: RewardCritics
    """Description of the reward critics."""
    log: LogTensors
    """Log that is learned from."""
    discount: float
    """Discount factor of the rewards."""
    expectile: float
    """Weight on targets above V."""
    unit: str
    """Name of the running statistic that is the unit of the advantages."""
    _kept: tuple[int, RewardWindow] | None = field(default=None, init=False)
    """Length and windows of the current stage."""

    def loss(
        self, state: TrainState, rows: Tensor, steps: int, allowed: Tensor | None = None
    ) -> CriticLoss:
        """Return the loss of the reward critics on a batch.

        Args:
            state: Training state with the slow copies and the unit of the advantages.
            rows: (batch,) rows of the log.
            steps: Length of the windows to which V is fitted, in steps; with 1, V is fitted to Q_r.
            allowed: (batch,) 1 where V is fitted to the action, else 0; None means all actions.
        """
        return reward_loss(
            self.critics,
            self.unit,
            state,
            self._batch(rows, steps, allowed),
            discount=self.discount,
            expectile=self.expectile,
            one_step=steps == 1,
        )

    def _batch(self, rows: Tensor, steps: int, allowed: Tensor | None) -> RewardBatch:
        log = self.log
        if self._kept is None or self._kept[0] != steps:
            windows = reward_windows(
                log.rewards, log.terminated, log.episode_last, self.discount, steps
            )
            self._kept = (steps, windows)
        end = window_ends(log.episode_last, rows, steps)
        return RewardBatch(
            observations=log.observations[rows],
            actions=log.actions[rows],
            next_observations=log.next_observations[rows],
            rewards=log.rewards[rows],
            terminated=log.terminated[rows],
            window=rows_of(self._kept[1], rows),
            window_observations=log.next_observations[end],
            allowed=allowed,
        )


def reward_loss(
    critics: RewardCritics,
    unit: str,
    state: TrainState,
    batch: RewardBatch,
    **options: Any,  # noqa: ANN401 - see RewardCritics.losses
) -> CriticLoss:
    """Return the loss of reward critics on a batch, which also computes the unit of the advantages.

    Args:
        critics: Description of the reward critics.
        unit: Name of the running statistic that is the unit of the advantages.
        state: Training state with the slow copies and that statistic.
        batch: Logged steps and windows.
        options: Further arguments of `RewardCritics.losses`.
    """

    def loss(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
        value, newest, metrics = critics.losses(
            networks, state.targets, batch, state.scales[unit], **options
        )
        return value, metrics, {unit: newest}

    return loss


@dataclass(eq=False)
class CriticsRun:
    """The critics' updates in one call of `fit`."""

    critics: Critics
    """Description of the critics."""
    log: LogTensors
    """Log that is learned from."""
    config: CriticConfig
    """Settings of the critics."""
    total: int
    """Total number of updates."""

    def __post_init__(self) -> None:
        config, critics = self.config, self.critics
        self.safety = SafetyLog(critics.safety, self.log, config)
        self._reward = RewardLog(
            critics.reward, self.log, config.discount, config.reward_expectile, "reward"
        )

    def phases(
        self, name: str = CRITICS, beside: Callable[[int], Update] | None = None
    ) -> list[Phase]:
        """Return the phases in order; see `SafetyLog.phases`.

        Args:
            name: Name of the phases.
            beside: Function from the current length of the reward windows to a further update,
                which is made after each of the critics' updates.
        """

        def update(safety_steps: int, reward_steps: int) -> Update:
            critics = self.update(safety_steps, reward_steps)
            return critics if beside is None else together(critics, beside(reward_steps))

        return self.safety.phases(name, self.total, update, self.config.reward_backup_steps)

    def update(self, safety_steps: int, reward_steps: int) -> Update:
        """Return one update of all critics, for given lengths of the windows of the targets.

        Args:
            safety_steps: Number of steps of a safety window.
            reward_steps: Number of steps of a reward window.
        """
        config = self.config

        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            rows = draw.rows
            allowed = self._allowed(state.targets, rows) if config.safe_reward_value else None
            return summed(
                self.safety.loss(state, rows, safety_steps),
                self._reward.loss(state, rows, reward_steps, allowed),
            )

        return critic_update(
            CRITICS, losses, tuple(self.critics.parts()), _VALUES, config, self.total
        )

    @property
    def margin(self) -> float:
        """Distance from the boundary at which an action counts as unsafe, in units of h.

        Where it is measured, this is the margin of the critics' own phase; see `gate`.
        """
        return self.config.margin_of(self.critics.safety)

    def gate(self, state: TrainState) -> float | Tensor:
        """Return the margin of the actor's losses, in units of h.

        Where the margin is measured, this is the larger of `margin` and the measured one of
        `state`.
        """
        measured = state.scales.get(MARGIN)
        return self.margin if measured is None else measured.clamp(min=self.margin)

    def prepared(self, state: TrainState) -> TrainState:
        """Return the initial `state` of a run, with a margin of 0 where it will be measured."""
        if self.config.margin != "auto":
            return state
        return _with_margin(state, 0.0)

    @property
    def measure(self) -> Callable[[TrainState, torch.Generator], TrainState] | None:
        """Function that measures the margin with the critics of a state, and adds it to the state.

        It is the `refresh` of the first phase after the critics; None where the margin is a number.
        """
        return self._measured if self.config.margin == "auto" else None

    def _measured(self, state: TrainState, generator: torch.Generator) -> TrainState:
        measured = measured_margin(self.critics.safety, state.targets, self.log)
        return _with_margin(state, measured)

    def imitation(
        self, *, reward_temperature: float, safety_temperature: float
    ) -> Callable[[TrainState, Tensor], Tensor]:
        """Return a function from a state and rows (batch,) of the log to imitation weights.

        Args:
            reward_temperature: Inverse temperature b_r of `imitation_weights`.
            safety_temperature: Inverse temperature b_h of `imitation_weights`.
        """

        def weigh(state: TrainState, rows: Tensor) -> Tensor:
            with torch.no_grad():
                return imitation_weights(
                    self.critics.safety,
                    self.critics.reward,
                    state.targets,
                    self.log.observations[rows],
                    self.log.actions[rows],
                    self.gate(state),
                    reward_temperature=reward_temperature,
                    safety_temperature=safety_temperature,
                )

        return weigh

    def _allowed(self, critics: Networks, rows: Tensor) -> Tensor:
        """Mark the logged actions that are safe by the margin, (batch,).

        In states that are not safe by the margin themselves, all actions are marked.
        """
        safety = self.critics.safety
        with torch.no_grad():
            observations, actions = self.log.observations[rows], self.log.actions[rows]
            here = safety.value(critics, observations)
            worst = safety.advantages(critics, observations, actions).amax(0)
            passes = here + safety.scale.step_rms * worst < -self.margin
            return (passes | (here >= -self.margin)).float()
