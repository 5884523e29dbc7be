r"""Agents that try to break a shield, each described by a few numbers that a file can hold.

`evaluation.falsification` searches among them. An agent wants, in the action's features u in
[-1, 1]^m (`spaces.scaling`), the direction

    d = M [x, v, 1] + c_high(v) u_high + c_low(v) u_low + c_other(v) u_other + noise z,

    c(v) = c_0 + c_1 v,    v = 1 + tanh((V_h(s) + delta) / (8 sigma)).

x are the normalised observations (a fixed random projection to 16 numbers where there are more), v
is near 0 far from the threshold and 1 at the threshold, and sigma is the typical change of h in one
step. Of some actions spread over the box, u_high is the accepted one of highest Q_h, u_low the one
of lowest Q_h, and u_other the one of lowest Q_h on the other side, at least 120 degrees from u_low
where there is such an action. A ridge of V_h lies between two such escapes: who takes the second
best one is led onto the ridge. z is a standard
normal vector that is drawn anew every `hold` steps.

The agent proposes d, clipped to the box; of discrete actions it proposes the one nearest to d. Near
the threshold, in a state where no action is acceptable, it asks the shield what would be executed
for each spread action, and makes the proposal whose executed action is nearest to d. It knows
nothing of the dynamics: it observes, and asks the shield.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from safeshield.calibration.proposers import ADVERSARY, RANDOM, Adversary, spread_actions
from safeshield.files.atomic import written_whole
from safeshield.files.reading import opened, read_exactly
from safeshield.files.schema import json_values, record_from_json
from safeshield.rollouts.policies import as_batch_policy
from safeshield.spaces.batches import Batch, batch_length

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

Array = npt.NDArray[np.float64]

FORMAT = "safeshield probe 1"
"""The entry "format" of a file that holds a probe."""
_MOST_FEATURES = 16
_SPREAD = 16
_REACH = 8.0
"""Distance from the threshold at which v is about 0.24, in typical changes of h in one step."""
_NEAR = 0.5
_OTHER_SIDE = -0.5
"""Largest cosine of the angle between two escapes on different sides."""
_TURNS = 6
"""Number of the coefficients c: two for each of three directions."""
_FROM = "CMA-ES from "
_LARGEST_FILE = 1_000_000
_MOST_HOLD = 1_000_000


@dataclass(frozen=True)
class Probe:
    """The numbers that describe an agent; the module's description has the formula."""

    family: str
    """Name of the family from which the agent comes. "random" and "adversary" are the policies that
    calibration tests, and have no numbers."""
    delta: float
    """Distance of the threshold from 0 that the agent takes for the shield's, in units of h."""
    weights: tuple[float, ...] = ()
    """M row by row, then c_0 and c_1 of u_high, of u_low and of u_other."""
    noise: float = 0.0
    """Factor of z."""
    hold: int = 1
    """Number of steps for which z is held."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.weights).all() and np.isfinite([self.noise, self.delta]).all()):
            raise ValueError("the numbers of a probe must be finite; it was edited or damaged")
        if self.delta < 0 or not 1 <= self.hold <= _MOST_HOLD:
            raise ValueError(
                f"a probe must have delta of at least 0 and hold from 1 to {_MOST_HOLD}, got "
                f"{self.delta} and {self.hold}"
            )

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name the probe: a hash of its numbers and its family."""
        text = json.dumps(json_values(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def save(self, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write the probe as JSON.

        Args:
            path: The file, which by custom ends in .json.
            about: Further entries for the reader, which `load` does not use.
        """
        data = {"format": FORMAT, "probe": json_values(self), **(about or {})}
        text = json.dumps(data, indent=2, allow_nan=False)
        with written_whole(Path(path)) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Return the probe in a file that `save` wrote. Nothing in a file can run.

        Raises:
            ValueError: The file is no such JSON, or a number is missing or out of range.
            OSError: The file cannot be read, see `files.reading.opened`.
        """
        with opened(path) as stream:
            raw = read_exactly(stream, _LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise ValueError(f"{path} must have at most {_LARGEST_FILE} bytes to hold a probe")
        try:
            data = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must be JSON as `safeshield falsify` writes it: {error}"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f"{path} must have the entry 'format': '{FORMAT}': write it by `safeshield falsify`"
            )
        return record_from_json(cls, data.get("probe"), str(path))


def weight_count(shield: Shield) -> int:
    """Return the number of weights of a probe for the spaces of `shield`."""
    scaling = shield.model.scaling
    return scaling.action_features * (_features(shield) + 2) + _TURNS


def _features(shield: Shield) -> int:
    return min(shield.model.scaling.observation_features, _MOST_FEATURES)


class ProbingAgent:
    """A batch policy that acts as probes do, one of them in each environment.

    Args:
        shield: The shield that the agent asks. Its spaces must be those of the probes.
        probes: The probes.
        whose: (episodes,) index of the probe of each episode, in the order in which `run_episodes`
            plays them; None where the first probe plays all.

    Raises:
        ValueError: A probe is for other spaces.
    """

    batched = True

    def __init__(
        self,
        shield: Shield,
        probes: Sequence[Probe],
        whose: npt.NDArray[np.int64] | None = None,
    ) -> None:
        for probe in probes:
            if len(probe.weights) != weight_count(shield):
                raise ValueError(
                    f"the probe has {len(probe.weights)} weights, but for the spaces of this "
                    f"shield there must be {weight_count(shield)}: it was found for another one"
                )
            if probe.delta != probes[0].delta:
                raise ValueError("the probes of one agent must have the same delta")
        self._asked = shield.with_delta(probes[0].delta)
        self._asked._warned = True  # It is asked for values; another shield filters.
        self._shield, model = shield, shield.model
        features, kept = model.scaling.observation_features, _features(shield)
        self._projection = np.eye(features)
        if kept < features:
            rng = np.random.default_rng(0)
            self._projection = rng.standard_normal((features, kept)) / np.sqrt(features)
        self._points = spread_actions(shield, _SPREAD)
        self._scaled = model.scaling.actions(self._points).astype(np.float64)
        unit = self._scaled / np.maximum(np.linalg.norm(self._scaled, axis=1, keepdims=True), 1e-9)
        cosine = unit @ unit.T
        limit = np.maximum(cosine.min(axis=1, keepdims=True), _OTHER_SIDE)
        self._aside = cosine <= limit + 1e-6
        rows = np.array([probe.weights for probe in probes], np.float64)
        shape = (len(probes), model.scaling.action_features, kept + 2)
        self._matrices = rows[:, :-_TURNS].reshape(shape)
        self._turns = rows[:, -_TURNS:].reshape(len(probes), 3, 2)
        self._noise = np.array([probe.noise for probe in probes])
        self._hold = np.array([probe.hold for probe in probes])
        self._whose, self._next = whose, 0
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        """Begin the next `num_envs` episodes."""
        self._now = np.zeros(num_envs, np.int64)
        if self._whose is not None and num_envs:
            # The last environments of the last batch may be without an episode.
            last = len(self._whose) - 1
            index = np.minimum(np.arange(self._next, self._next + num_envs), last)
            self._now, self._next = self._whose[index], self._next + num_envs
        self._step = 0
        self._drawn = np.zeros((num_envs, self._scaled.shape[1]))

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Return the proposed actions for n observations.

        Args:
            observations: Batch of n observations.
            rng: Generator of z.
        """
        count = batch_length(observations)
        if len(self._now) != count:
            self.start_wave(count)
        shield, model = self._asked, self._asked.model
        rows = shield.observation_rows(observations)[0]
        states = shield.states(rows)
        unit = _REACH * model.scale.step_rms
        near = 1.0 + np.tanh((states.value.astype(np.float64) + shield.delta) / unit)
        seen = np.clip(states.inputs.astype(np.float64), -5.0, 5.0) @ self._projection
        inputs = np.concatenate([seen, near[:, None], np.ones((count, 1))], axis=1)
        wanted = np.einsum("naf,nf->na", self._matrices[self._now], inputs)
        fresh = (self._step % self._hold[self._now] == 0) & (self._noise[self._now] > 0)
        if fresh.any():
            self._drawn[fresh] = rng.standard_normal((int(fresh.sum()), wanted.shape[1]))
        wanted += self._noise[self._now, None] * self._drawn
        self._step += 1
        turns = self._turns[self._now]
        at = np.flatnonzero((turns != 0).any(axis=(1, 2)) | (near > _NEAR))
        stuck = np.zeros(count, bool)
        if len(at):
            part = states.take(at)
            every = np.broadcast_to(self._points, (len(at), *self._points.shape))
            good, values = shield.acceptable(part, rows[at], every)
            stuck[at] = ~good.any(axis=1) & (near[at] > _NEAR)
            how = turns[at, :, 0] + turns[at, :, 1] * near[at, None]
            wanted[at] += np.einsum("nt,nta->na", how, self._directions(good, values))
        wanted = np.clip(wanted, -1.0, 1.0)
        if model.action_codec.discrete:
            proposed = self._points[_nearest(self._scaled[None], wanted)]
        else:
            proposed = model.scaling.to_box(wanted)
        at = np.flatnonzero(stuck)
        if len(at):
            asked, each = np.repeat(at, len(self._points)), np.tile(self._points, (len(at), 1))
            executed, _ = shield.filter_rows(states.take(asked), rows[asked], each)
            reached = model.scaling.actions(executed).reshape(len(at), len(self._points), -1)
            proposed[at] = self._points[_nearest(reached, wanted[at])]
        return shield.points(proposed)

    def _directions(self, good: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> Array:
        """Return u_high, u_low and u_other (n, 3, features)."""
        high = np.where(good, values, -np.inf).argmax(axis=1)
        high = np.where(good.any(axis=1), high, values.argmax(axis=1))
        low = values.argmin(axis=1)
        other = np.where(self._aside[low], values, np.inf).argmin(axis=1)
        return np.asarray(self._scaled[np.stack([high, low, other], axis=1)])


def _nearest(points: npt.NDArray[Any], wanted: Array) -> npt.NDArray[np.intp]:
    """Return which of c points (n, c, features) is nearest to each of n wanted ones."""
    return np.asarray(np.square(points - wanted[:, None]).sum(axis=-1).argmin(axis=1))


def as_agent(shield: Shield, probe: Probe) -> Any:  # noqa: ANN401 - one of several policies
    """Return the batch policy that a probe describes, behind `shield`.

    Raises:
        ValueError: The probe is for other spaces.
    """
    if probe.family == RANDOM:
        return as_batch_policy(RANDOM, shield.action_space)
    if probe.family == ADVERSARY:
        return Adversary(shield.with_delta(probe.delta))
    return ProbingAgent(shield, [probe])


def starting_probes(shield: Shield, rng: np.random.Generator, each: int) -> list[Probe]:
    """Return the battery from which a search starts: some probes of each family.

    "held" holds a direction for an episode, "held noise" draws one every few steps, "target" steers
    for a point among the observations, "greedy" takes the accepted action of highest Q_h and
    switches to the best or to the second best escape at the threshold, and "ridge" prefers the
    second best escape.

    Args:
        shield: The shield.
        rng: Generator of directions and targets.
        each: Number of probes of each family that has random numbers.
    """
    scaling = shield.model.scaling
    width, features = scaling.action_features, _features(shield)

    def probe(family: str, turns: Sequence[float] = (), **other: Any) -> Probe:  # noqa: ANN401
        matrix = other.pop("matrix", np.zeros((width, features + 2)))
        padded = [*turns, *[0.0] * (_TURNS - len(turns))]
        return Probe(family, shield.delta, (*matrix.ravel().tolist(), *padded), **other)

    def held() -> Array:
        matrix = np.zeros((width, features + 2))
        matrix[:, -1] = _unit(rng.standard_normal(width))
        return matrix

    def target() -> Array:
        matrix = np.zeros((width, features + 2))
        gains = 4.0 * rng.standard_normal((width, features)) / np.sqrt(features)
        matrix[:, :features] = gains
        matrix[:, -1] = -gains @ rng.uniform(-1.5, 1.5, features)
        return matrix

    found = [probe("held", matrix=held()) for _ in range(each)]
    found += [probe("held noise", noise=1.0, hold=k) for k in (4, 16, 64)]
    found += [probe("target", matrix=target()) for _ in range(2 * each)]
    greedy = [(1.0,), (1.0, -2.0), (1.0, -1.0, 0.0, 1.0), (1.0, -1.0, 0.0, 0.0, 0.0, 1.0)]
    found += [probe("greedy", one) for one in greedy]
    ridge = [(0.0, 0.0, 0.0, 0.0, 1.0), (0.5, -1.0, 0.0, 0.0, 1.0), (1.0, -1.0, 0.0, 0.0, 0.5, 0.5)]
    found += [probe("ridge", one) for one in ridge]
    return found


def _unit(vector: Array) -> Array:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9))


def moved(probe: Probe, weights: npt.NDArray[np.float64]) -> Probe:
    """Return a probe with other weights, of the family "CMA-ES from ..."."""
    name = probe.family if probe.family.startswith(_FROM) else f"{_FROM}{probe.family}"
    return replace(probe, family=name, weights=tuple(map(float, weights)))
