"""Measure Safe-Support Q-learning: unsafe visits in training, returns, and errors of its values.

    python benchmarks/ssql.py tabular            # CliffWalking, slippery FrozenLake; minutes
    python benchmarks/ssql.py pendulum           # beside SAC and DQN; 5 seeds; resumes
    python benchmarks/ssql.py boat
    python benchmarks/ssql.py pendulum --learners SSQL SSQL-fixed SAC-shielded   # stage two; SAC
    python benchmarks/ssql.py values             # predicted and realised returns of these agents
    python benchmarks/ssql.py lake               # values against exact ones, stage two; FrozenLake
    python benchmarks/ssql.py picture            # learning curves of both tasks
    python benchmarks/ssql.py bullet --data FOLDER    # BallRun; needs the suites

The violating episodes of every learner are counted from its first step on. Evaluations between
stretches of training use separate episodes, which are not counted. For each seed a shield is
learned and calibrated from a separate log. Safe-Support Q-learning collects from certified starts,
with uniform actions restricted to those that the shield accepts. SAC and DQN have the settings of
Stable-Baselines3, except for networks of 64 x 64 and, for DQN, a grid of actions and
learning_starts of 1,000.

"SSQL-fixed" does not refresh its collector, and "SAC-shielded" is SAC in the same shield, from the
same starts. After the training of SSQL and SSQL-fixed, stage two runs in both directions on the
collected steps, and each network plays 100 episodes in the same shield.

lake learns the table of FrozenLake with and without refreshed collectors. Its values are compared
with the exact values of the induced policy in all live states, and both extractions with the exact
return of the induced policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from common import RESULTS, machine, once
from stable_baselines3 import DQN, SAC

import safeshield
from safeshield import (
    OfflineDataset,
    SafeSupportPolicy,
    SafeSupportQLearning,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldTrainer,
    SSQLConfig,
)
from safeshield.calibration.calibrate import default_deltas, start_observations
from safeshield.demo.helmsmen import Helmsmen
from safeshield.online import SafeRules
from safeshield.policies import ShieldCallback
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.recorded import Episode
from safeshield.values.soft import induced_log_policy
from safeshield.wrappers import CertifiedStarts

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cliff_walking_maskable_ppo import CLIFF, DOWN, RIGHT, START
from cliff_walking_maskable_ppo import make as cliff
from pendulum_speed_limit import HeldTorques
from pendulum_speed_limit import make as pendulum

Array = np.ndarray
LEARNERS = ("SSQL", "SAC", "DQN")
MORE_LEARNERS = ("SSQL-fixed", "SAC-shielded")
DIRECTIONS = ("reverse", "forward")
WARM_UP = 3000
"""Steps of warm-up of "lake". Every seed reaches the goal in them, so that the unit of the values
is the spread of the warm-up's returns."""


# -- tables ---------------------------------------------------------------------------------------


class Holes(gym.Wrapper):
    """Slippery FrozenLake, 8 x 8, in which a fall into a hole costs 1."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Add the cost of a fall to the info."""
        cell, reward, terminated, truncated, info = self.env.step(action)
        fell = self.unwrapped.desc.ravel()[cell] == b"H"
        return cell, float(reward), terminated, truncated, {**info, "cost": float(fell)}


def lake() -> gym.Env:
    """Return the lake with its standard map and episodes of at most 200 steps."""
    return Holes(gym.make("FrozenLake-v1", map_name="8x8", is_slippery=True))


def model_of(env: gym.Env) -> tuple[Array, Array]:
    """Return transitions (S, A, S) and mean rewards (S, A)."""
    table = env.unwrapped.P
    transitions = np.zeros((len(table), len(table[0]), len(table)))
    rewards = np.zeros(transitions.shape[:2])
    for state, moves in table.items():
        for move, outcomes in moves.items():
            for probability, reached, reward, _ in outcomes:
                transitions[state, move, reached] += probability
                rewards[state, move] += probability * reward
    return transitions, rewards


def lake_rules() -> tuple[Array, Array]:
    """Return the moves (S, A) after which every hole can be avoided, and the final cells (S,)."""
    letters = lake().unwrapped.desc.ravel()
    transitions, _ = model_of(lake())
    holes, goal = letters == b"H", letters == b"G"
    safe = np.ones(transitions.shape[:2], dtype=bool)
    while True:
        dead = holes | (~safe.any(axis=1) & ~goal)
        kept = transitions @ dead == 0
        if (kept == safe).all():
            return safe, holes | goal
        safe = kept


def cliff_rules() -> tuple[Array, Array]:
    """Return all moves (S, A) except the 11 that fall, and the final cell, which is the goal."""
    safe = np.ones((48, 4), dtype=bool)
    safe[CLIFF - 12, DOWN] = safe[START, RIGHT] = False
    return safe, np.arange(48) == 47


def expected(env: gym.Env, safe: Array, final: Array, steps: int, policy: Array | None) -> Array:
    """Return the exact return (S,) of `steps` steps, of a policy or of the best safe one."""
    transitions, rewards = model_of(env)
    value = np.zeros(len(safe))
    for _ in range(steps):
        q = rewards + transitions @ np.where(final, 0.0, value)
        if policy is None:
            value = np.where(safe.any(axis=1), np.where(safe, q, -np.inf).max(axis=1), 0.0)
        else:
            value = q[np.arange(len(q)), policy]
    return value


TABLES: dict[str, tuple[Callable[[], gym.Env], Callable[[], tuple[Array, Array]], Array, int]] = {
    "CliffWalking": (lambda: cliff(anywhere=True), cliff_rules, np.arange(START + 1), 100),
    "FrozenLake": (lake, lake_rules, np.arange(1), 200),
}


def table_agent(
    task: str, seed: int, steps: int, refresh: int | None, warm_up: int = 1000
) -> SafeSupportQLearning:
    """Learn one of the two tabular tasks from rules alone."""
    make, rules, *_ = TABLES[task]
    safe, _ = rules()
    env = make()
    given = SafeRules(lambda cell, move: safe[cell, int(move)], env.action_space)
    config = SSQLConfig(
        seed=seed,
        temperature=0.01 if task == "FrozenLake" else 0.05,
        discount=0.995 if task == "FrozenLake" else 0.98,
        learning_rate=0.03,
        refresh_every=refresh,
        learning_starts=warm_up,
        extraction_steps=0,
    )
    return SafeSupportQLearning(env, given, config, device="cpu").learn(steps)


def table(task: str, seed: int, steps: int) -> dict[str, Any]:
    """Learn a tabular task, and compare the greedy policy with the best one."""
    make, rules, starts, horizon = TABLES[task]
    safe, final = rules()
    agent = table_agent(task, seed, steps, 1000)
    live = np.flatnonzero(safe.any(axis=1) & ~final)
    chosen = np.zeros(len(safe), np.int64)
    chosen[live] = agent.predict(live, deterministic=True)[0]
    best = expected(env, safe, final, horizon, None)
    got = expected(env, safe, final, horizon, chosen)
    draws = np.random.default_rng(seed)
    played = run_episodes(make(), agent, 100, int(draws.integers(2**31)), num_envs=1)
    return {
        "episodes": agent.tally.episodes,
        "falls": agent.tally.unsafe_episodes,
        "outside": agent.tally.proposed_outside,
        "return": float(got[starts].mean()),
        "optimum": float(best[starts].mean()),
        "falls_after": sum(run.violated for run in played),
    }


def exact_values(agent: SafeSupportQLearning, safe: Array, final: Array, live: Array) -> Array:
    """Return the exact regularised value (S,) of the agent's induced policy on the lake.

    It solves V = E_pi [ r - a log(pi / mu) + g V' ].
    """
    g, a = agent.config.discount, agent.config.temperature
    transitions, rewards = model_of(lake())
    induced = agent._induced()
    support, q = induced._values(live, induced.mu.propose(live, 1, np.random.default_rng(0)))
    log_mu = support.log_mu.double()
    log_pi = induced_log_policy(q.double(), a, log_mu)
    pi, nats = np.zeros(safe.shape), np.zeros(len(safe))
    pi[live] = log_pi.exp().numpy()
    nats[live] = (
        torch.where(log_pi.isfinite(), log_pi.exp() * (log_pi - log_mu), 0.0).sum(1).numpy()
    )
    moving = np.einsum("sa,sat->st", pi, transitions)
    moving[:, final] = 0.0
    gain = (pi * rewards).sum(axis=1) - a * nats
    moving[final], gain[final] = 0.0, 0.0
    return np.asarray(np.linalg.solve(np.eye(len(safe)) - g * moving, gain))


def agreement(predicted: Array, realised: Array, seed: int) -> dict[str, float]:
    """Return slope and errors of realised on predicted values, with a 95% interval of the slope.

    The interval is that of 2,000 bootstrap samples of the pairs. "mean_error" is the mean of
    predicted minus realised, and "mean_absolute_error" that of its size, both as shares of the
    range of the predicted values.
    """
    rng = np.random.default_rng(seed)
    slopes = []
    for _ in range(2000):
        at = rng.integers(len(predicted), size=len(predicted))
        if np.ptp(predicted[at]) > 0:
            slopes.append(np.polyfit(predicted[at], realised[at], 1)[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    error, extent = predicted - realised, float(np.ptp(predicted))
    return {
        "slope": float(np.polyfit(predicted, realised, 1)[0]),
        "slope_low": float(low),
        "slope_high": float(high),
        "mean_error": float(error.mean()) / extent,
        "mean_absolute_error": float(np.abs(error).mean()) / extent,
    }


def extracted(agent: SafeSupportQLearning, direction: str, steps: int) -> SafeSupportQLearning:
    """Run stage two in a direction on the collected steps, and act by its network."""
    kept = agent.config
    agent.config = dataclasses.replace(kept, extraction=direction, extraction_steps=steps)
    agent._extract()
    agent.config = dataclasses.replace(agent.config, policy="parametric")
    return agent


def lake_values(seed: int, steps: int, refresh: int | None) -> dict[str, Any]:
    """Compare the values of the lake's table, and both extractions, with exact numbers."""
    _, rules, starts, horizon = TABLES["FrozenLake"]
    safe, final = rules()
    agent = table_agent("FrozenLake", seed, steps, refresh, WARM_UP)
    live = np.flatnonzero(safe.any(axis=1) & ~final)
    exact = exact_values(agent, safe, final, live)[live]
    row: dict[str, Any] = {
        "falls": agent.tally.unsafe_episodes,
        "episodes": agent.tally.episodes,
        "optimum": float(expected(lake(), safe, final, horizon, None)[starts].mean()),
        **agreement(np.asarray(agent.value(live)), exact, seed),
    }

    def greedy() -> float:
        chosen = np.zeros(len(safe), np.int64)
        chosen[live] = agent.predict(live, deterministic=True)[0]
        return float(expected(lake(), safe, final, horizon, chosen)[starts].mean())

    row["induced"] = greedy()
    for direction in DIRECTIONS:
        extracted(agent, direction, 2000)
        row[direction] = greedy()
    return row


def show_lake(arguments: argparse.Namespace) -> None:
    """Print slope, errors and returns for each seed, refreshed and fixed."""
    steps = arguments.table_steps
    for refresh in (1000, None):
        for seed in arguments.seeds:
            name = "fixed" if refresh is None else "refreshed"
            row = once(
                f"ssql_lake_{name}_{seed}_{steps}",
                lambda s=seed, r=refresh: lake_values(s, steps, r),
            )
            print(
                f"lake {name:9} seed {seed}: {row['falls']} falls in {row['episodes']}; slope "
                f"{row['slope']:.3f} [{row['slope_low']:.3f}, {row['slope_high']:.3f}], mean error "
                f"{row['mean_error']:+.1%}, absolute {row['mean_absolute_error']:.1%}; return: "
                f"induced {row['induced']:.4f}, reverse {row['reverse']:.4f}, forward "
                f"{row['forward']:.4f}, best {row['optimum']:.4f}",
                flush=True,
            )


def tabular(arguments: argparse.Namespace) -> None:
    """Print the table of the tabular tasks."""
    for task in TABLES:
        for seed in arguments.seeds:
            row = once(
                f"ssql_{task}_{seed}_{arguments.table_steps}",
                lambda t=task, s=seed: table(t, s, arguments.table_steps),
            )
            print(
                f"{task:13} seed {seed}: {row['falls']} falls in {row['episodes']} episodes, "
                f"{row['outside']} proposals outside; return {row['return']:.4f}, best inside "
                f"{row['optimum']:.4f}; {row['falls_after']} falls in 100 more",
                flush=True,
            )


# -- a box, beside SAC and DQN --------------------------------------------------------------------


def boat() -> gym.Env:
    """Return the boat environment with a time step of 0.02 s and trips of 100 steps."""
    return gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)


def shield_of(task: str, seed: int) -> Shield:
    """Return the shield of a seed, learned and calibrated from a separate log."""
    path = RESULTS / f"ssql_{task}_{seed}_shield.safetensors"
    if not path.exists():
        make, driver = TASKS[task]
        episodes, updates = LOGS[task]
        log = safeshield.collect(make(), driver(), episodes, seed=1000 + seed)
        config = ShieldConfig(seed=seed, critic_hidden=(64, 64), safety_discount=0.99)
        trainer = ShieldTrainer(config, device="cpu").fit(log, steps=updates)
        RESULTS.mkdir(parents=True, exist_ok=True)
        deltas = None
        if task == "boat":
            # Only the strictest threshold of the walk, which certifies 80% of the starts. The most
            # permissive threshold that passes allows violations up to its rate.
            starts = start_observations(trainer.shield(), make(), 400, seed)
            deltas = default_deltas(trainer.shield(), starts)[:1]
        shield = trainer.calibrate(make(), epsilon=0.02, confidence=0.95, seed=seed, deltas=deltas)
        shield.save(path)
    return Shield.load(path)


TASKS: dict[str, tuple[Callable[[], gym.Env], Callable[[], Any]]] = {
    "pendulum": (pendulum, HeldTorques),
    "boat": (boat, Helmsmen),
}
TITLES = {"pendulum": "Pendulum with a speed limit", "boat": "Boat between two rocks"}
LOGS = {"pendulum": (400, 5000), "boat": (1500, 10_000)}
"""For each task, the number of episodes in the log from which its shield is trained, and the number
of training updates."""
SETTINGS: dict[str, dict[str, Any]] = {
    "pendulum": {"temperature": 0.5, "discount": 0.98},
    "boat": {"temperature": 0.1, "discount": 0.98},
}


class Grid(gym.ActionWrapper):
    """A Box divided into choices for DQN: 9 torques, or 16 courses."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._points = np.linspace(-2.0, 2.0, 9, dtype=np.float32)[:, None]
        if env.action_space.shape == (2,):
            angle = np.arange(16) * np.pi / 8
            self._points = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        self.action_space = gym.spaces.Discrete(len(self._points))

    def action(self, action: int) -> Array:
        """Return the point of the Box that a choice stands for."""
        return self._points[action]


def start_at(env: gym.Env, shield: Shield) -> gym.Env:
    """Wrap an environment to begin in certified states, without filtering actions."""

    class Starts(gym.Wrapper):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
            while True:
                observation, info = self.env.reset(seed=seed, options=options)
                seed = None
                if shield.certified(observation):
                    return observation, info

    return Starts(env)


def learner(name: str, task: str, seed: int, shield: Shield) -> tuple[Any, gym.Env]:
    """Return an untrained learner, and the environment in which it is evaluated."""
    make = TASKS[task][0]
    nets = {"net_arch": [64, 64]}
    if name.startswith("SSQL"):
        config = SSQLConfig(
            seed=seed, critic_hidden=(64, 64), actor_hidden=(64, 64), batch_size=128,
            refresh_every=1000 if name == "SSQL" else None, extraction_steps=0, **SETTINGS[task],
        )  # fmt: skip
        behaviour = SafeSupportPolicy(shield, "uniform", seed=seed)
        env = CertifiedStarts(SafetyShield(make(), shield))
        judged = CertifiedStarts(SafetyShield(make(), shield))
        return SafeSupportQLearning(env, behaviour, config, device="cpu"), judged
    if name.startswith("SAC"):
        env = start_at(make(), shield)
        if name == "SAC-shielded":
            env = CertifiedStarts(SafetyShield(make(), shield))
        return SAC("MlpPolicy", env, policy_kwargs=nets, seed=seed, device="cpu"), env
    env = Grid(start_at(make(), shield))
    model = DQN("MlpPolicy", env, policy_kwargs=nets, seed=seed, device="cpu", learning_starts=1000)
    return model, Grid(start_at(make(), shield))


def run(name: str, task: str, seed: int, steps: int, stretches: int = 5) -> dict[str, Any]:
    """Train one learner in stretches; evaluate 20 episodes after each, and 100 at the end."""
    shield = shield_of(task, seed)
    model, env = learner(name, task, seed, shield)
    counts = ShieldCallback(require_shield=name not in ("SAC", "DQN"))
    curve = []
    for stretch in range(stretches):
        first = stretch == 0
        model.learn(steps // stretches, callback=counts, reset_num_timesteps=first)
        last = stretch == stretches - 1
        runs = run_episodes(env, model, 100 if last else 20, 50_000 + seed, num_envs=1)
        curve.append([(stretch + 1) * steps // stretches, mean_return(runs)])
    if name.startswith("SSQL"):
        which = "agent" if name == "SSQL" else "fixed"
        model.save(RESULTS / f"ssql_{task}_{seed}_{which}_{steps}.safetensors")
    row = {
        "episodes": counts.episodes,
        "violating": counts.violating_episodes,
        "final": curve[-1][1],
        "final_violating": sum(run.violated for run in runs),
        "curve": curve,
        "delta": shield.delta,
    }
    if name.startswith("SSQL"):
        acting = SafeSupportPolicy(shield, "uniform", seed=seed)
        row["behaviour"] = mean_return(run_episodes(env, acting, 50, 60_000 + seed, num_envs=1))
        row["proposed_outside"] = model.tally.proposed_outside
        row["nothing_admitted"] = model.tally.nothing_admitted
        for direction in DIRECTIONS:
            runs = run_episodes(env, extracted(model, direction, 2000), 100, 50_000 + seed,
                                num_envs=1)  # fmt: skip
            row[direction] = mean_return(runs)
            row[f"{direction}_violating"] = sum(run.violated for run in runs)
    return row


def mean_return(runs: list[Episode]) -> float:
    """Return the mean undiscounted return."""
    return float(np.mean([run.total_return for run in runs]))


def beside(task: str, arguments: argparse.Namespace) -> None:
    """Print the table of one task."""
    for name in arguments.learners:
        for seed in arguments.seeds:
            row = once(
                f"ssql_{task}_{name}_{seed}_{arguments.steps}",
                lambda n=name, s=seed: run(n, task, s, arguments.steps),
            )
            more = f"; behaviour {row['behaviour']:.1f}" if "behaviour" in row else ""
            for direction in DIRECTIONS:
                if direction in row:
                    more += f"; {direction} {row[direction]:.1f}, "
                    more += f"{row[f'{direction}_violating']} of 100"
            print(
                f"{task} {name:12} seed {seed}: {row['violating']:3} of {row['episodes']} episodes "
                f"violate; final {row['final']:.1f}, {row['final_violating']} of 100 violate{more}",
                flush=True,
            )


# -- values ---------------------------------------------------------------------------------------


def realised(agent: SafeSupportQLearning, env: gym.Env, episodes: int, seed: int) -> Array:
    """Return (episodes, 3): predicted V(s0), discounted regularised and plain returns.

    In a truncated episode, the value of the last state replaces the rewards that are missing.
    """
    rng = np.random.default_rng(seed)
    g, a = agent.config.discount, agent.config.temperature
    rows = []
    for episode in range(episodes):
        seen, _ = env.reset(seed=70_000 + 1000 * seed + episode)
        predicted, soft, plain, weight = float(agent.value(seen)), 0.0, 0.0, 1.0
        ended = False
        while not ended:
            actions, nats = agent.draw(seen[None], rng)
            seen, reward, terminated, truncated, _ = env.step(actions[0])
            soft += weight * (float(reward) - a * float(nats[0]))
            plain += weight * float(reward)
            weight *= g
            ended = terminated or truncated
        rest = 0.0 if terminated else weight * float(agent.value(seen))
        # The regularised value counts the cost of the first action as V(s0) does.
        rows.append([predicted, soft + rest, plain + rest])
    return np.array(rows)


def judge_values(task: str, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """Fit realised = bias + slope * predicted by least squares."""
    shield = shield_of(task, seed)
    behaviour = SafeSupportPolicy(shield, "uniform", seed=seed)
    path = RESULTS / f"ssql_{task}_{seed}_agent_{steps}.safetensors"
    agent = SafeSupportQLearning.load(path, behaviour, device="cpu")
    env = CertifiedStarts(SafetyShield(TASKS[task][0](), shield))
    facts: dict[str, Any] = {"episodes": episodes}
    # First the policy to which the values belong, which chooses among as many draws as the targets
    # do; then that of `predict`, which chooses among more.
    for draws in (agent.config.samples, agent.config.predict_samples):
        agent.config = dataclasses.replace(agent.config, predict_samples=draws)
        rows = realised(agent, env, episodes, seed)
        for name, column in (("regularised", 1), ("plain", 2)):
            for key, value in agreement(rows[:, 0], rows[:, column], seed).items():
                facts[f"{draws}_{name}_{key}"] = value
            facts |= {
                f"{draws}_{name}_bias": float((rows[:, 0] - rows[:, column]).mean()),
                f"{draws}_{name}_correlation": float(
                    np.corrcoef(rows[:, 0], rows[:, column])[0, 1]
                ),
            }
        facts[f"{draws}_predicted"] = float(rows[:, 0].mean())
    return facts


def values(arguments: argparse.Namespace) -> None:
    """Print slope and bias for each seed."""
    for task in TASKS:
        for seed in arguments.seeds:
            if not (RESULTS / f"ssql_{task}_{seed}_agent_{arguments.steps}.safetensors").exists():
                print(f"{task} seed {seed}: run 'ssql.py {task} --steps {arguments.steps}' first")
                continue
            row = once(
                f"ssql_values_{task}_{seed}_{arguments.steps}",
                lambda t=task, s=seed: judge_values(t, s, arguments.steps, 60),
            )
            for draws in (key.split("_")[0] for key in row if key.endswith("_predicted")):
                told = {name: row[f"{draws}_{name}"] for name in (
                    "predicted", "regularised_slope", "regularised_slope_low",
                    "regularised_slope_high", "regularised_mean_error",
                    "regularised_mean_absolute_error", "regularised_bias",
                    "regularised_correlation", "plain_slope", "plain_bias",
                )}  # fmt: skip
                print(
                    f"{task:8} seed {seed}, {draws} draws:",
                    *(f"{name} {value:.2f}" for name, value in told.items()),
                    flush=True,
                )


def picture(arguments: argparse.Namespace) -> None:
    """Draw the learning curves of each task's longest runs: mean and range over the seeds."""
    import json

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in TASKS:
        for name in LEARNERS:
            paths = [
                p for s in arguments.seeds for p in RESULTS.glob(f"ssql_{task}_{name}_{s}_*.json")
            ]
            if paths:
                rows = [json.loads(path.read_text()) for path in paths]
                longest = max(row["curve"][-1][0] for row in rows)
                rows = [row for row in rows if row["curve"][-1][0] == longest]
                found.setdefault(task, {})[name] = rows
    if not found:
        raise SystemExit("nothing to draw: run 'ssql.py pendulum' or 'ssql.py boat' first")
    figure, axes = plt.subplots(1, len(found), figsize=(4.8 * len(found), 4.0), squeeze=False)
    for axis, (task, learners) in zip(axes[0], found.items(), strict=True):
        for name, rows in learners.items():
            curves = np.array([row["curve"] for row in rows])
            at, mean = curves[0, :, 0], curves[:, :, 1].mean(axis=0)
            unsafe, all_of = (sum(row[key] for row in rows) for key in ("violating", "episodes"))
            told = f"{name}: {unsafe} of {all_of} episodes of training violate"
            (line,) = axis.plot(at, mean, marker=".", label=told)
            axis.fill_between(at, curves[:, :, 1].min(axis=0), curves[:, :, 1].max(axis=0),
                              alpha=0.2, color=line.get_color())  # fmt: skip
        axis.set(title=TITLES[task], xlabel="steps of the environment", ylabel="return")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    seeds = max(len(rows) for learners in found.values() for rows in learners.values())
    figure.suptitle(f"Return while learning: mean and range of {seeds} seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "pictures" / "ssql.png", dpi=110)


# -- a suite's task -------------------------------------------------------------------------------


def ball(seed: int, data: str, steps: int) -> dict[str, Any]:
    """Learn a shield from the log of BallRun, and learn the task behind it."""
    from safeshield.suites.constraints import with_constraint
    from safeshield.suites.labels import label

    def make() -> gym.Env:
        return with_constraint(gym.make("safeshield.suites:SafetyBallRun-v0"))

    log = label(OfflineDataset.load(Path(data) / "BallRun.hdf5"), "BallRun")
    config = ShieldConfig(seed=seed, critic_hidden=(64, 64), safety_discount=0.99)
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=5000)
    shield = trainer.calibrate(make(), epsilon=0.05, confidence=0.95, seed=seed)
    settings = SSQLConfig(
        seed=seed, temperature=1.0, refresh_every=1000, critic_hidden=(64, 64), batch_size=128,
        extraction_steps=0,
    )  # fmt: skip
    env = CertifiedStarts(SafetyShield(make(), shield))
    behaviour = SafeSupportPolicy(shield, "uniform", seed=seed)
    agent = SafeSupportQLearning(env, behaviour, settings, device="cpu").learn(steps)
    runs = run_episodes(env, agent, 20, 50_000 + seed, num_envs=1)
    before = run_episodes(env, behaviour, 20, 50_000 + seed, num_envs=1)
    return {
        "episodes": agent.tally.episodes,
        "violating": agent.tally.unsafe_episodes,
        "outside": agent.tally.proposed_outside,
        "nothing_admitted": agent.tally.nothing_admitted,
        "return": mean_return(runs),
        "violating_after": sum(run.violated for run in runs),
        "behaviour": mean_return(before),
    }


def bullet(arguments: argparse.Namespace) -> None:
    """Print the results of BallRun."""
    for seed in arguments.seeds:
        row = once(
            f"ssql_BallRun_{seed}_{arguments.steps}",
            lambda s=seed: ball(s, arguments.data, arguments.steps),
        )
        print(f"BallRun seed {seed}:", {k: row[k] for k in list(row)[:7]}, flush=True)


def main() -> None:
    """Run the parts without a stored result, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["tabular", "lake", *TASKS, "values", "picture", "bullet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--table-steps", type=int, default=20_000)
    parser.add_argument(
        "--learners", nargs="+", default=list(LEARNERS), choices=[*LEARNERS, *MORE_LEARNERS]
    )
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    if arguments.what in TASKS:
        beside(arguments.what, arguments)
    else:
        does = {"tabular": tabular, "lake": show_lake, "values": values, "picture": picture}
        does["bullet"] = bullet
        does[arguments.what](arguments)


if __name__ == "__main__":
    main()
