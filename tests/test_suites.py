"""The suites where nothing of them need be installed: tasks, errors, the doctor, patches."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import textwrap
import tomllib
import typing
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import safeshield.suites
from safeshield import requirements
from safeshield.cli import app
from safeshield.data import OfflineDataset
from safeshield.rollouts.workers import environment_variables
from safeshield.suites import (
    TASKS,
    Family,
    Suite,
    bullet,
    compat,
    doctor,
    find_task,
    packages,
    safety_gymnasium,
)
from safeshield.suites.doctor import Finding, Part, State, examine, healthy, report
from safeshield.suites.labels import label, with_constraint
from safeshield.suites.packages import STACK, Package, commands, missing, needed, require

TOP = Path(__file__).parents[1]
ALL_IDS = sorted({one for task in TASKS.values() for one in (task.env_id, task.offline_id)})


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but Gymnasium and NumPy were installed."""

    def version(self: Package) -> str | None:
        return {"gymnasium": "0.29.1", "numpy": "2.3.5"}.get(self.name)

    monkeypatch.setattr(Package, "version", property(version))
    # What another test has loaded is not looked for again.
    safety_gymnasium.UPSTREAM.loaded = False
    bullet.UPSTREAM.loaded = False


# -- tasks -------------------------------------------------------------------------------------


def test_there_are_dsrls_38_tasks() -> None:
    counts = {family: sum(task.family is family for task in TASKS.values()) for family in Family}
    assert counts == {"navigation": 16, "velocity": 5, "bullet": 8, "metadrive": 9}
    for task in TASKS.values():
        assert find_task(task.name) is find_task(task.env_id) is find_task(task.offline_id) is task
        assert find_task(f"safeshield.suites:{task.env_id}") is task
        assert task.min_return < task.max_return
        limits = (10.0, 5.0) if task.family is Family.bullet else (10.0,)
        assert task.cost_limits == limits
    assert len(ALL_IDS) == 38 + 29
    with pytest.raises(ValueError, match="got 'Pendulum-v1'; the names are PointButton1, "):
        find_task("Pendulum-v1")
    with pytest.raises(TypeError):
        TASKS["mine"] = TASKS["BallRun"]  # type: ignore[index]


# -- packages ----------------------------------------------------------------------------------


def test_the_stack_is_what_the_extra_and_the_requirements_install() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["suites"] == [
        package.requirement for package in STACK if not package.apart
    ]
    lines = (TOP / "requirements-suites.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        package.requirement for package in STACK if package.apart
    ]
    # Whoever takes the extra gets versions that the core takes, too.
    for core in map(Requirement, project["dependencies"]):
        for package in STACK:
            if package.name == core.name and "==" in package.requirement:
                assert core.specifier.contains(package.requirement.split("==")[1])


def test_commands_install_what_is_missing_and_no_more(nothing: None) -> None:
    assert commands(()) == []
    assert commands(missing(Suite.dsrl)) == ["pip install --no-deps dsrl==0.1.0"]
    assert commands(missing(Suite.bullet)) == [
        'pip install "safeshield[suites]"',
        "pip install --no-deps bullet-safety-gym==1.4.0",
    ]
    assert commands(missing(*Suite))[1] == (
        "pip install --no-deps safety-gymnasium==0.4.1 bullet-safety-gym==1.4.0 dsrl==0.1.0 "
        "metadrive-simulator==0.4.3"
    )


@pytest.mark.parametrize("env_id", [*ALL_IDS, "SafetyPointGoal1-v0", "SafetyDoggoRun0Vision-v0",
                                    "SafetyHumanoidVelocityGymnasium-v0", "SafetyCarGather-v0",
                                    "OfflineAntVelocity-v1"])  # fmt: skip
def test_making_what_is_not_installed_says_what_is_missing(env_id: str, nothing: None) -> None:
    with pytest.raises(gym.error.DependencyNotInstalled) as raised:
        gym.make(f"safeshield.suites:{env_id}")
    text = str(raised.value)
    name = env_id.removeprefix("OfflineMetadrive-").removesuffix("-v0")
    assert name in text.partition(" needs packages that are not installed: ")[0]
    assert "pip install --no-deps " in text
    assert "`safeshield doctor`" in text


def test_one_package_that_is_missing_does_not_keep_others_from_it(nothing: None) -> None:
    require("Pendulum-v1")  # nothing of the suites
    assert gym.make("Pendulum-v1") is not None
    assert gym.make("safeshield/Boat-v0") is not None


def test_later_pythons_are_told_that_there_are_no_wheels(
    nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.python_note() == ""
    monkeypatch.setattr(packages, "_RUNNING", (3, 13))
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"later than 3\.11; this is 3\.13"):
        require("this test", Suite.bullet)


def test_versions_are_read_where_there_are_some() -> None:
    here = Package("numpy>=1.0", "numpy", ())
    assert here.version == np.__version__
    assert here.as_tried
    assert not Package("numpy<1.0", "numpy", ()).as_tried
    assert Package("no-such-package", "no_such_module", ()).version is None
    # The module is there, under another package's name.
    assert Package("json-of-another", "json", ()).version == "?"
    assert Package("json-of-another==3", "json", ()).as_tried


def test_importing_the_suites_loads_no_simulator_and_no_torch() -> None:
    code = (
        "import sys, gymnasium; before = set(sys.modules); import safeshield.suites;"
        "heavy = {'torch', 'mujoco', 'pybullet', 'metadrive', 'stable_baselines3', 'matplotlib'};"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_importing_safeshield_does_not_import_the_suites() -> None:
    code = "import sys, safeshield; print('safeshield.suites' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_registering_again_changes_nothing() -> None:
    before = {env_id: gym.spec(env_id) for env_id in ALL_IDS}
    safeshield.suites.register_envs()
    assert all(gym.spec(env_id) is spec for env_id, spec in before.items())


# -- patches -----------------------------------------------------------------------------------


def fresh(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> ModuleType:
    """Write a module and import it."""
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


ARRAYS = """
    from __future__ import annotations
    import typing
    from dataclasses import dataclass, field
    from dataclasses import dataclass as another_name
    import numpy as np

    SHARED = np.zeros(3)

    @dataclass
    class Plain:
        size: float = 1.0
        color: np.ndarray = SHARED
        every: typing.ClassVar[np.ndarray] = SHARED
        names: list[str] = field(default_factory=list)

    @another_name(frozen=True)
    class Frozen(Plain):
        group: np.ndarray = np.ones(2)
        note = SHARED
"""


def test_array_defaults_become_copies_and_everything_else_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = dataclasses.dataclass
    with pytest.raises(ValueError, match=r"mutable default <class 'numpy\.ndarray'>"):
        fresh("suites_arrays", monkeypatch, tmp_path, ARRAYS)
    with pytest.raises(ValueError, match="mutable default"), compat.array_defaults("of_another"):
        fresh("suites_arrays", monkeypatch, tmp_path, ARRAYS)
    plain_text = ARRAYS.replace("(frozen=True)", "")
    with compat.array_defaults("suites_arrays"):
        assert dataclasses.dataclass is not original
        module: Any = fresh("suites_arrays", monkeypatch, tmp_path, plain_text)
    assert dataclasses.dataclass is module.dataclass is module.another_name is original
    one, other = module.Frozen(), module.Frozen()
    assert one.color is not other.color
    assert one.color is not module.SHARED
    np.testing.assert_array_equal(one.color, module.SHARED)
    assert [field.name for field in dataclasses.fields(one)] == ["size", "color", "names", "group"]
    assert module.Plain.every is module.Frozen.note is module.SHARED
    assert typing.get_type_hints(module.Plain)["every"] == ClassVar[np.ndarray]
    assert module.Frozen(2.0, group="given").group == "given"


def test_the_decorator_is_put_back_after_an_error_and_takes_its_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = dataclasses.dataclass
    text = "import dataclasses, numpy\n@dataclasses.dataclass(frozen=True, order=True)\nclass A:\n"
    with suppress(RuntimeError), compat.array_defaults("suites_options"):
        module: Any = fresh("suites_options", monkeypatch, tmp_path, text + "    a: int = 1\n")
        with pytest.raises(dataclasses.FrozenInstanceError):
            module.A().a = 2
        assert module.A(1) < module.A(2)
        raise RuntimeError("inside")
    assert dataclasses.dataclass is original


def test_ids_stay_registered_as_they_were_and_nobody_is_warned(
    recwarn: pytest.WarningsRecorder,
) -> None:
    gym.register("SuitesOne-v0", entry_point="one:One")
    ours = gym.spec("SuitesOne-v0")
    try:
        with (
            suppress(RuntimeError),
            compat.registry_kept(["SuitesOne-v0", "SuitesTwo-v0"]) as seen,
        ):
            assert "SuitesOne-v0" not in gym.registry
            gym.register("SuitesOne-v0", entry_point="other:One")
            gym.register("SuitesTwo-v0", entry_point="other:Two")
            raise RuntimeError("inside")
        assert gym.spec("SuitesOne-v0") is ours
        assert "SuitesTwo-v0" not in gym.registry
        assert {one: spec.entry_point for one, spec in seen.items()} == {
            "SuitesOne-v0": "other:One", "SuitesTwo-v0": "other:Two"
        }  # fmt: skip
        with compat.registry_kept(["SuitesOne-v0"]) as seen:
            pass
        assert seen == {"SuitesOne-v0": ours}
        assert len(recwarn) == 0
    finally:
        del gym.registry["SuitesOne-v0"]


def test_environment_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITES_SET", "before")
    monkeypatch.delenv("SUITES_UNSET", raising=False)
    with (
        suppress(RuntimeError),
        environment_variables({"SUITES_SET": "inside", "SUITES_UNSET": "inside"}),
    ):
        assert os.environ["SUITES_SET"] == os.environ["SUITES_UNSET"] == "inside"
        raise RuntimeError("inside")
    assert os.environ["SUITES_SET"] == "before"
    assert "SUITES_UNSET" not in os.environ


def test_streams_without_a_file_get_one_and_others_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for without in (io.StringIO(), None):
        with redirect_stdout(without):
            with compat.streams_with_files():
                assert sys.stdout.fileno() > 2
                assert isinstance(sys.stdout.name, int)
                print("dropped")
            assert sys.stdout is without
    with open(os.dup(1), "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with compat.streams_with_files():
            assert sys.stderr is file


def test_draws_take_the_place_of_the_global_ones_and_give_it_back() -> None:
    def draw() -> list[float]:
        return [np.random.uniform(), random.random()]  # noqa: NPY002

    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    outer = draw() + draw()
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    one, other = compat.Draws(7), compat.Draws(7)
    first = draw()
    with one.in_place():
        inner = draw()
    with one.in_place():
        inner += draw()
    second = draw()
    assert first + second == outer
    with suppress(RuntimeError), other.in_place():
        assert draw() + draw() == inner
        raise RuntimeError("inside")
    with compat.Draws(8).in_place():
        assert draw() != inner[:2]


# -- the doctor --------------------------------------------------------------------------------


def test_the_doctor_knows_the_core() -> None:
    result = CliRunner().invoke(app, ["doctor", "core"])
    assert result.exit_code == 0, result.output
    assert f"gymnasium {gym.__version__}" in result.output
    assert "safeshield/Boat-v0 (" in result.output
    assert "CPU" in result.output or "trains on" in result.output


def test_what_is_absent_is_no_failure_unless_it_was_asked_for(nothing: None) -> None:
    whole = CliRunner().invoke(app, ["doctor"])
    assert whole.exit_code == 0, whole.output
    for part in Part:
        assert f"\n{part}" in f"\n{whole.output}"
    assert whole.output.endswith(
        "To install what is missing, in this order:\n"
        '  pip install "safeshield[suites]"\n'
        "  pip install --no-deps safety-gymnasium==0.4.1 bullet-safety-gym==1.4.0 dsrl==0.1.0 "
        "metadrive-simulator==0.4.3\n"
    )
    asked = CliRunner().invoke(app, ["doctor", "bullet", "--json"])
    assert asked.exit_code == 1
    (finding,) = json.loads(asked.output)
    assert finding["state"] == "absent"
    assert finding["detail"] == "not installed: pybullet, bullet-safety-gym"
    assert finding["commands"][1] == "pip install --no-deps bullet-safety-gym==1.4.0"


def test_the_doctor_refuses_parts_that_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["doctor", "mujoco"])
    assert result.exit_code == 2
    assert "must be among core, navigation, velocity, bullet, dsrl, metadrive, got mujoco" in (
        result.output
    )


PATIENTS = {
    "killed by SIGABRT": "os.abort()",
    "killed by SIGKILL": "os.kill(os.getpid(), 9)",
    "No module named 'simulator'": "import simulator",
    "exit status 3": "os._exit(3)",
    "no answer in 4 s": "time.sleep(30)",
    "steps to": "gym.register('Sick-v0', lambda: gym.make('Pendulum-v1'))",
}


@pytest.mark.parametrize("symptom", PATIENTS)
def test_what_fails_in_any_way_is_told_and_nothing_else_dies(
    symptom: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = f"import os, time\nimport gymnasium as gym\n{PATIENTS[symptom]}\n"
    (tmp_path / "sick.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    if "answer" in symptom:
        monkeypatch.setattr(doctor, "_SECONDS", 4.0)
    monkeypatch.setitem(doctor._PARTS, Part.core, ((), ("sick:Sick-v0",)))
    (finding,) = doctor.examine([Part.core])
    assert finding.state is State.broken
    assert symptom in finding.detail
    assert not doctor.healthy([finding])
    assert "broken" in doctor.report([finding])


def test_what_is_broken_is_told_with_the_versions_that_were_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Package, "version", property(lambda self: "99.0"))
    monkeypatch.setattr(doctor, "_try", lambda ids: (False, "it fell over"))
    (finding,) = doctor.examine([Part.bullet, Part.bullet])
    assert finding.untried == (
        "gymnasium 99.0 (tried: gymnasium==0.29.1)",
        "bullet-safety-gym 99.0 (tried: bullet-safety-gym==1.4.0)",
    )
    assert finding.commands == tuple(commands(
        tuple(one for one in needed(Suite.bullet) if one.name != "pybullet")
    ))  # fmt: skip
    assert "not tried together: gymnasium 99.0" in doctor.report([finding])


def test_commands_of_several_parts_are_put_together() -> None:
    findings = [
        Finding(Part.bullet, State.absent, {}, "", commands=tuple(commands(needed(suite))))
        for suite in (Suite.bullet, Suite.safety_gymnasium)
    ]
    assert doctor.report(findings).splitlines()[-2:] == [
        '  pip install "safeshield[suites]"',
        "  pip install --no-deps bullet-safety-gym==1.4.0 safety-gymnasium==0.4.1",
    ]


# -- CI ----------------------------------------------------------------------------------------

SKIPPED = """
import pytest

@pytest.mark.skip(reason="mark")
def test_marked(): ...

def test_inside():
    pytest.skip("inside")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
"""


@pytest.mark.parametrize("required", [True, False])
def test_where_the_stack_is_installed_nothing_is_skipped(tmp_path: Path, required: bool) -> None:
    (tmp_path / "conftest.py").write_text((TOP / "tests" / "suites" / "conftest.py").read_text())
    (tmp_path / "test_skipped.py").write_text(SKIPPED)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('nosuchthing')")
    environment = {**os.environ, "SAFESHIELD_SUITES": "1" if required else ""}
    # -rN: no summary, which where the variable CI is set says every reason a second time.
    options = ["-rN", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["--rootdir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    if required or not missing(*Suite):
        assert result.returncode == 1
        assert result.stdout.count("skipped, where the stack is installed") == 3, result.stdout
        assert "1 failed, 1 xfailed, 2 errors" in result.stdout
    else:
        assert "collected 0 items" in result.stdout


def test_a_library_that_draws_is_not_blamed_on_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(module: str) -> Exception:
        try:
            exec("None.glGetError", {"__name__": module})
        except AttributeError as error:
            return error
        raise AssertionError

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(packages.Package, "as_tried", True)
    told = str(packages.broken("a task", failing("OpenGL.raw.GL._errors"), Suite.safety_gymnasium))
    assert "cannot load the library that it draws with (MUJOCO_GL=osmesa asks for it)" in told
    assert "versions" not in told
    other = str(packages.broken("a task", failing("elsewhere"), Suite.safety_gymnasium))
    assert "versions are those that were tried" in other


def test_doctor_says_what_the_core_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requirements.lacking() == {}
    real = requirements.installed
    missing = {"h5py": None, "scipy": "1.9.3", "pillow": "10.0.1rc1", "torch": "2.8.0a0+git1"}
    monkeypatch.setattr(
        requirements, "installed", lambda name, module: missing.get(name, real(name, module))
    )
    (finding,) = examine([Part.core])
    assert finding.state is State.broken
    assert finding.detail == "lacks h5py>=3.10 (not installed), scipy>=1.13 (installed: 1.9.3)"
    assert finding.commands == ('pip install "h5py>=3.10" "scipy>=1.13"',)
    assert not healthy([finding])
    assert 'pip install "h5py>=3.10" "scipy>=1.13"' in report([finding])
    assert json.loads(json.dumps(finding.to_json())) == finding.to_json()


def test_the_core_is_what_the_package_asks_for() -> None:
    asked = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(requirements.core().values()) == sorted(asked)


def test_what_is_no_task_and_no_environment_is_refused() -> None:
    log = OfflineDataset.from_arrays(
        observations=[[0.0]], actions=[[0.0]], rewards=[0.0], next_observations=[[0.0]],
        terminated=[True], truncated=[False], costs=[0.0],
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"task must be a task .* got None"):
        label(log, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"env must be .* got str; make one with gymnasium.make"):
        with_constraint("SafetyBallRun-v0")  # type: ignore[arg-type]
