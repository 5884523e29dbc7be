"""Learned safety and reward values against exact ones on a chain that fits in the head.

Places 0 to 5 on a line, seen one-hot. Action above 0: one place up; below: one down (0 stays).
From place 4, the rapids, every action leads to place 5, the fall: a violation that ends the
episode, so it stands in the log as the cost of the step from 4, and nowhere else.
"""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch

from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
from safeshield.data import OfflineDataset
from safeshield.exact import boat_value
from safeshield.shield import Shield

FALL, RAPIDS, DISCOUNT = 5, 4, 0.9
PLACES = np.eye(6, dtype=np.float32)
CONFIG = SafeFQLConfig(
    critic_hidden=(32,),
    flow_hidden=(8,),
    student_hidden=(8,),
    batch_size=64,
    learning_rate=3e-3,
    discount=DISCOUNT,
    safety_discount=DISCOUNT,
    safety_backup_steps=(1,),
    reward_backup_steps=(1,),
    polyak=0.05,
    phase_shares=(0.96, 0.02, 0.02),
)


def after(place: int, action: int) -> int:
    return FALL if place == RAPIDS else max(place + action, 0)


def exact() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """V (5,) and Q (5, 2), actions down and up, by value iteration; h = -1 and +1."""
    value = np.full(6, -1.0)
    for _ in range(500):
        q = np.empty((5, 2))
        for place in range(5):
            for i, action in enumerate((-1, 1)):
                reached = after(place, action)
                m = 1.0 if reached == FALL else -1.0
                later = m if reached == FALL else max(m, value[reached])
                q[place, i] = (1 - DISCOUNT) * m + DISCOUNT * later
        value[:5] = q.min(axis=1)
    return value[:5], q


def random_walks(episodes: int, longest: int, seed: int = 0) -> OfflineDataset:
    """Walks of a coin, from anywhere, cut after `longest` steps unless they fall."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, bool, bool]] = []
    for _ in range(episodes):
        place = int(rng.integers(0, 5))
        for step in range(longest):
            action = int(rng.choice([-1, 1]))
            reached = after(place, action)
            fell = reached == FALL
            rows.append((place, action, reached, fell, step == longest - 1 and not fell))
            place = reached
            if fell:
                break
    place, action, reached, fell, cut = (np.array(column) for column in zip(*rows, strict=True))
    return OfflineDataset.from_arrays(
        observations=PLACES[place],
        actions=action[:, None].astype(np.float32),
        rewards=np.ones(len(rows)),
        next_observations=PLACES[reached],
        terminated=fell,
        truncated=cut,
        costs=fell.astype(float),
    )


def learned(shield: Shield) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    value = np.asarray(shield.value(PLACES[:5]))
    q = [np.asarray(shield.value(PLACES[:5], np.full((5, 1), a, np.float32))) for a in (-1, 1)]
    return value, np.stack(q, axis=1)


@pytest.mark.parametrize(
    ("longest", "windows", "expectile"),
    [
        # Every walk one step long: what comes after it is known through bootstraps alone.
        pytest.param(1, (1,), 0.99, id="truncated after every step"),
        pytest.param(12, (1,), 0.99, id="one-step backups"),
        # Half of all windows of two steps from place 3 go up: the expectile must find the others.
        pytest.param(12, (4, 2), 0.995, id="windows along the log"),
    ],
)
def test_values_are_the_exact_ones(
    longest: int, windows: tuple[int, ...], expectile: float
) -> None:
    config = dataclasses.replace(CONFIG, safety_backup_steps=windows, safety_expectile=expectile)
    log = random_walks(1500 if longest == 1 else 300, longest)
    agent = SafeFQL(config, device="cpu").fit(log, steps=1500)
    value, q = learned(agent.shield())
    exact_value, exact_q = exact()
    np.testing.assert_allclose(value, exact_value, atol=0.12)
    np.testing.assert_allclose(q, exact_q, atol=0.12)
    # h is below 0 in the rapids; that they are lost is known from the step that ends the walk.
    assert value[RAPIDS] > 0.8
    assert q[3, 1] > 0.5 > -0.5 > q[3, 0]


def test_the_exact_values_of_the_chain() -> None:
    value, q = exact()
    np.testing.assert_allclose(value, [-1, -1, -1, -1, 1], atol=1e-9)
    np.testing.assert_allclose(q[3], [-1.0, 0.8], atol=1e-9)


def test_outside_the_way_back_is_worth_its_distance() -> None:
    # h = place - 2.5 on places 0 to 4, the last of which holds on going up: 3 and 4 are outside,
    # and no walk ends there. Of a state outside V_h is h, whatever is done; Q_h has to tell.
    rng = np.random.default_rng(0)
    place, action = rng.integers(0, 5, 2000), rng.choice([-1, 1], 2000)
    reached = np.clip(place + action, 0, 4)
    log = OfflineDataset.from_arrays(
        observations=PLACES[place],
        actions=action[:, None].astype(np.float32),
        rewards=np.ones(2000),
        next_observations=PLACES[reached],
        terminated=np.zeros(2000, bool),
        truncated=np.ones(2000, bool),
        costs=(reached > 2.5).astype(float),
        constraints=place - 2.5,
        next_constraints=reached - 2.5,
    )
    value, q = learned(SafeFQL(CONFIG, device="cpu").fit(log, steps=1500).shield())
    np.testing.assert_allclose(value[3:], [0.5, 1.5], atol=0.1)
    exact = [[-0.5, 1.5], [0.5, 1.5]]
    np.testing.assert_allclose(q[3:], exact, atol=0.15)


def test_reward_values_discount_and_end_with_the_episode() -> None:
    # One way only: up. The return from place p is the sum of 5 - p discounted ones.
    count = 200
    place = np.tile(np.arange(5), count)
    log = OfflineDataset.from_arrays(
        observations=PLACES[place],
        actions=np.ones((5 * count, 1), np.float32),
        rewards=np.ones(5 * count),
        next_observations=PLACES[place + 1],
        terminated=place == RAPIDS,
        truncated=np.zeros(5 * count, bool),
        costs=(place == RAPIDS).astype(float),
        action_space=gym.spaces.Box(-1.0, 1.0, (1,)),
    )
    config = dataclasses.replace(CONFIG, reward_backup_steps=(4, 1))
    agent = SafeFQL(config, device="cpu").fit(log, steps=1500)
    model = agent._model
    assert model is not None
    scaled = torch.tensor(model.scaling.observations(PLACES[:5]))
    value = model.critics.reward.value(agent._networks, scaled).numpy()
    np.testing.assert_allclose(value, [(1 - DISCOUNT**k) / 0.1 for k in (5, 4, 3, 2, 1)], atol=0.15)


def test_a_small_agent_knows_the_boats_rocks_and_their_shadows(shield: Shield) -> None:
    known = boat_value()
    grid = np.stack(np.meshgrid(known.xs, known.ys, indexing="ij"), -1).reshape(-1, 2)
    unsafe = known.values.reshape(-1) > 0
    value = np.asarray(shield.value(grid))
    called = value > 0
    assert (unsafe & called).sum() / (unsafe | called).sum() > 0.75
    # Deep inside and far away there is no doubt.
    assert (value[known.values.reshape(-1) > 0.1] > 0).mean() > 0.98
    assert (value[known.values.reshape(-1) < -0.3] < 0).mean() > 0.98
