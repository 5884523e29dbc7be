"""A film shows what the shield reported, one picture for each state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from safeshield import SafetyShield, Shield
from safeshield.calibration.proposers import Adversary
from safeshield.evaluation import WatchedEpisode, watch
from safeshield.evaluation.watching import EDGE
from safeshield.rollouts.policies import batch_policy

STEPS, SEED = 60, 3


def boat(**kwargs: Any) -> gym.Env[Any, Any]:  # noqa: ANN401
    return gym.make("safeshield/Boat-v0", render_mode="rgb_array", **kwargs)


@pytest.fixture(scope="module")
def film() -> WatchedEpisode:
    shield = Shield.builtin("boat")
    return watch(shield, boat(), Adversary(shield), steps=STEPS, seed=SEED, height=64)


def test_the_curves_are_the_infos(film: WatchedEpisode) -> None:
    """The proposals of the film, sent to a shielded environment again, give its numbers."""
    env = SafetyShield(boat(), "builtin:boat")
    _, info = env.reset(seed=SEED)
    assert info["shield/safe_set"]
    assert film.state_value[0] == info["shield/value"] <= info["shield/threshold"]
    for t in range(STEPS):
        observation, _, _, _, info = env.step(film.proposed[t])
        assert film.value[t] == info["shield/value"]
        assert film.threshold[t + 1] == info["shield/threshold"]
        assert film.intervened[t] == info["shield/intervened"]
        np.testing.assert_array_equal(film.executed[t], info["action_executed"])
        np.testing.assert_array_equal(film.proposed[t], info["action_proposed"])
        assert film.state_value[t + 1] == env.shield.value(observation)
    assert 0 < film.intervened.sum() < STEPS
    assert film.certified
    assert f"{film.intervened.sum()} actions replaced" in film.summary()


def test_one_picture_for_each_state_and_a_red_edge_where_the_action_was_replaced(
    film: WatchedEpisode,
) -> None:
    pictures = list(film.pictures())
    assert len(pictures) == len(film.frames) == STEPS + 1
    assert {one.shape for one in pictures} == {(64, 164, 3)}
    red = [tuple(one[0, 0]) == EDGE for one in pictures]
    assert red == [*film.intervened.tolist(), False]
    for picture, frame in zip(pictures, film.frames, strict=True):
        np.testing.assert_array_equal(picture[4:-4, 4:76], frame[4:-4, 4:76])
    # No curve is drawn beyond the cursor, and the last picture has all of them.
    half = film.frames[0].shape[1] + 84 // 2
    np.testing.assert_array_equal(pictures[1][:, half:], pictures[0][:, half:])
    assert (pictures[-1][:, half:] != pictures[0][:, half:]).any()


def test_files_have_a_frame_for_each_state(film: WatchedEpisode, tmp_path: Path) -> None:
    film.save(tmp_path / "film.gif", fps=25)
    with Image.open(tmp_path / "film.gif") as image:
        assert getattr(image, "n_frames", 1) == STEPS + 1
        assert image.size == (164, 64)
        assert image.info["duration"] == 40
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film.save(tmp_path / "film.mp4", fps=25)
    count, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))
    assert count == STEPS + 1
    assert seconds == pytest.approx((STEPS + 1) / 25, abs=0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"film.gif", "film.mp4"}


def test_the_film_ends_with_the_episode_and_starts_where_the_shield_acts() -> None:
    shield = Shield.builtin("boat")
    short = watch(shield, boat(max_episode_steps=4), "random", seed=0, height=32)
    assert (len(short), len(short.frames)) == (4, 5)
    # A threshold that hardly any start meets: the start is drawn again until it does.
    strict = shield.with_delta(1.0)
    with pytest.warns(UserWarning, match="not calibrated"):
        chosen = watch(strict, boat(), "random", steps=1, seed=1, height=32)
    assert chosen.state_value[0] <= -1.0
    assert not chosen.certified


def test_what_no_film_can_be_made_of(film: WatchedEpisode, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="env must make frames, but its render_mode is None: make"):
        watch("builtin:boat", gym.make("safeshield/Boat-v0"))
    with pytest.raises(ValueError, match="pass the plain environment"):
        watch("builtin:boat", SafetyShield(boat(), "builtin:boat"))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        watch("builtin:boat", boat(), steps=0)
    with pytest.raises(ValueError, match=r"path must end in .mp4 or .gif, got '.*film.avi'"):
        film.save(tmp_path / "film.avi")
    with pytest.raises(ValueError, match="fps must be finite and above 0, got nan"):
        film.save(tmp_path / "film.gif", fps=float("nan"))
    assert list(tmp_path.iterdir()) == []

    @batch_policy
    def lost(observations: Any, rng: np.random.Generator) -> Any:  # noqa: ANN401
        return np.full((len(observations), 2), np.nan)

    with pytest.raises(ValueError, match="the policy returned NaN"):
        watch("builtin:boat", boat(), lost, steps=1)


def test_an_mp4_without_ffmpeg_says_what_to_install(
    film: WatchedEpisode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "safeshield\[video\]", or write a .gif'):
        film.save(tmp_path / "film.mp4")
