"""Logs of learners: whole, raw, thinned as promised, and the same after an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pendulum import over_the_limit, pendulum
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from typer.testing import CliRunner

from safeshield.cli import app
from safeshield.collection import (
    LearnerConfig,
    Multiplier,
    Thinning,
    collect_while_learning,
    config_for,
)
from safeshield.collection import learner as learner_module
from safeshield.collection.recorder import EpisodeRecorder, PricedReward
from safeshield.collection.state import (
    STATE,
    Progress,
    read_progress,
    restore,
    segment_file,
    write_state,
)
from safeshield.data.collect import collect, log_of
from safeshield.data.dataset import OfflineDataset
from safeshield.files.lock import locked
from safeshield.spaces.rows import flat_actions, flat_observations

Array = npt.NDArray[Any]
SMALL = LearnerConfig(
    num_envs=2, rollout_steps=32, batch_size=32, epochs=2, hidden=(8,), segment_steps=128
)
STEPS = 320
"""Five updates: two segments of two, and one of one."""
EPISODE = 20
LIMITS = (None, 2.0)


def run_learners(folder: Path, **change: Any) -> OfflineDataset:  # noqa: ANN401
    settings = {"limits": LIMITS, "steps": STEPS, "seed": 3, "config": SMALL} | change
    return collect_while_learning(pendulum(EPISODE), folder, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineDataset, Path]:
    folder = tmp_path_factory.mktemp("finished") / "parts"
    return run_learners(folder), folder


def assert_same(one: OfflineDataset, other: OfflineDataset) -> None:
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, field.name)
        else:
            assert mine == theirs, field.name


# The price on cost.

costs = st.floats(0.0, 1e4)


@given(costs, costs, st.floats(1e-2, 1e3))
def test_the_price_moves_towards_the_limit(limit: float, cost: float, value: float) -> None:
    before = Multiplier(limit, value)
    after = before.updated(cost)
    assert np.sign(after.value - value) in (np.sign(cost - limit), 0.0)
    if abs(cost - limit) > 1e-3 * max(limit, 1.0):
        assert after.value != value
    assert abs(math.log(after.value / value)) <= before.rate * (1 + 1e-9)
    assert before.least <= after.value <= before.greatest


@given(costs, st.lists(costs, min_size=1, max_size=5))
def test_a_greater_cost_never_makes_a_lower_price(limit: float, tried: list[float]) -> None:
    values = [Multiplier(limit).updated(cost).value for cost in sorted(tried)]
    assert values == sorted(values)


def test_the_price_stays_in_its_range() -> None:
    price = Multiplier(0.0)
    for _ in range(1000):
        price = price.updated(100.0)
    assert price.value == price.greatest
    for _ in range(1000):
        price = dataclasses.replace(price, limit=50.0).updated(0.0)
    assert price.value == price.least
    for wrong in ({"limit": -1.0}, {"limit": math.nan}, {"limit": 1.0, "rate": 0.0}):
        with pytest.raises(ValueError, match="got"):
            Multiplier(**wrong)


# Thinning.

grids = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=60)
settings_of_thinning = st.fixed_dictionaries(
    {
        "episodes": st.none() | st.integers(1, 70),
        "cap": st.none() | st.integers(1, 8),
        "bins": st.integers(1, 6),
        "seed": st.integers(0, 3),
    }
)


def cells_of(pairs: list[tuple[int, int]], bins: int) -> list[tuple[int, ...]]:
    """The slow way: in which part of either range each episode lies."""
    sides = []
    for values in zip(*pairs, strict=True):
        low, high = min(values), max(values)
        width = (high - low) or 1
        sides.append([min(bins * (value - low) // width, bins - 1) for value in values])
    return list(zip(*sides, strict=True))


@given(grids, settings_of_thinning)
def test_thinning_takes_from_all_cells_alike(
    pairs: list[tuple[int, int]], settings: dict[str, Any]
) -> None:
    thinning = Thinning(**settings)
    returns, prices = map(list, zip(*pairs, strict=True))
    kept = thinning.keep(returns, prices)
    assert sorted(set(kept.tolist())) == kept.tolist()
    cells = cells_of(pairs, thinning.bins)
    before, after = Counter(cells), Counter(cells[i] for i in kept)
    most = thinning.cap or len(pairs)
    allowed = sum(min(count, most) for count in before.values())
    assert len(kept) == min(thinning.episodes or allowed, allowed)
    # No cell is preferred: one that could still give has given as much as any other, or one less.
    highest = max(after.values())
    for cell, count in before.items():
        assert after[cell] >= min(count, most, highest - 1)
    if len(kept) >= len(before):
        assert set(after) == set(before)


@given(grids, settings_of_thinning, st.integers(1, 70))
def test_more_episodes_keep_those_of_fewer(
    pairs: list[tuple[int, int]], settings: dict[str, Any], fewer: int
) -> None:
    returns, prices = map(list, zip(*pairs, strict=True))
    many = Thinning(**settings)
    few = dataclasses.replace(many, episodes=min(fewer, many.episodes or fewer))
    assert set(few.keep(returns, prices)) <= set(many.keep(returns, prices))
    # Units do not matter.
    np.testing.assert_array_equal(
        many.keep(returns, prices), many.keep(8.0 * np.array(returns) - 64.0, prices)
    )


def test_the_draw_follows_the_seed() -> None:
    values = np.zeros(500)
    draws = [Thinning(episodes=20, seed=seed).keep(values, values).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    # Episodes of one cell have the same chance, wherever they stand.
    counts = np.bincount(
        np.concatenate([Thinning(episodes=50, seed=s).keep(values, values) for s in range(200)]),
        minlength=500,
    )
    assert counts.sum() == 200 * 50
    assert abs(counts[:250].sum() - counts[250:].sum()) < 5 * math.sqrt(200 * 50)


def test_thinning_refuses_what_is_no_grid() -> None:
    for name in ("episodes", "cap", "bins"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Thinning(**{name: 0})
    with pytest.raises(ValueError, match="one number an episode"):
        Thinning().keep([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        Thinning().keep([math.nan], [1.0])


# What is written down.


class Stroll(gym.Env[Any, Any]):
    """x moves by the clipped action; ends by itself after even, is cut after odd lengths."""

    action_space: gym.Space[Any]

    def __init__(self, form: str = "box", tells: str = "cost", bound: float = 1.0) -> None:
        self.form, self.tells = form, tells
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float32)
        line = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        if form == "dict":
            line = gym.spaces.Dict({"b": line, "a": gym.spaces.Box(-9.0, 9.0, (1,))})
        if form == "discrete":
            line, self.action_space = gym.spaces.Discrete(12), gym.spaces.Discrete(3)
        self.observation_space = line

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.time = float(self.np_random.normal()), 0
        self.length = int(self.np_random.integers(1, 9))
        return self._see(), self._told()

    def step(self, action: Array) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.time += 1
        self.x += float(np.ravel(action)[0])
        over = self.time >= self.length and self.tells != "no end"
        ends = self.length % 2 == 0
        reward = math.nan if self.tells == "nan reward" and self.time == 3 else self.x
        return self._see(), reward, over and ends, over and not ends, self._told()

    def _see(self) -> Any:  # noqa: ANN401
        line = np.array([self.x, self.time])
        if self.form == "dict":
            return {"b": line, "a": np.array([self.time], np.float32)}
        return self.time if self.form == "discrete" else line

    def _told(self) -> dict[str, Any]:
        # A cost that is not 0 or 1, and not there at reset.
        if self.tells == "nothing":
            return {}
        return {"cost": 0.25 * self.time} if self.time else {}


class Lonely(Stroll):
    """One of its kind in a process."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012


gym.register("SafeshieldTest/Stroll-v0", entry_point=lambda **kwargs: Stroll(**kwargs))
gym.register("SafeshieldTest/Lonely-v0", entry_point=lambda **kwargs: Lonely(**kwargs))


def test_the_recorder_writes_what_the_plain_loop_sees() -> None:
    rng = np.random.default_rng(0)
    proposals = rng.normal(0.0, 2.0, (60, 3, 1)).astype(np.float32)
    venv = DummyVecEnv([Stroll] * 3)
    recorder = EpisodeRecorder(
        venv, flat_observations(venv.observation_space), flat_actions(venv.action_space)
    )
    recorder.seed(5)
    recorder.reset()
    envs = [Stroll() for _ in range(3)]
    states = [env.reset(seed=5 + i)[0] for i, env in enumerate(envs)]
    steps: list[list[tuple[Any, ...]]] = [[], [], []]
    expected = []
    for row in proposals:
        actions = np.clip(row, -1.0, 1.0)
        recorder.step_async(actions)
        recorder.step_wait()
        for i, env in enumerate(envs):
            reached, reward, terminated, truncated, info = env.step(actions[i])
            steps[i].append(
                (states[i], actions[i], reward, reached, terminated, truncated, info["cost"])
            )
            states[i] = reached
            if terminated or truncated:
                expected.append(steps[i])
                steps[i], (states[i], _) = [], env.reset()
    assert recorder.lengths.tolist() == [len(one) for one in steps]
    episodes = recorder.take()
    assert recorder.take() == []
    assert len(episodes) == len(expected) > 20
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated",
             "costs")  # fmt: skip
    for mine, theirs in zip(episodes, expected, strict=True):
        for name, column in zip(names, zip(*theirs, strict=True), strict=True):
            written = getattr(mine, name)
            np.testing.assert_array_equal(written, np.array(column, written.dtype), name)


def test_the_learner_is_told_the_price_and_the_log_is_not() -> None:
    venv = DummyVecEnv([Stroll] * 2)
    recorder = EpisodeRecorder(
        venv, flat_observations(venv.observation_space), flat_actions(venv.action_space)
    )
    priced = PricedReward(recorder, 3.0)
    priced.seed(1)
    priced.reset()
    told = []
    for _ in range(30):
        priced.step_async(np.full((2, 1), 0.5, np.float32))
        _, rewards, _, _ = priced.step_wait()
        told.append((rewards.copy(), recorder.costs.copy()))
    episode = next(one for one in recorder.take() if len(one) > 3)
    assert episode.costs is not None
    np.testing.assert_allclose(np.diff(episode.rewards), 0.5, atol=1e-6)
    expected = (episode.rewards - 3.0 * episode.costs) / 4.0
    columns = [np.array([rewards[i] for rewards, _ in told]) for i in range(2)]
    windows = [
        column[start : start + len(episode)] for column in columns for start in range(len(column))
    ]
    assert any(len(w) == len(expected) and np.allclose(w, expected, atol=1e-6) for w in windows)


def test_every_step_of_the_learners_is_there_whole(finished: tuple[OfflineDataset, Path]) -> None:
    log, _ = finished
    assert log.provenance is not None
    learners = log.provenance["learners"]
    assert [one["steps"] for one in learners] == [STEPS, STEPS]
    # Every episode was played to its end; the last ones of a segment beyond its steps.
    assert set(log.episode_lengths.tolist()) == {EPISODE}
    assert log.num_episodes == sum(one["episodes"] for one in learners)
    assert len(log) >= len(LIMITS) * STEPS
    assert len(log) <= len(LIMITS) * (STEPS + 3 * SMALL.num_envs * EPISODE)
    assert log.truncated.sum() == log.num_episodes
    inside = ~log.truncated[:-1]
    np.testing.assert_array_equal(log.next_observations[:-1][inside], log.observations[1:][inside])


def test_observations_actions_and_costs_are_those_of_the_environment(
    finished: tuple[OfflineDataset, Path],
) -> None:
    log, _ = finished
    # The pendulum's own equation holds between what is logged: so the action is the executed one.
    assert np.abs(log.actions).max() == 2.0
    speed = log.observations[:, 2] + 0.05 * (
        15.0 * log.observations[:, 1] + 3.0 * log.actions[:, 0]
    )
    np.testing.assert_allclose(log.next_observations[:, 2], np.clip(speed, -8, 8), atol=1e-4)
    after = [over_the_limit(one) for one in log.next_observations]
    np.testing.assert_allclose(log.next_constraints, after, atol=1e-6)
    np.testing.assert_array_equal(log.costs, log.next_constraints > 0)


def test_learners_start_apart_and_change(finished: tuple[OfflineDataset, Path]) -> None:
    _, folder = finished
    actions = [
        OfflineDataset.load(segment_file(folder / f"learner-0{i}", segment)).actions[:64]
        for i in range(2)
        for segment in range(3)
    ]
    for i, one in enumerate(actions):
        assert not any(np.array_equal(one, other) for other in actions[i + 1 :])


def test_prices_follow_the_limits(tmp_path: Path) -> None:
    log = run_learners(tmp_path / "parts", limits=(None, 0.0, 1000.0), steps=128)
    assert log.provenance is not None
    prices = [one["price"] for one in log.provenance["learners"]]
    assert prices[0] is None
    # The pendulum always swings faster than the limit somewhere, and never 1000 steps long.
    assert prices[1] == pytest.approx(math.exp(2 * SMALL.multiplier_rate))
    assert prices[2] < 1.0


def test_the_price_is_learned_from(tmp_path: Path) -> None:
    """Seen by its effect: with a price the same seed learns something else, without it not."""
    free = run_learners(tmp_path / "a", limits=(None,))
    priced = run_learners(tmp_path / "b", limits=(0.0,))
    start = SMALL.rollout // EPISODE // 2 * EPISODE
    np.testing.assert_array_equal(free.actions[:start], priced.actions[:start])
    assert not np.array_equal(free.actions, priced.actions)


@pytest.mark.parametrize("form", ["dict", "discrete"])
def test_other_spaces(tmp_path: Path, form: str) -> None:
    env = gym.make("SafeshieldTest/Stroll-v0", form=form)
    log = collect_while_learning(
        env, tmp_path / "parts", limits=(0.0,), steps=128, config=SMALL, thinning=Thinning(cap=2)
    )
    assert log.observation_space == env.observation_space
    assert log.action_space == env.action_space
    assert log.terminated.any()
    assert log.truncated.any()
    assert set(np.diff(log.costs)) >= {0.25}


def test_one_environment_that_cannot_be_copied(tmp_path: Path) -> None:
    one = dataclasses.replace(SMALL, num_envs=1)
    log = collect_while_learning(Stroll(), tmp_path / "a", limits=(5.0,), steps=64, config=one)
    assert len(log) >= 64
    with pytest.raises(ValueError, match=r"num_envs must be 1 .*cannot rebuild .*--set num_envs=1"):
        collect_while_learning(Stroll(), tmp_path / "b", limits=(5.0,), steps=64, config=SMALL)


def test_where_a_process_can_hold_one_it_is_stepped_alone(tmp_path: Path) -> None:
    env = gym.make("SafeshieldTest/Lonely-v0")
    alone = config_for(env)
    assert (alone.num_envs, alone.rollout) == (1, LearnerConfig().rollout)
    assert config_for(gym.make("SafeshieldTest/Stroll-v0")) == LearnerConfig()
    out = tmp_path / "log.hdf5"
    sizes = ("--set", "rollout_steps=64", "--set", "batch_size=64", "--set", "epochs=1")
    command = (
        "collect",
        "SafeshieldTest/Lonely-v0",
        out,
        "--limits",
        "none",
        "--steps",
        64,
        *sizes,
    )
    refused = run(*command, "--set", "num_envs=2", code=2)
    assert "num_envs must be 1" in refused
    assert "of which a process can hold one only; got 2" in refused
    assert "--set num_envs=1" in refused
    assert "cannot rebuild" not in refused
    run(*command)
    made = json.loads(run("inspect", out, "--json"))["provenance"]
    assert made["settings"]["num_envs"] == 1
    assert made["learners"][0]["steps"] == 64


def test_a_reward_that_is_no_number_is_not_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it learns")

    monkeypatch.setattr(PPO, "train", never)
    env = gym.make("SafeshieldTest/Stroll-v0", tells="nan reward")
    message = r"the reward of a step must be a finite number, got nan at step 2 of "
    with pytest.raises(ValueError, match=message + "an episode of environment [01]"):
        collect_while_learning(env, tmp_path / "parts", limits=(1.0,), steps=64, config=SMALL)
    with pytest.raises(ValueError, match=message + r"the episode that was reset with seed \d+"):
        collect(env, "random", episodes=8, seed=0)


def test_actions_without_bounds_are_refused_in_one_line(tmp_path: Path) -> None:
    env = gym.make("SafeshieldTest/Stroll-v0", bound=np.inf)
    with pytest.raises(ValueError, match=r"must be bounded, because PPO .* got Box\(-inf"):
        collect_while_learning(env, tmp_path / "parts", limits=(1.0,), steps=64, config=SMALL)
    assert not (tmp_path / "parts").exists()


def test_two_runs_at_once_are_told_of_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    with locked(folder), pytest.raises(ValueError, match="is being used by another run"):
        run_learners(folder, limits=(None,), steps=64)
    # Free again, and an empty lock file is nobody's run.
    run_learners(folder, limits=(None,), steps=64)
    code = (
        "import sys, time, pathlib\n"
        "from safeshield.files.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "held"
    with pytest.raises(ValueError, match="is being used by another run"):
        run_learners(folder, limits=(None,), steps=64)
    other.kill()
    other.communicate()
    run_learners(folder, limits=(None,), steps=64)


# Going on after an interruption.


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["in a rollout", "before the state", "while finishing"])
def test_an_interrupted_run_ends_in_the_same_log(
    finished: tuple[OfflineDataset, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    owner, name, calls = {
        "in a rollout": (EpisodeRecorder, "step_wait", 200),
        "before the state": (learner_module, "write_state", 2),
        "while finishing": (learner_module, "_finish_episodes", 4),
    }[where]
    original, left = getattr(owner, name), [calls]

    def stopping(*arguments: Any, **rest: Any) -> Any:  # noqa: ANN401
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted
        return original(*arguments, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(Interrupted):
            run_learners(tmp_path / "parts")
    states = list((tmp_path / "parts").glob(f"*/{STATE}"))
    assert states, "it was stopped before there was anything to go on from"
    assert_same(run_learners(tmp_path / "parts"), finished[0])


def test_a_state_is_restored_whole(tmp_path: Path) -> None:
    """Every segment begins from a file, so nothing but this would show what the file lacks."""

    def learner(seed: int) -> tuple[PPO, VecNormalize]:
        stack = VecNormalize(DummyVecEnv([pendulum] * 2))
        sizes: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2}
        return PPO("MlpPolicy", stack, seed=seed, device="cpu", **sizes), stack

    trained, seen = learner(0)
    trained.learn(128)
    nothing = np.zeros(0, np.float32)
    progress = Progress(2, 1, 0.1 + 0.2, nothing, nothing)
    write_state(tmp_path / STATE, trained, seen, progress)
    fresh, unseen = learner(1)
    restore(tmp_path / STATE, fresh, unseen)
    pairs = zip(fresh.policy.named_parameters(), trained.policy.named_parameters(), strict=True)
    for (name, mine), (_, theirs) in pairs:
        assert torch.equal(mine, theirs), name
        kept, meant = fresh.policy.optimizer.state[mine], trained.policy.optimizer.state[theirs]
        assert set(kept) == set(meant) >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(kept[key], meant[key]) for key in kept), name
    for mine, theirs in ((unseen.obs_rms, seen.obs_rms), (unseen.ret_rms, seen.ret_rms)):
        np.testing.assert_array_equal(mine.mean, theirs.mean)
        np.testing.assert_array_equal(mine.var, theirs.var)
        assert mine.count == theirs.count
    # And so the next update is the same too.
    for model in (trained, fresh):
        model.set_random_seed(7)
        model.set_env(model.env, force_reset=True)
        model.learn(64)
    for name, tensor in fresh.policy.state_dict().items():
        assert torch.equal(tensor, trained.policy.state_dict()[name]), name
    assert read_progress(tmp_path / "nowhere").updates == 0
    segment_file(tmp_path, 0).touch()
    assert read_progress(tmp_path).price == 0.1 + 0.2


def test_more_steps_go_on_with_the_same_learners(
    finished: tuple[OfflineDataset, Path], tmp_path: Path
) -> None:
    short = run_learners(tmp_path / "parts", steps=256)
    written = {path: path.read_bytes() for path in tmp_path.rglob("segment-*.hdf5")}
    assert len(written) == 4
    assert_same(run_learners(tmp_path / "parts"), finished[0])
    assert all(path.read_bytes() == content for path, content in written.items())
    assert len(short) < len(finished[0])
    # Asked for fewer than there are, it has more to give.
    assert_same(run_learners(tmp_path / "parts", steps=64), finished[0])


def test_another_thinning_learns_nothing(
    finished: tuple[OfflineDataset, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, folder = finished

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it learns")

    monkeypatch.setattr(PPO, "learn", never)
    thin = Thinning(episodes=12, bins=4)
    few = run_learners(folder, thinning=thin)
    assert few.num_episodes == 12
    expected = log.select(thin.keep(log.returns.astype("f4"), log.episode_costs.astype("f4")))
    assert_same(dataclasses.replace(few, provenance=None),
                dataclasses.replace(expected, provenance=None))  # fmt: skip
    assert few.provenance is not None
    assert sum(one["kept"] for one in few.provenance["learners"]) == 12
    assert few.provenance["thinning"] == dataclasses.asdict(thin)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"limits": (None, 3.0)},
        {"config": dataclasses.replace(SMALL, hidden=(9,))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_folder_belongs_to_one_run(
    finished: tuple[OfflineDataset, Path], change: dict[str, Any]
) -> None:
    _, folder = finished
    with pytest.raises(ValueError, match=f"is of another run .*{next(iter(change))}"):
        run_learners(folder, **change)


def test_folders_are_checked(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ValueError, match="new or empty folder"):
        run_learners(tmp_path / "full")
    folder = tmp_path / "parts"
    run_learners(folder, limits=(None,), steps=128)
    state = folder / "learner-00" / STATE
    whole = state.read_bytes()
    state.write_bytes(whole[:-9])
    way_out = r"delete the folder .*learner-00 to let this learner begin again"
    with pytest.raises(ValueError, match=f"truncated.*{way_out}"):
        run_learners(folder, limits=(None,))
    state.write_bytes(whole)
    segment = segment_file(folder / "learner-00", 0)
    episodes = segment.read_bytes()
    segment.write_bytes(episodes[: len(episodes) // 2])
    with pytest.raises(ValueError, match=f"damaged.*{way_out}"):
        run_learners(folder, limits=(None,))
    segment.unlink()
    with pytest.raises(ValueError, match=r"is missing, but .* continues from it"):
        run_learners(folder, limits=(None,))


def test_a_plan_that_came_to_nothing_can_be_changed(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    for tells in ("nothing", "no end"):
        env = gym.make("SafeshieldTest/Stroll-v0", tells=tells)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner_module, "_STEP_LIMIT", 50)
            message = "must report info" if tells == "nothing" else "TimeLimit"
            with pytest.raises(ValueError, match=message):
                collect_while_learning(env, folder, limits=(1.0,), steps=64, config=SMALL)
    run_learners(folder, limits=(None,), steps=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"limits": ()}, "limits must name at least one"),
        ({"limits": (-1.0,)}, "a cost limit must be finite and at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run_learners(tmp_path / "parts", **change)
    assert not (tmp_path / "parts").exists()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size must divide"):
        LearnerConfig(batch_size=300)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        LearnerConfig(epochs=0)
    with pytest.raises(TypeError, match=r"num_envs must be a whole number, got 1.5"):
        LearnerConfig(num_envs=1.5)  # type: ignore[arg-type]


# The header, and the command.


def test_a_log_remembers_how_it_was_made(
    finished: tuple[OfflineDataset, Path], tmp_path: Path
) -> None:
    log, _ = finished
    log.save(tmp_path / "log.hdf5")
    loaded = OfflineDataset.load(tmp_path / "log.hdf5")
    assert loaded.provenance == json.loads(json.dumps(log.provenance))
    assert log.episodes[0].provenance == log.split(0.5, 0)[1].provenance == log.provenance
    assert OfflineDataset.concat([log, log]).provenance == log.provenance
    other = dataclasses.replace(log, provenance=None)
    assert OfflineDataset.concat([other, other]).provenance is None
    assert OfflineDataset.concat([log, other]).provenance == {
        "parts": [{"transitions": len(log), **log.provenance}, {"transitions": len(log)}]
    }
    other.save(tmp_path / "plain.npz")
    assert OfflineDataset.load(tmp_path / "plain.npz").provenance is None


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_the_command_logs_learners_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "log.hdf5"
    command = ("collect", "safeshield/Boat-v0", out, "--limits", "none,5", "--steps", 800,
               "--seed", 2, "--bins", 5, "--set", "num_envs=2", "--set", "rollout_steps=400",
               "--set", "batch_size=100", "--set", "hidden=8")  # fmt: skip
    run(*command, "--episodes", 3)
    data = json.loads(run("inspect", out, "--json"))
    made = data["provenance"]
    assert (data["episodes"], made["seed"], made["environment"]) == (3, 2, "safeshield/Boat-v0")
    assert [one["limit"] for one in made["learners"]] == [None, 5.0]
    assert made["settings"]["hidden"] == [8]
    assert made["thinning"] == {"episodes": 3, "cap": None, "bins": 5, "seed": 2}
    assert made["versions"][0]["stable-baselines3"]
    text = run("inspect", out)
    assert "limit None, steps 800, episodes 2" in text
    assert "limit 5, steps 800" in text
    # The learners are there still: more of their episodes, at once.
    told = run(*command, "--episodes", 500)
    assert json.loads(run("inspect", out, "--json"))["episodes"] == 4
    assert "4 episodes, fewer than --episodes 500: the learners finished 4; raise --steps" in told
    capped = run(*command, "--cap", 1, "--bins", 1)
    assert "the learners finished 4; raise --steps, or --cap, which keeps at most 1 in" in capped
    assert "steps before" not in capped
    run(*command[:5], "--steps", 1600, *command[7:])
    fewer = run(*command)
    assert "had done up to 1600 steps before, and the log is of all of them" in fewer


def test_the_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learner_module.Learner, "_segment", stopped)
    command = ("collect", "safeshield/Boat-v0", tmp_path / "log.hdf5", "--limits", "none")
    assert "the same command resumes" in run(*command, code=130)
    assert not (tmp_path / "log.hdf5").exists()


def test_the_command_still_logs_policies_and_says_which(tmp_path: Path) -> None:
    out = tmp_path / "log.hdf5"
    run("collect", "safeshield/Boat-v0", out, "--policy", "helmsmen", "--episodes", 2, "--seed", 7)
    made = json.loads(run("inspect", out, "--json"))["provenance"]
    assert (made["collected_by"], made["seed"]) == ("helmsmen", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "10"), "add --limits"),
        (("--set", "hidden=8"), "add --limits"),
        (("--limits", "none", "--policy", "random"), "leave one out"),
        (("--limits", "few"), "must be a number"),
        (("--limits", "none", "--set", "width=8"), "no such setting; known: num_envs"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    output = run("collect", "safeshield/Boat-v0", tmp_path / "a.hdf5", *arguments, code=2)
    assert message in output


def test_episodes_of_no_run_are_no_log() -> None:
    with pytest.raises(ValueError, match="at least one episode"):
        log_of([], gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(0, 1, (1,)))
