"""The type checker that `conftest` hands to jaxtyping: array shapes, and nothing else.

beartype on every annotation would refuse what the package may promise statically only (`Self`,
names imported for type checking); shapes are what no static checker sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable[..., Any])


def shapes_only(function: F) -> F:
    """Check the arguments and the result whose types are jaxtyping's."""
    hints = {name: _resolved(function, hint) for name, hint in function.__annotations__.items()}
    checked = {name: hint if _has_shape(hint) else Any for name, hint in hints.items()}
    if all(hint is Any for hint in checked.values()):
        return function
    function.__annotations__ = checked
    return beartype(function)


def _resolved(function: Callable[..., Any], hint: object) -> object:
    """Return an annotation, which is text under `from __future__ import annotations`.

    Names that are imported for type checking only cannot be resolved. Their shapes are not checked.
    """
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, inspect.unwrap(function).__globals__)
    except NameError:
        return Any


def _has_shape(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
