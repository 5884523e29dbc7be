"""Points of spaces as rows: what Gymnasium's own flattening says, and back."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from safeshield.data import OfflineDataset
from safeshield.spaces.batches import batch_length, take
from safeshield.spaces.rows import SpaceCodec, fitted, flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import part_of

MIXED = gym.spaces.Dict(
    at=gym.spaces.Discrete(5, start=2),
    image=gym.spaces.Box(0, 255, (2, 3), np.uint8),
    deep=gym.spaces.Dict(v=gym.spaces.Box(-1, 1, (2,)), flags=gym.spaces.MultiBinary(2)),
    gears=gym.spaces.MultiDiscrete([3, 2]),
)
SPACES: list[gym.Space[Any]] = [
    gym.spaces.Box(-1, 1, (3,)),
    gym.spaces.Box(-1, 1, (2, 2)),
    gym.spaces.Discrete(4, start=-1),
    gym.spaces.MultiDiscrete([2, 3]),
    gym.spaces.MultiBinary(3),
    MIXED,
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_batch_is_its_points_stacked(space: gym.Space[Any]) -> None:
    space.seed(0)
    flat = flat_observations(space)
    points = [space.sample() for _ in range(7)]
    singles = [flat.flatten(point) for point in points]
    assert all(single for _, single in singles)
    stacked = gym.vector.utils.concatenate(
        space, points, gym.vector.utils.create_empty_array(space, 7)
    )
    rows, single = flat.flatten(stacked)
    assert not single
    assert rows.shape == (7, flat.width)
    np.testing.assert_array_equal(rows, np.concatenate([row for row, _ in singles]))
    assert flat.contains(rows).all()
    assert batch_length(stacked) == 7
    np.testing.assert_array_equal(flat.flatten(take(stacked, 3))[0], singles[3][0])


@pytest.mark.parametrize("space", SPACES[:5], ids=str)
def test_points_undo_rows(space: gym.Space[Any]) -> None:
    space.seed(1)
    flat = flat_actions(space)
    for _ in range(5):
        point = space.sample()
        back = flat.unflatten(flat.flatten(point)[0])[0]
        np.testing.assert_array_equal(back, point)
        assert space.contains(back if np.ndim(point) else int(back))
    if flat.discrete:
        assert len(np.unique(flat.choices, axis=0)) == np.prod(flat.categories)
        assert flat.contains(flat.choices).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_batch_comes_back_from_its_rows(space: gym.Space[Any]) -> None:
    space.seed(2)
    flat = flat_observations(space)
    points = [space.sample() for _ in range(4)]
    back = flat.batch(np.concatenate([flat.flatten(point)[0] for point in points]))
    assert batch_length(back) == 4
    for i, point in enumerate(points):
        one = take(back, i)
        np.testing.assert_array_equal(flat.flatten(one)[0], flat.flatten(point)[0])
        if isinstance(space, gym.spaces.Dict):
            assert space.contains({**one, "at": int(one["at"])})
            assert {key: part.dtype for key, part in one["deep"].items()} == {
                key: part.dtype for key, part in point["deep"].items()
            }


def test_features_are_gymnasiums_flattening_where_things_are_counted() -> None:
    # Gymnasium's flatten makes indicators too, entry by entry; ours come after the numbers.
    space = gym.spaces.MultiDiscrete([3, 2])
    flat = flat_observations(space)
    zero = np.zeros(2, np.float32)
    scaling = Scaling(zero, zero + 1, zero, zero + 1, flat.categories, flat.categories)
    assert scaling.observation_features == scaling.action_features == 5
    for point in flat.choices.astype(np.int64):
        expected = gym.spaces.flatten(space, point)
        np.testing.assert_array_equal(scaling.observations(point[None])[0], expected)
        np.testing.assert_array_equal(scaling.actions(point[None])[0], expected)


def test_numbers_come_before_indicators() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Discrete(3, start=1), b=gym.spaces.Box(-9, 9, (1,)))
    flat = flat_observations(space)
    scaling = Scaling(
        np.array([1, 2], "f4"), np.array([1, 4], "f4"), np.zeros(1, "f4"), np.ones(1, "f4"),
        flat.categories,
    )  # fmt: skip
    rows, _ = flat.flatten({"a": 3, "b": [6.0]})
    assert scaling.observations(rows).tolist() == [[1.0, 0.0, 0.0, 1.0]]
    flats = flat_observations(space), flat_actions(gym.spaces.Box(0, 1, (1,)))
    again = Scaling.from_json(scaling.to_json(), *flats)
    np.testing.assert_array_equal(again.observations(rows), scaling.observations(rows))
    for broken in ({"observation_categories": [3]}, {"observation_categories": [4, 0]}):
        with pytest.raises(ValueError, match="must be those of the space"):
            Scaling.from_json(scaling.to_json() | broken, *flats)


def test_what_does_not_lie_inside() -> None:
    flat = flat_actions(gym.spaces.MultiDiscrete([2, 3]))
    rows = np.array([[0, 2], [1, 3], [-1, 0], [0.5, 0], [np.nan, 0]])
    assert flat.contains(rows).tolist() == [True, False, False, False, False]


def test_other_spaces_and_points_are_errors_that_say_what_is_supported() -> None:
    for space in (gym.spaces.Text(3), gym.spaces.Tuple([gym.spaces.Discrete(2)])):
        with pytest.raises(TypeError, match=r"observation_space must be Box .any shape., Discrete"):
            flat_observations(space)
        with pytest.raises(TypeError, match="action_space must be bounded Box"):
            flat_actions(space)
    for space in (MIXED, gym.spaces.MultiBinary(11), gym.spaces.Box(0, 1, (0,))):
        with pytest.raises(TypeError, match="action_space must be bounded Box"):
            flat_actions(space)
    with pytest.raises(TypeError, match="must not be empty"):
        flat_observations(gym.spaces.Box(0, 1, (0,)))
    flat = SpaceCodec(MIXED)
    with pytest.raises(ValueError, match="must be a dict with the entries"):
        flat.flatten({"at": 1})
    with pytest.raises(ValueError, match="must be numbers of shape"):
        SpaceCodec(gym.spaces.Discrete(3)).flatten([[1, 2]])
    for keys in ([], ["nothing"]):
        with pytest.raises(ValueError, match="observation_keys must be some of"):
            part_of(MIXED, keys)
    with pytest.raises(ValueError, match="no Dict space"):
        part_of(gym.spaces.Discrete(2), ["a"])


def test_a_log_of_dicts_and_integers_round_trips(tmp_path: Any) -> None:  # noqa: ANN401
    space = gym.spaces.Dict(at=gym.spaces.Discrete(9), v=gym.spaces.Box(-1, 1, (2,)))
    rng = np.random.default_rng(0)
    seen = {"at": rng.integers(0, 9, 7), "v": rng.uniform(-1, 1, (7, 2)).astype("f4")}
    arrays: dict[str, Any] = {
        "observations": {key: value[:-1] for key, value in seen.items()},
        "next_observations": {key: value[1:] for key, value in seen.items()},
        "actions": rng.integers(0, 3, 6),
        "rewards": np.zeros(6),
        "terminated": np.arange(6) == 5,
        "truncated": np.zeros(6, bool),
        "costs": np.arange(6) == 5,
    }
    spaces: dict[str, Any] = {"observation_space": space, "action_space": gym.spaces.Discrete(3)}
    log = OfflineDataset.from_arrays(**arrays, **spaces)
    assert log.observations.shape == (6, 3)
    assert log.actions.shape == (6, 1)
    np.testing.assert_array_equal(log.observations[:, 0], seen["at"][:-1])
    for name in ("log.hdf5", "log.npz"):
        log.save(tmp_path / name)
        back = OfflineDataset.load(tmp_path / name, **spaces)
        np.testing.assert_array_equal(back.actions, log.actions)
        np.testing.assert_array_equal(back.next_observations, log.next_observations)
        assert back.observation_space == space
    for wrong in ({"actions": arrays["actions"] + 2}, {"actions": arrays["actions"] + 0.5}):
        with pytest.raises(ValueError, match="actions must"):
            OfflineDataset.from_arrays(**{**arrays, **wrong}, **spaces)


@pytest.mark.parametrize("kind", ["i1", "u1", "i4", "i8", "u8"])
def test_integers_take_what_they_hold_and_leave_the_rest_as_it_came(kind: str) -> None:
    limits = np.iinfo(kind)
    inside = [limits.min, 0, 1, limits.max]
    for given in (np.array(inside, kind), np.array([0.0, 100.0]), np.array([True, False])):
        taken = fitted(given, np.dtype(kind))
        assert taken.dtype == kind
        assert taken.tolist() == [int(number) for number in given]
    outside = [1.5, np.nan, np.inf, -np.inf, float(limits.max) * 2, 2.0**64, -(2.0**64)]
    if kind != "u8":
        outside += [np.uint64(limits.max) + np.uint64(1), np.uint64(2**64 - 1)]
    if kind == "i8":
        outside.append(2.0**63)  # as a float, the largest int64 is equal to it
    if kind.startswith("u"):
        outside += [-1, -1.0]
    for number in outside:
        for array in (np.array(number), np.array([0, number])):
            assert fitted(array, np.dtype(kind)) is array


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_floats_take_the_nearest_number_and_none_becomes_infinite(kind: str) -> None:
    dtype = np.dtype(kind)
    given = np.array([[0.1, -0.3], [np.nan, np.inf]])
    taken = fitted(given, dtype)
    assert taken.tobytes() == given.astype(kind).tobytes()
    assert fitted(np.array([3, -4]), dtype).tobytes() == np.array([3, -4], kind).tobytes()
    if kind != "f8":
        large = np.array([0.0, 1e300])
        most = np.finfo(dtype).max
        assert fitted(large, dtype).tolist() == [0.0, most]
        assert fitted(-large, dtype).tolist() == [0.0, -most]
    words, objects = np.array(["a"]), np.array([None])
    assert fitted(words, dtype) is words
    assert fitted(objects, dtype) is objects
