r"""Three actors that imitate the good chunks of a log. Each draws a chunk from noise z ~ N(0, I).

- "guided": one velocity field with the labels good, not good and none, sampled with guidance
  towards good chunks (`nn.guided`; eq. 18 to 21).
- "awr_flow": a velocity field without labels, trained with larger weights on good chunks (eq. 41).
- "awr_gaussian": a Gaussian of diagonal covariance, trained with the same weights (eq. 40).

A chunk is good if o = 1. A_r is the advantage of the penalised reward critic and A_c that of the
cost critic (eq. 18):

    safe state:     o = 1{A_r >= 0},     weight min(exp(b_r A_r), 100)
    unsafe state:   o = 1{A_c <= 0},     weight min(exp(-b_c A_c), 100)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from safeshield.nn.arrays import A, ParamsOf, exp, tanh
from safeshield.nn.guided import LABELS, guided_loss, guided_network, guided_sample
from safeshield.nn.mlp import EnsembleMLP, Params

LARGEST_WEIGHT = 100.0
_LOG_SPREAD = (-4.0, 0.5)
"""Bounds of the Gaussian's log standard deviation, in half widths of the action box."""
Kind = Literal["guided", "awr_flow", "awr_gaussian"]


class Lesson(NamedTuple):
    """A batch of chunks to imitate, including all random numbers of the loss."""

    observations: Tensor
    """(batch, obs) normalised observations."""
    chunks: Tensor
    """(batch, h * act) actions of the chunks, in [-1, 1]."""
    counts: Tensor
    """(batch, h * act) 1 for logged actions, 0 for padding."""
    good: Tensor
    """(batch,) bool, o: whether the chunk is good."""
    weights: Tensor
    """(batch,) weight of the chunk, for the kinds "awr_flow" and "awr_gaussian"."""
    noise: Tensor
    """(batch, h * act) noise z, standard normal."""
    time: Tensor
    """(batch, 1) time t, uniform in [0, 1]."""
    dropped: Tensor
    """(batch,) bool: whether the label is dropped."""


@dataclass(frozen=True)
class ChunkActor:
    """One of the three kinds of actor, as pure functions of its weights."""

    kind: Kind
    """Name of the kind of actor."""
    observation: int
    """Number of features of an observation."""
    width: int
    """Number of entries of a chunk: h * act."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    steps: int
    """Number of Euler steps of the flows."""
    guidance: float
    """w, the strength of guidance of the kind "guided"."""

    @property
    def network(self) -> EnsembleMLP:
        """Description of the network."""
        if self.kind == "awr_gaussian":
            return EnsembleMLP(self.observation, 2 * self.width, self.hidden)
        return guided_network(self.observation, self.width, self.hidden)

    @property
    def _strength(self) -> float:
        return self.guidance if self.kind == "guided" else 0.0

    def loss(self, params: Params, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the weights `params` on the batch `lesson`, and the values to log."""
        weights = lesson.counts
        if self.kind != "guided":
            weights = weights * lesson.weights[:, None]
        if self.kind == "awr_gaussian":
            mean, log_spread = self._gaussian(params, lesson.observations)
            error = (lesson.chunks - mean) * (-log_spread).exp()
            loss = (weights * (0.5 * error.square() + log_spread)).sum(-1).mean()
            return loss, {"actor/negative_log_likelihood": loss.detach()}
        labels = torch.zeros_like(lesson.time).expand(-1, LABELS)
        if self.kind == "guided":
            kinds = torch.stack([lesson.good, ~lesson.good], -1)
            labels = (kinds & ~lesson.dropped[:, None]).to(lesson.time.dtype)
        loss = guided_loss(
            self.network,
            params,
            lesson.observations,
            lesson.chunks,
            lesson.noise,
            lesson.time,
            labels,
            weights,
        )
        return loss, {"actor/flow_matching_loss": loss.detach()}

    def sample(self, params: ParamsOf[A], observations: A, noise: A) -> A:
        """Return chunks (n, h * act) in [-1, 1] for noise (n, h * act).

        `params` are the weights, and `observations` (n, obs) are normalised.
        """
        if self.kind == "awr_gaussian":
            mean, log_spread = self._gaussian(params, observations)
            return (mean + exp(log_spread) * noise).clip(-1.0, 1.0)
        return guided_sample(self.network, params, observations, noise, self.steps, self._strength)

    def _gaussian(self, params: ParamsOf[A], observations: A) -> tuple[A, A]:
        raw = self.network(params, observations)[0]
        return tanh(raw[:, : self.width]), raw[:, self.width :].clip(*_LOG_SPREAD)


def normal_below(share: float) -> float:
    """Return the quantile of the standard normal distribution at the level `share`."""
    return math.sqrt(2.0) * float(torch.erfinv(torch.tensor(2.0 * share - 1.0)))
