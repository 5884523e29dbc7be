"""Updates that a GPU can repeat without Python, and checkpoints that a thread writes.

A CUDA graph repeats the operations of an update. The tests of the first part need no GPU: they show
for every update of the offline algorithms that it can be captured. Those marked `cuda` run the
graphs, and have never run.
"""

from __future__ import annotations

import copy
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_many import CASES, LOG, agents, discrete_log
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from safeshield import OfflineDataset, SafeFQL, SafeFQLConfig, ShieldConfig, ShieldTrainer
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.registry import ALGORITHMS
from safeshield.files.tensors import read_tensors
from safeshield.nn import optim
from safeshield.online.config import SSQLConfig
from safeshield.online.ssql import SafeSupportQLearning
from safeshield.training import checkpoint
from safeshield.training.agent import OfflineAgent
from safeshield.training.callbacks import TrainingCallback, TrainingStep
from safeshield.training.captured import CapturedUpdate, executed
from safeshield.training.checkpoint import (
    CheckpointWriter,
    flatten,
    from_tree,
    save_checkpoint,
    to_tree,
    unflatten,
)
from safeshield.training.log import LogTensors, run_identity
from safeshield.training.loop import _draw
from safeshield.training.run import Run
from safeshield.training.state import Draw, Metrics, Phase, TrainState, Update
from safeshield.values import backup

STEPS = 50
CPU = torch.device("cpu")
SUPPORT = {"support_weight": 1.0, "support_held_out": 0.4, "support_alpha": 0.3}
TINY = ShieldConfig(
    critic_hidden=(8,), behaviour_hidden=(8,), fallback_hidden=(8,), batch_size=16
)  # fmt: skip
MORE = ("shield, support", "shield, discrete")
SEQUENCES = ("bc", "fisor", "flrp, costs", "r2pac", "safefql", "shield, backup", *MORE)
OFFLINE = pytest.mark.parametrize("case", [*CASES, *MORE])
QUIET = pytest.mark.filterwarnings("ignore:the backup", "ignore:the unsafe region")


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return OfflineDataset.load(LOG)


def begun(
    case: str, log: OfflineDataset
) -> tuple[OfflineAgent[Any, Any], Run[Any, Any], TrainState, torch.Generator]:
    """Return an agent, its run on a log of tensors, the first state and the generator."""
    if case in CASES:
        (agent,) = agents(case, range(1))
    else:
        settings = SUPPORT if case == "shield, support" else {}
        agent = ShieldTrainer(ShieldConfig(**{**CASES["shield"][1], **settings}), device="cpu")
        log = log if settings else discrete_log()
    log = agent._check_log(log)
    model = agent._describe(log)
    # On a GPU the log is a table of tensors.
    run = agent._run(model, LogTensors.of(log, model.scaling, CPU, normalised=True), STEPS)
    generator = torch.Generator().manual_seed(0)
    return agent, run, run.initial(generator), generator


def refreshed(phase: Phase, state: TrainState, generator: torch.Generator) -> TrainState:
    return state if phase.refresh is None else phase.refresh(state, generator)


def mapped(state: TrainState, function: Callable[[Tensor], Tensor]) -> TrainState:
    tree = to_tree(state)
    return from_tree(unflatten(tree, {k: function(v) for k, v in flatten(tree).items()}))


# -- what can be captured --------------------------------------------------------------------------


def without_numbers(tensor: Tensor) -> Tensor:
    """Return a tensor of the device "meta", which has a shape and no numbers."""
    return torch.empty_like(tensor, device="meta")


def on_meta(update: Update, state: TrainState, draw: Draw) -> set[torch.device]:
    """Make an update where no tensor has numbers, and return the devices of its results."""
    state, metrics = update(mapped(state, without_numbers), Draw(*map(without_numbers, draw)))
    results = [*flatten(to_tree(state)).values(), *metrics.values()]
    return {tensor.device for tensor in results}


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """A function that copies a run to the device "meta"."""
    # The fused kernel does not exist there; the test below runs it. The windows of a stage are
    # composed once, before an update is captured.
    monkeypatch.setattr(optim, "functional_adam", lambda *_, **__: None)
    monkeypatch.setattr(backup, "_along", lambda one, *_: one)
    deepcopy = Tensor.__deepcopy__

    def moved(run: Any) -> Any:  # noqa: ANN401
        Tensor.__deepcopy__ = lambda tensor, _: without_numbers(tensor)  # type: ignore[method-assign]
        try:
            return copy.deepcopy(run)
        finally:
            Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]

    return moved


@QUIET
@pytest.mark.parametrize("case", [*CASES, "shield, discrete"])
def test_an_update_reads_no_number_from_its_device(
    case: str,
    log: OfflineDataset,
    meta: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The update runs on the device "meta", whose tensors hold no numbers, and makes no tensor
    on the host."""
    agent, run, state, generator = begun(case, log)
    elsewhere = meta(run)
    if case == "shield, discrete":
        elsewhere._table  # noqa: B018 - it is made once, before an update is captured
    for phase in elsewhere.phases():
        draw = _draw(phase, state, generator, len(run.log), agent._noise_features(run.model))
        with monkeypatch.context() as patch:
            for name in ("tensor", "as_tensor", "from_numpy"):
                patch.setattr(torch, name, lambda *_, **__: pytest.fail("made by the host"))
            assert on_meta(phase.update, state, draw) == {torch.device("meta")}, phase.name
        assert phase.capturable


def traced(captured: CapturedUpdate, state: TrainState, draw: Draw) -> Update:
    """Return the operations that an update made for this state, as a function of other states."""
    after, _ = captured._update(state, draw)
    captured._keep(state, after, draw)
    tree = to_tree(captured._state)
    names = [name for name in flatten(tree) if name not in captured._shared]

    def put(part: Any, values: Mapping[str, Tensor], name: str) -> Any:  # noqa: ANN401
        if name in captured._shared:
            return part
        if not isinstance(part, Mapping):
            return values[name]
        return {key: put(part[key], values, f"{name}/{key}") for key in part}

    def operations(values: list[Tensor], draw: list[Tensor]) -> tuple[list[Tensor], Metrics]:
        named = dict(zip(names, values, strict=True))
        moved, metrics = captured._update(
            from_tree({key: put(tree[key], named, key) for key in tree}), Draw(*draw)
        )
        leaves = flatten(to_tree(moved))
        return [leaves[name] for name in names], metrics

    def leaves(state: TrainState) -> list[Tensor]:
        flat = flatten(to_tree(state))
        return [flat[name] for name in names]

    recorded = make_fx(operations)(leaves(captured._state), list(captured._draw))

    def repeat(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        values, metrics = recorded(leaves(state), list(draw))
        flat = {**flatten(to_tree(state)), **dict(zip(names, values, strict=True))}
        return from_tree(unflatten(to_tree(state), flat)), metrics

    return repeat


def same(one: TrainState, other: TrainState) -> bool:
    mine, theirs = flatten(to_tree(one)), flatten(to_tree(other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@QUIET
@pytest.mark.parametrize("case", SEQUENCES)
def test_an_update_makes_the_same_operations_for_every_state_and_batch(
    case: str, log: OfflineDataset
) -> None:
    """What it did for the first ones, on later ones, is what it does for these, to the last bit."""
    agent, run, state, generator = begun(case, log)
    width = agent._noise_features(run.model)
    # Of the stages of the critics, which differ in the lengths of windows, the last.
    for phase in {phase.name.rstrip(" 0123456789"): phase for phase in run.phases()}.values():
        state = refreshed(phase, state, generator)
        draw = _draw(phase, state, generator, len(run.log), width)
        repeat = traced(CapturedUpdate(phase.update, phase.name, CPU), state, draw)
        for _ in range(3):
            draw = _draw(phase, state, generator, len(run.log), width)
            (found, told), (state, metrics) = repeat(state, draw), phase.update(state, draw)
            assert same(found, state), phase.name
            assert all(torch.equal(told[name], metrics[name]) for name in metrics)


def counting(count: list[int], base: Update) -> Update:
    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        count.append(0)
        moved, metrics = base(state, draw)
        scales = {**moved.scales, "count": torch.full((), float(len(count)))}
        return moved._replace(scales=scales), metrics

    return update


def reading(base: Update) -> Update:
    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        return base(state, draw) if float(draw.noise.sum()) < 1e9 else (state, {})

    return update


def choosing(base: Update) -> Update:
    def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        moved, _ = base(state, draw)
        return moved, {"positive": draw.noise[draw.noise > 0].mean()}

    return update


def test_the_checks_find_updates_that_cannot_be_captured(
    log: OfflineDataset, meta: Callable[[Any], Any]
) -> None:
    _, run, state, generator = begun("bc", log)
    (phase,) = run.phases()
    draws = [_draw(phase, state, generator, len(run.log), 2) for _ in range(2)]
    state = state._replace(scales={"count": torch.zeros(())})
    # The number of calls is kept in Python: a graph would repeat the first one.
    update = counting([], phase.update)
    repeat = traced(CapturedUpdate(update, "bc", CPU), state, draws[0])
    assert not same(repeat(state, draws[1])[0], update(state, draws[1])[0])
    (away,) = meta(run).phases()
    for wrong in (reading(away.update), choosing(away.update)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            on_meta(wrong, state, draws[0])
    with pytest.raises(RuntimeError):
        traced(CapturedUpdate(reading(phase.update), "bc", CPU), state, draws[0])


def test_all_offline_algorithms_are_checked() -> None:
    offline = {name for name, one in ALGORITHMS.items() if one.offline}
    assert {name for name, _ in CASES.values()} == offline - {"ssql"}


@pytest.mark.parametrize("extraction", ["forward", "reverse"])
def test_an_update_that_reads_arrays_says_that_it_cannot_be_captured(
    extraction: str, log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Phase] = []

    def noted(self: object, phases: list[Phase], initial: Any, *rest: object) -> TrainState:  # noqa: ANN401
        found.extend(phases)
        return initial(torch.Generator().manual_seed(0))

    monkeypatch.setattr(SafeSupportQLearning, "_train", noted)
    config = SSQLConfig(batch_size=16, extraction=extraction, extraction_steps=9)  # type: ignore[arg-type]
    SafeSupportQLearning(config=config, device="cpu").fit(log, steps=5)
    assert len(found) >= 2
    assert not any(phase.capturable for phase in found)


def test_what_an_update_leaves_as_it_is_stays_where_it_is(log: OfflineDataset) -> None:
    """What it changes is copied, so that the memory of the graph is nobody else's."""
    _, run, state, generator = begun("safefql", log)
    critics = run.phases()[0]
    draw = _draw(critics, state, generator, len(run.log), 2)
    captured = CapturedUpdate(critics.update, "critics", CPU)
    after, _ = critics.update(state, draw)
    captured._keep(state, after, draw)
    mine, given = captured._state, state
    assert same(mine, given)
    assert mine.networks["teacher"] is given.networks["teacher"]
    # The slow copies begin as the networks themselves, and must not share their memory.
    places = [t.data_ptr() for n, t in flatten(to_tree(mine)).items() if not n.startswith("near")]
    assert len(set(places)) == len(places)
    moved = {n for n, t in flatten(to_tree(after)).items() if t is not flatten(to_tree(given))[n]}
    theirs = {t.data_ptr() for t in flatten(to_tree(given)).values()}
    assert all(flatten(to_tree(mine))[name].data_ptr() not in theirs for name in moved)


def test_a_state_that_the_caller_replaced_is_copied_into_the_memory_of_the_graph(
    log: OfflineDataset,
) -> None:
    """Also where two of its tensors have changed places. Shared ones need another recording."""
    _, run, state, generator = begun("safefql", log)
    critics = run.phases()[0]
    draw = _draw(critics, state, generator, len(run.log), 2)
    captured = CapturedUpdate(critics.update, "critics", CPU)
    captured._keep(state, critics.update(state, draw)[0], draw)
    mine = captured._state
    assert captured._load(mine._replace(boundary_rows=torch.zeros(3, dtype=torch.int64)))
    name = next(iter(mine.targets))
    for tensor in mine.targets[name].values():
        tensor.add_(1.0)
    wanted = mine._replace(
        networks={**mine.networks, name: mine.targets[name]},
        targets={**mine.targets, name: mine.networks[name]},
    )
    before = mapped(wanted, torch.clone)
    assert not same(mine, before)
    assert captured._load(wanted)
    assert captured._state is mine
    assert same(mine, before)
    # A network that another phase trains, replaced from outside: it is part of the recording.
    teacher = {key: value + 1.0 for key, value in mine.networks["teacher"].items()}
    other = mine._replace(networks={**mine.networks, "teacher": teacher})
    assert not captured._load(other)
    captured._keep(other, critics.update(other, draw)[0], draw)
    assert captured._load(mine._replace(networks={**mine.networks, "teacher": teacher}))


def test_on_the_cpu_the_update_is_called_as_it_is() -> None:
    phase = Phase("only", 1, lambda state, _: (state, {}), 1)
    assert executed(phase, CPU, capture=True) is phase.update
    assert isinstance(executed(phase, torch.device("cuda"), capture=True), CapturedUpdate)
    assert executed(phase, torch.device("cuda"), capture=False) is phase.update
    fixed = Phase("only", 1, phase.update, 1, capturable=False)
    assert executed(fixed, torch.device("cuda"), capture=True) is phase.update


def test_capture_is_true_or_false(log: OfflineDataset) -> None:
    with pytest.raises(TypeError, match=r"capture must be True or False|capture must be a bool"):
        clone().fit(log, 3, capture="yes")  # type: ignore[arg-type]


# -- checkpoints that a thread writes --------------------------------------------------------------


def clone() -> BehaviourCloning:
    return BehaviourCloning(BehaviourCloningConfig(hidden=(8,), batch_size=16), device="cpu")


class Each(TrainingCallback):
    """Calls a function after every update."""

    every = 1

    def __init__(self, function: Callable[[int], object]) -> None:
        self.function = function

    def on_step(self, step: TrainingStep) -> None:
        self.function(step.step)


def test_a_thread_writes_the_bytes_that_the_loop_would_write(
    log: OfflineDataset, tmp_path: Path
) -> None:
    _, _, state, generator = begun("safefql", log)
    identity = run_identity("x", SafeFQLConfig(), log, 9)
    rest = identity, "critics"
    save_checkpoint(tmp_path / "loop", state, 7, generator.get_state(), *rest)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "thread", state, 7, generator, *rest)
        torch.rand(9, generator=generator)
    assert (tmp_path / "thread").read_bytes() == (tmp_path / "loop").read_bytes()
    assert writer.written == {tmp_path / "thread": 7}


def test_the_state_is_copied_before_save_returns(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph overwrites its state, which the thread may not have written yet."""
    _, _, state, generator = begun("bc", log)
    identity, write, goes = run_identity("x", TINY, log, 9), checkpoint.write_tensors, []
    gate = threading.Event()

    def waits(*arguments: Any) -> None:  # noqa: ANN401
        goes.append(gate.wait(60))
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", waits)
    before = mapped(state, torch.clone)
    save_checkpoint_of = (generator, identity, "cloning")
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "file", state, 3, *save_checkpoint_of)
        for tensor in flatten(to_tree(state)).values():
            tensor.zero_()
        gate.set()
    assert goes == [True]
    monkeypatch.undo()
    found = checkpoint.load_checkpoint(tmp_path / "file", state, generator, identity, 9)[0]
    assert same(found, before)
    assert not same(found, state)


def test_training_goes_on_while_a_checkpoint_is_written(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next one is due, which waits for it, and the end waits for the last."""
    write, gate, at, events = checkpoint.write_tensors, threading.Event(), [0], []

    def slow(path: Path, arrays: object, header: Any) -> None:  # noqa: ANN401
        done = header["done"]
        if done == 5:
            assert gate.wait(60), "the training waits for its first checkpoint"
        events.append(("begins", done))
        write(path, arrays, header)  # type: ignore[arg-type]
        events.append(("ends", done))

    def updated(done: int) -> None:
        at[0] = done
        if done == 8:
            gate.set()

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    file = tmp_path / "file"
    clone().fit(log, 12, checkpoint=file, checkpoint_every=5, callbacks=[Each(updated)])
    assert events == [(what, done) for done in (5, 10, 12) for what in ("begins", "ends")]
    assert read_tensors(file).header["done"] == 12
    assert not [t for t in threading.enumerate() if t.name.startswith("safeshield-checkpoint")]


@pytest.mark.parametrize("failing", [5, 10, 12])
def test_an_error_of_the_thread_ends_the_training(
    failing: int, log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next checkpoint at the latest, or at the end; the last whole file stays."""
    write, made = checkpoint.write_tensors, []

    def full(path: Path, arrays: object, header: Any) -> None:  # noqa: ANN401
        if header["done"] == failing:
            raise OSError(28, "No space left on device", str(path))
        write(path, arrays, header)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    file, callbacks = tmp_path / "file", [Each(made.append)]
    with pytest.raises(OSError, match="No space left"):
        clone().fit(log, 12, checkpoint=file, checkpoint_every=5, callbacks=callbacks)
    # The checkpoints of the updates 10 and 12 wait for the one before them.
    assert made[-1] == {5: 9, 10: 11, 12: 12}[failing]
    if failing == 5:
        assert not file.exists()
    else:
        assert read_tensors(file).header["done"] == {10: 5, 12: 10}[failing]


def test_an_error_of_the_training_is_not_replaced_by_one_of_the_thread(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fails(done: int) -> None:
        if done == 6:
            raise LookupError("of a callback")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(LookupError, match="of a callback") as caught:
        clone().fit(
            log, 12, checkpoint=tmp_path / "file", checkpoint_every=5, callbacks=[Each(fails)]
        )
    (note,) = caught.value.__notes__
    assert "could not be written" in note
    assert "No space left" in note


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_captured import clone
from test_many import LOG
from safeshield import OfflineDataset

write, calls = Path.write_bytes, []

def cut(self, content):
    calls.append(self)
    if len(calls) == 2:
        write(self, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, content)

Path.write_bytes = cut
clone().fit(OfflineDataset.load(LOG), 12, checkpoint={file!r}, checkpoint_every=5)
"""


def test_a_process_that_is_killed_while_the_thread_writes_leaves_the_old_file(
    log: OfflineDataset, tmp_path: Path
) -> None:
    """From which the training goes on to the weights of one that was not interrupted."""
    file = tmp_path / "file"
    code = KILLED.format(tests=str(Path(__file__).parent), file=str(file))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert read_tensors(file).header["done"] == 5
    resumed, whole = clone().fit(log, 12, checkpoint=file), clone().fit(log, 12)
    mine, theirs = flatten(resumed._networks), flatten(whole._networks)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- a device that fails ---------------------------------------------------------------------------


def lost(at: int) -> Callable[[int], None]:
    def fails(done: int) -> None:
        if done == at:
            raise torch.AcceleratorError("CUDA error: the launch timed out and was terminated")

    return fails


def test_an_error_of_the_device_names_the_checkpoint_to_go_on_from(
    log: OfflineDataset, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    with pytest.raises(torch.AcceleratorError, match="launch timed out") as caught:
        clone().fit(log, 12, checkpoint=file, checkpoint_every=4, callbacks=[Each(lost(10))])
    (note,) = caught.value.__notes__
    assert f"{file} after 8 updates" in note
    assert "the same arguments" in note
    assert read_tensors(file).header["done"] == 8
    # A resumed run that fails before its first checkpoint names the one it has read.
    with pytest.raises(torch.AcceleratorError) as caught:
        clone().fit(log, 12, checkpoint=file, checkpoint_every=50, callbacks=[Each(lost(9))])
    assert f"{file} after 8 updates" in caught.value.__notes__[0]
    resumed, whole = clone().fit(log, 12, checkpoint=file), clone().fit(log, 12)
    mine, theirs = flatten(resumed._networks), flatten(whole._networks)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_without_a_checkpoint_an_error_of_the_device_says_how_to_have_one(
    log: OfflineDataset,
) -> None:
    with pytest.raises(torch.AcceleratorError) as caught:
        clone().fit(log, 12, callbacks=[Each(lost(2))])
    assert "checkpoint=FILE" in caught.value.__notes__[0]
    with pytest.raises(LookupError) as other:
        clone().fit(log, 12, callbacks=[Each(lambda done: {}[done])])  # type: ignore[misc]
    assert not hasattr(other.value, "__notes__")


# -- on a GPU --------------------------------------------------------------------------------------


def on_gpu(case: str) -> OfflineAgent[Any, Any]:
    agent = begun(case, OfflineDataset.load(LOG))[0]
    return type(agent)(agent.config, device="cuda")


def log_of(case: str, log: OfflineDataset) -> OfflineDataset:
    return discrete_log() if case == "shield, discrete" else log


def far(one: OfflineAgent[Any, Any], other: OfflineAgent[Any, Any]) -> float:
    mine, theirs = flatten(one._networks), flatten(other._networks)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.cuda
@cuda
@QUIET
@OFFLINE
def test_a_captured_training_ends_with_the_weights_of_a_plain_one(
    case: str, log: OfflineDataset
) -> None:
    own = log_of(case, log)
    captured, plain = on_gpu(case).fit(own, STEPS), on_gpu(case).fit(own, STEPS, capture=False)
    assert far(captured, plain) < 1e-4


@pytest.mark.cuda
@cuda
def test_a_refresh_that_replaces_what_the_graph_reads_is_seen(log: OfflineDataset) -> None:
    """R2PAC marks the log's transitions anew every 250 updates."""
    captured = on_gpu("r2pac").fit(log, 1200)
    assert far(captured, on_gpu("r2pac").fit(log, 1200, capture=False)) < 1e-2


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("case", ["shield", "safefql"])
def test_between_logging_steps_nothing_waits_for_the_gpu(
    case: str, log: OfflineDataset, tmp_path: Path
) -> None:
    agent, steps, every = on_gpu(case), 600, 200
    model = agent._describe(log)
    run = agent._run(model, LogTensors.of(log, model.scaling, agent.device), steps)
    ends = set(itertools.accumulate(phase.steps for phase in run.phases()))
    strict: list[int] = []

    def watch(done: int) -> None:
        # The first update of a phase is recorded, and the last is checked for NaN.
        free = done in ends or done + 1 in ends or (done + 1) % every == 0
        torch.cuda.set_sync_debug_mode("default" if free else "error")
        strict.extend([] if free else [done + 1])

    try:
        agent.fit(
            log,
            steps,
            checkpoint=tmp_path / "file",
            checkpoint_every=7,
            callbacks=[Each(watch)],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(strict) > 0.9 * steps


@pytest.mark.cuda
@cuda
def test_a_captured_training_resumes_without_a_difference(
    log: OfflineDataset, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    whole = on_gpu("safefql").fit(log, STEPS)
    for stop in (7, 31):
        on_gpu("safefql").fit(log, STEPS, checkpoint=file, checkpoint_every=3, stop_after=stop)
    assert far(on_gpu("safefql").fit(log, STEPS, checkpoint=file), whole) == 0.0


@pytest.mark.cuda
@cuda
def test_the_agent_of_a_callback_is_not_overwritten(log: OfflineDataset) -> None:
    class Keeps(TrainingCallback):
        every = 10

        def __init__(self) -> None:
            self.agents: list[Any] = []
            self.weights: list[dict[str, np.ndarray]] = []

        def on_step(self, step: TrainingStep) -> None:
            self.agents.append(step.agent)
            flat = flatten(step.agent._networks)
            self.weights.append({name: t.cpu().numpy().copy() for name, t in flat.items()})

    kept = Keeps()
    on_gpu("safefql").fit(log, STEPS, callbacks=[kept])
    for agent, weights in zip(kept.agents, kept.weights, strict=True):
        for name, tensor in flatten(agent._networks).items():
            assert np.array_equal(tensor.cpu().numpy(), weights[name])


@pytest.mark.cuda
@cuda
def test_an_update_that_reads_a_number_is_refused_with_the_way_out(log: OfflineDataset) -> None:
    agent = SafeFQL(SafeFQLConfig(**CASES["safefql"][1]), device="cuda")
    model = agent._describe(log)
    run = agent._run(model, LogTensors.of(log, model.scaling, agent.device), STEPS)
    generator = torch.Generator(agent.device).manual_seed(0)
    state, phase = run.initial(generator), run.phases()[0]
    draw = _draw(phase, state, generator, len(log), 2)
    with pytest.raises(RuntimeError) as caught:
        CapturedUpdate(reading(phase.update), "critics 1", agent.device)(state, draw)
    assert "capture=False" in caught.value.__notes__[0]
