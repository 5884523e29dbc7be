"""The picture of missed violations against false alarms, from a record of detection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeshield.data.scatter import BLACK, BLUE, VERMILION, saved_figure

if TYPE_CHECKING:
    from safeshield.shield.log_record import LogRecord


def draw_curve(path: str, record: LogRecord) -> None:
    """Draw the curve of a record of detection, and mark its threshold.

    Args:
        path: File to write: .png, .svg, .pdf or another format of matplotlib.
        record: The record.

    Raises:
        ValueError: The record has no curve, or the suffix is unknown.
    """
    if not record.curve:
        raise ValueError(
            f"record must be one of method 'detection', which has a curve, got {record.method!r}"
        )
    clean = max(record.held_out - record.violating, 1)
    violating = max(record.episodes, 1)
    with saved_figure(path, 5.6, 4.4) as figure:
        axes = figure.add_subplot()
        shares = [
            (100 * one.false_alarms / clean, 100 * one.missed / violating) for one in record.curve
        ]
        axes.plot(*zip(*shares, strict=True), color=BLUE, drawstyle="steps-post")
        if record.alpha is not None:
            axes.axhline(
                100 * record.alpha, color=BLACK, linewidth=0.8, linestyle=(0, (5, 3)),
                label=rf"$\alpha$ = {record.alpha:g}",
            )  # fmt: skip
        chosen = [
            share
            for one, share in zip(record.curve, shares, strict=True)
            if one.threshold == record.threshold
        ]
        label = f"alarm where $Q_h$ is at least {record.threshold:.3g}"
        axes.plot(*zip(*chosen, strict=True), "o", color=VERMILION, label=label)
        axes.legend(loc="upper right")
        axes.set_xlabel(f"false alarms, % of {clean} episodes without a violation")
        axes.set_ylabel(f"missed, % of {violating} violating episodes")
        axes.set_title(f"Alarm at least {record.lead} steps before the entry")
