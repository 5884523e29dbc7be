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

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import (
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
from safeshield.nn.optim import adam_init, polyak
from safeshield.shield.critics import SafetyModel
from safeshield.shield.shield import Shield
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.training.critics import CRITICS, phase_steps, with_networks
from safeshield.training.log import LogTensors, check_boundary, run_identity, safety_scale
from safeshield.training.loop import device_of, fit_options, run_phases
from safeshield.training.registry import register
from safeshield.training.safety import SafetyLog, critic_rates, flow_update, safety_critics, stages
from safeshield.training.state import (
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    descend,
    learning_rate,
)
from safeshield.training.support_term import SupportTerm, held_out_episodes
from safeshield.values.safety import VALUE_NETWORKS, SafetyBatch, SafetyCritics
from safeshield.values.units import BEHAVIOUR, FALLBACK, SAFETY_NETWORKS

if TYPE_CHECKING:
    from safeshield.rollouts.copies import Env, VectorEnv


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


@register("shield")
class ShieldTrainer:
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

    def __init__(
        self, config: ShieldConfig | None = None, *, device: str | torch.device = "auto"
    ) -> None:
        self.config = config or ShieldConfig()
        self.device = device_of(device)
        self._shield: Shield | None = None

    def fit(
        self,
        dataset: OfflineDataset,
        steps: int = 20_000,
        *,
        progress_bar: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 2000,
    ) -> Self:
        """Train on a log; returns self.

        Args:
            dataset: whole episodes with labels.
            steps: updates in all, shared among the phases.
            progress_bar: show one.
            log_dir: folder for TensorBoard files.
            checkpoint: file from which to go on where it exists, and which is kept up to date.
            checkpoint_every: updates between two checkpoints; there is one at the end of each phase
                and once a minute, too.

        Raises:
            TypeError: a number is no whole one.
            ValueError: the log has no violation or nothing but violations, its action box is
                unbounded, or the checkpoint belongs to another run.
            FloatingPointError: a loss or a weight became NaN; the message names the phase.
        """
        options = fit_options(
            steps,
            3,
            progress_bar=progress_bar,
            log_dir=log_dir,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
        check_boundary(dataset)
        steps, config = options.steps, self.config
        scaling, support = _scaling_and_support(dataset, config, self.device)
        critics = safety_critics(dataset, scaling, config.critic_hidden, config.safety_discount)
        log = LogTensors.of(dataset, scaling, self.device)
        run = _Run(critics, dataset.flat_actions, scaling, log, config, steps, support)
        generator = torch.Generator(self.device).manual_seed(config.seed)
        state, _ = run_phases(
            run.phases(),
            run.initial(generator),
            generator,
            transitions=len(log),
            noise_features=scaling.action_features,
            options=options,
            identity=run_identity(type(self).__name__, config, dataset, steps),
        )
        # The critics' slow copies are what the advantages were fitted to.
        learned = {**state.networks, **state.targets}
        networks = {
            name: {key: tensor.detach().cpu().numpy() for key, tensor in learned[name].items()}
            for name in run.kept
        }
        self._shield = Shield(
            SafetyModel(
                dataset.observation_space,
                dataset.action_space,
                scaling,
                critics.scale,
                networks,
                flow_steps=config.flow_steps,
            ),
            trained_by=f"ShieldTrainer, seed {config.seed}",
            support=None if support is None else support.read(learned[BEHAVIOUR])[0],
        )
        return self

    def shield(self) -> Shield:
        """Return the learned shield, uncalibrated (delta 0)."""
        if self._shield is None:
            raise RuntimeError("nothing has been trained yet: call fit()")
        return self._shield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the learned shield, uncalibrated, to a file that `Shield.load` reads."""
        self.shield().save(path)

    def calibrate(self, env: Env | VectorEnv, **arguments: Any) -> Shield:  # noqa: ANN401
        """Return the learned shield, calibrated: `Shield.calibrate` says how."""
        return self.shield().calibrate(env, **arguments)


def _scaling_and_support(
    dataset: OfflineDataset, config: ShieldConfig, device: torch.device
) -> tuple[Scaling, SupportTerm | None]:
    if config.support_weight is None:
        return Scaling.of(dataset), None
    held_out = held_out_episodes(
        dataset.num_episodes, config.support_held_out, config.support_alpha, config.seed
    )
    # The scaling is part of the score, so it must not know the held-out episodes either.
    scaling = Scaling.of(dataset.select(np.flatnonzero(~held_out)))
    return scaling, SupportTerm(
        dataset,
        held_out,
        scaling,
        safety_scale(dataset),
        config.flow_steps,
        config.support_weight,
        config.support_alpha,
        config.support_share,
        device,
    )


@dataclass(eq=False)
class _Run:
    """One call of fit: the updates of its phases, closed over the log."""

    critics: SafetyCritics
    action_codec: SpaceCodec
    scaling: Scaling
    log: LogTensors
    config: ShieldConfig
    steps: int
    support: SupportTerm | None = None

    def __post_init__(self) -> None:
        self._safety = SafetyLog(self.critics, self.log)
        widths = self.critics.observation, self.critics.action
        hidden = self.config.behaviour_hidden
        self.behaviour = (
            EnsembleMLP(widths[0], len(self.action_codec.choices), hidden)
            if self.action_codec.discrete
            else velocity_network(*widths, hidden)
        )
        self.fallback = EnsembleMLP(sum(widths), widths[1], self.config.fallback_hidden)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the networks that make a shield."""
        return (*SAFETY_NETWORKS, BEHAVIOUR, *(() if self.action_codec.discrete else (FALLBACK,)))

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""
        critics = self.critics.init(generator)
        parts = {BEHAVIOUR: self.behaviour, FALLBACK: self.fallback}
        state = TrainState(
            networks=critics,
            targets=critics,
            moments={CRITICS: adam_init(critics)},
            scales={},
            boundary_rows=torch.zeros(0, dtype=torch.int64, device=generator.device),
        )
        others = {name: part for name, part in parts.items() if name in self.kept}
        return with_networks(state, others, generator)

    def phases(self) -> list[Phase]:
        """List what to do, in order."""
        size, near = self.config.batch_size, self.config.near_share
        critics, behaviour, fallback = phase_steps(self.steps, self.config.phase_shares)
        if self.action_codec.discrete:
            critics, fallback = critics + fallback, 0
        phases = [
            Phase(
                f"{CRITICS} {i + 1}",
                count,
                self._critics(window, critics),
                size,
                near,
                self._safety.refresh,
            )
            for i, (count, window) in enumerate(stages(critics, self.config.safety_backup_steps))
        ]
        imitation = Phase(BEHAVIOUR, behaviour, self._behaviour(behaviour), size)
        # Where the support counts in the backups, the behaviour must be known before them.
        phases.insert(len(phases) if self.support is None else 0, imitation)
        if fallback:
            refresh = self._safety.refresh
            update = self._fallback(fallback)
            phases.append(Phase(FALLBACK, fallback, update, size, near, refresh, fallback))
        return phases

    def _batches(self, window: int) -> Callable[[TrainState], Callable[[Tensor], SafetyBatch]]:
        """Return what makes batches in a state in which the behaviour, if it counts, is learned."""
        support = self.support
        if support is None:
            plain = self._safety.batches(window)
            return lambda state: plain
        made: list[Callable[[Tensor], SafetyBatch]] = []

        def batches(state: TrainState) -> Callable[[Tensor], SafetyBatch]:
            if not made:
                _, extra = support.read(state.networks[BEHAVIOUR])
                made.append(self._safety.batches(window, extra))
            return made[0]

        return batches

    def _critics(self, window: int, total: int) -> Update:
        batches, config = self._batches(window), self.config
        names = tuple(self.critics.parts())

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            batch = batches(state)(draw.rows)

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                return self.critics.losses(
                    networks,
                    state.targets,
                    batch,
                    expectile=config.safety_expectile,
                    one_step=window == 1,
                )

            count = state.moments[CRITICS].updates
            rates = critic_rates(config.learning_rate, count, total, names, VALUE_NETWORKS)
            state, metrics = descend(state, CRITICS, names, loss, rates)
            targets = polyak(state.targets, state.networks, config.polyak)
            return state._replace(targets=targets), metrics

        return update

    def _behaviour(self, total: int) -> Update:
        update, support = self._imitate(total), self.support
        if support is None:
            return update

        def others(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            return update(state, draw._replace(rows=support.learned_from(draw.rows)))

        return others

    def _imitate(self, total: int) -> Update:
        config, log = self.config, self.log
        if not self.action_codec.discrete:
            return flow_update(BEHAVIOUR, self.behaviour, log, config.learning_rate, total)
        # An action's features are indicators: the choice with the largest product is the action.
        table = torch.tensor(
            self.scaling.actions(self.action_codec.choices), device=log.actions.device
        )

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            observations, actions = log.observations[draw.rows], log.actions[draw.rows]
            taken = (actions @ table.T).argmax(-1)

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                logits = self.behaviour(networks[BEHAVIOUR], observations)[0]
                value = torch.nn.functional.cross_entropy(logits, taken)
                return value, {"behaviour/cross_entropy": value.detach()}

            rate = learning_rate(config.learning_rate, state.moments[BEHAVIOUR].updates, total)
            return descend(state, BEHAVIOUR, (BEHAVIOUR,), loss, {BEHAVIOUR: rate})

        return update

    def _fallback(self, total: int) -> Update:
        config, log = self.config, self.log

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            observations = log.observations[draw.rows]
            with torch.no_grad():
                taught = euler_sample(
                    self.behaviour,
                    state.networks[BEHAVIOUR],
                    observations,
                    draw.noise,
                    config.flow_steps,
                )

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                inputs = torch.cat([observations, draw.noise], -1)
                raw = self.fallback(networks[FALLBACK], inputs)[0]
                action = raw.clamp(-1.0, 1.0)
                danger = self.critics.advantages(state.targets, observations, action).amax(0)
                distance = (raw - taught).square().sum(-1)
                value = (danger + config.distillation * distance).mean()
                return value, {
                    "fallback/advantage": danger.detach().mean(),
                    "fallback/distance_to_behaviour": distance.detach().mean(),
                }

            rate = learning_rate(config.learning_rate, state.moments[FALLBACK].updates, total)
            return descend(state, FALLBACK, (FALLBACK,), loss, {FALLBACK: rate})

        return update
