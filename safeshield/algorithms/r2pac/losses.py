r"""Losses and training of R2PAC: critics and an actor of chunks of h actions, and its student.

The critics are fitted to chunks (s_t, a_{t:t+h}, s_{t+h}) of the log (eq. 10, 11, 14 to 16), with
c_k = 1 where the state after step k violates or lies within the margin:

    Q_c <- sum_k g^k c_{t+k} + g^h V_c(s_{t+h}),          V_c approaches the LOWER values
    Q_r <- sum_k g^k r_{t+k} + g^h V_r(s_{t+h}),          V_r approaches the HIGHER values
           -penalty     where a state of the chunk (or only its last) is in the unsafe region

V_c and V_r are fitted to their Q where `reward_backup_steps` is h or less (the papers' form). Where
it is more, they are fitted to the same sums over windows of the log. The reason is that a value
moves back by h steps per backup, behind two slow copies, so that a value a hundred steps ahead
would need more updates to arrive than a small run has. A window that enters the unsafe region ends
there with -penalty. With region_test="end" it is tested at the ends of the chunks of which it
consists.

V_r is fitted in safe states only. Its values in other states are not used: a chunk that enters the
region is worth -penalty, and inside the region the costs decide. A network that does not have to
represent the drop at the edge of the region can distinguish the states inside the safe set better.
The advantage of a chunk is learned in units of the advantages of chunks that stay safe, with
targets of at least -`_LEAST`, because differences between worse chunks decide nothing. With
`fit_unsafe` none of this applies, as in the paper.

V_h and Q_h of single actions are the same as in all algorithms (`values.safety`). For plans,

    Q_h(s_t, a_{t:t+h}) = V_h(s_t) + sigma max_i A_i

covers the states from s_{t+1} on, with V_h(s_{t+h}) at the end.

The value of the next state is left out where the episode terminated inside the chunk, but not where
it was truncated. With `ends` it is left out in V_c and V_r at truncations, too. All Q are learned
as a state value plus an advantage, with the minimum over two critics for rewards and the maximum
for costs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safeshield.algorithms.r2pac.chunks import Chunk, Chunks, log_window
from safeshield.algorithms.r2pac.config import R2PACConfig
from safeshield.algorithms.r2pac.regions import (
    LEVEL,
    UNSAFE,
    CostRegion,
    Region,
    RegionReport,
    SafetyRegion,
    horizon_level,
    plan_advantages,
    proposition_1,
    reached_unsafe,
    report_region,
)
from safeshield.nn.actor import BEHAVIOUR, FALLBACK, of_noise
from safeshield.nn.chunk_actors import LARGEST_WEIGHT, ChunkActor, Lesson, normal_below
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.nn.plan_actor import PLAN
from safeshield.training.architecture import CRITICS
from safeshield.training.critics import CriticArchitecture, reward_loss
from safeshield.training.imitation import flow_update
from safeshield.training.run import Run
from safeshield.training.safety import SafetyLog
from safeshield.training.schedule import phase_steps
from safeshield.training.state import (
    CriticLoss,
    Draw,
    Loss,
    Metrics,
    Phase,
    TrainState,
    Update,
    critic_update,
    summed,
    together,
)
from safeshield.values.backup import SafetyBackup, window_ends
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS

ACTOR = "actor"
_LOOK_EVERY = 500
"""Number of the critics' updates between two evaluations of the whole log."""
_LEAST = 4.0
"""Bound on the targets of a chunk's advantage, in units of the advantages of safe chunks. Worse
chunks are not distinguished."""


@dataclass(frozen=True)
class ChunkArchitecture(CriticArchitecture):
    """Critics and actors of chunks, with statistics of the log.

    `critics.reward` is for chunks. `networks` holds the actor, its student, and a flow that
    imitates single actions of the log, which the support test of a shield uses.
    """

    chunk: int
    """Number h of actions in a chunk."""
    actor: ChunkActor
    costs: RewardCritics | None = None
    """Critics of the return of the negative cost over chunks; None where V_h gives the region."""
    penalty: float = 0.0
    """Penalty of a chunk that leads into the unsafe region, in discounted reward."""
    longest: int = 0
    """Number of steps of the log's longest episode."""
    region: RegionReport | None = None
    """Level and size of the unsafe region over the log; None before training."""

    @property
    def plan(self) -> EnsembleMLP:
        """Network of A_h of chunks."""
        safety = self.critics.safety
        inputs = safety.observation + self.actor.width
        return EnsembleMLP(inputs, 1, safety.hidden, safety.members)

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """Return all critics by name, those of chunks and costs included (see `Architecture`)."""
        costs = {} if self.costs is None else self.costs.parts()
        return {**super().critic_parts(), PLAN: self.plan, **costs}

    def scales(self) -> dict[str, float]:
        """Return the initial values of the running statistics by name (see `Architecture`)."""
        costs = {} if self.costs is None else {"cost": self.costs.spread}
        return {**super().scales(), **costs}

    def header(self) -> dict[str, Any]:
        """Return what a file stores about critics, costs and the region, as JSON.

        See `Architecture`.
        """
        costs, region = self.costs, self.region
        return {
            **super().header(),
            "cost_scale": None if costs is None else costs.spread,
            "penalty": self.penalty,
            "longest": self.longest,
            "region": None if region is None else region._asdict(),
        }


def region_of(model: ChunkArchitecture, config: R2PACConfig) -> Region:
    """Return the test for unsafe states that the settings ask for.

    `config` are the settings, and `model` describes the critics that the test uses.
    """
    margin, known = config.margin_of(model.critics.safety), config.trust_labels
    if model.costs is None:
        return SafetyRegion(margin, known, model.critics.safety, model.plan)
    most = math.inf
    if config.cost_limit is not None:
        most = horizon_level(config.cost_limit, model.longest, config.discount)
    quantile = config.quantile if config.region == "quantile" else None
    return CostRegion(margin, known, model.costs, quantile, most)


@dataclass(eq=False)
class R2PACRun(Run[ChunkArchitecture, R2PACConfig]):
    """R2PAC's training in three phases: the critics, the actor, then its student."""

    def __post_init__(self) -> None:
        config, model = self.config, self.model
        # The log of rewards and costs. The safety values always continue after a truncation.
        self._paid = self.log
        if config.ends == "terminals+timeouts":
            last = self.log.episode_last
            ended = last == torch.arange(len(last), device=last.device)
            self._paid = replace(self.log, terminated=self.log.terminated | ended)
        self.chunks = Chunks(self._paid, model.chunk)
        self._rewards = float(self.log.rewards.min()), float(self.log.rewards.max())
        self.margin = config.margin_of(model.critics.safety)
        self.region = region_of(model, config)
        self._safety = SafetyLog(model.critics.safety, self.log, config)
        self._shares = phase_steps(self.steps, config.phase_shares)
        self._label_below = normal_below(config.label_dropout)

    def initial(self, generator: torch.Generator) -> TrainState:
        """Return the state before the first update, in which only violations are marked unsafe.

        `generator` draws the weights.
        """
        state = super().initial(generator)
        scales = {**state.scales, UNSAFE: self._violates.to(torch.uint8)}
        if self.model.costs is not None:
            level = self.region.most if isinstance(self.region, CostRegion) else 0.0
            scales[LEVEL] = torch.full((), level, device=generator.device)
        return state._replace(scales=scales)

    def phases(self) -> list[Phase]:
        """Return the phases of training in order: those of the critics, the actor, the student."""
        config, size = self.config, self.config.batch_size
        critics, actor, student = self._shares
        values = self._safety.phases(
            CRITICS, critics, self.critic_update, config.reward_backup_steps
        )
        distil = self.falling(FALLBACK, self._student, student)
        return [
            *(replace(phase, refresh=self._look, refresh_every=_LOOK_EVERY) for phase in values),
            # The critics do not change from here on, so the log is evaluated only once.
            Phase(ACTOR, actor, self._actor(), size, refresh=self._settle, refresh_every=actor),
            Phase("student", student, distil, size),
        ]

    @property
    def _violates(self) -> Tensor:
        """(N,) whether a transition leads to a violation, or within the margin of one."""
        return self.log.next_constraints > -self.margin

    # -- critics ------------------------------------------------------------------------------

    def _look(self, state: TrainState, generator: torch.Generator) -> TrainState:
        """Find the states near V_h = 0, and compute the level of the region again."""
        state = self._safety.refresh(state, generator)
        return self._mark(self.region.read_level(state, self.log, generator))

    def _mark(self, state: TrainState) -> TrainState:
        reaches = reached_unsafe(self.region, state, self.log)
        return state._replace(scales={**state.scales, UNSAFE: reaches})

    def _settle(self, state: TrainState, generator: torch.Generator) -> TrainState:
        state = self._mark(self.region.read_level(state, self.log, generator))
        self.check_region(report_region(self.region, state, self.log, self.margin))
        level = state.scales.get(LEVEL)
        checked = self.config.penalise and self.config.penalty == "prop1"
        if checked and level is not None and level <= 0:
            raise ValueError(
                "penalty='prop1' needs a level l of the region above 0, by which proposition 1 "
                f"divides, got l = {float(level):g}, the {self.config.quantile:g}-quantile of V_c: "
                "raise quantile, take region='horizon', or give penalty as a number"
            )
        return state

    def check_region(self, report: RegionReport) -> None:
        """Check that the unsafe region holds some states of the log, but not all of them.

        `report` has the shares of the log's states that lie in it.

        Warns:
            UserWarning: It holds only states that violate by themselves, or lie within the margin
                of a violation.

        Raises:
            ValueError: It holds all states of the log, or none.
        """
        told, setting = f"V_h > {report.level:g}", "margin"
        if isinstance(self.region, CostRegion):
            told, setting = f"V_c > {report.level:g}, from cost_limit", "cost_limit"
            # The level is a float32, in which the upper bound may be rounded down.
            if self.region.quantile is not None and report.level < self.region.most * (1 - 1e-6):
                told = f"V_c > {report.level:g}, its {self.config.quantile:g}-quantile"
                setting = "quantile"
        way = "raise" if report.unsafe_share == 1.0 else "lower"
        repair = f"train longer, or {'change' if setting == 'margin' else way} {setting}"
        if not 0.0 < report.unsafe_share < 1.0:
            how = "all" if report.unsafe_share else "none"
            raise ValueError(
                f"the unsafe region ({told}) holds {how} of the log's states, of which "
                f"{report.violating_share:.1%} violate by themselves: {repair}"
            )
        if report.unsafe_share == report.violating_share:
            warnings.warn(
                f"the unsafe region ({told}) holds nothing but the {report.violating_share:.1%} of "
                f"the log's states that violate by themselves, so that it foresees no violation: "
                f"{repair}",
                stacklevel=2,
            )

    def critic_update(self, window: int, reward_steps: int) -> Update:
        """Return one update of all critics, for given lengths of the windows of the targets.

        Args:
            window: Number of steps of a safety window.
            reward_steps: Number of steps of a reward window.
        """
        config, model = self.config, self.model
        costs = () if model.costs is None else model.costs.names[:1]

        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            chunk = self._chunk(draw)
            rewards = self.reward_batch(state, chunk, reward_steps)
            parts = [
                self._safety.loss(state, draw.rows, window),
                self._plan_loss(state, self._safety_chunk(draw, chunk)),
                fit("reward", model.critics.reward, config.reward_expectile, state, rewards),
            ]
            if model.costs is not None:
                paid = self._cost_batch(chunk, reward_steps)
                parts.append(fit("cost", model.costs, config.cost_expectile, state, paid))
            return summed(*parts)

        def fit(
            unit: str,
            critics: RewardCritics,
            expectile: float,
            state: TrainState,
            batch: RewardBatch,
        ) -> CriticLoss:
            return reward_loss(
                critics,
                unit,
                state,
                batch,
                discount=config.discount**model.chunk,
                expectile=expectile,
                one_step=reward_steps <= model.chunk,
            )

        values = (*VALUE_NETWORKS, model.critics.reward.names[0], *costs)
        return critic_update(CRITICS, losses, model.slow(), values, config, self._shares[0])

    def _chunk(self, draw: Draw) -> Chunk:
        """Return the chunks of the batch, padded with random actions that differ in each update."""
        return self.chunks.batch(draw.rows, draw.noise[:, :-1].clamp(-1.0, 1.0))

    def _safety_chunk(self, draw: Draw, chunk: Chunk) -> Chunk:
        """Return the chunks of this draw for the safety values, which no truncation ends.

        `chunk` are its chunks for rewards and costs.
        """
        if self._paid is self.log:
            return chunk
        own = Chunks(self.log, self.model.chunk)
        return own.batch(draw.rows, draw.noise[:, :-1].clamp(-1.0, 1.0))

    def penalty(self, state: TrainState) -> Tensor | float:
        """Return the penalty of a chunk that enters the region; see `R2PACConfig.penalty`.

        `state` is the training state, on whose level l the bound of proposition 1 depends. Until
        V_c gives a level above 0, the bound is that of l = 1, a single violating step.
        """
        if self.config.penalty != "prop1":
            return self.model.penalty
        level = state.scales[LEVEL]
        level = torch.where(level > 0, level, 1.0)
        return proposition_1(*self._rewards, self.model.longest, self.config.discount, level)

    def reward_batch(self, state: TrainState, chunk: Chunk, steps: int) -> RewardBatch:
        """Return the batch for Q_r and V_r, with the penalty of the region (eq. 14 to 16).

        Args:
            state: Training state, which marks the transitions that lead to the unsafe region.
            chunk: Chunks of the batch.
            steps: Length of the windows along the log to which V is fitted, in steps.
        """
        config, log = self.config, self.log
        if not config.penalise:
            return self._batch(chunk, steps, log.rewards)
        unsafe, worth = state.scales[UNSAFE].bool(), -self.penalty(state)
        batch = self._batch(chunk, steps, log.rewards, unsafe, worth)
        fails = chunk.any(unsafe[chunk.rows])
        if config.region_test == "end":
            fails = unsafe[chunk.end]
        with torch.no_grad():
            h = log.constraints[chunk.rows[:, 0]]
            inside = self.region.unsafe(state, chunk.observations, h)
        safe = (~inside).to(batch.rewards.dtype)
        batch = replace(
            batch,
            rewards=torch.where(fails, worth, batch.rewards),
            terminated=chunk.terminated | fails,
        )
        if config.fit_unsafe:
            return batch
        return replace(
            batch,
            allowed=safe if config.recover else None,
            typical=safe * ~fails,
            least=-_LEAST,
        )

    def _cost_batch(self, chunk: Chunk, steps: int) -> RewardBatch:
        """Return the batch for the negative number of violating steps (eq. 10, 11)."""
        return self._batch(chunk, steps, -self._violates.to(self.log.rewards.dtype))

    def _batch(
        self,
        chunk: Chunk,
        steps: int,
        values: Tensor,
        fails: Tensor | None = None,
        worth: Tensor | float = 0.0,
    ) -> RewardBatch:
        """Return chunks with the sums of `values` (N,); see `log_window` for the last two."""
        log, start, discount = self._paid, chunk.rows[:, 0], self.config.discount
        steps = min(steps, self.model.longest)  # A longer window is the whole episode, too.
        every = self.model.chunk if self.config.region_test == "end" else 1
        end = window_ends(log.episode_last, start, steps)
        return RewardBatch(
            observations=chunk.observations,
            actions=chunk.actions,
            next_observations=log.next_observations[chunk.end],
            rewards=chunk.discounted(values[chunk.rows], discount),
            terminated=chunk.terminated,
            window=log_window(log, start, steps, values, discount, fails, worth, every),
            window_observations=log.next_observations[end],
        )

    def _plan_loss(self, state: TrainState, chunk: Chunk) -> CriticLoss:
        """Return the loss of A_h of chunks, whose targets are the safety values they lead to."""
        log, safety, targets = self.log, self.model.critics.safety, state.targets
        with torch.no_grad():
            start, end = chunk.rows[:, 0], chunk.end
            here = safety.log_value(targets, chunk.observations, log.constraints[start])
            after = safety.log_value(targets, log.next_observations[end], log.next_constraints[end])
            # As in Q_h, the state in which the chunk begins is left out.
            backup = SafetyBackup(
                log.next_constraints[chunk.rows], chunk.inside, chunk.terminated, safety.discount
            )
            residual = (backup.target(after) - here) / safety.scale.step_rms

        def loss(networks: Networks) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
            seen, plan = chunk.observations, self.model.plan
            advantage = plan_advantages(plan, networks, seen, chunk.actions)
            value = (advantage - residual).square().mean(1).sum()
            return value, {"safety/plan_loss": value.detach()}, {}

        return loss

    # -- actors -------------------------------------------------------------------------------

    def lesson(self, state: TrainState, draw: Draw) -> tuple[Lesson, Metrics]:
        """Return the batch of chunks with labels and weights (eq. 18, 40), and metrics.

        `state` is the training state, whose critics label the chunks, and `draw` selects them.
        """
        config, log, model = self.config, self.log, self.model
        chunk = self._chunk(draw)
        with torch.no_grad():
            seen, targets = chunk.observations, state.targets
            gain = model.critics.reward.advantages(targets, seen, chunk.actions).amin(0)
            worse = self.region.worse(targets, seen, chunk.actions)
            unsafe = self.region.unsafe(state, seen, log.constraints[chunk.rows[:, 0]])
            unsafe = unsafe & config.recover
            good = torch.where(unsafe, worse <= 0, gain >= 0)
            urge = torch.where(
                unsafe, -config.safety_temperature * worse, config.reward_temperature * gain
            )
            counts = chunk.inside[..., None].expand(-1, -1, log.actions.shape[1]).flatten(1)
        lesson = Lesson(
            observations=seen,
            chunks=chunk.actions,
            counts=counts.to(draw.noise.dtype),
            good=good,
            weights=urge.exp().clamp(max=LARGEST_WEIGHT),
            noise=draw.noise[:, :-1],
            time=draw.time,
            dropped=draw.noise[:, -1] < self._label_below,
        )
        return lesson, {
            "actor/unsafe_share": unsafe.float().mean(),
            "actor/good_share": good.float().mean(),
        }

    def _actor(self) -> Update:
        model, total, rate = self.model, self._shares[1], self.config.learning_rate
        flow = flow_update(BEHAVIOUR, model.networks[BEHAVIOUR], self.log, rate, total)
        width = model.scaling.action_features

        def imitate(state: TrainState, draw: Draw) -> Loss:
            lesson, told = self.lesson(state, draw)

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                value, metrics = model.actor.loss(networks[ACTOR], lesson)
                return value, {**metrics, **told}

            return loss

        def behaviour(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            return flow(state, draw._replace(noise=draw.noise[..., :width]))

        return together(self.falling(ACTOR, imitate, total), behaviour)

    def _student(self, state: TrainState, draw: Draw) -> Loss:
        """Return the loss of the student, which learns the actor's chunk for the same noise."""
        model, noise = self.model, draw.noise[:, :-1]
        observations = self.log.observations[draw.rows]
        with torch.no_grad():
            taught = model.actor.sample(state.networks[ACTOR], observations, noise)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            drawn = of_noise(model.networks[FALLBACK], networks[FALLBACK], observations, noise)
            value = (drawn - taught).square().sum(-1).mean()
            return value, {"student/distance_to_actor": value.detach()}

        return loss
