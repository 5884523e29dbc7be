"""Test shields outside the support of the data, on a boat's log without half of the directions.

    python benchmarks/support.py              # 3 seeds; resumes; prints the table, draws a picture

The helmsmen never steer a course with dy < 0. A shield is learned from 400 of their trips, the
level of the support test is set with 100 others, and 100 new ones show whether its promise holds.
The script measures

- the shares of never-shown actions and of the log's own that are accepted without and with the
  test, in states of the new trips with V_h <= -delta;
- how well the scores distinguish logged actions from never-shown ones, and from actions that were
  logged in other states;
- the number of trips of random proposals that hit a rock, from starts with V_h <= -delta. This is
  measured in two rivers that give the same log: the boat's, and one with an undertow that pulls
  down a boat that steers down.

"backup" is a shield that is trained with `support_weight` and has its test.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import torch
from common import RESULTS, machine, once
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from safeshield import OfflineDataset, Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import STATE_HIGH, STATE_LOW, BoatTask
from safeshield.envs.vector import StateVectorEnv
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy

BOAT = "safeshield/Boat-v0"
STEPS, TRIPS, NEW_TRIPS, DELTA = 6000, 500, 100, 0.05
KEYS = (
    "never shown accepted",
    "... of full strength, 20 degrees down or more",
    "new trips' own accepted",
    "area, against never shown",
    "area, against other states' actions",
    "new trips with too many unseen steps",
)
BLUE, VERMILION = "#0072b2", "#d55e00"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "support.png"


class Upward(Helmsmen):
    """Helmsmen that never steer a course with dy < 0."""

    def __call__(self, observations: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Return the courses (n, 2)."""
        courses = super().__call__(observations, rng)
        return np.stack([courses[:, 0], np.abs(courses[:, 1])], axis=-1)


@dataclass(frozen=True, eq=False)
class Undertow(BoatTask):
    """The river of the boat, with an undertow of pull * ay^2 on actions with ay < 0."""

    pull: float = 20.0

    def next_state(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """See `BoatTask.next_state`."""
        reached = super().next_state(state, action)
        down = np.minimum(np.asarray(action)[..., 1], 0.0)
        y = reached[..., 1] - self.dt * self.pull * down * down
        return np.stack([reached[..., 0], np.clip(y, STATE_LOW[1], STATE_HIGH[1])], axis=-1)


def logs(seed: int) -> tuple[OfflineDataset, OfflineDataset, OfflineDataset]:
    """Return the trips for training, those that set the level, and new ones."""
    log = collect(gym.make(BOAT), Upward(), episodes=TRIPS, seed=1000 + seed)
    new = collect(gym.make(BOAT), Upward(), episodes=NEW_TRIPS, seed=2000 + seed)
    return *log.split(0.8, seed=0), new


def trained(seed: int, weight: float | None) -> Shield:
    """Train or load the shield of one seed; `shields` adds its test."""
    path = RESULTS / f"support_{seed}{'' if weight is None else '_backup'}.safetensors"
    if not path.exists():
        train, held_out, _ = logs(seed)
        config = ShieldConfig(
            seed=seed, phase_shares=(0.55, 0.3, 0.15), support_weight=weight, support_held_out=0.2
        )
        # With the support in the backup, the trainer holds out episodes itself.
        log = train if weight is None else OfflineDataset.concat([train, held_out])
        shield = ShieldTrainer(config, device="cpu").fit(log, steps=STEPS).shield()
        RESULTS.mkdir(parents=True, exist_ok=True)
        shield.save(path)
    return Shield.load(path)


def shields(seed: int) -> dict[str, Shield]:
    """Return the shields without the test, with each score, and with the term in the backup."""
    plain, held_out = trained(seed, None).with_delta(DELTA), logs(seed)[1]
    return {
        "without": plain,
        "noise": plain.with_support(held_out),
        "ensemble": plain.with_support(held_out, score="ensemble"),
        "backup": trained(seed, 1.0).with_delta(DELTA),
    }


def never_shown(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return actions (count, 2) from the lower half of the box."""
    actions = rng.uniform(-1.0, 1.0, (count, 2))
    return np.stack([actions[:, 0], -np.abs(actions[:, 1])], axis=-1).astype(np.float32)


def scores_of(shield: Shield, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return the scores (n,) of actions in the shield's support test."""
    assert shield.support is not None
    return shield.support.scores(shield.model, shield.states(observations), actions)


def accepted(shield: Shield, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return whether the shield accepts each action (n,), without computing replacements."""
    passes = np.asarray(shield.value(observations, actions)) <= shield.threshold
    if shield.support is not None:
        passes &= shield.support.accepts(shield.model, shield.states(observations), actions)
    return passes


def area(high: np.ndarray, low: np.ndarray) -> float:
    """Return the area under the ROC curve: P(high > low)."""
    order = np.sort(low)
    return float(np.searchsorted(order, high).mean() / len(order))


def acceptance(seed: int, name: str) -> dict[str, Any]:
    """Measure the accepted shares, and how well the score distinguishes actions."""
    _, _, new = logs(seed)
    rng = np.random.default_rng(seed)
    unseen = never_shown(len(new), rng)
    elsewhere = new.actions[rng.permutation(len(new))]
    angle = rng.uniform(np.pi + np.pi / 9, 2 * np.pi - np.pi / 9, len(new))
    steep = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    shield = shields(seed)[name]
    inside = np.asarray(shield.value(new.observations)) <= shield.threshold
    out: dict[str, Any] = {
        what: float(accepted(shield, new.observations[inside], actions[inside]).mean())
        for what, actions in (
            ("never shown accepted", unseen),
            ("... of full strength, 20 degrees down or more", steep),
            ("new trips' own accepted", new.actions),
        )
    }
    if shield.support is None:
        return out
    own = scores_of(shield, new.observations, new.actions)
    for what, others in (("never shown", unseen), ("other states' actions", elsewhere)):
        out[f"area, against {what}"] = area(own, scores_of(shield, new.observations, others))
    below = np.add.reduceat(own < shield.support.record.level, new.episode_starts)
    too_often = below > shield.support.record.share * new.episode_lengths
    out["new trips with too many unseen steps"] = float(too_often.mean())
    return out


def violations(seed: int, name: str, river: str, episodes: int) -> dict[str, Any]:
    """Count the trips of random proposals that hit a rock, from starts with V_h <= -delta."""
    shield = shields(seed)[name]
    rng = np.random.default_rng(5000 + seed)
    starts = rng.uniform(STATE_LOW, STATE_HIGH, (4 * episodes, 2))
    inside = np.asarray(shield.value(starts.astype(np.float32))) <= shield.threshold
    task = {"boat": BoatTask, "undertow": Undertow}[river]()
    envs = StateVectorEnv(task, episodes, max_episode_steps=400)
    acting = ShieldedProposals(shield, as_batch_policy("random", shield.action_space))
    runs = run_episodes(
        envs, acting, episodes, seed, reset_options={"state": starts[inside][:episodes]}
    )
    return {
        "violating": sum(run.violated for run in runs),
        "episodes": len(runs),
        "starts_kept": float(inside.mean()),
        "replaced": float(np.mean(acting.interventions())),
        "mean_dy": float(np.mean([run.actions[:, 1].mean() for run in runs])),
    }


def draw(seed: int) -> None:
    """Draw the accepted actions of one state, without and with the test, and the ROC curves."""
    found, (train, _, new) = shields(seed), logs(seed)
    state = np.array([0.6, 0.0], np.float32)
    side = np.linspace(-1.0, 1.0, 161)
    box = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2).astype(np.float32)
    near = np.linalg.norm(train.observations - state, axis=1) < 0.25
    shown = np.random.default_rng(0).permutation(train.actions[near])[:700]
    pale, grey = "#cfe6f5", "#d9d9d9"
    style = {"font.size": 11, "axes.titlesize": 12, "legend.frameon": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13.0, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3)
        titles = {"without": "Without the support test", "noise": "With the support test"}
        for panel, (name, title) in zip(axes, titles.items(), strict=False):
            passes = accepted(found[name], np.tile(state, (len(box), 1)), box)
            passes = passes.reshape(len(side), len(side))
            panel.contourf(side, side, passes, [-0.5, 0.5, 1.5], colors=[grey, pale])
            panel.plot(*shown.T, ".", color=BLUE, markersize=2.5)
            panel.axhline(0.0, color=VERMILION, linewidth=1.4, linestyle=(0, (5, 3)))
            panel.set_title(f"{title}\n{passes[side < 0].mean():.0%} of the lower half accepted")
            panel.set_aspect("equal")
            panel.set_xlabel("action, along the river")
            panel.set_xticks([-1, -0.5, 0, 0.5, 1])
            panel.set_yticks([-1, -0.5, 0, 0.5, 1])
        axes[0].set_ylabel("action, across the river")
        _curves(axes[2], found, new, np.random.default_rng(seed))
        keys = {
            "accepted": Line2D([], [], marker="s", color=pale, linestyle="", markersize=11),
            "replaced": Line2D([], [], marker="s", color=grey, linestyle="", markersize=11),
            "logged within 0.25 m of the state (0.6, 0)": Line2D(
                [], [], marker=".", color=BLUE, linestyle=""
            ),
            "never logged below": Line2D([], [], color=VERMILION, linestyle=(0, (5, 3))),
            "calibrated level": Line2D([], [], marker="o", color="#777777", linestyle=""),
        }
        figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=5)
        figure.savefig(PICTURE, dpi=130)


def _curves(
    axes: Any,  # noqa: ANN401 - matplotlib has no types
    found: dict[str, Shield],
    new: OfflineDataset,
    rng: np.random.Generator,
) -> None:
    unseen = never_shown(len(new), rng)
    elsewhere = new.actions[rng.permutation(len(new))]
    areas: list[float] = []
    for name, colour, at in (("noise", BLUE, 0.23), ("ensemble", VERMILION, 0.16)):
        shield = found[name]
        own = scores_of(shield, new.observations, new.actions)
        levels = np.quantile(own, np.linspace(0, 1, 400))
        for actions, line in ((unseen, "-"), (elsewhere, (0, (4, 2)))):
            other = scores_of(shield, new.observations, actions)
            caught = np.searchsorted(np.sort(other), levels) / len(other)
            alarms = np.searchsorted(np.sort(own), levels) / len(own)
            axes.plot(alarms, caught, color=colour, linestyle=line, linewidth=1.8)
            areas.append(area(own, other))
        assert shield.support is not None
        level = shield.support.record.level
        hits = (scores_of(shield, new.observations, unseen) < level).mean()
        axes.plot(
            (own < level).mean(), hits, "o", color=colour, mec="white", markersize=9, zorder=5
        )
        told = f"{name}: {areas[-2]:.3f}, dashed {areas[-1]:.3f}"
        axes.text(0.38, at, told, color=colour, fontsize=9.5)
    axes.text(0.38, 0.3, "area under the curve", color="#444444", fontsize=9.5)
    axes.text(
        0.38, 0.0, "dashed: against actions that\nwere logged in other states",
        color="#444444", fontsize=9.5,
    )  # fmt: skip
    axes.set_title("Logged actions against never-shown ones\n(ROC, on new trips)")
    axes.set_box_aspect(1)
    axes.set_xlabel("share of the log's own actions called unseen")
    axes.set_ylabel("share of the others called unseen")


def main() -> None:
    """Run the parts without a stored result, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=300, help="trips of random proposals")
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    columns: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows: dict[str, Any] = {}
        for name in ("without", "noise", "ensemble", "backup"):
            work = partial(acceptance, seed, name)
            told = once(f"support_{seed}_{name}_accepted", work, redo=arguments.redo)
            rows |= {f"{name}: {key}": told[key] for key in KEYS if key in told}
        for name in ("without", "noise", "backup"):
            for river in ("boat", "undertow"):
                count = arguments.episodes
                found = once(
                    f"support_{seed}_{name}_{river}_{count}",
                    partial(violations, seed, name, river, count),
                    redo=arguments.redo,
                )
                rows |= {
                    f"{name}, {river}: {key}": found[key]
                    for key in ("violating", "replaced", "mean_dy", "starts_kept")
                }
        columns.append(rows)
    for key, first in columns[0].items():
        if isinstance(first, int | float):
            print(f"{key:58}", *(f"{column[key]:>9.4g}" for column in columns))
    draw(arguments.seeds[0])


if __name__ == "__main__":
    main()
