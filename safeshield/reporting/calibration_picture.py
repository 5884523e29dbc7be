"""The picture of a calibration: violation rates and bounds for each threshold."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.lines import Line2D

from safeshield.data.scatter import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, mark, saved_figure
from safeshield.shield.record import MEAN_COST
from safeshield.shield.shield import Shield


def draw_calibration(
    path: str | os.PathLike[str],
    shield: Shield,
    starts: npt.NDArray[np.float32] | None = None,
    *,
    unit: str = "units of h",
) -> None:
    """Draw the tests of the calibration of `shield` to the file `path`.

    The upper part shows the violation rate of each tested threshold with its confidence bound, and
    the rates that the pilot saw. The lower part shows the share of the starts that each threshold
    keeps.

    Args:
        path: File to write: .png, .svg, .pdf or another format of matplotlib.
        shield: The shield.
        starts: (n, obs) states in which episodes start; None for no lower part.
        unit: Unit of h.

    Raises:
        ValueError: The shield is not calibrated, or for a mean cost, which has no rates.
    """
    record = shield.record
    if record is None:
        raise ValueError("the shield must be calibrated: call calibrate()")
    if record.kind == MEAN_COST:
        raise ValueError("the picture shows rates, and this shield's record promises a mean cost")
    deltas = sorted({rung.delta for rung in record.walk} | {one.delta for one in record.pilot})
    with saved_figure(path, 7.6, 4.6 if starts is None else 6.0) as figure:
        ratios = [1.0] if starts is None else [2.2, 1.0]
        panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)
        above = panels[0, 0]
        names = list(dict.fromkeys(rung.policy for rung in record.walk))
        # Shift the marks of the policies sideways, so that they do not cover each other.
        shift = 0.012 * (max(deltas) - min(deltas) or 1.0)
        epsilon = 100 * record.epsilon
        top = max(3 * epsilon, *(100 * rung.bound for rung in record.walk))
        for i, (name, colour, marker) in enumerate(
            zip(names, (BLUE, VERMILION, GREEN), "os^", strict=False)
        ):
            rungs = [rung for rung in record.walk if rung.policy == name]
            offset = shift * (i - 0.5 * (len(names) - 1))
            seen = [point for point in record.pilot if point.policy == name]
            rates = [100 * point.violations / point.episodes for point in seen]
            above.plot(
                [point.delta + offset for point in seen], [min(rate, top) for rate in rates],
                color=colour, marker=marker, markersize=3, alpha=0.4, linestyle="",
            )  # fmt: skip
            for point, rate in zip(seen, rates, strict=True):
                if rate > top:  # Beyond the picture: an arrow with the number.
                    place = (point.delta + offset, top)
                    above.annotate(
                        f"\N{UPWARDS ARROW} {rate:.0f}%", place, color=colour, va="bottom"
                    )
            for rung in rungs:
                x, rate = rung.delta + offset, 100 * rung.violations / rung.episodes
                axes_style = {"color": colour, "markersize": 6}
                above.plot([x, x], [rate, 100 * rung.bound], color=colour, linewidth=1.5)
                above.plot(x, 100 * rung.bound, marker="_", mew=2, **axes_style)
                face = colour if rung.passed else "white"
                above.plot(x, rate, marker=marker, mfc=face, **axes_style)
        above.axhline(epsilon, color=BLACK, linewidth=1.2, linestyle=(0, (5, 3)))
        for axes in panels[:, 0]:
            axes.axvline(record.delta, color=ORANGE, linewidth=6, alpha=0.35, zorder=0)
            axes.grid(axis="y", color=GREY, linewidth=0.6)
        above.set_ylim(min(0.0, -0.02 * top), min(1.15 * top, 105.0))
        above.set_ylabel("violating episodes, %")
        above.set_title("Calibration: rates in the pilot (small, pale) and in the tests")
        if starts is not None:
            values, below = np.asarray(shield.value(starts)), panels[1, 0]
            shares = [100 * float(np.mean(values <= -delta)) for delta in deltas]
            below.plot(deltas, shares, color=GREEN, marker="o", markersize=5)
            below.set_ylim(0, 105)
            below.set_ylabel("starts kept, %")
        panels[-1, 0].set_xlabel(
            rf"threshold $\delta$, {unit}: an action passes where $Q_h \leq -\delta$"
        )
        level = record.attempts[-1].level if record.attempts else 1.0 - record.confidence
        percent = f"{100 * (1.0 - level / record.walks_planned):g}%"
        handles: list[Any] = [
            mark(marker, colour, f"{name}: observed, bar up to its {percent} bound", 6)
            for name, colour, marker in zip(names, (BLUE, VERMILION, GREEN), "os^", strict=False)
        ]
        handles.append(
            Line2D(
                [], [], color=BLACK, linestyle=(0, (5, 3)),
                label=rf"promised rate, $\epsilon$ = {epsilon:g}%",
            )
        )  # fmt: skip
        handles.append(
            Line2D(
                [], [], color=ORANGE, linewidth=6, alpha=0.35,
                label=rf"chosen: $\delta$ = {record.delta:.3g} {unit}",
            )
        )  # fmt: skip
        if not all(rung.passed for rung in record.walk):
            handles.append(mark("o", BLACK, "failed (test cut short)", 6, "white"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
