"""Algorithms by name. A class registers itself where it is defined, and stands in no other list.

The command line, `load_agent`, the table of file formats and the benchmarks read this registry.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from safeshield.files.tensors import AGENT, read_by, read_tensors, register_format

if TYPE_CHECKING:
    import gymnasium as gym
    import torch

K = TypeVar("K", bound=type[Any])


class Agent(Protocol):
    """What `load_agent` returns: any registered class that has a file format."""

    config: Any
    """Its settings, a frozen dataclass."""

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation."""

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one action."""

    def predict(
        self,
        observation: object,
        state: object = None,
        episode_start: object = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Return actions and the state: Stable-Baselines3's signature."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to one file."""

    def diagnostics(self) -> dict[str, Any]:
        """Return what is known of a trained agent beside its settings, as JSON values."""


@dataclass(frozen=True)
class Algorithm:
    """A registered class."""

    name: str
    """What the command line calls it."""
    kind: type[Any]
    """The class: ``kind(config, device=...)``, `fit`, `save`, and, with a file format, `load`."""
    offline: bool
    """Whether it is trained from a log alone, as ``safeshield train`` does."""

    @property
    def config_type(self) -> type[Any]:
        """Its settings, a dataclass on `files.schema.Settings`."""
        kind: type[Any] = self.kind.config_type
        return kind

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Named settings to begin with."""
        return getattr(self.config_type, "presets", {})

    @property
    def summary(self) -> str:
        """The first line of its class's docstring."""
        return (inspect.getdoc(self.kind) or "").partition("\n")[0]


ALGORITHMS: dict[str, Algorithm] = {}
"""What this process has registered, by name."""


def register(name: str, *, offline: bool = True) -> Callable[[K], K]:
    """Return a class decorator that enters a learner in the registry.

    The class has `config_type`, a dataclass of settings, and may have `file_format`, the name of
    its files' format; then `load_agent` reads them by its classmethod `load`.

    Args:
        name: what the command line calls it.
        offline: whether it is trained from a log alone.

    Raises:
        ValueError: another class has the name or the format.
    """

    def enter(kind: K) -> K:
        held = ALGORITHMS.get(name)
        if held is not None and _place(held.kind) != _place(kind):
            raise ValueError(
                f"the algorithm '{name}' is {'.'.join(_place(held.kind))} already; register "
                f"{kind.__name__} under another name"
            )
        form = getattr(kind, "file_format", None)
        if form is not None:
            register_format(form, AGENT, f"{kind.__name__}.load")
        ALGORITHMS[name] = Algorithm(name, kind, offline)
        return kind

    return enter


def _place(kind: type[Any]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def offline_algorithm(name: str) -> Algorithm:
    """Return the algorithm of a name that is trained from a log.

    Raises:
        ValueError: none that is registered has the name.
    """
    known = sorted(one.name for one in ALGORITHMS.values() if one.offline)
    if name not in known:
        raise ValueError(
            f"--algorithm must be one of {known}, got '{name}'; for one of your own, pass the file "
            "that registers it as --plugin FILE.py"
        )
    return ALGORITHMS[name]


def load_agent(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Agent:
    """Read an agent of any registered algorithm from its file; the file imports nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no agent, or its algorithm is not registered.
    """
    form = read_tensors(path).header["format"]
    known: dict[str, type[Any]] = {}
    for one in ALGORITHMS.values():
        if getattr(one.kind, "file_format", None) is not None:
            known[one.kind.file_format] = one.kind
    if form not in known:
        raise ValueError(
            f"{path} must be an agent's file (one of {list(known)}), but is a {form!r}"
            f"{read_by(form)}"
        )
    agent: Agent = known[form].load(path, device=device)
    return agent
