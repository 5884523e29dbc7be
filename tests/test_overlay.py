"""`ShieldOverlay`: what the frames show is what the infos say, and the rest is the env's frame."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import gymnasium as gym
import numpy as np
import pytest
from fitted import DT
from gymnasium.utils import RecordConstructorArgs
from gymnasium.utils.env_checker import check_env

from safeshield.shield import Shield
from safeshield.wrappers import SafetyShield
from safeshield.wrappers.overlay import (
    EDGE,
    LEVELS,
    PANEL,
    TEXT,
    ShieldOverlay,
    Verdict,
    draw_verdict,
    layout,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
BOAT = "safeshield/Boat-v0"
UPSTREAM = {"state": [-1.6, 0.5]}  # head-on towards a rock
Env = gym.Env[Any, Any]
Image = np.ndarray[Any, np.dtype[np.uint8]]


class Claims(gym.Wrapper, RecordConstructorArgs):  # type: ignore[type-arg]
    """Reports the shield's keys: the n-th step has value n / 10 - 1, each third one intervened."""

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        self.steps = 0
        observation, info = self.env.reset(**kwargs)
        return observation, {**info, **self.claim()}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.steps += 1
        *result, info = self.env.step(action)
        return (*result, {**info, **self.claim()})

    def claim(self) -> dict[str, Any]:
        return {
            "shield/value": self.steps / 10 - 1,
            "shield/threshold": -0.25,
            "shield/intervened": self.steps % 3 == 2,
        }


def boat(render_mode: str | None = "rgb_array", steps: int = 100) -> Env:
    return gym.make(BOAT, dt=DT, max_episode_steps=steps, render_mode=render_mode)


def pendulum(render_mode: str | None = "rgb_array") -> Env:
    pytest.importorskip("pygame")
    return gym.make("Pendulum-v1", render_mode=render_mode)


def covered(frame: Image, edge: bool = True) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The pixels that an overlay may change."""
    sizes = layout(*frame.shape[:2])
    mask = np.zeros(frame.shape[:2], bool)
    mask[-sizes.strip :] = True
    if edge:
        inner = slice(sizes.edge, -sizes.edge)
        inside = np.zeros_like(mask)
        inside[inner, inner] = True
        mask |= ~inside
    return mask


def has_edge(frame: Image) -> bool:
    sides = (frame[0], frame[-1], frame[:, 0], frame[:, -1])
    red = [bool((side == EDGE).all()) for side in sides]
    assert all(red) or not any(red)
    return red[0]


def fill(frame: Image) -> tuple[int, tuple[int, int, int]]:
    """How far the bar is filled, and with what: read from the picture."""
    sizes = layout(*frame.shape[:2])
    left = sizes.edge + sizes.pad
    row = frame[-sizes.edge - sizes.pad - 1, left:]
    colour = tuple(int(x) for x in row[0])
    filled = np.flatnonzero((row == colour).all(axis=-1))
    return int(filled[-1]) + 1, colour  # type: ignore[return-value]


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# -- around a shield ----------------------------------------------------------------------------


def test_frames_are_the_envs_own_outside_the_overlay_and_red_when_it_steps_in(
    shield: Shield,
) -> None:
    bare = SafetyShield(boat(), shield)
    env = ShieldOverlay(bare)
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0, options=UPSTREAM)
    seen = []
    for _ in range(20):
        own, frame = bare.render(), env.render()
        assert isinstance(own, np.ndarray)
        assert frame.shape == own.shape
        assert frame.dtype == own.dtype
        intervened = info["shield/intervened"]
        rest = ~covered(own, edge=intervened)
        np.testing.assert_array_equal(frame[rest], own[rest])
        assert has_edge(frame) is intervened
        acceptable = info["shield/value"] <= info["shield/threshold"]
        level = 0 if acceptable else 1 if info["shield/value"] <= 0 else 2
        assert fill(frame)[1] == LEVELS[level]
        seen.append((intervened, level))
        info = env.step(rng.uniform(-1, 1, 2).astype(np.float32))[4]
    assert {intervened for intervened, _ in seen} == {True, False}
    assert len({level for _, level in seen}) > 1


def test_all_but_the_frames_passes_through(shield: Shield) -> None:
    bare, other = SafetyShield(boat(), shield), SafetyShield(boat(), shield)
    env = ShieldOverlay(other)
    assert env.observation_space is other.observation_space
    assert env.action_space is other.action_space
    assert env.render_mode == "rgb_array"
    assert env.reset(seed=4)[1].keys() == bare.reset(seed=4)[1].keys()
    for _ in range(20):
        action = env.action_space.sample()
        mine, own = env.step(action), bare.step(action)
        env.render()
        np.testing.assert_array_equal(mine[0], own[0])
        assert mine[1:4] == own[1:4]
        np.testing.assert_equal(mine[4], own[4])


def known_warnings_only(env: Env) -> None:
    known = (
        "is different from the unwrapped",
        "UncalibratedShield",
        "symmetric and normalized",
        "env.seed to get variables from other wrappers",  # 0.29's own question
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    texts = [f"{warning.category.__name__} {warning.message}" for warning in caught]
    assert [text for text in texts if not any(part in text for part in known)] == []


def test_check_env(shield: Shield) -> None:
    for env in (boat(), boat().unwrapped):
        known_warnings_only(ShieldOverlay(SafetyShield(env, shield)))


@pytest.mark.skipif(gym.__version__ == "0.29.1", reason="its picture fails with today's NumPy")
def test_check_env_in_every_render_mode_of_another_env() -> None:
    env = pendulum()
    assert env.metadata["render_modes"] == ["human", "rgb_array"]
    known_warnings_only(ShieldOverlay(Claims(env), span=1.0))


def test_the_spec_rebuilds_it(shield: Shield, tmp_path: Path) -> None:
    path = tmp_path / "boat.safetensors"
    shield.save(path)
    env = ShieldOverlay(SafetyShield(boat(), path), span=0.5)
    assert env.spec is not None
    twin = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(twin, ShieldOverlay)
    assert twin.span == 0.5
    for runner in (env, twin):
        runner.reset(seed=0, options=UPSTREAM)
        runner.step(np.array([1.0, 0.3], np.float32))
    np.testing.assert_array_equal(env.render(), twin.render())


# -- render modes -------------------------------------------------------------------------------


def test_before_reset_the_env_answers_itself() -> None:
    env = ShieldOverlay(Claims(boat()))
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    own = np.zeros((20, 20, 3), np.uint8)

    class Early(gym.Env[Any, Any]):
        render_mode = "rgb_array"

        def render(self) -> Any:  # noqa: ANN401
            return own

    assert ShieldOverlay(Early()).render() is own


class Breaks(gym.Wrapper):  # type: ignore[type-arg]
    """Moves, and then fails."""

    broken = False

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._unless_broken(self.env.reset(**kwargs))

    def step(self, action: Any) -> Any:  # noqa: ANN401
        return self._unless_broken(self.env.step(action))

    def _unless_broken(self, result: Any) -> Any:  # noqa: ANN401
        if self.broken:
            raise OSError("the connection was lost")
        return result


@pytest.mark.parametrize("where", ["step", "reset"])
def test_no_verdict_of_an_earlier_state_is_drawn_after_a_failure(where: str) -> None:
    inner = Breaks(boat())
    env = ShieldOverlay(Claims(inner))
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    assert not np.array_equal(env.render(), inner.render())
    inner.broken = True
    with pytest.raises(OSError, match="connection"):
        env.step(np.zeros(2, np.float32)) if where == "step" else env.reset(seed=1)
    np.testing.assert_array_equal(env.render(), inner.render())
    inner.broken = False
    env.reset(seed=0)
    assert not np.array_equal(env.render(), inner.render())


def test_without_a_render_mode() -> None:
    with pytest.raises(ValueError, match=r'render_mode is None.*render_mode="rgb_array"'):
        ShieldOverlay(boat(render_mode=None))


def test_a_window_is_left_alone() -> None:
    class Window(gym.Env[Any, Any]):
        render_mode = "human"

        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            return 0, {}

        def render(self) -> None:
            return None

    env = ShieldOverlay(Claims(Window()))
    env.reset(seed=0)
    assert env.render() is None


def test_a_window_around_it() -> None:
    pytest.importorskip("pygame")
    env = gym.wrappers.HumanRendering(ShieldOverlay(Claims(boat())))
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.render() is None
    env.close()


def single_frames(steps: int) -> list[Image]:
    env = ShieldOverlay(Claims(boat()), span=1.0)
    env.action_space.seed(0)
    env.reset(seed=0)
    frames = [env.render()]
    for _ in range(steps):
        env.step(env.action_space.sample())
        frames.append(env.render())
    return frames


def test_lists_of_frames_have_the_verdict_of_their_own_step() -> None:
    expected = single_frames(9)
    assert [has_edge(frame) for frame in expected] == [i % 3 == 2 for i in range(10)]
    env = ShieldOverlay(Claims(boat("rgb_array_list")), span=1.0)
    env.action_space.seed(0)
    env.reset(seed=5)
    env.step(np.zeros(2, np.float32))
    env.reset(seed=0)  # drops the frames of the episode before
    for steps, frames in ((6, expected[:7]), (3, expected[7:]), (0, [])):
        for _ in range(steps):
            env.step(env.action_space.sample())
        np.testing.assert_array_equal(env.render(), frames)


@pytest.mark.parametrize("pop_frames", [False, True])
def test_collected_inside_or_around(pop_frames: bool) -> None:
    expected = single_frames(6)
    collection = gym.wrappers.RenderCollection
    inside = ShieldOverlay(collection(Claims(boat()), pop_frames=pop_frames), span=1.0)
    around = collection(ShieldOverlay(Claims(boat()), span=1.0), pop_frames=pop_frames)
    for env in (inside, around):
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(4):
            env.step(env.action_space.sample())
        np.testing.assert_array_equal(env.render(), expected[:5])  # type: ignore[arg-type]
        for _ in range(2):
            env.step(env.action_space.sample())
        rest = expected[5:] if pop_frames else expected
        np.testing.assert_array_equal(env.render(), rest)  # type: ignore[arg-type]


def test_frames_as_observations() -> None:
    wrapper = getattr(gym.wrappers, "AddRenderObservation", None)
    if wrapper is None:
        pytest.skip("gymnasium 0.29 has no AddRenderObservation")
    env = wrapper(ShieldOverlay(Claims(boat())), render_only=True)
    env.reset(seed=0)
    edges = [has_edge(env.step(env.action_space.sample())[0]) for _ in range(3)]
    assert edges == [False, True, False]


@pytest.mark.parametrize("mode", ["rgb_array", "rgb_array_list"])
def test_videos(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("moviepy", minversion="2")
    env = ShieldOverlay(Claims(boat(mode, steps=5)))
    video = gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda episode: True)
    for _ in range(2):
        video.reset(seed=0)
        for _ in range(5):
            video.step(video.action_space.sample())
    video.close()
    files = sorted(tmp_path.glob("*.mp4"))
    assert len(files) == 2
    from moviepy import VideoFileClip

    with VideoFileClip(str(files[0])) as clip:
        frames = [np.asarray(frame, np.int64) for frame in clip.iter_frames()]
    assert len(frames) == 6
    # Videos are compressed: a red edge is red, not exactly EDGE.
    reddish = [frame[1, 50] @ [2, -1, -1] > 150 for frame in frames]
    assert reddish == [i % 3 == 2 for i in range(6)]


# -- what is drawn ------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 40), (9, 9), (32, 32), (47, 300), (64, 64), (210, 160), (500, 500)]


@pytest.mark.parametrize("size", [*SIZES, (1080, 1920), (1080, 64)])
@pytest.mark.parametrize("intervened", [False, True])
def test_any_frame_keeps_its_size_and_its_own_pixels(
    size: tuple[int, int], intervened: bool
) -> None:
    frame = noise(*size)
    kept = frame.copy()
    for value in (-np.inf, -0.4, -0.05, 0.0, 3.0, np.inf, np.nan):
        drawn = draw_verdict(frame, Verdict(value, -0.05, intervened), span=0.5)
        np.testing.assert_array_equal(frame, kept)
        assert drawn.shape == frame.shape
        assert drawn.dtype == np.uint8
        assert has_edge(drawn) is intervened
        rest = ~covered(frame, edge=intervened)
        np.testing.assert_array_equal(drawn[rest], frame[rest])


@pytest.mark.parametrize("size", [(64, 64), (210, 160), (500, 500), (1080, 1920)])
def test_the_overlay_covers_little(size: tuple[int, int]) -> None:
    frame = noise(*size)
    assert covered(frame).mean() <= (0.3 if size[0] == 64 else 0.15)


@pytest.mark.parametrize("size", SIZES[3:])
def test_the_bar_reads_as_the_value(size: tuple[int, int]) -> None:
    frame = noise(*size)
    sizes = layout(*size)
    length = size[1] - 2 * (sizes.edge + sizes.pad)
    values = np.linspace(-0.6, 0.6, 49)
    fills = [fill(draw_verdict(frame, Verdict(v, -0.05, False), span=0.5)) for v in values]
    reaches = np.array([reach for reach, _ in fills])
    assert (np.diff(reaches) >= 0).all()
    assert reaches[0] == 1
    assert reaches[-1] == length
    expected = length * np.interp(values, (-0.5, 0.0, 0.5), (0.0, 0.75, 1.0))
    # The tick covers a few pixels around the threshold.
    assert np.abs(reaches - expected).max() <= sizes.bar // 3 + 1.5
    for value, (_, colour) in zip(values, fills, strict=True):
        assert colour == LEVELS[0 if value <= -0.05 else 1 if value <= 0 else 2]


def test_barely_acceptable_stays_below_the_tick_and_barely_not_passes_it() -> None:
    frame = noise(64, 64)
    pictures = [
        draw_verdict(frame, Verdict(value, -0.05, False), span=100.0) for value in (-0.05, -0.0499)
    ]
    assert [fill(picture)[1] for picture in pictures] == [LEVELS[0], LEVELS[1]]
    assert fill(pictures[0])[0] < fill(pictures[1])[0]


def text_of(size: tuple[int, int], verdict: Verdict) -> Image:
    """The rows of the strip that letters may stand in."""
    sizes = layout(*size)
    drawn = draw_verdict(np.zeros((*size, 3), np.uint8), verdict, span=0.5)
    start = size[0] - sizes.strip + sizes.pad
    return drawn[start : start + sizes.font]


def is_white(image: Image) -> bool:
    return bool((image == TEXT).all(axis=-1).any())


def test_text_where_there_is_room() -> None:
    verdict = Verdict(-0.4, -0.05, False)
    assert not is_white(text_of((47, 200), verdict))
    for size in ((64, 64), (210, 160), (500, 500), (1080, 1920)):
        ink = text_of(size, verdict)
        brightest = ink.max(axis=(0, 2))
        assert brightest.max() > 200
        # Nothing is cut off at the right.
        assert (brightest[-layout(*size).edge - layout(*size).pad :] < 60).all()
    # Other numbers, another text; and the letter tells V at reset from Q.
    for other in (
        Verdict(-0.3, -0.05, False),
        Verdict(-0.4, -0.06, False),
        verdict._replace(name="V"),
    ):
        assert (text_of((500, 500), other) != text_of((500, 500), verdict)).any()


def test_a_replaced_action_is_named_where_there_is_room() -> None:
    verdict = Verdict(-0.4, -0.05, True)
    plain = verdict._replace(intervened=False)
    size, edge = (500, 500), layout(500, 500).edge
    inner = slice(edge, -edge)
    assert (text_of(size, verdict)[:, inner] != text_of(size, plain)[:, inner]).any()
    size, edge = (64, 64), layout(64, 64).edge
    inner = slice(edge, -edge)
    assert (text_of(size, verdict)[:, inner] == text_of(size, plain)[:, inner]).all()


def test_the_bar_reaches_as_far_as_the_lowest_value_seen() -> None:
    env = ShieldOverlay(Claims(boat()))  # -1.0 at reset, then rising
    env.reset(seed=0)
    assert fill(env.render())[0] == 1
    frames = []
    for _ in range(10):
        env.step(env.action_space.sample())
        frames.append(fill(env.render())[0])
    assert frames == sorted(set(frames))
    length = 640 - 2 * (layout(512, 640).edge + layout(512, 640).pad)
    assert frames[-1] == pytest.approx(0.75 * length, abs=1)
    env.reset(seed=0)
    assert fill(env.render())[0] == 1


def test_a_given_span_and_the_names_of_the_values() -> None:
    bare = Claims(boat())
    env = ShieldOverlay(bare, span=2.0)
    for start, name in ((True, "V"), (False, "Q")):
        claim = (env.reset(seed=0) if start else env.step(env.action_space.sample()))[-1]
        verdict = Verdict(claim["shield/value"], -0.25, False, name)
        own = bare.render()
        assert isinstance(own, np.ndarray)
        np.testing.assert_array_equal(env.render(), draw_verdict(own, verdict, span=2.0))


def test_frames_that_are_flipped_or_read_only() -> None:
    frame = noise(64, 96)
    frame.setflags(write=False)
    verdict = Verdict(-0.2, -0.05, True)
    expected = draw_verdict(frame[::-1].copy(), verdict, span=0.5)
    np.testing.assert_array_equal(draw_verdict(frame[::-1], verdict, span=0.5), expected)
    assert expected.flags.c_contiguous
    assert PANEL != EDGE


# -- what can go wrong --------------------------------------------------------------------------


def test_infos_without_the_shields_keys() -> None:
    with pytest.raises(ValueError, match=r"no 'shield/value'.*around a SafetyShield"):
        ShieldOverlay(boat()).reset(seed=0)


@pytest.mark.parametrize("span", [0.0, -1.0, np.nan, np.inf])
def test_odd_spans(span: float) -> None:
    with pytest.raises(ValueError, match="span must be finite and above 0"):
        ShieldOverlay(Claims(boat()), span=span)


@pytest.mark.parametrize(
    "frame",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), "picture"],
)
def test_frames_of_other_kinds(frame: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=r"must be \(height, width, 3\) uint8"):
        draw_verdict(frame, Verdict(0.0, 0.0, False), span=1.0)
