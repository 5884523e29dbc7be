"""Conversion of Minari's datasets to logs and of logs to Minari's datasets.

For an episode of L steps Minari stores L + 1 observations and, where infos were recorded, L + 1
entries of each info. The first entry is that of the reset, and one follows for each step. The cost
of step t is therefore entry t + 1 of ``infos["cost"]``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.infos import CONSTRAINT, COST, EXECUTED
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.schema import part_of

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset

Array = npt.NDArray[Any]
MinariDataset = Any
"""A `minari.MinariDataset`. It has no type here because the package is optional."""

_INFOS = (COST, CONSTRAINT, EXECUTED)
_DAMAGE = (OSError, KeyError, IndexError, RuntimeError, AssertionError, TypeError)


def open_dataset(source: str | os.PathLike[str] | MinariDataset) -> MinariDataset:
    """Return a Minari dataset that is stored on this machine.

    Args:
        source: An id in Minari's store, the folder of a dataset, or a `minari.MinariDataset`.

    Raises:
        ImportError: The package minari is not installed.
        FileNotFoundError: There is no such dataset on this machine.
        TypeError: `source` is none of the three.
        ValueError: The dataset is damaged, or its metadata do not store its spaces.
    """
    minari = _package()
    if isinstance(source, minari.MinariDataset):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "source must be a Minari id, the folder of a dataset, or a minari.MinariDataset, got "
            f"{type(source).__name__}"
        )
    from minari.storage.datasets_root_dir import get_dataset_path

    for folder in (Path(source), Path(get_dataset_path(os.fspath(source)))):
        for place in (folder / "data", folder):
            if (place / "metadata.json").is_file():
                _check_spaces_stored(place)
                try:
                    return minari.MinariDataset(place)
                except _DAMAGE as error:
                    raise ValueError(
                        f"{place} is damaged or no Minari dataset: {type(error).__name__}: {error}"
                    ) from error
    raise FileNotFoundError(
        f"no Minari dataset {os.fspath(source)!r}, neither as a folder nor in Minari's store; "
        "`minari list local` lists the local datasets, "
        f"`minari download {os.fspath(source)}` downloads this one"
    )


@contextlib.contextmanager
def errors_named(dataset: MinariDataset) -> Iterator[None]:
    """Put the name of `dataset` in front of the messages of errors raised in this context."""
    name = f"Minari dataset {dataset.id!r}"
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{name}: {error}") from error


def arrays_of(
    dataset: MinariDataset,
    observation_keys: Sequence[str] | None,
    action_space: gym.Space[Any] | None,
) -> dict[str, Any]:
    """Return a Minari dataset as arguments of `OfflineDataset.from_arrays`.

    Args:
        dataset: A dataset from `open_dataset`.
        observation_keys: Entries of a Dict observation to keep; all by default.
        action_space: Action space to use in place of the dataset's, for logs whose actions lie
            outside it.

    Raises:
        TypeError: `spaces.rows` does not support a space.
        ValueError: The dataset is damaged, or lacks the infos from which a log is labelled.
    """
    space = part_of(dataset.observation_space, observation_keys)
    observation_codec, action_codec = (
        flat_observations(space),
        flat_actions(action_space or dataset.action_space),
    )
    filling = _Filling(int(dataset.total_steps), observation_codec, action_codec)
    for number, episode in _episodes(dataset):
        filling.add(number, episode)
    return {**filling.arrays(), "observation_space": space, "action_space": action_codec.space}


def write_dataset(
    dataset: OfflineDataset,
    dataset_id: str,
    **metadata: Any,  # noqa: ANN401 - what Minari takes
) -> MinariDataset:
    """Write a log into Minari's store under the id `dataset_id`, and return the Minari dataset.

    `dataset` is the log, and `metadata` are further arguments of Minari; see
    `OfflineDataset.to_minari`.
    """
    minari = _package()
    from minari.data_collector import EpisodeBuffer

    inside = ~(dataset.terminated | dataset.truncated)[:-1]
    broken = inside & (dataset.next_observations[:-1] != dataset.observations[1:]).any(axis=1)
    if broken.any():
        raise ValueError(
            "next_observations[t] must equal observations[t+1] inside an episode, because Minari "
            f"stores each state once, but they differ at index {int(np.argmax(broken))}"
        )
    buffers = []
    for episode in dataset.episodes:
        infos = {COST: np.append(episode.constraints[:1] > 0, episode.costs).astype(np.float32)}
        if dataset.constraint_kind == "continuous":
            infos[CONSTRAINT] = np.append(episode.constraints[:1], episode.next_constraints)
        rows = np.concatenate([episode.observations, episode.next_observations[-1:]])
        buffers.append(
            EpisodeBuffer(
                observations=_points(dataset.flat_observations, rows),
                actions=_points(dataset.flat_actions, episode.actions),
                rewards=episode.rewards,
                terminations=episode.terminated,
                truncations=episode.truncated,
                infos=infos,
            )
        )
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        **{"jpeg_encoding": False, **metadata},
    )


class _Filling:
    """The arrays of a log, allocated once and filled episode by episode."""

    def __init__(self, steps: int, observation_codec: SpaceCodec, action_codec: SpaceCodec) -> None:
        self._observation_codec, self._action_codec = observation_codec, action_codec
        self._at = 0
        self._reported: frozenset[str] | None = None
        self._initial_costs: list[float] = []
        one = ("rewards", "costs", "constraints", "next_constraints")
        self._columns: dict[str, Array] = {
            **{key: np.empty(steps, np.float32) for key in one},
            **{key: np.zeros(steps, np.bool_) for key in ("terminated", "truncated")},
            "observations": np.empty((steps, observation_codec.width), np.float32),
            "next_observations": np.empty((steps, observation_codec.width), np.float32),
            "actions": np.empty((steps, action_codec.width), np.float32),
        }

    def add(self, number: int, episode: Any) -> None:  # noqa: ANN401 - minari.EpisodeData
        """Append one episode.

        Raises:
            ValueError: The lengths of its arrays do not match, or it reports other infos than the
                episodes before it.
        """
        where = f"episode {number}"
        steps = len(episode.rewards)
        if not steps:
            return
        part = slice(self._at, self._at + steps)
        if part.stop > len(self._columns["rewards"]):
            raise ValueError(
                f"{where} exceeds the {len(self._columns['rewards'])} steps that the metadata state"
            )
        rows = self._observation_codec.flatten(episode.observations, f"{where}: observations")[0]
        ends = {
            "terminated": np.array(episode.terminations, np.bool_),
            "truncated": np.array(episode.truncations, np.bool_),
        }
        acted = self._action_codec.flatten(episode.actions, f"{where}: actions")[0]
        lengths = [len(acted), *map(len, ends.values())]
        if len(rows) != steps + 1 or set(lengths) != {steps}:
            raise ValueError(
                f"{where} must have one observation more than steps, and one entry a step of all "
                "other arrays, got "
                f"{len(rows)} observations, {steps} rewards, {lengths[0]} actions, "
                f"{lengths[1]} terminations, {lengths[2]} truncations"
            )
        if any(flags[:-1].any() for flags in ends.values()):
            raise ValueError(f"{where} must not end before its last step")
        # Minari may set both flags at an end; an episode without a flag counts as truncated.
        ends["truncated"][-1] = not ends["terminated"][-1]
        infos = _infos(episode.infos, steps, where)
        self._check_reported(infos, where)
        if EXECUTED in infos:
            acted = self._action_codec.flatten(infos[EXECUTED][1:], f"{where}: {EXECUTED}")[0]
        named = {
            "observations": rows[:-1],
            "next_observations": rows[1:],
            "actions": acted,
            "rewards": episode.rewards,
            **ends,
        }
        if CONSTRAINT in infos:
            named["constraints"] = infos[CONSTRAINT][:-1]
            named["next_constraints"] = infos[CONSTRAINT][1:]
        if COST in infos:
            named["costs"] = infos[COST][1:]
            self._initial_costs.append(float(infos[COST][0]))
        else:
            named["costs"] = infos[CONSTRAINT][1:] > 0
        with np.errstate(over="ignore"):
            for key, values in named.items():
                self._columns[key][part] = values
        self._at = part.stop

    def arrays(self) -> dict[str, Any]:
        """Return read-only arrays as arguments of `OfflineDataset.from_arrays`.

        Raises:
            ValueError: There are fewer steps than the metadata state.
        """
        if self._at < len(self._columns["rewards"]):
            raise ValueError(
                f"its episodes have {self._at} steps, but its metadata state "
                f"{len(self._columns['rewards'])}; download or make it again"
            )
        for column in self._columns.values():
            column.flags.writeable = False
        if CONSTRAINT in (self._reported or ()):
            return dict(self._columns)
        columns = {k: v for k, v in self._columns.items() if "constraints" not in k}
        return {**columns, "initial_costs": np.array(self._initial_costs)}

    def _check_reported(self, infos: Mapping[str, Array], where: str) -> None:
        found = frozenset(infos)
        if not found & {COST, CONSTRAINT}:
            raise ValueError(
                f"{where} has neither infos['{COST}'] nor infos['{CONSTRAINT}']; collect with "
                "DataCollector(env, record_infos=True) around an environment that reports "
                "info['cost'] or info['constraint'] at reset and at every step"
            )
        if self._reported is not None and found != self._reported:
            raise ValueError(
                f"{where} reports {sorted(found)}, but the episodes before it report "
                f"{sorted(self._reported)}"
            )
        self._reported = found


def _infos(infos: Mapping[str, Any] | None, steps: int, where: str) -> dict[str, Array]:
    """Return the infos that a log uses, each (steps + 1, ...): at reset and after each step."""
    known = {}
    if infos is not None and isinstance(infos.get(CONSTRAINT), Mapping):
        # The units of several constraints can be computed only from all episodes together. Here a
        # state has the cost 1 if at least one of them is violated.
        named = infos[CONSTRAINT]
        violated = np.any([~(np.asarray(h, np.float64) <= 0) for h in named.values()], axis=0)
        rest = {key: infos[key] for key in infos if key != CONSTRAINT}
        infos = {COST: violated.astype(np.float32), **rest}
    for key in _INFOS:
        if infos is None or key not in infos:
            continue
        values = np.asarray(infos[key])
        if values.ndim == 2 and key != EXECUTED and values.shape[1] == 1:
            values = values[:, 0]
        if len(values) != steps + 1 or (values.ndim != 1 and key != EXECUTED):
            raise ValueError(
                f"{where}: infos[{key!r}] must have one number at reset and one after each of its "
                f"{steps} steps, got shape {values.shape}"
            )
        known[key] = values
    return known


def _episodes(dataset: MinariDataset) -> Iterator[tuple[int, Any]]:
    episodes = iter(dataset.iterate_episodes())
    number = 0
    while True:
        try:
            episode = next(episodes, None)
        except _DAMAGE as error:
            raise ValueError(
                f"damaged: episode {number} cannot be read ({type(error).__name__}: {error}); "
                "download or make it again"
            ) from error
        if episode is None:
            return
        yield number, episode
        number += 1


def _check_spaces_stored(place: Path) -> None:
    # Where the metadata store no spaces, Minari makes the environment to find them, and so imports
    # the module that the file names.
    try:
        metadata = json.loads((place / "metadata.json").read_text())
        missing = {"observation_space", "action_space"} - set(metadata)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place} is damaged: its metadata.json is no JSON ({error})") from error
    if missing:
        raise ValueError(
            f"{place} stores no {' and no '.join(sorted(missing))}, so Minari would make the "
            "environment that it names; open the dataset yourself and pass the "
            "minari.MinariDataset"
        )


def _points(flat: SpaceCodec, rows: npt.NDArray[np.float32]) -> Batch:
    batch = flat.batch(rows)
    return batch if isinstance(batch, Mapping) else batch.astype(flat.space.dtype)


def _package() -> Any:  # noqa: ANN401
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            f"Minari's datasets need the package minari ({error}): pip install "
            '"safeshield[minari]"'
        ) from error
    return minari
