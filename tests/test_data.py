"""Logs: their rules, labels, episodes, files and spaces."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeshield.algorithms.r2pac.chunks import log_window
from safeshield.data import OfflineDataset, binary_labels, label_reach
from safeshield.data.card import card_of
from safeshield.data.storage import DSRL_KEYS
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import check_same_space, space_from_json, space_to_json
from safeshield.training.log import LogTensors
from safeshield.values.backup import window_ends

FIELDS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminated",
    "truncated",
    "costs",
    "constraints",
    "next_constraints",
)


def arrays(lengths: tuple[int, ...] = (3, 1, 4), seed: int = 0) -> dict[str, Any]:
    """Random fields of a continuous log; episodes end by termination and truncation in turn."""
    rng = np.random.default_rng(seed)
    steps = sum(lengths)
    ends = np.cumsum(lengths) - 1
    states = [rng.normal(size=(length + 1, 2)).astype(np.float32) for length in lengths]
    observations = np.concatenate([s[:-1] for s in states])
    after = np.concatenate([s[1:] for s in states])
    terminated, truncated = np.zeros(steps, bool), np.zeros(steps, bool)
    terminated[ends[::2]], truncated[ends[1::2]] = True, True
    return {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (steps, 1)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "next_observations": after,
        "terminated": terminated,
        "truncated": truncated,
        "costs": (after[:, 0] > 0).astype(np.float32),
        "constraints": observations[:, 0],
        "next_constraints": after[:, 0],
    }


def log(lengths: tuple[int, ...] = (3, 1, 4), seed: int = 0) -> OfflineDataset:
    return OfflineDataset.from_arrays(**arrays(lengths, seed))


def plain(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """The arrays of a DSRL file: float flags, no labels."""
    fields = arrays()
    del fields["constraints"], fields["next_constraints"]
    fields["terminals"] = fields.pop("terminated").astype(np.float32)
    fields["timeouts"] = fields.pop("truncated").astype(np.float32)
    return fields | changes


def write(path: Path, fields: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **fields)
        return path
    with h5py.File(path, "w") as file:
        for key, value in fields.items():
            file[key] = value
    return path


def assert_same(one: OfflineDataset, other: OfflineDataset) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name, strict=True)
    assert one.constraint_kind == other.constraint_kind
    for name in ("observation_space", "action_space"):
        assert space_to_json(getattr(one, name)) == space_to_json(getattr(other, name))


# Labels


def test_cost_labels_the_state_reached() -> None:
    now, after = binary_labels([0, 1, 1, 0, 0, 2], [0, 3, 4])
    assert after.tolist() == [-1, 1, 1, -1, -1, 1]
    assert now.tolist() == [-1, -1, 1, -1, -1, -1]
    assert now.dtype == after.dtype == np.float32


def test_initial_costs_label_first_states_alone() -> None:
    now, _ = binary_labels([0, 1, 0], [0, 2], initial_costs=[0, 3])
    assert now.tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0]), "costs must have shape"),
        (([0.0], [1]), "episode_starts must ascend from 0"),
        (([0.0, 0.0, 0.0], [0, 2, 2]), "episode_starts"),
        (([0.0], [0], [0, 0]), "initial_costs"),
    ],
)
def test_bad_label_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binary_labels(*arguments)


@given(st.floats(0.01, 1e4), st.floats(0.5, 0.9999))
def test_reach_is_where_the_discounted_label_changes_sign(magnitude: float, g: float) -> None:
    reach = label_reach(magnitude, g)
    value = [(1 + magnitude) * g**k - 1 for k in (reach * 0.999, reach * 1.001)]
    assert value[0] > 0 > value[1]


def test_reach_of_the_published_labels() -> None:
    assert round(label_reach(25, 0.99)) == 324
    assert round(label_reach(1, 0.99)) == 69
    with pytest.raises(ValueError, match="discount"):
        label_reach(1, 1.0)


# Rules of a log


def test_arrays_are_read_only_and_apart_from_the_callers() -> None:
    fields = arrays()
    data = OfflineDataset.from_arrays(**fields)
    before = data.observations.copy()
    fields["observations"][:] = 9.0
    np.testing.assert_array_equal(data.observations, before)
    again = pickle.loads(pickle.dumps(data))
    for each in (data, copy.deepcopy(data), again, data.episodes[0], data.select([1])):
        for name in FIELDS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(each, name)[0] = 0
    assert_same(data, again)


def bad(name: str, index: int, value: float) -> dict[str, Any]:
    fields = arrays()
    fields[name][index] = value
    return fields


def without_last_end() -> dict[str, Any]:
    fields = arrays()
    fields["terminated"][-1] = False
    return fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (bad("rewards", 4, np.nan), r"rewards must be finite.*rewards\[4\] \(episode 2\)"),
        (bad("observations", 3, np.inf), r"observations\[3\] \(episode 1\)"),
        (bad("actions", 5, 1.00001), r"actions\[5\] \(episode 2\).*pass action_space="),
        (bad("next_constraints", 0, 7.0), r"index 0 \(episode 0\).*label each state once"),
        (bad("constraints", 6, 7.0), r"index 5 \(episode 2\)"),
        (without_last_end(), r"last step must end.*index 7 \(episode 2\)"),
        (arrays() | {"rewards": np.zeros((8, 1))}, r"rewards must have shape \(N,\)"),
        (
            arrays()
            | {"costs": None}
            | {name: np.full((8, 1), -0.5) for name in ("constraints", "next_constraints")},
            r"next_constraints must have shape \(N,\)",
        ),
        (arrays() | {"costs": np.zeros(7)}, "same first axis N"),
        (arrays() | {"next_observations": np.zeros((8, 3))}, "wide as observation_space"),
        (arrays() | {"terminated": np.full(8, 0.5)}, "terminated must hold booleans"),
        (arrays() | {"constraint_kind": "fuzzy"}, "constraint_kind must be"),
        (arrays() | {"constraints": None}, "given together"),
        ({k: v[:0] for k, v in arrays().items()}, "at least 1 transition"),
    ],
)
def test_broken_rules_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(**fields)


def test_a_step_that_is_terminated_and_truncated_is_terminated() -> None:
    fields = arrays()
    fields["truncated"] = fields["truncated"] | fields["terminated"]
    found = OfflineDataset.from_arrays(**fields)
    assert_same(found, log())
    with pytest.raises(ValueError, match=r"exclude each other.*index 2 \(episode 0\)"):
        dataclasses.replace(found, truncated=fields["truncated"])


@pytest.mark.parametrize("wrong", [[2], [2, 5, 6, 7]])
def test_labels_that_contradict_some_costs_are_told(wrong: list[int]) -> None:
    fields = arrays()
    fields["costs"][wrong] = 1 - fields["costs"][wrong]
    clause = rf"contradicts the logged cost in {len(wrong)} of 8 .* first is row 2, where h = .* is"
    with pytest.warns(UserWarning, match=f"next_constraints {clause} {fields['costs'][2]:g}"):
        OfflineDataset.from_arrays(**fields)


@pytest.mark.parametrize("names", [("constraints", "next_constraints"), ("costs",)])
def test_a_turned_sign_is_refused(names: tuple[str, ...]) -> None:
    fields = arrays()
    for name in names:
        fields[name] = -fields[name] if name != "costs" else 1 - fields[name]
    message = r"contradicts the logged cost in 8 of 8 .* first is row 0.*Check the sign"
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(**fields)


def test_costs_in_place_of_h_are_refused() -> None:
    fields = arrays()
    for name in ("constraints", "next_constraints"):
        fields[name] = (fields[name] > 0).astype(int)
    with pytest.raises(ValueError, match=r"hold only 0 and 1.*pass costs=next_constraints"):
        OfflineDataset.from_arrays(**fields)
    kept = OfflineDataset.from_arrays(**fields, constraint_kind="continuous")
    assert kept.next_constraints.max() == 1


@pytest.mark.parametrize("shift", [0, -1, 2])
def test_next_observations_of_another_row_are_refused(shift: int) -> None:
    fields = arrays((9, 1, 8))
    fields["next_observations"] = np.roll(fields["observations"], -shift, axis=0)
    found = re.escape(f"observations[t{shift:+d}]" if shift else "observations[t]")
    message = rf"differs from observations\[t\+1\] in 15 of 15 .* row 0 .*It is {found} in"
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(**fields)


def test_rows_that_do_not_follow_each_other_are_told() -> None:
    fields = arrays()
    fields["next_observations"] = fields["next_observations"].copy()
    fields["next_observations"][5] += 0.1
    message = r"differs .* in 1 of 5 rows .* by up to 0\.1; the first is row 5 \(episode 2\)"
    with pytest.warns(UserWarning, match=message):
        OfflineDataset.from_arrays(**fields)


def test_a_sound_log_gives_no_warning() -> None:
    fields = arrays()
    # Rounding is no difference.
    fields["next_observations"] = fields["next_observations"] * np.float32(1 + 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OfflineDataset.from_arrays(**fields)


def test_action_at_the_bound_up_to_rounding_is_inside() -> None:
    fields = arrays()
    fields["actions"][0] = np.nextafter(np.float32(1), np.float32(2))
    assert OfflineDataset.from_arrays(**fields).actions[0, 0] > 1


def test_binary_labels_take_two_values() -> None:
    with pytest.raises(ValueError, match="binary labels must be -1 or one value above 0"):
        OfflineDataset.from_arrays(**arrays(), constraint_kind="binary")


def test_spaces_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="as wide as observation_space"):
        OfflineDataset.from_arrays(**arrays(), observation_space=gym.spaces.Box(-1, 1, (3, 1)))
    with pytest.raises(ValueError, match="actions must be integers of Discrete"):
        OfflineDataset.from_arrays(**arrays(), action_space=gym.spaces.Discrete(9, start=-4))
    with pytest.raises(TypeError, match=r"observation_space must be Box .any shape., Discrete"):
        OfflineDataset.from_arrays(
            **arrays(), observation_space=gym.spaces.Tuple([gym.spaces.Discrete(2)])
        )
    with pytest.raises(TypeError, match="action_space must be bounded Box"):
        OfflineDataset.from_arrays(**arrays(), action_space=gym.spaces.MultiBinary(12))


def test_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="rewards must hold numbers"):
        OfflineDataset.from_arrays(**arrays() | {"rewards": ["a"] * 8})


# Episodes


def test_episode_statistics() -> None:
    data = log()
    assert len(data) == 8
    assert data.episode_starts.tolist() == [0, 3, 4]
    assert data.episode_lengths.tolist() == [3, 1, 4]
    np.testing.assert_allclose(data.returns, [e.rewards.sum() for e in data.episodes], rtol=1e-6)
    np.testing.assert_allclose(data.episode_costs, [e.costs.sum() for e in data.episodes])
    slow = [max(e.constraints.max(), e.next_constraints.max()) > 0 for e in data.episodes]
    assert data.violating_episodes.tolist() == slow


def test_a_violation_in_the_first_or_the_last_state_counts() -> None:
    fields = arrays((2, 2, 2))
    fields["constraints"] = np.array([1, -1, -1, -1, -1, -1.0])
    fields["next_constraints"] = np.array([-1, -1, -1, 1, -1, -1.0])
    assert OfflineDataset.from_arrays(**fields).violating_episodes.tolist() == [True, True, False]


def test_episodes_share_memory_and_make_up_the_log() -> None:
    data = log()
    assert len(data.episodes) == data.num_episodes == 3
    assert all(np.shares_memory(e.observations, data.observations) for e in data.episodes)
    assert_same(OfflineDataset.concat(data.episodes), data)
    assert_same(data.episodes[-1], data.episodes[2])
    assert [len(e) for e in data.episodes[1:]] == [1, 4]
    with pytest.raises(IndexError, match="3 episodes"):
        data.episodes[3]


def test_select_takes_episodes_in_the_order_asked() -> None:
    data = log()
    chosen = data.select([2, 0, 2])
    assert chosen.episode_lengths.tolist() == [4, 3, 4]
    assert_same(chosen.episodes[0], data.episodes[2])
    assert_same(chosen.episodes[1], data.episodes[0])


@pytest.mark.parametrize("indices", [[], [3], [-1], [0.0], [True, False, True], [[0]]])
def test_bad_selections(indices: list[Any]) -> None:
    with pytest.raises(ValueError, match="episode_indices"):
        log().select(indices)


@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_split_parts_the_episodes(count: int, fraction: float, seed: int) -> None:
    data = log(tuple(1 + i % 3 for i in range(count)), seed=count)
    size = round(fraction * count)
    if not 0 < size < count:
        with pytest.raises(ValueError, match="both sides"):
            data.split(fraction, seed)
        return
    train, held_out = data.split(fraction, seed)
    assert (train.num_episodes, held_out.num_episodes) == (size, count - size)
    firsts = {float(e.rewards[0]) for part in (train, held_out) for e in part.episodes}
    assert firsts == {float(e.rewards[0]) for e in data.episodes}
    assert_same(data.split(fraction, seed)[0], train)


def test_bad_fractions() -> None:
    for fraction in (0.0, 1.0, -0.5, np.nan):
        with pytest.raises(ValueError, match="fraction must lie inside"):
            log().split(fraction, 0)


def test_concatenation_needs_the_same_task() -> None:
    wide = OfflineDataset.from_arrays(**arrays(), action_space=gym.spaces.Box(-2, 2, (1,)))
    binary = OfflineDataset.from_arrays(
        **{k: v for k, v in arrays().items() if "constraints" not in k}
    )
    for parts, message in (
        ([], "at least one"),
        ([log(), wide], r"action_space of datasets\[1\] mismatch.* join logs of one environment"),
        ([log(), binary], "constraint_kind"),
        ([log(), dataclasses.replace(log(), constraint_source="x@1")], "constraint_source"),
    ):
        with pytest.raises(ValueError, match=message):
            OfflineDataset.concat(parts)
    with pytest.raises(TypeError, match=r"must be an OfflineDataset, got str; read a file by"):
        OfflineDataset.concat([log(), "log.hdf5"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"must be a list of datasets, got one; write \[a, b\]"):
        OfflineDataset.concat(log())  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(1, 8))
def test_no_window_crosses_from_one_log_into_the_next(lengths: list[int], steps: int) -> None:
    """Windows of joined logs are the windows of the logs, one after the other."""
    parts = [log((length, 2), seed=i) for i, length in enumerate(lengths)]
    joined = OfflineDataset.concat(parts)
    assert joined.episode_lengths.tolist() == [n for part in parts for n in part.episode_lengths]
    assert_same(joined, OfflineDataset.concat(joined.episodes))
    scaling = Scaling.of(joined)

    def windows(one: OfflineDataset) -> tuple[torch.Tensor, ...]:
        tensors = LogTensors.of(one, scaling, torch.device("cpu"))
        rows = torch.arange(len(one))
        end = window_ends(tensors.episode_last, rows, steps)
        sums = log_window(tensors, rows, steps, tensors.rewards, 0.9)
        return tensors.next_observations[end], *sums

    for whole, each in zip(windows(joined), zip(*map(windows, parts), strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(each), rtol=0, atol=0)


def test_a_joined_log_tells_how_each_part_was_made() -> None:
    """What all parts share stays at the top, where a card looks for the environment."""
    made = [
        {"environment": "Boat-v0", "seed": 1, "policy": "random"},
        {"environment": "Boat-v0", "seed": 2},
    ]
    one, other = (dataclasses.replace(log(), provenance=part) for part in made)
    assert OfflineDataset.concat([one, one]).provenance == made[0]
    joined = OfflineDataset.concat([one, other])
    assert joined.provenance == {
        "environment": "Boat-v0",
        "parts": [
            {"transitions": 8, "seed": 1, "policy": "random"},
            {"transitions": 8, "seed": 2},
        ],
    }
    assert card_of(joined).env_id == "Boat-v0"
    assert card_of(joined).episodes == 6
    assert card_of(joined).costs.mean == card_of(one).costs.mean


def test_the_label_of_unsafe_states_can_be_changed() -> None:
    """The signs stay, and so do the logs that are joined, whatever their labels were."""
    fields = {k: v for k, v in arrays().items() if "constraints" not in k}
    data = OfflineDataset.from_arrays(**fields)
    far = data.with_label_magnitude(25.0)
    np.testing.assert_array_equal(far.constraints, np.where(data.constraints > 0, 25.0, -1.0))
    np.testing.assert_array_equal(far.next_constraints > 0, data.costs > 0)
    assert far.next_constraints.max() == 25.0
    assert_same(far.with_label_magnitude(1.0), data)
    assert_same(OfflineDataset.concat([far, data]), OfflineDataset.concat([data, data]))
    for magnitude in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="magnitude"):
            data.with_label_magnitude(magnitude)
    with pytest.raises(ValueError, match="continuous"):
        log().with_label_magnitude(1.0)


def test_summary_tells_sizes() -> None:
    text = log().summary()
    assert "8 in 3 episodes of 1 to 4 steps, 67% of them terminated" in text
    assert "continuous" in text


# Files


@pytest.mark.parametrize("suffix", [".hdf5", ".h5", ".npz"])
@pytest.mark.parametrize("kind", ["continuous", "binary"])
def test_round_trip_is_exact(tmp_path: Path, suffix: str, kind: str) -> None:
    fields = arrays()
    if kind == "binary":
        del fields["constraints"], fields["next_constraints"]
    data = OfflineDataset.from_arrays(
        **fields,
        observation_space=gym.spaces.Box(
            np.array([-3.1, -np.inf]), np.array([0.1, 7.0]), dtype=np.float64
        ),
        action_space=gym.spaces.Box(-1.5, 1.1, (1,), np.float64),
    )
    if kind == "binary":
        data = data.with_label_magnitude(3.0)
    path = tmp_path / f"log{suffix}"
    path.write_bytes(b"an older file")
    data.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    read = OfflineDataset.load(path)
    assert read.constraint_kind == kind
    assert_same(read, data)
    assert read.observation_space.dtype == data.observation_space.dtype


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_saved_file_is_a_dsrl_file(tmp_path: Path, suffix: str) -> None:
    data, path = log(), tmp_path / f"log{suffix}"
    data.save(path)
    if suffix == ".npz":
        stored = dict(np.load(path, allow_pickle=False))
        del stored["safeshield"]
    else:
        with h5py.File(path) as file:
            stored = {key: file[key][()] for key in file}
    assert set(stored) == {*DSRL_KEYS, "constraints", "next_constraints"}
    assert all(len(value) == len(data) for value in stored.values())
    np.testing.assert_array_equal(stored["terminals"], data.terminated)
    np.testing.assert_array_equal(stored["timeouts"], data.truncated)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_plain_dsrl_gets_binary_labels(tmp_path: Path, suffix: str) -> None:
    fields = plain(extra=np.zeros(3))
    path = write(tmp_path / f"log{suffix}", fields)
    data = OfflineDataset.load(path)
    starts = data.episode_starts
    now, after = binary_labels(fields["costs"], starts)
    np.testing.assert_array_equal(data.constraints, now)
    np.testing.assert_array_equal(data.next_constraints, after)
    assert data.constraint_kind == "binary"
    assert data.terminated.dtype == np.bool_
    assert data.action_space == gym.spaces.Box(-1, 1, (1,))
    assert np.isinf(data.observation_space.high).all()
    assert OfflineDataset.load(path).next_constraints.max() == 1.0


def test_wide_actions_ask_for_the_space(tmp_path: Path) -> None:
    path = write(tmp_path / "log.hdf5", plain(actions=np.full((8, 1), 3.0)))
    with pytest.raises(ValueError, match=r"log\.hdf5: actions must lie.*pass action_space="):
        OfflineDataset.load(path)
    assert OfflineDataset.load(path, action_space=gym.spaces.Box(-3, 3, (1,))).actions.max() == 3


def test_a_given_space_must_agree_with_the_stored_one(tmp_path: Path) -> None:
    log().save(tmp_path / "log.npz")
    OfflineDataset.load(tmp_path / "log.npz", action_space=gym.spaces.Box(-1, 1, (1,), np.float64))
    with pytest.raises(ValueError, match="action_space mismatch"):
        OfflineDataset.load(tmp_path / "log.npz", action_space=gym.spaces.Box(-2, 2, (1,)))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_missing_keys_are_listed(tmp_path: Path, suffix: str) -> None:
    fields = plain()
    del fields["costs"], fields["timeouts"]
    path = write(tmp_path / f"log{suffix}", fields)
    with pytest.raises(ValueError, match=r"missing keys \['costs', 'timeouts'\]; present keys \["):
        OfflineDataset.load(path)
    path = write(tmp_path / f"half{suffix}", plain(constraints=np.zeros(8)))
    with pytest.raises(ValueError, match=r"missing keys \['next_constraints'\]"):
        OfflineDataset.load(path)


def test_unknown_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.hdf5, \.h5 or \.npz"):
        OfflineDataset.load(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="must end in"):
        log().save(tmp_path / "log.pkl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        OfflineDataset.load(tmp_path / "log.npz")
    with pytest.raises(FileNotFoundError, match="make the folder"):
        log().save(tmp_path / "absent" / "log.npz")


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_damaged_files_are_value_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    log((50, 60)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"text", whole[:40], whole[: len(whole) // 2], whole[:-30]]
    data = OfflineDataset.load(path)
    for part in damaged:
        path.write_bytes(part)
        with pytest.raises(ValueError, match="damaged or not a log"):
            OfflineDataset.load(path)
    for _ in range(100):
        text = bytearray(whole)
        text[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(text)
        # A flip in bytes that nothing reads changes nothing; any other is a ValueError.
        try:
            read = OfflineDataset.load(path)
        except ValueError:
            continue
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(read, name), getattr(data, name))


def test_hostile_files_run_and_allocate_nothing(tmp_path: Path) -> None:
    objects = tmp_path / "objects.npz"
    np.savez(objects, **plain(rewards=np.array([print] * 8, dtype=object)))
    with pytest.raises(ValueError, match="must hold numbers"):
        OfflineDataset.load(objects)

    huge = tmp_path / "huge.hdf5"
    fields = plain()
    del fields["rewards"]
    write(huge, fields)
    with h5py.File(huge, "a") as file:
        file.create_dataset("rewards", shape=(10**12,), chunks=(1024,), dtype="f4")
    with pytest.raises(ValueError, match="claims"):
        OfflineDataset.load(huge)

    elsewhere = tmp_path / "elsewhere.hdf5"
    write(elsewhere, fields)
    with h5py.File(elsewhere, "a") as file:
        file["rewards"] = h5py.ExternalLink(str(write(tmp_path / "other.hdf5", plain())), "rewards")
    with pytest.raises(ValueError, match="'rewards' is not an array stored in this file"):
        OfflineDataset.load(elsewhere)


def test_headers_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"
    log().save(path)
    stored = dict(np.load(path))
    header = json.loads(stored["safeshield"].tobytes())
    del header["sha256"]  # as in files of earlier releases

    def load_with(text: str) -> None:
        np.savez(path, **stored | {"safeshield": np.frombuffer(text.encode(), np.uint8)})
        OfflineDataset.load(path)

    load_with(json.dumps(header))
    big = header["action_space"] | {"shape": [10**9]}
    for text, message in (
        ("[1]", "JSON object"),
        ('{"a": NaN}', "not strict JSON"),
        ("[" * 100_000, "JSON"),
        (json.dumps(header | {"version": 99}), "newer safeshield"),
        (json.dumps(header | {"more": 1}), "must have the fields"),
        (json.dumps(header | {"constraint_kind": 3}), "constraint_kind"),
        (json.dumps(header | {"action_space": big}), "1000000000 numbers, more than the limit"),
        (
            json.dumps(header | {"action_space": {"type": "Discrete", "n": 2, "start": 0}}),
            "Discrete",
        ),
        (
            json.dumps(header | {"action_space": {"type": "Dict", "spaces": [["a", BOX]]}}),
            "action_space must be",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_with(text)


def _edited_log(path: Path, change: str) -> None:
    """Write a log to `path` and change one thing in it, with the tools of its format."""
    log().save(path)
    if path.suffix == ".npz":
        stored = dict(np.load(path))
        comment = zipfile.ZipFile(path).comment
        header = json.loads(stored["safeshield"].tobytes())
    else:
        with h5py.File(path) as file:
            stored = {key: file[key][()] for key in file}
            marks = dict(file.attrs)
        header = json.loads(marks.pop("safeshield").tobytes())
    if change == "data":
        stored["rewards"][3] += 1.0
    elif change == "dtype":
        stored["rewards"] = stored["rewards"].astype(np.float64)
    elif change == "another member":
        stored["more"] = np.zeros(3)
    elif change == "names":
        stored["rewards"], stored["costs"] = stored["costs"], stored["rewards"]
    elif change == "provenance":
        header["provenance"] = {"environment": "Other-v0"}
    elif change == "space":
        header["observation_space"]["low"] = -7.0
    elif change == "digest":
        del header["sha256"]
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    name = "safeshielf" if change == "hidden header" else "safeshield"
    if path.suffix == ".npz":
        stored.pop("safeshield")
        np.savez(path, **stored, **{name: text})
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
    else:
        with h5py.File(path, "w") as file:
            for key, array in stored.items():
                file[key] = array
            file.attrs.update(marks)
            file.attrs[name] = text


CHANGES = [
    "data",
    "dtype",
    "another member",
    "names",
    "provenance",
    "space",
    "digest",
    "hidden header",
]


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_log_in_which_anything_changed_is_refused(
    tmp_path: Path, suffix: str, change: str
) -> None:
    path = tmp_path / f"log{suffix}"
    _edited_log(path, "nothing")
    assert OfflineDataset.load(path).verified is True
    _edited_log(path, change)
    with pytest.raises(ValueError, match="damaged"):
        OfflineDataset.load(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_what_is_known_of_the_contents_of_a_log(tmp_path: Path, suffix: str) -> None:
    made, path = log(), tmp_path / f"log{suffix}"
    foreign = OfflineDataset.load(write(tmp_path / f"other{suffix}", plain()))
    made.save(path)
    own = OfflineDataset.load(path)
    assert (made.verified, foreign.verified, own.verified) == (None, False, True)
    assert own.select([0]).verified is True
    assert OfflineDataset.concat([own, own]).verified is True
    assert OfflineDataset.concat([made, own]).verified is None
    assert "unverified: the file names no digest" in str(card_of(tmp_path / f"other{suffix}"))
    old = OfflineDataset.load(Path(__file__).parent / "golden" / "log.npz")
    assert old.verified is False  # a file of a release that wrote no digest


def test_a_log_takes_no_more_memory_than_its_size_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, path = 20_000, tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        for key in DSRL_KEYS:
            rows = np.zeros((n, 16) if key.endswith("observations") else (n, 1), np.int8)
            rows[-1] = key == "timeouts"
            file.create_dataset(key, data=rows, compression="gzip")
    monkeypatch.setenv("SAFESHIELD_MAX_LOG_BYTES", "1000")
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"claims 2850000 .*the limit of .*SAFESHIELD_MAX_LOG_BYTE"
    ):
        OfflineDataset.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    monkeypatch.setenv("SAFESHIELD_MAX_LOG_BYTES", "10000000")
    assert len(OfflineDataset.load(path)) == n


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_header_of_many_lists_is_refused_unparsed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    fields = plain()
    text = np.frombuffer(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}", np.uint8)
    if suffix == ".npz":
        write(path, {**fields, "safeshield": text})
    else:
        with h5py.File(path, "w", libver="v108") as file:
            for key, value in fields.items():
                file[key] = value
            file.attrs["safeshield"] = text
    tracemalloc.start()
    with pytest.raises(ValueError, match="2000003 lists and objects in its header, more than"):
        OfflineDataset.load(path)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["log.hdf5", "log.npz", "shield.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    from safeshield import Shield

    read = Shield.load if name.endswith("safetensors") else OfflineDataset.load
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=r"a pipe, a socket or a device.*give a regular file"):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=r"is a folder[;:] "):
        read(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.npz"
    log().save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        log(seed=1).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wide_spaces_fit_into_hdf5(tmp_path: Path) -> None:
    width = 10_000
    fields = arrays((1,))
    low = -1 - np.random.default_rng(0).random(width)
    for name in ("observations", "next_observations"):
        fields[name] = np.zeros((1, width))
    data = OfflineDataset.from_arrays(
        **fields, observation_space=gym.spaces.Box(low, -low, (width,), np.float64)
    )
    data.save(tmp_path / "log.hdf5")
    assert_same(OfflineDataset.load(tmp_path / "log.hdf5"), data)


# Spaces


@given(
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.lists(st.tuples(st.floats(-100, 0), st.floats(0, 100)), min_size=1, max_size=4),
    st.booleans(),
)
def test_box_round_trip_is_exact(
    dtype: type, bounds: list[tuple[float, float]], unbounded: bool
) -> None:
    low, high = np.array(bounds, dtype).T.copy()
    if unbounded:
        low[0], high[-1] = -np.inf, np.inf
    box = gym.spaces.Box(low, high, (len(low),), dtype)
    read = space_from_json(json.loads(json.dumps(space_to_json(box), allow_nan=False)))
    assert isinstance(read, gym.spaces.Box)
    np.testing.assert_array_equal(read.low, box.low, strict=True)
    np.testing.assert_array_equal(read.high, box.high, strict=True)


def test_other_spaces_round_trip() -> None:
    for space in (
        gym.spaces.Box(0, 255, (2, 3), np.uint8),
        gym.spaces.Box(-(2**62), 2**62 + 1, (2,), np.int64),
        gym.spaces.Discrete(5, start=-2),
        gym.spaces.MultiDiscrete([3, 2]),
        gym.spaces.MultiBinary(4),
        gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Dict(c=gym.spaces.Box(0, 1))),
    ):
        assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space
    backwards = gym.spaces.Dict(
        OrderedDict([("z", gym.spaces.Discrete(2)), ("a", gym.spaces.Box(0, 1))])
    )
    back = space_from_json(space_to_json(backwards))
    assert list(back.spaces) == ["z", "a"]  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="must be a Box of numbers, Discrete"):
        space_to_json(gym.spaces.Text(3))
    deep: dict[str, Any] = {"type": "Discrete", "n": 2, "start": 0}
    for _ in range(20):
        deep = {"type": "Dict", "spaces": [["a", deep]]}
    with pytest.raises(
        ValueError, match="9 levels of Dict spaces in each other, more than the limit of 8"
    ):
        space_from_json(deep)


BOX = {"type": "Box", "shape": [2], "dtype": "float32", "low": -1.0, "high": 1.0}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"type": ["Box"]},
        {"type": "Dict"},
        {**BOX, "extra": 1},
        {k: v for k, v in BOX.items() if k != "low"},
        {**BOX, "shape": 2},
        {**BOX, "shape": [2.0]},
        {**BOX, "shape": [True]},
        {**BOX, "shape": [0]},
        {**BOX, "shape": [-1]},
        {**BOX, "shape": [10**4, 10**4]},
        {**BOX, "shape": [10**5000]},
        {**BOX, "shape": [1] * 100},
        {**BOX, "dtype": "object"},
        {**BOX, "dtype": "os"},
        {**BOX, "dtype": None},
        {**BOX, "low": [0.0]},
        {**BOX, "low": [0.0, "0"]},
        {**BOX, "low": [[0.0], [0.0]]},
        {**BOX, "low": None},
        {**BOX, "low": True},
        {**BOX, "low": float("nan")},
        {**BOX, "low": 1e300},
        {**BOX, "low": 2.0},
        {**BOX, "low": "inf", "high": "inf"},
        {**BOX, "dtype": "uint8"},
        {**BOX, "dtype": "uint8", "low": 0, "high": 256},
        {"type": "Discrete", "n": 0, "start": 0},
        {"type": "Discrete", "n": 2.0, "start": 0},
        {"type": "Discrete", "n": 10**30, "start": 0},
        {"type": "Discrete", "n": 2},
    ],
)
def test_hostile_spaces_are_value_errors(data: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=r"."):
        space_from_json(data)


def test_same_space_compares_points() -> None:
    box = gym.spaces.Box(-1, 1, (2,))
    free = gym.spaces.Box(-np.inf, np.inf, (2,))
    check_same_space(box, gym.spaces.Box(-1, 1 + 1e-7, (2,), np.float64), "action_space")
    check_same_space(free, box, "observation_space", unbounded_matches_any=True)
    for expected, actual, why in (
        (box, gym.spaces.Box(-1, 1, (3,)), "shape"),
        (box, gym.spaces.Box(-1, 2, (2,)), "bounds"),
        (free, box, "bounds"),
        (box, gym.spaces.Discrete(2), "type"),
        (gym.spaces.Discrete(2), gym.spaces.Discrete(2, start=1), "values"),
    ):
        with pytest.raises(ValueError, match=rf"what mismatch \({why}\): expected .* got "):
            check_same_space(expected, actual, "what")
    with pytest.raises(ValueError, match="bounds"):
        check_same_space(box, free, "what", unbounded_matches_any=True)


WIDE = {"type": "Box", "shape": [300_000], "dtype": "float32", "low": -1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("members", "variable"),
    [
        ([WIDE] * 4, "SAFESHIELD_MAX_SPACE_NUMBERS"),
        ([{"type": "MultiBinary", "n": 300_000}] * 4, "SAFESHIELD_MAX_SPACE_NUMBERS"),
        ([{"type": "Discrete", "n": 2, "start": 0}] * 5000, "SAFESHIELD_MAX_SPACE_MEMBERS"),
    ],
    ids=["boxes", "binary", "members"],
)
def test_limits_hold_for_a_whole_space_and_can_be_raised(
    members: list[Any], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each member alone is within the limits. The second level counts as well as the first.
    half = [[f"a{i}", member] for i, member in enumerate(members[::2])]
    rest = [[f"a{i}", member] for i, member in enumerate(members[1::2])]
    space = {"type": "Dict", "spaces": [*half, ["rest", {"type": "Dict", "spaces": rest}]]}
    with pytest.raises(ValueError, match=f"more than the limit of .*{variable} to a larger"):
        space_from_json(space)
    monkeypatch.setenv(variable, "10000000")
    assert len(space_from_json(space)["rest"]) == len(rest)  # type: ignore[index]
    monkeypatch.setenv(variable, "many")
    with pytest.raises(ValueError, match=f"{variable} must be a whole number, got 'many'"):
        space_from_json(space)
