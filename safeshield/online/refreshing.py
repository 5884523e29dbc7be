"""Refresh the collector from the learned critics, and test it before it acts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv

from safeshield.calibration.binomial import episodes_needed
from safeshield.calibration.walk import CalibrationError
from safeshield.online.collector import Choose, Collector
from safeshield.online.config import SSQLConfig
from safeshield.online.extraction import InducedPolicy
from safeshield.online.safe_proposals import SafeProposals
from safeshield.online.safe_sets import SafeSet, ShieldSet, check_spaces, spaces_of
from safeshield.rollouts.policies import batch_policy
from safeshield.shield.nested import refuse_shielded
from safeshield.shield.record import CalibrationRecord
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch

Array = npt.NDArray[Any]


class RefreshRefusedWarning(UserWarning):
    """A refreshed collector failed its test or the budget is spent; the old collector is kept."""


class Refresher:
    """Makes the collector mix mu with the current induced policy; both choose among mu's proposals.

    Args:
        config: Settings.
        safe_set: A calibrated shield, where refreshed collectors are tested.
        calibration_env: Environment in which they are tested.
        venv: Environments in which learning collects; the spaces of both must be the same.

    Raises:
        ValueError: `recalibration_episodes` is set without a calibrated shield or without a
            `calibration_env`; that environment is shielded or has other spaces; or it is given
            without `recalibration_episodes`.
    """

    def __init__(
        self,
        config: SSQLConfig,
        safe_set: SafeSet | None,
        calibration_env: gym.Env[Any, Any] | None,
        venv: VecEnv | None = None,
    ) -> None:
        self._config, self._env = config, calibration_env
        self.spent = 0
        """Episodes of the budget that the tests have used."""
        if not config.recalibration_episodes:
            if calibration_env is not None:
                raise ValueError(
                    "calibration_env is for tests of refreshed collectors: set "
                    "SSQLConfig(refresh_every=..., recalibration_episodes=...) with it"
                )
            return
        if not isinstance(safe_set, ShieldSet) or safe_set.shield.record is None:
            raise ValueError(
                "recalibration_episodes needs a calibrated shield, whose record says what to test; "
                "rules are not tested, and an uncalibrated shield promises nothing"
            )
        if calibration_env is None:
            raise ValueError(
                "recalibration_episodes needs a calibration_env, in which refreshed collectors are "
                "tested before they act"
            )
        refuse_shielded(calibration_env, "pass the environment without its shield")
        if venv is not None:
            check_spaces(calibration_env, "calibration_env's", spaces_of(venv))

    def refresh(self, induced: InducedPolicy, collector: Collector, step: int) -> None:
        """Refresh the collector, after it has passed its test where tests are required.

        Args:
            induced: The induced policy, with the current critics.
            collector: The collector to refresh; its shield gets the new record.
            step: Number of steps so far, which names the test and its seed.
        """
        share = self._config.refresh_share

        def choose(observations: Batch, here: SafeProposals, rng: np.random.Generator) -> Array:
            chosen, _ = induced.weigh(observations, here, rng)
            return np.where(rng.random((len(chosen), 1)) < share, chosen, here.executed)

        safe = induced.mu.safe_set
        if not self._config.recalibration_episodes or not isinstance(safe, ShieldSet):
            collector.choose = choose
            return
        try:
            tested = self._tested(safe.shield, induced, choose, step)
        except CalibrationError as error:
            warnings.warn(
                f"the collector was not refreshed at step {step}: {error}",
                RefreshRefusedWarning,
                stacklevel=4,
            )
            return
        collector.choose = choose
        collector.mu = replace(induced.mu, safe_set=ShieldSet(tested))

    def _tested(self, shield: Shield, induced: InducedPolicy, choose: Choose, step: int) -> Shield:
        """Return the shield with a record of the new collector.

        Raises:
            CalibrationError: The collector failed the test of the shield's record, or the remaining
                budget is too small for a test.
        """
        record, env = shield.record, self._env
        if not isinstance(record, CalibrationRecord) or env is None:
            raise CalibrationError("the shield has lost its record")
        needed = episodes_needed(record.epsilon, record.confidence, violations=1)
        left = self._config.recalibration_episodes - self.spent
        if needed > left:
            raise CalibrationError(f"the budget has {left} episodes left, a test needs {needed}")
        self.spent += needed

        @batch_policy
        def refreshed(observations: Batch, rng: np.random.Generator) -> Array:
            here = induced.mu.propose(observations, self._config.samples, rng)
            return shield.points(choose(observations, here, rng))

        return shield.calibrate(
            env,
            epsilon=record.epsilon,
            confidence=record.confidence,
            policy=refreshed,
            policy_name=f"SSQL's collector of step {step}",
            deltas=[shield.delta],
            episodes=needed,
            seed=self._config.seed + step,
        )
