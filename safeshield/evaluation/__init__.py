"""Evaluation of agents: violation rates, and the normalised scores of the literature.

DSRL (Liu et al. 2024, "Datasets and Benchmarks for Offline Safe Reinforcement Learning") normalises
the return R and the cost C of an episode, both undiscounted sums. It uses the least and the
greatest return of the task's log, and a cost limit::

    normalised return = (R - least) / (greatest - least)
    normalised cost   = (C + e) / (limit + e)        e = 1 where the limit is 0, else 0

An agent is safe where its normalised cost, the mean over seeds and episodes, is at most 1. The
episodes of one seed are a run. For several tasks, the interquartile mean over all runs is reported
with a bootstrap interval (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice").
"""

from safeshield.evaluation.across_tasks import (
    Aggregate,
    aggregate,
    interquartile_mean,
    stratified_interval,
)
from safeshield.evaluation.curves import CurvePoint, Evaluate, read_curve, write_curve
from safeshield.evaluation.episodes import (
    Evaluation,
    UnshieldedAdversary,
    as_calibrated,
    evaluate,
)
from safeshield.evaluation.field import EPISODES, SEEDS, field_score, play
from safeshield.evaluation.scores import (
    COST_LIMIT,
    FieldScore,
    ReferenceReturns,
    Run,
    normalised_cost,
)
from safeshield.evaluation.tables import describe_score, format_scores, format_table
from safeshield.evaluation.under_faults import FAULT_KINDS, StressCell, StressTest, stress
from safeshield.evaluation.watching import WatchedEpisode, watch

__all__ = [
    "COST_LIMIT",
    "EPISODES",
    "FAULT_KINDS",
    "SEEDS",
    "Aggregate",
    "CurvePoint",
    "Evaluate",
    "Evaluation",
    "FieldScore",
    "ReferenceReturns",
    "Run",
    "StressCell",
    "StressTest",
    "UnshieldedAdversary",
    "WatchedEpisode",
    "aggregate",
    "as_calibrated",
    "describe_score",
    "evaluate",
    "field_score",
    "format_scores",
    "format_table",
    "interquartile_mean",
    "normalised_cost",
    "play",
    "read_curve",
    "stratified_interval",
    "stress",
    "watch",
    "write_curve",
]
