from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from typer.testing import CliRunner

from safeshield import OfflineDataset, SafeFQL, Shield, collect
from safeshield.cli import app

BOAT = "safeshield/Boat-v0"
SMALL = (
    "--set", "critic_hidden=16,16", "--set", "flow_hidden=(16,)", "--set", "student_hidden=16",
)  # fmt: skip
# On numbers of this size a second thread only waits for the first.
pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with log.hdf5, agent.safetensors, checkpoint.safetensors and shield.safetensors."""
    folder = tmp_path_factory.mktemp("cli")
    run("collect", BOAT, folder / "log.hdf5", "--policy", "helmsmen", "--episodes", 40)
    run(
        "train", folder / "log.hdf5", folder / "agent.safetensors", "--steps", 60, "--device",
        "cpu", "--seed", 3, "--checkpoint", folder / "checkpoint.safetensors", *SMALL,
    )  # fmt: skip
    told = run(
        "calibrate", folder / "agent.safetensors", BOAT, folder / "shield.safetensors",
        "--epsilon", 0.95, "--confidence", 0.6, "--episodes", 8,
        "--deltas", "0.3",
    )  # fmt: skip
    assert "adversary: the shield replaced" in told
    return folder


def test_each_step_leaves_the_file_that_the_next_one_takes(files: Path) -> None:
    output = run("evaluate", files / "shield.safetensors", BOAT, "--episodes", 6, "--without")
    lines = output.splitlines()
    assert [line.split()[:5] for line in lines[-3:-1]] == [
        ["random", "no", "yes", "certified", "6"],  # with noise, as it was calibrated
        ["random", "yes", "yes", "certified", "6"],
    ]
    assert lines[-1].endswith("of the starts that were drawn are certified")


def test_evaluate_tells_whom_the_promise_is_not_about() -> None:
    other = run("evaluate", "builtin:boat", BOAT, "--episodes", 3, "--policy", "helmsmen")
    assert "is about random, adversary, not about helmsmen" in other.splitlines()[-1]
    assert "note" not in run("evaluate", "builtin:boat", BOAT, "--episodes", 3)


def test_flrp_from_log_to_shield(files: Path, tmp_path: Path) -> None:
    run(
        "train", files / "log.hdf5", tmp_path / "agent.safetensors", "--algorithm", "flrp",
        "--steps", 60, "--device", "cpu", "--set", "critic_hidden=16", "--set", "flow_hidden=8",
        "--set", "latent=3", "--preset", "small",
    )  # fmt: skip
    told = run("inspect", tmp_path / "agent.safetensors")
    assert "FLRP" in told
    assert "raises the probability of any set of actions by at most" in told
    described = json.loads(run("inspect", tmp_path / "agent.safetensors", "--json"))
    assert described["config"]["latent"] == 3
    assert described["base_shift"]["states"] == 512
    run(
        "calibrate", tmp_path / "agent.safetensors", BOAT, tmp_path / "shield.safetensors",
        "--epsilon", 0.95, "--confidence", 0.6, "--episodes", 8, "--deltas", "0.3",
    )  # fmt: skip
    run("evaluate", tmp_path / "shield.safetensors", BOAT, "--episodes", 3, "--policy",
        tmp_path / "agent.safetensors")  # fmt: skip


def test_a_promise_names_the_file_that_proposed(files: Path, tmp_path: Path) -> None:
    agent = files / "agent.safetensors"
    for policy, name in ((agent, "SafeFQL, seed 3 (agent.safetensors)"), ("random", "random")):
        output = run(
            "calibrate", agent, BOAT, tmp_path / f"{name}.safetensors", "--epsilon", 0.95,
            "--confidence", 0.6, "--episodes", 8, "--deltas", "0.3", "--policy", policy,
        )  # fmt: skip
        assert f"proposed by one of '{name}'" in output


def test_a_failed_calibration_leaves_its_memory(files: Path, tmp_path: Path) -> None:
    agent, out = files / "agent.safetensors", tmp_path / "shield.safetensors"
    asked = ("--confidence", 0.6, "--episodes", 40, "--deltas", "0", "--policy", "random")
    output = run("calibrate", agent, BOAT, out, "--epsilon", 0.03, *asked, code=2)
    assert "the shield without a promise, and the memory of this attempt" in output
    remembered = Shield.load(out)
    assert remembered.record is None
    assert [one.passed for one in remembered.attempts] == [False]
    assert re.search(r"^attempts +failed 1, passed 0$", run("inspect", out), re.MULTILINE)
    told = json.loads(run("inspect", out, "--json"))
    assert told["attempts"] == {"failed": 1, "passed": 0}
    # Asked again, with a larger epsilon, the first attempt is neither lost nor free.
    again = ("--epsilon", 0.9, *asked)
    assert "remembers 1 attempt or statement that" in run(
        "calibrate", agent, BOAT, out, *again, code=2
    )
    run("calibrate", out, BOAT, out, *again)
    record = Shield.load(out).record
    assert record is not None
    assert [one.passed for one in record.attempts] == [False, True]
    assert re.search(r"^attempts +failed 1, passed 1$", run("inspect", out), re.MULTILINE)
    assert record.attempts[1].level == pytest.approx(record.attempts[0].level / 2)
    # A promise that a shield had is not that of a later attempt, which failed.
    other = tmp_path / "other.safetensors"
    output = run("calibrate", out, BOAT, other, "--epsilon", 0.06, *asked, code=2)
    assert Shield.load(other).record is None
    assert [one.passed for one in Shield.load(other).attempts] == [False, True, False]
    output = run("calibrate", out, BOAT, out, "--epsilon", 0.06, *asked, code=2)
    assert "the shield with the promise that it had, and the memory of this attempt" in output
    assert Shield.load(out).record == record
    assert len(Shield.load(out).attempts) == 3


def test_an_environment_of_other_spaces_is_refused_as_the_wrapper_does(files: Path) -> None:
    for source in ("shield.safetensors", "agent.safetensors"):
        output = run("evaluate", files / source, "Pendulum-v1", "--episodes", 3, code=2)
        assert "observation_space mismatch (shape): expected Box(" in output


@pytest.mark.parametrize("policy", ["adversary", "helmsmen", "agent"])
def test_who_proposes_can_be_chosen(files: Path, policy: str) -> None:
    name = str(files / "agent.safetensors") if policy == "agent" else policy
    output = run(
        "evaluate", files / "shield.safetensors", BOAT, "--policy", name, "--episodes", 3, "--json"
    )
    (result,) = json.loads(output)
    assert result["policy"] == Path(name).name
    assert (result["episodes"], result["shielded"]) == (3, True)


def test_settings_reach_the_agent_typed(files: Path) -> None:
    data = json.loads(run("inspect", files / "agent.safetensors", "--json"))
    assert data["kind"] == "agent"
    assert data["config"]["critic_hidden"] == [16, 16]
    assert data["config"]["flow_hidden"] == [16]
    assert data["config"]["seed"] == 3


@pytest.mark.parametrize(
    ("file", "shows"),
    [
        ("log.hdf5", ["log", "16000", "violating episodes"]),
        ("agent.safetensors", ["agent", "SafeFQL", "critic_hidden"]),
        (
            "checkpoint.safetensors",
            ["checkpoint", "updates done", "60", "SafeFQL", "phase", "student"],
        ),
        ("shield.safetensors", ["shield", "With confidence 0.6", "nothing is promised"]),
    ],
)
def test_inspect_says_what_a_file_is(files: Path, file: str, shows: list[str]) -> None:
    output = run("inspect", files / file)
    for text in shows:
        assert text in output
    assert isinstance(json.loads(run("inspect", files / file, "--json")), dict)


def test_an_env_id_may_name_its_module(tmp_path: Path) -> None:
    run("collect", "safeshield.envs:safeshield/Boat-v0", tmp_path / "log.npz", "--episodes", 2)
    assert (tmp_path / "log.npz").exists()


SILENT = """
import gymnasium as gym
import safeshield.envs

class Silent(gym.Wrapper):
    def reset(self, **options):
        return self.env.reset(**options)[0], {}

    def step(self, action):
        return (*self.env.step(action)[:4], {})

def make():
    return Silent(gym.make("safeshield/Boat-v0").unwrapped)

gym.register("Silent-v0", make, max_episode_steps=40)
"""


def test_an_environment_that_reports_nothing_is_judged_by_the_constraint_of_the_shield(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent_boat.py").write_text(SILENT)
    monkeypatch.syspath_prepend(tmp_path)
    assert Shield.load(files / "shield.safetensors").model.constraint is not None
    arguments = (files / "shield.safetensors", "silent_boat:Silent-v0", "--episodes", 4)
    assert "violate" in run("diagnose", *arguments)
    assert "random" in run("evaluate", *arguments)


def test_a_film_of_an_environment_that_reports_nothing_and_of_one_that_has_no_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = tmp_path / "film.gif"
    watch = ("watch", "builtin:pendulum", "Pendulum-v1", "--steps", 3, "--height", 48, "-o", film)
    if not version("gymnasium").startswith(
        "0."
    ):  # whose pendulum hands pygame sizes that it refuses
        told = run(*watch)
        assert "3 steps of Pendulum-v1" in told
        assert f"{film}: 4 frames" in told
    (tmp_path / "silent_film.py").write_text(SILENT.replace("Silent-v0", "SilentFilm-v0"))
    monkeypatch.syspath_prepend(tmp_path)
    words = run("watch", "builtin:boat", "silent_film:SilentFilm-v0", "-o", film, code=2)
    assert "SilentFilm-v0 takes no render_mode, so there are no frames" in words
    words = run("watch", "builtin:boat", "x", "-o", tmp_path / "film.avi", code=2)
    assert "must end in .mp4 or .gif" in words


def test_an_interrupted_training_says_what_was_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, checkpoint: Path | None, **__: object) -> None:
        if checkpoint is not None and "late" in checkpoint.name:
            checkpoint.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(SafeFQL, "fit", interrupted)
    arguments = ("train", files / "log.hdf5", tmp_path / "agent.safetensors")
    assert "--checkpoint was not given" in run(*arguments, code=130)
    early, late = tmp_path / "early", tmp_path / "late"
    assert "was not due yet" in run(*arguments, "--checkpoint", early, code=130)
    output = run(*arguments, "--checkpoint", late, code=130)
    assert f"the same command continues from {late}" in " ".join(output.split())


def test_sb3_zips_need_trust(files: Path, tmp_path: Path) -> None:
    import gymnasium as gym
    from stable_baselines3 import A2C, PPO, SAC, TD3

    for kind in (A2C, PPO, SAC, TD3):
        path = tmp_path / f"{kind.__name__}.zip"
        sizes: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu"}
        kind("MlpPolicy", gym.make(BOAT), **sizes).save(path)
        command = ("evaluate", files / "shield.safetensors", BOAT, "--policy", path)
        refused = run(*command, "--episodes", 2, code=2)
        assert "--trust" in refused
        assert f"{kind.__name__}.zip" in run(*command, "--episodes", 2, "--trust")


def test_a_policy_in_python_can_be_named(files: Path, tmp_path: Path) -> None:
    """A function, an object and a class of a plugin's file act as ``module:name``."""
    plugin = tmp_path / "own_agents.py"
    plugin.write_text(
        "def ahead(observation):\n    return [1.0, 0.0]\n"
        "class Ahead:\n    def predict(self, observations, **_):\n"
        "        return [[1.0, 0.0]] * len(observations), None\n"
        "agent = Ahead()\n"
        "class NeedsSpeed:\n    def __init__(self, speed):\n        pass\n"
    )
    command = ("evaluate", files / "shield.safetensors", BOAT, "--plugin", plugin, "--json")
    results = []
    for name in ("ahead", "agent", "Ahead"):
        told = json.loads(
            run(*command, "--episodes", 3, "--policy", f"own_agents:{name}", "--without")
        )
        # The name that Python gives to it, so that attempts are recognised as repeated.
        assert {one.pop("policy") for one in told} == {"Ahead" if name == "agent" else name}
        results.append(told)
    assert results[0] == results[1] == results[2]
    random = json.loads(run(*command, "--episodes", 3, "--policy", "random", "--without"))
    assert random[1]["mean_return"] != results[0][1]["mean_return"]
    table = run(*command[:-1], "--episodes", 3, "--policy", "own_agents:ahead")
    assert "of the starts that were drawn are certified" in table
    (tmp_path / "own_errors.py").write_text("raise RuntimeError('no driver')\n")
    for name, message in (
        ("own_agents:astern", "has no 'astern'; write module:name"),
        ("no_such_agents:ahead", "give the module's file as --plugin FILE"),
        ("./own_agents.py:ahead", "is no module; write module:name"),
        (":ahead", "'' is no module"),
        ("own_errors:ahead", "own_errors cannot be imported: RuntimeError: no driver"),
        ("own_agents:NeedsSpeed", "make the object in the module"),
    ):
        assert message in " ".join(run(*command, "--policy", name, code=2).split()), name
    command = ("evaluate", files / "shield.safetensors", "no_such_plant:Boat-v0")
    assert "--plugin FILE" in " ".join(run(*command, code=2).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("collect", "NoSuch-v7", "{tmp}/a.hdf5"), "write module:NoSuch-v7"),
        (("collect", "nosuchmodule:Boat-v0", "{tmp}/a.hdf5"), "nosuchmodule"),
        (("collect", BOAT, "{tmp}/a.csv"), "must end in .hdf5"),
        (("collect", BOAT, "{tmp}/no/a.hdf5"), "make the folder"),
        (("collect", BOAT, "{long}.hdf5"), "File name too long"),
        (("train", "{log}", "{long}.safetensors"), "File name too long"),
        (("train", "{log}", "{tmp}/a.safetensors", "--checkpoint", "{tmp}"), "it is a folder"),
        (("calibrate", "{agent}", BOAT, "{long}.safetensors"), "File name too long"),
        (("collect", BOAT, "{tmp}/a.hdf5", "--policy", "drunk"), "['random', 'helmsmen']"),
        (
            ("collect", "Pendulum-v1", "{tmp}/a.hdf5", "--policy", "helmsmen"),
            "--policy helmsmen needs the environment safeshield/Boat-v0",
        ),
        (("train", "{tmp}/none.hdf5", "{tmp}/a.safetensors"), "no such file"),
        (
            ("train", "{log}", "{tmp}/a.safetensors", "--set", "banana=1"),
            "no such setting; known: seed, batch_size",
        ),
        (("train", "{log}", "{tmp}/a.safetensors", "--set", "seed"), "name=value"),
        (("train", "{log}", "{tmp}/a.safetensors", "--set", "batch_size=x"), "a whole number"),
        (("train", "{log}", "{tmp}/a.safetensors", "--set", "discount=2"), "between 0 and 1"),
        (("train", "{log}", "{tmp}/a.safetensors", "--set", "phases=both"), "must be one of"),
        (
            ("train", "{log}", "{tmp}/a.safetensors", "--preset", "large"),
            "knows ['paper', 'small']",
        ),
        (
            ("train", "{log}", "{tmp}/a.safetensors", "--algorithm", "bc", "--preset", "paper"),
            "bc knows none",
        ),
        (("train", "{log}", "{tmp}/a.safetensors", "--set", "phase_shares=1,2"), "takes 3 values"),
        (("calibrate", "{log}", BOAT, "{tmp}/a.safetensors"), "but is a log"),
        (("calibrate", "{agent}", "Pendulum-v1", "{tmp}/a.safetensors"), "observation_space"),
        (
            ("calibrate", "{agent}", BOAT, "{tmp}/a.safetensors", "--episodes", "3"),
            "cannot show a violation rate",
        ),
        (
            ("calibrate", "{agent}", BOAT, "{tmp}/a.safetensors", "--deltas", "0,1"),
            "strictly decreasing",
        ),
        (("evaluate", "{tmp}/none.safetensors", BOAT), "no such file"),
        (("inspect", "{tmp}/none.safetensors"), "no such file"),
        (("inspect", "{text}"), "it does not begin with the length of a header"),
        (("inspect", "{png}"), "is not a safeshield file but a picture (PNG)"),
        (("inspect", "{zip}"), "but a zip file: a model of Stable-Baselines3 goes to"),
        (("inspect", "{tmp}"), "is a folder; give a file in it"),
        (("inspect", "{agent}", "--picture", "{tmp}/a.png"), "is an agent"),
        (("demo", "--out", "{text}", "--quick"), "must be a folder"),
    ],
)
def test_mistakes_end_in_one_line(
    files: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "text").write_text("nothing to see here, and long enough")
    (tmp_path / "png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "zip").write_bytes(b"PK\x03\x04" + bytes(50))
    places = {
        "png": tmp_path / "png",
        "zip": tmp_path / "zip",
        "tmp": tmp_path,
        "log": files / "log.hdf5",
        "agent": files / "agent.safetensors",
        "text": tmp_path / "text",
        "long": tmp_path / ("x" * 240),
    }
    filled = [argument.format(**places) for argument in arguments]
    output = run(*filled, code=2)
    assert message in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    assert line.isprintable()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.npz"), "--debug"])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_package_of_the_core_that_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from safeshield.cli import main\n"
        "sys.argv[1:] = sys.argv[2:]; main()\n"
    )
    for module, command, wanted in (
        ("h5py", ("train", "log.hdf5", "a.safetensors"), 'run pip install "h5py>=3.10"'),
        ("gymnasium", ("--help",), 'run pip install "gymnasium>=0.29.1"'),
        ("typer", ("--help",), 'run pip install "typer>=0.15"'),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, module, *command],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode != 0
        last = result.stderr.strip().splitlines()[-1]
        assert f"{wanted} ; then see `safeshield doctor`" in last
        if module == "h5py":
            assert result.stderr.startswith("error: h5py is not installed, and safeshield needs it")


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version") == f"safeshield {version('safeshield')}\n"


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, safeshield.cli, typer.testing\n"
        "result = typer.testing.CliRunner().invoke(safeshield.cli.app, ['--help'])\n"
        "assert result.exit_code == 0 and 'calibrate' in result.output\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'h5py') if m in sys.modules])"
    )
    started = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"
    assert time.perf_counter() - started < 10


def test_the_quick_demo_runs_every_stage(tmp_path: Path) -> None:
    # In a process of its own, as a user runs it: its workers start from the command's module.
    folder = tmp_path / "demo"
    result = subprocess.run(
        [sys.executable, "-m", "safeshield.cli", "demo", "--quick", "--out", str(folder)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "With confidence 0.9" in result.stdout
    assert len(re.findall(r"^(?:straight to goal|random|adversary|PPO) ", result.stdout, re.M)) == 8
    for picture in ("safe-set", "trips", "calibration"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads((folder / "table.json").read_text())
    assert len(table["evaluations"]) == 8
    assert {one["start_share"] for one in table["evaluations"]} == {
        table["evaluations"][0]["start_share"]
    }
    assert table["promise"] in result.stdout
    told = run("inspect", folder / "boat.safetensors")
    assert "calibrated" in told
    assert "ShieldTrainer" in told
    run("inspect", folder / "boat.hdf5")


def test_pictured_trips_start_where_the_shield_certifies(files: Path) -> None:
    import shutil

    import numpy as np

    from safeshield.demo import run as demo
    from safeshield.shield.shield import Shield

    shutil.copy(files / "shield.safetensors", files / demo.SHIELD)
    shield = Shield.load(files / demo.SHIELD)
    runs, _ = demo._episodes(files, "random", True, 4, 0)
    for one in runs:
        assert np.asarray(shield.value(one.observations[0])) <= shield.threshold


# -- statements from logs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.hdf5, held_out.npz and a shield that was trained on the first."""
    folder = tmp_path_factory.mktemp("halves")
    told = run(
        "split", files / "log.hdf5", folder / "train.hdf5", folder / "held_out.npz",
        "--share", 0.3, "--seed", 1,
    )  # fmt: skip
    assert "28 episodes" in told
    run(
        "train", folder / "train.hdf5", folder / "shield.safetensors", "--algorithm", "shield",
        "--steps", 30, "--device", "cpu", "--set", "critic_hidden=16,16",
    )  # fmt: skip
    return folder


def stated(halves: Path, *arguments: object, code: int = 0) -> str:
    return run(
        "calibrate-from-log", halves / "shield.safetensors", halves / "held_out.npz", *arguments,
        code=code,
    )  # fmt: skip


def test_a_held_out_log_gives_statements_a_table_and_a_picture(halves: Path) -> None:
    out, curve = halves / "stated.safetensors", halves / "curve.svg"
    told = stated(
        halves, out, "--confidence", 0.6, "--alpha", 0.4, "--lead", "0.02s",
        "--step-seconds", 0.005, "--picture", curve,
    )  # fmt: skip
    assert "raise the alarm 4 or more steps before entry" in told
    assert "<- chosen" in told
    assert "violating episodes; false alarms, of" in told
    assert curve.stat().st_size > 5000
    shield = Shield.load(out)
    assert [one.method for one in shield.log_records] == ["detection"]
    assert shield.delta == shield.log_records[0].delta
    # The file remembers: episodes that chose delta cannot test it.
    again = run(
        "calibrate-from-log", out, halves / "held_out.npz", out, "--method", "shadow", code=2
    )
    assert "was chosen by some of these episodes" in again
    arguments = ("--method", "shadow", "--policy", "helmsmen", "--stochastic")
    told = stated(halves, out, *arguments, code=2)
    assert "remembers 2 attempts and statements that" in told
    assert Shield.load(out).log_records == shield.log_records
    out = halves / "other.safetensors"
    told = stated(halves, out, *arguments)
    assert "in which helmsmen (deterministic=False) proposes the actions" in told
    shown = run("inspect", out).splitlines()
    assert sum(one.startswith("from logs  ") for one in shown) == 1
    assert "residuals from 28 episodes" in stated(
        halves,
        halves / "residuals.safetensors",
        "--method",
        "residuals",
        "--alpha",
        0.4,
        "--confidence",
        0.6,
    )


def test_the_plan_rounds_no_chance_to_1_and_names_both_levels() -> None:
    assert "more than 0.99 where it is 0.001" in run("plan")
    told = run("plan", "--cost-limit", 10, "--cost-bound", 100, "--confidence", 0.95)
    assert "mean cost: at least 29 episodes" in told
    assert "at half of the level, which takes at least 36 episodes" in told


def test_an_attempt_that_did_not_pass_is_remembered_and_exits_with_1(halves: Path) -> None:
    out = halves / "failed.safetensors"
    told = stated(halves, out, "--method", "shadow", "--epsilon", 0.25, code=1)
    assert "not shown: the rate is not shown to be at most 0.25" in told
    assert "with the memory of this attempt" in told
    shield = Shield.load(out)
    assert not shield.log_records
    assert [one.passed for one in shield.ledger.attempts] == [False]


def test_spliced_episodes_go_on_in_an_environment(halves: Path) -> None:
    folder = halves / "agents"
    folder.mkdir()
    run(
        "train", halves / "train.hdf5", folder / "bc.safetensors", "--algorithm", "bc", "--steps",
        30, "--device", "cpu",
    )  # fmt: skip
    run("collect", BOAT, folder / "bc.hdf5", "--policy", folder / "bc.safetensors",
        "--episodes", 12, "--seed", 5)  # fmt: skip
    told = run(
        "calibrate-from-log", halves / "shield.safetensors", folder / "bc.hdf5",
        folder / "out.safetensors", "--method", "spliced", "--simulator", BOAT,
        "--policy", folder / "bc.safetensors", "--deterministic", "--confidence", 0.6,
    )  # fmt: skip
    assert "if the simulator safeshield/Boat-v0 behaves as the plant does" in told
    assert "BehaviourCloning, seed 0 (bc.safetensors)" in told


def test_the_agent_has_the_name_that_python_gives_or_policy_name(
    halves: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "own_heaters.py"
    plugin.write_text("def hot(observation):\n    return [0.2, 0.1]\n")
    policy = ("--policy", "own_heaters:hot", "--plugin", plugin)
    log = tmp_path / "log.hdf5"
    run("collect", BOAT, log, *policy, "--episodes", 12, "--seed", 5)
    assert (OfflineDataset.load(log).provenance or {})["collected_by"] == "hot"
    command = ("calibrate-from-log", halves / "shield.safetensors", log, tmp_path / "o.safetensors",
               "--method", "shadow", "--confidence", 0.6, *policy)  # fmt: skip
    assert "in which hot proposes the actions" in run(*command)
    (tmp_path / "o.safetensors").unlink()
    told = " ".join(run(*command, "--policy-name", "warm", code=2).split())
    assert "got 'warm', but the log was collected by 'hot'" in told
    env = gym.make(BOAT)
    collect(env, lambda _: [0.2, 0.1], 12, seed=5, policy_name="warm").save(log)
    told = " ".join(run(*command, code=2).split())
    assert "give the name that the log has as --policy-name" in told
    assert "in which warm proposes the actions" in run(*command, "--policy-name", "warm")


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--method", "shadow", "--picture", "c.svg"], "--picture goes with --method detection"),
        (["--picture", "c.txt"], "--picture must end in .png or .svg or .pdf"),
        (["--picture", "none/c.svg"], "none"),
        (["--method", "spliced"], "--method spliced needs --simulator ENV_ID"),
        (["--simulator", BOAT], "--simulator goes with --method spliced, got detection"),
        (["--step-seconds", 0.1], "--step-seconds goes with a --lead in seconds"),
        (["--lead", "two"], "--lead must be a whole number of steps"),
        (["--method", "shadow", "--alpha", 0.1], "alpha=0.1 goes with detection and residuals"),
        (["--alpha", 0.01], "at least 299 are needed"),
        (["--method", "trial", "--policy", "no.safetensors"], "no.safetensors"),
        (["--method", "shadow", "--policy", "no.zip"], "no.zip"),
    ],
)
def test_mistakes_about_logs_end_in_one_line(
    halves: Path, tmp_path: Path, arguments: list[object], shows: str
) -> None:
    told = stated(halves, tmp_path / "out.safetensors", *arguments, code=2)
    assert len(told.strip().splitlines()) == 1
    assert told.startswith("error: ")
    assert shows in told
    assert not (tmp_path / "out.safetensors").exists()


def test_a_ready_made_shield_has_a_name() -> None:
    told = run("evaluate", "builtin:boat", "safeshield/Boat-v0", "--episodes", 2)
    assert "yes" in told or "shield" in told
    assert "must be one of" in run("evaluate", "builtin:ship", "safeshield/Boat-v0", code=2)
    assert "starts as its own reset does" in run("inspect", "builtin:boat")
    assert "must be one of" in run("inspect", "builtin:ship", code=2)


def test_the_training_log_and_one_file_for_both_parts_are_refused(
    halves: Path, files: Path, tmp_path: Path
) -> None:
    told = run(
        "calibrate-from-log", halves / "shield.safetensors", files / "log.hdf5",
        tmp_path / "out.safetensors", code=2,
    )  # fmt: skip
    assert "12 of 40 episodes are in both" in told
    one = tmp_path / "one.hdf5"
    told = run("split", files / "log.hdf5", one, one, code=2)
    assert "must be three files" in told
    told = run("split", files / "log.hdf5", one, tmp_path / "b.hdf5", "--share", 1.5, code=2)
    assert "--share must lie between 0 and 1" in told
