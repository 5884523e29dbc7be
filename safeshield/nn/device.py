"""The device of networks, from its name."""

from __future__ import annotations

import torch


def device_of(device: str | torch.device) -> torch.device:
    """Return the device that `device` names; "auto" means CUDA where there is one, else the CPU.

    Raises:
        ValueError: The device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if isinstance(device, str | torch.device):
            found = torch.device(device)
            if found.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"device {device!r}: this torch sees no CUDA; use 'cpu' or 'auto'")
            return found
    except RuntimeError:
        pass
    raise ValueError(
        f"device must be 'auto', 'cpu', 'cuda' (or 'cuda:0', ...) or a torch.device, got {device!r}"
    )
