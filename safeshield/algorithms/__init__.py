"""Offline trainers: one readable file for each algorithm, and what they share."""
