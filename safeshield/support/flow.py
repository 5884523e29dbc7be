"""The behaviour's flow on NumPy arrays, both ways: noise to actions, and actions back to noise.

Forward it is `nn.flow.euler_sample`, x <- x + v(s, x, i/K) / K for i = 0 .. K - 1. Backward the
same field is followed from t = 1 to t = 0 by explicit Euler steps of the same size:

    x <- x - v(s, x, i/K) / K   for i = K .. 1

Both follow dx/dt = v to first order in 1/K; one is not the other's exact inverse. (Solving each
forward step for its start is exact and costs three times as much; on the boat it told shown from
never-shown actions no better.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers

if TYPE_CHECKING:
    from safeshield.shield.model import SafetyModel

_Float = npt.NDArray[np.float32]


def to_actions(model: SafetyModel, inputs: _Float, noise: _Float) -> _Float:
    """Carry noise (n, act) to actions in [-1, 1], for features `inputs` (n, obs)."""
    steps = model.flow_steps
    return np.clip(_follow(model, inputs, noise, range(steps), 1.0 / steps), -1.0, 1.0)


def to_noise(model: SafetyModel, inputs: _Float, actions: _Float) -> _Float:
    """Carry actions (n, act) in [-1, 1] back to noise, for features `inputs` (n, obs)."""
    steps = model.flow_steps
    return _follow(model, inputs, actions, range(steps, 0, -1), -1.0 / steps)


def _follow(
    model: SafetyModel, inputs: _Float, start: _Float, times: range, length: float
) -> _Float:
    width = inputs.shape[1]
    table = np.empty((len(inputs), width + start.shape[1] + 1), np.float32)
    table[:, :width] = inputs
    x = table[:, width:-1]
    x[...] = start
    for i in times:
        table[:, -1] = i / model.flow_steps
        x += np.float32(length) * forward_layers(model.behaviour_layers, table)[0]
    return x.copy()
