"""Test whether statements from a log alone hold, by 300 calibrations of each method and the truth.

    python benchmarks/from_log.py              # about 20 minutes; resumes; prints the table
    python benchmarks/from_log.py --spliced    # the spliced episodes alone; about 10 minutes
    python benchmarks/from_log.py field --data FOLDER      # other tasks; see from_log_field.py

A shield for the boat and one for the double integrator are trained briefly. 100,000 fresh episodes
without the shield, and as many with it, give the truth: the share of violating episodes below each
threshold, the share in which the agent violates or the shield would step in, the share that
violates with the shield on, and the share with a larger residual. Then `calibrate_from_log` is
called 300 times for each method, each time on other episodes, at confidence 0.9. It may break its
level at most 47 times (the 99.9% quantile of the binomial distribution). Incorrect calibrators
judge the same episodes, and must break it more often.

Spliced episodes have agents of their own, because an agent that is continued in the middle of an
episode may have no memory of it.
"""

from __future__ import annotations

import argparse
import sys
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
from safeshield.calibration.splicing import Splicer
from safeshield.data.collect import log_of
from safeshield.demo.helmsmen import Helmsmen
from safeshield.envs.boat import GOAL
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import as_batch_policy, batch_policy
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


@batch_policy
def unsteady(observations: Array, rng: np.random.Generator) -> Array:
    """Steer for the goal, with a new error at every step."""
    ahead = GOAL - observations
    angle = np.arctan2(ahead[:, 1], ahead[:, 0]) + rng.normal(0.0, 1.0, len(ahead))
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


@batch_policy
def hasty(observations: Array, rng: np.random.Generator) -> Array:
    """Accelerate in the direction of travel, with noise."""
    return np.clip(
        np.sign(observations[:, 1:]) + rng.normal(0.0, 1.0, (len(observations), 1)), -1, 1
    )


class Task(NamedTuple):
    """One environment, the agent that makes its logs, and the shield's delta."""

    make: Callable[[], Any]
    policy: Callable[[], Any]
    delta: float
    lead: int
    """A lead that some entries come before."""
    counted: int
    """Episodes of a shadow and of a trial, so many that one violation less changes the verdict."""
    memoryless: Any
    """The agent of the spliced episodes."""
    updates: int
    """Few updates for the double integrator, so that it violates behind its shield now and then."""


TASKS = {
    "boat": Task(
        lambda: gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100),
        Helmsmen,
        0.05,
        5,
        100,
        unsteady,
        6000,
    ),
    "double integrator": Task(
        lambda: gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=20),
        lambda: HeldAccelerations(0.05),
        0.0,
        2,
        60,
        hasty,
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


def episodes(name: str, shield: Shield | None, seed: int, policy: object = None) -> OfflineDataset:
    """Return CHUNK fresh episodes of the agent, with the shield on where one is given."""
    task = TASKS[name]
    env = task.make()
    acting = as_batch_policy(policy or task.policy(), env.action_space)
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


def in_chunks(
    what: str,
    measure: Callable[[str, Shield, int], dict[str, Any]],
    name: str,
    shield: Shield,
    keys: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the stored chunks of a measurement, and the rates of `keys` over all of them."""
    tag = name.replace(" ", "_")
    parts = [
        once(f"from_log_{what}_{tag}_{i}", lambda i=i: measure(name, shield, i))
        for i in range(TRUTH_CHUNKS)
    ]
    rates = {
        key: sum(part[key][0] for part in parts) / sum(part[key][1] for part in parts)
        for key in keys
    }
    return parts, rates


def pooled(name: str, shield: Shield) -> dict[str, Any]:
    """Return the truth of all chunks together."""
    parts, rates = in_chunks("truth", truth, name, shield, ("event", "agent", "violating"))
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


def spliced_truth(name: str, shield: Shield, chunk: int) -> dict[str, Any]:
    """Return the violating and the certified of one chunk, without the shield and with it."""
    policy, found = TASKS[name].memoryless, {}
    for what, behind, seed in (("agent", None, 50_000), ("violating", shield, 60_000)):
        scores = Scores.of(shield, episodes(name, behind, seed + chunk, policy), ())
        kept = scores.certified
        found[what] = [int(scores.violating[kept].sum()), int(kept.sum())]
    return found


def spliced_repeats(name: str, shield: Shield, truth: float) -> dict[str, int]:
    """Splice 300 logs, and count the bounds below the truth."""
    task, tally, seed = TASKS[name], Tally(), 0
    left: list[int] = []
    continued = 0
    for number in range(REPEATS):
        if len(left) < task.counted:
            seed += 1
            free = episodes(name, None, 70_000 + seed, task.memoryless)
            left = np.flatnonzero(Scores.of(shield, free, ()).certified).tolist()
        log = free.select([left.pop() for _ in range(task.counted)])
        simulator = task.make()
        options = {"policy": task.memoryless, "simulator": simulator, "seed": number}
        record = ask(shield, log, "spliced", **options)
        continued += record.continued
        tally.count("spliced", record.bound < truth)
        short = upper_bound(task.counted, max(record.events - 1, 0), CONFIDENCE)
        tally.count("- spliced, tail to k - 1", short < truth)
        # What both continuations of an episode do, and what happens before them.
        rejected = ~(shield.row_values(log.observations, log.actions) <= shield.threshold)
        both = before = 0
        again = Splicer(shield, log, task.make(), None, task.memoryless, None, 10**6 + number)
        first_one = Splicer(shield, log, simulator, None, task.memoryless, None, number)
        for episode, (at, length) in enumerate(
            zip(log.episode_starts, log.episode_lengths, strict=True)
        ):
            part = slice(at, at + length)
            bad = log.next_constraints[part] > 0
            step = int(rejected[part].argmax()) if rejected[part].any() else int(length)
            if bad[:step].any():
                before, both = before + 1, both + 1
            elif step < length and first_one.play(episode, step, int(length) - step).violated:
                both += again.play(episode, step, int(length) - step).violated
        tally.count(
            "- spliced, the better of two", upper_bound(task.counted, both, CONFIDENCE) < truth
        )
        tally.count(
            "- spliced, without the continuations",
            upper_bound(task.counted, before, CONFIDENCE) < truth,
        )
    return {**tally.broken, "(episodes continued)": continued}


def spliced(name: str, shield: Shield) -> dict[str, int]:
    """Return the broken levels of spliced episodes, and print the truth."""
    _, rates = in_chunks("spliced", spliced_truth, name, shield, ("agent", "violating"))
    print(
        f"the memoryless agent violates in {rates['agent']:.2%} without the shield, in "
        f"{rates['violating']:.2%} with it"
    )
    return once(
        f"from_log_spliced_repeats_{tag}",
        lambda: spliced_repeats(name, shield, rates["violating"]),
    )


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
    if sys.argv[1:2] == ["field"]:
        from from_log_field import field

        return field(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--spliced", action="store_true", help="the spliced episodes alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    limit = int(binom.ppf(0.999, REPEATS, 1 - CONFIDENCE))
    for name in [arguments.task] if arguments.task else TASKS:
        shield = make_shield(name)
        print(f"\n{name}, delta {shield.delta}")
        broken: dict[str, Any] = {}
        if not arguments.spliced:
            known = pooled(name, shield)
            print(
                f"of certified starts the agent violates in {known['agent']:.2%}, it violates or "
                f"the shield would step in in {known['event']:.2%}, it violates behind the shield "
                f"in {known['violating']:.2%}"
            )
            tag = name.replace(" ", "_")
            broken = once(f"from_log_repeats_{tag}", lambda n=name, s=shield: repeats(n, s))
        broken = {**broken, **spliced(name, shield)}
        print(f"broken in {REPEATS} (at most {limit} for a correct calibrator):")
        for what, times in sorted(broken.items()):
            if isinstance(times, int) and what not in ("cores",):
                print(f"  {what:45} {times:4}")


if __name__ == "__main__":
    main()
