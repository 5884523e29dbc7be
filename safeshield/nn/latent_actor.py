r"""FLRP's policy: a prior over latents, a posterior, a decoder, and experts that refine noise.

    u_0 ~ N(0, I)  --experts-->  u_T  --prior f-->  z  --decoder-->  action

All functions are pure functions of (networks, inputs). States are normalised observations, and
actions lie in [-1, 1]. Source: FLRP (Flow-guided Latent Refiner Policies), sections 3.2 and 3.3.

The density of an action is its density under the generative model, without refinement,

    p(a | s) = integral over z of p(z | s) pi(a | s, z)

estimated by importance sampling with K samples from the posterior q:

    log p(a | s) ~ log 1/K sum_k p(z_k | s) pi(a | s, z_k) / q(z_k | s, a)

(Burda et al. 2016: in the mean the estimate is below log p, and it is nearer with larger K.) Each
factor is an exact density. The noise of the samples is fixed, so the estimate is a function of
state and action.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from safeshield.files.schema import finite_number
from safeshield.nn.actor import LATER, MAX_WIDTH, check_count, check_hidden, register_actor
from safeshield.nn.arrays import A, Float, NetworksOf, Weights, concat, tanh
from safeshield.nn.coupling import CouplingFlow, normal_log_prob
from safeshield.nn.mlp import EnsembleMLP, Networks

if TYPE_CHECKING:
    import torch

PRIOR, POSTERIOR, DECODER = "prior", "posterior", "decoder"
SAFETY_EXPERT, REWARD_EXPERT, SHARED_EXPERT = "safety_expert", "reward_expert", "shared_expert"
EXPERTS = (SAFETY_EXPERT, REWARD_EXPERT, SHARED_EXPERT)
_SEED = 20_251_020
_DRAWS = 16


Order = Literal["sequential", "jacobi", "interleaved"]
ORDERS: tuple[str, ...] = get_args(Order)
_MINI_STEPS = 4
"""Number of parts into which the order "interleaved" divides a step of an expert."""


def expert_order(steps: int) -> tuple[str, ...]:
    """Return the experts' names for T steps: safety and reward in turn, and the shared one last.

    >>> [name.removesuffix("_expert") for name in expert_order(4)]
    ['safety', 'reward', 'safety', 'shared']
    """
    turns = [(SAFETY_EXPERT, REWARD_EXPERT)[step % 2] for step in range(steps - 1)]
    return (*turns, SHARED_EXPERT) if steps else ()


@dataclass(frozen=True)
class LatentSpec:
    """Widths of FLRP's policy, and settings that cannot be read from its weights."""

    latent: int
    """Width of the noise u and of the latent z."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers of every network."""
    transforms: int = 4
    """Number of coupling layers of each flow."""
    prior: Literal["flow", "gaussian"] = "flow"
    """p(z | s): a flow, or N(0, I) in every state (the paper's ablation, table 3)."""
    spread: float = 0.1
    """Standard deviation of the decoder's Gaussian, in half widths of the action box."""
    refine_steps: int = 3
    """T, the number of refinement steps."""
    order: Order = dataclasses.field(default="sequential", metadata={LATER: True})
    """How the safety and the reward expert of a round follow each other; see `refine`."""
    trust_region: float | None = dataclasses.field(default=None, metadata={LATER: True})
    """Bound rho on the length of u_T - u_0; None means no bound."""

    def check(self) -> None:
        """Raise ValueError if the fields, as read from a file, are not valid."""
        check_hidden("latent", self.hidden)
        for name, least in (("latent", 2), ("transforms", 1), ("refine_steps", 0)):
            check_count(name, getattr(self, name), least, MAX_WIDTH)
        if self.prior not in ("flow", "gaussian"):
            raise ValueError(f"prior must be 'flow' or 'gaussian', got {self.prior!r:.20}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r:.20}")
        for name, number in (("spread", self.spread), ("trust_region", self.trust_region)):
            if number is not None and finite_number(number, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {number}")


@register_actor
@dataclass(frozen=True)
class LatentPolicy:
    """The networks of FLRP's policy.

    >>> import torch
    >>> policy = LatentPolicy(3, 1, LatentSpec(latent=2, hidden=(8,), transforms=2))
    >>> networks = policy.init(torch.Generator().manual_seed(0))
    >>> policy.act(networks, torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """

    kind: ClassVar[str] = "latent"
    observation: int
    """Number of features of an observation."""
    action: int
    """Number of entries of an action."""
    spec: LatentSpec
    """Sizes of the networks and of the latent space."""

    @cached_property
    def prior(self) -> CouplingFlow:
        """Description of the flow p(z | s)."""
        return self._flow(self.observation)

    @cached_property
    def posterior(self) -> CouplingFlow:
        """Description of the flow q(z | s, a)."""
        return self._flow(self.observation + self.action)

    def _flow(self, context: int) -> CouplingFlow:
        return CouplingFlow(self.spec.latent, context, self.spec.hidden, self.spec.transforms)

    @cached_property
    def decoder(self) -> EnsembleMLP:
        """Description of the decoder, which maps (s, z) to an action before the tanh."""
        return EnsembleMLP(self.observation + self.spec.latent, self.action, self.spec.hidden)

    @cached_property
    def expert(self) -> EnsembleMLP:
        """Description of one expert, which maps (s, u) to a change of u."""
        width = self.spec.latent
        return EnsembleMLP(self.observation + width, width, self.spec.hidden)

    @property
    def generative(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Descriptions of the generative model, which is trained first and then frozen."""
        prior = {PRIOR: self.prior} if self.spec.prior == "flow" else {}
        return {**prior, POSTERIOR: self.posterior, DECODER: self.decoder}

    @property
    def experts(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Descriptions of the three experts."""
        return dict.fromkeys(EXPERTS, self.expert)

    @property
    def refining(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Descriptions of the experts that T steps use. The shared one is used if T is above 0."""
        return dict.fromkeys(expert_order(self.spec.refine_steps), self.expert)

    @property
    def unrefined(self) -> LatentPolicy:
        """The same policy without refinement, which imitates the log."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, refine_steps=0))

    def parts(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Return the description of every network, by name."""
        return {**self.generative, **self.experts}

    def init(self, generator: torch.Generator) -> Networks:
        """Return randomly drawn weights of all networks, by network. `generator` draws them."""
        return {name: part.init(generator) for name, part in self.parts().items()}

    def check(self) -> None:
        """See `nn.actor.Described`."""
        self.spec.check()

    @property
    def noise_features(self) -> int:
        """Width of the noise u_0."""
        return self.spec.latent

    # -- the generative model -----------------------------------------------------------------

    def to_latent(self, networks: NetworksOf[A], observations: A, base: A) -> A:
        """Return z = f(u; s), (batch, latent).

        `networks` are the weights, `observations` (batch, obs) are s, normalised, and `base`
        (batch, latent) is u.
        """
        if self.spec.prior == "gaussian":
            return base
        return self.prior.to_latent(networks[PRIOR], base, observations)[0]

    def to_base(self, networks: NetworksOf[A], observations: A, latent: A) -> tuple[A, A]:
        """Return u with f(u; s) = z, (batch, latent), and log p(z | s), (batch,), in nats.

        `networks` are the weights, `observations` (batch, obs) are s, normalised, and `latent`
        (batch, latent) is z.
        """
        if self.spec.prior == "gaussian":
            return latent, normal_log_prob(latent)
        base, volume = self.prior.to_base(networks[PRIOR], latent, observations)
        return base, normal_log_prob(base) + volume

    def encode(self, networks: NetworksOf[A], observations: A, actions: A, noise: A) -> tuple[A, A]:
        """Return a draw z ~ q(z | s, a), (batch, latent), and log q(z | s, a), (batch,), in nats.

        `networks` are the weights, `observations` (batch, obs) are s, normalised, `actions` (batch,
        action) are a in [-1, 1], and `noise` (batch, latent) is standard normal.
        """
        context = concat([observations, actions])
        latent, volume = self.posterior.to_latent(networks[POSTERIOR], noise, context)
        return latent, normal_log_prob(noise) - volume

    def decode(self, networks: NetworksOf[A], observations: A, latent: A) -> A:
        """Return the decoder's mean, (batch, action), inside [-1, 1].

        `networks` are the weights, `observations` (batch, obs) are normalised, and `latent` (batch,
        latent) is z.
        """
        return tanh(self.decoder(networks[DECODER], concat([observations, latent]))[0])

    def log_likelihood(self, actions: A, means: A) -> A:
        """Return log pi(a | s, z), (batch,), in nats, of a Gaussian around the decoder's mean.

        `actions` (batch, action) are a in [-1, 1], and `means` (batch, action) are the results of
        `decode`.
        """
        spread = self.spec.spread
        return normal_log_prob((actions - means) / spread) - self.action * math.log(spread)

    def log_density(self, networks: Mapping[str, Weights], inputs: Float, actions: Float) -> Float:
        """Return log p(a | s) of one action in each of n states, (n,), in nats.

        The density is per half width of the action box, which is the unit of the actions.
        `networks` are the weights, `inputs` (n, obs) normalised observations, and `actions` (n,
        act) lie in [-1, 1].
        """
        table = _noise(self.spec.latent)
        count, draws = len(inputs), len(table)
        seen, taken = np.repeat(inputs, draws, axis=0), np.repeat(actions, draws, axis=0)
        latent, log_q = self.encode(networks, seen, taken, np.tile(table, (count, 1)))
        _, log_p = self.to_base(networks, seen, latent)
        fit = self.log_likelihood(taken, self.decode(networks, seen, latent))
        terms = (log_p + fit - log_q).reshape(count, draws)
        most = terms.max(1, keepdims=True)
        out: Float = most[:, 0] + np.log(np.exp(terms - most).mean(1))
        return out

    # -- refinement -----------------------------------------------------------------------------

    def refine(self, networks: NetworksOf[A], observations: A, base: A) -> A:
        """Return u_T, (batch, latent), from u_0 = base by u <- u + f_k(s, u) for each expert k.

        The T - 1 first steps form rounds of the safety and the reward expert, and the shared expert
        comes last. The order of a round is one of these (proposition 1 of the paper):

        - "sequential" (Gauss-Seidel): the reward expert continues from the result of the safety
          expert;
        - "jacobi": both start from the same u, and their steps are added;
        - "interleaved": both take a quarter of their step in turn, four times.

        With a trust region, u_T is the point nearest to the result at which ||u_T - u_0|| <= rho.

        `networks` are the weights, and `observations` (batch, obs) are s, normalised.
        """
        start, order = base, self.spec.order

        def step(name: str, at: A) -> Any:  # noqa: ANN401 - an array or a tensor
            return self.expert(networks[name], concat([observations, at]))[0]

        names = expert_order(self.spec.refine_steps)
        if order == "sequential":
            for name in names:
                base = base + step(name, base)
        elif names:
            *turns, shared = names
            for first in range(0, len(turns), 2):
                pair = turns[first : first + 2]
                if order == "jacobi":
                    for way in [step(name, base) for name in pair]:
                        base = base + way
                else:
                    for name in pair * _MINI_STEPS:
                        base = base + step(name, base) / _MINI_STEPS
            base = base + step(shared, base)
        rho = self.spec.trust_region
        if rho is None:
            return base
        moved: Any = base - start
        # Clipped before the root, whose gradient at 0 is infinite.
        length = (moved * moved).sum(-1)[..., None].clip(rho * rho, None) ** 0.5
        bounded: A = start + moved * (rho / length)
        return bounded

    def act(self, networks: NetworksOf[A], observations: A, base: A) -> A:
        """Return the actions (batch, action), in [-1, 1], for noise u_0 = base.

        `networks` are the weights, and `observations` (batch, obs) are normalised.
        """
        refined = self.refine(networks, observations, base)
        return self.decode(networks, observations, self.to_latent(networks, observations, refined))


def _noise(width: int) -> Float:
    # The samples come in pairs of opposite signs, so that the mean of each entry is 0.
    half = np.random.default_rng(_SEED).standard_normal((_DRAWS // 2, width))
    return np.concatenate([half, -half]).astype(np.float32)
