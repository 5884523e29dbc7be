"""``safeshield evaluate``: count violations behind a shield, or score by the field's protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from safeshield.cli.app import AsJson, Debug, EnvId, Plugins, Trust
from safeshield.cli.settings import parse
from safeshield.cli.sources import (
    env_for,
    log_of,
    make_env,
    name_of,
    policy_of,
    shield_of,
    short_name_of,
)

R = TypeVar("R")


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="File of a shield or an agent, .safetensors; with --cost-limit also an SB3 .zip. "
            "{seed} in the name is replaced by each of --seeds.",
        ),
    ],
    env_id: EnvId,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that proposes actions to SOURCE's shield: random (the default), "
            "adversary, helmsmen, an agent's .safetensors or .zip file, module:name (a policy in "
            "Python), or the .json file of falsify. With --cost-limit and without --policy, an "
            "agent given as SOURCE acts without a shield."
        ),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(help="Whole episodes; default 1000; with --cost-limit 20 per seed.", min=1),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.", min=0)] = None,
    without: Annotated[
        bool, typer.Option("--without", help="Also run without the shield, from the same starts.")
    ] = False,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--stochastic",
            help="Whether the policy acts without its noise. Default: as in the calibration of "
            "SOURCE; without its noise where SOURCE is not calibrated, and with --cost-limit.",
        ),
    ] = None,
    cost_limit: Annotated[
        float | None,
        typer.Option(help="Score by the field's protocol, at this limit (the papers': 10).", min=0),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Log of the task, whose returns are the reference.")
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Reference returns in place of a log: LEAST,GREATEST.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the protocol's runs; default 0,1,2.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that step the protocol's environments; 0: none.", min=0)
    ] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
    plugins: Plugins = None,
    debug: Debug = False,
) -> None:
    """Count violations behind a shield, in episodes from start states that it certifies.

    With --cost-limit: score an agent, shielded or not, by the field's protocol instead.
    """
    if cost_limit is not None:
        if seed is not None:
            raise ValueError(f"--seed {seed}: with --cost-limit give the runs' --seeds")
        _evaluate_by_protocol(
            source, env_id, policy, episodes, without, deterministic is not False, cost_limit, log,
            references, seeds, workers, as_json, trust,
        )  # fmt: skip
        return
    given = {"--log": log, "--references": references, "--seeds": seeds, "--workers": workers}
    needless = [name for name, value in given.items() if value]
    if needless:
        raise ValueError(f"{', '.join(needless)} belong to the field's protocol: add --cost-limit")
    from safeshield.cli.kinds import file_kind
    from safeshield.evaluation import UnshieldedAdversary, format_table
    from safeshield.evaluation import evaluate as evaluate_policy
    from safeshield.evaluation.episodes import as_calibrated
    from safeshield.files.tensors import AGENT
    from safeshield.shield.shield import BUILTIN

    builtin = str(source).startswith(BUILTIN)
    if policy is None and not builtin and file_kind(source) == AGENT:
        typer.echo(
            f"note: {source} is an agent, and its shield, which is not calibrated, filters random "
            "actions here. To evaluate the agent itself, add --cost-limit and --log, or give a "
            f"shield as SOURCE and --policy {source}",
            err=True,
        )
    policy = policy or "random"
    shield = shield_of(source)
    acts = as_calibrated(shield) if deterministic is None else deterministic
    env = env_for(env_id, shield)
    results = []
    for shielded in (False, True) if without else (True,):
        acting = policy_of(policy, env, shield, trust)
        if policy == "adversary" and not shielded:
            acting = UnshieldedAdversary(shield)
        results.append(
            evaluate_policy(
                env,
                acting,
                1000 if episodes is None else episodes,
                seed or 0,
                shield=shield if shielded else None,
                starts="certified",
                certified_by=shield,
                name=short_name_of(policy, acting),
                deterministic=acts,
            )
        )
    if as_json:
        typer.echo(json.dumps([result.to_json() for result in results], indent=2))
        return
    typer.echo(format_table(results))
    share = results[-1].start_share
    if share is not None:
        typer.echo(f"{share:.0%} of the starts that were drawn are certified")
    name = name_of(policy, acting)
    record = shield.record
    named = [] if record is None else [one.policy for one in record.policies]
    if record is not None and name not in named:
        typer.echo(f"note: the promise of {source} is about {', '.join(named)}, not about {name}")
    elif record is not None and acts != as_calibrated(shield):
        typer.echo(
            f"note: the promise of {source} is about policies with deterministic={not acts}, and "
            f"{name} was played with deterministic={acts}"
        )


def _evaluate_by_protocol(
    source: Path,
    env_id: str,
    policy: str | None,
    episodes: int | None,
    without: bool,
    deterministic: bool,
    cost_limit: float,
    log: Path | None,
    references: str | None,
    seeds: str | None,
    workers: int,
    as_json: bool,
    trust: bool,
) -> None:
    from safeshield.calibration.proposers import Adversary
    from safeshield.cli.kinds import file_kind
    from safeshield.evaluation import (
        EPISODES,
        SEEDS,
        ReferenceReturns,
        UnshieldedAdversary,
        describe_score,
        field_score,
        format_scores,
    )
    from safeshield.files.tensors import AGENT
    from safeshield.rollouts.policies import as_batch_policy

    if (log is None) == (references is None):
        raise ValueError("--cost-limit needs reference returns: one of --log and --references")
    runs: tuple[int, ...] = SEEDS if seeds is None else parse("--seeds", seeds, tuple[int, ...])
    first = Path(str(source).replace("{seed}", str(runs[0]) if runs else ""))
    alone = first.suffix == ".zip" or (policy is None and file_kind(first) == AGENT)
    if alone and (policy is not None or without):
        raise ValueError(
            "--policy and --without need a shield, and SOURCE is evaluated without one; give a "
            "shield as SOURCE and the agent as --policy"
        )
    env = make_env(env_id)
    if references is not None:
        reference = ReferenceReturns(*parse("--references", references, tuple[float, float]))
    else:
        reference = ReferenceReturns.of_log(log_of(str(log), env))

    def each(name: str, make: Callable[[str], R]) -> R | dict[int, R]:
        if "{seed}" not in name:
            return make(name)
        return {seed: make(name.replace("{seed}", str(seed))) for seed in runs}

    shield = None if alone else each(str(source), lambda name: shield_of(Path(name)))
    name = str(source) if alone else policy or "random"
    scores = []
    for shielded in (False,) if alone else (False, True) if without else (True,):
        acting: object
        if name == "adversary" and shield is not None:
            kind = Adversary if shielded else UnshieldedAdversary
            acting = (
                {seed: kind(one) for seed, one in shield.items()}
                if isinstance(shield, dict)
                else kind(shield)
            )
        else:
            acting = each(
                name,
                lambda name: as_batch_policy(
                    policy_of(name, env, None, trust), env.action_space, deterministic=deterministic
                ),
            )
        scores.append(
            field_score(
                env,
                acting,
                references=reference,
                cost_limit=cost_limit,
                seeds=runs,
                episodes=EPISODES if episodes is None else episodes,
                shield=shield if shielded else None,
                name=Path(name).name,
                workers=workers,
            )
        )
    if as_json:
        typer.echo(json.dumps([score.to_json() for score in scores], indent=2))
        return
    typer.echo("\n\n".join(describe_score(score) for score in scores))
    if len(scores) > 1:
        typer.echo(f"\n{format_scores(scores)}")
