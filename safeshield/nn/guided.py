r"""Flow matching with labels and classifier-free guidance (R2PAC appendix C, eq. 18 to 21).

One velocity field learns all actions (no label), good ones (o = 1) and others (o = 0):

    x_t = (1 - t) z + t a,    || v(s, x_t, t, o) - (a - z) ||^2 -> min,    o dropped at random

Sampling extrapolates from the field without a label towards, and for w > 1 beyond, the good one:

    v = (1 - w) v(s, x, t, none) + w v(s, x, t, 1),    x <- x + v / K,   K Euler steps

(Algorithm 2 prints n/N for the length of a step. This is a misprint: steps of 1/N lead from t = 0
to t = 1.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeshield.nn.arrays import A, ParamsOf, concat, lerp, tiled, zeros
from safeshield.nn.flow import Path
from safeshield.nn.mlp import EnsembleMLP, Params

if TYPE_CHECKING:
    from torch import Tensor

LABELS = 2
"""Number of features of a label: (1, 0) good, (0, 1) not good, (0, 0) none."""


def guided_network(observation: int, action: int, hidden: tuple[int, ...]) -> EnsembleMLP:
    """Return the description of the network v(s, x, t, o), whose output is the velocity of x.

    Args:
        observation: Number of features of an observation s.
        action: Number of entries of an action x.
        hidden: Widths of the hidden layers.
    """
    return EnsembleMLP(observation + action + 1 + LABELS, action, hidden)


def guided_loss(
    network: EnsembleMLP,
    params: Params,
    observations: Tensor,
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the weighted squared error, summed over an action's entries, averaged over the batch.

    Args:
        network: Velocity field, made by `guided_network`.
        params: Weights of the network.
        observations: (batch, obs) normalised observations.
        actions: (batch, act) actions, in [-1, 1].
        noise: (batch, act) z, standard normal.
        time: (batch, 1) t, uniform in [0, 1].
        labels: (batch, 2) labels o, as `LABELS` encodes them.
        weights: (batch, act) weight of each entry.
    """
    point = noise.lerp(actions, time)
    inputs = concat([observations, point, time, labels])
    error = (network(params, inputs)[0] - (actions - noise)).square()
    return (weights * error).sum(-1).mean()


def guided_sample(
    network: EnsembleMLP,
    params: ParamsOf[A],
    observations: A,
    noise: A,
    steps: int,
    guidance: float,
) -> A:
    """Return actions (batch, act) in [-1, 1], computed from noise along the guided field.

    The field without a label and the field of good actions are computed in one pass. With guidance
    0 only the field without a label is computed.

    Args:
        network: Velocity field, made by `guided_network`.
        params: Weights of the network.
        observations: (batch, obs) normalised observations.
        noise: (batch, act) z, standard normal.
        steps: Number K of Euler steps.
        guidance: Weight w of the field of good actions.
    """
    count = len(noise)
    branches = 2 if guidance else 1
    labels = zeros(noise, branches * count, LABELS)
    labels[count:, 0] = 1.0
    field = network.on(params)
    path = Path(tiled(observations, branches), tiled(noise, branches), labels)
    for i in range(steps):
        velocity = field(path.rows(i / steps))[0]
        if guidance:
            velocity = tiled(lerp(velocity[:count], velocity[count:], guidance), branches)
        path.move(velocity, steps)
    reached: A = path.x[:count]
    return reached.clip(-1.0, 1.0)
