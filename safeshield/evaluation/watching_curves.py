"""The curves of a watched episode: values, threshold and actions, revealed step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from safeshield.data.scatter import BLACK, BLUE, GREEN, GREY, ORANGE, STYLE, VERMILION

if TYPE_CHECKING:
    from safeshield.evaluation.watching import Frame, WatchedEpisode

_CURSOR = (110, 110, 110)
_SHADE: Any = {"alpha": 0.25, "linewidth": 0}


class Curves:
    """The picture beside the frames of an episode.

    matplotlib draws it twice, with the curves and without. `until` joins the two at the column of a
    step, so that a film of hundreds of frames takes seconds.

    Args:
        episode: The episode.
        height: Height of the picture in pixels.
        width: Its width in pixels.
        usual: Height for which the fonts are chosen. Other pictures are scaled as a whole.
        most: Number of entries of an action that are drawn. Where an action has more, those that
            the shield changed most are drawn.
    """

    def __init__(
        self, episode: WatchedEpisode, height: int, width: int, usual: int, most: int
    ) -> None:
        changed = np.abs(np.subtract(episode.executed, episode.proposed, dtype=np.float64)).sum(0)
        entries = np.sort(np.argsort(-changed, kind="stable")[:most])
        dpi = 100.0 * height / usual
        with mpl.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 9}):
            figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, layout="constrained")
            canvas = FigureCanvasAgg(figure)
            panels = figure.subplots(
                1 + len(entries), 1, sharex=True, squeeze=False,
                height_ratios=[2.2, *[1.0] * len(entries)],
            )[:, 0]  # fmt: skip
            curves = _draw(figure, panels, episode, entries.tolist())
            self._after = _pixels(canvas)
            for curve in curves:
                curve.set_visible(False)
            self._before = _pixels(canvas)
            steps = np.arange(len(episode) + 1)
            places = panels[0].transData.transform(np.stack([steps, 0.0 * steps], axis=1))
            boxes = [panel.get_window_extent() for panel in panels]
        self._columns = np.clip(np.rint(places[:, 0]).astype(int), 0, self._after.shape[1] - 1)
        top = [round(height - box.y1) for box in boxes]
        bottom = [round(height - box.y0) for box in boxes]
        self._rows = list(zip(top, bottom, strict=True))

    def until(self, step: int) -> Frame:
        """Return the picture (height, width, 3) with the curves up to a step and a cursor."""
        column = int(self._columns[step])
        picture = np.concatenate([self._after[:, : column + 1], self._before[:, column + 1 :]], 1)
        for top, bottom in self._rows:
            picture[top:bottom, column] = _CURSOR
        return picture


def _draw(figure: Figure, panels: Any, episode: WatchedEpisode, entries: list[int]) -> list[Any]:  # noqa: ANN401
    """Draw the axes and the curves, and return the curves."""
    at = np.arange(len(episode) + 1)
    steps = at[:-1]
    values, *actions = panels
    above = ~(episode.value <= episode.threshold[1:])
    groups = (
        (episode.intervened & ~above, ORANGE, "action replaced"),
        (episode.intervened & above, VERMILION, "replaced, above the threshold"),
    )
    values.axhline(0.0, color=BLACK, linewidth=0.8)
    found = [
        *values.plot(
            steps, _finite(episode.value), ".", color=GREEN, markersize=4, markeredgewidth=0
        ),
        *values.plot(at, _finite(episode.state_value), color=BLUE, linewidth=1.0),
        *values.plot(
            at, episode.threshold, color=VERMILION, linewidth=1.2, linestyle=(0, (5, 3))
        ),
    ]  # fmt: skip
    values.set_ylabel("units of h")
    values.set_title(f"{episode.environment}, '{episode.policy}', seed {episode.seed}", loc="left")
    for panel, entry in zip(actions, entries, strict=True):
        style: Any = {"drawstyle": "steps-post"}
        found += panel.plot(steps, episode.proposed[:, entry], color=ORANGE, linewidth=2.0, **style)
        found += panel.plot(steps, episode.executed[:, entry], color=BLACK, linewidth=0.9, **style)
        panel.set_ylabel("action" if episode.proposed.shape[1] == 1 else f"action[{entry}]")
    for panel in panels:
        panel.grid(axis="y", color=GREY, linewidth=0.6)
        panel.set_xlim(0, len(episode))
        # The step from s[t] belongs to the columns from t to t + 1.
        for flags, colour, _ in groups:
            for first, last in _stretches(flags):
                found.append(panel.axvspan(first, last, color=colour, **_SHADE))
    panels[-1].set_xlabel("step")
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.0, label="$V_h$ of the state"),
        Line2D([], [], color=GREEN, marker=".", linestyle="", label="$Q_h$ of the executed action"),
        Line2D([], [], color=VERMILION, linestyle=(0, (5, 3)), label="threshold"),
        Line2D([], [], color=ORANGE, linewidth=2.0, label="proposed"),
        Line2D([], [], color=BLACK, linewidth=0.9, label="executed"),
        *[Patch(color=colour, label=label, **_SHADE) for flags, colour, label in groups
          if label == groups[0][2] or flags.any()],
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    return found


def _pixels(canvas: Any) -> Frame:  # noqa: ANN401 - matplotlib has partial types
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])


def _finite(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64)


def _stretches(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the ranges in which the flags are set, as half-open pairs of steps."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
