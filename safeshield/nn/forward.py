"""The same networks on NumPy arrays: what runs when an agent or a shield is deployed.

One observation through a small network takes longer to enter PyTorch than to compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_CHUNK = 1024
Weights = Mapping[str, npt.NDArray[np.float32]]


def layers(params: Weights) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Return (weight, bias) of each layer in order: (members, in, out) and (members, 1, out)."""
    count = len(params) // 2
    return [(params[f"{i}.weight"], params[f"{i}.bias"]) for i in range(count)]


def forward_layers(
    stack: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    x: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Map (n, inputs) to (members, n, outputs) through ReLU layers."""
    if len(x) > 2 * _CHUNK:
        # Piece by piece the layers' outputs stay in the cache.
        pieces = [forward_layers(stack, x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)]
        return np.concatenate(pieces, axis=1)
    hidden = x
    for weight, bias in stack[:-1]:
        hidden = np.matmul(hidden, weight)
        hidden += bias
        np.maximum(hidden, 0.0, out=hidden)
    weight, bias = stack[-1]
    out: npt.NDArray[np.float32] = np.matmul(hidden, weight)
    out += bias
    return out


def forward(params: Weights, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Map (n, inputs) to (members, n, outputs): `nn.mlp.EnsembleMLP` without PyTorch.

    >>> params = {"0.weight": np.ones((1, 2, 1), np.float32), "0.bias": np.zeros((1, 1, 1), "f4")}
    >>> forward(params, np.ones((3, 2), np.float32)).shape
    (1, 3, 1)
    """
    return forward_layers(layers(params), x)
