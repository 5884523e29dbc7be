"""The flows of `nn.coupling` on NumPy arrays: what runs when an agent or a shield is deployed.

Layer i leaves the entries with index % 2 == i % 2 as they are, a, and carries the others, b:

    towards the base:   b <- exp(l) b + m,    towards the latent:   b <- (b - m) exp(-l)
    m, r = hyper(a, c),   l = r / (1 + |r / ln 0.001|)
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import Weights, forward_layers

_Float = npt.NDArray[np.float32]
_LEAST = math.log(1e-3)
"""zuko's bound on log scales."""


def coupling_shapes(
    features: int, context: int, hidden: tuple[int, ...], transforms: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by zuko's name, (out, in) and (out,).

    >>> coupling_shapes(3, 2, (8,), 1)["transforms.0.hyper.0.weight"]
    (8, 4)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(transforms):
        kept = len(range(i % 2, features, 2))
        sizes = (kept + context, *hidden, 2 * (features - kept))
        for j, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            shapes[f"transforms.{i}.hyper.{2 * j}.weight"] = (fan_out, fan_in)
            shapes[f"transforms.{i}.hyper.{2 * j}.bias"] = (fan_out,)
    return shapes


class CouplingForward:
    """A flow with its weights.

    Args:
        params: weights by zuko's names, as `nn.coupling.CouplingFlow.shapes` lists them.
        features: width of base and latent.
    """

    def __init__(self, params: Weights, features: int) -> None:
        count = 1 + max(int(name.split(".")[1]) for name in params)
        index = np.arange(features)
        self._parts = [
            (np.flatnonzero(index % 2 == i % 2), np.flatnonzero(index % 2 != i % 2), stack)
            for i, stack in enumerate(_stack(params, i) for i in range(count))
        ]

    def to_base(self, latent: _Float, context: _Float) -> tuple[_Float, _Float]:
        """Return u (n, features) of z (n, features), and log |det du/dz|, (n,)."""
        x, volume = latent.copy(), np.zeros(len(latent), np.float32)
        for kept, carried, stack in self._parts:
            shift, log_scale = _hyper(stack, x[:, kept], context)
            x[:, carried] = x[:, carried] * np.exp(log_scale) + shift
            volume += log_scale.sum(-1)
        return x, volume

    def to_latent(self, base: _Float, context: _Float) -> tuple[_Float, _Float]:
        """Return z (n, features) of u (n, features), and log |det dz/du|, (n,)."""
        x, volume = base.copy(), np.zeros(len(base), np.float32)
        for kept, carried, stack in reversed(self._parts):
            shift, log_scale = _hyper(stack, x[:, kept], context)
            x[:, carried] = (x[:, carried] - shift) * np.exp(-log_scale)
            volume -= log_scale.sum(-1)
        return x, volume


def normal_log_prob(x: _Float) -> _Float:
    """Return the log density of N(0, I) at x (n, features), in nats: (n,)."""
    out: _Float = -0.5 * (np.square(x) + np.float32(math.log(2.0 * math.pi))).sum(-1)
    return out


def _stack(params: Weights, layer: int) -> list[tuple[_Float, _Float]]:
    """Return weights (1, in, out) and biases (1, 1, out) of one layer's network, in order."""
    names = [name for name in params if name.split(".")[1] == str(layer)]
    places = sorted({int(name.split(".")[3]) for name in names})
    start = f"transforms.{layer}.hyper."
    return [
        (
            np.ascontiguousarray(params[f"{start}{at}.weight"].T)[None],
            params[f"{start}{at}.bias"][None, None],
        )
        for at in places
    ]


def _hyper(
    stack: list[tuple[_Float, _Float]], kept: _Float, context: _Float
) -> tuple[_Float, _Float]:
    out = forward_layers(stack, np.concatenate([kept, context], -1))[0]
    # For each carried entry one shift and one raw log scale, side by side.
    shift, raw = out[:, 0::2], out[:, 1::2]
    return shift, raw / (1.0 + np.abs(raw / np.float32(_LEAST)))
