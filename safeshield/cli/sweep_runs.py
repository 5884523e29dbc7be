"""The trainings of ``safeshield sweep``, as tasks on Ray, and the search by Optuna.

Each training writes to a folder of its own: its TensorBoard file, its checkpoint, the agent and,
last of all, its figures. A training whose figures are there is not repeated. Any other one resumes
from its checkpoint, in whichever process it runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safeshield.cli.sweep_plan import Job, Plan, digest
from safeshield.files.atomic import written_whole
from safeshield.files.reading import read_whole
from safeshield.rollouts.ray_workers import Cluster

if TYPE_CHECKING:
    from safeshield.data.dataset import OfflineDataset
    from safeshield.evaluation import ReferenceReturns
    from safeshield.shield.shield import Shield
    from safeshield.spaces.generic import Env

TRIES = 3
"""Number of times that a training is started when its worker ends before it."""
FIGURES, AGENT, ERROR = "figures.json", "agent.safetensors", "error.txt"


class Outcome(NamedTuple):
    """What has become of a training."""

    job: Job
    figures: dict[str, float]
    """Figures by name. A training that failed has none."""
    error: str
    """Error that ended it, "" where it finished."""


class Places(NamedTuple):
    """What a worker needs besides a job and the plan, as absolute paths."""

    file: Path
    """File of the sweep, in whose folder relative paths start."""
    contents: Mapping[str, str]
    """Digest of each log, as `log_contents` returns them."""
    plugins: tuple[Path, ...] = ()
    """Files that register algorithms."""
    trust: bool = False
    """Whether the policy may be a .zip file, which can run code."""


# -- in a worker --------------------------------------------------------------------------------


def train(job: Job, plan: Plan, places: Places) -> dict[str, float]:
    """Train and evaluate an agent, write its files, and return its figures by name.

    Args:
        job: The training, without `config`.
        plan: The sweep.
        places: Paths.
    """
    from safeshield.cli.plugins import load_plugin
    from safeshield.cli.settings import write_settings
    from safeshield.cli.sources import make_env
    from safeshield.data.card import file_digest
    from safeshield.data.dataset import OfflineDataset
    from safeshield.evaluation import ReferenceReturns

    for file in places.plugins:
        load_plugin(file)
    config = plan.config(job.point, job.seed)
    job.folder.mkdir(parents=True, exist_ok=True)
    source = places.file.parent / job.log
    if file_digest(source) != places.contents[job.log]:
        raise ValueError(
            f"{source} has been replaced since the sweep was started: start the sweep again, which "
            "trains on the log that is there now"
        )
    # The environment and the log are checked before the training, not after it.
    env = None if plan.env is None else make_env(plan.env)
    log = None if env is None else _log(source, env)
    file, metrics = job.folder / AGENT, job.folder / "tensorboard"
    if not file.exists():
        learner = plan.kind.kind(config, device="cuda" if plan.gpus else "cpu")
        checkpoint = job.folder / "checkpoint.safetensors"
        if not checkpoint.exists():
            shutil.rmtree(metrics, ignore_errors=True)
        log = OfflineDataset.load(source) if log is None else log
        learner.fit(log, plan.steps, log_dir=metrics, checkpoint=checkpoint)
        write_settings(file.with_suffix(".toml"), config, f"safeshield sweep: {job}")
        learner.save(file)
        checkpoint.unlink(missing_ok=True)
    agent = plan.kind.kind.load(file)
    figures = _last_metrics(metrics)
    if env is not None and log is not None:
        figures |= _scores(plan, job, places, env, ReferenceReturns.of_log(log), agent)
    with written_whole(job.folder / FIGURES) as part:
        part.write_text(json.dumps({"evaluation": plan.evaluation, "figures": figures}, indent=1))
    (job.folder / ERROR).unlink(missing_ok=True)
    return figures


def _last_metrics(folder: Path) -> dict[str, float]:
    """Return the last value of each metric in TensorBoard's files, except of those of time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: float(read.Scalars(tag)[-1].value) for tag in sorted(tags)}


def _scores(
    plan: Plan,
    job: Job,
    places: Places,
    env: Env,
    references: ReferenceReturns,
    agent: Any,  # noqa: ANN401 - an agent of any algorithm
) -> dict[str, float]:
    """Return the figures of an agent by the field's protocol, under the seed of its training."""
    import numpy as np

    from safeshield.evaluation import field_score

    shield = None if plan.policy is None else agent.shield()
    policy = agent
    if plan.policy is not None:
        policy = _policy(plan.policy, places, env, shield)
    score = field_score(
        env,
        policy,
        references=references,
        cost_limit=plan.cost_limit,
        seeds=(job.seed,),
        episodes=plan.episodes,
        shield=shield,
    )
    (run,) = score.runs
    figures = {
        "normalised_return": score.normalised_return,
        "normalised_cost": score.normalised_cost,
        "violation_rate": float(np.mean(np.asarray(run.costs) > 0)),
        "mean_return": float(np.mean(run.returns)),
        "mean_cost": float(np.mean(run.costs)),
    }
    if score.intervention_rate is not None:
        figures["intervention_rate"] = score.intervention_rate
    return figures


def _policy(name: str, places: Places, env: Env, shield: Shield | None) -> object:
    """Return the policy that the sweep's file names; a relative path starts at its folder."""
    from safeshield.cli.sources import policy_of

    source = str(places.file.parent / name) if Path(name).suffix else name
    return policy_of(source, env, shield, places.trust, option="policy")


def _log(path: Path, env: Env) -> OfflineDataset:
    """Return a log, after a check that it is of the environment."""
    from safeshield.cli.sources import log_of

    return log_of(str(path), env, option="logs", otherwise="the log's environment as env")


# -- in the driver ------------------------------------------------------------------------------


def check_evaluation(plan: Plan, places: Places) -> None:
    """Check that agents can be evaluated as the file says, before anything is trained.

    Raises:
        ValueError: The environment or the policy cannot be created, or a log was recorded in
            another environment. The message names the file and its entry.
    """
    import gymnasium as gym

    from safeshield.cli.sources import make_env
    from safeshield.evaluation import ReferenceReturns
    from safeshield.requirements import explained

    if plan.env is None:
        return
    try:
        env = make_env(plan.env)
    except (gym.error.Error, ValueError, TypeError, OSError, ImportError) as error:
        told = explained(error) if isinstance(error, ModuleNotFoundError) else error
        raise ValueError(
            f"{places.file}: env must be the id of an environment, or module:id, got "
            f"'{plan.env}': {told}"
        ) from error
    try:
        if plan.policy not in (None, "adversary"):
            _policy(plan.policy, places, env, None)
        for log in plan.logs:
            ReferenceReturns.of_log(_log(places.file.parent / log, env))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{places.file}: {error}") from error


def finished(job: Job, plan: Plan) -> dict[str, float] | None:
    """Return the figures that an earlier call wrote; None where the training is not finished.

    Raises:
        ValueError: The file that holds them is damaged.
    """
    path = job.folder / FIGURES
    try:
        stored = json.loads(read_whole(path))
        figures: dict[str, float] = stored["figures"]
        if not all(isinstance(one, int | float) for one in figures.values()):
            raise TypeError("a figure is no number")
        same = stored["evaluation"] == plan.evaluation
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it and start the sweep "
            "again, which makes it anew from the agent beside it"
        ) from error
    # With another evaluation the agent is kept, and evaluated again.
    return figures if same else None


def sweep(
    plan: Plan, places: Places, folder: Path, address: str, say: Callable[[str], None]
) -> Generator[Outcome, None, None]:
    """Run all trainings of a sweep on Ray, and yield what became of each as it ends.

    Args:
        plan: The sweep.
        places: Paths.
        folder: Folder of the sweep.
        address: Ray cluster, as `Cluster` takes it.
        say: Function that shows a line of text to the user.

    Raises:
        ImportError: Ray is not installed, or Optuna, which a search needs.
        ConnectionError: No Ray cluster answers.
        ValueError: The cluster has not enough GPUs for one training.
    """
    search = (
        None if plan.trials is None else _Search(plan, places.contents, folder / "search.journal")
    )
    points = plan.grid()
    cluster = Cluster(address)
    try:
        pool = _Pool(cluster, plan, places, say)
        waiting = True
        while True:
            # A grid is queued at once. A search chooses its next settings by the results so far.
            while waiting and (search is None or pool.running < cluster.cpus):
                point = next(points, None) if search is None else search.ask()
                waiting = point is not None
                for job in plan.jobs(point, folder, places.contents) if point is not None else ():
                    figures = finished(job, plan)
                    if figures is None:
                        pool.start(job)
                        continue
                    known = Outcome(job, figures, "")
                    if search is not None:
                        search.tell(known)
                    yield known
            if not pool.running:
                return
            ended = pool.next()
            if ended is None:
                continue
            if search is not None:
                search.tell(ended)
            yield ended
    finally:
        cluster.close()


class _Pool:
    """Trainings on Ray, each on one CPU. It starts one again whose worker ended before it."""

    def __init__(
        self, cluster: Cluster, plan: Plan, places: Places, say: Callable[[str], None]
    ) -> None:
        ray = cluster.ray
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < plan.gpus:
            raise ValueError(f"gpus {plan.gpus:g}: the Ray cluster has {gpus:g} GPUs; give fewer")
        self._ray, self._say = ray, say
        # The driver starts a training again itself, because Ray would not tell of it.
        self._task = ray.remote(num_cpus=1, num_gpus=plan.gpus, max_retries=0)(train)
        self._common = plan, places
        self._running: dict[Any, tuple[Job, int]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, job: Job, tried: int = 1) -> None:
        # The configuration of a plugin's algorithm cannot be sent before the plugin is loaded.
        task = self._task.remote(job._replace(config=None), *self._common)
        self._running[task] = job, tried

    def next(self) -> Outcome | None:
        """Wait for a task to end. Return None where its worker died and it was started again."""
        (task,), _ = self._ray.wait(list(self._running))
        job, tried = self._running.pop(task)
        try:
            return Outcome(job, self._ray.get(task), "")
        except self._ray.exceptions.RayTaskError as error:
            told = f"{type(error.cause).__name__}: {error.cause}"
            return self._failed(job, told, str(error))
        except self._ray.exceptions.RayError as gone:
            told = f"its worker on Ray ended ({type(gone).__name__})"
            if tried == TRIES:
                return self._failed(job, f"{told}, {TRIES} times", str(gone))
            self._say(f"{job}: {told}; it resumes from its checkpoint, try {tried + 1} of {TRIES}")
            self.start(job, tried + 1)
            return None

    def _failed(self, job: Job, told: str, whole: str) -> Outcome:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / ERROR).write_text(whole)
        return Outcome(job, {}, " ".join(told.split()))


class _Search:
    """A search by Optuna for the settings with the highest return within the cost limit.

    The objective of a setting is its mean normalised return over logs and seeds. Its constraints
    are that the mean normalised cost on each log is at most 1, the rule of the literature.

    Args:
        plan: The sweep.
        contents: Digest of each log, as `log_contents` returns them.
        file: Journal of the search, from which it resumes.
    """

    def __init__(self, plan: Plan, contents: Mapping[str, str], file: Path) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                f'trials needs the package optuna ({error}): pip install "safeshield[sweep]"'
            ) from error
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._states = plan, optuna.trial.TrialState
        self._space: dict[str, Any] = {}
        for name, values in plan.vary.items():
            if not isinstance(values, dict):
                # Optuna's choices are no lists, which some settings are.
                choices = [json.dumps(value) for value in values]
                self._space[name] = optuna.distributions.CategoricalDistribution(choices)
            elif plan.whole(name):
                self._space[name] = optuna.distributions.IntDistribution(**values)
            else:
                self._space[name] = optuna.distributions.FloatDistribution(**values)
        values = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
        for name in ("trials", "report", "gpus"):
            del values[name]
        # Results on another log are those of another search.
        values["logs"] = [(log, contents[log]) for log in plan.logs]
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=digest(values),
            direction="maximize",
            load_if_exists=True,
        )
        self._open: dict[str, tuple[list[Any], list[Outcome]]] = {}
        trials = self._study.get_trials(deepcopy=False)
        # The sampler has another seed in each call of the sweep. With the same seed it would
        # propose the settings of the first call again.
        seed = min(plan.seeds) + len(trials)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        told_before = [one.params for one in trials if one.state is self._states.COMPLETE]
        # An earlier call may have tried more settings than the file asks for now.
        self._told = told_before[: plan.trials]
        self._left = (plan.trials or 0) - len(self._told)
        # Settings whose trainings were under way, or failed, are tried first.
        left = [one for one in trials if one.state in (self._states.RUNNING, self._states.FAIL)]
        told = [digest(params) for params in told_before]
        again = {digest(one.params): one.params for one in left}
        self._again = [params for name, params in again.items() if name not in told]
        for one in left:
            self._study.tell(one.number, state=self._states.FAIL, skip_if_finished=True)

    def ask(self) -> dict[str, Any] | None:
        """Return the next settings, those of earlier calls first; None where there are enough."""
        if self._told:
            return self._point(self._told.pop(0))
        while self._left > 0:
            self._left -= 1
            if self._again:
                self._study.enqueue_trial(self._again.pop(0))
            trial = self._study.ask(self._space)
            point = self._point(trial.params)
            trials, _ = self._open.setdefault(digest(point), ([], []))
            trials.append(trial)
            if len(trials) == 1:
                return point
            # The same settings are being trained already; their result counts for this trial too.
        return None

    def _point(self, params: dict[str, Any]) -> dict[str, Any]:
        listed = self._plan.vary
        return {
            name: value if isinstance(listed[name], dict) else json.loads(value)
            for name, value in sorted(params.items(), key=lambda one: list(listed).index(one[0]))
        }

    def tell(self, outcome: Outcome) -> None:
        """Take the result of a training, and tell Optuna once all of its settings are there."""
        name = digest(outcome.job.point)
        if name not in self._open:  # Optuna has known it since an earlier call.
            return
        trials, outcomes = self._open[name]
        outcomes.append(outcome)
        if len(outcomes) < len(self._plan.logs) * len(self._plan.seeds):
            return
        del self._open[name]
        if any(one.error for one in outcomes):
            for trial in trials:
                self._study.tell(trial, state=self._states.FAIL)
            return
        returns = [one.figures["normalised_return"] for one in outcomes]
        for trial in trials:
            for log in self._plan.logs:
                costs = [one.figures["normalised_cost"] for one in outcomes if one.job.log == log]
                trial.set_constraint(log, sum(costs) / len(costs) - 1.0)
            self._study.tell(trial, sum(returns) / len(returns))
