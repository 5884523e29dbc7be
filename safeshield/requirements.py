"""What the core needs, and what to say where it is missing.

The list is the one in the metadata of the installed package. This module is imported first, so it
imports nothing but Python's own modules until it has something to say.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

_MODULES = {"pillow": "PIL"}
"""Distributions whose module has another name."""


def core() -> dict[str, str]:
    """Return what pip installs by the module that is imported, such as torch -> torch>=2.8."""
    try:
        asked = metadata.requires("safeshield") or []
    except metadata.PackageNotFoundError:
        return {}
    # What stands behind a semicolon belongs to an extra.
    plain = (requirement for requirement in asked if ";" not in requirement)
    return {_module(_name(requirement)): requirement for requirement in plain}


def lacking() -> dict[str, str | None]:
    """Return what of the core is absent or too old: requirement -> version, None where absent."""
    found = {one: installed(_name(one), module) for module, one in core().items()}
    return {
        requirement: version
        for requirement, version in found.items()
        if version is None or not _enough(requirement, version)
    }


def installed(name: str, module: str = "") -> str | None:
    """Return the version of a distribution; None where it is absent.

    Args:
        name: that pip knows.
        module: that it brings. Where this can be imported without the distribution, the version
            is not known: "?".
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?" if module and importlib.util.find_spec(module) is not None else None


def command(requirements: list[str]) -> str:
    """Return the command that installs these.

    >>> command(["h5py>=3.10", "scipy>=1.13"])
    'pip install "h5py>=3.10" "scipy>=1.13"'
    """
    return "pip install " + " ".join(f'"{one}"' for one in requirements)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error with the command that mends it, where it is of a package of the core."""
    requirement = core().get((error.name or "").partition(".")[0])
    if requirement is None:
        return error
    return ModuleNotFoundError(
        f"{_name(requirement)} is not installed, and safeshield needs it: run "
        f"{command([requirement])} ; then see `safeshield doctor`",
        name=error.name,
    )


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _module(name: str) -> str:
    return _MODULES.get(name, name.replace("-", "_"))


def _enough(requirement: str, version: str) -> bool:
    """Whether the release meets the requirement: of 2.8.0a0+cpu the release is 2.8.0."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    if version == "?":
        return True
    return Requirement(requirement).specifier.contains(Version(version).base_version)
