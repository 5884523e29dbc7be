"""Named sources of the constraint: functions that compute h from an observation.

Safety critics estimate h(s) by a network. Where the observation determines h, a function is exact,
and the value of a state becomes

    V_h(s) = h(s) + max(e(s), 0)

with the function's h(s) in place of the estimate (`values.safety` has the definition of e). A
source is a named quantity: its name consists of a word and a version, such as ``"Boat@1"``. Logs,
agents and shields store the name, and each process registers the function. Reading a file therefore
never runs code that the file names.

Where a task has several constraints h_1, ..., h_k, such as a speed in m/s and a distance in m, they
become one, each in units of its own steps (`SeveralConstraints`):

    h(s) = max_k h_k(s) / sigma_k,    sigma_k = root mean square of h_k(s') - h_k(s) over the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from safeshield.values.named import NamedFunction, UnregisteredError
from safeshield.values.units import step_rms

if TYPE_CHECKING:
    from safeshield.spaces.shapes import Flags, Scalars


ConstraintFn = Callable[[Any], npt.ArrayLike]
"""Function from a batch of n observations, as a vector environment returns them, to h (n,). NaN
means that the observation does not determine h."""
F = TypeVar("F", bound=Callable[..., Any])

# The name of several constraints is "max(clearance@1 / 0.5, speed@1 / 0.25)".
_BEGIN, _BETWEEN, _PER, _END = "max(", ", ", " / ", ")"


class UnknownConstraintError(UnregisteredError):
    """Raised where a source of h is needed that this process has not registered."""


@dataclass(frozen=True)
class ConstraintSource(NamedFunction):
    """A named constraint h of observations, positive in a violation.

    Attributes:
        name: Name and version of the quantity, such as ``"Boat@1"``. Two sources with one name are
            the same quantity.
        function: Function that computes h; None where the one that this process has registered is
            used.

    Raises:
        ValueError: The name is empty, too long, or holds characters that cannot be printed.

    >>> speed = ConstraintSource("pendulum-speed@1", lambda obs: abs(obs[:, 2]) - 6.0)
    >>> speed(np.array([[1.0, 0.0, 7.0], [1.0, 0.0, -2.0]])).tolist()
    [1.0, -4.0]
    """

    noun: ClassVar[str] = "constraint"
    example: ClassVar[str] = "speed@1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if _is_several(self.name):
            raise ValueError(
                f"a constraint's name must not have the form of the name of several, got "
                f"{self.name!r:.80}; give each of them its own function: {{'speed@1': function, "
                "...}"
            )

    @classmethod
    def find(cls, name: str) -> Self:
        """Return the source with this name, without a function where none is registered.

        Raises:
            ValueError: The name is not a name, or a damaged name of several constraints.
        """
        return _several_of(name) if _is_several(name) else super().find(name)  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[ConstraintSource, ...]:
        """The k constraints of which h is the largest; the source itself where there is one."""
        return (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the k constraints."""
        return tuple(part.name for part in self.parts)

    def each(self, observations: Any) -> Scalars:  # noqa: ANN401
        """Return the k constraints (n, k) of n observations, each in its own units.

        Raises:
            LookupError, ValueError: See the call of the source.
        """
        return np.stack([part(observations) for part in self.parts], axis=1)

    def largest(self, each: Scalars) -> Scalars:
        """Return h (n,) of n states from the k constraints (n, k) of each."""
        h: Scalars = each[:, 0]
        return h

    def contradicts(self, each: Scalars, named: Scalars, reported: Scalars, near: float) -> Flags:
        """Return where the reports of an environment contradict the source, (n,).

        A report under the name of a constraint contradicts it where the two differ by more than
        `near`. A violation contradicts h <= -near. Where several constraints are reported as one
        plain number, whose units are not known, only its sign is compared: a report of at most 0
        contradicts h > near. Comparisons with NaN are False.

        Args:
            each: (n,) h of the states by the source; of several constraints (n, k) h_k.
            named: (n,) or (n, k) the reports under the names of the source.
            reported: (n,) the reports as one number, see `rollouts.infos.largest`.
            near: Largest difference between two measurements of the same h, in units of h.
        """
        differs: Flags = abs(named - each) > near
        # A plain number is the report of the constraint itself, so the first test holds the second.
        return differs if reported is named else differs | ((reported > 0) & (each <= -near))

    def __call__(self, observations: Any) -> Scalars:  # noqa: ANN401
        """Return h (n,) float64 of n observations; NaN or infinite where it is not known.

        Raises:
            LookupError: The function is not registered in this process.
            ValueError: The function does not return one number for each observation.
        """
        function = self.found
        if function is None:
            raise UnknownConstraintError(
                f"the constraint '{self.name}' is not registered in this process: import the "
                "module that registers it (safeshield.suites for the benchmark tasks, "
                "safeshield.envs for the package's own environments), pass the function, "
                "shield.with_constraint(function), pass the number, shield.filter(observation, "
                "action, constraint=h), or use the network's estimate instead, "
                "shield.with_constraint(None), which drops the record"
            )
        told = np.asarray(function(observations))
        count = len(next(iter(observations.values()))) if isinstance(observations, dict) else None
        count = len(observations) if count is None else count
        if told.shape != (count,) or told.dtype.kind not in "fiu":
            raise ValueError(
                f"the constraint '{self.name}' must return one number for each of {count} "
                f"observations, shape {(count,)}, got {told.dtype} {told.shape}"
            )
        return told.astype(np.float64)


class SeveralConstraints(ConstraintSource):
    """The largest of several constraints, each in units of its own steps.

    h(s) = max_k h_k(s) / sigma_k has the sign of the worst constraint, and does not depend on the
    units of the constraints. It is NaN where one of them is not finite. The name consists of the
    names and units, in the order of the names, and determines the quantity. `find_constraint`
    therefore returns the same source from the name alone.

    Args:
        parts: The constraints, two or more with different names, and the units sigma_k of each, in
            its own units. Units are rounded to six digits, so that names can be read.

    Attributes:
        units: The units sigma_k of the constraints, in the order of `parts`.

    Raises:
        ValueError: There are fewer than two constraints, two have one name, a name holds ", ", or a
            unit is not a finite number above 0.

    >>> speed = ConstraintSource("speed@1", lambda obs: obs[:, 0] - 3.0)  # m/s
    >>> clearance = ConstraintSource("clearance@1", lambda obs: 0.5 - obs[:, 1])  # m
    >>> both = SeveralConstraints([(speed, 0.5), (clearance, 0.1)])
    >>> both.name
    'max(clearance@1 / 0.1, speed@1 / 0.5)'
    >>> states = np.array([[2.0, 0.55], [2.8, 1.5]])
    >>> both(states).round(3).tolist(), [both.names[k] for k in both.binding(both.each(states))]
    ([-0.5, -0.4], ['clearance@1', 'speed@1'])
    >>> find_constraint(both.name) == both
    True
    """

    units: tuple[float, ...]
    _parts: tuple[ConstraintSource, ...]

    def __init__(self, parts: Iterable[tuple[ConstraintSource, float]]) -> None:
        given = sorted(parts, key=lambda pair: pair[0].name)
        names = [part.name for part, _ in given]
        if len(given) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"several constraints must be two or more with different names, got {names}; give "
                "each its own name and version"
            )
        for name in names:
            if _BETWEEN in name:
                raise ValueError(
                    "the name of one of several constraints must not contain ', ', got "
                    f"{name!r:.80}; choose another name, and list every constraint by itself"
                )
        units = [float(f"{unit:.6g}") for _, unit in given]
        for name, unit in zip(names, units, strict=True):
            if not (math.isfinite(unit) and unit > 0):
                raise ValueError(
                    f"the unit of the constraint '{name}' must be a finite number above 0, got "
                    f"{unit}"
                )
        told = (f"{name}{_PER}{unit!r}" for name, unit in zip(names, units, strict=True))
        object.__setattr__(self, "name", f"{_BEGIN}{_BETWEEN.join(told)}{_END}")
        object.__setattr__(self, "function", None)
        object.__setattr__(self, "_parts", tuple(part for part, _ in given))
        object.__setattr__(self, "units", tuple(units))

    @property
    def parts(self) -> tuple[ConstraintSource, ...]:
        """The k constraints of which h is the largest, in the order of their names."""
        return self._parts

    @property
    def available(self) -> bool:
        """Whether each of the constraints has a function."""
        return all(part.available for part in self.parts)

    def __call__(self, observations: Any) -> Scalars:  # noqa: ANN401
        """Return h (n,) float64 of n observations; NaN where one of the constraints is not finite.

        Raises:
            LookupError: The function of a constraint is not registered in this process.
            ValueError: A function does not return one number for each observation.
        """
        return self.largest(self.each(observations))

    def each(self, observations: Any) -> Scalars:  # noqa: ANN401
        """Return the k constraints (n, k) of n observations, each in its own units.

        Raises:
            LookupError, ValueError: See the call of the source.
        """
        missing = [part.name for part in self.parts if not part.available]
        if missing:
            raise UnknownConstraintError(
                f"the constraints {missing} of '{self.name}' are not registered in this process: "
                "import the module that registers them, pass the functions, "
                f"shield.with_constraint({{{missing[0]!r}: function, ...}}), pass the numbers, "
                "shield.filter(observation, action, constraint={name: h, ...}), or use the "
                "network's estimate instead, shield.with_constraint(None), which drops the record"
            )
        return super().each(observations)

    def largest(self, each: Scalars) -> Scalars:
        """Return h (n,) = max_k h_k / sigma_k from h_k (n, k); NaN where one is not finite."""
        return np.asarray(self._scaled(each).max(axis=1))

    def binding(self, each: Scalars) -> npt.NDArray[np.intp]:
        """Return (n,) which of the constraints is the largest in units of its steps.

        Where constraints are not finite, it is the first of these. `each` is (n, k) h_k.
        """
        return np.asarray(self._scaled(each).argmax(axis=1))

    def contradicts(self, each: Scalars, named: Scalars, reported: Scalars, near: float) -> Flags:
        """Return where the reports of an environment contradict the source, (n,).

        Differences are measured in units of the constraint's steps. The arguments `each`, `named`,
        `reported` and `near` are those of `ConstraintSource.contradicts`.
        """
        h = self._scaled(each).max(axis=-1)
        apart = abs(named - each) / np.array(self.units) > near
        alone = np.isnan(named).all(axis=-1) & (reported <= 0) & (h > near)
        return np.asarray(apart.any(axis=-1) | alone | ((reported > 0) & (h <= -near)))

    def with_sources(self, parts: Sequence[ConstraintSource]) -> SeveralConstraints:
        """Return the same constraints, in the same units, with the functions of `parts`.

        Raises:
            ValueError: A part has a name that none of the constraints has.
        """
        unknown = [part.name for part in parts if part.name not in self.names]
        if unknown:
            raise ValueError(
                f"the shield's constraints are {list(self.names)}, got {unknown} as well: their "
                "units come from a log; train a shield on log.with_constraint({name: function, "
                "...})"
            )
        given = {part.name: part for part in (*self.parts, *parts)}
        return SeveralConstraints(
            zip((given[name] for name in self.names), self.units, strict=True)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SeveralConstraints, (tuple(zip(self.parts, self.units, strict=True)),)

    def _scaled(self, each: Scalars) -> Scalars:
        # NaN is the largest for `max` and `argmax`, so no constraint that is unknown is ignored.
        return np.asarray(np.where(np.isfinite(each), each, np.nan) / np.array(self.units))


def register_constraint(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a function of observations under a name.

    Args:
        name: Name and version, such as ``"clearance@1"``. Choose a new version when the function
            changes, because files that name the old version were trained with the old function.

    Raises:
        TypeError: `name` is not text, as where the decorator is written without a name.
        ValueError: The name is registered for another function, or is not a name.

    >>> @register_constraint("doc-speed@1")
    ... def too_fast(observations):
    ...     return np.abs(observations[:, 2]) - 6.0
    >>> find_constraint("doc-speed@1")(np.array([[1.0, 0.0, 7.0]])).tolist()
    [1.0]
    """
    return ConstraintSource.register(name)


def find_constraint(name: str) -> ConstraintSource:
    """Return the source with this name, without a function where none is registered.

    Raises:
        ValueError: The name is not a name, or a damaged name of several constraints.
    """
    return ConstraintSource.find(name)


def _is_several(name: str) -> bool:
    return name.startswith(_BEGIN) and name.endswith(_END)


def _several_of(name: str) -> SeveralConstraints:
    pairs = [one.rpartition(_PER) for one in name[len(_BEGIN) : -len(_END)].split(_BETWEEN)]
    try:
        if not all(one for one, _, _ in pairs):
            raise ValueError("each must be 'name / unit'")
        several = SeveralConstraints((find_constraint(one), float(unit)) for one, _, unit in pairs)
    except ValueError as error:
        raise ValueError(f"a damaged name of several constraints, {name!r:.80}: {error}") from None
    if several.name != name:
        raise ValueError(
            f"the name of several constraints must be {several.name!r}, in the order of the names "
            f"and with six digits, got {name!r}"
        )
    return several


def named(name: object) -> str | None:
    """Return the name of a source that a file holds, or None.

    Raises:
        ValueError: The entry is neither text nor null.
    """
    if name is not None and not isinstance(name, str):
        raise ValueError(f"constraint_source must be a name or null, got {name!r:.80}")
    return name or None


def stored_source(header: Mapping[str, Any]) -> ConstraintSource | None:
    """Return the source that the header of a file names; None where it names none.

    Raises:
        ValueError: The entry is neither text nor null.
    """
    # Files of earlier releases have no entry.
    return as_constraint(named(header.get("constraint_source")))


Source = str | ConstraintSource | ConstraintFn
"""A constraint as a registered name, a source or a function."""


def constraints_by_name(
    given: Mapping[str, Source] | Sequence[Source],
) -> tuple[ConstraintSource, ...]:
    """Return several constraints that are given by name, in the order of their names.

    Args:
        given: A function, source or registered name for each name; or a list of registered names,
            registered functions or sources, which keep their names.

    Raises:
        TypeError: An entry is none of these.
        ValueError: There are none, a name is not a name, or a constraint has another name.
    """
    pairs = given.items() if isinstance(given, Mapping) else [("", one) for one in given]
    sources = []
    for name, one in pairs:
        source = as_constraint(one, name)
        if source is None:
            raise TypeError(
                f"each of several constraints must have a source, got None for {name!r}"
            )
        if name not in ("", source.name):
            raise ValueError(
                f"the constraint '{source.name}' must be given by its own name, got {name!r}; "
                "register the function under each name that it has"
            )
        sources.append(source)
    if not sources:
        raise ValueError("several constraints must be at least one, got none")
    return tuple(sorted(sources, key=lambda source: source.name))


def in_own_steps(
    parts: Sequence[ConstraintSource], now: Sequence[Scalars], after: Sequence[Scalars]
) -> ConstraintSource:
    """Return constraints as one source, each in units of its own steps in a log of N steps.

    A single constraint is returned as it is, in its own units.

    Args:
        parts: The k constraints, in the order of their names.
        now: k arrays (N,), h_k of the states s[t].
        after: k arrays (N,), h_k of the states s[t+1].

    Raises:
        ValueError: A constraint never changes in the log; or see `SeveralConstraints`.
    """
    if len(parts) == 1:
        return parts[0]
    units = [step_rms(*pair) for pair in zip(now, after, strict=True)]
    for part, unit in zip(parts, units, strict=True):
        if unit == 0.0:
            raise ValueError(
                f"the constraint '{part.name}' must change in the log, because its steps are its "
                "unit, but it is the same in all states; leave it out, or log states in which it "
                "changes"
            )
    return SeveralConstraints(zip(parts, units, strict=True))


def as_constraint(source: Source | None, name: str = "") -> ConstraintSource | None:
    """Return a source that is given as a name, a source or a function.

    Args:
        source: The source; None returns None. A function that is registered keeps its name.
        name: Name of any other function; by default its module and qualified name.

    Raises:
        TypeError: `source` is none of these.
    """
    return ConstraintSource.of(source, name)
