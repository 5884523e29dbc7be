"""These tests need the benchmark stack: without it they are not collected, with it none is skipped.

SAFESHIELD_SUITES=1, as CI sets it where the stack is installed, turns its absence into failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from safeshield.suites.packages import Suite, missing

REQUIRED = os.environ.get("SAFESHIELD_SUITES") == "1"
PRESENT = not missing(*Suite)

collect_ignore_glob = [] if REQUIRED or PRESENT else ["*"]


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where the stack is installed: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    outcome: Any = yield
    _forbid_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    outcome: Any = yield
    _forbid_skip(outcome.get_result())
