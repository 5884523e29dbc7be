"""`nn.guided.guided_sample` on NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers

_Float = npt.NDArray[np.float32]


def guided_actions(
    stack: list[tuple[_Float, _Float]],
    inputs: _Float,
    noise: _Float,
    steps: int,
    guidance: float,
) -> _Float:
    """Carry noise (n, act) to actions in [-1, 1].

    Args:
        stack: layers of the velocity field, from `nn.forward.layers`.
        inputs: (n, obs) features of the observations.
        noise: (n, act) z.
        steps: K; each is one pass of 2 n rows (n without guidance).
        guidance: w; 0: the branch without a label alone.
    """
    count, width = inputs.shape
    action = noise.shape[1]
    branches = 2 if guidance else 1
    table = np.zeros((branches, count, width + action + 3), np.float32)
    table[..., :width] = inputs
    if guidance:
        table[1, :, -2] = 1.0
    x = noise.astype(np.float32)
    rows = table.reshape(branches * count, table.shape[-1])
    for i in range(steps):
        table[..., width : width + action] = x
        table[..., width + action] = i / steps
        field = forward_layers(stack, rows)[0].reshape(branches, count, action)
        velocity = field[0]
        if guidance:
            velocity = velocity + np.float32(guidance) * (field[1] - field[0])
        x = x + velocity * np.float32(1.0 / steps)
    return np.clip(x, -1.0, 1.0)
