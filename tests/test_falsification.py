"""A search finds planted flaws, verifies on fresh seeds, and says what it does not show."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from faults import TASKS, Array, sound, with_record
from scipy import stats
from typer.testing import CliRunner

from safeshield.calibration.binomial import upper_bound
from safeshield.calibration.proposers import Adversary, policy_names
from safeshield.cli import app
from safeshield.cli.sources import name_of, short_name_of
from safeshield.evaluation import evaluate
from safeshield.evaluation.falsification import (
    NO_PROOF,
    Falsification,
    _Player,
    falsify,
    load_probe,
    rate_bounds,
)
from safeshield.evaluation.probes import (
    FORMAT,
    Probe,
    ProbingAgent,
    as_agent,
    starting_probes,
    weight_count,
)
from safeshield.rollouts.episodes import run_episodes
from safeshield.shield import Shield

pytestmark = pytest.mark.filterwarnings("ignore")
CART = TASKS["double integrator"]
RNG = np.random.default_rng


def cart() -> gym.Env[Any, Any]:
    """A short episode: a cart that cannot brake any more reaches the wall within 2.5 seconds."""
    return gym.make(CART.id, max_episode_steps=50)


@pytest.fixture(scope="module")
def thin() -> Shield:
    """A shield whose delta does not cover the errors of its values, with a record."""
    return with_record(sound("double integrator"), cart())


@pytest.fixture(scope="module")
def found(thin: Shield) -> Falsification:
    return falsify(thin, cart(), minutes=None, rollouts=200, episodes=100, seed=3)


def observations(count: int = 40) -> Array:
    return RNG(0).uniform(CART.low, CART.high, (count, 2)).astype(np.float32)


# -- the search --------------------------------------------------------------------------------


def test_a_planted_flaw_is_found_and_a_sound_shield_is_not_accused(
    thin: Shield, found: Falsification
) -> None:
    assert found.breaks
    assert found.rate > 0.2
    assert found.generations > 0
    good = with_record(sound("double integrator").with_delta(0.15), cart())
    quiet = falsify(good, cart(), minutes=None, rollouts=100, episodes=50, cma=False, seed=3)
    assert (quiet.violating, quiet.breaks, quiet.generations) == (0, False, 0)
    assert all(one.violating == 0 for one in quiet.families)


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_agent_is_chosen_where_the_budget_ends_early(thin: Shield, seed: int) -> None:
    # A cart has two directions to hold, so that a battery draws the same agent several times.
    search = falsify(thin, cart(), minutes=None, rollouts=100, episodes=8, cma=False, seed=seed)
    first, *others = search.families
    assert search.probe.family == first.family
    assert first.violating == first.episodes
    assert all(one.episodes <= 2 * first.episodes for one in others)


def test_a_search_in_episodes_depends_on_its_seed_alone(thin: Shield, found: Falsification) -> None:
    again = falsify(thin, cart(), minutes=None, rollouts=200, episodes=100, seed=3)
    assert replace(again, minutes=0, cpu_minutes=0) == replace(found, minutes=0, cpu_minutes=0)


def test_the_rate_is_that_of_the_saved_agent_in_other_episodes(
    thin: Shield, found: Falsification, tmp_path: Path
) -> None:
    found.save(tmp_path / "worst.json")
    agent = load_probe(tmp_path / "worst.json", thin)
    played = evaluate(cart(), agent, 100, seed=77, shield=thin, starts="certified")
    # The difference of two rates of 100 episodes has a standard deviation of at most 0.071.
    assert abs(played.violation_rate - found.rate) < 0.3


def test_search_and_verification_share_no_seed_and_start_certified(thin: Shield) -> None:
    player = _Player(thin, cart(), 5, None)
    search = list(itertools.islice(player._search, 300))
    verify = list(itertools.islice(player._verify, 300))
    assert not set(search) & set(verify)
    starts = [run.observations[0] for run in _short(thin, search[:50] + verify[:50])]
    assert (thin.row_values(np.stack(starts)) <= thin.threshold + 1e-5).all()
    assert 0 < player.start_share < 1


def test_the_objective_tells_apart_agents_whose_h_is_the_same(thin: Shield) -> None:
    player = _Player(thin, cart(), 5, None)
    seeds = list(itertools.islice(player._search, 1))
    run = player._play(as_agent(thin, Probe("random", 0.0)), seeds, None)[0]
    assert run.constraints is not None
    assert run.next_constraints is not None
    assert not run.violated
    unit = max(4.0 * thin.model.scale.step_rms, thin.delta / 4.0)
    h = max(run.constraints[0], run.next_constraints.max())
    seen = observations()
    value = thin.row_values(seen)
    scores = []
    for at in (value.argmin(), value.argmax()):
        led = replace(run, next_observations=np.repeat(seen[[at]], len(run.actions), axis=0))
        scores.append(player._summary([led]).score)
        s = 1.0 / (1.0 + np.exp(-np.clip(np.array([h, value[at]]) / unit, -700, 700)))
        assert scores[-1] == pytest.approx(s.mean(), rel=1e-6)
    assert scores[1] > scores[0] + 0.1


def _short(shield: Shield, seeds: list[int]) -> list:  # type: ignore[type-arg]
    return run_episodes(cart(), "random", len(seeds), 0, seeds=seeds)


def test_a_budget_that_ends_during_the_battery_still_verifies_an_agent(thin: Shield) -> None:
    short = falsify(thin, cart(), minutes=1e-6, episodes=10, cma=False)
    assert (short.searched, short.episodes, short.probe.family) == (0, 10, "adversary")


def test_an_environment_without_labels_or_with_few_certified_starts_is_refused(
    thin: Shield,
) -> None:
    strict = thin.with_delta(50.0)
    with pytest.raises(ValueError, match="starts almost everywhere outside the certified set"):
        falsify(strict, cart(), minutes=None, rollouts=10, episodes=5, cma=False)


@pytest.mark.parametrize("family", ["random", "adversary", "greedy"])
def test_a_record_names_a_saved_agent_by_its_file_and_its_numbers(
    thin: Shield, family: str, tmp_path: Path
) -> None:
    path = tmp_path / "worst.json"
    first = Probe(family, 0.0, (0.0,) * weight_count(thin) if family == "greedy" else ())
    names = []
    for one in (first, replace(first, delta=0.1), first):
        one.save(path, {"versions": len(names)})
        agent = load_probe(path, thin)
        played = evaluate(cart(), agent, 2, seed=0, shield=thin)
        assert policy_names(agent) == [played.policy]
        assert {name_of(str(path), agent), short_name_of(str(path), agent)} == {played.policy}
        assert re.fullmatch(r"worst\.json \([0-9a-f]{8}\)", played.policy)
        names.append(played.policy)
    # The next search may write another agent to the same file.
    assert (names[0] == names[1], names[0] == names[2]) == (False, True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"minutes": None}, "must not both be None"),
        ({"minutes": 0.0}, "minutes must be finite and above 0, got 0.0"),
        ({"rollouts": 0}, "rollouts must be at least 1, got 0"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
    ],
)
def test_arguments_are_checked(thin: Shield, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        falsify(thin, cart(), **wrong)  # type: ignore[arg-type]


def test_without_the_library_the_message_says_what_to_install(
    thin: Shield, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r'pip install "safeshield\[falsify\]"'):
        falsify(thin, cart())


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (30, 2000), (50, 50)])
def test_the_bounds_are_clopper_and_pearsons(k: int, n: int) -> None:
    # A two-sided interval at 98% has 1% on each side.
    exact = stats.binomtest(k, n).proportion_ci(0.98, method="exact")
    np.testing.assert_allclose(rate_bounds(k, n, 0.99), (exact.low, exact.high), atol=1e-9)


# -- what is said --------------------------------------------------------------------------------


def test_the_statement_says_what_is_contradicted_and_that_it_is_no_proof(
    found: Falsification,
) -> None:
    assert found.promised == ("policy",)
    assert "is not contradicted" in found.statement()
    assert not found.contradicts
    covered = replace(found, promised=(found.probe.family,))
    assert covered.contradicts
    assert "This contradicts the promise" in covered.statement()
    elsewhere = replace(covered, fits=False)
    assert not elsewhere.contradicts
    assert "promises nothing here" in elsewhere.statement()
    clean = replace(found, violating=0, lower=0.0)
    assert "does not contradict" in clean.statement()
    unknown = replace(found, epsilon=None)
    assert not unknown.breaks
    assert "promises nothing" in unknown.statement()
    assert all(one.statement().endswith(NO_PROOF) for one in (found, covered, clean, unknown))


# -- the agents ----------------------------------------------------------------------------------


def test_probes_in_one_batch_act_as_each_does_alone() -> None:
    shield = sound("double integrator")
    probes = [p for p in starting_probes(shield, RNG(1), 2) if p.noise == 0]
    rows = observations(len(probes))
    agent = ProbingAgent(shield, probes, np.arange(len(probes)))
    agent.start_wave(len(probes))
    together = agent(rows, RNG(0))
    for row, probe, action in zip(rows, probes, together, strict=True):
        alone = ProbingAgent(shield, [probe])(row[None], RNG(0))
        np.testing.assert_allclose(alone[0], action, atol=1e-4)


def test_the_greedy_probe_is_the_adversary_of_the_calibration_where_something_is_accepted() -> None:
    shield = sound("double integrator").with_delta(0.1)
    rows = observations(200)
    rows = rows[shield.row_values(rows) < -0.3]
    turns = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    greedy = Probe("greedy", 0.1, (*[0.0] * (weight_count(shield) - 6), *turns))
    ours = shield.row_values(rows, as_agent(shield, greedy)(rows, RNG(0)).astype("f4"))
    theirs = shield.row_values(rows, Adversary(shield)(rows, RNG(0)))
    # The adversary has one candidate more, the fallback's action.
    assert (ours <= theirs + 1e-5).all()
    assert np.mean(np.abs(ours - theirs) < 1e-5) > 0.7


def test_noise_is_held_for_the_stated_number_of_steps() -> None:
    shield = sound("double integrator")
    probe = Probe("held noise", 0.0, (0.0,) * weight_count(shield), noise=1.0, hold=3)
    agent, rng, rows = ProbingAgent(shield, [probe]), RNG(0), np.zeros((2, 2), np.float32)
    agent.start_wave(2)
    drawn = np.stack([agent(rows, rng)[:, 0] for _ in range(9)])
    assert [len(np.unique(drawn[:, i])) for i in range(2)] == [3, 3]
    assert (np.diff(drawn, axis=0)[[0, 1, 3, 4, 6, 7]] == 0).all()


def test_a_probe_is_the_same_policy_at_every_delta_of_the_shield(found: Falsification) -> None:
    shield, rows = sound("double integrator"), observations()
    acting = [as_agent(shield.with_delta(d), found.probe)(rows, RNG(0)) for d in (0.0, 0.2)]
    np.testing.assert_array_equal(*acting)


# -- files ---------------------------------------------------------------------------------------


def test_a_saved_probe_is_loaded_as_it_was(found: Falsification, tmp_path: Path) -> None:
    found.save(tmp_path / "worst.json")
    assert Probe.load(tmp_path / "worst.json") == found.probe
    about = json.loads((tmp_path / "worst.json").read_text())["found"]
    assert about["violating"] == found.violating
    assert about["statement"] == found.statement()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"format": "safeshield probe 1"}',
        b'{"format": "safeshield probe 1", "probe": {"family": "x", "delta": NaN}}',
        b'{"format": "safeshield probe 1", "probe": {"family": "x", "delta": -1.0}}',
        b'{"format": "safeshield probe 1", "probe": {"family": "x", "delta": 0.0, "hold": 0}}',
        b'{"format": "safeshield probe 1", "probe": {"family": "x", "delta": 0, "noise": 1e999}}',
        b'{"format": "safeshield probe 1", "probe": {"family": "x", "delta": 0.0, "extra": 1}}',
        b" " * 2_000_000,
    ],
)  # fmt: skip
def test_a_file_that_holds_no_probe_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "worst.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"worst\.json|must be finite|must have delta"):
        Probe.load(path)


def test_a_probe_of_other_spaces_is_refused(found: Falsification) -> None:
    longer = replace(found.probe, weights=(*found.probe.weights, 0.0))
    with pytest.raises(ValueError, match="it was found for another one"):
        as_agent(sound("double integrator"), longer)


def test_the_command_writes_an_agent_that_the_other_commands_play(
    thin: Shield, tmp_path: Path
) -> None:
    shield, worst = tmp_path / "shield.safetensors", tmp_path / "worst.json"
    record = thin.record
    assert record is not None
    bound = upper_bound(65, 0, 0.95)  # a file must hold a record that a calibration can write
    tested = replace(record.policies[0], episodes=65, bound=bound)
    walk = (replace(record.walk[0], episodes=65, bound=bound),)
    replace(thin, record=replace(record, policies=(tested,), walk=walk)).save(shield)
    arguments = ["falsify", str(shield), CART.id, "--rollouts", "60", "--episodes", "40"]
    ran = CliRunner().invoke(app, [*arguments, "--no-cma", "--out", str(worst)])
    assert ran.exit_code == 1, ran.output  # the planted flaw breaks the promised rate
    assert NO_PROOF in ran.output
    assert json.loads(worst.read_text())["format"] == FORMAT
    arguments = ["evaluate", str(shield), CART.id, "--policy", str(worst), "--episodes", "20"]
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)[0]["violation_rate"] > 0
