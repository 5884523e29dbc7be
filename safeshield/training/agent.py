"""Base classes of all learners: fit or learn, predict, save, load.

`Learner` has what all of them share: settings, a device, spaces, weights and files. `OfflineAgent`
adds `fit`. An algorithm derives from `OfflineAgent` and adds

- a frozen dataclass of settings (`config_type`) and the name of its file format (`file_format`);
- its networks (`_parts`), from which an `Architecture` is made;
- a `Run` (`run_type`) with its updates and their order;
- the use of its networks to choose actions (`_act`).

A learner that collects its own experience derives from `Learner`. It implements `_restore` and
`predict`, calls `_adopt` when it has learned new weights, and overrides `_kept` where its file
holds fewer networks than its architecture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.data.dataset import OfflineDataset
from safeshield.files.tensors import (
    TRAINING_EPISODES,
    TRAINING_HASHES,
    TensorFile,
    hash_shapes,
    read_tensors,
    write_tensors,
)
from safeshield.nn.arrays import Deployed, Float, deployed
from safeshield.nn.device import device_of
from safeshield.nn.graph import CannotExportError
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.shield.tensor_rows import TensorScaling
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.training.architecture import Architecture, Interface, interface_of
from safeshield.training.callbacks import TrainingCallback
from safeshield.training.checkpoint import copied, flatten, unflatten
from safeshield.training.log import LogTensors, run_identity
from safeshield.training.loop import FitOptions, run_phases
from safeshield.training.run import Config, Run
from safeshield.training.state import Phase, TrainState
from safeshield.values.constraint import stored_source

if TYPE_CHECKING:
    from safeshield.files.signing import PublicKey
    from safeshield.shield.export_policy import GraphConstraint, GraphNoise

_VERSION = 1
_MARKS = {"updates": int, "chosen": str, "added": str}
"""Entries of a file's header about the training, with their types. Older files lack them."""
ConfigT = TypeVar("ConfigT", bound=Config)
ModelT = TypeVar("ModelT", bound=Architecture)


def check_continuous(space: gym.Space[Any], who: str) -> None:
    """Check that an action space is a Box of floating-point numbers, as an actor requires.

    Args:
        space: The action space.
        who: Name of the algorithm in the message.

    Raises:
        TypeError: The space is of another kind.
    """
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(
            f"{who}'s actor needs a Box of actions, got {space!r}; ShieldTrainer makes a shield "
            "for discrete actions"
        )
    if not np.issubdtype(space.dtype, np.floating):
        raise TypeError(
            f"{who}'s actor needs a Box of floating-point actions, got {space!r}; round its "
            "actions in a wrapper of the environment"
        )


class AgentFile(NamedTuple):
    """File of an agent, whose common header has been read and checked."""

    path: str | os.PathLike[str]
    """Path of the file."""
    file: TensorFile
    """The file, whose tensors have not been read yet."""
    config: Any
    """Settings, of the learner's `config_type`."""
    interface: Interface
    """Spaces and scaling of the agent."""

    @property
    def header(self) -> dict[str, Any]:
        """Header of the file, which holds everything except the weights."""
        return self.file.header


@contextlib.contextmanager
def describing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors that occur while a header is read to a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path}: the header does not describe an agent: it lacks {error}"
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the header does not describe an agent: {error}") from error


class Learner(ABC, Generic[ConfigT, ModelT]):
    """Base class of learners, which are agents that can be trained, saved and loaded.

    It holds a learner's settings, spaces and weights, and writes and reads its file.
    `OfflineAgent`, from which the offline algorithms derive, learns from a log.
    `SafeSupportQLearning` learns from its own steps in an environment or from a log.

    Args:
        config: Settings, of the class's `config_type`; None means the defaults.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    Raises:
        TypeError: The settings belong to another learner.
    """

    config: ConfigT
    config_type: ClassVar[type[Any]]
    file_format: ClassVar[str]
    """Name of the format of the learner's files."""
    _before: ClassVar[dict[str, Any]] = {}
    """Settings that older files and checkpoints lack, with the values with which those agents were
    trained."""
    _dropped: ClassVar[tuple[str, ...]] = ()
    """Settings of older files that had no effect and are ignored."""
    updates: int | None = None
    """Number of updates with which the agent was trained by `fit`. It is below the `steps` of `fit`
    where a callback or `stop_after` ended the training. None for files of earlier releases and for
    an agent that collects its own experience."""
    chosen: str | None = None
    """How the agent was chosen among the states of its training, such as "with a simulator". None
    for the last state. An agent that was chosen by play does not belong into a table of agents that
    were trained from a log alone."""
    added: str | None = None
    """Flights that `safeshield train --add` joined to the training log, in words; None for none."""

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
        self.noise = np.random.default_rng(self.config.seed)
        """Generator from which `predict` draws its noise. While `run_episodes` plays episodes, it
        puts the generator of its own seed in this place."""
        self._episodes: npt.NDArray[np.uint64] | None = None

    # -- methods that an algorithm implements -------------------------------------------------

    @abstractmethod
    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        """Return the architecture: the spaces, units and networks of the agent, without weights.

        The method is called when a file is loaded and, by the offline agents, at the start of
        training. The settings are in `self.config`.

        Args:
            interface: Spaces of observations and actions, and their scaling for the networks.
            header: Header of the file, which holds the entries of `Architecture.header` besides
                spaces, scaling and settings. At the start of training it is empty.

        Raises:
            KeyError, TypeError, ValueError: The header does not describe an agent. The caller
                reports that the file is damaged.
        """

    def _kept(self, model: ModelT) -> tuple[str, ...]:
        """Return the names of the networks that the agent's file holds."""
        return tuple(model.parts())

    def _header(self, model: ModelT) -> dict[str, Any]:
        """Return the header of the agent's file without spaces, scaling and settings, as JSON."""
        return model.header()

    def diagnostics(self) -> dict[str, Any]:
        """Return measurements of a trained agent by name, as JSON values. The base has none."""
        return {}

    @abstractmethod
    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the state, with the signature of Stable-Baselines3.

        Args:
            observation: One observation or a batch.
            state: Memory of a recurrent policy. The learners of this package have none.
            episode_start: Whether each environment begins an episode.
            deterministic: Whether to choose actions without new random numbers.

        Returns:
            One action or a batch, and the memory after it.
        """

    def _changed(self, **changes: Any) -> Self:  # noqa: ANN401 - settings of any type
        """Return an agent with the same weights, other settings, and its noise from the start."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **changes)
        other.noise = np.random.default_rng(other.config.seed)
        return other

    # -- learned weights ----------------------------------------------------------------------

    def _adopt(self, model: ModelT, networks: Networks) -> None:
        """Use this architecture and these weights from now on."""
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
        """Space of one observation of the environment that the agent learned from."""
        return self._fitted().observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one action of that environment."""
        return self._fitted().action_space

    # -- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to the safetensors file `path`, which contains no executable code.

        Raises:
            RuntimeError: The agent has not been trained.
        """
        model = self._fitted()
        header = {
            "format": self.file_format,
            "version": _VERSION,
            "config": dataclasses.asdict(self.config),
            "observation_space": space_to_json(model.observation_space),
            "action_space": space_to_json(model.action_space),
            "scaling": model.scaling.to_json(),
            "constraint_source": model.constraint and model.constraint.name,
            **{name: getattr(self, name) for name in _MARKS if getattr(self, name) is not None},
            **self._header(model),
        }
        kept = {name: self._arrays[name] for name in self._kept(model)}
        hashes = {}
        if self._episodes is not None:
            header[TRAINING_EPISODES] = len(self._episodes)
            hashes = {TRAINING_HASHES: self._episodes.view(np.int64)}
        write_tensors(path, {**flatten(kept), **hashes}, header)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        verify: PublicKey | None = None,
    ) -> Self:
        """Return the agent in a file that `save` wrote.

        Args:
            path: The file.
            device: Device of the weights, as in the class.
            verify: Public Ed25519 key, or the path of its PEM file. A file that is not signed with
                its private key (`safeshield sign`) is refused. None does not ask.

        Raises:
            ValueError: The file is damaged or of another kind, its record does not follow from its
                counts, or its signature is missing or not valid.
            ImportError: `verify` is given, and the extra `sign` is not installed.
        """
        read = cls._read(path, verify)
        agent = cls(read.config, device=device)
        agent._take(read)
        return agent

    @classmethod
    def _read(cls, path: str | os.PathLike[str], verify: PublicKey | None = None) -> AgentFile:
        """Read the parts that every agent's file has, without the weights.

        The file must be signed with the private key of `verify`, unless this is None.
        """
        file = read_tensors(path, cls.file_format)
        if verify is not None:
            file.verify(verify)
        with describing(path):
            header = file.header
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']!r:.20}, known is {_VERSION}")
            known = {k: v for k, v in header["config"].items() if k not in cls._dropped}
            config = cls.config_type(**{**cls._before, **known})
            observation = flat_observations(space_from_json(header["observation_space"]))
            action = flat_actions(space_from_json(header["action_space"]))
            scaling = Scaling.from_json(header["scaling"], observation, action)
            source = stored_source(header)
        interface = Interface(observation.space, action.space, scaling, source)
        return AgentFile(path, file, config, interface)

    def _take(self, read: AgentFile) -> None:
        """Use the architecture and the weights of a file from now on."""
        with describing(read.path):
            model = self._restore(read.interface, read.header)
            for name, kind in _MARKS.items():
                mark = read.header.get(name)
                if mark is not None and type(mark) is not kind:
                    raise ValueError(f"{name} must be a {kind.__name__}, got {mark!r:.80}")
                setattr(self, name, mark)
            hashes = hash_shapes(read.header)
        parts = model.parts()
        shapes = {name: parts[name].shapes for name in self._kept(model)}
        arrays = read.file.load({**flatten(shapes), **hashes}, dict.fromkeys(hashes, np.int64))
        self._episodes = arrays.pop(TRAINING_HASHES).view(np.uint64) if hashes else None
        tensors = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        self._adopt(model, unflatten(shapes, tensors))

    # -- training -----------------------------------------------------------------------------

    def _train(
        self,
        phases: list[Phase],
        initial: Callable[[torch.Generator], TrainState],
        dataset: OfflineDataset,
        options: FitOptions,
        transitions: int,
        noise_features: int,
        agent: Callable[[TrainState], Learner[Any, Any]],
        name: str | None = None,
    ) -> TrainState:
        """Run all phases on a log, starting from the checkpoint where there is one.

        The number of updates made is stored in `updates`.

        Args:
            phases: Phases in order.
            initial: Function that returns the state before the first update.
            dataset: Log, which is part of the identity that a checkpoint stores.
            options: Progress bar, logging, checkpoints and callbacks.
            transitions: Number of rows from which batches are drawn.
            noise_features: Width of the noise that an update draws for each transition.
            agent: Function from a state to an agent with its weights, for callbacks.
            name: Name of the run in that identity, by default the class.
        """
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        name = name or type(self).__name__
        identity = run_identity(name, self.config, dataset, options.steps, self._before)

        def present(state: TrainState, done: int) -> Learner[Any, Any]:
            # A captured update overwrites its state.
            made = agent(copied(state) if self.device.type == "cuda" else state)
            made.updates, made.chosen = done, None
            return made

        state, self.updates = run_phases(
            phases, initial(generator), generator, options, identity, transitions, noise_features,
            present,
        )  # fmt: skip
        self.chosen = None
        return state


class OfflineAgent(Learner[ConfigT, ModelT]):
    """Base class of agents that are learned from one log.

    Its `predict` has the signature of Stable-Baselines3.

    Args:
        config: Settings; None means the defaults.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.
    """

    model_type: ClassVar[type[Any]] = Architecture
    """Class of its description, an `Architecture`."""
    run_type: ClassVar[type[Any]]
    """Class of its training, a `Run`."""
    _fewest_steps: ClassVar[int] = 1
    """Smallest number of updates, which is one for each phase."""

    # -- methods that an algorithm implements -------------------------------------------------

    @abstractmethod
    def _act(self, model: ModelT, observations: Float, deterministic: bool) -> Float:
        """Return actions (n, act) in [-1, 1] for normalised observations (n, features)."""

    def _action_rows(self, model: ModelT, rows: Float, deterministic: bool) -> Float:
        """Return the actions of `_act` as rows (n, act) in the units of the action space.

        An algorithm whose actions depend on the constraint of the present state overrides this
        method, because a source of h reads the observations themselves.

        Args:
            model: Architecture.
            rows: (n, obs) observations in their own units.
            deterministic: See `predict`.
        """
        seen = model.scaling.observations(rows)
        return model.scaling.to_box(self._act(model, seen, deterministic))

    def graph_actions(self, rows: Any, h: GraphConstraint | None, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of `predict` as values of an ONNX graph (`nn.graph`).

        `rows` (n, obs), `h` and `noise` are those of `shield.export_policy.OnGraph`.

        Raises:
            CannotExportError: The algorithm has no graph.
        """
        model = self._fitted()
        codecs = flat_observations(model.observation_space), flat_actions(model.action_space)
        units = TensorScaling(model.scaling, *codecs, torch.device("cpu"))
        return units.to_box(self._act_on_graph(model, units.inputs(rows), noise))

    def _act_on_graph(self, model: ModelT, observations: Any, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return what `_act` returns, as values of an ONNX graph."""
        raise CannotExportError(
            f"{type(self).__name__} cannot be written to an ONNX graph: export its shield alone, "
            "without a policy, and compute the proposed action in Python"
        )

    def _parts(self, scaling: Scaling) -> dict[str, EnsembleMLP]:
        """Return the algorithm's own networks by name, for the widths that a scaling gives."""
        raise NotImplementedError(f"{type(self).__name__} must describe its networks")

    def _units(self, dataset: OfflineDataset, scaling: Scaling) -> dict[str, Any]:
        """Return the numbers that `_build` needs from a log, by their names in a file's header.

        `dataset` is the log, and `scaling` the scaling of its observations and actions.
        """
        return {}

    def _build(self, interface: Interface, units: dict[str, Any]) -> ModelT:
        """Return the architecture for the units of a log, or for those in a file's header."""
        check_continuous(interface.action_space, type(self).__name__)
        model: ModelT = self.model_type(*interface, self._parts(interface.scaling))
        return model

    def _describe(self, dataset: OfflineDataset) -> ModelT:
        """Return the architecture in the units of a log, before training."""
        interface = interface_of(dataset, Scaling.of(dataset))
        return self._build(interface, self._units(dataset, interface.scaling))

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ModelT:
        return self._build(interface, header)

    def _run(self, model: ModelT, log: LogTensors, steps: int) -> Run[ModelT, ConfigT]:
        """Return the run of one call of `fit`."""
        run: Run[ModelT, ConfigT] = self.run_type(model, log, self.config, steps)
        return run

    def _noise_features(self, model: ModelT) -> int:
        """Return the width of the noise that an update draws for each transition."""
        return model.scaling.action_features

    def _settle(self, model: ModelT, log: LogTensors, state: TrainState) -> ModelT:
        """Return the architecture with measurements of the trained networks, which are in use.

        `log` is the log, and `state` that of the training.
        """
        return model

    def _batchable(self) -> bool:
        """Return whether agents that differ in their seeds alone can be trained by one computation.

        Their architectures for a log are then equal, and `torch.vmap` can map the losses.
        """
        return True

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        """Return the log to learn from, or raise an error where it is not suitable."""
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
        callbacks: Sequence[TrainingCallback] = (),
        capture: bool = True,
    ) -> Self:
        """Train on a log and return self.

        Args:
            dataset: Log of whole episodes with labels.
            steps: Total number of updates, which the phases share.
            progress_bar: Whether to show a progress bar.
            log_dir: Folder for TensorBoard files; None writes none.
            checkpoint: File from which training resumes where it exists, and which is updated
                during training. A resumed run ends with the same weights as one that was never
                interrupted.
            checkpoint_every: Number of updates between two checkpoints. There is also one at the
                end of each phase and one every minute.
            stop_after: Number of updates after which training stops early, so that a later call
                resumes it; requires `checkpoint`.
            callbacks: Objects whose methods are called during training; see `TrainingCallback`.
                One that returns False stops training. The agent then has the weights of that
                update, its `updates` is the number of updates made, and a later call with the same
                checkpoint goes on from there.
            capture: Whether a training on a GPU captures the updates of each phase as a CUDA graph.
                False starts each operation by itself. On the CPU it makes no difference.

        Raises:
            TypeError: A number is not a whole number; a callback is not a `TrainingCallback`; or
                actions are discrete and the algorithm's actor is continuous. `ShieldTrainer`
                accepts discrete actions.
            ValueError: The log lacks what the algorithm learns from (for example a boundary between
                safe and unsafe), its action box is unbounded, or the checkpoint belongs to another
                run.
            FloatingPointError: A loss or a weight is NaN or infinite; the message names the phase.
        """
        options = FitOptions(
            steps,
            self._fewest_steps,
            progress_bar=progress_bar,
            log_dir=log_dir,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            stop_after=stop_after,
            callbacks=callbacks,
            capture=capture,
        )
        dataset = self._check_log(dataset)
        model = self._describe(dataset)
        log = LogTensors.of(dataset, model.scaling, self.device)
        run = self._run(model, log, options.steps)
        return self._learn(model, log, run.phases(), run.initial, dataset, options)

    def _learn(
        self,
        model: ModelT,
        log: LogTensors,
        phases: list[Phase],
        initial: Callable[[torch.Generator], TrainState],
        dataset: OfflineDataset,
        options: FitOptions,
        name: str | None = None,
    ) -> Self:
        """Run the phases of a training on the log, use the weights, and return self.

        `model` is the architecture, and `log` and `dataset` are the log. `phases`, `initial`,
        `options` and `name` are those of `_train`.
        """

        def present(state: TrainState) -> OfflineAgent[ConfigT, ModelT]:
            agent = self._changed()
            agent._use(model, log, state)
            return agent

        state = self._train(
            phases, initial, dataset, options, len(log), self._noise_features(model), present, name
        )
        self._use(model, log, state)
        return self

    def _use(self, model: ModelT, log: LogTensors, state: TrainState) -> None:
        """Use the weights of a training's state from now on."""
        # The agent uses the slow copies of the critics, because the advantages were fitted to them.
        self._episodes = log.episodes
        self._adopt(model, {**state.networks, **state.targets})
        self._model = self._settle(model, log, state)

    # -- choosing actions ---------------------------------------------------------------------

    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the unchanged state, with the signature of Stable-Baselines3.

        Args:
            observation: One observation or a batch.
            state: Returned unchanged, because the actor has no memory.
            episode_start: Not used, for the same reason.
            deterministic: Whether to use the same fixed noise in every call, where actions are
                sampled.

        Raises:
            ValueError: An observation has another shape than the observation space, or is not
                finite.
        """
        model = self._fitted()
        rows, single = self._rows(model, observation, "observation")
        chosen = self._action_rows(model, rows, deterministic)
        actions = flat_actions(model.action_space).unflatten(chosen)
        return (actions[0] if single else actions), state

    def _rows(self, model: ModelT, observation: Batch, name: str) -> tuple[Float, bool]:
        """Return observations as rows (n, features), and whether a single one was passed."""
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

    def _one_noise(self, rows: int, width: int, deterministic: bool) -> Float:
        """Return standard normal noise (rows, width); 0 in a deterministic call."""
        shape = (rows, width)
        noise = np.zeros(shape) if deterministic else self.noise.standard_normal(shape)
        return noise.astype(np.float32)

    def _candidate_noise(self, rows: int, each: int, width: int, deterministic: bool) -> Float:
        """Return standard normal noise (rows * each, width).

        A deterministic call returns the same `each` fixed samples for every row.
        """
        if deterministic:
            drawn = np.random.default_rng(self.config.seed).standard_normal((each, width))
            return np.tile(drawn, (rows, 1)).astype(np.float32)
        return self.noise.standard_normal((rows * each, width)).astype(np.float32)
