"""Temporary patches under which the environments of other packages can be imported and made.

Each context manager makes one change while it is open and afterwards restores the previous state
exactly.

The changes are visible in the whole process (a decorator, a table, a stream). Only one thread at a
time may be inside, so callers must hold `LOCK`. Other threads continue to run, and each docstring
states the effect that they could notice.
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
"""Lock to hold while a context manager of this module is open; it is re-entrant."""


@contextmanager
def array_defaults(package: str) -> Iterator[None]:
    """Let the dataclasses of `package` have arrays as defaults, which Python 3.11 refuses.

    `package` is a package's name; the patch applies to its modules and to those of its subpackages.

    A default such as ``color: np.ndarray = COLOR["goal"]`` becomes a default factory that copies
    the array, so that each instance has an array of its own. The patch applies to modules that are
    imported inside the context. Afterwards `dataclasses.dataclass` is the original again, also in
    those modules. Dataclasses of other packages that other threads import meanwhile are made by the
    original decorator.

    >>> with array_defaults(__name__):
    ...     @dataclasses.dataclass
    ...     class Goal:
    ...         color: np.ndarray = np.ones(4)
    >>> Goal().color is Goal().color
    False
    """
    original = dataclasses.dataclass

    # The replacement keeps the name and the docstring of the original.
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
        # Modules imported inside may hold the replacement (`from dataclasses import dataclass`).
        for name in set(sys.modules) - before:
            contents = getattr(sys.modules[name], "__dict__", {})
            for key in [key for key, value in contents.items() if value is dataclass]:
                contents[key] = original


def _copy_arrays(cls: type) -> None:
    """Replace the array defaults of a future dataclass by default factories that copy."""
    for name, annotation in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name)
        if isinstance(default, np.ndarray) and not _is_class_variable(annotation):
            field = dataclasses.field(default_factory=functools.partial(copy.copy, default))
            setattr(cls, name, field)


def _is_class_variable(annotation: object) -> bool:
    # Under `from __future__ import annotations` an annotation is a string.
    text = annotation if isinstance(annotation, str) else ""
    kind = get_origin(annotation) or annotation
    return kind is ClassVar or text.removeprefix("typing.").startswith("ClassVar")


@contextmanager
def registry_kept(ids: Collection[str]) -> Iterator[dict[str, registration.EnvSpec]]:
    """Let a package register `ids`, and restore the previous registrations of them afterwards.

    The ids are not registered when the context is entered, because Gymnasium warns of every
    replacement. A thread that makes one of them meanwhile gets the error that the id does not
    exist.

    Args:
        ids: Ids of environments that the package will register.

    Yields:
        A dict of specs by id, with the previous specs. When the context is left, the specs that the
        package has registered are added to it and replace those of the same ids.
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
def streams_with_files() -> Iterator[None]:
    """Give ``sys.stdout`` and ``sys.stderr`` a file descriptor where they have none.

    PyBullet's environments duplicate the descriptors of both streams and flush the C stream of the
    same name. The streams of notebooks, test runners and servers have neither a descriptor nor such
    a name. Text that is printed to such a stream inside the context is discarded.
    """
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if not _has_file(stream):
                # A file opened by its descriptor has no name that PyBullet could take for that of a
                # C stream.
                null = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
                stack.enter_context(redirect(stack.enter_context(null)))
        yield


def _has_file(stream: Any) -> bool:  # noqa: ANN401 - an object of any kind
    try:
        stream.fileno()
        return isinstance(stream.name, int) or stream.name in ("<stdout>", "<stderr>")
    except (AttributeError, ValueError, OSError):
        return False


class Draws:
    """Random streams that can temporarily replace NumPy's and Python's global ones.

    Another thread that draws from the global generators during a replacement draws from these
    streams.

    Args:
        seed: Seed of both streams. Streams of the same seed are equal.
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.RandomState(np.random.MT19937(seed))
        self._states = generator.get_state(), random.Random(seed).getstate()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use these streams inside the context, and restore the global ones afterwards.

        The streams continue where the last use ended.
        """
        with LOCK:
            outer = _global_states()
            try:
                _set_global_states(self._states)
                yield
            finally:
                self._states = _global_states()
                _set_global_states(outer)


# Older packages draw from NumPy's legacy global generator, so these functions must access it.
def _global_states() -> tuple[Any, Any]:
    return np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_global_states(states: tuple[Any, Any]) -> None:
    np.random.set_state(states[0])  # noqa: NPY002
    random.setstate(states[1])
