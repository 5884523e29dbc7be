"""Callbacks of `fit` and the training curves of `Evaluate`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from golden import make
from stable_baselines3.common.callbacks import BaseCallback

from safeshield import Evaluate, OfflineDataset, TrainingCallback, collect, load_agent
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.cli.kinds import describe
from safeshield.evaluation import CurvePoint, evaluate, read_curve, write_curve
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.training.callbacks import TrainingStep
from safeshield.training.log import run_identity
from safeshield.training.loop import FitOptions, run_phases
from safeshield.training.state import Phase, TrainState

STEPS = 24
TINY = BehaviourCloningConfig(hidden=(8,), batch_size=16)


class Watch(TrainingCallback):
    """Writes down when it was called, and reads everything that a step offers."""

    def __init__(self, every: int = 1, stop_at: int | None = None, stop: object = False) -> None:
        self.every, self.stop_at, self.stop = every, stop_at, stop
        self.calls: list[tuple[str, int]] = []
        self.files: list[dict[str, list[float]]] = []

    def on_start(self, step: TrainingStep) -> None:
        assert step.step or not step.metrics
        self.calls.append(("start", step.step))

    def on_step(self, step: TrainingStep) -> Any:  # noqa: ANN401
        self.calls.append(("step", step.step))
        assert all(isinstance(value, float) for value in step.metrics.values())
        assert step.metrics
        self.files.append(make.weights_of(step.agent))
        return self.stop if step.step == self.stop_at else None

    def on_phase(self, step: TrainingStep) -> None:
        self.calls.append((step.phase, step.step))

    def on_end(self, step: TrainingStep) -> None:
        self.calls.append(("end", step.step))


@pytest.fixture(scope="module")
def env() -> gym.Env:
    return gym.make("safeshield/Boat-v0", max_episode_steps=60)


@pytest.fixture(scope="module")
def log(env: gym.Env) -> OfflineDataset:
    return collect(env, "random", episodes=12, seed=0)


def clone() -> BehaviourCloning:
    return BehaviourCloning(TINY, device="cpu")


# -- what training does not notice ----------------------------------------------------------------


@pytest.mark.parametrize("name", make.OFFLINE)
def test_a_callback_that_looks_at_every_agent_changes_nothing(name: str) -> None:
    log, watch = make.golden_log(), Watch(every=3)
    whole = make.weights_of(make.OFFLINE[name]().fit(log, steps=STEPS))
    learner = make.OFFLINE[name]()
    learner.fit(log, steps=STEPS, callbacks=[watch])
    assert make.weights_of(learner) == whole
    assert watch.calls[-1] == ("end", learner.updates)
    if learner.updates % 3 == 0:
        assert watch.files[-1] == whole
    assert watch.files[0] != whole


def test_a_support_test_inside_the_values_is_not_fixed_by_an_early_look() -> None:
    """It is computed from the learned behaviour, and kept."""
    config = dataclasses.replace(
        make.OFFLINE["shield_trainer"]().config,
        support_weight=0.5, support_alpha=0.4, support_share=0.2, support_held_out=0.3,
    )  # fmt: skip
    log, ends = make.golden_log(), []
    for callbacks in ([], [Watch()]):
        learner = type(make.OFFLINE["shield_trainer"]())(config, device="cpu")
        learner.fit(log, steps=STEPS, callbacks=callbacks)
        ends.append((make.weights_of(learner), learner.shield().support.record))
    assert ends[0] == ends[1]


# -- when they are called -------------------------------------------------------------------------


def test_calls_come_at_the_interval_at_the_ends_of_phases_and_once_at_the_end() -> None:
    log, two, five = make.golden_log(), Watch(every=2), Watch(every=5)
    learner = make.OFFLINE["safefql"]()
    learner.fit(log, steps=STEPS, callbacks=[two, five])
    ends = [call for call in two.calls if call[0] not in ("start", "step", "end")]
    assert len(ends) >= 3
    assert ends[-1][1] == STEPS
    assert ends == [call for call in five.calls if call[0] not in ("start", "step", "end")]
    for watch in (two, five):
        assert [at for name, at in watch.calls if name == "step"] == [
            *range(watch.every, STEPS + 1, watch.every)
        ]
        assert watch.calls[0] == ("start", 0)
        assert watch.calls[-1] == ("end", STEPS)
        assert [at for _, at in watch.calls] == sorted(at for _, at in watch.calls)


def test_metrics_are_copied_from_the_device_only_where_they_are_read() -> None:
    copied = []

    class Metric:
        def __init__(self, at: int) -> None:
            self.at = at

        def __float__(self) -> float:
            copied.append(self.at)
            return 0.0

    class Reads(TrainingCallback):
        every = 1

        def on_step(self, step: TrainingStep) -> None:
            if step.step == 7:
                assert dict(step.metrics) == dict(step.metrics) == {"a": 0.0}

    count = iter(range(1, 30))
    phase = Phase("only", 20, lambda state, _: (state, {"a": Metric(next(count))}), 4)  # type: ignore[dict-item]
    nothing = TrainState({}, {}, {}, {}, torch.zeros(0, dtype=torch.int64))
    log = make.golden_log()
    options = FitOptions(20, log_every=10, callbacks=[Reads()])
    _, done = run_phases(
        [phase], nothing, torch.Generator(), options, run_identity("x", TINY, log, 20), 9, 1,
        lambda *_: pytest.fail("no callback asked for the agent"),
    )  # fmt: skip
    assert (done, copied) == (20, [7, 10, 20])


# -- stopping early -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [False, np.bool_(False)])
def test_a_stopped_agent_is_that_of_the_update_and_says_so(
    stop: object, log: OfflineDataset, tmp_path: Path
) -> None:
    watch, other = Watch(every=5, stop_at=10, stop=stop), Watch(every=2)
    agent = clone().fit(log, STEPS, callbacks=[watch, other])
    assert agent.updates == 10
    assert watch.calls[-1] == ("end", 10)
    # Every callback that is due is called, also after one that stops.
    assert other.calls[-2:] == [("step", 10), ("end", 10)]
    assert make.weights_of(agent) == watch.files[-1]
    part = clone().fit(log, STEPS, checkpoint=tmp_path / "c", stop_after=10)
    assert make.weights_of(part) == watch.files[-1]
    assert part.updates == 10
    agent.save(tmp_path / "agent.safetensors")
    loaded = load_agent(tmp_path / "agent.safetensors")
    assert loaded.updates == 10
    assert loaded.chosen is None
    assert describe(tmp_path / "agent.safetensors")["updates"] == 10
    assert loaded.predict(log.observations[0])[0].shape == (2,)


def test_a_stopped_training_goes_on_from_its_checkpoint(
    log: OfflineDataset, tmp_path: Path
) -> None:
    file = tmp_path / "c"
    whole = make.weights_of(clone().fit(log, STEPS))
    clone().fit(log, STEPS, checkpoint=file, callbacks=[Watch(stop_at=7)])
    watch = Watch(every=4)
    agent = clone().fit(log, STEPS, checkpoint=file, callbacks=[watch])
    assert watch.calls[:2] == [("start", 7), ("step", 8)]
    assert agent.updates == STEPS
    assert make.weights_of(agent) == whole


def test_phases_may_stop_and_an_interruption_is_no_end(tmp_path: Path) -> None:
    class First(Watch):
        def on_phase(self, step: TrainingStep) -> Any:  # noqa: ANN401
            super().on_phase(step)
            return False

    log, watch = make.golden_log(), First(every=100)
    agent = make.OFFLINE["safefql"]().fit(log, STEPS, callbacks=[watch])
    assert [name for name, _ in watch.calls][0::2] == ["start", "end"]
    assert 0 < agent.updates == watch.calls[1][1] < STEPS
    watch = Watch()
    clone().fit(log, STEPS, checkpoint=tmp_path / "c", stop_after=3, callbacks=[watch])
    assert watch.calls == [("start", 0), ("step", 1), ("step", 2), ("step", 3)]


def test_a_stopped_q_learner_acts_by_the_induced_policy() -> None:
    log = make.golden_log()
    learner = make.OFFLINE["ssql"]()
    config = dataclasses.replace(learner.config, policy="parametric", extraction_steps=5)
    agent = type(learner)(None, config=config, device="cpu")
    agent.fit(log, steps=STEPS, callbacks=[Watch(stop_at=4)])
    assert agent.updates == 4
    assert not agent.diagnostics()["parametric_policy"]
    assert np.isfinite(agent.predict(log.observations[:3])[0]).all()


@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (Watch(), TypeError, "callbacks must be a list of TrainingCallback objects, got Watch"),
        ([object()], TypeError, "must be a TrainingCallback, got object; derive"),
        ([Watch], TypeError, "must be a TrainingCallback, got type"),
        ([Watch(every=0)], ValueError, "every of the callback Watch must be at least 1"),
        ([Watch(every=0.5)], TypeError, "every of the callback Watch must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_callback_is_refused(
    callbacks: Any,  # noqa: ANN401
    error: type[Exception],
    message: str,
    log: OfflineDataset,
) -> None:
    with pytest.raises(error, match=message):
        clone().fit(log, STEPS, callbacks=callbacks)


def test_a_callback_of_sb3_is_refused(log: OfflineDataset) -> None:
    class Theirs(BaseCallback):
        def _on_step(self) -> bool:
            return True

    with pytest.raises(TypeError, match=r"got Theirs; derive its class from safeshield\."):
        clone().fit(log, STEPS, callbacks=[Theirs()])  # type: ignore[list-item]


@pytest.mark.parametrize("mark", [{"updates": "10"}, {"updates": True}, {"chosen": 1}])
def test_a_damaged_mark_is_refused(
    mark: dict[str, object], log: OfflineDataset, tmp_path: Path
) -> None:
    clone().fit(log, 3).save(tmp_path / "agent.safetensors")
    file = read_tensors(tmp_path / "agent.safetensors")
    write_tensors(tmp_path / "other", file.load(file.shapes, file.dtypes), {**file.header, **mark})
    with pytest.raises(ValueError, match=f"{next(iter(mark))} must be a"):
        load_agent(tmp_path / "other")


# -- training curves ------------------------------------------------------------------------------


def test_a_curve_is_the_evaluation_of_the_agents_of_its_updates(
    env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    curve = Evaluate(env, every=5, episodes=3, seeds=[1, 20])
    agent = clone().fit(log, 12, callbacks=[curve])
    assert [point.step for point in curve.points] == [5, 10, 12]
    assert make.weights_of(agent) == make.weights_of(clone().fit(log, 12))
    assert sum(point.violating for point in curve.points)
    assert sum(point.mean_cost for point in curve.points)
    for point in curve.points:
        file = tmp_path / f"c{point.step}"
        then = clone().fit(log, 12, checkpoint=file, stop_after=point.step)
        played = [evaluate(env, then, 3, seed, deterministic=False) for seed in (1, 20)]
        assert point == CurvePoint(
            step=point.step,
            phase="cloning",
            episodes=6,
            mean_return=float(np.mean([one.mean_return for one in played])),
            mean_cost=float(np.mean([one.mean_cost for one in played])),
            violating=sum(one.violating for one in played),
            seeds=(1, 20),
            deterministic=False,
        )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_curve_that_resumes_is_the_same_in_another_process(
    suffix: str, env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    """Evaluations after the checkpoint are made again, and those before it are read."""

    def curve(name: str) -> Evaluate:
        place = {"path": tmp_path / f"{name}{suffix}", "best": tmp_path / f"{name}.safetensors"}
        return Evaluate(env, every=3, episodes=2, cost_limit=1.0, **place)  # type: ignore[arg-type]

    whole = curve("whole")
    clone().fit(log, 14, callbacks=[whole])
    first = curve("parts")
    clone().fit(log, 14, checkpoint=tmp_path / "c", stop_after=8, callbacks=[first])
    assert [point.step for point in first.points] == [3, 6]
    later = dataclasses.replace(first.points[-1], step=9, mean_return=1e9)
    write_curve(tmp_path / f"parts{suffix}", [*first.points, later])
    second = curve("parts")
    clone().fit(log, 14, checkpoint=tmp_path / "c", callbacks=[second])
    assert second.points == whole.points == read_curve(tmp_path / f"parts{suffix}")
    assert [point.step for point in whole.points] == [3, 6, 9, 12, 14]
    names = [tmp_path / f"{name}.safetensors" for name in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_best_agent_is_marked_as_chosen_with_a_simulator(
    env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    path = tmp_path / "best.safetensors"
    curve = Evaluate(env, every=2, episodes=2, best=path, cost_limit=2.0)
    last = clone().fit(log, 12, callbacks=[curve])
    best = max(curve.points, key=lambda point: point.rank(2.0))
    found = load_agent(path)
    assert (found.chosen, found.updates) == ("with a simulator", best.step)
    assert read_tensors(path).header["chosen"] == "with a simulator"
    assert describe(path)["chosen"] == "with a simulator"
    assert last.chosen is None
    last.save(tmp_path / "last.safetensors")
    assert "chosen" not in read_tensors(tmp_path / "last.safetensors").header
    # Training it again makes it an agent like any other.
    assert found.fit(log, 3).chosen is None  # type: ignore[attr-defined]


def test_the_better_point_is_within_the_limit_or_costs_less() -> None:
    def point(mean_return: float, mean_cost: float) -> CurvePoint:
        return CurvePoint(1, "p", 4, mean_return, mean_cost, 0, (0,), False)

    order = [
        point(9, 20), point(0, 12), point(1, 12), point(-5, 10), point(3, 0), point(4, 10),
        point(4, 9),
    ]  # fmt: skip
    assert sorted(reversed(order), key=lambda one: one.rank(10.0)) == order
    assert CurvePoint(1, "p", 4, 0.0, 0.0, 1, (0,), False).violation_rate == 0.25


def test_a_curve_is_written_to_tensorboard(
    env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = Evaluate(env, every=4, episodes=2)
    clone().fit(log, 8, log_dir=tmp_path, callbacks=[curve])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, name in (("return", "mean_return"), ("cost", "mean_cost")):
        told = [(one.step, one.value) for one in events.Scalars(f"play/{tag}")]
        assert told == [(p.step, np.float32(getattr(p, name))) for p in curve.points]
    assert len(events.Scalars("play/violation_rate")) == 2


def test_wrong_arguments_of_a_curve_are_refused(env: gym.Env, tmp_path: Path) -> None:
    for arguments, message in (
        ({"every": 0}, "every must be at least 1"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"seeds": ()}, "seeds must be different numbers, at least one"),
        ({"seeds": (1, 1)}, "seeds must be different numbers"),
        ({"path": tmp_path / "a.txt"}, r"path must end in .csv or .jsonl, got"),
        ({"best": tmp_path / "a.csv"}, r"best must end in .safetensors, got"),
        ({"cost_limit": -1.0, "best": tmp_path / "b.safetensors"}, "cost_limit must"),
        ({"cost_limit": 5.0}, "cost_limit=5.0 needs best"),
        ({"deterministic": "no"}, "deterministic must be True or False, got 'no'"),
        ({"seeds": 0}, "seeds must be a tuple of whole numbers, got 0"),
        ({"seeds": "01"}, "seeds must be a tuple of whole numbers, got '01'"),
        ({"seeds": (-1,)}, "each of seeds must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluate(env, **arguments)  # type: ignore[arg-type]
    (tmp_path / "a.csv").write_text("step,phase\n1,p\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"step": 1}))
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(ValueError, match=f"{name} is not a training curve"):
            read_curve(tmp_path / name)


def test_the_best_of_unknown_evaluations_is_refused(
    env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    clone().fit(log, 12, checkpoint=tmp_path / "c", stop_after=6)
    curve = Evaluate(env, every=3, episodes=1, best=tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match=r"resumes at update 6 .* pass the path"):
        clone().fit(log, 12, checkpoint=tmp_path / "c", callbacks=[curve])


def test_the_page_on_callbacks_runs_as_it_stands(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer updates and episodes."""
    page = Path(__file__).parents[1] / "docs" / "algorithms.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    stop, curve = (block for block in blocks if "Callback" in block or "Evaluate" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"agent": clone(), "log": log}
    exec(curve.replace("0_000", "").replace("episodes=20", "episodes=1"), names)
    assert [point.step for point in read_curve("curve.csv")] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for agent in (clone(), make.OFFLINE["shield_trainer"](), make.OFFLINE["safefql"]()):
        names = {"agent": agent, "log": make.golden_log()}
        exec(stop.replace("20_000", "40").replace("every = 500", "every = 1"), names)
        flat = names["flat"][type(agent).__name__]
        assert np.isfinite(flat.lowest)
        flat.lowest = 0.0
        agent.fit(make.golden_log(), 40, callbacks=[flat])
        # No update improves on 0, so the first one of the phase that is watched is the last one.
        assert agent.updates < 40


# -- answers, files and spaces --------------------------------------------------------------------


class Does(TrainingCallback):
    """Calls a function in one of its methods."""

    every = 2

    def __init__(self, method: str, act: Any) -> None:  # noqa: ANN401
        setattr(self, method, act)


@pytest.mark.parametrize("answer", [1, 0, "no", torch.tensor(False)])
@pytest.mark.parametrize("method", ["on_step", "on_phase"])
def test_an_answer_is_false_true_or_none(method: str, answer: object, log: OfflineDataset) -> None:
    with pytest.raises(TypeError, match=rf"Does\.{method} must return False to stop .* got"):
        clone().fit(log, 4, callbacks=[Does(method, lambda _: answer)])


def test_the_start_of_a_training_cannot_stop_it(log: OfflineDataset) -> None:
    for answer in (False, np.bool_(False), "no", 1):
        with pytest.raises(ValueError, match=r"Does\.on_start must return None or True"):
            clone().fit(log, 4, callbacks=[Does("on_start", lambda _, a=answer: a)])
    for answer in (None, True, np.bool_(True)):
        agent = clone().fit(log, 4, callbacks=[Does("on_start", lambda _, a=answer: a)])
        assert agent.updates == 4


def test_an_unknown_metric_is_named_with_the_phase_and_the_known_ones(log: OfflineDataset) -> None:
    found = r"the phase 'cloning' has no metric 'loss', its metrics are \['actor/squared_error'\]"
    with pytest.raises(KeyError, match=found):
        clone().fit(log, 4, callbacks=[Does("on_step", lambda step: step.metrics["loss"] > 0)])
    with pytest.raises(KeyError, match=r"'cloning' has no metric 'loss'.*before an update"):
        clone().fit(log, 4, callbacks=[Does("on_start", lambda step: step.metrics["loss"])])


@pytest.mark.parametrize("values", [3.0, {"a": "x"}, {"a": float("nan")}, {1: 2.0}, {"a": None}])
@pytest.mark.parametrize("folder", [True, False])
def test_what_cannot_be_logged_is_refused_also_without_a_folder(
    values: Any,  # noqa: ANN401
    folder: bool,
    log: OfflineDataset,
    tmp_path: Path,
) -> None:
    place = tmp_path if folder else None
    with pytest.raises(TypeError, match=r"step\.log"):
        clone().fit(log, 4, log_dir=place, callbacks=[Does("on_step", lambda s: s.log(values))])
    logs = Does("on_step", lambda step: step.log({"a": np.float32(1), "b": 2}))
    clone().fit(log, 4, log_dir=place, callbacks=[logs])


def test_no_two_writers_share_a_file(env: gym.Env, log: OfflineDataset, tmp_path: Path) -> None:
    curve, best = tmp_path / "curve.csv", tmp_path / "best.safetensors"
    (tmp_path / "link.safetensors").symlink_to(best)
    one = Evaluate(env, 2, 1, path=curve, best=best)
    for checkpoint, callbacks, message in (
        (best, [one], r"checkpoint and best of callbacks\[0\] \(Evaluate\) must be different"),
        (tmp_path / "x" / ".." / "curve.csv", [one], "checkpoint and path of"),
        (None, [one, Evaluate(env, 2, 1, path=curve)], r"path of .* and path of callbacks\[1\]"),
        (None, [one, Evaluate(env, 3, 1, best=tmp_path / "link.safetensors")], "and best of"),
        (None, [one, one], "got the same Evaluate twice"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            clone().fit(log, 4, checkpoint=checkpoint, callbacks=callbacks)
    assert not curve.exists()
    clone().fit(log, 4, checkpoint=tmp_path / "c", callbacks=[one, Evaluate(env, 2, 1)])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_curve_replaces_nothing_but_a_curve(
    suffix: str, env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    path = tmp_path / f"mine{suffix}"
    for text in ("name,age\n", "name,age\nAda,36\n", '{"a": 1}\n', "\xff"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name} is not a training curve"):
            clone().fit(log, 4, callbacks=[Evaluate(env, 2, 1, path=path)])
        assert path.read_text() == text
    path.unlink()
    for seed in (1, 2):
        curve = Evaluate(env, 2, 1, seeds=[seed], path=path)
        clone().fit(log, 4, callbacks=[curve])
        assert read_curve(path) == curve.points
        assert curve.points[0].seeds == (seed,)


def test_the_best_agent_replaces_nothing_but_an_agent_of_its_algorithm(
    env: gym.Env, log: OfflineDataset, tmp_path: Path
) -> None:
    best, watch = tmp_path / "best.safetensors", Watch()
    make.OFFLINE["shield_trainer"]().fit(make.golden_log(), STEPS).save(best)
    for content in (b"words", best.read_bytes()):
        best.write_bytes(content)
        with pytest.raises(ValueError, match=r"best of Evaluate .* no agent of this"):
            clone().fit(log, 4, callbacks=[Evaluate(env, 2, 1, best=best), watch])
        assert best.read_bytes() == content
    assert not watch.calls
    clone().fit(log, 4).save(best)
    clone().fit(log, 4, callbacks=[Evaluate(env, 2, 1, best=best)])
    assert load_agent(best).chosen == "with a simulator"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (4, 5)}, r"seeds of Evaluate must be \(3, 4\).* got \(4, 5\)"),
        ({"episodes": 2}, r"episodes of all seeds together of Evaluate must be 2, .* got 4"),
        ({"deterministic": True}, "deterministic of Evaluate must be False, .* got True"),
    ],
)
def test_a_resumed_curve_keeps_its_settings(
    suffix: str,
    changed: dict[str, Any],
    message: str,
    env: gym.Env,
    log: OfflineDataset,
    tmp_path: Path,
) -> None:
    own: dict[str, Any] = {"seeds": (3, 4), "episodes": 1, "path": tmp_path / f"curve{suffix}"}
    first = Evaluate(env, 2, **own)
    clone().fit(log, 8, checkpoint=tmp_path / "c", stop_after=4, callbacks=[first])
    before = own["path"].read_bytes()
    with pytest.raises(ValueError, match=message):
        clone().fit(
            log, 8, checkpoint=tmp_path / "c", callbacks=[Evaluate(env, 2, **{**own, **changed})]
        )
    assert own["path"].read_bytes() == before
    clone().fit(log, 8, checkpoint=tmp_path / "c", callbacks=[Evaluate(env, 2, **own)])
    assert [point.step for point in read_curve(own["path"])] == [2, 4, 6, 8]


def test_an_environment_with_other_spaces_is_refused_before_the_training(
    log: OfflineDataset,
) -> None:
    class Narrow(gym.ActionWrapper):  # type: ignore[type-arg]
        def action(self, action: Any) -> Any:  # noqa: ANN401
            return action

    watch, narrow = Watch(), Narrow(gym.make("safeshield/Boat-v0"))
    narrow.action_space = gym.spaces.Box(-0.1, 0.1, (2,))
    for other, name in (
        (gym.make("safeshield/DoubleIntegrator-v0"), "observation_space"),
        (narrow, "action_space"),
    ):
        with pytest.raises(ValueError, match=f"{name} of the env of Evaluate mismatch"):
            clone().fit(log, 4, callbacks=[Evaluate(other, 2, 1), watch])
    assert not watch.calls
