"""Put what a log says of a shield beside fresh episodes, on the tasks of the field.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/from_log.py field --data FOLDER       # logs, TASK.hdf5; resumes
    python benchmarks/from_log.py field --data FOLDER --table

A cell is one agent on one task with one seed, and makes one statement of each kind. A log is split
by the seed: a `ShieldTrainer` with its defaults is trained on 60% of the episodes (20,000 updates;
on the two tasks of `from_log.py` fewer, so that agents violate now and then), detection and
residuals choose delta by 20%, and the remaining 20% show whether these two statements hold of the
log. Delta is the larger one of what detection chooses (lead 5 steps; double integrator: 2) and of
the quantile of the residuals that at least half of the held-out episodes start below, 0 if neither.

All further episodes are those of one agent (mean actions) from certified starts, 100 for each
statement: without the shield for shadow, spliced, detection and residuals; with it for the trial;
and by `Shield.calibrate` at the same delta for the rollouts. The truth is up to 1,000 fresh
episodes without the shield and as many with it. A statement is contradicted where the one-sided 99%
lower limit of the rate of these episodes exceeds what it promises. Settings were chosen on seed 10,
except the rule about half of the starts: with seed 0, no start of BallRun is below the quantile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, machine, once
from from_log import TASKS, Array, Scores

import safeshield
from safeshield import CalibrationError, OfflineDataset, Shield, ShieldConfig, ShieldTrainer
from safeshield.calibration import upper_bound
from safeshield.calibration.from_log import METHODS
from safeshield.calibration.proposers import Adversary
from safeshield.data.collect import log_of
from safeshield.evaluation.episodes import draw_episodes
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield.log_record import Ledger

FIELD = ("BallRun", "PointCircle1", "HopperVelocity")
"""Tasks of the suites that `field` takes by default, after those of `from_log.py`."""
AGENTS = ("bc-safe", "safefql", "fisor", "ppo")
"""Agents on the tasks of the suites, by the names of `suites.trained`."""
LOGGER, RANDOM, ADVERSARY = "logger", "random", "adversary"
"""Agents on the tasks of `from_log.py`: the agent that makes the log, random actions, and the most
dangerous action that the shield accepts."""
OWN = (LOGGER, RANDOM, ADVERSARY)
CONFIDENCE, ALPHA, LEAD = 0.95, 0.1, 5
EVIDENCE, FRESH, PART = 100, 1_000, 100
"""Episodes of each statement, of the truth, and of one stored part of the truth."""
LOWER, LEAST_SHARE = 0.99, 0.5
OWN_EPISODES, UPDATES = 2_000, 20_000
"""Episodes of a log of the tasks of `from_log.py`; updates of a shield on a task of the suites."""


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
        return TASKS[self.task].lead if self.task in TASKS else LEAD

    def name(self, what: str) -> str:
        """Return the name of a file of this cell, without its ending."""
        return f"{self.task.replace(' ', '_')}_{self.agent}_{self.seed}_{what}"

    def kept(self, what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stored result of this cell, computed first where there is none."""
        return once(self.name(what), compute, folder=self.folder)

    def stored(self, what: str) -> dict[str, Any] | None:
        """Return a stored result of this cell, None where there is none."""
        path = self.folder / f"{self.name(what)}.json"
        return json.loads(path.read_text()) if path.exists() else None


def field_env(task: str) -> Any:  # noqa: ANN401
    """Return the environment of a task."""
    if task in TASKS:
        return TASKS[task].make()
    from field import make

    return make(task)


def field_policy(cell: Field, shield: Shield) -> object:
    """Return the agent of a cell, which may look at its `shield`."""
    if cell.agent == LOGGER:
        return TASKS[cell.task].policy()
    if cell.agent == RANDOM:
        return RANDOM
    if cell.agent == ADVERSARY:
        return Adversary(shield)
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
        arguments["alpha"] = ALPHA
    fresh = replace(shield, ledger=Ledger())
    try:
        found = fresh.calibrate_from_log(log, method, confidence=CONFIDENCE, **arguments)
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
    starts = shield.row_values(held_out.observations[held_out.episode_starts])
    found = (alarm.get("delta") or 0.0, rises.get("threshold") or 0.0)
    delta = max((one for one in found if np.mean(starts <= -one) >= LEAST_SHARE), default=0.0)
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
        self.env, self.cell = field_env(cell.task), cell
        self.policy = field_policy(cell, self.shield)
        self.steps = self.env.spec.max_episode_steps
        self.known = cell.agent not in OWN
        self.acting = as_batch_policy(self.policy, self.env.action_space, deterministic=True)

    def episodes(self, shield: Shield | None, count: int, seed: int) -> OfflineDataset:
        """Return episodes from certified starts, with the shield on where one is given."""
        runs, share = draw_episodes(
            self.env, self.acting, count, seed + self.cell.seed, shield, self.shield
        )
        self.share = share
        return log_of(runs, self.env.observation_space, self.env.action_space)

    def about(self) -> dict[str, Any]:
        """Return what shadow is told of the agent."""
        about: dict[str, Any] = {"policy": self.cell.agent, "horizon": self.steps}
        if self.known:
            about.update(policy=self.policy, policy_name=self.cell.agent, deterministic=True)
        return about

    def without(self) -> dict[str, Any]:
        """Return what the agent's episodes without the shield say."""
        log = self.episodes(None, EVIDENCE, 3_000_000)
        found = {
            "detection": said(self.shield, log, "detection", lead=self.cell.lead),
            "residuals": said(self.shield, log, "residuals", horizon=self.steps),
            "shadow": said(self.shield, log, "shadow", **self.about()),
        }
        return {**found, "share": self.share}

    def spliced(self) -> dict[str, Any]:
        """Return what the same episodes say, continued behind the shield in the environment."""
        log = self.episodes(None, EVIDENCE, 3_000_000)
        about = {**self.about(), "policy": self.acting, "policy_name": self.cell.agent}
        return said(self.shield, log, "spliced", simulator=self.env, **about)

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
                self.env, epsilon=1.0 - 1e-6, confidence=CONFIDENCE, policy=agent,
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
    reached = (log.next_constraints > 0) | (log.costs > 0)
    return np.logical_or.reduceat(reached, log.episode_starts)


def play_cell(cell: Field, episodes: int) -> None:
    """Compute what a cell lacks, up to a number of fresh episodes.

    Only the environments of this package take a state as spliced needs it.
    """
    playing = Playing(cell)
    spliced = ["spliced"] if "spliced" in METHODS and cell.task in TASKS else []
    for what in ("without", *spliced, "trial", "rollouts"):
        cell.kept(what, getattr(playing, what))
    for part in range(episodes // PART):
        for what in ("behind", "alone"):
            cell.kept(f"{what}_{part}", partial(getattr(playing, what), part))


def parts_of(cell: Field, what: str) -> list[dict[str, Any]]:
    """Return the stored parts of the truth of a cell."""
    parts = (cell.stored(f"{what}_{part}") for part in range(FRESH // PART))
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
    without = cell.stored("without") or {}
    said_of = {
        "shadow": without.get("shadow"),
        "spliced": cell.stored("spliced"),
        "trial": cell.stored("trial"),
        "rollouts": cell.stored("rollouts"),
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
        log, without = cell._replace(agent="log").stored("evidence"), cell.stored("without")
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
        about = cell.stored("evidence" if on_log else "without")
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
        for what in ("evidence", "without", "spliced", "trial", "rollouts"):
            about = cell.stored(what) or {}
            for name, one in {what: about, **about}.items():
                if isinstance(one, dict) and "refused" in one:
                    print(f"{cell.task}, {cell.agent}, {name}: {one['refused']}")


def field(words: list[str]) -> None:
    """Play the cells of the field, and print their tables.

    Args:
        words: The words of the command line after "field".
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="from_log.py field", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--folder", type=Path, default=RESULTS / "from_log", help="for results")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, *FIELD])
    parser.add_argument("--agents", nargs="+", default=[*OWN, *AGENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh episodes of each kind")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    asked = parser.parse_args(words)
    print(machine())
    cells = [
        Field(task, agent, seed, asked.data, asked.folder)
        for seed, task, agent in itertools.product(asked.seeds, asked.tasks, asked.agents)
        if (task in TASKS) == (agent in OWN)
    ]
    if not asked.table:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            play_cell(cell, asked.fresh)
    field_tables(cells)
