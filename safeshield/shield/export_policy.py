"""Policies inside an ONNX graph: which kinds can be written, and how each of them acts.

The agent's own networks are run on values of the graph (`nn.graph`). Each function here does what
the policy's ``predict`` does: it converts observations, runs the networks, and scales the actions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch

from safeshield.nn.graph import BATCH, OPSET, CannotExportError, Recorder, Traced
from safeshield.spaces.schema import check_same_space

_REPAIR = (
    "pass a torch.nn.Module from observations to actions, or export it yourself, "
    "torch.onnx.export(module, ...), and pass the .onnx file"
)


class GraphNoise:
    """The noise of a policy: fixed numbers where it is deterministic, else inputs of the graph.

    Args:
        recorder: The graph.
        deterministic: Whether the policy is used in its deterministic mode.
    """

    def __init__(self, recorder: Recorder, deterministic: bool) -> None:
        self._recorder, self.deterministic = recorder, deterministic

    def one(self, like: Any, width: int) -> Any:  # noqa: ANN401 - values of the graph
        """Return noise (n, width) for the n rows of `like`; 0 where deterministic."""
        if self.deterministic:
            return like.new_zeros(BATCH, width)
        return self._recorder.input("noise", torch.float32, (BATCH, width))

    def several(self, like: Any, each: int, width: int, seed: int) -> Any:  # noqa: ANN401
        """Return noise (n, each, width), which is the same for all rows where deterministic."""
        if not self.deterministic:
            return self._recorder.input("noise_several", torch.float32, (BATCH, each, width))
        drawn = np.random.default_rng(seed).standard_normal((each, width))
        return like.in_each(torch.tensor(drawn.astype(np.float32)))


class GraphConstraint(NamedTuple):
    """h of the states as an input of the graph."""

    source: str
    """Name of the source."""
    h: Any
    """(n,) float32 h; NaN where it is not known."""


@runtime_checkable
class OnGraph(Protocol):
    """An agent that can write its actions to a graph, such as `SafeFQL`."""

    def graph_actions(
        self,
        rows: Any,  # noqa: ANN401
        h: GraphConstraint | None,
        noise: GraphNoise,
    ) -> Any:  # noqa: ANN401
        """Return the actions (n, act) of n observations as values of an ONNX graph.

        Args:
            rows: (n, obs) float32 observations, as rows of `spaces.rows`.
            h: h of the states by the shield's source; None where a network estimates it.
            noise: The noise of the policy.
        """
        ...


def graph_policy(
    policy: object,
    observations: Mapping[str, Traced],
    rows: Traced,
    h: GraphConstraint | None,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    noise: GraphNoise,
) -> Traced:
    """Return the actions (n, *shape) that a policy proposes, as a value of the graph.

    Args:
        policy: See `Shield.export_onnx`.
        observations: The graph's inputs of the observation, by name.
        rows: (n, obs) the same observations as rows.
        h: h of the states by the shield's source; None where its network estimates it.
        spaces: Spaces of an observation and of an action.
        noise: The noise of the policy.

    Raises:
        CannotExportError: No graph can be written for the policy.
        ValueError: The policy is of other spaces.
    """
    space = spaces[1]
    shape = (BATCH, *(space.shape or ()))
    made: Traced
    if isinstance(policy, str | os.PathLike):
        made = _from_file(Path(policy), rows.recorder, observations)
    elif isinstance(policy, OnGraph):
        _check_spaces(policy, spaces)
        made = policy.graph_actions(rows.to(torch.float32), h, noise)
    elif _of_sb3(policy):
        _check_spaces(policy, spaces)
        made = _sb3(policy.policy, observations, rows, spaces, noise)  # type: ignore[attr-defined]
    elif isinstance(policy, torch.nn.Module):
        given: Any = {k.partition("/")[2]: v.float() for k, v in observations.items()}
        try:
            made = policy(given if len(given) > 1 or "" not in given else given[""])
        except CannotExportError as error:
            if list(given) != [""]:
                raise
            made = _by_torch(policy, observations, rows.recorder, error)
        if not isinstance(made, Traced):
            raise CannotExportError(
                f"policy {type(policy).__name__} must return one tensor of actions, got "
                f"{type(made).__name__}; {_REPAIR}"
            )
    else:
        raise CannotExportError(
            "policy must be an agent of this package, a model of Stable-Baselines3 with MlpPolicy, "
            f"a torch.nn.Module or an .onnx file, got {type(policy).__name__}: a function of "
            f"Python has no graph; {_REPAIR}"
        )
    if len(made.shape) != len(shape):
        made = made.reshape(*shape)
    if made.shape != shape:
        raise ValueError(
            f"policy must return actions of shape {('n', *shape[1:])}, got {('n', *made.shape[1:])}"
        )
    return made


def _check_spaces(policy: Any, spaces: Sequence[gym.Space[Any]]) -> None:  # noqa: ANN401
    for what, ours in zip(("observation_space", "action_space"), spaces, strict=True):
        theirs = getattr(policy, what, None)
        if isinstance(theirs, gym.Space):
            check_same_space(
                ours, theirs, f"the policy's {what}", unbounded_matches_any=what[0] == "o"
            )


def _by_torch(
    module: torch.nn.Module,
    observations: Mapping[str, Traced],
    recorder: Recorder,
    error: CannotExportError,
) -> Traced:
    """Return the actions of a module of one observation that PyTorch's own exporter writes.

    `error` says which operation this package cannot write, and is raised where PyTorch cannot
    either, or the package onnxscript is not installed.
    """
    (seen,) = observations.values()
    sample = torch.zeros(3, *seen.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.onnx"
        try:
            torch.onnx.export(
                module,
                (sample,),
                str(path),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except Exception as reason:  # of many kinds, which the exporter does not list
            raise CannotExportError(
                f"{error} ({type(reason).__name__}: {reason!s:.200})"
            ) from reason
        return _from_file(path, recorder, observations)


def _from_file(path: Path, recorder: Recorder, observations: Mapping[str, Traced]) -> Traced:
    """Return the first output of an ONNX file, whose inputs are the observation's."""
    import onnx

    if path.suffix != ".onnx":
        raise CannotExportError(
            f"policy must be an .onnx file where it is a path, got '{path}'; load the agent first "
            "(safeshield.load_agent, or load of the Stable-Baselines3 class)"
        )
    model = onnx.version_converter.convert_version(onnx.load(str(path)), OPSET)
    domains = {one.domain for one in model.opset_import} - {"", "ai.onnx"}
    if domains or model.functions:
        raise CannotExportError(
            f"the policy {path} must consist of the standard operators of ONNX alone, got those of "
            f"{sorted(domains) or 'functions of its own'}; export it without them"
        )
    stored = {one.name for one in model.graph.initializer}
    asked = [one for one in model.graph.input if one.name not in stored]
    if len(asked) == 1 == len(observations):
        given = {asked[0].name: next(iter(observations.values()))}
    else:
        given = {name.partition("/")[2]: value for name, value in observations.items()}
    if set(given) != {one.name for one in asked}:
        raise ValueError(
            f"the policy {path} must have the inputs {sorted(given)}, got "
            f"{sorted(one.name for one in asked)}"
        )
    kinds = {1: torch.float32, 11: torch.float64, 7: torch.int64, 6: torch.int32}
    for one in asked:
        wanted = kinds.get(one.type.tensor_type.elem_type)
        if wanted is None:
            raise CannotExportError(f"the input '{one.name}' of {path} has a dtype that is unknown")
        given[one.name] = given[one.name].to(wanted)
    names = recorder.include(model.graph, "policy/", given)
    out = model.graph.output[0]
    sizes = tuple(
        one.dim_value if i and one.HasField("dim_value") else BATCH
        for i, one in enumerate(out.type.tensor_type.shape.dim)
    )
    dtype = kinds.get(out.type.tensor_type.elem_type, torch.float32)
    return Traced(recorder, names[out.name], dtype, sizes)


# -- Stable-Baselines3 -----------------------------------------------------------------------------


def _of_sb3(policy: object) -> bool:
    from stable_baselines3.common.policies import BasePolicy

    return isinstance(getattr(policy, "policy", None), BasePolicy)


def _sb3(
    policy: Any,  # noqa: ANN401 - a policy of Stable-Baselines3
    observations: Mapping[str, Traced],
    rows: Traced,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    noise: GraphNoise,
) -> Any:  # noqa: ANN401
    """Return what ``predict`` of a model with MlpPolicy returns."""
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.torch_layers import FlattenExtractor
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy

    def features(of: Any) -> Any:  # noqa: ANN401
        extractor = getattr(of, "pi_features_extractor", None) or of.features_extractor
        if type(extractor) is not FlattenExtractor:
            raise CannotExportError(
                f"policy must be an MlpPolicy with the FlattenExtractor, got {type(of).__name__} "
                f"with {type(extractor).__name__}; {_REPAIR}"
            )
        space = spaces[0]
        seen: Any = rows.to(torch.float32)
        if isinstance(space, gym.spaces.Box) and not is_image_space(space):
            return extractor(seen)
        if isinstance(space, gym.spaces.Discrete) and space.start == 0:
            return (seen.round() == torch.arange(int(space.n))).float()
        raise CannotExportError(
            "the observation of a policy of Stable-Baselines3 must be a Box that is no image, or a "
            f"Discrete from 0, in an ONNX graph, got {space}; {_REPAIR}"
        )

    space = spaces[1]
    if isinstance(policy, ActorCriticPolicy):
        latent: Any = policy.mlp_extractor.forward_actor(features(policy))
        out = policy.action_net(latent)
        if isinstance(space, gym.spaces.Box):
            if not noise.deterministic:
                if policy.use_sde or policy.squash_output:
                    raise _random(policy)
                out = out + policy.log_std.detach().exp() * noise.one(out, out.shape[-1])
            if policy.squash_output:
                return _unscaled(out.tanh(), space)
            return _clipped(out, space)
        if not noise.deterministic:
            raise _random(policy)
        if isinstance(space, gym.spaces.Discrete):
            return out.argmax(-1)
        if isinstance(space, gym.spaces.MultiDiscrete):
            ends = np.cumsum(space.nvec)
            parts = [out[:, int(e - n) : int(e)] for n, e in zip(space.nvec, ends, strict=True)]
            return torch.stack([part.argmax(-1) for part in parts], 1)
        return (out > 0).to(torch.int64)
    if isinstance(policy, SACPolicy):
        actor: Any = policy.actor
        if actor.use_sde:
            raise CannotExportError(
                f"SAC must have use_sde=False in an ONNX graph, got True; {_REPAIR}"
            )
        latent = actor.latent_pi(features(actor))
        mean = actor.mu(latent)
        if not noise.deterministic:
            spread = actor.log_std(latent).clip(-20.0, 2.0).exp()
            mean = mean + spread * noise.one(mean, mean.shape[-1])
        return _unscaled(mean.tanh(), space)
    if not noise.deterministic:
        raise _random(policy)
    if isinstance(policy, TD3Policy):
        moved: Any = policy.actor.mu
        return _unscaled(moved(features(policy.actor)), space)
    if isinstance(policy, DQNPolicy):
        out = policy.q_net.q_net(features(policy.q_net))
        return out.argmax(-1)
    raise CannotExportError(
        "a policy of Stable-Baselines3 must be that of PPO, A2C, SAC, TD3 or DQN in an ONNX graph, "
        f"got {type(policy).__name__}; {_REPAIR}"
    )


def _random(policy: object) -> CannotExportError:
    return CannotExportError(
        f"deterministic must be True for {type(policy).__name__} with these settings: only the "
        "noise of a Gaussian policy can be an input of the graph; export it with "
        "deterministic=True, and calibrate the shield so"
    )


def _clipped(actions: Any, space: Any) -> Any:  # noqa: ANN401
    low, high = (
        torch.tensor(np.asarray(end, np.float32)).ravel() for end in (space.low, space.high)
    )
    return actions.clip(low, high)


def _unscaled(actions: Any, space: Any) -> Any:  # noqa: ANN401
    """Return actions in [-1, 1] in the units of the box, as Stable-Baselines3 does."""
    low, high = (
        torch.tensor(np.asarray(end, np.float32)).ravel() for end in (space.low, space.high)
    )
    return low + 0.5 * (actions + 1.0) * (high - low)
