"""Safety and reward critics together: the phase that SafeFQL, FISOR and their kin begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.nn.optim import adam_init, polyak
from safeshield.spaces.scaling import Scaling
from safeshield.training.checks import (
    check_fractions,
    check_not_negative,
    check_positive,
    check_seed,
    check_shares,
    check_sizes,
    settle_types,
)
from safeshield.training.imitation import imitation_weights
from safeshield.training.log import LogTensors, return_scale
from safeshield.training.loop import Draw, Metrics, Phase, TrainState, Update, descend
from safeshield.training.safety import SafetyLog, critic_rates, safety_critics, stages
from safeshield.values.backup import RewardBackup, reward_backup
from safeshield.values.reward import VALUE as REWARD_VALUE
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics
from safeshield.values.units import SafetyScale

CRITICS = "critics"
_VALUES = (*VALUE_NETWORKS, REWARD_VALUE)


PAPER_CRITICS: dict[str, Any] = {
    "reward_expectile": 0.9,
    "safety_expectile": 0.9,
    "safety_backup_steps": (1,),
    "reward_backup_steps": (1,),
    "safe_reward_value": False,
    "near_share": 0.0,
    "margin": 0.0,
}
"""What the critics of the papers' official codes have instead of our defaults."""


@dataclass(frozen=True)
class ValueConfig:
    """Settings that every algorithm with safety values and an actor shares."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"small": {}}
    """Named settings; "small" is the defaults: two cores, minutes, one setting for all tasks."""

    seed: int = 0
    """Seed of weights, batches and noise."""
    critic_hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of the critics' hidden layers. Depth pays: on the boat three of 128 erred less than
    two of 256 (the papers'), at half the cost."""
    flow_hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the flow that draws actions (official code: four of 512)."""
    batch_size: int = 256
    """Transitions in an update."""
    learning_rate: float = 1e-3
    """Adam's rate at the start of a phase; it falls to a fiftieth by its end."""
    discount: float = 0.99
    """Discount of rewards, per step."""
    safety_discount: float | None = None
    """Discount g of the safety backup, per step. A violation k steps ahead weighs g^k: choose
    1 - g well below (time step) / (time it takes to get out of danger). None: 0.997 where labels
    are continuous; 0.99 where they are binary, because there it sets how far ahead a violation is
    felt (`data.label_reach`)."""
    reward_expectile: float = 0.95
    """Weight on the better actions in V_r."""
    safety_expectile: float = 0.99
    """Weight on the safer actions in V_h (papers: 0.9)."""
    safety_backup_steps: tuple[int, ...] = (64, 32, 16, 8)
    """Steps along the log in the targets of V_h, in equal parts of the critics' phase. End on 1
    (the papers' form) where the environment is strongly random; see `values.safety`."""
    polyak: float = 0.005
    """Share by which the slow copies move towards the critics at each update."""
    near_share: float = 0.5
    """Share of each batch drawn from the eighth of the log that lies nearest to V_h = 0."""
    margin: float = 0.058
    """Margin of the gate between safe and unsafe actions, in standard deviations of h over the
    log; where labels are continuous at least one step's worth of h (sigma_h), because an actor
    never sees a thinner gate. 0: no margin at all."""

    def __post_init__(self) -> None:
        settle_types(self)
        check_positive(self, "batch_size", "learning_rate", "polyak")
        check_fractions(self, "discount", "safety_discount", "reward_expectile", "safety_expectile")
        check_shares(self, "near_share", "polyak")
        check_seed(self)
        check_not_negative(self, "margin")
        check_sizes(self, "critic_hidden", "flow_hidden", "safety_backup_steps")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401
        """Return the settings of a name in `presets`, some of them changed.

        Raises:
            ValueError: there is no preset of this name.

        >>> from safeshield import SafeFQLConfig
        >>> SafeFQLConfig.preset("paper", seed=2).student_hidden
        (512, 512, 512, 512)
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {sorted(cls.presets)}, got {name!r}")
        return cls(**{**cls.presets[name], **changes})

    def margin_of(self, safety: SafetyCritics) -> float:
        """Return the margin of the gate, in units of h."""
        share = self.margin * safety.scale.spread
        # Binary labels jump by more than lies between safe and unsafe.
        return max(share, safety.scale.step_rms) if safety.continuous and self.margin else share


@dataclass(frozen=True)
class CriticConfig(ValueConfig):
    """Settings of safety and one-step reward critics together."""

    reward_backup_steps: tuple[int, ...] = (64, 16, 8, 8)
    """As `safety_backup_steps`, for V_r."""
    safe_reward_value: bool = True
    """Value states by the best SAFE way on (`values.reward`); the papers' critics by any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "reward_backup_steps")


@dataclass(frozen=True)
class EulerConfig(CriticConfig):
    """Settings of algorithms whose flow is integrated, beside those of their critics."""

    flow_steps: int = 10
    """Euler steps of the flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "flow_steps")


@dataclass(frozen=True)
class Critics:
    """Safety and reward critics of one architecture, in the units of one log."""

    safety: SafetyCritics
    reward: RewardCritics

    @classmethod
    def of(cls, dataset: OfflineDataset, scaling: Scaling, config: ValueConfig) -> Critics:
        """Read the units off a log."""
        widths = scaling.observation_features, scaling.action_features
        return cls(
            safety_critics(dataset, scaling, config.critic_hidden, config.safety_discount),
            RewardCritics(*widths, config.critic_hidden, *return_scale(dataset, config.discount)),
        )

    @classmethod
    def restore(cls, header: dict[str, Any], scaling: Scaling, config: ValueConfig) -> Critics:
        """Rebuild what `units` wrote into a file's header.

        Raises:
            KeyError, TypeError, ValueError: it is not there, or damaged.
        """
        widths = scaling.observation_features, scaling.action_features
        scale = SafetyScale.from_json(header["safety_scale"])
        mean, spread = (finite_number(x, "reward_scale") for x in header["reward_scale"])
        # Older files do not say, and did not need it.
        kind = header.get("constraint_kind", "continuous")
        if kind not in ("continuous", "binary"):
            raise ValueError(f"constraint_kind must be 'continuous' or 'binary', got {kind!r:.20}")
        continuous = kind == "continuous"
        return cls(
            SafetyCritics(*widths, config.critic_hidden, scale, continuous=continuous),
            RewardCritics(*widths, config.critic_hidden, mean, spread),
        )

    def header(self) -> dict[str, Any]:
        """Return the units as JSON."""
        return {
            "safety_scale": self.safety.scale.to_json(),
            "reward_scale": [self.reward.offset, self.reward.spread],
            "constraint_kind": "continuous" if self.safety.continuous else "binary",
        }

    def parts(self) -> dict[str, EnsembleMLP]:
        """Describe every network."""
        return {**self.safety.parts(), **self.reward.parts()}

    def init(self, generator: torch.Generator) -> Networks:
        """Draw all weights."""
        return {**self.safety.init(generator), **self.reward.init(generator)}


@dataclass(eq=False)
class CriticsRun:
    """The critics' part of one call of fit: its updates, closed over the log."""

    critics: Critics
    log: LogTensors
    config: CriticConfig
    total: int
    """Updates in all."""

    def __post_init__(self) -> None:
        self._safety = SafetyLog(self.critics.safety, self.log)

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw the critics' weights; `with_networks` adds those of an actor."""
        critics = self.critics.init(generator)
        device = generator.device
        return TrainState(
            networks=critics,
            targets=critics,
            moments={CRITICS: adam_init(critics)},
            scales={"reward": torch.full((), self.critics.reward.spread, device=device)},
            boundary_rows=torch.zeros(0, dtype=torch.int64, device=device),
        )

    def phases(self) -> list[Phase]:
        """List what to do, in order. The windows of the critics' targets get shorter in stages."""
        return [
            self.phase(f"{CRITICS} {i + 1}", count, self.update(*windows))
            for i, (count, *windows) in enumerate(self.stages())
        ]

    def stages(self) -> list[tuple[int, ...]]:
        """List (updates, safety window, reward window)."""
        config = self.config
        return stages(self.total, config.safety_backup_steps, config.reward_backup_steps)

    def phase(self, name: str, steps: int, update: Update, refresh_every: int = 250) -> Phase:
        """Return a phase that draws more often near the learned boundary."""
        size, near = self.config.batch_size, self.config.near_share
        return Phase(name, steps, update, size, near, self._safety.refresh, refresh_every)

    def update(self, safety_steps: int, reward_steps: int) -> Update:
        """Return one update of all critics, with windows of these lengths in the targets."""
        log, config, critics = self.log, self.config, self.critics
        safety_batches = self._safety.batches(safety_steps)
        reward_window = reward_backup(
            log.rewards, log.terminated, log.episode_last, config.discount, reward_steps
        )
        names = tuple(critics.parts())

        def update(state: TrainState, draw: Draw) -> tuple[TrainState, Metrics]:
            safety_batch = safety_batches(draw.rows)
            rewarded = reward_batch(log, reward_window, draw.rows)
            sigma = state.scales["reward"]
            allowed = self._allowed(state.targets, draw.rows) if config.safe_reward_value else None
            seen: list[Tensor] = []

            def loss(networks: Networks) -> tuple[Tensor, Metrics]:
                safety, safety_metrics = critics.safety.losses(
                    networks,
                    state.targets,
                    safety_batch,
                    expectile=config.safety_expectile,
                    one_step=safety_steps == 1,
                )
                reward, residual, reward_metrics = critics.reward.losses(
                    networks,
                    state.targets,
                    rewarded,
                    sigma,
                    discount=config.discount,
                    expectile=config.reward_expectile,
                    one_step=reward_steps == 1,
                    allowed=allowed,
                )
                seen.append(residual)
                return safety + reward, {**safety_metrics, **reward_metrics}

            count = state.moments[CRITICS].updates
            rates = critic_rates(config.learning_rate, count, self.total, names, _VALUES)
            state, metrics = descend(state, CRITICS, names, loss, rates)
            return (
                state._replace(
                    targets=polyak(state.targets, state.networks, config.polyak),
                    scales={**state.scales, "reward": torch.lerp(sigma, seen[0], config.polyak)},
                ),
                metrics,
            )

        return update

    @property
    def margin(self) -> float:
        """Margin of the gate, in units of h."""
        return self.config.margin_of(self.critics.safety)

    def imitation(
        self, *, reward_temperature: float, safety_temperature: float
    ) -> Callable[[TrainState, Tensor], Tensor]:
        """Return what weighs rows (batch,) of the log for an actor that imitates the good ones."""

        def weigh(state: TrainState, rows: Tensor) -> Tensor:
            with torch.no_grad():
                return imitation_weights(
                    self.critics.safety,
                    self.critics.reward,
                    state.targets,
                    self.log.observations[rows],
                    self.log.actions[rows],
                    self.margin,
                    reward_temperature=reward_temperature,
                    safety_temperature=safety_temperature,
                )

        return weigh

    def _allowed(self, critics: Networks, rows: Tensor) -> Tensor:
        """Mark the logged actions that an actor's gate would let pass.

        Where it lets none pass, in a state that is itself too close, all count.
        """
        safety = self.critics.safety
        with torch.no_grad():
            observations, actions = self.log.observations[rows], self.log.actions[rows]
            here = safety.value(critics, observations)
            worst = safety.advantages(critics, observations, actions).amax(0)
            passes = here + safety.scale.step_rms * worst < -self.margin
            return (passes | (here >= -self.margin)).float()


def with_networks(
    state: TrainState, parts: dict[str, EnsembleMLP], generator: torch.Generator
) -> TrainState:
    """Add freshly drawn networks to a state, each trained by itself."""
    networks = {name: part.init(generator) for name, part in parts.items()}
    moments: dict[str, Any] = {name: adam_init({name: net}) for name, net in networks.items()}
    return state._replace(
        networks={**state.networks, **networks}, moments={**state.moments, **moments}
    )


def phase_steps(steps: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Share out `steps` updates, at least one to each part; the last gets the rest.

    >>> phase_steps(10, (0.5, 0.2, 0.3)), phase_steps(3, (0.98, 0.01, 0.01))
    ((5, 2, 3), (1, 1, 1))
    """
    counts: list[int] = [max(1, round(share * steps)) for share in shares[:-1]]
    counts[0] = min(counts[0], steps - sum(counts[1:]) - 1)
    return (*counts, steps - sum(counts))


def reward_batch(log: LogTensors, window: RewardBackup, rows: Tensor) -> RewardBatch:
    """Gather rows (batch,) of a log, with the targets of `window`."""
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
