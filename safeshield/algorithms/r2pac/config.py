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
from safeshield.training.config import ValueConfig

Penalty = Annotated[
    float,
    Rule("be finite as float32", lambda value: abs(value) <= float(np.finfo(np.float32).max)),
]


@dataclass(frozen=True)
class R2PACConfig(ValueConfig):
    """Settings of R2PAC. The defaults are the preset "small": two cores, minutes, all tasks.

    "paper" has the settings of table 4, for 600,000 updates on a GPU, and no cost limit, with one
    alpha (over the states that do not violate) and one penalty for all tasks where table 5 has them
    by the task.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (512,) * 4,
            "flow_hidden": (512,) * 4,
            "student_hidden": (512,) * 4,
            "batch_size": 1024,
            "learning_rate": 3e-4,
            "reward_expectile": 0.9,
            "safety_expectile": 0.9,
            "cost_expectile": 0.9,
            "safety_backup_steps": (1,),
            "reward_backup_steps": (1,),
            "near_share": 0.0,
            "margin": 0.0,
            "cost_limit": None,
            "region_test": "end",
            "penalty": 1.0,
            "flow_steps": 32,
            "execute": 1,
            "choose": "cost",
        },
    }

    chunk: PositiveInt = 5
    """h: actions of a chunk (the paper: 5; 1 for HalfCheetah)."""
    execute: PositiveInt | None = None
    """Actions of a chunk that are executed before the next is drawn, at most h (the paper: 1);
    fewer where a state on the way is unsafe. None: half of h, rounded up. More than 1 needs the
    state that `predict` returns to be passed to its next call; a caller who does not pass it gets a
    new plan each time."""
    region: Literal["quantile", "horizon", "safety"] = "quantile"
    """What is unsafe. "quantile": V_c above the alpha-quantile of its own values over the log's
    states that do not violate, or above what `cost_limit` is worth, where that is less; "horizon":
    V_c above what `cost_limit` is worth (eq. 42); "safety": V_h above -margin (appendix E.6), which
    learns no costs."""
    quantile: Fraction = 0.9
    """alpha, of the region "quantile": share of those states that are not unsafe by V_c."""
    cost_limit: Positive | None = 10.0
    """kappa, above 0: violating steps that an episode as long as the log's longest may have. None:
    the quantile alone decides, as in the paper."""
    region_test: Literal["any", "end"] = "any"
    """Which states of a chunk must not be unsafe: all it leads through, or the last (the paper)."""
    penalise: bool = True
    """Whether chunks into the unsafe region are penalised; False: the ablation without V_r bar."""
    penalty: Penalty | None = None
    """What such a chunk is worth, with the sign turned, in discounted reward (the paper: 1 or 10).
    None: minus the lowest discounted return from any step of the log on, an episode that was
    truncated being taken to go on with the log's mean reward. Proposition 1 asks for more where the
    safe ways earn less than that."""
    recover: bool = True
    """Whether in unsafe states the chunks of low cost are imitated, and not those of high reward;
    False: the ablation without V_c."""
    reward_backup_steps: Sizes = (64, 16, 8, 8)
    """Steps along the log in the targets of V_r and V_c, in equal parts of the critics' phase; h
    and less: V leans to Q over chunks, the papers' form."""
    cost_expectile: Fraction = 0.97
    """Weight on the cheaper chunks in V_c (the paper: 0.9)."""
    actor: Literal["guided", "awr_flow", "awr_gaussian"] = "guided"
    """What imitates (`nn.chunk_actors`)."""
    guidance: NonNegative = 2.0
    """w of the guided actor."""
    label_dropout: Share = 0.1
    """Share of the chunks that the guided actor sees without a label."""
    reward_temperature: NonNegative = 6.0
    """b_r of the weighted actors, in one chunk's advantage."""
    safety_temperature: NonNegative = 6.0
    """b_c of the weighted actors, the same."""
    flow_steps: PositiveInt = 10
    """Euler steps of the flows (the paper: 32)."""
    candidates: PositiveInt = 16
    """Plans to choose from."""
    choose: Literal["region", "cost"] = "region"
    """Which of them is followed. "region": in safe states that of the highest penalised Q_r, in
    others that of the lowest Q_c, as the actor's labels say what is good (eq. 18). "cost": that of
    the lowest Q_c everywhere, the paper's."""
    inference: Literal["flow", "student"] = "flow"
    """What draws them: the actor, or its one-step student. `R2PAC.acting_by` changes it."""
    student_hidden: Sizes = (128, 128, 128)
    """Widths of the student's hidden layers."""
    phase_shares: ThreePhases = (0.5, 0.3, 0.2)
    """Shares of the steps for critics, actor and student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_of_a_plan > self.chunk:
            raise ValueError(
                f"execute must be at most the actions of a chunk ({self.chunk}), got {self.execute}"
            )
        if self.cost_limit is None and self.region == "horizon":
            raise ValueError("cost_limit must be a number where region is 'horizon', got None")

    @property
    def steps_of_a_plan(self) -> int:
        """Actions of a chunk that are executed before the next is drawn.

        >>> R2PACConfig(chunk=5).steps_of_a_plan, R2PACConfig(chunk=1).steps_of_a_plan
        (3, 1)
        """
        return (self.chunk + 1) // 2 if self.execute is None else self.execute
