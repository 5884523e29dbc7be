"""Logged episodes that a simulator continues behind a shield: the law, the words, the refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom
from tables import table_shield

from safeshield import CalibrationError, OfflineDataset, SafetyShield, Shield, collect
from safeshield.calibration.binomial import upper_bound
from safeshield.calibration.splicing import Splicer
from safeshield.rollouts.policies import as_batch_policy, batch_policy
from safeshield.shield.log_record import Ledger, LogRecord

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
Array = npt.NDArray[Any]
ROAD, EDGE, FALLEN = range(3)
BACK, FORWARD, WAIT = range(3)
STEPS, REPEATS, CONFIDENCE, COUNT = 6, 120, 0.9, 60
MOST = int(binom.ppf(0.999, REPEATS, 1.0 - CONFIDENCE))
CHOSEN = np.array([0.1, 0.4, 0.5])
"""How often the agent goes back, goes forward and waits."""
TABLE = np.array([[-1.0, -1.0, -1.0], [-1.0, 1.0, -0.5], [1.0, 1.0, 1.0]])
"""Q_h: at the edge FORWARD is rejected, and BACK takes its place."""


def moves() -> Array:
    """P[action, from, to]. The way back from the edge fails now and then, behind a shield too."""
    p = np.zeros((3, 3, 3))
    p[:, FALLEN, FALLEN] = 1.0
    p[[BACK, WAIT], ROAD] = [0.99, 0.0, 0.01]
    p[FORWARD, ROAD, EDGE] = 1.0
    p[BACK, EDGE] = [0.6, 0.0, 0.4]
    p[FORWARD, EDGE, FALLEN] = 1.0
    p[WAIT, EDGE, EDGE] = 1.0
    return p


class Ledge(gym.Env[Any, Any]):
    """A road with an edge. `reset(options={"state": s})` restores its state."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012
    labelled = True

    def __init__(self, limit: int = STEPS) -> None:
        self.observation_space = gym.spaces.Discrete(3)
        self.action_space = gym.spaces.Discrete(3)
        self._limit = limit

    def _info(self) -> dict[str, Any]:
        return {"constraint": 1.0 if self._at == FALLEN else -1.0} if self.labelled else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self._at, self._steps = int((options or {}).get("state", ROAD)), 0
        return self._at, self._info()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        chances = moves()[int(action), self._at]
        self._at = int(self.np_random.choice(3, p=chances))
        self._steps += 1
        reward = self.np_random.random() * 1e6
        return self._at, reward, False, self._steps >= self._limit, self._info()


@batch_policy
def careless(observations: Any, rng: np.random.Generator) -> Array:  # noqa: ANN401
    return rng.choice(3, len(observations), p=CHOSEN)


@pytest.fixture
def shield() -> Shield:
    return table_shield(TABLE)


@pytest.fixture(autouse=True)
def _each_episode_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few states and actions make equal episodes, which are told apart by their rewards here."""

    def hashes(log: OfflineDataset) -> Array:
        return log.rewards[log.episode_starts].astype(np.uint64)

    monkeypatch.setattr(OfflineDataset, "episode_hashes", property(hashes))


@pytest.fixture(scope="module")
def pool() -> OfflineDataset:
    """120 logs of 60 episodes of the careless agent, drawn at once."""
    rng, count, p = np.random.default_rng(0), REPEATS * COUNT, moves()
    at, states, actions = np.zeros(count, int), [], []
    for _ in range(STEPS):
        action = rng.choice(3, count, p=CHOSEN)
        states.append(at)
        actions.append(action)
        at = (rng.random(count)[:, None] > p[action, at].cumsum(axis=1)).sum(axis=1)
    seen = np.stack([*states, at], axis=1)
    fallen = np.where(seen == FALLEN, 1.0, -1.0)
    ends = np.zeros((count, STEPS), bool)
    ends[:, -1] = True
    return OfflineDataset.from_arrays(
        observations=seen[:, :-1].ravel(), actions=np.stack(actions, axis=1).ravel(),
        rewards=np.arange(count * STEPS, dtype=np.float32),
        next_observations=seen[:, 1:].ravel(), terminated=np.zeros(count * STEPS, bool),
        truncated=ends.ravel(), constraints=fallen[:, :-1].ravel(),
        next_constraints=fallen[:, 1:].ravel(),
        observation_space=gym.spaces.Discrete(3), action_space=gym.spaces.Discrete(3),
    )  # fmt: skip


def asked(shield: Shield, log: OfflineDataset, **more: Any) -> LogRecord:  # noqa: ANN401
    known: dict[str, Any] = {"policy": careless, "simulator": Ledge(), "confidence": CONFIDENCE}
    return shield.calibrate_from_log(log, "spliced", **{**known, **more}).log_records[-1]


def last(log: OfflineDataset, shield: Shield) -> tuple[Array, Array]:
    """Whether each episode falls before the first rejected step, and that step (STEPS: none)."""
    at = log.observations.reshape(-1, STEPS)
    rejected = (at == EDGE) & (log.actions.reshape(-1, STEPS) == FORWARD)
    first = np.where(rejected.any(axis=1), rejected.argmax(axis=1), STEPS)
    entry = np.where(log.next_constraints.reshape(-1, STEPS) > 0, 1, 0)
    entered = np.where(entry.any(axis=1), entry.argmax(axis=1) + 1, STEPS + 1)
    return entered <= first, first


def shielded() -> Array:
    """P[from, to] of a step behind the shield."""
    p = moves()
    own = np.tensordot(CHOSEN, p, 1)
    own[EDGE] = 0.5 * p[BACK, EDGE] + 0.5 * p[WAIT, EDGE]
    return own


def falls(first: Array, redrawn: bool = False) -> Array:
    """The probability (STEPS + 1,) of a fall from a rejected step on, exactly."""
    chances = []
    for t in range(STEPS):
        begin = shielded()[EDGE] if redrawn else moves()[BACK, EDGE]
        chances.append((begin @ np.linalg.matrix_power(shielded(), STEPS - t - 1))[FALLEN])
    return np.array([*chances, 0.0])[first]


# -- the theorem -----------------------------------------------------------------------------------


def test_spliced_bounds_hold_and_broken_ones_do_not(shield: Shield, pool: OfflineDataset) -> None:
    truth = np.linalg.matrix_power(shielded(), STEPS)[ROAD, FALLEN]
    assert truth == pytest.approx(0.4, abs=0.1)
    before, first = last(pool, shield)
    rng = np.random.default_rng(1)
    broken = dict.fromkeys(("correct", "redrawn", "twenty each", "best of three", "prefix"), 0)
    seen = 0.0
    for i in range(REPEATS):
        part = np.arange(i * COUNT, (i + 1) * COUNT)
        record = asked(replace(shield, ledger=Ledger()), pool.select(part), seed=i)
        goes_on = (first[part] < STEPS) & ~before[part]
        assert (record.episodes, record.continued) == (COUNT, goes_on.sum())
        seen += record.events - before[part].sum()
        chance = np.where(goes_on, falls(first[part]), 0.0)
        again = np.where(goes_on, falls(first[part], redrawn=True), 0.0)
        sure = before[part]
        draws = (rng.random((20, COUNT)) < chance) | sure
        counts = {
            "correct": (COUNT, record.events),
            "redrawn": (COUNT, int(((rng.random(COUNT) < again) | sure).sum())),
            "twenty each": (20 * COUNT, int(draws.sum())),
            "best of three": (COUNT, int(draws[:3].all(axis=0).sum())),
            "prefix": (COUNT, int(sure.sum())),
        }
        for name, (episodes, events) in counts.items():
            bound = upper_bound(episodes, events, CONFIDENCE)
            broken[name] += bound < truth
            if name == "correct":
                assert record.bound == pytest.approx(bound)
    assert broken.pop("correct") <= MOST
    assert min(broken.values()) > MOST, broken
    # The continuations have the exact law, and not that of a proposal that is drawn again.
    on = (first < STEPS) & ~before
    for redrawn in (False, True):
        chance = np.where(on, falls(first, redrawn), 0.0)
        spread = np.sqrt((chance * (1.0 - chance)).sum())
        assert (abs(seen - chance.sum()) < 4.0 * spread) is not redrawn


def test_a_continuation_begins_with_the_answer_to_the_logged_proposal(
    shield: Shield, pool: OfflineDataset
) -> None:
    before, first = last(pool, shield)
    episode = int(np.flatnonzero((first == 2) & ~before)[0])
    sent: list[int] = []

    class Seen(Ledge):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            sent.append(int(action))
            return super().step(action)

    @batch_policy
    def waits(observations: Any, rng: np.random.Generator) -> Array:  # noqa: ANN401
        return np.full(len(observations), WAIT)

    splicer = Splicer(shield, pool, Seen(), None, waits, None, 0)
    splicer.play(episode, 2, STEPS - 2)
    assert sent[0] == BACK
    assert len(sent) <= STEPS - 2
    assert set(sent[1:]) <= {WAIT}
    assert splicer.play(episode, 2, STEPS - 2) == splicer.play(episode, 2, STEPS - 2)
    cut = Splicer(shield, pool, Seen(limit=1), None, waits, None, 0).play(episode, 2, 4)
    assert cut.cut != cut.violated


# -- records ---------------------------------------------------------------------------------------


def test_the_words_name_the_simulator_and_what_was_not_seen(
    shield: Shield, pool: OfflineDataset, tmp_path: Path
) -> None:
    known = replace(shield, training_episodes=pool.select([100]).episode_hashes)
    found = known.calibrate_from_log(
        pool.select(np.arange(60)), "spliced", policy=careless, simulator=Ledge(), confidence=0.9
    )
    record = found.log_records[-1]
    assert record.statement.startswith(
        "With confidence 0.9 over the held-out episodes and their continuations, an episode of at "
        "most 6 steps that starts like this log's, kept where V_h <= -delta, in which careless "
        "proposes the actions and this shield at delta 0 executes them, violates the constraint "
        f"with probability at most {record.bound:.4g}, if the simulator Ledge behaves as the plant "
        "does."
    )
    assert (
        f"{record.continued} of 60 episodes were continued in the simulator with the shield on, "
        f"once each, from the first step in which it steps in. {record.events} violated before "
        "that step or after it. How the plant behaves while the shield acts was not seen."
    ) in record.statement
    assert (record.simulator, record.seed) == ("Ledge", 0)
    told = {one.name: one.checked for one in record.assumptions}
    assert told == {
        "held out": True, "independent episodes": False, "proposals logged": False,
        "fixed before": False, "same agent": False, "simulator": False, "no memory": False,
        "labels": False,
    }  # fmt: skip
    found.save(tmp_path / "s.safetensors")
    for twin in (Shield.load(tmp_path / "s.safetensors"), pickle.loads(pickle.dumps(found))):
        assert twin.log_records == found.log_records
        assert twin.ledger.attempts == found.ledger.attempts
    from safeshield.reporting import safety_report

    page = safety_report(tmp_path / "s.safetensors")
    assert "Logged episodes, continued in a simulator" in page
    assert f"{record.continued}, in Ledge" in page
    assert "How the plant behaves while the shield acts: this was seen in a simulator" in page


def test_another_seed_asks_anew_and_costs_its_level(shield: Shield, pool: OfflineDataset) -> None:
    log = pool.select(np.arange(40))
    assert asked(shield, log).tries == asked(shield, log).tries == 1
    other = asked(shield, log, seed=1)
    assert (other.tries, other.repeats, other.spent) == (2, 1, pytest.approx(0.2))
    fresh = asked(shield, pool.select(np.arange(40, 80)))
    assert (fresh.tries, fresh.repeats) == (3, 2)
    with pytest.raises(ValueError, match="at least 29 are needed"):
        asked(replace(shield, ledger=Ledger()), pool.select(np.arange(20)), epsilon=0.1,
              confidence=0.95)  # fmt: skip
    with pytest.raises(CalibrationError, match="calibrate another delta or shield"):
        asked(shield, pool.select(np.arange(80, 140)), epsilon=0.05)
    assert not shield.ledger.attempts[-1].passed


def test_an_episode_without_an_intervention_needs_no_simulator(
    shield: Shield, pool: OfflineDataset
) -> None:
    _, first = last(pool, shield)
    quiet = pool.select(np.flatnonzero(first == STEPS)[:40])

    class Never(Ledge):
        def reset(self, **_: Any) -> Any:  # noqa: ANN401
            raise AssertionError("nothing had to be continued")

    record = asked(shield, quiet, simulator=Never())
    assert (record.continued, record.events) == (0, int(quiet.violating_episodes.sum()))


# -- what is refused -------------------------------------------------------------------------------


class Remembers:
    """An agent with Stable-Baselines3's predict, with or without a memory."""

    def __init__(self, memory: Any) -> None:  # noqa: ANN401
        self.memory = memory

    def predict(self, observations: Array, **_: Any) -> tuple[Array, Any]:  # noqa: ANN401
        return np.full(len(observations), WAIT), self.memory


def test_what_cannot_be_continued_is_refused(shield: Shield, pool: OfflineDataset) -> None:
    log = pool.select(np.arange(40))

    def elsewhere(env: Any, observation: Any, episode: int, step: int) -> Any:  # noqa: ANN401
        return ROAD

    starting = Remembers(None)
    starting.start_wave = lambda num_envs: None  # type: ignore[attr-defined]
    silent, own = Ledge(), gym.vector.SyncVectorEnv([Ledge])
    silent.labelled = False
    wide = Ledge()
    wide.action_space = gym.spaces.Discrete(4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"simulator": None}, TypeError, "simulator must be a single Gymnasium environment"),
        ({"simulator": own}, TypeError, "simulator must be a single Gymnasium env.* SyncVectorEnv"),
        ({"simulator": SafetyShield(Ledge(), shield)}, ValueError, "must not be behind a shield"),
        ({"simulator": wide}, ValueError, r"action_space.*Discrete\(4\)"),
        ({"simulator": silent}, ValueError, r"must report info\['constraint'\] or info\['cost'\]"),
        ({"restore": 3}, TypeError, "restore must be a function .* got int"),
        ({"restore": elsewhere}, ValueError, r"observes \[0.*\] where \[1.*\] is logged"),
        ({"restore": lambda *_: None}, ValueError, "restore must return the simulator's observat"),
        ({"policy": None}, TypeError, "needs policy, the agent itself.* got None"),
        ({"policy": "agent.zip"}, TypeError, r"needs policy, the agent itself.* got 'agent\.zip'"),
        ({"policy": starting}, ValueError, "keeps a memory of the episode"),
        ({"policy": Remembers(None)}, ValueError, "needs deterministic=True or False"),
        ({"policy": Remembers(np.ones(1)), "deterministic": False}, ValueError, "keeps a memory"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ]
    for arguments, kind, match in cases:
        with pytest.raises(kind, match=match):
            asked(replace(shield, ledger=Ledger()), log, **arguments)
    for name in ({"simulator": Ledge()}, {"restore": elsewhere}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"goes with spliced, got method='shadow'"):
            shield.calibrate_from_log(log, "shadow", **name)
    told = {one.name: one.checked for one in asked(
        shield, log, policy=Remembers(None), deterministic=False).assumptions}  # fmt: skip
    assert told["no memory"]
    with pytest.raises(ValueError, match="policy must be the agent that made the log"):
        asked(shield, log, policy=Remembers(None), deterministic=True)
    behind = collect(SafetyShield(Ledge(), shield), careless, episodes=30, seed=1)
    with pytest.raises(ValueError, match="recorded with a shield on"):
        asked(shield, behind)
    assert callable(as_batch_policy(careless, gym.spaces.Discrete(3)))


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no simulator": lambda h: h["log_records"][0].update(simulator=""),
    "another simulator": lambda h: h["log_records"][0].update(simulator="x"),
    "no seed": lambda h: h["log_attempts"][0].update(seed=None),
    "another seed": lambda h: h["log_records"][0].update(seed=7),
    "continued below 0": lambda h: h["log_records"][0].update(continued=-1),
    "continued above n": lambda h: h["log_records"][0].update(continued=41),
    "more events than there can be": lambda h: h["log_records"][0].update(continued=0, violating=0),
    "another method": lambda h: h["log_records"][0].update(method="trial"),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_impossible_records_are_refused(
    shield: Shield, pool: OfflineDataset, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    from test_support import write_header

    found = shield.calibrate_from_log(
        pool.select(np.arange(40)), "spliced", policy=careless, simulator=Ledge()
    )
    path = tmp_path / "shield.safetensors"
    found.save(path)
    Shield.load(path)
    write_header(path, damage)
    with pytest.raises(ValueError, match=r"shield\.safetensors"):
        Shield.load(path)


def test_a_state_that_no_observation_shows_is_restored_by_a_function(
    shield: Shield, pool: OfflineDataset
) -> None:
    """`restore` is told where in the log it is, so that it can look the full state up."""
    log = pool.select(np.arange(40))
    before, first = last(log, shield)
    states: list[tuple[int, int, int]] = []

    def restored(env: Any, observation: Any, episode: int, step: int) -> Any:  # noqa: ANN401
        states.append((int(observation), episode, step))
        return env.unwrapped.reset(options={"state": observation})[0]

    wrapped = gym.wrappers.TimeLimit(Ledge(limit=100), STEPS)
    record = asked(shield, log, restore=restored, simulator=wrapped)
    goes_on = np.flatnonzero((first < STEPS) & ~before)
    assert states == [(EDGE, int(e), int(first[e])) for e in goes_on]
    assert record.continued == len(goes_on)
    assert asked(replace(shield, ledger=Ledger()), log).events == record.events
