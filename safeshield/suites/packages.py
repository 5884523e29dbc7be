"""The packages that the benchmark suites need, in the versions that were tried together.

Safety-Gymnasium, Bullet-Safety-Gym, DSRL and MetaDrive pin old versions of packages of which the
other requirements need newer versions. Pip therefore cannot resolve them, and they are installed
with ``--no-deps`` after the other packages.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from enum import StrEnum

import gymnasium as gym
from packaging.requirements import Requirement

from safeshield.requirements import installed


class Suite(StrEnum):
    """A benchmark suite, whose packages are installed and checked together."""

    safety_gymnasium = "safety-gymnasium"
    bullet = "bullet"
    dsrl = "dsrl"
    metadrive = "metadrive"


@dataclass(frozen=True)
class Package:
    """One package that a benchmark suite needs."""

    requirement: str
    """Name and versions, in pip's notation."""
    module: str
    """Name of the module that Python imports."""
    suites: tuple[Suite, ...]
    """Suites that do not run without the package."""
    apart: bool = False
    """Whether its own pins contradict other requirements, so that it needs ``--no-deps``."""

    @property
    def name(self) -> str:
        """Name of the package, as pip knows it."""
        return Requirement(self.requirement).name

    @property
    def version(self) -> str | None:
        """Installed version, None where the package is absent, "?" where its version is unknown."""
        # Some modules are in several packages, such as opencv-python-headless and opencv-python.
        return installed(self.name, self.module)

    @property
    def as_tried(self) -> bool:
        """Whether the installed version is one that was tried with the others, or is unknown."""
        version = self.version
        if version is None or version == "?":
            return version == "?"
        return Requirement(self.requirement).specifier.contains(version, prereleases=True)


_OPENGL = ("OpenGL", "mujoco.gl_context", "mujoco.osmesa", "mujoco.egl", "mujoco.glfw")
"""Modules by which MuJoCo loads its rendering library."""
_LAST_PYTHON: tuple[int, int] = (3, 11)
_RUNNING: tuple[int, int] = (sys.version_info.major, sys.version_info.minor)
_SAFETY = (Suite.safety_gymnasium,)
_BULLET = (Suite.bullet,)
_METADRIVE = (Suite.metadrive,)

STACK = (
    Package("gymnasium==0.29.1", "gymnasium", tuple(Suite)),
    Package("mujoco==2.3.7", "mujoco", _SAFETY),
    Package("numpy<2.4", "numpy", _SAFETY),
    Package("pygame", "pygame", (*_SAFETY, *_METADRIVE)),
    Package("xmltodict", "xmltodict", _SAFETY),
    Package("pyyaml", "yaml", _SAFETY),
    Package("imageio", "imageio", _SAFETY),
    Package("pybullet", "pybullet", _BULLET),
    Package("panda3d==1.10.13", "panda3d", _METADRIVE),
    Package("panda3d-gltf==0.13", "gltf", _METADRIVE),
    Package("shapely", "shapely", _METADRIVE),
    Package("lxml", "lxml", _METADRIVE),
    Package("psutil", "psutil", _METADRIVE),
    Package("progressbar", "progressbar", _METADRIVE),
    Package("filelock", "filelock", _METADRIVE),
    Package("opencv-python-headless", "cv2", _METADRIVE),
    Package("mediapy", "mediapy", _METADRIVE),
    Package("seaborn", "seaborn", _METADRIVE),
    Package("yapf", "yapf", _METADRIVE),
    Package("Pygments", "pygments", _METADRIVE),
    Package("requests", "requests", _METADRIVE),
    Package("minari", "minari", ()),  # for the logs of its server; no environment needs it
    Package("safety-gymnasium==0.4.1", "safety_gymnasium", _SAFETY, apart=True),
    Package("bullet-safety-gym==1.4.0", "bullet_safety_gym", _BULLET, apart=True),
    Package("dsrl==0.1.0", "dsrl", (Suite.dsrl,), apart=True),
    Package("metadrive-simulator==0.4.3", "metadrive", _METADRIVE, apart=True),
)
"""All packages in the order of installation; those that need ``--no-deps`` come last."""


def needed(*suites: Suite) -> tuple[Package, ...]:
    """Return the packages without which these suites do not run.

    >>> [package.name for package in needed(Suite.bullet)]
    ['gymnasium', 'pybullet', 'bullet-safety-gym']
    """
    return tuple(package for package in STACK if set(suites) & set(package.suites))


def commands(packages: tuple[Package, ...]) -> list[str]:
    """Return the commands that install these packages, in the order in which to run them.

    >>> for command in commands(needed(Suite.dsrl)):
    ...     print(command)
    pip install "safeshield[suites]"
    pip install --no-deps dsrl==0.1.0
    """
    apart = [package.requirement for package in packages if package.apart]
    lines = []
    if len(apart) < len(packages):
        lines.append('pip install "safeshield[suites]"')
    if apart:
        lines.append(f"pip install --no-deps {' '.join(apart)}")
    return lines


def python_note() -> str:
    """Return a note that the commands fail on Python later than 3.11, else an empty string."""
    if _RUNNING <= _LAST_PYTHON:
        return ""
    return (
        "MuJoCo 2.3.7, PyBullet and Panda3D 1.10.13 have no wheels for Python later than "
        f"{_LAST_PYTHON[0]}.{_LAST_PYTHON[1]}; this is {_RUNNING[0]}.{_RUNNING[1]}"
    )


def missing(*suites: Suite) -> tuple[Package, ...]:
    """Return the packages that these suites need and that are not installed."""
    return tuple(package for package in needed(*suites) if package.version is None)


def require(what: str, *suites: Suite) -> None:
    """Raise an error unless all packages of these suites are installed.

    Args:
        what: Name, for the error message, of what needs the packages.
        *suites: The suites that are needed.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing; the message names it and the
            commands that install it.
    """
    absent = missing(*suites)
    if absent:
        names = ", ".join(package.name for package in absent)
        raise gym.error.DependencyNotInstalled(
            f"{what} needs packages that are not installed: {names}. {_repair(absent)}"
        )


def broken(what: str, error: Exception, *suites: Suite) -> gym.error.DependencyNotInstalled:
    """Return the error to raise where all packages are installed but an import fails.

    `what` is the name of what cannot be loaded, `error` the error of the import, and `suites` the
    suites that the packages serve.
    """
    if Suite.safety_gymnasium in suites and _failed_in_opengl(error):
        chosen = os.environ.get("MUJOCO_GL")
        says = "MUJOCO_GL is not set" if chosen is None else f"MUJOCO_GL={chosen} asks for it"
        return gym.error.DependencyNotInstalled(
            f"{what} cannot be loaded ({type(error).__name__}: {error}): MuJoCo cannot load the "
            f"library that it draws with ({says}); install that, or set the environment variable "
            "MUJOCO_GL to another one (egl, osmesa, glfw) or to disable before Python starts"
        )
    others = [package for package in needed(*suites) if not package.as_tried]
    found = ", ".join(f"{package.name} {package.version}" for package in others)
    repair = (
        f"these are other versions than those that were tried: {found}. {_repair(tuple(others))}"
        if others
        else "the versions are those that were tried; see `safeshield doctor`"
    )
    return gym.error.DependencyNotInstalled(
        f"{what} cannot be loaded ({type(error).__name__}: {error}): {repair}"
    )


def _failed_in_opengl(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in frames}
    return any(name.startswith(_OPENGL) for name in modules)


def _repair(packages: tuple[Package, ...]) -> str:
    note = python_note()
    run = f"Run: {' ; '.join(commands(packages))} ; then see `safeshield doctor`"
    return f"{run}. But {note}" if note else run
