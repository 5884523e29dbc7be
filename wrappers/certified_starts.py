"""`CertifiedStarts`: a wrapper whose episodes start in certified states."""

from __future__ import annotations

from typing import Any, SupportsFloat, cast

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.infos import CERTIFIED
from safeshield.shield.nested import shielding_layer
from safeshield.spaces.generic import Env, Wrapper
from safeshield.wrappers.safety_shield import SafetyShield


class CertifiedStarts(Wrapper, RecordConstructorArgs):
    """Reset the environment until the start is certified.

    Put this wrapper around a `SafetyShield` with a calibrated shield. The promise in the shield's
    file is about episodes that start with V_h <= -delta, drawn from the environment's own starts.
    Resetting until a start is certified draws from that distribution. The first reset uses the
    seed, and the others continue the environment's random numbers.

    Args:
        env: An environment whose reset reports ``info["shield/certified"]``.
        most: Largest number of resets before an error is raised.

    Raises:
        ValueError: `most` is below 1, or the shield inside is not calibrated. `reset` also raises
            it where the key is missing or no start was certified.
        gymnasium.error.ResetNeeded: `step` is called after a reset that failed.
    """

    def __init__(self, env: Env, most: int = 1000) -> None:
        RecordConstructorArgs.__init__(self, most=most)
        gym.Wrapper.__init__(self, env)
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self._most = most
        self._failed = False
        layer = shielding_layer(env)
        if layer is not None and cast(SafetyShield, layer).shield.record is None:
            raise ValueError(
                "the shield inside is not calibrated, so no start is ever certified: use "
                "shield.calibrate(...) first (with_delta, with_support and others drop the record)"
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment until the start is certified, and return that start and its info.

        `seed` is the seed of the first reset. `options` are passed to every reset.
        """
        self._failed = True
        for _ in range(self._most):
            observation, info = self.env.reset(seed=seed, options=options)
            seed = None
            if CERTIFIED not in info:
                raise ValueError(
                    f"env must report info[{CERTIFIED!r}] at reset: put SafetyShield inside"
                )
            if info[CERTIFIED]:
                self._failed = False
                return observation, info
        raise ValueError(
            f"none of {self._most} starts was certified: the shield is not calibrated, or in "
            "another environment, or this environment hardly ever starts where its promise applies"
        )

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Take a step by `action` of an episode that began with a certified start.

        The result is that of the environment.
        """
        if self._failed:
            raise gym.error.ResetNeeded(
                "cannot step after a reset that failed: the episode under way did not begin with a "
                "certified start; call reset() first"
            )
        return self.env.step(action)
