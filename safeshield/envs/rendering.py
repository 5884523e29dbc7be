"""Drawing of discs, boxes and lines with smooth edges in world units, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = Sequence[float] | npt.NDArray[np.float64]

_FINE = 3
"""Number of drawn pixels along each side of a pixel of the picture, which is their mean."""


class Canvas:
    """A picture of the rectangle from `low` to `high`, in world units with y upwards.

    Example:
        >>> canvas = Canvas(low=(0.0, 0.0), high=(2.0, 1.0), height=10, colour=(0, 0, 0))
        >>> canvas.disc((1.0, 0.5), 0.2, (255, 0, 0))
        >>> picture = canvas.pixels()
        >>> picture.shape, picture[5, 10].tolist()
        ((10, 20, 3), [255, 0, 0])
    """

    def __init__(self, low: Point, high: Point, height: int, colour: Colour) -> None:
        self._left, self._top = float(low[0]), float(high[1])
        scale = height / (float(high[1]) - float(low[1]))
        self._size = round((float(high[0]) - float(low[0])) * scale), height
        self._scale = _FINE * scale
        self._image = Image.new("RGB", (_FINE * self._size[0], _FINE * height), colour)
        self._draw = ImageDraw.Draw(self._image)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        """Fill a disc of a colour; centre and radius are in world units."""
        (x, y), reach = self._to_pixels(centre), radius * self._scale
        self._draw.ellipse((x - reach, y - reach, x + reach, y + reach), colour)

    def line(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a line of a colour with round ends from `start` to `end`, in world units.

        `width` is the width of the line, in world units too.
        """
        self.path((start, end), width, colour)

    def path(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line of a width and colour through k points (2,), in world units."""
        pixels = [self._to_pixels(point) for point in points]
        self._draw.line(pixels, colour, round(width * self._scale), joint="curve")
        for end in (points[0], points[-1]):
            self.disc(end, 0.5 * width, colour)

    def box(self, low: Point, high: Point, colour: Colour) -> None:
        """Fill the rectangle between the opposite corners `low` and `high`, in world units.

        `colour` is its colour.
        """
        (x0, y1), (x1, y0) = self._to_pixels(low), self._to_pixels(high)
        self._draw.rectangle((x0, y0, x1, y1), colour)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the picture (height, width, 3)."""
        return np.array(self._image.resize(self._size, Image.Resampling.BOX))

    def _to_pixels(self, point: Point) -> tuple[float, float]:
        x, y = float(point[0]), float(point[1])
        return (x - self._left) * self._scale, (self._top - y) * self._scale
