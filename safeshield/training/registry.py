"""The offline algorithms by name, and agents from files of any of them, the online one included."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from safeshield.algorithms.behaviour_cloning import BehaviourCloning
from safeshield.algorithms.fisor import FISOR
from safeshield.algorithms.flrp.agent import FLRP
from safeshield.algorithms.r2pac.agent import R2PAC
from safeshield.algorithms.safefql import SafeFQL
from safeshield.files.tensors import read_by, read_tensors
from safeshield.training.agent import OfflineAgent

if TYPE_CHECKING:
    from safeshield.online import SafeSupportQLearning

_ONLINE = "safeshield-ssql"

ALGORITHMS: dict[str, type[OfflineAgent[Any, Any]]] = {
    "safefql": SafeFQL,
    "flrp": FLRP,
    "r2pac": R2PAC,
    "fisor": FISOR,
    "bc": BehaviourCloning,
}
"""By the name that the command line takes."""


def load_agent(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> OfflineAgent[Any, Any] | SafeSupportQLearning:
    """Read an agent of any algorithm from its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no agent.
    """
    kind = read_tensors(path).header["format"]
    for agent in ALGORITHMS.values():
        if agent.file_format == kind:
            return agent.load(path, device=device)
    if kind == _ONLINE:
        # On first use: it stands above the algorithms, and brings Stable-Baselines3 along.
        from safeshield.online import SafeSupportQLearning

        return SafeSupportQLearning.load(path, device=device)
    known = [agent.file_format for agent in ALGORITHMS.values()] + [_ONLINE]
    raise ValueError(
        f"{path} must be an agent's file (one of {known}), but is a {kind!r}{read_by(kind)}"
    )
