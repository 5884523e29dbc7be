"""Policies that act for many environments at once, and the conversion of other policies to them."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.spaces.batches import Batch, batch_length, take
from safeshield.spaces.rows import flat_actions

Array = npt.NDArray[Any]
Memory = tuple[npt.NDArray[Any], ...] | None
"""A recurrent state in the form that Stable-Baselines3's ``predict`` takes and returns."""


class BatchPolicy(Protocol):
    """A policy that acts for n environments at once.

    A batch policy may have a method ``start_wave(num_envs)``, which is called before each batch of
    episodes and should reset a recurrent state. `batch_policy` makes a batch policy of a function.
    """

    batched: bool
    """Always True. It distinguishes a batch policy from a function of one observation."""

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> Array:
        """Return n actions for n observations. All noise is drawn from `rng`.

        Both are batched as in Gymnasium's vector environments: arrays (n, ...), integers (n,) for
        a Discrete, dicts of arrays for a Dict.
        """
        ...


def start_wave(policy: object, num_envs: int) -> None:
    """Call the method ``start_wave`` of a policy, where it has one, before `num_envs` episodes."""
    start = getattr(policy, "start_wave", None)
    if callable(start):
        start(num_envs)


def batch_policy(function: Callable[[Batch, np.random.Generator], npt.ArrayLike]) -> BatchPolicy:
    """Decorate a function ``(observations, rng) -> actions`` so that it is a batch policy.

    `function` gets a batch of n observations and a random generator, and returns n actions. The
    result is the function marked as a batch policy.

    >>> @batch_policy
    ... def still(observations, rng):
    ...     return np.zeros((len(observations), 2))
    >>> still.batched
    True
    """

    @functools.wraps(function)
    def policy(observations: Batch, rng: np.random.Generator, /) -> Array:
        return np.asarray(function(observations, rng))

    marked = cast(BatchPolicy, policy)
    marked.batched = True
    return marked


def as_batch_policy(
    policy: object, action_space: gym.Space[Any], *, deterministic: bool = True
) -> BatchPolicy:
    """Return a batch policy that acts as `policy` does, with actions of `action_space`.

    `policy` may be, checked in this order:

    - ``"random"``: actions are uniform in the action space;
    - an object with ``act_batch(observations, rng) -> actions``;
    - a callable with ``batched = True`` (see `batch_policy`), which is used unchanged;
    - an object with Stable-Baselines3's ``predict``, which is called with the whole batch, its
      recurrent state and `deterministic`. Agents of this package draw their noise from `rng`,
      models of Stable-Baselines3 from torch's own generator;
    - a ``torch.nn.Module`` in evaluation mode (``module.eval()``), which gets a batch of
      observations as one tensor of its own dtype, or as a dict of them for a Dict, and returns a
      tensor of actions, as in `Shield.export_onnx`;
    - any other callable ``policy(observation) -> action``, which gets one observation at a time.

    Raises:
        ValueError: The name is unknown, ``"random"`` is used with an unbounded box, or a module is
            in training mode. Calls of a function raise it where the function returns no action.
        TypeError: `policy` is none of the above, or a class.

    >>> box = gym.spaces.Box(-1.0, 1.0, (1,))
    >>> policy = as_batch_policy(lambda observation: -observation[:1], box)
    >>> policy(np.array([[0.5, 0.0], [0.25, 0.0]]), np.random.default_rng(0)).tolist()
    [[-0.5], [-0.25]]
    """
    if isinstance(policy, str):
        if policy != "random":
            raise ValueError(
                f"the only policy with a name is 'random', got {policy!r:.80}; load an agent's "
                "file first (safeshield.load_agent, or load of the Stable-Baselines3 class)"
            )
        return _random_policy(action_space)
    if isinstance(policy, type):
        raise TypeError(
            f"policy must be an object, got the class {policy.__name__}: pass {policy.__name__}()"
        )
    act_batch = getattr(policy, "act_batch", None)
    if callable(act_batch):
        return batch_policy(lambda observations, rng: act_batch(observations, rng))
    if callable(policy) and getattr(policy, "batched", False):
        return cast(BatchPolicy, policy)
    if callable(getattr(policy, "predict", None)):
        return PredictPolicy(policy, deterministic)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(policy, torch.nn.Module):
        return _module_policy(policy)
    if callable(policy):
        return _function_policy(policy, action_space)
    raise TypeError(
        "policy must be 'random', have act_batch or predict, be a torch.nn.Module, or be a "
        f"function of one observation; got {type(policy).__name__}"
    )


def default_name(policy: object) -> str:
    """Return the name by which records and tables list a policy that the user has not named.

    It is a string itself, the qualified name of a function or method, and the class of any other
    object. It is "policy" for a lambda, which has no name.

    >>> default_name("random"), default_name(max), default_name(lambda observation: 0)
    ('random', 'max', 'policy')
    """
    if isinstance(policy, str):
        return policy
    named = policy.func if isinstance(policy, functools.partial) else policy
    name = getattr(named, "__qualname__", type(named).__qualname__).rpartition("<locals>.")[2]
    return "policy" if name == "<lambda>" else name


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's own generators for a block, and restore their states at its end.

    Policies with Stable-Baselines3's ``predict`` draw their noise from these generators. Nothing
    happens where torch has not been imported.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    # Without this list every device is initialised, which takes seconds.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def executable_actions(actions: npt.ArrayLike, space: gym.Space[Any], count: int) -> Array:
    """Return actions (count, *shape) as points of the space.

    Actions of a Box become float32 and are clipped to its bounds, as in Stable-Baselines3.

    Args:
        actions: Actions that a policy returned.
        space: Space of one action.
        count: Number of actions.

    Raises:
        ValueError: The actions have another shape, are NaN, or are not integers of the discrete
            space.

    >>> executable_actions([[2.0], [-0.5]], gym.spaces.Box(-1.0, 1.0, (1,)), 2).tolist()
    [[1.0], [-0.5]]
    """
    flat = flat_actions(space)
    discrete, shape = flat.discrete, (count, *(space.shape or ()))
    array = np.asarray(actions, dtype=None if discrete else np.float32)
    if array.shape != shape:
        raise ValueError(
            f"the policy must return actions of shape {shape}, got {array.shape}; "
            "a policy that takes a whole batch needs batched = True (see batch_policy)"
        )
    if discrete:
        rows, _ = flat.flatten(array, "the policy's actions")
        good = flat.contains(rows)
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(
                f"the policy must return integers of {space}, got {array[row]} for environment "
                f"{row}"
            )
        return flat.unflatten(rows)
    if np.isnan(array).any():
        row = int(np.argmax(np.isnan(array).reshape(count, -1).any(axis=1)))
        raise ValueError(f"the policy returned NaN for environment {row}: {array[row]}")
    box = cast(gym.spaces.Box, space)
    inside: Array = np.clip(array, box.low.astype(np.float32), box.high.astype(np.float32))
    return inside


def checked_log_prob(told: npt.ArrayLike, shape: tuple[int, ...], whose: str) -> Array:
    """Check log-probabilities that a method `log_prob` returned, and return them as float64.

    Args:
        told: The returned log-probabilities.
        shape: The shape that they must have.
        whose: The owner of the method, for error messages.

    Raises:
        ValueError: The shape differs, or a number is NaN or positive infinity.
    """
    values = np.asarray(told, np.float64)
    if values.shape != shape:
        raise ValueError(
            f"{whose} log_prob must return a number for each of {math.prod(shape)} actions, got "
            f"shape {values.shape}"
        )
    if not (values < np.inf).all():
        bad = values[~(values < np.inf)][0]
        raise ValueError(f"{whose} log_prob must be below infinity, got {bad}")
    return values


def _random_policy(space: gym.Space[Any]) -> BatchPolicy:
    flat = flat_actions(space)
    low, high = flat.low, flat.high
    whole = flat.discrete or np.issubdtype(space.dtype, np.integer)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"the policy 'random' needs a bounded action space, got {space}")

    @batch_policy
    def uniform(observations: Batch, rng: np.random.Generator) -> Array:
        shape = (batch_length(observations), flat.width)
        if whole:
            return flat.unflatten(
                rng.integers(low.astype(np.int64), high.astype(np.int64) + 1, shape)
            )
        return flat.unflatten(rng.uniform(low, high, shape))

    return uniform


def _function_policy(function: Callable[[Any], object], space: gym.Space[Any]) -> BatchPolicy:
    """Return a batch policy that calls a function for each observation and checks its actions."""
    shape = tuple(space.shape or ())

    def one(observation: Any) -> Array:  # noqa: ANN401
        returned = function(observation)
        try:
            action = np.asarray(returned)
        except ValueError:  # sequences of different lengths
            action = np.array(None)
        if action.dtype.kind not in "biuf" or action.shape != shape:
            raise ValueError(
                f"the policy must return one action of {space} for one observation, an array of "
                f"shape {shape}; got {returned!r:.60}. A function of several observations and a "
                "random generator needs safeshield.rollouts.policies.batch_policy"
            )
        return action

    @batch_policy
    def act(observations: Batch, rng: np.random.Generator) -> Array:
        return np.stack([one(take(observations, i)) for i in range(batch_length(observations))])

    return act


def _module_policy(module: Any) -> BatchPolicy:  # noqa: ANN401 - torch is not imported here
    import torch

    if module.training:
        raise ValueError(
            f"the policy {type(module).__name__} is in training mode, in which dropout and batch "
            "normalisation change its actions: call eval() on it first"
        )

    @batch_policy
    def act(observations: Batch, rng: np.random.Generator) -> Array:
        like = next(module.parameters(), torch.empty(0))

        def tensor(array: Array) -> torch.Tensor:
            return torch.as_tensor(np.asarray(array), device=like.device).to(like.dtype)

        given = (
            {name: tensor(entry) for name, entry in observations.items()}
            if isinstance(observations, dict)
            else tensor(observations)
        )
        with torch.no_grad():
            actions = module(given)
        if not isinstance(actions, torch.Tensor):
            raise TypeError(
                f"the policy {type(module).__name__} must return one tensor of actions, got "
                f"{type(actions).__name__}"
            )
        return np.asarray(actions.cpu().numpy())

    return act


@contextlib.contextmanager
def _noise_from(rng: np.random.Generator, model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let an agent draw its noise from `rng` in a block, so that a run's seed determines it."""
    own = getattr(model, "noise", None)
    if not isinstance(own, np.random.Generator):
        yield
        return
    model.noise = rng
    try:
        yield
    finally:
        model.noise = own


class PredictPolicy:
    """A batch policy made of a model with Stable-Baselines3's ``predict``.

    It keeps the recurrent state of the model between calls.

    Args:
        model: The model.
        deterministic: Whether the model uses its deterministic mode.
    """

    batched = True

    def __init__(self, model: Any, deterministic: bool) -> None:  # noqa: ANN401
        self._model = model
        self._deterministic = deterministic
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        """Reset the recurrent state, because `num_envs` new episodes begin."""
        self._state: Memory = None
        self._starts = np.ones(num_envs, dtype=np.bool_)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> Array:
        """Return the model's actions.

        An agent of this package draws its noise from `rng`, a model of Stable-Baselines3 from
        torch's own generator.
        """
        count = batch_length(observations)
        if len(self._starts) != count:
            self.start_wave(count)
        with _noise_from(rng, self._model):
            actions, self._state = self.predict(
                observations, self._state, self._starts, deterministic=self._deterministic
            )
        self._starts = np.zeros(count, dtype=np.bool_)
        return actions

    def predict(
        self,
        observations: Batch,
        state: Memory,
        starts: npt.NDArray[np.bool_] | None,
        *,
        deterministic: bool,
    ) -> tuple[Array, Memory]:
        """Return the model's actions in n states and its next recurrent state, storing neither.

        Args:
            observations: Batch of n observations.
            state: Recurrent state before the step; None at the start.
            starts: (n,) whether an episode begins; None where none does.
            deterministic: Whether the model uses its deterministic mode.
        """
        actions, state = self._model.predict(
            observations, state=state, episode_start=starts, deterministic=deterministic
        )
        return np.asarray(actions), state


class HandOver:
    """A batch policy that acts as one policy, and from a random step to the end as another one.

    A log that is collected with it shows a backup controller in the states to which a policy
    brings the system, as the values of the controller require (`ShieldConfig.backup`).

    Args:
        policy: The first policy, in any form that `as_batch_policy` takes.
        backup: The second policy. A function takes a batch of n observations and returns n actions,
            as a function of `register_backup` does.
        action_space: Space of one action.
        mean_steps: Mean number of steps before the hand-over, above 0. At each step it happens with
            the probability 1 / (1 + mean_steps).

    Raises:
        ValueError: `mean_steps` is not above 0 or not finite.
        TypeError: A policy is of no known form.

    >>> box = gym.spaces.Box(-1.0, 1.0, (1,))
    >>> policy = HandOver("random", lambda obs: -np.ones((len(obs), 1)), box, mean_steps=1e-9)
    >>> policy(np.zeros((2, 2)), np.random.default_rng(0)).tolist()
    [[-1.0], [-1.0]]
    """

    batched = True

    def __init__(
        self, policy: object, backup: object, action_space: gym.Space[Any], mean_steps: float
    ) -> None:
        if not (mean_steps > 0 and math.isfinite(mean_steps)):
            raise ValueError(f"mean_steps must be finite and above 0, got {mean_steps}")
        if callable(backup) and not callable(getattr(backup, "predict", None)):
            function = backup
            backup = batch_policy(lambda observations, _: function(observations))
        self._policies = [as_batch_policy(one, action_space) for one in (policy, backup)]
        self._rate = 1.0 / (1.0 + mean_steps)
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes in `num_envs` environments with the first policy."""
        self._over = np.zeros(num_envs, dtype=np.bool_)
        for policy in self._policies:
            start_wave(policy, num_envs)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> Array:
        """Return the actions (n, ...) of the policy that acts in each of n environments.

        Raises:
            ValueError: The second policy returns actions of another shape than the first.
        """
        count = batch_length(observations)
        if len(self._over) != count:
            self._over = np.zeros(count, dtype=np.bool_)
        self._over |= rng.random(count) < self._rate
        first, second = (np.asarray(policy(observations, rng)) for policy in self._policies)
        if second.shape != first.shape:
            raise ValueError(
                f"backup must return one action for each of {count} observations, shape "
                f"{first.shape}, got {second.shape}"
            )
        over = self._over.reshape(-1, *[1] * (first.ndim - 1))
        return np.where(over, second, first)
