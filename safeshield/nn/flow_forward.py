"""Flows on NumPy arrays, both ways: noise to actions, and actions back to noise.

Forward it is `nn.flow.euler_sample`, x <- x + v(s, x, i/K) / K for i = 0 .. K - 1. Backward the
same field is followed from t = 1 to t = 0 by explicit Euler steps of the same size:

    x <- x - v(s, x, i/K) / K   for i = K .. 1

Both follow dx/dt = v to first order in 1/K; one is not the other's exact inverse. (Solving each
forward step for its start is exact and costs three times as much; on the boat it told shown from
never-shown actions no better.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers

_Float = npt.NDArray[np.float32]
_Stack = list[tuple[_Float, _Float]]


def to_actions(stack: _Stack, inputs: _Float, noise: _Float, steps: int) -> _Float:
    """Carry noise (n, act) to actions in [-1, 1].

    Args:
        stack: layers of the velocity field, from `nn.forward.layers`.
        inputs: (n, obs) features of the observations.
        noise: (n, act) z.
        steps: K.
    """
    return np.clip(_follow(stack, inputs, noise, range(steps), steps), -1.0, 1.0)


def to_noise(stack: _Stack, inputs: _Float, actions: _Float, steps: int) -> _Float:
    """Carry actions (n, act) in [-1, 1] back to noise; arguments as in `to_actions`."""
    return _follow(stack, inputs, actions, range(steps, 0, -1), -steps)


def _follow(stack: _Stack, inputs: _Float, start: _Float, times: range, signed: int) -> _Float:
    width = inputs.shape[1]
    table = np.empty((len(inputs), width + start.shape[1] + 1), np.float32)
    table[:, :width] = inputs
    x = table[:, width:-1]
    x[...] = start
    for i in times:
        table[:, -1] = i / abs(signed)
        x += forward_layers(stack, table)[0] * np.float32(1.0 / signed)
    return x.copy()
