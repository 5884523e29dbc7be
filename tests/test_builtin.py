"""Ready-made shields work right after the install, and keep what their records say."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

from safeshield import SafetyShield, Shield
from safeshield.evaluation import evaluate

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "safeshield" / "shield" / "builtin"
ENVIRONMENTS = {"boat": "safeshield/Boat-v0", "pendulum": "Pendulum-v1"}


def test_each_has_a_command_that_made_it_and_is_small() -> None:
    files = {path.stem: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == set(ENVIRONMENTS)
    assert max(files.values()) < 200_000
    made = (ROOT / "benchmarks" / "builtin.py").read_text()
    assert all(f"def {name}() -> Shield:" in made for name in files)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_it_is_calibrated_and_its_constraint_is_registered(name: str) -> None:
    shield = Shield.builtin(name)
    assert shield.record is not None
    assert shield.record.environment == ENVIRONMENTS[name]
    assert (shield.record.epsilon, shield.record.confidence) == (0.05, 0.95)
    assert shield.model.constraint is not None
    assert shield.model.constraint.available


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_text_names_it_also_in_another_process(name: str) -> None:
    env = SafetyShield(gym.make(ENVIRONMENTS[name]), f"builtin:{name}")
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for one in (env, again):
        _, info = one.reset(seed=3)
        assert info["shield/threshold"] == -Shield.builtin(name).delta
        _, _, _, _, info = one.step(one.action_space.sample())
        assert info["shield/value"] <= info["shield/threshold"] or info["shield/intervened"]


def test_the_boat_keeps_its_promise() -> None:
    """As far as 100 episodes show: more violations would have probability 1e-4 at its epsilon."""
    env = gym.make("safeshield/Boat-v0")
    found = evaluate(env, "random", 100, seed=99, shield="builtin:boat", starts="certified")
    assert found.violating <= 14
    assert found.intervention_rate is not None
    assert 0 < found.intervention_rate < 0.3


def test_a_name_that_is_not_there_is_an_error_that_names_the_others() -> None:
    message = (
        "name must be one of ['boat', 'pendulum'], the ready-made shields of the package, got "
        "'ship'; for a shield's own file pass its path"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SafetyShield(gym.make("safeshield/Boat-v0"), "builtin:ship")


def test_every_other_text_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="boat"):
        SafetyShield(gym.make("safeshield/Boat-v0"), "boat")
    with pytest.raises(FileNotFoundError, match=r"use Shield\.builtin\('boat'\)"):
        Shield.load("builtin:boat")
    Shield.builtin("boat").save("boat.safetensors")
    assert SafetyShield(gym.make("safeshield/Boat-v0"), "boat.safetensors").reset(seed=0)
