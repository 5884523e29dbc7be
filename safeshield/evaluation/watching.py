"""One shielded episode as a film: the environment beside the shield's values and actions.

The command ``safeshield watch`` calls `watch` and saves what it returns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.evaluation.episodes import ShieldLike
from safeshield.files.atomic import written_whole
from safeshield.files.schema import whole
from safeshield.rollouts.copies import check_env, check_step, environment_name, is_vector_env
from safeshield.rollouts.infos import (
    CERTIFIED,
    EXECUTED,
    INTERVENED,
    PROPOSED,
    SAFE_SET,
    THRESHOLD,
    VALUE,
    violates,
)
from safeshield.rollouts.policies import (
    as_batch_policy,
    default_name,
    executable_actions,
    start_wave,
    torch_seeded,
)
from safeshield.shield.nested import refuse_shielded
from safeshield.shield.runtime import ShieldRuntime
from safeshield.shield.shield import Shield, as_shield
from safeshield.spaces.batches import batch_of_one, copied
from safeshield.spaces.generic import Env
from safeshield.spaces.shapes import Actions, Flags, Scalars

Frame = npt.NDArray[np.uint8]

FORMATS = (".mp4", ".gif")
"""Endings of the files that `WatchedEpisode.save` writes."""
_MOST_RESETS = 1000
_MOST_ACTIONS = 3
"""Number of entries of an action that are drawn."""
_LEAST_DELAY = 20
"""Shortest time in ms that viewers show one frame of a GIF; they slow shorter ones down."""
_WIDTH, _TOP = 1.3, 360
"""Width of the curves as a share of the height, and the height for which fonts are chosen."""
EDGE = (230, 25, 35)
"""Colour of the edge around a frame whose action was replaced."""


@dataclass(frozen=True, eq=False)
class WatchedEpisode:
    """One shielded episode of L steps with its frames. Row t belongs to the state s[t].

    Values are those of the shield's infos, in units of h.
    """

    environment: str
    """Id of the environment, or the name of its class."""
    policy: str
    """Name of the policy that proposed the actions."""
    seed: int
    """Seed of the start and of the noise."""
    certified: bool
    """Whether the episode began certified: ``info["shield/certified"]`` at its start."""
    promised: tuple[str, ...]
    """Names of the policies of the shield's record, for which alone its promise holds."""
    violated: bool
    """Whether the environment reported h > 0, or a cost above 0, of any state."""
    fps: float
    """Frames per second by which the environment asks to be shown; 30 where it does not say."""
    frames: tuple[Frame, ...] = field(repr=False)
    """L + 1 frames of s[0] to s[L], (height, width, 3)."""
    state_value: Scalars = field(repr=False)
    """(L + 1,) V_h of s[0] to s[L]; infinite where an observation is not readable."""
    value: Scalars = field(repr=False)
    """(L,) Q_h of the executed actions: ``info["shield/value"]``."""
    threshold: Scalars = field(repr=False)
    """(L + 1,) the number that the value must not exceed: ``info["shield/threshold"]``. Row t + 1
    came with the info of the step from s[t]."""
    proposed: Actions = field(repr=False)
    """(L, act) the actions that the policy proposed, as rows."""
    executed: Actions = field(repr=False)
    """(L, act) the actions that the environment executed, as rows."""
    intervened: Flags = field(repr=False)
    """(L,) whether the executed action is a replacement."""

    def __len__(self) -> int:
        return len(self.value)

    def summary(self) -> str:
        """Return in words what is seen in the film."""
        ended = "the environment reported a violation" if self.violated else "no violation reported"
        if not self.promised:
            promise = "The shield has no record and promises nothing."
        else:
            began = "began certified" if self.certified else "did not begin certified"
            names = ", ".join(f"'{name}'" for name in self.promised)
            promise = f"The episode {began}; the shield's promise is about {names} alone."
        return (
            f"{len(self)} steps of {self.environment} with the policy '{self.policy}', seed "
            f"{self.seed}: {int(self.intervened.sum())} actions replaced, {ended}. {promise}"
        )

    def pictures(self) -> Iterator[Frame]:
        """Yield the L + 1 pictures of the film, (height, width, 3), with even height and width.

        Picture t shows s[t] and the curves up to it, with the action that was executed there. A red
        edge surrounds the frame where that action is a replacement.
        """
        from safeshield.evaluation.watching_curves import Curves

        height = self.frames[0].shape[0]
        curves = Curves(self, height, round(_WIDTH * height), _TOP, _MOST_ACTIONS)
        for t, frame in enumerate(self.frames):
            shown = np.array(frame)
            if t < len(self) and self.intervened[t]:
                edge = max(1, round(min(shown.shape[:2]) / 100))
                shown[:edge] = shown[-edge:] = shown[:, :edge] = shown[:, -edge:] = EDGE
            joined = np.concatenate([shown, curves.until(t)], axis=1)
            # The codec of MP4 files halves the colours' resolution, so it needs even numbers.
            odd = [(0, size % 2) for size in joined.shape[:2]]
            yield np.pad(joined, [*odd, (0, 0)], mode="edge")

    def save(self, path: str | os.PathLike[str], *, fps: float | None = None) -> None:
        """Write the film, one picture for each state.

        Args:
            path: File to write. A ``.gif`` needs no further package and is shown at 50 frames per
                second at most; in it, successive pictures that are equal are one frame of longer
                duration. An ``.mp4`` is smaller.
            fps: Frames per second; None: `fps` of the episode.

        Raises:
            ValueError: The suffix is another one, or `fps` is not a positive number.
            ImportError: An .mp4 is asked for, and the extra `video` is not installed.
            OSError: `path` cannot be written.
        """
        path = Path(path)
        rate = self.fps if fps is None else fps
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"fps must be finite and above 0, got {rate}")
        check_format(path)
        with written_whole(path) as part:
            if path.suffix.lower() == ".gif":
                _write_gif(part, self, rate)
            else:
                _write_mp4(part, self.pictures(), rate)


def check_format(path: Path) -> None:
    """Check that a film can be written in the format that the ending of `path` names.

    Raises:
        ValueError: The ending is not one of `FORMATS`.
        ImportError: It is .mp4, and the extra `video` is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"path must end in {' or '.join(FORMATS)}, got '{path}'")
    if suffix == ".mp4":
        _ffmpeg()


def watch(
    shield: ShieldLike,
    env: Env,
    policy: object = "random",
    *,
    steps: int | None = None,
    seed: int = 0,
    deterministic: bool = False,
    height: int = 360,
    policy_name: str | None = None,
) -> WatchedEpisode:
    """Play one shielded episode and return it with its frames and the shield's judgements.

    The environment is reset until the start has V_h <= -delta. The first reset uses the seed.

    Args:
        shield: The shield, a path to its file, ``"builtin:NAME"`` or an agent with a shield.
        env: The environment with ``render_mode="rgb_array"``, without a shield around it.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes.
        steps: Number of steps after which the film ends; None: it ends with the episode.
        seed: Seed of the start and of the noise.
        deterministic: The `deterministic` with which a policy's ``predict`` is called. Choose what
            will be deployed.
        height: Height of the film in pixels. Frames are scaled to it and kept in memory.
        policy_name: Name of the policy in the film.

    Raises:
        ValueError: The environment makes no frames, is shielded or a vector environment, its spaces
            are not the shield's, none of 1,000 starts has V_h <= -delta, or an argument is out of
            range.
        TypeError: `env` is not an environment.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.evaluation import watch
    >>> env = gymnasium.make("safeshield/Boat-v0", render_mode="rgb_array")
    >>> film = watch("builtin:boat", env, "random", steps=5, seed=1, height=120)
    >>> len(film), len(film.frames), film.frames[0].shape
    (5, 6, (120, 150, 3))
    >>> film.save("boat.gif")  # doctest: +SKIP
    """
    steps = None if steps is None else whole("steps", steps, least=1)
    seed = whole("seed", seed, least=0)
    if height < 32:
        raise ValueError(f"height must be at least 32 pixels, got {height}")
    check_env(env)
    if is_vector_env(env):
        raise ValueError("env must be a single environment, got a VectorEnv; pass gymnasium.make()")
    if env.render_mode != "rgb_array":
        raise ValueError(
            f"env must make frames, but its render_mode is {env.render_mode!r}: make it with "
            'gymnasium.make(id, render_mode="rgb_array")'
        )
    refuse_shielded(env, "pass the plain environment")
    judge = as_shield(shield)
    acting = as_batch_policy(policy, env.action_space, deterministic=deterministic)
    shielded = _Shielded(env, judge)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    with torch_seeded(seed):
        observation, info = _certified_start(shielded, seed)
        start_wave(acting, 1)
        infos = [info]
        values, frames = [shielded.runtime.values], [_frame(env, height)]
        over = False
        while not over and (steps is None or len(infos) <= steps):
            proposed = acting(copied(batch_of_one(observation)), rng)
            action = executable_actions(proposed, env.action_space, 1)[0]
            observation, over, info = shielded.step(action)
            infos.append(info)
            values.append(shielded.runtime.values)
            frames.append(_frame(env, height))
    taken = infos[1:]
    record = judge.record
    rate = env.metadata.get("render_fps")
    return WatchedEpisode(
        environment=environment_name(env),
        policy=policy_name or default_name(policy),
        seed=seed,
        certified=bool(infos[0][CERTIFIED]),
        promised=() if record is None else tuple(one.policy for one in record.policies),
        violated=any(violates(one) for one in infos),
        fps=float(rate) if rate else 30.0,
        frames=tuple(frames),
        state_value=np.array(values, np.float64),
        value=np.array([one[VALUE] for one in taken], np.float64),
        threshold=np.array([one[THRESHOLD] for one in infos], np.float64),
        proposed=_rows(judge.action_rows, taken, PROPOSED),
        executed=_rows(judge.action_rows, taken, EXECUTED),
        intervened=np.array([one[INTERVENED] for one in taken], np.bool_),
    )


class _Shielded:
    """The steps of an environment behind a shield.

    `wrappers.SafetyShield` takes the same steps, but stands on a higher floor of the package.
    """

    def __init__(self, env: Env, shield: Shield) -> None:
        self._env = env
        self._discrete = isinstance(env.action_space, gym.spaces.Discrete)
        self.runtime = ShieldRuntime.around(env, shield, env.observation_space, env.action_space)

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        runtime = self.runtime
        with runtime.transition:
            observation, info = self._env.reset(seed=seed)
            runtime.observe(observation, (info,), starts=True)
        return observation, {**info, **runtime.start_infos()}

    def step(self, action: npt.ArrayLike) -> tuple[Any, bool, dict[str, Any]]:
        """Return the observation, whether the episode is over, and the info."""
        runtime = self.runtime
        decision = runtime.filter(action)
        sent: Any = decision.executed.copy()
        with runtime.transition:
            result = self._env.step(sent[()] if self._discrete else sent)
            check_step(result)
            observation, _, terminated, truncated, info = result
            reached = runtime.observe(observation, (info,))
            runtime.update()
        infos = {**info, **runtime.step_infos(decision, reached)}
        return observation, bool(terminated or truncated), infos


def _certified_start(env: _Shielded, seed: int) -> tuple[Any, dict[str, Any]]:
    for number in range(_MOST_RESETS):
        observation, info = env.reset(seed if number == 0 else None)
        if info[SAFE_SET]:
            return observation, info
    threshold = env.runtime.shield.threshold
    raise ValueError(
        f"none of {_MOST_RESETS} starts has V_h <= -delta = {threshold:.4g}: this "
        "environment starts outside the set in which the shield acts; is it that of the training?"
    )


def _rows(rows: Any, infos: list[dict[str, Any]], key: str) -> Actions:  # noqa: ANN401
    return np.concatenate([np.array(rows(batch_of_one(one[key]))[0]) for one in infos])


def _frame(env: gym.Env[Any, Any], height: int) -> Frame:
    """Return the frame of the present state, scaled to a height.

    Raises:
        ValueError: The frame is not (height, width, 3) uint8.
    """
    from PIL import Image

    frame = np.asarray(cast(Any, env.render()))
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(
            f"the environment's render() must return frames of shape (height, width, 3), uint8, "
            f"got {frame.shape} {frame.dtype}"
        )
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    if frame.shape[:2] == (height, width):
        return np.array(frame)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


# -- files --------------------------------------------------------------------------------------


def _write_gif(path: Path, episode: WatchedEpisode, fps: float) -> None:
    from PIL import Image

    pictures = list(episode.pictures())
    # All pictures share one palette. What does not move has then the same numbers in all of them,
    # so that a frame holds only what has changed.
    some = pictures[:: max(1, len(pictures) // 6)]
    palette = Image.fromarray(np.concatenate(some)).quantize(128, Image.Quantize.MEDIANCUT)
    drawn = [
        Image.fromarray(one).quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures
    ]
    delay = max(_LEAST_DELAY, 10 * round(100.0 / fps))  # In hundredths of a second, as in the file.
    drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=delay, loop=0
    )


def _write_mp4(path: Path, pictures: Iterator[Frame], fps: float) -> None:
    first = next(pictures)
    size = (first.shape[1], first.shape[0])
    # The temporary file's name does not end in .mp4, by which ffmpeg would know the format.
    writer = _ffmpeg().write_frames(
        os.fspath(path), size, fps=fps, macro_block_size=2, output_params=["-f", "mp4"]
    )
    writer.send(None)
    try:
        writer.send(np.ascontiguousarray(first))
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
    finally:
        writer.close()


def _ffmpeg() -> Any:  # noqa: ANN401 - a module without types
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            "an .mp4 needs ffmpeg, which imageio-ffmpeg contains: run pip install "
            '"safeshield[video]", or write a .gif, which needs nothing more'
        ) from error
    return imageio_ffmpeg
