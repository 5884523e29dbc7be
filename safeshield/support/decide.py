"""The support test of an action: its score must be at least the calibrated level."""

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
    """A score and its calibrated level. An action of at least this score is supported."""

    score: SupportScore
    """The score of an action in a state."""
    record: SupportRecord
    """The calibration record, which holds the level."""

    def scores(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """Return the scores (n,) of actions (n, act) in n states; minus infinity replaces NaN.

        `model` has the networks, and `states` is the result of its `states`.
        """
        raw = self.score(model, states, actions)
        return np.where(np.isnan(raw), np.float32(-np.inf), raw)

    def accepts(self, model: SafetyModel, states: StateValue, actions: Actions) -> Flags:
        """Return (n,) whether the scores of actions (n, act) in n states reach the level.

        `model` has the networks, and `states` is the result of its `states`.
        """
        # The comparison is False for NaN.
        return np.asarray(self.score(model, states, actions) >= self.record.level)

    def proposals(self, model: SafetyModel, states: StateValue) -> Candidates:
        """Return draws of the log's behaviour for each of n states, (n, c, act), in the box.

        The test accepts actions like those of the behaviour. Without these draws, a shield whose
        other candidates all lie outside the data would find no replacement. There are no draws
        (c = 0) without a flow, and for discrete actions, all of which are candidates anyway.

        `model` has the networks, and `states` is the result of its `states`.
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

        Scores are computed in blocks, in the given order, until a supported candidate is found.

        Args:
            model: The shield's networks, with the behaviour that the score uses.
            states: n states.
            candidates: (n, c, act).
            order: (n, c) permutations of range(c), with the eligible candidates first.
            eligible: (n, c) which candidates may be chosen at all.
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
            # Where the last candidate of the block was not eligible, no later one is.
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

        This is the nearest candidate that is good and supported; among equally near ones, that of
        lowest Q_h. Where there is none, it is the supported candidate of lowest Q_h. Unsupported
        ones are left out, because Q_h is unreliable there and its lowest value is probably its
        largest error. Where no candidate is supported, it is the one of highest score.

        Args:
            model: The shield's networks, with the behaviour that the score uses.
            states: n states.
            candidates: (n, c, act).
            values: (n, c) Q_h of the candidates, in units of h.
            distance: (n, c) distances of the candidates from the proposal.
            good: (n, c) whether Q_h is low enough for the candidate to be acceptable.
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
    # Less noise than N(0, I) gives actions nearer to the middle of the log's behaviour.
    noise *= 0.7
    noise[0] = 0.0
    noise.flags.writeable = False
    return noise
