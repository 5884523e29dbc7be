"""Named sources of the constraint: functions that compute h from an observation.

Safety critics estimate h(s) by a network. Where the observation determines h, a function is exact,
and the value of a state becomes

    V_h(s) = h(s) + max(e(s), 0)

with the function's h(s) in place of the estimate (`values.safety` has the definition of e). A
source is a named quantity: its name consists of a word and a version, such as ``"Boat@1"``. Logs,
agents and shields store the name, and each process registers the function. Reading a file therefore
never runs code that the file names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from safeshield.values.named import NamedFunction, UnregisteredError

if TYPE_CHECKING:
    from safeshield.spaces.shapes import Scalars

ConstraintFn = Callable[[Any], npt.ArrayLike]
"""Function from a batch of n observations, as a vector environment returns them, to h (n,). NaN
means that the observation does not determine h."""
F = TypeVar("F", bound=Callable[..., Any])


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
    """Return the source with this name, without a function where none is registered."""
    return ConstraintSource.find(name)


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


def as_constraint(
    source: str | ConstraintSource | ConstraintFn | None, name: str = ""
) -> ConstraintSource | None:
    """Return a source that is given as a name, a source or a function.

    Args:
        source: The source; None returns None. A function that is registered keeps its name.
        name: Name of any other function; by default its module and qualified name.

    Raises:
        TypeError: `source` is none of these.
    """
    return ConstraintSource.of(source, name)
