"""How an agent of Safe-Support Q-learning acts, and what its file holds."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import finite_number
from safeshield.nn.mlp import Networks
from safeshield.online.collector import Collector, readable_batch
from safeshield.online.extraction import InducedPolicy
from safeshield.online.loop import OnlineLearner
from safeshield.online.losses import ACTOR, CLONE, CRITIC
from safeshield.online.safe_proposals import SafeBehaviour, admitted
from safeshield.online.safe_sets import SafeSet
from safeshield.online.updates import SSQLModel
from safeshield.proposals.sources import Behaviour
from safeshield.spaces.batches import Batch
from safeshield.training.architecture import Interface
from safeshield.training.state import TrainState

Array = npt.NDArray[Any]


class SoftAgent(OnlineLearner):
    """Acts by soft critics and a behaviour, or by a network. A subclass learns both."""

    safe_set: SafeSet | None = None
    """The actions that may be executed; None: every action."""
    _behaviour: Behaviour | None = None
    _collector: Collector | None = None
    """Collector of the current or the last `learn`; None where none has begun."""
    _state: TrainState | None = None
    _extracted = _cloned = False
    """Whether the parametric policy has been trained, and whether the behaviour is a clone."""

    def _warming(self) -> bool:
        """Return whether `learn` is collecting and has not learned anything yet."""
        return self._model is None and self._in_loop

    def diagnostics(self) -> dict[str, Any]:
        """Return properties of a trained agent that are not settings, as JSON values."""
        critics = self._fitted().critics
        return {
            "value_offset": critics.offset,
            "value_spread": critics.spread,
            "parametric_policy": self._extracted,
        }

    def _fitted(self) -> SSQLModel:
        if self._model is None:
            raise RuntimeError(
                "this agent has not learned yet: call learn() with more than learning_starts "
                f"({self.config.learning_starts}) steps, fit(), or SafeSupportQLearning.load()"
            )
        return self._model

    def _weights(self) -> Networks:
        """Return the weights that act: the critics' slow copies, and the other networks."""
        state = cast(TrainState, self._state)
        return {**state.networks, **state.targets}

    def _safe_behaviour(self, model: SSQLModel) -> SafeBehaviour:
        return SafeBehaviour(cast(Behaviour, self._behaviour), self.safe_set, model.action_codec)

    # -- acting -----------------------------------------------------------------------------------

    def predict(
        self,
        observation: Batch,
        state: tuple[Array, ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Return actions and the unchanged state, with the signature of Stable-Baselines3.

        The induced policy weighs the behaviour's own actions inside the safe set (in a Box,
        `predict_samples` draws of them). The parametric policy is a network, which may leave mu's
        support. Where the agent has a safe set, actions that it refuses are replaced. In the
        warm-up of `learn`, where a callback may call `predict`, the behaviour itself acts.

        Args:
            observation: One observation, or a batch.
            state: Unused, because the policy has no memory.
            episode_start: Unused.
            deterministic: Return the likeliest choice; in a Box, the draw of highest Q, or the
                centre of the heaviest component of the network's mixture.

        Raises:
            ValueError: The observation has another shape, or holds NaN or infinity.
            RuntimeError: Nothing has been learned; or the induced policy is needed and the agent
                has no behaviour; or the parametric policy is needed and has not been trained.
        """
        rng = np.random.default_rng(self.config.seed) if deterministic else self.noise
        if self._warming():
            return cast(Collector, self._collector).propose(observation, rng), state
        model = self._fitted()
        points, single = readable_batch(model.observation_codec, observation)
        if self._acts_induced():
            chosen, _ = self._induced().act(points, rng, deterministic=deterministic)
        else:
            actor = model.policy(self._weights()[ACTOR])
            chosen = (
                actor.most_likely(points) if deterministic else actor.draw(points, 1, rng)[:, 0]
            )
            chosen = admitted(self.safe_set, points, chosen)
        actions = model.action_codec.unflatten(chosen)
        return (actions[0] if single else actions), state

    def draw(self, observations: Batch, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draw actions of the induced policy in n states.

        Args:
            observations: Batch of n observations.
            rng: Generator of the draws.

        Returns:
            The n actions as points of the action space, and log pi*(a|s) - log mu(a|s) (n,).
            `value` is the expected discounted sum of the rewards minus temperature times the second
            array.

        Raises:
            RuntimeError: Nothing has been learned, or the agent has no behaviour.
        """
        chosen, nats = self._induced().act(observations, rng)
        return self._fitted().action_codec.unflatten(chosen), nats

    def _induced(self) -> InducedPolicy:
        model = self._fitted()
        if self._behaviour is None:
            raise RuntimeError(
                "the induced policy and its value weigh the behaviour's actions, and this agent "
                "has no behaviour: pass it to SafeSupportQLearning.load(path, behaviour)"
            )
        params, mu = self._weights()[CRITIC], self._safe_behaviour(model)
        return InducedPolicy(model, params, mu, self.config, self.device)

    def _acts_induced(self) -> bool:
        wanted = self.config.policy
        # A callback may call this before stage two has trained the network, or end the training.
        early = not self._extracted and (self._in_loop or self.config.extraction_steps > 0)
        if (wanted != "parametric" or early) and self._behaviour is not None:
            return True
        if wanted == "induced":
            self._induced()
        if not self._extracted:
            raise RuntimeError(
                "there is no parametric policy: learn with extraction_steps of at least 1, or pass "
                "the behaviour to SafeSupportQLearning.load(path, behaviour)"
            )
        return False

    def value(self, observation: Batch) -> Array | np.floating:
        """Return V(s), () or (n,): the estimated regularised return of the induced policy.

        The return is the discounted sum of regularised rewards. The regularised reward of a step is
        the reward minus temperature times KL(policy || behaviour) in the step's state.

        Raises:
            ValueError: The observation has a wrong shape, or holds NaN or infinity.
            RuntimeError: Nothing has been learned, or the agent has no behaviour.
        """
        points, single = readable_batch(self._fitted().observation_codec, observation)
        value = self._induced().value(points, np.random.default_rng(self.config.seed))
        return cast(np.floating, value[0]) if single else value

    # -- files ------------------------------------------------------------------------------------

    def _header(self, model: SSQLModel) -> dict[str, Any]:
        flags = {"extracted": self._extracted, "cloned": self._cloned}
        return {**super()._header(model), **flags, "guarded": self.safe_set is not None}

    def _kept(self, model: SSQLModel) -> tuple[str, ...]:
        there = {CRITIC: True, ACTOR: self._extracted, CLONE: self._cloned}
        return tuple(name for name, kept in there.items() if kept)

    def _restore(self, interface: Interface, header: dict[str, Any]) -> SSQLModel:
        flags = {name: header[name] for name in ("extracted", "cloned", "guarded")}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ValueError(f"{', '.join(flags)} must be true or false")
        self._extracted, self._cloned = flags["extracted"], flags["cloned"]
        offset, spread = (finite_number(header["value"][k], k) for k in ("offset", "spread"))
        if not spread > 0:
            raise ValueError(f"the values' spread must be above 0, got {spread}")
        return SSQLModel.of(self.config, interface, (offset, spread))
