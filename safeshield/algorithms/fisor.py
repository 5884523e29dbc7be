r"""FISOR-style baseline: weighted behaviour cloning and the safest of N candidates.

The method follows Zheng et al., "Safe Offline Reinforcement Learning with Feasibility-Guided
Diffusion Model" (ICLR 2024). It trains in two phases on one log:

1. critics: the safety values V_h, Q_h and the reward values V_r, Q_r, the same as SafeFQL's;
2. actor: a flow (in the paper a diffusion model) that imitates the logged actions with the weights
   of `training.imitation`. These weights prefer good actions in feasible states and safe actions
   in the others.

The agent executes the action of lowest Q_h among N samples of the flow. It serves as a baseline for
comparisons. It differs from the paper in the units, the critics (docs/safefql.md) and the flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safeshield.files.settings import NonNegative, PositiveInt, TwoPhases
from safeshield.nn.arrays import Float
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP
from safeshield.shield import tensors
from safeshield.shield.replacement import nan_rejected
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import EulerConfig, Margin
from safeshield.training.critics import CriticAgent, CriticArchitecture, CriticsRun
from safeshield.training.imitation import flow_update
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import Phase, TrainState

if TYPE_CHECKING:
    from safeshield.shield.export_policy import GraphNoise

ACTOR = "actor"


@dataclass(frozen=True)
class FISORConfig(EulerConfig):
    """Settings of the FISOR-style baseline."""

    margin: Margin = 0.0
    """Distance from the boundary at which an action already counts as unsafe, in standard
    deviations of h over the log. A larger margin makes the actor more cautious. The paper has no
    margin. "auto" measures it when the critics are trained, as in `ValueConfig.margin`."""
    reward_temperature: NonNegative = 3.0
    """Temperature b_r: the factor of the reward advantage, in units of one step's advantage, in the
    exponent of the weights in feasible states. A larger value imitates mainly the actions of high
    reward; 0 imitates all feasible actions alike."""
    safety_temperature: NonNegative = 5.0
    """Temperature b_h: the factor of the safety advantage, in units of one step's advantage, in the
    exponent of the weights in infeasible states. A larger value imitates mainly the safer actions;
    0 imitates all actions alike."""
    candidates: PositiveInt = 16
    """Number N of sampled actions, of which the safest is executed. A larger N is safer and
    slower."""
    phase_shares: TwoPhases = (0.5, 0.5)
    """Shares of the updates for the critics and the actor, which sum to 1. A phase with a larger
    share trains for longer."""


@dataclass(eq=False)
class _Run(Run[CriticArchitecture, FISORConfig]):
    """The two phases: the critics, then the weighted actor."""

    def __post_init__(self) -> None:
        critic_steps, self._actor_steps = phase_steps(self.steps, self.config.phase_shares)
        self._critics = CriticsRun(self.model.critics, self.log, self.config, critic_steps)

    def initial(self, generator: torch.Generator) -> TrainState:
        return self._critics.prepared(super().initial(generator))

    def phases(self) -> list[Phase]:
        config, critics, steps = self.config, self._critics, self._actor_steps
        weigh = critics.imitation(
            reward_temperature=config.reward_temperature,
            safety_temperature=config.safety_temperature,
        )
        network, rate = self.model.networks[ACTOR], config.learning_rate
        update = flow_update(ACTOR, network, self.log, rate, steps, weigh)
        actor = Phase(
            ACTOR, steps, update, config.batch_size, refresh=critics.measure, refresh_every=steps
        )
        return [*critics.phases(), actor]


@register("fisor")
class FISOR(CriticAgent[FISORConfig, CriticArchitecture]):
    """Imitate good actions in feasible states, safe ones elsewhere; act by the safest of N samples.

    Args:
        config: Settings; see `FISORConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = FISOR(FISORConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> agent.predict(np.zeros((3, 2), np.float32), deterministic=True)[0].shape
    (3, 2)
    """

    config_type = FISORConfig
    file_format = "safeshield-fisor"
    run_type = _Run
    _fewest_steps = 2

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        return {ACTOR: velocity_network(*scaling.widths, self.config.flow_hidden)}

    def _act(self, model: CriticArchitecture, observations: Float, deterministic: bool) -> Float:
        """Return the safest of N samples; a deterministic call uses the same noise everywhere."""
        config, width = self.config, model.scaling.action_features
        count, each = len(observations), config.candidates
        noise = self._candidate_noise(count, each, width, deterministic)
        seen = np.repeat(observations, each, axis=0)
        actions = euler_sample(
            model.networks[ACTOR], self._arrays[ACTOR], seen, noise, config.flow_steps
        )
        # Q_h = V_h(s) + sigma max_i A_i, so A_i alone decides the order of actions in a state.
        worst = model.critics.safety.advantages(self._arrays, seen, actions).max(0)
        lowest = nan_rejected(worst).reshape(count, each).argmin(1)
        chosen: Float = actions.reshape(count, each, width)[np.arange(count), lowest]
        return chosen

    def _act_on_graph(self, model: CriticArchitecture, observations: Any, noise: GraphNoise) -> Any:  # noqa: ANN401
        config, width = self.config, model.scaling.action_features
        each = config.candidates
        drawn = noise.several(observations, each, width, config.seed).flatten(0, 1)
        seen = observations[:, None].expand(-1, each, -1).flatten(0, 1)
        field, params = model.networks[ACTOR], self._networks[ACTOR]
        actions = euler_sample(field, params, seen, drawn, config.flow_steps)
        worst = model.critics.safety.advantages(self._networks, seen, actions).amax(0)
        options = actions.reshape(-1, each, width)
        values = tensors.nan_rejected(worst.reshape(-1, each))
        return tensors.picked(options, values, values.argmin(1))[0]
