"""Follow a training in MLflow, by a callback of `fit`, and keep the shield beside its metrics.

    pip install safeshield mlflow
    python examples/track_with_mlflow.py           # under half a minute

The runs are written to the file `mlflow.db` and the folder `mlartifacts` here; `mlflow ui
--backend-store-uri sqlite:///mlflow.db` shows them. A server's address in place of the file sends
them there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium as gym
import mlflow
import torch

from safeshield import ShieldConfig, ShieldTrainer, TrainingCallback, collect
from safeshield.demo.helmsmen import Helmsmen
from safeshield.training.callbacks import TrainingStep


class MLflowCallback(TrainingCallback):
    """Sends the metrics of every `every`-th update to the active run of MLflow."""

    every = 50

    def on_start(self, step: TrainingStep) -> None:
        """Store the settings of the training."""
        mlflow.log_params({**dataclasses.asdict(step.agent.config), "updates": step.steps})

    def on_step(self, step: TrainingStep) -> bool | None:
        """Send the metrics of this update, and go on."""
        mlflow.log_metrics(dict(step.metrics), step=step.step)
        return None


def main() -> None:
    """Train a small shield, follow its losses, and store its file in the run."""
    torch.set_num_threads(1)
    boat = gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
    log = collect(boat, Helmsmen(), episodes=60, seed=0)
    # The networks and the training are small, so that the example is quick. For real use keep the
    # default networks and 20,000 updates.
    config = ShieldConfig(
        seed=0, critic_hidden=(32,), behaviour_hidden=(32,), fallback_hidden=(32,)
    )
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    if mlflow.get_experiment_by_name("safeshield") is None:
        mlflow.create_experiment("safeshield", Path("mlartifacts").resolve().as_uri())
    mlflow.set_experiment("safeshield")
    with mlflow.start_run(run_name="boat") as run:
        trainer = ShieldTrainer(config, device="cpu").fit(
            log, steps=400, callbacks=[MLflowCallback()]
        )
        shield = trainer.shield()
        shield.save("shield.safetensors")
        mlflow.log_artifact("shield.safetensors")
        mlflow.set_tag("shield/digest", shield.digest)
    stored = mlflow.get_run(run.info.run_id).data
    print(f"{trainer.updates} updates, {len(stored.metrics)} metrics, run {run.info.run_id}")


if __name__ == "__main__":
    main()
