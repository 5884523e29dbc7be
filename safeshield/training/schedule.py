"""Number of updates in each phase, and the course of the learning rates."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

VALUES_END = 0.8
"""Share of the critics' updates after which V is fixed while the advantages are trained further."""


def phase_steps(steps: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Return the numbers of updates into which these shares divide `steps` updates.

    Each is at least one, and the last phase gets the rest.

    >>> phase_steps(10, (0.5, 0.2, 0.3)), phase_steps(3, (0.98, 0.01, 0.01))
    ((5, 2, 3), (1, 1, 1))
    """
    counts: list[int] = [max(1, round(share * steps)) for share in shares[:-1]]
    counts[0] = min(counts[0], steps - sum(counts[1:]) - 1)
    return (*counts, steps - sum(counts))


def learning_rate(base: float, count: Tensor, steps: int, end: float = 1.0) -> Tensor:
    """Return the learning rate, which is constant first and then falls linearly to base / 50.

    The rate is constant until update ``end * steps / 2`` and reaches base / 50 at about ``end *
    steps``.

    Args:
        base: Learning rate at the start.
        count: () number of updates made so far.
        steps: Total number of updates.
        end: Share of the updates after which the rate stays at its lowest value.
    """
    progress = count / (steps * end)
    return base * torch.clamp(2.0 - 2.0 * progress, 0.02, 1.0)


def stages(steps: int, *windows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the stages of `steps` updates during which the entry of every list stays the same.

    Each list of `windows` divides the updates into equal parts, one for each of its entries. A
    stage is its number of updates, followed by the current entry of each list.

    >>> stages(8, (4, 1), (3, 2, 2, 1))
    [(2, 4, 3), (2, 4, 2), (2, 1, 2), (2, 1, 1)]
    """
    # The edges are rounded up, so that the expression below assigns the first step of part i to
    # part i.
    edges = sorted(
        {math.ceil(i * steps / len(window)) for window in windows for i in range(len(window) + 1)}
    )
    return [
        (stop - start, *(window[start * len(window) // steps] for window in windows))
        for start, stop in itertools.pairwise(edges)
    ]


def critic_rates(
    base: float, count: Tensor, total: int, names: tuple[str, ...], values: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the learning rate of each network; it is 0 for `values` in the last fifth of updates.

    Args:
        base: Learning rate at the start.
        count: () number of updates made so far.
        total: Total number of updates.
        names: Names of the networks.
        values: Names of those networks that are state values.
    """
    early = learning_rate(base, count, total, VALUES_END)
    still = torch.where(count < VALUES_END * total, early, torch.zeros_like(early))
    late = learning_rate(base, count, total)
    return {name: still if name in values else late for name in names}
