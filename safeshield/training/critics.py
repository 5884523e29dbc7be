"""Joint training of safety and reward critics, the first phase of several algorithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.agent import OfflineAgent, check_continuous
from safeshield.training.architecture import CRITICS, Architecture, Interface, interface_of
from safeshield.training.config import CriticConfig, ValueConfig
from safeshield.training.imitation import imitation_weights
from safeshield.training.log import LogTensors, check_boundary, logged_returns, scale_of_returns
from safeshield.training.safety import SafetyLog, restored_safety, safety_critics, safety_header
from safeshield.training.schedule import stages
from safeshield.training.state import (
    CriticLoss,
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    critic_update,
    summed,
)
from safeshield.values.backup import RewardWindow, reward_windows, rows_of, window_ends
from safeshield.values.reward import VALUE as REWARD_VALUE
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics

_VALUES = (*VALUE_NETWORKS, REWARD_VALUE)
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
    def of(cls, dataset: OfflineDataset, scaling: Scaling, config: ValueConfig) -> Critics:
        """Return critics whose units are computed from a log.

        Args:
            dataset: The log.
            scaling: Scaling of its observations and actions.
            config: Settings of the critics.
        """
        hidden, returns = config.critic_hidden, logged_returns(dataset, config.discount)
        return cls(
            safety_critics(dataset, scaling, hidden, config.safety_discount),
            RewardCritics(*scaling.widths, hidden, *scale_of_returns(returns)),
        )

    @classmethod
    def restore(cls, header: dict[str, Any], scaling: Scaling, config: ValueConfig) -> Critics:
        """Return the critics whose units `header` wrote to a file's header.

        Args:
            header: Entries of the file's header.
            scaling: Scaling of observations and actions.
            config: Settings of the critics.

        Raises:
            KeyError, TypeError, ValueError: An entry of the header is missing or damaged.
        """
        safety = restored_safety(header, scaling, config.critic_hidden)
        mean, spread = (finite_number(x, "reward_scale") for x in header["reward_scale"])
        return cls(safety, RewardCritics(*scaling.widths, config.critic_hidden, mean, spread))

    def header(self) -> dict[str, Any]:
        """Return the units as JSON values."""
        reward = [self.reward.offset, self.reward.spread]
        return {**safety_header(self.safety), "reward_scale": reward}

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
        return self.critics.header()


class CriticAgent(OfflineAgent[ConfigT, ModelT]):
    """Base class of agents that learn safety and reward critics first, then an actor from them.

    An algorithm returns the networks of its actor from `_parts` and trains them in its `Run`. An
    algorithm with another `model_type`, whose architecture has more fields, overrides
    `_architecture`.
    """

    model_type: ClassVar[type[Any]] = CriticArchitecture

    def _architecture(self, interface: Interface, critics: Critics) -> ModelT:
        """Return the whole architecture with these critics."""
        model: ModelT = self.model_type(*interface, self._parts(interface.scaling), critics)
        return model

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        check_boundary(dataset)
        return dataset

    def _describe(self, dataset: OfflineDataset) -> ModelT:
        check_continuous(dataset.action_space, type(self).__name__)
        interface = interface_of(dataset, Scaling.of(dataset))
        critics = Critics.of(dataset, interface.scaling, self.config)
        return self._architecture(interface, critics)

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        check_continuous(interface.action_space, type(self).__name__)
        critics = Critics.restore(header, interface.scaling, self.config)
        return self._architecture(interface, critics)


@dataclass(eq=False)
class RewardLog:
    """Batches and losses of the reward critics on one log."""

    critics: RewardCritics
    """Description of the reward critics."""
    log: LogTensors
    """Log that is learned from."""
    discount: float
    """Discount factor of the rewards."""
    unit: str
    """Name of the running statistic that is the unit of the advantages."""
    _kept: tuple[int, RewardWindow] | None = field(default=None, init=False)
    """Length and windows of the current stage."""

    def loss(
        self,
        state: TrainState,
        rows: Tensor,
        steps: int,
        expectile: float,
        allowed: Tensor | None = None,
    ) -> CriticLoss:
        """Return the loss of the reward critics on a batch.

        Args:
            state: Training state with the slow copies and the unit of the advantages.
            rows: (batch,) rows of the log.
            steps: Length of the windows to which V is fitted, in steps; with 1, V is fitted to Q_r.
            expectile: Weight on targets above V.
            allowed: (batch,) 1 where V is fitted to the action, else 0; None means all actions.
        """
        return reward_loss(
            self.critics,
            self.unit,
            state,
            self._batch(rows, steps),
            discount=self.discount,
            expectile=expectile,
            one_step=steps == 1,
            allowed=allowed,
        )

    def _batch(self, rows: Tensor, steps: int) -> RewardBatch:
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
        self._safety = SafetyLog(self.critics.safety, self.log)
        self._reward = RewardLog(self.critics.reward, self.log, self.config.discount, "reward")

    def phases(self) -> list[Phase]:
        """Return the phases of training in order. The targets' windows get shorter in stages."""
        return [
            self.phase(f"{CRITICS} {i + 1}", count, self.update(*windows))
            for i, (count, *windows) in enumerate(self.stages())
        ]

    def stages(self) -> list[tuple[int, ...]]:
        """Return the stages as (number of updates, safety window, reward window), in steps."""
        config = self.config
        return stages(self.total, config.safety_backup_steps, config.reward_backup_steps)

    def phase(self, name: str, steps: int, update: Update, refresh_every: int = 250) -> Phase:
        """Return a phase whose batches hold more transitions near the learned boundary V_h = 0.

        Args:
            name: Name of the phase.
            steps: Number of updates.
            update: Update that the phase repeats.
            refresh_every: Number of updates after which the boundary is found again.
        """
        size, near = self.config.batch_size, self.config.near_share
        return Phase(name, steps, update, size, near, self._safety.refresh, refresh_every)

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
                self._safety.loss(state, rows, safety_steps, config.safety_expectile),
                self._reward.loss(state, rows, reward_steps, config.reward_expectile, allowed),
            )

        return critic_update(
            CRITICS,
            losses,
            tuple(self.critics.parts()),
            _VALUES,
            base=config.learning_rate,
            total=self.total,
            share=config.polyak,
        )

    @property
    def margin(self) -> float:
        """Distance from the boundary at which an action counts as unsafe, in units of h."""
        return self.config.margin_of(self.critics.safety)

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
                    self.margin,
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
