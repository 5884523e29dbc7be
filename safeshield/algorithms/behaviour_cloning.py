"""Behaviour cloning, of all episodes or of the safe ones: the baselines of the field's tables.

    minimise  mean over (s, a) of the log  || mu(s) - a ||^2 / act,     a in [-1, 1]

(BC-All and BC-Safe of DSRL, Liu et al. 2024, and OSRL: one deterministic perceptron.) "safe" keeps
the episodes whose summed cost is at most `cost_limit`, so it knows the limit it is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import NonNegative, Positive, PositiveInt, Seed, Settings, Sizes
from safeshield.nn.forward import forward
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.agent import OfflineAgent, continuous_actions
from safeshield.training.critics import with_networks
from safeshield.training.log import LogTensors
from safeshield.training.registry import register
from safeshield.training.state import (
    Draw,
    Metrics,
    Phase,
    TrainState,
    descend,
    learning_rate,
)

ACTOR = "actor"


@dataclass(frozen=True)
class BehaviourCloningConfig(Settings):
    """Settings of behaviour cloning."""

    seed: Seed = 0
    """Seed of weights and batches."""
    episodes: Literal["all", "safe"] = "all"
    """Which episodes to imitate."""
    cost_limit: NonNegative = 10.0
    """With episodes="safe": the largest summed cost of an episode that is imitated."""
    hidden: Sizes = (256, 256)
    """Widths of the actor's hidden layers."""
    batch_size: PositiveInt = 256
    """Transitions in an update."""
    learning_rate: Positive = 1e-3
    """Adam's rate at the start; it falls to a fiftieth by the end."""


@dataclass(frozen=True)
class _Architecture:
    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box
    scaling: Scaling
    hidden: tuple[int, ...]

    @property
    def actor(self) -> EnsembleMLP:
        widths = self.scaling.observation_features, self.scaling.action_features
        return EnsembleMLP(*widths, self.hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        return {ACTOR: self.actor}

    def header(self) -> dict[str, Any]:
        return {}


@register("bc")
class BehaviourCloning(OfflineAgent[BehaviourCloningConfig, _Architecture]):
    """Imitate the episodes of a log.

    Args:
        config: settings; see `BehaviourCloningConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> config = BehaviourCloningConfig(episodes="safe", cost_limit=0.0, hidden=(16,))
    >>> agent = BehaviourCloning(config).fit(log, steps=30)
    >>> agent.predict(np.zeros((3, 2), np.float32))[0].shape
    (3, 2)
    """

    config_type = BehaviourCloningConfig
    file_format = "safeshield-behaviour-cloning"

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        if not isinstance(dataset, OfflineDataset):
            raise TypeError(f"dataset must be an OfflineDataset, got {type(dataset).__name__}")
        if self.config.episodes == "all":
            return dataset
        costs = dataset.episode_costs
        safe = np.flatnonzero(costs <= self.config.cost_limit)
        if not len(safe):
            raise ValueError(
                f"no episode costs at most cost_limit={self.config.cost_limit}; the cheapest of "
                f"{dataset.num_episodes} costs {costs.min():g}: raise cost_limit"
            )
        return dataset.select(safe)

    def _describe(self, dataset: OfflineDataset) -> _Architecture:
        return self._restore(
            dataset.observation_space, dataset.action_space, Scaling.of(dataset), {}
        )

    def _restore(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        scaling: Scaling,
        header: dict[str, Any],
    ) -> _Architecture:
        action = continuous_actions(action_space, "BehaviourCloning")
        return _Architecture(observation_space, action, scaling, self.config.hidden)

    def _run(self, model: _Architecture, log: LogTensors, steps: int) -> _Run:
        return _Run(model, log, self.config, steps)

    def _act(
        self, model: _Architecture, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        return np.asarray(np.clip(forward(self._arrays[ACTOR], observations)[0], -1.0, 1.0))


@dataclass(eq=False)
class _Run:
    model: _Architecture
    log: LogTensors
    config: BehaviourCloningConfig
    steps: int

    def initial(self, generator: torch.Generator) -> TrainState:
        near = torch.zeros(0, dtype=torch.int64, device=generator.device)
        return with_networks(TrainState({}, {}, {}, {}, near), self.model.parts(), generator)

    def phases(self) -> list[Phase]:
        return [Phase("cloning", self.steps, self._update, self.config.batch_size)]

    def _update(self, state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        observations, actions = self.log.observations[draw.rows], self.log.actions[draw.rows]

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            error = self.model.actor(networks[ACTOR], observations)[0] - actions
            value = error.square().mean()
            return value, {"actor/squared_error": value.detach()}

        count = state.moments[ACTOR].updates
        rate = learning_rate(self.config.learning_rate, count, self.steps)
        return descend(state, ACTOR, (ACTOR,), loss, {ACTOR: rate})
