"""Calibration: choosing a threshold by rollouts, with binomial bounds and fixed-sequence tests."""

from safeshield.calibration.binomial import episodes_needed, upper_bound, violations_allowed
from safeshield.calibration.needs import Need, episodes_plan
from safeshield.calibration.promises import CostAbove, MeanCost, Violation
from safeshield.calibration.sequential import BinomialPlan, fixed_plan, sequential_plan
from safeshield.calibration.walk import CalibrationError, fixed_sequence_walk
from safeshield.shield.log_record import Assumption, CurvePoint, LogRecord
from safeshield.shield.record import (
    ActorRecord,
    Attempt,
    CalibrationRecord,
    PilotPoint,
    PolicyResult,
    Rung,
)

__all__ = [
    "ActorRecord",
    "Assumption",
    "Attempt",
    "BinomialPlan",
    "CalibrationError",
    "CalibrationRecord",
    "CostAbove",
    "CurvePoint",
    "LogRecord",
    "MeanCost",
    "Need",
    "PilotPoint",
    "PolicyResult",
    "Rung",
    "Violation",
    "episodes_needed",
    "episodes_plan",
    "fixed_plan",
    "fixed_sequence_walk",
    "sequential_plan",
    "upper_bound",
    "violations_allowed",
]
