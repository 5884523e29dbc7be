r"""What can be noticed of a faulty sensor without a model of the plant.

Three checks, each of which warns or makes the shield fall back:

- **frozen**: entry j of the observation has been exactly the same for more than n_j steps in which
  the action changed.
- **jump**: entry j has changed by more than m_j in one step, which is more than in the log.
- **stale**: the observation is older than a limit, by its time stamp.

``SensorCheck.from_log`` measures n_j and m_j by split conformal prediction over EPISODES of a log.
Every second episode gives the scales: u_j is the largest change of entry j in a step, and r_j is 1
plus its longest run of equal readings. The other n episodes give the scores

    S = max over steps t and entries j of |o_j[t+1] - o_j[t]| / u_j, and of run_j[t] / r_j,

and m_j = q u_j, n_j = q r_j, with q the ceil((1 - level / 2)(n + 1))-th lowest of the scores of
each kind. A new episode that is exchangeable with these exceeds q with probability at most
level / 2, so at most the share `level` of the healthy episodes of the log's policy has an alarm of
either kind. This says nothing about episodes of another policy, nor about which faults are noticed.

Entries of whole numbers, and entries that do not change in the log, are not checked.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import json_values, record_from_json
from safeshield.files.settings import Inside, Positive, Settings, check
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.shapes import Actions, Flags, Observations
from safeshield.support.record import conformal_level, episodes_needed

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset

Reaction = Literal["warn", "fall back"]
WARN: Final = "warn"
FALL_BACK: Final = "fall back"
FROZEN, JUMP, STALE = "frozen", "jump", "stale"
KINDS: Final = ("", FROZEN, JUMP, STALE)
"""What a check has found of an observation, as ``info["shield/sensor"]`` tells it; "": nothing."""
Limits = tuple[float | None, ...]
"""A limit for each entry of an observation; None where the entry is not checked."""
_ROUNDING = 1e-6


class SensorWarning(UserWarning):
    """An observation does not look like that of a working sensor, or its age is not known."""


@dataclass(frozen=True)
class SensorCheck(Settings):
    """The limits beyond which an observation counts as faulty, and what the shield does then.

    A limit of None switches a check off. An observation on which the shield falls back is treated
    as one that is not readable: the fallback acts, V_h is infinite, and the rest of the episode is
    not certified.

    >>> SensorCheck(age=0.1).on_age, SensorCheck().active
    ('fall back', False)
    """

    frozen: Limits | None = None
    """(obs,) largest number of steps in which an entry may stay exactly equal while actions change.
    """
    jump: Limits | None = None
    """(obs,) largest change of an entry in one step, in units of the observation."""
    age: Positive | None = None
    """Largest age of an observation in seconds."""
    on_frozen: Reaction = WARN
    """Reaction to a frozen observation. It may be a false alarm, so the default is to warn."""
    on_jump: Reaction = WARN
    """Reaction to a jump. It may be a false alarm, so the default is to warn."""
    on_age: Reaction = FALL_BACK
    """Reaction to an observation that is too old, or whose stamp is missing although an earlier one
    had one, lies in the future, or is NaN."""
    level: Inside | None = None
    """Largest share of healthy episodes of the log's policy with an alarm of `frozen` or `jump`;
    None where the limits do not come from a log."""
    episodes: int | None = None
    """Number of the log's episodes that set the limits at this level."""

    @classmethod
    def from_log(
        cls,
        log: OfflineDataset,
        level: float = 0.01,
        *,
        age: float | None = None,
        on_frozen: Reaction = WARN,
        on_jump: Reaction = WARN,
        on_age: Reaction = FALL_BACK,
    ) -> Self:
        """Return the check with limits for `frozen` and `jump` that are measured from a log.

        Args:
            log: Healthy episodes of the plant, at least 4 / level.
            level: Largest share of healthy episodes with a false alarm.
            age: See the class.
            on_frozen: See the class.
            on_jump: See the class.
            on_age: See the class.

        Raises:
            ValueError: The level is not inside (0, 1), or the log has too few episodes for it.
            TypeError: No entry of the observation is continuous.
        """
        check("level", Inside, level)
        needed = 2 * episodes_needed(level / 2) + 2
        if log.num_episodes < needed:
            raise ValueError(
                f"level={level:g} needs a log of at least {needed} episodes, got "
                f"{log.num_episodes}: log more, or raise the level"
            )
        continuous = ~np.array(log.flat_observations.categories, np.bool_)
        runs, steps = _longest(log)
        scale = steps[::2].max(axis=0)
        used = continuous & (scale > 0)
        if not used.any():
            raise TypeError(
                "log must have an entry of the observation that is continuous and changes: frozen "
                "observations and jumps cannot be told from others where all are whole numbers"
            )
        jump = _limits(steps[1::2], scale, used, level / 2)
        frozen = _limits(runs[1::2], 1.0 + runs[::2].max(axis=0), used, level / 2)
        counted = len(steps[1::2])
        return cls(frozen, jump, age, on_frozen, on_jump, on_age, float(level), counted)

    @property
    def active(self) -> bool:
        """Whether anything is checked."""
        return any(one is not None for one in (self.frozen, self.jump, self.age))

    @property
    def falls_back(self) -> tuple[bool, bool, bool]:
        """Whether the shield falls back on a frozen observation, a jump, and a stale one."""
        pairs = (self.frozen, self.on_frozen), (self.jump, self.on_jump), (self.age, self.on_age)
        frozen, jump, age = (limit is not None and on == FALL_BACK for limit, on in pairs)
        return frozen, jump, age

    def check_fits(self, codec: SpaceCodec) -> None:
        """Raise ValueError unless the limits are those of the observations of `codec`."""
        for name, limits in ((FROZEN, self.frozen), (JUMP, self.jump)):
            if limits is not None and len(limits) != codec.width:
                raise ValueError(
                    f"{name} must hold one limit for each of {codec.width} entries of the "
                    f"observation, got {len(limits)}: measure it by SensorCheck.from_log on a log "
                    "of the shield's environment"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return json_values(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the check whose JSON values are `data`, after a check of every field.

        Raises:
            ValueError: A field is missing, unknown, of another type or out of range.
        """
        return record_from_json(cls, data, "sensors")


class _Motion:
    """How the observations of n environments move: changes in a step, and runs of equal ones."""

    def __init__(self, count: int, width: int) -> None:
        self._rows = np.full((count, width), np.nan, np.float32)
        self._actions: Actions | None = None
        self._changed = np.zeros((count, 1), np.bool_)
        self.runs = np.zeros((count, width))

    def begin(self, where: Flags) -> None:
        """Forget the environments in `where` (n,)."""
        self._rows[where] = np.nan
        self._changed[where] = False
        self.runs[where] = 0.0
        if self._actions is not None:
            self._actions[where] = np.nan

    def acted(self, actions: Actions) -> None:
        """Note the executed actions (n, act) of the step that comes next."""
        last = self._actions
        # A copy of float64, in which NaN marks that there is no action before.
        self._actions = np.array(actions, np.float64)
        if last is not None:
            different = (self._actions < last) | (self._actions > last)
            self._changed = np.logical_or.reduce(different, axis=1, keepdims=True)

    def move(self, rows: Observations) -> npt.NDArray[np.float32]:
        """Take the observations (n, obs) and return the changes; NaN where there is none before."""
        rows = rows.astype(np.float32)
        with np.errstate(invalid="ignore"):
            moved: npt.NDArray[np.float32] = np.abs(rows - self._rows)
        self.runs = (self.runs + self._changed) * (moved == 0)
        self._rows = rows
        return moved


class SensorState:
    """What a `SensorCheck` remembers of n environments from one observation to the next.

    The order of calls in a step is `read`, and `acted` with the actions that are executed then.
    Once stamps have come with observations, those without are stale, also in later episodes.

    Args:
        sensors: The check.
        count: Number n of environments.
        width: Number of entries of an observation, as a row.
        quiet: Whether it does not warn, as in rollouts, which step environments past their ends.

    >>> jumps = SensorCheck(jump=(1.0,), on_jump="fall back")
    >>> state = SensorState(jumps, count=1, width=1, quiet=True)
    >>> state.read(np.array([[0.5]])).tolist(), state.read(np.array([[3.0]])).tolist()
    ([[0.5]], [[nan]])
    >>> state.found.tolist()
    ['jump']
    """

    def __init__(
        self, sensors: SensorCheck, count: int, width: int, *, quiet: bool = False
    ) -> None:
        self.sensors = sensors
        self._quiet = quiet
        self._stamped = False
        self._frozen, self._jump = _as_array(sensors.frozen), _as_array(sensors.jump)
        self._age = sensors.age
        moves = sensors.frozen is not None or sensors.jump is not None
        self._motion = _Motion(count, width) if moves else None
        self._back = np.array([False, *sensors.falls_back])
        self._nothing, self._trusted = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        self._codes = self._nothing
        self._warned: set[str] = set()
        self.fallen = self._trusted
        """(n,) whether the shield falls back on the observation read last."""

    @property
    def found(self) -> npt.NDArray[np.str_]:
        """(n,) what was found of the observations read last, as in `KINDS`."""
        return np.array(KINDS)[self._codes]

    @property
    def first(self) -> str:
        """What was found of the first environment's observation."""
        return KINDS[self._codes[0]]

    def begin(self, where: Flags | bool = True) -> None:
        """Forget the environments in `where` (n,), whose next observation begins an episode."""
        if self._motion is not None:
            self._motion.begin(np.full(len(self._codes), where))

    def read(
        self,
        rows: Observations,
        stamps: npt.ArrayLike | None = None,
        still: Flags | None = None,
    ) -> Observations:
        """Return the observations, with NaN for those on which the shield falls back.

        Args:
            rows: (n, obs) observations, as rows of `spaces.rows`.
            stamps: () or (n,) `time.monotonic()` at which they were measured, in seconds. None:
                the observations are stale where earlier ones had stamps, and else no age is
                checked.
            still: (n,) which environments have not moved since the last call; None for none. What
                was found of their observations stays.

        Raises:
            ValueError: The number of observations is not n, or that of the stamps is neither 1
                nor n.
        """
        count = len(self._codes)
        if len(rows) != count:
            raise ValueError(
                f"sensors remembers {count} environments, got {len(rows)} observations: keep "
                f"sensors=shield.sensor_state({len(rows)})"
            )
        codes = self._nothing.copy()
        motion = self._motion
        if motion is not None:
            runs = motion.runs
            moved = motion.move(rows)
            if still is not None:
                motion.runs = np.where(still[:, None], runs, motion.runs)
            if self._jump is not None and np.count_nonzero(far := moved > self._jump):
                self._note(codes, far.any(axis=1), 2)
            if self._frozen is not None and np.count_nonzero(held := motion.runs > self._frozen):
                self._note(codes, held.any(axis=1), 1)
        if still is not None:
            codes = np.where(still, self._codes, codes)
        if self._age is not None:
            if stamps is not None:
                self._stamped = True
                ages = time.monotonic() - _each_stamp(stamps, count)
                self._note(codes, ~((ages >= 0) & (ages <= self._age)), 3)
            elif self._stamped:
                self._note(codes, np.ones(count, np.bool_), 3)
            else:
                self._warn("age", "no stamp came with an observation, so its age is not checked")
        self._codes, self.fallen = codes, self._trusted
        if np.count_nonzero(codes):
            self.fallen = self._back[codes]
            for kind in {KINDS[code] for code in codes.tolist()} - {""}:
                self._warn(
                    kind,
                    f"the check {kind!r} found a faulty observation; behind a wrapper, "
                    "info['shield/sensor'] says so at each step",
                )
            if self.fallen.any():
                rows = rows.astype(np.result_type(rows, np.float32))
                rows[self.fallen] = np.nan
        return rows

    def acted(self, actions: Actions) -> None:
        """Note the actions (n, act) that are executed on the observations read last."""
        if self._motion is not None:
            self._motion.acted(actions)

    def _note(self, codes: npt.NDArray[np.int64], where: Flags | np.bool_, code: int) -> None:
        """Set the codes in `where`, but none that falls back to one that only warns."""
        codes[where & ~(self._back[codes] & ~self._back[code])] = code

    def _warn(self, kind: str, words: str) -> None:
        if not self._quiet and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(words, SensorWarning, stacklevel=5)


def _each_stamp(stamps: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """Return the stamps of `count` observations, or raise ValueError where there are others."""
    given = np.asarray(stamps, np.float64)
    if given.shape not in ((), (count,)):
        raise ValueError(
            f"stamp must be one number or one for each of {count} observations, got shape "
            f"{given.shape}"
        )
    return np.broadcast_to(given, (count,))


def _as_array(limits: Limits | None) -> npt.NDArray[np.float64] | None:
    if limits is None:
        return None
    return np.array([np.inf if one is None else one for one in limits])


def _longest(log: OfflineDataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the longest runs and the largest changes of each entry in each episode, (E, obs)."""
    starts, lengths = log.episode_starts, log.episode_lengths
    motion = _Motion(len(starts), log.observations.shape[1])
    motion.move(log.observations[starts])
    runs, steps = (np.zeros(motion.runs.shape) for _ in range(2))
    for step in range(int(lengths.max())):
        at = starts + np.minimum(step, lengths - 1)
        inside = (step < lengths)[:, None]
        motion.acted(log.actions[at])
        moved = motion.move(log.next_observations[at])
        steps = np.fmax(steps, np.where(inside, moved, 0.0))
        runs = np.fmax(runs, np.where(inside, motion.runs, 0.0))
    return runs, steps


def _limits(
    found: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    used: npt.NDArray[np.bool_],
    alpha: float,
) -> Limits:
    """Return the limits of each entry, from (E, obs) numbers of episodes and (obs,) scales."""
    scores = (found[:, used] / scale[used]).max(axis=1)
    factor = -conformal_level(-scores, alpha) * (1 + _ROUNDING)
    return tuple(
        float(factor * one) if checked else None
        for one, checked in zip(scale.tolist(), used.tolist(), strict=True)
    )
