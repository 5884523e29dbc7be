"""Who may import whom, and what the package puts where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import safeshield

ROOT = Path(safeshield.__file__).parent
OUTER = ("safeshield.wrappers", "safeshield.policies")
GOLDEN = Path(__file__).parent / "golden"
FACES = {"__init__.py"}
# What stands above the engine and below its face.
ABOVE = ("suites", "evaluation", "collection", "cli")


def imports(file: Path) -> Iterator[str]:
    """Every module a file names in an import, absolute or relative, wherever it stands."""
    package = ("safeshield", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def engine_files() -> list[Path]:
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    return sorted(
        file
        for file in files
        if file.parts[0] not in ("demo", "cli", "wrappers", "policies") and str(file) not in FACES
    )


def test_the_rule_below_looks_at_the_engine() -> None:
    names = {str(file) for file in engine_files()}
    assert {"shield/shield.py", "algorithms/safefql.py", "nn/mlp.py", "files/tensors.py"} <= names


@pytest.mark.parametrize("file", engine_files(), ids=str)
def test_the_engine_does_not_know_wrappers_and_policies(file: Path) -> None:
    named = list(imports(ROOT / file))
    assert not [name for name in named if name.startswith((*OUTER, "wrappers", "policies"))]


@pytest.mark.parametrize(
    "file", [file for file in engine_files() if file.parts[0] not in ABOVE], ids=str
)
def test_the_engine_does_not_know_the_benchmarks(file: Path) -> None:
    named = list(imports(ROOT / file))
    assert not [name for name in named if name.startswith("safeshield.suites")]


def test_an_import_of_a_wrapper_would_be_seen(tmp_path: Path) -> None:
    for text in (
        "import safeshield.wrappers",
        "from safeshield import wrappers",
        "def f():\n    from ..wrappers.safety_shield import SafetyShield",
    ):
        file = ROOT / "shield" / "not_there.py"

        class Fake:
            relative_to = file.relative_to

            def read_text(self, text: str = text) -> str:
                return text

        assert any(name.startswith(OUTER) for name in imports(Fake()))  # type: ignore[arg-type]


def run(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_it_loads_no_torch_and_registers_the_environments(tmp_path: Path) -> None:
    code = (
        "import sys, gymnasium, safeshield; gymnasium.spec('safeshield/Boat-v0');"
        "print(sorted({'torch', 'stable_baselines3', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(code, tmp_path) == "[]"


HEAVY = (
    "torch", "stable_baselines3", "matplotlib", "h5py", "tensorboard", "scipy.stats", "pandas",
    "zuko", "tqdm", "typer",
)  # fmt: skip
"""What a shield at run time must do without: it may run where none of this is installed."""

BLOCKED = f"""
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if any(fullname == name or fullname.startswith(name + ".") for name in {HEAVY}):
            raise ImportError("blocked: " + fullname)

sys.meta_path.insert(0, Blocked())
"""


def test_what_is_blocked_cannot_be_imported(tmp_path: Path) -> None:
    code = BLOCKED + (
        "for name in ('torch', 'matplotlib.figure', 'scipy.stats'):\n"
        "    try: __import__(name)\n"
        "    except ImportError as error: print(error)\n"
    )
    assert run(code, tmp_path).splitlines() == [
        "blocked: torch", "blocked: matplotlib", "blocked: scipy.stats"
    ]  # fmt: skip


def test_a_shield_steps_without_what_training_needs(tmp_path: Path) -> None:
    file = GOLDEN / "shield_calibrated.safetensors"
    code = (
        BLOCKED
        + f"""
import gymnasium
from safeshield import SafetyShield, Shield
from safeshield.wrappers import VectorSafetyShield

shield = Shield.load({str(file)!r})
env = SafetyShield(gymnasium.make("safeshield/DoubleIntegrator-v0"), shield)
env.reset(seed=0)
info = env.step(env.action_space.sample())[4]
make = lambda: gymnasium.make("safeshield/DoubleIntegrator-v0")
envs = VectorSafetyShield(gymnasium.vector.SyncVectorEnv([make] * 3), shield)
envs.reset(seed=0)
infos = envs.step(envs.action_space.sample())[4]
print(info["action_executed"].shape, infos["shield/value"].shape)
"""
    )
    assert run(code, tmp_path) == "(1,) (3,)"


def test_every_kind_of_shield_filters_without_what_training_needs(tmp_path: Path) -> None:
    code = (
        BLOCKED
        + f"""
from pathlib import Path
import warnings
from safeshield import Shield

warnings.simplefilter("ignore")
files = sorted(Path({str(GOLDEN)!r}).glob("shield_*.safetensors"))
for file in files:
    shield = Shield.load(file)
    observations, actions = shield.observation_space, shield.action_space
    observations.seed(0), actions.seed(0)
    shield.filter(observations.sample(), actions.sample())
print(len(files) > 10)
"""
    )
    assert run(code, tmp_path) == "True"


def test_all_wrappers_are_imported_without_the_packages_that_some_of_them_need(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; sys.modules.update(pettingzoo=None, stable_baselines3=None);"
        "from safeshield.wrappers import *; print(SafetyShield.__name__)"
    )
    assert run(code, tmp_path) == "SafetyShield"


def test_nothing_is_called_wrappers_or_policies_at_the_top_level(tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec as f;"
        "print(f('wrappers'), f('policies'), f('tests'), f('safeshield.wrappers') is not None)"
    )
    assert run(code, tmp_path) == "None None None True"


@pytest.mark.parametrize("name", safeshield.__all__)
def test_every_name_of_the_face_resolves(name: str) -> None:
    value = getattr(safeshield, name)
    assert value.__module__.startswith("safeshield")
    assert name in dir(safeshield)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'shiled'"):
        safeshield.shiled  # noqa: B018
    assert sorted(safeshield.__all__) == safeshield.__all__
    assert set(safeshield._HOMES) == set(safeshield.__all__)


def test_it_is_typed() -> None:
    spec = find_spec("safeshield")
    assert spec is not None
    assert (ROOT / "py.typed").exists()


def test_the_distribution_carries_its_license(tmp_path: Path) -> None:
    # In a folder of its own, where no metadata of a source tree stand before the installed ones.
    code = (
        "from importlib.metadata import distribution as d; it = d('safeshield');"
        "print(it.metadata['License-Expression'], it.metadata.get_all('License-File'));"
        "print(it.read_text('licenses/LICENSE'))"
    )
    told, *text = run(code, tmp_path).splitlines()
    assert told == "MIT ['LICENSE']"
    assert text == (Path(__file__).parents[1] / "LICENSE").read_text().splitlines()
