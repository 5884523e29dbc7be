"""Policies inside an ONNX graph: which kinds can be written, and how each of them acts.

The agent's own networks are run on values of the graph (`nn.graph`). Each function here does what
the policy's ``predict`` does: it converts observations, runs the networks, and scales the actions.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.files.reading import opened
from safeshield.nn.graph import (
    BATCH,
    IR_VERSION,
    ONNX_TYPES,
    OPSET,
    CannotExportError,
    Recorder,
    Traced,
)
from safeshield.shield.tensor_rows import tensor_leaves
from safeshield.spaces.schema import check_same_space

Array = npt.NDArray[Any]
_REPAIR = (
    "pass a torch.nn.Module from observations to actions, or export it yourself, "
    "torch.onnx.export(module, ...), and pass the .onnx file"
)
_DTYPES = {number: dtype for dtype, number in ONNX_TYPES.items()}
COUNTS = 1, 3
"""Numbers of observations with which a graph is run before it is written."""
_RANDOM = {
    "RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike", "Multinomial",
    "Bernoulli",
}  # fmt: skip


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


def has_noise(policy: object) -> bool:
    """Return whether a policy may act differently in its two modes.

    A module of PyTorch and a file have one mode. A module with a `predict` may be one of
    Stable-Baselines3.
    """
    return isinstance(policy, OnGraph) or hasattr(policy, "predict")


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
        model, what = _read(Path(policy)), f"the policy {policy}"
        made = _included(model, what, rows.recorder, observations, spaces)
    elif isinstance(policy, OnGraph):
        _check_spaces(policy, spaces)
        made = policy.graph_actions(rows.to(torch.float32), h, noise)
    elif _of_sb3(policy):
        _check_spaces(policy, spaces)
        made = _sb3(policy.policy, observations, rows, spaces, noise)  # type: ignore[attr-defined]
    elif isinstance(policy, torch.nn.Module):
        made = _from_module(policy, rows.recorder, observations, spaces)
    else:
        raise CannotExportError(
            "policy must be an agent of this package, a model of Stable-Baselines3 with MlpPolicy, "
            f"a torch.nn.Module or an .onnx file, got {policy!r:.60}: pass an object in place "
            f"of its class; a function of Python has no graph; {_REPAIR}"
        )
    return made if made.shape == shape else made.reshape(*shape)


def _check_spaces(policy: Any, spaces: Sequence[gym.Space[Any]]) -> None:  # noqa: ANN401
    for what, ours in zip(("observation_space", "action_space"), spaces, strict=True):
        theirs = getattr(policy, what, None)
        if isinstance(theirs, gym.Space):
            check_same_space(
                ours, theirs, f"the policy's {what}", unbounded_matches_any=what[0] == "o"
            )


# -- running a graph -------------------------------------------------------------------------------


def samples(space: gym.Space[Any], name: str, count: int) -> dict[str, Array]:
    """Return n points of a space, as inputs of a graph under the names that begin with `name`."""
    rng = np.random.default_rng(count)
    out = {}
    for path, leaf in tensor_leaves(space):
        if isinstance(leaf, gym.spaces.Box):
            drawn = rng.standard_normal((count, *leaf.shape))
            points = np.clip(drawn, leaf.low, leaf.high).astype(leaf.dtype)
        else:
            own = copy.deepcopy(leaf)
            own.seed(count)
            points = np.array([own.sample() for _ in range(count)], dtype=leaf.dtype)
        out["/".join((name, *path))] = points
    return out


def run(model: Any, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]] | None:  # noqa: ANN401
    """Return the outputs of an ONNX model by name for each feed; None without ONNX Runtime.

    Inputs that have no default and are not in a feed are 0, of as many rows as the first that is.

    Raises:
        Exception: ONNX Runtime cannot run the model. It does not list the kinds of its errors.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_outputs()]
    zeros = {one.name: one for one in model.graph.input}
    for stored in model.graph.initializer:
        zeros.pop(stored.name, None)
    told = []
    for feed in feeds:
        count = len(next(iter(feed.values())))
        missing = {
            name: np.zeros(
                [one.dim_value or count for one in kind.type.tensor_type.shape.dim],
                _numpy_dtype(_DTYPES[kind.type.tensor_type.elem_type]),
            )
            for name, kind in zeros.items()
            if name not in feed
        }
        told.append(dict(zip(names, session.run(names, {**missing, **feed}), strict=True)))
    return told


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


# -- modules and files -----------------------------------------------------------------------------


def _from_module(
    module: torch.nn.Module,
    recorder: Recorder,
    observations: Mapping[str, Traced],
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
) -> Traced:
    """Return the actions of a module, whose graph this package writes, or else PyTorch."""
    what = f"the policy {type(module).__name__}"
    for part in module.modules():
        changing = torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase
        if part.training and isinstance(part, changing):
            raise CannotExportError(
                f"{what} is in training mode, in which its {type(part).__name__} changes its "
                "actions: call eval() on it first"
            )
    like = next(module.parameters(), torch.empty(0))
    given = [
        {
            name.partition("/")[2]: torch.as_tensor(points, device=like.device).to(like.dtype)
            for name, points in samples(spaces[0], "observation", count).items()
        }
        for count in COUNTS
    ]
    wanted = []
    for one in given:
        try:
            with torch.no_grad():
                made = module(_argument(one))
        except Exception as error:
            raise ValueError(
                f"{what} must take n observations {_shapes(one)}, but it raises "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(made, torch.Tensor):
            raise CannotExportError(
                f"{what} must return one tensor of actions, got {type(made).__name__}; {_REPAIR}"
            )
        _check_actions(what, made.dtype, tuple(made.shape), len(next(iter(one.values()))), spaces)
        wanted.append(made.cpu().numpy())
    with torch.no_grad():
        again = module(_argument(given[-1])).cpu().numpy()
        rows = [{name: one[[k]] for name, one in given[-1].items()} for k in range(COUNTS[-1])]
        alone = [module(_argument(one)).cpu().numpy() for one in rows]
    if np.array_equal(again, wanted[-1], equal_nan=True):  # Else it draws random numbers.
        _check_rows(what, again, alone)
    reasons = []
    for write in (_traced, _by_torch):
        try:
            model = write(module, given[-1])
            return _included(model, what, recorder, observations, spaces, wanted)
        except Exception as error:  # of many kinds, which the exporters do not list
            reasons.append(one_line(_first(error)))
    raise CannotExportError(
        f"{what} cannot be written to an ONNX graph: {reasons[0]}; nor by PyTorch's exporter: "
        f"{reasons[1]}; write this with other operations of PyTorch, or pass an .onnx file"
    )


def _argument(given: Mapping[str, Any]) -> Any:  # noqa: ANN401 - tensors or values of a graph
    """Return the observations as a module takes them: one, or a dict for a Dict space."""
    return given[""] if list(given) == [""] else dict(given)


def _shapes(given: Mapping[str, torch.Tensor]) -> str:
    told = {name: ("n", *one.shape[1:]) for name, one in given.items()}
    return f"as a tensor of shape {told['']}" if "" in told else f"as a dict of tensors {told}"


def _first(error: BaseException) -> BaseException:
    """Return the error from which an error comes: PyTorch wraps the one that says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Return what an error says on one line."""
    if isinstance(error, AttributeError) and isinstance(error.obj, Traced):
        return f"the operation Tensor.{error.name} has no node here"
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"


def _traced(module: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Any:  # noqa: ANN401
    """Return the ONNX model of a module, written by this package."""
    from onnx import helper

    recorder = Recorder()
    inputs = {
        name: recorder.input(name or "observation", one.dtype, (BATCH, *one.shape[1:]))
        for name, one in given.items()
    }
    recorder.output("actions", module(_argument(inputs)))
    return helper.make_model(
        recorder.graph("policy"),
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )


def _by_torch(module: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Any:  # noqa: ANN401
    """Return the ONNX model of a module, written by PyTorch's own exporter."""
    # PyTorch may flatten a dict in the order of its keys.
    ordered = dict(sorted(given.items()))
    free = {name: {0: torch.export.Dim("batch")} for name in ordered}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "policy.onnx"
        torch.onnx.export(
            module,
            (_argument(ordered), {}),  # A dict at the end would be keyword arguments.
            str(path),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=False,
            input_names=[name or "observation" for name in ordered],
            dynamic_shapes=(_argument(free),),
        )
        return _read(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PyTorch's exporter prints and logs, which an error says again, from the user."""
    before, dump = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(dump),
            contextlib.redirect_stderr(dump),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read(path: Path) -> Any:  # noqa: ANN401 - a ModelProto
    """Return the model in an .onnx file, with the operators of this package's version."""
    import onnx

    if path.suffix != ".onnx":
        raise CannotExportError(
            f"policy must be an .onnx file where it is a path, got '{path}'; load the agent first "
            "(safeshield.load_agent, or load of the Stable-Baselines3 class)"
        )
    opened(path).close()
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # of many kinds, those of protobuf and of C++ among them
        raise ValueError(
            f"the policy {path} must be an ONNX file that is whole, with all files of its weights, "
            f"and that can be converted to opset {OPSET}, got an error of the package onnx, "
            f"{type(error).__name__}: {one_line(error)}; export it again with opset_version={OPSET}"
        ) from error


def _included(
    model: Any,  # noqa: ANN401 - a ModelProto
    what: str,
    recorder: Recorder,
    observations: Mapping[str, Traced],
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    wanted: Sequence[Array] = (),
) -> Traced:
    """Add a model of a policy to a graph, after a run of it alone, and return its first output.

    Args:
        model: The model, whose inputs are the observation's.
        what: Name of the policy in error messages.
        recorder: The graph.
        observations: The graph's inputs of the observation, by name.
        spaces: Spaces of an observation and of an action.
        wanted: The actions for the samples of `COUNTS` that the model must return.
    """
    from onnx import TensorProto

    domains = {one.domain for one in model.opset_import} - {"", "ai.onnx"}
    if domains or model.functions:
        raise CannotExportError(
            f"{what} must consist of the standard operators of ONNX alone, got those of "
            f"{sorted(domains) or 'functions of its own'}; export it without them"
        )
    for drawn in _random_nodes(model.graph):
        raise CannotExportError(
            f"{what} must not draw random numbers, because a graph acts by one rule, got the "
            f"operation {drawn}; export its deterministic action, in evaluation mode"
        )
    stored = {one.name for one in model.graph.initializer}
    asked = {one.name: one.type.tensor_type for one in model.graph.input if one.name not in stored}
    if len(asked) == 1 == len(observations):
        sources = dict(zip(asked, observations, strict=True))
    else:
        sources = {name.partition("/")[2]: name for name in observations}
    if set(sources) != set(asked):
        needs = sorted(sources) if len(sources) > 1 else "one input, the observation"
        raise ValueError(
            f"{what} must have {'the inputs ' if len(sources) > 1 else ''}{needs}, got the inputs "
            f"{sorted(asked)}"
        )
    for name, kind in asked.items():
        seen, sizes = observations[sources[name]], [one.dim_value for one in kind.shape.dim]
        if kind.elem_type not in _DTYPES:
            raise ValueError(
                f"{what} must take numbers of {_numbers()}, but its input '{name}' is "
                f"{TensorProto.DataType.Name(kind.elem_type)}; export it with an input of float32"
            )
        if kind.HasField("shape") and (
            len(sizes) != len(seen.shape)
            or any(n not in (0, own) for n, own in zip(sizes[1:], seen.shape[1:], strict=True))
        ):
            raise ValueError(
                f"{what} must take observations of shape {('n', *seen.shape[1:])}, but its input "
                f"'{name}' has {tuple(n or '?' for n in sizes)}; export one for this shield"
            )
        if sizes:
            # A file that was exported for one number of rows may run for any.
            kind.shape.dim[0].dim_param = "batch"
    if not model.graph.output:
        raise ValueError(f"{what} must have an output, the actions, got none; export it with one")
    dtypes = {name: _DTYPES[kind.elem_type] for name, kind in asked.items()}
    out = model.graph.output[0]
    kind = out.type.tensor_type
    dtype = _DTYPES.get(kind.elem_type)
    if dtype is None:
        raise ValueError(
            f"{what} must return numbers of {_numbers()}, got "
            f"{TensorProto.DataType.Name(kind.elem_type)}; export it with actions of one of these "
            "dtypes"
        )
    shape = tuple(one.dim_value or BATCH for one in kind.shape.dim)[1:]
    kind.ClearField("shape")
    del model.graph.value_info[:]
    feeds = [
        {name: points[sources[name]].astype(_numpy_dtype(dtypes[name])) for name in sources}
        for points in (samples(spaces[0], "observation", count) for count in COUNTS)
    ]
    several = feeds[-1]
    apart = [{name: one[[k]] for name, one in several.items()} for k in range(COUNTS[-1])]
    try:
        told = run(model, [*feeds, *apart])
    except Exception as error:  # of many kinds, which ONNX Runtime does not list
        raise ValueError(
            f"{what} must run in ONNX Runtime for any number of observations, got "
            f"{type(error).__name__}: {one_line(error)}; export it again, with its first axis of "
            "any size"
        ) from error
    for count, outputs in zip(COUNTS, told or (), strict=False):
        _check_actions(what, dtype, outputs[out.name].shape, count, spaces)
        shape = outputs[out.name].shape[1:]
    if told:
        made = told[len(COUNTS) - 1][out.name]
        _check_rows(what, made, [one[out.name] for one in told[len(COUNTS) :]])
        if not np.isfinite(made).all():
            warnings.warn(
                f"{what} returns numbers that are not finite for some observations in the "
                "observation space; the graph executes the fallback there",
                stacklevel=2,
            )
    for outputs, actions in zip(told or (), wanted, strict=False):
        made = outputs[out.name].reshape(actions.shape)
        if not np.allclose(made, actions, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise CannotExportError(
                f"{what} returns other actions as a graph, {made.tolist()!s:.60}, than in PyTorch, "
                f"{actions.tolist()!s:.60}"
            )
    if not told and BATCH not in shape:
        _check_actions(what, dtype, (1, *shape), 1, spaces)
    given = {name: observations[sources[name]].to(dtype) for name, dtype in dtypes.items()}
    names = recorder.include(model.graph, "policy/", given)
    return Traced(recorder, names[out.name], dtype, (BATCH, *shape))


def _numbers() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in ONNX_TYPES)


def _check_actions(
    what: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    count: int,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
) -> None:
    """Raise ValueError where a policy's output for `count` observations is not `count` actions."""
    space = spaces[1]
    needed = space.shape or ()
    flat = len(shape) in (1, 2) and math.prod(shape) == count * math.prod(needed)
    if shape[:1] != (count,) or (shape[1:] != needed and not flat):
        raise ValueError(
            f"{what} must return actions of shape {('n', *needed)}, got {shape} for n = {count}: "
            f"return one action of {space} for each observation"
        )
    if dtype not in ONNX_TYPES:
        raise ValueError(
            f"{what} must return numbers of {_numbers()}, got {dtype}: call float() on it first"
        )
    if dtype.is_floating_point and not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"{what} must return integers for {space}, got {dtype}: let it end with argmax(-1), or "
            "with .round().to(torch.int64)"
        )


def _check_rows(what: str, together: Array, alone: Sequence[Array]) -> None:
    """Raise where a policy's action depends on the other observations of a batch.

    Args:
        what: Name of the policy in error messages.
        together: (n, *shape) the actions for n observations in one batch.
        alone: The actions (1, *shape) for each of them in a batch of its own.
    """
    apart = np.concatenate(alone).reshape(together.shape)
    if not np.allclose(together, apart, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise CannotExportError(
            f"{what} must choose each action by its own observation, got {apart.tolist()!s:.60} "
            f"for {len(apart)} observations one at a time and {together.tolist()!s:.60} for the "
            "same in one batch: use no mean, sum or order over the first axis"
        )


def _random_nodes(graph: Any) -> Iterator[str]:  # noqa: ANN401 - a GraphProto
    """Yield the operations of a graph, and of the branches in it, that draw random numbers."""
    from onnx import numpy_helper

    flags = {one.name: one for one in graph.initializer}
    for node in graph.node:
        told = {one.name: one for one in node.attribute}
        if node.op_type == "Constant" and "value" in told:
            flags[node.output[0]] = told["value"].t
        training = node.input[2] if node.op_type == "Dropout" and len(node.input) > 2 else ""
        if node.op_type in _RANDOM:
            yield node.op_type
        elif training and (training not in flags or numpy_helper.to_array(flags[training]).any()):
            yield "Dropout in training mode"
        for one in node.attribute:
            for part in (one.g, *one.graphs):
                yield from _random_nodes(part)


# -- Stable-Baselines3 -----------------------------------------------------------------------------


def _of_sb3(policy: object) -> bool:
    from stable_baselines3.common.policies import BasePolicy

    # A module may hold a policy of Stable-Baselines3 and change what goes in or comes out.
    own = isinstance(policy, torch.nn.Module)
    return not own and isinstance(getattr(policy, "policy", None), BasePolicy)


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
