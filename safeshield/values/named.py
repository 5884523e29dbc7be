"""Functions of observations that a file knows by name, and the registries that hold them.

A file stores the name of such a function, which consists of a word and a version, such as
``"Boat@1"``. Each process registers the function itself. Reading a file therefore never runs code
that the file names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

F = TypeVar("F")

_MOST_CHARACTERS = 200


class UnregisteredError(LookupError, ValueError):
    """Raised where a named function is needed that this process has not registered."""


@dataclass(frozen=True)
class NamedFunction:
    """A named function of a batch of observations. Each subclass has a registry of its own.

    Attributes:
        name: Name and version, such as ``"speed@1"``. Two objects of one class with one name stand
            for the same function.
        function: The function; None where the one that this process has registered is used.

    Raises:
        ValueError: The name is empty, too long, or holds characters that cannot be printed.
    """

    name: str
    function: Any = field(default=None, compare=False, repr=False)

    noun: ClassVar[str]
    """What the function is, in messages and in the name ``register_<noun>`` of the decorator."""
    example: ClassVar[str]
    """A name, for messages."""
    _known: ClassVar[dict[str, Any]]
    """The registry."""

    def __init_subclass__(cls) -> None:
        cls._known = {}

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not 0 < len(name) <= _MOST_CHARACTERS:
            raise ValueError(
                f"a {self.noun}'s name must be text of 1 to {_MOST_CHARACTERS} characters, such as "
                f"'{self.example}', got {name!r:.80}"
            )
        if not name.isprintable():
            raise ValueError(f"a {self.noun}'s name must be printable text, got {name!r:.80}")

    @property
    def found(self) -> Any:  # noqa: ANN401
        """The function, its own or the registered one; None where there is neither."""
        return self.function or self.find(self.name).function

    @property
    def available(self) -> bool:
        """Whether there is a function, its own or one that this process has registered."""
        return self.found is not None

    def __reduce__(self) -> tuple[Any, ...]:
        # A registered function is pickled by its name, because it need not be importable.
        known = self._known.get(self.name)
        if known is not None and known.function is self.function:
            return type(self).find, (self.name,)
        return type(self), (self.name, self.function)

    @classmethod
    def find(cls, name: str) -> Self:
        """Return the registered object with this name, without a function where there is none."""
        return cls._known.get(name) or cls(name)

    @classmethod
    def register(cls, name: str) -> Callable[[F], F]:
        """Return a decorator that registers a function under a name.

        Args:
            name: Name and version of the function.

        Raises:
            TypeError: `name` is not text, as where the decorator is written without a name.
            ValueError: The name is registered for another function, or is not a name.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"register_{cls.noun} takes a name, such as '{cls.example}', got "
                f"{type(name).__name__}; write @register_{cls.noun}('{cls.example}') above the "
                "function"
            )

        def enter(function: F) -> F:
            known = cls._known.get(name)
            if known is not None and _place(known.function) != _place(function):
                raise ValueError(
                    f"the {cls.noun} '{name}' is registered for another function; choose another "
                    "name or version"
                )
            cls._known[name] = cls(name, function)
            return function

        return enter

    @classmethod
    def of(cls, source: object, name: str = "") -> Self | None:
        """Return the object for a name, for a function, or for an object of this class.

        Args:
            source: The source; None returns None. A function that is registered keeps its name.
            name: Name of any other function; by default its module and qualified name.

        Raises:
            TypeError: `source` is none of these.
        """
        if source is None or isinstance(source, cls):
            return source
        if isinstance(source, str):
            return cls.find(source)
        for known in cls._known.values():
            if known.function is source:
                found: Self = known
                return found
        cls._check(source)
        own = getattr(source, "__qualname__", type(source).__qualname__)
        return cls(name or f"{getattr(source, '__module__', '')}.{own}", source)

    @classmethod
    def _check(cls, source: object) -> None:
        """Raise TypeError unless `source` can be the function of an object of this class."""
        if not callable(source):
            raise TypeError(
                f"a {cls.noun} must be a registered name, a function of a batch of observations, "
                f"or a {cls.__name__}, got {type(source).__name__}"
            )


def _place(function: object) -> tuple[object, object]:
    return getattr(function, "__module__", None), getattr(function, "__qualname__", function)
