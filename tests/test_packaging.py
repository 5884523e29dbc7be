"""The files around the package: citation, templates, extras, formats, and types from outside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

import safeshield
from safeshield.algorithms.registry import ALGORITHMS
from safeshield.files import FORMATS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GOLDEN = ROOT / "tests" / "golden"


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == safeshield.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_release_sets_every_version_and_takes_back_what_fails(tmp_path: Path) -> None:
    files = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "safeshield/__init__.py")
    for name in (*files, ".ci/release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- New.\n")
    # These checks fail, so that nothing is built. They show what they were run on.
    (tmp_path / ".ci" / "run").write_text("git diff -U0\nexit 1\n")

    def run(*command: str) -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def commit() -> None:
        run("git", "add", "-A")
        run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "All")

    run("git", "init", "-q")
    commit()
    status, told = run(".ci/release", "7.0.1")
    assert status == 1
    for line in ('+version = "7.0.1"', '+__version__ = "7.0.1"', "+version: 7.0.1"):
        assert line in told.splitlines()
    assert re.search(r"^\+## 7\.0\.1, \d{4}-\d\d-\d\d$", told, re.MULTILINE)
    assert run("git", "status", "--porcelain") == (0, "")
    assert run("git", "tag") == (0, "")
    for arguments, message in (
        (["7.1"], "must be MAJOR.MINOR.PATCH, got '7.1'"),
        (["7.0.1", "--upload"], "the only option is --publish"),
        (["0.0.1"], f"must not be below {PROJECT['version']}, got 0.0.1"),
    ):
        status, told = run(".ci/release", *arguments)
        assert (status, message in told) == (2, True), told
    (tmp_path / "new").touch()
    assert "not committed" in run(".ci/release", "7.0.1")[1]
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 7.0.0\n\n- Old.\n")
    commit()
    assert "nothing under 'Unreleased'" in run(".ci/release", "7.0.1")[1]
    run("git", "tag", "v7.0.1")
    assert "the tag v7.0.1 exists" in run(".ci/release", "7.0.1")[1]


def test_the_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert len(citation["references"]) == 4  # the papers of the four methods
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_templates_of_issues_can_be_filled_in() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(content)
        ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
        assert ids
        assert len(set(ids)) == len(ids)


def test_the_page_on_installing_names_every_extra() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert named == set(PROJECT["optional-dependencies"])


def test_an_extra_that_contains_another_names_it() -> None:
    extras = PROJECT["optional-dependencies"]
    inside = re.findall(r"safeshield\[(\w+)\]", json.dumps(extras))
    assert set(inside) <= set(extras)


def test_the_container_and_the_page_on_suites_install_the_same() -> None:
    container = (ROOT / "Dockerfile").read_text()
    for command in (
        'pip install -e ".[suites]"',
        "pip install --no-deps -r requirements-suites.txt",
    ):
        assert command in container
        assert command in (ROOT / "docs" / "suites.md").read_text()


def test_every_format_of_tensors_has_a_golden_file() -> None:
    """Of the package's own formats: those of algorithms, shields and checkpoints."""
    stored = set()
    for file in GOLDEN.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            header = json.loads(tensors.metadata()["safeshield"])["header"]
            stored.add(header["format"])
    algorithms = {
        kind.kind.file_format
        for kind in ALGORITHMS.values()
        if kind.kind.__module__.startswith("safeshield.")
    }
    known = {
        name
        for name, (_, reader) in FORMATS.items()
        if name in algorithms or reader.startswith(("Shield.", "fit("))
    }
    assert len(known) >= 8
    # A ShieldTrainer's file is a shield; its own format is that of its checkpoints.
    assert known - stored <= {"safeshield-shield-trainer"}


def test_types_hold_from_outside(tmp_path: Path) -> None:
    """A user's script passes pyright, and the three mistakes at its end are found."""
    if find_spec("pyright") is None:
        pytest.skip("needs pip install pyright")
    site = tmp_path / "site" / "safeshield"
    site.mkdir(parents=True)
    for part in [*(ROOT / "safeshield").iterdir(), ROOT / "wrappers", ROOT / "policies"]:
        (site / part.name).symlink_to(part)
    script = tmp_path / "user.py"
    script.write_text((ROOT / "tests" / "user_script.py").read_text())
    settings = {"include": ["user.py"], "extraPaths": ["site"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot run here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = script.read_text().splitlines()
    mistakes = [lines[one["range"]["start"]["line"]] for one in found if one["severity"] == "error"]
    assert mistakes == lines[-3:]
