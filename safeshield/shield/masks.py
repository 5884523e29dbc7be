"""Masks of discrete actions, made from the shield's verdicts on all actions of the space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.shapes import Scalars

Mask = npt.NDArray[np.bool_]


def check_discrete(codec: SpaceCodec) -> None:
    """Raise TypeError unless the actions of `codec` are discrete."""
    if not codec.discrete:
        raise TypeError(
            "a mask needs discrete actions (Discrete, MultiDiscrete, MultiBinary), the shield's "
            f"are {codec.space}; filter() them, or draw them from SafeSupportPolicy"
        )


def agent_masks(accepted: Mask, values: Scalars, codec: SpaceCodec) -> Mask:
    """Return the masks (n, k) that agents take, from verdicts (n, c) on all actions.

    Args:
        accepted: (n, c) which of the space's `choices` may be taken; at least one in each row.
        values: (n, c) Q_h of the choices.
        codec: Codec of the action space.
    """
    if codec.width == 1:
        return accepted
    pairs = zip(accepted, values, strict=True)
    masks = [product_mask(mask, value, codec.categories) for mask, value in pairs]
    return np.array(masks, np.bool_).reshape(len(masks), sum(codec.categories))


def product_mask(accepted: Mask, values: Scalars, categories: Sequence[int]) -> Mask:
    """Return the joined masks of all entries, such that every combination they allow is accepted.

    The mask of one entry cannot depend on the value of another, so some accepted actions are left
    out. The masks start at the accepted action of lowest Q_h. One value of one entry is added at a
    time, as long as every combination stays accepted; the value that adds most combinations comes
    first. The result cannot be enlarged further, but need not be the largest possible one.

    Args:
        accepted: (c,) whether each combination is accepted; the last entry varies fastest, and at
            least one combination is True.
        values: (c,) Q_h of the combinations.
        categories: Number of values of each entry; their product is c.

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
        # One more value multiplies the combinations by 1 + 1 / (the entry's size), so the entry
        # with the fewest values comes first.
        for entry in np.argsort(sizes, kind="stable"):
            ranges = [mask if i != entry else np.ones_like(mask) for i, mask in enumerate(chosen)]
            others = tuple(i for i in range(len(chosen)) if i != entry)
            more = grid[np.ix_(*ranges)].all(axis=others) & ~chosen[entry]
            if more.any():
                chosen[entry][more.argmax()] = True
                break
        else:
            return np.concatenate(chosen)


def with_own_mask(masks: Mask, own: object, codec: SpaceCodec) -> Mask:
    """Return masks (..., k) without the actions that the environment's own masks forbid.

    Where the two masks together leave no action, the shield's mask is returned.

    Args:
        masks: (..., k) the shield's masks, from `agent_masks`.
        own: (..., k) the environment's masks, or a tuple with the masks of each entry, as
            Gymnasium's MultiDiscrete takes them.
        codec: Codec of the action space.

    Raises:
        ValueError: The environment's masks have another shape.
    """
    given = np.concatenate(own, axis=-1) if isinstance(own, tuple) else np.asarray(own)
    if given.shape != masks.shape:
        raise ValueError(
            "the environment's own action mask must have a number for each action, shape "
            f"{masks.shape}, got {given.shape}: rename it in a wrapper inside the shield's"
        )
    both = masks & given.astype(np.bool_)
    parts = np.split(both, np.cumsum(codec.categories)[:-1], axis=-1)
    some = np.all([part.any(axis=-1) for part in parts], axis=0)
    return np.where(some[..., None], both, masks)
