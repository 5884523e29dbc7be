"""Registration of `safeshield/Boat-v0`, `safeshield/DoubleIntegrator-v0`, `safeshield/Shielded-v0`.

Gymnasium before 1.0 calls `register_envs` at every ``import gymnasium``, through an entry point of
this package. This module therefore imports nothing and names the environments by strings.
Gymnasium 1.0 and later has no such plugins. There the environments are registered by importing
`safeshield.envs`, as ``gymnasium.make("safeshield.envs:safeshield/Boat-v0")`` does.
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


_SHIELDED = "Shielded-v0"
_MAKE_SHIELDED = "safeshield.wrappers.safety_shield:make_shielded"


def register_envs() -> None:
    """Register this package's environments with Gymnasium; a second call changes nothing.

    Example:
        >>> import gymnasium
        >>> register_envs()
        >>> gymnasium.spec("safeshield/Boat-v0").max_episode_steps
        400
    """
    # Imported here, because Gymnasium 0.29 calls this function while it is itself being imported.
    from gymnasium.envs import registration

    # The namespace is set here, because the plugin of another package may have set its own.
    with registration.namespace(NAMESPACE):
        for name, (module, single, vector, steps) in _ENVIRONMENTS.items():
            if f"{NAMESPACE}/{name}" not in registration.registry:
                registration.register(
                    id=f"{NAMESPACE}/{name}",
                    entry_point=f"{module}:{single}",
                    vector_entry_point=f"{module}:{vector}",
                    max_episode_steps=steps,
                )
    # The second one is what `gymnasium.make("safeshield:Shielded-v0")` looks for.
    for name in (f"{NAMESPACE}/{_SHIELDED}", _SHIELDED):
        if name not in registration.registry:
            with registration.namespace(None):  # type: ignore[arg-type]
                registration.register(id=name, entry_point=_MAKE_SHIELDED, order_enforce=False)
