"""The presets "paper": every number with its source, and every other setting named in the docs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from safeshield.algorithms.flrp.agent import FLRPConfig
from safeshield.algorithms.r2pac.agent import R2PACConfig
from safeshield.algorithms.safefql import SafeFQLConfig
from safeshield.suites.tasks import TASKS

DOCS = Path(__file__).parents[1] / "docs"
CODE = "official code, commit fc619c6d"

# -- the numbers: setting, value, source ---------------------------------------------------------

R2PAC_NUMBERS: list[tuple[str, object, str]] = [
    ("critic_hidden", (512, 512, 512, 512), "table 4: MLP dimensions"),
    ("flow_hidden", (512, 512, 512, 512), "table 4: MLP dimensions"),
    ("batch_size", 1024, "table 4: minibatch size"),
    ("learning_rate", 3e-4, "table 4"),
    ("discount", 0.99, "table 4"),
    ("safety_discount", 0.99, "table 4, for the variant of appendix E.6 (eq. 43)"),
    ("polyak", 0.005, "table 4: target critic soft update"),
    ("reward_expectile", 0.9, "table 4: tau"),
    ("cost_expectile", 0.9, "table 4: tau"),
    ("safety_expectile", 0.9, "table 4: tau, for the variant of appendix E.6"),
    ("reward_backup_steps", (1,), "eq. 15, 16: V is fitted to Q over chunks"),
    ("safety_backup_steps", (1,), "eq. 43: one step"),
    ("near_share", 0.0, "algorithm 3: (s, a, s') ~ D"),
    ("margin", 0.0, "eq. 10: c(s, a) itself is counted"),
    ("label_magnitude", 25.0, "appendix E.6 follows FISOR, whose label it is on DSRL"),
    ("chunk", 5, "table 4: h, 5 for all tasks but one"),
    ("execute", 1, "section 4.3, appendix D.2: only the first action is executed"),
    ("region", "quantile", "section 4.3, appendix D.3"),
    ("quantile", 0.9, "table 5: the most frequent alpha"),
    ("cost_limit", None, "appendix E.5: eq. 42 is not applicable"),
    ("trust_labels", False, "eq. 5: V_c > l; section 4.3: the quantile over the dataset"),
    ("region_test", "end", "eq. 15: s_{t+h}"),
    ("ends", "terminals", "appendix E.5: only genuine task terminations"),
    ("penalise", True, "eq. 12"),
    ("penalty", 1.0, "table 5: C_bar, the value of most tasks"),
    ("fit_unsafe", True, "eq. 16: all of D"),
    ("recover", True, "eq. 17"),
    ("actor", "guided", "eq. 19"),
    ("guidance", 2.0, "table 4: CFG scale w"),
    ("label_dropout", 0.1, "algorithm 1"),
    ("reward_temperature", 6.0, "appendix E.2: alpha"),
    ("safety_temperature", 6.0, "appendix E.2: beta"),
    ("flow_steps", 32, "table 4"),
    ("candidates", 16, "table 4: generated candidate numbers"),
    ("choose", "cost", "section 4.3: the action with lowest Q_c"),
    ("inference", "flow", "algorithm 2"),
]
R2PAC_OTHER = ("seed", "student_hidden", "phase_shares")

SAFEFQL_NUMBERS: list[tuple[str, object, str]] = [
    ("critic_hidden", (256, 256), CODE),
    ("flow_hidden", (512, 512, 512, 512), CODE),
    ("student_hidden", (512, 512, 512, 512), CODE),
    ("batch_size", 1024, f"{CODE}: 2,048 for the actor, split in two steps of one half each"),
    ("learning_rate", 3e-4, CODE),
    ("discount", 0.99, CODE),
    ("safety_discount", 0.99, CODE),
    ("polyak", 0.005, CODE),
    ("reward_expectile", 0.9, CODE),
    ("safety_expectile", 0.9, CODE),
    ("reward_backup_steps", (1,), CODE),
    ("safety_backup_steps", (1,), CODE),
    ("near_share", 0.0, CODE),
    ("margin", 0.0, CODE),
    ("label_magnitude", 25.0, CODE),
    ("safe_reward_value", False, f"{CODE}: plain IQL"),
    ("flow_steps", 10, CODE),
    ("teacher", "behaviour", f"{CODE}: unweighted behaviour cloning"),
    ("candidates", 1, "paper: N = 1"),
    ("extraction", "student", "paper: N = 1, one draw of the one-step actor"),
    ("last_resort", "nearest", "no effect with N = 1, where one draw acts"),
    ("phases", "joint", f"{CODE}: all at once, every step"),
]
SAFEFQL_OTHER = ("seed", "distillation", "safety_weight", "phase_shares")

FLRP_NUMBERS: list[tuple[str, object, str]] = [
    ("critic_hidden", (256, 256), "table 4: hidden layer size 256"),
    ("flow_hidden", (256, 256), "table 4: hidden layer size 256"),
    ("batch_size", 512, "table 4"),
    ("learning_rate", 3e-4, "table 4: 0.3 x 10^-3"),
    ("discount", 0.99, "table 4"),
    ("safety_discount", 0.99, "table 4"),
    ("polyak", 0.001, "table 4: soft update rate"),
    ("reward_expectile", 0.9, "table 5"),
    ("safety_expectile", 0.9, "table 5: asymmetric L2 loss coefficient"),
    ("reward_backup_steps", (1,), "eq. 22"),
    ("safety_backup_steps", (1,), "eq. 9"),
    ("near_share", 0.0, "algorithm 1: (s, a) ~ D"),
    ("margin", 0.0, "eq. 12: 1{Q_h <= 0}"),
    ("label_magnitude", 25.0, "as in FISOR, on which it builds; the paper does not give it"),
    ("safe_reward_value", False, "eq. 21: all of D"),
    ("prior", "flow", "section 3.2"),
    ("feasibility", "safety", "section 3.1"),
    ("shape_weight", 1.0, "eq. 13"),
    ("reward_temperature", 3.0, "table 5: target temperature"),
    ("safety_temperature", 5.0, "table 5: value temperature"),
    ("refine_steps", 3, "table 5: T"),
    ("reward_weight", 1.0, "table 5: lambda_r"),
    ("safety_weight", 1.0, "table 5: lambda_h"),
    ("shared_weight", 0.5, "table 5: lambda_sh"),
    (
        "order",
        "sequential",
        "section 3.3: sequential updates, section 5: safety first, shared last",
    ),
    ("phases", "sequential", "section 3.4; algorithm 1 is phases='joint'"),
    ("candidates", 1, "section 3.3: the refined u_T is decoded, without a choice among draws"),
    ("last_resort", "nearest", "no effect with one draw"),
]
FLRP_OTHER = (
    "seed", "latent", "transforms", "decoder_spread", "action_temperature", "state_temperature",
    "kl_weight", "entropy_floor", "entropy_weight", "trust_region", "phase_shares",
)  # fmt: skip

TABLE_5 = """
AntRun 0.7 1.0
BallRun 0.5 1.0
CarRun 0.95 1.0
DroneRun 0.7 1.0
AntCircle 0.7 1.0
BallCircle 0.85 1.0
CarCircle 0.9 1.0
DroneCircle 0.7 1.0
CarPush1 0.9 10.0
CarPush2 0.9 10.0
CarGoal1 0.9 10.0
CarGoal2 0.9 10.0
CarButton1 0.8 10.0
CarButton2 0.5 10.0
AntVelocity 0.95 1.0
HalfCheetahVelocity 0.99 1.0
SwimmerVelocity 0.7 1.0
"""
"""R2PAC's table 5, line by line: task, quantile alpha, penalty coefficient C_bar."""
SAFETY_WEIGHTS = {
    "HalfCheetahVelocity": 10.0, "Walker2dVelocity": 1000.0, "HopperVelocity": 2.0,
    "SwimmerVelocity": 0.1, "AntVelocity": 10_000.0, "Boat": 100_000.0,
    "CarCircle": 0.1, "DroneRun": 0.1, "DroneCircle": 0.1, "AntRun": 0.5, "BallRun": 0.5,
    "AntCircle": 1.0, "BallCircle": 1.0, "CarRun": 100.0,
}  # fmt: skip
"""Weights of the unsafe branch in SafeFQL's official code; from CarCircle on in its class
`NormalizedSafeFQL`."""
ACTION_ENTRIES = {"Drone": 4, "HalfCheetah": 6, "Ant": 8}
"""Entries of an action of a task with this beginning of its name; of all others 2."""
FLRP_TABLE_1 = """
CarButton1 CarButton2 CarPush1 CarPush2 CarGoal1 CarGoal2 AntVelocity HalfCheetahVelocity
SwimmerVelocity AntRun BallRun CarRun DroneRun AntCircle BallCircle CarCircle DroneCircle
easysparse easymean easydense mediumsparse mediummean mediumdense hardsparse hardmean harddense
"""


@pytest.mark.parametrize(
    ("kind", "numbers", "other", "page"),
    [
        (R2PACConfig, R2PAC_NUMBERS, R2PAC_OTHER, "r2pac.md"),
        (SafeFQLConfig, SAFEFQL_NUMBERS, SAFEFQL_OTHER, "safefql.md"),
        (FLRPConfig, FLRP_NUMBERS, FLRP_OTHER, "flrp.md"),
    ],
)
def test_every_number_of_a_preset_has_a_source(
    kind: Any,  # noqa: ANN401
    numbers: list[tuple[str, object, str]],
    other: tuple[str, ...],
    page: str,
) -> None:
    """A setting is one of the paper's, or the page's part on presets names it as not known."""
    paper = kind.preset("paper")
    for name, value, source in numbers:
        assert getattr(paper, name) == value, f"{name}: {source}"
    named = [name for name, _, _ in numbers]
    assert sorted([*named, *other]) == sorted(one.name for one in dataclasses.fields(kind))
    told = (DOCS / page).read_text().partition("resets")[2].partition("\n## ")[0]
    for name in other:
        assert name == "seed" or f"`{name}`" in told, name
    assert kind.preset("small", seed=2) == kind(seed=2)
    assert kind.preset("paper", seed=2) == dataclasses.replace(paper, seed=2)


def test_table_5_of_r2pac() -> None:
    """C_bar is the value of a chunk that enters; table 4 multiplies Car's rewards by 200."""
    rows = [line.split() for line in TABLE_5.split("\n") if line]
    assert sorted(R2PACConfig.paper_tasks) == sorted(task for task, _, _ in rows)
    for task, alpha, penalty in rows:
        config = R2PACConfig.preset("paper", task=task)
        scale = 200.0 if re.fullmatch(r"Car(Push|Goal|Button)\d", task) else 1.0
        chunk = 1 if task == "HalfCheetahVelocity" else 5
        expected = dataclasses.replace(
            R2PACConfig.preset("paper"),
            quantile=float(alpha),
            penalty=float(penalty) / scale,
            chunk=chunk,
        )
        assert config == expected


def test_the_safety_weights_of_safefql() -> None:
    assert sorted(SafeFQLConfig.paper_tasks) == sorted(SAFETY_WEIGHTS)
    for task, weight in SAFETY_WEIGHTS.items():
        config = SafeFQLConfig.preset("paper", task=task)
        size = 512 if task == "Boat" else 1024
        paper = SafeFQLConfig.preset("paper")
        assert config == dataclasses.replace(paper, safety_weight=weight, batch_size=size)


def test_flrp_has_one_configuration_and_the_shaping_of_eq_13() -> None:
    assert sorted(FLRPConfig.paper_tasks) == sorted(FLRP_TABLE_1.split())
    for task in FLRP_TABLE_1.split():
        width = next((n for name, n in ACTION_ENTRIES.items() if task.startswith(name)), 2)
        paper = FLRPConfig.preset("paper")
        expected = dataclasses.replace(paper, shape_weight=float(width))
        assert FLRPConfig.preset("paper", task=task) == expected
    assert FLRPConfig.preset("paper", phases="joint").phases == "joint"


@pytest.mark.parametrize("kind", [R2PACConfig, SafeFQLConfig, FLRPConfig])
def test_a_task_is_one_of_the_papers(kind: Any) -> None:  # noqa: ANN401
    assert set(kind.paper_tasks) <= {*TASKS, "Boat"}
    changed = kind.preset("paper", task="BallRun", seed=1, batch_size=8)
    assert changed == dataclasses.replace(
        kind.preset("paper", task="BallRun"), seed=1, batch_size=8
    )
    with pytest.raises(ValueError, match=r"task must be one of \['Ant.*preset 'paper' .*'Moon'"):
        kind.preset("paper", task="Moon")
    with pytest.raises(ValueError, match=r"task must be one of \[\], for which preset 'small'"):
        kind.preset("small", task="BallRun")
    with pytest.raises(ValueError, match=r"preset must be one of \['paper', 'small'\]"):
        kind.preset("large")
