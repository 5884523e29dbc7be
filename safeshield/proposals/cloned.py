"""A clone of a behaviour: a network that imitates the behaviour and has a density."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safeshield.nn.mixture import MixtureActor, draw_each
from safeshield.nn.mlp import Params
from safeshield.proposals.choices import draw_choices
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling

Array = npt.NDArray[Any]


class ClonedBehaviour:
    """A `MixtureActor` with its weights, as a `Behaviour`.

    Args:
        seen: Converts observations to rows.
        played: Converts actions to rows.
        scaling: Units of the network's inputs and actions.
        actor: The network.
        params: The network's weights.
    """

    def __init__(
        self,
        seen: SpaceCodec,
        played: SpaceCodec,
        scaling: Scaling,
        actor: MixtureActor,
        params: Params,
    ) -> None:
        self._seen, self._played, self._scaling, self._actor = seen, played, scaling, actor
        self._params = {name: tensor.detach().cpu() for name, tensor in params.items()}

    @torch.no_grad()
    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Return draws (n, each, act) of the network's distribution for n observations.

        All noise comes from `rng`. `observations` is a batch of n observations.
        """
        features = self._features(observations)
        if self._played.discrete:
            log_probs = self._actor.log_prob(self._params, features, features).double().numpy()
            return draw_choices(self._played, log_probs, each, rng)
        parts = self._actor.mixture(self._params, features)
        noise = rng.gumbel(size=(len(features), each, self._actor.components))
        which = (parts.log_weights.numpy()[:, None] + noise).argmax(axis=-1)
        index = torch.from_numpy(which)[..., None].expand(-1, -1, self._played.width)
        means, widths = parts.means.gather(1, index), parts.widths.gather(1, index)
        uniform = torch.from_numpy(rng.random(means.shape, np.float32))
        actions = draw_each(parts._replace(means=means, widths=widths), uniform)
        return self._scaling.to_box(actions.numpy())

    @torch.no_grad()
    def log_prob(self, observations: Batch, candidates: Array, /) -> Array:
        """Return log densities (n, c) in the box scaled to [-1, 1], or log probabilities.

        `observations` is a batch of n observations, and `candidates` (n, c, act) are actions as
        rows.
        """
        features = self._features(observations)
        if self._played.discrete:
            log_probs = self._actor.log_prob(self._params, features, features).double().numpy()
            return np.take_along_axis(log_probs, self._played.choice_index(candidates), axis=1)
        scaled = torch.from_numpy(self._scaling.actions(candidates))
        density: Array = self._actor.log_prob(self._params, features, scaled).double().numpy()
        return density

    @torch.no_grad()
    def most_likely(self, observations: Batch) -> Array:
        """Return the likeliest choice, or the centre of the heaviest component: (n, act).

        `observations` is a batch of n observations.
        """
        features = self._features(observations)
        if self._played.discrete:
            log_probs = self._actor.log_prob(self._params, features, features)
            chosen: Array = self._played.choices[log_probs.argmax(-1).numpy()]
            return chosen
        parts = self._actor.mixture(self._params, features)
        best = parts.log_weights.argmax(-1)
        return self._scaling.to_box(parts.means[torch.arange(len(best)), best].numpy())

    def _features(self, observations: Batch) -> torch.Tensor:
        rows, _ = self._seen.flatten(observations, "observation")
        return torch.from_numpy(self._scaling.observations(rows))
