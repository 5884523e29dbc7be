"""Policies that propose actions for exploration: uniform, of the log, of a table, of a user."""
