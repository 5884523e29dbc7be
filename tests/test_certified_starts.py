"""`CertifiedStarts`: the environment's own starts, restricted to the certified ones."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from fitted import DT
from test_shield import record

from safeshield.shield import Shield
from safeshield.wrappers import CertifiedStarts, SafetyShield


def boat() -> gym.Env:  # type: ignore[type-arg]
    return gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=100)


def test_starts_are_the_first_certified_ones_in_the_environments_own_order(shield: Shield) -> None:
    delta = 0.5
    calibrated = replace(shield, delta=delta, record=record(delta))
    env = CertifiedStarts(SafetyShield(boat(), calibrated))
    plain = boat()
    seeds: list[int | None] = [7, *([None] * 30)]
    kept, skipped = [], 0
    first, _ = plain.reset(seed=7)
    draws = iter([first, *(plain.reset()[0] for _ in range(400))])
    for seed in seeds:
        observation, info = env.reset(seed=seed)
        assert info["shield/certified"]
        assert calibrated.certified(observation)
        for draw in draws:
            if calibrated.certified(draw):
                np.testing.assert_array_equal(draw, observation)
                break
            skipped += 1
        kept.append(observation)
    assert skipped > 3
    assert len(np.unique(np.stack(kept), axis=0)) == len(kept)


def test_no_step_follows_a_reset_that_found_no_certified_start(shield: Shield) -> None:
    delta = 0.5
    calibrated = replace(shield, delta=delta, record=record(delta))
    env = CertifiedStarts(SafetyShield(boat(), calibrated), most=3)
    still = np.zeros(2, np.float32)
    rock = {"state": [-0.5, 0.5]}
    env.reset(seed=0, options={"state": [1.9, 0.0]})
    env.step(still)
    with pytest.raises(ValueError, match="none of 3 starts"):
        env.reset(options=rock)
    with pytest.raises(gym.error.ResetNeeded, match="did not begin with a certified start"):
        env.step(still)
    env.reset(options={"state": [1.9, 0.0]})
    env.step(still)


def test_what_cannot_be_certified_is_told(shield: Shield) -> None:
    with pytest.raises(ValueError, match="put SafetyShield inside"):
        CertifiedStarts(boat()).reset(seed=0)
    with pytest.raises(ValueError, match="shield inside is not calibrated"):
        CertifiedStarts(gym.wrappers.OrderEnforcing(SafetyShield(boat(), shield.with_delta(0.1))))
    strict = replace(shield, delta=50.0, record=record(50.0))
    with pytest.raises(ValueError, match="none of 5 starts"):
        CertifiedStarts(SafetyShield(boat(), strict), most=5).reset(seed=0)
    with pytest.raises(ValueError, match="most must be at least 1"):
        CertifiedStarts(boat(), most=0)
