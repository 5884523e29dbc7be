"""Exact safety values, with which learned values are compared."""

from __future__ import annotations

from safeshield.exact.boat import GridValue, boat_value

__all__ = ["GridValue", "boat_value"]
