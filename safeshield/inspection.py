"""What a file is and holds, told from its header; and agents of Stable-Baselines3 from theirs."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safeshield.files import TensorFile, read_tensors

AGENT, SHIELD, CHECKPOINT, LOG = "agent", "shield", "checkpoint", "log"
_FORMATS = {
    "safeshield-safefql": AGENT,
    "safeshield-shield": SHIELD,
    "safeshield-checkpoint": CHECKPOINT,
}
_LOG_SUFFIXES = (".hdf5", ".h5", ".npz")
# A setting that only this algorithm of Stable-Baselines3 has, in its zip's JSON.
_SB3_MARKS = {
    "PPO": "clip_range",
    "SAC": "target_entropy",
    "TD3": "target_policy_noise",
    "A2C": "normalize_advantage",
}


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return "agent", "shield", "checkpoint" or "log".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of them.
    """
    if Path(path).suffix.lower() in _LOG_SUFFIXES:
        return LOG
    return _open(path)[0]


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file holds as JSON values, in a readable order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or neither agent, shield, checkpoint nor log.
    """
    path = Path(path)
    if path.suffix.lower() in _LOG_SUFFIXES:
        return _describe_log(path)
    kind, file = _open(path)
    if kind == SHIELD:
        return {"kind": kind, **_describe_shield(path), **_size(file)}
    if kind == AGENT:
        return {"kind": kind, **_describe_agent(path), **_size(file)}
    return {"kind": kind, "updates_done": file.header.get("done"), **_size(file)}


def load_sb3(path: str | os.PathLike[str], *, trust: bool) -> Any:  # noqa: ANN401
    """Load an agent of Stable-Baselines3, of the algorithm that its zip's JSON shows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not trusted, or of no algorithm that acts in a Box (PPO, A2C, SAC, TD3).
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    problem: ValueError | None = None
    for name, kind in _FORMATS.items():
        try:
            return kind, read_tensors(path, name)
        except ValueError as error:
            problem = error
    raise ValueError(f"{path} is no file of safeshield's, or is damaged: {problem}") from problem


def _describe_shield(path: Path) -> dict[str, Any]:
    from safeshield.shield.replacement import describe as describe_replacement
    from safeshield.shield.shield import Shield

    shield = Shield.load(path)
    record = shield.record
    return {
        "trained_by": shield.trained_by,
        "observation_space": str(shield.observation_space),
        "action_space": str(shield.action_space),
        "delta": shield.delta,
        "replacement": describe_replacement(shield.replacement) or "NearestAcceptable()",
        "calibrated": record is not None,
        "promise": "none: not calibrated" if record is None else record.promise,
        "record": None if record is None else record.to_json(),
        "support": None if shield.support is None else shield.support.record.promise,
    }


def _describe_agent(path: Path) -> dict[str, Any]:
    from safeshield.algorithms.safefql import SafeFQL

    agent = SafeFQL.load(path, device="cpu")
    shield = agent.shield()
    header = read_tensors(path, "safeshield-safefql").header
    return {
        "algorithm": "SafeFQL",
        "observation_space": str(shield.observation_space),
        "action_space": str(shield.action_space),
        "config": header["config"],
    }


def _describe_log(path: Path) -> dict[str, Any]:
    from safeshield.data.dataset import OfflineDataset

    log = OfflineDataset.load(path)
    return {
        "kind": LOG,
        "transitions": len(log),
        "episodes": log.num_episodes,
        "violating_episodes": int(log.violating_episodes.sum()),
        "observation_space": str(log.observation_space),
        "action_space": str(log.action_space),
        "constraint_kind": log.constraint_kind,
        "constraint_range": [
            float(min(log.constraints.min(), log.next_constraints.min())),
            float(max(log.constraints.max(), log.next_constraints.max())),
        ],
        "return_range": [float(log.returns.min()), float(log.returns.max())],
        "bytes": path.stat().st_size,
        **({} if log.provenance is None else {"provenance": dict(log.provenance)}),
    }


def _size(file: TensorFile) -> dict[str, Any]:
    import math

    numbers = sum(math.prod(shape) for shape in file.shapes.values())
    return {
        "tensors": len(file.shapes),
        "numbers": numbers,
        "bytes": file.path.stat().st_size,
    }
