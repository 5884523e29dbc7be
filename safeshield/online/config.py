"""Settings of Safe-Support Q-learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safeshield.files.settings import (
    Fraction,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Rate,
    Share,
    Sizes,
)
from safeshield.training.config import TrainingConfig


@dataclass(frozen=True)
class SSQLConfig(TrainingConfig):
    """Settings of `SafeSupportQLearning`."""

    temperature: Positive = 0.1
    """a, in units of return: the cost of a nat of KL to the behaviour at each step. A useful value
    is about a hundredth of the difference between the returns of good and bad actions. A large
    value imitates the behaviour."""
    discount: Fraction = 0.99
    """g, the discount per step."""
    samples: PositiveInt = 16
    """m: draws of the behaviour in each state, kept with the transition. None are needed where
    actions are discrete and the behaviour knows their probabilities."""
    critic_hidden: Sizes | None = None
    """Widths of the critics' hidden layers. None: a table (no hidden layer over the indicators of
    the states) where the observation is one Discrete and actions are discrete, else (128, 128)."""
    twins: Literal["mean", "min"] = "mean"
    """Q of the twin critics: their mean, or the lower of the two. The pessimism of "min" adds up
    over the steps. It is not needed here, because actions that mu never takes are not compared."""
    actor_hidden: Sizes = (128, 128)
    """Widths of the parametric policy's hidden layers."""
    components: PositiveInt = 4
    """Number of truncated normals in the parametric policy's mixture, for a Box of actions."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate. It is constant in `learn`; in `fit` and in the extraction it falls to a
    fiftieth."""
    polyak: Rate = 0.05
    """Share by which the critics' slow copies move towards the critics at each update."""
    buffer_size: PositiveInt = 200_000
    """Transitions that are kept while learning online."""
    learning_starts: PositiveInt = 1000
    """Steps that the behaviour collects before the first update. The units of observations and
    values are computed from them."""
    train_freq: PositiveInt = 1
    """Steps of all environments between updates."""
    gradient_steps: PositiveInt = 1
    """Number of updates each time."""
    extraction: Literal["auto", "reverse", "forward"] = "auto"
    """Direction of the KL by which the parametric policy is fitted to the induced one. "auto":
    reverse where the behaviour has a density, else forward. It is also forward for `SafeRules` in a
    Box, because reverse would evaluate the rules for thousands of actions in each update.
    "reverse" without a density uses the density of a clone."""
    extraction_steps: NonNegativeInt = 2000
    """Updates of stage two, after the last step; 0: no parametric policy."""
    policy: Literal["auto", "induced", "parametric"] = "auto"
    """The policy of `predict`. "induced" weighs the behaviour's own actions and stays within its
    support; "parametric" uses the network; "auto" is "induced" wherever the behaviour is known."""
    predict_samples: PositiveInt = 64
    """Draws of the behaviour that `predict` weighs in a Box."""
    refresh_every: PositiveInt | None = None
    """Steps between two refreshes of the collector; None: the behaviour collects all the time. A
    refreshed collector weighs the behaviour's proposals by exp(Q / a), with the critics of that
    time."""
    refresh_share: Share = 0.5
    """Share of the actions of a refreshed collector that are weighed; the others are the
    behaviour's."""
    recalibration_episodes: NonNegativeInt = 0
    """Budget of tests, in episodes of the calibration environment over a whole `learn`. Each
    refreshed collector must pass the test in the shield's record before it acts. It does not act
    where it fails or the budget is spent. 0: no test, so that the record holds only for the
    policies that it names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recalibration_episodes and self.refresh_every is None:
            raise ValueError(
                "recalibration_episodes needs refresh_every: without a refresh the collector is "
                "the behaviour all the time, and there is nothing to test"
            )
        if self.policy == "parametric" and not self.extraction_steps:
            raise ValueError("policy='parametric' needs extraction_steps of at least 1, got 0")
