"""The entry point of ``safeshield``. It registers the commands in the order of the help."""

from __future__ import annotations

from safeshield.cli import collect, sweep, train
from safeshield.cli.app import app, clear_errors
from safeshield.cli.calibrate import calibrate
from safeshield.cli.calibrate_from_log import calibrate_from_log
from safeshield.cli.demo import demo
from safeshield.cli.diagnose import diagnose
from safeshield.cli.doctor import doctor
from safeshield.cli.evaluate import evaluate
from safeshield.cli.export import export
from safeshield.cli.falsify import falsify
from safeshield.cli.inspect import inspect
from safeshield.cli.plan import plan
from safeshield.cli.report import report
from safeshield.cli.settings import command_with
from safeshield.cli.sign import sign
from safeshield.cli.split import split
from safeshield.cli.stress import stress
from safeshield.cli.watch import watch

app.command()(clear_errors(demo))
app.command(cls=command_with(collect.learner_settings))(clear_errors(collect.collect))
app.command(cls=command_with(train.all_settings))(clear_errors(train.train))
app.command(cls=command_with(sweep.file_entries))(clear_errors(sweep.sweep))
commands = (
    split, plan, calibrate, calibrate_from_log, evaluate, watch, diagnose, falsify, stress, report,
    export, inspect, sign, doctor,
)  # fmt: skip
for function in commands:
    app.command()(clear_errors(function))


def main() -> None:
    """Run the command line."""
    app()
