"""``safeshield demo``: run every stage from collecting a log to testing a shield."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Seed, check_folder


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the log, shield, table and pictures.")
    ] = Path("safeshield-demo"),
    seed: Seed = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Run every stage for too short a time to learn anything."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Collect a log, learn and calibrate a shield, and test four agents with and without it."""
    from safeshield.demo.run import hardware, run_demo
    from safeshield.demo.settings import DemoConfig
    from safeshield.files.schema import versions

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    check_folder(out, "boat.hdf5")
    typer.echo(f"seed {seed}; {hardware()}")
    typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
    config = DemoConfig.quick(seed) if quick else DemoConfig(seed=seed)
    result = run_demo(out, config, say=typer.echo)
    typer.echo(f"\n{result.table}\n\n{result.promise}\n")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    typer.echo(f"{times}; {sum(result.seconds.values()):.0f} s in all")
    typer.echo(f"Log, shield, table and pictures are in {result.folder}")
