r"""Flow matching with labels and classifier-free guidance (R2PAC appendix C, eq. 18 to 21).

One velocity field learns what is done (no label), what was good (o = 1) and what was not (o = 0):

    x_t = (1 - t) z + t a,    || v(s, x_t, t, o) - (a - z) ||^2 -> min,    o dropped now and then

and is followed beyond what was good, away from what is done on average:

    v = (1 - w) v(s, x, t, none) + w v(s, x, t, 1),    x <- x + v / K,   K Euler steps

(Algorithm 2 prints n/N for the step's length, a misprint: steps of 1/N lead from t = 0 to 1.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeshield.nn.arrays import A, ParamsOf, concat, lerp, tiled, zeros
from safeshield.nn.flow import Path
from safeshield.nn.mlp import EnsembleMLP, Params

if TYPE_CHECKING:
    from torch import Tensor

LABELS = 2
"""Features of a label: (1, 0) good, (0, 1) not good, (0, 0) none."""


def guided_network(observation: int, action: int, hidden: tuple[int, ...]) -> EnsembleMLP:
    """Describe v(s, x, t, o): inputs (s, x, t, o), output the velocity of x."""
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
    """Return the weighted error, summed over the action's entries, averaged over the batch.

    Args:
        network: made by `guided_network`.
        params: its weights.
        observations: (batch, obs).
        actions: (batch, act) in [-1, 1].
        noise: (batch, act) z, standard normal.
        time: (batch, 1) t, uniform in [0, 1].
        labels: (batch, 2) o.
        weights: (batch, act) how much each entry counts.
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
    """Carry noise (batch, act) along the guided field in `steps` steps; clipped to [-1, 1].

    Both branches are one pass; guidance 0 asks the branch without a label alone.
    """
    count = len(noise)
    branches = 2 if guidance else 1
    labels = zeros(noise, branches * count, LABELS)
    labels[count:, 0] = 1.0
    path = Path(tiled(observations, branches), tiled(noise, branches), labels)
    for i in range(steps):
        velocity = network(params, path.rows(i / steps))[0]
        if guidance:
            velocity = tiled(lerp(velocity[:count], velocity[count:], guidance), branches)
        path.move(velocity, steps)
    reached: A = path.x[:count]
    return reached.clip(-1.0, 1.0)
