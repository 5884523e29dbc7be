"""Settings that several algorithms share, each with its meaning, its unit and its rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safeshield.files.settings import (
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Rate,
    Seed,
    Settings,
    Share,
    Sizes,
)

if TYPE_CHECKING:
    from safeshield.values.safety import SafetyCritics

PAPER_CRITICS: dict[str, Any] = {
    "reward_expectile": 0.9,
    "safety_expectile": 0.9,
    "safety_backup_steps": (1,),
    "reward_backup_steps": (1,),
    "safe_reward_value": False,
    "near_share": 0.0,
    "margin": 0.0,
}
"""What the critics of the papers' official codes have instead of our defaults."""


@dataclass(frozen=True)
class ValueConfig(Settings):
    """Settings that every algorithm with safety values and an actor shares."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"small": {}}
    """Named settings; "small" is the defaults: two cores, minutes, one setting for all tasks."""

    seed: Seed = 0
    """Seed of weights, batches and noise."""
    critic_hidden: Sizes = (128, 128, 128)
    """Widths of the critics' hidden layers. Depth pays: on the boat three of 128 erred less than
    two of 256 (the papers'), at half the cost."""
    flow_hidden: Sizes = (256, 256)
    """Widths of the hidden layers of the flow that draws actions (official code: four of 512)."""
    batch_size: PositiveInt = 256
    """Transitions in an update."""
    learning_rate: Positive = 1e-3
    """Adam's rate at the start of a phase; it falls to a fiftieth by its end."""
    discount: Fraction = 0.99
    """Discount of rewards, per step."""
    safety_discount: Fraction | None = None
    """Discount g of the safety backup, per step. A violation k steps ahead weighs g^k: choose
    1 - g well below (time step) / (time it takes to get out of danger). None: 0.997 where labels
    are continuous; 0.99 where they are binary, because there it sets how far ahead a violation is
    felt (`data.label_reach`)."""
    reward_expectile: Fraction = 0.95
    """Weight on the better actions in V_r."""
    safety_expectile: Fraction = 0.99
    """Weight on the safer actions in V_h (papers: 0.9)."""
    safety_backup_steps: Sizes = (64, 32, 16, 8)
    """Steps along the log in the targets of V_h, in equal parts of the critics' phase. End on 1
    (the papers' form) where the environment is strongly random; see `values.safety`."""
    polyak: Rate = 0.005
    """Share by which the slow copies move towards the critics at each update."""
    near_share: Share = 0.5
    """Share of each batch drawn from the eighth of the log that lies nearest to V_h = 0."""
    margin: NonNegative = 0.058
    """Margin of the gate between safe and unsafe actions, in standard deviations of h over the
    log; where labels are continuous at least one step's worth of h (sigma_h), because an actor
    never sees a thinner gate. 0: no margin at all."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401
        """Return the settings of a name in `presets`, some of them changed.

        Raises:
            ValueError: there is no preset of this name.

        >>> from safeshield import SafeFQLConfig
        >>> SafeFQLConfig.preset("paper", seed=2).student_hidden
        (512, 512, 512, 512)
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {sorted(cls.presets)}, got {name!r}")
        return cls(**{**cls.presets[name], **changes})

    def margin_of(self, safety: SafetyCritics) -> float:
        """Return the margin of the gate, in units of h."""
        share = self.margin * safety.scale.spread
        # Binary labels jump by more than lies between safe and unsafe.
        return max(share, safety.scale.step_rms) if safety.continuous and self.margin else share


@dataclass(frozen=True)
class CriticConfig(ValueConfig):
    """Settings of safety and one-step reward critics together."""

    reward_backup_steps: Sizes = (64, 16, 8, 8)
    """As `safety_backup_steps`, for V_r."""
    safe_reward_value: bool = True
    """Value states by the best SAFE way on (`values.reward`); the papers' critics by any."""


@dataclass(frozen=True)
class EulerConfig(CriticConfig):
    """Settings of algorithms whose flow is integrated, beside those of their critics."""

    flow_steps: PositiveInt = 10
    """Euler steps of the flow."""
