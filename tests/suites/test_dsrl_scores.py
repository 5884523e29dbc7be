"""The formulas of the protocol are DSRL's own, on its own reference returns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from safeshield.evaluation import FieldScore, ReferenceReturns, Run

FOUND = importlib.util.find_spec("dsrl")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs the benchmark stack")


def module(name: str) -> ModuleType:
    """One file of dsrl: importing the package would import every simulator with it."""
    assert FOUND is not None
    assert FOUND.origin is not None
    path = Path(FOUND.origin).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"dsrl_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def offline_env() -> Any:  # noqa: ANN401
    return module("offline_env").OfflineEnv


@pytest.mark.parametrize("limit", [0.0, 1.0, 5.0, 10.0, 20.0, 80.0])
def test_scores_are_those_of_get_normalized_score(offline_env: Any, limit: float) -> None:  # noqa: ANN401
    infos = module("infos")
    rng = np.random.default_rng(0)
    for task, greatest in infos.MAX_EPISODE_REWARD.items():
        least = infos.MIN_EPISODE_REWARD[task]
        env = offline_env(max_episode_reward=greatest, min_episode_reward=least)
        env.set_target_cost(limit)
        returns = rng.uniform(least - 10.0, greatest + 10.0, 20)
        costs = rng.integers(0, 100, 20).astype(float)
        run = Run(0, tuple(returns.tolist()), tuple(costs.tolist()))
        score = FieldScore("agent", task, ReferenceReturns(least, greatest), limit, (run,))
        expected = env.get_normalized_score(np.mean(returns), np.mean(costs))
        assert (score.normalised_return, score.normalised_cost) == pytest.approx(
            expected, rel=1e-12
        )
