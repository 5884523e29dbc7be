"""Thresholds that keep a promise: binomial tails, fixed-sequence tests, rollouts, records."""

from safeshield.calibration.binomial import episodes_needed, upper_bound, violations_allowed
from safeshield.calibration.record import CalibrationRecord, PolicyResult
from safeshield.calibration.walk import CalibrationError, Rung, fixed_sequence_walk

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
