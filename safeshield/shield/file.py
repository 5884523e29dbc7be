"""A shield's file: one safetensors file with strict JSON in its header."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

import safeshield.nn.latent_actor  # noqa: F401 - registers its kind of actor
from safeshield.files.schema import finite_number, json_values, record_from_json
from safeshield.files.signing import VERIFIED
from safeshield.files.tensors import (
    SHIELD,
    TRAINING_EPISODES,
    TRAINING_HASHES,
    content_digest,
    hash_shapes,
    read_tensors,
    register_format,
    write_tensors,
)
from safeshield.nn.actor import (
    KINDS,
    MAX_STEPS,
    Actor,
    Classifier,
    Described,
    Network,
    Widths,
    check_count,
    check_hidden,
    from_header,
    to_header,
)
from safeshield.nn.mlp import EnsembleMLP, Shapes, hidden_widths
from safeshield.nn.plan_actor import ActionCritic
from safeshield.shield.backup import BackupController
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.critics import SafetyModel, widths_of
from safeshield.shield.log_record import (
    Ledger,
    LogRecord,
    ledger_tensor,
    read_attempts,
    remembered,
)
from safeshield.shield.record import Attempt, CalibrationRecord
from safeshield.shield.replacement import (
    CommittedFallback,
    FallbackPolicy,
    NearestAcceptable,
    ProjectedGradient,
    Replacement,
    check_replacement,
    describe,
    settings_of,
)
from safeshield.shield.sensors import SensorCheck
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.support import SCORES, SupportRecord, SupportTest, support_score
from safeshield.values.constraint import stored_source
from safeshield.values.units import (
    ADVANTAGE,
    BEHAVIOUR,
    FALLBACK,
    PLAN,
    SAFETY_NETWORKS,
    SafetyScale,
)

if TYPE_CHECKING:
    from safeshield.files.signing import PrivateKey, PublicKey
    from safeshield.shield.shield import Shield

    S = TypeVar("S", bound=Shield)

FORMAT = "safeshield-shield"
register_format(FORMAT, SHIELD, "Shield.load")
VERSION = 2
_MAX_CANDIDATES = 4096
_MAX_WEIGHTS = 1 << 28
_REPLACEMENTS: dict[
    str,
    type[
        NearestAcceptable
        | FallbackPolicy
        | CommittedFallback
        | BackupController
        | ProjectedGradient
    ],
] = {
    "nearest_acceptable": NearestAcceptable,
    "fallback_policy": FallbackPolicy,
    "committed_fallback": CommittedFallback,
    "backup_controller": BackupController,
    "projected_gradient": ProjectedGradient,
}
"""The ways to replace actions that a file can name."""


def save_shield(
    shield: Shield, path: str | os.PathLike[str], sign: PrivateKey | None = None
) -> None:
    """Write a shield to the file `path`, atomically.

    The header holds spaces, units, threshold, record, replacement, support test and the
    descriptions of the actors. The tensors are the weights of the networks. The private key `sign`,
    or that in the PEM file of this name, signs the file; None leaves it unsigned.

    Raises:
        ValueError: The shield replaces actions in a way that a file cannot hold, or an actor's
            class is not registered; or there is no such key in the key's file.
        ImportError: `sign` is given, and the extra `sign` is not installed.
    """
    described, weights = _identity(shield, to_header)
    header = {
        "format": FORMAT,
        "version": VERSION,
        **described,
        "delta": shield.delta,
        "record": None if shield.record is None else shield.record.to_json(),
        "attempts": [json_values(one) for one in shield.attempts],
        "trained_by": shield.trained_by,
        "replacement": _replacement_to_json(shield.replacement),
        "support": _support_to_json(shield),
        **remembered(shield),
    }
    if shield.sensors is not None:
        header["sensors"] = shield.sensors.to_json()
    hashes = {ledger_tensor(i): one for i, one in enumerate(shield.ledger.hashes)}
    if shield.training_episodes is not None:
        header[TRAINING_EPISODES] = len(shield.training_episodes)
        hashes[TRAINING_HASHES] = shield.training_episodes
    seen = {name: one.view(np.int64) for name, one in hashes.items()}
    write_tensors(path, {**weights, **seen}, header, sign)


def _identity(
    shield: Shield, entry: Callable[[Described | None], object]
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the fields of a header that describe the critics and actors, and their weights.

    Args:
        shield: The shield.
        entry: Function from an actor or an action critic to its field, such as `to_header`.
    """
    model = shield.model
    header = {
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "scaling": model.scaling.to_json(),
        "safety_scale": model.scale.to_json(),
        "constraint_source": model.constraint and model.constraint.name,
        "hidden": {name: list(hidden_widths(model.networks[name])) for name in SAFETY_NETWORKS},
        "fallback": entry(model.fallback_actor),
        "behaviour": entry(model.behaviour_actor),
        "judge": entry(model.judge),
        "members": int(model.networks[ADVANTAGE]["0.weight"].shape[0]),
    }
    parts = [part for part in (model.fallback_actor, model.behaviour_actor, model.judge) if part]
    names = {*SAFETY_NETWORKS, *(name for part in parts for name in part.parts())}
    weights = {
        f"{name}/{key}": array
        for name, weights in model.networks.items()
        if name in names
        for key, array in weights.items()
    }
    return header, weights


def digest_of(shield: Shield) -> str:
    """Return `Shield.digest` of a shield."""
    described, weights = _identity(shield, _kind)
    level = None if shield.support is None else shield.support.record.to_json()
    told: list[Any] = [described, describe(shield.replacement), level]
    if shield.sensors is not None and any(shield.sensors.falls_back):
        told.append(shield.sensors.to_json())
    return content_digest(told, weights)[:16]


def _kind(part: Described | None) -> object:
    """Return the header's entry of an actor; of a class that no file can name, the class's name."""
    if part is None or KINDS.get(part.kind) is type(part):
        return to_header(part)
    return f"{type(part).__module__}.{type(part).__qualname__}"


def load_shield(kind: type[S], path: str | os.PathLike[str], verify: PublicKey | None = None) -> S:
    """Return the shield in the file `path`, after a check of every field of the header.

    `kind` is the class of the result, `Shield` or a subclass. The file must be signed with the
    private key that belongs to the public key `verify`, unless this is None. Whether the records
    follow from their own counts is checked by `calibration.consistency`.
    """
    file = read_tensors(path, FORMAT)
    if verify is not None:
        file.verify(verify)
    header = file.header
    if header.get("version") not in (1, VERSION):
        raise ValueError(
            f"{path}: version {header.get('version')!r:.20} of the shield format is not known; "
            f"this release reads versions 1 and {VERSION}"
        )
    try:
        observation = flat_observations(space_from_json(header["observation_space"]))
        action = flat_actions(space_from_json(header["action_space"]))
        scaling = Scaling.from_json(header["scaling"], observation, action)
        scale = SafetyScale.from_json(header["safety_scale"])
        if header["version"] == 1:
            header = _as_version_2(header, action.discrete)
        widths = widths_of(scaling, action)
        actors = _actors(header, widths)
        expected = _shapes(header, widths, actors)
        if header.get("plan") and not header["plan"]["plans"]:
            # Files of version 1 hold the critic of plans also where the shield does not use it.
            actors = actors._replace(judge=None)
        delta = finite_number(header["delta"], "delta")
        record = header["record"]
        record = None if record is None else CalibrationRecord.from_json(record)
        # Files of earlier releases remember no attempts.
        attempts = tuple(
            record_from_json(Attempt, one, "attempts") for one in header.get("attempts", ())
        )
        if "replacement" in header:
            replacement = _replacement(header["replacement"])
        else:
            # Files from before there were several strategies hold the candidates alone.
            replacement = NearestAcceptable(_candidates(header["candidates"]))
        check_replacement(replacement, action)
        if record is not None and "attempts" in header and len(attempts) < len(record.attempts):
            raise ValueError(
                f"attempts must hold those of the record, {len(record.attempts)}, got "
                f"{len(attempts)}"
            )
        source = stored_source(header)
        trained_by = header["trained_by"]
        if not isinstance(trained_by, str):
            raise ValueError(f"trained_by must be text, got {type(trained_by).__name__}")
        # Files of earlier releases know neither training episodes nor logs.
        sensors = header.get("sensors")
        sensors = None if sensors is None else SensorCheck.from_json(sensors)
        log_records = tuple(LogRecord.from_json(one) for one in header.get("log_records", ()))
        log_attempts, counts = read_attempts(header)
        hashed = {**hash_shapes(header), **{name: (count,) for name, count in counts.items()}}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the header does not describe a shield: {error}") from error
    networks: dict[str, dict[str, Any]] = {}
    tensors = file.load({**expected, **hashed}, dict.fromkeys(hashed, np.int64))
    hashes = {name: tensors.pop(name).view(np.uint64) for name in hashed}
    for name, array in tensors.items():
        network, key = name.split("/")
        networks.setdefault(network, {})[key] = array
    model = SafetyModel(
        observation.space,
        action.space,
        scaling,
        source,
        scale,
        networks,
        *actors,
    )
    # Files of earlier releases have no field for the support test.
    support = header.get("support")
    try:
        test = None if support is None else _support_from_json(support, model)
    except ValueError as error:
        raise ValueError(f"{path}: the header does not describe a shield: {error}") from error
    shield = kind(
        model,
        delta=delta,
        record=record,
        trained_by=trained_by,
        replacement=replacement,
        support=test,
        attempts=attempts,
        log_records=log_records,
        ledger=Ledger(log_attempts, tuple(hashes[name] for name in counts)),
        training_episodes=hashes.get(TRAINING_HASHES),
        sensors=sensors,
    )
    shield.signature = file.signed if verify is None else VERIFIED
    return shield


def _replacement_to_json(replacement: Replacement) -> dict[str, Any]:
    for kind, known in _REPLACEMENTS.items():
        if type(replacement) is known:
            settings = settings_of(replacement)
            if "candidates" in settings:
                settings["candidates"] = dataclasses.asdict(settings["candidates"])
            return {"kind": kind, **settings}
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
    names = {"kind", *(entry.name for entry in dataclasses.fields(known) if entry.compare)}
    if set(data) != names:
        raise ValueError(
            f"replacement '{kind}' must have the fields {sorted(names)}, got {sorted(data)!r:.80}"
        )
    settings = {name: value for name, value in data.items() if name not in ("kind", "candidates")}
    if "step_size" in settings:
        settings["step_size"] = finite_number(settings["step_size"], "step_size")
    if "candidates" in data:
        settings["candidates"] = _candidates(data["candidates"])
    return known(**settings)


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


class _Actors(NamedTuple):
    fallback: Actor | None
    behaviour: Actor | Classifier | None
    judge: ActionCritic | None


def _actors(header: dict[str, Any], widths: Widths) -> _Actors:
    if (header["fallback"] is None) != bool(widths.choices):
        raise ValueError("fallback must be an actor where actions are a Box, null where discrete")
    imitates = "logits" if widths.choices else "act"
    return _Actors(
        from_header("fallback", header["fallback"], widths, "act"),
        from_header("behaviour", header["behaviour"], widths, imitates),
        from_header("judge", header["judge"], widths, "worst"),
    )


def _as_version_2(header: dict[str, Any], discrete: bool) -> dict[str, Any]:
    """Convert a header of version 1, in which actors have no kinds, to version 2."""
    # The oldest files have no fields latent and plan.
    hidden, latent, plan = dict(header["hidden"]), header.get("latent"), header.get("plan")
    names = [*SAFETY_NETWORKS, *([] if discrete or latent else [FALLBACK])]
    names += [PLAN] if plan else []
    if set(hidden) - {BEHAVIOUR} != set(names):
        raise ValueError(f"networks must be {names}, got {sorted(hidden)}")
    check_count("flow_steps", header["flow_steps"], 1, MAX_STEPS)
    own = {name: hidden.pop(name) for name in (FALLBACK, BEHAVIOUR, PLAN) if name in hidden}
    fallback = behaviour = judge = None
    if BEHAVIOUR in own:
        kind = {"kind": "classifier"} if discrete else {"kind": "flow"}
        behaviour = {**kind, "hidden": own[BEHAVIOUR]}
        behaviour |= {} if discrete else {"flow_steps": header["flow_steps"]}
    if latent is not None:
        fallback = {"kind": "latent", "spec": latent}
        behaviour = {"kind": "latent", "spec": {**latent, "refine_steps": 0}}
    elif plan is not None:
        if set(plan) != {"horizon", "plans"} or discrete:
            raise ValueError(
                "plan must have the fields ['horizon', 'plans'], and actions be a Box, got "
                f"{plan!r:.80}"
            )
        planner = {"hidden": own[FALLBACK], "horizon": plan["horizon"]}
        fallback = {"kind": "plan", **planner}
        judge = {"kind": "best_plan", "planner": planner, "hidden": own[PLAN]}
        check_count("plans", plan["plans"], 0, MAX_STEPS)
        judge |= {"members": header["members"], "plans": max(plan["plans"], 1)}
    elif not discrete:
        fallback = {"kind": "one_step", "hidden": own[FALLBACK]}
    actors = {"fallback": fallback, "behaviour": behaviour, "judge": judge}
    return {**header, "hidden": hidden, **actors}


def _shapes(header: dict[str, Any], widths: Widths, actors: _Actors) -> Shapes:
    hidden, members = header["hidden"], header["members"]
    if set(hidden) != set(SAFETY_NETWORKS):
        raise ValueError(f"networks must be {list(SAFETY_NETWORKS)}, got {sorted(hidden)}")
    if type(members) is not int or not 1 <= members <= 64:
        raise ValueError(f"members must be between 1 and 64, got {members!r}")
    networks: dict[str, Network] = {}
    for name in SAFETY_NETWORKS:
        check_hidden(name, hidden[name])
        inputs = widths.observation + (widths.action if name == ADVANTAGE else 0)
        each = members if name == ADVANTAGE else 1
        networks[name] = EnsembleMLP(inputs, 1, tuple(hidden[name]), each)
    for part in actors:
        networks |= {} if part is None else part.parts()
    shapes = {
        f"{name}/{key}": shape
        for name, network in networks.items()
        for key, shape in network.shapes.items()
    }
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > _MAX_WEIGHTS:
        raise ValueError(f"the networks have {count} weights, more than {_MAX_WEIGHTS}")
    return shapes
