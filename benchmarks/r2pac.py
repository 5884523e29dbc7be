r"""Measure R2PAC: chunk lengths, ways of acting, the shield that evaluates plans, the paper's way.

    python benchmarks/r2pac.py chunks --data FOLDER   # BallRun, h = 1, 3, 5, 7; draws a picture
    python benchmarks/suites.py --data FOLDER --methods r2pac     # the agents of the next one
    python benchmarks/r2pac.py acting --data FOLDER   # flow, student, 1 to h actions executed
    python benchmarks/r2pac.py ahead                  # the boat; 3 seeds, everything resumes
    python benchmarks/suites.py --data FOLDER --tasks BallRun CarCircle SwimmerVelocity \
        --methods r2pac-plain r2pac-reward r2pac-awr  # ablations: table 2 of the paper
    python benchmarks/r2pac.py arms --data FOLDER --folder FOLDER --tasks BallRun --seeds 10 11 12
    python benchmarks/r2pac.py umap --data FOLDER --tasks BallRun --seeds 10   # figures 3 and 8
    python benchmarks/r2pac.py arms --data FOLDER --folder FOLDER --table   # prints, runs nothing

chunks draws figure 2 of the paper: the means of Q_r and Q_c over 2,000 fixed chunks of the log,
without a penalty and with one-chunk targets as in the paper, every 50 of 2,500 updates. It also
prints how much these means still move in the last half. acting runs the agents of the field's tasks
for 10 episodes in each way to act, and measures the microseconds of `predict` for one observation.
ahead uses 600 logged trips and 8,000 updates. It compares shields of the same critics with and
without plans, at the delta that certifies 90% of the starts with V_h <= 0, in 300 episodes of
agents that head straight to the goal or in random directions.

arms compares the default with the paper's way. The arm "paper" has the settings of
`R2PACConfig.preset("paper", task=...)`, except those of `SIZES`, which are the defaults in all arms
unless --sizes is "paper". An arm "default, X" is the default with the paper's settings of X
(`FACTORS`), and "paper, X" is the paper's arm with the default's settings of X. Every arm plays 20
episodes from the same starts, so that differences to "default" or to "paper" are paired. A cell is
a task, an arm and a seed. It is stored as one JSON file in --folder and runs in its own process;
its training resumes from a checkpoint. Arms that differ in acting only share the training.

umap compares V_r of the arm "paper, no penalty" with V_c and the penalised V_r of the arm "paper"
in 5,000 random states of the log: the rank correlation of each V_r with V_c, and the mean rank (0
to 1) of each V_r in the states of the unsafe region and in the others. With the package umap-learn
it draws figure 3 of the paper, a map of these states coloured by the three values.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import torch
from boat import BOAT, straight
from common import RESULTS, apart, machine, once
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr

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
FACTORS: dict[str, tuple[str, ...]] = {
    "margin": ("margin",),
    "labels": ("trust_labels", "quantile"),
    "cap": ("cost_limit",),
    "executed": ("execute",),
    "choice": ("choose",),
    "unsafe values": ("fit_unsafe",),
    "windows": ("reward_backup_steps", "safety_backup_steps"),
    "test": ("region_test",),
    "penalty": ("penalty",),
    "expectiles": ("reward_expectile", "cost_expectile"),
    "sampling": ("near_share",),
}
"""Settings in which the default differs from the paper, by what an arm calls them."""
SIZES = (
    "critic_hidden",
    "flow_hidden",
    "student_hidden",
    "batch_size",
    "learning_rate",
    "flow_steps",
    "phase_shares",
    "chunk",
)
"""Settings of the paper that need a GPU, or that do not belong to any suspect."""
ARMS = (
    "default",
    "paper",
    *(f"default, {factor}" for factor in FACTORS),
    "default, whole plans",
    "default, prop1",
    "default, no penalty",
    "default, finite horizon",
    *(f"paper, {factor}" for factor in FACTORS),
    "paper, whole plans",
    "paper, prop1",
    "paper, no penalty",
    "paper, finite horizon",
)
EXTRA: dict[str, dict[str, Any]] = {
    "whole plans": {"execute": 5},
    "prop1": {"penalty": "prop1"},
    "no penalty": {"penalise": False},
    "finite horizon": {"ends": "terminals+timeouts", "region": "horizon", "cost_limit": 10.0},
}
"""Arms whose settings neither the default nor the preset has; table 8 of the paper is the last."""
SHARES = (0.6, 0.38, 0.02)
"""Shares of the phases with --sizes "ours". No arm acts by the student, which gets few updates;
10,000 updates give critics and actor about as many as 12,000 with the default's shares."""
ACTING = ("execute", "choose")
"""Settings that do not matter in training."""


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


# -- the paper's way ------------------------------------------------------------------------------


def arm_config(arm: str, task: str, seed: int, sizes: str) -> R2PACConfig:
    """Return the settings of an arm; the module docstring describes them."""
    base, _, factor = arm.partition(", ")
    ours = R2PACConfig(seed=seed, phase_shares=SHARES)
    known = task if task in R2PACConfig.paper_tasks else None
    paper = R2PACConfig.preset("paper", task=known, seed=seed)
    both = {name: getattr(paper if sizes == "paper" else ours, name) for name in SIZES}
    both["chunk"] = min(both["chunk"], paper.chunk)
    mine, other = (ours, paper) if base == "default" else (paper, ours)
    changes = {name: getattr(other, name) for name in FACTORS.get(factor, ())}
    changes |= EXTRA.get(factor, {})
    if changes.get("execute"):
        changes["execute"] = min(changes["execute"], both["chunk"])
    return dataclasses.replace(mine, **both, **changes)


def trained_arm(arm: str, task: str, seed: int, place: argparse.Namespace) -> R2PAC:
    """Return the agent of an arm, from its file or trained now, as it is to act."""
    from suites import read_log

    config = arm_config(arm, task, seed, place.sizes)
    base = arm.partition(", ")[0]
    shared = arm_config(base, task, seed, place.sizes)
    acting = {name: getattr(config, name) for name in ACTING}
    if dataclasses.replace(shared, **acting) == config:
        arm, kept = base, shared  # Only the acting differs.
    else:
        kept = config
    path = place.folder / f"{cell_name(arm, task, seed, place)}.safetensors"
    if not path.exists():
        log = read_log(place.data, task)
        checkpoint = path.with_suffix(".checkpoint")
        R2PAC(kept, device="auto").fit(log, steps=place.updates, checkpoint=checkpoint).save(path)
        checkpoint.unlink()
    agent = R2PAC.load(path, device="cpu")
    return agent._changed(**acting)


def cell_name(arm: str, task: str, seed: int, place: argparse.Namespace) -> str:
    """Return the name of a cell's files."""
    plain = arm.replace(", ", "-").replace(" ", "_")
    return f"r2pac_arm_{task}_{plain}_{place.sizes}_{place.updates}_{seed}"


def play_arm(arm: str, task: str, seed: int, place: argparse.Namespace) -> dict[str, Any]:
    """Train an arm, and play 20 episodes from the starts that all arms of this seed have."""
    import safeshield.suites  # noqa: F401 - registers the tasks
    from safeshield.evaluation import EPISODES, ReferenceReturns, play
    from safeshield.suites.tasks import COST_LIMIT, find_task

    torch.set_num_threads(1)
    started = time.process_time()
    agent = trained_arm(arm, task, seed, place)
    training = time.process_time() - started
    started = time.process_time()
    references = ReferenceReturns.of_log(place.data / f"{task}.hdf5")
    run = play(gym.make(find_task(task).env_id), agent, 100 + seed, episodes=EPISODES, num_envs=1)
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "config": dataclasses.asdict(agent.config),
        "updates": place.updates,
        "returns": np.asarray(references.normalise(np.array(run.returns))).tolist(),
        "costs": (np.array(run.costs) / COST_LIMIT).tolist(),
        "region": agent.region._asdict(),
        "penalty": agent.diagnostics()["penalty"],
        "training_seconds": round(training, 1),
        "playing_seconds": round(time.process_time() - started, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run_arms(place: argparse.Namespace) -> None:
    """Run the cells without a stored result, each in its own process unless `here`."""
    for seed, arm, task in itertools.product(place.seeds, place.arms, place.tasks):
        name = cell_name(arm, task, seed, place)
        if place.here:
            warnings.simplefilter("ignore")
            once(name, lambda a=arm, t=task, s=seed: play_arm(a, t, s, place), folder=place.folder)
        elif not (place.folder / f"{name}.json").exists():
            command = [sys.executable, __file__, "arms", "--tasks", task, "--arms", arm, "--seeds"]
            command += [str(seed), "--data", str(place.data), "--folder", str(place.folder)]
            command += ["--sizes", place.sizes, "--updates", str(place.updates), "--here"]
            apart(command, name)


def print_arms(place: argparse.Namespace) -> None:
    """Print the stored cells of each task and arm, with paired differences to the arm's base.

    The differences are means over the starts of all seeds that both arms have played; in brackets
    is the mean of each seed.
    """
    print("| task | arm | seeds | return / cost | return, difference | cost, difference |")
    print("|---|---|---|---|---|---|")
    for task, arm in itertools.product(place.tasks, place.arms):
        own, base = (stored_arm(name, task, place) for name in (arm, arm.partition(", ")[0]))
        if not own:
            continue
        means = [np.mean([own[seed][key] for seed in own]) for key in ("returns", "costs")]
        shared = sorted(own.keys() & base.keys())
        told = []
        for key in ("returns", "costs"):
            gaps = [float(np.mean(np.subtract(own[s][key], base[s][key]))) for s in shared]
            each = ", ".join(f"{gap:+.2f}" for gap in gaps)
            differs = shared and arm not in ("default", "paper")
            told.append(f"{np.mean(gaps):+.2f} ({each})" if differs else "")
        seeds = " ".join(map(str, own))
        print(
            f"| {task} | {arm} | {seeds} | {means[0]:.2f} / {means[1]:.2f} | {' | '.join(told)} |"
        )


def stored_arm(arm: str, task: str, place: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Return the stored results of an arm by seed."""
    paths = {s: place.folder / f"{cell_name(arm, task, s, place)}.json" for s in place.seeds}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


# -- values of states -----------------------------------------------------------------------------


def value_maps(task: str, seed: int, place: argparse.Namespace) -> dict[str, Any]:
    """Compare V_r, V_c and the penalised V_r in states of the log, and draw them."""
    from suites import read_log

    log = read_log(place.data, task)
    rows = np.random.default_rng(seed).permutation(len(log))[:5000]
    found: dict[str, np.ndarray] = {}
    for arm, name in (("paper, no penalty", "V_r"), ("paper", "penalised V_r")):
        agent = trained_arm(arm, task, seed, place)
        model = agent._fitted()
        seen = torch.tensor(model.scaling.observations(np.asarray(log.observations)[rows]))
        with torch.no_grad():
            value = model.critics.reward.possible(agent._networks, seen)
            found[name] = np.asarray(value)
            assert model.costs is not None
            found["V_c"] = -np.asarray(model.costs.possible(agent._networks, seen))
    unsafe = found["V_c"] > agent.region.level
    out: dict[str, Any] = {"unsafe share": float(unsafe.mean())}
    for name in ("V_r", "penalised V_r"):
        rank = rankdata(found[name]) / len(rows)
        out[f"{name}, rank correlation with V_c"] = float(
            spearmanr(found[name], found["V_c"]).statistic
        )
        out[f"{name}, mean rank in unsafe states"] = float(rank[unsafe].mean())
        out[f"{name}, mean rank in safe states"] = float(rank[~unsafe].mean())
    try:
        from umap import UMAP
    except ImportError:
        print("no picture: install umap-learn for it")
        return out
    points = UMAP(random_state=seed).fit_transform(np.asarray(seen))
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12}):
        figure = Figure(figsize=(12.0, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        for panel, name in zip(figure.subplots(1, 3), ("V_r", "V_c", "penalised V_r"), strict=True):
            dots = panel.scatter(*points.T, c=rankdata(found[name]) / len(rows), s=3)
            panel.set(title=f"{task}: rank of {name}", xticks=[], yticks=[])
            panel.set_box_aspect(1)
        figure.colorbar(dots, ax=figure.axes[-1])
        figure.savefig(place.folder / f"r2pac-umap-{task}.png", dpi=110)
    return out


def main() -> None:
    """Run the parts without a stored result, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["chunks", "acting", "ahead", "arms", "umap"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--updates", type=int, default=10_000, help="arms, umap: of all phases")
    parser.add_argument("--sizes", choices=["ours", "paper"], default="ours", help="arms: networks")
    parser.add_argument("--folder", type=Path, default=RESULTS / "r2pac", help="arms: results")
    parser.add_argument("--here", action="store_true", help="arms: run in this process")
    parser.add_argument("--table", action="store_true", help="arms: print what is there")
    parser.add_argument("--data", type=Path, help="chunks, acting: folder of TASK.hdf5")
    parser.add_argument("--tasks", nargs="+", default=["CarCircle", "BallCircle"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.what != "ahead" and arguments.data is None:
        parser.error(f"{arguments.what} needs --data FOLDER")
    if not arguments.here:
        print(machine())
    seeds, data = arguments.seeds, arguments.data
    if arguments.what == "arms":
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if not arguments.table:
            run_arms(arguments)
        if not arguments.here:
            print_arms(arguments)
    elif arguments.what == "umap":
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for task, seed in itertools.product(arguments.tasks, seeds):
            row = once(
                f"r2pac_umap_{task}_{arguments.sizes}_{arguments.updates}_{seed}",
                lambda t=task, s=seed: value_maps(t, s, arguments),
                folder=arguments.folder,
            )
            for key, value in row.items():
                if isinstance(value, float):
                    print(f"{task} seed {seed}  {key:40} {value:.3f}", flush=True)
    elif arguments.what == "chunks":
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
