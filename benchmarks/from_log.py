"""Test whether statements from a log alone hold, by 300 calibrations of each method and the truth.

    python benchmarks/from_log.py              # about 20 minutes; resumes; prints the table

A shield for the boat and one for the double integrator are trained briefly. 100,000 fresh episodes
without the shield, and as many with it, give the truth: the share of violating episodes below each
threshold, the share in which the agent violates or the shield would step in, the share that
violates with the shield on, and the share with a larger residual. Then `calibrate_from_log` is
called 300 times for each method, each time on other episodes, at confidence 0.9. It may break its
level at most 47 times (the 99.9% quantile of the binomial distribution). Incorrect calibrators
judge the same episodes, and must break it more often.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from common import RESULTS, machine, once
from double_integrator import HeldAccelerations
from scipy.stats import binom

import safeshield
from safeshield import CalibrationError, OfflineDataset, Shield, ShieldConfig, ShieldTrainer
from safeshield.calibration import upper_bound
from safeshield.calibration.from_log import lowest_allowed, rank_of
from safeshield.calibration.proposers import ShieldedProposals
from safeshield.data.collect import log_of
from safeshield.demo.helmsmen import Helmsmen
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield.log_record import Ledger, LogRecord
from safeshield.support.record import conformal_level

Array = npt.NDArray[Any]
CONFIDENCE = 0.9
REPEATS, CHUNK = 300, 2000
TRUTH_CHUNKS = 50
FEW, ALPHA = 22, 0.1
"""The smallest number of episodes for this share, in which the rank matters most."""
MANY, WIDE = 63, 0.2
"""Episodes and share with which entries before the lead may be forgiven."""


class Task(NamedTuple):
    """One environment, the agent that makes its logs, and the shield's delta."""

    make: Callable[[], Any]
    policy: Callable[[], Any]
    delta: float
    lead: int
    """A lead that some entries come before."""
    counted: int
    """Episodes of a shadow and of a trial, so many that one violation less changes the verdict."""
    updates: int
    """Few updates for the double integrator, so that it violates behind its shield now and then."""


TASKS = {
    "boat": Task(
        lambda: gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100),
        Helmsmen,
        0.05,
        5,
        6000,
    ),
    "double integrator": Task(
        lambda: gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=20),
        lambda: HeldAccelerations(0.05),
        0.0,
        2,
        60,
        1300,
    ),
}


class Scores(NamedTuple):
    """What the theorems speak of, for each of E episodes."""

    alarm: dict[int, Array]
    """S for each lead, minus infinity where the entry comes before the lead."""
    counts: Array
    """Whether it violates after a safe start."""
    certified: Array
    """Whether V_h <= -delta at the start."""
    event: Array
    """Whether the agent violates or the shield would step in."""
    violating: Array
    residual: Array

    @classmethod
    def of(cls, shield: Shield, log: OfflineDataset, leads: tuple[int, ...]) -> Scores:
        """Compute the numbers by their definitions, not by the code that is tested."""
        starts, lengths = log.episode_starts, log.episode_lengths
        q = shield.row_values(log.observations, log.actions).astype(np.float64)
        after = np.maximum(shield.row_values(log.next_observations), log.next_constraints)
        steps = np.arange(len(log)) - np.repeat(starts, lengths)
        first = np.where(log.next_constraints > 0, steps, 10**6)
        entry = np.minimum.reduceat(first, starts) + 1
        left = np.repeat(entry, lengths) - steps
        safe = log.constraints[starts] <= 0
        violating = (entry < 10**6) | ~safe
        rejected = np.logical_or.reduceat(~(q <= shield.threshold), starts)
        return cls(
            {k: np.maximum.reduceat(np.where(left >= k, q, -np.inf), starts) for k in leads},
            violating & safe,
            shield.row_values(log.observations[starts]) <= shield.threshold,
            violating | rejected,
            violating,
            np.maximum(np.maximum.reduceat(after - q, starts), 0.0),
        )


def make_shield(name: str) -> Shield:
    """Train a shield briefly, once."""
    path = RESULTS / f"from_log_{name.replace(' ', '_')}.safetensors"
    if not path.exists():
        task = TASKS[name]
        log = safeshield.collect(task.make(), task.policy(), episodes=400, seed=77)
        config = ShieldConfig(
            seed=7, critic_hidden=(48, 48), behaviour_hidden=(32, 32), fallback_hidden=(32,),
            batch_size=128, learning_rate=1e-3,
        )  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        ShieldTrainer(config, device="cpu").fit(log, steps=task.updates).shield().save(path)
    return Shield.load(path).with_delta(TASKS[name].delta)


def episodes(name: str, shield: Shield | None, seed: int) -> OfflineDataset:
    """Return CHUNK fresh episodes of the agent, with the shield on where one is given."""
    task = TASKS[name]
    env = task.make()
    acting = as_batch_policy(task.policy(), env.action_space)
    if shield is not None:
        acting = ShieldedProposals(shield, acting)
    runs = run_episodes(env, acting, CHUNK, seed, num_envs=CHUNK)
    return log_of(runs, env.observation_space, env.action_space)


def truth(name: str, shield: Shield, chunk: int) -> dict[str, Any]:
    """Return the numbers of one chunk of episodes without the shield and of one with it."""
    leads = (1, TASKS[name].lead)
    free = Scores.of(shield, episodes(name, None, 10_000 + chunk), leads)
    shielded = Scores.of(shield, episodes(name, shield, 20_000 + chunk), leads)
    kept = shielded.certified
    return {
        **{
            f"lead {lead}": np.maximum(scores[free.counts], -1e9).tolist()
            for lead, scores in free.alarm.items()
        },
        "event": [int(free.event[free.certified].sum()), int(free.certified.sum())],
        "agent": [int(free.violating[free.certified].sum()), int(free.certified.sum())],
        "violating": [int(shielded.violating[kept].sum()), int(kept.sum())],
        "residual": free.residual.tolist(),
    }


def pooled(name: str, shield: Shield) -> dict[str, Any]:
    """Return the truth of all chunks together."""
    tag = name.replace(" ", "_")
    parts = [
        once(f"from_log_truth_{tag}_{i}", lambda i=i: truth(name, shield, i))
        for i in range(TRUTH_CHUNKS)
    ]
    rates = {
        key: sum(part[key][0] for part in parts) / sum(part[key][1] for part in parts)
        for key in ("event", "agent", "violating")
    }
    lists = {
        key: np.sort(np.concatenate([part[key] for part in parts]))
        for key in ("lead 1", f"lead {TASKS[name].lead}", "residual")
    }
    return {**rates, **lists}


def below(values: Array, threshold: float) -> float:
    """Return the share of sorted values below a threshold."""
    return float(np.searchsorted(values, threshold) / len(values))


def above(values: Array, threshold: float) -> float:
    """Return the share of sorted values above a threshold."""
    return 1.0 - float(np.searchsorted(values, threshold, side="right") / len(values))


class Tally:
    """How often each calibrator broke its level."""

    def __init__(self) -> None:
        self.broken: dict[str, int] = {}

    def count(self, what: str, wrong: bool) -> None:
        """Add one repeat of `what`."""
        self.broken[what] = self.broken.get(what, 0) + bool(wrong)


def repeats(name: str, shield: Shield) -> dict[str, int]:
    """Calibrate 300 times with each method, and count the broken levels."""
    known, lead, counted = pooled(name, shield), TASKS[name].lead, TASKS[name].counted
    tally, seed = Tally(), 0
    violating: list[int] = []
    certified: list[int] = []
    trials: list[int] = []
    rest: list[int] = []
    for _ in range(REPEATS):
        if len(violating) < FEW + MANY or min(len(certified), len(trials)) < counted:
            seed += 1
            free = episodes(name, None, 30_000 + seed)
            shielded = episodes(name, shield, 40_000 + seed)
            scores = Scores.of(shield, free, (1, lead))
            trial = Scores.of(shield, shielded, ())
            violating = np.flatnonzero(scores.counts).tolist()
            certified = np.flatnonzero(scores.certified).tolist()
            trials = np.flatnonzero(trial.certified).tolist()
            rest = list(range(CHUNK))
        few, many = ([violating.pop() for _ in range(n)] for n in (FEW, MANY))
        detect(shield, free.select(few), scores.alarm[1][few], known["lead 1"], 1, ALPHA, tally)
        late = scores.alarm[lead][many]
        detect(shield, free.select(many), late, known[f"lead {lead}"], lead, WIDE, tally)
        taken = [certified.pop() for _ in range(counted)]
        record = ask(shield, free.select(taken), "shadow")
        tally.count("shadow: bound below P(A or B)", record.bound < known["event"])
        tally.count("shadow: bound below the shielded rate", record.bound < known["violating"])
        alone = upper_bound(counted, int(scores.violating[taken].sum()), CONFIDENCE)
        tally.count("- shadow, without the interventions", alone < known["event"])
        taken = [trials.pop() for _ in range(counted)]
        log = shielded.select(taken)
        record = ask(shield, log, "trial")
        tally.count("trial", record.bound < known["violating"])
        short = upper_bound(counted, max(record.events - 1, 0), CONFIDENCE)
        tally.count("- trial, tail to k - 1", short < known["violating"])
        steps = upper_bound(len(log), int((log.next_constraints > 0).sum()), CONFIDENCE)
        tally.count("- trial, steps counted", steps < known["violating"])
        log = free.select([rest.pop() for _ in range(FEW)])
        quantile = ask(shield, log, "residuals", alpha=ALPHA).threshold or 0.0
        tally.count("residuals", above(known["residual"], quantile + 1e-6) > ALPHA)
        q = shield.row_values(log.observations, log.actions)
        rises = np.maximum(shield.row_values(log.next_observations), log.next_constraints) - q
        of_steps = -lowest_allowed(-np.maximum(rises, 0), ALPHA, CONFIDENCE).threshold
        tally.count("- residuals, pooled steps", above(known["residual"], of_steps) > ALPHA)
    return tally.broken


def ask(shield: Shield, log: OfflineDataset, method: str, **arguments: Any) -> LogRecord:  # noqa: ANN401
    """Return the record of a shield that remembers nothing."""
    fresh = replace(shield, ledger=Ledger())
    found = fresh.calibrate_from_log(log, method, confidence=CONFIDENCE, **arguments)
    return found.log_records[-1]


def detect(
    shield: Shield,
    log: OfflineDataset,
    own: Array,
    truth: Array,
    lead: int,
    alpha: float,
    tally: Tally,
) -> None:
    """Judge one set of violating episodes by `calibrate_from_log` and by incorrect calibrators."""
    what = f"detection, lead {lead}"
    try:
        record = ask(shield, log, "detection", lead=lead, alpha=alpha)
        tally.count(what, below(truth, record.threshold or 0.0) > alpha)
        tally.count(f"{what}, by delta", below(truth, 1e-9 - (record.delta or 0.0)) > alpha)
        tally.count(f"({what}: refused)", False)
    except CalibrationError:
        tally.count(f"({what}: refused)", True)
    rank = rank_of(len(own), alpha, CONFIDENCE)
    ranked = np.sort(own)
    tally.count(f"- {what}, rank j + 1", below(truth, ranked[rank]) > alpha)
    marginal = conformal_level(own, alpha)
    tally.count(f"- {what}, marginal rank", below(truth, marginal) > alpha)
    if lead > 1:
        dropped = lowest_allowed(own[np.isfinite(own)], alpha, CONFIDENCE).threshold
        tally.count(f"- {what}, early entries dropped", below(truth, dropped) > alpha)


def main() -> None:
    """Run the parts without a stored result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    limit = int(binom.ppf(0.999, REPEATS, 1 - CONFIDENCE))
    for name in [arguments.task] if arguments.task else TASKS:
        shield = make_shield(name)
        known = pooled(name, shield)
        print(
            f"\n{name}, delta {shield.delta}: of certified starts the agent violates in "
            f"{known['agent']:.2%}, it violates or the shield would step in in "
            f"{known['event']:.2%}, it violates behind the shield in {known['violating']:.2%}"
        )
        tag = name.replace(" ", "_")
        broken = once(f"from_log_repeats_{tag}", lambda n=name, s=shield: repeats(n, s))
        print(f"broken in {REPEATS} (at most {limit} for a correct calibrator):")
        for what, times in sorted(broken.items()):
            if isinstance(times, int) and what not in ("cores",):
                print(f"  {what:45} {times:4}")


if __name__ == "__main__":
    main()
