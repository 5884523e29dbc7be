"""The runtime of all wrappers: its short cut, and its slots for a constraint and for a memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from safeshield import SafetyShield, Shield
from safeshield.envs.vector import autoreset_modes
from safeshield.shield import FilterReport
from safeshield.shield.guard import ConstraintSource, ShieldMemory, ShieldRuntime
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

    def _observed(self) -> tuple[Array, dict[str, Any]]:
        at = self.np_random.uniform([-2.5, -1.5], [1.5, 1.5]).astype(np.float32)
        return at, {"h": h_of(at)}

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


class Reported:
    """Reads h from the infos, and notes whether it was that of the observation."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, observations: Any, infos: Sequence[Mapping[str, Any]], /) -> Array:  # noqa: ANN401
        h = np.array([info["h"] for info in infos])
        np.testing.assert_allclose(h, [h_of(at) for at in observations], atol=1e-6)
        self.calls += 1
        return h


@pytest.mark.parametrize("kind", KINDS)
def test_values_lie_nowhere_below_the_constraint_of_the_present_state(
    shield: Shield, kind: str
) -> None:
    source: ConstraintSource = Reported()
    told, untold = Plant(kind, shield, constraint=source), Plant(kind, shield)
    told.reset(), untold.reset()
    raised = more = 0
    for _ in range(40):
        values, plain = np.ravel(told.runtime.values), np.ravel(untold.runtime.values)
        h = np.array([h_of(row) for row in told.runtime.rows])
        np.testing.assert_allclose(values, np.maximum(plain, h), atol=1e-6)
        raised += int((h > plain).sum())
        stricter, _ = told.step(np.zeros(2, np.float32))
        looser, _ = untold.step(np.zeros(2, np.float32))
        # What is accepted with the constraint known is accepted without it.
        assert (stricter | ~looser).all()
        more += int((stricter & ~looser).sum())
    assert raised > 10
    assert more > 0
    assert isinstance(source, Reported)
    assert source.calls >= 41


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, None])
def test_a_source_that_does_not_know_stops_the_shield(
    shield: Shield, kind: str, broken: float | None
) -> None:
    def source(observations: Any, infos: Sequence[Mapping[str, Any]], /) -> Array:  # noqa: ANN401
        return np.array([0.0] * (len(infos) + 1) if broken is None else [broken] * len(infos))

    plant = Plant(kind, shield, constraint=source)
    with pytest.raises(ValueError, match="finite numbers, one for each environment"):
        plant.reset()
    with pytest.raises((gym.error.ResetNeeded, RuntimeError), match="reset"):
        plant.step(np.zeros(2, np.float32))


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
