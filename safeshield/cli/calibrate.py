"""``safeshield calibrate``: choose and test the threshold of a shield."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, EnvId, Out, Plugins, Seed, Trust, check_output
from safeshield.cli.settings import parse
from safeshield.cli.sources import make_env, name_of, policy_of, shield_of


def calibrate(
    source: Annotated[Path, typer.Argument(help="File of an agent or a shield, .safetensors.")],
    env_id: EnvId,
    out: Out,
    epsilon: Annotated[
        float, typer.Option(help="Violation rate per episode that the promise states.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Confidence of the promise.")] = 0.99,
    episodes: Annotated[
        int | None,
        typer.Option(help="Episodes of each test; default: enough to pass with one violation."),
    ] = None,
    deltas: Annotated[
        str | None,
        typer.Option(
            help="Deltas to test, decreasing, such as 0.3,0.1,0; default: chosen automatically."
        ),
    ] = None,
    seed: Seed = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that proposes actions: random, or an agent's .safetensors or .zip file. "
            "Default: random proposals and an adversary."
        ),
    ] = None,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Choose the threshold of a shield by testing it in episodes with the shield switched on."""
    check_output(out, (".safetensors",))
    if policy == "adversary":
        raise ValueError("--policy adversary: leave out --policy; the adversary is then included")
    env = make_env(env_id)
    proposing = None if policy is None else policy_of(policy, env, None, trust)
    shield = shield_of(source).calibrate(
        env,
        epsilon=epsilon,
        confidence=confidence,
        policy=proposing,
        policy_name=None if policy is None else name_of(policy, proposing),
        deltas=None if deltas is None else parse("--deltas", deltas, tuple[float, ...]),
        episodes=episodes,
        seed=seed,
    )
    shield.save(out)
    typer.echo(f"{out}: delta {shield.delta:.6g}")
    if shield.record is not None:
        typer.echo(shield.record.promise)
