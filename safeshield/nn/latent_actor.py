r"""FLRP's policy: a prior over latents, a recognizer, a decoder, and experts that refine noise.

    u_0 ~ N(0, I)  --experts-->  u_T  --prior f-->  z  --decoder-->  action

Source: FLRP (Flow-guided Latent Refiner Policies), sections 3.2 and 3.3. Everything is a pure
function of (networks, inputs); states are normalised observations, actions lie in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.nn.coupling import CouplingFlow, normal_log_prob
from safeshield.nn.latent_forward import (
    DECODER,
    EXPERTS,
    POSTERIOR,
    PRIOR,
    LatentSpec,
    expert_order,
)
from safeshield.nn.mlp import EnsembleMLP, Networks


@dataclass(frozen=True)
class LatentPolicy:
    """The networks of FLRP's policy.

    >>> policy = LatentPolicy(3, 1, LatentSpec(latent=2, hidden=(8,), transforms=2))
    >>> networks = policy.init(torch.Generator().manual_seed(0))
    >>> policy.act(networks, torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """

    observation: int
    action: int
    spec: LatentSpec

    @property
    def prior(self) -> CouplingFlow:
        """Describe p(z | s)."""
        return self._flow(self.observation)

    @property
    def posterior(self) -> CouplingFlow:
        """Describe q(z | s, a)."""
        return self._flow(self.observation + self.action)

    def _flow(self, context: int) -> CouplingFlow:
        return CouplingFlow(self.spec.latent, context, self.spec.hidden, self.spec.transforms)

    @property
    def decoder(self) -> EnsembleMLP:
        """Describe the decoder: (s, z) to an action before the tanh."""
        return EnsembleMLP(self.observation + self.spec.latent, self.action, self.spec.hidden)

    @property
    def expert(self) -> EnsembleMLP:
        """Describe one expert: (s, u) to what is added to u."""
        width = self.spec.latent
        return EnsembleMLP(self.observation + width, width, self.spec.hidden)

    @property
    def generative(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Describe what is trained first and then frozen."""
        prior = {PRIOR: self.prior} if self.spec.prior == "flow" else {}
        return {**prior, POSTERIOR: self.posterior, DECODER: self.decoder}

    @property
    def experts(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Describe the three experts."""
        return dict.fromkeys(EXPERTS, self.expert)

    @property
    def refining(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Describe those experts that T steps call on: none, the shared one, ..., all."""
        return dict.fromkeys(expert_order(self.spec.refine_steps), self.expert)

    def parts(self) -> dict[str, CouplingFlow | EnsembleMLP]:
        """Describe every network."""
        return {**self.generative, **self.experts}

    def init(self, generator: torch.Generator) -> Networks:
        """Draw all weights."""
        return {name: part.init(generator) for name, part in self.parts().items()}

    # -- the generative model -----------------------------------------------------------------

    def to_latent(self, networks: Networks, observations: Tensor, base: Tensor) -> Tensor:
        """Return z = f(u; s), (batch, latent)."""
        if self.spec.prior == "gaussian":
            return base
        return self.prior.to_latent(networks[PRIOR], base, observations)[0]

    def to_base(
        self, networks: Networks, observations: Tensor, latent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return u with f(u; s) = z, (batch, latent), and log p(z | s), (batch,), in nats."""
        if self.spec.prior == "gaussian":
            return latent, normal_log_prob(latent)
        base, volume = self.prior.to_base(networks[PRIOR], latent, observations)
        return base, normal_log_prob(base) + volume

    def encode(
        self, networks: Networks, observations: Tensor, actions: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z | s, a) from noise (batch, latent); return it and log q(z | s, a)."""
        context = torch.cat([observations, actions], -1)
        latent, volume = self.posterior.to_latent(networks[POSTERIOR], noise, context)
        return latent, normal_log_prob(noise) - volume

    def decode(self, networks: Networks, observations: Tensor, latent: Tensor) -> Tensor:
        """Return the decoder's mean, (batch, action), inside [-1, 1]."""
        inputs = torch.cat([observations, latent], -1)
        return self.decoder(networks[DECODER], inputs)[0].tanh()

    def log_likelihood(self, actions: Tensor, means: Tensor) -> Tensor:
        """Return log pi(a | s, z), (batch,): a Gaussian around the mean."""
        spread = self.spec.spread
        return normal_log_prob((actions - means) / spread) - self.action * math.log(spread)

    # -- refinement -----------------------------------------------------------------------------

    def refine(self, networks: Networks, observations: Tensor, base: Tensor) -> Tensor:
        """Return u_T, (batch, latent), of u_0 = base: u <- u + f_k(s, u) for each expert k."""
        for name in expert_order(self.spec.refine_steps):
            base = base + self.expert(networks[name], torch.cat([observations, base], -1))[0]
        return base

    def act(self, networks: Networks, observations: Tensor, base: Tensor) -> Tensor:
        """Return the action (batch, action) that noise u_0 = base becomes."""
        refined = self.refine(networks, observations, base)
        return self.decode(networks, observations, self.to_latent(networks, observations, refined))
