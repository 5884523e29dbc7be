"""Checkpoints: the whole state of a run in one file, from which it goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safeshield.files.tensors import CHECKPOINT, read_tensors, register_format, write_tensors
from safeshield.nn.mlp import Networks
from safeshield.nn.optim import AdamState
from safeshield.training.log import RunIdentity
from safeshield.training.state import TrainState

_FORMAT = "safeshield-checkpoint"
register_format(_FORMAT, CHECKPOINT, "fit(checkpoint=...), which goes on from it,")


def flatten(state: TrainState) -> dict[str, Tensor]:
    """Return every tensor of a state by the name that it has in a checkpoint."""
    flat: dict[str, Tensor] = {"near": state.boundary_rows}
    for group, networks in (("networks", state.networks), ("targets", state.targets)):
        for name, params in networks.items():
            flat |= {f"{group}/{name}/{key}": tensor for key, tensor in params.items()}
    for phase, moments in state.moments.items():
        flat[f"moments/{phase}/updates"] = moments.updates
        for group, networks in (("mean", moments.mean), ("square", moments.square)):
            for name, params in networks.items():
                flat |= {f"moments/{phase}/{group}/{name}/{k}": t for k, t in params.items()}
    flat |= {f"scales/{name}": value for name, value in state.scales.items()}
    return flat


def unflatten(state: TrainState, flat: Mapping[str, Tensor]) -> TrainState:
    """Return the state that `flatten` made into `flat`; `state` gives the names."""

    def take(prefix: str, networks: Networks) -> Networks:
        return {
            name: {key: flat[f"{prefix}/{name}/{key}"] for key in params}
            for name, params in networks.items()
        }

    return TrainState(
        take("networks", state.networks),
        take("targets", state.targets),
        {
            phase: AdamState(
                take(f"moments/{phase}/mean", moments.mean),
                take(f"moments/{phase}/square", moments.square),
                flat[f"moments/{phase}/updates"],
            )
            for phase, moments in state.moments.items()
        },
        {name: flat[f"scales/{name}"] for name in state.scales},
        flat["near"],
    )


def save_checkpoint(
    path: Path,
    state: TrainState,
    done: int,
    generator: torch.Generator,
    identity: RunIdentity,
    phase: str,
) -> None:
    """Write the whole state of a run, atomically."""
    flat = {**flatten(state), "generator": generator.get_state()}
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
    """Read a run's state back; returns it with the number of steps done.

    Args:
        path: what `save_checkpoint` wrote.
        state: a state of the same networks; gives names and shapes.
        generator: set to the state that it had then.
        identity: of the run that the file must be of.
        transitions: N, rows of the log.

    Raises:
        ValueError: the file is damaged, or is of another configuration, log or number of steps.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in flatten(state).items()}
    shapes["generator"] = tuple(generator.get_state().shape)
    dtypes: dict[str, Any] = {"near": np.int64, "generator": np.uint8}
    dtypes |= {f"scales/{name}": value.cpu().numpy().dtype for name, value in state.scales.items()}
    file = read_tensors(path, _FORMAT)
    run = file.header.get("run")
    if not isinstance(run, dict) or run.get("fingerprint") != identity.fingerprint:
        difference = identity.difference(run)
        told = "" if difference is None else f" (checkpoint's -> this run's: {difference})"
        raise ValueError(
            f"checkpoint {path} belongs to another configuration, log or number of steps{told}; "
            "pass the same ones, or another checkpoint file"
        )
    done = file.header.get("done")
    if type(done) is not int or done < 0:
        raise ValueError(f"checkpoint {path} has no step count")
    # The number of rows near the boundary is fixed only once the log has been read.
    shapes["near"] = file.shape("near")
    if len(shapes["near"]) != 1:
        raise ValueError(f"checkpoint {path}: 'near' must have one axis, got {shapes['near']}")
    arrays = file.load(shapes, dtypes)
    if not ((arrays["near"] >= 0) & (arrays["near"] < transitions)).all():
        raise ValueError(f"checkpoint {path}: 'near' points outside the log")
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    generator.set_state(flat.pop("generator"))
    moved = {name: tensor.to(generator.device) for name, tensor in flat.items()}
    return unflatten(state, moved), done
