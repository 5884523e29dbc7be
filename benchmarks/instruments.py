"""What shadow mode, the support test, the adaptive threshold and the monitor show of four changes.

    python benchmarks/instruments.py    # trains a shield once; resumes; prints the table, draws

A boat's shield is learned from trips that never steer a course with dy < 0 (`support.py`), gets a
support test, and is calibrated with the agent that made the log. It is deployed on 10 boats for 8
waves of episodes as calibrated, and for 8 more after a change: none; the current rises from 2.0 to
3.5 m/s; the agent steers courses that the log never showed; or episodes start close to the rocks.
All episodes begin in certified states. The deployed shield has an adaptive threshold and a monitor.
A second run with the same seeds is in shadow mode. There is one run of each, so the picture is an
illustration; `monitor.py` and `drift.py` measure delays.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from common import RESULTS, machine, once
from support import BOAT, Upward, logs, trained

from safeshield import AdaptiveThreshold, PromiseMonitor, Shield
from safeshield.data.scatter import BLACK, BLUE, GREY, VERMILION, saved_figure
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import MAX_EPISODE_STEPS, BoatTask, BoatVectorEnv
from safeshield.evaluation.episodes import draw_episodes
from safeshield.monitoring import IN_DOUBT, REVOKED
from safeshield.wrappers import VectorSafetyShield

BOATS = 10
BEFORE, AFTER, REFERENCE = 8, 8, 200
EPSILON, CONFIDENCE = 0.05, 0.95
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "instruments.png"
ROWS = {
    "shadow": "shadow mode:\nsteps that would\nbe replaced, %",
    "unseen": "support test:\nproposals unlike\nthe log's, %",
    "threshold": "adaptive threshold:\nmean, m",
    "evidence": "monitor:\nevidence $E_t$",
}


@dataclass(frozen=True)
class Change:
    """What is different after the first episodes."""

    current: float = 2.0
    agent: Callable[[], Helmsmen] = Upward
    low: tuple[float, float] = (-3.0, -2.0)
    """Lowest corner of the box of starts."""
    high: tuple[float, float] = (2.0, 2.0)
    """Highest corner of the box of starts."""


CHANGES = {
    "nothing": Change(),
    "the current": Change(current=3.5),
    "the agent": Change(agent=Helmsmen),
    "the starts": Change(low=(-2.0, -1.8), high=(-0.8, 1.0)),
}


def calibrated() -> Shield:
    """Return the shield with its support test and its record; calibrate it at the first call."""
    path = RESULTS / "instruments.safetensors"
    if not path.exists():
        tested = trained(0, None).with_support(logs(0)[1])
        agent = Upward()
        shield = tested.calibrate(
            gym.make(BOAT), policy=agent, epsilon=EPSILON, confidence=CONFIDENCE, seed=0
        )
        shield.save(path)
    return Shield.load(path)


def starts(change: Change, shield: Shield, rng: np.random.Generator) -> np.ndarray:
    """Return a certified start (BOATS, 2) for each boat."""
    drawn = rng.uniform(change.low, change.high, (40 * BOATS, 2))
    return drawn[shield.row_values(drawn.astype(np.float32)) <= shield.threshold][:BOATS]


def deploy(name: str, mode: str) -> dict[str, Any]:
    """Return the signals of each wave of one deployment, and the episodes that violate."""
    shield = calibrated()
    assert shield.support is not None
    states: dict[str, int] = {}
    boats = BoatVectorEnv(BOATS)
    monitor = None
    if mode == "shadow":
        env = VectorSafetyShield(boats, shield, mode="shadow")
    else:
        played, _ = draw_episodes(gym.make(BOAT), Upward(), REFERENCE, 7, shield, shield)
        monitor = PromiseMonitor(
            shield, reference=played,
            on_change=lambda m: states.setdefault(m.state, m.report().episodes),
        )  # fmt: skip
        adaptive = AdaptiveThreshold(horizon=150)
        env = VectorSafetyShield(boats, shield, adaptive=adaptive, monitor=monitor)
    rng = np.random.default_rng(1)
    rows: dict[str, list[float]] = {}
    for wave in range(BEFORE + AFTER):
        change = CHANGES[name] if wave >= BEFORE else Change()
        boats.task = BoatTask(change.current)
        agent = change.agent()
        agent.start_wave(BOATS)
        positions, infos = env.reset(options={"state": starts(change, shield, rng)})
        sums = {one: np.zeros(BOATS) for one in ("replaced", "threshold", "unseen")}
        violated = infos["constraint"] > 0.0
        for _ in range(MAX_EPISODE_STEPS):
            actions = agent(positions, rng).astype(np.float32)
            inputs = shield.model.unjudged(positions)
            sums["unseen"] += ~shield.support.accepts(shield.model, inputs, actions)
            positions, _, _, _, infos = env.step(actions)
            violated |= infos["constraint"] > 0.0
            sums["threshold"] += infos["shield/threshold"]
            sums["replaced"] += infos.get("shield/would_intervene", 0.0)
        means = {one: float(total.mean()) / MAX_EPISODE_STEPS for one, total in sums.items()}
        told = {"violated": float(violated.sum())}
        if monitor is None:
            told["shadow"] = 100.0 * means["replaced"]
        else:
            told["unseen"] = 100.0 * means["unseen"]
            told["threshold"] = means["threshold"]
            told["evidence"] = monitor.evidence
        for one, value in told.items():
            rows.setdefault(one, []).append(value)
    ends = {"doubt": states.get(IN_DOUBT), "revoked": states.get(REVOKED)}
    return {"change": name, "mode": mode, "delta": shield.delta, **rows, **ends}


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draw each signal (rows) of each change (columns)."""
    with saved_figure(PICTURE, 11.0, 8.2) as figure:
        panels = figure.subplots(len(ROWS), len(CHANGES), sharex=True, sharey="row")
        at = np.arange(1, BEFORE + AFTER + 1)
        for column, (name, one) in enumerate(found.items()):
            for row, (signal, label) in enumerate(ROWS.items()):
                panel = panels[row, column]
                panel.plot(at, one[signal], color=BLUE, linewidth=1.2)
                panel.axvline(BEFORE + 0.5, color=BLACK, linewidth=0.8, linestyle=":")
                panel.grid(axis="y", color=GREY, linewidth=0.6)
                panel.tick_params(labelsize=9)
                if column == 0:
                    panel.set_ylabel(label, fontsize=9)
                if row == 0:
                    panel.set_title(f"changes: {name}", fontsize=11)
                if row == len(ROWS) - 1:
                    panel.set_xlabel(f"wave of {BOATS} episodes", fontsize=9)
            last = panels[-1, column]
            last.set_yscale("log")
            limit = 1.0 / (1.0 - CONFIDENCE)
            last.axhline(limit, color=VERMILION, linewidth=1, linestyle="--")
            last.text(0.5, 1.15 * limit, "revoked from here on", fontsize=8, va="bottom")
            last.set_ylim(None, 6.0 * limit)
            for key, text in (("doubt", "in doubt"), ("revoked", "revoked")):
                if one[key] is not None:
                    at_wave = one[key] / BOATS
                    last.axvline(at_wave, color=VERMILION, linewidth=1)
                    last.annotate(
                        text, (at_wave, 0.9), xycoords=("data", "axes fraction"), xytext=(4, 0),
                        textcoords="offset points", va="top", fontsize=9, color=VERMILION,
                    )  # fmt: skip


def main() -> None:
    """Run the deployments without a stored result, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # The monitor and the adaptive threshold warn.
    print(machine())
    shield = calibrated()
    print(shield.record.promise if shield.record else "")
    found = {}
    for name in CHANGES:
        both = [
            once(
                f"instruments_{name.replace(' ', '_')}_{mode}",
                lambda name=name, mode=mode: deploy(name, mode),
                redo=arguments.redo,
            )
            for mode in ("shadow", "shield")
        ]
        found[name] = {**both[0], **both[1], "shadow_violated": both[0]["violated"]}
    heads = ("change", "violating: no shield", "shield", "would replace", "unseen", "threshold",
             "E_t", "in doubt", "revoked")  # fmt: skip
    print(*(f"{head:>20}" for head in heads))
    for name, one in found.items():
        cells = [name]
        for signal in ("shadow_violated", "violated"):
            halves = [sum(one[signal][:BEFORE]), sum(one[signal][BEFORE:])]
            cells.append(f"{halves[0]:.0f}, {halves[1]:.0f}")
        for signal in ("shadow", "unseen", "threshold"):
            halves = [np.mean(one[signal][:BEFORE]), np.mean(one[signal][BEFORE:])]
            cells.append(f"{halves[0]:.3g}, {halves[1]:.3g}")
        cells.append(f"{one['evidence'][BEFORE - 1]:.3g}, {one['evidence'][-1]:.3g}")
        for key in ("doubt", "revoked"):
            cells.append("no" if one[key] is None else f"after {one[key] - BOATS * BEFORE}")
        print(*(f"{cell:>20}" for cell in cells))
    draw(found)
    print(PICTURE)


if __name__ == "__main__":
    main()
