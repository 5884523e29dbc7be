r"""The three updates of SafeFQL, each a pure function of (state, draw)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch
from torch import Tensor

from safeshield.algorithms.safety_updates import SafetyLog, critic_rates, flow_update, stages
from safeshield.algorithms.tensors import LogTensors
from safeshield.algorithms.training import (
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    descend,
    learning_rate,
)
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.nn.optim import adam_init, polyak
from safeshield.scaling import Scaling
from safeshield.values.backup import RewardBackup, reward_backup
from safeshield.values.reward import VALUE as REWARD_VALUE
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics

if TYPE_CHECKING:
    from safeshield.algorithms.safefql import SafeFQLConfig

TEACHER, STUDENT = "teacher", "student"
_VALUES = (*VALUE_NETWORKS, REWARD_VALUE)


@dataclass(frozen=True)
class Architecture:
    """What a log and a configuration fix besides the weights: spaces, widths, units."""

    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box
    scaling: Scaling
    flow_hidden: tuple[int, ...]
    student_hidden: tuple[int, ...]
    safety: SafetyCritics
    reward: RewardCritics

    @property
    def teacher(self) -> EnsembleMLP:
        """Describe the velocity field."""
        return velocity_network(
            self.scaling.observation_features, self.scaling.action_features, self.flow_hidden
        )

    @property
    def student(self) -> EnsembleMLP:
        """Describe the one-step actor: (s, z) to an action."""
        observation, action = self.scaling.observation_features, self.scaling.action_features
        return EnsembleMLP(observation + action, action, self.student_hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        """Describe every network."""
        critics = {**self.safety.parts(), **self.reward.parts()}
        return {**critics, TEACHER: self.teacher, STUDENT: self.student}


@dataclass(frozen=True)
class StudentLoss:
    """The student's loss; the formula stands at the head of `algorithms.safefql`."""

    model: Architecture
    margin: float
    """Of the gate, in units of h."""
    safety_weight: float
    distillation: float
    flow_steps: int

    def __call__(
        self, networks: Networks, critics: Networks, observations: Tensor, noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Return the loss of the student in `networks` and what to log.

        Args:
            networks: holds the student, which gets the gradient, and the teacher.
            critics: safety and reward critics, held fixed.
            observations: (batch, obs) normalised.
            noise: (batch, act) z.
        """
        model = self.model
        with torch.no_grad():
            taught = euler_sample(
                model.teacher, networks[TEACHER], observations, noise, self.flow_steps
            )
        raw = model.student(networks[STUDENT], torch.cat([observations, noise], -1))[0]
        action = raw.clamp(-1.0, 1.0)
        unsafe = model.safety.action_value(critics, observations, action)
        reward = model.reward.advantages(critics, observations, action).amin(0)
        feasible = (unsafe < -self.margin).float()
        excess = (unsafe + self.margin).relu() / model.safety.scale.step
        distance = (raw - taught).square().sum(-1).mean()
        gain = _mean_over(reward, feasible)
        danger = _mean_over(excess, 1.0 - feasible)
        loss = self.distillation * distance - gain + self.safety_weight * danger
        return loss, {
            "student/feasible_share": feasible.mean(),
            "student/reward_advantage": gain.detach(),
            "student/danger_steps": danger.detach(),
            "student/distance_to_teacher": distance.detach(),
        }


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


@dataclass(eq=False)
class SafeFQLRun:
    """One call of fit: the updates of its phases, closed over the log."""

    model: Architecture
    log: LogTensors
    config: SafeFQLConfig
    steps: int

    def __post_init__(self) -> None:
        self._safety = SafetyLog(self.model.safety, self.log)

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""
        critics = {**self.model.safety.init(generator), **self.model.reward.init(generator)}
        teacher = {TEACHER: self.model.teacher.init(generator)}
        student = {STUDENT: self.model.student.init(generator)}
        device = generator.device
        return TrainState(
            networks={**critics, **teacher, **student},
            targets=critics,
            moments={
                "critics": adam_init(critics),
                TEACHER: adam_init(teacher),
                STUDENT: adam_init(student),
            },
            scales={"reward": torch.full((), self.model.reward.spread, device=device)},
            near=torch.zeros(0, dtype=torch.int64, device=device),
        )

    def phases(self) -> list[Phase]:
        """List what to do, in order. The windows of the critics' targets get shorter in stages."""
        size, near = self.config.batch_size, self.config.near_share
        windows = self.config.safety_backup_steps, self.config.reward_backup_steps
        if self.config.phases == "joint":
            return [
                Phase(
                    f"joint {i + 1}",
                    count,
                    self._joint(*lengths),
                    size,
                    near,
                    self._safety.refresh,
                )
                for i, (count, *lengths) in enumerate(stages(self.steps, *windows))
            ]
        critics, teacher, student = self._phase_steps()
        refresh = self._safety.refresh
        return [
            *(
                Phase(f"critics {i + 1}", count, self._critics(*lengths), size, near, refresh)
                for i, (count, *lengths) in enumerate(stages(critics, *windows))
            ),
            Phase(TEACHER, teacher, self._teacher(), size),
            # The critics stand still from here on, so one look at the log is enough.
            Phase(STUDENT, student, self._student, size, near, refresh, student),
        ]

    def _phase_steps(self) -> tuple[int, int, int]:
        if self.config.phases == "joint":
            return self.steps, self.steps, self.steps
        critics = max(1, round(self.config.phase_shares[0] * self.steps))
        teacher = max(1, round(self.config.phase_shares[1] * self.steps))
        critics = min(critics, self.steps - teacher - 1)
        return critics, teacher, self.steps - critics - teacher

    # -- critics ------------------------------------------------------------------------------

    def _critics(self, safety_steps: int, reward_steps: int) -> Update:
        log, config = self.log, self.config
        safety_batches = self._safety.batches(safety_steps)
        reward_window = reward_backup(
            log.rewards, log.terminated, log.episode_last, config.discount, reward_steps
        )
        names = (*self.model.safety.parts(), *self.model.reward.parts())
        total = self._phase_steps()[0]

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            safety_batch = safety_batches(draw.rows)
            reward_batch = _reward_batch(log, reward_window, draw.rows)
            sigma = state.scales["reward"]
            allowed = self._allowed(state.targets, draw.rows) if config.safe_reward_value else None
            seen: list[Tensor] = []

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                safety, safety_metrics = self.model.safety.losses(
                    networks,
                    state.targets,
                    safety_batch,
                    expectile=config.safety_expectile,
                    one_step=safety_steps == 1,
                )
                reward, residual, reward_metrics = self.model.reward.losses(
                    networks,
                    state.targets,
                    reward_batch,
                    sigma,
                    discount=config.discount,
                    expectile=config.reward_expectile,
                    one_step=reward_steps == 1,
                    allowed=allowed,
                )
                seen.append(residual)
                return safety + reward, {**safety_metrics, **reward_metrics}

            count = state.moments["critics"].updates
            rates = critic_rates(config.learning_rate, count, total, names, _VALUES)
            state, metrics = descend(state, "critics", names, loss, rates)
            return (
                state._replace(
                    targets=polyak(state.targets, state.networks, config.polyak),
                    scales={"reward": torch.lerp(sigma, seen[0], config.polyak)},
                ),
                metrics,
            )

        return update

    def _allowed(self, critics: Networks, rows: Tensor) -> Tensor:
        """Mark the logged actions that the student's gate would let pass.

        Where it lets none pass, in a state that is itself too close, all count.
        """
        safety = self.model.safety
        with torch.no_grad():
            observations, actions = self.log.observations[rows], self.log.actions[rows]
            here = safety.value(critics, observations)
            worst = safety.advantages(critics, observations, actions).amax(0)
            passes = here + safety.scale.step * worst < -self._margin
            return (passes | (here >= -self._margin)).float()

    @property
    def _margin(self) -> float:
        return self.config.margin_steps * self.model.safety.scale.step

    def _teacher(self) -> Update:
        return flow_update(
            TEACHER,
            self.model.teacher,
            self.log,
            self.config.learning_rate,
            self._phase_steps()[1],
        )

    # -- student ------------------------------------------------------------------------------

    def _student(self, state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        config = self.config
        student_loss = StudentLoss(
            self.model,
            self._margin,
            config.safety_weight,
            config.distillation,
            config.flow_steps,
        )
        observations = self.log.observations[draw.rows]

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            return student_loss(networks, state.targets, observations, draw.noise)

        count = state.moments[STUDENT].updates
        rate = learning_rate(config.learning_rate, count, self._phase_steps()[2])
        return descend(state, STUDENT, (STUDENT,), loss, {STUDENT: rate})

    # -- all at once --------------------------------------------------------------------------

    def _joint(self, safety_steps: int, reward_steps: int) -> Update:
        critics, teacher = self._critics(safety_steps, reward_steps), self._teacher()

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            metrics: Metrics = {}
            for part in (critics, teacher, self._student):
                state, more = part(state, draw)
                metrics |= more
            return state, metrics

        return update


def _reward_batch(log: LogTensors, window: RewardBackup, rows: Tensor) -> RewardBatch:
    return RewardBatch(
        observations=log.observations[rows],
        actions=log.actions[rows],
        next_observations=log.next_observations[rows],
        rewards=log.rewards[rows],
        terminated=log.terminated[rows],
        window_rewards=window.reward[rows],
        window_slope=window.slope[rows],
        window_observations=log.next_observations[window.last[rows]],
    )
