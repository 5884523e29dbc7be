"""The fast step of one environment decides as the batch does; blocks find the nearest candidate."""

from __future__ import annotations

import pickle
import threading
import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from safeshield.nn.mlp import EnsembleMLP
from safeshield.shield import replacement
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.readable import ReadableRange
from safeshield.shield.replacement import CommittedFallback, NearestAcceptable, nearest_acceptable
from safeshield.shield.runtime import ShieldRuntime
from safeshield.shield.shield import Shield
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.values.constraint import ConstraintSource
from safeshield.values.units import SafetyScale

Array = np.ndarray[Any, np.dtype[Any]]
COUNT = 1_000
SPREAD = 1.0
BOX = spaces.Box(-np.inf, np.inf, (3,))
ACTIONS = spaces.Box(np.float32([-1, 0]), np.float32([1, 5]))
DICT = spaces.Dict({"at": spaces.Discrete(4), "speed": spaces.Box(-5.0, 5.0, (2,))})
TASKS = {
    "box": (BOX, ACTIONS),
    "float64": (BOX, spaces.Box(-1.0, 1.0, (2,), np.float64)),
    "discrete": (BOX, spaces.Discrete(5, start=-2)),
    "dict": (DICT, ACTIONS),
    "multi": (DICT, spaces.MultiDiscrete([2, 3])),
}


def speed(observations: Array) -> Array:
    """Return h of a batch, which is not known where the second entry is large."""
    rows = observations["speed"] if isinstance(observations, dict) else observations
    return np.where(rows[:, 1] > 2.0, np.nan, rows[:, 0] - 0.5)


def model(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    hidden: tuple[int, ...] = (16, 16),
    known: bool = False,
    seed: int = 0,
) -> SafetyModel:
    """Return a model with random networks."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    observations, actions = flat_observations(observation_space), flat_actions(action_space)
    rows = rng.standard_normal((100, observations.width)).astype(np.float32)
    scaling = Scaling.of_rows(rows, observations, actions)
    seen, acted = scaling.widths
    shapes = {
        "constraint": EnsembleMLP(seen, 1, hidden),
        "excess": EnsembleMLP(seen, 1, hidden),
        "advantage": EnsembleMLP(seen + acted, 1, hidden, members=2),
    }
    if not actions.discrete:
        shapes["student"] = EnsembleMLP(seen + acted, acted, hidden)
    networks = {
        name: {key: 3.0 * tensor.numpy() for key, tensor in network.init(generator).items()}
        for name, network in shapes.items()
    }
    source = ConstraintSource("test-fast@1", speed) if known else None
    scale = SafetyScale(-0.1, SPREAD, 0.5)
    return SafetyModel.of_networks(
        observation_space, action_space, scaling, scale, networks, constraint=source
    )


def draws(filtering: Shield, count: int) -> tuple[Array, Array]:
    """Return rows of observations and of actions: usual ones, and every kind of broken ones."""
    rng = np.random.default_rng(1)
    states = filtering.model.observation_codec
    rows = rng.normal(0.0, 1.5, (count, states.width)).astype(np.float32)
    whole = np.flatnonzero(states.categories)
    rows[:, whole] = rng.integers(0, 4, (count, len(whole)))
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 1e7, 3e38, -1e9, 0.5)):
        rows[i::97, rng.integers(states.width)] = bad
    played = filtering.model.action_codec
    if played.discrete:
        high = played.high + 2
        actions = rng.integers(played.low.astype(int), high.astype(int), (count, played.width))
        return rows, actions
    middle, half = (played.low + played.high) / 2, (played.high - played.low) / 2
    actions = (middle + 1.1 * half * rng.uniform(-1, 1, (count, played.width))).astype(np.float32)
    for i, bad in enumerate((np.nan, np.inf, -np.inf)):
        actions[i::53, rng.integers(played.width)] = bad
    actions[5::31] = played.high
    return rows, actions.astype(played.space.dtype)


def points(space: gym.Space[Any], rows: Array) -> list[Any]:
    """Return observations, one for each row, as an environment returns them."""
    if isinstance(space, spaces.Dict):
        return [{"at": row[0], "speed": row[1:]} for row in rows]
    return list(rows)


@pytest.mark.parametrize("hidden", [(16, 16), (8,), (8, 8, 8)])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("task", list(TASKS))
def test_the_fast_step_decides_as_the_batch_does(
    task: str, known: bool, hidden: tuple[int, ...]
) -> None:
    count = COUNT if hidden == (16, 16) else COUNT // 10
    strategy = CommittedFallback() if task == "dict" else NearestAcceptable()
    made = model(*TASKS[task], hidden, known)
    filtering = Shield(made, 0.05, replacement=strategy)
    rows, actions = draws(filtering, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Both verdicts are met, because the estimate of h is moved until half of the actions pass.
        values = filtering.row_values(rows, actions)
        middle = float(np.median(values[np.isfinite(values)]))
        scale = replace(made.scale, offset=made.scale.offset - middle - 0.05)
        filtering = replace(filtering, model=replace(made, scale=scale))
        executed, report = filtering.filter_rows(filtering.states(rows), rows, actions)
        runtime = ShieldRuntime(filtering)
        reached, decisions = [], []
        played = filtering.points(actions)
        for point, action in zip(points(TASKS[task][0], rows), played, strict=True):
            reached.append(runtime.observe(point, ({},)))
            decisions.append(runtime.filter(action))
    assert 0.02 < report.intervened.mean() < 0.98, "the test must meet both verdicts"
    assert not report.valid.all()
    np.testing.assert_allclose(reached, report.state_value, rtol=1e-5, atol=1e-5)
    intervened = np.array([decision.intervened for decision in decisions])
    near = np.abs(report.proposed_value - filtering.threshold) <= 1e-5 * SPREAD
    assert (intervened == report.intervened)[~near].all()
    same = intervened == report.intervened
    got = np.stack([np.asarray(decision.executed).reshape(-1) for decision in decisions])
    kept = same & ~intervened
    assert np.array_equal(got[kept], actions[kept]), "an accepted action is executed bit for bit"
    told = np.array([decision.value for decision in decisions])
    np.testing.assert_allclose(told[kept], report.value[kept], rtol=1e-5, atol=1e-5)
    # Another candidate may be the nearest only where its Q_h is within rounding of the threshold.
    other = same & intervened & ~np.isclose(got, executed, rtol=1e-5, atol=1e-5).all(axis=1)
    assert other.mean() <= 1e-3


def test_a_state_keeps_its_result_while_others_are_judged() -> None:
    made = model(*TASKS["box"])
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 1, 3)).astype(np.float32)
    actions = rng.uniform(0, 1, (20, 2)).astype(np.float32)
    expected = [
        made.action_value(made.states(row), action)
        for row, action in zip(rows, actions, strict=True)
    ]
    states = [made.states(row) for row in rows]
    for _ in range(2):
        found = [made.action_value(s, action) for s, action in zip(states, actions, strict=True)]
        assert found == expected
    wrong: list[int] = []

    def judge() -> None:
        for _ in range(50):
            again = [
                made.action_value(made.states(r), a) for r, a in zip(rows, actions, strict=True)
            ]
            wrong.extend([1] if again != expected else [])

    threads = [threading.Thread(target=judge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_and_replaced_networks_are_arranged_anew() -> None:
    made, other = model(*TASKS["box"]), model(*TASKS["box"], seed=1)
    size = len(pickle.dumps(made))
    row, action = np.ones((1, 3), np.float32), np.array([0.5, 2.0], np.float32)
    value = made.action_value(made.states(row), action)
    assert len(pickle.dumps(made)) < size + 200, "arranged weights must not be pickled"
    again = pickle.loads(pickle.dumps(made))
    assert again.action_value(again.states(row), action) == value
    swapped = replace(made, networks=other.networks)
    swapped_value = swapped.action_value(swapped.states(row), action)
    mixed = replace(other, scaling=made.scaling)
    assert swapped_value == mixed.action_value(mixed.states(row), action)
    assert swapped_value != value


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_that_is_nan_makes_the_value_nan(member: int) -> None:
    made = model(*TASKS["box"])
    broken = {key: array.copy() for key, array in made.networks["advantage"].items()}
    broken["2.bias"][member] = np.nan
    made = replace(made, networks={**made.networks, "advantage": broken})
    states, action = made.states(np.zeros((1, 3), np.float32)), np.array([0.0, 1.0], np.float32)
    assert np.isnan(made.action_value(states, action))
    assert Shield(made).accepts(states, action) is None


@pytest.mark.parametrize("bad", [0.0, 3e5, 9.9e5, 1.01e6, 3e38, np.inf, -np.inf, np.nan])
def test_a_single_row_is_readable_where_its_entries_are(bad: float) -> None:
    made = model(*TASKS["box"])
    tested = ReadableRange(made.observation_codec, made.scaling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for column in range(3):
            row = np.zeros((1, 3), np.float32)
            row[0, column] = bad
            assert tested.rows(row).tolist() == [bool(tested.entries(row).all())]


class Table:
    """A stand-in for a model whose members' values are rounded, so that many are equal."""

    def __init__(self, members: int, broken: float) -> None:
        self.members, self.broken = members, broken
        self.judged = 0

    def scaled_values(
        self, states: StateValue, candidates: Array, members: slice = slice(None)
    ) -> Array:
        """Return a function of state, candidate and member."""
        self.judged += candidates.shape[0] * candidates.shape[1]
        which = np.arange(self.members)[members][:, None, None]
        at = states.inputs[:, :1] * 37.0
        raw = np.sin(at + candidates @ [11.0, 7.0] + which) * (1 + which)
        raw = np.where(np.sin(5.0 * raw + at) > self.broken, np.nan, raw)
        return raw.round(1).max(axis=0).astype(np.float32)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("broken", [0.9, 2.0, -2.0], ids=["some NaN", "no NaN", "all NaN"])
def test_the_nearest_by_blocks_is_the_nearest_of_all_at_once(
    members: int, broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "_AT_ONCE", 0)
    rng = np.random.default_rng(members)
    none = 0
    for total in (1, 2, 3, 7, 64, 65, 200):
        count = 300
        # A coarse grid: many candidates are equal, and many others equally far.
        scaled = rng.integers(-3, 4, (count, total, 2)).astype(np.float32) / 4
        limit = rng.choice([-2.5, -1.0, -0.5, 0.0], count)
        states = StateValue(np.arange(count, dtype=np.float32)[:, None], np.zeros(count, "f4"))
        table: Any = Table(members, broken)
        rejected = replacement.Rejected(
            table, states, scaled, scaled, limit > 0, limit > 0, limit, limit, limit
        )
        values = table.scaled_values(states, scaled)
        values = np.where(np.isnan(values), np.float32(np.inf), values)
        found = replacement._values_until_acceptable(rejected, scaled)
        best = nearest_acceptable(scaled, values, limit)
        assert np.array_equal(nearest_acceptable(scaled, found, limit), best)
        each = np.arange(count)
        assert np.array_equal(found[each, best], values[each, best])
        none += (~(values <= limit[:, None]).any(axis=1)).sum()
    assert none, "some states must have no acceptable candidate"


def test_blocks_judge_few_candidates_where_a_near_one_is_acceptable() -> None:
    count, total = 100, 65
    scaled = np.random.default_rng(0).uniform(-1, 1, (count, total, 2)).astype(np.float32)
    states = StateValue(np.arange(count, dtype=np.float32)[:, None], np.zeros(count, "f4"))
    table: Any = Table(2, 2.0)
    limit = np.full(count, 3.0)
    rejected = replacement.Rejected(
        table, states, scaled, scaled, limit > 0, limit > 0, limit, limit, limit
    )
    replacement._values_until_acceptable(rejected, scaled)
    assert table.judged <= 2 * replacement._BLOCK * count
