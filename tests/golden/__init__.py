"""Stored figures and files of the version of November 2026; see `golden.make`."""
