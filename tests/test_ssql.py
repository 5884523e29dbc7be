"""Safe-Support Q-learning: fixed points and limits exactly, both extractions, no unsafe visit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tables import table_shield

from safeshield import SafeSupportPolicy, SafeSupportQLearning, SafetyShield, Shield, SSQLConfig
from safeshield.algorithms.registry import load_agent
from safeshield.cli.kinds import describe
from safeshield.data import collect
from safeshield.files.tensors import read_tensors
from safeshield.nn.mixture import Mixture, MixtureActor, draw_each, log_density
from safeshield.nn.optim import adam_init
from safeshield.online import (
    FlowTeacher,
    MaskedUniform,
    NoSafeActionError,
    OutsideSafeSetWarning,
    RefreshRefusedWarning,
    SafeRules,
    Tabular,
    UnguardedWarning,
)
from safeshield.online.losses import (
    ACTOR,
    CRITIC,
    SoftCritics,
    Support,
    Transitions,
    actor_draws,
    critic_loss,
    forward_loss,
    log_induced,
    reverse_loss_box,
    reverse_loss_choices,
)
from safeshield.online.safe_proposals import SafeBehaviour
from safeshield.policies import ShieldCallback, ShieldedPolicy
from safeshield.rollouts.policies import batch_policy
from safeshield.shield.record import CalibrationRecord, PolicyResult
from safeshield.training import checkpoint as training
from safeshield.training.state import TrainState, descend
from safeshield.values.soft import induced_log_policy, soft_value, soft_value_iteration

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning",
    "ignore::safeshield.shield.shield.OtherEnvironmentWarning",
)
Array = npt.NDArray[Any]
STATES, MOVES, G = 5, 3, 0.8


def problem(seed: int = 0) -> tuple[Array, Array, Array]:
    """Deterministic moves, rewards, and a behaviour that never does some of them."""
    rng = np.random.default_rng(seed)
    goes = rng.integers(0, STATES, (STATES, MOVES))
    rewards = rng.normal(size=(STATES, MOVES))
    mu = rng.uniform(0.1, 1.0, (STATES, MOVES))
    mu[np.arange(STATES), rng.integers(0, MOVES, STATES)] = 0.0
    return goes, rewards, mu / mu.sum(axis=1, keepdims=True)


ENDS = np.zeros((STATES, MOVES), dtype=bool)
ENDS[4, 1] = ENDS[0, 2] = True


def exact(temperature: float, seed: int = 0) -> tuple[Array, Array]:
    goes, rewards, mu = problem(seed)
    transitions = np.eye(STATES)[goes] * ~ENDS[..., None]
    return soft_value_iteration(transitions, rewards, mu, temperature=temperature, discount=G)


# -- the theory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_fixed_point_is_that_of_exact_soft_value_iteration(temperature: float) -> None:
    """By the very loss that learning descends, in double precision, to 1e-6."""
    goes, rewards, mu = problem()
    critics = SoftCritics(STATES, MOVES, 1, (), offset=0.3, spread=2.0)
    params = {k: v.double() for k, v in critics.network.init(torch.Generator()).items()}
    seen = torch.eye(STATES, dtype=torch.float64)
    s, a = (torch.tensor(x.ravel()) for x in np.indices((STATES, MOVES)))
    log_mu = torch.tensor(mu).log()
    none = torch.zeros(len(s), 0, 1, dtype=torch.float64)
    after = torch.tensor(goes.ravel())
    batch = Transitions(
        Support(seen[s], none, log_mu[s]),
        a,
        torch.tensor(rewards.ravel()),
        torch.tensor(ENDS.ravel()),
        Support(seen[after], none, log_mu[after]),
    )
    for _ in range(1000):
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        loss, _ = critic_loss(
            critics, {CRITIC: leaves}, {CRITIC: params}, batch, temperature=temperature, discount=G
        )
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        # Plain descent: Adam's steps do not shrink as the error does.
        params = {k: params[k] - slope for k, slope in zip(leaves, slopes, strict=True)}
    learned = critics.values(params, seen, none).numpy()
    q, value = exact(temperature)
    assert np.abs(learned - q).max() < 1e-6
    v = soft_value(torch.tensor(learned[0]), temperature, log_mu)
    np.testing.assert_allclose(v.numpy(), value, atol=1e-6)


@pytest.mark.parametrize("twins", ["mean", "min"])
def test_the_twins_make_one_value_as_asked(twins: str) -> None:
    """Two tables that disagree: the target is the soft value of their mean, or of the lower."""
    q = torch.tensor([[[0.0, 3.0], [1.0, 1.0]], [[2.0, -1.0], [1.0, 5.0]]])  # (member, state, move)
    critics = SoftCritics(2, 2, 1, (), 0.0, 1.0, twins)
    params = {"0.weight": q, "0.bias": torch.zeros(2, 1, 2)}
    half = torch.full((2, 2), 0.5).log()
    support = Support(torch.eye(2), torch.zeros(2, 0, 1), half)
    still = Transitions(
        support, torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2) > 0, support
    )
    _, told = critic_loss(
        critics, {CRITIC: params}, {CRITIC: params}, still, temperature=0.5, discount=G
    )
    wanted = {"mean": [[1.0, 1.0], [1.0, 3.0]], "min": [[0.0, -1.0], [1.0, 1.0]]}[twins]
    expected = soft_value(torch.tensor(wanted), 0.5, half)
    assert critics.proposed(params, support).tolist() == wanted
    assert float(told["critic/value"]) == pytest.approx(float(expected.mean()), abs=1e-6)


def test_a_large_temperature_evaluates_the_behaviour_and_a_small_one_is_the_best_inside() -> None:
    goes, rewards, mu = problem()
    transitions = np.eye(STATES)[goes] * ~ENDS[..., None]
    through = np.einsum("sa,sat->st", mu, transitions)
    own = np.linalg.solve(np.eye(STATES) - G * through, (mu * rewards).sum(axis=1))
    np.testing.assert_allclose(exact(np.inf)[1], own, atol=1e-10)
    np.testing.assert_allclose(exact(1e7)[1], own, atol=1e-5)
    best = np.zeros(STATES)
    for _ in range(300):
        best = np.where(mu > 0, rewards + G * transitions @ best, -np.inf).max(axis=1)
    np.testing.assert_allclose(exact(0.0)[1], best, atol=1e-10)
    np.testing.assert_allclose(exact(1e-4)[1], best, atol=5e-3)
    assert (np.diff([exact(a)[1] for a in (10.0, 1.0, 0.1, 0.01)], axis=0) > -1e-12).all()
    # What mu never does would have been better somewhere: its support does matter.
    anything = np.zeros(STATES)
    for _ in range(300):
        anything = (rewards + G * transitions @ anything).max(axis=1)
    assert (anything > best + 0.05).any()


@given(st.integers(0, 1000), st.floats(0.01, 100.0), st.floats(-5.0, 5.0))
@settings(max_examples=40)
def test_the_soft_value_is_what_it_says(seed: int, temperature: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    q = torch.tensor(rng.normal(size=6))
    mu = torch.tensor(rng.dirichlet(np.ones(6)))
    mu[0] = 0.0
    mu = mu / mu.sum()
    value = soft_value(q, temperature, mu.log())
    assert (mu * q).sum() - 1e-9 <= value <= q[1:].max() + 1e-9
    moved = soft_value(q + shift, temperature, mu.log())
    assert float(moved) == pytest.approx(float(value) + shift, abs=1e-8)
    # V = E_pi[Q] - a KL(pi || mu) at pi*, and no other policy does better.
    pi = induced_log_policy(q, temperature, mu.log()).exp()
    other = torch.tensor(rng.dirichlet(np.ones(5)))
    for policy, best in ((pi[1:], True), (other, False)):
        kl = (policy * (policy / mu[1:]).log()).sum()
        gained = (policy * q[1:]).sum() - temperature * kl
        assert gained <= value + 1e-8
        assert not best or float(gained) == pytest.approx(float(value), abs=1e-8)
    # An action that mu never takes may have any value, none included.
    q[0] = torch.nan
    assert soft_value(q, temperature, mu.log()) == value


@pytest.mark.parametrize("direction", [forward_loss, reverse_loss_choices])
def test_both_extractions_of_choices_recover_the_induced_policy(direction: Any) -> None:  # noqa: ANN401
    q, _ = exact(0.5)
    mu = torch.tensor(problem()[2], dtype=torch.float32)
    critics = SoftCritics(STATES, MOVES, 1, (), 0.0, 1.0)
    table = {"0.weight": torch.tensor(q, dtype=torch.float32).repeat(2, 1, 1)}
    table["0.bias"] = torch.zeros(2, 1, MOVES)
    actor = MixtureActor(STATES, MOVES, 1, (32,), 1)
    support = Support(torch.eye(STATES), torch.zeros(STATES, 0, 1), mu.log())
    target = log_induced(critics, {CRITIC: table}, support, 0.5)
    networks = {ACTOR: actor.network.init(torch.Generator().manual_seed(0))}
    state = TrainState(networks, {}, {ACTOR: adam_init(networks)}, {}, torch.zeros(0))

    def loss(online: Any) -> Any:  # noqa: ANN401
        return direction(actor, online[ACTOR], support, target)

    for rate in (0.02, 0.003):
        for _ in range(400):
            state, _ = descend(state, ACTOR, (ACTOR,), loss, {ACTOR: torch.tensor(rate)})
    learned = actor.log_prob(state.networks[ACTOR], torch.eye(STATES), support.candidates).exp()
    wanted = mu * torch.tensor(q / 0.5).float().exp()
    wanted = wanted / wanted.sum(-1, keepdim=True)
    assert (learned - wanted).abs().max() < 3e-3


def _line(params: Any = None) -> tuple[SoftCritics, dict[str, torch.Tensor]]:  # noqa: ANN401
    """Q(s, x) = x, for all s."""
    critics = SoftCritics(1, 0, 1, (), 0.0, 1.0)
    weights = torch.tensor([[0.0], [1.0]]).repeat(2, 1, 1)
    return critics, {"0.weight": weights, "0.bias": torch.zeros(2, 1, 1)}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_extractions_of_a_box_recover_the_induced_policy(direction: str) -> None:
    """mu uniform on [-1, 0.5], Q = x: pi* is exp(x / a) there, and nothing beyond."""
    temperature = 0.4
    critics, params = _line()
    actor = MixtureActor(1, 0, 1, (32,), 3)
    generator = torch.Generator().manual_seed(1)
    networks = {ACTOR: actor.network.init(generator)}
    state = TrainState(networks, {}, {ACTOR: adam_init(networks)}, {}, torch.zeros(0))
    seen, targets = torch.ones(64, 1), {CRITIC: params}

    def update(state: TrainState, rate: float) -> TrainState:
        candidates = torch.rand(64, 16, 1, generator=generator) * 1.5 - 1.0
        uniform = torch.rand(64, 3 * 4, 1, generator=generator)

        def loss(online: Any) -> Any:  # noqa: ANN401
            if direction == "forward":
                support = Support(seen, candidates, torch.full((64, 16), -np.log(16.0)))
                target = log_induced(critics, targets, support, temperature)
                return forward_loss(actor, online[ACTOR], support, target)
            with torch.no_grad():
                drawn = actor_draws(actor, online[ACTOR], seen, uniform)[..., 0]
            log_mu = torch.where(drawn <= 0.5, 0.0, -torch.inf)

            def scaled_q(actions: torch.Tensor) -> torch.Tensor:
                return critics.one(params, seen, actions) / temperature

            return reverse_loss_box(actor, online[ACTOR], scaled_q, seen, uniform, log_mu)

        state, _ = descend(state, ACTOR, (ACTOR,), loss, {ACTOR: torch.tensor(rate)})
        return state

    for rate in (0.01, 0.002):
        for _ in range(500):
            state = update(state, rate)
    grid = torch.linspace(-0.995, 0.995, 200)[None, :, None]
    density = actor.log_prob(state.networks[ACTOR], torch.ones(1, 1), grid).exp()[0].numpy()
    points = grid[0, :, 0].numpy()
    wanted = np.where(points <= 0.5, np.exp(points / temperature), 0.0)
    wanted /= wanted.mean() * 2
    beyond = density[points > 0.55].mean() * 0.45
    assert beyond < 0.06  # a smooth density cannot stop at once
    total = np.abs(density - wanted).mean() * 2 / 2  # total variation
    assert total < 0.2
    uniform = np.where(points <= 0.5, 1 / 1.5, 0.0)
    assert total < 0.5 * np.abs(uniform - wanted).mean()


def test_truncated_mixtures_are_densities_and_their_draws_follow_them() -> None:
    parts = Mixture(
        torch.tensor([[0.3, 0.7]]).log(),
        torch.tensor([[[0.9, -0.2], [-0.5, 0.4]]]),
        torch.tensor([[[0.3, 4.0], [0.1, 0.6]]]),
    )
    line = (torch.arange(200) + 0.5) / 100 - 1
    grid = torch.cartesian_prod(line, line)[None]
    density = log_density(parts, grid).exp()
    assert float(density.mean() * 4) == pytest.approx(1.0, abs=2e-3)
    uniform = torch.rand(4000, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = draw_each(Mixture(*(p.expand(4000, *p.shape[1:]) for p in parts)), uniform)
    assert drawn.abs().max() <= 1
    mean = (parts.log_weights.exp()[0, :, None] * drawn.mean(0)).sum(0)
    expected = (density[0, :, None] * grid[0]).mean(0) * 4
    assert (mean - expected).abs().max() < 0.02


# -- worlds with holes ----------------------------------------------------------------------------

LAKE = ["SFFF", "FFHF", "FFFF", "HFFG"]
AROUND = ((0, -1), (1, 0), (0, 1), (-1, 0))  # left, down, right, up


def lake(slippery: bool = False) -> gym.Env[Any, Any]:
    env = gym.make("FrozenLake-v1", desc=LAKE, is_slippery=slippery, max_episode_steps=40)
    return HoleCosts(env)


class HoleCosts(gym.Wrapper):
    """A hole is a violation."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        cell, reward, terminated, truncated, info = self.env.step(action)
        fell = "".join(LAKE)[cell] == "H"
        return cell, reward, terminated, truncated, {**info, "cost": float(fell)}


def dry(cell: int, move: int) -> bool:
    """The few lines of rules: no step into a hole."""
    row, column = divmod(int(cell), 4)
    row = min(max(row + AROUND[move][0], 0), 3)
    column = min(max(column + AROUND[move][1], 0), 3)
    return LAKE[row][column] != "H"


FAST = SSQLConfig(
    temperature=0.01, learning_rate=0.03, polyak=0.05, learning_starts=600, batch_size=64,
    extraction_steps=100, actor_hidden=(32,),
)  # fmt: skip


def rules(env: gym.Env[Any, Any]) -> SafeRules:
    return SafeRules(dry, env.action_space)


def played(agent: Any, env: gym.Env[Any, Any]) -> tuple[float, float]:  # noqa: ANN401
    cell, _ = env.reset(seed=1)
    total = cost = 0.0
    for _ in range(40):
        action, _ = agent.predict(cell, deterministic=True)
        cell, reward, terminated, truncated, info = env.step(int(action))
        total, cost = total + float(reward), cost + info["cost"]
        if terminated or truncated:
            break
    return total, cost


@pytest.mark.parametrize("given", ["rules", "masked", "function", "tabular", "policy"])
def test_it_learns_from_every_kind_of_behaviour_and_never_falls(given: str) -> None:
    env = lake()
    safe = rules(env)
    behaviour: Any = safe
    if given == "masked":
        behaviour = MaskedUniform(safe)
    elif given == "function":  # no density, and its support is not inside
        behaviour = batch_policy(lambda o, rng: rng.integers(0, 4, len(o)))
    elif given == "tabular":
        table = np.array([[dry(c, m) for m in range(4)] for c in range(16)], float)
        behaviour = Tabular(
            table / table.sum(1, keepdims=True), env.observation_space, env.action_space
        )
    elif given == "policy":
        q = np.array([[-1.0 if dry(c, m) else 1.0 for m in range(4)] for c in range(16)])
        behaviour = SafeSupportPolicy(table_shield(q, env.action_space), "uniform", seed=0)
    agent = SafeSupportQLearning(env, behaviour, FAST, safe=None if given == "policy" else safe)
    if given == "function":
        with pytest.warns(OutsideSafeSetWarning, match="support is not inside the safe set"):
            agent.learn(1500)
        assert agent.tally.proposed_outside > 10
    else:
        agent.learn(1500)
        assert agent.tally.proposed_outside == 0
    tally = agent.tally
    assert tally.labelled
    assert (tally.unsafe_steps, tally.unsafe_episodes) == (0, 0)
    assert tally.steps == 1500
    assert played(agent, env) == (1.0, 0.0)
    # An unguarded walker would have fallen: the zero above says something.
    falls = collect(lake(), "random", episodes=20, seed=0)
    assert (falls.costs > 0).sum() > 5


def test_values_have_the_scale_of_rewards_that_the_warm_up_did_not_see() -> None:
    env = lake()
    config = replace(FAST, learning_starts=20)
    agent = SafeSupportQLearning(env, rules(env), config).learn(3000)
    assert agent._fitted().critics.spread == 1.0
    # Six moves lead to the goal, which is worth 0.95, and each costs at most 0.01 ln 4 nats.
    assert 0.86 < float(agent.value(0)) < 0.951


def test_a_refreshed_collector_stays_inside_and_collects_better() -> None:
    returns = []
    for every in (None, 200):
        config = SSQLConfig(**{**vars(FAST), "refresh_every": every, "refresh_share": 0.9})
        env = lake()
        agent = SafeSupportQLearning(env, rules(env), config).learn(2000)
        assert agent.tally.unsafe_steps == 0
        assert agent.tally.proposed_outside == 0
        returns.append(agent.tally.episodes)
    assert returns[1] > 1.5 * returns[0]  # it reaches the goal sooner


def test_what_was_executed_is_stored_and_truncation_does_not_cut_the_bootstrap() -> None:
    class Loop(gym.Env[Any, Any]):
        """Reward 1 for ever, whatever one does; episodes of 5 steps are cut off, not over."""

        observation_space = gym.spaces.Discrete(2)
        action_space = gym.spaces.Discrete(3)
        done: list[int]

        def __init__(self, over: bool) -> None:
            self.over, self.done = over, []

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:  # noqa: ANN401
            super().reset(seed=seed)
            self.t = 0
            return 0, {}

        def step(self, action: Any) -> Any:  # noqa: ANN401
            self.done.append(int(action))
            self.t += 1
            end = self.t == 5
            return self.t % 2, 1.0, end and self.over, end and not self.over, {"cost": 0.0}

    config = SSQLConfig(**{**vars(FAST), "discount": 0.9, "extraction_steps": 0})
    values = {}
    for over in (False, True):
        env = Loop(over)
        safe = SafeRules(lambda cell, move: move != 2, env.action_space)
        uniform = Tabular(np.full((2, 3), 1 / 3), env.observation_space, env.action_space)
        agent = SafeSupportQLearning(env, uniform, config, safe=safe)
        with pytest.warns(OutsideSafeSetWarning):
            agent.learn(2200)
        assert 2 not in env.done
        assert agent._replay is not None
        np.testing.assert_array_equal(agent._replay.column("actions"), env.done)
        values[over] = float(agent.value(0))
    assert values[False] == pytest.approx(10.0, abs=0.3)
    assert values[True] < 5.0


# -- a box of actions -----------------------------------------------------------------------------


class Push(gym.Env[Any, Any]):
    """A point on a line that must stay below 1; going right pays; 30 steps."""

    observation_space = gym.spaces.Box(-3.0, 3.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.uniform(-0.8, 0.8)), 0
        return self._see(), {"constraint": self.x - 1.0}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.x = max(self.x + 0.2 * float(action[0]), -2.0)
        self.t += 1
        return self._see(), self.x, False, self.t == 30, {"constraint": self.x - 1.0}

    def _see(self) -> Array:
        return np.array([self.x], np.float32)


def below(observation: Array, action: Array) -> bool:
    return bool(observation[0] + 0.2 * np.clip(action[0], -1, 1) <= 0.999)


def pushed(agent: Any, episodes: int = 5) -> float:  # noqa: ANN401
    env, totals = Push(), []
    for seed in range(episodes):
        x, _ = env.reset(seed=seed)
        total, truncated = 0.0, False
        while not truncated:
            x, reward, _, truncated, info = env.step(agent.predict(x, deterministic=True)[0])
            total += reward
            assert info["constraint"] <= 0 or agent.config.policy == "parametric"
        totals.append(total)
    return float(np.mean(totals))


@pytest.mark.parametrize("extraction", ["reverse", "forward"])
def test_it_learns_in_a_box_and_never_leaves(extraction: str, tmp_path: Path) -> None:
    config = SSQLConfig(
        temperature=0.05, discount=0.9, learning_rate=3e-3, learning_starts=300, batch_size=64,
        critic_hidden=(32,), actor_hidden=(32,), extraction=extraction, extraction_steps=400,
        components=2,
    )  # fmt: skip
    env = Push()
    agent = SafeSupportQLearning(env, SafeRules(below, env.action_space), config).learn(1000)
    assert agent.tally.unsafe_steps == 0
    assert agent.tally.labelled
    best = pushed(agent)
    assert best > 22.0  # at the edge all the time would be 28, and uniform proposals end at -20
    # The parametric policy needs no behaviour, and survives in a file.
    agent.save(tmp_path / "agent.safetensors")
    alone = SafeSupportQLearning.load(tmp_path / "agent.safetensors")
    assert isinstance(load_agent(tmp_path / "agent.safetensors"), SafeSupportQLearning)
    assert describe(tmp_path / "agent.safetensors")["algorithm"] == "SafeSupportQLearning"
    middle = np.array([[0.0], [-1.0]], np.float32)
    assert (alone.predict(middle, deterministic=True)[0] > 0.3).all()
    assert (alone.predict(np.repeat(middle, 50, 0))[0].std() > 0.0).all()
    with pytest.raises(RuntimeError, match="this agent has no behaviour"):
        alone.value(middle)
    again = SafeSupportQLearning.load(
        tmp_path / "agent.safetensors", SafeRules(below, env.action_space)
    )
    np.testing.assert_array_equal(
        again.predict(middle, deterministic=True)[0], agent.predict(middle, deterministic=True)[0]
    )
    with pytest.raises(ValueError, match=r"SafeSupportQLearning\.load reads it"):
        Shield.load(tmp_path / "agent.safetensors")


def test_from_a_log_with_a_behaviour_and_with_its_clone(tmp_path: Path) -> None:
    env = Push()
    safe = SafeRules(below, env.action_space)
    masked = MaskedUniform(safe)
    acting = batch_policy(lambda o, rng: masked.draw(o, 1, rng)[:, 0])
    log = collect(env, acting, episodes=30, seed=0)
    config = SSQLConfig(
        temperature=0.05, discount=0.9, learning_rate=3e-3, batch_size=64, polyak=0.05,
        critic_hidden=(32,),
        actor_hidden=(32,), extraction_steps=300, components=2,
    )  # fmt: skip
    for behaviour in (masked, None):
        checkpoint = tmp_path / f"{behaviour is None}.safetensors"
        agent = SafeSupportQLearning(config=config)
        agent.fit(log, behaviour, steps=600, checkpoint=checkpoint)
        assert (agent.predict(np.array([[0.0]], np.float32), deterministic=True)[0] > 0.5).all()
        assert float(agent.value(np.array([0.0], np.float32))) > 2.0
    agent.save(tmp_path / "cloned.safetensors")
    again = SafeSupportQLearning.load(tmp_path / "cloned.safetensors")
    seen = np.array([[0.5], [-0.5]], np.float32)
    np.testing.assert_array_equal(agent.value(seen), again.value(seen))  # the clone is in the file
    other = SafeSupportQLearning(config=SSQLConfig(**{**vars(config), "temperature": 0.1}))
    with pytest.raises(ValueError, match="belongs to another"):
        other.fit(log, masked, steps=600, checkpoint=checkpoint)


def test_a_fit_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stage one, in the clone's phase and in the actor's: the same weights in the end."""
    env = Push()
    masked = MaskedUniform(SafeRules(below, env.action_space))
    acting = batch_policy(lambda o, rng: masked.draw(o, 1, rng)[:, 0])
    log = collect(env, acting, episodes=10, seed=0)
    config = SSQLConfig(
        temperature=0.05, batch_size=16, critic_hidden=(8,), actor_hidden=(8,),
        extraction_steps=30, extraction="reverse", components=2,
    )  # fmt: skip
    whole = SafeSupportQLearning(config=config).fit(log, masked, steps=20)._state
    assert whole is not None
    path, save = tmp_path / "checkpoint", training.save_checkpoint

    class PowerCut(Exception):
        pass

    stops = [13, 25, 41]

    def saving(*arguments: Any) -> None:  # noqa: ANN401
        save(*arguments)
        if stops and arguments[2] == stops[0]:
            raise PowerCut

    monkeypatch.setattr(training, "save_checkpoint", saving)
    for phase in ("critics", "clone", "actor"):
        with pytest.raises(PowerCut):
            SafeSupportQLearning(config=config).fit(
                log, masked, steps=20, checkpoint=path, checkpoint_every=1
            )
        assert read_tensors(path, "safeshield-checkpoint").header["phase"] == phase
        stops.pop(0)
    again = SafeSupportQLearning(config=config).fit(log, masked, steps=20, checkpoint=path)._state
    assert again is not None
    for name, params in whole.networks.items():
        for key, tensor in params.items():
            assert torch.equal(tensor, again.networks[name][key]), (name, key)


def test_a_cloned_classifier_knows_the_logs_probabilities() -> None:
    env = lake()
    log = collect(env, batch_policy(lambda o, rng: rng.choice([1, 2], len(o))), 40, seed=0)
    agent = SafeSupportQLearning(config=FAST).fit(log, steps=200)
    drawn = np.unique([agent.predict(0)[0] for _ in range(30)])
    assert set(drawn) <= {1, 2}


def test_the_flow_teacher_is_judged_by_the_shield_it_comes_from(agent: Any) -> None:  # noqa: ANN401
    shield = agent.shield().with_delta(0.02)
    env = gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=100)
    config = SSQLConfig(
        learning_starts=100, batch_size=32, samples=4, critic_hidden=(16,), extraction_steps=30,
        actor_hidden=(16,),
    )  # fmt: skip
    learner = SafeSupportQLearning(SafetyShield(env, shield), FlowTeacher(shield), config)
    callback = ShieldCallback()
    learner.learn(250, callback)
    assert callback.steps == learner.num_timesteps == 250
    assert callback.interventions == 0  # it never had to: the collector had asked the same shield
    assert learner._replay is not None
    stored, states = learner._replay.column("actions"), learner._replay.column("observations")
    accepted = np.asarray(shield.value(states, stored) <= shield.threshold)
    assert (~accepted).sum() == learner.tally.nothing_admitted < 100
    # Without a shield around the environment the teacher's own judges; and what it makes of the
    # flow, which has no density, is extracted too.
    for behaviour in (FlowTeacher(shield), SafeSupportPolicy(shield, "behaviour", seed=0)):
        alone = SafeSupportQLearning(env, behaviour, config).learn(150)
        assert alone.safe_set.shield is shield
        assert alone.diagnostics()["parametric_policy"]
    guarded = ShieldedPolicy(learner, shield)
    assert guarded.predict(states[:5])[0].shape == (5, 2)


# -- the manner of Stable-Baselines3 --------------------------------------------------------------


def test_callbacks_tensorboard_and_going_on(tmp_path: Path) -> None:
    env = lake()
    agent = SafeSupportQLearning(
        env, rules(env), FAST, tensorboard_log=tmp_path / "board", device="cpu"
    )
    calls: list[int] = []

    def stop(_locals: Any, _globals: Any) -> bool:  # noqa: ANN401
        calls.append(agent.num_timesteps)
        return agent.num_timesteps < 900

    agent.learn(2000, lambda _locals, _globals: agent.num_timesteps < 100)
    with pytest.raises(RuntimeError, match="has not learned yet"):
        agent.predict(0)
    agent.learn(2000, stop, progress_bar=True)
    assert agent.num_timesteps == 900
    assert agent._state is not None
    assert agent._state.moments[ACTOR].updates == FAST.extraction_steps
    evaluated = EvalCallback(lake(), n_eval_episodes=1, eval_freq=200, verbose=0, warn=False)
    agent.learn(600, [evaluated], reset_num_timesteps=False)
    assert agent.num_timesteps == 1500
    assert evaluated.last_mean_reward == 1.0
    assert agent._state.moments[ACTOR].updates == FAST.extraction_steps  # stage two begins anew
    assert list((tmp_path / "board").rglob("events.*"))


def test_the_same_seed_learns_the_same() -> None:
    def learned() -> Array:
        env = lake()
        agent = SafeSupportQLearning(env, rules(env), FAST, device="cpu").learn(800)
        return np.asarray(agent.value(np.arange(16)))

    np.testing.assert_array_equal(learned(), learned())


def calibrated(shield: Shield) -> Shield:
    results = (PolicyResult("random", 662, 0, 0.007, 0.0),)
    record = CalibrationRecord(
        delta=shield.delta, epsilon=0.1, confidence=0.9, policies=results, environment="",
        start_distribution="its own", start_share=1.0, walk=(), seed=0, date="", versions={},
    )  # fmt: skip
    return replace(shield, record=record)


def test_a_refresh_is_tested_on_a_budget_and_refused_where_the_test_fails() -> None:
    good = np.array([[-1.0 if dry(c, m) else 1.0 for m in range(4)] for c in range(16)])
    blind = np.full_like(good, -1.0)
    blind[5] = 1.0
    tested = {}
    for name, q in (("good", good), ("blind", blind)):
        shield = calibrated(table_shield(q, lake().action_space))
        config = SSQLConfig(**{**vars(FAST), "refresh_every": 300, "recalibration_episodes": 40})
        env = lake()
        behaviour = rules(env) if name == "blind" else MaskedUniform(shield)
        agent = SafeSupportQLearning(
            env, behaviour, config, safe=shield, calibration_env=lake(slippery=name == "blind")
        )
        with pytest.warns(RefreshRefusedWarning):
            agent.learn(950)
        tested[name] = agent
        assert 0 < agent.recalibration_spent <= 40
        assert agent.tally.unsafe_steps == 0
    assert tested["good"]._collector.choose is not None
    assert tested["good"].safe_set.shield.record.policies[0].policy.startswith("SSQL's collector")
    assert tested["blind"]._collector.choose is None  # its simulator slips into holes


# -- what is wrong --------------------------------------------------------------------------------


def test_a_behaviour_outside_is_counted_told_and_never_executed() -> None:
    env = lake()
    falls = np.zeros((16, 4))
    falls[:, 2] = 1.0  # right, always: into the hole beside cell 5
    always = Tabular(falls, env.observation_space, env.action_space)
    mu = SafeBehaviour(always, rules(env), rules(env).actions)
    got = mu.propose(np.array([5, 0]), 1, np.random.default_rng(0))
    assert got.outside.tolist() == [True, False]
    assert got.mass_outside.tolist() == [1.0, 0.0]
    assert dry(5, int(got.executed[0, 0]))
    assert got.executed[1, 0] == 2
    assert np.exp(got.log_mu).sum(1) == pytest.approx(1.0)
    assert got.log_mu[0, 2] == -np.inf


def test_rules_that_admit_nothing_stop_it() -> None:
    env = lake()
    trap = SafeRules(lambda cell, move: cell == 0, env.action_space)
    with pytest.raises(NoSafeActionError, match="admit none of 4 actions in the state"):
        SafeSupportQLearning(env, trap, FAST).learn(1500)


def test_a_shield_that_accepts_nothing_executes_its_least_bad_action_and_says_so() -> None:
    env = lake()
    shield = table_shield(np.array([[2.0, 0.5, 1.0, 3.0]] * 16), env.action_space)
    agent = SafeSupportQLearning(env, MaskedUniform(shield), FAST).learn(700)
    assert agent.tally.nothing_admitted == 700
    assert agent._replay is not None
    assert set(agent._replay.column("actions")) == {1}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be a finite number, got inf"),
        ({"discount": 1.0}, "discount must lie between 0 and 1, got 1.0"),
        ({"samples": 0}, "samples must be above 0, got 0"),
        ({"extraction": "both"}, "extraction must be 'auto' or 'reverse' or 'forward'"),
        ({"critic_hidden": (0,)}, "critic_hidden must be a tuple of whole numbers"),
        ({"refresh_every": 0}, "refresh_every must be above 0, got 0"),
        ({"refresh_share": 1.5}, r"refresh_share must lie in \[0, 1\], got 1.5"),
        ({"recalibration_episodes": 5}, "recalibration_episodes needs refresh_every"),
        ({"policy": "parametric", "extraction_steps": 0}, "needs extraction_steps of at least 1"),
    ],
)
def test_wrong_settings(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SSQLConfig(**change)


def test_wrong_arguments() -> None:
    env = lake()
    safe = rules(env)
    with pytest.raises(TypeError, match="behaviour must be given"):
        SafeSupportQLearning(env)
    with pytest.raises(TypeError, match="behaviour must be a Behaviour"):
        SafeSupportQLearning(env, 3)
    with pytest.raises(TypeError, match="env must be a Gymnasium environment"):
        SafeSupportQLearning("lake", safe)
    with pytest.raises(TypeError, match="config must be a SSQLConfig, got dict"):
        SafeSupportQLearning(env, safe, {})
    with pytest.raises(ValueError, match="the rules are for"):
        SafeSupportQLearning(env, safe, safe=SafeRules(dry, gym.spaces.Discrete(3)))
    config = SSQLConfig(refresh_every=9, recalibration_episodes=5)
    with pytest.raises(ValueError, match="needs a calibrated shield"):
        SafeSupportQLearning(env, safe, config)
    agent = SafeSupportQLearning(env, safe, FAST)
    with pytest.raises(ValueError, match=r"must be above learning_starts \(600\), got 600"):
        agent.learn(600)
    with pytest.raises(RuntimeError, match="has not learned yet"):
        agent.predict(0)
    with pytest.raises(TypeError, match="dataset must be an OfflineDataset"):
        agent.fit([])
    with pytest.raises(TypeError, match="safe must be a function"):
        SafeRules([True], env.action_space)
    with pytest.raises(ValueError, match="needs an environment"):
        SafeSupportQLearning(config=FAST).learn(700)
    box = gym.spaces.Box(-np.inf, np.inf, (1,))
    env = gym.wrappers.TimeLimit(Push(), 5)
    env.action_space = box
    with pytest.raises(ValueError, match="action_space must be bounded"):
        SafeSupportQLearning(env, SafeRules(below, box))


class Odd:
    """A behaviour over four moves whose density is whatever it is told."""

    def __init__(self, log_prob: Any, drawn: Any = None) -> None:  # noqa: ANN401
        self.told, self.drawn = log_prob, drawn

    def draw(self, observations: Any, each: int, rng: Any, /) -> Array:  # noqa: ANN401
        return np.asarray(self.drawn)

    def log_prob(self, observations: Any, candidates: Array, /) -> Array | None:  # noqa: ANN401
        if self.told is None:
            return None
        return np.broadcast_to(np.asarray(self.told, float), candidates.shape[:2])


@pytest.mark.parametrize(
    ("behaviour", "match"),
    [
        (Odd(np.log([0.5, 0.2, 0.2, 0.2])), r"must sum to 1 in every state, got 1\.(1|09)"),
        (Odd([np.nan, 0.0, -np.inf, -np.inf]), "must be below infinity, got nan"),
        (Odd([-np.inf] * 4), "must sum to 1 in every state, got 0.0"),
        (Odd(None, np.zeros((1, 3))), r"must draw actions of shape \(1, 16, 1\)"),
        (Odd(None, np.full((1, 16, 1), 7)), r"must draw actions of Discrete\(4\), got \[7\]"),
        (Odd(None, np.full((1, 16, 1), np.nan)), r"must draw actions of Discrete\(4\), got \[nan"),
    ],
)
def test_behaviours_that_are_none(behaviour: Any, match: str) -> None:  # noqa: ANN401
    env = lake()
    with pytest.raises(ValueError, match=match):
        SafeSupportQLearning(env, behaviour, FAST, safe=rules(env)).learn(700)


def test_a_table_must_hold_probabilities() -> None:
    two = gym.spaces.Discrete(2)
    for table, match in (
        ([[0.5, 0.5]], r"must have shape \(2, 2\)"),
        ([[0.5, 0.5], [0.9, 0.2]], "sum to 1 in every row; row 1"),
        ([[1.5, -0.5], [0.5, 0.5]], "sum to 1 in every row; row 0"),
        ([[0.5, np.nan], [0.5, 0.5]], "sum to 1 in every row; row 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Tabular(table, two, two)


def test_what_cannot_be_read_is_neither_learned_from_nor_passed() -> None:
    env = Push()

    class Blinks(gym.Wrapper):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            x, *rest = self.env.step(action)
            return np.full_like(x, np.nan) if self.unwrapped.t == 7 else x, *rest

    config = SSQLConfig(learning_starts=50, batch_size=16, critic_hidden=(8,), extraction_steps=0)
    anything = batch_policy(lambda x, rng: rng.uniform(-1.0, 1.0, (len(x), 1)))
    with pytest.warns(UnguardedWarning, match="no safe set is known"):
        agent = SafeSupportQLearning(Blinks(env), anything, config)
    agent.learn(120)
    assert agent.tally.unreadable == 8  # into and out of the dark, four times
    assert np.isfinite(agent.value(np.zeros(1, np.float32)))
    with pytest.raises(ValueError, match="observation must be finite"):
        agent.predict(np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="observation must be finite"):
        agent.value(np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="at least one observation, got an empty batch"):
        agent.predict(np.zeros((0, 1), np.float32))
    # Rules are not asked about what is not a number: how they compare would decide.
    asked: list[float] = []

    def told(x: Array, a: Array) -> bool:
        asked.append(float(x[0]))
        return True

    always = SafeRules(told, env.action_space)
    with pytest.raises(NoSafeActionError, match=r"rules cannot be evaluated in .*not finite"):
        SafeSupportQLearning(Blinks(Push()), always, config).learn(120)
    assert np.isfinite(asked).all()
    assert 0.0 not in asked  # nor about a state that was made up in its place

    class Bankrupt(gym.Wrapper):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            x, _, *rest = self.env.step(action)
            return x, float("nan"), *rest

    with pytest.raises(ValueError, match="reward that is not finite"):
        SafeSupportQLearning(Bankrupt(env), always, config).learn(120)


# -- what a reader broke --------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [0.5, -0.5, np.nan, "no", 2, None, np.array([True])])
def test_rules_answer_true_or_false(answer: Any) -> None:  # noqa: ANN401
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(-1.0, 1.0, (1,))):
        safe = SafeRules(lambda x, a: answer, space)
        with pytest.raises(TypeError, match="must be True or False, got"):
            safe.admits(np.array([0]), np.zeros((1, 1, 1), np.float32))
    one = gym.spaces.Discrete(1)
    masks = SafeRules.of_masks(lambda x: [answer if np.ndim(answer) == 0 else 0.5], one)
    with pytest.raises(TypeError, match="the mask's entries must be True or False"):
        masks.admits(np.array([0]), np.zeros((1, 1, 1), np.float32))


def test_rules_may_write_into_what_they_are_given() -> None:
    box = gym.spaces.Box(-1.0, 1.0, (2,))
    seen, actions = np.ones((2, 2), np.float32), np.full((2, 3, 2), 0.5, np.float32)

    def careless(x: Array, a: Array) -> bool:
        x -= 1.0
        a *= 0.1
        return bool(np.abs(x).max() == 0.0)

    assert SafeRules(careless, box).admits(seen, actions).all()  # each time of the same state
    assert (seen == 1.0).all()
    assert (actions == 0.5).all()
    masked = SafeRules.of_masks(lambda x: np.array([1, 0], np.int8), gym.spaces.Discrete(2))
    assert masked.admits(np.array([0]), np.array([[[0.0], [1.0]]])).tolist() == [[True, False]]


def test_boxes_of_whole_numbers_are_refused() -> None:
    space = gym.spaces.Box(0, 5, (1,), np.int64)
    env = Push()
    env.action_space = space
    with pytest.raises(TypeError, match="must be of floating-point numbers"):
        SafeSupportQLearning(env, SafeRules(lambda x, a: True, space), FAST)


def test_an_action_that_a_shield_replaced_is_counted_and_one_changed_on_the_way_refused() -> None:
    env = lake()
    shield = table_shield(
        np.array([[-1.0 if dry(c, m) else 1.0 for m in range(4)] for c in range(16)]),
        env.action_space,
    )
    anything = SafeRules(lambda cell, move: True, env.action_space)
    uniform = Tabular(np.full((16, 4), 0.25), env.observation_space, env.action_space)
    agent = SafeSupportQLearning(SafetyShield(env, shield), uniform, FAST, safe=anything)
    with pytest.warns(OutsideSafeSetWarning, match="judges differently from `safe`"):
        agent.learn(650)
    assert agent.tally.replaced > 20
    assert agent.tally.unsafe_steps == 0
    assert agent._replay is not None
    cells = agent._replay.column("observations")[:, 0].astype(int)
    taken = agent._replay.column("actions")
    assert all(dry(c, m) for c, m in zip(cells, taken, strict=True))  # as executed

    class Shifted(gym.ActionWrapper):
        def action(self, action: Any) -> Any:  # noqa: ANN401
            return (action + 1) % 4

    wrapped = Shifted(SafetyShield(lake(), shield))
    with pytest.raises(ValueError, match="a wrapper around the shield changes actions"):
        SafeSupportQLearning(wrapped, MaskedUniform(shield), FAST).learn(650)


def test_callbacks_may_ask_in_the_warm_up(tmp_path: Path) -> None:
    env = lake()
    agent = SafeSupportQLearning(env, rules(env), FAST)
    judged = EvalCallback(Monitor(lake()), n_eval_episodes=3, eval_freq=200, verbose=0)
    kept = CheckpointCallback(200, str(tmp_path), "agent")
    with pytest.warns(UserWarning, match="nothing has been learned in 200 steps of warm-up"):
        agent.learn(1000, [judged, kept])
    assert np.isfinite(judged.last_mean_reward)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["agent_1000_steps.zip", "agent_800_steps.zip"]
    # The network of stage two is asked for before it is there: the induced policy acts.
    config = SSQLConfig(**{**vars(FAST), "policy": "parametric"})
    before = EvalCallback(Monitor(lake()), n_eval_episodes=1, eval_freq=650, verbose=0)
    agent = SafeSupportQLearning(env, rules(env), config)
    tally = agent.tally
    agent.learn(700, before)
    assert np.isfinite(before.last_mean_reward)
    assert (tally.steps, agent.tally.steps) == (0, 700)


def test_a_density_is_looked_at_before_anything_is_collected() -> None:
    class Told:
        def __init__(self, value: float) -> None:
            self.value = value

        def draw(self, observations: Any, each: int, rng: Any, /) -> Array:  # noqa: ANN401
            return rng.uniform(-1.0, 1.0, (len(observations), each, 1)).astype(np.float32)

        def log_prob(self, observations: Any, candidates: Array, /) -> Array:  # noqa: ANN401
            return np.full(candidates.shape[:2], self.value)

    env = Push()
    safe = SafeRules(lambda x, a: True, env.action_space)
    for value, match in (
        (np.nan, "must be below infinity, got nan"),
        (np.inf, "must be below infinity, got inf"),
        (-np.inf, "log_prob is minus infinity for all of its own draws"),
    ):
        agent = SafeSupportQLearning(env, Told(value), FAST, safe=safe)
        with pytest.raises(ValueError, match=match):
            agent.learn(700)
        assert agent.tally.steps == 0


def test_spaces_and_settings_that_do_not_fit_are_told_at_once(tmp_path: Path) -> None:
    env = lake()
    small, moves = gym.spaces.Discrete(9), env.action_space
    with pytest.raises(ValueError, match=r"observation_space is Discrete\(9\), the environment's"):
        SafeSupportQLearning(
            env, Tabular(np.full((9, 4), 0.25), small, moves), FAST, safe=rules(env)
        )
    with pytest.raises(ValueError, match="calibration_env is for tests of refreshed collectors"):
        SafeSupportQLearning(env, rules(env), FAST, calibration_env=lake())
    shield = calibrated(table_shield(np.full((16, 4), -1.0), moves))
    tests = SSQLConfig(**{**vars(FAST), "refresh_every": 300, "recalibration_episodes": 40})
    with pytest.raises(ValueError, match="shield"):
        SafeSupportQLearning(
            env, MaskedUniform(shield), tests, calibration_env=SafetyShield(lake(), shield)
        )
    with pytest.raises(ValueError, match="calibration_env's observation_space is"):
        SafeSupportQLearning(env, MaskedUniform(shield), tests, calibration_env=Push())
    pushed = Push()
    normalised = VecNormalize(DummyVecEnv([lambda: pushed]))
    with pytest.raises(ValueError, match="VecNormalize changes the observations"):
        SafeSupportQLearning(normalised, SafeRules(below, pushed.action_space), FAST)

    agent = SafeSupportQLearning(env, rules(env), FAST).learn(700)
    agent.save(tmp_path / "agent.safetensors")
    with pytest.raises(ValueError, match="the rules are for"):
        SafeSupportQLearning.load(
            tmp_path / "agent.safetensors", SafeRules(dry, gym.spaces.Discrete(3))
        )
    anything = batch_policy(lambda o, rng: rng.integers(0, 4, len(o)))
    for behaviour in (anything, None):
        with pytest.warns(UnguardedWarning, match="learned inside a safe set, and none is given"):
            SafeSupportQLearning.load(tmp_path / "agent.safetensors", behaviour)


def test_rules_of_a_box_are_not_asked_in_stage_two() -> None:
    asked = []
    for steps in (1, 60):
        env, calls = Push(), [0]

        def counted(x: Array, a: Array, calls: list[int] = calls) -> bool:
            calls[0] += 1
            return below(x, a)

        config = SSQLConfig(
            learning_starts=50, batch_size=16, critic_hidden=(8,), extraction_steps=steps
        )
        SafeSupportQLearning(env, SafeRules(counted, env.action_space), config).learn(60)
        asked.append(calls[0])
    assert asked[0] == asked[1] > 0


def test_costs_that_are_no_number_are_named() -> None:
    class Strange(gym.Wrapper):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            *rest, info = self.env.step(action)
            return *rest, {**info, "cost": None}

    env = Strange(lake())
    with pytest.raises(ValueError, match=r"info\['cost'\] must be one number, got None"):
        SafeSupportQLearning(env, rules(env), FAST).learn(700)


def test_a_log_with_falls_is_learned_from_where_rules_admit_something() -> None:
    log = collect(lake(), "random", episodes=60, seed=3)
    assert (log.costs > 0).any()
    env = lake()
    # Lost one step before a hole already: nothing is admitted in the cells 6, 9 and 14 or so.
    strict = SafeRules(lambda cell, move: cell not in (6, 9) and dry(cell, move), env.action_space)
    config = SSQLConfig(**{**vars(FAST), "extraction_steps": 0})
    with pytest.warns(OutsideSafeSetWarning, match="in states where the rules admit no action"):
        agent = SafeSupportQLearning(config=config).fit(log, strict, steps=50)
    assert agent._replay is not None
    met = agent._replay.column("observations")[:, 0]
    assert len(met) < len(log)
    assert not np.isin(met, (6, 9)).any()
    nowhere = SafeRules(lambda cell, move: False, env.action_space)
    with pytest.raises(ValueError, match="admit no action in any state of the log"):
        SafeSupportQLearning(config=config).fit(log, nowhere, steps=50)


def test_a_parametric_policy_keeps_to_the_safe_set_at_hand(tmp_path: Path) -> None:
    """A network that has learned nothing of the rules: what they refuse is replaced."""
    env = lake()
    config = SSQLConfig(**{**vars(FAST), "extraction_steps": 1, "policy": "parametric"})
    agent = SafeSupportQLearning(env, rules(env), config).learn(700)
    cells = np.repeat([c for c in range(16) if LAKE[c // 4][c % 4] == "F"], 30)
    moves, _ = agent.predict(cells)
    assert all(dry(c, m) for c, m in zip(cells, moves, strict=True))
    agent.save(tmp_path / "agent.safetensors")
    alone = SafeSupportQLearning.load(tmp_path / "agent.safetensors")
    moves, _ = alone.predict(cells)
    assert not all(dry(c, m) for c, m in zip(cells, moves, strict=True))
