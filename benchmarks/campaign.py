"""A campaign against the package: damaged files, hostile objects, kills, disks, two processes.

    OMP_NUM_THREADS=1 python benchmarks/campaign.py           # the table of docs/reliability.md
    OMP_NUM_THREADS=1 python benchmarks/campaign.py --quick   # some seconds, which CI runs
    ... --rows files objects --scale 0.1                      # some rows, with a tenth of the tries

Each row is a function of the number of tries, a folder and a seed. It returns counts, all of which
must be 0. The process exits with status 1 where one is not. It needs POSIX: tries run in forked
processes, which are killed, limited and watched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import safeshield.envs  # noqa: F401 - registers the environments
from safeshield import OfflineDataset, SafetyShield, Shield, ShieldedPolicy
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.registry import load_agent
from safeshield.cli.settings import read_settings
from safeshield.files.lock import claimed
from safeshield.files.tensors import content_digest, read_tensors
from safeshield.monitoring import FlightLog, ShieldLog
from safeshield.wrappers import VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CART = "safeshield/DoubleIntegrator-v0"
NOBODY = 65534
Counts = dict[str, int]
Array = np.ndarray


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    """Name for ``--rows``; rows of one name run together."""
    what: str
    """What is tried."""
    tries: int
    """Number of tries of the long form."""
    quick: int
    """Number of tries of the quick form."""
    run: Callable[[int, Path, int], Counts]
    """Function of the number of tries, an empty folder and a seed."""


# -- processes ------------------------------------------------------------------------------------


def forked(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Run `work` in a forked process; return its id and the descriptor of what it tells.

    The function gets a function that tells one line. An error is told as "error: ...".
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 0
    try:
        os.close(reading)
        work(lambda line: os.write(writing, f"{line}\n".encode()) and None)
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        os.write(writing, f"error: {text}\n".encode())
        code = 1
    os._exit(code)


def finished(child: int, reading: int, seconds: float = 600.0) -> tuple[list[str], int]:
    """Return the lines that a forked process told, and its status; it is killed when it is late."""
    told, until = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        told += part
    os.close(reading)
    return told.decode(errors="replace").splitlines(), os.waitpid(child, 0)[1]


def apart(work: Callable[[Callable[[str], None]], None], seconds: float = 600.0) -> list[str]:
    """Run `work` in a forked process to its end, and return the lines that it told."""
    return finished(*forked(work), seconds)[0]


# -- files ----------------------------------------------------------------------------------------


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes of a file with one kind of damage, or with up to three."""
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 1):
        raw = _damaged(raw, rng)
    return raw


def _damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    size = len(raw)
    if not size:
        return b"\0"
    # Half of the damage hits the ends, where headers and tables of contents are.
    at = int(rng.integers(size)) if rng.random() < 0.5 else int(rng.integers(min(size, 2000)))
    if rng.random() < 0.25:
        at = size - 1 - at
    length = int(min(size - at, 2 ** rng.integers(0, 10)))
    data = bytearray(raw)
    kind = int(rng.integers(9))
    if kind <= 1:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[at] = int(rng.integers(256))
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = rng.bytes(length)
    elif kind == 6:
        data[at : at + length] = bytes(length)
    elif kind == 7:
        data[at:at] = data[at : at + length]
    else:
        wide = [0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1][int(rng.integers(6))]
        data[at : at + 8] = struct.pack("<Q", wide)
    return bytes(data)


def read_log(path: Path) -> str:
    """Return a digest of all that a log holds."""
    log = OfflineDataset.load(path)
    made = [str(log.observation_space), str(log.action_space), log.constraint_kind]
    arrays = {key: np.array(value) for key, value in log._arrays().items()}
    return content_digest([*made, log.constraint_source, dict(log.provenance or {})], arrays)


def read_model(path: Path) -> str:
    """Return a digest of the header and the tensors of an agent, a shield or a checkpoint."""
    file = read_tensors(path)
    return content_digest(file.header, file.load(file.shapes, file.dtypes))


def read_shield(path: Path) -> str:
    """Return the digest of a shield's file, after the shield was made."""
    Shield.load(path)
    return read_model(path)


def read_agent(path: Path) -> str:
    """Return the digest of an agent's file, after the agent was made."""
    load_agent(path)
    return read_model(path)


def read_flight(path: Path) -> str:
    """Return a digest of a flight; what is lost or torn is told by its card, so it is not silent.

    `path` is the folder of the recorder.
    """
    flight = FlightLog.load(path)
    rows = flight.rows
    told = f"{flight.lost} {flight.torn} {flight.closed}"
    return "lost" if told != "0 0 True" else f"{len(rows)} {hash(rows.tobytes())}"


def read_toml(path: Path) -> str:
    """Read a file of settings, whose other contents are other settings."""
    read_settings(path, BehaviourCloningConfig)
    return ""


@dataclass(frozen=True)
class Format:
    """One format of files."""

    name: str
    make: Callable[[Path], Path]
    """Writes an honest file into a folder and returns its path."""
    read: Callable[[Path], str]
    """Reads a file and returns a digest of its contents."""
    inside: str = ""
    """Name of the file in the folder that `read` takes; empty where it takes a file."""


def _golden(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(GOLDEN / name, folder / name))


def _log(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"log{suffix}"
        OfflineDataset.load(GOLDEN / "log.npz").select([0, 1]).save(path)
        return path

    return make


def _flight(folder: Path) -> Path:
    with ShieldLog(folder / "flight") as log, contextlib.closing(shielded(log=log)) as env:
        play(env, 100, 0)
    return folder / "flight"


def _toml(folder: Path) -> Path:
    path = folder / "settings.toml"
    path.write_text("hidden = [64, 64]\nseed = 3\nlearning_rate = 3e-4\n")
    return path


FORMATS = [
    Format("shield", _golden("shield_calibrated.safetensors"), read_shield),
    Format("agent", _golden("agent_bc.safetensors"), read_agent),
    Format("checkpoint", _golden("checkpoint_bc.safetensors"), read_model),
    Format("HDF5 log", _log(".hdf5"), read_log),
    Format("NPZ log", _log(".npz"), read_log),
    Format("flight", _flight, read_flight, "000001.flight"),
    Format("settings", _toml, read_toml),
]
EXPECTED = (ValueError, TypeError, OSError, LookupError, FloatingPointError)
CODE = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")
CPU_SECONDS = 2.0
EXTRA_BYTES = 200e6


def files_of(form: Format) -> Callable[[int, Path, int], Counts]:
    """Return the row of one format."""

    def run(tries: int, folder: Path, seed: int) -> Counts:
        whole = form.make(folder)
        honest = form.read(whole)
        target = whole / form.inside if form.inside else whole
        raw = target.read_bytes()
        counts = dict.fromkeys(("crash", "hang", "code run", "silent change", "memory"), 0)
        done = 0
        while done < tries:
            first, known = done, Counter[str]()

            def work(tell: Callable[[str], None], first: int = first) -> None:
                _read_some(form, whole, target, raw, honest, range(first, tries), seed, tell)

            # A process that works for long on one file is late by the clock of a busy machine.
            child, reading = forked(work)
            lines, status = finished(child, reading, seconds=1e6)
            for line in lines:
                name = line.partition(" ")[0]
                if name == "at":
                    done += 1
                else:
                    known[line.split(":")[0]] += 1
                    print(f"  {form.name}: {line}", file=sys.stderr)
            for name, number in known.items():
                counts[name if name in counts else "crash"] += number
            if os.WIFSIGNALED(status):
                hung = os.WTERMSIG(status) == signal.SIGXCPU
                counts["hang" if hung else "crash"] += 1
                print(f"  {form.name}: signal {os.WTERMSIG(status)} at {done}", file=sys.stderr)
                done += 1
            elif done == first:
                raise RuntimeError(f"{form.name}: nothing was read: {lines}")
        return counts

    return run


def _read_some(
    form: Format,
    whole: Path,
    target: Path,
    raw: bytes,
    honest: str,
    which: range,
    seed: int,
    tell: Callable[[str], None],
) -> None:
    """Read mutations of a file, and tell of each "at NUMBER", and before it what is wrong."""
    ran: list[str] = []
    sys.addaudithook(lambda event, _: ran.append(event) if event in CODE else None)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    most = 4 * len(raw) + EXTRA_BYTES
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in which:
        target.write_bytes(mutated(raw, np.random.default_rng([seed, number])))
        used = time.process_time()
        # Ten times the limit kills the process; the limit itself is only counted.
        soft = int(used + 10 * CPU_SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        ran.clear()
        try:
            found = form.read(whole)
            if found not in (honest, "lost"):
                tell(f"silent change: at {number}")
        except EXPECTED as error:
            if not str(error):
                tell(f"crash: at {number}: {type(error).__name__} without a message")
        except Exception as error:
            tell(f"crash: at {number}: {type(error).__name__}: {error!s:.200}".replace("\n", " "))
        if time.process_time() - used > CPU_SECONDS:
            tell(f"hang: at {number}: {time.process_time() - used:.1f} s")
        if ran:
            tell(f"code run: at {number}: {ran[:3]}")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if after - before > most:
            tell(f"memory: at {number}: {(after - before) / 1e6:.0f} MB")
            before = after
        tell(f"at {number}")
        if number % 1000 == 999:
            return  # A fresh process, whose limit of CPU time and peak of memory begin again.


# -- objects --------------------------------------------------------------------------------------


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps what the plant has received, and fails or lies as it is told."""

    def __init__(self, env: gym.Env[Any, Any], rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(env)
        self.rate, self.rng = rate, np.random.default_rng(seed)
        self.received: list[Any] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        """Reset the plant, or fail."""
        if self.rng.random() < self.rate:
            raise RuntimeError("the plant failed in reset")
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Move the plant; then fail, return a wrong observation, or do as asked."""
        self.received.append((type(action), np.array(action)))
        observation, reward, terminated, truncated, info = self.env.step(np.array(action))
        chance = self.rng.random() / self.rate if self.rate else 1.0
        if chance < 0.3:
            raise RuntimeError("the plant failed after it moved")
        if chance < 0.5:
            return observation[:1], reward, terminated, truncated, info
        if chance < 1.0:
            observation = np.full_like(observation, np.nan)
        # Whoever keeps the array that it was given finds another one in it.
        if isinstance(action, np.ndarray) and action.flags.writeable:
            action[...] = 9
        return observation, reward, terminated, truncated, info


def shield() -> Shield:
    """Return a small calibrated shield of the cart."""
    return Shield.load(GOLDEN / "shield_calibrated.safetensors")


def cart(**watched: Any) -> Watched:  # noqa: ANN401
    """Return a watched cart."""
    return Watched(gym.make(CART), **watched)


def shielded(log: ShieldLog | None = None, **watched: Any) -> SafetyShield:  # noqa: ANN401
    """Return a watched cart behind the shield."""
    return SafetyShield(cart(**watched), shield(), log=log)


def play(env: gym.Env[Any, Any], steps: int, seed: int) -> None:
    """Take random steps."""
    env.action_space.seed(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()


class Changes:
    """Another action at each reading."""

    def __init__(self, action: Array) -> None:
        self.action, self.readings = action, 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:  # noqa: ANN401
        self.readings += 1
        return self.action if self.readings == 1 else np.full_like(self.action, 9)

    def __deepcopy__(self, memo: object) -> Array:
        return np.full_like(self.action, 9)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return np.full_like(self.action, 9)[index]

    def __len__(self) -> int:
        return len(self.action)

    def __float__(self) -> float:
        return 9.0


class Lies(np.ndarray):
    """An array whose methods tell of another one."""

    def _other(self, *_: Any, **__: Any) -> Array:  # noqa: ANN401
        return np.full(self.shape, 9.0)

    copy = __copy__ = __deepcopy__ = astype = reshape = ravel = flatten = tolist = _other  # type: ignore[assignment]
    clip = round = squeeze = view = _other  # type: ignore[assignment]


class LiesInUfuncs(np.ndarray):
    """An array that compares as if it were allowed."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:  # noqa: ANN401
        return np.ones(self.shape, bool)

    def __array_function__(self, *_: Any) -> Any:  # noqa: ANN401
        return np.zeros(self.shape)


class Interface:
    """An object of NumPy's interface protocol, whose memory changes."""

    def __init__(self, action: Array) -> None:
        self.kept = action.copy()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.kept.__array_interface__


class Listed(list):  # type: ignore[type-arg]
    """A list that is another one when it is read again."""

    def __iter__(self) -> Iterator[Any]:
        values = list(super().__iter__())
        self[:] = [9.0] * len(values)
        return iter(values)


class LyingFloat(float):
    """A number that is another one when it is converted."""

    def __float__(self) -> float:
        return 9.0


class Raises:
    """An object that fails when it is read."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:  # noqa: ANN401
        raise RuntimeError("unreadable")


def _late(action: Array) -> Array:
    """Return a view of memory that another view changes as soon as it is copied."""
    base = np.concatenate([action.ravel(), [9.0]])
    return np.lib.stride_tricks.as_strided(base, action.shape, (base.itemsize,) * action.ndim)


KINDS: Mapping[str, Callable[[Array], Any]] = {
    "float32": lambda a: a.astype("f4"),
    "float64": lambda a: a.astype("f8"),
    "float16": lambda a: a.astype("f2"),
    "long double": lambda a: a.astype(np.longdouble),
    "big endian": lambda a: a.astype(">f8"),
    "list": lambda a: a.tolist(),
    "nested tuples": lambda a: tuple(map(tuple, a)) if a.ndim > 1 else tuple(a.tolist()),
    "read-only": lambda a: _frozen(a.copy()),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "overlapping memory": _late,
    "masked": lambda a: np.ma.masked_array(a, mask=True),
    "half masked": lambda a: np.ma.masked_greater(a.copy(), 0),
    "matrix": lambda a: np.asmatrix(a) if a.ndim > 1 else a,
    "record": lambda a: np.rec.array(a),
    "changes": Changes,
    "lies": lambda a: a.copy().view(Lies),
    "lies in ufuncs": lambda a: a.copy().view(LiesInUfuncs),
    "interface": Interface,
    "list read once": lambda a: Listed(a.tolist()),
    "lying floats": lambda a: np.vectorize(LyingFloat, otypes=[object])(a).tolist(),
    "objects": lambda a: a.astype(object),
    "strings": lambda a: a.astype(str),
    "bytes": lambda a: a.astype("S8"),
    "structured": lambda a: np.zeros(a.shape, [("x", "f8")]),
    "complex": lambda a: a.astype(complex) + 9j,
    "dates": lambda a: np.zeros(a.shape, "M8[s]"),
    "bools": lambda a: a > 0,
    "NaN": lambda a: np.full_like(a, np.nan),
    "infinity": lambda a: np.full_like(a, np.inf),
    "beyond the box": lambda a: np.full_like(a, 9.0),
    "beyond float32": lambda a: np.full(a.shape, 1e300),
    "subnormal": lambda a: np.full(a.shape, 1e-310),
    "integers": lambda a: np.ones(a.shape, np.int64),
    "huge integers": lambda a: np.full(a.shape, 2**64 - 1, np.uint64),
    "tensor": torch.as_tensor,
    "tensor with a gradient": lambda a: torch.tensor(a, requires_grad=True),
    "memoryview": lambda a: memoryview(np.ascontiguousarray(a)),
    "empty": lambda a: np.zeros((0,)),
    "another shape": lambda a: np.zeros((*a.shape, 2)),
    "none": lambda a: None,
    "dict": lambda a: {"action": a},
    "generator": lambda a: (x for x in a),
    "unreadable": lambda a: Raises(),
}


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def unjudged(
    judge: Shield, seen: Array, got: tuple[type, Array], executed: Array, intervened: bool
) -> bool:
    """Return whether an action reached the plant that the shield has not judged.

    Args:
        judge: The shield.
        seen: The observation in which the action was taken.
        got: Type and value of what the plant received.
        executed: What the infos say was executed.
        intervened: Whether they say that it is a replacement.
    """
    kind, action = got
    space = judge.action_space
    if kind is not np.ndarray or action.dtype != space.dtype or action.shape != space.shape:
        return True
    if not (np.isfinite(action).all() and np.array_equal(action, executed)):
        return True
    if intervened or not np.isfinite(seen).all():
        return not bool(space.contains(action))
    return bool(judge.filter(seen, action)[1].intervened)


def _behind(kind: str, deceive: Callable[[Array], Any]) -> Callable[[Shield, Array], int]:
    """Return a function that sends an action through one entry point, and counts the unjudged."""

    def single(judge: Shield, action: Array) -> int:
        env = shielded()
        plant = env.env
        assert isinstance(plant, Watched)
        seen, _ = env.reset(seed=int(1e6 * abs(action[0])) % 1000)
        *_, info = env.step(deceive(action))
        told = info["action_executed"], info["shield/intervened"]
        return int(unjudged(judge, seen, plant.received[-1], *told))

    def vector(judge: Shield, action: Array) -> int:
        plants = [cart(), cart()]
        env = VectorSafetyShield(gym.vector.SyncVectorEnv([lambda p=p: p for p in plants]), judge)
        seen, _ = env.reset(seed=0)
        *_, infos = env.step(deceive(np.stack([action, -action])))
        told = infos["action_executed"], infos["shield/intervened"]
        return sum(
            unjudged(judge, seen[i], plants[i].received[-1], told[0][i], bool(told[1][i]))
            for i in range(2)
        )

    def sb3(judge: Shield, action: Array) -> int:
        from stable_baselines3.common.vec_env import DummyVecEnv

        plants = [cart(), cart()]
        env = VecSafetyShield(DummyVecEnv([lambda p=p: p for p in plants]), judge)
        seen = env.reset().copy()
        env.step_async(deceive(np.stack([action, -action])))
        *_, infos = env.step_wait()
        return sum(
            unjudged(
                judge, seen[i], plants[i].received[-1], infos[i]["action_executed"],
                infos[i]["shield/intervened"],
            )
            for i in range(2)
        )  # fmt: skip

    def own_loop(judge: Shield, action: Array) -> int:
        seen = np.array([0.2, 0.1], np.float32)
        sent, report = judge.filter(seen, deceive(action))
        return int(unjudged(judge, seen, (type(sent), np.array(sent)), sent, report.intervened))

    def policy(judge: Shield, action: Array) -> int:
        class Agent:
            def predict(self, observation: Any, **_: Any) -> tuple[Any, None]:  # noqa: ANN401
                return deceive(action), None

        seen = np.array([0.2, 0.1], np.float32)
        sent, _ = ShieldedPolicy(Agent(), judge).predict(seen)
        return int(
            unjudged(judge, seen, (type(sent), np.array(sent)), sent, False)
            and unjudged(judge, seen, (type(sent), np.array(sent)), sent, True)
        )

    def observation(judge: Shield, action: Array) -> int:
        seen = np.array([1.3, 1.5], np.float32) * np.sign(action[0])
        if not np.array_equal(np.asarray(deceive(seen), np.float64), seen):
            return 0  # Another observation, and not a deceiving one.
        sent, report = judge.filter(deceive(seen), np.full(1, np.sign(action[0]), np.float32))
        return int(unjudged(judge, seen, (type(sent), np.array(sent)), sent, report.intervened))

    known = {
        "SafetyShield": single,
        "VectorSafetyShield": vector,
        "VecSafetyShield": sb3,
        "Shield.filter": own_loop,
        "ShieldedPolicy": policy,
        "observation": observation,
    }
    return known[kind]


ENTRIES = (
    "SafetyShield", "VectorSafetyShield", "VecSafetyShield", "Shield.filter", "ShieldedPolicy",
    "observation",
)  # fmt: skip


def objects(tries: int, folder: Path, seed: int) -> Counts:
    """Send objects of every kind through every entry point, `tries` times each."""
    rng, judge, count = np.random.default_rng(seed), shield(), 0
    for _ in range(tries):
        for name, kind in KINDS.items():
            for entry in ENTRIES:
                action = rng.uniform(-1, 1, 1).astype("f4")
                try:
                    wrong = _behind(entry, kind)(judge, action)
                except Exception:
                    continue  # A refused object reaches no plant.
                if wrong:
                    print(f"  {entry}: {name} {action}", file=sys.stderr)
                count += wrong
    return {"unjudged": count}


def steps(tries: int, folder: Path, seed: int) -> Counts:
    """Take shielded steps while the plant fails, lies and is read again."""
    counts = {"unchecked": 0, "steps after a failure": 0}
    rng, judge = np.random.default_rng(seed), shield()
    env = shielded(rate=0.03, seed=seed)
    plant = env.env
    assert isinstance(plant, Watched)
    seen: Array | None = None
    taken = 0
    while taken < tries:
        before = len(plant.received)
        try:
            if seen is None or rng.random() < 0.002:
                seen = None
                seen, _ = env.reset(seed=int(rng.integers(2**31)))
                continue
            action = rng.uniform(-1.3, 1.3, 1).astype("f4")
            reached, _, terminated, truncated, info = env.step(action)
        except Exception:
            if seen is not None and len(plant.received) == before:
                raise
            # The agent tries again without a reset: no action may run.
            for _ in range(2):
                with contextlib.suppress(gym.error.ResetNeeded):
                    env.step(np.zeros(1, "f4"))
                    counts["steps after a failure"] += 1
            seen = None
            taken += len(plant.received) - before
            continue
        taken += 1
        told = info["action_executed"], info["shield/intervened"]
        counts["unchecked"] += unjudged(judge, seen, plant.received[-1], *told)
        seen = None if terminated or truncated else reached
        plant.received.clear()
    return counts


def vectors(tries: int, folder: Path, seed: int) -> Counts:
    """Take shielded steps of three plants at once, behind each of the two wrappers."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    counts = {"unchecked": 0, "steps after a failure": 0}
    rng, judge = np.random.default_rng(seed), shield()
    for kind in ("vector", "sb3"):
        plants = [cart(rate=0.01, seed=seed + i) for i in range(3)]
        makers = [lambda plant=plant: plant for plant in plants]
        env: Any = (
            VectorSafetyShield(gym.vector.SyncVectorEnv(makers), judge)
            if kind == "vector"
            else VecSafetyShield(DummyVecEnv(makers), judge)
        )
        seen: Array | None = None
        taken = 0
        while taken < tries / 2:
            try:
                if seen is None or rng.random() < 0.002:
                    seen = None
                    first = env.reset()
                    seen = np.array(first[0] if kind == "vector" else first)
                    continue
                for plant in plants:
                    plant.received.clear()
                results = env.step(rng.uniform(-1.3, 1.3, (3, 1)).astype("f4"))
            except Exception:
                before = sum(len(plant.received) for plant in plants)
                for _ in range(2 if seen is not None else 0):
                    with contextlib.suppress(gym.error.ResetNeeded, RuntimeError):
                        env.step(np.zeros((3, 1), "f4"))
                after = sum(len(plant.received) for plant in plants)
                counts["steps after a failure"] += after - before
                seen = None
                continue
            infos = results[-1]
            for i, plant in enumerate(plants):
                if not plant.received:
                    continue  # It was reset in place of a step.
                taken += 1
                one = infos[i] if kind == "sb3" else {key: x[i] for key, x in _told(infos).items()}
                told = one["action_executed"], bool(one["shield/intervened"])
                counts["unchecked"] += unjudged(judge, seen[i], plant.received[-1], *told)
            seen = np.array(results[0])
    return counts


def _told(infos: Mapping[str, Any]) -> dict[str, Any]:
    return {key: infos[key] for key in ("action_executed", "shield/intervened")}


# -- kills ----------------------------------------------------------------------------------------


def killed(work: Callable[[Callable[[str], None]], None], rng: np.random.Generator) -> None:
    """Start `work`, and kill it at a random point after it has told that it has begun."""
    child, reading = forked(work)
    os.read(reading, 1)
    time.sleep(float(rng.exponential(0.03)))
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    os.waitpid(child, 0)


def kills(tries: int, folder: Path, seed: int) -> Counts:
    """Kill runs at random points, and look at what they have left."""
    counts = {"unreadable": 0, "resume differs": 0, "left over": 0}
    rng = np.random.default_rng(seed)
    log = OfflineDataset.load(GOLDEN / "log.npz").select([0, 1])
    one, model = shield(), folder / "shield"
    logs = {folder / f"log{suffix}": read_log for suffix in (".hdf5", ".npz")}
    one.save(model)
    for path in logs:
        log.save(path)
    config = BehaviourCloningConfig(hidden=(16,), batch_size=8)
    whole = folder / "whole"
    apart(lambda _: BehaviourCloning(config).fit(log, 30).save(whole))

    def saves(tell: Callable[[str], None]) -> None:
        tell("begun")
        for number in range(10**6):
            replace(one, record=None, delta=0.1 + number % 7 / 10).save(model)

    def collects(tell: Callable[[str], None]) -> None:
        tell("begun")
        for number in range(10**6):
            for path in logs:
                log.select([number % 2]).save(path)

    def calibrates(tell: Callable[[str], None]) -> None:
        tell("begun")
        env = gym.make(CART)
        for number in range(10**6):
            tested = one.calibrate(
                env, policy="random", epsilon=0.6, confidence=0.6, deltas=[0.3], seed=number
            )
            tested.save(model)

    def trains(tell: Callable[[str], None], run: Path = folder / "run") -> None:
        tell("begun")
        BehaviourCloning(config).fit(log, 30, checkpoint=run, checkpoint_every=1)

    def records(tell: Callable[[str], None]) -> None:
        with ShieldLog(folder / "flight", flush_seconds=0.01) as flight:
            env = shielded(log=flight)
            tell("begun")
            play(env, 10**6, 0)

    for number in range(tries):
        kind = number % 5
        if kind == 0:
            killed(saves, rng)
            counts["unreadable"] += not _reads(Shield.load, model)
            one.save(model)
        elif kind == 1:
            killed(collects, rng)
            counts["unreadable"] += sum(not _reads(read, path) for path, read in logs.items())
            log.save(folder / "log.hdf5")
            log.save(folder / "log.npz")
        elif kind == 2:
            killed(calibrates, rng)
            counts["unreadable"] += not _reads(Shield.load, model)
            one.save(model)
        elif kind == 3:
            killed(trains, rng)
            if (folder / "run").exists():
                counts["unreadable"] += not _reads(read_model, folder / "run")

            def ends(_: Callable[[str], None]) -> None:
                agent = BehaviourCloning(config).fit(log, 30, checkpoint=folder / "run")
                agent.save(folder / "resumed")

            told = apart(ends)
            same = not told and (folder / "resumed").read_bytes() == whole.read_bytes()
            counts["resume differs"] += not same
            (folder / "run").unlink()
        else:
            before = _rows(folder / "flight")
            killed(records, rng)
            after = _rows(folder / "flight")
            counts["unreadable"] += after < before
        counts["left over"] += len(list(folder.glob(".*.part"))) if kind < 4 else 0
    return counts


def _rows(folder: Path) -> int:
    if not list(folder.glob("*.flight")):
        return 0
    try:
        return len(FlightLog.load(folder).rows)
    except ValueError:
        return 0  # The recorder was killed before its first header; `after < before` counts it.


def _reads(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except Exception as error:
        print(f"  {path.name}: {error}", file=sys.stderr)
        return False
    return True


# -- disks ----------------------------------------------------------------------------------------

PLACES = (
    "full", "read-only folder", "no permission", "vanished", "FIFO", "folder", "name too long",
)  # fmt: skip


def disks(tries: int, folder: Path, seed: int) -> Counts:
    """Write each kind of file to each kind of bad place."""
    counts = {"no error": 0, "more than one sentence": 0, "lost": 0, "left over": 0}
    log = OfflineDataset.load(GOLDEN / "log.npz")
    one = shield()
    config = BehaviourCloningConfig(hidden=(16,), batch_size=8)
    writers: dict[str, Callable[[Path], object]] = {
        "shield": one.save,
        "log.hdf5": log.save,
        "log.npz": log.save,
        "run": lambda path: BehaviourCloning(config).fit(log, 2, checkpoint=path),
        "agent": lambda path: BehaviourCloning(config).fit(log, 2).save(path),
    }
    for _ in range(tries):
        for (name, write), place in ((w, p) for w in writers.items() for p in PLACES):
            inside = Path(tempfile.mkdtemp(dir=folder))
            path, old = inside / name, b""
            if place in ("full", "read-only folder", "no permission") and name != "run":
                write(path)
                old = path.read_bytes()
            if place == "FIFO":
                os.mkfifo(path)
            elif place == "folder":
                path.mkdir()
            elif place == "name too long":
                path = inside / ("x" * 260 + name)

            def work(tell: Callable[[str], None], path: Path = path, place: str = place) -> None:
                _spoil(path, place)
                try:
                    write(path)  # noqa: B023 - it runs at once
                except OSError as error:
                    tell(f"told: {error}".replace("\n", "\\n"))

            lines = apart(work)
            inside.exists() and inside.chmod(0o755)
            told = [line for line in lines if line.startswith("told: ")]
            wrong = len(lines) != len(told) or any("\\n" in line for line in told)
            counts["no error"] += not told
            counts["more than one sentence"] += wrong
            if old:
                counts["lost"] += path.read_bytes() != old
            if inside.exists():
                counts["left over"] += len([p for p in inside.iterdir() if p.suffix == ".part"])
            if not told or wrong:
                print(f"  {name} in {place}: {lines}", file=sys.stderr)
    return counts


def _spoil(path: Path, place: str) -> None:
    """Make a place bad for this process."""
    if place == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    elif place == "vanished":
        shutil.rmtree(path.parent)
    elif place in ("read-only folder", "no permission"):
        path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR if place != "no permission" else 0o555)
        if os.getuid() == 0:
            # The administrator may write everywhere.
            path.parent.chmod(0o555)
            os.setgid(NOBODY)
            os.setuid(NOBODY)


# -- two processes --------------------------------------------------------------------------------


def two(tries: int, folder: Path, seed: int) -> Counts:
    """Let two processes write one checkpoint, one output and one flight."""
    counts = {"not told": 0, "mixed": 0}
    log = OfflineDataset.load(GOLDEN / "log.npz").select([0, 1])
    config = BehaviourCloningConfig(hidden=(16,), batch_size=8)

    def trains(tell: Callable[[str], None]) -> None:
        from safeshield.training.callbacks import TrainingCallback

        class Holds(TrainingCallback):
            def on_start(self, step: Any) -> None:  # noqa: ANN401
                tell("holding")
                time.sleep(600)

        BehaviourCloning(config).fit(log, 3, checkpoint=folder / "run", callbacks=[Holds()])

    def outputs(tell: Callable[[str], None]) -> None:
        with claimed(folder / "out.safetensors"):
            tell("holding")
            time.sleep(600)

    def records(tell: Callable[[str], None]) -> None:
        env = shielded(log=ShieldLog(folder / "flight"))
        play(env, 50, 0)
        tell("holding")
        time.sleep(600)

    def second(name: str) -> object:
        if name == "checkpoint":
            return BehaviourCloning(config).fit(log, 3, checkpoint=folder / "run")
        if name == "output":
            with claimed(folder / "out.safetensors"):
                return None
        return shielded(log=ShieldLog(folder / "flight"))

    holders = {"checkpoint": trains, "output": outputs, "flight log": records}
    for _ in range(tries):
        for name, holder in holders.items():
            child, reading = forked(holder)
            os.read(reading, 1)
            try:
                second(name)
                counts["not told"] += 1
            except ValueError as error:
                who = name == "flight log" or f"process {child} on" in str(error)
                counts["not told"] += not who
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            # The first is dead, and the second may go on.
            try:
                left = second(name)
                if isinstance(left, SafetyShield):
                    play(left, 5, 0)
                    left.close()
                    counts["mixed"] += FlightLog.load(folder / "flight").torn
            except ValueError as error:
                print(f"  {name}: {error}", file=sys.stderr)
                counts["mixed"] += 1
    return counts


# -- the table ------------------------------------------------------------------------------------

ROWS = [
    *(Row("files", f"mutated files: {form.name}", 20_000, 40, files_of(form)) for form in FORMATS),
    Row("objects", f"{len(KINDS)} kinds of objects at {len(ENTRIES)} entry points", 20, 1, objects),
    Row("steps", "shielded steps, the plant fails", 500_000, 300, steps),
    Row("steps", "shielded steps of vector environments", 500_000, 300, vectors),
    Row("kills", "kills -9 of save, collect, calibrate, train, record", 300, 5, kills),
    Row("disks", f"5 kinds of files at {len(PLACES)} bad places", 3, 1, disks),
    Row("two", "two processes on a checkpoint, an output, a flight log", 20, 1, two),
]
"""The rows of the table, in its order."""


def campaign(rows: list[Row], tries: Callable[[Row], int], seed: int) -> bool:
    """Run rows and print the table; return whether all counts are 0."""
    print("| row | tries | must be 0 | seconds |\n|---|---|---|---|", flush=True)
    held = True
    for row in rows:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            number = tries(row)
            counts = row.run(number, Path(folder), seed)
        held = held and not any(counts.values())
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        took = time.perf_counter() - started
        print(f"| {row.what} | {number} | {told} | {took:.0f} |", flush=True)
    return held


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="some seconds, for CI")
    parser.add_argument("--rows", nargs="+", choices=sorted({row.name for row in ROWS}))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tries to make")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [row for row in ROWS if given.rows is None or row.name in given.rows]

    def tries(row: Row) -> int:
        return row.quick if given.quick else max(1, round(given.scale * row.tries))

    sys.exit(0 if campaign(rows, tries, given.seed) else 1)


if __name__ == "__main__":
    main()
