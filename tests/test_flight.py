"""The flight recorder: rows against infos, files, kills, full disks, and logs made of flights."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from test_shield import record
from test_vector_wrapper import vectorised
from typer.testing import CliRunner

from safeshield import (
    FlightLog,
    OfflineDataset,
    PromiseMonitor,
    ShieldConfig,
    ShieldLog,
    ShieldTrainer,
    collect,
)
from safeshield.cli import app
from safeshield.envs.vector import autoreset_modes
from safeshield.monitoring import FlightWarning, flight_file, recorder
from safeshield.monitoring.flight_file import flight_files
from safeshield.rollouts.policies import batch_policy
from safeshield.shield import Shield
from safeshield.wrappers import SafetyShield, VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield

pytestmark = [
    pytest.mark.filterwarnings("ignore::safeshield.shield.shield.UncalibratedShieldWarning"),
    pytest.mark.filterwarnings("ignore::safeshield.shield.shield.OtherEnvironmentWarning"),
]
Array = npt.NDArray[Any]
STEPS = 30


@pytest.fixture(scope="module")
def strict(shield: Shield) -> Shield:
    """The boat's shield at a delta at which it replaces many actions."""
    return shield.with_delta(0.2)


def boat() -> gym.Env[Any, Any]:
    return gym.make("safeshield/Boat-v0", max_episode_steps=STEPS)


def act(states: Array) -> Array:
    """Actions (n, 2) that depend on the states (n, 2) alone."""
    return np.sin(40.0 * np.asarray(states, np.float32))


@batch_policy
def policy(states: Array, _: np.random.Generator) -> Array:
    return act(states)


def fly(env: gym.Env[Any, Any], episodes: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """Play episodes and return what the environment said at each step."""
    told: list[dict[str, Any]] = []
    for episode in range(episodes):
        state, info = env.reset(seed=episode)
        for step in range(steps):
            action = act(state)
            after, reward, terminated, truncated, found = env.step(action)
            told.append(
                {
                    "seed": episode, "episode": episode, "step": step, "observation": state,
                    "proposed": action, "executed": found["action_executed"],
                    "value": found["shield/value"], "threshold": found["shield/threshold"],
                    "h": info["constraint"], "reward": reward, "terminated": terminated,
                    "truncated": truncated, "info": found,
                }
            )  # fmt: skip
            state, info = after, found
            if terminated or truncated:
                break
    return told


def fly_and_flush(env: gym.Env[Any, Any], log: ShieldLog, episodes: int) -> None:
    """Play episodes, and wait after each until its rows are written."""
    for _ in range(episodes):
        fly(env, 1)
        log.flush()


# -- what is recorded ---------------------------------------------------------------------------


def test_rows_are_what_the_wrapper_reports(strict: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "flight") as log:
        before = time.time()
        told = fly(SafetyShield(boat(), strict, log=log), 8)
    flight = FlightLog.load(tmp_path / "flight")
    assert len(flight) == len(told) > 0
    for name in told[0].keys() - {"info"}:
        expected = np.array([one[name] for one in told])
        np.testing.assert_array_equal(flight.columns[name], expected, err_msg=name)
    replaced = np.array([one["info"]["shield/intervened"] for one in told])
    assert 0 < replaced.sum() < len(told)
    verdicts = flight.columns["verdict"]
    np.testing.assert_array_equal(verdicts, np.where(replaced, "replaced", "accepted"))
    assert (flight.columns["time"] >= before).all()
    assert (np.diff(flight.columns["time"]) >= 0).all()
    assert set(flight.ends["verdict"]) == {"end"}
    assert flight.ends["step"].sum() == len(told)
    assert np.isnan(flight.ends["proposed"]).all()
    card = flight.card()
    assert (card["steps"], card["episodes"], card["unfinished"]) == (len(told), 8, 0)
    assert card["replaced_share"] == replaced.mean()
    assert (card["lost"], card["removed"], card["torn"]) == (0, 0, 0)
    assert (card["shield"], card["delta"]) == (strict.digest, 0.2)
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_a_recorder_changes_nothing(strict: Shield, tmp_path: Path) -> None:
    plain = fly(SafetyShield(boat(), strict), 3)
    with ShieldLog(tmp_path / "flight") as log:
        logged = fly(SafetyShield(boat(), strict, log=log), 3)
    assert repr(plain) == repr(logged)


def by_episode(path: Path) -> dict[tuple[int, int], Array]:
    """Return the rows of each (environment, number of its episode), without times and numbers."""
    rows = np.sort(FlightLog.load(path).rows, order=["episode", "step"])
    found: dict[tuple[int, int], Array] = {}
    for env in np.unique(rows["env"]):
        mine = rows[rows["env"] == env]
        for number, episode in enumerate(np.unique(mine["episode"])):
            part = mine[mine["episode"] == episode].copy()
            part["time"], part["episode"] = 0, 0
            found[int(env), number] = part
    return found


def test_every_wrapper_records_the_same_episodes(strict: Shield, tmp_path: Path) -> None:
    count, steps = 3, 3 * STEPS + 4
    single: dict[tuple[int, int], Array] = {}
    for env in range(count):
        path = tmp_path / f"single{env}"
        with ShieldLog(path) as log:
            plant = SafetyShield(boat(), strict, log=log)
            state, _ = plant.reset(seed=5 + env)
            for _ in range(steps):
                state, _, terminated, truncated, _ = plant.step(act(state))
                if terminated or truncated:
                    state, _ = plant.reset()
        for (_, number), rows in by_episode(path).items():
            rows["env"] = env
            single[env, number] = rows
    flights = []
    logs: list[ShieldLog] = []
    for mode in autoreset_modes():
        logs.append(ShieldLog(tmp_path / mode))
        plants = VectorSafetyShield(vectorised([boat] * count, mode), strict, log=logs[-1])
        states, _ = plants.reset(seed=5)
        for _ in range(steps):
            states, _, terminated, truncated, _ = plants.step(act(states))
            if mode == "Disabled" and (terminated | truncated).any():
                states, _ = plants.reset(options={"reset_mask": terminated | truncated})
        flights.append(mode)
        plants.close()
        logs[-1].close()
    logs.append(ShieldLog(tmp_path / "sb3"))
    venv = VecSafetyShield(DummyVecEnv([boat] * count), strict, log=logs[-1])
    venv.seed(5)
    state = venv.reset()
    for _ in range(steps):
        state = venv.step(act(state))[0]
    venv.close()
    logs[-1].close()
    for name in [*flights, "sb3"]:
        found = by_episode(tmp_path / name)
        assert len(found) >= count * 2
        for key, rows in found.items():
            mine = single[key]
            if rows["verdict"][-1] == 6 or mine["verdict"][-1] == 6:  # cut by the end of the test
                shared = min(len(rows), len(mine)) - 1
                rows, mine = rows[:shared], mine[:shared]
            for field in rows.dtype.names or ():
                np.testing.assert_allclose(
                    rows[field], mine[field], atol=2e-6, err_msg=f"{name} {key} {field}"
                )


def test_shadow_mode_and_a_monitor(shield: Shield, strict: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "shadow") as log:
        told = fly(SafetyShield(boat(), strict, mode="shadow", log=log), 8)
    flight = FlightLog.load(tmp_path / "shadow")
    would = np.array([one["info"]["shield/would_intervene"] for one in told])
    assert would.any()
    np.testing.assert_array_equal(flight.columns["verdict"] == "shadow", would)
    np.testing.assert_array_equal(flight.columns["executed"], flight.columns["proposed"])
    assert flight.shield["mode"] == "shadow"
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "shadow")]).output
    assert f"would have been replaced             {would.sum()}\n" in told
    assert "\nreplaced" not in told
    watched = replace(shield.with_delta(0.6), record=record(0.6))
    monitor = PromiseMonitor(watched)
    with ShieldLog(tmp_path / "watched") as log:
        told = fly(SafetyShield(boat(), watched, monitor=monitor, log=log), 8)
    flight = FlightLog.load(tmp_path / "watched")
    certified = np.zeros(8, np.bool_)
    certified[flight.ends["episode"]] = flight.ends["certified"]
    assert certified.sum() == monitor.report().episodes > 0
    assert not certified.all()
    assert flight.card()["certified"] == certified.sum()


def test_unreadable_states_and_no_acceptable_action(shield: Shield, tmp_path: Path) -> None:
    class Broken(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            state, reward, *rest = self.env.step(action)
            self.steps = getattr(self, "steps", 0) + 1
            return state * (np.nan if self.steps == 5 else 1), reward, *rest

    with ShieldLog(tmp_path / "flight") as log:
        fly(SafetyShield(Broken(boat()), shield.with_delta(50.0), log=log), 1)
    flight = FlightLog.load(tmp_path / "flight")
    assert set(np.delete(flight.columns["verdict"], 5)) == {"fallback"}
    assert flight.columns["verdict"][5] == "unreadable"
    assert np.isnan(flight.columns["observation"][5]).all()
    with pytest.warns(FlightWarning, match="not finite"):
        log_made = flight.to_dataset()
    assert len(log_made) == 4
    assert log_made.truncated[-1]


class FirstStep(gym.Wrapper[Any, Any, Any, Any]):
    """Its first step raises an error or leads to NaN in every third episode."""

    def __init__(self, env: gym.Env[Any, Any], raises: bool) -> None:
        super().__init__(env)
        self.raises, self.episodes, self.first = raises, 0, False

    def reset(self, **options: Any) -> Any:  # noqa: ANN401
        self.episodes, self.first = self.episodes + 1, True
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:  # noqa: ANN401
        state, *rest = self.env.step(action)
        bad, self.first = self.first and self.episodes % 3 == 0, False
        if bad and self.raises:
            raise ConnectionError("the plant does not answer")
        return state * (np.nan if bad else 1), *rest


@pytest.mark.parametrize("raises", [True, False])
def test_episodes_without_a_usable_step_are_counted(
    shield: Shield, tmp_path: Path, raises: bool
) -> None:
    env = FirstStep(boat(), raises)
    with ShieldLog(tmp_path / "flight", agent="act") as log:
        wrapped = SafetyShield(env, shield, log=log)
        for _ in range(9):
            with contextlib.suppress(ConnectionError):
                fly(wrapped, 1)
    with pytest.warns(FlightWarning, match="3 episodes have no other steps, and calib"):
        made = FlightLog.load(tmp_path / "flight").to_dataset()
    assert made.num_episodes == 6
    assert made.provenance is not None
    assert (made.provenance["flight"]["stepless"], made.provenance["flight"]["aborted"]) == (3, 0)


def test_a_flight_that_is_recorded_is_read_up_to_the_first_episode_that_runs(
    shield: Shield, tmp_path: Path
) -> None:
    class Short(gym.Wrapper[Any, Any, Any, Any]):
        """Ends after a number of steps."""

        def __init__(self, env: gym.Env[Any, Any], steps: int) -> None:
            super().__init__(env)
            self.limit = steps

        def reset(self, **options: Any) -> Any:  # noqa: ANN401
            self.left = self.limit
            return self.env.reset(**options)

        def step(self, action: Any) -> Any:  # noqa: ANN401
            state, reward, terminated, truncated, info = self.env.step(action)
            self.left -= 1
            return state, reward, terminated or self.left == 0, truncated, info

    # The second environment's episodes are short, so that many of them end while the first runs.
    makers = [lambda: Short(boat(), 25), lambda: Short(boat(), 3)]
    log = ShieldLog(tmp_path / "flight", agent="act")
    env = VectorSafetyShield(gym.vector.SyncVectorEnv(makers), shield, log=log)
    states, _ = env.reset(seed=0)
    for _ in range(20):
        states, *_ = env.step(act(states))
    log.flush()
    with pytest.raises(ValueError, match="which is no longer being recorded"):
        FlightLog.load(tmp_path / "flight").to_dataset()
    for _ in range(10):
        states, *_ = env.step(act(states))
    log.flush()
    with pytest.warns(FlightWarning, match="or began after such a one"):
        made = FlightLog.load(tmp_path / "flight").to_dataset()
    lengths = made.episode_lengths.tolist()
    assert lengths.count(25) == 1
    assert set(lengths) == {3, 25}
    # The log has the episodes of 3 steps that began before the second episode of 25 steps.
    assert 6 <= lengths.count(3) <= 9
    env.close()
    closed = FlightLog.load(tmp_path / "flight").to_dataset()
    assert closed.num_episodes > made.num_episodes
    assert closed.provenance is not None
    assert closed.provenance["flight"]["aborted"] > 0


def test_interventions_alone(strict: Shield, tmp_path: Path) -> None:
    for steps in ("all", "interventions"):
        with ShieldLog(tmp_path / steps, steps) as log:  # type: ignore[arg-type]
            fly(SafetyShield(boat(), strict, log=log), 8)
    every, few = (FlightLog.load(tmp_path / steps) for steps in ("all", "interventions"))
    kept = (every.columns["verdict"] != "accepted") | (every.columns["h"] > 0)
    assert 0 < len(few) == kept.sum() < len(every)
    np.testing.assert_array_equal(few.columns["value"], every.columns["value"][kept])
    np.testing.assert_array_equal(few.ends["step"], every.ends["step"])
    one, other = every.card(), few.card()
    for name in ("steps", "episodes", "replaced", "replaced_share", "violating"):
        assert one[name] == other[name], name
    with pytest.raises(ValueError, match="only its interventions were recorded"):
        few.to_dataset()


# -- files --------------------------------------------------------------------------------------


def test_restarts_rotation_and_the_bound(strict: Shield, tmp_path: Path) -> None:
    path = tmp_path / "flight"
    sizes = {"max_bytes": 8192, "total_bytes": 1 << 20, "block_steps": 8}
    for _ in range(2):
        with ShieldLog(path, **sizes) as log:
            fly_and_flush(SafetyShield(boat(), strict, log=log), log, 4)
    flight = FlightLog.load(path)
    assert len(flight) == 8 * STEPS
    assert flight.num_episodes == 8
    assert max(file.stat().st_size for file in flight_files(path)) <= 8192
    assert flight.files > 4
    # The oldest files go, and the recorder says so once.
    with (
        pytest.warns(FlightWarning, match="has removed its oldest files") as caught,
        ShieldLog(path, max_bytes=8192, total_bytes=20_000, block_steps=8) as log,
    ):
        fly_and_flush(SafetyShield(boat(), strict, log=log), log, 12)
    assert len(caught) == 1
    assert sum(file.stat().st_size for file in flight_files(path)) <= 20_000
    flight = FlightLog.load(path)
    assert flight.lost == 0
    assert flight.removed + len(flight.rows) == 20 * (STEPS + 1)
    with pytest.warns(FlightWarning, match="its beginning is missing"):
        kept = flight.to_dataset()
    assert set(kept.episode_lengths) == {STEPS}
    # Another shield, delta or mode needs another folder.
    other = strict.with_delta(0.5)
    with ShieldLog(path) as log, pytest.raises(ValueError, match=r"whose shield is .*another fold"):
        SafetyShield(boat(), other, log=log)


def test_damage_is_skipped_and_counted(strict: Shield, tmp_path: Path) -> None:
    path = tmp_path / "flight"
    with ShieldLog(path, block_steps=20) as log:
        fly(SafetyShield(boat(), strict, log=log), 3)
    file = flight_files(path)[0]
    raw, whole = file.read_bytes(), FlightLog.load(path)
    size = whole.rows.dtype.itemsize
    frames, _ = flight_file.read_frames(raw)
    places = np.cumsum([24 + len(one.payload) for one in frames])
    # Cut off at any byte: every whole block before it is read.
    rng = np.random.default_rng(0)
    for cut in rng.integers(places[0], len(raw), 20):
        file.write_bytes(raw[:cut])
        flight = FlightLog.load(path)
        whole_frames = int((places <= cut).sum())
        assert len(flight.rows) == sum(one.rows for one in frames[:whole_frames])
        assert flight.torn == (cut not in places)
        assert "an unknown number of rows at the end" in flight.missing
        assert flight.rows.tobytes() == whole.rows[: len(flight.rows)].tobytes()
    # One changed bit costs one block, which is counted.
    for at in rng.integers(places[0], places[-2], 20):
        bad = bytearray(raw)
        bad[at] ^= 1
        file.write_bytes(bad)
        flight = FlightLog.load(path)
        lost = frames[int(np.searchsorted(places, at, side="right"))].rows
        assert (flight.torn, flight.lost, len(flight.rows)) == (1, lost, len(whole.rows) - lost)
        assert flight.missing.startswith(f"rows are missing ({lost} rows; an unknown number")
    assert whole.missing == ""
    file.write_bytes(raw[: int(places[1]) + 5])
    shown = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert len([one for one in shown.splitlines() if one.startswith("warning: ")]) == 1
    assert "all numbers are those of what is left" in shown
    assert size * 5 == len(frames[1].payload)  # a quarter of block_steps
    # A recorder that was killed may leave a file without a header.
    file.write_bytes(raw)
    file.with_name("000002.flight").write_bytes(b"some")
    with ShieldLog(path, block_steps=10) as log:
        fly(SafetyShield(boat(), strict, log=log), 1)
    flight = FlightLog.load(path)
    assert (flight.torn, flight.lost, len(flight)) == (1, 0, 4 * STEPS)
    assert flight.num_episodes == 4
    for one in flight_files(path):
        one.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no header is whole"):
        FlightLog.load(path)
    with pytest.raises(FileNotFoundError, match="holds no flight"):
        FlightLog.load(tmp_path / "none")


RECORD = """
import sys, time, warnings
import gymnasium as gym, numpy as np
import safeshield
from safeshield import SafetyShield, ShieldLog
warnings.simplefilter("ignore")
log = ShieldLog(sys.argv[2], block_steps=16, max_bytes=1 << 14, flush_seconds=float(sys.argv[3]))
env = SafetyShield(gym.make("safeshield/Boat-v0", max_episode_steps=30), sys.argv[1], log=log)
state, _ = env.reset(seed=0)
for step in range(int(sys.argv[4])):
    state, _, terminated, truncated, _ = env.step(np.sin(40.0 * state))
    print(step + 1, flush=True)
    time.sleep(0.005)
    if terminated or truncated:
        state, _ = env.reset()
"""


def start(shield: Path, folder: Path, flush: float, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RECORD, str(shield), str(folder), str(flush), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_loses_at_most_the_last_block(strict: Shield, tmp_path: Path) -> None:
    file = tmp_path / "strict.safetensors"
    strict.save(file)
    path = tmp_path / "flight"
    seen = 0
    for until in (5, 61, 90):
        process = start(file, path, 60.0, 10**6)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= until:
                break
        # A second recorder is refused while the first one lives.
        with pytest.raises(ValueError, match="is being recorded to by another ShieldLog"):
            ShieldLog(path)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        steps = int(rest[-1]) if rest else until
        if flight_files(path):
            flight = FlightLog.load(path)
            assert flight.lost == 0
            # On a busy machine the thread that writes may be late. The print is behind the step, so
            # one more step may have been recorded.
            assert steps - 2 * 16 <= len(flight) - seen <= steps + 1
            seen = len(flight)
    assert FlightLog.load(path).growing is None
    # An interpreter that ends without a close() writes everything.
    process = start(file, tmp_path / "whole", 60.0, 37)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert len(FlightLog.load(tmp_path / "whole")) == 37
    assert FlightLog.load(tmp_path / "whole").ends["verdict"].tolist() == ["end", "cut"]


def test_blocks_are_written_after_a_while(strict: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "flight", flush_seconds=0.0) as log:
        env = SafetyShield(boat(), strict, log=log)
        fly(env, 1, steps=5)
        deadline = time.monotonic() + 60
        while not flight_files(log.path) or len(FlightLog.load(log.path)) < 4:
            assert time.monotonic() < deadline
        log.flush()
        flight = FlightLog.load(log.path)
        assert len(flight) == 5
        assert flight.growing == 0
        assert flight.card()["unfinished"] == 1
        # An episode that is still being recorded is in no log: it would have another hash later.
        with pytest.raises(ValueError, match="no longer being recorded"):
            flight.to_dataset()
    assert len(FlightLog.load(tmp_path / "flight").to_dataset()) == 5


def test_a_full_disk_does_not_stop_the_plant(
    strict: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [False]

    class Disk(io.FileIO):
        def write(self, data: Any, /) -> int:  # noqa: ANN401
            if full[0]:
                super().write(data[: len(data) // 2])
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(flight_file.io, "FileIO", Disk)
    log = ShieldLog(tmp_path / "flight", block_steps=10)
    env = SafetyShield(boat(), strict, log=log)
    fly(env, 2)
    log.flush()
    full[0] = True
    with pytest.warns(FlightWarning, match="losing steps: No space left on device") as caught:
        fly_and_flush(env, log, 4)
    assert len(caught) == 1
    full[0] = False
    fly(env, 2)
    lost = 4 * (STEPS + 1)
    assert log.lost == lost
    with pytest.warns(FlightWarning, match=f"{lost} of {8 * (STEPS + 1)} rows of the flight"):
        log.close()
    flight = FlightLog.load(tmp_path / "flight")
    assert (flight.lost, flight.torn) == (lost, 0)
    assert len(flight) == 4 * STEPS
    assert flight.columns["episode"].max() == 7


def test_a_slow_disk_does_not_stop_the_plant(
    strict: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    free = threading.Event()

    class Disk(io.FileIO):
        def write(self, data: Any, /) -> int:  # noqa: ANN401
            free.wait(60)
            return super().write(data)

    monkeypatch.setattr(flight_file.io, "FileIO", Disk)
    monkeypatch.setattr(recorder, "_READY", 0)
    log = ShieldLog(tmp_path / "flight", block_steps=10)
    env = SafetyShield(boat(), strict, log=log)
    with pytest.warns(FlightWarning, match="losing steps: the disk is too slow"):
        fly(env, 8)
    assert 0 < log.lost < 8 * (STEPS + 1)
    free.set()
    with pytest.warns(FlightWarning, match="were lost"):
        log.close()
    flight = FlightLog.load(tmp_path / "flight")
    assert flight.lost == log.lost
    assert flight.lost + len(flight.rows) == 8 * (STEPS + 1)


def test_after_a_close_the_plant_goes_on(strict: Shield, tmp_path: Path) -> None:
    log = ShieldLog(tmp_path / "flight")
    env = SafetyShield(boat(), strict, log=log)
    fly(env, 1, steps=5)
    log.close()
    log.close()
    with pytest.warns(FlightWarning, match="is closed; the steps since then") as caught:
        fly(env, 1)
    assert len(caught) == 1
    with pytest.raises(ValueError, match="log is closed"):
        SafetyShield(boat(), strict, log=log)
    with ShieldLog(tmp_path / "flight") as again:
        SafetyShield(boat(), strict, log=again)
        with pytest.raises(ValueError, match="records other environments already"):
            SafetyShield(boat(), strict, log=again)
    assert len(FlightLog.load(tmp_path / "flight")) == 5


def test_seeds(strict: Shield, tmp_path: Path) -> None:
    seeds = (7, 10**12, None, 2**64)
    with ShieldLog(tmp_path / "flight") as log:
        env = SafetyShield(boat(), strict, log=log)
        for seed in seeds:
            state, _ = env.reset(seed=seed)  # type: ignore[arg-type]
            env.step(act(state))
    assert FlightLog.load(tmp_path / "flight").columns["seed"].tolist() == [7, 10**12, -1, -1]


def test_bad_arguments(strict: Shield, tmp_path: Path) -> None:
    bad = (
        ({"steps": "some"}, "steps must be one of"),
        ({"max_bytes": 10}, "max_bytes must be at least 4096"),
        ({"max_bytes": 5000, "total_bytes": 9000}, "total_bytes must be at least 10000"),
        ({"block_steps": 0}, "block_steps must be at least 1"),
        ({"flush_seconds": float("nan")}, "flush_seconds must be finite"),
    )
    for arguments, text in bad:
        with pytest.raises(ValueError, match=text):
            ShieldLog(tmp_path / "flight", **arguments)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        ShieldLog(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot make the folder .*; choose another name, or a fold"):
        ShieldLog(tmp_path / "file" / "flight")
    with (
        ShieldLog(tmp_path / "flight", max_bytes=5000) as log,
        pytest.raises(ValueError, match=r"max_bytes must be at least .* for two steps of 99"),
    ):
        VectorSafetyShield(vectorised([boat] * 99, autoreset_modes()[0]), strict, log=log)
    with pytest.raises(TypeError, match=r"log must be a ShieldLog\('folder'\), or None, got str"):
        SafetyShield(boat(), strict, log="flight")  # type: ignore[arg-type]


# -- logs made of flights -----------------------------------------------------------------------


def test_a_flight_is_the_log_that_collect_makes(strict: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "flight") as log:
        env = SafetyShield(boat(), strict, log=log)
        expected = collect(env, policy, episodes=5, seed=3, num_envs=1)
    made = FlightLog.load(tmp_path / "flight").to_dataset()
    for name in ("observations", "actions", "rewards", "next_observations", "terminated",
                 "truncated", "constraints", "next_constraints", "costs"):  # fmt: skip
        np.testing.assert_array_equal(getattr(made, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(made.episode_hashes, expected.episode_hashes)
    assert made.constraint_kind == expected.constraint_kind
    assert made.provenance is not None
    assert expected.provenance is not None
    assert made.provenance["behind_shield"] == expected.provenance["behind_shield"]
    assert made.provenance["environment"] == "safeshield/Boat-v0"


class Corridor(gym.Env[Any, Any]):
    """A walk with a Dict observation in float64 and three actions; the ends are violations."""

    observation_space = gym.spaces.Dict(
        {"at": gym.spaces.Discrete(9), "speed": gym.spaces.Box(-9.0, 9.0, (1,), np.float64)}
    )
    action_space = gym.spaces.Discrete(3, start=1)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        speed = np.array([self.at / 3.0])
        return {"at": self.at, "speed": speed}, {"constraint": float(abs(self.at - 4) - 3.5)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.at, self.step_number = int(self.np_random.integers(2, 7)), 0
        return self._state()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.at = int(np.clip(self.at + action - 2, 0, 8))
        self.step_number += 1
        state, info = self._state()
        return state, 1.0, False, self.step_number == 8, info


def test_entries_of_a_dict_and_discrete_actions(tmp_path: Path) -> None:
    log_made = collect(Corridor(), "random", episodes=40, seed=0, num_envs=1)
    shield = ShieldTrainer(ShieldConfig(critic_hidden=(8,)), device="cpu").fit(log_made, 3).shield()
    with ShieldLog(tmp_path / "flight") as log:
        env = SafetyShield(Corridor(), shield, log=log)
        expected = collect(env, "random", episodes=6, seed=1, num_envs=1)
    flight = FlightLog.load(tmp_path / "flight")
    assert flight.columns["observation"].dtype == np.float64
    assert set(np.unique(flight.columns["proposed"])) == {1.0, 2.0, 3.0}
    made = flight.to_dataset(like=log_made)
    np.testing.assert_array_equal(made.episode_hashes, expected.episode_hashes)
    np.testing.assert_array_equal(made.constraints, expected.constraints)
    assert OfflineDataset.concat([log_made, made]).num_episodes == 46


def test_costs_alone_give_the_labels_of_the_log_to_join(strict: Shield, tmp_path: Path) -> None:
    class Costs(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            state, _ = self.env.reset(**kwargs)
            return state, {}

        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, info = self.env.step(action)
            return *rest, {"cost": float(info["constraint"] > 0)}

    with ShieldLog(tmp_path / "flight") as log:
        env = SafetyShield(Costs(boat()), strict, log=log)
        expected = collect(env, policy, episodes=5, seed=3, num_envs=1)
        bad = collect(Costs(boat()), "random", episodes=40, seed=1)
    assert bad.constraint_kind == "binary"
    flight = FlightLog.load(tmp_path / "flight")
    made = flight.to_dataset(like=bad)
    np.testing.assert_array_equal(made.constraints, expected.constraints)
    joined = OfflineDataset.concat([bad, made])
    assert joined.num_episodes == 45
    assert joined.provenance is not None
    assert joined.provenance["parts"][1]["behind_shield"]["digest"] == strict.digest
    plain = collect(boat(), "random", episodes=2, seed=1)
    unnamed = replace(plain, constraint_source=None)
    with pytest.raises(ValueError, match="does not hold info\\['constraint'\\] of every state"):
        flight.to_dataset(like=unnamed)


def test_labels_at_some_steps_are_told_from_none(strict: Shield, tmp_path: Path) -> None:
    class Sometimes(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, _ = self.env.step(action)
            self.steps = getattr(self, "steps", 0) + 1
            return *rest, {"cost": 0.0} if self.steps % 10 else {}

    with ShieldLog(tmp_path / "flight") as log:
        env = SafetyShield(Sometimes(boat()), strict, log=log)
        for _ in range(2):
            state, _ = env.reset(seed=0)
            for _ in range(STEPS):
                state, *_ = env.step(act(state))
    count = 2 * STEPS // 10
    with pytest.raises(ValueError, match=f"every step: {count} of {2 * STEPS} steps .* step 9 of"):
        FlightLog.load(tmp_path / "flight").to_dataset()


def test_training_on_a_flight_refuses_it_as_held_out(
    strict: Shield, boat_log: OfflineDataset, tmp_path: Path
) -> None:
    with ShieldLog(tmp_path / "flight") as log:
        fly(SafetyShield(boat(), strict, log=log), 30)
    with ShieldLog(tmp_path / "fresh") as log:
        collect(SafetyShield(boat(), strict, log=log), policy, episodes=30, seed=99, num_envs=1)
    boat_log.select(range(20)).save(tmp_path / "log.hdf5")
    out = tmp_path / "shield.safetensors"
    result = CliRunner().invoke(
        app,
        ["train", str(tmp_path / "log.hdf5"), str(out), "--algorithm", "shield", "--steps", "3",
         "--add", str(tmp_path / "flight")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    named = f"{tmp_path / 'flight'}, 30 episodes behind shield {strict.digest} at delta 0.2"
    assert ShieldTrainer.load(out, device="cpu").added == named
    assert named in " ".join(CliRunner().invoke(app, ["inspect", str(out)]).output.split())
    settings = out.with_suffix(".toml").read_text()
    assert settings.startswith(f"# safeshield train {tmp_path / 'log.hdf5'} --algorithm shield")
    assert f"--add {tmp_path / 'flight'}\n" in settings
    trained = ShieldTrainer.load(out, device="cpu").shield()
    assert trained.record is None
    assert trained.training_episodes is not None
    assert len(trained.training_episodes) == 50
    flight = FlightLog.load(tmp_path / "flight").to_dataset()
    with pytest.raises(ValueError, match=r"share no episode .* 30 of 30 episodes are in both"):
        trained.calibrate_from_log(flight, "residuals", alpha=0.2)
    # What was not trained on is evidence: a trial of the shield that was on.
    fresh = FlightLog.load(tmp_path / "fresh").to_dataset()
    found = strict.calibrate_from_log(fresh, "trial", policy="sine")
    assert found.log_records[-1].method == "trial"
    with pytest.raises(ValueError, match="must be recorded with this shield on"):
        trained.calibrate_from_log(fresh, "trial", policy="sine")


def test_the_command_line(strict: Shield, tmp_path: Path) -> None:
    path = tmp_path / "flight"
    with ShieldLog(path) as log:
        told = fly(SafetyShield(boat(), strict, log=log), 3)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    for part in (
        "kind",
        "flight",
        strict.digest,
        "replaced share",
        f"steps                {len(told)}",
    ):
        assert part in result.output, result.output
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(result.output) == {"kind": "flight", **FlightLog.load(path).card()}
    result = CliRunner().invoke(app, ["inspect", str(path), "--verify", "key.pem"])
    assert "for files that can be signed" in " ".join(result.output.split())
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "empty")])
    assert result.exit_code == 2
    assert "give a file in it, or the folder of a ShieldLog" in result.output


def test_json_lines(strict: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "flight") as log:
        fly(SafetyShield(boat(), strict, log=log), 2)
    flight = FlightLog.load(tmp_path / "flight")
    flight.to_jsonl(tmp_path / "flight.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "flight.jsonl").read_text().splitlines()]
    assert len(lines) == len(flight.rows)
    assert set(lines[0]) == set(flight.columns)
    steps = [line for line in lines if line["verdict"] != "end"]
    for name, column in flight.columns.items():
        told = [[np.nan if v is None else v] if v is None else v for v in (s[name] for s in steps)]
        np.testing.assert_array_equal(np.array(told).reshape(column.shape), column)
    assert [line["executed"] for line in lines if line["verdict"] == "end"] == [[None, None]] * 2


# -- who holds the folder -------------------------------------------------------------------------


def test_a_log_that_is_refused_or_whose_wrapper_is_closed_leaves_its_folder(
    strict: Shield, tmp_path: Path
) -> None:
    path = tmp_path / "flight"
    with SafetyShield(boat(), strict, log=ShieldLog(path)) as env:
        fly(env, 1)
    with pytest.raises(ValueError, match="whose shield is"):
        SafetyShield(boat(), strict.with_delta(0.3), log=ShieldLog(path))
    ShieldLog(path)
    with SafetyShield(boat(), strict, log=ShieldLog(path)) as env:
        fly(env, 1)
    assert FlightLog.load(path).num_episodes == 2


@pytest.mark.parametrize("made", [{"current": 3.5}, {"dt": 0.1}])
def test_a_flight_is_of_one_environment(
    made: dict[str, Any], strict: Shield, tmp_path: Path
) -> None:
    path = tmp_path / "flight"
    with SafetyShield(boat(), strict, log=ShieldLog(path)) as env:
        fly(env, 1)
    other = gym.make("safeshield/Boat-v0", max_episode_steps=STEPS, **made)
    with pytest.raises(ValueError, match="environment kwargs"):
        SafetyShield(other, strict, log=ShieldLog(path))
    with SafetyShield(other, strict, log=ShieldLog(tmp_path / "other")) as env:
        fly(env, 1)
    assert FlightLog.load(tmp_path / "other").environment_kwargs == made


FORKED = """
import multiprocessing, sys
import gymnasium as gym
from safeshield import Shield, ShieldLog
from safeshield.wrappers import SafetyShield
import safeshield.envs, warnings
warnings.simplefilter("ignore")
file, path, closes = sys.argv[1:]

def work():
    env = gym.make("safeshield/Boat-v0", max_episode_steps=30)
    env = SafetyShield(env, Shield.load(file), log=ShieldLog(path, flush_seconds=60.0))
    env.reset(seed=0)
    for _ in range(20):
        env.step(env.action_space.sample())
    if closes == "closes":
        env.close()

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("closes", ["closes", "leaves"])
def test_a_forked_worker_that_ends_writes_everything(
    closes: str, strict: Shield, tmp_path: Path
) -> None:
    strict.save(tmp_path / "strict.safetensors")
    arguments = [str(tmp_path / "strict.safetensors"), str(tmp_path / "flight"), closes]
    subprocess.run([sys.executable, "-c", FORKED, *arguments], check=True, timeout=120)
    flight = FlightLog.load(tmp_path / "flight")
    assert len(flight) == 20
    assert flight.ends["verdict"].tolist() == ["cut"]


COPIED = """
import os, sys, warnings
import gymnasium as gym
from safeshield import Shield, ShieldLog
from safeshield.wrappers import SafetyShield
import safeshield.envs
file, path = sys.argv[1:]
env = gym.make("safeshield/Boat-v0", max_episode_steps=30)
env = SafetyShield(env, Shield.load(file), log=ShieldLog(path))
env.reset(seed=0)
for _ in range(5):
    env.step(env.action_space.sample())
child = os.fork()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(7 if child else 50):
        *_, over, cut, _ = env.step(env.action_space.sample())
        if over or cut:
            env.reset()
    env.close()
told = [str(one.message) for one in caught if "forked" in str(one.message)]
if child:
    assert os.waitpid(child, 0)[1] == 0
sys.exit(0 if len(told) == (0 if child else 1) else 3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_copy_of_the_process_records_nothing_and_says_so(strict: Shield, tmp_path: Path) -> None:
    strict.save(tmp_path / "strict.safetensors")
    arguments = [str(tmp_path / "strict.safetensors"), str(tmp_path / "flight")]
    subprocess.run([sys.executable, "-c", COPIED, *arguments], check=True, timeout=300)
    flight = FlightLog.load(tmp_path / "flight")
    assert len(flight) == 12
    assert (flight.lost, flight.torn) == (0, 0)


class Breaks(gym.Wrapper[Any, Any, Any, Any]):
    """A boat whose step fails once, at the step with this number."""

    fails_at = 4

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.fails_at -= 1
        if self.fails_at == 0:
            raise ConnectionError("the plant does not answer")
        return super().step(action)


@pytest.mark.parametrize("kind", ["single", "vector", "sb3", "interventions"])
def test_the_action_in_which_the_plant_fails_is_recorded(
    kind: str, strict: Shield, tmp_path: Path
) -> None:
    kept: Any = "interventions" if kind == "interventions" else "all"
    log = ShieldLog(tmp_path / "flight", kept)
    sent: list[Array] = []
    env: Any
    if kind in ("single", "interventions"):
        env = SafetyShield(Breaks(boat()), strict, log=log)
        action = act(env.reset(seed=3)[0])
    elif kind == "vector":
        boats = gym.vector.SyncVectorEnv([boat, lambda: Breaks(boat())])
        env = VectorSafetyShield(boats, strict, log=log)
        action = act(env.reset(seed=3)[0])
    else:
        env = VecSafetyShield(DummyVecEnv([boat, lambda: Breaks(boat())]), strict, log=log)
        env.seed(3)
        action = act(env.reset())
    for _ in range(3):
        sent.append(action)
        action = act(env.step(action)[0])
    sent.append(action)
    with pytest.raises(ConnectionError):
        env.step(action)
    # A reset that comes after it records no action again.
    env.reset()
    env.close()
    flight = FlightLog.load(tmp_path / "flight")
    count = 2 if kind in ("vector", "sb3") else 1
    failed = np.isnan(flight.columns["reward"])
    assert failed.sum() == count
    assert flight.columns["step"][failed].tolist() == [3] * count
    np.testing.assert_array_equal(
        flight.columns["proposed"][failed], np.asarray(sent[-1], np.float64).reshape(count, -1)
    )
    assert np.isfinite(flight.columns["executed"][failed]).all()
    assert np.isfinite(flight.columns["observation"][failed]).all()
    assert np.isfinite(flight.columns["h"][failed]).all()
    # Nothing is known of the state that it reached.
    assert flight.ends["verdict"].tolist() == ["cut"] * count
    assert flight.ends["step"].tolist() == [4] * count
    assert np.isnan(flight.ends["observation"]).all()
    assert np.isnan(flight.ends["h"]).all()
    assert flight.card()["episodes"] == count
    if kept == "all":
        with pytest.warns(FlightWarning, match=f"{count} of {4 * count} recorded steps are not in"):
            log_of_it = flight.to_dataset()
        assert log_of_it.episode_lengths.tolist() == [3] * count
        flight.to_jsonl(tmp_path / "flight.jsonl")


def test_a_removed_file_and_a_removed_folder_are_noticed(strict: Shield, tmp_path: Path) -> None:
    log = ShieldLog(tmp_path / "flight", block_steps=8)
    env = SafetyShield(boat(), strict, log=log)
    fly_and_flush(env, log, 1)
    flight_files(tmp_path / "flight")[0].unlink()
    with pytest.warns(FlightWarning, match="was removed while it was being written"):
        fly_and_flush(env, log, 2)
    assert log.lost == 0
    assert len(FlightLog.load(tmp_path / "flight")) == 2 * STEPS
    shutil.rmtree(tmp_path / "flight")
    with pytest.warns(FlightWarning, match="losing steps: No such file or directory"):
        fly_and_flush(env, log, 1)
    assert log.lost == STEPS + 1
    with pytest.warns(FlightWarning, match="rows of the flight"):
        log.close()


def test_a_disk_that_was_full_from_the_beginning_has_lost_rows_and_removed_none(
    strict: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]

    class Disk(io.FileIO):
        def write(self, data: Any, /) -> int:  # noqa: ANN401
            if full[0]:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(flight_file.io, "FileIO", Disk)
    log = ShieldLog(tmp_path / "flight", block_steps=8)
    env = SafetyShield(boat(), strict, log=log)
    with pytest.warns(FlightWarning, match="losing steps"):
        fly_and_flush(env, log, 2)
    full[0] = False
    fly(env, 1)
    with pytest.warns(FlightWarning, match="rows of the flight"):
        log.close()
    flight = FlightLog.load(tmp_path / "flight")
    assert (flight.lost, flight.removed) == (2 * (STEPS + 1), 0)
    assert flight.card()["lost"] == 2 * (STEPS + 1)


def test_a_flight_that_is_told_its_agent_names_it(strict: Shield, tmp_path: Path) -> None:
    path = tmp_path / "flight"
    with SafetyShield(boat(), strict, log=ShieldLog(path, agent="a.zip")) as env:
        fly(env, 3)
    flight = FlightLog.load(path)
    assert flight.agent == flight.card()["agent"] == "a.zip"
    with pytest.raises(ValueError, match=r"is a.zip, and this one is none: .* or pass the agent="):
        SafetyShield(boat(), strict, log=ShieldLog(path))
    with pytest.raises(TypeError, match=r"got a FlightLog: pass held_out.to_dataset\(\)"):
        strict.calibrate_from_log(flight, "trial")  # type: ignore[arg-type]
    log = flight.to_dataset()
    assert (log.provenance or {})["collected_by"] == "a.zip"
    record = strict.calibrate_from_log(log, "trial", confidence=0.1).log_records[-1]
    assert record.agent == "a.zip"
    with pytest.raises(ValueError, match=r"got 'b\.zip', but the log was collected by 'a\.zip'"):
        strict.calibrate_from_log(log, "trial", policy="b.zip")
    with pytest.raises(ValueError, match=r"whose agent is a\.zip, and this one is b\.zip"):
        SafetyShield(boat(), strict, log=ShieldLog(path, agent="b.zip"))
    with pytest.raises(ValueError, match="agent must be the name of the agent, or None"):
        ShieldLog(tmp_path / "other", agent="")


def test_the_plant_goes_on_where_warnings_are_errors(
    strict: Shield, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ShieldLog(tmp_path / "flight")
    env = SafetyShield(boat(), strict, log=log)
    fly(env, 1, steps=3)
    log.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlightWarning)
        assert len(fly(env, 1, steps=3)) == 3
    assert "is closed" in caplog.text


def test_a_folder_stays_the_same_where_the_process_changes_its_own(
    strict: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SafetyShield(boat(), strict, log=ShieldLog("flight")) as env:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        fly(env, 1)
    assert FlightLog.load(tmp_path / "flight").num_episodes == 1


def test_a_flight_of_another_plant_is_not_joined(strict: Shield, tmp_path: Path) -> None:
    with SafetyShield(boat(), strict, log=ShieldLog(tmp_path / "flight")) as env:
        fly(env, 2)
    other = FlightLog.load(tmp_path / "flight").to_dataset()
    space = gym.spaces.Box(-1.0, 1.0, (5,))
    foreign = OfflineDataset.from_arrays(
        observations=np.zeros((2, 5)), actions=other.actions[:2], rewards=[0, 0],
        next_observations=np.zeros((2, 5)), terminated=[False, True], truncated=[False, False],
        costs=[0, 1], observation_space=space, action_space=other.action_space,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not of the same plant"):
        FlightLog.load(tmp_path / "flight").to_dataset(like=foreign)
