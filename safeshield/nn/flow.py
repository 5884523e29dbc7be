"""Flow matching: a velocity field that carries noise to the logged actions, and back.

    x_t = (1 - t) z + t a,   z ~ N(0, I),  t ~ U(0, 1):   E || v(s, x_t, t) - (a - z) ||^2 -> min
    actions: x_0 = z,  x <- x + v(s, x, i/K) / K  for i = 0 .. K - 1
    noise:   x_1 = a,  x <- x - v(s, x, i/K) / K  for i = K .. 1

Both directions follow dx/dt = v to first order in 1/K. They are not exact inverses of each other.
(Solving each forward step for its start is exact and takes three times as long. On the boat it did
not separate shown from never-shown actions any better.)

Source: SafeFQL (arXiv 2603.15136), after Flow Q-Learning (Park et al. 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from safeshield.nn.arrays import A, ParamsOf, concat, zeros
from safeshield.nn.mlp import EnsembleMLP, Params

if TYPE_CHECKING:
    from torch import Tensor


def velocity_network(observation: int, action: int, hidden: tuple[int, ...]) -> EnsembleMLP:
    """Return the description of the network v(s, x, t), whose output is the velocity of x.

    Args:
        observation: Number of features of an observation s.
        action: Number of entries of an action x.
        hidden: Widths of the hidden layers.
    """
    return EnsembleMLP(observation + action + 1, action, hidden)


def flow_matching_loss(
    network: EnsembleMLP,
    params: Params,
    observations: Tensor,
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the flow matching error, summed over the action's entries, averaged over the batch.

    Args:
        network: Velocity field, made by `velocity_network`.
        params: Weights of the network.
        observations: (batch, obs) normalised observations.
        actions: (batch, act) logged actions, in [-1, 1].
        noise: (batch, act) z, standard normal.
        time: (batch, 1) t, uniform in [0, 1].
        weights: (batch,) weight of each action; all equal by default.
    """
    point = noise.lerp(actions, time)
    velocity = network(params, concat([observations, point, time]))[0]
    error = (velocity - (actions - noise)).square().sum(-1)
    return (error if weights is None else weights * error).mean()


def euler_sample(
    network: EnsembleMLP, params: ParamsOf[A], observations: A, noise: A, steps: int
) -> A:
    """Return actions (batch, act) in [-1, 1], to which the field carries noise.

    Args:
        network: Description of the velocity field.
        params: Its weights.
        observations: (batch, obs) normalised observations.
        noise: (batch, act) standard normal numbers.
        steps: Number of Euler steps.
    """
    return _follow(network, params, observations, noise, range(steps), steps).clip(-1.0, 1.0)


def euler_noise(
    network: EnsembleMLP, params: ParamsOf[A], observations: A, actions: A, steps: int
) -> A:
    """Return the noise (batch, act) that the field carries to given actions.

    Args:
        network: Description of the velocity field.
        params: Its weights.
        observations: (batch, obs) normalised observations.
        actions: (batch, act) actions in [-1, 1].
        steps: Number of Euler steps, back from the actions to the noise.
    """
    return _follow(network, params, observations, actions, range(steps, 0, -1), -steps)


def _follow(
    network: EnsembleMLP,
    params: ParamsOf[A],
    observations: A,
    start: A,
    times: range,
    signed: int,
) -> A:
    field, path = network.on(params), Path(observations, start)
    for i in times:
        path.move(field(path.rows(i / abs(signed)))[0], signed)
    return path.x


class Path(Generic[A]):
    """Points x that move along a velocity field, with the other inputs of the field's network.

    With arrays, all inputs are columns of one table, and x is moved in place. With tensors, nothing
    is changed in place, because autograd needs the values before each step.

    Args:
        inputs: (n, obs) states s.
        start: (n, act) initial points x.
        tail: (n, k) further input columns.
    """

    def __init__(self, inputs: A, start: A, *tail: A) -> None:
        self.x: A = start
        self._columns: Any = [inputs, start, zeros(start, start.shape[0], 1), *tail]
        self._table: A | None = None
        if isinstance(start, np.ndarray):
            at, end = inputs.shape[1], inputs.shape[1] + start.shape[1]
            table = np.concatenate(self._columns, axis=-1)
            self._table, self.x, self._time = table, table[:, at:end], table[:, end]

    def rows(self, time: float) -> A:
        """Return the inputs of the network at time t, rows (s, x, t, tail); valid until x moves."""
        if self._table is None:
            inputs, _, times, *tail = self._columns
            joined: A = concat([inputs, self.x, times + time, *tail])
            return joined
        self._time[:] = time
        return self._table

    def move(self, velocity: A, steps: int) -> None:
        """Move x along the velocity (n, act) for the time 1 / steps."""
        if isinstance(velocity, np.ndarray):
            self.x += velocity * np.float32(1.0 / steps)
        else:
            self.x = self.x + velocity / steps
