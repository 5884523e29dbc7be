"""The report: each kind of record said right, figures as in their sources, one safe page."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from test_shield import record
from typer.testing import CliRunner

from safeshield import FlightLog, OfflineDataset, PromiseMonitor, SafeFQL, ShieldLog, collect
from safeshield.calibration.binomial import upper_bound
from safeshield.cli.main import app
from safeshield.data.card import file_digest
from safeshield.monitoring.flight_file import row_dtype
from safeshield.reporting import safety_report, write_report
from safeshield.reporting.flight import _Episodes, replaced, worst
from safeshield.reporting.page import Html, escaped, fill
from safeshield.reporting.report import _elsewhere
from safeshield.shield import Shield
from safeshield.shield.log_record import Assumption, CurvePoint, Ledger, LogAttempt, LogRecord
from safeshield.shield.record import (
    COST_ABOVE,
    MEAN_COST,
    ActorRecord,
    Attempt,
    CalibrationRecord,
    PilotPoint,
    PolicyResult,
    Rung,
)
from safeshield.wrappers import SafetyShield

pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "<script>alert(1)</script>\u202e\ud800 & \"'{x}"
EVIDENCE = [f"E{i}" for i in range(1, 10)]
KINDS = ["calibrated", "watched", "actor", "logs", "none"]


def calibration(delta: float, **changes: Any) -> CalibrationRecord:  # noqa: ANN401
    """A record of two policies with a pilot, after an attempt that failed."""
    agents = ("mine", HOSTILE)
    bound = upper_bound(60, 1, 0.95)
    told: dict[str, Any] = {
        "policies": tuple(PolicyResult(one, 60, 1, bound, 0.25) for one in agents),
        "walk": tuple(Rung(d, one, 60, 1, bound, True) for d in (0.2, delta) for one in agents),
        "pilot": tuple(
            PilotPoint(d, one, 40, k, 0.7, 0.1) for d, k in ((0.2, 0), (0.01, 9)) for one in agents
        ),
        "attempts": (
            Attempt("safeshield/Boat-v0", agents, 0.1, False, -1),
            Attempt("safeshield/Boat-v0", agents, 0.05, True, 9),
        ),
        "horizon": 77,
        "deterministic": True,
    }
    return replace(record(delta), **{**told, **changes})


def statement(delta: float) -> LogRecord:
    return LogRecord(
        method="detection", delta=delta, confidence=0.9, spent=0.2, tries=2, episodes=30, events=1,
        bound=0.1, held_out=80, violating=31, cut=0, horizon=60, agent="", deterministic=None,
        replacement="", digest="ab" * 32, date="2026-01-01T00:00:00+00:00", versions={},
        assumptions=(Assumption("held out", "Held out.", True), Assumption("same", HOSTILE, False)),
        alpha=0.1, lead=3, threshold=-0.1,
        curve=(CurvePoint(-0.3, 0, 40), CurvePoint(-0.1, 1, 9), CurvePoint(0.0, 20, 0)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def bare(folder: Path) -> Shield:
    """A small stored shield of the boat."""
    return Shield.load(GOLDEN / "shield_nearest.safetensors").with_delta(0.05)


@pytest.fixture(scope="module")
def pages(bare: Shield, folder: Path) -> dict[str, str]:
    """A report on each kind of record, the watched one with all evidence."""
    shield = replace(bare, record=calibration(0.05))
    shield.save(folder / "watched.safetensors")
    log = collect(gym.make("safeshield/Boat-v0", max_episode_steps=40), "random", 12, seed=0)
    log.save(folder / "log.npz")
    known = replace(shield, training_episodes=np.arange(3, dtype=np.uint64))
    tested = known.with_support(log, alpha=0.2)
    tested = replace(tested, record=calibration(0.05))
    tested.save(folder / "tested.safetensors")
    monitor = PromiseMonitor(
        tested, folder / "promise.json", reference={"start_value": [0.1, 0.2, 0.3] * 20}
    )
    with ShieldLog(folder / "flight") as recorder:
        env = SafetyShield(
            gym.make("safeshield/Boat-v0", max_episode_steps=40), tested, log=recorder
        )
        env.action_space.seed(0)
        for episode in range(8):
            env.reset(seed=episode)
            done = False
            while not done:
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                done = terminated or truncated
    for episode in range(20):
        monitor.episode(f"{episode}", episode == 7, started=1.79e9 + episode)
    agent = SafeFQL.load(GOLDEN / "agent_safefql.safetensors", device="cpu")
    kept = {one.name: getattr(record(0.05), one.name) for one in dataclasses.fields(record(0.05))}
    bound = kept["policies"][0].bound
    kept["policies"] = (PolicyResult("SafeFQL", 40, 1, bound, 0.0),)
    kept["walk"] = (Rung(0.05, "SafeFQL", 40, 1, bound, True),)
    agent._certified = agent.config, ActorRecord(**kept)
    agent.save(folder / "actor.safetensors")
    tried = LogAttempt("shadow", 0.05, None, None, 0.1, None, "cd" * 32, "mine", passed=False)
    logs = replace(
        bare,
        log_records=(statement(0.05),),
        ledger=Ledger().with_attempt(tried, np.arange(4, dtype=np.uint64)),
    )
    return {
        "calibrated": safety_report(shield),
        "watched": safety_report(
            folder / "tested.safetensors", logs=[folder / "log.npz"],
            monitors=[folder / "promise.json"], flight=folder / "flight",
        ),
        "actor": safety_report(agent),
        "logs": safety_report(logs),
        "none": safety_report(bare),
    }  # fmt: skip


class Page(HTMLParser):
    """The elements, ids, links and text of a page; an error where a tag is not closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        assert len(told) == len(attrs)
        self.tags.append((tag, told))
        if "id" in told:
            self.ids.append(str(told["id"]))
        if tag == "a":
            href = str(told["href"])
            assert href.startswith("#")
            self.targets.add(href[1:])
        if told.get("aria-labelledby"):
            self.targets.add(str(told["aria-labelledby"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


# -- one page, well-formed and alone --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_loads_nothing_and_every_id_is_linked(
    kind: str, pages: dict[str, str]
) -> None:
    page = Page(pages[kind])
    assert page.tags[0][0] == "html"
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.ids) == page.targets
    assert set(EVIDENCE) <= set(page.ids)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "use", "image"}
    loading = {"src", "srcset", "xlink:href", "style", "background", "action"}
    for _, attributes in page.tags:
        assert not loading & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in pages[kind]
    assert "@import" not in pages[kind]
    assert "://" not in pages[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_claims_no_more_than_it_may(kind: str, pages: dict[str, str]) -> None:
    text = Page(pages[kind]).text.lower()
    assert "guaranteed" not in text
    assert "does not claim that a standard is met" in text
    assert "unsigned" in text
    for name in ("what is promised?", "for whom?", "on what evidence?", "what is not promised?"):
        assert name in text


def test_names_in_a_file_are_text_and_never_part_of_the_page(pages: dict[str, str]) -> None:
    for kind in ("calibrated", "logs"):
        assert "<script" not in pages[kind]
        assert "\u202e" not in pages[kind]
        assert "<script>alert(1)</script>\\u202e\\ud800 & \"'{x}" in Page(pages[kind]).text
    assert fill("<b>{one}</b>", one=["<", Html("<i>")]) == "<b>&lt;<i></b>"
    assert escaped(None) == ""


# -- the four kinds of records --------------------------------------------------------------------


def test_a_calibration_is_said_right(bare: Shield, pages: dict[str, str]) -> None:
    text = Page(pages["calibrated"]).text
    assert "violates the constraint with probability at most 10% (1 episode in 10)" in text
    assert "at confidence 90%" in text
    assert "(called with deterministic=True)" in text
    assert "Violating episodes: 1 of 60 with 'mine'" in text
    assert "Episodes of more than 77 steps." in text
    assert "10% of the starts drawn" in text
    assert "a share of up to 0.15 promises too much" in text
    assert "did not pass" in text
    # The exact words, but for characters that cannot be printed.
    plain = replace(record(0.05), policies=(PolicyResult("mine", 60, 1, 0.08, 0.25),))
    shown = Page(safety_report(replace(bare, record=plain))).text
    assert plain.promise in shown
    assert "Anything about an agent other than 'mine'" in shown
    assert "There was no search" in shown


def test_the_default_battery_is_no_deployed_agent(bare: Shield) -> None:
    both = tuple(PolicyResult(one, 30, 0, 0.09, 0.1) for one in ("random", "adversary"))
    text = Page(safety_report(replace(bare, record=replace(record(0.05), policies=both)))).text
    assert "Anything about the agent that will be deployed" in text
    assert "not covered until the shield is calibrated with it." in text


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (COST_ABOVE, {"limit": 7.0}, "exceeds 7 with probability at most 10%"),
        (
            MEAN_COST,
            {"limit": 5.0, "cost_bound": 50.0},
            "is at most 5, if no episode can cost more than 50",
        ),
    ],
)
def test_promises_about_costs_are_said_right(
    kind: Any,  # noqa: ANN401
    changes: dict[str, float],
    words: str,
    bare: Shield,
) -> None:
    told = calibration(0.05, kind=kind, **changes)
    text = Page(safety_report(replace(bare, record=told))).text
    assert words in text
    assert "violates the constraint with probability" not in text
    assert ("Bound of the cost" in text) == (kind == MEAN_COST)


def test_an_actor_alone_is_no_shield(pages: dict[str, str], folder: Path) -> None:
    text = Page(pages["actor"]).text
    assert "Safety report on an agent" in text
    assert "acting alone, without a shield" in text
    assert "with this shield" not in text
    assert "No bypass" not in text
    given = Path(folder / "actor.html")
    result = CliRunner().invoke(
        app, ["report", str(folder / "actor.safetensors"), "-o", str(given)]
    )
    assert result.exit_code == 0, result.output
    assert "Safety report on an agent" in given.read_text()


def test_statements_from_logs_are_no_calibration(pages: dict[str, str]) -> None:
    text = Page(pages["logs"]).text
    assert "No calibration by rollouts; 1 statement from logs." in text
    assert "at least 90% raise an alarm 3 or more steps before the violation" in text
    assert "Whether an alarm comes early enough to prevent the violation." in text
    assert statement(0.05).statement[:200] in text
    assert "Held out." in text
    assert "1shadow0.05mine0.1did not pass" in text
    assert "certified" in text


def test_no_record_is_no_promise(bare: Shield, pages: dict[str, str]) -> None:
    text = Page(pages["none"]).text
    assert "No promise: nothing is known about the rate of violations." in text
    assert "Nothing. The file holds no promise." in text
    assert "Nobody." in text
    failed = replace(bare, attempts=(Attempt("safeshield/Boat-v0", ("mine",), 0.1, False, 3),))
    assert "remembers: 1; did not pass: 1." in Page(safety_report(failed)).text


# -- figures as in their sources ------------------------------------------------------------------


def test_the_evidence_has_the_figures_of_its_sources(pages: dict[str, str], folder: Path) -> None:
    text = Page(pages["watched"]).text
    shield = Shield.load(folder / "tested.safetensors")
    assert file_digest(folder / "tested.safetensors") in text
    assert shield.digest in text
    log = OfflineDataset.load(folder / "log.npz")
    assert f"{len(log.actions)} transitions in {log.num_episodes} episodes" in text
    assert file_digest(folder / "log.npz") in text
    # The log set the level of the support test, so its episodes are among the known ones.
    assert "All of its episodes are among those from which the shield was made" in text
    assert shield.support is not None
    states = shield.model.unjudged(log.observations)
    below = int((~shield.support.accepts(shield.model, states, log.actions)).sum())
    assert f"Steps below the level{below} (" in text
    monitor = PromiseMonitor(shield, folder / "promise.json")
    assert monitor.counted() == [(1.79e9 + i, float(i == 7)) for i in range(20)]
    seen = monitor.report()
    assert (seen.episodes, seen.score) == (20, 1.0)
    assert f"{seen.evidence:.4g}; the promise is revoked at 1/b" in text
    assert "1, which is 5% [95% interval" in text
    card = FlightLog.load(folder / "flight").card()
    assert f"Interventions{card['replaced']} (" in text
    assert f"{card['steps']} in {card['episodes']} episodes" in text


def test_the_worst_episodes_come_first(pages: dict[str, str], folder: Path) -> None:
    flight = FlightLog.load(folder / "flight")
    found = _Episodes.of(flight)
    card = flight.card()
    assert len(found.number) == card["episodes"] == 8
    assert int(found.violated.sum()) == card["violating"]
    assert int(found.certified.sum()) == card["certified"]
    assert int(found.replaced.sum()) == card["replaced"]
    assert (found.steps == 40).all()
    assert set(found.ending.tolist()) == {"ended"}
    bad = found.violated.astype(int)
    assert (np.diff(bad) <= 0).all()
    for flag in (True, False):
        some = (found.violated == flag) & found.certified
        assert (np.diff(found.worst_h[some]) <= 0).all()
    for i, episode in enumerate(found.number):
        own = flight.columns["episode"] == episode
        last = flight.ends["h"][flight.ends["episode"] == episode]
        assert found.worst_h[i] == max(flight.columns["h"][own].max(), last.max())


def synthetic(steps: str, episodes: int = 3, length: int = 5) -> FlightLog:
    """A flight of discrete actions; in every second step action 1 becomes 2. h is not reported."""
    rows = np.zeros(episodes * length, row_dtype(1, 1, exact=False))
    count = np.arange(len(rows))
    rows["episode"], rows["step"] = count // length, count % length
    rows["time"], rows["seed"], rows["h"], rows["cost"] = 1.79e9 + count, -1, np.nan, np.nan
    rows["verdict"] = count % 2
    rows["proposed"], rows["executed"] = 1.0, 1.0 + count[:, None] % 2
    rows["observation"] = count[:, None] % 2
    rows["value"], rows["threshold"] = -0.5, -0.1
    if steps == "interventions":
        rows = rows[rows["verdict"] > 0]
    return FlightLog(
        rows=rows, steps=steps, shield={"digest": "0" * 16, "delta": 0.1, "mode": "shield"},
        agent="", environment="", environment_kwargs=None,
        observation_space=gym.spaces.Box(0, 1, (1,)),
        action_space=gym.spaces.Discrete(3), constraint_source=None, lost=0, removed=0, torn=0,
        growing=None, closed=True, files=1, bytes=1,
    )  # fmt: skip


def test_a_flight_of_another_environment_is_told() -> None:
    tested = record(0.05)
    assert _elsewhere(synthetic("all"), tested) == ""
    for change in ({"environment": "Other-v0"}, {"environment_kwargs": {"dt": 7.0}}):
        flight = replace(synthetic("all"), **{"environment": tested.environment, **change})
        told = _elsewhere(flight, replace(tested, environment_kwargs={}))
        assert "not of the environment that was tested" in told
        assert str(*change.values()) in told
    names = [one.policy for one in tested.policies]
    assert _elsewhere(replace(synthetic("all"), agent=names[0]), tested) == ""
    told = _elsewhere(replace(synthetic("all"), agent="x.zip"), tested)
    assert f"of the agent x.zip, and the promise is made for {', '.join(names)} only" in told


@pytest.mark.parametrize("steps", ["all", "interventions"])
def test_a_flight_of_discrete_actions_without_h(steps: str, bare: Shield) -> None:
    flight = synthetic(steps)
    shown = Page("<div>" + replaced(flight, bare) + worst(flight) + "</div>")
    assert "Interventions7 (" in shown.text
    assert "127" in shown.text  # action 1 became 2 in 7 steps
    assert "not finished" in shown.text
    assert "3, of which 0 began certified" in shown.text
    empty = dataclasses.replace(flight, rows=flight.rows[:0])
    told = Page("<div>" + replaced(empty, bare) + worst(empty) + "</div>").text
    assert "Interventions0 (0%" in told
    shadow = replace(flight, shield={**flight.shield, "mode": "shadow"}, torn=1, closed=False)
    told = Page("<div>" + replaced(shadow, bare) + worst(shadow) + "</div>").text
    assert "Would have been replaced7 (" in told
    assert "Environmentnot known to the recorder" in told
    assert "shadow: nothing was replaced" in told
    assert "Interventions" not in told
    assert "Most frequent replacements" not in told
    if steps == "all":
        assert "Share of steps that would have been replaced, where the agent was" in told
    assert "an unknown number of rows in 1 damaged place" in told


def test_a_revoked_promise_and_doubts_are_said_first(bare: Shield, tmp_path: Path) -> None:
    shield = replace(bare, record=record(0.05))
    monitor = PromiseMonitor(shield, tmp_path / "a.json")
    for episode in range(40):
        monitor.episode(f"{episode}", True)
    assert monitor.revoked
    text = Page(safety_report(shield, monitors=[tmp_path / "a.json"])).text
    assert text.index("REVOKED.") < text.index("In short")
    assert "Nothing any more: a monitor has revoked the promise." in text
    other = PromiseMonitor(
        shield, tmp_path / "b.json", reference={"start_value": np.linspace(0, 1, 200)}
    )
    for episode in range(60):
        other.episode(f"{episode}", False, covariates={"start_value": 5.0 + episode})
    text = Page(safety_report(shield, monitors=[tmp_path / "b.json"])).text
    assert text.index("ASSUMPTIONS IN DOUBT.") < text.index("In short")
    assert "A monitor doubts it: the start value" in text


def test_the_page_says_what_the_files_of_monitors_are_worth(bare: Shield, tmp_path: Path) -> None:
    shield = replace(bare, record=record(0.05))
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for file in files:
        PromiseMonitor(shield, file, cut_as_violations=True).episode(file.name, False, cut=True)
    text = Page(safety_report(shield, monitors=files)).text
    assert "revoked with probability at most 4 b (b for the episodes of all 3 files" in text
    assert "Cut3; they count as violations of the promise" in text
    assert "no digest and no signature" in text
    text = Page(safety_report(shield, monitors=files[:1])).text
    assert "revoked with probability at most b, however long" in text
    PromiseMonitor(shield, tmp_path / "d.json").episode("d", False, cut=True)
    text = Page(safety_report(shield, monitors=[tmp_path / "d.json"])).text
    assert "Cut1; they count with the score that they had reached" in text


def test_statements_about_the_same_episodes_share_their_confidence(bare: Shield) -> None:
    first = replace(statement(0.05), spent=0.1, tries=1, alpha=0.3)
    text = Page(safety_report(replace(bare, log_records=(first,)))).text
    assert "at confidence 90%." in text
    text = Page(safety_report(replace(bare, log_records=(first, statement(0.05))))).text
    summary = text[text.index("What is promised?") : text.index("For whom?")]
    assert summary.count("at confidence 80% together with the other statements") == 2


def test_evidence_of_another_shield_is_refused(
    bare: Shield, pages: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="flight must be one behind the shield of the report"):
        safety_report(replace(bare, record=record(0.05)), flight=folder / "flight")
    with pytest.raises(ValueError, match="episodes of another shield or record"):
        safety_report(replace(bare, record=record(0.05)), monitors=[folder / "promise.json"])
    with pytest.raises(ValueError, match="no record"):
        safety_report(bare, monitors=[folder / "promise.json"])
    for one in ("logs", "monitors"):
        with pytest.raises(TypeError, match=f"{one} must be a list of files, got 'a.json'"):
            safety_report(bare, **{one: "a.json"})  # type: ignore[arg-type]
    agent = SafeFQL.load(folder / "actor.safetensors", device="cpu")
    for wrong in ({"monitors": ["a.json"]}, {"flight": "a"}):
        with pytest.raises(ValueError, match="must be left out for an agent"):
            safety_report(agent, **wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "r.html", bare, logs=[tmp_path / "missing.npz"])
    assert not (tmp_path / "r.html").exists()


def test_a_signature_is_named_and_verified_with_a_key(bare: Shield, tmp_path: Path) -> None:
    keys = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key, other = keys.Ed25519PrivateKey.generate(), keys.Ed25519PrivateKey.generate()
    bare.save(tmp_path / "signed.safetensors", sign=key)
    bare.save(tmp_path / "bare.safetensors")
    text = Page(safety_report(tmp_path / "signed.safetensors")).text
    assert "File: signed, not verified." in text
    assert "unsigned" not in text
    text = Page(safety_report(tmp_path / "signed.safetensors", verify=key.public_key())).text
    assert "File: signature verified." in text
    assert "The signature is that of the key that was given." in text
    for name, wrong in (("signed", other), ("bare", key)):
        with pytest.raises(ValueError, match="sign"):
            safety_report(tmp_path / f"{name}.safetensors", verify=wrong.public_key())
    with pytest.raises(ValueError, match="verify must be None"):
        safety_report(bare, verify=key.public_key())


def test_the_command_writes_the_page(pages: dict[str, str], folder: Path) -> None:
    out = folder / "r.html"
    source = str(folder / "tested.safetensors")
    arguments = ["report", source, "--log", str(folder / "log.npz"), "--monitor",
                 str(folder / "promise.json"), "--flight", str(folder / "flight")]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "-o", str(out)])
    assert result.exit_code == 0, result.output
    made = re.compile(r"Made [0-9: -]+ UTC")
    assert made.sub("", out.read_text()) == made.sub("", pages["watched"])
    wrong = CliRunner().invoke(app, ["report", source, "-o", str(folder / "r.txt")])
    assert wrong.exit_code == 2
    assert "--out must end in .html or .htm" in wrong.output


# -- in a browser ---------------------------------------------------------------------------------

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))), None,
)  # fmt: skip
MEASURE = """<!DOCTYPE html><html><head><meta name="color-scheme" content="light dark"></head>
<body><pre id="measured"></pre>
<iframe id="page" style="width:%dpx;height:900px;border:0" srcdoc="%s"></iframe><script>
onload = () => {
  const page = document.getElementById("page").contentDocument;
  const drawings = [...page.querySelectorAll("figure > svg")];
  document.getElementById("measured").textContent = JSON.stringify({
    wide: page.documentElement.scrollWidth,
    drawings: drawings.map(one => {
      const box = one.getBoundingClientRect(); return [box.width, box.height]; }),
    text: [...page.querySelectorAll("svg text")].map(one => one.getBBox().width),
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor });
};
</script></body></html>"""
"""A page that shows another one at a width, because no window is narrower than 500 pixels."""


def browse(page: Path, *, dark: bool = False) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=1300,1000", scheme, "--virtual-time-budget=5000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
def test_a_browser_shows_the_page(
    width: int, dark: bool, pages: dict[str, str], tmp_path: Path
) -> None:
    page = pages["watched"]
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE % (width, html.escape(page, quote=True)), "utf-8")
    seen = browse(outer, dark=dark)
    assert "CONSOLE" not in seen.stderr
    measured = re.search(r'<pre id="measured">(.+?)</pre>', seen.stdout)
    assert measured
    found = json.loads(measured[1])
    assert found["wide"] <= width
    assert len(found["drawings"]) == page.count("<figure>") >= 6
    assert all(width / 4 < across <= width and down > 120 for across, down in found["drawings"])
    assert len(found["text"]) > 60
    assert min(found["text"]) > 0
    assert found["paper"] == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
def test_a_script_that_fails_would_be_seen(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<html><body><script>nothing()</script></body></html>")
    assert "CONSOLE" in browse(broken).stderr
