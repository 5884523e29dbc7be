"""``safeshield calibrate-from-log``: what held-out episodes of a log show of a shield."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeshield.cli.app import Debug, Out, Plugins, Source, Trust, check_output
from safeshield.cli.plan import StepSeconds, steps_of
from safeshield.cli.sources import check_memory, env_for, name_of, policy_of, shield_of

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.shield.log_record import LogRecord
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env

_ROWS = 9


class Method(StrEnum):
    """The methods of `Shield.calibrate_from_log`."""

    detection = "detection"
    shadow = "shadow"
    spliced = "spliced"
    trial = "trial"
    residuals = "residuals"


def calibrate_from_log(
    source: Source,
    log: Annotated[
        Path,
        typer.Argument(
            help="Held-out log, HDF5 or NPZ, or folder of a ShieldLog. `safeshield split` makes a "
            "held-out log before the training."
        ),
    ],
    out: Out,
    method: Annotated[
        Method,
        typer.Option(
            help="detection: whether violations of the log's policies raise an alarm in time; "
            "chooses delta. shadow: the rate of agent and shield together, from episodes WITHOUT "
            "the shield. spliced: the same episodes, continued in a simulator. trial: the rate, "
            "from episodes WITH the shield. residuals: how far values rise beyond Q_h."
        ),
    ] = Method.detection,
    confidence: Annotated[
        float, typer.Option(help="Confidence over the held-out episodes.")
    ] = 0.95,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of episodes for which the threshold may fail (detection, residuals); "
            "default: 0.1."
        ),
    ] = None,
    lead: Annotated[
        str | None,
        typer.Option(
            help="How long before the entry the alarm must come (detection): steps, such as 5, or "
            "seconds, such as 0.5s with --step-seconds; default: 1."
        ),
    ] = None,
    step_seconds: StepSeconds = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Rate that must be shown (shadow, spliced, trial); default: any bound is stated."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="The agent that made the log (shadow, spliced, trial): its name, or its "
            ".safetensors or .zip file or module:name, with which its deterministic actions are "
            "compared."
        ),
    ] = None,
    policy_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the agent in the statement, where --policy names a file or module:name. "
            "It must be the one in the log. Default: as in calibrate."
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--stochastic", help="How the agent acted while the log was made."
        ),
    ] = None,
    horizon: Annotated[
        int | None,
        typer.Option(help="Steps of a whole episode; default: those of the longest.", min=1),
    ] = None,
    simulator: Annotated[
        str | None,
        typer.Option(
            metavar="ENV_ID",
            help="Environment that continues the episodes (spliced). Its reset must take the "
            "observation as options={'state': ...}; for another one write a script.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the continuations (spliced); default: 0.", min=0)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="File for the curve of missed violations against false alarms (detection), .png, "
            ".svg or .pdf."
        ),
    ] = None,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Say what held-out episodes of a log show of a shield, without a simulator.

    The shield is written to OUT with the statement, and with the memory of all attempts. An OUT
    that remembers more than SOURCE is refused, because its memory would be lost. Where the
    log does not show what was asked for, OUT is written with the attempt alone, and the exit status
    is 1. `safeshield plan` says how many episodes each method needs.
    """
    check_output(out, (".safetensors",))
    if picture is not None:
        if method is not Method.detection:
            raise ValueError(f"--picture goes with --method detection, got {method}: leave it out")
        check_output(picture, (".png", ".svg", ".pdf"), "--picture")
    if simulator is not None and method is not Method.spliced:
        raise ValueError(f"--simulator goes with --method spliced, got {method}: leave it out")
    if simulator is None and method is Method.spliced:
        raise ValueError("--method spliced needs --simulator ENV_ID, which continues the episodes")
    if lead is None and step_seconds is not None:
        raise ValueError("--step-seconds goes with a --lead in seconds, such as --lead 0.5s")
    from safeshield.calibration.walk import CalibrationError

    shield = shield_of(source)
    check_memory(out, shield, source)
    held_out = _held_out(log, shield)
    env = None if simulator is None else env_for(simulator, shield)
    agent, name = _agent(policy, env, trust)
    options: dict[str, Any] = {
        "alpha": alpha,
        "lead": None if lead is None else steps_of(lead, step_seconds),
        "epsilon": epsilon,
        "policy": agent,
        "policy_name": policy_name or name,
        "deterministic": deterministic,
        "horizon": horizon,
        "simulator": env,
        "seed": seed,
    }
    try:
        found = shield.calibrate_from_log(held_out, str(method), confidence=confidence, **options)
    except CalibrationError as error:
        if debug:
            raise
        shield.save(out)
        typer.echo(f"not shown: {error}", err=True)
        typer.echo(f"{out}: the shield, unchanged, with the memory of this attempt", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        if policy_name is None and name is not None and "log was collected by" in str(error):
            raise ValueError(
                f"{error}, or give the name that the log has as --policy-name"
            ) from error
        raise
    record = found.log_records[-1]
    if picture is not None:
        record.picture(str(picture))
    found.save(out)
    typer.echo(f"{out}: delta {found.delta:.6g}, {method} from {record.held_out} episodes")
    typer.echo(record.statement)
    _show_curve(record)
    if record.threshold is not None and record.curve and record.threshold > -found.delta:
        typer.echo(
            f"note: the chosen alarm at {record.threshold:.4g} is above 0, and the shield acts at "
            f"delta {found.delta:.4g}, which is stricter, because delta is never negative"
        )


def _held_out(path: Path, shield: Shield) -> OfflineDataset:
    if path.is_dir():
        from safeshield.monitoring import FlightLog

        return FlightLog.load(path).to_dataset()
    from safeshield.data.dataset import OfflineDataset

    return OfflineDataset.load(path, action_space=shield.action_space)


def _agent(policy: str | None, env: Env | None, trust: bool) -> tuple[object, str | None]:
    """Return the agent, or its name, and the name of an agent that was loaded."""
    if policy is None or not (":" in policy or Path(policy).suffix in (".safetensors", ".zip")):
        return policy, None
    loaded = policy_of(policy, env, None, trust)
    return loaded, name_of(policy, loaded)


def _show_curve(record: LogRecord) -> None:
    if not record.curve:
        return
    clean = record.held_out - record.violating
    typer.echo(
        f"alarm where Q_h is at least; missed, of {record.episodes} violating episodes; false "
        f"alarms, of {clean} others"
    )
    last = len(record.curve) - 1
    places = {round(i * last / (_ROWS - 1)) for i in range(_ROWS)}
    places |= {i for i, one in enumerate(record.curve) if one.threshold == record.threshold}
    for i in sorted(places):
        one = record.curve[i]
        mark = "  <- chosen" if one.threshold == record.threshold else ""
        typer.echo(f"{one.threshold:12.4g}{one.missed:8}{one.false_alarms:8}{mark}")
