"""``safeshield diagnose``: find the cause of every violation behind a shield."""

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
from safeshield.cli.sources import env_for, log_of, policy_of, shield_of, short_name_of


def diagnose(
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
    episodes: Episodes = 100,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Log from which the shield was trained. Its transitions are compared with the "
            "played ones, which shows changed dynamics.",
            dir_okay=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the worst episode to write, .png, .svg or .pdf.", dir_okay=False
        ),
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Run shielded episodes, and say why they violate and what to do."""
    if picture is not None:
        check_output(picture, (".png", ".svg", ".pdf"), "--picture")
    shield = shield_of(source)
    env = env_for(env_id, shield)
    acting = policy_of(policy, env, shield, trust)
    found = shield.diagnose(
        env,
        acting,
        episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        policy_name=short_name_of(policy, acting),
        log=None if log is None else log_of(str(log), env),
    )
    if picture is not None:
        found.picture(picture)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    typer.echo(found.summary())
    if picture is not None:
        typer.echo(f"{picture}: the worst episode, number {found.worst_episode}")
