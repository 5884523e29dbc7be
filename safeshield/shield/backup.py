"""A backup controller: a user's own escape, which a shield executes where it rejects an action.

A backup controller mu is a deterministic function of the observation that brakes, hovers or stops.
A shield that is trained for it (`ShieldConfig.backup`) learns the value of this escape,

    V_mu(s) = max(h(s), Q_mu(s, mu(s))),

in place of the value of the best logged continuation. It accepts an action where Q_mu(s, a) <=
-delta: after the action, mu alone stays safe. Elsewhere it executes mu, the policy of which the
values speak. (Model predictive shielding: Bastani 2021, arXiv 1905.10691; gatekeeper: Agrawal et
al. 2024, arXiv 2211.14361, which both simulate the backup with a model of the dynamics. The safety
critic of Recovery RL, Thananjeyan et al. 2021, arXiv 2010.15920, evaluates the agent instead.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.shapes import Actions, Observations, Scalars
from safeshield.values.named import NamedFunction, UnregisteredError

if TYPE_CHECKING:
    from safeshield.shield.replacement import Rejected

F = TypeVar("F")


@dataclass(frozen=True)
class BackupController(NamedFunction):
    """The strategy that executes a backup controller's action, whether or not it is acceptable.

    The controller is not called where the observation is not readable. There, and where the
    controller's action is not finite or not in the action space, the shield's learned fallback
    acts, and the report's `acceptable` is False.

    Attributes:
        name: Name and version of the controller, such as ``"brake@1"``. Two controllers with one
            name are the same controller.
        function: Function from a batch of n observations, as a vector environment returns them, to
            n actions; or an object with Stable-Baselines3's ``predict``, which is called with
            ``deterministic=True``. None where the registered one is used.

    Raises:
        ValueError: The name is empty, too long, or holds characters that cannot be printed.

    >>> brake = BackupController("doc-brake@1", lambda obs: -np.sign(obs[:, 1:]))
    >>> brake
    BackupController(name='doc-brake@1')
    """

    noun: ClassVar[str] = "backup"
    example: ClassVar[str] = "brake@1"

    @classmethod
    def _check(cls, source: object) -> None:
        if not callable(getattr(source, "predict", None)):
            super()._check(source)

    def require(self) -> None:
        """Raise LookupError unless the controller has a function in this process."""
        if not self.available:
            raise UnregisteredError(
                f"the backup controller '{self.name}' is not registered in this process, and the "
                "shield executes it where it rejects an action: import the module that registers "
                f"it, pass it, shield.with_backup(controller), or register it, "
                f"@register_backup('{self.name}')"
            )

    def actions(
        self, rows: Observations, observations: SpaceCodec, actions: SpaceCodec
    ) -> tuple[Actions, npt.NDArray[np.bool_]]:
        """Return the controller's actions (n, act), clipped into the box, and whether usable (n,).

        An action is usable where it is finite and, in a discrete space, one of the actions.

        Args:
            rows: (n, obs) readable observations, as rows of `spaces.rows`.
            observations: Converter of the observations.
            actions: Converter of the actions.

        Raises:
            LookupError: The controller is not registered in this process.
            ValueError: The controller does not return one action for each observation.
        """
        self.require()
        function, batch = self.found, observations.batch(rows)
        predict = getattr(function, "predict", None)
        told = predict(batch, deterministic=True)[0] if callable(predict) else function(batch)
        found, single = actions.flatten(np.asarray(told), f"an action of the backup '{self.name}'")
        if single or len(found) != len(rows):
            raise ValueError(
                f"the backup '{self.name}' must return {len(rows)} actions for {len(rows)} "
                f"observations, got shape {np.shape(told)}"
            )
        clipped = np.clip(found, actions.low, actions.high)
        usable = np.isfinite(found).all(axis=-1)
        if actions.discrete:
            usable = usable & actions.contains(found)
        return clipped, usable

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the controller's actions (n, act) for `rejected`, and their Q_h (n,).

        Where the clipped proposal is acceptable, it is returned instead. Q_h is infinite where the
        controller has no usable action.
        """
        model, seen = rejected.model, np.flatnonzero(rejected.seen)
        own = model.fallback_alone(rejected.states).astype(np.float64)
        ready = np.zeros(len(own), dtype=bool)
        if len(seen):
            codecs = model.observation_codec, model.action_codec
            found, usable = self.actions(rejected.rows[seen], *codecs)
            own[seen[usable]], ready[seen] = found[usable], usable
        options, _ = rejected.inside(np.stack([rejected.wanted, own], axis=1))
        values = rejected.values(options)
        kept = rejected.known & (values[:, 0] <= rejected.limit)
        values[:, 1] = np.where(ready, values[:, 1], np.inf)
        each, which = np.arange(len(own)), np.where(kept, 0, 1)
        return options[each, which], values[each, which]


def register_backup(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a backup controller under a name.

    Args:
        name: Name and version, such as ``"brake@1"``. Choose a new version when the controller
            changes, because the values and the promise of a shield hold for the old one.

    Raises:
        TypeError: `name` is not text, as where the decorator is written without a name.
        ValueError: The name is registered for another controller, or is not a name.

    >>> @register_backup("doc-stop@1")
    ... def stop(observations):
    ...     return -np.sign(observations[:, 1:])
    >>> BackupController.find("doc-stop@1").available
    True
    """
    return BackupController.register(name)
