"""The ids `safeshield/Boat-v0` and `safeshield/DoubleIntegrator-v0`.

Gymnasium before 1.0 calls `register_envs` at every ``import gymnasium`` (an entry point of this
package), so this module imports nothing and names the environments by strings. Gymnasium 1.0 and
later has no such plugins: there, importing `safeshield.envs` registers them, as does
``gymnasium.make("safeshield.envs:safeshield/Boat-v0")``.
"""

from __future__ import annotations

NAMESPACE = "safeshield"

# name: (module, single environment, vector environment, episode length in steps)
_ENVIRONMENTS = {
    "Boat-v0": ("safeshield.envs.boat", "BoatEnv", "BoatVectorEnv", 400),
    "DoubleIntegrator-v0": (
        "safeshield.envs.double_integrator",
        "DoubleIntegratorEnv",
        "DoubleIntegratorVectorEnv",
        200,
    ),
}


def register_envs() -> None:
    """Register this package's environments with Gymnasium; a second call changes nothing.

    Example:
        >>> import gymnasium
        >>> register_envs()
        >>> gymnasium.spec("safeshield/Boat-v0").max_episode_steps
        400
    """
    # Inside the function: Gymnasium 0.29 calls it while it is itself being imported.
    from gymnasium.envs import registration

    # Whatever namespace another package's plugin has open, ours is the one that counts.
    with registration.namespace(NAMESPACE):
        for name, (module, single, vector, steps) in _ENVIRONMENTS.items():
            if f"{NAMESPACE}/{name}" not in registration.registry:
                registration.register(
                    id=f"{NAMESPACE}/{name}",
                    entry_point=f"{module}:{single}",
                    vector_entry_point=f"{module}:{vector}",
                    max_episode_steps=steps,
                )
