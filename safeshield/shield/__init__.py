"""The shield: accept an action where its safety value allows it, replace it elsewhere."""

from safeshield.shield.candidates import CandidateSet
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import (
    OtherEnvironmentWarning,
    Shield,
    UncalibratedShieldWarning,
)

__all__ = [
    "CandidateSet",
    "FilterReport",
    "OtherEnvironmentWarning",
    "Shield",
    "UncalibratedShieldWarning",
]
