"""How many updates each phase has, and how the learning rates fall in it."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

VALUES_END = 0.8
"""Share of the critics' updates after which V stands still while the advantages catch up."""


def phase_steps(steps: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Share out `steps` updates, at least one to each part; the last gets the rest.

    >>> phase_steps(10, (0.5, 0.2, 0.3)), phase_steps(3, (0.98, 0.01, 0.01))
    ((5, 2, 3), (1, 1, 1))
    """
    counts: list[int] = [max(1, round(share * steps)) for share in shares[:-1]]
    counts[0] = min(counts[0], steps - sum(counts[1:]) - 1)
    return (*counts, steps - sum(counts))


def learning_rate(base: float, count: Tensor, steps: int, end: float = 1.0) -> Tensor:
    """Constant until half of ``end * steps``, then linearly down to a fiftieth at that point.

    Args:
        base: the rate at the start.
        count: () updates made.
        steps: updates in all.
        end: share of them after which the rate stays at its lowest.
    """
    progress = count / (steps * end)
    return base * torch.clamp(2.0 - 2.0 * progress, 0.02, 1.0)


def stages(steps: int, *windows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Cut `steps` updates wherever one of the lists moves on: (updates, an entry of each).

    >>> stages(8, (4, 1), (3, 2, 2, 1))
    [(2, 4, 3), (2, 4, 2), (2, 1, 2), (2, 1, 1)]
    """
    # Rounded up, so that the first step of part i counts as part i below.
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
    """Return each network's learning rate: those of `values` stand still for the last fifth.

    Args:
        base: the rate at the start.
        count: () updates made.
        total: updates in all.
        names: of the networks.
        values: which of them are state values.
    """
    early = learning_rate(base, count, total, VALUES_END)
    still = torch.where(count < VALUES_END * total, early, torch.zeros_like(early))
    late = learning_rate(base, count, total)
    return {name: still if name in values else late for name in names}
