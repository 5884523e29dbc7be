"""Reports: one page on what is promised of a shield, to whom, on what evidence, and what is not."""

from safeshield.reporting.hub_card import hub_folder
from safeshield.reporting.report import safety_report, write_report

__all__ = ["hub_folder", "safety_report", "write_report"]
