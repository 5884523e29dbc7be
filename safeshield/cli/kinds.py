"""Descriptions of files from their headers, and the loader of Stable-Baselines3 agents."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshield.files.reading import opened, read_exactly
from safeshield.files.signing import VERIFIED
from safeshield.files.tensors import (
    AGENT,
    FORMATS,
    LOG_SUFFIXES,
    SHIELD,
    TensorFile,
    read_tensors,
)

if TYPE_CHECKING:
    from safeshield.data.card import DatasetCard
    from safeshield.data.dataset import OfflineDataset
    from safeshield.shield.record import Attempt
    from safeshield.shield.sensors import SensorCheck

LOG, FLIGHT, GRAPH = "log", "flight", "graph"
_ESTIMATED = "none: a network estimates h"
# First bytes of other common files, for a clearer error.
_OTHERS = {
    b"\x89PNG": "a picture (PNG)",
    b"PK\x03\x04": "a zip file: a model of Stable-Baselines3 goes to safeshield evaluate, with "
    "--trust; a log in this form must be named .npz",
    b"\x89HDF": "an HDF5 file; a log must be named .hdf5 or .h5",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip file",
    b"\xf5SFL": "a file of a flight recorder; give its folder",
}
# For each algorithm of Stable-Baselines3 a setting that only its zip file contains.
_SB3_MARKS = {
    "PPO": "clip_range",
    "SAC": "target_entropy",
    "TD3": "target_policy_noise",
    "A2C": "normalize_advantage",
    "DQN": "exploration_fraction",
}


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return "agent", "shield", "checkpoint", "log", "flight" or "graph".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The path is a folder that holds no flight, or a file of another kind.
    """
    if Path(path).is_dir():
        from safeshield.monitoring.flight_file import flight_files

        if flight_files(Path(path)):
            return FLIGHT
        raise ValueError(f"{path} is a folder; give a file in it, or the folder of a ShieldLog")
    if Path(path).suffix.lower() in LOG_SUFFIXES:
        return LOG
    if Path(path).suffix.lower() == ".onnx":
        return GRAPH
    return _open(path)[0]


def with_article(kind: str) -> str:
    """Return the `kind` of a file with its article, such as "an agent" or "a shield"."""
    return f"an {kind}" if kind == AGENT else f"a {kind}"


def describe(path: str | os.PathLike[str], verify: Path | None = None) -> dict[str, Any]:
    """Return what the file `path` holds as JSON values, in a readable order.

    Args:
        path: The file.
        verify: PEM file of a public key, with whose private key the file must be signed; None does
            not ask.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The file is a graph, and the extra `onnx` is not installed.
        ValueError: The file is damaged, or neither an agent, shield, checkpoint, log, flight nor
            the ONNX graph of a shield; or its signature is missing or not valid.
    """
    path = Path(path)
    if path.is_dir() and file_kind(path) == FLIGHT:
        if verify is not None:
            raise ValueError(f"--verify is for files that can be signed, but {path} is a flight")
        from safeshield.monitoring import FlightLog

        return {"kind": FLIGHT, **FlightLog.load(path).card()}
    if path.suffix.lower() in LOG_SUFFIXES:
        if verify is not None:
            raise ValueError(f"--verify is for files that can be signed, but {path} is a log")
        from safeshield.data.card import card_of
        from safeshield.data.dataset import OfflineDataset

        log = OfflineDataset.load(path)
        return describe_log(log, card_of(log, file=path))
    if path.suffix.lower() == ".onnx":
        if verify is not None:
            raise ValueError(f"--verify is for files that can be signed, but {path} is a graph")
        from safeshield.shield.export import read_onnx

        told = dict(read_onnx(path).header)
        told.pop("candidates", None)  # Long tables of numbers.
        return {"kind": GRAPH, "promise": told.pop("promise"), **told}
    kind, file = _open(path)
    if verify is not None:
        file.verify(verify)
        file.load(file.shapes, file.dtypes)  # Compares the digest that is signed.
    rest = {"signature": file.signed if verify is None else VERIFIED, **_size(file)}
    if kind == SHIELD:
        return {"kind": kind, **_describe_shield(path), **rest}
    if kind == AGENT:
        source = {"constraint_source": file.header.get("constraint_source") or _ESTIMATED}
        return {"kind": kind, **_describe_agent(path), **source, **rest}
    return {"kind": kind, **_describe_checkpoint(file.header), **rest}


def describe_log(log: OfflineDataset, card: DatasetCard) -> dict[str, Any]:
    """Return the card of a log and how the log was made, as JSON values."""
    made = {} if log.provenance is None else {"provenance": dict(log.provenance)}
    return {"kind": LOG, **card.to_json(), **made}


def load_sb3(path: str | os.PathLike[str], *, trust: bool) -> Any:  # noqa: ANN401
    """Return the Stable-Baselines3 agent in the file `path`, whose settings tell the algorithm.

    `trust` must be True, because reading such a file can run code from it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `trust` is False, or the algorithm is not one of PPO, A2C, SAC, TD3 and DQN.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not trust:
        raise ValueError(
            f"{path}: loading a Stable-Baselines3 zip unpickles it, which runs whatever its maker "
            "put in it; pass --trust if you know where it comes from"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            settings = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a zip file of Stable-Baselines3: {error}") from error
    import stable_baselines3

    for name, mark in _SB3_MARKS.items():
        if mark in settings:
            return getattr(stable_baselines3, name).load(path, device="cpu")
    raise ValueError(f"{path} must hold one of {list(_SB3_MARKS)}; load it in a script instead")


def _open(path: str | os.PathLike[str]) -> tuple[str, TensorFile]:
    with opened(path) as stream:
        begins = read_exactly(stream, 8)
    for signature, what in _OTHERS.items():
        if begins.startswith(signature):
            raise ValueError(f"{path} is not a safeshield file but {what}")
    file = read_tensors(path)
    known = _known_format(file.header["format"])
    if known is None:
        raise ValueError(
            f"{path} is a {file.header['format']!r:.60}, which this release does not know; install "
            "a newer release, or pass the file that registers it as --plugin FILE.py"
        )
    return known[0], file


def _known_format(form: str) -> tuple[str, str] | None:
    """Return what a format holds and what reads it. A shield's format needs no PyTorch."""
    import safeshield.shield.file

    if form not in FORMATS:
        import safeshield.algorithms.registry  # noqa: F401 - registers every format

    return FORMATS.get(form)


def _checks(sensors: SensorCheck | None) -> str:
    """Return which faults of sensors a shield looks for, and how it reacts."""
    if sensors is None or not sensors.active:
        return "not checked"
    checks = {
        "frozen": (sensors.frozen, sensors.on_frozen),
        "jump": (sensors.jump, sensors.on_jump),
        f"older than {sensors.age} s": (sensors.age, sensors.on_age),
    }
    return ", ".join(f"{name}: {on}" for name, (limit, on) in checks.items() if limit is not None)


def _describe_shield(path: Path) -> dict[str, Any]:
    from safeshield.shield.replacement import describe as describe_replacement
    from safeshield.shield.shield import Shield

    shield = Shield.load(path)
    record = shield.record
    return {
        "trained_by": shield.trained_by,
        "observation_space": str(shield.observation_space),
        "action_space": str(shield.action_space),
        "constraint_source": shield.constraint or _ESTIMATED,
        "delta": shield.delta,
        "replacement": describe_replacement(shield.replacement) or "NearestAcceptable()",
        "sensors": _checks(shield.sensors),
        "calibrated": record is not None,
        "promise": "none: not calibrated" if record is None else record.promise,
        **_attempts(shield.attempts),
        "record": None if record is None else record.to_json(),
        "from_logs": [one.statement for one in shield.log_records] or "none",
        "log_records": [one.to_json() for one in shield.log_records],
        "support": None if shield.support is None else shield.support.record.promise,
    }


def _describe_checkpoint(header: dict[str, Any]) -> dict[str, Any]:
    # Checkpoints of earlier releases hold only the number of updates.
    run = header.get("run")
    if not isinstance(run, dict):
        return {"updates_done": header.get("done")}
    return {
        "algorithm": run.get("algorithm"),
        "updates_done": header.get("done"),
        "updates_in_all": run.get("steps"),
        "phase": header.get("phase"),
        "log": run.get("log"),
        "log_contents": run.get("contents", "not known"),
        "config": run.get("config"),
    }


def _describe_agent(path: Path) -> dict[str, Any]:
    from safeshield.algorithms.registry import load_agent

    agent = load_agent(path)
    return {
        "algorithm": type(agent).__name__,
        "observation_space": str(agent.observation_space),
        "action_space": str(agent.action_space),
        **({} if agent.updates is None else {"updates": agent.updates}),
        **({} if agent.chosen is None else {"chosen": agent.chosen}),
        **({} if agent.added is None else {"added_to_the_log": agent.added}),
        "config": dataclasses.asdict(agent.config),
        **_attempts(getattr(agent, "attempts", ())),
        **agent.diagnostics(),
    }


def _attempts(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the numbers of calibrations that a file remembers, where there are any."""
    passed = sum(one.passed for one in attempts)
    told = {"failed": len(attempts) - passed, "passed": passed}
    return {"attempts": told} if attempts else {}


def _size(file: TensorFile) -> dict[str, Any]:
    import math

    numbers = sum(math.prod(shape) for shape in file.shapes.values())
    return {
        "tensors": len(file.shapes),
        "numbers": numbers,
        "bytes": file.size,
    }
