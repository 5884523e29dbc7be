"""A shield under faults of sensors and actuators: a matrix of kinds and strengths.

Each cell plays whole episodes of one agent, with the shield and without it, in an environment with
one fault (`rollouts.faults`) of one strength. All cells have the same seeds. Both runs of a cell
have the same starts: those with V_h <= -delta, by the observation that the faulty sensor shows.
What is found is a measurement. A promise under a fault comes from `Shield.calibrate` in the
environment with the fault.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from safeshield.data.scatter import BLUE, GREY, VERMILION, saved_figure
from safeshield.evaluation.episodes import Evaluation, ShieldLike, evaluate
from safeshield.evaluation.tables import Markup, aligned
from safeshield.files.schema import whole
from safeshield.rollouts.copies import check_env, is_vector_env
from safeshield.rollouts.faults import (
    ControlPeriod,
    DelayedActuator,
    DelayedSensor,
    DroppingSensor,
    LimitedActuator,
    NoisySensor,
    QuantisedSensor,
    StuckSensor,
)
from safeshield.rollouts.policies import default_name
from safeshield.shield.shield import Shield, as_shield
from safeshield.spaces.generic import Env


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault, and the strengths at which it is played, the weakest first."""

    name: str
    unit: str
    """Unit of the strengths, in words."""
    strengths: tuple[float, ...]
    put: Callable[[Env, float, list[float]], Env]
    """Function (env, strength, spread) that wraps the environment. The spread is the standard
    deviation of each entry of the observation in the shield's log."""
    needs: str
    """"observations" or "actions" where these must be a Box of floats; "" for any environment."""


def _times(factor: float, spread: list[float]) -> list[float]:
    return [float(factor * one) for one in spread]


FAULT_KINDS = (
    FaultKind(
        "noise", "sd of the log", (0.03, 0.1, 0.3),
        lambda env, x, spread: NoisySensor(env, std=_times(x, spread)), "observations",
    ),
    FaultKind(
        "bias up", "sd of the log", (0.03, 0.1, 0.3),
        lambda env, x, spread: NoisySensor(env, bias=_times(x, spread)), "observations",
    ),
    FaultKind(
        "bias down", "sd of the log", (0.03, 0.1, 0.3),
        lambda env, x, spread: NoisySensor(env, bias=_times(-x, spread)), "observations",
    ),
    FaultKind(
        "quantised", "sd of the log", (0.1, 0.3, 1.0),
        lambda env, x, spread: QuantisedSensor(env, _times(x, spread)), "observations",
    ),
    FaultKind(
        "lost, held", "share of steps", (0.1, 0.3, 0.6),
        lambda env, x, _: DroppingSensor(env, x), "observations",
    ),
    FaultKind(
        "lost, NaN", "share of steps", (0.1, 0.3, 0.6),
        lambda env, x, _: DroppingSensor(env, x, "nan"), "observations",
    ),
    FaultKind(
        "stuck", "probability a step", (0.003, 0.01, 0.03),
        lambda env, x, _: StuckSensor(env, x), "observations",
    ),
    FaultKind(
        "late observation", "steps", (1, 2, 4),
        lambda env, x, _: DelayedSensor(env, int(x)), "observations",
    ),
    FaultKind(
        "late action", "steps", (1, 2, 4),
        lambda env, x, _: DelayedActuator(env, int(x)), "actions",
    ),
    FaultKind(
        "weak actuator", "share of its reach", (0.8, 0.5, 0.25),
        lambda env, x, _: LimitedActuator(env, share=x), "actions",
    ),
    FaultKind(
        "slow actuator", "half widths a step", (0.5, 0.2, 0.1),
        lambda env, x, _: LimitedActuator(env, rate=x), "actions",
    ),
    FaultKind(
        "control period", "steps an action", (2, 3, 5),
        lambda env, x, _: ControlPeriod(env, int(x)), "",
    ),
)  # fmt: skip
"""The matrix of `stress`."""


@dataclass(frozen=True)
class StressCell:
    """The episodes under one fault of one strength."""

    fault: str
    """Name of the kind; "none" for the environment without a fault."""
    strength: float
    unit: str
    """Unit of the strength."""
    shielded: Evaluation
    """Episodes of the agent with the shield."""
    alone: Evaluation | None
    """Episodes of the agent without the shield, from the same starts. It is None where they cannot
    be played, for example because the agent returns NaN for an observation with NaN;
    `StressTest.left_out` has the reason."""


@dataclass(frozen=True)
class StressTest:
    """What `stress` has found. `table` is text, and `picture` draws it."""

    cells: tuple[StressCell, ...]
    """The first cell is that without a fault."""
    left_out: dict[str, str]
    """What was not played, and why: kinds that do not fit the environment's spaces; "kind strength"
    where the policy raised a ValueError, as an agent may that refuses NaN; and "kind strength
    without the shield" where only the episodes without it raised one."""

    def table(self, markup: Markup = "text") -> str:
        """Return a row for each cell; brackets are 95% intervals, in percent.

        A "-" stands for episodes that could not be played, see `left_out`.
        """
        header = (
            "fault", "strength", "violating with", "without", "replaced", "return with", "without",
        )  # fmt: skip
        rows = [header, *map(_row, self.cells)]
        if markup == "markdown":
            rows.insert(1, ("---",) * len(header))
            return "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return aligned(rows, 2)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        cells = [
            {
                "fault": one.fault,
                "strength": one.strength,
                "unit": one.unit,
                "shielded": one.shielded.to_json(),
                "alone": None if one.alone is None else one.alone.to_json(),
            }
            for one in self.cells
        ]
        return {"cells": cells, "left_out": self.left_out}

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw violations, replaced steps and return against the strength of each fault.

        What could not be played is listed below.

        Args:
            path: File to write: .png, .svg or .pdf.
        """
        healthy, *others = self.cells
        names = list(dict.fromkeys(one.fault for one in others)) or [healthy.fault]
        lacking = textwrap.fill(f"left out: {'; '.join(self.left_out)}", 140)
        height = 1.05 * len(names) + 0.9 + 0.15 * (lacking.count("\n") + 1)
        with saved_figure(path, 9.0, height) as figure:
            grid = figure.subplots(len(names), 3, squeeze=False)
            for name, panels in zip(names, grid, strict=True):
                _draw(name, [healthy, *(one for one in others if one.fault == name)], panels)
            for axes, title in zip(
                grid[0],
                ("violating episodes, %", "replaced steps, %", "return"),
                strict=True,
            ):
                axes.set_title(title, fontsize=9)
            if self.left_out:
                figure.supxlabel(lacking, fontsize=7)
            marks, labels = grid[0][0].get_legend_handles_labels()
            figure.legend(
                marks, labels, fontsize=8, frameon=False, ncols=2, loc="outside upper right"
            )


def stress(
    shield: ShieldLike,
    env: Env,
    policy: object = "random",
    *,
    alone: object = None,
    kinds: Sequence[str] | None = None,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int | None = None,
    deterministic: bool = False,
    policy_name: str | None = None,
    progress_bar: bool = False,
) -> StressTest:
    """Play an agent under a matrix of faults, with the shield and without it.

    Args:
        shield: The shield, in any form that `as_shield` takes.
        env: The environment without faults. It reports ``info["constraint"]`` or ``info["cost"]``.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes.
        alone: The policy in the episodes without the shield, where it is another one.
        kinds: Names of `FAULT_KINDS` to play; None for all that fit the environment's spaces.
        episodes: Number of episodes of each cell, with and without the shield.
        seed: Seed of starts, noise and faults.
        num_envs: Number of environments that step together.
        deterministic: The `deterministic` with which a policy's ``predict`` is called.
        policy_name: Name of the policy in the result.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: An argument is out of range, a kind is not known or does not fit the
            environment, the spaces differ, or the policy raises it without a fault.
        TypeError: `env` is a vector environment, which cannot be wrapped.
    """
    shield = as_shield(shield)
    check_env(env)
    if is_vector_env(env):
        raise TypeError(
            "env must be one environment, around which the faults are put, got a VectorEnv; pass "
            "gymnasium.make(id) and num_envs"
        )
    whole("episodes", episodes, least=1)
    chosen, left_out = _kinds(env, kinds)
    spread = shield.model.scaling.observation_spread.astype(np.float64).tolist()
    plays = [(one, x) for one in chosen for x in one.strengths]

    def play(where: Env, behind: Shield | None) -> Evaluation:
        acting = policy if behind is not None or alone is None else alone
        return evaluate(
            where,
            acting,
            episodes,
            seed,
            shield=behind,
            starts="certified",
            certified_by=shield,
            num_envs=num_envs,
            name=policy_name or default_name(policy),
            deterministic=deterministic,
        )

    def attempt(name: str, where: Env, behind: Shield | None) -> Evaluation | None:
        try:
            return play(where, behind)
        except ValueError as error:
            left_out[name] = str(error)
            return None

    with tqdm(total=1 + len(plays), disable=not progress_bar, unit="fault") as bar:
        cells = [StressCell("none", 0.0, "", play(env, shield), play(env, None))]
        bar.update()
        for kind, x in plays:
            faulty, name = kind.put(env, x, spread), f"{kind.name} {x:g}"
            shielded = attempt(name, faulty, shield)
            if shielded is not None:
                bare = attempt(f"{name} without the shield", faulty, None)
                cells.append(StressCell(kind.name, float(x), kind.unit, shielded, bare))
            bar.update()
    return StressTest(tuple(cells), left_out)


def _kinds(env: Env, names: Sequence[str] | None) -> tuple[list[FaultKind], dict[str, str]]:
    """Return the kinds to play, and those that do not fit the environment, with the reason."""
    known = {one.name: one for one in FAULT_KINDS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"kinds must be some of {list(known)}, got {unknown}")
    fits = {
        "": True,
        "observations": _floats(env.observation_space),
        "actions": _floats(env.action_space),
    }
    asked = list(known.values()) if names is None else [known[name] for name in names]
    left_out = {
        one.name: f"the environment's {one.needs} are no Box of floats"
        for one in asked
        if not fits[one.needs]
    }
    if names is not None and left_out:
        raise ValueError(
            f"kinds={list(left_out)} need observations and actions in a Box of floats, got "
            f"{env.observation_space} and {env.action_space}: leave them out, or put "
            "FlattenObservation around the environment"
        )
    return [one for one in asked if fits[one.needs]], left_out


def _floats(space: gym.Space[Any]) -> bool:
    return isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"


def _row(cell: StressCell) -> tuple[str, ...]:
    def rate(one: Evaluation | None) -> str:
        if one is None:
            return "-"
        low, high = one.violation_interval
        return f"{100 * one.violation_rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return (
        cell.fault,
        f"{cell.strength:g} {cell.unit}" if cell.unit else "-",
        rate(cell.shielded),
        rate(cell.alone),
        f"{100 * (cell.shielded.intervention_rate or 0.0):.1f}%",
        f"{cell.shielded.mean_return:.1f}",
        "-" if cell.alone is None else f"{cell.alone.mean_return:.1f}",
    )


def _draw(name: str, cells: Sequence[StressCell], panels: Sequence[Any]) -> None:
    """Draw the three panels of one fault; the first cell is that without it."""
    at = range(len(cells))
    ticks = ["none", *(f"{one.strength:g}" for one in cells[1:])]
    pairs: list[tuple[str, str, list[Evaluation | None]]] = [
        ("shield", BLUE, [one.shielded for one in cells]),
        ("no shield", VERMILION, [one.alone for one in cells]),
    ]
    for label, colour, played in pairs:
        places = [i for i, one in enumerate(played) if one is not None]
        runs = [one for one in played if one is not None]
        rates = [100 * one.violation_rate for one in runs]
        low, high = (
            [
                abs(100 * one.violation_interval[i] - rate)
                for one, rate in zip(runs, rates, strict=True)
            ]
            for i in (0, 1)
        )
        beside = -0.04 if label == "shield" else 0.04
        panels[0].errorbar(
            [one + beside for one in places], rates, yerr=(low, high), color=colour, marker="o",
            markersize=3, linewidth=1.2, elinewidth=0.8, label=label,
        )  # fmt: skip
        panels[2].plot(
            places, [one.mean_return for one in runs], color=colour, marker="o", markersize=3,
            linewidth=1.2,
        )  # fmt: skip
    replaced = [100 * (one.shielded.intervention_rate or 0.0) for one in cells]
    panels[1].plot(at, replaced, color=BLUE, marker="o", markersize=3, linewidth=1.2)
    for axes in panels:
        axes.set_xticks(list(at), ticks, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.5)
    panels[0].set_ylim(bottom=-2)
    panels[1].set_ylim(0.0, 1.15 * max(*replaced, 1.0))
    unit = f"\n({cells[-1].unit})" if cells[-1].unit else ""
    panels[0].set_ylabel(f"{name}{unit}", fontsize=7)
