"""The checks of `safeshield doctor`: which packages are installed, and which parts work.

Each part is tried in a separate process, so that a crash there is reported here.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from safeshield.files.schema import json_values
from safeshield.requirements import command, installed, lacking
from safeshield.suites.packages import Suite, commands, missing, needed, python_note
from safeshield.suites.tasks import TASKS

_CORE = ("safeshield", "torch", "gymnasium", "stable-baselines3", "numpy")
_SECONDS = 180.0
_PROBE = "import sys; from safeshield.suites.doctor import probe; probe(sys.argv[1:])"
_ANSWER = "safeshield-doctor:"


class Part(StrEnum):
    """The parts that can be checked."""

    core = "core"
    navigation = "navigation"
    velocity = "velocity"
    bullet = "bullet"
    dsrl = "dsrl"
    metadrive = "metadrive"


class State(StrEnum):
    """The result of checking one part."""

    works = "works"
    absent = "absent"
    broken = "broken"


# The suites that each part needs, and one environment of each kind in it.
_PARTS: dict[Part, tuple[tuple[Suite, ...], tuple[str, ...]]] = {
    Part.core: ((), ("safeshield/Boat-v0",)),
    Part.navigation: ((Suite.safety_gymnasium,), (TASKS["PointGoal1"].env_id,)),
    Part.velocity: ((Suite.safety_gymnasium,), (TASKS["HopperVelocity"].env_id,)),
    Part.bullet: ((Suite.bullet,), (TASKS["BallRun"].env_id, TASKS["CarCircle"].env_id)),
    Part.dsrl: (
        (Suite.dsrl, Suite.safety_gymnasium, Suite.bullet),
        (TASKS["PointGoal1"].offline_id, TASKS["BallRun"].offline_id),
    ),
    Part.metadrive: ((Suite.metadrive,), (TASKS["easysparse"].env_id,)),
}


@dataclass(frozen=True)
class Finding:
    """The result of checking one part, with details."""

    part: Part
    """The part that was checked."""
    state: State
    """Whether the part works, is absent or is broken."""
    versions: dict[str, str]
    """Versions of the part's packages that are installed."""
    detail: str
    """The environments that were made, reset and stepped, or the failure."""
    untried: tuple[str, ...] = ()
    """Packages whose versions were not tried together, each with the versions that were."""
    commands: tuple[str, ...] = ()
    """Commands to run, in this order."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return json_values(self)


def examine(parts: Sequence[Part] = ()) -> list[Finding]:
    """Return the findings on these parts, or on all parts, each checked in a process of its own.

    Args:
        parts: Parts to check; an empty sequence stands for all parts.
    """
    wanted = list(dict.fromkeys(parts)) or list(Part)
    with ThreadPoolExecutor(max_workers=min(len(wanted), os.cpu_count() or 1)) as pool:
        return list(pool.map(_examine, wanted))


def healthy(findings: Sequence[Finding], asked: Sequence[Part] = ()) -> bool:
    """Return whether no part is broken and no part that was asked for is absent.

    `findings` are the results of `examine`, and `asked` the parts that the user named.
    """
    return not any(
        one.state is State.broken or (one.state is State.absent and one.part in asked)
        for one in findings
    )


def report(findings: Sequence[Finding]) -> str:
    """Return the findings as text, with the commands that install what is missing at its end."""
    indent = " " * (max(len(part) for part in Part) + 2 + max(len(state) for state in State) + 2)
    lines = []
    for one in findings:
        head = f"{one.part:<{max(len(part) for part in Part)}}  {one.state:<6}  "
        texts = [", ".join(f"{name} {number}" for name, number in one.versions.items()), one.detail]
        if one.untried:
            texts.append(f"not tried together: {', '.join(one.untried)}")
        body = [text for text in texts if text]
        lines += [f"{head if i == 0 else indent}{text}" for i, text in enumerate(body)]
    run = list(dict.fromkeys(command for one in findings for command in one.commands))
    if run:
        lines += ["", "To install what is missing, in this order:"]
        lines += [f"  {command}" for command in _together(run)]
        lines += [f"But {note}."] if (note := python_note()) else []
    return "\n".join(lines)


def _together(run: Sequence[str]) -> list[str]:
    """Merge the commands of several parts: the plain ones first, then one with ``--no-deps``."""
    start = "pip install --no-deps "
    plain = [command for command in run if not command.startswith(start)]
    apart = [name for command in run if command.startswith(start)
             for name in command.removeprefix(start).split()]  # fmt: skip
    return plain + ([start + " ".join(dict.fromkeys(apart))] if apart else [])


def _examine(part: Part) -> Finding:
    suites, ids = _PARTS[part]
    packages = needed(*suites)
    versions = {package.name: package.version for package in packages}
    if part is Part.core:
        versions = {
            "python": platform.python_version(),
            **{name: installed(name) for name in _CORE},
        }
    present = {name: number for name, number in versions.items() if number is not None}
    if part is Part.core and (lacks := lacking()):
        parts = [
            f"{one} (not installed)" if number is None else f"{one} (installed: {number})"
            for one, number in lacks.items()
        ]
        run = (command(list(lacks)),)
        return Finding(part, State.broken, present, f"lacks {', '.join(parts)}", commands=run)
    absent = missing(*suites)
    if absent:
        names = ", ".join(package.name for package in absent)
        detail = f"not installed: {names}"
        return Finding(part, State.absent, present, detail, commands=tuple(commands(absent)))
    others = tuple(package for package in packages if not package.as_tried)
    untried = tuple(
        f"{package.name} {package.version} (tried: {package.requirement})" for package in others
    )
    works, detail = _try(ids)
    if works:
        return Finding(part, State.works, present, detail, untried)
    return Finding(part, State.broken, present, detail, untried, tuple(commands(others)))


def _try(ids: Sequence[str]) -> tuple[bool, str]:
    """Make, reset and step environments in a separate process.

    Returns:
        Whether that worked, and a description of the result.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE, *ids],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"{', '.join(ids)}: no answer in {_SECONDS:.0f} s"
    answers = [line for line in result.stdout.splitlines() if line.startswith(_ANSWER)]
    if result.returncode == 0 and answers:
        return True, str(json.loads(answers[-1].removeprefix(_ANSWER)))
    if result.returncode < 0:
        return False, f"{', '.join(ids)}: killed by {_signal_name(-result.returncode)}"
    said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    last = said[-1] if said else "not a word"
    return False, f"{', '.join(ids)}: exit status {result.returncode}, {last}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def probe(ids: Sequence[str]) -> None:
    """Make, reset and step the environments `ids` in this process, and print the result.

    If the first id is one of this package, it stands for the core, and PyTorch and
    Stable-Baselines3 are loaded as well.
    """
    import gymnasium as gym

    import safeshield.suites  # noqa: F401 - registers

    told = []
    for env_id in ids:
        start = time.perf_counter()
        env: gym.Env[Any, Any] = gym.make(env_id)
        env.reset(seed=0)
        env.action_space.seed(0)
        observation, reward, _, _, info = env.step(env.action_space.sample())
        if not env.observation_space.contains(observation) or "cost" not in info:
            raise RuntimeError(f"{env_id} steps to {observation!r}, {reward!r}, {info!r}")
        env.close()
        told.append(f"{env_id} ({time.perf_counter() - start:.1f} s)")
    text = f"made, reset and stepped: {', '.join(told)}"
    if ids[0].startswith("safeshield/"):
        text += f"; {_device()}"
    print(f"\n{_ANSWER}{json.dumps(text)}", flush=True)


def _device() -> str:
    import stable_baselines3  # noqa: F401 - checks that it can be loaded
    import torch

    if not torch.cuda.is_available():
        return "trains on the CPU, PyTorch finds no CUDA device"
    total = float(torch.ones(1, device="cuda").sum())  # a device that is found may be unusable
    return f"trains on {torch.cuda.get_device_name()}" if total == 1.0 else "CUDA miscalculates"
