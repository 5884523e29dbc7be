"""Covariates of an episode: numbers that change when the deployment does, violations or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.recorded import Episode
from safeshield.shield.shield import Shield

START = "start_value"
"""V_h of the state in which the episode began, in units of h."""
REPLACED = "share_replaced"
"""Share of the steps in which the shield replaced the action."""
UNSEEN = "share_unseen"
"""Share of the steps whose executed action did not pass the support test."""
RESIDUAL = "largest_residual"
"""Largest V_h(s') - Q_h(s, a) of a step, at least 0, in units of h: how much worse a step ended
than the values said. V_h is at least the h that the shield uses."""
TYPICAL = "typical_residual"
"""Root mean square over the steps of V_h(s') - Q_h(s, a), in units of h. Other dynamics change it
in most steps, where the largest residual depends on a few."""


def covariates_of(shield: Shield, run: Episode) -> dict[str, float]:
    """Return the covariates of a recorded episode that was played behind `shield`.

    `share_replaced` is missing where the episode does not hold which actions were replaced, and
    `share_unseen` where the shield has no support test.
    """
    values, actions = _state_values(shield, run), run.actions
    h = _reported(shield, run)
    before = None if h is None else h[:-1]
    with np.errstate(invalid="ignore"):
        residuals = values[1:] - shield.row_values(run.observations, actions, before)
    finite = residuals[np.isfinite(residuals)]
    found = {
        START: float(values[0]),
        RESIDUAL: float(np.max(finite, initial=0.0)),
        TYPICAL: root_mean(float(np.sum(finite**2)), len(finite)),
    }
    if run.intervened is not None:
        found[REPLACED] = float(run.intervened.mean())
    if shield.support is not None:
        states = shield.states(run.observations, before)
        found[UNSEEN] = float(1.0 - shield.support.accepts(shield.model, states, actions).mean())
    return found


def root_mean(squares: float, count: float) -> float:
    """Return the root of a mean of squares, from their sum and number; 0 where there are none."""
    return math.sqrt(squares / max(count, 1.0))


def reference_values(
    shield: Shield, reference: Sequence[Episode] | Mapping[str, Iterable[float]]
) -> dict[str, list[float]]:
    """Return the values of each covariate in the reference, rounded as a monitor rounds them.

    Args:
        shield: The calibrated shield.
        reference: Episodes behind the shield, or the values of each covariate by its name. Episodes
            that did not start with V_h <= -delta are left out.

    Raises:
        TypeError: `reference` is neither.
        ValueError: There is no value, one is not finite, or an episode does not hold which actions
            the shield replaced.
    """
    if isinstance(reference, Mapping):
        values = {str(name): [float(one) for one in each] for name, each in reference.items()}
    else:
        values = {}
        if not (isinstance(reference, Sequence) and all(isinstance(r, Episode) for r in reference)):
            raise TypeError(
                "reference must be a list of episodes or a mapping from covariates to values, got "
                f"{type(reference).__name__}; draw episodes by "
                "safeshield.evaluation.episodes.draw_episodes"
            )
        for run in reference:
            if not certified_start(shield, run):
                continue
            found = covariates_of(shield, run)
            if REPLACED not in found:
                raise ValueError(
                    "reference must hold episodes that were played behind the shield, but one does "
                    "not say which actions were replaced: draw them by "
                    "safeshield.evaluation.episodes.draw_episodes(env, agent, 200, seed, "
                    "shield=shield, judge=shield)[0]"
                )
            for name, value in found.items():
                values.setdefault(name, []).append(value)
    if not values:
        raise ValueError(
            "reference must hold at least one episode that starts with V_h <= -delta, or the "
            f"values of at least one covariate, got {len(reference)} entries that hold none"
        )
    for name, each in values.items():
        if not each or not np.isfinite(each).all():
            raise ValueError(
                f"reference[{name!r}] must hold one finite number or more, got {each!r:.60}"
            )
    return {name: [rounded(one) for one in each] for name, each in values.items()}


def certified_start(shield: Shield, run: Episode) -> bool:
    """Return whether an episode starts with V_h <= -delta, but for rounding."""
    h = _reported(shield, run)
    start = shield.row_values(run.observations[:1], None, None if h is None else h[:1])[0]
    return bool(start <= shield.threshold + shield.model.scale.rounding)


def rounded(value: float) -> float:
    """Return a covariate as the file of a monitor holds it, with six digits."""
    return float(f"{value:.6g}")


def _state_values(shield: Shield, run: Episode) -> npt.NDArray[np.float64]:
    rows = np.concatenate([run.observations, run.next_observations[-1:]])
    return np.asarray(shield.row_values(rows, None, _reported(shield, run)), np.float64)


def _reported(shield: Shield, run: Episode) -> npt.NDArray[np.float64] | None:
    """Return h (L + 1,) that the environment reported; None where the shield computes its own.

    Of k constraints it is (L + 1, k).

    Raises:
        ValueError: The shield needs the report, and the episode does not hold it.
    """
    source = shield.model.constraint
    if source is None or source.available:
        return None
    if len(source.names) > 1:
        if set(source.names) <= set(run.named):
            return np.stack([run.named[name] for name in source.names], axis=1)
    elif run.constraints is not None and run.next_constraints is not None:
        each = [run.constraints[:1], run.next_constraints]
        return np.concatenate(each).astype(np.float64)
    raise ValueError(
        f"an episode must hold the constraint '{source.name}' of each state, which is not "
        "registered in this process; register it, or have the environment report it"
    )
