"""The packages that the core requires, and the error message when one of them is missing.

The list of requirements is read from the metadata of the installed package. This module is
imported first, so at import it loads modules of Python's standard library alone.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

_MODULES = {"pillow": "PIL"}
"""Distribution name -> module name, where the two differ."""


def core() -> dict[str, str]:
    """Return the core's requirements by the name of their module, such as torch -> torch>=2.8."""
    try:
        asked = metadata.requires("safeshield") or []
    except metadata.PackageNotFoundError:
        return {}
    # A requirement with a semicolon belongs to an extra.
    plain = (requirement for requirement in asked if ";" not in requirement)
    return {_module(_name(requirement)): requirement for requirement in plain}


def lacking() -> dict[str, str | None]:
    """Return the core's requirements that are absent or too old.

    Returns:
        Requirement -> installed version, or None where the package is absent.
    """
    found = {one: installed(_name(one), module) for module, one in core().items()}
    return {
        requirement: version
        for requirement, version in found.items()
        if version is None or not _enough(requirement, version)
    }


def installed(name: str, module: str = "") -> str | None:
    """Return the installed version of a distribution, or None where it is absent.

    Args:
        name: Name of the distribution, as pip knows it.
        module: Name of a module that the distribution contains. Where this module can be imported
            although the distribution is absent, the version is unknown and "?" is returned.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?" if module and importlib.util.find_spec(module) is not None else None


def command(requirements: list[str]) -> str:
    """Return the pip command that installs these requirements.

    >>> command(["h5py>=3.10", "scipy>=1.13"])
    'pip install "h5py>=3.10" "scipy>=1.13"'
    """
    return "pip install " + " ".join(f'"{one}"' for one in requirements)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error to raise for a missing module.

    Where the module belongs to a requirement of the core, the new message contains the command
    that installs it. Any other error is returned unchanged.
    """
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
    """Whether the version's release number (2.8.0 for 2.8.0a0+cpu) meets the requirement."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    if version == "?":
        return True
    return Requirement(requirement).specifier.contains(Version(version).base_version)
