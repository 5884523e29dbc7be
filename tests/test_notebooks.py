"""The notebooks run from the first cell to the last, and are stored without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "comparing_methods", "own_environment", "ten_minutes_on_the_boat",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path: Path) -> None:
    code = cells(path, "code")
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert 'find_spec("safeshield") is None' in "".join(code[0]["source"])
    assert "trainings" in "".join("".join(cell["source"]) for cell in cells(path, "markdown")[:1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    told = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    # After the name: shield, noise, starts, episodes, violating.
    found = re.finditer(r" (yes|no) +(?:yes|no|-) +(?:all|certified) +(\d+) +(\d+) ", told)
    shielded = [(int(row[2]), int(row[3])) for row in found if row[1] == "yes"]
    assert shielded
    for episodes, violating in shielded:  # Behind a shield, hardly any episode violates.
        assert violating <= 5 < episodes
