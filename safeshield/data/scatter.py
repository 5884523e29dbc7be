"""A scatter plot of the costs and returns of a log, with one mark for each episode."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from safeshield.data.dataset import OfflineDataset

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
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
"""Settings for `matplotlib.rc_context`."""

DEFAULT_LIMIT = 10.0
"""Cost limit of an episode in most papers on DSRL's tasks."""
_FAR = 5.0
"""Ratio of the greatest cost to the limit up to which the whole cost axis is linear."""


@contextlib.contextmanager
def saved_figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of this size, inches, which is written to `path` afterwards."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=DPI)


def draw_scatter(
    path: str | os.PathLike[str],
    dataset: OfflineDataset,
    *,
    limit: float = DEFAULT_LIMIT,
    title: str = "",
) -> None:
    """Draw the return against the cost of every episode of a log, and save the picture.

    Episodes with a cost of at most `limit` are blue, the others are vermilion. Episodes that ended
    by termination are crosses, the others are dots. The right axis shows DSRL's normalised return,
    which is 0 at the log's least return and 1 at its greatest. A star marks the episode with the
    best return within the limit. Where costs go far beyond the limit, the cost axis is linear up to
    the limit and logarithmic above it. Otherwise the episodes within the limit, which matter most
    to a safe agent, would fill only a narrow strip.

    Args:
        path: File to write: .png, .svg, .pdf or another format of matplotlib.
        dataset: The log.
        limit: Limit on the summed cost of an episode, at least 0.
        title: Title above the picture.

    Raises:
        ValueError: The limit is negative or not finite, or the suffix is unknown.
        FileNotFoundError: The folder does not exist.
    """
    if not (np.isfinite(limit) and limit >= 0.0):
        raise ValueError(f"limit must be a finite cost of at least 0, got {limit}")
    costs, returns = dataset.episode_costs, dataset.returns
    safe = costs <= limit
    ended = dataset.terminated[dataset.episode_starts + dataset.episode_lengths - 1]
    with saved_figure(path, 7.6, 5.6) as figure:
        axes = figure.add_subplot()
        axes.grid(color=GREY, linewidth=0.6)
        axes.set_axisbelow(True)
        size = float(np.clip(6000 / len(costs), 5, 30))
        for colour, chosen in ((VERMILION, ~safe), (BLUE, safe)):
            for marker, which in (("o", chosen & ~ended), ("x", chosen & ended)):
                axes.scatter(
                    costs[which],
                    returns[which],
                    s=size,
                    c=colour,
                    marker=marker,
                    alpha=0.55,
                    linewidths=1.0 if marker == "x" else 0.0,
                    rasterized=True,
                    clip_on=False,
                )
        left, right = _cost_axis(axes, limit, float(costs.max()))
        axes.axvspan(left, limit, color=BLUE, alpha=0.07, linewidth=0)
        axes.axvline(limit, color=BLACK, linewidth=1.3, linestyle=(0, (5, 3)))
        handles = [
            mark("o", BLUE, f"cost at most {limit:g}: {safe.sum()} of {len(safe)} episodes"),
            mark("o", VERMILION, f"above it: {(~safe).sum()}"),
        ]
        if ended.any():
            handles.append(mark("x", BLACK, f"ended by termination: {ended.sum()}"))
        handles.append(
            Line2D(
                [], [], color=BLACK, linewidth=1.3, linestyle=(0, (5, 3)),
                label=f"cost limit {limit:g}",
            )
        )  # fmt: skip
        if safe.any():
            best = int(np.flatnonzero(safe)[np.argmax(returns[safe])])
            axes.plot(
                costs[best], returns[best], "*", color=GREEN, mec="white", ms=17, clip_on=False
            )
            handles.append(mark("*", GREEN, f"best within it: return {returns[best]:.4g}", 12))
        axes.set_xlim(left, right)
        counted = bool(((dataset.costs == 0.0) | (dataset.costs == 1.0)).all())
        unit = "steps in violation" if counted else "sum of costs"
        scale = f" (logarithmic above {limit or 1:g})" if axes.get_xscale() == "symlog" else ""
        axes.set_xlabel(f"cost of an episode, {unit}{scale}")
        axes.set_ylabel("return of an episode, sum of rewards")
        _normalised_axis(axes, float(returns.min()), float(returns.max()))
        if title:
            axes.set_title(title, loc="left")
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _cost_axis(axes: Any, limit: float, greatest: float) -> tuple[float, float]:  # noqa: ANN401
    """Set the scale and the ticks of the cost axis, and return its left and right end.

    The left end lies slightly below 0.
    """
    knee = limit or 1.0
    if greatest <= _FAR * knee:
        end = max(1.04 * greatest, 1.15 * knee)
        return -0.02 * end, end
    # The linear part up to the limit is as wide as 1.5 decades of the logarithmic part.
    axes.set_xscale("symlog", linthresh=knee, linscale=1.5 * (1.0 - 1.0 / 10.0))
    decades = range(math.floor(math.log10(knee)), math.ceil(math.log10(greatest)) + 1)
    round_costs = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [0.0, 0.5 * knee, knee, *(cost for cost in round_costs if 1.4 * knee < cost < greatest)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    return -0.06 * knee, 1.15 * greatest


def _normalised_axis(axes: Any, least: float, greatest: float) -> None:  # noqa: ANN401
    if least == greatest:
        return
    span = greatest - least
    right = axes.secondary_yaxis(
        "right", functions=(lambda y: (y - least) / span, lambda share: least + span * share)
    )
    right.set_ylabel("normalised return: 0 and 1 are the log's least and greatest", fontsize=10)
    right.spines["right"].set_visible(True)


def mark(marker: str, colour: str, label: str, size: float = 6, face: str | None = None) -> Line2D:
    """Return the legend's entry of a marker; `face` is the colour inside, if it is another."""
    return Line2D(
        [], [], linestyle="", marker=marker, color=colour, markersize=size, mfc=face or colour,
        label=label,
    )  # fmt: skip
