"""``safeshield split``: split the episodes of a log, before the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Seed, check_output


def split(
    log: Annotated[Path, typer.Argument(help="Log file, HDF5 or NPZ.", dir_okay=False)],
    train: Annotated[
        Path, typer.Argument(help="File to write, for `safeshield train`.", dir_okay=False)
    ],
    held_out: Annotated[
        Path,
        typer.Argument(help="File to write, for `safeshield calibrate-from-log`.", dir_okay=False),
    ],
    share: Annotated[float, typer.Option(help="Share of the episodes that TRAIN gets.")] = 0.8,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Split the episodes of a log at random, into one log to train on and one to hold out."""
    if len({path.resolve() for path in (log, train, held_out)}) < 3:
        raise ValueError(f"LOG, TRAIN and HELD_OUT must be three files, got {log}, {train} and "
                         f"{held_out}")  # fmt: skip
    from safeshield.files.tensors import LOG_SUFFIXES

    if not 0.0 < share < 1.0:
        raise ValueError(f"--share must lie between 0 and 1, such as 0.8, got {share:g}")
    check_output(train, LOG_SUFFIXES, "TRAIN")
    check_output(held_out, LOG_SUFFIXES, "HELD_OUT")
    from safeshield.data.dataset import OfflineDataset

    for path, part in zip(
        (train, held_out), OfflineDataset.load(log).split(share, seed), strict=True
    ):
        part.save(path)
        typer.echo(f"{path}: {part}, {int(part.violating_episodes.sum())} episodes violate")
