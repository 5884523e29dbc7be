"""The induced policy: what a behaviour offers, weighed by exp(Q / a)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safeshield.nn.mlp import Params
from safeshield.online.losses import Support
from safeshield.online.offers import Offer, offer
from safeshield.online.replay import support_of
from safeshield.online.safe_sets import SafeSet
from safeshield.online.updates import SSQLModel
from safeshield.proposals.sources import Behaviour
from safeshield.spaces.batches import Batch
from safeshield.values.soft import induced_log_policy, soft_value

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class InducedPolicy:
    """pi* = mu exp(Q / a) / Z for the weights of critics that one passes.

    Whatever it does is among what mu offers, inside the safe set.
    """

    model: SSQLModel
    behaviour: Behaviour
    safe_set: SafeSet | None
    temperature: float
    device: torch.device

    def offered(self, observations: Batch, samples: int, rng: np.random.Generator) -> Offer:
        """Return what mu offers in n states."""
        return offer(
            self.behaviour, self.safe_set, self.model.action_codec, observations, samples, rng
        )

    @torch.no_grad()
    def weigh(
        self,
        params: Params,
        observations: Batch,
        here: Offer,
        rng: np.random.Generator,
        *,
        deterministic: bool = False,
    ) -> tuple[Array, Array]:
        """Return one of the offered actions (n, act) in each state, and log pi*/mu of it (n,).

        Args:
            params: of the critics.
            observations: n of them.
            here: what mu offers there.
            rng: of the draw.
            deterministic: the likeliest instead of a draw.
        """
        support = self._support(observations, here)
        q = self.model.critics.offered(params, support)
        tensor = induced_log_policy(q, self.temperature, support.log_mu)
        log_pi = tensor.double().cpu().numpy()
        noisy = log_pi if deterministic else log_pi + rng.gumbel(size=log_pi.shape)
        best = noisy.argmax(axis=1)
        each = np.arange(len(best))
        nats: Array = log_pi[each, best] - support.log_mu.cpu().numpy()[each, best]
        if self.model.action_codec.discrete:
            return self.model.action_codec.choices[best], nats
        return here.candidates[each, best], nats

    @torch.no_grad()
    def value(
        self, params: Params, observations: Batch, samples: int, rng: np.random.Generator
    ) -> Array:
        """Return V(s) (n,)."""
        support = self._support(observations, self.offered(observations, samples, rng))
        q = self.model.critics.offered(params, support)
        value: Array = soft_value(q, self.temperature, support.log_mu).double().cpu().numpy()
        return value

    def _support(self, observations: Batch, here: Offer) -> Support:
        rows = np.array(
            self.model.observation_codec.flatten(observations, "observation")[0], np.float32
        )
        return support_of(
            rows,
            here.candidates,
            here.log_mu,
            self.model.scaling,
            self.model.action_codec,
            self.device,
        )
