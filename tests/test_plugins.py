"""An eighth learner in one file, found by ``--plugin``; settings in help and in files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from typer.testing import CliRunner

from safeshield import OfflineDataset, Shield, ShieldTrainer, collect, load_agent
from safeshield.algorithms.r2pac import R2PACConfig
from safeshield.algorithms.registry import ALGORITHMS, register
from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
from safeshield.cli import app
from safeshield.cli.settings import read_settings, settings_help, write_settings
from safeshield.collection import LearnerConfig
from safeshield.files.settings import fields_of

PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
LINEAR = max(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL), key=len)
"""The algorithm of the documentation, whole."""


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with log.npz and linear.py."""
    folder = tmp_path_factory.mktemp("plugins")
    collect(gym.make("safeshield/Boat-v0"), "random", episodes=6, seed=0).save(folder / "log.npz")
    (folder / "linear.py").write_text(LINEAR)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    out = folder / "agent.safetensors"
    told = run(
        "train", folder / "log.npz", out, "--plugin", folder / "linear.py", "--algorithm",
        "linear", "--steps", 40, "--set", "batch_size=16", "--seed", 5, "--device", "cpu",
        "--checkpoint", folder / "checkpoint.safetensors",
    )  # fmt: skip
    assert "linear, 40 updates, seed 5" in told
    return out


def test_an_eighth_learner_is_one_file(folder: Path, trained: Path) -> None:
    """It trains, saves, loads, is inspected and evaluated; no other file knows it."""
    log = OfflineDataset.load(folder / "log.npz")
    agent, kind = load_agent(trained), ALGORITHMS["linear"].kind
    assert type(agent) is kind
    assert agent.config == ALGORITHMS["linear"].config_type(seed=5, batch_size=16)
    again = kind(agent.config, device="cpu").fit(log, 40)
    seen = log.observations[:9]
    np.testing.assert_array_equal(agent.predict(seen)[0], again.predict(seen)[0])
    plugin = ("--plugin", folder / "linear.py")
    told = json.loads(run("inspect", trained, "--json", *plugin))
    assert (told["kind"], told["algorithm"]) == ("agent", "Linear")
    assert told["config"] == {"seed": 5, "batch_size": 16, "learning_rate": 0.01}
    assert "Linear" in run("inspect", folder / "checkpoint.safetensors", *plugin)
    scored = run(
        "evaluate", trained, "safeshield/Boat-v0", "--cost-limit", 10, "--references", "0,1",
        "--seeds", "0", "--episodes", 1, "--json", *plugin,
    )  # fmt: skip
    assert json.loads(scored)[0]["policy"] == "agent.safetensors"


def test_help_lists_a_plugins_settings(folder: Path) -> None:
    told = " ".join(run("train", "--plugin", folder / "linear.py", "--help").split())
    for text in (
        "--algorithm linear: Linear Imitate a log by a linear actor.",
        "batch_size=32 Transitions in an update. [a whole number, above 0]",
        "learning_rate=0.01 Adam's rate at the start; it falls to a fiftieth by the end.",
    ):
        assert text in told


def test_the_documentation_lists_what_is_registered() -> None:
    for one in ALGORITHMS.values():
        if one.kind.__module__.startswith("safeshield."):
            name = f"`{one.name}`" if one.offline else "(Python only)"
            assert f"| {name} | `{one.kind.__name__}` | " in PAGE


@pytest.mark.parametrize("broken", [False, True])
def test_an_installed_package_offers_its_algorithms(tmp_path: Path, broken: bool) -> None:
    """By an entry point; one that cannot be imported is a warning, and the others are there."""
    text = "raise OSError('no such plant')" if broken else LINEAR
    (tmp_path / "their_linear.py").write_text(text)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[safeshield.algorithms]\nlinear = their_linear\n")
    code = "from safeshield.algorithms.registry import ALGORITHMS; print(*sorted(ALGORITHMS))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ("linear" in done.stdout.split(), "safefql" in done.stdout.split()) == (not broken, True)
    assert ("entry point 'linear' (their_linear)" in done.stderr) == broken
    assert ("OSError: no such plant" in done.stderr) == broken


def test_a_file_imports_nothing_and_its_error_says_what_to_import(trained: Path) -> None:
    """In a process of its own, where nobody has imported the plugin."""
    code = (
        "import sys\nfrom safeshield import load_agent\n"
        "try:\n    load_agent(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
        "print([name for name in sys.modules if name == 'linear'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(trained)], check=True, capture_output=True, text=True
    ).stdout
    assert "but is a 'mine-linear'; no imported module reads it" in told
    assert "import the module that defines it" in told
    assert "--plugin FILE.py" in told
    assert told.strip().endswith("[]")


def test_own_formats_are_not_read_where_their_module_is_not_imported(
    folder: Path, tmp_path: Path
) -> None:
    """Not even for the error: whoever only runs shields pays for no PyTorch."""
    log = OfflineDataset.load(folder / "log.npz")
    config = SafeFQLConfig(critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,))
    SafeFQL(config, device="cpu").fit(log, steps=3).save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"SafeFQL\.load reads it.*`safeshield calibrate FILE"):
        Shield.load(tmp_path / "agent")
    code = (
        "import sys\nfrom safeshield import Shield\n"
        "try:\n    Shield.load(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    with pytest.raises(ValueError, match=r"must be an agent's file.*, but is a log"):
        load_agent(folder / "log.npz")
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "agent")],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "safeshield.load_agent reads it. It is the file of an agent" in told
    assert told.strip().endswith("False")


def test_names_and_formats_belong_to_one_class() -> None:
    with pytest.raises(ValueError, match=r"'bc' is .*BehaviourCloning already; register Other"):

        @register("bc")
        class Other:
            """Of another module."""

    with pytest.raises(ValueError, match=r"is read by SafeFQL\.load; choose another file_format"):

        @register("another")
        class Another:
            """Of a name of its own."""

            file_format = "safeshield-safefql"

    assert "another" not in ALGORITHMS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError: no such file"),
        ("def (", "SyntaxError"),
        ("x = 1", "another module is called 'random'; give the file another name"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        (
            "from safeshield.algorithms.registry import register\n"
            "@register('bc')\nclass Mine: pass",
            "already; register Mine under another name",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    name = "random.py" if content == "x = 1" else f"{tmp_path.name}.py"
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    before = list(sys.path)
    told = run("train", "log.npz", "a.safetensors", "--plugin", file, code=2)
    assert message in " ".join(told.split())
    assert sys.path == before


def test_an_algorithm_that_is_not_registered(tmp_path: Path) -> None:
    told = run("train", "log.npz", tmp_path / "a.safetensors", "--algorithm", "ppo", code=2)
    assert "--algorithm must be one of ['bc', 'fisor', 'flrp', " in told
    assert "--plugin FILE.py" in told
    # What learns online is not trained from a log alone.
    assert "ssql" not in told
    assert "ssql" in ALGORITHMS


def test_a_shield_is_trained_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shield.safetensors"
    run("train", folder / "log.npz", out, "--algorithm", "shield", "--steps", 3, "--device", "cpu",
        "--set", "critic_hidden=8", "--set", "behaviour_hidden=8", "--seed", 2)  # fmt: skip
    trainer = load_agent(out)
    assert isinstance(trainer, ShieldTrainer)
    assert trainer.shield().trained_by == "ShieldTrainer, seed 2"
    assert run("inspect", out)


# -- help ---------------------------------------------------------------------------------------


def test_help_shows_every_setting_of_every_algorithm_with_meaning_and_default() -> None:
    told = " ".join(run("train", "--help").split())
    for one in ALGORITHMS.values():
        how = f"--algorithm {one.name}" if one.offline else f"{one.name}, in Python only"
        assert how in told
        assert " ".join(one.summary.split()) in told
        for field in fields_of(one.config_type):
            assert field.meaning, f"{one.name}: {field.name} has no docstring"
            assert f"{' '.join(field.meaning.split())} [{field.rule}]" in told
            assert f" {field.name}=" in told


def test_help_of_collect_shows_every_setting_of_a_learner() -> None:
    told = " ".join(run("collect", "--help").split())
    for field in fields_of(LearnerConfig):
        assert field.meaning, f"{field.name} has no docstring"
        assert f" {field.name}=" in told
        assert f"{field.meaning} [{field.rule}]" in told


def test_what_help_says_of_a_default_is_what_set_takes() -> None:
    from safeshield.cli.settings import settings_of, text_of

    for one in ALGORITHMS.values():
        defaults = [
            f"{field.name}={text_of(field.default)}" for field in fields_of(one.config_type)
        ]
        assert settings_of(one.config_type, defaults) == one.config_type()
    assert "batch_size=256  (bc, fisor, flrp, r2pac, safefql, shield)" in settings_help(
        ALGORITHMS[name] for name in ("bc", "fisor", "flrp", "r2pac", "safefql", "shield")
    )


# -- files of settings --------------------------------------------------------------------------


@pytest.mark.parametrize("one", list(ALGORITHMS.values()), ids=list(ALGORITHMS))
def test_settings_come_back_from_their_file(one, tmp_path: Path) -> None:  # noqa: ANN001
    config = one.config_type(seed=7)
    write_settings(tmp_path / "run.toml", config, "two\nlines")
    assert one.config_type(**read_settings(tmp_path / "run.toml", one.config_type)) == config
    unlimited = R2PACConfig(cost_limit=None)
    write_settings(tmp_path / "run.toml", unlimited, "")
    assert R2PACConfig(**read_settings(tmp_path / "run.toml", R2PACConfig)) == unlimited


def test_a_file_of_settings_is_over_the_preset_and_under_the_options(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("seed = 4\nbatch_size = 32\nhidden = [8, 8]\n")
    out = tmp_path / "agent.safetensors"
    command = ("train", folder / "log.npz", out, "--algorithm", "bc", "--steps", 3, "--device",
               "cpu", "--config", tmp_path / "mine.toml")  # fmt: skip
    run(*command, "--set", "batch_size=16")
    config = load_agent(out).config
    assert (config.seed, config.batch_size, config.hidden) == (4, 16, (8, 8))
    stored = tomllib.loads((tmp_path / "agent.toml").read_text())
    assert stored["batch_size"] == 16
    assert set(stored) == {field.name for field in fields_of(type(config))}
    run(*command, "--seed", 9)
    assert load_agent(out).config.seed == 9
    # What was stored is a file of settings itself, but not where the next run's are written.
    refused = run(*command[:-1], tmp_path / "agent.toml", code=2)
    assert "copy it to another name" in " ".join(refused.split())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "banana = 1", "no such setting: banana; known: seed, batch_size"),
        ("a.toml", "batch_size = 1.5", "batch_size must be a whole number, got 1.5"),
        ("a.toml", "batch_size = 'none'", "batch_size must be a whole number, got 'none'"),
        ("a.toml", "learning_rate = nan", "learning_rate must be a finite number, got nan"),
        ("a.toml", "batch_size 3", "is not TOML"),
        ("a.ini", "batch_size = 3", "must end in .toml, .yaml or .yml"),
        ("b.toml", None, "no such file"),
    ],
)
def test_a_file_of_settings_that_is_refused(
    folder: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    told = run(
        "train", folder / "log.npz", tmp_path / "agent.safetensors", "--algorithm", "bc",
        "--steps", 3, "--config", tmp_path / name, code=2,
    )  # fmt: skip
    assert message in " ".join(told.split())
    assert not (tmp_path / "agent.safetensors").exists()


def test_yaml_needs_its_package_and_is_read_as_toml_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("critic_hidden: [8, 8]\nsafety_discount: null\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyyaml, or write the settings as"):
        read_settings(tmp_path / "a.yaml", SafeFQLConfig)
    monkeypatch.undo()
    pytest.importorskip("yaml")
    values = read_settings(tmp_path / "a.yaml", SafeFQLConfig)
    assert SafeFQLConfig(**values) == SafeFQLConfig(critic_hidden=(8, 8))
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold settings as name and value"):
        read_settings(tmp_path / "a.yaml", SafeFQLConfig)
