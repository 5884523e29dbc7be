"""The same networks on NumPy arrays: what runs when an agent or a shield is deployed.

One observation through a small network takes longer to enter PyTorch than to compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_CHUNK = 1024
Weights = Mapping[str, npt.NDArray[np.float32]]


def mlp_shapes(
    inputs: int, outputs: int, hidden: tuple[int, ...], members: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, by name, in the order of the layers.

    >>> mlp_shapes(3, 1, (8,))["0.weight"]
    (1, 3, 8)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise((inputs, *hidden, outputs))):
        shapes[f"{layer}.weight"] = (members, fan_in, fan_out)
        shapes[f"{layer}.bias"] = (members, 1, fan_out)
    return shapes


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


def largest_and_gradient(
    stack: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    x: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the largest member's one output (n,) and its gradient in x (n, inputs).

    As PyTorch's autograd has it: the slope of ReLU at 0 is 0.
    """
    if len(x) > 2 * _CHUNK:
        pieces = [largest_and_gradient(stack, x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)]
        return np.concatenate([a for a, _ in pieces]), np.concatenate([b for _, b in pieces])
    hidden, active = x, []
    for weight, bias in stack[:-1]:
        hidden = np.matmul(hidden, weight)
        hidden += bias
        active.append(hidden > 0)
        np.maximum(hidden, 0.0, out=hidden)
    weight, bias = stack[-1]
    out = (np.matmul(hidden, weight) + bias)[..., 0]
    largest = np.arange(len(out))[:, None] == out.argmax(axis=0)
    slope = largest[..., None] * weight.swapaxes(1, 2)
    for (weight, _), on in zip(reversed(stack[:-1]), reversed(active), strict=True):
        slope = np.matmul(slope * on, weight.swapaxes(1, 2))
    return out.max(axis=0), slope.sum(axis=0)


def forward(params: Weights, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Map (n, inputs) to (members, n, outputs): `nn.mlp.EnsembleMLP` without PyTorch.

    >>> params = {"0.weight": np.ones((1, 2, 1), np.float32), "0.bias": np.zeros((1, 1, 1), "f4")}
    >>> forward(params, np.ones((3, 2), np.float32)).shape
    (1, 3, 1)
    """
    return forward_layers(layers(params), x)
