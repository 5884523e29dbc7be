"""``safeshield report``: one page for a safety assessor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Plugins, check_output


def report(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="File of a shield or an agent, .safetensors."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write, .html.", dir_okay=False)],
    log: Annotated[
        list[Path] | None,
        typer.Option(
            help="Log to describe and to compare with the support test, such as the one that "
            "trained the shield. Repeatable.",
            dir_okay=False,
        ),
    ] = None,
    monitor: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of a PromiseMonitor of this shield. Repeatable: those of a fleet are "
            "merged.",
            dir_okay=False,
        ),
    ] = None,
    flight: Annotated[
        Path | None,
        typer.Option(help="Folder of a ShieldLog behind this shield.", file_okay=False),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of a public key: refuse a file that is not signed with its private key."
        ),
    ] = None,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Write one page on what is promised, to whom, on what evidence, and what is not."""
    check_output(out, (".html", ".htm"), "--out")
    from safeshield.cli.kinds import file_kind
    from safeshield.cli.sources import shield_of
    from safeshield.files.tensors import AGENT
    from safeshield.reporting import write_report
    from safeshield.shield.record import ActorRecord
    from safeshield.shield.shield import HasShield, Shield

    given: Shield | HasShield = shield_of(source)
    if file_kind(source) == AGENT:
        from safeshield.algorithms.registry import load_agent

        agent = load_agent(source)
        if isinstance(agent, HasShield) and isinstance(getattr(agent, "record", None), ActorRecord):
            given = agent
    write_report(
        out,
        given,
        logs=log or (),
        monitors=monitor or (),
        flight=flight,
        file=source,
        verify=verify,
    )
    typer.echo(f"{out}: report on {source}")
