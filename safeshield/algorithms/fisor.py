r"""FISOR-style: weighted behaviour cloning and the safest of N candidates, on our own critics.

After Zheng et al., "Safe Offline Reinforcement Learning with Feasibility-Guided Diffusion Model"
(ICLR 2024). Two phases on one log:

1. critics: safety values V_h, Q_h and reward values V_r, Q_r, the same as SafeFQL's;
2. actor: a flow (the paper: a diffusion model) that imitates each logged action with the weights of
   `training.imitation`, good actions in feasible states and safe ones in the others.

It acts by the candidate of lowest Q_h among N draws of the flow. A baseline to be judged beside:
what differs from the paper beside the units are the critics (docs/safefql.md) and the flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.files.settings import NonNegative, PositiveInt, TwoPhases
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import EulerConfig
from safeshield.training.critics import CriticAgent, CriticArchitecture, CriticsRun
from safeshield.training.imitation import flow_update
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import Phase

ACTOR = "actor"


@dataclass(frozen=True)
class FISORConfig(EulerConfig):
    """Settings of the FISOR-style baseline."""

    margin: NonNegative = 0.0
    """Margin of the gate, in standard deviations of h over the log; the paper has none."""
    reward_temperature: NonNegative = 3.0
    """b_r: how much better actions count for more, where it is safe."""
    safety_temperature: NonNegative = 5.0
    """b_h: how much safer actions count for more, where it is not."""
    candidates: PositiveInt = 16
    """N, of which the safest acts."""
    phase_shares: TwoPhases = (0.5, 0.5)
    """Shares of the steps for critics and actor."""


@dataclass(eq=False)
class _Run(Run[CriticArchitecture, FISORConfig]):
    """The critics, then the weighted actor."""

    def phases(self) -> list[Phase]:
        config = self.config
        critic_steps, actor_steps = phase_steps(self.steps, config.phase_shares)
        critics = CriticsRun(self.model.critics, self.log, config, critic_steps)
        weigh = critics.imitation(
            reward_temperature=config.reward_temperature,
            safety_temperature=config.safety_temperature,
        )
        network, rate = self.model.networks[ACTOR], config.learning_rate
        update = flow_update(ACTOR, network, self.log, rate, actor_steps, weigh)
        return [*critics.phases(), Phase(ACTOR, actor_steps, update, config.batch_size)]


@register("fisor")
class FISOR(CriticAgent[FISORConfig, CriticArchitecture]):
    """Imitate good actions where it is safe and safe ones where it is not; act by the safest of N.

    Args:
        config: settings; see `FISORConfig`.
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

    def _act(
        self, model: CriticArchitecture, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        """Weigh N candidates; deterministic: from the same N draws of noise in every state."""
        config, width = self.config, model.scaling.action_features
        count, each = len(observations), config.candidates
        noise = self._candidate_noise(count, each, width, deterministic).astype(np.float32)
        seen = np.repeat(observations, each, axis=0)
        actions = euler_sample(
            model.networks[ACTOR], self._arrays[ACTOR], seen, noise, config.flow_steps
        )
        # Q_h = V_h(s) + sigma max_i A_i: within a state the advantage alone decides.
        worst = model.critics.safety.advantages(self._arrays, seen, actions).max(0)
        lowest = worst.reshape(count, each).argmin(1)
        chosen: npt.NDArray[np.floating] = actions.reshape(count, each, width)[
            np.arange(count), lowest
        ]
        return chosen
