r"""Measure FLRP: the effect of refinement, the density as a support test, and the boat.

    python benchmarks/flrp.py boat                  # 3 seeds; everything resumes
    python benchmarks/flrp.py density               # 3 seeds; draws a picture
    python benchmarks/suites.py --data FOLDER --methods flrp      # the agents of the next one
    python benchmarks/flrp.py refine --data FOLDER  # T in 0, 1, 3, 5, 10; draws a picture
    python benchmarks/suites.py --data FOLDER --tasks BallRun CarCircle SwimmerVelocity \
        --methods flrp-gaussian flrp-cost           # ablations: tables 2 and 3 of the paper
    python benchmarks/flrp.py bounds                # eq. 18 to 20, remark of B.5; the boat
    python benchmarks/flrp.py path                  # figure 2 of the paper; the boat
    python benchmarks/flrp.py bounds --data FOLDER --agents TASK=FILE ...   # path, too

boat uses 600 logged trips and 20,000 updates. It runs the policy alone from 500 uniform starts in
the exact safe set (margin 0.02 m), and measures the microseconds of an action and the updates per
second of each phase. density trains FLRP on the log of `benchmarks/support.py`, whose helmsmen
never steer down. It compares the density with the flow's noise as scores that distinguish logged
actions from others. refine evaluates the agents of the field's tasks on states that they were not
trained on (those of ten new episodes of the cloned agent), and in 20 episodes.

bounds compares the bounds of eq. 19 and 20 with what can be measured of the distances that they
bound, in 100 states of a log. The experts, which are trained in sequence, are applied in each order
of proposition 1 and with several trust regions rho. The boat's agent is trained on the critics of
`safefql.py` for 3,000 updates, and also plays 200 safe starts by each rule:

    bound TV      the bound on TV(pi, pi_0) by the estimated D, mean over the states
    measured TV   the largest difference of the probabilities of {a : a_i > c} over entries i and
                  numbers c, from 2,048 draws: a lower bound of TV(pi, pi_0), up to its noise
    broken        states in which the measured one exceeds the bound by more than 0.05, the noise
    L, L product  largest norm of the Jacobian of the map from u to the action over the draws, and
                  the product of the spectral norms of the decoder's layers (remark of B.5)
    bound W2      L sqrt(2 D), with the sampled L, in half widths of the box; mean over the states
    measured W2   root mean square of |a_T - a_0| where both have the same u_0, which is at least
                  W_2(pi, pi_0)

path follows the experts of a trained agent one after the other, from 16 draws of u_0 in each of 300
states of a log, half of them from the 5% nearest to V_h = 0. It prints the means of Q_h, A_r and
||u||^2 after each expert, in all states and in those, and draws the ways in the state nearest to
V_h = 0 over the contours of Q_h and A_r (latent width 2).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import torch
from boat import agent_policy, alone, from_safe_starts
from common import RESULTS, machine, once
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import ks_2samp
from support import area, logs, never_shown, scores_of, trained
from torch.func import jacrev, vmap

import safeshield
from safeshield import OfflineDataset, Shield
from safeshield.algorithms.behaviour_cloning import BehaviourCloning
from safeshield.algorithms.flrp.agent import FLRP, FLRPConfig
from safeshield.demo.helmsmen import Helmsmen
from safeshield.exact import boat_value
from safeshield.nn.latent_actor import DECODER, EXPERTS, ORDERS, expert_order
from safeshield.rollouts.episodes import run_episodes
from safeshield.training.loop import Phase

BOAT = "safeshield/Boat-v0"
STEPS = 20_000
DENSITY_STEPS = 6_000
REFINE_STEPS = (0, 1, 3, 5, 10)
RHO = (2.0, 1.0, 0.5)
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
LABELS = {
    "return": "return",
    "cost": "cost",
    "Q_h": "Q_h, units of h",
    "A_r": "A_r, one step's advantage",
}
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#777777"


def kept(name: str, train: Any) -> FLRP:  # noqa: ANN401 - a function that returns an agent
    """Return the stored agent; train and store it first where there is none."""
    path = RESULTS / f"flrp_{name}.safetensors"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        train().save(path)
    return FLRP.load(path, device="cpu")


# -- the boat -----------------------------------------------------------------------------------


def boat_agent(seed: int) -> FLRP:
    """Train an agent on 600 trips."""
    log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
    config = FLRPConfig(seed=seed, discount=0.997, candidates=1)
    return FLRP(config, device="cpu").fit(log, steps=STEPS)


def boat(seed: int) -> dict[str, Any]:
    """Run the agent from safe starts with 0 and with T refinements, and time one action."""
    agent = kept(f"boat_{seed}", lambda: boat_agent(seed))
    exact = boat_value()
    played: dict[str, Any] = {}
    for steps in (agent.config.refine_steps, 0):
        acting: Any = agent_policy(agent.with_refine_steps(steps))  # type: ignore[arg-type]
        played |= alone(f"T={steps}", acting, exact, seed)
    seen = np.zeros(2, np.float32)
    times = []
    for _ in range(2000):
        started = time.perf_counter()
        agent.predict(seen)
        times.append(time.perf_counter() - started)
    assert agent.shift_summary is not None
    return {
        **played,
        "microseconds_an_action": 1e6 * float(np.median(times)),
        "base_divergence_median": agent.shift_summary.median,
        "base_divergence_upper_decile": agent.shift_summary.upper_decile,
        "folds": agent.shift_summary.folds,
    }


def speed() -> dict[str, Any]:
    """Measure updates per second of each phase: 17 observations, 6 actions, batch 256."""
    rng = np.random.default_rng(0)
    count = 20_000
    seen = rng.normal(size=(count + 1, 17))
    log = OfflineDataset.from_arrays(
        observations=seen[:-1],
        actions=rng.uniform(-1, 1, (count, 6)),
        rewards=rng.normal(size=count),
        next_observations=seen[1:],
        terminated=np.zeros(count, bool),
        truncated=np.arange(count) % 500 == 499,
        costs=(seen[1:, 0] > 0).astype(float),
        constraints=seen[:-1, 0],
        next_constraints=seen[1:, 0],
    )
    agent, rates = FLRP(device="cpu"), {}
    model = agent._describe(log)
    from safeshield.training.log import LogTensors
    from safeshield.training.loop import _draw

    generator = torch.Generator().manual_seed(0)
    run = agent._run(model, LogTensors.of(log, model.scaling, agent.device), 1000)
    state = run.initial(generator)
    phases: list[Phase] = run.phases()
    for phase in (phases[0], *phases[-2:]):
        for i in range(60):
            if i == 10:
                started = time.perf_counter()
            state, _ = phase.update(state, _draw(phase, state, generator, count, 6))
        rates[f"updates_a_second_{phase.name}"] = 50 / (time.perf_counter() - started)
    return rates


# -- the density as a support test ----------------------------------------------------------------


def density_shield(seed: int) -> Shield:
    """Train on helmsmen who never steer down, and set the level with other trips."""
    train, held_out, _ = logs(seed)

    def fit() -> FLRP:
        return FLRP(FLRPConfig(seed=seed), device="cpu").fit(train, steps=DENSITY_STEPS)

    return kept(f"density_{seed}", fit).shield().with_support(held_out, score="density")


def density(seed: int) -> dict[str, Any]:
    """Compare the scores on new trips: areas under the ROC curve, and the conformal promise."""
    _, held_out, new = logs(seed)
    found = {
        "density": density_shield(seed),
        "noise": trained(seed, None).with_support(held_out),
    }
    out: dict[str, Any] = {}
    for name, shield in found.items():
        rng = np.random.default_rng(seed)
        own = scores_of(shield, new.observations, new.actions)
        for what, actions in (
            ("never shown", never_shown(len(new), rng)),
            ("other states", new.actions[rng.permutation(len(new))]),
        ):
            other = scores_of(shield, new.observations, actions)
            out[f"{name}: area, against {what}"] = area(own, other)
            assert shield.support is not None
            level = shield.support.record.level
            out[f"{name}: accepted, {what}"] = float((other >= level).mean())
        below = np.add.reduceat(own < level, new.episode_starts)
        too_often = below > shield.support.record.share * new.episode_lengths
        out[f"{name}: own accepted"] = float((own >= level).mean())
        out[f"{name}: new trips with too many unseen steps"] = float(too_often.mean())
    return out


def draw_density(seed: int) -> None:
    """Draw the ROC curves of both scores on new trips."""
    _, held_out, new = logs(seed)
    found = {
        "density": density_shield(seed),
        "noise": trained(seed, None).with_support(held_out),
    }
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.frameon": False}):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        for (name, shield), colour in zip(found.items(), (VERMILION, BLUE), strict=True):
            rng = np.random.default_rng(seed)
            own = np.sort(scores_of(shield, new.observations, new.actions))
            levels = own[:: max(1, len(own) // 2000)]
            kinds = (never_shown(len(new), rng), new.actions[rng.permutation(len(new))])
            assert shield.support is not None
            level = shield.support.record.level
            for panel, actions in zip(axes, kinds, strict=True):
                other = np.sort(scores_of(shield, new.observations, actions))
                caught = np.searchsorted(other, levels) / len(other)
                alarms = np.searchsorted(own, levels) / len(own)
                label = f"{name}, area {area(own, other):.3f}"
                panel.plot(alarms, caught, color=colour, linewidth=1.8, label=label)
                panel.plot((own < level).mean(), (other < level).mean(), "o", color=colour, ms=8)
        titles = ("Actions that the log never showed", "Actions logged in other states")
        for panel, title in zip(axes, titles, strict=True):
            panel.set_title(title)
            panel.set_xlabel("share of the log's own actions called unseen")
            panel.set_box_aspect(1)
            panel.legend(loc="lower right")
        axes[0].set_ylabel("share of the others called unseen")
        figure.supxlabel("dots: the calibrated level", fontsize=10, color=GREY)
        figure.savefig(PICTURES / "flrp-density.png", dpi=130)


# -- refinement -----------------------------------------------------------------------------------


def refine(task: str, seed: int, data: Path) -> dict[str, Any]:
    """Evaluate T = 0, 1, 3, 5, 10 of a trained agent: its critics, its shift and its episodes."""
    from suites import FOLDER

    import safeshield.suites  # noqa: F401 - registers the tasks
    from safeshield.evaluation import EPISODES, ReferenceReturns, play
    from safeshield.suites.tasks import COST_LIMIT, find_task

    torch.set_num_threads(1)
    path = FOLDER / f"{task}_flrp_{seed}.safetensors"
    trained_agent = FLRP.load(path, device="cpu").with_candidates(1)
    env = gym.make(find_task(task).env_id)
    references = ReferenceReturns.of_log(data / f"{task}.hdf5")
    cloned = BehaviourCloning.load(FOLDER / f"{task}_bc_{seed}.safetensors", device="cpu")
    visited = run_episodes(env, cloned, 10, 7000 + seed, num_envs=1)
    seen = np.concatenate([episode.observations for episode in visited])
    seen = np.random.default_rng(seed).permutation(seen)[:2000]
    model, networks = trained_agent._fitted(), trained_agent._networks
    states = torch.tensor(model.scaling.observations(seen))
    table: dict[str, Any] = {}
    for steps in REFINE_STEPS:
        agent = trained_agent.with_refine_steps(steps)
        acted = torch.tensor(model.scaling.actions(agent.predict(seen)[0]))
        with torch.no_grad():
            danger = model.critics.safety.action_value(networks, states, acted)
            gain = model.critics.reward.advantages(networks, states, acted).amin(0)
        shift = agent.base_shift(seen[:256])
        run = play(env, agent, 100 + seed, episodes=EPISODES)
        table[str(steps)] = {
            "Q_h": float(danger.mean()),
            "unsafe_share": float((danger > 0).float().mean()),
            "A_r": float(gain.mean()),
            "base_divergence": float(np.median(shift.divergence)),
            "folds": float(shift.folds.mean()),
            "return": float(references.normalise(run.returns).mean()),
            "cost": float(np.mean(run.costs)) / COST_LIMIT,
        }
    return table


def draw_refinement(found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw figure 3 of the paper for these tasks: return and cost, Q_h and A_r over T."""
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.frameon": False}):
        figure = Figure(figsize=(4.0 * len(found), 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(found), sharex=True, squeeze=False)
        at = np.arange(len(REFINE_STEPS))
        for column, (task, tables) in zip(axes.T, found.items(), strict=True):
            for panel, pair in zip(column, (("return", "cost"), ("Q_h", "A_r")), strict=True):
                for key, colour in zip(pair, (BLUE, VERMILION), strict=True):
                    values = np.array([[t[str(s)][key] for s in REFINE_STEPS] for t in tables])
                    if pair[0] == "Q_h":
                        # Q_h differs more between states than between actions.
                        values = values - values[:, :1]
                    panel.plot(
                        at, values.mean(0), "o-", color=colour, label=LABELS[key], markersize=4
                    )
                    panel.fill_between(
                        at, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
                    )
                panel.legend()
            column[0].set_title(task)
            column[0].axhline(1.0, color=GREY, linewidth=0.8, linestyle=":", label="cost limit")
            column[0].legend()
            column[1].axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
            column[1].set_xticks(at, [str(s) for s in REFINE_STEPS])
            column[1].set_xlabel("refinement steps T (trained with 3)")
        axes[0, 0].set_ylabel("played, normalised")
        axes[1, 0].set_ylabel("change against T = 0, in new states")
        figure.savefig(PICTURES / "flrp-refinement.png", dpi=130)


# -- the bounds -----------------------------------------------------------------------------------

SHIFT_STATES, SHIFT_DRAWS, NOISE, PLAYED = 100, 2048, 0.05, 200


def with_rule(agent: FLRP, order: str, rho: float | None) -> FLRP:
    """Return an agent with the same weights, another order of the experts and trust region."""
    other = agent._changed(order=order, trust_region=rho)
    assert other._model is not None
    policy = other._model.policy
    spec = dataclasses.replace(policy.spec, order=order, trust_region=rho)
    other._model = dataclasses.replace(
        other._model, policy=dataclasses.replace(policy, spec=spec), shift=None
    )
    return other


def lipschitz(agent: FLRP, seen: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """Return the largest norm of da/du over samples, and the product of the decoder's norms."""
    policy, networks = agent._fitted().policy, agent._networks

    def action(state: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        latent = policy.to_latent(networks, state[None], base[None])
        return policy.decode(networks, state[None], latent)[0]

    states = torch.tensor(seen).repeat_interleave(len(noise), 0)
    draws = torch.tensor(noise).repeat(len(seen), 1)
    with torch.no_grad():
        slopes = vmap(jacrev(action, argnums=1))(states, draws)
        largest = float(torch.linalg.matrix_norm(slopes, ord=2).max())
        product = 1.0
        for name, weight in networks[DECODER].items():
            if name.endswith("weight"):
                matrix = weight[0] if weight.ndim == 3 else weight
                product *= float(torch.linalg.matrix_norm(matrix, ord=2))
    return largest, product


def bounds(agent: FLRP, log: OfflineDataset, on_boat: bool) -> dict[str, Any]:
    """Compare the bounds with measured distances, for each order and each trust region."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(log))[:SHIFT_STATES]
    observations = np.asarray(log.observations)[rows]
    model = agent._fitted()
    seen = np.asarray(model.scaling.observations(observations), np.float32)
    width = model.policy.spec.latent
    noise = rng.standard_normal((SHIFT_DRAWS, width)).astype(np.float32)
    largest, product = lipschitz(agent, seen, noise[:64])
    table: dict[str, Any] = {"L": largest, "L product": product}
    for order, rho in [*((order, None) for order in ORDERS), *(("sequential", r) for r in RHO)]:
        one = with_rule(agent, order, rho)
        shift = one.base_shift(observations)
        policy = one._fitted().policy
        measured, cost = [], []
        for state in seen:
            at = np.repeat(state[None], SHIFT_DRAWS, axis=0)
            refined = policy.act(one._arrays, at, noise)
            plain = policy.unrefined.act(one._arrays, at, noise)
            measured.append(
                max(ks_2samp(refined[:, i], plain[:, i]).statistic for i in range(plain.shape[1]))
            )
            cost.append(float(np.sqrt(np.square(refined - plain).sum(-1).mean())))
        total, found = shift.total_variation, np.array(measured)
        far = largest * np.sqrt(2.0 * shift.divergence)
        table[f"{order}, rho {rho}"] = {
            "D median": float(np.median(shift.divergence)),
            "folds": float(shift.folds.mean()),
            "bound TV": float(total.mean()),
            "measured TV": float(found.mean()),
            "broken": int((found > total + NOISE).sum()),
            "bound W2": float(far.mean()),
            "measured W2": float(np.mean(cost)),
            "W2 above its bound": int((np.array(cost) > far).sum()),
        }
        if on_boat:
            acting: Any = agent_policy(one)  # type: ignore[arg-type]
            runs = from_safe_starts(acting, boat_value(), agent.config.seed, PLAYED)
            table[f"{order}, rho {rho}"] |= {
                "violating": sum(run.violated for run in runs),
                "return": float(np.mean([run.total_return for run in runs])),
            }
    return table


Case = tuple[str, Callable[[], tuple[FLRP, OfflineDataset]]]
"""Name of a trained agent, and a function that returns the agent and its log."""


def boat_case(seed: int) -> tuple[FLRP, OfflineDataset]:
    """Return an FLRP agent on the critics of `safefql.py` (3,000 updates), and its log."""
    from safefql import trained as with_critics

    log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)

    def fit() -> FLRP:
        critics, *_ = with_critics(seed, 6000, RESULTS)
        config = FLRPConfig(seed=seed, discount=0.997, candidates=1)
        return FLRP(config, device="cpu")._fit_actor(log, 3000, critics, 0.5)

    return kept(f"boat_case_{seed}", fit), log


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the agents that --agents names, or without it those of the boat."""
    if not arguments.agents:
        return [(f"boat_{seed}", partial(boat_case, seed)) for seed in arguments.seeds]
    import safeshield.suites  # noqa: F401 - registers the tasks

    def named(task: str, file: str) -> tuple[FLRP, OfflineDataset]:
        log = OfflineDataset.load(arguments.data / f"{task}.hdf5")
        return FLRP.load(file, device="cpu").with_candidates(1), log

    given = [one.partition("=") for one in arguments.agents]
    return [(task, partial(named, task, file)) for task, _, file in given]


def show_bounds(arguments: argparse.Namespace) -> None:
    """Print the table of the bounds for each agent."""
    for name, case in cases(arguments):
        table = once(f"flrp_bounds_{name}", lambda c=case: bounds(*c(), not arguments.agents))
        print(f"{name}: L {table['L']:.2f}, product {table['L product']:.3g}")
        for rule, row in table.items():
            if isinstance(row, dict):
                print(f"  {rule:24}", "  ".join(f"{k} {v:.3g}" for k, v in row.items()))


# -- the path of the experts ----------------------------------------------------------------------


def path(agent: FLRP, log: OfflineDataset, task: str) -> dict[str, Any]:
    """Return Q_h, A_r and ||u||^2 after each expert, and draw the ways in one state."""
    model, rng = agent._fitted(), np.random.default_rng(0)
    policy, critics, arrays = model.policy, model.critics, agent._arrays
    rows = rng.permutation(len(log))[:6000]
    seen = np.asarray(model.scaling.observations(np.asarray(log.observations)[rows]), np.float32)
    values = critics.safety.value(arrays, seen)
    nearest = np.argsort(np.abs(values))[:300]
    states = np.concatenate([seen[rng.permutation(len(seen))[:150]], seen[nearest[::2]]])
    near = np.repeat(np.arange(len(states)) >= 150, 16)
    inputs = np.repeat(states, 16, axis=0)

    def judged(inputs: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = policy.decode(arrays, inputs, policy.to_latent(arrays, inputs, base))
        danger = critics.safety.action_value(arrays, inputs, actions)
        return danger, critics.reward.advantages(arrays, inputs, actions).min(0)

    def ways(inputs: np.ndarray, base: np.ndarray) -> list[np.ndarray]:
        """Return u after none, the first, the second, ... expert."""
        out = [base]
        for name in expert_order(policy.spec.refine_steps):
            step = policy.expert(arrays[name], np.concatenate([inputs, out[-1]], -1))[0]
            out.append(out[-1] + step)
        return out

    base = rng.standard_normal((len(inputs), policy.spec.latent)).astype(np.float32)
    names = ("start", *(n.removesuffix("_expert") for n in expert_order(policy.spec.refine_steps)))
    table: dict[str, Any] = {}
    for name, at in zip(names, ways(inputs, base), strict=True):
        danger, gain = judged(inputs, at)
        table[name] = {
            "Q_h": float(danger.mean()),
            "Q_h near the boundary": float(danger[near].mean()),
            "Q_h above 0 there": float((danger[near] > 0).mean()),
            "A_r": float(gain.mean()),
            "A_r near the boundary": float(gain[near].mean()),
            "|u|^2": float(np.square(at).sum(-1).mean()),
        }
    if policy.spec.latent == 2:
        draw_path(task, seen[nearest[0]], judged, ways)
    return table


def draw_path(task: str, state: np.ndarray, judged: Any, ways: Any) -> None:  # noqa: ANN401
    """Draw the ways of 12 draws of u_0 over the contours of Q_h and A_r in one state."""
    side = np.linspace(-3.0, 3.0, 61, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    danger, gain = judged(np.repeat(state[None], len(grid), 0), grid)
    base = np.random.default_rng(1).standard_normal((12, 2)).astype(np.float32)
    steps = np.stack(ways(np.repeat(state[None], 12, 0), base))
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.frameon": False}):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for panel, field, title in zip(
            figure.subplots(1, 2, sharey=True), (danger, gain), ("Q_h", "A_r"), strict=True
        ):
            image = panel.contourf(side, side, field.reshape(61, 61), 16, cmap="Greys")
            figure.colorbar(image, ax=panel)
            colours = (VERMILION, BLUE, "#009e73")
            for index, colour in enumerate(colours[: len(steps) - 1]):
                way = steps[index + 1] - steps[index]
                name = EXPERTS[index].replace("_", " ")
                panel.quiver(*steps[index].T, *way.T, color=colour, angles="xy", scale_units="xy",
                             scale=1, width=0.006, label=name)  # fmt: skip
            panel.set(title=f"{task}: {title} over u", xlabel="u_1", xlim=(-3, 3), ylim=(-3, 3))
            panel.set_box_aspect(1)
        figure.axes[0].set_ylabel("u_2")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(PICTURES / "flrp-path.png", dpi=110)


def show_paths(arguments: argparse.Namespace) -> None:
    """Print the means after each expert for each agent."""
    for name, case in cases(arguments):
        table = once(f"flrp_path_{name}", lambda c=case, n=name: path(*c(), n))
        for after, row in table.items():
            if isinstance(row, dict):
                print(f"{name} {after:8}", "  ".join(f"{k} {v:.4g}" for k, v in row.items()))


def show(columns: list[dict[str, Any]]) -> None:
    """Print one line for each figure, with a column for each seed."""
    for key, first in columns[0].items():
        if isinstance(first, int | float):
            print(f"{key:52}", *(f"{column[key]:>10.4g}" for column in columns))


def main() -> None:
    """Run the parts without a stored result, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["boat", "density", "refine", "bounds", "path"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="refine, bounds, path: folder of TASK.hdf5")
    parser.add_argument(
        "--agents", nargs="+", default=[], metavar="TASK=FILE", help="of bounds, path"
    )
    parser.add_argument("--tasks", nargs="+", default=["CarCircle", "BallCircle", "CarRun"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    seeds = arguments.seeds
    if arguments.what == "boat":
        show([once(f"flrp_boat_{seed}", lambda s=seed: boat(s)) for seed in seeds])
        show([once("flrp_speed", speed)])
    elif arguments.what == "density":
        show([once(f"flrp_density_{seed}", lambda s=seed: density(s)) for seed in seeds])
        draw_density(seeds[0])
    elif arguments.data is None and (arguments.what == "refine" or arguments.agents):
        parser.error(f"{arguments.what} of the field's tasks needs --data FOLDER")
    elif arguments.what == "bounds":
        show_bounds(arguments)
    elif arguments.what == "path":
        show_paths(arguments)
    else:
        found = {
            task: [
                once(
                    f"flrp_refine_{task}_{seed}",
                    lambda t=task, s=seed: refine(t, s, arguments.data),
                )
                for seed in seeds
            ]
            for task in arguments.tasks
        }
        for task, tables in found.items():
            for steps in REFINE_STEPS:
                rows = [table[str(steps)] for table in tables]
                told = (f"{key} {np.mean([r[key] for r in rows]):.3f}" for key in rows[0])
                print(f"{task:16} T={steps:<3}", "  ".join(told))
        draw_refinement(found)


if __name__ == "__main__":
    main()
