"""Safety shields for reinforcement learning agents, learned from logged data.

>>> import gymnasium
>>> import safeshield  # registers safeshield/Boat-v0 and others
>>> env = gymnasium.make("safeshield/Boat-v0")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from safeshield._moved import install
from safeshield.requirements import explained

try:
    from safeshield.envs.registration import register_envs
except ModuleNotFoundError as error:
    raise explained(error) from error

if TYPE_CHECKING:
    from safeshield.algorithms.registry import load_agent
    from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
    from safeshield.algorithms.shield_trainer import ShieldConfig, ShieldTrainer
    from safeshield.calibration.walk import CalibrationError
    from safeshield.data.collect import collect
    from safeshield.data.dataset import OfflineDataset
    from safeshield.evaluation.curves import Evaluate
    from safeshield.monitoring import FlightLog, PromiseMonitor, ShieldLog
    from safeshield.online import SafeSupportQLearning, SSQLConfig
    from safeshield.policies import SafeSupportPolicy, ShieldedPolicy
    from safeshield.rollouts.policies import HandOver
    from safeshield.shield.adaptive import AdaptiveThreshold
    from safeshield.shield.backup import register_backup
    from safeshield.shield.log_record import LogRecord
    from safeshield.shield.record import CalibrationRecord
    from safeshield.shield.report import FilterReport
    from safeshield.shield.shield import Shield, UncalibratedShieldWarning
    from safeshield.shield.tensors import TorchShield
    from safeshield.training.callbacks import TrainingCallback
    from safeshield.training.many import fit_many
    from safeshield.values.constraint import register_constraint
    from safeshield.wrappers import SafetyShield

# Each name is imported on first use. Gymnasium 0.29 loads this package at every
# `import gymnasium` to register its environments, and that import must not load PyTorch.
_HOMES = {
    "AdaptiveThreshold": "safeshield.shield.adaptive",
    "CalibrationError": "safeshield.calibration.walk",
    "CalibrationRecord": "safeshield.shield.record",
    "Evaluate": "safeshield.evaluation.curves",
    "FilterReport": "safeshield.shield.report",
    "FlightLog": "safeshield.monitoring",
    "HandOver": "safeshield.rollouts.policies",
    "LogRecord": "safeshield.shield.log_record",
    "OfflineDataset": "safeshield.data.dataset",
    "PromiseMonitor": "safeshield.monitoring",
    "SSQLConfig": "safeshield.online",
    "SafeFQL": "safeshield.algorithms.safefql",
    "SafeFQLConfig": "safeshield.algorithms.safefql",
    "SafeSupportPolicy": "safeshield.policies",
    "SafeSupportQLearning": "safeshield.online",
    "SafetyShield": "safeshield.wrappers",
    "ShieldConfig": "safeshield.algorithms.shield_trainer",
    "ShieldTrainer": "safeshield.algorithms.shield_trainer",
    "ShieldedPolicy": "safeshield.policies",
    "Shield": "safeshield.shield.shield",
    "ShieldLog": "safeshield.monitoring",
    "TorchShield": "safeshield.shield.tensors",
    "TrainingCallback": "safeshield.training.callbacks",
    "UncalibratedShieldWarning": "safeshield.shield.shield",
    "collect": "safeshield.data.collect",
    "fit_many": "safeshield.training.many",
    "load_agent": "safeshield.algorithms.registry",
    "register_backup": "safeshield.shield.backup",
    "register_constraint": "safeshield.values.constraint",
}

__all__ = [
    "AdaptiveThreshold",
    "CalibrationError",
    "CalibrationRecord",
    "Evaluate",
    "FilterReport",
    "FlightLog",
    "HandOver",
    "LogRecord",
    "OfflineDataset",
    "PromiseMonitor",
    "SSQLConfig",
    "SafeFQL",
    "SafeFQLConfig",
    "SafeSupportPolicy",
    "SafeSupportQLearning",
    "SafetyShield",
    "Shield",
    "ShieldConfig",
    "ShieldLog",
    "ShieldTrainer",
    "ShieldedPolicy",
    "TorchShield",
    "TrainingCallback",
    "UncalibratedShieldWarning",
    "collect",
    "fit_many",
    "load_agent",
    "register_backup",
    "register_constraint",
]
__version__ = "0.1.0"

install()
register_envs()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeshield' has no attribute '{name}'")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise explained(error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
