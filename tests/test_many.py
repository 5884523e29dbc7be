"""`fit_many`: several agents on one log, each with the weights of its own `fit`."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from safeshield import OfflineDataset, SafeFQL, SafeFQLConfig, ShieldConfig, ShieldTrainer, fit_many
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.algorithms.registry import ALGORITHMS
from safeshield.shield.backup import register_backup
from safeshield.training import checkpoint, loop, many, registry
from safeshield.training.agent import OfflineAgent
from safeshield.training.checkpoint import flatten
from safeshield.training.log import LogTensors
from safeshield.training.state import Draw, Loss, TrainState, of_batch

STEPS = 50
PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
LOG = Path(__file__).parent / "golden" / "log.npz"
CRITICS = {"critic_hidden": (16, 16), "batch_size": 32}
FLOW = {**CRITICS, "flow_hidden": (16,)}
STUDENT = {**FLOW, "student_hidden": (16,)}
SHIELD = {**CRITICS, "behaviour_hidden": (16,), "fallback_hidden": (16,)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("bc", {"hidden": (16,), "batch_size": 32}),
    "bc, safe episodes": ("bc", {"hidden": (16,), "episodes": "safe", "cost_limit": 0.0}),
    "fisor": ("fisor", FLOW),
    "flrp": ("flrp", FLOW),
    "flrp, costs": ("flrp", {**FLOW, "feasibility": "cost", "prior": "gaussian"}),
    "r2pac": ("r2pac", STUDENT),
    "r2pac, safety": ("r2pac", {**STUDENT, "region": "safety", "actor": "awr_gaussian"}),
    "safefql": ("safefql", STUDENT),
    "safefql, joint": (
        "safefql",
        {**STUDENT, "phases": "joint", "teacher": "behaviour", "margin": 0.058},
    ),
    "safefql, one step": ("safefql", {**STUDENT, "safety_backup_steps": (2, 1), "polyak": 1.0}),
    "shield": ("shield", SHIELD),
    "shield, backup": ("shield", {**SHIELD, "backup": "test-many@1"}),
}


@register_backup("test-many@1")
def towards_the_middle(observations: np.ndarray) -> np.ndarray:
    return -np.sign(observations)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return OfflineDataset.load(LOG)


def agents(case: str, seeds: Iterator[int] | range) -> list[OfflineAgent[Any, Any]]:
    name, settings = CASES[case]
    kind = ALGORITHMS[name].kind
    return [kind(kind.config_type(seed=seed, **settings), device="cpu") for seed in seeds]


def distance(one: OfflineAgent[Any, Any], other: OfflineAgent[Any, Any]) -> float:
    mine, theirs = flatten(one._networks), flatten(other._networks)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def together(found: list[OfflineAgent[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nobody may train these agents alone."""
    for kind in {type(agent) for agent in found}:
        monkeypatch.setattr(kind, "fit", lambda *_, **__: pytest.fail("a member was trained alone"))


@pytest.mark.filterwarnings("ignore:the backup", "ignore:the unsafe region")
@pytest.mark.parametrize("case", CASES)
def test_batched_members_end_with_the_weights_of_their_own_fit(
    case: str, log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [agent.fit(log, STEPS) for agent in agents(case, range(3))]
    trained = agents(case, range(3))
    together(trained, monkeypatch)
    found = fit_many(trained, log, STEPS)
    assert found == trained
    for mine, theirs in zip(found, alone, strict=True):
        assert distance(mine, theirs) < 1e-4
        assert mine.updates == theirs.updates == STEPS
    assert distance(found[0], found[1]) > 1e-2
    states = log.observations[:20]
    for mine, theirs in zip(found, alone, strict=True):
        # The agents with several candidates take the best, which rounding may change.
        same = np.isclose(
            mine.predict(states, deterministic=True)[0],
            theirs.predict(states, deterministic=True)[0],
            atol=1e-3,
        )
        assert same.all(axis=-1).mean() >= 0.9
    assert [agent.diagnostics().keys() for agent in found] == [
        agent.diagnostics().keys() for agent in alone
    ]


def discrete_log() -> OfflineDataset:
    """Ten walks on a line of 20 steps; left of 0 is a violation."""
    rng = np.random.default_rng(0)
    choices = rng.integers(0, 3, (10, 20))
    places = 2.0 + np.concatenate([np.zeros((10, 1)), (choices - 1).cumsum(1)], axis=1)
    states = places[..., None].astype(np.float32)
    ends = np.tile(np.arange(20) == 19, 10)
    return OfflineDataset.from_arrays(
        observations=states[:, :-1].reshape(-1, 1),
        actions=choices.reshape(-1),
        rewards=np.zeros(200, np.float32),
        next_observations=states[:, 1:].reshape(-1, 1),
        terminated=np.zeros(200, bool),
        truncated=ends,
        costs=(places[:, 1:] < 0).reshape(-1).astype(np.float32),
        constraints=-places[:, :-1].reshape(-1),
        next_constraints=-places[:, 1:].reshape(-1),
        observation_space=gym.spaces.Box(-np.inf, np.inf, (1,)),
        action_space=gym.spaces.Discrete(3),
    )


def test_shields_of_discrete_actions_are_trained_together(monkeypatch: pytest.MonkeyPatch) -> None:
    log = discrete_log()
    alone = [agent.fit(log, STEPS) for agent in agents("shield", range(2))]
    trained = agents("shield", range(2))
    together(trained, monkeypatch)
    for mine, theirs in zip(fit_many(trained, log, STEPS), alone, strict=True):
        assert distance(mine, theirs) < 1e-4


def test_other_members_are_grouped_and_keep_their_order(
    log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shields, cloners = agents("shield", range(2)), agents("bc", range(2))
    (wide,) = agents("bc", [0])
    wide.config = dataclasses.replace(wide.config, hidden=(24,))
    (rate,) = agents("bc", [0])
    rate.config = dataclasses.replace(rate.config, learning_rate=0.01)
    members = [shields[1], cloners[0], wide, shields[0], rate, cloners[1]]
    groups: list[list[str]] = []
    run = many.run_together

    def noted(phases: object, members: list[loop.Member], *rest: object) -> list[TrainState]:
        groups.append([one.name.partition(",")[0] for one in members])
        return run(phases, members, *rest)

    monkeypatch.setattr(many, "run_together", noted)
    assert fit_many(members, log, 10) == members
    assert groups == [["members[0]", "members[3]"], ["members[1]", "members[5]"]]
    for agent in members:
        fresh = type(agent)(agent.config, device="cpu").fit(log, 10)
        assert distance(agent, fresh) < 1e-4


def test_members_whose_labels_depend_on_the_seed_are_trained_alone(log: OfflineDataset) -> None:
    """With the support in the backups, each seed holds out other episodes."""
    settings = {**SHIELD, "support_weight": 1.0, "support_held_out": 0.4, "support_alpha": 0.5}
    configs = [ShieldConfig(seed=seed, **settings) for seed in range(2)]
    found = fit_many(configs, log, 20)
    for agent, config in zip(found, configs, strict=True):
        assert distance(agent, ShieldTrainer(config).fit(log, 20)) == 0.0


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_turns_give_the_agents_of_fit(workers: int, log: OfflineDataset) -> None:
    configs = [SafeFQLConfig(seed=1, **STUDENT), BehaviourCloningConfig(hidden=(16,)),
               SafeFQLConfig(seed=0, **STUDENT)]  # fmt: skip
    found = fit_many(configs, log, 20, workers=workers)
    assert [agent.config for agent in found] == configs
    alone = [SafeFQL(configs[0]), BehaviourCloning(configs[1]), SafeFQL(configs[2])]
    for mine, theirs in zip(found, alone, strict=True):
        assert distance(mine, theirs.fit(log, 20)) < 1e-4
        assert mine.updates == 20
        assert np.allclose(
            mine.predict(log.observations[:5], deterministic=True)[0],
            theirs.predict(log.observations[:5], deterministic=True)[0],
            atol=1e-3,
        )


def test_an_error_in_a_process_arrives_with_the_name_of_the_member(log: OfflineDataset) -> None:
    wild = [BehaviourCloningConfig(seed=seed, hidden=(8,), learning_rate=1e38) for seed in (3, 4)]
    safe = [BehaviourCloningConfig(seed=seed, hidden=(8,)) for seed in range(2)]
    with pytest.raises(FloatingPointError, match="diverged in the phase 'cloning'") as caught:
        fit_many([*safe, *wild], log, 20, workers=1)
    assert "in members[2], BehaviourCloning with seed 3" in caught.value.__notes__


def test_a_batched_member_that_diverges_is_named(log: OfflineDataset) -> None:
    wild = [BehaviourCloningConfig(seed=seed, hidden=(8,), learning_rate=1e38) for seed in (3, 4)]
    with pytest.raises(FloatingPointError, match="diverged in the phase 'cloning'") as caught:
        fit_many([BehaviourCloningConfig(hidden=(8,)), *wild], log, 20)
    assert "in members[1], BehaviourCloning with seed 3" in caught.value.__notes__


def test_a_process_that_ends_is_reported(log: OfflineDataset, tmp_path: Path) -> None:
    """Here the script calls `fit_many` where the processes import it, too."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from safeshield import OfflineDataset, fit_many\n"
        "from safeshield.algorithms.behaviour_cloning import BehaviourCloningConfig\n"
        f"log = OfflineDataset.load({str(LOG)!r})\n"
        "fit_many([BehaviourCloningConfig(seed=i) for i in range(2)], log, 20, workers=1)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert 'must stand below `if __name__ == "__main__":`' in done.stderr.splitlines()[-2]
    assert done.stderr.splitlines()[-1] == "in members[0], BehaviourCloning with seed 0"


def test_the_algorithm_of_the_documentation_is_batched(
    log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = max(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL), key=len)
    names: dict[str, Any] = {"__name__": "linear_for_many"}
    monkeypatch.setattr(registry, "ALGORITHMS", {})
    monkeypatch.setitem(sys.modules, "linear_for_many", types.ModuleType("linear_for_many"))
    vars(sys.modules["linear_for_many"]).update(names)
    exec(compile(block, "linear_for_many", "exec", dont_inherit=True), names)
    config, kind = names["LinearConfig"], names["Linear"]
    alone = [kind(config(seed=seed), device="cpu").fit(log, STEPS) for seed in range(2)]
    trained = [kind(config(seed=seed), device="cpu") for seed in range(2)]
    together(trained, monkeypatch)
    for mine, theirs in zip(fit_many(trained, log, STEPS), alone, strict=True):
        assert distance(mine, theirs) < 1e-4


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
                if "fit_many" in one)  # fmt: skip
    assert "steps=20_000" in block
    monkeypatch.chdir(tmp_path)
    exec(block.replace("steps=20_000", "steps=6"), {})
    seeds = [ShieldTrainer.load(f"trainer-{seed}.safetensors").config.seed for seed in range(4)]
    assert seeds == [0, 1, 2, 3]


# -- checkpoints -----------------------------------------------------------------------------------


def test_an_interrupted_batch_resumes_without_a_difference(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the checkpoints were written after different numbers of updates."""
    whole = fit_many(agents("shield", range(3)), log, STEPS)
    save, written = checkpoint.save_checkpoint, []

    def stops(path: Path, *rest: object) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append((path.name, rest[1]))
        save(path, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        fit_many(agents("shield", range(3)), log, STEPS, checkpoints=tmp_path, checkpoint_every=5)
    assert written[-1][0] == "0.safetensors"
    assert written[-1][1] > written[-2][1]
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    resumed = fit_many(agents("shield", range(3)), log, STEPS, checkpoints=tmp_path)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert distance(mine, theirs) < 1e-5


def test_checkpoints_are_those_of_fit(log: OfflineDataset, tmp_path: Path) -> None:
    (alone,) = agents("shield", [1])
    alone.fit(log, STEPS, checkpoint=tmp_path / "1.safetensors", stop_after=20)
    found = fit_many(agents("shield", range(2)), log, STEPS, checkpoints=tmp_path)
    (one,) = agents("shield", [1])
    one.fit(log, STEPS, checkpoint=tmp_path / "1.safetensors", stop_after=STEPS)
    assert distance(one, found[1]) == 0.0
    (fresh,) = agents("shield", [1])
    assert distance(found[1], fresh.fit(log, STEPS)) < 1e-4
    with pytest.raises(ValueError, match=r"another configuration.*seed 0 -> 5") as caught:
        fit_many(agents("shield", [5, 6]), log, STEPS, checkpoints=tmp_path)
    assert "in members[0], ShieldTrainer with seed 5" in caught.value.__notes__


# -- what a member axis means ----------------------------------------------------------------------


def test_the_loss_of_a_batch_of_members_is_the_sum_of_their_losses() -> None:
    def loss(state: TrainState, draw: Draw) -> Loss:
        def of(networks: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
            value = (networks["net"]["w"] * draw.noise).square().sum() + state.scales["a"]
            return value, {"value": value.detach()}

        return of

    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 2, generator=generator)
    draw = Draw(torch.zeros(3, 4, dtype=torch.int64), torch.rand(3, 4, 2, generator=generator),
                torch.zeros(3, 4, 1))  # fmt: skip
    state = TrainState({}, {}, {}, {"a": torch.arange(3.0)}, torch.zeros(3, 0))
    leaf = weights.clone().requires_grad_()
    value, metrics = of_batch(loss, state, draw)({"net": {"w": leaf}})
    (gradient,) = torch.autograd.grad(value, [leaf])
    expected = (weights[:, None] * draw.noise).square().sum((1, 2)) + torch.arange(3.0)
    torch.testing.assert_close(metrics["value"], expected)
    torch.testing.assert_close(value, expected.sum())
    torch.testing.assert_close(gradient, 2 * weights * draw.noise.square().sum(1))


def test_the_normalised_copy_of_a_log_has_the_rows_of_the_log(log: OfflineDataset) -> None:
    agent = ShieldTrainer(device="cpu")
    scaling = agent._describe(log).scaling
    rows = torch.tensor([3, 0, 999])
    lazy = LogTensors.of(log, scaling, agent.device)
    copied = LogTensors.of(log, scaling, agent.device, normalised=True)
    assert isinstance(copied.observations, Tensor)
    assert not isinstance(lazy.observations, Tensor)
    for name in ("observations", "next_observations"):
        assert torch.equal(getattr(lazy, name)[rows], getattr(copied, name)[rows])


def test_an_agent_does_not_keep_the_weights_of_the_others(log: OfflineDataset) -> None:
    for agent in fit_many(agents("bc", range(3)), log, 2):
        for tensor in flatten(agent._networks).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


# -- bad input -------------------------------------------------------------------------------------


def test_equal_members_are_an_error_that_names_both_positions(log: OfflineDataset) -> None:
    configs = [ShieldConfig(seed=seed) for seed in (4, 7, 4)]
    message = r"members\[0\] and members\[2\] must differ, got members\[0\].* seed 4 .*another seed"
    with pytest.raises(ValueError, match=message):
        fit_many(configs, log, 10)
    agent = BehaviourCloning(device="cpu")
    with pytest.raises(ValueError, match=r"members\[0\] and members\[1\] must differ"):
        fit_many([agent, agent], log, 10)
    with pytest.raises(ValueError, match=r"members\[0\] and members\[1\] must differ"):
        fit_many([BehaviourCloning(device="cpu"), BehaviourCloningConfig()], log, 10)


@pytest.mark.parametrize(
    ("members", "options", "error", "message"),
    [
        ([], {}, ValueError, r"members must be a list of at least one agent or settings, got \[\]"),
        (ShieldConfig(), {}, TypeError, "members must be a list of at least one .*ShieldConfig"),
        ([3], {}, TypeError, r"members\[0\] must be an agent .* got 3: pass for example"),
        (["safefql"], {}, TypeError, r"members\[0\] must be an agent .* got 'safefql'"),
        ([ShieldConfig()], {"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ([ShieldConfig()], {"workers": 1.5}, TypeError, "workers must be a whole number, got 1.5"),
        ([ShieldConfig()], {"steps": 2}, ValueError, "steps must be at least 3, got 2"),
        ([ShieldConfig()], {"checkpoint_every": 0}, ValueError, "checkpoint_every must be at"),
        ([ShieldConfig()], {"checkpoints": "nowhere"}, FileNotFoundError, "got nowhere: make it"),
        ([ShieldConfig()], {"checkpoints": 3}, TypeError, "must be the path of a folder, got 3"),
    ],
)
def test_bad_arguments(
    members: object,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    log: OfflineDataset,
) -> None:
    with pytest.raises(error, match=message):
        fit_many(members, log, **{"steps": 10, **options})


def test_learners_that_need_an_environment_are_no_members(log: OfflineDataset) -> None:
    from safeshield import SSQLConfig

    with pytest.raises(TypeError, match=r"members\[0\] must be an agent that has `fit`"):
        fit_many([SSQLConfig()], log, 10)


def test_settings_of_several_algorithms_need_an_agent(
    log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(BehaviourCloning):
        pass

    entry = dataclasses.replace(ALGORITHMS["bc"], name="other", kind=Other)
    monkeypatch.setitem(ALGORITHMS, "other", entry)
    with pytest.raises(ValueError, match=r"pass one of \['BehaviourCloning', 'Other'\]"):
        fit_many([BehaviourCloningConfig()], log, 10)


def test_a_loss_that_cannot_be_mapped_says_what_to_do(
    log: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = BehaviourCloning.run_type
    loss = kind._loss

    def reads_a_number(self: object, state: TrainState, draw: Draw) -> Loss:
        if float(draw.noise.sum()) > 1e9:
            raise AssertionError
        return loss(self, state, draw)

    monkeypatch.setattr(kind, "_loss", reads_a_number)
    with pytest.raises(RuntimeError) as caught:
        fit_many(agents("bc", range(2)), log, 2)
    assert "pass workers=0 to train one agent after the other" in caught.value.__notes__[0]
    assert len(fit_many(agents("bc", range(2)), log, 2, workers=0)) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_members_on_a_gpu_end_with_the_weights_of_their_own_fit(log: OfflineDataset) -> None:
    configs = [ShieldConfig(seed=seed, **SHIELD) for seed in range(3)]
    alone = [ShieldTrainer(config, device="cuda").fit(log, STEPS) for config in configs]
    found = fit_many([ShieldTrainer(config, device="cuda") for config in configs], log, STEPS)
    for mine, theirs in zip(found, alone, strict=True):
        assert distance(mine, theirs) < 1e-4
