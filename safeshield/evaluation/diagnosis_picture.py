"""The picture of one shielded episode: h, V_h, Q_h and the threshold, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from safeshield.data.scatter import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, saved_figure
from safeshield.evaluation.causes import Violation
from safeshield.evaluation.traces import Trace

_BEFORE, _AFTER = 80, 25
_MOST = 140


def draw_trace(
    path: str | os.PathLike[str],
    trace: Trace,
    delta: float,
    marks: Sequence[Violation],
    title: str,
) -> None:
    """Draw the values along an episode and save the picture.

    A long episode with an entry is cut to the steps around its first entry.

    Args:
        path: File to write: .png, .svg, .pdf or another format of matplotlib.
        trace: The episode.
        delta: Delta of the shield.
        marks: Entries into a violation in this episode.
        title: Title above the picture.

    Raises:
        ValueError: The suffix is unknown.
        FileNotFoundError: The folder does not exist.
    """
    first, last = 0, len(trace)
    if marks and last > _MOST:
        first = max(0, marks[0].step - _BEFORE)
        last = min(last, marks[0].step + _AFTER)
    at = np.arange(first, last + 1)
    steps = at[:-1]
    with saved_figure(path, 9.0, 5.4) as figure:
        axes = figure.add_subplot()
        axes.axhline(0.0, color=BLACK, linewidth=0.8)
        axes.axhline(
            -delta, color=VERMILION, linewidth=1.2, linestyle=(0, (5, 3)),
            label=rf"threshold $-\delta$ = {-delta:.3g}",
        )  # fmt: skip
        told = "reported" if trace.reported is not None else "in use"
        axes.plot(at, trace.h[at], color=BLACK, linewidth=3.2, label=f"h, {told}")
        axes.plot(at, _finite(trace.state_value[at]), color=BLUE, linewidth=1.8, label="$V_h$")
        axes.plot(
            steps, _finite(trace.proposed_value[steps]), ".", color=ORANGE, markersize=4,
            label="$Q_h$ of the proposed action",
        )  # fmt: skip
        axes.plot(
            steps, _finite(trace.value[steps]), ".", color=GREEN, markersize=4,
            label="$Q_h$ of the executed action",
        )  # fmt: skip
        _shade(axes, trace, steps)
        low, high = axes.get_ylim()
        for mark in marks:
            if first <= mark.step <= last:
                axes.axvline(mark.step, color=VERMILION, linewidth=1.2)
                axes.annotate(
                    f"entry: {mark.cause}", (mark.step, high), xytext=(-4, -4),
                    textcoords="offset points", rotation=90, ha="right", va="top",
                    color=VERMILION, fontsize=9,
                )  # fmt: skip
                break
        axes.set_ylim(low, high)
        axes.set_xlim(first, last)
        axes.grid(axis="y", color=GREY, linewidth=0.6)
        axes.set_xlabel("step")
        axes.set_ylabel("units of h")
        axes.set_title(f"Worst episode: {title}")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)


def _finite(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64)


def _shade(axes: object, trace: Trace, steps: npt.NDArray[np.int64]) -> None:
    """Mark the steps that were replaced, and those without an acceptable action, at the bottom."""
    fill = axes.fill_between  # type: ignore[attr-defined]
    place = axes.get_xaxis_transform()  # type: ignore[attr-defined]
    groups = (
        (trace.intervened & trace.acceptable, ORANGE, "replaced"),
        (~trace.acceptable, VERMILION, "nothing acceptable"),
    )
    for flags, colour, label in groups:
        if flags[steps].any():
            fill(
                steps, 0.0, 0.03, where=flags[steps], step="post", color=colour, alpha=0.8,
                transform=place, linewidth=0, label=label,
            )  # fmt: skip
