"""One learner: Stable-Baselines3's PPO under a cost limit, in segments that can be repeated.

A run is divided into segments of a fixed number of updates. At the start of a segment every
environment is reset, all random generators are seeded from (seed, learner, segment), and weights,
moments, statistics and price are loaded from the file that the segment before wrote. At its end
the running episodes are completed without learning. A segment therefore depends only on the file
before it, and an interrupted run that is resumed gives the same result, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from safeshield.collection.multiplier import Multiplier
from safeshield.collection.recorder import EpisodeRecorder, PricedReward
from safeshield.collection.state import (
    STATE,
    Progress,
    read_progress,
    restore,
    segment_file,
    write_state,
)
from safeshield.data.collect import log_of
from safeshield.files.settings import Count, Settings
from safeshield.rollouts.recorded import Episode
from safeshield.spaces.rows import flat_actions, flat_observations

_STEP_LIMIT = 100_000


@dataclass(frozen=True)
class LearnerConfig(Settings):
    """The settings of a learner: those of PPO, of its multiplier and of its segments.

    Raises:
        KindError: A value has the wrong type. A KindError is a TypeError and a ValueError.
        ValueError: A number is out of range, or the batch size does not divide a rollout.
    """

    num_envs: Count = 4
    """Number of environments that step together. It must be 1 where a process can hold only one
    (see `config_for`)."""
    rollout_steps: Count = 512
    """Number of steps of each environment between two updates."""
    batch_size: Count = 256
    """Number of transitions in a gradient step."""
    epochs: Count = 10
    """Number of passes over a rollout in an update."""
    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    discount: float = 0.99
    """Discount of the rewards."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: float = 0.2
    """PPO's clip range of the probability ratio."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, for the actor and the critic each."""
    normalise: bool = True
    """Whether observations and rewards are normalised for the learner by running statistics. The
    log always holds raw values."""
    multiplier_start: float = 1.0
    """First price of a unit of cost, in units of reward."""
    multiplier_rate: float = 0.25
    """Greatest change of the price's logarithm after a rollout."""
    segment_steps: Count = 50_000
    """Number of steps, of all environments together, between two files from which a run can
    resume."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout % self.batch_size:
            raise ValueError(
                f"batch_size must divide num_envs * rollout_steps = {self.rollout}, got "
                f"{self.batch_size}"
            )
        if not (self.learning_rate > 0.0 and 0.0 < self.discount <= 1.0):
            raise ValueError(
                "learning_rate must be above 0 and discount in (0, 1], got "
                f"{self.learning_rate} and {self.discount}"
            )

    @property
    def rollout(self) -> int:
        """Number of steps of all environments together between two updates."""
        return self.num_envs * self.rollout_steps

    @property
    def segment(self) -> int:
        """Number of updates in a segment."""
        return max(1, round(self.segment_steps / self.rollout))

    def updates(self, steps: int) -> int:
        """Return the number of updates that take at least `steps` steps."""
        return math.ceil(steps / self.rollout)


@dataclass(frozen=True)
class Learner:
    """One PPO agent that learns under a cost limit while its episodes are logged.

    Its folder holds its state and its episodes, one file for each segment of updates.
    """

    venv: VecEnv
    """Vector environment without wrappers, which nothing else may step meanwhile."""
    folder: Path
    """Folder of this learner, with its state and the episodes of its segments."""
    limit: float | None
    """Limit on the mean cost of an episode; None where the learner maximises only the reward."""
    seed: tuple[int, int]
    """Seed of the run, and number of the learner."""
    config: LearnerConfig
    """Settings. They must be the same as when the learner began."""
    report: Callable[[int, Progress], None]
    """Function that is called after each rollout with its number of steps, and after each segment
    with 0 steps."""

    def learn(self, updates: int) -> Progress:
        """Continue until `updates` updates are done in total, and return the learner's progress.

        Raises:
            ValueError: The environment does not report its costs, an episode does not end, or a
                file is damaged.
        """
        progress = read_progress(self.folder)
        with one_thread():
            while progress.updates < updates:
                count = min(self.config.segment, updates - progress.updates)
                progress = self._segment(progress, count)
                self.report(0, progress)
        return progress

    def _segment(self, progress: Progress, updates: int) -> Progress:
        config = self.config
        observation_codec = flat_observations(self.venv.observation_space)
        action_codec = flat_actions(self.venv.action_space)
        recorder = EpisodeRecorder(self.venv, observation_codec, action_codec)
        price = None
        if self.limit is not None:
            value = config.multiplier_start if progress.price is None else progress.price
            price = Multiplier(self.limit, value, config.multiplier_rate)
        priced = PricedReward(recorder, 0.0 if price is None else price.value)
        stack = _normalised(priced, config)
        numbers = np.random.SeedSequence([*self.seed, progress.segments]).generate_state(1)
        # The seed is halved because the environments are seeded with it and the numbers after it.
        model = _ppo(stack, config, seed=int(numbers[0]) // 2)
        if progress.segments:
            restore(self.folder / STATE, model, stack)
        watch = _Watch(recorder, priced, price, config.rollout, progress, self.report)
        model.learn(updates * config.rollout, callback=watch)
        _finish_episodes(model, stack, recorder)
        episodes = [*watch.episodes, *recorder.take()]
        log = log_of(episodes, observation_codec.space, action_codec.space)
        log.save(segment_file(self.folder, progress.segments))
        after = Progress(
            updates=progress.updates + updates,
            segments=progress.segments + 1,
            price=None if watch.price is None else watch.price.value,
            returns=np.concatenate([progress.returns, log.returns.astype(np.float32)]),
            costs=np.concatenate([progress.costs, log.episode_costs.astype(np.float32)]),
        )
        # The state is written last. An interruption before this line repeats the whole segment.
        write_state(self.folder / STATE, model, stack, after)
        return after


def _ppo(stack: VecNormalize, config: LearnerConfig, seed: int) -> PPO:
    nested = isinstance(stack.observation_space, gym.spaces.Dict)
    return PPO(
        "MultiInputPolicy" if nested else "MlpPolicy",
        stack,
        learning_rate=config.learning_rate,
        n_steps=config.rollout_steps,
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        gamma=config.discount,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.entropy_weight,
        policy_kwargs={"net_arch": list(config.hidden)},
        seed=seed,
        device="cpu",
    )


def _normalised(priced: PricedReward, config: LearnerConfig) -> VecNormalize:
    space = priced.observation_space
    parts = list(space.spaces.values()) if isinstance(space, gym.spaces.Dict) else [space]
    plain = all(
        isinstance(part, gym.spaces.Box) and np.issubdtype(part.dtype, np.floating)
        for part in parts
    )
    return VecNormalize(
        priced,
        norm_obs=config.normalise and plain,
        norm_reward=config.normalise,
        gamma=config.discount,
    )


class _Watch(BaseCallback):
    """Callback that updates the price after each rollout and collects the finished episodes."""

    def __init__(
        self,
        recorder: EpisodeRecorder,
        priced: PricedReward,
        price: Multiplier | None,
        steps: int,
        before: Progress,
        report: Callable[[int, Progress], None],
    ) -> None:
        super().__init__()
        self.price = price
        self.episodes: list[Episode] = []
        self._recorder, self._priced = recorder, priced
        self._steps, self._before, self._report = steps, before, report

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        ended = self._recorder.take()
        self.episodes += ended
        if self.price is not None and ended:
            self.price = self.price.updated(
                float(np.mean([one.cost_or_violations for one in ended]))
            )
            self._priced.price = self.price.value
        price = None if self.price is None else self.price.value
        returns = np.array([one.total_return for one in self.episodes], np.float32)
        costs = np.array([one.cost_or_violations for one in self.episodes], np.float32)
        self._report(
            self._steps,
            dataclasses.replace(
                self._before,
                price=price,
                returns=np.concatenate([self._before.returns, returns]),
                costs=np.concatenate([self._before.costs, costs]),
            ),
        )


def _finish_episodes(model: PPO, stack: VecNormalize, recorder: EpisodeRecorder) -> None:
    """Complete the running episodes with the current policy, without learning."""
    running = recorder.lengths > 0
    for _ in range(_STEP_LIMIT):
        if not running.any():
            return
        actions, _ = model.predict(stack.normalize_obs(recorder.current), deterministic=False)
        recorder.step_async(actions)
        _, _, dones, _ = recorder.step_wait()
        running &= ~dones
    raise ValueError(
        f"an episode has not ended after {_STEP_LIMIT} steps; wrap the environment in "
        "gymnasium.wrappers.TimeLimit"
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Make torch use one thread in this context.

    Small networks are not faster with more, and one thread keeps the order of sums, so that results
    can be reproduced bit for bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
