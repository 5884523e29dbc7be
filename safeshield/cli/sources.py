"""Loaders of the environments, shields, policies and logs that command arguments name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env


def make_env(env_id: str) -> Env:
    """Make an environment. Ids of the supported suites are registered on first use."""
    import gymnasium as gym

    import safeshield.envs

    if ":" not in env_id and env_id not in gym.registry:
        import safeshield.suites  # noqa: F401 - registers the suites

    env: Env = gym.make(env_id)
    return env


def shield_of(path: Path) -> Shield:
    """Load a shield, or make the shield of a loaded agent.

    Raises:
        ValueError: the file holds neither, or the agent's algorithm learns no shield.
    """
    from safeshield.cli.kinds import file_kind, with_article
    from safeshield.files.tensors import AGENT, SHIELD

    kind = file_kind(path)
    if kind == SHIELD:
        from safeshield.shield.shield import Shield

        return Shield.load(path)
    if kind == AGENT:
        from safeshield.algorithms.registry import load_agent
        from safeshield.shield.shield import HasShield

        agent = load_agent(path)
        if isinstance(agent, HasShield):
            return agent.shield()
        raise ValueError(
            f"{path} is an agent of {type(agent).__name__}, which learns no shield; train safefql"
        )
    raise ValueError(f"{path} must be an agent or a shield, but is {with_article(kind)}")


def policy_of(name: str, env: Env, shield: Shield | None, trust: bool) -> object:
    """Return the policy that a name or a file stands for; an adversary attacks `shield`."""
    if name == "random":
        return name
    if name == "adversary" and shield is not None:
        from safeshield.calibration.proposers import Adversary

        return Adversary(shield)
    if name == "helmsmen":
        from safeshield.demo.helmsmen import Helmsmen
        from safeshield.envs.boat import BoatEnv

        if not isinstance(env.unwrapped, BoatEnv):
            raise ValueError(
                f"--policy helmsmen needs the environment safeshield/Boat-v0, got {env}"
            )
        return Helmsmen()
    path = Path(name)
    if path.suffix == ".safetensors":
        from safeshield.algorithms.registry import load_agent

        return load_agent(path)
    if path.suffix == ".zip":
        from safeshield.cli.kinds import load_sb3

        return load_sb3(path, trust=trust)
    known = ["random", "helmsmen", *(["adversary"] if shield is not None else [])]
    raise ValueError(f"--policy must be one of {known}, or an agent's .safetensors or .zip file, "
                     f"got '{name}'")  # fmt: skip


def name_of(name: str, policy: object) -> str:
    """Return the name of a policy for a record: file name, algorithm and seed."""
    from safeshield.training.agent import OfflineAgent

    if isinstance(policy, OfflineAgent):
        return f"{type(policy).__name__}, seed {policy.config.seed} ({Path(name).name})"
    return Path(name).name


def log_of(path: str, env: Env) -> OfflineDataset:
    """Read a log and check that it is of this environment.

    Reference returns from the log of another environment would give false scores.

    Raises:
        ValueError: the log is of another environment.
    """
    from safeshield.data.card import logged_environment
    from safeshield.data.dataset import OfflineDataset
    from safeshield.rollouts.copies import environment_name
    from safeshield.suites.labels import same_task

    log = OfflineDataset.load(path, action_space=env.action_space)
    named, wanted = logged_environment(log, path), environment_name(env)
    shapes = [space.shape for space in (log.observation_space, env.observation_space)]
    if named is None and None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(
            f"--log must be of {wanted}, whose observations have shape {shapes[1]}, but those of "
            f"{path} have {shapes[0]}: give that task's log, or --references LEAST,GREATEST"
        )
    if named is None:
        typer.echo(
            f"warning: {path} does not say of which environment it is; its returns are taken for "
            f"those of {wanted}",
            err=True,
        )
    elif not same_task(named, wanted):
        raise ValueError(
            f"--log must be of {wanted}, but {path} is of {named}: give that task's log, or its "
            "least and greatest return as --references LEAST,GREATEST"
        )
    return log
