"""``safeshield export``: write a shield, alone or with a policy, as one ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeshield.cli.app import Debug, Plugins, Source, Trust, check_output


def export(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .onnx.", dir_okay=False)],
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Agent's .safetensors, SB3 .zip (MlpPolicy) or .onnx file that proposes actions "
            "inside the graph. Default: the proposed action is an input."
        ),
    ] = None,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Make the policy's noise an input of the graph.")
    ] = False,
    policy_name: Annotated[
        str | None,
        typer.Option(help="Name of the policy in the shield's record. Default: as in calibrate."),
    ] = None,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Write a shield, alone or with a policy, as one ONNX graph, which runs without Python."""
    from safeshield.cli.sources import name_of, shield_of

    check_output(out, (".onnx",), "--out")
    if stochastic and policy is None:
        raise ValueError("--stochastic needs --policy, whose noise it makes an input")
    shield = shield_of(source)
    acting = None if policy is None else _policy(policy, trust)
    if policy is not None and policy_name is None:
        policy_name = name_of(str(policy), acting)
    contents = shield.export_onnx(
        out, acting, deterministic=not stochastic, policy_name=policy_name
    )
    typer.echo(f"{out}: inputs {', '.join(contents.header['inputs'])}")
    typer.echo(f"promise: {contents.promise}")


def _policy(path: Path, trust: bool) -> object:
    """Return the policy in a file, or the path of an ONNX file, which is read later."""
    if path.suffix == ".onnx":
        return path
    if path.suffix == ".safetensors":
        from safeshield.algorithms.registry import load_agent

        return load_agent(path)
    if path.suffix == ".zip":
        from safeshield.cli.kinds import load_sb3

        return load_sb3(path, trust=trust)
    raise ValueError(
        f"--policy must be a .safetensors, .zip or .onnx file, got '{path}': a function of Python "
        "has no graph, and a torch.nn.Module is exported in Python, by "
        "shield.export_onnx(path, module)"
    )
