"""A measured margin: its definition, its theorem, its coverage, and the agents that use it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from test_safefql import STEPS, TINY, assert_same, tiny

from safeshield import SafeFQL, fit_many
from safeshield.algorithms.fisor import FISOR
from safeshield.algorithms.flrp import FLRP, FLRPConfig
from safeshield.algorithms.r2pac.config import R2PACConfig
from safeshield.algorithms.safefql import SafeFQLRun
from safeshield.calibration.margin import conformal_margin, missed_levels
from safeshield.data import OfflineDataset, collect
from safeshield.training.config import LEAST_MARGIN
from safeshield.training.critics import measured_margin
from safeshield.training.log import LogTensors

Array = npt.NDArray[np.float64]


def misses(values: Array, after: Array, action_values: Array, level: float) -> bool:
    """Return whether one episode misses a level, by the definition."""
    for first in np.flatnonzero(action_values <= -level):
        for end in range(first + 1, len(values) + 1):
            between = values[first + 1 : end]
            if not ((between > -level) & (between <= 0.0)).all():
                break
            if (after[first:end] - action_values[first:end]).sum() > level:
                return True
    return False


def walk(rng: np.random.Generator, steps: int = 30) -> tuple[Array, Array, Array]:
    """Return V_h before and after each step, and Q_h, of an episode that drifts to and fro."""
    states = -1.0 + 0.3 * rng.standard_normal(steps + 1).cumsum()
    return states[:-1], states[1:], states[1:] - 0.3 * rng.standard_normal(steps)


def test_a_score_is_the_largest_level_that_the_episode_misses() -> None:
    rng = np.random.default_rng(0)
    episodes = [walk(rng, int(rng.integers(1, 30))) for _ in range(40)]
    episodes += [walk(rng, 1) for _ in range(10)]
    starts = np.cumsum([0, *(len(one[0]) for one in episodes[:-1])])
    columns = (np.concatenate(part) for part in zip(*episodes, strict=True))
    scores = missed_levels(*columns, starts)
    assert (scores > 0).sum() > 20
    assert (scores == 0).any()
    levels = np.linspace(0.001, 3.0, 400)
    for score, episode in zip(scores, episodes, strict=True):
        missed = np.array([misses(*episode, level) for level in levels])
        assert not missed[levels > score + 1e-9].any()
        # A score is the end of an interval of missed levels, which a level just below it is in.
        assert score == 0.0 or misses(*episode, score - 1e-6)


def test_behind_a_gate_an_episode_becomes_unsafe_only_where_it_misses_the_level() -> None:
    rng, level, unsafe = np.random.default_rng(1), 0.6, 0
    for _ in range(300):
        values, after, action_values = [], [], []
        value = -1.0
        for _ in range(40):
            # Four actions; an accepted one where there is one, else one with Q_h <= V_h.
            offered = value + np.array([-0.1, 0.1, 0.3, 0.5]) * rng.random(4)
            accepted = offered[offered <= -level]
            chosen = rng.choice(accepted) if len(accepted) else offered.min()
            values.append(value)
            action_values.append(chosen)
            value = chosen + 0.15 * rng.standard_normal()
            after.append(value)
            if value > 0:
                break
        columns = (np.array(x) for x in (values, after, action_values))
        score = missed_levels(*columns, np.array([0]))[0]
        unsafe += value > 0
        assert value <= 0 or score >= level
    assert 10 < unsafe < 290


def test_a_new_episode_misses_the_margin_with_at_most_the_probability_alpha() -> None:
    rng, alpha, repeats = np.random.default_rng(2), 0.2, 400

    def scores(count: int) -> Array:
        walks = [walk(rng) for _ in range(count)]
        columns = (np.concatenate(part) for part in zip(*walks, strict=True))
        return missed_levels(*columns, 30 * np.arange(count))

    missed = 0
    for _ in range(repeats):
        drawn = scores(20)
        missed += drawn[0] > conformal_margin(drawn[1:], alpha)
    # The rank of one of 20 exchangeable scores is uniform, and 4 of 20 lie above the margin.
    assert missed / repeats == pytest.approx(alpha, abs=4 * np.sqrt(alpha * (1 - alpha) / repeats))
    # One residual at a time says nothing of their sums: such a margin is missed more often.
    alone = np.concatenate([walk(rng)[1] - walk(rng)[2] for _ in range(100)])
    assert np.quantile(alone, 1 - alpha) < conformal_margin(scores(100), alpha)


def test_too_few_episodes_are_named() -> None:
    with pytest.raises(ValueError, match="at least 9 are needed"):
        conformal_margin(np.zeros(8))


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=0)


@pytest.fixture(scope="module")
def agent(log: OfflineDataset) -> SafeFQL:
    return tiny(margin="auto").fit(log, steps=STEPS)


def test_an_agent_measures_its_margin_once_its_critics_are_trained(
    agent: SafeFQL, log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = agent._fitted()
    tensors = LogTensors.of(log, model.scaling, agent.device)
    measured = measured_margin(model.critics.safety, agent._networks, tensors)
    least = dataclasses.replace(TINY, margin=LEAST_MARGIN).margin_of(model.critics.safety)
    assert agent.gate == np.float32(measured) > least
    # The losses of teacher and student have it, those of the critics the default margin.
    seen: dict[str, set[float]] = {}
    real = SafeFQLRun._student

    def student(self: SafeFQLRun, state: Any, draw: Any) -> Any:  # noqa: ANN401
        seen.setdefault("student", set()).add(float(self._critics.gate(state)))
        return real(self, state, draw)

    monkeypatch.setattr(SafeFQLRun, "_student", student)
    tiny(margin="auto").fit(log, steps=STEPS)
    assert seen["student"] == {np.float32(measured)}


def test_the_measured_margin_is_the_gate_of_the_actor(agent: SafeFQL, log: OfflineDataset) -> None:
    number = agent.with_margin(agent.gate / agent._fitted().critics.safety.scale.spread)
    assert number.gate == pytest.approx(agent.gate)
    rows = log.observations[:50]
    acted = [one.predict(rows, deterministic=True)[0] for one in (agent._changed(), number)]
    np.testing.assert_array_equal(acted[0], acted[1])
    loose = agent.with_margin(0.0)
    assert not np.array_equal(acted[0], loose.predict(rows, deterministic=True)[0])


def test_the_critics_do_not_depend_on_how_the_margin_is_set(
    agent: SafeFQL, log: OfflineDataset
) -> None:
    plain = tiny().fit(log, steps=STEPS)
    for name in plain._fitted().slow():
        for key, array in plain._arrays[name].items():
            np.testing.assert_array_equal(array, agent._arrays[name][key])
    differ = [not np.array_equal(a, agent._arrays["student"][k])
              for k, a in plain._arrays["student"].items()]  # fmt: skip
    assert any(differ)


def test_a_run_in_instalments_keeps_its_margin(
    agent: SafeFQL, log: OfflineDataset, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    for stop in (7, 30, 35, 43):
        tiny(margin="auto").fit(log, steps=STEPS, checkpoint=file, stop_after=stop)
    resumed = tiny(margin="auto").fit(log, steps=STEPS, checkpoint=file)
    assert_same(agent, resumed)
    assert resumed.gate == agent.gate


def test_agents_that_are_trained_together_have_margins_of_their_own(
    agent: SafeFQL, log: OfflineDataset
) -> None:
    members = fit_many([tiny(margin="auto"), tiny(margin="auto", seed=1)], log, STEPS)
    assert members[0].gate == pytest.approx(agent.gate, rel=1e-3)
    assert members[1].gate != pytest.approx(agent.gate, rel=1e-3)


def test_the_margin_is_in_the_file(agent: SafeFQL, tmp_path: Path) -> None:
    agent.save(tmp_path / "agent.safetensors")
    back = SafeFQL.load(tmp_path / "agent.safetensors", device="cpu")
    assert back.config.margin == "auto"
    assert back.gate == agent.gate


@pytest.mark.parametrize(("kind", "more", "network"), [
    (FISOR, {}, "actor"), (FLRP, {"transforms": 2}, "safety_expert"),
])  # fmt: skip
def test_other_actors_learn_with_the_measured_margin(
    log: OfflineDataset, kind: type[Any], more: dict[str, Any], network: str
) -> None:
    settings = {"critic_hidden": (8,), "flow_hidden": (8,), "batch_size": 16, **more}
    auto, plain = (
        kind(kind.config_type(**settings, margin=margin), device="cpu").fit(log, steps=STEPS)
        for margin in ("auto", LEAST_MARGIN)
    )
    margins = [one.config.margin_of(one._fitted().critics.safety) for one in (auto, plain)]
    assert margins[0] == auto.measured_margin > margins[1]
    assert plain.measured_margin is None
    for name in plain._fitted().slow():
        for key, array in plain._arrays[name].items():
            np.testing.assert_array_equal(array, auto._arrays[name][key])
    assert any(
        not np.array_equal(array, plain._arrays[network][key])
        for key, array in auto._arrays[network].items()
    )


def test_where_a_margin_cannot_be_measured_is_named(log: OfflineDataset) -> None:
    with pytest.raises(ValueError, match="phases='joint' trains them up to the end"):
        dataclasses.replace(TINY, margin="auto", phases="joint")
    with pytest.raises(ValueError, match="phases='joint' trains them up to the end"):
        FLRPConfig(margin="auto", phases="joint")
    FLRPConfig(margin="auto", phases="joint", feasibility="cost")  # it has no margin
    with pytest.raises(ValueError, match="margin must be a finite number, got 'auto'"):
        R2PACConfig(margin="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin must be at least 0, or 'auto', got -1"):
        dataclasses.replace(TINY, margin=-1.0)
    with pytest.raises(ValueError, match="margin must be at least 0, or 'auto', got 'measured'"):
        dataclasses.replace(TINY, margin="measured")
    few = collect(gym.make("safeshield/Boat-v0"), "random", episodes=5, seed=0)
    with pytest.warns(UserWarning, match="the log has 5 episodes, and a measured margin needs 9"):
        agent = tiny(margin="auto").fit(few, steps=STEPS)
    plain = tiny(margin=LEAST_MARGIN).fit(few, steps=STEPS)
    assert agent.gate == plain.gate
