"""Safety-Gymnasium's environments, under every id that it registers, on Python 3.11 and later.

A step of ``SafetyPointGoal1Gymnasium-v0`` returns Gymnasium's five values with ``info["cost"]``. A
step of the native ``SafetyPointGoal1-v0`` returns six (`safeshield.wrappers.CostFromStep` converts
them to five). Navigation tasks without rendering reset without decoding the pictures of the sky.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from typing import Any

import gymnasium as gym
import numpy as np

from safeshield.spaces.generic import Env
from safeshield.suites import compat
from safeshield.suites.packages import Suite
from safeshield.suites.registration import Remade, Upstream, register, remember_how

METADATA = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 30}

_ROBOTS = ("Point", "Car", "Doggo", "Racecar", "Ant")
_WITH_KEYBOARD = ("Point", "Car", "Racecar")
_NAVIGATION = (*(f"{task}{n}" for task in ("Button", "Push", "Goal", "Circle") for n in range(3)),
               "Run0")  # fmt: skip
_RUNNERS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")
_SKY = re.compile(r'<texture\b[^>]*\btype="skybox"[^>]*?(?:/>|>\s*</texture>)')


def native_ids() -> tuple[str, ...]:
    """Return the ids of environments whose steps return six values, the cost as the third.

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
    """Return the id of the environment `native_id` with steps of Gymnasium's five values.

    >>> five_values_id("SafetyPointGoal1-v0")
    'SafetyPointGoal1Gymnasium-v0'
    """
    name, version = native_id.rsplit("-", 1)
    return f"{name}Gymnasium-{version}"


def native_id(env_id: str) -> str:
    """Return the id of the environment `env_id` with steps of six values."""
    name, version = env_id.rsplit("-", 1)
    return f"{name.removesuffix('Gymnasium')}-{version}"


_NATIVE = native_ids()
_ALL = (*_NATIVE, *map(five_values_id, _NATIVE))
UPSTREAM = Upstream(
    Suite.safety_gymnasium,
    "safety_gymnasium",
    _ALL,
    # Safety-Gymnasium's own `make` would import these later, after the patches have ended.
    ("safety_gymnasium", "safety_gymnasium.builder", "safety_gymnasium.tasks"),
    functools.partial(compat.array_defaults, "safety_gymnasium"),
)


def register_envs() -> None:
    """Register Safety-Gymnasium's ids; without the package, making one raises an error."""
    UPSTREAM.load_if_installed()
    register(_NATIVE, f"{__name__}:make_native", {}, UPSTREAM.specs)
    register(map(five_values_id, _NATIVE), f"{__name__}:make", {}, UPSTREAM.specs)


def make(env_id: str, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return the environment of an id "...Gymnasium-v0", without Gymnasium's outer wrappers.

    `env_id` is the id, and `kwargs` are arguments of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
        RuntimeError: (in `render`, and in `reset` where an observation is a picture) there is no
            display, and MUJOCO_GL does not name a library that works without one.
    """
    base, defaults = UPSTREAM.class_of(native_id(env_id), env_id)
    env: Env = mended(base, five_values=True)(**{**defaults, **kwargs})
    return remember_how(env, make, env_id, kwargs)


def make_native(env_id: str, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return the environment of a native id, without Gymnasium's outer wrappers.

    `env_id` is the id, and `kwargs` are arguments of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
    """
    base, defaults = UPSTREAM.class_of(env_id, env_id)
    env: Env = mended(base, five_values=False)(**{**defaults, **kwargs})
    return remember_how(env, make_native, env_id, kwargs)


# `gymnasium.make` reads the render modes from the entry point's `metadata`, and with these it
# offers "rgb_array_list" too.
vars(make).update(metadata=METADATA)
vars(make_native).update(metadata=METADATA)


@functools.cache
def mended(base: Any, *, five_values: bool) -> Any:  # noqa: ANN401 - a class of theirs
    """Return a subclass of an environment's class with the corrections of the classes below.

    `base` is the class. With `five_values`, its steps return Gymnasium's five values.
    """
    from safety_gymnasium.builder import Builder

    parts: list[type] = [_FiveValues] if five_values else []
    if issubclass(base, Builder):
        parts.append(_Navigation)
    return type(base.__name__, (*parts, _Drawn, base), {"__doc__": base.__doc__})


class _Drawn(Remade):
    """An environment that raises an error where rendering would abort the process."""

    def render(self) -> Any:  # noqa: ANN401 - a picture, or nothing
        check_display(str(self.render_mode))
        return super().render()


def check_display(mode: str) -> None:
    """Raise RuntimeError where MuJoCo cannot draw in the render mode `mode`.

    Without a display MuJoCo's drawing would fail partway, and the process would abort when the next
    model is made.
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
            "environment variable MUJOCO_GL=egl (drawing by a graphics driver) or osmesa (drawing "
            "by the processor, with the system's library OSMesa) before Python starts"
        )


class _FiveValues(Env):
    """An environment whose step returns five values, with the cost in ``info["cost"]``."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        result: tuple[Any, ...] = super().step(action)
        observation, reward, cost, terminated, truncated, info = result
        return observation, reward, terminated, truncated, {**info, "cost": cost}


class _Navigation(Env):
    """A navigation task that resets faster.

    Where nothing is rendered, its model is compiled without the sky, and layouts are drawn quickly.
    """

    task: Any
    render_parameters: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the base's own
        super().__init__(*args, **kwargs)
        generator = self.task.random_generator
        generator.sample_layout = functools.partial(_sample_layout, generator)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        # The base class does not seed Gymnasium's generator, which Gymnasium's check_env requires.
        gym.Env.reset(self, seed=seed)
        if self.task.observe_vision:
            check_display("rgb_array")
        if self.task.world is None and not _renders(self):
            self.task.world = _world_class()(self)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        # The base class calls np.array(action, copy=False), which NumPy 2 refuses for a list.
        return super().step(np.asarray(action))


def _sample_layout(generator: Any) -> bool:  # noqa: ANN401 - a RandomGenerator of theirs
    """Draw a layout with the same draws and results as `RandomGenerator.sample_layout`.

    Tasks with buttons draw tens of thousands of places for one layout. The original compares each
    place with the others by five NumPy calls on two numbers. This function compares floats.
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
        """A world whose model is compiled without the sky's texture where nothing is rendered.

        A reset spends most of its time on decoding the sky's six pictures, which have no effect on
        physics, sensors and lidar.
        """

        def __init__(self, env: _Navigation) -> None:
            self._env = env
            self._built = False
            super().__init__(env.task.agent, env.task._obstacles)

        def rebuild(self, config: object = None, state: bool = True) -> None:
            # In the original, forward dynamics run once after the first build and twice after every
            # later build. The second run changes the solver's start and thereby the last digits of
            # the results. So the first reset here must be a first build as well.
            if self._built:
                super().rebuild(config, state)
                return
            self.parse(config)
            self.build()
            self._built = True

        # `build` assigns the model's text to this property and compiles the text that it returns.
        @property
        def xml_string(self) -> str | None:
            return self._text

        @xml_string.setter
        def xml_string(self, text: str | None) -> None:
            self._text = text if text is None or _renders(self._env) else _SKY.sub("", text)

    return SkylessWorld
