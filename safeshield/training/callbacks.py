"""Callbacks of `fit`: functions of the user that are called while an agent is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from safeshield.files.schema import whole

if TYPE_CHECKING:
    from safeshield.training.agent import Learner


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

        Reading them waits for the device on which the agent is trained.
        """
        return self._measure()

    @cached_property
    def agent(self) -> Learner[Any, Any]:
        """An agent with the present weights, which can play and be saved.

        It is separate from the agent that is being trained and draws its own noise.
        """
        return self._agent()

    def log(self, values: Mapping[str, float]) -> None:
        """Write numbers by name to the TensorBoard files of `fit`; without them this does nothing.

        Args:
            values: Numbers by name, such as ``{"play/return": 31.5}``.
        """
        self._write(values, self.step)


class TrainingCallback:
    """Base class of callbacks: ``agent.fit(log, callbacks=[...])``.

    Derive from it and override the methods that you need. Where `on_step` or `on_phase` returns
    False, as in Stable-Baselines3, training stops after this update; True and None continue it.
    Callbacks are not part of what a checkpoint stores or compares, and they do not change the
    weights: a training that no callback stops ends with the same weights as one without callbacks.

    >>> class Stop(TrainingCallback):
    ...     every = 500
    ...     def on_step(self, step):
    ...         return step.metrics["actor/error"] > 0.01
    """

    every: int = 1000
    """Number of updates between two calls of `on_step`."""

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
        ValueError: An interval is below 1.
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
    return tuple(given)


def go_on(answers: Sequence[bool | None]) -> bool:
    """Return whether no callback has returned False.

    >>> go_on([None, True]), go_on([None, False])
    (True, False)
    """
    return all(answer is None or bool(answer) for answer in answers)
