"""``safeshield falsify``: search for an agent that breaks a shield's promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import AsJson, Debug, EnvId, Plugins, Seed, Source, check_output
from safeshield.cli.sources import env_for, shield_of


def falsify(
    source: Source,
    env_id: EnvId,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="File to write the worst agent to, .json. evaluate, diagnose and calibrate take "
            "it as --policy.",
            dir_okay=False,
        ),
    ] = Path("worst.json"),
    minutes: Annotated[
        float, typer.Option(help="Budget of the search, minutes; the verification comes on top.")
    ] = 10.0,
    rollouts: Annotated[
        int | None,
        typer.Option(
            help="Budget of the search in episodes, in place of minutes: the result then depends "
            "on the seed alone."
        ),
    ] = None,
    episodes: Annotated[
        int, typer.Option(help="Fresh episodes that verify the worst agent.", min=1)
    ] = 2000,
    confidence: Annotated[
        float, typer.Option(help="Confidence of each bound of the worst agent's rate.")
    ] = 0.99,
    cma: Annotated[
        bool,
        typer.Option(
            "--cma/--no-cma", help="Whether CMA-ES searches from the best agents of the battery."
        ),
    ] = True,
    seed: Seed = 0,
    as_json: AsJson = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Search for an agent that violates behind a shield, and test it on fresh seeds.

    It is no proof. The exit status is 1 where the worst agent's rate is above the promised one at
    the confidence.
    """
    check_output(out, (".json",), "--out")
    from safeshield.evaluation.falsification import falsify as search

    shield = shield_of(source)
    found = search(
        shield,
        env_for(env_id, shield),
        minutes=None if rollouts is not None else minutes,
        rollouts=rollouts,
        episodes=episodes,
        confidence=confidence,
        cma=cma,
        seed=seed,
        progress_bar=True,
    )
    found.save(out)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        typer.echo(found.statement())
        typer.echo(
            f"{out}: the worst agent, after {found.minutes:.1f} minutes "
            f"({found.cpu_minutes:.1f} of processor time)"
        )
    if found.breaks:
        raise typer.Exit(1)
