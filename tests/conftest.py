"""Shapes checked on request, one thread, no deadlines, and the small shared fixtures."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# SAFESHIELD_CHECK_SHAPES=1 checks the shapes in annotations, which doubles the time of the tests.
if os.environ.get("SAFESHIELD_CHECK_SHAPES", "0") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(
        [
            f"safeshield.{part}"
            for part in (
                "calibration", "data", "demo", "envs", "evaluation", "exact", "monitoring",
                "policies", "proposals", "rollouts", "shield", "spaces", "support", "values",
                "wrappers",
            )
        ],
        "shape_checks.shapes_only",
    )  # fmt: skip

import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from fitted import DT, fitted_shield
from gymnasium.utils import seeding
from hypothesis import HealthCheck, settings

from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
from safeshield.data import OfflineDataset, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import STATE_HIGH, STATE_LOW, constraint, next_state
from safeshield.exact import boat_value
from safeshield.shield import Shield

torch.set_num_threads(1)

collect_ignore = ["user_script.py"]  # A type checker reads it (test_packaging); it does not run.

# A busy machine is slow, which says nothing of the code. Modules set no deadlines (test_deadlines).
settings.register_profile("no-clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-clock")


def _one_blas_thread() -> None:
    # A pytest plugin has imported NumPy before this file could set OMP_NUM_THREADS, and threads
    # that wait for each other on busy cores make small matrix products fifty times slower.
    for library in Path(np.__file__).parent.with_name("numpy.libs").glob("*openblas*"):
        for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
            function = getattr(ctypes.CDLL(str(library)), name, None)
            if function is not None:
                function(1)


_one_blas_thread()


@pytest.fixture(autouse=True)
def _same_randomness_in_every_run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed the generators of environments and spaces that a test leaves without a seed.

    Gymnasium draws such a seed from the operating system. Here it comes from the name of the test
    and a counter, so that a test which passes once passes always.
    """
    own = seeding.np_random
    seeds = itertools.count(zlib.crc32(request.node.name.encode()) << 20)
    monkeypatch.setattr(
        seeding, "np_random", lambda seed=None: own(next(seeds) if seed is None else seed)
    )


@pytest.fixture(scope="session")
def boat_log() -> OfflineDataset:
    """200 trips of the helmsmen, 80,000 transitions."""
    return collect(gym.make("safeshield/Boat-v0"), Helmsmen(), episodes=200, seed=3)


@pytest.fixture(scope="session")
def agent(boat_log: OfflineDataset, tmp_path_factory: pytest.TempPathFactory) -> SafeFQL:
    """A small agent whose safety values of states are roughly right."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # One worker trains the agent for all.
    path = folder / "agent.safetensors"
    config = SafeFQLConfig(
        critic_hidden=(48, 48),
        flow_hidden=(16, 16),
        student_hidden=(32, 32),
        batch_size=128,
        phase_shares=(0.8, 0.05, 0.15),
    )
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            SafeFQL(config, device="cpu").fit(boat_log, steps=2000).save(path)
    return SafeFQL.load(path, device="cpu")


@pytest.fixture(scope="session")
def stored_agent() -> SafeFQL:
    """A SafeFQL agent of the boat from a file, for tests where any trained agent will do."""
    path = Path(__file__).parent / "golden" / "agent_safefql.safetensors"
    return SafeFQL.load(path, device="cpu")


@pytest.fixture(scope="session")
def shield() -> Shield:
    """A shield of the boat that works, at delta 0.05: critics fitted to the exact values.

    A test of shields should not wait for training, nor fail with it.
    """
    exact = boat_value()
    rng = np.random.default_rng(0)
    states = rng.uniform(STATE_LOW, STATE_HIGH, (60_000, 2))
    states = np.concatenate([states, states[np.abs(exact(states)) < 0.3]])
    actions = rng.uniform(-1, 1, states.shape)
    q = np.maximum(exact(next_state(states, actions, dt=DT)), constraint(states))
    space = gym.spaces.Box(STATE_LOW.astype("f4"), STATE_HIGH.astype("f4"))
    return fitted_shield(space, states, actions, exact(states), q).with_delta(0.05)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local Ray, which takes some ten seconds to start."""
    pytest.importorskip("ray")
    import ray

    from safeshield.rollouts.ray_workers import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Workers import the benchmark that a test of test_ray.py runs.
        benchmarks = str(Path(__file__).parents[1] / "benchmarks")
        patch.setenv("PYTHONPATH", os.pathsep.join([benchmarks, os.environ.get("PYTHONPATH", "")]))
        cluster = Cluster("local")
        yield ray
        cluster.close()
    assert not ray.is_initialized()


@pytest.fixture
def integer_box_log() -> OfflineDataset:
    """A log whose actions are a Box of integers."""
    count = 40
    return OfflineDataset.from_arrays(
        observations=np.zeros((count, 2)), actions=np.ones((count, 1), np.int64),
        rewards=np.zeros(count), next_observations=np.zeros((count, 2)),
        terminated=np.zeros(count, bool), truncated=np.arange(count) % 10 == 9,
        costs=(np.arange(count) % 4 == 0).astype(float),
        action_space=gym.spaces.Box(-3, 3, (1,), np.int64),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _forgetful(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the shared shield forget the calibrations of a test, which change those of the next."""
    shared = request.getfixturevalue("shield") if "shield" in request.fixturenames else None
    yield
    if isinstance(shared, Shield):
        shared.attempts = ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the test that takes minutes, so that others run beside it."""
    items.sort(key=lambda item: item.name != "test_ten_lines")
