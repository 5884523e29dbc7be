"""`ShieldCallback`, which logs the shield while an agent of Stable-Baselines3 learns."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from safeshield.rollouts.infos import CERTIFIED, INTERVENED, VALUE, violates

_SHIELD = (INTERVENED, VALUE, CERTIFIED)
_PREFIX = "shield/"
_LONGEST = 100_000


class ShieldCallback(BaseCallback):
    """Log and count interventions and violations in training, from the first warm-up step on.

    These numbers are logged whenever the algorithm logs. They cover the steps since its last log
    (at most the last 100,000):

    ``shield/intervention_rate``
        Share of steps in which another action than the proposed one was executed.
    ``shield/value_q05``, ``_q50``, ``_q95``
        Quantiles of Q_h of the executed actions, in units of h; a positive value predicts a
        violation.
    ``shield/certified_share``
        Share of steps that reached a certified state.

    These numbers cover the whole of training, and are also attributes:

    ``shield/violations``
        `violating_episodes`: episodes with ``info["constraint"] > 0`` or ``info["cost"] > 0`` (or
        NaN there) after some step. Each is counted once, as soon as it happens, so that an episode
        that training cuts off counts too. It is not logged where no info has either key.
    ``shield/episodes``
        `episodes`: episodes that have ended.

    `interventions` and `steps` count steps of single environments. The totals continue over
    several calls of ``learn``.

    Args:
        require_shield: Raise an error where the infos have no ``shield/...`` keys. False counts
            violations in an unshielded environment, for comparison.
        verbose: As in Stable-Baselines3.

    >>> import gymnasium, safeshield
    >>> from stable_baselines3 import PPO
    >>> callback = ShieldCallback(require_shield=False)
    >>> model = PPO("MlpPolicy", "safeshield/Boat-v0", n_steps=64, n_epochs=1, device="cpu")
    >>> _ = model.learn(64, callback)
    >>> callback.steps, callback.interventions
    (64, 0)
    """

    def __init__(self, require_shield: bool = True, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.require_shield = require_shield
        self.steps = 0
        self.interventions = 0
        self.episodes = 0
        self.violating_episodes = 0
        self._reported = False
        self._violated: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._window: deque[tuple[bool, float, bool]] = deque(maxlen=_LONGEST)
        self._recorded = False

    def _on_training_start(self) -> None:
        count = self.training_env.num_envs
        # With reset_num_timesteps=True, `learn` resets the environments before episodes have ended.
        if self.locals.get("reset_num_timesteps", True) or len(self._violated) != count:
            self._violated = np.zeros(count, dtype=bool)

    def _on_step(self) -> bool:
        infos: list[Mapping[str, Any]] = self.locals["infos"]
        dones = np.asarray(self.locals["dones"], dtype=bool)
        if self._recorded and f"{_PREFIX}episodes" not in self.logger.name_to_value:
            # The algorithm has written its log since then, which empties the logger.
            self._window.clear()
            self._recorded = False
        for i, info in enumerate(infos):
            self._count_shield(info)
            self._count_violation(i, info)
        self.steps += len(infos)
        self.episodes += int(dones.sum())
        self._violated[dones] = False
        # Off-policy algorithms write their log within the step that ends an episode.
        if dones.any() and isinstance(self.model, OffPolicyAlgorithm):
            self._record()
        return True

    def _on_rollout_end(self) -> None:
        # Off-policy rollouts may be single steps. Quantiles after each step would be too slow.
        if not isinstance(self.model, OffPolicyAlgorithm):
            self._record()

    def _on_training_end(self) -> None:
        self._record()
        if self.steps and not self._reported:
            warnings.warn(
                "no info carried 'constraint' or 'cost': violations could not be counted",
                stacklevel=2,
            )

    def _count_shield(self, info: Mapping[str, Any]) -> None:
        if any(key not in info for key in _SHIELD):
            if not self.require_shield:
                return
            raise ValueError(
                f"every info must carry {list(_SHIELD)}: put SafetyShield around each environment "
                "or VecSafetyShield around the vector environment, or pass require_shield=False "
                "to count violations without a shield"
            )
        intervened = bool(info[INTERVENED])
        self.interventions += intervened
        self._window.append((intervened, float(info[VALUE]), bool(info[CERTIFIED])))

    def _count_violation(self, index: int, info: Mapping[str, Any]) -> None:
        unsafe = violates(info)
        self._reported = self._reported or unsafe is not None
        if unsafe and not self._violated[index]:
            self._violated[index] = True
            self.violating_episodes += 1

    def _record(self) -> None:
        self.logger.record(f"{_PREFIX}episodes", self.episodes)
        if self._reported:
            self.logger.record(f"{_PREFIX}violations", self.violating_episodes)
        if self._window:
            table = np.array(self._window, dtype=np.float64)
            self.logger.record(f"{_PREFIX}intervention_rate", float(table[:, 0].mean()))
            self.logger.record(f"{_PREFIX}certified_share", float(table[:, 2].mean()))
            # Use values that occurred, because infinite values cannot be interpolated.
            levels = (0.05, 0.5, 0.95)
            quantiles = np.quantile(table[:, 1], levels, method="inverted_cdf")
            for level, value in zip(levels, quantiles.tolist(), strict=True):
                self.logger.record(f"{_PREFIX}value_q{round(100 * level):02d}", value)
        self._recorded = True
