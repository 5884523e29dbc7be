"""Safety-Gymnasium's environments: every id that it registers, on Python 3.11 and later.

``SafetyPointGoal1Gymnasium-v0`` steps by Gymnasium's five values with ``info["cost"]``, the native
``SafetyPointGoal1-v0`` by six (`safeshield.wrappers.CostFromStep` makes them five). Navigation
tasks that nothing renders reset without reading the pictures of the sky.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from safeshield.spaces.generic import Env
from safeshield.suites import compat
from safeshield.suites.packages import Suite, load_once
from safeshield.suites.registration import (
    Remade,
    import_if_installed,
    register,
    remember,
    remember_how,
)

PACKAGE = "safety_gymnasium"
METADATA = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 30}

_ROBOTS = ("Point", "Car", "Doggo", "Racecar", "Ant")
_WITH_KEYBOARD = ("Point", "Car", "Racecar")
_NAVIGATION = (*(f"{task}{n}" for task in ("Button", "Push", "Goal", "Circle") for n in range(3)),
               "Run0")  # fmt: skip
_RUNNERS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")
_SKY = re.compile(r'<texture\b[^>]*\btype="skybox"[^>]*?(?:/>|>\s*</texture>)')


def native_ids() -> tuple[str, ...]:
    """Return the ids whose steps have six values, the cost the third.

    >>> len(native_ids())
    181
    """
    navigation = [
        f"Safety{robot}{task}{form}-v0"
        for robot in _ROBOTS
        for task in _NAVIGATION
        for form in ("", "Vision", *(["Debug"] if robot in _WITH_KEYBOARD else []))
    ]
    velocity = [f"Safety{robot}Velocity-v{n}" for robot in _RUNNERS for n in (0, 1)]
    return (*navigation, *velocity)


def five_values_id(native_id: str) -> str:
    """Return the id of the same environment with Gymnasium's five values.

    >>> five_values_id("SafetyPointGoal1-v0")
    'SafetyPointGoal1Gymnasium-v0'
    """
    name, version = native_id.rsplit("-", 1)
    return f"{name}Gymnasium-{version}"


def native_id(env_id: str) -> str:
    """Return the id of the same environment with six values."""
    name, version = env_id.rsplit("-", 1)
    return f"{name.removesuffix('Gymnasium')}-{version}"


_NATIVE = native_ids()
_ALL = (*_NATIVE, *map(five_values_id, _NATIVE))
_UPSTREAM: dict[str, EnvSpec] = {}


def register_envs() -> None:
    """Register Safety-Gymnasium's ids; where it is absent, making one says so."""
    import_if_installed(PACKAGE, _ALL, _UPSTREAM)
    register(_NATIVE, f"{__name__}:make_native", {}, _UPSTREAM)
    register(map(five_values_id, _NATIVE), f"{__name__}:make", {}, _UPSTREAM)


def make(env_id: str, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return the environment of an id "...Gymnasium-v0", without Gymnasium's outer wrappers.

    Raises:
        gymnasium.error.DependencyNotInstalled: a package is missing or cannot be loaded.
        RuntimeError: (in `render`, and where an observation is a picture in `reset`) there is no
            display, and MUJOCO_GL names nothing that needs none.
    """
    base, defaults = _class_of(native_id(env_id), env_id)
    env: Env = mended(base, five_values=True)(**{**defaults, **kwargs})
    return remember_how(env, make, env_id, kwargs)


def make_native(env_id: str, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return the environment of a native id, without Gymnasium's outer wrappers.

    Raises:
        gymnasium.error.DependencyNotInstalled: a package is missing or cannot be loaded.
    """
    base, defaults = _class_of(env_id, env_id)
    env: Env = mended(base, five_values=False)(**{**defaults, **kwargs})
    return remember_how(env, make_native, env_id, kwargs)


# Where it finds these, `gymnasium.make` offers "rgb_array_list" too.
vars(make).update(metadata=METADATA)
vars(make_native).update(metadata=METADATA)


def _class_of(native_id: str, what: str) -> tuple[Any, dict[str, Any]]:
    """Return an environment's class and arguments, as Safety-Gymnasium has registered them."""
    load(what)
    spec = _UPSTREAM[native_id]
    kind: Any = load_env_creator(str(spec.entry_point))
    return kind, dict(spec.kwargs)


def load(what: str) -> None:
    """Import Safety-Gymnasium with all its tasks; `what` is named in the error.

    Raises:
        gymnasium.error.DependencyNotInstalled: a package is missing or cannot be loaded.
    """
    load_once(what, Suite.safety_gymnasium, _import_everything)


@functools.cache
def _import_everything() -> None:
    with compat.LOCK, compat.registry_kept(_ALL) as seen, compat.array_defaults(PACKAGE):
        # Its own `make` imports these later, when nothing is mended any more.
        for module in (PACKAGE, f"{PACKAGE}.builder", f"{PACKAGE}.tasks"):
            importlib.import_module(module)
    remember(_UPSTREAM, seen)


@functools.cache
def mended(base: Any, *, five_values: bool) -> Any:  # noqa: ANN401 - a class of theirs
    """Return a subclass of an environment's class; see the classes below."""
    from safety_gymnasium.builder import Builder

    parts: list[type] = [_FiveValues] if five_values else []
    if issubclass(base, Builder):
        parts.append(_Navigation)
    return type(base.__name__, (*parts, _Drawn, base), {"__doc__": base.__doc__})


class _Drawn(Remade):
    """An environment that refuses to draw where that would end the process."""

    def render(self) -> Any:  # noqa: ANN401 - a picture, or nothing
        check_display(str(self.render_mode))
        return super().render()


def check_display(mode: str) -> None:
    """Raise RuntimeError where MuJoCo cannot draw.

    Without a display it fails in the middle of that, and at the next model the process aborts.
    """
    if not sys.platform.startswith("linux"):
        return
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    if mode == "human":
        raise RuntimeError(
            "render_mode 'human' opens a window, and there is no display here (DISPLAY is not "
            "set): use 'rgb_array' with the environment variable MUJOCO_GL=egl"
        )
    if os.environ.get("MUJOCO_GL", "").strip().lower() not in ("egl", "osmesa"):
        raise RuntimeError(
            "MuJoCo cannot draw here: there is no display (DISPLAY is not set). Set the "
            "environment variable MUJOCO_GL=egl (a graphics driver draws) or osmesa (the processor "
            "does, by the system's library OSMesa) before Python starts"
        )


class _FiveValues(Env):
    """An environment whose step returns the cost in ``info["cost"]``."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        result: tuple[Any, ...] = super().step(action)
        observation, reward, cost, terminated, truncated, info = result
        return observation, reward, terminated, truncated, {**info, "cost": cost}


class _Navigation(Env):
    """A navigation task that resets faster: no sky where nothing renders, layouts drawn quickly."""

    task: Any
    render_parameters: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the base's own
        super().__init__(*args, **kwargs)
        generator = self.task.random_generator
        generator.sample_layout = functools.partial(_sample_layout, generator)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        # Its own reset leaves Gymnasium's generator unseeded, which check_env refuses.
        gym.Env.reset(self, seed=seed)
        if self.task.observe_vision:
            check_display("rgb_array")
        if self.task.world is None and not _renders(self):
            self.task.world = _world_class()(self)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        # NumPy 2 refuses np.array(action, copy=False), as it stands in there, for a list.
        return super().step(np.asarray(action))


def _sample_layout(generator: Any) -> bool:  # noqa: ANN401 - a RandomGenerator of theirs
    """Do what `RandomGenerator.sample_layout` does, draw for draw and bit for bit.

    Tasks with buttons draw tens of thousands of places for one layout; there, each is compared
    with the others by five calls of NumPy on two numbers, here by floats.
    """
    margin = generator.placements_margin
    layout: dict[str, Any] = {}
    others: list[tuple[float, float, float]] = []
    for name, (placements, keepout) in generator.placements.items():
        for _ in range(100):
            place = generator.draw_placement(placements, keepout)
            x, y = place.tolist()
            if all(
                math.sqrt((x - other_x) * (x - other_x) + (y - other_y) * (y - other_y))
                >= reach + keepout
                for other_x, other_y, reach in others
            ):
                break
        else:
            return False
        layout[name] = place
        others.append((x, y, keepout + margin))
    generator.layout = layout
    return True


def _renders(env: _Navigation) -> bool:
    task = env.task
    return bool(env.render_parameters.mode is not None or task.observe_vision or task.debug)


@functools.cache
def _world_class() -> type:
    from safety_gymnasium.world import World

    class SkylessWorld(World):  # type: ignore[misc]
        """A world whose model is compiled without the sky's texture, while nothing renders.

        Most of a reset is decoding its six pictures. Physics, sensors and lidar never see them.
        """

        def __init__(self, env: _Navigation) -> None:
            self._env = env
            self._built = False
            super().__init__(env.task.agent, env.task._obstacles)

        def rebuild(self, config: object = None, state: bool = True) -> None:
            # The first build is computed forward once, every later one twice, which gives the
            # solver another start and other last digits. A first reset stays a first one.
            if self._built:
                super().rebuild(config, state)
                return
            self.parse(config)
            self.build()
            self._built = True

        # `build` writes the model's text here and compiles what it then reads.
        @property
        def xml_string(self) -> str | None:
            return self._text

        @xml_string.setter
        def xml_string(self, text: str | None) -> None:
            self._text = text if text is None or _renders(self._env) else _SKY.sub("", text)

    return SkylessWorld
