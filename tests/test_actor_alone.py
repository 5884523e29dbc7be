"""SafeFQL's actor without a filter: its own calibration, +CP, other margins, sampled teachers."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from faults import sound
from scipy.stats import binom

from safeshield import CalibrationError, Shield
from safeshield.algorithms.fisor import FISOR, FISORConfig
from safeshield.algorithms.flrp import FLRP, FLRPConfig
from safeshield.algorithms.registry import load_agent
from safeshield.algorithms.safefql import (
    STUDENT,
    TEACHER,
    SafeFQL,
    SafeFQLConfig,
)
from safeshield.calibration import ActorRecord, CalibrationRecord
from safeshield.calibration.calibrate import calibrate
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.cli.kinds import describe
from safeshield.data import OfflineDataset, collect
from safeshield.evaluation.tables import format_table
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.actor import of_noise
from safeshield.nn.flow import euler_sample
from safeshield.rollouts.copies import Identity
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import batch_policy
from safeshield.training import critics
from safeshield.training.state import Draw, Phase

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
Array = npt.NDArray[Any]
TINY = SafeFQLConfig(
    margin=0.058,
    critic_hidden=(8,),
    flow_hidden=(8,),
    student_hidden=(8,),
    batch_size=16,
    flow_steps=3,
    safety_backup_steps=(8, 1),
    reward_backup_steps=(4, 1),
    phase_shares=(0.5, 0.2, 0.3),
    candidates=4,
)


def boat() -> gym.Env[Any, Any]:
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=60)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(boat(), "random", episodes=25, seed=0)


@pytest.fixture(scope="module")
def agent(log: OfflineDataset) -> SafeFQL:
    return SafeFQL(TINY, device="cpu").fit(log, steps=80)


# -- the promise, where the value is exact -------------------------------------------------------

EPSILON, LEVEL, REPEATS = 0.07, 0.1, 20
DELTAS = (0.3, 0.1, 0.05, 0.0)


def cart() -> gym.Env[Any, Any]:
    return gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=30)


@batch_policy
def sleepy(observations: Array, rng: np.random.Generator) -> Array:
    """Brake, but in a quarter of the steps do anything."""
    brake = -np.sign(observations[:, 1:2])
    slept = rng.random((len(observations), 1)) < 0.25
    return np.where(slept, rng.uniform(-1, 1, brake.shape), brake).astype(np.float32)


@pytest.fixture(scope="module")
def exact() -> Shield:
    return sound("double integrator")


@pytest.fixture(scope="module")
def rates(exact: Shield) -> dict[float, float]:
    """The rate of violating episodes of `sleepy` alone from the starts that each delta keeps."""
    runs = run_episodes(cart(), sleepy, 6000, 3)
    value = exact.row_values(np.stack([run.observations[0] for run in runs]))
    bad = np.array([run.violated for run in runs])
    return {delta: float(bad[value <= -delta].mean()) for delta in DELTAS}


def chosen(exact: Shield, seed: int, **options: Any) -> float | None:  # noqa: ANN401
    try:
        record = calibrate(
            exact,
            cart(),
            epsilon=EPSILON,
            confidence=1.0 - LEVEL,
            policy=sleepy,
            deltas=DELTAS,
            seed=seed,
            **options,
        )
    except CalibrationError:
        return None
    return record.delta


def broken(rates: dict[float, float], deltas: list[float | None]) -> int:
    return sum(delta is not None and rates[delta] > EPSILON for delta in deltas)


def test_the_actors_promise_is_broken_no_more_often_than_it_says(
    exact: Shield, rates: dict[float, float]
) -> None:
    assert rates[0.3] < rates[0.1] < EPSILON < rates[0.05] < rates[0.0]
    found = [chosen(exact, seed, alone=True) for seed in range(REPEATS)]
    assert broken(rates, found) <= binom.ppf(0.999, REPEATS, LEVEL)
    # It is no empty promise: most repeats certify some starts.
    assert sum(delta is not None for delta in found) > REPEATS / 2


def test_a_calibration_with_the_shield_on_says_nothing_of_the_actor_alone(
    exact: Shield, rates: dict[float, float]
) -> None:
    found = [chosen(exact, seed) for seed in range(5)]
    assert broken(rates, found) == 5


def test_no_threshold_changes_an_episode_so_no_seed_is_played_twice(
    exact: Shield, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[int] = []
    group = calibrate.__globals__["Trials"]._group

    def counting(self: Any, acting: ShieldedProposals, seeds: list[int]) -> Any:  # noqa: ANN401
        played.extend(seeds)
        return group(self, acting, seeds)

    monkeypatch.setattr("safeshield.calibration.trials.Trials._group", counting)
    record = calibrate(exact, cart(), epsilon=0.2, confidence=0.9, policy=sleepy, alone=True)
    assert len(played) == len(set(played))
    assert sum(point.episodes for point in record.pilot) > len(played)
    assert record.policies[0].intervention_rate == 0.0
    again = calibrate(exact, cart(), epsilon=0.2, confidence=0.9, policy=sleepy, alone=True)
    assert dataclasses.replace(again, date=record.date) == record


def test_the_words_are_the_actors_own(exact: Shield) -> None:
    options: dict[str, Any] = {"epsilon": 0.3, "confidence": 0.9, "policy": sleepy, "deltas": [0.3]}
    record = calibrate(exact, cart(), alone=True, **options)
    assert isinstance(record, ActorRecord)
    for words in (
        "confidence 0.9",
        "DoubleIntegrator-v0 of at most 30 steps",
        "kept where V_h <= -delta for delta 0.3",
        "'sleepy' (deterministic=False) acts alone, without a shield,",
        "with probability at most 0.3",
    ):
        assert words in record.promise
    assert "through this shield" not in record.promise
    shielded = calibrate(exact, cart(), **options)
    assert type(shielded) is CalibrationRecord
    assert "through this shield at delta 0.3" in shielded.promise
    assert ActorRecord.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="alone=True tests a policy"):
        calibrate(exact, cart(), alone=True)
    with pytest.raises(CalibrationError, match=r"agent\.shield\(\)\.calibrate"):
        calibrate(exact, cart(), policy=lambda _: np.ones(1), alone=True, epsilon=0.1, deltas=[0.0])


# -- the agent's record --------------------------------------------------------------------------


def fresh(agent: SafeFQL) -> SafeFQL:
    """Return a copy that remembers no calibration."""
    copy = agent._changed()
    copy._memory = []
    return copy


@pytest.fixture(scope="module")
def certified(agent: SafeFQL) -> SafeFQL:
    return fresh(agent).calibrate(boat(), epsilon=0.5, confidence=0.8, deltas=[0.3, 0.0])


def test_the_actor_that_is_tested_is_the_one_that_predict_plays(
    agent: SafeFQL, certified: SafeFQL
) -> None:
    record = certified.record
    assert record is not None
    assert agent.record is None
    assert [one.policy for one in record.policies] == ["SafeFQL"]
    assert not record.differences(Identity.of(boat()))
    # The same calibration of the agent's critics with `predict`, written out.
    expected = calibrate(
        agent.shield(),
        boat(),
        epsilon=0.5,
        confidence=0.8,
        policy=agent._changed(),
        deltas=[0.3, 0.0],
        alone=True,
    )
    assert dataclasses.replace(expected, date=record.date) == record
    still = fresh(agent).calibrate(
        boat(), epsilon=0.5, confidence=0.8, deltas=[0.3], deterministic=True
    )
    assert still.record is not None
    assert "deterministic=True" in still.record.promise


def test_the_record_is_in_the_file_and_belongs_to_these_weights_and_settings(
    certified: SafeFQL, log: OfflineDataset, tmp_path: Path
) -> None:
    certified.save(tmp_path / "agent.safetensors")
    read = load_agent(tmp_path / "agent.safetensors")
    assert isinstance(read, SafeFQL)
    assert read.record == certified.record
    assert read.attempts == certified.attempts
    assert len(read.attempts) == 1
    assert read.record is not None
    assert describe(tmp_path / "agent.safetensors")["promise"] == read.record.promise
    for other in (read.with_margin(0.5), read.acting_by("sample"), read._changed(seed=3)):
        assert other.record is None
        assert other.attempts == read.attempts
    read.config = dataclasses.replace(read.config, margin=0.7)
    assert read.record is None
    trained = SafeFQL.load(tmp_path / "agent.safetensors").fit(log, steps=6)
    assert trained.record is None
    assert trained.attempts == ()


def test_a_damaged_record_is_refused(certified: SafeFQL, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    certified.save(path)
    file = read_tensors(path, SafeFQL.file_format)
    record = {**file.header["record"], "epsilon": "none"}
    write_tensors(path, file.load(file.shapes, file.dtypes), {**file.header, "record": record})
    with pytest.raises(ValueError, match=r"agent\.safetensors.*record"):
        SafeFQL.load(path)


def test_a_second_attempt_is_tested_more_strictly(agent: SafeFQL) -> None:
    first = fresh(agent)
    with pytest.raises(CalibrationError):
        first.calibrate(boat(), epsilon=0.02, confidence=0.8, deltas=[0.0])
    assert [one.passed for one in first.attempts] == [False]
    second = first.calibrate(boat(), epsilon=0.8, confidence=0.8, deltas=[0.0])
    assert second.record is not None
    assert second.record.attempts[-1].level == pytest.approx(0.1)
    assert "attempt 2 on this agent with this actor" in second.record.promise


def test_agents_with_the_same_weights_share_their_attempts(agent: SafeFQL) -> None:
    first = fresh(agent)
    with pytest.raises(CalibrationError):
        first.with_margin(0.1).calibrate(boat(), epsilon=0.02, confidence=0.8, deltas=[0.0])
    for again in (first.with_margin(0.1), first.with_candidates(4), first):
        assert [one.passed for one in again.attempts] == [False]
    second = first.with_margin(0.1).calibrate(boat(), epsilon=0.8, confidence=0.8, deltas=[0.0])
    assert second.record is not None
    assert second.record.attempts[-1].level == pytest.approx(0.1)
    assert first.attempts == second.record.attempts
    assert agent.attempts != first.attempts


# -- +CP -----------------------------------------------------------------------------------------


def test_recalibrating_keeps_the_critics_and_trains_the_actor_at_delta(
    agent: SafeFQL, log: OfflineDataset
) -> None:
    delta = 0.4
    stricter = agent.recalibrated(log, steps=50, delta=delta)
    before, after = agent._arrays, stricter._arrays
    for name in agent._fitted().slow():
        for key, array in before[name].items():
            np.testing.assert_array_equal(after[name][key], array)
    for name in (TEACHER, STUDENT):
        assert any(not np.array_equal(after[name][key], a) for key, a in before[name].items())
    safety = stricter._fitted().critics.safety
    assert stricter.config.margin_of(safety) == pytest.approx(delta)
    again = agent.recalibrated(log, steps=50, delta=delta)
    for name, params in stricter._arrays.items():
        for key, array in params.items():
            np.testing.assert_array_equal(again._arrays[name][key], array)
    assert stricter.record is None


def test_recalibrating_takes_delta_from_the_record_and_needs_one(
    agent: SafeFQL, log: OfflineDataset
) -> None:
    with pytest.raises(ValueError, match="delta must be given where the agent has no record"):
        agent.recalibrated(log, steps=10)
    for delta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="delta must be finite and at least 0"):
            agent.recalibrated(log, steps=10, delta=delta)
    known = fresh(agent).calibrate(boat(), epsilon=0.5, confidence=0.8, deltas=[0.35])
    stricter = known.recalibrated(log, steps=10)
    assert stricter.config.margin_of(stricter._fitted().critics.safety) == pytest.approx(0.35)
    # The gate that the record was made with is not loosened, unless that is asked for.
    wide = fresh(agent).with_margin(0.9)
    loose = wide.calibrate(boat(), epsilon=0.5, confidence=0.8, deltas=[0.0])
    safety = agent._fitted().critics.safety
    again = loose.recalibrated(log, steps=10)
    assert again.config.margin_of(safety) == pytest.approx(wide.config.margin_of(safety))
    asked = loose.recalibrated(log, steps=10, delta=0.0)
    assert asked.config.margin_of(safety) == 0.0
    other = collect(gym.make("safeshield/DoubleIntegrator-v0"), "random", episodes=5, seed=0)
    with pytest.raises(ValueError, match="of the log"):
        agent.recalibrated(other, steps=10, delta=0.1)


def test_the_gates_of_both_losses_are_at_delta(
    agent: SafeFQL, log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    teaching: list[float] = []
    weigh = critics.imitation_weights

    def watching(*args: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401
        teaching.append(args[5])
        return weigh(*args, **options)

    monkeypatch.setattr(critics, "imitation_weights", watching)
    runs: list[Any] = []
    make = SafeFQL._run

    def keeping(self: SafeFQL, *args: Any) -> Any:  # noqa: ANN401
        runs.append(make(self, *args))
        return runs[-1]

    monkeypatch.setattr(SafeFQL, "_run", keeping)
    delta = -float(np.median(agent.shield().row_values(log.observations)))
    agent.recalibrated(log, steps=10, delta=delta)
    np.testing.assert_allclose(teaching, [delta] * 4)
    (run,) = runs
    # The student's loss counts an action as feasible where Q_h < -delta.
    generator = torch.Generator().manual_seed(0)
    kept = {name: agent._networks[name] for name in agent._fitted().slow()}
    state = run.initial(generator)._replace(targets=kept)
    rows = torch.arange(0, len(log), 3)
    noise = torch.randn(len(rows), 2, generator=generator)
    loss = run._student(state, Draw(rows, noise, torch.zeros(len(rows), 1)))
    _, metrics = loss(state.networks)
    seen = run.log.observations[rows]
    raw = of_noise(run.model.networks[STUDENT], state.networks[STUDENT], seen, noise)
    values = run.model.critics.safety.action_value(state.targets, seen, raw.clamp(-1.0, 1.0))
    assert float(metrics["student/feasible_share"]) == float((values < -delta).float().mean())
    assert 0 < (values < -delta).sum() < len(rows)


def test_a_joint_agents_actor_is_trained_in_turn(log: OfflineDataset) -> None:
    joint = SafeFQL(dataclasses.replace(TINY, phases="joint"), device="cpu").fit(log, steps=20)
    stricter = joint.recalibrated(log, steps=10, delta=0.4)
    assert stricter.config.phases == "sequential"


@pytest.mark.parametrize(("kind", "config"), [(FISOR, FISORConfig), (FLRP, FLRPConfig)])
def test_other_agents_can_be_trained_on_the_same_critics(
    kind: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    agent: SafeFQL,
    log: OfflineDataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    phases: list[Phase] = []
    train = kind._train

    def watching(self: Any, given: list[Phase], *args: Any) -> Any:  # noqa: ANN401
        phases.extend(given)
        return train(self, given, *args)

    monkeypatch.setattr(kind, "_train", watching)
    settings = config(critic_hidden=(8,), flow_hidden=(8,), batch_size=16)
    share = settings.phase_shares[0]
    path = tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 5}
    half = kind(settings, device="cpu")
    half._fit_actor(log, 20, agent, share, stop_after=10, **options)
    assert sum(phase.steps for phase in phases) == 20
    assert not any(phase.name.startswith("critics") for phase in phases)
    resumed = kind(settings, device="cpu")._fit_actor(log, 20, agent, share, **options)
    other = kind(settings, device="cpu")._fit_actor(log, 20, agent, share)
    for name, params in other._arrays.items():
        for key, array in params.items():
            np.testing.assert_array_equal(resumed._arrays[name][key], array)
    for name in agent._fitted().slow():
        for key, array in agent._arrays[name].items():
            np.testing.assert_array_equal(other._arrays[name][key], array)
    # A checkpoint on other critics is another run.
    trained = SafeFQL(dataclasses.replace(TINY, seed=5), device="cpu").fit(log, steps=80)
    with pytest.raises(ValueError, match="checkpoint"):
        kind(settings, device="cpu")._fit_actor(log, 20, trained, share, **options)


# -- margins -------------------------------------------------------------------------------------


def first_passes(agent: SafeFQL, seen: Array) -> Array:
    """Whether the first sample of each state is executed."""
    first = agent.acting_by("student", candidates=1).predict(seen, deterministic=True)[0]
    return np.asarray((agent.predict(seen, deterministic=True)[0] == first).all(axis=1))


def test_a_larger_margin_gates_more_steps(agent: SafeFQL, log: OfflineDataset) -> None:
    seen = log.observations[::5]
    passing = [first_passes(agent.with_margin(m), seen) for m in (0.0, 0.5, 1.0, 2.0)]
    for less, more in zip(passing[1:], passing[:-1], strict=True):
        assert (less <= more).all()
    assert passing[-1].mean() < passing[0].mean()


def test_a_margin_that_would_have_no_effect_is_refused(agent: SafeFQL) -> None:
    with pytest.raises(ValueError, match="has no effect with candidates=1"):
        agent.acting_by("student", candidates=1).with_margin(0.2)
    with pytest.raises(ValueError, match="margin must be at least 0"):
        agent.with_margin(-1.0)
    with pytest.raises(ValueError, match="extraction"):
        agent.acting_by("flow")  # type: ignore[arg-type]


def test_a_tradeoff_plays_every_margin_from_the_same_starts(agent: SafeFQL) -> None:
    table = agent.tradeoff(boat(), [0.0, 1.0], episodes=3, seed=4)
    assert list(table) == [0.0, 1.0]
    assert {one.seed for one in table.values()} == {4}
    assert len(format_table(list(table.values())).splitlines()) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = agent.tradeoff(boat(), episodes=1)
    first, *others = own
    assert [other / first for other in others] == pytest.approx([2, 4, 8])
    safety = agent._fitted().critics.safety
    assert first * safety.scale.spread == pytest.approx(agent.config.margin_of(safety))
    for margins in ([], None):
        with pytest.raises(ValueError, match="margins must hold at least one number"):
            agent.with_margin(0.0).tradeoff(boat(), margins)


# -- the sampled teacher -------------------------------------------------------------------------


def test_sampling_takes_the_best_reward_below_the_gate_and_else_the_safest(
    agent: SafeFQL, log: OfflineDataset
) -> None:
    seen, each = log.observations[::9], 5
    model = agent._fitted()
    inputs = model.scaling.observations(seen)
    noise = np.random.default_rng(agent.config.seed).standard_normal((each, 2)).astype(np.float32)
    actor = agent.shield().model
    drawn = np.stack([_teacher(agent, inputs, np.tile(z, (len(seen), 1))) for z in noise], axis=1)
    values = actor.scaled_values(actor.states(seen), drawn)
    limit = float(np.median(values.min(axis=1)))
    sampling = agent.acting_by("sample", candidates=each)
    sampling = sampling.with_margin(-limit / model.critics.safety.scale.spread)
    assert -sampling.config.margin_of(model.critics.safety) == pytest.approx(limit)
    acted = sampling.predict(seen, deterministic=True)[0]
    reward, gated, rejected = model.critics.reward, 0, 0
    for i, state in enumerate(inputs):
        rows = np.repeat(state[None], each, axis=0)
        gain = reward.advantages(agent._arrays, rows, drawn[i]).min(0)
        below = values[i] < limit
        if np.abs(values[i] - limit).min() < 1e-6:
            continue  # rounding decides
        best = np.where(below, gain, -np.inf).argmax() if below.any() else values[i].argmin()
        expected = model.scaling.to_box(drawn[i, best])
        np.testing.assert_allclose(acted[i], expected, atol=1e-5)
        gated, rejected = gated + below.any(), rejected + (not below.any())
    assert gated > 5
    assert rejected > 5


def _teacher(agent: SafeFQL, inputs: Array, noise: Array) -> Array:
    network = agent._fitted().networks[TEACHER]
    params, steps = agent._arrays[TEACHER], agent.config.flow_steps
    return np.asarray(euler_sample(network, params, inputs.astype("f4"), noise, steps))


def test_an_agent_of_before_acts_by_its_student(agent: SafeFQL, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    agent.save(path)
    file = read_tensors(path, SafeFQL.file_format)
    header = {**file.header, "config": dict(file.header["config"])}
    assert header["config"].pop("extraction") == "student"
    assert "record" not in header
    write_tensors(path, file.load(file.shapes, file.dtypes), header)
    assert SafeFQL.load(path).config == agent.config
