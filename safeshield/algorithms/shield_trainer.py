r"""A shield without an agent: safety critics, the log's behaviour and a fallback, nothing else.

For users who bring their own agent. Three phases on one log:

1. critics: safety values V_h, Q_h (`values.safety`), as in SafeFQL, without its reward critics;
2. behaviour: what the log does in a state (flow matching for a Box of actions, `nn.flow`; a
   classifier for discrete ones): for proposals, and for telling what the log has never shown;
3. fallback, for a Box of actions: a one-step actor mu(s, z), z ~ N(0, I), that minimises

       max_i A_i(s, mu) + distillation * || mu(s, z) - behaviour(s, z) ||^2,

   the safest action near to what the log has shown. Where actions are discrete the shield weighs
   all of them, and needs no actor.

With `support_weight` the behaviour is learned first, from nine tenths of the episodes; the others
set the level of a support test, and leaving the support is one more failure inside the backups
(`training.support_term`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.settings import (
    Below1,
    Fraction,
    Inside,
    NonNegative,
    Positive,
    PositiveInt,
    Rate,
    Seed,
    Settings,
    Share,
    Sizes,
    ThreePhases,
)
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.shield.critics import SafetyModel
from safeshield.shield.shield import Shield
from safeshield.spaces.rows import flat_actions
from safeshield.spaces.scaling import Scaling
from safeshield.support.decide import SupportTest
from safeshield.support.record import SupportRecord
from safeshield.support.scores import support_score
from safeshield.training.agent import OfflineAgent
from safeshield.training.architecture import CRITICS, Architecture, Interface
from safeshield.training.imitation import flow_update
from safeshield.training.log import LogTensors, check_boundary, safety_scale
from safeshield.training.registry import register
from safeshield.training.run import Run
from safeshield.training.safety import SafetyLog, restored_safety, safety_critics, safety_header
from safeshield.training.schedule import phase_steps, stages
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
from safeshield.values.units import BEHAVIOUR, FALLBACK

if TYPE_CHECKING:
    from safeshield.spaces.generic import Env, VectorEnv


@dataclass(frozen=True)
class ShieldConfig(Settings):
    """Settings of `ShieldTrainer`; those of the critics mean what they mean in `SafeFQLConfig`."""

    seed: Seed = 0
    """Seed of weights, batches and noise."""
    critic_hidden: Sizes = (128, 128, 128)
    """Widths of the critics' hidden layers."""
    behaviour_hidden: Sizes = (128, 128)
    """Widths of the hidden layers of the network that imitates the log."""
    fallback_hidden: Sizes = (128, 128)
    """Widths of the fallback actor's hidden layers."""
    batch_size: PositiveInt = 256
    """Transitions in an update."""
    learning_rate: Positive = 1e-3
    """Adam's rate at the start of a phase; it falls to a fiftieth by its end."""
    safety_discount: Fraction | None = None
    """Discount of the safety backup, per step; None: 0.997 for continuous labels, else 0.99."""
    safety_expectile: Fraction = 0.99
    """Weight on the safer actions in V_h."""
    safety_backup_steps: Sizes = (64, 32, 16, 8)
    """Steps along the log in the targets of V_h, in equal parts of the critics' phase."""
    polyak: Rate = 0.005
    """Share by which the slow copies move towards the critics at each update."""
    near_share: Share = 0.5
    """Share of each batch drawn from the eighth of the log that lies nearest to V_h = 0."""
    flow_steps: PositiveInt = 10
    """Euler steps of the behaviour's flow."""
    distillation: NonNegative = 0.1
    """Weight of the fallback's distance to the behaviour."""
    phase_shares: ThreePhases = (0.7, 0.15, 0.15)
    """Shares of the steps for critics, behaviour, fallback; discrete actions leave the last out."""
    support_weight: Positive | None = None
    """Weight of leaving the data's support inside the safety backup, where 1 counts a standard
    deviation of the score below its level like one of h above 0; None: it does not count, and the
    shield comes without a support test (`Shield.with_support` adds one)."""
    support_alpha: Inside = 0.1
    """With `support_weight`: the test's alpha; see `Shield.with_support`."""
    support_share: Below1 = 0.01
    """With `support_weight`: the share of an episode's steps that may count as unseen."""
    support_held_out: Inside = 0.1
    """With `support_weight`: share of the episodes that set the level; the behaviour does not learn
    from them, the critics do."""


@dataclass(frozen=True)
class ShieldArchitecture(Architecture):
    """Safety critics, the behaviour and, for a Box of actions, the fallback."""

    safety: SafetyCritics
    term: SupportTerm | None = None
    """Where leaving the support counts in the backups: how it does, while critics are trained."""
    support: SupportRecord | None = None
    """What was found of the support in training; None: no test comes with the shield."""

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """See `Architecture`."""
        return self.safety.parts()

    def header(self) -> dict[str, Any]:
        """See `Architecture`."""
        support = None if self.support is None else self.support.to_json()
        return {**safety_header(self.safety), "support": support}


@dataclass(eq=False)
class ShieldRun(Run[ShieldArchitecture, ShieldConfig]):
    """The three phases; where the support counts in the backups, the behaviour comes first."""

    def __post_init__(self) -> None:
        self._safety = SafetyLog(self.model.safety, self.log)

    def phases(self) -> list[Phase]:
        """List what to do, in order."""
        config, size, near = self.config, self.config.batch_size, self.config.near_share
        refresh = self._safety.refresh
        critics, behaviour, fallback = phase_steps(self.steps, config.phase_shares)
        if FALLBACK not in self.model.networks:
            critics, fallback = critics + fallback, 0
        phases = [
            Phase(f"{CRITICS} {i + 1}", count, self._critics(window, critics), size, near, refresh)
            for i, (count, window) in enumerate(stages(critics, config.safety_backup_steps))
        ]
        imitation = Phase(BEHAVIOUR, behaviour, self._behaviour(behaviour), size)
        phases.insert(len(phases) if self.model.term is None else 0, imitation)
        if fallback:
            update = self.falling(FALLBACK, self._fallback, fallback)
            phases.append(Phase(FALLBACK, fallback, update, size, near, refresh, fallback))
        return phases

    def _critics(self, window: int, total: int) -> Update:
        config, term = self.config, self.model.term

        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            extra = None if term is None else term.read(state.networks[BEHAVIOUR])[1]
            return self._safety.loss(state, draw.rows, window, config.safety_expectile, extra)

        return critic_update(
            CRITICS,
            losses,
            self.model.slow(),
            VALUE_NETWORKS,
            base=config.learning_rate,
            total=total,
            share=config.polyak,
        )

    def _behaviour(self, total: int) -> Update:
        """Imitate the log, without the episodes that set the level of a support test."""
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
        # An action's features are indicators: the choice with the largest product is the action.
        taken = (actions @ self._table.T).argmax(-1)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            logits = self.model.networks[BEHAVIOUR](networks[BEHAVIOUR], observations)[0]
            value = torch.nn.functional.cross_entropy(logits, taken)
            return value, {"behaviour/cross_entropy": value.detach()}

        return loss

    @cached_property
    def _table(self) -> Tensor:
        """(choices, features) of all discrete actions."""
        choices = flat_actions(self.model.action_space).choices
        return torch.tensor(self.model.scaling.actions(choices), device=self.log.actions.device)

    def _fallback(self, state: TrainState, draw: Draw) -> Loss:
        """Return the fallback's loss; the formula stands at the head of this file."""
        config, model, noise = self.config, self.model, draw.noise
        observations = self.log.observations[draw.rows]
        with torch.no_grad():
            behaviour = model.networks[BEHAVIOUR], state.networks[BEHAVIOUR]
            taught = euler_sample(*behaviour, observations, noise, config.flow_steps)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            inputs = torch.cat([observations, noise], -1)
            raw = model.networks[FALLBACK](networks[FALLBACK], inputs)[0]
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
    """Learn a shield from a log, for an agent that one has already, or is about to train.

    Box, Discrete, MultiDiscrete and MultiBinary actions; observations of every kind that
    `safeshield.spaces.rows` lists.

    Args:
        config: settings; see `ShieldConfig`.
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
    _fewest_steps = 3
    _shield: Shield | None = None
    """Made when first asked for."""

    def fit(self, dataset: OfflineDataset, steps: int = 20_000, **options: Any) -> Self:  # noqa: ANN401
        """Train on a log; returns self. See `OfflineAgent.fit` for options and errors."""
        return super().fit(dataset, steps, **options)

    def shield(self) -> Shield:
        """Return the learned shield, uncalibrated (delta 0)."""
        model = self._fitted()
        if self._shield is None:
            safety = SafetyModel.of_networks(
                *model.interface,
                model.safety.scale,
                self._arrays,
                flow_steps=self.config.flow_steps,
            )
            record = model.support
            test = None
            if record is not None:
                test = SupportTest(support_score(record.score, safety), record)
            self._shield = Shield(
                safety, trained_by=f"ShieldTrainer, seed {self.config.seed}", support=test
            )
        return self._shield

    def calibrate(self, env: Env | VectorEnv, **arguments: Any) -> Shield:  # noqa: ANN401
        """Return the learned shield, calibrated: `Shield.calibrate` says how."""
        return self.shield().calibrate(env, **arguments)

    # -- what OfflineAgent asks for -----------------------------------------------------------

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        check_boundary(dataset)
        return dataset

    def _describe(self, dataset: OfflineDataset) -> ShieldArchitecture:
        config, term = self.config, None
        scaling, weight = Scaling.of(dataset), config.support_weight
        if weight is not None:
            alpha, share = config.support_alpha, config.support_held_out
            held_out = held_out_episodes(dataset.num_episodes, share, alpha, config.seed)
            # The scaling is part of the score, so it must not know the held-out episodes either.
            scaling = Scaling.of(dataset.select(np.flatnonzero(~held_out)))
            term = SupportTerm(
                dataset,
                held_out,
                scaling,
                safety_scale(dataset),
                config.flow_steps,
                weight,
                alpha,
                config.support_share,
                self.device,
            )
        safety = safety_critics(dataset, scaling, config.critic_hidden, config.safety_discount)
        spaces = dataset.observation_space, dataset.action_space
        return self._architecture(Interface(*spaces, scaling), safety, term=term)

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ShieldArchitecture:
        safety = restored_safety(header, interface.scaling, self.config.critic_hidden)
        support = header["support"]
        record = None if support is None else SupportRecord.from_json(support)
        return self._architecture(interface, safety, support=record)

    def _architecture(
        self,
        interface: Interface,
        safety: SafetyCritics,
        **support: Any,  # noqa: ANN401 - the architecture's own fields
    ) -> ShieldArchitecture:
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
        return ShieldArchitecture(*interface, networks, safety, **support)

    def _settle(self, model: ShieldArchitecture, log: LogTensors) -> ShieldArchitecture:
        if model.term is None:
            return model
        test, _ = model.term.read(self._networks[BEHAVIOUR])
        return replace(model, term=None, support=test.record)

    def _adopt(self, model: ShieldArchitecture, networks: Networks) -> None:
        super()._adopt(model, networks)
        self._shield = None

    def _action_rows(
        self, model: ShieldArchitecture, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.float32]:
        """Return the fallback's actions; of discrete ones the choice of lowest Q_h."""
        if FALLBACK in model.networks:
            return super()._action_rows(model, observations, deterministic)
        safety = self.shield().model
        return safety.fallback_alone(safety.evaluate_features(observations))

    def _act(
        self, model: ShieldArchitecture, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        """Take one draw of z, or z = 0."""
        shape = (len(observations), model.scaling.action_features)
        noise = np.zeros(shape) if deterministic else self._noise.standard_normal(shape)
        inputs = np.concatenate([observations, noise.astype(np.float32)], -1)
        raw = model.networks[FALLBACK](self._arrays[FALLBACK], inputs)[0]
        return np.asarray(np.clip(raw, -1.0, 1.0))
