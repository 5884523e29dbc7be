"""The field's protocol: its formulas, its rule, its intervals, and the episodes behind them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pendulum import pendulum
from stable_baselines3 import PPO
from typer.testing import CliRunner

import safeshield.envs
from safeshield.algorithms.safefql import SafeFQL
from safeshield.cli import app
from safeshield.data.collect import collect
from safeshield.data.dataset import OfflineDataset
from safeshield.evaluation import (
    FieldScore,
    ReferenceReturns,
    Run,
    aggregate,
    describe_score,
    field_score,
    format_scores,
    interquartile_mean,
    normalised_cost,
    play,
    stratified_interval,
)
from safeshield.evaluation.episodes import UnshieldedAdversary, evaluate
from safeshield.policies import ShieldedPolicy
from safeshield.rollouts.workers import WorkerVectorEnv
from safeshield.shield import Shield
from safeshield.wrappers import SafetyShield

pytestmark = pytest.mark.filterwarnings("ignore")

Array = npt.NDArray[Any]
BOAT = "safeshield/Boat-v0"
REFERENCES = ReferenceReturns(0.0, 40.0)
assert safeshield.envs  # imported to register its ids

finite = st.floats(-1e6, 1e6, allow_nan=False)


def score(
    returns: Sequence[float] = (10.0,),
    costs: Sequence[float] = (0.0,),
    *,
    policy: str = "agent",
    task: str = "task",
    **rest: Any,  # noqa: ANN401
) -> FieldScore:
    """A score with one episode a run."""
    runs = tuple(Run(i, (r,), (c,)) for i, (r, c) in enumerate(zip(returns, costs, strict=True)))
    return FieldScore(policy, task, rest.pop("references", REFERENCES), rest.pop("limit", 10.0),
                      runs, **rest)  # fmt: skip


@given(finite, st.floats(1e-3, 1e6), finite)
def test_returns_are_scaled_so_that_the_log_spans_0_to_1(
    least: float, span: float, value: float
) -> None:
    references = ReferenceReturns(least, least + span)
    width = references.greatest - references.least
    assert references.normalise([references.least, references.greatest]).tolist() == [0.0, 1.0]
    np.testing.assert_allclose(references.normalise(value) * width + least, value, atol=1e-6)


def test_references_of_a_log_are_its_least_and_greatest_return(tmp_path: Path) -> None:
    log = collect(pendulum(5), "random", 6, 0)
    expected = ReferenceReturns(float(log.returns.min()), float(log.returns.max()))
    log.save(tmp_path / "log.hdf5")
    assert ReferenceReturns.of_log(log) == expected
    assert ReferenceReturns.of_log(tmp_path / "log.hdf5") == expected
    with pytest.raises(ValueError, match="greatest above the least"):
        ReferenceReturns.of_log(log.select([0]))


amounts = st.integers(0, 10**6).map(lambda sixteenths: sixteenths / 16)


@given(amounts, amounts)
def test_costs_pass_the_rule_exactly_up_to_the_limit(cost: float, limit: float) -> None:
    assert (normalised_cost(cost, limit) <= 1.0) == (cost <= limit)
    assert normalised_cost(limit, limit) == 1.0
    if limit > 0:
        assert normalised_cost(cost, limit) == cost / limit


def test_at_limit_0_one_is_added_above_and_below() -> None:
    assert normalised_cost([0.0, 1.0, 4.0], 0.0).tolist() == [1.0, 2.0, 5.0]
    for limit in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="cost_limit must be finite and at least 0"):
            normalised_cost(1.0, limit)


def test_the_verdict_is_on_the_mean_and_does_not_round() -> None:
    # Mean 10, the limit; the mean of the runs' means rounds to just above it.
    costs = ((0.0, 0.0, 0.0), (4.0, 3.0, 3.0), (27.0, 27.0, 26.0))
    runs = tuple(Run(seed, (0.0,) * 3, one) for seed, one in enumerate(costs))
    at_the_limit = FieldScore("agent", "task", REFERENCES, 10.0, runs)
    assert at_the_limit.run_costs.mean() > 1.0
    assert at_the_limit.normalised_cost == 1.0
    assert at_the_limit.safe
    assert not dataclasses.replace(at_the_limit, cost_limit=9.9).safe
    # One bad episode of many is no verdict: the rule is on the mean.
    assert score([0.0] * 4, [40.0, 0.0, 0.0, 0.0]).safe


def test_another_limit_is_the_same_episodes() -> None:
    one = score([10.0, 30.0], [4.0, 8.0])
    five = dataclasses.replace(one, cost_limit=5.0)
    assert (one.normalised_return, one.normalised_cost, one.safe) == (0.5, 0.6, True)
    assert (five.normalised_return, five.normalised_cost, five.safe) == (0.5, 1.2, False)


def test_a_score_survives_json() -> None:
    one = score([10.0, 30.0], [4.0, 8.0], shielded=True, trained_apart=True)
    data = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert FieldScore.from_json(data) == one
    assert (data["safe"], data["normalised_return"], data["run_costs"]) == (True, 0.5, [0.4, 0.8])
    del data["runs"]
    with pytest.raises(ValueError, match=r"missing: \['runs'\]"):
        FieldScore.from_json(data)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("references", {"greatest": None}),
        ("references", {"least": "low"}),
        ("runs", {"returns": None}),
        ("runs", {"costs": 3}),
        ("runs", {"steps": 5}),
    ],
)
def test_a_score_with_a_broken_part_is_refused(place: str, change: dict[str, Any]) -> None:
    """Every broken field, also of a run or of the reference returns, is a ValueError."""
    data = json.loads(json.dumps(score([10.0, 30.0], [4.0, 8.0]).to_json()))
    part = data[place][0] if place == "runs" else data[place]
    for name, value in change.items():
        part[name] = value
        if value is None:
            del part[name]
    with pytest.raises(ValueError, match=r"^score: (?:ReferenceReturns|Run|'\w+') must "):
        FieldScore.from_json(data)


def test_scores_refuse_what_is_no_protocol() -> None:
    with pytest.raises(ValueError, match="a return and a cost for each"):
        Run(0, (1.0,), ())
    with pytest.raises(ValueError, match="each with a different seed"):
        FieldScore("a", "t", REFERENCES, 10.0, (Run(0, (1.0,), (0.0,)),) * 2)
    with pytest.raises(ValueError, match="same number of episodes"):
        FieldScore(
            "a", "t", REFERENCES, 10.0, (Run(0, (1.0,), (0.0,)), Run(1, (1.0,) * 2, (0.0,) * 2))
        )


matrices = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=finite)


@given(matrices, st.randoms(use_true_random=False))
def test_the_interquartile_mean_is_that_of_the_middle_half(matrix: Array, shuffle: Any) -> None:  # noqa: ANN401
    ordered = sorted(matrix.ravel().tolist())
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    expected = sum(middle) / len(middle)
    assert interquartile_mean(matrix) == pytest.approx(expected, abs=1e-6)
    shuffle.shuffle(ordered)
    assert interquartile_mean(ordered) == pytest.approx(expected, abs=1e-6)


def test_the_outer_quarters_have_no_say() -> None:
    scores = np.arange(8.0)
    assert interquartile_mean(scores) == 3.5
    assert interquartile_mean([*scores[:6], 1e9, 1e9]) == 3.5
    assert interquartile_mean([-1e9, -1e9, *scores[2:]]) == 3.5


def slow_interval(scores: Array, resamples: int, seed: int) -> tuple[float, float]:
    """The interval of one block of draws, one run and one task at a time."""
    runs, tasks = scores.shape
    picks = np.random.default_rng(seed).integers(runs, size=(resamples, runs, tasks))
    means = []
    for pick in picks:
        drawn = [scores[pick[run, task], task] for run in range(runs) for task in range(tasks)]
        means.append(interquartile_mean(drawn))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


@settings(max_examples=20)
@given(matrices, st.integers(0, 5))
def test_the_interval_is_that_of_the_plain_loop(matrix: Array, seed: int) -> None:
    fast = stratified_interval(matrix, resamples=60, seed=seed)
    assert fast == pytest.approx(slow_interval(matrix, 60, seed), abs=1e-5, rel=1e-9)


def test_blocks_of_draws_join() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 3))
    joined = stratified_interval(scores, resamples=2500, seed=1)
    assert joined == pytest.approx(slow_interval(scores, 2000, 2), abs=0.05)


def test_tasks_are_strata() -> None:
    # Whatever the tasks differ by: with runs that agree there is nothing to be uncertain of. A
    # bootstrap that also drew tasks would find a spread here.
    alike = np.tile([0.1, 0.9, 0.4], (5, 1))
    low, high = stratified_interval(alike, resamples=200)
    assert low == pytest.approx(interquartile_mean(alike))
    assert high == pytest.approx(low)
    rng = np.random.default_rng(0)
    noisy = alike + rng.normal(0.0, 0.01, alike.shape)
    low, high = stratified_interval(noisy, resamples=200)
    assert 0.0 < high - low < 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    # The same symmetric law for all tasks: the population's interquartile mean is its centre, 0.
    intervals = [
        stratified_interval(rng.normal(size=(10, 4)), resamples=300, seed=i) for i in range(300)
    ]
    covered = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.98
    # Half as wide would fail.
    narrow = [(0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b) for a, b in intervals]
    assert np.mean([low <= 0.0 <= high for low, high in narrow]) < 0.8


def test_an_agent_over_tasks() -> None:
    scores = [
        score([10.0, 20.0, 30.0], [0.0, 4.0, 2.0], task="one"),
        score([0.0, 4.0, 2.0], [30.0, 20.0, 10.0], task="two"),
    ]
    total = aggregate(scores, resamples=200)
    assert (total.tasks, total.runs, total.safe_tasks) == (("one", "two"), 3, 1)
    assert total.mean_return == pytest.approx(np.mean([s.normalised_return for s in scores]))
    assert total.mean_cost == pytest.approx(np.mean([s.normalised_cost for s in scores]))
    assert not total.safe
    # Six numbers: the middle four of 0, 0.05, 0.1, 0.25, 0.5, 0.75.
    assert total.iqm_return == pytest.approx((0.05 + 0.1 + 0.25 + 0.5) / 4)
    assert total.return_interval[0] <= total.iqm_return <= total.return_interval[1]
    for record in (total, scores[0]):
        assert json.loads(json.dumps(record.to_json(), allow_nan=False)) == record.to_json()
    alone = aggregate([score([10.0]), score([20.0], task="two")])
    assert alone.return_interval is alone.cost_interval is None
    for wrong in (
        [],
        [scores[0], scores[0]],
        [scores[0], score(task="two")],
        [scores[0], dataclasses.replace(scores[1], policy="other")],
    ):
        with pytest.raises(ValueError, match="of one agent, one for each task"):
            aggregate(wrong)


def test_the_table_tells_safe_agents_from_unsafe_ones() -> None:
    scores = [
        score([20.0], [1.0], policy="careful", task="run"),
        score([30.0], [5.0], policy="able", task="run"),
        score([40.0], [50.0], policy="reckless", task="run"),
        score([10.0], [0.0], policy="careful", task="circle"),
        score([20.0], [11.0], policy="able", task="circle"),
    ]
    lines = format_scores(scores).splitlines()
    assert lines[0].split() == ["task", "limit", "careful", "able", "reckless"]
    assert "0.50 / 0.10" in lines[2]
    assert "0.75* / 0.50" in lines[2]
    assert "(1.00 / 5.00)" in lines[2]
    assert "0.25* / 0.00" in lines[3]
    assert "(0.50 / 1.10)" in lines[3]
    assert lines[3].endswith("-")
    assert lines[4].split() == ["mean", "0.38", "/", "0.05", "0.62", "/", "0.80", "-"]
    assert lines[5].startswith("interquartile mean")
    assert "[" not in lines[5], "one run shows no spread"
    assert lines[6].split() == ["safe", "on", "2", "of", "2", "1", "of", "2", "-"]
    markdown = format_scores(scores, markup="markdown").splitlines()
    assert markdown[2] == (r"| run | 10 | **0.50 / 0.10** | **0.75\* / 0.50** | (1.00 / 5.00) |")
    assert markdown[1].count("---:") == 4


def test_tables_refuse_what_cannot_be_compared() -> None:
    one = score()
    for others, message in (
        ([], "at least one"),
        ([one, one], "two scores on task"),
        ([one, score(policy="b", limit=5.0)], "share cost limit"),
        ([one, score(policy="b", references=ReferenceReturns(0, 1))], "reference returns"),
    ):
        with pytest.raises(ValueError, match=message):
            format_scores(others)
    with pytest.raises(ValueError, match="markup must be"):
        format_scores([one], markup="html")  # type: ignore[arg-type]


def test_the_episodes_are_those_of_evaluate() -> None:
    env = pendulum()
    run = play(env, "random", 7, episodes=6, num_envs=3)
    same = evaluate(env, "random", 6, 7, num_envs=3)
    assert np.mean(run.returns) == pytest.approx(same.mean_return, abs=1e-12)
    assert np.mean(run.costs) == pytest.approx(same.mean_cost, abs=1e-12)
    assert run.intervention_rate is None
    assert len(set(run.returns)) == 6


def test_seeds_differ_and_repeat() -> None:
    common: dict[str, Any] = {"references": REFERENCES, "episodes": 3, "name": "drunk"}
    one = field_score(pendulum(), "random", seeds=(4, 5), **common)
    assert one.runs[0].returns != one.runs[1].returns
    assert one == field_score(pendulum(), "random", seeds=(4, 5), **common)
    assert one.runs[1] == play(pendulum(), "random", 5, episodes=3)
    assert (one.policy, one.task, one.trained_apart) == ("drunk", "Pendulum-v1", False)


def test_each_seed_may_have_an_agent_of_its_own() -> None:
    def still(_: Array) -> Array:
        return np.zeros(1)

    apart = field_score(
        pendulum(), {1: still, 2: "random"}, references=REFERENCES, seeds=(1, 2), episodes=2
    )
    assert apart.trained_apart
    assert apart.runs == (
        play(pendulum(), still, 1, episodes=2),
        play(pendulum(), "random", 2, episodes=2),
    )
    with pytest.raises(ValueError, match="policy must have one entry for each of the seeds"):
        field_score(pendulum(), {1: still}, references=REFERENCES, seeds=(1, 2), episodes=2)


def test_a_shield_stands_behind_the_policy(shield: Shield) -> None:
    env = gym.make(BOAT)
    common: dict[str, Any] = {"references": ReferenceReturns(0, 400), "seeds": (0,), "episodes": 4}
    free = field_score(env, "random", **common)
    behind = field_score(env, "random", shield=shield, **common)
    assert (free.shielded, free.intervention_rate) == (False, None)
    assert behind.shielded
    assert behind.agent == "random + shield"
    assert behind.intervention_rate is not None
    assert 0.0 < behind.intervention_rate < 1.0
    assert behind.normalised_cost <= free.normalised_cost
    assert "of the actions" in describe_score(behind)


def test_shields_that_are_there_already_are_told(shield: Shield) -> None:
    env = gym.make(BOAT)
    common: dict[str, Any] = {"references": ReferenceReturns(0, 400), "seeds": (0,), "episodes": 3}
    behind = field_score(env, "random", shield=shield, **common)
    around = field_score(SafetyShield(env, shield), "random", **common)
    assert around.shielded
    assert around.agent == "random + shield"
    # Copies in a row or one after the other draw other proposals; the shield steps in alike.
    assert behind.intervention_rate is not None
    assert around.intervention_rate == pytest.approx(behind.intervention_rate, abs=0.2)

    def ahead(_: Array) -> Array:
        return np.ones(2)

    plain = field_score(env, ahead, **common)
    policy = ShieldedPolicy(ahead, shield)
    filtered = field_score(env, policy, **common)
    assert (plain.shielded, filtered.shielded) == (False, True)
    assert filtered.agent == "function + shield"
    assert (
        filtered.runs[0].returns == field_score(env, ahead, shield=shield, **common).runs[0].returns
    )
    assert field_score(env, {0: policy}, **common).shielded
    # Who plays against a shield is not behind it.
    assert not field_score(env, UnshieldedAdversary(shield), **common).shielded


@pytest.mark.parametrize("make", [pendulum, lambda: gym.make(BOAT)], ids=["copied", "native"])
def test_the_number_of_workers_changes_nothing(make: Any) -> None:  # noqa: ANN401
    """Random actions: from one generator for all copies, so any other order would show."""
    env = make()
    expected = play(env, "random", 3, episodes=10, num_envs=5)
    for workers in (1, 3):
        assert play(env, "random", 3, episodes=10, num_envs=5, workers=workers) == expected


class Fragile(gym.Env[Any, Any]):
    """Raises or dies in its third step."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, dies: bool) -> None:
        self.dies, self.time = dies, 0

    def reset(self, **_: Any) -> tuple[Array, dict[str, Any]]:  # noqa: ANN401
        return np.zeros(1, np.float32), {"cost": 0.0}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.time == 3:
            if self.dies:
                os._exit(9)
            raise ValueError("the third step is not for you")
        return np.zeros(1, np.float32), 0.0, False, self.time == 5, {"cost": 0.0}


class LonelyWorker(Fragile):
    """Lives once in a process, and ends in its fifth step; the reward says in which process."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012
    living = 0

    def __init__(self) -> None:
        super().__init__(dies=False)
        type(self).living += 1
        self.alone = type(self).living == 1

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        if not self.alone:
            raise ValueError("there are two of us")
        self.time = self.time % 5 + 1
        return np.zeros(1, np.float32), self.time, False, self.time == 5, {"cost": float(action[0])}


class Nowhere(Fragile):
    """Its reward is no number from the third step on."""

    steps = 0

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.time += 1
        type(self).steps += 1
        reward = math.nan if self.time >= 3 else 1.0
        return np.zeros(1, np.float32), reward, False, self.time == 50, {"cost": 0.0}


gym.register("SafeshieldTest/Fragile-v0", entry_point=lambda **kwargs: Fragile(**kwargs))
gym.register("SafeshieldTest/LonelyWorker-v0", entry_point=lambda **kwargs: LonelyWorker(**kwargs))
gym.register("SafeshieldTest/Nowhere-v0", entry_point=lambda **kwargs: Nowhere(False, **kwargs))


def test_what_goes_wrong_in_a_worker_is_told() -> None:
    with pytest.raises(ValueError, match="the third step") as caught:
        play(gym.make("SafeshieldTest/Fragile-v0", dies=False), "random", 0, episodes=2, workers=1)
    assert "in step" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="exit code 9"):
        play(gym.make("SafeshieldTest/Fragile-v0", dies=True), "random", 0, episodes=2, workers=1)


def test_workers_step_what_a_process_can_hold_once() -> None:
    def half(_: Array) -> Array:
        return np.full(1, 0.5)

    LonelyWorker.living = 0
    env = gym.make("SafeshieldTest/LonelyWorker-v0")
    alone = play(env, half, 0, episodes=3)
    assert alone.costs == (2.5, 2.5, 2.5)
    assert play(env, half, 0, episodes=3, workers=2) == alone
    with pytest.raises(ValueError, match=r"num_envs must be at most workers = 2 .*; got 3"):
        play(env, half, 0, episodes=3, workers=2, num_envs=3)
    with pytest.raises(ValueError, match=r"num_envs must be 1 .*hold one only; got 2") as caught:
        play(env, half, 0, episodes=3, num_envs=2)
    assert "rebuild" not in str(caught.value)


def test_a_reward_that_is_no_number_has_no_score(files: Path) -> None:
    env = gym.make("SafeshieldTest/Nowhere-v0")
    Nowhere.steps = 0
    message = r"the reward of a step must be .*got nan at step 2 of the .* reset with seed (\d+)"
    with pytest.raises(ValueError, match=message) as caught:
        field_score(env, "random", references=REFERENCES, num_envs=1)
    assert Nowhere.steps == 3
    # That seed tells which episode.
    first = re.search(message, str(caught.value))
    assert first is not None
    env.reset(seed=int(first[1]))
    PPO("MlpPolicy", env, policy_kwargs={"net_arch": [4]}, device="cpu").save(files / "odd.zip")
    told = run("evaluate", files / "odd.zip", "SafeshieldTest/Nowhere-v0", "--cost-limit", 10,
               "--references", "0,40", "--trust", code=2)  # fmt: skip
    assert "error: the reward of a step must be a finite number, got nan at step 2" in told


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import gymnasium, safeshield.envs\n"
        "from safeshield.evaluation import play\n"
        f"play(gymnasium.make({BOAT!r}), 'random', 0, episodes=1, workers=1)\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert 'must stand below `if __name__ == "__main__":`' in last


def test_workers_end_with_their_environment() -> None:
    envs = WorkerVectorEnv(pendulum(), num_envs=3, workers=2)
    processes = [worker._process for worker in envs._workers]
    assert len(processes) == 2
    envs.reset(seed=0)
    envs.close()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds must be different"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"seeds": [0.5]}, "each of seeds must be a whole number, got 0.5"),
        ({"episodes": 1.5}, "episodes must be a whole number, got 1.5"),
        ({"references": (0, 1)}, r"references must be a ReferenceReturns, got \(0, 1\)"),
        ({"cost_limit": -1.0}, "cost_limit must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        field_score(pendulum(), "random", **{"references": REFERENCES, "episodes": 2, **change})


def test_workers_need_something_to_copy() -> None:
    with pytest.raises(ValueError, match="can rebuild"):
        play(Fragile(dies=False), "random", 0, episodes=2, workers=2)
    vector = gym.vector.SyncVectorEnv([pendulum] * 2)
    with pytest.raises(ValueError, match="got a VectorEnv"):
        play(vector, "random", 0, episodes=2, workers=2)
    assert len(play(vector, "random", 0, episodes=3).returns) == 3


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, shield: Shield) -> Path:
    """A folder with log.hdf5, shield.safetensors and the SB3 models model-0.zip, model-1.zip."""
    folder = tmp_path_factory.mktemp("protocol")
    log = collect(gym.make(BOAT), "random", 5, 0)
    dataclasses.replace(log, provenance={"environment": BOAT}).save(folder / "log.hdf5")
    shield.save(folder / "shield.safetensors")
    for seed in (0, 1):
        PPO("MlpPolicy", gym.make(BOAT), seed=seed, policy_kwargs={"net_arch": [4]}, device="cpu",
            n_steps=8, batch_size=8).save(folder / f"model-{seed}.zip")  # fmt: skip
    return folder


def test_the_command_scores_a_model(files: Path) -> None:
    command = ("evaluate", files / "model-0.zip", BOAT, "--cost-limit", 10, "--episodes", 2,
               "--log", files / "log.hdf5")  # fmt: skip
    assert "--trust" in run(*command, code=2)
    (data,) = json.loads(run(*command, "--trust", "--json"))
    one = FieldScore.from_json(data)
    assert [run.seed for run in one.runs] == [0, 1, 2]
    assert one.references == ReferenceReturns.of_log(files / "log.hdf5")
    assert (one.cost_limit, one.shielded, one.trained_apart) == (10.0, False, False)
    text = run(*command, "--trust")
    assert text.strip() == describe_score(one)
    assert f"normalised cost {one.normalised_cost:.3f}, {'safe' if one.safe else 'unsafe'}" in text


def test_the_reference_must_be_a_log_of_that_task(files: Path, tmp_path: Path) -> None:
    log = OfflineDataset.load(files / "log.hdf5")
    command = ("evaluate", files / "shield.safetensors", BOAT, "--cost-limit", 10, "--seeds", 0,
               "--episodes", 1, "--log", tmp_path / "other.hdf5")  # fmt: skip
    for named, code, message in (
        ("safeshield/Boat-v1", 2, "is of safeshield/Boat-v1: give that task's log"),
        (f"safeshield.envs:{BOAT}", 0, ""),
        ("MyBoat", 0, "does not say of which environment it is"),
    ):
        other = dataclasses.replace(log, provenance={"environment": named})
        other.save(tmp_path / "other.hdf5")
        told = run(*command, code=code)
        assert message in told
        assert ("warning" in told) == (named == "MyBoat")
    wide = {
        name: np.repeat(getattr(log, name), 2, axis=1)
        for name in ("observations", "next_observations")
    }
    names = ("actions", "rewards", "terminated", "truncated", "costs", "action_space")
    others = {name: getattr(log, name) for name in names}
    OfflineDataset.from_arrays(**wide, **others).save(tmp_path / "other.hdf5")
    told = run(*command, code=2)
    assert "--log must be of safeshield/Boat-v0, whose observations have shape (2,), but" in told


def test_the_command_takes_each_seed_its_own_file(files: Path) -> None:
    output = run(
        "evaluate", files / "model-{seed}.zip", BOAT, "--cost-limit", 5, "--seeds", "1,0",
        "--references", "0,400", "--episodes", 1, "--trust", "--json",
    )  # fmt: skip
    one = FieldScore.from_json(json.loads(output)[0])
    assert one.trained_apart
    assert one.references == ReferenceReturns(0.0, 400.0)
    for result, seed in zip(one.runs, (1, 0), strict=True):
        model = PPO.load(files / f"model-{seed}.zip", device="cpu")
        assert result == play(gym.make(BOAT), model, seed, episodes=1)


def test_the_command_scores_behind_a_shield_and_without(files: Path) -> None:
    command = ("evaluate", files / "shield.safetensors", BOAT, "--cost-limit", 10, "--episodes", 3,
               "--seeds", 0, "--references", "0,400")  # fmt: skip
    for policy in ("random", "adversary", files / "model-0.zip"):
        trust = ("--trust",) if isinstance(policy, Path) else ()
        text = run(*command, "--policy", policy, "--without", *trust)
        name = Path(policy).name
        assert f"{name}, 1 run of one agent" in text
        assert "interquartile mean of the runs" not in text
        assert f"{name} + shield" in text
        assert text.strip().endswith("the highest return of the safe")


def test_the_command_scores_an_agent_by_itself(stored_agent: SafeFQL, tmp_path: Path) -> None:
    stored_agent.save(tmp_path / "agent.safetensors")
    command = ("evaluate", tmp_path / "agent.safetensors", BOAT, "--cost-limit", 10,
               "--episodes", 2, "--seeds", "3", "--references", "0,400", "--json")  # fmt: skip
    (alone,) = map(FieldScore.from_json, json.loads(run(*command)))
    assert not alone.shielded
    assert alone.runs == (play(gym.make(BOAT), stored_agent, 3, episodes=2),)
    (behind,) = map(FieldScore.from_json, json.loads(run(*command, "--policy", "random")))
    assert (behind.shielded, behind.policy) == (True, "random")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{shield}", "--seeds", "1"), "add --cost-limit"),
        (("{shield}", "--log", "{log}"), "add --cost-limit"),
        (("{shield}", "--cost-limit", "10"), "one of --log and --references"),
        (("{shield}", "--cost-limit", "10", "--references", "5,1"), "greatest above the least"),
        (("{shield}", "--cost-limit", "10", "--references", "5"), "takes 2 values"),
        (
            ("{shield}", "--cost-limit", "10", "--references", "0,1", "--seeds", "1,1"),
            "seeds must be different",
        ),
        (("{shield}", "--cost-limit", "10", "--log", "{log}", "--seed", "1"), "--seeds"),
        (
            ("{model}", "--cost-limit", "10", "--log", "{log}", "--trust", "--policy", "random"),
            "need a shield",
        ),
        (("{model}", "--trust"), "is not a safeshield file"),
    ],
)
def test_mistakes_end_in_one_line(files: Path, arguments: tuple[str, ...], message: str) -> None:
    places = {
        "shield": files / "shield.safetensors",
        "log": files / "log.hdf5",
        "model": files / "model-0.zip",
    }
    first, *rest = (argument.format(**places) for argument in arguments)
    assert message in run("evaluate", first, BOAT, "--episodes", 2, *rest, code=2)
