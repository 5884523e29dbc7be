"""Measure what the SafeFQL paper claims about its actor on the boat: safety, robustness, speed.

    python benchmarks/safefql.py                  # seeds 0, 1, 2; resumes; prints the table

Each seed has 600 logged trips and 6,000 updates of SafeFQL with the settings of `boat.py`, which is
the agent of `actor_alone.py --steps 6000`. A flow as in FISOR is trained on the same critics (3,000
updates). All actors act with the noise of a deployed agent, from the same uniform starts in the
exact safe set (--starts, by default 500):

    candidates     violating episodes and mean return of the student with N = 1, 2, 4, 8, 16 draws,
                   and of the FISOR-style actor with N = 1 and 16
    paired         return of the student minus that of the FISOR-style actor with N = 16, over
                   pairs of episodes with the same start: mean, half width of the 95% interval
    perturbed      the same counts where noise of 5, 10 and 20% of the half width of the action box,
                   uniform and independent in each entry, is added to every action; and where the
                   current is 5, 10 and 20% faster than in the log
    latency        microseconds of `predict` for one observation with one thread: median and 99th
                   percentile over 10 whole episodes (4,000 steps), and milliseconds an episode of
                   400 steps. The actors take turns, an episode each. "slow" is the share of the
                   steps in which the first draw does not pass the gate, so that 16 more are
                   judged, and "search" that in which none of them passes
    training       processor seconds of the trainings (nan where a training was interrupted)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from boat import BOAT, STARTS, agent_policy, from_safe_starts
from common import RESULTS, machine, once

import safeshield
from safeshield import SafeFQL, SafeFQLConfig
from safeshield.algorithms.fisor import FISOR, FISORConfig
from safeshield.demo.helmsmen import Helmsmen
from safeshield.exact import GridValue, boat_value
from safeshield.rollouts.policies import BatchPolicy
from safeshield.rollouts.recorded import Episode

CANDIDATES, FLOW_CANDIDATES = (1, 2, 4, 8, 16), (1, 16)
PERTURBED = (0.05, 0.1, 0.2)
TIMED = 10


class Counting(SafeFQL):
    """SafeFQL that counts the states in which it draws more candidates, or searches the box."""

    slow = searched = 0

    def _candidate_noise(self, count: int, *others: Any) -> Any:  # noqa: ANN401 - as in SafeFQL
        self.slow += count
        return super()._candidate_noise(count, *others)

    def _beyond_the_draws(self, safety: Any, states: Any, *others: Any) -> Any:  # noqa: ANN401
        self.searched += len(states.inputs)
        return super()._beyond_the_draws(safety, states, *others)


def trained(seed: int, steps: int, folder: Path) -> tuple[SafeFQL, FISOR, dict[str, float]]:
    """Return the agents, trained now or read from their files, and the seconds of the trainings."""
    paths = [
        folder / f"{name}_{steps}_{seed}.safetensors" for name in ("actor_alone", "safefql_fisor")
    ]

    def train() -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        log = safeshield.collect(gym.make(BOAT), Helmsmen(), episodes=600, seed=1000 + seed)
        seconds = {"training_safefql": float("nan")}  # stays where the agent exists

        def timed(name: str, fit: Any, path: Path) -> None:  # noqa: ANN401 - a function
            checkpoint = path.with_suffix(".checkpoint")
            resumed, started = checkpoint.exists(), time.process_time()
            fit(checkpoint).save(path)
            checkpoint.unlink()
            seconds[f"training_{name}"] = float("nan") if resumed else time.process_time() - started

        if not paths[0].exists():
            config = SafeFQLConfig(
                seed=seed, discount=0.997, teacher="behaviour", distillation=0.1, candidates=1
            )
            one = SafeFQL(config, device="cpu")
            timed("safefql", lambda to: one.fit(log, steps=steps, checkpoint=to), paths[0])
        agent = SafeFQL.load(paths[0], device="cpu")
        flow = FISOR(FISORConfig(seed=seed, discount=0.997), device="cpu")
        timed(
            "fisor_actor",
            lambda to: flow._fit_actor(log, steps // 2, agent, 0.5, checkpoint=to),
            paths[1],
        )
        return seconds

    seconds = once(f"safefql_trained_{steps}_{seed}", train, folder=folder)
    return (
        Counting.load(paths[0], device="cpu"),
        FISOR.load(paths[1], device="cpu"),
        {name: seconds[name] for name in ("training_safefql", "training_fisor_actor")},
    )


def with_candidates(flow: FISOR, candidates: int) -> FISOR:
    """Return the FISOR-style actor with another number of samples."""
    return flow._changed(candidates=candidates)


def perturbed(policy: BatchPolicy, share: float) -> BatchPolicy:
    """Return a policy whose actions get uniform noise of a share of the half width of the box."""

    class Noisy:
        batched = True

        def __call__(self, observations: Any, rng: np.random.Generator, /) -> np.ndarray:  # noqa: ANN401
            actions = np.asarray(policy(observations, rng))
            noisy = actions + share * rng.uniform(-1.0, 1.0, actions.shape)
            return np.clip(noisy, -1.0, 1.0).astype(actions.dtype)

    return Noisy()  # type: ignore[return-value]


def results(name: str, runs: list[Episode]) -> dict[str, float]:
    """Return the violating episodes and the mean return."""
    return {
        f"{name}_violating": sum(run.violated for run in runs),
        f"{name}_return": float(np.mean([run.total_return for run in runs])),
    }


def safety(seed: int, steps: int, starts: int, folder: Path) -> dict[str, Any]:
    """Play the actors over N and under perturbations, and compare pairs of episodes."""
    agent, flow, _ = trained(seed, steps, folder)
    exact: GridValue = boat_value()
    row: dict[str, Any] = {"seed": seed, "steps": steps, "starts": starts}
    pairs: dict[str, list[Episode]] = {}
    for count in CANDIDATES:
        actor = agent_policy(agent.acting_by("student", candidates=count))
        pairs[f"student_{count}"] = from_safe_starts(actor, exact, seed, starts)
        row |= results(f"student_{count}", pairs[f"student_{count}"])
    for count in FLOW_CANDIDATES:
        pairs[f"fisor_{count}"] = from_safe_starts(
            agent_policy(with_candidates(flow, count)),  # type: ignore[arg-type]
            exact,
            seed,
            starts,
        )
        row |= results(f"fisor_{count}", pairs[f"fisor_{count}"])
    returns = {name: np.array([run.total_return for run in runs]) for name, runs in pairs.items()}
    for count in (1, 16):
        difference = returns[f"student_{count}"] - returns["fisor_16"]
        row[f"paired_{count}_return"] = float(difference.mean())
        row[f"paired_{count}_half_width"] = float(
            1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
        )
    for count in (1, 16):
        actor = agent_policy(agent.acting_by("student", candidates=count))
        for share in PERTURBED:
            runs = from_safe_starts(perturbed(actor, share), exact, seed, starts)
            row |= results(f"action_noise_{share:g}_student_{count}", runs)
            runs = from_safe_starts(actor, exact, seed, starts, current=2.0 * (1.0 + share))
            row |= results(f"current_{share:g}_student_{count}", runs)
    return row


def latency(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Time `predict` for one observation over whole episodes."""
    agent, flow, seconds = trained(seed, steps, folder)
    actors = {
        "student_1": agent.acting_by("student", candidates=1),
        "student_16": agent.acting_by("student", candidates=16),
        "fisor_16": with_candidates(flow, 16),
    }
    env = gym.make(BOAT)
    times: dict[str, list[float]] = {name: [] for name in actors}
    for episode in range(-1, TIMED):
        for name, actor in actors.items():
            seen, _ = env.reset(seed=90_000 + 100 * seed + episode)
            ended = False
            while not ended:
                started = time.process_time()
                action, _ = actor.predict(seen)
                spent = time.process_time() - started
                if episode >= 0:  # the first episode warms up
                    times[name].append(spent)
                seen, _, terminated, truncated, _ = env.step(action)
                ended = terminated or truncated
            if episode < 0 and isinstance(actor, Counting):
                actor.slow = actor.searched = 0
    row: dict[str, Any] = {"seed": seed, **seconds}
    for name, spent in times.items():
        micro = 1e6 * np.array(spent)
        row[f"{name}_median"] = float(np.median(micro))
        row[f"{name}_99"] = float(np.quantile(micro, 0.99))
        row[f"{name}_episode_ms"] = float(micro.sum() / TIMED / 1000)
    counted = actors["student_16"]
    assert isinstance(counted, Counting)
    row["slow"] = counted.slow / len(times["student_16"])
    row["search"] = counted.searched / len(times["student_16"])
    return row


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--starts", type=int, default=STARTS)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    steps, folder = arguments.steps, arguments.folder
    rows = [
        {
            **once(
                f"safefql_latency_{steps}_{seed}",
                lambda s=seed: latency(s, steps, folder),
                folder=folder,
            ),
            **once(
                f"safefql_safety_{steps}_{arguments.starts}_{seed}",
                lambda s=seed: safety(s, steps, arguments.starts, folder),
                folder=folder,
            ),
        }
        for seed in arguments.seeds
    ]
    for name, first in rows[0].items():
        if isinstance(first, int | float) and name != "seconds":
            print(f"{name:40}", *(f"{row[name]:>10.4g}" for row in rows), flush=True)


if __name__ == "__main__":
    main()
