"""Checks of settings from users and files. The annotation of a field declares its type and rule.

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
    """Error for a value whose type is not that of its field. It is a TypeError and a ValueError."""


# -- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A condition on a field's value, for `Annotated[type, Rule(...)]`."""

    words: str
    """What the value must do, as in "rate must lie in [0, 1]"."""
    holds: Callable[[Any], bool]
    """Function that returns whether a value of the field's type obeys the rule."""
    tells_kind: bool = False
    """Whether `words` also describe the type, and are used in the error for a wrong type."""

    def __get_pydantic_core_schema__(self, source: object, handler: Any) -> Any:  # noqa: ANN401
        """Return a pydantic schema that checks the type first and then this rule."""
        # Imported on first use, because importing pydantic takes longer than importing a shield.
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
"""The rule of `Fraction` with another wording, for levels of conformal prediction."""
Below1 = Annotated[
    float, Rule("be a number in [0, 1)", lambda number: 0 <= number < 1, tells_kind=True)
]
Seed = Annotated[int, Rule("be at least 0 and below 2**63", lambda number: 0 <= number < 2**63)]
"""A seed that both NumPy and PyTorch accept."""
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
    """Base class of frozen dataclasses of settings. It checks each field against its annotation.

    NumPy numbers are converted to Python numbers, whole numbers to floats where the field is a
    float, and lists and arrays to tuples, so that every setting can be written as JSON. Numbers
    must be finite. A class that overrides `__post_init__` calls this one first and then checks the
    rules that concern several fields.

    Raises:
        KindError: A value has another type. A KindError is a TypeError and a ValueError.
        ValueError: A value breaks the rule of its field.
    """

    def __post_init__(self) -> None:
        for name, hint in rules_of(cast("Any", type(self))).items():
            object.__setattr__(self, name, check(name, hint, getattr(self, name)))


@dataclass(frozen=True)
class Field:
    """The declaration of one setting."""

    name: str
    """Name of the setting."""
    kind: Any
    """Annotation of the field, without rules."""
    default: object
    """Default value."""
    meaning: str
    """Docstring below the field, on one line; "" where there is none."""
    rule: str
    """Type and rules of the annotation, in words."""


def fields_of(kind: type) -> tuple[Field, ...]:
    """Return the fields of `kind`, a dataclass of settings. Those of its base classes come first.

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
    """Read the docstrings below the fields from the source, because Python does not store them."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # A class typed at a prompt has no source.
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


def check(name: str, hint: Any, value: object) -> Any:  # noqa: ANN401 - the annotation's type
    """Return a value converted to the type that an annotation asks for, after a check of its rules.

    Args:
        name: Name of the value in error messages.
        hint: Annotation, such as ``Annotated[float, Rule(...)]``.
        value: The value to check.

    Raises:
        KindError: The value has another type. A KindError is a TypeError and a ValueError.
        ValueError: The value breaks a rule of the annotation.

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

    # A dataclass checks its own fields.
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else strict)


@functools.cache
def rules_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Return the annotation of each field of the dataclass `kind` by name, including its rules."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in _fields(kind)}


def _plain(value: object) -> object:
    """Convert NumPy numbers to Python numbers, and lists and arrays to tuples."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value


def _kind_in_words(hint: Any) -> str:  # noqa: ANN401
    """Return the type that an annotation requires, in words such as "be a whole number"."""
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
    """Return the type and rules of an annotation, such as "a finite number, above 0"."""
    items = get_args(hint)
    if type(None) in items:
        return f"{_in_words(items[0])}, or None"
    rules = [one for one in items if isinstance(one, Rule) and not one.tells_kind]
    # Drop the leading "be" or "lie".
    words = [_kind_in_words(hint), *(rule.words for rule in rules)]
    return ", ".join(each.partition(" ")[2] for each in words)
