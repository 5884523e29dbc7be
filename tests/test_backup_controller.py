"""A backup controller: its values, its execution, its name in files, and its failures."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield import OfflineDataset, SafetyShield, Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.envs.boat import ROCK_CENTRES, BoatVectorEnv
from safeshield.envs.double_integrator import DoubleIntegratorVectorEnv, constraint, next_state
from safeshield.exact.double_integrator import value as exact_value
from safeshield.rollouts.policies import HandOver, batch_policy
from safeshield.shield import BackupController
from safeshield.shield.backup import register_backup
from safeshield.shield.replacement import describe
from safeshield.spaces.scaling import Scaling
from safeshield.training.escape import Escape, UnseenBackupWarning
from safeshield.values.named import UnregisteredError

G = 0.997


def braking(strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """A controller that brakes at most at this strength, and then stands still."""
    return lambda observations: -np.clip(observations[:, 1:] / 0.05, -strength, strength)


brake, brake_late = braking(1.0), braking(0.5)
register_backup("test-brake@1")(brake)
register_backup("test-half@1")(brake_late)


@register_backup("test-aside@1")
def aside(observations: np.ndarray) -> np.ndarray:
    """Steer the boat away from the first rock."""
    offset = observations - ROCK_CENTRES[0]
    return np.asarray(offset / np.linalg.norm(offset, axis=1, keepdims=True))


def simulated(states: np.ndarray, controller: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """V_mu by a rollout of the controller and the discounted backup, from the last step to s."""
    reached = [constraint(states)]
    for _ in range(500):
        states = next_state(states, controller(states))
        reached.append(constraint(states))
    value = reached[-1]
    for before, after in zip(reached[-2::-1], reached[:0:-1], strict=True):
        m = np.maximum(before, after)
        value = (1.0 - G) * m + G * np.maximum(m, value)
    return np.asarray(value)


@batch_policy
def careless(observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Full acceleration to a side that changes now and then with the position."""
    side = np.sign(np.sin(7.0 * observations[:, :1]) + rng.normal(0.0, 0.5, (len(observations), 1)))
    return np.where(rng.random(side.shape) < 0.5, side, rng.uniform(-1.0, 1.0, side.shape))


@pytest.fixture(scope="module")
def carts() -> OfflineDataset:
    """Carts that are handed over to the brake, or to the half brake."""
    envs = DoubleIntegratorVectorEnv(100, max_episode_steps=80)
    logs = [
        collect(envs, HandOver(careless, one, envs.single_action_space, 15.0), 300, seed)
        for seed, one in enumerate((brake, brake_late))
    ]
    return OfflineDataset.concat(logs)


def trained(log: OfflineDataset, backup: str) -> Shield:
    config = ShieldConfig(
        backup=backup,
        safety_discount=G,
        safety_expectile=0.5,
        critic_hidden=(48, 48),
        behaviour_hidden=(16,),
        fallback_hidden=(16,),
        phase_shares=(0.96, 0.02, 0.02),
        polyak=0.02,  # Values spread in half as many updates as with the default.
    )
    return ShieldTrainer(config, device="cpu").fit(log, steps=2000).shield()


@pytest.fixture(scope="module")
def shields(carts: OfflineDataset) -> dict[str, Shield]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnseenBackupWarning)
        return {name: trained(carts, name) for name in ("test-brake@1", "test-half@1")}


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    axes = np.meshgrid(np.linspace(-0.95, 0.95, 39), np.linspace(-1.9, 1.9, 39), indexing="ij")
    return np.stack(axes, -1).reshape(-1, 2)


def test_the_rollout_of_the_brake_is_the_exact_value(grid: np.ndarray) -> None:
    """The reference of the next test: for full braking, V_mu is the value, but for the discount."""
    discounted, exact = simulated(grid, brake), exact_value(grid, dt=0.05)
    assert (discounted <= exact + 1e-9).all()
    assert np.abs(discounted - exact).mean() < 0.02


@pytest.mark.parametrize("name", ["test-brake@1", "test-half@1"])
def test_values_are_those_of_executing_the_controller(
    shields: dict[str, Shield], grid: np.ndarray, name: str
) -> None:
    """V_h is V_mu within 7 cm in the mean near V_mu = 0; the two controllers differ by 18 cm."""
    learned = np.asarray(shields[name].value(grid))
    truth = simulated(grid, {"test-brake@1": brake, "test-half@1": brake_late}[name])
    near = np.abs(truth) < 0.4
    assert np.abs(learned - truth)[near].mean() < 0.07
    assert ((learned <= 0) == (truth <= 0)).mean() > 0.95


def test_a_worse_controller_has_higher_values(shields: dict[str, Shield], grid: np.ndarray) -> None:
    better, worse = (
        np.asarray(shields[f"test-{name}@1"].value(grid)) for name in ("brake", "half")
    )
    truth = (simulated(grid, brake_late) - simulated(grid, brake)).mean()
    assert (worse - better).mean() > 0.5 * truth > 0.0


def test_the_default_expectile_is_cautious(carts: OfflineDataset, grid: np.ndarray) -> None:
    """Of the states that the controller loses, hardly any is called safe."""
    config = ShieldConfig(
        backup="test-brake@1",
        critic_hidden=(32, 32),
        behaviour_hidden=(16,),
        fallback_hidden=(16,),
        phase_shares=(0.96, 0.02, 0.02),
    )
    shield = ShieldTrainer(config, device="cpu").fit(carts, steps=1500).shield()
    lost = simulated(grid, brake) > 0.05
    assert (np.asarray(shield.value(grid))[lost] <= 0).mean() < 0.02


def test_a_rejected_action_is_replaced_by_the_controller(
    shields: dict[str, Shield], grid: np.ndarray
) -> None:
    """Acceptable or not, as with `CommittedFallback`; an accepted action passes unchanged."""
    shield = shields["test-brake@1"]
    push = np.sign(grid[:, 1:]).astype(np.float32)
    executed, report = shield.filter(grid, push)
    rejected = np.asarray(report.intervened)
    assert 0.1 < rejected.mean() < 0.9
    np.testing.assert_array_equal(executed[~rejected], push[~rejected])
    np.testing.assert_allclose(executed[rejected], brake(grid)[rejected], atol=1e-6)
    q = np.asarray(shield.value(grid, brake(grid)))
    np.testing.assert_allclose(np.asarray(report.value)[rejected], q[rejected], atol=1e-5)
    assert not np.asarray(report.acceptable).all(), "some states are lost"


def test_files_hold_the_name_and_a_missing_controller_is_an_error(
    shields: dict[str, Shield], grid: np.ndarray, tmp_path: Path, forgotten: None
) -> None:
    path = tmp_path / "shield.safetensors"
    mine = shields["test-brake@1"].with_backup(BackupController("test-mine@1", brake))
    mine.save(path)
    same = Shield.load(path)
    assert describe(same.replacement) == "BackupController(name=test-mine@1)"
    action = np.array([1.0], "f4")
    env = gym.make("safeshield/DoubleIntegrator-v0")
    for call in (
        lambda: same.filter(grid[0], action),
        lambda: same.value(grid),
        lambda: SafetyShield(env, same),
    ):
        with pytest.raises(UnregisteredError, match=r"'test-mine@1' is not reg.*with_backup"):
            call()
    given = same.with_backup(lambda observations: brake(observations))
    assert describe(given.replacement) == describe(mine.replacement), "it gets the shield's name"
    push = np.sign(grid[:, 1:]).astype(np.float32)
    np.testing.assert_array_equal(given.filter(grid, push)[0], mine.filter(grid, push)[0])
    register_backup("test-mine@1")(brake)
    np.testing.assert_array_equal(same.filter(grid, push)[0], mine.filter(grid, push)[0])
    again = pickle.loads(pickle.dumps(same.replacement))
    assert again.available


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget the controller that a test registers."""
    yield
    BackupController._known.pop("test-mine@1", None)


def test_a_trainer_from_a_file_knows_its_controller(carts: OfflineDataset, tmp_path: Path) -> None:
    config = ShieldConfig(backup="test-brake@1", critic_hidden=(8,), behaviour_hidden=(8,))
    ShieldTrainer(config, device="cpu").fit(carts, steps=3).save(tmp_path / "agent.safetensors")
    again = ShieldTrainer.load(tmp_path / "agent.safetensors", device="cpu")
    assert again.shield().replacement == BackupController("test-brake@1")


def test_another_controller_drops_the_record(shields: dict[str, Shield]) -> None:
    env = gym.make("safeshield/DoubleIntegrator-v0")
    told = shields["test-brake@1"].calibrate(
        env, epsilon=0.9, confidence=0.5, policy="random", deltas=[0.2]
    )
    assert told.record is not None
    assert told.record.replacement == "BackupController(name=test-brake@1)"
    assert told.with_backup("test-brake@1").record == told.record
    assert told.with_backup(brake).record == told.record
    assert told.with_backup("test-half@1").record is None
    assert told.with_backup(lambda observations: -observations[:, 1:]).record is None
    with pytest.raises(TypeError, match="got None"):
        told.with_backup(None)
    with pytest.raises(TypeError, match="a backup must be a registered name"):
        told.with_backup(3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_action_that_is_no_number_is_never_executed(
    shields: dict[str, Shield], grid: np.ndarray, bad: float
) -> None:
    """The learned fallback acts in its place; the report says that nothing is acceptable."""
    shield = shields["test-brake@1"]
    fails = grid[:, 0] > 0.0

    def broken(observations: np.ndarray) -> np.ndarray:
        return np.where(observations[:, :1] > 0.0, bad, brake(observations))

    push = np.sign(grid[:, 1:]).astype(np.float32)
    executed, report = shield.with_backup(broken).filter(grid, push)
    rejected = np.asarray(report.intervened)
    gone = rejected & fails
    assert gone.any()
    fallback = shield.model.fallback_alone(shield.states(grid.astype(np.float32)))
    np.testing.assert_allclose(executed[gone], fallback[gone], atol=1e-6)
    assert not np.asarray(report.acceptable)[gone].any()
    assert np.isinf(np.asarray(report.value)[gone]).all()
    healthy = shield.filter(grid, push)[0]
    np.testing.assert_array_equal(executed[~fails], healthy[~fails])


def test_the_controller_is_not_asked_about_what_cannot_be_read(shields: dict[str, Shield]) -> None:
    asked = []

    def recorded(observations: np.ndarray) -> np.ndarray:
        asked.append(observations)
        return brake(observations)

    shield = shields["test-brake@1"].with_backup(recorded)
    executed, report = shield.filter([[np.nan, 1.0], [0.9, 1.5]], [[1.0], [1.0]])
    assert np.concatenate(asked).tolist() == [[0.9, 1.5]]
    assert np.isfinite(executed).all()
    assert executed[1].tolist() == [-1.0]
    assert not report.valid[0]
    assert not report.acceptable[0]
    # A proposal that is not a number is replaced by the controller's action.
    executed, report = shield.filter([[0.0, 0.5]], [[np.nan]])
    assert executed[0].tolist() == [-1.0]
    assert not report.valid[0]


def test_a_wrong_shape_is_an_error(shields: dict[str, Shield]) -> None:
    shield = shields["test-brake@1"].with_backup(lambda observations: np.zeros((1, 1)))
    with pytest.raises(ValueError, match="must return 2 actions for 2 observations"):
        shield.filter([[0.9, 1.5], [0.9, 1.6]], [[1.0], [1.0]])


def test_a_model_with_predict_can_be_the_controller(shields: dict[str, Shield]) -> None:
    class Model:
        def predict(
            self, observation: np.ndarray, deterministic: bool = False
        ) -> tuple[np.ndarray, None]:
            assert deterministic
            return brake(observation), None

    executed, _ = shields["test-brake@1"].with_backup(Model()).filter([0.9, 1.5], [1.0])
    assert executed.tolist() == [-1.0]


def test_training_refuses_what_it_cannot_use(carts: OfflineDataset) -> None:
    with pytest.raises(UnregisteredError, match="'nowhere@1' is not registered"):
        ShieldTrainer(ShieldConfig(backup="nowhere@1")).fit(carts, steps=3)
    with pytest.raises(ValueError, match="backup must be None where support_weight is set"):
        ShieldConfig(backup="test-brake@1", support_weight=1.0)
    late = BackupController("late@1", lambda obs: np.where(obs[:, 1:] > 1.0, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"'late@1' must return a finite action.*got \[nan\]"):
        Escape.of(late, carts, Scaling.of(carts), torch.device("cpu"))


def test_the_log_is_followed_as_long_as_it_follows_the_controller(carts: OfflineDataset) -> None:
    """`last` is the greatest index that is reached through actions of the controller alone."""
    log = carts.select(range(40))
    escape = Escape.of(
        BackupController.find("test-brake@1"), log, Scaling.of(log), torch.device("cpu")
    )
    same = np.abs(brake(log.observations) - log.actions).max(axis=1) <= 0.01
    np.testing.assert_array_equal(escape.logged.numpy(), same)
    assert 0.2 < same.mean() < 0.95
    ends = set((log.episode_starts + log.episode_lengths - 1).tolist())
    for t in np.flatnonzero(same):
        last = int(t)
        while last not in ends and same[last + 1]:
            last += 1
        assert escape.last[t] == last


def test_a_controller_that_the_log_does_not_show_is_warned_of() -> None:
    """Boats that always steer downstream, and a controller that steers away from a rock."""
    envs = BoatVectorEnv(20, max_episode_steps=60)

    @batch_policy
    def downstream(observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.tile([1.0, 0.0], (len(observations), 1)) + rng.normal(0, 0.05, observations.shape)

    log = collect(envs, downstream, 60, seed=0)
    controller = BackupController.find("test-aside@1")
    with pytest.warns(UnseenBackupWarning, match=r"does in \d+% of the log's states.*HandOver"):
        Escape.of(controller, log, Scaling.of(log), torch.device("cpu"))
    shown = collect(envs, HandOver(downstream, aside, envs.single_action_space, 20.0), 60, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnseenBackupWarning)
        Escape.of(controller, shown, Scaling.of(shown), torch.device("cpu"))


def test_hand_over_happens_once_and_lasts() -> None:
    """Each episode is the first policy's up to a step, geometrically drawn, then the second's."""
    box = gym.spaces.Box(-1.0, 1.0, (1,))
    policy = HandOver(lambda _: np.ones(1), lambda obs: -np.ones((len(obs), 1)), box, 9.0)
    rng = np.random.default_rng(0)
    policy.start_wave(4000)
    played = np.stack([policy(np.zeros((4000, 2)), rng)[:, 0] for _ in range(150)])
    assert (np.diff(played, axis=0) <= 0).all()
    assert (played[-1] == -1).all()
    before = (played > 0).sum(axis=0)
    assert abs(before.mean() - 9.0) < 0.6, "standard error 0.15"
    policy.start_wave(4000)
    assert (policy(np.zeros((4000, 2)), rng) > 0).mean() > 0.85
    for steps in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="mean_steps must be finite and above 0"):
            HandOver("random", aside, box, steps)


def test_a_backup_of_one_observation_does_not_act_in_all_environments() -> None:
    box = gym.spaces.Box(-1.0, 1.0, (1,))
    policy = HandOver("random", lambda _: np.ones((1, 1)), box, mean_steps=5.0)
    with pytest.raises(
        ValueError, match=r"one action for each of 3 .* shape \(3, 1\), got \(1, 1\)"
    ):
        policy(np.zeros((3, 2)), np.random.default_rng(0))
