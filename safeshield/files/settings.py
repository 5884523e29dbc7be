"""Values that users and files give, checked by declaration: a field's annotation is its rule.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Sampling(Settings):
...     rate: Positive = 1.0
...     widths: Sizes = (8,)
>>> Sampling(widths=[np.int64(16), 16])
Sampling(rate=1.0, widths=(16, 16))
>>> Sampling(rate=-1)
Traceback (most recent call last):
...
ValueError: rate must be above 0, got -1
>>> Sampling(rate=float("inf"))
Traceback (most recent call last):
...
safeshield.files.settings.KindError: rate must be a finite number, got inf
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class KindError(TypeError, ValueError):
    """A value is of another kind than its field; a wrong type, and no valid setting."""


# -- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A condition on a field's value, for `Annotated[type, Rule(...)]`."""

    words: str
    """What the value must do, as in "rate must lie in [0, 1]"."""
    holds: Callable[[Any], bool]
    """Whether a value of the field's type does."""
    tells_kind: bool = False
    """Whether `words` are told of a value of another type, too."""

    def __get_pydantic_core_schema__(self, source: object, handler: Any) -> Any:  # noqa: ANN401
        """Return pydantic's validator: the type's own, then this condition."""
        # On first use: importing pydantic takes longer than importing a shield.
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: object) -> object:
        if not self.holds(value):
            raise ValueError(self.words)
        return value


def _phases(count: int) -> Rule:
    return Rule(
        f"be {count} numbers above 0 that sum to 1",
        lambda shares: min(shares) > 0 and math.isclose(sum(shares), 1, abs_tol=1e-9),
    )


_ABOVE_0 = Rule("be above 0", lambda number: number > 0)
_AT_LEAST_0 = Rule("be at least 0", lambda number: number >= 0)
_AT_MOST_1 = Rule("lie in [0, 1]", lambda number: number <= 1)

Positive = Annotated[float, _ABOVE_0]
PositiveInt = Annotated[int, _ABOVE_0]
Count = Annotated[int, Rule("be at least 1", lambda number: number >= 1)]
NonNegative = Annotated[float, _AT_LEAST_0]
NonNegativeInt = Annotated[int, _AT_LEAST_0]
Share = Annotated[float, Rule("lie in [0, 1]", lambda number: 0 <= number <= 1)]
Rate = Annotated[float, _ABOVE_0, _AT_MOST_1]
"""A share that is not 0."""
Fraction = Annotated[float, Rule("lie between 0 and 1", lambda number: 0 < number < 1)]
Inside = Annotated[
    float, Rule("be a number inside (0, 1)", lambda number: 0 < number < 1, tells_kind=True)
]
"""As `Fraction`, in the words of conformal prediction's levels."""
Below1 = Annotated[
    float, Rule("be a number in [0, 1)", lambda number: 0 <= number < 1, tells_kind=True)
]
Seed = Annotated[int, Rule("be at least 0 and below 2**63", lambda number: 0 <= number < 2**63)]
"""What NumPy and PyTorch both take."""
Sizes = Annotated[
    tuple[int, ...],
    Rule(
        "be a tuple of whole numbers of at least 1, as (64, 64)",
        lambda sizes: len(sizes) > 0 and min(sizes) >= 1,
        tells_kind=True,
    ),
]
TwoPhases = Annotated[tuple[float, float], _phases(2)]
ThreePhases = Annotated[tuple[float, float, float], _phases(3)]


# -- settings -----------------------------------------------------------------------------------


class Settings:
    """Base of a frozen dataclass of settings: each field is checked against its annotation.

    NumPy's numbers become Python's, whole numbers floats where a float is asked for, lists and
    arrays tuples; so JSON holds every setting. Numbers are finite. A class that overrides
    `__post_init__` calls this one first, then checks what concerns several fields.

    Raises:
        KindError: a value is of another kind; a TypeError and a ValueError.
        ValueError: a value breaks its field's rule.
    """

    def __post_init__(self) -> None:
        for name, hint in rules_of(cast("Any", type(self))).items():
            object.__setattr__(self, name, check(name, hint, getattr(self, name)))


@dataclass(frozen=True)
class Field:
    """What is declared of one setting."""

    name: str
    kind: Any
    """Its annotation, without rules."""
    default: object
    meaning: str
    """The docstring below it, on one line; "" where there is none."""
    rule: str
    """What its annotation asks of a value, in words."""


def fields_of(kind: type) -> tuple[Field, ...]:
    """Return the fields of a dataclass of settings, those of its bases first.

    >>> @dataclass(frozen=True)
    ... class Sampling(Settings):
    ...     rate: Positive = 1.0
    >>> fields_of(Sampling)[0].rule
    'a finite number, above 0'
    """
    hints, rules = get_type_hints(kind), rules_of(cast("Any", kind))
    meanings, declared = _meanings(kind), _fields(kind)
    return tuple(
        Field(
            field.name,
            hints[field.name],
            field.default if field.default_factory is MISSING else field.default_factory(),
            meanings.get(field.name, ""),
            _in_words(rules[field.name]),
        )
        for field in declared
    )


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:  # noqa: ANN401 - a dataclass
    return dataclasses.fields(kind)


def _meanings(kind: type) -> dict[str, str]:
    """Read the docstrings below the fields, which Python does not keep, from the source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # Typed in at a prompt: there is no source.
            continue
        body = cast("ast.ClassDef", ast.parse(source).body[0]).body
        for line, below in itertools.pairwise(body):
            match line, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def check(name: str, hint: Any, value: object) -> Any:  # noqa: ANN401 - of the annotation's type
    """Return a value as one of an annotation's, from what means the same.

    Raises:
        KindError: it is of another kind; a TypeError and a ValueError.
        ValueError: it breaks a rule of the annotation.

    >>> check("share", Share, np.float32(0.5))
    0.5
    """
    from pydantic import ValidationError

    value = _plain(value)
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] == "value_error":
        raise ValueError(f"{name} must {first['ctx']['error']}, got {value}")
    raise KindError(f"{name} must {_kind_in_words(hint)}, got {value!r:.100}")


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:  # noqa: ANN401
    from pydantic import ConfigDict, TypeAdapter

    # A dataclass brings its own checks.
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else strict)


@functools.cache
def rules_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Return the annotation of each field, with its rules."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in _fields(kind)}


def _plain(value: object) -> object:
    """Return Python's numbers for NumPy's, and tuples for lists and arrays."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value


def _kind_in_words(hint: Any) -> str:  # noqa: ANN401
    """Return what a value of an annotation must do, as "be a whole number"."""
    items = get_args(hint)
    if type(None) in items:
        return f"{_kind_in_words(items[0])} or None"
    if get_origin(hint) is Annotated:
        rules = [one for one in items if isinstance(one, Rule) and one.tells_kind]
        return rules[0].words if rules else _kind_in_words(items[0])
    if get_origin(hint) is Literal:
        return f"be {' or '.join(map(repr, items))}"
    if get_origin(hint) is tuple:
        kind = "whole numbers" if items[0] is int else "finite numbers"
        return f"be a tuple of {'' if items[-1] is ... else f'{len(items)} '}{kind}"
    if get_origin(hint) is dict:
        return "be an object of strings" if items[1] is str else "be an object"
    names = {int: "whole number", float: "finite number", bool: "True or False", str: "text"}
    what = names.get(hint) or getattr(hint, "__name__", str(hint))
    return f"be {what}" if hint in (bool, str) else f"be a {what}"


def _in_words(hint: Any) -> str:  # noqa: ANN401
    """Return an annotation's kind and rules, as "a finite number, above 0"."""
    items = get_args(hint)
    if type(None) in items:
        return f"{_in_words(items[0])}, or None"
    rules = [one for one in items if isinstance(one, Rule) and not one.tells_kind]
    # Without "be" and "lie".
    words = [_kind_in_words(hint), *(rule.words for rule in rules)]
    return ", ".join(each.partition(" ")[2] for each in words)
