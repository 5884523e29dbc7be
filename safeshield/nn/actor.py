"""Actors: descriptions of policy networks that can be run, written to a file and read back.

An actor is a frozen description. The weights are passed separately, by the names that `shapes`
lists. A new kind is one class with the decorator `register_actor`; shields can then act by it and
store it in their files. Reading a file never imports a module, so the class of a user's own kind
must be imported before a file that contains it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeVar,
    get_type_hints,
    runtime_checkable,
)

from safeshield.files.schema import json_values
from safeshield.nn.arrays import A, Float, NetworksOf, ParamsOf, Weights, concat, log_softmax
from safeshield.nn.flow import euler_noise, euler_sample, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Shapes

FALLBACK, BEHAVIOUR = "student", "behaviour"
"""Names of the network of a shield's fallback actor and of the network that imitates the log."""
MAX_WIDTH, MAX_LAYERS, MAX_STEPS = 16_384, 32, 1000
"""Upper limits for the sizes that a file's header may state."""


class Widths(NamedTuple):
    """Numbers of features and choices, which the spaces determine."""

    observation: int
    """Number of features of an observation."""
    action: int
    """Number of features of an action."""
    choices: int
    """Number of discrete actions; 0 for a Box."""


class Network(Protocol):
    """The description of one network."""

    @property
    def shapes(self) -> Shapes:
        """Shape of every weight, by name."""
        ...


class Described(Protocol):
    """A frozen dataclass that is stored in a file's header as its kind and its fields in JSON.

    Fields that have the name of a field of `Widths` are not written, because the spaces determine
    them.
    """

    kind: ClassVar[str]
    """Name of the kind in files."""

    def parts(self) -> Mapping[str, Network]:
        """Return the description of every network, by name."""
        ...

    def check(self) -> None:
        """Raise ValueError if the fields, as read from a file, are not valid."""
        ...


class Actor(Described, Protocol):
    """A policy network for a Box of actions."""

    @property
    def noise_features(self) -> int:
        """Width of the noise from which an action is drawn."""
        ...

    def act(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        """Return actions (n, act) in [-1, 1] for noise in n states.

        Args:
            networks: Weights by network.
            observations: (n, obs) normalised observations.
            noise: (n, noise_features) standard normal numbers.
        """
        ...


@runtime_checkable
class HasDensity(Protocol):
    """An actor that can compute the density of its actions."""

    def log_density(self, networks: Mapping[str, Weights], inputs: Float, actions: Float) -> Float:
        """Return log p(a | s) of one action in each of n states, (n,), in nats.

        Args:
            networks: Weights by network.
            inputs: (n, obs) normalised observations.
            actions: (n, act) actions in [-1, 1].
        """
        ...


# -- kinds -----------------------------------------------------------------------------------------

D = TypeVar("D", bound=Described)
LATER = "later"
"""Key in the metadata of a field that older files lack, whose default is what they mean. Files have
the field only where it has another value."""
KINDS: dict[str, type[Described]] = {}
"""Classes that a shield's file can name: actors, discrete classifiers and action critics."""


def register_actor(new: type[D]) -> type[D]:
    """Register a class so that files of shields can contain it (a decorator).

    `new` is the class, which is also returned.

    Raises:
        ValueError: Another class has the same kind.
    """
    old = KINDS.setdefault(new.kind, new)
    # Running a notebook cell again defines the same class again.
    if (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        raise ValueError(f"kind {new.kind!r} is taken by {old.__module__}.{old.__qualname__}")
    KINDS[new.kind] = new
    return new


def to_header(part: Described | None) -> dict[str, Any] | None:
    """Return the entry of `part`, an actor or an action critic, in a file's header.

    The result is None where `part` is None.

    Raises:
        ValueError: The class is not registered, so that no file can name it.
    """
    if part is None:
        return None
    if KINDS.get(part.kind) is not type(part):
        raise ValueError(
            f"{type(part).__name__} is not of a kind that a file can name, {sorted(KINDS)}: "
            "decorate the class with register_actor"
        )
    return {"kind": part.kind, **_written(part, json_values(part))}


def _written(part: Any, data: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Return the entries of `data`, the JSON values of `part`, that a file's header has."""
    written = {}
    for entry in dataclasses.fields(part):
        own, value = getattr(part, entry.name), data[entry.name]
        if entry.name in Widths._fields or (LATER in entry.metadata and own == entry.default):
            continue
        written[entry.name] = _written(own, value) if dataclasses.is_dataclass(own) else value
    return written


def from_header(what: str, data: dict[str, Any] | None, widths: Widths, needs: str) -> Any:  # noqa: ANN401
    """Rebuild an actor or an action critic from the entry that `to_header` returned.

    Args:
        what: Name of the header's entry.
        data: The entry.
        widths: Widths that the spaces determine.
        needs: Name of a method that the class must have.

    Raises:
        ValueError: The kind is not registered in this process or has no such method, or a field is
            not valid.
    """
    if data is None:
        return None
    kind = data["kind"]
    known = KINDS.get(kind) if isinstance(kind, str) else None
    if known is None or not hasattr(known, needs):
        fit = sorted(name for name, one in KINDS.items() if hasattr(one, needs))
        raise ValueError(
            f"{what} kind {kind!r:.40} is not known; this process knows {fit}: import the module "
            "that defines it first"
        )
    return _rebuilt(known, kind, {k: v for k, v in data.items() if k != "kind"}, widths._asdict())


def _rebuilt(known: Any, what: str, data: dict[str, Any], widths: dict[str, int]) -> Any:  # noqa: ANN401
    names = [entry.name for entry in dataclasses.fields(known)]
    own = {name for name in names if name not in widths}
    later = {entry.name for entry in dataclasses.fields(known) if LATER in entry.metadata}
    if not own - later <= set(data) <= own:
        raise ValueError(f"{what} must have the fields {sorted(own)}, got {sorted(data)!r:.80}")
    values: dict[str, Any] = {name: widths[name] for name in names if name in widths}
    for name, value in data.items():
        if isinstance(value, dict):
            value = _rebuilt(get_type_hints(known)[name], name, value, widths)
        values[name] = tuple(value) if isinstance(value, list) else value
    part = known(**values)
    part.check()
    return part


def check_hidden(what: str, widths: object) -> None:
    """Raise ValueError unless the number and the widths of hidden layers are within the limits.

    `widths` are the widths, and `what` names the network in the message.
    """
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= MAX_LAYERS:
        raise ValueError(f"'{what}' must have between 1 and {MAX_LAYERS} hidden layers")
    if not all(type(w) is int and 1 <= w <= MAX_WIDTH for w in widths):
        raise ValueError(f"widths of '{what}' must be between 1 and {MAX_WIDTH}")


def check_count(what: str, value: object, least: int, most: int) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`.

    `what` names the number in the message.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must lie in [{least}, {most}], got {value!r:.20}")


# -- the usual ones --------------------------------------------------------------------------------


def of_noise(network: EnsembleMLP, params: ParamsOf[A], observations: A, noise: A) -> A:
    """Return the outputs (n, width) of a one-step network for noise (n, width) in n states.

    `network` is the description, `params` are its weights, and `observations` (n, obs) are
    normalised.
    """
    out: A = network(params, concat([observations, noise]))[0]
    return out


@register_actor
@dataclass(frozen=True)
class OneStepActor:
    """One perceptron that maps (s, z) to an action.

    It is the student of SafeFQL and the fallback of `ShieldTrainer`.
    """

    kind: ClassVar[str] = "one_step"
    observation: int
    """Number of features of an observation."""
    action: int
    """Number of entries of an action, and of the noise z."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""

    @cached_property
    def network(self) -> EnsembleMLP:
        """Description of the network."""
        return EnsembleMLP(self.observation + self.action, self.action, self.hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the actor's network by name (see `Described`)."""
        return {FALLBACK: self.network}

    def check(self) -> None:
        """See `Described`."""
        check_hidden(FALLBACK, self.hidden)

    @property
    def noise_features(self) -> int:
        """See `Actor`."""
        return self.action

    def act(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        """Return actions (n, act) in [-1, 1] for noise (n, act) in n states (see `Actor`).

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        return of_noise(self.network, networks[FALLBACK], observations, noise).clip(-1.0, 1.0)


@register_actor
@dataclass(frozen=True)
class FlowActor:
    """A velocity field that carries noise to actions of the log (`nn.flow`)."""

    kind: ClassVar[str] = "flow"
    observation: int
    """Number of features of an observation."""
    action: int
    """Number of entries of an action, and of the noise."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    flow_steps: int = 10
    """K, the number of Euler steps."""

    @cached_property
    def network(self) -> EnsembleMLP:
        """Description of the network of the velocity field."""
        return velocity_network(self.observation, self.action, self.hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the actor's network by name (see `Described`)."""
        return {BEHAVIOUR: self.network}

    def check(self) -> None:
        """See `Described`."""
        check_hidden(BEHAVIOUR, self.hidden)
        check_count("flow_steps", self.flow_steps, 1, MAX_STEPS)

    @property
    def noise_features(self) -> int:
        """See `Actor`."""
        return self.action

    def act(self, networks: NetworksOf[A], observations: A, noise: A) -> A:
        """Return actions (n, act) in [-1, 1] for noise (n, act) in n states (see `Actor`).

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        return euler_sample(self.network, networks[BEHAVIOUR], observations, noise, self.flow_steps)

    def to_noise(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return the noise (n, act) that the field carries to given actions.

        `networks` are the weights, `observations` (n, obs) are normalised, and `actions` (n, act)
        lie in [-1, 1].
        """
        return euler_noise(
            self.network, networks[BEHAVIOUR], observations, actions, self.flow_steps
        )


@register_actor
@dataclass(frozen=True)
class Classifier:
    """A classifier that imitates a log of discrete actions by the logits of all choices."""

    kind: ClassVar[str] = "classifier"
    observation: int
    """Number of features of an observation."""
    choices: int
    """Number of discrete actions."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""

    @cached_property
    def network(self) -> EnsembleMLP:
        """Description of the network."""
        return EnsembleMLP(self.observation, self.choices, self.hidden)

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the classifier's network by name (see `Described`)."""
        return {BEHAVIOUR: self.network}

    def check(self) -> None:
        """See `Described`."""
        check_hidden(BEHAVIOUR, self.hidden)

    def logits(self, networks: NetworksOf[A], observations: A) -> A:
        """Return the logits (n, choices) of all discrete actions in n states.

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        out: A = self.network(networks[BEHAVIOUR], observations)[0]
        return out

    def log_prob(self, networks: NetworksOf[A], observations: A) -> A:
        """Return the log probabilities (n, choices) of all discrete actions, in nats.

        `networks` and `observations` are those of `logits`.
        """
        return log_softmax(self.logits(networks, observations))
