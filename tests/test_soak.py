"""The soak of docs/reliability.md finds nothing in a short form, and finds planted faults."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """The module benchmarks/soak.py, whose processes live for a moment."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import soak

    monkeypatch.setattr(soak, "LIFE", 0.3)
    return soak


def test_each_treatment_once(soak: Any, tmp_path: Path) -> None:  # noqa: ANN401
    told: list[str] = []
    assert soak.soak(0.0, tmp_path, 0, list(soak.TREATMENTS), told.append), told
    rows = [line.split(" | ") for line in told[1 : 1 + len(soak.TREATMENTS) + 2]]
    assert {row[0].removeprefix("| ") for row in rows} >= set(soak.TREATMENTS)
    assert all(int(row[1]) == 1 for row in rows), told
    # A busy machine may leave one of them no time.
    assert sum(int(row[2].replace(",", "")) for row in rows) > 100, told


def flown(soak: Any, folder: Path) -> Any:  # noqa: ANN401
    """A steady process that has flown 50 steps, in this process."""
    lines: list[str] = []
    run = soak.Run(folder, 1, "steady", folder / "flight", lines.append)
    env = run.env(monitor=False)
    seen, _ = env.reset()
    for _ in range(50):
        seen = env.step(soak.proposal(seen))[0]
    env.close()
    return soak.Process(run, 0, 0, ["closed 0"], gone=True)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("", ""), ("another action", "unchecked"), ("no plain array", "unchecked"),
        ("a row is missing", "lost"), ("the end is missing", "lost"), ("no flight", "lost"),
        ("a header is damaged", "unreadable"), ("an error", "died"), ("no end", "died"),
        ("a temporary file", "left over"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_counted(soak: Any, tmp_path: Path, fault: str, name: str) -> None:  # noqa: ANN401
    process = flown(soak, tmp_path)
    record = process.run.record(1)
    rows = soak.rows_of(record).copy()
    file = next(process.run.flight.glob("*.flight"))
    if fault == "another action":
        rows["action"][7] += 0.25
    elif fault == "no plain array":
        rows["plain"][7] = False
    elif fault == "a row is missing":
        rows = np.concatenate([rows, rows[-1:]])
    elif fault == "the end is missing":
        file.write_bytes(file.read_bytes()[:-30])
    elif fault == "no flight":
        file.unlink()
    elif fault == "a header is damaged":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif fault == "an error":
        process.lines.append("error: it has failed")
    elif fault == "no end":
        process.lines.clear()
    elif fault == "a temporary file":
        (tmp_path / ".steady.json.1.part").touch()
    rows.tofile(record)
    counts: Counter[str] = Counter()
    soak.audited(process, counts)
    assert counts["steps"] >= 100
    assert {one for one in soak.ZERO if counts[one]} == ({name} if name else set()) | (
        {"lost"} if fault == "another action" else set()
    )


@pytest.mark.parametrize(
    ("each", "episodes", "descriptors", "fine"),
    [
        (0, 0, 0, True),
        (2e5, 0, 0, False),
        (2000, 4, 0, True),
        (9000, 4, 0, False),
        (0, 0, 1, False),
    ],
)
def test_growth_beyond_its_noise(
    soak: Any,  # noqa: ANN401
    each: float,
    episodes: int,
    descriptors: int,
    fine: bool,
) -> None:
    rng = np.random.default_rng(0)
    lines = [
        f"at {i} {3e8 + each * i + rng.normal(0, 1e4)} {9 + descriptors * (i // 20)} {episodes * i}"
        for i in range(200)
    ]
    run = soak.Run(Path(), 0, "steady", Path(), print)
    assert soak.grown(soak.Process(run, 0, 0, lines))[1] is fine
