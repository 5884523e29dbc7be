"""The variants of the safety values that `values.py` compares, and how they are trained.

Every variant is `ShieldTrainer` with its defaults, except for what its `Variant` says, and that h^
is fitted to a quarter of each batch, because the study does not use it where h is known. A variant
changes nothing in the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from double_integrator import log as double_integrator_log
from torch import Tensor

import safeshield
from safeshield import OfflineDataset, Shield
from safeshield.algorithms.shield_trainer import (
    ShieldArchitecture,
    ShieldConfig,
    ShieldRun,
    ShieldTrainer,
)
from safeshield.demo.helmsmen import Helmsmen
from safeshield.nn.flow import euler_sample
from safeshield.nn.mlp import Networks
from safeshield.suites.labels import label
from safeshield.training.architecture import CRITICS
from safeshield.training.safety import SafetyLog
from safeshield.training.schedule import phase_steps, stages
from safeshield.training.state import CriticLoss, Draw, Phase, TrainState, critic_update
from safeshield.values.backup import SafetyBackup
from safeshield.values.expectile import expectile_loss
from safeshield.values.safety import VALUE_NETWORKS, SafetyBatch, SafetyCritics
from safeshield.values.units import BEHAVIOUR, FALLBACK

BOAT, CART = "boat", "double_integrator"
IDS = {BOAT: "safeshield/Boat-v0", CART: "safeshield/DoubleIntegrator-v0"}
CRITIC_UPDATES = {BOAT: 12_000}
"""Number of updates of the critics; on every other task `OTHER_UPDATES`."""
OTHER_UPDATES = 8_400
DEFAULT_WINDOWS, ONE_STEP_WINDOWS = (64, 32, 16, 8), (64, 16, 4, 1)
DRAWS = 8
_CHUNK = 65_536


@dataclass(frozen=True)
class Variant:
    """The settings in which a variant differs from the defaults of `ShieldConfig`."""

    expectile: float
    """Expectile of V_h over the logged windows or actions."""
    windows: tuple[int, ...] = DEFAULT_WINDOWS
    """Length of the windows in each stage, in steps; with 1, V_h is fitted to Q_h."""
    discounts: tuple[float, ...] | None = None
    """Discount g in each stage; None means the default in all of them."""
    upper: float = 0.5
    """Expectile of Q_h over the next states; 0.5 is the mean, a larger one is more cautious."""
    members: int = 2
    """Number of members of the advantage, of which Q_h uses the largest."""
    draws: bool = False
    """Whether V_h is fitted, in stages with windows of 1, to the least Q_h of draws of the
    behaviour instead of to an expectile over the logged actions."""
    sparing: int = 4
    """h^ is fitted to every n-th transition of a batch."""


VARIANTS = {
    "e99": Variant(0.99),
    "e95": Variant(0.95),
    "e90": Variant(0.9),
    "e90-g1": Variant(0.9, discounts=(0.99, 0.997, 0.999, 1.0)),
    "e90-upper": Variant(0.9, upper=0.9),
    "e90-members": Variant(0.9, members=6),
    "e90-draws": Variant(0.9, (64, 16, 1, 1), draws=True),
    "e90-one": Variant(0.9, ONE_STEP_WINDOWS),
    "e95-one": Variant(0.95, ONE_STEP_WINDOWS),
    "e99-one": Variant(0.99, ONE_STEP_WINDOWS),
    "e70": Variant(0.7),
}


def losses(
    critics: SafetyCritics,
    variant: Variant,
    networks: Networks,
    targets: Networks,
    batch: SafetyBatch,
    window: int,
    draws: Tensor | None,
) -> Tensor:
    """Return the loss of a variant's critics; `SafetyCritics.losses` has that of the defaults.

    Args:
        critics: Description of the networks.
        variant: Settings.
        networks: Online weights.
        targets: Slow copies of the weights.
        batch: Transitions and the coefficients of the windows.
        window: Length of the windows, in steps.
        draws: (batch, draws, act) actions of the behaviour in the states, in [-1, 1]; None where
            V_h is not fitted to them.
    """
    sigma = critics.scale.step_rms
    with torch.no_grad():
        here = critics.log_value(targets, batch.observations, batch.constraints)
        after = critics.log_value(targets, batch.next_observations, batch.next_constraints)
        step = SafetyBackup.one_step(batch.next_constraints, batch.terminated, critics.discount)
        residual = (step.target(after) - here) / sigma
        if draws is not None:
            count, each, _ = draws.shape
            seen = batch.observations.repeat_interleave(each, 0)
            worst = critics.advantages(targets, seen, draws.flatten(0, 1)).amax(0)
            least = worst.view(count, each).amin(1)
            goal = torch.maximum(here + sigma * least, batch.constraints)
        elif window == 1:
            worst = critics.advantages(targets, batch.observations, batch.actions).amax(0)
            goal = torch.maximum(here + sigma * worst, batch.constraints)
        else:
            end = critics.log_value(targets, batch.window_observations, batch.window_constraints)
            goal = batch.window.target(end)
    some = slice(None, None, variant.sparing)
    seen = torch.cat([batch.observations[some], batch.next_observations[some]])
    labels = torch.cat([batch.constraints[some], batch.next_constraints[some]])
    fit = ((critics.constraint(networks, seen) - labels) / critics.scale.spread).square().mean()
    value = batch.constraints + critics.excess(networks, batch.observations)
    # The least of the draws is a target of its own, not one of several between which to choose.
    weight = variant.expectile if draws is None else 0.5
    advantage = critics.advantages(networks, batch.observations, batch.actions)
    # The factor 2 makes the loss of expectile 0.5 the squared error of the defaults.
    spread = 2.0 * critics.members * expectile_loss(advantage - residual, 1.0 - variant.upper)
    return fit + expectile_loss((value - goal) / sigma, weight) + spread


class VariantRun(ShieldRun):
    """The phases of `ShieldRun`, with the critics' updates of a variant."""

    variant: Variant

    def phases(self) -> list[Phase]:
        """Return the phases; draws need the behaviour first."""
        variant, config = self.variant, self.config
        critics, behaviour, _ = phase_steps(self.steps, config.phase_shares)
        discounts = variant.discounts or (self.model.safety.discount,) * len(variant.windows)
        parts = stages(critics, variant.windows, tuple(range(len(variant.windows))))
        trained = [
            Phase(
                f"{CRITICS} {stage + 1}",
                count,
                self._stage(window, discounts[stage], critics),
                config.batch_size,
                config.near_share,
                self._safety.refresh,
            )
            for count, window, stage in parts
        ]
        imitation = Phase(BEHAVIOUR, behaviour, self._behaviour(behaviour), config.batch_size)
        fallback = [phase for phase in super().phases() if phase.name == FALLBACK]
        first, last = ([imitation], []) if variant.draws else ([], [imitation])
        return [*first, *trained, *last, *fallback]

    def _stage(self, window: int, discount: float, total: int) -> Callable[..., Any]:
        config, variant = self.config, self.variant
        critics = dataclasses.replace(self.model.safety, discount=discount)
        batches = SafetyLog(critics, self.log, config)

        def loss(state: TrainState, draw: Draw) -> CriticLoss:
            batch = batches.batch(draw.rows, window)
            drawn = None
            if variant.draws and window == 1:
                drawn = self._drawn(state.networks)[draw.rows]

            def value(networks: Networks) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
                total_loss = losses(critics, variant, networks, state.targets, batch, window, drawn)
                return total_loss, {"safety/loss": total_loss.detach()}, {}

            return value

        return critic_update(
            CRITICS,
            loss,
            self.model.slow(),
            VALUE_NETWORKS,
            config,
            total,
        )

    def _drawn(self, networks: Networks) -> Tensor:
        """Return draws (N, draws, act) of the trained behaviour in the log's states, made once."""
        kept: Tensor | None = self.__dict__.get("_kept_draws")
        if kept is None:
            network, weights = self.model.networks[BEHAVIOUR], networks[BEHAVIOUR]
            source = torch.Generator().manual_seed(self.config.seed)
            shape = (len(self.log), DRAWS, self.log.actions.shape[1])
            kept = torch.empty(shape)
            with torch.no_grad():
                for part in torch.arange(len(self.log)).split(_CHUNK // DRAWS):
                    seen = self.log.observations[part].repeat_interleave(DRAWS, 0)
                    noise = torch.randn(len(seen), shape[2], generator=source)
                    actions = euler_sample(network, weights, seen, noise, self.config.flow_steps)
                    kept[part] = actions.view(-1, *shape[1:])
            self.__dict__["_kept_draws"] = kept
        return kept


class VariantTrainer(ShieldTrainer):
    """`ShieldTrainer` with the critics of a variant."""

    def __init__(self, variant: Variant, seed: int) -> None:
        config = ShieldConfig(
            seed=seed,
            safety_expectile=variant.expectile,
            safety_backup_steps=variant.windows,
        )
        super().__init__(config, device="cpu")
        self._variant = variant

    def _describe(self, dataset: OfflineDataset) -> ShieldArchitecture:
        model = super()._describe(dataset)
        safety = dataclasses.replace(model.safety, members=self._variant.members)
        return dataclasses.replace(model, safety=safety)

    def _run(self, *arguments: Any) -> VariantRun:  # noqa: ANN401 - those of the base class
        run = VariantRun(arguments[0], arguments[1], self.config, arguments[2])
        run.variant = self._variant
        return run


def read_log(task: str, data: Path, seed: int, folder: Path) -> OfflineDataset:
    """Return a task's log: the demo's trips, held accelerations, or a file of the folder."""
    if task not in IDS:
        return label(OfflineDataset.load(data / f"{task}.hdf5"), task)
    path = folder / f"{task}_{seed}.hdf5"
    if not path.exists():
        if task == BOAT:
            log = safeshield.collect(gym.make(IDS[BOAT]), Helmsmen(), episodes=600, seed=seed)
        else:
            log = double_integrator_log(0.05, seed)
        folder.mkdir(parents=True, exist_ok=True)
        log.save(path)
    return OfflineDataset.load(path)


def trained(task: str, name: str, seed: int, data: Path, folder: Path) -> Shield:
    """Return the shield of a variant, trained now or read from its file."""
    path = folder / f"{task}_{name}_{seed}.safetensors"
    if not path.exists():
        torch.set_num_threads(1)
        log = read_log(task, data, seed, folder)
        trainer = VariantTrainer(VARIANTS[name], seed)
        updates = CRITIC_UPDATES.get(task, OTHER_UPDATES)
        steps = round(updates / trainer.config.phase_shares[0])
        checkpoint = path.with_suffix(".checkpoint")
        trainer.fit(log, steps=steps, checkpoint=checkpoint).shield().save(path)
        checkpoint.unlink()
    return Shield.load(path)


def check_defaults(seed: int = 0, steps: int = 300) -> None:
    """Raise unless a variant with the default settings learns what `ShieldTrainer` learns."""
    env = gym.make(IDS[BOAT])
    log = safeshield.collect(env, Helmsmen(), episodes=20, seed=seed)
    expectile = ShieldConfig().safety_expectile
    mine = VariantTrainer(Variant(expectile, sparing=1), seed).fit(log, steps=steps).shield()
    theirs = ShieldTrainer(ShieldConfig(seed=seed), device="cpu").fit(log, steps=steps).shield()
    points = log.observations[::7]
    if not np.allclose(mine.value(points), theirs.value(points), atol=1e-4):
        raise AssertionError("the default variant and ShieldTrainer learn different values")
