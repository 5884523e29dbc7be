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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from safeshield.calibration.calibrate import calibrate, remembering
from safeshield.calibration.consistency import check_calibrations
from safeshield.data.dataset import OfflineDataset
from safeshield.evaluation.episodes import Evaluation, evaluate
from safeshield.files.schema import json_values, record_from_json
from safeshield.files.settings import NonNegative, Positive, PositiveInt, Sizes, ThreePhases
from safeshield.nn.actor import BEHAVIOUR, of_noise
from safeshield.nn.arrays import Float
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.graph import CannotExportError
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.record import ActorRecord, Attempt
from safeshield.shield.replacement import nearest_acceptable
from safeshield.shield.shield import Shield
from safeshield.shield.tensors import picked
from safeshield.spaces.scaling import Scaling
from safeshield.training.agent import AgentFile, describing
from safeshield.training.config import PAPER_CRITICS, EulerConfig, Margin, check_measurable
from safeshield.training.critics import CriticAgent, CriticArchitecture, CriticsRun
from safeshield.training.imitation import flow_update
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import Draw, Loss, Metrics, Phase, TrainState, Update, together
from safeshield.values.expectile import mean_where
from safeshield.values.units import SAFETY_NETWORKS

if TYPE_CHECKING:
    from safeshield.calibration.promises import Promise
    from safeshield.shield.export_policy import GraphConstraint, GraphNoise
    from safeshield.spaces.generic import Env, VectorEnv


@dataclass(frozen=True)
class SafeFQLConfig(EulerConfig):
    """Settings of SafeFQL. The defaults, which are the preset "small", are the same for all tasks.

    The preset "paper" has the settings of the official code, for 100,001 updates on a GPU. With
    `task` it has the safety weight that the code has for this task. docs/safefql.md lists what of
    the code it cannot express, and what is not known: the distillation weight, which the code ships
    as 0 and for which it tries values from 0.01 to 100, is 1.
    """

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
    candidates: PositiveInt = 16
    """Number N of further samples where the first sample is not safe by the margin. The safest of
    all these samples is then executed. If it is not safe by the margin either, the agent executes
    the nearest acceptable action that the search of a shield finds. A larger N is safer and slower.
    With 1 the first sample is always executed, as in the paper."""
    extraction: Literal["student", "sample"] = "student"
    """How the agent acts. "student" means the samples of the one-step student, as under
    `candidates`. "sample" means that the flow of the teacher draws N = `candidates` actions: of
    those with Q_h < -margin the one of highest A_r is executed, and where there is none, the one of
    lowest Q_h. This is SafeIFQL of the official code. The student is trained either way, because
    the agent's shield uses it; `SafeFQL.acting_by` changes the setting after training."""
    last_resort: Literal["nearest", "lowest"] = "nearest"
    """Action where neither a sample nor the search is acceptable. "lowest" means the action of
    lowest Q_h that the search finds. "nearest" means the action with Q_h <= V_h that is nearest to
    the safest sample, and the lowest where no action has such a Q_h; in a state that violates
    already it means the safest sample itself. Where Q_h hardly depends on the action, the errors of
    the critics determine which action has the lowest Q_h. That action then changes from step to
    step, and the agent does not move away. A sample resembles the log's actions, which return to
    safe states. Not used with one candidate or with ``extraction="sample"``."""
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
class SafeFQL(CriticAgent[SafeFQLConfig, CriticArchitecture]):
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
        **CriticAgent._before,
        "teacher": "behaviour",
        "candidates": 1,
        "extraction": "student",
        "last_resort": "lowest",
    }
    _fewest_steps = 3
    _safety_model: SafetyModel | None = None
    """The critics as a shield's safety model on NumPy arrays, created at first use."""
    _certified: tuple[SafeFQLConfig, ActorRecord] | None = None
    """The record of the latest calibration, with the settings for which it holds."""
    attempts: tuple[Attempt, ...] = ()
    """Calibrations of these weights, also those that failed."""

    @property
    def record(self) -> ActorRecord | None:
        """The record of the calibration of this actor alone; None where there is none.

        An agent with other weights or other settings than the calibrated one has no record.
        """
        if self._certified is None or self._certified[0] != self.config:
            return None
        return self._certified[1]

    @property
    def gate(self) -> float:
        """Margin m of the gate Q_h(s, a) < -m, in units of h; with margin="auto" the measured one.

        Raises:
            RuntimeError: The agent has not been trained.
        """
        return self.config.margin_of(self._fitted().critics.safety)

    def diagnostics(self) -> dict[str, Any]:
        """Return the gate, the measured margin, and the promise of the record where there is one.

        Both margins are in units of h.
        """
        found = {"gate": self.gate, "measured_margin": self.measured_margin}
        return found if self.record is None else {**found, "promise": self.record.promise}

    def calibrate(
        self,
        env: Env | VectorEnv,
        *,
        epsilon: float | None = None,
        confidence: float = 0.99,
        promise: Promise | None = None,
        deterministic: bool = False,
        deltas: Sequence[float] | None = None,
        episodes: int | None = None,
        seed: int = 0,
        num_envs: int | None = None,
        workers: int = 0,
        ray: str | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """Return a copy with the record of a calibration of this actor ALONE, with no filter.

        The record says from which starts the deployed actor may be started: with the confidence,
        over the draw of the tested episodes,

            P(an episode with V_h(s_0) <= -delta violates) <= epsilon,

        where s_0 comes from the resets of `env`, the actor acts as tested, and the episode has at
        most the horizon of `env`. `record.delta` is the smallest delta that passed its test, and
        `record.promise` has the words. Delta selects starts and does not change the actions;
        `recalibrated` trains a student whose gate is at that delta. With the setting
        ``candidates=1`` the actor is the paper's, one sample per step.

        The procedure is that of a shield (`calibration.calibrate.calibrate`), which describes the
        arguments: `promise` in place of `epsilon`, the `deltas` and `episodes` of the tests,
        `num_envs`, `workers`, `ray` and `progress_bar`. Both this agent and the copy remember the
        attempt, in `attempts`.

        Args:
            env: The environment of the deployment. It must report ``info["constraint"]`` or
                ``info["cost"]``.
            epsilon: Rate of violating episodes to promise, by default 0.01.
            confidence: Confidence of the promise.
            promise: What to promise, where it is not a rate of violations.
            deterministic: The `deterministic` of `predict` in the tests. Choose what is deployed.
            deltas: Strictly decreasing thresholds to test, without a pilot.
            episodes: A fixed number of episodes for each test.
            seed: Seed of all draws. The actor's own noise starts from the seed of its settings.
            num_envs: Number of environments that run side by side.
            workers: Number of processes that step the environments.
            ray: Address of a Ray cluster that steps them.
            progress_bar: Whether to show a progress bar.

        Raises:
            RuntimeError: The agent has not been trained.
            CalibrationError: No threshold meets the request.
            ValueError: As in `calibration.calibrate.calibrate`.

        Source: Safe Flow Q-Learning (arXiv 2603.15136), calibration of the safety threshold. The
        paper uses conformal prediction; the tests here are exact binomial ones (`sequential`).

        >>> import gymnasium, safeshield.envs
        >>> from safeshield.data import collect
        >>> env = gymnasium.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
        >>> log = collect(env, "random", episodes=20, seed=0)
        >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,)))
        >>> agent = agent.fit(log, steps=30)
        >>> agent.record is None
        True
        >>> agent = agent.calibrate(env, epsilon=0.9, confidence=0.8, deltas=[0.0])
        >>> agent.record.delta, agent.record.policies[0].policy
        (0.0, 'SafeFQL')
        """
        shield = replace(self.shield(), attempts=self.attempts)
        with remembering(self):
            record = calibrate(
                shield,
                env,
                epsilon=epsilon,
                confidence=confidence,
                promise=promise,
                policy=self._changed(),
                deterministic=deterministic,
                deltas=deltas,
                episodes=episodes,
                seed=seed,
                num_envs=num_envs,
                workers=workers,
                ray=ray,
                progress_bar=progress_bar,
                alone=True,
            )
        assert isinstance(record, ActorRecord)
        self.attempts = record.attempts
        other = self._changed()
        other._certified = other.config, record
        return other

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

    def with_margin(self, margin: float) -> Self:
        """Return an agent with the same weights that acts with another margin.

        A sample passes the gate where Q_h < -margin (`SafeFQLConfig.candidates`). With a larger
        margin fewer first samples pass, and the agent is more cautious. The student was trained
        for the margin of training; `recalibrated` trains it for another one. The new agent has no
        record.

        Args:
            margin: The margin, in standard deviations of h over the log (`SafeFQLConfig.margin`).

        Raises:
            ValueError: The margin is below 0 or not finite, or the agent executes its first sample
                whatever the margin is (``candidates=1``).

        >>> SafeFQL().with_margin(0.2).config.margin
        0.2
        """
        if self.config.candidates == 1 and self.config.extraction == "student":
            raise ValueError(
                f"margin={margin} has no effect with candidates=1, which executes the first "
                "sample: use acting_by('student', candidates=16) first, or train with "
                "recalibrated(log, delta=...)"
            )
        return self._changed(margin=margin)

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

    def tradeoff(
        self,
        env: Env | VectorEnv,
        margins: Sequence[float] | None = None,
        *,
        episodes: int = 20,
        seed: int = 0,
        deterministic: bool = True,
        num_envs: int | None = None,
    ) -> dict[float, Evaluation]:
        """Return return and cost of this agent for several margins, without training it again.

        All margins play the same starts. `evaluation.tables.format_table` makes a table of the
        values. The figures are measurements and promise nothing. A margin that was chosen by them
        was chosen with a simulator; `calibrate` tests it on fresh episodes.

        Args:
            env: The environment, which reports ``info["constraint"]`` or ``info["cost"]``.
            margins: Margins to play (see `with_margin`); by default 1, 2, 4 and 8 times the agent's
                own.
            episodes: Number of episodes for each margin.
            seed: Seed of the starts.
            deterministic: The `deterministic` of `predict`; see `evaluation.episodes.evaluate`.
            num_envs: Number of environments that step together.

        Returns:
            The evaluation of each margin, in the order of `margins`.

        Raises:
            RuntimeError: The agent has not been trained.
            ValueError: As in `with_margin` and `evaluate`; `margins` is empty; or the agent's own
                margin is 0, and `margins` is None.

        >>> import gymnasium, safeshield.envs
        >>> from safeshield.data import collect
        >>> env = gymnasium.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
        >>> log = collect(env, "random", episodes=20, seed=0)
        >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,)))
        >>> agent = agent.fit(log, steps=30)
        >>> table = agent.tradeoff(env, [0.1, 0.3], episodes=2)
        >>> [one.policy for one in table.values()]
        ['margin 0.1', 'margin 0.3']
        """
        if margins is None:
            own = self.gate / self._fitted().critics.safety.scale.spread
            margins = [own * times for times in (1, 2, 4, 8)] if own > 0 else []
        if not isinstance(margins, Sequence | np.ndarray) or not len(margins):
            raise ValueError(
                f"margins must hold at least one number, got {margins} (the agent's own margin is "
                f"{self.config.margin}): pass numbers in standard deviations of h, as [0.05, 0.1]"
            )
        self._fitted()
        return {
            margin: evaluate(
                env,
                self.with_margin(margin),
                episodes,
                seed,
                num_envs=num_envs,
                name=f"margin {margin:.4g}",
                deterministic=deterministic,
            )
            for margin in margins
        }

    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) whose fallback is this agent's actor."""
        return Shield(
            self._safety(self._fitted()),
            trained_by=f"SafeFQL, seed {self.config.seed}",
            training_episodes=self._episodes,
        )

    def _safety(self, model: CriticArchitecture) -> SafetyModel:
        if self._safety_model is None:
            names = {name: name for name in (*SAFETY_NETWORKS, STUDENT)}
            names[BEHAVIOUR] = BEHAVIOUR if BEHAVIOUR in model.networks else TEACHER
            self._safety_model = SafetyModel.of_networks(
                *model.interface[:3],
                model.critics.safety.scale,
                {name: self._arrays[mine] for name, mine in names.items()},
                flow_steps=self.config.flow_steps,
                constraint=model.constraint,
            )
        return self._safety_model

    def _adopt(self, model: CriticArchitecture, networks: Networks) -> None:
        super()._adopt(model, networks)
        self._safety_model = None
        self._certified, self.attempts = None, ()

    def _changed(self, **changes: Any) -> Self:  # noqa: ANN401 - settings of any type
        other = super()._changed(**changes)
        other._certified = None
        return other

    def _header(self, model: CriticArchitecture) -> dict[str, Any]:
        record = self.record
        return {
            **super()._header(model),
            **({} if record is None else {"record": record.to_json()}),
            **({"attempts": [json_values(one) for one in self.attempts]} if self.attempts else {}),
        }

    def _take(self, read: AgentFile) -> None:
        super()._take(read)
        with describing(read.path):
            stored = read.header.get("record")
            record = None if stored is None else ActorRecord.from_json(stored)
            # Files of earlier releases remember no attempts.
            self.attempts = tuple(
                record_from_json(Attempt, one, "attempts")
                for one in read.header.get("attempts", ())
            )
            check_calibrations(record, self.attempts)
            if record is not None:
                self._certified = self.config, record

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        observation, action = scaling.widths
        flow = velocity_network(observation, action, self.config.flow_hidden)
        # Where the teacher imitates the whole log, no second flow is needed for that.
        flows = [TEACHER] if self.config.teacher == "behaviour" else [TEACHER, BEHAVIOUR]
        student = EnsembleMLP(observation + action, action, self.config.student_hidden)
        return {**dict.fromkeys(flows, flow), STUDENT: student}

    def _act(self, model: CriticArchitecture, observations: Float, deterministic: bool) -> Float:
        """Return the actions of `_gated` where a network estimates h."""
        states = self._safety(model).evaluate_features(observations)
        return self._gated(model, states, deterministic)

    def _action_rows(self, model: CriticArchitecture, rows: Float, deterministic: bool) -> Float:
        """Return the actions of `_gated` as rows (n, act), with h of the agent's source."""
        states = self._safety(model).states(rows)
        return model.scaling.to_box(self._gated(model, states, deterministic))

    def _gated(self, model: CriticArchitecture, states: StateValue, deterministic: bool) -> Float:
        """Return the action for one sample of z (deterministic: z = 0) where it is safe enough.

        Where Q_h of this action is not below -margin, the safest of it and N more samples is taken.
        If Q_h of that one is not below -margin either, `_beyond_the_student` replaces it. A
        deterministic call uses the same N samples in every state.
        """
        if self.config.extraction == "sample":
            return self._best_of_teacher(model, states, deterministic)
        observations = states.inputs
        count, width = len(observations), model.scaling.action_features
        actions = self._student(observations, self._one_noise(count, width, deterministic))
        each = self.config.candidates
        if each == 1:
            return actions
        safety = self._safety(model)
        limit = -self.gate
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

    def graph_actions(self, rows: Any, h: GraphConstraint | None, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of `predict` as values of an ONNX graph, see `_gated`."""
        from safeshield.shield.export import GraphShield

        model, each = self._fitted(), self.config.candidates
        if self.config.extraction == "sample":
            raise CannotExportError(
                "SafeFQL must have extraction='student' in an ONNX graph, got 'sample': "
                "agent.acting_by('student') acts by the student of the same weights"
            )
        judge = GraphShield(self.shield(), rows.recorder)
        limit, width = -self.gate, model.scaling.action_features
        network, params = model.networks[STUDENT], self._networks[STUDENT]
        states: Any = judge.estimated(judge.states(rows, h))
        drawn = noise.one(states.inputs, width)
        first = of_noise(network, params, states.inputs, drawn).clip(-1.0, 1.0)
        if each == 1:
            return judge.to_box(first)
        table = noise.several(states.inputs, each, width, self.config.seed)
        missing = ~(judge.judged(states, first[:, None])[:, 0] < limit)

        def further() -> list[Any]:
            index = missing.rows_where()
            some, own = states.take(index), first[index]
            seen = some.inputs[:, None].expand(-1, each, -1).flatten(0, 1)
            more = of_noise(network, params, seen, table[index].flatten(0, 1)).clip(-1.0, 1.0)
            options = torch.cat([more.reshape(-1, each, width), own[:, None]], 1)
            values = judge.judged(some, options)
            safest, value = picked(options, values, values.argmin(1))
            beyond = judge.nearest_features(some, safest, limit, self.config.last_resort)
            chosen = torch.where((value >= limit)[:, None], beyond, safest)
            return [first.with_rows(index, chosen)]

        return judge.to_box(rows.recorder.where_any(missing, further, [first])[0])

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
        values = safety.scaled_values(states, drawn)
        below = values < -self.gate
        best = np.where(below, gain.reshape(count, each), -np.inf).argmax(1)
        chosen: Float = drawn[np.arange(count), np.where(below.any(1), best, values.argmin(1))]
        return chosen

    def _beyond_the_student(
        self,
        safety: SafetyModel,
        states: StateValue,
        actions: Float,
        limit: float,
    ) -> Float:
        """Return the nearest acceptable action to each, among the candidates of a shield.

        Where there is none, `SafeFQLConfig.last_resort` decides.
        """
        scaling = safety.scaling
        found = CandidateSet().actions(safety, states, scaling.to_box(actions))
        rows = scaling.actions(found.reshape(-1, found.shape[-1])).reshape(*found.shape[:2], -1)
        drawn = np.concatenate([actions[:, None], rows], 1)
        values = safety.scaled_values(states, drawn)
        lost = (values.min(1) > limit) & (self.config.last_resort == "nearest")
        # Where no candidate has Q_h <= V_h, `nearest_acceptable` returns that of the lowest Q_h.
        best = nearest_acceptable(drawn, values, np.where(lost, states.value, limit))
        if lost.any():
            best[lost] = np.where(safety.violating(states.take(lost)), 0, best[lost])
        return np.asarray(drawn[np.arange(len(actions)), best])

    def _student(self, observations: Float, noise: Float) -> Float:
        network = self._fitted().networks[STUDENT]
        raw = of_noise(network, self._arrays[STUDENT], observations, noise)
        return np.asarray(np.clip(raw, -1.0, 1.0))
