"""``safeshield sweep``: train over settings, seeds and logs on Ray, and compare the results."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Plugins, Trust, check_folder, stop, this_command
from safeshield.cli.settings import fields_help


def file_entries() -> str:
    """Return the help of the entries of a sweep's file."""
    from safeshield.cli.sweep_plan import Plan

    return "\n".join(["Entries of FILE, TOML or YAML:\n", *fields_help(Plan)]) + "\n"


def sweep(
    file: Annotated[
        Path, typer.Argument(help="File of the sweep, .toml or .yaml; see below.", dir_okay=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the results. A sweep that is started again with the same folder "
            "continues: finished trainings are not repeated, others resume.",
            file_okay=False,
        ),
    ],
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster that trains: local (started here), auto (the one of this machine or "
            "of RAY_ADDRESS) or host:port.",
        ),
    ] = "local",
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Train over settings, seeds and logs on Ray, evaluate the agents, and compare them.

    Exits with status 1 where a training failed.
    """
    from safeshield.cli import sweep_report as report
    from safeshield.cli.sweep_plan import log_contents, read_plan
    from safeshield.cli.sweep_runs import Outcome, Places, check_evaluation
    from safeshield.cli.sweep_runs import sweep as outcomes_of
    from safeshield.files.lock import locked

    plan = read_plan(file)
    folder = out.resolve()
    plugin_files = tuple(one.resolve() for one in plugins or [])
    places = Places(file.resolve(), log_contents(file, plan), plugin_files, trust)
    check_evaluation(plan, places)
    check_folder(folder, "results.csv")
    total = len(plan.logs) * len(plan.seeds) * (plan.trials or sum(1 for _ in plan.grid()))
    results: dict[Path, Outcome] = {}
    try:
        running = outcomes_of(plan, places, folder, ray, typer.echo)
        with locked(folder), contextlib.closing(running) as ended:
            for one in ended:
                results[one.job.folder] = one
                # A sweep that is stopped leaves the table of what has finished.
                report.write_csv(folder / "results.csv", plan, list(results.values()))
                told = f"failed: {one.error}" if one.error else report.describe(plan, one.figures)
                typer.echo(f"{len(results)} of {total}: {one.job}: {told}")
    except KeyboardInterrupt as error:
        stop(error, f"the same command continues the sweep: {this_command()}")
    outcomes = list(results.values())
    failed = [one for one in outcomes if one.error]
    if len(failed) < len(outcomes):
        typer.echo(f"\n{report.format_outcomes(plan, outcomes)}")
        report.draw(folder / "results.png", plan, outcomes)
    typer.echo(f"\n{folder / 'results.csv'}: {len(outcomes)} trainings, {len(failed)} failed")
    for one in failed:
        typer.echo(f"failed: {one.job}: {one.error} (see {one.job.folder / 'error.txt'})", err=True)
    if failed:
        raise typer.Exit(1)
