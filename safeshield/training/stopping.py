"""Ctrl-C and SIGTERM: a run ends at its next safe point, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal has ended a run. Code that handles Ctrl-C handles it as well.

    Args:
        text: What the run has left, in words.
        number: Number of the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


class StopRequest:
    """Notes Ctrl-C and SIGTERM while it is open, so that a run can end at its next safe point.

    A second signal ends the run at once. Signals that the program handles itself are left alone, as
    are those that arrive in another thread than the main one.

    Args:
        wanted: Whether the run has a safe point. Where it is False, this has no effect.

    Attributes:
        number: Number of the signal that has arrived; None before.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.number: int | None = None
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Return the request."""
        own = (signal.default_int_handler, signal.SIG_DFL, terminated)
        for number in _SIGNALS if self._wanted else ():
            if signal.getsignal(number) in own:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.number is not None:
            terminated(self.number, None)  # It came after the last safe point.

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            terminated(number, frame)
        self.number = number
        if os.getpid() != self._process:  # A forked worker, which has no safe point of its own.
            terminated(number, frame)


def terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Raise `Stopped`: a handler of signals, by which SIGTERM ends a program as Ctrl-C does."""
    raise Stopped("", number)
