"""Running episodes: whole, unbiased, and the same however the environment is vectorised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch

import safeshield.envs
from safeshield.data import OfflineDataset, collect
from safeshield.rollouts.copies import is_vector_env, vectorise
from safeshield.rollouts.episodes import VectorStep, run_episodes
from safeshield.rollouts.policies import as_batch_policy, batch_policy, executable_actions
from safeshield.rollouts.recorded import Episode

Array = npt.NDArray[Any]
Env = gym.Env[Any, Any]
BEFORE_1_0 = gym.__version__.startswith("0.")
BOX = gym.spaces.Box(-1.0, 1.0, (1,))
LABELS = ("cost", "constraint")
assert safeshield.envs  # imported to register its ids


class Walk(Env):
    """x moves by the action; a draw at reset says after how many steps it ends, and how."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(
        self,
        labels: Sequence[str] = LABELS,
        at_reset: bool = True,
        longest: int = 9,
        render_mode: str | None = None,
    ) -> None:
        self.labels, self.at_reset, self.longest = tuple(labels), at_reset, longest
        self.render_mode = render_mode
        self.steps = self.resets = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.resets += 1
        self.time, self.x = 0, float(self.np_random.normal())
        self.length = int(self.np_random.integers(1, self.longest + 1))
        if options is not None:
            self.x, self.length = options.get("x", self.x), options.get("length", self.length)
        return self._observation(), self._info() if self.at_reset else {}

    def step(self, action: Array) -> tuple[Any, ...]:
        assert self.action_space.contains(action)
        assert self.time < self.length, "stepped after its end"
        self.steps += 1
        self.time += 1
        self.x += float(action[0])
        over = self.time == self.length
        terminates = over and self.length % 2 == 0
        return self._observation(), self.x, terminates, over and not terminates, self._info()

    def _observation(self) -> Array:
        return np.array([self.x, self.time], np.float64)

    def _info(self) -> dict[str, Any]:
        # The cost is the integer 0 when safe: a column of integers would cut 0.5 to 0.
        known = {"cost": 0.5 if self.x > 0 else 0, "constraint": self.x, "time": self.time}
        return {key: known[key] for key in (*self.labels, "time")}


gym.register("SafeshieldTest/Walk-v0", entry_point=lambda **kwargs: Walk(**kwargs))


def push(observation: Array) -> Array:
    return np.asarray(np.cos(observation[:1] * 3 + observation[1]))


def assert_same_episodes(one: Sequence[Episode], other: Sequence[Episode]) -> None:
    assert len(one) == len(other)
    for mine, yours in zip(one, other, strict=True):
        for name in vars(mine):
            if name != "info":
                np.testing.assert_array_equal(getattr(mine, name), getattr(yours, name), name)


def by_hand(env: Env, seeds: Sequence[int]) -> list[tuple[Array, float, Array, float, bool, bool]]:
    """The plainest loop there is: one environment, one episode after the other."""
    steps = []
    for seed in seeds:
        observation, info = env.reset(seed=seed)
        over = False
        while not over:
            action = push(observation).astype(np.float32)
            after, _, terminated, truncated, new = env.step(action)
            steps.append(
                (observation, info["constraint"], after, new["constraint"], terminated, truncated)
            )
            observation, info, over = after, new, terminated or truncated
    return steps


def makers() -> dict[str, Callable[[int], Any]]:
    """The same walks, vectorised in every way of the installed Gymnasium."""

    def sync(**kwargs: Any) -> Callable[[int], Any]:  # noqa: ANN401
        return lambda n: gym.vector.SyncVectorEnv([Walk] * n, **kwargs)

    ways: dict[str, Callable[[int], Any]] = {
        "default": sync(),
        "shared buffers": sync(copy=False),
        "made": lambda _: gym.make("SafeshieldTest/Walk-v0"),
        "bare": lambda _: Walk(),
    }
    if BEFORE_1_0:
        experimental = import_module("gymnasium.experimental.vector")
        ways["experimental"] = lambda n: experimental.SyncVectorEnv([Walk] * n)
    else:
        for mode in gym.vector.AutoresetMode:
            ways[mode.value] = sync(autoreset_mode=mode)
    return ways


@pytest.mark.parametrize("way", makers())
@pytest.mark.parametrize("num_envs", [1, 4, 7])
def test_every_way_gives_the_plain_loop(way: str, num_envs: int) -> None:
    seeds: list[int] = []

    class Noted(Walk):
        def reset(self, *, seed: int | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
            assert seed is not None
            seeds.append(seed)
            return super().reset(seed=seed, **kwargs)

    reference = run_episodes(Noted(), push, 10, seed=3)
    assert len(set(seeds)) == 10
    # 0.29's cost column is of integers where the first cost is one: labels of our own copies only.
    keys = ("constraint",) if way in makers().keys() - {"made", "bare"} else LABELS
    episodes = run_episodes(makers()[way](num_envs), push, 10, seed=3)
    for mine, theirs in zip(episodes, reference, strict=True):
        for name in ("observations", "actions", "rewards", "next_observations", "terminated"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), name)
        np.testing.assert_array_equal(mine.truncated, theirs.truncated)
        np.testing.assert_array_equal(mine.constraints, theirs.constraints)
        np.testing.assert_array_equal(mine.next_constraints, theirs.next_constraints)
        if "cost" in keys:
            np.testing.assert_array_equal(mine.costs, theirs.costs)

    steps = by_hand(Walk(), seeds)
    columns = [np.array(column) for column in zip(*steps, strict=True)]
    names = ("observations", "constraints", "next_observations", "next_constraints")
    for name, column in zip((*names, "terminated", "truncated"), columns, strict=True):
        joined = np.concatenate([getattr(episode, name) for episode in episodes])
        np.testing.assert_array_equal(joined, column.astype(joined.dtype), name)


def test_half_a_cost_survives_beside_an_integer() -> None:
    for episode in run_episodes(gym.make("SafeshieldTest/Walk-v0"), push, 20, seed=0, num_envs=5):
        assert episode.costs is not None
        assert episode.next_constraints is not None
        np.testing.assert_array_equal(episode.costs, 0.5 * (episode.next_constraints > 0))


def test_lengths_are_not_biased_to_short_episodes() -> None:
    lengths = [
        len(e) for e in run_episodes(gym.make("SafeshieldTest/Walk-v0"), push, 400, 0, num_envs=8)
    ]
    # Uniform on 1..9: mean 5, standard error 0.13.
    assert abs(np.mean(lengths) - 5) < 0.5


def test_copies_stand_still_after_their_first_episode() -> None:
    made: list[Walk] = []

    class Counted(Walk):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    gym.register("SafeshieldTest/Counted-v0", entry_point=lambda **_: Counted())
    env = gym.make("SafeshieldTest/Counted-v0")
    episodes = run_episodes(env, push, 8, seed=0, num_envs=4)
    # The first two were compared: the environment itself, and a copy made from its spec.
    assert sum(walk.resets for walk in made[2:]) == 8
    assert sum(walk.steps for walk in made[2:]) == sum(len(e) for e in episodes)


def test_same_seed_same_data_and_another_seed_other_data() -> None:
    env = gym.make("SafeshieldTest/Walk-v0")
    first = run_episodes(env, "random", 10, seed=1)
    assert_same_episodes(run_episodes(env, "random", 10, seed=1), first)
    other = run_episodes(env, "random", 10, seed=2)
    assert not np.array_equal(first[0].observations[0], other[0].observations[0])


@pytest.mark.parametrize("name", ["Boat", "DoubleIntegrator"])
def test_native_vector_environments_equal_single_ones(name: str) -> None:
    env = gym.make(f"safeshield/{name}-v0", max_episode_steps=7, dt=0.1)
    envs = vectorise(env, 3)
    assert type(envs.unwrapped).__name__ == f"{name}VectorEnv"
    reference = run_episodes(env, push_all(env), 5, seed=0, num_envs=1)
    assert {len(e) for e in reference} == {7}
    assert_same_episodes(run_episodes(env, push_all(env), 5, seed=0), reference)
    assert_same_episodes(run_episodes(envs, push_all(env), 5, seed=0), reference)
    assert all(e.truncated[-1] and not e.terminated.any() for e in reference)


@pytest.mark.skipif(BEFORE_1_0, reason="0.29 has one autoreset mode")
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_native_autoreset_modes_agree(mode: str) -> None:
    env = gym.make("safeshield/Boat-v0", max_episode_steps=7)
    envs = gym.make_vec("safeshield/Boat-v0", num_envs=3, max_episode_steps=7, autoreset_mode=mode)
    one = run_episodes(envs, push_all(env), 5, seed=0)
    assert_same_episodes(one, run_episodes(env, push_all(env), 5, seed=0, num_envs=1))


def push_all(env: Env) -> Callable[[Array], Array]:
    assert env.action_space.shape is not None
    width = env.action_space.shape[0]
    return lambda observation: np.resize(np.cos(3 * observation), width)


def test_on_step_sees_every_recorded_step_once() -> None:
    seen: list[VectorStep] = []
    episodes = run_episodes(
        gym.make("SafeshieldTest/Walk-v0"), push, 5, 0, num_envs=3, on_step=seen.append
    )
    assert sum(int(step.active.sum()) for step in seen) == sum(len(e) for e in episodes)
    assert {step.wave for step in seen} == {0, 1}
    assert seen[0].active.tolist() == [True] * 3
    assert [s for s in seen if s.wave == 1][0].active.tolist() == [True, True, False]  # noqa: RUF015
    last = max((s for s in seen if s.wave == 0), key=lambda s: s.index)
    i = int(np.argmax(last.active))
    np.testing.assert_array_equal(
        episodes[i].next_observations[-1], last.next_observations[i].astype(np.float32)
    )


def test_reset_options_and_info_keys() -> None:
    env = gym.make("SafeshieldTest/Walk-v0")
    episodes = run_episodes(
        env, push, 4, 0, num_envs=2, reset_options={"x": 0.25, "length": 3}, info_keys=("time",)
    )
    for episode in episodes:
        assert episode.observations[0].tolist() == [0.25, 0]
        assert episode.info["time"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="'absent' is not"):
        run_episodes(env, push, 1, 0, info_keys=("absent",))


def test_episode_totals() -> None:
    (episode,) = run_episodes(Walk(), push, 1, 0, reset_options={"x": 5.0, "length": 4})
    assert episode.total_cost == 2.0
    assert episode.violated
    assert episode.total_return == pytest.approx(float(episode.next_observations[:, 0].sum()))
    (bare,) = run_episodes(Walk(labels=()), push, 1, 0)
    for name in ("total_cost", "violated"):
        with pytest.raises(ValueError, match="reports n"):
            getattr(bare, name)


# Vectorising


def test_what_is_copied() -> None:
    made = gym.make("SafeshieldTest/Walk-v0")
    assert vectorise(made).num_envs == 8
    assert vectorise(made, 3).num_envs == 3
    assert vectorise(Walk()).num_envs == 1
    assert vectorise(gym.make("safeshield/Boat-v0")).num_envs == 256
    seen = gym.make("SafeshieldTest/Walk-v0", render_mode="rgb_array", disable_env_checker=True)
    assert vectorise(seen).num_envs == 1
    assert vectorise(gym.wrappers.NormalizeObservation(made)).num_envs == 1
    rescaled = gym.wrappers.RescaleAction(made, np.float32(-2), np.float32(2))
    assert vectorise(rescaled).single_action_space == rescaled.action_space
    boats = gym.wrappers.RescaleAction(
        gym.make("safeshield/Boat-v0"), np.float32(-2), np.float32(2)
    )
    assert isinstance(vectorise(boats), gym.vector.SyncVectorEnv)
    envs = gym.vector.SyncVectorEnv([Walk, Walk])
    assert vectorise(envs) is envs
    assert is_vector_env(envs)
    assert not is_vector_env(made)


def test_what_cannot_be_copied() -> None:
    with pytest.raises(ValueError, match=r"num_envs must be 1 .* cannot rebuild"):
        vectorise(Walk(), 2)
    with pytest.raises(ValueError, match="left out or 2"):
        vectorise(gym.vector.SyncVectorEnv([Walk, Walk]), 3)
    with pytest.raises(ValueError, match="at least 1"):
        vectorise(Walk(), 0)


def test_the_users_environment_stays_open() -> None:
    class Closing(Walk):
        closed_by: str | None = None

        def close(self) -> None:
            raise RuntimeError("closed")

    run_episodes(Closing(), push, 1, 0)
    vectorise(Closing()).close()


# Policies


def test_forms_of_a_policy_agree() -> None:
    class Acting:
        def act_batch(self, observations: Array, rng: np.random.Generator) -> Array:
            return np.stack([push(o) for o in observations])

    class Predicting:
        def predict(self, observations: Array, **_: object) -> tuple[Array, None]:
            return np.stack([push(o) for o in observations]), None

    batched = batch_policy(lambda observations, rng: [push(o) for o in observations])
    env = gym.make("SafeshieldTest/Walk-v0")
    reference = run_episodes(env, push, 5, 0)
    for policy in (Acting(), batch_policy(Acting().act_batch), batched, Predicting()):
        assert_same_episodes(run_episodes(env, policy, 5, 0), reference)


def test_predict_gets_state_and_episode_starts() -> None:
    class Recurrent:
        def __init__(self) -> None:
            self.calls: list[tuple[object, list[bool], bool]] = []

        def predict(
            self,
            observations: Array,
            state: Array | None,
            episode_start: Array,
            deterministic: bool,
        ) -> tuple[Array, Array]:
            old = None if state is None else state.tolist()
            self.calls.append((old, episode_start.tolist(), deterministic))
            return np.zeros((2, 1)), np.zeros(2) if state is None else state + 1

    policy = Recurrent()
    envs = gym.vector.SyncVectorEnv([Walk, Walk])
    run_episodes(envs, policy, 4, 0, reset_options={"length": 3})
    wave = [
        (None, [True, True], True),
        ([0.0, 0.0], [False, False], True),
        ([1.0, 1.0], [False, False], True),
    ]
    assert policy.calls == wave * 2


def test_random_fills_the_box_from_its_generator() -> None:
    space = gym.spaces.Box(np.array([-2.0, 0.0]), np.array([-1.0, 4.0]), dtype=np.float64)
    policy = as_batch_policy("random", space)
    drawn = policy(np.zeros((4000, 3)), np.random.default_rng(0))
    np.testing.assert_allclose(drawn.min(axis=0), space.low, atol=0.01)
    np.testing.assert_allclose(drawn.max(axis=0), space.high, atol=0.01)
    np.testing.assert_array_equal(drawn, policy(np.zeros((4000, 3)), np.random.default_rng(0)))


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        rows = x if isinstance(x, torch.Tensor) else torch.cat([x["a"], x["b"]], dim=-1)
        assert rows.dtype == torch.float32
        return 2.0 * rows.sum(dim=-1, keepdim=True)


def test_a_torch_module_acts_on_a_whole_batch() -> None:
    with pytest.raises(ValueError, match=r"Doubled is in training mode.*eval\(\)"):
        as_batch_policy(Doubled(), BOX)
    policy = as_batch_policy(Doubled().eval(), BOX)
    rows = np.array([[0.25], [-0.5]])
    assert policy(rows, np.random.default_rng(0)).tolist() == [[0.5], [-1.0]]
    parts = {"a": rows, "b": np.array([[0.25], [0.25]], np.float64)}
    assert policy(parts, np.random.default_rng(0)).tolist() == [[1.0], [-0.5]]
    named = as_batch_policy(torch.nn.LSTM(1, 1).eval(), BOX)  # it returns a tensor and a state
    with pytest.raises(TypeError, match="policy LSTM must return one tensor of actions, got tuple"):
        named(rows, np.random.default_rng(0))


def test_bad_policies() -> None:
    with pytest.raises(ValueError, match="'random', got 'greedy'"):
        as_batch_policy("greedy", BOX)
    with pytest.raises(ValueError, match="bounded"):
        as_batch_policy("random", gym.spaces.Box(-np.inf, 1.0, (1,)))
    with pytest.raises(TypeError, match="got int"):
        as_batch_policy(3, BOX)
    with pytest.raises(ValueError, match="NaN for environment 0"):
        run_episodes(Walk(), lambda _: [np.nan], 1, 0)
    with pytest.raises(ValueError, match=r"an array of shape \(1,\); got array"):
        run_episodes(Walk(), lambda o: o, 1, 0)


def test_actions_are_clipped_to_the_box() -> None:
    actions = executable_actions([[np.inf], [-7.0], [0.1]], BOX, 3)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions[:, 0], np.array([1, -1, 0.1], np.float32))
    (episode,) = run_episodes(Walk(), lambda _: [5.0], 1, 0, reset_options={"length": 2})
    assert episode.actions.tolist() == [[1.0], [1.0]]


# Bad environments


class SixTuple(Walk):
    def step(self, action: Array) -> tuple[Any, ...]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, info["cost"], terminated, truncated, info


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: gym.wrappers.TimeLimit(e, 5)])
def test_six_values_are_explained(wrap: Callable[[Env], Env]) -> None:
    with pytest.raises(ValueError, match=r"env\.step must return .*SafetyPointGoal1Gymnasium"):
        run_episodes(wrap(SixTuple()), push, 1, 0)


def test_an_episode_without_an_end_is_explained() -> None:
    with pytest.raises(ValueError, match=r"step_limit = 50 .*TimeLimit"):
        run_episodes(Walk(), push, 1, 0, reset_options={"length": 10**9}, step_limit=50)


def test_bad_arguments() -> None:
    for episodes, seed, words in (
        (0, 0, "episodes must be at least 1, got 0"),
        (1, -1, "seed must be at least 0, got -1"),
        (1, None, "seed must be a whole number, got None"),
    ):
        with pytest.raises(ValueError, match=words):
            run_episodes(Walk(), push, episodes, seed)  # type: ignore[arg-type]
    env = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match=r"one action of Discrete\(2\) .* shape \(\); got"):
        run_episodes(env, push, 1, 0)


# Logs


@pytest.mark.parametrize("num_envs", [1, 4])
def test_collected_log_has_continuous_labels(num_envs: int) -> None:
    env = gym.make("SafeshieldTest/Walk-v0")
    log = collect(env, push, 10, seed=0, num_envs=num_envs)
    assert log.constraint_kind == "continuous"
    assert log.num_episodes == 10
    # h is x, and x stands in the observation: labels belong to the states beside them.
    np.testing.assert_array_equal(log.constraints, log.observations[:, 0])
    np.testing.assert_array_equal(log.next_constraints, log.next_observations[:, 0])
    np.testing.assert_allclose(
        log.next_observations[:, 0], log.observations[:, 0] + log.actions[:, 0], atol=1e-6
    )
    assert log.observation_space == env.observation_space


def test_vector_collection_equals_single_collection() -> None:
    env = gym.make("SafeshieldTest/Walk-v0")
    one, many = (collect(env, push, 10, seed=0, num_envs=n) for n in (1, 4))
    vector = collect(gym.vector.SyncVectorEnv([Walk] * 3), push, 10, seed=0)
    for name in ("observations", "actions", "next_observations", "constraints", "terminated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(vector, name))


@pytest.mark.parametrize("at_reset", [True, False])
def test_costs_alone_give_binary_labels(at_reset: bool) -> None:
    log = collect(Walk(("cost",), at_reset), push, 10, seed=0)
    assert log.constraint_kind == "binary"
    expected = np.where(log.observations[:, 0] > 0, 1, -1)
    if not at_reset:
        expected[log.episode_starts] = -1
    np.testing.assert_array_equal(log.constraints, expected)
    np.testing.assert_array_equal(
        log.next_constraints, np.where(log.next_observations[:, 0] > 0, 1, -1)
    )


def test_constraint_alone_gives_costs() -> None:
    log = collect(Walk(("constraint",)), push, 5, seed=0)
    np.testing.assert_array_equal(log.costs, log.next_constraints > 0)


def test_missing_labels_are_explained() -> None:
    with pytest.raises(ValueError, match="must report info\\['constraint'\\]"):
        collect(Walk(()), push, 2, seed=0)
    with pytest.raises(ValueError, match="missing at reset"):
        collect(Walk(("constraint",), at_reset=False), push, 2, seed=0)

    class Sometimes(Walk):
        def _info(self) -> dict[str, Any]:
            return super()._info() if self.time < 2 else {}

    with pytest.raises(
        ValueError, match=r"info\['cost'\] must be reported at every step, .*step 1"
    ):
        run_episodes(Sometimes(("cost",)), push, 1, 0, reset_options={"length": 3})

    class Several(Walk):
        def _info(self) -> dict[str, Any]:
            return {"constraint": np.zeros(2)}

    with pytest.raises(ValueError, match="report a mapping from the name"):
        collect(Several(), push, 1, seed=0)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_executed_action_is_logged(num_envs: int) -> None:
    log = collect(gym.make("SafeshieldTest/Braked-v0"), "random", 6, seed=0, num_envs=num_envs)
    assert (log.actions <= 0).all()
    np.testing.assert_allclose(
        log.next_observations[:, 0], log.observations[:, 0] + log.actions[:, 0], atol=1e-6
    )


class Braked(Walk):
    def step(self, action: Array) -> tuple[Any, ...]:
        executed = np.minimum(action, np.float32(0))
        *result, info = super().step(executed)
        return (*result, {**info, "action_executed": executed})


gym.register("SafeshieldTest/Braked-v0", entry_point=lambda **kwargs: Braked(**kwargs))


def test_both_ends_at_once_count_as_termination() -> None:
    class Both(Walk):
        def step(self, action: Array) -> tuple[Any, ...]:
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated or truncated, terminated or truncated, info

    log = collect(Both(), push, 3, seed=0)
    assert isinstance(log, OfflineDataset)
    assert log.terminated.sum() == 3
    assert not log.truncated.any()


@pytest.mark.parametrize(
    "returned", [None, "left", 1.0, [[1.0]], ([1.0], None), [1j], {"a": 1}], ids=repr
)
def test_a_function_that_returns_no_action_is_told_what_an_action_is(returned: object) -> None:
    box = gym.spaces.Box(-1.0, 1.0, (1,))
    with pytest.raises(ValueError, match=r"must return one action of Box.* shape \(1,\); got"):
        as_batch_policy(lambda _: returned, box)(np.zeros((2, 3)), np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"got the class Agent: pass Agent\(\)"):
        as_batch_policy(type("Agent", (), {"predict": lambda *_: None}), box)
    whole = as_batch_policy(lambda _: 1, gym.spaces.Discrete(3))
    assert whole(np.zeros((2, 3)), np.random.default_rng(0)).tolist() == [1, 1]


def test_nan_of_the_environment_is_not_blamed_on_the_policy() -> None:
    class Broken(Walk):
        def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
            observation, *rest = super().step(action)
            return (observation * np.nan, *rest)

    # Not all episodes of Walk end after one step, so that the policy sees NaN.
    with pytest.raises(ValueError, match="the environment returned NaN in an observation"):
        run_episodes(Broken(), lambda seen: seen[:1], 8, 0)


class WholeSteps(gym.Wrapper):  # type: ignore[type-arg]
    """An environment whose actions are a Box of integers, and which truncates fractions."""

    def __init__(self) -> None:
        super().__init__(Walk())
        self.action_space = gym.spaces.Box(-2, 2, (2,), np.int64)
        self.ran: list[Array] = []

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.ran.append(np.array(action, np.int64))
        return self.env.step(np.float32(self.ran[-1][:1] / 2))


@pytest.mark.parametrize(
    "policy", ["random", lambda observation: np.array([0.709, -1.9 + observation[0] % 1])]
)
def test_the_whole_numbers_that_ran_are_logged(policy: object) -> None:
    env = WholeSteps()
    log = collect(env, policy, 200, seed=0, num_envs=1)
    np.testing.assert_array_equal(log.actions, env.ran)
    if policy == "random":
        assert np.unique(log.actions).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
