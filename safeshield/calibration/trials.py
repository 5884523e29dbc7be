"""Episodes of a calibration: drawn in the order of their seeds, from certified starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from safeshield.calibration.binomial import upper_bound
from safeshield.calibration.promises import Promise, SequentialTest
from safeshield.calibration.proposers import ShieldedProposals, battery, policy_names
from safeshield.calibration.walk import CalibrationError
from safeshield.rollouts.copies import (
    copies,
    difference,
    is_vector_env,
    refuse_vector_env,
    runs_natively,
    sensor_fault,
    spec_to_copy,
    vectorise,
)
from safeshield.rollouts.episodes import VectorStep, run_episodes
from safeshield.rollouts.infos import CONSTRAINT, COST, FINAL_INFO
from safeshield.rollouts.policies import torch_seeded
from safeshield.rollouts.recorded import Episode
from safeshield.shield.record import VIOLATION, PilotPoint, Rung
from safeshield.shield.reported import Reports, listed
from safeshield.spaces.generic import Env, VectorEnv

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

MOST_RESETS_PER_EPISODE = 20
_AT_ONCE = 1024
_NATIVE_WIDTH = 256
_WAVES = 4
_LOOK = 64


def start_rows(
    shield: Shield, env: Env | VectorEnv, count: int, first_seed: int
) -> npt.NDArray[np.float32]:
    """Return the first observations after resets with `count` consecutive seeds, (count, obs).

    Args:
        shield: Shield whose observation space determines the rows.
        env: Environment to reset.
        count: Number of observations.
        first_seed: Seed of the first reset.
    """
    envs = vectorise(env)
    rows: list[npt.NDArray[np.float32]] = []
    try:
        while sum(map(len, rows)) < count:
            observations, _ = envs.reset(seed=first_seed + sum(map(len, rows)))
            rows.append(shield.observation_rows(observations)[0].astype(np.float32))
    finally:
        if envs is not env:
            envs.close()
    return np.concatenate(rows)[:count]


class StartValues:
    """V_h of the starts that the seeds of an environment draw, without playing their episodes.

    V_h is computed once for each seed, for many consecutive seeds at a time.

    Args:
        shield: Shield whose V_h is computed.
        env: Environment to reset. Copies of one without a vectorised form are slow to make, so pass
            a VectorEnv for it.
    """

    def __init__(self, shield: Shield, env: Env | VectorEnv) -> None:
        self._shield, self._env = shield, env
        self._count = max(_LOOK, cast("VectorEnv", env).num_envs if is_vector_env(env) else 0)
        self._values: dict[int, float] = {}

    def __getitem__(self, seed: int) -> float:
        """Return V_h of the start that a seed draws."""
        if seed not in self._values:
            rows = start_rows(self._shield, self._env, self._count, seed)
            self._values.update(enumerate(self._shield.row_values(rows).tolist(), start=seed))
        return self._values[seed]


class Outcome(NamedTuple):
    """What counts of the episode of one seed, whatever was drawn before it."""

    start: np.float32
    """V_h of its start."""
    score: float
    """Score by the promise, in [0, 1]."""
    steps: int
    replaced: int
    """Number of steps in which the shield replaced the action."""


class Score(NamedTuple):
    """What counts of one episode."""

    score: float
    """Score by the promise, in [0, 1]."""
    steps: int
    replaced: int
    """Number of steps in which the shield replaced the action."""
    drawn: int
    """Number of starts drawn up to this episode, since the episode counted before it."""


@dataclass
class Trials:
    """Plays fresh shielded episodes from certified starts, and scores them by a promise.

    An episode is identified by its environment's seed. Episodes are played in groups and counted in
    the order of their seeds, never in that of their ends. Only seeds whose start is certified are
    played.
    """

    shield: Shield
    env: Env | VectorEnv
    promise: Promise
    policy: object
    policy_name: str | None
    confidence: float
    """Confidence of the bound that the progress bar shows."""
    values: npt.NDArray[np.float64]
    """V_h of some starts (n,), from which the share of certified starts is first estimated."""
    seed: int
    """Seed of the policies' noise, with the seed of the first episode of a group."""
    deterministic: bool = False
    num_envs: int | None = None
    workers: int = 0
    ray: str | None = None
    progress_bar: bool = False
    alone: bool = False
    """Whether the policy acts without the shield, which then certifies the starts alone."""
    names: list[str] = field(init=False)
    """Names of the policies that propose actions."""
    points: list[PilotPoint] = field(default_factory=list, init=False)
    """What was played: the pilot's thresholds with each policy, and the tests."""
    tests: list[PilotPoint] = field(default_factory=list, init=False)
    """Those of `points` that are tests, in their order."""

    _outcomes: dict[int, Outcome] = field(default_factory=dict, init=False)
    """Seed -> outcome, where the policy acts alone: no threshold then changes an episode."""
    _pooled: dict[tuple[float, str], tuple[int, list[Score]]] = field(
        default_factory=dict, init=False
    )
    """(threshold, policy) of the pilot -> index of its point in `points`, and its episodes."""

    def __post_init__(self) -> None:
        self.names = policy_names(self.policy, self.policy_name)
        self._native = (
            self.workers == 0
            and self.ray is None
            and self.num_envs is None
            and runs_natively(self.env)
        )
        # Copies of an environment without a vectorised form are made once: that may be slow.
        self._envs: Env | VectorEnv = self.env if self._native else self._copies()
        self._starts = StartValues(self.shield, self._envs)
        width = _NATIVE_WIDTH if self._native else int(cast("VectorEnv", self._envs).num_envs)
        self._at_once = min(_WAVES * width, _AT_ONCE)
        self._bar: tqdm[None] = tqdm(disable=not self.progress_bar, unit="episode")

    def _copies(self) -> VectorEnv:
        if self.workers == 0 and self.ray is None:
            return copies(self.env, self.num_envs, most=None, freeze=True)
        from safeshield.rollouts.workers import WorkerVectorEnv

        refuse_vector_env(self.env, self.workers, self.ray)
        env = cast("Env", self.env)
        # The spec is None where a process can hold only one environment: nothing to compare with.
        spec = spec_to_copy(env)
        if spec is not None and (differs := difference(env, spec)):
            raise ValueError(
                f"workers={self.workers} cannot copy {env}, {differs}; leave workers (and ray) out"
            )
        # The number of copies does not depend on the number of processes, so results do not either.
        return WorkerVectorEnv(env, self.num_envs, self.workers, self.ray)

    def close(self) -> None:
        """Close the progress bar, and the copies of the environment that were made."""
        self._bar.close()
        if self._envs is not self.env:
            self._envs.close()

    def test(self, delta: float, name: str, test: SequentialTest, first_seed: int) -> Rung:
        """Return the result of a test of one threshold with one policy.

        Args:
            delta: Distance of the threshold from 0.
            name: Name of the policy.
            test: The test.
            first_seed: Seed of the environment in the first episode.
        """

        def missing(scores: npt.NDArray[np.float64]) -> int:
            return 0 if test.decide(scores) else test.missing(len(scores))

        played = self.play(delta, name, missing, first_seed, "test")
        scores = np.array([one.score for one in played])
        decision = test.decide(scores)
        if decision is None:
            raise RuntimeError("a test ended without a decision")
        counted = played[: decision.episodes]
        point = self._point(delta, name, counted)
        self.points.append(point)
        self.tests.append(point)
        bound = test.bound(scores[: decision.episodes]) * (self.promise.bound or 1.0)
        return Rung(delta, name, point.episodes, point.violations, bound, decision.passed)

    @property
    def piloted(self) -> tuple[PilotPoint, ...]:
        """Those of `points` that are the pilot's, in their order."""
        return tuple(self.points[at] for at, _ in self._pooled.values())

    def pilot(
        self, delta: float, name: str, episodes: int, most: float, seed: int
    ) -> tuple[float, int]:
        """Return the sum of the scores of some episodes and their number.

        No more episodes are played once the sum exceeds `most`.

        Args:
            delta: Distance of the threshold from 0.
            name: Name of the policy.
            episodes: Number of episodes.
            most: Greatest sum of scores of interest.
            seed: Seed of the environment in the first episode.
        """
        played = self.play(
            delta,
            name,
            lambda scores: 0 if scores.sum() > most else episodes - len(scores),
            seed,
            "pilot",
        )
        self._pool(delta, name, played)
        return sum(one.score for one in played), len(played)

    def play(
        self,
        delta: float,
        name: str,
        missing: Callable[[npt.NDArray[np.float64]], int],
        first_seed: int,
        stage: str,
    ) -> list[Score]:
        """Return the scores of episodes from certified starts, in the order of their seeds.

        Args:
            delta: Distance of the threshold from 0.
            name: Name of the policy.
            missing: Function of the scores so far (n,) that returns how many more episodes are
                wanted; 0 ends.
            first_seed: Seed of the environment in the first episode.
            stage: Name of the stage, for the progress bar.

        Raises:
            CalibrationError: Hardly any start is certified, or a cost exceeds its declared bound.
            ValueError: The environment does not report what the promise is about.
        """
        with warnings.catch_warnings():
            # The warning that the shield is not calibrated does not apply during calibration.
            warnings.simplefilter("ignore")
            shield = self.shield.with_delta(delta)
            proposing = battery(
                shield, self.policy, self.policy_name, deterministic=self.deterministic
            )[name]
            acting = ShieldedProposals(None if self.alone else shield, proposing)
            self._bar.set_description(f"{stage}: delta {delta:.4g}, {name}")
            counted: list[Score] = []
            seed = last = first_seed
            while (wanted := missing(np.array([one.score for one in counted]))) > 0:
                seeds: list[int] = []
                while len(seeds) < min(wanted, self._at_once):
                    if self._starts[seed] <= shield.threshold:
                        seeds.append(seed)
                    seed += 1
                    drawn = seed - first_seed
                    if drawn > MOST_RESETS_PER_EPISODE * max(len(counted) + len(seeds), 50):
                        raise CalibrationError(
                            f"only {len(counted) + len(seeds)} of {drawn} starts have V_h <= "
                            f"-{delta:.4g}: the environment starts almost everywhere outside the "
                            "certified set",
                            self.points,
                        )
                for own, one in zip(seeds, self._played(acting, seeds), strict=True):
                    # An environment that does not start alike for the same seed may start outside.
                    if one.start <= self._near(shield.threshold):
                        counted.append(Score(one.score, one.steps, one.replaced, own + 1 - last))
                        last = own + 1
                        self._bar.update()
                self._show(counted)
        return counted

    def _played(self, acting: ShieldedProposals, seeds: list[int]) -> list[Outcome]:
        """Return the outcomes of some seeds.

        Where the policy acts alone, a seed that was played at another threshold is not played
        again.
        """
        outcomes = self._outcomes if self.alone else {}
        fresh = [seed for seed in seeds if seed not in outcomes]
        for seed, run in zip(fresh, self._group(acting, fresh) if fresh else [], strict=True):
            replaced = 0 if run.intervened is None else int(run.intervened.sum())
            start = self.shield.row_values(run.observations[:1])[0]
            outcomes[seed] = Outcome(start, self._score(run), len(run), replaced)
        return [outcomes[seed] for seed in seeds]

    def _near(self, threshold: float) -> float:
        """Return a threshold that allows for the rounding of V_h in batches of another size."""
        return threshold + self.shield.model.scale.rounding

    def _group(self, acting: ShieldedProposals, seeds: list[int]) -> list[Episode]:
        """Return the episodes of some seeds, with the interventions in their infos."""
        noise = int(np.random.SeedSequence([self.seed, seeds[0]]).generate_state(1)[0])
        # Waves of equal width leave no environment without an episode.
        waves = math.ceil(len(seeds) / _NATIVE_WIDTH)
        with torch_seeded(noise):
            runs = run_episodes(
                self._envs,
                acting,
                len(seeds),
                noise,
                on_step=self._check_reports,
                num_envs=math.ceil(len(seeds) / waves) if self._native else None,
                observation_keys=self.shield.observation_keys,
                seeds=seeds,
            )
        return acting.with_interventions(runs)

    def _score(self, run: Episode) -> float:
        score = self.promise.score(run)
        if not score <= 1.0:
            raise CalibrationError(
                f"an episode has cost {run.total_cost:g}, above the declared bound "
                f"{self.promise.bound:g}: the calibration is void. Declare as bound the largest "
                "cost that an episode can have, such as the horizon times the largest cost of a "
                "step",
                self.points,
            )
        return score

    def _check_reports(self, step: VectorStep) -> None:
        if step.index > 0:
            return
        needed = (CONSTRAINT, COST) if self.promise.kind == VIOLATION else (COST,)
        told = {**step.infos, **dict(step.infos.get(FINAL_INFO) or {})}
        if not any(key in told for key in needed):
            raise ValueError(
                f"the environment's first step reports no {_infos(needed)}, so no episode can be "
                f"judged: its infos are {sorted(k for k in told if not k.startswith('_'))}. Add "
                "it to the info of reset and of every step, for example in a wrapper"
            )
        self._compare(step)

    def _compare(self, step: VectorStep) -> None:
        """Refuse an environment whose first states contradict the shield's source of h.

        Observations that a sensor's fault has changed are not compared.
        """
        source, model = self.shield.model.constraint, self.shield.model
        if source is None or sensor_fault(self.env) is not None:
            return
        reports = Reports.of(step.infos, len(step.active), source.names)
        each = source.each(model.observation_codec.batch(step.next_observations))
        known = each if len(source.names) > 1 else each[:, 0]
        near = model.scale.agreement
        differs = source.contradicts(known, reports.named, reports.constraint, near)
        # Where an episode has ended, the report may be that of the next one's start.
        differs &= step.active & ~(step.terminated | step.truncated)
        if differs.any():
            at = int(differs.argmax())
            raise ValueError(
                f"the environment reports info['constraint'] = {reports.text(at, source.names)} "
                f"of a state where the shield's source '{source.name}' gives "
                f"{listed(source.largest(each)[at], each[at], source.names)}: calibrate where both "
                "are the same quantity, or train again on a log that this environment has labelled"
            )

    def _pool(self, delta: float, name: str, played: list[Score]) -> None:
        """Add episodes of the pilot to the point of this threshold and policy."""
        at, earlier = self._pooled.setdefault((delta, name), (len(self.points), []))
        earlier += played
        self.points[at : at + 1] = [self._point(delta, name, earlier)]

    @staticmethod
    def _point(delta: float, name: str, counted: list[Score]) -> PilotPoint:
        return PilotPoint(
            delta,
            name,
            len(counted),
            sum(one.score > 0 for one in counted),
            len(counted) / max(sum(one.drawn for one in counted), 1),
            sum(one.replaced for one in counted) / max(sum(one.steps for one in counted), 1),
        )

    def _show(self, counted: list[Score]) -> None:
        count, bad = len(counted), sum(one.score > 0 for one in counted)
        if self.progress_bar and count:
            bound = upper_bound(count, bad, self.confidence)
            self._bar.set_postfix_str(f"{bad} of {count} violate, bound so far {bound:.3g}")


def _infos(keys: tuple[str, ...]) -> str:
    return " or ".join(f"info[{key!r}]" for key in keys)
