"""A small rasteriser that draws discs, boxes and lines with smooth edges, using only NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Point = Sequence[float] | npt.NDArray[np.float64]


class Canvas:
    """A picture of the rectangle from `low` to `high`, in world units with y upwards.

    Every shape is given by its signed distance in pixels. A pixel's share of the colour falls from
    1 to 0 over the width of one pixel at the edge, which makes the edge smooth.

    Example:
        >>> canvas = Canvas(low=(0.0, 0.0), high=(2.0, 1.0), height=10, colour=(0, 0, 0))
        >>> canvas.disc((1.0, 0.5), 0.2, (255, 0, 0))
        >>> picture = canvas.pixels()
        >>> picture.shape, picture[5, 10].tolist()
        ((10, 20, 3), [255, 0, 0])
    """

    def __init__(self, low: Point, high: Point, height: int, colour: Colour) -> None:
        self._left, self._top = float(low[0]), float(high[1])
        self._scale = height / (float(high[1]) - float(low[1]))
        width = round((float(high[0]) - float(low[0])) * self._scale)
        self._image = np.empty((height, width, 3))
        self._image[:] = colour

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        """Fill a disc of a colour; centre and radius are in world units."""
        self._stroke(centre, centre, radius, colour)

    def line(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a line of a colour with round ends from `start` to `end`, in world units.

        `width` is the width of the line, in world units too.
        """
        self._stroke(start, end, 0.5 * width, colour)

    def path(self, points: Sequence[npt.NDArray[np.float64]], width: float, colour: Colour) -> None:
        """Draw a line of a width and colour through k points (2,), in world units."""
        for i in range(len(points) - 1):
            self._stroke(points[i], points[i + 1], 0.5 * width, colour)

    def box(self, low: Point, high: Point, colour: Colour) -> None:
        """Fill the rectangle between the opposite corners `low` and `high`, in world units.

        `colour` is its colour.
        """
        (x0, y1), (x1, y0) = self._to_pixels(low), self._to_pixels(high)
        part, x, y = self._window(x0, x1, y0, y1)
        outside = np.maximum(np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1))
        self._blend(part, outside, colour)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the picture (height, width, 3)."""
        return np.rint(self._image).astype(np.uint8)

    def _stroke(self, start: Point, end: Point, radius: float, colour: Colour) -> None:
        (x0, y0), (x1, y1) = self._to_pixels(start), self._to_pixels(end)
        reach = radius * self._scale
        part, x, y = self._window(
            min(x0, x1) - reach, max(x0, x1) + reach, min(y0, y1) - reach, max(y0, y1) + reach
        )
        dx, dy = x1 - x0, y1 - y0
        squared = dx * dx + dy * dy
        along = 0.0 if squared == 0.0 else np.clip(((x - x0) * dx + (y - y0) * dy) / squared, 0, 1)
        self._blend(part, np.hypot(x - x0 - along * dx, y - y0 - along * dy) - reach, colour)

    def _to_pixels(self, point: Point) -> tuple[float, float]:
        x, y = float(point[0]), float(point[1])
        return (x - self._left) * self._scale, (self._top - y) * self._scale

    def _window(
        self, x0: float, x1: float, y0: float, y1: float
    ) -> tuple[tuple[slice, slice], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        height, width, _ = self._image.shape
        rows = slice(max(int(y0) - 1, 0), max(min(int(y1) + 2, height), 0))
        columns = slice(max(int(x0) - 1, 0), max(min(int(x1) + 2, width), 0))
        y = np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] + 0.5
        x = np.arange(columns.start, columns.stop, dtype=np.float64)[None, :] + 0.5
        return (rows, columns), x, y

    def _blend(
        self,
        part: tuple[slice, slice],
        distance: npt.NDArray[np.float64],
        colour: Colour,
    ) -> None:
        share = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        self._image[part] += share * (np.array(colour, dtype=np.float64) - self._image[part])
