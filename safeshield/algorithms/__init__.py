"""Offline training algorithms, each in a module or package of its own."""
