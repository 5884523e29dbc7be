"""The settings of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass, field

from safeshield.algorithms.safefql import SafeFQLConfig
from safeshield.files.settings import Count, Seed, Settings


def _training() -> SafeFQLConfig:
    return SafeFQLConfig(
        critic_hidden=(128, 128, 128),
        flow_hidden=(128, 128),
        student_hidden=(128, 128),
        # The log shows every course in every state: the student may go its own way.
        teacher="behaviour",
        distillation=0.1,
        phase_shares=(0.8, 0.08, 0.12),
    )


@dataclass(frozen=True)
class DemoConfig(Settings):
    """What the demonstration does, and how much of it."""

    seed: Seed = 0
    """Seed of everything."""
    trips: Count = 600
    """Trips in the log."""
    training: SafeFQLConfig = field(default_factory=_training)
    """Settings of SafeFQL; its seed is replaced by `seed`."""
    steps: int = 12_000
    """Updates of SafeFQL."""
    epsilon: float = 0.01
    """Violation rate per episode to promise."""
    confidence: float = 0.99
    """Of the promise."""
    start_shares: tuple[float, ...] = (0.8, 0.9, 0.95, 0.97)
    """The thresholds to test, strictest first, as shares of the starts with V_h <= 0 that they
    keep. Fewer than calibration's own, because each takes seconds."""
    calibration_episodes: int | None = None
    """Episodes in each test; None: as many as allow one violation."""
    evaluation_episodes: int = 1000
    """Episodes of each agent, with the shield and without."""
    ppo_steps: int = 400_000
    """Environment steps of PPO."""
    pictured_trips: int = 40
    """Trips in a picture."""
    grid_refinement: int = 2
    """How much finer the exact value is computed than its grid; see `exact.boat_value`."""
    workers: Count | None = None
    """Processes; None: one a core, at most eight."""

    @classmethod
    def quick(cls, seed: int = 0) -> DemoConfig:
        """Return settings that run every stage for real but teach nothing, for tests."""
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
