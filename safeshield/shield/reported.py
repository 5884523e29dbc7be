"""What environments report of their states: the constraint and the cost in their infos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import CONSTRAINT, COST, Infos, column_of
from safeshield.shield.protocols import PerEnv
from safeshield.spaces.shapes import Scalars

Array = npt.NDArray[Any]
InfoDicts = Sequence[Mapping[str, Any]]
"""The infos of n environments, one mapping for each."""


class Reports(NamedTuple):
    """What environments report of their present states, NaN where they report nothing."""

    constraint: PerEnv
    """h of the states, in units of h; of several constraints by name, the largest."""
    cost: PerEnv
    """Costs of the states."""
    named: PerEnv
    """The reports of the shield's own constraints: h of the states, in units of h; or, of a shield
    of k constraints, (n, k) h_k, NaN where a plain number is reported."""

    @classmethod
    def of(cls, infos: InfoDicts | Infos, count: int | None, names: Sequence[str] = ()) -> Self:
        """Read the reports of n environments.

        Args:
            infos: A mapping for each environment, or columns as a vector environment returns them.
            count: n; None for a single environment, whose reports are plain numbers.
            names: Names of the shield's constraints.
        """
        n = count or 1
        if count is None and type(infos) is tuple and len(names) <= 1:
            # Most steps of a single environment end here.
            h, cost = infos[0].get(CONSTRAINT), infos[0].get(COST)
            if h is None or isinstance(h, _NUMBERS):
                number = as_number(h)
                return cls(number, as_number(cost), number)
        given: Sequence[Any] | Array
        told: list[PerEnv]
        if isinstance(infos, Mapping):
            given = column_of(infos, CONSTRAINT, n)
            told = [_numbers(given, n), _numbers(column_of(infos, COST, n), n)]
        else:
            given = [info.get(CONSTRAINT) for info in infos]
            read = [
                [as_number(one) for one in given],
                [as_number(info.get(COST)) for info in infos],
            ]
            told = [column[0] if count is None else np.array(column) for column in read]
        plain = isinstance(given, np.ndarray) or not any(isinstance(h, Mapping) for h in given)
        if not names or (plain and len(names) == 1):
            return cls(told[0], told[1], told[0])
        named = np.array([[as_number(h) for h in under_names(one, names)] for one in given])
        named = named if len(names) > 1 else named[:, 0]
        return cls(told[0], told[1], named[0] if count is None else named)

    def text(self, at: int, names: Sequence[str]) -> str:
        """Return the report of the constraint of environment `at` as text; `names` as in `of`."""
        each = np.reshape(self.named, (-1, max(len(names), 1)))[at]  # one without a source
        return listed(float(np.ravel(self.constraint)[at]), each, names)


def under_names(report: object, names: Sequence[str]) -> list[Any]:
    """Return what a report holds under these names, None where it holds nothing."""
    if isinstance(report, Mapping):
        return [report.get(name) for name in names]
    return [report] if len(names) == 1 else [None] * len(names)


def listed(h: float, each: Scalars, names: Sequence[str]) -> str:
    """Return h as text, and after it the constraints of which it is the largest, where known.

    Args:
        h: h of a state, or a report of it.
        each: (k,) the constraints, or the reports of them; NaN where not reported.
        names: Their names.
    """
    if each.shape == (1,) and each[0] == h:
        return f"{h:.4g}"
    pairs = zip(names, each, strict=True)
    parts = ", ".join(f"{name} {x:.4g}" for name, x in pairs if not np.isnan(x))
    return f"{h:.4g} ({parts})" if parts else f"{h:.4g}"


def watched_labels(infos: InfoDicts | Infos, reports: Reports) -> tuple[PerEnv, PerEnv]:
    """Return constraint and cost of `reports`, which were read from `infos`, for a monitor.

    NaN means that nothing is reported. Where NaN or no number is reported, the result is infinite.
    """
    return (
        _infinite_where_broken(infos, CONSTRAINT, reports.constraint),
        _infinite_where_broken(infos, COST, reports.cost),
    )


def _infinite_where_broken(infos: InfoDicts | Infos, key: str, values: PerEnv) -> PerEnv:
    missing = np.isnan(values)
    if not missing.any():
        return values
    each = _reported(infos, key, np.size(values))
    told = np.array([value is not None for value in each])
    return np.where(np.ravel(missing) & told, np.inf, np.ravel(values))


def _reported(infos: InfoDicts | Infos, key: str, count: int) -> Sequence[Any] | Array:
    """Return what each of `count` environments reports under a key, None where it does not."""
    if isinstance(infos, Mapping):
        return column_of(infos, key, count)
    return [info.get(key) for info in infos]


_NUMBERS = (float, int, np.integer, np.floating, np.bool_)


def broken_reports(infos: InfoDicts | Infos, reports: Reports) -> list[tuple[int, str, object]]:
    """Return the reports that are no numbers: (environment, key, report) of each.

    None and NaN are not among them; they stand for what is not reported. `reports` were read from
    `infos`.
    """
    found: list[tuple[int, str, object]] = []
    for key, values in ((CONSTRAINT, reports.constraint), (COST, reports.cost)):
        missing = values != values  # Only NaN differs from itself.
        if not (missing if isinstance(values, float) else np.count_nonzero(missing)):
            continue
        if isinstance(infos, Mapping) and key not in infos:
            continue
        given = _reported(infos, key, np.size(values))
        found += [(at, key, value) for at, value in enumerate(given) if _is_broken(value)]
    return found


def _is_broken(report: object) -> bool:
    if report is None or isinstance(report, _NUMBERS):
        return False
    if isinstance(report, Mapping):
        return any(map(_is_broken, report.values()))
    return not (isinstance(report, np.ndarray) and report.size == 1 and _numeric(report))


def _numeric(array: Array) -> bool:
    return array.dtype.kind in "fiub"


def as_number(value: object) -> float:
    """Return a report as a number: the largest of several, and NaN for what is no number."""
    if value is None:
        return np.nan
    if isinstance(value, _NUMBERS):
        return float(value)
    if isinstance(value, Mapping) and value:
        return float(np.max([as_number(one) for one in value.values()]))
    if isinstance(value, np.ndarray) and value.size == 1 and _numeric(value):
        return float(value.item())
    return np.nan


def _numbers(column: Sequence[Any] | Array, count: int) -> Scalars:
    if isinstance(column, np.ndarray):
        numbers = column.shape == (count,) and _numeric(column)
        return column.astype(np.float64) if numbers else np.full(count, np.nan)
    return np.array([as_number(value) for value in column])
