r"""R2PAC: Region-Based Reward Penalty over Action Chunks.

It trains in three phases on one log. docs/r2pac.md lists the differences from the paper and their
reasons.

1. critics: costs and the unsafe region that follows from them (`regions`), penalised rewards over
   chunks of h actions, and the safety values that a shield needs (eq. 10 to 16);
2. actor: a flow that imitates chunks with the label "good" and is guided beyond them (eq. 17 to
   21), or one of two weighted imitators (eq. 40, 41; `nn.chunk_actors`);
3. student: the actor distilled into a one-step network, as in SafeFQL.

The agent chooses the best of `candidates` sampled plans. In safe states this is the plan of highest
penalised Q_r, and in the others the plan of lowest Q_c. It executes the first actions of that plan
and then plans again. The module docstring of `algorithms.r2pac.losses` has the losses.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from safeshield.algorithms.r2pac.config import R2PACConfig
from safeshield.algorithms.r2pac.losses import ACTOR, ChunkArchitecture, R2PACRun, region_of
from safeshield.algorithms.r2pac.regions import (
    LEVEL,
    CostRegion,
    RegionReport,
    proposition_1,
    report_region,
)
from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number, whole
from safeshield.nn.actor import BEHAVIOUR, FALLBACK, FlowActor, of_noise
from safeshield.nn.arrays import Float
from safeshield.nn.chunk_actors import ChunkActor
from safeshield.nn.flow import velocity_network
from safeshield.nn.mlp import EnsembleMLP
from safeshield.nn.plan_actor import PLAN, BestPlan, PlanActor
from safeshield.shield.critics import SafetyModel
from safeshield.shield.replacement import nan_rejected
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import flat_actions
from safeshield.spaces.scaling import Scaling
from safeshield.training.architecture import Interface
from safeshield.training.critics import CriticAgent, Critics
from safeshield.training.log import (
    LogTensors,
    check_boundary,
    labelled,
    logged_returns,
    scale_of_returns,
)
from safeshield.training.registry import register
from safeshield.training.safety import restored_safety
from safeshield.training.state import TrainState
from safeshield.values.reward import COST_NETWORKS, RewardCritics
from safeshield.values.units import SAFETY_NETWORKS


@register("r2pac")
class R2PAC(CriticAgent[R2PACConfig, ChunkArchitecture]):
    """Plan chunks of actions that stay outside the region of states from which costs follow.

    Args:
        config: Settings; see `R2PACConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> config = R2PACConfig(critic_hidden=(16,), flow_hidden=(16,), student_hidden=(16,))
    >>> agent = R2PAC(config).fit(log, steps=30)
    >>> agent.predict(np.zeros((3, 2), np.float32), deterministic=True)[0].shape
    (3, 2)
    >>> agent.plan(np.zeros(2, np.float32)).shape
    (5, 2)
    """

    config_type = R2PACConfig
    file_format = "safeshield-r2pac"
    run_type = R2PACRun
    _before: ClassVar[dict[str, Any]] = {
        **CriticAgent._before,
        "trust_labels": True,
        "ends": "terminals",
        "fit_unsafe": False,
    }
    _fewest_steps = 3

    def acting_by(
        self,
        inference: Literal["flow", "student"],
        *,
        candidates: int | None = None,
        execute: int | None = None,
        choose: Literal["region", "cost"] | None = None,
    ) -> Self:
        """Return an agent with the same weights and other settings of planning.

        Args:
            inference: Network that samples plans: "flow", or the one-step "student".
            candidates: Number of plans from which to choose; None leaves it unchanged.
            execute: Number of actions of a plan to execute; None leaves it unchanged.
            choose: Choice among the plans (`R2PACConfig.choose`); None leaves it unchanged.

        Raises:
            ValueError: A name is unknown, or a number is out of range.
        """
        given: dict[str, Any] = {
            "candidates": candidates,
            "execute": execute,
            "choose": choose,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return self._changed(inference=inference, **changes)

    def shield(self, plans: int = 8) -> Shield:
        """Return an uncalibrated shield (delta 0) that judges plans; its fallback is the student.

        It accepts an action if at least one of `plans` plans that begin with the action has Q_h(s,
        chunk) <= -delta. Otherwise it replaces the action by one for which this holds, where it
        finds one.

        Args:
            plans: Number of plans that the student samples in each state. With 0, actions are
                judged alone, as by the shields of other agents.

        Raises:
            TypeError: `plans` is not a whole number.
            ValueError: `plans` is negative.
        """
        model, plans = self._fitted(), whole("plans", plans, least=0)
        names = (*SAFETY_NETWORKS, PLAN, FALLBACK, BEHAVIOUR)
        widths = model.scaling.observation_features, model.scaling.action_features
        planner = PlanActor(*widths, self.config.student_hidden, model.chunk)
        judge = BestPlan(planner, model.plan.hidden, model.plan.members, plans)
        return Shield(
            SafetyModel(
                *model.interface,
                model.critics.safety.scale,
                {name: self._arrays[name] for name in names},
                fallback_actor=planner,
                behaviour_actor=FlowActor(*widths, self.config.flow_hidden, self.config.flow_steps),
                judge=judge if plans else None,
            ),
            trained_by=f"R2PAC, seed {self.config.seed}",
            training_episodes=self._episodes,
        )

    def plan(self, observation: Batch, deterministic: bool = False) -> Float:
        """Return the chosen chunk of h actions: (h, *action's shape), or (n, h, *action's shape).

        Args:
            observation: One observation or a batch of n.
            deterministic: Whether to sample plans from the same fixed noise in every state.

        Raises:
            ValueError: An observation has another shape than the observation space, or is not
                finite.
        """
        model = self._fitted()
        rows, single = self._rows(model, observation, "observation")
        chunks = self._plans(model, model.scaling.observations(rows), deterministic)
        scaled = chunks.reshape(len(rows) * model.chunk, model.scaling.action_features)
        points = flat_actions(model.action_space).unflatten(model.scaling.to_box(scaled))
        actions = points.reshape(len(rows), model.chunk, *points.shape[1:])
        return np.asarray(actions[0] if single else actions)

    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[Float, tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the state, with the signature of Stable-Baselines3.

        Args:
            observation: One observation or a batch of n.
            state: With `execute` above 1, the state that the last call returned, which holds the
                current plans. With None every call makes new plans.
            episode_start: (n,) whether an episode, and therefore a new plan, begins.
            deterministic: Whether to sample plans from the same fixed noise in every state.

        Raises:
            ValueError: An observation has another shape than the observation space, or is not
                finite; or the state is not one that a call for n observations returned.
        """
        if self.config.steps_of_a_plan == 1:
            return super().predict(observation, state, episode_start, deterministic)
        model = self._fitted()
        rows, single = self._rows(model, observation, "observation")
        seen = model.scaling.observations(rows)
        plans, done = self._under_way(model, len(seen), state, episode_start)
        # In an unsafe state the agent plans again at once.
        over = (done >= self.config.steps_of_a_plan) | self._unsafe(model, seen)
        due = np.flatnonzero(over)
        if len(due):
            plans[due] = self._plans(model, seen[due], deterministic).reshape(-1, *plans.shape[1:])
            done[due] = 0
        scaled = plans[np.arange(len(rows)), done]
        actions = flat_actions(model.action_space).unflatten(model.scaling.to_box(scaled))
        return (actions[0] if single else actions), (plans, done + 1)

    def _under_way(
        self,
        model: ChunkArchitecture,
        count: int,
        state: tuple[npt.NDArray[Any], ...] | None,
        episode_start: npt.NDArray[np.bool_] | None,
    ) -> tuple[Float, npt.NDArray[np.int64]]:
        """Return the current plans (n, h, act) and the number of executed actions of each, (n,)."""
        shape = (count, model.chunk, model.scaling.action_features)
        if state is None:
            return np.zeros(shape, np.float32), np.full(count, model.chunk)
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise ValueError(f"state must be what predict returned, got {state!r:.60}")
        plans, done = (np.array(part) for part in state)
        if plans.shape != shape or done.shape != (count,):
            raise ValueError(
                f"state must be what predict returned for {count} observations, plans {shape} and "
                f"counts {(count,)}, got {plans.shape} and {done.shape}"
            )
        if not (np.abs(plans) <= 1.0).all() or not ((done >= 0) & (done <= model.chunk)).all():
            raise ValueError(
                "state must be what predict returned, but its plans are not actions in [-1, 1] or "
                f"its counts are not in [0, {model.chunk}]"
            )
        if episode_start is not None:
            starts = np.asarray(episode_start, dtype=bool)
            if starts.shape != (count,):
                raise ValueError(f"episode_start must have shape {(count,)}, got {starts.shape}")
            done = np.where(starts, model.chunk, done)
        return plans, done

    @property
    def region(self) -> RegionReport:
        """Level and size of the unsafe region over the log."""
        report = self._fitted().region
        if report is None:
            raise RuntimeError("this agent's file lacks its unsafe region; train the agent again")
        return report

    def diagnostics(self) -> dict[str, Any]:
        """Return the region and the penalty, as JSON values."""
        return {"region": self.region._asdict(), "penalty": self._fitted().penalty}

    # -- methods that OfflineAgent requires ---------------------------------------------------

    def _check_log(self, dataset: OfflineDataset) -> OfflineDataset:
        return with_chunks(labelled(dataset, self.config.label_magnitude), self.config.chunk)

    def _units(self, dataset: OfflineDataset, scaling: Scaling) -> dict[str, Any]:
        config = self.config
        if config.ends == "terminals+timeouts":
            ends = dataset.terminated | dataset.truncated
            dataset = dataclasses.replace(
                dataset, terminated=ends, truncated=np.zeros_like(dataset.truncated)
            )
        units = super()._units(dataset, scaling)
        margin = config.margin_of(restored_safety(units, scaling, config))
        if config.trust_labels and (dataset.constraints > -margin).all():
            raise ValueError(
                "the unsafe region holds all of the log's states: each violates, or lies within "
                f"the margin of a violation ({margin:g} in units of h); lower margin, or log some "
                "careful episodes"
            )
        longest, spread = int(dataset.episode_lengths.max()), None
        penalty: Any = config.penalty
        if penalty == "prop1":
            # The level of the region is not known yet.
            low, high = float(dataset.rewards.min()), float(dataset.rewards.max())
            penalty = proposition_1(low, high, longest, config.discount, 1.0)
        elif penalty is None:
            penalty = -float(logged_returns(dataset, config.discount).min())
        if config.region != "safety":
            paid = -(dataset.next_constraints > -margin).astype(np.float64)
            _, spread = scale_of_returns(logged_returns(dataset, config.discount, paid))
        return {**units, "cost_scale": spread, "penalty": penalty, "longest": longest}

    def _build(self, interface: Interface, units: dict[str, Any]) -> ChunkArchitecture:
        model, costs = super()._build(interface, units), units["cost_scale"]
        if (costs is None) != (self.config.region == "safety"):
            raise ValueError(f"region {self.config.region!r} and cost_scale contradict each other")
        if costs is not None:
            # The initial values mean that no violation follows. Violations are learned within a few
            # chunks, while initial values that are too high would decrease only as fast as the
            # discount allows.
            costs = RewardCritics(
                model.scaling.observation_features,
                model.actor.width,
                self.config.critic_hidden,
                0.0,
                finite_number(costs, "cost_scale"),
                names=COST_NETWORKS,
                bounds=(-1.0 / (1.0 - self.config.discount), 0.0),
            )
        return dataclasses.replace(
            model,
            costs=costs,
            penalty=float(units["penalty"]),
            longest=whole("longest", units["longest"], least=1),
        )

    def _restore(self, interface: Interface, header: dict[str, Any]) -> ChunkArchitecture:
        finite_number(header["penalty"], "penalty")
        model, region = super()._restore(interface, header), header["region"]
        numbers = {name: finite_number(region[name], name) for name in RegionReport._fields}
        return dataclasses.replace(model, region=RegionReport(**numbers))

    def _architecture(self, interface: Interface, critics: Critics) -> ChunkArchitecture:
        config = self.config
        seen, act = interface.scaling.widths
        width = config.chunk * act
        actor = ChunkActor(
            config.actor,
            seen,
            width,
            config.flow_hidden,
            config.flow_steps,
            config.guidance,
        )
        chunked = dataclasses.replace(
            critics, reward=dataclasses.replace(critics.reward, action=width)
        )
        networks = {
            ACTOR: actor.network,
            FALLBACK: EnsembleMLP(seen + width, width, config.student_hidden),
            BEHAVIOUR: velocity_network(seen, act, config.flow_hidden),
        }
        return ChunkArchitecture(*interface, networks, chunked, config.chunk, actor)

    def _noise_features(self, model: ChunkArchitecture) -> int:
        # One further feature decides which labels are left out.
        return model.actor.width + 1

    def _settle(
        self, model: ChunkArchitecture, log: LogTensors, state: TrainState
    ) -> ChunkArchitecture:
        region, device = region_of(model, self.config), self.device
        level = region.most if isinstance(region, CostRegion) else None
        scales = {} if level is None else {LEVEL: torch.tensor(level, device=device)}
        plain = TrainState({}, self._networks, {}, scales, torch.zeros(0, device=device))
        generator = torch.Generator(device).manual_seed(self.config.seed)
        measured = region.read_level(plain, log, generator)
        margin = self.config.margin_of(model.critics.safety)
        report = report_region(region, measured, log, margin)
        penalty = model.penalty
        if self.config.penalty == "prop1" and report.level > 0:
            low, high = float(log.rewards.min()), float(log.rewards.max())
            discount = self.config.discount
            penalty = float(proposition_1(low, high, model.longest, discount, report.level))
        return dataclasses.replace(model, region=report, penalty=penalty)

    def _act(self, model: ChunkArchitecture, observations: Float, deterministic: bool) -> Float:
        """Return the first action of each plan."""
        plans = self._plans(model, observations, deterministic)
        return plans[:, : model.scaling.action_features]

    def _plans(self, model: ChunkArchitecture, observations: Float, deterministic: bool) -> Float:
        """Return the best of the sampled plans in each state, (n, h * act), in [-1, 1]."""
        count, each, width = len(observations), self.config.candidates, model.actor.width
        noise = self._candidate_noise(count, each, width, deterministic)
        seen = np.repeat(observations, each, axis=0)
        if self.config.inference == "student":
            network = model.networks[FALLBACK]
            drawn = of_noise(network, self._arrays[FALLBACK], seen, noise).clip(-1.0, 1.0)
        else:
            drawn = model.actor.sample(self._arrays[ACTOR], seen, noise)
        if each == 1:
            return np.asarray(drawn)
        # Q = V(s) + sigma A, so A alone decides the order of the plans in a state.
        region = region_of(model, self.config)
        worse = region.worse(self._arrays, seen, drawn).reshape(count, each)
        chosen = nan_rejected(worse).argmin(1)
        if self.config.choose == "region":
            gain = model.critics.reward.advantages(self._arrays, seen, drawn).min(0)
            safe = ~self._unsafe(model, observations)
            chosen = np.where(safe, nan_rejected(-gain).reshape(count, each).argmin(1), chosen)
        return np.asarray(drawn.reshape(count, each, width)[np.arange(count), chosen])

    def _unsafe(self, model: ChunkArchitecture, observations: Float) -> npt.NDArray[np.bool_]:
        """Return whether the costs decide in each state, because it is unsafe, (n,) bool."""
        if not self.config.recover:
            return np.zeros(len(observations), bool)
        region = region_of(model, self.config)
        return region.unsafe_of(self._arrays, observations, self.region.level)


def with_chunks(dataset: OfflineDataset, chunk: int) -> OfflineDataset:
    """Return a log without the episodes that are truncated before h steps and hold no chunk.

    `dataset` is the log, and `chunk` is h.

    Warns:
        UserWarning: Some episodes are left out.

    Raises:
        ValueError: No episode is left.
    """
    lengths = dataset.episode_lengths
    ends = dataset.episode_starts + lengths - 1
    short = (lengths < chunk) & ~dataset.terminated[ends]
    if not short.any():
        return dataset
    if short.all():
        raise ValueError(
            f"chunk must be at most the steps of an episode: all {len(short)} episodes of the log "
            f"are truncated before {chunk} steps, the longest after {lengths.max()}; lower chunk"
        )
    warnings.warn(
        f"{short.sum()} of {len(short)} episodes are truncated before {chunk} steps: they hold no "
        "chunk and are left out; lower chunk to learn from them",
        stacklevel=4,
    )
    left = dataset.select(np.flatnonzero(~short))
    check_boundary(left)
    return left
