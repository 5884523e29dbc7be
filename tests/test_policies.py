"""`ShieldedPolicy`: an agent's predict with the shield behind it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from fitted import DT
from hostile import hostile

from safeshield.data import collect
from safeshield.evaluation.episodes import filtered_episodes
from safeshield.policies import SafeSupportPolicy, ShieldedPolicy
from safeshield.policies.shielded import _shared
from safeshield.shield import FilterReport, Shield
from safeshield.spaces.schema import check_same_space

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)


class Downstream:
    """Always with the current, whatever lies there; counts in its state."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, bool]] = []

    def predict(
        self,
        observation: npt.NDArray[Any],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        self.calls.append((episode_start, deterministic))
        count = np.zeros(1) if state is None else state[0] + 1
        action = np.tile(np.array([1.0, 0.0], np.float32), (*np.shape(observation)[:-1], 1))
        return (action if np.ndim(observation) == 2 else action.reshape(2)), (count,)


@pytest.mark.parametrize("rows", [None, 1, 5])
def test_it_returns_what_the_shield_makes_of_the_prediction(
    shield: Shield, rows: int | None
) -> None:
    shape = (2,) if rows is None else (rows, 2)
    observation = np.random.default_rng(0).uniform([-2, -1], [0, 1], shape).astype(np.float32)
    model = Downstream()
    policy = ShieldedPolicy(model, shield)
    action, state = policy.predict(observation, (np.array([4.0]),), np.array([True]), True)
    expected, report = shield.filter(observation, Downstream().predict(observation)[0])
    np.testing.assert_array_equal(action, expected)
    assert action.shape == shape
    assert state is not None
    assert state[0] == 5.0
    assert model.calls[0][1] is True
    assert isinstance(policy.report, FilterReport)
    for mine, theirs in zip(policy.report, report, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_sb3_evaluates_it_and_it_keeps_off_the_rocks(shield: Shield) -> None:
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    costs: dict[str, float] = {}
    for name, policy in (
        ("bare", Downstream()),
        ("shielded", ShieldedPolicy(Downstream(), shield)),
    ):
        seen: list[float] = []
        envs = DummyVecEnv([lambda: Monitor(_Start(gym.make("safeshield/Boat-v0", dt=DT)))] * 2)
        returns, lengths = evaluate_policy(
            policy,  # type: ignore[arg-type]
            envs,
            n_eval_episodes=2,
            return_episode_rewards=True,
            callback=lambda scope, _, seen=seen: seen.append(scope["info"]["cost"]),
        )
        assert len(returns) == len(lengths) == 2  # type: ignore[arg-type]
        costs[name] = sum(seen)
    assert costs["bare"] > 0
    assert costs["shielded"] == 0


class _Start(gym.Wrapper):  # type: ignore[type-arg]
    """Every episode upstream of a rock, and 80 steps long."""

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        self.steps = 0
        return self.env.reset(**kwargs | {"options": {"state": [-2.0, -1.2]}})

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.steps += 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated or self.steps >= 80, info


class Edits:
    """Moves its observation to open water, in place, before it acts: downstream, into the rock."""

    def predict(self, observation: Any, **_: Any) -> tuple[Any, None]:  # noqa: ANN401
        observation[...] = [1.9, 0.0]
        return np.tile(np.array([1.0, 0.0], np.float32), (*np.shape(observation)[:-1], 1)), None

    def act(self, observation: Any) -> Any:  # noqa: ANN401
        return self.predict(observation)[0]


def test_what_a_policy_writes_into_its_observation_changes_no_verdict(shield: Shield) -> None:
    start = np.array([-1.2, 0.5], np.float32)
    into = np.array([1.0, 0.0], np.float32)
    expected, report = shield.filter(start, into)
    assert report.intervened
    for observation in (start, np.tile(start, (3, 1))):
        kept = observation.copy()
        policy = ShieldedPolicy(Edits(), shield)
        np.testing.assert_allclose(
            policy.predict(observation)[0],
            shield.filter(kept, np.broadcast_to(into, kept.shape))[0],
            atol=1e-6,
        )
        assert np.all(policy.report.intervened)
        np.testing.assert_array_equal(observation, kept)
    own = SafeSupportPolicy(shield, Edits().act, rounds=2, seed=0)
    np.testing.assert_allclose(own.predict(start)[0], expected, atol=1e-6)


def test_what_was_judged_is_returned_however_the_prediction_changes(shield: Shield) -> None:
    class Says:
        action: Any = None

        def predict(self, *_: Any, **__: Any) -> tuple[Any, None]:  # noqa: ANN401
            return self.action, None

    says = Says()
    policy = ShieldedPolicy(says, shield)
    still = np.zeros(2, np.float32)
    for says.action in hostile(still):
        executed, _ = policy.predict(np.array([1.9, 0.0], np.float32))
        assert not policy.report.intervened
        assert type(executed) is np.ndarray
        assert executed.tobytes() == still.tobytes()


def test_a_prediction_that_failed_has_no_verdict(shield: Shield) -> None:
    policy = ShieldedPolicy(Downstream(), shield)
    policy.predict(np.array([1.9, 0.0], np.float32))
    assert policy.report is not None
    with pytest.raises(ValueError, match="numbers of shape"):
        policy.predict(np.zeros(3, np.float32))
    assert policy.report is None


def test_what_a_policy_writes_into_its_observation_changes_no_log_and_no_test(
    shield: Shield,
) -> None:
    env = _Start(gym.make("safeshield/Boat-v0", dt=DT))

    def still(observation: Any) -> Any:  # noqa: ANN401
        return np.array([1.0, 0.0], np.float32)

    logs = [collect(env, policy, episodes=1, seed=0) for policy in (still, Edits().act)]
    np.testing.assert_array_equal(logs[0].observations, logs[1].observations)
    assert logs[0].costs.sum() > 0
    runs = [filtered_episodes(env, p, 1, 0, shield=shield)[0] for p in (still, Edits().act)]
    for run in runs:
        assert not run.violated
    np.testing.assert_array_equal(runs[0].intervened, runs[1].intervened)


class _Wipes(gym.Wrapper):  # type: ignore[type-arg]
    """Leaves nothing in the array that it was given."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        result = self.env.step(action)
        action *= 0
        return result


class _Count(gym.Env[Any, Any]):
    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.MultiDiscrete([3, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        return np.zeros(1, np.float32), 0.0, False, False, {"cost": 0.0}


def test_what_an_environment_writes_into_its_action_changes_no_log() -> None:
    mine = np.array([2, 1])
    env = gym.wrappers.TimeLimit(_Wipes(_Count()), 3)
    log = collect(env, lambda _: mine, episodes=1, seed=0)
    np.testing.assert_array_equal(log.actions, [[2, 1]] * 3)
    np.testing.assert_array_equal(mine, [2, 1])


def test_the_models_spaces_must_be_the_shields(shield: Shield) -> None:
    class Model(Downstream):
        observation_space: Any = shield.observation_space
        action_space: Any = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)

    model = Model()
    ShieldedPolicy(model, shield)
    model.action_space = gym.spaces.Box(-2.0, 1.0, (2,))
    with pytest.raises(ValueError, match=r"the model's action_space mismatch .*Box\(-1.*Box\(-2"):
        ShieldedPolicy(model, shield)
    model.action_space, model.observation_space = None, gym.spaces.Box(-1.0, 1.0, (3,))
    with pytest.raises(ValueError, match=r"model's observation_space mismatch \(shape\).*\(3,\)"):
        ShieldedPolicy(model, shield)
    with pytest.raises(ValueError, match="shielded already"):
        ShieldedPolicy(ShieldedPolicy(Downstream(), shield), shield)


def test_models_that_see_other_entries_or_turned_images() -> None:
    image = gym.spaces.Box(0, 255, (4, 5, 3), np.uint8)
    turned = gym.spaces.Box(0, 255, (3, 4, 5), np.uint8)
    ours = gym.spaces.Dict(a=gym.spaces.Discrete(3), eye=image)
    theirs = gym.spaces.Dict(b=gym.spaces.Discrete(2), eye=turned)
    check_same_space(_shared(ours, theirs), theirs, "space")
    check_same_space(_shared(image, image), image, "space")
    with pytest.raises(ValueError, match="mismatch"):
        check_same_space(_shared(image, gym.spaces.Box(0, 1, (3, 4, 5))), image, "space")


class Held:
    """A batch policy with a memory: it counts the steps of each wave."""

    batched = True

    def start_wave(self, num_envs: int) -> None:
        self.steps = np.zeros(num_envs)

    def __call__(self, observations: Any, rng: np.random.Generator) -> Any:  # noqa: ANN401
        self.steps += 1
        return np.stack([0.1 * self.steps, rng.uniform(-0.1, 0.1, len(observations))], axis=1)


def test_it_takes_what_collect_takes(shield: Shield) -> None:
    start = np.array([1.9, 0.0], np.float32)
    batch = np.tile(start, (3, 1))
    policy = ShieldedPolicy(lambda observation: observation * 0.25, shield)
    np.testing.assert_allclose(policy.predict(start)[0], start * 0.25)
    np.testing.assert_allclose(policy.predict(batch)[0], batch * 0.25)
    into = ShieldedPolicy(lambda _: np.array([1.0, 0.0]), shield)
    into.predict(np.array([-1.2, 0.5], np.float32))
    assert into.report.intervened
    assert ShieldedPolicy("random", shield, seed=0).predict(batch)[0].shape == (3, 2)
    held = ShieldedPolicy(Held(), shield, seed=0)
    ends = [held.predict(start, episode_start=np.array([t == 3]))[0][0] for t in range(5)]
    np.testing.assert_allclose(ends, [0.1, 0.2, 0.3, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(held.predict(batch)[0][:, 0], 0.1)
    with pytest.raises(TypeError, match="policy must be"):
        ShieldedPolicy(3, shield)


def test_empty_batches(shield: Shield) -> None:
    none = np.zeros((0, 2), np.float32)
    assert shield.value(none).shape == shield.value(none, none).shape == (0,)
    executed, report = shield.filter(none, none)
    assert executed.shape == (0, 2)
    assert np.shape(report.value) == (0,)
    assert shield.certified(none).shape == (0,)
