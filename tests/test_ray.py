"""Workers on a local Ray. What needs Ray is skipped where it is not installed."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fitted import DT
from typer.testing import CliRunner

from safeshield.calibration.calibrate import calibrate
from safeshield.cli import app
from safeshield.rollouts import ray_workers
from safeshield.rollouts.ray_workers import Cluster
from safeshield.rollouts.workers import WorkerVectorEnv
from safeshield.shield import Shield

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
BOAT = "safeshield/Boat-v0"
REQUEST: dict[str, Any] = {"epsilon": 0.3, "confidence": 0.8, "deltas": [0.3], "num_envs": 6}


def boat() -> gym.Env[Any, Any]:
    return gym.make(BOAT, dt=DT, max_episode_steps=100)


def third_step(exits: bool) -> str:
    """The id of an environment that ends its process, or raises, in its third step.

    Ray's workers do not import this module, so its class is sent to them by value.
    """

    class Fragile(gym.Env[Any, Any]):
        observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, **_: Any) -> Any:  # noqa: ANN401
            self.time = 0
            return np.zeros(1, np.float32), {"cost": 0.0}

        def step(self, action: Any) -> Any:  # noqa: ANN401
            action[:] = 0.0  # What it gets is its own.
            self.time += 1
            if self.time == 3:
                if exits:
                    os._exit(9)
                raise ValueError("the third step is not for you")
            return np.zeros(1, np.float32), 0.0, False, self.time == 5, {"cost": 0.0}

    name = f"SafeshieldTest/{'Exits' if exits else 'Raises'}-v0"
    gym.register(name, entry_point=lambda: Fragile())
    return name


def played(name: str) -> None:
    envs = WorkerVectorEnv(gym.make(name), 3, 2, "auto")
    try:
        envs.reset(seed=0)
        for _ in range(4):
            envs.step(np.ones((3, 1), np.float32))
    finally:
        envs.close()


def test_the_record_on_ray_is_that_of_one_process(ray: Any, shield: Shield) -> None:  # noqa: ANN401
    records = [
        calibrate(shield, boat(), policy="random", **REQUEST, **how).to_json()
        for how in ({"workers": 1}, {"workers": 2, "ray": "auto"}, {"ray": "auto"})
    ]
    first, *others = [{**record, "date": None} for record in records]
    assert others == [first, first]


def test_an_error_in_an_environment_on_ray_arrives_as_it_is(ray: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="the third step") as caught:
        played(third_step(exits=False))
    assert "in step" in "".join(caught.value.__notes__)


def test_a_worker_on_ray_that_dies_is_told(ray: Any) -> None:  # noqa: ANN401
    name = third_step(exits=True)
    message = r"a worker on Ray ended .*; nothing of this run was kept: start it again"
    with pytest.raises(RuntimeError, match=message):
        played(name)
    # What it held is free again, and the connection that was there before is still there.
    assert ray.is_initialized()
    WorkerVectorEnv(boat(), 2, 2, "auto").close()


def test_workers_that_find_no_cpu_are_told(
    ray: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_workers, "_SECONDS_TO_BEGIN", 5.0)
    many = int(ray.cluster_resources()["CPU"]) + 1
    with pytest.raises(RuntimeError, match=r"has not started a worker in 5 s; .* fewer workers"):
        WorkerVectorEnv(boat(), many, many, "auto")


def test_another_cluster_than_the_connected_one_is_refused(ray: Any) -> None:  # noqa: ANN401
    address = ray.get_runtime_context().gcs_address
    assert Cluster(address).cpus >= 1
    with pytest.raises(ValueError, match=f"ray must be 'auto' or '{re.escape(address)}'"):
        Cluster("elsewhere:6379")


def test_a_vector_environment_is_refused_on_ray(shield: Shield) -> None:
    envs = gym.vector.SyncVectorEnv([boat] * 2)
    with pytest.raises(ValueError, match="ray='auto' needs one Gymnasium environment"):
        calibrate(shield, envs, ray="auto", **{**REQUEST, "num_envs": 2})


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that seems to have no connection to Ray."""
    pytest.importorskip("ray")
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.usefixtures("unconnected")
def test_an_address_that_nothing_answers_is_told_at_once(
    shield: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "_SECONDS_TO_TELL", 3.0)
    begin = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:  # It listens, and is no Ray.
        addresses = [f"127.0.0.1:{mute.getsockname()[1]}", "127.0.0.1:1", "127.0.0.1:99999"]
        for address in addresses:
            with pytest.raises(ConnectionError, match=f"no Ray cluster answers at ray='{address}'"):
                calibrate(shield, boat(), ray=address, **REQUEST)
    assert time.monotonic() - begin < 40.0
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match="no Ray cluster answers at ray='auto'"):
        calibrate(shield, boat(), ray="auto", **REQUEST)
    for wrong in ("nowhere", ""):
        with pytest.raises(ValueError, match=f"'auto', 'local' or host:port, got '{wrong}'"):
            calibrate(shield, boat(), ray=wrong, **REQUEST)
    shield.save(tmp_path / "a.safetensors")
    command = ["calibrate", tmp_path / "a.safetensors", BOAT, tmp_path / "b.safetensors"]
    result = CliRunner().invoke(app, [*map(str, command), "--ray", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert "error: no Ray cluster answers at ray='127.0.0.1:1'" in result.output


def test_a_killed_worker_of_the_matrix_goes_on(
    ray: Any,  # noqa: ANN401
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cell starts again. Where each process ends, it fails, and what needs it does not run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import matrix

    def work(cell: Any) -> None:  # noqa: ANN401
        with (tmp_path / str(cell)).open("a") as stream:
            stream.write("x")
        attempts = len((tmp_path / str(cell)).read_text())
        if cell.method == "hopeless" or (cell.method == "killed" and attempts == 1):
            os.kill(os.getpid(), 9)
        if cell.method == "wrong":
            raise ValueError("no log")

    needs = {"after": ("hopeless",), "then": ("killed",)}
    methods = ["killed", "then", "wrong", "after"]
    failed = matrix.run(matrix.plan(["A"], methods, [0], needs), work, needs, "auto")
    attempts = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert attempts == {
        "A_killed_0": 2, "A_then_0": 1, "A_wrong_0": 1, "A_hopeless_0": matrix.ATTEMPTS
    }  # fmt: skip
    told = {str(cell): error for cell, error in failed.items()}
    assert set(told) == {"A_wrong_0", "A_hopeless_0", "A_after_0"}
    assert told["A_wrong_0"] == "ValueError: no log"
    assert told["A_after_0"] == "a cell that it needs has failed"
    assert told["A_hopeless_0"].startswith("its process was killed 4 times (")
    assert ray.is_initialized()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, shield: Shield) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "safeshield\[ray\]"'):
        calibrate(shield, boat(), ray="auto", **REQUEST)
