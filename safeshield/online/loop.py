"""Collecting and learning in turn, with the callbacks, log and counters of Stable-Baselines3."""

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
    """A learner that collects its own experience; its callbacks are those of Stable-Baselines3.

    An algorithm adds how collecting begins (`_collecting`), what is learned between two rollouts
    (`_improve`) and what follows the last one (`_extract`).

    Args:
        config: settings.
        venv: where it collects; None: nowhere.
        tensorboard_log: folder for TensorBoard.
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

    # -- what an algorithm adds ---------------------------------------------------------------

    @abstractmethod
    def _collecting(self, total: int) -> Collector:
        """Return the collector at the beginning of new episodes, for `total` steps.

        Raises:
            ValueError: there is no environment, or too few steps.
        """

    @abstractmethod
    def _improve(self, collector: Collector) -> Metrics | None:
        """Learn from what was collected since the last call; None where there was nothing."""

    @abstractmethod
    def _extract(self) -> None:
        """Do what follows the last rollout."""

    @abstractmethod
    def _check_finite(self, metrics: Metrics) -> None:
        """Raise FloatingPointError where a metric or a weight is not finite."""

    # -- what callbacks ask for ---------------------------------------------------------------

    @property
    def logger(self) -> Logger:
        """The logger of the present `learn`, for callbacks."""
        if self._logger is None:
            raise RuntimeError("there is no logger before learn() is called")
        return self._logger

    def get_env(self) -> VecEnv | None:
        """Return the environments, for callbacks."""
        return self._venv

    def get_vec_normalize_env(self) -> None:
        """Return None: observations are normalised inside, for callbacks that ask."""

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
        """Collect and learn in turn, then extract the parametric policy; returns self.

        Args:
            total_timesteps: steps of all environments together, warm-up included.
            callback: a callback of Stable-Baselines3, a list of them, or a function; one that
                returns False ends collecting, and stage two follows if anything was learned.
            log_interval: episodes between two lines of the log.
            tb_log_name: of the run in TensorBoard.
            reset_num_timesteps: False goes on counting where the last call ended. What was learned
                is kept either way.
            progress_bar: show one.

        Raises:
            TypeError: a number is no whole one.
            ValueError: no environment; fewer steps than `learning_starts`; a reward that is not
                finite; a behaviour that returns no actions of the space.
            NoSafeActionError: rules admit nothing in a state that was reached.
            FloatingPointError: a loss or a weight became NaN.
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
        # A callback's `learn` of its own keeps in step with what it is told here.
        callbacks.on_training_start(
            {"self": self, "total_timesteps": end, "reset_num_timesteps": reset_num_timesteps}, {}
        )
        self._in_loop = True
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
    """Return what Stable-Baselines3 makes of a callback, a list, a function or None."""
    if isinstance(callback, BaseCallback):
        return callback
    if isinstance(callback, list):
        return CallbackList(callback)
    return CallbackList([]) if callback is None else ConvertCallback(callback)
