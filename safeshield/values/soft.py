r"""Values regularised by the KL divergence to a behaviour mu: soft backup and induced policy.

    V(s)      = a log E_{x ~ mu(.|s)} [ exp(Q(s, x) / a) ]          a: temperature, units of return
    Q(s, x)   = E [ r + g (1 - terminated) V(s') ]
    pi*(x|s)  = mu(x|s) exp((Q(s, x) - V(s)) / a)

V(s) = max over pi of E_pi[Q(s, .)] - a KL(pi || mu), and pi* attains this maximum. It never acts
outside mu's support. As a goes to infinity, V becomes the value of mu itself. As a goes to 0, V
becomes the value of the best action inside mu's support.

Source: only the abstract of Safe-Support Q-learning (arXiv 2604.25379) was available. It names a
behaviour that is supported on a safe set, a target regularised by KL to this behaviour, and an
induced policy. The formulas here are derived from standard KL-regularised control (Todorov 2007,
Fox et al. 2016, Levine 2018).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Table = npt.NDArray[np.float64]


def soft_value(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    """Return V(s) = a log sum_i exp(log_mu_i + q_i / a), the sum over the last axis.

    Args:
        q: (..., c) values of c actions, in units of return.
        temperature: a, above 0, in the same units.
        log_mu: (..., c) logarithms of weights of these actions that sum to 1. For discrete actions
            the weights are the probabilities of all actions, and for m samples of mu they are 1/m
            each (log-mean-exp). The weight of an action that mu never takes is minus infinity. Its
            q, whatever it is, does not count.

    >>> q = torch.tensor([0.0, 1.0])
    >>> half = torch.full((2,), 0.5).log()
    >>> [round(soft_value(q, a, half).item(), 3) for a in (1e-3, 1.0, 1e3)]
    [0.999, 0.62, 0.5]
    """
    return temperature * torch.logsumexp(_tilted(q, temperature, log_mu), -1)


def induced_log_policy(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    """Return log pi* (..., c) of c actions, that is log mu + (q - V) / a, normalised.

    Args:
        q: (..., c) values of the actions.
        temperature: Temperature a.
        log_mu: (..., c) log probabilities of the actions under mu.

    >>> log_pi = induced_log_policy(torch.zeros(3), 1.0, torch.tensor([0.25, 0.75, 0.0]).log())
    >>> log_pi.exp()
    tensor([0.2500, 0.7500, 0.0000])
    """
    return torch.log_softmax(_tilted(q, temperature, log_mu), -1)


def _tilted(q: Tensor, temperature: float, log_mu: Tensor) -> Tensor:
    # An action that mu never takes must not count even where its q is not finite.
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
    """Return the exact Q (S, A) and V (S,) of a finite problem, as a reference for learning.

    Args:
        transitions: (S, A, S) probabilities that the episode continues in s'; rows sum to less
            than 1 where an episode may terminate.
        rewards: (S, A) mean reward of a step.
        mu: (S, A) probabilities of the behaviour; rows sum to 1, and an action of probability 0 is
            never taken.
        temperature: a, in units of return. The values 0 and infinity give the limits: the value of
            the best action in mu's support, and the value of mu itself.
        discount: g, in (0, 1).
        tolerance: Remaining error of V, as a share of the error of V = 0.

    Raises:
        ValueError: A row of mu does not sum to 1, or a or g is out of range.

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
    # The backup contracts errors by g, so this many steps reduce the first error to the tolerance.
    for _ in range(math.ceil(math.log(tolerance) / math.log(discount))):
        value = _soft_values(rewards + discount * (transitions @ value), mu, temperature)
    return rewards + discount * (transitions @ value), value


def _soft_values(q: _Table, mu: _Table, temperature: float) -> _Table:
    if math.isinf(temperature):
        return np.asarray((mu * q).sum(axis=1))
    best = np.where(mu > 0, q, -np.inf).max(axis=1, keepdims=True)
    if temperature == 0:
        return np.asarray(best[:, 0])
    # Relative to the best q no exponential overflows, and expm1 and log1p stay exact for large a.
    shifted = np.where(mu > 0, q - best, 0.0)
    rest = (mu * np.expm1(shifted / temperature)).sum(axis=1)
    return np.asarray(best[:, 0] + temperature * np.log1p(rest))
