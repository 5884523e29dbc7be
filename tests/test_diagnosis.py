"""The cause of a planted fault is named first, and each figure of a diagnosis is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from faults import FAULTS, TASKS, Array, Planted, Reports, logged, sound, with_record
from PIL import Image
from typer.testing import CliRunner

from safeshield.cli import app
from safeshield.evaluation.causes import (
    BLIND,
    CAUSES,
    CHANGED,
    CONTRADICTION,
    LATE,
    MISREPLACED,
    START,
    THIN,
    UNSUPPORTED,
    Facts,
    entries,
    violations,
)
from safeshield.evaluation.diagnosis import Diagnosis
from safeshield.evaluation.traces import Trace, shielded_traces
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield import CommittedFallback, Shield
from safeshield.wrappers import CostFromFunction, SafetyShield

pytestmark = pytest.mark.filterwarnings("ignore")
CART = "double integrator"


def diagnosed(planted: Planted, task: str, episodes: int = 20, seed: int = 1) -> Diagnosis:
    agent = TASKS[task].agent
    return planted.shield.diagnose(
        planted.env, agent, episodes=episodes, seed=seed, log=planted.log
    )


@pytest.fixture(scope="module")
def thin() -> Diagnosis:
    return diagnosed(FAULTS["thin delta"](CART), CART)


# -- planted faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_planted_cause_is_named_first(task: str, fault: str) -> None:
    planted = FAULTS[fault](task)
    found = diagnosed(planted, task)
    assert found.cause == planted.cause
    assert found.summary().splitlines()[1].startswith(f"Most likely cause: {planted.cause} (")


@pytest.mark.parametrize("task", TASKS)
def test_a_sound_shield_is_blamed_for_nothing(task: str) -> None:
    given = TASKS[task]
    found = sound(task).with_delta(0.15).diagnose(given.env(), "random", episodes=40, seed=2)
    assert set(found.counts) <= {START}
    assert found.violating_episodes > 0
    certified = [one for one in found.entries if one.last_accepted is not None]
    assert not certified


def test_where_nothing_violates_no_cause_is_named() -> None:
    env = Reports(TASKS[CART].env(), shift=-2.0)  # no state is a violation
    found = sound(CART).with_delta(0.1).diagnose(env, "random", episodes=4)
    assert found.cause is None
    assert found.counts == {}
    assert "No state was a violation" in found.summary()
    assert found.worst_episode in range(4)


def test_a_turned_sign_is_named_as_such() -> None:
    for source in (True, False):
        shield = sound(CART, source=source).with_delta(0.1)
        env = Reports(TASKS[CART].env(), factor=-1.0)
        found = shield.diagnose(env, TASKS[CART].agent, episodes=10)
        assert found.turned
        assert "h <= 0 is safe: is the sign turned?" in found.summary()


def test_a_larger_constraint_is_no_turned_sign() -> None:
    found = diagnosed(FAULTS["wrong h"](CART), CART, episodes=6)
    assert not found.turned
    assert "the source 'DoubleIntegrator@1'" in found.findings[0]
    assert "OfflineDataset.with_constraint" in found.summary()


def test_costs_alone_contradict_the_source() -> None:
    # The cost begins 0.3 m before the wall of the shield's h.
    bare = Bare(TASKS[CART].env())
    env = CostFromFunction(bare, lambda _s, _a, reached, _info: float(abs(reached[0]) > 0.7))
    found = sound(CART).with_delta(0.1).diagnose(env, TASKS[CART].agent, episodes=6)
    assert found.cause == CONTRADICTION
    assert "cost 1" in found.findings[0]


def test_costs_that_agree_contradict_nothing() -> None:
    env = CostFromFunction(
        Bare(TASKS[CART].env()), lambda _s, _a, reached, _info: float(abs(reached[0]) > 1.0)
    )
    found = sound(CART).diagnose(env, TASKS[CART].agent, episodes=10)
    assert found.cause == THIN
    assert not found.findings


class Bare(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that reports nothing."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        return self.env.reset(**options)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        return (*self.env.step(action)[:4], {})


def test_an_environment_that_reports_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="neither info"):
        sound(CART).diagnose(Bare(TASKS[CART].env()), "random", episodes=1)


def test_changed_dynamics_and_an_optimistic_value_are_told_apart_by_the_log() -> None:
    changed, optimistic = (FAULTS[name](CART) for name in ("changed dynamics", "optimistic value"))
    with_log = diagnosed(replace(optimistic, log=logged(CART)), CART)
    assert with_log.cause == LATE
    assert "pass the training log" not in with_log.summary()
    assert "with discrete actions 0.99" in " ".join(with_log.summary().split())
    assert diagnosed(changed, CART).cause == CHANGED
    alone = diagnosed(replace(changed, log=None), CART)
    assert alone.cause == LATE
    assert "pass the training log" in alone.summary()


def test_a_sound_log_changes_no_verdict() -> None:
    planted = replace(FAULTS["thin delta"](CART), log=logged(CART))
    found = diagnosed(planted, CART)
    assert found.cause == THIN
    assert found.compared
    assert not found.findings


def test_the_arguments_that_differ_are_named() -> None:
    found = diagnosed(FAULTS["other arguments"](CART), CART, episodes=8)
    assert found.findings == (
        "the environment is not that of the record: its arguments are {'dt': 0.4}, not {}",
    )
    shield = with_record(sound("boat").with_delta(0.1), TASKS["boat"].env())
    same = shield.diagnose(TASKS["boat"].env(), "random", episodes=8)
    assert not same.findings


def test_states_far_from_the_log_are_outside_the_support() -> None:
    trace = made([-0.5, -0.4, 0.6, 0.6], [-0.6, -0.6, 0.6], [True, True, False])
    for speed, cause in ((2.0, BLIND), (20.0, UNSUPPORTED)):
        trace.observations[1, 1] = speed
        assert [one.cause for one in judged(trace)] == [cause]


def test_a_committed_fallback_that_is_clearly_worse_is_misreplaced() -> None:
    # The fallback of these shields is a random network.
    shield = sound(CART).with_delta(0.1).with_replacement(CommittedFallback())
    found = shield.diagnose(TASKS[CART].env(), TASKS[CART].agent, episodes=6)
    assert found.cause == MISREPLACED
    assert "always runs its fallback (CommittedFallback)" in found.summary()


# -- what a diagnosis says -----------------------------------------------------------------------


def test_every_violation_has_exactly_one_cause(thin: Diagnosis) -> None:
    assert sum(thin.counts.values()) == len(thin.entries)
    assert {one.cause for one in thin.entries} == set(thin.counts) <= set(CAUSES)
    assert thin.violating_episodes == len({one.episode for one in thin.entries})


def test_the_named_delta_would_have_rejected_what_was_accepted(thin: Diagnosis) -> None:
    assert thin.needed_delta is not None
    some = [one for one in thin.entries if one.cause == THIN]
    assert all((one.accepted_value or 0.0) > -thin.needed_delta for one in some)
    larger = sound(CART).with_delta(thin.needed_delta)
    again = larger.diagnose(TASKS[CART].env(), TASKS[CART].agent, episodes=20, seed=1)
    assert THIN not in again.counts
    assert f"At delta {thin.needed_delta:.3g} the last accepted" in thin.summary()


def test_uncertified_starts_are_named_last() -> None:
    env = TASKS[CART].env()
    found = sound(CART).diagnose(env, TASKS[CART].agent, episodes=20, seed=1)
    assert list(found.counts)[-1] == START
    for one in found.entries:
        if one.cause == START:
            assert one.last_accepted is None


def traces_of(shield: Shield, env: gym.Env[Any, Any], episodes: int = 6) -> list[Trace]:
    policy = as_batch_policy("random", env.action_space)
    return shielded_traces(shield, env, policy, episodes, 3)


def test_traces_hold_what_the_shield_says_of_each_step() -> None:
    shield, env = sound("boat").with_delta(0.1), TASKS["boat"].env()
    for trace in traces_of(shield, env):
        rows = trace.observations[:-1]
        executed, report = shield.filter(rows, trace.proposed)
        np.testing.assert_allclose(executed, trace.executed, atol=1e-5)
        np.testing.assert_array_equal(report.intervened, trace.intervened)
        np.testing.assert_allclose(trace.value, shield.value(rows, trace.executed), atol=1e-5)
        np.testing.assert_allclose(trace.state_value, shield.value(trace.observations), atol=1e-5)
        assert trace.reported is not None
        np.testing.assert_allclose(trace.used, trace.reported, atol=1e-5)
        gap = np.maximum(trace.reported[1:], trace.state_value[1:]) - trace.value
        np.testing.assert_allclose(trace.residuals, gap)


def test_figures_are_those_of_the_traces() -> None:
    shield, env = sound(CART).with_delta(0.1), TASKS[CART].env()
    found = shield.diagnose(env, "random", episodes=6, seed=3)
    traces = traces_of(shield, env)
    steps = sum(map(len, traces))
    lost = sum(int((t.acceptable[:-1] & ~t.acceptable[1:]).sum()) for t in traces)
    assert found.steps == steps
    assert found.handovers == pytest.approx(1000 * lost / steps)
    assert found.replaced == pytest.approx(sum(t.intervened.sum() for t in traces) / steps)
    assert found.without_acceptable == pytest.approx(
        sum((~t.acceptable).sum() for t in traces) / steps
    )
    one = found.running_sums[0]
    near = [
        np.where(np.abs(t.state_value[:-1]) < 18 * found.one_step, t.residuals, 0.0).max()
        for t in traces
    ]
    assert one.steps == 1
    assert one.median == pytest.approx(np.median(near) / found.one_step, rel=1e-4, abs=1e-6)


def made(h: list[float], value: list[float], acceptable: list[bool]) -> Trace:
    """An episode with given h, Q_h of what ran (V_h alike) and acceptance."""
    count = len(value)
    rows = np.zeros((count + 1, 2), np.float32)
    return Trace(
        observations=rows,
        proposed=np.zeros((count, 1), np.float32),
        executed=np.zeros((count, 1), np.float32),
        intervened=~np.array(acceptable),
        acceptable=np.array(acceptable),
        supported=np.ones(count, np.bool_),
        proposed_value=np.array(value),
        value=np.array(value),
        state_value=np.array([*value, value[-1]]),
        readable=np.ones(count + 1, np.bool_),
        used=np.array(h),
        reported=np.array(h),
        costs=None,
    )


def judged(trace: Trace, delta: float = 0.05) -> list[Any]:
    shield = sound(CART).with_delta(delta)
    facts = Facts([np.zeros(len(trace) + 1, np.bool_)], "", False, "", "")
    return violations(shield, [trace], facts)


def test_blind_is_acceptable_until_the_entry() -> None:
    (one,) = judged(made([-0.5, -0.4, 0.6, 0.6], [-0.6, -0.6, 0.6], [True, True, False]))
    assert (one.cause, one.step, one.last_accepted, one.steps_before) == (BLIND, 2, 1, 1)
    assert one.error == pytest.approx(1.2)


def test_late_names_the_last_safe_step_and_what_was_accepted() -> None:
    # The states are all alike and far inside, where an acceptable action exists. The value of
    # what ran is that of the best action there, so the replacement is not to blame.
    shield = sound(CART).with_delta(5.0)
    trace = made([-0.5, -0.4, -0.2, 0.6], [-6.0, -1.0, -1.0], [True, False, False])
    (one,) = violations(shield, [trace], Facts([np.zeros(4, np.bool_)], "", False, "", ""))
    assert (one.cause, one.step, one.last_accepted, one.last_safe) == (LATE, 3, 0, 0)
    assert one.accepted_value == -6.0
    assert one.steps_before == 3


def test_entries_begin_where_no_violation_was() -> None:
    trace = made([0.1, 0.2, -0.1, 0.3, 0.4, -0.1, 0.1], [0.0] * 6, [False] * 6)
    assert entries(trace) == [0, 3, 6]


def test_a_small_error_is_a_thin_delta_and_a_large_one_is_not() -> None:
    step = sound(CART).model.scale.step_rms
    for factor, cause in ((4.0, THIN), (6.0, BLIND)):
        peak = factor * step - 0.06
        (one,) = judged(made([-0.5, peak, peak], [-0.06, 0.5], [True, False]))
        assert one.cause == cause


# -- arguments, files and the command ------------------------------------------------------------


def test_the_policy_is_called_as_deployed() -> None:
    class Model:
        seen: list[bool]

        def predict(
            self, observation: Array, state: object, episode_start: object, deterministic: bool
        ) -> tuple[Array, None]:
            self.seen.append(deterministic)
            return np.zeros((len(observation), 1), np.float32), None

    for deterministic in (False, True):
        model = Model()
        model.seen = []
        found = sound(CART).diagnose(
            TASKS[CART].env(), model, episodes=1, deterministic=deterministic
        )
        assert set(model.seen) == {deterministic}
        assert found.deterministic == deterministic
        assert found.policy == "Model"


def test_the_same_seed_gives_the_same_diagnosis() -> None:
    env = TASKS[CART].env()
    first, again, other = (
        sound(CART).diagnose(env, "random", episodes=4, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_wrong_arguments_are_named() -> None:
    shield, env = sound(CART), TASKS[CART].env()
    with pytest.raises(ValueError, match="plain environment"):
        shield.diagnose(SafetyShield(env, shield), "random", episodes=1)
    with pytest.raises(ValueError, match="observation_space"):
        shield.diagnose(TASKS["boat"].env(), "random", episodes=1)
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        shield.diagnose(env, "random", episodes=0)
    with pytest.raises(TypeError, match="env must be"):
        shield.diagnose("boat", "random", episodes=1)  # type: ignore[arg-type]


def test_the_command_prints_text_or_json_and_draws(tmp_path: Path) -> None:
    file, picture = tmp_path / "shield.safetensors", tmp_path / "worst.png"
    sound(CART).save(file)
    arguments = ["diagnose", str(file), TASKS[CART].id, "--policy", "adversary", "--episodes", "6"]
    text = CliRunner().invoke(app, [*arguments, "--picture", str(picture)])
    assert text.exit_code == 0, text.output
    assert "Most likely cause: thin delta" in text.output
    assert "the worst episode, number" in text.output
    with Image.open(picture) as image:
        assert min(image.size) > 500
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert told["cause"] == THIN
    assert len(told["worst"]["h"]) == len(told["worst"]["value"]) + 1
    assert sum(told["counts"].values()) == len(told["entries"])


def test_the_command_finds_out_at_once_that_a_picture_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "shield.safetensors"
    sound(CART).save(file)
    for name in ("worst.doc", "missing/worst.png"):
        picture = str(tmp_path / name)
        result = CliRunner().invoke(
            app, ["diagnose", str(file), TASKS[CART].id, "--picture", picture]
        )
        assert result.exit_code == 2
        assert "error:" in result.output
