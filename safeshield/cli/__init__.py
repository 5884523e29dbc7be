"""The command line."""

from safeshield.cli.app import main

__all__ = ["main"]
