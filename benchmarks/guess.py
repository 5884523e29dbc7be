"""Compare ways to guess a constraint that nobody knows: a mean, a quantile, and a constant on top.

    pip install -e ".[suites]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/guess.py --data FOLDER     # logs in DSRL's format, TASK.hdf5; resumes
    python benchmarks/guess.py --data FOLDER --table

Where no source gives h of an observation, the network "constraint" estimates its mean. The question
is whether a guess whose caution depends on the state replaces fewer steps at equal violations. For
continuous labels the other networks do not depend on this network, so a shield is trained once, and
copies of it get other networks in its place:

    package   the network that `ShieldTrainer` has trained on the whole log
    mean      the same regression, on 80% of the log's episodes
    q90       the 0.9 quantile of h given the observation, by the pinball loss, on the same episodes

The other 20% of the episodes conformalise the last two by episodes: the score of an episode is
the greatest h - guess over its steps, and the constant is the ceil(0.9 (m + 1))-th smallest of m
scores. In a new episode of the log's own behaviour, h exceeds guess + constant in any step with
probability at most 0.1. Nothing follows for the shielded agent, whose episodes are not exchangeable
with those of the log. The constant acts on V_h and Q_h exactly as a larger delta does, so a
conformalised guess is one point of its curve.

All guesses are first shifted to the same mean over the log's states near V_h = 0. A reckless agent
then plays behind each shield at the deltas of a grid, and without the shift at the conformal
constant. All shields play the same starts. The tasks are

    fog           the boat, whose position is measured with an error of standard deviation 0.15 m
                  where y > -0.35 (the upper rock), and 0.01 m elsewhere
    sandbank      the boat, where the radius of the lower rock is drawn for each episode, within
                  0.2 m of its usual one, and not observed
    BallRun, PointCircle1
                  the observation determines h, and its source is withheld from the shield

The boats have 6,000 updates of the shield, 400 trips of the demo's helmsmen as log, and reckless
helmsmen as agent. The others use the shields and the PPO of `field.py`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, once, run_cells
from field import shield_of
from suites import read_log, trained
from values_play import Agent, RecklessHelmsmen, SuiteWorld, World, margin_of, play

from safeshield import OfflineDataset, Shield
from safeshield.algorithms.shield_trainer import ShieldConfig, ShieldTrainer
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import (
    ROCK_CENTRES,
    ROCK_RADII,
    STATE_HIGH,
    STATE_LOW,
    BoatTask,
    constraint,
)
from safeshield.envs.task import Array
from safeshield.nn.arrays import Float, Weights
from safeshield.nn.mlp import EnsembleMLP, hidden_widths
from safeshield.values.units import CONSTRAINT

BOATS = ("fog", "sandbank")
TASKS = (*BOATS, "BallRun", "PointCircle1")
EPISODES = {"fog": 200, "sandbank": 200, "BallRun": 30, "PointCircle1": 20}
LEVELS = {"package": None, "mean": None, "q90": 0.9}
"""The guesses; None is the mean."""
MARGINS = {
    "fog": (0.0, 1.0, 2.0, 4.0, 8.0),
    "sandbank": (0.0, 1.0, 2.0, 4.0, 8.0),
    "BallRun": (-4.0, -2.0, -1.0, 0.0, 1.0),
    "PointCircle1": (0.0, 1.0, 2.0, 4.0, 8.0),
}
"""Deltas of the grid, in margins. A delta below 0 shifts the guess down."""
UPDATES, BATCH, RATE = 5_000, 256, 1e-3
HELD_OUT, MISCOVERAGE = 0.2, 0.1
BOAT_UPDATES, TRIPS = 6_000, 400
RATES = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Rates of violating episodes at which the curves are compared."""
FOG, CLEAR, FOG_BEGINS, SANDBANK = 0.15, 0.01, -0.35, 0.2


# -- the boats -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MurkyTask(BoatTask):
    """The boat with a third state: what is added to the radius of the lower rock, in metres."""

    spread: float = 0.0
    """Largest third state, in metres."""
    last_x: float = float(STATE_HIGH[0])
    """Largest x of a start, in metres."""

    state_low = np.array([*STATE_LOW, -SANDBANK])
    state_high = np.array([*STATE_HIGH, SANDBANK])
    constraint_source = None

    def next_state(self, state: Array, action: Array) -> Array:
        """Return the states (..., 3) after a step, in which the radius stays the same."""
        moved = super().next_state(state[..., :2], action)
        return np.concatenate([moved, state[..., 2:]], axis=-1)

    def constraint(self, state: Array) -> Array:
        """Return h (...) in metres."""
        lower = ROCK_RADII[1] - np.linalg.norm(state[..., :2] - ROCK_CENTRES[1], axis=-1)
        return np.maximum(constraint(state[..., :2]), lower + state[..., 2])

    def reward(self, state: Array) -> Array:
        """Return minus the distance (...) to the goal, in metres."""
        return super().reward(state[..., :2])

    def draw_start(self, generator: np.random.Generator) -> Array:
        """Return a start (3,) at an x of at most `last_x`."""
        place = generator.uniform(STATE_LOW, [self.last_x, STATE_HIGH[1]])
        return np.append(place, generator.uniform(-self.spread, self.spread))


class Murk:
    """The world of boats that observe their positions (2,), in fog or near a rock of unknown size.

    Args:
        kind: "fog" or "sandbank".
        upstream: Whether every episode starts at x < -2.3, from where both rocks can be avoided.
    """

    horizon = BoatTask.max_episode_steps

    def __init__(self, kind: str, upstream: bool) -> None:
        self._foggy = kind == "fog"
        last_x = -2.3 if upstream else float(STATE_HIGH[0])
        self._task = MurkyTask(spread=0.0 if self._foggy else SANDBANK, last_x=last_x)

    @property
    def h(self) -> np.ndarray:
        """(n,) h of the states, in metres."""
        return self._task.constraint(self._states)

    def start(self, certified: object, episodes: int, seed: int) -> tuple[np.ndarray, float]:
        """Start episodes, whether or not their starts are certified (see `values_play.World`)."""
        self._rng = np.random.default_rng(seed)
        self._states = np.stack([self._task.draw_start(self._rng) for _ in range(episodes)])
        return self._seen(), 1.0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `values_play.World`."""
        rewards = self._task.reward(self._states)
        self._states = self._task.next_state(self._states, np.asarray(actions, np.float64))
        return self._seen(), rewards, (self.h > 0).astype(float), np.zeros(len(rewards), bool)

    def _seen(self) -> np.ndarray:
        place = self._states[:, :2]
        if self._foggy:
            deviation = np.where(place[:, 1:] > FOG_BEGINS, FOG, CLEAR)
            place = place + self._rng.normal(0.0, 1.0, place.shape) * deviation
        return np.clip(place, STATE_LOW, STATE_HIGH).astype(np.float32)


class AllStarts(SuiteWorld):
    """The world of a benchmark task, in which every start counts."""

    def start(self, certified: object, episodes: int, seed: int) -> tuple[np.ndarray, float]:
        """See `values_play.World`."""
        return super().start(lambda rows: np.ones(len(rows), bool), episodes, seed)


def trips(kind: str, seed: int) -> OfflineDataset:
    """Return a log of the demo's helmsmen, who see what the shield sees."""
    world, helmsmen, rng = Murk(kind, upstream=False), Helmsmen(), np.random.default_rng(seed)
    columns: dict[str, list[np.ndarray]] = {}
    seen, _ = world.start(None, TRIPS, seed)
    for t in range(world.horizon):
        actions, h = helmsmen(seen, rng).astype(np.float32), world.h
        after, rewards, costs, _ = world.step(actions)
        row = {
            "observations": seen,
            "actions": actions,
            "rewards": rewards,
            "costs": costs,
            "next_observations": after,
            "constraints": h,
            "next_constraints": world.h,
            "terminated": np.zeros(TRIPS, bool),
            "truncated": np.full(TRIPS, t == world.horizon - 1),
        }
        for name, column in row.items():
            columns.setdefault(name, []).append(column)
        seen = after
    rows = {name: np.concatenate(np.stack(each, axis=1)) for name, each in columns.items()}
    spaces = {"observation_space": BoatTask().observation_space()}
    return OfflineDataset.from_arrays(action_space=BoatTask().action_space(), **spaces, **rows)


def log_of(task: str, seed: int, data: Path, folder: Path) -> OfflineDataset:
    """Return a task's log, collected now or read from its file."""
    if task not in BOATS:
        return read_log(data, task)
    path = folder / f"{task}_{seed}.hdf5"
    if not path.exists():
        trips(task, seed).save(path)
    return OfflineDataset.load(path)


def guessing(task: str, seed: int, data: Path, folder: Path) -> Shield:
    """Return a task's shield, whose network estimates h, trained now or read from its file."""
    if task not in BOATS:
        return shield_of(task, seed, data, folder).with_constraint(None)
    path = folder / f"{task}_shield_{seed}.safetensors"
    if not path.exists():
        trainer = ShieldTrainer(ShieldConfig(seed=seed), device="cpu")
        checkpoint = path.with_suffix(".checkpoint")
        trainer.fit(log_of(task, seed, data, folder), steps=BOAT_UPDATES, checkpoint=checkpoint)
        trainer.shield().save(path)
        checkpoint.unlink()
    return Shield.load(path)


# -- the guesses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """The states of a log that a guess learns from, and those that conformalise it."""

    inputs: Float
    """(n, obs) normalised observations, also those of the episodes' last states."""
    h: Float
    """(n,) labels, in units of h."""
    episode: np.ndarray
    """(n,) number of the episode of each state."""
    near: np.ndarray
    """The eighth of the indices whose states lie nearest to V_h = 0, as in `SafetyLog.refresh`."""
    held_out: np.ndarray
    """(n,) bool, whether the episode is held out."""

    @classmethod
    def of(cls, log: OfflineDataset, shield: Shield, seed: int) -> States:
        """Return the states of a log; `seed` draws the episodes that are held out."""
        last = log.episode_starts + log.episode_lengths - 1
        rows = np.concatenate([log.observations, log.next_observations[last]])
        number = np.repeat(np.arange(log.num_episodes), log.episode_lengths)
        episode = np.concatenate([number, np.arange(log.num_episodes)])
        states = [shield.model.states(part) for part in np.array_split(rows, 64)]
        values = np.concatenate([one.value for one in states])
        near = np.argsort(np.abs(values))[: len(values) // 8]
        drawn = np.random.default_rng(seed).permutation(log.num_episodes)
        held_out = np.isin(episode, drawn[: round(HELD_OUT * log.num_episodes)])
        h = np.concatenate([log.constraints, log.next_constraints[last]])
        inputs = np.concatenate([one.inputs for one in states])
        return cls(inputs, h.astype(np.float32), episode, near, held_out)


def fitted(states: States, network: EnsembleMLP, level: float | None, seed: int) -> Weights:
    """Return the weights of a network that estimates h, or its quantile, in units of `network`.

    `states` holds h in these units. Half of each batch is drawn near V_h = 0, as in training.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, h = torch.from_numpy(states.inputs), torch.from_numpy(states.h)
    known = torch.from_numpy(np.flatnonzero(~states.held_out))
    near = torch.from_numpy(states.near[~states.held_out[states.near]])
    weights = {name: w.requires_grad_() for name, w in network.init(generator).items()}
    adam = torch.optim.Adam(weights.values(), lr=RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda count: min(1.0, max(2.0 - 2.0 * count / UPDATES, 0.02))
    )
    for _ in range(UPDATES):
        rows = torch.cat(
            [
                part[torch.randint(len(part), (BATCH,), generator=generator)]
                for part in (known, near)
            ]
        )
        error = h[rows] - network(weights, inputs[rows])[0, :, 0]
        loss = (
            error.square() if level is None else torch.maximum(level * error, (level - 1) * error)
        )
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
        falling.step()
    return {name: w.detach().numpy() for name, w in weights.items()}


def conformal(scores: np.ndarray, miscoverage: float) -> float:
    """Return the ceil((1 - miscoverage)(m + 1))-th smallest of m scores, or infinity."""
    rank = math.ceil((1.0 - miscoverage) * (len(scores) + 1))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def shifted(shield: Shield, weights: Weights, by: float) -> Shield:
    """Return the shield with these weights of "constraint", plus a number in units of h."""
    last = f"{len(weights) // 2 - 1}.bias"
    moved = weights[last] + np.float32(by / shield.model.scale.spread)
    networks = {**shield.model.networks, CONSTRAINT: {**weights, last: moved}}
    return dataclasses.replace(shield, model=dataclasses.replace(shield.model, networks=networks))


def check_constant(shield: Shield, weights: Weights, log: OfflineDataset) -> None:
    """Raise unless a constant on top of a guess decides as the same addition to delta does."""
    rows = np.linspace(0, len(log) - 1, 2_000).astype(int)
    by = margin_of(shield)
    here, taken = log.observations[rows], log.actions[rows]
    plain, moved = (shifted(shield, weights, more).row_values(here, taken) for more in (0.0, by))
    if not np.allclose(plain + by, moved, rtol=0.0, atol=1e-4 * shield.model.scale.spread):
        raise AssertionError("a constant on top of the guess is not a larger delta")


# -- the cells -----------------------------------------------------------------------------------


def played(shield: Shield, task: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Play the reckless agent behind a shield."""
    world: World = Murk(task, upstream=True) if task in BOATS else AllStarts(task)
    agent: Agent = RecklessHelmsmen()
    if task not in BOATS:
        ppo: Any = trained(task, "ppo", seed, data, folder)
        agent = lambda observations, rng: ppo.predict(observations)[0]  # noqa: E731
    return play(shield, "escape", 0.0, world, agent, EPISODES[task], 3_000_000 + seed)


def cell(task: str, name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train one guess, and play behind it at all deltas."""
    shield, log = guessing(task, seed, data, folder), log_of(task, seed, data, folder)
    scale, own, margin = shield.model.scale, shield.model.networks[CONSTRAINT], margin_of(shield)
    states = States.of(log, shield, seed)
    network = EnsembleMLP(states.inputs.shape[1], 1, hidden_widths(own))
    weights = own
    if name != "package":
        unit = (states.h - scale.offset) / scale.spread
        scaled = dataclasses.replace(states, h=unit.astype(np.float32))
        weights = fitted(scaled, network, LEVELS[name], seed)
    check_constant(shield, weights, log)

    def guess(of: Weights) -> np.ndarray:
        return np.asarray(scale.offset + scale.spread * network(of, states.inputs)[0, :, 0])

    residual, rest = states.h - guess(weights), states.held_out
    held = states.episode[rest]
    scores = np.array([residual[rest][held == episode].max() for episode in np.unique(held)])
    constant = conformal(scores, MISCOVERAGE)
    # What the caution adds to the mean, near the boundary: its mean is `-centre`.
    added = (guess(weights) - guess(own))[states.near]
    centre = -float(added.mean())
    points = {f"{margins:g}": centre + margins * margin for margins in MARGINS[task]}
    if name != "package":
        points["conformal"] = constant
    rows = {}
    for point, by in points.items():
        acting = shifted(shield, weights, by)
        compute = partial(played, acting, task, seed, data, folder)
        rows[point] = once(f"{task}_{name}_{point}_{seed}", compute, folder=folder / "guess")
    return {
        "task": task,
        "guess": name,
        "seed": seed,
        "margin": margin,
        "constant": constant,
        "added": -centre,
        "added_spread": float(added.std()),
        "held_out_rms": float(np.sqrt(np.square(residual[rest]).mean())),
        "held_out_covered": float((residual[rest] <= 0.0).mean()),
        "points": rows,
    }


# -- the table -----------------------------------------------------------------------------------


def replaced_at(row: dict[str, Any], rate: float) -> float:
    """Return the least share of replaced steps on a guess's curve where at most `rate` violate.

    The curve is linear between the deltas of the grid. Infinity means that no point is so safe.
    """
    grid = [row["points"][f"{margins:g}"] for margins in MARGINS[row["task"]]]
    at = np.linspace(0.0, len(grid) - 1.0, 1_001)
    violating, replaced = (
        np.interp(at, np.arange(len(grid)), values)
        for values in (
            [point["violating"] / point["episodes"] for point in grid],
            [point["replaced"] for point in grid],
        )
    )
    return float(replaced[violating <= rate].min(initial=math.inf))


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the stored cells as Markdown tables."""
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += [
            f"### {task}",
            "",
            "| guess | delta, margins | violating | cost | replaced | return |",
            "|---|---|---|---|---|---|",
        ]
        mine = [row for row in rows if row["task"] == task]
        names = [name for name in LEVELS if any(row["guess"] == name for row in mine)]
        for name in names:
            cells = [row for row in mine if row["guess"] == name]
            for point in cells[0]["points"]:
                each = [row["points"][point] for row in cells]
                told = ", ".join(str(one["violating"]) for one in each)
                means = {key: np.mean([one[key] for one in each]) for key in _MEANS}
                lines.append(
                    f"| {name} | {point} | {told} of {each[0]['episodes']} | {means['cost']:.2f} | "
                    f"{means['replaced']:.1%} | {means['return']:.1f} |"
                )
        lines += [
            "",
            "| replaced where the share violating is at most | "
            + " | ".join(f"{rate:.0%}" for rate in RATES)
            + " | adds near the boundary, margins | covers of the held-out | constant, margins |",
            "|---|" + "---|" * (len(RATES) + 3),
        ]
        for name in names:
            cells = [row for row in mine if row["guess"] == name]
            shares = (", ".join(_share(replaced_at(row, rate)) for row in cells) for rate in RATES)
            added, spread, covered, constant = (
                np.mean([row[key] / (1.0 if key == "held_out_covered" else row["margin"])
                         for row in cells])
                for key in ("added", "added_spread", "held_out_covered", "constant")
            )  # fmt: skip
            lines.append(
                f"| {name} | " + " | ".join(shares) + f" | {added:.2f} +- {spread:.2f} | "
                f"{covered:.1%} | {constant:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


_MEANS = ("cost", "replaced", "return")


def main() -> None:
    """Run the cells without a stored result, each in its own process, and print the tables."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stored = "{task}_guess_{name}_{seed}"
    rows = run_cells(__file__, __doc__, "guesses", list(LEVELS), cell, stored, TASKS)
    print(machine())
    print(tables(rows))


if __name__ == "__main__":
    main()
