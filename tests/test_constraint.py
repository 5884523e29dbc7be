"""Named functions of the observation that give h, in logs, agents, shields and wrappers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import safeshield.suites
from safeshield import (
    OfflineDataset,
    SafeFQL,
    SafeFQLConfig,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldTrainer,
    collect,
    load_agent,
    register_constraint,
)
from safeshield.envs.boat import constraint
from safeshield.suites.labels import label
from safeshield.suites.logged import LOG_LABELS, SOURCES
from safeshield.values.constraint import ConstraintSource, as_constraint, find_constraint
from safeshield.wrappers import ConstraintFromFunction

SMALL = {"critic_hidden": (16, 16), "behaviour_hidden": (16,), "fallback_hidden": (16,)}


@register_constraint("test-speed@1")
def too_fast(observations: np.ndarray) -> np.ndarray:
    return np.abs(observations[:, 2]) - 6.0


def test_importing_what_the_error_names_registers_the_constraint() -> None:
    code = """
import numpy as np
from safeshield.values.constraint import ConstraintSource, UnknownConstraintError
ball = ConstraintSource("BallRun@1")
try:
    ball(np.zeros((1, 7)))
except UnknownConstraintError as error:
    assert "safeshield.suites" in str(error)
    import safeshield.suites
    assert ball.find(ball.name).found is not None
else:
    raise AssertionError("it was registered before")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=30, seed=3)


@pytest.fixture(scope="module")
def shield(log: OfflineDataset) -> Shield:
    return ShieldTrainer(ShieldConfig(**SMALL)).fit(log, steps=60).shield()


def test_a_log_names_the_function_that_gives_its_labels(
    log: OfflineDataset, tmp_path: Path
) -> None:
    assert log.constraint_source == "Boat@1"
    source = find_constraint("Boat@1")
    np.testing.assert_allclose(source(log.observations), log.constraints, atol=1e-6)
    np.testing.assert_allclose(source(log.next_observations), log.next_constraints, atol=1e-6)
    for suffix in (".hdf5", ".npz"):
        log.save(tmp_path / f"log{suffix}")
        assert OfflineDataset.load(tmp_path / f"log{suffix}").constraint_source == "Boat@1"
    assert log.select([3, 1]).constraint_source == "Boat@1"


def test_the_value_is_h_plus_a_nonnegative_excess(shield: Shield, log: OfflineDataset) -> None:
    """V_h(s) >= h(s) holds exactly, which an estimate of h cannot promise; Q_h moves alike."""
    observations = log.observations
    h = constraint(observations).astype(np.float32)
    estimated = shield.with_constraint(None)
    value = shield.value(observations)
    assert (value >= h).all()
    assert (estimated.value(observations) < h).any()
    model = shield.model
    raw = model.states(observations).value - h
    np.testing.assert_allclose(value, h + raw, rtol=0, atol=0)
    moved = value - estimated.value(observations)
    actions = log.actions
    np.testing.assert_allclose(
        shield.value(observations, actions) - estimated.value(observations, actions),
        moved,
        atol=1e-5,
    )


def test_files_store_the_name_and_runs_of_the_same_weights_agree(
    shield: Shield, log: OfflineDataset, tmp_path: Path
) -> None:
    shield.save(tmp_path / "shield.safetensors")
    same = Shield.load(tmp_path / "shield.safetensors")
    assert same.constraint == "Boat@1"
    np.testing.assert_array_equal(same.value(log.observations), shield.value(log.observations))
    again = pickle.loads(pickle.dumps(same.model.constraint))
    np.testing.assert_array_equal(again(log.observations), constraint(log.observations))


def test_an_unregistered_source_is_an_error_that_names_the_repair(
    shield: Shield, log: OfflineDataset
) -> None:
    unknown = shield.with_constraint(ConstraintSource("unknown@7"))
    for call in (
        lambda: unknown.value(log.observations[0]),
        lambda: unknown.filter(log.observations[0], log.actions[0]),
        lambda: unknown.certified(log.observations[0]),
    ):
        with pytest.raises(LookupError, match=r"'unknown@7' is not registered.*with_constraint"):
            call()
    h = constraint(log.observations)
    np.testing.assert_array_equal(
        unknown.value(log.observations, constraint=h), shield.value(log.observations)
    )
    told = unknown.filter(log.observations[0], log.actions[0], constraint=h[0])
    own = shield.filter(log.observations[0], log.actions[0])
    np.testing.assert_array_equal(told[0], own[0])
    assert told[1].value == own[1].value
    with pytest.raises(ValueError, match="one number for each of"):
        unknown.value(log.observations, constraint=h[:3])
    for other in (shield, shield.with_constraint(None)):
        with pytest.raises(ValueError, match="constraint must be left out"):
            other.value(log.observations, constraint=h)
    resolved = unknown.with_constraint(constraint)
    assert resolved.constraint == "unknown@7"
    np.testing.assert_array_equal(resolved.value(log.observations), shield.value(log.observations))


def test_another_source_drops_the_record_and_the_same_name_keeps_it(shield: Shield) -> None:
    env = gym.make("safeshield/Boat-v0")
    kept = shield.calibrate(env, epsilon=0.9, confidence=0.5, policy="random", deltas=[0.0])
    assert kept.record is not None
    assert kept.with_constraint(None).record is None
    assert kept.with_constraint("DoubleIntegrator@1").record is None
    assert kept.with_constraint("Boat@1").record == kept.record
    assert kept.with_constraint(constraint).record is None, "another function, another quantity"


def test_no_action_is_acceptable_where_h_is_not_known(shield: Shield, log: OfflineDataset) -> None:
    """NaN of the source is an unreadable observation: V_h is infinite and the fallback acts."""

    def partly(observations: np.ndarray) -> np.ndarray:
        return np.where(observations[:, 1] > 0.0, np.nan, -10.0)

    blind = shield.with_constraint(partly).with_delta(0.0)
    seen = log.observations[::30]
    dark = seen[:, 1] > 0.0
    assert dark.any()
    assert not dark.all()
    values = blind.value(seen)
    assert np.isinf(values[dark]).all()
    assert np.isfinite(values[~dark]).all()
    executed, report = blind.filter(seen, log.actions[::30])
    assert report.intervened[dark].all()
    assert not report.acceptable[dark].any()
    assert not report.valid[dark].any()
    assert report.valid[~dark].all()
    assert np.isfinite(executed).all()
    at = int(dark.argmax())
    __, told = blind.filter(seen[at], log.actions[at])
    assert told.intervened
    assert not told.valid
    env = gym.make("safeshield/Boat-v0")
    shielded = SafetyShield(env, blind)
    start = np.array([-2.0, 1.0], np.float32)
    _, info = shielded.reset(seed=0, options={"state": start})
    assert info["shield/value"] == np.inf
    assert not info["shield/certified"]
    _, _, _, _, info = shielded.step(env.action_space.sample())
    assert info["shield/intervened"]


@pytest.mark.parametrize("shape", [(1,), (2, 3), ()])
def test_a_source_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one number for each of 3 observations"):
        ConstraintSource("x@1", lambda _: np.zeros(shape))(np.zeros((3, 2)))


def test_labels_by_function_are_checked_against_the_costs(log: OfflineDataset) -> None:
    binary = OfflineDataset.from_arrays(
        observations=log.observations,
        actions=log.actions,
        rewards=log.rewards,
        next_observations=log.next_observations,
        terminated=log.terminated,
        truncated=log.truncated,
        costs=log.costs,
        observation_space=log.observation_space,
        action_space=log.action_space,
    )
    labelled = binary.with_constraint("Boat@1")
    np.testing.assert_allclose(labelled.next_constraints, log.next_constraints, atol=1e-6)
    assert labelled.constraint_source == "Boat@1"
    first = int((log.costs == 0).argmax())
    with pytest.raises(ValueError, match=rf"contradicts.*of {len(log)}.*row {first}.*sign"):
        binary.with_constraint(lambda obs: -constraint(obs), name="turned@1")
    with pytest.raises(ValueError, match=r"must be finite.*nan.*constraints\[0\]"):
        binary.with_constraint(lambda obs: np.full(len(obs), np.nan))
    with pytest.raises(LookupError, match="'nothing@1' is not registered"):
        binary.with_constraint("nothing@1")


def test_a_name_is_one_function() -> None:
    register_constraint("test-speed@1")(too_fast)
    with pytest.raises(ValueError, match="registered for another function"):
        register_constraint("test-speed@1")(constraint)
    assert as_constraint(too_fast) == find_constraint("test-speed@1")
    with pytest.raises(TypeError, match=r"@register_constraint\('speed@1'\)"):
        register_constraint(too_fast)  # type: ignore[arg-type]
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match="constraint's name"):
            ConstraintSource(name)


def test_a_registered_name_goes_from_the_wrapper_through_log_and_agent_to_the_shield(
    tmp_path: Path,
) -> None:
    """The ten lines for an environment of one's own, with the same h in every place."""
    env = ConstraintFromFunction(gym.make("Pendulum-v1"), "test-speed@1")
    log = collect(env, "random", episodes=8, seed=0)
    assert log.constraint_source == "test-speed@1"
    agent = SafeFQL(
        SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,), student_hidden=(16,))
    ).fit(log, steps=30)
    agent.save(tmp_path / "agent.safetensors")
    shield = load_agent(tmp_path / "agent.safetensors").shield()
    assert shield.constraint == "test-speed@1"
    assert (shield.value(log.observations) >= too_fast(log.observations).astype("f4")).all()
    shielded = SafetyShield(env, shield.with_delta(0.1))
    observation, info = shielded.reset(seed=1)
    assert info["shield/value"] >= too_fast(observation[None])[0].astype("f4")
    with pytest.raises(ValueError, match="'no-such@1' is not registered"):
        ConstraintFromFunction(gym.make("Pendulum-v1"), "no-such@1")


def test_the_gate_of_an_agent_uses_the_same_h(log: OfflineDataset) -> None:
    """An agent whose source says that all is safe never leaves its first sample."""
    config = SafeFQLConfig(
        critic_hidden=(16,), flow_hidden=(16,), student_hidden=(16,), candidates=4
    )
    agent = SafeFQL(config).fit(log, steps=40)
    seen = log.observations[:200]
    model = agent._fitted()
    first = model.scaling.to_box(
        agent._draw(
            model,
            agent._arrays,
            model.scaling.observations(seen),
            np.zeros((200, 2), np.float32),
        )
    )

    def chosen(level: float) -> np.ndarray:
        agent._model = type(model)(
            *model.interface[:3],
            ConstraintSource("level@1", lambda obs: np.full(len(obs), level)),
            model.networks,
            model.critics,
        )
        agent._safety_model = None
        return agent.predict(seen, deterministic=True)[0]

    np.testing.assert_array_equal(chosen(-100.0), first)
    assert (chosen(100.0) != first).any()


def test_the_benchmark_tasks_name_their_functions() -> None:
    """Sources are registered for exactly the tasks whose observation determines the cost."""
    assert {"PointGoal1", "PointCircle1", "BallRun", "DroneCircle"} <= set(SOURCES)
    assert not {"HopperVelocity", "PointGoal2", "easysparse", "HumanoidVelocity"} & set(SOURCES)
    for name, source in SOURCES.items():
        found = LOG_LABELS[name]
        assert found is not None
        seen = np.abs(np.random.default_rng(0).random((7, found.width)))
        np.testing.assert_array_equal(find_constraint(source)(seen), found.of_state(seen))


def test_label_names_the_source_only_where_it_agrees_with_every_cost() -> None:
    width = LOG_LABELS["BallRun"].width  # type: ignore[union-attr]
    observations = np.zeros((4, width), np.float32)
    observations[:, 1] = [0.0, 0.1, 0.15, 0.19]
    after = observations.copy()
    after[:, 1] = [0.1, 0.15, 0.19, 0.21]
    arrays = {
        "observations": observations,
        "actions": np.zeros((4, 2), np.float32),
        "rewards": np.zeros(4),
        "next_observations": after,
        "terminated": np.zeros(4, bool),
        "truncated": np.array([0, 0, 0, 1], bool),
    }
    exact = OfflineDataset.from_arrays(**arrays, costs=[0, 0, 0, 1])
    assert label(exact, "BallRun").constraint_source == "BallRun@1"
    wrong = OfflineDataset.from_arrays(**arrays, costs=[0, 1, 0, 1])
    assert label(wrong, "BallRun", max_disagreement=1.0).constraint_source is None
    told = label(exact, "BallRun")
    unnamed = OfflineDataset.from_arrays(
        **arrays,
        costs=[0, 0, 0, 1],
        constraints=told.constraints,
        next_constraints=told.next_constraints,
    )
    assert label(unnamed, "BallRun").constraint_source == "BallRun@1"
    assert safeshield.suites.find_task("BallRun").name == "BallRun"


def test_calibration_refuses_an_environment_that_contradicts_the_source(shield: Shield) -> None:
    class Shifted(gym.Wrapper):  # type: ignore[type-arg]
        def step(self, action: np.ndarray) -> tuple:  # type: ignore[type-arg]
            *rest, info = self.env.step(action)
            return *rest, {**info, "constraint": info["constraint"] + 0.1}

    env = Shifted(gym.make("safeshield/Boat-v0", max_episode_steps=5))
    with pytest.raises(ValueError, match="source 'Boat@1' gives"):
        shield.calibrate(env, epsilon=0.9, confidence=0.5, policy="random", deltas=[0.0])


def test_an_episode_that_violates_is_certified_no_more(shield: Shield) -> None:
    env = gym.make("safeshield/Boat-v0")
    vouched = shield.calibrate(env, epsilon=0.9, confidence=0.5, policy="random", deltas=[0.0])
    shielded = SafetyShield(env, vouched)
    _, info = shielded.reset(seed=0, options={"state": [1.9, 0.0]})
    assert info["shield/certified"]
    env.unwrapped._state = np.array([-0.5, 0.5])  # type: ignore[attr-defined]
    _, _, _, _, info = shielded.step(np.zeros(2, np.float32))
    assert info["cost"] == 1.0
    assert not info["shield/certified"]
    _, info = shielded.reset(seed=0, options={"state": [1.9, 0.0]})
    assert info["shield/certified"]
