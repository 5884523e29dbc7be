"""Proposals: what a source draws, what it says of it, and what a safe set leaves of both."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tables import table_shield

from safeshield.online import (
    FlowTeacher,
    LoggedBehaviour,
    MaskedUniform,
    SafeRules,
    Tabular,
)
from safeshield.online.safe_proposals import SafeBehaviour, admitted
from safeshield.online.safe_sets import ShieldSet
from safeshield.proposals.choices import every_choice
from safeshield.proposals.sources import Uniform, UserPolicy
from safeshield.spaces.rows import flat_actions

Array = npt.NDArray[Any]
STATES, MOVES = 4, 5
SPACES = gym.spaces.Discrete(STATES), gym.spaces.Discrete(MOVES)
CELLS = np.arange(STATES)


def table(seed: int) -> tuple[Array, Array]:
    """Probabilities (states, moves), and which moves a safe set admits: some in each state."""
    rng = np.random.default_rng(seed)
    inside = rng.random((STATES, MOVES)) < 0.6
    inside[CELLS, rng.integers(0, MOVES, STATES)] = True
    return rng.dirichlet(np.ones(MOVES), STATES), inside


@given(st.integers(0, 10_000))
def test_a_restricted_behaviour_is_mu_over_its_mass_inside(seed: int) -> None:
    """mu_safe(a | s) = mu(a | s) 1[a admitted] / Z(s), by the definition."""
    mu, inside = table(seed)
    rules = SafeRules(lambda cell, move: bool(inside[cell, move]), SPACES[1])
    safe = SafeBehaviour(Tabular(mu, *SPACES), rules, rules.actions)
    got = safe.propose(CELLS, 1, np.random.default_rng(seed))
    expected = mu * inside / (mu * inside).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(got.log_mu), expected, atol=1e-6)
    np.testing.assert_allclose(got.mass_outside, (mu * ~inside).sum(axis=1), atol=1e-6)
    assert inside[CELLS, got.executed[:, 0].astype(int)].all()
    assert not got.no_safe_action.any()


@given(st.integers(0, 10_000))
def test_masked_uniform_is_the_uniform_source_restricted(seed: int) -> None:
    _, inside = table(seed)
    shield = table_shield(np.where(inside, -1.0, 1.0))
    masked, every = MaskedUniform(shield), every_choice(flat_actions(SPACES[1]), STATES)
    safe = SafeBehaviour(Uniform(SPACES[1]), ShieldSet(shield), flat_actions(SPACES[1]))
    got = safe.propose(CELLS, 1, np.random.default_rng(seed))
    np.testing.assert_allclose(masked.log_prob(CELLS, every), got.log_mu, atol=1e-6)
    each = np.exp(masked.log_prob(CELLS, every))
    np.testing.assert_allclose(each, inside / inside.sum(axis=1, keepdims=True), atol=1e-12)


def test_where_nothing_is_admitted_the_least_bad_action_stands_alone() -> None:
    q = np.array([[3.0, 1.0, 2.0], [-1.0, 5.0, 5.0]])
    shield = table_shield(q)
    safe = SafeBehaviour(Uniform(shield.action_space), ShieldSet(shield), shield.model.action_codec)
    got = safe.propose(np.arange(2), 1, np.random.default_rng(0))
    assert got.executed.ravel().tolist() == [1.0, 0.0]
    assert got.no_safe_action.tolist() == [True, False]
    np.testing.assert_allclose(np.exp(got.log_mu), [[0, 1, 0], [1, 0, 0]])
    refused = admitted(safe.safe_set, np.arange(2), np.array([[2.0], [0.0]]))
    assert refused.ravel().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["table", "logged", "uniform"])
def test_draws_follow_the_density_that_is_told(kind: str) -> None:
    mu, _ = table(3)
    sources: dict[str, Any] = {
        "table": Tabular(mu, *SPACES),
        "logged": LoggedBehaviour(table_shield(mu, behaviour=mu)),
        "uniform": Uniform(SPACES[1]),
    }
    told = sources[kind].log_prob(CELLS, every_choice(flat_actions(SPACES[1]), STATES))
    drawn = sources[kind].draw(CELLS, 4000, np.random.default_rng(0))
    for state in CELLS:
        counts = np.bincount(drawn[state, :, 0].astype(int), minlength=MOVES)
        assert chisquare(counts, 4000 * np.exp(told[state])).pvalue > 1e-4


def test_flow_teacher_is_the_first_name_of_logged_behaviour() -> None:
    assert FlowTeacher is LoggedBehaviour


class Counter:
    """A recurrent policy: what it returns tells how many steps it remembers."""

    def predict(
        self,
        observation: Array,
        state: tuple[Array, ...] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array, ...]]:
        before = np.zeros(len(observation)) if state is None else state[0]
        if episode_start is not None:
            before = np.where(episode_start, 0.0, before)
        return 2.0 * before[:, None], (before + 1.0,)


def test_a_judged_policy_remembers_what_it_saw_and_not_how_often_it_was_asked() -> None:
    box, rng = gym.spaces.Box(-1.0, 1.0, (1,)), np.random.default_rng(0)
    judged, seen = UserPolicy(Counter(), box, judged=True), np.zeros((3, 2))
    judged.remember((np.full(3, 4.0),), None)
    for _ in range(3):
        # Beyond the box: the shield that judges it is told.
        assert judged.draw(seen, 1, rng).ravel().tolist() == [8.0, 8.0, 8.0]
    assert judged.memory is not None
    assert judged.memory[0].tolist() == [5.0, 5.0, 5.0]


def test_a_policy_that_is_not_judged_is_clipped_and_begins_anew_in_every_state() -> None:
    box, rng = gym.spaces.Box(-1.0, 1.0, (1,)), np.random.default_rng(0)
    free = UserPolicy(lambda observation: observation[:1] * 5.0, box)
    assert free.draw(np.array([[0.1], [1.0]]), 2, rng).ravel().tolist() == [0.5, 0.5, 1.0, 1.0]
    counter = UserPolicy(Counter(), box)
    for _ in range(2):
        assert not counter.draw(np.zeros((2, 2)), 3, rng).any()
    assert counter.log_prob(np.zeros((2, 2)), np.zeros((2, 1, 1))) is None
