"""Where actions are discrete: what a shield lets pass, as masks for agents that take one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.shield.critics import StateValue
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.shapes import Observations, Scalars

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

Mask = npt.NDArray[np.bool_]


def acceptable_choices(
    shield: Shield,
    states: StateValue,
    rows: Observations,
    threshold: float | Scalars | None = None,
) -> Mask:
    """Return which of all c actions may be taken in n states: (n, c), in order of `choices`.

    Those with Q_h <= threshold; where there is none, or the observation is not readable, the one
    of lowest Q_h, which is what the filter would execute. So every row has a True.
    """
    return _weighed(shield, states, rows, threshold)[0]


def _weighed(
    shield: Shield, states: StateValue, rows: Observations, threshold: float | Scalars | None
) -> tuple[Mask, npt.NDArray[np.floating]]:
    """`acceptable_choices`, and the Q_h (n, c) of all."""
    choices = shield.model.action_codec.choices
    every = np.broadcast_to(choices, (len(rows), *choices.shape))
    accepted, values = shield.acceptable(states, rows, every, threshold)
    nothing = np.flatnonzero(~accepted.any(axis=1))
    least = values[nothing].argmin(axis=1)
    if shield.support is not None and len(nothing):
        # What runs then depends on what the log has shown: ask the filter itself.
        limit = shield.threshold if threshold is None else threshold
        limits = np.broadcast_to(np.asarray(limit, np.float64), (len(rows),))[nothing]
        part = states.take(nothing)
        executed, _ = shield.filter_rows(part, rows[nothing], choices[least], limits)
        least = (executed[:, None] == choices).all(axis=-1).argmax(axis=1)
    accepted[nothing, least] = True
    return accepted, values


def agent_mask(
    shield: Shield,
    states: StateValue,
    rows: Observations,
    threshold: float | Scalars | None = None,
) -> Mask:
    """Return `Shield.action_mask` of n states that have been judged already: (n, k).

    Raises:
        TypeError: actions are not discrete.
    """
    played = shield.model.action_codec
    if not played.discrete:
        raise TypeError(
            "a mask needs discrete actions (Discrete, MultiDiscrete, MultiBinary), the shield's "
            f"are {played.space}; filter() them, or draw them from SafeSupportPolicy"
        )
    accepted, values = _weighed(shield, states, rows, threshold)
    if played.width == 1:
        return accepted
    masks = np.zeros((len(accepted), sum(played.categories)), np.bool_)
    for i, (mask, value) in enumerate(zip(accepted, values, strict=True)):
        masks[i] = product_mask(mask, value, played.categories)
    return masks


def product_mask(accepted: Mask, values: Scalars, categories: Sequence[int]) -> Mask:
    """Return masks of single entries, joined, all of whose combinations are accepted.

    An entry's mask cannot say "this only together with that", so some accepted actions are left
    out. Grown from the accepted action of lowest Q_h: one more value for one entry, as long as
    every combination stays accepted; the one that adds most combinations first. What comes out
    cannot be enlarged further, but need not be the largest of its kind.

    Args:
        accepted: (c,) all combinations, the last entry running fastest; at least one True.
        values: (c,) Q_h.
        categories: integers that each entry counts; their product is c.

    >>> accepted = np.array([[True, True, False], [True, True, True]])
    >>> product_mask(accepted.ravel(), np.zeros(6), (2, 3)).astype(int).tolist()
    [1, 1, 1, 1, 0]
    """
    if accepted.all():
        return np.ones(sum(categories), dtype=np.bool_)
    grid = accepted.reshape(categories)
    first = np.unravel_index(np.where(accepted, values, np.inf).argmin(), tuple(categories))
    chosen = [np.arange(n) == i for n, i in zip(categories, first, strict=True)]
    while True:
        sizes = np.array([mask.sum() for mask in chosen])
        # Widening an entry multiplies the combinations by 1 + 1 / (its size): the narrowest first.
        for entry in np.argsort(sizes, kind="stable"):
            ranges = [mask if i != entry else np.ones_like(mask) for i, mask in enumerate(chosen)]
            others = tuple(i for i in range(len(chosen)) if i != entry)
            more = grid[np.ix_(*ranges)].all(axis=others) & ~chosen[entry]
            if more.any():
                chosen[entry][more.argmax()] = True
                break
        else:
            return np.concatenate(chosen)


def with_own_mask(masks: Mask, own: object, played: SpaceCodec) -> Mask:
    """Return masks (..., k) without what the environment's own masks forbid, its info's say.

    Where the two together leave nothing to choose, the shield's masks alone.

    Args:
        masks: `agent_mask`.
        own: (..., k), or a tuple of each entry's masks as Gymnasium's MultiDiscrete has it.
        played: the actions.

    Raises:
        ValueError: another shape.
    """
    given = np.concatenate(own, axis=-1) if isinstance(own, tuple) else np.asarray(own)
    if given.shape != masks.shape:
        raise ValueError(
            "the environment's own action mask must have a number for each action, shape "
            f"{masks.shape}, got {given.shape}: rename it in a wrapper inside the shield's"
        )
    both = masks & given.astype(np.bool_)
    parts = np.split(both, np.cumsum(played.categories)[:-1], axis=-1)
    some = np.all([part.any(axis=-1) for part in parts], axis=0)
    return np.where(some[..., None], both, masks)
