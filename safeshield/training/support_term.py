r"""Leaving the data's support as one more failure inside the safety backup (UNISafe, in our terms).

For each logged transition whose own step counts as unseen, score(s, a) < level,

    h_support(s, a) = min((level - score(s, a)) / spread, 1) * (standard deviation of h) > 0

in units of h, where `spread` is the score's standard deviation over the held-out steps, `level`
their conformal level (`calibration.support`). It joins the maximum in the backups:

    m = max(h(s), h(s'), weight * h_support(s, a))

for V_h. Q_h(s, a) is fitted without the term of its own a, only with V_h(s') after it: the shield
tests that action itself, exactly, so that accepting means max(Q_h(s, a), h_support(s, a)) <= -delta
all the same, and the regression is spared a jump of dozens of steps' worth of h, in which the
order of the actions drowned (on the boat below, 30 of 300 trips hit a rock in place of 2).

Where the step is supported it takes no part (h_support = -infinity). Its negative side would be a
margin in nats dressed up as metres: far from every rock an action that is merely uncommon would
put the value at just below 0, and the value's error would grow with it. (Measured on a boat's log
without one half of the directions, at delta 0.05: 2% of the doomed states pass without the term,
15% with its negative side, 2% so.) It is cut off above for the same reason.

What the value then foresees: that every way on takes actions which the log itself hardly ever took,
such as an escape that was seen once and may have been luck. What it cannot foresee: where
actions lead that are not in the log. Learning in-sample sees logged actions alone, so no backup
ever passes through an unlogged one, and the score is of actions given the state: it knows nothing
of states that are rare. Only the test of the present action keeps those out; that is why a shield
trained so carries the test as well. (UNISafe, arXiv 2505.00779, has a world model to imagine
unlogged actions with; a log has not.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.calibration.support import record_of
from safeshield.data.dataset import OfflineDataset
from safeshield.nn.arrays import deployed
from safeshield.nn.mlp import Params
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.scaling import Scaling
from safeshield.support.decide import SupportTest
from safeshield.support.record import episodes_needed
from safeshield.support.scores import support_score
from safeshield.values.units import BEHAVIOUR, SafetyScale


@dataclass(eq=False)
class SupportTerm:
    """h_support of a log's transitions, once the behaviour has been learned."""

    dataset: OfflineDataset
    held_out: npt.NDArray[np.bool_]
    """(E,) which of its episodes the behaviour is not trained on."""
    scaling: Scaling
    scale: SafetyScale
    flow_steps: int
    weight: float
    alpha: float
    share: float
    device: torch.device
    _known: tuple[SupportTest, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        marks = np.repeat(self.held_out, self.dataset.episode_lengths)
        self._learned_from = torch.tensor(np.flatnonzero(~marks), device=self.device)

    def learned_from(self, rows: Tensor) -> Tensor:
        """Turn rows (batch,) drawn from the whole log into rows of the other episodes."""
        return self._learned_from[rows % len(self._learned_from)]

    def read(self, behaviour: Params) -> tuple[SupportTest, Tensor]:
        """Return the test with its level, and weight * h_support (N,) of all transitions.

        Computed once: call it when the behaviour has been learned.
        """
        if self._known is None:
            self._known = self._read(behaviour)
        return self._known

    def _read(self, behaviour: Params) -> tuple[SupportTest, Tensor]:
        model = SafetyModel.of_networks(
            self.dataset.observation_space,
            self.dataset.action_space,
            self.scaling,
            self.scale,
            deployed({BEHAVIOUR: behaviour}),
            self.flow_steps,
        )
        score = support_score(None, model)
        seen = model.unjudged(self.dataset.observations)
        scores = score(model, seen, self.dataset.actions)
        held_out = self.dataset.select(np.flatnonzero(self.held_out))
        held = scores[np.repeat(self.held_out, self.dataset.episode_lengths)]
        record = record_of(held, held_out.episode_starts, score.name, self.alpha, self.share)
        spread = float(np.std(held[np.isfinite(held)], dtype=np.float64)) or 1.0
        beyond = (record.level - np.where(np.isnan(scores), -np.inf, scores)) / spread
        excess = np.where(beyond > 0, np.minimum(beyond, 1.0), -np.inf)
        label = self.weight * self.scale.spread * excess
        extra = torch.tensor(label.astype(np.float32), device=self.device)
        return SupportTest(score, record), extra


def held_out_episodes(
    episodes: int, share: float, alpha: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Mark `share` of the episodes, drawn by `seed`: (E,).

    Raises:
        ValueError: they are too few to set a level for alpha, or none would be left to train on.

    >>> int(held_out_episodes(100, share=0.1, alpha=0.1, seed=0).sum())
    10
    """
    count, needed = round(share * episodes), episodes_needed(alpha)
    if not needed <= count < episodes:
        raise ValueError(
            f"support_held_out {share:g} of {episodes} episodes holds out {count}, but alpha "
            f"{alpha:g} needs at least {needed}, and at least one must be left to train on: log "
            "more episodes, or raise support_held_out or support_alpha"
        )
    marks = np.zeros(episodes, dtype=bool)
    marks[np.random.default_rng(seed).permutation(episodes)[:count]] = True
    return marks
