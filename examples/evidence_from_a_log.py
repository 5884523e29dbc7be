"""What a log alone shows of a shield, where there is no simulator to calibrate in.

    python examples/evidence_from_a_log.py          # about a minute

The log of a boat is split before training. Held-out episodes choose a threshold that warns of
violations in time. Fresh episodes of the agent without the shield bound the rate of both together,
and fresh episodes recorded with the shield on bound it tightly.
"""

from __future__ import annotations

import warnings

import gymnasium as gym
import torch

from safeshield import SafetyShield, Shield, ShieldConfig, ShieldTrainer, collect
from safeshield.calibration import episodes_plan
from safeshield.demo.helmsmen import Helmsmen


def main() -> None:
    """Train a shield, and ask three logs about it."""
    torch.set_num_threads(1)
    # A statement from a log does not calibrate the shield, which says so when it is used.
    warnings.simplefilter("ignore")
    plant = gym.make("safeshield/Boat-v0")
    for need in episodes_plan(epsilon=0.1, confidence=0.95)[:5]:
        print(f"{need.kind} needs at least {need.least} {need.counted}")

    log = collect(plant, Helmsmen(), episodes=400, seed=1)
    train, held_out = log.split(0.5, seed=0)
    config = ShieldConfig(critic_hidden=(48, 48), behaviour_hidden=(32, 32), batch_size=128)
    shield = ShieldTrainer(config, device="cpu").fit(train, steps=4000).shield()

    shield = shield.calibrate_from_log(held_out, "detection", lead=5)
    print(f"\n{shield.log_records[-1].statement}")

    # The agent acts, and the infos only say what the shield would have done.
    shadow = SafetyShield(plant, shield, mode="shadow")
    episodes = collect(shadow, Helmsmen(), episodes=100, seed=2)
    shield = shield.calibrate_from_log(episodes, "shadow", policy="the helmsmen")
    print(f"\n{shield.log_records[-1].statement}")

    trial = collect(SafetyShield(plant, shield), Helmsmen(), episodes=100, seed=3)
    shield = shield.calibrate_from_log(trial, "trial", policy="the helmsmen")
    print(f"\n{shield.log_records[-1].statement}")

    shield.save("boat.safetensors")
    kept = [record.method for record in Shield.load("boat.safetensors").log_records]
    print(f"\nthe file holds the records of {', '.join(kept)}")


if __name__ == "__main__":
    main()
