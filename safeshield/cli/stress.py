"""``safeshield stress``: play a shield under faults of sensors and actuators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import (
    AsJson,
    Debug,
    Deterministic,
    EnvId,
    Episodes,
    Plugins,
    Seed,
    Source,
    Trust,
    check_output,
)
from safeshield.cli.sources import env_for, policy_of, shield_of, short_name_of


def stress(
    source: Source,
    env_id: EnvId,
    policy: Annotated[
        str,
        typer.Option(
            help="Policy that proposes actions: random, adversary, helmsmen, an agent's "
            ".safetensors or .zip file, module:name (a policy in Python), or the .json file of "
            "falsify."
        ),
    ] = "random",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of fault to play, such as 'noise' or 'late action'. Repeatable; by default "
            "all that fit the environment.",
        ),
    ] = None,
    episodes: Episodes = 100,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Picture to write, .png, .svg or .pdf.", dir_okay=False),
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Play a matrix of faults, with the shield and without it, from certified starts."""
    if picture is not None:
        check_output(picture, (".png", ".svg", ".pdf"), "--picture")
    from safeshield.evaluation import UnshieldedAdversary
    from safeshield.evaluation.under_faults import stress as play

    shield = shield_of(source)
    env = env_for(env_id, shield)
    acting = policy_of(policy, env, shield, trust)
    found = play(
        shield,
        env,
        acting,
        alone=UnshieldedAdversary(shield) if policy == "adversary" else None,
        kinds=fault,
        episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        policy_name=short_name_of(policy, acting),
        progress_bar=not as_json,
    )
    if picture is not None:
        found.picture(picture)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    typer.echo(found.table())
    for name, why in found.left_out.items():
        typer.echo(f"left out: {name}: {why}")
