"""A shielded environment in TorchRL, with the shield's entries in the tensordict.

    pip install safeshield torchrl
    python examples/torchrl_rollout.py             # a few seconds

TorchRL's `GymWrapper` takes a shielded Gymnasium environment as it is. An info reader of TorchRL
copies the shield's entries of `info` into the tensordict of each step. `next/action_executed` is
the action that the environment executed; the `action` of the tensordict is the one that the policy
proposed.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torchrl.data import Unbounded
from torchrl.envs import GymWrapper, default_info_dict_reader

from safeshield import SafetyShield

TRIPS = 5


class ShieldReader(default_info_dict_reader):
    """Reads what the shield reports, of which some are plain Python numbers."""

    def __call__(self, info_dict: dict[str, Any], tensordict: Any) -> Any:  # noqa: ANN401
        """Write the numbers of `info_dict` to `tensordict`."""
        arrays = {key: np.asarray(info_dict[key]) for key in self.keys}
        return super().__call__(arrays, tensordict)


def main() -> None:
    """Make random trips behind the shield and read what it did."""
    env = GymWrapper(SafetyShield(gym.make("safeshield/Boat-v0"), "builtin:boat"))
    env.set_info_dict_reader(
        ShieldReader(
            ["shield/intervened", "shield/value", "action_executed", "cost"],
            [
                Unbounded((), dtype=torch.bool),
                Unbounded((), dtype=torch.float64),
                Unbounded((2,), dtype=torch.float32),
                Unbounded((), dtype=torch.float64),
            ],
        )
    )
    env.set_seed(2)
    torch.manual_seed(2)
    trips = torch.cat([env.rollout(400) for _ in range(TRIPS)])
    intervened = trips["next", "shield/intervened"]
    same = (trips["action"] == trips["next", "action_executed"]).all(-1)
    print(f"{len(trips)} steps, {int(intervened.sum())} actions replaced")
    print(f"accepted actions were executed bit for bit: {bool((same | intervened).all())}")
    print(f"cost of all trips: {float(trips['next', 'cost'].sum()):g}")


if __name__ == "__main__":
    main()
