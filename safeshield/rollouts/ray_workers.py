"""Worker processes on a Ray cluster (https://docs.ray.io)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from safeshield.rollouts.workers import NOTHING_KEPT, Environments, Worker

_SECONDS_TO_ANSWER = 5.0
_SECONDS_TO_TELL = 30.0
_SECONDS_TO_BEGIN = 60.0
_SECONDS_TO_END = 5.0


class Cluster:
    """A connection to a Ray cluster.

    A connection that this process has already made by ``ray.init`` is used, and stays open.

    Args:
        address: Address as `ray.init` takes it: "auto" for the cluster of this machine or of the
            variable RAY_ADDRESS, "local" to start Ray on this machine until `close`, or host:port.

    Attributes:
        ray: The package ray, connected.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: No Ray cluster answers at the address.
        ValueError: This process is connected to another cluster.
    """

    def __init__(self, address: str) -> None:
        self.ray: Any = _package()
        self._own = not self.ray.is_initialized()
        if not address:
            raise ValueError("ray must be 'auto', 'local' or host:port, got ''")
        if self._own:
            if address != "local":
                _check_answers(address)
            try:
                self.ray.init(address=address)
            except ConnectionError as error:
                raise _no_answer(address, str(error)) from error
            return
        connected = self.ray.get_runtime_context().gcs_address
        if address not in ("auto", connected):
            raise ValueError(
                f"ray must be 'auto' or '{connected}', to which ray.init has connected this "
                f"process, got '{address}'; pass 'auto', or call ray.shutdown() first"
            )

    @property
    def cpus(self) -> int:
        """Number of CPUs of the cluster, at least 1."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def worker(self, spec: bytes, count: int, modules: Sequence[str]) -> Worker:
        """Start a worker on one CPU of the cluster. The arguments are those of `Environments`."""
        return _Actor(self.ray, spec, count, modules)

    def close(self) -> None:
        """Close the connection, unless it was there before."""
        if self._own:
            self.ray.shutdown()


class _Actor(Worker):
    """A worker that is a Ray actor."""

    def __init__(self, ray: Any, *environments: Any) -> None:  # noqa: ANN401
        self._ray = ray
        # Ray gives an actor with one CPU one thread for linear algebra.
        self._actor = ray.remote(num_cpus=1)(Environments).remote(*environments)
        super().__init__()

    def _post(self, packed: bytes) -> None:
        self._reply = self._actor.answer.remote(packed)

    def _receive(self) -> bytes:
        errors = self._ray.exceptions
        try:
            reply: bytes = self._ray.get(
                self._reply, timeout=None if self._begun else _SECONDS_TO_BEGIN
            )
        except errors.GetTimeoutError as late:
            free = self._ray.available_resources().get("CPU", 0)
            raise RuntimeError(
                f"Ray has not started a worker in {_SECONDS_TO_BEGIN:g} s; {free:g} of its CPUs "
                "are free and each worker takes one: pass fewer workers, or see `ray status`"
            ) from late
        except errors.RayActorError as gone:
            why = " ".join(str(gone).split())
            raise RuntimeError(f"a worker on Ray ended ({why:.300}); {NOTHING_KEPT}") from gone
        return reply

    def stop(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.close.remote(), timeout=_SECONDS_TO_END)
        self._ray.kill(self._actor)


def _check_answers(address: str) -> None:
    """Raise ConnectionError unless a Ray cluster answers at host:port, or at "auto".

    `ray.init` would wait for minutes and then end this process.
    """
    told = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    host, _, port = told.removeprefix("ray://").rpartition(":")
    if told != "auto" and not (host and port.isdigit()):
        raise ValueError(f"ray must be 'auto', 'local' or host:port, got '{told}'")
    try:
        if told != "auto":
            socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
        if not told.startswith("ray://"):
            command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", told]
            subprocess.run(command, timeout=_SECONDS_TO_TELL, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError, OverflowError) as error:
        raise _no_answer(address, str(error)) from error


def _no_answer(address: str, why: str) -> ConnectionError:
    return ConnectionError(
        f"no Ray cluster answers at ray='{address}' ({' '.join(why.split()):.200}); start one by "
        "`ray start --head` and pass the address that it prints, or pass ray='local'"
    )


def _package() -> Any:  # noqa: ANN401
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f'ray= needs the package ray ({error}): pip install "safeshield[ray]"'
        ) from error
    return ray
