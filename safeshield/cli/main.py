"""The entry point of ``safeshield``. It registers the commands in the order of the help."""

from __future__ import annotations

from safeshield.cli.app import app, clear_errors
from safeshield.cli.calibrate import calibrate
from safeshield.cli.collect import collect
from safeshield.cli.demo import demo
from safeshield.cli.doctor import doctor
from safeshield.cli.evaluate import evaluate
from safeshield.cli.inspect import inspect
from safeshield.cli.train import TrainCommand, train

app.command()(clear_errors(demo))
app.command()(clear_errors(collect))
app.command(cls=TrainCommand)(clear_errors(train))
for function in (calibrate, evaluate, inspect, doctor):
    app.command()(clear_errors(function))


def main() -> None:
    """Run the command line."""
    app()
