"""The run of one call of `fit`: the updates of an algorithm and their order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from safeshield.training.architecture import Architecture
from safeshield.training.log import LogTensors
from safeshield.training.state import (
    Draw,
    Loss,
    Phase,
    TrainState,
    Update,
    falling,
    initial_state,
)


class Config(Protocol):
    """Settings that every algorithm has, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of the initial weights, the batches and the noise."""

    @property
    def batch_size(self) -> int:
        """Number of transitions in each update."""

    @property
    def learning_rate(self) -> float:
        """Adam's learning rate at the start of a phase."""


ConfigT = TypeVar("ConfigT", bound=Config)
ModelT = TypeVar("ModelT", bound=Architecture)


@dataclass(eq=False)
class Run(ABC, Generic[ModelT, ConfigT]):
    """The updates of one call of `fit` on a log. An algorithm implements `phases`."""

    model: ModelT
    """Description of the agent's networks."""
    log: LogTensors
    """Log that is learned from."""
    config: ConfigT
    """Settings of the algorithm."""
    steps: int
    """Total number of updates."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Return the phases of training, in order. Each repeats one update."""

    def initial(self, generator: torch.Generator) -> TrainState:
        """Return the state before the first update, with weights that `generator` draws."""
        model = self.model
        return initial_state(
            model.parts(),
            generator,
            groups=model.groups(),
            slow=model.slow(),
            scales=model.scales(),
        )

    def falling(
        self,
        name: str,
        loss: Callable[[TrainState, Draw], Loss],
        total: int,
        names: tuple[str, ...] | None = None,
    ) -> Update:
        """Return the update that minimises a loss over networks at a falling learning rate.

        Args:
            name: Name of the Adam moments and, unless `names` is given, of the trained network.
            loss: Function from a state and random numbers to the loss function.
            total: Total number of updates.
            names: Names of the trained networks, where there are several.
        """
        return falling(name, loss, self.config.learning_rate, total, names)
