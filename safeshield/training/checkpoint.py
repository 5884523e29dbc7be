"""Checkpoints: one file with the whole state of a run, from which it resumes without a difference.

A resumed run has the same results as a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    generator: torch.Generator,
    identity: RunIdentity,
    phase: str,
) -> None:
    """Write the whole state of a run to a file atomically.

    Args:
        path: The file.
        state: State after the updates that have been made.
        done: Number of updates that have been made.
        generator: Random generator, whose state is stored.
        identity: Identity of the run.
        phase: Name of the current phase.
    """
    flat = flatten({**to_tree(state), "generator": generator.get_state()})
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
