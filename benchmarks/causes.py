"""Find out why offline agents violate: one training of the critics, many ways to choose an action.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/causes.py --data FOLDER --tasks DroneCircle PointGoal1 --seeds 10
    python benchmarks/causes.py --data FOLDER --table

For each task, seed and safety expectile, SafeFQL is trained on the log (12,000 updates, with the
fixed margin of 0.058). A flow as in FISOR and an FLRP agent are then trained on the same critics
(6,000 updates each), where an arm needs them. All arms play the same 20 starts with the noise of a
deployed agent:

    student            the student's first draw
    student lowest     the lowest Q_h of 17 draws of the student
    gate               the first draw where Q_h < -margin, else the lowest Q_h of 17
    default            the same, but where none of the 17 passes, the nearest action below the gate
                       that a search over the box finds; where it finds none, the last resort
                       of the agent (`SafeFQLConfig.last_resort`)
    lowest resort      the same, but the lowest Q_h of the search where it finds none
    student resort     the same, but the lowest Q_h of the 17 draws where it finds none
    teacher resort     the same, but the lowest Q_h of 16 draws of the teacher in their place
    behaviour          the same, with 64 draws of the log's behaviour in place of the search
    teacher, fisor     of 16 draws of that flow the highest A_r where Q_h < -margin, else the lowest
                       Q_h
    teacher lowest,
    fisor lowest       the lowest Q_h of 16 draws
    flrp gate          FLRP's first draw where Q_h < -margin, else the lowest Q_h of 17 draws
    flrp default       FLRP's first draw where Q_h < -margin, else the lowest Q_h of 16 draws
                       without refinement; where none of them passes, as in "default"
    flrp refined       the same, but the further draws are refined: the 17 of "flrp gate"
    flrp u = 0, flrp,
    flrp lowest        FLRP's action for u = 0, for one draw, and the lowest Q_h of 16 draws
    auto student, auto gate, auto default, auto lowest resort, auto student resort,
    auto teacher resort, auto behaviour, auto teacher, auto flrp
                       the same with margin="auto": teacher and student, or FLRP, are trained anew
                       on the same critics (6,000 updates), with the margin measured on the log

The other arms with a gate are played at 1, 2, 4 and 8 times the margin. A result has the normalised
return and cost, the share of the steps in which each branch acted, the mean support score
-||z||^2 / 2 of the actions (`support.scores`), a comparison of Q_h with the largest h of the rest
of the episode, and the share of episodes that miss the margin of the gate (`calibration.margin`).
The default margin and the one that is measured on the log are printed for each cell.
Every arm is stored under its own name, and every agent in its file, so an interrupted run continues
where it stopped. Each task, seed and expectile runs in its own process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, apart, machine, once
from field import make
from suites import read_log

from safeshield.algorithms.fisor import ACTOR, FISOR, FISORConfig
from safeshield.algorithms.flrp import FLRP, FLRPConfig
from safeshield.algorithms.safefql import TEACHER, SafeFQL, SafeFQLConfig
from safeshield.calibration.margin import missed_levels
from safeshield.data.dataset import OfflineDataset
from safeshield.evaluation import EPISODES, ReferenceReturns
from safeshield.nn.arrays import Float
from safeshield.nn.flow import euler_sample
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.recorded import Episode
from safeshield.shield.critics import StateValue
from safeshield.shield.replacement import nearest_acceptable
from safeshield.spaces.batches import Batch
from safeshield.suites.tasks import COST_LIMIT
from safeshield.support.scores import SCORES
from safeshield.training.config import LEAST_MARGIN
from safeshield.training.critics import measured_margin
from safeshield.training.log import LogTensors

UPDATES = 12_000
EXPECTILES = (".99", ".9")
MARGINS = (1, 2, 4, 8)
STUDENT_DRAWS, FLOW_DRAWS, BEHAVIOUR_DRAWS = 16, 16, 64
BRANCHES = ("first", "candidates", "search", "best", "lowest")
"""Parts of the rules that choose an action: the first draw, the lowest Q_h of further draws below
the gate, the search (or the draws of the behaviour), the highest A_r below the gate, and the lowest
Q_h where nothing is below the gate."""
FIRST, CANDIDATES, SEARCH, BEST, LOWEST = range(5)


@dataclass(eq=False)
class Trained:
    """The agents of a task, seed and expectile, which have the same critics.

    An agent is trained, or read from its file, when it is used for the first time.
    """

    task: str
    seed: int
    expectile: str
    data: Path
    folder: Path
    updates: int

    @cached_property
    def safefql(self) -> SafeFQL:
        """SafeFQL with the fixed margin."""
        config = SafeFQLConfig(**self._common, margin=LEAST_MARGIN)
        return self._kept(
            SafeFQL,
            lambda options: SafeFQL(config, device="cpu").fit(
                self._log, steps=self.updates, **options
            ),
        )

    @cached_property
    def auto(self) -> SafeFQL:
        """SafeFQL with margin="auto"."""
        return self._after(SafeFQL, SafeFQLConfig(**self._common, margin="auto"), "-auto")

    @cached_property
    def fisor(self) -> FISOR:
        """A flow as in FISOR."""
        return self._after(FISOR, FISORConfig(**self._common))

    @cached_property
    def flrp(self) -> FLRP:
        """FLRP."""
        return self._after(FLRP, FLRPConfig(**self._common))

    @cached_property
    def flrp_auto(self) -> FLRP:
        """FLRP with margin="auto"."""
        return self._after(FLRP, FLRPConfig(**self._common, margin="auto"), "-auto")

    def margins(self) -> dict[str, Any]:
        """Return the default margin and the one that is measured on the log, in units of h."""
        model, arrays = self.safefql._fitted(), self.safefql._networks
        log = LogTensors.of(self._log, model.scaling, torch.device("cpu"))
        measured = measured_margin(model.critics.safety, arrays, log)
        cell = {"task": self.task, "expectile": self.expectile, "seed": self.seed}
        return {**cell, "margin": self.safefql.gate, "measured": measured}

    @property
    def _common(self) -> dict[str, Any]:
        return {"seed": self.seed, "safety_expectile": float(self.expectile)}

    @cached_property
    def _log(self) -> OfflineDataset:
        return read_log(self.data, self.task)

    def _kept(self, kind: Any, train: Callable[[dict[str, Any]], Any], more: str = "") -> Any:  # noqa: ANN401
        name = f"{self.task}_{self.expectile}_{self.seed}_{kind.__name__.lower()}{more}"
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            checkpoint = path.with_suffix(".checkpoint")
            train({"checkpoint": checkpoint}).save(path)
            checkpoint.unlink()
        return kind.load(path, device="cpu")

    def _after(self, kind: Any, config: Any, more: str = "") -> Any:  # noqa: ANN401
        """Return an agent whose phases after the critics are trained on those of SafeFQL."""
        share, agent = config.phase_shares[0], kind(config, device="cpu")
        steps = round(self.updates * (1.0 - share))
        return self._kept(
            kind,
            lambda options: agent._fit_actor(self._log, steps, self.safefql, share, **options),
            more,
        )


Choice = tuple[Float, np.ndarray]
"""Actions (n, act) in [-1, 1], and the index (n,) of the branch that chose each."""


class Rules:
    """The rules that choose actions, in the states of one arm.

    Args:
        trained: The agents.
        agent: The one of SafeFQL that chooses: `trained.safefql` or `trained.auto`.
        limit: Q_h below which an action passes the gate, in units of h.
        seed: Seed of the noise.
    """

    def __init__(self, trained: Trained, agent: SafeFQL, limit: float, seed: int) -> None:
        self.agent, self.trained, self.limit = agent, trained, limit
        self.model = agent._fitted()
        self.safety = agent._safety(self.model)
        self._nearest = agent._changed(last_resort="nearest")
        self._lowest = agent._changed(last_resort="lowest")
        self.rng = np.random.default_rng(seed)

    @property
    def flrp(self) -> FLRP:
        """The agent of FLRP whose margin is set in the same way as that of `agent`."""
        trained = self.trained
        return trained.flrp_auto if self.agent is trained.auto else trained.flrp

    def draws(self, name: str, states: StateValue, each: int) -> Float:
        """Return draws (n, each, act) of a network in n states."""
        inputs = np.repeat(states.inputs, each, axis=0)
        agents, agent = self.trained, self.agent
        width = self.model.scaling.action_features
        if name in ("flrp", "unrefined"):
            policy = self.flrp._fitted().policy
            policy, width = policy if name == "flrp" else policy.unrefined, policy.spec.latent
        noise = self.rng.standard_normal((len(inputs), width)).astype(np.float32)
        if name == "student":
            rows = agent._draw(self.model, agent._arrays, inputs, noise)
        elif name == "behaviour":
            actor: Any = self.safety.behaviour_actor
            rows = actor.act(self.safety.networks, inputs, noise)
        elif name in ("flrp", "unrefined"):
            rows = policy.act(self.flrp._arrays, inputs, noise)
        else:
            one: Any = agents.fisor if name == "fisor" else agent
            network = ACTOR if name == "fisor" else TEACHER
            flow, steps = one._fitted().networks[network], one.config.flow_steps
            rows = euler_sample(flow, one._arrays[network], inputs, noise, steps)
        return np.asarray(rows.reshape(len(states.inputs), each, -1))

    def first(self, name: str, states: StateValue) -> Choice:
        """Return the first draw."""
        return self.draws(name, states, 1)[:, 0], np.full(len(states.inputs), FIRST)

    def lowest(self, name: str, each: int, states: StateValue) -> Choice:
        """Return the draw of lowest Q_h."""
        drawn = self.draws(name, states, each)
        lowest = self.safety.scaled_values(states, drawn).argmin(1)
        count = np.arange(len(drawn))
        return drawn[count, lowest], np.full(len(drawn), LOWEST)

    def gate(
        self, beyond: str, states: StateValue, actor: str = "student", further: str | None = None
    ) -> Choice:
        """Return the first draw of an actor, or the action that replaces it.

        Args:
            beyond: What is taken where no draw passes the gate: "" for the lowest Q_h of the draws,
                "behaviour" for draws of the behaviour. All others search over the box, and differ
                where that finds nothing acceptable: "search" does what the agent does, "lowest"
                takes the lowest Q_h of the search, "student" that of the draws, and "teacher" that
                of draws of the teacher.
            states: n states.
            actor: The network of the first draw; see `draws`.
            further: The network of the other draws; see `safest`.
        """
        actions, branch = self.safest(actor, STUDENT_DRAWS + 1, states, further)
        at = np.flatnonzero(branch == LOWEST)
        if len(at) and beyond:
            judged, before = states.take(at), actions[at]
            if beyond != "behaviour":
                # An agent of an earlier file has the last resort "lowest".
                searching = self._nearest if beyond == "search" else self._lowest
                found = searching._beyond_the_draws(self.safety, judged, before, self.limit)
                if beyond in ("student", "teacher"):
                    # The search found no acceptable action in these states.
                    lost = self.safety.scaled_values(judged, found[:, None])[:, 0] > self.limit
                    found[lost] = before[lost]
                    if beyond == "teacher" and lost.any():
                        found[lost] = self.lowest("teacher", FLOW_DRAWS, judged.take(lost))[0]
            else:
                more = self.draws("behaviour", judged, BEHAVIOUR_DRAWS)
                drawn = np.concatenate([before[:, None], more], 1)
                values = self.safety.scaled_values(judged, drawn)
                best = nearest_acceptable(drawn, values, np.full(len(at), self.limit))
                found = drawn[np.arange(len(at)), best]
            actions[at] = found
            reached = self.safety.scaled_values(judged, found[:, None])[:, 0]
            branch[at] = np.where(reached <= self.limit, SEARCH, LOWEST)
        return actions, branch

    def safest(
        self, name: str, each: int, states: StateValue, further: str | None = None
    ) -> Choice:
        """Return the first draw where it passes the gate, else the lowest Q_h of `each` draws.

        These are the first draw and `each` - 1 more. If `further` names another network, they are
        `each` - 1 draws of that network alone.
        """
        actions, branch = self.first(name, states)
        passes = self.safety.scaled_values(states, actions[:, None])[:, 0] < self.limit
        at = np.flatnonzero(~passes)
        if len(at):
            judged = states.take(at)
            drawn = self.draws(further or name, judged, each - 1)
            if further is None:
                drawn = np.concatenate([drawn, actions[at, None]], 1)
            values = self.safety.scaled_values(judged, drawn)
            actions[at] = drawn[np.arange(len(at)), values.argmin(1)]
            branch[at] = np.where(values.min(1) < self.limit, CANDIDATES, LOWEST)
        return actions, branch

    def best(self, name: str, states: StateValue) -> Choice:
        """Return the draw of the highest A_r below the gate; where there is none, of lowest Q_h."""
        drawn = self.draws(name, states, FLOW_DRAWS)
        count, each, width = drawn.shape
        values = self.safety.scaled_values(states, drawn)
        seen = np.repeat(states.inputs, each, axis=0)
        reward, rows = self.model.critics.reward, drawn.reshape(-1, width)
        gain = reward.advantages(self.agent._arrays, seen, rows).min(0).reshape(count, each)
        below = values < self.limit
        some = below.any(1)
        chosen = np.where(some, np.where(below, gain, -np.inf).argmax(1), values.argmin(1))
        return drawn[np.arange(count), chosen], np.where(some, BEST, LOWEST)

    def centre(self, states: StateValue) -> Choice:
        """Return FLRP's action for u = 0."""
        policy = self.flrp._fitted().policy
        noise = np.zeros((len(states.inputs), policy.spec.latent), np.float32)
        actions = policy.act(self.flrp._arrays, states.inputs, noise)
        return actions, np.full(len(noise), FIRST)


PLAIN: dict[str, Callable[[Rules, StateValue], Choice]] = {
    "student": lambda rules, states: rules.first("student", states),
    "student lowest": lambda rules, states: rules.lowest("student", STUDENT_DRAWS + 1, states),
    "teacher lowest": lambda rules, states: rules.lowest("teacher", FLOW_DRAWS, states),
    "fisor lowest": lambda rules, states: rules.lowest("fisor", FLOW_DRAWS, states),
    "flrp u = 0": lambda rules, states: rules.centre(states),
    "flrp": lambda rules, states: rules.first("flrp", states),
    "flrp lowest": lambda rules, states: rules.lowest("flrp", FLOW_DRAWS, states),
}
"""Arms without a gate."""
GATED: dict[str, Callable[[Rules, StateValue], Choice]] = {
    "gate": lambda rules, states: rules.gate("", states),
    "default": lambda rules, states: rules.gate("search", states),
    "behaviour": lambda rules, states: rules.gate("behaviour", states),
    "lowest resort": lambda rules, states: rules.gate("lowest", states),
    "student resort": lambda rules, states: rules.gate("student", states),
    "teacher resort": lambda rules, states: rules.gate("teacher", states),
    "teacher": lambda rules, states: rules.best("teacher", states),
    "fisor": lambda rules, states: rules.best("fisor", states),
    "flrp gate": lambda rules, states: rules.safest("flrp", STUDENT_DRAWS + 1, states),
    "flrp default": lambda rules, states: rules.gate("search", states, "flrp", "unrefined"),
    "flrp refined": lambda rules, states: rules.gate("search", states, "flrp"),
}
"""Arms with a gate, which are played at several margins."""
RESORTS = ("lowest resort", "student resort", "teacher resort")
AUTO = ("student", "gate", "default", *RESORTS, "behaviour", "teacher", "flrp")
ARMS = [
    *((name, 1) for name in PLAIN),
    *itertools.product(GATED, MARGINS),
    *((f"auto {name}", 1) for name in AUTO),
]
"""Name and factor of the margin of every arm."""


class Arm:
    """One rule as a batch policy, which records branch, Q_h and support score of each step."""

    batched = True

    def __init__(self, rules: Rules, choose: Callable[[Rules, StateValue], Choice]) -> None:
        self._rules, self._choose = rules, choose
        self._waves: list[list[np.ndarray]] = []

    def start_wave(self, num_envs: int) -> None:
        """Begin a new batch of episodes."""
        self._waves.append([])

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> np.ndarray:
        """Return the actions for n observations, as points of the action space."""
        safety = self._rules.safety
        rows = safety.observation_codec.flatten(observations, "observation")[0]
        states = safety.states(rows.astype(np.float32))
        actions, branch = self._choose(self._rules, states)
        values = safety.scaled_values(states, actions[:, None])[:, 0]
        chosen = safety.scaling.to_box(actions)
        score = SCORES["noise"](safety, states, chosen)
        self._waves[-1].append(np.stack([branch, values, score]))
        return np.asarray(safety.action_codec.unflatten(chosen))

    def records(self, runs: list[Episode]) -> list[np.ndarray]:
        """Return branch, Q_h and support score (3, L) of every step of each episode, in order."""
        columns = [
            column for wave in self._waves for column in np.moveaxis(np.stack(wave, axis=-1), 1, 0)
        ]
        # The last batch may have more environments than episodes that were still needed.
        return [one[:, : len(run)] for one, run in zip(columns, runs, strict=False)]


def rest_of_episode(run: Episode) -> np.ndarray:
    """Return the largest h of s[t+1] to s[L] for each step t, (L,); of costs where h is unknown."""
    h = run.next_constraints
    if h is None:
        assert run.costs is not None
        h = np.where(run.costs > 0, 1.0, -1.0)
    return np.asarray(np.maximum.accumulate(h[::-1])[::-1], np.float64)


def play(
    trained: Trained, task: str, seed: int, name: str, times: int, episodes: int
) -> dict[str, Any]:
    """Return the result of one arm on the first starts of a task and seed."""
    agent = trained.auto if name.startswith("auto ") else trained.safefql
    margin = agent.gate
    rules = Rules(trained, agent, -times * margin, seed)
    arm = Arm(rules, {**PLAIN, **GATED}[name.removeprefix("auto ")])
    runs = run_episodes(make(task), arm, episodes, 100 + seed, num_envs=EPISODES)
    records = arm.records(runs)
    branch, values, score = np.concatenate(records, axis=1)
    branch = branch.astype(int)
    ahead = np.concatenate([rest_of_episode(run) for run in runs])
    known = runs[0].next_constraints is not None
    passed = values < rules.limit
    entries = [_entries(run) for run in runs]
    entered = np.concatenate(entries)
    return {
        "task": task,
        "seed": seed,
        "arm": name,
        "times": times,
        "margin": margin,
        "returns": [run.total_return for run in runs],
        "costs": [run.cost_or_violations for run in runs],
        "violating": sum(run.violated for run in runs),
        "steps": len(branch),
        "branches": {one: float(np.mean(branch == index)) for index, one in enumerate(BRANCHES)},
        "support": float(score.mean()),
        "support_of_branches": {
            one: float(score[branch == index].mean())
            for index, one in enumerate(BRANCHES)
            if (branch == index).any()
        },
        "entries": {one: int(entered[branch == index].sum()) for index, one in enumerate(BRANCHES)},
        "entries_passed": int(entered[passed].sum()),
        "value": float(values.mean()),
        "ahead": float(ahead.mean()) if known else None,
        "ahead_minus_value": [float(x) for x in np.quantile(ahead - values, (0.1, 0.5, 0.9))]
        if known
        else None,
        "missing": missing(rules, runs, values),
        "passed": float(passed.mean()),
        "passed_then_violated": float((passed & (ahead > 0)).sum() / max(passed.sum(), 1)),
    }


def missing(rules: Rules, runs: list[Episode], values: np.ndarray) -> float:
    """Return the share of episodes that miss the level of the gate (`calibration.margin`).

    Args:
        rules: The rules, with their limit -m.
        runs: The episodes.
        values: Q_h of all their steps, one episode after the other.
    """
    starts = np.cumsum([0, *(len(run) for run in runs)])[:-1]
    here, after = (
        rules.safety.states(np.concatenate(rows)).value.astype(np.float64)
        for rows in (
            [run.observations for run in runs],
            [run.next_observations for run in runs],
        )
    )
    scores = missed_levels(here, after, values.astype(np.float64), starts)
    return float(np.mean(scores > -rules.limit))


def _entries(run: Episode) -> np.ndarray:
    """Return (L,) whether a step led from a state without a violation into one with it."""
    if run.constraints is not None and run.next_constraints is not None:
        return np.asarray((run.constraints <= 0) & (run.next_constraints > 0))
    assert run.costs is not None
    before = np.append(run.initial_cost or 0.0, run.costs[:-1])
    return np.asarray((before <= 0) & (run.costs > 0))


def stored(task: str, expectile: str, seed: int, name: str, times: int, episodes: int) -> str:
    """Return the name under which an arm is stored."""
    more = "" if episodes == EPISODES else f"_{episodes}"
    return f"{task}_{expectile}_{seed}_{name.replace(' ', '-')}_x{times}{more}"


def run_here(trained: Trained, arms: list[tuple[str, int]], episodes: int) -> None:
    """Play the arms without a stored result, and train the agents that they need."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task, expectile, seed = trained.task, trained.expectile, trained.seed
    references = ReferenceReturns.of_log(trained.data / f"{task}.hdf5")

    def compute(name: str, times: int) -> dict[str, Any]:
        row = play(trained, task, seed, name, times, episodes)
        row |= {"expectile": expectile, "updates": trained.updates}
        row["return"] = float(references.normalise(np.mean(row["returns"])))
        row["cost"] = float(np.mean(row["costs"])) / COST_LIMIT
        return row

    found = once(margins(task, expectile, seed), trained.margins, folder=trained.folder)
    print(margin_line(found), flush=True)
    for name, times in arms:
        key = stored(task, expectile, seed, name, times, episodes)
        row = once(key, partial(compute, name, times), folder=trained.folder)
        print(line(row), flush=True)


def margins(task: str, expectile: str, seed: int) -> str:
    """Return the name under which the margins of a cell are stored."""
    return f"{task}_{expectile}_{seed}_margins"


def margin_line(found: dict[str, Any]) -> str:
    """Return the margins of a cell as a line of text."""
    cell = f"{found['task']} {found['expectile']} {found['seed']}"
    times = found["measured"] / found["margin"]
    return f"{cell}: margin {found['margin']:.3g}, measured {found['measured']:.3g} (x {times:.2f})"


def line(row: dict[str, Any]) -> str:
    """Return a result as a row of a Markdown table."""
    branches = ", ".join(f"{one} {share:.0%}" for one, share in row["branches"].items() if share)
    residual = row["ahead_minus_value"]
    missed = f"{row['missing']:.0%}" if "missing" in row else "-"
    spread = "-" if residual is None else " / ".join(f"{x:.2g}" for x in residual)
    return (
        f"| {row['task']} | {row['expectile']} | {row['seed']} | {row['arm']} | {row['times']} | "
        f"{row['return']:.2f} / {row['cost']:.2f} | {row['violating']} of {len(row['costs'])} | "
        f"{branches} | "
        f"{row['support']:.2f} | {spread} | {row['passed']:.0%} | "
        f"{row['passed_then_violated']:.0%} | {missed} | {sum(row['entries'].values())} "
        f"({row['entries_passed']}) |"
    )


HEAD = (
    "| task | expectile | seed | arm | margins | return / cost | violating | branches | "
    "support | h ahead - Q_h, 10 / 50 / 90% | below the gate | ... then violated | "
    "miss the gate | entries (below the gate) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Run what has no stored result, each training in its own process, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", default=["DroneCircle", "PointGoal1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--expectiles", nargs="+", default=list(EXPECTILES))
    parser.add_argument("--updates", type=int, default=UPDATES, help="of a whole training")
    names = list(dict.fromkeys(name for name, _ in ARMS))
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM")
    parser.add_argument("--margins", nargs="+", type=int, choices=MARGINS, default=list(MARGINS))
    parser.add_argument("--episodes", type=int, default=EPISODES, help="starts of each arm")
    parser.add_argument("--folder", type=Path, default=RESULTS / "causes")
    parser.add_argument("--here", action="store_true", help="run in this process")
    parser.add_argument("--table", action="store_true", help="print what is there; run nothing")
    arguments = parser.parse_args()
    data, folder, updates = arguments.data, arguments.folder, arguments.updates
    folder.mkdir(parents=True, exist_ok=True)
    arms = [(one, times) for one, times in ARMS if one in arguments.arms]
    arms, episodes = [one for one in arms if one[1] in arguments.margins], arguments.episodes
    cells = list(itertools.product(arguments.seeds, arguments.tasks, arguments.expectiles))
    for seed, task, expectile in cells if not arguments.table else ():
        if arguments.here:
            run_here(Trained(task, seed, expectile, data, folder, updates), arms, episodes)
            continue
        command = [sys.executable, __file__, "--data", str(data), "--tasks", task, "--here"]
        command += ["--seeds", str(seed), "--expectiles", expectile]
        command += ["--updates", str(updates), "--folder", str(folder), "--arms", *arguments.arms]
        command += ["--episodes", str(episodes), "--margins", *map(str, arguments.margins)]
        apart(command, f"{task} {expectile} {seed}")
    if arguments.here:
        return
    print(machine())
    for seed, task, expectile in cells:
        path = folder / f"{margins(task, expectile, seed)}.json"
        if path.exists():
            print(margin_line(json.loads(path.read_text())))
    print(HEAD)
    for seed, task, expectile in cells:
        for name, times in arms:
            path = folder / f"{stored(task, expectile, seed, name, times, episodes)}.json"
            if path.exists():
                print(line(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
