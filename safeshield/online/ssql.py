r"""Safe-Support Q-learning, which learns online inside the support of a behaviour.

A behaviour mu that is supported on a safe set collects all data. The algorithm has two stages:

1. Critics are trained on a Bellman target that is regularised by the KL to mu,

       y = r + g (1 - terminated) a log E_{x ~ mu(.|s')} [ exp(Q'(s', x) / a) ]

2. The induced policy is pi*(x|s) = mu(x|s) exp(Q(s, x) / a) / Z(s). A network is fitted to it.

Source: arXiv 2604.25379, of which only the abstract is known. The mathematics is standard
KL-regularised control, derived in `values.soft`. The design decisions are this implementation's.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import gymnasium as gym
import numpy.typing as npt
import torch
from stable_baselines3.common.vec_env import VecEnv

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.optim import adam_init
from safeshield.online.acting import SoftAgent
from safeshield.online.collector import (
    Collector,
    Tally,
    UnguardedWarning,
    as_venv,
    check_environment,
    check_playable,
)
from safeshield.online.config import SSQLConfig
from safeshield.online.experience import clone_of_log, replay_of_log
from safeshield.online.extraction import second_stage
from safeshield.online.losses import ACTOR, CLONE, CRITIC
from safeshield.online.refreshing import Refresher
from safeshield.online.replay import Replay
from safeshield.online.safe_proposals import SafeBehaviour, as_behaviour
from safeshield.online.safe_sets import SafeRules, as_safe_set, check_spaces, spaces_of
from safeshield.online.updates import SSQLModel, SSQLUpdates, units_of_returns
from safeshield.proposals.sources import Behaviour
from safeshield.shield.nested import shielding_layer
from safeshield.shield.shield import HasShield, Shield
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.training.architecture import Interface
from safeshield.training.callbacks import TrainingCallback
from safeshield.training.log import returns_to_go
from safeshield.training.loop import FitOptions
from safeshield.training.registry import register
from safeshield.training.state import Metrics, Phase, TrainState

if TYPE_CHECKING:
    from safeshield.files.signing import PublicKey

Array = npt.NDArray[Any]
_CHECK_EVERY = 500
"""Updates between two checks that the metrics and the weights are finite."""


@register("ssql", offline=False)
class SafeSupportQLearning(SoftAgent):
    """Learn a better policy inside the support of a behaviour that stays in a safe set.

    While the agent learns, every executed action is one of the behaviour's own actions that the
    safe set admits. Where there is none, the safe set's replacement is executed. Where a shield
    accepts no action, this is the action of lowest Q_h. `tally` counts the refused proposals.
    Learning promises no more than the shield's record, or the author of the rules, promises.

    Args:
        env: A Gymnasium environment, with or without a shield, or a `VecEnv` of Stable-Baselines3;
            None to use `fit` only.
        behaviour: mu, which has no memory: a `Behaviour` (`Tabular`, `MaskedUniform`,
            `FlowTeacher`, `ClonedBehaviour`), `SafeRules` (uniform inside them), a
            `SafeSupportPolicy`, or any policy that `as_batch_policy` takes, with or without a
            method ``log_prob``. None, for `fit` only: a clone of the log.
        config: Settings; see `SSQLConfig`.
        safe: The actions that may be executed: a `Shield`, a path to its file, an agent that has
            one, or `SafeRules`. The default is the shield around the environment, or else the one
            inside the behaviour. Without any, every proposal of the behaviour is executed, and an
            `UnguardedWarning` is issued.
        calibration_env: Environment in which refreshed collectors are tested where
            `recalibration_episodes` is set: a simulator or a testbed, whose episodes may violate.
        tensorboard_log: Folder for TensorBoard.
        verbose: 1 prints a table of the log.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    Raises:
        TypeError: There is no behaviour, `env` is not an environment, or a space is not supported.
        ValueError: The shield's spaces are not the environment's, or a setting does not fit.

    >>> import gymnasium as gym
    >>> from safeshield.online import SafeRules
    >>> lake = gym.make("FrozenLake-v1", is_slippery=False, max_episode_steps=30)
    >>> def safe(cell, move):  # the holes of the 4 x 4 map; moves: left, down, right, up
    ...     row, column = divmod(cell, 4)
    ...     row = min(max(row + (0, 1, 0, -1)[move], 0), 3)
    ...     column = min(max(column + (-1, 0, 1, 0)[move], 0), 3)
    ...     return 4 * row + column not in (5, 7, 11, 12)
    >>> config = SSQLConfig(temperature=0.01, learning_rate=0.03, learning_starts=500)
    >>> agent = SafeSupportQLearning(lake, SafeRules(safe, lake.action_space), config)
    >>> agent.learn(1000).tally.proposed_outside
    0
    >>> int(agent.predict(14, deterministic=True)[0])  # beside the goal: right
    2
    """

    config_type = SSQLConfig
    file_format = "safeshield-ssql"

    def __init__(
        self,
        env: gym.Env[Any, Any] | VecEnv | None = None,
        behaviour: object = None,
        config: SSQLConfig | None = None,
        *,
        safe: SafeRules | Shield | HasShield | str | os.PathLike[str] | None = None,
        calibration_env: gym.Env[Any, Any] | None = None,
        tensorboard_log: str | os.PathLike[str] | None = None,
        verbose: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        super().__init__(config, as_venv(env), tensorboard_log, verbose, device)
        layer = None if env is None else shielding_layer(env)
        if safe is None and layer is not None:
            safe = cast(Shield, vars(layer)["shield"])
        self._given = behaviour
        self.safe_set = as_safe_set(safe, behaviour)
        if self._venv is not None:
            self._behaviour = self._behaviour_of(self._venv)
        self._refresher = Refresher(self.config, self.safe_set, calibration_env, self._venv)
        self._generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self._told_unsaved = False
        self._turns, self._refreshed = 0, cast("int | None", None)
        self._replay: Replay | None = None

    # -- parts of the agent -----------------------------------------------------------------------

    def _behaviour_of(self, venv: VecEnv) -> Behaviour:
        """Check the environments and the given behaviour, and return it as a `Behaviour`."""
        if self._given is None:
            raise TypeError(
                "behaviour must be given where there is an environment: a SafeSupportPolicy, "
                "SafeRules, a Behaviour or any other policy"
            )
        check_environment(venv, self.safe_set)
        behaviour = as_behaviour(self._given, venv.action_space)
        check_spaces(behaviour, "the behaviour's", spaces_of(venv))
        if self.safe_set is None:
            warnings.warn(
                "no safe set is known: whatever the behaviour proposes is executed. Pass safe=, a "
                "shield or SafeRules, or put a SafetyShield around the environment; where the "
                "behaviour itself never leaves the safe set, this may be ignored",
                UnguardedWarning,
                stacklevel=3,
            )
        return behaviour

    @property
    def tally(self) -> Tally:
        """A copy of the counts of proposals, executed actions and violations since the start."""
        return Tally() if self._collector is None else dataclasses.replace(self._collector.tally)

    @property
    def recalibration_spent(self) -> int:
        """Number of episodes that the tests of refreshed collectors have used of their budget."""
        return self._refresher.spent

    # -- online -----------------------------------------------------------------------------------

    def _collecting(self, total: int) -> Collector:
        venv, behaviour = self._venv, self._behaviour
        if venv is None or behaviour is None:
            raise ValueError("learn() needs an environment: SafeSupportQLearning(env, behaviour)")
        if self._model is None and total <= self.config.learning_starts:
            raise ValueError(
                f"total_timesteps must be above learning_starts ({self.config.learning_starts}), "
                f"got {total}: nothing would be learned"
            )
        if self._collector is None:
            codec = flat_actions(venv.action_space)
            self._replay = Replay(self.config.buffer_size, codec)
            self._collector = Collector(
                venv,
                flat_observations(venv.observation_space),
                SafeBehaviour(behaviour, self.safe_set, codec),
                self._replay,
                self.config.samples,
                self.noise,
            )
            # Seeded only once, so that a second call continues with new episodes.
            venv.seed(self.config.seed)
        new = self._model is None
        self._collector.reset(record=new)
        if self.config.extraction_steps and new:
            self._collector.check_density()
        self._turns, self._refreshed = 0, None
        return self._collector

    def _improve(self, collector: Collector) -> Metrics | None:
        """Update the critics, and refresh the collector every `refresh_every` steps."""
        config, replay = self.config, collector.replay
        if not len(replay):
            return None
        if self._model is None:
            self._begin(collector)
        updates = SSQLUpdates(self._fitted(), replay, config)
        update = updates.critics(None)
        metrics: Metrics = {}
        for _ in range(config.gradient_steps):
            draw = updates.draw(self._generator)
            self._state, metrics = update(cast(TrainState, self._state), draw)
            self._turns += 1
            if self._turns % _CHECK_EVERY == 0:
                self._check_finite(metrics)
        last = self._started if self._refreshed is None else self._refreshed
        if config.refresh_every and self.num_timesteps - last >= config.refresh_every:
            self._refreshed = self.num_timesteps
            self._refresher.refresh(self._induced(), collector, self.num_timesteps)
            self.safe_set = collector.mu.safe_set
        return metrics

    def _begin(self, collector: Collector) -> None:
        """Compute the units from the steps collected so far, and draw the weights."""
        venv, rows = collector.venv, collector.replay.column("observations")
        seen, played = flat_observations(venv.observation_space), flat_actions(venv.action_space)
        scaling = Scaling.of_rows(rows, seen, played)
        units = units_of_returns(collector.returns_to_go(self.config.discount), self.config)
        self._model = SSQLModel.of(self.config, Interface(*spaces_of(venv), scaling), units)
        self._state = self._model.initial(self._generator)

    def _check_finite(self, metrics: Metrics) -> None:
        state = self._state
        bad = [name for name, value in metrics.items() if not torch.isfinite(value)]
        if state is not None:
            tensors = state.networks[CRITIC].values()
            bad += [] if all(tensor.isfinite().all() for tensor in tensors) else ["a weight"]
        if bad:
            raise FloatingPointError(
                f"learning diverged: {bad[0]} is NaN or infinite at step {self.num_timesteps}. "
                "Common causes: rewards of extreme size, a learning_rate that is too high, or a "
                "temperature far below the critics' errors"
            )

    # -- from a log -------------------------------------------------------------------------------

    def fit(
        self,
        dataset: OfflineDataset,
        behaviour: object = None,
        steps: int = 20_000,
        *,
        progress_bar: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 2000,
        callbacks: Sequence[TrainingCallback] = (),
    ) -> Self:
        """Learn from a log that a behaviour has collected; return self.

        Args:
            dataset: A log of whole episodes.
            behaviour: The policy that collected the log, as in the class. The default is the
                behaviour of the constructor, or else a clone of the log's own actions.
            steps: Updates of the critics; stage two adds `extraction_steps` updates.
            progress_bar: Whether to show a progress bar.
            log_dir: Folder for TensorBoard files.
            checkpoint: File that is updated during training. If it exists, training resumes from
                it.
            checkpoint_every: Updates between two checkpoints.
            callbacks: Objects whose methods are called during training, as in `OfflineAgent.fit`.
                Until stage two is complete, the agent of a callback acts by the induced policy.

        Raises:
            TypeError: `dataset` is not a log, a number is not an integer, or a callback is not a
                `TrainingCallback`.
            ValueError: The checkpoint is of another run, or the behaviour's actions do not fit.
            FloatingPointError: A loss or a weight became NaN; the message names the phase.
        """
        if not isinstance(dataset, OfflineDataset):
            raise TypeError(f"dataset must be an OfflineDataset, got {type(dataset).__name__}")
        options = FitOptions(
            steps, 1, progress_bar=progress_bar, log_dir=log_dir, checkpoint=checkpoint,
            checkpoint_every=checkpoint_every, callbacks=callbacks,
        )  # fmt: skip
        check_playable(dataset.action_space)
        ends = dataset.terminated | dataset.truncated
        returns = returns_to_go(dataset.rewards, ends, dataset.terminated, self.config.discount)
        scaling, units = Scaling.of(dataset), units_of_returns(returns, self.config)
        model = SSQLModel.of(self.config, Interface(*spaces_of(dataset), scaling), units)
        if behaviour is not None:
            self.safe_set = as_safe_set(None, behaviour) or self.safe_set
        given, clone = (self._given if behaviour is None else behaviour), None
        self._cloned = given is None
        if given is None:
            clone = clone_of_log(dataset, model, self.config, self.device)
            given = model.policy(clone)
        self._behaviour = as_behaviour(given, dataset.action_space)
        mu = self._safe_behaviour(model)
        replay = replay_of_log(dataset, mu, self.config.samples, self.noise)
        updates = SSQLUpdates(model, replay, self.config)
        critics = updates.critics(options.steps)

        def present(state: TrainState) -> SafeSupportQLearning:
            agent = self._changed()
            agent._model, agent._state, agent._extracted = model, state, False
            return agent

        phases = [
            # The replay holds arrays, which are not on the device.
            Phase("critics", options.steps, critics, self.config.batch_size, capturable=False),
            *second_stage(updates, mu, cloned=self._cloned),
        ]
        self._state = self._train(
            phases,
            lambda generator: model.initial(generator, clone),
            dataset,
            options,
            len(replay),
            model.noise_features,
            present,
        )
        self._model, self._replay = model, replay
        complete = self.updates == sum(phase.steps for phase in phases)
        self._extracted = complete and self.config.extraction_steps > 0
        return self

    # -- stage two --------------------------------------------------------------------------------

    def _extract(self) -> None:
        """Run stage two on the collected transitions."""
        if not self.config.extraction_steps or self._model is None:
            return
        model, state = self._model, cast(TrainState, self._state)
        # Each `learn` starts Adam anew, because the update counts of an earlier call would set the
        # learning rates to their lowest value.
        fresh = {name: adam_init({name: state.networks[name]}) for name in (ACTOR, CLONE)}
        state = state._replace(moments={**state.moments, **fresh})
        updates = SSQLUpdates(model, cast(Replay, self._replay), self.config)
        for phase in second_stage(updates, self._safe_behaviour(model), cloned=self._cloned):
            for local in range(phase.steps):
                if phase.refresh is not None and local % phase.refresh_every == 0:
                    state = phase.refresh(state, self._generator)
                draw = updates.draw(self._generator, model.noise_features)
                state, metrics = phase.update(state, draw)
            self._check_finite(metrics)
        self._state, self._extracted = state, True

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to the safetensors file `path`, which contains no executable code.

        The file holds neither the replay buffer nor the behaviour, unless `fit` has cloned the
        behaviour from a log. The induced policy, which is the behaviour with each action's
        probability multiplied by exp(Q / temperature) and normalised, needs the behaviour. Pass it
        to `load` to use that policy; without it the loaded agent acts by the network that stage two
        trained. In the warm-up of `learn`, where a callback may call `save`, no file is written,
        and a warning says so.

        Raises:
            RuntimeError: Nothing has been learned.
        """
        if self._warming():
            if not self._told_unsaved:
                warnings.warn(
                    f"nothing has been learned in {self.num_timesteps} steps of warm-up: "
                    f"{os.fspath(path)} is not written; no file is written before step "
                    f"{self.config.learning_starts}",
                    stacklevel=2,
                )
            self._told_unsaved = True
            return
        self._adopt(self._fitted(), self._weights())
        super().save(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        behaviour: object = None,
        *,
        safe: SafeRules | Shield | HasShield | str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        verify: PublicKey | None = None,
    ) -> Self:
        """Return the agent in a file that `save` wrote.

        Args:
            path: The file.
            behaviour: The behaviour with which the agent learned, for the induced policy. Without
                it the file's own clone of the log takes its place, where the agent learned from a
                log without a behaviour; otherwise the parametric policy acts.
            safe: The actions that may be executed, as in the class.
            device: Device, as in the class.
            verify: Public key with whose private key the file must be signed, as in
                `training.agent.Learner.load`. None does not ask.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or of another kind; the behaviour or the safe set is for
                other spaces.
        """
        read = cls._read(path, verify)
        agent = cls(None, behaviour, read.config, safe=safe, device=device)
        agent._take(read)
        model, networks = agent._fitted(), agent._networks
        if agent.safe_set is not None:
            agent.safe_set.check_fits(spaces_of(model))
        # Parts that the file does not hold are new, so that a loaded agent can continue learning.
        fresh = model.initial(torch.Generator(agent.device).manual_seed(read.config.seed))
        agent._state = fresh._replace(
            networks={**fresh.networks, **networks}, targets={CRITIC: networks[CRITIC]}
        )
        if behaviour is not None:
            agent._behaviour = as_behaviour(behaviour, model.action_space)
            check_spaces(agent._behaviour, "the behaviour's", spaces_of(model))
        elif agent._cloned:
            agent._behaviour = model.policy(networks[CLONE])
        if read.header["guarded"] and agent.safe_set is None:
            warnings.warn(
                "this agent learned inside a safe set, and none is given: its actions are not "
                "judged; pass safe=, or put a ShieldedPolicy around it",
                UnguardedWarning,
                stacklevel=2,
            )
        return agent
