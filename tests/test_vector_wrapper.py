"""`VectorSafetyShield` is a loop of single shields in every autoreset mode; what it refuses."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from fitted import DT
from hostile import hostile
from test_shield import record

from safeshield.envs.boat import BoatEnv
from safeshield.envs.vector import BEFORE_1_0, autoreset_modes
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import batch_policy
from safeshield.shield import Shield, UncalibratedShieldWarning
from safeshield.shield.runtime import ShieldRuntime
from safeshield.spaces.rows import SpaceCodec
from safeshield.wrappers import SafetyShield, vector
from safeshield.wrappers.vector import VectorSafetyShield

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
BOAT = "safeshield/Boat-v0"
KEYS = (
    "shield/intervened", "shield/value", "shield/threshold", "shield/certified", "shield/safe_set",
    "action_proposed", "action_executed",
)  # fmt: skip
FINAL = "final_observation" if BEFORE_1_0 else "final_obs"
MODES = autoreset_modes()
NEXT, SAME, DISABLED = "NextStep", "SameStep", "Disabled"
N = 4
UPSTREAM = [-1.3, 0.5]  # the last moment to turn away from a rock
ROCK, OPEN = [-0.5, 0.5], [1.9, 0.0]
Array = npt.NDArray[Any]
Env = gym.Env[Any, Any]
needs_modes = pytest.mark.skipif(len(MODES) < 3, reason="Gymnasium knows one mode")


class Watch(gym.Wrapper):
    """Notes what reaches the dynamics."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.sent: list[Array] = []

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.sent.append(np.array(action))
        return self.env.step(action)


class Sinks(gym.Wrapper):
    """Starts just before a rock, and terminates after a number of steps drawn at each reset."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        self.env.reset(seed=seed)
        rng = self.unwrapped.np_random
        self._left = int(rng.integers(1, 9))
        return self.env.reset(options={"state": [rng.uniform(-1.6, -1.0), 0.5]})

    def step(self, action: Any) -> Any:  # noqa: ANN401
        observation, reward, _, truncated, info = self.env.step(action)
        self._left -= 1
        return observation, reward, self._left == 0, truncated, info


def short_boat(index: int) -> Env:
    return gym.wrappers.TimeLimit(BoatEnv(dt=DT), 5 + 3 * index)


def sinking_boat(index: int) -> Env:
    return gym.wrappers.TimeLimit(Sinks(BoatEnv(dt=DT)), 7)


def each(make: Callable[[int], Env]) -> list[Callable[[], Env]]:
    return [partial(make, i) for i in range(N)]


def vectorised(
    makers: Sequence[Callable[[], Env]], mode: str, kind: type = gym.vector.SyncVectorEnv
) -> Any:  # noqa: ANN401
    given = {} if len(MODES) < 2 else {"autoreset_mode": gym.vector.AutoresetMode(mode)}
    return kind(makers, **given)


def boats(shield: Any, mode: str, count: int = N, **kwargs: Any) -> VectorSafetyShield:  # noqa: ANN401
    """Shielded native boats, all of which end after 10 steps."""
    return VectorSafetyShield(native(mode, count), shield, **kwargs)


def native(mode: str, count: int = N, limit: int = 10) -> Any:  # noqa: ANN401
    from safeshield.envs.boat import BoatVectorEnv

    return BoatVectorEnv(count, dt=DT, max_episode_steps=limit, autoreset_mode=mode)


def certain(shield: Shield) -> Shield:
    return replace(shield, record=record(0.05))


def reckless(rng: np.random.Generator, count: int = N) -> Array:
    """Random actions: some outside the box, some not numbers."""
    actions = rng.uniform(-1.3, 1.3, (count, 2)).astype(np.float32)
    actions[rng.random(count) < 0.1] = np.nan
    actions[rng.random(count) < 0.5] = [1.0, 0.0]
    return actions


def assert_rows(infos: Any, i: int, expected: dict[str, Any], keys: Sequence[str]) -> None:  # noqa: ANN401
    """The infos of all environments say of environment i what its own info does."""
    for key in keys:
        if isinstance(infos, np.ndarray):
            row = infos[i][key]
            assert type(row) is type(expected[key]), key
        else:
            assert infos[f"_{key}"][i], key
            row = infos[key][i]
        if np.asarray(expected[key]).dtype.kind == "f":
            assert_rounded(row, expected[key], key)
        else:
            np.testing.assert_array_equal(row, expected[key], err_msg=key)


def assert_rounded(actual: Any, expected: Any, message: str = "") -> None:  # noqa: ANN401
    """Equal but for rounding: one row in a product of matrices, and many, differ in it.

    What the shield puts in is such a product, and so all that the dynamics make of it.
    """
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0, err_msg=message)


class Loop:
    """Single wrappers, one after the other, and the autoreset that a vector environment does."""

    def __init__(self, makers: Sequence[Callable[[], Env]], shield: Shield, mode: str) -> None:
        self.watches = [Watch(make()) for make in makers]
        self.envs = [SafetyShield(watch, shield) for watch in self.watches]
        self.mode = mode
        self.over = np.zeros(len(makers), np.bool_)

    def reset(self, seed: int) -> list[tuple[Array, dict[str, Any]]]:
        return [env.reset(seed=seed + i) for i, env in enumerate(self.envs)]

    def step(self, i: int, action: Array) -> tuple[Any, tuple[Array, dict[str, Any]] | None]:
        """The step's result, and the start of another episode where one began."""
        if self.mode == NEXT and self.over[i]:
            observation, info = self.envs[i].reset()
            self.over[i] = False
            return (observation, 0.0, False, False, info), None
        result = self.envs[i].step(action)
        self.over[i] = result[2] or result[3]
        if self.mode == SAME and self.over[i]:
            return result, self.envs[i].reset()
        return result, None


# -- the theorem --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "make"), [("Sync", short_boat), ("Sync", sinking_boat), ("Async", sinking_boat)]
)
def test_it_equals_a_loop_of_single_wrappers(
    shield: Shield, mode: str, make: Callable[[int], Env], kind: str
) -> None:
    shield = certain(shield)
    inner = vectorised(
        each(lambda i: Watch(make(i))), mode, getattr(gym.vector, f"{kind}VectorEnv")
    )
    env = VectorSafetyShield(inner, shield)
    loop = Loop(each(make), shield, mode)

    starts = loop.reset(seed=7)
    observations, infos = env.reset(seed=7)
    for i, (observation, info) in enumerate(starts):
        assert_rounded(observations[i], observation)
        assert_rows(infos, i, info, list(info))
    rng = np.random.default_rng(0)
    ends = np.zeros(N, int)
    seen: list[tuple[bool, bool]] = []
    for _ in range(60):
        actions = reckless(rng)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        for i in range(N):
            one, start = loop.step(i, actions[i])
            assert (terminated[i], truncated[i]) == one[2:4]
            assert_rounded(rewards[i], one[1])
            own = [key for key in one[4] if key not in KEYS]
            assert_rows(infos, i, one[4] if start is None else start[1], KEYS)
            seen.append((one[4]["shield/intervened"], one[4]["shield/certified"]))
            ends[i] += loop.over[i]
            if start is None:
                assert_rounded(observations[i], one[0])
                assert_rows(infos, i, one[4], own)
                continue
            assert_rounded(observations[i], start[0])
            assert_rounded(infos[FINAL][i], one[0])
            assert infos[f"_{FINAL}"][i]
            assert infos["_final_info"][i]
            assert_rows(infos, i, start[1], own)
            assert_rows(infos["final_info"], i, one[4], [*own, *KEYS])
            assert env.state_values[i] == pytest.approx(start[1]["shield/value"], abs=1e-5)
        if mode == DISABLED and loop.over.any():
            options = {"reset_mask": loop.over.copy()}
            observations, infos = env.reset(options=options)
            for i in range(N):
                assert infos["_shield/value"][i] == loop.over[i]
                if loop.over[i]:
                    observation, info = loop.envs[i].reset()
                    assert_rounded(observations[i], observation)
                    assert_rows(infos, i, info, list(info))
            loop.over[:] = False
    assert (ends >= 3).all()
    assert {replaced for replaced, _ in seen} == {inside for _, inside in seen} == {True, False}
    if kind == "Sync":
        for watch, mine in zip(loop.watches, inner.envs, strict=True):
            assert_rounded(mine.sent, watch.sent)
    env.close()


@needs_modes
@pytest.mark.parametrize("mode", MODES)
def test_its_infos_are_those_of_a_vector_environment_of_single_wrappers(
    shield: Shield, mode: str
) -> None:
    fee = {"intervention_penalty": 0.5}
    outside = VectorSafetyShield(vectorised(each(sinking_boat), mode), shield, **fee)
    inside = vectorised(each(lambda i: SafetyShield(sinking_boat(i), shield, **fee)), mode)

    def assert_same(mine: dict[str, Any], theirs: dict[str, Any], rows: Array) -> None:
        assert set(mine) == set(theirs)
        for key, value in theirs.items():
            if key in ("final_obs", "final_info"):
                continue
            assert mine[key].dtype == value.dtype, key
            if f"_{key}" in theirs:
                rows = rows & theirs[f"_{key}"]
            np.testing.assert_allclose(mine[key][rows], value[rows], atol=1e-5, err_msg=key)

    everywhere, over = np.ones(N, np.bool_), np.zeros(N, np.bool_)
    assert_same(outside.reset(seed=1)[1], inside.reset(seed=1)[1], everywhere)
    rng = np.random.default_rng(1)
    for _ in range(30):
        if mode == DISABLED and over.any():
            mine, theirs = (
                env.reset(options={"reset_mask": over.copy()})[1] for env in (outside, inside)
            )
            assert_same(mine, theirs, over)
        actions = reckless(rng)
        _, _, terminated, truncated, mine = outside.step(actions)
        theirs = inside.step(actions)[4]
        over = terminated | truncated
        assert_same(mine, theirs, everywhere)
        if mode == SAME and over.any():
            assert_same(mine["final_info"], theirs["final_info"], over)


@pytest.mark.parametrize("mode", MODES)
def test_the_native_boat_equals_boats_in_a_row(shield: Shield, mode: str) -> None:
    limited = [lambda: gym.wrappers.TimeLimit(BoatEnv(dt=DT), 10)] * N
    one, other = boats(shield, mode), VectorSafetyShield(vectorised(limited, mode), shield)
    rng = np.random.default_rng(2)
    results = [env.reset(seed=3) for env in (one, other)]
    over = np.zeros(N, np.bool_)
    for _ in range(35):
        np.testing.assert_array_equal(results[0][0], results[1][0])
        for key in KEYS:
            np.testing.assert_array_equal(results[0][-1][key], results[1][-1][key])
        if mode == DISABLED and over.any():
            results = [env.reset(options={"reset_mask": over}) for env in (one, other)]
        else:
            actions = reckless(rng)
            results = [env.step(actions) for env in (one, other)]  # type: ignore[misc]
        over = np.any(results[0][2:4], axis=0) if len(results[0]) == 5 else np.zeros(N, np.bool_)


def test_make_vec(shield: Shield) -> None:
    given: dict[str, Any] = {"vectorization_mode": "vector_entry_point", "dt": DT}
    if BEFORE_1_0:
        given = {"vectorization_mode": "custom", "vector_kwargs": {"dt": DT}}
    bare = gym.make_vec(BOAT, num_envs=3, **given)
    env = VectorSafetyShield(bare, shield)
    assert env.num_envs == 3
    assert env.unwrapped is bare
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[4]["action_executed"].shape == (3, 2)


@pytest.mark.parametrize("mode", MODES)
def test_whole_episodes_are_those_of_single_shields(shield: Shield, mode: str) -> None:
    @batch_policy
    def ahead(observations: Array, rng: np.random.Generator) -> Array:
        return np.tile(np.array([1.0, 0.2], np.float32), (len(observations), 1))

    keys = ("shield/intervened", "shield/certified", "action_executed")
    runs = [
        run_episodes(env, ahead, episodes=6, seed=0, info_keys=keys)
        for env in (
            boats(shield, mode),
            SafetyShield(gym.wrappers.TimeLimit(BoatEnv(dt=DT), 10), shield),
        )
    ]
    for mine, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(mine.observations, theirs.observations)
        np.testing.assert_array_equal(mine.actions, theirs.actions)
        for key in keys:
            np.testing.assert_array_equal(mine.info[key], theirs.info[key])


# -- what it costs, and what it leaves alone ----------------------------------------------------


def test_one_pass_judges_all_environments(shield: Shield, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    observe = ShieldRuntime.observe

    def counted(self: ShieldRuntime, observations: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        passes.append(len(observations))
        return observe(self, observations, *args, **kwargs)

    monkeypatch.setattr(ShieldRuntime, "observe", counted)
    env = boats(shield, MODES[0], count=16)
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample())
    assert passes == [16] * 6


class Spy(vector.VectorWrapper):
    """Between the shield and the environment: keeps what goes each way, or breaks it."""

    def __init__(self, env: Any, change: Callable[..., Any] = lambda *_: None) -> None:  # noqa: ANN401
        super().__init__(env)
        self.sent: list[Any] = []
        self.change = change
        if BEFORE_1_0:
            for name in ("num_envs", "single_observation_space", "single_action_space"):
                setattr(self, name, getattr(env, name))
            self.action_space, self.observation_space = env.action_space, env.observation_space

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self.env.reset(**kwargs)

    def step(self, actions: Any) -> Any:  # noqa: ANN401
        self.sent.append(actions)
        result = self.env.step(actions)
        self.result = self.change(self, result) or result
        return self.result


def test_all_accepted_passes_bit_for_bit_and_rewards_and_ends_come_back_untouched(
    shield: Shield,
) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    assert env.single_action_space is spy.single_action_space
    assert env.action_space is spy.action_space
    assert env.observation_space is spy.observation_space
    env.reset(seed=0, options={"state": OPEN})
    for kind in ("f4", "f8"):
        actions = np.full((N, 2), [0.1, -0.3]).astype(kind)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        assert not infos["shield/intervened"].any()
        assert spy.sent[-1].dtype == np.float32
        assert spy.sent[-1].tobytes() == actions.astype(np.float32).tobytes()
        assert not np.shares_memory(spy.sent[-1], actions)
        for mine, theirs in zip(
            (observations, rewards, terminated, truncated), spy.result, strict=False
        ):
            assert mine is theirs
        assert not set(KEYS) & set(spy.result[4])
        np.testing.assert_array_equal(infos["action_proposed"], actions)
        np.testing.assert_array_equal(infos["action_executed"], actions.astype(np.float32))
        for key in ("action_proposed", "action_executed"):
            assert not np.shares_memory(infos[key], actions)


def test_what_was_judged_is_sent_however_the_actions_change_meanwhile(shield: Shield) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    still = np.zeros((N, 2), np.float32)
    for actions in hostile(still):
        env.reset(seed=0, options={"state": OPEN})
        infos = env.step(actions)[4]
        assert type(spy.sent[-1]) is np.ndarray
        assert spy.sent[-1].tobytes() == still.tobytes()
        assert not infos["shield/intervened"].any()
        for key in ("action_proposed", "action_executed"):
            assert type(infos[key]) is np.ndarray
            assert infos[key].tobytes() == still.tobytes()


def test_infos_say_what_was_sent_whatever_the_env_does_to_the_array(shield: Shield) -> None:
    def scribble(spy: Spy, result: Any) -> None:  # noqa: ANN401
        spy.sent[-1][:] = 7.0

    env = VectorSafetyShield(Spy(native(MODES[0]), scribble), shield)
    env.reset(seed=0, options={"state": OPEN})
    actions = np.full((N, 2), 0.25, np.float32)
    infos = env.step(actions)[4]
    np.testing.assert_array_equal(actions, np.full((N, 2), 0.25))
    for key in ("action_proposed", "action_executed"):
        np.testing.assert_array_equal(infos[key], np.full((N, 2), 0.25))


def test_in_a_batch_only_what_is_refused_is_replaced(shield: Shield) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    env.reset(seed=0, options={"state": np.array([OPEN, UPSTREAM, OPEN, UPSTREAM])})
    actions = np.tile(np.array([1.0, 0.0], np.float32), (N, 1))
    infos = env.step(actions)[4]
    np.testing.assert_array_equal(infos["shield/intervened"], [False, True, False, True])
    np.testing.assert_array_equal(spy.sent[-1][::2], actions[::2])
    np.testing.assert_array_equal(actions, np.tile([1.0, 0.0], (N, 1)))
    np.testing.assert_array_equal(infos["action_executed"], spy.sent[-1])
    assert (infos["shield/value"] <= -0.05).all()


def test_actions_that_are_not_numbers_are_replaced_and_flagged(shield: Shield) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    env.reset(seed=0, options={"state": OPEN})
    actions = np.array([[np.nan, 0], [np.inf, 0], [1e30, 0], [0.1, 0]], np.float32)
    infos = env.step(actions)[4]
    np.testing.assert_array_equal(infos["shield/intervened"], [True, True, True, False])
    np.testing.assert_array_equal(infos["action_proposed"], actions)
    assert all(action in env.single_action_space for action in spy.sent[-1])


@needs_modes
def test_an_ignored_action_is_no_intervention_and_yet_nothing_unchecked_is_sent(
    shield: Shield,
) -> None:
    spy = Spy(native(NEXT))
    env = VectorSafetyShield(spy, shield, intervention_penalty=3.0)
    env.reset(seed=0)
    broken = np.full((N, 2), np.nan, np.float32)
    for _ in range(10):
        _, rewards, _, truncated, infos = env.step(broken)
        assert infos["shield/intervened"].all()
        assert (rewards == spy.result[1] - 3.0).all()
    assert truncated.all()
    observations, rewards, _, _, infos = env.step(broken)
    assert not infos["shield/intervened"].any()
    assert (rewards == 0).all()
    assert np.isnan(infos["action_proposed"]).all()
    assert np.isnan(infos["action_executed"]).all()
    np.testing.assert_allclose(infos["shield/value"], shield.value(observations), atol=1e-6)
    assert np.isfinite(spy.sent).all()
    assert env.step(broken)[4]["shield/intervened"].all()


def test_a_penalty_makes_a_new_array_and_spares_what_was_accepted(shield: Shield) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield, intervention_penalty=0.25)
    env.reset(seed=0, options={"state": OPEN})
    actions = np.array([[np.nan, 0], [0, 0], [np.nan, 0], [0, 0]], np.float32)
    rewards = env.step(actions)[1]
    own = spy.result[1]
    assert rewards is not own
    assert rewards.dtype == own.dtype
    np.testing.assert_array_equal(rewards, own - [0.25, 0, 0.25, 0])
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="intervention_penalty must"):
            boats(shield, MODES[0], intervention_penalty=wrong)


# -- what is certified --------------------------------------------------------------------------


def _teleport(spy: Spy, result: Any) -> Any:  # noqa: ANN401
    """Let row 0 end on a rock and begin in open water, row 1 the other way round."""
    observations, rewards, terminated, truncated, infos = result
    if not truncated.any():
        return None
    observations[:2] = OPEN, ROCK
    infos[FINAL][0], infos[FINAL][1] = np.array(ROCK, "f4"), np.array(OPEN, "f4")
    return observations, rewards, terminated, truncated, infos


def test_same_step_certifies_what_was_reached_and_judges_in_what_has_begun(
    shield: Shield,
) -> None:
    spy = Spy(native(SAME), _teleport)
    env = VectorSafetyShield(spy, certain(shield))
    env.reset(seed=0)
    actions = np.zeros((N, 2), np.float32)
    for _ in range(10):
        observations, _, _, truncated, infos = env.step(actions)
    assert truncated.all()
    # The new episode's start at the top, the last step in final_info.
    np.testing.assert_array_equal(infos["shield/safe_set"][:2], [True, False])
    assert np.isnan(infos["action_executed"]).all()
    final = infos["final_info"]
    finals = [one["shield/safe_set"] for one in final] if BEFORE_1_0 else final["shield/safe_set"]
    np.testing.assert_array_equal(finals[:2], [False, True])
    own = spy.result[4]["final_info"]
    assert set(own[0] if BEFORE_1_0 else own) & {"cost", *KEYS} == {"cost"}
    np.testing.assert_allclose(env.state_values, shield.value(observations), atol=1e-6)
    assert env.state_values[0] <= -0.05 < env.state_values[1]
    infos = env.step(actions)[4]
    np.testing.assert_array_equal(infos["shield/intervened"][:2], [False, True])


def test_final_observations_in_one_array(shield: Shield) -> None:
    def as_array(spy: Spy, result: Any) -> Any:  # noqa: ANN401
        *rest, infos = result
        if FINAL in infos:
            infos = {**infos, FINAL: np.stack(infos[FINAL])}
            del infos["final_info"], infos["_final_info"], infos[f"_{FINAL}"]
        return (*rest, infos)

    envs = [VectorSafetyShield(Spy(native(SAME), change), certain(shield))
            for change in (lambda *_: None, as_array)]  # fmt: skip
    for env in envs:
        env.reset(seed=0)
    for _ in range(10):
        one, other = (env.step(np.zeros((N, 2), np.float32))[4] for env in envs)
    for key in KEYS:
        np.testing.assert_array_equal(one[key], other[key])
        final = one["final_info"]
        final = [row[key] for row in final] if BEFORE_1_0 else final[key]
        np.testing.assert_array_equal(other["final_info"][key], final)


def test_certified_needs_a_record(shield: Shield) -> None:
    for given, inside in ((certain(shield), True), (shield.with_delta(0.05), False)):
        env = boats(given, MODES[0])
        _, infos = env.reset(seed=0, options={"state": np.array([OPEN, ROCK] * 2)})
        np.testing.assert_array_equal(infos["shield/certified"], [inside, False] * 2)
        infos = env.step(np.zeros((N, 2), np.float32))[4]
        np.testing.assert_array_equal(infos["shield/certified"], [inside, False] * 2)


def test_the_threshold_is_read_at_every_step_and_may_differ_between_environments(
    shield: Shield, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = np.linspace(-0.3, -0.1, N)
    monkeypatch.setattr(ShieldRuntime, "threshold", property(lambda _: now))
    env = boats(shield, MODES[0])
    np.testing.assert_array_equal(env.reset(seed=0)[1]["shield/threshold"], now)
    for _ in range(3):
        now = now - 0.1
        infos = env.step(np.zeros((N, 2), np.float32))[4]
        np.testing.assert_array_equal(infos["shield/threshold"], now)


# -- partial resets -----------------------------------------------------------------------------


@needs_modes
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_reset_keep_what_was_known(shield: Shield, mode: str) -> None:
    row = each(lambda _: gym.wrappers.TimeLimit(BoatEnv(dt=DT), 10))
    env = VectorSafetyShield(vectorised(row, mode), shield)
    env.reset(seed=0, options={"state": UPSTREAM})
    into = np.tile(np.array([1.0, 0.0], np.float32), (N, 1))
    env.step(into)
    before = env.state_values
    mask = np.array([True, False, False, True])
    options = {"reset_mask": mask, "state": OPEN}
    infos = env.reset(options=options)[1]
    assert set(options) == {"reset_mask", "state"}
    for key in KEYS:
        np.testing.assert_array_equal(infos[f"_{key}"], mask)
    np.testing.assert_array_equal(env.state_values[~mask], before[~mask])
    assert (env.state_values[mask] < before[mask]).all()
    for _ in range(3):
        infos = env.step(into)[4]
    np.testing.assert_array_equal(infos["shield/intervened"], ~mask)


def test_a_reset_that_takes_more_than_the_mask_is_refused(shield: Shield) -> None:
    class Deaf(Spy):
        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            return self.env.reset(seed=kwargs["seed"])

    env = VectorSafetyShield(Deaf(native(MODES[0])), shield)
    env.reset(seed=0)
    mask = np.array([True, False, True, True])
    with pytest.raises(ValueError, match=r"autoreset modes mixed up.*environments \[1\]"):
        env.reset(options={"reset_mask": mask})
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros((N, 2), np.float32))


@pytest.mark.parametrize("mask", [[True], np.ones(N), np.zeros(N, bool), np.ones((N, 1), bool)])
def test_masks_that_are_none(shield: Shield, mask: Any) -> None:  # noqa: ANN401
    env = boats(shield, MODES[0])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reset_mask'] must be 4 booleans"):
        env.reset(options={"reset_mask": mask})


# -- what can go wrong --------------------------------------------------------------------------


def _claims(mode: object) -> Callable[[Shield], VectorSafetyShield]:
    def build(shield: Shield) -> VectorSafetyShield:
        inner = native({"NextStep": SAME, "SameStep": NEXT, "Disabled": SAME}[str(mode)])
        inner.metadata["autoreset_mode"] = gym.vector.AutoresetMode(mode)
        return VectorSafetyShield(inner, shield)

    return build


@needs_modes
@pytest.mark.parametrize("mode", [NEXT, SAME, DISABLED])
def test_an_env_that_does_not_reset_as_it_claims(shield: Shield, mode: str) -> None:
    env = _claims(mode)(shield)
    env.reset(seed=0)
    for _ in range(9):
        env.step(np.zeros((N, 2), np.float32))
    with pytest.raises(ValueError, match=r"autoreset modes mixed up.*final_obs"):
        env.step(np.zeros((N, 2), np.float32))
    # Who knows what state it is in now.
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros((N, 2), np.float32))


@needs_modes
def test_an_episode_that_ends_while_it_should_begin(shield: Shield) -> None:
    def end(spy: Spy, result: Any) -> Any:  # noqa: ANN401
        return (*result[:2], np.ones(N, np.bool_), *result[3:])

    env = VectorSafetyShield(Spy(native(NEXT), end), shield)
    env.reset(seed=0)
    env.step(np.zeros((N, 2), np.float32))
    with pytest.raises(ValueError, match=r"autoreset modes mixed up.*no new episode"):
        env.step(np.zeros((N, 2), np.float32))


def test_without_final_observations_the_same_step_mode_is_refused(shield: Shield) -> None:
    def forget(spy: Spy, result: Any) -> Any:  # noqa: ANN401
        return (*result[:4], {})

    env = VectorSafetyShield(Spy(native(SAME), forget), shield)
    env.reset(seed=0)
    for _ in range(9):
        env.step(np.zeros((N, 2), np.float32))
    with pytest.raises(ValueError, match=f"autoreset modes mixed up.*{FINAL}"):
        env.step(np.zeros((N, 2), np.float32))


@needs_modes
@pytest.mark.parametrize("mode", [None, "sometimes"])
def test_an_env_that_does_not_say_how_it_resets(shield: Shield, mode: object) -> None:
    bare = native(NEXT)
    bare.metadata = {"autoreset_mode": mode} if mode else {}
    with pytest.raises(ValueError, match="autoreset_mode'] must be one of"):
        VectorSafetyShield(bare, shield)
    bare.metadata = {"autoreset_mode": "NextStep"}
    VectorSafetyShield(bare, shield)


@needs_modes
def test_disabled_wants_a_reset_after_the_end_and_goes_on_after_it(shield: Shield) -> None:
    spy = Spy(native(DISABLED))
    env = VectorSafetyShield(spy, shield)
    env.reset(seed=0)
    actions = np.zeros((N, 2), np.float32)
    for _ in range(10):
        _, _, _, truncated, _ = env.step(actions)
    with pytest.raises(gym.error.ResetNeeded, match=r"\[0, 1, 2, 3\] are over"):
        env.step(actions)
    assert len(spy.sent) == 10
    env.reset(options={"reset_mask": truncated})
    env.step(actions)


def test_before_the_first_reset(shield: Shield) -> None:
    env = boats(shield, MODES[0])
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros((N, 2), np.float32))
    with pytest.raises(gym.error.ResetNeeded):
        _ = env.state_values
    with pytest.raises(gym.error.ResetNeeded):
        env.reset(options={"reset_mask": np.arange(N) == 0})


@pytest.mark.parametrize(
    "actions",
    [0.0, np.zeros(2), np.zeros((1, 2)), np.zeros((N + 1, 2)), np.zeros((N, 3)), [["a", "b"]] * N],
)
def test_actions_of_another_number_shape_or_kind(shield: Shield, actions: Any) -> None:  # noqa: ANN401
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be numbers of shape \(4, 2\)"):
        env.step(actions)
    assert spy.sent == []
    env.step(np.zeros((N, 2), np.float32))
    # One environment is no reason to leave the row out.
    alone = boats(shield, MODES[0], count=1)
    alone.reset(seed=0)
    with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
        alone.step(np.zeros(2, np.float32))


def test_a_single_or_another_environment_is_refused(shield: Shield) -> None:
    with pytest.raises(TypeError, match="SafetyShield is for one environment"):
        VectorSafetyShield(BoatEnv(), shield)  # type: ignore[arg-type]
    cart = vectorised([lambda: gym.make("safeshield/DoubleIntegrator-v0")], MODES[0])
    with pytest.raises(ValueError, match=r"observation_space mismatch .*Box.*got Box"):
        VectorSafetyShield(cart, shield)
    # It is the caller's still: Gymnasium 0.29 closes an environment with its wrapper.
    gc.collect()
    assert not cart.closed
    narrow = [lambda: gym.wrappers.RescaleAction(BoatEnv(), np.zeros(2), np.ones(2))]
    with pytest.raises(ValueError, match="action_space mismatch"):
        VectorSafetyShield(vectorised(narrow, MODES[0]), shield)


def test_a_path_a_shield_or_an_agent(shield: Shield, tmp_path: Path) -> None:
    class Agent:
        def shield(self) -> Shield:
            return shield

    path = tmp_path / "boat.safetensors"
    shield.save(path)
    for given in (path, str(path), shield, Agent()):
        assert boats(given, MODES[0]).shield.delta == 0.05
    with pytest.raises(TypeError, match="shield must be a Shield, a path"):
        boats(3, MODES[0])


def test_uncalibrated_warns_once(shield: Shield) -> None:
    env = boats(shield.with_delta(0.05), MODES[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env.reset(seed=0)
        for _ in range(5):
            env.step(np.zeros((N, 2), np.float32))
    assert [w.category for w in caught] == [UncalibratedShieldWarning]


def test_an_unreadable_row_stays_unreadable_whatever_is_done_to_the_array(shield: Shield) -> None:
    def break_row(spy: Spy, result: Any) -> Any:  # noqa: ANN401
        result[0][2] = np.nan
        return result

    env = VectorSafetyShield(Spy(native(MODES[0]), break_row), certain(shield))
    env.reset(seed=0, options={"state": OPEN})
    actions = np.full((N, 2), 0.25, np.float32)
    observations, _, _, _, infos = env.step(actions)
    np.testing.assert_array_equal(infos["shield/safe_set"], np.arange(N) != 2)
    observations[:] = OPEN
    infos = env.step(actions)[4]
    np.testing.assert_array_equal(infos["shield/intervened"], np.arange(N) == 2)
    np.testing.assert_array_equal(np.isinf(infos["shield/value"]), np.arange(N) == 2)


def test_asynchronous_calls_do_not_pass_it_by(shield: Shield) -> None:
    spy = Spy(native(MODES[0]))
    env = VectorSafetyShield(spy, shield)
    env.reset_async(seed=0)
    _, infos = env.reset_wait(seed=0)
    assert set(KEYS) <= set(infos)
    env.step_async(np.full((N, 2), np.nan))
    assert env.step_wait()[4]["shield/intervened"].all()
    assert np.isfinite(spy.sent).all()
    with pytest.raises(gym.error.NoAsyncCallError):
        env.step_wait()
    # An outer wrapper of Gymnasium 0.29 steps so by itself.
    outer = vector.VectorWrapper(env)
    outer.reset(seed=0)
    assert outer.step(np.full((N, 2), np.nan))[4]["shield/intervened"].all()
    assert np.isfinite(spy.sent).all()


# -- other spaces -------------------------------------------------------------------------------


class Named(gym.ObservationWrapper):
    """The boat's observation under a name."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Dict({"at": env.observation_space})

    def observation(self, observation: Array) -> dict[str, Array]:
        return {"at": observation}


def assert_names_do_not_matter(named: Shield, plain: Shield, mode: str) -> None:
    envs = [
        VectorSafetyShield(vectorised(each(lambda i: Named(sinking_boat(i))), mode), named),
        VectorSafetyShield(vectorised(each(sinking_boat), mode), plain),
    ]
    results: list[Any] = [env.reset(seed=0) for env in envs]
    rng = np.random.default_rng(4)
    ended, over = 0, np.zeros(N, np.bool_)
    for _ in range(20):
        np.testing.assert_array_equal(results[0][0]["at"], results[1][0])
        for key in KEYS:
            np.testing.assert_array_equal(results[0][-1][key], results[1][-1][key])
        if mode == DISABLED and over.any():
            results = [env.reset(options={"reset_mask": over.copy()}) for env in envs]
            over[:] = False
        else:
            actions = reckless(rng)
            results = [env.step(actions) for env in envs]
            over = results[0][2] | results[0][3]
            ended += over.sum()
    assert ended > 5


@pytest.mark.parametrize("mode", MODES)
def test_observations_are_passed_on_as_they_are(
    shield: Shield, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NamedRuntime(ShieldRuntime):
        def observe(self, observations: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            rows = observations["at"] if isinstance(observations, dict) else observations
            return super().observe(rows, *args, **kwargs)

    class NamedShield(Shield):
        def value(self, observation: Any, action: Any = None, **_: Any) -> Any:  # noqa: ANN401
            return super().value(observation["at"], action)

        def check_fits(self, *_: object) -> bool:
            return True

    monkeypatch.setattr(vector, "ShieldRuntime", NamedRuntime)
    named = NamedShield(shield.model, shield.delta, record(0.05))
    assert_names_do_not_matter(named, certain(shield), mode)


@pytest.mark.parametrize("mode", MODES)
def test_dict_observations(shield: Shield, mode: str) -> None:
    space: Any = gym.spaces.Dict({"at": shield.observation_space})
    try:
        named = replace(certain(shield), model=replace(shield.model, observation_space=space))
        named.value({"at": np.zeros(2, np.float32)})  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, IndexError):
        pytest.skip("the engine takes no Dict yet")
    assert_names_do_not_matter(named, certain(shield), mode)


def test_where_actions_are_whole_numbers_none_is_below_them_all() -> None:
    spaces = gym.spaces
    assert SpaceCodec(spaces.Discrete(3)).nothing == -1
    assert SpaceCodec(spaces.Discrete(3, start=-2)).nothing == -3
    np.testing.assert_array_equal(SpaceCodec(spaces.MultiDiscrete([2, 5])).nothing, [-1, -1])
    assert np.isnan(SpaceCodec(spaces.Box(-1, 1, (3,))).nothing).tolist() == [True] * 3


# -- one shield, and nothing past it ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Sync", "Async"])
def test_one_shield_only(shield: Shield, kind: str) -> None:
    inner = vectorised(
        [lambda: SafetyShield(BoatEnv(dt=DT), shield)] * 2,
        MODES[0],
        getattr(gym.vector, f"{kind}VectorEnv"),
    )
    if kind == "Sync":
        with pytest.raises(ValueError, match=r"shielded already \(SafetyShield\)"):
            VectorSafetyShield(inner, shield)
    else:  # in other processes: their infos tell
        env = VectorSafetyShield(inner, shield)
        with pytest.raises(ValueError, match="shielded already"):
            env.reset(seed=0)
    inner.close()
    with pytest.raises(ValueError, match=r"shielded already \(VectorSafetyShield\)"):
        VectorSafetyShield(boats(shield, MODES[0]), shield)


def test_nobody_steps_or_resets_past_it(shield: Shield) -> None:
    env = VectorSafetyShield(vectorised(each(short_boat), MODES[0]), shield)
    env.reset(seed=0)
    for name in ("reset", "step"):
        with pytest.raises(ValueError, match=f"'{name}' of the environments themselves"):
            env.call(name, np.zeros(2, np.float32))
        with pytest.raises(ValueError, match=f"'{name}' of the environments themselves"):
            env.set_attr(name, print)
    env.set_attr("marked", [1, 2, 3, 4])
    assert env.call("marked") == (1, 2, 3, 4)
    env.step(env.action_space.sample())
