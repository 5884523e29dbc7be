r"""A margin for the gate of an actor, from the residuals of whole episodes of a log.

A gate at -m accepts an action with Q_h(s, a) <= -m. The residual of a step is how much V_h rises
beyond what Q_h announced,

    r_t = V_h(s_{t+1}) - Q_h(s_t, a_t).

Let an actor execute an accepted action at step t0, and then, as long as no action is accepted,
actions with Q_h(s, a) <= V_h(s). From Q_h(s_t0, a_t0) <= -m it follows that

    V_h(s_T) <= -m + r_t0 + ... + r_{T-1},

so V_h can only become positive where this sum exceeds m. An episode misses the level m where it has
such steps: an accepted action at t0, states with -m < V_h(s_t) <= 0 at all t0 < t < T, and a sum
above m. Its score R is the largest level that it misses, 0 where it misses none. It misses no level
above R. With n episodes the margin is the ceil((1 - alpha)(n + 1))-th lowest score, so that

    P(R_new > margin) <= alpha

for a new episode that is exchangeable with these n (split conformal prediction over episodes, as in
`calibration.support`). This is a statement about episodes like the logged ones, in which the log's
agent acts. An actor that picks the actions of lowest Q_h, or of highest A_r below the gate, also
picks errors of the networks. The margin is therefore measured, and what is promised about an actor
comes from `SafeFQL.calibrate` or from the calibration of a shield.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safeshield.support.record import conformal_level

Scores = npt.NDArray[np.float64]


def missed_levels(
    values: Scores, after: Scores, action_values: Scores, starts: npt.NDArray[np.int64]
) -> Scores:
    """Return the score R of each episode, (E,), in units of h. The module docstring defines it.

    Args:
        values: (N,) V_h(s_t) of the states before the steps, in units of h.
        after: (N,) V_h(s_{t+1}) of the states after them.
        action_values: (N,) Q_h(s_t, a_t) of the logged actions.
        starts: (E,) index of the first step of each episode.

    >>> q = np.array([-0.5, 0.1])
    >>> missed_levels(np.array([-0.6, -0.2]), np.array([-0.2, 0.3]), q, np.array([0])).tolist()
    [0.5]
    >>> missed_levels(np.array([-0.6, -0.2]), np.array([-0.2, -0.1]), q, np.array([0])).tolist()
    [0.3]
    """
    steps = np.arange(len(values))
    ends = np.append(starts[1:], len(values))[np.searchsorted(starts, steps, side="right") - 1]
    rises = after - action_values
    scores = np.zeros(len(values))
    # Each column follows the steps from one accepted action on, one step at a time. With T at the
    # present step, the levels it misses lie above `above`, the highest -V_h since, and at most at
    # the smaller of `most`, which is -Q_h of the accepted action, and `total`, the sum.
    first = steps[action_values < 0.0]
    now = first
    most, total, above = np.stack([-action_values[first], 0.0 * first, 0.0 * first])
    while len(first):
        total = total + rises[now]
        level = np.minimum(most, total)
        missed = level > above
        scores[first[missed]] = np.maximum(scores[first[missed]], level[missed])
        now = now + 1
        inside = now < ends[first]
        above[inside] = np.maximum(above[inside], -values[now[inside]])
        inside[inside] = values[now[inside]] <= 0.0
        inside &= above < most
        first, now = first[inside], now[inside]
        most, total, above = most[inside], total[inside], above[inside]
    highest: Scores = np.maximum.reduceat(scores, starts)
    return highest


def conformal_margin(scores: Scores, alpha: float = 0.1) -> float:
    """Return the level that a new episode misses with probability at most `alpha`.

    Args:
        scores: (n,) scores R of episodes.
        alpha: The probability, over the draw of the n episodes and of the new one.

    Raises:
        ValueError: alpha is not inside (0, 1), or there are too few episodes for this alpha.

    >>> conformal_margin(np.arange(9.0), alpha=0.2)
    7.0
    """
    return 0.0 - conformal_level(-scores, alpha)
