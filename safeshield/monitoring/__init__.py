"""Monitoring of deployed shields: does the promise of the record still hold?"""

from safeshield.monitoring.covariates import covariates_of
from safeshield.monitoring.promise import (
    IN_DOUBT,
    NOT_CONTRADICTED,
    REVOKED,
    PromiseMonitor,
    PromiseReport,
    PromiseWarning,
)

__all__ = [
    "IN_DOUBT",
    "NOT_CONTRADICTED",
    "REVOKED",
    "PromiseMonitor",
    "PromiseReport",
    "PromiseWarning",
    "covariates_of",
]
