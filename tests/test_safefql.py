"""SafeFQL: seeds, interruptions, purity, predictions, files, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig, SafeFQLRun
from safeshield.data import OfflineDataset, collect
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.flow import flow_matching_loss
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.training.checkpoint import flatten, from_tree, to_tree, unflatten
from safeshield.training.imitation import imitation_weights
from safeshield.training.log import LogTensors, check_boundary
from safeshield.training.schedule import stages
from safeshield.training.state import Draw, TrainState

TINY = SafeFQLConfig(
    margin=0.058,
    critic_hidden=(8,),
    flow_hidden=(8,),
    student_hidden=(8,),
    batch_size=16,
    flow_steps=3,
    safety_backup_steps=(8, 1),
    reward_backup_steps=(4, 1, 1),
    phase_shares=(0.5, 0.2, 0.3),
)
STEPS = 60


def tiny(**changes: Any) -> SafeFQL:  # noqa: ANN401
    return SafeFQL(dataclasses.replace(TINY, **changes), device="cpu")


def weights(agent: SafeFQL) -> dict[str, np.ndarray]:
    return {f"{n}/{k}": a for n, params in agent._arrays.items() for k, a in params.items()}


def assert_same(one: SafeFQL, other: SafeFQL) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=0)


@pytest.fixture(scope="module")
def fitted(log: OfflineDataset) -> SafeFQL:
    return tiny().fit(log, steps=STEPS)


# -- the same, and not the same -----------------------------------------------------------------


def test_same_seed_same_weights(fitted: SafeFQL, log: OfflineDataset) -> None:
    torch.manual_seed(99)  # nobody else's draws matter
    np.random.seed(99)  # noqa: NPY002
    assert_same(fitted, tiny().fit(log, steps=STEPS))


def test_another_seed_changes_every_network(fitted: SafeFQL, log: OfflineDataset) -> None:
    other = weights(tiny(seed=1).fit(log, steps=STEPS))
    assert not any(np.array_equal(array, other[name]) for name, array in weights(fitted).items())


@pytest.mark.parametrize("phases", ["sequential", "joint"])
def test_a_run_in_instalments_ends_as_one_without(
    phases: Any,  # noqa: ANN401
    log: OfflineDataset,
    tmp_path: Path,
) -> None:
    whole = tiny(phases=phases).fit(log, steps=STEPS)
    file = tmp_path / "run.safetensors"
    # Inside the critics, at a change of windows, inside teacher and student, at phases' ends.
    for stop in (1, 7, 15, 20, 30, 35, 42, 43, 59):
        tiny(phases=phases).fit(log, steps=STEPS, checkpoint=file, stop_after=stop)
    assert_same(whole, tiny(phases=phases).fit(log, steps=STEPS, checkpoint=file))
    # And once more: the run is over, nothing is left to do.
    assert_same(whole, tiny(phases=phases).fit(log, steps=STEPS, checkpoint=file))


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    fitted: SafeFQL, log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.safetensors"
    calls = 0
    real = SafeFQLRun._student

    def dies(self: SafeFQLRun, state: TrainState, draw: Draw) -> Any:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return real(self, state, draw)

    monkeypatch.setattr(SafeFQLRun, "_student", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny().fit(log, steps=STEPS, checkpoint=file, checkpoint_every=11)
    monkeypatch.undo()
    resumed = tiny().fit(log, steps=STEPS, checkpoint=file, checkpoint_every=11)
    assert_same(fitted, resumed)


def test_interruptions_are_felt_if_the_randomness_is_not_restored(
    fitted: SafeFQL, log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That the tests above can fail: the same without the generator's state.
    file = tmp_path / "run.safetensors"
    tiny().fit(log, steps=STEPS, checkpoint=file, stop_after=20)
    from safeshield.training import loop as training

    class Forgetful:
        def __init__(self, inner: torch.Generator) -> None:
            self.get_state = inner.get_state

        def set_state(self, state: torch.Tensor) -> None:
            return None

        device = torch.device("cpu")

    real = training.load_checkpoint
    monkeypatch.setattr(
        training,
        "load_checkpoint",
        lambda path, state, generator, *rest: real(path, state, Forgetful(generator), *rest),  # type: ignore[arg-type]
    )
    other = weights(tiny().fit(log, steps=STEPS, checkpoint=file))
    assert any(not np.array_equal(array, other[n]) for n, array in weights(fitted).items())


@pytest.mark.parametrize("change", ["config", "steps", "log"])
def test_a_checkpoint_of_another_run_is_refused(
    change: str, log: OfflineDataset, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    tiny().fit(log, steps=STEPS, checkpoint=file, stop_after=5)
    agent, data, steps = tiny(), log, STEPS
    if change == "config":
        agent = tiny(margin=1.0)
    elif change == "steps":
        steps += 1
    else:
        data = dataclasses.replace(log, rewards=log.rewards + np.float32(1e-3))
    with pytest.raises(ValueError, match="another configuration, log or number of steps"):
        agent.fit(data, steps=steps, checkpoint=file)


def test_windows_change_at_their_shares_of_the_phase() -> None:
    for steps in (10, 37, 100):
        parts = stages(steps, (8, 4, 2, 1), (3, 1))
        assert sum(count for count, *_ in parts) == steps
        per_step = [(safety, reward) for count, safety, reward in parts for _ in range(count)]
        for step, (safety, reward) in enumerate(per_step):
            assert safety == (8, 4, 2, 1)[4 * step // steps]
            assert reward == (3, 1)[2 * step // steps]


# -- purity -------------------------------------------------------------------------------------


def make_run(log: OfflineDataset, steps: int = STEPS, **changes: Any) -> SafeFQLRun:  # noqa: ANN401
    agent = tiny(**changes)
    model = agent._describe(log)
    return SafeFQLRun(
        model, LogTensors.of(log, model.scaling, torch.device("cpu")), agent.config, steps
    )


def draw(log: OfflineDataset, seed: int = 4) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return Draw(
        torch.randint(len(log), (16,), generator=generator),
        torch.randn(16, 2, generator=generator),
        torch.rand(16, 1, generator=generator),
    )


@pytest.mark.parametrize("phases", ["sequential", "joint"])
def test_updates_are_pure_functions(phases: Any, log: OfflineDataset) -> None:  # noqa: ANN401
    run = make_run(log, phases=phases)
    state = run.initial(torch.Generator().manual_seed(0))
    for phase in run.phases():
        before = {name: tensor.clone() for name, tensor in flatten(to_tree(state)).items()}
        given = draw(log)
        one, metrics = phase.update(state, given)
        two, _ = phase.update(state, given)
        for name, tensor in flatten(to_tree(state)).items():
            assert torch.equal(tensor, before[name]), f"{phase.name} changed {name}"
        for name, tensor in flatten(to_tree(one)).items():
            assert torch.equal(tensor, flatten(to_tree(two))[name]), f"{phase.name}: {name} differs"
        assert all(isinstance(value, torch.Tensor) for value in metrics.values())
        assert not all(torch.equal(t, before[n]) for n, t in flatten(to_tree(one)).items())


@pytest.mark.parametrize(
    ("teacher", "flows"), [("feasible", {"teacher", "behaviour"}), ("behaviour", {"teacher"})]
)
def test_each_phase_trains_its_own_networks_and_no_other(
    log: OfflineDataset,
    teacher: str,
    flows: set[str],
) -> None:
    run = make_run(log, teacher=teacher)
    critics = set(run.model.critics.parts())
    expected = [critics] * (len(run.phases()) - 2) + [flows, {"student"}]
    for phase, names in zip(run.phases(), expected, strict=True):
        state = run.initial(torch.Generator().manual_seed(0))
        after, _ = phase.update(state, draw(log))
        changed = {
            name
            for name, params in after.networks.items()
            if any(not torch.equal(t, state.networks[name][k]) for k, t in params.items())
        }
        assert changed == names, phase.name


def test_the_teacher_is_matched_to_feasible_actions_with_fisors_weights(
    log: OfflineDataset, fitted: SafeFQL
) -> None:
    """Flow matching weighted by `imitation_weights` at b_r = 0; the second flow by nothing."""
    given, model = draw(log), fitted._fitted()
    safety = model.critics.safety
    rows = torch.tensor(model.scaling.observations(log.observations[given.rows]))
    # A gate that half of the batch's states pass.
    median = float(safety.value(fitted._networks, rows).median())
    run = make_run(log, margin=-median / safety.scale.spread)
    state = run.initial(torch.Generator().manual_seed(0))
    critics = {name: fitted._networks[name] for name in run.model.critics.parts()}
    state = state._replace(networks={**state.networks, **critics}, targets=critics)
    _, metrics = run.phases()[-2].update(state, given)
    seen, taken = run.log.observations[given.rows], run.log.actions[given.rows]
    weights = imitation_weights(
        run.model.critics.safety, run.model.critics.reward, critics, seen, taken,
        run._critics.margin, reward_temperature=0.0, safety_temperature=5.0,
    )  # fmt: skip
    assert 0.0 < float((weights == 1.0).float().mean()) < 1.0
    for name, counted in (("teacher", weights), ("behaviour", None)):
        expected = flow_matching_loss(
            run.model.networks["teacher"],
            state.networks[name],
            seen,
            taken,
            given.noise,
            given.time,
            counted,
        )
        torch.testing.assert_close(metrics[f"{name}/flow_matching_loss"], expected)


def test_the_shields_behaviour_is_the_log_and_not_the_teacher(log: OfflineDataset) -> None:
    kinds: tuple[tuple[Literal["feasible", "behaviour"], str], ...]
    kinds = (("feasible", "behaviour"), ("behaviour", "teacher"))
    for teacher, name in kinds:
        agent = tiny(teacher=teacher).fit(log, steps=9)
        stack = agent.shield().model.networks["behaviour"]
        for key, array in stack.items():
            np.testing.assert_array_equal(array, agent._arrays[name][key])


def with_candidates(agent: SafeFQL, candidates: int, **changes: Any) -> SafeFQL:  # noqa: ANN401
    other = copy.copy(agent)
    other.config = dataclasses.replace(agent.config, candidates=candidates, **changes)
    return other


def test_where_the_gate_rejects_it_acts_by_the_safest_of_its_draws(
    log: OfflineDataset, fitted: SafeFQL
) -> None:
    seen = log.observations[::7]
    model, own = fitted._fitted(), fitted.shield()
    safety = model.critics.safety
    first = with_candidates(fitted, 1).predict(seen, deterministic=True)[0]
    values = np.asarray(own.value(seen, first))
    # A gate that rejects half of the first draws.
    margin = -float(np.median(values)) / safety.scale.spread
    one, many = (with_candidates(fitted, n, margin=margin) for n in (1, 9))
    plain = one.predict(seen, deterministic=True)[0]
    chosen = many.predict(seen, deterministic=True)[0]
    kept = values < np.median(values)
    np.testing.assert_array_equal(chosen[kept], plain[kept])
    after = np.asarray(own.value(seen, chosen))
    assert (after[~kept] <= values[~kept] + 1e-6).all()
    assert (after[~kept] < values[~kept] - 1e-6).any()
    noise = np.random.default_rng(fitted.config.seed).standard_normal((9, 2))
    for i in np.flatnonzero(~kept)[:20]:
        rows = np.repeat(model.scaling.observations(seen[i : i + 1]), 9, axis=0)
        drawn = model.scaling.to_box(fitted._draw(model, fitted._arrays, rows, noise))
        drawn = np.concatenate([drawn, plain[i : i + 1]])
        asked = np.asarray(own.value(np.repeat(seen[i : i + 1], 10, axis=0), drawn))
        if asked.min() < np.median(values):
            np.testing.assert_allclose(chosen[i], drawn[asked.argmin()], atol=1e-6)
    assert not np.array_equal(many.predict(seen)[0], many.predict(seen)[0])


@pytest.mark.filterwarnings("ignore:this shield is not calibrated")
def test_where_no_draw_passes_it_does_what_its_shield_would(
    log: OfflineDataset, fitted: SafeFQL
) -> None:
    seen, own = log.observations[::7], fitted.shield()
    scale = fitted._fitted().critics.safety.scale
    none = with_candidates(fitted, 9, margin=1e6 / scale.spread, last_resort="lowest")
    lowest = np.asarray(own.value(seen, none.predict(seen, deterministic=True)[0]))
    first = with_candidates(fitted, 1).predict(seen, deterministic=True)[0]
    values = np.asarray(own.value(seen, first))
    # A gate that the first draw fails and some action passes, in one state at least.
    j = (values - lowest).argmax()
    limit = 0.1 * float(values[j]) + 0.9 * float(lowest[j])
    gated = with_candidates(fitted, 9, margin=-limit / scale.spread)
    acted = gated.predict(seen, deterministic=True)[0]
    after = np.asarray(own.value(seen, acted))
    reachable = lowest < limit - 1e-5
    assert 0 < reachable.sum() < len(seen)
    assert (after[reachable] <= limit + 1e-5).all()
    strict = with_candidates(fitted, 9, margin=-limit / scale.spread, last_resort="lowest")
    searched = strict.predict(seen, deterministic=True)[0]
    exact = np.asarray(own.value(seen, searched))
    np.testing.assert_allclose(exact[~reachable], lowest[~reachable], atol=1e-5)
    draws = with_candidates(fitted, 9, margin=-limit / scale.spread)
    draws._beyond_the_draws = lambda safety, states, actions, limit: actions  # type: ignore
    alone = draws.predict(seen, deterministic=True)[0]
    failed = np.asarray(own.value(seen, alone)) > limit + 1e-5
    assert (failed & reachable).any()
    expected = own.with_delta(-limit).filter(seen[failed], alone[failed])[0]
    np.testing.assert_allclose(searched[failed], expected, atol=1e-5)
    np.testing.assert_allclose(acted[failed & reachable], expected[reachable[failed]], atol=1e-5)


@pytest.mark.parametrize("last_resort", ["nearest", "lowest"])
def test_an_action_whose_value_is_not_a_number_passes_no_gate(
    log: OfflineDataset,
    fitted: SafeFQL,
    last_resort: Literal["nearest", "lowest"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is it the safest draw or the nearest candidate."""
    seen = log.observations[::7]
    agent = with_candidates(fitted, 9, margin=0.0, last_resort=last_resort)
    known = SafetyModel.scaled_values

    def half_known(model: SafetyModel, states: StateValue, actions: np.ndarray) -> np.ndarray:
        return np.where(actions[..., 0] > 0.2, np.nan, known(model, states, actions))

    plain = agent.predict(seen, deterministic=True)[0]
    assert (plain[:, 0] > 0.2).any()
    monkeypatch.setattr(SafetyModel, "scaled_values", half_known)
    assert (agent.predict(seen, deterministic=True)[0][:, 0] <= 0.2 + 1e-6).all()


def test_the_last_resort_is_near_the_sample_and_no_worse_than_the_state(
    log: OfflineDataset, fitted: SafeFQL
) -> None:
    seen, own = log.observations[::7], fitted.shield()
    model, states = own.model, own.states(seen)
    violating = model.violating(states)
    np.testing.assert_array_equal(violating, log.constraints[::7] > 0)
    assert 0 < violating.sum() < len(seen)
    samples = np.random.default_rng(0).uniform(-1, 1, (len(seen), 2)).astype(np.float32)
    # With this advantage half of the samples have Q_h <= V_h.
    above = model.scaled_values(states, samples[:, None])[:, 0] - states.value
    weights = dict(model.networks["advantage"])
    last = max(name for name in weights if name.endswith("bias"))
    weights[last] = weights[last] - np.float32(np.median(above) / model.scale.step_rms)
    model = dataclasses.replace(model, networks={**model.networks, "advantage": weights})

    def acted(last_resort: Literal["nearest", "lowest"]) -> tuple[np.ndarray, np.ndarray]:
        agent = fitted._changed(last_resort=last_resort)
        chosen = agent._beyond_the_draws(model, states, samples.copy(), -1e6)
        return chosen, model.scaled_values(states, chosen[:, None])[:, 0]

    (lowest, least), (nearest, values) = acted("lowest"), acted("nearest")
    np.testing.assert_array_equal(nearest[violating], samples[violating])
    level = np.maximum(least, states.value)
    assert (values <= level + 1e-6)[~violating].all()
    way, far = (np.linalg.norm(one - samples, axis=1) for one in (nearest, lowest))
    assert (way <= far + 1e-6).all()
    safe = model.scaled_values(states, samples[:, None])[:, 0] <= states.value
    np.testing.assert_array_equal(nearest[safe], samples[safe])
    searched = ~violating & ~safe
    assert searched.any()
    assert (way[searched] < far[searched] - 0.01).any()


def test_the_kind_of_labels_survives_a_file(log: OfflineDataset, tmp_path: Path) -> None:
    """The gate's margin depends on it."""
    binary = OfflineDataset.from_arrays(
        observations=log.observations,
        actions=log.actions,
        rewards=log.rewards,
        next_observations=log.next_observations,
        terminated=log.terminated,
        truncated=log.truncated,
        costs=(log.next_constraints > 0).astype(float),
    )
    for data in (log, binary):
        agent = tiny().fit(data, steps=9)
        agent.save(tmp_path / "agent.safetensors")
        back = SafeFQL.load(tmp_path / "agent.safetensors", device="cpu")
        margins = [a.config.margin_of(a._fitted().critics.safety) for a in (back, agent)]
        assert margins[0] == margins[1]
        assert agent._fitted().critics.safety.continuous == (data is log)


def test_files_from_before_the_feasible_teacher_are_read(
    log: OfflineDataset, tmp_path: Path
) -> None:
    agent = tiny(teacher="behaviour", candidates=1).fit(log, steps=9)
    agent.save(tmp_path / "new.safetensors")
    file = read_tensors(tmp_path / "new.safetensors")
    header = {**file.header, "config": dict(file.header["config"])}
    del header["config"]["teacher"], header["config"]["candidates"], header["constraint_kind"]
    del header["training_episodes"]
    arrays = file.load(file.shapes, file.dtypes)
    kept = {name: arrays[name] for name in weights(agent)}
    write_tensors(tmp_path / "old.safetensors", kept, header)
    back = SafeFQL.load(tmp_path / "old.safetensors", device="cpu")
    assert_same(back, agent)
    assert back.config == agent.config


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_it_learns_what_it_learns_on_the_cpu(log: OfflineDataset) -> None:
    agent = SafeFQL(TINY, device="cuda").fit(log, steps=STEPS)
    again = SafeFQL(TINY, device="cuda").fit(log, steps=STEPS)
    assert next(iter(agent._networks["student"].values())).is_cuda
    assert_same(agent, again)
    # The same update of the same state on both devices.
    run = make_run(log)
    state = run.initial(torch.Generator().manual_seed(0))
    cuda = SafeFQLRun(
        run.model, LogTensors.of(log, run.model.scaling, torch.device("cuda")), run.config, STEPS
    )
    for mine, theirs in zip(run.phases(), cuda.phases(), strict=True):
        one, _ = mine.update(state, draw(log))
        there = _to(state, "cuda")
        two, _ = theirs.update(there, Draw(*(x.cuda() for x in draw(log))))
        for name, tensor in flatten(to_tree(one)).items():
            torch.testing.assert_close(
                flatten(to_tree(two))[name].cpu(), tensor, rtol=1e-3, atol=1e-4
            )


def _to(state: TrainState, device: str) -> TrainState:
    moved = {name: t.to(device) for name, t in flatten(to_tree(state)).items()}
    return from_tree(unflatten(to_tree(state), moved))


# -- acting -------------------------------------------------------------------------------------


def test_predict_takes_one_or_many_and_passes_the_state_through(fitted: SafeFQL) -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(-2, 2, (7, 2)).astype(np.float32)
    many, state = fitted.predict(rows, deterministic=True)
    assert many.shape == (7, 2)
    assert many.dtype == np.float32
    assert state is None
    for row, action in zip(rows, many, strict=True):
        one, _ = fitted.predict(row, deterministic=True)
        assert one.shape == (2,)
        np.testing.assert_allclose(one, action, atol=1e-6)
    kept = (np.zeros(3),)
    _, state = fitted.predict(rows[0], kept, np.array([True]), True)
    assert state is kept
    again, _ = fitted.predict(rows.tolist(), deterministic=True)
    np.testing.assert_array_equal(many, again)


def test_predict_draws_noise_unless_told_not_to(log: OfflineDataset) -> None:
    agents = [tiny(seed=3).fit(log, steps=10) for _ in range(2)]
    draws = [np.stack([a.predict(np.zeros(2))[0] for _ in range(20)]) for a in agents]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert draws[0].std(axis=0).min() > 0.0


def test_actions_stay_in_a_box_that_is_not_centred(log: OfflineDataset) -> None:
    box = gym.spaces.Box(np.array([-0.1, 3.0]), np.array([0.3, 5.0]), dtype=np.float64)
    unit = (log.actions + 1) / 2
    moved = dataclasses.replace(
        log, actions=box.low + unit * (box.high - box.low) * 0.999, action_space=box
    )
    agent = tiny().fit(moved, steps=10)
    actions, _ = agent.predict(np.random.default_rng(0).normal(size=(500, 2)) * 100)
    assert (actions >= box.low.astype("f4")).all()
    assert (actions <= box.high.astype("f4")).all()
    assert np.ptp(actions, axis=0).min() > 0.1


@pytest.mark.parametrize(
    "observation", [np.zeros(3), np.zeros((2, 3)), np.zeros((1, 1, 2)), 0.0, [np.nan, 0.0]]
)
def test_wrong_observations_are_named(observation: Any, fitted: SafeFQL) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="observation must"):
        fitted.predict(observation)


def test_an_untrained_agent_says_so(tmp_path: Path) -> None:
    for use in (lambda a: a.predict(np.zeros(2)), lambda a: a.shield(), lambda a: a.save(tmp_path)):
        with pytest.raises(RuntimeError, match="call fit"):
            use(tiny())


# -- files --------------------------------------------------------------------------------------


def test_round_trip(fitted: SafeFQL, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    fitted.save(path)
    loaded = SafeFQL.load(path, device="cpu")
    assert loaded.config == fitted.config
    assert_same(fitted, loaded)
    rows = np.random.default_rng(0).uniform(-2, 2, (9, 2))
    np.testing.assert_array_equal(
        fitted.predict(rows, deterministic=True)[0], loaded.predict(rows, deterministic=True)[0]
    )
    np.testing.assert_array_equal(fitted.shield().value(rows), loaded.shield().value(rows))
    assert loaded.shield().model.scale == fitted.shield().model.scale
    assert loaded.shield().observation_space == fitted.shield().observation_space


def test_a_shield_is_not_an_agent_nor_the_other_way_round(fitted: SafeFQL, tmp_path: Path) -> None:
    from safeshield.shield import Shield

    fitted.save(tmp_path / "agent")
    fitted.shield().save(tmp_path / "shield")
    with pytest.raises(ValueError, match="must be a 'safeshield-safefql' file"):
        SafeFQL.load(tmp_path / "shield")
    with pytest.raises(ValueError, match="must be a 'safeshield-shield' file"):
        Shield.load(tmp_path / "agent")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("config", {"seed": 0, "unknown": 1}),
        ("config", []),
        ("reward_scale", [1.0]),
        ("reward_scale", ["1", "2"]),
        ("safety_scale", {"offset": 0.0}),
        ("scaling", {}),
        ("observation_space", None),
    ],
)
def test_a_broken_agent_header_is_a_clear_error(
    field: str,
    value: Any,  # noqa: ANN401
    fitted: SafeFQL,
    tmp_path: Path,
) -> None:
    from safeshield.files.tensors import read_tensors, write_tensors

    path = tmp_path / "agent"
    fitted.save(path)
    file = read_tensors(path, "safeshield-safefql")
    arrays = file.load(file.shapes, file.dtypes)
    write_tensors(path, arrays, {**file.header, field: value})
    with pytest.raises(ValueError, match="does not describe an agent"):
        SafeFQL.load(path)


def test_tensorboard_files_hold_finite_curves(log: OfflineDataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny().fit(log, steps=420, log_dir=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"safety/value_loss", "reward/value_loss", "student/distance_to_teacher"} <= set(tags)
    values = [event.value for tag in tags for event in events.Scalars(tag)]
    assert np.isfinite(values).all()


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("discount", 1.0),
        ("safety_discount", 0.0),
        ("safety_expectile", 1.5),
        ("near_share", 1.1),
        ("polyak", 0.0),
        ("polyak", 1.1),
        ("distillation", -1.0),
        ("teacher", "nobody"),
        ("candidates", 0),
        ("candidates", 2.5),
        ("phases", "both"),
        ("phase_shares", (0.5, 0.5)),
        ("phase_shares", (0.5, 0.5, 0.5)),
        ("phase_shares", (0.0, 0.5, 0.5)),
        ("critic_hidden", ()),
        ("student_hidden", (8, 0)),
        ("safety_backup_steps", ()),
        ("reward_backup_steps", (0,)),
        ("seed", -1),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=field):
        SafeFQLConfig(**{field: value})


def test_config_survives_json() -> None:
    config = dataclasses.replace(TINY, phases="joint", seed=7)
    assert SafeFQLConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(TypeError, match="colour"):
        SafeFQLConfig(colour=1)  # type: ignore[call-arg]


def test_logs_without_a_boundary_are_refused(log: OfflineDataset) -> None:
    zero = np.zeros(len(log), np.float32)
    safe = dataclasses.replace(log, constraints=zero - 1, next_constraints=zero - 1, costs=zero)
    with pytest.raises(ValueError, match="no violation"):
        tiny().fit(safe, steps=STEPS)
    lost = dataclasses.replace(log, constraints=zero + 1, next_constraints=zero + 1, costs=zero + 1)
    with pytest.raises(ValueError, match="nothing but violations"):
        tiny().fit(lost, steps=STEPS)
    with pytest.warns(UserWarning, match="constraint turned.*log more careful episodes"):
        check_boundary(
            dataclasses.replace(
                log, constraints=-log.constraints, next_constraints=-log.next_constraints
            )
        )
    # A violation in the very last state alone is one.
    last = zero - 1
    last[-1] = 1
    check_boundary(dataclasses.replace(safe, next_constraints=last))


def test_arguments_of_fit(log: OfflineDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be at least 3"):
        tiny().fit(log, steps=2)
    with pytest.raises(ValueError, match="stop_after needs a checkpoint"):
        tiny().fit(log, steps=10, stop_after=5)
    with pytest.raises(ValueError, match="checkpoint_every"):
        tiny().fit(log, steps=10, checkpoint=tmp_path / "c", checkpoint_every=0)
    with pytest.raises(FileNotFoundError, match="folder"):
        tiny().fit(log, steps=10, checkpoint=tmp_path / "missing" / "c")
    unbounded = dataclasses.replace(log, action_space=gym.spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(ValueError, match="bounded box"):
        tiny().fit(unbounded, steps=10)


def test_a_diverged_run_stops(log: OfflineDataset) -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        tiny(learning_rate=1e30).fit(log, steps=200)
