"""A log's card and its cost-return picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from safeshield.cli import app
from safeshield.data import DatasetCard, OfflineDataset, card_of
from safeshield.data.card import SafeEpisodes, Spread
from safeshield.data.scatter import draw_scatter


def log_of(
    returns: list[float], costs: list[int], lengths: list[int] | None = None
) -> OfflineDataset:
    """Episodes of these sums; each puts its return on its first step, its cost on the last ones.

    Every second one is terminated.
    """
    lengths = lengths or [max(cost, 1) for cost in costs]
    steps = sum(lengths)
    ends = np.cumsum(lengths) - 1
    rewards, cost = np.zeros(steps), np.zeros(steps)
    terminated, truncated = np.zeros(steps, bool), np.zeros(steps, bool)
    for i, end in enumerate(ends):
        rewards[end + 1 - lengths[i]] = returns[i]
        cost[end + 1 - min(costs[i], lengths[i]) : end + 1] = 1.0
        (terminated if i % 2 else truncated)[end] = True
    return OfflineDataset.from_arrays(
        observations=np.zeros((steps, 3)),
        next_observations=np.zeros((steps, 3)),
        actions=np.zeros((steps, 2)),
        rewards=rewards,
        costs=cost,
        terminated=terminated,
        truncated=truncated,
    )


episodes = st.lists(
    st.tuples(st.integers(-50, 50), st.integers(0, 12), st.integers(12, 15)), min_size=1, max_size=9
)


@given(episodes, st.lists(st.floats(0, 15), max_size=4))
def test_the_card_says_what_a_loop_over_episodes_counts(
    made: list[tuple[int, int, int]], limits: list[float]
) -> None:
    returns, costs, lengths = (list(map(int, column)) for column in zip(*made, strict=True))
    log = log_of([float(r) for r in returns], costs, lengths)
    card = card_of(log, limits=limits)
    assert (card.episodes, card.transitions) == (len(made), sum(lengths))
    assert (card.observation_width, card.action_width) == (3, 2)
    for spread, values in ((card.lengths, lengths), (card.returns, returns), (card.costs, costs)):
        ordered = sorted(values)
        assert (spread.least, spread.greatest) == (ordered[0], ordered[-1])
        assert spread.mean == pytest.approx(sum(values) / len(values))
        for share, quartile in ((0.25, spread.lower), (0.5, spread.median), (0.75, spread.upper)):
            place = share * (len(values) - 1)
            below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
            assert quartile == pytest.approx(below + place % 1 * (above - below))
    assert card.terminated_share == (len(made) // 2) / len(made)
    assert card.violating_episodes == sum(cost > 0 for cost in costs)
    assert [one.limit for one in card.safe] == sorted(set(limits))
    for one in card.safe:
        good = [r for r, c in zip(returns, costs, strict=True) if c <= one.limit]
        assert (one.episodes, one.share) == (len(good), len(good) / len(made))
        assert one.best_return == (max(good) if good else None)


def test_a_card_in_memory_names_no_file() -> None:
    card = card_of(log_of([1.0, 2.0], [0, 3]))
    assert (card.file, card.bytes, card.sha256, card.env_id) == (None, None, None, None)
    assert card.constraint_kind == "binary"
    assert card.constraint_range == (-1.0, 1.0)
    assert [one.limit for one in card.safe] == [0.0, 5.0, 10.0]
    assert "sha256" not in str(card)


def test_a_card_of_a_file_tells_which_file_it_is(tmp_path: Path) -> None:
    path = tmp_path / "SafetyCarRun-v0-40-651.hdf5"
    log = log_of([1.0, 2.0], [0, 3])
    log.save(path)
    card = card_of(path)
    assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (card.file, card.bytes) == (path.name, path.stat().st_size)
    assert card.env_id == "SafetyCarRun-v0"
    assert card == card_of(OfflineDataset.load(path), file=path)
    assert card.contents == "verified"
    assert dataclasses.replace(card, contents="in memory") == card_of(log, file=path)
    assert card_of(path, env_id="Mine-v1").env_id == "Mine-v1"
    path.rename(tmp_path / "SafetyCarRun.hdf5")
    assert card_of(tmp_path / "SafetyCarRun.hdf5").env_id is None
    with pytest.raises(FileNotFoundError):
        card_of(path)


def test_the_card_names_the_environment_that_the_log_was_made_in() -> None:
    made = dataclasses.replace(log_of([1.0], [0]), provenance={"environment": "Ours-v2"})
    assert card_of(made).env_id == "Ours-v2"
    # The name of a class is no id.
    made = dataclasses.replace(made, provenance={"environment": "Ours"})
    assert card_of(made).env_id is None


def test_a_card_is_strict_json_and_readable() -> None:
    card = card_of(log_of([1.5, 2.0, -3.0], [0, 8, 2]), limits=[5, 0])
    read = json.loads(json.dumps(card.to_json(), allow_nan=False))
    assert read == card.to_json()
    assert Spread(**read["returns"]) == card.returns
    safe = tuple(SafeEpisodes(**one) for one in read["safe"])
    spreads = {name: Spread(**read[name]) for name in ("lengths", "returns", "costs")}
    low, high = read["constraint_range"]
    assert DatasetCard(**read | spreads | {"safe": safe, "constraint_range": (low, high)}) == card
    text = str(card)
    assert "11 in 3 episodes" in text
    assert "33% end by termination" in text
    assert "cost <= 0" in text
    assert "66.7% of episodes (2), best return 1.5" in text


@pytest.mark.parametrize("limit", [-1.0, np.nan, np.inf])
def test_limits_are_costs(limit: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"limits must be finite costs.* got {limit}"):
        card_of(log_of([1.0], [0]), limits=[limit])
    with pytest.raises(ValueError, match=f"limit must be a finite cost.* got {limit}"):
        draw_scatter(tmp_path / "a.png", log_of([1.0], [0]), limit=limit)


# The picture


def drawn(
    monkeypatch: pytest.MonkeyPatch,
    log: OfflineDataset,
    **arguments: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    figures: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_scatter("unused.png", log, **arguments)
    return figures[0]


@settings(max_examples=20)
@given(episodes, st.integers(0, 13))
def test_every_episode_is_drawn_once_in_the_colour_of_its_side(
    made: list[tuple[int, int, int]], limit: int
) -> None:
    returns, costs, lengths = (list(map(int, column)) for column in zip(*made, strict=True))
    log = log_of([float(r) for r in returns], costs, lengths)
    with pytest.MonkeyPatch.context() as patch:
        axes = drawn(patch, log, limit=float(limit)).axes[0]
    points = []
    for collection in axes.collections:
        marks = np.asarray(collection.get_offsets())
        colours = {tuple(np.round(colour[:3], 3)) for colour in collection.get_facecolors()}
        for cost, value in marks:
            points.append((float(cost), float(value), min(colours)))
    assert sorted((c, r) for c, r, _ in points) == sorted(zip(costs, returns, strict=True))
    sides = {colour: {c <= limit for c, _, other in points if other == colour}
             for _, _, colour in points}  # fmt: skip
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) == len({c <= limit for c in costs})
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    good = [(r, c) for r, c in zip(returns, costs, strict=True) if c <= limit]
    assert len(stars) == bool(good)
    if good:
        assert stars[0].get_ydata() == [max(good)[0]]
        assert stars[0].get_xdata()[0] <= limit
    left, right = axes.get_xlim()
    assert -1.0 < left < 0.0
    assert right > max(*costs, limit)
    assert axes.get_xscale() == ("symlog" if max(costs) > 5 * (limit or 1) else "linear")


def test_the_picture_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of([1.0, 9.0, -3.0], [0, 8, 2])
    figure = drawn(monkeypatch, log, limit=5.0, title="Some-v0")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "cost of an episode, steps in violation"
    assert axes.get_ylabel() == "return of an episode, sum of rewards"
    assert axes.get_title(loc="left") == "Some-v0"
    (right,) = axes.child_axes
    assert right.get_ylabel().startswith("normalised return")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "cost at most 5: 2 of 3 episodes",
        "above it: 1",
        "ended by termination: 1",
        "cost limit 5",
        "best within it: return 1",
    ]


def test_costs_far_beyond_the_limit_leave_room_for_the_safe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = log_of([1.0, 9.0, -3.0], [0, 1000, 10])
    axes = drawn(monkeypatch, log, limit=10.0).axes[0]
    assert axes.get_xlabel().endswith("(logarithmic above 10)")
    start, limit, end = axes.transAxes.inverted().transform(
        axes.transData.transform([(0, 0), (10, 0), (1000, 0)])
    )[:, 0]
    assert limit - start > 0.3
    assert end < 1.0
    axes.figure.canvas.draw()
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert texts == ["0", "5", "10", "20", "50", "100", "200", "500"]


# The command


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_inspect_shows_the_card_and_draws(tmp_path: Path) -> None:
    path, picture = tmp_path / "log.hdf5", tmp_path / "log.png"
    log_of([1.0, 9.0, -3.0], [0, 8, 2]).save(path)
    assert run(path).strip() == str(card_of(path))
    read = json.loads(run(path, "--json", "--picture", picture, "--cost-limit", 8))
    assert read == {"kind": "log", **card_of(path, limits=[8.0]).to_json()}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_refuses_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "log.hdf5"
    log_of([1.0], [0]).save(path)
    assert "--picture must end in .png" in run(path, "--picture", tmp_path / "a.csv", code=2)
    assert "make the folder" in run(path, "--picture", tmp_path / "no" / "a.png", code=2)
    path.write_bytes(path.read_bytes()[:-9])
    refused = run(path, "--picture", tmp_path / "a.png", code=2)
    assert "log.hdf5 is damaged" in refused
    assert not (tmp_path / "a.png").exists()
