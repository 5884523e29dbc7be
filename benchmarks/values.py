"""Compare variants of the safety values and of the rules by which a shield acts on them.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/values.py --data FOLDER      # logs of the suites, TASK.hdf5; resumes
    python benchmarks/values.py --data FOLDER --table

The question is which values are cautious enough for a shield. The tasks are the boat with the
demo's log, the double integrator with the log of `double_integrator.py`, and tasks of the suites
whose logs lie in the folder. All choices are made on one seed. A variant changes how the critics
are trained (`values_train.VARIANTS`); a rule changes how a trained shield acts
(`values_play.RULES`). The constraint of the present state is the exact one everywhere: V_h(s) =
h(s) + max(e(s), 0) with h(s) computed from the observation.

A cell is a variant, a rule and a delta on one task. A reckless agent plays behind the shield from
certified starts (V_h <= -delta). The measures of a cell are:

    violating     episodes with a cost; `cost` is the mean summed cost divided by the limit 10
    handovers     steps whose executed action was acceptable and after which nothing is acceptable,
                  per 1,000 steps
    blind, misreplaced, late
                  entries into a violation by the action that led there: an accepted proposal, an
                  acceptable replacement, or an action taken where nothing was acceptable
    sum_n         greatest sum of V_h(s_t+1) - Q_h(s_t, a_t) over n successive steps (those with
                  abs(V_h) < 6 margins count), in units of one step's change of h; the 95% quantile
                  over the episodes

Further cells hold, for each variant: the pessimism on the log (the share of states whose V_h
exceeds the greatest h of the rest of their episode), the comparison with the exact set on the boat
and the double integrator, and the boat's worst agent, which dynamic programming finds with the
shield inside the transitions. No shield is calibrated here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, once
from values_play import (
    RULES,
    WORST_RULES,
    boat_points,
    cart_points,
    exact,
    margin_of,
    on_the_log,
    play,
    sets,
    world_and_agent,
    worst_agents,
)
from values_train import BOAT, CART, IDS, VARIANTS, read_log, trained

from safeshield import Shield
from safeshield.evaluation import EPISODES, ReferenceReturns
from safeshield.exact import boat_value

TASKS = (BOAT, "PointCircle1", "DroneCircle", CART)
GROUPS = (("e99", "e90"), ("e90-g1", "e95"))
"""Variants that are computed before the others, in this order."""
MARGINS = (1.0, 3.0, 6.0)
"""Deltas of the cells, in margins."""
STATE_EPISODES = 200
"""Number of episodes on the boat and the double integrator; a task of the suites has `EPISODES`."""
WORST_DELTAS = (0.002, 0.02, 0.05, 0.144)
"""Deltas behind which the boat's worst agent plays, in metres."""
WORST_EPISODES = 500


class Study:
    """The cells of one seed, computed once and kept in a folder."""

    def __init__(self, data: Path, folder: Path, seed: int) -> None:
        self.data, self.folder, self.seed = data, folder, seed

    def shield(self, task: str, variant: str) -> Shield:
        """Return a variant's shield, uncalibrated, with the exact constraint."""
        return exact(trained(task, variant, self.seed, self.data, self.folder), task)

    def name(self, task: str, variant: str, what: str) -> str:
        """Return the name of a cell."""
        return f"{task}_{variant}_{what}_{self.seed}"

    def static(self, task: str, variant: str) -> dict[str, Any]:
        """Return the measures on the log and on the exact set."""

        def compute() -> dict[str, Any]:
            shield = self.shield(task, variant)
            told = on_the_log(shield, read_log(task, self.data, self.seed, self.folder))
            if task == BOAT:
                told |= sets(shield, *boat_points(boat_value()))
            if task == CART:
                told |= sets(shield, *cart_points())
            return {"seed": self.seed, **told}

        return once(self.name(task, variant, "static"), compute, folder=self.folder)

    def played(self, task: str, variant: str, rule: str, margins: float) -> dict[str, Any]:
        """Return the measures of a reckless agent behind the shield."""

        def compute() -> dict[str, Any]:
            shield = self.shield(task, variant)
            world, agent = world_and_agent(task, self.seed, self.folder)
            delta = margins * margin_of(shield)
            count = STATE_EPISODES if task in IDS else EPISODES
            told = play(shield, rule, delta, world, agent, count, 100 + self.seed)
            if task not in IDS and told["episodes"]:
                references = ReferenceReturns.of_log(self.data / f"{task}.hdf5")
                told["return"] = float(references.normalise(told["return"]))
            return {"seed": self.seed, "delta": delta, **told}

        return once(self.name(task, variant, f"{rule}_{margins:g}"), compute, folder=self.folder)

    def unshielded(self, task: str) -> dict[str, Any]:
        """Return the measures of the reckless agent without a shield, from the same starts."""

        def compute() -> dict[str, Any]:
            shield = self.shield(task, GROUPS[0][0])
            world, agent = world_and_agent(task, self.seed, self.folder)
            rng = np.random.default_rng(100 + self.seed)
            delta = margin_of(shield)
            count = STATE_EPISODES if task in IDS else EPISODES
            seen, _ = world.start(
                lambda rows: shield.row_values(rows) <= -delta, count, 100 + self.seed
            )
            alive, returns, costs = np.ones(len(seen), bool), 0.0, 0.0
            for _ in range(world.horizon):
                seen, reward, cost, over = world.step(np.asarray(agent(seen, rng), np.float32))
                returns, costs = returns + reward * alive, costs + cost * alive
                alive = alive & ~over
            mean = float(np.mean(returns))
            if task not in IDS:
                references = ReferenceReturns.of_log(self.data / f"{task}.hdf5")
                mean = float(references.normalise(mean))
            return {
                "seed": self.seed,
                "episodes": len(seen),
                "violating": int((np.asarray(costs) > 0).sum()),
                "cost": float(np.mean(costs)) / 10.0,
                "return": mean,
            }

        return once(f"{task}_unshielded_{self.seed}", compute, folder=self.folder)

    def worst(self, variant: str, rule: str) -> dict[str, Any]:
        """Return how many episodes of the boat's worst agent violate, by delta."""

        def compute() -> dict[str, Any]:
            shield = self.shield(BOAT, variant)
            told = worst_agents(shield, rule, WORST_DELTAS, WORST_EPISODES, 100 + self.seed)
            return {"seed": self.seed, **told}

        return once(self.name(BOAT, variant, f"worst_{rule}"), compute, folder=self.folder)

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return a stored cell, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


def jobs(
    study: Study, tasks: list[str], variants: list[str], rules: list[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the cells as (name, function), the most informative first."""
    known = [one for group in GROUPS for one in group]
    first, later = rules[:3], rules[3:]
    others = tuple(one for one in variants if one not in known)
    order = [(first, one) for one in GROUPS] + [(later, one) for one in GROUPS]
    for part, group in (*order, (first, others), (later, others)):
        chosen = [one for one in variants if one in group]
        for task, variant in itertools.product(tasks, chosen):
            if part == first:
                yield f"{task} unshielded", partial(study.unshielded, task)
                yield f"{task} {variant} on the log", partial(study.static, task, variant)
            for rule, margins in itertools.product(part, MARGINS):
                name = f"{task} {variant} {rule} {margins:g}"
                yield name, partial(study.played, task, variant, rule, margins)
        if part == first and BOAT in tasks:
            for variant in chosen:
                for rule in WORST_RULES:
                    yield f"worst {variant} {rule}", partial(study.worst, variant, rule)


def tables(study: Study, tasks: list[str], variants: list[str], rules: list[str]) -> str:
    """Return the stored cells as Markdown tables."""
    lines = []
    for task in tasks:
        alone = study.kept(f"{task}_unshielded_{study.seed}")
        lines += ["", f"### {task}", ""]
        if alone:
            lines += [
                f"Without a shield: {alone['violating']} of {alone['episodes']} violate, cost "
                f"{alone['cost']:.1f}, return {alone['return']:.2f}.",
                "",
            ]
        for rule in rules:
            rows = []
            for variant in variants:
                for margins in MARGINS:
                    row = study.kept(study.name(task, variant, f"{rule}_{margins:g}"))
                    if row:
                        rows.append(_played_row(variant, margins, row))
            if rows:
                lines += [
                    f"| {rule} | delta, margins | violating | cost | return | replaced | handovers "
                    "per 1,000 | blind, misreplaced, late | sums over 1, 8, 32, 128 | starts |",
                    "|---|---|---|---|---|---|---|---|---|---|",
                    *rows,
                    "",
                ]
        rows = []
        for variant in variants:
            row = study.kept(study.name(task, variant, "static"))
            if row:
                rows.append(
                    f"| {variant} | {row['pessimism']:.1%} | {row['pessimism_near']:.1%} | "
                    f"{row['called_unsafe']:.1%} of {row['violates_later']:.1%} | "
                    + (
                        f"{row['certified_share']:.1%} at {row['needed_delta']:.3f} | "
                        f"{row['intersection_over_union']:.3f} |"
                        if "needed_delta" in row
                        else "| |"
                    )
                )
        if rows:
            lines += [
                f"| {task}, the log | pessimism | near the boundary | V_h > 0, of those that "
                "violate later | certified share at the least clean delta | IoU |",
                "|---|---|---|---|---|---|",
                *rows,
                "",
            ]
        if task == BOAT:
            lines += _worst_table(study, variants)
    return "\n".join(lines)


def _played_row(variant: str, margins: float, row: dict[str, Any]) -> str:
    if not row["episodes"]:
        return f"| {variant} | {margins:g} | no certified start | | | | | | | 0% |"
    sums = ", ".join(f"{row[f'sum_{n}']:.1f}" for n in (1, 8, 32, 128))
    return (
        f"| {variant} | {margins:g} ({row['delta']:.3f}) | {row['violating']} of "
        f"{row['episodes']} | {row['cost']:.2f} | {row['return']:.2f} | {row['replaced']:.0%} | "
        f"{row['handovers']:.1f} | {row['blind']}, {row['misreplaced']}, {row['late']} | {sums} | "
        f"{row['certified_starts']:.0%} |"
    )


def _worst_table(study: Study, variants: list[str]) -> list[str]:
    rows = []
    for rule, variant in itertools.product(WORST_RULES, variants):
        found = study.kept(study.name(BOAT, variant, f"worst_{rule}"))
        if found:
            told = (str(found["violating"][f"{delta:g}"]) for delta in WORST_DELTAS)
            rows.append(f"| {variant}, {rule} | " + " | ".join(told) + " |")
    head = " | ".join(f"delta {delta:g}" for delta in WORST_DELTAS)
    title = f"| the boat's worst agent, violating of {WORST_EPISODES} | {head} |"
    return [title, "|---|" + "---|" * len(WORST_DELTAS), *rows, ""] if rows else []


def main() -> None:
    """Compute the cells without a stored result, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--results", type=Path, default=RESULTS / "values")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    arguments = parser.parse_args()
    study = Study(arguments.data, arguments.results, arguments.seed)
    chosen = arguments.tasks, arguments.variants, arguments.rules
    if not arguments.table:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        arguments.results.mkdir(parents=True, exist_ok=True)
        for name, compute in jobs(study, *chosen):
            try:
                row = compute()
            except FileNotFoundError as error:
                print(f"{name}: left out, {error}", flush=True)
                continue
            told = {
                key: row[key]
                for key in ("violating", "cost", "return", "replaced", "late")
                if key in row
            }
            print(name, told, f"{row['seconds']} s", flush=True)
    print(machine())
    print(tables(study, *chosen))


if __name__ == "__main__":
    main()
