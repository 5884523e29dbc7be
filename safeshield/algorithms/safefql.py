r"""SafeFQL: Safe Flow Q-Learning (arXiv 2603.15136; RLC 2026), whole.

Three phases on one log, each its own update (page and official code compared in docs/safefql.md):

1. critics: safety values V_h, Q_h (`values.safety`) and reward values V_r, Q_r (`values.reward`);
2. teacher: flow matching, the feasible part of the log's own behaviour (`nn.flow`);
3. student: a one-step actor mu(s, z), z ~ N(0, I), that minimises

       distillation * || mu(s, z) - teacher(s, z) ||^2
       + mean over { Q_h(s, mu) < -margin } of  - A_r(s, mu)
       + safety_weight * mean over the others of  max(Q_h(s, mu) + margin, 0) / sigma_h

The two branches stand in units of one step's advantage, reward's (A_r = min_i (Q_r,i - V_r) /
sigma_r) and safety's (sigma_h), and each is averaged over its own samples: so one setting serves
tasks whose official configurations needed weights from 0.1 to 100,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.algorithms.checks import (
    check_not_negative,
    check_phase_shares,
    check_positive,
    check_sizes,
)
from safeshield.algorithms.critic_agent import CriticAgent
from safeshield.algorithms.critic_updates import PAPER_CRITICS, Critics, EulerConfig
from safeshield.algorithms.safefql_updates import STUDENT, TEACHER, Architecture, SafeFQLRun
from safeshield.algorithms.tensors import LogTensors
from safeshield.nn.forward import forward
from safeshield.nn.mlp import Networks
from safeshield.scaling import BEHAVIOUR, SAFETY_NETWORKS, Scaling
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.model import SafetyModel, StateValue
from safeshield.shield.replacement import nearest_acceptable
from safeshield.shield.shield import Shield


@dataclass(frozen=True)
class SafeFQLConfig(EulerConfig):
    """Settings of SafeFQL. The defaults, the preset "small", are one setting for all tasks.

    "paper" has those of the official code, for 100,000 updates on a GPU; the student's branches
    stay in units of one step's advantage, and the distillation weight, which the code sweeps from
    0.01 to 100, is 1.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (256, 256),
            "flow_hidden": (512,) * 4,
            "student_hidden": (512,) * 4,
            "batch_size": 1024,
            "learning_rate": 3e-4,
            "teacher": "behaviour",
            "distillation": 1.0,
            "candidates": 1,
            "phases": "joint",
            **PAPER_CRITICS,
        },
    }

    student_hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of the student's hidden layers (official code: four of 512)."""
    teacher: Literal["feasible", "behaviour"] = "feasible"
    """What the teacher imitates: in feasible states the feasible actions of the log, in others its
    safer ones (`algorithms.imitation` with b_r = 0); or the log as it is, the paper's."""
    distillation: float = 3.0
    """Weight of the student's distance to the teacher."""
    safety_weight: float = 1.0
    """Weight of the student's unsafe branch."""
    candidates: int = 16
    """N: where the first draw does not pass the gate, the safest of it and N more acts; where that
    does not pass either, the acceptable action nearest to it that a shield finds. 1: the first
    draw acts whatever it is, the paper's."""
    phases: Literal["sequential", "joint"] = "sequential"
    """Critics, then teacher, then student; or all three in every step, as the official code."""
    phase_shares: tuple[float, float, float] = (0.5, 0.15, 0.35)
    """Shares of the steps for the three phases; ignored by "joint"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "safety_weight")
        check_not_negative(self, "distillation")
        check_positive(self, "candidates")
        check_phase_shares(self.phase_shares, 3)
        check_sizes(self, "student_hidden")


class SafeFQL(CriticAgent[SafeFQLConfig, Architecture]):
    """Offline safe actor and safety critics from one log.

    Args:
        config: settings; see `SafeFQLConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,), seed=1))
    >>> agent = agent.fit(log, steps=30)
    >>> action, _ = agent.predict(np.zeros(2, np.float32), deterministic=True)
    >>> action.shape, agent.shield().delta
    ((2,), 0.0)
    """

    config_type = SafeFQLConfig
    file_format = "safeshield-safefql"
    _before: ClassVar[dict[str, Any]] = {"teacher": "behaviour", "candidates": 1}
    _fewest_steps = 3
    _safety_model: SafetyModel | None = None
    """The critics as NumPy runs them, made when first needed."""

    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) of this agent's critics, fallback its actor."""
        return Shield(self._safety(self._fitted()), trained_by=f"SafeFQL, seed {self.config.seed}")

    def _safety(self, model: Architecture) -> SafetyModel:
        if self._safety_model is None:
            names = {name: name for name in (*SAFETY_NETWORKS, STUDENT)}
            names[BEHAVIOUR] = model.behaviour
            self._safety_model = SafetyModel(
                observation_space=model.observation_space,
                action_space=model.action_space,
                scaling=model.scaling,
                scale=model.critics.safety.scale,
                networks={name: self._arrays[mine] for name, mine in names.items()},
                flow_steps=self.config.flow_steps,
            )
        return self._safety_model

    def _adopt(self, model: Architecture, networks: Networks) -> None:
        super()._adopt(model, networks)
        self._safety_model = None

    def _architecture(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        scaling: Scaling,
        critics: Critics,
    ) -> Architecture:
        config = self.config
        return Architecture(
            observation_space,
            action_space,
            scaling,
            config.flow_hidden,
            config.student_hidden,
            critics,
            TEACHER if config.teacher == "behaviour" else BEHAVIOUR,
        )

    def _run(self, model: Architecture, log: LogTensors, steps: int) -> SafeFQLRun:
        return SafeFQLRun(model, log, self.config, steps)

    def _act(
        self, model: Architecture, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        """Take one draw of z, or z = 0; where the gate rejects it, the safest of N more and it.

        Where it rejects that too, what a shield with the gate's margin would do: see
        `_beyond_the_student`. Deterministic: of the same N in every state.
        """
        count, width = len(observations), model.scaling.action_features
        shape = (count, width)
        first = np.zeros(shape) if deterministic else self._noise.standard_normal(shape)
        actions = self._student(observations, first)
        each = self.config.candidates
        if each == 1:
            return actions
        safety = self._safety(model)
        states = safety.states_of(observations)
        limit = -self._margin(model)
        passes = safety.scaled_values(states, actions[:, None])[:, 0] < limit
        at = np.flatnonzero(~passes)
        if len(at):
            noise = self._candidate_noise(len(at), each, width, deterministic)
            drawn = self._student(np.repeat(observations[at], each, axis=0), noise)
            drawn = np.concatenate([drawn.reshape(len(at), each, width), actions[at, None]], 1)
            judged = states.take(at)
            values = safety.scaled_values(judged, drawn)
            safest = values.argmin(1)
            actions[at] = drawn[np.arange(len(at)), safest]
            lost = values.min(1) >= limit
            at = at[lost]
        if len(at):
            judged = states.take(at)
            actions[at] = self._beyond_the_student(safety, judged, actions[at], limit)
        return actions

    def _beyond_the_student(
        self,
        safety: SafetyModel,
        states: StateValue,
        actions: npt.NDArray[np.float32],
        limit: float,
    ) -> npt.NDArray[np.float32]:
        """Return the acceptable action nearest to each, of those that a shield looks at."""
        scaling = safety.scaling
        found = CandidateSet().actions(safety, states, scaling.to_box(actions))
        rows = scaling.actions(found.reshape(-1, found.shape[-1])).reshape(*found.shape[:2], -1)
        drawn = np.concatenate([actions[:, None], rows], 1)
        values = safety.scaled_values(states, drawn)
        best = nearest_acceptable(drawn, values, np.full(len(actions), limit))
        return np.asarray(drawn[np.arange(len(actions)), best])

    def _student(
        self, observations: npt.NDArray[np.float32], noise: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float32]:
        inputs = np.concatenate([observations, noise.astype(np.float32)], -1)
        return np.asarray(np.clip(forward(self._arrays[STUDENT], inputs)[0], -1.0, 1.0))

    def _margin(self, model: Architecture) -> float:
        return self.config.margin_of(model.critics.safety)
