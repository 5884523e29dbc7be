"""`ParallelSafetyShield`: a PettingZoo wrapper with a shield for each agent."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from safeshield.rollouts.infos import INTERVENED
from safeshield.shield.protocols import Decision
from safeshield.shield.runtime import ShieldRuntime
from safeshield.shield.shield import as_shield

try:
    from pettingzoo import ParallelEnv
    from pettingzoo.utils import BaseParallelWrapper
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ParallelSafetyShield wraps environments of PettingZoo: run pip install "
        '"safeshield[pettingzoo]"',
        name=error.name,
    ) from error


class ParallelSafetyShield(BaseParallelWrapper[Any, Any, Any]):  # type: ignore[misc]
    """Put a shield of its own in front of each agent of a parallel PettingZoo environment.

    The action of an agent is judged by this agent's shield, from this agent's observation. The
    environment gets the executed actions of all agents. Spaces, rewards and ends of episodes are
    those of the environment. The infos of a shielded agent have the shield's keys, as those of
    `SafetyShield`.

    A record's promise was tested with one agent in one environment. The other agents change the
    dynamics that this agent sees, so no promise holds here, and ``shield/certified`` is always
    False. Where each agent's constraint depends on the others, train each shield on a log of that
    agent from the joint environment.

    Args:
        env: A parallel environment. An agent's ``info["constraint"]`` or ``info["cost"]`` is that
            of this agent.
        shields: A shield for each agent, as `SafetyShield` takes them. Agents may share a shield.
        unshielded: The agents whose actions are executed unchanged. Each possible agent must be
            here or in `shields`.

    Raises:
        ValueError: An agent is in none of the two or in both, is not one of the environment's, or
            has other spaces than its shield. (In `step`) an agent that acts has no action, or was
            not observed; (in `reset`) the environment is shielded already.
        TypeError: A shield, `shields` or `env` is of a wrong type.

    >>> from safeshield.wrappers import ParallelSafetyShield  # doctest: +SKIP
    >>> env = ParallelSafetyShield(env, {"tug": "tug.safetensors"}, unshielded=["ferry"])
    ... # doctest: +SKIP
    """

    def __init__(
        self,
        env: ParallelEnv[Any, Any, Any],
        shields: Mapping[Any, Any],
        *,
        unshielded: Collection[Any] = (),
    ) -> None:
        if not isinstance(shields, Mapping):
            raise TypeError(
                "shields must be a mapping from the names of agents to their shields, got "
                f"{type(shields).__name__}"
            )
        if not hasattr(env, "possible_agents"):
            raise TypeError(
                f"env must be a parallel environment of PettingZoo, got {type(env).__name__}"
            )
        super().__init__(env)
        agents = set(env.possible_agents)
        _check_agents(agents, set(shields), set(unshielded))
        self.runtimes = {agent: _runtime(env, agent, one) for agent, one in shields.items()}
        """What applies each agent's shield."""

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
        """Reset the environment and evaluate the state in which each shielded agent starts.

        `seed` and `options` are passed to the environment. The result is its observations, and its
        infos with the shields' entries.
        """
        with self._transition():
            observations, infos = self.env.reset(seed=seed, options=options)
            if any(INTERVENED in info for info in infos.values()):
                raise ValueError(
                    "the environment is shielded already: put ParallelSafetyShield around the "
                    "plain environment, once"
                )
            told = self._observe(observations, infos, {})
        return observations, told

    def step(
        self, actions: dict[Any, Any]
    ) -> tuple[
        dict[Any, Any],
        dict[Any, float],
        dict[Any, bool],
        dict[Any, bool],
        dict[Any, dict[str, Any]],
    ]:
        """Execute each agent's action, or its replacement.

        The result is that of the environment, with the shields' entries in the infos.
        """
        decisions: dict[Any, Decision] = {}
        sent = dict(actions)
        for agent in self.env.agents:
            runtime = self.runtimes.get(agent)
            if runtime is None:
                continue
            if agent not in actions:
                raise ValueError(
                    f"actions must hold one for each agent that acts, and {agent!r} is missing: "
                    "what the environment does without one cannot be judged"
                )
            if not runtime.ready:
                raise ValueError(
                    f"the environment returned no observation of {agent!r}, or its last step or "
                    "reset failed, so no action can be judged; call reset()"
                )
            decision = decisions[agent] = runtime.filter(actions[agent])
            executed = decision.executed.copy()
            discrete = isinstance(self.env.action_space(agent), gym.spaces.Discrete)
            sent[agent] = executed[()] if discrete else executed
        with self._transition():
            observations, rewards, terminated, truncated, infos = self.env.step(sent)
            told = self._observe(observations, infos, decisions)
        return observations, rewards, terminated, truncated, told

    def _observe(
        self,
        observations: Mapping[Any, Any],
        infos: Mapping[Any, dict[str, Any]],
        decisions: Mapping[Any, Decision],
    ) -> dict[Any, dict[str, Any]]:
        """Return the infos with the entries of each shielded agent that was observed."""
        told = {agent: dict(info) for agent, info in infos.items()}
        for agent, runtime in self.runtimes.items():
            if agent not in observations:
                continue
            decision = decisions.get(agent)
            info = told.setdefault(agent, {})
            reached = runtime.observe(observations[agent], (dict(info),), starts=decision is None)
            if decision is None:
                info.update(runtime.start_infos())
            else:
                runtime.update()
                info.update(runtime.step_infos(decision, reached))
        return told

    @contextlib.contextmanager
    def _transition(self) -> Any:  # noqa: ANN401
        with contextlib.ExitStack() as stack:
            for runtime in self.runtimes.values():
                stack.enter_context(runtime.transition)
            yield


def _runtime(env: ParallelEnv[Any, Any, Any], agent: Any, given: Any) -> ShieldRuntime:  # noqa: ANN401
    shield = as_shield(given)
    spaces = env.observation_space(agent), env.action_space(agent)
    try:
        shield.check_fits(*spaces)
    except ValueError as error:
        raise ValueError(f"the shield of agent {agent!r} does not fit: {error}") from error
    return ShieldRuntime(shield, dtype=np.dtype(spaces[1].dtype), certifies=False)


def _check_agents(agents: set[Any], shielded: set[Any], unshielded: set[Any]) -> None:
    unknown = sorted(map(repr, (shielded | unshielded) - agents))
    if unknown:
        raise ValueError(
            "shields and unshielded must name agents of the environment, "
            f"{sorted(agents, key=repr)}, got {', '.join(unknown)}"
        )
    both = sorted(map(repr, shielded & unshielded))
    if both:
        raise ValueError(f"{', '.join(both)} must be in shields or in unshielded, not in both")
    missing = sorted(map(repr, agents - shielded - unshielded))
    if missing:
        raise ValueError(
            f"each agent needs a shield, and {', '.join(missing)} has none: add it to shields, or "
            "name it in unshielded to execute its actions unchanged"
        )
