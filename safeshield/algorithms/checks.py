"""Rules that the settings of several algorithms share; each error names field, rule and value."""

from __future__ import annotations

import math


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


def check_integers(config: object, *names: str) -> None:
    """Raise ValueError unless the fields are integers."""
    for name in names:
        if type(getattr(config, name)) is not int:
            raise ValueError(f"{name} must be an integer, got {getattr(config, name)!r}")


def check_seed(seed: object) -> None:
    """Raise ValueError unless it is an integer of at least 0."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")


def check_sizes(config: object, *names: str) -> None:
    """Raise ValueError unless the fields are tuples of numbers of 1 or more, not empty."""
    for name in names:
        values = getattr(config, name)
        if not isinstance(values, tuple) or not values or min(values) < 1:
            raise ValueError(f"{name} must be a tuple of numbers of 1 or more, got {values!r}")


def check_phase_shares(shares: tuple[float, ...], count: int) -> None:
    """Raise ValueError unless there are `count` numbers above 0 that sum to 1."""
    good = len(shares) == count and min(shares) > 0 and math.isclose(sum(shares), 1, abs_tol=1e-9)
    if not good:
        raise ValueError(
            f"phase_shares must be {count} numbers above 0 that sum to 1, got {shares}"
        )
