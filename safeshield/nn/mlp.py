"""Ensembles of multilayer perceptrons as one batched computation, on tensors or on arrays.

A network is a frozen description, and its weights are a separate dict that is passed to it. An
update is therefore a pure function of the weights, a file contains the same dict, and an ensemble
of E members needs one product per layer and no loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from safeshield.nn.arrays import (
    A,
    Float,
    ParamsOf,
    affine,
    affine_relu,
    derived,
    largest,
    places,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""The shape of every weight of a network, by name."""
Params: TypeAlias = "dict[str, Tensor]"
"""The weights of one network: "0.weight" (members, in, out), "0.bias" (members, 1, out), ..."""
Networks: TypeAlias = "dict[str, Params]"
"""Networks by name."""
_CHUNK = 256


@dataclass(frozen=True)
class EnsembleMLP:
    """`members` ReLU perceptrons of one architecture.

    The activation is ReLU because distances and safety values have kinks. In our trials a smooth
    network had three times the error after the same number of updates.

    >>> import torch
    >>> net = EnsembleMLP(3, 1, hidden=(8, 8), members=2)
    >>> params = net.init(torch.Generator().manual_seed(0))
    >>> net(params, torch.zeros(5, 3)).shape
    torch.Size([2, 5, 1])
    >>> net({name: tensor.numpy() for name, tensor in params.items()}, np.zeros((5, 3), "f4")).shape
    (2, 5, 1)
    """

    inputs: int
    """Number of input features."""
    outputs: int
    """Number of outputs of each member."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    members: int = 1
    """Number of perceptrons."""

    @property
    def shapes(self) -> Shapes:
        """Shape of every weight, by name, in the order of the layers."""
        shapes: Shapes = {}
        widths = (self.inputs, *self.hidden, self.outputs)
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            shapes[f"{layer}.weight"] = (self.members, fan_in, fan_out)
            shapes[f"{layer}.bias"] = (self.members, 1, fan_out)
        return shapes

    def init(self, generator: torch.Generator) -> Params:
        """Return weights and biases drawn uniformly in +-1/sqrt(fan in), as PyTorch's layers do.

        The weights are on the generator's device.
        """
        return drawn(self.shapes, generator)

    def __call__(self, params: ParamsOf[A], x: A) -> A:
        """Map (batch, inputs), or (members, batch, inputs), to (members, batch, outputs)."""
        return run(layers(params), x)

    def on(self, params: ParamsOf[A]) -> Callable[[A], A]:
        """Return the network with these weights as a function of its inputs.

        The layers are looked up once, which saves time where the network runs several times.
        """
        return partial(run, layers(params))


def drawn(
    shapes: Shapes, generator: torch.Generator, share: Callable[[str], float] = lambda name: 1.0
) -> Params:
    """Return weights, each with the bias after it, drawn uniformly in +-share(name)/sqrt(fan in).

    `shapes` are the shapes of weights and biases by name, `generator` draws them, and `share` is a
    function of a weight's name.
    """
    import torch

    params: Params = {}
    bound = 1.0
    for name, shape in shapes.items():
        if name.endswith("weight"):
            bound = 1.0 / math.sqrt(shape[1])
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        params[name] = (2.0 * uniform - 1.0) * (bound * share(name))
    return params


@derived
def layers(params: ParamsOf[A]) -> list[tuple[A, A]]:
    """Return (weight, bias) of each layer in order: (members, in, out) and (members, 1, out).

    `params` are the weights of a network by name.
    """
    return [(params[f"{i}.weight"], params[f"{i}.bias"]) for i in range(len(params) // 2)]


def run(stack: Sequence[tuple[A, A]], x: A) -> A:
    """Return the outputs (members, n, outputs) of a network with ReLU layers.

    `stack` are its `layers`, and `x` are inputs (n, inputs) or (members, n, inputs).
    """
    if isinstance(x, np.ndarray):
        if x.shape[-2] > _CHUNK:
            # In pieces of this size the outputs of the layers stay in the processor's cache.
            pieces = [run(stack, part) for part in _pieces(x)]
            return np.concatenate(pieces, axis=1)
    elif x.dim() == 2:
        of_graph = getattr(x, "through", None)
        if of_graph is not None:  # a value of a graph (`nn.graph`), where a layer is one node
            return of_graph(stack)  # type: ignore[no-any-return]
        x = x.expand(len(stack[0][0]), *x.shape)
    for weight, bias in stack[:-1]:
        x = affine_relu(x, weight, bias)
    weight, bias = stack[-1]
    return affine(x, weight, bias)


class OneRow:
    """An ensemble of ReLU networks with one output each, arranged for a single input.

    For a single input the products are so small that the number of NumPy calls decides the time.
    The units of all members therefore lie in one row, and the first and the last layer are one
    product each. The bias b of the last hidden layer needs no addition, because

        max(z + b, 0) w = max(z, -b) w + b w.

    Args:
        first: (features, units) weights of the first layer. The units of the ensemble come first;
            those of other networks with the same input may follow.
        stack: The ensemble's `layers` after the first, at least one.
    """

    def __init__(self, first: Float, stack: Sequence[tuple[Float, Float]]) -> None:
        weight, bias = stack[-1]
        members, width, _ = weight.shape
        last = np.zeros((members * width, members), np.float32)
        for i in range(members):
            last[i * width : (i + 1) * width, i] = weight[i, :, 0]
        constant = bias.reshape(-1)
        # Of each hidden layer after the first: weights, the bias, and the row below which nothing
        # passes. The last of them has no bias of its own.
        middle: list[tuple[Float, Float | None, Float]] = []
        for weight, bias in stack[:-1]:
            row = bias.reshape(-1)
            middle.append((weight, row, np.zeros_like(row)))
        if middle:
            row = stack[-2][1].reshape(-1)
            middle[-1] = (stack[-2][0], None, -row)
            constant = constant + row @ last
        self.units: int = stack[0][0].shape[0] * stack[0][0].shape[1]
        """Number of units of the ensemble in the first layer."""
        self._first, self._middle, self._last = first, middle, last
        self._zeros = np.zeros(self.units, np.float32)
        self._constant: list[float] = constant.tolist()

    def __call__(self, features: Float, start: Float) -> tuple[list[float], Float]:
        """Return the outputs, and what the input gives to other networks.

        Args:
            features: (features,) the input.
            start: (units,) the biases of the first layer, and what other inputs add to it.

        Returns:
            The output of each member, and the results of the first layer (all units - `units`,) for
            the other networks, before their ReLU.
        """
        results = features.dot(self._first)
        results += start
        hidden = results[: self.units]
        np.maximum(hidden, self._zeros, out=hidden)
        for weight, bias, floor in self._middle:
            members, width, _ = weight.shape
            if members == 1:
                hidden = hidden.dot(weight[0])
            else:
                hidden = np.matmul(hidden.reshape(members, 1, width), weight).reshape(-1)
            if bias is not None:
                hidden += bias
            np.maximum(hidden, floor, out=hidden)
        out = hidden.dot(self._last).tolist()
        return [x + y for x, y in zip(out, self._constant, strict=True)], results[self.units :]


def largest_and_gradient(stack: Sequence[tuple[A, A]], x: A) -> tuple[A, A]:
    """Return the largest output over the members (n,) and its gradient in `x` (n, inputs).

    The network with the `layers` `stack` has one output. The slope of ReLU at 0 is 0, as in
    PyTorch's autograd.
    """
    if isinstance(x, np.ndarray) and len(x) > _CHUNK:
        pieces = [largest_and_gradient(stack, part) for part in _pieces(x)]
        return np.concatenate([a for a, _ in pieces]), np.concatenate([b for _, b in pieces])
    *inner, (weight, bias) = stack
    slope: Any
    hidden: Any = x if isinstance(x, np.ndarray) else x.expand(len(weight), *x.shape)
    active = []
    for each in inner:
        hidden = affine_relu(hidden, *each)
        active.append(hidden > 0)
    out = affine(hidden, weight, bias)[..., 0]
    best = places(out, len(out))[:, None] == out.argmax(0)
    slope = best[..., None] * weight.swapaxes(1, 2)
    for layer, on in zip(reversed(inner), reversed(active), strict=True):
        slope = (slope * on) @ layer[0].swapaxes(1, 2)
    return largest(out), slope.sum(0)


def _pieces(x: Float) -> list[Float]:
    return [x[..., i : i + _CHUNK, :] for i in range(0, x.shape[-2], _CHUNK)]


def hidden_widths(params: ParamsOf[A]) -> tuple[int, ...]:
    """Return the widths of the hidden layers of a perceptron with the weights `params`."""
    return tuple(int(weight.shape[2]) for weight, _ in layers(params)[:-1])


def tensors(networks: Networks) -> list[Tensor]:
    """Return a list of every weight, in the order of the names in `networks`."""
    return [tensor for params in networks.values() for tensor in params.values()]


def like(networks: Networks, values: list[Tensor]) -> Networks:
    """Return `values`, in the order of `tensors`, under the names that `networks` has."""
    rest = iter(values)
    return {name: {key: next(rest) for key in params} for name, params in networks.items()}
