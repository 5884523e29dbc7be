"""Failures of disks, processes and signals: what was there stays, and one sentence says why."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from safeshield import OfflineDataset, collect
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.files.atomic import LEAST_FREE, check_writable, written_whole
from safeshield.files.lock import claimed
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.training.callbacks import TrainingCallback, TrainingStep
from safeshield.training.many import fit_many
from safeshield.training.stopping import Stopped

ARRAYS = {"a": np.arange(50_000, dtype=np.float32)}
HEADER = {"format": "test-reliability"}


def process(code: str, *arguments: object, stdin: int | None = None) -> subprocess.Popen[str]:
    """Start a Python process that runs `code`, with one thread."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment
    )


# -- disks ----------------------------------------------------------------------------------------


def full(path: Path) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        write_tensors(path, ARRAYS, HEADER)
    return caught.value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_leaves_the_old_file_and_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, ARRAYS, HEADER)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fails)
    error = full(path)
    assert error.errno == errno.ENOSPC
    assert f"cannot write {path}: the disk is full" in str(error)
    assert "the old x.safetensors is unchanged; free some space" in str(error)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert "unchanged" not in str(full(tmp_path / "new.safetensors"))
    # Another failure is not taken for a full disk.
    number = errno.EACCES
    assert "disk" not in str(full(path))


FILLED = """
    import resource, sys, warnings
    import numpy as np
    from safeshield import OfflineDataset
    warnings.simplefilter("ignore")
    n = 20_000
    states = np.random.default_rng(0).random((n + 1, 4))
    ends = np.arange(n) == n - 1
    log = OfflineDataset.from_arrays(observations=states[:-1], next_observations=states[1:],
        actions=np.zeros((n, 1)), rewards=np.zeros(n), costs=np.zeros(n), terminated=ends,
        truncated=np.zeros(n, bool))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        log.save(sys.argv[1])
    except OSError as error:
        print(error.strerror or error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_log_that_does_not_fit_leaves_the_old_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    path.write_bytes(b"old")
    told, errors = process(FILLED, path).communicate(timeout=200)
    assert f"cannot write {path}: the disk is full" in told
    assert told.count("\n") == 1
    assert not errors  # the HDF5 library writes its own tracebacks there
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_too_little_space_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=LEAST_FREE + 1))
    check_writable(tmp_path / "x")
    with pytest.raises(OSError, match=r"it needs about 50\.0 MB and the disk has 16\.8 MB free"):
        check_writable(tmp_path / "x", expected=50_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match="choose a folder on another disk"):
        check_writable(tmp_path / "x")
    # What has been worked for is written wherever it fits.
    write_tensors(tmp_path / "x", ARRAYS, HEADER)


# -- processes ------------------------------------------------------------------------------------


WRITER = """
    import sys
    from pathlib import Path
    from safeshield.files.atomic import written_whole
    with written_whole(Path(sys.argv[1])) as part:
        part.write_text("half")
        print("writing", flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of POSIX")
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writers = [process(WRITER, path, stdin=subprocess.PIPE) for _ in range(2)]
    for one in writers:
        assert one.stdout is not None
        one.stdout.readline()
    assert len(list(tmp_path.glob(".x.*.part"))) == 2
    writers[0].kill()
    writers[0].wait()
    other = tmp_path / ".xy.0123456789abcdef0123456789abcdef.part"
    other.touch()  # of another file
    with written_whole(path) as part:
        part.write_text("mine")
    left = {file.name for file in tmp_path.iterdir()} - {"x", other.name}
    assert len(left) == 1
    writers[1].communicate("go on")
    assert path.read_text() == "half"  # the last writer that ends
    assert {file.name for file in tmp_path.iterdir()} == {"x", other.name}


HOLDER = """
    import sys
    from pathlib import Path
    from safeshield.files.lock import claimed
    with claimed(Path(sys.argv[1])):
        print("holding", flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of POSIX")
@pytest.mark.parametrize("end", ["killed", "ended"])
def test_a_path_is_held_by_one_run_and_the_other_is_told_which(tmp_path: Path, end: str) -> None:
    path = tmp_path / "run.safetensors"
    holder = process(HOLDER, path, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ValueError, match=rf"another run \(process {holder.pid} on .*, since 2"):
        claimed(path).__enter__()
    if end == "killed":
        holder.kill()
        holder.wait()
        assert (tmp_path / ".run.safetensors.lock").exists()
    else:
        holder.communicate("go on")
    with claimed(path), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        claimed(path).__enter__()
    assert not os.listdir(tmp_path)


def test_a_reader_gets_one_file_though_it_is_replaced_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, ARRAYS, HEADER)
    file = read_tensors(path)
    write_tensors(path, {"a": np.zeros(3, np.float32)}, HEADER)
    np.testing.assert_array_equal(file.load(file.shapes, file.dtypes)["a"], ARRAYS["a"])


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small log of the boat."""
    path = tmp_path_factory.mktemp("logs") / "boat.npz"
    collect(gym.make("safeshield/Boat-v0"), "random", episodes=10, seed=0).save(path)
    return path


TRAIN = """
    import os, signal, sys, threading
    from safeshield.algorithms.behaviour_cloning import BehaviourCloning
    from safeshield.training.callbacks import TrainingCallback
    from safeshield.cli.main import main

    number = int(sys.argv.pop(1))

    class Asked(TrainingCallback):
        every = 1

        def on_step(self, step):
            if step.step == 3:
                os.kill(os.getpid(), number)
            return True

    fit = BehaviourCloning.fit
    BehaviourCloning.fit = lambda self, *a, **k: fit(self, *a, **k, callbacks=[Asked()])
    sys.argv = ["safeshield", "train", *sys.argv[1:]]
    main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_sigterm_ends_a_command_with_a_checkpoint_and_says_how_to_resume(
    boats: Path, tmp_path: Path
) -> None:
    out, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.ckpt"
    arguments = (boats, out, "--algorithm", "bc", "--steps", 6, "--checkpoint", checkpoint)
    run = process(TRAIN, int(signal.SIGTERM), *arguments)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM: the same command continues from {checkpoint}" in told
    assert f"safeshield train {boats} {out} --algorithm bc --steps 6" in told
    assert read_tensors(checkpoint).header["done"] == 4
    assert sorted(os.listdir(tmp_path)) == [checkpoint.name]  # nothing held, nothing half written


class Interrupt(TrainingCallback):
    """Sends Ctrl-C to the process after the third update."""

    every = 1

    def on_step(self, step: TrainingStep) -> bool:
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return True


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal: a shell starts the programs in its background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_ctrl_c_ends_resumes_bit_for_bit(boats: Path, tmp_path: Path) -> None:
    log, checkpoint = OfflineDataset.load(boats), tmp_path / "run"
    config = BehaviourCloningConfig(hidden=(8,), seed=0)
    whole = BehaviourCloning(config).fit(log, 6)
    with pytest.raises(Stopped, match=r"stopped after 4 updates; .* continues from .*run"):
        BehaviourCloning(config).fit(log, 6, checkpoint=checkpoint, callbacks=[Interrupt()])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = BehaviourCloning(config).fit(log, 6, checkpoint=checkpoint)
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    # Without a checkpoint there is no safe point, and Ctrl-C ends the run at once.
    with pytest.raises(KeyboardInterrupt):
        BehaviourCloning(config).fit(log, 6, callbacks=[Interrupt()])


def test_a_checkpoint_belongs_to_one_run_at_a_time(boats: Path, tmp_path: Path) -> None:
    log, path = OfflineDataset.load(boats), tmp_path / "run"
    config = BehaviourCloningConfig(hidden=(8,))
    with claimed(path), pytest.raises(ValueError, match="is being written by another run"):
        BehaviourCloning(config).fit(log, 3, checkpoint=path)
    agents = [BehaviourCloning(BehaviourCloningConfig(hidden=(8,), seed=i)) for i in range(2)]
    with claimed(tmp_path / "1.safetensors"), pytest.raises(ValueError, match="by another run"):
        fit_many(agents, log, 3, checkpoints=tmp_path)
    assert not os.listdir(tmp_path)


def test_room_for_the_checkpoint_is_checked_before_the_first_update(
    boats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = OfflineDataset.load(boats)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=LEAST_FREE))
    agent = BehaviourCloning(BehaviourCloningConfig(hidden=(1000, 1000, 1000)))
    with pytest.raises(OSError, match=r"needs about \d+\.\d MB and the disk has 16.8 MB free"):
        agent.fit(log, 3, checkpoint=tmp_path / "run")
    assert not os.listdir(tmp_path)


class Silent(gym.Env[Any, Any]):
    """An environment without ends, which may report nothing."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, reports: bool) -> None:
        self.reports, self.steps = reports, 0

    def reset(self, **_: object) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: object) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        cost = {"cost": 0.0} if self.reports else {}
        return np.zeros(1, np.float32), 0.0, False, False, cost


def test_an_environment_that_reports_nothing_is_refused_at_its_first_step() -> None:
    env = Silent(reports=False)
    with pytest.raises(ValueError, match=r"must report info\['constraint'\]"):
        collect(env, "random", episodes=1, seed=0, num_envs=1)
    assert env.steps == 1


def test_an_environment_without_ends_has_a_limit_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("safeshield.rollouts.episodes._LONG", 5)
    env = Silent(reports=True)
    with (
        pytest.warns(
            UserWarning, match="not ended after 5 steps; the run ends with an error after"
        ),
        pytest.raises(ValueError, match="not ended after step_limit = 20 steps; wrap the env"),
    ):
        collect(env, "random", episodes=1, seed=0, num_envs=1, step_limit=20)
    assert env.steps == 20


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes of POSIX")
def test_no_reader_waits_for_a_pipe(tmp_path: Path) -> None:
    from safeshield.cli.kinds import file_kind
    from safeshield.cli.settings import read_settings
    from safeshield.data.card import file_digest
    from safeshield.files.signing import check_signature
    from safeshield.monitoring.flight_file import read_files
    from safeshield.monitoring.ledger import read_ledger

    for name in ("x", "x.toml", "1.flight"):
        os.mkfifo(tmp_path / name)
    readers: list[Callable[[], object]] = [
        lambda: file_kind(tmp_path / "x"),
        lambda: file_digest(tmp_path / "x"),
        lambda: read_ledger(tmp_path / "x", {}),
        lambda: read_files([tmp_path / "1.flight"]),
        lambda: read_settings(tmp_path / "x.toml", BehaviourCloningConfig),
        lambda: check_signature(tmp_path, "", "00", tmp_path / "x"),
    ]
    for reader in readers:
        with pytest.raises(OSError, match="is a pipe, a socket or a device"):
            reader()


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a = " + b"[" * 100_000, b"a = 1\na = 2"])
def test_settings_that_are_none_are_refused(tmp_path: Path, text: bytes) -> None:
    from safeshield.cli.settings import read_settings

    path = tmp_path / "settings.toml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"settings\.toml is not "):
        read_settings(path, BehaviourCloningConfig)


def test_a_ledger_of_brackets_is_refused(tmp_path: Path) -> None:
    from safeshield.monitoring.ledger import read_ledger

    path = tmp_path / "ledger"
    path.write_bytes(b"[" * 1_000_000)
    with pytest.raises(ValueError, match="is not a file that a PromiseMonitor wrote"):
        read_ledger(path, {})
