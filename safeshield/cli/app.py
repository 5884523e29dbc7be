"""The command line: ``safeshield demo``, and each step on files of your own.

Everything heavy is imported inside the commands, so that ``safeshield --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, cast

from safeshield.requirements import explained

try:
    import typer
except ModuleNotFoundError as error:
    raise explained(error) from error

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.rollouts.copies import Env
    from safeshield.shield.shield import Shield

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="safeshield",
    help="Safety shields for reinforcement learning agents, learned from logged data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Algorithm(StrEnum):
    """What to train."""

    safefql = "safefql"
    flrp = "flrp"
    r2pac = "r2pac"
    fisor = "fisor"
    bc = "bc"


EnvId = Annotated[str, typer.Argument(help="Gymnasium id, or module:id.")]
Out = Annotated[Path, typer.Argument(help="File to write.", dir_okay=False)]
Seed = Annotated[int, typer.Option(help="Seed of all draws.", min=0)]
Episodes = Annotated[int, typer.Option(help="Whole episodes.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load an SB3 zip: that runs what its maker put in it.")
]


def main() -> None:
    """Run the command line; the entry point of ``safeshield``."""
    app()


def _clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what users do wrong into one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except ModuleNotFoundError as error:
            if kwargs.get("debug"):
                raise
            typer.echo(f"error: {' '.join(str(explained(error)).split())}", err=True)
            raise typer.Exit(2) from None
        except Exception as error:
            if kwargs.get("debug") or not _is_users(error):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from None

    return wrapped


def _is_users(error: Exception) -> bool:
    import gymnasium as gym

    kinds = (ValueError, TypeError, OSError, ImportError, FloatingPointError, gym.error.Error)
    return isinstance(error, kinds)


@app.command()
@_clear_errors
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for log, agent, shield, table and pictures.")
    ] = Path("safeshield-demo"),
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every stage, too briefly to learn anything.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Log, learn, calibrate, and try four agents with the shield and without it."""
    from safeshield.demo.run import hardware, run_demo
    from safeshield.demo.settings import DemoConfig
    from safeshield.files.schema import versions

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    typer.echo(f"seed {seed}; {hardware()}")
    typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
    config = DemoConfig.quick(seed) if quick else DemoConfig(seed=seed)
    result = run_demo(out, config, say=typer.echo)
    typer.echo(f"\n{result.table}\n\n{result.promise}\n")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    typer.echo(f"{times}; {sum(result.seconds.values()):.0f} s in all")
    typer.echo(f"Log, agent, shield, table and pictures are in {result.folder}")


@app.command()
@_clear_errors
def collect(
    env_id: EnvId,
    out: Out,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Who acts: random (the default), helmsmen (of the boat), an agent's .safetensors "
            "or .zip."
        ),
    ] = None,
    episodes: Annotated[
        int, typer.Option(help="Whole episodes; with --limits: those that stay.", min=1)
    ] = 500,
    seed: Seed = 0,
    limits: Annotated[
        str | None,
        typer.Option(
            help="Instead of a policy: log PPO while it learns, once under each of these limits on "
            "an episode's cost, as none,25,5,0."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of each learner, rounded up to whole rollouts; default 200000.", min=1),
    ] = None,
    cap: Annotated[
        int | None, typer.Option(help="Learners' episodes a cell of the cost-return grid.", min=1)
    ] = None,
    bins: Annotated[
        int | None, typer.Option(help="Parts of each side of that grid; default 30.", min=1)
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(help="Folder that learners go on from; default OUT.parts. It can be deleted."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A learner's setting, name=value. Repeatable.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Log whole episodes of an environment to an HDF5 or NPZ file.

    Of a policy; or, with --limits, everything that learners do from their first steps to their
    last, thinned on a grid of cost and return. If that is stopped, the same command goes on.
    """
    from safeshield.files.schema import versions

    _check_output(out, (".hdf5", ".h5", ".npz"))
    given = {"--steps": steps, "--cap": cap, "--bins": bins, "--parts": parts, "--set": settings}
    needless = [name for name, value in given.items() if value is not None]
    if limits is None and needless:
        raise ValueError(f"{', '.join(needless)} belong to learners: add --limits none,25,5,0")
    if limits is not None and (policy is not None or trust):
        raise ValueError("--limits logs learners, and --policy and --trust a policy: leave one out")
    env = _make(env_id)
    if limits is not None:
        from safeshield.collection import (
            STEPS,
            LearnerConfig,
            Thinning,
            collect_while_learning,
            config_for,
        )

        folder = out.with_name(f"{out.name}.parts") if parts is None else parts
        config = _settings(LearnerConfig, settings or [], **vars(config_for(env)))
        steps = STEPS if steps is None else steps
        try:
            log = collect_while_learning(
                env,
                folder,
                limits=_parse("--limits", limits, tuple[float | None, ...]),
                steps=steps,
                seed=seed,
                thinning=Thinning(episodes, cap, 30 if bins is None else bins, seed),
                config=config,
                progress_bar=True,
            )
        except KeyboardInterrupt:
            typer.echo(f"stopped; the same command goes on from {folder}", err=True)
            raise typer.Exit(130) from None
        for note in _other_than_asked(
            log, steps=config.updates(steps) * config.rollout, episodes=episodes, cap=cap
        ):
            typer.echo(note, err=True)
    else:
        from safeshield.data.collect import collect as collect_log

        name = policy or "random"
        log = collect_log(env, _policy(name, env, None, trust), episodes, seed)
        log = dataclasses.replace(
            log,
            provenance={
                "collected_by": Path(name).name,
                "environment": env_id,
                "seed": seed,
                "versions": [versions()],
            },
        )
    log.save(out)
    typer.echo(f"{out}: {log}, {int(log.violating_episodes.sum())} episodes violate")


def _other_than_asked(
    log: OfflineDataset, *, steps: int, episodes: int, cap: int | None
) -> Iterator[str]:
    """Say where learners' episodes are more, or fewer, than the command asked for."""
    learners = (log.provenance or {}).get("learners", [])
    done = max(one["steps"] for one in learners)
    if done > steps:
        yield (
            f"note: learners had done up to {done} steps before, and none are taken back: the log "
            f"is of all of them, not of {steps}; for fewer, begin in another folder (--parts)"
        )
    if log.num_episodes < episodes:
        ended = sum(one["episodes"] for one in learners)
        why = f"the learners ended {ended}; raise --steps"
        if log.num_episodes < ended:
            why += f", or --cap, which keeps at most {cap} of a cell of the grid"
        yield f"note: {log.num_episodes} episodes, fewer than --episodes {episodes}: {why}"


@app.command()
@_clear_errors
def train(
    log: Annotated[Path, typer.Argument(help="Log, HDF5 or NPZ.", dir_okay=False)],
    out: Out,
    algorithm: Annotated[Algorithm, typer.Option(help="What to train.")] = Algorithm.safefql,
    steps: Annotated[int, typer.Option(help="Updates in all.", min=3)] = 100_000,
    seed: Seed = 0,
    preset: Annotated[
        str | None, typer.Option(help="Named settings to begin with: small (default), paper.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, name=value; lists as 256,256. Repeatable."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File to go on from, and to keep up to date: at the end of each phase, every "
            "2,000 updates and every minute."
        ),
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    debug: Debug = False,
) -> None:
    """Train an agent from a log: SafeFQL, FLRP, R2PAC, or a baseline (FISOR-style, cloning)."""
    _check_output(out, (".safetensors",))
    if checkpoint is not None:
        _check_output(checkpoint, None)
    import torch

    from safeshield.algorithms.registry import ALGORITHMS
    from safeshield.data.dataset import OfflineDataset

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    kind = ALGORITHMS[algorithm.value].kind
    if preset is None:
        named = {}
    elif preset in getattr(kind.config_type, "presets", {}):
        named = kind.config_type.presets[preset]
    else:
        known = sorted(getattr(kind.config_type, "presets", {})) or "none"
        raise ValueError(f"--preset {preset}: {algorithm.value} knows {known}")
    config = _settings(kind.config_type, settings or [], **{**named, "seed": seed})
    agent = kind(config, device=device.value)
    agent.fit(
        OfflineDataset.load(log),
        steps,
        progress_bar=True,
        log_dir=log_dir,
        checkpoint=checkpoint,
    )
    agent.save(out)
    typer.echo(f"{out}: {algorithm.value}, {steps} updates, seed {config.seed}")


@app.command()
@_clear_errors
def calibrate(
    source: Annotated[Path, typer.Argument(help="Agent or shield, .safetensors.")],
    env_id: EnvId,
    out: Out,
    epsilon: Annotated[float, typer.Option(help="Violation rate per episode to promise.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="Of the promise.")] = 0.99,
    episodes: Annotated[
        int | None,
        typer.Option(help="Episodes of each test; default: as many as allow one violation."),
    ] = None,
    deltas: Annotated[
        str | None,
        typer.Option(help="Thresholds to test, decreasing, as 0.3,0.1,0; default: chosen for you."),
    ] = None,
    seed: Seed = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Who proposes: random, or an agent's .safetensors or .zip. By default random "
            "proposals and an adversary."
        ),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Choose a shield's threshold so that its promise holds, by rollouts with the shield on."""
    _check_output(out, (".safetensors",))
    if policy == "adversary":
        raise ValueError("--policy adversary: leave --policy out, the adversary is then included")
    env = _make(env_id)
    proposing = None if policy is None else _policy(policy, env, None, trust)
    shield = _shield(source).calibrate(
        env,
        epsilon=epsilon,
        confidence=confidence,
        policy=proposing,
        policy_name=None if policy is None else _name(policy, proposing),
        deltas=None if deltas is None else _parse("--deltas", deltas, tuple[float, ...]),
        episodes=episodes,
        seed=seed,
    )
    shield.save(out)
    typer.echo(f"{out}: delta {shield.delta:.6g}")
    if shield.record is not None:
        typer.echo(shield.record.promise)


@app.command()
@_clear_errors
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Shield or agent, .safetensors; with --cost-limit also a model's .zip. {seed} in "
            "the name stands for each of --seeds.",
        ),
    ],
    env_id: EnvId,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Who proposes behind SOURCE's shield: random (the default), adversary, helmsmen, "
            "an agent's .safetensors or .zip. With --cost-limit an agent or a model acts itself, "
            "unshielded, where this is left out."
        ),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(help="Whole episodes; default 1000, with --cost-limit 20 a seed.", min=1),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all draws.", min=0)] = None,
    without: Annotated[
        bool, typer.Option("--without", help="Also without the shield, from the same starts.")
    ] = False,
    cost_limit: Annotated[
        float | None,
        typer.Option(help="Score by the field's protocol, at this limit (the papers': 10).", min=0),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="The task's log: its returns are the reference.")
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Reference returns instead of a log, LEAST,GREATEST.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the protocol's runs; default 0,1,2.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that step the protocol's environments; 0: none.", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Count violations behind a shield, from starts that it certifies.

    With --cost-limit: score an agent, shielded or not, by the field's protocol instead.
    """
    if cost_limit is not None:
        if seed is not None:
            raise ValueError(f"--seed {seed}: with --cost-limit give the runs' --seeds")
        _evaluate_by_protocol(
            source, env_id, policy, episodes, without, cost_limit, log, references, seeds, workers,
            as_json, trust,
        )  # fmt: skip
        return
    given = {"--log": log, "--references": references, "--seeds": seeds, "--workers": workers}
    needless = [name for name, value in given.items() if value]
    if needless:
        raise ValueError(f"{', '.join(needless)} belong to the field's protocol: add --cost-limit")
    from safeshield.evaluation import UnshieldedAdversary, format_table
    from safeshield.evaluation import evaluate as evaluate_policy

    policy = policy or "random"
    shield = _shield(source)
    env = _make(env_id)
    results = []
    for shielded in (False, True) if without else (True,):
        acting = _policy(policy, env, shield, trust)
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
                name=Path(policy).name,
            )
        )
    if as_json:
        typer.echo(json.dumps([result.to_json() for result in results], indent=2))
    else:
        typer.echo(format_table(results))


def _evaluate_by_protocol(
    source: Path,
    env_id: str,
    policy: str | None,
    episodes: int | None,
    without: bool,
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
        describe_score,
        field_score,
        format_scores,
    )
    from safeshield.evaluation.episodes import UnshieldedAdversary
    from safeshield.files.tensors import AGENT

    if (log is None) == (references is None):
        raise ValueError("--cost-limit needs reference returns: one of --log and --references")
    runs: tuple[int, ...] = SEEDS if seeds is None else _parse("--seeds", seeds, tuple[int, ...])
    first = Path(str(source).replace("{seed}", str(runs[0]) if runs else ""))
    alone = first.suffix == ".zip" or (policy is None and file_kind(first) == AGENT)
    if alone and (policy is not None or without):
        raise ValueError(
            "--policy and --without need a shield, and SOURCE is evaluated without one; give a "
            "shield as SOURCE and the agent as --policy"
        )
    env = _make(env_id)
    if references is not None:
        reference = ReferenceReturns(*_parse("--references", references, tuple[float, float]))
    else:
        reference = ReferenceReturns.of_log(_log_of(str(log), env))

    def each(name: str, make: Callable[[str], R]) -> R | dict[int, R]:
        if "{seed}" not in name:
            return make(name)
        return {seed: make(name.replace("{seed}", str(seed))) for seed in runs}

    shield = None if alone else each(str(source), lambda name: _shield(Path(name)))
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
            acting = each(name, lambda name: _policy(name, env, None, trust))
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


@app.command()
@_clear_errors
def inspect(
    file: Annotated[Path, typer.Argument(help="Agent, shield, checkpoint or log.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cost_limit: Annotated[
        float | None,
        typer.Option(
            help="Of a log's episode: safe ones are counted. Default: 0, 5 and 10.", min=0
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="File for a log's cost-return scatter, .png, .svg or .pdf."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say what a file is and holds; nothing in it is run."""
    from safeshield.cli.kinds import LOG, describe, file_kind, with_article

    kind = file_kind(file)
    if kind == LOG:
        _inspect_log(file, as_json, cost_limit, picture)
        return
    if cost_limit is not None or picture is not None:
        raise ValueError(
            f"--cost-limit and --picture are for logs, but {file} is {with_article(kind)}"
        )
    description = describe(file)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    # The promise says in words what the record says in numbers.
    description.pop("record", None)
    width = max(map(len, description))
    for name, value in description.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")


def _provenance_text(provenance: Mapping[str, Any]) -> str:
    """Return how a log was made, a line for each entry, and for each entry of a list of them."""
    width = max(map(len, provenance), default=0)
    lines = []
    for name, value in provenance.items():
        several = isinstance(value, list) and any(isinstance(one, dict) for one in value)
        for one in value if several else [value]:
            lines.append(f"  {name.replace('_', ' '):<{width}}  {_plain(one)}")
    return "\n".join(["made", *lines])


@app.command()
@_clear_errors
def doctor(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="core, navigation, velocity, bullet, dsrl, metadrive; default: all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is installed and works, and which commands are missing.

    Exit status 1: something installed does not work, or a part that was named is not installed.
    """
    from safeshield.suites.doctor import Part, examine, healthy, report

    unknown = [part for part in parts or [] if part not in list(Part)]
    if unknown:
        raise ValueError(f"PARTS must be of {', '.join(Part)}, got {', '.join(unknown)}")
    asked = [Part(part) for part in parts or []]
    findings = examine(asked)
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in findings], indent=2))
    else:
        typer.echo(report(findings))
    if not healthy(findings, asked):
        raise typer.Exit(1)


def _inspect_log(file: Path, as_json: bool, cost_limit: float | None, picture: Path | None) -> None:
    if picture is not None:
        _check_output(picture, (".png", ".svg", ".pdf"), "--picture")
    from safeshield.cli.kinds import describe_log
    from safeshield.data.card import DEFAULT_LIMITS, card_of
    from safeshield.data.dataset import OfflineDataset

    log = OfflineDataset.load(file)
    limits = DEFAULT_LIMITS if cost_limit is None else (cost_limit,)
    card = card_of(log, file=file, limits=limits)
    if picture is not None:
        from safeshield.data.scatter import draw_scatter

        draw_scatter(picture, log, limit=max(limits), title=card.env_id or file.stem)
    if as_json:
        typer.echo(json.dumps(describe_log(log, card), indent=2))
        return
    typer.echo(card)
    if log.provenance is not None:
        typer.echo(_provenance_text(log.provenance))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _log_of(path: str, env: Env) -> OfflineDataset:
    """Read a log of this environment; a log of another one would give it false scores."""
    from safeshield.data.card import logged_environment
    from safeshield.data.dataset import OfflineDataset
    from safeshield.rollouts.copies import environment_name
    from safeshield.suites.labels import same_task

    log = OfflineDataset.load(path, action_space=env.action_space)
    named, wanted = logged_environment(log, path), environment_name(env)
    shapes = [space.shape for space in (log.observation_space, env.observation_space)]
    if named is None and None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(
            f"--log must be of {wanted}, whose observations have shape {shapes[1]}, but those of "
            f"{path} have {shapes[0]}: give that task's log, or --references LEAST,GREATEST"
        )
    if named is None:
        typer.echo(
            f"warning: {path} does not say of which environment it is; its returns are taken for "
            f"those of {wanted}",
            err=True,
        )
    elif not same_task(named, wanted):
        raise ValueError(
            f"--log must be of {wanted}, but {path} is of {named}: give that task's log, or its "
            "least and greatest return as --references LEAST,GREATEST"
        )
    return log


def _check_output(path: Path, suffixes: tuple[str, ...] | None, name: str = "OUT") -> None:
    """Refuse before the work, not after it."""
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got '{path}'")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: make the folder {path.parent} first")


def _make(env_id: str) -> Env:
    import gymnasium as gym

    import safeshield.envs

    if ":" not in env_id and env_id not in gym.registry:
        import safeshield.suites  # noqa: F401 - registers those of other packages

    env: Env = gym.make(env_id)
    return env


def _shield(path: Path) -> Shield:
    """Read a shield, or take that of an agent."""
    from safeshield.cli.kinds import file_kind, with_article
    from safeshield.files.tensors import AGENT, SHIELD

    kind = file_kind(path)
    if kind == SHIELD:
        from safeshield.shield.shield import Shield

        return Shield.load(path)
    if kind == AGENT:
        from safeshield.algorithms.registry import load_agent
        from safeshield.shield.shield import HasShield

        agent = load_agent(path)
        if isinstance(agent, HasShield):
            return agent.shield()
        raise ValueError(
            f"{path} is an agent of {type(agent).__name__}, which learns no shield; train safefql"
        )
    raise ValueError(f"{path} must be an agent or a shield, but is {with_article(kind)}")


def _policy(name: str, env: Env, shield: Shield | None, trust: bool) -> object:
    """Return who proposes; `shield` is what an adversary plays against."""
    if name == "random":
        return name
    if name == "adversary" and shield is not None:
        from safeshield.calibration.proposers import Adversary

        return Adversary(shield)
    if name == "helmsmen":
        from safeshield.demo.helmsmen import Helmsmen
        from safeshield.envs.boat import BoatEnv

        if not isinstance(env.unwrapped, BoatEnv):
            raise ValueError(f"the helmsmen sail safeshield/Boat-v0 only, got {env}")
        return Helmsmen()
    path = Path(name)
    if path.suffix == ".safetensors":
        from safeshield.algorithms.registry import load_agent

        return load_agent(path)
    if path.suffix == ".zip":
        from safeshield.cli.kinds import load_sb3

        return load_sb3(path, trust=trust)
    known = ["random", "helmsmen", *(["adversary"] if shield is not None else [])]
    raise ValueError(f"--policy must be one of {known}, or an agent's .safetensors or .zip file, "
                     f"got '{name}'")  # fmt: skip


def _name(name: str, policy: object) -> str:
    """Return what a record calls a policy: its file, and whose it is."""
    from safeshield.training.agent import OfflineAgent

    if isinstance(policy, OfflineAgent):
        return f"{type(policy).__name__}, seed {policy.config.seed} ({Path(name).name})"
    return Path(name).name


def _settings(kind: type[R], settings: list[str], **values: Any) -> R:  # noqa: ANN401
    """Return a configuration of this class from "name=value" texts.

    Raises:
        ValueError: no such setting, or a value of another type.
    """
    from typing import get_type_hints

    names = {field.name for field in dataclasses.fields(cast("Any", kind))}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in names}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"--set takes name=value, got '{setting}'")
        if name not in hints:
            raise ValueError(f"--set {name}: no such setting; known: {', '.join(hints)}")
        values[name] = _parse(f"--set {name}", text.strip(), hints[name])
    return kind(**values)


def _parse(name: str, text: str, hint: Any) -> Any:  # noqa: ANN401 - of any type
    from typing import get_args, get_origin

    origin = get_origin(hint)
    if type(None) in get_args(hint):
        if text.lower() == "none":
            return None
        return _parse(name, text, next(one for one in get_args(hint) if one is not type(None)))
    if origin is tuple:
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        item = get_args(hint)[0]
        fixed = [one for one in get_args(hint) if one is not ...]
        if len(fixed) == len(get_args(hint)) and len(parts) != len(fixed):
            raise ValueError(f"{name}: takes {len(fixed)} values, got '{text}'")
        return tuple(_parse(name, part.strip(), item) for part in parts)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: must be true or false, got '{text}'")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{name}: must be {kind}, got '{text}'") from None
    if origin is not None and text not in (choices := get_args(hint)):
        raise ValueError(f"{name}: must be one of {list(choices)}, got '{text}'")
    return text


if __name__ == "__main__":
    main()
