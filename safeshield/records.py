"""Records as JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any


def json_values(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the fields of a dataclass as JSON values: whatever has an order becomes a list.

    ``json.dump(score.to_json(), file, indent=2)`` then writes what ``json.load`` gives back.

    >>> @dataclasses.dataclass
    ... class Pair:
    ...     ends: tuple[float, float]
    >>> json_values(Pair((0.0, 1.0)))
    {'ends': [0.0, 1.0]}
    """
    values: dict[str, Any] = _as_lists(dataclasses.asdict(record))
    return values


def _as_lists(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _as_lists(one) for key, one in value.items()}
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value
