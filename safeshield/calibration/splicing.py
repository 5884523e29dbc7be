r"""Continuations of logged episodes in a simulator, from the first step in which a shield steps in.

Up to its first intervention, an episode with a shield is the episode without it. So a logged
episode of the agent alone is the beginning of an episode with the shield, and a simulator that
restores the full state of the first rejected step can play the rest. The episode that is put
together has the distribution of an episode with the shield, where the simulator is right, under two
conditions, which this module keeps:

- The first action is the shield's answer to the LOGGED proposal. Only rejected proposals lead to a
  continuation, so a fresh draw of the proposal would be accepted too often.
- There is ONE continuation. Several continuations of one episode depend on each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.rollouts.copies import behind_shield, environment_name, is_vector_env
from safeshield.rollouts.infos import CONSTRAINT, COST
from safeshield.rollouts.policies import (
    PredictPolicy,
    as_batch_policy,
    executable_actions,
    torch_seeded,
)
from safeshield.rollouts.recorded import number_of
from safeshield.shield.shield import UncalibratedShieldWarning
from safeshield.spaces.batches import Batch, batch_of_one, copied, take
from safeshield.spaces.rows import fitted
from safeshield.spaces.schema import part_of

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env

Restore = Callable[[Any, Any, int, int], Any]
"""Function of a simulator that was just reset, the logged observation, the index of the episode in
the log and that of the step in the episode. It sets the simulator to the full state of this step,
and returns the observation there."""
_NEAR = 1e-3
"""Share of an entry's spread over the training log by which a restored observation may differ from
the logged one."""


class Continuation(NamedTuple):
    """How the rest of an episode went in the simulator."""

    violated: bool
    cut: bool
    """Whether the simulator truncated the episode before the horizon."""


class Splicer:
    """Plays the rest of logged episodes with a shield, in a simulator.

    Args:
        shield: The shield.
        log: The log whose episodes are continued.
        simulator: A Gymnasium environment that is not behind a shield.
        restore: See `Restore`; by default ``simulator.reset(options={"state": observation})``.
        policy: The agent. It chooses actions by the present observation alone.
        deterministic: The `deterministic` of a policy's ``predict``; None is for other policies.
        seed: Seed of the simulator and of the policy, together with the index of the episode.

    Raises:
        TypeError: `simulator` is no environment, `restore` no function, or `policy` a name.
        ValueError: `simulator` is a vector environment, has other spaces or is behind a shield; or
            `deterministic` is missing.
    """

    def __init__(
        self,
        shield: Shield,
        log: OfflineDataset,
        simulator: object,
        restore: Restore | None,
        policy: object,
        deterministic: bool | None,
        seed: int,
    ) -> None:
        if policy is None or isinstance(policy, str):
            raise TypeError(
                "method='spliced' needs policy, the agent itself, which acts in the continuations, "
                f"got {policy!r:.60}"
            )
        if is_vector_env(simulator) or not isinstance(simulator, gym.Env):
            raise TypeError(
                "simulator must be a single Gymnasium environment whose full state can be "
                f"restored, got {type(simulator).__name__}"
            )
        if behind_shield(simulator) is not None:
            raise ValueError(
                "simulator must not be behind a shield, because the continuation is played with "
                f"this one, got {simulator!s:.120}: pass the environment without its wrapper"
            )
        if restore is not None and not callable(restore):
            raise TypeError(
                "restore must be a function of the simulator, the observation, the episode and the "
                f"step, got {type(restore).__name__}"
            )
        if callable(getattr(policy, "start_wave", None)):
            raise ValueError(_memory(policy))
        acting = as_batch_policy(
            policy, shield.action_space, deterministic=deterministic is not False
        )
        if isinstance(acting, PredictPolicy) and deterministic is None:
            raise ValueError(
                "method='spliced' needs deterministic=True or False, as the agent acted while the "
                "log was made, because it acts in the continuations, got None"
            )
        env: Env = simulator
        shield.check_fits(part_of(env.observation_space, shield.observation_keys), env.action_space)
        self.name = environment_name(simulator)
        self._shield, self._log, self._env, self._restore = shield, log, env, restore
        self._policy, self._acting, self._seed = policy, acting, seed
        self._deterministic = bool(deterministic)

    @property
    def memoryless(self) -> bool:
        """Whether the agent was seen to keep no memory between its actions."""
        return isinstance(self._acting, PredictPolicy)

    def play(self, episode: int, step: int, steps: int) -> Continuation:
        """Return how an episode goes on from the step whose logged action the shield rejects.

        Args:
            episode: Index of the episode in the log.
            step: Index of this step in the episode, counted from 0.
            steps: Largest number of steps of the continuation.

        Raises:
            ValueError: The simulator's observation after the restoration is not the logged one, it
                reports neither a constraint nor a cost, or the agent has a memory.
        """
        env, space = self._env, self._env.action_space
        row = int(self._log.episode_starts[episode]) + step
        drawn = np.random.SeedSequence([self._seed, episode])
        noise, start, torch_seed = (int(one) for one in drawn.generate_state(3) >> 1)
        rng = np.random.default_rng(noise)
        with torch_seeded(torch_seed), warnings.catch_warnings():
            # That the shield is not calibrated is no news here.
            warnings.simplefilter("ignore", UncalibratedShieldWarning)
            seen: Batch = self._log.flat_observations.batch(self._log.observations[[row]])
            point = take(seen, 0)
            self._check(self._restored(point, episode, step, start), row, episode, step)
            action = self._log.flat_actions.unflatten(self._log.actions[[row]])
            h: object = self._log.constraints[row]
            for left in range(steps, 0, -1):
                executed, _ = self._shield.filter(copied(seen), action, constraint=self._given(h))
                observation, _, terminated, truncated, info = env.step(
                    fitted(np.asarray(executed)[0], np.dtype(space.dtype))
                )
                if _violates(info):
                    return Continuation(True, False)
                if terminated or truncated:
                    return Continuation(False, bool(not terminated and left > 1))
                if left > 1:
                    h = info.get(CONSTRAINT)
                    seen = batch_of_one(observation)
                    action = executable_actions(self._act(copied(seen), rng), space, 1)
        return Continuation(False, False)

    def _restored(self, point: Any, episode: int, step: int, seed: int) -> Any:  # noqa: ANN401
        if self._restore is None:
            return self._env.reset(seed=seed, options={"state": point})[0]
        self._env.reset(seed=seed)
        return self._restore(self._env, copied(point), episode, step)

    def _check(self, restored: Any, row: int, episode: int, step: int) -> None:  # noqa: ANN401
        """Raise ValueError unless the simulator is where the log was, as far as can be seen."""
        logged = self._log.observations[row]
        scaling = self._shield.model.scaling
        try:
            rows, _ = self._log.flat_observations.flatten(restored, "observation")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"restore must return the simulator's observation, got {restored!r:.60}: {error}"
            ) from error
        far = np.abs(rows[0] - logged) > _NEAR * scaling.observation_spread
        # An entry that could not be read on the plant says nothing of the state.
        if (far & np.isfinite(logged)).any() or np.isnan(rows[0][np.isfinite(logged)]).any():
            raise ValueError(
                "restore must set the simulator to the full state of the logged step, but in step "
                f"{step} of episode {episode} the simulator observes {rows[0]} where {logged} is "
                "logged; pass restore=function(simulator, observation, episode, step) that sets "
                "this state and returns the observation"
            )

    def _act(self, seen: Batch, rng: np.random.Generator) -> npt.NDArray[Any]:
        if not isinstance(self._acting, PredictPolicy):
            return np.asarray(self._acting(seen, rng))
        actions, memory = self._acting.predict(
            seen, None, np.ones(1, np.bool_), deterministic=self._deterministic
        )
        if memory is not None:
            raise ValueError(_memory(self._policy))
        return actions

    def _given(self, h: object) -> Any:  # noqa: ANN401
        """Return what the shield is told of h, where it cannot compute it."""
        source = self._shield.model.constraint
        if source is None or source.available:
            return None
        if h is None:
            raise ValueError(
                f"simulator must report info['constraint'], because the shield needs h and "
                f"'{source.name}' is not registered: register it (register_constraint)"
            )
        return h


def _violates(info: dict[str, Any]) -> bool:
    """Return whether an info reports a violation.

    Raises:
        ValueError: It reports neither a constraint nor a cost.
    """
    h, cost = number_of(info, CONSTRAINT), number_of(info, COST)
    if h is None and cost is None:
        raise ValueError(
            f"simulator must report info['constraint'] or info['cost'] at every step, got the keys "
            f"{sorted(info)}; add it in a wrapper (ConstraintFromFunction, CostFromFunction)"
        )
    return (h is not None and h > 0) or (cost is not None and cost > 0)


def _memory(policy: object) -> str:
    return (
        f"policy must choose its actions by the present observation alone, but "
        f"{type(policy).__name__} keeps a memory of the episode, which a log does not hold: record "
        "a trial with the shield on (method 'trial')"
    )
