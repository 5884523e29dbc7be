"""Compare strategies that replace an action: on the boat, in many dimensions, and in time.

    python benchmarks/replacement.py          # 3 seeds; resumes; prints the tables

Boat: there are two shields for each seed. One is that of the agent that `boat.py --steps 20000`
trains and stores (SafeFQL, whose fallback is the agent's own actor, which maximises reward). The
other is that of `ShieldTrainer` on the same log, whose fallback maximises safety. Each has the
delta that certifies 90% of the starts with V_h <= 0, and also delta 0, where errors of the critics
become visible. Each strategy and each of two agents has 200 episodes from starts with V_h <=
-delta. The agents head straight to the goal with N(0, 0.3) on each entry, or act at random.
`OwnSamples` draws from the agent's own noise. "Unlike" is the share of the replaced actions that
the default strategy would have replaced by another action.

Dimensions: the critics are untrained (neither smooth nor convex) and take m actions, the proposals
are spread over the box, and the threshold accepts 30% of them. The script measures how far each
strategy moves the rejected ones.

Time: the script times calls of `Shield.filter_rows` for each action, with every action rejected and
the states known. States and proposals are those of the first agent behind ShieldTrainer's shield.
The figures are medians over rounds, and each round also times the reference, one NumPy forward pass
of a (256, 256) network.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from boat import BOAT, straight
from common import RESULTS, machine, once

from safeshield import SafeFQL, Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.calibration.calibrate import default_deltas, start_observations
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import STATE_HIGH, STATE_LOW
from safeshield.nn.mlp import EnsembleMLP
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import BatchPolicy, as_batch_policy, batch_policy
from safeshield.shield import (
    FallbackPolicy,
    NearestAcceptable,
    OwnSamples,
    ProjectedGradient,
    Replacement,
)
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import ADVANTAGE, CONSTRAINT, EXCESS, FALLBACK, SafetyScale

NOISE, SHARE, ROUNDS = 0.3, 0.9, 15
STRATEGIES: dict[str, Callable[[object], Replacement]] = {
    "nearest": lambda _: NearestAcceptable(),
    "fallback": lambda _: FallbackPolicy(),
    "gradient": lambda _: ProjectedGradient(),
    "own samples": lambda policy: OwnSamples(policy),
}


@batch_policy
def noisy_straight(observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return actions towards the goal with exploration noise."""
    course = straight(observations, rng)
    noisy = course + NOISE * rng.standard_normal(course.shape)
    return np.clip(noisy, -1.0, 1.0).astype(np.float32)


class Watched:
    """A policy behind a shield, or without one, that records the replaced actions."""

    batched = True

    def __init__(self, policy: BatchPolicy, shield: Shield | None) -> None:
        self.policy, self.shield = policy, shield
        self.rejected: list[tuple[np.ndarray, np.ndarray]] = []
        self.moved: list[np.ndarray] = []
        self.hopeless = self.steps = self.unlike = 0
        self.default = shield and shield.with_replacement(NearestAcceptable())

    def __call__(self, observations: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Return the actions, and measure those that were replaced."""
        proposed = np.asarray(self.policy(observations, rng), np.float32)
        self.steps += len(proposed)
        if self.shield is None:
            return proposed
        executed, report = self.shield.filter(observations, proposed)
        replaced = np.asarray(report.intervened)
        scaled = self.shield.model.scaling.actions(np.stack([executed, proposed]))
        self.moved.append(np.linalg.norm(scaled[0] - scaled[1], axis=-1)[replaced])
        assert self.default is not None
        default, _ = self.default.filter(observations, proposed)
        self.unlike += int((np.abs(executed - default).max(axis=-1) > 1e-5).sum())
        self.hopeless += int((~np.asarray(report.acceptable)).sum())
        self.rejected.append((observations[replaced], proposed[replaced]))
        return executed


def boat_shield(kind: str, seed: int, steps: int) -> Shield:
    """Return a trained shield with the delta of the 0.9 share."""
    if kind == "SafeFQL":
        path = RESULTS / f"boat_{steps}_{seed}.safetensors"
        if not path.exists():
            raise SystemExit(f"train the agent first: python benchmarks/boat.py --steps {steps}")
        shield = SafeFQL.load(path).shield()
    else:
        path = RESULTS / f"boat_shield_{steps}_{seed}.safetensors"
        if not path.exists():
            log = collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
            trainer = ShieldTrainer(ShieldConfig(seed=seed), device="cpu")
            trainer.fit(log, steps=steps).shield().save(path)
        shield = Shield.load(path)
    starts = start_observations(shield, gym.make(BOAT), 2000, seed)
    return shield.with_delta(default_deltas(shield, starts, (SHARE,))[0])


def rollouts(kind: str, seed: int, steps: int, episodes: int, *, at_zero: bool) -> dict[str, Any]:
    """Run every agent with every strategy, and without a shield."""
    shield = boat_shield(kind, seed, steps)
    shield = shield.with_delta(0.0) if at_zero else shield
    rng = np.random.default_rng(30_000 + seed)
    starts = rng.uniform(STATE_LOW, STATE_HIGH, (10 * episodes, 2)).astype(np.float32)
    starts = starts[np.asarray(shield.value(starts)) <= shield.threshold][:episodes]
    agents = {
        "straight": noisy_straight,
        "random": as_batch_policy("random", shield.action_space),
    }
    rows: dict[str, Any] = {"seed": seed, "delta": shield.delta, "episodes": len(starts)}
    for agent, policy in agents.items():
        for name in ("none", *STRATEGIES):
            acting = Watched(
                policy,
                None if name == "none" else shield.with_replacement(STRATEGIES[name](policy)),
            )
            runs = run_episodes(
                gym.make(BOAT),
                acting,
                len(starts),
                seed,
                reset_options={"state": starts.astype(np.float64)},
                num_envs=len(starts),
            )
            moved = np.concatenate([np.zeros(0), *acting.moved])
            rows[f"{agent}/{name}"] = {
                "replaced": len(moved) / acting.steps,
                "unlike": acting.unlike / max(len(moved), 1),
                "moved": float(moved.mean()) if len(moved) else 0.0,
                "return": float(np.mean([run.total_return for run in runs])),
                "violating": sum(run.violated for run in runs),
                "nothing acceptable": acting.hopeless / acting.steps,
            }
    return rows


def untrained(width: int, seed: int) -> Shield:
    """Return a shield with untrained critics of 4 observation and `width` action entries."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        CONSTRAINT: EnsembleMLP(4, 1, (8,)),
        EXCESS: EnsembleMLP(4, 1, (8,)),
        ADVANTAGE: EnsembleMLP(4 + width, 1, (128, 128, 128), members=2),
        FALLBACK: EnsembleMLP(4 + width, width, (128, 128)),
    }
    networks = {
        name: {key: tensor.numpy() for key, tensor in part.init(generator).items()}
        for name, part in parts.items()
    }
    seen, box = gym.spaces.Box(-9.0, 9.0, (4,)), gym.spaces.Box(-1.0, 1.0, (width,))
    scaling = Scaling(np.zeros(4, "f4"), np.ones(4, "f4"), box.low, box.high)
    return Shield(SafetyModel.of_networks(seen, box, scaling, SafetyScale(0.0, 1.0, 1.0), networks))


def dimensions(width: int, count: int = 2000) -> dict[str, Any]:
    """Measure how far each strategy moves rejected proposals, with untrained critics."""
    rows: dict[str, list[float]] = {}
    for seed in range(5):
        shield = untrained(width, seed)
        rng = np.random.default_rng(seed)
        # All rows have one state, and the threshold is a quantile over its actions.
        seen = np.repeat(rng.standard_normal((1, 4)).astype(np.float32), count, axis=0)
        proposed = rng.uniform(-1, 1, (count, width)).astype(np.float32)
        states = shield.states(seen)
        values = shield.model.action_values(states, proposed)
        limit = float(np.quantile(values, 0.3))
        for name in ("nearest", "fallback", "gradient", "own samples"):
            acting = shield.with_replacement(STRATEGIES[name]("random"))
            executed, report = acting.filter_rows(states, seen, proposed, limit)
            replaced = np.asarray(report.intervened)
            moved = np.linalg.norm(executed - proposed, axis=-1)[replaced]
            rows.setdefault(name, []).append(float(moved.mean()))
            rows.setdefault(f"{name}, acceptable", []).append(
                float(np.asarray(report.acceptable)[replaced].mean())
            )
    return {name: float(np.mean(values)) for name, values in rows.items()}


def times(steps: int) -> dict[str, Any]:
    """Return the microseconds for each rejected action, all rejected, and of the reference."""
    from stable_baselines3 import PPO

    shield = boat_shield("ShieldTrainer", 0, steps)
    watched = Watched(noisy_straight, shield)
    run_episodes(gym.make(BOAT), watched, 200, 7, num_envs=200)
    seen = np.concatenate([a for a, _ in watched.rejected])
    proposed = np.concatenate([b for _, b in watched.rejected])
    order = np.random.default_rng(0).permutation(len(seen))
    seen, proposed = seen[order], proposed[order]
    weights = np.random.default_rng(0)
    w = [weights.standard_normal(s).astype(np.float32) for s in ((4, 256), (256, 256), (256, 1))]
    x = weights.standard_normal((1, 4)).astype(np.float32)
    ppo = PPO("MlpPolicy", gym.make(BOAT), device="cpu")
    makers = {
        **{name: make(noisy_straight) for name, make in STRATEGIES.items()},
        "own samples of PPO": OwnSamples(ppo),
    }
    out: dict[str, Any] = {"pairs": len(seen)}
    for batch, calls in ((1, 256), (256, 4)):
        pieces = [slice(i, i + batch) for i in range(0, calls * batch, batch)]
        timed: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, strategy in makers.items():
                acting = shield.with_replacement(strategy)
                parts = [(acting.states(seen[i]), seen[i], proposed[i]) for i in pieces]

                def judge_all(acting: Shield = acting, parts: list[Any] = parts) -> None:
                    for part in parts:
                        acting.filter_rows(*part)

                timed.setdefault(name, []).append(cpu_microseconds(judge_all) / (calls * batch))

            def references() -> None:
                for _ in range(1000):
                    _ = np.maximum(np.maximum(x @ w[0], 0.0) @ w[1], 0.0) @ w[2]

            timed.setdefault("reference", []).append(cpu_microseconds(references) / 1000)
        out[str(batch)] = {name: float(np.median(values)) for name, values in timed.items()}
    return out


def cpu_microseconds(function: Callable[[], None]) -> float:
    """Return the CPU time of one thread, which excludes other work on the machine."""
    start = time.thread_time()
    function()
    return (time.thread_time() - start) * 1e6


def boat_table(kind: str, seeds: list[dict[str, Any]]) -> None:
    """Print the means over the seeds, and the violating episodes of each seed."""
    deltas = [round(row["delta"], 3) for row in seeds]
    print(f"{kind}, delta {deltas}; violating of {seeds[0]['episodes']} episodes, for each seed")
    for agent, name in itertools.product(("straight", "random"), ("none", *STRATEGIES)):
        rows = [row[f"{agent}/{name}"] for row in seeds]
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        print(
            f"{agent:9} {name:12} replaced {means['replaced']:6.2%}  unlike {means['unlike']:4.0%}"
            f"  moved {means['moved']:.3f}  return {means['return']:7.1f}  violating "
            f"{[row['violating'] for row in rows]}  none acceptable "
            f"{means['nothing acceptable']:.2%}"
        )


def main() -> None:
    """Run the parts without a stored result, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_000, help="of the agents to load")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    steps, episodes, redo = arguments.steps, arguments.episodes, arguments.redo
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    for at_zero, kind in itertools.product((False, True), ("SafeFQL", "ShieldTrainer")):
        boat_table(
            kind,
            [
                once(
                    f"replacement_{kind}_{steps}_{episodes}_{seed}{'_at_zero' * at_zero}",
                    lambda seed=seed, kind=kind, at_zero=at_zero: rollouts(
                        kind, seed, steps, episodes, at_zero=at_zero
                    ),
                    redo=redo,
                )
                for seed in arguments.seeds
            ],
        )
    for width in (2, 6, 17, 40):
        row = once(f"replacement_dimensions_{width}", lambda width=width: dimensions(width))
        moved = {name: round(row[name], 3) for name in STRATEGIES}
        found = {name: round(row[f"{name}, acceptable"], 3) for name in STRATEGIES}
        print(f"{width:3} actions: moved {moved}, acceptable {found}")
    timed = once(f"replacement_times_{steps}", lambda: times(steps), redo=redo)
    for batch in ("1", "256"):
        reference = timed[batch]["reference"]
        for name, value in timed[batch].items():
            print(f"batch {batch:>3} {name:20} {value:8.1f} us an action, {value / reference:5.1f} "
                  "references")  # fmt: skip


if __name__ == "__main__":
    main()
