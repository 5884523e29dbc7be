"""The shield on PyTorch tensors: batches are filtered on the device on which they are.

`Shield.to_torch` makes a `TorchShield`. It decides as the shield does: both use the same weights,
formulas of values (`values.units`), actors and candidates, and differ by rounding only.
There are two modes:

- Without a budget, any number of actions can be replaced. The number of rejected actions determines
  the shape of what follows, so a call waits for the device once.
- With a budget of K rows, all shapes are fixed and nothing waits for the device. A call can be
  captured in a CUDA graph or compiled. Of the rejected actions, the K with the highest Q_h are
  replaced as the shield would replace them. The rows beyond these K execute the action of the
  shield's fallback, never the proposal, and the report marks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.arrays import in_each, nan_to_zero
from safeshield.nn.device import device_of
from safeshield.nn.mlp import largest_and_gradient, layers, run
from safeshield.nn.plan_actor import BestPlan
from safeshield.shield.readable import ReadableRange
from safeshield.shield.replacement import (
    BEYOND,
    SHORTEST,
    CommittedFallback,
    FallbackPolicy,
    NearestAcceptable,
    ProjectedGradient,
    float32_box,
)
from safeshield.shield.tensor_rows import TensorBatch, TensorRange, TensorScaling, check_tensor
from safeshield.values.constraint import (
    ConstraintSource,
    UnknownConstraintError,
    find_constraint,
)
from safeshield.values.units import (
    ADVANTAGE,
    CONSTRAINT,
    EXCESS,
    action_value,
    known_value,
    state_value,
)

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

TensorConstraint = Callable[[Any], Tensor]
"""Function from n observations, in the form of `TensorBatch`, to h (n,). NaN means not known."""

_STRATEGIES = (NearestAcceptable, FallbackPolicy, CommittedFallback, ProjectedGradient)
_Members = list[list[tuple[Tensor, Tensor]]]
"""Layers of the members of an ensemble, in groups that are evaluated together."""
# Rows that pass through a network at once. On a CPU the outputs of the layers then stay in the
# cache; elsewhere the blocks bound the memory that the candidates of many rejected actions need.
_CPU_BLOCK, _BLOCK = 512, 2**18
# Rejected actions that are replaced at once, where there is no budget.
_REPLACED = 2**13


class TensorReport(NamedTuple):
    """The verdicts on n actions, as tensors (n,) on the shield's device.

    All fields but the last are those of `safeshield.FilterReport`.
    """

    intervened: Tensor
    """bool: whether the shield did not accept the proposed action."""
    value: Tensor
    """float32: Q_h of the executed action, in units of h; infinity where the observation was not
    readable."""
    proposed_value: Tensor
    """float32: Q_h of the proposed action; infinity where that is not in the action space, or where
    the observation was not readable."""
    state_value: Tensor
    """float32: V_h of the observation; infinity where it was not readable."""
    acceptable: Tensor
    """bool: whether Q_h of the executed action is at most the threshold."""
    valid: Tensor
    """bool: whether the observation was readable and the proposed action finite."""
    supported: Tensor
    """bool: always True, because shields with a support test are refused."""
    overflow: Tensor
    """bool: whether the row lay beyond the budget and therefore executed the fallback's action;
    always False without a budget."""


class _States(NamedTuple):
    """V_h of n states, and what belongs to it."""

    inputs: Tensor
    """(n, features) normalised observations."""
    value: Tensor
    """(n,) V_h; NaN where h is not known, unless `TorchShield._estimated` has filled it."""
    readable: Tensor
    """(n,) whether the observation is readable and determines h."""
    excess: Tensor
    """(n,) output of the network of V - h."""

    def take(self, index: Tensor) -> _States:
        """Return the states with the indices `index` (k,)."""
        return _States(*(part[index] for part in self))


class _Proposals(NamedTuple):
    """n actions that are executed, unless they are replaced."""

    actions: Tensor
    """(n, act) the proposed actions, clipped into the box."""
    values: Tensor
    """(n,) Q_h of these; infinity where the proposal or the observation cannot be used."""
    usable: Tensor
    """(n,) whether the proposal and the observation can be used."""
    limit: Tensor
    """(n,) float64, the number that Q_h must not exceed."""
    supported: Tensor
    """(n,) whether they pass the support test."""


class TorchShield:
    """A `Shield` that filters batches of tensors; `Shield.to_torch` makes it and has an example.

    Args:
        shield: The shield. Its weights are copied to the device.
        device: A PyTorch device, such as "cuda"; "auto" is CUDA where there is one, else the CPU.
        constraint_fn: Function of n observations on the device to h (n,), for a shield whose h
            comes from a named source. It stands for the same quantity.
        budget: Largest number K of rows in a call that are replaced by the shield's strategy; None
            for any number.

    Attributes:
        device: Device of the weights. All arguments must be on it.
        threshold: The number that Q_h must not exceed, -delta.
        overflowed: () int64, number of rows that lay beyond the budget, over all calls.

    Raises:
        TypeError: The shield has a replacement, a critic, a support test or a source of h that does
            not run on tensors, or `budget` is not a whole number.
        ValueError: `budget` is below 1, a `constraint_fn` is given to a shield whose h comes from a
            network, or the device has no float64.
    """

    def __init__(
        self,
        shield: Shield,
        device: str | torch.device = "cpu",
        constraint_fn: TensorConstraint | None = None,
        budget: int | None = None,
    ) -> None:
        self._check_shield(shield)
        _check_arguments(shield, constraint_fn, budget)
        place = device_of(device)
        if place.type == "mps":
            raise ValueError(
                "device must have float64 numbers, in which thresholds are compared, got "
                f"{device!r}; use 'cpu' or 'cuda'"
            )
        model = shield.model
        self._shield, self._model, self._strategy = shield, model, shield.replacement
        self.budget, self.threshold = budget, shield.threshold
        self._limit = torch.tensor(self.threshold, dtype=torch.float64, device=place)
        self.overflowed = torch.zeros((), dtype=torch.int64, device=place)
        self.device = self._limit.device
        self._scale, self._discrete = model.scale, model.action_codec.discrete
        codecs = model.observation_codec, model.action_codec
        self._units = TensorScaling(model.scaling, *codecs, self.device)
        self._observations, self._actions = self._units.observations, self._units.actions
        readable = ReadableRange(model.observation_codec, model.scaling)
        self._readable = TensorRange(*readable.ranges, self.device)
        self._low, self._high = (self._tensor(end) for end in float32_box(model.action_codec))
        self._networks = {
            name: {key: self._tensor(weight) for key, weight in weights.items()}
            for name, weights in model.networks.items()
        }
        self._excess = self._members(EXCESS)
        self._estimate = self._members(CONSTRAINT)
        self._advantage = self._members(ADVANTAGE)
        self._zero_noise = torch.zeros(1, model.noise_features, device=self.device)
        if self._discrete:
            self._choices = self._tensor(model.action_codec.choices)
        elif not isinstance(self._strategy, CommittedFallback):
            tables = self._strategy.candidates.tables(model)  # type: ignore[attr-defined]
            self._noise, self._around = self._tensor(tables.noise), self._tensor(tables.around)
            self._points = self._units.to_box(self._tensor(tables.box))
        self._constraint_fn, self._unusable = constraint_fn, ""
        if model.constraint is not None and constraint_fn is None:
            self._constraint_fn = self._registered(model.constraint.name)
        shield.warn_if_uncalibrated()

    def __repr__(self) -> str:
        budget = "" if self.budget is None else f", budget={self.budget}"
        return f"{type(self).__name__}({self._shield!r}, device={str(self.device)!r}{budget})"

    def _check_shield(self, shield: Shield) -> None:
        """Raise TypeError where the shield does not run on tensors."""
        if shield.support is not None:
            raise TypeError(
                "a shield with a support test does not run on tensors: filter arrays with it, or "
                "make a shield without the test, dataclasses.replace(shield, support=None, "
                "record=None)"
            )
        strategy, judge = shield.replacement, shield.model.judge
        if type(strategy) not in _STRATEGIES:
            names = ", ".join(kind.__name__ for kind in _STRATEGIES)
            raise TypeError(
                f"replacement must be one of {names} on tensors, got {type(strategy).__name__}; "
                "use with_replacement(...), which drops the record, and calibrate again"
            )
        if judge is not None and not isinstance(judge, BestPlan):
            raise TypeError(
                f"a shield whose critic of actions is {type(judge).__name__} does not run on "
                "tensors: filter arrays with it"
            )
        source = shield.model.constraint
        if source is not None and type(source) is not ConstraintSource:
            raise TypeError(
                f"a shield whose h comes from a {type(source).__name__} does not run on tensors: "
                "filter arrays with it"
            )

    # -- results ---------------------------------------------------------------------------------

    @torch.no_grad()
    def value(
        self,
        observation: TensorBatch,
        action: Tensor | None = None,
        *,
        constraint: Tensor | None = None,
    ) -> Tensor:
        """Return V_h (n,) of observations, or Q_h (n,) of actions, as `Shield.value` does.

        Args:
            observation: n observations (n, *shape), or a dict of tensors for a Dict space.
            action: n actions (n, *shape); None for V_h.
            constraint: (n,) h of the states, see `filter`.
        """
        states = self._states(self._observations.rows(observation), constraint)
        if action is None:
            return _where_known(states.readable, states.value)
        actions = self._action_rows(action, len(states.value))
        inside = self._actions.range.entries(actions).all(-1)
        judged = torch.where(inside[:, None], actions, self._low)
        return _where_known(states.readable & inside, self._values(states, judged))

    @torch.no_grad()
    def certified(self, observation: TensorBatch, *, constraint: Tensor | None = None) -> Tensor:
        """Return (n,) whether V_h(s) <= -delta and the shield is calibrated.

        `observation` and `constraint` are those of `value`.
        """
        values = self.value(observation, constraint=constraint)
        return (values <= self._limits(None, len(values))) & (self._shield.record is not None)

    @torch.no_grad()
    def filter(
        self,
        observation: TensorBatch,
        action: Tensor,
        *,
        constraint: Tensor | None = None,
        threshold: float | Tensor | None = None,
    ) -> tuple[Tensor, TensorReport]:
        """Return the actions to execute, and the report on them, as `Shield.filter` does.

        An accepted action is executed bit for bit. The result has the shape and the dtype of
        `action`, shares no memory with it and has no gradient.

        Args:
            observation: n observations (n, *shape), or a dict of tensors for a Dict space.
            action: n actions (n, *shape). For a Box they must be float32 or float64.
            constraint: (n,) h of the states, for a shield whose h comes from a named source. It
                takes the place of `constraint_fn`. NaN means that h is not known.
            threshold: () or (n,) the number that Q_h must not exceed; by default the shield's own.
                The record holds for that one alone, and a looser one accepts more.

        Raises:
            LookupError: The shield's h comes from a named source, and neither `constraint` nor a
                function of tensors gives it.
            ValueError: An argument has a wrong shape, dtype or device, or `constraint` is given to
                a shield that does not need it.
        """
        rows = self._observations.rows(observation)
        actions = self._action_rows(action, len(rows))
        limit = self._limits(threshold, len(rows))
        executed, report = self._filter_rows(self._states(rows, constraint), actions, limit)
        given = action.reshape(executed.shape)
        executed = torch.where(report.intervened[:, None], executed.to(action.dtype), given)
        return executed.reshape(action.shape), report

    def _filter_rows(
        self, states: _States, actions: Tensor, limit: Tensor
    ) -> tuple[Tensor, TensorReport]:
        """Return the actions (n, act) to execute in place of rejected ones, and the report.

        Args:
            states: Result of `_states` for the n observations.
            actions: (n, act) the proposed actions, as rows.
            limit: (n,) float64, the number that Q_h must not exceed.
        """
        finite = torch.isfinite(actions).all(-1)
        inside = self._actions.range.entries(actions).all(-1)
        clipped = actions.clip(self._low, self._high)
        usable = states.readable & finite
        if self._discrete:
            usable = usable & self._actions.range.entries(clipped).all(-1)
        # One pass evaluates the proposals in the box and those that are clipped into it.
        clipped = torch.where(usable[:, None], clipped, self._low)
        values = _where_known(usable, self._values(states, clipped))
        proposed_value = values.masked_fill(~inside, torch.inf)
        supported = self._supported(states, clipped)
        accepted = (values <= limit) & inside & supported
        proposals = _Proposals(clipped, values, usable, limit, supported)
        replaced = self._replace_all if self.budget is None else self._replace_most
        executed, executed_value, overflow = replaced(states, proposals)
        return executed, TensorReport(
            intervened=~accepted,
            value=executed_value,
            proposed_value=proposed_value,
            state_value=_where_known(states.readable, states.value),
            acceptable=executed_value <= limit,
            valid=states.readable & finite,
            supported=supported,
            overflow=overflow,
        )

    def _supported(self, states: _States, actions: Tensor) -> Tensor:
        """Return whether actions (n, act) pass the support test, (n,): there is none on tensors."""
        return torch.ones_like(states.readable)

    # -- replacement -----------------------------------------------------------------------------

    def _replace_all(self, states: _States, of: _Proposals) -> tuple[Tensor, Tensor, Tensor]:
        """Replace every proposal that is not acceptable once it is clipped.

        The number of these proposals determines shapes, so the call waits for the device once.

        Returns:
            The executed actions (n, act), their Q_h (n,), and False (n,) for the overflow.
        """
        executed, values = of.actions, of.values
        missing = ~(values <= of.limit)
        every = missing.nonzero()[:, 0]
        for start in range(0, len(every), _REPLACED):
            index = every[start : start + _REPLACED]
            some = self._estimated(states.take(index))
            part = self._with_fallback(some, _Proposals(*(each[index] for each in of)))
            found, value = self._search(some, *part)
            executed = executed.index_copy(0, index, found.to(executed.dtype))
            values = values.index_copy(0, index, value.masked_fill(~some.readable, torch.inf))
        return executed, values, torch.zeros_like(missing)

    def _replace_most(self, states: _States, of: _Proposals) -> tuple[Tensor, Tensor, Tensor]:
        """Replace such proposals, at most `budget` of them by a search and the others by fallback.

        The shapes in this method depend only on the shapes of the arguments.

        Returns:
            The executed actions (n, act), their Q_h (n,), and which rows (n,) are beyond the
            budget.
        """
        states = self._estimated(states)
        of, own, own_values = self._with_fallback(states, of)
        missing = ~(of.values <= of.limit)
        found, values, overflow = own, own_values, torch.zeros_like(missing)
        if not isinstance(self._strategy, CommittedFallback):
            worst = of.values.clamp(max=torch.finfo(torch.float32).max)
            key = worst.masked_fill(~missing, -torch.inf)
            index = key.topk(min(self.budget or 0, len(key))).indices
            picked, value = self._search(
                states.take(index),
                _Proposals(*(each[index] for each in of)),
                own[index],
                own_values[index],
            )
            found, values = own.index_copy(0, index, picked), own_values.index_copy(0, index, value)
            overflow = missing.index_fill(0, index, 0)
            self.overflowed.add_(overflow.sum())
        executed = torch.where(missing[:, None], found.to(of.actions.dtype), of.actions)
        values = torch.where(missing, values, of.values)
        return executed, values.masked_fill(~states.readable, torch.inf), overflow

    def _with_fallback(self, states: _States, of: _Proposals) -> tuple[_Proposals, Tensor, Tensor]:
        """Return the proposals with the fallback's action in place of each that is not usable.

        The fallback's actions (n, act) for noise 0 and their Q_h (n,) are returned as well.
        """
        if self._discrete:
            every = in_each(states.inputs, self._choices)
            choice_values = nan_rejected(self._values(states, every))
            lowest = choice_values.argmin(1)
            own = self._choices.index_select(0, lowest)
            values = choice_values.gather(1, lowest[:, None])[:, 0]
        else:
            own = self._acted(states, self._zero_noise)[:, 0].clip(self._low, self._high)
            values = nan_rejected(self._values(states, own))
        actions = torch.where(of.usable[:, None], of.actions, own.to(of.actions.dtype))
        wanted = torch.where(of.usable, of.values, values)
        return of._replace(actions=actions, values=wanted), own, values

    def _search(
        self, states: _States, of: _Proposals, own: Tensor, own_values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return replacements (k, act) float32 and their Q_h (k,), by the shield's strategy.

        Args:
            states: k states, with estimates where h is not known.
            of: Proposals in these states, none of which is usable and acceptable.
            own: (k, act) the fallback's actions for noise 0.
            own_values: (k,) Q_h of these.
        """
        if isinstance(self._strategy, CommittedFallback):
            return own, own_values
        picked, values = self._nearest(states, of)
        if isinstance(self._strategy, FallbackPolicy):
            first, first_values = own, own_values
        elif isinstance(self._strategy, ProjectedGradient):
            first, first_values = self._descend(self._strategy, states, of)
        else:
            return picked, values
        # The default's candidate is taken where the strategy's own action is not acceptable.
        keep = (first_values <= of.limit) | ~(values < first_values)
        return torch.where(keep[:, None], first, picked), torch.where(keep, first_values, values)

    def _nearest(self, states: _States, of: _Proposals) -> tuple[Tensor, Tensor]:
        """Return what `NearestAcceptable` executes, (k, act), and its Q_h (k,)."""
        found, values, distance = self._weighed(states, of)
        good = values <= of.limit[:, None]
        return picked(found, values, nearest_of(good, distance, values, values.argmin(1)))

    def _weighed(self, states: _States, of: _Proposals) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates (k, c, act), their Q_h (k, c) and squared distances (k, c).

        The first candidate is the proposal, from which the distances are measured.
        """
        wanted = of.actions.to(torch.float32)
        found = torch.cat([wanted[:, None], self._candidates(states, wanted)], 1)
        found = found.clip(self._low, self._high)
        features = self._units.action_features(found)
        distance = (features - features[:, :1]).square().sum(-1)
        return found, nan_rejected(self._values(states, found)), distance

    def _candidates(self, states: _States, wanted: Tensor) -> Tensor:
        """Return the candidates (k, c, act) that `CandidateSet.actions` returns for arrays."""
        if self._discrete:
            return in_each(states.inputs, self._choices)
        near = self._units.unit(wanted)[:, None] + self._around
        return torch.cat(
            [
                self._acted(states, self._noise),
                self._units.to_box(near.clip(-1.0, 1.0)),
                in_each(states.inputs, self._points),
            ],
            1,
        )

    def _descend(
        self, how: ProjectedGradient, states: _States, of: _Proposals
    ) -> tuple[Tensor, Tensor]:
        """Return what `ProjectedGradient.walk` returns for arrays; all rows take all steps."""
        actions = of.actions.to(torch.float32).clip(self._low, self._high)
        values, slopes = self._slopes(states, actions)
        reach = torch.full_like(values, how.step_size)
        for _ in range(how.steps):
            going = (values > of.limit) & (reach >= SHORTEST)
            scaled = self._units.unit(actions)
            edge = 1.0 - 1e-6
            outward = (scaled <= -edge) & (slopes > 0) | (scaled >= edge) & (slopes < 0)
            slope = slopes.masked_fill(outward, 0.0)
            steep = slope.square().sum(-1).sqrt()
            moving = going & (steep > 0)
            reach = reach.masked_fill(going & ~moving, 0.0)
            gap = ((values - of.limit) / steep).to(torch.float32)
            length = (BEYOND * gap).clamp(min=SHORTEST).minimum(reach)
            target = (scaled - (length / steep)[:, None] * slope).clip(-1.0, 1.0)
            tried = self._units.to_box(target).clip(self._low, self._high)
            tried_values, tried_slopes = self._slopes(states, tried)
            lower = moving & (tried_values < values)
            actions = torch.where(lower[:, None], tried, actions)
            values = torch.where(lower, tried_values, values)
            slopes = torch.where(lower[:, None], tried_slopes, slopes)
            longest = (length / 2.0).masked_fill(lower, how.step_size)
            reach = torch.where(moving, longest, reach)
        return actions, values

    def _slopes(self, states: _States, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q_h (k,) and its gradient (k, act), as `SafetyModel.action_gradients` does."""
        features = self._units.action_features(actions)
        if isinstance(self._model.judge, BestPlan):
            worst, slope = self._model.judge.worst_and_gradient(
                self._networks, states.inputs, features
            )
        else:
            inputs = torch.cat([states.inputs, features], -1)
            worst, slope = largest_and_gradient(layers(self._networks[ADVANTAGE]), inputs)
            slope = slope[:, states.inputs.shape[1] :]
        values = action_value(self._scale, states.value, worst)
        return nan_rejected(values), slope * self._scale.step_rms

    def _acted(self, states: _States, noise: Tensor) -> Tensor:
        """Return the fallback actor's actions (n, c, act) for noise (c, z)."""
        actor = self._model.fallback_actor
        if actor is None:
            raise TypeError("a shield for a Box of actions needs a fallback actor, got none")
        each = len(noise)
        inputs = states.inputs[:, None].expand(-1, each, -1).flatten(0, 1)
        draws = in_each(states.inputs, noise).flatten(0, 1)
        scaled = actor.act(self._networks, inputs, draws)
        return self._units.to_box(nan_to_zero(scaled)).reshape(-1, each, scaled.shape[-1])

    # -- critics ---------------------------------------------------------------------------------

    def _states(self, rows: Tensor, constraint: Tensor | None) -> _States:
        """Return V_h of observations, rows (n, obs), as `Shield.states` does.

        The log's mean takes the place of entries that are not readable, and h is not known there.
        """
        near = self._readable.entries(rows)
        rows = torch.where(near, rows, self._units.mean)
        readable = near.all(-1)
        inputs = self._units.inputs(rows)
        excess = self._worst(self._excess, inputs)
        h = self._h(rows, constraint)
        if h is None:
            estimate = self._worst(self._estimate, inputs)
            return _States(inputs, state_value(self._scale, estimate, excess), readable, excess)
        known = torch.isfinite(h) & readable
        value = known_value(self._scale, h, excess).masked_fill(~known, torch.nan)
        return _States(inputs, value, known, excess)

    def _estimated(self, states: _States) -> _States:
        """Return states with the network's estimate of V_h where the source does not tell h."""
        if self._model.constraint is None:
            return states
        estimate = self._worst(self._estimate, states.inputs)
        guess = state_value(self._scale, estimate, states.excess)
        return states._replace(value=torch.where(states.value.isnan(), guess, states.value))

    def _values(self, states: _States, actions: Tensor) -> Tensor:
        """Return Q_h of actions (n, act), or of candidates (n, c, act), in n states."""
        features = self._units.action_features(actions)
        if features.dim() == 2:
            return self._judged(states, features[:, None])[:, 0]
        return self._judged(states, features)

    def _judged(self, states: _States, features: Tensor) -> Tensor:
        """Return Q_h (n, c) of actions that are features (n, c, features) already."""
        judge = self._model.judge
        if isinstance(judge, BestPlan):
            worst = judge.worst(self._networks, states.inputs, features)
        else:
            seen = states.inputs[:, None].expand(-1, features.shape[1], -1)
            inputs = torch.cat([seen, features], -1)
            worst = self._worst(self._advantage, inputs.flatten(0, 1))
            worst = worst.reshape(features.shape[:-1])
        return action_value(self._scale, states.value[:, None], worst)

    def _worst(self, members: _Members, x: Tensor) -> Tensor:
        """Return the largest output (n,) of an ensemble of one output for inputs (n, inputs)."""
        size = _CPU_BLOCK if self.device.type == "cpu" else _BLOCK
        parts = [
            torch.cat([run(stack, part) for stack in members]) for part in torch.split(x, size)
        ]
        return torch.cat(parts, 1)[..., 0].amax(0)

    def _members(self, name: str) -> _Members:
        stack = layers(self._networks[name])
        if self.device.type != "cpu":
            return [stack]
        # On a CPU, one member after the other is faster than a product of all members.
        count = len(stack[0][0])
        return [[(w[i : i + 1], b[i : i + 1]) for w, b in stack] for i in range(count)]

    # -- the constraint --------------------------------------------------------------------------

    def _h(self, rows: Tensor, constraint: Tensor | None) -> Tensor | None:
        """Return h (n,) float32 of observations, rows (n, obs); None where a network estimates it.

        `constraint` is what the caller passes.
        """
        source = self._model.constraint
        if source is None:
            if constraint is not None:
                raise ValueError(
                    "constraint must be left out, because in this shield a network estimates h; "
                    "with_constraint(ConstraintSource(name)) makes a shield that takes h from its "
                    "caller, without a record"
                )
            return None
        what = "constraint"
        if constraint is None:
            if self._constraint_fn is None:
                raise UnknownConstraintError(
                    f"the constraint '{source.name}' has no function of tensors{self._unusable}: "
                    "pass one, to_torch(device, constraint_fn=function), pass the tensor, "
                    "filter(observation, action, constraint=h), or use the network's estimate "
                    "instead, shield.with_constraint(None), which drops the record"
                )
            constraint = self._constraint_fn(self._observations.batch(rows))
            what = f"the result of the constraint '{source.name}'"
        check_tensor(constraint, what, self.device)
        if constraint.shape != rows.shape[:1]:
            raise ValueError(
                f"{what} must be one number for each of {len(rows)} observations, shape "
                f"({len(rows)},), got {tuple(constraint.shape)}"
            )
        return constraint.to(torch.float32)

    def _registered(self, name: str) -> TensorConstraint | None:
        """Return the shield's own function of the constraint, if it takes and returns tensors."""
        function: Any = self._model.constraint and self._model.constraint.function
        function = function or find_constraint(name).function
        if function is None:
            self._unusable = " in this process"
            return None
        try:
            h = function(self._observations.batch(self._units.mean.expand(2, -1)))
        except Exception as error:  # the function was made for arrays
            self._unusable = f" (the function for arrays raises {type(error).__name__}: {error})"
            return None
        if isinstance(h, Tensor) and h.shape == (2,) and h.device == self.device:
            return function  # type: ignore[no-any-return]
        self._unusable = f" (the function for arrays returns {type(h).__name__})"
        return None

    # -- units and checks ------------------------------------------------------------------------

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.tensor(np.asarray(array, np.float32), device=self.device)

    def _action_rows(self, action: Tensor, count: int) -> Tensor:
        rows = self._actions.rows(action)
        if len(rows) != count:
            raise ValueError(f"got {count} observations and {len(rows)} actions")
        if not self._discrete and action.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"action must be float32 or float64 for {self._model.action_space}, got "
                f"{action.dtype}; pass action.float()"
            )
        return rows

    def _limits(self, threshold: float | Tensor | None, count: int) -> Tensor:
        """Return the thresholds (count,) as float64."""
        if threshold is None:
            return self._limit.expand(count)
        if isinstance(threshold, float | int | np.number):
            return torch.full((count,), float(threshold), dtype=torch.float64, device=self.device)
        check_tensor(threshold, "threshold", self.device)
        if threshold.shape not in ((), (count,)):
            raise ValueError(
                f"threshold must be one number, or one for each of {count} observations, got shape "
                f"{tuple(threshold.shape)}"
            )
        return threshold.to(torch.float64).expand(count)


def _check_arguments(
    shield: Shield, constraint_fn: TensorConstraint | None, budget: int | None
) -> None:
    """Raise where an argument has no meaning for the shield."""
    source, judge = shield.model.constraint, shield.model.judge
    if constraint_fn is not None and not callable(constraint_fn):
        raise TypeError(f"constraint_fn must be a function of tensors, got {constraint_fn!r:.60}")
    if constraint_fn is not None and source is None:
        raise ValueError(
            "constraint_fn must be left out, because in this shield a network estimates h; "
            "shield.with_constraint(function) makes a shield that takes h from a function, without "
            "a record"
        )
    if budget is None:
        return
    if type(budget) is not int:
        raise TypeError(f"budget must be a whole number of rows or None, got {budget!r}")
    if budget < 1:
        raise ValueError(
            f"budget must be at least 1 row, got {budget}; a shield that replaces actions by "
            "CommittedFallback searches in no row"
        )
    if judge is not None:
        raise TypeError(
            "budget must be None for a shield that judges actions by plans (R2PAC): its critic "
            "copies numbers to the device in each call, which cannot be captured"
        )


def nearest_of(good: Tensor, distance: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Return the index (k,) of the nearest good candidate; of several, that of the lowest Q_h.

    Args:
        good: (k, c) which candidates may be chosen.
        distance: (k, c) their distances from the proposal.
        values: (k, c) their Q_h.
        otherwise: (k,) the index where no candidate is good.
    """
    distance = distance.masked_fill(~good, torch.inf)
    near = distance <= distance.amin(1, keepdim=True)
    nearest = values.masked_fill(~(near & good), torch.inf).argmin(1)
    return torch.where(good.any(1), nearest, otherwise)


def picked(found: Tensor, values: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Return candidate number `best` (k,) of each state, (k, act), and its Q_h (k,)."""
    at = best[:, None]
    picked = found.gather(1, at[..., None].expand(-1, -1, found.shape[-1]))
    return picked[:, 0], values.gather(1, at)[:, 0]


def nan_rejected(values: Tensor) -> Tensor:
    """Return Q_h with infinity in place of NaN, so that no comparison accepts it."""
    return values.masked_fill(values.isnan(), torch.inf)


def _where_known(known: Tensor, values: Tensor) -> Tensor:
    """Return the values, with infinity where they are not known or the networks overflowed."""
    return values.masked_fill(~known | values.isnan(), torch.inf)
