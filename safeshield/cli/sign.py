"""``safeshield sign``: sign a file of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Plugins, check_output


def sign(
    file: Annotated[Path, typer.Argument(help="File of an agent, shield or checkpoint.")],
    key: Annotated[
        Path,
        typer.Option(
            help="PEM file of a private Ed25519 key, such as "
            "`openssl genpkey -algorithm ed25519 -out key.pem` writes."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: FILE itself.", dir_okay=False)
    ] = None,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Sign a file, after a check that its records follow from their counts."""
    from safeshield.cli.kinds import GRAPH, LOG, describe, file_kind, with_article
    from safeshield.files.tensors import read_tensors, sign_file

    kind = file_kind(file)
    if kind in (LOG, GRAPH):
        raise ValueError(f"FILE must be an agent, a shield or a checkpoint, got a {kind}: {file}")
    target = file if out is None else out
    check_output(target, None, "--out")
    promise = describe(file).get("promise")
    sign_file(file, key, out)
    typer.echo(f"signed: {with_article(kind)}, SHA-256 {read_tensors(target).digest}, {target}")
    if promise is not None:
        typer.echo(f"promise: {promise}")
