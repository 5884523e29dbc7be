"""Operations that differ between NumPy arrays and tensors, so that each network is written once.

A network runs on tensors in training and on NumPy arrays in deployment, because converting a single
observation to a tensor takes longer than a small network takes to compute. Each function here
accepts arrays or tensors and returns the same kind. PyTorch is imported only for tensors.

(The package array-api-compat does the same for the operations of the array standard. Its look-up of
the namespace takes as long as two layers of a small network take for one observation. The standard
also lacks the operations that matter most here: a batched product with a bias, and products in
place.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Float: TypeAlias = npt.NDArray[np.float32]
A = TypeVar("A", Float, "Tensor")
"""Float32 arrays, or tensors."""
B = TypeVar("B", npt.NDArray[np.floating[Any]], "Tensor")
"""Arrays of any precision, or tensors."""
C = TypeVar("C", Float, "Tensor", float)
"""Float32 arrays, tensors, or single numbers."""
ParamsOf: TypeAlias = Mapping[str, A]
"""Weights of one network as arrays or tensors, by name."""
NetworksOf: TypeAlias = Mapping[str, ParamsOf[A]]
"""Networks by name."""
Weights: TypeAlias = Mapping[str, Float]
"""Weights of one network as arrays, by name."""
F = TypeVar("F", bound=Callable[..., Any])


# -- deployed weights ------------------------------------------------------------------------------


class Deployed(dict[str, Float]):
    """The weights of a deployed network. They must not change.

    Attributes:
        memo: Results of functions with the decorator `derived`, by function.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.memo: dict[Callable[..., Any], Any] = {}

    def __reduce__(self) -> tuple[type[Deployed], tuple[dict[str, Float]]]:
        # The memo is not pickled; it is computed again after unpickling.
        return Deployed, (dict(self),)


def deployed(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Deployed]:
    """Return the weights of networks as arrays."""
    return {
        name: Deployed({key: tensor.detach().cpu().numpy() for key, tensor in params.items()})
        for name, params in networks.items()
    }


def derived(make: F) -> F:
    """Decorate a function of one network's weights, so that its result is stored with the weights.

    The result is stored only for `Deployed` weights, which do not change. `make` is the function;
    the decorated function is returned.
    """

    def look_up(params: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if not isinstance(params, Deployed):
            return make(params)
        made = params.memo.get(make)
        if made is None:
            made = params.memo[make] = make(params)
        return made

    look_up.__doc__ = make.__doc__
    return look_up  # type: ignore[return-value]


@cache
def _zero_row(width: int) -> Float:
    """Return `width` zeros, for ReLU; NumPy's maximum is slower with a single number."""
    zeros = np.zeros(width, np.float32)
    zeros.flags.writeable = False
    return zeros


# -- layers ----------------------------------------------------------------------------------------


def affine(x: A, weight: A, bias: A) -> A:
    """Return x W + b, (members, n, out).

    `x` is (members, n, in), `weight` is W (members, in, out), and `bias` is b (members, 1, out).
    """
    if isinstance(x, np.ndarray):
        out: Float = np.matmul(x, weight)
        out += bias
        return out
    if weight.shape[-1] == 1 < weight.shape[0]:
        # For one output of several members, PyTorch's batched product takes five times as long.
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    return bias.baddbmm(x, weight)


def affine_relu(x: A, weight: A, bias: A) -> A:
    """Return max(x W + b, 0), for the arguments `x`, `weight` and `bias` of `affine`."""
    if isinstance(x, np.ndarray):
        out: Float = np.matmul(x, weight)
        out += bias
        return np.maximum(out, _zero_row(out.shape[-1]), out=out)
    # In place, which autograd allows: the product's gradient does not need its result.
    return bias.baddbmm(x, weight).relu_()


def transposed(weight: A) -> A:
    """Return the matrix `weight` (out, in) as (in, out), in the layout fastest for products."""
    return np.ascontiguousarray(weight.T) if isinstance(weight, np.ndarray) else weight.T


# -- functions of each entry -----------------------------------------------------------------------


def relu(x: C) -> C:
    """Return max(x, 0); NaN stays NaN."""
    if isinstance(x, float):
        return max(x, 0.0)
    return np.maximum(x, 0.0) if isinstance(x, np.ndarray) else x.relu()


def exp(x: A) -> A:
    """Return the exponential of `x`, entry by entry."""
    return np.exp(x) if isinstance(x, np.ndarray) else x.exp()


def tanh(x: A) -> A:
    """Return the hyperbolic tangent of `x`, entry by entry."""
    return np.tanh(x) if isinstance(x, np.ndarray) else x.tanh()


def nan_to_zero(x: A) -> A:
    """Return x with 0 for NaN, and the largest finite numbers for infinite ones."""
    return np.nan_to_num(x) if isinstance(x, np.ndarray) else x.nan_to_num()


def lerp(start: A, end: A, share: float) -> A:
    """Return start + share (end - start)."""
    if isinstance(start, np.ndarray):
        out: Float = start + np.float32(share) * (end - start)
        return out
    return start.lerp(end, share)


# -- rows and columns ------------------------------------------------------------------------------


def concat(parts: Sequence[A]) -> A:
    """Return the arrays `parts` joined along the last axis."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts, axis=-1)
    import torch

    return torch.cat(list(parts), -1)


def zeros(like: A, rows: int, columns: int) -> A:
    """Return zeros (rows, columns) of the kind of `like`."""
    if isinstance(like, np.ndarray):
        return np.zeros((rows, columns), np.float32)
    return like.new_zeros(rows, columns)


def tiled(x: A, times: int) -> A:
    """Return all rows of x (n, width), repeated `times` times: (times * n, width)."""
    # For few rows np.tile takes several times as long as np.concatenate.
    return np.concatenate([x] * times) if isinstance(x, np.ndarray) else x.repeat(times, 1)


def in_each(like: A, table: A) -> A:
    """Return the matrix `table` (c, width) once for each of n rows of `like`: (n, c, width)."""
    if isinstance(like, np.ndarray):
        return np.broadcast_to(table, (len(like), *table.shape))
    # A value of a graph (`nn.graph`) does not know its number of rows.
    of_graph = getattr(like, "in_each", None)
    out: A = table.expand(len(like), *table.shape) if of_graph is None else of_graph(table)
    return out


def interleaved(even: A, odd: A) -> A:
    """Return a matrix whose columns 0, 2, ... are `even` and 1, 3, ... are `odd`."""
    width = even.shape[1] + odd.shape[1]
    if isinstance(even, np.ndarray):
        out = np.empty((len(even), width), np.float32)
        out[:, 0::2], out[:, 1::2] = even, odd
        return out
    import torch

    halves = even, odd
    return torch.cat([halves[j % 2][:, j // 2, None] for j in range(width)], -1)


def places(like: A, count: int) -> Any:  # noqa: ANN401
    """Return the integers 0, 1, ..., count - 1 as the kind of array that `like` is."""
    if isinstance(like, np.ndarray):
        return np.arange(count)
    import torch

    return torch.arange(count, device=like.device)


def largest(x: A) -> A:
    """Return the maximum of `x` over the first axis."""
    if isinstance(x, np.ndarray):
        out: Float = x.max(axis=0)
        return out
    return x.amax(0)


def smallest(x: A) -> A:
    """Return the minimum of `x` over the first axis."""
    if isinstance(x, np.ndarray):
        out: Float = x.min(axis=0)
        return out
    return x.amin(0)


def log_softmax(logits: B) -> B:
    """Return the log probabilities (..., choices) that belong to `logits` (..., choices).

    At least one logit of each row must be finite.

    >>> log_softmax(np.log(np.array([[1.0, 3.0]], np.float32))).round(3)
    array([[-1.386, -0.288]], dtype=float32)
    """
    if isinstance(logits, np.ndarray):
        shifted = logits - logits.max(axis=-1, keepdims=True)
        out: B = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return out
    return logits.log_softmax(-1)
