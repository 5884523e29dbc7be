"""Agents that act behind a gate on Q_h: SafeFQL and FLRP.

Such an agent executes a draw of its actor only where Q_h says that it is safe by the margin m:

1. the first draw where Q_h(s, a) < -m;
2. otherwise the safest, that of lowest Q_h, of further draws, where its Q_h is below -m;
3. otherwise, of the candidates of a shield, the action with Q_h <= -m that is nearest to the safest
   draw (`shield.candidates.CandidateSet`: points of the box and actions of the fallback);
4. otherwise the last resort (`GateConfig.last_resort`).

The draws of step 2 are, for SafeFQL, the first one and N further ones of the same actor; for FLRP,
whose refinement can leave the log's actions, N draws without refinement. A Q_h that is NaN passes
no step.
With N = 1 the first draw is always executed, as in the papers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch

from safeshield.calibration.calibrate import calibrate, remembering
from safeshield.calibration.consistency import check_calibrations
from safeshield.evaluation.episodes import Evaluation, evaluate
from safeshield.files.schema import json_values, record_from_json
from safeshield.files.settings import PositiveInt
from safeshield.nn.arrays import Float
from safeshield.nn.mlp import Networks
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.record import ActorRecord, Attempt
from safeshield.shield.replacement import nan_rejected, nearest_acceptable
from safeshield.shield.shield import Shield
from safeshield.shield.tensors import picked
from safeshield.training.agent import AgentFile, describing
from safeshield.training.config import CriticConfig
from safeshield.training.critics import CriticAgent, CriticArchitecture

if TYPE_CHECKING:
    from safeshield.calibration.promises import Promise
    from safeshield.shield.export_policy import GraphConstraint, GraphNoise
    from safeshield.spaces.generic import Env, VectorEnv


@dataclass(frozen=True)
class GateConfig(CriticConfig):
    """Settings of agents that act behind a gate on Q_h."""

    only_acting: ClassVar[frozenset[str]] = frozenset({"candidates", "last_resort"})
    candidates: PositiveInt = 16
    """Number N of further draws where the first draw is not safe by the margin. The safest of
    these draws is executed if it is safe by the margin. Otherwise the agent executes the nearest
    acceptable action that the search of a shield finds. A larger N is safer and slower.
    With 1 the first draw is always executed, as in the papers. SafeFQL's further draws are those of
    its student, FLRP's have no refinement."""
    last_resort: Literal["nearest", "lowest"] = "nearest"
    """Action where neither a draw nor the search is acceptable. "lowest" means the action of
    lowest Q_h that the search finds. "nearest" means the action with Q_h <= V_h that is nearest to
    the safest draw, and the lowest where no action has such a Q_h; in a state that violates
    already it means the safest draw itself. Where Q_h hardly depends on the action, the errors of
    the critics determine which action has the lowest Q_h. That action then changes from step to
    step, and the agent does not move away. A draw resembles the log's actions, which return to
    safe states. Not used with one candidate."""


ConfigT = TypeVar("ConfigT", bound=GateConfig)
ModelT = TypeVar("ModelT", bound=CriticArchitecture)


class GatedAgent(CriticAgent[ConfigT, ModelT]):
    """Base class of agents that act behind a gate on Q_h.

    An algorithm implements `_draw`, the actor, and `_judge`, the critics as a shield uses them. It
    overrides `_further` if the further draws come from another actor than the first one.
    """

    _safety_model: SafetyModel | None = None
    """The critics as a shield's safety model on NumPy arrays, created at first use."""
    _certified: tuple[GateConfig, ActorRecord] | None = None
    """The record of the latest calibration, with the settings for which it holds."""
    _memory: list[Attempt] | None = None
    """The attempts. Agents with the same weights share the list."""

    # -- methods that an algorithm implements -------------------------------------------------

    @abstractmethod
    def _draw(self, model: ModelT, networks: Any, observations: Any, noise: Any) -> Any:  # noqa: ANN401
        """Return the actor's actions (n, act) in [-1, 1] for given noise.

        Args:
            model: Architecture.
            networks: The weights, as NumPy arrays or as tensors.
            observations: n normalised observations, as NumPy arrays or as values of an ONNX graph.
            noise: Noise (n, `_noise_features`) of the same kind.
        """

    def _further(self, model: ModelT, networks: Any, observations: Any, noise: Any) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of further draws, for states whose first draw is rejected.

        The arguments are those of `_draw`.
        """
        return self._draw(model, networks, observations, noise)

    _same_actor: ClassVar[bool] = True
    """Whether `_further` draws from the actor of `_draw`, so that the first draw is one of them."""

    @abstractmethod
    def _judge(self, model: ModelT) -> SafetyModel:
        """Return the critics and the actor as a shield uses them."""

    @abstractmethod
    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) whose fallback is this agent's actor."""

    @property
    def _has_gate(self) -> bool:
        """Whether the settings let the gate decide."""
        return self.config.candidates > 1

    # -- the record and the margin ------------------------------------------------------------

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Calibrations of these weights, also those that failed.

        Agents made by `with_margin`, `with_candidates` and the like share them with this agent.
        """
        return tuple(self._memory or ())

    @attempts.setter
    def attempts(self, attempts: Sequence[Attempt]) -> None:
        if self._memory is None:
            self._memory = []
        self._memory[:] = attempts

    @property
    def record(self) -> ActorRecord | None:
        """The record of the calibration of this actor alone; None where there is none.

        An agent with other weights or other settings than the calibrated one has no record.
        """
        if self._certified is None or self._certified[0] != self.config:
            return None
        return self._certified[1]

    @property
    def gate(self) -> float:
        """Margin m of the gate Q_h(s, a) < -m, in units of h; with margin="auto" the measured one.

        Raises:
            RuntimeError: The agent has not been trained.
        """
        return self.config.margin_of(self._fitted().critics.safety)

    def diagnostics(self) -> dict[str, Any]:
        """Return the gate, the measured margin, and the promise of the record where there is one.

        Both margins are in units of h.
        """
        found = {"gate": self.gate, "measured_margin": self.measured_margin}
        return found if self.record is None else {**found, "promise": self.record.promise}

    def calibrate(
        self,
        env: Env | VectorEnv,
        *,
        epsilon: float | None = None,
        confidence: float = 0.99,
        promise: Promise | None = None,
        deterministic: bool = False,
        deltas: Sequence[float] | None = None,
        episodes: int | None = None,
        seed: int = 0,
        num_envs: int | None = None,
        workers: int = 0,
        ray: str | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """Return a copy with the record of a calibration of this actor ALONE, with no filter.

        The record says from which starts the deployed actor may be started: with the confidence,
        over the draw of the tested episodes,

            P(an episode with V_h(s_0) <= -delta violates) <= epsilon,

        where s_0 comes from the resets of `env`, the actor acts as tested, and the episode has at
        most the horizon of `env`. `record.delta` is the smallest delta that passed its test, and
        `record.promise` has the words. Delta selects starts and does not change the actions;
        `SafeFQL.recalibrated` trains a student whose gate is at that delta. With the setting
        ``candidates=1`` the actor is the paper's, one draw per step.

        The procedure is that of a shield (`calibration.calibrate.calibrate`), which describes the
        arguments: `promise` in place of `epsilon`, the `deltas` and `episodes` of the tests,
        `num_envs`, `workers`, `ray` and `progress_bar`. All agents with these weights in this
        process remember the attempt, in `attempts`.

        Args:
            env: The environment of the deployment. It must report ``info["constraint"]`` or
                ``info["cost"]``.
            epsilon: Rate of violating episodes to promise, by default 0.01.
            confidence: Confidence of the promise.
            promise: What to promise, where it is not a rate of violations.
            deterministic: The `deterministic` of `predict` in the tests. Choose what is deployed.
            deltas: Strictly decreasing thresholds to test, without a pilot.
            episodes: A fixed number of episodes for each test.
            seed: Seed of all draws, also of the actor's noise.
            num_envs: Number of environments that run side by side.
            workers: Number of processes that step the environments.
            ray: Address of a Ray cluster that steps them.
            progress_bar: Whether to show a progress bar.

        Raises:
            RuntimeError: The agent has not been trained.
            CalibrationError: No threshold meets the request.
            ValueError: As in `calibration.calibrate.calibrate`.

        Source: Safe Flow Q-Learning (arXiv 2603.15136), calibration of the safety threshold. The
        paper uses conformal prediction; the tests here are exact binomial ones (`sequential`).

        >>> import gymnasium, safeshield.envs
        >>> from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
        >>> from safeshield.data import collect
        >>> env = gymnasium.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
        >>> log = collect(env, "random", episodes=20, seed=0)
        >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,)))
        >>> agent = agent.fit(log, steps=30)
        >>> agent.record is None
        True
        >>> agent = agent.calibrate(env, epsilon=0.9, confidence=0.8, deltas=[0.0])
        >>> agent.record.delta, agent.record.policies[0].policy
        (0.0, 'SafeFQL')
        """
        shield = replace(self.shield(), attempts=self.attempts)
        with remembering(self):
            record = calibrate(
                shield,
                env,
                epsilon=epsilon,
                confidence=confidence,
                promise=promise,
                policy=self._changed(),
                deterministic=deterministic,
                deltas=deltas,
                episodes=episodes,
                seed=seed,
                num_envs=num_envs,
                workers=workers,
                ray=ray,
                progress_bar=progress_bar,
                alone=True,
            )
        assert isinstance(record, ActorRecord)
        self.attempts = record.attempts
        other = self._changed()
        other._certified = other.config, record
        return other

    def with_margin(self, margin: float) -> Self:
        """Return an agent with the same weights that acts with another margin.

        A draw passes the gate where Q_h < -margin (`GateConfig.candidates`). With a larger margin
        fewer first draws pass, and the agent is more cautious. The actor was trained for the
        margin of training; `SafeFQL.recalibrated` trains it for another one. The new agent has no
        record.

        Args:
            margin: The margin, in standard deviations of h over the log (`ValueConfig.margin`).

        Raises:
            ValueError: The margin is below 0 or not finite, or the agent executes its first draw
                whatever the margin is (``candidates=1``).

        >>> from safeshield.algorithms.safefql import SafeFQL
        >>> SafeFQL().with_margin(0.2).config.margin
        0.2
        """
        if not self._has_gate:
            raise ValueError(
                f"margin={margin} has no effect with candidates=1, which executes the first draw: "
                "use with_candidates(16) first"
            )
        return self._changed(margin=margin)

    def with_candidates(self, candidates: int) -> Self:
        """Return an agent with the same weights and another number N of further draws.

        The new agent has no record. With 1 it executes its first draw, as in the papers.

        Args:
            candidates: The number N (`GateConfig.candidates`).

        Raises:
            ValueError: The number is below 1.

        >>> from safeshield.algorithms.flrp import FLRP
        >>> FLRP().with_candidates(1).config.candidates
        1
        """
        return self._changed(candidates=candidates)

    def tradeoff(
        self,
        env: Env | VectorEnv,
        margins: Sequence[float] | None = None,
        *,
        episodes: int = 20,
        seed: int = 0,
        deterministic: bool = True,
        num_envs: int | None = None,
    ) -> dict[float, Evaluation]:
        """Return return and cost of this agent for several margins, without training it again.

        All margins play the same starts. `evaluation.tables.format_table` makes a table of the
        values. The figures are measurements and promise nothing. A margin that was chosen by them
        was chosen with a simulator; `calibrate` tests it on fresh episodes.

        Args:
            env: The environment, which reports ``info["constraint"]`` or ``info["cost"]``.
            margins: Margins to play (see `with_margin`); by default 1, 2, 4 and 8 times the agent's
                own.
            episodes: Number of episodes for each margin.
            seed: Seed of the starts.
            deterministic: The `deterministic` of `predict`; see `evaluation.episodes.evaluate`.
            num_envs: Number of environments that step together.

        Returns:
            The evaluation of each margin, in the order of `margins`.

        Raises:
            RuntimeError: The agent has not been trained.
            ValueError: As in `with_margin` and `evaluate`; `margins` is empty; or the agent's own
                margin is 0, and `margins` is None.

        >>> import gymnasium, safeshield.envs
        >>> from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
        >>> from safeshield.data import collect
        >>> env = gymnasium.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
        >>> log = collect(env, "random", episodes=20, seed=0)
        >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,)))
        >>> agent = agent.fit(log, steps=30)
        >>> table = agent.tradeoff(env, [0.1, 0.3], episodes=2)
        >>> [one.policy for one in table.values()]
        ['margin 0.1', 'margin 0.3']
        """
        if margins is None:
            own = self.gate / self._fitted().critics.safety.scale.spread
            margins = [own * times for times in (1, 2, 4, 8)] if own > 0 else []
        if not isinstance(margins, Sequence | np.ndarray) or not len(margins):
            raise ValueError(
                f"margins must hold at least one number, got {margins} (the agent's own margin is "
                f"{self.config.margin}): pass numbers in standard deviations of h, as [0.05, 0.1]"
            )
        self._fitted()
        return {
            margin: evaluate(
                env,
                self.with_margin(margin),
                episodes,
                seed,
                num_envs=num_envs,
                name=f"margin {margin:.4g}",
                deterministic=deterministic,
            )
            for margin in margins
        }

    # -- methods that OfflineAgent requires ---------------------------------------------------

    def _safety(self, model: ModelT) -> SafetyModel:
        if self._safety_model is None:
            self._safety_model = self._judge(model)
        return self._safety_model

    def _adopt(self, model: ModelT, networks: Networks) -> None:
        super()._adopt(model, networks)
        self._safety_model = None
        self._certified, self._memory = None, []

    def _changed(self, **changes: Any) -> Self:  # noqa: ANN401 - settings of any type
        other = super()._changed(**changes)
        other._certified = None
        return other

    def _header(self, model: ModelT) -> dict[str, Any]:
        record = self.record
        return {
            **super()._header(model),
            **({} if record is None else {"record": record.to_json()}),
            **({"attempts": [json_values(one) for one in self.attempts]} if self.attempts else {}),
        }

    def _take(self, read: AgentFile) -> None:
        super()._take(read)
        with describing(read.path):
            stored = read.header.get("record")
            record = None if stored is None else ActorRecord.from_json(stored)
            # Files of earlier releases remember no attempts.
            self.attempts = tuple(
                record_from_json(Attempt, one, "attempts")
                for one in read.header.get("attempts", ())
            )
            check_calibrations(record, self.attempts)
            if record is not None:
                self._certified = self.config, record

    # -- the choice of an action --------------------------------------------------------------

    def _act(self, model: ModelT, observations: Float, deterministic: bool) -> Float:
        """Return the actions of `_gated` where a network estimates h."""
        if not self._has_gate:
            return self._first(model, observations, deterministic)
        states = self._safety(model).evaluate_features(observations)
        return self._gated(model, states, deterministic)

    def _action_rows(self, model: ModelT, rows: Float, deterministic: bool) -> Float:
        """Return the actions of `_gated` as rows (n, act), with h of the agent's source."""
        if not self._has_gate:
            return super()._action_rows(model, rows, deterministic)
        states = self._safety(model).states(rows)
        return model.scaling.to_box(self._gated(model, states, deterministic))

    def _first(self, model: ModelT, observations: Float, deterministic: bool) -> Float:
        """Return the actions of one draw each; a deterministic call has the noise 0."""
        noise = self._one_noise(len(observations), self._noise_features(model), deterministic)
        return np.asarray(self._draw(model, self._arrays, observations, noise))

    def _gated(self, model: ModelT, states: StateValue, deterministic: bool) -> Float:
        """Return the first draw where it is safe enough, else what the module's docstring says.

        A deterministic call uses the noise 0 first, and the same N draws in every state.
        """
        observations, each = states.inputs, self.config.candidates
        actions = self._first(model, observations, deterministic)
        safety, limit = self._safety(model), -self.gate
        passes = safety.scaled_values(states, actions[:, None])[:, 0] < limit  # NaN does not
        at = np.flatnonzero(~passes)
        if not len(at):
            return actions
        noise = self._candidate_noise(len(at), each, self._noise_features(model), deterministic)
        seen = np.repeat(observations[at], each, axis=0)
        drawn = self._further(model, self._arrays, seen, noise).reshape(len(at), each, -1)
        if self._same_actor:
            drawn = np.concatenate([drawn, actions[at, None]], 1)
        judged = states.take(at)
        values = nan_rejected(safety.scaled_values(judged, drawn))
        actions[at] = drawn[np.arange(len(at)), values.argmin(1)]
        lost = values.min(1) >= limit
        if lost.any():
            at, judged = at[lost], judged.take(lost)
            actions[at] = self._beyond_the_draws(safety, judged, actions[at], limit)
        return actions

    def _beyond_the_draws(
        self, safety: SafetyModel, states: StateValue, actions: Float, limit: float
    ) -> Float:
        """Return the nearest acceptable action to each, among the candidates of a shield.

        Where there is none, `GateConfig.last_resort` decides.
        """
        scaling = safety.scaling
        found = CandidateSet().actions(safety, states, scaling.to_box(actions))
        rows = scaling.actions(found.reshape(-1, found.shape[-1])).reshape(*found.shape[:2], -1)
        drawn = np.concatenate([actions[:, None], rows], 1)
        values = nan_rejected(safety.scaled_values(states, drawn))
        lost = (values.min(1) > limit) & (self.config.last_resort == "nearest")
        # Where no candidate has Q_h <= V_h, `nearest_acceptable` returns that of the lowest Q_h.
        best = nearest_acceptable(drawn, values, np.where(lost, states.value, limit))
        if lost.any():
            own = safety.violating(states.take(lost)) & np.isfinite(values[lost, 0])
            best[lost] = np.where(own, 0, best[lost])
        return np.asarray(drawn[np.arange(len(actions)), best])

    def graph_actions(self, rows: Any, h: GraphConstraint | None, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of `predict` as values of an ONNX graph, see `_gated`."""
        if not self._has_gate:
            return super().graph_actions(rows, h, noise)
        from safeshield.shield.export import GraphShield

        model, each = self._fitted(), self.config.candidates
        judge = GraphShield(self.shield(), rows.recorder)
        limit, width = -self.gate, self._noise_features(model)
        states: Any = judge.estimated(judge.states(rows, h))
        first = self._act_on_graph(model, states.inputs, noise)
        table = noise.several(states.inputs, each, width, self.config.seed)
        missing = ~(judge.judged(states, first[:, None])[:, 0] < limit)

        def further() -> list[Any]:
            index = missing.rows_where()
            some, own = states.take(index), first[index]
            seen = some.inputs[:, None].expand(-1, each, -1).flatten(0, 1)
            more = self._further(model, self._networks, seen, table[index].flatten(0, 1))
            options: Any = more.reshape(-1, each, more.shape[-1])
            if self._same_actor:
                options = torch.cat([options, own[:, None]], 1)
            values = judge.judged(some, options)
            safest, value = picked(options, values, values.argmin(1))
            beyond = judge.nearest_features(some, safest, limit, self.config.last_resort)
            chosen = torch.where((value >= limit)[:, None], beyond, safest)
            return [first.with_rows(index, chosen)]

        return judge.to_box(rows.recorder.where_any(missing, further, [first])[0])

    def _act_on_graph(self, model: ModelT, observations: Any, noise: GraphNoise) -> Any:  # noqa: ANN401
        """Return the actions of one draw each, as values of an ONNX graph."""
        drawn = noise.one(observations, self._noise_features(model))
        return self._draw(model, self._networks, observations, drawn)
