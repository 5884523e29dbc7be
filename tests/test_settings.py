"""Settings of every algorithm: what they take, what they refuse, and how files tell of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch

import safeshield.training.loop as training
from safeshield import OfflineDataset, SafeFQL, Shield, ShieldTrainer, collect
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.fisor import FISORConfig
from safeshield.algorithms.flrp.agent import FLRP, FLRPConfig
from safeshield.algorithms.r2pac.agent import R2PACConfig
from safeshield.algorithms.registry import load_agent
from safeshield.algorithms.safefql import SafeFQLConfig
from safeshield.algorithms.shield_trainer import ShieldConfig
from safeshield.cli.kinds import describe
from safeshield.files.tensors import read_tensors, write_tensors
from safeshield.nn.device import device_of
from safeshield.training import checkpoint
from safeshield.training.log import LogTensors, run_identity
from safeshield.values.backup import reward_windows, safety_windows, window_ends

CONFIGS = (
    SafeFQLConfig,
    FLRPConfig,
    R2PACConfig,
    FISORConfig,
    BehaviourCloningConfig,
    ShieldConfig,
)
TINY = BehaviourCloningConfig(hidden=(8,), batch_size=16)
EACH_FIELD = [(kind, field.name) for kind in CONFIGS for field in dataclasses.fields(kind)]


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=6, seed=0)


@pytest.mark.parametrize(("kind", "field"), EACH_FIELD)
def test_a_value_of_another_type_is_named(kind: Any, field: str) -> None:  # noqa: ANN401
    """Every field of every algorithm: text, nothing at all, lists of nonsense, infinity, NaN."""
    default, hint = getattr(kind(), field), get_type_hints(kind)[field]
    for wrong in ("x", [0], (), (math.nan,), [1.5], (True, True, True), {}, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^{field} must .*, got"):
            kind(**{field: wrong})
    if type(None) not in get_args(hint):
        with pytest.raises(ValueError, match=rf"^{field} must .*, got None"):
            kind(**{field: None})
    for wrong in ("False", 1, 0) if isinstance(default, bool) else (True, np.True_):
        with pytest.raises(ValueError, match=rf"^{field} must"):
            kind(**{field: wrong})


@pytest.mark.parametrize(("kind", "field"), EACH_FIELD)
def test_what_means_the_same_is_taken_and_held_by_json(kind: Any, field: str) -> None:  # noqa: ANN401
    value = getattr(kind(), field)
    if isinstance(value, tuple):
        alike: list[Any] = [list(value), np.array(value)]
    elif isinstance(value, bool):
        alike = [np.bool_(value)]
    elif isinstance(value, int):
        alike = [np.int64(value)]
    else:
        alike = [value] if value is None or isinstance(value, str) else [np.float64(value)]
    for one in alike:
        config = kind(**{field: one})
        assert config == kind()
        assert kind(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
        assert type(getattr(config, field)) is type(value)


def test_floats_stay_floats_and_huge_integers_are_no_floats() -> None:
    assert type(FLRPConfig(safety_weight=10).safety_weight) is float
    with pytest.raises(ValueError, match="safety_weight must be a finite number"):
        FLRPConfig(safety_weight=10**400)


def test_flrp_has_no_euler_steps(log: OfflineDataset, tmp_path: Path) -> None:
    """They did nothing; files that hold them are still read."""
    assert "flow_steps" not in {field.name for field in dataclasses.fields(FLRPConfig)}
    assert SafeFQLConfig(flow_steps=3).flow_steps == FISORConfig(flow_steps=3).flow_steps
    config = FLRPConfig(critic_hidden=(8,), flow_hidden=(8,), transforms=2, batch_size=16)
    FLRP(config, device="cpu").fit(log, 3).save(tmp_path / "agent")
    file = read_tensors(tmp_path / "agent")
    old = {**file.header, "config": {**file.header["config"], "flow_steps": 10}}
    write_tensors(tmp_path / "old", file.load(file.shapes, file.dtypes), old)
    assert FLRP.load(tmp_path / "old").config == config


# -- windows ------------------------------------------------------------------------------------


def test_a_window_beyond_the_longest_episode_is_the_episode(log: OfflineDataset) -> None:
    """It neither hangs nor changes anything."""
    agent = BehaviourCloning(TINY, device="cpu").fit(log, steps=1)
    rows = LogTensors.of(log, agent._fitted().scaling, torch.device("cpu"))
    told: list[tuple[torch.Tensor, ...]] = []
    for steps in (int(log.episode_lengths.max()), 10**9):
        safety = safety_windows(
            rows.constraints, rows.next_constraints, rows.terminated, rows.episode_last, 0.9, steps
        )
        reward = reward_windows(rows.rewards, rows.terminated, rows.episode_last, 0.9, steps)
        ends = window_ends(rows.episode_last, torch.arange(len(rows)), steps)
        assert torch.equal(ends, rows.episode_last)
        told.append((*safety, *reward))
    assert all(torch.equal(one, other) for one, other in zip(*told, strict=True))


# -- arguments, devices -------------------------------------------------------------------------


def test_arguments_are_whole_numbers(log: OfflineDataset, tmp_path: Path) -> None:
    file = tmp_path / "c"
    for trainer in (BehaviourCloning(TINY), ShieldTrainer()):
        for wrong in (None, 1.5, "3", True):
            with pytest.raises(TypeError, match="steps must be a whole number, got"):
                trainer.fit(log, steps=wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="checkpoint_every must be a whole number, got"):
                trainer.fit(log, 3, checkpoint=file, checkpoint_every=wrong)  # type: ignore[arg-type]
    BehaviourCloning(TINY).fit(log, steps=np.int64(3), checkpoint=file)  # type: ignore[arg-type]
    assert describe(file)["updates_done"] == 3


@pytest.mark.parametrize("device", ["gpu", "", 0, None])
def test_a_device_that_is_none(device: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda'"):
        FLRP(device=device)
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")
    if torch.cuda.is_available():
        assert device_of("cuda:0").index == 0


@pytest.mark.filterwarnings("error")
def test_what_overflows_float32_is_refused_without_a_warning(log: OfflineDataset) -> None:
    agent = BehaviourCloning(TINY, device="cpu").fit(log, steps=1)
    for wrong in (1e300, math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"observation must be finite as float32"):
            agent.predict(np.array([wrong, 0.0]))
        with pytest.raises(ValueError, match=r"got .* of observation 2"):
            agent.predict(np.array([[0.0, 0.0], [1.0, 0.0], [wrong, 0.0]]))


# -- checkpoints and files ----------------------------------------------------------------------


def test_a_checkpoint_says_how_another_run_differs(log: OfflineDataset, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    BehaviourCloning(TINY, device="cpu").fit(log, steps=9, checkpoint=file, stop_after=4)
    told = describe(file)
    expected = {"algorithm": "BehaviourCloning", "updates_done": 4, "updates_in_all": 9}
    assert {**told, **expected, "phase": "cloning"} == told
    assert told["config"]["hidden"] == [8]
    other = dataclasses.replace(TINY, learning_rate=0.5)
    for config, rows, steps, words in (
        (other, log, 9, r"\(checkpoint's -> this run's: learning_rate 0.001 -> 0.5\)"),
        (TINY, log, 8, r"this run's: steps 9 -> 8\)"),
        (TINY, log.select([0, 1]), 9, r"this run's: log 'of \d+ rows, \w+' -> 'of \d+ rows, \w+'"),
    ):
        with pytest.raises(ValueError, match=words):
            BehaviourCloning(config, device="cpu").fit(rows, steps=steps, checkpoint=file)
    held = read_tensors(file)
    dtypes = {"near": np.int64, "generator": np.uint8}
    old = {"format": "safeshield-checkpoint", "done": 4, "fingerprint": "0" * 64}
    write_tensors(file, held.load(held.shapes, dtypes), old)
    with pytest.raises(ValueError, match="log or number of steps; pass the same ones"):
        BehaviourCloning(TINY, device="cpu").fit(log, steps=9, checkpoint=file)
    assert describe(file)["updates_done"] == 4


def test_a_run_is_the_same_in_whatever_order_its_settings_are_declared(
    log: OfflineDataset,
) -> None:
    fields = [(field.name, field.type) for field in dataclasses.fields(TINY)]
    turned = dataclasses.make_dataclass("Turned", reversed(fields))(**dataclasses.asdict(TINY))
    mine = run_identity("BehaviourCloning", TINY, log, 9)
    theirs = run_identity("BehaviourCloning", turned, log, 9).to_json()
    assert list(theirs["config"]) != list(mine.config)
    assert mine.difference(theirs) is None
    assert mine.difference({**theirs, "fingerprint": "0" * 64}) is None, "as older files have it"
    for name in ("algorithm", "log", "steps"):
        assert mine.difference({**theirs, name: "x"}) is not None
    for name, value in theirs["config"].items():
        changed = {**theirs["config"], name: f"not {value}"}
        different = mine.difference({**theirs, "config": changed})
        # With continuous labels this setting has no effect.
        assert (different is None) == (name == "label_magnitude"), name


def test_settings_that_only_choose_how_an_agent_acts_do_not_tell_runs_apart(
    log: OfflineDataset,
) -> None:
    mine = run_identity("SafeFQL", SafeFQLConfig(), log, 9)
    other = SafeFQLConfig(candidates=1, last_resort="lowest", extraction="sample")
    assert mine.difference(run_identity("SafeFQL", other, log, 9).to_json()) is None
    for changed in ({"margin": 0.1}, {"seed": 1}):
        theirs = run_identity("SafeFQL", SafeFQLConfig(**changed), log, 9).to_json()
        assert mine.difference(theirs) is not None


def test_checkpoints_are_written_at_phases_ends_and_by_time(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        checkpoint, "save_checkpoint", lambda path, state, done, *_: saved.append(done)
    )
    config = SafeFQLConfig(
        critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,), batch_size=16,
        safety_backup_steps=(2,), reward_backup_steps=(2,),
    )  # fmt: skip
    SafeFQL(config, device="cpu").fit(log, steps=20, checkpoint=tmp_path / "c")
    assert saved == [10, 13, 20]
    saved.clear()
    monkeypatch.setattr(training, "_SECONDS", 0.0)
    BehaviourCloning(TINY, device="cpu").fit(log, steps=3, checkpoint=tmp_path / "c")
    assert saved == [1, 2, 3]


def test_a_file_of_another_kind_says_what_reads_it(log: OfflineDataset, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    agent = BehaviourCloning(TINY, device="cpu").fit(log, steps=1, checkpoint=file)
    agent.save(tmp_path / "agent")
    for load in (Shield.load, FLRP.load):
        with pytest.raises(ValueError, match=r"BehaviourCloning\.load reads it"):
            load(tmp_path / "agent")
    for load in (load_agent, BehaviourCloning.load):
        with pytest.raises(
            ValueError, match=r"fit\(checkpoint=\.\.\.\), which goes on from it, reads"
        ):
            load(file)
    held = read_tensors(tmp_path / "agent")
    less = {name: value for name, value in held.header.items() if name != "scaling"}
    write_tensors(tmp_path / "agent", held.load(held.shapes, held.dtypes), less)
    with pytest.raises(ValueError, match="does not describe an agent: it lacks 'scaling'"):
        BehaviourCloning.load(tmp_path / "agent")


def test_divergence_names_the_phase_where_it_arose(log: OfflineDataset) -> None:
    """At the end of each phase the metrics are looked at, and the weights."""
    huge = dataclasses.replace(log, rewards=np.full(len(log), 3e38, np.float32))
    config = SafeFQLConfig(critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,), batch_size=16)
    with pytest.raises(FloatingPointError, match=r"in the phase 'critics 1'.*rewards"):
        SafeFQL(config, device="cpu").fit(huge, steps=40)
    # The one update's loss is finite; what it does to the weights is not.
    wild = dataclasses.replace(TINY, learning_rate=1e39)
    with pytest.raises(
        FloatingPointError, match="phase 'cloning': a weight of the network 'actor'"
    ):
        BehaviourCloning(wild, device="cpu").fit(log, steps=1)


def test_a_log_with_constraints_needs_no_costs(log: OfflineDataset) -> None:
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    arrays = {name: getattr(log, name) for name in names}
    made = OfflineDataset.from_arrays(
        **arrays, constraints=log.constraints, next_constraints=log.next_constraints
    )
    np.testing.assert_array_equal(made.costs, log.next_constraints > 0)
    assert made.costs.any()
    with pytest.raises(ValueError, match="give costs, or constraints and next_constraints"):
        OfflineDataset.from_arrays(**arrays)
