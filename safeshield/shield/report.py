"""What a shield reports about each action that it has judged."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from safeshield.spaces.shapes import Flags, Scalars


class FilterReport(NamedTuple):
    """The verdict on one action, or arrays of verdicts on n actions.

    All values are in the units of the constraint h; a positive value means a violation.
    """

    intervened: Flags | np.bool_
    """Whether the shield did not accept the proposed action, and chose the executed one. (Where
    nothing is acceptable, it may choose the proposed action itself.)"""
    value: Scalars | np.floating
    """Q_h of the executed action; infinity where the observation was not readable."""
    proposed_value: Scalars | np.floating
    """Q_h of the proposed action; infinity where that is not in the action space, or where the
    observation was not readable."""
    state_value: Scalars | np.floating
    """V_h of the observation; infinity where it was not readable."""
    acceptable: Flags | np.bool_
    """Whether the executed action passes every test of the shield: value <= -delta, and
    `supported`. Where it is False, no acceptable action was found, and the candidate of lowest Q_h
    was executed."""
    valid: Flags | np.bool_
    """Whether the observation was readable (`Shield.readable`) and the proposed action finite."""
    supported: Flags | np.bool_ = np.bool_(True)
    """Whether the executed action looks like the log's (`support`); True without a support
    test."""

    def row(self, index: int) -> FilterReport:
        """Return the report on action number `index` of a batch, with single values for arrays."""
        fields: list[npt.NDArray[np.generic]] = [np.asarray(field) for field in self]
        return FilterReport(*(field[index] for field in fields))


ACCEPTED, REPLACED, FALLBACK, UNREADABLE, SHADOW = range(5)
"""Verdicts on one step, as numbers: indices into `VERDICTS`."""
VERDICTS = ("accepted", "replaced", "fallback", "unreadable", "shadow")
"""What a shield did in one step: it accepted the action; replaced it by an acceptable one; found no
acceptable one and executed what `FilterReport.acceptable` describes; could not read the
observation; or, in shadow mode, would have replaced the action."""


def verdicts(report: FilterReport, shadow: bool) -> list[int]:
    """Return the verdicts on n actions, as indices into `VERDICTS`.

    Args:
        report: The report on the n actions, with fields (n,).
        shadow: Whether the shield is in shadow mode.
    """
    if not np.any(report.intervened):
        return [ACCEPTED] * len(np.atleast_1d(report.intervened))
    replaced = (
        np.full(np.shape(report.acceptable), SHADOW)
        if shadow
        else (np.where(report.acceptable, REPLACED, FALLBACK))
    )
    found = np.where(report.intervened, replaced, ACCEPTED)
    codes: list[int] = np.where(np.isfinite(report.state_value), found, UNREADABLE).tolist()
    return codes
