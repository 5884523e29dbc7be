"""The settings of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass, field

from safeshield.algorithms.safefql import SafeFQLConfig
from safeshield.files.settings import Count, Seed, Settings

ENVIRONMENT = "safeshield/Boat-v0"
"""Id of the environment of the demonstration."""


def _training() -> SafeFQLConfig:
    return SafeFQLConfig(
        critic_hidden=(128, 128, 128),
        flow_hidden=(128, 128),
        student_hidden=(128, 128),
        # The log shows every course in every state, so the student may deviate from the teacher.
        teacher="behaviour",
        distillation=0.1,
        phase_shares=(0.8, 0.08, 0.12),
    )


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Settings of the demonstration."""

    seed: Seed = 0
    """Seed of all random numbers."""
    trips: Count = 600
    """Number of trips in the log."""
    training: SafeFQLConfig = field(default_factory=_training)
    """Settings of SafeFQL, whose seed is replaced by `seed`."""
    steps: int = 12_000
    """Number of updates of SafeFQL."""
    epsilon: float = 0.01
    """Violation rate per episode that the promise states."""
    confidence: float = 0.99
    """Confidence of the promise."""
    start_shares: tuple[float, ...] = (0.8, 0.9, 0.95, 0.97)
    """Thresholds to test, strictest first, given as the shares of the starts with V_h <= 0 that
    they keep. They are fewer than the calibration's default, because each test takes seconds."""
    calibration_episodes: int | None = None
    """Number of episodes in each test; None stands for the number that allows one violation."""
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
            training=SafeFQLConfig(critic_hidden=(32, 32), flow_hidden=(16,), student_hidden=(16,)),
            steps=600,
            epsilon=0.6,
            confidence=0.9,
            start_shares=(0.3, 0.7),
            evaluation_episodes=16,
            ppo_steps=3_200,
            pictured_trips=12,
            grid_refinement=1,
            workers=2,
        )
