"""A cache on disk for grids of values that take seconds to compute."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safeshield.files.atomic import written_whole

Grid = npt.NDArray[np.float64]


def cache_directory() -> Path:
    """Return the folder of the cache: ``$SAFESHIELD_CACHE``, else the user's cache folder."""
    for variable, below in (("SAFESHIELD_CACHE", "."), ("XDG_CACHE_HOME", "safeshield")):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / below
    if os.name == "nt" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "safeshield" / "cache"
    return Path.home() / ".cache" / "safeshield"


def cached_grid(
    name: str,
    parameters: Mapping[str, object],
    shape: tuple[int, ...],
    compute: Callable[[], Grid],
    directory: str | os.PathLike[str] | None = None,
) -> Grid:
    """Return the grid for these parameters from the cache, or compute it and store it there.

    A file that is damaged or that was made for other parameters counts as absent. Where the folder
    cannot be written, the grid is still returned, with a warning.

    Args:
        name: Name of the grid, which begins the file's name.
        parameters: Values that determine the grid. They are stored with it.
        shape: Shape that the grid must have.
        compute: Function that computes the grid.
        directory: Folder of the cache; None for the default.
    """
    key = json.dumps(dict(parameters), sort_keys=True)
    folder = cache_directory() if directory is None else Path(directory)
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    kept = _read(path, key, shape)
    if kept is not None:
        return kept
    grid = compute()
    try:
        _write(path, key, grid)
    except OSError as error:
        warnings.warn(
            f"the grid of {name} could not be kept in {folder} ({error}); "
            "set SAFESHIELD_CACHE to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )
    return grid


def _read(path: Path, key: str, shape: tuple[int, ...]) -> Grid | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            grid = np.asarray(file["grid"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if grid.shape != shape or grid.dtype != np.float64 or not np.isfinite(grid).all():
        return None
    return grid


def _write(path: Path, key: str, grid: Grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, part.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), grid=grid)
