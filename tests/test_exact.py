"""The exact values against brute force, and their properties."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshield.envs import boat
from safeshield.envs import double_integrator as cart
from safeshield.exact import GridValue, boat_value
from safeshield.exact import cache as cache_module
from safeshield.exact import double_integrator as exact

DTS = [0.005, 0.02, 0.05, 0.3, 0.7]


def cart_states(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(cart.STATE_LOW, cart.STATE_HIGH, (number, 2))


def braking_reach(states: np.ndarray, dt: float) -> np.ndarray:
    """The max over time of h under the controls of the proof, simulated by the environment.

    Brake fully while the next sample still lies further out; then alternate, so that every
    sample returns to the turning point.
    """
    states = states.copy()
    reach = cart.constraint(states)
    for _ in range(int(2.0 / dt) + 10):
        speed = states[:, 1]
        stand = np.abs(speed) <= 0.5 * dt * (1 + 1e-12)
        action = np.where(stand, -2.0 * speed / dt, -np.sign(speed))
        states = cart.next_state(states, action[:, None], dt=dt)
        reach = np.maximum(reach, cart.constraint(states))
    return reach


@pytest.mark.parametrize("dt", DTS)
def test_cart_value_is_attained_by_braking(dt: float) -> None:
    states = cart_states(2000)
    np.testing.assert_allclose(braking_reach(states, dt), exact.value(states, dt=dt), atol=1e-9)


@pytest.mark.parametrize("dt", [0.3, 0.7])
def test_cart_value_is_the_best_of_all_control_sequences(dt: float) -> None:
    """No sequence of accelerations does better, and one does as well."""
    states = cart_states(60, seed=1)
    levels = (-1.0, -0.5, 0.0, 0.5, 1.0)
    best = np.full(len(states), np.inf)
    for sequence in itertools.product(levels, repeat=5):
        at, worst = states, cart.constraint(states)
        for u in sequence:
            at = cart.next_state(at, np.full((len(at), 1), u), dt=dt)
            worst = np.maximum(worst, cart.constraint(at))
        best = np.minimum(best, worst)
    # Five steps cover the stop from these speeds, and full braking is among the sequences.
    covered = np.abs(states[:, 1]) <= 5 * dt
    values = exact.value(states, dt=dt)
    assert covered.sum() > 30
    np.testing.assert_allclose(best[covered], values[covered], atol=1e-9)


@pytest.mark.parametrize("dt", DTS)
def test_cart_value_is_a_fixed_point_of_the_backup(dt: float) -> None:
    states = cart_states(500, seed=2)
    speed = states[:, 1]
    stand = np.clip(-2.0 * speed / dt, -1.0, 1.0)
    # The best action is among full braking and the one that returns to this position.
    candidates = [np.full(500, u) for u in np.linspace(-1, 1, 41)] + [stand]
    q = np.min([exact.action_value(states, u[:, None], dt=dt) for u in candidates], axis=0)
    np.testing.assert_allclose(q, exact.value(states, dt=dt), atol=1e-9)


@settings(max_examples=100)
@given(
    position=st.floats(-1.5, 1.5),
    speed=st.floats(-2.0, 2.0),
    action=st.floats(-1.0, 1.0),
    dt=st.sampled_from(DTS),
)
def test_cart_value_properties(position: float, speed: float, action: float, dt: float) -> None:
    state = np.array([position, speed])
    here = exact.value(state, dt=dt)
    continuous = exact.value(state)
    assert cart.constraint(state) <= here <= 0.5
    # Between samples the cart passes the turning point by at most a dt^2 / 8.
    assert here <= continuous + 1e-12
    assert continuous - here <= dt * dt / 8 + 1e-12
    assert exact.action_value(state, np.array([action]), dt=dt) >= here - 1e-12
    np.testing.assert_allclose(exact.value(-state, dt=dt), here)
    faster = np.array([position, speed + np.copysign(0.1, speed)])
    if abs(faster[1]) <= 2.0:
        assert exact.value(faster, dt=dt) >= here - 1e-12


def test_cart_value_limit_and_known_points() -> None:
    states = cart_states(300, seed=3)
    np.testing.assert_allclose(exact.value(states, dt=1e-5), exact.value(states), atol=1e-9)
    known = np.array([[0.0, 0.0], [0.5, 1.0], [-0.5, -1.0], [1.2, -1.0], [-1.2, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(exact.value(known), [-1.0, 0.0, 0.0, 0.2, 0.2, 0.5])
    np.testing.assert_allclose(
        exact.value(np.array([[0.0, 1.0]]), wall=0.4, max_acceleration=2.0), [0.25 - 0.4]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": np.zeros(3)}, "states must be finite"),
        ({"states": np.array([0.0, np.nan])}, "states must be finite"),
        ({"states": np.zeros(2), "wall": 0.0}, "wall must be"),
        ({"states": np.zeros(2), "max_acceleration": -1.0}, "max_acceleration must be"),
        ({"states": np.zeros(2), "dt": 0.0}, "dt must be"),
    ],
)
def test_cart_value_refuses_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact.value(**arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@pytest.fixture(scope="module")
def grid(folder: Path) -> GridValue:
    return boat_value(cache_dir=folder, refine=1)


def barrier(centre: np.ndarray, radius: float, upper: bool) -> np.ndarray:
    """The path on the verge of hitting a rock, backwards from where it grazes it.

    The last direction is the rock's outward normal n with n . (drift, 0) + 1 = 0; backwards in
    time the direction turns as the costate of the discrete dynamics does.
    """
    angles = np.linspace(np.pi, np.pi / 2 if upper else 1.5 * np.pi, 200_001)
    drift = 2.0 - 0.5 * (centre[1] + radius * np.sin(angles)) ** 2
    angle = angles[np.argmax(np.cos(angles) * drift + 1.0 > 0.0)]
    costate = np.array([np.cos(angle), np.sin(angle)])
    path = [centre + radius * costate]
    for _ in range(200):
        u = costate / np.hypot(*costate)
        y = path[-1][1] - 0.005 * u[1]
        path.append(np.array([path[-1][0] - 0.005 * (u[0] + 2.0 - 0.5 * y * y), y]))
        costate = np.array([costate[0], costate[1] - 0.005 * y * costate[0]])
    return np.array(path)


def doomed_by_characteristics(states: np.ndarray) -> np.ndarray:
    """Inside a rock, or between the two barriers upstream of it."""
    doomed = boat.constraint(states) > 0.0
    for centre, radius in zip(boat.ROCK_CENTRES, boat.ROCK_RADII, strict=True):
        upper, lower = (barrier(centre, radius, side) for side in (True, False))
        x, y = states[..., 0], states[..., 1]
        ceiling = np.interp(x, upper[::-1, 0], upper[::-1, 1])
        floor = np.interp(x, lower[::-1, 0], lower[::-1, 1])
        within = (x <= min(upper[0, 0], lower[0, 0])) & (x >= max(upper[-1, 0], lower[-1, 0]))
        doomed |= within & (y < ceiling) & (y > floor)
        # Between the two grazing points the rock's front and the further barrier enclose it.
        late = upper if upper[0, 0] > lower[0, 0] else lower
        early = min(upper[0, 0], lower[0, 0])
        edge = np.interp(x, late[::-1, 0], late[::-1, 1])
        front = (x > early) & (x <= late[0, 0])
        side = y < edge if upper[0, 0] > lower[0, 0] else y > edge
        beyond = y > centre[1] if upper[0, 0] > lower[0, 0] else y < centre[1]
        doomed |= front & side & beyond
    return doomed


def grid_points(grid: GridValue) -> np.ndarray:
    return np.stack(np.meshgrid(grid.xs, grid.ys, indexing="ij"), axis=-1)


def test_boat_unsafe_set_is_that_of_the_characteristics(grid: GridValue) -> None:
    points = grid_points(grid)
    doomed = doomed_by_characteristics(points)
    share = np.mean(grid.values > 0.0)
    assert share == pytest.approx(0.0697, abs=5e-5)
    assert np.mean(boat.constraint(points) > 0.0) == pytest.approx(0.0635, abs=5e-5)
    assert np.sum((grid.values > 0.0) != doomed) <= 2


def test_boat_value_converges_with_the_grid(grid: GridValue, folder: Path) -> None:
    finer = boat_value(cache_dir=folder, refine=2)
    near = np.abs(finer.values) < 0.05
    np.testing.assert_allclose(grid.values[near], finer.values[near], atol=1e-3)
    np.testing.assert_allclose(grid.values, finer.values, atol=0.02)
    assert np.sum((grid.values > 0.0) != (finer.values > 0.0)) <= 2


def test_boat_value_is_never_below_the_constraint(grid: GridValue) -> None:
    assert (grid.values >= boat.constraint(grid_points(grid))).all()
    states = np.random.default_rng(0).uniform(boat.STATE_LOW, boat.STATE_HIGH, (5000, 2))
    assert (grid(states) >= boat.constraint(states)).all()
    # Past the rocks the boat sails on: the value is the constraint, and nothing else.
    downstream = grid_points(grid)[grid.xs > -0.49]
    np.testing.assert_array_equal(grid.values[grid.xs > -0.49], boat.constraint(downstream))


def test_boat_value_is_close_to_a_fixed_point(grid: GridValue) -> None:
    rng = np.random.default_rng(1)
    states = rng.uniform([-2.0, -1.7], [-0.5, 1.0], (2000, 2))
    states = states[np.abs(grid(states)) < 0.1]
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    fan = np.stack((np.cos(angles), np.sin(angles)), axis=-1)
    shape = (len(states), 96, 2)
    q = grid.action_value(np.broadcast_to(states[:, None], shape), np.broadcast_to(fan, shape)).min(
        axis=1
    )
    error = np.abs(q - grid(states))
    # The largest are on the ridge where left and right are equally good, which a cell flattens.
    assert error.mean() < 1e-4
    assert error.max() < 5e-3
    assert (q <= grid.action_value(states, np.zeros_like(states)) + 1e-3).all()


def test_steering_by_the_value_keeps_every_safe_start_safe(grid: GridValue) -> None:
    """Starts just outside the boundary stay clear; those just inside hit, whatever they do."""
    rng = np.random.default_rng(2)
    states = rng.uniform([-2.0, -1.8], [-0.4, 1.0], (6000, 2))
    claimed = grid(states)
    outside_rocks = boat.constraint(states) < 0.0
    states = states[outside_rocks & (np.abs(claimed) < 0.03) & (np.abs(claimed) > 1e-3)][:400]
    claimed = grid(states)
    assert min(np.sum(claimed > 0.0), np.sum(claimed < 0.0)) > 50
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    fan = np.stack((np.cos(angles), np.sin(angles)), axis=-1)
    shape = (len(states), 48, 2)
    worst = boat.constraint(states)
    for _ in range(300):
        q = grid.action_value(np.broadcast_to(states[:, None], shape), np.broadcast_to(fan, shape))
        states = boat.next_state(states, fan[q.argmin(axis=1)])
        worst = np.maximum(worst, boat.constraint(states))
    np.testing.assert_array_equal(worst > 0.0, claimed > 0.0)


def test_a_weaker_river_dooms_less(folder: Path) -> None:
    shares = [
        np.mean(boat_value(126, 101, folder, refine=1, current=c).values > 0.0)
        for c in (1.0, 2.0, 3.0)
    ]
    xs, ys = np.linspace(-3, 2, 126), np.linspace(-2, 2, 101)
    rocks = np.mean(boat.constraint(np.stack(np.meshgrid(xs, ys), axis=-1)) > 0.0)
    # A river slower than the engine dooms nothing beyond the rocks.
    assert shares[0] == pytest.approx(rocks, abs=1e-4)
    assert shares[0] < shares[1] < shares[2]


def test_interpolation_meets_the_grid(grid: GridValue) -> None:
    np.testing.assert_allclose(grid(grid_points(grid)), grid.values, atol=1e-12)
    assert grid(np.array([0.0, 0.0])).shape == ()
    assert grid(np.zeros((2, 3, 2))).shape == (2, 3)
    middle = np.array([0.5 * (grid.xs[3] + grid.xs[4]), grid.ys[100]])
    mean = 0.5 * (grid.values[3, 100] + grid.values[4, 100])
    assert grid(middle) == pytest.approx(mean, abs=1e-12)
    with pytest.raises(ValueError, match="states must be finite"):
        grid(np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match="read-only"):
        grid.values[0, 0] = 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nx": 1}, "nx must be"),
        ({"ny": 0}, "ny must be"),
        ({"refine": 0}, "refine must be"),
        ({"dt": 0.0}, "dt must be"),
        ({"current": np.nan}, "current must be"),
    ],
)
def test_boat_value_refuses_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boat_value(**arguments)


def test_cache_is_read_and_damage_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFESHIELD_CACHE", str(tmp_path))
    calls = 0

    def compute() -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.full((2, 3), 1.5)

    def fetch(**parameters: object) -> np.ndarray:
        return cache_module.cached_grid("test", parameters, (2, 3), compute)

    np.testing.assert_array_equal(fetch(a=1), fetch(a=1))
    assert calls == 1
    fetch(a=2)
    assert calls == 2
    assert len(list(tmp_path.iterdir())) == 2
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    halved = {path: data[: len(data) // 2] for path, data in whole.items()}
    flipped = {
        path: data[:60] + bytes([data[60] ^ 0xFF]) + data[61:] for path, data in whole.items()
    }
    for damage in (halved, flipped, dict.fromkeys(whole, b""), dict.fromkeys(whole, b"x" * 99)):
        for path, data in damage.items():
            path.write_bytes(data)
        before = calls
        np.testing.assert_array_equal(fetch(a=1), np.full((2, 3), 1.5))
        assert calls == before + 1
        fetch(a=1)
        assert calls == before + 1
        fetch(a=2)


def test_cache_refuses_a_grid_that_is_not_what_it_says(tmp_path: Path) -> None:
    def fetch(value: float) -> np.ndarray:
        return cache_module.cached_grid("test", {"a": 1}, (2,), lambda: np.full(2, value), tmp_path)

    fetch(1.0)
    (path,) = tmp_path.iterdir()
    key = np.load(path)["key"]
    for wrong in (
        {"key": key, "grid": np.zeros(3)},
        {"key": key, "grid": np.full(2, np.nan)},
        {"key": key, "grid": np.array([None, None])},
        {"key": np.array("other"), "grid": np.zeros(2)},
        {"grid": np.zeros(2)},
    ):
        np.savez(path, **wrong)
        np.testing.assert_array_equal(fetch(2.0), [2.0, 2.0])
        path.unlink()


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(RuntimeWarning, match="SAFESHIELD_CACHE"):
        value = boat_value(26, 21, blocked / "below", refine=1)
    assert value.values.shape == (26, 21)


def test_boat_value_reads_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = boat_value(26, 21, tmp_path, refine=1)
    monkeypatch.setattr("safeshield.exact.boat._solve", None)
    again = boat_value(26, 21, tmp_path, refine=1)
    np.testing.assert_array_equal(first.values, again.values)
    with pytest.raises(TypeError):
        boat_value(26, 21, tmp_path, refine=1, current=1.9)
