"""``safeshield calibrate``: choose and test the threshold of a shield."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeshield.cli.app import Debug, EnvId, Out, Plugins, Seed, Trust, check_output
from safeshield.cli.settings import parse
from safeshield.cli.sources import check_memory, env_for, name_of, policy_of, shield_of

if TYPE_CHECKING:
    from safeshield.calibration.promises import Promise


def calibrate(
    source: Annotated[Path, typer.Argument(help="File of an agent or a shield, .safetensors.")],
    env_id: EnvId,
    out: Out,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Violation rate per episode that the promise states; default: 0.01."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of the promise.")] = 0.99,
    episodes: Annotated[
        int | None,
        typer.Option(help="Episodes of each test; default: a sequential test decides."),
    ] = None,
    cost_limit: Annotated[
        float | None,
        typer.Option(
            help="Promise that an episode's summed cost exceeds this limit with probability at "
            "most epsilon; with --cost-bound, that its mean is at most this limit."
        ),
    ] = None,
    cost_bound: Annotated[
        float | None,
        typer.Option(
            help="Largest cost that an episode can have, such as the horizon times the largest "
            "cost of a step."
        ),
    ] = None,
    deltas: Annotated[
        str | None,
        typer.Option(
            help="Deltas to test, decreasing, such as 0.3,0.1,0; default: chosen in a pilot."
        ),
    ] = None,
    seed: Seed = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that proposes actions: random, an agent's .safetensors or .zip file, "
            "module:name (a policy in Python), or the .json file of falsify. Default: random "
            "proposals and an adversary."
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Calibrate for a policy that is deployed without its noise."
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that step the environment; 0 means that this one does. The record does "
            "not depend on their number.",
            min=0,
        ),
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster that steps the environment: host:port, auto (the one of this machine "
            "or of RAY_ADDRESS) or local (started here). --workers is then the number of Ray "
            "actors; default: one for each CPU.",
        ),
    ] = None,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Choose the threshold of a shield by testing it in episodes with the shield switched on.

    The shield is written to OUT with its promise, and with the memory of all attempts. An OUT that
    remembers more than SOURCE is refused, because its memory would be lost. Where no threshold
    passes, or the tests are interrupted, OUT is written with the memory of the attempt and without
    a promise (where OUT is SOURCE, with the promise that it had), and the exit status is not 0.
    """
    check_output(out, (".safetensors",))
    if policy == "adversary":
        raise ValueError("--policy adversary: leave out --policy; the adversary is then included")
    promise = _promise(epsilon, cost_limit, cost_bound)
    shield = shield_of(source)
    check_memory(out, shield, source)
    env = env_for(env_id, shield)
    proposing = None if policy is None else policy_of(policy, env, shield, trust)
    earlier = shield.attempts
    try:
        found = shield.calibrate(
            env,
            promise=promise,
            confidence=confidence,
            policy=proposing,
            policy_name=None if policy is None else name_of(policy, proposing),
            deltas=None if deltas is None else parse("--deltas", deltas, tuple[float, ...]),
            episodes=episodes,
            deterministic=deterministic,
            seed=seed,
            workers=workers,
            ray=ray,
            progress_bar=True,
        )
    except BaseException:
        if shield.attempts != earlier:
            same = out.resolve() == source.resolve()
            left = shield if same else replace(shield, record=None)
            left.save(out)
            kept = "with the promise that it had" if left.record else "without a promise"
            typer.echo(f"{out}: the shield {kept}, and the memory of this attempt", err=True)
        raise
    shield = found
    shield.save(out)
    typer.echo(f"{out}: delta {shield.delta:.6g}")
    if shield.record is not None:
        typer.echo(shield.record.promise)
        for result in shield.record.policies:
            typer.echo(
                f"{result.policy}: the shield replaced {result.intervention_rate:.1%} of the "
                "actions in the test"
            )


def _promise(epsilon: float | None, limit: float | None, bound: float | None) -> Promise:
    """Return the promise that the options ask for.

    Raises:
        ValueError: The options contradict each other, or a number is out of range.
    """
    from safeshield.calibration.promises import CostAbove, MeanCost, Violation

    if bound is None:
        rate = 0.01 if epsilon is None else epsilon
        return Violation(rate) if limit is None else CostAbove(limit, rate)
    if limit is None or epsilon is not None:
        raise ValueError("--cost-bound goes with --cost-limit, and without --epsilon")
    return MeanCost(limit, bound)
