r"""The exact safety value of `safeshield.envs.double_integrator`, in closed form.

V(p, v) = min over controls of the max over time of h = abs(p) - wall. Let v > 0 (v < 0 is its
mirror image) and a the largest deceleration.

Continuous time. Full braking gives the lowest position at every time. The cart stops at
p + v^2 / (2 a) and can stay there:

    V = max(abs(p), abs(p + v abs(v) / (2 a))) - wall.

Discrete time, with steps of dt and the acceleration held within a step (the environment's
dynamics). Under any control the n-th sampled position is at least that of full braking,

    p_n = p + n v dt - a n^2 dt^2 / 2,    n = 0, 1, 2, ...

which is highest at the whole number m nearest to v / (a dt). So max over n of p_n is a lower bound.
Braking for m steps attains it: the remaining speed w has abs(w) <= a dt / 2, so the accelerations
-2 w / dt, 2 w / dt, -2 w / dt, ... are allowed, and they bring the cart back to p_m at every
sample. Hence

    V = max(abs(p), abs(p_m)) - wall.

This is below the continuous value by at most a dt^2 / 8, because the cart may reach its turning
point between two samples.

The other wall needs no separate treatment. The positions rise from p to p_m, so the cart is nearest
to that wall at the start, which V takes into account. The box clips positions to [-1.5, 1.5], so
neither h nor V exceeds 1.5 - wall. The clipping of speeds has no effect for states of the box,
since braking reduces the speed.
"""

from __future__ import annotations

import numpy as np

from safeshield.envs.double_integrator import MAX_ACCELERATION, POSITION_LIMIT, WALL, next_state
from safeshield.envs.task import finite_states, positive
from safeshield.spaces.shapes import Actions, Observations, Scalars


def value(
    states: Observations,
    wall: float = WALL,
    max_acceleration: float = MAX_ACCELERATION,
    dt: float | None = None,
) -> Scalars:
    """Return V (...) of states (..., 2) of the environment's box, in metres.

    V is positive where no control avoids the walls.

    Args:
        states: (..., 2) positions and speeds, in metres and metres per second.
        wall: Distance of each wall from 0, in metres.
        max_acceleration: Largest acceleration, in metres per second squared.
        dt: Length of a step in seconds; None stands for continuous time.

    Raises:
        ValueError: The states do not have two finite entries on the last axis, or wall,
            acceleration or dt is not positive.

    Example:
        >>> states = np.array([[0.0, 1.0], [0.0, 2.0], [-1.2, 0.0]])
        >>> value(states).round(3)
        array([-0.5,  0.5,  0.2])
        >>> float(value(np.array([0.0, 1.0]), dt=0.4).round(3))
        -0.52
    """
    states = finite_states(states, "(position, speed)")
    wall = positive("wall", wall)
    braking = positive("max_acceleration", max_acceleration)
    position, speed = states[..., 0], np.abs(states[..., 1])
    if dt is None:
        travel = speed * speed / (2.0 * braking)
    else:
        dt = positive("dt", dt)
        steps = np.floor(speed / (braking * dt) + 0.5)
        travel = steps * dt * (speed - 0.5 * braking * steps * dt)
    turning = position + np.sign(states[..., 1]) * travel
    reached = np.minimum(np.maximum(np.abs(position), np.abs(turning)), POSITION_LIMIT)
    return np.asarray(reached - wall)


def action_value(states: Observations, actions: Actions, dt: float) -> Scalars:
    """Return Q (...) = max(h(s), V(s')) of states (..., 2) and actions (..., 1), in metres.

    Here s' is the state one step of dt seconds later. Since V >= h, Q is the maximum over time of h
    if the action is taken first and the best controls follow. Its minimum over actions is `value`
    with the same dt.

    Args:
        states: (..., 2) positions and speeds, in metres and metres per second.
        actions: (..., 1) accelerations.
        dt: Length of a step in seconds.

    Raises:
        ValueError: As for `value`.

    Example:
        >>> brake, push = np.array([-1.0]), np.array([1.0])
        >>> state = np.array([0.5, 0.9])
        >>> float(action_value(state, brake, dt=0.05).round(4))
        -0.095
        >>> float(action_value(state, push, dt=0.05).round(4))
        -0.0025
    """
    states = finite_states(states, "(position, speed)")
    here = np.minimum(np.abs(states[..., 0]), POSITION_LIMIT) - WALL
    after = value(next_state(states, actions, dt=positive("dt", dt)), dt=dt)
    return np.asarray(np.maximum(here, after))
