"""Our reader beside dsrl's own on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from safeshield.data import OfflineDataset
from safeshield.suites import compat, dsrl

WIDTHS = (8, 2)


def write(path: Path, dtype: str, columns: bool, **options: Any) -> Path:  # noqa: ANN401
    rng = np.random.default_rng(0)
    steps = 1200
    ends = np.arange(1, steps + 1) % 200 == 0
    terminals = ends & (rng.random(steps) < 0.5)
    arrays = {
        "observations": rng.normal(size=(steps, WIDTHS[0])),
        "next_observations": rng.normal(size=(steps, WIDTHS[0])),
        "actions": rng.uniform(-1, 1, (steps, WIDTHS[1])),
        "rewards": 1e3 * rng.normal(size=steps),
        "costs": rng.integers(0, 2, steps),
        "terminals": terminals,
        "timeouts": ends & ~terminals,
    }
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            kept = value.astype("?" if value.dtype == bool and dtype == "f4" else dtype)
            column = columns and key in ("rewards", "costs", "terminals")
            file.create_dataset(key, data=kept[:, None] if column else kept, **options)
    return path


def dsrls(path: Path, widths: tuple[int, int]) -> dict[str, Any]:
    # Imported after our ids, dsrl would put its own environments in their place, for other tests.
    with compat.registry_kept(dsrl._ALL):
        from dsrl.offline_env import OfflineEnv

    env = OfflineEnv()
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, widths[:1])
    env.action_space = gym.spaces.Box(-1, 1, widths[1:])
    return env.get_dataset(str(path))


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "gzip"}, {"chunks": True, "shuffle": True}], ids=str
)
def test_the_arrays_are_dsrls(
    tmp_path: Path, dtype: str, columns: bool, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "log.hdf5", dtype, columns, **options)
    theirs, ours = dsrls(path, WIDTHS), OfflineDataset.load(path)
    for key in ("observations", "next_observations", "actions", "rewards", "costs"):
        np.testing.assert_array_equal(getattr(ours, key), theirs[key], key, strict=True)
    np.testing.assert_array_equal(ours.terminated, theirs["terminals"] == 1)
    np.testing.assert_array_equal(ours.truncated, theirs["timeouts"] == 1)


def test_what_we_save_dsrl_reads(tmp_path: Path) -> None:
    log = OfflineDataset.load(write(tmp_path / "log.hdf5", "f4", False))
    log.save(tmp_path / "again.hdf5")
    theirs = dsrls(tmp_path / "again.hdf5", WIDTHS)
    for key in ("observations", "next_observations", "actions", "rewards", "costs"):
        np.testing.assert_array_equal(getattr(log, key), theirs[key], key, strict=True)
    np.testing.assert_array_equal(log.terminated, theirs["terminals"])
    np.testing.assert_array_equal(log.truncated, theirs["timeouts"])
