r"""Measure R2PAC: chunk lengths, ways of acting, and the shield that evaluates plans.

    python benchmarks/r2pac.py chunks --data FOLDER   # BallRun, h = 1, 3, 5, 7; draws a picture
    python benchmarks/suites.py --data FOLDER --methods r2pac     # the agents of the next one
    python benchmarks/r2pac.py acting --data FOLDER   # flow, student, 1 to h actions executed
    python benchmarks/r2pac.py ahead                  # the boat; 3 seeds, everything resumes
    python benchmarks/suites.py --data FOLDER --tasks BallRun CarCircle SwimmerVelocity \
        --methods r2pac-plain r2pac-reward r2pac-awr  # ablations: table 2 of the paper

chunks draws figure 2 of the paper: the means of Q_r and Q_c over 2,000 fixed chunks of the log,
without a penalty and with one-chunk targets as in the paper, every 50 of 2,500 updates. It also
prints how much these means still move in the last half. acting runs the agents of the field's tasks
for 10 episodes in each way to act, and measures the microseconds of `predict` for one observation.
ahead uses 600 logged trips and 8,000 updates. It compares shields of the same critics with and
without plans, at the delta that certifies 90% of the starts with V_h <= 0, in 300 episodes of
agents that head straight to the goal or in random directions.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import torch
from boat import BOAT, straight
from common import RESULTS, machine, once
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import safeshield
from safeshield.algorithms.r2pac.agent import R2PAC, R2PACConfig
from safeshield.algorithms.r2pac.losses import R2PACRun
from safeshield.calibration.calibrate import default_deltas, start_observations
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.demo.helmsmen import Helmsmen
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy, batch_policy
from safeshield.training.log import LogTensors
from safeshield.training.loop import _draw

LENGTHS, UPDATES, EVERY = (1, 3, 5, 7), 2500, 50
COLOURS = ("#777777", "#0072b2", "#d55e00", "#009e73")
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "the default": (10, {"inference": "flow"}),
    "flow of 32 steps": (32, {"inference": "flow"}),
    "1 candidate": (10, {"inference": "flow", "candidates": 1}),
    "lowest Q_c": (10, {"inference": "flow", "choose": "cost"}),
    "1 executed": (10, {"inference": "flow", "execute": 1}),
    "5 executed": (10, {"inference": "flow", "execute": 5}),
    "lowest Q_c, 1 executed": (10, {"inference": "flow", "choose": "cost", "execute": 1}),
    "student": (10, {"inference": "student"}),
    "student, 1 executed": (10, {"inference": "student", "execute": 1}),
    "student, 1 candidate": (10, {"inference": "student", "candidates": 1}),
}
"""Euler steps and settings of each way to act; by default 16 candidates, 3 executed."""


# -- chunk lengths --------------------------------------------------------------------------------


def chunks(length: int, seed: int, data: Path) -> dict[str, Any]:
    """Record the means of Q_r and Q_c during training, without a penalty."""
    from suites import read_log

    log = read_log(data, "BallRun")
    config = R2PACConfig(
        seed=seed,
        chunk=length,
        penalise=False,
        reward_backup_steps=(1,),
        reward_expectile=0.9,
        cost_expectile=0.9,
        near_share=0.0,
    )
    agent = R2PAC(config, device="cpu")
    model = agent._describe(log)
    tensors = LogTensors.of(log, model.scaling, agent.device)
    run = agent._run(model, tensors, 2 * UPDATES)  # Half of these train the critics.
    assert isinstance(run, R2PACRun)
    assert model.costs is not None
    generator = torch.Generator().manual_seed(seed)
    state = run.initial(generator)
    rows = torch.randint(len(tensors), (2000,), generator=torch.Generator().manual_seed(0))
    fixed = run.chunks.batch(rows, torch.zeros(len(rows), model.actor.width))
    curves: dict[str, list[float]] = {"Q_r": [], "Q_c": []}
    done = 0
    for phase in run.phases()[:-2]:
        for _ in range(phase.steps):
            draw = _draw(phase, state, generator, len(tensors), model.actor.width + 1)
            state, _ = phase.update(state, draw)
            done += 1
            if done % EVERY:
                continue
            with torch.no_grad():
                for name, critics, sign in (
                    ("Q_r", model.critics.reward, 1.0),
                    ("Q_c", model.costs, -1.0),
                ):
                    kind = "reward" if name == "Q_r" else "cost"
                    value = critics.possible(state.networks, fixed.observations)
                    gain = critics.advantages(state.networks, fixed.observations, fixed.actions)
                    q = value + state.scales[kind] * gain.mean(0)
                    curves[name].append(sign * float(q.mean()))
    late = {name: np.array(curve[len(curve) // 2 :]) for name, curve in curves.items()}
    moved = {
        f"{name} still moves": float(np.ptp(curve) / max(abs(curve.mean()), 1e-9))
        for name, curve in late.items()
    }
    steps = {f"{name} jumps": float(np.abs(np.diff(curve)).mean()) for name, curve in late.items()}
    return {**curves, **moved, **steps}


def draw_chunks(found: dict[int, list[dict[str, Any]]]) -> None:
    """Draw figure 2 of the paper."""
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.frameon": False}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        at = EVERY * np.arange(1, UPDATES // EVERY + 1)
        for panel, name in zip(axes, ("Q_r", "Q_c"), strict=True):
            for colour, (length, runs) in zip(COLOURS, found.items(), strict=True):
                curves = np.array([run[name] for run in runs])
                panel.plot(at, curves.mean(0), color=colour, label=f"h = {length}", linewidth=1.6)
                panel.fill_between(
                    at, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0
                )
            panel.set_title(f"{name}, mean over 2,000 chunks of BallRun")
            panel.set_xlabel("updates")
        axes[0].legend()
        figure.savefig(PICTURES / "r2pac-chunks.png", dpi=130)


# -- acting ---------------------------------------------------------------------------------------


def acting(task: str, seed: int, data: Path) -> dict[str, Any]:
    """Run episodes in each way to act, and time one action."""
    from suites import FOLDER

    import safeshield.suites  # noqa: F401 - registers the tasks
    from safeshield.evaluation import ReferenceReturns, play
    from safeshield.suites.tasks import COST_LIMIT, find_task

    torch.set_num_threads(1)
    trained = R2PAC.load(FOLDER / f"{task}_r2pac_{seed}.safetensors", device="cpu")
    env = gym.make(find_task(task).env_id)
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    seen, _ = env.reset(seed=seed)
    table: dict[str, Any] = {}
    for name, (steps, settings) in WAYS.items():
        agent = trained.acting_by(**settings)
        model = agent._fitted()
        actor = dataclasses.replace(model.actor, steps=steps)
        agent._model = dataclasses.replace(model, actor=actor)
        times = []
        state: Any = None
        for _ in range(200):
            started = time.perf_counter()
            _, state = agent.predict(seen, state)
            times.append(time.perf_counter() - started)
        run = play(env, agent, 300 + seed, episodes=10, num_envs=1)
        table[name] = {
            # A mean, because most calls do not plan where several actions are executed.
            "microseconds": 1e6 * float(np.mean(np.sort(times)[:190])),
            "return": float(references.normalise(run.returns).mean()),
            "cost": float(np.mean(run.costs)) / COST_LIMIT,
        }
    return table


# -- the shield -----------------------------------------------------------------------------------


def boat_agent(seed: int) -> R2PAC:
    """Return the stored agent; train and store it on 600 trips where there is none."""
    path = RESULTS / f"r2pac_boat_{seed}.safetensors"
    if not path.exists():
        log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
        config = R2PACConfig(seed=seed, discount=0.997)
        agent = R2PAC(config, device="cpu").fit(log, steps=8000)
        RESULTS.mkdir(parents=True, exist_ok=True)
        agent.save(path)
    return R2PAC.load(path, device="cpu")


def ahead(seed: int) -> dict[str, Any]:
    """Run reckless agents behind both shields of the same critics."""
    agent = boat_agent(seed)
    env = gym.make(BOAT)
    plain = agent.shield(plans=0)
    starts = start_observations(plain, env, 1000, seed)
    delta = default_deltas(plain, starts, [0.9])[0]
    policies = {
        "straight": batch_policy(straight),
        "random": as_batch_policy("random", plain.action_space),
    }
    out: dict[str, Any] = {"delta": delta}
    for kind, shield in (("one step", plain), ("plans", agent.shield())):
        shield = shield.with_delta(delta)
        for name, policy in policies.items():
            runs = run_episodes(env, ShieldedProposals(shield, policy), 400, 50_000 + seed)
            inside = [r for r in runs if shield.value(r.observations[0]) <= -delta][:300]
            out[f"{name}, {kind}: violating"] = sum(run.violated for run in inside)
            out[f"{name}, {kind}: return"] = float(np.mean([r.total_return for r in inside]))
        seen, action = starts[:1], np.zeros((1, 2), np.float32)
        states = shield.states(seen)
        times = []
        for _ in range(500):
            started = time.perf_counter()
            shield.accepts(states, action[0])
            times.append(time.perf_counter() - started)
        out[f"{kind}: microseconds to accept"] = 1e6 * float(np.median(times))
    return out


def main() -> None:
    """Run the parts without a stored result, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["chunks", "acting", "ahead"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="chunks, acting: folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", default=["CarCircle", "BallCircle"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.what != "ahead" and arguments.data is None:
        parser.error(f"{arguments.what} needs --data FOLDER")
    print(machine())
    seeds, data = arguments.seeds, arguments.data
    if arguments.what == "chunks":
        found = {
            h: [once(f"r2pac_chunks_{h}_{s}", lambda h=h, s=s: chunks(h, s, data)) for s in seeds]
            for h in LENGTHS
        }
        for length, runs in found.items():
            for key in ("Q_r still moves", "Q_c still moves", "Q_r jumps", "Q_c jumps"):
                print(f"h = {length}  {key:18}", *(f"{run[key]:9.4f}" for run in runs))
        draw_chunks(found)
    elif arguments.what == "acting":
        for task in arguments.tasks:
            tables = [
                once(f"r2pac_acting_{task}_{s}", lambda t=task, s=s: acting(t, s, data))
                for s in seeds
            ]
            for name in WAYS:
                rows = [table[name] for table in tables]
                told = (f"{key} {np.mean([row[key] for row in rows]):8.3f}" for key in rows[0])
                print(f"{task:12} {name:22}", "  ".join(told))
    else:
        columns = [once(f"r2pac_ahead_{s}", lambda s=s: ahead(s)) for s in seeds]
        for key, first in columns[0].items():
            if isinstance(first, int | float):
                print(f"{key:40}", *(f"{column[key]:>10.4g}" for column in columns))


if __name__ == "__main__":
    main()
