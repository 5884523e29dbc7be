"""Test whether statements from a log alone hold, by 300 calibrations of each method and the truth.

    python benchmarks/from_log.py              # about 20 minutes; resumes; prints the table
    python benchmarks/from_log.py field --data FOLDER      # one statement on each of many tasks
    python benchmarks/from_log.py field --data FOLDER --table

A shield for the boat and one for the double integrator are trained briefly. 100,000 fresh episodes
without the shield, and as many with it, give the truth: the share of violating episodes below each
threshold, the share in which the agent violates or the shield would step in, the share that
violates with the shield on, and the share with a larger residual. Then `calibrate_from_log` is
called 300 times for each method, each time on other episodes, at confidence 0.9. It may break its
level at most 47 times (the 99.9% quantile of the binomial distribution). Incorrect calibrators
judge the same episodes, and must break it more often.

`field` makes one statement of each kind for each task, agent and seed, and plays fresh episodes of
what it speaks of. The tasks are those of the suites that have a log TASK.hdf5 in the folder
(`pip install -e ".[suites]"` and `requirements-suites.txt`), and the two above. A log is split by
the seed: a `ShieldTrainer` with its defaults is trained on 60% of the episodes (20,000 updates; on
the two tasks above fewer, so that it violates now and then), detection and residuals choose delta
by 20%, and the remaining 20% show whether these two statements hold of the log. Delta is the larger
of what detection chooses (lead 5 steps; double integrator: 2), and the quantile of the residuals.

All further episodes are those of one agent (mean actions) from certified starts, 100 for each
statement: without the shield for shadow, spliced, detection and residuals; with it for the trial;
and by `Shield.calibrate` at the same delta for the rollouts. The truth is up to 1,000 fresh
episodes without the shield and as many with it. A statement is contradicted where the one-sided 99%
lower limit of the rate of these episodes exceeds what it promises. Settings were chosen on seed 10.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from common import RESULTS, machine, once
from double_integrator import HeldAccelerations
from scipy.stats import binom

import safeshield
from safeshield import CalibrationError, OfflineDataset, Shield, ShieldConfig, ShieldTrainer
from safeshield.calibration import upper_bound
from safeshield.calibration.from_log import METHODS, lowest_allowed, rank_of
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.calibration.support import conformal_level
from safeshield.data.collect import log_of
from safeshield.demo.helmsmen import Helmsmen
from safeshield.evaluation.episodes import draw_episodes
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield.log_record import Ledger, LogRecord

Array = npt.NDArray[Any]
CONFIDENCE = 0.9
REPEATS, CHUNK = 300, 2000
TRUTH_CHUNKS = 50
FEW, ALPHA = 22, 0.1
"""The smallest number of episodes for this share, in which the rank matters most."""
MANY, WIDE = 63, 0.2
"""Episodes and share with which entries before the lead may be forgiven."""


class Task(NamedTuple):
    """One environment, the agent that makes its logs, and the shield's delta."""

    make: Callable[[], Any]
    policy: Callable[[], Any]
    delta: float
    lead: int
    """A lead that some entries come before."""
    counted: int
    """Episodes of a shadow and of a trial, so many that one violation less changes the verdict."""
    updates: int
    """Few updates for the double integrator, so that it violates behind its shield now and then."""


TASKS = {
    "boat": Task(
        lambda: gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100),
        Helmsmen,
        0.05,
        5,
        100,
        6000,
    ),
    "double integrator": Task(
        lambda: gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=20),
        lambda: HeldAccelerations(0.05),
        0.0,
        2,
        60,
        1300,
    ),
}


class Scores(NamedTuple):
    """What the theorems speak of, for each of E episodes."""

    alarm: dict[int, Array]
    """S for each lead, minus infinity where the entry comes before the lead."""
    counts: Array
    """Whether it violates after a safe start."""
    certified: Array
    """Whether V_h <= -delta at the start."""
    event: Array
    """Whether the agent violates or the shield would step in."""
    violating: Array
    residual: Array

    @classmethod
    def of(cls, shield: Shield, log: OfflineDataset, leads: tuple[int, ...]) -> Scores:
        """Compute the numbers by their definitions, not by the code that is tested."""
        starts, lengths = log.episode_starts, log.episode_lengths
        q = shield.row_values(log.observations, log.actions).astype(np.float64)
        after = np.maximum(shield.row_values(log.next_observations), log.next_constraints)
        steps = np.arange(len(log)) - np.repeat(starts, lengths)
        first = np.where(log.next_constraints > 0, steps, 10**6)
        entry = np.minimum.reduceat(first, starts) + 1
        left = np.repeat(entry, lengths) - steps
        safe = log.constraints[starts] <= 0
        violating = (entry < 10**6) | ~safe
        rejected = np.logical_or.reduceat(~(q <= shield.threshold), starts)
        return cls(
            {k: np.maximum.reduceat(np.where(left >= k, q, -np.inf), starts) for k in leads},
            violating & safe,
            shield.row_values(log.observations[starts]) <= shield.threshold,
            violating | rejected,
            violating,
            np.maximum(np.maximum.reduceat(after - q, starts), 0.0),
        )


def make_shield(name: str) -> Shield:
    """Train a shield briefly, once."""
    path = RESULTS / f"from_log_{name.replace(' ', '_')}.safetensors"
    if not path.exists():
        task = TASKS[name]
        log = safeshield.collect(task.make(), task.policy(), episodes=400, seed=77)
        config = ShieldConfig(
            seed=7, critic_hidden=(48, 48), behaviour_hidden=(32, 32), fallback_hidden=(32,),
            batch_size=128, learning_rate=1e-3,
        )  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        ShieldTrainer(config, device="cpu").fit(log, steps=task.updates).shield().save(path)
    return Shield.load(path).with_delta(TASKS[name].delta)


def episodes(name: str, shield: Shield | None, seed: int) -> OfflineDataset:
    """Return CHUNK fresh episodes of the agent, with the shield on where one is given."""
    task = TASKS[name]
    env = task.make()
    acting = as_batch_policy(task.policy(), env.action_space)
    if shield is not None:
        acting = ShieldedProposals(shield, acting)
    runs = run_episodes(env, acting, CHUNK, seed, num_envs=CHUNK)
    return log_of(runs, env.observation_space, env.action_space)


def truth(name: str, shield: Shield, chunk: int) -> dict[str, Any]:
    """Return the numbers of one chunk of episodes without the shield and of one with it."""
    leads = (1, TASKS[name].lead)
    free = Scores.of(shield, episodes(name, None, 10_000 + chunk), leads)
    shielded = Scores.of(shield, episodes(name, shield, 20_000 + chunk), leads)
    kept = shielded.certified
    return {
        **{
            f"lead {lead}": np.maximum(scores[free.counts], -1e9).tolist()
            for lead, scores in free.alarm.items()
        },
        "event": [int(free.event[free.certified].sum()), int(free.certified.sum())],
        "agent": [int(free.violating[free.certified].sum()), int(free.certified.sum())],
        "violating": [int(shielded.violating[kept].sum()), int(kept.sum())],
        "residual": free.residual.tolist(),
    }


def pooled(name: str, shield: Shield) -> dict[str, Any]:
    """Return the truth of all chunks together."""
    tag = name.replace(" ", "_")
    parts = [
        once(f"from_log_truth_{tag}_{i}", lambda i=i: truth(name, shield, i))
        for i in range(TRUTH_CHUNKS)
    ]
    rates = {
        key: sum(part[key][0] for part in parts) / sum(part[key][1] for part in parts)
        for key in ("event", "agent", "violating")
    }
    lists = {
        key: np.sort(np.concatenate([part[key] for part in parts]))
        for key in ("lead 1", f"lead {TASKS[name].lead}", "residual")
    }
    return {**rates, **lists}


def below(values: Array, threshold: float) -> float:
    """Return the share of sorted values below a threshold."""
    return float(np.searchsorted(values, threshold) / len(values))


def above(values: Array, threshold: float) -> float:
    """Return the share of sorted values above a threshold."""
    return 1.0 - float(np.searchsorted(values, threshold, side="right") / len(values))


class Tally:
    """How often each calibrator broke its level."""

    def __init__(self) -> None:
        self.broken: dict[str, int] = {}

    def count(self, what: str, wrong: bool) -> None:
        """Add one repeat of `what`."""
        self.broken[what] = self.broken.get(what, 0) + bool(wrong)


def repeats(name: str, shield: Shield) -> dict[str, int]:
    """Calibrate 300 times with each method, and count the broken levels."""
    known, lead, counted = pooled(name, shield), TASKS[name].lead, TASKS[name].counted
    tally, seed = Tally(), 0
    violating: list[int] = []
    certified: list[int] = []
    trials: list[int] = []
    rest: list[int] = []
    for _ in range(REPEATS):
        if len(violating) < FEW + MANY or min(len(certified), len(trials)) < counted:
            seed += 1
            free = episodes(name, None, 30_000 + seed)
            shielded = episodes(name, shield, 40_000 + seed)
            scores = Scores.of(shield, free, (1, lead))
            trial = Scores.of(shield, shielded, ())
            violating = np.flatnonzero(scores.counts).tolist()
            certified = np.flatnonzero(scores.certified).tolist()
            trials = np.flatnonzero(trial.certified).tolist()
            rest = list(range(CHUNK))
        few, many = ([violating.pop() for _ in range(n)] for n in (FEW, MANY))
        detect(shield, free.select(few), scores.alarm[1][few], known["lead 1"], 1, ALPHA, tally)
        late = scores.alarm[lead][many]
        detect(shield, free.select(many), late, known[f"lead {lead}"], lead, WIDE, tally)
        taken = [certified.pop() for _ in range(counted)]
        record = ask(shield, free.select(taken), "shadow")
        tally.count("shadow: bound below P(A or B)", record.bound < known["event"])
        tally.count("shadow: bound below the shielded rate", record.bound < known["violating"])
        alone = upper_bound(counted, int(scores.violating[taken].sum()), CONFIDENCE)
        tally.count("- shadow, without the interventions", alone < known["event"])
        taken = [trials.pop() for _ in range(counted)]
        log = shielded.select(taken)
        record = ask(shield, log, "trial")
        tally.count("trial", record.bound < known["violating"])
        short = upper_bound(counted, max(record.events - 1, 0), CONFIDENCE)
        tally.count("- trial, tail to k - 1", short < known["violating"])
        steps = upper_bound(len(log), int((log.next_constraints > 0).sum()), CONFIDENCE)
        tally.count("- trial, steps counted", steps < known["violating"])
        log = free.select([rest.pop() for _ in range(FEW)])
        quantile = ask(shield, log, "residuals", alpha=ALPHA).threshold or 0.0
        tally.count("residuals", above(known["residual"], quantile + 1e-6) > ALPHA)
        q = shield.row_values(log.observations, log.actions)
        rises = np.maximum(shield.row_values(log.next_observations), log.next_constraints) - q
        of_steps = -lowest_allowed(-np.maximum(rises, 0), ALPHA, CONFIDENCE).threshold
        tally.count("- residuals, pooled steps", above(known["residual"], of_steps) > ALPHA)
    return tally.broken


def ask(shield: Shield, log: OfflineDataset, method: str, **arguments: Any) -> LogRecord:  # noqa: ANN401
    """Return the record of a shield that remembers nothing."""
    fresh = replace(shield, ledger=Ledger())
    found = fresh.calibrate_from_log(log, method, confidence=CONFIDENCE, **arguments)
    return found.log_records[-1]


def detect(
    shield: Shield,
    log: OfflineDataset,
    own: Array,
    truth: Array,
    lead: int,
    alpha: float,
    tally: Tally,
) -> None:
    """Judge one set of violating episodes by `calibrate_from_log` and by incorrect calibrators."""
    what = f"detection, lead {lead}"
    try:
        record = ask(shield, log, "detection", lead=lead, alpha=alpha)
        tally.count(what, below(truth, record.threshold or 0.0) > alpha)
        tally.count(f"{what}, by delta", below(truth, 1e-9 - (record.delta or 0.0)) > alpha)
        tally.count(f"({what}: refused)", False)
    except CalibrationError:
        tally.count(f"({what}: refused)", True)
    rank = rank_of(len(own), alpha, CONFIDENCE)
    ranked = np.sort(own)
    tally.count(f"- {what}, rank j + 1", below(truth, ranked[rank]) > alpha)
    marginal = conformal_level(own, alpha)
    tally.count(f"- {what}, marginal rank", below(truth, marginal) > alpha)
    if lead > 1:
        dropped = lowest_allowed(own[np.isfinite(own)], alpha, CONFIDENCE).threshold
        tally.count(f"- {what}, early entries dropped", below(truth, dropped) > alpha)


# -- one statement of each kind on many tasks -----------------------------------------------------

FIELD = ("BallRun", "PointCircle1", "HopperVelocity")
"""Tasks of the suites that `field` takes by default, after the two above."""
AGENTS = ("bc-safe", "safefql", "fisor", "ppo")
"""Agents on the tasks of the suites, by the names of `suites.trained`."""
LOGGER, RANDOM = "logger", "random"
"""Agents on the two tasks above: the agent that makes the log, and random actions."""
FIELD_CONFIDENCE, FIELD_ALPHA, FIELD_LEAD = 0.95, 0.1, 5
EVIDENCE, FRESH, PART = 100, 1_000, 100
"""Episodes of each statement, of the truth, and of one stored part of the truth."""
LOWER = 0.99
OWN_EPISODES, UPDATES = 2_000, 20_000
"""Episodes of a log of the two tasks above; updates of a shield on a task of the suites."""


class Field(NamedTuple):
    """One agent on one task with one seed, and where its results lie."""

    task: str
    agent: str
    seed: int
    data: Path
    folder: Path

    @property
    def lead(self) -> int:
        """Return the lead of detection in steps."""
        return TASKS[self.task].lead if self.task in TASKS else FIELD_LEAD

    def kept(self, what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stored result of this cell, computed first where there is none."""
        tag = self.task.replace(" ", "_")
        return once(f"{tag}_{self.agent}_{self.seed}_{what}", compute, folder=self.folder)


def field_env(task: str) -> Any:  # noqa: ANN401
    """Return the environment of a task."""
    if task in TASKS:
        return TASKS[task].make()
    from field import make

    return make(task)


def field_policy(cell: Field) -> object:
    """Return the agent of a cell."""
    if cell.agent == LOGGER:
        return TASKS[cell.task].policy()
    if cell.agent == RANDOM:
        return RANDOM
    from suites import trained

    return trained(cell.task, cell.agent, cell.seed, cell.data, cell.folder)


def field_logs(cell: Field) -> tuple[OfflineDataset, OfflineDataset, OfflineDataset]:
    """Return the parts of the task's log that train, that choose delta, and that judge the two."""
    if cell.task in TASKS:
        task = TASKS[cell.task]
        log = safeshield.collect(task.make(), task.policy(), OWN_EPISODES, 1000 + cell.seed)
    else:
        from suites import read_log

        log = read_log(cell.data, cell.task)
    rest, fresh = log.split(0.8, cell.seed)
    return (*rest.split(0.75, cell.seed), fresh)


def field_shield(cell: Field) -> Shield:
    """Return the shield of a task and a seed, trained now or read from its file."""
    path = cell.folder / f"{cell.task.replace(' ', '_')}_shield_{cell.seed}.safetensors"
    if not path.exists():
        trainer = ShieldTrainer(ShieldConfig(seed=cell.seed), device="cpu")
        updates = TASKS[cell.task].updates if cell.task in TASKS else UPDATES
        checkpoint = path.with_suffix(".checkpoint")
        trainer.fit(field_logs(cell)[0], steps=updates, checkpoint=checkpoint)
        trainer.shield().save(path)
        checkpoint.unlink()
    return Shield.load(path)


def said(
    shield: Shield,
    log: OfflineDataset,
    method: str,
    **arguments: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return what a method says of a log's episodes, or why it says nothing."""
    if method in ("detection", "residuals"):
        arguments["alpha"] = FIELD_ALPHA
    fresh = replace(shield, ledger=Ledger())
    try:
        found = fresh.calibrate_from_log(log, method, confidence=FIELD_CONFIDENCE, **arguments)
    except (ValueError, TypeError) as error:
        return {"refused": str(error)}
    record = found.log_records[-1]
    kept = ("bound", "threshold", "delta", "episodes", "events", "statement")
    return {name: getattr(record, name) for name in kept}


def chosen_delta(cell: Field) -> dict[str, Any]:
    """Return what held-out episodes say, the delta that follows, and scores of other episodes."""
    shield = field_shield(cell)
    _, held_out, fresh = field_logs(cell)
    alarm = said(shield, held_out, "detection", lead=cell.lead)
    rises = said(shield, held_out, "residuals")
    delta = max(alarm.get("delta") or 0.0, rises.get("threshold") or 0.0)
    return {
        "detection": alarm,
        "residuals": rises,
        "delta": delta,
        **scored(shield, fresh, cell.lead),
    }


def scored(shield: Shield, log: OfflineDataset, lead: int) -> dict[str, Any]:
    """Return what the statements speak of, for each episode of a log without the shield."""
    scores = Scores.of(shield, log, (lead,))
    return {
        "played": log.num_episodes,
        "violating": int(scores.violating.sum()),
        "event": int(scores.event.sum()),
        "alarm": np.maximum(scores.alarm[lead][scores.counts], -1e9).tolist(),
        "residual": np.minimum(scores.residual, 1e9).tolist(),
    }


class Playing:
    """The agent of a cell, its environment and the shield at the delta that the log chose."""

    def __init__(self, cell: Field) -> None:
        only = cell._replace(agent="log")
        self.log = only.kept("evidence", partial(chosen_delta, only))
        self.shield = field_shield(cell).with_delta(self.log["delta"])
        self.env, self.cell, self.policy = field_env(cell.task), cell, field_policy(cell)
        self.steps = self.env.spec.max_episode_steps
        self.known = not isinstance(self.policy, str) and cell.agent != LOGGER
        self.acting = as_batch_policy(self.policy, self.env.action_space, deterministic=True)

    def episodes(self, shield: Shield | None, count: int, seed: int) -> OfflineDataset:
        """Return episodes from certified starts, with the shield on where one is given."""
        runs, share = draw_episodes(
            self.env, self.acting, count, seed + self.cell.seed, shield, self.shield
        )
        self.share = share
        return log_of(runs, self.env.observation_space, self.env.action_space)

    def without(self) -> dict[str, Any]:
        """Return what the agent's episodes without the shield say."""
        log = self.episodes(None, EVIDENCE, 3_000_000)
        about: dict[str, Any] = {"policy": self.cell.agent, "horizon": self.steps}
        if self.known:
            about.update(policy=self.policy, policy_name=self.cell.agent, deterministic=True)
        found = {
            "detection": said(self.shield, log, "detection", lead=self.cell.lead),
            "residuals": said(self.shield, log, "residuals", horizon=self.steps),
            "shadow": said(self.shield, log, "shadow", **about),
        }
        if "spliced" in METHODS and self.cell.task in TASKS:
            about.update(policy=self.policy, policy_name=self.cell.agent, simulator=self.env)
            found["spliced"] = said(self.shield, log, "spliced", **about)
        return {**found, "share": self.share}

    def trial(self) -> dict[str, Any]:
        """Return what the agent's episodes with the shield say."""
        log = self.episodes(self.shield, EVIDENCE, 3_100_000)
        about = {"policy": self.cell.agent, "horizon": self.steps}
        return said(self.shield, log, "trial", **about)

    def rollouts(self) -> dict[str, Any]:
        """Return the bound of as many rollouts at the same delta."""
        agent = self.policy if self.known else self.acting
        try:
            record = self.shield.calibrate(
                self.env, epsilon=1.0 - 1e-6, confidence=FIELD_CONFIDENCE, policy=agent,
                policy_name=self.cell.agent, deterministic=True, deltas=[self.shield.delta],
                episodes=EVIDENCE, seed=self.cell.seed,
            ).record  # fmt: skip
        except CalibrationError as error:
            return {"refused": str(error)}
        assert record is not None
        one = record.policies[0]
        return {"bound": one.bound, "episodes": one.episodes, "events": one.violations}

    def alone(self, part: int) -> dict[str, Any]:
        """Return a part of the truth without the shield."""
        log = self.episodes(None, PART, 4_000_000 + 1_000 * part)
        return scored(self.shield, log, self.cell.lead)

    def behind(self, part: int) -> dict[str, Any]:
        """Return a part of the truth with the shield on."""
        log = self.episodes(self.shield, PART, 5_000_000 + 1_000 * part)
        return {"played": log.num_episodes, "violating": int(violating(log).sum())}


def violating(log: OfflineDataset) -> Array:
    """Return whether each episode violates, (E,)."""
    starts = log.episode_starts
    return np.maximum.reduceat(log.next_constraints, starts) > 0


def play_cell(cell: Field, episodes: int) -> None:
    """Compute what a cell lacks, up to a number of fresh episodes."""
    playing = Playing(cell)
    for what in ("without", "trial", "rollouts"):
        cell.kept(what, getattr(playing, what))
    for part in range(episodes // PART):
        for what in ("behind", "alone"):
            cell.kept(f"{what}_{part}", partial(getattr(playing, what), part))


def stored(cell: Field, what: str) -> dict[str, Any] | None:
    """Return a stored result of a cell, None where there is none."""
    path = cell.folder / f"{cell.task.replace(' ', '_')}_{cell.agent}_{cell.seed}_{what}.json"
    return json.loads(path.read_text()) if path.exists() else None


def parts_of(cell: Field, what: str) -> list[dict[str, Any]]:
    """Return the stored parts of the truth of a cell."""
    parts = (stored(cell, f"{what}_{part}") for part in range(FRESH // PART))
    return [part for part in parts if part is not None]


class Judged(NamedTuple):
    """A promised bound beside the events of fresh episodes."""

    bound: float | None
    events: int
    played: int

    @property
    def lower(self) -> float:
        """Return the one-sided 99% lower limit of the rate, after Clopper and Pearson."""
        return 1.0 - upper_bound(self.played, self.played - self.events, LOWER)

    @property
    def contradicted(self) -> bool:
        """Return whether the lower limit exceeds the bound."""
        return self.bound is not None and self.played > 0 and self.lower > self.bound

    def __str__(self) -> str:
        """Return the bound, the fresh episodes and the limit, as cells of a Markdown table."""
        bound = "none" if self.bound is None else f"{self.bound:.3f}"
        if not self.played:
            return f"{bound} | - | -"
        return f"{bound} | {self.events} of {self.played} | {self.lower:.3f}"


def judged_of_log(about: dict[str, Any], parts: Iterable[dict[str, Any]]) -> dict[str, Judged]:
    """Return how fresh episodes without the shield judge detection and residuals."""
    parts = list(parts)
    found = {}
    for method, scores in (("detection", "alarm"), ("residuals", "residual")):
        values = np.concatenate([np.zeros(0), *(part[scores] for part in parts)])
        threshold = about[method].get("threshold")
        if threshold is None:
            found[method] = Judged(None, 0, len(values))
            continue
        missed = values < threshold if method == "detection" else values > threshold + 1e-6
        found[method] = Judged(about[method]["bound"], int(missed.sum()), len(values))
    return found


def judged_rates(cell: Field) -> dict[str, Judged]:
    """Return how fresh episodes with the shield on judge the bounds on their rate."""
    parts = parts_of(cell, "behind")
    events = (sum(part["violating"] for part in parts), sum(part["played"] for part in parts))
    without = stored(cell, "without") or {}
    said_of = {
        "shadow": without.get("shadow"),
        "spliced": without.get("spliced"),
        "trial": stored(cell, "trial"),
        "rollouts": stored(cell, "rollouts"),
    }
    return {
        name: Judged(about.get("bound"), *events)
        for name, about in said_of.items()
        if about is not None
    }


def field_tables(cells: list[Field]) -> None:
    """Print what is stored of the cells as two tables, and the number of contradictions."""
    print(
        "| task | agent | seed | delta | certified starts | violates alone | shadow | "
        "spliced | trial | rollouts | trial / rollouts | behind the shield | 99% lower limit |"
    )
    print("|---" * 13 + "|")
    judged: list[tuple[str, Judged]] = []
    for cell in cells:
        log, without = stored(cell._replace(agent="log"), "evidence"), stored(cell, "without")
        if log is None or without is None:
            continue
        rates = judged_rates(cell)
        judged += [(f"{cell.task}, {cell.agent}, {name}", one) for name, one in rates.items()]
        alone = parts_of(cell, "alone")
        free = sum(part["violating"] for part in alone), sum(part["played"] for part in alone)
        bounds = {name: one.bound for name, one in rates.items()}
        shown = {
            name: "none" if bounds.get(name) is None else f"{bounds[name]:.3f}"
            for name in ("shadow", "spliced", "trial", "rollouts")
        }
        ratio = "-"
        if bounds.get("trial") and bounds.get("rollouts"):
            ratio = f"{bounds['trial'] / bounds['rollouts']:.2f}"
        truth = str(rates["shadow"]).split(" | ", 1)[1]
        print(f"| {cell.task} | {cell.agent} | {cell.seed} | {log['delta']:.3g} | "
              f"{without['share']:.0%} | {free[0]} of {free[1]} | {' | '.join(shown.values())} | "
              f"{ratio} | {truth} |")  # fmt: skip
    print("\n| task | whose episodes | seed | detection: may miss | missed | 99% lower limit | "
          "residuals: may exceed | exceeded | 99% lower limit |")  # fmt: skip
    print("|---" * 9 + "|")
    logs = dict.fromkeys(cell._replace(agent="log") for cell in cells)
    for cell in (*logs, *cells):
        on_log = cell.agent == "log"
        about = stored(cell, "evidence" if on_log else "without")
        if about is None:
            continue
        found = judged_of_log(about, [about] if on_log else parts_of(cell, "alone"))
        judged += [(f"{cell.task}, {cell.agent}, {name}", one) for name, one in found.items()]
        print(f"| {cell.task} | {cell.agent} | {cell.seed} | {found['detection']} | "
              f"{found['residuals']} |")  # fmt: skip
    made = [(name, one) for name, one in judged if one.bound is not None and one.played]
    wrong = [name for name, one in made if one.contradicted]
    print(f"\n{len(made)} statements with fresh episodes, contradicted: {wrong or 'none'}")
    for cell in (*logs, *cells):
        for what in ("evidence", "without", "trial", "rollouts"):
            about = stored(cell, what) or {}
            for name, one in {what: about, **about}.items():
                if isinstance(one, dict) and "refused" in one:
                    print(f"{cell.task}, {cell.agent}, {name}: {one['refused']}")


def field(words: list[str]) -> None:
    """Play the cells of the field, and print their tables."""
    parser = argparse.ArgumentParser(prog="from_log.py field", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--folder", type=Path, default=RESULTS / "from_log", help="for results")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, *FIELD])
    parser.add_argument("--agents", nargs="+", default=[LOGGER, RANDOM, *AGENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh episodes of each kind")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    asked = parser.parse_args(words)
    cells = [
        Field(task, agent, seed, asked.data, asked.folder)
        for seed, task, agent in itertools.product(asked.seeds, asked.tasks, asked.agents)
        if (task in TASKS) == (agent in (LOGGER, RANDOM))
    ]
    if not asked.table:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            play_cell(cell, asked.fresh)
    field_tables(cells)


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    if sys.argv[1:2] == ["field"]:
        return field(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS))
    arguments = parser.parse_args()
    limit = int(binom.ppf(0.999, REPEATS, 1 - CONFIDENCE))
    for name in [arguments.task] if arguments.task else TASKS:
        shield = make_shield(name)
        known = pooled(name, shield)
        print(
            f"\n{name}, delta {shield.delta}: of certified starts the agent violates in "
            f"{known['agent']:.2%}, it violates or the shield would step in in "
            f"{known['event']:.2%}, it violates behind the shield in {known['violating']:.2%}"
        )
        tag = name.replace(" ", "_")
        broken = once(f"from_log_repeats_{tag}", lambda n=name, s=shield: repeats(n, s))
        print(f"broken in {REPEATS} (at most {limit} for a correct calibrator):")
        for what, times in sorted(broken.items()):
            if isinstance(times, int) and what not in ("cores",):
                print(f"  {what:45} {times:4}")


if __name__ == "__main__":
    main()
