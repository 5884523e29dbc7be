"""The test of one action: is its score at least the calibrated level?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.spaces.shapes import Actions, Candidates, Flags, Scalars
from safeshield.support.record import SupportRecord
from safeshield.support.scores import SupportScore

if TYPE_CHECKING:
    from safeshield.shield.critics import SafetyModel, StateValue

_PROPOSALS = 8
_SEED = 20_260_316
_FIRST = 4  # candidates that are scored before any others


@dataclass(frozen=True, eq=False)
class SupportTest:
    """A score and its level; what it accepts looks like the log."""

    score: SupportScore
    record: SupportRecord

    def scores(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """Return the scores (n,) of actions (n, act) in n states; -infinity where not a number."""
        raw = self.score(model, states, actions)
        return np.where(np.isnan(raw), np.float32(-np.inf), raw)

    def accepts(self, model: SafetyModel, states: StateValue, actions: Actions) -> Flags:
        """Whether actions (n, act) in n states score at least the level: (n,)."""
        # False for NaN.
        return np.asarray(self.score(model, states, actions) >= self.record.level)

    def proposals(self, model: SafetyModel, states: StateValue) -> Candidates:
        """Return draws of the log's behaviour for each state, (n, c, act), in the box.

        What the behaviour does is what the test accepts: without these a shield whose other
        candidates all lie outside the data would find no replacement. None where there is no flow
        to draw from, nor for discrete actions, all of which are candidates anyway.
        """
        count = len(states.inputs)
        if model.action_codec.discrete or not model.knows_behaviour:
            return np.empty((count, 0, model.action_codec.width), np.float32)
        noise = _noise(model.behaviour_noise_features)
        return model.behaviour(states, np.broadcast_to(noise, (count, *noise.shape)))

    def first(
        self,
        model: SafetyModel,
        states: StateValue,
        candidates: Candidates,
        order: npt.NDArray[np.int64],
        eligible: Flags,
    ) -> npt.NDArray[np.int64]:
        """Return each state's first supported candidate in `order`, (n,); -1 where none is.

        Scores are made as they are needed: a few for the candidates that come first.

        Args:
            model: whose behaviour counts.
            states: n of them.
            candidates: (n, c, act).
            order: (n, c) permutations of range(c), eligible ones first.
            eligible: (n, c) which of them may be chosen at all.
        """
        found = np.full(len(order), -1, np.int64)
        todo = np.flatnonzero(eligible.any(axis=1))
        start, block = 0, _FIRST
        while len(todo) and start < order.shape[1]:
            columns = order[todo, start : start + block]
            wanted = eligible[todo[:, None], columns]
            rows, picks = np.repeat(todo, wanted.sum(axis=1)), columns[wanted]
            hits = np.zeros_like(wanted)
            hits[wanted] = self.accepts(model, states.take(rows), candidates[rows, picks])
            some = hits.any(axis=1)
            found[todo[some]] = columns[some, hits[some].argmax(axis=1)]
            # Where the last one looked at was not eligible, nor are those to come.
            todo = todo[~some & wanted[:, -1]]
            start, block = start + block, 2 * block
        return found

    def choose(
        self,
        model: SafetyModel,
        states: StateValue,
        candidates: Candidates,
        values: Scalars,
        distance: Scalars,
        good: Flags,
    ) -> npt.NDArray[np.int64]:
        """Return which candidate replaces the proposal in each of n states, (n,).

        The nearest that is good and supported (of equally near ones that of lowest Q_h). Where
        there is none: the supported one of lowest Q_h, because elsewhere Q_h means nothing, and
        its lowest value is likeliest its largest error. Where none is supported either: the one
        of highest score, the most like the log.

        Args:
            model: whose behaviour counts.
            states: n of them.
            candidates: (n, c, act).
            values: (n, c) Q_h.
            distance: (n, c) from the proposal.
            good: (n, c) whether Q_h allows them.
        """
        order = np.lexsort((values, np.where(good, distance, np.inf)), axis=1)
        best = self.first(model, states, candidates, order, good)
        rest = np.flatnonzero(best < 0)
        if len(rest):
            each, width = candidates.shape[1:]
            scores = self.scores(
                model,
                states.take(np.repeat(rest, each)),
                candidates[rest].reshape(len(rest) * each, width),
            ).reshape(len(rest), each)
            supported = scores >= self.record.level
            safest = np.where(supported, values[rest], np.inf).argmin(axis=1)
            best[rest] = np.where(supported.any(axis=1), safest, scores.argmax(axis=1))
        return best


@cache
def _noise(width: int) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(_SEED).standard_normal((_PROPOSALS, width)).astype(np.float32)
    # Within one standard deviation or so: near the middle of what the log does.
    noise *= 0.7
    noise[0] = 0.0
    noise.flags.writeable = False
    return noise
