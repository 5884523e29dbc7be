"""No test fails because the machine is busy: hypothesis sets no deadline, in any module."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))
ALLOWED = {TESTS / "conftest.py"}  # it registers the profile of all tests
PROFILE = ("register_profile", "load_profile")


def deadlines(source: str) -> Iterator[int]:
    """Lines that set a deadline, or change the profile that sets none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "deadline":
            yield node.value.lineno
        if isinstance(node, ast.Attribute) and node.attr in PROFILE:
            yield node.lineno


@settings(max_examples=2)
@given(st.booleans())
def test_an_example_may_take_longer_than_the_default_deadline(one: bool) -> None:
    time.sleep(0.25)  # hypothesis allows 0.2 s by default


def test_the_profile_asks_for_nothing_that_a_clock_decides() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_module_sets_a_deadline_of_its_own(file: Path) -> None:
    found = list(deadlines(file.read_text(encoding="utf-8")))
    assert bool(found) == (file in ALLOWED), f"lines {found} of {file.name}"


def test_a_deadline_would_be_seen() -> None:
    for text in (
        "@settings(max_examples=3, deadline=500)\ndef test() -> None: ...",
        "SHORT = settings(deadline=None)",
        "hypothesis.settings.load_profile('default')",
    ):
        assert list(deadlines(text)) == [1]
    assert not list(deadlines("@settings(max_examples=3)\ndef test() -> None: ..."))
