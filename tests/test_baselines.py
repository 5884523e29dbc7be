"""Behaviour cloning and the FISOR-style baseline: what they imitate, how they act, their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.fisor import FISOR, FISORConfig
from safeshield.algorithms.registry import ALGORITHMS, load_agent
from safeshield.data import OfflineDataset, collect
from safeshield.files.tensors import AGENT, FORMATS
from safeshield.nn.flow import euler_sample, flow_matching_loss, velocity_network
from safeshield.shield import Shield
from safeshield.training.agent import OfflineAgent
from safeshield.training.imitation import REWARD_LIMIT, SAFETY_LIMIT, imitation_weights
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import CONSTRAINT, SafetyScale
from safeshield.wrappers import ConstraintFromFunction

TINY_FISOR = FISORConfig(
    critic_hidden=(8,),
    flow_hidden=(8,),
    batch_size=16,
    flow_steps=3,
    safety_backup_steps=(8, 1),
    reward_backup_steps=(4, 1),
    candidates=5,
)
TINY_BC = BehaviourCloningConfig(hidden=(8,), batch_size=16)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=0)


@pytest.fixture(scope="module")
def fisor(log: OfflineDataset) -> FISOR:
    return FISOR(TINY_FISOR, device="cpu").fit(log, steps=60)


def agents(log: OfflineDataset, **arguments: Any) -> list[OfflineAgent[Any, Any]]:  # noqa: ANN401
    return [
        FISOR(TINY_FISOR, device="cpu").fit(log, steps=40, **arguments),
        BehaviourCloning(TINY_BC, device="cpu").fit(log, steps=40, **arguments),
    ]


def toy_log(actions: np.ndarray, costs: np.ndarray) -> OfflineDataset:
    """Episodes of 10 steps in one and the same state; `actions` and `costs` (episodes,)."""
    count = 10 * len(actions)
    ends = np.arange(count) % 10 == 9
    return OfflineDataset.from_arrays(
        observations=np.zeros((count, 1)),
        actions=np.repeat(actions, 10)[:, None],
        rewards=np.zeros(count),
        next_observations=np.zeros((count, 1)),
        terminated=np.zeros(count, bool),
        truncated=ends,
        costs=np.repeat(costs, 10) * ends,
    )


# -- behaviour cloning --------------------------------------------------------------------------


def test_cloning_ends_on_the_mean_action_and_safe_cloning_on_the_safe_episodes() -> None:
    log = toy_log(np.array([0.8, 0.2, -0.6, -0.4]), np.array([30.0, 11.0, 10.0, 0.0]))
    state = np.zeros(1, np.float32)
    everything = BehaviourCloning(BehaviourCloningConfig(hidden=(16,)), device="cpu")
    safe = BehaviourCloning(BehaviourCloningConfig(episodes="safe", hidden=(16,)), device="cpu")
    # The mean minimises the squared error: of all four, and of the two that cost at most 10.
    assert everything.fit(log, steps=400).predict(state)[0][0] == pytest.approx(0.0, abs=0.03)
    assert safe.fit(log, steps=400).predict(state)[0][0] == pytest.approx(-0.5, abs=0.03)


def test_safe_cloning_without_a_safe_episode_says_what_the_cheapest_costs() -> None:
    log = toy_log(np.array([0.8, 0.2]), np.array([30.0, 12.0]))
    with pytest.raises(ValueError, match=r"cost_limit=10.*of 2 costs 12"):
        BehaviourCloning(BehaviourCloningConfig(episodes="safe")).fit(log, steps=10)


def test_cloning_needs_no_boundary(log: OfflineDataset) -> None:
    zero = np.zeros(len(log), np.float32)
    safe = dataclasses.replace(log, constraints=zero - 1, next_constraints=zero - 1, costs=zero)
    BehaviourCloning(TINY_BC, device="cpu").fit(safe, steps=5)
    with pytest.raises(ValueError, match="no violation"):
        FISOR(TINY_FISOR, device="cpu").fit(safe, steps=5)


# -- FISOR --------------------------------------------------------------------------------------


def test_weights_are_those_of_the_formula(fisor: FISOR, log: OfflineDataset) -> None:
    model = fisor._fitted()
    networks = {name: dict(params) for name, params in fisor._networks.items()}
    # A value that the batch straddles, so that all three branches are seen.
    bias = networks[CONSTRAINT]["1.bias"]
    rows = np.linspace(0, len(log) - 1, 200).astype(int)
    observations = torch.tensor(model.scaling.observations(log.observations[rows]))
    actions = torch.tensor(model.scaling.actions(log.actions[rows]))
    safety, reward = model.critics.safety, model.critics.reward
    middle = safety.value(networks, observations).median() / safety.scale.spread
    networks[CONSTRAINT]["1.bias"] = bias - middle
    config = dataclasses.replace(TINY_FISOR, reward_temperature=40.0, safety_temperature=40.0)
    margin = 0.3 * safety.scale.step_rms
    weights = imitation_weights(
        model.critics.safety,
        model.critics.reward,
        networks,
        observations,
        actions,
        margin,
        reward_temperature=config.reward_temperature,
        safety_temperature=config.safety_temperature,
    )
    seen = set()
    for i in range(len(rows)):
        one, act = observations[i : i + 1], actions[i : i + 1]
        value = float(safety.value(networks, one))
        q = float(safety.action_value(networks, one, act))
        if value > -margin:
            gain = -40.0 * (q - value) / safety.scale.step_rms
            expected, branch = min(np.exp(gain), SAFETY_LIMIT), "unsafe"
        elif q > -margin:
            expected, branch = 0.0, "leaves"
        else:
            gain = 40.0 * float(reward.advantages(networks, one, act).min())
            expected, branch = min(np.exp(gain), REWARD_LIMIT), "stays"
        seen.add(branch)
        assert float(weights[i]) == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert seen >= {"unsafe", "stays"}


def test_weighted_flow_matching_is_that_of_a_log_with_repeated_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    network = velocity_network(2, 2, (8,))
    params = network.init(generator)
    rows = [torch.rand(3, width, generator=generator) for width in (2, 2, 2, 1)]
    weights = torch.tensor([2.0, 0.0, 1.0])
    repeated = [torch.stack([x[0], x[0], x[2]]) for x in rows]
    weighted = flow_matching_loss(network, params, *rows, weights)  # type: ignore[arg-type]
    plain = flow_matching_loss(network, params, *repeated)  # type: ignore[arg-type]
    torch.testing.assert_close(weighted, plain)


def test_it_acts_by_the_safest_of_its_candidates(fisor: FISOR, log: OfflineDataset) -> None:
    model, config = fisor._fitted(), fisor.config
    observations = log.observations[:6]
    acted, _ = fisor.predict(observations, deterministic=True)
    inputs = torch.tensor(model.scaling.observations(observations))
    noise = np.random.default_rng(config.seed).standard_normal((config.candidates, 2))
    for i, action in enumerate(acted):
        repeated = inputs[i].expand(config.candidates, -1)
        drawn = euler_sample(
            model.networks["actor"],
            fisor._networks["actor"],
            repeated,
            torch.tensor(noise, dtype=torch.float32),
            config.flow_steps,
        )
        danger = model.critics.safety.action_value(fisor._networks, repeated, drawn)
        best = model.scaling.to_box(drawn[danger.argmin()].numpy())
        np.testing.assert_allclose(action, best, atol=1e-5)
        # One observation alone, the same.
        np.testing.assert_allclose(
            fisor.predict(observations[i], deterministic=True)[0], action, atol=1e-5
        )
    assert not np.array_equal(fisor.predict(observations)[0], fisor.predict(observations)[0])


@pytest.mark.parametrize("steps", [0.1, 2.0])
def test_the_margin_is_a_share_of_the_spread_and_at_least_a_step(steps: float) -> None:
    scale = SafetyScale(offset=0.0, spread=10.0, step_rms=steps)
    binary, continuous = (SafetyCritics(1, 1, (8,), scale, continuous=c) for c in (False, True))
    config = FISORConfig(margin=0.058)
    assert config.margin_of(binary) == pytest.approx(0.58)
    assert config.margin_of(continuous) == pytest.approx(max(0.58, steps))
    assert FISORConfig(margin=0.0).margin_of(continuous) == 0.0


# -- both ---------------------------------------------------------------------------------------


def test_same_seed_same_agent_and_files_bring_it_back(log: OfflineDataset, tmp_path: Path) -> None:
    for one, two in zip(agents(log), agents(log), strict=True):
        acted = one.predict(log.observations[:9], deterministic=True)[0]
        np.testing.assert_array_equal(
            two.predict(log.observations[:9], deterministic=True)[0], acted
        )
        one.save(tmp_path / "agent.safetensors")
        back = load_agent(tmp_path / "agent.safetensors")
        assert type(back) is type(one)
        assert back.config == one.config
        np.testing.assert_array_equal(
            back.predict(log.observations[:9], deterministic=True)[0], acted
        )


def test_a_run_in_instalments_ends_as_one_without(log: OfflineDataset, tmp_path: Path) -> None:
    for i, whole in enumerate(agents(log)):
        kind = type(whole)
        for stop in (3, 20, 33, None):
            part = kind(whole.config, device="cpu").fit(
                log, steps=40, checkpoint=tmp_path / f"{i}.safetensors", stop_after=stop
            )
        for name, params in whole._arrays.items():
            for key, array in params.items():
                np.testing.assert_array_equal(part._arrays[name][key], array)


def test_load_agent_refuses_what_is_none(log: OfflineDataset, tmp_path: Path) -> None:
    from safeshield import SafeFQL, SafeFQLConfig

    tiny = SafeFQLConfig(critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,))
    agent = SafeFQL(tiny, device="cpu").fit(log, steps=3)
    path = tmp_path / "shield.safetensors"
    agent.shield().save(path)
    with pytest.raises(ValueError, match="must be an agent's file"):
        load_agent(path)
    Shield.load(path)


def test_every_algorithms_files_are_known() -> None:
    kinds = [one.kind for one in ALGORITHMS.values()]
    assert {kind.__name__ for kind in kinds} >= {"SafeFQL", "FLRP", "SafeSupportQLearning"}
    for kind in kinds:
        assert FORMATS[kind.file_format] == (AGENT, f"{kind.__name__}.load")


ACTORS = {
    name: one.kind
    for name, one in ALGORITHMS.items()
    if one.offline and issubclass(one.kind, OfflineAgent) and name != "shield"
}


@pytest.mark.parametrize("kind", list(ACTORS.values()), ids=list(ACTORS))
def test_discrete_actions_and_foreign_configurations_are_refused(
    kind: type[OfflineAgent[Any, Any]],
) -> None:
    env = ConstraintFromFunction(gym.make("CartPole-v1"), lambda obs: abs(obs[2]) - 0.1)
    log = collect(env, "random", episodes=3, seed=0)
    with pytest.raises(TypeError, match="ShieldTrainer makes a shield"):
        kind(device="cpu").fit(log, steps=10)
    with pytest.raises(TypeError, match=f"must be a {kind.config_type.__name__}, got dict"):
        kind({"seed": 1})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (FISORConfig, "candidates", 0),
        (FISORConfig, "candidates", 1.5),
        (FISORConfig, "reward_temperature", -1.0),
        (FISORConfig, "safety_temperature", float("nan")),
        (FISORConfig, "phase_shares", (0.5, 0.2, 0.3)),
        (BehaviourCloningConfig, "episodes", "good"),
        (BehaviourCloningConfig, "cost_limit", -1.0),
        (BehaviourCloningConfig, "hidden", ()),
    ],
)
def test_a_wrong_setting_is_named(kind: type[Any], field: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})
