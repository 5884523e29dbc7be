"""Settings that several algorithms share, each with its meaning, its unit and its rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from safeshield.files.settings import (
    Fraction,
    Positive,
    PositiveInt,
    Rate,
    Rule,
    Seed,
    Settings,
    Share,
    Sizes,
)

if TYPE_CHECKING:
    from safeshield.values.safety import SafetyCritics

Margin = Annotated[
    float | Literal["auto"],
    Rule(
        "be at least 0, or 'auto'",
        lambda value: value == "auto" or value >= 0,
        tells_kind=True,
    ),
]
LEAST_MARGIN = 0.058
"""The default of the setting `margin`, which is also the least value of a measured margin."""
PAPER_VALUES: dict[str, Any] = {
    "reward_expectile": 0.9,
    "safety_expectile": 0.9,
    "safety_backup_steps": (1,),
    "reward_backup_steps": (1,),
    "near_share": 0.0,
    "margin": 0.0,
    "label_magnitude": 25.0,
}
"""Settings of the critics in the papers' official codes, where they differ from the defaults."""
PAPER_CRITICS: dict[str, Any] = {**PAPER_VALUES, "safe_reward_value": False}
"""The same for `CriticConfig`, which has one more setting."""


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Settings that all learners have in common."""

    only_acting: ClassVar[frozenset[str]] = frozenset()
    """Settings that change how an agent acts, and not its training."""
    seed: Seed = 0
    """Seed of the initial weights, the batches and the noise."""
    batch_size: PositiveInt = 256
    """Number of transitions in each update. A larger batch makes the gradients less noisy and each
    update slower."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate at the start of a phase. It falls to a fiftieth of that by the end of
    the phase. A larger rate learns faster and may diverge."""


@dataclass(frozen=True)
class SafetyConfig(TrainingConfig):
    """Settings of learners with safety critics."""

    critic_hidden: Sizes = (128, 128, 128)
    """Widths of the critics' hidden layers. More and wider layers fit finer values and take longer
    to train. On the boat task three layers of 128 had smaller errors than two of 256 (the papers'
    choice), at half the cost."""
    safety_discount: Fraction | None = None
    """Discount factor g of the safety backup, per step. A violation k steps ahead counts with the
    weight g^k, so a value nearer 1 sees violations from further away. Choose 1 - g well below
    (time step) / (time it takes to get out of danger). None means 0.997 for continuous labels and
    0.99 for binary labels, where g alone sets how many steps ahead a violation has an effect
    (`data.label_reach`)."""
    safety_expectile: Fraction | None = None
    """Expectile of V_h over the logged actions, between 0 and 1. At 0.5 V_h is their mean; nearer 1
    it approaches the value of the luckiest continuation in the log, which a shield cannot repeat.
    None means 0.9, as in the papers, and 0.99 for discrete actions, all of which a shield compares
    (`benchmarks/values.py`). With a backup controller (`ShieldConfig.backup`) there is no minimum
    over actions, and None means 0.1, which leans to the higher values where the networks are not
    exact (`benchmarks/backup.py`)."""
    label_magnitude: Positive = 1.0
    """Label M of unsafe states in a log whose labels are binary (made from costs, -1 where safe);
    without effect on continuous labels. At the expectile e, V_h is above 0 where the share p of the
    logged actions that stay safe has p / (1 - p) < M (1 - e) / e: for e = 0.9 where p < 0.10 with
    M = 1, and where p < 0.73 with M = 25, the value of FISOR and SafeFQL on DSRL. A larger M also
    sees violations from further away (`data.label_reach`)."""
    safety_backup_steps: Sizes = (64, 32, 16, 8)
    """Number of steps along the log that a target of V_h covers. Each entry applies to an equal
    part of the critics' phase. More steps smooth V_h less, but they follow the log's actions and
    therefore tend to make V_h too high. Let the list end with 1 (the papers' form) where the
    environment is strongly random; see `values.safety`."""
    polyak: Rate = 0.005
    """Share of the distance to the critics that their slow copies move at each update. A smaller
    share makes the targets more stable and the learning slower."""
    near_share: Share = 0.5
    """Share of each batch that is drawn from the eighth of the log whose states lie nearest to
    V_h = 0. A larger share makes the critics more accurate there and less so elsewhere; 0 draws all
    transitions alike."""


@dataclass(frozen=True)
class ValueConfig(SafetyConfig):
    """Settings that all algorithms with safety values and an actor have in common."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"small": {}}
    """Named settings. "small" means the defaults, which are the same for all tasks and train in
    minutes on two cores."""
    paper_tasks: ClassVar[dict[str, dict[str, Any]]] = {}
    """Settings that a paper gives for single tasks, over those of the preset "paper", by DSRL's
    name of the task."""

    flow_hidden: Sizes = (256, 256)
    """Widths of the hidden layers of the flow that samples actions. Wider layers fit the log more
    closely and take longer to train (official code: four of 512)."""
    discount: Fraction = 0.99
    """Discount factor of rewards, per step. A value nearer 1 counts later rewards more."""
    reward_expectile: Fraction = 0.95
    """Expectile of V_r over the logged actions, between 0 and 1. At 0.5 V_r is their mean; nearer 1
    it approaches the value of the best ones."""
    margin: Margin = LEAST_MARGIN
    """Distance from the boundary at which an action already counts as unsafe, in standard
    deviations of h over the log. A larger margin makes the actor more cautious; 0 means no margin.
    For continuous labels a margin above 0 is at least the typical change of h in one step
    (sigma_h), because a thinner margin has no effect on an actor. "auto" measures the margin on the
    episodes of the log when the critics are trained: it is the level that a new episode misses with
    a probability of at most 10% (`calibration.margin`), and at least the default margin, with which
    the critics are trained."""

    @classmethod
    def preset(cls, name: str, task: str | None = None, **changes: Any) -> Self:  # noqa: ANN401
        """Return the settings of the preset with this name, with `changes` applied.

        Args:
            name: Name of the preset.
            task: DSRL's name of a task, for the settings that the paper gives for this task alone.
                None means those that it gives for all tasks.
            changes: Settings that replace those of the preset.

        Raises:
            ValueError: There is no preset with this name, or it has no settings for the task.

        >>> from safeshield import SafeFQLConfig
        >>> SafeFQLConfig.preset("paper", seed=2).student_hidden
        (512, 512, 512, 512)
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {sorted(cls.presets)}, got {name!r}")
        settings = cls.presets[name]
        if task is not None:
            known = cls.paper_tasks if name == "paper" else {}
            if task not in known:
                raise ValueError(
                    f"task must be one of {sorted(known)}, for which preset {name!r} has settings "
                    f"of their own, or None, got {task!r}"
                )
            settings = {**settings, **known[task]}
        return cls(**{**settings, **changes})

    def margin_of(self, safety: SafetyCritics) -> float:
        """Return the setting `margin` in units of h.

        `safety` knows the standard deviation of h and, for "auto", the measured margin.
        """
        number = LEAST_MARGIN if isinstance(self.margin, str) else self.margin
        share = number * safety.scale.spread
        # The minimum of one step's change is for continuous labels only. A binary label changes in
        # one step by more than the whole distance between safe and unsafe.
        least = max(share, safety.scale.step_rms) if safety.continuous and number else share
        return max(least, safety.margin or 0.0) if isinstance(self.margin, str) else least


def check_measurable(margin: float | str, phases: str) -> None:
    """Raise a ValueError where a `margin` of "auto" cannot be measured with this order `phases`."""
    if margin == "auto" and phases == "joint":
        raise ValueError(
            "margin='auto' is measured when the critics are trained, and phases='joint' trains "
            "them up to the end: use phases='sequential', or give a number"
        )


@dataclass(frozen=True)
class CriticConfig(ValueConfig):
    """Settings of algorithms that train safety critics and one-step reward critics together."""

    reward_backup_steps: Sizes = (64, 16, 8, 8)
    """Number of steps along the log that a target of V_r covers. Each entry applies to an equal
    part of the critics' phase. More steps carry distant rewards faster, but follow the log's
    actions; 1 is the papers' form."""
    safe_reward_value: bool = True
    """Whether V_r is the value of the best SAFE continuation (`values.reward`). False means the
    best continuation of any kind, as in the papers."""


@dataclass(frozen=True)
class EulerConfig(CriticConfig):
    """Settings of algorithms that have critics and a flow, which is integrated by Euler steps."""

    flow_steps: PositiveInt = 10
    """Number of Euler steps that integrate the flow. More steps are more accurate and slower."""
