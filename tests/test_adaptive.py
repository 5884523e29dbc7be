"""Adaptive thresholds: the long-run bound, never looser than fixed, one margin an environment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from fitted import DT
from gymnasium.envs.registration import EnvSpec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv
from test_shield import near_the_edge, record
from test_vector_wrapper import NEXT, N, each, vectorised

import safeshield
from safeshield.envs.boat import CURRENT, BoatEnv, BoatVectorEnv, direction
from safeshield.envs.vector import autoreset_modes
from safeshield.shield import (
    AdaptiveMargin,
    AdaptiveThreshold,
    FilterReport,
    NothingAcceptableWarning,
    Shield,
)
from safeshield.shield.adaptive import as_adaptive, promised
from safeshield.shield.runtime import ShieldRuntime
from safeshield.wrappers import SafetyShield, VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield, worker_env

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
Array = npt.NDArray[Any]
Env = gym.Env[Any, Any]
MODES = autoreset_modes()
FAST = AdaptiveThreshold(target=0.2, rate=0.05, window=30, horizon=5, baseline=0.0)
"""For short tests: a margin after four errors, and every rise counts."""

levels = st.floats(0.01, 0.99)
rates = st.floats(1e-3, 0.5)
windows = st.integers(1, 60)
finite = st.floats(-10.0, 10.0, allow_nan=False)


def one(errors: float, margin: AdaptiveMargin) -> None:
    margin.observe(np.array([errors]), np.array([True]))


# -- the long-run bound -------------------------------------------------------------------------


def assert_bounded(margin: AdaptiveMargin) -> None:
    setting, steps = margin.settings, int(margin.observed[0])
    share = margin.wrong[0] / steps
    largest = max(setting.target, 1 - setting.target)
    bound = (largest + setting.rate) / (steps * setting.rate)
    assert setting.long_run_bound(steps) == pytest.approx(bound, rel=1e-12)
    assert abs(share - setting.target) <= bound + 1e-9
    assert -setting.rate - 1e-9 <= margin.alpha[0] <= 1 + setting.rate + 1e-9


@given(levels, rates, windows, st.lists(finite, min_size=1, max_size=300))
def test_the_bound_holds_for_any_errors(
    target: float, rate: float, window: int, errors: list[float]
) -> None:
    margin = AdaptiveMargin(AdaptiveThreshold(target, rate, window), 0.0, 1)
    for error in errors:
        one(error, margin)
        assert_bounded(margin)
    assert margin.observed[0] == len(errors)


@given(levels, rates, windows, st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_bound_holds_against_an_adversary_who_knows_the_margin(
    target: float, rate: float, window: int, wishes: list[bool]
) -> None:
    """It makes a range wrong, or right, whenever it wishes; infinite ranges it cannot change."""
    margin = AdaptiveMargin(AdaptiveThreshold(target, rate, window), 0.0, 1)
    for wish in wishes:
        before, wrong = margin.margin[0], margin.wrong[0]
        error = before + (1e-3 if wish else 0.0) if math.isfinite(before) else 0.0
        one(error, margin)
        assert margin.wrong[0] - wrong == (before == -np.inf or (wish and before < np.inf))
        assert_bounded(margin)


@pytest.mark.parametrize("wish", [True, False])
def test_the_worst_adversary_is_held_to_the_target(wish: bool) -> None:
    """Errors that grow without end, and errors that fall without end."""
    margin = AdaptiveMargin(AdaptiveThreshold(0.1, 0.02, 50), 0.0, 1)
    for step in range(5000):
        one(float(step if wish else -step), margin)
    assert abs(margin.wrong[0] / 5000 - 0.1) <= margin.settings.long_run_bound(5000) < 0.01


def test_a_conformal_quantile_of_steady_errors() -> None:
    rng = np.random.default_rng(0)
    margin = AdaptiveMargin(AdaptiveThreshold(0.1, 0.002, 2000), 0.0, 1)
    for error in rng.standard_normal(6000):
        one(error, margin)
    assert margin.wrong[0] / 6000 == pytest.approx(0.1, abs=0.01)
    assert margin.margin[0] == pytest.approx(1.2816, abs=0.12)


class Slow:
    """The same in plain Python, as the formulas have it."""

    def __init__(self, setting: AdaptiveThreshold, delta: float) -> None:
        self.setting, self.delta = setting, delta
        self.alpha, self.margin, self.errors = setting.target, math.inf, list[float]()
        self.threshold = -delta

    def observe(self, error: float) -> None:
        setting = self.setting
        self.alpha += setting.rate * (setting.target - (1.0 if error > self.margin else 0.0))
        self.errors = [*self.errors, error][-setting.window :]
        rank = math.ceil((len(self.errors) + 1) * (1.0 - self.alpha))
        if rank > len(self.errors):
            self.margin = math.inf
        else:
            self.margin = sorted(self.errors)[rank - 1] if rank >= 1 else -math.inf
        covered = self.delta / setting.horizon if setting.baseline is None else setting.baseline
        excess = max(min(self.margin, max(self.errors)) - covered, 0.0)
        self.threshold = -(self.delta + setting.horizon * excess)


@given(
    levels, rates, st.integers(1, 12), st.integers(1, 100),
    st.none() | st.floats(0.0, 5.0), st.floats(0.0, 3.0),
    st.lists(finite, min_size=1, max_size=60),
)  # fmt: skip
def test_it_is_what_the_formulas_say(
    target: float, rate: float, window: int, horizon: int, baseline: float | None, delta: float,
    errors: list[float],
) -> None:  # fmt: skip
    setting = AdaptiveThreshold(target, rate, window, horizon, baseline)
    margin, slow = AdaptiveMargin(setting, delta, 1), Slow(setting, delta)
    for error in errors:
        one(error, margin)
        slow.observe(error)
        assert margin.alpha[0] == slow.alpha
        assert margin.margin[0] == slow.margin
        assert margin.threshold[0] == slow.threshold


# -- the threshold ------------------------------------------------------------------------------


@given(
    levels, rates, windows, st.floats(0.0, 2.0),
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=80),
)  # fmt: skip
def test_the_threshold_is_finite_and_never_looser_than_the_calibrated_one(
    target: float, rate: float, window: int, delta: float, errors: list[float]
) -> None:
    margin = AdaptiveMargin(AdaptiveThreshold(target, rate, window), delta, 1)
    assert margin.threshold[0] == -delta
    for error in errors:
        one(error, margin)
        assert -np.inf < margin.threshold[0] <= -delta


def test_an_infinite_margin_is_as_strict_as_the_largest_error_kept() -> None:
    margin = AdaptiveMargin(AdaptiveThreshold(0.1, 0.01, 3, 10, 0.0), 0.5, 1)
    for error, largest in ((0.02, 0.02), (0.03, 0.03), (-1.0, 0.03), (0.0, 0.03), (0.0, 0.0)):
        one(error, margin)
        assert margin.margin[0] == np.inf
        assert margin.threshold[0] == pytest.approx(-0.5 - 10 * largest)


@pytest.mark.parametrize(("baseline", "least"), [(None, 0.005), (0.02, 0.02), (0.0, 0.0)])
def test_errors_that_delta_covers_move_nothing(baseline: float | None, least: float) -> None:
    setting = AdaptiveThreshold(0.1, 0.01, 50, 100, baseline)
    margin = AdaptiveMargin(setting, 0.5, 1)
    assert margin.baseline == least
    for _ in range(60):
        one(least, margin)
        assert margin.threshold[0] == -0.5
    for _ in range(60):
        one(least + 0.001, margin)
    assert margin.threshold[0] == pytest.approx(-0.6)


def test_it_comes_back_when_the_errors_do() -> None:
    margin = AdaptiveMargin(AdaptiveThreshold(0.1, 0.01, 50, 10), 0.1, 1)
    thresholds = []
    for error in [0.0] * 100 + [0.05] * 100 + [0.0] * 100:
        one(error, margin)
        thresholds.append(float(margin.threshold[0]))
    assert thresholds[99] == -0.1
    assert thresholds[199] == pytest.approx(-0.5)
    assert thresholds[299] == -0.1


def report(**fields: Any) -> FilterReport:  # noqa: ANN401
    count = len(fields["value"])
    given: dict[str, Any] = {
        "intervened": np.ones(count, np.bool_),
        "proposed_value": np.zeros(count),
        "state_value": np.zeros(count),
        "acceptable": np.ones(count, np.bool_),
        "valid": np.ones(count, np.bool_),
    }
    return FilterReport(**{k: np.asarray(v) for k, v in (given | fields).items()})


def test_what_is_promised() -> None:
    verdicts = report(
        value=[-0.3, -0.1, -0.1, np.inf],
        state_value=[-0.5, -0.2, 0.0, np.inf],
        acceptable=[True, False, False, False],
    )
    # Accepted: Q_h, though V_h may be lower. Not accepted: whatever is lower.
    np.testing.assert_array_equal(promised(verdicts), [-0.3, -0.2, -0.1, np.inf])


@given(
    st.floats(0.0, 1.0), st.integers(1, 8), st.floats(0.0, 0.5),
    st.lists(st.tuples(finite, st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=8),
)  # fmt: skip
def test_right_ranges_carry_the_value_no_further_than_zero(
    delta: float, horizon: int, q: float, steps: list[tuple[float, float, bool]]
) -> None:
    """What connects ranges and violations; see the module."""
    setting = AdaptiveThreshold(0.5, 0.01, 1, horizon)
    margin = AdaptiveMargin(setting, delta, 1)
    one(q, margin)
    threshold = float(margin.threshold[0])
    assert threshold <= -delta
    # An accepted step, then steps in which nothing is: with any Q_h, and errors of at most q.
    value = threshold + q
    for gap, share, below in steps[: horizon - 1]:
        verdicts = report(
            value=[value + gap], state_value=[value], acceptable=[value + gap <= threshold]
        )
        if verdicts.acceptable[0]:  # type: ignore[index]
            return
        reached = float(promised(verdicts)[0]) + (q * share if below else q)
        assert reached <= value + q + 1e-9
        value = reached
        assert value <= 1e-9


def test_only_steps_in_which_it_stepped_in_count_and_only_finite_ones() -> None:
    margin = AdaptiveMargin(FAST, 0.1, 6)
    verdicts = report(
        value=[-0.3, -0.3, -0.3, np.inf, -0.3, np.inf],
        state_value=[-0.3, -0.3, -0.3, np.inf, -0.3, np.inf],
        intervened=[True, False, True, True, True, True],
    )
    reached = np.array([-0.29, -0.29, np.inf, -0.29, np.nan, np.inf])
    for _ in range(8):
        margin.learn(verdicts, reached, np.array([True] * 6))
    assert margin.observed.tolist() == [8, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(margin.threshold, [-0.1 - 5 * 0.01, *[-0.1] * 5])
    margin.learn(verdicts, reached, np.array([False] * 6))
    assert margin.observed.tolist() == [8, 0, 0, 0, 0, 0]


# -- for how long errors add up ------------------------------------------------------------------


def hold(margin: AdaptiveMargin, values: Sequence[float], v: float = -0.2, start: int = 0) -> None:
    """Nothing acceptable in a row: Q_h `values`, V_h a little more each time."""
    for step, value in enumerate(values, start):
        now, after = v + 1e-3 * step, v + 1e-3 * (step + 1)
        verdicts = report(value=[value], state_value=[now], acceptable=[value <= -margin.delta])
        margin.learn(verdicts, np.array([after]), np.array([True]))


def test_errors_add_up_for_as_long_as_the_shield_has_had_to_hold_out() -> None:
    margin = AdaptiveMargin(AdaptiveThreshold(0.2, window=5), 0.3, 1)
    assert margin.horizon[0] == 1
    assert margin.baseline[0] == 0.3
    hold(margin, [-0.1] * 7)
    assert margin.horizon[0] == 7
    assert margin.baseline[0] == pytest.approx(0.3 / 7)
    hold(margin, [-0.1] * 3, start=7)  # the same stretch goes on
    assert margin.horizon[0] == 10
    hold(margin, [-0.1] * 9)  # after a reset: another state than the one that was reached
    assert margin.horizon[0] == 10
    for value, acceptable in ((-0.4, True), (-0.4, False)):  # the calibrated one accepts
        for interrupted in range(4):
            hold(margin, [-0.1] * 5, start=6 * interrupted)
            now = -0.2 + 1e-3 * (6 * interrupted + 5)
            verdicts = report(value=[value], state_value=[now], acceptable=[acceptable])
            margin.learn(verdicts, np.array([now + 1e-3]), np.array([True]))
    assert margin.horizon[0] == 10
    hold(margin, [-0.1] * 6)
    margin.passed()
    hold(margin, [-0.1] * 6, start=6)
    assert margin.horizon[0] == 10
    hold(margin, [0.5] * 50, v=0.1)  # nothing is held where a violation is foreseen
    assert margin.horizon[0] == 10
    hold(margin, [-0.1] * 200, v=-0.9)
    assert margin.horizon[0] == 100
    margin.forget()
    assert margin.horizon[0] == 1
    fixed = AdaptiveMargin(AdaptiveThreshold(0.2, horizon=4), 0.3, 1)
    hold(fixed, [-0.1] * 50)
    assert fixed.horizon[0] == 4


def deployed(setting: AdaptiveThreshold, steps: int = 4000) -> tuple[float, float]:
    """Run an unchanged world with binary labels: the share refused late, and the threshold.

    Values of safe states stand at -1, but for the critics' noise; now and then one is on the edge.
    What the shield picks itself, its critics overrate.
    """
    rng = np.random.default_rng(0)
    margin = AdaptiveMargin(setting, 0.88, 1)
    refused = []
    for _ in range(steps):
        edge = rng.random() < 0.05
        state = -0.93 if edge else -1.0
        proposed = -0.8 if edge else state + 0.03 * rng.standard_normal()
        lowest = state - 0.06
        threshold = float(margin.threshold[0])
        value = proposed if proposed <= threshold else lowest
        refused.append(proposed > threshold)
        verdicts = report(
            value=[value], state_value=[state], acceptable=[value <= threshold],
            intervened=[refused[-1]],
        )  # fmt: skip
        reached = state + 0.03 * rng.standard_normal()
        margin.learn(verdicts, np.array([reached]), np.array([True]))
    return float(np.mean(refused[-1000:])), float(margin.threshold[0])


def test_an_unchanged_world_with_binary_labels_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingAcceptableWarning)
        refused, threshold = deployed(AdaptiveThreshold(target=0.05))
    assert refused < 0.1
    assert threshold == -0.88
    with pytest.warns(NothingAcceptableWarning, match="refused every action.* Lower horizon"):
        refused, threshold = deployed(AdaptiveThreshold(target=0.05, horizon=100))
    assert refused == 1.0
    assert threshold < -2


# -- one margin an environment ------------------------------------------------------------------


def test_environments_do_not_know_of_each_other() -> None:
    rng = np.random.default_rng(0)
    together = AdaptiveMargin(FAST, 0.2, 4)
    alone = [AdaptiveMargin(FAST, 0.2, 1) for _ in range(4)]
    for step in range(200):
        errors = rng.standard_normal(4) * [0.01, 0.1, 1.0, 10.0]
        counted = rng.random(4) < [0.1, 0.5, 0.9, 1.0]
        together.observe(errors, counted)
        for i in np.flatnonzero(counted):
            one(errors[i], alone[i])
        if step == 150:
            together.forget(np.array([False, True, False, False]))
            alone[1].forget()
        for name in ("alpha", "margin", "threshold", "observed", "wrong"):
            expected = [getattr(margin, name)[0] for margin in alone]
            np.testing.assert_array_equal(getattr(together, name), expected)
    assert len(set(together.threshold)) == 4
    together.forget()
    fresh = AdaptiveMargin(FAST, 0.2, 4)
    for name in ("alpha", "margin", "threshold", "observed", "wrong"):
        np.testing.assert_array_equal(getattr(together, name), getattr(fresh, name))


def test_what_is_read_cannot_change_it() -> None:
    margin = AdaptiveMargin(FAST, 0.2, 2)
    for name in ("alpha", "margin", "threshold", "observed", "wrong"):
        getattr(margin, name)[:] = 7
    np.testing.assert_array_equal(margin.threshold, [-0.2, -0.2])
    np.testing.assert_array_equal(margin.observed, [0, 0])
    np.testing.assert_array_equal(margin.alpha, [0.2, 0.2])


# -- behind a shield ----------------------------------------------------------------------------


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_it_executes_nothing_that_the_fixed_threshold_would_refuse(
    shield: Shield, seed: int, strictness: float
) -> None:
    """What it accepts the fixed one accepts; where that one finds something, so does it."""
    rng = np.random.default_rng(seed)
    states, actions = near_the_edge(shield)
    rows = shield.states(states)
    stricter = shield.threshold - strictness * rng.random(len(states))
    executed, strict = shield.filter_rows(rows, states, actions, stricter)
    fixed = shield.filter_rows(rows, states, actions)[1]
    assert not (~strict.intervened & fixed.intervened).any()
    assert not (strict.acceptable & ~fixed.acceptable).any()
    again = shield.row_values(states, executed)
    assert (again[np.asarray(fixed.acceptable)] <= shield.threshold + 1e-5).all()
    assert (np.asarray(strict.value) <= np.asarray(fixed.value) + 1e-5)[strict.intervened].all()


class Watch(gym.Wrapper):  # type: ignore[type-arg]
    """Starts upstream of a rock, and breaks a reading if asked to."""

    def __init__(self, env: Env, broken_at: int = -1) -> None:
        super().__init__(env)
        self.steps, self.broken_at = 0, broken_at

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        self.env.reset(seed=seed)
        rng = self.unwrapped.np_random
        return self.env.reset(options=options or {"state": [rng.uniform(-1.8, -1.2), 0.5]})

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.steps += 1
        observation, *rest = self.env.step(action)
        if self.steps == self.broken_at:
            observation = np.full_like(observation, np.nan)
        return observation, *rest


def river(steps: int = 30, current: float = CURRENT, **kwargs: Any) -> Env:  # noqa: ANN401
    return gym.wrappers.TimeLimit(Watch(BoatEnv(dt=DT, current=current), **kwargs), steps)


AHEAD = np.array([1.0, 0.0], np.float32)


def test_a_single_environment_step_by_step(shield: Shield) -> None:
    """Against the shield's own verdicts, across episodes and a broken reading."""
    env = SafetyShield(river(7, 3.0, broken_at=5), replace(shield, record=record(0.05)), FAST)
    assert env.adaptive is not None
    slow = Slow(FAST, 0.05)
    rng = np.random.default_rng(0)
    counted = broken = 0
    for episode in range(6):
        observation, info = env.reset(seed=episode, options={"state": [-1.3, 0.5]})
        assert info["shield/threshold"] == pytest.approx(slow.threshold, abs=1e-6)
        over = False
        while not over:
            action = AHEAD if rng.random() < 0.8 else rng.uniform(-1, 1, 2).astype(np.float32)
            rows = observation[None]
            verdict = shield.filter_rows(shield.states(rows), rows, action[None], slow.threshold)[1]
            observation, _, _, over, info = env.step(action)
            assert info["shield/threshold"] == pytest.approx(slow.threshold, abs=1e-6)
            assert info["shield/intervened"] == verdict.intervened[0]  # type: ignore[index]
            reached = float(shield.value(observation))
            assert info["shield/safe_set"] == (reached <= -0.05)
            error = reached - float(promised(verdict)[0])
            if verdict.intervened[0] and not math.isfinite(error):  # type: ignore[index]
                broken += 1
            elif verdict.intervened[0]:  # type: ignore[index]
                counted += 1
                slow.observe(error)
    assert env.adaptive.observed[0] == counted > 20
    assert broken == 2
    assert env.adaptive.threshold[0] == pytest.approx(slow.threshold, abs=1e-6)
    assert slow.threshold < -0.06
    env.reset()
    assert env.adaptive.observed[0] == counted
    env.adaptive.forget()
    assert env.reset()[1]["shield/threshold"] == -0.05


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("horizon", [5, None])
def test_a_vector_environment_equals_single_ones(
    shield: Shield, mode: str, horizon: int | None
) -> None:
    """With episodes of different lengths, some terminated, in every autoreset mode."""

    def make(index: int) -> Env:
        return river(5 + 3 * index, current=2.0 + 0.4 * index)

    fast = replace(FAST, horizon=horizon)
    envs = VectorSafetyShield(vectorised(each(make), mode), shield, adaptive=fast)
    singles = [SafetyShield(make(i), shield, fast) for i in range(N)]
    infos = envs.reset(seed=3)[1]
    for i, single in enumerate(singles):
        single.reset(seed=3 + i)
    assert envs.adaptive is not None
    over = np.zeros(N, np.bool_)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(60):
        actions = rng.uniform(-1, 1, (N, 2)).astype(np.float32)
        actions[rng.random(N) < 0.7] = AHEAD
        _, _, terminated, truncated, infos = envs.step(actions)
        for i, single in enumerate(singles):
            if mode == NEXT and over[i]:
                over[i] = False
                info = single.reset()[1]
            else:
                *_, ended, late, info = single.step(actions[i])
                over[i] = ended or late
                if over[i] and mode == "SameStep":
                    info = single.reset()[1]
            assert infos["shield/threshold"][i] == pytest.approx(info["shield/threshold"], abs=1e-5)
            assert single.adaptive is not None
            assert envs.adaptive.observed[i] == single.adaptive.observed[0]
            assert envs.adaptive.wrong[i] == single.adaptive.wrong[0]
            assert envs.adaptive.horizon[i] == single.adaptive.horizon[0]
        seen.append(infos["shield/threshold"].copy())
        assert (over == (terminated | truncated)).all()
        if mode == "Disabled" and over.any():
            infos = envs.reset(options={"reset_mask": over.copy()})[1]
            for i in np.flatnonzero(over):
                info = singles[i].reset()[1]
                assert infos["shield/threshold"][i] == pytest.approx(
                    info["shield/threshold"], abs=1e-5
                )
    assert (np.min(seen, axis=0) < -0.06).all()
    assert (envs.adaptive.observed > 10).all()


def test_stable_baselines_equals_single_ones(shield: Shield) -> None:
    def makers(wrap: Callable[[Env], Env]) -> list[Callable[[], Env]]:
        return [partial(lambda i: wrap(river(5 + 3 * i, 2.0 + 0.4 * i)), i) for i in range(3)]

    together = VecSafetyShield(DummyVecEnv(makers(lambda env: env)), shield, adaptive=FAST)
    alone = DummyVecEnv(makers(lambda env: SafetyShield(env, shield, FAST.to_json())))
    for envs in (together, alone):
        envs.seed(0)
        envs.reset()
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        actions[rng.random(3) < 0.7] = AHEAD
        mine, theirs = together.step(actions)[3], alone.step(actions)[3]
        for one_info, other in zip(
            [*mine, *together.reset_infos], [*theirs, *alone.reset_infos], strict=True
        ):
            assert type(one_info["shield/threshold"]) is float
            assert one_info["shield/threshold"] == pytest.approx(
                other["shield/threshold"], abs=1e-5
            )
    assert together.adaptive is not None
    margins = alone.get_attr("adaptive")
    assert together.adaptive.observed.tolist() == [int(one.observed[0]) for one in margins]
    assert (together.adaptive.threshold < -0.06).all()


def test_an_end_that_stable_baselines_does_not_tell_teaches_nothing(shield: Shield) -> None:
    class Silent(DummyVecEnv):
        def step_wait(self) -> Any:  # noqa: ANN401
            observations, rewards, dones, infos = super().step_wait()
            for info in infos:
                info.pop("terminal_observation", None)
            return observations, rewards, dones, infos

    for kind, expected in ((Silent, 0), (DummyVecEnv, 10)):
        envs = VecSafetyShield(kind([lambda: river(1)]), shield, adaptive=FAST)
        envs.reset()
        for _ in range(10):
            assert envs.step(np.full((1, 2), np.nan, np.float32))[3][0]["shield/intervened"]
        assert envs.adaptive is not None
        assert envs.adaptive.observed[0] == expected


def test_a_stronger_current_makes_it_stricter(shield: Shield) -> None:
    """The reason for it all: the log's current keeps the threshold, a stronger one moves it."""

    def last(current: float) -> float:
        setting = {"target": 0.1, "window": 100, "horizon": 20}
        env = SafetyShield(river(60, current), shield.with_delta(0.2), setting)
        for seed in range(8):
            env.reset(seed=seed)
            over = False
            while not over:
                *_, over, info = env.step(AHEAD)
        return float(info["shield/threshold"])

    calm, strong = last(CURRENT), last(3.5)
    assert calm > -0.3
    assert strong < calm - 0.2


def test_a_runtime_is_fixed_unless_told(shield: Shield) -> None:
    fixed, adapting = ShieldRuntime(shield, 3), ShieldRuntime(shield, 3, adaptive={"window": 10})
    states = np.tile(np.array([[-1.3, 0.5]], np.float32), (3, 1))
    for runtime in (fixed, adapting):
        runtime.observe(states, [{}] * 3)
        runtime.filter(np.tile(AHEAD, (3, 1)))
        runtime.update(np.full(3, 0.7), np.ones(3, np.bool_))
        # What was learned once is not learned again.
        runtime.update(np.full(3, 0.7), np.ones(3, np.bool_))
    assert fixed.threshold == shield.threshold == -0.05
    assert fixed.adaptive is None
    assert adapting.adaptive is not None
    assert adapting.adaptive.observed.tolist() == [1, 1, 1]
    assert (np.asarray(adapting.threshold) < -0.05).all()
    with pytest.raises(ValueError, match="2 observations, its num_envs is 3"):
        adapting.observe(states[:2], [{}] * 2)


# -- specs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_as", ["settings", "dict"])
def test_the_spec_rebuilds_an_adaptive_shield(
    shield: Shield, tmp_path: Path, given_as: str
) -> None:
    file = tmp_path / "boat.safetensors"
    shield.save(file)
    adaptive = FAST if given_as == "settings" else FAST.to_json()
    env = SafetyShield(gym.make("safeshield/Boat-v0", dt=DT, current=3.0), file, adaptive)
    assert env.spec is not None
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        twin = gym.make(spec)
        assert isinstance(twin, SafetyShield)
        assert twin.adaptive is not None
        assert twin.adaptive.settings == FAST
        assert env.adaptive is not None
        env.adaptive.forget()
        for each_env in (env, twin):
            each_env.reset(seed=5, options={"state": [-1.6, 0.5]})
        for _ in range(30):
            mine, theirs = env.step(AHEAD)[4], twin.step(AHEAD)[4]
            assert mine["shield/threshold"] == theirs["shield/threshold"]
        assert mine["shield/threshold"] < -0.05


def test_a_worker_adapts_too(shield: Shield, tmp_path: Path) -> None:
    file = tmp_path / "boat.safetensors"
    shield.save(file)
    for given_shield in (shield, file):
        env = worker_env(river, given_shield, {"window": 7})()
        assert env.adaptive is not None
        assert env.adaptive.settings.window == 7
    assert worker_env(river, shield)().adaptive is None
    with pytest.raises(ValueError, match="window must be at least 1"):
        worker_env(river, shield, {"window": 0})


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given_as", "message"),
    [
        (ValueError, {"target": 0.0}, r"target must lie in \(0, 1\), got 0.0"),
        (ValueError, {"target": 1.0}, r"target must lie in \(0, 1\), got 1.0"),
        (ValueError, {"target": math.nan}, "target must lie"),
        (ValueError, {"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        (ValueError, {"rate": -1.0}, "rate must be positive"),
        (ValueError, {"rate": math.inf}, "rate must be positive and finite, got inf"),
        (ValueError, {"rate": math.nan}, "rate must be positive"),
        (ValueError, {"window": 0}, "window must be at least 1 step, got 0"),
        (ValueError, {"horizon": 0}, "horizon must be at least 1 step, got 0"),
        (ValueError, {"baseline": -0.1}, "baseline must be finite and at least 0"),
        (ValueError, {"baseline": math.nan}, "baseline must be finite"),
        (TypeError, {"window": 10.5}, "window must be a whole number of steps, got 10.5"),
        (TypeError, {"horizon": True}, "horizon must be a whole number"),
        (TypeError, {"target": "0.1"}, "target must be a number, got '0.1'"),
        (TypeError, {"rate": None}, "rate must be a number, got None"),
        (TypeError, {"gamma": 0.1}, r"adaptive takes \['target', .* got \['gamma'\] too"),
    ],
)
def test_settings_out_of_range(
    shield: Shield, kind: type[Exception], given_as: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind, match=message):
        as_adaptive(given_as)
    with pytest.raises(kind, match=message):
        SafetyShield(river(), shield, given_as)
    with pytest.raises(kind, match=message):
        VectorSafetyShield(BoatVectorEnv(2), shield, adaptive=given_as)
    with pytest.raises(kind, match=message):
        VecSafetyShield(DummyVecEnv([river]), shield, adaptive=given_as)


@pytest.mark.parametrize("wrong", [True, 0.1, "yes", [0.1]])
def test_neither_settings_nor_a_dict(shield: Shield, wrong: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match="adaptive must be an AdaptiveThreshold, a dict"):
        SafetyShield(river(), shield, wrong)


def test_settings_are_values() -> None:
    setting = safeshield.AdaptiveThreshold(window=np.int64(10), target=np.float32(0.5))  # type: ignore[arg-type]
    assert setting == AdaptiveThreshold(target=0.5, window=10)
    assert type(setting.window) is int
    assert as_adaptive(setting.to_json()) == as_adaptive(setting) == setting
    assert as_adaptive(None) is None


# -- the current --------------------------------------------------------------------------------


def expected(state: Sequence[float], action: Sequence[float], current: float) -> list[float]:
    (x, y), (u, v) = state, direction(np.asarray(action))
    return [x + 0.005 * (u + current - 0.5 * y**2), y + 0.005 * v]


@pytest.mark.parametrize("current", [0.0, 2.0, 2.6, -1.0])
def test_the_boat_drifts_with_the_current_that_it_is_given(current: float) -> None:
    env = gym.make("safeshield/Boat-v0", current=current)
    envs = BoatVectorEnv(2, current=current)
    starts = [[-1.0, 0.5], [0.25, -1.5]]
    actions = np.array([[0.5, -0.25], [-3.0, 4.0]])
    envs.reset(options={"state": starts})
    envs.step(actions)
    for start, action, state in zip(starts, actions, envs.state, strict=True):
        env.reset(options={"state": start})
        env.unwrapped.step(action)
        np.testing.assert_allclose(state, expected(start, action, current), rtol=0, atol=1e-15)
        np.testing.assert_array_equal(env.unwrapped.state, state)  # type: ignore[attr-defined]


def test_the_current_is_2_unless_told() -> None:
    env, envs = BoatEnv(), BoatVectorEnv(1)
    for boat in (env, envs):
        boat.reset(options={"state": [0.0, 0.0]})
    env.step(np.array([0.0, 0.0]))
    envs.step(np.zeros((1, 2)))
    np.testing.assert_allclose(env.state, [0.01, 0.0], atol=1e-15)
    np.testing.assert_allclose(envs.state, [[0.01, 0.0]], atol=1e-15)
