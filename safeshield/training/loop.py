"""The loop around a pure update: phases, batches, checkpoints, logging.

An algorithm hands over a list of `Phase`s. Each has a pure update, from (state, indices, noise) to
(state, metrics); this module draws the indices and the noise from one generator on the device,
counts, logs at intervals, and writes checkpoints from which a run goes on exactly as if it had
never stopped: all that a run depends on is the `TrainState` and the generator's state.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from safeshield.files.schema import whole
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.mlp import Networks
from safeshield.nn.optim import AdamState, adam
from safeshield.training.log import RunIdentity

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Metrics = dict[str, Tensor]
_SECONDS = 60.0
"""Between two checkpoints, at most."""


class TrainState(NamedTuple):
    """Everything that an update reads and writes."""

    networks: Networks
    """What is trained."""
    targets: Networks
    """Slow copies of some of them."""
    moments: dict[str, AdamState]
    """Adam's moments, by phase."""
    scales: dict[str, Tensor]
    """Statistics that go along: running ones, () each; what was read off the log, (N,)."""
    boundary_rows: Tensor
    """(M,) int64: the transitions nearest to the learned boundary, drawn more often."""


class Draw(NamedTuple):
    """What one update uses: all its randomness, drawn outside."""

    rows: Tensor
    """(batch,) int64 indices of transitions."""
    noise: Tensor
    """(batch, act) standard normal; (batch, latent) where a policy has a latent space."""
    time: Tensor
    """(batch, 1) uniform in [0, 1]."""


Update = Callable[[TrainState, Draw], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one update."""

    name: str
    steps: int
    update: Update
    batch_size: int
    near_share: float = 0.0
    """Share of each batch that is drawn from `TrainState.boundary_rows`."""
    refresh: Callable[[TrainState, torch.Generator], TrainState] | None = None
    """Called every `refresh_every` steps: re-reads the log with the current networks."""
    refresh_every: int = 250
    report: Callable[[TrainState, Draw], Metrics] | None = None
    """What to log besides, asked only when numbers are written down."""


def together(*updates: Update) -> Update:
    """Return one update that makes several in order, from the same draw."""

    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        for part in updates:
            state, more = part(state, draw)
            metrics |= more
        return state, metrics

    return update


def learning_rate(base: float, count: Tensor, steps: int, end: float = 1.0) -> Tensor:
    """Constant until half of ``end * steps``, then linearly down to a fiftieth at that point.

    Args:
        base: the rate at the start.
        count: () updates made.
        steps: updates in all.
        end: share of them after which the rate stays at its lowest.
    """
    progress = count / (steps * end)
    return base * torch.clamp(2.0 - 2.0 * progress, 0.02, 1.0)


def descend(
    state: TrainState,
    phase: str,
    names: tuple[str, ...],
    loss: Callable[[Networks], tuple[Tensor, Metrics]],
    rates: Mapping[str, Tensor],
) -> tuple[TrainState, Metrics]:
    """One Adam step on `loss` for the networks called `names`; everything else is held fixed.

    Args:
        state: what is known so far; not changed.
        phase: whose moments to use.
        names: networks to update.
        loss: from all networks to a () loss and metrics.
        rates: learning rate of each of them.
    """
    leaves = {
        name: {key: tensor.detach().requires_grad_() for key, tensor in params.items()}
        for name, params in state.networks.items()
        if name in names
    }
    value, metrics = loss({**state.networks, **leaves})
    flat = [tensor for params in leaves.values() for tensor in params.values()]
    gradients = list(torch.autograd.grad(value, flat))
    with torch.no_grad():
        plain = {name: state.networks[name] for name in leaves}
        steps = [rates[name] for name, params in plain.items() for _ in params]
        updated, moments = adam(plain, gradients, state.moments[phase], steps)
    return (
        state._replace(
            networks={**state.networks, **updated}, moments={**state.moments, phase: moments}
        ),
        metrics,
    )


@dataclass(frozen=True)
class FitOptions:
    """How a run is shown, logged and saved."""

    steps: int
    """Updates in all."""
    progress_bar: bool = False
    log_dir: Path | None = None
    """Folder for TensorBoard files; none without it."""
    log_every: int = 200
    checkpoint: Path | None = None
    """File to go on from where it exists, and to write to."""
    checkpoint_every: int = 2000
    stop_after: int | None = None
    """Steps after which to stop, leaving a checkpoint; None: run to the end."""


def fit_options(
    steps: int,
    fewest_steps: int,
    *,
    progress_bar: bool,
    log_dir: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    stop_after: int | None = None,
) -> FitOptions:
    """Check what users pass to `fit`, and return it as `FitOptions`.

    Raises:
        TypeError: a number is no whole one.
        ValueError: `steps` does not suffice for one in each phase, or the others do not fit.
        FileNotFoundError: the checkpoint's folder does not exist.
    """
    checkpoint_every = whole("checkpoint_every", checkpoint_every, least=1)
    if stop_after is not None:
        stop_after = whole("stop_after", stop_after, least=0)
    steps = whole("steps", steps, least=fewest_steps)  # one for each phase
    if stop_after is not None and checkpoint is None:
        raise ValueError("stop_after needs a checkpoint file to stop into")
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"make the folder of the checkpoint {checkpoint} first")
    return FitOptions(
        steps=steps,
        progress_bar=progress_bar,
        log_dir=None if log_dir is None else Path(log_dir),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        stop_after=stop_after,
    )


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
    done = 0
    if options.checkpoint is not None and options.checkpoint.exists():
        state, done = load_checkpoint(options.checkpoint, state, generator, identity, transitions)
    total = sum(phase.steps for phase in phases)
    writer = _writer(options.log_dir, done)
    bar = tqdm(total=total, initial=done, disable=not options.progress_bar, unit="step")
    started, first = time.perf_counter(), done
    offset, saved = 0, started
    try:
        for phase in phases:
            end = offset + phase.steps
            for local in range(max(done - offset, 0), phase.steps):
                if options.stop_after is not None and done >= options.stop_after:
                    if options.checkpoint is not None:
                        save_checkpoint(
                            options.checkpoint, state, done, generator, identity, phase.name
                        )
                    return state, False
                if phase.refresh is not None and local % phase.refresh_every == 0:
                    state = phase.refresh(state, generator)
                draw = _draw(phase, state, generator, transitions, noise_features)
                state, metrics = phase.update(state, draw)
                done += 1
                if done % options.log_every == 0 or done == end:
                    # The only place where numbers leave the device.
                    if phase.report is not None:
                        metrics = {**metrics, **phase.report(state, draw)}
                    values = {key: float(value) for key, value in metrics.items()}
                    values["time/steps_per_second"] = (done - first) / (
                        time.perf_counter() - started
                    )
                    _check_finite(values, phase.name, done)
                    bar.set_description(phase.name, refresh=False)
                    bar.update(done - bar.n)
                    if writer is not None:
                        for key, value in values.items():
                            writer.add_scalar(key, value, done)
                if done == end:
                    _check_weights(state, phase.name, done)
                if options.checkpoint is not None and (
                    done % options.checkpoint_every == 0
                    or done == end
                    or time.perf_counter() - saved > _SECONDS
                ):
                    save_checkpoint(
                        options.checkpoint, state, done, generator, identity, phase.name
                    )
                    saved = time.perf_counter()
            offset = end
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return state, True


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


def _writer(log_dir: Path | None, done: int) -> SummaryWriter | None:
    if log_dir is None:
        return None
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=done or None)


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


def _flatten(state: TrainState) -> dict[str, Tensor]:
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


def _unflatten(state: TrainState, flat: Mapping[str, Tensor]) -> TrainState:
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
    flat = {**_flatten(state), "generator": generator.get_state()}
    header = {
        "format": "safeshield-checkpoint",
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
    shapes = {name: tuple(tensor.shape) for name, tensor in _flatten(state).items()}
    shapes["generator"] = tuple(generator.get_state().shape)
    dtypes: dict[str, Any] = {"near": np.int64, "generator": np.uint8}
    dtypes |= {f"scales/{name}": value.cpu().numpy().dtype for name, value in state.scales.items()}
    file = read_tensors(path, "safeshield-checkpoint")
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
    return _unflatten(state, moved), done
