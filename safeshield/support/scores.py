"""Scores of an action in a state: the higher, the more like what the log does there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from safeshield.nn.flow_forward import to_noise
from safeshield.nn.forward import forward_layers
from safeshield.spaces.shapes import Actions, Scalars
from safeshield.values.units import ADVANTAGE, BEHAVIOUR

if TYPE_CHECKING:
    from safeshield.shield.critics import SafetyModel, StateValue


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
        _need_behaviour(self.name, model)

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        taken = model.scaling.actions(actions)
        noise = to_noise(model.behaviour_layers, states.inputs, taken, model.flow_steps)
        return np.asarray(-0.5 * np.square(noise).sum(axis=-1))


class Density:
    """For a shield of FLRP: log p(a | s) of its generative model, in nats (`nn.latent_forward`).

    The model learned the log's behaviour weighted towards what is safe, so what it finds likely is
    what the log shows AND what is safe there; and it is a density, so states can be compared.
    """

    name = "density"

    def check(self, model: SafetyModel) -> None:
        """Need FLRP's networks."""
        if model.latent is None:
            raise ValueError(
                "score 'density' needs FLRP's generative model, which this shield does not have: "
                "take the shield of an FLRP agent, or use score='noise'"
            )

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        if model.latent_policy is None:
            raise ValueError("score 'density' needs FLRP's generative model")
        return model.latent_policy.log_density(states.inputs, model.scaling.actions(actions))


class LogProbability:
    """For discrete actions: the log probability that the behaviour's classifier gives, in nats."""

    name = "probability"

    def check(self, model: SafetyModel) -> None:
        """Need discrete actions and the classifier."""
        if not model.action_codec.discrete:
            raise ValueError(
                f"score 'probability' needs discrete actions, got {model.action_space}; use 'noise'"
            )
        _need_behaviour(self.name, model)

    def __call__(self, model: SafetyModel, states: StateValue, actions: Actions) -> Scalars:
        """See `SupportScore`."""
        logits = forward_layers(model.behaviour_layers, states.inputs)[0]
        logits = logits - logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        digits = np.rint(np.asarray(actions) - model.action_codec.low).astype(np.int64)
        # `choices` lists the combinations with the last column counting fastest.
        taken = np.ravel_multi_index(tuple(digits.T), model.action_codec.categories)
        return np.asarray(logits[np.arange(len(taken)), taken] - total)


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


def _need_behaviour(name: str, model: SafetyModel) -> None:
    if BEHAVIOUR not in model.networks:
        raise ValueError(
            f"score '{name}' needs the network of the log's behaviour, which this shield does not "
            "have: train it with ShieldTrainer or SafeFQL, or use score='ensemble'"
        )


SCORES: Mapping[str, SupportScore] = MappingProxyType(
    {
        score.name: score
        for score in (NoiseDistance(), Density(), LogProbability(), EnsembleSpread())
    }
)
"""The scores that a shield's file can name."""


def support_score(score: str | SupportScore | None, model: SafetyModel) -> SupportScore:
    """Return a score by name, one of your own as it is, or the default for this kind of actions.

    The default is "noise" for a Box, "density" where the model is FLRP's, "probability" for
    discrete actions.

    Raises:
        ValueError: the name is unknown, or the model lacks what the score needs.
        TypeError: `score` is neither a name nor a score.
    """
    if score is None:
        box = NoiseDistance.name if model.latent is None else Density.name
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
