"""``safeshield doctor``: report which optional parts are installed and work."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from safeshield.cli.app import AsJson, Debug


def doctor(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="core, navigation, velocity, bullet, dsrl, metadrive; default: all."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Report what is installed and works, and which commands install what is missing.

    The exit status is 1 where an installed part does not work, or a named part is not installed.
    """
    from safeshield.suites.doctor import Part, examine, healthy, report

    unknown = [part for part in parts or [] if part not in list(Part)]
    if unknown:
        raise ValueError(f"PARTS must be among {', '.join(Part)}, got {', '.join(unknown)}")
    asked = [Part(part) for part in parts or []]
    findings = examine(asked)
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in findings], indent=2))
    else:
        typer.echo(report(findings))
    if not healthy(findings, asked):
        raise typer.Exit(1)
