"""Masks of discrete actions: they say what the filter does, in every kind of environment."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor
from tables import table_shield

from safeshield.algorithms.safefql import SafeFQL
from safeshield.shield import Shield
from safeshield.shield.masks import product_mask
from safeshield.shield.runtime import ShieldRuntime
from safeshield.wrappers import SafetyShield, VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield, worker_env

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
Array = npt.NDArray[Any]
N, C = 6, 5

# Q_h of states 0..5: from "all may pass" over "three may" to "none may, the third is least bad".
table = np.array(
    [
        [-3.0, -1.0, -2.0, -0.5, -9.0],
        [-3.0, 1.0, -2.0, 2.0, -0.5],
        [0.5, -1.0, 3.0, 0.1, 9.0],
        [5.0, 4.0, 3.0, 6.0, 7.0],
        [0.0, 1e-3, -1e-3, 1.0, 1.0],
        [1.0, -2.0, 1.0, -2.25, 1.0],
    ]
)
LEAST_BAD = {3: 2}


class Walk(gym.Env[Any, Any]):
    """Jumps to a random state at every step, notes the actions, and ends at random."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, actions: gym.Space[Any] | None = None, own: bool = False) -> None:
        self.observation_space = gym.spaces.Discrete(N)
        self.action_space = actions or gym.spaces.Discrete(C, start=1)
        self.own = own
        self.sent: list[tuple[int, Any]] = []

    def rooms(self) -> int:
        return N

    def _info(self) -> dict[str, Any]:
        # Its own rule: never the action whose index is the state's number.
        return {"action_mask": (np.arange(C) != self._at).astype(np.int8)} if self.own else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self._at = int(self.np_random.integers(N))
        return self._at, self._info()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.sent.append((self._at, np.array(action)))
        self._at = int(self.np_random.integers(N))
        reward = float(np.sum(action))
        return self._at, reward, bool(self.np_random.random() < 0.2), False, self._info()


@pytest.fixture
def shield() -> Shield:
    return table_shield(table, gym.spaces.Discrete(C, start=1))


def expected_mask(delta: float = 0.0) -> Array:
    mask = table <= -delta
    for state in range(N):
        if not mask[state].any():
            mask[state, table[state].argmin()] = True
    return mask


# -- the shield's mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 0.75, 2.5])
def test_the_mask_is_what_the_filter_lets_pass(shield: Shield, delta: float) -> None:
    shield = shield.with_delta(delta)
    states = np.arange(N)
    masks = shield.action_mask(states)
    np.testing.assert_array_equal(masks, expected_mask(delta))
    for state, action in itertools.product(range(N), range(1, C + 1)):
        executed, report = shield.filter(state, action)
        passes = masks[state, action - 1]
        assert passes == (executed == action), (state, action)
        assert report.intervened == (table[state, action - 1] > -delta)
        np.testing.assert_array_equal(shield.action_mask(state), masks[state])
    assert masks.dtype == np.bool_


def test_a_threshold_for_each_state(shield: Shield) -> None:
    limits = np.array([-2.5, 0.0, 0.6, 3.5, -5.0, 9.0], np.float64)
    masks = shield.action_mask(np.arange(N), limits)
    np.testing.assert_array_equal(masks[:4], (table <= limits[:, None])[:4])
    np.testing.assert_array_equal(masks[4], table[4] == table[4].min())  # nothing is below -5
    assert masks[5].all()
    np.testing.assert_array_equal(shield.action_mask(0, -2.5), table[0] <= -2.5)


def test_an_unreadable_observation_leaves_the_action_that_the_filter_executes(
    shield: Shield,
) -> None:
    for state in (99, -1):
        mask = shield.action_mask(state)
        assert mask.sum() == 1
        for action in range(1, C + 1):
            executed, report = shield.filter(state, action)
            assert mask[executed - 1]
            assert not report.valid


@given(
    q=arrays(np.float64, (4, 12), elements=st.integers(-3, 6).map(float)),
    delta=st.sampled_from([0.0, 0.5, 1.5]),
    sizes=st.sampled_from([(3, 4), (2, 6), (2, 3, 2), (12,)]),
)
@settings(max_examples=60)
def test_all_combinations_of_a_product_mask_are_what_the_filter_would_execute(
    q: Array, delta: float, sizes: tuple[int, ...]
) -> None:
    space = gym.spaces.MultiDiscrete(list(sizes))
    shield = table_shield(q, space).with_delta(delta)
    masks = shield.action_mask(np.arange(4))
    assert masks.shape == (4, sum(sizes))
    for state in range(4):
        entries = np.split(masks[state], np.cumsum(sizes)[:-1])
        grid = (q[state] <= -delta).reshape(sizes)
        chosen = np.ix_(*entries)
        if not grid.any():
            assert masks[state].sum() == len(sizes)
            assert q[state].reshape(sizes)[chosen].item() == q[state].min()
            continue
        assert all(entry.any() for entry in entries)
        assert grid[chosen].all()
        if grid.all():
            assert masks[state].all()
        # Nothing can be added to it.
        for i, entry in enumerate(entries):
            for value in np.flatnonzero(~entry):
                wider = [e.copy() for e in entries]
                wider[i][value] = True
                assert not grid[np.ix_(*wider)].all()
        # Gymnasium samples from it, and the filter lets all of that pass.
        space.seed(state)
        for _ in range(5):
            action = space.sample(tuple(entry.astype(np.int8) for entry in entries))
            executed, report = shield.filter(state, action)
            assert not report.intervened
            np.testing.assert_array_equal(executed, action)


def test_a_product_mask_begins_with_the_safest_action() -> None:
    accepted = np.array([[True, False], [False, True]])
    values = np.array([[-1.0, 5.0], [5.0, -2.0]])
    assert product_mask(accepted.ravel(), values.ravel(), (2, 2)).tolist() == [0, 1, 0, 1]


def test_multibinary_masks_are_laid_out_as_sb3_contrib_reads_them() -> None:
    # Two switches; both on is unsafe, and so is both off.
    shield = table_shield(np.array([[1.0, -1.0, -2.0, 1.0]] * 2), gym.spaces.MultiBinary(2))
    assert shield.action_mask(0).tolist() == [0, 1, 1, 0]  # first on, second off
    model = MaskablePPO(
        "MlpPolicy", SafetyShield(Small(gym.spaces.MultiBinary(2)), shield),
        n_steps=16, batch_size=16, n_epochs=1, device="cpu", policy_kwargs={"net_arch": [8]},
    )  # fmt: skip
    for _ in range(20):
        action, _ = model.predict(np.array(0), action_masks=shield.action_mask(0))
        assert action.tolist() == [1, 0]


def test_a_box_has_no_mask(stored_agent: SafeFQL) -> None:
    shield = stored_agent.shield()
    with pytest.raises(TypeError, match=r"a mask needs discrete actions.*SafeSupportPolicy"):
        shield.action_mask(np.zeros(2, np.float32))
    env = SafetyShield(gym.make("safeshield/Boat-v0"), shield)
    _, info = env.reset(seed=0)
    *_, later = env.step(env.action_space.sample())
    assert "action_mask" not in info
    assert "action_mask" not in later
    with pytest.raises(TypeError, match="a mask needs discrete actions"):
        env.action_masks()
    envs = VecSafetyShield(DummyVecEnv([lambda: gym.make("safeshield/Boat-v0")]), shield)
    envs.reset()
    assert not envs.has_attr("action_masks")
    assert "action_mask" not in envs.step(np.zeros((1, 2), np.float32))[3][0]


def test_a_runtime_forgets_what_it_observed_where_observing_fails(shield: Shield) -> None:
    for wrong in (np.arange(N - 1), np.zeros((N, 2))):  # another number; no states
        runtime = ShieldRuntime(shield, N, adaptive={"window": 10})
        runtime.observe(np.arange(N), [{}] * N)
        with pytest.raises(ValueError, match=r"num_envs is 6|numbers of shape"):
            runtime.observe(wrong, [{}] * N)
        assert not runtime.ready
        for call in (lambda r=runtime: r.masks, lambda r=runtime: r.filter(np.ones(N, int))):
            with pytest.raises(RuntimeError, match="observe"):
                call()
        runtime.observe(np.arange(N), [{}] * N)
        assert runtime.masks.shape == (N, 5)


def test_the_runtime_masks_at_its_own_threshold(shield: Shield) -> None:
    runtime = ShieldRuntime(shield.with_delta(0.75), N)
    with pytest.raises(RuntimeError, match="observe"):
        _ = runtime.masks
    runtime.observe(np.arange(N), [{}] * N)
    np.testing.assert_array_equal(runtime.masks, expected_mask(0.75))


# -- single environments -------------------------------------------------------------------------


class Takes(Walk):
    """Notes the action as it came."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.came = action
        return super().step(action)


@pytest.mark.parametrize(
    "action", [4, np.int64(4), np.int32(4), np.uint8(4), 4.0, np.array(4), np.array(4.0, "f4")]
)
def test_a_discrete_action_arrives_as_a_scalar_of_the_space(action: Any) -> None:  # noqa: ANN401
    inner = Takes()
    env = SafetyShield(inner, table_shield(np.full((N, C), -1.0), inner.action_space))
    env.reset(seed=0)
    info = env.step(action)[4]
    assert type(inner.came) is (int if type(action) is int else np.int64)
    assert inner.came == 4
    assert inner.came in env.action_space
    assert not info["shield/intervened"]
    assert info["action_proposed"] == info["action_executed"] == 4


@pytest.mark.parametrize(
    "action",
    [1.5, np.nan, -np.inf, 0, 6, 2.0**63, np.uint64(2**63), np.uint64(2**64 - 1), np.uint8(255)],
)
def test_what_is_no_action_of_the_space_is_replaced_and_never_wraps_around(
    action: Any,  # noqa: ANN401
) -> None:
    inner = Takes()
    shield = table_shield(np.full((N, C), -1.0), inner.action_space)
    env = SafetyShield(inner, shield)
    envs = VectorSafetyShield(gym.vector.SyncVectorEnv([Takes, Takes]), shield)
    venv = VecSafetyShield(DummyVecEnv([Takes, Takes]), shield)
    env.reset(seed=0)
    envs.reset(seed=0)
    venv.reset()
    assert env.step(action)[4]["shield/intervened"]
    assert inner.came in env.action_space
    both = np.array([action, action])
    assert envs.step(both)[4]["shield/intervened"].all()
    assert all(info["shield/intervened"] for info in venv.step(both)[3])
    for came in (*envs.env.get_attr("came"), *venv.get_attr("came")):  # type: ignore[attr-defined]
        assert came in env.action_space


class Drops(gym.Wrapper):  # type: ignore[type-arg]
    """Moves, and then fails, or tells a mask of another shape."""

    how = ""

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._result(self.env.reset(**kwargs))

    def step(self, action: Any) -> Any:  # noqa: ANN401
        return self._result(self.env.step(action))

    def _result(self, result: Any) -> Any:  # noqa: ANN401
        if self.how == "raises":
            raise OSError("the connection was lost")
        return (*result[:-1], {"action_mask": np.ones(3)}) if self.how == "mask" else result


@pytest.mark.parametrize("how", ["raises", "mask"])
def test_there_is_no_mask_after_a_failure(shield: Shield, how: str) -> None:
    inner = Drops(Walk())
    env = SafetyShield(inner, shield)
    for fail in (lambda: env.step(2), lambda: env.reset(seed=1)):
        env.reset(seed=0)
        env.action_masks()
        inner.how = how
        with pytest.raises((OSError, ValueError), match=r"connection|own action mask"):
            fail()
        inner.how = ""
        with pytest.raises(
            gym.error.ResetNeeded, match="no mask after a step or reset that failed"
        ):
            env.action_masks()
        with pytest.raises(gym.error.ResetNeeded, match="cannot step after a step or reset that"):
            env.step(2)


@pytest.mark.parametrize("how", ["raises", "mask"])
def test_nor_behind_many_environments(shield: Shield, how: str) -> None:
    inner = [Drops(Walk()), Drops(Walk())]
    few = np.full(2, 2)

    def fails(*calls: Any) -> None:  # noqa: ANN401
        envs = calls[0]
        for fail in (lambda: envs.step(few), envs.reset):
            envs.reset()
            for env in inner:
                env.how = how
            with pytest.raises((OSError, ValueError), match=r"connection|own action mask|shape"):
                fail()
            for env in inner:
                env.how = ""
            for call in calls[1:]:
                with pytest.raises((RuntimeError, gym.error.ResetNeeded), match="reset"):
                    call()

    makers = [lambda env=env: env for env in inner]
    envs = VecSafetyShield(DummyVecEnv(makers), shield)
    fails(envs, lambda: envs.step(few), lambda: envs.env_method("action_masks"))
    vector = VectorSafetyShield(gym.vector.SyncVectorEnv(makers), shield)
    fails(vector, lambda: vector.step(few), lambda: vector.state_values)


def test_every_info_and_the_method_tell_of_the_state_just_reached(shield: Shield) -> None:
    env = SafetyShield(Walk(), shield)
    with pytest.raises(gym.error.ResetNeeded, match="mask"):
        env.action_masks()
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    masks = expected_mask()
    for _ in range(60):
        assert info["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(info["action_mask"], masks[observation])
        np.testing.assert_array_equal(env.action_masks(), masks[observation])
        assert env.action_masks().dtype == np.bool_
        before = observation
        action = env.action_space.sample(info["action_mask"])
        observation, _, _, _, info = env.step(action)
        assert info["action_executed"] == action
        assert info["shield/intervened"] == (before in LEAST_BAD)
    env.action_masks()[:] = False
    info["action_mask"][:] = 0
    np.testing.assert_array_equal(env.action_masks(), masks[observation])


@pytest.mark.parametrize("kind", ["discrete", "multi"])
def test_check_env(kind: str, shield: Shield) -> None:
    space = gym.spaces.Discrete(C, start=1) if kind == "discrete" else None
    if space is None:
        space = gym.spaces.MultiDiscrete([2, 2])
        shield = table_shield(table[:, :4], space)
    check_env(SafetyShield(Walk(space), shield), skip_render_check=True)


class Ruled(gym.Wrapper):  # type: ignore[type-arg]
    """An environment that sb3-contrib can ask for its own rule already: no action of even index."""

    def action_masks(self) -> Array:
        return np.arange(C) % 2 == 1


def test_what_the_environment_forbids_stays_forbidden_as_long_as_something_is_left(
    shield: Shield,
) -> None:
    by_info = SafetyShield(Walk(own=True), shield)
    by_method = SafetyShield(Monitor(Ruled(Walk())), shield)
    lonely = 0
    for seed in range(12):
        for env, rule in (
            (by_info, lambda state: np.arange(C) != state),
            (by_method, lambda state: np.arange(C) % 2 == 1),
        ):
            state, info = env.reset(seed=seed)
            safe = expected_mask()[state]
            both = safe & rule(state)
            lonely += not both.any()
            expected = both if both.any() else safe
            np.testing.assert_array_equal(env.action_masks(), expected)
            if env is by_info:
                np.testing.assert_array_equal(info["action_mask"], expected)
    assert lonely > 0
    wrong = Walk(own=True)
    wrong._info = lambda: {"action_mask": np.ones(3)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"own action mask.*\(5,\), got \(3,\)"):
        SafetyShield(wrong, shield).reset()


def test_an_entry_without_a_value_of_its_own_left_gets_the_shields_back() -> None:
    space = gym.spaces.MultiDiscrete([2, 2])
    shield = table_shield(np.array([[-1.0, -1.0, 1.0, 1.0]] * N), space)  # first entry 0
    env = Walk(space)
    for own, expected in (
        ((np.array([1, 1]), np.array([0, 1])), [1, 0, 0, 1]),
        ((np.array([0, 1]), np.array([0, 1])), [1, 0, 1, 1]),
    ):
        env._info = lambda own=own: {"action_mask": own}  # type: ignore[method-assign]
        _, info = SafetyShield(env, shield).reset(seed=0)
        assert info["action_mask"].tolist() == expected


# -- vectors of environments ---------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_a_vector_of_environments_has_the_masks_of_its_next_actions(
    shield: Shield, own: bool
) -> None:
    inner = gym.vector.SyncVectorEnv([lambda: Walk(own=own)] * 3)
    envs = VectorSafetyShield(inner, shield)
    observations, infos = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(60):
        masks = infos["action_mask"]
        assert masks.dtype == np.int8
        assert infos["_action_mask"].all()
        expected = expected_mask()[observations]
        if own:
            both = expected & (np.arange(C) != observations[:, None])
            expected = np.where(both.any(1, keepdims=True), both, expected)
        np.testing.assert_array_equal(masks, expected)
        actions = np.array([rng.choice(np.flatnonzero(mask)) + 1 for mask in masks])
        observations, _, terminated, _, infos = envs.step(actions)
        ends += terminated.sum()
        ran = infos["action_executed"]
        assert ((ran == actions) | (ran == 0)).all()
    assert ends > 5


@pytest.mark.parametrize("own", [False, True])
def test_where_an_episode_ended_final_info_has_the_mask_of_its_last_state(
    shield: Shield, own: bool
) -> None:
    kinds: dict[str, Any] = {}
    if hasattr(gym.vector, "AutoresetMode"):
        kinds["autoreset_mode"] = gym.vector.AutoresetMode.SAME_STEP
    outside = VectorSafetyShield(
        gym.vector.SyncVectorEnv([lambda: Walk(own=own)] * 3, **kinds), shield
    )
    inside = gym.vector.SyncVectorEnv([lambda: SafetyShield(Walk(own=own), shield)] * 3, **kinds)
    for env in (outside, inside):
        env.reset(seed=0)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(40):
        actions = rng.integers(1, C + 1, 3)
        _, _, terminated, _, mine = outside.step(actions)
        theirs = inside.step(actions)[4]
        for key in ("action_mask", "action_executed", "shield/intervened", "shield/certified"):
            # Gymnasium 0.29 leaves arrays in an array of objects.
            np.testing.assert_array_equal(*(np.stack(list(x[key])) for x in (mine, theirs)))
            for i in np.flatnonzero(terminated):
                ends += 1
                finals = [
                    infos["final_info"][i][key]
                    if isinstance(infos["final_info"], np.ndarray)
                    else infos["final_info"][key][i]
                    for infos in (mine, theirs)
                ]
                np.testing.assert_array_equal(*finals, err_msg=key)
    assert ends > 20


def masks_of(infos: list[dict[str, Any]]) -> Array:
    return np.stack([info["action_mask"] for info in infos])


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_sb3_contrib_finds_the_masks_of_both_kinds_of_wrapper(kind: Any, shield: Shield) -> None:  # noqa: ANN401
    around = VecMonitor(VecSafetyShield(kind([Walk] * 2), shield))
    inside = kind([worker_env(Walk, shield)] * 2)
    try:
        for envs in (around, inside):
            assert is_masking_supported(envs)
            envs.seed(1)
            observations = envs.reset()
            for _ in range(25):
                expected = expected_mask()[observations]
                np.testing.assert_array_equal(get_action_masks(envs), expected)
                np.testing.assert_array_equal(
                    envs.env_method("action_masks", indices=[1])[0], expected[1]
                )
                actions = expected.argmax(axis=1) + 1
                observations, _, dones, infos = envs.step(actions)
                if envs is around:
                    np.testing.assert_array_equal(masks_of(infos), expected_mask()[observations])
                    for i in np.flatnonzero(dones):
                        start = envs.venv.reset_infos[i]["action_mask"]  # type: ignore[attr-defined]
                        np.testing.assert_array_equal(start, infos[i]["action_mask"])
    finally:
        around.close()
        inside.close()


def test_no_masks_before_there_is_a_state(shield: Shield) -> None:
    envs = VecSafetyShield(DummyVecEnv([Walk] * 2), shield)
    with pytest.raises(RuntimeError, match="masks before reset"):
        get_action_masks(envs)
    envs.reset()
    for mask in envs.env_method("action_masks"):
        mask[:] = False  # what it returns is ours to write into
    assert get_action_masks(envs).any(axis=1).all()
    envs.step_async(np.array([1, 2]))
    with pytest.raises(RuntimeError, match="while a step is under way"):
        get_action_masks(envs)
    envs.step_wait()
    assert get_action_masks(envs).shape == (2, C)
    assert envs.env_method("rooms", indices=0) == [N]  # other methods are the environments' own


def test_what_environments_behind_a_vecenv_forbid_stays_forbidden(shield: Shield) -> None:
    for make, rule in (
        (lambda: Ruled(Walk()), lambda state: np.arange(C) % 2 == 1),
        (lambda: Walk(own=True), lambda state: np.arange(C) != state),
    ):
        envs = VecSafetyShield(DummyVecEnv([make] * 3), shield)
        envs.seed(0)
        observations = envs.reset()
        for _ in range(20):
            masks = get_action_masks(envs)
            for state, mask in zip(observations, masks, strict=True):
                safe = expected_mask()[state]
                both = safe & rule(state)
                np.testing.assert_array_equal(mask, both if both.any() else safe)
            observations, *_ = envs.step(masks.argmax(axis=1) + 1)


# -- learning ------------------------------------------------------------------------------------


class Small(gym.Env[Any, Any]):
    """Two states in turn; the reward is for what the shield forbids."""

    def __init__(self, actions: gym.Space[Any] | None = None) -> None:
        self.observation_space = gym.spaces.Discrete(2)
        self.action_space = actions or gym.spaces.MultiDiscrete([3, 2])
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self._steps = 0
        return 0, {}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self._steps += 1
        return self._steps % 2, float(np.sum(action)), self._steps == 10, False, {}


class Proposed(BaseCallback):
    """Notes which actions the agent sent, and whether the shield had to step in."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, bool, float]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            row = info["action_proposed"], info["shield/intervened"], info["shield/value"]
            self.rows.append(row)
        return True


@pytest.mark.parametrize("wrapped", ["single", "vec"])
@pytest.mark.parametrize("kind", ["discrete", "multi"])
def test_maskable_ppo_never_sends_a_masked_action(kind: str, wrapped: str) -> None:
    if kind == "discrete":
        shield = table_shield(np.array([[-1.0, -1.0, 1.0, 2.0], [1.0, 1.0, -1.0, 1.0]]))
        space: gym.Space[Any] = shield.action_space
    else:
        space = gym.spaces.MultiDiscrete([3, 2])
        joint = np.array([[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
        shield = table_shield(joint, space)
    env: Any = SafetyShield(Small(space), shield)
    if wrapped == "vec":
        env = VecSafetyShield(DummyVecEnv([lambda: Small(space)] * 2), shield)
    callback = Proposed()
    model = MaskablePPO(
        "MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu",
        learning_rate=1e-2, policy_kwargs={"net_arch": [16]},
    )  # fmt: skip
    model.learn(320, callback)
    assert len(callback.rows) == 320
    assert not any(intervened for _, intervened, _ in callback.rows)
    assert max(value for *_, value in callback.rows) <= 0
    assert len({np.asarray(action).tobytes() for action, *_ in callback.rows}) > 2


# -- what is no observation, and none at all ------------------------------------------------------


def test_a_fraction_is_no_discrete_state(shield: Shield) -> None:
    """It is not rounded: the fallback acts, and says that it could not read."""
    whole = shield.filter(3.0, 1)[1]
    assert whole.valid
    for broken in (3.4, 2.6, np.nan, 3 + 1e-6):
        _, report = shield.filter(broken, 1)
        assert report.intervened
        assert not report.valid
        assert report.state_value == np.inf
        assert shield.value(broken) == np.inf
    batch = shield.filter(np.array([3.0, 2.5]), np.array([1, 1]))[1]
    assert np.asarray(batch.valid).tolist() == [True, False]
    masks = shield.action_mask(np.array([3.0, 2.5]))
    np.testing.assert_array_equal(masks[0], shield.action_mask(3))
    assert masks[1].sum() == 1


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(4), gym.spaces.MultiDiscrete([2, 2]), gym.spaces.MultiBinary(2)]
)
def test_empty_batches(space: gym.Space[Any]) -> None:
    shield = table_shield(np.array([[1.0, -1.0, -2.0, 1.0]] * 3), space)
    none = np.zeros(0, np.int64)
    actions = np.zeros((0, *space.shape), np.int64)  # type: ignore[misc]
    assert shield.value(none).shape == shield.value(none, actions).shape == (0,)
    executed, report = shield.filter(none, actions)
    assert executed.shape == actions.shape
    assert np.shape(report.intervened) == (0,)
    assert shield.action_mask(none).shape == (0, 4)
