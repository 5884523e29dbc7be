"""What all pictures share: colours that colour-blind readers can tell apart (Okabe, Ito), style."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
BLACK, GREY = "#222222", "#dddddd"
DPI = 160
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""For `matplotlib.rc_context`."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
