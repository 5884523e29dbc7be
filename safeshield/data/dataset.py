"""Logged transitions as read-only arrays: `OfflineDataset`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast, overload

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.data import minari, storage
from safeshield.data.labels import binary_labels, check_magnitude
from safeshield.data.validation import (
    FLAG_FIELDS,
    SCALAR_FIELDS,
    VECTOR_FIELDS,
    as_field,
    check_costs,
    check_log,
    check_successors,
    cost_contradictions,
    starts_of,
)
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.schema import check_same_space, space_from_json, space_to_json
from safeshield.values.constraint import (
    ConstraintSource,
    Source,
    as_constraint,
    constraints_by_name,
    in_own_steps,
    named,
)

ConstraintKind = Literal["continuous", "binary"]
Array = npt.NDArray[Any]

_FIELDS = VECTOR_FIELDS + FLAG_FIELDS + SCALAR_FIELDS
_DSRL_NAMES = {"terminated": "terminals", "truncated": "timeouts"}
_FORMAT = "safeshield-dataset"
_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OfflineDataset:
    """A log of whole episodes, one after the other, as read-only arrays of N transitions.

    Observations and actions are stored as rows of numbers (see `spaces.rows`). A Box of any shape
    is flattened, a Discrete is one integer, and the entries of a Dict stand side by side.

    Row t is the step from s[t] by a[t] to s[t+1]. The rewards, costs and `next_constraints` of a
    row belong to the state that the step reached, `constraints` to the state in which it started.
    Floating arrays become float32 and flags become bool. A writeable array is copied. All rules are
    checked at construction.

    Attributes:
        observations: (N, obs) s[t].
        actions: (N, act) a[t], the action that was executed. It lies inside `action_space`.
        rewards: (N,) reward of each step.
        next_observations: (N, obs) s[t+1]. At the end of an episode it is the final observation,
            not the first observation of the next episode.
        terminated: (N,) whether the episode terminated in s[t+1]. Termination ends a bootstrap.
        truncated: (N,) whether the episode was truncated at s[t+1]. Truncation does not end a
            bootstrap. At most one of `terminated` and `truncated` is set.
        costs: (N,) cost of s[t+1], reported after the step.
        constraints: (N,) h(s[t]), above 0 in a violation.
        next_constraints: (N,) h(s[t+1]).
        observation_space: Space of one observation: Box, Discrete, MultiDiscrete, MultiBinary, or a
            Dict of the entries that the log holds.
        action_space: Space of one action: Box, Discrete, MultiDiscrete or MultiBinary.
        constraint_kind: "continuous" (labels in units of the constraint) or "binary" (labels made
            from costs, -1 where safe and one value above 0 where not; learners replace that value
            by their setting `label_magnitude`).
        provenance: How the log was made, as JSON values: environment, seeds, versions. None where
            this is not known. The provenance is saved and loaded, and parts of the log keep it.
            Minari's datasets do not hold it.
        constraint_source: Name of the function of the observation that gives the labels exactly
            (`values.constraint`). None where no such function is known.
        verified: Whether the contents of the file that was loaded had the SHA-256 digest that it
            names. False for files that name none, such as DSRL's; None for a log that no file held.

    Raises:
        ValueError: A rule is broken. The message names the key, the index, the episode and a
            repair.
        TypeError: An array does not hold numbers, or a space is of a kind that is not supported.

    >>> data = OfflineDataset.from_arrays(
    ...     observations=[[0.0], [1.0], [0.0]], actions=[[0.5], [0.5], [0.0]],
    ...     rewards=[1.0, 1.0, 0.0], next_observations=[[1.0], [2.0], [0.0]],
    ...     terminated=[False, True, False], truncated=[False, False, True], costs=[0, 1, 0],
    ... )
    >>> data
    OfflineDataset(3 transitions, 2 episodes, obs 1, act 1, binary constraints)
    >>> data.constraints.tolist(), data.next_constraints.tolist()
    ([-1.0, -1.0, -1.0], [-1.0, 1.0, -1.0])
    >>> data.returns.tolist(), data.violating_episodes.tolist()
    ([2.0, 0.0], [True, False])
    """

    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    next_observations: npt.NDArray[np.float32]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    costs: npt.NDArray[np.float32]
    constraints: npt.NDArray[np.float32]
    next_constraints: npt.NDArray[np.float32]
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    constraint_kind: ConstraintKind
    provenance: Mapping[str, Any] | None = None
    constraint_source: str | None = None
    verified: bool | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            object.__setattr__(self, name, as_field(name, getattr(self, name)))
        check_log(self._arrays(), self.flat_observations, self.flat_actions, self.constraint_kind)

    @cached_property
    def flat_observations(self) -> SpaceCodec:
        """Codec that converts observations to rows and back."""
        return flat_observations(self.observation_space)

    @cached_property
    def flat_actions(self) -> SpaceCodec:
        """Codec that converts actions to rows and back."""
        return flat_actions(self.action_space)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An array that NumPy has pickled or deep-copied is writeable again.
        self.__dict__.update(state)
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rewards)

    def __repr__(self) -> str:
        return (
            f"OfflineDataset({len(self)} transitions, {self.num_episodes} episodes, "
            f"obs {self.observations.shape[1]}, act {self.actions.shape[1]}, "
            f"{self.constraint_kind} constraints)"
        )

    @classmethod
    def from_arrays(
        cls,
        *,
        observations: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        actions: npt.ArrayLike,
        rewards: npt.ArrayLike,
        next_observations: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        terminated: npt.ArrayLike,
        truncated: npt.ArrayLike,
        costs: npt.ArrayLike | None = None,
        constraints: npt.ArrayLike | None = None,
        next_constraints: npt.ArrayLike | None = None,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        constraint_kind: ConstraintKind | None = None,
        initial_costs: npt.ArrayLike | None = None,
        provenance: Mapping[str, Any] | None = None,
        constraint_source: str | None = None,
    ) -> OfflineDataset:
        """Return a log made of arrays; labels, costs and spaces may be left out.

        Arguments with the name of an attribute of the class are described there: `rewards`,
        `next_observations`, `terminated`, `truncated`, `observation_space`, `action_space`,
        `provenance` and the others.

        Without `constraints` and `next_constraints` the labels are binary and computed from the
        costs and `initial_costs` by `binary_labels`. With both arrays the labels are continuous
        unless `constraint_kind` says otherwise. Without `costs` each step that reaches a violation
        (`next_constraints` > 0) costs 1 and any other step 0.

        Observations and actions are batches of points of their spaces: arrays (N, *shape), arrays
        (N,) for a Discrete, dicts of arrays for a Dict. They may also be rows (N, width). The
        default spaces are Box(-inf, inf) for observations and Box(-1, 1) for actions.

        A step that is both terminated and truncated counts as terminated, as Gymnasium's
        `TimeLimit` may return it. A warning is issued where ``next_observations[t]`` is not
        ``observations[t+1]`` inside an episode, or where the signs of h and of a cost contradict
        each other. It gives their number and the first row.

        Raises:
            ValueError: A rule is broken; one of the two constraint arrays is missing, or both of
                them and the costs are missing; the constraints hold only 0 and 1, as costs do; most
                signs of h contradict the costs; or the rows of `next_observations` hold the
                observations of other rows.
        """
        flags = {
            "terminated": as_field("terminated", terminated),
            "truncated": as_field("truncated", truncated),
        }
        if flags["terminated"].shape == flags["truncated"].shape:
            both = flags["terminated"] & flags["truncated"]
            if both.any():
                flags["truncated"] = _frozen(flags["truncated"] & ~both)
        if (constraints is None) != (next_constraints is None):
            raise ValueError(
                "constraints and next_constraints must be given together, or neither: the label "
                "of an episode's last state is in next_constraints only"
            )
        compared = costs is not None and constraints is not None
        if constraint_kind is None and constraints is not None and next_constraints is not None:
            _refuse_costs(constraints, next_constraints)
        if costs is None:
            if next_constraints is None:
                raise ValueError(
                    "costs are missing: give costs, or constraints and next_constraints"
                )
            labels = as_field("next_constraints", next_constraints)
            if labels.ndim != 1:
                raise ValueError(
                    f"next_constraints must have shape (N,), got {labels.shape}; reshape it"
                )
            costs = (labels > 0).astype(np.float32)
        if observation_space is None:
            observation_space = _box(np.inf, observations, "observations")
        if action_space is None:
            action_space = _box(1.0, actions, "actions")
        observation_codec, action_codec = (
            flat_observations(observation_space),
            flat_actions(action_space),
        )
        kind: ConstraintKind = constraint_kind or "continuous"
        if constraints is None or next_constraints is None:
            if constraint_kind == "continuous":
                raise ValueError(
                    "constraint_kind='continuous' needs constraints and next_constraints"
                )
            if np.shape(costs) != flags["terminated"].shape or not np.size(costs):
                raise ValueError(
                    f"costs and terminated must have the same shape (N,) with N >= 1, "
                    f"got {np.shape(costs)} and {flags['terminated'].shape}"
                )
            kind = "binary"
            constraints, next_constraints = binary_labels(costs, starts_of(**flags), initial_costs)
        log = cls(
            observations=_rows("observations", observations, observation_codec),
            actions=_rows("actions", actions, action_codec),
            rewards=as_field("rewards", rewards),
            next_observations=_rows("next_observations", next_observations, observation_codec),
            costs=as_field("costs", costs),
            constraints=as_field("constraints", constraints),
            next_constraints=as_field("next_constraints", next_constraints),
            observation_space=observation_space,
            action_space=action_space,
            constraint_kind=kind,
            provenance=provenance,
            constraint_source=constraint_source,
            terminated=flags["terminated"],
            truncated=flags["truncated"],
        )
        check_successors(log.observations, log.next_observations, log.terminated, log.truncated)
        if compared:
            check_costs(log.next_constraints, log.costs)
        return log

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
    ) -> OfflineDataset:
        """Return the log in a .hdf5, .h5 or .npz file: one of DSRL's, or one that `save` wrote.

        A plain DSRL file has no labels and no spaces. Its labels are binary and computed from the
        costs. Its observation space is Box(-inf, inf) and its action space Box(-1, 1) unless they
        are given. A file that `save` wrote holds labels and spaces; a given space must agree with
        the stored one. The arrays are allocated once and filled in blocks, so that loading takes
        little more memory than the log itself. `verified` says whether the file names a digest.

        Args:
            path: The file. Reading it runs no code from it.
            observation_space: Observation space of the environment that was logged.
            action_space: Action space of that environment. It is needed where actions leave
                [-1, 1].

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or was edited, keys are missing, the log breaks a rule,
                or its file claims more than a limit of `files.reading`.
        """
        source = Path(path)
        arrays, header, stated, found = storage.read_log(source)
        fields = {name: arrays.pop(_DSRL_NAMES.get(name, name), None) for name in _FIELDS}
        try:
            kind: ConstraintKind | None = None
            if header is not None:
                kind, stored_observations, stored_actions = _read_header(header)
                if stated != found:
                    raise ValueError(
                        "it is damaged or was edited: its contents do not have the SHA-256 digest "
                        "that its header names; copy it again, or save it again with this release"
                    )
                for what, given, stored in (
                    ("observation_space", observation_space, stored_observations),
                    ("action_space", action_space, stored_actions),
                ):
                    if given is not None:
                        check_same_space(stored, given, what)
                observation_space, action_space = stored_observations, stored_actions
                if fields["constraints"] is None:
                    raise ValueError(f"missing keys {list(storage.LABEL_KEYS)}; save it again")
            # No other object refers to these arrays, so they need no copy.
            for array in fields.values():
                if array is not None:
                    array.flags.writeable = False
            dataset = cls.from_arrays(
                **cast(dict[str, Any], fields),
                observation_space=observation_space,
                action_space=action_space,
                constraint_kind=kind,
                provenance=None if header is None else header.get("provenance"),
                constraint_source=named((header or {}).get("constraint_source")),
            )
            object.__setattr__(dataset, "verified", stated is not None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
        return dataset

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log to a .hdf5, .h5 or .npz file with DSRL's keys; `load` reads it exactly.

        Besides DSRL's keys the file holds `constraints`, `next_constraints` and, as strict JSON,
        the spaces, the kind of labels, the provenance and a SHA-256 digest of all contents. `load`
        refuses a file of which anything has changed. The file is written atomically: an error
        leaves no partial file.

        Args:
            path: The file. Its suffix selects the format.

        Raises:
            ValueError: The suffix is unknown.
            OSError: The file cannot be written; see `files.atomic.check_writable`.
        """
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "constraint_kind": self.constraint_kind,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }
        if self.provenance is not None:
            header["provenance"] = dict(self.provenance)
        if self.constraint_source is not None:
            header["constraint_source"] = self.constraint_source
        arrays = {_DSRL_NAMES.get(name, name): array for name, array in self._arrays().items()}
        storage.write_log(Path(path), arrays, header)

    @classmethod
    def from_minari(
        cls,
        source: str | os.PathLike[str] | object,
        *,
        observation_keys: Sequence[str] | None = None,
        action_space: gym.Space[Any] | None = None,
    ) -> OfflineDataset:
        """Return a Minari dataset, whose infos hold the cost, the constraint, or both, as a log.

        The infos must have been recorded at the reset and at every step
        (``DataCollector(env, record_infos=True)``). Entry t + 1 belongs to the state after step t.
        Labels are ``infos["constraint"]`` where it is recorded. Otherwise they are binary, from
        ``infos["cost"]``; the cost of the reset labels the first state, and NaN counts as 0 there.
        Where no cost is recorded, it is 1 in a violation and 0 elsewhere. Where several
        constraints are recorded by name, labels are binary, and `with_constraint` gives each its
        unit. Actions are ``infos["action_executed"]`` where it is recorded. An episode without an
        end flag counts as truncated.

        Args:
            source: An id in Minari's store, the folder of a dataset, or a `minari.MinariDataset`.
            observation_keys: Entries of a Dict observation to keep; all by default.
            action_space: Action space to use in place of the dataset's, for logs whose actions lie
                outside it.

        Raises:
            ImportError: The package minari is not installed.
            FileNotFoundError: There is no such dataset on this machine. Nothing is downloaded.
            ValueError: The dataset is damaged, lacks these infos, or breaks a rule of logs.
            TypeError: `spaces.rows` does not support a space.
        """
        opened = minari.open_dataset(source)
        with minari.errors_named(opened):
            return cls.from_arrays(**minari.arrays_of(opened, observation_keys, action_space))

    def to_minari(self, dataset_id: str, **metadata: Any) -> Any:  # noqa: ANN401 - optional
        """Write the log into Minari's store and return the `minari.MinariDataset`.

        The infos hold the cost and, where labels are continuous, the constraint. `from_minari`
        returns the same transitions and spaces, but neither the provenance nor the name of the
        source of h, which are not written.

        Args:
            dataset_id: Id of the new dataset in the store, such as "boat/random-v0".
            metadata: Further arguments of `minari.create_dataset_from_buffers`: author,
                algorithm_name, description and others.

        Raises:
            ImportError: The package minari is not installed.
            ValueError: The id is taken or invalid, or ``next_observations[t]`` differs from
                ``observations[t+1]`` inside an episode.
        """
        return minari.write_dataset(self, dataset_id, **metadata)

    def with_label_magnitude(self, magnitude: float) -> OfflineDataset:
        """Return the same log with this label for unsafe states, where labels are binary.

        It has no effect on a learner, which replaces the label by its own setting
        `label_magnitude`, and `concat` and `from_arrays` label by 1.

        Raises:
            ValueError: The labels are continuous, or the magnitude is not above 0.
        """
        if self.constraint_kind != "binary":
            raise ValueError(
                "only binary labels have a magnitude, but the labels of this log are continuous"
            )
        check_magnitude(magnitude)
        if magnitude == max(self.constraints.max(), self.next_constraints.max()):
            return self
        now, after = (
            np.where(labels > 0, np.float32(magnitude), np.float32(-1.0))
            for labels in (self.constraints, self.next_constraints)
        )
        return dataclasses.replace(self, constraints=now, next_constraints=after)

    def with_constraint(
        self, source: Source | Mapping[str, Source] | Sequence[Source], name: str = ""
    ) -> OfflineDataset:
        """Return the same log with continuous labels, computed from the observations.

        The log stores the name of the source, not the function. Agents and shields that are trained
        on the log look up the function under this name in place of a network that estimates h, so
        register it (`register_constraint`), also for this process.

        Several constraints become one, h(s) = max_k h_k(s) / sigma_k, where sigma_k is the root
        mean square of h_k(s') - h_k(s) over the steps of this log (`SeveralConstraints`). The sign
        of h is that of the worst constraint, whatever their units.

        Args:
            source: A function from a batch of n observations to h (n,), positive in a violation;
                or its registered name, or a `ConstraintSource`. For several constraints, a
                function, name or source for each name, or a list of registered names. Where
                another log has labelled them, its `constraint_source` keeps the units of that log.
            name: Name and version for a function that is not registered, such as ``"speed@1"``.

        Raises:
            TypeError: `source` is of another kind.
            LookupError: The name is not registered in this process.
            ValueError: The function returns NaN, infinity or another shape; or the sign of h
                contradicts the logged costs. The message says how often, and where first. Or one
                of several constraints never changes in the log.

        >>> data = OfflineDataset.from_arrays(
        ...     observations=[[0.0], [1.0]], actions=[[0.5], [0.5]], rewards=[1.0, 1.0],
        ...     next_observations=[[1.0], [2.0]], terminated=[False, True],
        ...     truncated=[False, False], costs=[0, 1],
        ... )
        >>> data.with_constraint(lambda obs: obs[:, 0] - 1.5, name="place@1").constraints.tolist()
        [-1.5, -0.5]
        >>> both = data.with_constraint({
        ...     "place@1": lambda obs: obs[:, 0] - 1.5,           # changes by 1 in each step
        ...     "height@1": lambda obs: 1e3 * (obs[:, 0] - 4.0),  # changes by 1000
        ... })
        >>> both.constraint_source, both.next_constraints.tolist()
        ('max(height@1 / 1000.0, place@1 / 1.0)', [-0.5, 0.5])
        """
        known: ConstraintSource | None = None
        if isinstance(source, Mapping | list | tuple):
            if name:
                raise ValueError(
                    "name must be left out where source holds several constraints, got "
                    f"{name!r}; write {{name: function, ...}}"
                )
            parts = constraints_by_name(source)
        else:
            known = as_constraint(source, name)  # type: ignore[arg-type]
            if known is None:
                raise TypeError("source must be a function, a name or a ConstraintSource, got None")
            parts = known.parts
        codec = self.flat_observations
        now, after = (
            [part(codec.batch(rows)) for part in parts]
            for rows in (self.observations, self.next_observations)
        )
        for what, each in (("constraints", now), ("next_constraints", after)):
            for part, h in zip(parts, each, strict=True):
                bad = ~np.isfinite(h.astype(np.float32))
                if bad.any():
                    raise ValueError(
                        f"the constraint '{part.name}' must be finite, but it is {h[bad][0]} in "
                        f"{int(bad.sum())} of {len(self)} states; the first is that of {what}"
                        f"[{int(bad.argmax())}]"
                    )
        known = known or in_own_steps(parts, now, after)
        h, reached = (
            known.largest(np.stack(each, axis=1)).astype(np.float32) for each in (now, after)
        )
        count, clause = cost_contradictions(reached, self.costs, f"the constraint '{known.name}'")
        if count:
            raise ValueError(
                f"{clause}. Check the sign (h > 0 is a violation) and whether the observation "
                "determines the cost"
            )
        return dataclasses.replace(
            self,
            constraints=h,
            next_constraints=reached,
            constraint_kind="continuous",
            constraint_source=known.name,
        )

    @cached_property
    def episode_starts(self) -> npt.NDArray[np.int64]:
        """(E,) index of the first step of each episode."""
        return _frozen(starts_of(self.terminated, self.truncated))

    @cached_property
    def episode_lengths(self) -> npt.NDArray[np.int64]:
        """(E,) number of steps of each episode."""
        return _frozen(np.diff(self.episode_starts, append=len(self)))

    @property
    def num_episodes(self) -> int:
        """Number of episodes, E."""
        return len(self.episode_starts)

    @property
    def episodes(self) -> Episodes:
        """The episodes as a sequence of datasets that share the memory of this log."""
        return Episodes(self)

    @cached_property
    def returns(self) -> npt.NDArray[np.float64]:
        """(E,) undiscounted sum of the rewards of each episode."""
        return _frozen(np.add.reduceat(self.rewards.astype(np.float64), self.episode_starts))

    @cached_property
    def episode_costs(self) -> npt.NDArray[np.float64]:
        """(E,) undiscounted sum of the costs of each episode."""
        return _frozen(np.add.reduceat(self.costs.astype(np.float64), self.episode_starts))

    @cached_property
    def violating_episodes(self) -> npt.NDArray[np.bool_]:
        """(E,) whether h > 0 in any state of the episode, the first and the last included."""
        unsafe = (self.constraints > 0) | (self.next_constraints > 0)
        return _frozen(np.logical_or.reduceat(unsafe, self.episode_starts))

    @cached_property
    def episode_hashes(self) -> npt.NDArray[np.uint64]:
        """(E,) 64-bit hash of the observations and actions of each episode.

        Labels, rewards, costs and flags do not enter the hash, so an episode that is labelled anew
        keeps it. A part of an episode, or an episode of which other entries were logged, has
        another hash.
        """
        found = np.empty(self.num_episodes, np.uint64)
        for i, start in enumerate(self.episode_starts):
            rows = slice(start, start + self.episode_lengths[i])
            digest = hashlib.blake2b(digest_size=8)
            for array in (
                self.observations[rows],
                self.actions[rows],
                self.next_observations[rows][-1],
            ):
                digest.update(np.ascontiguousarray(array).data)
            found[i] = int.from_bytes(digest.digest(), "little")
        return _frozen(found)

    def select(self, episode_indices: npt.ArrayLike) -> OfflineDataset:
        """Return a log of the episodes with these indices, in this order.

        Args:
            episode_indices: (k,) indices of episodes, counted from 0. An index may repeat.

        Raises:
            ValueError: No index is given, or one is outside [0, num_episodes).
        """
        indices = np.asarray(episode_indices)
        if indices.ndim != 1 or len(indices) == 0 or indices.dtype.kind not in "iu":
            raise ValueError(
                "episode_indices must be a list of at least one integer, got "
                f"{episode_indices!r}; turn a mask into indices with numpy.flatnonzero"
            )
        if indices.min() < 0 or indices.max() >= self.num_episodes:
            raise ValueError(
                f"episode_indices must lie in [0, {self.num_episodes}), "
                f"got {indices.min()} .. {indices.max()}"
            )
        lengths = self.episode_lengths[indices]
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self._rows(np.repeat(self.episode_starts[indices], lengths) + offsets)

    def split(self, fraction: float, seed: int) -> tuple[OfflineDataset, OfflineDataset]:
        """Split the episodes at random and return two logs, ``(train, held_out)``.

        Both logs keep the order of this log. Episodes stay whole, because the steps of one episode
        depend on each other and a held-out check must not use an episode that was trained on.

        Args:
            fraction: Share of the episodes that `train` gets, in (0, 1): it gets
                ``round(fraction * num_episodes)`` of them.
            seed: Seed of the random split.

        Raises:
            ValueError: `fraction` is not inside (0, 1), or a part would be empty.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie inside (0, 1), got {fraction}")
        count = round(fraction * self.num_episodes)
        if not 0 < count < self.num_episodes:
            raise ValueError(
                f"split needs an episode on both sides, but fraction {fraction} of "
                f"{self.num_episodes} episodes puts {count} in train; log more episodes or choose "
                "a fraction nearer to 1/2"
            )
        order = np.random.default_rng(seed).permutation(self.num_episodes)
        return self.select(np.sort(order[:count])), self.select(np.sort(order[count:]))

    @classmethod
    def concat(cls, datasets: Iterable[OfflineDataset]) -> OfflineDataset:
        """Return several logs of one task joined to one log.

        Episodes stay whole and in their order, so that no window of steps crosses from one log into
        the next. The provenance is that of the logs where it is the same in all of them. Otherwise
        it has the entries on which all logs agree, and a list "parts" with the number of
        transitions and the other entries of each log. It is None where no log has one.

        Args:
            datasets: The logs, in the order in which their episodes follow each other.

        Raises:
            TypeError: One of them is not a log.
            ValueError: There are no logs; or their spaces, kinds of labels or sources of h differ.
                The message names the first difference.

        >>> data = OfflineDataset.from_arrays(
        ...     observations=[[0.0]], actions=[[0.5]], rewards=[1.0], next_observations=[[1.0]],
        ...     terminated=[True], truncated=[False], costs=[0],
        ... )
        >>> OfflineDataset.concat([data, data])
        OfflineDataset(2 transitions, 2 episodes, obs 1, act 1, binary constraints)
        """
        if isinstance(datasets, OfflineDataset):
            raise TypeError("datasets must be a list of datasets, got one; write [a, b]")
        parts = list(datasets)
        if not parts:
            raise ValueError("datasets must hold at least one dataset, got none")
        for part in parts:
            if not isinstance(part, OfflineDataset):
                raise TypeError(
                    f"each of datasets must be an OfflineDataset, got {type(part).__name__}; "
                    "read a file by OfflineDataset.load(path)"
                )
        first = parts[0]
        for i, part in enumerate(parts[1:], 1):
            for name in ("observation_space", "action_space"):
                one, other = getattr(first, name), getattr(part, name)
                repair = "join logs of one environment, made with the same wrappers"
                check_same_space(one, other, f"{name} of datasets[{i}]", repair=repair)
            if part.constraint_kind != first.constraint_kind:
                raise ValueError(
                    f"datasets must have the same constraint_kind, got {first.constraint_kind!r} "
                    f"and in datasets[{i}] {part.constraint_kind!r}; label them alike, by "
                    "with_constraint() or from their costs"
                )
            if part.constraint_source != first.constraint_source:
                raise ValueError(
                    f"datasets must have the same constraint_source, got "
                    f"{first.constraint_source!r} and in datasets[{i}] {part.constraint_source!r}; "
                    "label them alike by with_constraint()"
                )
        if first.constraint_kind == "binary":
            parts = [part.with_label_magnitude(1.0) for part in parts]
            first = parts[0]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS
        }
        known = {part.verified for part in parts}
        return dataclasses.replace(
            first,
            **joined,
            provenance=_joint_provenance(parts),
            verified=False if False in known else None if None in known else True,
        )

    concatenate = concat
    """The earlier name of `concat`."""

    def summary(self) -> str:
        """Return a few lines of text: sizes, returns, costs, labels and how episodes end."""
        lengths, returns, costs = self.episode_lengths, self.returns, self.episode_costs
        unsafe = float(np.mean(self.next_constraints > 0))
        ended = float(np.mean(self.terminated[self.episode_starts + lengths - 1]))
        low, high = self.next_constraints.min(), self.next_constraints.max()
        return "\n".join(
            [
                f"transitions  {len(self)} in {self.num_episodes} episodes of "
                f"{lengths.min()} to {lengths.max()} steps, {ended:.0%} of them terminated",
                f"spaces       observations {self.observation_space}, actions {self.action_space}",
                f"returns      {returns.min():.4g} .. {returns.max():.4g}, "
                f"mean {returns.mean():.4g}",
                f"costs        {costs.min():.4g} .. {costs.max():.4g} an episode, "
                f"mean {costs.mean():.4g}",
                f"constraints  {self.constraint_kind}, {low:.4g} .. {high:.4g}, above 0 in "
                f"{unsafe:.1%} of states and {self.violating_episodes.mean():.1%} of episodes",
            ]
        )

    def _arrays(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in _FIELDS}

    def _rows(self, rows: slice | npt.NDArray[np.int64]) -> Self:
        # Whole episodes of a checked log need no second check. Skipping it makes episodes[i] fast.
        part = object.__new__(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(
                part, field.name, _frozen(value[rows]) if field.name in _FIELDS else value
            )
        return part


def contents_of(log: OfflineDataset) -> str:
    """Return "verified", "unverified" or "in memory", as `OfflineDataset.verified` says."""
    if log.verified is None:
        return "in memory"
    return "verified" if log.verified else "unverified"


def _joint_provenance(parts: Sequence[OfflineDataset]) -> Mapping[str, Any] | None:
    """Return the provenance of logs that are joined, as `OfflineDataset.concat` describes it."""
    first = parts[0].provenance
    if all(part.provenance == first for part in parts):
        return first
    known = [part.provenance or {} for part in parts]
    shared = {
        name: value
        for name, value in known[0].items()
        if name != "parts" and all(name in one and one[name] == value for one in known)
    }
    apart = [
        {"transitions": len(part), **{name: one[name] for name in one if name not in shared}}
        for part, one in zip(parts, known, strict=True)
    ]
    return {**shared, "parts": apart}


class Episodes(Sequence[OfflineDataset]):
    """The episodes of the log `dataset` as a sequence of logs of one episode, without copies."""

    def __init__(self, dataset: OfflineDataset) -> None:
        self._dataset = dataset

    @overload
    def __getitem__(self, index: int) -> OfflineDataset: ...

    @overload
    def __getitem__(self, index: slice) -> list[OfflineDataset]: ...

    def __getitem__(self, index: int | slice) -> OfflineDataset | list[OfflineDataset]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        try:
            episode = range(len(self))[index]
        except IndexError:
            raise IndexError(f"there are {len(self)} episodes, got index {index}") from None
        start = int(self._dataset.episode_starts[episode])
        return self._dataset._rows(
            slice(start, start + int(self._dataset.episode_lengths[episode]))
        )

    def __len__(self) -> int:
        return self._dataset.num_episodes


def _read_header(
    header: storage.Header,
) -> tuple[ConstraintKind, gym.Space[Any], gym.Space[Any]]:
    expected = {"format", "version", "constraint_kind", "observation_space", "action_space"}
    if set(header) - {"provenance", "constraint_source"} != expected:
        raise ValueError(f"its header must have the fields {sorted(expected)}")
    if (header["format"], header["version"]) != (_FORMAT, _VERSION):
        raise ValueError(
            f"its header must be {_FORMAT!r} version {_VERSION}; a newer safeshield may have "
            "written it"
        )
    kind = header["constraint_kind"]
    if kind not in ("continuous", "binary"):
        raise ValueError("its constraint_kind must be 'continuous' or 'binary'")
    if not isinstance(header.get("provenance", {}), dict):
        raise ValueError("its provenance must be a JSON object")
    return (
        kind,
        flat_observations(
            space_from_json(header["observation_space"]), "its observation_space"
        ).space,
        flat_actions(space_from_json(header["action_space"]), "its action_space").space,
    )


def _rows(
    name: str, points: npt.ArrayLike | Mapping[str, npt.ArrayLike], flat: SpaceCodec
) -> Array:
    """Return points of a space as rows.

    Rows are returned unchanged. Wrong shapes are refused later, by `check_log`.
    """
    if isinstance(points, Mapping) or isinstance(flat.space, gym.spaces.Dict):
        if not isinstance(points, Mapping):
            return as_field(name, points)
        return as_field(name, flat.flatten(points, name)[0])
    array = as_field(name, points)
    if array.ndim > 2 or (array.ndim == 1 and flat.space.shape == ()):
        flattened = array.reshape(len(array), -1)
        flattened.flags.writeable = False
        return flattened
    return array


def _refuse_costs(constraints: npt.ArrayLike, next_constraints: npt.ArrayLike) -> None:
    """Raise ValueError where labels that should be h hold only 0 and 1, as costs do."""
    if all(np.size(h) and np.isin(h, (0, 1)).all() for h in (next_constraints, constraints)):
        raise ValueError(
            "constraints and next_constraints hold only 0 and 1, as costs do, but h <= 0 is safe "
            "by a margin of -h: pass costs=next_constraints and leave both out, so that labels are "
            "binary, or pass constraint_kind='continuous' if h takes these values"
        )


def _box(
    bound: float, values: npt.ArrayLike | Mapping[str, npt.ArrayLike], name: str
) -> gym.spaces.Box:
    if isinstance(values, Mapping):
        raise ValueError(f"{name} is a dict: pass its Dict space as observation_space")
    shape = np.shape(values)
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape (N, width), got {shape}; reshape it")
    return gym.spaces.Box(-bound, bound, (shape[1],), np.float32)


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array
