"""What the core needs, and what to say where it is missing. Nothing is imported here but Python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

CORE = {
    "cloudpickle": "cloudpickle>=2",
    "gymnasium": "gymnasium>=0.29.1",
    "h5py": "h5py>=3.10",
    "jaxtyping": "jaxtyping>=0.2.36",
    "matplotlib": "matplotlib>=3.8",
    "numpy": "numpy>=2.0",
    "packaging": "packaging>=23",
    "PIL": "pillow>=10",
    "pydantic": "pydantic>=2.7",
    "safetensors": "safetensors>=0.4.5",
    "scipy": "scipy>=1.13",
    "stable_baselines3": "stable-baselines3>=2.9",
    "tensorboard": "tensorboard>=2.16",
    "torch": "torch>=2.8",
    "tqdm": "tqdm>=4.66",
    "typer": "typer>=0.15",
    "zuko": "zuko>=1.4",
}
"""Module that is imported -> what pip installs."""


def lacking() -> dict[str, str | None]:
    """Return what of the core is absent or too old: requirement -> version, None where absent."""
    found = {one: _version(module, one) for module, one in CORE.items()}
    return {
        requirement: version
        for requirement, version in found.items()
        if version is None or not _enough(requirement, version)
    }


def command(requirements: list[str]) -> str:
    """Return the command that installs these.

    >>> command(["h5py>=3.10", "scipy>=1.13"])
    'pip install "h5py>=3.10" "scipy>=1.13"'
    """
    return "pip install " + " ".join(f'"{one}"' for one in requirements)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error with the command that mends it, where it is of a package of the core."""
    module = (error.name or "").partition(".")[0]
    if module not in CORE:
        return error
    return ModuleNotFoundError(
        f"{_name(CORE[module])} is not installed, and safeshield needs it: run "
        f"{command([CORE[module]])} ; then see `safeshield doctor`",
        name=error.name,
    )


def _name(requirement: str) -> str:
    return requirement.partition(">=")[0]


def _version(module: str, requirement: str) -> str | None:
    try:
        return importlib.metadata.version(_name(requirement))
    except importlib.metadata.PackageNotFoundError:
        # There, but not from a package: it says no version, and is not asked for one.
        return "?" if importlib.util.find_spec(module) is not None else None


def _enough(requirement: str, version: str) -> bool:
    wanted = _numbers(requirement.partition(">=")[2])
    return version == "?" or _numbers(version) >= wanted


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a release: 2.10.1 of 2.10.1+cpu, of 2.10.1rc1 and of 2.10.1.post0."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
