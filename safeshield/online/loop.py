"""Collect and learn in turn, with the callbacks, log and counters of Stable-Baselines3."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any, Self, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv
from tqdm.auto import tqdm

from safeshield.files.schema import whole
from safeshield.online.collector import Collector
from safeshield.online.config import SSQLConfig
from safeshield.online.updates import SSQLModel
from safeshield.training.agent import Learner
from safeshield.training.state import Metrics


class OnlineLearner(Learner[SSQLConfig, SSQLModel]):
    """A learner that collects its own experience, with the callbacks of Stable-Baselines3.

    A subclass defines how collecting begins (`_collecting`), what is learned between two rollouts
    (`_improve`) and what follows the last one (`_extract`).

    Args:
        config: Settings.
        venv: Environments in which it collects; None for a learner that does not collect.
        tensorboard_log: Folder for TensorBoard.
        verbose: 1 prints a table of the log.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.
    """

    def __init__(
        self,
        config: SSQLConfig | None,
        venv: VecEnv | None,
        tensorboard_log: str | os.PathLike[str] | None,
        verbose: int,
        device: str | torch.device,
    ) -> None:
        super().__init__(config, device=device)
        self.verbose = verbose
        self.tensorboard_log = None if tensorboard_log is None else os.fspath(tensorboard_log)
        self.num_timesteps = self._started = 0
        self._venv = venv
        self._in_loop = False
        self._logger: Logger | None = None

    # -- methods that a subclass defines ------------------------------------------------------

    @abstractmethod
    def _collecting(self, total: int) -> Collector:
        """Return the collector at the beginning of new episodes, for `total` steps.

        Raises:
            ValueError: There is no environment, or `total` is too small.
        """

    @abstractmethod
    def _improve(self, collector: Collector) -> Metrics | None:
        """Learn from the steps since the last call; return metrics, None where none is stored."""

    @abstractmethod
    def _extract(self) -> None:
        """Run the stage that follows the last rollout."""

    @abstractmethod
    def _check_finite(self, metrics: Metrics) -> None:
        """Raise FloatingPointError where a metric or a weight is not finite."""

    # -- attributes that callbacks use --------------------------------------------------------

    @property
    def logger(self) -> Logger:
        """The logger of the current call of `learn`, for callbacks."""
        if self._logger is None:
            raise RuntimeError("there is no logger before learn() is called")
        return self._logger

    def get_env(self) -> VecEnv | None:
        """Return the environments, for callbacks."""
        return self._venv

    def get_vec_normalize_env(self) -> None:
        """Return None, because the critics normalise observations; callbacks call this method."""

    # -- learning -----------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,  # noqa: ANN401 - as in Stable-Baselines3
        log_interval: int = 4,
        tb_log_name: str = "SSQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Collect and learn in turn, then extract the parametric policy; return self.

        Args:
            total_timesteps: Steps of all environments together, warm-up included.
            callback: A callback of Stable-Baselines3, a list of callbacks, or a function. A
                callback that returns False ends collecting; stage two follows if anything was
                learned.
            log_interval: Episodes between two lines of the log.
            tb_log_name: Name of the run in TensorBoard.
            reset_num_timesteps: False continues the step count of the last call. What was learned
                is kept either way.
            progress_bar: Whether to show a progress bar.

        Raises:
            TypeError: `total_timesteps` or `log_interval` is not an integer.
            ValueError: There is no environment; `total_timesteps` does not exceed
                `learning_starts`; a reward is not finite; or the behaviour returns actions outside
                the space.
            NoSafeActionError: Rules admit no action in a state that was reached.
            FloatingPointError: A loss or a weight became NaN.
        """
        total = whole("total_timesteps", total_timesteps, least=1)
        log_interval = whole("log_interval", log_interval, least=1)
        collector = self._collecting(total)
        if reset_num_timesteps:
            self.num_timesteps = 0
        self._started, end = self.num_timesteps, self.num_timesteps + total
        self._logger = configure_logger(
            self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps
        )
        callbacks = _as_callback(callback)
        callbacks.init_callback(cast(Any, self))
        # Callbacks read the arguments of `learn` from these locals.
        callbacks.on_training_start(
            {"self": self, "total_timesteps": end, "reset_num_timesteps": reset_num_timesteps}, {}
        )
        self._in_loop, self.updates, self.chosen = True, None, None
        try:
            with tqdm(total=end, initial=self.num_timesteps, disable=not progress_bar) as bar:
                self._loop(collector, callbacks, end, log_interval, bar)
        finally:
            self._in_loop = False
        self._extract()
        callbacks.on_training_end()
        self._logger.dump(self.num_timesteps)
        return self

    def _loop(
        self,
        collector: Collector,
        callbacks: BaseCallback,
        end: int,
        log_interval: int,
        bar: Any,  # noqa: ANN401
    ) -> None:
        logged = 0
        metrics: Metrics = {}
        while self.num_timesteps < end:
            callbacks.on_rollout_start()
            for _ in range(self.config.train_freq):
                rewards, dones, infos = collector.step()
                self.num_timesteps += collector.venv.num_envs
                bar.update(collector.venv.num_envs)
                callbacks.update_locals({"infos": infos, "dones": dones, "rewards": rewards})
                if not callbacks.on_step():
                    end = self.num_timesteps
                    break
            callbacks.on_rollout_end()
            if self.num_timesteps < self.config.learning_starts:
                continue
            learned = self._improve(collector)
            metrics = metrics if learned is None else learned
            if learned is not None and collector.tally.episodes - logged >= log_interval:
                logged = collector.tally.episodes
                self._record(metrics, collector)
        self._check_finite(metrics)

    def _record(self, metrics: Metrics, collector: Collector) -> None:
        tally, logger = collector.tally, self.logger
        if collector.returns:
            logger.record("rollout/ep_rew_mean", float(np.mean(collector.returns)))
        logger.record("time/total_timesteps", self.num_timesteps)
        for name, value in metrics.items():
            logger.record(f"train/{name}", float(value))
        for name in ("proposed_outside", "nothing_admitted", "unsafe_steps", "unsafe_episodes"):
            logger.record(f"safe/{name}", getattr(tally, name))
        logger.dump(self.num_timesteps)


def _as_callback(callback: Any) -> BaseCallback:  # noqa: ANN401
    """Return a callback of Stable-Baselines3 for a callback, a list, a function or None."""
    if isinstance(callback, BaseCallback):
        return callback
    if isinstance(callback, list):
        return CallbackList(callback)
    return CallbackList([]) if callback is None else ConvertCallback(callback)
