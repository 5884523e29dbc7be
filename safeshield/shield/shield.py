r"""The shield: safety critics, a threshold, a way to replace actions, and a calibration's record.

A shield with delta >= 0 accepts an action where

    Q_h(s, a) <= -delta

and executes it bit for bit. Otherwise it executes a replacement, by default the acceptable
candidate nearest to the proposed action (see `replacement`). Where no candidate is acceptable, it
executes the one with the lowest Q_h. The report says which of these happened.

With a support test (`with_support`) an action must also fulfil

    score(s, a) >= level,

because Q_h is meaningless for actions that the log does not contain (`support`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.files.signing import UNSIGNED
from safeshield.files.tensors import LOG_SUFFIXES
from safeshield.shield.backup import BackupController
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.file import digest_of, load_shield, save_shield
from safeshield.shield.log_record import (
    DETECTION,
    Hashes,
    Ledger,
    LogRecord,
    about_delta,
    about_values,
)
from safeshield.shield.masks import Mask, agent_masks, check_discrete
from safeshield.shield.readable import ReadableRange
from safeshield.shield.record import Attempt, CalibrationRecord
from safeshield.shield.replacement import (
    CommittedFallback,
    NearestAcceptable,
    NearestSupported,
    Rejected,
    Replacement,
    check_replacement,
    describe,
    float32_box,
    replace_actions,
)
from safeshield.shield.report import FilterReport
from safeshield.shield.sensors import SensorCheck, SensorState, SensorWarning
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import fitted, plain
from safeshield.spaces.schema import check_same_space
from safeshield.spaces.shapes import Actions, Candidates, Flags, Observations, Scalars
from safeshield.values.constraint import (
    ConstraintSource,
    SeveralConstraints,
    Source,
    as_constraint,
    constraints_by_name,
)

if TYPE_CHECKING:
    import torch

    from safeshield.calibration.promises import Promise
    from safeshield.calibration.splicing import Restore
    from safeshield.data.dataset import OfflineDataset
    from safeshield.evaluation.diagnosis import Diagnosis
    from safeshield.files.signing import PrivateKey, PublicKey
    from safeshield.rollouts.copies import Identity
    from safeshield.shield.export import OnnxContents
    from safeshield.shield.tensors import TensorConstraint, TorchShield
    from safeshield.spaces.generic import Env, VectorEnv
    from safeshield.support import SupportScore, SupportTest

BUILTIN = "builtin:"
"""How a text begins that names a ready-made shield, in place of a path."""


class UncalibratedShieldWarning(UserWarning):
    """A shield without a calibrated threshold is used; it has no promise."""


class OtherEnvironmentWarning(UserWarning):
    """The environment is not that of the shield's record, or it cannot be compared with it."""


class NoReportWarning(UserWarning):
    """An environment reports neither h nor a cost, so that a violation cannot be noticed."""


@dataclass(eq=False, repr=False)
class Shield:
    """A filter of an agent's actions, for NumPy arrays; filtering does not change the shield.

    Args:
        model: Critics, fallback, spaces and units.
        delta: Distance of the threshold -delta from 0, in units of h, at least 0.
        record: The record of the calibration; None for an uncalibrated shield.
        trained_by: Free text for the shield's file, such as the name of the algorithm.
        replacement: The strategy that replaces rejected actions; see `replacement`.
        support: A support test that an accepted action must pass in addition to the test of its
            value; None for no such test. See `with_support`.
        attempts: Earlier calibrations of this shield. `calibrate` adds each one, also where it
            fails, and every changed copy keeps them.
        log_records: What logs show of this shield (`calibrate_from_log`). A changed copy keeps only
            those that still hold for it.
        ledger: The statements about logs that were made with this shield. Every changed copy keeps
            them.
        training_episodes: (E,) hashes of the episodes from which the shield was made
            (`OfflineDataset.episode_hashes`); None where they are not known.
        sensors: Checks for frozen observations, jumps and observations that are too old; None for
            none. See `with_sensors`.
    """

    model: SafetyModel
    delta: float = 0.0
    record: CalibrationRecord | None = None
    trained_by: str = ""
    replacement: Replacement = field(default_factory=NearestAcceptable)
    support: SupportTest | None = None
    attempts: tuple[Attempt, ...] = ()
    log_records: tuple[LogRecord, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    training_episodes: Hashes | None = None
    sensors: SensorCheck | None = None
    signature: str = field(default=UNSIGNED, init=False)
    """What is known of the file that the shield was loaded from: "unsigned", "signed, not verified"
    or "signature verified". A changed copy is "unsigned"."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.delta) and self.delta >= 0):
            raise ValueError(f"delta must be finite and at least 0, got {self.delta}")
        if self.record is not None and self.record.delta != self.delta:
            raise ValueError(
                f"record was made for delta {self.record.delta}, the shield has {self.delta}; "
                "drop the record or calibrate again"
            )
        if about_delta(self.log_records, self.delta) != self.log_records:
            raise ValueError(
                f"log_records were made for deltas {[one.delta for one in self.log_records]}, the "
                f"shield has {self.delta}; use with_delta(), which drops them"
            )
        self.delta = float(self.delta)
        if self.record is not None and len(self.record.attempts) > len(self.attempts):
            self.attempts = self.record.attempts
        codec = self.model.action_codec
        check_replacement(self.replacement, codec)
        self._strategy = self.replacement
        if self.support is not None:
            if isinstance(self.replacement, NearestAcceptable):
                self._strategy = NearestSupported(self.support, self.replacement.candidates)
            elif not isinstance(self.replacement, CommittedFallback | BackupController):
                raise ValueError(
                    "a shield with a support test replaces actions by NearestAcceptable, "
                    "CommittedFallback or BackupController, got "
                    f"{describe(self.replacement)}: other ways do not look for what the log has "
                    "shown"
                )
        replaced = describe(self.replacement)
        if self.record is not None and self.record.replacement != replaced:
            raise ValueError(
                f"record was made for replacement {self.record.replacement or 'by default'}, the "
                f"shield has {replaced or 'the default'}; use with_replacement(), which drops the "
                "record, or calibrate again"
            )
        if self.sensors is not None:
            self.sensors.check_fits(self.model.observation_codec)
        self._low, self._high, self._discrete = codec.low, codec.high, codec.discrete
        self._bounds = tuple(zip(codec.low.tolist(), codec.high.tolist(), strict=True))
        self._box = float32_box(codec)
        self._readable = ReadableRange(self.model.observation_codec, self.model.scaling)
        self._warned = False

    def __repr__(self) -> str:
        promise = "uncalibrated" if self.record is None else f"epsilon {self.record.epsilon:g}"
        if self.record is not None or self.log_records:
            promise += f", {self.signature}"
        replaced = describe(self.replacement)
        return (
            f"{type(self).__name__}(delta={self.delta:.4g}, {promise}, "
            f"obs {self.model.observation_codec.width}, act {self.model.action_codec.width}"
            f"{replaced and ', '}{replaced})"
        )

    # -- spaces, threshold and changed copies ----------------------------------------------------

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of the observations that the shield was trained on."""
        return self.model.observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of the actions that the shield was trained on."""
        return self.model.action_space

    @property
    def observation_keys(self) -> list[str] | None:
        """Entries of a Dict observation that the shield reads; None for other observations."""
        space = self.observation_space
        return list(space.spaces) if isinstance(space, gym.spaces.Dict) else None

    @property
    def threshold(self) -> float:
        """The number that Q_h must not exceed: -delta."""
        return 0.0 - self.delta

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the critics, the replacement and the support test.

        They do not depend on delta, nor on what was found out about the shield.
        """
        return digest_of(self)

    def with_delta(self, delta: float) -> Self:
        """Return a copy whose threshold is -delta, in units of h, without the record."""
        kept = about_delta(self.log_records, float(delta))
        return replace(self, delta=float(delta), record=None, log_records=kept)

    def with_constraint(
        self, source: Source | Mapping[str, Source] | Sequence[Source] | None
    ) -> Self:
        """Return a copy that takes h of a state from another source.

        The record is kept only where the source has the name of the shield's own. A function that
        is passed to a shield whose source is not registered in this process gets that name.

        Args:
            source: A function from a batch of n observations to h (n,); or its registered name, or
                a `ConstraintSource`. None means the network's estimate of h. For a shield of
                several constraints, a mapping from some of its names to functions or sources; the
                units remain.

        Raises:
            TypeError: `source` is of another kind.
            ValueError: `source` holds several constraints, and a name is not one of the shield's.

        >>> import gymnasium, safeshield.envs
        >>> from safeshield import ShieldConfig, ShieldTrainer, collect
        >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
        >>> trainer = ShieldTrainer(ShieldConfig(critic_hidden=(16,), behaviour_hidden=(16,)))
        >>> shield = trainer.fit(log, steps=30).shield()
        >>> shield.constraint, shield.with_constraint(None).constraint
        ('Boat@1', None)
        """
        own = self.model.constraint
        if isinstance(source, Mapping | list | tuple):
            parts = constraints_by_name(source)
            if isinstance(own, SeveralConstraints):
                known: ConstraintSource | None = own.with_sources(parts)
            elif len(parts) == 1:
                known = parts[0]
            else:
                raise ValueError(
                    "source must be one constraint for a shield that was not trained with several, "
                    f"got {[part.name for part in parts]}: the units of several come from a log; "
                    "train a shield on log.with_constraint({name: function, ...})"
                )
        else:
            known = as_constraint(source, "" if own is None or own.available else own.name)  # type: ignore[arg-type]
        model = replace(self.model, constraint=known)
        if known == own:
            return replace(self, model=model)
        return replace(self, model=model, record=None, log_records=())

    @property
    def constraint(self) -> str | None:
        """Name of the source of h; None where a network estimates h."""
        return None if self.model.constraint is None else self.model.constraint.name

    def with_replacement(self, replacement: Replacement) -> Self:
        """Return a copy that replaces actions in another way, without the record.

        Args:
            replacement: A strategy of `safeshield.shield`, such as ``ProjectedGradient(steps=8)``.

        Raises:
            TypeError: `replacement` is no strategy, or does not work in this action space.
        """
        return replace(
            self,
            replacement=replacement,
            record=None,
            log_records=about_values(self.log_records),
        )

    def with_backup(self, controller: object) -> Self:
        """Return a copy that executes a backup controller where it rejects an action.

        The record is kept only where the controller has the name of the shield's own. A controller
        that is passed to a shield whose controller is not registered in this process gets that
        name. The safety values are not changed: they are those of the controller that
        `ShieldConfig.backup` named in training, so train again for another controller.

        Args:
            controller: A function from a batch of n observations to n actions; or an object with
                Stable-Baselines3's ``predict``, a registered name, or a `BackupController`.

        Raises:
            TypeError: `controller` is of another kind.
        """
        own = self.replacement if isinstance(self.replacement, BackupController) else None
        known = BackupController.of(controller, "" if own is None or own.available else own.name)
        if known is None:
            raise TypeError(
                "controller must be a function, a name or a BackupController, got None; "
                "with_replacement(CommittedFallback()) makes a shield without a controller"
            )
        return self.with_replacement(known) if known != own else replace(self, replacement=known)

    def with_support(
        self,
        held_out: OfflineDataset,
        alpha: float = 0.1,
        share: float = 0.01,
        score: str | SupportScore | None = None,
    ) -> Self:
        """Return a copy that also tests whether an action looks like the log's.

        The copy accepts an action only where Q_h <= -delta and the action's score reaches a level.
        The level is set so that, with probability at least 1 - alpha, a new episode of the logging
        policy has at most the share `share` of its steps below the level (split conformal
        prediction over episodes: `calibration.support`). The copy has no record, because the
        promise was made for another shield. Calibrate the copy again.

        Args:
            held_out: Episodes of the logging policy that were NOT used in training.
            alpha: Largest probability that an episode has more than `share` of its steps below the
                level. At least 1 / alpha - 1 episodes are needed.
            share: Share of an episode's steps whose scores may be below the level.
            score: "noise" (default for a Box of actions), "probability" (default for discrete
                actions), "ensemble", or a `SupportScore` of your own.

        Raises:
            TypeError, ValueError: See `calibration.support.calibrate_support`.
        """
        from safeshield.calibration.support import calibrate_support

        test = calibrate_support(self.model, held_out, alpha, share, score)
        seen = self.training_episodes
        if seen is not None:
            # These episodes set the level of the test, so they cannot show what it does.
            seen = np.union1d(seen, held_out.episode_hashes)
        kept = about_values(self.log_records)
        return replace(self, support=test, record=None, log_records=kept, training_episodes=seen)

    def with_sensors(self, sensors: SensorCheck | None) -> Self:
        """Return a copy that checks observations for faults of the sensors.

        The wrappers, `ShieldedPolicy`, `calibrate`, `evaluate` and `diagnose` then check every
        observation, and a loop of your own does with `sensor_state`. Where the checks only warn,
        the copy keeps the record. Where the shield falls back on a check, the record is dropped,
        because other actions are executed. Calibrate the copy again.

        Args:
            sensors: The check, such as ``SensorCheck.from_log(log)``; None for none.

        Raises:
            ValueError: The limits are not those of the shield's observations.
        """
        before, after = (
            (False,) * 3 if one is None else one.falls_back for one in (self.sensors, sensors)
        )
        if before == after and (not any(after) or sensors == self.sensors):
            return replace(self, sensors=sensors)
        kept = about_values(self.log_records)
        return replace(self, sensors=sensors, record=None, log_records=kept)

    def sensor_state(self, count: int = 1, *, quiet: bool = False) -> SensorState | None:
        """Return what the checks of `sensors` remember of `count` environments; None without any.

        Pass it to each call of `filter` with a batch of `count` observations (by default a single
        observation) of these environments, and call its ``begin`` where an
        episode begins. With `quiet` it does not warn.
        """
        if self.sensors is None or not self.sensors.active:
            return None
        return SensorState(self.sensors, count, self.model.observation_codec.width, quiet=quiet)

    # -- values ---------------------------------------------------------------------------------

    def value(
        self,
        observation: Batch,
        action: Batch | None = None,
        *,
        constraint: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
    ) -> Scalars | np.floating:
        """Return V_h(s), or Q_h(s, a): one number () or a batch (n,), in units of h.

        Args:
            observation: One observation, or a batch as Gymnasium's vector environments make it:
                (n, *shape), (n,) for a Discrete, a dict of such arrays for a Dict.
            action: One action or a batch, in the same form; None for V_h.
            constraint: h of the states, () or (n,), for a shield whose source of h this process
                has not registered; of several constraints, a mapping from each name to its h_k.
                NaN means that h is not known.

        Raises:
            LookupError: The shield's source of h is not registered, and `constraint` is None; or
                its backup controller is not registered.
            ValueError: An argument has a wrong shape, or `constraint` is given to a shield that
                does not need it.

        The value is +infinity where the observation is not readable, or the action is not finite or
        outside the box.
        """
        rows, single = self.observation_rows(observation)
        actions = None if action is None else self.action_rows(action)[0]
        if actions is not None and len(actions) != len(rows):
            raise ValueError(f"got {len(rows)} observations and {len(actions)} actions")
        values = self.row_values(rows, actions, self._given(constraint, len(rows)))
        return values[0] if single else values

    def row_values(
        self,
        rows: Observations,
        actions: Actions | None = None,
        constraint: Scalars | None = None,
    ) -> Scalars:
        """Return V_h (n,) of observations, or Q_h (n,) of actions in them, as `value` does.

        Args:
            rows: (n, obs) observations, as rows of `spaces.rows`.
            actions: (n, act) actions, one for each observation; None for V_h.
            constraint: (n,) h of the states, or (n, k) of k constraints; None where the shield's
                source computes it.
        """
        states = self.states(rows, constraint)
        if actions is None:
            return self.state_values(states, rows)
        known = self.known(states, rows) & self.model.action_codec.contains(actions)
        values = self.model.action_values(states, np.where(known[:, None], actions, self._low))
        return _where_known(known, values)

    def state_values(self, states: StateValue, rows: Observations) -> Scalars:
        """Return V_h (n,) of observations, infinity where they are not readable or h is not known.

        Args:
            states: Result of `states` for the same rows.
            rows: (n, obs) the raw observations.
        """
        return _where_known(self.known(states, rows), states.value)

    def readable(self, rows: Observations) -> Flags:
        """Return whether observations are readable, (n,).

        An observation is readable where its entries are finite and not extremely far from the log,
        and whole numbers where its space has whole numbers.

        Args:
            rows: (n, obs) observations, as rows of `spaces.rows`.
        """
        return self._readable.rows(rows)

    def known(self, states: StateValue, rows: Observations) -> Flags:
        """Return whether observations (n, obs) are readable and determine h, (n,).

        Args:
            states: Result of `states` for the same rows.
            rows: (n, obs) the raw observations.
        """
        readable = self.readable(rows)
        return readable if states.known is None else readable & states.known

    def states(self, rows: Observations, constraint: Scalars | None = None) -> StateValue:
        """Return V_h and the network inputs of n observations, which `filter_rows` takes.

        The log's mean takes the place of entries that are not readable, and the network's estimate
        that of h.

        Args:
            rows: (n, obs) observations, as rows of `spaces.rows`.
            constraint: (n,) h of the states, or (n, k) of k constraints; None where the shield's
                source computes it.
        """
        self._require_backup()
        readable = self._readable.rows(rows)
        if readable.all():
            return self.model.states(rows, constraint)
        near = self._readable.entries(rows)
        rows = np.where(near, rows, self.model.scaling.observation_mean)
        return self.model.states(rows, constraint, readable)

    def certified(self, observation: Batch) -> Flags | np.bool_:
        """Return whether states are certified: V_h(s) <= -delta and the shield is calibrated.

        The result is () for one `observation` and (n,) for a batch.
        """
        inside = np.asarray(self.value(observation)) <= self.threshold
        flags = inside & (self.record is not None)
        return flags if flags.ndim else np.bool_(flags)

    # -- accept and filter ----------------------------------------------------------------------

    def filter(
        self,
        observation: Batch,
        action: Batch,
        *,
        constraint: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
        stamp: npt.ArrayLike | None = None,
        sensors: SensorState | None = None,
    ) -> tuple[npt.NDArray[Any], FilterReport]:
        """Return the action to execute, and the report on it.

        The argument is read once and converted to the dtype of the action space. An accepted action
        is returned exactly as it was judged, and shares no memory with the argument. So an array of
        that dtype comes back unchanged, bit for bit.
        An action outside the box is first clipped into it, which counts as an intervention. NaN is
        never accepted. Where an entry of the observation is not finite, or not a whole number where
        its space has whole numbers, the log's mean takes its place, the fallback acts, and the
        report is not `valid`.

        Args:
            observation: One observation, or a batch (see `value`).
            action: One action, or a batch.
            constraint: h of the states, see `value`.
            stamp: () or (n,) `time.monotonic()` at which the observations were measured, for a
                shield whose `sensors` limit the age. An older observation is not readable, nor is
                one without a stamp where an earlier one with the same `sensors` had one.
            sensors: What ``sensor_state(n)`` returned, for the checks that compare an observation
                with earlier ones. Without it only the age is checked.

        Returns:
            The action to execute in the form of `action`, and the report: for a batch of n actions,
            arrays (n,) of verdicts.

        Raises:
            TypeError: `sensors` is not what `sensor_state` returns.
            ValueError: An argument has a wrong shape, `stamp` is given to a shield that does not
                limit the age, or `sensors` is of a shield with other checks or of another number of
                environments.
        """
        proposed = fitted(plain(action), np.dtype(self.action_space.dtype))
        actions, single = self.action_rows(proposed)
        rows, _ = self.observation_rows(observation)
        if len(actions) != len(rows):
            raise ValueError(f"got {len(rows)} observations and {len(actions)} actions")
        if stamp is not None or sensors is not None:
            rows = self._checked(rows, stamp, sensors)
        if sensors is None and self.sensors is not None:
            self._warn_of_checks(self.sensors, stamp is not None)
        states = self.states(rows, self._given(constraint, len(rows)))
        executed, report = self.filter_rows(states, rows, actions)
        if sensors is not None:
            sensors.acted(executed)
        if single:
            one = report.row(0)
            sent = self.points(executed)[0] if one.intervened else proposed
            return _in_dtype(sent, self.action_space), one
        sent = self.points(executed) if report.intervened.any() else proposed
        return _in_dtype(sent, self.action_space), report

    def _checked(
        self, rows: Observations, stamp: npt.ArrayLike | None, sensors: SensorState | None
    ) -> Observations:
        """Return the observations (n, obs), with NaN where the shield falls back on a check."""
        limit = None if self.sensors is None else self.sensors.age
        if stamp is not None and limit is None:
            raise ValueError(
                f"stamp needs a limit of the age, got stamp={stamp} for a shield without one: "
                "with_sensors(SensorCheck(age=seconds)) sets it"
            )
        if not isinstance(sensors, SensorState | None):
            raise TypeError(
                f"sensors must be what shield.sensor_state({len(rows)}) returned, kept from step "
                f"to step, got {type(sensors).__name__}"
            )
        if sensors is not None and sensors.sensors != self.sensors:
            raise ValueError(
                "sensors must be the state of this shield's checks, got that of a shield with "
                f"other checks: keep shield.sensor_state({len(rows)}) of this shield"
                if self.sensors is not None
                else "sensors is the state of a shield with checks, and this shield has none: "
                "leave it out, or add the checks by with_sensors()"
            )
        if sensors is None:
            sensors = SensorState(SensorCheck(age=limit), len(rows), rows.shape[1])
        return sensors.read(rows, stamp)

    @staticmethod
    def _warn_of_checks(check: SensorCheck, stamped: bool) -> None:
        """Warn of the checks that do not run in a call of `filter` without `sensors`.

        `stamped` is whether a stamp was passed.
        """
        limits = {"frozen": check.frozen, "jump": check.jump, "age": check.age}
        idle = [name for name, limit in limits.items() if limit is not None]
        if stamped:
            idle.remove("age")
        if not idle:
            return
        kept = "sensors=state, where state = shield.sensor_state(n) is kept from step to step"
        stamp = "stamp=time.monotonic() of the measurement"
        needs = [] if idle == ["age"] else [kept]
        needs += [stamp] if "age" in idle else []
        warnings.warn(
            f"these checks of the shield's sensors do not run: {', '.join(idle)}; pass "
            f"{', and '.join(needs)}",
            SensorWarning,
            stacklevel=3,
        )

    def accepts(
        self, states: StateValue, action: Actions, threshold: float | None = None
    ) -> float | None:
        """Return Q_h of one action in one state if the action is accepted, else None.

        This is a faster test for the common case; `filter_rows` gives the whole report. The state
        must come from a readable observation.

        Args:
            states: Result of `states` for the one observation.
            action: (act,) the proposed action, as a row.
            threshold: The number that Q_h must not exceed; by default the shield's own.
        """
        # Comparisons with NaN are false, so an action with a NaN is rejected here.
        for entry, (low, high) in zip(action.tolist(), self._bounds, strict=True):
            if not low <= entry <= high or (self._discrete and entry % 1):
                return None
        value = self.model.action_value(states, action)
        if not value <= (self.threshold if threshold is None else threshold):
            return None
        if self.support and not self.support.accepts(self.model, states, action[None])[0]:
            return None
        return value

    def filter_rows(
        self,
        states: StateValue,
        rows: Observations,
        actions: Actions,
        threshold: float | Scalars | None = None,
    ) -> tuple[npt.NDArray[Any], FilterReport]:
        """Return the executed actions (n, act) and the report on them, as `filter` does for points.

        Args:
            states: Result of `states` for the same rows.
            rows: (n, obs) the raw observations.
            actions: (n, act) the proposed actions.
            threshold: () or (n,) the number that Q_h must not exceed; by default the shield's own.
        """
        given = np.asarray(self.threshold if threshold is None else threshold, np.float64)
        limit = np.broadcast_to(given, (len(actions),))
        self.warn_if_uncalibrated()
        readable = self.known(states, rows)
        known = readable & np.isfinite(actions).all(axis=-1)
        inside = self.model.action_codec.contains(actions)
        values = self.model.action_values(states, np.where(inside[:, None], actions, self._low))
        proposed_values = _where_known(inside & readable, values)
        accepted = proposed_values <= limit
        supported = np.ones(len(actions), dtype=bool)
        if self.support is not None:
            supported = self._supported(states, actions, accepted)
            accepted = accepted & supported
        executed, acceptable = actions, accepted
        if not accepted.all():
            reject = np.flatnonzero(~accepted)
            # A replacement need not be made of integers where the proposed action is.
            executed = actions.astype(np.result_type(actions, np.float32))
            values, acceptable = values.copy(), accepted.copy()
            rejected = Rejected.of(
                self.model,
                states.take(reject),
                rows[reject],
                actions[reject],
                known[reject],
                readable[reject],
                limit[reject],
                self._box,
            )
            picked, picked_values = replace_actions(self._strategy, rejected)
            if self.support is not None:
                passes = self._supported(rejected.states, picked, rejected.seen)
                again = np.flatnonzero(~passes)
                if self._strategy is self.replacement and len(again):
                    # This strategy keeps a clipped proposal with an acceptable value, in the
                    # support or not. With the limit -inf it keeps none.
                    none = replace(rejected.take(again), limit=np.full(len(again), -np.inf))
                    picked[again], picked_values[again] = replace_actions(self._strategy, none)
                    passes[again] = self._supported(none.states, picked[again], none.seen)
                supported[reject] = passes
            executed[reject] = picked
            values[reject] = _where_known(rejected.seen, picked_values)
            acceptable[reject] = (values[reject] <= limit[reject]) & supported[reject]
        return executed, FilterReport(
            intervened=~accepted,
            value=values,
            proposed_value=proposed_values,
            state_value=_where_known(readable, states.value),
            acceptable=acceptable,
            valid=known,
            supported=supported,
        )

    def acceptable(
        self,
        states: StateValue,
        rows: Observations,
        candidates: Candidates,
        threshold: float | Scalars | None = None,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.floating]]:
        """Return which of c actions in each of n states are acceptable, and their Q_h: (n, c) each.

        Args:
            states: Result of `states` for the same rows.
            rows: (n, obs) the raw observations.
            candidates: (n, c, act) the actions.
            threshold: () or (n,) the number that Q_h must not exceed; by default the shield's own.

        Q_h is infinite for a candidate that is not in the action space. Where an observation is not
        readable, nothing is accepted, and Q_h is that of the state which takes its place.
        """
        limit = np.asarray(self.threshold if threshold is None else threshold, np.float64)
        inside = self.model.action_codec.contains(candidates)
        known = np.where(inside[..., None], candidates, self._low)
        values = _where_known(inside, self.model.candidate_values(states, known))
        good = (values <= limit[..., None]) & self.known(states, rows)[:, None]
        if self.support is not None and good.any():
            at, which = np.nonzero(good)
            good[at, which] = self.support.accepts(
                self.model, states.take(at), candidates[at, which]
            )
        return good, values

    def acceptable_choices(
        self,
        states: StateValue,
        rows: Observations,
        threshold: float | Scalars | None = None,
    ) -> tuple[Mask, npt.NDArray[np.floating]]:
        """Return which of all c discrete actions may be taken in n states, and their Q_h: (n, c).

        These are the acceptable actions, in the order of `SpaceCodec.choices`. Where no action is
        acceptable, or the observation is not readable, the only one is the action that `filter`
        would execute. So each row has a True.

        Args:
            states: Result of `states` for the same rows.
            rows: (n, obs) the raw observations.
            threshold: () or (n,) the number that Q_h must not exceed; by default the shield's own.
        """
        choices = self.model.action_codec.choices
        every = np.broadcast_to(choices, (len(rows), *choices.shape))
        accepted, values = self.acceptable(states, rows, every, threshold)
        nothing = np.flatnonzero(~accepted.any(axis=1))
        least = values[nothing].argmin(axis=1)
        if self.support is not None and len(nothing):
            # With a support test, only `filter_rows` can tell which action would be executed.
            given = self.threshold if threshold is None else threshold
            limit = np.broadcast_to(np.asarray(given, np.float64), (len(rows),))[nothing]
            part = states.take(nothing)
            executed, _ = self.filter_rows(part, rows[nothing], choices[least], limit)
            least = (executed[:, None] == choices).all(axis=-1).argmax(axis=1)
        accepted[nothing, least] = True
        return accepted, values

    def action_mask(self, observation: Batch, threshold: float | Scalars | None = None) -> Mask:
        """Return which discrete actions may be taken: bool (k,), for a batch (n, k).

        For a Discrete there is an entry for each action, from the lowest; it is True where Q_h <=
        -delta. Where no action is acceptable, or the observation is not readable, only the action
        that `filter` would execute is True. So an agent always has an action.

        For a MultiDiscrete or MultiBinary the masks of all entries are joined, as sb3-contrib takes
        them. In a mask of this form, the allowed values of one entry cannot depend on another
        entry. It therefore allows only values of which ALL combinations are acceptable, and leaves
        out some acceptable combinations.

        Gymnasium's ``action_space.sample(mask)`` takes ``mask.astype(np.int8)``, for a
        MultiDiscrete as a tuple: ``tuple(np.split(mask, np.cumsum(space.nvec)[:-1]))``.

        Args:
            observation: One observation, or a batch (see `value`).
            threshold: () or (n,) the number that Q_h must not exceed; by default the shield's own.

        Raises:
            TypeError: Actions are not discrete.
            ValueError: The observation has a wrong shape.
        """
        rows, single = self.observation_rows(observation)
        masks = self.mask_rows(self.states(rows), rows, threshold)
        return masks[0] if single else masks

    def mask_rows(
        self,
        states: StateValue,
        rows: Observations,
        threshold: float | Scalars | None = None,
    ) -> Mask:
        """Return `action_mask` (n, k) for observations whose `states` are known already.

        The arguments are those of `acceptable_choices`: `states`, `rows` and `threshold`.

        Raises:
            TypeError: Actions are not discrete.
        """
        codec = self.model.action_codec
        check_discrete(codec)
        return agent_masks(*self.acceptable_choices(states, rows, threshold), codec)

    def _given(
        self, constraint: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None, count: int
    ) -> Scalars | None:
        """Return h (count,) that a caller passes, or (count, k) of k constraints, after a check."""
        if constraint is None:
            return None
        source = self.model.constraint
        if source is None or source.available:
            why = "a network estimates h" if source is None else f"'{source.name}' computes h"
            raise ValueError(
                f"constraint must be left out, because in this shield {why}; "
                "with_constraint(ConstraintSource(name)) makes a shield that takes h from its "
                "caller, without a record"
            )
        if not isinstance(constraint, Mapping):
            if len(source.names) > 1:
                raise ValueError(
                    f"constraint must be a mapping from the names {list(source.names)} to numbers, "
                    f"each in its own units, got {type(constraint).__name__}"
                )
            return _numbers("constraint", constraint, count)
        missing = [name for name in source.names if name not in constraint]
        if missing:
            raise ValueError(
                f"constraint must have the names {list(source.names)}, but {missing} are missing; "
                "pass the number of each"
            )
        each = [_numbers(f"constraint[{k!r}]", constraint[k], count) for k in source.names]
        return np.stack(each, axis=1) if len(each) > 1 else each[0]

    def _supported(self, states: StateValue, actions: Actions, asked: Flags) -> Flags:
        """Return whether actions (n, act) pass the support test, (n,); False where not asked."""
        supported = np.zeros(len(actions), dtype=bool)
        rows = np.flatnonzero(asked)
        if self.support is not None and len(rows):
            supported[rows] = self.support.accepts(self.model, states.take(rows), actions[rows])
        return supported

    def warn_if_uncalibrated(self) -> None:
        """Warn, once for each shield, that its threshold is not calibrated."""
        if self.record is None and not self._warned:
            self._warned = True
            warnings.warn(
                "this shield is not calibrated: it filters with delta "
                f"{self.delta:g} and promises nothing; call calibrate()",
                UncalibratedShieldWarning,
                stacklevel=4,
            )

    def to_torch(
        self,
        device: str | torch.device = "cpu",
        *,
        constraint_fn: TensorConstraint | None = None,
        budget: int | None = None,
    ) -> TorchShield:
        """Return the shield for batches of PyTorch tensors on a device.

        The result has `filter`, `value` and `certified` for n observations and actions that are
        tensors. It decides as this shield does, except that numbers differ by rounding. Later
        changes of this shield do not affect it.

        Args:
            device: Device of observations and actions, such as "cuda".
            constraint_fn: Function of n observations (tensors) to h (n,), for a shield whose h
                comes from a named source. Without it, the registered function is used where it
                takes and returns tensors; else pass `constraint` to `filter`.
            budget: Largest number K of rows in a call whose actions are replaced by this shield's
                strategy. All shapes are then fixed, so that the call can be captured in a CUDA
                graph or compiled. The K rejected actions of the highest Q_h are replaced so; other
                rejected ones are replaced by the fallback's action, and the report marks them. None
                replaces any number of actions, and waits for the device once.

        Raises:
            TypeError, ValueError: See `shield.tensors.TorchShield`; or the shield has `sensors`.

        >>> import gymnasium, torch, safeshield.envs
        >>> from safeshield import ShieldConfig, ShieldTrainer, collect
        >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
        >>> trainer = ShieldTrainer(ShieldConfig(critic_hidden=(16,), behaviour_hidden=(16,)))
        >>> shield = trainer.fit(log, steps=30).shield().with_constraint(None)
        >>> executed, report = shield.to_torch().filter(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> executed.shape, report.valid.tolist()
        (torch.Size([4, 2]), [True, True, True, True])
        """
        from safeshield.shield.tensors import TorchShield

        if self.sensors is not None:
            raise ValueError(
                "to_torch() makes a shield that remembers nothing of earlier observations, so it "
                f"cannot check them, got sensors={self.sensors!r:.60}: leave the checks out by "
                "with_sensors(None)"
            )
        return TorchShield(self, device, constraint_fn, budget)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        policy: object = None,
        *,
        deterministic: bool = True,
        policy_name: str | None = None,
    ) -> OnnxContents:
        """Write the shield, alone or with a policy, as one ONNX graph, which needs no Python.

        The graph takes observations, the proposed actions where it has no policy, and h where a
        named source tells it. It returns the executed actions and the verdicts. docs/export.md
        lists inputs, outputs and metadata. The graph decides as this shield does, except that
        numbers differ by rounding.

        Args:
            path: File to write, .onnx.
            policy: The policy that proposes actions: an agent of this package, a model of
                Stable-Baselines3 with MlpPolicy (PPO, A2C, SAC, TD3, DQN), a `torch.nn.Module` from
                n observations to n actions, or the path of an .onnx file. docs/export.md has their
                shapes and dtypes. None makes the proposed action an input of the graph.
            deterministic: Whether the policy acts in its deterministic mode. Otherwise the
                graph has a further input, the noise that the policy samples with.
            policy_name: Name of the policy in the record; by default as in `calibrate`.

        Returns:
            The metadata of the graph. Its `promise` is that of the record where the record holds
            for this policy and this mode, and says why there is none otherwise.

        Raises:
            ImportError: The extra `onnx` is not installed.
            NotImplementedError: No graph can be written for this shield or policy, or ONNX Runtime,
                where it is installed, does not run it; the message says for which part, and what to
                do.
            ValueError: The name does not end in .onnx, or the policy is of other spaces, fails, or
                is a damaged file.
            OSError: The file cannot be written.
        """
        from safeshield.shield.export import export_onnx

        return export_onnx(self, path, policy, deterministic=deterministic, policy_name=policy_name)

    # -- environments ---------------------------------------------------------------------------

    def check_fits(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        env: Identity | None = None,
    ) -> bool:
        """Raise unless an environment's spaces are the shield's.

        A warning is issued where the shield was calibrated in another environment, and where the
        environment is in other processes that do not tell everything of it.

        Args:
            observation_space: Observation space of one environment.
            action_space: Action space of one environment.
            env: What is known of the environment; None compares the spaces only.

        Returns:
            False where the environment is known to be another one than that of the record, else
            True. In another environment no state may be called certified.

        Raises:
            ValueError: The spaces differ; the message shows both.
            LookupError: The shield's backup controller is not registered.
        """
        self._require_backup()
        check_same_space(
            self.observation_space,
            observation_space,
            "observation_space",
            unbounded_matches_any=True,
        )
        check_same_space(self.action_space, action_space, "action_space")
        differs = [] if self.record is None or env is None else self.record.differences(env)
        if not differs:
            if self.record is not None and env is not None and env.untold:
                warnings.warn(
                    f"other processes step this environment, and its {' and '.join(env.untold)} "
                    "cannot be compared with those of the shield's calibration: "
                    "'shield/certified' trusts you that they are the same. Make the environments "
                    "by gymnasium.make_vec, which tells the arguments, or in this process",
                    OtherEnvironmentWarning,
                    stacklevel=4,
                )
            return True
        warnings.warn(
            f"this shield was not calibrated in this environment: {'; '.join(differs)}. Here its "
            "record promises nothing; calibrate it in the environment that it will protect",
            OtherEnvironmentWarning,
            stacklevel=4,
        )
        return False

    def _require_backup(self) -> None:
        # A missing controller must be noticed before it is needed.
        if isinstance(self.replacement, BackupController):
            self.replacement.require()

    def observation_rows(self, observations: Batch) -> tuple[npt.NDArray[Any], bool]:
        """Return `observations` as rows (n, obs), and whether they are a single one."""
        return self.model.observation_codec.flatten(observations, "observation")

    def action_rows(self, actions: Batch) -> tuple[npt.NDArray[Any], bool]:
        """Return `actions` as rows (n, act), and whether they are a single one."""
        return self.model.action_codec.flatten(actions, "action")

    def points(self, rows: Actions) -> npt.NDArray[Any]:
        """Return rows (n, act) as a batch of actions (n, *shape)."""
        return self.model.action_codec.unflatten(rows)

    # -- calibration and files ------------------------------------------------------------------

    def calibrate(
        self,
        env: Env | VectorEnv,
        *,
        epsilon: float | None = None,
        confidence: float = 0.99,
        promise: Promise | None = None,
        policy: object = None,
        policy_name: str | None = None,
        deterministic: bool = False,
        deltas: Sequence[float] | None = None,
        episodes: int | None = None,
        seed: int = 0,
        num_envs: int | None = None,
        workers: int = 0,
        ray: str | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """Return a copy with a calibrated delta and the record of the calibration.

        Delta is tested in episodes of `env` in which the shield filters the actions of `policy`, or
        of the default proposers. The other arguments are the promised rate `epsilon` or another
        `promise`, its `confidence`, `policy_name` and `deterministic` of the policy, the `deltas`
        and `episodes` of the tests, `seed`, `num_envs`, `workers`, `ray` and `progress_bar`.
        `calibration.calibrate.calibrate` describes them, the procedure and the promise. Both this
        shield and the copy remember the attempt, in `attempts`.
        """
        from safeshield.calibration.calibrate import calibrate, remembering

        with remembering(self):
            record = calibrate(
                self,
                env,
                epsilon=epsilon,
                confidence=confidence,
                promise=promise,
                policy=policy,
                policy_name=policy_name,
                deterministic=deterministic,
                deltas=deltas,
                episodes=episodes,
                seed=seed,
                num_envs=num_envs,
                workers=workers,
                ray=ray,
                progress_bar=progress_bar,
            )
        self.attempts = record.attempts
        kept = about_delta(self.log_records, record.delta)
        return replace(self, delta=record.delta, record=record, log_records=kept)

    def calibrate_from_log(
        self,
        held_out: OfflineDataset,
        method: str = DETECTION,
        *,
        confidence: float = 0.95,
        alpha: float | None = None,
        lead: int | None = None,
        epsilon: float | None = None,
        policy: object = None,
        policy_name: str | None = None,
        deterministic: bool | None = None,
        horizon: int | None = None,
        simulator: object = None,
        restore: Restore | None = None,
        seed: int | None = None,
    ) -> Self:
        """Return a copy with a record of what whole episodes of a log show of the shield.

        No environment is needed, except for "spliced". Nothing of the shield may have been learned
        from `held_out`, and `method` is "detection", "shadow", "spliced", "trial" or "residuals".
        With "detection" the copy has the delta that the log chooses, otherwise this shield's. The
        record is the last of the copy's `log_records`, and its `statement` says in words what it
        covers. It never makes ``info["shield/certified"]`` True. Both this shield and the copy
        remember the statement, in `ledger`.

        `calibration.from_log.calibrate_from_log` describes the methods and the arguments:
        `confidence`, `alpha`, `lead`, `epsilon`, `policy`, `policy_name`, `deterministic`,
        `horizon`, `simulator`, `restore` and `seed`.

        Raises:
            TypeError, ValueError, CalibrationError: See that function.
        """
        from safeshield.calibration.from_log import calibrate_from_log

        if hasattr(held_out, "to_dataset"):  # Flights are of a package above this one.
            raise TypeError(
                "held_out must be an OfflineDataset of whole episodes, got a "
                f"{type(held_out).__name__}: pass held_out.to_dataset()"
            )
        found = calibrate_from_log(
            self,
            held_out,
            method,
            confidence=confidence,
            alpha=alpha,
            lead=lead,
            epsilon=epsilon,
            policy=policy,
            policy_name=policy_name,
            deterministic=deterministic,
            horizon=horizon,
            simulator=simulator,
            restore=restore,
            seed=seed,
        )
        delta = self.delta if found.delta is None else found.delta
        base = self if delta == self.delta else self.with_delta(delta)
        return replace(base, log_records=(*base.log_records, found))

    def diagnose(
        self,
        env: Env | VectorEnv,
        policy: object = "random",
        *,
        episodes: int = 100,
        seed: int = 0,
        num_envs: int | None = None,
        deterministic: bool = False,
        policy_name: str | None = None,
        log: OfflineDataset | None = None,
    ) -> Diagnosis:
        """Run shielded episodes and return the cause of every violation, and what to do.

        `env`, `policy`, `episodes`, `seed`, `num_envs`, `deterministic`, `policy_name` and `log`
        are those of `evaluation.diagnosis.diagnose`. The result's `summary()` is text, and its
        `picture(path)` draws the worst episode.
        """
        from safeshield.evaluation.diagnosis import diagnose

        return diagnose(
            self,
            env,
            policy,
            episodes=episodes,
            seed=seed,
            num_envs=num_envs,
            deterministic=deterministic,
            policy_name=policy_name,
            log=log,
        )

    def save(self, path: str | os.PathLike[str], *, sign: PrivateKey | None = None) -> None:
        """Write the shield to the safetensors file `path`, whose header is strict JSON.

        Args:
            path: The file.
            sign: Private Ed25519 key of `cryptography`, or the path of its PEM file, that signs
                the file; None leaves it unsigned.

        Raises:
            OSError: `path` is a folder, its folder does not exist, or nothing can be written there.
            ValueError: The shield replaces actions in a way that a file cannot hold, or there is
                no such key in the key's file.
            ImportError: `sign` is given, and the extra `sign` is not installed.
        """
        save_shield(self, path, sign)

    @classmethod
    def builtin(cls, name: str) -> Self:
        """Return a ready-made shield from the package, which needs no training and no network.

        Its networks are small. `benchmarks/builtin.py` made it, and its record says what it
        promises.

        Args:
            name: "boat" for ``safeshield/Boat-v0``, or "pendulum" for Gymnasium's ``Pendulum-v1``,
                which must not turn faster than 6 rad/s.

        Raises:
            ValueError: There is no such shield.

        >>> import gymnasium
        >>> from safeshield import SafetyShield, Shield
        >>> Shield.builtin("boat").record.environment
        'safeshield/Boat-v0'
        >>> env = SafetyShield(gymnasium.make("safeshield/Boat-v0"), "builtin:boat")
        """
        return cls.load(builtin_file(name))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: PublicKey | None = None) -> Self:
        """Return the shield in the file `path`. No code from the file is executed.

        The file's digest must be that of its contents, and its records must follow from their own
        counts. This finds accidents and mistakes, but not a record that was forged consistently:
        for that the file must be signed.

        Args:
            path: The file.
            verify: Public Ed25519 key of `cryptography`, or the path of its PEM file. A file that
                is not signed with its private key is refused. With None, `signature` says whether
                the file is signed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, has been tampered with, or does not hold a shield; a
                record does not follow from its counts; or the signature is missing or not valid.
            ImportError: `verify` is given, and the extra `sign` is not installed.
        """
        try:
            shield = load_shield(cls, path, verify)
        except FileNotFoundError as error:
            if not str(path).startswith(BUILTIN):
                raise
            name = str(path).removeprefix(BUILTIN)
            raise FileNotFoundError(
                f"{error}. For the ready-made shield use Shield.builtin({name!r:.80})"
            ) from error
        # Files without records, attempts and statements have nothing to check.
        if shield.record or shield.attempts or shield.log_records or shield.ledger.attempts:
            from safeshield.calibration.consistency import check_records

            check_records(shield, path)
        return shield

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        verify: PublicKey | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Return the shield in a repository of the Hugging Face Hub, from the extra `hub`.

        The file is read as `load` reads one, with the same checks. It is downloaded once and kept
        in the Hub's cache.

        Args:
            repo_id: Repository, as "user/name". For a file on this machine use `load`.
            revision: Branch, tag or commit; None for the newest of the main branch. A commit names
                the file that you have looked at, also after the repository has changed.
            verify: See `load`.
            token: The Hub's token; None for the stored one.

        Raises:
            ImportError: The extra `hub` is not installed, or `verify` is given without the extra
                `sign`.
            FileNotFoundError: There is no such repository, revision or file, or no access to it.
            ConnectionError: The Hub cannot be reached, and the file is not in the cache.
            ValueError: `repo_id` is not the name of a repository; or as in `load`.
        """
        from safeshield.files.hub import downloaded

        return cls.load(downloaded(repo_id, revision, token), verify=verify)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        log: OfflineDataset | str | os.PathLike[str] | None = None,
        license: str | None = None,
        sign: PrivateKey | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the shield to the Hugging Face Hub with a card, and return the commit.

        The card says what the record promises, describes the shield and the log, and has the
        picture of the calibration. `safeshield.reporting.hub_folder` writes the same files to a
        folder. The repository is made where it does not exist.

        Args:
            repo_id: Repository, as "user/name".
            log: The log from which the shield was trained, or its file, for the card; None leaves
                it out. The log itself is not uploaded.
            license: Identifier of a licence for the card, such as "mit"; None leaves it out.
            sign: Private key that signs the file, see `save`.
            revision: Branch to upload to, which is made where it does not exist; None: main.
            private: Whether a new repository is private; None for the Hub's own default.
            token: The Hub's token; None for the stored one.

        Raises:
            ImportError: The extra `hub` is not installed, or `sign` is given without the extra
                `sign`.
            FileNotFoundError: There is no access to the repository.
            ConnectionError: The Hub cannot be reached, or it refuses the upload.
            ValueError: `repo_id` is not the name of a repository, `license` is no identifier, or as
                in `save`.
        """
        from safeshield.reporting.hub_card import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            log=log,
            license=license,
            sign=sign,
            revision=revision,
            private=private,
            token=token,
        )


def _where_known(known: Flags | bool, values: Scalars) -> Scalars:
    """Return the values, with infinity where they are not known or the networks overflowed."""
    return np.where(known & ~np.isnan(values), values, np.float32(np.inf))


def _numbers(what: str, given: npt.ArrayLike, count: int) -> Scalars:
    h = np.asarray(given, np.float64).reshape(-1)
    if h.shape != (count,):
        raise ValueError(
            f"{what} must be one number for each of {count} observations, got shape "
            f"{np.shape(given)}"
        )
    return h


@runtime_checkable
class HasShield(Protocol):
    """An agent that can make a shield, such as `SafeFQL`."""

    def shield(self) -> Shield:
        """Return the agent's shield."""
        ...


def builtin_file(name: str) -> Path:
    """Return the path of the ready-made shield `name`; see `Shield.builtin`."""
    files = {path.stem: path for path in Path(__file__).with_name("builtin").iterdir()}
    if name not in files:
        raise ValueError(
            f"name must be one of {sorted(files)}, the ready-made shields of the package, got "
            f"{name!r:.80}; for a shield's own file pass its path"
        )
    return files[name]


def as_shield(shield: Shield | HasShield | str | os.PathLike[str]) -> Shield:
    """Return a shield as it is, or get one from a path to its file or from an agent.

    The text ``"builtin:NAME"`` stands for `Shield.builtin(NAME)`; every other text is a path.

    Raises:
        TypeError: The argument is none of these.
        ValueError: The file is damaged or of another kind, or no ready-made shield has this name.
    """
    if isinstance(shield, Shield):
        return shield
    if isinstance(shield, str) and shield.startswith(BUILTIN):
        return Shield.builtin(shield.removeprefix(BUILTIN))
    if isinstance(shield, str | os.PathLike):
        if Path(shield).suffix.lower() in LOG_SUFFIXES:
            raise ValueError(
                f"shield must be a shield's file (.safetensors), got the log '{shield}': train a "
                "shield on it by ShieldTrainer().fit(OfflineDataset.load(path)).shield()"
            )
        return Shield.load(shield)
    if isinstance(shield, HasShield):
        return shield.shield()
    raise TypeError(
        "shield must be a Shield, a path to a shield's file, or an agent with a shield() method, "
        f"got {type(shield).__name__}"
    )


def _in_dtype(points: npt.NDArray[Any], space: gym.Space[Any]) -> npt.NDArray[Any]:
    """Return points of a space in its dtype; whole numbers judged beside others keep their values.

    A float is already in the dtype.
    """
    return points if points.dtype == space.dtype else points.astype(space.dtype)
