"""The settings of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass, field

from safeshield.algorithms.shield_trainer import ShieldConfig
from safeshield.files.settings import Count, Seed, Settings

ENVIRONMENT = "safeshield/Boat-v0"
"""Id of the environment of the demonstration."""


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Settings of the demonstration."""

    seed: Seed = 0
    """Seed of all random numbers."""
    trips: Count = 600
    """Number of trips in the log."""
    training: ShieldConfig = field(default_factory=ShieldConfig)
    """Settings of `ShieldTrainer`, whose seed is replaced by `seed`."""
    steps: int = 8_000
    """Number of updates of `ShieldTrainer`."""
    epsilon: float = 0.01
    """Violation rate per episode that the promise states."""
    confidence: float = 0.99
    """Confidence of the promise."""
    evaluation_episodes: int = 1000
    """Number of episodes of each agent with the shield, and without it."""
    ppo_steps: int = 400_000
    """Number of environment steps of PPO."""
    pictured_trips: int = 40
    """Number of trips in each panel of the picture."""
    grid_refinement: int = 2
    """Factor by which the exact value is computed on a finer grid; see `exact.boat_value`."""
    workers: Count | None = None
    """Number of processes; None stands for one per core, at most eight."""

    @classmethod
    def quick(cls, seed: int = 0) -> DemoConfig:
        """Return settings for tests, which run every stage but train too little to be useful.

        `seed` is the seed of all random numbers.
        """
        return cls(
            seed=seed,
            trips=60,
            training=ShieldConfig(
                critic_hidden=(32, 32), behaviour_hidden=(16,), fallback_hidden=(16,)
            ),
            steps=200,
            epsilon=0.6,
            confidence=0.9,
            evaluation_episodes=8,
            ppo_steps=1_600,
            pictured_trips=12,
            grid_refinement=1,
            workers=2,
        )
