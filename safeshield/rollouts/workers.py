"""A vector environment whose copies step in other processes, for environments that are slow."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import cloudpickle
import gymnasium as gym
import numpy as np

from safeshield.rollouts.copies import (
    Member,
    most_together,
    one_per_process,
    refuse_vector_env,
    spec_to_copy,
    why_alone,
)
from safeshield.spaces.generic import Env, SyncVectorEnv

if TYPE_CHECKING:
    from safeshield.rollouts.ray_workers import Cluster

REGISTERING = ("safeshield.envs", "safeshield.suites")
"""Modules whose import registers environments and constraints. A new process must import those of
its parent."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SECONDS_TO_END = 5.0
NOTHING_KEPT = (
    "nothing of this run was kept: start it again, or run with workers=0 to see why it ended"
)


def threads_each(threads: int = 1) -> contextlib.AbstractContextManager[None]:
    """Make processes that start in this context use `threads` threads each for linear algebra.

    Several processes with as many threads each as there are cores would compete for the cores.
    """
    return environment_variables(dict.fromkeys(_THREADS, str(threads)))


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables; processes that other threads start meanwhile inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class WorkerVectorEnv(SyncVectorEnv):
    """`num_envs` copies of an environment that are stepped by `workers` processes.

    It is a SyncVectorEnv whose members are in other processes, of this machine or of a Ray cluster.
    All processes step their share of the copies at the same time. The results are the same, bit for
    bit, for every number of processes. Once its episode is over, a copy does not step until the
    next reset with a seed. The class is therefore meant for whole episodes (`run_episodes`), not
    for training.

    Gymnasium's `AsyncVectorEnv` uses one process for each copy. With eight copies on two cores it
    started 3.7 times and stepped 2.8 times slower, and it does not report why a process ended.

    The processes are spawned, because PyTorch's threads do not survive a fork. A spawned process
    imports the script that started it, so a script must use this class below
    ``if __name__ == "__main__":``.

    Args:
        env: The environment to copy. `gymnasium.make` must be able to rebuild it.
        num_envs: Number of copies, at least 1; None for the number that `copies` makes, which does
            not depend on `workers`. It is at most `workers` where a process can hold
            only one environment (``metadata["one_per_process"]``).
        workers: Number of processes, at least 1. At most `num_envs` processes are started. With
            `ray`, 0 means one for each CPU of the cluster.
        ray: Address of a Ray cluster on which the processes run (see `ray_workers.Cluster`); None
            for this machine, without Ray.

    Raises:
        ValueError: A number is out of range, or the environment cannot be copied.
        ImportError: Ray is not installed.
        ConnectionError: No Ray cluster answers at the address.
        RuntimeError: A process ended unexpectedly, or Ray has no free CPU for one.

    >>> import safeshield.envs
    >>> env = gym.make("safeshield/Boat-v0")
    >>> envs = WorkerVectorEnv(env, num_envs=4, workers=2)  # doctest: +SKIP
    """

    def __init__(
        self, env: Env, num_envs: int | None, workers: int, ray: str | None = None
    ) -> None:
        refuse_vector_env(env, workers, ray)
        self._remotes: list[_Remote] = []
        self._workers: list[Worker] = []
        self._cluster: Cluster | None = None
        try:
            if ray is not None:
                from safeshield.rollouts.ray_workers import Cluster

                self._cluster = Cluster(ray)
                workers = workers or self._cluster.cpus
            self._start(env, num_envs, workers)
        except BaseException:
            self._stop()
            raise

    def _start(self, env: Env, num_envs: int | None, workers: int) -> None:
        spec = spec_to_copy(env, elsewhere=True)
        if num_envs is None:
            num_envs = workers if one_per_process(env) else most_together(spec)
        if num_envs < 1 or workers < 1:
            raise ValueError(
                f"num_envs and workers must be at least 1, got {num_envs} and {workers}"
            )
        if spec is None:
            raise ValueError(
                f"workers need an environment that gymnasium.make can rebuild, got {env}, "
                f"{why_alone(env, elsewhere=True)}; register it and make it by its id alone, or "
                "leave workers out"
            )
        if one_per_process(env) and num_envs > workers:
            raise ValueError(
                f"num_envs must be at most workers = {workers} for {env}, of which a process can "
                f"hold one only; got {num_envs}"
            )
        packed = cloudpickle.dumps(spec)
        modules = [name for name in REGISTERING if name in sys.modules]
        start: Callable[..., Worker] = _Process if self._cluster is None else self._cluster.worker
        for share in np.array_split(np.arange(num_envs), min(workers, num_envs)):
            worker = start(packed, len(share), modules)
            self._workers.append(worker)
            self._remotes += [_Remote(env, worker, i) for i in range(len(share))]
        for worker in self._workers:
            worker.await_answers()
        self._members = [Member(one, owned=False, freeze=True) for one in self._remotes]
        super().__init__([_giving(member) for member in self._members])
        self.spec = spec

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reset every copy, and return the batch of observations and the infos.

        The seeds are seed, seed + 1, ..., or those of a list. `options` are passed to the copies.
        """
        seeds: list[int | None]
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        for remote, one, member in zip(self._remotes, seeds, self._members, strict=True):
            if one is not None or not member.over:
                remote.ask("reset", (one, options))
        self._send()
        return super().reset(seed=seeds, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:  # noqa: ANN401
        """Step every copy whose episode is not over by its row of `actions`.

        The result has the form of `gymnasium.vector.VectorEnv.step`.
        """
        each = gym.vector.utils.iterate(self.action_space, actions)
        for remote, action, member in zip(self._remotes, each, self._members, strict=True):
            if not member.over:
                remote.ask("step", action)
        self._send()
        return super().step(actions)

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Stop the worker processes. `kwargs` are not used."""
        self._stop()

    def _send(self) -> None:
        for worker in self._workers:
            worker.send()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._cluster is not None:
            self._cluster.close()
        self._cluster = None


class _Remote(gym.Env[Any, Any]):
    """A proxy for one environment in a worker process.

    `reset` and `step` return the answer to the request that `ask` has made before.
    """

    def __init__(self, env: Env, worker: Worker, index: int) -> None:
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata, self.spec = env.metadata, env.spec
        self._worker, self._index = worker, index

    def ask(self, what: str, argument: object) -> None:
        self._worker.ask(self._index, what, argument)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        answer: tuple[Any, dict[str, Any]] = self._worker.answer(self._index)
        return answer

    def step(self, action: Any) -> Any:  # noqa: ANN401 - checked by Member
        return self._worker.answer(self._index)


class Environments:
    """The environments of one worker, which answer requests there.

    Args:
        spec: Gymnasium's `EnvSpec` of the environments, pickled by cloudpickle.
        count: Number of environments.
        modules: Modules to import first, because they register environments.
    """

    def __init__(self, spec: bytes, count: int, modules: Sequence[str]) -> None:
        self._spec, self._count, self._modules = spec, count, modules
        self._envs: list[Env] = []

    def answer(self, packed: bytes) -> bytes:
        """Answer pickled requests, {index: ("step" or "reset", argument)}.

        The environments are made at the first call.

        Returns:
            The pickled pair of the answers {index: result} and an error or None.
        """
        try:
            if not self._envs:
                self._envs = self._made()
            answers: dict[int, Any] = {}
            for index, (what, argument) in pickle.loads(packed).items():
                if what == "step":
                    answers[index] = self._envs[index].step(argument)
                else:
                    seed, options = argument
                    answers[index] = self._envs[index].reset(seed=seed, options=options)
            return pickle.dumps((answers, None))
        except Exception as error:
            return pickle.dumps(({}, sendable(error)))

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _made(self) -> list[Env]:
        for name in self._modules:
            importlib.import_module(name)
        spec = cloudpickle.loads(self._spec)
        # The checker is disabled because it has already checked the environment that is copied.
        return [gym.make(spec, disable_env_checker=True) for _ in range(self._count)]


class Worker(ABC):
    """The connection to one worker with some environments.

    The requests to all of its environments are sent together, and so are the answers. A subclass
    starts the worker, and then calls this constructor.
    """

    def __init__(self) -> None:
        self._questions: dict[int, tuple[str, object]] = {}
        self._answers: dict[int, Any] = {}
        self._begun = False
        # The first answer says that the environments have been made.
        self._post(pickle.dumps({}))
        self._waiting = True

    @abstractmethod
    def _post(self, packed: bytes) -> None:
        """Send requests to the worker."""

    @abstractmethod
    def _receive(self) -> bytes:
        """Wait for the answer to the last requests.

        Raises:
            RuntimeError: The worker has ended.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the worker."""

    def ask(self, index: int, what: str, argument: object) -> None:
        """Note a request to one environment, which `send` sends."""
        self._questions[index] = (what, argument)

    def send(self) -> None:
        """Send the requests that `ask` has noted."""
        if self._questions:
            self._post(pickle.dumps(self._questions))
            self._questions, self._waiting = {}, True

    def answer(self, index: int) -> Any:  # noqa: ANN401
        """Return the answer of one environment to its last request."""
        self.await_answers()
        return self._answers.pop(index)

    def await_answers(self) -> None:
        """Wait for the answers to the requests that were sent, and raise an error among them."""
        if not self._waiting:
            return
        self._waiting = False
        answers, error = pickle.loads(self._receive())
        if error is not None:
            raise error
        self._answers, self._begun = answers, True


class _Process(Worker):
    """A worker process of this machine."""

    def __init__(self, spec: bytes, count: int, modules: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, spec, count, modules), daemon=True
        )
        with threads_each():
            self._process.start()
        super().__init__()
        theirs.close()

    def _post(self, packed: bytes) -> None:
        self._connection.send_bytes(packed)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, ConnectionError) as gone:
            self._process.join(_SECONDS_TO_END)
            ended = f"a worker process ended with exit code {self._process.exitcode}"
            if self._begun:
                raise RuntimeError(f"{ended}; {NOTHING_KEPT}") from gone
            raise RuntimeError(
                f"{ended} before it could begin. A worker imports the script that started it: the "
                "script must be a file, and what it does must stand below "
                '`if __name__ == "__main__":`. If both are so, see what the worker printed, or '
                "run with workers=0"
            ) from gone

    def stop(self) -> None:
        # Closing the pipe ends the process, because its recv_bytes then raises EOFError.
        self._connection.close()
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_SECONDS_TO_END)


def _giving(env: Member) -> Callable[[], Member]:
    return lambda: env


def _work(connection: Connection, spec: bytes, count: int, modules: Sequence[str]) -> None:
    """Answer requests in a worker process until the pipe is closed."""
    environments = Environments(spec, count, modules)
    try:
        while True:
            connection.send_bytes(environments.answer(connection.recv_bytes()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass
    finally:
        environments.close()
        connection.close()


def sendable(error: Exception) -> Exception:
    """Return an error with its traceback as a note.

    An error that cannot be pickled is returned as a RuntimeError.
    """
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{text}")
    return error
