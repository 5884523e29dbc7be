"""Actors that shields act by: a new kind is one class; tensors and arrays give the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

from safeshield.nn.actor import (
    KINDS,
    Actor,
    Classifier,
    Described,
    FlowActor,
    OneStepActor,
    Widths,
    from_header,
    register_actor,
    to_header,
)
from safeshield.nn.arrays import A, Deployed, NetworksOf, deployed, log_softmax
from safeshield.nn.latent_actor import LatentPolicy, LatentSpec
from safeshield.nn.mlp import EnsembleMLP, Networks, layers, run
from safeshield.nn.plan_actor import BestPlan, PlanActor
from safeshield.shield import Shield
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.scaling import Scaling
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import SAFETY_NETWORKS, SafetyScale

OBS, ACT = 3, 2
PARTS: list[Any] = [
    OneStepActor(OBS, ACT, (8, 8)),
    FlowActor(OBS, ACT, (8,), flow_steps=5),
    LatentPolicy(OBS, ACT, LatentSpec(3, (8,), transforms=3)),
    LatentPolicy(OBS, ACT, LatentSpec(2, (8,), transforms=2, prior="gaussian", refine_steps=0)),
    PlanActor(OBS, ACT, (8,), horizon=4),
    Classifier(OBS, 5, (8,)),
    BestPlan(PlanActor(OBS, ACT, (8,), horizon=3), (8, 8), members=3, plans=4),
]
CRITIC = SafetyCritics(OBS, ACT, (16, 16), SafetyScale(0.3, 2.0, 0.1))


def drawn(part: Described, seed: int = 0) -> Networks:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            key: 0.4 * torch.randn(shape, generator=generator) for key, shape in one.shapes.items()
        }
        for name, one in part.parts().items()
    }


def model_of(fallback: Actor, **more: Any) -> SafetyModel:  # noqa: ANN401
    networks = {**CRITIC.init(torch.Generator().manual_seed(1)), **drawn(fallback)}
    one = np.ones(ACT, np.float32)
    return SafetyModel(
        gym.spaces.Box(-np.inf, np.inf, (OBS,)),
        gym.spaces.Box(-1.0, 1.0, (ACT,)),
        Scaling(np.zeros(OBS, np.float32), np.ones(OBS, np.float32), -one, one),
        None,
        CRITIC.scale,
        deployed(networks),
        fallback,
        **more,
    )


def states(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, OBS)).astype(np.float32)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.kind)
def test_a_header_tells_all_of_an_actor(part: Any) -> None:  # noqa: ANN401
    header = json.loads(json.dumps(to_header(part)))
    assert from_header("fallback", header, Widths(OBS, ACT, 5), "parts") == part


@pytest.mark.parametrize("actor", PARTS[:5], ids=lambda part: part.kind)
def test_an_actor_does_the_same_on_tensors_and_on_arrays(actor: Actor) -> None:
    networks = drawn(actor)
    generator = torch.Generator().manual_seed(1)
    seen, noise = (torch.randn(20, n, generator=generator) for n in (OBS, actor.noise_features))
    expected = actor.act(networks, seen, noise)
    before = noise.numpy().copy()
    found = actor.act(deployed(networks), seen.numpy(), noise.numpy())
    assert found.dtype == np.float32
    assert found.shape == (20, ACT)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (np.abs(found) <= 1).all()
    np.testing.assert_array_equal(noise.numpy(), before)  # nothing is written into


def test_a_flow_goes_back_the_same_way_on_tensors_and_on_arrays() -> None:
    flow = FlowActor(OBS, ACT, (8,), flow_steps=7)
    networks = drawn(flow)
    generator = torch.Generator().manual_seed(1)
    seen, taken = (torch.randn(20, n, generator=generator).tanh() for n in (OBS, ACT))
    expected = flow.to_noise(networks, seen, taken)
    found = flow.to_noise(deployed(networks), seen.numpy(), taken.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_torchs() -> None:
    logits = 30.0 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits, -1)
    assert torch.equal(log_softmax(logits), expected)
    np.testing.assert_allclose(log_softmax(logits.numpy()), expected, atol=1e-5)


def test_what_is_derived_from_deployed_weights_is_made_once() -> None:
    params = EnsembleMLP(3, 1, (4,)).init(torch.Generator().manual_seed(0))
    assert layers(params) is not layers(params)  # training makes new tensors all the time
    kept = deployed({"net": params})["net"]
    assert layers(kept) is layers(kept)
    other = Deployed({**kept, "1.bias": kept["1.bias"] + 1.0})
    x = np.zeros((1, 3), np.float32)
    np.testing.assert_allclose(run(layers(other), x), run(layers(kept), x) + 1.0, atol=1e-6)


# -- the shield's critics against the formulas ---------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_the_shields_fast_passes_are_the_formulas(count: int) -> None:
    """V_h in one pass of two networks, and Q_h of one action: equal to `SafetyCritics`.

    A single state is judged in another order of additions, so its last digits may differ.
    """
    off = {"rtol": 1e-5, "atol": 1e-6} if count == 1 else {"rtol": 0, "atol": 0}
    model = model_of(OneStepActor(OBS, ACT, (8,)))
    seen, actions = states(count), np.zeros((count, ACT), np.float32) + np.float32(0.3)
    judged = model.states(seen)
    np.testing.assert_allclose(judged.value, CRITIC.value(model.networks, seen), **off)
    scaled = model.scaling.actions(actions)
    expected = CRITIC.action_value(model.networks, seen, scaled)
    np.testing.assert_allclose(model.action_values(judged, actions), expected, **off)
    alone = [
        model.action_value(judged.take(slice(i, i + 1)), actions[i]) for i in range(min(count, 20))
    ]
    np.testing.assert_allclose(alone, expected[:20], rtol=1e-5, atol=1e-5)
    tensors = CRITIC.action_value(
        {
            name: {key: torch.tensor(array) for key, array in model.networks[name].items()}
            for name in SAFETY_NETWORKS
        },
        torch.tensor(seen),
        torch.tensor(scaled),
    )
    np.testing.assert_allclose(expected, tensors, atol=1e-4)


# -- a kind of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """A network of one number for each entry of an action."""

    action: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gain": (1, self.action)}


@dataclass(frozen=True)
class Brake:
    """A user's fallback: gains, learned elsewhere, times the last of the observation's features."""

    kind: ClassVar[str] = "test_brake"
    action: int
    strength: float

    def parts(self) -> dict[str, Gain]:
        return {"brake": Gain(self.action)}

    def check(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"strength must be above 0, got {self.strength}")

    @property
    def noise_features(self) -> int:
        return 1

    def act(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        gain = networks["brake"]["gain"]
        braking: A = -self.strength * observations[:, -1:] * gain + 0.01 * noise
        return braking.clip(-1.0, 1.0)


@pytest.fixture
def brake() -> Iterator[type[Brake]]:
    yield register_actor(Brake)
    del KINDS[Brake.kind]


@pytest.mark.filterwarnings("ignore:this shield is not calibrated")
def test_a_new_fallback_is_one_class(brake: type[Brake], tmp_path: Path) -> None:
    shield = Shield(model_of(brake(ACT, 0.5)), delta=0.5)
    seen, proposed = states(50), np.full((50, ACT), 0.9, np.float32)
    gain = shield.model.networks["brake"]["gain"]
    expected = np.clip(-0.5 * seen[:, -1:] * gain, -1.0, 1.0)
    alone = shield.model.fallback_alone(shield.model.states(seen))
    np.testing.assert_allclose(alone, expected, atol=1e-6)
    shield.save(tmp_path / "shield")
    again = Shield.load(tmp_path / "shield")
    assert again.model.fallback_actor == shield.model.fallback_actor
    executed, report = shield.filter(seen, proposed)
    assert np.asarray(report.intervened).any()
    np.testing.assert_array_equal(again.filter(seen, proposed)[0], executed)
    Shield(model_of(brake(ACT, -1.0))).save(tmp_path / "shield")
    with pytest.raises(ValueError, match=r"does not describe a shield.*strength must be above 0"):
        Shield.load(tmp_path / "shield")


def test_files_name_registered_kinds_only(tmp_path: Path) -> None:
    shield = Shield(model_of(Brake(ACT, 0.5)))
    with pytest.raises(ValueError, match=r"Brake is not of a kind.*register_actor"):
        shield.save(tmp_path / "shield")
    register_actor(Brake)
    shield.save(tmp_path / "shield")
    del KINDS[Brake.kind]
    with pytest.raises(ValueError, match=r"'test_brake' is not known.*import the module"):
        Shield.load(tmp_path / "shield")


def test_a_kind_belongs_to_one_class(brake: type[Brake]) -> None:
    assert register_actor(brake) is brake

    @dataclass(frozen=True)
    class Other(Brake):
        pass

    with pytest.raises(ValueError, match=r"'test_brake' is taken by .*Brake"):
        register_actor(Other)


def test_a_behaviour_and_a_judge_are_kept_too(tmp_path: Path) -> None:
    planner = PlanActor(OBS, ACT, (8,), horizon=3)
    judge, flow = BestPlan(planner, (8, 8), members=3, plans=4), FlowActor(OBS, ACT, (8,), 5)
    model = model_of(planner)
    networks = {**model.networks, **deployed({**drawn(judge), **drawn(flow)})}
    model = replace(model, networks=networks, behaviour_actor=flow, judge=judge)
    Shield(model).save(tmp_path / "shield")
    again = Shield.load(tmp_path / "shield").model
    assert (again.fallback_actor, again.behaviour_actor, again.judge) == (planner, flow, judge)
    seen, actions = states(6), np.zeros((6, ACT), np.float32)
    values = [m.action_values(m.states(seen), actions) for m in (model, again)]
    np.testing.assert_array_equal(*values)


def test_a_shields_networks_run_without_torch() -> None:
    """Every kind of a shield's actors, in a process that cannot import it."""
    golden = Path(__file__).with_name("golden")
    code = f"""
import sys, warnings, pathlib
sys.modules["torch"] = None
warnings.simplefilter("ignore")
from safeshield import Shield
for path in sorted(pathlib.Path({str(golden)!r}).glob("shield_*.safetensors")):
    shield = Shield.load(path)
    shield.filter(shield.observation_space.sample(), shield.action_space.sample())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
