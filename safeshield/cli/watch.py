"""``safeshield watch``: a film of one shielded episode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import (
    Debug,
    Deterministic,
    EnvId,
    Plugins,
    Seed,
    Source,
    Trust,
    check_output,
)
from safeshield.cli.sources import env_for, policy_of, shield_of, short_name_of


def watch(
    source: Source,
    env_id: EnvId,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Film to write, .mp4 or .gif.", dir_okay=False)
    ] = Path("episode.gif"),
    policy: Annotated[
        str,
        typer.Option(
            help="Policy that proposes actions: random, adversary, helmsmen, an agent's "
            ".safetensors or .zip file, module:name (a policy in Python), or the .json file of "
            "falsify."
        ),
    ] = "random",
    steps: Annotated[
        int | None,
        typer.Option(help="Steps after which the film ends; default: the whole episode.", min=1),
    ] = None,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second; default: the environment's own.", min=1),
    ] = None,
    height: Annotated[int, typer.Option(help="Height of the film in pixels.", min=32)] = 360,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Play one shielded episode, and write a film of it with the shield's values and actions.

    The episode starts where V_h <= -delta. The environment needs render_mode="rgb_array".
    """
    from safeshield.evaluation.watching import FORMATS, check_format
    from safeshield.evaluation.watching import watch as play

    check_output(out, FORMATS, "--out")
    check_format(out)
    shield = shield_of(source)
    env = env_for(env_id, shield, frames=True)
    acting = policy_of(policy, env, shield, trust)
    film = play(
        shield,
        env,
        acting,
        steps=steps,
        seed=seed,
        deterministic=deterministic,
        height=height,
        policy_name=short_name_of(policy, acting),
    )
    film.save(out, fps=fps)
    typer.echo(film.summary())
    typer.echo(f"{out}: {len(film.frames)} frames")
