"""``safeshield train``: train an agent or a shield from a log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Device, Out, Plugins, check_output, stop, this_command
from safeshield.cli.settings import (
    preset_settings,
    read_settings,
    settings_help,
    settings_of,
    write_settings,
)


def all_settings() -> str:
    """Return the help of every setting of every algorithm."""
    from safeshield.algorithms.registry import ALGORITHMS

    return settings_help(ALGORITHMS.values())


def train(
    log: Annotated[Path, typer.Argument(help="Log file, HDF5 or NPZ.", dir_okay=False)],
    out: Out,
    algorithm: Annotated[
        str, typer.Option(help="Algorithm; all are listed below with their settings.")
    ] = "safefql",
    steps: Annotated[int, typer.Option(help="Total number of updates.", min=3)] = 100_000,
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random numbers; default 0.", min=0)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings to start from: small (default), paper.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="File of settings, .toml or .yaml. They override --preset, and --seed and --set "
            "override them. All settings of a run are written beside OUT, with the ending .toml.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, name=value; lists such as 256,256. Repeatable."),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a ShieldLog whose episodes are joined to the log. Repeatable.",
            file_okay=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File to resume from. It is updated at the end of each phase, every 2,000 updates "
            "and every minute."
        ),
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    device: Annotated[Device, typer.Option(help="Device to train on.")] = Device.auto,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Train an agent, or a shield alone, from a log."""
    check_output(out, (".safetensors",))
    if checkpoint is not None:
        if checkpoint.resolve() == out.resolve():
            raise ValueError(f"--checkpoint must be another file than OUT, got {checkpoint} twice")
        check_output(checkpoint, None, "--checkpoint", claim=False)
    record = out.with_suffix(".toml")
    if config_file is not None and config_file.resolve() == record.resolve():
        raise ValueError(
            f"--config must not be {record}, where the settings of this run are written: copy it "
            "to another name"
        )
    check_output(record, None)
    import torch

    from safeshield.algorithms.registry import offline_algorithm
    from safeshield.data.dataset import OfflineDataset

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    chosen = offline_algorithm(algorithm)
    values = preset_settings("--preset", preset, chosen)
    if config_file is not None:
        values |= read_settings(config_file, chosen.config_type)
    if seed is not None:
        values["seed"] = seed
    config = settings_of(chosen.config_type, settings or [], **values)
    learner = chosen.kind(config, device=device.value)
    dataset = OfflineDataset.load(log)
    if add:
        from safeshield.monitoring import FlightLog

        if len({folder.resolve() for folder in add}) < len(add):
            raise ValueError(f"--add must name each folder once, got {', '.join(map(str, add))}")
        flights = [FlightLog.load(folder) for folder in add]
        logs = [flight.to_dataset(like=dataset) for flight in flights]
        dataset = OfflineDataset.concat([dataset, *logs])
        learner.added = "; ".join(
            f"{folder}, {part.num_episodes} episodes behind shield {flight.shield['digest']} at "
            f"delta {flight.shield['delta']:g}"
            for folder, flight, part in zip(add, flights, logs, strict=True)
        )
    try:
        learner.fit(dataset, steps, progress_bar=True, log_dir=log_dir, checkpoint=checkpoint)
    except KeyboardInterrupt as error:
        stop(error, _kept(checkpoint))
    learner.save(out)
    heading = f"safeshield train {log} --algorithm {algorithm} --steps {steps}"
    write_settings(record, config, " ".join([heading, *(f"--add {one}" for one in add or ())]))
    typer.echo(f"{out}: {algorithm}, {steps} updates, seed {config.seed}")


def _kept(checkpoint: Path | None) -> str:
    """Return in words what an interrupted training has left."""
    if checkpoint is None:
        return "nothing was kept, because --checkpoint was not given"
    if not checkpoint.exists():
        return f"nothing was kept, because the first checkpoint {checkpoint} was not due yet"
    return f"the same command continues from {checkpoint}: {this_command()}"
