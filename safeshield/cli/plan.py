"""``safeshield plan``: how many episodes each kind of promise needs, before any are collected."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from safeshield.cli.app import AsJson, Debug

StepSeconds = Annotated[
    float | None, typer.Option(help="Duration of a step, for a --lead in seconds.")
]


def plan(
    epsilon: Annotated[
        float, typer.Option(help="Rate of violating episodes that is to be promised.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Confidence of the promise.")] = 0.99,
    alpha: Annotated[
        float, typer.Option(help="Share of violating episodes that an alarm may miss.")
    ] = 0.1,
    lead: Annotated[
        str,
        typer.Option(
            help="How long before the entry the alarm must come: steps, such as 5, or seconds, "
            "such as 0.5s with --step-seconds."
        ),
    ] = "1",
    step_seconds: StepSeconds = None,
    cost_limit: Annotated[
        float | None, typer.Option(help="Limit of the mean cost of an episode.")
    ] = None,
    cost_bound: Annotated[
        float | None, typer.Option(help="Largest cost that an episode can have.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how many episodes each kind of promise needs, before any are collected."""
    from safeshield.calibration.needs import episodes_plan

    steps = steps_of(lead, step_seconds)
    needs = episodes_plan(
        epsilon, confidence, alpha=alpha, lead=steps, limit=cost_limit, bound=cost_bound
    )
    if as_json:
        typer.echo(json.dumps([need.to_json() for need in needs], indent=2))
        return
    typer.echo(
        f"confidence {confidence:g}; epsilon {epsilon:g}; for detection and residuals alpha "
        f"{alpha:g}, lead {steps} steps"
    )
    for need in needs:
        looks = ", ".join(f"{episodes} ({most})" for episodes, most in need.looks)
        typer.echo(f"\n{need.kind}: at least {need.least} {need.counted}")
        typer.echo(f"  counts against it  {need.against}")
        typer.echo(f"  episodes (of these may count against it)  {looks}")
        if need.note:
            typer.echo(f"  {need.note}")


def steps_of(lead: str, step_seconds: float | None) -> int:
    """Return a lead in steps, from steps or from seconds.

    Raises:
        ValueError: It is neither, or the duration of a step is missing or not above 0.
    """
    text = lead.strip()
    seconds = text.endswith("s")
    try:
        number = float(text[:-1] if seconds else text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0 and (seconds or number % 1 == 0)):
        raise ValueError(
            f"--lead must be a whole number of steps, such as 5, or seconds, such as 0.5s, got "
            f"{lead!r:.40}"
        )
    if not seconds:
        if step_seconds is not None:
            raise ValueError(
                f"--step-seconds goes with a --lead in seconds, got --lead {lead}: leave it out, "
                f"or write --lead {lead}s"
            )
        return int(number)
    if step_seconds is None or not 0.0 < step_seconds < math.inf:
        raise ValueError(
            f"--lead {lead} needs --step-seconds, the duration of a step, above 0, got "
            f"{step_seconds}"
        )
    # A part of a step counts as a whole one, but not a part that rounding has left.
    return max(math.ceil(round(number / step_seconds, 9)), 1)
