"""What every agent that is learned from a log has in common: fit, predict, save, load.

An algorithm adds what it learns: an `Architecture` (which networks, in which units), a `Run` (which
updates, in which order) and how its networks act.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.data.dataset import OfflineDataset
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.mlp import Networks
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.training.log import LogTensors, run_identity
from safeshield.training.loop import device_of, fit_options, run_phases
from safeshield.training.state import Phase, TrainState

_VERSION = 1
Weights = dict[str, dict[str, npt.NDArray[np.float32]]]


class Network(Protocol):
    """The description of one network."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight, by name."""


class Architecture(Protocol):
    """What a log and a configuration fix besides the weights: spaces, widths, units."""

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation."""

    @property
    def action_space(self) -> gym.spaces.Box:
        """Space of one action."""

    @property
    def scaling(self) -> Scaling:
        """Units of observations and actions."""

    def parts(self) -> Mapping[str, Network]:
        """Describe every network."""

    def header(self) -> dict[str, Any]:
        """Return what a file must hold beside spaces and scaling, as JSON."""


class Run(Protocol):
    """One call of fit: updates closed over a log."""

    def initial(self, generator: torch.Generator) -> TrainState:
        """Draw all weights."""

    def phases(self) -> list[Phase]:
        """List what to do, in order."""


class Config(Protocol):
    """A frozen dataclass of settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of weights, batches and noise."""


ConfigT = TypeVar("ConfigT", bound=Config)
ModelT = TypeVar("ModelT", bound=Architecture)


def continuous_actions(space: gym.Space[Any], who: str) -> gym.spaces.Box:
    """Return the space as the Box that an actor needs.

    Raises:
        TypeError: it is another space.
    """
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(
            f"{who}'s actor needs a Box of actions, got {space!r}; ShieldTrainer makes a shield "
            "for discrete ones"
        )
    if not np.issubdtype(space.dtype, np.floating):
        raise TypeError(
            f"{who}'s actor needs a Box of floating-point actions, got {space!r}; round what it "
            "does in a wrapper of the environment"
        )
    return space


class OfflineAgent(ABC, Generic[ConfigT, ModelT]):
    """An agent learned from one log, with Stable-Baselines3's `predict`.

    Args:
        config: settings.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.
    """

    config: ConfigT
    config_type: ClassVar[type[Any]]
    file_format: ClassVar[str]
    """Name of its files' format."""
    _before: ClassVar[dict[str, Any]] = {}
    """Settings that older files do not hold, with the values that those agents were trained by."""
    _dropped: ClassVar[tuple[str, ...]] = ()
    """Settings of older files that meant nothing."""
    _fewest_steps: ClassVar[int] = 1
    """One update for each phase."""

    def __init__(
        self, config: ConfigT | None = None, *, device: str | torch.device = "auto"
    ) -> None:
        self.config = self.config_type() if config is None else config
        if not isinstance(self.config, self.config_type):
            raise TypeError(
                f"config must be a {self.config_type.__name__}, got {type(config).__name__}"
            )
        self.device = device_of(device)
        self._model: ModelT | None = None
        self._networks: Networks = {}
        self._arrays: Weights = {}
        self._noise = np.random.default_rng(self.config.seed)

    # -- what an algorithm adds ---------------------------------------------------------------

    @abstractmethod
    def _describe(self, dataset: OfflineDataset) -> ModelT:
        """Return the networks' architecture, in the units of a log."""

    @abstractmethod
    def _restore(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        scaling: Scaling,
        header: dict[str, Any],
    ) -> ModelT:
        """Return the architecture that a file's header describes."""

    @abstractmethod
    def _run(self, model: ModelT, log: LogTensors, steps: int) -> Run:
        """Return the updates of one call of fit."""

    @abstractmethod
    def _act(
        self, model: ModelT, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        """Return actions (n, act) in [-1, 1] for observations (n, features), normalised."""

    def _candidate_noise(
        self, rows: int, each: int, width: int, deterministic: bool
    ) -> npt.NDArray[np.float64]:
        """Draw noise (rows * each, width); deterministic: the same `each` draws for every row."""
        if deterministic:
            drawn = np.random.default_rng(self.config.seed).standard_normal((each, width))
            return np.tile(drawn, (rows, 1))
        return self._noise.standard_normal((rows * each, width))

    def _noise_features(self, model: ModelT) -> int:
        """Return the width of the noise that an update draws for each transition."""
        return model.scaling.action_features

    def _settle(self, model: ModelT, log: LogTensors) -> ModelT:
        """Return the architecture with what only the trained networks tell; they are adopted."""
        return model

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        """Return the log to learn from, or refuse it."""
        return dataset

    def diagnostics(self) -> dict[str, Any]:
        """Return what is known of a trained agent beside its settings, as JSON values."""
        return {}

    # -- training -----------------------------------------------------------------------------

    def fit(
        self,
        dataset: OfflineDataset,
        steps: int = 100_000,
        *,
        progress_bar: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 2000,
        stop_after: int | None = None,
    ) -> Self:
        """Train on a log; returns self.

        Args:
            dataset: whole episodes with labels.
            steps: updates in all, shared among the phases.
            progress_bar: show one.
            log_dir: folder for TensorBoard files.
            checkpoint: file from which to go on where it exists, and which is kept up to date. A
                resumed run ends with the same weights as one that was never interrupted.
            checkpoint_every: updates between two checkpoints; there is one at the end of each phase
                and once a minute, too.
            stop_after: updates after which to stop early, for runs in instalments; needs
                `checkpoint`.

        Raises:
            TypeError: a number is no whole one; or actions are discrete: the actors are
                continuous; `ShieldTrainer` takes them.
            ValueError: the log does not hold what the algorithm learns from (a boundary between
                safe and unsafe, say), its action box is unbounded, or the checkpoint belongs to
                another run.
            FloatingPointError: a loss or a weight became NaN; the message names the phase.
        """
        options = fit_options(
            steps,
            self._fewest_steps,
            progress_bar=progress_bar,
            log_dir=log_dir,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            stop_after=stop_after,
        )
        steps, dataset = options.steps, self._check_log(dataset)
        model = self._describe(dataset)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        log = LogTensors.of(dataset, model.scaling, self.device)
        run = self._run(model, log, steps)
        state, _ = run_phases(
            run.phases(),
            run.initial(generator),
            generator,
            transitions=len(log),
            noise_features=self._noise_features(model),
            options=options,
            identity=run_identity(type(self).__name__, self.config, dataset, steps),
        )
        # What is deployed is what the advantages were fitted to: the critics' slow copies.
        self._adopt(model, {**state.networks, **state.targets})
        self._model = self._settle(model, log)
        return self

    def _adopt(self, model: ModelT, networks: Networks) -> None:
        self._model = model
        self._networks = networks
        self._arrays = {
            name: {key: np.asarray(tensor.detach().cpu().numpy()) for key, tensor in params.items()}
            for name, params in networks.items()
        }

    def _fitted(self) -> ModelT:
        if self._model is None:
            raise RuntimeError(
                f"this agent has not been trained: call fit() or {type(self).__name__}.load()"
            )
        return self._model

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation of the log it learned from."""
        return self._fitted().observation_space

    @property
    def action_space(self) -> gym.spaces.Box:
        """Space of one action."""
        return self._fitted().action_space

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.float32], tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the state, which is passed through: Stable-Baselines3's signature.

        Args:
            observation: one, or a batch of them.
            state: unused; the actor has no memory.
            episode_start: unused.
            deterministic: leave out the noise that actions are drawn with, where there is any.

        Raises:
            ValueError: a shape that is not the observation space's, or NaN.
        """
        model = self._fitted()
        rows, single = self._rows(model, observation, "observation")
        scaled = self._act(model, model.scaling.observations(rows), deterministic)
        actions = flat_actions(model.action_space).unflatten(model.scaling.to_box(scaled))
        return (actions[0] if single else actions), state

    def _rows(
        self, model: ModelT, observation: Batch, name: str
    ) -> tuple[npt.NDArray[np.float32], bool]:
        """Return observations as rows (n, features), and whether it was a single one."""
        rows, single = flat_observations(model.observation_space).flatten(observation, name)
        with np.errstate(over="ignore"):
            small = rows.astype(np.float32)
        bad = ~np.isfinite(small).all(axis=1)
        if bad.any():
            at = int(bad.argmax())
            which = "" if single else f" of observation {at}"
            raise ValueError(
                f"{name} must be finite as float32 (at most 3.4e38 in size), got {rows[at]}{which}"
            )
        return small, single

    # -- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to one safetensors file; nothing in it can run."""
        model = self._fitted()
        header = {
            "format": self.file_format,
            "version": _VERSION,
            "config": dataclasses.asdict(self.config),
            "observation_space": space_to_json(model.observation_space),
            "action_space": space_to_json(model.action_space),
            "scaling": model.scaling.to_json(),
            **model.header(),
        }
        flat = {f"{n}/{k}": a for n, params in self._arrays.items() for k, a in params.items()}
        write_tensors(path, flat, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "auto") -> Self:
        """Read an agent from a file that `save` wrote.

        Raises:
            ValueError: the file is damaged or of another kind.
        """
        file = read_tensors(path, cls.file_format)
        try:
            header = file.header
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']!r:.20}, known is {_VERSION}")
            known = {k: v for k, v in header["config"].items() if k not in cls._dropped}
            agent = cls(cls.config_type(**{**cls._before, **known}), device=device)
            observation = flat_observations(space_from_json(header["observation_space"]))
            action = flat_actions(space_from_json(header["action_space"]))
            scaling = Scaling.from_json(header["scaling"], observation, action)
            model = agent._restore(observation.space, action.space, scaling, header)
        except KeyError as error:
            raise ValueError(
                f"{path}: the header does not describe an agent: it lacks {error}"
            ) from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the header does not describe an agent: {error}") from error
        shapes = {
            f"{name}/{key}": shape
            for name, part in model.parts().items()
            for key, shape in part.shapes.items()
        }
        networks: Networks = {}
        for name, array in file.load(shapes).items():
            network, key = name.split("/")
            networks.setdefault(network, {})[key] = torch.tensor(array, device=agent.device)
        agent._adopt(model, networks)
        return agent
