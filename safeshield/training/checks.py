"""Rules that the settings of several algorithms share; each error names field, rule and value."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


def settle_types(config: Any) -> None:  # noqa: ANN401 - any frozen dataclass
    """Give each field of a frozen dataclass the type of its annotation, from what means the same.

    NumPy's numbers become Python's, whole numbers floats where a float is asked for, lists tuples;
    so JSON holds every setting. The annotations are int, float (always finite), bool, Literal,
    tuples of numbers, and any of these or None.

    Raises:
        ValueError: a value is of another kind.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Settings:
    ...     widths: tuple[int, ...] = (8,)
    ...     rate: float | None = None
    ...     def __post_init__(self) -> None:
    ...         settle_types(self)
    >>> Settings([np.int64(16), 16], 1)
    Settings(widths=(16, 16), rate=1.0)
    >>> Settings(rate=float("inf"))
    Traceback (most recent call last):
    ...
    ValueError: rate must be a finite number or None, got inf
    """
    kind: Any = type(config)
    for name, hint in _annotations(kind).items():
        value = getattr(config, name)
        try:
            settled = _as(hint, value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be {_rule(hint)}, got {value!r:.100}") from None
        object.__setattr__(config, name, settled)


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _as(hint: Any, value: Any) -> Any:  # noqa: ANN401
    """Return the value as an annotation's kind; any error: it is none."""
    if type(None) in get_args(hint):
        return None if value is None else _as(get_args(hint)[0], value)
    if get_origin(hint) is Literal:
        good = isinstance(value, str) and value in get_args(hint)
    elif get_origin(hint) is tuple:
        items = get_args(hint)
        several = items[-1] is ...
        if isinstance(value, list | tuple | np.ndarray) and len(value):
            kinds = (items[0],) * len(value) if several else items
            return tuple(_as(kind, one) for kind, one in zip(kinds, value, strict=True))
        good = False
    elif hint is bool:
        good = isinstance(value, bool | np.bool_)
    else:
        numbers = int | np.integer if hint is int else int | float | np.integer | np.floating
        good = isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    if not good:
        raise TypeError
    return value if isinstance(value, str) else hint(value)


def _rule(hint: Any) -> str:  # noqa: ANN401
    items = get_args(hint)
    if type(None) in items:
        return f"{_rule(items[0])} or None"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, items))
    if get_origin(hint) is tuple:
        kind = "whole numbers of at least 1, as (64, 64)" if items[0] is int else "finite numbers"
        return f"a tuple of {'' if items[-1] is ... else f'{len(items)} '}{kind}"
    return {int: "a whole number", float: "a finite number", bool: "True or False"}[hint]


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError unless the fields are above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")


def check_not_negative(config: object, *names: str) -> None:
    """Raise ValueError unless the fields are at least 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")


def check_seed(config: object) -> None:
    """Raise ValueError unless the field `seed` is one that NumPy and PyTorch both take."""
    seed: int = config.seed  # type: ignore[attr-defined]
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")


def check_fractions(config: object, *names: str) -> None:
    """Raise ValueError unless the fields lie inside (0, 1), or are None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def check_shares(config: object, *names: str) -> None:
    """Raise ValueError unless the fields lie in [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(config, name)}")


def check_sizes(config: object, *names: str) -> None:
    """Raise ValueError unless the tuples hold numbers of at least 1."""
    for name in names:
        values = getattr(config, name)
        if min(values) < 1:
            raise ValueError(
                f"{name} must be a tuple of whole numbers of at least 1, as (64, 64), got {values}"
            )


def check_phase_shares(shares: tuple[float, ...], count: int) -> None:
    """Raise ValueError unless there are `count` numbers above 0 that sum to 1."""
    good = len(shares) == count and min(shares) > 0 and math.isclose(sum(shares), 1, abs_tol=1e-9)
    if not good:
        raise ValueError(
            f"phase_shares must be {count} numbers above 0 that sum to 1, got {shares}"
        )
