"""The shield on tensors decides as the shield on arrays; a budget never lets a proposal pass."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch

from safeshield import (
    Shield,
    ShieldConfig,
    ShieldTrainer,
    TorchShield,
    UncalibratedShieldWarning,
    collect,
)
from safeshield.envs.boat import ROCK_CENTRES, ROCK_RADII
from safeshield.nn.mlp import layers
from safeshield.shield import (
    CandidateSet,
    CommittedFallback,
    FallbackPolicy,
    FilterReport,
    NearestAcceptable,
    OwnSamples,
    ProjectedGradient,
)
from safeshield.shield.tensors import TensorReport
from safeshield.values.constraint import ConstraintSource, UnknownConstraintError
from safeshield.values.units import ADVANTAGE

Array = npt.NDArray[Any]
GOLDEN = Path(__file__).parent / "golden"
STORED = sorted(path.name for path in GOLDEN.glob("shield_*.safetensors"))
TESTED = [name for name in STORED if "support" in name or "latent_density" in name]
"""Shields with a support test, which do not run on tensors."""
UNTESTED = [name for name in STORED if name not in TESTED]
STORED_CASES, BOAT_CASES, KNOWN_CASES, CLIFF_CASES = 2_000, 8_000, 4_000, 4_000
"""Numbers of cases of one test; `test_there_are_enough_cases` adds them up."""
QUANTILES = (0.5, 0.02)
STRATEGIES = (NearestAcceptable(), FallbackPolicy(), CommittedFallback(), ProjectedGradient(4))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def points(space: gym.Space[Any], count: int, rng: np.random.Generator) -> Any:  # noqa: ANN401
    """Return n points inside a space and just outside it."""
    if isinstance(space, gym.spaces.Dict):
        return {key: points(part, count, rng) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Box):
        low, high = np.maximum(space.low, -3.0), np.minimum(space.high, 3.0)
        middle, half = (low + high) / 2, (high - low) / 2
        drawn = middle + 1.2 * half * rng.uniform(-1.0, 1.0, (count, *space.shape))
        return drawn.astype(np.float32)
    space.seed(int(rng.integers(2**31)))
    return np.array([space.sample() for _ in range(count)])


def tensors(batch: Any, device: str = "cpu") -> Any:  # noqa: ANN401
    """Return arrays, or a dict of them, as tensors."""
    if isinstance(batch, dict):
        return {key: tensors(part, device) for key, part in batch.items()}
    return torch.tensor(batch, device=device)


def broken(batch: Any, rng: np.random.Generator) -> Any:  # noqa: ANN401
    """Put NaN, infinite and absurd numbers into 3% of the rows of floats; the batch is returned."""
    if isinstance(batch, dict):
        return {key: broken(part, rng) for key, part in batch.items()}
    if batch.dtype.kind == "f":
        rows = rng.choice(len(batch), max(len(batch) * 3 // 100, 1), replace=False)
        batch[rows] = rng.choice([np.nan, np.inf, -np.inf, 1e30], batch[rows].shape)
    return batch


def compare(
    shield: Shield,
    states: Any,  # noqa: ANN401
    actions: Array,
    constraint: Array | None = None,
) -> int:
    """Raise AssertionError unless both shields decide alike; return the number that differ.

    A verdict may differ where Q_h lies within 1e-5 of the spread of h from the threshold. The
    choice of a replacement may then differ as well: it must be what the shield on arrays chooses
    for a threshold that is that much higher or lower, or a choice between equal values.
    """
    near = 1e-5 * shield.model.scale.spread
    rows, _ = shield.observation_rows(states)
    proposed, _ = shield.action_rows(actions)
    judged = shield.states(rows, constraint)
    answers = [
        shield.filter_rows(judged, rows, proposed, shield.threshold + shift)
        for shift in (0.0, near, -near)
    ]
    executed, report = answers[0]
    there = shield.to_torch()
    h = None if constraint is None else torch.tensor(constraint)
    found, verdict = there.filter(tensors(states), tensors(actions), constraint=h)
    assert found.dtype == tensors(actions).dtype
    rows_found = found.numpy().reshape(executed.shape)
    for name in ("value", "proposed_value", "state_value"):
        one, other = getattr(report, name), getattr(verdict, name).numpy()
        assert other.dtype == np.float32
        assert (np.isinf(one) == np.isinf(other)).all(), name
    np.testing.assert_array_equal(verdict.valid.numpy(), report.valid)
    finite = np.isfinite(report.proposed_value)
    for name in ("proposed_value", "state_value"):
        one, other = getattr(report, name)[finite], getattr(verdict, name).numpy()[finite]
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=20 * near)

    passed = ~verdict.intervened.numpy()
    np.testing.assert_array_equal(rows_found[passed], proposed[passed])
    different = passed == report.intervened
    off = np.abs(report.proposed_value[different] - shield.threshold)
    assert (off <= near).all(), off
    alike = np.zeros(len(rows), bool)
    for other, _ in answers:
        alike |= np.isclose(rows_found, other, rtol=1e-4, atol=1e-4).all(axis=1)
    same_value = np.abs(verdict.value.numpy() - report.value) <= near
    # Where the observation is not readable, no value is reported.
    unknown = np.isinf(report.value)
    replaced = ~passed & report.intervened & ~unknown
    assert (alike | same_value)[replaced].all(), np.flatnonzero(replaced & ~alike & ~same_value)
    assert alike[unknown].all()
    settled = verdict.acceptable.numpy() == report.acceptable
    assert (np.abs(report.value - shield.threshold) <= 2 * near)[~settled].all()
    return int(different.sum())


def rocks(observations: torch.Tensor) -> torch.Tensor:
    """Return the boat's h (n,) of positions (n, 2), on tensors."""
    centres = observations.new_tensor(ROCK_CENTRES)
    distance = (observations[:, None] - centres).square().sum(-1).sqrt()
    return (observations.new_tensor(ROCK_RADII) - distance).amax(1)


def trips(shield: Shield, count: int, seed: int) -> tuple[Array, Array]:
    """Return states of the boat and actions in and outside the box, some of them broken."""
    rng = np.random.default_rng(seed)
    states = broken(points(shield.observation_space, count, rng), rng)
    return states, broken(points(shield.action_space, count, rng), rng)


# -- the same decisions ----------------------------------------------------------------------------


def test_there_are_enough_cases() -> None:
    stored = len(UNTESTED) * len(QUANTILES) * STORED_CASES
    boat = len(STRATEGIES) * (BOAT_CASES + KNOWN_CASES)
    assert stored + boat + 3 * CLIFF_CASES >= 100_000


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("name", UNTESTED)
def test_stored_shields_decide_alike(name: str, quantile: float) -> None:
    """At thresholds that accept half of the actions, and few."""
    shield = Shield.load(GOLDEN / name)
    rng = np.random.default_rng(len(name))
    states = points(shield.observation_space, STORED_CASES, rng)
    actions = points(shield.action_space, STORED_CASES, rng)
    values = np.asarray(shield.value(states, actions))
    shift = float(np.quantile(values[np.isfinite(values)], quantile)) + 0.01
    scale = shield.model.scale
    moved = replace(scale, offset=scale.offset - max(shift, 0.0))
    shield = replace(shield, model=replace(shield.model, scale=moved), record=None)
    shield = shield.with_delta(max(-shift, 0.0))
    assert compare(shield, broken(states, rng), broken(actions, rng)) <= 2


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_the_boat_decides_alike(shield: Shield, strategy: Any) -> None:  # noqa: ANN401
    shield = shield.with_replacement(strategy)
    states, actions = trips(shield, BOAT_CASES, seed=1)
    assert compare(shield, states, actions) <= 2
    half = actions[:1000].astype(np.float64)
    assert compare(shield, states[:1000].astype(np.float64), half) <= 1


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_a_constraint_that_is_passed_decides_alike(shield: Shield, strategy: Any) -> None:  # noqa: ANN401
    """Also where it is NaN, which means that h is not known."""
    shield = shield.with_replacement(strategy).with_constraint(ConstraintSource("caller@1"))
    states, actions = trips(shield, KNOWN_CASES, seed=2)
    h = rocks(torch.tensor(states)).numpy()
    h[::17] = np.nan
    assert compare(shield, states, actions, h) <= 2


def test_a_function_of_the_constraint_is_the_constraint(shield: Shield) -> None:
    shield = shield.with_constraint("Boat@1")
    states, actions = trips(shield, KNOWN_CASES, seed=3)
    there = shield.to_torch(constraint_fn=rocks)
    executed, report = there.filter(torch.tensor(states), torch.tensor(actions))
    known, told = shield.filter(states, actions)
    near = 1e-5 * shield.model.scale.spread
    settled = np.abs(told.proposed_value - shield.threshold) > near
    np.testing.assert_array_equal(report.intervened.numpy()[settled], told.intervened[settled])
    same = np.isclose(executed.numpy(), known, rtol=1e-4, atol=1e-4).all(axis=1)
    assert same[settled].mean() > 0.999
    np.testing.assert_allclose(
        there.value(torch.tensor(states)).numpy(), shield.value(states), rtol=1e-4, atol=1e-5
    )
    # A registered function that takes and returns tensors needs no second one.
    own = shield.with_constraint(ConstraintSource("Boat@1", rocks)).to_torch()
    again, _ = own.filter(torch.tensor(states), torch.tensor(actions))
    assert torch.equal(executed, again)


class Falls(gym.Wrapper[Any, Any, Any, Any]):
    """CliffWalking in which a fall costs 1 and ends the episode."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        cell, reward, over, truncated, info = self.env.step(action)
        fell = reward < -50
        return cell, float(reward), over or fell, truncated, {**info, "cost": float(fell)}


@pytest.fixture(scope="module")
def cliff() -> Shield:
    """A shield of CliffWalking, trained for a few updates."""
    name = next(name for name in ("CliffWalking-v1", "CliffWalking-v0") if name in gym.registry)
    env = Falls(gym.make(name, max_episode_steps=100))
    log = collect(env, "random", episodes=60, seed=0)
    config = ShieldConfig(critic_hidden=(32, 32), behaviour_hidden=(16,))
    return ShieldTrainer(config, device="cpu").fit(log, steps=300).shield()


@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=lambda each: type(each).__name__)
def test_the_cliff_decides_alike(cliff: Shield, strategy: Any) -> None:  # noqa: ANN401
    rng = np.random.default_rng(4)
    cells = rng.integers(-1, 50, CLIFF_CASES)
    moves = rng.integers(-1, 5, CLIFF_CASES)
    values = np.asarray(cliff.value(cells, moves))
    usual = float(np.median(values[np.isfinite(values)]))
    shield = cliff.with_replacement(strategy).with_delta(max(-usual, 0.0))
    report = shield.filter(cells, moves)[1]
    assert 0.1 < report.intervened.mean() < 1.0
    assert compare(shield, cells, moves) <= 2


def test_verdicts_that_differ_lie_at_the_threshold(shield: Shield) -> None:
    """With each row's threshold at its own Q_h, rounding decides; far from it, it does not."""
    states, actions = trips(shield, 5_000, seed=15)
    rows, _ = shield.observation_rows(states)
    judged = shield.states(rows)
    own = shield.filter_rows(judged, rows, actions)[1].proposed_value.astype(np.float64)
    known = np.isfinite(own)
    near = 1e-5 * shield.model.scale.spread
    args = torch.tensor(states), torch.tensor(actions)
    different = []
    for shift in (0.0, near, -near):
        told = shield.filter_rows(judged, rows, actions, own + shift)[1].intervened
        _, found = shield.to_torch().filter(*args, threshold=torch.tensor(own + shift))
        different.append((found.intervened.numpy() != told)[known].sum())
    assert different[0] > 0
    assert different[1:] == [0, 0]


def test_a_comparison_sees_another_shield(shield: Shield) -> None:
    """What the tests above do with a shield whose threshold differs by 0.01."""
    states, actions = trips(shield, 2_000, seed=5)

    class Other(Shield):
        def to_torch(self, *args: Any, **kwargs: Any) -> TorchShield:  # noqa: ANN401
            return Shield(self.model, self.delta + 0.01).to_torch()

    other = Other(shield.model, shield.delta)
    with pytest.raises(AssertionError):
        compare(other, states, actions)


@pytest.mark.parametrize("counts", [(1, 0, 0), (1, 3, 0), (2, 0, 5)])
def test_candidates_may_be_few(shield: Shield, counts: tuple[int, int, int]) -> None:
    shield = shield.with_replacement(NearestAcceptable(CandidateSet(*counts)))
    assert compare(shield, *trips(shield, 1_000, seed=13)) <= 1


def test_a_threshold_for_each_row(shield: Shield) -> None:
    """As a memory of the caller, or an adaptive margin, computes them."""
    states, actions = trips(shield, 500, seed=6)
    limits = np.linspace(-0.4, 0.1, 500)
    rows, _ = shield.observation_rows(states)
    told = shield.filter_rows(shield.states(rows), rows, actions, limits)[1]
    args = torch.tensor(states), torch.tensor(actions)
    _, report = shield.to_torch().filter(*args, threshold=torch.tensor(limits))
    assert (report.intervened.numpy() != told.intervened).sum() <= 1
    _, all_rejected = shield.to_torch().filter(*args, threshold=-1e9)
    assert all_rejected.intervened.all()


def test_the_report_has_the_fields_of_the_report() -> None:
    assert TensorReport._fields == (*FilterReport._fields, "overflow")


def test_values_and_certificates(shield: Shield) -> None:
    stored = Shield.load(GOLDEN / "shield_calibrated.safetensors")
    assert stored.record is not None
    for one in (stored, shield):
        rng = np.random.default_rng(7)
        states = broken(points(one.observation_space, 300, rng), rng)
        actions = points(one.action_space, 300, rng)
        there, batch = one.to_torch(), torch.tensor(states)
        given = there.value(batch, torch.tensor(actions)).numpy()
        np.testing.assert_allclose(given, one.value(states, actions), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            there.value(batch).numpy(), one.value(states), rtol=1e-4, atol=1e-5
        )
        assert (there.certified(batch).numpy() != one.certified(states)).sum() <= 1
        assert there.threshold == one.threshold


def test_an_accepted_action_is_executed_bit_for_bit_and_is_a_copy(shield: Shield) -> None:
    there = shield.to_torch()
    states = torch.tensor([[-2.9, 1.9]]).repeat(3, 1)
    for dtype in (torch.float32, torch.float64):
        actions = torch.full((3, 2), 1.0 / 3.0, dtype=dtype, requires_grad=True)
        executed, report = there.filter(states, actions)
        assert not report.intervened.any()
        assert torch.equal(executed, actions)
        assert executed.dtype == dtype
        assert not executed.requires_grad
        executed.zero_()
        assert (actions != 0).all()


def test_no_rows_at_all(shield: Shield, cliff: Shield) -> None:
    nothing = torch.zeros(0, 2)
    for budget in (None, 4):
        assert shield.to_torch(budget=budget).filter(nothing, nothing)[0].shape == (0, 2)
        cells = torch.zeros(0, dtype=torch.int64)
        executed, _ = cliff.to_torch(budget=budget).filter(cells, cells)
        assert (executed.shape, executed.dtype) == ((0,), torch.int64)


# -- a budget --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_a_budget_that_suffices_changes_nothing(shield: Shield, strategy: Any) -> None:  # noqa: ANN401
    shield = shield.with_replacement(strategy)
    args = tuple(map(torch.tensor, trips(shield, 400, seed=8)))
    one, report = shield.to_torch().filter(*args)
    captured = shield.to_torch(budget=400)
    other, verdict = captured.filter(*args)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("intervened", "acceptable", "valid"):
        assert torch.equal(getattr(verdict, name), getattr(report, name)), name
    assert not verdict.overflow.any()
    assert captured.overflowed == 0


@pytest.mark.parametrize("budget", [1, 7, 100])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_rows_beyond_the_budget_never_execute_the_proposal(
    shield: Shield,
    strategy: Any,  # noqa: ANN401
    budget: int,
) -> None:
    """They execute the fallback's action; the searched rows have the highest Q_h."""
    shield = shield.with_replacement(strategy).with_delta(0.3)
    states, actions = trips(shield, 600, seed=9)
    args = torch.tensor(states), torch.tensor(actions)
    free, unlimited = shield.to_torch().filter(*args)
    captured = shield.to_torch(budget=budget)
    executed, report = captured.filter(*args)
    beyond = report.overflow.numpy()
    if isinstance(strategy, CommittedFallback):
        assert not beyond.any()
        torch.testing.assert_close(executed, free, rtol=1e-5, atol=1e-5)
        return
    rows, _ = shield.observation_rows(states)
    judged = shield.states(rows)
    own = shield.model.fallback_alone(judged)
    np.testing.assert_allclose(executed.numpy()[beyond], own[beyond], rtol=1e-5, atol=1e-5)
    assert report.intervened.numpy()[beyond].all()
    assert not (executed == args[1]).all(1).numpy()[beyond].any()
    assert torch.equal(report.intervened, unlimited.intervened)
    # What has no acceptable clipped proposal needs the search.
    rejected = np.flatnonzero(report.intervened.numpy())
    low, high = shield.action_space.low, shield.action_space.high
    readable = shield.readable(rows)
    usable = np.isfinite(actions).all(axis=1) & readable
    clipped = np.where(usable[:, None], np.clip(actions, low, high), own)
    q = shield.model.action_values(judged, clipped.astype(np.float32))
    searching = q > shield.threshold
    assert set(np.flatnonzero(searching)) <= set(rejected)
    assert beyond.sum() == max(int(searching.sum()) - budget, 0) == captured.overflowed
    within = searching & ~beyond
    assert within.sum() == min(budget, searching.sum())
    assert q[within].min() >= q[beyond].max() - 1e-5 if beyond.any() else True
    torch.testing.assert_close(executed[within], free[within], rtol=1e-5, atol=1e-5)
    captured.filter(*args)
    assert captured.overflowed == 2 * beyond.sum()


def test_no_proposal_passes_a_threshold_that_nothing_meets(shield: Shield, cliff: Shield) -> None:
    states, actions = trips(shield, 300, seed=10)
    executed, report = shield.to_torch(budget=5).filter(
        torch.tensor(states), torch.tensor(actions), threshold=-1e9
    )
    assert report.overflow.sum() == 295
    assert not (executed == torch.tensor(actions)).all(1)[report.overflow].any()
    assert not report.acceptable.any()
    cells, moves = torch.arange(36), torch.arange(36) % 4
    executed, report = cliff.to_torch(budget=5).filter(cells, moves, threshold=-1e9)
    values = torch.stack([cliff.to_torch().value(cells, torch.full((36,), a)) for a in range(4)], 1)
    assert report.overflow.sum() == 31
    assert torch.equal(executed[report.overflow], values.argmin(1)[report.overflow])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_a_budget_fixes_all_shapes(shield: Shield, strategy: Any) -> None:  # noqa: ANN401
    """The whole call is one graph, which a shape that depends on data would break."""
    shield = shield.with_replacement(strategy)
    args = tuple(map(torch.tensor, trips(shield, 64, seed=11)))
    captured = shield.to_torch(budget=4)
    torch._dynamo.reset()
    graph = torch.compile(captured.filter, backend="eager", fullgraph=True)
    executed, report = graph(*args)
    counted = int(captured.overflowed)
    again, verdict = captured.filter(*args)
    assert torch.equal(executed, again)
    assert all(map(torch.equal, report, verdict))
    assert captured.overflowed == 2 * counted
    if not isinstance(strategy, CommittedFallback):
        assert counted
    with_h = shield.with_constraint("Boat@1").to_torch(budget=4, constraint_fn=rocks)
    known = torch.compile(with_h.filter, backend="eager", fullgraph=True)
    assert torch.equal(known(*args)[0], with_h.filter(*args)[0])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("name", UNTESTED)
def test_with_a_budget_no_data_are_read(name: str, strategy: Any) -> None:  # noqa: ANN401
    """Nor do tensors of two devices meet: the device "meta" has no data and allows no others.

    Without a budget, the number of rejected actions is read.
    """
    stored = Shield.load(GOLDEN / name)
    if stored.model.action_codec.discrete and isinstance(strategy, ProjectedGradient):
        return
    shield = stored.with_replacement(strategy)
    rng = np.random.default_rng(0)
    states = tensors(points(shield.observation_space, 16, rng), "meta")
    actions = tensors(points(shield.action_space, 16, rng), "meta")
    if shield.model.judge is None:
        executed, report = shield.to_torch("meta", budget=4).filter(states, actions)
        assert executed.shape == actions.shape
        assert {each.device.type for each in report} == {"meta"}
    with pytest.raises(NotImplementedError, match="nonzero"):
        shield.to_torch("meta").filter(states, actions)


def test_all_members_in_one_product_are_the_members(shield: Shield) -> None:
    """As networks are evaluated on a GPU."""
    args = tuple(map(torch.tensor, trips(shield, 500, seed=14)))
    one, other = shield.to_torch(), shield.to_torch()
    other._advantage = [layers(other._networks[ADVANTAGE])]
    assert len(one._advantage) == 2
    torch.testing.assert_close(one.value(*args), other.value(*args))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_budget_never_waits_for_the_device(shield: Shield) -> None:
    """And a captured graph decides as the shield on the CPU does."""
    args = [torch.tensor(each, device="cuda") for each in trips(shield, 4096, seed=12)]
    captured = shield.to_torch("cuda", budget=256)
    captured.filter(*args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.filter(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        executed, report = captured.filter(*args)
    graph.replay()
    here, verdict = shield.to_torch(budget=256).filter(*(each.cpu() for each in args))
    assert (report.intervened.cpu() != verdict.intervened).sum() <= 2
    near = torch.isclose(executed.cpu(), here, rtol=1e-3, atol=1e-3).all(1)
    assert near.float().mean() > 0.999


def test_the_example_of_the_guide_runs(
    shield: Shield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its boats hit a tenth of the rocks that they hit without the shield."""
    guide = GOLDEN.parents[1] / "docs" / "shields.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "to_torch(device" in block)
    shield.with_constraint("Boat@1").save(tmp_path / "boat.safetensors")
    monkeypatch.chdir(tmp_path)
    ends = []
    for line in ("", "    action = proposed\n"):
        torch.manual_seed(0)
        marker = "    unit = "
        names: dict[str, Any] = {"hit": 0}
        step = f"{line}    hit = hit + (rocks(at) > 0).sum()\n{marker}"
        exec(code.replace("4096", "512").replace(marker, step), names)
        assert len(names["at"]) > 100
        ends.append(int(names["hit"]))
    assert ends[0] < 0.1 * ends[1]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TESTED)
def test_a_support_test_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="support test does not run on tensors: filter arrays"):
        Shield.load(GOLDEN / name).to_torch()


class _Own:
    def choose(self, rejected: Any, /) -> Any:  # noqa: ANN401
        return rejected.wanted, None


def test_strategies_that_do_not_run_on_tensors_are_refused(shield: Shield) -> None:
    for strategy in (OwnSamples("random"), _Own()):
        with pytest.raises(
            TypeError, match=rf"got {type(strategy).__name__}; use with_replacement"
        ):
            shield.with_replacement(strategy).to_torch()  # type: ignore[arg-type]


def test_other_sources_of_h_are_refused(shield: Shield) -> None:
    class Both(ConstraintSource):
        pass

    with pytest.raises(TypeError, match="h comes from a Both does not run on tensors"):
        shield.with_constraint(Both("both@1")).to_torch()


def test_budgets_are_checked(shield: Shield) -> None:
    for budget in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1 row, got {budget}"):
            shield.to_torch(budget=budget)
    for budget in (2.5, True, "4"):
        with pytest.raises(TypeError, match="whole number of rows or None"):
            shield.to_torch(budget=budget)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="budget must be None for a shield that judges"):
        Shield.load(GOLDEN / "shield_plan.safetensors").to_torch(budget=4)


def test_where_h_comes_from_must_be_told(shield: Shield) -> None:
    state = torch.zeros(3, 2)
    h = torch.full((3,), -1.0)
    with pytest.raises(ValueError, match="constraint must be left out"):
        shield.to_torch().filter(state, state, constraint=h)
    with pytest.raises(ValueError, match="constraint_fn must be left out"):
        shield.to_torch(constraint_fn=rocks)
    named = shield.with_constraint("Boat@1")
    with pytest.raises(UnknownConstraintError, match="function for arrays returns ndarray"):
        named.to_torch().filter(state, state)
    with pytest.raises(UnknownConstraintError, match="has no function of tensors in this process"):
        shield.with_constraint(ConstraintSource("unheard@1")).to_torch().filter(state, state)

    def angry(observations: object) -> Array:
        raise RuntimeError("arrays only")

    with pytest.raises(UnknownConstraintError, match="raises RuntimeError: arrays only"):
        shield.with_constraint(ConstraintSource("angry@1", angry)).to_torch().value(state)
    assert named.to_torch().filter(state, state, constraint=h)[1].valid.all()
    with pytest.raises(ValueError, match=r"one number for each of 3 .* got \(2,\)"):
        named.to_torch().value(state, constraint=h[:2])
    with pytest.raises(ValueError, match=r"result of the constraint 'Boat@1' must be one number"):
        named.to_torch(constraint_fn=lambda x: x).value(state)
    with pytest.raises(ValueError, match=r"result of the constraint 'Boat@1' must be a tensor"):
        named.to_torch(constraint_fn=lambda x: 0.0).value(state)  # type: ignore[arg-type, return-value]


def test_arguments_are_checked(shield: Shield) -> None:
    there, state = shield.to_torch(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="observation must be a tensor, got ndarray"):
        there.filter(state.numpy(), state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Add the first axis to a single one"):
        there.filter(state[0], state)
    with pytest.raises(ValueError, match="got 3 observations and 2 actions"):
        there.filter(state, state[:2])
    with pytest.raises(ValueError, match=r"action must be float32 or float64 .* action.float\(\)"):
        there.filter(state, state.half())
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda'"):
        shield.to_torch("gpu")
    with pytest.raises(TypeError, match="constraint_fn must be a function of tensors, got 3"):
        shield.with_constraint("Boat@1").to_torch(constraint_fn=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold must be a tensor, got str"):
        there.filter(state, state, threshold="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"threshold must be one number, .* got shape \(2,\)"):
        there.filter(state, state, threshold=torch.zeros(2))
    with pytest.raises(ValueError, match="must be on the shield's device cpu, got meta"):
        there.filter(state.to("meta"), state)
    with pytest.raises(ValueError, match="device must have float64"):
        shield.to_torch("mps")
    gearbox = Shield.load(GOLDEN / "shield_dict.safetensors").to_torch()
    with pytest.raises(ValueError, match="dict of tensors with the entry 'speed'"):
        gearbox.value({"gear": torch.zeros(3)})
    with pytest.raises(ValueError, match="must all be of n points"):
        gearbox.value({"gear": torch.zeros(3), "speed": torch.zeros(2, 1)})


def test_an_uncalibrated_shield_warns_when_it_is_made(shield: Shield) -> None:
    fresh = replace(shield)
    with pytest.warns(UncalibratedShieldWarning):
        fresh.to_torch()
