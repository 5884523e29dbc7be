"""What a behaviour offers in the states that learning meets, cut down to a safe set."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeshield.online.safe_sets import SafeRules, SafeSet
from safeshield.proposals.choices import choice_index, normalised
from safeshield.proposals.sources import Behaviour, log_density
from safeshield.spaces.batches import Batch, batch_length, finite, take
from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]


class Offer(NamedTuple):
    """What mu, cut down to the safe set, offers in n states."""

    candidates: Array
    """(n, m, act) rows of samples; (n, 0, act) where actions are discrete."""
    log_mu: Array
    """(n, c) log probabilities of all choices; (n, 0) in a Box, where all samples count alike."""
    executed: Array
    """(n, act) one draw, as rows: what may run."""
    outside: npt.NDArray[np.bool_]
    """(n,) the behaviour's own draw lay outside, and another one took its place."""
    mass_outside: Array
    """(n,) share of the behaviour that lies outside: exact where it has probabilities, else of its
    m draws."""
    lost: npt.NDArray[np.bool_]
    """(n,) nothing is admitted: the shield's least bad action stands alone."""


def offer(
    behaviour: Behaviour,
    safe_set: SafeSet | None,
    played: SpaceCodec,
    observations: Batch,
    samples: int,
    rng: np.random.Generator,
) -> Offer:
    """Ask a behaviour for actions and cut them down to a safe set (None: take them as they are).

        mu_safe(a | s) = mu(a | s) 1[a admitted] / Z(s)

    Where mu puts nothing on what is admitted, the safe set's replacement stands alone.

    Raises:
        ValueError: the behaviour returns another shape, NaN, or no probabilities.
        NoSafeActionError: rules admit nothing, or an observation is not finite.
    """
    if isinstance(safe_set, SafeRules):
        # Before a behaviour is asked, which may ask these very rules about the zeros below.
        safe_set.refuse_unreadable(observations)
    # Behaviours may refuse what is not a number; safe sets do not admit anything there.
    seen = finite(observations)
    if played.discrete:
        return _discrete(behaviour, safe_set, played, observations, seen, samples, rng)
    return _box(behaviour, safe_set, played, observations, seen, samples, rng)


def _box(
    behaviour: Behaviour,
    safe_set: SafeSet | None,
    played: SpaceCodec,
    observations: Batch,
    seen: Batch,
    samples: int,
    rng: np.random.Generator,
) -> Offer:
    drawn = _checked(behaviour.draw(seen, samples, rng), played, batch_length(seen), samples)
    inside = np.ones(drawn.shape[:2], dtype=np.bool_)
    if safe_set is not None:
        inside = safe_set.admits(observations, drawn)
    lost = np.zeros(len(drawn), dtype=np.bool_)
    first = inside[:, 0].copy()
    share = 1.0 - inside.mean(axis=1)
    candidates = drawn
    if safe_set is not None and not inside.all():
        candidates = drawn.copy()
        none = np.flatnonzero(~inside.any(axis=1))
        if len(none):
            instead, admitted = safe_set.replace(take(observations, none), drawn[none, 0])
            candidates[none] = instead[:, None]
            lost[none] = ~admitted
        for i in np.flatnonzero(~inside.all(axis=1) & inside.any(axis=1)):
            # What was refused is drawn again, from what was not.
            good, bad = np.flatnonzero(inside[i]), np.flatnonzero(~inside[i])
            candidates[i, bad] = drawn[i, rng.choice(good, len(bad))]
    return Offer(
        candidates, np.zeros((len(drawn), 0), np.float32), candidates[:, 0], ~first, share, lost
    )


def _discrete(
    behaviour: Behaviour,
    safe_set: SafeSet | None,
    played: SpaceCodec,
    observations: Batch,
    seen: Batch,
    samples: int,
    rng: np.random.Generator,
) -> Offer:
    count, choices = batch_length(seen), played.choices
    every = np.broadcast_to(choices, (count, *choices.shape))
    log_mu = log_density(behaviour, seen, every)
    if log_mu is None:
        drawn = _checked(behaviour.draw(seen, samples, rng), played, count, samples)
        counts = np.zeros((count, len(choices)))
        np.add.at(counts, (np.arange(count)[:, None], choice_index(played, drawn)), 1.0)
        with np.errstate(divide="ignore"):
            log_mu = np.log(counts / samples)
    total = np.exp(log_mu).sum(axis=1)
    if not np.allclose(total, 1.0, atol=1e-3):
        at = int(np.abs(np.nan_to_num(total, nan=np.inf) - 1.0).argmax())
        raise ValueError(
            "the behaviour's probabilities of all actions must sum to 1 in every state, got "
            f"{total[at]} in {take(observations, at)}: log_prob must be the log of a probability"
        )
    inside = np.ones(log_mu.shape, dtype=np.bool_)
    if safe_set is not None:
        inside = safe_set.admits(observations, every)
    noise = rng.gumbel(size=log_mu.shape)
    proposed = (log_mu + noise).argmax(axis=1)
    each = np.arange(count)
    outside = ~inside[each, proposed]
    masked = np.where(inside, log_mu, -np.inf)
    lost = np.zeros(count, dtype=np.bool_)
    none = np.flatnonzero(np.isneginf(masked.max(axis=1)))
    if len(none) and safe_set is not None:
        instead, admitted = safe_set.replace(take(observations, none), choices[proposed[none]])
        masked[none, choice_index(played, instead[:, None])[:, 0]] = 0.0
        lost[none] = ~admitted
    mass = np.where(inside, 0.0, np.exp(log_mu)).sum(axis=1)
    masked = normalised(masked)
    executed = choices[(masked + noise).argmax(axis=1)]
    empty = np.zeros((count, 0, played.width), np.float32)
    return Offer(empty, masked.astype(np.float32), executed, outside, mass, lost)


def _checked(drawn: Array, played: SpaceCodec, count: int, samples: int) -> Array:
    drawn = np.asarray(drawn)
    if drawn.shape != (count, samples, played.width):
        raise ValueError(
            f"the behaviour must draw actions of shape {(count, samples, played.width)} (states, "
            f"draws, entries), got {drawn.shape}"
        )
    if not np.asarray(played.contains(drawn)).all():
        bad = drawn[~np.asarray(played.contains(drawn))][0]
        raise ValueError(f"the behaviour must draw actions of {played.space}, got {bad}")
    return drawn.astype(np.float32)
