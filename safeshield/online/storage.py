"""An agent's file: one safetensors file, its settings strict JSON inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch

from safeshield.files.schema import finite_number
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.mlp import Networks
from safeshield.online.config import SSQLConfig
from safeshield.online.losses import ACTOR, CLONE, CRITIC
from safeshield.online.updates import SSQLModel
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.schema import space_from_json, space_to_json
from safeshield.training.state import TrainState

FORMAT = "safeshield-ssql"
_VERSION = 1


class AgentHeader(NamedTuple):
    """What a file says beside settings and weights."""

    spaces: tuple[gym.Space[Any], gym.Space[Any]]
    """Of observations and actions."""
    scaling: Scaling
    units: tuple[float, float]
    """Offset and spread of the values."""
    extracted: bool
    cloned: bool
    guarded: bool
    """Whether a safe set cut down what it learned from."""


def save_agent(
    path: Path,
    config: SSQLConfig,
    model: SSQLModel,
    state: TrainState,
    *,
    extracted: bool,
    cloned: bool,
    guarded: bool,
) -> None:
    """Write the critics' slow copies, and the actor and the clone where there are any."""
    networks = {CRITIC: state.targets[CRITIC]}
    networks |= {name: state.networks[name] for name in _more(extracted, cloned)}
    header = {
        "format": FORMAT,
        "version": _VERSION,
        "config": dataclasses.asdict(config),
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "scaling": model.scaling.to_json(),
        "value": {"offset": model.critics.offset, "spread": model.critics.spread},
        "extracted": extracted,
        "cloned": cloned,
        "guarded": guarded,
    }
    flat = {
        f"{name}/{key}": tensor.detach().cpu().numpy()
        for name, params in networks.items()
        for key, tensor in params.items()
    }
    write_tensors(path, flat, header)


def read_agent(
    path: Path,
) -> tuple[SSQLConfig, AgentHeader, Callable[[SSQLModel, torch.device], TrainState]]:
    """Return settings, header, and what reads the weights once the networks are described.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    file = read_tensors(path, FORMAT)
    data = file.header
    try:
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']!r:.20}, known is {_VERSION}")
        flags = {name: data[name] for name in ("extracted", "cloned", "guarded")}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ValueError(f"{', '.join(flags)} must be true or false")
        config = SSQLConfig(**data["config"])
        seen = flat_observations(space_from_json(data["observation_space"]))
        played = flat_actions(space_from_json(data["action_space"]))
        scaling = Scaling.from_json(data["scaling"], seen, played)
        units = tuple(finite_number(data["value"][name], name) for name in ("offset", "spread"))
        if not units[1] > 0:
            raise ValueError(f"the values' spread must be above 0, got {units[1]}")
        header = AgentHeader((seen.space, played.space), scaling, (units[0], units[1]), **flags)
    except KeyError as error:
        raise ValueError(
            f"{path}: the header does not describe an agent: it lacks {error}"
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the header does not describe an agent: {error}") from error

    def finish(model: SSQLModel, device: torch.device) -> TrainState:
        parts = model.parts()
        names = (CRITIC, *_more(header.extracted, header.cloned))
        shapes = {
            f"{name}/{key}": shape for name in names for key, shape in parts[name].shapes.items()
        }
        networks: Networks = {}
        for name, array in file.load(shapes).items():
            network, key = name.split("/")
            networks.setdefault(network, {})[key] = torch.tensor(array, device=device)
        # What the file does not hold is as new: a loaded agent may go on learning.
        fresh = model.initial(torch.Generator(device).manual_seed(config.seed))
        return fresh._replace(
            networks={**fresh.networks, **networks}, targets={CRITIC: networks[CRITIC]}
        )

    return config, header, finish


def _more(extracted: bool, cloned: bool) -> list[str]:
    return [name for name, there in ((ACTOR, extracted), (CLONE, cloned)) if there]
