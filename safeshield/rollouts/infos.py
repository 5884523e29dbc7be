"""Keys of the infos that an environment returns, and functions that read them.

Gymnasium's vector environments report a key as a column, which is an array with one row for each
environment. A mask under ``"_" + key`` says which environments report the key. Where an environment
has reset itself in a step, the entries of the episode that ended are in ``infos["final_info"]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.batches import copied

Array = npt.NDArray[Any]
Infos = Mapping[str, Any]

COST = "cost"
"""Cost of the state that the step reached, at least 0. A cost of 0 is safe."""
CONSTRAINT = "constraint"
"""h of the state that the step reached. A positive h is a violation. Where there are several
constraints, it is a mapping from the name of each to its h_k, each in its own units."""
LABELS = (COST, CONSTRAINT)
"""Keys under which an environment may report the safety of a state."""

PROPOSED = "action_proposed"
"""The action that the agent sent."""
EXECUTED = "action_executed"
"""The action that the dynamics saw."""
ACTION_MASK = "action_mask"
"""Mask of the discrete actions that may be taken next."""

INTERVENED = "shield/intervened"
"""Whether the shield replaced the action."""
WOULD_INTERVENE = "shield/would_intervene"
"""Whether a shield in shadow mode would have replaced the action. Only that mode reports it."""
SHIELDED = "action_shielded"
"""The action that a shield in shadow mode would have executed. Only that mode reports it."""
VALUE = "shield/value"
"""Q_h of the executed action. At reset it is V_h of the state."""
THRESHOLD = "shield/threshold"
"""Threshold that the value must not exceed."""
CERTIFIED = "shield/certified"
"""Whether the shield's promise covers the episode: it began in a certified state, and nothing has
contradicted the record since. The entry does not change within an episode otherwise."""
SAFE_SET = "shield/safe_set"
"""Whether the state that the step reached has V_h <= -delta, with or without a record."""
BINDING = "shield/binding"
"""Name of the constraint that is the largest in the state that the step reached, each in units of
its own steps (`values.constraint.SeveralConstraints`). Where constraints are not finite, it is the
first of these; where the observation is not readable, it is empty. Only shields of several
constraints report it."""
SENSOR = "shield/sensor"
"""What the checks of the sensors found of the observation that the step reached: "frozen", "jump",
"stale", or "" for nothing. Only shields with such checks report it (`Shield.with_sensors`)."""
STAMP = "stamp"
"""`time.monotonic()` at which the observation was measured, in seconds, which an environment may
report for a shield that limits the age of observations."""
PROMISE = "shield/promise"
"""State of the promise that a monitor watches (`monitoring`); only monitored shields report it."""
EVIDENCE = "shield/promise_evidence"
"""Evidence E_t against this promise (`calibration.eprocess`)."""
SIGNATURE = "shield/promise_signature"
"""What is known of who made this promise: "unsigned", "signed, not verified" or "signature
verified" (`files.signing`). It is reported with the state of the promise."""
PENALTY = "shield/penalty"
"""Penalty that an intervention subtracted from the reward."""

FINAL_INFO = "final_info"
"""Key of the infos of the episode that ended, where the environment has reset itself."""
FINAL_OBSERVATIONS = ("final_obs", "final_observation")
"""Keys of the last observation of an episode, in Gymnasium 1.x and before."""
TERMINAL_OBSERVATION = "terminal_observation"
"""Key of the last observation of an episode in Stable-Baselines3."""
TIME_LIMIT = "TimeLimit.truncated"
"""Key under which Stable-Baselines3 reports that an episode was truncated."""


def reported(infos: Infos, key: str, count: int) -> npt.NDArray[np.bool_]:
    """Return which of `count` environments report a key, as (count,) bool.

    The key must be in `infos`. In an array of objects, None counts as not reported.

    `key` is the key.
    """
    present = np.array(infos.get(f"_{key}", np.ones(count)), np.bool_)
    values = infos[key]
    if isinstance(values, np.ndarray) and values.dtype == object:
        present &= np.array([value is not None for value in values])
    return present


def final_observations_key(infos: Infos) -> str | None:
    """Return the key under which `infos` hold the last observations of episodes, or None."""
    return next((key for key in FINAL_OBSERVATIONS if key in infos), None)


def column_of(infos: Infos | Array, key: str, count: int) -> Sequence[Any] | Array:
    """Return copies of one key's values in the infos of `count` environments.

    The value is None for an environment that does not report the key.
    """
    if isinstance(infos, np.ndarray):
        # In Gymnasium 0.29 final_info is an array of dictionaries and None.
        return [_copied((one or {}).get(key)) for one in infos]
    if key not in infos:
        return [None] * count
    if isinstance(infos[key], Mapping):
        return [row.get(key) for row in info_rows(infos, count, (key,))]
    values, present = np.array(infos[key]), reported(infos, key, count)
    if values.dtype != object and present.all():
        return values
    return [_copied(values[i]) if present[i] else None for i in range(count)]


def step_column(infos: Infos, key: str, replaced: npt.NDArray[np.bool_]) -> Sequence[Any] | Array:
    """Return `column_of` one key for the states that a step reached.

    Args:
        infos: Infos that the step returned.
        key: The key.
        replaced: (n,) whether the environment has already reset itself, so that ``"final_info"``
            holds its entry.
    """
    column = column_of(infos, key, len(replaced))
    if not replaced.any():
        return column
    final = column_of(infos.get(FINAL_INFO, {}), key, len(replaced))
    return [final[i] if replaced[i] else column[i] for i in range(len(replaced))]


def info_rows(
    infos: Infos | Array, count: int, keys: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return the infos of `count` environments as a dictionary for each, of what it reports.

    Args:
        infos: Columns, or Gymnasium 0.29's ``final_info``, an array of dictionaries and None.
        count: How many environments.
        keys: Which of the infos; None: all.

    >>> infos = {"a": np.array([1, 2]), "_a": np.array([True, False]), "b": {"c": np.zeros(2)}}
    >>> info_rows(infos, 2)
    [{'a': np.int64(1), 'b': {'c': np.float64(0.0)}}, {'b': {'c': np.float64(0.0)}}]
    """
    if keys is not None and not keys:
        return [{}] * count
    if isinstance(infos, np.ndarray):
        return [dict(one or {}) for one in infos]
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key in infos if keys is None else [key for key in keys if key in infos]:
        values = infos[key]
        if isinstance(values, Mapping):
            values = info_rows(values, count)
        if key.startswith("_") or not hasattr(values, "__len__") or len(values) != count:
            continue
        for i in np.flatnonzero(reported(infos, key, count)):
            rows[i][key] = values[i]
    return rows


def _copied(value: object) -> Any:  # noqa: ANN401 - a value of an info
    return None if value is None else copied(value)


def largest(report: object) -> object:
    """Return what an environment reports of a constraint as one value.

    Of several constraints by name it is the largest number, NaN where one is NaN. The units of the
    constraints may differ, so only its sign has a meaning: that of the worst constraint. Any other
    report is returned unchanged.

    Raises:
        ValueError: `report` is a mapping that is empty, or holds a value that is not a number.

    >>> largest({"speed@1": -0.5, "clearance@1": 0.1}), largest(-1.0)
    (0.1, -1.0)
    """
    if not isinstance(report, Mapping):
        return report
    if not report:
        raise ValueError(f"info[{CONSTRAINT!r}] must hold one constraint or more, got {{}}")
    return float(np.max([_one_number(f"[{CONSTRAINT!r}][{k!r}]", v) for k, v in report.items()]))


def violates(info: Infos) -> bool | None:
    """Return whether the info of one environment reports a violation; None without a label.

    A label that is NaN counts as a violation.

    Raises:
        ValueError: A label is not a number.

    >>> violates({"cost": 0.0}), violates({"constraint": float("nan")}), violates({})
    (False, True, None)
    >>> violates({"constraint": {"speed@1": -0.5, "clearance@1": 0.1}})
    True
    """
    reports = [_number(info, key) for key in LABELS if key in info]
    # The comparison is negated so that NaN counts as a violation.
    return any(not report <= 0.0 for report in reports) if reports else None


def _number(info: Infos, key: str) -> float:
    return _one_number(f"[{key!r}]", largest(info[key]) if key == CONSTRAINT else info[key])


def _one_number(where: str, report: object) -> float:
    value = np.asarray(report)
    if value.dtype.kind not in "fiub" or value.size != 1:
        raise ValueError(f"info{where} must be one number, got {report!r:.60}")
    return float(value.item())
