"""Policies that propose actions: uniform, the log's behaviour, a table, or a user's policy."""
