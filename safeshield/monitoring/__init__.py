"""Monitoring of deployed shields: a flight recorder, and whether a promise still holds."""

from safeshield.monitoring.covariates import covariates_of
from safeshield.monitoring.flight import FlightLog
from safeshield.monitoring.promise import (
    IN_DOUBT,
    NOT_CONTRADICTED,
    REVOKED,
    PromiseMonitor,
    PromiseReport,
    PromiseWarning,
)
from safeshield.monitoring.recorder import FlightWarning, ShieldLog

__all__ = [
    "IN_DOUBT",
    "NOT_CONTRADICTED",
    "REVOKED",
    "FlightLog",
    "FlightWarning",
    "PromiseMonitor",
    "PromiseReport",
    "PromiseWarning",
    "ShieldLog",
    "covariates_of",
]
