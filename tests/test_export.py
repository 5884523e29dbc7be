"""A shield as an ONNX graph decides as in Python, case by case, and says what it promises."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield import Shield, load_agent
from safeshield.nn.graph import BATCH, CannotExportError, Recorder, Traced
from safeshield.shield import (
    CandidateSet,
    CommittedFallback,
    FallbackPolicy,
    OwnSamples,
    ProjectedGradient,
)
from safeshield.shield.backup import BackupController
from safeshield.shield.sensors import SensorCheck
from safeshield.values.constraint import ConstraintSource, register_constraint

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import export as benchmark  # noqa: E402

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GOLDEN = ROOT / "tests" / "golden"
STORED = sorted(path.name for path in GOLDEN.glob("shield_*.safetensors"))
REFUSED = {
    "shield_latent_density.safetensors": "score of the support test must be one of",
    "shield_plan_gradient.safetensors": "must not be ProjectedGradient",
}
"""Stored shields that no graph is written for, and why."""
CASES, STORED_CASES = 2_000, 300
TINY = {"hidden": (16, 16)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def small() -> Shield:
    return benchmark.random_shield(*benchmark.SPACES, **TINY, replacement=CommittedFallback())


@pytest.fixture(scope="module")
def calibrated() -> Shield:
    shield = Shield.load(GOLDEN / "shield_calibrated.safetensors")
    assert shield.record is not None
    return shield


class Still(gym.Env[Any, Any]):
    """Spaces, for a model of Stable-Baselines3 that does not learn."""

    def __init__(self, observations: gym.Space[Any], actions: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions


# -- the same decisions ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_a_graph_decides_as_python(kind: str) -> None:
    """Random and adversarial cases; the verdicts that differ lie within 1e-5 of the threshold."""
    found = benchmark.equal(CASES, [kind])[kind]
    assert found["cases"] == CASES
    assert 50 < found["accepted"] < CASES - 50
    assert found["invalid"] > 20
    # Only the actions that were put at the threshold, a fifth of the cases, may differ.
    assert found["verdicts that differ"] < CASES / 40
    assert found["replacements that differ"] < CASES / 100


@pytest.mark.parametrize("name", STORED)
def test_stored_shields_decide_as_python_or_are_refused(name: str, tmp_path: Path) -> None:
    shield = Shield.load(GOLDEN / name)
    if name in REFUSED:
        with pytest.raises(CannotExportError, match=REFUSED[name]):
            shield.export_onnx(tmp_path / "shield.onnx")
        return
    exported = benchmark.Exported(shield, tmp_path / "shield.onnx")
    onnx.checker.check_model(onnx.load(str(tmp_path / "shield.onnx")), full_check=True)
    given = benchmark.cases(shield, STORED_CASES, np.random.default_rng(len(name)))
    found = benchmark.compare(shield, exported(given), given)
    assert found["verdicts that differ"] <= STORED_CASES / 20


def test_a_shield_that_checks_its_sensors_is_refused(small: Shield, tmp_path: Path) -> None:
    checked = small.with_sensors(SensorCheck(age=0.1))
    with pytest.raises(CannotExportError, match="cannot check the sensors"):
        checked.export_onnx(tmp_path / "shield.onnx")


def test_whole_episodes_decide_as_python() -> None:
    for counts in benchmark.episodes(20).values():
        assert counts["episodes"] >= 20
        assert counts["cases"] > 2_000
        assert counts["verdicts that differ"] <= 2


def test_the_comparison_sees_another_shield(small: Shield, tmp_path: Path) -> None:
    exported = benchmark.Exported(small.with_delta(small.delta + 0.02), tmp_path / "shield.onnx")
    given = benchmark.cases(small, 500, np.random.default_rng(0))
    with pytest.raises(AssertionError):
        benchmark.compare(small, exported(given), given)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_batch_may_be_of_any_size(small: Shield, count: int, tmp_path: Path) -> None:
    exported = benchmark.Exported(small, tmp_path / "shield.onnx")
    given = benchmark.cases(small, count, np.random.default_rng(0))
    told = exported(given)
    assert {len(one) for one in told.values()} == {count}
    if count:
        assert benchmark.compare(small, told, given)["cases"] == count


def test_delta_is_never_looser_than_the_shields(small: Shield, tmp_path: Path) -> None:
    exported = benchmark.Exported(small, tmp_path / "shield.onnx")
    given = benchmark.cases(small, 400, np.random.default_rng(0))
    usual = exported(given)
    for loose in (0.0, -1.0, small.delta, np.nan, -np.inf):
        again = exported(given, delta=np.array([loose]))
        for name, values in usual.items():
            np.testing.assert_array_equal(again[name], values, err_msg=name)
    stricter = small.with_delta(small.delta + 0.3)
    told = exported(given, delta=np.array([stricter.delta]))
    benchmark.compare(stricter, told, given)
    assert told["accepted"].sum() < usual["accepted"].sum()
    each = exported(given, delta=np.where(np.arange(400) % 2, 0.0, stricter.delta))
    np.testing.assert_array_equal(each["accepted"][1::2], usual["accepted"][1::2])
    np.testing.assert_array_equal(each["accepted"][::2], told["accepted"][::2])


def test_broken_numbers_are_never_accepted(small: Shield, tmp_path: Path) -> None:
    exported = benchmark.Exported(small, tmp_path / "shield.onnx")
    broken = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)
    rows = np.zeros((4, 2), np.float32)
    for states, actions in ((rows + broken[:, None], rows), (rows, rows + broken[:, None])):
        told = exported(benchmark.Cases(states, actions, None))
        assert not told["accepted"].any()
        assert np.isfinite(told["action_executed"]).all()
        assert small.action_space.contains(told["action_executed"][0])


@register_constraint("export ring@1")
def ring(states: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(states, axis=-1) - 1.0)


@pytest.mark.parametrize("replacement", [None, ProjectedGradient(), FallbackPolicy()])
@pytest.mark.parametrize("actions", [benchmark.SPACES[1], gym.spaces.Discrete(4)])
def test_h_is_not_known_where_the_observation_is_not_readable(
    replacement: object, actions: gym.Space[Any], tmp_path: Path
) -> None:
    # The function computes h of what it is given; a caller and a graph pass what it returned.
    if isinstance(actions, gym.spaces.Discrete) and isinstance(replacement, ProjectedGradient):
        pytest.skip("this strategy needs a Box")
    given = {} if replacement is None else {"replacement": replacement}
    source = ConstraintSource("test-caller@1")
    caller = benchmark.random_shield(benchmark.SPACES[0], actions, **TINY, source=source, **given)
    shield = caller.with_constraint(ConstraintSource("export ring@1"))
    rng = np.random.default_rng(3)
    states = rng.uniform(-2.0, 2.0, (300, 2)).astype(np.float32)
    states[np.arange(300), rng.integers(2, size=300)] = rng.choice(
        [np.nan, np.inf, -1e8, 1e30, 3e38], 300
    )
    proposed = benchmark.points(actions, 300, rng, 1.0)
    h = ring(states.astype(np.float64))
    executed, report = shield.filter(states, proposed)
    assert not report.valid.any()
    by_caller, _ = caller.filter(states, proposed, constraint=h)
    exported = benchmark.Exported(shield, tmp_path / "shield.onnx")
    by_graph = exported(benchmark.Cases(states, proposed, h))["action_executed"]
    np.testing.assert_array_equal(by_caller, executed)
    np.testing.assert_allclose(by_graph, executed, atol=1e-5)
    each = [shield.filter(state, action)[0] for state, action in zip(states, proposed, strict=True)]
    np.testing.assert_allclose(each, executed, atol=1e-5)


# -- metadata --------------------------------------------------------------------------------------


def test_the_candidates_are_those_of_python(tmp_path: Path) -> None:
    shield = benchmark.random_shield(*benchmark.SPACES, **TINY)
    found = shield.export_onnx(tmp_path / "shield.onnx").header["candidates"]
    tables = CandidateSet().tables(shield.model)
    np.testing.assert_array_equal(np.array(found["noise"], np.float32), tables.noise)
    np.testing.assert_array_equal(np.array(found["around"], np.float32), tables.around)
    np.testing.assert_allclose(found["points"], shield.model.scaling.to_box(tables.box), atol=1e-6)


def test_the_record_is_embedded(calibrated: Shield, tmp_path: Path) -> None:
    from safeshield.shield.export import read_onnx

    path = tmp_path / "shield.onnx"
    exported = benchmark.Exported(calibrated, path)
    contents = read_onnx(path)
    assert calibrated.record is not None
    assert contents.promise == calibrated.record.promise
    assert contents.header["record"] == json.loads(json.dumps(calibrated.record.to_json()))
    assert contents.header["shield"] == calibrated.digest
    assert contents.header["delta"] == calibrated.delta
    rng = np.random.default_rng(0)
    states = benchmark.points(calibrated.observation_space, 500, rng)
    actions = benchmark.points(calibrated.action_space, 500, rng)
    told = exported(benchmark.Cases(states, actions, None))["certified"]
    assert (told != calibrated.certified(states)).sum() <= 1
    uncalibrated = benchmark.Exported(replace(calibrated, record=None), path)
    assert not uncalibrated(benchmark.Cases(states, actions, None))["certified"].any()


def test_a_policy_that_was_not_calibrated_has_no_promise(
    calibrated: Shield, tmp_path: Path
) -> None:
    path = tmp_path / "shield.onnx"
    widths = calibrated.model.observation_codec.width, calibrated.model.action_codec.width
    module = torch.nn.Linear(*widths)
    other = calibrated.export_onnx(path, module)
    assert "the graph acts by 'Linear'" in other.promise
    assert other.header["record"] is None
    record = calibrated.record
    assert record is not None
    (name, *_) = [one.policy for one in record.policies]
    mode = record.deterministic is not False
    assert calibrated.export_onnx(
        path, module, policy_name=name, deterministic=mode
    ).promise == record.promise  # fmt: skip
    # A module acts alike in both modes; what has a `predict` may have noise.
    module.predict = None  # type: ignore[assignment]
    tested = replace(calibrated, record=replace(record, deterministic=True))
    sampled = tested.export_onnx(path, module, policy_name=name, deterministic=False)
    assert "deterministic=False" in sampled.promise
    del module.predict
    alike = tested.export_onnx(path, module, policy_name=name, deterministic=False)
    assert alike.header["record"] is not None


def test_a_file_that_was_edited_is_refused(small: Shield, tmp_path: Path) -> None:
    from safeshield.shield.export import read_onnx

    path = tmp_path / "shield.onnx"
    written = small.export_onnx(path)
    assert read_onnx(path) == written
    model = onnx.load(str(path))
    text = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps({**text, "promise": "everything"})
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="damaged or was edited"):
        read_onnx(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match="no ONNX graph of a shield"):
        read_onnx(path)
    small.export_onnx(path)
    model = onnx.load(str(path))
    model.graph.initializer[-1].raw_data = bytes(len(model.graph.initializer[-1].raw_data))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="damaged or was edited"):
        read_onnx(path)
    for change in ("operators", "functions"):
        small.export_onnx(path)
        model = onnx.load(str(path))
        if change == "operators":
            model.opset_import[0].version = 17
        else:
            model.functions.add(name="Relu", domain="")
        onnx.save(model, str(path))
        with pytest.raises(ValueError, match="damaged or was edited"):
            read_onnx(path)


# -- policies --------------------------------------------------------------------------------------


def proposed(shield: Shield, policy: object, folder: Path, **more: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Return observations, and the outputs of a graph with the policy inside."""
    exported = benchmark.Exported(shield, folder / "shield.onnx", policy=policy)
    states = benchmark.points(shield.observation_space, 200, np.random.default_rng(0))
    told = exported(benchmark.Cases(states, None, None), **more)
    given = benchmark.Cases(states, told["action_proposed"], None)
    benchmark.compare(shield, told, given)
    return states, told["action_proposed"]


@pytest.mark.parametrize("name", ["PPO", "SAC", "TD3", "DQN", "A2C"])
def test_policies_of_sb3(name: str, tmp_path: Path) -> None:
    import stable_baselines3

    discrete = name in ("DQN", "A2C")
    actions = gym.spaces.Discrete(4) if discrete else benchmark.SPACES[1]
    shield = benchmark.random_shield(benchmark.SPACES[0], actions, **TINY)
    options = {"n_steps": 8} if name in ("PPO", "A2C") else {"buffer_size": 10}
    env = Still(benchmark.SPACES[0], actions)
    made = getattr(stable_baselines3, name)
    model = made("MlpPolicy", env, device="cpu", seed=0, **options)
    states, actions_of_graph = proposed(shield, model, tmp_path)
    told, _ = model.predict(states, deterministic=True)
    np.testing.assert_allclose(actions_of_graph, told, atol=1e-5)
    assert len(np.unique(actions_of_graph.round(3))) > 1


class Normalised(torch.nn.Module):
    """A policy of Stable-Baselines3 behind a normalisation, as `docs/export.md` advises."""

    def __init__(self, policy: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.policy = policy

    def forward(self, seen: Any) -> Any:  # noqa: ANN401
        hidden = self.policy.mlp_extractor.forward_actor((seen - 0.5) / 0.1)
        return self.policy.action_net(hidden).clip(-1.0, 1.0)


def test_a_module_that_holds_a_policy_of_sb3_is_exported_whole(
    small: Shield, tmp_path: Path
) -> None:
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", Still(*benchmark.SPACES), device="cpu", n_steps=8)
    module = Normalised(model.policy).eval()
    states, actions = proposed(small, module, tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(actions, module(torch.as_tensor(states)), atol=1e-5)


def test_the_noise_of_a_gaussian_policy_is_an_input(small: Shield, tmp_path: Path) -> None:
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", Still(*benchmark.SPACES), n_steps=8, device="cpu")
    exported = benchmark.Exported(
        small, tmp_path / "shield.onnx", policy=model, deterministic=False
    )
    states = benchmark.points(small.observation_space, 5, np.random.default_rng(0))
    given, still = benchmark.Cases(states, None, None), np.zeros((5, 2), np.float32)
    mean = exported(given, noise=still)["action_proposed"]
    moved = exported(given, noise=still + 0.25)["action_proposed"]
    np.testing.assert_allclose(moved - mean, 0.25, atol=1e-5)  # the standard deviation is 1


@pytest.mark.parametrize("name", ["bc", "fisor", "flrp", "safefql", "safefql_joint"])
def test_agents_of_the_package(name: str, tmp_path: Path) -> None:
    agent: Any = load_agent(GOLDEN / f"agent_{name}.safetensors")
    box = agent.observation_space, agent.action_space
    shield = benchmark.random_shield(*box, **TINY)
    states, actions = proposed(shield, agent, tmp_path)
    told, _ = agent.predict(states, deterministic=True)
    apart = np.abs(actions - told).max(axis=1) > 1e-5
    assert apart.sum() <= 2  # its own gate decides by rounding, too
    assert np.ptp(actions) > 0.01


@pytest.mark.parametrize("name", ["safefql_joint", "flrp"])
def test_an_agent_that_finds_nothing_acceptable(name: str, tmp_path: Path) -> None:
    """It then acts by `last_resort`."""
    agent: Any = load_agent(GOLDEN / f"agent_{name}.safetensors").with_candidates(4)
    agent = agent.with_margin(1e3)._changed(last_resort="nearest")
    shield = benchmark.random_shield(agent.observation_space, agent.action_space, **TINY)
    states, actions = proposed(shield, agent, tmp_path)
    told, _ = agent.predict(states, deterministic=True)
    apart = np.abs(actions - told).max(axis=1) > 1e-5
    assert apart.sum() <= 2
    lowest, _ = agent._changed(last_resort="lowest").predict(states, deterministic=True)
    assert (np.abs(lowest - told).max(axis=1) > 0.1).any()


def test_modules_and_files_of_onnx(small: Shield, tmp_path: Path) -> None:
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(2, 8), nn.GELU(), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 2), nn.Tanh()
    )
    states, actions = proposed(small, module, tmp_path)
    with torch.no_grad():
        told = module(torch.tensor(states)).numpy()
    np.testing.assert_allclose(actions, told, atol=1e-5)
    recorder = Recorder()
    x = recorder.input("x", torch.float32, (BATCH, 2))
    recorder.output("y", module(x))
    graph = onnx.helper.make_model(
        recorder.graph("policy"), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(graph, str(tmp_path / "policy.onnx"))
    _, again = proposed(small, tmp_path / "policy.onnx", tmp_path)
    np.testing.assert_array_equal(again, actions)


class Made(torch.nn.Module):
    """A policy that is a function of tensors, in the dtype `dtype`."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function, self.layer = function, torch.nn.Linear(2, 2).to(dtype)

    def forward(self, seen: Any) -> Any:  # noqa: ANN401
        return self.function(self.layer, seen)


def graph_of(path: Path, body: str, inputs: str = "float[N,2] x", outputs: str = "y") -> Path:
    """Write a policy in ONNX's own text, and return its path."""
    outputs = f"float[N,2] {outputs}" if outputs == "y" else outputs
    text = f'<ir_version: 8, opset_import: ["": 18]> policy ({inputs}) => ({outputs}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), str(path))
    return path


INTEGERS = gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([3, 4]), gym.spaces.MultiBinary(2)


@pytest.mark.parametrize("space", [*INTEGERS, gym.spaces.Box(0, 5, (2,), np.int64)], ids=str)
def test_numbers_that_are_no_integers_are_refused_for_integers(
    space: gym.Space[Any], tmp_path: Path
) -> None:
    """1.7 was executed as 1, and NaN as some integer."""
    shield = benchmark.random_shield(benchmark.SPACES[0], space, **TINY)
    single = isinstance(space, gym.spaces.Discrete)
    module = Made(lambda layer, seen: layer(seen)[:, 0] if single else layer(seen))
    body = "zero = Constant <value: tensor = int64 {0}> () y = Gather <axis = 1> (x, zero)"
    body, out = (body, "float[N] y") if single else ("y = Identity(x)", "float[N,2] y")
    for policy in (module, graph_of(tmp_path / "policy.onnx", body, outputs=out)):
        with pytest.raises(ValueError, match=r"must return integers for .*, got torch\.float32"):
            shield.export_onnx(tmp_path / "shield.onnx", policy)
    assert not (tmp_path / "shield.onnx").exists()


@pytest.mark.parametrize(
    "space", [*INTEGERS[1:], gym.spaces.Box(-128, 127, (2,), np.int8)], ids=str
)
def test_integers_of_a_policy_are_judged_before_they_are_narrowed(
    space: gym.Space[Any], tmp_path: Path
) -> None:
    """257 is 1 as an int8."""
    shield = benchmark.random_shield(benchmark.SPACES[0], space, **TINY, accept=0.9)
    policy = Made(lambda layer, seen: torch.where(seen > 0, 257, 1))
    exported = benchmark.Exported(shield, tmp_path / "shield.onnx", policy=policy)
    states = benchmark.points(shield.observation_space, 200, np.random.default_rng(0))
    found = exported(benchmark.Cases(states, None, None))
    wanted, report = shield.filter(states, np.where(states > 0, 257, 1))
    np.testing.assert_array_equal(found["accepted"], ~report.intervened)
    np.testing.assert_array_equal(found["valid"], report.valid)
    np.testing.assert_array_equal(found["action_executed"], wanted)
    assert not found["accepted"][(states > 0).any(1)].any()
    assert found["accepted"].any()


def test_actions_of_float64_that_exceed_float32(small: Shield, tmp_path: Path) -> None:
    """A finite number is not infinite for the shield, and NaN is not valid."""
    body = (
        "wide = Cast <to = 11> (x) most = Constant <value: tensor = double {1e300}> () "
        "log = Log(wide) y = Mul(log, most)"
    )
    policy = graph_of(tmp_path / "policy.onnx", body, outputs="double[N,2] y")
    exported = benchmark.Exported(small, tmp_path / "shield.onnx", policy=policy)
    states = np.array([[1.5, 1.5], [0.5, 2.0], [-1.0, 1.5], [0.0, 0.5]], np.float32)
    found = exported(benchmark.Cases(states, None, None))
    with np.errstate(all="ignore"):
        _, report = small.filter(states, np.log(states.astype(np.float64)) * 1e300)
    np.testing.assert_array_equal(found["valid"], report.valid)
    assert found["valid"].tolist() == [True, True, False, False]


def test_modules_that_pytorch_writes(small: Shield, tmp_path: Path) -> None:
    """Operations that the package cannot write, and weights of float64."""
    functions = [
        lambda layer, seen: layer(seen) * seen.gt(0.0),
        lambda layer, seen: layer(seen).double(),
        lambda layer, seen: layer(seen.unsqueeze(0)).squeeze(0),
        lambda layer, seen: layer(seen) - seen.new_ones(3, 4).mean(),
        lambda layer, seen: torch.full((seen.shape[0], 2), 0.5),
        lambda layer, seen: layer(seen) * seen.shape[0] / seen.shape[0],
        lambda layer, seen: torch.cumsum(layer(seen).view(seen.shape[0], -1), -1),
    ]
    modules = [Made(one) for one in functions]
    modules.append(Made(lambda layer, seen: layer(seen), torch.float64))
    for module in modules:
        states, actions = proposed(small, module, tmp_path)
        like = module.layer.weight.dtype
        with torch.no_grad():
            wanted = module(torch.tensor(states).to(like)).numpy()
        np.testing.assert_allclose(actions, wanted, atol=1e-5)
    single = benchmark.random_shield(benchmark.SPACES[0], INTEGERS[0], **TINY)
    _, actions = proposed(single, Made(lambda layer, seen: (seen[:, 0] > 0).long()), tmp_path)
    assert set(actions) == {0, 1}
    _, actions = proposed(single, Made(lambda _, seen: torch.full((seen.shape[0],), 2)), tmp_path)
    assert set(actions) == {2}


def test_modules_of_dict_observations_that_pytorch_writes(tmp_path: Path) -> None:
    space = gym.spaces.Dict({"b": benchmark.Box(-3, 3, (2,)), "a": gym.spaces.Discrete(3)})
    shield = benchmark.random_shield(space, benchmark.SPACES[1], **TINY)
    policy = Made(lambda layer, seen: layer(seen["b"]) * seen["a"].gt(1.0)[:, None])
    exported = benchmark.Exported(shield, tmp_path / "shield.onnx", policy=policy)
    states = {
        "a": np.array([0, 2, 1, 2]), "b": np.random.default_rng(0).random((4, 2), np.float32)
    }  # fmt: skip
    found = exported(benchmark.Cases(states, None, None))["action_proposed"]
    with torch.no_grad():
        wanted = policy({name: torch.tensor(one).float() for name, one in states.items()})
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_modules_that_no_exporter_writes(small: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.onnx"
    listed = Made(lambda layer, seen: layer(seen) + torch.tensor(seen.tolist()))
    solved = Made(
        lambda layer, seen: (
            layer(seen) + torch.linalg.eigvals(seen[:, :, None] * seen[:, None]).real
        )
    )
    drawn = Made(lambda layer, seen: layer(seen) + torch.randn_like(seen))
    rows = Made(lambda layer, seen: torch.stack([layer(one) for one in seen]))
    centred = Made(lambda layer, seen: layer(seen - seen.mean(0)))
    branching = Made(lambda layer, seen: layer(seen) * (1.0 if float(seen[0, 0]) > 99.0 else 0.5))
    for module, words in (
        (centred, "must choose each action by its own observation, got .* in one batch"),
        (branching, r"float\(\) or int\(\) need it now: .* write torch.where in place of `if`"),
        (rows, "the number of rows is known only when the graph runs"),
        (
            listed,
            "Made cannot be written to an ONNX graph: the operation Tensor.tolist has no node",
        ),
        (
            solved,
            r"torch\.linalg_eigvals cannot be written as ONNX here.*PyTorch.*aten\.linalg_eig",
        ),
        (
            drawn,
            "must not draw random numbers, because a graph acts by one rule, got the operation",
        ),
        (
            torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)),
            r"training mode.*eval\(\)",
        ),
    ):
        with pytest.raises(CannotExportError, match=words):
            small.export_onnx(path, module)
    assert not path.exists()
    with pytest.warns(UserWarning, match="not finite for some observations in the observation"):
        small.export_onnx(path, Made(lambda layer, seen: layer(seen).sqrt()))
    with pytest.raises(ValueError, match=r"must return numbers of .*, got torch\.float16"):
        small.export_onnx(path, torch.nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match=r"must take n observations as a tensor of shape.*raises"):
        small.export_onnx(path, torch.nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "words"),
    [
        ("y = Identity(x)", "float[N,5] x", "float[N,5] y", "must take observations of shape"),
        ("y = Identity(x)", "string[N,2] x", "string[N,2] y", "input 'x' is STRING"),
        ("y = Cast <to = 8> (x)", "float[N,2] x", "string[N,2] y", "must return numbers .* STRING"),
        ("y = Concat <axis = 1> (x, x)", "float[N,2] x", "float[N,4] y", "must return actions of"),
        ("y = ReduceSum <keepdims = 0> (x)", "float[N,2] x", "float y", "must return actions of"),
        ("y = Identity(x)", "float[N,2] x, float[N,2] z", "float[N,2] y",
         r"must have one input, the observation, got the inputs \['x', 'z'\]"),
        ("s = Constant <value: tensor = int64[2] {1, 2}> () y = Reshape(x, s)", "float[1,2] x",
         "float[1,2] y", "must run in ONNX Runtime for any number of observations"),
        ("y = RandomNormalLike(x)", "float[N,2] x", "float[N,2] y", "operation RandomNormalLike"),
        ("y = Bernoulli(x)", "float[N,2] x", "float[N,2] y", "the operation Bernoulli"),
        ("r = Constant <value: tensor = float {0.5}> () "
         "t = Constant <value: tensor = bool {1}> () y = Dropout(x, r, t)",
         "float[N,2] x", "float[N,2] y", "Dropout in training mode"),
    ],
)  # fmt: skip
def test_files_that_are_no_policies(
    body: str, inputs: str, outputs: str, words: str, small: Shield, tmp_path: Path
) -> None:
    policy = graph_of(tmp_path / "policy.onnx", body, inputs, outputs)
    with pytest.raises((ValueError, CannotExportError), match=words) as error:
        small.export_onnx(tmp_path / "shield.onnx", policy)
    assert "policy.onnx" in str(error.value)
    assert not (tmp_path / "shield.onnx").exists()


def test_files_for_one_row_and_without_onnx_runtime(
    small: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = graph_of(
        tmp_path / "policy.onnx", "y = Tanh(x)", "float[1,2] x", "float[1,2] y"
    )  # fmt: skip
    states, actions = proposed(small, policy, tmp_path)
    np.testing.assert_allclose(actions, np.tanh(states), atol=1e-6)
    body = "y = Concat <axis = 1> (x, x)"
    wide = graph_of(tmp_path / "wide.onnx", body, outputs="float[N,4] y")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    small.export_onnx(tmp_path / "shield.onnx", policy)
    with pytest.raises(ValueError, match=r"wide\.onnx must return actions of shape"):
        small.export_onnx(tmp_path / "shield.onnx", wide)


def test_files_that_are_damaged(small: Shield, tmp_path: Path) -> None:
    policy, out = graph_of(tmp_path / "policy.onnx", "y = Identity(x)"), tmp_path / "shield.onnx"
    whole = policy.read_bytes()
    with pytest.raises(FileNotFoundError, match="no such file"):
        small.export_onnx(out, tmp_path / "none.onnx")
    outside = onnx.load_from_string(whole)
    table = onnx.helper.make_tensor("w", 1, [2], [0.0, 0.0])
    table.ClearField("float_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    table.external_data.add(key="location", value="weights.bin")
    outside.graph.initializer.append(table)
    for content in (b"not a graph", whole[:-9], outside.SerializeToString(), b""):
        policy.write_bytes(content)
        with pytest.raises(ValueError, match=r"policy\.onnx must be an ONNX file that is whole"):
            small.export_onnx(out, policy)


def test_a_session_that_fails_writes_no_file(
    small: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    with pytest.raises(CannotExportError, match=r"does not run in ONNX Runtime: no such node"):
        small.export_onnx(tmp_path / "shield.onnx")
    assert not (tmp_path / "shield.onnx").exists()
    with pytest.raises(ValueError, match=r"path must end in \.onnx, got 'shield\.txt'"):
        small.export_onnx("shield.txt")


def test_what_cannot_be_exported_is_named(small: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.onnx"
    nearest = benchmark.random_shield(*benchmark.SPACES, **TINY)
    brake = BackupController("test-brake@1", lambda seen: np.zeros((len(seen), 2)))
    for shield, words in (
        (nearest.with_replacement(OwnSamples("random")), "got OwnSamples, which calls a function"),
        (nearest.with_replacement(brake), "got BackupController"),
    ):
        with pytest.raises(CannotExportError, match=words):
            shield.export_onnx(path)
    r2pac = load_agent(GOLDEN / "agent_r2pac.safetensors")
    box = benchmark.random_shield(r2pac.observation_space, r2pac.action_space, **TINY)
    with pytest.raises(CannotExportError, match="R2PAC cannot be written to an ONNX graph"):
        box.export_onnx(path, r2pac)
    safefql: Any = load_agent(GOLDEN / "agent_safefql.safetensors")
    model = replace(safefql._fitted(), constraint=ConstraintSource("test-other@1"))
    safefql._model, safefql._safety_model = model, None
    shield = benchmark.random_shield(model.observation_space, model.action_space, **TINY)
    with pytest.raises(CannotExportError, match=r"takes h from 'test-other@1', but the shield"):
        shield.export_onnx(path, safefql)
    with pytest.raises(CannotExportError, match="a function of Python has no graph"):
        small.export_onnx(path, lambda seen: seen)
    with pytest.raises(CannotExportError, match=r"must be an \.onnx file"):
        small.export_onnx(path, "agent.zip")
    with pytest.raises(ValueError, match="must return actions of shape"):
        small.export_onnx(path, torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="policy_name must be left out"):
        small.export_onnx(path, policy_name="agent")
    with pytest.raises(ValueError, match="observation_space"):
        small.export_onnx(path, load_agent(GOLDEN / "agent_bc.safetensors"))
    assert not path.exists()


def test_an_operation_without_a_node_is_named() -> None:
    x = Recorder().input("x", torch.float32, (BATCH, 3))
    with pytest.raises(CannotExportError, match=r"torch\.cumsum cannot be written"):
        torch.cumsum(x, -1)  # type: ignore[call-overload]
    with pytest.raises(CannotExportError, match="`if` needs it now"):
        bool(x > 0)
    with pytest.raises(CannotExportError, match=r"len\(\) needs it now"):
        len(x)


def test_a_missing_package_is_named(small: Shield, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "safeshield\[onnx\]"'):
        small.export_onnx("shield.onnx")


def test_a_shield_in_python_loads_nothing_of_it() -> None:
    code = (
        "import sys; from safeshield import Shield, SafetyShield; "
        f"Shield.load({str(GOLDEN / 'shield_nearest.safetensors')!r}); "
        "assert not {'onnx', 'onnxruntime', 'torch', 'safeshield.shield.export'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_of_a_graph_are_those_of_tensors(tmp_path: Path) -> None:
    """Operations whose axes and dtypes are easy to get wrong."""
    table = torch.arange(6.0).reshape(2, 3) - 2.0

    def some(x: Any) -> list[Any]:  # noqa: ANN401 - a tensor or a value of a graph
        return [
            1.0 - x, 2.0 / (x + 9.0), x[:, 1], x[..., None, 0], x[:, ::2], (x > 0) & (x < 3),
            torch.where(x > 0, x, 0.0), torch.cat([x, x * 2], -1), x.argmin(1), x.amax(0),
            x.sum(-1, keepdim=True), x.to(torch.float64) / 3, x.clip(-1.0, 1.0), table @ x.mT,
            x.nan_to_num(), x.lerp(x * 2, 0.5), x.log_softmax(-1), torch.isfinite(x),
            x.reshape(-1), x[:, None].expand(-1, 4, -1).flatten(0, 1), (x > 0).any(1),
        ]  # fmt: skip

    recorder = Recorder()
    made = some(recorder.input("x", torch.float32, (BATCH, 3)))
    for i, one in enumerate(made):
        assert isinstance(one, Traced)
        recorder.output(f"y{i}", one)
    model = onnx.helper.make_model(
        recorder.graph("some"), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "some.onnx"))
    session = benchmark.session(tmp_path / "some.onnx")
    x = torch.tensor([[-1.0, 0.5, 4.0], [2.0, -3.0, 1.0]])
    for told, want in zip(session.run(None, {"x": x.numpy()}), some(x), strict=True):
        assert told.dtype == want.numpy().dtype
        np.testing.assert_allclose(told, want.numpy(), rtol=1e-6)


# -- the command and the programs ------------------------------------------------------------------


def test_the_command_line(small: Shield, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from safeshield.cli.main import app

    small.save(tmp_path / "shield.safetensors")
    run = CliRunner().invoke
    source, out = str(tmp_path / "shield.safetensors"), str(tmp_path / "shield.onnx")
    done = run(app, ["export", source, "-o", out])
    assert done.exit_code == 0, done.output
    assert "inputs observation, action, delta" in done.output
    assert "promise: none: the shield is not calibrated" in done.output
    assert run(app, ["export", source, "-o", "shield.pt"]).exit_code == 2
    assert run(app, ["export", source, "-o", out, "--stochastic"]).exit_code == 2
    described = run(app, ["inspect", out])
    assert described.exit_code == 0, described.output
    for words in (
        "graph",
        "none: the shield is not calibrated",
        small.digest,
        "observation, action",
    ):
        assert words in described.output
    assert "inputs" in json.loads(run(app, ["inspect", out, "--json"]).output)
    policy = str(graph_of(tmp_path / "policy.onnx", "y = Bernoulli(x)"))
    for command, words in (
        (["export", source, "-o", out, "--policy", policy], "policy.onnx must not draw random"),
        (["export", source, "-o", out, "--policy", "agent.pt"], "a torch.nn.Module is exported in"),
        (["export", source, "-o", out, "--policy", "own:act"], "of Python has no graph"),
        (["inspect", policy], "policy.onnx is no ONNX graph of a shield: it has no metadata"),
        (["export", out, "-o", out], "must be an agent or a shield, but is a graph"),
        (["sign", out, "--key", policy], "must be an agent, a shield or a checkpoint, got a graph"),
        (["inspect", out, "--verify", policy], "--verify is for files that can be signed"),
    ):
        failed = run(app, command)
        assert failed.exit_code == 2, failed.output
        assert words in " ".join(failed.output.split())
        assert isinstance(failed.exception, SystemExit)


def test_the_program_for_onnx_runtime(small: Shield, tmp_path: Path) -> None:
    small.export_onnx(tmp_path / "shield.onnx")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/deploy/onnx_runtime.py"), "shield.onnx",
         "--seconds", "0.3", "--rate", "200"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "60 decisions" in done.stdout
    assert "promise: none" in done.stdout


def told(shield: Shield) -> Shield:
    """Return the shield that takes h from its caller."""
    return shield.with_constraint(ConstraintSource("test-caller@1"))


def ros(monkeypatch: pytest.MonkeyPatch, graph: Path) -> SimpleNamespace:
    """Import the node for ROS 2 with stand-ins for its modules; ROS is not on PyPI."""
    world = SimpleNamespace(sent={}, heard={}, now=0.0, errors=[])
    parameters = {"graph": str(graph)}

    class Node:
        def __init__(self, name: str) -> None:
            self.name = name

        def declare_parameter(self, name: str, value: object) -> None:
            parameters.setdefault(name, value)

        def get_parameter(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(value=parameters[name])

        def get_logger(self) -> SimpleNamespace:
            quiet = {"info": len, "warning": len, "error": world.errors.append}
            return SimpleNamespace(**quiet)

        def get_clock(self) -> SimpleNamespace:
            time = SimpleNamespace(nanoseconds=int(world.now * 1e9))
            return SimpleNamespace(now=lambda: time)

        def create_publisher(self, kind: type, topic: str, depth: int) -> SimpleNamespace:
            return SimpleNamespace(publish=lambda message: world.sent.update({topic: message.data}))

        def create_subscription(
            self, kind: type, topic: str, heard: Callable[[SimpleNamespace], None], depth: int
        ) -> None:
            world.heard[topic] = lambda data: heard(SimpleNamespace(data=data))

    message = {"Bool": SimpleNamespace, "Float32MultiArray": SimpleNamespace, "Float64": float}
    for name, members in {
        "rclpy": {}, "rclpy.node": {"Node": Node}, "std_msgs": {}, "std_msgs.msg": message,
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("node", ROOT / "examples/deploy/ros2_node.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    world.node = module.ShieldNode()
    return world


@pytest.mark.parametrize("kind", ["estimates h", "is told h"])
def test_the_node_for_ros_2_decides_as_python(
    kind: str, small: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shield = small if kind == "estimates h" else told(small)
    shield.export_onnx(tmp_path / "shield.onnx")
    world = ros(monkeypatch, tmp_path / "shield.onnx")
    assert ("constraint" in world.heard) == (kind == "is told h")
    seen = shield.observation_space.sample()
    proposed = shield.action_space.sample()

    def decide(h: float | None) -> None:
        world.heard["command_proposed"](proposed.tolist())
        executed, report = shield.filter(seen, proposed, constraint=h)
        np.testing.assert_allclose(world.sent["command"], executed, atol=1e-5)
        assert world.sent["shield/accepted"] == (not report.intervened)

    def unknown() -> None:
        world.heard["command_proposed"](proposed.tolist())
        assert not world.sent["shield/accepted"]

    unknown()
    assert not world.sent["shield/valid"]
    world.heard["observation"](seen.tolist())
    if kind == "is told h":
        unknown()
        world.heard["constraint"](-0.7)
        decide(-0.7)
    else:
        decide(None)
    assert world.sent["shield/valid"]
    world.now = 0.2  # The observation is too old now.
    unknown()
    assert not world.sent["shield/valid"]
    world.heard["observation"](seen.tolist()[:1])
    assert len(world.errors) == 1
    unknown()


@pytest.mark.skipif(
    "ONNXRUNTIME_HOME" not in os.environ or shutil.which("g++") is None,
    reason="needs g++ and a release of ONNX Runtime for C++ in ONNXRUNTIME_HOME",
)
def test_the_program_in_cpp_decides_as_python(small: Shield, tmp_path: Path) -> None:
    home = Path(os.environ["ONNXRUNTIME_HOME"])
    program, lib = ROOT / "examples/deploy/shield.cpp", home / "lib"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", str(program), f"-I{home / 'include'}", f"-L{lib}",
         "-lonnxruntime", f"-Wl,-rpath,{lib}", "-o", "shield"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    for number, shield in enumerate([small, told(small)]):
        shield.export_onnx(tmp_path / f"{number}.onnx")
        done = subprocess.run(
            ["./shield", f"{number}.onnx", "50"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "50 decisions" in done.stdout
        rows = {
            name: np.array([float(entry) for entry in entries])
            for name, *entries in map(str.split, done.stdout.splitlines())
            if name in {"observation", "proposed", "executed", "constraint"}
        }
        assert ("constraint" in rows) == (number == 1)
        h = rows["constraint"][0] if "constraint" in rows else None
        seen, proposed = (rows[name].astype(np.float32) for name in ("observation", "proposed"))
        executed, report = shield.filter(seen, proposed, constraint=h)
        np.testing.assert_allclose(rows["executed"], executed, atol=1e-5)
        assert f"accepted {int(not report.intervened)}," in done.stdout
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    done = subprocess.run(
        ["./shield", "broken.onnx"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"broken.onnx" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_program_in_cpp_is_well_formed(tmp_path: Path) -> None:
    """Against declarations of the functions that it calls, where the real headers are missing."""
    (tmp_path / "onnxruntime_cxx_api.h").write_text(
        """#pragma once
        #include <cstddef>
        #include <cstdint>
        #include <memory>
        #include <vector>
        using StringPtr = std::unique_ptr<char[]>;
        enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR };
        enum OrtAllocatorType { OrtArenaAllocator };
        enum OrtMemType { OrtMemTypeDefault };
        namespace Ort {
        struct Env { Env(OrtLoggingLevel, const char*); };
        struct SessionOptions { void SetIntraOpNumThreads(int); void SetInterOpNumThreads(int); };
        struct AllocatorWithDefaultOptions {};
        struct ModelMetadata {
          StringPtr LookupCustomMetadataMapAllocated(const char*, AllocatorWithDefaultOptions&);
        };
        struct MemoryInfo { static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType); };
        struct Value {
          template <class T> static Value CreateTensor(
              MemoryInfo&, T*, std::size_t, const std::int64_t*, std::size_t);
          template <class T> const T* GetTensorData() const;
        };
        struct Shape { std::vector<std::int64_t> GetShape(); };
        struct TypeInfo { Shape GetTensorTypeAndShapeInfo(); };
        struct RunOptions { RunOptions(std::nullptr_t); };
        struct Session {
          Session(std::nullptr_t); Session(Env&, const char*, const SessionOptions&);
          ModelMetadata GetModelMetadata(); TypeInfo GetInputTypeInfo(std::size_t);
          std::size_t GetInputCount();
          StringPtr GetInputNameAllocated(std::size_t, AllocatorWithDefaultOptions&);
          std::vector<Value> Run(const RunOptions&, const char* const*, const Value*, std::size_t,
                                 const char* const*, std::size_t);
        };
        }  // namespace Ort
        """
    )
    program = ROOT / "examples/deploy/shield.cpp"
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{tmp_path}", str(program)],
        check=True,
    )


def test_a_gradient_needs_no_branch_of_its_own(tmp_path: Path) -> None:
    shield = benchmark.random_shield(
        *benchmark.SPACES, **TINY, replacement=ProjectedGradient(steps=2),
        source=ConstraintSource("test-caller@1"),
    )  # fmt: skip
    exported = benchmark.Exported(shield, tmp_path / "shield.onnx")
    given = benchmark.cases(shield, 300, np.random.default_rng(0))
    assert benchmark.compare(shield, exported(given), given)["cases"] == 300
