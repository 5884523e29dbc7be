"""The promise: binomial tails, the walk, its validity over repeated draws, and the boat."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fitted import DT, fitted_shield
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from safeshield.calibration import (
    Attempt,
    CalibrationError,
    CalibrationRecord,
    CostAbove,
    MeanCost,
    Rung,
    Violation,
    episodes_needed,
    fixed_sequence_walk,
    upper_bound,
    violations_allowed,
)
from safeshield.calibration.advice import nothing_passes
from safeshield.calibration.betting import betting_test, wealth
from safeshield.calibration.calibrate import (
    DEFAULT_SHARES,
    calibrate,
    default_deltas,
    start_observations,
)
from safeshield.calibration.pilot import Pilot, threshold_grid
from safeshield.calibration.proposers import Adversary, policy_names
from safeshield.calibration.sequential import (
    BinomialPlan,
    Decision,
    fixed_plan,
    sequential_plan,
)
from safeshield.calibration.walk import walk_rungs, walks_in_turn
from safeshield.envs.double_integrator import TIME_STEP, next_state
from safeshield.exact import double_integrator as cart
from safeshield.files.schema import json_arguments
from safeshield.rollouts.copies import (
    Identity,
    UnequalCopiesWarning,
    environment_horizon,
    environment_wrappers,
)
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import batch_policy
from safeshield.shield import OtherEnvironmentWarning, Shield
from safeshield.shield.record import PilotPoint
from safeshield.wrappers import SafetyShield

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)

# -- binomial tails -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("episodes", "violations", "confidence", "bound"),
    [
        (1000, 0, 0.999, 0.0069),
        (1000, 5, 0.999, 0.0164),
        (10_000, 5, 0.999, 0.0016),
        (500, 0, 0.95, 0.0060),
    ],
)
def test_known_bounds(episodes: int, violations: int, confidence: float, bound: float) -> None:
    assert round(upper_bound(episodes, violations, confidence), 4) == bound


@given(
    episodes=st.integers(1, 3000),
    share=st.floats(0, 1),
    confidence=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
)
@settings(max_examples=200)
def test_the_bound_solves_the_binomial_equation(
    episodes: int, share: float, confidence: float
) -> None:
    violations = min(int(share * episodes), episodes - 1)
    bound = upper_bound(episodes, violations, confidence)
    assert binom.cdf(violations, episodes, bound) == pytest.approx(1 - confidence, rel=1e-6)
    assert upper_bound(episodes, violations + 1, confidence) > bound
    assert upper_bound(episodes + 1, violations, confidence) < bound


@given(
    epsilon=st.floats(0.003, 0.5),
    confidence=st.sampled_from([0.8, 0.95, 0.99]),
    violations=st.integers(0, 6),
)
@settings(max_examples=100)
def test_needed_and_allowed_are_each_others_inverse(
    epsilon: float, confidence: float, violations: int
) -> None:
    count = episodes_needed(epsilon, confidence, violations)
    assert violations_allowed(count, epsilon, confidence) == violations
    if count > max(violations, 1):
        assert violations_allowed(count - 1, epsilon, confidence) < violations
    assert upper_bound(count, violations, confidence) <= epsilon


def test_all_episodes_violating_bounds_nothing() -> None:
    assert upper_bound(7, 7, 0.9) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: upper_bound(0, 0, 0.9),
        lambda: upper_bound(5, 6, 0.9),
        lambda: upper_bound(5, -1, 0.9),
        lambda: upper_bound(5, 0, 1.0),
        lambda: episodes_needed(0.0, 0.9),
        lambda: episodes_needed(0.1, float("nan")),
        lambda: violations_allowed(5, 1.0, 0.9),
    ],
)
def test_arguments_out_of_range_are_errors(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must lie between|need 0 <="):
        call()


# -- the sequential test ------------------------------------------------------------------------

GRID = [(e, c) for e in (0.001, 0.01, 0.03, 0.1, 0.3, 0.8) for c in (0.6, 0.9, 0.95, 0.99, 0.999)]


@pytest.mark.parametrize(("epsilon", "confidence"), GRID)
def test_the_size_of_a_plan_is_at_most_b(epsilon: float, confidence: float) -> None:
    plan = sequential_plan(epsilon, confidence)
    assert 0 < plan.power(epsilon) <= 1 - confidence
    # The first look is the smallest one for which that is so.
    earlier = BinomialPlan(tuple((n - 1, k) for n, k in plan.looks), confidence)
    assert plan.looks[0][0] == 1 or earlier.power(epsilon) > 1 - confidence


@pytest.mark.parametrize(("epsilon", "confidence"), GRID[:20])
def test_a_plan_that_forgives_one_more_is_too_large(epsilon: float, confidence: float) -> None:
    plan = sequential_plan(epsilon, confidence)
    broken = BinomialPlan(tuple((n, k + 1) for n, k in plan.looks), confidence)
    assert broken.power(epsilon) > 1 - confidence


def test_known_plans_and_their_power() -> None:
    strict = sequential_plan(0.01, 0.99)
    assert strict.looks == tuple((513 + 250 * j, j) for j in range(7))
    assert strict.power(0.001) >= 0.99
    assert strict.power(0.002) >= 0.9
    assert strict.decide(np.zeros(515)) == Decision(True, 513)
    assert [n for n, _ in sequential_plan(0.05, 0.95).looks] == [65, 115, 165, 215]
    assert [n for n, _ in sequential_plan(0.1, 0.95).looks] == [32, 57, 82, 107]


def test_the_enumeration_is_what_the_test_does() -> None:
    rng = np.random.default_rng(0)
    plan = sequential_plan(0.1, 0.9)
    for rate in (0.02, 0.1):
        decisions = [plan.decide((rng.random(plan.most) < rate) * 1.0) for _ in range(4000)]
        passed = np.mean([one is not None and one.passed for one in decisions])
        assert passed == pytest.approx(plan.power(rate), abs=0.025)


@given(st.lists(st.booleans(), min_size=150, max_size=150))
def test_a_decision_never_changes_as_episodes_come_in(violated: list[bool]) -> None:
    plan = sequential_plan(0.1, 0.9)
    scores = np.array(violated, float)
    decided = [one for n in range(151) if (one := plan.decide(scores[:n])) is not None]
    assert decided
    assert all(one == decided[0] for one in decided)
    first = decided[0].episodes
    assert plan.decide(scores[: first - 1]) is None
    assert all(0 < plan.missing(n) <= plan.most for n in range(first))


def test_the_bound_covers_the_rate_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    plan = sequential_plan(0.1, 0.9)
    bounds: dict[tuple[int, float], float] = {}  # A bound depends on the two counts alone.
    for rate in (0.03, 0.1, 0.2):
        missed = 0
        for _ in range(1000):
            scores = (rng.random(plan.most) < rate) * 1.0
            decision = plan.decide(scores)
            assert decision is not None
            seen = scores[: decision.episodes]
            counts = len(seen), float(seen.sum())
            if counts not in bounds:
                bounds[counts] = plan.bound(seen)
            bound = bounds[counts]
            missed += bound < rate
            assert bound <= 0.1 or not decision.passed
        assert missed <= binom.ppf(0.9999, 1000, 0.1)


def test_one_look_is_the_test_of_clopper_and_pearson() -> None:
    plan = fixed_plan(662, 0.01, 0.99)
    assert plan.looks == ((662, 1),)
    for k in (0, 1):
        scores = (np.arange(662) < k) * 1.0
        assert plan.decide(scores) == Decision(True, 662)
        assert plan.bound(scores) == pytest.approx(upper_bound(662, k, 0.99), rel=1e-9)


# -- the test of a mean --------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "least"), [(100, 29), (500, 149), (1000, 299)])
def test_a_clean_run_passes_at_the_smallest_number(bound: float, least: int) -> None:
    test = betting_test(10 / bound, 0.95)
    assert test.least == least
    assert test.decide(np.zeros(least - 1)) is None
    assert test.decide(np.zeros(least)) == Decision(True, least)


COSTS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "all or nothing": lambda rng, n: (rng.random(n) < 0.1) * 1.0,
    "half": lambda rng, n: (rng.random(n) < 0.2) * 0.5,
    "spread": lambda rng, n: rng.beta(0.3, 2.7, n),
}


@pytest.mark.parametrize("kind", COSTS)
def test_a_mean_at_the_limit_passes_no_more_often_than_b(kind: str) -> None:
    rng, test = np.random.default_rng(2), betting_test(0.1, 0.9)
    decisions = [test.decide(COSTS[kind](rng, test.most)) for _ in range(300)]
    assert sum(one is not None and one.passed for one in decisions) <= 47


def test_bets_that_look_ahead_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def peeking(scores: npt.NDArray[np.float64], mean: float) -> npt.NDArray[np.float64]:
        # Bets nothing on the episodes that are going to be bad.
        return np.cumsum(np.maximum(np.log1p((mean - scores) / (1.0 - mean)), 0.0))

    monkeypatch.setattr("safeshield.calibration.betting.wealth", peeking)
    with np.errstate(divide="ignore"):
        rng, test = np.random.default_rng(2), betting_test(0.1, 0.9)
        decisions = [test.decide(COSTS["half"](rng, test.most)) for _ in range(300)]
    assert sum(one is not None and one.passed for one in decisions) > 47


@pytest.mark.parametrize("kind", COSTS)
def test_a_small_mean_passes(kind: str) -> None:
    rng, test = np.random.default_rng(3), betting_test(0.1, 0.9)
    scores = [COSTS[kind](rng, test.most) * (rng.random(test.most) < 0.1) for _ in range(200)]
    passed = [one for s in scores if (one := test.decide(s)) is not None and one.passed]
    assert len(passed) > 170
    # A bound takes a hundred times as long as a decision.
    few = [(s, d) for s in scores[:50] if (d := test.decide(s)) is not None and d.passed]
    assert all(test.bound(s[: d.episodes]) <= 0.1 for s, d in few)


def test_the_wealth_is_that_of_the_two_gamblers() -> None:
    scores, m = np.array([0.0, 0.3, 0.0]), 0.1
    bold = np.cumprod(1 + (m - scores) / (1 - m))
    assert np.exp(wealth(scores, m))[0] > 0.9 * bold[0]
    assert (np.exp(wealth(scores, m)) >= 0.9 * bold).all()
    assert wealth(np.array([1.0]), m)[0] == pytest.approx(np.log(0.1 * (1 - 0.9)))


# -- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: Violation(0.0),
        lambda: Violation(float("nan")),
        lambda: CostAbove(-1.0, 0.1),
        lambda: CostAbove(5.0, 1.0),
        lambda: MeanCost(10.0, 10.0),
        lambda: MeanCost(0.0, 10.0),
        lambda: MeanCost(1.0, float("inf")),
        lambda: betting_test(0.1, 0.95, 28),
        lambda: fixed_plan(0, 0.1, 0.9),
    ],
)
def test_promises_out_of_range_are_errors(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must|are needed"):
        call()


# -- the walk keeps its promise, and broken ones do not -------------------------------------------

EPSILON, CONFIDENCE, EPISODES = 0.05, 0.8, 100
DELTAS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
# Just above epsilon from the third threshold on: where wrong acceptance is likeliest.
RATES = dict(zip(DELTAS, (0.002, 0.005, 0.0505, 0.052, 0.06, 0.2), strict=True))
REPEATS = 3000


def share_of_broken_promises(
    walk: Callable[[np.random.Generator], float | None], repeats: int = REPEATS
) -> float:
    rng = np.random.default_rng(12)
    chosen = [walk(rng) for _ in range(repeats)]
    return float(np.mean([delta is not None and RATES[delta] > EPSILON for delta in chosen]))


def allowed_share(repeats: int = REPEATS) -> float:
    """1 - confidence, and what chance adds to it once in ten thousand tests."""
    return float(binom.ppf(0.9999, repeats, 1 - CONFIDENCE)) / repeats


def honest_walk(rng: np.random.Generator, policies: int = 1) -> float | None:
    def trial(delta: float, policy: str, episodes: int, most: int) -> tuple[int, int]:
        return episodes, int(rng.binomial(episodes, RATES[delta]))

    names = [f"policy {i}" for i in range(policies)]
    try:
        return fixed_sequence_walk(
            trial, DELTAS, names, epsilon=EPSILON, confidence=CONFIDENCE, episodes=EPISODES
        )[0]
    except CalibrationError:
        return None


def test_the_walk_breaks_its_promise_no_more_often_than_it_says() -> None:
    share = share_of_broken_promises(honest_walk)
    assert share <= allowed_share()
    # And it is no idle promise: chosen at all, and wrong nearly as often as it may be.
    assert share > 0.5 * (1 - CONFIDENCE)


def test_a_second_policy_makes_it_no_likelier() -> None:
    assert share_of_broken_promises(lambda rng: honest_walk(rng, 2), 1000) <= allowed_share(1000)


def test_a_walk_that_sums_to_k_minus_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from safeshield.calibration import walk

    real = violations_allowed
    monkeypatch.setattr(walk, "violations_allowed", lambda *args: real(*args) + 1)
    assert share_of_broken_promises(honest_walk, 1000) > allowed_share(1000)


def test_a_walk_that_counts_steps_as_episodes_is_caught() -> None:
    steps = 10

    def walk(rng: np.random.Generator) -> float | None:
        def trial(delta: float, policy: str, episodes: int, most: int) -> tuple[int, int]:
            # Steps of one episode share its fate: a violating episode violates in all its steps,
            # and each is counted as if it were drawn by itself.
            violating = int(rng.binomial(episodes // steps, RATES[delta]))
            return episodes, violating * steps

        try:
            return fixed_sequence_walk(
                trial, DELTAS, ["p"], epsilon=EPSILON, confidence=CONFIDENCE, episodes=EPISODES
            )[0]
        except CalibrationError:
            return None

    assert share_of_broken_promises(walk, 1000) > allowed_share(1000)


def test_a_walk_that_skips_failures_is_caught() -> None:
    # Testing every threshold and taking the most permissive that passes needs a union bound.
    def greedy(rng: np.random.Generator) -> float | None:
        most = violations_allowed(EPISODES, EPSILON, CONFIDENCE)
        passing = [d for d in DELTAS if rng.binomial(EPISODES, RATES[d]) <= most]
        return passing[-1] if passing else None

    assert share_of_broken_promises(greedy, 1000) > allowed_share(1000)


def sequential_walk(
    plan: BinomialPlan, rng: np.random.Generator, policies: int = 1
) -> float | None:
    def test(delta: float, policy: str) -> Rung:
        scores = (rng.random(plan.most) < RATES[delta]) * 1.0
        decision = plan.decide(scores)
        assert decision is not None
        counted = scores[: decision.episodes]
        bad = int(counted.sum())
        return Rung(delta, policy, len(counted), bad, 1.0, decision.passed)

    return walk_rungs(test, DELTAS, [f"policy {i}" for i in range(policies)])[0]


@pytest.mark.parametrize("policies", [1, 2])
def test_a_sequential_walk_breaks_its_promise_no_more_often_than_it_says(policies: int) -> None:
    plan = sequential_plan(EPSILON, 0.9)
    rng = np.random.default_rng(5)
    chosen = [sequential_walk(plan, rng, policies) for _ in range(300)]
    assert sum(one is not None and RATES[one] > EPSILON for one in chosen) <= 47
    assert sum(one is not None for one in chosen) > 270


def test_a_sequential_walk_that_forgives_one_more_is_caught() -> None:
    plan = sequential_plan(EPSILON, 0.9)
    broken = BinomialPlan(tuple((n, k + 1) for n, k in plan.looks), 0.9)
    rng = np.random.default_rng(5)
    chosen = [sequential_walk(broken, rng) for _ in range(300)]
    assert sum(one is not None and RATES[one] > EPSILON for one in chosen) > 47


def walks_chosen(confidence: float, rng: np.random.Generator) -> float | None:
    """Two walks that begin just above epsilon, each with tests at a confidence."""
    plan = sequential_plan(EPSILON, confidence)

    def test(number: int, delta: float, policy: str) -> Rung:
        scores = (rng.random(plan.most) < RATES[delta]) * 1.0
        decision = plan.decide(scores)
        assert decision is not None
        bad = int(scores[: decision.episodes].sum())
        return Rung(delta, policy, decision.episodes, bad, 1.0, decision.passed)

    return walks_in_turn(test, [DELTAS[2:3], DELTAS[2:4]], ["policy"])[0]


def test_two_walks_that_share_the_level_break_their_promise_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(8)
    broken = sum(walks_chosen(0.95, rng) is not None for _ in range(300))
    assert 10 < broken <= 47


def test_two_walks_that_each_have_the_whole_level_are_caught() -> None:
    rng = np.random.default_rng(8)
    assert sum(walks_chosen(0.9, rng) is not None for _ in range(1000)) > binom.ppf(
        0.999, 1000, 0.1
    )


@pytest.mark.parametrize(
    ("passing", "reached", "tests"),
    [
        ({(0, 0.1)}, 0.1, [(0, 0.1)]),
        ({(1, 0.5)}, 0.5, [(0, 0.1), (1, 0.5), (1, 0.2)]),
        (set(), None, [(0, 0.1), (1, 0.5)]),
    ],
)
def test_the_next_walk_is_asked_for_only_where_the_one_before_reached_nothing(
    passing: set[tuple[int, float]], reached: float | None, tests: list[tuple[int, float]]
) -> None:
    asked: list[tuple[int, float]] = []

    def test(number: int, delta: float, policy: str) -> Rung:
        asked.append((number, delta))
        return Rung(delta, policy, 10, 0, 0.1, (number, delta) in passing)

    def walks() -> Iterator[list[float]]:
        yield [0.1]
        yield [0.5, 0.2]

    assert walks_in_turn(test, walks(), ["policy"])[0] == reached
    assert asked == tests


def test_looks_in_the_order_of_the_ends_are_caught() -> None:
    """Where violating episodes are longer, those that end first are the harmless ones."""
    plan = sequential_plan(0.1, 0.9)
    rng = np.random.default_rng(6)
    passed = 0
    for _ in range(300):
        scores = (rng.random(plan.most) < 0.1) * 1.0
        decision = plan.decide(np.sort(scores))
        passed += decision is not None and decision.passed
    assert passed > 47


# -- the walk itself ------------------------------------------------------------------------------


def scripted(table: dict[tuple[float, str], int]) -> Any:  # noqa: ANN401
    calls: list[tuple[float, str]] = []

    def trial(delta: float, policy: str, episodes: int, most: int) -> tuple[int, int]:
        calls.append((delta, policy))
        return episodes, table.get((delta, policy), 0)

    trial.calls = calls  # type: ignore[attr-defined]
    return trial


def run(trial: Any, deltas: tuple[float, ...] = (0.3, 0.2, 0.1), **changes: Any) -> Any:  # noqa: ANN401
    arguments = {"epsilon": 0.1, "confidence": 0.9, "episodes": 60} | changes
    return fixed_sequence_walk(trial, deltas, ["a", "b"], **arguments)


def test_it_stops_at_the_first_failure_of_any_policy() -> None:
    trial = scripted({(0.2, "b"): 50})
    delta, rungs = run(trial)
    assert delta == 0.3
    assert trial.calls == [(0.3, "a"), (0.3, "b"), (0.2, "a"), (0.2, "b")]
    assert [rung.passed for rung in rungs] == [True, True, True, False]
    # Never looked at again, however well it would have done.
    assert all(rung.delta != 0.1 for rung in rungs)


def test_a_threshold_needs_every_policy() -> None:
    with pytest.raises(CalibrationError, match=r"policy 'b' violated in 50 of 60"):
        run(scripted({(0.3, "b"): 50}))


def test_exactly_the_allowed_violations_pass_and_one_more_fails() -> None:
    most = violations_allowed(60, 0.1, 0.9)
    assert most >= 1
    assert run(scripted({(0.1, "a"): most}))[0] == 0.1
    assert run(scripted({(0.1, "a"): most + 1}))[0] == 0.2


def test_a_trial_that_gives_up_early_does_not_pass() -> None:
    with pytest.raises(CalibrationError):
        run(lambda delta, policy, episodes, most: (episodes - 1, 0))


def test_too_few_episodes_say_how_many_are_needed() -> None:
    with pytest.raises(ValueError, match="at least 22 are needed"):
        run(scripted({}), episodes=10)
    assert episodes_needed(0.1, 0.9) == 22


@pytest.mark.parametrize("deltas", [(), (0.1, 0.2), (0.2, 0.2), (0.1, -0.1), (0.2, np.nan)])
def test_thresholds_must_fall_strictly(deltas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="deltas must be"):
        run(scripted({}), deltas)


def test_nothing_passes_says_what_was_reached() -> None:
    with pytest.raises(
        CalibrationError, match=r"epsilon 0\.1 .* delta 0\.3, policy 'a' .* 60 of 60"
    ):
        run(scripted({(0.3, "a"): 60}))


def test_the_advice_of_a_failed_calibration_is_the_safest_threshold_with_enough_episodes() -> None:
    """A rate of 0 in 25 episodes says less than 2 of 100. The test of the advised length passes
    with probability 0.9 at this rate, and keeps its level."""
    curve = [
        PilotPoint(0.4, "a", 25, 0, 1.0, 0.0),
        PilotPoint(0.3, "a", 100, 2, 1.0, 0.0),
        PilotPoint(0.2, "a", 100, 4, 1.0, 0.0),
    ]
    told = nothing_passes(
        Violation(0.05),
        0.95,
        Rung(0.3, "a", 126, 4, 0.1, False),
        curve,
        np.array([-1.0, -0.5]),
        None,
        "a",
        0.05,
    )
    found = re.search(r"deltas=\[0.3\] and episodes=(\d+)", told)
    assert found is not None
    episodes, level = int(found[1]), 0.05 / 2.0
    allowed = violations_allowed(episodes, 0.05, 1.0 - level)
    assert binom.cdf(allowed, episodes, 0.02) >= 0.9
    assert binom.cdf(allowed, episodes, 0.05) <= level
    assert "about 0.02" in told
    bad = [PilotPoint(0.3, "a", 100, 6, 1.0, 0.0)]
    failed = Rung(0.3, "a", 100, 6, 0.1, False)
    told = nothing_passes(Violation(0.05), 0.95, failed, bad, np.zeros(1), None, "a", 0.05)
    assert "episodes=" not in told


# -- on the boat ----------------------------------------------------------------------------------

REQUEST: dict[str, Any] = {"epsilon": 0.15, "confidence": 0.9, "seed": 1}
DELTAS_HERE = (0.3, 0.15, 0.08)


def boat(steps: int = 100) -> gym.Env[Any, Any]:
    return gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=steps)


@pytest.fixture(scope="module")
def calibrated(shield: Shield) -> Shield:
    return shield.calibrate(boat(), deltas=DELTAS_HERE, **REQUEST)


def test_the_record_says_what_was_done(calibrated: Shield) -> None:
    record = calibrated.record
    assert record is not None
    plan = sequential_plan(0.15, 0.9)
    assert calibrated.delta == record.delta >= 0
    assert (record.epsilon, record.confidence, record.seed) == (0.15, 0.9, 1)
    assert record.environment == "safeshield/Boat-v0"
    assert record.environment_kwargs == {"dt": DT}
    assert [result.policy for result in record.policies] == ["random", "adversary"]
    for result in record.policies:
        assert result.violations <= dict(plan.looks)[result.episodes]
        scores = np.arange(result.episodes) < result.violations
        assert result.bound == plan.bound(scores.astype(float)) <= 0.15
        assert 0 < result.intervention_rate < 1
    deltas = [rung.delta for rung in record.walk]
    assert deltas == sorted(deltas, reverse=True)
    last = [rung for rung in record.walk if rung.delta == record.delta]
    assert all(rung.passed for rung in last)
    assert len(last) == 2
    # The share of all starts of the river that are far enough from danger.
    starts = start_observations(calibrated, boat(), 2000, seed=77)
    share = float(np.mean(np.asarray(calibrated.value(starts)) <= -record.delta))
    assert record.start_share == pytest.approx(share, abs=0.15)
    for words in ("confidence 0.9", "'random', 'adversary'", "safeshield/Boat-v0", "at most 0.15"):
        assert words in record.promise
    assert CalibrationRecord.from_json(record.to_json()) == record


def test_a_records_file_keeps_the_arguments_and_older_ones_load(
    calibrated: Shield, tmp_path: Path
) -> None:
    calibrated.save(tmp_path / "shield")
    again = Shield.load(tmp_path / "shield").record
    assert again == calibrated.record
    assert again is not None
    older = again.to_json()
    del older["environment_kwargs"]
    unknown = CalibrationRecord.from_json(older)
    assert unknown.environment_kwargs is None
    same = Identity.of(boat())
    assert not again.differences(same)
    assert not unknown.differences(same._replace(kwargs={"dt": 7.0}))
    assert "Other-v0" in unknown.differences(same._replace(name="Other-v0"))[0]
    assert "'dt': 7.0" in again.differences(same._replace(kwargs={"dt": 7.0}))[0]
    assert not again.differences(same._replace(kwargs=None))
    assert not again.differences(same._replace(name="", kwargs={"dt": 7.0}))


def test_a_record_knows_longer_episodes_and_other_wrappers(calibrated: Shield) -> None:
    record = calibrated.record
    assert record is not None
    same = Identity.of(boat())
    assert record.horizon == same.horizon
    assert record.horizon is not None
    for horizon, words in ((record.horizon + 1, "up to"), (None, "any number")):
        (told,) = record.differences(same._replace(horizon=horizon))
        assert words in told
    assert not record.differences(same._replace(horizon=record.horizon - 1))
    scaled = gym.wrappers.RescaleAction(boat(), -2.0, 2.0)
    assert "RescaleAction" in record.differences(Identity.of(scaled))[0]
    watched = gym.wrappers.RecordEpisodeStatistics(boat())
    assert not record.differences(Identity.of(watched))
    older = record.to_json()
    del older["horizon"], older["wrappers"]
    unknown = CalibrationRecord.from_json(older)
    assert not unknown.differences(Identity.of(scaled)._replace(horizon=None))


def test_an_environment_with_longer_episodes_is_never_certified(calibrated: Shield) -> None:
    longer = gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=5000)
    with pytest.warns(OtherEnvironmentWarning, match="up to 5000 steps"):
        env = SafetyShield(longer, calibrated)
    assert not env.reset(seed=0, options={"state": [1.9, 0.0]})[1]["shield/certified"]


def test_a_damaged_records_arguments_are_refused(calibrated: Shield) -> None:
    assert calibrated.record is not None
    older = calibrated.record.to_json()
    for wrong in ([], "dt", 3):
        with pytest.raises(ValueError, match="'environment_kwargs' must be an object or None"):
            CalibrationRecord.from_json({**older, "environment_kwargs": wrong})


class Wind:
    """An argument that JSON has no form for, and whose repr names its place in memory."""


def test_arguments_are_told_alike_in_every_process() -> None:
    told = {
        "plain": [None, True, 3, 0.5, "text"],
        "nested": {"1": [0.5, "nan"], "2": []},
        "array": [[1.0, 2.0]],
        "number": 2.5,
        "set": ["a", "b"],
        "kind": f"{__name__}.Wind",
        "object": f"<{__name__}.Wind object>",
    }
    given = {
        "plain": (None, True, 3, 0.5, "text"),
        "nested": {1: (0.5, float("nan")), 2: []},
        "array": np.array([[1.0, 2.0]]),
        "number": np.float64(2.5),
        "set": {"b", "a"},
        "kind": Wind,
        "object": Wind(),
    }
    assert json_arguments(given) == told
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    large = np.arange(1000.0)
    one, same, other = (json_arguments({"map": x}) for x in (large, large.copy(), large + 1))
    assert one == same != other


@batch_policy
def into_the_rocks(
    observations: npt.NDArray[Any], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    return np.array([-0.5, 0.5]) - observations


def test_the_promise_holds_in_fresh_episodes(calibrated: Shield) -> None:
    from safeshield.calibration.proposers import ShieldedProposals

    acting = ShieldedProposals(calibrated, Adversary(calibrated))
    runs = run_episodes(boat(), acting, 200, seed=99)
    certified = np.asarray(calibrated.certified(np.stack([r.observations[0] for r in runs])))
    violated = np.array([run.violated for run in runs])
    assert certified.sum() > 100
    assert violated[certified].mean() <= 0.15
    # Without the shield the same starts are far from safe.
    free = run_episodes(boat(), into_the_rocks, 200, seed=99)
    assert np.mean([run.violated for run in free]) > 0.4


def test_the_same_seed_gives_the_same_record(shield: Shield, calibrated: Shield) -> None:
    fresh = replace(shield, attempts=())
    again = calibrate(fresh, boat(), deltas=DELTAS_HERE, **REQUEST)
    first = calibrated.record
    assert first is not None
    assert {**again.to_json(), "date": ""} == {**first.to_json(), "date": ""}


def test_a_policy_of_ones_own_is_the_only_one_promised_for(shield: Shield) -> None:
    record = calibrate(shield, boat(), policy=into_the_rocks, deltas=[0.5, 0.3], **REQUEST)
    assert [result.policy for result in record.policies] == ["into_the_rocks"]
    assert record.policies[0].intervention_rate > 0
    assert {rung.delta for rung in record.walk} <= {0.5, 0.3}
    assert "proposed by one of 'into_the_rocks'" in record.promise


def test_policies_without_a_name_are_listed_by_what_they_are() -> None:
    class Agent:
        def act(self, observation: object) -> int:
            return 0

    def own(observation: object) -> int:
        return 0

    named = {"random": "random", own: "own", Agent().act: "Agent.act", Agent(): "Agent"}
    named |= {functools.partial(own): "own", lambda obs: 0: "policy"}
    for policy, name in named.items():
        assert policy_names(policy) == [name]
        assert policy_names(policy, "mine") == ["mine"]


class Counting(gym.Wrapper):  # type: ignore[type-arg]
    """Where every episode began and whether it went wrong, from the outside."""

    starts: list[npt.NDArray[Any]] = []  # noqa: RUF012
    bad: list[bool] = []  # noqa: RUF012
    seen: list[npt.NDArray[Any]] = []  # noqa: RUF012

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        observation, info = self.env.reset(**kwargs)
        self.seen.append(observation)
        self.fresh = (observation, info["constraint"] > 0)
        return observation, info

    def step(self, action: Any) -> Any:  # noqa: ANN401
        if self.fresh is not None:
            self.starts.append(self.fresh[0])
            self.bad.append(self.fresh[1])
            self.fresh = None
        result = self.env.step(action)
        self.bad[-1] |= result[4]["constraint"] > 0
        return result

    fresh: Any = None


def test_only_accepted_starts_are_played_and_count(
    shield: Shield, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Counting(boat(3))
    # The resets that only look where episodes start are not under test.
    far = np.tile(np.array([[-2.9, 1.9]], np.float32), (20, 1))
    monkeypatch.setattr("safeshield.calibration.calibrate.start_observations", lambda *_: far)
    record = calibrate(
        shield, env, epsilon=0.3, confidence=0.7, policy="random", deltas=[0.6], num_envs=1
    )
    starts, bad, seen = np.array(env.starts), np.array(env.bad), np.array(env.seen)
    assert (np.asarray(shield.value(starts)) <= -0.6 + 1e-5).all()
    count = record.policies[0].episodes
    assert count in dict(sequential_plan(0.3, 0.7).looks)
    assert count <= len(starts)
    assert record.policies[0].violations == bad[:count].sum()
    # Before the first step it has looked at many starts, in the order of their seeds.
    looked = np.asarray(shield.value(seen)) <= -0.6
    assert not looked.all()
    assert record.start_share == count / (np.flatnonzero(looked)[count - 1] + 1)
    assert np.array_equal(starts[:count], seen[np.flatnonzero(looked)[:count]])


def test_a_request_out_of_reach_is_an_error(shield: Shield) -> None:
    # A shield that believes all is safe: h is moved far down.
    blind = replace(
        shield, model=replace(shield.model, scale=replace(shield.model.scale, offset=-50.0))
    )
    with pytest.raises(CalibrationError, match="no threshold meets epsilon"):
        blind.calibrate(boat(), policy=into_the_rocks, deltas=[0.2, 0.0], **REQUEST)
    lost = replace(
        shield, model=replace(shield.model, scale=replace(shield.model.scale, offset=50.0))
    )
    with pytest.raises(CalibrationError, match="no start of the environment"):
        lost.calibrate(boat(2), **REQUEST)
    with pytest.raises(CalibrationError, match=r"only 0\.0% of"):
        lost.calibrate(boat(2), policy="random", deltas=[0.0], **REQUEST)


def test_arguments_of_calibrate(shield: Shield) -> None:
    with pytest.raises(ValueError, match="at least 15 are needed"):
        shield.calibrate(boat(), episodes=10, deltas=[0.1], **REQUEST)
    with pytest.raises(ValueError, match="episodes"):
        shield.calibrate(boat(), episodes=0, deltas=[0.1], **REQUEST)
    with pytest.raises(ValueError, match="epsilon must lie between"):
        shield.calibrate(boat(), epsilon=0.0)
    with pytest.raises(ValueError, match="observation_space mismatch"):
        shield.calibrate(gym.make("safeshield/DoubleIntegrator-v0"), **REQUEST)
    with pytest.raises(ValueError, match="action_space mismatch"):
        shield.calibrate(gym.wrappers.RescaleAction(boat(), 0.0, 1.0), **REQUEST)


def test_default_thresholds_fall_from_a_share_of_the_starts_to_zero(shield: Shield) -> None:
    starts = start_observations(shield, boat(), 500, seed=0)
    assert starts.shape == (500, 2)
    deltas = default_deltas(shield, starts)
    assert all(a > b for a, b in itertools.pairwise(deltas))
    assert deltas[-1] == 0.0
    value = np.asarray(shield.value(starts))
    assert (value <= -deltas[0]).sum() == pytest.approx(
        DEFAULT_SHARES[0] * (value <= 0).sum(), abs=2
    )


def test_an_environment_with_a_single_start_has_it_inside_its_own_thresholds(
    shield: Shield,
) -> None:
    start = np.array([[-2.5, 1.5]], np.float32)
    deltas = default_deltas(shield, np.repeat(start, 400, axis=0))
    value = float(shield.row_values(start)[0])
    # Further than the digits by which one value differs from batch to batch, and no further.
    assert -value - 1e-4 < deltas[0] < -value - 1e-7


def test_calibrating_does_not_warn_and_keeps_no_state(shield: Shield) -> None:
    fresh = shield.with_delta(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fresh.calibrate(boat(), policy="random", deltas=[0.4], **REQUEST)
    assert fresh.record is None
    assert fresh.delta == 0.3
    assert result.delta == 0.4


def test_the_adversary_drives_along_the_edge(shield: Shield) -> None:
    rng = np.random.default_rng(0)
    observations = rng.uniform([-3, -2], [2, 2], (300, 2)).astype(np.float32)
    actions = Adversary(shield)(observations, rng)
    q = np.asarray(shield.value(observations, actions))
    others = rng.uniform(-1, 1, (300, 2))
    other_q = np.asarray(shield.value(observations, others))
    accepted = q <= shield.threshold
    assert (q[accepted] >= other_q[accepted])[other_q[accepted] <= shield.threshold].mean() > 0.95
    # Where it proposes what is not accepted, nothing is.
    assert (other_q[~accepted] > shield.threshold).all()


def test_the_double_integrator_too() -> None:
    env = gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=80)
    space = env.observation_space
    assert isinstance(space, gym.spaces.Box)
    rng = np.random.default_rng(0)
    states = rng.uniform(space.low, space.high, (40_000, 2))
    actions = rng.uniform(-1, 1, (len(states), 1))
    after = cart.value(next_state(states, actions), dt=TIME_STEP)
    value, q = cart.value(states, dt=TIME_STEP), np.maximum(after, np.abs(states[:, 0]) - 1)
    cautious = fitted_shield(space, states, actions, value, q, steps=800)
    record = calibrate(cautious, env, epsilon=0.2, confidence=0.9, deltas=[0.2, 0.1])
    assert record.environment == "safeshield/DoubleIntegrator-v0"
    assert all(result.bound <= 0.2 for result in record.policies)
    assert 0 < record.start_share < 1


class _Relabelled(gym.Wrapper):  # type: ignore[type-arg]
    """Reports something else than the truth."""

    def __init__(self, env: gym.Env, **labels: float) -> None:  # type: ignore[type-arg]
        super().__init__(env)
        self._labels = labels

    def reset(self, **kwargs: object) -> tuple[object, dict[str, object]]:
        return self.env.reset(**kwargs)[0], dict(self._labels)  # type: ignore[arg-type]

    def step(self, action: object) -> tuple[object, float, bool, bool, dict[str, object]]:  # type: ignore[override]
        *result, _ = self.env.step(action)
        return (*result, dict(self._labels))  # type: ignore[return-value]


@pytest.mark.parametrize("labels", [{"constraint": np.nan}, {"cost": np.nan}, {"cost": -1.0}])
def test_labels_that_say_nothing_earn_no_promise(shield: Shield, labels: dict[str, float]) -> None:
    env = _Relabelled(gym.make("safeshield/Boat-v0"), **labels)
    with pytest.raises(ValueError, match="must be finite"):
        shield.calibrate(env, epsilon=0.3, confidence=0.8, deltas=[0.3])


def test_a_shield_inside_earns_no_promise_for_the_one_outside(shield: Shield) -> None:
    env = SafetyShield(gym.make("safeshield/Boat-v0"), shield)
    with pytest.raises(ValueError, match="already shielded"):
        shield.calibrate(env, epsilon=0.3, confidence=0.8)


def test_a_policy_without_a_finite_action_earns_no_promise(shield: Shield) -> None:
    env = gym.make("safeshield/Boat-v0")
    for deltas in (None, [0.3]):
        with pytest.raises(ValueError, match="proposed no finite action in"):
            shield.calibrate(
                env, epsilon=0.3, confidence=0.8, policy=lambda _: [np.nan, np.nan], deltas=deltas
            )


def test_too_few_episodes_name_the_confidence_that_was_asked_for(shield: Shield) -> None:
    env = gym.make("safeshield/Boat-v0")
    with pytest.raises(ValueError, match=r"Confidence 0.9 needs 0.95 here"):
        shield.calibrate(env, epsilon=0.3, confidence=0.9, episodes=2)
    with pytest.raises(ValueError, match=r"confidence 0\.9,") as told:
        shield.calibrate(env, epsilon=0.3, confidence=0.9, episodes=2, deltas=[0.3])
    assert "needs 0.95" not in str(told.value)


def test_hopeless_thresholds_are_refused_at_once(shield: Shield) -> None:
    with pytest.raises(CalibrationError, match="starts have V_h"):
        shield.calibrate(gym.make("safeshield/Boat-v0"), epsilon=0.3, confidence=0.8, deltas=[50.0])


# -- pilot, attempts and other promises ------------------------------------------------------------

LOOSE: dict[str, Any] = {"epsilon": 0.3, "confidence": 0.8}


def test_a_pilot_fixes_few_thresholds_on_seeds_of_its_own(
    shield: Shield, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeshield.calibration import trials

    seeds: dict[str, set[int]] = {"pilot": set(), "test": set()}
    real = trials.Trials.play

    def play(self: Any, delta: float, name: str, missing: Any, first: int, stage: str) -> Any:  # noqa: ANN401
        played = real(self, delta, name, missing, first, stage)
        seeds[stage] |= set(range(first, first + sum(one.drawn for one in played) + 1024))
        return played

    monkeypatch.setattr(trials.Trials, "play", play)
    record = calibrate(shield, boat(), **LOOSE)
    tested = list(dict.fromkeys(rung.delta for rung in record.walk))
    assert record.walks_planned == 2
    assert 1 <= len(tested) <= 4
    assert tested[1:] == sorted(tested[1:], reverse=True)
    assert all(delta > tested[0] for delta in tested[1:])
    assert seeds["pilot"]
    assert not seeds["pilot"] & seeds["test"]
    assert {point.policy for point in record.pilot} == {"random", "adversary"}
    played = [(point.delta, point.policy) for point in record.pilot]
    assert len(set(played)) == len(played)  # all parts of a threshold's episodes are one point
    assert record.attempts[-1].passed
    # What is chosen is permissive: the shield is nearly exact, and the promise is loose.
    assert record.delta < default_deltas(shield, start_observations(shield, boat(), 500, 0))[0]


def test_a_second_walk_has_its_own_seeds_and_half_of_the_level(
    shield: Shield, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The pilot is made to propose a threshold that fails, although stricter ones look good."""
    from safeshield.calibration import trials

    seeds: list[tuple[float, set[int]]] = []
    real = trials.Trials.play

    def play(self: Any, delta: float, name: str, missing: Any, first: int, stage: str) -> Any:  # noqa: ANN401
        played = real(self, delta, name, missing, first, stage)
        if stage == "test":
            seeds.append((delta, set(range(first, first + sum(one.drawn for one in played)))))
        return played

    monkeypatch.setattr(trials.Trials, "play", play)
    monkeypatch.setattr(Pilot, "permissive", lambda self: 0.0 * self.good(0.0))
    monkeypatch.setattr(Pilot, "stricter", lambda self, least: [0.6, 0.4])
    scale = replace(shield.model.scale, offset=shield.model.scale.offset - 0.2)
    careless = replace(shield, model=replace(shield.model, scale=scale), attempts=())
    careless = careless.with_constraint(None)
    done = careless.calibrate(boat(), policy=into_the_rocks, **REQUEST)
    record, plan = done.record, sequential_plan(0.15, 0.95)
    assert record is not None
    assert [(rung.delta, rung.passed) for rung in record.walk][:2] == [(0.0, False), (0.6, True)]
    assert record.delta in (0.6, 0.4)
    for rung in record.walk:
        assert plan.ended(rung.episodes, rung.violations) is rung.passed
        assert plan.shows(rung.episodes, rung.violations, rung.bound)
    first = next(used for delta, used in seeds if delta == 0.0)
    assert all(not first & used for delta, used in seeds if delta > 0.0)
    # The whole level is that of the attempt, and the promise has the confidence asked for.
    assert record.attempts[-1].level == pytest.approx(0.1)
    assert "With confidence 0.9 over" in record.promise
    done.save(tmp_path / "shield")
    assert Shield.load(tmp_path / "shield").record == record


class _Counted:
    """Stands for `Trials`: thresholds above 0.5 violate once in 104 episodes, others never."""

    promise, names = Violation(0.05), ("agent",)
    values = -np.ones(100)

    def __init__(self) -> None:
        self.points: list[PilotPoint] = []
        self.episodes = 0
        self._parts: dict[float, int] = {}

    def pilot(
        self, delta: float, name: str, episodes: int, most: float, seed: int
    ) -> tuple[float, int]:
        part = self._parts[delta] = self._parts.get(delta, 0) + 1
        total = float(delta > 0.5 and part == 1)
        self.points.append(PilotPoint(delta, name, episodes, int(total), 1.0, 0.1))
        self.episodes += episodes
        return total, episodes


def test_where_the_first_test_fails_the_pilot_proposes_the_safest_stricter_threshold() -> None:
    trials: Any = _Counted()
    pilot = Pilot(trials, [1.0, 0.4, 0.2, 0.0], 0)
    assert pilot.permissive() == 0.0
    stricter = pilot.stricter(0.0)
    assert pilot.good(1.0)  # ... but it violates more often than 0.4
    assert stricter == [0.4, pytest.approx(np.sqrt(0.08)), 0.2]
    assert pilot.stricter(0.4) == [1.0, pytest.approx(np.sqrt(0.8)), 0.8]
    assert pilot.stricter(1.0) == []


def test_of_equally_safe_thresholds_the_pilot_prefers_the_strict_one_until_one_violates() -> None:
    trials: Any = _Counted()
    pilot = Pilot(trials, [1.0, 0.6, 0.4, 0.2, 0.0], 0)
    assert all(pilot.good(delta) for delta in pilot.grid)
    assert pilot._lowest([0.4, 0.2]) == 0.4
    assert pilot._lowest([1.0, 0.6]) == 0.6


def test_a_pilot_plays_few_episodes_of_thresholds_that_are_clearly_good_or_bad() -> None:
    trials: Any = _Counted()
    grid = [0.4 * 0.9**i for i in range(31)]
    assert Pilot(trials, grid, 0).permissive() == grid[-1]
    # Five looks at n = 50 episodes, in parts of 13; twice as many after a violation.
    assert trials.episodes == 5 * 4 * 13
    assert Pilot(trials, grid, 0).good(1.0)
    assert trials.episodes == 5 * 4 * 13 + 8 * 13

    class Bad(_Counted):
        def pilot(self, delta: float, name: str, episodes: int, most: float, seed: int) -> Any:  # noqa: ANN401
            super().pilot(delta, name, episodes, most, seed)
            return (2.0 if delta < 0.3 else 0.0), 2 if delta < 0.3 else episodes

    bad: Any = Bad()
    assert Pilot(bad, grid, 0).permissive() == min(d for d in grid if d > 0.3)


def test_a_grid_reaches_from_the_largest_value_to_zero() -> None:
    values = np.concatenate([np.full(50, 0.3), -np.linspace(0.01, 1.0, 100)])
    grid = threshold_grid(values, [0.123])
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert grid[-1] == 0.0
    assert 0.123 in grid
    # Every threshold leaves a twentieth of the starts.
    assert np.mean(values <= -grid[0]) >= 0.05
    assert min(d for d in grid if d > 0) < 0.01


def test_a_later_attempt_is_tested_more_strictly_on_other_seeds(
    shield: Shield, tmp_path: Path
) -> None:
    own = shield.with_delta(0.0)
    settings: dict[str, Any] = {**LOOSE, "policy": "random", "deltas": [0.3]}
    first = own.calibrate(boat(), **settings)
    second = own.calibrate(boat(), **settings)
    for later in (second, first.calibrate(boat(), **settings)):
        assert later.record is not None
        one, two = later.record.attempts
        assert two.level == one.level / 2 == pytest.approx(0.1)
        assert abs(two.first_seed - one.first_seed) >= 2**21
        assert later.record.policies[0].episodes >= sequential_plan(0.3, 0.9).looks[0][0]
        assert "attempt 2 on this shield" in later.record.promise
        assert "Attempts made elsewhere are not known" in later.record.promise
        assert "at most 0.3" in later.record.promise
    assert first.record is not None
    assert "attempt" not in first.record.promise
    # Another policy, or another environment, is another promise.
    other = second.calibrate(boat(), **{**settings, "policy": into_the_rocks})
    assert other.record is not None
    assert other.record.attempts[-1].level == pytest.approx(0.2)
    # A file remembers, with and without a record.
    for kept in (second, second.with_delta(0.7)):
        kept.save(tmp_path / "shield")
        assert Shield.load(tmp_path / "shield").attempts == kept.attempts
    assert len(second.attempts) == 3


def test_a_failed_attempt_is_remembered(shield: Shield) -> None:
    offset = replace(shield.model.scale, offset=-50.0)
    blind = replace(shield, model=replace(shield.model, scale=offset), attempts=())
    with pytest.raises(CalibrationError) as caught:
        blind.calibrate(boat(), policy=into_the_rocks, deltas=[0.2], **REQUEST)
    error = caught.value
    assert error.attempt == blind.attempts[-1]
    assert not error.attempt.passed
    assert [(one.delta, one.policy) for one in error.curve] == [(0.2, "into_the_rocks")]
    assert error.curve[0].violations > 0
    assert "Pass larger deltas" in str(error)


class Crashes(gym.Wrapper[Any, Any, Any, Any]):
    """Raises an error after some episodes, as a driver might in a collision."""

    def __init__(self, env: gym.Env[Any, Any], after: int) -> None:
        super().__init__(env)
        self.left = after

    def step(self, action: Any) -> Any:  # noqa: ANN401
        found = self.env.step(action)
        self.left -= bool(found[2] or found[3])
        if self.left < 0:
            raise ConnectionError("the plant does not answer")
        return found


def test_a_calibration_that_an_error_of_the_environment_ends_is_an_attempt(shield: Shield) -> None:
    own = replace(shield.with_delta(0.0), attempts=())
    settings: dict[str, Any] = {**LOOSE, "policy": "random", "deltas": [0.3], "num_envs": 1}
    with pytest.raises(ConnectionError):
        own.calibrate(Crashes(boat(), 3), **settings)
    assert [one.passed for one in own.attempts] == [False]


def test_the_advice_is_true_where_all_values_are_alike(shield: Shield) -> None:
    scale = replace(shield.model.scale, offset=-1.0, spread=1e-12, step_rms=1e-12)
    blind = replace(shield, model=replace(shield.model, scale=scale))
    words = "Larger deltas do not help: the values of the starts end at -1,"
    with pytest.raises(CalibrationError, match=words) as caught:
        blind.calibrate(boat(), policy=into_the_rocks, **REQUEST)
    assert len({point.delta for point in caught.value.curve}) > 5
    assert all(point.violations > 0 for point in caught.value.curve)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.curve, again.attempt) == (
        str(caught.value), caught.value.curve, caught.value.attempt,
    )  # fmt: skip
    with pytest.raises(CalibrationError, match=words):
        blind.calibrate(boat(), policy=into_the_rocks, deltas=[0.99], **REQUEST)
    assert [one.level for one in blind.attempts] == pytest.approx([0.1, 0.05])


def test_a_record_of_before_counts_as_an_attempt(calibrated: Shield) -> None:
    assert calibrated.record is not None
    old = replace(calibrated.record, attempts=())
    before = replace(calibrated, record=old, attempts=())
    after = before.calibrate(boat(), deltas=[0.3], **REQUEST).record
    assert after is not None
    assert [one.first_seed >= 0 for one in after.attempts] == [False, True]
    assert after.attempts[1].level == pytest.approx(0.05)


def test_a_record_from_before_its_new_fields_loads(calibrated: Shield) -> None:
    assert calibrated.record is not None
    data = calibrated.record.to_json()
    new = ("kind", "limit", "cost_bound", "deterministic", "horizon", "wrappers", "pilot")
    older = CalibrationRecord.from_json(
        {key: value for key, value in data.items() if key not in (*new, "attempts")}
    )
    assert (older.kind, older.horizon, older.wrappers, older.attempts) == (
        "violation", None, None, (),
    )  # fmt: skip
    assert "deterministic" not in older.promise
    for wrong in ({"kind": "anything"}, {"wrappers": 3}, {"horizon": 0.5}, {"attempts": [1]}):
        with pytest.raises(ValueError, match="record"):
            CalibrationRecord.from_json({**data, **wrong})


class Noisy:
    """A model whose `predict` notes how it is asked, and draws from torch's generator."""

    def __init__(self) -> None:
        self.asked: set[bool] = set()

    def predict(
        self, observations: npt.NDArray[Any], deterministic: bool, **memory: object
    ) -> tuple[npt.NDArray[Any], None]:
        self.asked.add(deterministic)
        return torch.rand((len(observations), 2)).numpy() * 2 - 1, None


def test_what_is_deployed_is_tested_and_told(shield: Shield) -> None:
    records = []
    for deterministic in (False, True, False):
        model = Noisy()
        torch.manual_seed(len(records))
        before = torch.get_rng_state()
        record = calibrate(
            shield, boat(), policy=model, deltas=[0.3], deterministic=deterministic, **LOOSE
        )
        assert model.asked == {deterministic}
        assert record.deterministic is deterministic
        assert f"deterministic={deterministic}" in record.promise
        assert torch.equal(torch.get_rng_state(), before)
        records.append({**record.to_json(), "date": ""})
    # The noise of the policy is seeded, too.
    assert records[0] == records[2]


def test_the_record_names_horizon_and_wrappers(shield: Shield) -> None:
    env = gym.wrappers.RescaleAction(boat(30), -1.0, 1.0)
    env = gym.wrappers.TransformReward(env, lambda reward: reward)
    record = calibrate(shield, env, policy="random", deltas=[0.3], num_envs=1, **LOOSE)
    assert record.horizon == 30
    assert "of at most 30 steps" in record.promise
    assert record.wrappers is not None
    assert [one.name for one in record.wrappers] == ["RescaleAction", "TransformReward"]
    assert record.wrappers[0].arguments == {"min_action": -1.0, "max_action": 1.0}
    assert CalibrationRecord.from_json(record.to_json()) == record
    many = gym.vector.SyncVectorEnv([lambda: boat(30), lambda: boat(40)])
    assert environment_horizon(many) == 40
    assert environment_wrappers(many) == []
    assert environment_horizon(boat().unwrapped) is None


class Priced(gym.Wrapper):  # type: ignore[type-arg]
    """Reports a cost of 1 where the boat is inside a rock, and else 0."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        *result, info = self.env.step(action)
        return (*result, {"cost": float(info["constraint"] > 0)})

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self.env.reset(**kwargs)[0], {}


def test_costs_can_be_promised(shield: Shield) -> None:
    settings: dict[str, Any] = {
        "policy": "random", "deltas": [0.3], "confidence": 0.8, "num_envs": 1,
    }  # fmt: skip
    above = calibrate(shield, Priced(boat(20)), promise=CostAbove(2.0, 0.3), **settings)
    assert (above.kind, above.limit, above.epsilon) == ("cost above", 2.0, 0.3)
    assert "has a summed cost above 2 with probability at most 0.3" in above.promise
    mean = calibrate(shield, Priced(boat(20)), promise=MeanCost(4.0, bound=20.0), **settings)
    assert (mean.kind, mean.limit, mean.cost_bound, mean.epsilon) == ("mean cost", 4.0, 20.0, 0.2)
    assert "mean summed cost of at most 4, if no episode's can exceed 20" in mean.promise
    assert mean.policies[0].bound <= 4.0
    assert mean.policies[0].episodes >= betting_test(0.2, 0.8).least
    for record in (above, mean):
        assert CalibrationRecord.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="not both"):
        calibrate(shield, boat(), promise=Violation(0.1), epsilon=0.1)


def test_a_cost_above_its_bound_makes_the_run_void(shield: Shield) -> None:
    env = _Relabelled(boat(20), cost=5.0)
    fresh = shield.with_delta(0.0)
    with pytest.raises(CalibrationError, match="above the declared bound 20: the calibration is"):
        fresh.calibrate(
            env, promise=MeanCost(4.0, bound=20.0), policy=into_the_rocks, deltas=[0.0],
            confidence=0.8, num_envs=1,
        )  # fmt: skip
    assert len(fresh.attempts) == 1


class Silent(gym.Wrapper):  # type: ignore[type-arg]
    """Reports nothing, and counts its steps."""

    steps = 0

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.steps += 1
        *result, _ = self.env.step(action)
        return (*result, {})

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self.env.reset(**kwargs)[0], {}


def test_an_environment_that_reports_nothing_is_refused_at_its_first_step(shield: Shield) -> None:
    env = Silent(boat())
    with pytest.raises(ValueError, match="first step reports no info"):
        calibrate(shield, env, num_envs=1, **LOOSE)
    assert env.steps == 1
    with pytest.raises(ValueError, match=r"no info\['cost'\]"):
        calibrate(shield, _Relabelled(boat(), constraint=-1.0), promise=CostAbove(1.0, 0.3))


def test_a_progress_bar_says_where_it_is(
    shield: Shield, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(shield, boat(), policy="random", deltas=[0.3], progress_bar=True, **LOOSE)
    shown = capsys.readouterr().err
    for words in ("test: delta 0.3, random", "violate, bound so far", "episode"):
        assert words in shown


def test_attempts_count_where_environment_and_policy_are_the_same() -> None:
    one = Attempt("Boat", ("random", "adversary"), 0.1, False, 5)
    assert one.counts_for("Boat", ["adversary"])
    assert not one.counts_for("Boat", ["policy"])
    assert not one.counts_for("Other", ["random"])


# -- copies and worker processes -----------------------------------------------------------------


def test_the_record_does_not_depend_on_the_number_of_processes(shield: Shield) -> None:
    records = []
    for workers in (1, 2):
        request = {"deltas": [0.3], "num_envs": 6, "workers": workers, **REQUEST}
        records.append({**calibrate(shield, boat(), **request).to_json(), "date": None})
    assert records[0] == records[1]


@pytest.mark.filterwarnings("ignore::safeshield.rollouts.copies.UnequalCopiesWarning")
def test_processes_are_refused_where_they_cannot_be_used(shield: Shield) -> None:
    with pytest.raises(ValueError, match="workers must be"):
        calibrate(shield, boat(), workers=-1)
    envs = gym.make_vec("safeshield/Boat-v0", num_envs=2)
    with pytest.raises(ValueError, match="workers=2 needs one Gymnasium environment to copy"):
        calibrate(shield, envs, workers=2)
    changed: Any = boat()
    changed.unwrapped.task = replace(changed.unwrapped.task, current=3.0)
    with pytest.raises(ValueError, match=r"workers=2 cannot copy .* because a copy made from its"):
        calibrate(shield, changed, workers=2)


def test_an_environment_that_was_changed_by_hand_is_calibrated_itself(shield: Shield) -> None:
    """Its copies would have the current that the spec names."""
    changed: Any = boat()
    changed.unwrapped.task = replace(changed.unwrapped.task, current=3.0)
    with pytest.warns(UnequalCopiesWarning, match="returns something else 1 steps after a reset"):
        runs = run_episodes(changed, "random", 2, 0)
    made = gym.make("safeshield/Boat-v0", dt=DT, current=3.0, max_episode_steps=100)
    own = run_episodes(made, "random", 2, 0, num_envs=1)
    for here, there in zip(runs, own, strict=True):
        assert np.allclose(here.observations, there.observations, atol=1e-5)
    with pytest.raises(ValueError, match="num_envs must be 1 for"):
        run_episodes(changed, "random", 2, 0, num_envs=2)


def test_an_interrupted_calibration_counts_as_an_attempt(shield: Shield) -> None:
    """The user may have seen results of its tests, so it lowers the level of the next attempt."""
    shield, calls = replace(shield), itertools.count()

    @batch_policy
    def impatient(observations: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
        if next(calls) > 150:
            raise KeyboardInterrupt
        return rng.uniform(-1.0, 1.0, observations.shape)

    with pytest.raises(KeyboardInterrupt):
        shield.calibrate(boat(), policy=impatient, deltas=[0.3, 0.15, 0.08], **REQUEST)
    assert [one.passed for one in shield.attempts] == [False]
