"""One call of fit: what an algorithm does to its networks, in which order."""

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
    """The settings that every algorithm has: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of weights, batches and noise."""

    @property
    def batch_size(self) -> int:
        """Transitions in an update."""

    @property
    def learning_rate(self) -> float:
        """Adam's rate at the start of a phase."""


ConfigT = TypeVar("ConfigT", bound=Config)
ModelT = TypeVar("ModelT", bound=Architecture)


@dataclass(eq=False)
class Run(ABC, Generic[ModelT, ConfigT]):
    """The updates of one call of fit, closed over the log. An algorithm says its phases."""

    model: ModelT
    log: LogTensors
    config: ConfigT
    steps: int
    """Updates in all."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """List what to do, in order."""

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""
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
        """Return the update that descends a loss for one network: see `state.falling`."""
        return falling(name, loss, self.config.learning_rate, total, names)
