"""What agents that begin with safety and reward critics have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import gymnasium as gym

from safeshield.data.dataset import OfflineDataset
from safeshield.spaces.scaling import Scaling
from safeshield.training.agent import Architecture, OfflineAgent, continuous_actions
from safeshield.training.config import ValueConfig
from safeshield.training.critics import Critics
from safeshield.training.log import check_boundary

ConfigT = TypeVar("ConfigT", bound=ValueConfig)
ModelT = TypeVar("ModelT", bound=Architecture)


class CriticAgent(OfflineAgent[ConfigT, ModelT]):
    """An agent whose architecture is its critics' and its actor's."""

    @abstractmethod
    def _architecture(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        scaling: Scaling,
        critics: Critics,
    ) -> ModelT:
        """Return the whole architecture around these critics."""

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        check_boundary(dataset)
        return dataset

    def _describe(self, dataset: OfflineDataset) -> ModelT:
        action = continuous_actions(dataset.action_space, type(self).__name__)
        scaling = Scaling.of(dataset)
        critics = Critics.of(dataset, scaling, self.config)
        return self._architecture(dataset.observation_space, action, scaling, critics)

    def _restore(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        scaling: Scaling,
        header: dict[str, Any],
    ) -> ModelT:
        action = continuous_actions(action_space, type(self).__name__)
        critics = Critics.restore(header, scaling, self.config)
        return self._architecture(observation_space, action, scaling, critics)
