"""Scores of an action in a state: the higher, the more like what the log does there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from safeshield.nn.actor import Classifier, FlowActor, HasDensity
from safeshield.spaces.shapes import Actions, Scalars
from safeshield.values.units import ADVANTAGE

if TYPE_CHECKING:
    from safeshield.shield.critics import SafetyModel, StateValue

B = TypeVar("B")


class SupportScore(Protocol):
    """How much an action looks like the log's; a log density where there is one.

    A score is a fixed function: nothing in it may depend on the episodes that set its level.
    """

    @property
    def name(self) -> str:
        """What a shield's file calls it."""
        ...

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError where the model lacks what the score needs."""
        ...

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """Return the scores (n,) of actions (n, act), in the action space, in n states."""
        ...


class NoiseDistance:
    """For a Box of actions: ``-||z||^2 / 2``, z where the behaviour's flow took the action from.

    The log density of z, in nats, up to a constant: 0 for what the log does most, -2 at two
    standard deviations. It leaves out the flow's change of volume (the divergence), so it compares
    an action with what the log does in that very state, not states with each other. Measured on a
    boat's log without one half of the directions, the divergence moved the area under the ROC
    curve by less than 0.003 at 2 to 3 times the cost.
    """

    name = "noise"

    def check(self, model: SafetyModel) -> None:
        """Need a Box of actions and the flow."""
        if model.action_codec.discrete:
            raise ValueError(
                f"score 'noise' needs a Box of actions, got {model.action_space}; use 'probability'"
            )
        _needed(FlowActor, self.name, model)

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        flow = _needed(FlowActor, self.name, model)
        noise = flow.to_noise(model.networks, states.inputs, model.scaling.actions(actions))
        return np.asarray(-0.5 * np.square(noise).sum(axis=-1))


class Density:
    """For a shield of FLRP: log p(a | s) of its generative model, in nats (`nn.latent_actor`).

    The model learned the log's behaviour weighted towards what is safe, so what it finds likely is
    what the log shows AND what is safe there; and it is a density, so states can be compared.
    """

    name = "density"

    def check(self, model: SafetyModel) -> None:
        """Need FLRP's networks."""
        self._model(model)

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        taken = model.scaling.actions(actions)
        return self._model(model).log_density(model.networks, states.inputs, taken)

    def _model(self, model: SafetyModel) -> HasDensity:
        actor: object = model.behaviour_actor
        if not isinstance(actor, HasDensity):
            raise ValueError(
                "score 'density' needs FLRP's generative model, which this shield does not have: "
                "take the shield of an FLRP agent, or use score='noise'"
            )
        return actor


class LogProbability:
    """For discrete actions: the log probability that the behaviour's classifier gives, in nats."""

    name = "probability"

    def check(self, model: SafetyModel) -> None:
        """Need discrete actions and the classifier."""
        if not model.action_codec.discrete:
            raise ValueError(
                f"score 'probability' needs discrete actions, got {model.action_space}; use 'noise'"
            )
        _needed(Classifier, self.name, model)

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        classifier = _needed(Classifier, self.name, model)
        log_probs = classifier.log_prob(model.networks, states.inputs)
        taken = model.action_codec.choice_index(np.asarray(actions))
        return np.asarray(log_probs[np.arange(len(taken)), taken])


class EnsembleSpread:
    """Minus the standard deviation of Q_h among the advantage's members, in units of h.

    Needs no model of the behaviour. Members that were fitted to the same targets may agree where
    the log has shown nothing: on the boat it told much less than the noise.
    """

    name = "ensemble"

    def check(self, model: SafetyModel) -> None:
        """Need two members."""
        members = model.networks[ADVANTAGE]["0.weight"].shape[0]
        if members < 2:
            raise ValueError(f"score 'ensemble' needs at least 2 members, the shield has {members}")

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        return np.asarray(-model.action_spread(states, actions))


def _needed(kind: type[B], name: str, model: SafetyModel) -> B:
    if not isinstance(model.behaviour_actor, kind):
        raise ValueError(
            f"score '{name}' needs the network of the log's behaviour, which this shield does not "
            "have: train it with ShieldTrainer or SafeFQL, or use score='ensemble'"
        )
    return model.behaviour_actor


SCORES: Mapping[str, SupportScore] = MappingProxyType(
    {
        score.name: score
        for score in (NoiseDistance(), Density(), LogProbability(), EnsembleSpread())
    }
)
"""The scores that a shield's file can name."""


def support_score(score: str | SupportScore | None, model: SafetyModel) -> SupportScore:
    """Return a score by name, one of your own as it is, or the default for this kind of actions.

    The default is "noise" for a Box, "density" where the behaviour knows its own (FLRP's does),
    "probability" for discrete actions.

    Raises:
        ValueError: the name is unknown, or the model lacks what the score needs.
        TypeError: `score` is neither a name nor a score.
    """
    if score is None:
        dense = isinstance(model.behaviour_actor, HasDensity)
        box = Density.name if dense else NoiseDistance.name
        score = LogProbability.name if model.action_codec.discrete else box
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"score must be one of {sorted(SCORES)}, got {score!r}")
        score = SCORES[score]
    if not (callable(score) and isinstance(getattr(score, "name", None), str)):
        raise TypeError(
            f"score must be one of {sorted(SCORES)} or a SupportScore, got {type(score).__name__}"
        )
    score.check(model)
    return score
