r"""FLRP's policy on NumPy arrays (`nn.latent_actor`): its actions, and its density.

The density of an action is that of the whole generative model, without refinement,

    p(a | s) = integral over z of p(z | s) pi(a | s, z)

estimated by importance sampling from the recognizer q, K draws:

    log p(a | s) ~ log 1/K sum_k p(z_k | s) pi(a | s, z_k) / q(z_k | s, a)

(Burda et al. 2016: below log p in the mean, nearer with K.) Each factor is an exact density. The
draws' noise is fixed, so the estimate is a function of state and action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from safeshield.nn.coupling_forward import CouplingForward, coupling_shapes, normal_log_prob
from safeshield.nn.forward import Weights, forward_layers, layers, mlp_shapes

_Float = npt.NDArray[np.float32]
PRIOR, POSTERIOR, DECODER = "prior", "posterior", "decoder"
SAFETY_EXPERT, REWARD_EXPERT, SHARED_EXPERT = "safety_expert", "reward_expert", "shared_expert"
EXPERTS = (SAFETY_EXPERT, REWARD_EXPERT, SHARED_EXPERT)
_SEED = 20_251_020
_DRAWS = 16


def expert_order(steps: int) -> tuple[str, ...]:
    """Name the expert of each of T refinement steps: safety first, the shared one last.

    >>> [name.removesuffix("_expert") for name in expert_order(4)]
    ['safety', 'reward', 'safety', 'shared']
    """
    turns = [(SAFETY_EXPERT, REWARD_EXPERT)[step % 2] for step in range(steps - 1)]
    return (*turns, SHARED_EXPERT) if steps else ()


@dataclass(frozen=True)
class LatentSpec:
    """The widths of FLRP's policy, and what else its weights do not tell."""

    latent: int
    """Width of the noise, and of z."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers of every network."""
    transforms: int = 4
    """Coupling layers of each flow."""
    prior: Literal["flow", "gaussian"] = "flow"
    """p(z | s): a flow, or N(0, I) in every state (the paper's ablation, table 3)."""
    spread: float = 0.1
    """Standard deviation of the decoder's Gaussian, in half widths of the action box."""
    refine_steps: int = 3
    """T."""

    def shapes(self, observation: int, action: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shape of every weight by network, for these many features."""
        known = observation + self.latent
        return {
            **({PRIOR: self._flow(observation)} if self.prior == "flow" else {}),
            POSTERIOR: self._flow(observation + action),
            DECODER: mlp_shapes(known, action, self.hidden),
            **dict.fromkeys(EXPERTS, mlp_shapes(known, self.latent, self.hidden)),
        }

    def _flow(self, context: int) -> dict[str, tuple[int, ...]]:
        return coupling_shapes(self.latent, context, self.hidden, self.transforms)


class LatentForward:
    """Prior, recognizer, decoder and experts with their weights.

    Args:
        spec: widths and T.
        networks: weights by name.
    """

    def __init__(self, spec: LatentSpec, networks: Mapping[str, Weights]) -> None:
        self.spec = spec
        self._networks = networks
        self._experts = [layers(networks[name]) for name in expert_order(spec.refine_steps)]
        self._decoder = layers(networks[DECODER])

    @cached_property
    def _prior(self) -> CouplingForward | None:
        if self.spec.prior == "gaussian":
            return None
        return CouplingForward(self._networks[PRIOR], self.spec.latent)

    @cached_property
    def _posterior(self) -> CouplingForward:
        return CouplingForward(self._networks[POSTERIOR], self.spec.latent)

    def act(self, inputs: _Float, noise: _Float, refined: bool = True) -> _Float:
        """Return actions (n, act) in [-1, 1] for noise u_0 (n, latent) in n states (n, obs)."""
        base = noise
        for stack in self._experts if refined else []:
            base = base + forward_layers(stack, np.concatenate([inputs, base], -1))[0]
        if self._prior is not None:
            base, _ = self._prior.to_latent(base, inputs)
        return self._decode(inputs, base)

    def _decode(self, inputs: _Float, latent: _Float) -> _Float:
        out: _Float = np.tanh(
            forward_layers(self._decoder, np.concatenate([inputs, latent], -1))[0]
        )
        return out

    def log_density(self, inputs: _Float, actions: _Float) -> _Float:
        """Return log p(a | s) of actions (n, act) in n states (n, obs), (n,), in nats.

        Per half width of the action box, which is the unit of the actions.
        """
        table = _noise(self.spec.latent)
        count, draws, width = len(inputs), len(table), actions.shape[1]
        seen, taken = np.repeat(inputs, draws, axis=0), np.repeat(actions, draws, axis=0)
        noise = np.tile(table, (count, 1))
        latent, volume = self._posterior.to_latent(noise, np.concatenate([seen, taken], -1))
        log_q = normal_log_prob(noise) - volume
        if self._prior is None:
            log_p = normal_log_prob(latent)
        else:
            base, change = self._prior.to_base(latent, seen)
            log_p = normal_log_prob(base) + change
        error = (taken - self._decode(seen, latent)) / np.float32(self.spec.spread)
        fit = normal_log_prob(error) - np.float32(width * math.log(self.spec.spread))
        terms = (log_p + fit - log_q).reshape(count, draws)
        most = terms.max(1, keepdims=True)
        out: _Float = most[:, 0] + np.log(np.exp(terms - most).mean(1))
        return out


def _noise(width: int) -> _Float:
    # In pairs of opposite signs: the mean of each entry is 0.
    half = np.random.default_rng(_SEED).standard_normal((_DRAWS // 2, width))
    return np.concatenate([half, -half]).astype(np.float32)
