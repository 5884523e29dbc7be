"""Reports: one page on what is promised of a shield, to whom, on what evidence, and what is not."""

from safeshield.reporting.report import safety_report, write_report

__all__ = ["safety_report", "write_report"]
