"""`safeshield sweep`. What needs Ray or Optuna is skipped where they are not installed."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fitted import DT
from typer.testing import CliRunner

from safeshield.algorithms.behaviour_cloning import BehaviourCloning
from safeshield.algorithms.registry import load_agent
from safeshield.cli import app, sweep_runs
from safeshield.cli.sweep_plan import EVALUATED, Job, Plan
from safeshield.cli.sweep_report import format_outcomes
from safeshield.data import OfflineDataset, collect
from safeshield.demo.helmsmen import Helmsmen

BOAT, OTHER = "safeshield/Boat-v0", "OtherBoat-v0"
STEPS = 8
# `fragile` is behaviour cloning that leaves its process, or waits, in the middle of a training.
PLUGIN = f"""
import os
import time
from pathlib import Path

from safeshield.algorithms.behaviour_cloning import BehaviourCloning
from safeshield.algorithms.registry import register


@register("fragile")
class Fragile(BehaviourCloning):
    file_format = "test-fragile"

    def fit(self, dataset, steps, *, checkpoint, **options):
        here = Path(checkpoint).parents[2]
        if self.config.seed == 1 and not Path(checkpoint).exists():
            super().fit(dataset, steps, checkpoint=checkpoint, stop_after={STEPS // 2}, **options)
            if not (here / "waits").exists():
                os._exit(9)
            while True:
                time.sleep(0.1)
        if self.config.seed == 2:
            os._exit(9)
        return super().fit(dataset, steps, checkpoint=checkpoint, **options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two logs of the boat and a plugin."""
    gym.register(OTHER, entry_point="safeshield.envs.boat:BoatEnv")
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("a.hdf5", "b.hdf5")):
        env = gym.make(BOAT, dt=DT, max_episode_steps=100)
        log = collect(env, Helmsmen(), episodes=30, seed=seed)
        dataclasses.replace(log, provenance={"environment": BOAT}).save(folder / name)
    (folder / "fragile.py").write_text(PLUGIN)
    yield folder
    del gym.registry[OTHER]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# -- on Ray -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray")
def test_a_grid_is_trained_once_and_a_failing_setting_is_told(folder: Path, tmp_path: Path) -> None:
    text = f"""
algorithm = "bc"
steps = {STEPS}
logs = ["a.hdf5", "b.hdf5"]
settings = {{hidden = [8]}}
vary = {{learning_rate = [0.001, 1e30]}}
"""
    file = written(folder, "grid.toml", text)
    output = run(file, "-o", tmp_path, "--ray", "auto", code=1)
    rows = table(tmp_path)
    assert sorted((row["learning_rate"], row["log"], row["status"]) for row in rows) == [
        ("0.001", "a.hdf5", "finished"),
        ("0.001", "b.hdf5", "finished"),
        ("1e+30", "a.hdf5", "failed"),
        ("1e+30", "b.hdf5", "failed"),
    ]
    failed = [row for row in rows if row["status"] == "failed"]
    assert "FloatingPointError: training diverged" in failed[0]["error"]
    assert "Traceback" not in failed[0]["error"]
    assert "FloatingPointError" in (tmp_path / failed[0]["folder"] / "error.txt").read_text()
    assert "failed: learning_rate=1e+30, seed=0, a.hdf5: FloatingPointError" in output
    assert "4 trainings, 2 failed" in output
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    # Without an environment the table gives the metrics of the training.
    done = next(row for row in rows if row["status"] == "finished" and row["log"] == "a.hdf5")
    config = load_agent(tmp_path / done["folder"] / "agent.safetensors").config
    learner = BehaviourCloning(config, device="cpu")
    learner.fit(OfflineDataset.load(folder / "a.hdf5"), STEPS, log_dir=tmp_path / "metrics")
    metrics = sweep_runs._last_metrics(tmp_path / "metrics")
    assert metrics
    assert {name: float(done[name]) for name in metrics} == pytest.approx(metrics)

    # Another seed is trained; what finished is not repeated, what failed is tried again.
    stamp = (tmp_path / done["folder"] / "agent.safetensors").stat().st_mtime_ns
    file.write_text(text.replace("[0.001, 1e30]", "[0.001]") + "seeds = [0, 1]\n")
    assert "4 trainings, 0 failed" in run(file, "-o", tmp_path, "--ray", "auto")
    assert (tmp_path / done["folder"] / "agent.safetensors").stat().st_mtime_ns == stamp
    assert [row["status"] for row in table(tmp_path)] == ["finished"] * 4


@pytest.mark.usefixtures("ray")
def test_another_log_of_the_same_name_is_trained_on(folder: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.hdf5", tmp_path / "out"
    shutil.copy(folder / "a.hdf5", log)
    file = written(
        tmp_path, "sweep.toml",
        f'algorithm = "bc"\nsteps = {STEPS}\nlogs = ["log.hdf5"]\nsettings = {{hidden = [8]}}\n',
    )  # fmt: skip
    run(file, "-o", out, "--ray", "auto")
    (first,) = table(out)
    shutil.copy(folder / "b.hdf5", log)
    run(file, "-o", out, "--ray", "auto")
    (second,) = table(out)
    agent = load_agent(out / second["folder"] / "agent.safetensors")
    learner = BehaviourCloning(agent.config, device="cpu")
    learner.fit(OfflineDataset.load(folder / "b.hdf5"), STEPS)
    for name, weights in learner._arrays["actor"].items():
        np.testing.assert_array_equal(weights, agent._arrays["actor"][name])
    # With the first log in its place again, its results are met again.
    shutil.copy(folder / "a.hdf5", log)
    run(file, "-o", out, "--ray", "auto")
    assert table(out) == [first]


@pytest.mark.usefixtures("ray")
def test_a_metric_that_there_is_not_is_told_after_the_first_training(
    folder: Path, tmp_path: Path
) -> None:
    text = f'algorithm = "bc"\nsteps = {STEPS}\nlogs = ["a.hdf5"]\nsettings = {{hidden = [8]}}\n'
    file = written(folder, "metric.toml", text + 'report = ["nope"]\n')
    output = run(file, "-o", tmp_path, "--ray", "auto", code=2)
    assert "report must name figures of a training, actor/" in output
    (row,) = table(tmp_path)
    assert row["status"] == "finished"
    metrics = [name for name in row if "/" in name]
    assert metrics
    agent = tmp_path / row["folder"] / "agent.safetensors"
    stamp = agent.stat().st_mtime_ns
    file.write_text(text + f'report = ["{metrics[0]}"]\n')
    assert metrics[0] in run(file, "-o", tmp_path, "--ray", "auto")
    assert agent.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("ray")
def test_a_damaged_file_of_figures_is_named_with_its_repair(folder: Path, tmp_path: Path) -> None:
    file = written(
        folder, "damaged.toml",
        f'algorithm = "bc"\nsteps = {STEPS}\nlogs = ["a.hdf5"]\nsettings = {{hidden = [8]}}\n',
    )  # fmt: skip
    run(file, "-o", tmp_path, "--ray", "auto")
    whole = table(tmp_path)
    figures = tmp_path / whole[0]["folder"] / "figures.json"
    for text in ('{"evalu', "[]", "{}"):
        figures.write_text(text)
        output = run(file, "-o", tmp_path, "--ray", "auto", code=2)
        assert f"{figures} is damaged" in output
        assert "remove it and start the sweep again" in output
    figures.unlink()
    run(file, "-o", tmp_path, "--ray", "auto")
    assert table(tmp_path) == whole


@pytest.mark.usefixtures("ray")
def test_a_worker_that_dies_is_told_and_its_training_resumes(folder: Path, tmp_path: Path) -> None:
    file = written(
        folder, "dies.yaml",
        f"algorithm: fragile\nsteps: {STEPS}\nlogs: [a.hdf5]\nseeds: [0, 1, 2]\n"
        "settings: {hidden: [8]}\n",
    )  # fmt: skip
    command = (file, "-o", tmp_path, "--ray", "auto", "--plugin", folder / "fragile.py")
    output = run(*command, code=1)
    gone = r"its worker on Ray ended (WorkerCrashedError)"
    assert f"seed=1, a.hdf5: {gone}; it resumes from its checkpoint, try 2 of 3" in output
    assert f"seed=2, a.hdf5: {gone}; it resumes from its checkpoint, try 3 of 3" in output
    rows = {row["seed"]: row for row in table(tmp_path)}
    assert [rows[seed]["status"] for seed in "012"] == ["finished", "finished", "failed"]
    assert rows["2"]["error"] == f"{gone}, 3 times"
    # The training that was interrupted ends with the weights of one that was not.
    agent = load_agent(tmp_path / rows["1"]["folder"] / "agent.safetensors")
    whole = BehaviourCloning(agent.config, device="cpu")
    whole.fit(OfflineDataset.load(folder / "a.hdf5"), STEPS)
    for name, weights in whole._arrays["actor"].items():
        np.testing.assert_array_equal(weights, agent._arrays["actor"][name])


def test_a_driver_that_is_killed_goes_on_where_it_was(
    ray: Any,  # noqa: ANN401
    folder: Path,
    tmp_path: Path,
) -> None:
    file = written(
        folder, "killed.toml",
        f'algorithm = "fragile"\nsteps = {STEPS}\nlogs = ["a.hdf5"]\nseeds = [0, 1]\n'
        "settings = {hidden = [8]}\n",
    )  # fmt: skip
    command = [file, "-o", tmp_path, "--plugin", folder / "fragile.py", "--ray"]
    (tmp_path / "waits").touch()
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "safeshield.cli", "sweep", *map(str, command), address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 240
    runs = tmp_path / "runs"
    while not (list(runs.glob("*/figures.json")) and list(runs.glob("*seed=1*/checkpoint.*"))):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    # A second driver leaves the folder to the first.
    assert "is being used by another run" in run(*command, "auto", code=2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    first, second = sorted(runs.iterdir(), key=lambda one: "seed=1" in one.name)
    stamps = [(path, path.stat().st_mtime_ns) for path in first.iterdir() if path.is_file()]
    assert not (second / "figures.json").exists()
    (tmp_path / "waits").unlink()
    output = run(*command, "auto")
    assert "2 trainings, 0 failed" in output
    assert "its worker" not in output  # It began at the checkpoint, behind the place that exits.
    assert [(path, path.stat().st_mtime_ns) for path, _ in stamps] == stamps
    assert (second / "figures.json").exists()
    assert not (second / "checkpoint.safetensors").exists()


@pytest.mark.usefixtures("ray")
def test_a_search_evaluates_and_goes_on(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    text = f"""
algorithm: bc
steps: {STEPS}
logs: [a.hdf5]
seeds: [0, 1]
env: {BOAT}
episodes: 2
vary:
  learning_rate: {{low: 0.0001, high: 0.01, log: true}}
  batch_size: {{low: 16, high: 32}}
  hidden: [[8], [8, 8]]
trials: 2
"""
    file = written(folder, "search.yaml", text)
    output = run(file, "-o", tmp_path, "--ray", "auto")
    assert "4 trainings, 0 failed" in output
    rows = table(tmp_path)
    tried = {(row["learning_rate"], row["batch_size"], row["hidden"]) for row in rows}
    assert len(tried) == 2
    for rate, size, hidden in tried:
        assert 0.0001 <= float(rate) <= 0.01
        assert 16 <= int(size) <= 32
        assert hidden in ("8", "8,8")
    for row in rows:
        shares = float(row["normalised_cost"]) * 10.0, float(row["mean_cost"])
        assert shares[0] == pytest.approx(shares[1])
        assert 0.0 <= float(row["violation_rate"]) <= 1.0
        assert np.isfinite(float(row["normalised_return"]))

    # Optuna has the mean return of each setting, and its cost as a constraint.
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "search.journal")))
    (name,) = optuna.study.get_all_study_names(storage)
    for trial in optuna.load_study(study_name=name, storage=storage).trials:
        ours = [row for row in rows if float(row["learning_rate"]) == trial.params["learning_rate"]]
        returns, costs = (
            np.mean([float(row[name]) for row in ours])
            for name in ("normalised_return", "normalised_cost")
        )
        assert trial.value == pytest.approx(returns)
        assert trial.constraints["a.hdf5"] == pytest.approx(costs - 1.0)

    # One more trial: the first two are not trained again.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/agent.safetensors")}
    file.write_text(text.replace("trials: 2", "trials: 3"))
    assert "6 trainings, 0 failed" in run(file, "-o", tmp_path, "--ray", "auto")
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.mark.usefixtures("ray")
def test_another_evaluation_keeps_the_agents(folder: Path, tmp_path: Path) -> None:
    text = f'algorithm = "shield"\nsteps = 30\nlogs = ["a.hdf5"]\nenv = "{BOAT}"\nepisodes = 2\n'
    text += "settings = {critic_hidden = [8], behaviour_hidden = [8], fallback_hidden = [8]}\n"
    file = written(folder, "shield.toml", text)
    run(file, "-o", tmp_path, "--ray", "auto")
    (alone,) = table(tmp_path)
    agent = tmp_path / alone["folder"] / "agent.safetensors"
    stamp = agent.stat().st_mtime_ns
    assert "intervention_rate" not in alone
    report = 'policy = "adversary"\nreport = ["intervention_rate"]\n'
    file.write_text(report + text)
    assert "intervention_rate" in run(file, "-o", tmp_path, "--ray", "auto")
    (behind,) = table(tmp_path)
    assert 0.0 <= float(behind["intervention_rate"]) <= 1.0
    assert agent.stat().st_mtime_ns == stamp
    # These are the figures whose names are checked before a training.
    assert {name for name in EVALUATED if name in behind} == set(EVALUATED)
    known = {"seed", "log", "status", "error", "folder", *EVALUATED}
    assert all("/" in name for name in behind if name not in known)


@pytest.mark.usefixtures("ray")
def test_more_gpus_than_there_are_is_an_error(folder: Path, tmp_path: Path) -> None:
    file = written(folder, "gpus.toml", 'algorithm = "bc"\nlogs = ["a.hdf5"]\ngpus = 64\n')
    output = run(file, "-o", tmp_path, "--ray", "auto", code=2)
    assert "gpus 64: the Ray cluster has 0 GPUs; give fewer" in output


def test_a_search_that_is_stopped_goes_on_with_the_settings_that_it_had(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    vary = {"learning_rate": {"low": 0.001, "high": 0.1}, "hidden": [[8], [16, 16]]}
    plan = Plan(algorithm="bc", logs=("a",), env=BOAT, vary=vary, trials=5)
    first = sweep_runs._Search(plan, {"a": "1"}, tmp_path / "journal")
    points = [first.ask() for _ in range(3)]
    figures = {"normalised_return": 0.5, "normalised_cost": 2.0}

    def outcome(point: Any, error: str) -> sweep_runs.Outcome:  # noqa: ANN401
        (job,) = plan.jobs(point, tmp_path, {"a": "1"})
        return sweep_runs.Outcome(job, {} if error else figures, error)

    first.tell(outcome(points[0], ""))
    first.tell(outcome(points[1], "ValueError: no"))
    # The process ends here. The first setting is known, the others are tried again.
    second = sweep_runs._Search(plan, {"a": "1"}, tmp_path / "journal")
    asked = [second.ask() for _ in range(6)]
    assert asked[0] == points[0]
    assert sorted(map(str, asked[1:3])) == sorted(map(str, points[1:3]))
    assert len({str(point) for point in asked[:5]}) == 5
    assert asked[5] is None
    # Results on another log of the same name are not taken for results on this one.
    assert not sweep_runs._Search(plan, {"a": "2"}, tmp_path / "journal")._told


def test_fewer_trials_than_before_are_the_first_ones(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    vary = {"learning_rate": {"low": 0.001, "high": 0.1}}
    contents, figures = {"a": "1"}, {"normalised_return": 0.5, "normalised_cost": 2.0}
    plan = Plan(algorithm="bc", logs=("a",), env=BOAT, vary=vary, trials=3)
    search = sweep_runs._Search(plan, contents, tmp_path / "journal")
    points = []
    while (point := search.ask()) is not None:
        points.append(point)
        (job,) = plan.jobs(point, tmp_path, contents)
        search.tell(sweep_runs.Outcome(job, figures, ""))
    fewer = sweep_runs._Search(dataclasses.replace(plan, trials=2), contents, tmp_path / "journal")
    assert [fewer.ask() for _ in range(3)] == [*points[:2], None]


# -- the table ----------------------------------------------------------------------------------


def outcomes(plan: Plan, scores: dict[str, list[tuple[float, float]]]) -> list[sweep_runs.Outcome]:
    """Return outcomes with a return and a cost for each log and each point of a grid."""
    return [
        sweep_runs.Outcome(
            Job(point, 0, log, None, Path()),
            {"normalised_return": one[0], "normalised_cost": one[1], "violation_rate": 1.0},
            "",
        )
        for log, ones in scores.items()
        for point, one in zip(plan.grid(), ones, strict=True)
    ]


def test_the_best_setting_of_each_log_is_told_or_that_there_is_none() -> None:
    vary = {"learning_rate": [0.12345678, 0.2, 0.3]}
    plan = Plan(algorithm="bc", logs=("a", "b"), env=BOAT, vary=vary, cost_limit=7.0)
    scores = {"a": [(0.4, 1.0), (0.3, 0.0), (0.9, 1.5)], "b": [(0.4, 4.0), (0.5, 1.25), (0.1, 2.0)]}
    told = format_outcomes(plan, outcomes(plan, scores))
    (best,) = [line for line in told.splitlines() if line.startswith("The best setting")]
    assert best == "The best setting on a: learning_rate = 0.12345678"
    (none,) = [line for line in told.splitlines() if line.startswith("No setting")]
    assert none == (
        "No setting met the cost limit 7 on b: the least normalised cost is 1.25, and it must be "
        "at most 1."
    )
    (starred,) = [line for line in told.splitlines() if "*" in line and "*:" not in line]
    assert starred.split()[:2] == ["0.1235", "a"]


# -- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('algorithm = "bc"', "logs must be a list of at least one log file, each once, got ()"),
        (
            'logs = "a.hdf5"',
            "logs must be a list of at least one log file, each once, got 'a.hdf5'",
        ),
        ('logs = ["a.hdf5", "a.hdf5"]', "each once, got ('a.hdf5', 'a.hdf5')"),
        (
            'logs = ["a.hdf5", "./a.hdf5"]',
            "each once, but a.hdf5 and ./a.hdf5 hold the same: leave one of them out",
        ),
        ('logs = ["none.hdf5"]', "logs: no such file: none.hdf5; a relative path starts at"),
        ('logs = ["a.hdf5"]\nseeds = []', "seeds must be a list of at least one whole number"),
        ('logs = ["a.hdf5"]\nseeds = [1, 1]', "each once, got (1, 1)"),
        ('logs = ["a.hdf5"]\nseeds = [-1]', "of at least 0, each once, got (-1,)"),
        ('logs = ["a.hdf5"]\nbanana = 1', "no such setting: banana; known: algorithm, preset"),
        ('logs = ["a.hdf5"]\nalgorithm = "x"', "bad.toml: algorithm must be one of ['bc', "),
        ('logs = ["a.hdf5"]\npreset = "x"', "preset x: safefql knows ['paper', 'small']"),
        ('logs = ["a.hdf5"]\n[settings]\nbanana = 1', "settings: no such setting: banana; known: "),
        ('logs = ["a.hdf5"]\n[settings]\nseed = 1', "settings.seed: list the seeds as seeds"),
        ('logs = ["a.hdf5"]\n[settings]\ndiscount = 2.0', "discount must lie between 0 and 1"),
        ('logs = ["a.hdf5"]\n[vary]\nbanana = [1]', "vary: no such setting: banana; known: "),
        ('logs = ["a.hdf5"]\n[vary]\ndiscount = []', "vary.discount must be a list of at least"),
        ('logs = ["a.hdf5"]\n[vary]\nlearning_rate = [1, 1.0]', "must list each value once"),
        ('logs = ["a.hdf5"]\n[vary]\ndiscount = 0.9', "or a range {low = ..., high = ..., log = "),
        ('logs = ["a.hdf5"]\n[vary]\ndiscount = [0.9, 2.0]', "between 0 and 1, got 2.0"),
        (
            'logs = ["a.hdf5"]\n[vary]\ndiscount = {low = 0.9, high = 0.99}',
            "vary.discount is a range, which needs a search: add trials",
        ),
        (
            f'logs = ["a.hdf5"]\ntrials = 3\nenv = "{BOAT}"\n[vary]\n'
            "discount = {low = 1, high = 0}",
            "vary.discount: low must be below high, got 1 and 0",
        ),
        (
            f'logs = ["a.hdf5"]\ntrials = 3\nenv = "{BOAT}"\n[vary]\n'
            "learning_rate = {low = 0, high = 1, log = true}",
            "vary.learning_rate: low must be above 0 where log is true, got 0",
        ),
        (
            f'logs = ["a.hdf5"]\ntrials = 3\nenv = "{BOAT}"\n[vary]\n'
            "batch_size = {low = 1.5, high = 8}",
            "batch_size must be a whole number, got 1.5",
        ),
        (
            'logs = ["a.hdf5"]\ntrials = 3\n[vary]\ndiscount = [0.9]',
            "trials 3 needs an environment (a search compares returns and costs): add env",
        ),
        (f'logs = ["a.hdf5"]\ntrials = 3\nenv = "{BOAT}"', "add the table vary"),
        ('logs = ["a.hdf5"]\npolicy = "random"', "policy random needs an environment"),
        (
            f'logs = ["a.hdf5"]\npolicy = "random"\nalgorithm = "bc"\nenv = "{BOAT}"',
            "policy random needs an algorithm that learns a shield, got bc",
        ),
        (
            'logs = ["a.hdf5"]\n[settings]\ndiscount = 0.9\n[vary]\ndiscount = [0.9]',
            "discount is in settings and in vary",
        ),
        (
            'logs = ["a.hdf5"]\nenv = "NoSuch-v7"',
            "bad.toml: env must be the id of an environment, or module:id, got 'NoSuch-v7': ",
        ),
        ('logs = ["a.hdf5"]\nenv = "no_such_module:A-v0"', "got 'no_such_module:A-v0': No module"),
        (
            f'logs = ["a.hdf5"]\nenv = "{OTHER}"',
            f"bad.toml: logs must be of {OTHER}, but ",
        ),
        ('logs = ["a.hdf5"]\nepisodes = 3', "bad.toml: episodes 3 needs an environment"),
        ('logs = ["a.hdf5"]\ncost_limit = 0.0\nenv = "none"', "cost_limit 0.0 needs an environ"),
        (
            f'logs = ["a.hdf5"]\nenv = "{BOAT}"\nreport = ["nope"]',
            "report must name figures of the evaluation, normalised_return, normalised_cost, ",
        ),
        (
            f'logs = ["a.hdf5"]\nenv = "{BOAT}"\nreport = ["intervention_rate"]',
            "report intervention_rate needs a shielded policy: add policy",
        ),
        (
            'logs = ["a.hdf5"]\nreport = ["mean_cost"]',
            "report mean_cost needs an environment, where it is found: add env",
        ),
        (f'logs = ["a.hdf5"]\nenv = "{BOAT}"\npolicy = "drunk"', "policy must be one of"),
        ('logs = ["a.hdf5"]\ngpus = -1.0', "gpus must be at least 0, got -1.0"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_ray_starts(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = written(folder, "bad.toml", text)
    output = run(file, "-o", tmp_path / "out", code=2)
    assert message in output
    assert output.count("error: ") == 1
    assert "Started a local Ray" not in output


@pytest.mark.parametrize(
    ("entries", "option"),
    [
        (f'env = "{OTHER}"', "--references"),
        (f'env = "{OTHER}"', "--log"),
        ('algorithm = "sac"', "--algorithm"),
        (f'env = "{BOAT}"\npolicy = "drunk"', "--policy"),
        ("settings = {banana = 1}", " seed,"),
    ],
)
def test_no_error_names_what_a_sweep_does_not_have(
    folder: Path, tmp_path: Path, entries: str, option: str
) -> None:
    file = written(folder, "option.toml", f'logs = ["a.hdf5"]\n{entries}\n')
    output = run(file, "-o", tmp_path / "out", code=2)
    assert "option.toml: " in output
    assert option not in output


def test_a_folder_that_cannot_be_made_is_told(folder: Path, tmp_path: Path) -> None:
    file = written(folder, "out.toml", 'algorithm = "bc"\nlogs = ["a.hdf5"]\n')
    (tmp_path / "taken").touch()
    out = tmp_path / "taken" / "out"
    output = run(file, "-o", out, code=2)
    assert (
        f"--out must be a folder in which you may write, or one that can be made, got '{out}'"
        in (output)
    )


def test_a_log_that_is_replaced_during_a_sweep_is_told(folder: Path, tmp_path: Path) -> None:
    plan, contents = Plan(algorithm="bc", logs=("a.hdf5",)), {"a.hdf5": "of another file"}
    (job,) = plan.jobs({}, tmp_path, contents)
    with pytest.raises(ValueError, match="has been replaced since the sweep was started"):
        sweep_runs.train(job, plan, sweep_runs.Places(folder / "sweep.toml", contents))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "no such file" in run(tmp_path / "none.toml", "-o", tmp_path, code=2)
    file = written(tmp_path, "a.ini", "steps = 3")
    assert "must end in .toml, .yaml or .yml" in run(file, "-o", tmp_path, code=2)


def test_an_address_that_nothing_answers_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    file = written(folder, "address.toml", 'algorithm = "bc"\nlogs = ["a.hdf5"]\n')
    output = run(file, "-o", tmp_path, "--ray", "127.0.0.1:1", code=2)
    assert "error: no Ray cluster answers at ray='127.0.0.1:1'" in output


def test_without_ray_the_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = written(folder, "extra.toml", 'algorithm = "bc"\nlogs = ["a.hdf5"]\n')
    assert "pip install" in run(file, "-o", tmp_path, code=2)


def test_without_optuna_the_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    text = f'algorithm = "bc"\nlogs = ["a.hdf5"]\nenv = "{BOAT}"\ntrials = 2\n'
    file = written(folder, "extra.toml", text + "vary = {learning_rate = [0.1, 0.2]}\n")
    message = "trials needs the package optuna"
    output = run(file, "-o", tmp_path, code=2)
    assert message in output
    assert 'pip install "safeshield[sweep]"' in output


def test_a_training_keeps_its_folder_when_the_sweep_grows(tmp_path: Path) -> None:
    vary: dict[str, Any] = {"learning_rate": [0.1, 0.2]}
    small = Plan(algorithm="bc", logs=("a",), vary=vary)
    grown = Plan(
        algorithm="bc", logs=("a", "b"), seeds=(0, 1), episodes=3,
        vary={"hidden": [[256, 256], [8]], "learning_rate": [0.1, 0.2]},
        settings={"batch_size": BehaviourCloning().config.batch_size},
    )  # fmt: skip
    contents = {"a": "1", "b": "2"}
    folders = [
        {
            job.config: job.folder.name[-8:]
            for point in plan.grid()
            for job in plan.jobs(point, tmp_path, contents)
            if job.log == "a"
        }
        for plan in (small, grown)
    ]
    assert len(folders[0]) == 2
    assert folders[0].items() < folders[1].items()
    # Another number of updates is another training.
    other = Plan(algorithm="bc", logs=("a",), steps=7, vary=vary)
    (point, *_) = small.grid()
    kept = small.jobs(point, tmp_path, contents)[0].folder
    assert other.jobs(point, tmp_path, contents)[0].folder != kept
    # So is another log of the same name.
    assert small.jobs(point, tmp_path, {"a": "3"})[0].folder != kept
