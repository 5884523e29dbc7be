r"""A search for an agent that breaks a shield's promise from certified starts.

A search is no proof. That it finds nothing does not show that there is nothing; what it finds is a
fact, tested on fresh seeds. It has four stages.

1. **Battery.** Each probe of `probes.starting_probes`, and the two policies that calibration tests
   by default, play the same few episodes.
2. **CMA-ES** (Hansen 2016, arXiv 1604.00772; the library `cma`). From the best probes of different
   families it varies the weights. All agents of a generation play the same seeds, and every
   generation plays fresh ones. Half way, all searches but the best end.
3. **Choice.** The best probes of both stages play more episodes on fresh seeds.
4. **Verification.** The one with the highest rate plays on seeds that no other stage used. Only
   these episodes count for the result, by Clopper and Pearson's interval.

The search maximises the mean over episodes of

    1[violated] + (s(H) + s(V)) / 2,

    s(x) = 1 / (1 + exp(-x / u)),    u = max(4 sigma, delta / 4),

where H is the highest constraint h and V the highest safety value V_h in an episode, and sigma is
the typical change of h in one step. Where the environment reports costs only, s(V) takes the place
of s(H). The graded part tells agents apart none of which violates. V is a part of it because h
shows late how far an agent has come: an agent that is led past the threshold -delta may have the
same h as others. Every episode starts where V_h <= -delta, and is executed through the shield as
deployed.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from tqdm.auto import tqdm

from safeshield.calibration.binomial import check_probability, upper_bound
from safeshield.calibration.proposers import ADVERSARY, RANDOM, ShieldedProposals
from safeshield.calibration.trials import MOST_RESETS_PER_EPISODE, StartValues
from safeshield.evaluation.probes import Probe, ProbingAgent, as_agent, moved, starting_probes
from safeshield.files.schema import json_values, versions, whole
from safeshield.rollouts.copies import (
    Identity,
    check_env,
    copies,
    environment_name,
    runs_natively,
    spaces_of,
)
from safeshield.rollouts.episodes import SEEDS, VectorStep, run_episodes
from safeshield.rollouts.recorded import Episode
from safeshield.shield.nested import refuse_shielded
from safeshield.shield.shield import UncalibratedShieldWarning

if TYPE_CHECKING:
    from safeshield.rollouts.policies import BatchPolicy
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env, VectorEnv

NO_PROOF = (
    "This is a search and no proof: that it found no worse agent does not show that there is none."
)
_AT_ONCE = 256
_FIRST, _EACH = 2, 16
"""Episodes of each agent in the first pass of the battery, and the most in its second pass and in a
generation."""
_CHOICE = 4
"""Episodes of each agent in the choice, as a multiple of those in a generation."""
_GENERATION_SHARE = 0.03
"""Largest share of the budget that a generation should take."""
_BATTERY = 6
_ISLANDS = 3
_POPULATION = 16
_FINALISTS = 8
_SIGMA = 0.4
_NEW = 0.3
"""Weight of a generation in the moving average by which searches are compared."""
_BATTERY_SHARE = 0.2
"""Share of the budget after which the battery gets no second pass, where episodes are slow."""
_PART = 2**22
"""Seeds of a part: the search has the first part after a base, the verification the second."""
_SOFT, _SOFT_DELTA = 4.0, 0.25
"""Unit u of the graded part of the objective, in typical changes of h and in delta."""
_STANDING = 0.75
"""Confidence of the lower bound of the rate by which the worst agent is chosen."""
_SEARCH_SHARE = 0.85
"""Share of the budget after which the choice begins."""


class Played(NamedTuple):
    """What counts of one agent's episodes."""

    episodes: int
    violating: int
    score: float
    """Mean of the objective."""

    @property
    def rate(self) -> float:
        """Share of the episodes that violate."""
        return self.violating / max(self.episodes, 1)

    @property
    def standing(self) -> tuple[float, float]:
        """By what agents with unequal numbers of episodes are compared, the worst the greatest.

        It is the lower bound of the rate, and for equal bounds the score.
        """
        return rate_bounds(self.violating, self.episodes, _STANDING)[0], self.score


@dataclass(frozen=True)
class Family:
    """The best agent of a family during the search."""

    family: str
    agents: int
    """Number of agents of the family that played."""
    episodes: int
    """Number of episodes of the best one, over all stages of the search."""
    violating: int
    """Number of these episodes that violate."""


@dataclass(frozen=True)
class Falsification:
    """The worst agent that a search found, and what it did on fresh seeds."""

    probe: Probe
    """The worst agent."""
    environment: str
    """Id of the environment, or the name of its class."""
    digest: str
    """Digest of the shield (`Shield.digest`)."""
    delta: float
    """Delta of the shield, in units of h."""
    epsilon: float | None
    """The rate that the shield's record promises; None without a record."""
    promised: tuple[str, ...]
    """Names of the policies that the record covers."""
    fits: bool
    """Whether the environment is that of the record, as far as is known."""
    confidence: float
    """Confidence of each of the two bounds."""
    seed: int
    """Seed of all draws."""
    episodes: int
    """N, the number of fresh episodes from certified starts that verify the worst agent."""
    violating: int
    """k, the number of these that violate."""
    lower: float
    """Clopper and Pearson's lower bound of the rate, with `confidence` on this side."""
    upper: float
    """Clopper and Pearson's upper bound of the rate, with `confidence` on this side."""
    start_share: float
    """Share of the drawn starts that were certified."""
    searched: int
    """Number of episodes of the search."""
    generations: int
    """Number of generations of CMA-ES; 0 where the battery searched alone."""
    minutes: float
    """Duration of search and verification, minutes."""
    cpu_minutes: float
    """Processor time of this process, minutes."""
    families: tuple[Family, ...]
    """The best agent of each family in the search, the worst for the shield first. These figures
    are biased: agents were chosen by them."""

    @property
    def rate(self) -> float:
        """Share of the fresh episodes that violate: k / N."""
        return self.violating / self.episodes

    @property
    def breaks(self) -> bool:
        """Whether the rate of the worst agent is above the promised one, at the confidence.

        Without a record it is False.
        """
        return self.epsilon is not None and self.lower > self.epsilon

    @property
    def contradicts(self) -> bool:
        """Whether the promise itself is contradicted: `breaks`, by a policy that it covers."""
        return self.breaks and self.fits and self.probe.family in self.promised

    def statement(self) -> str:
        """Return in words what was found, what it contradicts, and what it does not show."""
        found = (
            f"The worst agent of {self.searched} episodes of search is of the family "
            f"'{self.probe.family}'. On fresh seeds {self.violating} of {self.episodes} episodes "
            f"from certified starts of {self.environment} violate behind the shield at delta "
            f"{self.delta:.4g}: at least {self.lower:.3g} and at most {self.upper:.3g} of all "
            f"(each with confidence {self.confidence:g})."
        )
        return f"{found} {self._meaning()} {NO_PROOF}"

    def _meaning(self) -> str:
        if self.epsilon is None:
            return "The shield has no record of a calibration and promises nothing."
        names = ", ".join(f"'{name}'" for name in self.promised)
        if not self.fits:
            return "The record is of another environment, and promises nothing here."
        if self.contradicts:
            return (
                f"This contradicts the promise of at most {self.epsilon:g} for {names}: the "
                f"calibration is one of those that promise too much, or something has changed."
            )
        if self.breaks:
            return (
                f"This is above the promised {self.epsilon:g}, but the promise covers {names} "
                "alone, so it is not contradicted. An agent that you do not know may do the same: "
                "calibrate with the agent that you deploy (policy=), or for this one, and compare "
                "other replacements (with_replacement)."
            )
        return f"This does not contradict the promise of at most {self.epsilon:g} for {names}."

    def to_json(self) -> dict[str, Any]:
        """Return the fields, the rate and the statement as JSON values."""
        return {**json_values(self), "rate": self.rate, "statement": self.statement()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the worst agent and these figures to a JSON file, which `load_probe` reads."""
        about = self.to_json()
        del about["probe"]
        self.probe.save(path, {"found": about, "versions": versions()})


def load_probe(path: str | os.PathLike[str], shield: Shield) -> BatchPolicy:
    """Return the agent in a file that `falsify` wrote, as a batch policy that asks `shield`.

    Nothing in a file can run. The agent takes the threshold of the file for that of the shield, so
    that it is the same policy at every delta. Its name in records and tables is that of the file
    with the digest of its numbers, such as "worst.json (3f2a91c0)", because the next search may
    write another agent to the same file.

    Raises:
        ValueError: The file holds no such agent, or one for other spaces.
    """
    probe = Probe.load(path)
    agent = as_agent(shield, probe)
    agent.__qualname__ = f"{Path(path).name} ({probe.digest})"  # `default_name` reads it.
    return cast("BatchPolicy", agent)


def falsify(
    shield: Shield,
    env: Env | VectorEnv,
    *,
    minutes: float | None = 10.0,
    rollouts: int | None = None,
    episodes: int = 2_000,
    confidence: float = 0.99,
    cma: bool = True,
    seed: int = 0,
    num_envs: int | None = None,
    progress_bar: bool = False,
) -> Falsification:
    """Search for an agent that violates behind a shield, and test the worst one on fresh seeds.

    Args:
        shield: The shield, at the delta at which it is deployed.
        env: The environment that it protects. It must report ``info["constraint"]`` or
            ``info["cost"]``. Copies of it step side by side (see `copies.vectorise`).
        minutes: Budget of the search, minutes by the clock. The verification is not part of it.
            None for no such budget.
        rollouts: Budget of the search in episodes. A round that has begun is played to its end, so
            that the first round of the battery, two episodes of each agent, is always played. A
            search without `minutes` depends on its seed alone.
        episodes: N, the number of fresh episodes that verify the worst agent.
        confidence: Confidence of the lower and of the upper bound of its rate.
        cma: Whether CMA-ES searches from the best probes of the battery. It needs
            ``pip install "safeshield[falsify]"``. With False the battery is drawn again and again.
        seed: Seed of all draws. Search and verification never reset the environment with the same
            seed.
        num_envs: Number of environments that step together.
        progress_bar: Whether to show a progress bar with the highest rate so far.

    Raises:
        ImportError: `cma` is True, and the package is not installed.
        ValueError: An argument is out of range, both budgets are None, the spaces differ, the
            environment reports neither a constraint nor a cost, or hardly any start is certified.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import ShieldConfig, ShieldTrainer, collect
    >>> from safeshield.evaluation.falsification import falsify
    >>> env = gymnasium.make("safeshield/Boat-v0")
    >>> log = collect(env, "random", episodes=20, seed=0)
    >>> trainer = ShieldTrainer(ShieldConfig(critic_hidden=(16,), behaviour_hidden=(16,)))
    >>> shield = trainer.fit(log, steps=30).shield()
    >>> found = falsify(shield, env, minutes=None, rollouts=40, episodes=4, cma=False)
    >>> found.episodes, found.breaks
    (4, False)
    """
    check_env(env)
    refuse_shielded(env, "pass the plain environment; the search puts the shield around it")
    check_probability("confidence", confidence)
    episodes = whole("episodes", episodes, least=1)
    seed = whole("seed", seed, least=0)
    if minutes is None and rollouts is None:
        raise ValueError("minutes and rollouts must not both be None: give the search a budget")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes must be finite and above 0, got {minutes}")
    if rollouts is not None:
        rollouts = whole("rollouts", rollouts, least=1)
    if cma:
        _library()
    started = time.monotonic(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedShieldWarning)
        fits = shield.check_fits(*spaces_of(env), Identity.of(env))
        player = _Player(shield, env, seed, num_envs)
        try:
            budget = _Budget(minutes, rollouts)
            with tqdm(disable=not progress_bar, unit="episode", desc="search") as bar:
                search = _Search(player, budget, cma, bar)
                worst = search.run()
            fresh = player.verify(worst, episodes)
        finally:
            player.close()
    lower, upper = rate_bounds(fresh.violating, fresh.episodes, confidence)
    record = shield.record
    return Falsification(
        probe=worst,
        environment=environment_name(env),
        digest=shield.digest,
        delta=shield.delta,
        epsilon=None if record is None else record.epsilon,
        promised=() if record is None else tuple(one.policy for one in record.policies),
        fits=fits,
        confidence=confidence,
        seed=seed,
        episodes=fresh.episodes,
        violating=fresh.violating,
        lower=lower,
        upper=upper,
        start_share=player.start_share,
        searched=budget.played,
        generations=search.generations,
        minutes=(time.monotonic() - started[0]) / 60.0,
        cpu_minutes=(time.process_time() - started[1]) / 60.0,
        families=search.families(),
    )


def rate_bounds(violating: int, episodes: int, confidence: float) -> tuple[float, float]:
    """Return Clopper and Pearson's lower and upper bound of a rate, each at the confidence.

    The lower bound of k of N is 1 minus the upper bound of N - k of N.

    Args:
        violating: k.
        episodes: N.
        confidence: Confidence of each bound.

    >>> [round(bound, 4) for bound in rate_bounds(30, 2000, 0.99)]
    [0.0094, 0.0226]
    """
    lower = 1.0 - upper_bound(episodes, episodes - violating, confidence)
    return max(lower, 0.0), upper_bound(episodes, violating, confidence)


def _library() -> Any:  # noqa: ANN401 - a module without types
    try:
        import cma
    except ImportError as error:
        raise ImportError(
            "the search with CMA-ES needs the package cma: run pip install "
            '"safeshield[falsify]", or search with the battery alone by cma=False (--no-cma)'
        ) from error
    return cma


class _OutOfTimeError(Exception):
    """The budget ended during a round, whose episodes are not used."""


@dataclass
class _Budget:
    """The budget of a search."""

    minutes: float | None
    rollouts: int | None
    played: int = 0
    _started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """The share of the budget that is spent."""
        spent = 0.0
        if self.minutes is not None:
            spent = (time.monotonic() - self._started) / (60.0 * self.minutes)
        if self.rollouts is not None:
            spent = max(spent, self.played / self.rollouts)
        return spent


class _Player:
    """Plays episodes of agents behind the shield, from certified starts."""

    def __init__(
        self, shield: Shield, env: Env | VectorEnv, seed: int, num_envs: int | None
    ) -> None:
        self.shield, self.seed, self._env = shield, seed, env
        self._native = num_envs is None and runs_natively(env)
        self._envs: Any = env if self._native else copies(env, num_envs, most=None, freeze=True)
        base = int(np.random.default_rng(np.random.SeedSequence([seed, 1])).integers(SEEDS))
        self._search, self._verify = self._certified(base), self._certified(base + _PART)
        self._values = StartValues(shield, self._envs)
        self._drawn = self._kept = 0
        self._rounds = 0

    def close(self) -> None:
        """Close the copies of the environment that were made."""
        if self._envs is not self._env:
            self._envs.close()

    @property
    def start_share(self) -> float:
        """Share of the drawn starts that were certified."""
        return self._kept / self._drawn

    def _certified(self, first: int) -> Iterator[int]:
        """Yield seeds whose start is certified, from `first` on."""
        for seed in itertools.count(first):
            if seed - first >= _PART:
                raise ValueError(f"a search has at most {_PART} starts; give it a smaller budget")
            self._drawn += 1
            if self._values[seed] <= self.shield.threshold:
                self._kept += 1
                yield seed
            elif self._drawn > MOST_RESETS_PER_EPISODE * max(self._kept, 50):
                raise ValueError(
                    f"only {self._kept} of {self._drawn} starts have V_h <= -delta: the "
                    "environment starts almost everywhere outside the certified set"
                )

    def compare(self, probes: Sequence[Probe], each: int, stop: Callable[[], bool]) -> list[Played]:
        """Return how probes do on the same fresh seeds of the search, `each` episodes each.

        Raises:
            _OutOfTimeError: `stop` returned True during the episodes.
        """
        seeds = list(itertools.islice(self._search, each))
        results: list[Played | None] = [None] * len(probes)
        # Policies of calibration play by themselves, the others in one batch.
        named = [i for i, probe in enumerate(probes) if not probe.weights]
        together = [i for i, probe in enumerate(probes) if probe.weights]
        for i in named:
            agent = as_agent(self.shield, probes[i])
            results[i] = self._summary(self._play(agent, seeds, stop))
        if together:
            whose = np.repeat(np.arange(len(together)), each)
            agent = ProbingAgent(self.shield, [probes[i] for i in together], whose)
            runs = self._play(agent, seeds * len(together), stop)
            for k, i in enumerate(together):
                results[i] = self._summary(runs[k * each : (k + 1) * each])
        return [result for result in results if result is not None]

    def verify(self, probe: Probe, episodes: int) -> Played:
        """Return how a probe does on the seeds of the verification."""
        total = Played(0, 0, 0.0)
        while total.episodes < episodes:
            count = min(episodes - total.episodes, 4 * _AT_ONCE)
            seeds = list(itertools.islice(self._verify, count))
            total = together(
                total, self._summary(self._play(as_agent(self.shield, probe), seeds, None))
            )
        return total

    def _play(
        self, agent: BatchPolicy, seeds: list[int], stop: Callable[[], bool] | None
    ) -> list[Episode]:
        def check(step: VectorStep) -> None:
            if stop is not None and step.index % 8 == 0 and stop():
                raise _OutOfTimeError

        self._rounds += 1
        noise = int(np.random.SeedSequence([self.seed, 2, self._rounds]).generate_state(1)[0])
        waves = math.ceil(len(seeds) / _AT_ONCE)
        return run_episodes(
            self._envs,
            ShieldedProposals(self.shield, agent),
            len(seeds),
            noise,
            on_step=check,
            num_envs=math.ceil(len(seeds) / waves) if self._native else None,
            observation_keys=self.shield.observation_keys,
            seeds=seeds,
        )

    def _summary(self, runs: Sequence[Episode]) -> Played:
        shield = self.shield
        near = shield.threshold + shield.model.scale.rounding
        starts = shield.row_values(np.stack([run.observations[0] for run in runs]))
        # An environment that does not start alike for the same seed may start outside.
        counted = [run for run, start in zip(runs, starts, strict=True) if start <= near]
        if not counted:
            raise ValueError(
                "no episode began in a certified start although its seed had one before: the "
                "environment does not start alike for the same seed; repair its reset(seed=)"
            )
        violated = np.array([run.violated for run in counted])
        unit = max(_SOFT * shield.model.scale.step_rms, _SOFT_DELTA * shield.delta)
        highest = np.array([self._highest(run) for run in counted])
        soft = 0.5 * (1.0 + np.tanh(0.5 * np.clip(highest / unit, -1e3, 1e3)))
        graded = soft.mean(axis=1)
        return Played(len(counted), int(violated.sum()), float((violated + graded).mean()))

    def _highest(self, run: Episode) -> tuple[float, float]:
        """Return the highest h, or V_h in its place, and the highest V_h of an episode."""
        value = float(np.nanmax(self.shield.row_values(run.next_observations)))
        if run.constraints is None or run.next_constraints is None:
            return value, value
        return float(max(run.constraints[0], run.next_constraints.max())), value


def together(one: Played, other: Played) -> Played:
    """Return the figures of the episodes of both."""
    count = one.episodes + other.episodes
    score = (one.score * one.episodes + other.score * other.episodes) / max(count, 1)
    return Played(count, one.violating + other.violating, score)


@dataclass
class _Island:
    """A search by CMA-ES around one probe."""

    start: Probe
    strategy: Any
    score: float | None = None
    """Moving average, over the generations of CMA-ES, of the mean objective of a generation; None
    before the first one."""


@dataclass
class _Search:
    """The stages of a search."""

    player: _Player
    budget: _Budget
    cma: bool
    bar: tqdm[None]
    each: int = _FIRST
    generations: int = 0
    seen: dict[Probe, Played] = field(default_factory=dict)

    def run(self) -> Probe:
        """Return the worst agent that was found."""
        shield, seed = self.player.shield, self.player.seed
        rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
        fixed = [Probe(name, shield.delta) for name in (RANDOM, ADVERSARY)]
        try:
            # With few actions, a battery draws some agents several times.
            battery = [*dict.fromkeys([*fixed, *starting_probes(shield, rng, _BATTERY)])]
            self._compare(battery, _FIRST)
            cost = self.budget.spent / (_FIRST * len(battery))
            most = _GENERATION_SHARE / (_POPULATION * cost)
            self.each = int(np.clip(most, _FIRST, _EACH))
            if self.budget.spent < _BATTERY_SHARE:
                self._compare(battery, self.each)
            islands = self._islands(seed) if self.cma else []
            while self.budget.spent < _SEARCH_SHARE:
                if not self.cma:
                    drawn = dict.fromkeys(starting_probes(shield, rng, _BATTERY))
                    self._compare([*drawn], self.each)
                    continue
                if self.budget.spent > 0.5 * _SEARCH_SHARE and len(islands) > 1:
                    islands = [max(islands, key=lambda one: one.score or 0.0)]
                for island in islands:
                    self._generation(island)
            # The mean of a search is often better than the agents drawn around it.
            means = [moved(one.start, one.strategy.mean) for one in islands]
            final = [*means, *self._best(_FINALISTS - len(means))]
            self._compare(final, _CHOICE * self.each)
        except _OutOfTimeError:
            pass
        if not self.seen:
            # A budget that ends before the battery has played leaves the calibration's adversary.
            return fixed[1]
        return max(self.seen, key=lambda one: self.seen[one].standing)

    def families(self) -> tuple[Family, ...]:
        """Return the best agent of each family, the worst for the shield first."""
        groups: dict[str, list[Played]] = {}
        for probe, played in self.seen.items():
            groups.setdefault(probe.family, []).append(played)
        best = {name: max(some, key=lambda one: one.standing) for name, some in groups.items()}
        order = sorted(best, key=lambda name: best[name].standing, reverse=True)
        return tuple(
            Family(name, len(groups[name]), best[name].episodes, best[name].violating)
            for name in order
        )

    def _compare(self, probes: Sequence[Probe], each: int) -> list[Played]:
        played = self.player.compare(probes, each, lambda: self.budget.spent >= 1.0)
        for probe, one in zip(probes, played, strict=True):
            self.seen[probe] = together(self.seen.get(probe, Played(0, 0, 0.0)), one)
            self.budget.played += one.episodes
            self.bar.update(one.episodes)
        rate = max(one.rate for one in self.seen.values())
        self.bar.set_postfix_str(f"highest rate of an agent so far {rate:.3g}")
        return played

    def _best(self, count: int) -> list[Probe]:
        """Return the best agents so far, the best first."""
        return sorted(self.seen, key=lambda one: -self.seen[one].score)[:count]

    def _islands(self, seed: int) -> list[_Island]:
        """Return searches from the best probes of different families."""
        starts: dict[str, Probe] = {}
        for probe in self._best(len(self.seen)):
            if probe.weights and probe.family not in starts:
                starts[probe.family] = probe
        return [
            _Island(probe, _strategy(probe, seed + k))
            for k, probe in enumerate([*starts.values()][:_ISLANDS])
        ]

    def _generation(self, island: _Island) -> None:
        drawn = island.strategy.ask()
        played = self._compare([moved(island.start, one) for one in drawn], self.each)
        island.strategy.tell(drawn, [-one.score for one in played])
        mean = float(np.mean([one.score for one in played]))
        old = mean if island.score is None else island.score
        island.score = (1.0 - _NEW) * old + _NEW * mean
        self.generations += 1


def _strategy(probe: Probe, seed: int) -> Any:  # noqa: ANN401 - cma has no types
    options = {
        "popsize": _POPULATION, "seed": seed % (2**31) + 1, "verbose": -9,
        "CMA_diagonal": len(probe.weights) > 100,
    }  # fmt: skip
    strategy = _library().CMAEvolutionStrategy(list(probe.weights), _SIGMA, options)
    return strategy
