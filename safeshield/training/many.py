"""Training of several agents on one log, as one batched computation or in several processes.

Agents of one class whose settings differ in the seed alone have the same networks and the same
updates. `fit_many` trains them together: the states of their trainings are stacked along a leading
member axis, `torch.vmap` maps the losses over it, and one call of autograd and of Adam serves all
of them (`training.state.of_batch`). Each member has the random numbers of its own `fit`, so it ends
with the same weights, up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias, cast

import cloudpickle
import torch
from tqdm.auto import tqdm

from safeshield.data.dataset import OfflineDataset
from safeshield.files.lock import claimed
from safeshield.files.schema import json_values, whole
from safeshield.rollouts.workers import REGISTERING, sendable, threads_each
from safeshield.training.agent import OfflineAgent
from safeshield.training.checkpoint import load_checkpoint
from safeshield.training.log import LogTensors, run_identity
from safeshield.training.loop import FitOptions, Member, named, run_together
from safeshield.training.registry import ALGORITHMS
from safeshield.training.run import Config

Agent: TypeAlias = OfflineAgent[Any, Any]
_SECONDS_TO_END = 5.0
_LOG = "log"


def fit_many(
    members: Sequence[Agent | Config],
    dataset: OfflineDataset,
    steps: int,
    *,
    workers: int | None = None,
    progress_bar: bool = False,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 2000,
    capture: bool = True,
) -> list[Agent]:
    """Train several agents on one log and return them in the order in which they were given.

    Args:
        members: Agents, or settings of registered offline algorithms, whose agents then train on
            the device "auto". Agents are trained in place, as by `fit`.
        dataset: Log of whole episodes with labels.
        steps: Number of updates of each agent, as in `fit`.
        workers: None trains those members whose classes, devices and settings other than the seed
            are equal as one batched computation, and these groups one after the other. A number n
            above 0 trains each member by itself in one of n processes, of which each holds a copy
            of the log. 0 trains one member after the other in this process.
        progress_bar: Whether to show a progress bar: of the updates, or with processes of the
            members.
        checkpoints: Folder for the checkpoint of each member, "0.safetensors" for the first and so
            on; None writes none. They are those of `fit`, and training resumes from those that
            exist.
        checkpoint_every: Number of updates between two checkpoints of a member.
        capture: Whether updates on a GPU are captured as CUDA graphs, as in `fit`.

    Raises:
        TypeError: A member is neither an agent nor settings, a number is not a whole number, or
            `capture` is not a bool.
        ValueError: There is no member, two members are equal, or a reason that `fit` has.
        FileNotFoundError: The folder `checkpoints` does not exist.
        FloatingPointError: A loss or a weight of a member is NaN or infinite. A note of the error
            names the member. The trainings of the others end, too.
        RuntimeError: A process ended unexpectedly, or the losses of an algorithm of your own cannot
            be mapped by `torch.vmap`.

    Processes are spawned. They import the script that started them, so that a script must call
    ``fit_many(..., workers=2)`` below ``if __name__ == "__main__":``.

    >>> import gymnasium, safeshield
    >>> log = safeshield.collect(gymnasium.make("safeshield/Boat-v0"), "random", 20, seed=0)
    >>> small = {"critic_hidden": (16,), "behaviour_hidden": (16,), "fallback_hidden": (16,)}
    >>> trainers = fit_many([safeshield.ShieldConfig(seed=s, **small) for s in range(3)], log, 30)
    >>> [trainer.shield().trained_by for trainer in trainers]
    ['ShieldTrainer, seed 0', 'ShieldTrainer, seed 1', 'ShieldTrainer, seed 2']
    """
    agents = _agents(members)
    if workers is not None:
        workers = whole("workers", workers, least=0)
    if not (checkpoints is None or isinstance(checkpoints, str | os.PathLike)):
        raise TypeError(f"checkpoints must be the path of a folder, got {checkpoints!r:.60}")
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"checkpoints must be an existing folder, got {folder}: make it")
    options = [
        FitOptions(
            steps,
            agent._fewest_steps,
            progress_bar=progress_bar,
            checkpoint=None if folder is None else folder / f"{i}.safetensors",
            checkpoint_every=checkpoint_every,
            capture=capture,
        )
        for i, agent in enumerate(agents)
    ]
    if workers:
        _fit_in_processes(agents, dataset, options, workers)
        return agents
    for group in [[i] for i in range(len(agents))] if workers == 0 else _groups(agents):
        if len(group) == 1:
            (i,) = group
            with named(_name(i, agents[i])):
                _fit(agents[i], dataset, options[i])
        else:
            _fit_together({i: agents[i] for i in group}, dataset, [options[i] for i in group])
    return agents


def _agents(members: Sequence[Agent | Config]) -> list[Agent]:
    """Return the agents of `members`, or raise an error where they are not suitable."""
    if not isinstance(members, list | tuple) or not members:
        raise (ValueError if isinstance(members, list | tuple) else TypeError)(
            f"members must be a list of at least one agent or settings, got {members!r:.80}"
        )
    agents: list[Agent] = []
    for i, one in enumerate(members):
        agent = _agent(one, f"members[{i}]")
        for j, other in enumerate(agents):
            if type(other) is type(agent) and other.config == agent.config:
                raise ValueError(
                    f"members[{j}] and members[{i}] must differ, got {_name(j, other)} and the "
                    "same settings again: they would become the same agent; give one of them "
                    "another seed, or leave it out"
                )
        agents.append(agent)
    return agents


def _agent(member: object, what: str) -> Agent:
    if isinstance(member, OfflineAgent):
        return member
    known = [one.kind for one in ALGORITHMS.values() if one.offline]
    kinds = [kind for kind in known if kind.config_type is type(member)]
    if len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(
            f"{what} must be an agent where several algorithms have its settings, got a "
            f"{type(member).__name__}: pass one of {names} with these settings"
        )
    if not kinds:
        raise TypeError(
            f"{what} must be an agent that has `fit`, or the settings of a registered offline "
            f"algorithm, got {member!r:.80}: pass for example SafeFQLConfig(seed=0)"
        )
    agent: Agent = kinds[0](member)
    return agent


def _name(position: int, agent: Agent) -> str:
    return f"members[{position}], {type(agent).__name__} with seed {agent.config.seed}"


def _groups(agents: list[Agent]) -> list[list[int]]:
    """Return the positions of the agents that can be trained together, in groups."""
    groups: list[tuple[object, list[int]]] = []
    for i, agent in enumerate(agents):
        alike = type(agent), agent.device, dataclasses.replace(agent.config, seed=0)
        same = [group for key, group in groups if key == alike and agent._batchable()]
        if same:
            same[0].append(i)
        else:
            groups.append((alike, [i]))
    return [group for _, group in groups]


def _fit(agent: Agent, dataset: OfflineDataset, options: FitOptions) -> None:
    agent.fit(
        dataset,
        options.steps,
        progress_bar=options.progress_bar,
        checkpoint=options.checkpoint,
        checkpoint_every=options.checkpoint_every,
        capture=options.capture,
    )


def _fit_together(
    agents: dict[int, Agent], dataset: OfflineDataset, options: list[FitOptions]
) -> None:
    """Train agents that differ in their seeds alone as one batched computation.

    Args:
        agents: The agents, by their positions among all members.
        dataset: The log.
        options: Options of each agent.
    """
    first = next(iter(agents.values()))
    learned_from = first._check_log(dataset)
    model = first._describe(learned_from)
    # `vmap` cannot map the rows of arrays, so the log is a table of tensors also on the CPU.
    log = LogTensors.of(learned_from, model.scaling, first.device, normalised=True)
    run = first._run(model, log, options[0].steps)
    kind, steps = type(first).__name__, options[0].steps
    identity = run_identity(kind, first.config, learned_from, steps, first._before)
    begun: dict[int, dict[int, Member]] = {}
    with contextlib.ExitStack() as held:
        for (i, agent), own in zip(agents.items(), options, strict=True):
            generator = torch.Generator(agent.device).manual_seed(agent.config.seed)
            state, done = run.initial(generator), 0
            identity = dataclasses.replace(identity, config=json_values(agent.config))
            path = None if own.checkpoint is None else Path(own.checkpoint)
            if path is not None:
                held.enter_context(claimed(path))
                if path.exists():
                    with named(_name(i, agent)):
                        state, done = load_checkpoint(path, state, generator, identity, len(log))
            member = Member(_name(i, agent), state, generator, identity, path)
            begun.setdefault(done, {})[i] = member
        width = first._noise_features(model)
        # Checkpoints of an interrupted run may differ in their numbers of updates.
        for done, group in begun.items():
            with _vmap_explained(kind):
                states = run_together(
                    run.phases(), list(group.values()), options[0], done, len(log), width
                )
            for i, state in zip(group, states, strict=True):
                agents[i]._use(model, log, state)
                agents[i].updates, agents[i].chosen = steps, None


@contextlib.contextmanager
def _vmap_explained(kind: str) -> Iterator[None]:
    """Add to a RuntimeError what to do where a loss of the algorithm `kind` cannot be mapped."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"while several {kind} agents were trained as one batched computation. Where "
            "torch.vmap cannot map a loss of this algorithm, pass workers=0 to train one agent "
            "after the other, or a number of processes"
        )
        raise


# -- processes -------------------------------------------------------------------------------------


def _fit_in_processes(
    agents: list[Agent], dataset: OfflineDataset, options: list[FitOptions], workers: int
) -> None:
    """Train each agent by itself in one of several processes, which share the cores.

    The log and the results are passed as files of a temporary folder.
    """
    workers = min(workers, len(agents))
    context = multiprocessing.get_context("spawn")
    modules = [name for name in REGISTERING if name in sys.modules]
    waiting = iter(enumerate(agents))
    busy: dict[Connection, int] = {}
    started: list[tuple[BaseProcess, Connection]] = []

    def give(connection: Connection) -> None:
        """Give the next agent that waits to the process at the other end of `connection`."""
        for i, agent in waiting:
            own = dataclasses.replace(options[i], progress_bar=False)
            connection.send_bytes(
                cloudpickle.dumps((i, type(agent), agent.config, str(agent.device), own))
            )
            busy[connection] = i
            return

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(agents), disable=not options[0].progress_bar, unit="agent") as bar,
    ):
        with (Path(folder) / _LOG).open("wb") as file:
            cloudpickle.dump(dataset, file)
        try:
            with threads_each(max(1, torch.get_num_threads() // workers)):
                for _ in range(workers):
                    mine, theirs = context.Pipe()
                    process: BaseProcess = context.Process(
                        target=_work, args=(theirs, folder, modules), daemon=True
                    )
                    process.start()
                    theirs.close()
                    started.append((process, mine))
            for _, connection in started:
                give(connection)
            while busy:
                for ready in wait(list(busy)):
                    connection = cast("Connection", ready)
                    i = busy.pop(connection)
                    with named(_name(i, agents[i])):
                        _receive(connection)
                    agents[i]._take(agents[i]._read(_result(folder, i)))
                    bar.update()
                    give(connection)
        finally:
            for _, connection in started:
                connection.close()
            for process, connection in started:
                # A process without work ends by itself, because its pipe is closed.
                if connection in busy:
                    process.terminate()
                process.join(_SECONDS_TO_END)
                if process.is_alive():
                    process.terminate()
                    process.join(_SECONDS_TO_END)


def _result(folder: str, position: int) -> Path:
    return Path(folder) / f"{position}.safetensors"


def _receive(connection: Connection) -> None:
    """Wait until a process has trained its agent, and raise the error that it met."""
    try:
        error = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError) as gone:
        raise RuntimeError(
            "a process that trains an agent ended unexpectedly. A process imports the script that "
            "started it: the script must be a file, and what it does must stand below "
            '`if __name__ == "__main__":`. If both are so, the process may have lacked memory for '
            "its copy of the log: pass fewer workers, or workers=None"
        ) from gone
    if error is not None:
        raise error


def _work(connection: Connection, folder: str, modules: list[str]) -> None:
    """Train agents in a process until the pipe is closed.

    Args:
        connection: Pipe through which settings arrive, and an error or None is returned.
        folder: Folder that holds the log, and to which the trained agents are written.
        modules: Modules to import first, because they register environments and constraints.
    """
    dataset: OfflineDataset | None = None
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            packed, failed = connection.recv_bytes(), None
            try:
                if dataset is None:
                    dataset = _read_log(folder, modules)
                i, kind, config, device, options = cloudpickle.loads(packed)
                agent = kind(config, device=device)
                _fit(agent, dataset, options)
                agent.save(_result(folder, i))
            except Exception as error:
                failed = sendable(error)
            connection.send_bytes(pickle.dumps(failed))


def _read_log(folder: str, modules: list[str]) -> OfflineDataset:
    for name in modules:
        importlib.import_module(name)
    with (Path(folder) / _LOG).open("rb") as file:
        dataset: OfflineDataset = cloudpickle.load(file)
    return dataset
