"""Records in files: their digest, whether they follow from their counts, and signatures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from safeshield import PromiseMonitor, SafetyShield, Shield, load_agent
from safeshield.calibration import BinomialPlan, fixed_plan, sequential_plan, upper_bound
from safeshield.calibration.binomial import at_most, masses
from safeshield.calibration.consistency import check_calibrations
from safeshield.cli.app import app
from safeshield.cli.main import main
from safeshield.files.tensors import read_tensors, sign_file, write_tensors
from safeshield.shield.record import (
    Attempt,
    CalibrationRecord,
    PilotPoint,
    PolicyResult,
    Rung,
)

GOLDEN = Path(__file__).parent / "golden"
CALIBRATED = GOLDEN / "shield_calibrated.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning",
    "ignore::safeshield.shield.shield.OtherEnvironmentWarning",
)


# -- the tests' ends and bounds, by counts ---------------------------------------------------------


def test_the_masses_are_scipys() -> None:
    for n, most, rate in [(0, 2, 0.3), (5, 8, 0.3), (250, 9, 0.01), (2000, 2000, 0.7)]:
        expected = binom.pmf(np.arange(most + 1), n, rate)
        np.testing.assert_allclose(masses(n, most, rate), expected, rtol=1e-10, atol=1e-300)
        assert at_most(most, n, rate) == pytest.approx(binom.cdf(most, n, rate), rel=1e-11)
    for rate in (0.0, 1.0):
        np.testing.assert_array_equal(masses(3, 4, rate), binom.pmf(np.arange(5), 3, rate))


def test_a_plan_ends_with_counts_exactly_where_some_order_of_the_scores_does() -> None:
    """By all orders of the scores of up to 12 episodes."""
    for looks in (((4, 0), (7, 1), (10, 2)), ((3, 1), (5, 3)), ((6, 2),)):
        plan = BinomialPlan(looks, 0.9)
        ends = set()
        for scores in itertools.product([0.0, 1.0], repeat=plan.most):
            decision = plan.decide(np.array(scores))
            assert decision is not None
            seen = scores[: decision.episodes]
            ends.add((decision.episodes, int(sum(seen)), decision.passed))
        told = {
            (n, k, plan.ended(n, k))
            for n in range(plan.most + 3)
            for k in range(plan.most + 3)
            if plan.ended(n, k) is not None
        }
        assert told == ends


def test_a_bound_is_shown_by_its_counts_alone() -> None:
    for plan in (sequential_plan(0.05, 0.95), fixed_plan(300, 0.05, 0.95)):
        last = plan.looks[-1][1]
        ends = [*plan.looks, (last + 1, last + 1), (plan.looks[0][0] + 1, last + 1)]
        for episodes, violations in ends:
            bound = plan.bound_of(episodes, violations)
            assert plan.shows(episodes, violations, bound)
            for wrong in (0.0, bound * (1 - 1e-4), bound * (1 + 1e-4), -bound, float("nan")):
                assert not plan.shows(episodes, violations, wrong)


def record_of(
    *rungs: tuple[float, int, int, float, bool], epsilon: float, confidence: float
) -> CalibrationRecord:
    walk = tuple(Rung(delta, "agent", n, k, bound, ok) for delta, n, k, bound, ok in rungs)
    chosen = [rung for rung in walk if rung.passed][-1]
    result = PolicyResult("agent", chosen.episodes, chosen.violations, chosen.bound, 0.1)
    return CalibrationRecord(
        chosen.delta, epsilon, confidence, (result,), "Plant-v0", "its own reset does", 0.9, walk,
        0, "2026-01-01T00:00:00+00:00", {},
    )  # fmt: skip


@pytest.mark.parametrize(("epsilon", "confidence"), [(0.01, 0.99), (0.05, 0.95), (0.3, 0.8)])
def test_what_a_test_can_give_is_accepted(epsilon: float, confidence: float) -> None:
    """Every end of the sequential test and of a fixed one, before and after a pass."""
    for plan in (sequential_plan(epsilon, confidence), fixed_plan(700, epsilon, confidence)):
        most = plan.looks[-1][1]
        passes = [(n, k) for n, k in plan.looks if plan.ended(n, k)]
        for n, k in passes:
            first = (1.0, n, k, plan.bound_of(n, k), True)
            check_calibrations(record_of(first, epsilon=epsilon, confidence=confidence), ())
            for count in (most + 1, plan.most // 2, plan.most):
                fails = (0.5, count, most + 1, plan.bound_of(count, most + 1), False)
                check_calibrations(
                    record_of(first, fails, epsilon=epsilon, confidence=confidence), ()
                )
                wrong = (0.5, count, most + 2, plan.bound_of(count, most + 2), False)
                if len(plan.looks) > 1 and most + 2 <= count:
                    with pytest.raises(ValueError, match="no test of this rate ends"):
                        check_calibrations(
                            record_of(first, wrong, epsilon=epsilon, confidence=confidence), ()
                        )


def test_an_error_names_the_statement_that_does_not_follow() -> None:
    good = record_of((0.1, 65, 0, 0.0450, True), epsilon=0.05, confidence=0.95)
    bound = sequential_plan(0.05, 0.95).bound_of(65, 0)
    for wrong, words in (
        (good, f"bound of 0 violations in 65 episodes is {bound:.6g}, not 0.045"),
        (replace(good, confidence=1.0), "confidence must lie between 0 and 1, got 1.0"),
        (replace(good, epsilon=0.001), "cannot show a rate of at most 0.001 at the level 0.05"),
        (replace(good, start_share=0.0), "start_share, the certified share of the starts"),
        (replace(good, walk=()), "deltas must be strictly decreasing and not empty"),
        (replace(good, delta=0.2), "delta must be 0.1, which the walk reached, got 0.2"),
        (replace(good, limit=3.0), "limit and cost_bound must be None and None"),
        (replace(good, date="soon"), "date must be a time in ISO 8601, got 'soon'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_calibrations(wrong, ())


def test_two_walks_share_the_level_of_the_attempt() -> None:
    plan = sequential_plan(0.05, 0.975)

    def rung(delta: float, n: int, k: int) -> tuple[float, int, int, float, bool]:
        return delta, n, k, plan.bound_of(n, k), bool(plan.ended(n, k))

    failed, (first, last) = (81, 6), plan.looks[:2]
    attempt = Attempt("Plant-v0", ("agent",), 1.0 - 0.95, True, 0)

    def two(*rungs: tuple[float, int, int, float, bool]) -> CalibrationRecord:
        one = record_of(*rungs, epsilon=0.05, confidence=0.95)
        seen = (PilotPoint(0.1, "agent", 104, 0, 1.0, 0.0),)
        return replace(one, walks_planned=2, pilot=seen, attempts=(attempt,))

    for good in (
        two(rung(0.1, *first)),
        two(rung(0.1, *failed), rung(0.4, *first), rung(0.2, *last)),
        two(rung(0.1, *failed), rung(0.4, *first), rung(0.2, *failed)),
    ):
        check_calibrations(good, (attempt,))
        assert CalibrationRecord.from_json(good.to_json()) == good
    whole = sequential_plan(0.05, 0.95)
    (least, most), *_ = whole.looks
    after = (two(rung(0.1, *failed), rung(0.4, *failed), rung(0.2, *first)),
             two(rung(0.1, *first), rung(0.05, *failed), rung(0.4, *first)))  # fmt: skip
    for wrong, words in (
        (two((0.1, least, most, whole.bound_of(least, most), True)), "cannot show a rate|no test"),
        (replace(good, walks_planned=1), "deltas must be strictly decreasing"),
        (replace(good, walks_planned=3), "walks_planned must be 1, or 2"),
        (replace(good, pilot=()), "walks_planned must be 1, or 2"),
        (replace(good, attempts=()), "walks_planned must be 1, or 2"),
        (after[0], "walk must end with its first failed test"),
        (after[1], "walk must end with its first failed test|which the walk reached"),
    ):
        with pytest.raises(ValueError, match=words):
            check_calibrations(wrong, wrong.attempts)


# -- files ----------------------------------------------------------------------------------------


def test_a_refused_file_names_itself_and_the_repair(tmp_path: Path) -> None:
    file = read_tensors(CALIBRATED)
    arrays = file.load(file.shapes, file.dtypes)
    header = {**file.header, "record": {**file.header["record"], "epsilon": 0.1}}
    write_tensors(tmp_path / "s", arrays, header)
    with pytest.raises(ValueError, match=r"/s holds a record .* cannot show a rate of at most 0.1"):
        Shield.load(tmp_path / "s")
    write_tensors(tmp_path / "s", arrays, {**file.header, "delta": -1.0})
    with pytest.raises(ValueError, match="delta must be finite and at least 0, got -1"):
        Shield.load(tmp_path / "s")


def test_released_files_load_and_are_unsigned() -> None:
    for path in sorted(GOLDEN.glob("shield_*.safetensors")):
        shield = Shield.load(path)
        assert shield.signature == "unsigned"
        assert ("unsigned" in repr(shield)) == (shield.record is not None)


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    shield = Shield.load(CALIBRATED)
    for call in (
        lambda: shield.save(tmp_path / "s", sign="key.pem"),
        lambda: Shield.load(CALIBRATED, verify="public.pem"),
    ):
        with pytest.raises(ImportError, match=r'pip install "safeshield\[sign\]"'):
            call()
    assert not (tmp_path / "s").exists()


# -- signatures -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Keys:
    private: Any
    public: Any
    private_file: Path
    public_file: Path


def another_key() -> Any:  # noqa: ANN401
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    private = another_key()
    pem = serialization.Encoding.PEM
    found = Keys(private, private.public_key(), tmp_path / "key.pem", tmp_path / "public.pem")
    found.private_file.write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    found.public_file.write_bytes(
        found.public.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return found


def test_a_signature_covers_everything_and_only_its_key_verifies_it(
    keys: Keys, tmp_path: Path
) -> None:
    shield, path = Shield.load(CALIBRATED), tmp_path / "s"
    for key in (keys.private, keys.private_file, str(keys.private_file)):
        shield.save(path, sign=key)
        assert Shield.load(path).signature == "signed, not verified"
        for public in (keys.public, keys.public_file):
            again = Shield.load(path, verify=public)
            assert again.signature == "signature verified"
            assert again.record == shield.record
    # A changed copy is not what was signed.
    assert again.with_constraint(None).signature == "unsigned"
    assert again.with_delta(0.2).signature == "unsigned"
    with pytest.raises(ValueError, match="signature is not valid for the key"):
        Shield.load(path, verify=another_key().public_key())
    again.save(path)
    with pytest.raises(ValueError, match="but it is unsigned: sign it with `safeshield sign"):
        Shield.load(path, verify=keys.public)


def test_metadata_that_no_digest_covers_are_refused(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "s"
    Shield.load(CALIBRATED).save(path, sign=keys.private)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + length])
    table["__metadata__"]["promise"] = "no episode violates"
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    for verify in (None, keys.public):
        with pytest.raises(ValueError, match="must hold 'safeshield' alone, which digest and sig"):
            Shield.load(path, verify=verify)


def test_load_agent_demands_a_signature(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    path.write_bytes((CALIBRATED.parent / "agent_safefql.safetensors").read_bytes())
    with pytest.raises(ValueError, match="but it is unsigned"):
        load_agent(path, verify=keys.public)
    sign_file(path, keys.private)
    assert type(load_agent(path, verify=keys.public)).__name__ == "SafeFQL"
    with pytest.raises(ValueError, match="signature is not valid for the key"):
        load_agent(path, verify=another_key().public_key())


@pytest.mark.parametrize("load", [Shield.load, load_agent])
def test_a_file_that_is_missing_is_named_with_a_repair(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must name a file .*x', which is no such f"):
        load(tmp_path / "x")
    with pytest.raises(IsADirectoryError, match="which is a folder: check the name"):
        load(tmp_path)


def test_keys_that_are_none_are_refused(keys: Keys, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    shield, other = Shield.load(CALIBRATED), tmp_path / "other.pem"
    shield.save(tmp_path / "s", sign=keys.private)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"secret")
    for content, words in (
        (b"nothing", "holds none; `openssl genpkey"),
        (keys.public_file.read_bytes(), "holds none"),
        (keys.private.private_bytes(pem, form, locked), "a key with a password"),
        (
            generate_private_key(SECP256R1()).private_bytes(
                pem, form, serialization.NoEncryption()
            ),
            "holds none",
        ),
    ):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            shield.save(tmp_path / "s", sign=other)
    with pytest.raises(ValueError, match="a private key; `openssl pkey"):
        Shield.load(tmp_path / "s", verify=keys.private_file)
    with pytest.raises(TypeError, match="must be a private Ed25519 key or the path"):
        shield.save(tmp_path / "s", sign=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a public Ed25519 key or the path"):
        Shield.load(tmp_path / "s", verify=keys.private)
    for act, name in ((Shield.load, "verify"), (shield.save, "sign")):
        with pytest.raises(FileNotFoundError, match=rf"{name} must name .*none\.pem': check"):
            act(tmp_path / "s", **{name: tmp_path / "none.pem"})  # type: ignore[operator]
    assert Shield.load(tmp_path / "s", verify=keys.public).delta == shield.delta


def test_infos_say_whether_a_watched_promise_is_signed(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "s"
    Shield.load(CALIBRATED).save(path, sign=keys.private)
    plant = gym.make("safeshield/DoubleIntegrator-v0")
    for shield, said in (
        (Shield.load(CALIBRATED), "unsigned"),
        (Shield.load(path), "signed, not verified"),
        (Shield.load(path, verify=keys.public), "signature verified"),
    ):
        env = SafetyShield(plant, shield, monitor=PromiseMonitor(shield))
        assert env.reset(seed=0)[1]["shield/promise_signature"] == said
        assert env.step(env.action_space.sample())[4]["shield/promise_signature"] == said


def test_the_commands_sign_and_say_it(keys: Keys, tmp_path: Path) -> None:
    assert main is not None  # Registers the commands.
    path, agent = tmp_path / "s", tmp_path / "agent"
    path.write_bytes(CALIBRATED.read_bytes())
    agent.write_bytes((GOLDEN / "agent_safefql.safetensors").read_bytes())

    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, " ".join(result.output.split())

    assert "signature unsigned" in run("inspect", path)[1]
    assert run("inspect", path, "--verify", keys.public_file)[0] == 2
    for file in (path, agent):
        code, output = run("sign", file, "--key", keys.private_file)
        assert (code, str(read_tensors(file).digest) in output) == (0, True)
        assert "signature signed, not verified" in run("inspect", file)[1]
        verified = run("inspect", file, "--verify", keys.public_file)
        assert (verified[0], "signature verified" in verified[1]) == (0, True)
    assert "promise: With confidence 0.9" in run("sign", path, "--key", keys.private_file)[1]
    code, _ = run("sign", path, "--key", keys.private_file, "--out", tmp_path / "out")
    assert (code, (tmp_path / "out").read_bytes()) == (0, path.read_bytes())

    from safeshield import SafeFQL

    assert SafeFQL.load(agent, device="cpu", verify=keys.public).attempts == ()
    unsigned = GOLDEN / "agent_safefql.safetensors"
    with pytest.raises(ValueError, match="but it is unsigned"):
        SafeFQL.load(unsigned, device="cpu", verify=keys.public)


def test_no_edited_record_loads_and_no_forged_one_with_the_key(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of `benchmarks/records.py`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import records

    _, signed, edited, impossible, unsigned, *with_key = records.table(
        tmp_path, keys.private, another_key(), every=25
    )
    assert signed[1:] == (6, 6, "signature verified")
    assert edited[1] > 200
    assert edited[2] == 0
    assert impossible[1] > 150
    assert impossible[2:] == (0, "")
    assert unsigned[1] == unsigned[2] > 30
    assert unsigned[3:] == ("unsigned",)
    assert [row[2] for row in with_key] == [0] * 5


def test_upper_bound_and_the_plan_of_one_look_agree() -> None:
    for n, k in [(40, 0), (40, 3), (700, 12)]:
        plan = BinomialPlan(((n, k),), 0.9)
        assert plan.bound_of(n, k) == pytest.approx(upper_bound(n, k, 0.9), rel=1e-12)
