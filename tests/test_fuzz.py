"""Fuzzing of the readers in its short form, what it has found so far, and that it finds things."""

from __future__ import annotations

import json
import os
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeshield import OfflineDataset, Shield
from safeshield.collection import plan, state
from safeshield.evaluation.curves import read_curve
from safeshield.evaluation.probes import Probe
from safeshield.files.tensors import write_tensors
from safeshield.monitoring import FlightLog, PromiseMonitor
from safeshield.monitoring.flight_file import _head, read_frames
from safeshield.reporting.report import safety_report

GOLDEN = Path(__file__).parent / "golden"
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="measures with the module resource"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """The module benchmarks/fuzz.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import fuzz

    return fuzz


def test_a_short_fuzzing_finds_nothing(fuzz: Any) -> None:  # noqa: ANN401
    pytest.importorskip("onnx")
    pytest.importorskip("cryptography")
    found = fuzz.quick(25, 0, list(fuzz.targets()))
    assert len(found) == 15
    assert not any(found.values()), found


def test_findings_are_found(
    fuzz: Any,  # noqa: ANN401
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hoard: list[bytearray] = []

    def read(path: Path, seen: dict[str, str]) -> None:
        raw = path.read_bytes()
        if raw == b"key":
            {}["x"]
        if raw == b"silence":
            raise ValueError
        if raw == b"told":
            raise ValueError("the file is damaged")
        if raw == b"slow":
            sum(range(3 * 10**6))
        if raw == b"large":
            hoard.append(bytearray(b"x" * 400_000_000))
        fuzz.same(seen, "digest", raw[:1].decode())

    target = fuzz.Target("planted", "x", lambda folder: [b"a"], lambda raw, rng: raw, read)
    judge = fuzz.Judge(target, tmp_path)
    for raw in (b"a", b"told", b"a2"):
        judge(raw)
    assert not judge.findings
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.02)
    for raw in (b"key", b"silence", b"b", b"slow", b"large"):
        judge(raw)
    found = {name.partition("-")[0] for name in judge.findings}
    assert {"KeyError", "ValueError", "Changed", "hang", "memory"} == found
    assert (tmp_path / "hang.input").read_bytes() in (b"slow", b"large")


@pytest.mark.parametrize("name", ["shield", "npz", "hdf5", "flight", "ledger", "learner"])
def test_structural_damage_comes_behind_the_digest(fuzz: Any, name: str, tmp_path: Path) -> None:  # noqa: ANN401
    """Some files with other contents are read, since their digest is that of these contents."""
    target = fuzz.targets()[name]
    judge = fuzz.Judge(target, tmp_path)
    seeds = judge.seeds()
    read = 0
    for number in range(200):
        raw = fuzz.mutate(target, seeds[0], random.Random(number))
        (judge.place / target.file).write_bytes(raw)
        try:
            target.read(judge.place / target.file, {})
        except (ValueError, OSError, LookupError):
            continue
        read += raw not in seeds
        if read > 2:
            return
    pytest.fail(f"of 200 mutations {read} were read")


# -- what was found --------------------------------------------------------------------------------


def calibrated() -> Shield:
    return Shield.load(GOLDEN / "shield_calibrated.safetensors")


def ledger(folder: Path, score: str) -> Path:
    """A monitor's file with one episode of this score."""
    path = folder / "promise.json"
    PromiseMonitor(calibrated(), path).episode("one", True)
    text = path.read_text().replace('"ended", 1.0', f'"ended", {score}')
    assert f'"ended", {score}' in text
    path.write_text(text)
    return path


@pytest.mark.parametrize("score", ["1" + "0" * 400, "1e300", "0.5", "1e999"])
def test_a_score_that_is_none(tmp_path: Path, score: str) -> None:
    """A whole number beyond every float, and scores that an episode of a rate cannot have."""
    path = ledger(tmp_path, score)
    with pytest.raises(ValueError, match=r"damaged"):
        PromiseMonitor(calibrated(), path)
    with pytest.raises(ValueError, match=r"damaged"):
        PromiseMonitor.merged(calibrated(), [path])


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_members_that_numpy_does_not_pack_so(tmp_path: Path, method: int) -> None:
    """Damage to LZMA is an error of a kind of its own, and both are further decompressors."""
    path = tmp_path / "log.npz"
    with zipfile.ZipFile(GOLDEN / "log.npz") as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="compressed in a way that NumPy does not use"):
        OfflineDataset.load(path)


def flight(folder: Path, **changed: Any) -> Path:  # noqa: ANN401
    """A flight whose header has other fields, with a checksum that is right."""
    raw = next((GOLDEN / "formats" / "flight").glob("*.flight")).read_bytes()
    packed = b""
    for frame in read_frames(raw)[0]:
        payload = bytes(frame.payload)
        if not frame.rows and payload:
            payload = json.dumps({**json.loads(payload), **changed}).encode()
        packed += _head(frame.rows, frame.first, payload) + payload
    folder.mkdir(exist_ok=True)
    (folder / "000001.flight").write_bytes(packed)
    return folder


def honest_header() -> dict[str, Any]:
    raw = next((GOLDEN / "formats" / "flight").glob("*.flight")).read_bytes()
    header: dict[str, Any] = json.loads(bytes(read_frames(raw)[0][0].payload))
    return header


def changes() -> Iterator[dict[str, Any]]:
    header = honest_header()
    dtype = header["dtype"]
    yield {"dtype": dtype[1:]}
    yield {"dtype": [[dtype[0][0], "08,f4", []], *dtype[1:]]}
    yield {"dtype": [*dtype[:-1], ["observation", "<f4", [-1]]]}
    yield {"dtype": []}
    yield {"dtype": None}
    for name, wrong in [
        ("delta", [0.1]), ("delta", "x"), ("digest", 3), ("mode", None), ("delta", -1.0),
    ]:  # fmt: skip
        yield {"shield": {**header["shield"], name: wrong}}
    yield {"shield": "x"}
    yield {"steps": []}
    yield {"environment": 3}
    yield {"environment_kwargs": []}
    yield {"since_episode": "0"}
    yield {"agent": 3}


@pytest.mark.parametrize("changed", changes(), ids=str)
def test_a_header_of_a_flight_with_a_wrong_field(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert len(FlightLog.load(flight(tmp_path / "honest")))
    with pytest.raises(ValueError, match=r"header|delta"):
        FlightLog.load(flight(tmp_path / "flight", **changed))
    with pytest.raises(ValueError, match=r"header|delta"):
        safety_report(calibrated(), flight=tmp_path / "flight")


@pytest.mark.parametrize(
    ("missing", "changed"),
    [
        ("episodes.costs", {}), ("", {"updates": "3"}), ("", {"segments": -1}),
        ("", {"price": "x"}), ("", {"updates": None}),
    ],
)  # fmt: skip
def test_the_state_of_a_learner_that_lacks_a_part(
    tmp_path: Path, missing: str, changed: dict[str, Any]
) -> None:
    arrays = {name: np.zeros(1, np.float32) for name in ("episodes.returns", "episodes.costs")}
    header = {"format": "safeshield-learner", "updates": 1, "segments": 0, "price": None, **changed}
    kept = {name: array for name, array in arrays.items() if name != missing}
    write_tensors(tmp_path / state.STATE, kept, header)
    with pytest.raises(ValueError, match="holds no progress of a learner"):
        state.read_progress(tmp_path)


@pytest.mark.parametrize("text", ["[" * 3000, "[]", '{"format": 1}', '{"format": "x"}'])
def test_a_plan_of_a_collection_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / plan.PLAN).write_text(text)
    with pytest.raises(ValueError, match=r"damaged|not a plan"):
        plan.versions_used(tmp_path)


def test_a_curve_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a training curve"):
        read_curve(tmp_path / "curve.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("read", [read_curve, Probe.load])
def test_a_pipe_does_not_hold_a_reader(tmp_path: Path, read: Any) -> None:  # noqa: ANN401
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(OSError, match="pipe"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ("not UTF-8", "no ONNX graph"), ("[]", "no ONNX graph"), ("[" * 3000, "no ONNX graph"),
        ("without a promise", "no promise"),
    ],
)  # fmt: skip
def test_metadata_of_a_graph_that_are_none(tmp_path: Path, metadata: str, match: str) -> None:
    onnx = pytest.importorskip("onnx")
    from safeshield.shield import export

    path = tmp_path / "shield.onnx"
    calibrated().export_onnx(path)
    model = onnx.load(path)
    told = next(one for one in model.metadata_props if one.key == "safeshield")
    header = json.loads(told.value)
    if metadata == "without a promise":
        del header["promise"], header["sha256"]
        header["sha256"] = export._digest(model.graph, header)
        told.value = json.dumps(header)
    elif metadata != "not UTF-8":
        told.value = metadata
    raw = model.SerializeToString()
    raw = raw.replace(b'{"', b'\xff"', 1) if metadata == "not UTF-8" else raw
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=match):
        export.read_onnx(path)
