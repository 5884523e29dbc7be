"""R2PAC: the agent, its ways to act, its files, and the shield that looks ahead."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield import OfflineDataset, Shield, collect
from safeshield.algorithms.r2pac.agent import R2PAC, R2PACConfig, with_chunks
from safeshield.algorithms.r2pac.losses import ACTOR, region_of
from safeshield.algorithms.r2pac.regions import LEVEL, CostRegion, horizon_level
from safeshield.algorithms.registry import load_agent
from safeshield.cli.kinds import describe
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.chunk_actors import ChunkActor
from safeshield.nn.plan_actor import BestPlan, _noise
from safeshield.online import FlowTeacher
from safeshield.rollouts.episodes import run_episodes
from safeshield.shield import ProjectedGradient
from safeshield.training.log import LogTensors
from safeshield.training.state import Draw, TrainState
from safeshield.values.units import FALLBACK, PLAN

TINY = R2PACConfig(
    chunk=3,
    critic_hidden=(8,),
    flow_hidden=(8,),
    student_hidden=(8,),
    batch_size=16,
    flow_steps=3,
    candidates=4,
    execute=1,
    region="quantile",
    safety_backup_steps=(8, 1),
    reward_backup_steps=(6, 3),
)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=0)


@pytest.fixture(scope="module")
def agent(log: OfflineDataset) -> R2PAC:
    return R2PAC(TINY, device="cpu").fit(log, steps=60)


def same_weights(one: R2PAC, other: R2PAC) -> bool:
    return all(
        np.array_equal(array, other._arrays[name][key])
        for name, params in one._arrays.items()
        for key, array in params.items()
    )


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"region": "horizon", "cost_limit": 5.0, "execute": 2},
        {"region": "safety"},
        {"actor": "awr_flow"},
        {"actor": "awr_gaussian"},
        {"chunk": 1, "region_test": "end"},
        {"penalise": False, "reward_backup_steps": (1,)},
        {"recover": False},
        {"penalty": 3.0, "inference": "student"},
        {"penalty": "prop1", "region": "horizon", "ends": "terminals+timeouts"},
        {"trust_labels": False, "fit_unsafe": True, "cost_limit": None, "margin": 0.0},
    ],
)
def test_every_variant_trains_acts_and_is_kept(
    log: OfflineDataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, **changes)
    trained = R2PAC(config, device="cpu").fit(log, steps=30)
    trained.save(tmp_path / "agent")
    again = load_agent(tmp_path / "agent")
    assert isinstance(again, R2PAC)
    assert again.config == config
    assert same_weights(trained, again)
    seen = log.observations[:5]
    acted = trained.predict(seen, deterministic=True)[0]
    np.testing.assert_array_equal(acted, again.predict(seen, deterministic=True)[0])
    assert acted.shape == (5, 2)
    assert np.abs(acted).max() <= 1.0
    assert again.region == trained.region
    assert describe(tmp_path / "agent")["region"]["unsafe_share"] == trained.region.unsafe_share


def test_a_resumed_run_ends_with_the_same_weights(log: OfflineDataset, tmp_path: Path) -> None:
    whole = R2PAC(TINY, device="cpu").fit(log, steps=40)
    for stop in (7, 23, 38, None):
        part = R2PAC(TINY, device="cpu")
        part.fit(log, steps=40, checkpoint=tmp_path / "c", stop_after=stop)
    assert same_weights(whole, part)


def test_each_phase_trains_its_own(log: OfflineDataset) -> None:
    """Actors leave the critics alone; the student leaves the actor alone."""
    agent = R2PAC(TINY, device="cpu")
    model = agent._describe(log)
    run = agent._run(model, LogTensors.of(log, model.scaling, torch.device("cpu")), 30)
    generator = torch.Generator().manual_seed(0)
    state = run.initial(generator)
    rows = torch.randint(len(log), (16,), generator=generator)
    noise = torch.randn(16, model.actor.width + 1, generator=generator)
    draw = Draw(rows, noise, torch.rand(16, 1, generator=generator))
    critics, *_, actor, student = run.phases()
    changed = [
        {
            name
            for name, params in state.networks.items()
            if any(not torch.equal(t, after.networks[name][k]) for k, t in params.items())
        }
        for after in (phase.update(state, draw)[0] for phase in (critics, actor, student))
    ]
    assert changed[0] == set(model.critic_parts())
    assert changed[1] == {ACTOR, "behaviour"}
    assert changed[2] == {FALLBACK}


def test_no_copy_of_the_log_is_made_for_chunks() -> None:
    """What training holds of the log: at most 1.2 times the log, whatever h."""
    rng = np.random.default_rng(0)
    count = 4000
    seen = rng.normal(size=(count + 1, 8)).astype("f4")
    wide = OfflineDataset.from_arrays(
        observations=seen[:-1], actions=rng.uniform(-1, 1, (count, 2)), rewards=np.ones(count),
        next_observations=seen[1:], terminated=np.zeros(count, bool),
        truncated=np.arange(count) % 100 == 99, costs=(seen[1:, 0] > 1).astype(float),
        constraints=seen[:-1, 0] - 1, next_constraints=seen[1:, 0] - 1,
    )  # fmt: skip
    names = (field.name for field in dataclasses.fields(wide))
    arrays = [getattr(wide, name) for name in names]
    size = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    held = []
    for chunk in (1, 5, 20):
        agent = R2PAC(dataclasses.replace(TINY, chunk=chunk), device="cpu")
        model = agent._describe(wide)
        run = agent._run(model, LogTensors.of(wide, model.scaling, torch.device("cpu")), 30)
        state = run.initial(torch.Generator().manual_seed(0))
        for phase in run.phases()[:2]:
            draw = Draw(torch.arange(16), torch.randn(16, model.actor.width + 1), torch.rand(16, 1))
            phase.update(state, draw)
        held.append(bytes_held(run))
    assert held[0] == held[1] == held[2]
    assert held[0] <= 1.2 * size


def bytes_held(root: object) -> int:
    """Sum the tensors that an object reaches: attributes, containers, closures, caches."""
    import gc

    seen: set[int] = set()
    storages: dict[int, int] = {}
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type) or callable(getattr(item, "mro", None)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            continue
        module = type(item).__module__
        if isinstance(item, dict) and "__builtins__" in item:
            continue
        if module == "builtins" or module.startswith(("safeshield", "functools")):
            todo += [x for x in gc.get_referents(item) if type(x).__name__ != "module"]
    return sum(storages.values())


# -- the region ---------------------------------------------------------------------------------


def test_the_level_is_the_quantile_of_the_costs(log: OfflineDataset) -> None:
    config = dataclasses.replace(TINY, cost_limit=None)
    agent = R2PAC(config, device="cpu").fit(log, steps=60)
    model = agent._fitted()
    assert model.costs is not None
    scaled = torch.tensor(model.scaling.observations(log.observations))
    with torch.no_grad():
        values = -model.costs.possible(agent._networks, scaled)
    assert float(values.min()) >= 0.0
    assert float(values.max()) <= 100.0 + 1e-4
    margin = agent.config.margin_of(model.critics.safety)
    known = log.constraints > -margin
    below = float((values[torch.tensor(~known)] <= agent.region.level).float().mean())
    assert below == pytest.approx(0.9, abs=0.03)
    unsafe = (values.numpy() > agent.region.level) | known
    assert agent.region.unsafe_share == pytest.approx(unsafe.mean(), abs=0.03)
    assert agent.region.violating_share == pytest.approx(known.mean())


def test_without_labels_the_level_is_the_quantile_over_all_states(log: OfflineDataset) -> None:
    """The paper's region: V_c > l and nothing else, l over states that violate and that do not."""
    config = dataclasses.replace(TINY, cost_limit=None, trust_labels=False)
    agent = R2PAC(config, device="cpu").fit(log, steps=60)
    model = agent._fitted()
    assert model.costs is not None
    scaled = torch.tensor(model.scaling.observations(log.observations))
    with torch.no_grad():
        values = -model.costs.possible(agent._networks, scaled)
    assert float((values <= agent.region.level).float().mean()) == pytest.approx(0.9, abs=0.03)
    region = region_of(model, config)
    state = TrainState({}, agent._networks, {}, {LEVEL: torch.tensor(agent.region.level)}, values)
    unsafe = region.unsafe(state, scaled, torch.tensor(log.constraints))
    assert torch.equal(unsafe, values > agent.region.level)
    assert (log.constraints[~unsafe.numpy()] > 0).any()  # A violation that V_c does not know.
    labelled = dataclasses.replace(region, trust_labels=True)
    assert not (log.constraints > 0)[
        ~labelled.unsafe(state, scaled, torch.tensor(log.constraints)).numpy()
    ].any()


def test_the_reward_scale_of_table_4_is_a_matter_of_the_penalty(log: OfflineDataset) -> None:
    """Rewards times 256 with 256 times the penalty give the same agent, bit for bit."""
    config = dataclasses.replace(TINY, penalty=0.05)
    plain = R2PAC(config, device="cpu").fit(log, steps=30)
    louder = dataclasses.replace(log, rewards=256 * log.rewards)
    scaled = R2PAC(dataclasses.replace(config, penalty=0.05 * 256), device="cpu")
    assert same_weights(plain, scaled.fit(louder, steps=30))
    assert not same_weights(plain, R2PAC(config, device="cpu").fit(louder, steps=30))


def test_values_in_unsafe_states_are_fitted_as_in_the_paper(log: OfflineDataset) -> None:
    """All chunks count, with their whole penalty."""
    batches = []
    for fit_unsafe in (False, True):
        agent = R2PAC(dataclasses.replace(TINY, fit_unsafe=fit_unsafe), device="cpu")
        model = agent._describe(log)
        tensors = LogTensors.of(log, model.scaling, agent.device)
        run = agent._run(model, tensors, 30)
        state = run.initial(torch.Generator().manual_seed(0))
        rows = torch.arange(len(tensors))
        chunk = run.chunks.batch(rows, torch.zeros(len(rows), run.chunks.width))  # type: ignore[attr-defined]
        batches.append(run.reward_batch(state, chunk, 6))  # type: ignore[attr-defined]
    ours, paper = batches
    assert torch.equal(ours.rewards, paper.rewards)
    assert ours.allowed is not None
    assert not ours.allowed.all()
    assert (ours.least, paper.least) == (-4.0, None)
    assert paper.allowed is None
    assert paper.typical is None


def test_the_bound_of_proposition_1_is_kept_with_the_agent(log: OfflineDataset) -> None:
    config = dataclasses.replace(TINY, penalty="prop1", region="horizon", cost_limit=3.0)
    agent = R2PAC(config, device="cpu").fit(log, steps=12)
    level, low, high = agent.region.level, float(log.rewards.min()), float(log.rewards.max())
    assert level == pytest.approx(horizon_level(3.0, 400, 0.99))
    stated = ((high - low) * (1 - 0.99**400) / (0.01 * level) - low) / 0.01
    assert low < 0
    assert agent.diagnostics()["penalty"] == pytest.approx(stated)


def test_the_bound_can_be_set_on_the_command_line() -> None:
    from safeshield.cli.settings import settings_of

    for text, value in (("prop1", "prop1"), ("2.5", 2.5), ("none", None)):
        assert settings_of(R2PACConfig, [f"penalty={text}"]).penalty == value
    with pytest.raises(
        ValueError, match=r"penalty: must be a number, got 'prop2'; or one of \['pr"
    ):
        settings_of(R2PACConfig, ["penalty=prop2"])


def test_a_cost_limit_caps_the_level(log: OfflineDataset) -> None:
    """Never above what the limit is worth, whatever the quantile; "horizon" is that worth."""
    free = R2PAC(dataclasses.replace(TINY, cost_limit=None), device="cpu").fit(log, steps=30)
    worth = horizon_level(2.0, 400, TINY.discount)
    assert worth < free.region.level
    for region, limit in itertools.product(("quantile", "horizon"), (2.0, 300.0)):
        config = dataclasses.replace(TINY, region=region, cost_limit=limit)  # type: ignore[arg-type]
        level = R2PAC(config, device="cpu").fit(log, steps=30).region.level
        most = horizon_level(limit, 400, TINY.discount)
        if region == "horizon" or limit == 2.0:
            assert level == pytest.approx(most)
        else:
            assert level < most
    with pytest.raises(ValueError, match="cost_limit must be a number where region is 'horizon'"):
        R2PACConfig(region="horizon", cost_limit=None)


def test_a_region_that_holds_everything_or_nothing_is_refused(log: OfflineDataset) -> None:
    """Told with the level and the quantile."""
    agent = R2PAC(TINY, device="cpu")
    model = agent._describe(log)
    run = agent._run(model, LogTensors.of(log, model.scaling, torch.device("cpu")), 30)
    from safeshield.algorithms.r2pac.regions import RegionReport

    with pytest.raises(
        ValueError, match=r"V_c > 2, its 0.9-quantile\) holds all.*50.0% violate.*or raise quantile"
    ):
        run.check_region(RegionReport(2.0, 1.0, 0.5))
    with pytest.raises(ValueError, match=r"holds none of .* train longer, or lower quantile"):
        run.check_region(RegionReport(2.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"from cost_limit\) holds none .*lower cost_limit"):
        run.check_region(RegionReport(run.region.most, 0.0, 0.0))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="foresees no violation"):
        run.check_region(RegionReport(2.0, 0.25, 0.25))
    # The level of a fixed horizon comes from the limit, also where it is rounded to a float32.
    fixed = R2PAC(dataclasses.replace(TINY, region="horizon"), device="cpu")
    other = fixed._run(fixed._describe(log), run.log, 30)
    rounded = float(torch.tensor(other.region.most)) * (1 - 1e-7)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"from cost_limit\) holds none .*lower cost_limit"):
        other.check_region(RegionReport(rounded, 0.0, 0.0))  # type: ignore[attr-defined]
    # A margin as wide as the log swallows everything, whatever the costs say.
    wide = dataclasses.replace(TINY, margin=50.0)
    with pytest.raises(ValueError, match=r"holds all of the log's states: each violates"):
        R2PAC(wide, device="cpu").fit(log, steps=12)


def test_windows_beyond_an_episode_mean_all_of_it(log: OfflineDataset) -> None:
    fitted = [
        R2PAC(
            dataclasses.replace(
                TINY, reward_backup_steps=(steps,), safety_backup_steps=(steps,), batch_size=4
            ),
            device="cpu",
        ).fit(log, steps=9)
        for steps in (400, 10**9)
    ]
    assert same_weights(*fitted)


# -- acting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["quantile", "safety"])
@pytest.mark.parametrize("choose", ["region", "cost"])
def test_which_plan_it_follows(log: OfflineDataset, region: Any, choose: Any) -> None:  # noqa: ANN401
    """One batched pass over all candidates equals judging them one by one, in torch."""
    config = dataclasses.replace(TINY, region=region, choose=choose, margin=0.0)
    agent = R2PAC(config, device="cpu").fit(log, steps=60)
    model, networks = agent._fitted(), agent._networks
    # A level in the middle: some states are safe, some are not.
    told = region_of(model, config)
    seen = model.scaling.observations(log.observations[::97])
    with torch.no_grad():
        if isinstance(told, CostRegion):
            value = told.value(networks, torch.tensor(seen))
        else:
            value = told.critics.value(networks, torch.tensor(seen))
    level = float(value.median())
    report = agent.region._replace(level=level)
    agent._model = dataclasses.replace(model, region=report)
    noise = np.random.default_rng(config.seed).standard_normal((4, model.actor.width))
    plans = agent._plans(agent._model, seen, deterministic=True)
    differ = 0
    for row, v, plan in zip(seen, value, plans, strict=True):
        drawn = [
            model.actor.sample(agent._arrays[ACTOR], row[None], z[None].astype("f4")) for z in noise
        ]
        with torch.no_grad():
            at = networks, torch.tensor(np.repeat(row[None], 4, 0)), torch.tensor(np.vstack(drawn))
            worse, gain = told.worse(*at), model.critics.reward.advantages(*at).amin(0)
        by_reward = choose == "region" and float(v) <= level
        best = int(gain.argmax()) if by_reward else int(worse.argmin())
        np.testing.assert_allclose(plan, drawn[best][0], atol=1e-5)
        differ += by_reward and best != int(worse.argmin())
    assert (differ > 0) == (choose == "region")


@pytest.mark.parametrize("kind", ["guided", "awr_flow", "awr_gaussian"])
def test_numpy_draws_the_same_chunks(kind: Any) -> None:  # noqa: ANN401
    actor = ChunkActor(kind, 3, 4, (8, 8), 6, 2.0)
    params = actor.network.init(torch.Generator().manual_seed(0))
    seen, noise = torch.randn(9, 3), torch.randn(9, 4)
    with torch.no_grad():
        slow = actor.sample(params, seen, noise)
    arrays = {name: tensor.numpy() for name, tensor in params.items()}
    np.testing.assert_allclose(actor.sample(arrays, seen.numpy(), noise.numpy()), slow, atol=1e-5)


def test_chunks_are_executed_from_the_state_that_predict_returns(
    agent: R2PAC, log: OfflineDataset
) -> None:
    """Of each plan the first 2 of 3 actions; an episode's start begins a new plan."""
    several = agent.acting_by("flow", execute=2)
    at_ease(several)
    seen = log.observations[:4]
    first, state = several.predict(seen, deterministic=True)
    plan = several.plan(seen, deterministic=True)
    np.testing.assert_allclose(first, plan[:, 0], atol=1e-6)
    starts = np.array([False, True, False, False])
    second, state = several.predict(seen[::-1], state, starts, deterministic=True)
    anew = several.plan(seen[::-1], deterministic=True)
    np.testing.assert_allclose(second[[0, 2, 3]], plan[[0, 2, 3], 1], atol=1e-6)
    np.testing.assert_allclose(second[1], anew[1, 0], atol=1e-6)
    third, state = several.predict(seen[::-1], state, np.zeros(4, bool), deterministic=True)
    np.testing.assert_allclose(third[[0, 2, 3]], anew[[0, 2, 3], 0], atol=1e-6)
    np.testing.assert_allclose(third[1], anew[1, 1], atol=1e-6)
    single, state = several.predict(seen[0], deterministic=True)
    assert single.shape == (2,)
    followed, _ = several.predict(seen[1], state, np.array([False]), deterministic=True)
    np.testing.assert_allclose(followed, plan[0, 1], atol=1e-6)
    with pytest.raises(ValueError, match="state must be what predict returned for 4 observations"):
        several.predict(seen, state)
    runs = run_episodes(gym.make("safeshield/Boat-v0", max_episode_steps=7), several, 3, 0)
    assert [len(run.actions) for run in runs] == [7, 7, 7]


def at_ease(agent: R2PAC, level: float = 1e9) -> None:
    """Call no state unsafe whose V_c is at most `level`."""
    model = agent._fitted()
    agent._model = dataclasses.replace(model, region=agent.region._replace(level=level))


def test_a_plan_is_given_up_where_the_state_is_unsafe(agent: R2PAC, log: OfflineDataset) -> None:
    several = agent.acting_by("flow", execute=3)
    model = several._fitted()
    assert model.costs is not None
    seen = log.observations[::97]
    scaled = torch.tensor(model.scaling.observations(seen))
    with torch.no_grad():
        costs = -model.costs.value(several._networks, scaled).numpy()
    level = float(np.median(costs))
    unsafe = costs > level
    assert 0 < unsafe.sum() < len(seen)
    at_ease(several, level)
    plan = several.plan(seen, deterministic=True)
    _, state = several.predict(seen, deterministic=True)
    second, (_, done) = several.predict(seen, state, np.zeros(len(seen), bool), deterministic=True)
    np.testing.assert_allclose(second[unsafe], plan[unsafe, 0], atol=1e-6)
    np.testing.assert_allclose(second[~unsafe], plan[~unsafe, 1], atol=1e-6)
    np.testing.assert_array_equal(done, np.where(unsafe, 1, 2))


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_plans_have_the_shape_of_the_actions(shape: tuple[int, ...]) -> None:
    rng, count = np.random.default_rng(0), 60
    box = gym.spaces.Box(-2.0, 2.0, shape)
    seen = rng.normal(size=(count + 1, 3)).astype("f4")
    shaped = OfflineDataset.from_arrays(
        observations=seen[:-1], actions=rng.uniform(-2, 2, (count, *shape)), rewards=np.ones(count),
        next_observations=seen[1:], terminated=np.zeros(count, bool), action_space=box,
        truncated=np.arange(count) % 20 == 19, costs=(seen[1:, 0] > 1).astype(float),
    )  # fmt: skip
    agent = R2PAC(TINY, device="cpu").fit(shaped, steps=30)
    assert agent.plan(seen[0]).shape == (3, *shape)
    assert box.contains(agent.plan(seen[0])[1])
    assert agent.plan(seen[:5]).shape == (5, 3, *shape)
    several = agent.acting_by("flow", execute=2)
    for way in (agent, several):
        assert way.plan(seen[:0]).shape == (0, 3, *shape)
        assert way.predict(seen[:0])[0].shape == (0, *shape)
        assert way.predict(seen[:5])[0].shape == (5, *shape)


def test_a_state_that_is_none(agent: R2PAC, log: OfflineDataset) -> None:
    """No plan of NaN is followed, and a plan of another agent's goes on where it was."""
    several, longer = agent.acting_by("flow", execute=2), agent.acting_by("flow", execute=3)
    seen, no = log.observations[:4], np.zeros(4, bool)
    _, (plans, done) = several.predict(seen)
    for state in ((), "x", (plans,), (plans, done, done), (plans * np.nan, done),
                  (plans + 3.0, done), (plans, done - 5), (plans, done + 9)):  # fmt: skip
        with pytest.raises(ValueError, match="state must be what predict returned"):
            several.predict(seen, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"episode_start must have shape \(4,\), got \(3,\)"):
        several.predict(seen, (plans, done), no[:3])
    at_ease(longer)
    plan = longer.plan(seen, deterministic=True)
    _, state = longer.predict(seen, deterministic=True)
    _, state = longer.predict(seen, state, no, deterministic=True)
    third, _ = longer.predict(seen, state, no, deterministic=True)
    np.testing.assert_allclose(third, plan[:, 2], atol=1e-6)
    anew, _ = several.predict(seen, state, no, deterministic=True)  # its plans end after 2
    np.testing.assert_allclose(anew, plan[:, 0], atol=1e-6)


def test_ways_of_acting(agent: R2PAC) -> None:
    student = agent.acting_by("student", candidates=1)
    assert student.config.inference == "student"
    assert agent.config.inference == "flow"
    a = student.predict(np.zeros(2, np.float32), deterministic=True)[0]
    b = agent.predict(np.zeros(2, np.float32), deterministic=True)[0]
    assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="execute must be at most the actions of a chunk"):
        agent.acting_by("flow", execute=4)
    with pytest.raises(ValueError, match="inference must be 'flow' or 'student'"):
        agent.acting_by("euler")  # type: ignore[arg-type]


# -- the shield ---------------------------------------------------------------------------------


def test_the_shield_judges_an_action_by_the_best_plan_that_begins_with_it(
    agent: R2PAC, log: OfflineDataset
) -> None:
    # The tensors below estimate h by a network, so the shield must do the same.
    shield = agent.shield(plans=5).with_constraint(None)
    model, networks = agent._fitted(), agent._networks
    judge = shield.model.judge
    assert isinstance(judge, BestPlan)
    assert (judge.planner, judge.plans) == (shield.model.fallback_actor, 5)
    assert judge.planner.horizon == 3
    seen, actions = log.observations[:7], log.actions[:7]
    features = torch.tensor(model.scaling.observations(seen))
    noise = torch.tensor(_noise(5, judge.planner.noise_features))
    expected = []
    with torch.no_grad():
        for row, action in zip(features, actions, strict=True):
            values = []
            for z in noise:
                drawn = model.networks[FALLBACK](networks[FALLBACK], torch.cat([row, z])[None])[
                    0, 0
                ]
                plan = drawn.clamp(-1, 1)
                plan[:2] = torch.tensor(model.scaling.actions(action))
                judged = model.plan(networks[PLAN], torch.cat([row, plan])[None])
                values.append(float(judged.max()))
            value = float(model.critics.safety.value(networks, row[None]))
            expected.append(value + model.critics.safety.scale.step_rms * min(values))
    np.testing.assert_allclose(shield.value(seen, actions), expected, atol=1e-4)
    states = shield.model.states(seen)
    single = [shield.model.action_value(states.take(slice(i, i + 1)), actions[i]) for i in range(7)]
    np.testing.assert_allclose(single, expected, atol=1e-4)
    by_itself = agent.shield(plans=0).with_constraint(None).value(seen, actions)
    assert not np.allclose(by_itself, expected, atol=1e-4)


def test_its_gradient_is_that_of_the_best_plan(agent: R2PAC, log: OfflineDataset) -> None:
    model = agent.shield().model
    states, actions = model.states(log.observations[:40]), log.actions[:40].astype("f8")
    values, slopes = model.action_gradients(states, actions)
    np.testing.assert_allclose(values, model.action_values(states, actions), atol=1e-5)
    small, right = 1e-3, 0
    for entry in range(2):
        step = np.zeros(2)
        step[entry] = small
        ahead, behind = (model.action_values(states, actions + s * step) for s in (1, -1))
        slope = (ahead - behind) / (2 * small)
        right += int(np.isclose(slope, slopes[:, entry], atol=2e-3, rtol=0.02).sum())
    assert right >= 0.9 * 80  # elsewhere a kink lies in between


@pytest.mark.filterwarnings("ignore:this shield is not calibrated")
def test_a_shield_that_looks_ahead_filters_and_is_kept(
    agent: R2PAC, log: OfflineDataset, tmp_path: Path
) -> None:
    for plans, replacement in itertools.product((0, 4), (None, ProjectedGradient(steps=3))):
        shield = agent.shield(plans).with_delta(0.1)
        shield = shield if replacement is None else shield.with_replacement(replacement)
        shield.save(tmp_path / "shield")
        again = Shield.load(tmp_path / "shield")
        rng = np.random.default_rng(0)
        tried = rng.uniform(-1, 1, (30, 2)).astype("f4")
        ours, told = shield.filter(log.observations[:30], tried)
        theirs, _ = again.filter(log.observations[:30], tried)
        np.testing.assert_array_equal(ours, theirs)
        low = np.asarray(shield.value(log.observations[:30], ours))
        assert (low[told.acceptable] <= -0.1 + 1e-6).all()
        same = ~told.intervened
        np.testing.assert_array_equal(ours[same], tried[same])
    supported = agent.shield().with_support(collect(
        gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=5))  # fmt: skip
    assert supported.support is not None


@pytest.mark.parametrize("plans", [0, 4])
def test_the_flow_teacher_draws_single_actions_from_a_shield_that_plans(
    agent: R2PAC, log: OfflineDataset, plans: int
) -> None:
    """The behavior's noise has the width of one action, not that of a whole plan."""
    shield = agent.shield(plans=plans)
    model, observations = shield.model, log.observations[:5]
    assert model.noise_features == TINY.chunk * model.behaviour_noise_features
    drawn = FlowTeacher(shield).draw(observations, 3, np.random.default_rng(0))
    assert drawn.shape == (5, 3, 2)
    noise = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(drawn, model.behaviour(model.states(observations), noise))


@pytest.mark.parametrize(
    "plan", [{"horizon": 0, "plans": 4}, {"horizon": 3, "plans": -1}, {"horizon": 3}, [], "x",
             {"horizon": 3.0, "plans": 4}, {"horizon": 10**9, "plans": 4}]
)  # fmt: skip
def test_a_file_with_another_plan_is_refused(agent: R2PAC, tmp_path: Path, plan: object) -> None:
    """In the header of today, and in that of version 1."""
    path = tmp_path / "shield"
    agent.shield().save(path)
    file = read_tensors(path)
    told = plan if isinstance(plan, dict) else {"horizon": plan, "plans": plan}
    fallback, judge = file.header["fallback"], file.header["judge"]
    fallback = {**fallback, "horizon": told["horizon"]}
    planner = {**judge["planner"], "horizon": told["horizon"]}
    judge = {**judge, "planner": planner, "plans": told.get("plans")}
    old = read_tensors(Path(__file__).with_name("golden") / "shield_plan.safetensors")
    for stored, changes in (
        (file, {"fallback": fallback, "judge": judge}),
        (old, {"plan": plan}),
    ):
        write_tensors(path, stored.load(stored.shapes, stored.dtypes), {**stored.header, **changes})
        with pytest.raises(ValueError, match="does not describe a shield"):
            Shield.load(path)


# -- bad input ----------------------------------------------------------------------------------


def test_episodes_shorter_than_a_chunk(log: OfflineDataset) -> None:
    short = collect(
        gym.make("safeshield/Boat-v0", max_episode_steps=4), "random", episodes=60, seed=0
    )
    assert short.violating_episodes.any()
    with pytest.raises(ValueError, match="all 60 episodes of the log are truncated before 5 steps"):
        R2PAC(dataclasses.replace(TINY, chunk=5), device="cpu").fit(short, steps=12)
    assert with_chunks(log, 3) is log
    both = OfflineDataset.from_arrays(
        **{
            name: np.concatenate([getattr(short, name), getattr(log, name)])
            for name in (
                "observations", "actions", "rewards", "next_observations", "terminated",
                "truncated", "costs", "constraints", "next_constraints",
            )
        },
        action_space=log.action_space,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out"):
        assert with_chunks(both, 5).num_episodes == log.num_episodes
    with pytest.warns(UserWarning, match="60 of 72 episodes are truncated before 5 steps"):
        R2PAC(dataclasses.replace(TINY, chunk=5), device="cpu").fit(both, steps=12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk", 0),
        ("chunk", 2.5),
        ("execute", 0),
        ("execute", 6),
        ("quantile", 0.0),
        ("quantile", 1.0),
        ("quantile", -0.5),
        ("quantile", 7.0),
        ("cost_limit", 0.0),
        ("region", "hazard"),
        ("region_test", "all"),
        ("actor", "gaussian"),
        ("inference", "both"),
        ("penalty", float("inf")),
        ("penalty", 1e39),
        ("penalty", "prop2"),
        ("ends", "timeouts"),
        ("trust_labels", 1),
        ("fit_unsafe", None),
        ("seed", 2**63),
        ("seed", -1),
        ("label_dropout", 1.5),
        ("guidance", -1.0),
        ("candidates", 0),
        ("choose", "reward"),
        ("phase_shares", (0.5, 0.5)),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=field):
        R2PACConfig(**{field: value})


def test_discrete_actions_are_refused() -> None:
    count = 40
    log = OfflineDataset.from_arrays(
        observations=np.zeros((count, 2)), actions=np.arange(count) % 3, rewards=np.zeros(count),
        next_observations=np.zeros((count, 2)), terminated=np.zeros(count, bool),
        truncated=np.arange(count) % 10 == 9, costs=(np.arange(count) % 4 == 0).astype(float),
        action_space=gym.spaces.Discrete(3),
    )  # fmt: skip
    with pytest.raises(TypeError, match="R2PAC's actor needs a Box of actions"):
        R2PAC(TINY, device="cpu").fit(log, steps=12)


def test_whole_numbered_boxes_are_refused(integer_box_log: OfflineDataset) -> None:
    with pytest.raises(TypeError, match="a Box of floating-point numbers"):
        R2PAC(TINY, device="cpu").fit(integer_box_log, steps=12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="this torch sees no CUDA"):
        R2PAC(TINY, device="cuda")


def test_a_file_whose_region_contradicts_its_costs(agent: R2PAC, tmp_path: Path) -> None:
    agent.save(tmp_path / "agent")
    file = read_tensors(tmp_path / "agent")
    for change in ({"cost_scale": None}, {"region": None}, {"penalty": "much"}, {"longest": 0}):
        write_tensors(
            tmp_path / "bad", file.load(file.shapes, file.dtypes), {**file.header, **change}
        )
        with pytest.raises(ValueError, match="does not describe an agent"):
            R2PAC.load(tmp_path / "bad")


def test_presets() -> None:
    paper = R2PACConfig.preset("paper", seed=3)
    assert (paper.flow_steps, paper.region_test, paper.penalty, paper.seed) == (32, "end", 1.0, 3)
    assert R2PACConfig.preset("small") == R2PACConfig()


# -- its page -----------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "r2pac.md").read_text()


def test_the_page_explains_every_setting(log: OfflineDataset, tmp_path: Path) -> None:
    table = PAGE.partition("## Settings")[2].partition("\n## ")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = re.findall(r"`(\w+)`", first)
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(R2PACConfig))


@pytest.mark.filterwarnings("ignore")
def test_the_pages_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, loop = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    env = gym.make("safeshield/Boat-v0", max_episode_steps=60)
    collect(env, "random", episodes=100, seed=0).save(tmp_path / "log.hdf5")
    monkeypatch.chdir(tmp_path)
    small = "seed=0, critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,), batch_size=16"
    quick = code.replace("12_000", "12").replace("seed=0", small)
    assert quick.count("steps=12)") == 1
    names: dict[str, Any] = {}
    exec(quick, names)
    assert names["actions"].shape == (100, 2)
    exec(loop.replace("1000", "70").replace('-v0"', '-v0", max_episode_steps=60'), names)
    assert names["actions"].shape == (1, 2)
