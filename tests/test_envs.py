"""The environments: dynamics, the Gymnasium contract, and vector against single ones."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshield.envs import (
    BoatEnv,
    BoatVectorEnv,
    DoubleIntegratorEnv,
    DoubleIntegratorVectorEnv,
    boat,
    double_integrator,
    register_envs,
)
from safeshield.envs.vector import BEFORE_1_0, autoreset_modes

IDS = ["safeshield/Boat-v0", "safeshield/DoubleIntegrator-v0"]
PAIRS = {
    "boat": (BoatEnv, BoatVectorEnv),
    "double_integrator": (DoubleIntegratorEnv, DoubleIntegratorVectorEnv),
}
MODULES = {"boat": boat, "double_integrator": double_integrator}
MODES = autoreset_modes()
VECTOR_MODE = "custom" if BEFORE_1_0 else "vector_entry_point"


def sync_envs(single: type, num_envs: int, steps: int, mode: str) -> gym.vector.SyncVectorEnv:
    def make() -> gym.Env:
        return gym.wrappers.TimeLimit(single(), steps)

    options = {} if len(MODES) == 1 else {"autoreset_mode": gym.vector.AutoresetMode(mode)}
    return gym.vector.SyncVectorEnv([make] * num_envs, **options)


def assert_same(one: Any, other: Any, where: str = "result") -> None:  # noqa: ANN401
    """Equal to the last bit, with the same types."""
    if isinstance(one, dict):
        assert isinstance(other, dict), where
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, np.ndarray) and one.dtype != object:
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        assert one.tobytes() == other.tobytes(), where
    elif isinstance(one, np.ndarray):
        assert other.dtype == object, where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert type(one) is type(other), where
        assert one == other, where


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_vector_env_equals_single_envs_step_by_step(name: str, mode: str) -> None:
    single, vector = PAIRS[name]
    one = sync_envs(single, 5, 7, mode)
    other = vector(5, max_episode_steps=7, autoreset_mode=mode)
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space
    rng = np.random.default_rng(0)
    assert_same(one.reset(seed=11), other.reset(seed=11))
    episodes_ended = 0
    for step in range(40):
        if step == 3:
            # Episodes that end at different times from here on.
            mask = np.array([True, False, True, False, False])
            if not BEFORE_1_0:
                assert_same(
                    one.reset(options={"reset_mask": mask}),
                    other.reset(options={"reset_mask": mask}),
                    "partial reset",
                )
        actions = rng.uniform(-1, 1, one.action_space.shape).astype(np.float32)
        actions[step % 5] = 0.0
        result = one.step(actions)
        assert_same(result, other.step(actions), f"step {step}")
        over = result[2] | result[3]
        episodes_ended += int(over.sum())
        if mode == "Disabled" and over.any():
            seeds = [step, None, None, step, None]
            assert_same(
                one.reset(seed=seeds, options={"reset_mask": over.copy()}),
                other.reset(seed=seeds, options={"reset_mask": over.copy()}),
                f"reset after step {step}",
            )
    assert episodes_ended >= 20
    assert_same(one.reset(), other.reset(), "reset without a seed")


@pytest.mark.parametrize("name", PAIRS)
def test_placed_states_agree_with_single_envs(name: str) -> None:
    single, vector = PAIRS[name]
    one, other = sync_envs(single, 3, 5, MODES[0]), vector(3, max_episode_steps=5)
    options = {"state": np.array([0.25, -0.5])}
    assert_same(one.reset(seed=1, options=options), other.reset(seed=1, options=options))
    np.testing.assert_array_equal(other.state, np.tile(options["state"], (3, 1)))
    # A placed start draws nothing, so the next random one is still the seed's first.
    assert_same(one.reset(), other.reset())
    states = np.array([[0.0, 0.1], [0.2, 0.3], [-0.4, 0.5]])
    other.reset(options={"state": states})
    np.testing.assert_array_equal(other.state, states)
    states[0] = 9.0
    assert other.state[0, 0] == 0.0


@pytest.mark.skipif("SameStep" not in MODES or BEFORE_1_0, reason="newer autoreset modes")
def test_reset_mask_places_only_the_masked() -> None:
    envs = BoatVectorEnv(3, autoreset_mode="Disabled")
    envs.reset(seed=0)
    before = envs.state
    mask = np.array([False, True, False])
    states = np.array([[np.nan, 0.0], [0.5, 0.5], [99.0, 0.0]])
    _, infos = envs.reset(options={"state": states, "reset_mask": mask})
    np.testing.assert_array_equal(envs.state[mask], states[mask])
    np.testing.assert_array_equal(envs.state[~mask], before[~mask])
    np.testing.assert_array_equal(infos["_cost"], mask)


@pytest.mark.skipif("Disabled" not in MODES, reason="newer autoreset modes")
def test_disabled_mode_refuses_to_step_past_the_end() -> None:
    envs = BoatVectorEnv(2, autoreset_mode="Disabled", max_episode_steps=1)
    envs.reset(seed=0)
    envs.step(np.ones((2, 2)))
    with pytest.raises(ResetNeeded, match=r"\[0, 1\] are over"):
        envs.step(np.ones((2, 2)))


@pytest.mark.skipif("NextStep" not in MODES, reason="newer autoreset modes")
def test_next_step_mode_ignores_the_action_that_resets() -> None:
    envs = BoatVectorEnv(2, max_episode_steps=1, autoreset_mode="NextStep")
    envs.reset(seed=0)
    envs.step(np.ones((2, 2)))
    _, rewards, _, truncated, _ = envs.step(np.full((2, 2), np.nan))
    assert not truncated.any()
    np.testing.assert_array_equal(rewards, [0.0, 0.0])


@pytest.mark.parametrize("env_id", IDS)
def test_registered_envs_pass_the_checker(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, disable_env_checker=True).unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_make_and_make_vec_end_after_the_same_steps(env_id: str) -> None:
    env = gym.make(env_id)
    envs = gym.make_vec(env_id, num_envs=2, vectorization_mode=VECTOR_MODE)
    assert envs.unwrapped.num_envs == 2
    env.reset(seed=0)
    envs.reset(seed=0)
    for step in range(1, 401):
        _, _, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        results = envs.step(np.zeros(envs.action_space.shape, np.float32))
        assert not terminated
        assert not results[2].any()
        assert (
            truncated
            == results[3].all()
            == results[3].any()
            == (step == env.spec.max_episode_steps)
        )
        if truncated:
            break
    assert truncated


@pytest.mark.skipif(BEFORE_1_0, reason="0.29 passes no arguments to a vector entry point")
def test_make_vec_passes_arguments_on() -> None:
    envs = gym.make_vec(IDS[0], num_envs=2, current=0.5, max_episode_steps=3)
    assert envs.unwrapped.max_episode_steps == 3
    assert envs.unwrapped.task.current == 0.5


def test_registering_twice_changes_nothing() -> None:
    before = {key: gym.spec(key) for key in IDS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
    assert all(gym.spec(key) is spec for key, spec in before.items())


def test_registration_is_light_and_survives_any_import_order() -> None:
    first = "gymnasium" if BEFORE_1_0 else "safeshield.envs, gymnasium"
    for imports in (first, "safeshield.envs, gymnasium", "gymnasium, safeshield.envs"):
        code = (
            f"import sys, {imports}\n"
            "assert 'safeshield.envs.boat' not in sys.modules\n"
            "env = gymnasium.make('safeshield/Boat-v0')\n"
            "env.reset(seed=0)\n"
            "env.step(env.action_space.sample())\n"
            "heavy = {'torch', 'scipy', 'matplotlib', 'pygame', 'h5py'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_environment_can_be_made_through_its_module() -> None:
    code = "import gymnasium; gymnasium.make('safeshield.envs:safeshield/Boat-v0').reset()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", PAIRS)
def test_same_seed_same_episode(name: str) -> None:
    single, _ = PAIRS[name]

    def episode(seed: int) -> list[bytes]:
        env = single()
        observations = [env.reset(seed=seed)[0]]
        env.action_space.seed(seed)
        observations += [env.step(env.action_space.sample())[0] for _ in range(20)]
        return [observation.tobytes() for observation in observations]

    assert episode(5) == episode(5)
    assert episode(5) != episode(6)


@pytest.mark.parametrize("name", PAIRS)
def test_vector_seeds_and_generators(name: str) -> None:
    _, vector = PAIRS[name]
    envs = vector(3)
    assert len(envs.np_random) == 3
    envs.reset(seed=[4, 5, 6])
    assert envs.np_random_seed == (4, 5, 6)
    first = envs.state
    envs.reset(seed=4)
    np.testing.assert_array_equal(envs.state, first)
    with pytest.raises(ValueError, match="3 of them, got 2"):
        envs.reset(seed=[1, 2])


@pytest.mark.parametrize("name", PAIRS)
def test_labels_belong_to_the_state_reached_and_the_reward_to_the_one_left(name: str) -> None:
    module = MODULES[name]
    single, vector = PAIRS[name]
    # One step from a violation, at full speed towards it.
    start = {"boat": [-0.905, 0.5], "double_integrator": [0.99, 2.0]}[name]
    env, envs = single(), vector(2)
    _, info = env.reset(options={"state": start})
    envs.reset(options={"state": start})
    assert info["cost"] == 0.0
    assert info["constraint"] == float(module.constraint(np.array(start))) < 0.0
    action = np.zeros(env.action_space.shape)
    action[0] = 1.0
    _, reward, terminated, truncated, info = env.step(action)
    assert info["cost"] == 1.0
    assert info["constraint"] == float(module.constraint(env.state)) > 0.0
    assert reward == float(module.reward(np.array(start)))
    assert (terminated, truncated) == (False, False)
    _, rewards, _, _, infos = envs.step(np.stack([action, action]))
    np.testing.assert_array_equal(infos["cost"], 1.0)
    np.testing.assert_array_equal(infos["constraint"], info["constraint"])
    np.testing.assert_array_equal(rewards, reward)


unit = st.floats(0.0, 1.0)
points = st.tuples(unit, unit)


@settings(max_examples=60)
@given(point=points, action=st.tuples(*[st.floats(-1e300, 1e300)] * 2))
def test_boat_follows_its_equations(point: tuple, action: tuple) -> None:
    low, high = boat.STATE_LOW, boat.STATE_HIGH
    x, y = state = low + np.array(point) * (high - low)
    length = np.hypot(np.longdouble(action[0]), np.longdouble(action[1]))
    u = np.array(action) / length if length > 0 else np.zeros(2)
    u = u.astype(np.float64)
    expected = np.clip([x + 0.005 * (u[0] + 2.0 - 0.5 * y**2), y + 0.005 * u[1]], [-3, -2], [2, 2])
    np.testing.assert_allclose(boat.next_state(state, np.array(action)), expected, atol=1e-12)
    distances = [np.hypot(x + 0.5, y - 0.5), np.hypot(x + 1.0, y + 1.2)]
    h = max(0.4 - distances[0], 0.5 - distances[1])
    np.testing.assert_allclose(boat.constraint(state), h, atol=1e-12)
    np.testing.assert_allclose(boat.reward(state), -np.hypot(x - 1.5, y), atol=1e-12)


@settings(max_examples=60)
@given(point=points, action=st.floats(-3, 3), dt=st.sampled_from([0.005, 0.02, 0.05]))
def test_cart_follows_fine_integration(point: tuple, action: float, dt: float) -> None:
    low, high = double_integrator.STATE_LOW, double_integrator.STATE_HIGH
    state = low + np.array(point) * (high - low)
    u = np.clip(action, -1, 1)
    # Two half steps of the exact flow are one whole step, before clipping.
    p, v = state
    for _ in range(2):
        p, v = p + v * dt / 2 + u * dt**2 / 8, v + u * dt / 2
    expected = np.clip([p, v], low, high)
    reached = double_integrator.next_state(state, np.array([action]), dt=dt)
    np.testing.assert_allclose(reached, expected, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_functions_take_any_leading_axes(name: str) -> None:
    module = MODULES[name]
    single, _ = PAIRS[name]
    size = single().action_space.shape[0]
    rng = np.random.default_rng(1)
    states = rng.uniform(module.STATE_LOW, module.STATE_HIGH, (3, 4, 2))
    actions = rng.uniform(-1, 1, (3, 4, size))
    together = module.next_state(states, actions)
    alone = [[module.next_state(states[i, j], actions[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_array_equal(together, alone)
    assert module.constraint(states).shape == module.reward(states).shape == (3, 4)
    assert isinstance(module.constraint(states[0, 0]), np.ndarray)


def test_boat_ignores_the_length_of_an_action() -> None:
    state = np.array([0.3, -0.4])
    directions = np.array([[1e-300, -2e-300], [0.1, -0.2], [1e200, -2e200]])
    reached = boat.next_state(np.tile(state, (3, 1)), directions)
    np.testing.assert_allclose(reached, np.tile(reached[1], (3, 1)), rtol=1e-14)
    env = BoatEnv()
    env.reset(options={"state": state})
    env.step(np.array([0.1, -0.2]))
    turned = env.state
    env.reset(options={"state": state})
    env.step(np.array([3.0, -6.0]))
    np.testing.assert_allclose(env.state, turned, rtol=1e-14)


def test_current_and_step_are_parameters() -> None:
    env = BoatEnv(current=0.0, dt=0.5)
    env.reset(options={"state": [0.0, 0.0]})
    env.step(np.array([0.0, 1.0]))
    np.testing.assert_allclose(env.state, [0.0, 0.5])
    cart = DoubleIntegratorEnv(dt=0.02)
    cart.reset(options={"state": [0.0, 1.0]})
    cart.step(np.array([0.0]))
    np.testing.assert_allclose(cart.state, [0.02, 1.0])


@pytest.mark.parametrize("state", [[0.0], [0.0, 0.0, 0.0], [np.nan, 0.0], [0.0, 5.0], [[0.0, 0.0]]])
@pytest.mark.parametrize("name", PAIRS)
def test_bad_states_are_refused(name: str, state: list) -> None:
    single, vector = PAIRS[name]
    with pytest.raises(ValueError, match=r"options\['state'\] must"):
        single().reset(options={"state": state})
    with pytest.raises(ValueError, match=r"options\['state'\] must"):
        vector(2).reset(options={"state": state})


@pytest.mark.parametrize("name", PAIRS)
def test_bad_actions_are_refused(name: str) -> None:
    single, vector = PAIRS[name]
    env, envs = single(), vector(2)
    env.reset(seed=0)
    envs.reset(seed=0)
    before = envs.state
    size = env.action_space.shape[0]
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="action must be finite"):
            env.step(np.full(size, value))
        with pytest.raises(ValueError, match="action must be finite"):
            envs.step(np.full((2, size), value))
    with pytest.raises(ValueError, match="action must have shape"):
        env.step(np.zeros(size + 1))
    with pytest.raises(ValueError, match="action must have shape"):
        envs.step(np.zeros((3, size)))
    np.testing.assert_array_equal(envs.state, before)


@pytest.mark.parametrize("name", PAIRS)
def test_bad_constructor_arguments_are_refused(name: str) -> None:
    single, vector = PAIRS[name]
    with pytest.raises(ValueError, match="dt must be"):
        single(dt=0.0)
    with pytest.raises(ValueError, match="render_mode must be"):
        single(render_mode="human")
    with pytest.raises(ValueError, match="num_envs must be"):
        vector(0)
    with pytest.raises(ValueError, match="max_episode_steps must be"):
        vector(1, max_episode_steps=0)
    with pytest.raises(ValueError, match="autoreset_mode must be one of"):
        vector(1, autoreset_mode="Sometimes")
    with pytest.raises(ResetNeeded):
        single().step(np.zeros(1))
    with pytest.raises(ResetNeeded):
        vector(1).step(np.zeros((1, 1)))


@pytest.mark.parametrize("name", PAIRS)
def test_results_are_the_callers_own(name: str) -> None:
    _, vector = PAIRS[name]
    envs, twin = vector(2, max_episode_steps=3), vector(2, max_episode_steps=3)
    envs.reset(seed=0)
    twin.reset(seed=0)
    action = np.full(envs.action_space.shape, 0.5, np.float32)
    for _ in range(6):
        result = envs.step(action)
        expected = twin.step(action)
        assert_same(result, expected)
        for array in result[:4]:
            array[:] = 0
        for key in ("cost", "_cost", "constraint"):
            result[4][key][:] = 0
    np.testing.assert_array_equal(action, np.float32(0.5))


@pytest.mark.parametrize("name", PAIRS)
def test_pictures(name: str) -> None:
    single, vector = PAIRS[name]
    env, envs = single(render_mode="rgb_array"), vector(2, render_mode="rgb_array")
    env.reset(options={"state": [-0.4, 0.1]})
    envs.reset(options={"state": [-0.4, 0.1]})
    first = env.render()
    assert first.dtype == np.uint8
    assert first.ndim == 3
    assert first.shape[2] == 3
    action = np.ones(env.action_space.shape)
    for _ in range(30):
        env.step(action)
        envs.step(np.stack([action, action]))
    picture = env.render()
    assert (picture != first).any()
    for other in envs.render():
        np.testing.assert_array_equal(other, picture)
    with pytest.warns(UserWarning, match="render"):
        assert single().render() is None


@pytest.mark.parametrize("name", PAIRS)
def test_environments_survive_pickling(name: str) -> None:
    for env in (PAIRS[name][0](), PAIRS[name][1](2)):
        env.reset(seed=3)
        copy = pickle.loads(pickle.dumps(env))
        action = np.full(env.action_space.shape, 0.5, np.float32)
        assert_same(env.step(action), copy.step(action))
        assert_same(env.reset(), copy.reset())


@pytest.mark.skipif(not BEFORE_1_0, reason="0.29 steps vector environments in two calls")
def test_old_vector_wrappers_reach_the_environment() -> None:
    envs = gym.vector.VectorEnvWrapper(BoatVectorEnv(2, max_episode_steps=3))
    plain = BoatVectorEnv(2, max_episode_steps=3)
    assert_same(envs.reset(seed=1), plain.reset(seed=1))
    for _ in range(5):
        assert_same(envs.step(np.ones((2, 2))), plain.step(np.ones((2, 2))))
