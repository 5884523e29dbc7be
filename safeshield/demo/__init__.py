"""The demonstration that `safeshield demo` runs: logs, training, calibration, four agents."""
