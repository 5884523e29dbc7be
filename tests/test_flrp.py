"""FLRP: its flows' exact densities, what its losses aim at, the agent, and the shield it makes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap
from zuko.flows import RealNVP

from safeshield import OfflineDataset, Shield, collect
from safeshield.algorithms.flrp.agent import FLRP, FLRPConfig
from safeshield.algorithms.flrp.losses import FLRPRun, generative_loss, refiner_loss
from safeshield.algorithms.flrp.shift import BaseShift, ShiftSummary, base_shift
from safeshield.algorithms.registry import load_agent
from safeshield.cli.kinds import describe
from safeshield.nn.actor import Widths, from_header, to_header
from safeshield.nn.coupling import CouplingFlow
from safeshield.nn.latent_actor import (
    EXPERTS,
    ORDERS,
    POSTERIOR,
    PRIOR,
    LatentPolicy,
    LatentSpec,
    expert_order,
)
from safeshield.nn.mlp import like, tensors
from safeshield.nn.optim import adam, adam_init
from safeshield.training.callbacks import TrainingCallback, TrainingStep
from safeshield.training.log import LogTensors
from safeshield.training.schedule import learning_rate
from safeshield.training.state import Draw

TINY = FLRPConfig(
    critic_hidden=(8,),
    flow_hidden=(8,),
    transforms=2,
    batch_size=16,
    safety_backup_steps=(8, 1),
    reward_backup_steps=(4, 1),
)


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return collect(gym.make("safeshield/Boat-v0"), "random", episodes=12, seed=0)


@pytest.fixture(scope="module")
def agent(log: OfflineDataset) -> FLRP:
    return FLRP(TINY, device="cpu").fit(log, steps=60)


def numpy_of(networks: Any) -> Any:  # noqa: ANN401
    return {name: {k: t.numpy() for k, t in params.items()} for name, params in networks.items()}


# -- flows --------------------------------------------------------------------------------------


def wild_flow(features: int) -> tuple[CouplingFlow, Any, torch.Tensor]:
    """Return a flow far from the identity, its weights, and contexts (200, 3)."""
    flow = CouplingFlow(features, 3, (16, 16), transforms=4)
    generator = torch.Generator().manual_seed(features)
    params = {name: 2.0 * tensor for name, tensor in flow.init(generator).items()}
    return flow, params, torch.randn(200, 3, generator=generator)


@pytest.mark.parametrize("features", [2, 3, 6])
def test_inverse_and_volume_are_exact(features: int) -> None:
    flow, params, context = wild_flow(features)
    base = 2.0 * torch.randn(200, features, generator=torch.Generator().manual_seed(0))
    latent, volume = flow.to_latent(params, base, context)
    assert (latent - base).abs().mean() > 0.05
    back, change = flow.to_base(params, latent, context)
    torch.testing.assert_close(back, base, atol=1e-5, rtol=0)
    torch.testing.assert_close(change, -volume, atol=1e-5, rtol=0)
    slope = vmap(jacrev(lambda u, c: flow.to_latent(params, u[None], c[None])[0][0]))(base, context)
    torch.testing.assert_close(torch.linalg.slogdet(slope)[1], volume, atol=1e-5, rtol=0)


def test_the_density_integrates_to_one_on_a_grid() -> None:
    flow, params, contexts = wild_flow(2)
    edge = torch.linspace(-8, 8, 401)
    grid = torch.cartesian_prod(edge, edge)
    for context in contexts[:3]:
        density = flow.log_prob(params, grid, context.expand(len(grid), 3)).exp()
        assert float(density.sum()) * 0.04**2 == pytest.approx(1.0, abs=1e-3)


def test_a_single_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        CouplingFlow(1, 3, (8,))


@pytest.mark.parametrize("features", [2, 3, 6])
def test_the_flow_is_zukos(features: int) -> None:
    """Both ways: values, log-determinants, and gradients in the weights, inputs and contexts."""
    flow, params, context = wild_flow(features)
    theirs = RealNVP(features, 3, transforms=4, hidden_features=(16, 16))
    own = theirs.state_dict()
    weights = {f"transform.{name}": tensor for name, tensor in params.items()}
    assert {name for name in own if ".hyper." in name} == set(weights)
    theirs.load_state_dict({**own, **weights})
    layers = dict(theirs.named_parameters())
    x = 2.0 * torch.randn(200, features, generator=torch.Generator().manual_seed(0))
    for to_latent in (True, False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        mine, seen = x.clone().requires_grad_(), context.clone().requires_grad_()
        out, volume = (flow.to_latent if to_latent else flow.to_base)(leaves, mine, seen)
        point, given = x.clone().requires_grad_(), context.clone().requires_grad_()
        transform: Any = theirs.transform(given)
        expected, change = (transform.inv if to_latent else transform).call_and_ladj(point)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(volume, change, atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad(
            out.square().sum() + volume.sum(), [*leaves.values(), mine, seen]
        )
        wanted = torch.autograd.grad(
            expected.square().sum() + change.sum(),
            [*(layers[f"transform.{name}"] for name in params), point, given],
        )
        for gradient, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("features", [2, 3, 6])
def test_numpy_runs_the_same_flow(features: int) -> None:
    flow, params, context = wild_flow(features)
    arrays = {name: tensor.numpy() for name, tensor in params.items()}
    base = torch.randn(200, features)
    for carry in (flow.to_latent, flow.to_base):
        out, volume = carry(arrays, base.numpy(), context.numpy())
        expected, change = carry(params, base, context)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_allclose(volume, change, atol=1e-5)


@pytest.mark.parametrize("prior", ["flow", "gaussian"])
def test_numpy_runs_the_same_policy(prior: Any) -> None:  # noqa: ANN401
    policy = LatentPolicy(3, 2, LatentSpec(3, (8, 8), 3, prior, refine_steps=4))
    networks = policy.init(torch.Generator().manual_seed(0))
    seen, noise = torch.randn(20, 3), torch.randn(20, 3)
    with torch.no_grad():
        acted = policy.act(networks, seen, noise)
    found = policy.act(numpy_of(networks), seen.numpy(), noise.numpy())
    np.testing.assert_allclose(found, acted, atol=1e-5)
    shapes = {name: part.shapes for name, part in policy.parts().items()}
    assert {n: {k: tuple(t.shape) for k, t in p.items()} for n, p in networks.items()} == shapes


def test_the_estimated_density_is_that_of_the_integral() -> None:
    """Importance sampling through the recognizer against the integral over z on a grid."""
    policy = LatentPolicy(1, 1, LatentSpec(2, (8,), 2, spread=0.5))
    networks = policy.init(torch.Generator().manual_seed(1))
    edge = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(edge, edge)
    state = torch.full((len(grid), 1), 0.3)
    actions = torch.tensor([[-0.8], [0.0], [0.5]])
    with torch.no_grad():
        _, log_p = policy.to_base(networks, state, grid)
        means = policy.decode(networks, state, grid)
        fit = torch.stack([policy.log_likelihood(a.expand(len(grid), 1), means) for a in actions])
        exact = torch.logsumexp(fit + log_p, 1) + 2 * math.log(0.05)
    found = policy.log_density(
        numpy_of(networks), np.full((3, 1), 0.3, np.float32), actions.numpy()
    )
    np.testing.assert_allclose(found, exact, atol=0.15)


# -- losses -------------------------------------------------------------------------------------


def fit_generative(
    policy: LatentPolicy,
    config: FLRPConfig,
    steps: int,
    draw: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[Any, torch.Generator]:
    """Train in one state on (actions, weights) of 256 draws each; return weights and generator."""
    generator = torch.Generator().manual_seed(0)
    networks = policy.init(generator)
    loss = partial(generative_loss, policy, config)
    trained = {name: networks[name] for name in policy.generative}
    moments, seen = adam_init(trained), torch.zeros(256, 1)
    for _ in range(steps):
        actions, weights = draw(generator)
        noise = torch.randn(256, policy.spec.latent, generator=generator)
        leaves = like(trained, [t.detach().requires_grad_() for t in tensors(trained)])
        value, _ = loss(leaves, seen, actions, noise, weights, torch.zeros(256))
        gradients = list(torch.autograd.grad(value, tensors(leaves)))
        rate = learning_rate(3e-3, moments.updates, steps)
        trained, moments = adam(trained, gradients, moments, [rate] * len(gradients))
    return {**networks, **trained}, generator


def test_the_weighted_bound_ends_on_the_reweighted_behaviour() -> None:
    """Lemma 1: two actions, seen equally often, one weighted three times the other."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        left = torch.rand(256, 1, generator=generator) < 0.5
        return torch.where(left, -0.5, 0.5), torch.where(left[:, 0], 0.5, 1.5)

    policy = LatentPolicy(1, 1, LatentSpec(2, (32, 32), 4))
    config = FLRPConfig(shape_weight=0.0, entropy_weight=0.0)
    networks, generator = fit_generative(policy, config, 900, draw)
    with torch.no_grad():
        noise, state = torch.randn(4000, 2, generator=generator), torch.zeros(4000, 1)
        acted = policy.decode(networks, state, policy.to_latent(networks, state, noise))
    assert float((acted > 0).float().mean()) == pytest.approx(0.75, abs=0.04)
    assert float((acted.abs() - 0.5).abs().median()) < 0.1
    # Its own density says the same.
    there = np.zeros((2, 1), np.float32), np.array([[-0.5], [0.5]], np.float32)
    left_density, right_density = np.exp(policy.log_density(numpy_of(networks), *there))
    assert left_density / (left_density + right_density) == pytest.approx(0.25, abs=0.05)


def test_the_posterior_keeps_its_entropy() -> None:
    """Eq. 13: what is missing to the floor is paid for, and descending gives it back."""
    policy = LatentPolicy(1, 1, LatentSpec(2, (8,), 2))
    generator = torch.Generator().manual_seed(0)
    networks = policy.init(generator)
    narrow = {
        name: tensor + (torch.tensor([0.0, 6.0]) if name.endswith("hyper.2.bias") else 0.0)
        for name, tensor in networks[POSTERIOR].items()
    }
    seen, actions, noise = (torch.randn(256, n, generator=generator) for n in (1, 1, 2))
    ones, weight = torch.ones(256), FLRPConfig().entropy_weight

    def terms(posterior: Any, entropy_weight: float) -> tuple[torch.Tensor, float]:  # noqa: ANN401
        loss = partial(generative_loss, policy, FLRPConfig(entropy_weight=entropy_weight))
        value, metrics = loss(
            {**networks, POSTERIOR: posterior}, seen, actions.tanh(), noise, ones, ones
        )
        return value, float(metrics["flow/posterior_entropy"])

    floor = 2 * FLRPConfig().entropy_floor
    for posterior in (networks[POSTERIOR], narrow):
        paid, entropy = terms(posterior, weight)
        assert float(paid - terms(posterior, 0.0)[0]) == pytest.approx(
            weight * max(floor - entropy, 0.0), abs=1e-4
        )
    assert entropy < floor - 0.5
    leaves = {name: tensor.requires_grad_() for name, tensor in narrow.items()}
    for _ in range(400):
        slopes = torch.autograd.grad(terms(leaves, 1000.0)[0], list(leaves.values()))
        with torch.no_grad():
            moved = [t - 1e-2 * g / 1000.0 for t, g in zip(leaves.values(), slopes, strict=True)]
        leaves = dict(zip(leaves, [t.requires_grad_() for t in moved], strict=True))
    assert terms(leaves, weight)[1] > entropy + 0.2


def run_of(agent: FLRP, log: OfflineDataset, config: FLRPConfig) -> tuple[FLRPRun, Any, Draw]:
    model = agent._fitted()
    tensors_of_log = LogTensors.of(log, model.scaling, torch.device("cpu"))
    run = FLRPRun(model, tensors_of_log, config, 60)
    state = run.initial(torch.Generator().manual_seed(0))
    state = state._replace(
        networks={**state.networks, **agent._networks},
        targets={name: agent._networks[name] for name in state.targets},
    )
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(log), (64,), generator=generator)
    return run, state, Draw(rows, torch.randn(64, 2, generator=generator), torch.rand(64, 1))


def test_refining_moves_the_experts_alone(agent: FLRP, log: OfflineDataset) -> None:
    run, state, draw = run_of(agent, log, TINY)
    after, _ = run.phases()[-1].update(state, draw)
    for name, params in state.networks.items():
        moved = any(not torch.equal(params[key], after.networks[name][key]) for key in params)
        assert moved == (name in EXPERTS), name
    after, _ = run.phases()[-2].update(state, draw)
    for name, params in state.networks.items():
        moved = any(not torch.equal(params[key], after.networks[name][key]) for key in params)
        assert moved == (name in agent._fitted().policy.generative), name


def test_the_reward_expert_pulls_towards_good_actions(agent: FLRP, log: OfflineDataset) -> None:
    """Eq. 15 is printed with a minus sign; minimised, it must bring actions nearer."""
    config = dataclasses.replace(TINY, safety_weight=0.0, shared_weight=0.0)
    run, state, draw = run_of(agent, log, config)
    model, refine = agent._fitted(), run.phases()[-1].update
    goal = run.log.actions[draw.rows]
    seen = run.log.observations[draw.rows]

    def distance(state: Any) -> float:  # noqa: ANN401
        _, metrics = refiner_loss(
            model.policy, config, run._feasibility, run._margin(state),
            state.networks, state, seen, goal, draw.noise, torch.ones(64),
        )  # fmt: skip
        return float(metrics["refiner/distance_to_good_actions"])

    before = distance(state)
    for _ in range(30):
        state, _ = refine(state, draw)
    assert distance(state) < before


def test_the_safety_weight_carries_no_gradient(agent: FLRP, log: OfflineDataset) -> None:
    """Eq. 14: d/dA of w softplus(A) with w held fixed is w sigmoid(A)."""

    class Linear:
        def excess(self, state: Any, seen: Any, actions: Any, margin: Any) -> torch.Tensor:  # noqa: ANN401
            return scale * actions[:, 0]

    scale = torch.tensor(0.7, requires_grad=True)
    config = dataclasses.replace(TINY, reward_weight=0.0, shared_weight=0.0)
    run, state, draw = run_of(agent, log, config)
    loss = partial(refiner_loss, agent._fitted().policy, config, Linear(), 0.0)  # type: ignore[arg-type]
    seen, goal = run.log.observations[draw.rows], run.log.actions[draw.rows]
    value, _ = loss(state.networks, state, seen, goal, draw.noise, torch.ones(64))
    (slope,) = torch.autograd.grad(value, scale)
    with torch.no_grad():
        acted = agent._fitted().policy.act(state.networks, seen, draw.noise)[:, 0]
        danger = 0.7 * acted
        weights = (config.safety_temperature * danger).exp().clamp(max=150.0)
        expected = (weights / weights.mean() * danger.sigmoid() * acted).mean()
        expected = config.safety_weight * expected
    torch.testing.assert_close(slope, expected)


def test_only_what_is_not_feasible_is_pressed_down(agent: FLRP, log: OfflineDataset) -> None:
    """E_h <= 0 for exactly the feasible actions, and the advantage where V_h > -margin."""
    run, state, draw = run_of(agent, log, TINY)
    seen, acted = run.log.observations[draw.rows], run.log.actions[draw.rows]
    value, q = run._feasibility.judge(state, seen, acted)
    critics = run.model.critics.safety
    advantage = critics.advantages(state.targets, seen, acted).amax(0)
    lost = 0
    for margin in torch.quantile(-value, torch.tensor([0.1, 0.5, 0.9])).tolist():
        excess = run._feasibility.excess(state, seen, acted, margin)
        feasible = value <= -margin
        assert torch.equal(excess[feasible] <= 0, (q <= -margin)[feasible])
        torch.testing.assert_close(excess[~feasible], advantage[~feasible], atol=1e-3, rtol=1e-3)
        lost += int((~feasible).sum())
    assert 64 < lost < 128


# -- refinement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "order"),
    [(0, ""), (1, "sh"), (2, "sa sh"), (3, "sa re sh"), (4, "sa re sa sh"), (5, "sa re sa re sh")],
)
def test_the_order_of_the_experts(steps: int, order: str) -> None:
    assert " ".join(name[:2] for name in expert_order(steps)) == order


def refiner(order: Any, steps: int, rho: float | None = None) -> tuple[LatentPolicy, Any]:  # noqa: ANN401
    spec = LatentSpec(2, (8,), 2, refine_steps=steps, order=order, trust_region=rho)
    policy = LatentPolicy(3, 1, spec)
    return policy, policy.init(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_the_orders_of_a_round(steps: int) -> None:
    """Gauss-Seidel, Jacobi and quarters of a step in turn, written out; the shared expert last."""
    generator = torch.Generator().manual_seed(1)
    seen, noise = (torch.randn(7, width, generator=generator) for width in (3, 2))
    made = {}
    for order in ORDERS:
        policy, networks = refiner(order, steps)

        def f(name: str, u: Any, policy: Any = policy, networks: Any = networks) -> Any:  # noqa: ANN401
            return policy.expert(networks[name], torch.cat([seen, u], 1))[0]

        u, left = noise, steps - 1
        while left > 0:
            pair = ["safety_expert", "reward_expert"][:left]
            left -= 2
            if order == "jacobi":
                u = u + torch.stack([f(name, u) for name in pair]).sum(0)
            for name in [] if order == "jacobi" else pair * (4 if order == "interleaved" else 1):
                u = u + f(name, u) / (4 if order == "interleaved" else 1)
        u = u + f("shared_expert", u)
        made[order] = policy.refine(networks, seen, noise)
        torch.testing.assert_close(made[order], u)
        arrays = policy.refine(numpy_of(networks), seen.numpy(), noise.numpy())
        np.testing.assert_allclose(arrays, u, atol=1e-5)
    different = not torch.allclose(made["sequential"], made["jacobi"], atol=1e-4)
    assert different == (steps >= 3)
    assert torch.allclose(made["sequential"], made["interleaved"], atol=1e-4) == (steps == 1)


def test_jacobi_does_not_depend_on_which_expert_is_first() -> None:
    seen, noise = torch.randn(7, 3), torch.randn(7, 2)
    for order in ORDERS:
        policy, networks = refiner(order, 3)
        first, second = networks["safety_expert"], networks["reward_expert"]
        swapped = {**networks, "safety_expert": second, "reward_expert": first}
        same = torch.allclose(
            policy.refine(networks, seen, noise), policy.refine(swapped, seen, noise), atol=1e-5
        )
        assert same == (order == "jacobi"), order


def test_the_trust_region_cuts_the_way_and_keeps_its_direction() -> None:
    """||u_T - u_0|| <= rho, on tensors and arrays; a shorter way is not changed."""
    generator = torch.Generator().manual_seed(2)
    seen, noise = (torch.randn(200, width, generator=generator) for width in (3, 2))
    free, networks = refiner("sequential", 3)
    way = free.refine(networks, seen, noise) - noise
    length = way.norm(dim=1)
    rho = float(length.median())
    policy, _ = refiner("sequential", 3, rho)
    bounded = policy.refine(networks, seen, noise) - noise
    assert bounded.norm(dim=1).max() <= rho * (1 + 1e-5)
    expected = way * (rho / length.clamp(min=rho))[:, None]
    torch.testing.assert_close(bounded, expected, atol=1e-5, rtol=1e-5)
    arrays = policy.refine(numpy_of(networks), seen.numpy(), noise.numpy())
    np.testing.assert_allclose(arrays, noise + expected, atol=1e-5)
    # Where the experts do nothing, the gradient is that of the step itself.
    still = {
        name: {key: torch.zeros_like(t).requires_grad_() for key, t in params.items()}
        for name, params in networks.items()
    }
    policy.refine(still, seen, noise).sum().backward()
    grown = still["shared_expert"]["1.bias"].grad
    assert grown is not None
    torch.testing.assert_close(grown, torch.full_like(grown, 200.0))


@pytest.mark.parametrize("change", [{}, {"feasibility": "cost"}, {"refine_steps": 0}])
def test_algorithm_1_trains_everything_in_every_update(
    log: OfflineDataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, phases="joint", order="jacobi", trust_region=0.5, **change)
    agent = FLRP(config, device="cpu")
    model = agent._describe(log)
    run = FLRPRun(model, LogTensors.of(log, model.scaling, torch.device("cpu")), config, 12)
    phases = run.phases()
    assert sum(phase.steps for phase in phases) == 12
    assert all(phase.name.startswith("joint") for phase in phases)
    before = run.initial(torch.Generator().manual_seed(0))
    assert phases[0].refresh is not None
    before = phases[0].refresh(before, torch.Generator().manual_seed(0))
    draw = Draw(torch.arange(16), torch.randn(16, model.policy.spec.latent), torch.rand(16, 1))
    after, _ = phases[0].update(before, draw)
    still = set() if config.refine_steps else set(EXPERTS)
    for name, params in after.networks.items():
        moved = any(not torch.equal(t, before.networks[name][key]) for key, t in params.items())
        assert moved == (name not in still), name
    # A run in two parts ends as one without, and its file and its shield bring everything back.
    whole = FLRP(config, device="cpu").fit(log, steps=12)
    FLRP(config, device="cpu").fit(log, steps=12, checkpoint=tmp_path / "c", stop_after=5)
    parts = FLRP(config, device="cpu").fit(log, steps=12, checkpoint=tmp_path / "c")
    parts.save(tmp_path / "agent")
    again, seen = load_agent(tmp_path / "agent"), log.observations[:5]
    assert again.config == config
    acted = whole.predict(seen, deterministic=True)[0]
    np.testing.assert_array_equal(acted, again.predict(seen, deterministic=True)[0])  # type: ignore[attr-defined]
    parts.shield().save(tmp_path / "shield")
    fallback = Shield.load(tmp_path / "shield").model.fallback_actor
    assert fallback == whole._fitted().policy


def test_the_divergence_of_an_affine_map_is_the_gaussians() -> None:
    """Experts that scale and shift the noise: KL(N(m, s^2 I) || N(0, I)) is known."""
    policy = LatentPolicy(1, 1, LatentSpec(2, (4,), 2, refine_steps=1))
    networks = policy.init(torch.Generator().manual_seed(0))
    expert = {key: torch.zeros_like(t) for key, t in networks["shared_expert"].items()}
    # u + f(u) = 0.5 u + 0.3, from relu(u) and relu(-u).
    eye = torch.eye(2)
    expert["0.weight"] = torch.cat([torch.zeros(1, 4), torch.cat([eye, -eye], 1)])[None]
    expert["1.weight"] = torch.cat([-0.5 * eye, 0.5 * eye])[None]
    expert["1.bias"] = torch.full((1, 1, 2), 0.3)
    networks["shared_expert"] = expert
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    shift = base_shift(policy, networks, torch.randn(3, 1), noise)
    exact = 2 * 0.5 * (0.25 + 0.09 - 1.0 - math.log(0.25))
    np.testing.assert_allclose(shift.divergence, exact, atol=0.03)
    bound = min(math.sqrt(exact / 2), math.sqrt(1 - math.exp(-exact)))
    np.testing.assert_allclose(shift.total_variation, bound, atol=0.03)
    assert not shift.folds.any()
    # The draws' spread tells how far the estimate is off: of 100 repetitions, about 95.
    near = 0
    for seed in range(100):
        few = torch.randn(50, 2, generator=torch.Generator().manual_seed(seed))
        one = base_shift(policy, networks, torch.zeros(1, 1), few)
        near += abs(one.divergence[0] - exact) < 2 * one.standard_error[0]
    assert 85 <= near <= 100
    # A map that mirrors the noise folds it; where it is not one to one, the formula is no bound.
    expert["1.weight"] = torch.cat([-2.0 * eye[:, :1], 2.0 * eye[:, :1]]).repeat(1, 2)[None] * (
        torch.tensor([1.0, 0.0])
    )
    assert base_shift(policy, networks, torch.randn(3, 1), noise).folds.all()
    # A map onto one dimension has an infinite divergence, which ends no training and no file.
    expert["1.bias"], expert["1.weight"] = torch.zeros(1, 1, 2), torch.cat([-eye, eye])[None]
    collapsed = base_shift(policy, networks, torch.randn(3, 1), noise)
    assert np.isinf(collapsed.divergence).all()
    assert np.isinf(collapsed.standard_error).all()
    np.testing.assert_allclose(collapsed.total_variation, 1.0)
    some = collapsed._replace(divergence=np.array([0.1, 0.2, np.inf]))
    summary = ShiftSummary.of(some, 4000)
    assert (summary.median, summary.upper_decile) == (0.2, math.inf)
    assert ShiftSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    assert "at most inf" in summary.bound


def test_an_infinite_report_ends_no_training(
    log: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(policy: object, networks: object, seen: torch.Tensor, noise: object) -> BaseShift:
        n = len(seen)
        return BaseShift(np.full(n, np.inf), np.ones(n), np.full(n, np.inf))

    monkeypatch.setattr("safeshield.algorithms.flrp.losses.base_shift", collapsed)
    monkeypatch.setattr("safeshield.algorithms.flrp.agent.base_shift", collapsed)
    told: list[float] = []

    class Reads(TrainingCallback):
        every = 1

        def on_step(self, step: TrainingStep) -> None:
            told.append(step.metrics.get("refiner/base_divergence", 0.0))

    agent = FLRP(TINY, device="cpu").fit(log, steps=20, callbacks=[Reads()])
    assert math.inf in told
    agent.save(tmp_path / "agent.safetensors")
    read = FLRP.load(tmp_path / "agent.safetensors", device="cpu")
    assert read.shift_summary == agent.shift_summary
    assert read.shift_summary is not None
    assert read.shift_summary.median == math.inf


def test_other_numbers_of_steps_share_the_weights(agent: FLRP, log: OfflineDataset) -> None:
    seen = log.observations[:20]
    plain, more = agent.with_refine_steps(0), agent.with_refine_steps(5)
    assert agent.config.refine_steps == 3
    acted = [a.predict(seen, deterministic=True)[0] for a in (agent, plain, more)]
    assert not np.array_equal(acted[0], acted[1])
    assert not np.array_equal(acted[0], acted[2])
    same = more.with_refine_steps(3).predict(seen, deterministic=True)[0]
    np.testing.assert_array_equal(same, acted[0])
    np.testing.assert_array_equal(plain.base_shift(seen, draws=8).divergence, 0.0)
    assert plain.shift_summary is None
    with pytest.raises(ValueError, match="refine_steps must be at least 0, got -1"):
        agent.with_refine_steps(-1)
    for wrong in (None, 1.5, True):
        with pytest.raises(ValueError, match="refine_steps must be a whole number, got"):
            agent.with_refine_steps(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_experts_that_no_step_calls_on_are_not_trained(
    log: OfflineDataset, tmp_path: Path, trained: int
) -> None:
    config = dataclasses.replace(TINY, refine_steps=trained)
    agent = FLRP(config, device="cpu").fit(log, steps=20)
    model = agent._fitted()
    run = FLRPRun(model, LogTensors.of(log, model.scaling, torch.device("cpu")), config, 20)
    names = [phase.name for phase in run.phases()]
    assert ("refiners" in names) == (trained > 0)
    assert sum(phase.steps for phase in run.phases()) == 20
    fresh = run.initial(torch.Generator().manual_seed(config.seed)).networks
    for name in EXPERTS:
        changed = any(not torch.equal(fresh[name][k], t) for k, t in agent._networks[name].items())
        assert changed == (name in expert_order(trained)), name
    # They are not called on after training either, of this agent or of its file.
    agent.with_refine_steps(0).save(tmp_path / "agent")
    for one in (agent, FLRP.load(tmp_path / "agent")):
        assert np.isfinite(one.with_refine_steps(trained).predict(log.observations[:3])[0]).all()
        with pytest.raises(ValueError, match=f"with refine_steps={trained} has left out"):
            one.with_refine_steps(3)


def test_the_bound_on_total_variation_is_never_vacuous() -> None:
    divergence = np.array([0.0, 0.5, 1.9, 2.0, 5.0, 1e6])
    shift = BaseShift(divergence, np.zeros(6), np.zeros(6))
    assert (shift.total_variation < 1.0).all()
    small, large = np.sqrt(divergence / 2), np.sqrt(1 - np.exp(-divergence))
    np.testing.assert_allclose(shift.total_variation, np.minimum(small, large))
    # Either is the smaller one somewhere: Pinsker's alone would be 1 from D = 2 on.
    assert (small < large)[1]
    assert (large < small)[2:].all()


def test_what_base_shift_takes_and_tells(agent: FLRP, log: OfflineDataset) -> None:
    seen = log.observations[:5]
    for wrong in (math.nan, math.inf, 1e300):
        with pytest.raises(ValueError, match=r"observations must be finite as float32"):
            agent.base_shift(np.array([[0.0, 0.0], [wrong, 0.0]]))
    for draws in (1, 0, -3):
        with pytest.raises(ValueError, match=f"draws must be at least 2, got {draws}"):
            agent.base_shift(seen, draws=draws)
    for draws in (2.5, None, True):
        with pytest.raises(TypeError, match="draws must be a whole number"):
            agent.base_shift(seen, draws=draws)  # type: ignore[arg-type]
    many, few = agent.base_shift(seen), agent.base_shift(seen, draws=16)
    assert (many.standard_error < few.standard_error).all()
    assert (few.divergence >= 0).all()
    # Without experts nothing moves: the draws' mean is 0 exactly, and so is its error.
    still = agent.with_refine_steps(0).base_shift(seen)
    np.testing.assert_array_equal(still.standard_error, 0.0)


def test_no_estimate_is_below_zero() -> None:
    """A shift by little, seen through few draws: the mean is negative for some of them."""
    policy = LatentPolicy(1, 1, LatentSpec(2, (4,), 2, refine_steps=1))
    networks = policy.init(torch.Generator().manual_seed(0))
    expert = {key: torch.zeros_like(t) for key, t in networks["shared_expert"].items()}
    networks["shared_expert"] = {**expert, "1.bias": torch.full((1, 1, 2), 0.05)}
    found = [
        base_shift(
            policy,
            networks,
            torch.zeros(1, 1),
            torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)),
        )
        for seed in range(20)
    ]
    assert min(one.divergence[0] for one in found) == 0.0
    assert all(one.standard_error[0] > 0 for one in found)


def test_inspect_tells_of_the_estimate_and_of_another_t(agent: FLRP, tmp_path: Path) -> None:
    agent.save(tmp_path / "agent")
    told = describe(tmp_path / "agent")
    assert "estimated from 64 draws, the same in every state" in told["refinement"]
    assert told["base_shift"]["median_error"] > 0
    assert f"(standard error {told['base_shift']['median_error']:.2g})" in told["refinement"]
    agent.with_refine_steps(5).save(tmp_path / "other")
    told = describe(tmp_path / "other")
    assert "base_shift" not in told
    assert "refines 5 times, but" in told["refinement"]
    assert "measured for T = 3 only" in told["refinement"]


# -- the agent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"prior": "gaussian", "feasibility": "cost", "latent": 4}])
def test_same_seed_same_agent_and_files_bring_it_back(
    log: OfflineDataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, **changes)
    one, two = (FLRP(config, device="cpu").fit(log, steps=40) for _ in range(2))
    seen = log.observations[:9]
    acted = one.predict(seen, deterministic=True)[0]
    np.testing.assert_array_equal(two.predict(seen, deterministic=True)[0], acted)
    one.save(tmp_path / "agent.safetensors")
    back = load_agent(tmp_path / "agent.safetensors")
    assert isinstance(back, FLRP)
    assert back.config == config
    assert back.shift_summary == one.shift_summary
    np.testing.assert_array_equal(back.predict(seen, deterministic=True)[0], acted)


@pytest.mark.parametrize("feasibility", ["safety", "cost"])
def test_a_run_in_instalments_ends_as_one_without(
    log: OfflineDataset,
    tmp_path: Path,
    feasibility: Any,  # noqa: ANN401
) -> None:
    config = dataclasses.replace(TINY, feasibility=feasibility)
    whole = FLRP(config, device="cpu").fit(log, steps=40)
    for stop in (3, 23, 35, None):
        part = FLRP(config, device="cpu").fit(
            log, steps=40, checkpoint=tmp_path / "checkpoint", stop_after=stop
        )
    for name, params in whole._arrays.items():
        for key, array in params.items():
            np.testing.assert_array_equal(part._arrays[name][key], array)


def test_noise_and_its_absence(agent: FLRP, log: OfflineDataset) -> None:
    seen = np.repeat(log.observations[:1], 50, axis=0)
    drawn = agent.predict(seen)[0]
    assert len(np.unique(drawn, axis=0)) > 1
    assert len(np.unique(agent.predict(seen, deterministic=True)[0], axis=0)) == 1
    assert agent.action_space.contains(drawn[0])


def test_where_its_gate_rejects_a_draw_it_acts_as_safefql_does(
    agent: FLRP, log: OfflineDataset
) -> None:
    """But its further draws have no refinement."""
    seen = log.observations[::7]
    model, own, width = agent._fitted(), agent.shield(), 2
    one = agent.with_candidates(1).predict(seen, deterministic=True)[0]
    values = np.asarray(own.value(seen, one))
    limit = float(np.median(values))
    gated = agent.with_margin(-limit / model.critics.safety.scale.spread)
    assert gated.gate == pytest.approx(-limit)
    acted = gated.predict(seen, deterministic=True)[0]
    np.testing.assert_array_equal(acted[values < limit], one[values < limit])
    never = agent.with_margin(1e6)
    rows = model.scaling.observations(seen)
    noise = np.random.default_rng(agent.config.seed).standard_normal((16, width))
    drawn = agent._further(
        model,
        agent._arrays,
        np.repeat(rows, 16, axis=0),
        np.tile(noise, (len(rows), 1)).astype(np.float32),
    ).reshape(len(rows), 16, -1)
    states = own.states(seen)
    safest = drawn[np.arange(len(rows)), own.model.scaled_values(states, drawn).argmin(1)]
    outside = own.model.violating(states)
    assert 0 < outside.sum() < len(seen)
    far = np.abs(never.predict(seen, deterministic=True)[0] - model.scaling.to_box(safest))
    assert far[outside].max() < 1e-5
    after = np.asarray(own.value(seen, never.predict(seen, deterministic=True)[0]))
    lowest = never._changed(last_resort="lowest").predict(seen, deterministic=True)[0]
    least = np.maximum(np.asarray(own.value(seen, lowest)), states.value)
    assert (after <= least + 1e-5)[~outside].all()


def test_the_calibration_of_flrp_alone(agent: FLRP, tmp_path: Path) -> None:
    env = gym.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=60)
    certified = agent.calibrate(env, epsilon=0.9, confidence=0.8, deltas=[0.0])
    assert certified.record is not None
    assert certified.record.policies[0].policy == "FLRP"
    certified.save(tmp_path / "agent.safetensors")
    back = load_agent(tmp_path / "agent.safetensors")
    assert isinstance(back, FLRP)
    assert back.record == certified.record
    fewer = back.with_refine_steps(1)
    assert fewer.record is None
    assert fewer.attempts == back.attempts != ()
    assert back.with_candidates(1).record is None
    with pytest.raises(ValueError, match="has no effect with candidates=1"):
        back.with_candidates(1).with_margin(0.2)


# -- the shield ---------------------------------------------------------------------------------


def test_the_shield_falls_back_on_the_policy_and_asks_its_density(
    agent: FLRP, log: OfflineDataset, tmp_path: Path
) -> None:
    shield = agent.shield().with_support(log, score="density")
    assert shield.support is not None
    assert shield.support.record.score == "density"
    states = shield.model.states(log.observations[:7])
    zero = np.zeros((1, 2), np.float32)
    own = agent.with_candidates(1).predict(log.observations[:7], deterministic=True)[0]
    np.testing.assert_allclose(shield.model.fallback(states, zero)[:, 0], own, atol=1e-6)
    shield.save(tmp_path / "shield.safetensors")
    back = Shield.load(tmp_path / "shield.safetensors")
    assert back.support is not None
    proposals = np.random.default_rng(0).uniform(-1, 1, (7, 2)).astype(np.float32)
    ours, theirs = (one.filter(log.observations[:7], proposals) for one in (shield, back))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1].intervened, theirs[1].intervened)
    with pytest.raises(ValueError, match="score 'noise' needs the network"):
        agent.shield().with_support(log, score="noise")


def test_density_is_for_flrp_alone(log: OfflineDataset) -> None:
    from safeshield import SafeFQL, SafeFQLConfig

    tiny = SafeFQLConfig(critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,))
    shield = SafeFQL(tiny, device="cpu").fit(log, steps=3).shield()
    with pytest.raises(ValueError, match="take the shield of an FLRP agent"):
        shield.with_support(log, score="density")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent", 1),
        ("latent", 2.5),
        ("transforms", 0),
        ("hidden", []),
        ("prior", "uniform"),
        ("spread", 0.0),
        ("spread", float("nan")),
        ("refine_steps", -1),
        ("order", "backwards"),
        ("trust_region", 0.0),
        ("trust_region", "far"),
        ("colour", 3),
    ],
)
def test_a_damaged_file_is_refused(
    agent: FLRP,
    field: str,
    value: Any,  # noqa: ANN401
) -> None:
    policy = agent._fitted().policy
    header, widths = to_header(policy), Widths(policy.observation, policy.action, 0)
    assert header is not None
    assert from_header("fallback", header, widths, "act") == policy
    damaged = {**header, "spec": {**header["spec"], field: value}}
    with pytest.raises(ValueError, match=field if field != "colour" else "must have the fields"):
        from_header("fallback", damaged, widths, "act")


# -- its page -----------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "flrp.md").read_text()


def test_the_page_explains_every_setting_and_every_curve(
    log: OfflineDataset, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table = PAGE.partition("## Settings")[2].partition("\n## ")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = re.findall(r"`(\w+)`", first)
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(FLRPConfig))
    FLRP(TINY, device="cpu").fit(log, steps=12, log_dir=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"flow/divergence", "refiner/folds", "safety/value", "reward/value"} <= set(tags)
    for tag in tags:
        assert f"`{tag}`" in PAGE or f"`{tag.partition('/')[0]}/*`" in PAGE, tag


@pytest.mark.filterwarnings("ignore")
def test_the_pages_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    env = gym.make("safeshield/Boat-v0", max_episode_steps=60)
    collect(env, "random", episodes=100, seed=0).save(tmp_path / "log.hdf5")
    monkeypatch.chdir(tmp_path)
    small = "FLRPConfig(seed=0, critic_hidden=(8,), flow_hidden=(8,), batch_size=16)"
    quick = code.replace("12_000", "12").replace("FLRPConfig(seed=0)", small)
    assert quick.count("steps=12)") == quick.count(small) == 1
    names: dict[str, Any] = {}
    exec(quick, names)
    assert names["bound"].shape == (100,)
    assert names["actions"].shape == (100, 2)
    assert names["shield"].support.record.score == "density"


# -- bad input ----------------------------------------------------------------------------------


def rows(actions: np.ndarray, costs: np.ndarray, space: gym.Space[Any]) -> OfflineDataset:
    count = len(actions)
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(count + 1, 3))
    return OfflineDataset.from_arrays(
        observations=seen[:-1],
        actions=actions,
        rewards=rng.normal(size=count),
        next_observations=seen[1:],
        terminated=np.zeros(count, bool),
        truncated=np.arange(count) % 10 == 9,
        costs=costs,
        action_space=space,
    )


def test_one_action_and_one_that_never_changes() -> None:
    """One action entry gets two latent ones; a constant one comes back to about the spread."""
    rng = np.random.default_rng(0)
    costs = (rng.random(200) < 0.2).astype(float)
    one = rows(rng.uniform(-1, 1, (200, 1)), costs, gym.spaces.Box(-1, 1, (1,)))
    agent = FLRP(TINY, device="cpu").fit(one, steps=40)
    assert agent._fitted().policy.spec.latent == 2
    assert agent.predict(one.observations[:4])[0].shape == (4, 1)
    both = np.stack([rng.uniform(-1, 1, 200), np.full(200, 0.25)], 1)
    constant = rows(both, costs, gym.spaces.Box(-1, 1, (2,)))
    config = dataclasses.replace(TINY, learning_rate=1e-2)
    agent = FLRP(config, device="cpu").fit(constant, steps=900)
    acted = agent.predict(constant.observations)[0]
    assert np.abs(acted[:, 1] - 0.25).mean() < 0.1


def test_a_log_without_safe_episodes_or_without_safe_transitions() -> None:
    """Whole episodes need not be safe, some transitions must be."""
    rng = np.random.default_rng(0)
    actions, box = rng.uniform(-1, 1, (200, 2)), gym.spaces.Box(-1, 1, (2,))
    never_safe = rows(actions, (np.arange(200) % 10 >= 5).astype(float), box)
    assert never_safe.violating_episodes.all()
    FLRP(TINY, device="cpu").fit(never_safe, steps=30)
    with pytest.raises(ValueError, match="nothing but violations"):
        FLRP(TINY, device="cpu").fit(rows(actions, np.ones(200), box), steps=30)
    by_cost = dataclasses.replace(TINY, feasibility="cost")
    FLRP(by_cost, device="cpu").fit(never_safe, steps=30)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent", 1),
        ("latent", 2.0),
        ("prior", "uniform"),
        ("feasibility", "reward"),
        ("transforms", 0),
        ("decoder_spread", 0.0),
        ("action_temperature", 0.0),
        ("state_temperature", -1.0),
        ("kl_weight", -1.0),
        ("entropy_floor", float("nan")),
        ("refine_steps", 1.5),
        ("shared_weight", float("nan")),
        ("phase_shares", (0.5, 0.5)),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=field):
        FLRPConfig(**{field: value})


def test_presets() -> None:
    assert FLRPConfig.preset("small", seed=3) == FLRPConfig(seed=3)
    paper = FLRPConfig.preset("paper", seed=3, batch_size=8)
    assert (paper.seed, paper.batch_size, paper.safety_expectile) == (3, 8, 0.9)
    with pytest.raises(ValueError, match="preset must be one of"):
        FLRPConfig.preset("large")


def test_posterior_and_prior_are_flows(agent: FLRP) -> None:
    """The parts that the paper calls flows are exact ones, not perceptrons."""
    parts = agent._fitted().policy.parts()
    assert isinstance(parts[PRIOR], CouplingFlow)
    assert isinstance(parts[POSTERIOR], CouplingFlow)
