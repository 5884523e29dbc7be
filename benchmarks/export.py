"""Compare shields that were exported to ONNX with the same shields in Python.

    python benchmarks/export.py equal --cases 100000   # minutes: decisions, case by case
    python benchmarks/export.py episodes               # minutes: whole episodes of the boat
    python benchmarks/export.py latency                # a minute: time of one decision

`equal` draws random cases (observations and actions in the spaces and around them) and adversarial
ones (NaN, infinity, numbers at and next to a bound, actions whose Q_h lies within rounding of the
threshold). The networks have random weights: the comparison asks whether two programs compute the
same, not whether a shield is good. It counts

- verdicts that differ: each must have Q_h within 1e-5 of the spread of h from the threshold;
- replacements that differ by more than 1e-5 although the verdicts agree: each must be what Python
  executes for a threshold that is 1e-5 of the spread of h higher or lower (with a support test, for
  a level that differs by 1e-5); or have the same Q_h or the same distance from the proposal (a
  tie); or one of the two actions lies that near to the threshold. Rounding decides in all of these.

Anything else is an error. Where V_h or Q_h is larger than 10 spreads of h, because a number of the
observation is far from the log, 1e-6 of it takes the place of 1e-5 of the spread.

`episodes` steps the boat with both, and compares every step. `latency` runs both in turn (A B A B),
on one thread, with critics 2 x (128, 128, 128), those of `ShieldConfig`. It counts the time of the
thread, which other processes disturb little. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.nn.actor import BEHAVIOUR
from safeshield.nn.flow import velocity_network
from safeshield.nn.mlp import EnsembleMLP
from safeshield.shield import CommittedFallback, NearestAcceptable, ProjectedGradient, Shield
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.support import SCORES, SupportRecord, SupportTest
from safeshield.values.constraint import ConstraintSource, SeveralConstraints
from safeshield.values.units import ADVANTAGE, CONSTRAINT, EXCESS, FALLBACK, SafetyScale

Array = npt.NDArray[Any]
BATCH = 2_000
"""Number of cases that are compared at once."""
Box = partial(gym.spaces.Box, dtype=np.float32)
DICT = gym.spaces.Dict(
    {
        "position": Box(-3.0, 3.0, (2,)),
        "gear": gym.spaces.Discrete(4, start=-1),
        "inner": gym.spaces.Dict({"switches": gym.spaces.MultiBinary(2), "speed": Box(0, 9, (1,))}),
    }
)


def random_shield(
    observations: gym.spaces.Space[Any],
    actions: gym.spaces.Space[Any],
    *,
    hidden: tuple[int, ...] = (64, 64),
    source: ConstraintSource | None = None,
    score: str = "",
    accept: float = 0.4,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401
) -> Shield:
    """Return a shield with random weights, whose delta accepts a share of uniform actions."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    seen, acts = flat_observations(observations), flat_actions(actions)
    rows = np.concatenate([seen.flatten(points(observations, 50, rng, 1.0))[0] for _ in range(20)])
    scaling = Scaling.of_rows(rows.astype(np.float32), seen, acts)
    wide, act = scaling.observation_features, scaling.action_features
    nets = {
        CONSTRAINT: EnsembleMLP(wide, 1, hidden),
        EXCESS: EnsembleMLP(wide, 1, hidden),
        ADVANTAGE: EnsembleMLP(wide + act, 1, hidden, 2),
    }
    if acts.discrete:
        nets[BEHAVIOUR] = EnsembleMLP(wide, len(acts.choices), hidden)
    else:
        nets[FALLBACK] = EnsembleMLP(wide + act, act, hidden)
        nets[BEHAVIOUR] = velocity_network(wide, act, hidden)
    weights = {
        name: {key: 2.0 * one.numpy() for key, one in net.init(generator).items()}
        for name, net in nets.items()
    }
    scale = SafetyScale(0.1, 0.8, 0.6)
    model = SafetyModel.of_networks(
        observations, actions, scaling, scale, weights, constraint=source
    )
    shield = Shield(model, trained_by="random weights", **settings)
    states, tried = points(observations, 500, rng, 1.0), points(actions, 500, rng, 1.0)
    given = h_of(shield, 500, rng)
    values = np.asarray(shield.value(states, tried, constraint=given))
    level = float(np.quantile(values[np.isfinite(values)], accept))
    if level > 0 and source is None:
        moved = replace(scale, offset=scale.offset - level - 0.05)
        shield = replace(shield, model=replace(model, scale=moved))
        level = -0.05
    shield = shield.with_delta(max(-level, 0.0))
    if score:
        scores = SCORES[score](shield.model, shield.states(rows[:500]), acts.flatten(tried)[0])
        record = SupportRecord(0.1, 0.01, 20, score, float(np.quantile(scores, 0.3)))
        shield = replace(shield, support=SupportTest(SCORES[score], record))
    return shield


SEVERAL = SeveralConstraints(
    [(ConstraintSource("clearance@1"), 0.5), (ConstraintSource("speed@1"), 0.25)]
)
SPACES = Box(-3.0, 3.0, (2,)), Box(-1.0, 2.0, (2,))
WIDE = Box(-np.inf, np.inf, (12,)), Box(-1.0, 1.0, (6,))
KINDS: dict[str, Callable[[], Shield]] = {
    "box of 2, fallback": partial(random_shield, *SPACES, replacement=CommittedFallback()),
    "box of 2, nearest": partial(random_shield, *SPACES),
    "box of 6, nearest": partial(random_shield, *WIDE, accept=0.2),
    "box of 6, gradient": partial(random_shield, *WIDE, replacement=ProjectedGradient(4)),
    "discrete": partial(random_shield, SPACES[0], gym.spaces.Discrete(5, start=2)),
    "multi-discrete": partial(random_shield, SPACES[0], gym.spaces.MultiDiscrete([3, 4])),
    "dict": partial(random_shield, DICT, SPACES[1], replacement=CommittedFallback()),
    "float64": partial(
        random_shield, *(gym.spaces.Box(-1.0, 1.0, (2,), np.float64) for _ in range(2))
    ),
    "constraint": partial(random_shield, *SPACES, source=ConstraintSource("caller@1")),
    "constraint, fallback": partial(
        random_shield, *SPACES, source=ConstraintSource("caller@1"), replacement=CommittedFallback()
    ),
    "several constraints": partial(random_shield, *SPACES, source=SEVERAL),
    "support, noise": partial(random_shield, *SPACES, score="noise"),
    "support, ensemble": partial(random_shield, *SPACES, score="ensemble"),
    "support, fallback": partial(
        random_shield, *SPACES, score="noise", replacement=CommittedFallback()
    ),
    "support, discrete": partial(
        random_shield, SPACES[0], gym.spaces.Discrete(5), score="probability"
    ),
}


# -- cases -----------------------------------------------------------------------------------------


def points(space: gym.Space[Any], count: int, rng: np.random.Generator, reach: float = 1.2) -> Any:  # noqa: ANN401
    """Return points of a space; in a Box, and in integers for `reach` above 1, also around it."""
    if isinstance(space, gym.spaces.Dict):
        return {key: points(part, count, rng, reach) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Box):
        low, high = np.maximum(space.low, -3.0), np.minimum(space.high, 3.0)
        drawn = (low + high) / 2 + reach * (high - low) / 2 * rng.uniform(
            -1.0, 1.0, (count, *space.shape)
        )
        return drawn.astype(space.dtype)
    space.seed(int(rng.integers(2**31)))
    drawn = np.array([space.sample() for _ in range(count)])
    if reach > 1.0:
        some = rng.random(count) < 0.02
        drawn[some] = rng.choice([-7, -1, 9, 120], drawn[some].shape)
    return drawn


def spoiled(points: Any, space: gym.Space[Any], rng: np.random.Generator, share: float) -> Any:  # noqa: ANN401
    """Put numbers that programs get wrong into a share of the rows: NaN, infinity, bounds."""
    if isinstance(space, gym.spaces.Dict):
        return {
            key: spoiled(points[key], part, rng, share / 2) for key, part in space.spaces.items()
        }
    if not isinstance(space, gym.spaces.Box):
        return points
    points = points.copy()
    rows = np.flatnonzero(rng.random(len(points)) < share)
    low = np.broadcast_to(np.maximum(space.low, -5), points[rows].shape)
    high = np.broadcast_to(np.minimum(space.high, 5), points[rows].shape)
    kinds = [
        np.nan, np.inf, -np.inf, 1e30, -3e38, 0.0, 1e-42, 1e6, 5.19e6, low, high,
        np.nextafter(low, -np.inf, dtype=space.dtype),
        np.nextafter(high, np.inf, dtype=space.dtype),
        np.nextafter(high, -np.inf, dtype=space.dtype),
    ]  # fmt: skip
    which = rng.integers(len(kinds), size=points[rows].shape)
    values = np.choose(which, np.broadcast_arrays(*kinds))
    keep = rng.random(points[rows].shape) < 0.5
    points[rows] = np.where(keep, points[rows], values)
    return points


def h_of(shield: Shield, count: int, rng: np.random.Generator, broken: float = 0.0) -> Any:  # noqa: ANN401
    """Return h of n states for a shield whose caller tells it, else None."""
    source = shield.model.constraint
    if source is None:
        return None
    given = {name: rng.normal(-0.3, 0.5, count) for name in source.names}
    for h in given.values():
        h[rng.random(count) < broken] = rng.choice([np.nan, np.inf, -np.inf])
    return given if len(given) > 1 else next(iter(given.values()))


@dataclass(frozen=True)
class Cases:
    """n observations, proposed actions and, where the shield needs it, h."""

    states: Any
    actions: Array
    h: Any


def cases(shield: Shield, count: int, rng: np.random.Generator) -> Cases:
    """Return n cases. In a fifth of them, Q_h lies within rounding of the threshold."""
    space = shield.action_space
    states = spoiled(
        points(shield.observation_space, count, rng), shield.observation_space, rng, 0.06
    )
    actions, h = points(space, count, rng), h_of(shield, count, rng, 0.02)
    if isinstance(space, gym.spaces.Box):
        edge = count // 5
        actions[:edge] = at_the_threshold(shield, states, actions, h, rng)[:edge]
    return Cases(states, spoiled(actions, space, rng, 0.06), h)


def at_the_threshold(
    shield: Shield,
    states: Any,  # noqa: ANN401
    actions: Array,
    h: Any,  # noqa: ANN401
    rng: np.random.Generator,
) -> Array:
    """Return actions between an accepted and a rejected one, found by bisection."""
    other = points(shield.action_space, len(actions), rng, 1.0)
    good, bad = points(shield.action_space, len(actions), rng, 1.0), other

    def accepted(tried: Array) -> Array:
        return np.asarray(shield.value(states, tried, constraint=h)) <= shield.threshold

    swap = (accepted(bad) & ~accepted(good)).reshape(-1, *[1] * (actions.ndim - 1))
    good, bad = np.where(swap, bad, good), np.where(swap, good, bad)
    split = (accepted(good) & ~accepted(bad)).reshape(swap.shape)
    for _ in range(30):
        middle = ((good + bad) / 2).astype(actions.dtype)
        inside = accepted(middle).reshape(swap.shape)
        good, bad = np.where(inside, middle, good), np.where(inside, bad, middle)
    return np.where(split, np.where(rng.random(swap.shape) < 0.5, good, bad), actions)


# -- the comparison --------------------------------------------------------------------------------


class Exported:
    """An exported shield in ONNX Runtime, on one thread."""

    def __init__(self, shield: Shield, path: Path, **options: Any) -> None:  # noqa: ANN401
        self.contents = shield.export_onnx(path, **options)
        self.session = session(path)

    def __call__(self, given: Cases, **more: Any) -> dict[str, Array]:  # noqa: ANN401
        """Return the outputs by name."""
        feed = {**flattened("observation", given.states), **more}
        if given.actions is not None:
            feed["action"] = given.actions
        if given.h is not None:
            feed |= flattened("constraint", given.h)
        names = [one.name for one in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feed), strict=True))


def session(path: Path) -> Any:  # noqa: ANN401
    """Return an ONNX Runtime session of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # "delta" may be given, and is no constant: not worth a warning
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def flattened(name: str, given: Any) -> dict[str, Array]:  # noqa: ANN401
    """Return the entries of a dict as named inputs."""
    if not isinstance(given, dict):
        return {name: np.asarray(given)}
    return {
        key: part for k, v in given.items() for key, part in flattened(f"{name}/{k}", v).items()
    }


def compare(shield: Shield, told: dict[str, Array], given: Cases) -> dict[str, int]:
    """Raise AssertionError where a decision differs without reason; return what was counted."""
    rows, _ = shield.observation_rows(given.states)
    proposed, _ = shield.action_rows(given.actions)
    judged = shield.states(rows, shield._given(given.h, len(rows)))
    spread = shield.model.scale.spread
    # Where an observation is a million standard deviations away, so are the values, and rounding:
    # 3e-6 of a value is some 25 units of its last float32 digit.
    corner = np.broadcast_to(shield.model.action_codec.low.astype(np.float32), proposed.shape)
    size = np.maximum(np.abs(judged.value), np.abs(shield.model.action_values(judged, corner)))
    near = 1e-5 * np.maximum(spread, 0.3 * size.astype(np.float64))
    answers = [
        one.filter_rows(judged, rows, proposed, shield.threshold + shift * near)
        for one in shifted(shield)
        for shift in (0.0, 1.0, -1.0)
    ]
    executed, report = answers[0]
    found, accepted = told["action_executed"], told["accepted"]
    assert found.dtype == given.actions.dtype
    found = found.reshape(executed.shape)
    np.testing.assert_array_equal(told["valid"], report.valid)
    for name in ("value", "proposed_value", "state_value"):
        one, other = getattr(report, name), told[name]
        assert (np.isinf(one) == np.isinf(other)).all(), name
        if name != "value":
            known = np.isfinite(one)
            off = np.abs(other[known].astype(np.float64) - one[known])
            assert (off <= 20 * near[known]).all(), (name, off.max())
    # An accepted action is executed bit for bit.
    np.testing.assert_array_equal(found[accepted], proposed[accepted])
    same = [np.isclose(found, each, rtol=1e-5, atol=1e-5).all(1) for each, _ in answers]
    verdict = [accepted != one.intervened for _, one in answers]
    settled = [told["acceptable"] == one.acceptable for _, one in answers]
    # Two candidates of the same Q_h: rounding decides which of them is executed.
    values = np.asarray(shield.model.action_values(judged, found.astype(proposed.dtype)))
    best = np.asarray(shield.model.action_values(judged, executed.astype(proposed.dtype)))
    tie = np.abs(values - best) <= near
    edge = np.minimum(np.abs(values - shield.threshold), np.abs(best - shield.threshold)) <= near
    # Two acceptable candidates that are equally near to the proposal, but for rounding.
    apart = [distances(shield, judged, proposed, report.valid, one) for one in (found, executed)]
    even = np.isclose(*apart, rtol=1e-5, atol=1e-5) & np.any(settled, axis=0)
    alike = np.any(verdict, axis=0) & (np.any(same, axis=0) | tie | edge | even)
    bad = ~alike | ~np.any(settled, axis=0)
    assert not bad.any(), (np.flatnonzero(bad), found[bad], executed[bad], values[bad], best[bad])
    return {
        "cases": len(found),
        "accepted": int((~report.intervened).sum()),
        "invalid": int((~report.valid).sum()),
        "verdicts that differ": int((~verdict[0]).sum()),
        "replacements that differ": int((verdict[0] & ~same[0]).sum()),
        "of these ties": int((verdict[0] & ~np.any(same, axis=0) & (tie | even)).sum()),
    }


def distances(
    shield: Shield, states: StateValue, proposed: Array, valid: Array, actions: Array
) -> Array:
    """Return the distances of executed actions from the proposed ones, in half widths."""
    model = shield.model
    box = model.action_codec
    own = model.fallback_alone(states)
    wanted = np.where(valid[:, None], np.clip(proposed, box.low, box.high), own)
    features = [model.scaling.actions(one.astype(np.float32)) for one in (wanted, actions)]
    return np.asarray(np.square(features[0] - features[1]).sum(-1))


def shifted(shield: Shield) -> list[Shield]:
    """Return the shield, and with a support test also two whose level differs by rounding."""
    test = shield.support
    if test is None:
        return [shield]
    level = test.record.level
    levels = [level + 1e-5 * max(abs(level), 1.0) * step for step in (0.0, 1.0, -1.0)]
    return [
        replace(shield, support=SupportTest(test.score, replace(test.record, level=one)))
        for one in levels
    ]


def equal(count: int, kinds: list[str], seed: int = 0) -> dict[str, dict[str, int]]:
    """Return what `compare` counted for each kind of shield in `count` cases."""
    out: dict[str, dict[str, int]] = {}
    for kind in kinds:
        shield = KINDS[kind]()
        with tempfile.TemporaryDirectory() as folder:
            exported = Exported(shield, Path(folder) / "shield.onnx")
        rng = np.random.default_rng(seed)
        sums: dict[str, int] = {}
        for start in range(0, count, BATCH):
            given = cases(shield, min(BATCH, count - start), rng)
            for name, number in compare(shield, exported(given), given).items():
                sums[name] = sums.get(name, 0) + number
        out[kind] = sums
    return out


def episodes(count: int, seed: int = 0) -> dict[str, Any]:
    """Step the boat behind both shields, resets included, and compare them in every step.

    Python's action is executed, so that both see the same states. The verdicts that differ are
    counted as in `equal`.
    """
    envs = gym.make_vec("safeshield/Boat-v0", 50, vectorization_mode="vector_entry_point")
    spaces = envs.single_observation_space, envs.single_action_space
    out: dict[str, Any] = {}
    for name, settings in (("fallback", CommittedFallback()), ("nearest", NearestAcceptable())):
        shield = random_shield(*spaces, replacement=settings, accept=0.6)
        with tempfile.TemporaryDirectory() as folder:
            exported = Exported(shield, Path(folder) / "shield.onnx")
        rng = np.random.default_rng(seed)
        states, _ = envs.reset(seed=seed)
        sums: dict[str, int] = {"episodes": 0}
        while sums["episodes"] < count:
            actions = rng.uniform(-1.0, 1.0, envs.action_space.shape).astype(np.float32)
            given = Cases(states, actions, None)
            for key, number in compare(shield, exported(given), given).items():
                sums[key] = sums.get(key, 0) + number
            executed, _ = shield.filter(states, actions)
            states, _, ended, cut, _ = envs.step(executed)
            sums["episodes"] += int((ended | cut).sum())
        out[name] = sums
    envs.close()
    return out


def latency(rounds: int = 7, calls: int = 200) -> dict[str, dict[str, float]]:
    """Return median microseconds of a decision by both, accepted and rejected, and their ratio.

    The rounds alternate (A B A B), and the ratio is the median of the rounds' ratios.
    """
    out: dict[str, dict[str, float]] = {}
    for name, strategy, spaces in (
        ("box of 2, fallback", CommittedFallback(), SPACES),
        ("box of 2, nearest", NearestAcceptable(), SPACES),
        ("box of 6, nearest", NearestAcceptable(), WIDE),
    ):
        shield = random_shield(*spaces, hidden=(128, 128, 128), replacement=strategy)
        with tempfile.TemporaryDirectory() as folder:
            exported = Exported(shield, Path(folder) / "shield.onnx")
        rng = np.random.default_rng(1)
        states, actions = points(spaces[0], 400, rng, 1.0), points(spaces[1], 400, rng, 1.0)
        report = shield.filter(states, actions)[1]
        for what, rows in (
            ("accepted", np.flatnonzero(~report.intervened)),
            ("rejected", np.flatnonzero(report.intervened)),
        ):
            rows = rows[np.arange(calls) % len(rows)]

            python = partial(_python_time, shield, states, actions)
            graph = partial(_graph_time, exported.session, states, actions)
            python(rows[:20]), graph(rows[:20])
            pairs = [(python(rows), graph(rows)) for _ in range(rounds)]
            out[f"{name}, {what}"] = {
                "python": float(np.median([a for a, _ in pairs])),
                "onnx": float(np.median([b for _, b in pairs])),
                "onnx / python": float(np.median([b / a for a, b in pairs])),
            }
    return out


def _python_time(shield: Shield, states: Array, actions: Array, rows: Array) -> float:
    """Return microseconds of the thread in a call of `Shield.filter`."""
    started = time.thread_time()
    for i in rows:
        shield.filter(states[i], actions[i])
    return (time.thread_time() - started) / len(rows) * 1e6


def _graph_time(session: Any, states: Array, actions: Array, rows: Array) -> float:  # noqa: ANN401
    """Return microseconds of the thread in a call of the graph."""
    names = ["action_executed", "value", "accepted", "certified", "valid"]
    feeds = [{"observation": states[i : i + 1], "action": actions[i : i + 1]} for i in rows]
    started = time.thread_time()
    for feed in feeds:
        session.run(names, feed)
    return (time.thread_time() - started) / len(rows) * 1e6


def main() -> None:
    """Run the comparison that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["equal", "episodes", "latency"])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.what == "episodes":
        for name, counts in episodes(arguments.episodes).items():
            print(f"{name}: {counts}")
        return
    if arguments.what == "latency":
        for name, times in latency().items():
            print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in times.items()))
        return
    for kind in arguments.kinds:
        started = time.process_time()
        found = equal(arguments.cases, [kind])[kind]
        print(f"{kind}: {found}, {time.process_time() - started:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
