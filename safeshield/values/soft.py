r"""Values regularised by KL to a behaviour mu: the soft backup and the policy that it induces.

    V(s)      = a log E_{x ~ mu(.|s)} [ exp(Q(s, x) / a) ]          a: temperature, units of return
    Q(s, x)   = E [ r + g (1 - terminated) V(s') ]
    pi*(x|s)  = mu(x|s) exp((Q(s, x) - V(s)) / a)

V(s) = max over pi of E_pi[Q(s, .)] - a KL(pi || mu), and pi* is where the maximum is reached: it
never acts outside mu's support. a to infinity evaluates mu, a to 0 takes the best action inside its
support.

Source: of Safe-Support Q-learning (arXiv 2604.25379) we know the abstract alone: a behaviour that
is supported on a safe set, a target regularised by KL to it, an induced policy. The formulas here
are derived: standard KL-regularised control (Todorov 2007, Fox et al. 2016, Levine 2018).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Table = npt.NDArray[np.float64]


def soft_value(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    """Return a log sum_i exp(log_mu_i + q_i / a) over the last axis: V(s).

    Args:
        q: (..., c) values of c actions, units of return.
        temperature: a, above 0, the same units.
        log_mu: (..., c) log weights of these actions that sum to 1: probabilities of all actions
            where they are discrete, 1/m each for m samples of mu (log-mean-exp). Minus infinity
            for what mu never does: such an action's q, whatever it is, does not count.

    >>> q = torch.tensor([0.0, 1.0])
    >>> half = torch.full((2,), 0.5).log()
    >>> [round(soft_value(q, a, half).item(), 3) for a in (1e-3, 1.0, 1e3)]
    [0.999, 0.62, 0.5]
    """
    return temperature * torch.logsumexp(_tilted(q, temperature, log_mu), -1)


def induced_log_policy(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    """Return log pi* (..., c) of the same actions: log mu + (q - V) / a, normalised.

    >>> log_pi = induced_log_policy(torch.zeros(3), 1.0, torch.tensor([0.25, 0.75, 0.0]).log())
    >>> log_pi.exp()
    tensor([0.2500, 0.7500, 0.0000])
    """
    return torch.log_softmax(_tilted(q, temperature, log_mu), -1)


def _tilted(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    # What mu never does must not count even where its q is not finite.
    return torch.where(log_mu == -torch.inf, log_mu, log_mu + q / temperature)


def soft_value_iteration(
    transitions: _Table,
    rewards: _Table,
    mu: _Table,
    *,
    temperature: float,
    discount: float,
    tolerance: float = 1e-12,
) -> tuple[_Table, _Table]:
    """Return the exact Q (S, A) and V (S,) of a finite problem: what learning is held against.

    Args:
        transitions: (S, A, S) probabilities of going on in s'; rows sum to less than 1 where an
            episode may terminate.
        rewards: (S, A) mean reward of a step.
        mu: (S, A) probabilities of the behaviour; rows sum to 1, zeros are never taken.
        temperature: a; 0 and infinity give the limits themselves: the best action in mu's support,
            and mu's own value.
        discount: g, in (0, 1).
        tolerance: error of V that is left, as a share of the error of 0.

    Raises:
        ValueError: rows of mu do not sum to 1, a or g is out of range.

    >>> stay = np.ones((1, 2, 1))
    >>> q, v = soft_value_iteration(
    ...     stay, np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), temperature=0.0, discount=0.5
    ... )
    >>> q.round(6).tolist(), v.round(6).tolist()
    ([[1.0, 2.0]], [2.0])
    """
    if not (mu >= 0).all() or not np.allclose(mu.sum(axis=1), 1.0):
        raise ValueError("mu must hold probabilities, at least 0, that sum to 1 in every row")
    if not temperature >= 0 or not 0 < discount < 1:
        raise ValueError(
            f"temperature must be at least 0 and discount lie between 0 and 1, got {temperature} "
            f"and {discount}"
        )
    value = np.zeros(len(mu))
    # A contraction: after this many steps what is left of the first error is the tolerance.
    for _ in range(math.ceil(math.log(tolerance) / math.log(discount))):
        value = _soft_values(rewards + discount * (transitions @ value), mu, temperature)
    return rewards + discount * (transitions @ value), value


def _soft_values(q: _Table, mu: _Table, temperature: float) -> _Table:
    if math.isinf(temperature):
        return np.asarray((mu * q).sum(axis=1))
    best = np.where(mu > 0, q, -np.inf).max(axis=1, keepdims=True)
    if temperature == 0:
        return np.asarray(best[:, 0])
    # Relative to the best, no exponential overflows; and log(1 + x) is exact where a is large.
    shifted = np.where(mu > 0, q - best, 0.0)
    rest = (mu * np.expm1(shifted / temperature)).sum(axis=1)
    return np.asarray(best[:, 0] + temperature * np.log1p(rest))
