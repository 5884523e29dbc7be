"""Define an algorithm in one file: the safest of N draws of the log's behaviour.

Training has two phases. The first one trains safety and reward critics with the package's own
code, the second one a flow that imitates the log. The agent executes the draw of lowest Q_h. The
option ``--plugin`` makes the algorithm known to the command line:

    safeshield train log.hdf5 agent.safetensors --plugin safest_of_n.py --algorithm safest-of-n
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from safeshield import collect, load_agent
from safeshield.algorithms.registry import register
from safeshield.files.settings import PositiveInt, TwoPhases
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import EulerConfig
from safeshield.training.critics import CriticAgent, CriticArchitecture, CriticsRun
from safeshield.training.imitation import flow_update
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import Phase


@dataclass(frozen=True)
class SafestOfNConfig(EulerConfig):
    """Settings of the critics and of the flow, and two of the agent's own."""

    candidates: PositiveInt = 16
    """Number N of draws, of which the safest is executed."""
    phase_shares: TwoPhases = (0.6, 0.4)
    """Shares of the updates for critics and behaviour."""


class SafestOfNRun(Run[CriticArchitecture, SafestOfNConfig]):
    """Train the critics, then the behaviour."""

    def phases(self) -> list[Phase]:
        """Return the phases of training, in their order."""
        config, flow = self.config, self.model.networks["behaviour"]
        critics, cloning = phase_steps(self.steps, config.phase_shares)
        update = flow_update("behaviour", flow, self.log, config.learning_rate, cloning)
        run = CriticsRun(self.model.critics, self.log, config, critics)
        return [*run.phases(), Phase("behaviour", cloning, update, config.batch_size)]


@register("safest-of-n")
class SafestOfN(CriticAgent[SafestOfNConfig, CriticArchitecture]):
    """Execute the safest of N draws of the log's behaviour."""

    config_type, run_type = SafestOfNConfig, SafestOfNRun
    file_format = "example-safest-of-n"

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        seen, act = scaling.observation_features, scaling.action_features
        return {"behaviour": velocity_network(seen, act, self.config.flow_hidden)}

    def _act(
        self, model: CriticArchitecture, observations: np.ndarray, deterministic: bool
    ) -> np.ndarray:
        count, each = len(observations), self.config.candidates
        seen = np.repeat(observations, each, axis=0)
        noise = self._candidate_noise(count, each, model.scaling.action_features, deterministic)
        flow, weights = model.networks["behaviour"], self._arrays["behaviour"]
        drawn = euler_sample(flow, weights, seen, noise.astype("f4"), self.config.flow_steps)
        danger = model.critics.safety.advantages(self._arrays, seen, drawn).max(0)
        safest = danger.reshape(count, each).argmin(1)
        return drawn.reshape(count, each, -1)[np.arange(count), safest]


if __name__ == "__main__":
    env = gym.make("safeshield/Boat-v0")
    log = collect(env, "random", episodes=50, seed=0)
    agent = SafestOfN(SafestOfNConfig(critic_hidden=(32,), flow_hidden=(32,))).fit(log, steps=300)
    agent.save("agent.safetensors")
    same = load_agent("agent.safetensors")
    observation, _ = env.reset(seed=1)
    action, _ = same.predict(observation, deterministic=True)
    print("it acts:", action, "as before:", agent.predict(observation, deterministic=True)[0])
