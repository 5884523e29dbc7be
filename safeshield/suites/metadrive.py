"""DSRL's nine MetaDrive tasks on the simulator metadrive-simulator 0.4.3, without a window.

DSRL's own environments need a fork of 2022 whose observations have 261 numbers. The observations
here have 259 numbers, so logs of one simulator do not fit the other. The 3-d assets that MetaDrive
downloads at its first start are needed only for rendering and are not downloaded.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.spaces.generic import Env
from safeshield.suites.constraints import LIDAR_LIMIT, SPEED_LIMIT, Simulator, with_constraint
from safeshield.suites.packages import Suite, broken, require
from safeshield.suites.registration import register

HORIZON = 1000
"""Largest number of steps of an episode."""
ROADS = {"easy": ("SCS", 0), "medium": ("XST", 100), "hard": ("TRO", 200)}
"""Blocks of the map (S straight, C curve, X crossing, T junction, R ramp, O roundabout) and the
number of the scenario."""
DENSITIES = {"sparse": 0.1, "mean": 0.15, "dense": 0.2}
"""Number of cars per 10 metres of lane."""
IDM = {"NORMAL_SPEED": 30.0, "ACC_FACTOR": 1.0, "DEACC_FACTOR": -5.0}
"""Parameters of the other cars' drivers: speed, km/h, and factors of acceleration and braking."""

METADATA = {"render_modes": ["rgb_array"], "render_fps": 10, "one_per_process": True}
PICTURE = 500
"""Width and height of a picture in pixels, at five pixels per metre."""

METADRIVE_TASKS = tuple(f"{road}{traffic}" for road in ROADS for traffic in DENSITIES)
"""DSRL's names of the nine tasks."""
METADRIVE_WIDTH = 259
"""Number of entries of an observation."""
METADRIVE_FORK_WIDTH = 261
"""Number of entries of an observation in DSRL's own logs. These were made on the fork, where the
entries have other meanings."""

_RAYS = 240
_FLAGS = ("crash", "out_of_road", "arrive_dest", "max_step")
_IDS = {f"OfflineMetadrive-{name}-v0": name for name in METADRIVE_TASKS}

# A process has one MetaDrive engine. These are the task that holds it and the id of that process.
_holder: weakref.ref[MetaDriveTask] | None = None
_holder_process = 0


def register_metadrive() -> str | None:
    """Register DSRL's nine ids, ``OfflineMetadrive-easysparse-v0`` to ``-harddense-v0``.

    MetaDrive is not loaded.

    Returns:
        None where MetaDrive is installed. Otherwise the error message that making a task raises,
        which names the missing packages and the commands that install them.
    """
    register(_IDS, f"{__name__}:make", dict.fromkeys(_IDS, HORIZON), {})
    try:
        require("MetaDrive", Suite.metadrive)
    except gym.error.DependencyNotInstalled as error:
        return str(error)
    return None


def make(env_id: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Return the task of the id `env_id`, which reports h in ``info["constraint"]``.

    See `with_constraint`. `render_mode` is an argument of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
        ValueError: The render mode is unknown.
    """
    return with_constraint(MetaDriveTask(_IDS[env_id], render_mode))


# `gymnasium.make` reads the render modes from the attribute `metadata` of the entry point.
vars(make).update(metadata=METADATA)


class MetaDriveTask(Env):
    """One of DSRL's nine tasks, in which a car drives through traffic to a destination.

    ========  ===============================================================================
    observes  259 numbers in [0, 1]: 9 of the car (its speed is the fourth: (km/h + 1) / 81), 10
              of the way, 240 distances of the lidar, as shares of 50 m
    acts      steering and throttle or brake, each in [-1, 1]
    cost      1 for a crash or leaving the road (the simulator's), plus
              0.01 max(0, speed - 10), m/s, plus 0.01 max(0, 0.1 - nearest lidar reading)^2
    ends      terminated on arrival, in a crash and off the road; truncated after 1000 steps
    ========  ===============================================================================

    The map of a task is always the same. Traffic is drawn at every reset, from the seed of the
    reset where one is given, and otherwise from the state of the random generator. The same seed
    gives the same trajectory. ``info`` holds cost, its parts velocity_cost and proximity_cost,
    velocity (m/s), crash, out_of_road, arrive_dest, max_step and route_completion (in [0, 1]).

    A process has one MetaDrive engine. A task holds it from its first reset until `close`. Several
    tasks at once need separate processes, as in ``gymnasium.vector.AsyncVectorEnv`` or in
    Stable-Baselines3's ``SubprocVecEnv``. `safeshield.collect` and similar functions use a single
    task.

    Args:
        name: ``"easysparse"`` to ``"harddense"``.
        render_mode: None or ``"rgb_array"``. With the latter `render` returns the road from above,
            a picture (500, 500, 3) of 100 m by 100 m. It is drawn without a display and without
            the 3-d assets.

    Raises:
        ValueError: The name or the render mode is unknown.
        gymnasium.error.DependencyNotInstalled: A package is missing, or (in `reset`) cannot be
            loaded.
        RuntimeError: (in `reset`) another task of this process holds the engine, or held it when
            this process was forked, or the simulator has another version.
        gymnasium.error.ResetNeeded: A step or a picture was requested before the first reset or
            after `close`.
    """

    metadata = METADATA

    def __init__(self, name: str, render_mode: str | None = None) -> None:
        if name not in METADRIVE_TASKS:
            raise ValueError(f"name must be one of {', '.join(METADRIVE_TASKS)}, got {name!r}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(
                "render_mode must be None or 'rgb_array' (the road from above) for a MetaDrive "
                f"task, got {render_mode!r}: it runs without a window and without the 3-d assets, "
                "which MetaDrive downloads by itself when "
                "metadrive.MetaDriveEnv(dict(use_render=True)) is started outside safeshield"
            )
        require(f"the MetaDrive task {name}", Suite.metadrive)
        self.name = name
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (METADRIVE_WIDTH,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._simulator: Simulator = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start an episode; the first one starts the engine.

        `seed` seeds the random traffic; the road follows from the task. `options` are not used. The
        result is the observation and the info.
        """
        super().reset(seed=seed)
        if self._simulator is None:
            self._simulator = _start(self)
        # The simulator does not seed the random traffic; everything else follows the scenario.
        _seed(self._simulator.engine.traffic_manager, int(self.np_random.integers(2**31)))
        observation, info = self._simulator.reset(seed=ROADS[_road(self.name)][1])
        return observation, _told(observation, info)

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Drive for a tenth of a second with `action`, and return Gymnasium's five values."""
        if self._simulator is None:
            raise gym.error.ResetNeeded("cannot step before reset(), nor after close()")
        observation, reward, _, _, info = self._simulator.step(action)
        told = _told(observation, info)
        terminated = told["arrive_dest"] or told["crash"] or told["out_of_road"]
        return observation, float(reward), terminated, told["max_step"] and not terminated, told

    def render(self) -> npt.NDArray[np.uint8] | None:
        """Return the road from above, centred on the car, or None without a render mode."""
        if self.render_mode is None:
            return None
        if self._simulator is None:
            raise gym.error.ResetNeeded("cannot render before reset(), nor after close()")
        picture = self._simulator.render(
            mode="topdown", window=False, screen_size=(PICTURE, PICTURE)
        )
        return np.asarray(picture, dtype=np.uint8)

    def close(self) -> None:
        """Close the engine; a later reset starts it again."""
        global _holder
        if self._simulator is not None:
            self._simulator.close()
            self._simulator, _holder = None, None


def _seed(manager: Simulator, seed: int) -> None:
    from metadrive.base_class.randomizable import Randomizable

    # manager.seed is not used, because the manager of random traffic overrides it to do nothing.
    Randomizable.seed(manager, seed)


def _road(name: str) -> str:
    return next(road for road in ROADS if name.startswith(road))


def _config(name: str) -> dict[str, Any]:
    """Return the simulator's settings for a task, as in dsrl 0.1.0."""
    import logging

    from metadrive.manager.traffic_manager import TrafficMode

    road = _road(name)
    blocks, scenario = ROADS[road]
    return {
        "start_seed": scenario,
        "num_scenarios": 1,
        "map": 3,
        "map_config": {"type": "block_sequence", "config": blocks},
        "traffic_density": DENSITIES[name.removeprefix(road)],
        "traffic_mode": TrafficMode.Hybrid,
        "random_traffic": True,
        "accident_prob": 0.0,
        "crash_vehicle_penalty": 0.0,
        "horizon": HORIZON,
        # Cars that are reused from a buffer keep part of their state from the last episode.
        "force_destroy": True,
        "log_level": logging.ERROR,
    }


def _told(observation: npt.NDArray[np.float32], info: dict[str, Any]) -> dict[str, Any]:
    """Return the info of a state as plain Python values: its cost, the cost's parts and flags."""
    speed = float(info["velocity"])
    fast = 1e-2 * max(0.0, speed - SPEED_LIMIT)
    near = 1e-2 * max(0.0, LIDAR_LIMIT - float(np.min(observation[-_RAYS:]))) ** 2
    return {
        **{key: bool(info[key]) for key in _FLAGS},
        "velocity": speed,
        "route_completion": float(info["route_completion"]),
        "velocity_cost": fast,
        "proximity_cost": near,
        "cost": float(info["cost"]) + fast + near,
    }


def _start(task: MetaDriveTask) -> Simulator:
    """Start the engine for a task, which then holds it, and return the simulator."""
    global _holder, _holder_process
    try:
        from metadrive.engine.engine_utils import close_engine, engine_initialized
        from metadrive.envs import SafeMetaDriveEnv
    except Exception as error:
        raise broken(f"the MetaDrive task {task.name}", error, Suite.metadrive) from error
    if engine_initialized():
        other = _holder() if _holder is not None else None
        if _holder_process != os.getpid() or other is not None or _holder is None:
            whom = "something else" if other is None else f"another task ({other.name})"
            raise RuntimeError(
                f"MetaDrive's engine exists once in a process, and {whom} holds it: close() that "
                "first (before AsyncVectorEnv or SubprocVecEnv forks this process, too); several "
                "tasks at once run in processes of their own, in gymnasium.vector.AsyncVectorEnv "
                "or Stable-Baselines3's SubprocVecEnv"
            )
        close_engine()  # the engine of a task that was deleted without close()
    _check_drivers()
    simulator = SafeMetaDriveEnv(_config(task.name))
    with _without_assets():
        simulator.lazy_init()
    _holder, _holder_process = weakref.ref(task), os.getpid()
    return simulator


def _check_drivers() -> None:
    from metadrive.policy.idm_policy import IDMPolicy

    found = {key: float(getattr(IDMPolicy, key)) for key in IDM}
    if found != IDM:
        raise RuntimeError(
            f"the other cars must drive as in DSRL's tasks ({IDM}), but this version of MetaDrive "
            f"has {found}: install metadrive-simulator==0.4.3"
        )


@contextlib.contextmanager
def _without_assets() -> Iterator[None]:
    """Keep MetaDrive's engine from searching for and downloading its 3-d assets when it starts."""
    from metadrive.engine.base_engine import BaseEngine

    original = BaseEngine.__dict__["try_pull_asset"]
    BaseEngine.try_pull_asset = staticmethod(lambda: None)
    try:
        yield
    finally:
        BaseEngine.try_pull_asset = original
