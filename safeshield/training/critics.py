"""Safety and reward critics together: the phase that SafeFQL, FISOR and their kin begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.nn.optim import adam_init, polyak
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import CriticConfig, ValueConfig
from safeshield.training.imitation import imitation_weights
from safeshield.training.log import LogTensors, logged_returns, scale_of_returns
from safeshield.training.safety import SafetyLog, critic_rates, safety_critics, stages
from safeshield.training.state import (
    Draw,
    Metrics,
    Phase,
    TrainState,
    Update,
    descend,
)
from safeshield.values.backup import RewardWindow, reward_windows, rows_of
from safeshield.values.reward import VALUE as REWARD_VALUE
from safeshield.values.reward import RewardBatch, RewardCritics
from safeshield.values.safety import VALUE_NETWORKS, SafetyCritics
from safeshield.values.units import SafetyScale

CRITICS = "critics"
_VALUES = (*VALUE_NETWORKS, REWARD_VALUE)


@dataclass(frozen=True)
class Critics:
    """Safety and reward critics of one architecture, in the units of one log."""

    safety: SafetyCritics
    reward: RewardCritics

    @classmethod
    def of(cls, dataset: OfflineDataset, scaling: Scaling, config: ValueConfig) -> Critics:
        """Read the units off a log."""
        widths = scaling.observation_features, scaling.action_features
        scale = scale_of_returns(logged_returns(dataset, config.discount))
        return cls(
            safety_critics(dataset, scaling, config.critic_hidden, config.safety_discount),
            RewardCritics(*widths, config.critic_hidden, *scale),
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
        reward_window = reward_windows(
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


def reward_batch(log: LogTensors, windows: RewardWindow, rows: Tensor) -> RewardBatch:
    """Gather rows (batch,) of a log, with the targets of `windows`."""
    window = rows_of(windows, rows)
    return RewardBatch(
        observations=log.observations[rows],
        actions=log.actions[rows],
        next_observations=log.next_observations[rows],
        rewards=log.rewards[rows],
        terminated=log.terminated[rows],
        window=window,
        window_observations=log.next_observations[window.last],
    )
