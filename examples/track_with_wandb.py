"""Follow a training in Weights & Biases, by a callback of `fit`.

    pip install safeshield wandb
    python examples/track_with_wandb.py            # a few seconds, offline: nothing is sent

The run is written to the folder `wandb`. `wandb sync wandb/offline-run-...` sends it; without
`mode="offline"` it is sent while the training goes on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import torch
import wandb

import safeshield
from safeshield import ShieldConfig, ShieldTrainer, TrainingCallback, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.training.callbacks import TrainingStep


class WandbCallback(TrainingCallback):
    """Sends the metrics of every `every`-th update to a run of Weights & Biases."""

    every = 50

    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401 - those of wandb.init
        self.arguments = arguments

    def on_start(self, step: TrainingStep) -> None:
        """Begin the run with the settings of the training."""
        config = {**dataclasses.asdict(step.agent.config), "updates": step.steps}
        self.run = wandb.init(config=config, **self.arguments)

    def on_step(self, step: TrainingStep) -> bool | None:
        """Send the metrics of this update, and go on."""
        self.run.log({"phase": step.phase, **step.metrics}, step=step.step)
        return None

    def on_end(self, step: TrainingStep) -> None:
        """Close the run."""
        self.run.finish()


def main() -> None:
    """Train a small shield, and follow its losses."""
    torch.set_num_threads(1)
    boat = gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
    log = collect(boat, Helmsmen(), episodes=60, seed=0)
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=0, critic_hidden=(32,), behaviour_hidden=(32,), fallback_hidden=(32,)
    )
    callback = WandbCallback(project="safeshield", name="boat", mode="offline")
    trainer = ShieldTrainer(config, device="cpu").fit(log, steps=400, callbacks=[callback])
    print(f"safeshield {safeshield.__version__}: {trainer.updates} updates, run {callback.run.id}")


if __name__ == "__main__":
    main()
