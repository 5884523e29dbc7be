r"""Evidence against a mean, by betting: the wealth of gamblers, and the e-process of a promise.

A gambler who bets the share lambda_t on a gain g_t has, after n bets, the wealth

    W_n = prod_{t <= n} (1 + lambda_t g_t).

Where E[g_t | past] <= 0 for every t and no factor is negative, W_n is a nonnegative supermartingale
that starts at 1, and so is a mixture of such gamblers. Then P(W_n >= 1/b for any n) <= b (Ville
1939). `betting` bets against "the mean is at least m", with the gains m - X_t. This module also
bets against the opposite,

    H0: E[X_t | past] <= m for every t,    X_t in [0, 1],

with the gains X_t - m. Gambler q of a fixed grid on (m, 20 m] bets lambda_q = (q - m) / (m (1 - m))
at every t. For X of 0 and 1 its wealth is the likelihood ratio of the rates q and m,

    prod_t (q / m)^X_t ((1 - q) / (1 - m))^(1 - X_t),

and E_n, the mean over the grid, is the evidence against H0. Neither independence nor a number of
episodes that is fixed beforehand is needed. E_n does not depend on the order of the X, and it does
not decrease where an X is larger: with lower bounds of the X in their place it is at most E_n.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import check_probability

Array = npt.NDArray[np.float64]

_REACH = 20.0
"""Largest rate of the grid, as a multiple of m."""
_GRID = 12
"""Number of rates in the grid. With 6 to 24 the median delays differ by less than their noise."""


def log_growth(bets: npt.ArrayLike, gains: npt.ArrayLike) -> Array:
    """Return log(1 + bet * gain), by which a bet changes the log of wealth; -inf at ruin."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log1p(np.multiply(bets, gains)), np.float64)


def log_mixture(logs: npt.ArrayLike, log_weights: npt.ArrayLike) -> Array:
    """Return log(sum_j w_j exp(logs_j)) over the first axis: the joint wealth of gamblers.

    Args:
        logs: (J, ...) logs of the gamblers' wealth.
        log_weights: (J,) logs of the shares with which they started, or one number for all.
    """
    logs = np.asarray(logs, np.float64)
    weights = np.broadcast_to(np.asarray(log_weights, np.float64), len(logs))
    shape = (-1, *[1] * (logs.ndim - 1))
    return np.asarray(np.logaddexp.reduce(logs + weights.reshape(shape), axis=0))


def alternatives(mean: float) -> Array:
    """Return the grid (J,) of rates q above a mean m in (0, 1), geometric up to 20 m.

    The largest is at most 1 - (1 - m) / 20, so that no score divides any wealth by more than 20.
    """
    check_probability("mean", mean)
    top = min(_REACH * mean, 1.0 - (1.0 - mean) / _REACH)
    return np.asarray(mean * (top / mean) ** (np.arange(1, _GRID + 1) / _GRID))


def against(mean: float, scores: npt.ArrayLike) -> Array:
    """Return what each score adds to the logs of wealth of the gamblers against "mean <= m".

    Args:
        mean: m, in (0, 1).
        scores: (...,) scores in [0, 1].

    Returns:
        (J, ...) the summands.
    """
    scores = np.asarray(scores, np.float64)
    bets = (alternatives(mean) - mean) / (mean * (1.0 - mean))
    return log_growth(bets.reshape(-1, *[1] * scores.ndim), scores - mean)


def log_evidence(logs: npt.ArrayLike) -> Array:
    """Return log E from the logs (J, ...) of the wealth of the gamblers of the grid."""
    return log_mixture(logs, -math.log(_GRID))


def evidence_path(mean: float, scores: npt.ArrayLike) -> Array:
    """Return log E_n (n,) against "the mean is at most m" after each of n scores (n,) in [0, 1].

    >>> path = evidence_path(0.01, [0.0] * 20 + [1.0] * 3)
    >>> bool(path[19] < 0.0), bool(path[-1] >= np.log(20.0))
    (True, True)
    """
    return log_evidence(np.cumsum(against(mean, scores), axis=1))
