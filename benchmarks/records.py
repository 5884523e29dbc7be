"""Edit the records of files in many ways, and count which files load.

    python benchmarks/records.py            # two minutes on an idle machine
    python benchmarks/records.py --every 4  # a quarter of the edits of single entries

Six files are made by real calibrations on the double integrator and the boat, with the networks of
`tests/golden`: a shield with two attempts and with what logs show of it (residuals, shadow, trial,
spliced), one with a single attempt, one with a detection, one with a promise about the mean cost,
one with a promise about costs above a limit, and an agent with the record of its actor alone. All
are signed. Then

- every entry of their records is edited in several ways, and the digest stays as it was;
- records are made impossible: one statement does not follow from the others, the digest is new;
- records are forged consistently: the counts are possible and the bounds follow, the digest is new;
- entries that the digest does not cover are added to the metadata of the file.

A file that loads is counted as shown rightly where it is called unsigned.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from safeshield import SafeFQL, SafetyShield, Shield, collect
from safeshield.calibration import CostAbove, MeanCost, upper_bound
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.rollouts.policies import batch_policy

Header = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
RECORDS = (
    "delta", "record", "attempts", "log_records", "log_attempts", "support", "trained_by",
)  # fmt: skip
"""Entries of the header that are edited."""


class Genuine(NamedTuple):
    """The contents of a file that a calibration has written."""

    header: Header
    arrays: dict[str, Any]
    signature: str


@batch_policy
def uniform(observations: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return uniform accelerations, for the spliced episodes."""
    return rng.uniform(-1.0, 1.0, (len(observations), 1))


def genuine(folder: Path, key: Ed25519PrivateKey) -> dict[str, Genuine]:
    """Return the contents of the six files, by name. They are written to `folder`, and signed."""
    env = gym.make("safeshield/DoubleIntegrator-v0", max_episode_steps=40)
    train, held_out = collect(env, "random", episodes=80, seed=0).split(0.5, seed=0)
    shield = Shield.load(GOLDEN / "shield_calibrated.safetensors").with_delta(0.4)
    shield = replace(shield, attempts=(), training_episodes=train.episode_hashes)
    options: dict[str, Any] = {"confidence": 0.9, "policy": "random"}
    first = shield.calibrate(env, epsilon=0.5, deltas=[0.4], **options)
    second = first.calibrate(env, epsilon=0.5, episodes=40, deltas=[0.2, 0.13], **options)
    second = second.calibrate_from_log(held_out, "residuals", confidence=0.8, alpha=0.2)
    alone = collect(env, "random", episodes=30, seed=1)
    second = second.calibrate_from_log(alone, "shadow", confidence=0.8, policy="random")
    behind = collect(SafetyShield(env, second), "random", episodes=30, seed=2)
    second = second.calibrate_from_log(behind, "trial", confidence=0.8, policy="random")
    other = collect(env, uniform, episodes=30, seed=3)
    second = second.calibrate_from_log(
        other, "spliced", confidence=0.8, policy=uniform, simulator=env
    )
    agent = SafeFQL.load(GOLDEN / "agent_safefql.safetensors", device="cpu")
    boat = gym.make("safeshield/Boat-v0", max_episode_steps=40)
    mean = MeanCost(30.0, bound=41.0)
    made = {
        "rate": second,
        "sequential": first,
        "detection": shield.calibrate_from_log(
            held_out, "detection", confidence=0.8, alpha=0.4, lead=2
        ),
        "mean": shield.calibrate(env, promise=mean, seed=2, deltas=[0.4], **options),
        "above": shield.calibrate(
            env, promise=CostAbove(0.5, 0.5), seed=3, deltas=[0.4], **options
        ),
        "agent": agent.calibrate(boat, epsilon=0.9, confidence=0.9, deltas=[0.0], seed=4),
    }
    found = {}
    for name, owner in made.items():
        owner.save(folder / name)
        file = read_tensors(folder / name)
        arrays = file.load(file.shapes, file.dtypes)
        write_tensors(folder / name, arrays, file.header, key)
        found[name] = Genuine(file.header, arrays, read_tensors(folder / name).signature or "")
    return found


def read(path: Path, key: Any = None) -> Any:  # noqa: ANN401
    """Return the shield or the agent in a file."""
    agent = "safefql" in read_tensors(path).header["format"]
    kind: Any = SafeFQL if agent else Shield
    return kind.load(path, **({"device": "cpu"} if agent else {}), verify=key)


def refused(path: Path, key: Any = None) -> str:  # noqa: ANN401
    """Return the error with which a file is refused, "" where it loads."""
    try:
        read(path, key)
    except ValueError as error:
        return str(error)
    return ""


# -- edits of single entries, without a new digest -------------------------------------------------


def entries(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all entries of JSON values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list
    ) else ()  # fmt: skip
    for name, one in inner:
        yield (*path, name)
        yield from entries(one, (*path, name))


def at(value: Any, path: tuple[str | int, ...]) -> Any:  # noqa: ANN401
    """Return an entry of JSON values."""
    for name in path:
        value = value[name]
    return value


def changes(value: object) -> dict[str, object]:
    """Return what an entry may be changed to, by the name of the change."""
    found: dict[str, object] = {"null": None, "an object": {}, "a text": "x", "a number": 7}
    if isinstance(value, bool):
        found |= {"the opposite": not value}
    elif isinstance(value, int | float):
        found |= {
            "one more": value + 1, "one less": value - 1, "a tenth": value / 10, "0": 0,
            "negative": -value - 1, "the next float": float(np.nextafter(value, np.inf)),
        }  # fmt: skip
    elif isinstance(value, str):
        found |= {"empty": "", "longer": value + " "}
    elif isinstance(value, list):
        found |= {"empty": [], "one twice": value + value[:1], "one less": value[:-1],
                  "reversed": value[::-1]}  # fmt: skip
    return {name: one for name, one in found.items() if json.dumps(one) != json.dumps(value)}


def edited(header: Header) -> Iterator[tuple[str, Header]]:
    """Yield the name of each edit of one entry of the records, and the edited header."""
    for path in entries({name: header[name] for name in RECORDS if name in header}):
        for name, value in changes(at(header, path)).items():
            other = copy.deepcopy(header)
            at(other, path[:-1])[path[-1]] = value
            yield f"{'.'.join(map(str, path))}: {name}", other
        other = copy.deepcopy(header)
        del at(other, path[:-1])[path[-1]]
        yield f"{'.'.join(map(str, path))}: removed", other


def write_undigested(path: Path, original: bytes, header: Header) -> None:
    """Write a file with another header and the digest of the original one."""
    write_with(path, original, header=header)


def write_with(path: Path, original: bytes, **entries: object) -> None:
    """Write a file like the original one, with other entries beside the digest, which stays."""
    outer = outer_header(original)
    contents = json.loads(outer["__metadata__"]["safeshield"]) | entries
    outer["__metadata__"]["safeshield"] = json.dumps(contents, sort_keys=True)
    write_outer(path, original, outer)


def write_metadata(path: Path, original: bytes, name: str, value: str) -> None:
    """Write a file like the original one, with one more entry of the metadata."""
    outer = outer_header(original)
    outer["__metadata__"][name] = value
    write_outer(path, original, outer)


def outer_header(original: bytes) -> Header:
    """Return the header of safetensors of a file."""
    length = struct.unpack("<Q", original[:8])[0]
    found: Header = json.loads(original[8 : 8 + length])
    return found


def write_outer(path: Path, original: bytes, outer: Header) -> None:
    """Write a file like the original one, with another header of safetensors."""
    length = struct.unpack("<Q", original[:8])[0]
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + original[8 + length :])


# -- impossible records, with a new digest ---------------------------------------------------------


class Edit(NamedTuple):
    """One impossible record."""

    kind: str
    """What does not follow."""
    file: str
    """Name of the genuine file."""
    values: dict[str, Any]
    """Path of each entry -> its new value, or a function of the old one."""


def impossible() -> list[Edit]:
    """Return the impossible records."""
    found: list[Edit] = []

    def add(kind: str, file: str, *each: dict[str, Any]) -> None:
        found.extend(Edit(kind, file, values) for values in each)

    def both(entry: str, *values: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return edits of an entry of the chosen test, in the walk and in policies."""
        return [
            {f"record.policies.0.{entry}": one, f"record.walk.-1.{entry}": one} for one in values
        ]

    def fewer(n: int) -> int:
        return n - 1

    rates = ("rate", "sequential", "above", "agent")
    for file in rates:
        # The walk of these files passes, so its last test is the chosen one.
        add(
            "bound that the counts do not give",
            file,
            *both("bound", lambda x: x * 0.9, lambda x: x * 1.1, lambda x: x - 1e-4, 0.0, 1.0, 1.5),
        )
        add(
            "violations without their bound",
            file,
            *both("violations", lambda k: k + 1, lambda k: k + 5),
        )
        add("more violations than episodes", file, *both("violations", lambda k: k + 10_000))
        add("negative violations", file, *both("violations", -1, -100))
        add("no or negative episodes", file, *both("episodes", 0, -5))
        add(
            "episodes after which the test would not have stopped",
            file,
            *both("episodes", fewer, lambda n: n + 1, lambda n: 2 * n, 10**12),
        )
        add(
            "counts that are no whole numbers",
            file,
            *both("episodes", lambda n: n + 0.5, float),
            *both("violations", True, "3", None),
        )
        add(
            "epsilon smaller than the counts show",
            file,
            *({"record.epsilon": one} for one in (0.001, 0.05, 1e-12)),
        )
        add(
            "epsilon outside (0, 1)",
            file,
            *({"record.epsilon": one} for one in (0.0, 1.0, -0.5, 2.0)),
        )
        add(
            "confidence outside (0, 1)",
            file,
            *({"record.confidence": one} for one in (0.0, 1.0, -0.1, 1.5)),
        )
        add(
            "confidence above that of the tests",
            file,
            *({"record.confidence": one} for one in (0.91, 0.95, 0.999)),
        )
        add(
            "a level that is not the attempt's",
            file,
            *(
                {"record.attempts.-1.level": one, "attempts.-1.level": one}
                for one in (0.0, 1e-6, 0.19, 0.9, 1.0, -0.1)
            ),
        )
        add(
            "a record of a failed attempt",
            file,
            {"record.attempts.-1.passed": False, "attempts.-1.passed": False},
        )
        add(
            "an attempt in another environment",
            file,
            {"record.attempts.-1.environment": "x", "attempts.-1.environment": "x"},
        )
        add(
            "an attempt with other policies",
            file,
            {"record.attempts.-1.policies": ["x"], "attempts.-1.policies": ["x"]},
        )
        add("fewer attempts than the record's", file, {"attempts": []})
        add("a failed test that passed", file, {"record.walk.-1.passed": False})
        add("no walk", file, {"record.walk": []})
        add("a walk of another threshold", file, {"record.walk.-1.delta": lambda x: x + 0.001})
        add("a walk of another policy", file, {"record.walk.-1.policy": "x"})
        add("a test twice", file, {"record.walk": lambda old: [*old, old[-1]]})
        add(
            "results that are not those of the walk",
            file,
            {"record.policies.0.episodes": fewer},
            {"record.policies.0.bound": lambda x: x / 2},
            {"record.policies.0.violations": lambda k: k + 1},
        )
        add("no policy", file, {"record.policies": []})
        add("a policy twice", file, {"record.policies": lambda old: old * 2})
        add(
            "no certified share of the starts",
            file,
            *({"record.start_share": one} for one in (0.0, -0.2, 1.2)),
        )
        add(
            "an intervention rate outside [0, 1]",
            file,
            *({"record.policies.0.intervention_rate": one} for one in (-0.1, 1.1)),
        )
        add(
            "a limit where a rate is promised",
            file,
            {"record.limit": 5.0, "record.kind": "violation"},
            {"record.cost_bound": 5.0},
        )
        add("another kind of promise", file, {"record.kind": "mean cost"}, {"record.kind": "x"})
        add("a horizon of no steps", file, {"record.horizon": 0}, {"record.horizon": -3})
        add("a negative seed", file, {"record.seed": -1})
        add("a date that is none", file, {"record.date": "yesterday"}, {"record.date": ""})
    for file in ("rate", "sequential", "above"):
        # SafeFQL's file has no delta beside that of its record.
        add(
            "delta that the walk did not reach",
            file,
            {"delta": 0.02, "record.delta": 0.02},
            {"delta": 0.0, "record.delta": 0.0},
        )
        add("delta negative", file, {"delta": -0.1, "record.delta": -0.1}, {"delta": -0.1})
        add("delta of another record", file, {"delta": 0.3})
        add(
            "a strictest threshold that failed",
            file,
            {"record.walk.0.passed": False, "record.walk.0.violations": 39},
        )
        add("a replacement of another record", file, {"record.replacement": "by magic"})
    add("fewer attempts than the record's", "rate", {"attempts": lambda old: old[:-1]})
    add("thresholds that do not fall", "rate", {"record.walk": lambda old: old[::-1]})
    add(
        "two attempts on the same seeds",
        "rate",
        {
            "attempts.1.first_seed": lambda _: 5,
            "record.attempts.1.first_seed": 5,
            "attempts.0.first_seed": 5,
            "record.attempts.0.first_seed": 5,
        },
    )
    add(
        "an attempt forgotten, its level kept",
        "rate",
        {"attempts": lambda old: old[1:], "record.attempts": lambda old: old[1:]},
    )
    add(
        "a level above what earlier attempts left",
        "rate",
        {"attempts.1.level": 0.6, "record.attempts.1.level": 0.6},
    )
    add(
        "an actor whose actions are replaced", "agent", {"record.policies.0.intervention_rate": 0.2}
    )
    add(
        "mean: a limit that is not epsilon times the bound",
        "mean",
        *({"record.limit": one} for one in (29.0, 0.0, 41.0, -1.0, None)),
        *({"record.cost_bound": one} for one in (40.0, 1000.0, 0.0, -1.0, None)),
    )
    add("mean: a bound that so few episodes cannot show", "mean", *both("bound", 1e-6, 0.0, -1.0))
    add("mean: a bound above the limit", "mean", *both("bound", 31.0, 41.0, 100.0))
    add(
        "mean: no cost, and yet more episodes",
        "mean",
        *(
            {
                f"record.{one}.{entry}": value
                for one in ("policies.0", "walk.-1")
                for entry, value in (("violations", 0), ("episodes", count))
            }
            for count in (500, 2)
        ),
    )
    for number, method in enumerate(("residuals", "shadow", "trial", "spliced")):

        def log(entry: str, *values: Any, at: int = number) -> list[dict[str, Any]]:  # noqa: ANN401
            return [{f"log_records.{at}.{entry}": one} for one in values]

        add(
            f"{method}: a bound that the counts do not give",
            "rate",
            *log("bound", lambda x: x * 0.9, lambda x: x * 1.01, 0.0, 1.0, -1.0),
        )
        add(
            f"{method}: negative counts",
            "rate",
            *log("events", -1),
            *log("episodes", -1),
            *log("cut", -1),
            *log("violating", -1),
            *log("failed", -1),
            *log("repeats", -1),
        )
        add(
            f"{method}: a part larger than the whole",
            "rate",
            *log("events", 10_000),
            *log("cut", 10_000),
            *log("episodes", 10_000),
            *log("violating", 10_000),
        )
        add(f"{method}: a log of another length", "rate", *log("held_out", 10_000, fewer))
        add(f"{method}: confidence", "rate", *log("confidence", 0.0, 1.0, -1.0, 0.99))
        add(f"{method}: fewer tries than remembered", "rate", *log("tries", 0, -1, 50))
        add(f"{method}: a level not spent", "rate", *log("spent", 0.0, 0.01, 1.5, -0.2))
        add(f"{method}: repeats that nobody remembers", "rate", *log("repeats", 1, 5))
        add(f"{method}: more failed than repeated", "rate", *log("failed", 1))
        add(f"{method}: another log's digest", "rate", *log("digest", "0" * 64))
        add(
            f"{method}: fields of another method",
            "rate",
            *log("lead", 3),
            *log("curve", [{"threshold": 0.0, "missed": 0, "false_alarms": 0}]),
        )
        another = "trial" if method == "spliced" else "spliced"
        add(f"{method}: another method", "rate", *log("method", "detection", another))
        add(
            f"{method}: an assumption that nobody can check",
            "rate",
            *log("assumptions", [], lambda old: [{**one, "checked": True} for one in old]),
        )
        add(f"{method}: attempts forgotten", "rate", {"log_attempts": []})
        add(f"{method}: a horizon of no steps", "rate", *log("horizon", 0))
    for number in (1, 2, 3):
        add("a rate that was not shown", "rate", {f"log_records.{number}.epsilon": 0.001})
        add("a statement about another delta", "rate", {f"log_records.{number}.delta": 0.7})
        add("a statement about another agent", "rate", {f"log_records.{number}.agent": "x"})
    add(
        "spliced: no simulator, or another one",
        "rate",
        {"log_records.3.simulator": ""},
        {"log_records.3.simulator": "another"},
        {"log_attempts.3.simulator": ""},
    )
    add(
        "spliced: another seed than that of the attempt",
        "rate",
        *({"log_records.3.seed": one} for one in (None, 7, -1)),
        {"log_attempts.3.seed": None},
    )
    add(
        "spliced: continuations that cannot be",
        "rate",
        *({"log_records.3.continued": one} for one in (-1, 10_000)),
        {"log_records.1.continued": 3},
        {"log_records.2.continued": 3},
    )
    for number in range(4):
        add(
            "a log attempt with another digest", "rate", {f"log_attempts.{number}.digest": "0" * 64}
        )
        add(
            "a log attempt at another level",
            "rate",
            *({f"log_attempts.{number}.level": one} for one in (0.0, 1.0, 0.01)),
        )
    add("held out unchecked, and said to be checked", "rate", {"training_episodes": None})
    add(
        "detection: a share other than alpha",
        "detection",
        {"log_records.0.bound": 0.1},
        {"log_records.0.alpha": 0.1},
        {"log_records.0.alpha": 0.1, "log_records.0.bound": 0.1},
    )
    add(
        "detection: delta that is not the threshold's",
        "detection",
        {"delta": 0.5, "log_records.0.delta": 0.5},
        {"log_records.0.threshold": -9.0},
        {"log_records.0.threshold": 9.0},
    )
    add(
        "detection: more missed than its rank allows",
        "detection",
        {"log_records.0.events": lambda k: k + 5},
        {"log_records.0.events": lambda n: n + 1},
    )
    add(
        "detection: a curve that turns",
        "detection",
        {"log_records.0.curve": lambda old: old[::-1]},
        {"log_records.0.curve.0.missed": 90},
        {"log_records.0.curve.-1.false_alarms": 10_000},
        {"log_records.0.curve": []},
    )
    add("detection: no lead", "detection", {"log_records.0.lead": 0}, {"log_records.0.lead": None})
    add(
        "detection: more episodes than violate",
        "detection",
        {"log_records.0.violating": 1},
        {"log_records.0.episodes": 39},
    )
    return found  # fmt: skip


def applied(header: Header, values: dict[str, Any]) -> Header:
    """Return a header with other values of some entries."""
    other = copy.deepcopy(header)
    for path, value in values.items():
        names = [int(one) if one.lstrip("-").isdigit() else one for one in path.split(".")]
        owner, last = at(other, tuple(names[:-1])), names[-1]
        old = owner.get(last) if isinstance(owner, dict) else owner[last]
        owner[last] = value(old) if callable(value) else value
    return other


# -- consistent forgeries, with a new digest -------------------------------------------------------


def forged(files: dict[str, Genuine]) -> Iterator[tuple[str, str, Genuine]]:
    """Yield what was forged, the name of the file, and its new contents."""

    def of(name: str, change: Callable[[Header], object]) -> tuple[str, Genuine]:
        file = files[name]
        header = copy.deepcopy(file.header)
        change(header)
        if header == file.header:
            raise AssertionError("nothing was forged")
        return name, file._replace(header=header)

    def chosen(header: Header, **values: Any) -> None:  # noqa: ANN401
        record = header["record"]
        for one in (record["policies"][0], record["walk"][-1]):
            one.update({k: v for k, v in values.items() if k in one})

    def cleaner(header: Header) -> None:
        """Have no or one violation, with the bound that they would give."""
        record = header["record"]
        level, count = record["attempts"][-1]["level"], record["policies"][0]["episodes"]
        fewer = 0 if record["policies"][0]["violations"] else 1
        chosen(header, violations=fewer, bound=upper_bound(count, fewer, 1.0 - level))

    def better_log(header: Header) -> None:
        one = header["log_records"][2]
        one.update(events=0, violating=0, cut=0)
        one["bound"] = upper_bound(one["episodes"], 0, one["confidence"])

    def first_attempt(header: Header) -> None:
        record = header["record"]
        own = {**record["attempts"][-1], "level": 1.0 - record["confidence"]}
        header["attempts"] = record["attempts"] = [own]
        count = record["policies"][0]["episodes"]
        for one in (*record["policies"], *record["walk"]):
            one["bound"] = upper_bound(count, one["violations"], record["confidence"])

    def renamed(header: Header) -> None:
        record = header["record"]
        for one in (record, *record["attempts"], *header["attempts"]):
            one["environment"] = "Plant-v9"

    def promoted(header: Header) -> None:
        record = header["record"]
        for one in (*record["policies"], *record["walk"], *record["pilot"]):
            one["policy"] = "the deployed agent"
        for one in (*record["attempts"], *header["attempts"]):
            one["policies"] = ["the deployed agent"]

    yield "other violations seen", *of("rate", cleaner)
    yield "an earlier attempt left out", *of("rate", first_attempt)
    for name in ("rate", "sequential", "mean", "above", "agent"):
        yield "another environment", *of(name, renamed)
        yield "another policy", *of(name, promoted)
        yield "all starts certified", *of(name, lambda h: h["record"].update(start_share=0.999))
        yield "longer episodes", *of(name, lambda h: h["record"].update(horizon=10_000))
        yield "another date", *of(name, lambda h: h["record"].update(date="2030-01-01"))
    for name in ("rate", "sequential", "above"):
        yield "fewer interventions", *of(name, lambda h: chosen(h, intervention_rate=0.0625))
        yield "another seed", *of(name, lambda h: h["record"].update(seed=77))
    yield "no violation behind the shield", *of("rate", better_log)
    yield "another agent's trained_by", *of("rate", lambda h: h.update(trained_by="FISOR"))
    yield "a statement left out", *of("rate", lambda h: h["log_records"].pop())
    for name, file in files.items():
        weights = {**file.arrays}
        which = next(one for one in sorted(weights) if one.endswith("weight"))
        weights[which] = weights[which] * np.float32(0.5)
        header = copy.deepcopy(file.header)
        for attempt in header.get("log_attempts", ()):
            attempt["shield"] = ""  # as in files of earlier releases
        forgery = file._replace(arrays=weights, header=header)
        yield "other weights under the same record", name, forgery


# -- the table ------------------------------------------------------------------------------------


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="make one in so many edits of entries")
    every = parser.parse_args().every
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in table(Path(name), key, other, every):
            print("| " + " | ".join(map(str, row)) + " |")


def table(
    folder: Path, key: Ed25519PrivateKey, other: Ed25519PrivateKey, every: int = 1
) -> list[tuple[Any, ...]]:
    """Return the rows of the table: what was done, number of files, number that load.

    Of the edits of single entries, one in `every` is made.
    """
    files = genuine(folder, key)
    public, path = key.public_key(), folder / "edited"
    rows: list[tuple[Any, ...]] = [("files", "edits", "load", "shown as")]
    shown = {read_signature(folder / name, public) for name in files}
    rows.append(("as they were signed, with the key", len(files), len(files), *shown))
    count = loads = again = 0
    for name, file in files.items():
        original = (folder / name).read_bytes()
        for _, header in itertools.islice(edited(file.header), 0, None, every):
            write_undigested(path, original, header)
            count, loads = count + 1, loads + (not refused(path))
            again += every == 1 and loads_digested(path, file, header)
    rows.append(("one entry edited, old digest", count, loads, ""))
    if every == 1:
        rows.append(("... the same edits, new digest", count, again, "possible records"))
    edits = impossible()
    passed = []
    for edit in edits:
        file = files[edit.file]
        write_tensors(path, file.arrays, applied(file.header, edit.values))
        passed += [] if refused(path) else [edit]
    kinds = len({edit.kind for edit in edits})
    rows.append((f"impossible, {kinds} kinds, new digest", len(edits), len(passed), passed or ""))
    cases = list(forged(files))
    for what, sign, keep, verify in (
        ("forged consistently, new digest, without a key", None, False, None),
        ("... with the key", None, False, public),
        ("... the old signature kept, with the key", None, True, public),
        ("... signed by somebody else, with the key", other, False, public),
    ):
        loads, shown = 0, set()
        for _, _, file in cases:
            write_tensors(path, file.arrays, file.header, sign)
            if keep:
                keep_signature(path, file.signature)
            if not refused(path, verify):
                loads += 1
                shown.add(read_signature(path))
        rows.append((what, len(cases), loads, *shown))
    for what, verify in (("more metadata, without a key", None), ("... with the key", public)):
        loads = count = 0
        for name in files:
            for entry in ("promise", "Safeshield", "safeshield2", ""):
                write_metadata(path, (folder / name).read_bytes(), entry, "no episode violates")
                count, loads = count + 1, loads + (not refused(path, verify))
        rows.append((what, count, loads, ""))
    return rows


def loads_digested(path: Path, file: Genuine, header: Header) -> bool:
    """Return whether a file with an edited header loads where its digest is renewed."""
    write_tensors(path, file.arrays, header)
    return not refused(path)


def read_signature(path: Path, key: Any = None) -> str:  # noqa: ANN401
    """Return what `safeshield inspect` and a shield say of the signature, which must agree."""
    from safeshield.cli.kinds import describe

    file = read_tensors(path)
    if key is not None:
        file.verify(key)
        return str(getattr(read(path, key), "signature", "signature verified"))
    said = str(describe(path)["signature"])
    if said != getattr(read(path), "signature", said):
        raise AssertionError(f"{path}: inspect says {said!r}, the shield does not")
    return said


def keep_signature(path: Path, signature: str) -> None:
    """Put the signature of other contents into a file."""
    write_with(path, path.read_bytes(), signature=signature)


if __name__ == "__main__":
    main()
