"""Fuzzing of every reader of files, guided by coverage: structural damage, and damage to bytes.

    pip install atheris
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --minutes 60            # all readers, in turn
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --targets npz --minutes 10
    python benchmarks/fuzz.py --quick                                  # some seconds, which CI runs
    python benchmarks/fuzz.py --reproduce NAME FILE                     # one input again

Each reader runs in a process of its own, with limits on memory and time, under Atheris (libFuzzer)
with all of safeshield instrumented. Corpora and findings are kept in a folder (``--folder``), from
which the next run continues. `mutations.py` has the structural damage. ``--quick`` needs no
Atheris: it mutates the seeds at random, without coverage.

A finding is an exception other than ValueError, OSError, LookupError itself (a constraint or a
controller that is not registered) or one of the package's own; an exception without a message; more
than 2 s of processor time; more memory than 4 times the file + 200 MB; or a file that loads with
other contents than another file that states the same digest. The process exits with status 1 where
there is one. What was found once becomes a test in tests/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden"
CPU_SECONDS = 2.0
EXTRA_BYTES = 200e6
RSS_MB = 3000
"""Limit of a process in which files are read."""
WALL_SECONDS = 120
"""Time by the clock after which one input ends the process."""

Seen = dict[str, str]
"""Contents by stated digest."""


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """Import safeshield so that Atheris sees its branches, in the process of a target."""
    if "atheris" not in sys.modules:
        yield
        return
    import atheris

    # What is imported here is not instrumented: it has no branches that a file decides.
    import h5py  # noqa: F401
    import torch  # noqa: F401

    with atheris.instrument_imports(include=["safeshield"]):
        yield


@dataclass(frozen=True)
class Target:
    """A reader."""

    name: str
    file: str
    """Name of the file that is damaged, under the folder of the try."""
    seeds: Callable[[Path], list[bytes]]
    """Makes honest files in a folder and returns their bytes."""
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, Seen], None]
    """Reads the file and uses what it holds; raises `Changed` where contents differ silently."""


class Changed(AssertionError):
    """A file that states the same digest as another loads with other contents."""


def same(seen: Seen, stated: object, found: str) -> None:
    """Compare contents with those of an earlier file that states the same digest."""
    if seen.setdefault(str(stated), found) != found:
        raise Changed(f"two contents have the digest {stated}")


# -- readers ---------------------------------------------------------------------------------------


def _golden(*names: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [one.read_bytes() for name in names for one in sorted(GOLDEN.glob(name))]


def _texts(*texts: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [text.encode() for text in texts]


def _model(path: Path, seen: Seen) -> None:
    """Compare the contents of a file of tensors."""
    from safeshield.files.tensors import content_digest, read_tensors

    file = read_tensors(path)
    same(seen, file.digest, content_digest(file.header, file.load(file.shapes, file.dtypes)))


def shield(path: Path, seen: Seen) -> None:
    """Load a shield, and filter an action."""
    from safeshield import Shield
    from safeshield.cli.kinds import describe

    made = Shield.load(path)
    _model(path, seen)
    describe(path)
    point = made.observation_space.sample()
    h = 0.0 if made.model.constraint is not None and not made.model.constraint.available else None
    made.filter(point, made.action_space.sample(), constraint=h)


def agent(path: Path, seen: Seen) -> None:
    """Load an agent, and let it act."""
    from safeshield.algorithms.registry import load_agent
    from safeshield.cli.kinds import describe

    made = load_agent(path)
    _model(path, seen)
    describe(path)
    made.predict(made.observation_space.sample())


def checkpoint(path: Path, seen: Seen) -> None:
    """Describe a checkpoint."""
    from safeshield.cli.kinds import describe

    describe(path)
    _model(path, seen)


def learner(path: Path, seen: Seen) -> None:
    """Read how far a learner has come."""
    from safeshield.collection.state import read_progress

    read_progress(path.parent)
    _model(path, seen)


def log(path: Path, seen: Seen) -> None:
    """Load a log, and make its card."""
    import numpy as np

    from safeshield import OfflineDataset
    from safeshield.cli.kinds import describe
    from safeshield.data.storage import read_log
    from safeshield.files.tensors import content_digest

    made = OfflineDataset.load(path)
    arrays = {key: np.array(value) for key, value in made._arrays().items()}
    told = [str(made.observation_space), str(made.action_space), made.constraint_kind]
    content = content_digest([*told, dict(made.provenance or {})], arrays)
    if made.verified:
        same(seen, read_log(path).stated, content)
    describe(path)


def flight(path: Path, seen: Seen) -> None:
    """Load a flight, its card and its columns, and convert it."""
    from safeshield.monitoring import FlightLog

    made = FlightLog.load(path.parent)
    made.card()
    _ = made.columns, made.ends
    made.to_jsonl(path.parent / "out.jsonl")
    if made.steps == "all":
        made.to_dataset()


def ledger(path: Path, seen: Seen) -> None:
    """Continue a monitor, merge it with itself, and report."""
    from safeshield.monitoring import PromiseMonitor

    monitor = PromiseMonitor(calibrated(), path)
    monitor.report().to_json()
    monitor.counted()
    PromiseMonitor.merged(calibrated(), [path, path]).report()
    monitor.episode("another", False)


def report(path: Path, seen: Seen) -> None:
    """Make the page of an assessor of a flight or a ledger, by the first byte of the file."""
    from safeshield.reporting.report import safety_report

    raw = path.read_bytes()
    given: dict[str, Any] = {}
    if raw[:1] == b"{":
        given["monitors"] = [path]
    else:
        folder = path.parent / "flight"
        folder.mkdir(exist_ok=True)
        (folder / "000001.flight").write_bytes(raw)
        given["flight"] = folder
    safety_report(calibrated(), **given)


def settings(path: Path, seen: Seen) -> None:
    """Read settings of two algorithms; a text that begins with "#yaml" is YAML, another TOML."""
    from safeshield.algorithms.behaviour_cloning import BehaviourCloningConfig
    from safeshield.algorithms.safefql import SafeFQLConfig
    from safeshield.cli.settings import read_settings

    raw = path.read_bytes()
    named = path.with_suffix(".yaml" if raw[:5] == b"#yaml" else ".toml")
    named.write_bytes(raw)
    errors = []
    for kind in (BehaviourCloningConfig, SafeFQLConfig):
        try:
            kind(**read_settings(named, kind))
        except ValueError as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


def sweep(path: Path, seen: Seen) -> None:
    """Read the file of a sweep; a text that begins with "#yaml" is YAML, another TOML."""
    from safeshield.cli.sweep_plan import read_plan

    raw = path.read_bytes()
    named = path.with_suffix(".yaml" if raw[:5] == b"#yaml" else ".toml")
    named.write_bytes(raw)
    (path.parent / "log.npz").touch()
    read_plan(named)


def probe(path: Path, seen: Seen) -> None:
    """Load the worst agent that a search found, and let it act."""
    import numpy as np

    from safeshield.evaluation.falsification import load_probe

    made = load_probe(path, calibrated())
    made(np.zeros((1, 2), np.float32), np.random.default_rng(0))


def curve(path: Path, seen: Seen) -> None:
    """Read a training curve; a text that begins with a brace is JSONL, another CSV."""
    from safeshield.evaluation.curves import read_curve

    raw = path.read_bytes()
    named = path.with_suffix(".jsonl" if raw[:1] == b"{" else ".csv")
    named.write_bytes(raw)
    read_curve(named)


def onnx(path: Path, seen: Seen) -> None:
    """Read what a graph says of itself."""
    from safeshield.shield.export import read_onnx

    contents = read_onnx(path)
    assert contents.promise is not None


def key(path: Path, seen: Seen) -> None:
    """Read a public and a private key."""
    from safeshield.files.signing import check_signature, signature_of

    with contextlib.suppress(ValueError):
        signature_of("0" * 64, path)
    with contextlib.suppress(ValueError):
        check_signature("a file", "0" * 64, "00" * 64, path)


_CALIBRATED: list[Any] = []


def calibrated() -> Any:  # noqa: ANN401 - safeshield is not imported yet
    """Return a small calibrated shield of the cart."""
    from safeshield import Shield

    if not _CALIBRATED:
        _CALIBRATED.append(Shield.load(GOLDEN / "shield_calibrated.safetensors"))
    return _CALIBRATED[0]


def _logs(suffix: str) -> Callable[[Path], list[bytes]]:
    def make(folder: Path) -> list[bytes]:
        from safeshield import OfflineDataset

        log = OfflineDataset.load(GOLDEN / "log.npz")
        made = []
        for which in ([0], [0, 1]):
            log.select(which).save(folder / f"log{suffix}")
            made.append((folder / f"log{suffix}").read_bytes())
        return made

    return make


def _learner(folder: Path) -> list[bytes]:
    import numpy as np

    from safeshield.files.tensors import write_tensors

    arrays = {"episodes.returns": np.ones(2, "f4"), "episodes.costs": np.zeros(2, "f4")}
    header = {
        "format": "safeshield-learner", "updates": 3, "segments": 0, "price": 0.5,
        "statistics": {"rewards": {"mean": 0.0, "variance": 1.0, "count": 9.0}},
    }  # fmt: skip
    write_tensors(folder / "state.safetensors", arrays, header)
    return [(folder / "state.safetensors").read_bytes()]


def _flights(folder: Path) -> list[bytes]:
    import campaign

    from safeshield.monitoring import ShieldLog

    made = []
    for steps in ("all", "interventions"):
        log = ShieldLog(folder / steps, steps, block_steps=16)  # type: ignore[arg-type]
        with log, contextlib.closing(campaign.shielded(log=log)) as env:
            campaign.play(env, 60, 0)
        made.append((folder / steps / "000001.flight").read_bytes())
    return made


def _ledgers(folder: Path) -> list[bytes]:
    from safeshield.monitoring import PromiseMonitor

    made = []
    for reference in (None, {"start value": [0.1, 0.2, 0.3], "steps": [1.0, 2.0, 3.0]}):
        path = folder / f"{len(made)}.json"
        monitor = PromiseMonitor(calibrated(), path, reference=reference)
        for i in range(4):
            monitor.episode(f"e{i}", i == 2, cut=i == 1)
        made.append(path.read_bytes())
    return made


def _onnx(folder: Path) -> list[bytes]:
    calibrated().export_onnx(folder / "shield.onnx")
    return [(folder / "shield.onnx").read_bytes()]


def _keys(folder: Path) -> list[bytes]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Ed25519PrivateKey.from_private_bytes(bytes(32))
    kinds = form.PrivateFormat.PKCS8, form.NoEncryption()
    public = form.PublicFormat.SubjectPublicKeyInfo
    return [
        made.private_bytes(form.Encoding.PEM, *kinds),
        made.public_key().public_bytes(form.Encoding.PEM, public),
    ]


def _probes(folder: Path) -> list[bytes]:
    from safeshield.evaluation.probes import Probe, weight_count

    count = weight_count(calibrated())
    Probe("ridge", 0.1, (0.5,) * count, 0.1, 4).save(folder / "probe.json", {"found": {}})
    return [(folder / "probe.json").read_bytes()]


def _curves(folder: Path) -> list[bytes]:
    from safeshield.evaluation.curves import CurvePoint, write_curve

    point = CurvePoint(10, "all", 4, 1.5, 0.5, 1, (0, 1), True)
    made = []
    for suffix in (".csv", ".jsonl"):
        write_curve(folder / f"curve{suffix}", [point] * 3)
        made.append((folder / f"curve{suffix}").read_bytes())
    return made


def _either(
    one: Callable[[bytes, random.Random], bytes],
    other: Callable[[bytes, random.Random], bytes],
    first: bytes,
) -> Callable[[bytes, random.Random], bytes]:
    """Return a mutator that calls `one` for a file that begins with `first`, else `other`."""
    return lambda raw, rng: (one if raw.startswith(first) else other)(raw, rng)


def targets() -> dict[str, Target]:
    """Return the readers by name."""
    import mutations as by

    json_or_flight = _either(by.mutate_json, by.mutate_flight, b"{")
    toml = "hidden = [64, 64]\nseed = 3\nlearning_rate = 3e-4\nbatch_size = 8\n"
    yaml = "#yaml\nseed: 3\nphase_shares: [0.8, 0.05, 0.15]\nteacher: behaviour\ncandidates: 4\n"
    swept = (
        'algorithm = "bc"\nlogs = ["log.npz"]\nsteps = 10\nseeds = [0]\n[vary]\n'
        "hidden = [[8], [9]]\n"
    )
    swept_yaml = (
        "#yaml\nalgorithm: safefql\nlogs: [log.npz]\nsteps: 10\nseeds: [0]\nvary:\n"
        "  learning_rate: {low: 1.0e-4, high: 1.0e-3, log: true}\n  batch_size: [8, 16]\n"
        "trials: 3\nenv: safeshield/DoubleIntegrator-v0\n"
    )
    tensors, text = by.mutate_tensors, by.mutate_text
    curves = _either(by.mutate_json_lines, text, b"{")
    made = [
        Target("shield", "s.safetensors", _golden("shield_*", "formats/shield_*"), tensors, shield),
        Target("agent", "a.safetensors", _golden("agent_*"), tensors, agent),
        Target("checkpoint", "c.safetensors", _golden("checkpoint_*"), tensors, checkpoint),
        Target("learner", "state.safetensors", _learner, tensors, learner),
        Target("npz", "log.npz", _logs(".npz"), by.mutate_npz, log),
        Target("hdf5", "log.hdf5", _logs(".hdf5"), by.mutate_hdf5, log),
        Target("flight", "000001.flight", _flights, by.mutate_flight, flight),
        Target("ledger", "promise.json", _ledgers, by.mutate_json, ledger),
        Target("report", "input", lambda f: [*_flights(f), *_ledgers(f)], json_or_flight, report),
        Target("settings", "settings.txt", _texts(toml, yaml), text, settings),
        Target("sweep", "sweep.txt", _texts(swept, swept_yaml), text, sweep),
        Target("probe", "probe.json", _probes, by.mutate_json, probe),
        Target("curve", "curve.txt", _curves, curves, curve),
        Target("onnx", "shield.onnx", _onnx, by.mutate_onnx, onnx),
        Target("key", "key.pem", _keys, text, key),
    ]
    return {one.name: one for one in made}


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Damage bytes, lengths, blocks or ends."""
    import numpy as np
    from campaign import mutated

    return mutated(raw, np.random.default_rng(rng.getrandbits(64)))


# -- one input -------------------------------------------------------------------------------------


class Judge:
    """Reads inputs of one target, and keeps what is found, once for each place in the code."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.findings: dict[str, str] = {}
        self.place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.seen: Seen = {}
        self.peak = 0.0
        self.executed = 0
        folder.mkdir(parents=True, exist_ok=True)

    def seeds(self) -> list[bytes]:
        """Return the target's honest files, each of which must be read without an error."""
        made = self.target.seeds(self.place)
        path = self.place / self.target.file
        for raw in made:
            path.write_bytes(raw)
            # A constraint or a controller may be one that is registered nowhere.
            with warnings.catch_warnings(), contextlib.suppress(LookupError):
                warnings.simplefilter("ignore")
                self.target.read(path, self.seen)
        return made

    def __call__(self, raw: bytes) -> None:
        """Read one input."""
        self.executed += 1
        for one in self.place.iterdir() if self.executed % 50 == 0 else ():
            shutil.rmtree(one) if one.is_dir() else one.unlink()
        path = self.place / self.target.file
        path.write_bytes(raw)
        before, used = self._peak(), time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.read(path, self.seen)
        except Exception as error:
            self._judge(error, raw)
        if time.process_time() - used > CPU_SECONDS:
            self._found("hang", f"{time.process_time() - used:.1f} s of processor time", raw)
        self.peak = max(self.peak, self._peak() - before)
        if self._peak() - before > 4 * len(raw) + EXTRA_BYTES:
            self._found("memory", f"{(self._peak() - before) / 1e6:.0f} MB", raw)

    @staticmethod
    def _peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _judge(self, error: Exception, raw: bytes) -> None:
        known = isinstance(error, ValueError | OSError | ImportError) or type(error) is LookupError
        own = type(error).__module__.startswith("safeshield")
        if (known or own) and str(error):
            return
        frames = traceback.extract_tb(error.__traceback__)
        inside = [one for one in frames if f"{os.sep}fuzz.py" not in one.filename]
        at = inside[-1] if inside else frames[-1]
        name = f"{type(error).__name__}-{Path(at.filename).stem}-{at.lineno}"
        self._found(name, "".join(traceback.format_exception(error))[-3000:], raw)

    def _found(self, name: str, text: str, raw: bytes) -> None:
        if name in self.findings:
            return
        self.findings[name] = text.strip().splitlines()[-1][:200]
        (self.folder / f"{name}.input").write_bytes(raw)
        (self.folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")


def mutate(target: Target, raw: bytes, rng: random.Random) -> bytes:
    """Change a file in its structure, or where it is none any more, in its bytes."""
    if rng.random() < 0.75:
        with contextlib.suppress(Exception):
            return target.mutate(raw, rng)
    return damaged(raw, rng)


# -- the processes ---------------------------------------------------------------------------------


def child(name: str, folder: Path, seconds: int) -> None:
    """Fuzz one target with Atheris; this is a process of its own."""
    import atheris

    with instrumented():
        sys.path.insert(0, str(HERE))
        target = targets()[name]
        judge = Judge(target, folder / "findings")
        seeds = folder / "seeds"
        seeds.mkdir(parents=True, exist_ok=True)
        # Seeds are read here, so that what readers import when they run is instrumented too.
        for number, raw in enumerate(judge.seeds()):
            (seeds / f"{number:03d}").write_bytes(raw)
            judge(raw)
            for at in range(20):
                judge(mutate(target, raw, random.Random(at)))

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.75:
            with contextlib.suppress(Exception):
                made = target.mutate(data, rng)
                if len(made) <= most:
                    return made
        return atheris.Mutate(data, most)

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    options = [
        f"-max_total_time={seconds}", f"-rss_limit_mb={RSS_MB}", f"-timeout={WALL_SECONDS}",
        "-max_len=1048576", "-len_control=0", "-print_final_stats=1", "-use_value_profile=0",
        f"-artifact_prefix={folder / 'findings'}{os.sep}", str(corpus), str(seeds),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], judge, custom_mutator=mutator)
    atheris.Fuzz()


@dataclass
class Result:
    """What the fuzzing of one target came to."""

    executions: int = 0
    first: int = 0
    """Branches that the seeds reach."""
    last: int = 0
    """Branches that are reached in the end."""
    corpus: int = 0
    findings: int = 0


def fuzzed(name: str, folder: Path, seconds: float) -> Result:
    """Fuzz one target for some time; a process that dies is started again."""
    folder.mkdir(parents=True, exist_ok=True)
    found, until = Result(), time.monotonic() + seconds
    while (left := int(until - time.monotonic())) > 1:
        command = [sys.executable, str(HERE / "fuzz.py"), "--child", name]
        command += ["--folder", str(folder), "--seconds", str(left)]
        with (folder / "output.txt").open("w", encoding="utf-8") as out:
            run = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
        text = (folder / "output.txt").read_text("utf-8", errors="replace")
        counts = [(int(n), int(cov)) for n, cov in re.findall(r"#(\d+)\s+\w+\s+cov: (\d+)", text)]
        if not counts:
            raise RuntimeError(f"{name}: nothing ran: {text[-2000:]}")
        found.executions += max(n for n, _ in counts)
        found.first = found.first or counts[0][1]
        found.last = max(found.last, counts[-1][1])
        if run.returncode == 0:
            break
    found.corpus = len(list((folder / "corpus").iterdir()))
    found.findings = sum(one.suffix != ".txt" for one in (folder / "findings").iterdir())
    return found


def quick(tries: int, seed: int, names: list[str]) -> dict[str, dict[str, str]]:
    """Read some mutations of each target's seeds here, and return what was found by target."""
    found = {}
    for name in names:
        target = targets()[name]
        with tempfile.TemporaryDirectory() as folder:
            judge = Judge(target, Path(folder))
            seeds = judge.seeds()
            for number in range(tries):
                rng = random.Random(f"{seed} {name} {number}")
                raw = rng.choice(seeds)
                for _ in range(rng.choice((1, 1, 2))):
                    raw = mutate(target, raw, rng)
                judge(raw)
            shutil.rmtree(judge.place, ignore_errors=True)
        found[name] = judge.findings
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--folder", type=Path, default=Path("fuzzing"), help="corpora and findings")
    parser.add_argument("--targets", nargs="+", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="some seconds, no coverage")
    parser.add_argument("--tries", type=int, default=40, help="mutations of each, with --quick")
    parser.add_argument("--seed", type=int, default=0, help="seed with --quick")
    parser.add_argument("--reproduce", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder, given.seconds)
        return
    sys.path.insert(0, str(HERE))
    if given.reproduce:
        name, file = given.reproduce
        judge = Judge(targets()[name], given.folder / name / "findings")
        judge.seeds()  # Imports must not count.
        judge(Path(file).read_bytes())
        print(json.dumps(judge.findings, indent=1) if judge.findings else "nothing was found")
        sys.exit(bool(judge.findings))
    known = list(targets())
    names = given.targets or known
    if not set(names) <= set(known):
        parser.error(f"--targets must be some of {', '.join(known)}, got {' '.join(names)}")
    if given.quick:
        found = quick(given.tries, given.seed, names)
        for name, findings in found.items():
            print(f"{name}: {given.tries} tries, {len(findings)} findings", *findings.items())
        sys.exit(any(found.values()))
    try:
        import atheris  # noqa: F401
    except ImportError:
        parser.error("Atheris is not installed: pip install atheris, or pass --quick")
    print("| reader | executions | branches, seeds | branches, end | corpus | findings |")
    print("|---|---|---|---|---|---|", flush=True)
    broken = False
    for name in names:
        one = fuzzed(name, given.folder.absolute() / name, given.minutes * 60 / len(names))
        counts = f"{one.executions:,} | {one.first} | {one.last} | {one.corpus} | {one.findings}"
        print(f"| {name} | {counts} |", flush=True)
        broken = broken or one.findings > 0
    sys.exit(broken)


if __name__ == "__main__":
    main()
