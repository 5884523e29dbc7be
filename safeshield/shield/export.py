"""A shield as one ONNX graph, which runs without Python: `Shield.export_onnx` writes it.

    observation, action (, constraint) (, delta)  ->  action_executed, value, accepted, ...

The graph is written by running the shield on tensors (`shield.tensors`) with values of a graph in
place of tensors (`nn.graph`), so both have the same formulas. The search for a replacement is a
branch of the graph (an `If`), which runs only where an action is rejected. The numbers behind the
candidates are those of the shield (`candidates.Tables`), so both choose among the same candidates.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from safeshield.files.atomic import written_whole
from safeshield.files.reading import opened, read_exactly, size_of, strict_json
from safeshield.nn.graph import (
    BATCH,
    IR_VERSION,
    OPSET,
    CannotExportError,
    Recorder,
    Traced,
)
from safeshield.nn.plan_actor import BestPlan
from safeshield.rollouts.policies import default_name
from safeshield.shield.export_policy import (
    COUNTS,
    GraphConstraint,
    GraphNoise,
    graph_policy,
    has_noise,
    one_line,
    run,
    samples,
)
from safeshield.shield.replacement import (
    BUILT_IN,
    NearestSupported,
    ProjectedGradient,
    describe,
)
from safeshield.shield.tensor_rows import tensor_leaves
from safeshield.shield.tensors import (
    _STRATEGIES,
    TorchShield,
    _Proposals,
    _States,
    nan_rejected,
    nearest_of,
    picked,
)
from safeshield.support.decide import _noise as behaviour_noise
from safeshield.support.scores import EnsembleSpread, LogProbability, NoiseDistance
from safeshield.values.constraint import SeveralConstraints
from safeshield.values.units import constraint_of

if TYPE_CHECKING:
    from safeshield.shield.record import CalibrationRecord
    from safeshield.shield.shield import Shield

FORMAT = "safeshield-onnx"
VERSION = 1
_SCORES = (NoiseDistance, LogProbability, EnsembleSpread)


@dataclass(frozen=True)
class OnnxContents:
    """What the metadata of a graph say of it, after a check of its digest."""

    header: Mapping[str, Any]
    """The JSON object under the key "safeshield"; docs/export.md lists its entries."""

    @property
    def promise(self) -> str:
        """The promise of the record that is embedded; why there is none otherwise."""
        return str(self.header["promise"])


def read_onnx(path: str | os.PathLike[str]) -> OnnxContents:
    """Return what the graph in the file `path` says of itself.

    Raises:
        ImportError: The extra `onnx` is not installed.
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is no graph of `Shield.export_onnx`, or its digest is not that of its
            contents.
    """
    onnx = required("reading an ONNX graph")
    from google.protobuf.message import DecodeError  # onnx needs protobuf

    with opened(path) as stream:
        content = read_exactly(stream, size_of(stream))
    try:
        model = onnx.load_from_string(content)
        text = {one.key: one.value for one in model.metadata_props}.get("safeshield")
        if text is None:
            raise ValueError("it has no metadata of safeshield; give a file of safeshield export")
        # Text that is not UTF-8 comes as bytes.
        header = strict_json(text if isinstance(text, bytes) else text.encode(), "its metadata")
    except (DecodeError, ValueError) as error:
        raise ValueError(f"{path} is no ONNX graph of a shield: {error}") from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(
            f"{path} must be a '{FORMAT}' of version {VERSION}, got {header.get('format')!r:.40} "
            f"of version {header.get('version')!r:.20}"
        )
    # All files of this version have these operators, which the digest of the graph does not cover.
    operators = [(one.domain, one.version) for one in model.opset_import]
    usual = operators == [("", OPSET)] and not model.functions and model.ir_version == IR_VERSION
    if header.pop("sha256", None) != _digest(model.graph, header) or not usual:
        raise ValueError(
            f"{path} is damaged or was edited: its contents do not have the SHA-256 digest that it "
            "names; export the shield again"
        )
    if not isinstance(header.get("promise"), str):
        raise ValueError(
            f"{path} is damaged: its metadata have no promise; export the shield again"
        )
    return OnnxContents(header)


def required(what: str) -> Any:  # noqa: ANN401 - a module
    """Return the module onnx, or raise an ImportError that says how to install it for `what`."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            f'{what} needs the package onnx: pip install "safeshield[onnx]"', name="onnx"
        ) from error
    return onnx


def export_onnx(
    shield: Shield,
    path: str | os.PathLike[str],
    policy: object = None,
    *,
    deterministic: bool = True,
    policy_name: str | None = None,
) -> OnnxContents:
    """Write a shield as an ONNX graph; `Shield.export_onnx` describes arguments and errors."""
    onnx = required("export_onnx")
    if Path(path).suffix.lower() != ".onnx":
        raise ValueError(f"path must end in .onnx, got '{path}'")
    recorder = Recorder()
    graph_shield = GraphShield(shield, recorder)
    name = None
    if policy is not None:
        name = policy_name or _name_of(policy)
    elif policy_name is not None:
        raise ValueError(
            f"policy_name must be left out without a policy, got {policy_name!r}: the graph then "
            "has the input `action`"
        )
    why_not = _not_promised(shield.record, name, deterministic if has_noise(policy) else None)
    graph_shield.write(policy, deterministic, promised=not why_not)
    graph = recorder.graph("shield")
    header = {
        **_header(shield, graph_shield),
        "promise": why_not or (shield.record and shield.record.promise),
        "record": None if shield.record is None or why_not else shield.record.to_json(),
        "inputs": recorder.inputs,
        "policy": name,
        "deterministic": None if policy is None else deterministic,
    }
    model = onnx.helper.make_model(
        graph,
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        producer_name="safeshield",
    )
    text = json.dumps({**header, "sha256": _digest(graph, header)}, allow_nan=False, sort_keys=True)
    onnx.helper.set_model_props(model, {"safeshield": text})
    _check_runs(model, shield, name)
    with written_whole(Path(path)) as part:
        part.write_bytes(model.SerializeToString())
    return OnnxContents(header)


def _header(shield: Shield, graph: GraphShield) -> dict[str, Any]:
    import safeshield

    source = shield.model.constraint
    return {
        "format": FORMAT,
        "version": VERSION,
        "safeshield": safeshield.__version__,
        "trained_by": shield.trained_by,
        "shield": shield.digest,
        "delta": shield.delta,
        "replacement": describe(shield.replacement) or "NearestAcceptable()",
        "constraints": [] if source is None else list(source.names),
        "support": None if shield.support is None else shield.support.record.to_json(),
        "candidates": graph.tables,
    }


def _check_runs(model: Any, shield: Shield, name: str | None) -> None:  # noqa: ANN401 - a ModelProto
    """Run the finished graph once, where ONNX Runtime is installed."""
    given = {"observation": shield.observation_space}
    if name is None:
        given["action"] = shield.action_space
    feeds = [
        {key: one for what, space in given.items() for key, one in samples(space, what, n).items()}
        for n in COUNTS
    ]
    try:
        run(model, feeds)
    except Exception as error:  # of many kinds, which ONNX Runtime does not list
        inside = "" if name is None else f" with the policy '{name}'"
        raise CannotExportError(
            f"the graph{inside} does not run in ONNX Runtime: {one_line(error)}; "
            "install the newest onnxruntime, or report this as an error of safeshield"
        ) from error


def _name_of(policy: object) -> str:
    return Path(policy).name if isinstance(policy, str | os.PathLike) else default_name(policy)


def _not_promised(
    record: CalibrationRecord | None, name: str | None, deterministic: bool | None
) -> str:
    """Return why the graph has no promise, "" where the record holds for it.

    `deterministic` is None for a policy that acts alike in both modes.
    """
    if record is None:
        return "none: the shield is not calibrated"
    if name is None:
        return ""
    tested = [one.policy for one in record.policies]
    if name not in tested:
        return f"none: the shield was calibrated with {tested}, and the graph acts by '{name}'"
    if None not in (deterministic, record.deterministic) and deterministic != record.deterministic:
        how = "deterministic=True" if record.deterministic else "deterministic=False (--stochastic)"
        return (
            f"none: the shield was calibrated with deterministic={record.deterministic}, and the "
            f"graph has deterministic={deterministic}: export with {how}, or calibrate as the "
            "graph acts"
        )
    return ""


def _digest(graph: Any, header: Mapping[str, Any]) -> str:  # noqa: ANN401 - a GraphProto
    told = sha256(json.dumps(header, allow_nan=False, sort_keys=True).encode())
    told.update(graph.SerializeToString(deterministic=True))
    return told.hexdigest()


class GraphShield(TorchShield):
    """A shield whose results are written to an ONNX graph.

    Args:
        shield: The shield.
        recorder: The graph.

    Raises:
        CannotExportError: The shield has a replacement, a critic, a score or a source of h that no
            graph can be written for.
    """

    def __init__(self, shield: Shield, recorder: Recorder) -> None:
        self._recorder, self._test = recorder, shield.support
        # h is an input of the graph, so this function is never called with a state.
        given = None if shield.model.constraint is None else lambda _: torch.zeros(0)
        super().__init__(shield, constraint_fn=given)
        self._strategy = shield._strategy

    def _check_shield(self, shield: Shield) -> None:
        strategy, judge, test = shield.replacement, shield.model.judge, shield.support
        if shield.sensors is not None:
            raise CannotExportError(
                "a graph remembers no observations, so it cannot check the sensors, got a shield "
                f"with sensors={shield.sensors!r:.60}: leave the checks out by with_sensors(None), "
                "and calibrate again where one of them falls back"
            )
        if type(strategy) not in _STRATEGIES:
            names = ", ".join(kind.__name__ for kind in _STRATEGIES)
            known = type(strategy) in BUILT_IN
            why = "which calls a function of Python" if known else "which is not of this package"
            raise CannotExportError(
                f"replacement must be one of {names} in an ONNX graph, got "
                f"{type(strategy).__name__}, {why}; use with_replacement(...), which drops the "
                "record, and calibrate again"
            )
        if judge is not None and not isinstance(judge, BestPlan):
            raise CannotExportError(
                f"the critic of actions must be that of the package or of R2PAC (BestPlan) in an "
                f"ONNX graph, got {type(judge).__name__}; train a shield without it"
            )
        if isinstance(judge, BestPlan) and isinstance(strategy, ProjectedGradient):
            raise CannotExportError(
                "replacement must not be ProjectedGradient in the ONNX graph of a shield that "
                "judges plans (R2PAC): the gradient of the best plan is not written; use "
                "with_replacement(NearestAcceptable()), and calibrate again"
            )
        if test is not None and type(test.score) not in _SCORES:
            raise CannotExportError(
                f"the score of the support test must be one of {[s.name for s in _SCORES]} in an "
                f"ONNX graph, got {test.record.score!r}: FLRP's density is an estimate on arrays; "
                "use with_support(held_out, score='noise') or 'ensemble', and calibrate again"
            )

    # -- the graph -------------------------------------------------------------------------------

    @property
    def tables(self) -> dict[str, Any] | None:
        """The numbers behind the candidates, as JSON values; None where there are no candidates."""
        if self._discrete:
            return {"choices": self._choices.tolist()}
        names = ("noise", "around", "points")
        return (
            {name: getattr(self, f"_{name}").tolist() for name in names}
            if hasattr(self, "_noise")
            else None
        )

    def write(self, policy: object, deterministic: bool, promised: bool) -> None:
        """Write the whole graph.

        Args:
            policy: The policy that proposes actions; None where they are an input.
            deterministic: Whether the policy is used in its deterministic mode.
            promised: Whether the shield's record holds for this graph.
        """
        inputs, rows = self._read_observation()
        h = self._read_constraint()
        action: Any = self._proposed(policy, deterministic, inputs, rows, h)
        exact = action if action.dtype.is_floating_point else action.to(torch.float32)
        proposed = exact.reshape(BATCH, self._model.action_codec.width)
        own = torch.tensor(self._shield.delta, dtype=torch.float64)
        given: Any = self._recorder.input("delta", own.dtype, (BATCH,), own[None], "deltas")
        # NaN and a smaller delta than the shield's own are not used.
        delta = torch.where(given > own, given, own)
        states = self._states(rows, h)
        executed, report = self._filter_rows(states, proposed, -delta)
        shape = (BATCH, *(self._shield.action_space.shape or ()))
        dtype = _dtype(self._shield.action_space.dtype, "action")
        if action.dtype != dtype:
            # Integers of a policy, which were judged before a smaller dtype could change them.
            ends = torch.iinfo(dtype)
            action = action.clip(ends.min, ends.max).to(dtype)
        out = torch.where(
            report.intervened[:, None], executed.to(dtype), action.reshape(*proposed.shape)
        )
        if policy is not None:
            self._recorder.output("action_proposed", action)
        for name, value in {
            "action_executed": out.reshape(*shape),
            "value": report.value,
            "accepted": ~report.intervened,
            "certified": self._certified(report.state_value, promised),
            "valid": report.valid,
            "acceptable": report.acceptable,
            "proposed_value": report.proposed_value,
            "state_value": report.state_value,
        }.items():
            self._recorder.output(name, value)
        if self._test is not None:
            self._recorder.output("supported", report.supported)

    def _certified(self, values: Any, promised: bool) -> Any:  # noqa: ANN401
        if not promised:
            return torch.zeros_like(values).to(torch.bool)
        return values.to(torch.float64) <= self.threshold

    def _read_observation(self) -> tuple[dict[str, Traced], Any]:
        """Return the inputs of the observation by name, and the rows (n, obs) they make."""
        space = self._shield.observation_space
        parts: list[Any] = []
        inputs: dict[str, Traced] = {}
        for path, leaf in tensor_leaves(space):
            name = "/".join(("observation", *path))
            dtype = _dtype(leaf.dtype, name)
            part = inputs[name] = self._recorder.input(name, dtype, (BATCH, *(leaf.shape or ())))
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            width = int(np.prod(leaf.shape or (1,)))
            parts.append(part.to(exact).reshape(BATCH, width))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return inputs, rows

    def _proposed(
        self,
        policy: object,
        deterministic: bool,
        inputs: dict[str, Traced],
        rows: Any,  # noqa: ANN401
        h: Any,  # noqa: ANN401
    ) -> Traced:
        """Return the proposed actions (n, *shape): an input, or those of the policy."""
        spaces = self._shield.observation_space, self._shield.action_space
        dtype = _dtype(spaces[1].dtype, "action")
        if policy is None:
            return self._recorder.input("action", dtype, (BATCH, *(spaces[1].shape or ())))
        # An agent may fail on numbers that are not readable; the shield ignores its action there.
        seen = torch.where(torch.isfinite(rows), rows, 0.0)
        noise = GraphNoise(self._recorder, deterministic)
        source = self._model.constraint
        known = None if source is None else GraphConstraint(source.name, h)
        made: Any = graph_policy(policy, inputs, seen, known, spaces, noise)  # type: ignore[arg-type]
        if not dtype.is_floating_point:
            # An agent's own numbers are whole. Those of others are judged before they are narrowed.
            dtype = torch.int64
        if made.dtype == torch.float64 and dtype == torch.float32:
            # As `spaces.rows.fitted`: a finite number remains finite.
            most = torch.finfo(dtype).max
            made = torch.where(torch.isfinite(made), made.clip(-most, most), made)
        out: Traced = made.to(dtype)
        return out

    def _read_constraint(self) -> Any:  # noqa: ANN401
        source = self._model.constraint
        if source is None:
            return None
        if not isinstance(source, SeveralConstraints):
            return self._recorder.input("constraint", torch.float64, (BATCH,)).to(torch.float32)
        each: list[Any] = [
            self._recorder.input(f"constraint/{name}", torch.float64, (BATCH,))
            for name in source.names
        ]
        known, largest = None, None
        for h, unit in zip(each, source.units, strict=True):
            finite, scaled = torch.isfinite(h), h / unit
            known = finite if known is None else known & finite
            largest = scaled if largest is None else largest.maximum(scaled)
        return torch.where(known, largest, torch.nan).to(torch.float32)  # type: ignore[arg-type]

    def _h(self, rows: Tensor, constraint: Any) -> Any:  # noqa: ANN401
        return constraint

    def _for_each(self, rows: Any, values: Any) -> Any:  # noqa: ANN401
        """Return values (n,) or (1,) as (n,), for n rows."""
        count = rows._node("Shape", [], torch.int64, (1,), start=0, end=1)
        return values._node("Expand", [count], None, (BATCH,))

    def _worst(self, members: Any, x: Any) -> Any:  # noqa: ANN401
        first, *others = [one for stack in members for one in x.members_through(stack)]
        for other in others:
            first = first.maximum(other)
        return first._squeeze(1)

    # -- replacement -----------------------------------------------------------------------------

    def _filter_rows(self, states: _States, actions: Any, limit: Any) -> Any:  # noqa: ANN401
        executed, report = super()._filter_rows(states, actions, limit)
        if self._test is None:
            return executed, report
        # Where the shield on tensors has the overflow of its budget, `_replace_all` here returns
        # the result of the support test.
        acceptable = report.acceptable & report.overflow
        return executed, report._replace(supported=report.overflow, acceptable=acceptable)

    def _replace_all(self, states: _States, of: _Proposals) -> Any:  # noqa: ANN401
        """Replace, in a branch of the graph, every proposal that is not acceptable once clipped.

        Returns:
            The executed actions (n, act), their Q_h (n,), and whether they pass the support test,
            (n,).
        """
        actions: Any = of.actions
        values: Any = of.values
        missing = ~(values <= of.limit)
        kept = [actions, values]
        if self._test is not None:
            kept.append(of.supported & states.readable)
            missing = missing | ~of.supported

        def replaced() -> list[Any]:
            index: Any = missing.rows_where()
            some = self._estimated(states.take(index))
            whole = of._replace(limit=self._for_each(actions, of.limit))
            if self._test is None:
                whole = whole._replace(supported=of.usable)
            rejected = _Proposals(*(each[index] for each in whole))
            found, value = self._search(some, *self._with_fallback(some, rejected))
            executed: Any = found
            parts: list[Any] = [
                executed.to(actions.dtype),
                value.masked_fill(~some.readable, torch.inf),
            ]
            if self._test is not None:
                parts.append(self._supported(some, found) & some.readable)
            return [own.with_rows(index, part) for own, part in zip(kept, parts, strict=True)]

        made = self._recorder.where_any(missing, replaced, kept)
        return made[0], made[1], made[2] if self._test is not None else missing

    # -- for an agent that consults its own critics ----------------------------------------------

    def states(self, rows: Any, h: GraphConstraint | None) -> _States:  # noqa: ANN401
        """Return V_h of observations, rows (n, obs), with h by another shield's source.

        Raises:
            CannotExportError: This shield takes h from another source.
        """
        source = self._model.constraint
        if source is None:
            return self._states(rows, None)
        if h is None or h.source != source.name:
            raise CannotExportError(
                f"the policy takes h from '{source.name}', but the shield from "
                f"{'a network' if h is None else repr(h.source)}, so the graph has no input for "
                "it; use an agent and a shield with the same source, shield.with_constraint(...)"
            )
        return self._states(rows, h.h)

    def estimated(self, states: _States) -> _States:
        """Return states with the network's estimate of V_h where the source does not tell h."""
        return self._estimated(states)

    def judged(self, states: _States, features: Any) -> Any:  # noqa: ANN401
        """Return Q_h (n, c) of actions (n, c, features) that are inputs of the networks.

        It is infinite where it would be NaN.
        """
        return nan_rejected(self._judged(states, features))

    def to_box(self, scaled: Any) -> Any:  # noqa: ANN401
        """Return actions in [-1, 1] in the units of the box."""
        return self._units.to_box(scaled)

    def nearest_features(
        self,
        states: _States,
        features: Any,  # noqa: ANN401
        limit: float,
        last_resort: str,
    ) -> Any:  # noqa: ANN401
        """Return the candidate nearest to each of actions (n, features) with Q_h <= limit.

        Where there is none, `last_resort` decides as in `SafeFQLConfig`.
        """
        found = self._units.action_features(self._candidates(states, self.to_box(features)))
        options: Any = torch.cat([features[:, None], found], 1)
        values = self.judged(states, options)
        distance = (options - options[:, :1]).square().sum(-1)
        good, value = values <= limit, states.value
        lost = values.amin(1) > limit
        if last_resort == "nearest":
            good = values <= torch.where(lost, value, limit)[:, None]
        best = nearest_of(good, distance, values, values.argmin(1))
        found = picked(options, values, best)[0]
        if last_resort == "lowest":
            return found
        violating = constraint_of(self._scale, value, states.excess) > 0
        own = lost & violating & (values[:, 0] < torch.inf)
        return torch.where(own[:, None], features, found)

    # -- the support test ------------------------------------------------------------------------

    def _supported(self, states: _States, actions: Any) -> Any:  # noqa: ANN401
        if self._test is None:
            return torch.ones(1, dtype=torch.bool)
        return self._scores(states, actions[:, None])[:, 0] >= self._test.record.level

    def _scores(self, states: _States, actions: Any) -> Any:  # noqa: ANN401
        """Return the scores (n, c) of actions (n, c, act) in n states, as `support.scores` does."""
        assert self._test is not None
        score, model = self._test.score, self._model
        count = actions.shape[1]
        if isinstance(score, LogProbability):
            classifier: Any = model.behaviour_actor
            log_probs = classifier.log_prob(self._networks, states.inputs)
            sizes = model.action_codec.categories
            strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])
            digits = (actions - self._units.low).round().to(torch.int64)
            return log_probs.gather(1, (digits * strides).sum(-1))
        features = self._units.action_features(actions)
        inputs: Any = states.inputs[:, None].expand(-1, count, -1).flatten(0, 1)
        flat = features.flatten(0, 1)
        if isinstance(score, NoiseDistance):
            flow: Any = model.behaviour_actor
            noise = flow.to_noise(self._networks, inputs, flat)
            return (-0.5 * noise.square().sum(-1)).reshape(-1, count)
        joined: Any = torch.cat([inputs, flat], -1)
        stacks = [joined.through(stack) for stack in self._advantage]
        members: Any = torch.cat(stacks, 0)[..., 0]
        spread = (members - members.mean(0, keepdim=True)).square().mean(0).sqrt()
        return (-spread * self._scale.step_rms).reshape(-1, count)

    def _candidates(self, states: Any, wanted: Any) -> Any:  # noqa: ANN401
        near = super()._candidates(states, wanted)
        behaviour: Any = self._model.behaviour_actor
        if self._test is None or self._discrete or behaviour is None:
            return near
        if not isinstance(self._strategy, NearestSupported):
            return near
        table = self._tensor(behaviour_noise(behaviour.noise_features))
        each = len(table)
        inputs = states.inputs[:, None].expand(-1, each, -1).flatten(0, 1)
        draws: Any = states.inputs.in_each(table).flatten(0, 1)
        scaled = behaviour.act(self._networks, inputs, draws)
        drawn = self._units.to_box(scaled).reshape(-1, each, scaled.shape[-1])
        return torch.cat([near, drawn], 1)

    def _nearest(self, states: _States, of: _Proposals) -> Any:  # noqa: ANN401
        """Return what `NearestAcceptable` or `NearestSupported` executes, and its Q_h (k,)."""
        if not isinstance(self._strategy, NearestSupported):
            return super()._nearest(states, of)
        found, values, distance = self._weighed(states, of)
        assert self._test is not None
        scores = self._scores(states, found)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        supported = scores >= self._test.record.level
        good = (values <= of.limit[:, None]) & supported
        safest = values.masked_fill(~supported, torch.inf).argmin(1)
        other = torch.where(supported.any(1), safest, scores.argmax(1))
        return picked(found, values, nearest_of(good, distance, values, other))


def _dtype(dtype: Any, what: str) -> torch.dtype:  # noqa: ANN401 - a NumPy dtype
    names = "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"
    known: dict[Any, torch.dtype] = {np.dtype(name): getattr(torch, name) for name in names}
    if np.dtype(dtype) not in known:
        raise CannotExportError(
            f"{what} must have one of the dtypes {[one.name for one in known]} in an ONNX graph, "
            f"got {np.dtype(dtype)}; train the shield on a space of float32"
        )
    return known[np.dtype(dtype)]
