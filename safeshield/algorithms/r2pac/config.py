"""Settings of R2PAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from safeshield.files.settings import (
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Rule,
    Share,
    Sizes,
    ThreePhases,
)
from safeshield.training.config import LEAST_MARGIN, PAPER_VALUES, ValueConfig

Penalty = Annotated[
    float | Literal["prop1"],
    Rule(
        "be a number that is finite as float32, 'prop1'",
        lambda value: value == "prop1" or abs(value) <= float(np.finfo(np.float32).max),
        tells_kind=True,
    ),
]


@dataclass(frozen=True)
class R2PACConfig(ValueConfig):
    """Settings of R2PAC. The defaults, which are the preset "small", are the same for all tasks.

    With the defaults training takes minutes on two cores. The preset "paper" has the settings of
    table 4, for 600,000 updates of the critics and as many of the actor on a GPU. With `task` it
    has the alpha and the penalty of table 5, and what table 4 gives for single tasks; without it,
    alpha 0.9 and penalty 1, which most tasks have.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (512,) * 4,
            "flow_hidden": (512,) * 4,
            "student_hidden": (512,) * 4,
            "batch_size": 1024,
            "learning_rate": 3e-4,
            "cost_expectile": 0.9,
            "safety_discount": 0.99,
            "cost_limit": None,
            "trust_labels": False,
            "region_test": "end",
            "penalty": 1.0,
            "fit_unsafe": True,
            "flow_steps": 32,
            "execute": 1,
            "choose": "cost",
            "phase_shares": (0.49, 0.49, 0.02),
            **PAPER_VALUES,
        },
    }
    paper_tasks: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            task: {"quantile": alpha, "penalty": 1.0}
            for task, alpha in {
                "AntRun": 0.7,
                "BallRun": 0.5,
                "CarRun": 0.95,
                "DroneRun": 0.7,
                "AntCircle": 0.7,
                "BallCircle": 0.85,
                "CarCircle": 0.9,
                "DroneCircle": 0.7,
                "AntVelocity": 0.95,
                "SwimmerVelocity": 0.7,
            }.items()
        },
        "HalfCheetahVelocity": {"quantile": 0.99, "penalty": 1.0, "chunk": 1},
        # A penalty of 10 for rewards that are multiplied by 200.
        **{
            task: {"quantile": alpha, "penalty": 10.0 / 200.0}
            for task, alpha in {
                "CarPush1": 0.9,
                "CarPush2": 0.9,
                "CarGoal1": 0.9,
                "CarGoal2": 0.9,
                "CarButton1": 0.8,
                "CarButton2": 0.5,
            }.items()
        },
    }

    margin: NonNegative = LEAST_MARGIN
    """Distance from the boundary at which an action already counts as unsafe, in standard
    deviations of h over the log, as in SafeFQL. It is not measured by this algorithm."""
    chunk: PositiveInt = 5
    """Number h of actions in a chunk. Longer chunks look further ahead and are harder to imitate
    (the paper: 5, and 1 for HalfCheetah)."""
    execute: PositiveInt | None = None
    """Number of actions of a chunk that are executed before the agent plans again, at most h (the
    paper: 1). None means half of h, rounded up. A larger number needs less computing and reacts
    later, but the agent plans again at once in an unsafe state. Above 1 the caller must pass the
    state that `predict` returns to the next call; otherwise each call makes a new plan."""
    region: Literal["quantile", "horizon", "safety"] = "quantile"
    """Rule for unsafe states. With "quantile" a state is unsafe where V_c exceeds its
    alpha-quantile over the logged states that do not violate, or the level of `cost_limit` if that
    is lower. With "horizon" it is unsafe where V_c exceeds the level of `cost_limit` (eq. 42). With
    "safety" it is unsafe where V_h exceeds -margin (appendix E.6), and no costs are learned."""
    quantile: Fraction = 0.9
    """Share alpha of the logged states without a violation (with trust_labels=False of all logged
    states) that V_c does not call unsafe, with region="quantile". A larger share makes the unsafe
    region smaller."""
    cost_limit: Positive | None = 10.0
    """Number kappa of violating steps, above 0, that an episode as long as the log's longest may
    have. A larger limit makes the unsafe region smaller. None means that the quantile alone
    decides, as in the paper."""
    trust_labels: bool = True
    """Whether a logged state that violates, or lies within the margin of a violation, is unsafe
    whatever its V_c or V_h is, and is left out of the quantile. With False the learned value alone
    decides, and the quantile is that of all logged states, as in the paper."""
    region_test: Literal["any", "end"] = "any"
    """States of a chunk that must not be unsafe. "any" means all states that it leads through;
    "end" means the last one only, as in the paper. A window longer than a chunk is tested like the
    chunks of which it consists: with "end", after every h steps and at its end."""
    ends: Literal["terminals", "terminals+timeouts"] = "terminals"
    """Ends of episodes after which no reward and no cost is counted. "terminals" means terminations
    alone: a truncated episode has the value of its last state. With "terminals+timeouts" truncated
    episodes end, too, which makes the values those of a finite horizon, to which the level of
    region="horizon" belongs (appendix E.5). The safety values never end at a truncation."""
    penalise: bool = True
    """Whether chunks that lead into the unsafe region are penalised. False is the paper's ablation
    without V_r bar."""
    penalty: Penalty | None = None
    """Penalty for a chunk that leads into the unsafe region, in discounted reward of the log: its
    value is -penalty. This is C_bar of eq. 12 and table 5 (1 or 10), divided by the reward scale of
    table 4. A larger penalty keeps the agent further away. "prop1" means the bound of proposition 1
    for the present level l of the region (`regions.proposition_1`), which must be above 0. None
    means minus the lowest discounted return from any logged step; a truncated episode is assumed to
    continue with the log's mean reward, unless it ends there (`ends`). Proposition 1 requires a
    larger penalty where safe continuations earn less than that return."""
    fit_unsafe: bool = False
    """Whether V_r is fitted in unsafe states, too, and A_r to the whole penalty of a chunk that
    enters the region, as in the paper. With False V_r is fitted in safe states only, the unit of
    A_r is that of the chunks that stay safe, and targets of A_r are at least -4 units."""
    recover: bool = True
    """Whether the actor imitates chunks of low cost instead of high reward in unsafe states. False
    is the paper's ablation without V_c."""
    reward_backup_steps: Sizes = (64, 16, 8, 8)
    """Number of steps along the log that a target of V_r or V_c covers. Each entry applies to an
    equal part of the critics' phase. More steps carry distant rewards and costs faster, but follow
    the log's actions. With h or fewer V is fitted to Q over chunks, as in the papers."""
    cost_expectile: Fraction = 0.97
    """Expectile of V_c over the logged chunks, between 0 and 1. At 0.5 V_c is their mean; nearer 1
    it approaches the cost of the cheapest ones (the paper: 0.9)."""
    actor: Literal["guided", "awr_flow", "awr_gaussian"] = "guided"
    """Kind of actor (`nn.chunk_actors`). "guided" is a flow with labels for good chunks; "awr_flow"
    is a flow and "awr_gaussian" a Gaussian, both of which weigh good chunks more."""
    guidance: NonNegative = 2.0
    """Guidance weight w of the guided actor. A larger weight moves its chunks further towards those
    labelled good."""
    label_dropout: Share = 0.1
    """Share of the chunks that the guided actor sees without a label in training. A larger share
    trains the flow without labels more and the flow with labels less."""
    reward_temperature: NonNegative = 6.0
    """Temperature b_r: the factor of the reward advantage, in units of one chunk's advantage, in
    the exponent of the weighted actors' weights in safe states. A larger value prefers chunks of
    high reward more strongly; 0 weighs all alike."""
    safety_temperature: NonNegative = 6.0
    """Temperature b_c: the factor of the cost advantage, in units of one chunk's advantage, in the
    exponent of the weighted actors' weights in unsafe states. A larger value prefers chunks of low
    cost more strongly; 0 weighs all alike."""
    flow_steps: PositiveInt = 10
    """Number of Euler steps that integrate the flows. More steps are more accurate and slower (the
    paper: 32)."""
    candidates: PositiveInt = 16
    """Number of sampled plans from which the agent chooses one. More plans allow a better choice
    and take longer."""
    choose: Literal["region", "cost"] = "region"
    """Choice among the sampled plans. "region" takes the plan of highest penalised Q_r in safe
    states and the plan of lowest Q_c in the others, in accordance with the actor's labels (eq. 18).
    "cost" takes the plan of lowest Q_c in all states, as in the paper."""
    inference: Literal["flow", "student"] = "flow"
    """Network that samples the plans: "flow" is the actor and "student" its faster one-step
    student. `R2PAC.acting_by` changes it after training."""
    student_hidden: Sizes = (128, 128, 128)
    """Widths of the student's hidden layers. Wider layers fit more closely and train more
    slowly."""
    phase_shares: ThreePhases = (0.5, 0.3, 0.2)
    """Shares of the updates for critics, actor and student, which sum to 1. A phase with a larger
    share trains for longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_of_a_plan > self.chunk:
            raise ValueError(
                f"execute must be at most the actions of a chunk ({self.chunk}), got {self.execute}"
            )
        if self.penalty == "prop1" and self.region == "safety":
            raise ValueError(
                "penalty must be a number or None where region is 'safety', which has no level l "
                "of costs, got 'prop1'"
            )
        if self.cost_limit is None and self.region == "horizon":
            raise ValueError("cost_limit must be a number where region is 'horizon', got None")

    @property
    def steps_of_a_plan(self) -> int:
        """Number of actions of a chunk that are executed before the agent plans again.

        >>> R2PACConfig(chunk=5).steps_of_a_plan, R2PACConfig(chunk=1).steps_of_a_plan
        (3, 1)
        """
        return (self.chunk + 1) // 2 if self.execute is None else self.execute
