"""What other packages' environments need to be imported and made today, and for no longer.

Each context manager mends one thing while it is open, and puts back exactly what it found.

They change what the whole process sees (a decorator, a table, an environment variable, a stream),
so only one thread at a time may be inside: hold `LOCK`. Other threads go on: what they could notice
is said at each.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import random
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, ClassVar, get_origin

import numpy as np
from gymnasium.envs import registration

LOCK = threading.RLock()
"""Held while anything below is open; a thread may take it again."""


@contextmanager
def array_defaults(package: str) -> Iterator[None]:
    """Let the dataclasses of `package` have arrays as defaults, which Python 3.11 refuses.

    ``color: np.ndarray = COLOR["goal"]`` becomes a default factory that copies: each instance has
    an array of its own. It holds for modules imported inside; afterwards `dataclasses.dataclass`
    is the original again, also in those modules. Dataclasses of other packages, imported by other
    threads meanwhile, are made by the original.

    >>> with array_defaults(__name__):
    ...     @dataclasses.dataclass
    ...     class Goal:
    ...         color: np.ndarray = np.ones(4)
    >>> Goal().color is Goal().color
    False
    """
    original = dataclasses.dataclass

    # Its own name and text for whoever looks at it from inside.
    @functools.wraps(original)
    def dataclass(cls: type | None = None, /, **options: Any) -> Any:  # noqa: ANN401 - as it is
        if cls is None:
            return lambda decorated: dataclass(decorated, **options)
        if f"{cls.__module__}.".startswith(f"{package}."):
            _copy_arrays(cls)
        return original(cls, **options)

    before = set(sys.modules)
    dataclasses.dataclass = dataclass
    try:
        yield
    finally:
        dataclasses.dataclass = original
        # `from dataclasses import dataclass` has left the other one in what was imported inside.
        for name in set(sys.modules) - before:
            contents = getattr(sys.modules[name], "__dict__", {})
            for key in [key for key, value in contents.items() if value is dataclass]:
                contents[key] = original


def _copy_arrays(cls: type) -> None:
    """Turn the array defaults of a class that becomes a dataclass into factories."""
    for name, annotation in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name)
        if isinstance(default, np.ndarray) and not _is_class_variable(annotation):
            field = dataclasses.field(default_factory=functools.partial(copy.copy, default))
            setattr(cls, name, field)


def _is_class_variable(annotation: object) -> bool:
    # Under `from __future__ import annotations` it is a text.
    text = annotation if isinstance(annotation, str) else ""
    kind = get_origin(annotation) or annotation
    return kind is ClassVar or text.removeprefix("typing.").startswith("ClassVar")


@contextmanager
def registry_kept(ids: Collection[str]) -> Iterator[dict[str, registration.EnvSpec]]:
    """Let a package register `ids` without replacing what is registered under them.

    Yields what stood there, and at the end also what the package has put there: the last one of
    each id. Inside, the ids are free, because Gymnasium warns at every replacement; a thread that
    makes one of them in this moment is told that there is none.
    """
    registry = registration.registry
    before = {one: registry.pop(one) for one in ids if one in registry}
    seen = dict(before)
    try:
        yield seen
    finally:
        seen.update({one: registry.pop(one) for one in ids if one in registry})
        registry.update(before)


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the process; processes started by other threads meanwhile inherit it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def streams_with_files() -> Iterator[None]:
    """Give ``sys.stdout`` and ``sys.stderr`` a file descriptor where they have none.

    PyBullet's environments duplicate the descriptors of both and flush the C stream of their name;
    notebooks, test runners and servers put streams there that have neither. What is printed to
    such a stream inside is dropped.
    """
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if not _has_file(stream):
                # By its number: such a file has no name that could be taken for a C stream's.
                null = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
                stack.enter_context(redirect(stack.enter_context(null)))
        yield


def _has_file(stream: Any) -> bool:  # noqa: ANN401 - whatever somebody has put there
    try:
        stream.fileno()
        return isinstance(stream.name, int) or stream.name in ("<stdout>", "<stderr>")
    except (AttributeError, ValueError, OSError):
        return False


class Draws:
    """Streams of random numbers that take the place of NumPy's and Python's global ones.

    A second thread that draws from the global generators while these are in their place draws from
    these. Two streams of the same seed are the same.
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.RandomState(np.random.MT19937(seed))
        self._states = generator.get_state(), random.Random(seed).getstate()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Draw from these inside, on from where they are; the global ones stay as they were."""
        with LOCK:
            outer = _global_states()
            try:
                _set_global_states(self._states)
                yield
            finally:
                self._states = _global_states()
                _set_global_states(outer)


# What packages of before 2020 draw from; to swap it one has to touch it.
def _global_states() -> tuple[Any, Any]:
    return np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_global_states(states: tuple[Any, Any]) -> None:
    np.random.set_state(states[0])  # noqa: NPY002
    random.setstate(states[1])
