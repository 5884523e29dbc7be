"""Loaders of the environments, shields, policies and logs that command arguments name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env


def make_env(env_id: str, *, frames: bool = False) -> Env:
    """Return the environment of `env_id`, an id or ``module:id``.

    The module of ``module:id`` is imported first. Ids of the supported suites are registered on
    first use. With `frames` the environment is made with ``render_mode="rgb_array"``.
    """
    import gymnasium as gym

    import safeshield.envs

    if ":" not in env_id and env_id not in gym.registry:
        import safeshield.suites  # noqa: F401 - registers the suites

    try:
        env: Env = gym.make(env_id, render_mode="rgb_array") if frames else gym.make(env_id)
        return env
    except ModuleNotFoundError as error:
        if ":" not in env_id:
            raise
        raise ValueError(
            f"{error} Give the module's file as --plugin FILE if it is not installed"
        ) from error
    except gym.error.NameNotFound as error:
        if ":" in env_id:
            raise
        raise ValueError(
            f"{error} If it is registered by a module of yours, write module:{env_id}"
        ) from error
    except TypeError as error:
        if not frames or "render_mode" not in str(error):
            raise
        raise ValueError(
            f"{env_id} takes no render_mode, so there are no frames: give its class an argument "
            'render_mode and a render() that returns pictures for "rgb_array"'
        ) from error


def env_for(env_id: str, shield: Shield, *, frames: bool = False) -> Env:
    """Return the environment of `env_id`, which reports h by the shield's constraint if by nothing.

    An environment that reports neither a constraint nor a cost is wrapped in
    `ConstraintFromFunction` with the constraint that the shield names, if its function is
    registered. The import of the module in ``module:id`` may register it. One step is taken to see
    what the environment reports. `frames` is that of `make_env`.
    """
    from safeshield.rollouts.infos import CONSTRAINT, COST
    from safeshield.wrappers import ConstraintFromFunction

    env = make_env(env_id, frames=frames)
    source = shield.model.constraint
    if source is None or not source.available:
        return env
    _, reported = env.reset(seed=0)
    if CONSTRAINT not in reported:
        *_, reported = env.step(env.action_space.sample())
    if CONSTRAINT in reported or COST in reported:
        return env
    names = list(source.names)
    return ConstraintFromFunction(env, names if len(names) > 1 else names[0])


def shield_of(path: Path) -> Shield:
    """Return the shield in the file `path`, or the shield of the agent in that file.

    Raises:
        ValueError: The file holds neither, or the agent's algorithm learns no shield.
    """
    from safeshield.cli.kinds import file_kind, with_article
    from safeshield.files.tensors import AGENT, SHIELD

    if str(path).startswith("builtin:"):
        from safeshield.shield.shield import as_shield

        return as_shield(str(path))
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
            f"{path} is an agent of {type(agent).__name__}, which learns no shield; train one with "
            "--algorithm shield. `safeshield evaluate` takes an agent without a shield with "
            "--cost-limit and --log, or as --policy of another agent's shield"
        )
    raise ValueError(f"{path} must be an agent or a shield, but is {with_article(kind)}")


def check_memory(out: Path, shield: Shield, source: Path) -> None:
    """Check that no attempt and no statement is forgotten where a shield is written to `out`.

    Args:
        out: Path of the file to be written.
        shield: The shield that is read from `source`.
        source: Path of its file, for the message.

    Raises:
        ValueError: A shield in `out` remembers more than `shield`.
    """
    from safeshield.cli.kinds import file_kind
    from safeshield.files.tensors import SHIELD

    if not out.is_file() or file_kind(out) != SHIELD:
        return
    there = shield_of(out)
    kept = [*there.attempts, *there.ledger.attempts, *there.log_records]
    own = [*shield.attempts, *shield.ledger.attempts, *shield.log_records]
    lacking = sum(kept.count(one) > own.count(one) for one in kept)
    if lacking:
        raise ValueError(
            f"OUT must hold nothing that would be forgotten, but {out} remembers {lacking} "
            f"{'attempt or statement' if lacking == 1 else 'attempts and statements'} that "
            f"{source} lacks: give {out} as SOURCE, or another OUT"
        )


def policy_of(
    name: str, env: Env | None, shield: Shield | None, trust: bool, *, option: str = "--policy"
) -> object:
    """Return the policy that a name or a file stands for, in a form that `as_batch_policy` takes.

    Args:
        name: "random", "helmsmen" (boat only), "adversary" (with a shield), the path of an
            agent's .safetensors file, of a Stable-Baselines3 model (.zip), or of what
            ``safeshield falsify`` found (.json, with a shield), or ``module:name``, the name of a
            policy in a Python module.
        env: Environment in which the policy will act; None where only agents' files are asked
            for.
        shield: Shield whose critics the adversary uses, and that an agent of ``safeshield falsify``
            asks. None where neither can be named.
        trust: Whether a .zip file may be read, which can run code from it.
        option: Name of the option, or of the file's entry, for error messages.

    Raises:
        ValueError: The name is none of these, or does not suit the environment.
    """
    if name == "random":
        return name
    if name == "adversary" and shield is not None:
        from safeshield.calibration.proposers import Adversary

        return Adversary(shield)
    if name == "helmsmen":
        from safeshield.demo.helmsmen import Helmsmen
        from safeshield.envs.boat import BoatEnv

        if env is None or not isinstance(env.unwrapped, BoatEnv):
            raise ValueError(
                f"{option} helmsmen needs the environment safeshield/Boat-v0, got {env}"
            )
        return Helmsmen()
    path = Path(name)
    if path.suffix == ".safetensors":
        from safeshield.algorithms.registry import load_agent

        return load_agent(path)
    if path.suffix == ".zip":
        from safeshield.cli.kinds import load_sb3

        return load_sb3(path, trust=trust)
    if path.suffix == ".json" and shield is not None:
        from safeshield.evaluation.falsification import load_probe

        return load_probe(path, shield)
    if ":" in name:
        return _imported(name, option)
    known = ["random", "helmsmen", *(["adversary"] if shield is not None else [])]
    raise ValueError(f"{option} must be one of {known}, an agent's .safetensors or .zip file, or "
                     f"module:name, got '{name}'")  # fmt: skip


def _imported(name: str, option: str) -> object:
    """Return the policy that ``module:name`` stands for, or an object of the class it stands for.

    Raises:
        ValueError: The module cannot be found or does not have the name.
    """
    module_name, _, attribute = name.partition(":")
    how = "write module:name, and give the module's file as --plugin FILE if it is not installed"
    if not (attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"{option} {name}: '{module_name}' is no module; {how}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            raise ValueError(f"{option} {name}: {error}; {how}") from error
        raise ValueError(
            f"{option} {name}: the module {module_name} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    found: object = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"{option} {name}: {module.__file__} has no '{attribute}'; {how}")
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        raise ValueError(
            f"{option} {name}: {attribute}() fails with {type(error).__name__}: {error}; make the "
            "object in the module, and name it in place of its class"
        ) from error


def name_of(name: str, policy: object) -> str:
    """Return the name by which a record lists a policy: its file name, algorithm and seed.

    Args:
        name: Name or path that the user gave.
        policy: The policy that `policy_of` returned for it. Algorithm and seed are added only for
            the file of an `OfflineAgent`.
    """
    from safeshield.training.agent import OfflineAgent

    if isinstance(policy, OfflineAgent) and not _is_in_module(name):
        return f"{type(policy).__name__}, seed {policy.config.seed} ({Path(name).name})"
    return short_name_of(name, policy)


def short_name_of(name: str, policy: object) -> str:
    """Return the name of a policy's file, or the one that Python gives to a policy.

    Python gives it to a policy of a module, and to an agent that ``safeshield falsify`` found. So
    the same policy has one name, whether Python or the command line calibrates with it. The
    arguments are those of `name_of`.
    """
    from safeshield.rollouts.policies import default_name

    named = _is_in_module(name) or Path(name).suffix == ".json"
    return default_name(policy) if named else Path(name).name


def _is_in_module(name: str) -> bool:
    return ":" in name and Path(name).suffix not in (".safetensors", ".zip", ".json", ".onnx")


def log_of(
    path: str,
    env: Env,
    *,
    option: str = "--log",
    otherwise: str = "its least and greatest return as --references LEAST,GREATEST",
) -> OfflineDataset:
    """Return the log in a file, after a check that it is of this environment.

    Returns are normalised by the least and the greatest return of the log, so the log of another
    environment would give false scores. Where the log does not name its environment, only the
    shapes of observations are compared, and a warning is printed.

    Args:
        path: File of the log.
        env: Environment that is evaluated.
        option: Name of the option, or of the file's entry, for error messages.
        otherwise: What the user may give in place of the log, for error messages.

    Raises:
        ValueError: The log is of another environment.
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
            f"{option} must be of {wanted}, whose observations have shape {shapes[1]}, but those "
            f"of {path} have {shapes[0]}: give that task's log, or {otherwise}"
        )
    if named is None:
        typer.echo(
            f"warning: {path} does not say of which environment it is; its returns are taken for "
            f"those of {wanted}",
            err=True,
        )
    elif not same_task(named, wanted):
        raise ValueError(
            f"{option} must be of {wanted}, but {path} is of {named}: give that task's log, or "
            f"{otherwise}"
        )
    return log
