"""The runtime of all wrappers: its short cut, reports of h, its memory, and what is certified."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from safeshield import CalibrationRecord, SafetyShield, Shield
from safeshield.envs.vector import autoreset_modes
from safeshield.shield import FilterReport
from safeshield.shield.protocols import ShieldMemory
from safeshield.shield.runtime import ShieldRuntime
from safeshield.shield.shield import NoReportWarning, OtherEnvironmentWarning
from safeshield.values.constraint import ConstraintSource
from safeshield.wrappers import VecSafetyShield, VectorSafetyShield

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GOLDEN = Path(__file__).parent / "golden"
N = 3
STRICT = 1.2  # a delta at which some actions are rejected and some accepted
KINDS = ["single", "sb3", *autoreset_modes()]
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def shield() -> Shield:
    return Shield.load(GOLDEN / "shield_student.safetensors").with_delta(0.05)


def h_of(observation: Array) -> float:
    """h where h - 1 is the depth: far above what the critics say in half of the states."""
    return float(np.sin(7.0 * observation[0])) - 0.4


class River(gym.Env[Array, Array]):
    """Random states; reports h of the state just reached; fails where it is told to."""

    def __init__(self, shield: Shield, steps: int = 4) -> None:
        self.observation_space, self.action_space = shield.observation_space, shield.action_space
        self.steps, self.broken = steps, False
        self.told: Any = ...

    def _observed(self) -> tuple[Array, dict[str, Any]]:
        at = self.np_random.uniform([-2.5, -1.5], [1.5, 1.5]).astype(np.float32)
        told = h_of(at) if self.told is ... else self.told
        return at, {} if told is None else {"constraint": told}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, self.steps + 1))
        return self._observed()

    def step(self, action: Array) -> Any:  # noqa: ANN401
        if self.broken:
            raise OSError("the river is closed")
        self.left -= 1
        at, info = self._observed()
        return at, 0.0, self.left <= 0, False, info


class Plant:
    """Environments behind a shield of any kind, driven alike: each value with a leading axis."""

    def __init__(self, kind: str, shield: Shield, **slots: Any) -> None:  # noqa: ANN401
        self.kind = kind
        self.rivers = [River(shield) for _ in range(1 if kind == "single" else N)]
        makers: list[Callable[[], Any]] = [lambda one=one: one for one in self.rivers]
        self.env: Any
        if kind == "single":
            self.env = SafetyShield(self.rivers[0], shield)
        elif kind == "sb3":
            self.env = VecSafetyShield(DummyVecEnv(makers), shield)
        else:
            modes = getattr(gym.vector, "AutoresetMode", None)
            arguments = {} if modes is None else {"autoreset_mode": modes(kind)}
            vector = gym.vector.SyncVectorEnv(makers, **arguments)
            self.env = VectorSafetyShield(vector, shield)
        self.env.runtime = ShieldRuntime(shield, self.env.runtime.num_envs, **slots)
        self.runtime: ShieldRuntime = self.env.runtime

    def reset(self) -> None:
        """Begin an episode everywhere."""
        if self.kind == "sb3":
            self.env.seed(0)
            self.env.reset()
        else:
            self.env.reset(seed=0)

    def step(self, action: Array) -> tuple[Array, Array]:
        """Send one action to all; return who was intervened upon, and who begins an episode."""
        if self.kind == "single":
            *_, ended, _, info = self.env.step(action)
            if ended:
                self.env.reset()
            return np.array([info["shield/intervened"]]), np.array([ended])
        actions = np.tile(action, (N, 1))
        if self.kind == "sb3":
            _, _, ended, infos = self.env.step(actions)
            return np.array([info["shield/intervened"] for info in infos]), ended
        _, _, ended, _, infos = self.env.step(actions)
        if self.kind == "Disabled" and ended.any():
            self.env.reset(options={"reset_mask": ended})
        intervened = infos["shield/intervened"]
        if "final_info" in infos and isinstance(infos["final_info"], Mapping):
            intervened = intervened | (ended & infos["final_info"]["shield/intervened"])
        return intervened, ended


# -- the short cut of a single environment ------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "discrete", "support_noise", "plan", "latent"])
def test_the_short_cut_decides_as_the_batched_path(name: str) -> None:
    shield = Shield.load(GOLDEN / f"shield_{name}.safetensors")
    one, batch = ShieldRuntime(shield), ShieldRuntime(shield, 1)
    rng = np.random.default_rng(0)
    codec, actions = shield.model.observation_codec, shield.model.action_codec
    scaling = shield.model.scaling
    short = 0
    for _ in range(300):
        row = scaling.observation_mean + scaling.observation_spread * rng.normal(size=codec.width)
        row = np.clip(row, codec.low, codec.high)[None]
        observation = codec.batch(np.rint(row) if codec.discrete else row.astype(np.float32))
        if actions.discrete:
            action = actions.unflatten(rng.permutation(actions.choices)[:1])
        else:
            action = rng.uniform(1.1 * actions.low, 1.1 * actions.high)
            action = actions.unflatten(action[None].astype(np.float32))
        value, values = one.observe(observation[0], [{}]), batch.observe(observation, [{}])
        assert value == values[0]
        decision, decisions = one.filter(action[0]), batch.filter(action)
        assert decision.intervened == decisions.intervened[0]
        np.testing.assert_allclose(decision.value, decisions.value[0], rtol=1e-4, atol=1e-5)
        if not decision.intervened:
            assert decision.executed.tobytes() == action[0].tobytes()
        np.testing.assert_array_equal(decision.executed, decisions.executed[0])
        short += not decision.intervened
        told, told_all = one.step_infos(decision, value), batch.step_infos(decisions, values)
        assert told.keys() == told_all.keys()
        assert told["shield/certified"] == told_all["shield/certified"][0]
    assert 20 < short < 300


# -- the constraint of the present state --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_h_is_that_of_the_observation_which_is_judged(shield: Shield, kind: str) -> None:
    """A function and the environment's reports give the same values, also around every reset."""
    source = ConstraintSource("river@1")
    told = Plant(kind, shield.with_constraint(source))
    known = Plant(kind, shield.with_constraint(lambda obs: [h_of(at) for at in obs]))
    guessed = Plant(kind, shield)
    told.reset(), known.reset(), guessed.reset()
    more = 0
    for _ in range(40):
        values = np.ravel(told.runtime.values)
        np.testing.assert_allclose(values, np.ravel(known.runtime.values), atol=1e-6)
        assert (values >= [np.float32(h_of(row)) for row in told.runtime.rows]).all()
        one, _ = told.step(np.zeros(2, np.float32))
        same, _ = known.step(np.zeros(2, np.float32))
        looser, _ = guessed.step(np.zeros(2, np.float32))
        np.testing.assert_array_equal(one, same)
        more += int((one != looser).sum())
    assert more > 0, "the guess decides alike: the test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", ["missing", "later", "integer"])
def test_a_report_that_is_missing_is_an_error_and_never_zero(
    shield: Shield, kind: str, broken: str
) -> None:
    if broken == "integer" and kind in ("single", "sb3"):
        pytest.skip("only the columns of a vector environment round reports")
    plant = Plant(kind, shield.with_constraint(ConstraintSource("river@1")))
    if broken == "later":
        plant.reset()
    plant.rivers[0].told = {"missing": None, "later": None, "integer": -1}[broken]
    match = "whole numbers" if broken == "integer" else "does not report info"
    with pytest.raises(ValueError, match=match):
        plant.step(np.zeros(2, np.float32)) if broken == "later" else plant.reset()
    with pytest.raises((gym.error.ResetNeeded, RuntimeError), match="reset"):
        plant.step(np.zeros(2, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_h_that_is_not_a_number_makes_the_observation_unreadable(shield: Shield, kind: str) -> None:
    plant = Plant(kind, shield.with_constraint(ConstraintSource("river@1")))
    plant.rivers[0].told = float("nan")
    plant.reset()
    assert np.ravel(plant.runtime.values)[0] == np.inf
    intervened, _ = plant.step(np.zeros(2, np.float32))
    assert intervened[0]


# -- a memory for each environment --------------------------------------------------------------


class Hold:
    """Hysteresis: once it has intervened, it accepts only what is safer by `margin`."""

    def __init__(self, count: int, margin: float) -> None:
        self.holding = np.zeros(count, np.bool_)
        self.margin = margin

    def reset(self, mask: Array, /) -> None:
        self.holding &= ~mask

    def limit(self, values: Array, threshold: Array, /) -> Array:
        assert values.shape == threshold.shape == self.holding.shape
        # Above the threshold in force, which has no effect, where it does not hold.
        return threshold + np.where(self.holding, -self.margin, 1.0)

    def learn(self, report: FilterReport, reached: Array, counted: Array, /) -> None:
        assert len(reached) == len(self.holding)
        self.holding |= report.intervened & counted


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_makes_thresholds_stricter_until_the_next_start(shield: Shield, kind: str) -> None:
    shield = shield.with_delta(STRICT)
    memory: ShieldMemory = Hold(1 if kind == "single" else N, margin=0.5)
    assert isinstance(memory, Hold)
    plant = Plant(kind, shield, memory=memory)
    plant.reset()
    expected = np.zeros(len(memory.holding), np.bool_)
    held = 0
    over = expected
    for _ in range(40):
        thresholds = np.ravel(np.asarray(plant.runtime.threshold))
        np.testing.assert_allclose(
            np.broadcast_to(thresholds, expected.shape), np.where(expected, -0.5, 0.0) - STRICT
        )
        before = over
        intervened, over = plant.step(np.array([1.0, 0.0], np.float32))
        # In the mode NEXT_STEP the episode begins a step after the end of the one before.
        begun = before if kind == "NextStep" else over
        expected = (expected | intervened) & ~begun
        np.testing.assert_array_equal(memory.holding, expected)
        held += int(expected.sum())
    assert held > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_resets_the_memory_everywhere(shield: Shield, kind: str) -> None:
    shield = shield.with_delta(STRICT)
    memory = Hold(1 if kind == "single" else N, margin=0.5)
    plant = Plant(kind, shield, memory=memory)
    plant.reset()
    for _ in range(100):
        if memory.holding.any():
            break
        plant.step(np.array([1.0, 0.0], np.float32))
    assert memory.holding.any()
    plant.rivers[0].broken = True
    for _ in range(10):  # a step that only resets environments takes no action
        try:
            plant.step(np.zeros(2, np.float32))
        except OSError:
            break
    assert not memory.holding.any()
    with pytest.raises((gym.error.ResetNeeded, RuntimeError), match="reset"):
        plant.step(np.zeros(2, np.float32))
    plant.rivers[0].broken = False
    plant.reset()
    plant.step(np.zeros(2, np.float32))


# -- certified means certified ------------------------------------------------------------------


class Other(River):
    """A river whose states, reports and costs can be set."""

    def __init__(self, shield: Shield, **told: Any) -> None:  # noqa: ANN401
        super().__init__(shield, steps=100)
        self.at, self.labels = np.array([1.0, 0.0], np.float32), told

    def _observed(self) -> tuple[Array, dict[str, Any]]:
        return self.at, dict(self.labels)


def vouched(shield: Shield) -> Shield:
    """A shield with a record, whose source says -1 everywhere."""
    record = CalibrationRecord(0.0, 0.01, 0.99, (), "", "starts", 1.0, (), 0, "2026-11-29", {})
    known = shield.with_constraint(lambda obs: np.full(len(obs), -1.0)).with_delta(0.0)
    return replace(known, record=record)


@pytest.mark.parametrize("kind", ["single", "sb3", *autoreset_modes()])
@pytest.mark.parametrize(
    ("told", "holds"),
    [
        ({}, True),
        ({"constraint": -1.0, "cost": 0.0}, True),
        ({"constraint": -1.0001}, True),
        ({"cost": 0.0}, True),
        ({"constraint": -0.7}, False),
        ({"constraint": 0.2}, False),
        ({"cost": 1.0}, False),
    ],
)
def test_a_report_that_contradicts_h_withdraws_the_promise_for_good(
    shield: Shield, kind: str, told: dict[str, float], holds: bool
) -> None:
    """In each wrapper and at each member: said once, and no later start is certified."""
    given = vouched(shield)
    excess = float(given.value(np.array([1.0, 0.0], np.float32))) + 1.0
    assert excess < 1.0, "the state must be certified where nothing contradicts it"
    plant = Plant(kind, given, certifies=True)
    for river in plant.rivers[:-1]:
        river.__class__, river.at, river.labels = Other, np.array([1.0, 0.0], np.float32), {}
        river.steps = 100
    last = plant.rivers[-1]
    last.__class__, last.at, last.labels = Other, np.array([1.0, 0.0], np.float32), {}
    last.steps = 100
    plant.reset()
    assert plant.runtime._covered.all()
    last.labels = told
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plant.step(np.zeros(2, np.float32))
        plant.step(np.zeros(2, np.float32))
    assert plant.runtime._covered.all() == holds
    assert sum(w.category is OtherEnvironmentWarning for w in caught) == (not holds)
    last.labels = {}
    plant.reset()
    assert plant.runtime._covered.all() == holds


@pytest.mark.parametrize("key", ["constraint", "cost"])
@pytest.mark.parametrize("value", ["bad", "5", [1.0, 2.0], 5 + 0j, np.array([5 + 0j])])
@pytest.mark.parametrize("kind", ["single", "sb3", *autoreset_modes()])
def test_a_report_that_is_no_number_is_named_and_ends_the_certificate(
    shield: Shield, kind: str, value: object, key: str
) -> None:
    plant = Plant(kind, vouched(shield), certifies=True)
    for river in plant.rivers:
        river.__class__, river.at, river.labels = (
            Other, np.array([1.0, 0.0], np.float32), {"constraint": None},
        )  # fmt: skip
        river.steps = 100
    last = plant.rivers[-1]
    plant.reset()
    assert plant.runtime._covered.all()
    last.labels = {key: value}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plant.step(np.zeros(2, np.float32))
        plant.step(np.zeros(2, np.float32))
    messages = [str(w.message) for w in caught if "must be one number" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].startswith(f"info['{key}'] must be one number, got ")
    assert ("bad" if value == "bad" else "1." if isinstance(value, list) else "5") in messages[0]
    others = len(plant.rivers) - 1
    assert plant.runtime._covered.tolist() == [True] * others + [False]
    plant.reset()  # which reports it as well
    assert plant.runtime._covered.tolist() == [True] * others + [False]
    last.labels = {}
    plant.reset()
    assert plant.runtime._covered.all()


class ReportsSteps(Other):
    """A river that reports nothing at reset, as most environments with a cost."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        return super().reset(seed=seed)[0], {}


@pytest.mark.parametrize("kind", ["single", "sb3", *autoreset_modes()])
def test_reports_that_stop_are_told_once(shield: Shield, kind: str) -> None:
    """At each member, and not at a reset. The promise is about the dynamics, so it stays."""
    plant = Plant(kind, vouched(shield), certifies=True)
    for river in plant.rivers:
        river.__class__, river.at, river.labels = (
            ReportsSteps, np.array([1.0, 0.0], np.float32), {"cost": 0.0},
        )  # fmt: skip
        river.steps = 3
    last = plant.rivers[-1]
    ended = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plant.reset()
        for _ in range(30):
            ended += plant.step(np.zeros(2, np.float32))[1].sum()
    assert ended >= 10
    last.labels = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            plant.step(np.zeros(2, np.float32))
    assert [w.category for w in caught] == [NoReportWarning]
    assert plant.runtime._covered.all()
