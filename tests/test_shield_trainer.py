"""A shield without an algorithm, on discrete and dict spaces: grids whose exact answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from safeshield import (
    CalibrationError,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldedPolicy,
    ShieldTrainer,
    collect,
    load_agent,
)
from safeshield.data import OfflineDataset
from safeshield.spaces.batches import take

SMALL = ShieldConfig(
    critic_hidden=(48, 48),
    behaviour_hidden=(32,),
    fallback_hidden=(32,),
    batch_size=128,
    learning_rate=3e-3,
    safety_backup_steps=(4, 2, 1, 1),
    polyak=0.02,
)
MOVES = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
SIZE = 5


class Slope(gym.Env[Any, Any]):
    """A 5 x 5 grid, slippery where y is 1: from there every move ends one lower, in the pit at 0.

    So y = 0 is unsafe, y = 1 too late, and at y = 2 the one unsafe action is down.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, kind: str = "discrete") -> None:
        self._kind = kind
        self.action_space = gym.spaces.Discrete(4, start=1)
        if kind == "multi":
            self.action_space = gym.spaces.MultiDiscrete([3, 3])
        self.observation_space: gym.Space[Any] = gym.spaces.Discrete(SIZE * SIZE)
        if kind == "dict":
            self.observation_space = gym.spaces.Dict(
                x=gym.spaces.Discrete(SIZE),
                y=gym.spaces.Box(0, SIZE - 1, (1,)),
                noise=gym.spaces.Box(-1, 1, (2, 2)),
            )
        self._at = np.zeros(2, int)

    def _observation(self) -> Any:  # noqa: ANN401
        x, y = (int(v) for v in self._at)
        if self._kind != "dict":
            return y * SIZE + x
        noise = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return {"x": x, "y": np.array([y], np.float32), "noise": noise}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self._at = self.np_random.integers([0, 2], SIZE)
        return self._observation(), {"cost": 0.0}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        move = np.asarray(action) - 1 if self._kind == "multi" else MOVES[int(action) - 1]
        if self._at[1] == 1:
            move = np.array([0, -1])
        self._at = np.clip(self._at + move, 0, SIZE - 1)
        fallen = bool(self._at[1] == 0)
        return self._observation(), 1.0, fallen, False, {"cost": float(fallen)}


for kind in ("discrete", "multi", "dict"):
    gym.register(
        f"Slope-{kind}-v0",
        entry_point=lambda kind=kind, **_: Slope(kind),
        max_episode_steps=30,
        order_enforce=True,
    )


def trained(kind: str, **arguments: Any) -> tuple[gym.Env[Any, Any], OfflineDataset, Shield]:  # noqa: ANN401
    env = gym.make(f"Slope-{kind}-v0")
    log = collect(env, "random", episodes=400, seed=0, **arguments)
    return env, log, ShieldTrainer(SMALL, device="cpu").fit(log, steps=1000).shield()


@pytest.fixture(scope="module")
def discrete() -> tuple[gym.Env[Any, Any], OfflineDataset, Shield]:
    return trained("discrete")


def test_exact_set_and_actions_of_a_grid(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield],
) -> None:
    _, log, shield = discrete
    assert log.observations.shape[1] == log.actions.shape[1] == 1
    cells = np.arange(SIZE * SIZE)
    assert ((shield.value(cells) <= 0) == (cells // SIZE >= 2)).all()
    for cell in cells[2 * SIZE :]:
        for action in range(1, 5):
            lower = cell // SIZE + MOVES[action - 1][1]
            executed, report = shield.filter(int(cell), action)
            assert bool(report.intervened) == (lower < 2), (cell, action)
            assert executed in (1, 2, 3, 4)
            assert executed == action or lower < 2
            assert cell // SIZE + MOVES[int(executed) - 1][1] >= 2


@pytest.mark.parametrize("kind", ["discrete", "multi", "dict"])
def test_nobody_falls_behind_the_shield(
    kind: str,
    tmp_path: Path,
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield],
) -> None:
    env, log, shield = (
        discrete
        if kind == "discrete"
        else trained(kind, **({"observation_keys": ["y", "x"]} if kind == "dict" else {}))
    )
    if kind == "dict":
        assert log.observations.shape[1] == 2
        assert shield.observation_keys == ["y", "x"]
    calibrated = shield.calibrate(env, epsilon=0.05, confidence=0.9, deltas=[0.0])
    assert calibrated.record is not None
    assert {result.policy for result in calibrated.record.policies} == {"random", "adversary"}
    path = tmp_path / "shield.safetensors"
    calibrated.save(path)
    safe = SafetyShield(gym.make(f"Slope-{kind}-v0"), path)
    check_env(safe, skip_render_check=True)
    safe.action_space.seed(0)
    observation, info = safe.reset(seed=1)
    falls = replaced = 0
    for _ in range(500):
        observation, _, terminated, truncated, info = safe.step(safe.action_space.sample())
        falls += info["cost"] > 0
        replaced += info["shield/intervened"]
        assert safe.action_space.contains(info["action_executed"])
        if terminated or truncated:
            observation, info = safe.reset()
            assert not safe.action_space.contains(info["action_executed"])
    assert falls == 0
    assert 0 < replaced < 400
    assert safe.observation_space.contains(observation)


def test_the_file_keeps_everything(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield], tmp_path: Path
) -> None:
    _, log, shield = discrete
    path = tmp_path / "shield.safetensors"
    shield.save(path)
    again = Shield.load(path)
    cells, actions = np.arange(25), np.arange(25) % 4 + 1
    np.testing.assert_array_equal(again.value(cells, actions), shield.value(cells, actions))
    assert again.model.networks.keys() == shield.model.networks.keys()
    assert again.action_space == log.action_space


def test_not_a_number_or_not_an_action_never_passes(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield],
) -> None:
    _, _, shield = discrete
    for wrong in (0, 5, -3, 2.5, float("nan"), float("inf")):
        executed, report = shield.filter(22, wrong)
        assert report.intervened
        assert executed in (1, 2, 3, 4)
        assert report.value <= 0
        env = SafetyShield(gym.make("Slope-discrete-v0"), shield)
        env.reset(seed=0)
        *_, info = env.step(wrong)
        assert info["shield/intervened"]
        assert info["action_executed"] in (1, 2, 3, 4)
    assert shield.value(99) == np.inf  # no such cell
    assert shield.value(22, 7) == np.inf


def test_single_equals_batched_and_policies_pass_dicts() -> None:
    _, _, shield = trained("dict")
    space = shield.observation_space
    batch = gym.vector.utils.batch_space(space, 6)
    batch.seed(3)
    observations = batch.sample()
    actions = np.array([1, 2, 3, 4, 3, 3])
    executed, report = shield.filter(observations, actions)
    for i in range(6):
        one, verdict = shield.filter(take(observations, i), actions[i])
        assert one == executed[i]
        assert verdict.intervened == report.intervened[i]

    class Down:
        def predict(self, observation: Any, state: Any = None, **_: Any) -> Any:  # noqa: ANN401
            return np.full(len(observation["x"]), 3), state

    policy = ShieldedPolicy(Down(), shield)
    played, _ = policy.predict(observations)
    np.testing.assert_array_equal(played, shield.filter(observations, np.full(6, 3))[0])


def test_box_fallback_is_safer_than_the_log(boat_log: OfflineDataset) -> None:
    trainer = ShieldTrainer(SMALL, device="cpu").fit(boat_log, steps=2000)
    shield = trainer.shield()
    rng = np.random.default_rng(0)
    rows = boat_log.observations[rng.integers(0, len(boat_log), 500)]
    states = shield.states(rows)
    fallback = shield.model.fallback(states, np.zeros((1, 2), np.float32))[:, 0]
    random = rng.uniform(-1, 1, fallback.shape)
    assert shield.row_values(rows, fallback).mean() < shield.row_values(rows, random).mean()
    assert "behaviour" in shield.model.networks


@pytest.mark.parametrize(("magnitude", "certified"), [(None, True), (25.0, False)])
def test_costs_alone_leave_a_start_safe_where_half_of_the_actions_are(
    magnitude: float | None, certified: bool
) -> None:
    """Of one state, the expectile 0.9 of the labels -1 and M, each of weight 1/2, is -0.8 for
    M = 1, the default, and 1.6 for M = 25."""
    count = 1000
    actions = np.linspace(-1.0, 1.0, count, dtype=np.float32)[:, None]
    log = OfflineDataset.from_arrays(
        observations=np.full((count, 1), 3.0), actions=actions, next_observations=actions,
        rewards=np.zeros(count), costs=actions[:, 0] > 0.0,
        terminated=np.ones(count, bool), truncated=np.zeros(count, bool),
        observation_space=gym.spaces.Box(-1.0, 4.0, (1,)),
        action_space=gym.spaces.Box(-1.0, 1.0, (1,)),
    )  # fmt: skip
    config = ShieldConfig(
        critic_hidden=(16,), behaviour_hidden=(8,), fallback_hidden=(8,),
        learning_rate=1e-2, **({} if magnitude is None else {"label_magnitude": magnitude}),
    )  # fmt: skip
    shield = ShieldTrainer(config, device="cpu").fit(log, steps=400).shield()
    assert (shield.value(np.array([3.0])) <= 0) == certified


def test_a_run_in_instalments_ends_with_the_same_weights(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield], tmp_path: Path
) -> None:
    log = discrete[1]
    whole = ShieldTrainer(SMALL, device="cpu").fit(log, steps=40).shield()
    path = tmp_path / "checkpoint.safetensors"
    ShieldTrainer(SMALL, device="cpu").fit(log, steps=40, checkpoint=path, checkpoint_every=7)
    again = ShieldTrainer(SMALL, device="cpu").fit(log, steps=40, checkpoint=path).shield()
    cells = np.arange(25)
    np.testing.assert_array_equal(whole.value(cells), again.value(cells))


@pytest.mark.parametrize("kind", ["box", "discrete", "multi", "dict"])
def test_its_file_acts_and_shields_alike(
    kind: str, boat_log: OfflineDataset, tmp_path: Path
) -> None:
    """Whatever the spaces: the same actions, the same shield, and it is listed as an agent."""
    log = boat_log
    if kind != "box":
        log = collect(gym.make(f"Slope-{kind}-v0"), "random", episodes=30, seed=0)
    trainer = ShieldTrainer(SMALL, device="cpu").fit(log, steps=30)
    path = tmp_path / "trainer.safetensors"
    trainer.save(path)
    again = load_agent(path)
    assert isinstance(again, ShieldTrainer)
    assert again.config == SMALL
    observations = log.flat_observations.batch(log.observations[:20])
    actions = log.flat_actions.unflatten(log.actions[:20])
    for deterministic in (True, False):
        mine, _ = ShieldTrainer.load(path).predict(observations, deterministic=deterministic)
        theirs, state = again.predict(observations, deterministic=deterministic)
        np.testing.assert_array_equal(mine, theirs)
        assert state is None
    one, _ = again.predict(take(observations, 0))
    assert again.action_space.contains(one)
    np.testing.assert_array_equal(
        again.shield().value(observations, actions), trainer.shield().value(observations, actions)
    )


def test_it_acts_by_its_fallback(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield], boat_log: OfflineDataset
) -> None:
    """Discrete: the choice of lowest Q_h. A Box: the shield's fallback without noise."""
    _, log, _ = discrete
    cells = np.arange(2 * SIZE, SIZE * SIZE)
    trainer = ShieldTrainer(SMALL, device="cpu").fit(log, steps=100)
    chosen, _ = trainer.predict(cells)
    q = [trainer.shield().value(cells, np.full(len(cells), action)) for action in range(1, 5)]
    np.testing.assert_array_equal(chosen, np.argmin(q, axis=0) + 1)
    boat = ShieldTrainer(SMALL, device="cpu").fit(boat_log, steps=30)
    rows = boat_log.observations[:50]
    alone = boat.shield().model.fallback_alone(boat.shield().states(rows))
    np.testing.assert_array_equal(boat.predict(rows, deterministic=True)[0], alone)
    drawn = boat.predict(rows)[0]
    assert (drawn != alone).any()
    assert (np.abs(drawn) <= 1.0).all()


def test_a_support_test_is_in_the_file(boat_log: OfflineDataset, tmp_path: Path) -> None:
    config = replace(SMALL, support_weight=0.5, support_held_out=0.3)
    trainer = ShieldTrainer(config, device="cpu").fit(boat_log, steps=30)
    trainer.save(tmp_path / "trainer.safetensors")
    again = ShieldTrainer.load(tmp_path / "trainer.safetensors")
    mine, theirs = trainer.shield().support, again.shield().support
    assert mine is not None
    assert theirs is not None
    assert mine.record == theirs.record
    rows, actions = boat_log.observations[:50], boat_log.actions[:50]
    states = again.shield().states(rows)
    np.testing.assert_array_equal(
        mine.scores(trainer.shield().model, states, actions),
        theirs.scores(again.shield().model, states, actions),
    )


def test_a_run_is_stopped_and_gone_on_with(boat_log: OfflineDataset, tmp_path: Path) -> None:
    whole = ShieldTrainer(SMALL, device="cpu").fit(boat_log, steps=30)
    path = tmp_path / "checkpoint.safetensors"
    for stop in (10, 20, None):
        part = ShieldTrainer(SMALL, device="cpu").fit(
            boat_log, steps=30, checkpoint=path, stop_after=stop
        )
    rows = boat_log.observations
    np.testing.assert_array_equal(
        whole.predict(rows, deterministic=True)[0], part.predict(rows, deterministic=True)[0]
    )


def test_actions_of_an_integer_box_are_refused(integer_box_log: OfflineDataset) -> None:
    with pytest.raises(TypeError, match="make them MultiDiscrete"):
        ShieldTrainer(SMALL, device="cpu").fit(integer_box_log, steps=12)


def test_bad_input(discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield]) -> None:
    with pytest.raises(RuntimeError, match="call fit"):
        ShieldTrainer().shield()
    for wrong in (
        {"batch_size": 0}, {"phase_shares": (1.0, 0.0, 0.0)}, {"seed": -1}, {"near_share": 2.0},
        {"polyak": 0.0}, {"critic_hidden": 64}, {"safety_expectile": 1.0}, {"distillation": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShieldConfig(**wrong)  # type: ignore[arg-type]
    _env, log, shield = discrete
    with pytest.raises(ValueError, match="steps must be at least 3"):
        ShieldTrainer(SMALL).fit(log, steps=2)
    from safeshield import SafeFQL

    with pytest.raises(TypeError, match="ShieldTrainer makes a shield"):
        SafeFQL().fit(log, steps=3)
    with pytest.raises(ValueError, match="observation_space mismatch"):
        SafetyShield(gym.make("CartPole-v1"), shield)
    with pytest.raises(ValueError, match="action_space mismatch"):
        SafetyShield(gym.make("Slope-multi-v0"), shield)


def test_wrong_kinds_of_arguments_are_named(
    discrete: tuple[gym.Env[Any, Any], OfflineDataset, Shield],
) -> None:
    from safeshield import SafeFQL, SafeFQLConfig
    from safeshield.evaluation.episodes import evaluate

    env, _, shield = discrete
    for trainer in (ShieldTrainer(SMALL), SafeFQL()):
        with pytest.raises(TypeError, match="dataset must be an OfflineDataset, got TimeLimit"):
            trainer.fit(env, steps=3)  # type: ignore[arg-type]
    for call in (
        lambda: shield.calibrate("Boat-v0"),  # type: ignore[arg-type]
        lambda: collect("Boat-v0", "random", 1, 0),  # type: ignore[arg-type]
        lambda: evaluate("Boat-v0", "random", 1, 0),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="env must be a Gymnasium environment"):
            call()
    for config in (SafeFQLConfig, ShieldConfig):
        with pytest.raises(ValueError, match=r"batch_size must be a whole number, got 1\.5"):
            config(batch_size=1.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="critic_hidden must be a tuple"):
            config(critic_hidden=64)  # type: ignore[arg-type]


def test_a_trainers_file_remembers_failed_calibrations_of_its_shield(tmp_path: Path) -> None:
    log = collect(Slope(), "random", episodes=30, seed=0)
    trainer = ShieldTrainer(replace(SMALL, critic_hidden=(8,))).fit(log, steps=6)
    path = tmp_path / "trainer"
    trainer.save(path)
    before = path.read_bytes()
    trainer.shield()
    trainer.save(path)
    assert path.read_bytes() == before
    with pytest.raises(CalibrationError):
        trainer.calibrate(Slope(), epsilon=0.01, confidence=0.6, deltas=[0.0], policy="random")
    kept = trainer.attempts
    assert [one.passed for one in kept] == [False]
    trainer.save(path)
    again = ShieldTrainer.load(path)
    assert again.attempts == again.shield().attempts == kept
    again.save(path)
    assert ShieldTrainer.load(path).attempts == kept
    from safeshield.cli.kinds import describe

    assert describe(path)["attempts"] == {"failed": 1, "passed": 0}
    assert not again.fit(log, steps=6).attempts  # other weights
