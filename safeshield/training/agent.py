"""What every learner has in common: fit or learn, predict, save, load.

`Learner` is what all of them share: settings, a device, spaces, weights, files. `OfflineAgent` adds
`fit`. An algorithm adds

- a frozen dataclass of settings (`config_type`) and the name of its files' format (`file_format`);
- its networks (`_parts`), which make an `Architecture`;
- a `Run` (`run_type`): which updates, in which order;
- how its networks act (`_act`).

A learner that collects its own experience derives from `Learner`: it implements `_restore` and
`predict`, calls `_adopt` when it has learned something, and overrides `_kept` where its file holds
fewer networks than its architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.data.dataset import OfflineDataset
from safeshield.files.tensors import TensorFile, read_tensors, write_tensors
from safeshield.nn.arrays import Deployed, deployed
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.training.architecture import Architecture, Interface
from safeshield.training.checkpoint import flatten, unflatten
from safeshield.training.log import LogTensors, run_identity
from safeshield.training.loop import FitOptions, device_of, run_phases
from safeshield.training.run import Config, Run
from safeshield.training.state import Phase, TrainState

_VERSION = 1
ConfigT = TypeVar("ConfigT", bound=Config)
ModelT = TypeVar("ModelT", bound=Architecture)


def check_continuous(space: gym.Space[Any], who: str) -> None:
    """Refuse what is not the Box that an actor needs.

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


class AgentFile(NamedTuple):
    """An agent's file whose common header has been read and checked."""

    path: str | os.PathLike[str]
    file: TensorFile
    config: Any
    """Of the learner's `config_type`."""
    interface: Interface

    @property
    def header(self) -> dict[str, Any]:
        """Everything that the file tells besides its weights."""
        return self.file.header


@contextlib.contextmanager
def _describing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong while a header is read into a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path}: the header does not describe an agent: it lacks {error}"
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the header does not describe an agent: {error}") from error


class Learner(ABC, Generic[ConfigT, ModelT]):
    """Settings, spaces, weights and files of anything that learns.

    Args:
        config: settings; None: the defaults.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    Raises:
        TypeError: the settings are another learner's.
    """

    config: ConfigT
    config_type: ClassVar[type[Any]]
    file_format: ClassVar[str]
    """Name of its files' format."""
    _before: ClassVar[dict[str, Any]] = {}
    """Settings that older files do not hold, with the values that those agents were trained by."""
    _dropped: ClassVar[tuple[str, ...]] = ()
    """Settings of older files that meant nothing."""

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
        self._arrays: dict[str, Deployed] = {}
        self._noise = np.random.default_rng(self.config.seed)

    # -- what an algorithm adds ---------------------------------------------------------------

    @abstractmethod
    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        """Return the architecture that a file's header describes.

        `Architecture.header` says what the header holds beside spaces, scaling and settings. A
        KeyError, TypeError or ValueError means that the file is damaged.
        """

    def _kept(self, model: ModelT) -> tuple[str, ...]:
        """Name the networks that the agent's file holds."""
        return tuple(model.parts())

    def _header(self, model: ModelT) -> dict[str, Any]:
        """Return what the agent's file holds beside spaces, scaling and settings, as JSON."""
        return model.header()

    def diagnostics(self) -> dict[str, Any]:
        """Return what is known of a trained agent beside its settings, as JSON values."""
        return {}

    @abstractmethod
    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the state: Stable-Baselines3's signature."""

    # -- what was learned ---------------------------------------------------------------------

    def _adopt(self, model: ModelT, networks: Networks) -> None:
        """Act by these weights from now on."""
        self._model = model
        self._networks = networks
        self._arrays = deployed(networks)

    def _fitted(self) -> ModelT:
        if self._model is None:
            raise RuntimeError(
                f"this agent has not been trained: call fit() or {type(self).__name__}.load()"
            )
        return self._model

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation of what it learned from."""
        return self._fitted().observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one action."""
        return self._fitted().action_space

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
            **self._header(model),
        }
        kept = {name: self._arrays[name] for name in self._kept(model)}
        write_tensors(path, flatten(kept), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "auto") -> Self:
        """Read an agent from a file that `save` wrote.

        Raises:
            ValueError: the file is damaged or of another kind.
        """
        read = cls._read(path)
        agent = cls(read.config, device=device)
        agent._take(read)
        return agent

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> AgentFile:
        """Read what every agent's file has, without its weights."""
        file = read_tensors(path, cls.file_format)
        with _describing(path):
            header = file.header
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']!r:.20}, known is {_VERSION}")
            known = {k: v for k, v in header["config"].items() if k not in cls._dropped}
            config = cls.config_type(**{**cls._before, **known})
            observation = flat_observations(space_from_json(header["observation_space"]))
            action = flat_actions(space_from_json(header["action_space"]))
            scaling = Scaling.from_json(header["scaling"], observation, action)
        interface = Interface(observation.space, action.space, scaling)
        return AgentFile(path, file, config, interface)

    def _take(self, read: AgentFile) -> None:
        """Adopt the architecture and the weights of a file."""
        with _describing(read.path):
            model = self._restore(read.interface, read.header)
        parts = model.parts()
        shapes = {name: parts[name].shapes for name in self._kept(model)}
        arrays = read.file.load(flatten(shapes))
        tensors = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        self._adopt(model, unflatten(shapes, tensors))

    # -- training -----------------------------------------------------------------------------

    def _train(
        self,
        phases: list[Phase],
        initial: Callable[[torch.Generator], TrainState],
        dataset: OfflineDataset,
        options: FitOptions,
        *,
        transitions: int,
        noise_features: int,
    ) -> TrainState:
        """Run all phases on a log, from its checkpoint where there is one.

        Args:
            phases: what to do, in order.
            initial: draws all weights.
            dataset: the log, by which a checkpoint knows its run.
            options: how the run is shown, logged and saved.
            transitions: rows that batches are drawn from.
            noise_features: width of the noise that an update draws for each transition.
        """
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        state, _ = run_phases(
            phases,
            initial(generator),
            generator,
            transitions=transitions,
            noise_features=noise_features,
            options=options,
            identity=run_identity(type(self).__name__, self.config, dataset, options.steps),
        )
        return state


class OfflineAgent(Learner[ConfigT, ModelT]):
    """An agent learned from one log, with Stable-Baselines3's `predict`.

    Args:
        config: settings; None: the defaults.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.
    """

    model_type: ClassVar[type[Any]] = Architecture
    """What describes it: an `Architecture`."""
    run_type: ClassVar[type[Any]]
    """What trains it: a `Run`."""
    _fewest_steps: ClassVar[int] = 1
    """One update for each phase."""

    # -- what an algorithm adds ---------------------------------------------------------------

    @abstractmethod
    def _act(
        self, model: ModelT, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.floating]:
        """Return actions (n, act) in [-1, 1] for observations (n, features), normalised."""

    def _action_rows(
        self, model: ModelT, observations: npt.NDArray[np.float32], deterministic: bool
    ) -> npt.NDArray[np.float32]:
        """Return what `_act` does as rows (n, act) of the action space."""
        return model.scaling.to_box(self._act(model, observations, deterministic))

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        """Describe the algorithm's own networks, for observations and actions of these widths."""
        raise NotImplementedError(f"{type(self).__name__} must describe its networks")

    def _describe(self, dataset: OfflineDataset) -> ModelT:
        """Return the networks' architecture, in the units of a log."""
        spaces = dataset.observation_space, dataset.action_space
        return self._restore(Interface(*spaces, Scaling.of(dataset)), {})

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        check_continuous(interface.action_space, type(self).__name__)
        model: ModelT = self.model_type(*interface, self._parts(interface.scaling))
        return model

    def _run(self, model: ModelT, log: LogTensors, steps: int) -> Run[ModelT, ConfigT]:
        """Return the updates of one call of fit."""
        run: Run[ModelT, ConfigT] = self.run_type(model, log, self.config, steps)
        return run

    def _noise_features(self, model: ModelT) -> int:
        """Return the width of the noise that an update draws for each transition."""
        return model.scaling.action_features

    def _settle(self, model: ModelT, log: LogTensors) -> ModelT:
        """Return the architecture with what only the trained networks tell; they are adopted."""
        return model

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        """Return the log to learn from, or refuse it."""
        return dataset

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
            TypeError: a number is no whole one; or actions are discrete and the algorithm's actor
                is continuous; `ShieldTrainer` takes them.
            ValueError: the log does not hold what the algorithm learns from (a boundary between
                safe and unsafe, say), its action box is unbounded, or the checkpoint belongs to
                another run.
            FloatingPointError: a loss or a weight became NaN; the message names the phase.
        """
        options = FitOptions(
            steps,
            self._fewest_steps,
            progress_bar=progress_bar,
            log_dir=log_dir,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            stop_after=stop_after,
        )
        dataset = self._check_log(dataset)
        model = self._describe(dataset)
        log = LogTensors.of(dataset, model.scaling, self.device)
        run = self._run(model, log, options.steps)
        state = self._train(
            run.phases(),
            run.initial,
            dataset,
            options,
            transitions=len(log),
            noise_features=self._noise_features(model),
        )
        # What is deployed is what the advantages were fitted to: the critics' slow copies.
        self._adopt(model, {**state.networks, **state.targets})
        self._model = self._settle(model, log)
        return self

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
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
        chosen = self._action_rows(model, model.scaling.observations(rows), deterministic)
        actions = flat_actions(model.action_space).unflatten(chosen)
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

    def _candidate_noise(
        self, rows: int, each: int, width: int, deterministic: bool
    ) -> npt.NDArray[np.float64]:
        """Draw noise (rows * each, width); deterministic: the same `each` draws for every row."""
        if deterministic:
            drawn = np.random.default_rng(self.config.seed).standard_normal((each, width))
            return np.tile(drawn, (rows, 1))
        return self._noise.standard_normal((rows * each, width))
