"""The files of a learner: one with its state, and one with the episodes of each segment.

A segment is a fixed number of updates, after which the learner's state is written (see `learner`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number, whole
from safeshield.files.tensors import read_tensors, write_tensors

Array = npt.NDArray[Any]
STATE = "state.safetensors"
_FORMAT = "safeshield-learner"
_RETURNS, _COSTS, _POLICY, _MOMENTS = "episodes.returns", "episodes.costs", "policy.", "moments."


@dataclass(frozen=True)
class Progress:
    """How far a learner has come, as its state file stores it."""

    updates: int
    """Number of updates that are done."""
    segments: int
    """Number of segments that are done. Each has a file of episodes."""
    price: float | None
    """Multiplier of the cost; None without a limit."""
    returns: npt.NDArray[np.float32]
    """(E,) returns of the episodes so far, in order."""
    costs: npt.NDArray[np.float32]
    """(E,) summed costs of the episodes so far, in order."""


def segment_file(folder: Path, segment: int) -> Path:
    """Return the path of the file of a segment's episodes in a learner's `folder`.

    `segment` is the number of the segment, counted from 0.
    """
    return folder / f"segment-{segment:04d}.hdf5"


def read_progress(folder: Path) -> Progress:
    """Return the progress of the learner whose files are in `folder`.

    Where the folder holds no state file, the learner has done nothing yet.

    Raises:
        ValueError: The state file is damaged, or the episodes of a segment are missing.
    """
    path = folder / STATE
    if not path.exists():
        nothing = np.zeros(0, np.float32)
        return Progress(0, 0, None, nothing, nothing)
    with _saying_the_way_out(folder):
        header, arrays = _read_state(path)
        try:
            price = header["price"]
            progress = Progress(
                whole("updates", header["updates"], least=0),
                whole("segments", header["segments"], least=0),
                None if price is None else finite_number(price, "price"),
                arrays[_RETURNS],
                arrays[_COSTS],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no progress of a learner: {error!r:.200}") from error
    for segment in range(progress.segments):
        if not segment_file(folder, segment).is_file():
            raise ValueError(
                f"{segment_file(folder, segment)} is missing, but {path} continues from it; put it "
                f"back, or delete the folder {folder} to let this learner begin again"
            )
    return progress


def load_segment(folder: Path, segment: int) -> OfflineDataset:
    """Return the log of the episodes of one segment of a learner.

    Args:
        folder: Folder of the learner.
        segment: Number of the segment, counted from 0.

    Raises:
        ValueError: The file is damaged.
        FileNotFoundError: There is no such file.
    """
    with _saying_the_way_out(folder):
        return OfflineDataset.load(segment_file(folder, segment))


@contextlib.contextmanager
def _saying_the_way_out(folder: Path) -> Iterator[None]:
    """Add a repair to the error of a damaged file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error}. If there is no intact copy of that file, delete the folder {folder} to "
            "let this learner begin again; the other learners resume from their own files"
        ) from error


def write_state(path: Path, model: PPO, stack: VecNormalize, progress: Progress) -> None:
    """Write weights, Adam's moments, running statistics and progress, in a format without code.

    Args:
        path: State file of the learner.
        model: PPO, whose weights and moments are written.
        stack: Wrapper of the environments, whose running statistics are written.
        progress: Progress of the learner.
    """
    arrays = {_RETURNS: progress.returns, _COSTS: progress.costs}
    for name, tensor in model.policy.state_dict().items():
        arrays[_POLICY + name] = tensor.detach().numpy()
    for index, moments in model.policy.optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            arrays[f"{_MOMENTS}{index}.{name}"] = np.asarray(tensor, np.float32)
    header = {
        "format": _FORMAT,
        "updates": progress.updates,
        "segments": progress.segments,
        "price": progress.price,
        "statistics": {name: _statistics_json(one) for name, one in _statistics(stack).items()},
    }
    write_tensors(path, arrays, header)


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    file = read_tensors(path, _FORMAT)
    return file.header, file.load(file.shapes)


def restore(path: Path, model: PPO, stack: VecNormalize) -> None:
    """Load the file `path` that `write_state` wrote into a new `model` and a new `stack`."""
    header, arrays = _read_state(path)
    # The arrays are copied, because they may be views of the file's bytes and training changes
    # weights in place.
    weights = {
        name.removeprefix(_POLICY): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith(_POLICY)
    }
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        if name.startswith(_MOMENTS):
            index, key = name.removeprefix(_MOMENTS).split(".")
            moments.setdefault(int(index), {})[key] = torch.tensor(array)
    model.policy.load_state_dict(weights)
    groups = model.policy.optimizer.state_dict()["param_groups"]
    model.policy.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for name, one in _statistics(stack).items():
        stored = header["statistics"][name]
        one.mean = np.array(stored["mean"], np.float64)
        one.var = np.array(stored["variance"], np.float64)
        one.count = float(stored["count"])


def _statistics(stack: VecNormalize) -> dict[str, RunningMeanStd]:
    """Return the running statistics by name.

    Those of the observations are included only where observations are normalised.
    """
    found = {"rewards": stack.ret_rms}
    if stack.norm_obs:
        kept = stack.obs_rms
        parts = kept if isinstance(kept, dict) else {"": kept}
        found |= {f"observations.{name}": one for name, one in parts.items()}
    return found


def _statistics_json(one: RunningMeanStd) -> dict[str, Any]:
    # JSON text that Python writes for a float64 is read back as exactly the same number.
    mean, variance = np.asarray(one.mean).tolist(), np.asarray(one.var).tolist()
    return {"mean": mean, "variance": variance, "count": float(one.count)}
