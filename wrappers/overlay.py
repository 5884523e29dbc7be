"""`ShieldOverlay`: rendered frames that show the shield's values and interventions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.infos import INTERVENED, THRESHOLD, VALUE
from safeshield.spaces.generic import Env, Wrapper

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Frame = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

PANEL: Colour = (16, 18, 24)
TEXT: Colour = (255, 255, 255)
EDGE: Colour = (230, 25, 35)
WARNING: Colour = (255, 120, 110)
# Colours of the bar's fill and track, for values up to the threshold, from there to 0, and above 0.
LEVELS: tuple[Colour, ...] = ((60, 190, 90), (245, 175, 40), (235, 55, 50))
TRACKS: tuple[Colour, ...] = ((38, 66, 48), (88, 70, 30), (88, 36, 36))
REPLACED = "action replaced"
ZERO_AT = 0.75
"""Position of the value 0 on the bar, as a share of the bar's length."""


class Verdict(NamedTuple):
    """The numbers that are drawn on a frame."""

    value: float
    """Value that is shown, Q_h or V_h, in units of h."""
    threshold: float
    """The number that Q_h must not exceed, in units of h."""
    intervened: bool
    """Whether the shield replaced the action."""
    name: str = "Q"
    """Name of the value: "Q" or "V"."""


class ShieldOverlay(Wrapper, RecordConstructorArgs):
    """Draw the shield's verdict on every frame of ``render()``.

    A strip at the lower edge of the frame shows ``shield/value`` and ``shield/threshold``, both in
    the constraint's units. The value is Q_h of the action just executed, or V_h of the start. A bar
    in the strip fills from the left as the value rises. It is green up to the threshold (the white
    tick), amber up to 0, and red above 0, where the critics predict a violation. A red edge
    surrounds the frames of steps in which the shield replaced the action. The strip also contains
    the numbers as text where there is room. Frames keep their size and dtype.

    The result depends on the render mode:

    * ``"rgb_array"``: the frame has the overlay. Put ``RecordVideo`` around this wrapper for a
      video, or ``HumanRendering`` for a window.
    * ``"rgb_array_list"`` (``gym.make`` collects frames inside this wrapper): each frame of the
      list has the verdict of its own step.
    * ``"human"`` and others: the result is passed on without the overlay.
    * None: the constructor raises a ValueError, because there would be no frames.

    Before the first reset, and after a step or reset that failed, ``render()`` returns the
    environment's frame without the overlay.

    Args:
        env: An environment whose infos have the shield's keys, such as `SafetyShield`.
        span: Lowest value on the bar, as a distance below zero in the constraint's units. None: the
            bar reaches down to the lowest value so far.

    Raises:
        ValueError: The environment has no render mode, or `span` is not positive. `reset` and
            `step` raise it for infos without the shield's keys, `render` for a frame that is not
            (height, width, 3) uint8.

    >>> from safeshield import SafeFQL, SafeFQLConfig, SafetyShield, collect
    >>> log = collect(gym.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> env = gym.make("safeshield/Boat-v0", render_mode="rgb_array")
    >>> env = ShieldOverlay(SafetyShield(env, agent))  # and RecordVideo(env, "videos") around it
    >>> _ = env.reset(seed=0)
    >>> env.render().shape
    (512, 640, 3)
    """

    def __init__(self, env: Env, span: float | None = None) -> None:
        RecordConstructorArgs.__init__(self, span=span)
        gym.Wrapper.__init__(self, env)
        if env.render_mode is None:
            raise ValueError(
                "env.render_mode is None, so there is nothing to draw on: make the environment "
                'with render_mode="rgb_array"'
            )
        if span is not None and not (math.isfinite(span) and span > 0):
            raise ValueError(f"span must be finite and above 0, got {span}")
        self.span = span
        self._lowest = 0.0
        # The bound concerns lists of frames, which fill gigabytes long before they reach it.
        self._verdicts: deque[Verdict] = deque(maxlen=100_000 if self._lists else 1)

    @property
    def _lists(self) -> bool:
        return self.env.render_mode == "rgb_array_list"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment by `seed` and `options`, and return its observation and info."""
        with self._forgetting():
            observation, info = self.env.reset(seed=seed, options=options)
            self._note(info, "V")
        return observation, info

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take a step by `action` and return what the environment returns."""
        with self._forgetting():
            result = self.env.step(action)
            self._note(result[4], "Q")
        return result

    def render(self) -> Any:  # noqa: ANN401
        """Return the environment's frame, or frames, with the overlay."""
        rendered: Any = self.env.render()
        if self.env.render_mode == "rgb_array" and rendered is not None and self._verdicts:
            return self._drawn(rendered, self._verdicts[-1])
        if self._lists and isinstance(rendered, list):
            # One frame is collected at each reset and step, so the last entries of the two lists
            # belong together.
            first = len(rendered) - len(self._verdicts)
            while first < 0:
                self._verdicts.popleft()
                first += 1
            drawn = map(self._drawn, rendered[first:], self._verdicts)
            return [*rendered[:first], *drawn]
        return rendered

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Forget all verdicts where a step or reset fails, as they do not match later frames."""
        try:
            yield
        except BaseException:
            self._verdicts.clear()
            raise

    def _note(self, info: dict[str, Any], name: str) -> None:
        keys = (VALUE, THRESHOLD, INTERVENED)
        missing = [key for key in keys if key not in info]
        if missing:
            raise ValueError(
                f"info has no {missing[0]!r}: ShieldOverlay goes around a SafetyShield, which "
                "reports it at reset and at every step"
            )
        value, threshold, intervened = (info[key] for key in keys)
        verdict = Verdict(float(value), float(threshold), bool(intervened), name)
        self._verdicts.append(verdict)
        if math.isfinite(verdict.value):
            self._lowest = min(self._lowest, verdict.value)

    def _drawn(self, frame: Frame, verdict: Verdict) -> Frame:
        # The bar reaches at least so far that the threshold is visibly apart from zero.
        reach = max(-self._lowest, -2 * verdict.threshold) or 1.0
        return draw_verdict(frame, verdict, self.span or reach)


# -- drawing ------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Sizes of the overlay's parts, in pixels."""

    edge: int
    """Width of the red edge."""
    pad: int
    """Distance between the parts of the strip."""
    font: int
    """Size of the text; 0 for no text."""
    bar: int
    """Height of the bar."""

    @property
    def strip(self) -> int:
        """Height of the strip."""
        return self.edge + self.bar + (3 if self.font else 2) * self.pad + self.font


def layout(height: int, width: int) -> Layout:
    """Return the sizes of the overlay for a frame of `height` by `width` pixels.

    The overlay covers only the strip and the edge.
    """
    short = min(height, width)
    edge = max(1, round(short / 100))
    # Smaller frames need relatively larger letters; letters below size 8 cannot be read.
    font = max(8, round(0.2 * short**0.75)) if short >= 48 else 0
    return Layout(edge, max(1, font // 6), font, max(2, round(0.4 * font)))


def draw_verdict(frame: Frame, verdict: Verdict, span: float) -> Frame:
    """Return a copy of a frame with the strip, and with the edge where the shield intervened.

    Args:
        frame: (height, width, 3) uint8 image.
        verdict: The numbers to show.
        span: Distance from 0 to each end of the bar, in the units of the value.

    Raises:
        ValueError: The frame has another shape or dtype.

    >>> frame = draw_verdict(np.zeros((64, 64, 3), np.uint8), Verdict(-0.2, -0.05, True), span=0.5)
    >>> frame.shape, frame[0, 0].tolist()
    ((64, 64, 3), [230, 25, 35])
    """
    image = np.asarray(frame)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            "a frame to draw on must be (height, width, 3) uint8, got "
            f"{image.shape} {image.dtype}; leave ShieldOverlay out for other frames"
        )
    image = np.array(image, order="C")
    sizes = layout(*image.shape[:2])
    strip = image[max(0, len(image) - sizes.strip) :]
    strip[:] = 0.15 * strip + 0.85 * np.array(PANEL)
    _draw_bar(strip, sizes, verdict, span)
    if sizes.font:
        _draw_text(strip, sizes, verdict)
    if verdict.intervened:
        edge = sizes.edge
        image[:edge] = image[-edge:] = image[:, :edge] = image[:, -edge:] = EDGE
    return image


def _draw_bar(strip: Frame, sizes: Layout, verdict: Verdict, span: float) -> None:
    left = sizes.edge + sizes.pad
    length = max(0, strip.shape[1] - 2 * left)
    bottom = len(strip) - sizes.edge - sizes.pad
    bar = strip[max(0, bottom - sizes.bar) : max(0, bottom), left : left + length]

    def column(value: float) -> int:
        return round(float(np.interp(value, (-span, 0, span), (0, ZERO_AT * length, length))))

    tick, zero = column(verdict.threshold), column(0.0)
    for track, start, end in zip(TRACKS, (0, tick, zero), (tick, zero, length), strict=True):
        bar[:, start:end] = track
    reach = length if math.isnan(verdict.value) else column(verdict.value)
    # The fill ends below the tick where the value is acceptable, and visibly beyond it elsewhere.
    thickness = max(1, sizes.bar // 3)
    beyond = tick - thickness // 2 + thickness + 1
    reach = max(min(reach, tick), 1) if _acceptable(verdict) else max(reach, beyond)
    level = 0 if _acceptable(verdict) else 1 if verdict.value <= 0 else 2
    bar[:, :reach] = LEVELS[level]
    start = left + max(tick - thickness // 2, 0)
    top = max(0, bottom - sizes.bar - sizes.pad)
    strip[top : bottom + sizes.pad, start : start + thickness] = TEXT


def _draw_text(strip: Frame, sizes: Layout, verdict: Verdict) -> None:
    left = sizes.edge + sizes.pad
    right = strip.shape[1] - left
    fitting = (text for text in _texts(verdict) if left + _width(text, sizes.font) <= right)
    text = next(fitting, "")
    _write(strip, text, sizes, left, TEXT)
    if verdict.intervened:
        start = right - _width(REPLACED, sizes.font)
        if start > left + _width(text, sizes.font) + sizes.font:
            _write(strip, REPLACED, sizes, start, WARNING)


def _write(strip: Frame, text: str, sizes: Layout, left: int, colour: Colour) -> None:
    ink = _ink(text, sizes.font)[:, :, None]
    patch = strip[sizes.pad : sizes.pad + sizes.font, left : left + ink.shape[1]]
    patch[:] = np.rint(patch + ink * (np.array(colour) - patch))


def _acceptable(verdict: Verdict) -> bool:
    return verdict.value <= verdict.threshold


def _texts(verdict: Verdict) -> tuple[str, ...]:
    """Return the texts that may be written, the longest first."""
    value, threshold = _digits(verdict.value), _digits(verdict.threshold)
    sign = "≤" if _acceptable(verdict) else ">"
    return (
        f"{verdict.name} {value} {sign} threshold {threshold}",
        f"{verdict.name} {value} {sign} {threshold}",
        f"{verdict.name} {value}",
        value,
    )


def _digits(value: float) -> str:
    plain = value == 0 or 0.001 <= abs(value) < 1000
    return f"{value + 0.0:.3f}" if plain else f"{value:.2g}"


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


@lru_cache(maxsize=256)
def _ink(text: str, size: int) -> npt.NDArray[np.float64]:
    """Return the share of each pixel that the letters cover, (size, width)."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (_width(text, size), size))
    # Capitals are 0.73 of the size tall, and only the Q extends below the baseline.
    draw = ImageDraw.Draw(picture)
    draw.text((0, round(0.82 * size)), text, fill=255, font=_font(size), anchor="ls")
    return np.asarray(picture) / 255.0


@lru_cache(maxsize=16)
def _font(size: int) -> FreeTypeFont:
    # matplotlib contains the font and requires Pillow. It is imported here because that is slow.
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
