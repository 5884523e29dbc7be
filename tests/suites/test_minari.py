"""Minari's datasets as logs: what its own collector writes, and what we write for it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest

from safeshield import OfflineDataset
from safeshield.data.labels import binary_labels

LIMIT = 2.5
FIELDS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminated",
    "truncated",
    "costs",
    "constraints",
    "next_constraints",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for authors and e-mail addresses


class Stairs(gym.Env[Any, Any]):
    """Steps up by 0, 1 or 2; too high above `LIMIT`; falls off above 6, is called back after 5."""

    observation_space = gym.spaces.Dict(
        {"at": gym.spaces.Discrete(9), "seen": gym.spaces.Box(-10, 10, (2,), np.float64)}
    )
    action_space = gym.spaces.Discrete(3)

    def __init__(self, infos: tuple[str, ...] = ("cost", "constraint")) -> None:
        self.infos = infos

    def reset(
        self, *, seed: int | None = None, options: object = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.steps = int(self.np_random.integers(0, 5)), 0
        return self._see(-1)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at, self.steps = self.at + action, self.steps + 1
        seen, info = self._see(action)
        # Both flags at once, which Gymnasium allows and a log does not.
        return seen, float(self.at), self.at > 6, self.steps >= 5, info

    def _see(self, action: int) -> tuple[Any, dict[str, Any]]:
        info = {
            "cost": float(self.at > LIMIT),
            "constraint": self.at - LIMIT,
            "action_executed": max(action, 0),
            "other": {"name": np.zeros(3)},
        }
        seen = {"at": np.int64(self.at), "seen": np.array([self.at, self.steps], np.float64)}
        return seen, {key: info[key] for key in (*self.infos, "other")}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


def collected(
    infos: tuple[str, ...] = ("cost", "constraint"), name: str = "stairs-v0", episodes: int = 12
) -> Any:  # noqa: ANN401
    env = minari.DataCollector(Stairs(infos), record_infos=True)
    rng = np.random.default_rng(0)
    for seed in range(episodes):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(int(rng.integers(3)))
            ended = terminated or truncated
    # The last one is left in the middle, where the collector cuts it.
    env.reset(seed=99)
    env.step(0)
    return env.create_dataset(name)


class Named(Stairs):
    """Reports two constraints by name, in different units, and no cost."""

    def _see(self, action: int) -> tuple[Any, dict[str, Any]]:
        seen, info = super()._see(action)
        h = float(self.at - LIMIT)
        return seen, {
            "constraint": {"height@1": 100.0 * h, "floor@1": -9.0},
            "other": info["other"],
        }


def test_several_constraints_by_name_give_binary_labels() -> None:
    env = minari.DataCollector(Named(()), record_infos=True)
    rng = np.random.default_rng(0)
    for seed in range(30):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(int(rng.integers(2)))
            ended = terminated or truncated
    log = OfflineDataset.from_minari(env.create_dataset("named-v0"))
    assert log.constraint_kind == "binary"
    np.testing.assert_array_equal(log.costs > 0, at(log, log.next_observations) > LIMIT)
    assert 0 < log.costs.sum() < len(log)


def at(log: OfflineDataset, observations: Any) -> Any:  # noqa: ANN401
    assert log.observations.shape[1] == 3
    return observations[:, 0]


def test_every_number_belongs_to_the_state_it_was_reported_in() -> None:
    """The environment tells cost, constraint and reward from where it stands."""
    dataset = collected()
    log = OfflineDataset.from_minari(dataset)
    assert (log.num_episodes, len(log)) == (13, dataset.total_steps)
    before, after = at(log, log.observations), at(log, log.next_observations)
    np.testing.assert_array_equal(log.next_observations[:, 1], after)
    np.testing.assert_array_equal(after - before, log.actions[:, 0])
    np.testing.assert_array_equal(log.rewards, after)
    np.testing.assert_array_equal(log.costs, after > LIMIT)
    np.testing.assert_array_equal(log.constraints, before - LIMIT)
    np.testing.assert_array_equal(log.next_constraints, after - LIMIT)
    assert log.constraint_kind == "continuous"
    steps = log.next_observations[:, 2]
    np.testing.assert_array_equal(log.observations[:, 2], steps - 1)
    np.testing.assert_array_equal(log.terminated, after > 6)
    ends = np.append(steps[1:] == 1, True)
    np.testing.assert_array_equal(log.truncated, ends & ~log.terminated)
    assert log.terminated.any()
    assert log.truncated[-1]
    assert (log.terminated & (steps == 5)).any(), "no episode here ends both ways at once"
    assert log.observation_space == Stairs.observation_space
    assert log.action_space == Stairs.action_space


def test_costs_alone_make_binary_labels_from_the_reset_on() -> None:
    log = OfflineDataset.from_minari(collected(("cost",)))
    assert log.constraint_kind == "binary"
    before, after = at(log, log.observations), at(log, log.next_observations)
    np.testing.assert_array_equal(log.constraints, np.where(before > LIMIT, 1.0, -1.0))
    np.testing.assert_array_equal(log.next_constraints, np.where(after > LIMIT, 1.0, -1.0))
    first = before[log.episode_starts] > LIMIT
    assert first.any()
    assert not first.all()
    expected = binary_labels(log.costs, log.episode_starts, first)
    np.testing.assert_array_equal(log.constraints, expected[0])


def test_a_constraint_alone_costs_1_in_a_violation() -> None:
    log = OfflineDataset.from_minari(collected(("constraint",)))
    np.testing.assert_array_equal(log.costs, at(log, log.next_observations) > LIMIT)
    assert log.constraint_kind == "continuous"


def test_what_was_executed_is_the_action() -> None:
    """Proposals are changed on the way here: the info says by how much."""

    class Halved(minari.StepDataCallback):
        def __call__(self, env: Any, **step: Any) -> Any:  # noqa: ANN401
            data = super().__call__(env, **step)
            if data["action"] is not None:
                data["action"] = 2
            return data

    env = minari.DataCollector(
        Stairs(("cost", "action_executed")), record_infos=True, step_data_callback=Halved
    )
    env.reset(seed=0)
    for action in (0, 1, 0, 1, 0):
        env.step(action)
    dataset = env.create_dataset("halved-v0")
    assert set(dataset[0].actions) == {2}
    assert OfflineDataset.from_minari(dataset).actions[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_some_entries_of_a_dict() -> None:
    dataset = collected()
    part = OfflineDataset.from_minari(dataset, observation_keys=["seen"])
    whole = OfflineDataset.from_minari(dataset)
    np.testing.assert_array_equal(part.observations, whole.observations[:, 1:])
    assert part.observation_space == gym.spaces.Dict(seen=Stairs.observation_space["seen"])
    with pytest.raises(ValueError, match="observation_keys must be some of"):
        OfflineDataset.from_minari(dataset, observation_keys=["nothing"])


def test_ids_folders_and_parts_of_datasets(store: Path) -> None:
    dataset = collected(name="stairs/small-v0")
    log = OfflineDataset.from_minari(dataset)
    for source in ("stairs/small-v0", store / "stairs/small-v0", dataset.storage.data_path):
        assert_same(OfflineDataset.from_minari(source), log)
    few = dataset.filter_episodes(lambda episode: bool(episode.terminations[-1]))
    assert_same(
        OfflineDataset.from_minari(few),
        log.select(np.flatnonzero(log.terminated[log.episode_starts + log.episode_lengths - 1])),
    )


def assert_same(one: OfflineDataset, other: OfflineDataset) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name, strict=True)
    assert one.constraint_kind == other.constraint_kind
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space


# Writing


@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,))),
        (gym.spaces.Box(0, 255, (40, 40), np.uint8), gym.spaces.Discrete(3, start=-1)),
        (Stairs.observation_space, gym.spaces.MultiDiscrete([2, 3])),
        (gym.spaces.Discrete(7), gym.spaces.Box(-1, 1, (2, 2), np.float64)),
    ],
    ids=str,
)
def test_what_is_written_is_read_back(
    kind: str, observations: gym.Space[Any], actions: gym.Space[Any]
) -> None:
    log = made(kind, observations, actions)
    written = log.to_minari("made/log-v0", algorithm_name="none", author="us", description="a test")
    assert isinstance(written, minari.MinariDataset)
    assert (written.total_episodes, written.total_steps) == (log.num_episodes, len(log))
    assert_same(OfflineDataset.from_minari("made/log-v0"), log)
    with pytest.raises(ValueError, match="already exists"):
        log.to_minari("made/log-v0")


def made(kind: str, observations: gym.Space[Any], actions: gym.Space[Any]) -> OfflineDataset:
    observations.seed(0)
    actions.seed(0)
    lengths = (3, 1, 5)
    h = np.random.default_rng(0).normal(size=sum(lengths) + len(lengths)).astype(np.float32)
    states = gym.vector.utils.concatenate(
        observations,
        [observations.sample() for _ in h],
        gym.vector.utils.create_empty_array(observations, len(h)),
    )
    lasts = np.cumsum(np.array(lengths) + 1) - 1
    rows = np.delete(np.arange(len(h)), lasts)
    ends = np.isin(rows + 1, lasts)

    def some(indices: Any) -> Any:  # noqa: ANN401
        if isinstance(states, dict):
            return {key: values[indices] for key, values in states.items()}
        return states[indices]

    labels: dict[str, Any] = {"constraints": h[rows], "next_constraints": h[rows + 1]}
    if kind == "binary":
        labels = {"initial_costs": h[[0, *(lasts[:-1] + 1)]] > 0}
    return OfflineDataset.from_arrays(
        observations=some(rows),
        next_observations=some(rows + 1),
        actions=np.array([actions.sample() for _ in rows]),
        rewards=np.arange(len(rows)),
        costs=(h[rows + 1] > 0).astype(float),
        terminated=ends & (rows < 5),
        truncated=ends & (rows >= 5),
        observation_space=observations,
        action_space=actions,
        **labels,
    )


def test_states_that_do_not_follow_each_other_cannot_be_written() -> None:
    log = made("binary", gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,)))
    fields = {name: np.array(getattr(log, name)) for name in FIELDS if "constraints" not in name}
    fields["next_observations"][1, 0] += 1.0
    with pytest.raises(ValueError, match="they differ at index 1"):
        OfflineDataset.from_arrays(**fields).to_minari("broken-v0")


# What is refused


def test_infos_must_tell_the_cost_at_the_reset_and_at_every_step(store: Path) -> None:
    with pytest.raises(ValueError, match=r"'stairs-v0'.*episode 0 has neither.*record_infos=True"):
        OfflineDataset.from_minari(collected(()))
    collected(name="cut-v0")
    with h5py.File(store / "cut-v0/data/main_data.hdf5", "a") as file:
        steps = len(file["episode_3/rewards"])
        costs = file["episode_3/infos/cost"][1:]
        del file["episode_3/infos/cost"]
        file["episode_3/infos/cost"] = costs
    with pytest.raises(ValueError, match=rf"episode 3: infos\['cost'\] .* got shape \({steps},\)"):
        OfflineDataset.from_minari("cut-v0")
    with h5py.File(store / "cut-v0/data/main_data.hdf5", "a") as file:
        del file["episode_3/infos/cost"]
    with pytest.raises(ValueError, match=r"episode 3 reports \['constraint'\], .*'cost'"):
        OfflineDataset.from_minari("cut-v0")


def test_episodes_hold_together(store: Path) -> None:
    for key, message in (
        ("rewards", "one observation more than steps"),
        ("actions", "one observation more than steps"),
        ("observations/seen", "of one point or of n alike"),
        ("terminations", "must not end before its last step"),
    ):
        name = f"broken-{key.split('/')[0]}-v0"
        collected(name=name)
        with h5py.File(store / name / "data/main_data.hdf5", "a") as file:
            episode = next(e for e in file.values() if len(e["rewards"]) > 2)
            values = episode[key][:]
            del episode[key]
            episode[key] = np.append(True, values[1:]) if key == "terminations" else values[:-1]
        with pytest.raises(ValueError, match=rf"'{name}'.*episode \d+.*{message}"):
            OfflineDataset.from_minari(name)


def test_damaged_datasets_are_named(store: Path) -> None:
    collected()
    data = store / "stairs-v0/data"
    metadata = json.loads((data / "metadata.json").read_text())

    def load_with(message: str, text: str | None = None, **changes: object) -> None:
        content = json.dumps(metadata | changes) if text is None else text
        (data / "metadata.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            OfflineDataset.from_minari("stairs-v0")

    load_with("its metadata.json is no JSON", text="{")
    load_with(r"episodes have \d+ steps, but its metadata state 999", total_steps=999)
    load_with("exceeds the 3 steps", total_steps=3)
    load_with("'stairs-v0': Unable to allocate", total_steps=10**15)
    load_with("damaged: episode 13 cannot be read", total_episodes=14)
    del metadata["observation_space"]
    # Minari would make what env_spec names, and import its module.
    load_with("stores no observation_space", env_spec='{"entry_point": "os:abort"}')
    shutil.rmtree(store)
    collected()
    whole = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"'stairs-v0'.*damaged: episode 0 cannot be read"):
        OfflineDataset.from_minari("stairs-v0")


def test_what_is_no_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="`minari download mujoco/none-v3` downloads this"):
        OfflineDataset.from_minari("mujoco/none-v3")
    with pytest.raises(FileNotFoundError, match="neither as a folder"):
        OfflineDataset.from_minari(tmp_path)
    with pytest.raises(TypeError, match=r"source must be a Minari id.* got int"):
        OfflineDataset.from_minari(3)
    log = made("binary", gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,)))
    monkeypatch.setitem(sys.modules, "minari", None)
    for call in (lambda: OfflineDataset.from_minari("a-v0"), lambda: log.to_minari("a-v0")):
        with pytest.raises(ImportError, match=r'pip install "safeshield\[minari\]"'):
            call()
