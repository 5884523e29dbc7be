"""Exact safety values, to judge learned ones by."""

from __future__ import annotations

from safeshield.exact.boat import GridValue, boat_value

__all__ = ["GridValue", "boat_value"]
