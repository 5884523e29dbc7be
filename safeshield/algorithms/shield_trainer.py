r"""A shield without an agent: safety critics, the log's behaviour and a fallback.

It is for users who have an agent of their own. It trains in three phases on one log:

1. critics: the safety values V_h, Q_h (`values.safety`), as in SafeFQL, without reward critics;
2. behaviour: a model of the log's actions in each state, which is a flow for a Box of actions
   (`nn.flow`) and a classifier for discrete ones. The shield draws candidates from it and uses it
   to recognise actions that the log has not shown;
3. fallback, for a Box of actions only: a one-step actor mu(s, z), z ~ N(0, I), that minimises

       max_i A_i(s, mu) + distillation * || mu(s, z) - behaviour(s, z) ||^2,

   which gives safe actions close to those of the log. For discrete actions the shield compares all
   of them and needs no actor.

With `support_weight` the behaviour is learned first, and from nine tenths of the episodes. The
remaining episodes set the level of a support test, and leaving the support counts as a further
failure inside the backups (`training.support_term`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from safeshield.calibration.consistency import check_calibrations
from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import json_values, record_from_json
from safeshield.files.settings import (
    Below1,
    Inside,
    NonNegative,
    Positive,
    PositiveInt,
    Rule,
    Sizes,
    ThreePhases,
)
from safeshield.nn.actor import BEHAVIOUR, FALLBACK, of_noise
from safeshield.nn.arrays import Float
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.shield.backup import BackupController
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import Attempt
from safeshield.shield.replacement import CommittedFallback, NearestAcceptable, Replacement
from safeshield.shield.shield import Shield
from safeshield.spaces.rows import flat_actions
from safeshield.spaces.scaling import Scaling
from safeshield.support.decide import SupportTest
from safeshield.support.record import SupportRecord
from safeshield.support.scores import support_score
from safeshield.training.agent import AgentFile, OfflineAgent, describing
from safeshield.training.architecture import CRITICS, Architecture, Interface, interface_of
from safeshield.training.config import SafetyConfig
from safeshield.training.escape import Escape
from safeshield.training.imitation import flow_update
from safeshield.training.log import BEFORE_LABEL_MAGNITUDE, LogTensors, labelled
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.safety import SafetyLog, restored_safety, safety_header, safety_units
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
)
from safeshield.training.support_term import SupportTerm, held_out_episodes
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics

if TYPE_CHECKING:
    from safeshield.shield.export_policy import GraphNoise
    from safeshield.spaces.generic import Env, VectorEnv


ControllerName = Annotated[
    str,
    Rule("be a name and a version, such as 'brake@1'", lambda name: name.partition("@")[2] != ""),
]
"""Name of a registered backup controller."""


@dataclass(frozen=True)
class ShieldConfig(SafetyConfig):
    """Settings of `ShieldTrainer`. Those of the critics mean the same as in `SafeFQLConfig`."""

    behaviour_hidden: Sizes = (128, 128)
    """Widths of the hidden layers of the network that imitates the log. Wider layers fit the log
    more closely and train more slowly."""
    fallback_hidden: Sizes = (128, 128)
    """Widths of the fallback actor's hidden layers. Wider layers fit more closely and train more
    slowly."""
    flow_steps: PositiveInt = 10
    """Number of Euler steps that integrate the flow of the behaviour. More steps are more accurate
    and slower. Not used for discrete actions."""
    distillation: NonNegative = 0.1
    """Weight of the squared distance between fallback and behaviour, relative to the safety
    advantage. A larger weight keeps the fallback closer to the log; a smaller one lets it follow
    the critics more."""
    phase_shares: ThreePhases = (0.7, 0.15, 0.15)
    """Shares of the updates for critics, behaviour and fallback, which sum to 1. A phase with a
    larger share trains for longer. For discrete actions the critics get the fallback's share."""
    support_weight: Positive | None = None
    """Weight of leaving the data's support as a failure in the safety backup. With 1, a score one
    standard deviation below its level counts like an h one standard deviation above 0. A larger
    weight makes rare actions count as more dangerous. None means that it does not count and that
    the shield has no support test (`Shield.with_support` adds one)."""
    support_alpha: Inside = 0.1
    """Level alpha of the support test, between 0 and 1; see `Shield.with_support`. A larger alpha
    makes the test stricter and needs fewer held-out episodes. Used with `support_weight` only."""
    support_share: Below1 = 0.01
    """Share of the steps of an episode that may count as unseen, in [0, 1). A larger share makes
    the support test stricter. Used with `support_weight` only."""
    support_held_out: Inside = 0.1
    """Share of the episodes that set the level of the support test. The critics learn from these
    episodes, but the behaviour does not. A larger share estimates the level better and leaves
    fewer episodes for the behaviour. Used with `support_weight` only."""
    backup: ControllerName | None = None
    """Name of a backup controller, such as ``"brake@1"`` (`shield.backup`). V_h is then the value
    of executing this controller, which the shield does where it rejects an action. The log must
    show the controller's actions. None means the value of the log's best actions, and the fallback
    that is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backup is not None and self.support_weight is not None:
            raise ValueError(
                f"backup must be None where support_weight is set, got {self.backup!r:.80} and "
                f"{self.support_weight}: the support of the controller's actions has no value in "
                "the backups; add a support test by shield.with_support instead"
            )


@dataclass(frozen=True)
class ShieldArchitecture(Architecture):
    """The safety critics, the behaviour and, for a Box of actions, the fallback."""

    safety: SafetyCritics
    escape: Escape | None = None
    """Actions of the backup controller in the states of the log, during training; None: there is no
    backup controller."""
    term: SupportTerm | None = None
    """Term of the backups for leaving the support, during training; None: there is no such term."""
    support: SupportRecord | None = None
    """Record of the support test from training; None: the shield has no support test."""

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """Return the safety critics by name (see `Architecture`)."""
        return self.safety.parts()

    def header(self) -> dict[str, Any]:
        """Return the critics' units and the support test, as JSON values (see `Architecture`)."""
        support = None if self.support is None else self.support.to_json()
        return {**safety_header(self.safety), "support": support}


@dataclass(eq=False)
class ShieldRun(Run[ShieldArchitecture, ShieldConfig]):
    """A shield's training in three phases.

    Where the support counts in the backups, the behaviour is trained first.
    """

    def __post_init__(self) -> None:
        discrete = FALLBACK not in self.model.networks
        self._safety = SafetyLog(
            self.model.safety, self.log, self.config, discrete, self.model.escape
        )

    def phases(self) -> list[Phase]:
        """Return the phases of training in order: critics, behaviour, fallback.

        Where the support counts in the backups, the behaviour comes first. Discrete actions have no
        fallback.
        """
        critics, behaviour, fallback = phase_steps(self.steps, self.config.phase_shares)
        if FALLBACK not in self.model.networks:
            critics, fallback = critics + fallback, 0
        phases = self._safety.phases(
            CRITICS, critics, lambda window: self._critics(window, critics)
        )
        imitation = Phase(BEHAVIOUR, behaviour, self._behaviour(behaviour), self.config.batch_size)
        phases.insert(len(phases) if self.model.term is None else 0, imitation)
        if fallback:
            update = self.falling(FALLBACK, self._fallback, fallback)
            phases.append(self._safety.phase(FALLBACK, fallback, update, fallback))
        return phases

    def _critics(self, window: int, total: int) -> Update:
        term = self.model.term

        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            extra = None if term is None else term.read(state.networks[BEHAVIOUR])[1]
            return self._safety.loss(state, draw.rows, window, extra)

        return critic_update(CRITICS, losses, self.model.slow(), VALUE_NETWORKS, self.config, total)

    def _behaviour(self, total: int) -> Update:
        """Return the update that imitates the log without the episodes held out for the support."""
        network, term = self.model.networks[BEHAVIOUR], self.model.term
        if flat_actions(self.model.action_space).discrete:
            imitate = self.falling(BEHAVIOUR, self._classify, total)
        else:
            rate = self.config.learning_rate
            imitate = flow_update(BEHAVIOUR, network, self.log, rate, total)
        if term is None:
            return imitate

        def others(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            return imitate(state, draw._replace(rows=term.learned_from(draw.rows)))

        return others

    def _classify(self, state: TrainState, draw: Draw) -> Loss:
        observations, actions = self.log.observations[draw.rows], self.log.actions[draw.rows]
        # The features of an action are indicators, so the choice with the largest product is the
        # action itself.
        taken = (actions @ self._table.T).argmax(-1)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            logits = self.model.networks[BEHAVIOUR](networks[BEHAVIOUR], observations)[0]
            value = torch.nn.functional.cross_entropy(logits, taken)
            return value, {"behaviour/cross_entropy": value.detach()}

        return loss

    @cached_property
    def _table(self) -> Tensor:
        """(choices, features) features of all discrete actions."""
        choices = flat_actions(self.model.action_space).choices
        return torch.tensor(self.model.scaling.actions(choices), device=self.log.actions.device)

    def _fallback(self, state: TrainState, draw: Draw) -> Loss:
        """Return the fallback's loss. The module docstring has the formula."""
        config, model, noise = self.config, self.model, draw.noise
        observations = self.log.observations[draw.rows]
        with torch.no_grad():
            behaviour = model.networks[BEHAVIOUR], state.networks[BEHAVIOUR]
            taught = euler_sample(*behaviour, observations, noise, config.flow_steps)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            raw = of_noise(model.networks[FALLBACK], networks[FALLBACK], observations, noise)
            action = raw.clamp(-1.0, 1.0)
            danger = model.safety.advantages(state.targets, observations, action).amax(0)
            distance = (raw - taught).square().sum(-1)
            value = (danger + config.distillation * distance).mean()
            return value, {
                "fallback/advantage": danger.detach().mean(),
                "fallback/distance_to_behaviour": distance.detach().mean(),
            }

        return loss


@register("shield")
class ShieldTrainer(OfflineAgent[ShieldConfig, ShieldArchitecture]):
    """Learn a shield from a log, for any agent that exists already or will be trained later.

    Actions may be Box, Discrete, MultiDiscrete or MultiBinary. Observations may be of every kind
    that `safeshield.spaces.rows` lists.

    Args:
        config: Settings; see `ShieldConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> trainer = ShieldTrainer(ShieldConfig(critic_hidden=(16,), behaviour_hidden=(16,)))
    >>> shield = trainer.fit(log, steps=30).shield()
    >>> action, report = shield.with_delta(0.01).filter(log.observations[0], log.actions[0])
    >>> action.shape
    (2,)
    """

    config_type = ShieldConfig
    file_format = "safeshield-shield-trainer"
    run_type = ShieldRun
    _before: ClassVar[dict[str, Any]] = {"backup": None, **BEFORE_LABEL_MAGNITUDE}
    _fewest_steps = 3
    _shield: Shield | None = None
    """The learned shield, created at first use."""
    _attempts: tuple[Attempt, ...] = ()
    """Attempts of the shield that the agent's file remembers."""

    def fit(self, dataset: OfflineDataset, steps: int = 20_000, **options: Any) -> Self:  # noqa: ANN401
        """Train on the log `dataset` for `steps` updates and return self.

        `options` are the other arguments of `OfflineAgent.fit`, which also describes the errors.
        """
        return super().fit(dataset, steps, **options)

    def shield(self) -> Shield:
        """Return the learned shield, uncalibrated (delta 0).

        It replaces a rejected action by that of the backup controller, where there is one
        (`ShieldConfig.backup`), or by the fallback's (`CommittedFallback`). Where actions are
        discrete, or the shield has a support test, it takes the nearest acceptable action instead.
        `Shield.with_replacement` changes that.
        """
        model = self._fitted()
        if self._shield is None:
            safety = SafetyModel.of_networks(
                *model.interface[:3],
                model.safety.scale,
                self._arrays,
                flow_steps=self.config.flow_steps,
                constraint=model.constraint,
            )
            record = model.support
            test = None
            if record is not None:
                test = SupportTest(support_score(record.score, safety), record)
            replacement: Replacement = NearestAcceptable()
            if self.config.backup is not None:
                replacement = BackupController.find(self.config.backup)
            elif FALLBACK in model.networks and test is None:
                replacement = CommittedFallback()
            self._shield = Shield(
                safety,
                trained_by=f"ShieldTrainer, seed {self.config.seed}",
                replacement=replacement,
                support=test,
                attempts=self._attempts,
                training_episodes=self._episodes,
            )
        return self._shield

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Calibrations of the learned shield, also those that failed."""
        return self._attempts if self._shield is None else self._shield.attempts

    def calibrate(self, env: Env | VectorEnv, **arguments: Any) -> Shield:  # noqa: ANN401
        """Return the learned shield after calibration in `env`.

        `arguments` are the other arguments of `Shield.calibrate`. The trainer's file remembers the
        attempt, also where it failed.
        """
        return self.shield().calibrate(env, **arguments)

    # -- methods that OfflineAgent requires ---------------------------------------------------

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        return labelled(dataset, self.config.label_magnitude)

    def _batchable(self) -> bool:
        # With the support in the backups, the held-out episodes, and so the scaling and the labels
        # of the term, depend on the seed.
        return self.config.support_weight is None

    def _describe(self, dataset: OfflineDataset) -> ShieldArchitecture:
        config, weight = self.config, self.config.support_weight
        if weight is None:
            model = super()._describe(dataset)
            if config.backup is None:
                return model
            controller = BackupController.find(config.backup)
            escape = Escape.of(controller, dataset, model.scaling, self.device)
            return replace(model, escape=escape)
        alpha, share = config.support_alpha, config.support_held_out
        held_out = held_out_episodes(dataset.num_episodes, share, alpha, config.seed)
        # The scaling is part of the score, so it must not be computed from the held-out episodes.
        scaling = Scaling.of(dataset.select(np.flatnonzero(~held_out)))
        model = self._build(interface_of(dataset, scaling), safety_units(dataset))
        term = SupportTerm(
            dataset,
            held_out,
            scaling,
            model.safety.scale,
            config.flow_steps,
            weight,
            alpha,
            config.support_share,
            self.device,
        )
        return replace(model, term=term)

    def _units(self, dataset: OfflineDataset, scaling: Scaling) -> dict[str, Any]:
        return safety_units(dataset)

    def _build(self, interface: Interface, units: dict[str, Any]) -> ShieldArchitecture:
        safety = restored_safety(units, interface.scaling, self.config)
        codec, config = flat_actions(interface.action_space), self.config
        seen, act = interface.scaling.widths
        if codec.discrete:
            choices = EnsembleMLP(seen, len(codec.choices), config.behaviour_hidden)
            networks = {BEHAVIOUR: choices}
        else:
            networks = {
                BEHAVIOUR: velocity_network(seen, act, config.behaviour_hidden),
                FALLBACK: EnsembleMLP(seen + act, act, config.fallback_hidden),
            }
        return ShieldArchitecture(*interface, networks, safety)

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ShieldArchitecture:
        model, support = super()._restore(interface, header), header["support"]
        record = None if support is None else SupportRecord.from_json(support)
        return replace(model, support=record)

    def _settle(
        self, model: ShieldArchitecture, log: LogTensors, state: TrainState
    ) -> ShieldArchitecture:
        model = replace(model, escape=None)
        if model.term is None:
            return model
        test, _ = model.term.read(self._networks[BEHAVIOUR])
        return replace(model, term=None, support=test.record)

    def _adopt(self, model: ShieldArchitecture, networks: Networks) -> None:
        super()._adopt(model, networks)
        self._shield, self._attempts = None, ()

    def _header(self, model: ShieldArchitecture) -> dict[str, Any]:
        told = {"attempts": [json_values(one) for one in self.attempts]} if self.attempts else {}
        return {**super()._header(model), **told}

    def _take(self, read: AgentFile) -> None:
        super()._take(read)
        with describing(read.path):
            # Files of earlier releases remember no attempts.
            self._attempts = tuple(
                record_from_json(Attempt, one, "attempts")
                for one in read.header.get("attempts", ())
            )
            check_calibrations(None, self._attempts)

    def _action_rows(self, model: ShieldArchitecture, rows: Float, deterministic: bool) -> Float:
        """Return the fallback's actions, or for discrete actions the choice of lowest Q_h."""
        if FALLBACK in model.networks:
            return super()._action_rows(model, rows, deterministic)
        safety = self.shield().model
        return safety.fallback_alone(safety.states(rows))

    def _act(self, model: ShieldArchitecture, observations: Float, deterministic: bool) -> Float:
        """Return the fallback's actions for one sample of z (deterministic: z = 0)."""
        width = model.scaling.action_features
        noise = self._one_noise(len(observations), width, deterministic)
        network = model.networks[FALLBACK]
        raw = of_noise(network, self._arrays[FALLBACK], observations, noise)
        return np.asarray(np.clip(raw, -1.0, 1.0))

    def _act_on_graph(self, model: ShieldArchitecture, observations: Any, noise: GraphNoise) -> Any:  # noqa: ANN401
        if FALLBACK not in model.networks:
            return super()._act_on_graph(model, observations, noise)
        network = model.networks[FALLBACK]
        drawn = noise.one(observations, model.scaling.action_features)
        return of_noise(network, self._networks[FALLBACK], observations, drawn).clip(-1.0, 1.0)
