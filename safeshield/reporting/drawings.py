"""Drawings of a report: small charts as SVG, with the colours of the page's style.

A drawing holds no colours of its own: the classes are defined in `page`, so that it follows a
light, a dark and a printed page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from safeshield.reporting.page import Html, escaped, fill, joined

_WIDTH, _HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 26.0, 40.0
SERIES = 4
"""Number of series that have a colour and a mark of their own."""


class Axis(NamedTuple):
    """One axis of a chart."""

    label: str
    least: float
    greatest: float
    logarithmic: bool = False
    """Whether `least` and `greatest` are logarithms to the base 10."""
    names: tuple[str, ...] = ()
    """Names of the places 0, 1, ... of an axis of categories."""

    @classmethod
    def over(cls, label: str, values: Sequence[float], *, zero: bool = False) -> Axis:
        """Return a linear axis over values, from 0 on where `zero` is True."""
        low = 0.0 if zero else min(values, default=0.0)
        high = max(values, default=1.0)
        room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(label, low if zero else low - room, high + room)

    @classmethod
    def of(cls, label: str, names: Sequence[str]) -> Axis:
        """Return an axis of categories, which stand side by side at the places 0, 1, ..."""
        return cls(label, -0.5, len(names) - 0.5, False, tuple(names))

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and texts of the ticks: six or so, and at most seven categories."""
        if self.names:
            each = math.ceil(len(self.names) / 7)
            return [(float(i), one) for i, one in enumerate(self.names) if i % each == 0]
        span = self.greatest - self.least
        if self.logarithmic:
            each = max(math.ceil(span / 5), 1)
            first = math.ceil(self.least / each) * each
            places = [float(one) for one in range(first, math.floor(self.greatest) + 1, each)]
            return [(one, f"{10.0**one:g}") for one in places]
        rough = span / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(one * power for one in (1.0, 2.0, 2.5, 5.0, 10.0) if one * power >= rough)
        first = math.ceil(self.least / step - 1e-9)
        last = math.floor(self.greatest / step + 1e-9)
        return [(i * step, f"{i * step:.6g}") for i in range(first, last + 1)]


class Chart:
    """A chart to which marks are added in the units of its axes.

    Args:
        name: Unique on the page; the ids of the chart's title and description begin with it.
        title: What the chart shows, for readers that hear the page.
        x: The horizontal axis.
        y: The vertical axis, whose label stands above it.
    """

    def __init__(self, name: str, title: str, x: Axis, y: Axis) -> None:
        self._name, self._title, self._x, self._y = name, title, x, y
        self._marks: list[Html] = []

    def limit(self, y: float, label: str) -> None:
        """Add a horizontal limit with a label at its right end."""
        if not self._y.least <= y <= self._y.greatest:
            return
        place = self._place(self._x.greatest, y)
        self._add(
            '<path class="limit" d="M{left} {y}H{right}"/>'
            '<text class="soft" x="{right}" y="{above}" text-anchor="end">{label}</text>',
            left=_LEFT, right=_WIDTH - _RIGHT, y=f"{place[1]:.1f}", above=f"{place[1] - 4:.1f}",
            label=label,
        )  # fmt: skip

    def chosen(self, x: float) -> None:
        """Add a vertical line at a chosen value."""
        at = f"{self._place(x, self._y.least)[0]:.1f}"
        self._add(
            '<path class="chosen" d="M{at} {top}V{low}"/>', at=at, top=_TOP, low=_HEIGHT - _BOTTOM
        )

    def line(
        self, xs: Sequence[float], ys: Sequence[float], series: int, *, steps: bool = False
    ) -> None:
        """Add a line through points; with `steps`, a staircase. Gaps are left at NaN."""
        told: list[str] = []
        pen, before = "M", 0.0
        for x, y in zip(xs, ys, strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                pen = "M"
                continue
            across, up = self._place(x, y)
            if steps and pen == "L":
                told.append(f"L{across:.1f} {before:.1f}")
            told.append(f"{pen}{across:.1f} {up:.1f}")
            pen, before = "L", up
        self._add('<path class="line k{series}" d="{told}"/>', series=series, told="".join(told))

    def points(
        self, xs: Sequence[float], ys: Sequence[float], series: int, *, filled: bool = False
    ) -> None:
        """Add the mark of a series at each point."""
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                self._marks.append(_mark(*self._place(x, y), series, filled))

    def whisker(self, x: float, low: float, high: float, series: int) -> None:
        """Add a vertical line from a low to a high end."""
        (across, down), (_, up) = self._place(x, low), self._place(x, high)
        self._add(
            '<path class="line k{series}" d="M{x} {down}V{up}"/>',
            series=series, x=f"{across:.1f}", down=f"{down:.1f}", up=f"{up:.1f}",
        )  # fmt: skip

    def floor(self, xs: Sequence[float], series: int) -> None:
        """Add a short line at the bottom of the chart for each value."""
        low = _HEIGHT - _BOTTOM
        told = "".join(f"M{self._place(x, self._y.least)[0]:.1f} {low:.1f}v-7" for x in xs)
        self._add('<path class="line k{series}" d="{told}"/>', series=series, told=told)

    def cell(self, low: tuple[float, float], high: tuple[float, float], share: float) -> None:
        """Add a rectangle between two corners, whose opacity is `share`, in [0, 1]."""
        (left, bottom), (right, top) = self._place(*low), self._place(*high)
        self._add(
            '<rect class="f4" x="{x}" y="{y}" width="{w}" height="{h}" fill-opacity="{share}"/>',
            x=f"{left:.1f}", y=f"{top:.1f}", w=f"{max(right - left, 0.5):.1f}",
            h=f"{max(bottom - top, 0.5):.1f}", share=f"{share:.3f}",
        )  # fmt: skip

    def bar(self, left: float, right: float, height: float, series: int) -> None:
        """Add a bar from 0 to a height."""
        (across, top), (end, bottom) = self._place(left, height), self._place(right, 0.0)
        self._add(
            '<rect class="f{series}" x="{x}" y="{y}" width="{w}" height="{h}"/>',
            series=series, x=f"{across:.1f}", y=f"{top:.1f}",
            w=f"{max(end - across - 0.6, 0.6):.1f}", h=f"{max(bottom - top, 0.0):.1f}",
        )  # fmt: skip

    def drawing(self) -> Html:
        """Return the chart as an SVG element."""
        low, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        grid: list[Html] = []
        for at, text in self._x.ticks():
            across = f"{self._place(at, self._y.least)[0]:.1f}"
            grid.append(
                fill(
                    '<path class="axis" d="M{x} {low}v4"/>'
                    '<text x="{x}" y="{under}" text-anchor="middle">{text}</text>',
                    x=across, low=low, under=low + 16, text=text,
                )
            )  # fmt: skip
        for at, text in self._y.ticks():
            up = self._place(self._x.least, at)[1]
            grid.append(
                fill(
                    '<path class="grid" d="M{left} {y}H{right}"/>'
                    '<text x="{before}" y="{under}" text-anchor="end">{text}</text>',
                    left=_LEFT, right=right, y=f"{up:.1f}", before=_LEFT - 5,
                    under=f"{up + 3.8:.1f}", text=text,
                )
            )  # fmt: skip
        return fill(
            '<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title">'
            '<title id="{name}-title">{title}</title>{grid}'
            '<path class="axis" d="M{left} {top}V{low}H{right}"/>{marks}'
            '<text class="soft" x="2" y="14">{above}</text>'
            '<text class="soft" x="{right}" y="{bottom}" text-anchor="end">{below}</text></svg>',
            width=f"{_WIDTH:g}", height=f"{_HEIGHT:g}", name=self._name, title=self._title,
            grid=grid, left=_LEFT, top=_TOP, low=low, right=right, marks=joined(self._marks),
            above=self._y.label, below=self._x.label, bottom=_HEIGHT - 6,
        )  # fmt: skip

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._x.least) / (self._x.greatest - self._x.least)
        up = (y - self._y.least) / (self._y.greatest - self._y.least)
        across, up = min(max(across, 0.0), 1.0), min(max(up, 0.0), 1.0)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    def _add(self, template: str, **values: object) -> None:
        self._marks.append(fill(template, **values))


def swatch(series: int, *, filled: bool = False, line: bool = False) -> Html:
    """Return the mark of a series for a legend."""
    drawn = (
        fill('<path class="line k{series}" d="M0 6H16"/>', series=series)
        if line
        else _mark(8, 6, series, filled)
    )
    return fill('<svg viewBox="0 0 16 12" aria-hidden="true">{drawn}</svg>', drawn=drawn)


def _mark(x: float, y: float, series: int, filled: bool) -> Html:
    """Return the mark of a series: a circle, a square, a triangle, a diamond, or a cross."""
    r = 4.0
    style = f"f{series} k{series}" if filled else f"open k{series}"
    if series == 0:
        shape = '<circle class="{style}" cx="{x}" cy="{y}" r="3.6"/>'
        return fill(shape, style=style, x=f"{x:.1f}", y=f"{y:.1f}")
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r), (r, r), (-r, r)],
        3: [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)],
    }.get(series, [(-r, -r), (0, 0), (r, -r), (0, 0), (r, r), (0, 0), (-r, r), (0, 0)])
    told = "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners)
    return fill('<path class="{style}" d="M{told}Z"/>', style=style, told=escaped(told))
