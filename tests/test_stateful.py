"""The three wrappers under any order of calls, failures and strange actions.

A state machine of hypothesis resets, steps and closes a shielded environment whose plants fail, lie
and end as they are told, and passes it actions of every kind. The plants keep what they received
and what they showed. This record alone says what the shield had to decide: `Shield.filter` is asked
by hand about the state that was shown before the action. The last tests break the wrappers, and the
machines must notice.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hostile import Changes, Lies
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from stable_baselines3.common.vec_env import DummyVecEnv

from safeshield.envs.double_integrator import constraint, next_state
from safeshield.envs.vector import BEFORE_1_0, autoreset_modes
from safeshield.monitoring import FlightLog, PromiseMonitor, ShieldLog
from safeshield.monitoring.recorder import FlightTrack
from safeshield.rollouts.infos import FINAL_INFO
from safeshield.shield import Shield
from safeshield.shield.runtime import ShieldRuntime, Transition
from safeshield.values.constraint import ConstraintSource
from safeshield.wrappers import SafetyShield, VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield

Array = npt.NDArray[Any]
Start = tuple[float, float]
N = 3
KEYS = {
    "shield/intervened", "shield/value", "shield/threshold", "shield/certified", "shield/safe_set",
    "action_proposed", "action_executed",
}  # fmt: skip
WATCHED = {"shield/promise", "shield/promise_evidence", "shield/promise_signature"}

# -- the plant -------------------------------------------------------------------------------------

LIES = ("silent", "nan", "violation", "write", "terminate", "truncate")
"""What a plant may do in a step that succeeds; silence fails where the shield needs a report."""
FAILURES = ("raise", "raise late", "shape", "no infos")
"""What must end a step with an error."""
RESET_FAULTS = ("raise", "shape", "no infos", "silent", "nan")
STARTS = [(0.0, 0.0), (-0.3, 0.4), (0.6, 0.4), (0.6, 0.9), (0.8, 1.2)]


class PlantError(Exception):
    """The plant has failed."""


class Plant(gym.Env[Any, Any]):
    """A cart that does as it is told, and keeps what it was sent and what it has shown."""

    def __init__(self) -> None:
        judge = calibrated()
        self.observation_space, self.action_space = judge.observation_space, judge.action_space
        self.start: Start = STARTS[0]
        self.next_step = self.next_reset = ""
        self.state = np.zeros(2)
        self.received: list[Any] = []
        self.resets = 0
        self.shown = np.zeros(2, np.float32)
        """The observation that was returned last."""
        self.told: float | None = None
        """h that was reported last."""
        self.failed = ""
        self.last: tuple[Array, float | None] | None = None
        """Observation and h with which the last episode ended."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        fault, self.next_reset = self.next_reset, ""
        self.resets += 1
        if fault == "raise":
            self.failed = fault
            raise PlantError("reset")
        self.state = np.array(self.start)
        return self._show(fault, 0.0)

    def step(self, action: Any) -> Any:  # noqa: ANN401
        fault, self.next_step = self.next_step, ""
        self.received.append((type(action), np.array(action)))
        if fault == "raise":
            self.failed = fault
            raise PlantError("step")
        self.state = next_state(self.state, action)
        if fault == "write":
            action[...] = 9.0
        if fault == "raise late":
            self.failed = fault
            raise PlantError("after the step")
        observation, info = self._show(fault, float(fault == "violation"))
        ends = fault == "terminate", fault == "truncate"
        if any(ends):
            self.last = self.shown.copy(), self.told
        return observation, 1.0, *ends, info

    def _show(self, fault: str, cost: float) -> Any:  # noqa: ANN401
        self.shown = np.array(self.state, np.float32)
        if fault == "nan":
            self.shown[0] = np.nan
        self.told = None if fault == "silent" else float(constraint(self.state)) + 9.0 * cost
        info: Any = {} if fault == "silent" else {"constraint": self.told, "cost": cost}
        shown: Any = self.shown.copy()
        if fault == "shape":
            shown = np.zeros(3, np.float32)
        if fault == "no infos":
            info = None
        if fault in FAILURES:
            self.failed = fault
        return shown, info


# -- actions ---------------------------------------------------------------------------------------

FOREIGN: dict[str, Callable[[Array], Any]] = {
    "float32": lambda a: a.astype("f4"),
    "float64": lambda a: a.astype("f8"),
    "list": lambda a: a.tolist(),
    "tensor": torch.as_tensor,
    "changes": Changes,
    "lies": lambda a: a.view(Lies),
    "masked": lambda a: np.ma.masked_array(a, mask=True),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}
"""Objects that stand for an action. Each is the action at its first reading."""
REFUSED: dict[str, Callable[[Array], Any]] = {
    "none": lambda a: None,
    "text": lambda a: a.astype(str),
    "complex": lambda a: a + 1j,
    "shape": lambda a: np.stack([a, a]),
    "empty": lambda a: a[:0],
    "dict": lambda a: {"action": a},
}
"""Objects that stand for none."""
PLACES = st.integers(0, N - 1)
NUMBERS = st.one_of(
    *[st.floats(-1.0, 1.0, width=32)] * 4,
    st.sampled_from([np.nan, np.inf, -np.inf, 1.3, -9.0, 1e300]),
)
ACTIONS = st.lists(NUMBERS, min_size=N, max_size=N)

# -- the shields -----------------------------------------------------------------------------------


@cache
def calibrated() -> Shield:
    """A small shield of the cart with a record."""
    return Shield.load(Path(__file__).parent / "golden" / "shield_calibrated.safetensors")


@cache
def asking() -> Shield:
    """The same shield, which needs the report of h of each state."""
    return calibrated().with_constraint(ConstraintSource("reported@1"))


# -- the machine -----------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Calls a wrapper in any order, and compares it with the plants' record."""

    kind = "single"
    mode = ""
    count = 1

    @initialize(asks=st.booleans(), watched=st.booleans())
    def make(self, asks: bool, watched: bool) -> None:
        """Put plants behind a shield, with a recorder, and with a monitor where there is one."""
        self.judge = asking() if asks else calibrated()
        self.folder = tempfile.TemporaryDirectory()
        self.log = ShieldLog(Path(self.folder.name) / "flight", block_steps=64)
        self.monitor = PromiseMonitor(self.judge) if watched and not asks else None
        self.keys = KEYS | (WATCHED if self.monitor is not None else set())
        self.plants = [Plant() for _ in range(self.count)]
        self.env = self.wrap([lambda p=p: p for p in self.plants])
        self.known = self.closed = False
        self.over = np.zeros(self.count, np.bool_)
        """Whether no action may run, because an episode is over."""
        self.ended = self.over.copy()
        """Whether actions run behind the end of an episode, as only a single environment lets."""
        self.covered = np.zeros(self.count, np.bool_)
        self.vouched = self.judge.record is not None
        # What the flight must hold: for each environment the actions that were sent to it.
        self.sent: list[list[Array]] = [[] for _ in range(self.count)]
        self.intervened = self.reported = 0

    def wrap(self, makers: list[Any]) -> Any:  # noqa: ANN401
        """Return the shielded environment."""
        return SafetyShield(makers[0](), self.judge, monitor=self.monitor, log=self.log)

    # -- rules --------------------------------------------------------------------------------

    @rule(start=st.sampled_from(STARTS))
    def reset(self, start: Start) -> None:
        """Reset all environments."""
        self.prepare(start)
        self.attempt_reset(np.ones(self.count, np.bool_), lambda: self.env.reset())

    @rule(start=st.sampled_from(STARTS), which=PLACES, fault=st.sampled_from(RESET_FAULTS))
    def bad_reset(self, start: Start, which: int, fault: str) -> None:
        """Reset all environments, one of which fails or lies."""
        self.prepare(start)
        self.plants[which % self.count].next_reset = fault
        self.attempt_reset(np.ones(self.count, np.bool_), lambda: self.env.reset())

    @rule(
        numbers=ACTIONS, form=st.sampled_from(sorted(FOREIGN)), start=st.sampled_from(STARTS),
        lies=st.dictionaries(PLACES, st.sampled_from(LIES), max_size=N),
    )  # fmt: skip
    def step(self, numbers: list[float], form: str, start: Start, lies: dict[int, str]) -> None:
        """Take a step of all environments, some of which end or lie."""
        self.prepare(start)
        for which, lie in lies.items():
            self.plants[which % self.count].next_step = lie
        self.attempt_step(numbers, form)

    @rule(seed=st.integers(0, 99), count=st.integers(2, 6))
    def steps(self, seed: int, count: int) -> None:
        """Take some steps with random actions."""
        rng = np.random.default_rng(seed)
        for _ in range(count):
            self.prepare()
            self.attempt_step(rng.uniform(-1.2, 1.2, N).tolist(), "float32")

    @rule(
        numbers=ACTIONS, form=st.sampled_from(sorted(FOREIGN)),
        which=PLACES, fault=st.sampled_from([*FAILURES, "terminate", "truncate"]),
        after=st.sampled_from(RESET_FAULTS), start=st.sampled_from(STARTS),
    )  # fmt: skip
    def bad_step(
        self, numbers: list[float], form: str, which: int, fault: str, after: str, start: Start
    ) -> None:
        """Take a step of all environments, one of which fails, in the step or in its reset."""
        self.prepare(start)
        plant = self.plants[which % self.count]
        plant.next_step, plant.next_reset = fault, after
        self.attempt_step(numbers, form)

    @rule(form=st.sampled_from(sorted(REFUSED)))
    def step_with_no_action(self, form: str) -> None:
        """Pass what is no action: it is refused, and changes nothing."""
        action = np.zeros((1,) if self.kind == "single" else (self.count, 1), np.float32)
        received, known = self.received(), self.known
        with pytest.raises((TypeError, ValueError, gym.error.ResetNeeded, RuntimeError)):
            self.act(REFUSED[form](action))
        assert self.received() == received, "a refused action reached the plant"
        self.known = known

    @rule()
    def close(self) -> None:
        """Close the environments; whoever goes on without a reset is refused or judged."""
        if not self.closed:
            self.env.close()
            self.closed = True
            self.check_flight()
            self.make(self.judge is asking(), self.monitor is not None)

    # -- calls --------------------------------------------------------------------------------

    def act(self, action: Any) -> Any:  # noqa: ANN401
        """Step the wrapper."""
        return self.env.step(action)

    def prepare(self, start: Start | None = None) -> None:
        """Tell the plants to do nothing but their work, and where they start."""
        for plant in self.plants:
            plant.next_step = plant.next_reset = plant.failed = ""
            plant.last = None
            plant.start = plant.start if start is None else start

    def attempt_step(self, numbers: list[float], form: str) -> None:
        """Take a step with actions in one form; where a reset is due it must be refused first."""
        proposed = np.array(numbers[: self.count], np.float64)
        proposed = proposed if self.kind == "single" else proposed[:, None]
        if form != "float64":
            proposed = np.clip(proposed, -3e38, 3e38).astype(np.float32)
        if not self.known or (self.mode == "Disabled" and self.over.any()):
            self.refused(FOREIGN[form](proposed.copy()))
            told = [(plant.next_step, plant.next_reset) for plant in self.plants]
            self.reset(self.plants[0].start)
            for plant, (at_step, at_reset) in zip(self.plants, told, strict=True):
                plant.next_step, plant.next_reset = at_step, at_reset
        self.taken(proposed, FOREIGN[form](proposed.copy()))

    def attempt_reset(self, mask: Array, reset: Callable[[], Any]) -> None:
        """Reset the environments in the mask, and compare what is returned."""
        before = self.received()
        try:
            result = reset()
        except Exception as error:
            self.must_have_failed(error, mask)
            return
        finally:
            assert self.received() == before, "an action ran in a reset"
        assert not self.failures(mask), "a failure was not noticed"
        self.known, self.over, self.ended = True, self.over & ~mask, self.ended & ~mask
        self.begun(mask)
        for i in np.flatnonzero(mask):
            told = self.told_at_reset(result, i)
            assert self.keys <= set(told)
            assert not told["shield/intervened"]
            assert np.isnan(told["action_executed"]).all()
            assert bool(told["shield/certified"]) == self.covered[i]

    def refused(self, action: Any) -> None:  # noqa: ANN401
        """Take a step that must be refused, because a reset is due."""
        before = self.received()
        with pytest.raises((gym.error.ResetNeeded, RuntimeError), match=r"reset"):
            self.act(action)
        assert self.received() == before, "an action ran although a reset was due"

    def taken(self, proposed: Array, action: Any) -> None:  # noqa: ANN401
        """Take a step, and compare what the plants received with what the shield decides."""
        seen, h = self.seen(), self.reported_h()
        expected, report = self.judge.filter(seen, proposed, constraint=h)
        expected = np.reshape(expected, (self.count, 1))
        replaced = np.reshape(report.intervened, self.count)
        acts = ~self.over
        lengths = [len(plant.received) for plant in self.plants]
        error: Exception | None = None
        result: Any = None
        try:
            result = self.act(action)
        except Exception as raised:
            error = raised
        for i, plant in enumerate(self.plants):
            got = plant.received[lengths[i] :]
            assert len(got) <= 1, "a step sent two actions"
            if got:
                assert acts[i], "the action of an episode that is over ran"
                (kind, sent), space = got[0], plant.action_space
                assert kind is np.ndarray
                assert sent.dtype == space.dtype
                assert not np.isnan(sent).any(), "NaN reached the plant"
                assert space.contains(sent)
                assert np.array_equal(sent, expected[i]), (
                    f"environment {i} received {sent}, which the shield does not choose in the "
                    f"state {plant.shown} before; it chooses {expected[i]}"
                )
        # A single environment that steps on behind an end is in no episode, so not in the flight.
        for i in np.flatnonzero(acts & ~self.ended):
            self.sent[i].append(expected[i])
        if error is not None:
            self.must_have_failed(error, np.ones(self.count, np.bool_))
            return
        assert not self.failures(np.ones(self.count, np.bool_)), "a failure was not noticed"
        for i in np.flatnonzero(acts):
            assert len(self.plants[i].received) == lengths[i] + 1, "an action was not sent"
        self.intervened += int((replaced & acts).sum())
        self.compare_step(result, acts, expected, replaced)

    def compare_step(self, result: Any, acts: Array, expected: Array, replaced: Array) -> None:  # noqa: ANN401
        """Compare infos with the record, and note which episodes are over."""
        ended = np.array([plant.last is not None for plant in self.plants])
        at_once = self.mode in ("SameStep", "sb3")
        self.withdraw(acts & ~(ended & at_once))
        for i in range(self.count):
            told = self.told_of_step(result, i, bool(ended[i]))
            assert self.keys <= set(told)
            if acts[i]:
                assert np.array_equal(told["action_executed"], expected[i])
                assert bool(told["shield/intervened"]) == replaced[i]
                assert bool(told["shield/certified"]) == self.covered[i]
                self.reported += int(told["shield/intervened"])
            else:
                assert np.isnan(told["action_executed"]).all()
                assert not told["shield/intervened"]
        starts = ended & at_once | ~acts
        if starts.any():
            self.begun(starts)
        self.ended |= ended & (self.kind == "single")
        self.over = ended & (self.mode in ("NextStep", "Disabled"))
        for i in np.flatnonzero(starts & at_once):
            told = self.told_at_reset(result[::4], i)
            assert self.keys <= set(told), "the new episode lacks infos"
            assert bool(told["shield/certified"]) == self.covered[i]
        assert self.reported == self.intervened

    # -- the record ---------------------------------------------------------------------------

    def received(self) -> list[int]:
        return [len(plant.received) for plant in self.plants]

    def seen(self) -> Array:
        """Return the observations that the plants have shown last."""
        rows = np.stack([plant.shown for plant in self.plants])
        return rows[0] if self.kind == "single" else rows

    def reported_h(self) -> Any:  # noqa: ANN401
        """Return h as the plants have reported it last; None where the shield needs none."""
        if self.judge is not asking():
            return None
        told = [np.nan if plant.told is None else plant.told for plant in self.plants]
        return told[0] if self.kind == "single" else np.array(told)

    def failures(self, mask: Array) -> list[str]:
        """Return what must have ended the call with an error."""
        faults = [plant.failed for plant in self.plants if plant.failed]
        if self.judge is asking():
            silent = [
                plant.told is None or (plant.last is not None and plant.last[1] is None)
                for plant in itertools.compress(self.plants, mask)
            ]
            faults += ["silent"] * sum(silent)
        return faults

    def must_have_failed(self, error: Exception, mask: Array) -> None:
        """Check that a plant has failed; then nothing is known, and only a reset works."""
        if not self.failures(mask):
            raise error
        self.known = False
        self.covered[:] = False
        self.over[:] = False

    def values(self) -> Array:
        """Return V_h of the states shown last, infinity where they cannot be read."""
        found = np.reshape(self.judge.value(self.seen(), constraint=self.reported_h()), self.count)
        readable = np.isfinite(np.reshape(self.seen(), (self.count, -1))).all(axis=1)
        return np.where(readable, found, np.inf)

    def begun(self, starts: Array) -> None:
        """Note which of the episodes that begin are certified."""
        vouched = self.vouched and not (self.monitor is not None and self.monitor.revoked)
        values = self.values()
        bad = np.array([plant.told is not None and plant.told > 0 for plant in self.plants])
        safe = vouched & (values <= self.judge.threshold) & ~bad
        self.covered = np.where(starts, safe, self.covered & vouched)

    def withdraw(self, where: Array) -> None:
        """Certify no more what violates or cannot be read in the states reached."""
        for i in np.flatnonzero(where):
            plant = self.plants[i]
            unreadable = not np.isfinite(plant.shown).all()
            self.covered[i] &= not (unreadable or (plant.told is not None and plant.told > 0))
        if self.monitor is not None and self.monitor.revoked:
            self.covered[:] = False

    def check_flight(self) -> None:
        """Compare the flight with the plants' record, once it is closed."""
        files, sent = list(self.log.path.glob("*.flight")), any(self.sent)
        flight = FlightLog.load(self.log.path) if files else None
        self.folder.cleanup()
        assert bool(flight) == sent, "the flight lacks all steps"
        if flight is None:
            return
        assert (flight.lost, flight.torn, flight.closed) == (0, 0, True)
        for i, sent in enumerate(self.sent):
            rows = flight.columns["executed"][flight.columns["env"] == i]
            assert np.array_equal(rows, np.reshape(np.array(sent, np.float64), (-1, 1)))

    # -- infos --------------------------------------------------------------------------------

    def told_at_reset(self, result: Any, i: int) -> dict[str, Any]:  # noqa: ANN401
        """Return the infos of environment i after a reset."""
        return dict(result[1])

    def told_of_step(self, result: Any, i: int, ended: bool) -> dict[str, Any]:  # noqa: ANN401
        """Return the infos about the step of environment i."""
        return dict(result[-1])

    def row(self, infos: Any, i: int) -> dict[str, Any]:  # noqa: ANN401
        """Return the shield's infos of environment i that their masks say are there."""
        return {
            key: column[i]
            for key, column in infos.items()
            if key in self.keys and infos[f"_{key}"][i]
        }

    def teardown(self) -> None:
        """Close, and compare the flight."""
        if hasattr(self, "env"):
            self.env.close()
            self.check_flight()


class VectorMachine(Machine):
    """`VectorSafetyShield` in one of the modes of Gymnasium's vector environments."""

    kind, count = "vector", N

    def wrap(self, makers: list[Any]) -> Any:  # noqa: ANN401
        given = {}
        if not BEFORE_1_0 and len(autoreset_modes()) > 1:
            given = {"autoreset_mode": gym.vector.AutoresetMode(self.mode)}
        env = gym.vector.SyncVectorEnv(makers, **given)
        return VectorSafetyShield(env, self.judge, monitor=self.monitor, log=self.log)

    def told_at_reset(self, result: Any, i: int) -> dict[str, Any]:  # noqa: ANN401
        return self.row(result[1], i)

    def told_of_step(self, result: Any, i: int, ended: bool) -> dict[str, Any]:  # noqa: ANN401
        if self.mode == "SameStep" and ended:
            final = result[-1][FINAL_INFO]
            return dict(final[i]) if isinstance(final, np.ndarray) else self.row(final, i)
        return self.row(result[-1], i)


class NextStepMachine(VectorMachine):
    mode = "NextStep"


class SameStepMachine(VectorMachine):
    mode = "SameStep"


class DisabledMachine(VectorMachine):
    mode = "Disabled"

    @rule(
        mask=st.lists(st.booleans(), min_size=N, max_size=N), start=st.sampled_from(STARTS),
        fault=st.sampled_from(["", "", *RESET_FAULTS]),
    )  # fmt: skip
    def reset_some(self, mask: list[bool], start: Start, fault: str) -> None:
        """Reset the environments in a mask, which leaves out none whose state is not known."""
        which = np.array(mask)
        options = {"reset_mask": which.copy()}
        if not which.any() or (not self.known and not which.all()):
            before = self.received()
            with pytest.raises((ValueError, gym.error.ResetNeeded), match="reset"):
                self.env.reset(options=options)
            assert self.received() == before
            return
        self.prepare(start)
        self.plants[int(which.argmax())].next_reset = fault
        self.attempt_reset(which, lambda: self.env.reset(options=options))


class SB3Machine(Machine):
    """`VecSafetyShield` around a `DummyVecEnv`."""

    kind, mode, count = "sb3", "sb3", N

    def wrap(self, makers: list[Any]) -> Any:  # noqa: ANN401
        return VecSafetyShield(DummyVecEnv(makers), self.judge, monitor=self.monitor, log=self.log)

    @rule()
    def wait_for_nothing(self) -> None:
        """Wait for a step that was not begun: nothing may run."""
        before = self.received()
        with pytest.raises(RuntimeError, match="step_async"):
            self.env.step_wait()
        assert self.received() == before

    def told_at_reset(self, result: Any, i: int) -> dict[str, Any]:  # noqa: ANN401
        return dict(self.env.reset_infos[i])

    def told_of_step(self, result: Any, i: int, ended: bool) -> dict[str, Any]:  # noqa: ANN401
        return dict(result[-1][i])


MACHINES: list[type[Machine]] = [Machine, SB3Machine]
MACHINES += [
    one
    for one in (NextStepMachine, SameStepMachine, DisabledMachine)
    if one.mode in autoreset_modes()
]


def play(machine: type[Machine], examples: int, **options: Any) -> None:  # noqa: ANN401
    """Run a machine; `options` are settings of hypothesis."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
                **options,
            ),
        )


@pytest.mark.parametrize("machine", MACHINES, ids=lambda one: one.__name__)
def test_any_order_of_calls(machine: type[Machine]) -> None:
    play(machine, 8)


# -- interrupts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["", "terminate"])
def test_an_interrupt_at_any_line_of_a_step(tmp_path: Path, ends: str) -> None:
    """Ctrl-C in a notebook that goes on: no action runs unjudged, and no row is of no step."""
    judge, plant = calibrated(), Plant()
    log = ShieldLog(tmp_path / "flight", block_steps=8)
    monitor = PromiseMonitor(judge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = SafetyShield(plant, judge, monitor=monitor, log=log)

        def interrupted(line: int) -> bool:
            """Take a step that is interrupted at a line of the runtime, recorder or monitor."""
            left = line

            def trace(frame: Any, event: str, _: object) -> Any:  # noqa: ANN401
                nonlocal left
                name = frame.f_code.co_filename
                if not re.search(r"monitoring|shield.(runtime|reported)\.py$", name):
                    return None
                left -= event == "line"
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            sys.settrace(trace)
            try:
                env.step(np.full(1, 0.9, np.float32))
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
            return False

        for line in itertools.count():
            env.reset()
            env.step(np.full(1, 0.3, np.float32))
            plant.next_step = ends
            if not interrupted(line):
                break
            plant.next_step = ""
            seen = plant.shown.copy()
            if env.runtime.ready:
                env.step(np.full(1, 0.9, np.float32))
                right, _ = judge.filter(seen, np.full(1, 0.9, np.float32))
                assert np.array_equal(plant.received[-1][1], right)
        env.reset()
        env.close()
    assert line > 100
    assert monitor.report().episodes > 0.9 * line
    flight = FlightLog.load(log.path)
    assert flight.closed
    assert flight.torn == 0
    seen = flight.columns["observation"]
    right, _ = judge.filter(seen, flight.columns["proposed"].astype(np.float32))
    assert np.array_equal(right, flight.columns["executed"])
    assert len(flight) > 1.5 * line


# -- broken wrappers -------------------------------------------------------------------------------

OBSERVE, FILTER, INFOS = ShieldRuntime.observe, ShieldRuntime.filter, ShieldRuntime.step_infos


def judges_the_previous_state(patch: pytest.MonkeyPatch) -> None:
    def observe(self: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        before = getattr(self, "kept", None)
        values = OBSERVE(self, *args, **options)
        self.kept = self.rows, self._readable, self._states
        if before is not None:
            self.rows, self._readable, self._states = before
        return values

    patch.setattr(ShieldRuntime, "observe", observe)


def remembers_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transition, "__enter__", lambda self: None)
    patch.setattr(Transition, "__exit__", lambda self, *error: None)


def sends_what_was_proposed(patch: pytest.MonkeyPatch) -> None:
    def decide(self: Any, actions: Any) -> Any:  # noqa: ANN401
        decision = FILTER(self, actions)
        return decision._replace(executed=decision.proposed.copy())

    patch.setattr(ShieldRuntime, "filter", decide)


def reads_an_action_twice(patch: pytest.MonkeyPatch) -> None:
    def decide(self: Any, actions: Any) -> Any:  # noqa: ANN401
        decision = FILTER(self, actions)
        again = np.array(actions, decision.executed.dtype)
        replaced = np.reshape(decision.intervened, (-1, *[1] * (again.ndim - 1)))
        return decision._replace(executed=np.where(replaced, decision.executed, again))

    patch.setattr(ShieldRuntime, "filter", decide)


def tells_too_little(patch: pytest.MonkeyPatch) -> None:
    def told(self: Any, *args: Any) -> Any:  # noqa: ANN401
        return {key: x for key, x in INFOS(self, *args).items() if key != "shield/safe_set"}

    patch.setattr(ShieldRuntime, "step_infos", told)


def tells_of_no_intervention(patch: pytest.MonkeyPatch) -> None:
    def told(self: Any, *args: Any) -> Any:  # noqa: ANN401
        infos = INFOS(self, *args)
        return {**infos, "shield/intervened": np.zeros_like(infos["shield/intervened"])[()]}

    patch.setattr(ShieldRuntime, "step_infos", told)


def certifies_what_it_cannot_see(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShieldRuntime, "_compare", lambda self, *_: None)


def records_no_failed_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlightTrack, "fail", lambda self, *_: None)


BROKEN = [
    judges_the_previous_state, remembers_after_a_failure, sends_what_was_proposed,
    reads_an_action_twice, tells_too_little, tells_of_no_intervention,
    certifies_what_it_cannot_see, records_no_failed_step,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda one: one.__name__)
def test_a_broken_wrapper_is_noticed(
    broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    machine = (Machine, SameStepMachine)[BROKEN.index(broken) % 2]
    # Not even an error of the broken wrapper itself counts, only what the machine compares.
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        play(machine, 200, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
