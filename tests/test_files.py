"""Shield files: exact round trips; damaged and hostile ones are refused at no cost."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshield.calibration import upper_bound
from safeshield.files.atomic import check_writable, written_whole
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.mlp import EnsembleMLP
from safeshield.shield import CandidateSet, ProjectedGradient, Shield
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import CalibrationRecord, PolicyResult, Rung
from safeshield.shield.replacement import describe
from safeshield.spaces.scaling import Scaling
from safeshield.training.loop import FitOptions
from safeshield.values.units import SafetyScale

Json = dict[str, Any]


def weights(shape: EnsembleMLP, seed: int) -> dict[str, np.ndarray]:
    params = shape.init(torch.Generator().manual_seed(seed))
    return {name: tensor.numpy() for name, tensor in params.items()}


@pytest.fixture(scope="module")
def shield() -> Shield:
    """Small, calibrated, with something unusual in every field."""
    delta = 0.1 + 1e-17
    # A walk of tests of 2,000 episodes each, whose third threshold fails.
    walk = tuple(
        Rung(at, name, 2000, count, upper_bound(2000, count, 0.999), count < 8)
        for at, name, count in [
            (1.5, "random", 0), (1.5, "é\n", 1), (delta, "random", 2), (delta, "é\n", 7),
            (1e-9, "random", 11),
        ]
    )  # fmt: skip
    record = CalibrationRecord(
        delta=delta,
        epsilon=0.01,
        confidence=0.999,
        policies=(
            PolicyResult("random", 2000, 2, walk[2].bound, 1 / 3),
            PolicyResult("é\n", 2000, 7, walk[3].bound, 0.0),
        ),
        environment="nowhere/Boat-v0",
        start_distribution='its own "reset" does',
        start_share=0.1234567890123456789,
        walk=walk,
        seed=2**40,
        date="2026-01-01T00:00:00+00:00",
        versions={"python": "3.11"},
    )
    model = SafetyModel.of_networks(
        gym.spaces.Box(np.array([-np.inf, -2.0, 0.0]), np.array([1.0, np.inf, 1e-30]), dtype="f8"),
        gym.spaces.Box(np.array([-0.1, 3.0]), np.array([0.3, 5.0]), dtype=np.float64),
        Scaling(*(np.array(x, "f4") for x in ([0.1, 1e-8, 3], [1, 2e5, 1], [-0.1, 3], [0.3, 5]))),
        SafetyScale(-1 / 3, 0.1, 1e-3),
        {
            "constraint": weights(EnsembleMLP(3, 1, (5,)), 0),
            "excess": weights(EnsembleMLP(3, 1, (5,)), 1),
            "advantage": weights(EnsembleMLP(5, 1, (4, 3), members=2), 2),
            "student": weights(EnsembleMLP(5, 2, (6,)), 3),
        },
    )
    replacement = ProjectedGradient(3, 0.1 + 1e-17, CandidateSet(3, 2, 1))
    record = replace(record, replacement=describe(replacement))
    return Shield(model, delta, record, "a test's “shield”", replacement)


@pytest.fixture
def path(shield: Shield, tmp_path: Path) -> Path:
    file = tmp_path / "shield.safetensors"
    shield.save(file)
    return file


def assert_equal(one: Shield, other: Shield) -> None:
    """Every field, every bit."""
    assert (one.delta, one.record, one.trained_by, one.replacement) == (
        other.delta,
        other.record,
        other.trained_by,
        other.replacement,
    )
    mine, theirs = one.model, other.model
    assert mine.scale == theirs.scale
    for a, b in (
        (mine.observation_space, theirs.observation_space),
        (mine.action_space, theirs.action_space),
    ):
        assert a == b
        assert a.dtype == b.dtype
        assert a.low.tobytes() == b.low.tobytes()
        assert a.high.tobytes() == b.high.tobytes()
    assert mine.scaling.to_json() == theirs.scaling.to_json()
    assert mine.networks.keys() == theirs.networks.keys()
    for name, params in mine.networks.items():
        assert params.keys() == theirs.networks[name].keys()
        for key, array in params.items():
            twin = theirs.networks[name][key]
            assert (array.dtype, array.shape, array.tobytes()) == (
                twin.dtype,
                twin.shape,
                twin.tobytes(),
            )


def parts(path: Path) -> tuple[Json, Json, bytes]:
    """Tensor table, our header, data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    return table, json.loads(table["__metadata__"]["safeshield"])["header"], raw[8 + length :]


def assemble(path: Path, table: Json, data: bytes, header: object = None) -> None:
    if header is not None:
        contents = json.loads(table["__metadata__"]["safeshield"])
        table["__metadata__"]["safeshield"] = json.dumps({**contents, "header": header})
    raw = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(ValueError, match=match):
        Shield.load(path)


# -- round trips --------------------------------------------------------------------------------


def test_round_trip_is_exact(shield: Shield, path: Path) -> None:
    assert_equal(Shield.load(path), shield)
    assert_equal(Shield.load(str(path)), shield)
    plain = replace(shield, record=None, trained_by="", delta=0.0)
    plain.save(path)
    assert_equal(Shield.load(path), plain)


def test_the_same_shield_gives_the_same_bytes(shield: Shield, path: Path, tmp_path: Path) -> None:
    Shield.load(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_number_of_numpy_as_delta_can_be_saved(shield: Shield, tmp_path: Path) -> None:
    odd = replace(shield, record=None, delta=np.float32(0.5))  # type: ignore[arg-type]
    odd.save(tmp_path / "s")
    assert Shield.load(tmp_path / "s").delta == 0.5


def test_saving_is_atomic_and_leaves_nothing_else_behind(
    shield: Shield, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fails(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        replace(shield, record=None, delta=1.0).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_saved_file_is_readable_by_those_who_may_read_new_files(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)


def test_missing_files_and_folders(shield: Shield, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Shield.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="make the folder"):
        shield.save(tmp_path / "none" / "shield")


def test_paths_that_cannot_be_written_are_named(shield: Shield, tmp_path: Path) -> None:
    for folder in ("", tmp_path):
        with pytest.raises(IsADirectoryError, match=r"it is a folder .*give the name of a file"):
            shield.save(folder)
    long = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match=f"cannot write {long}: File name too long; choose another"):
        shield.save(long)
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        FitOptions(10, checkpoint=tmp_path)
    check_writable(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that refuses files")
def test_a_folder_that_refuses_files_is_found_before_the_work() -> None:
    with pytest.raises(OSError, match=r"cannot write /proc/x: .*a folder in which you may write"):
        check_writable(Path("/proc/x"))


def test_scalars_and_integers_survive(tmp_path: Path) -> None:
    arrays = {
        "count": np.array(3.0, np.float32),
        "rows": np.arange(5),
        "empty": np.zeros(0, np.int64),
        "bytes": np.arange(3, dtype=np.uint8),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }
    write_tensors(tmp_path / "f", arrays, {"format": "x"})
    kinds = {"rows": np.int64, "empty": np.int64, "bytes": np.uint8}
    back = read_tensors(tmp_path / "f", "x").load({n: a.shape for n, a in arrays.items()}, kinds)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


# -- damage -------------------------------------------------------------------------------------


def test_every_truncation_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    cuts = {0, 1, 7, 8, 9, 100, header_end - 1, header_end, header_end + 1, len(raw) - 1}
    for cut in sorted(cuts | set(range(0, len(raw), 211))):
        path.write_bytes(raw[:cut])
        refused(path)
    path.write_bytes(raw + b"\0")
    refused(path, "truncated or has extra bytes")


@given(data=st.data())
@settings(max_examples=300)
def test_flipped_bits_are_refused_or_harmless(shield: Shield, data: st.DataObject) -> None:
    raw = _bytes_of(shield)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    anywhere = st.one_of(st.integers(0, 7), st.integers(8, end - 1), st.integers(end, len(raw) - 1))
    damaged = bytearray(raw)
    for place in data.draw(st.lists(anywhere, min_size=1, max_size=4)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    file = _SCRATCH / "flipped"
    file.write_bytes(damaged)
    try:
        loaded = Shield.load(file)
    except ValueError:
        return
    assert_equal(loaded, shield)


def _bytes_of(shield: Shield) -> bytes:
    if "bytes" not in _CACHE:
        shield.save(_SCRATCH / "clean")
        _CACHE["bytes"] = (_SCRATCH / "clean").read_bytes()
    return _CACHE["bytes"]


_CACHE: dict[str, bytes] = {}


@pytest.fixture(scope="module", autouse=True)
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _SCRATCH
    _SCRATCH = tmp_path_factory.mktemp("scratch")


_SCRATCH = Path()


def test_one_changed_digit_of_delta_does_not_pass(path: Path) -> None:
    table, header, data = parts(path)
    header["delta"] = header["record"]["delta"] = 0.05
    assemble(path, table, data, header)
    refused(path, "SHA-256")


# -- hostility ----------------------------------------------------------------------------------


def entry(table: Json, name: str = "student/0.weight") -> Json:
    found = table[name]
    assert isinstance(found, dict)
    return found


def contents(table: Json, change: Callable[[Json], object]) -> None:
    inner = json.loads(table["__metadata__"]["safeshield"])
    change(inner)
    table["__metadata__"]["safeshield"] = json.dumps(inner)


TABLES: dict[str, Callable[[Json], object]] = {
    "resized": lambda t: entry(t).update(shape=[1, 6, 5]),
    "one axis": lambda t: entry(t).update(shape=[30]),
    "wrong dtype of the same size": lambda t: entry(t).update(dtype="I32"),
    "unknown dtype": lambda t: entry(t).update(dtype="F128"),
    "dtype is a list": lambda t: entry(t).update(dtype=[]),
    "dtype is an object": lambda t: entry(t).update(dtype={"a": 1}),
    "overlapping": lambda t: entry(t).update(data_offsets=[0, 120]),
    "beyond the end": lambda t: entry(t).update(data_offsets=[10**9, 10**9 + 120]),
    "negative": lambda t: entry(t).update(data_offsets=[-120, 0]),
    "backwards": lambda t: entry(t).update(data_offsets=[120, 0]),
    "floats": lambda t: entry(t).update(data_offsets=[0.0, 120.0]),
    "true as a size": lambda t: entry(t).update(shape=[True, 5, 6]),
    "three offsets": lambda t: entry(t).update(data_offsets=[0, 1, 2]),
    "no shape": lambda t: entry(t).pop("shape"),
    "no object": lambda t: t.update({"student/0.weight": 3}),
    "huge": lambda t: entry(t).update(shape=[2**40, 2**40], data_offsets=[0, 2**47]),
    "many axes": lambda t: entry(t).update(shape=[2**47] * 100_000),
    "huge integer": lambda t: entry(t).update(shape=[10**400]),
    "missing": lambda t: t.pop("student/0.weight"),
    "no metadata": lambda t: t.pop("__metadata__"),
    "metadata is a list": lambda t: t.update(__metadata__=[]),
    "not ours": lambda t: t["__metadata__"].pop("safeshield"),
    "no digest": lambda t: contents(t, lambda c: c.pop("sha256")),
    "digest is a number": lambda t: contents(t, lambda c: c.update(sha256=1)),
    "no header": lambda t: contents(t, lambda c: c.pop("header")),
    "header is a list": lambda t: contents(t, lambda c: c.update(header=[])),
}


@pytest.mark.parametrize("damage", TABLES.values(), ids=TABLES.keys())
def test_a_hostile_tensor_table_is_refused(damage: Callable[[Json], object], path: Path) -> None:
    table, _, data = parts(path)
    damage(table)
    assemble(path, table, data)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def box(**changes: Any) -> Json:  # noqa: ANN401
    return {"type": "Box", "shape": [3], "dtype": "float32", "low": 0.0, "high": 1.0} | changes


def set_record(**changes: Any) -> Callable[[Json], object]:  # noqa: ANN401
    return lambda h: h["record"].update(changes)


HEADERS: dict[str, Callable[[Json], object]] = {
    "another format": lambda h: h.update(format="safeshield-dataset"),
    "format is a list": lambda h: h.update(format=["safeshield-shield"]),
    "version 3": lambda h: h.update(version=3),
    "version true": lambda h: h.update(version="1"),
    "no version": lambda h: h.pop("version"),
    "delta negative": lambda h: h.update(delta=-0.1, record=None),
    "delta infinite": lambda h: h.update(delta=float("1e999"), record=None),
    "delta a string": lambda h: h.update(delta="0.1", record=None),
    "delta true": lambda h: h.update(delta=True, record=None),
    "delta huge": lambda h: h.update(delta=10**400, record=None),
    "delta not the record's": lambda h: h.update(delta=0.2),
    "record is a list": lambda h: h.update(record=[]),
    "record lacks a field": lambda h: h["record"].pop("epsilon"),
    "record has one more": set_record(more=1),
    "epsilon a string": set_record(epsilon="0.01"),
    "epsilon infinite": set_record(epsilon=float("1e999")),
    "seed a float": set_record(seed=0.5),
    "seed true": set_record(seed=True),
    "environment a list": set_record(environment=["x"]),
    "policies an object": set_record(policies={}),
    "policies of numbers": set_record(policies=[1]),
    "walk of strings": set_record(walk=["x"]),
    "passed a number": lambda h: h["record"]["walk"][0].update(passed=1),
    "violations a string": lambda h: h["record"]["policies"][0].update(violations="0"),
    "versions of numbers": set_record(versions={"python": 3}),
    "hidden missing": lambda h: h["hidden"].pop("excess"),
    "hidden a list": lambda h: h.update(hidden=[1]),
    "hidden a string": lambda h: h["hidden"].update(excess="66"),
    "hidden too wide": lambda h: h["hidden"].update(excess=[10**9]),
    "hidden too deep": lambda h: h["hidden"].update(excess=[1] * 1000),
    "hidden empty": lambda h: h["hidden"].update(excess=[]),
    "hidden wide and deep": lambda h: h["hidden"].update(excess=[16_384] * 30),
    "hidden of an actor": lambda h: h["hidden"].update(student=[6]),
    "fallback missing": lambda h: h.pop("fallback"),
    "fallback null": lambda h: h.update(fallback=None),
    "fallback a list": lambda h: h.update(fallback=["one_step"]),
    "fallback without a kind": lambda h: h["fallback"].pop("kind"),
    "fallback kind unknown": lambda h: h["fallback"].update(kind="os.system"),
    "fallback kind a list": lambda h: h["fallback"].update(kind=["one_step"]),
    "fallback kind a critic's": lambda h: h["fallback"].update(kind="best_plan"),
    "fallback that imitates choices": lambda h: h["fallback"].update(kind="classifier"),
    "fallback with one more field": lambda h: h["fallback"].update(more=1),
    "fallback too wide": lambda h: h["fallback"].update(hidden=[10**9]),
    "fallback too deep": lambda h: h["fallback"].update(hidden=[1] * 1000),
    "fallback empty": lambda h: h["fallback"].update(hidden=[]),
    "fallback wide and deep": lambda h: h["fallback"].update(hidden=[16_384] * 30),
    "behaviour without steps": lambda h: h.update(behaviour={"kind": "flow", "hidden": [6]}),
    "behaviour of no network": lambda h: h.update(
        behaviour={"kind": "flow", "hidden": [6], "flow_steps": 10}
    ),
    "judge a number": lambda h: h.update(judge=1),
    "judge an actor": lambda h: h.update(judge={"kind": "one_step", "hidden": [6]}),
    "members many": lambda h: h.update(members=10**9),
    "members true": lambda h: h.update(members=True),
    "scaling missing": lambda h: h.pop("scaling"),
    "scaling nested": lambda h: h["scaling"].update(observation_mean=[[0], [0], [0]]),
    "scaling of strings": lambda h: h["scaling"].update(observation_mean=["0", "0", "0"]),
    "scaling huge": lambda h: h["scaling"].update(observation_mean=[10**400, 0, 0]),
    "scaling beyond float32": lambda h: h["scaling"].update(observation_mean=[1e300, 0, 0]),
    "scaling null": lambda h: h["scaling"].update(observation_mean=[None, 0, 0]),
    "spread zero": lambda h: h["scaling"].update(observation_spread=[0, 1, 1]),
    "box turned round": lambda h: h["scaling"].update(action_low=[9, 9]),
    "scale zero": lambda h: h["safety_scale"].update(step=0.0),
    "scale a string": lambda h: h["safety_scale"].update(step="1"),
    "scale huge": lambda h: h["safety_scale"].update(step=10**400),
    "candidates a list": lambda h: h["replacement"].update(candidates=[1, 2, 3]),
    "candidates unknown": lambda h: h["replacement"]["candidates"].update(os=1),
    "candidates a float": lambda h: h["replacement"]["candidates"].update(box=1.5),
    "candidates many": lambda h: h["replacement"]["candidates"].update(box=10**9),
    "candidates negative": lambda h: h["replacement"]["candidates"].update(box=-1),
    "trained_by an object": lambda h: h.update(trained_by={"a": 1}),
    "space by import": lambda h: h.update(action_space={"type": "os.system"}),
    "space a string": lambda h: h.update(action_space="Box"),
    "space huge": lambda h: h.update(observation_space=box(shape=[10**9])),
    "space of two axes": lambda h: h.update(observation_space=box(shape=[4, 1])),
    "space discrete": lambda h: h.update(action_space={"type": "Discrete", "n": 2, "start": 0}),
    "space of objects": lambda h: h.update(observation_space=box(dtype="O")),
    "space of another width": lambda h: h.update(observation_space=box(shape=[4])),
    "space turned round": lambda h: h.update(observation_space=box(low=2.0)),
    "space of strings": lambda h: h.update(observation_space=box(low="0")),
}


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS.keys())
def test_a_hostile_header_is_refused(damage: Callable[[Json], object], path: Path) -> None:
    file = read_tensors(path, "safeshield-shield")
    arrays, header = file.load(file.shapes, file.dtypes), file.header
    damage(header)
    # Written with a digest that fits: only the checks of the fields stand in the way.
    _write_raw(path, arrays, header)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def _write_raw(path: Path, arrays: dict[str, np.ndarray], header: Json) -> None:
    """As `write_tensors`, but of anything at all."""
    from hashlib import sha256

    from safetensors.numpy import save

    digest = sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    text = json.dumps({"header": header, "sha256": digest.hexdigest()})
    path.write_bytes(save(arrays, {"safeshield": text.replace("Infinity", "1e999")}))


def test_the_hostile_headers_would_load_without_their_damage(path: Path, shield: Shield) -> None:
    file = read_tensors(path, "safeshield-shield")
    _write_raw(path, file.load(file.shapes, file.dtypes), file.header)
    assert_equal(Shield.load(path), shield)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(number: float, path: Path) -> None:
    file = read_tensors(path, "safeshield-shield")
    arrays = file.load(file.shapes, file.dtypes)
    arrays["excess/0.weight"][0, 1, 2] = number
    _write_raw(path, arrays, file.header)
    refused(path, "NaN or infinity")


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_weights_must_be_float32(kind: type, path: Path) -> None:
    file = read_tensors(path, "safeshield-shield")
    arrays = file.load(file.shapes, file.dtypes)
    arrays["excess/0.weight"] = arrays["excess/0.weight"].astype(kind)
    _write_raw(path, arrays, file.header)
    refused(path, "must be float32")


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "safeshield-shield", "format": "safeshield-shield"}',
        '{"format": "safeshield-shield", "delta": NaN}',
        '{"format": "safeshield-shield", "delta": -Infinity}',
        '{"a": ' * 50_000,
        "[" * 100_000,
        '"safeshield-shield"',
        "null",
        "",
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "\\ud800"}',
    ],
    ids=[
        "twice",
        "nan",
        "inf",
        "deep",
        "deep list",
        "string",
        "null",
        "empty",
        "long",
        "surrogate",
    ],
)
def test_our_header_is_strict_json(text: str, path: Path) -> None:
    table, _, data = parts(path)
    table["__metadata__"]["safeshield"] = text
    assemble(path, table, data)
    refused(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 1_000_000,
        b'{"a": ' * 100_000,
        b'{"a": 1, "a": 1}',
        b'{"a": NaN}',
        b"\xff\xfe{}",
        b"{}",
    ],
    ids=["deep list", "deep", "twice", "nan", "not utf-8", "empty"],
)
def test_the_tensor_table_is_strict_json(raw: bytes, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(path)


@pytest.mark.parametrize(
    ("length", "told"),
    [
        (0, "not a safeshield file, or is truncated"),
        (1, "not a safeshield file, or is truncated"),
        (10**6, "its header has 1000000 bytes, and the file"),
        *((n, "does not begin with the length of a header") for n in (2**31, 2**62, 2**64 - 1)),
    ],
)
def test_a_false_header_length_is_refused_unread(length: int, told: str, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    try:
        refused(path, told)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_a_terabyte_is_refused_unread(path: Path) -> None:
    table, _, data = parts(path)
    size = 2**40
    table["student/0.weight"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    for name in [name for name in table if name not in ("__metadata__", "student/0.weight")]:
        del table[name]
    assemble(path, table, b"")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert len(data) > 0


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (_SCRATCH / "exploded",)


def test_pickles_and_archives_are_refused_and_nothing_runs(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "not a safeshield file")
    torch.save({"bomb": Bomb()}, path)
    refused(path, "not a safeshield file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    refused(path, "not a safeshield file")
    np.save(path.with_suffix(".npy"), np.array([Bomb()], object), allow_pickle=True)
    refused(path.with_suffix(".npy"), "not a safeshield file")
    assert not (_SCRATCH / "exploded").exists()


def test_another_projects_safetensors_file_is_named_as_such(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, path, {"format": "pt"})
    refused(path, "not a safeshield file")


def test_saving_keeps_links_and_permissions_and_refuses_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    with written_whole(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or another special file"):
        check_writable(tmp_path / "pipe")
