"""Faults of sensors and actuators, as Gymnasium wrappers; `safeshield.rollouts.faults` has them."""

from safeshield.rollouts.faults import (
    ControlPeriod,
    DelayedActuator,
    DelayedSensor,
    DroppingSensor,
    LimitedActuator,
    NoisySensor,
    QuantisedSensor,
    StuckSensor,
)

__all__ = [
    "ControlPeriod",
    "DelayedActuator",
    "DelayedSensor",
    "DroppingSensor",
    "LimitedActuator",
    "NoisySensor",
    "QuantisedSensor",
    "StuckSensor",
]
