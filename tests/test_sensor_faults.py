"""Faults of sensors and actuators, the shield's checks of its sensors, and tests under faults."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.utils.env_checker import check_env
from matplotlib.figure import Figure
from matplotlib.text import Text
from stable_baselines3.common.vec_env import DummyVecEnv
from test_shield import record
from typer.testing import CliRunner

from safeshield.algorithms.safefql import SafeFQL
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.cli import app
from safeshield.data import OfflineDataset, collect
from safeshield.evaluation import FAULT_KINDS, StressTest, stress
from safeshield.policies import ShieldedPolicy
from safeshield.rollouts.copies import ACTUATOR_FAULTS, SENSOR_FAULTS
from safeshield.rollouts.policies import batch_policy
from safeshield.shield import Shield
from safeshield.shield.report import UNREADABLE, verdicts
from safeshield.shield.sensors import SensorCheck, SensorState, SensorWarning
from safeshield.spaces.generic import BEFORE_1_0
from safeshield.wrappers import (
    ConstraintFromFunction,
    CostFromFunction,
    SafetyShield,
    VectorSafetyShield,
)
from safeshield.wrappers import faults as wrappers
from safeshield.wrappers.faults import (
    ControlPeriod,
    DelayedActuator,
    DelayedSensor,
    DroppingSensor,
    LimitedActuator,
    NoisySensor,
    QuantisedSensor,
    StuckSensor,
)
from safeshield.wrappers.sb3 import VecSafetyShield

Env = gym.Env[Any, Any]
Array = npt.NDArray[Any]
STILL = np.zeros(2, np.float32)


def boat(steps: int = 40) -> Env:
    env: Env = gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=steps)
    return env


class Counter(gym.Env[Any, Any]):
    """The observation is the number of steps and the action; h is the number of steps minus 2.5."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, reports: bool = True) -> None:
        self._reports = reports

    def _told(self) -> tuple[Array, dict[str, Any]]:
        h = {"constraint": self._count - 2.5, "cost": float(self._count > 2)}
        return np.array([self._count, self._sent], np.float32), h if self._reports else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self._count, self._sent = 0, 0.0
        return self._told()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self._count, self._sent = self._count + 1, float(action[0])
        observation, info = self._told()
        return observation, 1.0, self._count == 8, False, info


def played(env: Env, actions: list[float]) -> tuple[list[list[float]], list[dict[str, Any]]]:
    observation, info = env.reset(seed=0)
    shown, infos = [observation.tolist()], [info]
    for action in actions:
        observation, _, _, _, info = env.step(np.array([action], np.float32))
        shown.append(observation.tolist())
        infos.append(info)
    return shown, infos


EVERY: dict[str, Callable[[Env], Env]] = {
    "NoisySensor": lambda env: NoisySensor(env, 0.1, bias=[0.1, -0.1]),
    "QuantisedSensor": lambda env: QuantisedSensor(env, 0.25),
    "DroppingSensor": lambda env: DroppingSensor(env, 0.3),
    "StuckSensor": lambda env: StuckSensor(env, 0.1, [0]),
    "DelayedSensor": lambda env: DelayedSensor(env, 2),
    "DelayedActuator": lambda env: DelayedActuator(env, 2),
    "LimitedActuator": lambda env: LimitedActuator(env, 0.5, 0.2),
    "ControlPeriod": lambda env: ControlPeriod(env, 2),
}


def test_every_fault_is_known_to_records() -> None:
    assert set(wrappers.__all__) == {*SENSOR_FAULTS, *ACTUATOR_FAULTS} == set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_a_fault_follows_its_seed_and_its_space_and_is_rebuilt_from_its_spec(name: str) -> None:
    env = EVERY[name](boat())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The checker says that it gets a wrapper.
        check_env(env, skip_render_check=True)
    spec = env.spec
    assert spec is not None
    copy = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json()))
    told = []
    for one in (env, copy, env):
        one.action_space.seed(1)
        rows = [one.reset(seed=5)[0]]
        rows += [one.step(one.action_space.sample())[0] for _ in range(12)]
        assert all(one.observation_space.contains(row) for row in rows)
        told.append(np.stack(rows))
    np.testing.assert_array_equal(told[0], told[1])
    np.testing.assert_array_equal(told[0], told[2])
    env.reset(seed=6)
    np.testing.assert_array_equal(env.unwrapped.state, _start(6))  # type: ignore[attr-defined]


def _start(seed: int) -> Array:
    env = boat()
    env.reset(seed=seed)
    return np.asarray(env.unwrapped.state)  # type: ignore[attr-defined]


ACTIONS = [1.0, -1.0, 0.5, 0.25]
PLAIN = [[0.0, 0.0], [1.0, 1.0], [2.0, -1.0], [3.0, 0.5], [4.0, 0.25]]


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        (lambda env: NoisySensor(env, bias=[1.0, 0.0]), [[t + 1, a] for t, a in PLAIN]),
        (lambda env: QuantisedSensor(env, [2.0, 1.0]), [[0, 0], [0, 1], [2, -1], [4, 0], [4, 0]]),
        (lambda env: DroppingSensor(env, 1.0), [PLAIN[0]] * 5),
        (lambda env: StuckSensor(env, 1.0, [0]), [[0, a] for _, a in PLAIN]),
        (lambda env: DelayedSensor(env, 2), [PLAIN[0], PLAIN[0], *PLAIN[:3]]),
        (lambda env: DelayedActuator(env, 2), [[0, 0], [1, 0], [2, 0], [3, 1], [4, -1]]),
        (lambda env: DelayedActuator(env, 1, [.5]), [[0, 0], [1, .5], [2, 1], [3, -1], [4, 0.5]]),
        (lambda env: LimitedActuator(env, 0.5), [[0, 0], [1, 0.5], [2, -0.5], [3, 0.5], [4, 0.25]]),
        (
            lambda env: LimitedActuator(env, rate=0.75),
            [[0, 0], [1, 0.75], [2, 0], [3, 0.5], [4, 0.25]],
        ),
        (lambda env: ControlPeriod(env, 2), [[0, 0], [2, 1], [4, -1], [6, 0.5], [8, 0.25]]),
    ],
)  # fmt: skip
def test_the_formula_of_each_fault(fault: Callable[[Env], Env], shown: list[list[float]]) -> None:
    seen, infos = played(fault(Counter()), ACTIONS)
    assert seen == shown
    per = 2 if isinstance(fault(Counter()), ControlPeriod) else 1
    # Labels are those of the plant, whatever the sensor shows.
    assert [info["constraint"] for info in infos] == [per * t - 2.5 for t in range(5)]


def test_a_period_misses_no_violation_and_sums_rewards_and_costs() -> None:
    class Brief(Counter):
        def _told(self) -> tuple[Array, dict[str, Any]]:
            observation, _ = super()._told()
            hit = self._count == 1
            return observation, {"constraint": 1.0 if hit else -1.0, "cost": float(hit)}

    env = ControlPeriod(Brief(), 3)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(1, np.float32))
    assert (reward, info["constraint"], info["cost"]) == (3.0, 1.0, 1.0)
    for _ in range(2):
        *_, terminated, _, info = env.step(np.zeros(1, np.float32))
    assert terminated
    assert info["constraint"] == -1.0


def test_nan_is_shown_where_it_is_asked_for_and_never_at_a_start() -> None:
    seen, _ = played(DroppingSensor(Counter(), 1.0, "nan"), ACTIONS)
    assert np.isfinite(seen[0]).all()
    assert np.isnan(seen[1:]).all()


@pytest.mark.parametrize("back", list(itertools.product((False, True), repeat=3)))
def test_a_check_that_warns_hides_none_that_falls_back(back: tuple[bool, ...]) -> None:
    acts = ["fall back" if one else "warn" for one in back]
    check = SensorCheck(
        frozen=(2.0, None), jump=(None, 1.0), age=5.0,
        on_frozen=acts[0], on_jump=acts[1], on_age=acts[2],
    )  # fmt: skip
    for present in itertools.product((False, True), repeat=3):
        frozen, jump, stale = present
        state = SensorState(check, 1, 2, quiet=True)
        for step in range(6):
            last = step == 5
            seen = [0.0 if frozen else 0.1 * step, 9.0 if jump and last else 0.0]
            stamp = time.monotonic() - (60.0 if stale and last else 0.0)
            read = state.read(np.array([seen], np.float32), stamp)
            state.acted(np.array([[0.1 * step]]))
        falls = [on for on, there in zip(back, present, strict=True) if there]
        assert state.fallen.tolist() == [any(falls)]
        assert np.isnan(read).all() == any(falls)
        names = ("frozen", "jump", "stale")
        shown = [n for n, there in zip(names, present, strict=True) if there]
        worst = [n for n, on, there in zip(names, back, present, strict=True) if there and on]
        assert state.first in (worst or shown or [""])


def test_noise_has_its_standard_deviation_and_two_faults_draw_apart() -> None:
    rows = []
    for env in (NoisySensor(Counter(), 0.5), NoisySensor(NoisySensor(Counter(), 0.3), 0.4)):
        one = [np.subtract(played(env, [])[0], PLAIN[:1]) for _ in range(2)]
        np.testing.assert_array_equal(one[0], one[1])
        env.reset(seed=3)
        rows.append(np.array([env.reset()[0] for _ in range(2000)]))
    # 0.3 and 0.4 give 0.5 where the draws are independent, 0.7 where they are the same.
    for spread in (rows[0].std(), rows[1].std()):
        assert spread == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NoisySensor(Counter(), -1.0), "std must be at least 0"),
        (lambda: NoisySensor(Counter(), [1.0]), "std must be one number or one for each entry"),
        (lambda: NoisySensor(Counter(), bias=np.nan), "bias must be finite"),
        (lambda: QuantisedSensor(Counter(), 0.0), "step must be above 0"),
        (lambda: DroppingSensor(Counter(), 1.5), r"probability must lie in \[0, 1\]"),
        (lambda: DroppingSensor(Counter(), 0.5, "zero"), "fill must be 'hold' or 'nan'"),
        (lambda: StuckSensor(Counter(), 0.5, [2]), "entries must be indices from 0 to 1"),
        (lambda: DelayedSensor(Counter(), -1), "steps must be at least 0"),
        (lambda: DelayedActuator(Counter(), 1, [2.0]), "first must be an action"),
        (lambda: LimitedActuator(Counter(), 0.0), "share must be above 0"),
        (lambda: ControlPeriod(Counter(), 0), "steps must be at least 1"),
        (lambda: NoisySensor(gym.make("CliffWalking-v1" if not BEFORE_1_0 else "CliffWalking-v0")), "observation_space must be a Box for NoisySensor"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_fault_is_refused(make: Callable[[], Env], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make()


class Odd(Counter):
    """Its steps return a wrong observation or wrong infos."""

    def __init__(self, shown: Any = None, info: Any = None) -> None:  # noqa: ANN401
        super().__init__()
        self._shown, self._info = shown, info

    def step(self, action: Any) -> Any:  # noqa: ANN401
        observation, *rest, _ = super().step(action)
        return observation if self._shown is None else self._shown, *rest, self._info


@pytest.mark.parametrize("name", [one for one in SENSOR_FAULTS if one != "ControlPeriod"])
def test_an_observation_of_a_wrong_shape_is_told_by_the_fault_that_reads_it(name: str) -> None:
    env = EVERY[name](Odd(np.zeros(3), {}))
    env.reset(seed=0)
    match = rf"{name} needs observations of the shape \(2,\) .* returned one of \(3,\)"
    with pytest.raises(ValueError, match=match):
        env.step(STILL[:1])


@pytest.mark.parametrize(
    ("info", "match"),
    [
        (None, "inside ControlPeriod must return its infos as a dict, .* got NoneType"),
        ({"constraint": "bad"}, r"info\['constraint'\] must be one number, got 'bad'"),
        ({"constraint": {"speed": []}}, r"info\['constraint'\]\['speed'\] must be one number"),
        ({"cost": "bad"}, r"info\['cost'\] must be one number, got 'bad'"),
    ],
)
def test_a_period_tells_what_it_cannot_sum(info: object, match: str) -> None:
    env = ControlPeriod(Odd(info=info), 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=match):
        env.step(STILL[:1])


@pytest.mark.parametrize("name", EVERY)
def test_a_fault_around_a_shield_warns_that_the_shield_does_not_have_it(
    known: Shield, name: str
) -> None:
    env = EVERY[name](SafetyShield(boat(), known))
    with pytest.warns(UserWarning, match=rf"around: SafetyShield\({name}\(env, ...\), shield\)"):
        env.reset(seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        env.reset(seed=1)
        SafetyShield(EVERY[name](boat()), known).reset(seed=0)
    assert not [one for one in told if "stands around a shield" in str(one.message)]


# -- labels of the plant --------------------------------------------------------------------------


def test_no_label_is_computed_from_a_faulty_observation(stored_agent: SafeFQL) -> None:
    noisy = NoisySensor(Counter(reports=False), 0.1)
    repair = r"NoisySensor\(ConstraintFromFunction\(env, ...\), ...\)"
    with pytest.raises(ValueError, match=repair):
        ConstraintFromFunction(gym.wrappers.TimeLimit(noisy, 5), lambda obs: obs[0])
    with pytest.raises(ValueError, match=r"NoisySensor\(CostFromFunction"):
        CostFromFunction(noisy, lambda obs, action, after, info: 0.0)

    class Silent(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            return *self.env.step(action)[:4], {}

    class FromTheSensor(gym.Wrapper[Any, Any, Any, Any]):
        """A label of the user's own, outside the fault."""

        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, info = self.env.step(action)
            return *rest, {**info, "constraint": float(rest[0][0])}

    shield = stored_agent.shield()
    with pytest.raises(ValueError, match=r"inside DelayedSensor must report info\['constraint'\]"):
        shield.calibrate(FromTheSensor(NoisySensor(DelayedSensor(Silent(boat()), 1), 0.1)))


def test_a_calibration_under_faults_lists_them_and_counts_what_the_plant_does(
    stored_agent: SafeFQL,
) -> None:
    shield = stored_agent.shield().with_constraint("Boat@1")
    env = DelayedActuator(NoisySensor(boat(), 0.05), 1)
    easy = {"epsilon": 0.9, "confidence": 0.5, "deltas": [0.3], "num_envs": 4}
    calibrated = shield.calibrate(env, policy="random", **easy)  # type: ignore[arg-type]
    found = calibrated.record
    assert found is not None
    assert [one.name for one in found.faults] == ["NoisySensor", "DelayedActuator"]
    assert not found.sees_the_state
    said = "with the faults NoisySensor(std=0.05, bias=0.0), DelayedActuator(steps=1, first=None),"
    assert said in found.promise
    # In this environment the record applies, and the noise does not contradict the shield's h.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        behind = SafetyShield(env, calibrated)
        flags = [behind.reset(seed=seed)[1]["shield/certified"] for seed in range(8)]
        for _ in range(8):
            flags.append(behind.step(STILL)[-1]["shield/certified"])
    assert any(flags[:8])
    assert flags[8:] == [flags[7]] * 8
    with pytest.warns(UserWarning, match="its wrappers are"):
        SafetyShield(boat(), calibrated)
    plain = shield.calibrate(boat(), policy="random", **easy).record  # type: ignore[arg-type]
    assert plain is not None
    assert plain.faults == ()
    assert "fault" not in plain.promise


# -- the checks of the shield -------------------------------------------------------------------


def walks(episodes: int, seed: int, length: int = 12) -> OfflineDataset:
    """Random walks that rest at times; the third entry is a whole number, the fourth constant."""
    rng = np.random.default_rng(seed)
    scale = rng.gamma(1.0, 1.0, (episodes, 1, 1))  # Steps of one episode are not independent.
    moves = (
        scale * rng.standard_t(3, (episodes, length, 2)) * (rng.random((episodes, length, 2)) > 0.3)
    )
    states = np.concatenate([np.zeros((episodes, 1, 2)), moves.cumsum(axis=1)], axis=1)
    rest = np.stack([rng.integers(0, 3, states.shape[:2]), np.ones(states.shape[:2])], axis=-1)
    states = np.concatenate([states, rest], axis=-1)
    ends = np.arange(length) == length - 1
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    space = {
        "a": gym.spaces.Box(-np.inf, np.inf, (2,)),
        "b": gym.spaces.Discrete(3),
        "c": gym.spaces.Box(-np.inf, np.inf, (1,)),
    }
    before, after = (
        {"a": x[:, :2], "b": x[:, 2].astype(int), "c": x[:, 3:]}
        for x in (flat(states[:, :-1]), flat(states[:, 1:]))
    )
    return OfflineDataset.from_arrays(
        observations=before,
        next_observations=after,
        actions=rng.uniform(-1, 1, (episodes * length, 1)),
        rewards=np.zeros(episodes * length),
        terminated=np.zeros(episodes * length, bool),
        truncated=np.tile(ends, episodes),
        costs=np.tile(ends, episodes).astype(float),
        observation_space=gym.spaces.Dict(space),
        action_space=gym.spaces.Box(-1.0, 1.0, (1,)),
    )


def alarms(check: SensorCheck, log: OfflineDataset) -> npt.NDArray[np.bool_]:
    """Whether each episode of a log has an alarm."""
    starts, lengths = log.episode_starts, log.episode_lengths
    state = SensorState(check, len(starts), log.observations.shape[1], quiet=True)
    state.read(log.observations[starts])
    found = np.zeros(len(starts), np.bool_)
    for step in range(lengths.max()):
        state.acted(log.actions[starts + step])
        state.read(log.next_observations[starts + step])
        found |= state.found != ""
    return found


@pytest.mark.parametrize("level", [0.1, 0.4])
def test_false_alarms_are_at_most_the_stated_level(level: float) -> None:
    """P(alarm in a new healthy episode) <= level, over the draw of the log and the episode."""
    repeats, fresh = 40, walks(1000, seed=7)
    rates = []
    for seed in range(repeats):
        check = SensorCheck.from_log(walks(round(4 / level), seed), level)
        rates.append(alarms(check, fresh).mean())
    error = np.std(rates) / np.sqrt(repeats)
    assert np.mean(rates) <= level + 3 * error
    # A level that is never reached would be a test that cannot fail.
    assert np.mean(rates) >= level / 4


def test_a_log_gives_limits_for_continuous_entries_that_change() -> None:
    log = walks(80, seed=1)
    check = SensorCheck.from_log(log, 0.1)
    assert check.jump is not None
    assert check.frozen is not None
    assert [one is None for one in check.jump] == [False, False, True, True]
    assert [one is None for one in check.frozen] == [False, False, True, True]
    assert (check.level, check.episodes) == (0.1, 40)
    # No more than the level of the 40 episodes that set the limits lies beyond them.
    assert alarms(check, log)[1::2].mean() <= 0.1
    with pytest.raises(ValueError, match="needs a log of at least 80 episodes, got 79"):
        SensorCheck.from_log(log.select(np.arange(79)), 0.05 / 1.0)
    with pytest.raises(ValueError, match="level must be a number inside"):
        SensorCheck.from_log(log, 1.0)
    cliff = gym.make("CliffWalking-v0" if BEFORE_1_0 else "CliffWalking-v1", max_episode_steps=5)
    whole = collect(ConstraintFromFunction(cliff, lambda obs: float(obs) - 40.0), "random", 40, 0)
    with pytest.raises(TypeError, match="an entry of the observation that is continuous"):
        SensorCheck.from_log(whole, 0.1)


def test_an_observation_is_frozen_only_while_actions_change() -> None:
    def found(actions: list[float]) -> list[str]:
        state = SensorState(SensorCheck(frozen=(2.0, None)), 1, 2, quiet=True)
        told = []
        for action in actions:
            state.read(np.array([[0.5, 1.0]]))
            told.append(str(state.found[0]))
            state.acted(np.array([[action]]))
        return told

    assert found([0.0] * 9) == [""] * 9
    # The first change of the action is that from the first step to the second.
    assert found([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]) == ["", "", "", "", "frozen", "frozen"]
    assert found([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])[-2:] == ["", "frozen"]


def test_what_is_not_a_reading_neither_jumps_nor_freezes() -> None:
    state = SensorState(SensorCheck(frozen=(1.0,), jump=(1.0,)), 1, 1, quiet=True)
    told = []
    for number in (0.0, np.nan, 9.0, np.nan, np.nan, np.nan, np.inf, np.inf, 9.5):
        state.read(np.array([[number]]))
        told.append(str(state.found[0]))
        state.acted(np.array([[number]]))
    assert told[:6] == [""] * 6
    assert told[6] == ""


def test_environments_that_a_reset_leaves_out_keep_what_was_found() -> None:
    check = SensorCheck(jump=(1.0,), frozen=(0.0,), on_jump="fall back")
    state = SensorState(check, 2, 1, quiet=True)
    state.read(np.array([[0.0], [0.0]]))
    state.acted(np.array([[0.0], [0.0]]))
    assert np.isnan(state.read(np.array([[5.0], [0.5]]))).tolist() == [[True], [False]]
    state.begin(np.array([False, True]))
    rows = state.read(np.array([[5.0], [9.0]]), still=np.array([True, False]))
    assert np.isnan(rows).tolist() == [[True], [False]]
    assert state.found.tolist() == ["jump", ""]


# -- the checks behind the wrappers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Shield:
    """A shield of the boat with a record, which falls back on jumps and frozen observations."""
    path = Path(__file__).parent / "golden" / "agent_safefql.safetensors"
    shield = SafeFQL.load(path, device="cpu").shield().with_constraint("Boat@1").with_delta(0.05)
    falls = {"on_jump": "fall back", "on_frozen": "fall back"}
    check = SensorCheck(jump=(0.2, 0.2), frozen=(2.0, 2.0), **falls)  # type: ignore[arg-type]
    return replace(shield.with_sensors(check), record=record(0.05))


CLEAR = {"state": [-1.5, 1.0]}
"""A state far from the rocks."""


class Shown(gym.Wrapper[Any, Any, Any, Any]):
    """Show the observations in `script` in place of the boat's own, by the number of the step."""

    script: dict[int, Any] = {}  # noqa: RUF012 - tests set it

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        self._at = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self._at += 1
        observation, *rest = self.env.step(action)
        shown = self.script.get(self._at, observation)
        return np.array(observation if shown is None else shown, np.float32), *rest


def changing(step: int) -> Array:
    return np.array([0.1 if step % 2 else -0.1, 0.05], np.float32)


def test_a_jump_is_treated_as_an_observation_that_is_not_readable(known: Shield) -> None:
    inner = Shown(boat())
    inner.script = {3: [1.9, 0.0]}
    env = SafetyShield(inner, known)
    _, info = env.reset(seed=0, options=CLEAR)
    assert (info["shield/sensor"], info["shield/certified"]) == ("", True)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            info = env.step(changing(step))[-1]
            told.append(
                (info["shield/sensor"], info["shield/certified"], info["shield/intervened"])
            )
    assert [str(one.message)[:16] for one in caught] == ["the check 'jump'"]
    assert caught[0].category is SensorWarning
    # The jump away, and the jump back. The action that follows each is the fallback's.
    assert [one[0] for one in told] == ["", "", "jump", "jump", "", ""]
    assert [one[1] for one in told] == [True, True, False, False, False, False]
    assert [one[2] for one in told] == [False, False, False, True, True, False]
    assert env.reset(seed=0, options=CLEAR)[1]["shield/certified"]


def test_checks_that_do_not_run_are_told(known: Shield) -> None:
    state = known.sensor_state()
    with pytest.warns(SensorWarning, match="do not run: frozen, jump; pass sensors=state"):
        known.filter(np.array(CLEAR["state"], np.float32), np.zeros(2, np.float32))
    check = replace(known.sensors, age=5.0)
    aged = replace(known, record=None).with_sensors(check)
    with pytest.warns(SensorWarning, match="do not run: frozen, jump; pass sensors=state"):
        aged.filter(np.array(CLEAR["state"], np.float32), STILL, stamp=time.monotonic())
    with pytest.warns(SensorWarning, match="frozen, jump, age; .* step, and stamp="):
        aged.filter(np.array(CLEAR["state"], np.float32), STILL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SensorWarning)
        known.filter(np.array(CLEAR["state"], np.float32), np.zeros(2, np.float32), sensors=state)


def test_a_stuck_sensor_is_noticed_and_a_warning_alone_changes_nothing(known: Shield) -> None:
    stuck = StuckSensor(boat(), 1.0, [0])
    warned = SensorCheck(frozen=(2.0, 2.0))
    told = {}
    for check in (known.sensors, warned):
        shield = replace(known, sensors=check)
        env = SafetyShield(stuck, replace(shield, record=None))
        env.reset(seed=0, options=CLEAR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            infos = [env.step(changing(step))[-1] for step in range(6)]
        assert [info["shield/sensor"] for info in infos] == ["", "", "", *["frozen"] * 3]
        told[check] = [info["shield/intervened"] for info in infos]
    assert told[known.sensors] == [False] * 4 + [True] * 2
    assert told[warned] == [False] * 6


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "SB3"])
def test_a_new_episode_of_several_environments_is_no_jump(known: Shield, mode: str) -> None:
    jumps = SensorCheck(jump=(0.2, 0.2), on_jump="fall back")
    known = replace(known, record=None, sensors=jumps)
    make = [lambda: boat(7), lambda: boat(11)]
    found, seen = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", SensorWarning)
        if mode == "SB3":
            vec = VecSafetyShield(DummyVecEnv(make), known)  # type: ignore[arg-type]
            vec.seed(3)
            vec.reset()
            for step in range(30):
                rows, *_, infos = vec.step(np.tile(changing(step), (2, 1)))
                seen.append(rows)
                found += [info["shield/sensor"] for info in infos]
        else:
            if BEFORE_1_0:
                inner: Any = gym.vector.SyncVectorEnv(make)
            else:
                modes = gym.vector.AutoresetMode
                inner = gym.vector.SyncVectorEnv(make, autoreset_mode=modes[mode])
            envs = VectorSafetyShield(inner, known)
            envs.reset(seed=3)
            for step in range(30):
                rows, *_, infos = envs.step(np.tile(changing(step), (2, 1)))
                seen.append(rows)
                found += infos["shield/sensor"].tolist()
    assert found == [""] * 60
    # New episodes do begin farther away than a step leads.
    assert (np.abs(np.diff(np.stack(seen), axis=0)) > 0.2).any(axis=-1).sum() >= 4  # type: ignore[arg-type]


def test_the_same_is_found_in_rollouts_in_deployment_and_behind_a_policy(known: Shield) -> None:
    """Calibration and evaluation use `ShieldedProposals`, a user `SafetyShield` or a policy."""
    shield = replace(known, record=None)

    def proposal(seen: Array) -> Array:
        return np.where(np.floor(50 * seen) % 2, 0.5, -0.5).astype(np.float32)

    @batch_policy
    def proposals(observations: Any, rng: np.random.Generator) -> Array:  # noqa: ANN401
        return proposal(np.asarray(observations))

    rollout = ShieldedProposals(shield, proposals)
    policy = ShieldedPolicy(proposals, shield)
    env = SafetyShield(DroppingSensor(boat(), 0.6), shield)
    fallen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(4):
            rollout.start_wave(1)
            observation, _ = env.reset(seed=seed)
            for step in range(40):
                ours = rollout(observation[None], np.random.default_rng(0))[0]
                start = np.array([step == 0])
                also = policy.predict(observation[None], episode_start=start)[0][0]
                observation, _, over, cut, info = env.step(proposal(observation))
                np.testing.assert_array_equal(ours, info["action_executed"])
                np.testing.assert_array_equal(also, info["action_executed"])
                fallen += info["shield/sensor"] != ""
                if over or cut:
                    break
    assert fallen > 2


# -- the age of an observation --------------------------------------------------------------------


def test_an_old_observation_is_not_readable(known: Shield) -> None:
    shield = replace(known, record=None).with_sensors(SensorCheck(age=5.0))
    state, action = np.array(CLEAR["state"], np.float32), STILL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        now = time.monotonic()
        for stamp, fresh in ((now, True), (now - 9.0, False), (now + 9.0, False), (np.nan, False)):
            _, report = shield.filter(state, action, stamp=stamp)
            assert bool(report.valid) is fresh, stamp
            assert np.isfinite(report.state_value) == fresh
        many = np.array([now, now - 9.0])
        _, report = shield.filter(np.stack([state] * 2), np.stack([action] * 2), stamp=many)
        assert report.valid.tolist() == [True, False]
        assert verdicts(report, False)[1] == UNREADABLE
        assert bool(shield.filter(state, action)[1].valid)
    with pytest.raises(ValueError, match="stamp needs a limit of the age"):
        known.filter(state, action, stamp=0.0)


def test_what_is_no_state_of_these_checks_is_refused(known: Shield) -> None:
    rows, actions = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)
    with pytest.raises(TypeError, match=r"shield.sensor_state\(1\) returned, .* got int"):
        known.filter(rows[0], actions[0], sensors=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remembers 1 environments, got 2 observations"):
        known.filter(rows, actions, sensors=known.sensor_state())
    aged = known.with_sensors(SensorCheck(age=5.0))
    now = time.monotonic()
    for state in (None, aged.sensor_state()):
        with pytest.raises(ValueError, match=r"each of 1 observations, got shape \(2,\)"):
            aged.filter(rows[0], actions[0], stamp=[now, now], sensors=state)
    with pytest.raises(ValueError, match="that of a shield with other checks"):
        aged.filter(rows[0], actions[0], sensors=known.sensor_state())
    with pytest.raises(ValueError, match="this shield has none"):
        known.with_sensors(None).filter(rows[0], actions[0], sensors=known.sensor_state())


def test_a_stamp_that_stops_coming_is_stale(known: Shield) -> None:
    aged = known.with_sensors(SensorCheck(age=30.0))
    observation = np.array(CLEAR["state"], np.float32)
    state = aged.sensor_state()
    assert state is not None
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stamp in (None, time.monotonic(), None, None, time.monotonic()):
            _, report = aged.filter(observation, STILL, stamp=stamp, sensors=state)
            found.append((state.first, bool(report.valid)))
        state.begin()
        _, report = aged.filter(observation, STILL, sensors=state)
    assert found == [("", True), ("", True), ("stale", False), ("stale", False), ("", True)]
    assert not report.valid

    class Dying(gym.Wrapper[Any, Any, Any, Any]):
        steps = 0

        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, info = self.env.step(action)
            self.steps += 1
            return *rest, {**info, **({"stamp": time.monotonic()} if self.steps < 3 else {})}

    for make in (
        lambda: SafetyShield(Dying(boat()), replace(aged, record=record(0.05))),
        lambda: VectorSafetyShield(
            gym.vector.SyncVectorEnv([lambda: Dying(boat())]), replace(aged, record=record(0.05))
        ),
    ):
        env: Any = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env.reset(seed=0, options=CLEAR)
            actions = np.resize(STILL, env.action_space.shape)
            infos = [env.step(actions)[-1] for _ in range(5)]
        told = [str(np.ravel(info["shield/sensor"])[0]) for info in infos]
        assert told == ["", "", "stale", "stale", "stale"]
        assert not np.any(infos[-1]["shield/certified"])
        assert np.all(infos[-1]["shield/intervened"])


def test_an_environment_may_report_when_it_measured(known: Shield) -> None:
    class Stamped(gym.Wrapper[Any, Any, Any, Any]):
        late = 0.0

        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, info = self.env.step(action)
            return *rest, {**info, "stamp": time.monotonic() - self.late}

        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            observation, info = self.env.reset(**kwargs)
            return observation, {**info, "stamp": time.monotonic()}

    aged = known.with_sensors(SensorCheck(age=30.0))
    assert aged.record is None
    inner = Stamped(boat())
    env = SafetyShield(inner, replace(aged, record=record(0.05)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env.reset(seed=0, options=CLEAR)
        first = env.step(changing(0))[-1]
        inner.late = 100.0
        second, third = (env.step(changing(step))[-1] for step in (1, 2))
    assert (first["shield/sensor"], first["shield/certified"]) == ("", True)
    assert (second["shield/sensor"], second["shield/certified"]) == ("stale", False)
    assert third["shield/intervened"]
    silent = SafetyShield(boat(), replace(aged, record=record(0.05)))
    with pytest.warns(SensorWarning, match="no stamp came with an observation"):
        silent.reset(seed=0)


# -- files and copies -----------------------------------------------------------------------------


def test_a_file_holds_the_checks_and_only_a_fallback_drops_the_record(
    known: Shield, tmp_path: Path
) -> None:
    plain = replace(known, sensors=None, record=record(0.05))
    plain.save(tmp_path / "plain.safetensors")
    assert b"sensors" not in (tmp_path / "plain.safetensors").read_bytes()
    told = plain.with_sensors(SensorCheck(jump=(0.2, None), age=None))
    assert told.record == plain.record
    assert told.digest == plain.digest
    falls = told.with_sensors(SensorCheck(jump=(0.2, None), on_jump="fall back"))
    assert falls.record is None
    assert falls.digest != plain.digest
    falls.save(tmp_path / "falls.safetensors")
    again = Shield.load(tmp_path / "falls.safetensors")
    assert again.sensors == falls.sensors
    assert again.digest == falls.digest
    assert falls.with_sensors(None).digest == plain.digest
    with pytest.raises(ValueError, match="frozen must hold one limit for each of 2 entries"):
        plain.with_sensors(SensorCheck(frozen=(1.0,)))
    with pytest.raises(ValueError, match=r"to_torch\(\) makes a shield that remembers nothing"):
        falls.to_torch()


def test_an_unreadable_observation_ends_the_promise_for_its_episode_alone(known: Shield) -> None:
    plain = replace(known, sensors=None, record=record(0.05))
    inner = Shown(boat())
    inner.script = {2: [np.nan, 0.0]}
    env = SafetyShield(inner, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0, options=CLEAR)
        flags = [env.step(changing(step))[-1]["shield/certified"] for step in range(4)]
        assert flags == [True, False, False, False]
        assert env.reset(seed=0, options=CLEAR)[1]["shield/certified"]


# -- the matrix -----------------------------------------------------------------------------------


def test_stress_plays_the_matrix_beside_no_shield(stored_agent: SafeFQL, tmp_path: Path) -> None:
    shield = stored_agent.shield().with_delta(0.05)
    found = stress(shield, boat(12), kinds=["lost, NaN", "late action"], episodes=3, num_envs=3)
    assert [(one.fault, one.strength) for one in found.cells] == [
        ("none", 0.0), ("lost, NaN", 0.1), ("lost, NaN", 0.3), ("lost, NaN", 0.6),
        ("late action", 1.0), ("late action", 2.0), ("late action", 4.0),
    ]  # fmt: skip
    assert all(one.shielded.shielded and not one.alone.shielded for one in found.cells)
    assert all(one.shielded.episodes == one.alone.episodes == 3 for one in found.cells)
    replaced = [one.shielded.intervention_rate or 0.0 for one in found.cells]
    # On an observation that is lost the fallback acts.
    assert replaced[3] > 0.4 > replaced[0]
    assert found.table().count("\n") == 8
    assert found.table("markdown").count("\n") == 8
    json.dumps(found.to_json(), allow_nan=False)
    found.picture(tmp_path / "stress.png")
    assert (tmp_path / "stress.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"kinds must be some of"):
        stress(shield, boat(), kinds=["lightning"])
    with pytest.raises(TypeError, match="got a VectorEnv"):
        stress(shield, gym.vector.SyncVectorEnv([boat]))  # type: ignore[arg-type]


def test_a_fault_that_the_agent_refuses_is_left_out_with_its_message(
    stored_agent: SafeFQL,
) -> None:
    def refuses(observation: Array) -> Array:
        if np.isnan(observation).any():
            raise ValueError("this agent reads no NaN")
        return np.zeros(2, np.float32)

    kinds = ["lost, NaN", "late action"]
    found = stress(stored_agent.shield(), boat(12), refuses, kinds=kinds, episodes=3, num_envs=3)
    assert [cell.fault for cell in found.cells] == ["none", *["late action"] * 3]
    assert len(found.left_out) == 3
    assert found.left_out["lost, NaN 0.6"] == "this agent reads no NaN"


def test_an_agent_that_answers_nan_with_nan_keeps_its_column_behind_the_shield(
    stored_agent: SafeFQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shield = stored_agent.shield().with_delta(0.05)
    texts: list[str] = []
    kept = Figure.savefig

    def drawn(figure: Figure, *to: Any, **how: Any) -> None:  # noqa: ANN401
        kept(figure, *to, **how)
        texts.extend(one.get_text() for one in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", drawn)
    found = stress(
        shield, boat(12), lambda seen: seen[:2] - seen[1:3], kinds=["lost, NaN"], episodes=3,
        num_envs=3,
    )  # fmt: skip
    assert [(one.strength, one.alone is None) for one in found.cells] == [
        (0.0, False), (0.1, True), (0.3, True), (0.6, True),
    ]  # fmt: skip
    why = found.left_out["lost, NaN 0.6 without the shield"]
    assert "given this, the policy returned NaN for environment" in why
    *_, last = found.table("markdown").splitlines()
    cells = last.split(" | ")
    assert (cells[3], cells[6]) == ("-", "- |")
    assert "-" not in (cells[2], cells[4], cells[5])
    assert found.to_json()["cells"][-1]["alone"] is None
    found.picture(tmp_path / "stress.png")
    # The first tick is the environment without the fault, whatever the unit of the strengths.
    assert {"none", "0.1", "0.3", "0.6"} <= set(texts)
    assert any(
        one.startswith("left out: lost, NaN 0.1 without the shield; lost, NaN 0.3") for one in texts
    )
    # Nothing but the environment without a fault could be played.
    StressTest(found.cells[:1], {"noise": "no Box"}).picture(tmp_path / "none.png")


def test_a_bias_is_played_in_both_directions() -> None:
    shown = {}
    for kind in FAULT_KINDS:
        if kind.name.startswith("bias"):
            env = kind.put(Counter(), kind.strengths[-1], [1.0, 2.0])
            shown[kind.name] = played(env, [0.0])[0]
    up, down = [np.add(PLAIN[0], (0.3, 0.6)), np.subtract(PLAIN[0], (0.3, 0.6))]
    np.testing.assert_allclose(shown["bias up"][0], up, rtol=1e-6)
    np.testing.assert_allclose(shown["bias down"][0], down, rtol=1e-6)


def test_the_command_stresses_a_shield(stored_agent: SafeFQL, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    stored_agent.shield().with_delta(0.05).save(path)
    arguments = ["stress", str(path), "safeshield/Boat-v0", "--fault", "control period"]
    result = CliRunner().invoke(app, [*arguments, "--episodes", "1"])
    assert result.exit_code == 0, result.output
    assert "5 steps an action" in result.output
    result = CliRunner().invoke(app, [*arguments, "--picture", str(tmp_path / "x.txt")])
    assert result.exit_code == 2
