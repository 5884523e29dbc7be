"""The documentation site builds without a warning, and the tutorial's program runs."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import safeshield

ROOT = Path(__file__).parents[1]
SMALL = {
    "episodes=300": "episodes=40",
    "tank.controller, 300,": "tank.controller, 4,",
    "steps=3000": "steps=300",
    "epsilon=0.05, confidence=0.95": "epsilon=0.9, confidence=0.5",
    "tank.controller, 200,": "tank.controller, 6,",
    "plant, 60,": "plant, 2,",
}
"""What the test changes in the tutorial's program, so that it takes seconds."""


def test_the_tutorial_runs_in_a_small_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    plant, *blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "tank.py").write_text(plant)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    program = "".join(blocks)
    for wanted, small in SMALL.items():
        assert wanted in program
        program = program.replace(wanted, small)
    exec(compile(program, "tutorial", "exec"), {"__name__": "tutorial"})
    told = capsys.readouterr().out
    assert "With confidence 0.5" in told
    assert re.search(r"'shield/threshold': -?\d", told)
    assert re.search(r"before: .+ - after: .+", told)
    assert {"log.hdf5", "shield.safetensors", "promise.json", "flight"} <= {
        path.name for path in tmp_path.iterdir()
    }


class Links(HTMLParser):
    """The ids of a page, and the addresses that a browser fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.add(found["id"])
        if tag in ("script", "img", "iframe", "source"):
            self.fetched.append(found.get("src", ""))
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(found.get("href", ""))


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip('the site needs pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def public_names() -> set[str]:
    """Return what `__all__` of the package and of its rooms lists, by import."""
    names = {f"safeshield.{name}" for name in safeshield.__all__}
    for room in pkgutil.iter_modules(safeshield.__path__):
        if room.ispkg and room.name != "cli":
            module = importlib.import_module(f"safeshield.{room.name}")
            names |= {f"{module.__name__}.{name}" for name in getattr(module, "__all__", ())}
    for room in ("wrappers", "policies"):
        module = importlib.import_module(f"safeshield.{room}")
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    return names


def test_every_public_name_has_an_entry(site: Path) -> None:
    """Under the path by which it is imported, or that of the module which defines it."""
    entries = set().union(*(read(page).ids for page in site.glob("reference/*/index.html")))
    missing = []
    for path in sorted(public_names()):
        module, name = path.rsplit(".", 1)
        value = getattr(importlib.import_module(module), name)
        defined = f"{getattr(value, '__module__', module)}.{name}"
        if not {path, defined} & entries:
            shared = {entry for entry in entries if entry.endswith(f".{name}")}
            same = [one for one in shared if _value(one) is value]
            missing += [] if same else [path]
    assert missing == []
    assert len(entries) > len(public_names())  # methods and fields have entries too


def _value(path: str) -> object:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_a_reader_needs_no_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert [to for to in read(page).fetched if re.match(r"(https?:)?//", to)] == [], page


def test_the_landing_page_is_the_readme(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "Safety shields for reinforcement learning agents" in text
    assert 'href="guarantees/' in text
    assert 'href="docs/' not in text
