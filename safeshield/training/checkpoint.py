"""Checkpoints: one file with the whole state of a run, from which it resumes without a difference.

A resumed run has the same results as a run that was never interrupted. `CheckpointWriter` writes
the file in a thread, from a copy of the state, while the training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from safeshield.files.tensors import CHECKPOINT, read_tensors, register_format, write_tensors
from safeshield.nn.optim import AdamState
from safeshield.training.log import RunIdentity
from safeshield.training.state import TrainState

_FORMAT = "safeshield-checkpoint"
register_format(_FORMAT, CHECKPOINT, "fit(checkpoint=...), which goes on from it,")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts `tree` as one dict, whose keys are the paths to the leaves.

    `prefix` is put in front of every path.

    >>> flatten({"actor": {"0.weight": 1, "0.bias": 2}})
    {'actor/0.weight': 1, 'actor/0.bias': 2}
    """
    flat: dict[str, Any] = {}
    for name, part in tree.items():
        inner = isinstance(part, Mapping)
        flat |= flatten(part, f"{prefix}{name}/") if inner else {prefix + name: part}
    return flat


def unflatten(template: Mapping[str, Any], flat: Mapping[str, Any], prefix: str = "") -> Any:  # noqa: ANN401
    """Return nested dicts with the structure of `template` and the leaves of `flat`.

    `prefix` is the beginning of the paths in `flat`.
    """
    return {
        name: unflatten(part, flat, f"{prefix}{name}/")
        if isinstance(part, Mapping)
        else flat[prefix + name]
        for name, part in template.items()
    }


def to_tree(state: TrainState) -> dict[str, Any]:
    """Return a training state as nested dicts with the names that a checkpoint uses."""
    return {
        "near": state.boundary_rows,
        "networks": state.networks,
        "targets": state.targets,
        "moments": {phase: moments._asdict() for phase, moments in state.moments.items()},
        "scales": state.scales,
    }


def from_tree(tree: dict[str, Any]) -> TrainState:
    """Return the training state from `tree`, the nested dicts of `to_tree`."""
    return TrainState(
        tree["networks"],
        tree["targets"],
        {phase: AdamState(**moments) for phase, moments in tree["moments"].items()},
        tree["scales"],
        tree["near"],
    )


def checkpoint_bytes(state: TrainState) -> int:
    """Return about how many bytes a checkpoint of a state takes."""
    tensors = flatten(to_tree(state)).values()
    return int(sum(tensor.nelement() * tensor.element_size() for tensor in tensors))


def copied(state: TrainState) -> TrainState:
    """Return a copy of a training state, which no later update overwrites."""
    tree = to_tree(state)
    flat = {name: tensor.clone() for name, tensor in flatten(tree).items()}
    return from_tree(unflatten(tree, flat))


def stacked(states: Sequence[TrainState]) -> TrainState:
    """Return the states of several members, whose shapes are equal, with a leading member axis.

    The members have made equally many updates, whose numbers have no member axis.
    """
    trees = [flatten(to_tree(state)) for state in states]
    flat = {
        name: tensor if _shared(name) else torch.stack([tree[name] for tree in trees])
        for name, tensor in trees[0].items()
    }
    return from_tree(unflatten(to_tree(states[0]), flat))


def member(state: TrainState, index: int) -> TrainState:
    """Return a copy of the state of one member of a state that `stacked` returned.

    `index` is the position of the member.
    """
    tree = to_tree(state)
    flat = {
        name: tensor if _shared(name) else tensor[index].clone()
        for name, tensor in flatten(tree).items()
    }
    return from_tree(unflatten(tree, flat))


def _shared(name: str) -> bool:
    """Return whether all members share the tensor with this path in a state's tree."""
    return name.startswith("moments/") and name.endswith("/updates")


def save_checkpoint(
    path: Path,
    state: TrainState,
    done: int,
    generator: torch.Tensor,
    identity: RunIdentity,
    phase: str,
) -> None:
    """Write the whole state of a run to a file atomically.

    Args:
        path: The file.
        state: State after the updates that have been made.
        done: Number of updates that have been made.
        generator: State of the random generator, from `torch.Generator.get_state`.
        identity: Identity of the run.
        phase: Name of the current phase.
    """
    flat = flatten({**to_tree(state), "generator": generator})
    header = {
        "format": _FORMAT,
        "done": done,
        "phase": phase,
        "run": identity.to_json(),
    }
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in flat.items()}
    write_tensors(path, arrays, header)


def load_checkpoint(
    path: Path,
    state: TrainState,
    generator: torch.Generator,
    identity: RunIdentity,
    transitions: int,
) -> tuple[TrainState, int]:
    """Return the state of a run in a file, and the number of updates made.

    Args:
        path: File that `save_checkpoint` wrote.
        state: State of the same networks, which gives the names and shapes.
        generator: Random generator, which is set to its state in the checkpoint.
        identity: Identity of the run to which the file must belong.
        transitions: Number N of rows of the log.

    Raises:
        ValueError: The file is damaged, or belongs to another configuration, log or number of
            steps.
    """
    tree = to_tree(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in flatten(tree).items()}
    shapes["generator"] = tuple(generator.get_state().shape)
    dtypes: dict[str, Any] = {"near": np.int64, "generator": np.uint8}
    dtypes |= {f"scales/{name}": value.cpu().numpy().dtype for name, value in state.scales.items()}
    file = read_tensors(path, _FORMAT)
    difference = identity.difference(file.header.get("run"))
    if difference is not None:
        told = difference and f" (checkpoint's -> this run's: {difference})"
        raise ValueError(
            f"checkpoint {path} belongs to another configuration, log or number of steps{told}; "
            "pass the same ones, or another checkpoint file"
        )
    done = file.header.get("done")
    if type(done) is not int or done < 0:
        raise ValueError(f"checkpoint {path} has no step count")
    # The initial state has no boundary rows yet, so the file gives their number.
    shapes["near"] = file.shape("near")
    if len(shapes["near"]) != 1:
        raise ValueError(f"checkpoint {path}: 'near' must have one axis, got {shapes['near']}")
    arrays = file.load(shapes, dtypes)
    if not ((arrays["near"] >= 0) & (arrays["near"] < transitions)).all():
        raise ValueError(f"checkpoint {path}: 'near' points outside the log")
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    generator.set_state(flat.pop("generator"))
    moved = {name: tensor.to(generator.device) for name, tensor in flat.items()}
    return from_tree(unflatten(tree, moved)), done


class CheckpointWriter:
    """Writes checkpoints in a thread, so that the training goes on meanwhile.

    It is a context manager, whose end waits for the files that are being written. If the training
    ends because the device failed, a note of the error says from which checkpoints it can go on.

    Attributes:
        written: Number of updates made in the last checkpoint of each file that is complete.
    """

    def __init__(self) -> None:
        self.written: dict[Path, int] = {}
        self._thread = ThreadPoolExecutor(1, "safeshield-checkpoint")
        self._pending: dict[Path, Future[None]] = {}

    def save(
        self,
        path: Path,
        state: TrainState,
        done: int,
        generator: torch.Generator,
        identity: RunIdentity,
        phase: str,
    ) -> None:
        """Copy the state of a run and begin to write it to a file; see `save_checkpoint`.

        The method waits until the previous checkpoint of this file has been written.

        Raises:
            OSError: The previous checkpoint could not be written.
        """
        self._wait(path)
        taken, random = _on_host(state), generator.get_state()

        def write() -> None:
            save_checkpoint(path, taken(), done, random, identity, phase)
            self.written[path] = done

        self._pending[path] = self._thread.submit(write)

    def _wait(self, path: Path) -> None:
        pending = self._pending.pop(path, None)
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until all files have been written.

        Raises:
            OSError: A checkpoint could not be written, and no other error has ended the training.
        """
        try:
            for path in list(self._pending):
                self._wait(path)
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"a checkpoint could not be written either: {failed}")
        finally:
            self._thread.shutdown()
            if isinstance(error, torch.AcceleratorError):
                error.add_note(self._way_on())

    def _way_on(self) -> str:
        """Return how a training goes on whose device has failed."""
        files = ", ".join(f"{path} after {done} updates" for path, done in self.written.items())
        if not files:
            return (
                "the device failed, and no checkpoint has been written. Pass checkpoint=FILE to "
                "fit (--checkpoint FILE on the command line), from which it can then go on"
            )
        return (
            f"the device failed. The last checkpoint is {files}: start a new process and repeat "
            "the call or the command with the same arguments, which goes on from there"
        )


def _on_host(state: TrainState) -> Callable[[], TrainState]:
    """Begin to copy a state to the memory of the host; return a function that waits for the copy.

    Later updates do not change the copy. On a GPU the copying is a part of neither the updates nor
    the thread that starts them. (This has never run on a GPU.)
    """
    state = copied(state)
    device = state.boundary_rows.device
    if device.type != "cuda":
        return lambda: state
    tree = to_tree(state)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        host = {}
        for name, tensor in flatten(tree).items():
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host[name] = pinned.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
        finished = side.record_event()

    def taken() -> TrainState:
        finished.synchronize()
        return from_tree(unflatten(tree, host))

    return taken
