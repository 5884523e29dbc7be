"""Behaviour cloning of all episodes or of the safe ones, the usual baselines of offline safe RL.

    minimise  mean over (s, a) of the log  || mu(s) - a ||^2 / act,     a in [-1, 1]

These are BC-All and BC-Safe of DSRL (Liu et al. 2024) and OSRL, with one deterministic multilayer
perceptron. The option "safe" keeps the episodes whose summed cost is at most `cost_limit`. It
therefore uses the limit by which its results are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.settings import NonNegative, Sizes
from safeshield.nn.arrays import Float
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.scaling import Scaling
from safeshield.training.agent import OfflineAgent
from safeshield.training.architecture import Architecture
from safeshield.training.config import TrainingConfig
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.state import Draw, Loss, Metrics, Phase, TrainState

if TYPE_CHECKING:
    from safeshield.shield.export_policy import GraphNoise

ACTOR = "actor"


@dataclass(frozen=True)
class BehaviourCloningConfig(TrainingConfig):
    """Settings of behaviour cloning."""

    episodes: Literal["all", "safe"] = "all"
    """Episodes to imitate. "safe" means those whose summed cost is at most `cost_limit`."""
    cost_limit: NonNegative = 10.0
    """Largest summed cost of an imitated episode, in units of cost; used with episodes="safe" only.
    A smaller limit imitates fewer and safer episodes."""
    hidden: Sizes = (256, 256)
    """Widths of the actor's hidden layers. Wider layers fit the log more closely and train more
    slowly."""


@dataclass(eq=False)
class _Run(Run[Architecture, BehaviourCloningConfig]):
    """The single phase, which imitates all transitions."""

    def phases(self) -> list[Phase]:
        update = self.falling(ACTOR, self._loss, self.steps)
        return [Phase("cloning", self.steps, update, self.config.batch_size)]

    def _loss(self, state: TrainState, draw: Draw) -> Loss:
        observations, actions = self.log.observations[draw.rows], self.log.actions[draw.rows]

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            error = self.model.networks[ACTOR](networks[ACTOR], observations)[0] - actions
            value = error.square().mean()
            return value, {"actor/squared_error": value.detach()}

        return loss


@register("bc")
class BehaviourCloning(OfflineAgent[BehaviourCloningConfig, Architecture]):
    """Imitate all episodes of a log, or only those with a low cost.

    Args:
        config: Settings; see `BehaviourCloningConfig`.
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
    run_type = _Run

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

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        return {ACTOR: EnsembleMLP(*scaling.widths, self.config.hidden)}

    def _act(self, model: Architecture, observations: Float, deterministic: bool) -> Float:
        raw = model.networks[ACTOR](self._arrays[ACTOR], observations)[0]
        return np.asarray(np.clip(raw, -1.0, 1.0))

    def _act_on_graph(self, model: Architecture, observations: Any, noise: GraphNoise) -> Any:  # noqa: ANN401
        return model.networks[ACTOR](self._networks[ACTOR], observations)[0].clip(-1.0, 1.0)
