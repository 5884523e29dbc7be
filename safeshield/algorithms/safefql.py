r"""SafeFQL: Safe Flow Q-Learning (arXiv 2603.15136; RLC 2026).

It trains in three phases on one log, each with its own update. docs/safefql.md compares them with
the paper and its official code.

1. critics: the safety values V_h, Q_h (`values.safety`) and the reward values V_r, Q_r
   (`values.reward`);
2. teacher: a flow that imitates the feasible part of the log's behaviour (`nn.flow`);
3. student: a one-step actor mu(s, z), z ~ N(0, I), that minimises

       distillation * || mu(s, z) - teacher(s, z) ||^2
       + mean over { Q_h(s, mu) < -margin } of  - A_r(s, mu)
       + safety_weight * mean over the others of  max(Q_h(s, mu) + margin, 0) / sigma_h

Both branches are in units of one step's advantage: A_r = min_i (Q_r,i - V_r) / sigma_r for reward,
and sigma_h for safety. Each branch is averaged over its own samples. The same settings therefore
serve tasks whose official configurations needed weights from 0.1 to 100,000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from safeshield.algorithms.gate import GateConfig, GatedAgent
from safeshield.data.dataset import OfflineDataset
from safeshield.files.settings import NonNegative, Positive, Sizes, ThreePhases
from safeshield.nn.actor import BEHAVIOUR, of_noise
from safeshield.nn.arrays import Float
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.graph import CannotExportError
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.replacement import nan_rejected
from safeshield.shield.shield import Shield
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import PAPER_CRITICS, EulerConfig, Margin, check_measurable
from safeshield.training.critics import CriticArchitecture, CriticsRun
from safeshield.training.imitation import flow_update
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import Draw, Loss, Metrics, Phase, TrainState, Update, together
from safeshield.values.expectile import mean_where
from safeshield.values.units import SAFETY_NETWORKS

if TYPE_CHECKING:
    from safeshield.shield.export_policy import GraphConstraint, GraphNoise


@dataclass(frozen=True)
class SafeFQLConfig(EulerConfig, GateConfig):
    """Settings of SafeFQL. The defaults, which are the preset "small", are the same for all tasks.

    The preset "paper" has the settings of the official code, for 100,001 updates on a GPU. With
    `task` it has the safety weight that the code has for this task. docs/safefql.md lists what of
    the code it cannot express, and what is not known: the distillation weight, which the code ships
    as 0 and for which it tries values from 0.01 to 100, is 1.
    """

    only_acting: ClassVar[frozenset[str]] = GateConfig.only_acting | {"extraction"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (256, 256),
            "flow_hidden": (512,) * 4,
            "student_hidden": (512,) * 4,
            "batch_size": 1024,
            "learning_rate": 3e-4,
            "safety_discount": 0.99,
            "teacher": "behaviour",
            "distillation": 1.0,
            "candidates": 1,
            "phases": "joint",
            **PAPER_CRITICS,
        },
    }
    paper_tasks: ClassVar[dict[str, dict[str, Any]]] = {
        "HalfCheetahVelocity": {"safety_weight": 10.0},
        "Walker2dVelocity": {"safety_weight": 1e3},
        "HopperVelocity": {"safety_weight": 2.0},
        "SwimmerVelocity": {"safety_weight": 0.1},
        "AntVelocity": {"safety_weight": 1e4},
        "Boat": {"safety_weight": 1e5, "batch_size": 512},
        "CarCircle": {"safety_weight": 0.1},
        "DroneRun": {"safety_weight": 0.1},
        "DroneCircle": {"safety_weight": 0.1},
        "AntRun": {"safety_weight": 0.5},
        "BallRun": {"safety_weight": 0.5},
        "AntCircle": {"safety_weight": 1.0},
        "BallCircle": {"safety_weight": 1.0},
        "CarRun": {"safety_weight": 100.0},
    }

    margin: Margin = "auto"
    """Distance from the boundary at which an action already counts as unsafe. "auto" measures it on
    the episodes of the log between the critics' and the teacher's phase: it is the level that a new
    episode misses with a probability of at most 10% (`calibration.margin`). A number is in standard
    deviations of h over the log; 0 means no margin. With continuous labels a margin above 0 is at
    least the typical change of h in one step (sigma_h), because a thinner margin has no effect on
    an actor. A measured margin is at least that of the number 0.058, with which the critics are
    trained. It is that of 0.058, with a warning, where the log has fewer than 9 episodes."""
    student_hidden: Sizes = (128, 128, 128)
    """Widths of the student's hidden layers. Wider layers fit more closely and train more slowly
    (official code: four of 512)."""
    teacher: Literal["feasible", "behaviour"] = "feasible"
    """Actions that the teacher imitates. "feasible" means the feasible actions of the log in
    feasible states and its safer actions in the others (`training.imitation` with b_r = 0).
    "behaviour" means all actions of the log, as in the paper."""
    distillation: NonNegative = 3.0
    """Weight of the squared distance between student and teacher, relative to the reward branch. A
    larger weight keeps the student closer to the log; a smaller one lets it follow the critics
    more."""
    safety_weight: Positive = 1.0
    """Weight of the loss of unsafe actions, relative to the reward branch. A larger
    weight puts safety before reward."""
    extraction: Literal["student", "sample"] = "student"
    """How the agent acts. "student" means the samples of the one-step student, as under
    `candidates`. "sample" means that the flow of the teacher draws N = `candidates` actions: of
    those with Q_h < -margin the one of highest A_r is executed, and where there is none, the one of
    lowest Q_h. This is SafeIFQL of the official code. The student is trained either way, because
    the agent's shield uses it; `SafeFQL.acting_by` changes the setting after training."""
    phases: Literal["sequential", "joint"] = "sequential"
    """Order of training. "sequential" trains the critics, then the teacher, then the student;
    "joint" trains all three in every update, as the official code does."""
    phase_shares: ThreePhases = (0.5, 0.15, 0.35)
    """Shares of the updates for critics, teacher and student, which sum to 1. A phase with a larger
    share trains for longer. Not used when `phases` is "joint"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_measurable(self.margin, self.phases)


TEACHER, STUDENT = "teacher", "student"


SAFETY_TEMPERATURE = 5.0
"""Temperature b_h of the teacher's weights, the value of FISOR (`training.imitation`)."""


@dataclass(eq=False)
class SafeFQLRun(Run[CriticArchitecture, SafeFQLConfig]):
    """SafeFQL's training in three phases, one after the other or all in every update."""

    def __post_init__(self) -> None:
        joint = self.config.phases == "joint"
        shared = phase_steps(self.steps, self.config.phase_shares)
        self._phase_steps = (self.steps,) * 3 if joint else shared
        self._critics = CriticsRun(self.model.critics, self.log, self.config, self._phase_steps[0])

    def initial(self, generator: torch.Generator) -> TrainState:
        """Return the state before the first update."""
        return self._critics.prepared(super().initial(generator))

    def phases(self) -> list[Phase]:
        """Return the phases of training in order. The targets' windows get shorter in stages."""
        critics, (_, teacher, student) = self._critics, self._phase_steps
        imitate, improve = self._teacher(), self.falling(STUDENT, self._student, student)
        if self.config.phases == "joint":
            return critics.phases("joint", lambda _: together(imitate, improve))
        return [
            *critics.phases(),
            Phase(
                TEACHER,
                teacher,
                imitate,
                self.config.batch_size,
                refresh=critics.measure,
                refresh_every=teacher,
            ),
            # The critics do not change in this phase, so the boundary rows are found only once.
            critics.safety.phase(STUDENT, student, improve, refresh_every=student),
        ]

    def _teacher(self) -> Update:
        """Return the update of the teacher, and of the flow that a shield's support test uses."""
        networks, rate, total = self.model.networks, self.config.learning_rate, self._phase_steps[1]
        if BEHAVIOUR not in networks:
            return flow_update(TEACHER, networks[TEACHER], self.log, rate, total)
        weigh = self._critics.imitation(
            reward_temperature=0.0, safety_temperature=SAFETY_TEMPERATURE
        )
        return together(
            flow_update(TEACHER, networks[TEACHER], self.log, rate, total, weigh),
            flow_update(BEHAVIOUR, networks[BEHAVIOUR], self.log, rate, total),
        )

    def _student(self, state: TrainState, draw: Draw) -> Loss:
        """Return the student's loss. The module docstring has the formula."""
        config, model = self.config, self.model
        margin, safety = self._critics.gate(state), model.critics.safety
        critics, observations, noise = state.targets, self.log.observations[draw.rows], draw.noise
        with torch.no_grad():
            taught = euler_sample(
                model.networks[TEACHER],
                state.networks[TEACHER],
                observations,
                noise,
                config.flow_steps,
            )

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            raw = of_noise(model.networks[STUDENT], networks[STUDENT], observations, noise)
            action = raw.clamp(-1.0, 1.0)
            unsafe = safety.action_value(critics, observations, action)
            reward = model.critics.reward.advantages(critics, observations, action).amin(0)
            feasible = (unsafe < -margin).float()
            excess = (unsafe + margin).relu() / safety.scale.step_rms
            distance = (raw - taught).square().sum(-1).mean()
            gain = mean_where(reward, feasible)
            danger = mean_where(excess, 1.0 - feasible)
            value = config.distillation * distance - gain + config.safety_weight * danger
            return value, {
                "student/feasible_share": feasible.mean(),
                "student/reward_advantage": gain.detach(),
                "student/danger_steps": danger.detach(),
                "student/distance_to_teacher": distance.detach(),
            }

        return loss


@register("safefql")
class SafeFQL(GatedAgent[SafeFQLConfig, CriticArchitecture]):
    """Learn a safe actor and safety critics offline from one log.

    Args:
        config: Settings; see `SafeFQLConfig`.
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
    run_type = SafeFQLRun
    _before: ClassVar[dict[str, Any]] = {
        **GatedAgent._before,
        "teacher": "behaviour",
        "candidates": 1,
        "extraction": "student",
        "last_resort": "lowest",
    }
    _fewest_steps = 3

    def recalibrated(
        self,
        dataset: OfflineDataset,
        steps: int = 50_000,
        *,
        delta: float | None = None,
        **options: Any,  # noqa: ANN401 - the other arguments of fit
    ) -> Self:
        """Return an agent whose teacher and student are trained anew, with the gate at delta.

        The critics are kept. In the losses of teacher and student, and where the new agent acts,
        delta takes the place of the margin:

            feasible where Q_h(s, mu) < -delta,     imitated where Q_h(s, a) <= -delta

        The second applies to ``teacher="feasible"``; with "behaviour" the teacher imitates all
        logged actions.

        This is "+CP" of the paper: the safety level that a calibration found, in place of 0. By
        default the gate does not get looser: where `record.delta` is below the agent's own margin,
        it stays at the margin, for which the record holds. With continuous labels a delta above 0
        that is smaller than the change of h in one step acts as this change (see the setting
        `margin`). The new agent has no record. Calibrate it on its own.

        Args:
            dataset: The log that this agent learned from, or another one of the same environment.
            steps: Number of updates of teacher and student together, in the ratio of their
                `phase_shares`. They are trained one after the other, whatever `phases` is.
            delta: Distance of the gate from 0, in units of h; by default the larger of
                `record.delta` and the agent's own margin.
            options: The other arguments of `OfflineAgent.fit`, such as `checkpoint`.

        Raises:
            RuntimeError: The agent has not been trained.
            ValueError: There is neither a record nor a delta, delta is below 0 or not finite, or
                the log has other spaces.
            TypeError: As in `OfflineAgent.fit`.

        Source: "+CP" of Safe Flow Q-Learning (arXiv 2603.15136) and its official code, whose
        conformal step moves the threshold of the policy itself.

        >>> import gymnasium, safeshield.envs
        >>> from safeshield.data import collect
        >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
        >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,)))
        >>> agent = agent.fit(log, steps=30)
        >>> stricter = agent.recalibrated(log, steps=15, delta=0.3)
        >>> round(stricter.gate, 6)
        0.3
        """
        safety = self._fitted().critics.safety
        if delta is None:
            if self.record is None:
                raise ValueError(
                    "delta must be given where the agent has no record, got None: call "
                    "calibrate(env) first, or pass delta"
                )
            delta = max(self.record.delta, self.gate)
        if not 0.0 <= delta < math.inf:
            raise ValueError(
                f"delta must be finite and at least 0, got {delta}: pass the distance of the gate "
                "from 0, in units of h"
            )
        other = self._changed(margin=delta / safety.scale.spread, phases="sequential")
        return other._fit_actor(dataset, steps, self, self.config.phase_shares[0], **options)

    def acting_by(
        self, extraction: Literal["student", "sample"], *, candidates: int | None = None
    ) -> Self:
        """Return an agent with the same weights that chooses actions in another way, and no record.

        Args:
            extraction: "student" or "sample" (`SafeFQLConfig.extraction`).
            candidates: Number N of samples (`SafeFQLConfig.candidates`); None leaves it unchanged.

        Raises:
            ValueError: The name is unknown, or the number is below 1.

        >>> SafeFQL().acting_by("sample", candidates=32).config.candidates
        32
        """
        given = {} if candidates is None else {"candidates": candidates}
        return self._changed(extraction=extraction, **given)

    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) whose fallback is this agent's actor."""
        return Shield(
            self._safety(self._fitted()),
            trained_by=f"SafeFQL, seed {self.config.seed}",
            training_episodes=self._episodes,
        )

    def _judge(self, model: CriticArchitecture) -> SafetyModel:
        names = {name: name for name in (*SAFETY_NETWORKS, STUDENT)}
        names[BEHAVIOUR] = BEHAVIOUR if BEHAVIOUR in model.networks else TEACHER
        return SafetyModel.of_networks(
            *model.interface[:3],
            model.critics.safety.scale,
            {name: self._arrays[mine] for name, mine in names.items()},
            flow_steps=self.config.flow_steps,
            constraint=model.constraint,
        )

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        observation, action = scaling.widths
        flow = velocity_network(observation, action, self.config.flow_hidden)
        # Where the teacher imitates the whole log, no second flow is needed for that.
        flows = [TEACHER] if self.config.teacher == "behaviour" else [TEACHER, BEHAVIOUR]
        student = EnsembleMLP(observation + action, action, self.config.student_hidden)
        return {**dict.fromkeys(flows, flow), STUDENT: student}

    def _best_of_teacher(
        self, model: CriticArchitecture, states: StateValue, deterministic: bool
    ) -> Float:
        """Return, of N actions of the teacher, the one of highest A_r with Q_h < -margin.

        Where there is none, return the one of lowest Q_h. A deterministic call uses the same noise
        in every state.
        """
        config, safety = self.config, self._safety(model)
        count, each, width = len(states.inputs), config.candidates, model.scaling.action_features
        noise = self._candidate_noise(count, each, width, deterministic)
        seen = np.repeat(states.inputs, each, axis=0)
        teacher = model.networks[TEACHER], self._arrays[TEACHER]
        actions = euler_sample(*teacher, seen, noise, config.flow_steps)
        gain = model.critics.reward.advantages(self._arrays, seen, actions).min(0)
        drawn = actions.reshape(count, each, width)
        values = nan_rejected(safety.scaled_values(states, drawn))
        below = values < -self.gate
        best = np.where(below, nan_rejected(-gain).reshape(count, each), np.inf).argmin(1)
        chosen: Float = drawn[np.arange(count), np.where(below.any(1), best, values.argmin(1))]
        return chosen

    @property
    def _has_gate(self) -> bool:
        return super()._has_gate or self.config.extraction == "sample"

    def _draw(
        self,
        model: CriticArchitecture,
        networks: Any,  # noqa: ANN401 - arrays or tensors
        observations: Any,  # noqa: ANN401
        noise: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        network = model.networks[STUDENT]
        return of_noise(network, networks[STUDENT], observations, noise).clip(-1.0, 1.0)

    def _gated(self, model: CriticArchitecture, states: StateValue, deterministic: bool) -> Float:
        if self.config.extraction == "sample":
            return self._best_of_teacher(model, states, deterministic)
        return super()._gated(model, states, deterministic)

    def graph_actions(self, rows: Any, h: GraphConstraint | None, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of `predict` as values of an ONNX graph."""
        if self.config.extraction == "sample":
            raise CannotExportError(
                "SafeFQL must have extraction='student' in an ONNX graph, got 'sample': "
                "agent.acting_by('student') acts by the student of the same weights"
            )
        return super().graph_actions(rows, h, noise)
