"""What a user of the package writes. `test_packaging.py` has pyright check it from outside."""

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield import (
    CalibrationRecord,
    FilterReport,
    OfflineDataset,
    PromiseMonitor,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldedPolicy,
    ShieldLog,
    ShieldTrainer,
    collect,
    register_constraint,
)
from safeshield.evaluation import Evaluation, evaluate, format_table
from safeshield.wrappers import (
    ConstraintFromFunction,
    VecSafetyShield,
    VectorSafetyShield,
    worker_env,
)


@register_constraint("user-speed@1")
def speed(observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.abs(observations[:, 2]) - np.float32(6.0)


def brake(observation: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return -observation[2:]


env: gym.Env[Any, Any] = ConstraintFromFunction(gym.make("Pendulum-v1"), "user-speed@1")
log: OfflineDataset = collect(env, "random", episodes=5, seed=0)
trainer = ShieldTrainer(ShieldConfig(seed=0), device="cpu").fit(log, steps=10)
shield: Shield = trainer.calibrate(env, policy="random", epsilon=0.5, confidence=0.9)
record: CalibrationRecord | None = shield.record
if record is not None:
    print(record.promise.upper())
observation, _ = env.reset(seed=0)
executed, report = shield.filter(observation, np.zeros(1, np.float32))
told: FilterReport = report
monitor, recorder = PromiseMonitor(shield), ShieldLog("flight")
guarded = SafetyShield(env, "shield.safetensors", monitor=monitor, log=recorder)
policy = ShieldedPolicy(brake, shield)
result: Evaluation = evaluate(env, "random", 4, seed=0, shield=shield)
print(format_table([result]), told.acceptable, executed.shape, guarded.action_space, policy)
print(VecSafetyShield, VectorSafetyShield, worker_env)

# Each line below is a mistake that the type checker must find.
Shield.load(5)
ShieldTrainer().fit(log, steps="many")
print(shield.no_such_name)
