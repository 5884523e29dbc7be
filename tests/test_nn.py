"""Networks, optimiser, flow matching and expectiles against slow and obvious versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import expectile
from torch import nn

from safeshield.nn.flow import euler_sample, flow_matching_loss, velocity_network
from safeshield.nn.mlp import EnsembleMLP, Networks, Params, like, tensors
from safeshield.nn.optim import adam, adam_init, polyak
from safeshield.values.expectile import expectile_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torch_twin(network: EnsembleMLP, params: Params, member: int) -> nn.Sequential:
    """One member as PyTorch's own layers."""
    modules: list[nn.Module] = []
    for layer in range(len(network.hidden) + 1):
        weight, bias = params[f"{layer}.weight"][member], params[f"{layer}.bias"][member, 0]
        linear = nn.Linear(*weight.shape)
        linear.weight.data, linear.bias.data = weight.T.clone(), bias.clone()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("hidden", [(5,), (7, 4), (3, 6, 5)])
@pytest.mark.parametrize("members", [1, 3])
def test_an_ensemble_is_a_loop_over_its_members(hidden: tuple[int, ...], members: int) -> None:
    network = EnsembleMLP(4, 2, hidden, members)
    params = network.init(generator())
    x = torch.randn(11, 4, generator=generator(1))
    loop = torch.stack([torch_twin(network, params, i)(x) for i in range(members)])
    torch.testing.assert_close(network(params, x), loop)
    each = torch.randn(members, 11, 4, generator=generator(2))
    loop = torch.stack([torch_twin(network, params, i)(each[i]) for i in range(members)])
    torch.testing.assert_close(network(params, each), loop)
    # As a function of its inputs alone, the network gives the same numbers.
    assert torch.equal(network.on(params)(each), network(params, each))


def test_members_start_differently_and_within_the_bounds_of_torch() -> None:
    network = EnsembleMLP(9, 1, (16,), members=2)
    params = network.init(generator())
    assert {name: tuple(p.shape) for name, p in params.items()} == network.shapes
    assert not torch.equal(params["0.weight"][0], params["0.weight"][1])
    for layer, fan_in in ((0, 9), (1, 16)):
        weights = torch.cat([params[f"{layer}.{name}"].ravel() for name in ("weight", "bias")])
        assert 0.8 / math.sqrt(fan_in) < weights.abs().max() <= 1 / math.sqrt(fan_in)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    network = EnsembleMLP(3, 1, (4,))
    same, again, other = (network.init(generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not any(torch.equal(same[name], other[name]) for name in same)


@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 3),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    members=st.integers(1, 3),
    rows=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_arrays_and_tensors_give_the_same(
    inputs: int, outputs: int, hidden: list[int], members: int, rows: int, seed: int
) -> None:
    network = EnsembleMLP(inputs, outputs, tuple(hidden), members)
    params = network.init(generator(seed))
    x = torch.randn(rows, inputs, generator=generator(seed + 1))
    before = x.numpy().copy()
    out = network({name: p.numpy() for name, p in params.items()}, x.numpy())
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, network(params, x).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x.numpy(), before)


def two_networks() -> Networks:
    return {
        name: EnsembleMLP(3, 1, (5,), members=2).init(generator(seed))
        for seed, name in enumerate(("one", "two"))
    }


def test_adam_equals_torch_adam_over_many_steps() -> None:
    networks = two_networks()
    theirs = [tensor.clone().requires_grad_() for tensor in tensors(networks)]
    optimiser = torch.optim.Adam(
        [{"params": theirs[:4], "lr": 1e-2}, {"params": theirs[4:], "lr": 3e-3}]
    )
    state = adam_init(networks)
    rates = [torch.tensor(1e-2)] * 4 + [torch.tensor(3e-3)] * 4
    noise = generator(9)
    for step in range(200):
        # Gradients over six orders of magnitude, at times exactly zero.
        scale = 10.0 ** (step % 7 - 3) * (step % 5 > 0)
        gradients = [scale * torch.randn(t.shape, generator=noise) for t in theirs]
        for tensor, gradient in zip(theirs, gradients, strict=True):
            tensor.grad = gradient.clone()
        optimiser.step()
        networks, state = adam(networks, gradients, state, rates)
    assert state.updates == 200
    for mine, other in zip(tensors(networks), theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-4, atol=1e-5)


def test_adam_does_not_depend_on_how_tensors_lie_in_memory() -> None:
    """A gradient or a weight may be a transposed matrix."""
    plain = torch.randn(3, 5, generator=generator(4))
    gradient = torch.randn(3, 5, generator=generator(5))

    def turn(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T.contiguous().T

    rates = [torch.tensor(0.1)]
    moved, _ = adam({"a": {"w": plain}}, [gradient], adam_init({"a": {"w": plain}}), rates)
    for weight, slope in ((plain, turn(gradient)), (turn(plain), gradient)):
        networks = {"a": {"w": weight}}
        turned, _ = adam(networks, [slope], adam_init(networks), rates)
        assert torch.equal(turned["a"]["w"], moved["a"]["w"])


def test_adam_leaves_its_inputs_alone() -> None:
    networks = two_networks()
    before = [tensor.clone() for tensor in tensors(networks)]
    state = adam_init(networks)
    gradients = [torch.ones_like(tensor) for tensor in before]
    adam(networks, gradients, state, [torch.tensor(0.1)] * len(before))
    assert all(torch.equal(a, b) for a, b in zip(tensors(networks), before, strict=True))
    assert not any(tensor.any() for tensor in tensors(state.mean))
    assert state.updates == 0


def test_polyak_moves_the_named_networks_by_its_rate() -> None:
    networks = two_networks()
    targets = {"two": {name: torch.zeros_like(t) for name, t in networks["two"].items()}}
    moved = polyak(targets, networks, 0.25)
    assert set(moved) == {"two"}
    for name, tensor in networks["two"].items():
        torch.testing.assert_close(moved["two"][name], 0.25 * tensor)
    assert not any(tensor.any() for tensor in tensors(targets))


def test_like_gives_values_their_names_back() -> None:
    networks = two_networks()
    again = like(networks, tensors(networks))
    assert list(again) == list(networks)
    assert all(again[n][k] is networks[n][k] for n in networks for k in networks[n])


# -- flow matching ------------------------------------------------------------------------------


def affine_field(slope: float, shift: float, drift: float = 0.0) -> tuple[EnsembleMLP, Params]:
    """A velocity network of one layer, and weights for v(s, x, t) = slope x + shift + drift t."""
    network = velocity_network(1, 2, ())
    weight = torch.zeros(network.shapes["0.weight"])
    weight[0, 1:3] = slope * torch.eye(2)
    weight[0, 3] = drift
    return network, {"0.weight": weight, "0.bias": torch.full((1, 1, 2), shift)}


def test_flow_matching_loss_is_the_formula() -> None:
    network = velocity_network(3, 2, (8,))
    params = network.init(generator())
    draw = generator(1)
    s, a, z = (torch.randn(6, width, generator=draw) for width in (3, 2, 2))
    t = torch.rand(6, 1, generator=draw)
    total = torch.zeros(())
    for i in range(6):
        point = (1 - t[i]) * z[i] + t[i] * a[i]
        velocity = torch_twin(network, params, 0)(torch.cat([s[i], point, t[i]]))
        total += (velocity - (a[i] - z[i])).square().sum().detach()
    assert float(flow_matching_loss(network, params, s, a, z, t)) == pytest.approx(float(total) / 6)


def test_the_true_velocity_has_no_loss_and_no_other_constant_has_less() -> None:
    # All actions equal: the straight path to a has velocity a - z = (a - x) / (1 - t).
    a, z = torch.full((50, 2), 0.5), torch.randn(50, 2, generator=generator())
    t, s = torch.zeros(50, 1), torch.zeros(50, 1)
    assert float(flow_matching_loss(*affine_field(-1.0, 0.5), s, a, z, t)) < 1e-10
    assert float(flow_matching_loss(*affine_field(-1.0, 0.6), s, a, z, t)) > 1e-3


def test_euler_steps_are_the_compound_interest_of_a_linear_field() -> None:
    z = torch.tensor([[0.1, -0.2], [0.05, 0.0]])
    s = torch.zeros(2, 1)
    for steps in (1, 4, 10):
        moved = euler_sample(*affine_field(0.5, 0.0), s, z, steps)
        torch.testing.assert_close(moved, z * (1 + 0.5 / steps) ** steps)
    # t = i / K: the mean of the times is (K - 1) / 2K, not a half.
    moved = euler_sample(*affine_field(0.0, 0.0, 1.0), s, z, 10)
    torch.testing.assert_close(moved, z + 0.45)


def test_samples_stay_in_the_box_and_only_the_end_is_clipped() -> None:
    z, s = torch.tensor([[3.0, -3.0]]), torch.zeros(1, 1)
    still = euler_sample(*affine_field(0.0, 0.0), s, z, 4)
    torch.testing.assert_close(still, torch.tensor([[1.0, -1.0]]))
    # Out of the box at first, inside at the end.
    back = euler_sample(*affine_field(0.0, -2.5), s, torch.tensor([[3.0, 3.0]]), 5)
    torch.testing.assert_close(back, torch.tensor([[0.5, 0.5]]))


# -- expectiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, 0.99])
def test_the_minimiser_is_the_expectile(weight: float) -> None:
    sample = np.random.default_rng(0).gamma(2.0, size=200)
    targets = torch.tensor(sample)

    def slope(prediction: float) -> float:
        x = torch.tensor(prediction, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(expectile_loss(targets - x, weight), x)
        return float(gradient)

    minimiser = brentq(slope, sample.min(), sample.max(), xtol=1e-12)
    assert minimiser == pytest.approx(expectile(sample, weight), rel=1e-6)


def test_weight_near_one_leans_to_the_high_targets_and_mirrored_to_the_low() -> None:
    error = torch.tensor([-2.0, 3.0])
    assert float(expectile_loss(error, 0.9)) == pytest.approx((0.1 * 4 + 0.9 * 9) / 2)
    assert float(expectile_loss(-error, 0.9)) == pytest.approx((0.9 * 4 + 0.1 * 9) / 2)
