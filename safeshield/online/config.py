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
    Seed,
    Settings,
    Share,
    Sizes,
)


@dataclass(frozen=True)
class SSQLConfig(Settings):
    """Settings of `SafeSupportQLearning`."""

    seed: Seed = 0
    """Seed of weights, batches and draws."""
    temperature: Positive = 0.1
    """a, in units of return: what a nat of KL to the behaviour costs at each step. About a
    hundredth of what good and bad actions differ by; large imitates the behaviour."""
    discount: Fraction = 0.99
    """g, per step."""
    samples: PositiveInt = 16
    """m: draws of the behaviour in each state, kept with the transition; where actions are discrete
    and it knows its probabilities, none are needed."""
    critic_hidden: Sizes | None = None
    """Widths of the critics' hidden layers. None: where the observation is one Discrete a table
    (no hidden layer over its indicators), else (128, 128)."""
    twins: Literal["mean", "min"] = "mean"
    """Q of the twin critics: their mean, or the lower of the two. The latter's caution adds up over
    the steps, and no value needs it: what mu never does is not among what is compared."""
    actor_hidden: Sizes = (128, 128)
    """Widths of the parametric policy's hidden layers."""
    components: PositiveInt = 4
    """Truncated normals that the parametric policy of a Box mixes."""
    batch_size: PositiveInt = 256
    """Transitions in an update."""
    learning_rate: Positive = 1e-3
    """Adam's rate. Online it stays; in `fit` and in the extraction it falls to a fiftieth."""
    polyak: Rate = 0.05
    """Share by which the critics' slow copies move towards them at each update."""
    buffer_size: PositiveInt = 200_000
    """Transitions that are kept while learning online."""
    learning_starts: PositiveInt = 1000
    """Steps that the behaviour collects before the first update; units are read off them."""
    train_freq: PositiveInt = 1
    """Steps of all environments between updates."""
    gradient_steps: PositiveInt = 1
    """Updates at a time."""
    extraction: Literal["auto", "reverse", "forward"] = "auto"
    """Direction of the KL by which the parametric policy is fitted to the induced one; "auto":
    reverse where the behaviour has a density, else forward, and forward behind `SafeRules` in a Box
    (which reverse asks about thousands of actions in each update). "reverse" without a density uses
    that of a clone."""
    extraction_steps: NonNegativeInt = 2000
    """Updates of stage two, after the last step; 0: no parametric policy."""
    policy: Literal["auto", "induced", "parametric"] = "auto"
    """What `predict` does: weigh the behaviour's own actions, which keeps within its support, or
    ask the network; "auto": the former wherever the behaviour is at hand."""
    predict_samples: PositiveInt = 64
    """Draws of the behaviour that `predict` weighs in a Box."""
    refresh_every: PositiveInt | None = None
    """Steps between refreshes of what collects; None: the behaviour collects all the time. A
    refreshed collector weighs what the behaviour offers by exp(Q / a), of the critics then."""
    refresh_share: Share = 0.5
    """Share of the actions of a refreshed collector that are weighed; the others are the
    behaviour's."""
    recalibration_episodes: NonNegativeInt = 0
    """Budget, in episodes in the calibration environment over a whole `learn`: each refreshed
    collector is put to the test that the shield's record names before it acts, and does not act
    where it fails or the budget is spent. 0: no test; the record's own policies must stand for
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recalibration_episodes and self.refresh_every is None:
            raise ValueError(
                "recalibration_episodes needs refresh_every: without a refresh the collector is "
                "the behaviour all the time, and there is nothing to test"
            )
        if self.policy == "parametric" and not self.extraction_steps:
            raise ValueError("policy='parametric' needs extraction_steps of at least 1, got 0")
