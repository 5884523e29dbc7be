"""Plans on NumPy arrays: chunks of h actions that a one-step actor draws, judged as a whole.

    Q(s, a) = min over k of Q(s, (a, tail_k)),    tail_k: what follows the first action of plan k

The noise behind the plans is fixed, so the value is a function of state and action.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers, largest_and_gradient

_Float = npt.NDArray[np.float32]
_Stack = list[tuple[_Float, _Float]]
_SEED = 20_261_127


@dataclass(frozen=True)
class PlanSpec:
    """How a shield looks ahead."""

    horizon: int
    """h: steps of a plan."""
    plans: int = 8
    """Plans that are weighed for each action; 0: none, an action is judged by itself."""


@dataclass(frozen=True, eq=False)
class PlanForward:
    """A planner and its judge with their weights."""

    spec: PlanSpec
    planner: _Stack
    """(s, z) to a chunk of h * act entries."""
    judge: _Stack
    """(s, chunk) to how much worse than the best it is."""
    action: int
    """Entries of one action."""

    @cached_property
    def _noise(self) -> _Float:
        rng = np.random.default_rng(_SEED)
        noise = rng.standard_normal((self.spec.plans, self.spec.horizon * self.action))
        noise[:1] = 0.0
        return noise.astype(np.float32)

    def draw(self, inputs: _Float, noise: _Float) -> _Float:
        """Return plans (n, h * act) in [-1, 1] for noise (n, h * act) in n states (n, obs)."""
        raw = forward_layers(self.planner, np.concatenate([inputs, noise], axis=-1))[0]
        return np.asarray(np.clip(np.nan_to_num(raw), -1.0, 1.0))

    def worst(self, inputs: _Float, actions: _Float) -> _Float:
        """Return the least dangerous plan's advantage (n, c) of c actions (n, c, act) each."""
        return np.asarray(self._judged(self._chunks(inputs, actions)).max(axis=0).min(axis=-1))

    def worst_and_gradient(self, inputs: _Float, actions: _Float) -> tuple[_Float, _Float]:
        """Return that of one action (n, act), (n,), and its gradient in the action (n, act)."""
        rows = self._chunks(inputs, actions[:, None])
        best = self._judged(rows).max(axis=0)[:, 0].argmin(axis=-1)
        chosen = rows[np.arange(len(rows)), 0, best]
        value, slope = largest_and_gradient(self.judge, chosen)
        width = inputs.shape[1]
        return value, slope[:, width : width + self.action]

    def _chunks(self, inputs: _Float, actions: _Float) -> _Float:
        """Return (n, c, plans, obs + h * act): every action at the head of every plan."""
        count, width = inputs.shape
        plans, chunk = self._noise.shape
        drawn = self.draw(np.repeat(inputs, plans, axis=0), np.tile(self._noise, (count, 1)))
        rows = np.empty((count, actions.shape[1], plans, width + chunk), np.float32)
        rows[..., :width] = inputs[:, None, None]
        rows[..., width:] = drawn.reshape(count, 1, plans, chunk)
        rows[..., width : width + self.action] = actions[:, :, None]
        return rows

    def _judged(self, rows: _Float) -> _Float:
        shape = rows.shape[:-1]
        out = forward_layers(self.judge, rows.reshape(-1, rows.shape[-1]))[..., 0]
        return out.reshape(-1, *shape)
