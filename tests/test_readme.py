"""The README's ten lines run, its commands exist, and so do the pages that it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from safeshield import Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.wrappers import ConstraintFromFunction

README = Path(__file__).parents[1] / "README.md"
SMALL = {
    "critic_hidden": (64, 64), "behaviour_hidden": (64, 64), "fallback_hidden": (64, 64),
    "learning_rate": 2e-3, "phase_shares": (0.6, 0.1, 0.3),
}  # fmt: skip
"""Settings of small networks that learn fast, which the examples use as well."""


def test_ten_lines(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    # As they stand, the lines take minutes. The test makes the networks small, trains them for
    # fewer updates, makes a step of the boat four times as long, and asks for a weaker promise.
    coarse = {"dt": 0.02, "max_episode_steps": 100}
    for full, small in (
        ("ShieldConfig(seed=0)", f"ShieldConfig(seed=0, **{SMALL})"),
        ("steps=20_000", "steps=2_000"),
        ('"safeshield/Boat-v0"', f'"safeshield/Boat-v0", **{coarse}'),
        ("epsilon=0.01, confidence=0.99", "epsilon=0.05, confidence=0.95"),
    ):
        assert full in code
        code = code.replace(full, small)
    log = collect(gym.make("safeshield/Boat-v0", **coarse), Helmsmen(), episodes=600, seed=0)
    log.save(tmp_path / "boat.hdf5")
    # In a process of its own: without the shape checks that the tests switch on.
    checks = "assert {'shield/value', 'shield/certified', 'action_executed'} <= set(info)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + checks], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shield = Shield.load(tmp_path / "boat.safetensors")
    assert shield.record is not None
    assert (shield.record.epsilon, shield.record.confidence) == (0.05, 0.95)
    assert shield.value(np.array([-0.5, 0.5])) > 0.2  # the middle of a rock of radius 0.4
    assert shield.certified(np.array([-2.5, 1.9]))


def test_the_command_line_exists() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safeshield.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in re.findall(
        r"`?safeshield (demo|collect|train|calibrate|evaluate|inspect)", README.read_text()
    ):
        assert command in done.stdout


def test_every_page_that_the_readme_names_is_there() -> None:
    named = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(named) >= 10
    assert [page for page in named if not (README.parent / page).exists()] == []


def test_the_import_lines_of_the_guide_work() -> None:
    guide = README.parent / "docs" / "shields.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"gym": gym, "collect": collect}
    exec(code[0], names)
    constraint, several = (block for block in code if "register_constraint" in block)
    plant = ConstraintFromFunction(gym.make("Pendulum-v1"), lambda obs: abs(obs[2]) - 6.0)
    names["other_log"] = collect(plant, "random", episodes=2, seed=0)
    exec(constraint.replace("episodes=500", "episodes=2"), names)
    assert getattr(names["log"], "constraint_source", None) == "pendulum-speed@1"
    exec(several.replace("episodes=500", "episodes=2"), names)
    source = str(getattr(names["log"], "constraint_source", None))
    assert re.fullmatch(r"max\(pendulum-speed@1 / \S+, pendulum-upright@1 / \S+\)", source)


def test_learning_online_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a shield of little training, and few steps."""
    page = README.parent / "docs" / "safe-support-q-learning.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "learn(10_000)" in block)
    plant = ConstraintFromFunction(gym.make("Pendulum-v1"), lambda obs: abs(obs[2]) - 6.0)
    config = ShieldConfig(seed=0, critic_hidden=(32,), behaviour_hidden=(16,))
    trainer = ShieldTrainer(config, device="cpu").fit(
        collect(plant, "random", episodes=150, seed=0), steps=1500
    )
    shield = trainer.calibrate(plant, policy="random", epsilon=0.5, confidence=0.9)
    shield.save(tmp_path / "shield.safetensors")
    monkeypatch.chdir(tmp_path)
    code = code.replace("temperature=0.5", "temperature=0.5, extraction_steps=20")
    exec(code.replace("learn(10_000)", "learn(1_200)"), {})
    assert "steps=1200" in capsys.readouterr().out
