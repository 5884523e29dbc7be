"""The shield: accept an action where its safety value allows it, replace it elsewhere."""

from safeshield.shield.adaptive import (
    AdaptiveMargin,
    AdaptiveThreshold,
    NothingAcceptableWarning,
)
from safeshield.shield.backup import BackupController, register_backup
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.replacement import (
    CommittedFallback,
    FallbackPolicy,
    NearestAcceptable,
    OwnSamples,
    ProjectedGradient,
    Rejected,
    Replacement,
)
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import (
    NoReportWarning,
    OtherEnvironmentWarning,
    Shield,
    UncalibratedShieldWarning,
)

__all__ = [
    "AdaptiveMargin",
    "AdaptiveThreshold",
    "BackupController",
    "CandidateSet",
    "CommittedFallback",
    "FallbackPolicy",
    "FilterReport",
    "NearestAcceptable",
    "NoReportWarning",
    "NothingAcceptableWarning",
    "OtherEnvironmentWarning",
    "OwnSamples",
    "ProjectedGradient",
    "Rejected",
    "Replacement",
    "Shield",
    "UncalibratedShieldWarning",
    "register_backup",
]
