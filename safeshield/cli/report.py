"""``safeshield report``: one page for a safety assessor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Plugins, Source, Verify, check_output


def report(
    source: Source,
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
    verify: Verify = None,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Write one page on what is promised, to whom, on what evidence, and what is not."""
    check_output(out, (".html", ".htm"), "--out")
    from safeshield.cli.kinds import file_kind
    from safeshield.cli.sources import shield_of
    from safeshield.files.tensors import AGENT
    from safeshield.reporting import write_report
    from safeshield.shield.shield import HasShield

    agent: object = None
    if file_kind(source) == AGENT:
        from safeshield.algorithms.registry import load_agent

        agent = load_agent(source)
    # `shield_of` raises the error of an agent that learns no shield.
    given = agent if isinstance(agent, HasShield) else shield_of(source)
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
