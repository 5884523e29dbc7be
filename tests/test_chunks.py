"""Chunks of a log, what critics make of them, and the paper's propositions on small tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshield import OfflineDataset
from safeshield.algorithms.r2pac.agent import R2PAC, R2PACConfig
from safeshield.algorithms.r2pac.chunks import Chunks, log_window
from safeshield.algorithms.r2pac.losses import R2PACRun
from safeshield.algorithms.r2pac.regions import LEVEL, UNSAFE, horizon_level, reached_unsafe
from safeshield.nn.chunk_actors import normal_below
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.nn.guided import guided_network, guided_sample
from safeshield.nn.mlp import like, tensors
from safeshield.nn.optim import adam, adam_init, polyak
from safeshield.training.log import LogTensors
from safeshield.training.state import Draw, TrainState
from safeshield.values.backup import (
    RewardWindow,
    SafetyBackup,
    reward_windows,
    safety_windows,
    window_ends,
)
from safeshield.values.reward import RewardBatch, RewardCritics


def log_of(lengths: list[int], ends: list[bool], act: int = 1, seed: int = 0) -> LogTensors:
    """Return episodes of given lengths; `ends`: whether each terminated (else truncated)."""
    count = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    last = np.repeat(np.cumsum(lengths) - 1, lengths)
    terminated = torch.zeros(count, dtype=torch.bool)
    terminated[torch.tensor(np.cumsum(lengths) - 1)] = torch.tensor(ends)
    drawn = [torch.randn(count, generator=generator) for _ in range(3)]
    return LogTensors(
        observations=torch.arange(float(count))[:, None],
        actions=torch.rand(count, act, generator=generator) * 2 - 1,
        rewards=drawn[0],
        next_observations=torch.arange(float(count))[:, None] + 1,
        constraints=drawn[1],
        next_constraints=drawn[2],
        terminated=terminated,
        episode_last=torch.tensor(last),
    )


# -- chunks -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_no_chunk_crosses_an_end_and_every_termination_is_kept(
    episodes: list[tuple[int, bool]], length: int
) -> None:
    episodes = [(max(n, length) if not end else n, end) for n, end in episodes]
    log = log_of([n for n, _ in episodes], [end for _, end in episodes], act=2)
    rows = torch.arange(len(log))
    padding = torch.full((len(log), 2 * length), 7.0)
    chunk = Chunks(log, length).batch(rows, padding)
    assert (log.episode_last[chunk.rows] == log.episode_last[rows][:, None]).all()
    steps = torch.arange(length)
    wanted = torch.minimum(chunk.rows[:, :1] + steps, log.episode_last[rows][:, None])
    assert torch.equal(chunk.rows, wanted)
    # Cut short only by a termination, and then the last step made is the one that terminated.
    counts = chunk.inside.sum(1)
    short = counts < length
    assert chunk.terminated[short].all()
    assert torch.equal(chunk.terminated, log.terminated[chunk.end] & (counts >= 1))
    # Each terminating step is in the chunks of all of its last h rows.
    ends = torch.nonzero(log.terminated).flatten()
    for end in ends:
        assert chunk.terminated[rows == end].all()
    taken = log.actions[chunk.rows]
    filled = chunk.actions.reshape(len(log), length, 2)
    assert torch.equal(filled[chunk.inside], taken[chunk.inside])
    assert (filled[~chunk.inside] == 7.0).all()
    total = chunk.discounted(log.rewards[chunk.rows], 0.5)
    for row in range(len(log)):
        first, made = int(chunk.rows[row, 0]), int(counts[row])
        expected = sum(0.5**k * float(log.rewards[first + k]) for k in range(made))
        assert float(total[row]) == pytest.approx(expected, abs=1e-5)


def test_a_truncated_end_moves_the_chunk_and_keeps_the_bootstrap() -> None:
    chunk = Chunks(log_of([4], [False]), 3).batch(torch.arange(4), torch.zeros(4, 3))
    assert chunk.rows.tolist() == [[0, 1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert chunk.inside.all()
    assert not chunk.terminated.any()


@pytest.mark.parametrize("length", [1, 3, 6])
def test_the_safety_target_of_a_chunk_is_that_of_the_windows(length: int) -> None:
    """The batch's composition equals the whole log's, on chunks that begin where rows do."""
    log = log_of([9, 5, 7, 8], [True, True, False, True])
    rows = torch.arange(len(log))
    chunk = Chunks(log, length).batch(rows, torch.zeros(len(log), length))
    whole = safety_windows(
        log.next_constraints,
        log.next_constraints,
        log.terminated,
        log.episode_last,
        0.9,
        length,
    )
    value = torch.randn(len(log), generator=torch.Generator().manual_seed(5))
    backup = SafetyBackup(log.next_constraints[chunk.rows], chunk.inside, chunk.terminated, 0.9)
    target = backup.target(value[chunk.end])
    same = chunk.rows[:, 0] == rows
    expected = whole.target(value[window_ends(log.episode_last, rows, length)])
    torch.testing.assert_close(target[same], expected[same])
    assert same.float().mean() > 0.7


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_window_of_a_batch_is_that_of_the_whole_log(steps: int) -> None:
    log = log_of([9, 5, 7, 8], [True, False, False, True])
    rows = torch.arange(len(log))
    window = log_window(log, rows, steps, log.rewards, 0.9)
    whole = reward_windows(log.rewards, log.terminated, log.episode_last, 0.9, steps)
    torch.testing.assert_close(window.reward, whole.reward)
    torch.testing.assert_close(window.slope, whole.slope)
    # What fails ends a window as a termination does, and is worth what it is worth.
    fails = torch.rand(len(log), generator=torch.Generator().manual_seed(1)) < 0.2
    cut = log_window(log, rows, steps, log.rewards, 0.9, fails, -7.0)
    paid = torch.where(fails, -7.0, log.rewards)
    whole = reward_windows(paid, log.terminated | fails, log.episode_last, 0.9, steps)
    torch.testing.assert_close(cut.reward, whole.reward)
    torch.testing.assert_close(cut.slope, whole.slope)


def test_a_level_for_a_fixed_horizon() -> None:
    """Eq. 42: kappa violating steps, spread evenly over T steps and discounted."""
    spread = sum(0.99**t * 10.0 / 200 for t in range(200))
    assert horizon_level(10.0, 200, 0.99) == pytest.approx(spread)


# -- flows with labels --------------------------------------------------------------------------


def test_guidance_on_numpy_and_without_strength() -> None:
    network = guided_network(3, 4, (16, 16))
    params = network.init(torch.Generator().manual_seed(0))
    seen, noise = torch.randn(20, 3), torch.randn(20, 4)
    arrays = {name: tensor.numpy() for name, tensor in params.items()}
    for strength in (0.0, 1.0, 2.5):
        slow = guided_sample(network, params, seen, noise, 8, strength)
        fast = guided_sample(network, arrays, seen.numpy(), noise.numpy(), 8, strength)
        np.testing.assert_allclose(fast, slow.numpy(), atol=1e-5)
    # Guidance 0 is the field without labels; 1 the labelled field alone.
    plain = velocity_network(3, 4, (16, 16))
    first = params["0.weight"]
    rest = {name: tensor for name, tensor in params.items() if name != "0.weight"}
    unlabelled = {"0.weight": first[:, :-2], **rest}
    expected = euler_sample(plain, unlabelled, seen, noise, 8)
    torch.testing.assert_close(guided_sample(network, params, seen, noise, 8, 0.0), expected)
    labelled = {**unlabelled, "0.bias": params["0.bias"] + first[:, -2:-1]}
    expected = euler_sample(plain, labelled, seen, noise, 8)
    torch.testing.assert_close(guided_sample(network, params, seen, noise, 8, 1.0), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_dropped_labels(share: float) -> None:
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float((draws < normal_below(share)).float().mean()) == pytest.approx(share, abs=0.004)


# -- proposition 2 ------------------------------------------------------------------------------


def induced_values(log: LogTensors, chunks: Chunks, states: int, discount: float) -> np.ndarray:
    """Iterate values in the MDP whose transitions are the log's chunks, by counting: (states,)."""
    rows = torch.arange(len(log))
    chunk = chunks.batch(rows, torch.zeros(len(log), chunks.width))
    start = log.observations[chunk.rows[:, 0]].argmax(1).numpy()
    after = log.next_observations[chunk.end].argmax(1).numpy()
    paid = chunk.discounted(log.rewards[chunk.rows], discount).numpy()
    rest = np.where(chunk.terminated.numpy(), 0.0, discount**chunks.length)
    # Which actions were taken, as one number.
    kinds = chunk.actions.reshape(len(log), chunks.length, -1).argmax(-1).numpy()
    key = (kinds * (3 ** np.arange(chunks.length))).sum(1)
    values = np.zeros(states)
    for _ in range(400):
        y = paid + rest * values[after]
        new = values.copy()
        for state in range(states):
            here = start == state
            new[state] = max(y[here & (key == k)].mean() for k in np.unique(key[here]))
        values = new
    return values


def random_walk(rows: int) -> tuple[LogTensors, int]:
    """Return a log of random actions in an MDP of 4 states and 3 actions, and the states."""
    states, actions = 4, 3
    rng = np.random.default_rng(0)
    table = rng.integers(states, size=(states, actions, 2))  # two outcomes, equally likely
    gains = rng.uniform(-1, 1, (states, actions))
    state, made = 0, []
    for _ in range(rows):
        action = rng.integers(actions)
        after = int(table[state, action, rng.integers(2)])
        made.append((state, action, gains[state, action], after))
        state = after
    at, taken, paid, then = (torch.tensor(np.array(x)) for x in zip(*made, strict=True))
    eye, no = torch.eye(states), torch.zeros(rows)
    last = torch.full((rows,), rows - 1)
    log = LogTensors(
        eye[at], torch.eye(actions)[taken], paid.float(), eye[then], no, no, no.bool(), last
    )
    return log, states


def in_sample_values(
    log: LogTensors, chunks: Chunks, discount: float, tau: float, start: float, updates: int
) -> np.ndarray:
    """Learn V over chunks by the library's losses (eq. 15, 16 without a region): (states,)."""
    states = log.observations.shape[1]
    critics = RewardCritics(states, chunks.width, (64,), start, 1.0)
    networks = critics.init(torch.Generator().manual_seed(1))
    targets, moments = networks, adam_init(networks)
    chunk = chunks.batch(torch.arange(len(log)), torch.zeros(len(log), chunks.width))
    sums = chunk.discounted(log.rewards[chunk.rows], discount)
    after = log.next_observations[chunk.end]
    unused = RewardWindow(sums, sums)
    batch = RewardBatch(
        chunk.observations, chunk.actions, after, sums, chunk.terminated, unused, after
    )
    for step in range(updates):
        leaves = like(networks, [t.detach().requires_grad_() for t in tensors(networks)])
        loss, _, _ = critics.losses(
            leaves, targets, batch, torch.tensor(1.0), discount=discount**chunks.length,
            expectile=tau, one_step=True,
        )  # fmt: skip
        gradients = list(torch.autograd.grad(loss, tensors(leaves)))
        rate = torch.tensor(3e-3 * max(0.02, min(1.0, 2 - 2 * step / updates)))
        networks, moments = adam(networks, gradients, moments, [rate] * len(gradients))
        targets = polyak(targets, networks, 0.05)
    return critics.value(networks, torch.eye(states)).detach().numpy()


@pytest.mark.parametrize("length", [1, 2])
def test_proposition_2_chunks_learn_the_induced_mdp(length: int) -> None:
    """h-step in-sample learning, tau near 1, against value iteration over the logged chunks."""
    log, states = random_walk(500)
    chunks = Chunks(log, length)
    exact = induced_values(log, chunks, states, 0.8)
    assert np.ptp(exact) > 1.0
    start, updates = float(exact.mean()), 1000 * length  # Longer chunks need more.
    learned = in_sample_values(log, chunks, 0.8, 0.999, start, updates)
    np.testing.assert_allclose(learned, exact, atol=0.06)
    if length == 1:
        # Far from 1 it values something in between: the mean action and the best.
        between = in_sample_values(log, chunks, 0.8, 0.7, start, updates)
        assert (between < exact - 0.3).all()


# -- proposition 1 ------------------------------------------------------------------------------


class Ring(SimpleNamespace):
    """States 0 .. 5 in a row; 3 is unsafe and pays, 5 is dull and safe; two actions."""

    size = 6
    unsafe = 3

    @staticmethod
    def step(state: int, action: int) -> int:
        return min(state + 1, 4) if action else max(state - 1, 0)


class TableRegion:
    """Tells the unsafe state, and that alone."""

    def unsafe(self, state: Any, observations: Tensor, constraints: Tensor) -> Tensor:  # noqa: ANN401
        return observations[:, 0].round() == Ring.unsafe


def ring_log(starts: Any, plans: Any, shift: float = 0.0, lure: int = 0) -> OfflineDataset:  # noqa: ANN401
    """Return an episode, cut short by a truncation, for every start and plan on the ring.

    `shift` is added to all rewards, and the states that pay begin `lure` states before the unsafe.
    """
    episodes, observations, nexts, rewards, acted = [], [], [], [], []
    for start, plan in itertools.product(starts, plans):
        state = start
        for action in plan:
            after = Ring.step(state, action)
            observations.append([float(state)])
            nexts.append([float(after)])
            rewards.append((5.0 if after >= Ring.unsafe - lure else -1.0) + shift)
            acted.append([2.0 * action - 1.0])
            state = after
        episodes.append(len(plan))
    h = np.where(np.array(nexts)[:, 0] == Ring.unsafe, 1.0, -1.0)
    before = np.where(np.array(observations)[:, 0] == Ring.unsafe, 1.0, -1.0)
    ends = np.cumsum(episodes) - 1
    truncated = np.zeros(len(rewards), bool)
    truncated[ends] = True
    return OfflineDataset.from_arrays(
        observations=np.array(observations), actions=np.array(acted), rewards=np.array(rewards),
        next_observations=np.array(nexts), terminated=np.zeros(len(rewards), bool),
        truncated=truncated, constraints=before, next_constraints=h,
    )  # fmt: skip


def ring_run(data: OfflineDataset, config: R2PACConfig) -> tuple[R2PACRun, LogTensors]:
    """Return a run over a log of the ring, its region told by a table."""
    agent = R2PAC(config, device="cpu")
    model = agent._describe(data)
    log = LogTensors.of(data, model.scaling, torch.device("cpu"))
    # The tables' region reads raw states.
    raw, then = torch.tensor(data.observations), torch.tensor(data.next_observations)
    log = LogTensors(**{**vars(log), "observations": raw, "next_observations": then})
    run = R2PACRun(model, log, config, 3)
    run.region = TableRegion()  # type: ignore[assignment]
    return run, log


TABLE = R2PACConfig(
    discount=0.9, margin=0.0, critic_hidden=(4,), flow_hidden=(4,), student_hidden=(4,)
)


def penalised_run(length: int, penalty: float, test: Any) -> tuple[R2PACRun, LogTensors]:  # noqa: ANN401
    """Return a run over all chunks of the ring."""
    config = replace(TABLE, chunk=length, penalty=penalty, region_test=test)
    return ring_run(ring_log(range(5), list(itertools.product((0, 1), repeat=length))), config)


def marked(run: R2PACRun, log: LogTensors, level: float = 0.0) -> TrainState:
    """Return a state that knows the unsafe states of a log, and the level of the region."""
    state = run.initial(torch.Generator().manual_seed(0))
    reaches = reached_unsafe(run.region, state, log)
    told = {UNSAFE: reaches, LEVEL: torch.tensor(level)}
    return state._replace(scales={**state.scales, **told})


def greedy_path(run: R2PACRun, log: LogTensors, length: int) -> list[int]:
    """Solve the penalised problem by value iteration on the run's own targets; follow it from 0."""
    starts = torch.arange(0, len(log), length)
    chunk = run.chunks.batch(starts, torch.zeros(len(starts), run.chunks.width))
    batch = run.reward_batch(marked(run, log), chunk, 1)
    at = chunk.observations[:, 0].long()
    after = batch.next_observations[:, 0].long()
    values = torch.zeros(Ring.size)
    for _ in range(200):
        y = batch.rewards + 0.9**length * torch.where(batch.terminated, 0.0, values[after])
        values = torch.stack(
            [y[at == s].max() if (at == s).any() else torch.tensor(0.0) for s in range(Ring.size)]
        )
    y = batch.rewards + 0.9**length * torch.where(batch.terminated, 0.0, values[after])
    place, path = 0, [0]
    for _ in range(8):
        mine = torch.nonzero(at == place).flatten()
        best = mine[y[mine].argmax()]
        path += [int(x) for x in log.next_observations[chunk.rows[best], 0]]
        place = path[-1]
    return path


@pytest.mark.parametrize("length", [1, 2, 3])
def test_proposition_1_the_penalty_keeps_the_greedy_policy_safe(length: int) -> None:
    """With the stated penalty it never enters the unsafe state; with too small a one it does."""
    # Eq. 9 with l = 1 and gamma 0.9, and the absorbing state's value C / (1 - gamma).
    stated = (5.0 + 1.0) / 0.1 / 0.1
    run, log = penalised_run(length, stated, "any")
    assert Ring.unsafe not in greedy_path(run, log, length)
    # What suffices step by step: no safe way is worth less than -1 / (1 - gamma).
    run, log = penalised_run(length, 1.0 / 0.1 + 0.1, "any")
    assert Ring.unsafe not in greedy_path(run, log, length)
    run, log = penalised_run(length, 0.5, "any")
    assert Ring.unsafe in greedy_path(run, log, length)


def test_the_last_state_alone_lets_a_chunk_through() -> None:
    """The paper's test passes a chunk that crosses the unsafe state and comes out behind it."""
    run, log = penalised_run(2, 600.0, "end")
    assert Ring.unsafe in greedy_path(run, log, 2)
    run, log = penalised_run(2, 600.0, "any")
    assert Ring.unsafe not in greedy_path(run, log, 2)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("test", ["any", "end"])
def test_a_window_of_a_chunk_is_tested_like_the_chunk(length: int, test: Any) -> None:  # noqa: ANN401
    """V is fitted to windows and Q to chunks: over h steps the same ones enter the region."""
    run, log = penalised_run(length, 600.0, test)
    starts = torch.arange(0, len(log), length)
    chunk = run.chunks.batch(starts, torch.zeros(len(starts), run.chunks.width))
    batch = run.reward_batch(marked(run, log), chunk, length)
    out = ~batch.terminated
    torch.testing.assert_close(batch.window.reward[out], batch.rewards[out])
    torch.testing.assert_close(batch.window.slope, out.float() * 0.9**length)
    assert (batch.window.reward[~out] < -400).all()
    assert batch.terminated.any()
    assert not batch.terminated.all()


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_the_last_state_alone_ends_a_longer_window(steps: int) -> None:
    """A window of 2-step chunks, the last of which may be shorter, against a loop over chunks."""
    log = log_of([9, 5, 7, 8], [True, False, False, True])
    rows = torch.arange(len(log))
    fails = torch.rand(len(log), generator=torch.Generator().manual_seed(1)) < 0.4
    window = log_window(log, rows, steps, log.rewards, 0.9, fails, -7.0, test_every=2)
    anywhere = log_window(log, rows, steps, log.rewards, 0.9, fails, -7.0)
    assert not torch.equal(window.reward, anywhere.reward)
    for row in rows.tolist():
        last = min(row + steps - 1, int(log.episode_last[row]))
        total, weight = 0.0, 1.0
        for number, step in enumerate(range(row, last + 1), start=1):
            ends_a_chunk = number % 2 == 0 or step == last
            failed = bool(fails[step]) and ends_a_chunk
            total += weight * (-7.0 if failed else float(log.rewards[step]))
            weight *= 0.0 if failed or log.terminated[step] else 0.9
        assert float(window.reward[row]) == pytest.approx(total, abs=1e-4)
        assert float(window.slope[row]) == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kappa", [0.5, 1.0, 6.0])
def test_proposition_1_every_path_that_enters_is_worth_less(shift: float, kappa: float) -> None:
    """All paths of 6 steps from state 0, with rewards that may be negative, and their exact values.

    The level of 6 violating steps of 6 is the largest that there is: (1 - g^6) / (1 - g).
    """
    steps = 6
    data = ring_log([0], list(itertools.product((0, 1), repeat=steps)), shift, lure=1)
    level = horizon_level(kappa, steps, 0.9)
    config = replace(
        TABLE, chunk=1, region="horizon", cost_limit=kappa, penalty="prop1",
        ends="terminals+timeouts",
    )  # fmt: skip
    run, log = ring_run(data, config)
    starts = torch.arange(0, len(log), steps)

    def values(state: TrainState) -> tuple[Tensor, Tensor]:
        chunk = run.chunks.batch(starts, torch.zeros(len(starts), run.chunks.width))
        window = run.reward_batch(state, chunk, steps).window
        assert not window.slope.any()
        enters = (log.next_observations[:][:, 0] == Ring.unsafe).view(-1, steps)
        # The discounted number of unsafe steps, those in the absorbing state included.
        first = torch.where(enters.any(1), enters.int().argmax(1), steps)
        unsafe = 0.9 ** first.double() / 0.1 * enters.any(1)
        assert (unsafe[enters.any(1)] >= level).all()
        return window.reward[enters.any(1)], window.reward[~enters.any(1)]

    state = marked(run, log, level)
    entering, staying = values(state)
    assert len(entering) > 20
    assert entering.max() < staying.min()
    lowest, highest = shift - 1.0, shift + 5.0
    stated = (highest - lowest) * (1 - 0.9**steps) / (0.1 * level) / 0.1 - min(lowest, 0.0) / 0.1
    assert float(run.penalty(state)) == pytest.approx(stated)
    # C in place of C_bar is a tenth of it, and too little for the largest level.
    run.penalty = lambda state: 0.1 * stated  # type: ignore[method-assign]
    entering, staying = values(state)
    if kappa == 6.0:
        assert entering.max() >= staying.min()


def test_proposition_1_needs_a_level() -> None:
    with pytest.raises(ValueError, match=r"penalty must be a number or None where region is 'saf"):
        replace(TABLE, penalty="prop1", region="safety")
    data = ring_log(range(5), list(itertools.product((0, 1), repeat=2)))
    run, log = ring_run(data, replace(TABLE, chunk=2, penalty="prop1"))
    state = marked(run, log, 0.0)
    # While V_c is learned, the bound is that of one violating step.
    assert float(run.penalty(state)) == pytest.approx(float(run.penalty(marked(run, log, 1.0))))
    run.region.read_level = lambda state, log, generator: state  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"needs a level l of the region above 0.*got l = 0, the"):
        run._settle(state, torch.Generator())
    run._settle(marked(run, log, 0.5), torch.Generator())


# -- time-outs that end episodes ----------------------------------------------------------------


def test_a_time_out_that_ends_gives_the_exact_finite_value() -> None:
    """Rewards of 1 and a cost in every step of 12, then a time-out: sums of 12 terms, no V."""
    steps, discount = 12, 0.9
    place = np.tile(np.arange(float(steps + 1)), (3, 1))
    data = OfflineDataset.from_arrays(
        observations=place[:, :-1].reshape(-1, 1), next_observations=place[:, 1:].reshape(-1, 1),
        actions=np.linspace(-1, 1, 3 * steps)[:, None], rewards=np.ones(3 * steps),
        terminated=np.zeros(3 * steps, bool), truncated=np.tile(np.arange(steps) == steps - 1, 3),
        constraints=np.repeat([-1.0, 1.0, 1.0], steps),
        next_constraints=np.repeat([-1.0, 1.0, 1.0], steps),
    )  # fmt: skip
    rest = steps - np.arange(steps)
    exact = torch.tensor(np.tile((1 - discount**rest) / (1 - discount), 3), dtype=torch.float32)
    rows = torch.arange(len(data))
    for ends in ("terminals+timeouts", "terminals"):
        config = replace(TABLE, chunk=3, ends=ends)
        agent = R2PAC(config, device="cpu")
        model = agent._describe(data)
        log = LogTensors.of(data, model.scaling, agent.device)
        run = R2PACRun(model, log, config, 3)
        chunk = run.chunks.batch(rows, torch.zeros(len(rows), run.chunks.width))
        batch = run._batch(chunk, steps, log.rewards)
        costs = run._cost_batch(chunk, steps)
        draw = Draw(rows, torch.zeros(len(rows), run.chunks.width + 1), torch.zeros(len(rows), 1))
        judged = run._safety_chunk(draw, chunk)
        # For the safety values a time-out is no end, and every chunk has h logged actions.
        assert not judged.terminated.any()
        assert judged.inside.all()
        if ends == "terminals":
            assert (batch.window.slope > 0).all()
            assert not batch.terminated.any()
            # The log's own penalty supposes that rewards of 1 go on for ever.
            assert model.penalty == pytest.approx(-1.0 / (1 - discount))
            continue
        assert not batch.window.slope.any()
        torch.testing.assert_close(batch.window.reward, exact)
        assert torch.equal(batch.terminated, torch.tensor(np.tile(rest <= 3, 3)))
        values = torch.zeros(len(rows))
        for _ in range(steps):
            after = values[torch.minimum(chunk.end + 1, log.episode_last)]
            values = batch.rewards + discount**3 * torch.where(batch.terminated, 0.0, after)
        torch.testing.assert_close(values, exact)
        assert model.penalty == pytest.approx(-1.0)
        # Eq. 42 is exact here: a limit of 12 violating steps of 12 is worth what they cost.
        paid = -float(costs.window.reward[steps])
        assert paid == pytest.approx(horizon_level(steps, steps, discount))
        assert not costs.window.reward[:steps].any()


# -- violations that end episodes ---------------------------------------------------------------


def cliff_log(episodes: int = 150) -> OfflineDataset:
    """Walks on a line; beyond 1 lies the cliff, and an episode ends there, or after 12 steps."""
    rng = np.random.default_rng(0)
    rows: list[tuple[float, float, float, bool, bool]] = []
    for _ in range(episodes):
        place, held = rng.uniform(-1, 0.9), rng.uniform(-1, 1)
        for step in range(12):
            action = float(np.clip(held + rng.normal(0, 0.3), -1, 1))
            after = place + 0.3 * action
            fell = after > 1.0
            rows.append((place, action, after, fell, not fell and step == 11))
            place = after
            if fell:
                break
    place, action, after, fell, late = (np.array(column) for column in zip(*rows, strict=True))
    return OfflineDataset.from_arrays(
        observations=place[:, None], actions=action[:, None], rewards=action,
        next_observations=after[:, None], terminated=fell.astype(bool),
        truncated=late.astype(bool), costs=fell.astype(float),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fallen() -> R2PAC:
    """Trained on a log in which every violation ends its episode."""
    config = R2PACConfig(
        chunk=3, critic_hidden=(32, 32), flow_hidden=(16,), student_hidden=(16,), batch_size=128,
        cost_expectile=0.9, phase_shares=(0.96, 0.02, 0.02),
    )  # fmt: skip
    log = cliff_log()
    ends = log.episode_starts + log.episode_lengths - 1
    assert log.violating_episodes.any()
    assert not (log.next_constraints > 0)[~log.terminated].any()
    assert log.terminated[ends].sum() == log.violating_episodes.sum()
    return R2PAC(config, device="cpu").fit(log, steps=1500)


def test_chunk_critics_learn_from_violations_that_end_episodes(fallen: R2PAC) -> None:
    """Whatever the plan has after the fall: such chunks are cut, masked, and kept."""
    model, networks = fallen._fitted(), fallen._networks
    assert model.costs is not None
    critics = model.costs

    def costs(place: float, plans: list[list[float]]) -> Tensor:
        seen = torch.tensor(model.scaling.observations(np.full((len(plans), 1), place)))
        return -critics.advantages(networks, seen, torch.tensor(plans)).amin(0)

    # From 0.85 the first step of 1 leads beyond the edge at once, whatever the plan has after it.
    tails = list(itertools.product((-1.0, -0.3, 0.3, 1.0), repeat=2))
    falls = costs(0.85, [[1.0, *tail] for tail in tails])
    stays = costs(0.85, [[-1.0, *tail] for tail in tails if max(tail) <= -0.3])
    assert float(falls.min()) > float(stays.max())
    assert float(falls.std()) < 0.25 * float(falls.mean() - stays.mean())
    # Two steps ahead it is the second action that decides.
    late = costs(0.6, [[0.9, 0.9, 0.9], [0.9, -0.9, -0.9]])
    assert float(late[0]) > float(late[1])


def test_plans_are_judged_by_where_they_lead(fallen: R2PAC) -> None:
    """The same for the critic that the shield looks ahead with."""
    shield = fallen.shield()
    ahead = shield.value(np.full((2, 1), 0.85), np.array([[1.0], [-1.0]]))
    assert ahead[0] > ahead[1]
