"""The files around the package: citation, templates, extras, formats, and types from outside."""

from __future__ import annotations

import json
import re
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
