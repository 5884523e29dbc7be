"""Calibration: choosing a threshold by rollouts, with binomial bounds and fixed-sequence tests."""

from safeshield.calibration.binomial import episodes_needed, upper_bound, violations_allowed
from safeshield.calibration.walk import CalibrationError, fixed_sequence_walk
from safeshield.shield.record import CalibrationRecord, PolicyResult, Rung

__all__ = [
    "CalibrationError",
    "CalibrationRecord",
    "PolicyResult",
    "Rung",
    "episodes_needed",
    "fixed_sequence_walk",
    "upper_bound",
    "violations_allowed",
]
