"""The demonstration that `safeshield demo` runs: log, training, calibration and four agents."""
