"""Scores of an action in a state; a higher score means more similar to the log's actions there."""

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
    """A function that scores how similar an action is to the log's, such as a log density.

    A score is a fixed function. It must not depend on the episodes that set its level.
    """

    @property
    def name(self) -> str:
        """Name of the score in a shield's file."""
        ...

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError where the model lacks what the score needs."""
        ...

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """Return the scores (n,) of actions (n, act), in the action space, in n states."""
        ...


class NoiseDistance:
    """Score ``-||z||^2 / 2`` of a Box's action, where the behaviour's flow maps z to the action.

    The score is the log density of z in nats, up to a constant: 0 for z = 0, and -2 at two standard
    deviations. It leaves out the flow's change of volume (the divergence). It therefore compares
    an action with the log's actions in the same state, and does not compare states with each other.
    On a boat's log without one half of the directions, the divergence changed the area under the
    ROC curve by less than 0.003, at 2 to 3 times the cost.
    """

    name = "noise"

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError unless `model` has a Box of actions and a flow as behaviour."""
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
    """Score log p(a | s) of FLRP's generative model, in nats (`nn.latent_actor`).

    The model learned the log's behaviour with weights that prefer safe actions, so that likely
    actions are both similar to the log's and safe. Because p is a density, scores of different
    states can be compared.
    """

    name = "density"

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError unless the shield has FLRP's generative model."""
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
    """Score of a discrete action: its log probability from the behaviour's classifier, in nats."""

    name = "probability"

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError unless `model` has discrete actions and a classifier as behaviour."""
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

    The score needs no model of the behaviour. Members that were fitted to the same targets may
    agree on actions that the log has not shown. On the boat this score was much less informative
    than "noise".
    """

    name = "ensemble"

    def check(self, model: SafetyModel) -> None:
        """Raise ValueError where the advantage of `model` has fewer than two members."""
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
    """Return the named score, the given score unchanged, or the default for the actions.

    The default is "probability" for discrete actions. For a Box it is "density" where the behaviour
    has a density, as FLRP's does, and "noise" otherwise.

    Raises:
        ValueError: The name is unknown, or the model lacks what the score needs.
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
