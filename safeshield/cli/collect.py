"""``safeshield collect``: log the episodes of a policy, or of learners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeshield.cli.app import (
    Debug,
    EnvId,
    Out,
    Plugins,
    Seed,
    Trust,
    check_output,
    stop,
    this_command,
)
from safeshield.cli.settings import fields_help, parse, settings_of
from safeshield.cli.sources import make_env, policy_of, short_name_of

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset


def learner_settings() -> str:
    """Return the help of every setting of a learner."""
    from safeshield.collection import LearnerConfig

    head = "Settings of a learner (with --limits): --set NAME=VALUE.\n"
    return "\n".join([head, *fields_help(LearnerConfig), ""])


def collect(
    env_id: EnvId,
    out: Out,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that acts: random (the default), helmsmen (boat only), an agent's "
            ".safetensors or .zip file, or module:name (a policy in Python)."
        ),
    ] = None,
    episodes: Annotated[
        int, typer.Option(help="Number of whole episodes; with --limits: of those kept.", min=1)
    ] = 500,
    seed: Seed = 0,
    step_limit: Annotated[
        int,
        typer.Option(
            help="Greatest length of an episode in steps. Where one is longer, as in an "
            "environment without ends, nothing is written.",
            min=1,
        ),
    ] = 100_000,
    limits: Annotated[
        str | None,
        typer.Option(
            help="Log PPO while it learns, in place of a policy: one learner for each of these "
            "limits on an episode's cost, such as none,25,5,0."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of each learner, rounded up to whole rollouts; default 200000.", min=1
        ),
    ] = None,
    cap: Annotated[
        int | None,
        typer.Option(help="Most episodes to keep in a cell of the cost-return grid.", min=1),
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option(help="Number of cells along each side of that grid; default 30.", min=1),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder from which learners resume; default OUT.parts. You may delete it."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A learner's setting, name=value; all are listed below. Repeatable."
        ),
    ] = None,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Log whole episodes of an environment to an HDF5 or NPZ file.

    The episodes are those of a policy. With --limits they are those of learners: PPO agents that
    train from random networks, each under one limit on the cost of an episode. All episodes from
    the first training step to the last are recorded. The log keeps some of them, chosen on a grid
    of cost and return so that rare kinds of episodes are kept. If such a run is stopped, the same
    command resumes it.
    """
    from safeshield.files.tensors import LOG_SUFFIXES

    check_output(out, LOG_SUFFIXES)
    given = {"--steps": steps, "--cap": cap, "--bins": bins, "--parts": parts, "--set": settings}
    needless = [name for name, value in given.items() if value is not None]
    if limits is None and needless:
        raise ValueError(f"{', '.join(needless)} apply to learners only: add --limits none,25,5,0")
    if limits is not None and (policy is not None or trust):
        raise ValueError("--limits logs learners, --policy and --trust log a policy: leave one out")
    env = make_env(env_id)
    if limits is not None:
        from safeshield.collection import (
            STEPS,
            LearnerConfig,
            Thinning,
            collect_while_learning,
            config_for,
        )

        folder = out.with_name(f"{out.name}.parts") if parts is None else parts
        config = settings_of(LearnerConfig, settings or [], **vars(config_for(env)))
        steps = STEPS if steps is None else steps
        try:
            log = collect_while_learning(
                env,
                folder,
                limits=parse("--limits", limits, tuple[float | None, ...]),
                steps=steps,
                seed=seed,
                thinning=Thinning(episodes, cap, 30 if bins is None else bins, seed),
                config=config,
                progress_bar=True,
            )
        except KeyboardInterrupt as error:
            stop(error, f"the same command resumes from {folder}: {this_command()}")
        for note in _other_than_asked(
            log, steps=config.updates(steps) * config.rollout, episodes=episodes, cap=cap
        ):
            typer.echo(note, err=True)
    else:
        from safeshield.data.collect import collect as collect_log

        name = policy or "random"
        acting = policy_of(name, env, None, trust)
        log = collect_log(
            env, acting, episodes, seed,
            policy_name=short_name_of(name, acting), step_limit=step_limit,
        )  # fmt: skip
    log.save(out)
    typer.echo(f"{out}: {log}, {int(log.violating_episodes.sum())} episodes violate")


def _other_than_asked(
    log: OfflineDataset, *, steps: int, episodes: int, cap: int | None
) -> Iterator[str]:
    """Yield a note where the log has more or fewer episodes or steps than were asked for."""
    learners = (log.provenance or {}).get("learners", [])
    done = max(one["steps"] for one in learners)
    if done > steps:
        yield (
            f"note: learners had done up to {done} steps before, and the log is of all of them, "
            f"not of {steps}; for fewer steps, start in another folder (--parts)"
        )
    if log.num_episodes < episodes:
        ended = sum(one["episodes"] for one in learners)
        why = f"the learners finished {ended}; raise --steps"
        if log.num_episodes < ended:
            why += f", or --cap, which keeps at most {cap} in each cell of the grid"
        yield f"note: {log.num_episodes} episodes, fewer than --episodes {episodes}: {why}"
