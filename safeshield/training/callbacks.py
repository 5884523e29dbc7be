"""Callbacks of `fit`: functions of the user that are called while an agent is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from safeshield.files.schema import whole
from safeshield.files.settings import KindError, check

if TYPE_CHECKING:
    from safeshield.training.agent import Learner


class StepMetrics(dict[str, float]):
    """Metrics of one update by name. The error for an unknown name lists the known ones.

    Args:
        phase: Name of the phase, for the error.
        values: The metrics.

    >>> StepMetrics("student", {"student/loss": 0.5})["actor/loss"]
    Traceback (most recent call last):
    ...
    KeyError: "the phase 'student' has no metric 'actor/loss', its metrics are ['student/loss']"
    """

    def __init__(self, phase: str, values: Mapping[str, float]) -> None:
        super().__init__(values)
        self._phase = phase

    def __missing__(self, name: object) -> float:
        known = f"its metrics are {sorted(self)}" if self else "and no metrics before an update"
        raise KeyError(f"the phase '{self._phase}' has no metric {name!r:.60}, {known}")


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """The state of a training at one update, as a callback receives it.

    `metrics` and `agent` are computed when they are first read. The record refers to all weights of
    the training, so a callback should keep the numbers that it needs and not the record.
    """

    phase: str
    """Name of the phase of this update."""
    step: int
    """Number of updates made so far, those before a checkpoint included."""
    steps: int
    """Number of updates of the whole training."""
    _measure: Callable[[], Mapping[str, float]] = field(repr=False)
    _agent: Callable[[], Learner[Any, Any]] = field(repr=False)
    _write: Callable[[Mapping[str, float], int], None] = field(repr=False)

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of this update by name; empty before the first update.

        Each phase has metrics of its own. The KeyError for another name lists them. Reading them
        waits for the device on which the agent is trained.
        """
        return StepMetrics(self.phase, self._measure())

    @cached_property
    def agent(self) -> Learner[Any, Any]:
        """An agent with the present weights, which can play and be saved.

        It is separate from the agent that is being trained and draws its own noise.
        """
        return self._agent()

    def log(self, values: Mapping[str, float]) -> None:
        """Write numbers by name to the TensorBoard files of `fit`; without them this does nothing.

        Args:
            values: Finite numbers by name, such as ``{"play/return": 31.5}``.

        Raises:
            KindError: The values are not such a mapping, also where no files are written. A
                KindError is a TypeError and a ValueError.
        """
        given = cast(object, values)
        if not isinstance(given, Mapping):
            raise KindError(
                "step.log needs numbers by name, such as {'play/return': 31.5}, got "
                f"{type(given).__name__}"
            )
        checked = {
            check("each name of step.log", str, name): check(
                f"the value '{name}' of step.log", float, value
            )
            for name, value in given.items()
        }
        self._write(checked, self.step)


class TrainingCallback:
    """Base class of callbacks: ``agent.fit(log, callbacks=[...])``.

    Derive from it and override the methods that you need. Where `on_step` or `on_phase` returns
    False, as in Stable-Baselines3, training stops after this update; True and None continue it, and
    any other value is an error. `on_start` cannot stop the training: False is an error there.
    Callbacks are not part of what a checkpoint stores or compares, and they do not change the
    weights: a training that no callback stops ends with the same weights as one without callbacks.

    >>> class Stop(TrainingCallback):
    ...     every = 500
    ...     def on_step(self, step):
    ...         return step.phase != "student" or step.metrics["student/distance_to_teacher"] > 0.01
    """

    every: int = 1000
    """Number of updates between two calls of `on_step`."""

    def writes(self) -> Mapping[str, Path]:
        """Return the files that the callback writes, by the names of its arguments.

        `fit` refuses two equal files, also the checkpoint, before training begins.
        """
        return {}

    def on_start(self, step: TrainingStep) -> None:
        """Begin a training, or continue one from a checkpoint.

        Args:
            step: State before the first update of this call of `fit`. ``step.step`` is above 0
                where a checkpoint was read.
        """

    def on_step(self, step: TrainingStep) -> bool | None:
        """Return False to stop the training. Called after every `every`-th update.

        Args:
            step: State after the update.
        """
        return None

    def on_phase(self, step: TrainingStep) -> bool | None:
        """Return False to stop the training. Called after the last update of each phase.

        Args:
            step: State after the update, whose weights are finite.
        """
        return None

    def on_end(self, step: TrainingStep) -> None:
        """Finish. Called once, when all updates were made or a callback has stopped the training.

        It is not called where `stop_after` interrupts a training that is to be continued.

        Args:
            step: State after the last update.
        """


def checked_callbacks(callbacks: Sequence[TrainingCallback]) -> tuple[TrainingCallback, ...]:
    """Return callbacks as a tuple.

    Raises:
        TypeError: `callbacks` is not a sequence of `TrainingCallback`s, or an interval is not a
            whole number.
        ValueError: An interval is below 1, or an object occurs twice.
    """
    given = cast(object, callbacks)
    if not isinstance(given, list | tuple):
        raise TypeError(
            f"callbacks must be a list of TrainingCallback objects, got {type(given).__name__}; "
            "write callbacks=[...]"
        )
    for one in given:
        if not isinstance(one, TrainingCallback):
            raise TypeError(
                f"each of callbacks must be a TrainingCallback, got {type(one).__name__}; derive "
                "its class from safeshield.TrainingCallback"
            )
        whole(f"every of the callback {type(one).__name__}", one.every, least=1)
        if sum(one is other for other in given) > 1:
            raise ValueError(
                f"callbacks must be different objects, got the same {type(one).__name__} twice; "
                "make a second one, or pass it once"
            )
    return tuple(given)


def check_different_files(
    callbacks: Sequence[TrainingCallback], checkpoint: Path | None = None
) -> None:
    """Check that no two of the checkpoint and the files of callbacks are the same file.

    Raises:
        ValueError: Two are the same, also where one is a symbolic link to the other.
    """
    files = [] if checkpoint is None else [("checkpoint", checkpoint)]
    for at, one in enumerate(callbacks):
        owner = f"of callbacks[{at}] ({type(one).__name__})"
        files += [(f"{name} {owner}", path) for name, path in one.writes().items()]
    users: dict[Path, str] = {}
    for user, path in files:
        other = users.setdefault(Path(os.path.realpath(path)), user)
        if other != user:
            raise ValueError(
                f"{other} and {user} must be different files, got {path} for both, so that one "
                "would replace the other; give them different names"
            )


def goes_on(
    callback: TrainingCallback,
    method: Literal["on_start", "on_step", "on_phase"],
    step: TrainingStep,
) -> bool:
    """Call a method of a callback and return whether the training goes on.

    Raises:
        KindError: The method returned something other than None, True and False, or `on_start`
            returned False. A KindError is a TypeError and a ValueError.
    """
    answer: object = getattr(callback, method)(step)
    if answer is None or (isinstance(answer, bool | np.bool_) and answer):
        return True
    name = f"{type(callback).__name__}.{method}"
    if method == "on_start":
        raise KindError(
            f"{name} must return None or True, because it cannot stop the training, got "
            f"{answer!r:.60}; return False from on_step or on_phase"
        )
    if not isinstance(answer, bool | np.bool_):
        raise KindError(
            f"{name} must return False to stop the training, or None or True to continue it, got "
            f"{answer!r:.60}; return a bool, such as bool(value)"
        )
    return False
