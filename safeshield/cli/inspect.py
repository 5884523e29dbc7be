"""``safeshield inspect``: describe a file of the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from safeshield.cli.app import AsJson, Debug, Plugins, Verify, check_output

_IN_SHADOW = {
    "replaced": "would_have_been_replaced",
    "replaced_share": "share_that_would_have_been_replaced",
}
"""Names under which these entries are printed for a flight in shadow mode, in which the shield
replaces no action."""


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="File of an agent, shield, checkpoint, log or graph (.onnx), folder of a "
            "ShieldLog, or builtin:NAME for a ready-made shield."
        ),
    ],
    as_json: AsJson = False,
    cost_limit: Annotated[
        float | None,
        typer.Option(
            help="Limit on a log's episode cost for counting safe episodes. Default: 0, 5 and 10.",
            min=0,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="File for the cost-return scatter of a log, .png, .svg or .pdf."),
    ] = None,
    verify: Verify = None,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Describe a file and its contents. No code in the file is run."""
    from safeshield.cli.kinds import FLIGHT, LOG, describe, file_kind, with_article
    from safeshield.shield.shield import BUILTIN, builtin_file

    if str(file).startswith(BUILTIN):
        file = builtin_file(str(file).removeprefix(BUILTIN))
    kind = file_kind(file)
    if kind == LOG and verify is None:
        _inspect_log(file, as_json, cost_limit, picture)
        return
    if cost_limit is not None or picture is not None:
        raise ValueError(
            f"--cost-limit and --picture are for logs, but {file} is {with_article(kind)}"
        )
    description = describe(file, verify)
    if kind == FLIGHT and description["missing"]:
        typer.echo(f"warning: {file}: {description['missing']}", err=True)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    # The promise and the statements say in words what the records hold.
    for stated in ("record", "log_records", "missing"):
        description.pop(stated, None)
    if kind == FLIGHT and description["mode"] == "shadow":
        description = {_IN_SHADOW.get(name, name): value for name, value in description.items()}
    width = max(map(len, description))
    for name, value in description.items():
        # Statements from logs are long, and each has a line of its own.
        for one in value if name == "from_logs" and isinstance(value, list) else [value]:
            typer.echo(f"{name.replace('_', ' '):<{width}}  {_plain(one)}")


def _inspect_log(file: Path, as_json: bool, cost_limit: float | None, picture: Path | None) -> None:
    if picture is not None:
        check_output(picture, (".png", ".svg", ".pdf"), "--picture")
    from safeshield.cli.kinds import describe_log
    from safeshield.data.card import DEFAULT_LIMITS, card_of
    from safeshield.data.dataset import OfflineDataset

    log = OfflineDataset.load(file)
    limits = DEFAULT_LIMITS if cost_limit is None else (cost_limit,)
    card = card_of(log, file=file, limits=limits)
    if picture is not None:
        from safeshield.data.scatter import draw_scatter

        draw_scatter(picture, log, limit=max(limits), title=card.env_id or file.stem)
    if as_json:
        typer.echo(json.dumps(describe_log(log, card), indent=2))
        return
    typer.echo(card)
    if log.provenance is not None:
        typer.echo(_provenance_text(log.provenance))


def _provenance_text(provenance: Mapping[str, Any]) -> str:
    """Return how a log was made: one line per entry, and one per item of a list of objects."""
    width = max(map(len, provenance), default=0)
    lines = []
    for name, value in provenance.items():
        several = isinstance(value, list) and any(isinstance(one, dict) for one in value)
        for one in value if several else [value]:
            lines.append(f"  {name.replace('_', ' '):<{width}}  {_plain(one)}")
    return "\n".join(["made", *lines])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
