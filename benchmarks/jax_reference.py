"""One update of flow Q-learning in JAX, compiled as a whole, as a reference for speed.

The update is that of FQL (Park, Li and Levine, "Flow Q-learning", 2025), with the settings of its
paper apart from the sizes: two critics with layer normalisation and GELU, a flow that clones the
behaviour, a one-step actor that is distilled from 10 Euler steps of the flow and maximises the mean
of the critics, Adam, and slow copies of the critics. It needs ``pip install jax optax``, which this
package does not depend on. `benchmarks/speed.py jax` times it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax

EULER_STEPS = 10
DISTILLATION = 10.0
DISCOUNT = 0.99
POLYAK = 0.005
Params = Any
Batch = dict[str, jax.Array]


def _init(key: jax.Array, sizes: tuple[int, ...], normalised: bool) -> Params:
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        key, draw = jax.random.split(key)
        bound = (3.0 / fan_in) ** 0.5
        layer = {
            "w": jax.random.uniform(draw, (fan_in, fan_out), minval=-bound, maxval=bound),
            "b": jnp.zeros(fan_out),
        }
        if normalised:
            layer |= {"scale": jnp.ones(fan_out), "shift": jnp.zeros(fan_out)}
        layers.append(layer)
    return layers


def _run(layers: Params, *inputs: jax.Array) -> jax.Array:
    x = jnp.concatenate(inputs, -1)
    for layer in layers[:-1]:
        x = jax.nn.gelu(x @ layer["w"] + layer["b"])
        if "scale" in layer:
            x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * layer["scale"] + layer["shift"]
    return x @ layers[-1]["w"] + layers[-1]["b"]


def _values(critics: Params, observations: jax.Array, actions: jax.Array) -> jax.Array:
    """Return Q (2, batch) of two critics whose weights are stacked."""
    return jax.vmap(_run, (0, None, None))(critics, observations, actions)[..., 0]


def _loss(params: Params, slow: Params, batch: Batch, key: jax.Array) -> jax.Array:
    observations, actions = batch["observations"], batch["actions"]
    keys = jax.random.split(key, 4)
    after = batch["next_observations"]
    noise = jax.random.normal(keys[0], actions.shape)
    proposed = jnp.clip(_run(params["actor"], after, noise), -1, 1)
    target = batch["rewards"] + DISCOUNT * batch["going_on"] * _values(slow, after, proposed).mean(
        0
    )
    values = _values(params["critics"], observations, actions)
    critic_loss = jnp.square(values - jax.lax.stop_gradient(target)).mean()

    begin = jax.random.normal(keys[1], actions.shape)
    time = jax.random.uniform(keys[2], (len(actions), 1))
    velocity = _run(params["flow"], observations, (1 - time) * begin + time * actions, time)
    flow_loss = jnp.square(velocity - (actions - begin)).mean()

    noise = jax.random.normal(keys[3], actions.shape)
    flow_actions = noise
    for i in range(EULER_STEPS):
        now = jnp.full((len(actions), 1), i / EULER_STEPS)
        flow_actions = (
            flow_actions + _run(params["flow"], observations, flow_actions, now) / EULER_STEPS
        )
    flow_actions = jax.lax.stop_gradient(jnp.clip(flow_actions, -1, 1))
    drawn = _run(params["actor"], observations, noise)
    critics = jax.lax.stop_gradient(params["critics"])
    worth = _values(critics, observations, jnp.clip(drawn, -1, 1)).mean(0)
    unit = jax.lax.stop_gradient(1 / jnp.abs(worth).mean())
    actor_loss = DISTILLATION * jnp.square(drawn - flow_actions).mean() - unit * worth.mean()
    return critic_loss + flow_loss + actor_loss


def update_of(
    hidden: tuple[int, ...], size: int, observation: int, action: int
) -> Callable[[], None]:
    """Return a function that makes one compiled update of a batch of random data and waits for it.

    Args:
        hidden: Widths of the hidden layers of all networks.
        size: Number of transitions of the batch.
        observation: Number of entries of an observation.
        action: Number of entries of an action.
    """
    keys = jax.random.split(jax.random.key(0), 8)
    ends = (*hidden, action)
    one = partial(_init, sizes=(observation + action, *hidden, 1), normalised=True)
    params = {
        "critics": jax.vmap(one)(jax.random.split(keys[0], 2)),
        "flow": _init(keys[1], (observation + action + 1, *ends), normalised=False),
        "actor": _init(keys[2], (observation + action, *ends), normalised=False),
    }
    optimiser = optax.adam(3e-4)
    state = (params, params["critics"], optimiser.init(params), keys[3])
    state = jax.tree.map(jnp.copy, state)  # donated arrays must not be shared
    batch = {
        "observations": jax.random.normal(keys[4], (size, observation)),
        "next_observations": jax.random.normal(keys[5], (size, observation)),
        "actions": jax.random.uniform(keys[6], (size, action), minval=-1.0),
        "rewards": jax.random.normal(keys[7], (size,)),
        "going_on": jnp.ones(size),
    }

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, batch: Batch) -> Any:  # noqa: ANN401 - a tree of arrays
        params, slow, moments, key = state
        key, draw = jax.random.split(key)
        gradients = jax.grad(_loss)(params, slow, batch, draw)
        steps, moments = optimiser.update(gradients, moments)
        params = optax.apply_updates(params, steps)
        slow = jax.tree.map(lambda a, b: a + POLYAK * (b - a), slow, params["critics"])
        return params, slow, moments, key

    held = [state]

    def once() -> None:
        held[0] = jax.block_until_ready(update(held[0], batch))

    once()
    return once


def products_of(hidden: tuple[int, ...], observation: int, action: int) -> float:
    """Return the number of products with one hidden layer that the update needs.

    A forward pass is one product for each layer, a gradient by the weights another one, and a
    gradient by the inputs another one. The gradient by the inputs of the first layer is needed for
    the action of the critics alone, and its weights' gradient is not needed there.
    """
    width = hidden[0]
    inner = len(hidden) - 1

    def layers(features: int, outputs: int) -> tuple[float, float, float]:
        return features / width, float(inner), outputs / width

    def forward(features: int, outputs: int) -> float:
        return sum(layers(features, outputs))

    def trained(features: int, outputs: int) -> float:
        first, middle, last = layers(features, outputs)
        return 2 * first + 3 * (middle + last)

    critic, actor, flow = observation + action, observation + action, observation + action + 1
    td = 2 * trained(critic, 1) + forward(actor, action) + 2 * forward(critic, 1)
    cloning = trained(flow, action)
    through = 2 * (2 * forward(critic, 1) - observation / width)
    distilled = EULER_STEPS * forward(flow, action) + trained(actor, action) + through
    return td + cloning + distilled
