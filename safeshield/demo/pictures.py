"""The pictures that the demonstration draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch

from safeshield.data.scatter import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    VERMILION,
    mark,
    saved_figure,
)
from safeshield.envs.boat import CURRENT, GOAL, ROCK_CENTRES, ROCK_RADII, STATE_HIGH, STATE_LOW
from safeshield.exact.boat import GridValue
from safeshield.rollouts.recorded import Episode
from safeshield.shield.shield import Shield

WATER, ROCK, DOOMED, FLOW = "#eef5fa", "#6b655f", "#f3c9a5", "#a9c4d8"


def safe_set(path: Path, shield: Shield, exact: GridValue) -> None:
    """Draw the boundary of the learned safe set over the exact safe set.

    Args:
        path: File of the picture.
        shield: The learned shield.
        exact: Exact safety value on a grid.
    """
    with saved_figure(path, 7.6, 6.6) as figure:
        axes = figure.add_subplot()
        _river(axes, exact)
        xs, ys = np.linspace(-3, 2, 401), np.linspace(-2, 2, 321)
        points = np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1)
        values = np.asarray(shield.value(points.reshape(-1, 2).astype(np.float32)))
        values = values.reshape(len(xs), len(ys)).T
        axes.contour(xs, ys, values, [0.0], colors=[BLUE], linewidths=2)
        handles: list[Any] = [
            Patch(color=ROCK, label="rock"),
            Patch(color=DOOMED, label="exact unsafe set: no steering helps"),
            Line2D([], [], color=BLUE, linewidth=2, label="learned boundary, $V_h = 0$"),
        ]
        if shield.delta > 0:
            axes.contour(
                xs, ys, values, [shield.threshold], colors=[VERMILION], linewidths=2,
                linestyles=[(0, (4, 2))],
            )  # fmt: skip
            label = rf"certified boundary, $V_h = -\delta$, $\delta$ = {shield.delta:.3f} m"
            handles.append(
                Line2D([], [], color=VERMILION, linewidth=2, linestyle=(0, (4, 2)), label=label)
            )
        handles.append(_goal_handle())
        axes.set_title("Learned from the log alone, against the exact safe set")
        _legend(figure, handles, columns=2)


def trips(
    path: Path,
    shield: Shield,
    exact: GridValue,
    runs: Mapping[tuple[str, bool], Sequence[Episode]],
) -> None:
    """Draw each agent's trips without the shield (left) and with it (right).

    Args:
        path: File of the picture.
        shield: The shield, whose safe set is drawn.
        exact: Exact safety value on a grid.
        runs: Trips by the agent's name and whether it was shielded.
    """
    names = list(dict.fromkeys(name for name, _ in runs))
    with saved_figure(path, 10.0, 4.1 * len(names) + 0.9) as figure:
        grid = figure.subplots(len(names), 2, sharex=True, sharey=True, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            for axes, shielded in zip(row, (False, True), strict=True):
                _river(axes, exact)
                some = runs[name, shielded]
                hits = sum(_trip(axes, run) for run in some)
                how = "with the shield" if shielded else "without shield"
                axes.set_title(f"{name}, {how}: {hits} of {len(some)} trips hit a rock")
        for axes in grid.flat:
            axes.label_outer()
        handles = [
            Line2D([], [], color=BLUE, linewidth=1.2, label="trip"),
            Line2D([], [], color=BLACK, marker=".", linestyle="", label="start, certified safe"),
            Line2D([], [], color=VERMILION, linewidth=1.2, label="trip that hits a rock"),
            mark("X", VERMILION, "hits the rock", 8),
            Line2D([], [], color=ORANGE, linewidth=3.2, label="the shield replaces the action"),
            Patch(color=DOOMED, label="exact unsafe set"),
            _goal_handle(),
        ]
        _legend(figure, handles, columns=4)


def _river(axes: Any, exact: GridValue) -> None:  # noqa: ANN401 - matplotlib has no types
    """Draw water, current, exact unsafe set, rocks and goal."""
    axes.set_facecolor(WATER)
    unsafe = exact.values.T
    axes.contourf(exact.xs, exact.ys, unsafe, [0.0, np.inf], colors=[DOOMED], zorder=1)
    y, x = np.meshgrid(np.linspace(-1.8, 1.8, 10), np.linspace(-2.75, 1.5, 9))
    speed = CURRENT - 0.5 * y**2
    axes.quiver(
        x, y, speed, np.zeros_like(y), color=FLOW, scale=22, width=0.0035, zorder=1.5, alpha=0.9
    )
    for centre, radius in zip(ROCK_CENTRES, ROCK_RADII, strict=True):
        axes.add_patch(Circle(tuple(centre), radius, color=ROCK, zorder=2))
    axes.plot(*GOAL, marker="*", markersize=16, color=GREEN, mec="white", zorder=6)
    axes.set_xlim(STATE_LOW[0], STATE_HIGH[0])
    axes.set_ylim(STATE_LOW[1], STATE_HIGH[1])
    axes.set_aspect("equal")
    axes.set_xlabel("x along the river, metres")
    axes.set_ylabel("y across the river, metres")


def _trip(axes: Any, episode: Episode) -> bool:  # noqa: ANN401
    """Draw one trip, at most up to the first hit of a rock, and return whether it hits one."""
    way = np.concatenate([episode.observations[:1], episode.next_observations])
    hit = episode.violated
    if hit and episode.next_constraints is not None:
        way = way[: int(np.argmax(episode.next_constraints > 0)) + 2]
        axes.plot(*way[-1], marker="X", markersize=8, color=VERMILION, mec="white", zorder=5)
    axes.plot(*way.T, color=VERMILION if hit else BLUE, linewidth=1.0, alpha=0.8, zorder=3)
    axes.plot(*way[0], marker=".", markersize=5, color=BLACK, zorder=4)
    if episode.intervened is not None:
        for start, stop in _stretches(episode.intervened[: len(way) - 1]):
            part = way[start : stop + 1]
            axes.plot(*part.T, color=ORANGE, linewidth=3.2, zorder=3.5, solid_capstyle="round")
    return hit


def _stretches(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the ranges in which the flags are set, as half-open index pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _goal_handle() -> Line2D:
    return mark("*", GREEN, "goal", 13)


def _legend(figure: Figure, handles: Sequence[object], columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
