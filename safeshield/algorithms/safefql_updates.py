r"""What SafeFQL learns besides its critics: teacher and student, and the order of its phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch
from torch import Tensor

from safeshield.algorithms.critic_updates import Critics, CriticsRun, phase_steps, with_networks
from safeshield.algorithms.safety_updates import flow_update
from safeshield.algorithms.tensors import LogTensors
from safeshield.algorithms.training import (
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    descend,
    learning_rate,
    together,
)
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.scaling import Scaling

if TYPE_CHECKING:
    from safeshield.algorithms.safefql import SafeFQLConfig

TEACHER, STUDENT = "teacher", "student"
SAFETY_TEMPERATURE = 5.0
"""b_h of the teacher's weights, FISOR's (`algorithms.imitation`)."""


@dataclass(frozen=True)
class Architecture:
    """What a log and a configuration fix besides the weights: spaces, widths, units."""

    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box
    scaling: Scaling
    flow_hidden: tuple[int, ...]
    student_hidden: tuple[int, ...]
    critics: Critics
    behaviour: str
    """Name of the network that imitates the whole log: a second flow, or the teacher itself."""

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
        flows = dict.fromkeys((TEACHER, self.behaviour), self.teacher)
        return {**self.critics.parts(), **flows, STUDENT: self.student}

    def units(self) -> dict[str, Any]:
        """Return the critics' units as JSON."""
        return self.critics.units()


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
        safety = model.critics.safety
        unsafe = safety.action_value(critics, observations, action)
        reward = model.critics.reward.advantages(critics, observations, action).amin(0)
        feasible = (unsafe < -self.margin).float()
        excess = (unsafe + self.margin).relu() / safety.scale.step
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
        self._critics = CriticsRun(
            self.model.critics, self.log, self.config, self._phase_steps()[0]
        )
        self._known = set(self.model.critics.parts())

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""
        parts = self.model.parts()
        actors = {name: part for name, part in parts.items() if name not in self._known}
        return with_networks(self._critics.initial(generator), actors, generator)

    def phases(self) -> list[Phase]:
        """List what to do, in order. The windows of the critics' targets get shorter in stages."""
        if self.config.phases == "joint":
            return [
                self._critics.phase(f"joint {i + 1}", count, self._joint(*lengths))
                for i, (count, *lengths) in enumerate(self._critics.stages())
            ]
        _, teacher, student = self._phase_steps()
        return [
            *self._critics.phases(),
            Phase(TEACHER, teacher, self._teacher(), self.config.batch_size),
            # The critics stand still from here on, so one look at the log is enough.
            self._critics.phase(STUDENT, student, self._student, refresh_every=student),
        ]

    def _phase_steps(self) -> tuple[int, ...]:
        if self.config.phases == "joint":
            return self.steps, self.steps, self.steps
        return phase_steps(self.steps, self.config.phase_shares)

    def _teacher(self) -> Update:
        """Imitate the feasible part of the log, and beside it the whole, for the shield's test."""
        model, rate, total = self.model, self.config.learning_rate, self._phase_steps()[1]
        whole = flow_update(model.behaviour, model.teacher, self.log, rate, total)
        if model.behaviour == TEACHER:
            return whole
        weigh = self._critics.imitation(
            reward_temperature=0.0, safety_temperature=SAFETY_TEMPERATURE
        )
        return together(flow_update(TEACHER, model.teacher, self.log, rate, total, weigh), whole)

    def _student(self, state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
        config = self.config
        student_loss = StudentLoss(
            self.model,
            self._critics.margin,
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

    def _joint(self, safety_steps: int, reward_steps: int) -> Update:
        return together(
            self._critics.update(safety_steps, reward_steps), self._teacher(), self._student
        )
