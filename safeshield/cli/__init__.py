"""The command line. Each command has its own module; `main` registers all of them."""

from safeshield.cli.app import app
from safeshield.cli.main import main

__all__ = ["app", "main"]
