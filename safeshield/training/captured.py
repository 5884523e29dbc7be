"""Updates that are captured as CUDA graphs. This module has never run on a GPU.

Each update of a training on a GPU starts some hundreds of short operations, and starting one from
Python is expected to take longer than the GPU needs for it. A CUDA graph is a recording of these
operations, which the GPU repeats after one call. The recording has three conditions:

- The operations and the memory that they use are the same in each repetition. `CapturedUpdate`
  therefore keeps one copy of the training state, which the graph reads and overwrites.
- The update does not read numbers from the device, because nothing is computed while operations
  are recorded, and uses no arrays that are not on it. Otherwise `Phase.capturable` is False.
- The update has no random numbers of its own. They are drawn outside of it (`state.Draw`).

tests/test_captured.py checks on the CPU that the updates of the offline algorithms fulfil these
conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safeshield.training.checkpoint import flatten, from_tree, to_tree
from safeshield.training.state import Draw, Metrics, Phase, TrainState, Update

_WARM_UP = 3
"""Number of plain updates before the recording, as PyTorch's documentation of CUDA graphs has."""


def executed(phase: Phase, device: torch.device, capture: bool) -> Update:
    """Return the function that makes the updates of a phase.

    Where the device is a GPU, `capture` is set and the update is capturable, it is a
    `CapturedUpdate`; otherwise, and always on the CPU, it is the update itself.
    """
    if device.type == "cuda" and capture and phase.capturable:
        return CapturedUpdate(phase.update, phase.name, device)
    return phase.update


class CapturedUpdate:
    """An update as a CUDA graph, recorded when it is called for the first time.

    A call has the results of the plain update, up to rounding. It differs in one respect: the state
    and the metrics that it returns are overwritten by the next call, so that whoever keeps a state
    must copy it (`copied`).

    Args:
        update: Update of a capturable phase.
        phase: Name of the phase, for errors.
        device: The GPU.
    """

    def __init__(self, update: Update, phase: str, device: torch.device) -> None:
        self._update, self._phase, self._device = update, phase, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._replaced: set[str] = set()
        """Tensors that the update does not change, but the caller has replaced at least once."""
        self._shared: set[str] = set()
        """Networks and tensors that are not copies of the caller's, by their names."""
        self._state: TrainState
        self._draw: Draw
        self._metrics: Metrics

    def __call__(self, state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and its metrics.

        Args:
            state: State before the update. If it is not the one that the last call returned, its
                tensors are copied to the memory of the graph.
            draw: Random numbers of the update.

        Raises:
            RuntimeError: The update cannot be captured, or the GPU failed.
        """
        if self._graph is None or not self._load(state):
            self._graph = self._record(state, draw)
        for kept, given in zip(self._draw, draw, strict=True):
            kept.copy_(given)
        self._graph.replay()
        # No update reads or writes the boundary rows.
        return self._state._replace(boundary_rows=state.boundary_rows), self._metrics

    def _load(self, state: TrainState) -> bool:
        """Copy a state to the memory of the graph; return False where it must be recorded anew."""
        if all(mine is given for mine, given in zip(self._state[:-1], state, strict=False)):
            return True
        mine, given = _leaves(self._state), _leaves(state)
        changed = [name for name in mine if given[name] is not mine[name]]
        shared = self._shared.intersection(changed)
        self._replaced |= shared
        if shared or any(given[name].shape != mine[name].shape for name in changed):
            return False
        _overwrite([mine[name] for name in changed], [given[name] for name in changed])
        return True

    def _record(self, state: TrainState, draw: Draw) -> torch.cuda.CUDAGraph:
        """Return a graph of the update, which begins with a copy of this state."""
        device, graph = self._device, torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The stream is set although it is the current one, so that it is again after an error.
        with torch.cuda.device(device), torch.cuda.stream(main):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                # The first call also computes what the update keeps, such as windows of targets.
                for _ in range(_WARM_UP):
                    after, _ = self._update(state, draw)
            main.wait_stream(side)
            self._keep(state, after, draw)
            try:
                # "thread_local", because a thread may be writing a checkpoint.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    moved, self._metrics = self._update(self._state, self._draw)
                    mine, new = _leaves(self._state), _leaves(moved)
                    changed = [name for name in mine if new[name] is not mine[name]]
                    _overwrite([mine[name] for name in changed], [new[name] for name in changed])
            except RuntimeError as error:
                error.add_note(
                    f"while the update of the phase '{self._phase}' was captured as a CUDA graph. "
                    "Pass capture=False to fit to run it operation by operation; an update of your "
                    "own that reads numbers from the device needs Phase(..., capturable=False)"
                )
                raise
        return graph

    def _keep(self, state: TrainState, after: TrainState, draw: Draw) -> None:
        """Make the memory that the graph reads and overwrites.

        Tensors that the update leaves as they are, such as networks that are trained in another
        phase, are used in place and not copied. What an update derives from them in Python and
        keeps, by the identity of a network, is then still valid.

        Args:
            state: State before an update.
            after: State after it.
            draw: Random numbers of an update.
        """
        self._shared = set()

        def own(before: Any, after: Any, name: str) -> Any:  # noqa: ANN401 - a tree or a tensor
            names = [name, *(key for key in flatten({name: before}) if isinstance(before, Mapping))]
            if after is before and not self._replaced.intersection(names):
                self._shared.update(names)
                return before
            if isinstance(before, Mapping):
                return {key: own(before[key], after[key], f"{name}/{key}") for key in before}
            return before.clone()

        tree, new = to_tree(state), to_tree(after)
        self._state = from_tree({key: own(tree[key], new[key], key) for key in tree})
        self._draw = Draw(*(tensor.clone() for tensor in draw))


def _leaves(state: TrainState) -> dict[str, Tensor]:
    """Return the tensors of a state by their names in a checkpoint, without the boundary rows."""
    leaves = flatten(to_tree(state))
    del leaves["near"]
    return leaves


def _overwrite(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy `values` to `tensors`; a value may be another one of the tensors."""
    torch._foreach_copy_(tensors, [value.clone() for value in values])
