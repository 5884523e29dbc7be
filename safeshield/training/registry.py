"""Registry of algorithms by name. A class registers itself where it is defined.

The command line, `load_agent`, the table of file formats and the benchmarks read this registry, so
an algorithm needs no entry in any other list.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from safeshield.files.tensors import (
    AGENT,
    LOG_SUFFIXES,
    read_by,
    read_tensors,
    register_format,
)

if TYPE_CHECKING:
    import torch

    from safeshield.files.signing import PublicKey
    from safeshield.training.agent import Learner

K = TypeVar("K", bound=type[Any])


@dataclass(frozen=True)
class Algorithm:
    """A registered algorithm."""

    name: str
    """Name of the algorithm on the command line."""
    kind: type[Any]
    """Class of the algorithm: ``kind(config, device=...)``, `fit`, `predict`, `save` and `load`."""
    offline: bool
    """Whether the algorithm is trained from a log alone, as by ``safeshield train``."""

    @property
    def config_type(self) -> type[Any]:
        """Class of the algorithm's settings, a dataclass derived from `files.settings.Settings`."""
        return cast("type[Any]", self.kind.config_type)

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Named settings to start from."""
        return getattr(self.config_type, "presets", {})

    @property
    def summary(self) -> str:
        """First line of the docstring of the algorithm's class."""
        return (inspect.getdoc(self.kind) or "").partition("\n")[0]


ALGORITHMS: dict[str, Algorithm] = {}
"""Algorithms registered in this process, by name."""


def register(name: str, *, offline: bool = True) -> Callable[[K], K]:
    """Return a class decorator that adds a learner to the registry.

    The class must have `config_type`, a dataclass of settings, and `file_format`, the name of the
    file format that its classmethod `load` reads. Most learners derive from
    `training.agent.OfflineAgent`.

    Args:
        name: Name of the algorithm on the command line.
        offline: Whether the algorithm is trained from a log alone.

    Raises:
        ValueError: Another class has this name or this file format.
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


def offline_algorithm(name: str, option: str = "--algorithm") -> Algorithm:
    """Return the registered algorithm `name`, which is trained from a log.

    Args:
        name: Name of the algorithm.
        option: Name of the option, or of the file's entry, for error messages.

    Raises:
        ValueError: No such algorithm has this name.
    """
    known = sorted(one.name for one in ALGORITHMS.values() if one.offline)
    if name not in known:
        raise ValueError(
            f"{option} must be one of {known}, got '{name}'; for an algorithm of your own, pass "
            "the file that registers it as --plugin FILE.py"
        )
    return ALGORITHMS[name]


def load_agent(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    verify: PublicKey | None = None,
) -> Learner[Any, Any]:
    """Return the agent of any registered algorithm in the file `path`. Nothing in it is executed.

    Args:
        path: The file.
        device: Device of the weights.
        verify: Public Ed25519 key, or the path of its PEM file. A file that is not signed with its
            private key (`safeshield sign`) is refused. None does not ask.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, does not hold an agent, its algorithm is not registered, or
            its signature is missing or not valid.
        ImportError: `verify` is given, and the extra `sign` is not installed.
    """
    if Path(path).suffix.lower() in LOG_SUFFIXES:
        raise ValueError(
            f"{path} must be an agent's file (.safetensors), but is a log: read it by "
            "OfflineDataset.load(path)"
        )
    form = read_tensors(path).header["format"]
    known = {one.kind.file_format: one.kind for one in ALGORITHMS.values()}
    if form not in known:
        raise ValueError(
            f"{path} must be an agent's file (one of {list(known)}), but is a {form!r}"
            f"{read_by(form)}"
        )
    # An algorithm of a user's own need not know signatures while none is asked for.
    asked: dict[str, Any] = {} if verify is None else {"verify": verify}
    agent: Learner[Any, Any] = known[form].load(path, device=device, **asked)
    return agent
