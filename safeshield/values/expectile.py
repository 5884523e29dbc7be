"""Expectile regression, which approximates the minimum or maximum over the logged actions."""

from __future__ import annotations

import torch
from torch import Tensor


def expectile_loss(error: Tensor, weight: float, keep: Tensor | None = None) -> Tensor:
    """Return the mean of ``|weight - 1(error < 0)| error^2`` (Kostrikov et al. 2022, eq. 5).

    With ``error = target - prediction`` and a weight near 1 the prediction approaches the HIGHEST
    targets. Safety values need the LOWEST targets (FLRP eq. 8), which the same loss gives for
    ``error = prediction - target``.

    Where `keep` (batch,) is given, rows in which it is 0 do not count.

    >>> round(expectile_loss(torch.tensor([1.0, -1.0]), 0.9).item(), 6)
    0.5
    """
    loss = torch.where(error < 0, 1.0 - weight, weight) * error.square()
    return mean_where(loss, keep)


def mean_where(values: Tensor, keep: Tensor | None) -> Tensor:
    """Return the mean of values (batch,) over the rows in which `keep` (batch,) is 1, else 0.

    None keeps all rows.

    >>> mean_where(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0]))
    tensor(5.)
    """
    return values.mean() if keep is None else (values * keep).sum() / keep.sum().clamp(min=1.0)
