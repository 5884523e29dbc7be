"""The loop around a pure update: phases, batches, checkpoints, logging.

An algorithm hands over a list of `Phase`s. Each has a pure update, from (state, indices, noise) to
(state, metrics); this module draws the indices and the noise from one generator on the device,
counts, logs at intervals, and writes checkpoints from which a run goes on exactly as if it had
never stopped: all that a run depends on is the `TrainState` and the generator's state.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from safeshield.files.schema import whole
from safeshield.training.checkpoint import load_checkpoint, save_checkpoint
from safeshield.training.log import RunIdentity
from safeshield.training.state import Draw, Metrics, Phase, TrainState

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

_SECONDS = 60.0
"""Between two checkpoints, at most."""


@dataclass(frozen=True)
class FitOptions:
    """How a run is shown, logged and saved: what users pass to `fit`.

    Raises:
        TypeError: a number is no whole one.
        ValueError: `steps` does not suffice for one in each phase, or the others do not fit.
        FileNotFoundError: the checkpoint's folder does not exist.
    """

    steps: int
    """Updates in all."""
    fewest_steps: int = 1
    """One for each phase."""
    progress_bar: bool = False
    log_dir: str | os.PathLike[str] | None = None
    """Folder for TensorBoard files; none without it."""
    checkpoint: str | os.PathLike[str] | None = None
    """File to go on from where it exists, and to write to."""
    checkpoint_every: int = 2000
    stop_after: int | None = None
    """Steps after which to stop, leaving a checkpoint; None: run to the end."""
    log_every: int = 200

    def __post_init__(self) -> None:
        settled = {"checkpoint_every": whole("checkpoint_every", self.checkpoint_every, least=1)}
        if self.stop_after is not None:
            settled["stop_after"] = whole("stop_after", self.stop_after, least=0)
        settled["steps"] = whole("steps", self.steps, least=self.fewest_steps)
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if self.stop_after is not None and self.checkpoint is None:
            raise ValueError("stop_after needs a checkpoint file to stop into")
        if self.checkpoint is not None and not Path(self.checkpoint).parent.is_dir():
            raise FileNotFoundError(f"make the folder of the checkpoint {self.checkpoint} first")


def device_of(device: str | torch.device) -> torch.device:
    """Return a device; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if isinstance(device, str | torch.device):
            found = torch.device(device)
            if found.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"device {device!r}: this torch sees no CUDA; use 'cpu' or 'auto'")
            return found
    except RuntimeError:
        pass
    raise ValueError(
        f"device must be 'auto', 'cpu', 'cuda' (or 'cuda:0', ...) or a torch.device, got {device!r}"
    )


def run_phases(
    phases: list[Phase],
    state: TrainState,
    generator: torch.Generator,
    *,
    transitions: int,
    noise_features: int,
    options: FitOptions,
    identity: RunIdentity,
) -> tuple[TrainState, bool]:
    """Run all phases from wherever the checkpoint stands; return the state and whether it ended.

    Args:
        phases: what to do, in order.
        state: the start, used where there is no checkpoint.
        generator: source of all randomness, on the device of the state.
        transitions: N, rows of the log.
        noise_features: width of the noise that an update draws for each transition.
        options: see `FitOptions`.
        identity: of the configuration, the log and the steps; a checkpoint of others is refused.
    """
    done, path = 0, None if options.checkpoint is None else Path(options.checkpoint)
    if path is not None and path.exists():
        state, done = load_checkpoint(path, state, generator, identity, transitions)
    saved = time.perf_counter()
    with contextlib.closing(_Progress(phases, options, done)) as progress:
        for phase, local in _remaining(phases, done):
            if options.stop_after is not None and done >= options.stop_after:
                if path is not None:
                    save_checkpoint(path, state, done, generator, identity, phase.name)
                return state, False
            if phase.refresh is not None and local % phase.refresh_every == 0:
                state = phase.refresh(state, generator)
            draw = _draw(phase, state, generator, transitions, noise_features)
            state, metrics = phase.update(state, draw)
            done, last = done + 1, local + 1 == phase.steps
            if done % options.log_every == 0 or last:
                progress.tell(phase, state, draw, metrics, done)
            if last:
                _check_weights(state, phase.name, done)
            if path is not None and (
                last
                or done % options.checkpoint_every == 0
                or time.perf_counter() - saved > _SECONDS
            ):
                save_checkpoint(path, state, done, generator, identity, phase.name)
                saved = time.perf_counter()
    return state, True


def _remaining(phases: list[Phase], done: int) -> Iterator[tuple[Phase, int]]:
    """Yield the updates that are left, each as its phase and its place in it."""
    for phase in phases:
        yield from ((phase, local) for local in range(min(done, phase.steps), phase.steps))
        done = max(done - phase.steps, 0)


class _Progress:
    """The progress bar, and the figures in TensorBoard."""

    def __init__(self, phases: list[Phase], options: FitOptions, done: int) -> None:
        total = sum(phase.steps for phase in phases)
        self._bar = tqdm(total=total, initial=done, disable=not options.progress_bar, unit="step")
        self._writer: SummaryWriter | None = None
        if options.log_dir is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(options.log_dir), purge_step=done or None)
        self._first, self._started = done, time.perf_counter()

    def tell(
        self, phase: Phase, state: TrainState, draw: Draw, metrics: Metrics, done: int
    ) -> None:
        """Write down what an update came to: the only place where numbers leave the device."""
        if phase.report is not None:
            metrics = {**metrics, **phase.report(state, draw)}
        values = {key: float(value) for key, value in metrics.items()}
        seconds = time.perf_counter() - self._started
        values["time/steps_per_second"] = (done - self._first) / seconds
        _check_finite(values, phase.name, done)
        self._bar.set_description(phase.name, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, done)

    def close(self) -> None:
        """Finish the bar and the file."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _draw(
    phase: Phase, state: TrainState, generator: torch.Generator, transitions: int, features: int
) -> Draw:
    device, size = generator.device, phase.batch_size
    rows = torch.randint(transitions, (size,), generator=generator, device=device)
    near = round(size * phase.near_share) if len(state.boundary_rows) else 0
    if near:
        picks = torch.randint(len(state.boundary_rows), (near,), generator=generator, device=device)
        rows[:near] = state.boundary_rows[picks]
    noise = torch.randn(size, features, generator=generator, device=device)
    uniform = torch.rand(size, 1, generator=generator, device=device)
    return Draw(rows, noise, uniform)


def _check_finite(values: Mapping[str, float], phase: str, step: int) -> None:
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise _diverged(f"{bad[0]} is {values[bad[0]]}", phase, step)


def _check_weights(state: TrainState, phase: str, step: int) -> None:
    # The metrics are of before the last update: only the weights tell what that one did.
    for group in (state.networks, state.targets):
        for name, params in group.items():
            if not torch.stack([tensor.isfinite().all() for tensor in params.values()]).all():
                raise _diverged(f"a weight of the network '{name}' is NaN or infinite", phase, step)


def _diverged(what: str, phase: str, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"training diverged in the phase '{phase}': {what} at step {step}. Common causes: rewards "
        "or constraints of extreme size in the log (rescale them), a learning_rate that is too "
        "high, or a weight, temperature or discount of the config that makes a loss huge"
    )
