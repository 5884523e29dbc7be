"""The training loop: phases, batches, checkpoints, logging and callbacks.

An algorithm provides a list of `Phase`s. Each phase has a pure update from (state, indices, noise)
to (state, metrics). This module draws the indices and the noise from one generator on the device,
counts the updates, logs at intervals and writes checkpoints. A run that resumes from a checkpoint
gives the same results as one that was not interrupted, because a run depends only on the
`TrainState` and the state of the generator.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from safeshield.files.atomic import check_writable
from safeshield.files.lock import claimed
from safeshield.files.schema import whole
from safeshield.files.settings import check
from safeshield.training.callbacks import (
    TrainingCallback,
    TrainingStep,
    check_different_files,
    checked_callbacks,
    goes_on,
)
from safeshield.training.captured import executed
from safeshield.training.checkpoint import (
    CheckpointWriter,
    checkpoint_bytes,
    load_checkpoint,
    member,
    stacked,
)
from safeshield.training.log import RunIdentity
from safeshield.training.state import Draw, Metrics, Phase, TrainState, Update
from safeshield.training.stopping import Stopped, StopRequest

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from safeshield.training.agent import Learner

_SECONDS = 60.0
"""Longest time between two checkpoints, in seconds."""


@dataclass(frozen=True)
class FitOptions:
    """Options of `fit` for the progress bar, the logging, the checkpoints and the callbacks.

    Raises:
        TypeError: A number is not a whole number, `capture` is not a bool, or a callback is not a
            `TrainingCallback`.
        ValueError: `steps` is below one for each phase, another number is out of range,
            `stop_after` is given without a checkpoint, a callback occurs twice, or two of the
            checkpoint and the files of callbacks are the same file.
        OSError: The checkpoint cannot be written; see `files.atomic.check_writable`.
    """

    steps: int
    """Total number of updates."""
    fewest_steps: int = 1
    """Smallest allowed number of updates, which is one for each phase."""
    progress_bar: bool = False
    """Whether a progress bar is shown."""
    log_dir: str | os.PathLike[str] | None = None
    """Folder for TensorBoard files; None writes none."""
    checkpoint: str | os.PathLike[str] | None = None
    """File from which training resumes where it exists, and to which checkpoints are written."""
    checkpoint_every: int = 2000
    """Number of updates between two checkpoints."""
    stop_after: int | None = None
    """Number of updates after which to stop with a checkpoint; None means to run to the end."""
    log_every: int = 200
    """Number of updates after which metrics are written to TensorBoard and shown."""
    callbacks: Sequence[TrainingCallback] = ()
    """Callbacks, which are called in this order."""
    capture: bool = True
    """Whether the updates of a training on a GPU are captured as CUDA graphs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "callbacks", checked_callbacks(self.callbacks))
        check("capture", bool, self.capture)
        settled = {"checkpoint_every": whole("checkpoint_every", self.checkpoint_every, least=1)}
        if self.stop_after is not None:
            settled["stop_after"] = whole("stop_after", self.stop_after, least=0)
        settled["steps"] = whole("steps", self.steps, least=self.fewest_steps)
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if self.stop_after is not None and self.checkpoint is None:
            raise ValueError("stop_after needs a checkpoint file to resume from; pass checkpoint")
        if self.checkpoint is not None:
            check_writable(Path(self.checkpoint))
        check_different_files(
            self.callbacks, None if self.checkpoint is None else Path(self.checkpoint)
        )


def run_phases(
    phases: list[Phase],
    state: TrainState,
    generator: torch.Generator,
    options: FitOptions,
    identity: RunIdentity,
    transitions: int,
    noise_features: int,
    agent: Callable[[TrainState, int], Learner[Any, Any]],
) -> tuple[TrainState, int]:
    """Run all phases from the checkpoint on; return the state and the number of updates made.

    The number is that of all updates, unless `stop_after` or a callback ends the run earlier. The
    checkpoint then holds the returned state. The run holds the checkpoint's path, so that no other
    run writes it. After Ctrl-C or SIGTERM it writes a checkpoint after the update under way.

    Args:
        phases: Phases in order.
        state: Initial state, which is used where there is no checkpoint.
        generator: Source of all random numbers, on the device of the state.
        options: Progress bar, logging, checkpoints and callbacks; see `FitOptions`.
        identity: Identity of the run. A checkpoint of another run is rejected.
        transitions: Number N of rows of the log.
        noise_features: Width of the noise that an update draws for each transition.
        agent: Function from a state and the number of updates made to an agent with its weights,
            for callbacks.

    Raises:
        Stopped: A signal has ended the run, and the checkpoint holds all updates made. Without a
            checkpoint, Ctrl-C raises KeyboardInterrupt at once.
        OSError: The disk has no room for the checkpoint.
        ValueError: Another run has the checkpoint, or it is of another run.
    """
    keep_freed_memory()
    done, path = 0, None if options.checkpoint is None else Path(options.checkpoint)
    writer = CheckpointWriter()
    with contextlib.ExitStack() as stack:
        if path is not None:
            stack.enter_context(claimed(path))
            check_writable(path, checkpoint_bytes(state))
            if path.exists():
                state, done = load_checkpoint(path, state, generator, identity, transitions)
                writer.written[path] = done
        saved, saved_at = time.perf_counter(), done
        asked = stack.enter_context(StopRequest(path is not None))
        stack.enter_context(writer)
        progress = stack.enter_context(contextlib.closing(_Progress(phases, options, done)))
        step = progress.step(phases[0], state, None, {}, done, agent)
        for callback in options.callbacks:
            goes_on(callback, "on_start", step)
        for phase, update, local in _remaining(phases, done, generator.device, options.capture):
            if options.stop_after is not None and done >= options.stop_after:
                if path is not None:
                    writer.save(path, state, done, generator, identity, phase.name)
                return state, done
            if phase.refresh is not None and local % phase.refresh_every == 0:
                state = phase.refresh(state, generator)
            draw = _draw(phase, state, generator, transitions, noise_features)
            state, metrics = update(state, draw)
            done, last = done + 1, local + 1 == phase.steps
            step = progress.step(phase, state, draw, metrics, done, agent)
            if done % options.log_every == 0 or last:
                progress.tell(step)
            if last:
                _check_weights(state, phase.name, done)
            if path is not None and (last or _checkpoint_due(options, done, saved)):
                writer.save(path, state, done, generator, identity, phase.name)
                saved, saved_at = time.perf_counter(), done
            if path is not None and asked.number is not None:
                if saved_at < done:
                    writer.save(path, state, done, generator, identity, phase.name)
                raise _stopped(done, [path], asked.number)
            due = [one for one in options.callbacks if done % one.every == 0]
            answers = [goes_on(one, "on_step", step) for one in due]
            answers += [goes_on(one, "on_phase", step) for one in options.callbacks if last]
            if not all(answers):
                if path is not None and saved_at < done:
                    writer.save(path, state, done, generator, identity, phase.name)
                break
        for callback in options.callbacks:
            callback.on_end(step)
    return state, done


def _stopped(done: int, paths: Sequence[Path], number: int) -> Stopped:
    """Return the error of a run that a signal ends, whose checkpoints have been begun."""
    files = ", ".join(map(str, paths))
    return Stopped(
        f"stopped after {done} updates; a call with the same arguments continues from {files}",
        number,
    )


def _checkpoint_due(options: FitOptions, done: int, saved: float) -> bool:
    """Return whether a checkpoint is due after `done` updates; `saved` is the time of the last."""
    return done % options.checkpoint_every == 0 or time.perf_counter() - saved > _SECONDS


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next update.

    An update allocates and frees some hundred arrays of up to a few MiB. The GNU C library returns
    arrays above a threshold to the operating system, and the next update then waits for fresh
    pages. The threshold rises to the largest array freed so far, so one array of almost 32 MiB, the
    limit of the threshold, is allocated and freed. Other C libraries ignore this.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def _remaining(
    phases: list[Phase], done: int, device: torch.device, capture: bool
) -> Iterator[tuple[Phase, Update, int]]:
    """Yield the remaining updates, each as its phase, function and index within the phase."""
    for phase in phases:
        update = executed(phase, device, capture)
        for local in range(min(done, phase.steps), phase.steps):
            yield phase, update, local
        done = max(done - phase.steps, 0)


class _Progress:
    """The progress bar and the TensorBoard files."""

    def __init__(self, phases: list[Phase], options: FitOptions, done: int) -> None:
        total = sum(phase.steps for phase in phases)
        self._bar = tqdm(total=total, initial=done, disable=not options.progress_bar, unit="step")
        self._writer: SummaryWriter | None = None
        if options.log_dir is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(options.log_dir), purge_step=done or None)
        self._first, self._started = done, time.perf_counter()
        self._steps = total

    def step(
        self,
        phase: Phase,
        state: TrainState,
        draw: Draw | None,
        metrics: Metrics,
        done: int,
        agent: Callable[[TrainState, int], Learner[Any, Any]],
    ) -> TrainingStep:
        """Return the record of an update, whose numbers are copied from the device when read.

        `draw` and `metrics` are those of the update, and None and empty before the first one.
        """

        def measure() -> Mapping[str, float]:
            own = {key: float(value) for key, value in metrics.items()}
            _check_finite(own, phase.name, done)
            # Metrics of `phase.report` are not part of the loss. They may be infinite, such as a
            # divergence of two distributions.
            further = phase.report(state, draw) if phase.report is not None and draw else {}
            return own | {key: float(value) for key, value in further.items()}

        return TrainingStep(
            phase.name, done, self._steps, measure, lambda: agent(state, done), self._write
        )

    def tell(self, step: TrainingStep) -> None:
        """Write the metrics of an update to TensorBoard and update the progress bar."""
        seconds = time.perf_counter() - self._started
        rate = (step.step - self._first) / seconds
        values = {**step.metrics, "time/steps_per_second": rate}
        self._bar.set_description(step.phase, refresh=False)
        self._bar.update(step.step - self._bar.n)
        self._write(values, step.step)

    def _write(self, values: Mapping[str, float], at: int) -> None:
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, at)

    def close(self) -> None:
        """Close the progress bar and the TensorBoard file."""
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
    # The metrics were computed before the last update, so only the weights show its effect.
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


# -- several members -------------------------------------------------------------------------------


class Member(NamedTuple):
    """One of several training runs that are computed together."""

    name: str
    """Name of the member in messages."""
    state: TrainState
    """State before the next update."""
    generator: torch.Generator
    """Source of all random numbers of the member, on the device of the state."""
    identity: RunIdentity
    """Identity of the run, for its checkpoint."""
    checkpoint: Path | None
    """File to which checkpoints are written; None writes none."""


def run_together(
    phases: list[Phase],
    members: Sequence[Member],
    options: FitOptions,
    done: int,
    transitions: int,
    noise_features: int,
) -> list[TrainState]:
    """Run all phases for several members as one batched computation; return their states.

    The members have the same networks and phases, and each has the random numbers that it has in
    `run_phases`. Metrics are not written. They are checked as often as there.

    Args:
        phases: Phases in order. Their updates can be mapped by `torch.vmap`.
        members: The members.
        options: Progress bar and number of updates between two checkpoints.
        done: Number of updates that each member has made.
        transitions: Number N of rows of the log.
        noise_features: Width of the noise that an update draws for each transition.
    """
    keep_freed_memory()
    state = stacked([one.state for one in members])
    generators, width = [one.generator for one in members], noise_features
    saved = time.perf_counter()
    total = sum(phase.steps for phase in phases)
    device, writer = generators[0].device, CheckpointWriter()
    paths = [one.checkpoint for one in members if one.checkpoint is not None]
    writer.written = {path: done for path in paths if done}
    with (
        StopRequest(len(paths) == len(members)) as asked,
        writer,
        tqdm(total=total, initial=done, disable=not options.progress_bar, unit="step") as bar,
    ):
        for phase, update, local in _remaining(phases, done, device, options.capture):
            if phase.refresh is not None and local % phase.refresh_every == 0:
                state = stacked(
                    [phase.refresh(member(state, i), own) for i, own in enumerate(generators)]
                )
            # Of the state, a draw depends on the boundary rows alone.
            draws = [
                _draw(phase, state._replace(boundary_rows=rows), generator, transitions, width)
                for rows, generator in zip(state.boundary_rows, generators, strict=True)
            ]
            draw = Draw(*map(torch.stack, zip(*draws, strict=True)))
            state, metrics = update(state, draw)
            done, last = done + 1, local + 1 == phase.steps
            bar.set_description(phase.name, refresh=False)
            bar.update()
            for i, one in enumerate(members):
                with named(one.name):
                    if done % options.log_every == 0 or last:
                        values = {key: float(each[i]) for key, each in metrics.items()}
                        _check_finite(values, phase.name, done)
                    if last:
                        _check_weights(member(state, i), phase.name, done)
            if last or asked.number is not None or _checkpoint_due(options, done, saved):
                for i, one in enumerate(members):
                    if one.checkpoint is not None:
                        own = one.generator, one.identity, phase.name
                        writer.save(one.checkpoint, member(state, i), done, *own)
                saved = time.perf_counter()
                if asked.number is not None:
                    raise _stopped(done, paths, asked.number)
    return [member(state, i) for i in range(len(members))]


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Add the name of a member of several runs to errors that occur in this context."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {name}")
        raise
