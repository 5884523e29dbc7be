"""The command line: a file for each command; `main` puts them together."""

from safeshield.cli.app import app
from safeshield.cli.main import main

__all__ = ["app", "main"]
