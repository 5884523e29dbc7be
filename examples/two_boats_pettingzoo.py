"""Two boats in one PettingZoo environment, one of them behind a shield.

    pip install "safeshield[pettingzoo]"
    python examples/two_boats_pettingzoo.py        # a few seconds

`ParallelSafetyShield` judges the action of each agent by that agent's own shield. An agent without
a shield must be named. The shield is the ready-made one of the package.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from pettingzoo import ParallelEnv

from safeshield import Shield
from safeshield.calibration.proposers import Adversary
from safeshield.wrappers import ParallelSafetyShield

EPISODES = 20


class TwoBoats(ParallelEnv[str, Any, Any]):
    """Two boats on one river, which pass through each other. An agent leaves at its trip's end."""

    metadata = {"name": "two_boats_v0", "render_modes": []}  # noqa: RUF012
    render_mode = None

    def __init__(self) -> None:
        self.possible_agents = ["ferry", "tug"]
        self.agents: list[str] = []
        self._boats = {agent: gym.make("safeshield/Boat-v0") for agent in self.possible_agents}

    def observation_space(self, agent: str) -> gym.Space[Any]:
        """Return the space of an agent's observations: its own place."""
        return self._boats[agent].observation_space

    def action_space(self, agent: str) -> gym.Space[Any]:
        """Return the space of an agent's actions: its thrust."""
        return self._boats[agent].action_space

    def reset(self, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        """Put both boats at random places."""
        self.agents = list(self.possible_agents)
        seeds = [None, None] if seed is None else [2 * seed, 2 * seed + 1]
        found = {
            agent: self._boats[agent].reset(seed=one)
            for agent, one in zip(self.agents, seeds, strict=True)
        }
        return tuple({agent: one[i] for agent, one in found.items()} for i in range(2))

    def step(self, actions: dict[str, Any]) -> Any:  # noqa: ANN401
        """Move both boats."""
        found = {agent: self._boats[agent].step(actions[agent]) for agent in self.agents}
        self.agents = [agent for agent, one in found.items() if not (one[2] or one[3])]
        return tuple({agent: one[i] for agent, one in found.items()} for i in range(5))


def main() -> None:
    """Let both boats be steered for the rocks, and count who hits one."""
    shield = Shield.builtin("boat")
    adversary = Adversary(shield)
    rng = np.random.default_rng(0)
    env = ParallelSafetyShield(TwoBoats(), {"ferry": shield}, unshielded=["tug"])
    hits = dict.fromkeys(env.possible_agents, 0)
    replaced = steps = 0
    for episode in range(EPISODES):
        observations, infos = env.reset(seed=episode)
        hit = dict.fromkeys(env.possible_agents, False)
        # The shield speaks of starts from which it can still act.
        counts = bool(infos["ferry"]["shield/safe_set"])
        while env.agents:
            actions = {
                agent: adversary(observations[agent][None], rng)[0].astype(np.float32)
                for agent in env.agents
            }
            observations, _, _, _, infos = env.step(actions)
            for agent, info in infos.items():
                hit[agent] |= info["constraint"] > 0
            if "ferry" in infos:
                steps += 1
                replaced += infos["ferry"]["shield/intervened"]
        for agent in hits:
            hits[agent] += hit[agent] and (counts or agent == "tug")
    print(f"{EPISODES} trips: the shielded ferry hit {hits['ferry']} rocks, the tug {hits['tug']}")
    print(f"{replaced / steps:.0%} of the ferry's actions were replaced")


if __name__ == "__main__":
    main()
