"""Several constraints by name: one h, each in units of its own steps, and the one that binds."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from typer.testing import CliRunner

from safeshield import (
    CalibrationRecord,
    OfflineDataset,
    SafeFQL,
    SafeFQLConfig,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldTrainer,
    collect,
    load_agent,
    register_constraint,
)
from safeshield.cli import app
from safeshield.collection.recorder import EpisodeRecorder
from safeshield.data.collect import log_of
from safeshield.envs.vector import autoreset_modes
from safeshield.rollouts.episodes import run_episodes
from safeshield.shield.shield import OtherEnvironmentWarning
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.values.constraint import (
    ConstraintSource,
    SeveralConstraints,
    UnknownConstraintError,
    constraints_by_name,
    find_constraint,
)
from safeshield.wrappers import ConstraintFromFunction, VecSafetyShield, VectorSafetyShield

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Array = npt.NDArray[Any]
N = 3
KINDS = ["single", "sb3", *autoreset_modes()]
GAP, SPEED = NAMES = ("corridor-gap@1", "corridor-speed@1")
MILLIMETRES = "corridor-gap-mm@1"
SMALL = ShieldConfig(critic_hidden=(16, 16), behaviour_hidden=(16,), fallback_hidden=(16,))


@register_constraint(SPEED)
def too_fast(observations: Array) -> Array:
    """In m/s."""
    return np.abs(observations[:, 1].astype(np.float64)) - 1.0


@register_constraint(GAP)
def too_close(observations: Array) -> Array:
    """In m; the wall is at 2 m."""
    return observations[:, 0].astype(np.float64) - 1.8


@register_constraint(MILLIMETRES)
def too_close_in_millimetres(observations: Array) -> Array:
    return 1000.0 * too_close(observations)


@register_constraint("corridor-constant@1")
def never_changes(observations: Array) -> Array:
    return np.full(len(observations), -1.0)


FUNCTIONS = {GAP: too_close, SPEED: too_fast}


def each_of(observations: Array) -> Array:
    """(n, 2) h_k in the order of NAMES."""
    return np.stack([FUNCTIONS[name](observations) for name in NAMES], axis=1)


class Corridor(gym.Env[Array, Array]):
    """A mass that is pushed along a corridor; its episodes take 1 to `steps` steps."""

    def __init__(self, steps: int = 4, report: Callable[[Array], Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-9.0, 9.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.steps = steps
        self.report: Callable[[Array], Any] = report or by_name

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, self.steps + 1))
        self.state = self.np_random.uniform([0.5, -0.7], [1.7, 0.7])
        if options and "state" in options:
            self.state = np.array(options["state"], np.float64)
        return self._observed()

    def step(self, action: Array) -> Any:  # noqa: ANN401
        speed = self.state[1] + 0.2 * float(action[0])
        self.state = np.array([self.state[0] + 0.1 * speed, speed])
        self.left -= 1
        at, info = self._observed()
        return at, float(self.state[0]), False, self.left <= 0, info

    def _observed(self) -> tuple[Array, dict[str, Any]]:
        at = self.state.astype(np.float32)
        report = self.report(at)
        return at, {} if report is None else {"constraint": report}


def by_name(observation: Array) -> dict[str, float]:
    return {name: float(f(observation[None])[0]) for name, f in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(Corridor(steps=30), "random", episodes=40, seed=3)


@pytest.fixture(scope="module")
def shield(log: OfflineDataset) -> Shield:
    return ShieldTrainer(SMALL).fit(log, steps=60).shield().with_delta(0.1)


@pytest.fixture(scope="module")
def source(log: OfflineDataset) -> SeveralConstraints:
    assert log.constraint_source is not None
    found = find_constraint(log.constraint_source)
    assert isinstance(found, SeveralConstraints)
    return found


def nobodys(source: SeveralConstraints) -> SeveralConstraints:
    """The same units under names that nobody registers."""
    names = ("nobody-gap@1", "nobody-speed@1")
    pairs = zip(map(ConstraintSource, names), source.units, strict=True)
    return SeveralConstraints(pairs)


# -- the quantity -------------------------------------------------------------------------------


def test_h_is_the_largest_in_units_of_its_own_steps(
    log: OfflineDataset, source: SeveralConstraints
) -> None:
    """And its sign is that of the worst constraint, whatever the units."""
    now, after = each_of(log.observations), each_of(log.next_observations)
    sigma = np.sqrt(np.mean((after - now) ** 2, axis=0))
    assert source.names == NAMES
    np.testing.assert_allclose(source.units, sigma, rtol=1e-5)
    assert source.name == f"max({GAP} / {source.units[0]!r}, {SPEED} / {source.units[1]!r})"
    np.testing.assert_allclose(log.constraints, (now / sigma).max(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log.next_constraints, (after / sigma).max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(log.next_constraints > 0, (after > 0).any(axis=1))
    np.testing.assert_array_equal(log.costs > 0, (after > 0).any(axis=1))
    assert 0.05 < (log.next_constraints > 0).mean() < 0.95
    binds = source.binding(after)
    np.testing.assert_array_equal(binds, (after / sigma).argmax(axis=1))
    assert set(binds) == {0, 1}
    # In mixed units another constraint would bind.
    assert (binds != after.argmax(axis=1)).any()


def test_a_log_is_labelled_alike_by_reports_names_and_functions(log: OfflineDataset) -> None:
    plain = collect(
        Corridor(steps=30, report=lambda at: max(by_name(at).values())), "random", 40, seed=3
    )
    assert plain.constraint_source is None
    for given in (list(NAMES), tuple(reversed(NAMES)), FUNCTIONS, {n: n for n in NAMES}):
        labelled = plain.with_constraint(given)
        assert labelled.constraint_source == log.constraint_source
        np.testing.assert_array_equal(labelled.constraints, log.constraints)
        np.testing.assert_array_equal(labelled.next_constraints, log.next_constraints)
    # Where the source of another log is given, the units are those of the other log.
    part = plain.select(range(5))
    assert part.with_constraint(list(NAMES)).constraint_source != log.constraint_source
    same = part.with_constraint(str(log.constraint_source))
    assert same.constraint_source == log.constraint_source
    OfflineDataset.concat([same, log])
    # One constraint keeps its own units and its name.
    one = log.with_constraint([SPEED, GAP]).with_constraint
    with pytest.raises(ValueError, match=rf"'{SPEED}' contradicts the logged cost"):
        one({SPEED: too_fast})
    safe = plain.select(np.flatnonzero(~plain.violating_episodes))
    assert safe.with_constraint([SPEED]).constraint_source == SPEED
    np.testing.assert_array_equal(
        safe.with_constraint([SPEED]).constraints, too_fast(safe.observations).astype(np.float32)
    )


@pytest.mark.parametrize("mode", autoreset_modes())
def test_a_vector_environment_gives_each_state_its_own_reports(mode: str) -> None:
    modes = getattr(gym.vector, "AutoresetMode", None)
    arguments = {} if modes is None else {"autoreset_mode": modes(mode)}
    makers = [lambda: Corridor(steps=5)] * N
    logged = collect(gym.vector.SyncVectorEnv(makers, **arguments), "random", 12, seed=0)
    source = find_constraint(str(logged.constraint_source))
    assert source.names == NAMES
    np.testing.assert_allclose(logged.constraints, source(logged.observations), atol=1e-5)
    np.testing.assert_allclose(logged.next_constraints, source(logged.next_observations), atol=1e-5)


def test_a_name_is_the_quantity(source: SeveralConstraints) -> None:
    assert find_constraint(source.name) == source
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    seen = np.random.default_rng(0).normal(size=(9, 2))
    np.testing.assert_array_equal(again(seen), source(seen))
    other = SeveralConstraints(zip(source.parts, (1.0, 2.0), strict=True))
    assert other != source
    turned = SeveralConstraints(zip(source.parts[::-1], source.units[::-1], strict=True))
    assert turned == source
    np.testing.assert_array_equal(turned(seen), source(seen))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max(a@1 / 1.0)", "two or more"),
        ("max(a@1 / 1.0, a@1 / 2.0)", "different names"),
        ("max(a@1 / 1.0, b@1 / 0.0)", "'b@1' must be a finite number above 0"),
        ("max(a@1 / 1.0, b@1 / nan)", "'b@1' must be a finite number above 0"),
        ("max(a@1 / 1.0, b@1)", "each must be 'name / unit'"),
        ("max(b@1 / 1.0, a@1 / 1.0)", r"must be 'max\(a@1 / 1.0, b@1 / 1.0\)'"),
        ("max(a@1 / 1.00000001, b@1 / 1.0)", "six digits"),
    ],
)
def test_a_damaged_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_constraint(name)


def test_wrong_constraints_are_refused_by_name(log: OfflineDataset) -> None:
    with pytest.raises(ValueError, match=r"'corridor-constant@1' must change in the log"):
        log.with_constraint([*NAMES, "corridor-constant@1"])
    with pytest.raises(ValueError, match=rf"'{GAP}' must be finite.*nan.*constraints\[0\]"):
        log.with_constraint(
            {SPEED: SPEED, GAP: ConstraintSource(GAP, lambda obs: obs[:, 0] * np.nan)}
        )
    with pytest.raises(LookupError, match="'nothing@1' is not registered"):
        log.with_constraint([SPEED, "nothing@1"])
    with pytest.raises(ValueError, match="must be given by its own name, got 'fast@1'"):
        log.with_constraint({"fast@1": too_fast, GAP: too_close})
    with pytest.raises(ValueError, match="name must be left out"):
        log.with_constraint([SPEED, GAP], name="both@1")
    with pytest.raises(ValueError, match="must be at least one, got none"):
        log.with_constraint({})
    with pytest.raises(TypeError, match="must have a source, got None"):
        log.with_constraint({SPEED: None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must not contain ', '"):
        log.with_constraint({"a, b@1": lambda obs: too_fast(obs), GAP: too_close})
    with pytest.raises(ValueError, match="form of the name of several"):
        ConstraintSource("max(a@1 / 1.0, b@1 / 1.0)", too_fast)


# -- the shield ---------------------------------------------------------------------------------


def test_verdicts_do_not_depend_on_the_unit_of_a_constraint(
    log: OfflineDataset, shield: Shield
) -> None:
    """Metres or millimetres: the same values, for one shield and for one trained on each log."""
    scaled = log.with_constraint([SPEED, MILLIMETRES])
    assert scaled.constraint_source != log.constraint_source
    np.testing.assert_allclose(scaled.constraints, log.constraints, rtol=1e-5)
    rng = np.random.default_rng(0)
    seen = log.observations
    actions = rng.uniform(-1.0, 1.0, log.actions.shape).astype(np.float32)
    executed, report = shield.filter(seen, actions)
    assert 0.05 < report.intervened.mean() < 0.95
    assert scaled.constraint_source is not None
    trained = ShieldTrainer(SMALL).fit(scaled, steps=60).shield().with_delta(0.1)
    for other in (shield.with_constraint(scaled.constraint_source), trained):
        same, told = other.filter(seen, actions)
        np.testing.assert_allclose(other.value(seen), shield.value(seen), rtol=1e-3, atol=1e-3)
        clear = np.abs(report.proposed_value + shield.delta) > 1e-3
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(told.intervened[clear], report.intervened[clear])
        np.testing.assert_allclose(same[clear], executed[clear], atol=1e-2)


def test_files_hold_names_and_units(
    log: OfflineDataset, shield: Shield, source: SeveralConstraints, tmp_path: Path
) -> None:
    for suffix in (".hdf5", ".npz"):
        log.save(tmp_path / f"log{suffix}")
        assert OfflineDataset.load(tmp_path / f"log{suffix}").constraint_source == source.name
    shield.save(tmp_path / "shield.safetensors")
    same = Shield.load(tmp_path / "shield.safetensors")
    assert same.constraint == source.name
    np.testing.assert_array_equal(same.value(log.observations), shield.value(log.observations))
    assert (shield.value(log.observations) >= source(log.observations).astype("f4")).all()
    agent = SafeFQL(
        SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,), student_hidden=(16,))
    ).fit(log, steps=30)
    agent.save(tmp_path / "agent.safetensors")
    assert load_agent(tmp_path / "agent.safetensors").shield().constraint == source.name
    for name in ("log.npz", "shield.safetensors", "agent.safetensors"):
        plain = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert source.name in plain.output, plain.output
        told = CliRunner().invoke(app, ["inspect", str(tmp_path / name), "--json"])
        assert json.loads(told.output)["constraint_source"] == source.name


def test_constraints_that_are_not_registered_are_named_and_can_be_given(
    log: OfflineDataset, shield: Shield, source: SeveralConstraints, tmp_path: Path
) -> None:
    unknown = nobodys(source)
    shield.with_constraint(unknown.name).save(tmp_path / "shield.safetensors")
    loaded = Shield.load(tmp_path / "shield.safetensors")
    seen, actions = log.observations, log.actions
    with pytest.raises(UnknownConstraintError, match=r"\['nobody-gap@1', 'nobody-speed@1'\] of"):
        loaded.value(seen)
    gap, speed = each_of(seen).T
    given = {"nobody-gap@1": gap, "nobody-speed@1": speed}
    np.testing.assert_array_equal(loaded.value(seen, constraint=given), shield.value(seen))
    executed, report = loaded.filter(
        seen[0], actions[0], constraint={k: h[0] for k, h in given.items()}
    )
    own, told = shield.filter(seen[0], actions[0])
    np.testing.assert_array_equal(executed, own)
    assert report.value == told.value
    with pytest.raises(ValueError, match=r"\['nobody-speed@1'\] are missing"):
        loaded.value(seen, constraint={"nobody-gap@1": gap})
    with pytest.raises(ValueError, match="must be a mapping from the names"):
        loaded.value(seen, constraint=gap)
    with pytest.raises(ValueError, match=r"constraint\['nobody-gap@1'\] must be one number"):
        loaded.value(seen, constraint={**given, "nobody-gap@1": gap[:3]})
    record = CalibrationRecord(0.1, 0.01, 0.99, (), "", "starts", 1.0, (), 0, "2026-11-29", {})
    vouched = replace(loaded, record=replace(record, replacement="CommittedFallback()"))
    resolved = vouched.with_constraint(
        {"nobody-gap@1": lambda obs: too_close(obs), "nobody-speed@1": lambda obs: too_fast(obs)}
    )
    assert resolved.record is not None, "the same names and units are the same quantity"
    np.testing.assert_array_equal(resolved.value(seen), shield.value(seen))
    with pytest.raises(ValueError, match=rf"got \['{SPEED}'\] as well"):
        vouched.with_constraint([SPEED])
    with pytest.raises(ValueError, match="one constraint for a shield that was not trained with"):
        shield.with_constraint(None).with_constraint([SPEED, GAP])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_constraint_that_is_not_known_makes_nothing_acceptable(
    log: OfflineDataset, shield: Shield, bad: float
) -> None:
    """Also where the other constraint is far from its limit."""

    def partly(observations: Array) -> Array:
        return np.where(observations[:, 0] > 1.0, bad, -50.0)

    blind = shield.with_constraint(
        {
            GAP: ConstraintSource(GAP, partly),
            SPEED: ConstraintSource(SPEED, lambda obs: -50.0 + 0 * obs[:, 0]),
        }
    )
    seen = log.observations[::7]
    dark = seen[:, 0] > 1.0
    assert 0 < dark.sum() < len(dark)
    values = blind.value(seen)
    assert np.isinf(values[dark]).all()
    assert np.isfinite(values[~dark]).all()
    _, report = blind.filter(seen, log.actions[::7])
    assert report.intervened[dark].all()
    assert not report.acceptable[dark].any()
    assert report.acceptable[~dark].all()
    env = SafetyShield(Corridor(report=lambda at: None), blind)
    _, info = env.reset(seed=0, options={"state": [1.5, 0.0]})
    assert (info["shield/value"], info["shield/binding"]) == (np.inf, GAP)
    assert not info["shield/safe_set"]
    _, _, _, _, info = env.step(np.zeros(1, np.float32))
    assert info["shield/intervened"]


# -- the wrappers -------------------------------------------------------------------------------


def wrapped(kind: str, shield: Shield, **slots: Any) -> tuple[Any, list[Corridor]]:  # noqa: ANN401
    corridors = [Corridor(**slots) for _ in range(1 if kind == "single" else N)]
    makers: list[Callable[[], Any]] = [lambda one=one: one for one in corridors]
    if kind == "single":
        return SafetyShield(corridors[0], shield), corridors
    if kind == "sb3":
        return VecSafetyShield(DummyVecEnv(makers), shield), corridors
    modes = getattr(gym.vector, "AutoresetMode", None)
    arguments = {} if modes is None else {"autoreset_mode": modes(kind)}
    return VectorSafetyShield(gym.vector.SyncVectorEnv(makers, **arguments), shield), corridors


def started(kind: str, env: Any) -> Iterator[tuple[Array, dict[str, Any]]]:  # noqa: ANN401
    """Reset the environments with seed 0; return each observation and info."""
    if kind == "sb3":
        env.seed(0)
        yield from zip(env.reset(), env.reset_infos, strict=True)
        return
    observation, info = env.reset(seed=0)
    yield from [(observation, info)] if kind == "single" else rows(observation, info)


def rows(observations: Array, infos: Mapping[str, Any]) -> list[tuple[Array, dict[str, Any]]]:
    present = infos["_shield/binding"]
    columns = [key for key in infos if key.startswith("shield/")]
    return [
        (observations[i], {key: infos[key][i] for key in columns})
        for i in range(len(observations))
        if present[i]
    ]


def played(kind: str, env: Any, steps: int) -> Iterator[tuple[Array, dict[str, Any]]]:  # noqa: ANN401
    """Step the environments; return each state that an info describes, and the info."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        actions = rng.uniform(-1.0, 1.0, (N, 1)).astype(np.float32)
        if kind == "single":
            at, _, ended, over, info = env.step(actions[0])
            yield at, info
            if ended or over:
                yield env.reset()
        elif kind == "sb3":
            at, _, over, infos = env.step(actions)
            for i in range(N):
                yield infos[i]["terminal_observation"] if over[i] else at[i], infos[i]
                if over[i]:
                    yield at[i], env.reset_infos[i]
        else:
            at, _, ended, over, infos = env.step(actions)
            yield from rows(at, infos)
            over = ended | over
            if kind == "SameStep" and over.any():
                final = infos["final_info"]
                last = infos["final_obs" if "final_obs" in infos else "final_observation"]
                for i in np.flatnonzero(over):
                    told = final[i] if isinstance(final, np.ndarray) else None
                    yield (
                        last[i],
                        told
                        or {k: v[i] for k, v in final.items() if k[0] != "_" and k != "constraint"},
                    )
            if kind == "Disabled" and over.any():
                again, infos = env.reset(options={"reset_mask": over})
                yield from rows(again, infos)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("registered", [True, False])
def test_the_binding_constraint_is_named_in_every_info(
    shield: Shield, source: SeveralConstraints, kind: str, registered: bool
) -> None:
    """Also of the states that end an episode, and by a source that takes the reports."""
    names = dict(zip(NAMES, source.names if registered else nobodys(source).names, strict=True))
    used = shield if registered else shield.with_constraint(nobodys(source).name)

    def report(at: Array) -> dict[str, float]:
        return {names[name]: h for name, h in by_name(at).items()}

    env, _ = wrapped(kind, used, report=report)
    known = {name: 0 for name in names.values()}
    for at, info in (*started(kind, env), *played(kind, env, 40)):
        each = each_of(at[None])
        bound = info["shield/binding"]
        assert isinstance(bound, str)
        assert bound == names[NAMES[int(source.binding(each)[0])]]
        known[bound] += 1
        h = np.float32(source.largest(each)[0])
        assert info["shield/safe_set"] <= bool(h <= -used.delta)
    assert min(known.values()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_an_observation_that_is_not_readable_has_no_binding_constraint(
    shield: Shield, kind: str
) -> None:
    env, corridors = wrapped(kind, shield, report=lambda at: None)
    list(started(kind, env))
    for corridor in corridors:
        corridor.state, corridor.left = np.array([np.nan, 0.0]), 100
    _, info = next(iter(played(kind, env, 1)))
    assert info["shield/binding"] == ""
    assert not info["shield/safe_set"]


@pytest.mark.parametrize("kind", KINDS)
def test_shields_of_one_constraint_name_none(shield: Shield, kind: str) -> None:
    for other in (shield.with_constraint(None), shield.with_constraint(SPEED)):
        env, _ = wrapped(kind, other)
        if kind == "single":
            assert "shield/binding" not in env.reset(seed=0)[1]
            assert "shield/binding" not in env.step(np.zeros(1, np.float32))[4]
        elif kind == "sb3":
            env.reset()
            assert "shield/binding" not in env.reset_infos[0]
            infos = env.step(np.zeros((N, 1), np.float32))[3]
            assert "shield/binding" not in infos[0]
        else:
            assert "shield/binding" not in env.reset(seed=0)[1]
            assert "shield/binding" not in env.step(np.zeros((N, 1), np.float32))[4]


def test_a_vector_of_shielded_environments_keeps_the_name(shield: Shield) -> None:
    """Gymnasium puts the strings of its members into a column of objects."""
    envs = gym.vector.SyncVectorEnv([lambda: SafetyShield(Corridor(), shield)] * N)
    _, infos = envs.reset(seed=0)
    assert infos["shield/binding"].shape == (N,)
    assert set(infos["shield/binding"]) <= set(NAMES)
    runs = run_episodes(
        SafetyShield(Corridor(steps=5), shield), "random", 6, 0, info_keys=("shield/binding",)
    )
    for run in runs:
        expected = [
            NAMES[int(k)]
            for k in find_constraint(str(shield.constraint)).binding(each_of(run.next_observations))  # type: ignore[attr-defined]
        ]
        assert run.info["shield/binding"].tolist() == expected


def test_a_constraint_that_is_reported_beside_a_registered_one_is_told_what_to_do(
    shield: Shield, source: SeveralConstraints
) -> None:
    gap = dataclasses.replace(source.parts[0], name="nobody-gap@1", function=None)
    mixed = SeveralConstraints([(gap, 1.0), (source.parts[1], 1.0)])
    env, _ = wrapped(
        "single", shield.with_constraint(mixed.name), report=lambda at: {"nobody-gap@1": -1.0}
    )
    known = source.parts[1].name
    message = rf"holds \['{known}'\].* or register the function .* as 'nobody-gap@1'$"
    with pytest.raises(ValueError, match=message):
        list(started("single", env))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("report", ["number", "part", "nothing", "integers"])
def test_a_source_that_takes_reports_needs_each_by_name(
    shield: Shield, source: SeveralConstraints, kind: str, report: str
) -> None:
    rounds = kind not in ("single", "sb3") and not gym.__version__.startswith("0.")
    if report == "integers" and not rounds:
        pytest.skip("only the columns of Gymnasium 1 and later round the numbers of a mapping")
    unknown = nobodys(source)
    told: Any = {
        "number": -1.0,
        "part": {"nobody-gap@1": -1.0},
        "nothing": None,
        "integers": {"nobody-gap@1": -1, "nobody-speed@1": -1},
    }[report]
    env, _ = wrapped(kind, shield.with_constraint(unknown.name), report=lambda at: told)
    message = {"part": r"holds \['nobody-speed@1'\]", "integers": "whole numbers"}
    with pytest.raises(ValueError, match=message.get(report, "a mapping that holds")):
        list(started(kind, env))


# -- certified means certified ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("report", "holds"),
    [
        (None, True),
        ({}, True),
        ({GAP: 0.0}, True),
        ({GAP: 0.0, SPEED: 0.0}, True),
        ({GAP: 1e-5, SPEED: -1e-5}, True),
        ({SPEED: 0.5}, False),  # in m/s, off though both are negative
        ({GAP: 0.5}, False),  # the gap is far from binding
        (-123.0, True),  # a number in other units, of the same sign
        (1e-6, False),  # a violation
        ({GAP: 0.0, "battery@1": -5.0}, True),
        ({GAP: 0.0, "battery@1": 0.5}, False),
    ],
)
def test_a_report_that_contradicts_a_constraint_withdraws_the_promise(
    shield: Shield,
    kind: str,
    report: object,
    holds: bool,
) -> None:
    """Each is compared in units of its own steps; a mapping holds shifts of the true values."""
    record = CalibrationRecord(0.0, 0.01, 0.99, (), "", "starts", 1.0, (), 0, "2026-11-29", {})
    record = replace(record, replacement="CommittedFallback()")
    vouched = replace(shield, delta=0.0, record=record)
    state = np.array([-5.0, 0.0])
    value = float(vouched.value(state.astype(np.float32)))
    assert value <= 0.0, "the state must be certified where nothing contradicts it"
    env, corridors = wrapped(kind, vouched)
    shifts = report

    def told(at: Array) -> Any:  # noqa: ANN401
        if isinstance(shifts, dict):
            return {n: by_name(at).get(n, 0.0) + shift for n, shift in shifts.items()} or None
        return shifts

    for corridor in corridors:
        corridor.steps, corridor.report = 100, lambda at: None
        corridor.reset = lambda inner=corridor.reset, **_: inner(seed=0, options={"state": state})  # type: ignore[method-assign]
    list(started(kind, env))
    assert env.runtime._covered.all()
    for corridor in corridors:
        corridor.left = 100
    corridors[-1].report = told
    still = np.zeros(1, np.float32) if kind == "single" else np.zeros((N, 1), np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env.step(still)
        env.step(still)
    assert env.runtime._covered.all() == holds
    messages = [str(w.message) for w in caught if w.category is OtherEnvironmentWarning]
    assert len(messages) == (not holds)
    if not holds:
        assert f"{GAP} " in messages[0]
        assert f"{SPEED} -1" in messages[0]
    corridors[-1].report = lambda at: None
    list(started(kind, env))
    assert env.runtime._covered.all() == holds


def test_a_number_that_says_safe_contradicts_a_violation(
    shield: Shield, source: SeveralConstraints
) -> None:
    each = np.array([[-1.0, 0.5], [-1.0, -0.5], [np.nan, 0.5]])
    nothing = np.full((3, 2), np.nan)
    near = shield.model.scale.agreement
    told = source.contradicts(each, nothing, np.full(3, -1.0), near)
    assert told.tolist() == [True, False, False]
    told = source.contradicts(each, nothing, np.full(3, 1.0), near)
    assert told.tolist() == [False, True, False]
    assert not source.contradicts(each, nothing, np.full(3, np.nan), near).any()


def test_calibration_compares_each_constraint(shield: Shield) -> None:
    settings = {"epsilon": 0.9, "confidence": 0.5, "policy": "random", "deltas": [0.0]}
    calibrated = shield.calibrate(Corridor(), **settings)
    assert calibrated.record is not None
    env = SafetyShield(Corridor(), calibrated)
    _, info = env.reset(seed=0, options={"state": [-5.0, 0.0]})
    assert info["shield/certified"]
    shield.calibrate(Corridor(report=lambda at: 7.0 * max(by_name(at).values())), **settings)

    def shifted(at: Array) -> dict[str, float]:
        return {**by_name(at), GAP: by_name(at)[GAP] - 0.5}

    with pytest.raises(ValueError, match=rf"reports info\['constraint'\].*{GAP} .*source.*gives"):
        shield.calibrate(Corridor(report=shifted), **settings)


# -- reports of environments --------------------------------------------------------------------


def test_the_wrapper_reports_each_by_name(log: OfflineDataset) -> None:
    one = {n: (lambda obs, f=f: f(obs[None])[0]) for n, f in FUNCTIONS.items()}
    for given in (list(NAMES), one, {SPEED: SPEED, GAP: one[GAP]}, str(log.constraint_source)):
        env = ConstraintFromFunction(Corridor(steps=30, report=lambda at: None), given)
        at, info = env.reset(seed=1)
        assert info["constraint"] == by_name(at)
        assert info["cost"] == 0.0
        at, _, _, _, info = env.step(np.ones(1, np.float32))
        assert info["constraint"] == by_name(at)
        labelled = collect(env, "random", 40, seed=3)
        assert labelled.constraint_source == log.constraint_source
        np.testing.assert_array_equal(labelled.constraints, log.constraints)
    env = ConstraintFromFunction(Corridor(report=lambda at: None), list(NAMES), True)
    env.reset(seed=0, options={"state": [1.75, 0.9]})
    _, _, terminated, _, info = env.step(np.ones(1, np.float32))
    assert terminated
    assert info["cost"] == 1.0
    for wrong, message in (
        ([SPEED, "nothing@1"], "'nothing@1' is not registered"),
        ({}, "must hold one constraint or more"),
        ([], "must hold one constraint or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ConstraintFromFunction(Corridor(), wrong)  # type: ignore[arg-type]
    broken = ConstraintFromFunction(
        Corridor(report=lambda at: None), {SPEED: lambda obs: np.nan, GAP: GAP}
    )
    with pytest.raises(ValueError, match=rf"constraint_fn\['{SPEED}'\]\(observation\) must be fin"):
        broken.reset(seed=0)


def test_names_that_are_not_registered_give_labels_without_a_source(log: OfflineDataset) -> None:
    def renamed(at: Array) -> dict[str, float]:
        return {f"own-{name}": h for name, h in by_name(at).items()}

    other = collect(Corridor(steps=30, report=renamed), "random", 40, seed=3)
    assert other.constraint_source is None
    np.testing.assert_array_equal(other.constraints, log.constraints)


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([{SPEED: -1.0}, {GAP: -1.0}], "the same constraints in every state"),
        ([{SPEED: -1.0}, -1.0], "the same constraints in every state"),
        ([-1.0, {SPEED: -1.0}], "the same constraints in every state"),
        ([{SPEED: -1.0}, {SPEED: np.nan}], rf"info\['constraint'\]\['{SPEED}'\] must be finite"),
        ([{SPEED: np.zeros(2)}], rf"info\['constraint'\]\['{SPEED}'\] must be one number"),
        ([{}], "one constraint or more"),
    ],
)
def test_reports_that_change_their_form_are_refused(reports: list[Any], message: str) -> None:
    left = list(reports)
    env = Corridor(steps=4, report=lambda at: left.pop(0) if len(left) > 1 else left[0])
    with pytest.raises(ValueError, match=message):
        collect(env, "random", 1, seed=5)


def test_a_learners_log_of_several_constraints_is_binary(log: OfflineDataset) -> None:
    """Its segments are labelled one by one, each with other units; `with_constraint` gives one."""
    venv = DummyVecEnv([lambda: Corridor(steps=6)])
    spaces = venv.observation_space, venv.action_space
    recorder = EpisodeRecorder(venv, flat_observations(spaces[0]), flat_actions(spaces[1]))
    recorder.seed(0)
    recorder.reset()
    for _ in range(60):
        recorder.step(np.ones((1, 1), np.float32))
    logged = log_of(recorder.take(), *spaces)
    assert logged.constraint_kind == "binary"
    unsafe = (each_of(logged.next_observations) > 0).any(axis=1)
    assert 0 < unsafe.sum() < len(unsafe)
    np.testing.assert_array_equal(logged.costs > 0, unsafe)
    assert logged.with_constraint(list(NAMES)).constraint_kind == "continuous"


def test_a_diagnosis_takes_reports_by_name(shield: Shield) -> None:
    """Without a contradiction where they agree, or where a number in other units is reported."""
    for report in (by_name, lambda at: 1000.0 * max(by_name(at).values())):
        told = shield.diagnose(Corridor(steps=20, report=report), "random", episodes=5)
        assert "contradict" not in str(told), str(told)


def test_a_list_of_sources_is_in_the_order_of_the_names() -> None:
    assert [one.name for one in constraints_by_name([SPEED, GAP])] == list(NAMES)
