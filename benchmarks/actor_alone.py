"""Test what SafeFQL's actor promises without a filter: one draw, and one draw +CP.

    python benchmarks/actor_alone.py                    # the boat; seeds 0, 1, 2; resumes
    python benchmarks/actor_alone.py --data FOLDER --agents FOLDER --tasks HopperVelocity

Each seed has 600 logged trips and 20,000 updates, with the settings of `boat.py`: one draw of the
student is executed at every step. Three actors have the same critics: "own", whose gate is the
default margin; "paper", trained anew with the gate at 0; and "cp", trained anew with the gate at
the delta of the record of "paper" (`SafeFQL.recalibrated`, "+CP"). Each is calibrated alone at
epsilon 0.01 and confidence 0.99 (`SafeFQL.calibrate`; at 0.05 and 0.95 where this finds no
threshold). "violating" counts 1,000 fresh episodes from certified starts. "safe_violating" counts
500 uniform starts of the exact safe set, as `boat.py` does; there the weights of "own" also play
with 16 candidates at several margins, and by the teacher's draws (`SafeFQL.acting_by`).

On a task of the field the agent is SafeFQL of `matrix.py`, from the folder --agents or trained now,
with one draw ("one"), and the actor that is trained anew at the delta of its record ("cp"), which
is calibrated at epsilon 0.05 and confidence 0.95. Both play the same starts, with their noise, and
their costs are divided by the limit 10.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from boat import BOAT, agent_policy, alone
from common import RESULTS, machine, once

import safeshield
from safeshield import CalibrationError, SafeFQL, SafeFQLConfig
from safeshield.demo.helmsmen import Helmsmen
from safeshield.evaluation.episodes import evaluate
from safeshield.exact import boat_value
from safeshield.rollouts.policies import as_batch_policy

Request = tuple[float, float]
REQUESTS: tuple[Request, ...] = ((0.01, 0.99), (0.05, 0.95))
FRESH, TIMES = 1000, (1, 2, 4, 8)


def certified(
    agent: SafeFQL, seed: int, env: gym.Env[Any, Any], requests: tuple[Request, ...] = REQUESTS
) -> tuple[SafeFQL, dict[str, Any]]:
    """Return an actor that is calibrated alone, or as it was, and what its calibration says."""
    message = ""
    for epsilon, confidence in requests:
        try:
            found = agent.calibrate(env, epsilon=epsilon, confidence=confidence, seed=seed)
        except CalibrationError as error:
            message = str(error)
            continue
        record = found.record
        assert record is not None
        return found, {
            "delta": record.delta,
            "epsilon": epsilon,
            "start_share": record.start_share,
            "promise": record.promise,
        }
    return agent, {"delta": None, "message": message}


def promised(agent: SafeFQL, seed: int) -> tuple[SafeFQL, dict[str, Any]]:
    """Calibrate an actor on the boat, and play fresh episodes from the starts that it certifies."""
    env = gym.make(BOAT)
    found, told = certified(agent, seed, env)
    if told["delta"] is not None:
        fresh = evaluate(
            env,
            agent,
            FRESH,
            70_000 + seed,
            starts="certified",
            certified_by=agent.shield().with_delta(told["delta"]),
            deterministic=False,
        )
        told["violating"] = fresh.violating
    return found, told


def run(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train, calibrate, train the student anew at delta, and play."""
    torch.set_num_threads(1)
    log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
    path = folder / f"actor_alone_{steps}_{seed}.safetensors"
    if path.exists():
        agent = SafeFQL.load(path, device="cpu")
    else:
        config = SafeFQLConfig(
            seed=seed, discount=0.997, teacher="behaviour", distillation=0.1, candidates=1
        )
        agent = SafeFQL(config, device="cpu").fit(log, steps=steps)
        folder.mkdir(parents=True, exist_ok=True)
        agent.save(path)
    exact = boat_value()
    safety = agent._fitted().critics.safety
    row: dict[str, Any] = {"seed": seed, "steps": steps}

    def played(name: str, one: SafeFQL) -> dict[str, float]:
        found = alone("safe", agent_policy(one._changed()), exact, seed)
        return {f"{name}_{key}": value for key, value in found.items()}

    def tell(name: str, one: SafeFQL) -> SafeFQL:
        """Add the promise and the play of an actor, and return it with its record."""
        found, told = promised(one, seed)
        row[f"{name}_gate"] = one.gate
        row.update({f"{name}_{key}": value for key, value in told.items()})
        row.update(played(name, one))
        return found

    tell("own", agent)
    paper = tell("paper", agent.recalibrated(log, steps // 2, delta=0.0))
    if paper.record is not None:
        tell("cp", paper.recalibrated(log, steps // 2))
    many = agent.acting_by("student", candidates=16)
    for times in TIMES:
        margin = times * row["own_gate"] / safety.scale.spread
        row |= played(f"sixteen_x{times}", many.with_margin(margin))
    row |= played("teacher_of_sixteen", agent.acting_by("sample", candidates=16))
    return row


def field_row(task: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Play one draw, and one draw +CP, from the same starts of a task of the field."""
    from suites import read_log, trained

    from safeshield.evaluation import ReferenceReturns, play
    from safeshield.suites.tasks import COST_LIMIT, find_task

    torch.set_num_threads(1)
    agent = trained(task, "safefql", seed, given.data, given.agents)
    assert isinstance(agent, SafeFQL)
    env, log = gym.make(find_task(task).env_id), read_log(given.data, task)
    references = ReferenceReturns.of_log(given.data / f"{task}.hdf5")
    one, told = certified(agent.with_candidates(1), seed, env, REQUESTS[1:])
    row: dict[str, Any] = {"task": task, "seed": seed, "one_gate": one.gate, **told}
    actors = {"one": one}
    if one.record is not None:
        actors["cp"] = one.recalibrated(log, agent.updates // 2)
        row["cp_gate"] = actors["cp"].gate
    for name, actor in actors.items():
        policy = as_batch_policy(actor, env.action_space, deterministic=False)
        run = play(env, policy, 100 + seed, episodes=given.episodes, num_envs=1)
        costs = np.array(run.costs)
        row[f"{name}_return"] = float(references.normalise(np.array(run.returns)).mean())
        row[f"{name}_cost"] = float(costs.mean()) / COST_LIMIT
        row[f"{name}_violating"] = int((costs > 0).sum())
    return row


def main() -> None:
    """Run the seeds without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=[], help="of the field, with --data")
    parser.add_argument("--data", type=Path, help="folder of TASK.hdf5")
    parser.add_argument("--agents", type=Path, help="folder of the agents; default: --folder")
    parser.add_argument("--episodes", type=int, default=500, help="of each task of the field")
    arguments = parser.parse_args()
    arguments.agents = arguments.agents or arguments.folder
    print(machine())
    if arguments.tasks and arguments.data is None:
        parser.error("--tasks needs --data FOLDER")
    for task in arguments.tasks:
        rows = [
            once(
                f"actor_alone_{task}_{arguments.episodes}_{seed}",
                partial(field_row, task, seed, arguments),
                folder=arguments.folder,
            )
            for seed in arguments.seeds
        ]
        print(f"\n{task}")
        print_rows(rows)
    if arguments.tasks:
        return
    rows = [
        once(
            f"actor_alone_{arguments.steps}_{seed}",
            lambda seed=seed: run(seed, arguments.steps, arguments.folder),
            folder=arguments.folder,
        )
        for seed in arguments.seeds
    ]
    print_rows(rows)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the numbers of the rows, a column for each seed."""
    for name in {key: None for row in rows for key in row}:
        values = [row.get(name) for row in rows]
        if all(value is None or isinstance(value, int | float) for value in values):
            print(f"{name:30}", *("-" if one is None else f"{one:>10.4g}" for one in values))


if __name__ == "__main__":
    main()
