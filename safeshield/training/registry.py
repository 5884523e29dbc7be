"""Algorithms by name. A class registers itself where it is defined, and stands in no other list.

The command line, `load_agent`, the table of file formats and the benchmarks read this registry.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from safeshield.files.tensors import AGENT, read_by, read_tensors, register_format

if TYPE_CHECKING:
    import torch

    from safeshield.training.agent import Learner

K = TypeVar("K", bound=type[Any])


@dataclass(frozen=True)
class Algorithm:
    """A registered class."""

    name: str
    """What the command line calls it."""
    kind: type[Any]
    """The class: ``kind(config, device=...)``, `fit`, `predict`, `save` and `load`."""
    offline: bool
    """Whether it is trained from a log alone, as ``safeshield train`` does."""

    @property
    def config_type(self) -> type[Any]:
        """Its settings, a dataclass on `files.settings.Settings`."""
        return cast("type[Any]", self.kind.config_type)

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

    The class has `config_type`, a dataclass of settings, and `file_format`, the name of its files'
    format, which its classmethod `load` reads; most derive from `training.agent.OfflineAgent`.

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
        register_format(kind.file_format, AGENT, f"{kind.__name__}.load")
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


def load_agent(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> Learner[Any, Any]:
    """Read an agent of any registered algorithm from its file; the file imports nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no agent, or its algorithm is not registered.
    """
    form = read_tensors(path).header["format"]
    known = {one.kind.file_format: one.kind for one in ALGORITHMS.values()}
    if form not in known:
        raise ValueError(
            f"{path} must be an agent's file (one of {list(known)}), but is a {form!r}"
            f"{read_by(form)}"
        )
    agent: Learner[Any, Any] = known[form].load(path, device=device)
    return agent
