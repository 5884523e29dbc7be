r"""Leaving the data's support as a further failure inside the safety backup, after UNISafe.

For each logged transition whose action counts as unseen, score(s, a) < level, the term is

    h_support(s, a) = min((level - score(s, a)) / spread, 1) * (standard deviation of h) > 0

in units of h. Here `spread` is the standard deviation of the score over the held-out steps and
`level` is their conformal level (`calibration.support`). The term enters the maximum in the backups
of V_h:

    m = max(h(s), h(s'), weight * h_support(s, a))

Q_h(s, a) is fitted without the term of its own action, and only with V_h(s') of the next state. The
shield tests the support of that action itself, exactly, so an accepted action still has
max(Q_h(s, a), h_support(s, a)) <= -delta. With the term, the targets of Q_h would jump by dozens of
times the change of h in one step, and the order of the actions would be lost. (On the boat task
below, 30 of 300 trips then hit a rock instead of 2.)

Where an action is supported, the term has no effect (h_support = -infinity). Its negative values
are in nats and cannot be compared with h. With them, an action that is only uncommon would raise
the value to just below 0 far from every rock, and the error of the value would grow. (On a log of
the boat task without one half of the directions, at delta 0.05, 2% of the states from which no
action is safe pass without the term, 15% with its negative values, and 2% with the term as it is.)
The term is bounded above for the same reason.

With this term, V_h is high where every continuation takes actions that the log hardly ever took,
for example an escape that was seen once and may have been luck. V_h does not show where actions
lead that are not in the log. In-sample learning uses logged actions only, so no backup includes an
unlogged action. The score judges actions given the state and does not recognise rare states. Only
the support test of the proposed action rejects unlogged actions, and therefore a shield that is
trained in this way also has the test. (UNISafe, arXiv 2505.00779, imagines unlogged actions with a
world model, which is not available here.)
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
    """The term h_support of a log's transitions, which is above 0 where an action is not supported.

    It is computed from the learned behaviour.
    """

    dataset: OfflineDataset
    """The log."""
    held_out: npt.NDArray[np.bool_]
    """(E,) whether an episode is held out, so that the behaviour does not learn from it."""
    scaling: Scaling
    """Scaling of the log's observations and actions."""
    scale: SafetyScale
    """Units of h."""
    flow_steps: int
    """Number of Euler steps of the behaviour's flow."""
    weight: float
    """Weight of h_support in the maximum m."""
    alpha: float
    """`alpha` of the support test; see `Shield.with_support`."""
    share: float
    """`share` of the support test; see `Shield.with_support`."""
    device: torch.device
    """Device of the term's values."""
    _known: tuple[SupportTest, Tensor] | None = field(default=None, init=False)
    _known_of: Params | None = field(default=None, init=False)
    """Behaviour from which `_known` was computed."""

    def __post_init__(self) -> None:
        marks = np.repeat(self.held_out, self.dataset.episode_lengths)
        self._learned_from = torch.tensor(np.flatnonzero(~marks), device=self.device)

    def learned_from(self, rows: Tensor) -> Tensor:
        """Return rows (batch,) of episodes that are not held out, for rows of the whole log."""
        return self._learned_from[rows % len(self._learned_from)]

    def read(self, behaviour: Params) -> tuple[SupportTest, Tensor]:
        """Return the support test with its level, and weight * h_support (N,) of all transitions.

        Both are computed again only where `behaviour` is another object than in the last call.
        Weights are replaced and never changed, so the same object has the same weights.
        """
        if self._known is None or self._known_of is not behaviour:
            self._known, self._known_of = self._read(behaviour), behaviour
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
    """Return which episodes are held out, (E,) bool: a random `share` of them, drawn with `seed`.

    Raises:
        ValueError: These are too few to set a level for alpha, or no episode is left for training.

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
