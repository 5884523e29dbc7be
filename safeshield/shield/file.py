"""A shield's file: one safetensors file with strict JSON in its header."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

from safeshield.files.schema import finite_number
from safeshield.files.tensors import SHIELD, read_tensors, register_format, write_tensors
from safeshield.nn.forward import Weights, mlp_shapes
from safeshield.nn.latent_forward import LatentSpec
from safeshield.nn.plan_forward import PlanSpec
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import CalibrationRecord
from safeshield.shield.replacement import (
    FallbackPolicy,
    NearestAcceptable,
    ProjectedGradient,
    Replacement,
    check_replacement,
)
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.support import SCORES, SupportRecord, SupportTest, support_score
from safeshield.values.units import (
    ADVANTAGE,
    BEHAVIOUR,
    FALLBACK,
    PLAN,
    SAFETY_NETWORKS,
    SafetyScale,
)

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

    S = TypeVar("S", bound=Shield)

FORMAT = "safeshield-shield"
register_format(FORMAT, SHIELD, "Shield.load")
VERSION = 1
_MAX_WIDTH, _MAX_LAYERS, _MAX_CANDIDATES = 16_384, 32, 4096
_MAX_WEIGHTS = 1 << 28
_MAX_FLOW_STEPS = 1000
_MAX_PLAN = 1000
_REPLACEMENTS: dict[str, type[NearestAcceptable | FallbackPolicy | ProjectedGradient]] = {
    "nearest_acceptable": NearestAcceptable,
    "fallback_policy": FallbackPolicy,
    "projected_gradient": ProjectedGradient,
}
"""The ways to replace actions that a file can name."""


def save_shield(shield: Shield, path: str | os.PathLike[str]) -> None:
    """Write a shield, atomically.

    Raises:
        ValueError: it replaces actions in a way that no file can hold.
    """
    model = shield.model
    header = {
        "format": FORMAT,
        "version": VERSION,
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "scaling": model.scaling.to_json(),
        "safety_scale": model.scale.to_json(),
        "hidden": {
            name: _hidden(weights)
            for name, weights in model.networks.items()
            if name in (*SAFETY_NETWORKS, FALLBACK, BEHAVIOUR, PLAN)
        },
        "latent": None if model.latent is None else dataclasses.asdict(model.latent),
        "plan": None if model.plan is None else dataclasses.asdict(model.plan),
        "flow_steps": model.flow_steps,
        "members": int(model.networks[ADVANTAGE]["0.weight"].shape[0]),
        "delta": shield.delta,
        "record": None if shield.record is None else shield.record.to_json(),
        "trained_by": shield.trained_by,
        "replacement": _replacement_to_json(shield.replacement),
        "support": _support_to_json(shield),
    }
    flat = {f"{n}/{k}": a for n, weights in model.networks.items() for k, a in weights.items()}
    write_tensors(path, flat, header)


def load_shield(kind: type[S], path: str | os.PathLike[str]) -> S:
    """Read a shield; every field of the header is checked before a tensor is read."""
    file = read_tensors(path, FORMAT)
    header = file.header
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {header.get('version')!r:.20} of the shield format is not known; "
            f"this release reads version {VERSION}"
        )
    try:
        observation = flat_observations(space_from_json(header["observation_space"]))
        action = flat_actions(space_from_json(header["action_space"]))
        scaling = Scaling.from_json(header["scaling"], observation, action)
        scale = SafetyScale.from_json(header["safety_scale"])
        # Files of earlier releases do not speak of it.
        latent, plan = _latent(header.get("latent")), _plan(header.get("plan"), action)
        expected = _shapes(header["hidden"], header["members"], scaling, action, latent, plan)
        flow_steps = header["flow_steps"]
        if type(flow_steps) is not int or not 1 <= flow_steps <= _MAX_FLOW_STEPS:
            raise ValueError(f"flow_steps must lie in [1, {_MAX_FLOW_STEPS}], got {flow_steps!r}")
        delta = finite_number(header["delta"], "delta")
        record = header["record"]
        record = None if record is None else CalibrationRecord.from_json(record)
        if "replacement" in header:
            replacement = _replacement(header["replacement"])
        else:
            # As it was written when there was one way only.
            replacement = NearestAcceptable(_candidates(header["candidates"]))
        check_replacement(replacement, action)
        trained_by = header["trained_by"]
        if not isinstance(trained_by, str):
            raise ValueError(f"trained_by must be text, got {type(trained_by).__name__}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the header does not describe a shield: {error}") from error
    flat = file.load(expected)
    networks: dict[str, dict[str, Any]] = {}
    for name, array in flat.items():
        network, key = name.split("/")
        networks.setdefault(network, {})[key] = array
    model = SafetyModel(
        observation.space, action.space, scaling, scale, networks, flow_steps, latent, plan
    )
    # Files of earlier releases do not speak of it.
    support = header.get("support")
    try:
        test = None if support is None else _support_from_json(support, model)
    except ValueError as error:
        raise ValueError(f"{path}: the header does not describe a shield: {error}") from error
    return kind(
        model,
        delta=delta,
        record=record,
        trained_by=trained_by,
        replacement=replacement,
        support=test,
    )


def _replacement_to_json(replacement: Replacement) -> dict[str, Any]:
    for kind, known in _REPLACEMENTS.items():
        if type(replacement) is known:
            return {"kind": kind, **dataclasses.asdict(replacement)}
    raise ValueError(
        f"replacement {type(replacement).__name__} holds what no file can (a file holds "
        f"{', '.join(known.__name__ for known in _REPLACEMENTS.values())}): save the shield "
        "without it, shield.with_replacement(NearestAcceptable()).save(path), and pass it to "
        "with_replacement again after loading; keep its record, if there is one, by to_json()"
    )


def _replacement(data: dict[str, Any]) -> Replacement:
    kind = data["kind"]
    known = _REPLACEMENTS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise ValueError(
            f"replacement kind {kind!r:.40} is not known; this release knows {list(_REPLACEMENTS)}"
        )
    names = {"kind", *(entry.name for entry in dataclasses.fields(known))}
    if set(data) != names:
        raise ValueError(
            f"replacement '{kind}' must have the fields {sorted(names)}, got {sorted(data)!r:.80}"
        )
    settings = {name: value for name, value in data.items() if name not in ("kind", "candidates")}
    if "step_size" in settings:
        settings["step_size"] = finite_number(settings["step_size"], "step_size")
    return known(candidates=_candidates(data["candidates"]), **settings)


def _support_to_json(shield: Shield) -> dict[str, Any] | None:
    test = shield.support
    if test is None:
        return None
    if SCORES.get(test.record.score) is not test.score:
        raise ValueError(
            f"a file can name the scores {sorted(SCORES)} only, the shield's support test uses "
            f"{test.record.score!r}, which is your own"
        )
    return test.record.to_json()


def _support_from_json(data: object, model: SafetyModel) -> SupportTest:
    record = SupportRecord.from_json(data)
    return SupportTest(support_score(record.score, model), record)


def _candidates(data: dict[str, int]) -> CandidateSet:
    if not all(type(count) is int and count <= _MAX_CANDIDATES for count in data.values()):
        raise ValueError(f"candidates must be counts of at most {_MAX_CANDIDATES}")
    return CandidateSet(**data)


def _hidden(weights: Weights) -> list[int]:
    return [int(weights[f"{i}.weight"].shape[2]) for i in range(len(weights) // 2 - 1)]


def _shapes(
    hidden: dict[str, list[int]],
    members: int,
    scaling: Scaling,
    played: SpaceCodec,
    latent: LatentSpec | None,
    plan: PlanSpec | None,
) -> dict[str, tuple[int, ...]]:
    names = [*SAFETY_NETWORKS, *([] if played.discrete or latent else [FALLBACK])]
    names += [PLAN] if plan else []
    if set(hidden) - {BEHAVIOUR} != set(names):
        raise ValueError(f"networks must be {names}, got {sorted(hidden)}")
    observation, action = scaling.observation_features, scaling.action_features
    if type(members) is not int or not 1 <= members <= 64:
        raise ValueError(f"members must be between 1 and 64, got {members!r}")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, widths in hidden.items():
        _check_widths(name, widths)
        chunk = action * (plan.horizon if plan else 1)
        inputs = observation + {ADVANTAGE: action, FALLBACK: chunk, PLAN: chunk}.get(name, 0)
        outputs = chunk if name == FALLBACK else 1
        if name == BEHAVIOUR:
            # A classifier of the choices, or the velocity field of a flow: (s, x, t) to x.
            inputs = observation if played.discrete else observation + action + 1
            outputs = len(played.choices) if played.discrete else action
        each = members if name in (ADVANTAGE, PLAN) else 1
        part = mlp_shapes(inputs, outputs, tuple(widths), each)
        shapes |= {f"{name}/{key}": shape for key, shape in part.items()}
    if latent is not None:
        for name, networks in latent.shapes(observation, action).items():
            shapes |= {f"{name}/{key}": shape for key, shape in networks.items()}
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > _MAX_WEIGHTS:
        raise ValueError(f"the networks have {count} weights, more than {_MAX_WEIGHTS}")
    return shapes


def _check_widths(name: str, widths: object) -> None:
    if not isinstance(widths, list) or not 1 <= len(widths) <= _MAX_LAYERS:
        raise ValueError(f"'{name}' must have between 1 and {_MAX_LAYERS} hidden layers")
    if not all(type(w) is int and 1 <= w <= _MAX_WIDTH for w in widths):
        raise ValueError(f"widths of '{name}' must be between 1 and {_MAX_WIDTH}")


def _latent(data: dict[str, Any] | None) -> LatentSpec | None:
    if data is None:
        return None
    names = {entry.name for entry in dataclasses.fields(LatentSpec)}
    if set(data) != names:
        raise ValueError(f"latent must have the fields {sorted(names)}, got {sorted(data)!r:.80}")
    _check_widths("latent", data["hidden"])
    for name, least in (("latent", 2), ("transforms", 1), ("refine_steps", 0)):
        if type(data[name]) is not int or not least <= data[name] <= _MAX_WIDTH:
            raise ValueError(f"{name} must lie in [{least}, {_MAX_WIDTH}], got {data[name]!r:.20}")
    if data["prior"] not in ("flow", "gaussian"):
        raise ValueError(f"prior must be 'flow' or 'gaussian', got {data['prior']!r:.20}")
    spread = finite_number(data["spread"], "spread")
    if spread <= 0:
        raise ValueError(f"spread must be above 0, got {spread}")
    return LatentSpec(**{**data, "hidden": tuple(data["hidden"]), "spread": spread})


def _plan(data: dict[str, Any] | None, played: SpaceCodec) -> PlanSpec | None:
    if data is None:
        return None
    names = {entry.name for entry in dataclasses.fields(PlanSpec)}
    if set(data) != names or played.discrete:
        raise ValueError(
            f"plan must have the fields {sorted(names)}, and actions be a Box, got {data!r:.80}"
        )
    for name, least in (("horizon", 1), ("plans", 0)):
        if type(data[name]) is not int or not least <= data[name] <= _MAX_PLAN:
            raise ValueError(f"{name} must lie in [{least}, {_MAX_PLAN}], got {data[name]!r:.20}")
    return PlanSpec(**data)
